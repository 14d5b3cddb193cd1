"""Drax's decoder as its authors publish it: a folder of decoder.safetensors and config.json, or the one file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import DitkitError
from ..diffusion import DraxLoss, Jumps, Mixture, TokenMeaning
from ..diffusion.grid import Uniform
from ..models import DraxConfig
from .format import Format, Shapes, block_count, option, published, shape
from .source import Source
from .table import Rule

__all__ = ["DRAX"]


def _config(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> DraxConfig:
    """Shapes say all but the heads, which are in config.json, and the dropout."""
    said = source.json("config.json").get("decoder_config", {})
    said = said if isinstance(said, dict) else {}
    vocab, dim = shape(shapes, "vocab_embed.weight", 2)
    depth = block_count(shapes, "blocks.")
    guess = said.get("n_heads", getattr(published(DraxConfig, depth=depth, hidden_size=dim), "num_heads", None))
    heads = option(options, "num_heads", guess, "how many heads its attention has")
    drop = said.get("dropout", DraxConfig.drop)
    if type(heads) is not int or heads < 1 or not isinstance(drop, int | float) or not 0 <= drop < 1:
        raise DitkitError(f"config.json: n_heads {heads!r} and dropout {drop!r} are no number of heads and probability")
    return DraxConfig(
        vocab=vocab,
        hidden_size=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=shape(shapes, "blocks.0.mlp.0.weight", 2)[0] / dim,
        cond_dim=shape(shapes, "time_embedding.mlp.2.weight", 2)[0],
        audio_dim=shape(shapes, "audio_proj.0.weight", 2)[1],
        drop=float(drop),
    )


def _refusal(config: DraxConfig, meaning: TokenMeaning) -> str | None:
    if meaning.path.mask is not None or meaning.clock != "1-t":
        return (
            "a Drax file means tokens from a uniform source with the clock 1-t to whoever reads it, and this model was "
            f"trained on {meaning.path} with the clock {meaning.clock}"
        )
    if int(config.hidden_size * config.mlp_ratio) != 4 * config.hidden_size:
        return f"Drax has an mlp_ratio of 4, not {config.mlp_ratio:g}"
    return None


def _frequencies(config: DraxConfig) -> dict[str, Tensor]:
    """The buffer of the rotations, which we compute."""
    head = config.hidden_size // config.num_heads
    with torch.device("cpu"):
        return {"rotary_emb.inv_freq": 10000.0 ** (-torch.arange(0, head, 2, dtype=torch.float32) / head)}


def _settings(config: DraxConfig, meaning: TokenMeaning) -> dict[str, dict[str, Any]]:
    """config.json; the encoder's part of it, and its weights, are those of the Whisper model that was listened to."""
    return {
        "config.json": {
            "model_type": "drax",
            "decoder_config": {
                "vocab_size": config.vocab,
                "hidden_size": config.hidden_size,
                "n_heads": config.num_heads,
                "cond_dim": config.cond_dim,
                "n_blocks": config.depth,
                "dropout": config.drop,
                "whisper_dim": config.audio_dim,
            },
        }
    }


_BLOCK = "blocks.#"

DRAX = Format(
    name="drax",
    title="Drax (Navon et al. 2025)",
    model=DraxConfig,
    match=lambda shapes: {"vocab_embed.weight", "preserve_embeddings.weight", "audio_proj.0.weight"} <= set(shapes),
    rules=(
        Rule("x_embedder.*", ("vocab_embed.*",)),
        Rule("known_embedder.*", ("preserve_embeddings.*",)),
        Rule("t_embedder.*", ("time_embedding.*",)),
        Rule("audio_embedder.*", ("audio_proj.*",)),
        Rule(f"{_BLOCK}.adaLN_modulation.1.*", (f"{_BLOCK}.adaLN_modulation.*",)),
        *(Rule(f"{_BLOCK}.attn.{part}.*", (f"{_BLOCK}.{part}w.*",)) for part in "qkv"),
        Rule(f"{_BLOCK}.attn.proj.*", (f"{_BLOCK}.attn_out.*",)),
        *(Rule(f"{_BLOCK}.cross.{part}.*", (f"{_BLOCK}.{part}_cross.*",)) for part in "qkv"),
        Rule(f"{_BLOCK}.cross.proj.*", (f"{_BLOCK}.cross_out.*",)),
        Rule(f"{_BLOCK}.norm_tokens.*", (f"{_BLOCK}.norm_audio.*",)),
        Rule(f"{_BLOCK}.mlp.fc1.*", (f"{_BLOCK}.mlp.0.*",)),
        Rule(f"{_BLOCK}.mlp.fc2.*", (f"{_BLOCK}.mlp.2.*",)),
        Rule("final_layer.adaLN_modulation.1.*", ("output_layer.adaLN_modulation.*",)),
        Rule("final_layer.*", ("output_layer.*",)),
        Rule("blocks.*", ("blocks.*",)),
    ),
    config=_config,
    denoiser=lambda source, config: TokenMeaning(Mixture("uniform", vocab=config.vocab)),
    refusal=_refusal,
    # the authors' program: 16 steps, the temperature of a single candidate
    sampling=lambda config: {"steps": 16, "solver": Jumps(temperature=0.01), "grid": Uniform()},
    objective=lambda config, meaning: DraxLoss(),
    constants=_frequencies,
    settings=_settings,
    file="decoder.safetensors",
)
