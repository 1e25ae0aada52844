"""Files that hold fewer weights than the model, others, or more: refused before a weight is read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4MoeConfig, LlamaConfig

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models import loading
from lightning_gsq.models.weight_names import UnusedWeightsWarning
from tests.support.tiny import COMMON, FAMILIES, random_model, save_tiny_model

State = dict[str, Tensor]
MODEL = "model.safetensors"


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A tiny model's folder with its weights, and its configuration, changed."""

    def change(weights: Callable[[State], State] = dict, family: str = "llama", **config: object) -> Path:
        folder = save_tiny_model(family, tmp_path / "changed")
        save_file(weights(load_file(folder / MODEL)), folder / MODEL, {"format": "pt"})
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        return folder

    return change


def load(folder: Path) -> None:
    loading.load_model(loading.resolve(str(folder)))


def refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The message of a refusal that came before the weights were read, and that plan would give too."""
    source = loading.resolve(str(folder))
    with pytest.raises(ConfigurationError) as planned:
        loading.check_headers(source, loading.load_config(source))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigurationError) as raised:
        loading.load_model(source)
    assert str(raised.value) == str(planned.value)
    return str(raised.value)


def without(*endings: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if not name.endswith(endings)}


def renamed(change: Callable[[str], str]) -> Callable[[State], State]:
    return lambda state: {change(name): value for name, value in state.items()}


def plus(**tensors: Tensor) -> Callable[[State], State]:
    return lambda state: state | {name.replace("__", "."): value for name, value in tensors.items()}


def test_a_head_that_is_not_there(changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "1 in all: lm_head.weight" in refused(changed(without("lm_head.weight")), monkeypatch)


def test_more_blocks_than_in_the_files(changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(changed(num_hidden_layers=3), monkeypatch)
    assert "9 in all: model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, " in said


def test_fewer_blocks_than_in_the_files(changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(changed(num_hidden_layers=1), monkeypatch)
    assert "weights of modules that have none by its configuration, 9 in all: model.layers.1." in said


def test_a_tensor_that_the_index_names_and_its_shard_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path, max_shard_size="60KB")
    file = sorted(tmp_path.glob("model-*.safetensors"))[1]
    state = load_file(file)
    gone = sorted(state)[0]
    save_file({name: value for name, value in state.items() if name != gone}, file, {"format": "pt"})
    assert f"1 in all: {gone}" in refused(tmp_path, monkeypatch)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_with_a_wrapper_before_them(
    prefix: str, changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused(changed(renamed(lambda name: prefix + name)), monkeypatch)
    assert f"take {prefix!r} off the names there" in said


def test_another_shape(changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(changed(intermediate_size=40), monkeypatch)
    assert "model.layers.0.mlp.down_proj.weight has shape (32, 48)" in said
    assert "(32, 40) by its configuration (6 weights differ so)" in said


def test_biases_that_the_configuration_denies(changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(changed(family="qwen2", model_type="llama", architectures=["LlamaForCausalLM"]), monkeypatch)
    assert "6 in all: model.layers.0.self_attn.k_proj.bias" in said
    assert "another model" in said


@pytest.mark.parametrize("name", ["self_attn__q_norm__weight", "second_mlp__up_proj__weight", "sinks"])
def test_weights_inside_of_a_block(name: str, changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = changed(plus(**{f"model__layers__1__{name}": torch.ones(8, 8)}))
    assert f"model.layers.1.{name.replace('__', '.')}" in refused(folder, monkeypatch)


@pytest.mark.parametrize(
    ("parts", "kept"),
    [
        (("qweight", "qzeros", "scales", "g_idx"), False),  # GPTQ, AWQ
        (("weight_packed", "weight_scale", "weight_shape"), False),  # compressed-tensors
        (("weight_scale_inv",), True),  # fp8
        (("weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"), True),
        (("W_q", "meta"), False),  # HQQ
    ],
)
def test_a_quantized_layout_that_the_configuration_does_not_mention(
    parts: tuple[str, ...], kept: bool, changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pack(state: State) -> State:
        packed = {}
        for name, value in state.items():
            if not name.endswith("_proj.weight"):
                packed[name] = value
                continue
            packed |= {f"{name.removesuffix('.weight')}.{part}": torch.ones(2) for part in parts}
            packed |= {name: value} if kept else {}
        return packed

    said = refused(changed(pack), monkeypatch)
    assert f"is already quantized (it holds model.layers.0.mlp.down_proj.{sorted(parts)[0]}" in said


def test_experts_under_other_names(changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = changed(renamed(lambda name: name.replace(".experts.", ".specialists.")), family="qwen3_moe")
    assert "model.layers.0.mlp.experts.down_proj, model.layers.0.mlp.experts.gate_up_proj" in refused(
        folder, monkeypatch
    )


def test_a_tied_head_may_be_missing(tmp_path: Path) -> None:
    model = random_model(LlamaConfig(**COMMON, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / MODEL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedWeightsWarning)
        again = loading.load_model(loading.resolve(str(tmp_path)))
    ids = torch.arange(8)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_without_a_word(family: str, tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path / family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedWeightsWarning)
        load(tmp_path / family)


@pytest.mark.parametrize("name", ["rotary_emb__inv_freq", "attn__bias", "attn__masked_bias"])
def test_what_old_files_hold_and_is_computed_today(name: str, changed: Callable[..., Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedWeightsWarning)
        load(changed(plus(**{f"model__layers__0__self_attn__{name}": torch.ones(4)})))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("model__mtp_layers__0__eh_proj__weight", {}),
        ("mtp__fc__weight", {}),
        ("vision_tower__patch__weight", {}),
        ("model__layers__2__eh_proj__weight", {"num_nextn_predict_layers": 1}),
    ],
)
def test_further_heads_are_one_warning(name: str, config: dict[str, object], changed: Callable[..., Path]) -> None:
    folder = changed(plus(**{name: torch.ones(4, 4)}), **config)
    with pytest.warns(UnusedWeightsWarning, match=rf"1 in all, which are left out: {name.replace('__', '.')}") as said:
        load(folder)
    assert len(said) == 1


def test_a_model_on_the_hub_is_compared_when_it_is_loaded(
    changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name on the hub stands for a folder of the cache, which is not looked at before."""
    folder = changed(plus(mtp__fc__weight=torch.ones(4, 4)))
    hub = loading.ModelSource(str(folder))
    monkeypatch.setattr(loading.ModelSource, "files", property(lambda self: []))
    with pytest.warns(UnusedWeightsWarning, match=r"left out: mtp.fc.weight"):
        loading.load_model(hub)
    state = load_file(folder / MODEL)
    save_file(without("layers.0.mlp.up_proj.weight")(state), folder / MODEL, {"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"1 in all: model.layers.0.mlp.up_proj.weight"):
        loading.load_model(hub)


def test_heads_for_several_tokens_that_a_class_leaves_out_are_named(tmp_path: Path) -> None:
    model = random_model(Glm4MoeConfig(**COMMON, head_dim=8, n_routed_experts=4, num_experts_per_tok=2))
    model.save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.92.eh_proj.weight"
    save_file(load_file(file) | {name: torch.ones(4, 4)}, file, {"format": "pt"})
    with pytest.warns(UnusedWeightsWarning, match="left out: model.layers.92.eh_proj.weight"):
        loading.load_model(loading.resolve(str(tmp_path)))
