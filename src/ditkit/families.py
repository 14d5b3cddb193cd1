"""The page of all families: what each is made of, read off the code, and pictures of their blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .anatomy import Part, anatomy, drawing, used_layers
from .config import lookup, names
from .files import atomic_write
from .interop import FORMATS
from .interop.source import Source
from .models import ModelConfig
from .report import drawn

__all__ = ["families", "markdown", "traits", "write_page"]

_NO_FAMILY = ("autoencoder", "lora", "mlp")  # no denoiser, a wrapper, and the network of a toy


def families() -> dict[str, list[str]]:
    """The names of the sizes of each family, from the smallest to the largest."""
    sizes = {name: lookup("size", name) for name in names("size")}
    found: dict[str, list[str]] = {}
    for kind in names("model"):
        own = [name for name, config in sizes.items() if type(config) is lookup("model", kind)]
        if kind not in _NO_FAMILY and own:
            found[kind] = sorted(own, key=lambda name: parameters(sizes[name]))
    return found


@cache
def parameters(config: ModelConfig) -> int:
    """How many there are."""
    with torch.device("meta"):
        return sum(p.numel() for p in config.build().parameters())


def _some(values: Iterable[str], none: str = "none") -> str:
    return ", ".join(dict.fromkeys(values)) or none


def traits(config: ModelConfig) -> dict[str, str]:
    """What a family is made of, in words that its own modules and functions say."""
    found = anatomy(config)
    parts = [part for _, _, block in found.blocks for part in block.walk()]
    with torch.device("meta"):
        example, model = config.example(1), config.build()
    given = [
        name
        for name in ("label", "text", "pooled", "audio", "channels", "control")
        if getattr(example, name) is not None
    ]
    of_heads = [part for part in parts if part.kind == "norm" and re.search(r"[qk]_norm$", part.name)]
    tables = [name for name, _ in model.named_parameters() if re.search(r"pos(_embed|emb|itions?)?$", name)]
    fixed = ["a table"] if tables else ["sines and cosines"] if "sincos_2d" in used_layers(config) else []
    return {
        "blocks": _some(f"{count} {block.label}" for _, count, block in found.blocks),
        "given": _some(["time", *given, *example.scalars]),
        "modulation": _some(part.label.lstrip("×+ ") for part in parts if part.kind == "modulation"),
        "norm": _some(part.label for part in parts if part.kind == "norm" and part not in of_heads),
        "norm of q and k": _some(part.label for part in of_heads),
        "attention": _some(_attention(part.label) for part in parts if part.kind == "attention"),
        "positions": _some([*(part.label for part in parts if part.kind == "rotation"), *fixed]),
        "MLP": _some(said for part in parts if (said := _mlp(part))),
        "meaning": _some(_meanings(config), "ours to choose"),
    }


def _attention(label: str) -> str:
    """Without the number of heads."""
    return re.sub(r", \d+ heads of \d+", "", re.sub(r", \d+ of keys and values", ", grouped queries", label))


def _mlp(part: Part) -> str:
    """The name of a module with a nonlinearity between linear maps, and which it is."""
    inner = [p.kind for p in part.parts]
    between = [p.label for p in part.parts if p.kind == "activation"]
    if part.kind != "module" or inner.count("linear") < 2 or not between or part.label == "Sequential":
        return ""
    return f"{part.label} ({_some(label.lstrip('× ') for label in between)})"


def _meanings(config: Any) -> list[str]:
    """What the output means in each published layout, and how time is counted."""
    nowhere = Source(Path(), {}, lambda entries: {})
    found = [form.denoiser(nowhere, config) for form in FORMATS if form.model is type(config)]
    return [
        f"{getattr(meaning, 'prediction', 'logits')} on {type(meaning.path).__name__}, clock {meaning.clock}"
        for meaning in found
    ]


def _smallest(sizes: list[str]) -> str:
    """The smallest that was published."""
    return next((name for name in sizes if "tiny" not in name), sizes[0])


def markdown() -> str:
    """The page."""
    own = families()
    smallest = {kind: lookup("size", _smallest(sizes)) for kind, sizes in own.items()}
    rows = {kind: traits(config) for kind, config in smallest.items()}
    head = list(next(iter(rows.values())))
    lines = [
        "# Families",
        "",
        "Written by `ditkit models --families docs` from the code: blocks as they ran on shapes alone at the smallest "
        "published size, meanings from the published layouts, layers as the files import them.",
        "",
        f"| family | {' | '.join(head)} |",
        f"|---|{'---|' * len(head)}",
        *(f"| [{kind}](#{kind}) | {' | '.join(row.values())} |" for kind, row in rows.items()),
        "",
        "## Sizes",
        "",
        "| family | sizes | parameters of the smallest and the largest |",
        "|---|---|---|",
    ]
    for kind, sizes in own.items():
        low, high = (parameters(lookup("size", sizes[i])) for i in (0, -1))
        lines.append(f"| {kind} | {', '.join(f'`{name}`' for name in sizes)} | {low:,} to {high:,} |")
    used = {kind: used_layers(config) for kind, config in smallest.items()}
    lines += ["", "## Layers", "", f"| layer | {' | '.join(used)} |", f"|---|{'---|' * len(used)}"]
    for layer in sorted(set().union(*used.values()), key=str.lower):
        lines.append(f"| `{layer}` | {' | '.join('x' if layer in have else '' for have in used.values())} |")
    lines += ["", "## Blocks", ""]
    for kind in own:
        lines += [f"### {kind}", "", f"![blocks of {kind}](families/{kind}.png)", ""]
    return "\n".join(lines)


def write_page(folder: Path) -> Path:
    """Write the page and its pictures. Raises DitkitError without matplotlib."""
    for kind, sizes in families().items():
        name = _smallest(sizes)
        picture = drawing(anatomy(lookup("size", name)).blocks, name)
        atomic_write(folder / "families" / f"{kind}.png", drawn(picture))
    page = folder / "families.md"
    atomic_write(page, markdown())
    return page
