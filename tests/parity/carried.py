"""What comparisons with diffusers share: random weights, and gradients carried by the table that carries weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ditkit.conditioning import Tokens
from ditkit.interop import Format
from ditkit.interop.table import read_table
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


def random_weights(model: Any, seed: int = 0, time: str = "t_embedder", modulation: str = "adaLN") -> Any:
    """The network with weights under which nothing is zero and nothing saturates.

    Those of the time are small: its frequencies are rounded to float32 there, which moves angles by up to 6e-5.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.08 * torch.randn(parameter.shape, generator=generator))
            if modulation in name:
                parameter.mul_(4)
            elif time in name:
                parameter.mul_(0.25)
            elif "norm" in name:
                parameter.add_(1)
    return model.eval()


def captions(texts: list[Tensor], length: int) -> Tokens:
    """One batch of captions of different lengths, what pads them far from zero."""
    values = torch.stack([torch.cat((text, torch.full((length - len(text), text.shape[1]), 9.0))) for text in texts])
    return Tokens(values, torch.stack([torch.arange(length) < len(text) for text in texts]))


def compare_gradients(form: Format, model: Model, reference: Any) -> None:
    """The table carries gradients as it carries weights, of the part that the format has; none is zero."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    given = {name: p.grad for name, p in reference.named_parameters()}
    expected = read_table(form.pairs(model), given, shapes)
    for name in expected:
        p = model.get_parameter(name)
        assert p.grad is not None, name
        assert bool(p.grad.any()), name
        assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-4 * float(expected[name].abs().max()), msg=name)
