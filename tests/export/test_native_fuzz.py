"""Native folders that are damaged or hostile: a clear error, never a crash, never a file outside of the folder."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lightning_gsq
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import ExportOptions, open_run
from lightning_gsq.export.formats.native import NativeFormat
from lightning_gsq.models.loading import load_tokenizer, resolve

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
FEW = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def native(llama_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "native"
    folder.mkdir()
    NativeFormat().write(open_run(llama_run), folder, ExportOptions())
    return folder


@pytest.fixture(scope="module")
def sharded(llama_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "sharded"
    folder.mkdir()
    NativeFormat().write(open_run(llama_run), folder, ExportOptions(8000))
    return folder


@pytest.fixture(scope="module")
def work(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to damage, again and again."""
    return Path(shutil.copytree(native, tmp_path_factory.mktemp("work") / "native"))


def _loads_or_explains(folder: Path) -> bool:
    """Whether it loads; anything but a model or a ConfigurationError is a failure."""
    try:
        model = lightning_gsq.load(folder)
    except ConfigurationError as error:
        assert str(error)
        return False
    assert all(not parameter.is_meta for parameter in [*model.parameters(), *model.buffers()])
    return True


@FEW
@given(data=st.data())
def test_damaged_weight_files(native: Path, work: Path, data: st.DataObject) -> None:
    content = bytearray((native / "model.safetensors").read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    kind = data.draw(st.sampled_from(["cut", "header", "length", "insert", "anywhere"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "header":
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(8, header - 1))] = data.draw(st.integers(0, 255))
    elif kind == "length":
        content[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
    elif kind == "insert":
        place = data.draw(st.integers(0, len(content)))
        content[place:place] = data.draw(st.binary(min_size=1, max_size=64))
    else:
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (work / "model.safetensors").write_bytes(content)
    (work / "config.json").write_bytes((native / "config.json").read_bytes())
    loaded = _loads_or_explains(work)
    assert not (loaded and kind in {"cut", "insert"})


WEIGHT = "model.layers.0.mlp.down_proj.weight"
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-3, 99), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


@FEW
@given(data=st.data())
def test_damaged_configurations(native: Path, work: Path, data: st.DataObject) -> None:
    config = json.loads((native / "config.json").read_text())
    quantization = config["quantization_config"]
    place = data.draw(st.sampled_from(["whole", "version", "weights", "weight", "name", "field", "model"]))
    value = data.draw(ODD)
    if place == "whole":
        config["quantization_config"] = value
    elif place in ("version", "weights"):
        quantization[place] = value
    elif place == "weight":
        quantization["weights"][WEIGHT] = value
    elif place == "name":
        quantization["weights"][data.draw(st.text(max_size=12))] = quantization["weights"].pop(WEIGHT)
    elif place == "field":
        field = data.draw(st.sampled_from(["bits", "group_size", "shape", "experts", "transposed"]))
        quantization["weights"][WEIGHT][field] = value
    else:
        config[data.draw(st.sampled_from(["hidden_size", "intermediate_size", "num_attention_heads"]))] = data.draw(
            st.integers(-2, 64)
        )
    shutil.copy(native / "model.safetensors", work)
    (work / "config.json").write_text(json.dumps(config))
    _loads_or_explains(work)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "x.bin", "missing.safetensors"]
)
def test_an_index_stays_in_its_folder(sharded: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "native"))
    shutil.copy(next(sharded.glob("model-00001-*")), tmp_path / "outside.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError, match=r"not a safetensors file of that folder|lacks"):
        lightning_gsq.load(folder)
    with pytest.raises(ConfigurationError, match=r"not a safetensors file of that folder|lacks"):
        resolve(str(folder))
    if name.startswith("../"):
        with pytest.raises(ConfigurationError, match="outside of that folder"):
            AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_damaged_indexes(sharded: Path, tmp_path: Path, content: str) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "native"))
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"index\.json"):
        lightning_gsq.load(folder)


Change = Callable[[dict[str, torch.Tensor]], Any]
STEM = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{STEM}.codes"), "no file holds"),
        (lambda t: t.pop(f"{STEM}.scales"), "no file holds"),
        (lambda t: t.pop("model.norm.weight"), "missing keys model.norm.weight"),
        (lambda t: t.update({f"{STEM}.codes": t[f"{STEM}.codes"][:, :-1].clone()}), "expected torch.int32"),
        (lambda t: t.update({f"{STEM}.codes": t[f"{STEM}.codes"].float()}), "expected torch.int32"),
        (lambda t: t.update({f"{STEM}.scales": t[f"{STEM}.scales"].int()}), "expected one of F16"),
        (lambda t: t.update({f"{STEM}.scales": t[f"{STEM}.scales"] * torch.nan}), "not all finite"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "mismatched keys .*model.norm.weight"),
        (lambda t: t.update({"extra": torch.zeros(3)}), "unexpected keys extra"),
    ],
)
def test_tensors_that_do_not_fit(native: Path, tmp_path: Path, change: Change, message: str) -> None:
    folder = Path(shutil.copytree(native, tmp_path / "native"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match=message):
        lightning_gsq.load(folder)
    assert load_tokenizer(resolve(str(folder)))


def test_a_ternary_code_that_is_no_level(new_run: Callable[..., Path], tmp_path: Path) -> None:
    from lightning_gsq.weights.scheme import QuantScheme

    folder = tmp_path / "native"
    folder.mkdir()
    NativeFormat().write(open_run(new_run(scheme=QuantScheme("ternary", 16))), folder, ExportOptions())
    lightning_gsq.load(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{STEM}.codes"][0, 0] &= ~3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match="lies below the lowest level"):
        lightning_gsq.load(folder)
