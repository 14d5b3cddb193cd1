"""The data of a model that was trained elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from ..config import DitkitError, register

__all__ = ["Elsewhere"]


@register("data", "elsewhere")
@dataclass(frozen=True)
class Elsewhere:
    """Not here: the place in a recipe of the data that an imported model was trained on."""

    origin: str = ""
    """Where the weights came from."""

    def open(self) -> NoReturn:
        """Raises DitkitError, always."""
        raise DitkitError(
            f"this run was imported from {self.origin}, and the data it was trained on is not here: to train its "
            "weights further, give them to a recipe: ditkit train RECIPE --init RUN"
        )
