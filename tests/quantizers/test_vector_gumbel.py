"""A trainable choice of code vectors: it begins at its start, moves where the loss falls, ends on codes of the grid."""

import itertools

import pytest
import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.ops.gumbel_softmax.noise import counters, seed_words, uniform
from lightning_gsq.ops.gumbel_softmax.vectors import gumbel_softmax_vectors
from lightning_gsq.quantizers import GumbelOptions
from lightning_gsq.quantizers.vector_gumbel import VectorQuantizer, quantizer_of
from lightning_gsq.quantizers.warm_start import start_at
from lightning_gsq.weights.layout import SUB_SCALES
from lightning_gsq.weights.presets import VECTOR_TYPES
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.vectors import grid_named, random_codes

ROWS, COLUMNS = 4, 256


def quantizer_named(name: str, **options: object) -> tuple[VectorQuantizer, Tensor]:
    """A quantizer, and the full-precision weight that its start lies near."""
    scheme, generator = QuantScheme(preset=name), torch.Generator().manual_seed(0)
    grid = grid_named(name)
    parts = {SUB_SCALES: torch.full((ROWS, scheme.num_groups(COLUMNS)), 3, dtype=torch.int16)}
    tensor = QuantizedTensor(random_codes(grid, ROWS, COLUMNS), torch.full((ROWS, 1), 0.01).half(), scheme, parts)
    s_OI = (tensor.dequantize() / tensor.codes_OI).mean()
    step = max(high - low for low, high in itertools.pairwise(grid.levels))
    w_OI = tensor.dequantize() + s_OI * step * torch.randn(ROWS, COLUMNS, generator=generator)
    quantizer = quantizer_of(start_at(tensor, w_OI), scheme, GumbelOptions(**options), generator)  # type: ignore[arg-type]
    assert isinstance(quantizer, VectorQuantizer)
    return quantizer, w_OI


@pytest.mark.parametrize("name", VECTOR_TYPES)
def test_it_begins_at_its_start_and_ends_on_the_grid(name: str) -> None:
    quantizer, w_OI = quantizer_named(name, alpha=100.0)
    start = quantizer.start_tensor()
    assert torch.equal(quantizer.harden().dequantize(), start.dequantize())
    assert torch.equal(quantizer.start_tensor(torch.float16).scales_OG.float(), start.scales_OG.float())
    quantizer.temperature, quantizer.logit_scale = 0.001, 100.0
    assert torch.allclose(quantizer(3), start.dequantize(), rtol=1e-5, atol=1e-7)
    quantizer, w_OI = quantizer_named(name)
    quantizer.logit_scale, start = 100.0, quantizer.start_tensor()
    groups = [{"params": [quantizer.logits], "lr": 0.05}, {"params": quantizer.scale_parameters(), "lr": 0.003}]
    optimizer = torch.optim.Adam(groups)
    for step in range(60):
        optimizer.zero_grad()
        (quantizer(step) - w_OI).square().sum().backward()
        optimizer.step()
    hard = quantizer.harden(torch.float16)
    quantizer.grid.split(hard.codes_OI)  # raises where a code is none of the grid's
    assert 0 < float((hard.codes_OI != start.codes_OI).float().mean()) < 1
    errors = [float((own.dequantize() - w_OI).square().sum()) for own in (hard, start)]
    assert errors[0] < 0.9 * errors[1]
    quantizer.hard = True
    assert torch.equal(quantizer(0), quantizer.harden().dequantize())
    assert quantizer.entropy_OI().shape == (ROWS, COLUMNS)
    assert torch.equal(quantizer.exact(hard.codes_OI + 0.2), hard.codes_OI.float())


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_sample_and_its_gradient_are_those_of_the_formula(noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_LOU = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64).requires_grad_()
    codes_LOI = torch.randint(-9, 10, (3, 2, 20), generator=generator, dtype=torch.int8)
    settings = {"kappa": 2.0, "tau": 0.7, "noise": noise, "seed": 11}
    sample_OI = gumbel_softmax_vectors(logits_LOU, codes_LOI, **settings)  # type: ignore[arg-type]
    position = counters(2, 5, 5, 0, torch.device("cpu"))
    u_LOU = torch.stack([uniform(position * 3 + level, seed_words(11)) for level in range(3)]).double()
    p_LOU = torch.softmax((2.0 * logits_LOU - noise * torch.log(-torch.log(u_LOU))) / 0.7, dim=0)
    expected_OI = (p_LOU.repeat_interleave(4, -1) * codes_LOI).sum(0)
    assert torch.allclose(sample_OI, expected_OI, rtol=1e-6)
    r_OI = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    own, wanted = (torch.autograd.grad(value, logits_LOU, r_OI)[0] for value in (sample_OI, expected_OI))
    assert torch.allclose(own, wanted, rtol=1e-5, atol=1e-9)
    same = gumbel_softmax_vectors(logits_LOU, codes_LOI, **{**settings, "seed": 12})  # type: ignore[arg-type]
    assert torch.equal(sample_OI, same) == (noise == 0)


def test_options_out_of_range_are_named() -> None:
    for vectors in (1, 17):
        with pytest.raises(ConfigurationError, match=f"vectors must be 2 to 16, got {vectors}"):
            GumbelOptions(vectors=vectors)
