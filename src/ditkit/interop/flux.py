"""FLUX.1 and FLUX.2 as Black Forest Labs publishes them, and as diffusers has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..config import DitkitError
from ..diffusion import Euler, Linear, LogitNormal, Meaning, Regression
from ..diffusion.grid import Flux as Shifted
from ..diffusion.grid import Uniform
from ..models import FluxConfig
from .diffusers import VERSION, dual_stream, embedder
from .format import Format, Shapes, block_count, described, expect, integer, option, settings, shape
from .source import Source
from .table import Rule

__all__ = ["DIFFUSERS_FLUX", "DIFFUSERS_FLUX2", "FLUX", "FLUX2"]

_MEANING = Meaning(Linear(), "velocity", "t")

# what the two differ in and no shape says
_FIRST: dict[str, Any] = {
    "patch_size": 2, "theta": 10000.0, "reference_step": 1, "swiglu": False, "bias": True, "shared_modulation": False,
}  # fmt: skip
_SECOND: dict[str, Any] = {
    "patch_size": 1, "theta": 2000.0, "reference_step": 10, "swiglu": True, "bias": False, "shared_modulation": True,
}  # fmt: skip
_AXES = {(128, False): (16, 56, 56), (128, True): (32, 32, 32, 32)}
"""How the released heads divide, by their size and by whether it is FLUX.2."""


def _is_second(config: FluxConfig) -> bool:
    return config.shared_modulation


def _refusal(config: FluxConfig, meaning: Meaning, second: bool) -> str | None:
    name = "FLUX.2" if second else "FLUX.1"
    if meaning != _MEANING:
        return (
            f"whoever reads {name} takes its output for the velocity on the linear path with the clock t, and this "
            f"model was trained as {described(meaning)}"
        )
    for field, value in (_SECOND if second else _FIRST).items():
        if (own := getattr(config, field)) != value:
            return f"{name} has {field} {value}, and this model {own}"
    if second and (config.pooled_dim or len(config.axes) != 4):
        return "FLUX.2 is given no pooled text and has four axes, the last of them the place in the text"
    if not second and (not config.pooled_dim or len(config.axes) != 3):
        return "FLUX.1 is given a pooled text and has three axes"
    return None


def _sampling(config: FluxConfig) -> dict[str, Any]:
    """What diffusers' pipelines do unless told otherwise, and the four steps of [schnell]. Guidance is distilled."""
    if not config.guidance and not _is_second(config):
        return {"steps": 4, "solver": Euler(), "grid": Uniform(), "guidance": 1.0}
    return {"steps": 50 if _is_second(config) else 28, "solver": Euler(), "grid": Shifted(), "guidance": 1.0}


def _objective(config: FluxConfig, meaning: Meaning) -> Regression:
    """The authors published none; this is that of Stable Diffusion 3."""
    return Regression("velocity", LogitNormal(0.0, 1.0))


def _config(
    shapes: Shapes, second: bool, names: Mapping[str, str], axes: Callable[[int], Any], size: Any
) -> FluxConfig:
    """Everything but size and axes follows from shapes; `axes` is a function of the size of a head."""
    dim, features = shape(shapes, names["image"], 2)
    patch = (_SECOND if second else _FIRST)["patch_size"]
    head = shape(shapes, names["norm"], 1)[0]
    if dim % head or features % patch**2:
        raise DitkitError(
            f"{names['image']} is {[dim, features]}, which are no heads of {head} and no patches of {patch} x {patch}"
        )
    rows = shape(shapes, names["mlp"], 2)[0]
    return FluxConfig(
        input_size=(64 if second else 128) if size is None else size,
        in_channels=features // patch**2,
        hidden_size=dim,
        depth=block_count(shapes, names["double"]),
        single_depth=block_count(shapes, names["single"]),
        num_heads=dim // head,
        mlp_ratio=rows / dim / (2 if second else 1),
        text_dim=shape(shapes, names["text"], 2)[1],
        pooled_dim=0 if second else shape(shapes, names["pooled"], 2)[1],
        guidance=names["guidance"] in shapes,
        axes=axes(head),
        frequencies=shape(shapes, names["time"], 2)[1],
        **(_SECOND if second else _FIRST),
    )


# the authors' names

_OFFICIAL = {
    "image": "img_in.weight",
    "text": "txt_in.weight",
    "pooled": "vector_in.in_layer.weight",
    "time": "time_in.in_layer.weight",
    "guidance": "guidance_in.in_layer.weight",
    "double": "double_blocks.",
    "single": "single_blocks.",
    "norm": "double_blocks.0.img_attn.norm.query_norm.scale",
    "mlp": "double_blocks.0.img_mlp.0.weight",
}


