"""Position-wise networks."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Activation", "MixFFN", "Mlp", "SwiGLU"]

Activation = Literal["gelu_tanh", "gelu", "silu"]

_ACTIVATIONS = {"gelu_tanh": partial(F.gelu, approximate="tanh"), "gelu": F.gelu, "silu": F.silu}


class Mlp(nn.Module):
    """Linear, a nonlinearity, Linear, and dropout of the result; GELU is in its tanh form unless said (DiT).

    given: the size of the input, if it is not `dim`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        drop: float = 0.0,
        act: Activation = "gelu_tanh",
        bias: bool = True,
        given: int | None = None,
    ):
        super().__init__()
        self.fc1 = nn.Linear(given or dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.act: Activation = act
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.drop(self.fc2(_ACTIVATIONS[self.act](self.fc1(x))))


class SwiGLU(nn.Module):
    """w3(silu(gate) * value) (Shazeer 2020): gate and value from one Linear `w12`, gate first, or from two."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, bias: bool = True, fused: bool = True):
        super().__init__()
        if fused:
            self.w12 = nn.Linear(dim, 2 * hidden, bias=bias)
        else:
            self.w1, self.w2 = nn.Linear(dim, hidden, bias=bias), nn.Linear(dim, hidden, bias=bias)
        self.fused = fused
        self.w3 = nn.Linear(hidden, dim, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        gate, value = self.w12(x).chunk(2, dim=-1) if self.fused else (self.w1(x), self.w2(x))
        return self.w3(self.drop(F.silu(gate) * value))


class MixFFN(nn.Module):
    """SwiGLU of neighbours: a Linear and SiLU, a 3 x 3 convolution of each channel, value * silu(gate), a Linear
    (Sana, Xie et al. 2024, arXiv 2410.10629, section 2.2: "Mix-FFN"; GLUMBConv in its code). It tells places apart."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.inverted_conv = nn.Conv2d(dim, 2 * hidden, 1)
        self.depth_conv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.point_conv = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        """grid: rows and columns of the tokens."""
        image = x.transpose(1, 2).unflatten(2, grid)
        value, gate = self.depth_conv(F.silu(self.inverted_conv(image))).chunk(2, dim=1)
        return self.point_conv(value * F.silu(gate)).flatten(2).transpose(1, 2)
