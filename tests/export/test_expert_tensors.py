"""Experts one by one in compressed-tensors folders, under the names that vLLM reads; and models that load otherwise."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GptOssConfig,
    JetMoeConfig,
    Llama4TextConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from lightning_gsq.export.contract import CheckFailedError, ExportOptions
from lightning_gsq.export.formats.compressed_tensors import CompressedTensorsFormat
from lightning_gsq.export.formats.expert_tensors import patterns
from lightning_gsq.export.formats.native import NativeFormat
from lightning_gsq.export.preflight import model_obstacle
from tests.support.decoders import dbrx_config
from tests.support.exported import SHAPE, quantize, save_model

FORMAT, NATIVE = CompressedTensorsFormat(), NativeFormat()
MOE = {**SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_key_value_heads": 2}
MOE |= {"num_attention_heads": 4, "head_dim": 16}
QWEN = Qwen3MoeConfig(**MOE, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
MIXTRAL = MixtralConfig(**MOE, num_local_experts=4)
TWO_SCHEMES = {"*.self_attn.*": {"bits": 8}, "*.experts.*": {"bits": 2}}


def run_of(config: PretrainedConfig, root: Path, **settings: Any) -> Any:
    return quantize(save_model(root / "model", config), root / "run", 4, 32, **settings)


def written(run: Any, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    FORMAT.write(run, folder, ExportOptions())
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return content


@pytest.mark.parametrize(
    ("config", "block", "matrices"),
    [
        (QWEN, "model.layers.1.mlp", ("gate_proj", "up_proj", "down_proj")),
        (MIXTRAL, "model.layers.1.block_sparse_moe", ("w1", "w3", "w2")),
    ],
)
def test_each_expert_has_its_matrices_under_the_familys_names(
    config: PretrainedConfig, block: str, matrices: tuple[str, str, str], tmp_path: Path
) -> None:
    run = run_of(config, tmp_path, overrides=TWO_SCHEMES)
    assert model_obstacle(FORMAT, run) is None
    content = written(run, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for expert in range(4):
        for matrix in matrices:
            assert stored[f"{block}.experts.{expert}.{matrix}.weight_packed"].dtype == torch.int32
    rows = [stored[f"{block}.experts.3.{matrix}.weight_shape"].tolist() for matrix in matrices]
    width = rows[0][0]
    assert rows == [[width, 64], [width, 64], [64, width]]
    assert f"{block}.gate.weight" in stored and f"{block}.gate" in content["ignore"]
    targets = {group["weights"]["num_bits"]: group["targets"] for group in content["config_groups"].values()}
    # vLLM asks for these names, whatever the matrices are called, from the beginning of the name on.
    (pattern,) = targets[2]
    assert re.match(pattern.removeprefix("re:"), f"{block}.experts.0.gate_proj")
    assert not re.match(pattern.removeprefix("re:"), f"{block}.shared_experts.gate_proj")
    report = FORMAT.check(run, tmp_path / "out")
    assert report.weights == (12, 12) and report.logits is not None
    assert report.logits[0] <= 1e-4 * report.logits[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # as a user does
    assert model.dtype == torch.float16
    assert all(torch.equal(model.get_parameter(name), run.dense(name, torch.float16)) for name in run.weights)


def test_more_schemes_than_transformers_knows_are_unpacked_by_the_package(tmp_path: Path) -> None:
    overrides = {"*.0.mlp.experts.*": {"bits": 2}, "*.o_proj": {"bits": 8}}
    run = run_of(QWEN, tmp_path, overrides=overrides)
    content = written(run, tmp_path / "out")
    assert "dequantize" not in content
    assert [runtime.name for runtime in FORMAT.runtimes(list(run.weights.values()))] == [
        "vLLM with Humming kernels, GPU"
    ]
    assert FORMAT.check(run, tmp_path / "out").weights == (12, 12)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {name.replace("experts.0.up_proj", "experts.9.up_proj"): value for name, value in tensors.items()},
        file,
        {"format": "pt"},
    )
    with pytest.raises(CheckFailedError):
        FORMAT.check(run, tmp_path / "out")


def test_matrices_of_experts_that_differ_are_refused(tmp_path: Path) -> None:
    run = run_of(QWEN, tmp_path, overrides={"*.experts.down_proj": {"bits": 2}})
    reason = model_obstacle(FORMAT, run) or ""
    assert "vLLM reads all matrices of a block's experts with the same bits" in reason and "export to native" in reason
    assert "gate_up_proj is 4 bits, groups of 32" in reason and "down_proj 2 bits, groups of 32" in reason


def test_experts_of_some_blocks_alone_are_refused(tmp_path: Path) -> None:
    run = run_of(QWEN, tmp_path, exclude=["*.1.mlp.experts.*"])
    assert "model.layers.1.mlp.experts is not" in (model_obstacle(FORMAT, run) or "")


def test_experts_left_alone_are_on_the_ignore_list(tmp_path: Path) -> None:
    run = run_of(QWEN, tmp_path, exclude=["*.experts.*"])
    content = written(run, tmp_path / "out")
    assert "dequantize" not in content and r"re:.*\.\d+\.mlp\.experts\..*" in content["ignore"]
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "out" / "model.safetensors")
    assert FORMAT.check(run, tmp_path / "out").weights == (8, 8)


def test_experts_that_files_keep_fused_are_refused(tmp_path: Path) -> None:
    config = GptOssConfig(**MOE, num_local_experts=4, layer_types=["sliding_attention", "full_attention"])
    reason = model_obstacle(FORMAT, run_of(config, tmp_path)) or ""
    assert reason.startswith("compressed-tensors holds a matrix for each expert, and the files of a GptOssForCausalLM")
    assert "one tensor of all experts" in reason and "native and dequantized hold it" in reason


def test_a_model_whose_code_does_not_bear_packed_layers_is_unpacked_when_it_loads(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=272, hidden_size=64, num_hidden_layers=1, state_size=8, time_step_rank=32)
    run = run_of(config, tmp_path)
    assert written(run, tmp_path / "out")["dequantize"] is True
    report = FORMAT.check(run, tmp_path / "out")
    assert report.weights == (2, 2) and report.note == "unpacked by transformers when it loads"
    name = next(iter(run.weights))
    other = run.with_schemes({name: replace(run.weights[name].scheme, bits=8)})
    assert "unpacks one scheme alone; give all weights the same bits" in (model_obstacle(FORMAT, other) or "")


def test_patterns_name_blocks_only_where_they_differ() -> None:
    same = {"model.layers.0.mlp.experts": 2, "model.layers.1.mlp.experts": 2}
    assert patterns(same) == {r"re:.*\.\d+\.mlp\.experts\..*": 2}
    assert patterns({**same, "model.layers.1.mlp.experts": 4}) == {
        r"re:.*\.0\.mlp\.experts\..*": 2,
        r"re:.*\.1\.mlp\.experts\..*": 4,
    }


@pytest.mark.parametrize(
    "config",
    [
        FalconConfig(vocab_size=272, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, bias=False),
        JetMoeConfig(
            vocab_size=272,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_key_value_heads=2,
            kv_channels=16,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        Llama4TextConfig(**MOE, intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1),
        dbrx_config(272),
    ],
    ids=lambda config: config.model_type,
)
def test_native_holds_classes_derived_from_linear_layers_and_experts_outside_of_transformers_interface(
    config: PretrainedConfig, tmp_path: Path
) -> None:
    run = run_of(config, tmp_path)
    assert model_obstacle(NATIVE, run) is None
    (tmp_path / "out").mkdir()
    NATIVE.write(run, tmp_path / "out", ExportOptions())
    report = NATIVE.check(run, tmp_path / "out")
    assert report.weights == (len(run.weights), len(run.weights))