def _released(second: bool) -> Callable[[Source, Shapes, Mapping[str, Any]], FluxConfig]:
    def config(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> FluxConfig:
        def axes(head: int) -> tuple[int, ...]:
            what = "how its heads divide into time, row, column" + (" and place in the text" if second else "")
            return tuple(option(options, "axes", _AXES.get((head, second)), what))

        return _config(shapes, second, _OFFICIAL, axes, options.get("input_size"))

    return config


def _official_rules(second: bool) -> tuple[Rule, ...]:
    mlp = ("w12", "w3") if second else ("fc1", "fc2")
    rules = []
    for name in ("time_in", "vector_in", "guidance_in"):
        rules += [Rule(f"{name}.mlp.0.*", (f"{name}.in_layer.*",)), Rule(f"{name}.mlp.2.*", (f"{name}.out_layer.*",))]
    for kind in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        rules.append(Rule(f"{kind}.1.*", (f"{kind}.lin.*",)))
    for stream, name in (("x_block", "img"), ("context_block", "txt")):
        ours, theirs = f"double_blocks.#.{stream}", f"double_blocks.#.{name}"
        rules += [
            Rule(f"{ours}.adaLN_modulation.1.*", (f"{theirs}_mod.lin.*",)),
            Rule(f"{ours}.attn.q_norm.weight", (f"{theirs}_attn.norm.query_norm.scale",)),
            Rule(f"{ours}.attn.k_norm.weight", (f"{theirs}_attn.norm.key_norm.scale",)),
            Rule(f"{ours}.attn.*", (f"{theirs}_attn.*",)),
            Rule(f"{ours}.mlp.{mlp[0]}.*", (f"{theirs}_mlp.0.*",)),
            Rule(f"{ours}.mlp.{mlp[1]}.*", (f"{theirs}_mlp.2.*",)),
        ]
    return (
        *rules,
        Rule("single_blocks.#.adaLN_modulation.1.*", ("single_blocks.#.modulation.lin.*",)),
        Rule("single_blocks.#.q_norm.weight", ("single_blocks.#.norm.query_norm.scale",)),
        Rule("single_blocks.#.k_norm.weight", ("single_blocks.#.norm.key_norm.scale",)),
        Rule("*", ("*",)),
    )


FLUX = Format(
    name="flux",
    title="FLUX.1 (Black Forest Labs 2024)",
    model=FluxConfig,
    match=lambda shapes: {"double_blocks.0.img_mod.lin.weight", "vector_in.in_layer.weight"} <= set(shapes),
    rules=_official_rules(False),
    config=_released(False),
    denoiser=lambda source, config: _MEANING,
    refusal=lambda config, meaning: _refusal(config, meaning, False),
    sampling=_sampling,
    objective=_objective,
    within="model.diffusion_model.",
)

FLUX2 = Format(
    name="flux2",
    title="FLUX.2 (Black Forest Labs 2025)",
    model=FluxConfig,
    match=lambda shapes: {"double_stream_modulation_img.lin.weight", "img_in.weight"} <= set(shapes),
    rules=_official_rules(True),
    config=_released(True),
    denoiser=lambda source, config: _MEANING,
    refusal=lambda config, meaning: _refusal(config, meaning, True),
    sampling=_sampling,
    objective=_objective,
    within="model.diffusion_model.",
)


# diffusers' names


def _diffusers_names(second: bool) -> dict[str, str]:
    embed = "time_guidance_embed" if second else "time_text_embed"
    return {
        "image": "x_embedder.weight",
        "text": "context_embedder.weight",
        "pooled": f"{embed}.text_embedder.linear_1.weight",
        "time": f"{embed}.timestep_embedder.linear_1.weight",
        "guidance": f"{embed}.guidance_embedder.linear_1.weight",
        "double": "transformer_blocks.",
        "single": "single_transformer_blocks.",
        "norm": "transformer_blocks.0.attn.norm_q.weight",
        "mlp": "transformer_blocks.0.ff.linear_in.weight" if second else "transformer_blocks.0.ff.net.0.proj.weight",
    }


def _from_diffusers(second: bool) -> Callable[[Source, Shapes, Mapping[str, Any]], FluxConfig]:
    def config(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> FluxConfig:
        said = settings(source)
        if integer(said, "patch_size", 1) != 1:
            raise DitkitError(f"transformer/config.json: patch_size is {said['patch_size']}; only 1 is published")
        default = [32, 32, 32, 32] if second else [16, 56, 56]
        axes = said.get("axes_dims_rope", default)
        if not isinstance(axes, list) or any(type(dim) is not int for dim in axes):
            raise DitkitError(f"transformer/config.json: axes_dims_rope is {axes!r}, not a list of numbers")
        if second:
            expect(said, {"rope_theta": 2000, "eps": 1e-6}, "FLUX.2")
        return _config(shapes, second, _diffusers_names(second), lambda head: tuple(axes), options.get("input_size"))

    return config


def _to_diffusers(config: FluxConfig, meaning: Meaning) -> dict[str, dict[str, Any]]:
    """The config.json of a FluxTransformer2DModel or a Flux2Transformer2DModel."""
    second = _is_second(config)
    channels = config.in_channels * config.patch_size**2
    said = {
        "_class_name": "Flux2Transformer2DModel" if second else "FluxTransformer2DModel",
        "_diffusers_version": VERSION,
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": config.depth,
        "num_single_layers": config.single_depth,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.text_dim,
        "guidance_embeds": config.guidance,
        "axes_dims_rope": list(config.axes),
    }
    if second:
        said |= {
            "timestep_guidance_channels": config.frequencies,
            "mlp_ratio": config.mlp_ratio,
            "rope_theta": int(config.theta),
            "eps": 1e-6,
        }
    else:
        said |= {"pooled_projection_dim": config.pooled_dim}
    return {"config.json": said}


def _not_diffusers(config: FluxConfig, meaning: Meaning) -> str | None:
    if config.mlp_ratio != 4.0 or config.frequencies != 256:
        return (
            f"FluxTransformer2DModel has an mlp_ratio of 4 and 256 frequencies, not {config.mlp_ratio:g} and "
            f"{config.frequencies}"
        )
    return _refusal(config, meaning, False)


def _diffusers_rules(config: FluxConfig) -> tuple[Rule, ...]:
    """Theirs has q, k and v apart, and scales before it shifts before the output."""
    second, dim = _is_second(config), config.hidden_size
    embed = "time_guidance_embed" if second else "time_text_embed"
    single = "single_transformer_blocks.#"
    rules = [
        Rule("img_in.*", ("x_embedder.*",)),
        Rule("txt_in.*", ("context_embedder.*",)),
        Rule("final_layer.adaLN_modulation.1.*", ("norm_out.linear.*",), swapped=True),
        Rule("final_layer.linear.*", ("proj_out.*",)),
    ]
    for name, theirs in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        rules += embedder(name, f"{embed}.{theirs}_embedder")
    for kind in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        rules.append(Rule(f"{kind}.1.*", (f"{kind}.linear.*",)))
    mlp = (("w12", "w3"), ("linear_in", "linear_out")) if second else (("fc1", "fc2"), ("net.0.proj", "net.2"))
    rules += dual_stream("double_blocks.#", "transformer_blocks.#", *mlp)
    rules += [Rule(f"single_blocks.#.{n}_norm.*", (f"{single}.attn.norm_{n}.*",)) for n in "qk"]
    if second:
        return (
            *rules,
            Rule("single_blocks.#.linear1.*", (f"{single}.attn.to_qkv_mlp_proj.*",)),
            Rule("single_blocks.#.linear2.*", (f"{single}.attn.to_out.*",)),
        )
    parts = tuple(f"{single}.{part}.*" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
    return (
        *rules,
        Rule("single_blocks.#.adaLN_modulation.1.*", (f"{single}.norm.linear.*",)),
        Rule("single_blocks.#.linear1.*", parts, rows=(dim, dim, dim, int(dim * config.mlp_ratio))),
        Rule("single_blocks.#.linear2.*", (f"{single}.proj_out.*",)),
    )


DIFFUSERS_FLUX = Format(
    name="diffusers_flux",
    title="FLUX.1 in diffusers (FluxTransformer2DModel)",
    model=FluxConfig,
    match=lambda shapes: {"single_transformer_blocks.0.proj_mlp.weight", "x_embedder.weight"} <= set(shapes),
    rules=_diffusers_rules,
    config=_from_diffusers(False),
    denoiser=lambda source, config: _MEANING,
    refusal=_not_diffusers,
    sampling=_sampling,
    objective=_objective,
    settings=_to_diffusers,
    file="diffusion_pytorch_model.safetensors",
)

DIFFUSERS_FLUX2 = Format(
    name="diffusers_flux2",
    title="FLUX.2 in diffusers (Flux2Transformer2DModel)",
    model=FluxConfig,
    match=lambda shapes: {"x_embedder.weight", "double_stream_modulation_img.linear.weight"} <= set(shapes),
    rules=_diffusers_rules,
    config=_from_diffusers(True),
    denoiser=lambda source, config: _MEANING,
    refusal=lambda config, meaning: _refusal(config, meaning, True),
    sampling=_sampling,
    objective=_objective,
    settings=_to_diffusers,
    file="diffusion_pytorch_model.safetensors",
)
