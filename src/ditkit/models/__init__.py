"""One file per family, each read from top to bottom with its paper beside it."""

from .dit import DiT, DiTConfig
from .jit import JiT, JiTConfig
from .registry import Model, ModelConfig, Plan, create_model, list_models, model_config

__all__ = [
    "DiT",
    "DiTConfig",
    "JiT",
    "JiTConfig",
    "Model",
    "ModelConfig",
    "Plan",
    "create_model",
    "list_models",
    "model_config",
]
