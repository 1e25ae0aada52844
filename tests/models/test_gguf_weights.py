"""GGUF files that lack tensors of their model, or hold tensors that would be passed over without a word."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES, GGUFWriter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.architectures.table import architecture_of
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.layout import places_in_folder
from lightning_gsq.models import loading
from lightning_gsq.models.gguf_weights import compare_gguf
from lightning_gsq.models.head import head_name
from lightning_gsq.models.weight_names import UnusedWeightsWarning
from tests.support.tiny import COMMON, FAMILIES, random_model

Arrays = dict[str, np.ndarray]


def tensors_of(model: PreTrainedModel) -> Arrays:
    parameters = model.state_dict()
    rows = {name: len(parameter) for name, parameter in parameters.items()}
    arrays = {}
    for name, stored in places_in_folder(architecture_of(model.config), model.config, rows, head_name(model)).items():
        (place,) = stored.places
        arrays[place.name] = place.of_file(parameters[name]).numpy()
    return arrays


def write(path: Path, model: PreTrainedModel, arrays: Arrays) -> Path:
    config = model.config
    writer = GGUFWriter(path, architecture_of(config).name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, array in arrays.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The message of a refusal that came before a tensor was dequantized."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("tensors were read"))
    with pytest.raises(ConfigurationError) as raised:
        loading.load_model(loading.resolve(str(path)))
    return str(raised.value)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_whole_file_loads_without_a_word(family: str, tmp_path: Path) -> None:
    # transformers' reader takes a head dimension of 128 for Qwen3, whatever the file says
    model = random_model(Qwen3Config(**COMMON, head_dim=128)) if family == "qwen3" else FAMILIES[family]()
    path = write(tmp_path / "whole.gguf", model, tensors_of(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedWeightsWarning)
        again = loading.load_model(loading.resolve(str(path)))
    ids = torch.arange(8)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_file_of_the_same_name_in_the_current_folder_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers takes its weights where it gets a name alone."""
    model = FAMILIES["llama"]()
    arrays = tensors_of(model)
    others = {"there": arrays, "here": arrays | {"output.weight": 0 * arrays["output.weight"]}}
    for name, own in others.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name / "model.gguf", model, own)
    monkeypatch.chdir(tmp_path / "here")
    loaded = loading.load_model(loading.resolve("../there/model.gguf"))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert str(tmp_path) not in str(loaded.config.to_dict())
    with pytest.raises(
        ConfigurationError, match=r"from model.gguf in the current folder; start elsewhere, or give \./m"
    ):
        loading.resolve("organisation/name/model.gguf")


def test_a_configuration_is_read_once_and_anew_from_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAMILIES["llama"]()
    source = loading.resolve(str(write(tmp_path / "a.gguf", model, tensors_of(model))))
    first = loading.load_config(source)
    first.num_hidden_layers = 9
    with monkeypatch.context() as patched:
        patched.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("read again"))
        assert loading.load_config(source).num_hidden_layers == 2
    model.config.max_position_embeddings = 4096
    write(tmp_path / "a.gguf", model, tensors_of(model))
    assert loading.load_config(source).max_position_embeddings == 4096


def test_a_file_without_a_head_has_a_tied_one(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    arrays = tensors_of(model)
    del arrays["output.weight"]
    again = loading.load_model(loading.resolve(str(write(tmp_path / "tied.gguf", model, arrays))))
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
    ],
)
def test_a_missing_tensor(stored: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    arrays = tensors_of(model)
    del arrays[stored]
    said = refused(write(tmp_path / "lacks.gguf", model, arrays), monkeypatch)
    assert f"not in the files of {tmp_path}/lacks.gguf, 1 in all: {named}" in said


def test_another_shape(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    arrays = tensors_of(model)
    arrays["blk.0.ffn_down.weight"] = arrays["blk.0.ffn_down.weight"][:, :40]
    path = write(tmp_path / "shape.gguf", model, arrays)
    with pytest.raises(ConfigurationError, match=r"mlp.down_proj.weight has shape \(32, 40\) in the files"):
        loading.load_model(loading.resolve(str(path)))


@pytest.mark.parametrize("extra", ["blk.0.attn_q.bias", "blk.1.attn_q_norm.weight", "output.bias"])
def test_tensors_of_modules_that_have_none(extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' reader would leave them out without a word."""
    model = FAMILIES["llama"]()
    arrays = tensors_of(model) | {extra: np.ones(32, np.float32)}
    said = refused(write(tmp_path / "more.gguf", model, arrays), monkeypatch)
    assert f"1 in all: {extra}; without them it would be another model" in said


def test_tensors_of_further_modules_are_a_warning(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    arrays = tensors_of(model) | {"rope_freqs.weight": np.ones(4, np.float32)}
    path = write(tmp_path / "rope.gguf", model, arrays)
    with pytest.warns(UnusedWeightsWarning, match=r"1 in all, which are left out: rope_freqs.weight"):
        loading.load_model(loading.resolve(str(path)))


MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("architecture", "config", "absent"),
    [
        ("qwen3moe", Qwen3MoeConfig(**COMMON, **MOE, head_dim=8), {"ffn_gate_up_exps"}),
        (
            "qwen2moe",
            Qwen2MoeConfig(**COMMON, **MOE, shared_expert_intermediate_size=24),
            {"ffn_gate_up_exps"},
        ),
    ],
)
@pytest.mark.parametrize("gone", [None, "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_inp"])
def test_experts_that_are_put_together_from_several_tensors(
    architecture: str, config: PretrainedConfig, absent: set[str], gone: str | None, tmp_path: Path
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    (number,) = (number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = [TENSOR_NAMES[kind].format(bid=1) for kind in MODEL_TENSORS[number]]
    names += [TENSOR_NAMES[kind].format(bid=0) for kind in MODEL_TENSORS[number] if "{bid}" in TENSOR_NAMES[kind]]
    names = [name for name in names if name.rpartition(".")[2] not in {*absent, "ffn_gate", "ffn_up", "ffn_down"}]
    stored = [f"{name}.weight" for name in names if name != f"blk.1.{gone}"]
    if architecture == "qwen2moe":
        stored += [f"blk.{block}.attn_{part}.bias" for block in range(2) for part in "qkv"]
    writer = GGUFWriter(tmp_path / "x.gguf", architecture)
    for name in stored:
        writer.add_tensor(name, np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    missing, belonging, further = compare_gguf(GGUFFile(tmp_path / "x.gguf"), model)
    fused = {"ffn_gate_exps": "experts.gate_up_proj", "ffn_up_exps": "experts.gate_up_proj"}
    names_of = {**fused, "ffn_down_exps": "experts.down_proj", "ffn_gate_inp": "gate.weight"}
    assert missing == ([] if gone is None else [f"model.layers.1.mlp.{names_of[gone]}"])
    assert belonging == further == []


def test_a_file_on_the_hub_that_is_not_there() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot find 'no-such-org/no-such-model/q.gguf'"):
        loading.load_config(loading.resolve("no-such-org/no-such-model/q.gguf"))
