"""What is said of a family's blocks is what they do."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ditkit.anatomy import Part, anatomy, drawing, used_layers
from ditkit.cli import main
from ditkit.config import names
from ditkit.families import families, markdown, traits
from ditkit.models import DDiTConfig, DiTConfig, JiTConfig, model_config
from ditkit.report import drawn

DIT = DiTConfig(input_size=8, hidden_size=16, depth=3, num_heads=2, num_classes=5)
JIT = JiTConfig(input_size=8, patch_size=4, hidden_size=16, depth=3, num_heads=2, bottleneck_dim=4, in_context_start=1)


def labels(part: Part) -> list[str]:
    return [p.label for p in part.walk() if not p.parts]


def test_a_block_of_dit_is_what_the_paper_draws() -> None:
    ((site, count, block),) = anatomy(DIT).blocks
    assert (site, count) == ("blocks", 3)
    assert labels(block) == [
        "SiLU", "Linear 16 → 96",
        "LayerNorm", "× (1 + scale)", "+ shift",
        "Linear 16 → 48", "softmax(q kᵀ / √d) v, 2 heads of 8", "Linear 16 → 16", "× gate", "+ residual",
        "LayerNorm", "× (1 + scale)", "+ shift",
        "Linear 16 → 64", "GELU, tanh form", "Linear 64 → 16", "× gate", "+ residual",
    ]  # fmt: skip


def test_what_differs_between_families_is_seen() -> None:
    ((_, _, block),) = anatomy(JIT).blocks
    found = labels(block)
    assert found.count("RMSNorm, weight") == 4  # of the block, of q and of k
    assert found.count("RoPE") == 1  # of q and k
    assert "× value" in found
    ((_, _, cross),) = anatomy(replace(DIT, conditioning="cross_attention")).blocks
    assert len([name for name in labels(cross) if name.startswith("softmax")]) == 2
    assert "× gate" not in labels(cross)
    assert labels(cross).count("LayerNorm, weight and bias") == 3
    ((_, _, plain),) = anatomy(replace(DIT, conditioning="in_context")).blocks
    assert not [p for p in plain.walk() if p.kind == "modulation"]


def test_the_layers_that_a_family_is_made_of() -> None:
    assert {"AdaLNZeroBlock", "Attention", "Mlp", "PatchEmbed", "sincos_2d"} <= used_layers(DIT)
    assert "SwiGLU" not in used_layers(DIT)
    assert {"SwiGLU", "RMSNorm", "rope_table", "BottleneckPatchEmbed"} <= used_layers(JIT)


@pytest.mark.parametrize("name", ["dit_xl_2", "jit_b_16", "ddit_s"])
def test_any_model_is_drawn_at_its_full_size(name: str) -> None:
    blocks = anatomy(model_config(name)).blocks
    picture = Image.open(io.BytesIO(drawn(drawing(blocks, name))))
    assert picture.width > 300
    assert picture.height > 600


def test_the_command_draws_one_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["models", "dit_s_4", "--draw", str(tmp_path / "dit.png")]) == 0
    assert Image.open(tmp_path / "dit.png").format == "PNG"
    capsys.readouterr()
    for words, said in ((["dit_s_*"], "is for one model, and 3 match"), (["dit_s_4"], "writes a .png file")):
        assert main(["models", *words, "--draw", str(tmp_path / "dit.svg")]) == 1
        assert said in capsys.readouterr().err


def test_traits_are_those_of_the_papers() -> None:
    dit, jit = traits(DIT), traits(JIT)
    assert dit["blocks"] == "3 AdaLNZeroBlock"
    assert dit["given"] == "time, label"
    assert dit["modulation"] == "(1 + scale), shift, gate"
    assert (dit["norm of q and k"], jit["norm of q and k"]) == ("none", "RMSNorm, weight")
    assert (dit["positions"], jit["positions"]) == ("a table", "RoPE, a table")
    assert (dit["MLP"], jit["MLP"]) == ("Mlp (GELU, tanh form)", "SwiGLU (SiLU, value)")
    assert dit["meaning"] == "eps on DDPM, clock index, -velocity on Linear, clock 1-t"
    assert traits(DDiTConfig())["meaning"] == "ours to choose"


def test_every_family_is_on_the_page_with_its_sizes() -> None:
    own = families()
    assert set(own) == set(names("model")) - {"autoencoder", "lora", "mlp"}
    assert sorted(name for sizes in own.values() for name in sizes) == sorted(names("size"))
    assert own["jit"][0] == "jit_b_16"


@pytest.mark.slow
def test_the_page_in_docs_is_what_the_code_says() -> None:
    assert (Path(__file__).parents[1] / "docs" / "families.md").read_text() == markdown()
