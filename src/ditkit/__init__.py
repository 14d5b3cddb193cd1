"""ditkit: the library of diffusion transformers.

import ditkit

pipeline = ditkit.load("runs/demo")
images = pipeline.sample(label="3", count=16, guidance=2.0)  # UInt8[Tensor, "n c h w"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models import create_model as create_model
    from .models import list_models as list_models
    from .pipeline import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "list_models", "load"]

_HOME = {"create_model": "models", "list_models": "models", "load": "pipeline"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line can start without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'ditkit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
