"""MLX folders hold a run exactly, by MLX's own account: every width and group, families, per-layer settings."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPTBigCodeConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    Olmo3Config,
    OlmoConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.contract import CheckFailedError, ExportOptions
from lightning_gsq.export.formats.mlx import BITS, GROUPS, MLXFormat, legacy_rotary, quantization_config
from lightning_gsq.export.readers import packages
from lightning_gsq.weights.packing import pack
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.exported import SHAPE, edit_config, quantize, save_model
from tests.support.planned import planned
from tests.support.weights import random_tensor

mx = pytest.importorskip("mlx.core")
FORMAT = MLXFormat()


def unpacked(parts: dict[str, torch.Tensor], bits: int, group_size: int) -> torch.Tensor:
    """A layer as MLX unpacks it, from fp32 scales."""
    packed = mx.array(parts["weight"].view(torch.int32).numpy().view(np.uint32))
    scales, biases = (mx.array(parts[part].float().numpy()) for part in ("scales", "biases"))
    return torch.from_numpy(np.array(mx.dequantize(packed, scales, biases, group_size=group_size, bits=bits)))


@pytest.mark.parametrize(("bits", "group_size"), list(itertools.product([*BITS, "ternary"], GROUPS)))
def test_mlx_unpacks_the_runs_own_values(bits: object, group_size: int) -> None:
    tensor = random_tensor(bits, group_size, 256, rows=32)
    parts, stored = FORMAT.encode(tensor), tensor.scheme.storage_bits
    assert torch.equal(unpacked(parts, stored, group_size), tensor.dequantize())
    assert parts["weight"].shape == (32, 256 * stored // 32) and parts["weight"].dtype == torch.uint32
    assert parts["scales"].dtype == parts["biases"].dtype == torch.float16
    x_BI = torch.randn(3, 256)
    packed = mx.array(parts["weight"].view(torch.int32).numpy().view(np.uint32))
    scales, biases = (mx.array(parts[part].float().numpy()) for part in ("scales", "biases"))
    product = mx.quantized_matmul(
        mx.array(x_BI.numpy()), packed, scales, biases, transpose=True, group_size=group_size, bits=stored
    )
    torch.testing.assert_close(torch.from_numpy(np.array(product)), x_BI @ tensor.dequantize().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", ["mlx1g32", "mlx3g64", "mlx4g128", "q4_1"])
def test_schemes_with_an_offset_a_group(preset: str) -> None:
    scheme = QuantScheme(preset=preset)
    columns = 256
    codes = torch.randint(scheme.low, scheme.high + 1, (8, columns)).to(torch.int8)
    scales, offsets = (torch.randn(8, scheme.num_groups(columns)).half() for _ in range(2))
    tensor = QuantizedTensor(codes, scales, scheme, {"offsets": offsets})
    parts = FORMAT.encode(tensor)
    assert torch.equal(unpacked(parts, scheme.storage_bits, scheme.group_size), tensor.dequantize())
    assert torch.equal(parts["biases"], offsets)


@pytest.mark.parametrize("group_size", [16, 256])
def test_other_groups_would_be_computed_wrongly(group_size: int) -> None:
    """Why they are refused: MLX multiplies with them, and the product is another. If this fails, MLX has learned it."""
    tensor = random_tensor(4, group_size, 512, rows=32)
    x_BI = torch.randn(3, 512)
    codes = mx.array(pack(tensor.scheme.grid.store(tensor.codes_OI), 4).numpy().view(np.uint32))
    scales = mx.array(tensor.scales_OG.float().numpy())
    try:
        options = {"transpose": True, "group_size": group_size, "bits": 4}
        product = mx.quantized_matmul(mx.array(x_BI.numpy()), codes, scales, -8 * scales, **options)
        error = float((torch.from_numpy(np.array(product)) - x_BI @ tensor.dequantize().T).abs().max())
    except (ValueError, RuntimeError):  # it depends on the shapes whether there is an error
        error = float("inf")
    assert error > 1


@pytest.mark.parametrize(
    ("bits", "group_size", "message"),
    [
        (7, 64, "mlx has no kernels for 7 bits"),
        (4, 16, "has groups of 16, for which it computes wrong numbers"),
        (4, 256, "has groups of 256, for which it computes wrong numbers"),
        (4, -1, "choose --model.scheme.group_size 32, 64 or 128"),
    ],
)
def test_what_mlx_cannot_hold(tmp_path: Path, bits: int, group_size: int, message: str) -> None:
    config = LlamaConfig(**{**SHAPE, "hidden_size": 256, "num_hidden_layers": 1})
    run = quantize(save_model(tmp_path / "model", config), tmp_path / "run", bits, group_size)
    assert message in (FORMAT.refuse(run) or "")


def test_an_architecture_that_mlx_lm_does_not_know(tmp_path: Path) -> None:
    run = quantize(save_model(tmp_path / "model"), tmp_path / "run", 4, 32)
    assert FORMAT.refuse(run) is None
    run.config.model_type = "opt"
    assert "has no model opt; use native" in (FORMAT.refuse(run) or "")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MistralConfig(**SHAPE, sliding_window=8),
            "computes a mistral without its sliding window, and so other numbers after 8 tokens, too "
            "few to check the file; use native or dequantized, or quantize a copy",
        ),
        (Phi3Config(**SHAPE, sliding_window=64), "computes a phi3 without its sliding window"),
        (
            Gemma2Config(**SHAPE, head_dim=32, sliding_window=8),
            "without its sliding window, and so other numbers after 8 tokens, too few to check the file",
        ),
        (
            Mamba2Config(vocab_size=272, hidden_size=128, num_hidden_layers=2, num_heads=8, head_dim=32, n_groups=1),
            "cannot build it: TypeError: ModelArgs.__init__() missing 1 required positional argument: "
            "'intermediate_size'; use native, or dequantized",
        ),
        (
            GPTBigCodeConfig(vocab_size=272, n_embd=128, n_layer=2, n_head=4, n_positions=128),
            "cannot build it: TypeError",
        ),
        (OlmoConfig(**SHAPE), "cannot build it: SystemExit"),
    ],
    ids=["mistral", "phi3", "gemma2", "mamba2", "gpt-bigcode", "olmo"],
)
def test_what_mlx_lm_cannot_build_or_computes_otherwise(
    tmp_path: Path, config: PretrainedConfig, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Known before a run trains, in one line."""
    run = planned(save_model(tmp_path / "model", config))
    capsys.readouterr()
    reason = FORMAT.refuse(run) or ""
    assert message in reason and "\n" not in reason
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SHAPE),  # 4,096 tokens, and texts of 128 at most
        Olmo3Config(**SHAPE, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        MambaConfig(vocab_size=272, hidden_size=128, num_hidden_layers=2),
    ],
    ids=["mistral", "olmo3", "mamba"],
)
def test_a_trial_refuses_nothing_that_mlx_lm_computes(tmp_path: Path, config: PretrainedConfig) -> None:
    run = quantize(save_model(tmp_path / "model", config), tmp_path / "run", 8, 32)
    assert FORMAT.refuse(run) is None
    (tmp_path / "out").mkdir()
    FORMAT.write(run, tmp_path / "out", ExportOptions())
    report = FORMAT.check(run, tmp_path / "out")
    assert report.logits is not None and report.logits[0] <= 1e-3 * report.logits[1]


