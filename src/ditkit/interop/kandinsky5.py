"""Kandinsky 5 as its authors publish it, and as diffusers has it: the same names and shapes in both.

What shapes do not tell (how a head is divided among the axes, scale factors, the pattern) is in the authors' YAML, in
transformer/config.json of diffusers, or follows from the size of a head in the released models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import DitkitError
from ..diffusion import Euler, Linear, LogitNormal, Meaning, Regression
from ..diffusion.grid import SD3
from ..layers import Nabla
from ..models import Kandinsky5Config
from .diffusers import VERSION
from .format import Format, Shapes, block_count, described, option, shape
from .source import Source
from .table import Rule

__all__ = ["KANDINSKY5", "kandinsky5_settings"]

_MEANING = Meaning(Linear(), "velocity", "1000t")
_AXES = {64: (16, 24, 24), 128: (32, 48, 48)}
_IN, _OUT = "visual_embeddings.in_layer.weight", "out_layer.out_layer.weight"


def _attention(ours: str, theirs: str) -> tuple[Rule, ...]:
    names = {"q": "to_query", "k": "to_key", "v": "to_value", "q_norm": "query_norm", "k_norm": "key_norm"}
    names["proj"] = "out_layer"
    return tuple(Rule(f"{ours}.{name}.*", (f"{theirs}.{their}.*",)) for name, their in names.items())


def _block(ours: str, theirs: str, modulation: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}.adaLN_modulation.1.*", (f"{theirs}.{modulation}.out_layer.*",)),
        *_attention(f"{ours}.attn", f"{theirs}.self_attention"),
        *_attention(f"{ours}.cross", f"{theirs}.cross_attention"),
        Rule(f"{ours}.mlp.fc1.*", (f"{theirs}.feed_forward.in_layer.*",)),
        Rule(f"{ours}.mlp.fc2.*", (f"{theirs}.feed_forward.out_layer.*",)),
    )


def _config(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> Kandinsky5Config:
    """Widths, depths and channels from shapes; the rest from config.json, options, or the released models."""
    said = source.settings()
    dim, features = shape(shapes, _IN, 2)
    head = shape(shapes, "visual_transformer_blocks.0.self_attention.query_norm.weight", 1)[0]
    axes = option(options, "axes", said.get("axes_dims", _AXES.get(head)), "how a head is divided among the axes")
    patch = tuple(options.get("patch_size", said.get("patch_size", (1, 2, 2))))
    if not all(type(n) is int and n > 0 for n in (*patch, *axes)) or len(patch) != 3 or sum(axes) != head:
        raise DitkitError(f"patches of {patch} and axes {tuple(axes)} do not fit heads of {head} channels")
    channels, rest = divmod(shape(shapes, _OUT, 2)[0], math.prod(patch))
    seen, rest_seen = divmod(features, math.prod(patch))
    if rest or rest_seen or seen not in (channels, 2 * channels + 1):
        raise DitkitError(
            f"{_IN} takes {features} features of a patch and {_OUT} gives {shape(shapes, _OUT, 2)[0]}: in patches of "
            f"{' x '.join(map(str, patch))} that is neither x alone nor x with a latent and a mask"
        )
    given = seen != channels
    # the network that edits images is given a latent, too; the autoencoder beside it is one of images
    image = not given or source.json("vae/config.json").get("_class_name") == "AutoencoderKL"
    return Kandinsky5Config(
        input_size=options.get("input_size", (1, 128, 128) if image else (31, 64, 96)),
        patch_size=patch,
        in_channels=channels,
        given_channels=given,
        hidden_size=dim,
        ff_dim=shape(shapes, "visual_transformer_blocks.0.feed_forward.in_layer.weight", 2)[0],
        time_dim=shape(shapes, "time_embeddings.in_layer.weight", 2)[0],
        text_depth=block_count(shapes, "text_transformer_blocks."),
        depth=block_count(shapes, "visual_transformer_blocks."),
        axes=tuple(axes),
        text_dim=shape(shapes, "text_embeddings.in_layer.weight", 2)[1],
        pooled_dim=shape(shapes, "pooled_text_embeddings.in_layer.weight", 2)[1],
        scale_factor=options.get("scale_factor", (1.0, 1.0, 1.0) if image else (1.0, 2.0, 2.0)),
        pattern=options.get("pattern", _pattern(said)),
    )


def _pattern(said: Mapping[str, Any]) -> Nabla | None:
    """Nabla as diffusers' config.json says it. Raises DitkitError for another way to choose blocks."""
    if said.get("attention_type") != "nabla":
        return None
    method = said.get("attention_method")
    if method not in (None, "topcdf"):
        raise DitkitError(f"transformer/config.json: attention_method is {method!r}; only 'topcdf' is known")
    frames, rows, columns = (said.get(f"attention_w{axis}") or 1 for axis in "THW")
    window = (frames, rows, columns) if said.get("attention_add_sta", True) else None
    return Nabla(float(said.get("attention_P") or 0.9), window)


