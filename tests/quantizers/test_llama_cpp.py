"""llama.cpp's quantizers as the start: their bytes come out again, in a matrix and in a run."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, PretrainedConfig, Qwen3MoeConfig

from lightning_gsq.cli.classes import class_path
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf import quantizer
from lightning_gsq.gguf.blocks import encode
from lightning_gsq.gguf.quantizer import quantize_with_llama_cpp
from lightning_gsq.gguf.types.table import TYPES
from lightning_gsq.quantizers import LlamaCpp
from lightning_gsq.quantizers.warm_start import Matrix, quantized, start_of
from lightning_gsq.weights.presets import GGML, VECTOR_TYPES
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.exported import SHAPE, quantize, save_model

SLOW = ("iq1_s", "iq1_m", "iq2_s", "iq2_xs")
"""Types for which llama.cpp first makes a table that takes seconds."""
PRESETS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in GGML]


def random_weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def importance_of(columns: int, scale: float = 1.0) -> torch.Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)) * scale + 0.01


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_bytes_are_those_of_llama_cpp(preset: str, weighted: bool) -> None:
    columns = 256 if preset in VECTOR_TYPES else 512  # whose search takes its time
    scheme, w_OI = QuantScheme(preset=preset), random_weight(6, columns)
    kind, importance_I = TYPES[preset.upper()], importance_of(columns)
    hessian_II = torch.diag(2 * importance_I)
    start = LlamaCpp(weighted)(w_OI, hessian_II, scheme)
    tensor = quantized(start, scheme, torch.float16)
    alike = torch.ones(columns) if kind.needs_importance else None
    expected = quantize_with_llama_cpp(w_OI, kind, importance_I if weighted else alike)
    assert np.array_equal(encode(tensor, kind), expected)
    if preset in ("q4_0", "q4_k", "iq4_nl"):
        plain = quantize_with_llama_cpp(w_OI, kind)
        assert weighted != np.array_equal(expected, plain)
    on_grid = scheme.grid.value_of(start.codes_OI.float())
    assert bool(torch.isfinite(start.position_OI).all()) and on_grid.shape == start.position_OI.shape


def test_every_expert_has_an_importance_of_its_own() -> None:
    """And one that no token reached has none."""
    scheme, kind, w_OI = QuantScheme(preset="q4_0"), TYPES["Q4_0"], random_weight(8, 64)
    importances = [importance_of(64), torch.zeros(64)]
    matrix = Matrix(w_OI, [torch.diag(2 * importance) for importance in importances], scheme)
    stored = encode(quantized(start_of(matrix, LlamaCpp()), scheme, torch.float16), kind)
    assert np.array_equal(stored[:4], quantize_with_llama_cpp(w_OI[:4], kind, importances[0]))
    assert np.array_equal(stored[4:], quantize_with_llama_cpp(w_OI[4:], kind))


def test_other_schemes_are_refused_before_the_run() -> None:
    shape, start = (4, 256), LlamaCpp()
    start.check({name: (QuantScheme(preset=name), shape) for name in ("q3_k", "iq4_xs", "iq2_xxs")})
    with pytest.raises(ConfigurationError, match=r"makes no IQ2_XXS \(a\) without an importance.*got false; use true"):
        LlamaCpp(weighted=False).check({"a": (QuantScheme(preset="iq2_xxs"), shape)})
    with pytest.raises(ConfigurationError, match=r"a is 3 bit, groups of 64; choose a scheme.*q4_0 is.*RTN"):
        start.check({"a": (QuantScheme(3, 64), shape)})
    with pytest.raises(ConfigurationError, match="a is mlx4g32; choose a scheme"):
        start.check({"a": (QuantScheme(preset="mlx4g32"), shape)})
    with pytest.raises(ConfigurationError, match="a is 1 bit and salient columns"):
        start.check({"a": (QuantScheme(1, budget=1.5), shape)})


def test_a_missing_package_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(quantizer, "find_spec", without)
    with pytest.raises(ConfigurationError, match=r"pip install 'lightning-gsq\[export\]'"):
        LlamaCpp().check({})


EXPERTS = Qwen3MoeConfig(
    **SHAPE, head_dim=32, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=64, norm_topk_prob=True
)
TRANSPOSED = GPT2Config(vocab_size=272, n_embd=64, n_layer=1, n_head=2, n_positions=64)


@pytest.mark.parametrize("config", [EXPERTS, TRANSPOSED], ids=["experts", "transposed"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_run_of_fused_experts_and_transposed_weights(
    tmp_path: Path, config: PretrainedConfig, weighted: bool
) -> None:
    path = class_path("model.warm_start", "llamacpp")
    warm_start = {"class_path": path, "init_args": {"weighted": weighted}}
    run = quantize(
        save_model(tmp_path / "model", config), tmp_path / "run", 3, 64, scheme="q4_0", warm_start=warm_start
    )
    for name, weight in run.weights.items():
        w_OI = weight.site.to_matrix(run.network.get_parameter(name)).float()
        stored = encode(run.tensor(name), TYPES["Q4_0"])
        assert np.array_equal(stored, quantize_with_llama_cpp(w_OI, TYPES["Q4_0"])) != weighted