def test_a_window_that_mlx_lm_leaves_out_is_said(tmp_path: Path) -> None:
    config = MistralConfig(**{**SHAPE, "max_position_embeddings": 1024}, sliding_window=512)
    run = planned(save_model(tmp_path / "model", config))
    assert FORMAT.refuse(run) is None
    (said,) = (remark for remark in FORMAT.remarks(run) if "window" in remark)
    assert "without its sliding window: the same for texts of up to 512 tokens" in said


def test_a_parameter_that_mlx_lm_has_no_place_for(tmp_path: Path) -> None:
    run = planned(save_model(tmp_path / "model"))
    run.values["model.more.weight"] = torch.zeros(2, 2)
    assert "Received 1 parameters not in model" in (FORMAT.refuse(run) or "")


def test_a_bias_beyond_the_scales_dtype_is_refused() -> None:
    tensor = random_tensor(8, 32, 64)
    huge = QuantizedTensor(tensor.codes_OI, torch.full_like(tensor.scales_OG, 600.0), tensor.scheme)
    with pytest.raises(ConfigurationError, match=r"a scale of 600 times -128 is more than torch\.float16 holds"):
        FORMAT.encode(huge)


def test_settings_of_most_layers_and_of_the_others() -> None:
    layers = {"a": QuantScheme(3, 64), "b": QuantScheme(3, 64), "c": QuantScheme("ternary", 32)}
    assert quantization_config(layers, FORMAT.bits) == {
        "group_size": 64,
        "bits": 3,
        "mode": "affine",
        "c": {"group_size": 32, "bits": 2},
    }


