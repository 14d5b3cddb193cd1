"""One file per family, each read from top to bottom with its paper beside it."""

from .autoencoder import Autoencoder, AutoencoderConfig
from .control import Control, ControlConfig
from .ddit import DDiT, DDiTConfig
from .dit import DiT, DiTConfig
from .drax import Drax, DraxConfig
from .flux import Flux, FluxConfig
from .jit import JiT, JiTConfig
from .kandinsky5 import Kandinsky5, Kandinsky5Config
from .lightningdit import LightningDiT, LightningDiTConfig
from .lora import LoRAConfig, adapters, base_weights, merged, unadapted
from .lumina2 import Lumina2, Lumina2Config
from .mlp import MLP, MLPConfig
from .mmdit import MMDiT, MMDiTConfig
from .pixart import PixArt, PixArtConfig
from .registry import ImageConfig, Model, ModelConfig, Plan, TokenConfig, create_model, list_models, model_config
from .resnet import ResNet, ResNetConfig
from .sana import Sana, SanaConfig
from .sizing import Sizing, resized, size, width_unit
from .unet import UNet, UNetConfig
from .zimage import ZImage, ZImageConfig

__all__ = [
    "MLP",
    "Autoencoder",
    "AutoencoderConfig",
    "Control",
    "ControlConfig",
    "DDiT",
    "DDiTConfig",
    "DiT",
    "DiTConfig",
    "Drax",
    "DraxConfig",
    "Flux",
    "FluxConfig",
    "ImageConfig",
    "JiT",
    "JiTConfig",
    "Kandinsky5",
    "Kandinsky5Config",
    "LightningDiT",
    "LightningDiTConfig",
    "LoRAConfig",
    "Lumina2",
    "Lumina2Config",
    "MLPConfig",
    "MMDiT",
    "MMDiTConfig",
    "Model",
    "ModelConfig",
    "PixArt",
    "PixArtConfig",
    "Plan",
    "ResNet",
    "ResNetConfig",
    "Sana",
    "SanaConfig",
    "Sizing",
    "TokenConfig",
    "UNet",
    "UNetConfig",
    "ZImage",
    "ZImageConfig",
    "adapters",
    "base_weights",
    "create_model",
    "list_models",
    "merged",
    "model_config",
    "resized",
    "size",
    "unadapted",
    "width_unit",
]
