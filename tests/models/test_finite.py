"""NaN, infinities and overflows, named where they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models import loading
from lightning_gsq.models.chain import trace
from lightning_gsq.models.finite import check_activations, check_finite
from lightning_gsq.models.head import find_head
from lightning_gsq.models.probe import probe_ids
from tests.support.tiny import FAMILIES, save_tiny_model


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("model.layers.1.mlp.up_proj.weight", [torch.nan], "has 1 value that is not finite"),
        ("model.layers.1.mlp.up_proj.weight", [torch.inf, -torch.inf], "has 2 values that are not finite"),
        ("lm_head.weight", [torch.nan, 1.0, torch.inf], "has 2 values that are not finite"),
        ("model.norm.weight", [-torch.inf], "has 1 value that is not finite"),
    ],
)
def test_a_weight_of_the_files(name: str, values: list[float], said: str, tmp_path: Path) -> None:
    file = save_tiny_model("llama", tmp_path) / "model.safetensors"
    state = load_file(file)
    state[name].view(-1)[: len(values)] = torch.tensor(values)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ConfigurationError, match=f"{name} {said}"):
        loading.load_model(loading.resolve(str(tmp_path)))


def test_a_buffer_may_hold_infinities_and_no_nan() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    check_finite(module, "here")
    module.register_buffer("table", torch.tensor([0.0, torch.nan]))
    with pytest.raises(ConfigurationError, match="table has 1 value that is NaN"):
        check_finite(module, "here")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool])
def test_dtypes_without_infinities_are_passed_over(dtype: torch.dtype) -> None:
    module = nn.Module()
    module.register_buffer("codes", torch.zeros(3).to(dtype))
    module.register_parameter("empty", nn.Parameter(torch.empty(0, 4)))
    check_finite(module, "here")


def overflowing(dtype: torch.dtype) -> nn.Module:
    """A Llama whose second block's output is about a million: too large for float16 alone."""
    model = FAMILIES["llama"]().to(dtype)
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight.copy_(mlp.gate_proj.weight)  # silu(x) x is hardly ever negative, so that nothing cancels
    mlp.down_proj.weight.fill_(20_000.0)
    return model


def test_an_overflow_names_the_block_and_the_dtype_that_would_do() -> None:
    model = overflowing(torch.float16)
    check_finite(model, "here")
    traced = trace(model, probe_ids(model))
    said = r"the output of model.layers.1 \(of 2 blocks\) is not finite: float16 ends at 65504; .*dtype bfloat16"
    with pytest.raises(ConfigurationError, match=said):
        check_activations(model, traced)
    with pytest.raises(ConfigurationError, match=said):  # rather than "not its output embedding applied to them"
        find_head(model)


def test_the_same_model_in_the_dtype_that_it_names() -> None:
    model = overflowing(torch.bfloat16)
    check_activations(model, trace(model, probe_ids(model)))


def test_what_enters_the_first_block() -> None:
    model = FAMILIES["llama"]()
    traced = trace(model, probe_ids(model))
    traced.inputs_BTD[0][0, 3, 5] = torch.nan
    with pytest.raises(ConfigurationError, match=r"what enters model.layers.0 .* overflows on ordinary tokens"):
        check_activations(model, traced)