def rotary(**changes: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0, **changes}}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("config", "bits", "group_size"),
    [
        (LlamaConfig(**SHAPE, **rotary()), 2, 32),
        (LlamaConfig(**SHAPE, tie_word_embeddings=True, **rotary(**LLAMA3)), 3, 64),
        (Qwen2Config(**SHAPE, tie_word_embeddings=True, **rotary()), 1, 128),
        (Qwen3Config(**SHAPE, head_dim=32, **rotary()), 5, 32),
        (MistralConfig(**SHAPE, sliding_window=None, **rotary()), 6, 64),
        (Phi3Config(**SHAPE, **rotary()), 8, 32),
        (SmolLM3Config(**SHAPE, **rotary()), "ternary", 64),
        (Gemma3TextConfig(**SHAPE, head_dim=32, sliding_window=8, sliding_window_pattern=2), 4, 64),
    ],
    ids=["llama", "llama3-rope", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "gemma3"],
)
def test_mlx_lm_computes_what_the_run_computes(
    tmp_path: Path, config: PretrainedConfig, bits: object, group_size: int
) -> None:
    """Tied and untied heads, biases, norms of heads, rotary bases and scalings, fused projections."""
    run = quantize(save_model(tmp_path / "model", config), tmp_path / "run", bits, group_size)
    assert FORMAT.refuse(run) is None
    (tmp_path / "out").mkdir()
    ledger = FORMAT.write(run, tmp_path / "out", ExportOptions())
    report = FORMAT.check(run, tmp_path / "out")
    assert report.weights == (len(run.weights), len(run.weights)) and report.same_text
    assert report.logits is not None and report.logits[0] <= 1e-4 * report.logits[1]
    assert report.runtime.startswith("mlx-lm ")
    assert ledger.num_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """3 bits, with 1 bit, ternary and 8 bits for some, and a layer left alone."""
    root = tmp_path_factory.mktemp("mlx")
    overrides = {
        "*.down_proj": {"bits": 1, "group_size": 128},
        "*.o_proj": {"bits": "ternary", "group_size": 32},
        "*.k_proj": {"bits": 8},
    }
    run = quantize(save_model(root / "model"), root / "run", 3, 64, overrides=overrides, exclude=["*.0.mlp.up_proj"])
    (root / "out").mkdir()
    ledger = FORMAT.write(run, root / "out", ExportOptions(shard_size=50_000))
    return run, root / "out", ledger


def test_layers_with_settings_of_their_own(mixed) -> None:  # type: ignore[no-untyped-def]
    run, folder, ledger = mixed
    report = FORMAT.check(run, folder)
    assert report.weights == (13, 13) and report.same_text
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 1 and ledger.num_bytes == sum(file.stat().st_size for file in files)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"]["bits"] == 3 and config["dtype"] == "float16"
    assert config["quantization"]["model.layers.0.mlp.down_proj"] == {"group_size": 128, "bits": 1}
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.float16
    assert {value.dtype for name, value in tensors.items()} == {torch.float16, torch.uint32}
    assert ledger.total("redundant") == ledger.total("scales")


def test_a_wrong_value_fails_the_check(mixed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run, folder, _ = mixed
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    packed = {
        name: file
        for file in tmp_path.glob("model-*.safetensors")
        for name, value in load_file(file).items()
        if value.dtype == torch.uint32
    }
    name, damaged = next(iter(packed.items()))
    content = bytearray(damaged.read_bytes())
    header = int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8 : 8 + header])[name]["data_offsets"]
    content[8 + header + start] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CheckFailedError, match="loads 1 of 13 weights with other values"):
        FORMAT.check(run, tmp_path)
    edit_config(tmp_path, model_type="nothing")
    with pytest.raises(CheckFailedError, match="cannot load"):
        FORMAT.check(run, tmp_path)