def _refusal(config: Kandinsky5Config, meaning: Meaning) -> str | None:
    if meaning != _MEANING:
        return (
            "a Kandinsky 5 file means velocity on a linear path with the clock 1000t to whoever reads it, and this "
            f"model was trained as {described(meaning)}"
        )
    if config.pattern is not None and not (isinstance(config.pattern, Nabla) and config.pattern.tile == (1, 8, 8)):
        return f"Kandinsky 5 knows Nabla with tiles of 1 x 8 x 8 alone, and this model has {config.pattern}"
    return None


KANDINSKY5 = Format(
    name="kandinsky5",
    title="Kandinsky 5 (Kandinsky Lab 2025)",
    model=Kandinsky5Config,
    match=lambda shapes: {_IN, _OUT, "pooled_text_embeddings.in_layer.weight"} <= set(shapes),
    rules=(
        Rule("x_embedder.*", ("visual_embeddings.in_layer.*",)),
        Rule("t_embedder.mlp.0.*", ("time_embeddings.in_layer.*",)),
        Rule("t_embedder.mlp.2.*", ("time_embeddings.out_layer.*",)),
        Rule("text_embedder.0.*", ("text_embeddings.in_layer.*",)),
        Rule("text_embedder.1.*", ("text_embeddings.norm.*",)),
        Rule("pooled_embedder.0.*", ("pooled_text_embeddings.in_layer.*",)),
        Rule("pooled_embedder.1.*", ("pooled_text_embeddings.norm.*",)),
        *_block("text_blocks.#", "text_transformer_blocks.#", "text_modulation"),
        *_block("blocks.#", "visual_transformer_blocks.#", "visual_modulation"),
        Rule("final_layer.adaLN_modulation.1.*", ("out_layer.modulation.out_layer.*",)),
        Rule("final_layer.linear.*", ("out_layer.out_layer.*",)),
    ),
    config=_config,
    denoiser=lambda source, config: _MEANING,
    refusal=_refusal,
    # the authors' pipelines shift the times by 10 for videos and by 3 for images, and guide by 5 and by 3.5; guidance
    # takes the text to turn away from, which is the person's to say
    sampling=lambda config: {
        "steps": 50,
        "solver": Euler(),
        "grid": SD3(3.0 if config.input_size[0] == 1 else 10.0),
        "guidance": 1.0,
    },
    objective=lambda config, meaning: Regression("velocity", LogitNormal()),
    settings=lambda config, meaning: {"config.json": kandinsky5_settings(config)},
    file="diffusion_pytorch_model.safetensors",
    official=True,
    video=True,
)


def kandinsky5_settings(config: Kandinsky5Config) -> dict[str, Any]:
    """transformer/config.json of diffusers, for what `KANDINSKY5.refusal` lets pass."""
    pattern = config.pattern
    settings: dict[str, Any] = {
        "_class_name": "Kandinsky5Transformer3DModel",
        "_diffusers_version": VERSION,
        "in_visual_dim": config.in_channels,
        "out_visual_dim": config.in_channels,
        "in_text_dim": config.text_dim,
        "in_text_dim2": config.pooled_dim,
        "time_dim": config.time_dim,
        "patch_size": list(config.patch_size),
        "model_dim": config.hidden_size,
        "ff_dim": config.ff_dim,
        "num_text_blocks": config.text_depth,
        "num_visual_blocks": config.depth,
        "axes_dims": list(config.axes),
        "visual_cond": config.given_channels,
        "attention_type": "regular" if pattern is None else "nabla",
    }
    if isinstance(pattern, Nabla):
        frames, rows, columns = pattern.window or (1, 1, 1)
        settings |= {
            "attention_P": pattern.mass,
            "attention_wT": frames,
            "attention_wH": rows,
            "attention_wW": columns,
            "attention_add_sta": pattern.window is not None,
            "attention_method": "topcdf",
        }
    return settings
