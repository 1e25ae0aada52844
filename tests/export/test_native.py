"""The native format: every scheme and family exactly, byte by byte, packed in memory."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lightning_gsq
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import ExportOptions, open_run
from lightning_gsq.export.check import compare_model, token_ids
from lightning_gsq.export.formats.dequantized import DequantizedFormat
from lightning_gsq.export.formats.native import NativeFormat
from lightning_gsq.packed.layers import PackedExperts, PackedWeight, QuantLinear
from lightning_gsq.weights.assignment import SchemeOverride
from lightning_gsq.weights.ledger import Ledger
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.finished import MakeRun
from tests.support.tiny import FAMILIES, LINEAR_WEIGHTS

SCHEMES = [
    QuantScheme(1, 16),
    QuantScheme("ternary", 7),
    QuantScheme(2, 16),
    QuantScheme(3, 16),
    QuantScheme(4, 20),
    QuantScheme(5, -1),
]


def _write(run: Path, folder: Path, shard_size: int = 10**9) -> Ledger:
    folder.mkdir()
    return NativeFormat().write(open_run(run), folder, ExportOptions(shard_size))


def _packed(model: torch.nn.Module) -> list[PackedWeight]:
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_scheme_exactly_and_to_the_byte(new_run: MakeRun, tmp_path: Path, scheme: QuantScheme) -> None:
    run = new_run(scheme=scheme, scale_dtype="bfloat16" if scheme.bits == 4 else "float16")
    ledger = _write(run, tmp_path / "native")
    report = NativeFormat().check(open_run(run), tmp_path / "native")
    assert report.weights == (14, 14) and report.logits is not None and report.logits[0] < 1e-4
    assert report.same_text
    size = sum(file.stat().st_size for file in (tmp_path / "native").glob("*.safetensors"))
    assert ledger.num_bytes == size
    assert sum(ledger.headers.values()) < size
    # What lies in memory is what the ledger lists: the file without its header.
    model = lightning_gsq.load(tmp_path / "native")
    loaded = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for m in _packed(model) for b in m.buffers())
    assert loaded == size - sum(ledger.headers.values())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(new_run: MakeRun, tmp_path: Path, family: str) -> None:
    run = new_run(family=family)
    for own in (NativeFormat(), DequantizedFormat()):
        folder = tmp_path / own.name
        folder.mkdir()
        own.write(open_run(run), folder, ExportOptions())
        report = own.check(open_run(run), folder)
        assert report.weights == (2 * LINEAR_WEIGHTS[family],) * 2
        assert report.logits is not None and report.logits[0] <= 1e-4 * report.logits[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert len(_packed(model)) == 2 * LINEAR_WEIGHTS[family]
    assert any(isinstance(module, PackedExperts) for module in model.modules()) == (family == "qwen3_moe")


def test_mixed_schemes_and_left_out_weights(new_run: MakeRun, tmp_path: Path) -> None:
    overrides = {"*.down_proj": SchemeOverride(bits=4), "*.q_proj": SchemeOverride(bits="ternary", group_size=-1)}
    run = new_run(overrides=overrides)
    _write(run, tmp_path / "native")
    model = lightning_gsq.load(tmp_path / "native")
    bits = {name.rpartition(".")[2]: m.scheme.bits for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert bits["down_proj"] == 4 and bits["q_proj"] == "ternary" and bits["up_proj"] == 3


def test_shards(llama_run: Path, tmp_path: Path) -> None:
    whole, parts = _write(llama_run, tmp_path / "whole"), _write(llama_run, tmp_path / "parts", shard_size=6000)
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 3
    assert {file.name for file in files} == set(parts.headers)
    assert parts.num_bytes == sum(file.stat().st_size for file in files)
    assert parts.num_bytes - sum(parts.headers.values()) == whole.num_bytes - sum(whole.headers.values())
    ids = torch.arange(12)[None]
    models = [lightning_gsq.load(tmp_path / name) for name in ("whole", "parts")]
    assert torch.equal(*(model(ids).logits for model in models))
    assert compare_model(open_run(llama_run), tmp_path / "parts", "lightning-gsq", _dense).same_text


def _dense(model: torch.nn.Module, name: str) -> torch.Tensor:
    module = model.get_submodule(name.removesuffix(".weight"))
    assert isinstance(module, QuantLinear)
    return module.dequantize()


@pytest.fixture(scope="module")
def native(llama_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native folder; not to be changed."""
    folder = tmp_path_factory.mktemp("native") / "native"
    _write(llama_run, folder)
    return folder


def test_a_loaded_model_generates_compiles_moves_and_saves(native: Path, llama_run: Path, tmp_path: Path) -> None:
    model = lightning_gsq.load(native, dtype=torch.float32)
    assert all(module.scales.dtype == torch.float16 for module in _packed(model))
    ids = token_ids(open_run(llama_run).tokenizer, "The line")
    logits = model(ids).logits
    text = model.generate(ids, do_sample=False, max_new_tokens=8)
    assert text.shape[1] > ids.shape[1]
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, logits)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(ids).logits, logits)
    fresh = lightning_gsq.load(native, dtype=torch.float32)
    fresh.load_state_dict({name: value * 0 for name, value in model.state_dict().items()})
    assert not torch.equal(fresh(ids).logits, logits)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids).logits, logits)
    half = model.to(torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16
    assert all(module.scales.dtype == torch.float16 for module in _packed(half))


def test_fit_refuses_it_and_load_refuses_others(native: Path, tiny_llama: Path) -> None:
    from lightning_gsq.models import loading

    with pytest.raises(ConfigurationError, match=r"already quantized \(lightning_gsq\)"):
        loading.load_config(loading.resolve(str(native)))
    assert loading.load_config(loading.resolve(str(native)), quantized=True).model_type == "llama"
    with pytest.raises(ConfigurationError, match="is not in the native format"):
        lightning_gsq.load(tiny_llama)


def test_the_configuration_says_how_each_weight_is_stored(native: Path) -> None:
    quantization = json.loads((native / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "lightning_gsq" and quantization["version"] == 1
    assert quantization["weights"]["model.layers.1.mlp.down_proj.weight"] == {
        "bits": 3,
        "group_size": 16,
        "shape": [32, 48],
    }
