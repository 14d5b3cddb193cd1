"""What comparisons with diffusers share: random weights, and gradients carried by the table that carries weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.testing import assert_close

from ditkit.interop import Format
from ditkit.models import Model


def random_parameters(model: Any, seed: int = 0) -> Any:
    """The same network with parameters from 0.08 N(0, 1), those of norms around 1, so that attention is not uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            middle = 1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0
            parameter.copy_(middle + 0.08 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def assert_gradients_agree(form: Format, ours: Model, theirs: nn.Module) -> None:
    """Of every parameter of theirs, within 1e-5 of the largest of its tensor."""
    mine = {}
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        mine[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    written = form.write(ours, mine)
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None, name
        scale = max(1.0, float(parameter.grad.abs().max()))
        assert_close(written[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")
