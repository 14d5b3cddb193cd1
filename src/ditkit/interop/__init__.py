"""Published checkpoints: what they hold, as our models, and our models as they would have been published."""

from .adm import ADM, unet_config
from .control import Z_IMAGE_CONTROL, z_image_control_settings
from .dit import DIFFUSERS, DIT, SIT, diffusers_settings
from .drax import DRAX
from .flux import DIFFUSERS_FLUX, DIFFUSERS_FLUX2, FLUX, FLUX2
from .format import Format, Found, fill, meta, read, save, size_name
from .jit import JIT
from .kandinsky5 import KANDINSKY5, kandinsky5_settings
from .lora import adapted, find_adapters, read_adapters, write_adapters
from .lumina2 import LUMINA2, LUMINA2_OFFICIAL, lumina2_settings
from .mmdit import DIFFUSERS_SD3, SD3
from .pixart import DIFFUSERS_PIXART, PIXART
from .sana import DIFFUSERS_SANA, SANA
from .source import open_source, read_json
from .table import Rule
from .transfer import Transfer, transfer
from .zimage import Z_IMAGE, Z_IMAGE_COMFY, z_image_settings

FORMATS = (
    DIT,
    SIT,
    JIT,
    KANDINSKY5,
    ADM,
    SD3,
    FLUX,
    FLUX2,
    DIFFUSERS,
    DIFFUSERS_SD3,
    DIFFUSERS_FLUX,
    DIFFUSERS_FLUX2,
    DRAX,
    PIXART,
    DIFFUSERS_PIXART,
    SANA,
    DIFFUSERS_SANA,
    Z_IMAGE,
    Z_IMAGE_COMFY,
    LUMINA2,
    LUMINA2_OFFICIAL,
    Z_IMAGE_CONTROL,
)
"""All that are known; of those that match a file the first is taken."""

__all__ = [
    "ADM",
    "DIFFUSERS",
    "DIFFUSERS_FLUX",
    "DIFFUSERS_FLUX2",
    "DIFFUSERS_PIXART",
    "DIFFUSERS_SANA",
    "DIFFUSERS_SD3",
    "DIT",
    "DRAX",
    "FLUX",
    "FLUX2",
    "FORMATS",
    "JIT",
    "KANDINSKY5",
    "LUMINA2",
    "LUMINA2_OFFICIAL",
    "PIXART",
    "SANA",
    "SD3",
    "SIT",
    "Z_IMAGE",
    "Z_IMAGE_COMFY",
    "Z_IMAGE_CONTROL",
    "Format",
    "Found",
    "Rule",
    "Transfer",
    "adapted",
    "diffusers_settings",
    "fill",
    "find_adapters",
    "kandinsky5_settings",
    "lumina2_settings",
    "meta",
    "open_source",
    "read",
    "read_adapters",
    "read_json",
    "save",
    "size_name",
    "transfer",
    "unet_config",
    "write_adapters",
    "z_image_control_settings",
    "z_image_settings",
]
