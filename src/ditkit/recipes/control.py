"""A ControlNet of a run: edges as the control, made of the run's own data."""

from __future__ import annotations

from dataclasses import replace

from ..conditioners import Edges
from ..config import DitkitError
from ..models import ControlConfig, LoRAConfig
from ..recipe import Recipe
from ..runs import find_run

__all__ = ["control"]


def control(run: str) -> Recipe:
    """A branch beside the frozen network of a run, of copies of every second block: `ditkit train control:RUN`.

    Data, codec, meaning and the settings of training are the run's, with half of its steps, for the branch begins as
    trained blocks; what is given besides is the edges of each image.
    Raises DitkitError for a folder that is no run, and for a network that cannot be controlled.
    """
    base = find_run(run)[1]
    network = base.model.base if isinstance(base.model, LoRAConfig) else base.model
    if isinstance(network, ControlConfig):
        raise DitkitError(f"{run} is a ControlNet already: give the run of its base")
    model = ControlConfig(
        base=network,
        places=tuple(range(0, getattr(network, "depth", 1), 2)),
        control_channels=network.shape[0],
        refiner="hints" if getattr(network, "refiner_depth", 0) else "none",
    )
    half = {name: getattr(base.train, name) // 2 for name in ("warmup", "cooldown")}
    train = replace(base.train, steps=-(-base.train.steps // 2), **half)
    return replace(base, model=model, conditioner=Edges(base.conditioner), train=train)
