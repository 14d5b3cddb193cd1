"""ADM's U-Nets as guided-diffusion publishes them: bare state dicts, and the settings that its programs are given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..config import DitkitError, near
from ..diffusion import DDPM, Ancestral, Discrete, Meaning, Regression
from ..diffusion.grid import Respaced
from ..models import UNetConfig
from .format import Format, Shapes, described, option, published, shape
from .source import Source
from .table import Rule

__all__ = ["ADM", "unet_config"]

_LINEAR, _COSINE = Meaning(DDPM(), "eps", "index"), Meaning(DDPM(schedule="cosine"), "eps", "index")

_SAME = (
    "in_channels", "model_channels", "num_res_blocks", "num_heads", "dropout", "conv_resample", "resblock_updown",
    "use_scale_shift_norm", "use_new_attention_order",
)  # fmt: skip
_READ = (
    "attention_resolutions", "channel_mult", "num_head_channels", "num_heads_upsample", "image_size", "num_classes",
    "out_channels", "num_channels", "class_cond", "learn_sigma",
)  # fmt: skip
_NO_MATTER = ("use_checkpoint", "use_fp16", "dims")
_UNSAID = {
    "in_channels": 3, "num_heads": 1, "num_head_channels": 0, "use_scale_shift_norm": False, "resblock_updown": False,
    "dropout": 0.0, "null_label": False, "num_classes": 0,
}  # fmt: skip
"""What guided-diffusion's UNetModel takes a setting to be that is not given."""
_MULT = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}


