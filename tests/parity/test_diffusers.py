"""Against diffusers' own classes: the same weights, the same numbers."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch.testing import assert_close

from ditkit.config import DitkitError
from ditkit.layers.embeddings import sinusoid
from ditkit.models import DiTConfig


@pytest.mark.parametrize("shift", [0, 1])
def test_frequencies_of_time_are_those_of_diffusers(shift: int) -> None:
    t = torch.tensor([0.0, 1.0, 499.0, 999.0])
    theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    assert_close(sinusoid(t, 256, shift), theirs, rtol=0, atol=1e-4)  # angles up to 999 in float32
    assert (sinusoid(t, 256, 1 - shift) - theirs).abs().max() > 0.1


def test_the_two_constants_reach_the_network_and_nothing_else() -> None:
    def built(**options: int | float) -> tuple[int, set[float], set[float]]:
        model = DiTConfig(input_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=3, **options).build()  # type: ignore[arg-type]
        blocks = list(model.blocks)
        return (
            model.t_embedder.shift,
            {b.norm1.eps for b in blocks} | {model.final_layer.norm_final.eps},  # type: ignore[union-attr]
            {b.norm2.eps for b in blocks},  # type: ignore[union-attr]
        )

    assert built() == (0, {1e-6}, {1e-6})
    assert built(frequency_shift=1, mlp_norm_eps=1e-5) == (1, {1e-6}, {1e-5})
    with pytest.raises(DitkitError, match="frequency_shift is 0 or 1"):
        DiTConfig(frequency_shift=2)
    with pytest.raises(DitkitError, match="mlp_norm_eps must be above 0"):
        DiTConfig(mlp_norm_eps=0.0)