def test_without_the_rotary_base_the_check_would_fail(tmp_path: Path) -> None:
    """mlx_lm's llama rotates by 10,000 unless config.json says otherwise where it looks."""
    config = LlamaConfig(**SHAPE, **rotary(rope_theta=20.0))
    assert legacy_rotary(config) == {"rope_theta": 20.0}
    run = quantize(save_model(tmp_path / "model", config), tmp_path / "run", 8, 32)
    (tmp_path / "out").mkdir()
    FORMAT.write(run, tmp_path / "out", ExportOptions())
    FORMAT.check(run, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    del content["rope_theta"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckFailedError, match="logits differ"):
        FORMAT.check(run, tmp_path / "out")


def test_without_the_package_nothing_is_checked_and_that_is_said(mixed, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    run, folder, _ = mixed
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    assert FORMAT.check(run, folder).describe() == (
        'NOT CHECKED with mlx-lm, which is not installed (pip install "mlx[cpu]" mlx-lm)'
    )
    assert FORMAT.refuse(run) is None


OUTER = {"bits": 8, "group_size": 32}


@pytest.mark.parametrize(
    ("config", "schemes", "count"),
    [
        (LlamaConfig(**SHAPE, tie_word_embeddings=True), {"embedding": OUTER}, 15),
        (LlamaConfig(**SHAPE), {"embedding": "mlx4g64", "head": {"bits": 6, "group_size": 64}}, 16),
        (LlamaConfig(**SHAPE), {"head": "q4_1"}, 15),
        (Gemma3TextConfig(**SHAPE, head_dim=32, sliding_window=8, sliding_window_pattern=2), {"embedding": OUTER}, 15),
        (Qwen2Config(**SHAPE, tie_word_embeddings=True), {"embedding": {"bits": 3, "group_size": 128}}, 15),
    ],
    ids=["tied", "untied", "head", "gemma3", "qwen2"],
)
def test_a_quantized_embedding_and_head(
    tmp_path: Path, config: PretrainedConfig, schemes: dict[str, object], count: int
) -> None:
    """By mlx_lm's account the run's own: weights bit for bit, logits, text; in the file instead of 16-bit numbers."""
    run = quantize(save_model(tmp_path / "model", config), tmp_path / "run", 4, 64, **schemes)
    assert FORMAT.refuse(FORMAT.view(run)) is None
    (tmp_path / "out").mkdir()
    ledger = FORMAT.write(FORMAT.view(run), tmp_path / "out", ExportOptions())
    report = FORMAT.check(FORMAT.view(run), tmp_path / "out")
    assert report.weights == (count, count) and report.same_text
    assert report.logits is not None and report.logits[0] <= 1e-4 * report.logits[1]
    ledger.verify(FORMAT.weight_files(tmp_path / "out"))
    stored, settings = (
        load_file(tmp_path / "out" / "model.safetensors"),
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization"],
    )
    for name in run.outer:
        weight = run.weights[name]
        assert stored[name].dtype == torch.uint32
        own = settings.get(weight.stem, settings)  # those of most layers stand for themselves
        assert (own["group_size"], own["bits"]) == (weight.scheme.group_size, weight.scheme.storage_bits)
    assert ("lm_head.weight" in stored) == ("head" in schemes)


def test_bfloat16_scales_of_an_embedding(tmp_path: Path) -> None:
    config = LlamaConfig(**SHAPE, tie_word_embeddings=True)
    run = quantize(
        save_model(tmp_path / "model", config), tmp_path / "run", 3, 64, scale_dtype="bfloat16", embedding=OUTER
    )
    (tmp_path / "out").mkdir()
    FORMAT.write(run, tmp_path / "out", ExportOptions())
    assert FORMAT.check(run, tmp_path / "out").weights == (15, 15)


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (
            "q5_k",
            "is q5_k; native holds it, and gguf or mlx if it is a type of theirs; --model.embedding (or head) w8g32",
        ),
        ({"bits": 7, "group_size": 32}, "no kernels for 7 bits (model.embed_tokens.weight)"),
        ({"bits": 8, "group_size": 16}, "groups of 16, for which it computes wrong numbers"),
    ],
)
def test_an_embedding_that_mlx_cannot_hold_is_refused_before_training(
    tmp_path: Path, embedding: object, message: str
) -> None:
    config = LlamaConfig(**{**SHAPE, "hidden_size": 256, "num_hidden_layers": 1})
    run = quantize(save_model(tmp_path / "model", config), tmp_path / "run", 4, 32, embedding=embedding)
    assert message in (FORMAT.refuse(FORMAT.view(run)) or "")