def unet_config(settings: Mapping[str, Any]) -> UNetConfig:
    """The configuration of guided-diffusion's UNetModel from its arguments, or from the flags of its programs, by name.

    As an argument `attention_resolutions` are factors of down-sampling, as a flag ("32,16,8") sides of feature maps;
    -1, None and "" mean "not set"; the flag class_cond means ImageNet's 1000 classes. Raises DitkitError for what is
    not known.
    """
    if unknown := [name for name in settings if name not in (*_SAME, *_READ, *_NO_MATTER)]:
        raise DitkitError(f"UNetModel has no setting {unknown[0]!r}: {near(unknown[0], (*_SAME, *_READ, *_NO_MATTER))}")
    if settings.get("dims", 2) != 2:
        raise DitkitError(f"only U-Nets on images are supported, not with dims = {settings['dims']}")
    found = _UNSAID | {name: settings[name] for name in _SAME if name in settings}
    found |= {name: max(settings[name], 0) for name in ("num_head_channels", "num_heads_upsample") if name in settings}
    if "num_channels" in settings:
        found["model_channels"] = settings["num_channels"]
    size = settings.get("image_size", 64)
    found["input_size"] = size
    mult = settings.get("channel_mult") or _MULT.get(size, (1, 2, 4, 8))
    found["channel_mult"] = tuple(map(float, mult.split(","))) if isinstance(mult, str) else tuple(mult)
    where = settings.get("attention_resolutions", ())
    if isinstance(where, str):
        where = sorted(size // int(side) for side in where.split(","))
    found["attention_resolutions"] = tuple(where)
    found["num_classes"] = settings.get("num_classes") or (1000 if settings.get("class_cond") else 0)
    channels = found["in_channels"]
    outputs = settings.get("out_channels", 2 * channels if settings.get("learn_sigma") else channels)
    return UNetConfig(**found, learn_sigma=_learned(outputs, channels))


def _learned(outputs: int, channels: int) -> bool:
    if outputs not in (channels, 2 * channels):
        raise DitkitError(f"{outputs} channels come out of {channels}: neither noise alone, nor noise and variance")
    return outputs == 2 * channels


def _is_adm(shapes: Shapes) -> bool:
    needed = {"time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight", "out.2.weight"}
    return needed | {"output_blocks.0.0.in_layers.2.weight"} <= set(shapes)


def _rows(shapes: Shapes, name: str) -> int:
    """Channels that a convolution, or a Linear, gives."""
    if name not in shapes or not shapes[name] or shapes[name][0] < 1:
        raise DitkitError(f"it lacks {name}" if name not in shapes else f"{name} is {list(shapes[name])}")
    return shapes[name][0]


def _config(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> UNetConfig:
    """Everything but heads, their order and the size of the images follows from names and shapes.

    Down-sampling residual blocks look like others; where a level begins is told by the second half, in which each level
    but the first ends with a layer more.
    """
    channels = shape(shapes, "input_blocks.0.0.weight", 4)[1]
    width = shape(shapes, "time_embed.0.weight", 2)[1]
    if channels == _rows(shapes, "out.2.weight") == 6:
        raise DitkitError("this is an upsampler, which is given a small image besides: only base models are supported")
    numbers = sorted({int(found[1]) for key in shapes if (found := re.match(r"output_blocks\.(\d{1,4})\.0\.", key))})
    total = len(numbers)
    if numbers != list(range(total)):
        raise DitkitError(f"its output_blocks are not numbered from 0 on, {total} of them with a residual block")
    with_block = {i for i in numbers if any(f"output_blocks.{i}.{k}.in_layers.0.weight" in shapes for k in (1, 2))}
    with_conv = {i for i in numbers if any(f"output_blocks.{i}.{k}.conv.weight" in shapes for k in (1, 2))}
    # without either, what changes the resolution has no weights, and its place in the first half is empty
    inputs = {int(found[1]) for key in shapes if (found := re.match(r"input_blocks\.(\d{1,4})\.0\.", key))}
    empty = {i - 1 for i in range(1, total) if i not in inputs}
    per_level = min(with_block | with_conv | empty, default=total - 1) + 1
    if per_level < 2 or total % per_level:
        raise DitkitError(f"{total} output_blocks are no levels of {per_level}")
    levels = range(total // per_level)
    first = [1 + level * per_level for level in levels]
    widths = [_rows(shapes, f"input_blocks.{i}.0.out_layers.3.weight") for i in first]
    modulated = _rows(shapes, "input_blocks.1.0.emb_layers.1.weight") == 2 * widths[0]
    mult = tuple(w / width for w in widths)
    attended = tuple(
        2**level for level, i in zip(levels, first, strict=True) if f"input_blocks.{i}.1.qkv.weight" in shapes
    )
    known = published(
        UNetConfig,
        model_channels=width,
        channel_mult=mult,
        num_res_blocks=per_level - 1,
        attention_resolutions=attended,
    )
    heads, size = options.get("num_heads"), options.get("num_head_channels")
    if heads is None and size is None:
        size = getattr(known, "num_head_channels", None)
        heads = getattr(known, "num_heads", None)
    if not size:
        heads = option({}, "num_heads", heads, "how many heads its attention has, or with how many channels each")
    rows = shape(shapes, "label_emb.weight", 2)[0] if "label_emb.weight" in shapes else 0
    null = bool(options.get("null_label", False)) and rows > 0
    return UNetConfig(
        input_size=options.get("input_size", getattr(known, "input_size", 8 * 2 ** levels[-1])),
        in_channels=channels,
        model_channels=width,
        channel_mult=mult,
        num_res_blocks=per_level - 1,
        attention_resolutions=attended,
        num_heads=heads or 1,
        num_head_channels=size or 0,
        use_new_attention_order=options.get(
            "use_new_attention_order", getattr(known, "use_new_attention_order", False)
        ),
        use_scale_shift_norm=modulated,
        resblock_updown=bool(with_block),
        conv_resample=not empty,
        dropout=getattr(known, "dropout", 0.0),
        num_classes=rows - null,
        null_label=null,
        learn_sigma=_learned(_rows(shapes, "out.2.weight"), channels),
    )


def _meaning(source: Source, config: UNetConfig) -> Meaning:
    """The noise of the 64 px model is cosine, that of all others linear (ADM table 11); a file does not say it."""
    return _COSINE if config.input_size == 64 else _LINEAR


def _refusal(config: UNetConfig, meaning: Meaning) -> str | None:
    if meaning not in (_LINEAR, _COSINE):
        return (
            "an ADM file means eps on a DDPM table of 1000 steps, linear or cosine, with the clock index, and this "
            f"model was trained as {described(meaning)}"
        )
    if config.norm_groups != 32:
        return f"guided-diffusion's norms have 32 groups, and this model's have {config.norm_groups}"
    return None


ADM = Format(
    name="adm",
    title="ADM (Dhariwal & Nichol 2021)",
    model=UNetConfig,
    match=_is_adm,
    rules=(Rule("*", ("*",)),),
    config=_config,
    denoiser=_meaning,
    refusal=_refusal,
    # the README's: 250 ancestral steps; its guidance is a classifier's
    sampling=lambda config: {
        "steps": 250,
        "solver": Ancestral("learned" if config.learn_sigma else "beta"),
        "grid": Respaced(),
        "guidance": 1.0,
    },
    objective=lambda config, meaning: Regression(
        "eps", Discrete(meaning.path.steps), variance="hybrid" if config.learn_sigma else None
    ),
)
