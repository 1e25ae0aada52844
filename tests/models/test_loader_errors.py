"""Errors of other libraries become one line with their cause; a bug in a model's own code stays what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models import loading
from lightning_gsq.models.loader_errors import as_refusals

MODEL_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd_llama"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        {line}
"""


def own_code(tiny_llama: Path, folder: Path, line: str) -> Path:
    """A Llama that comes with Python code of its own."""
    shutil.copytree(tiny_llama, folder)
    auto_map = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    config = {**json.loads((folder / "config.json").read_text()), "model_type": "odd_llama", "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["OddForCausalLM"]}))
    (folder / "modeling_odd.py").write_text(MODEL_CODE.format(line=line))
    return folder


def test_own_code_runs_where_it_is_trusted(tiny_llama: Path, tmp_path: Path) -> None:
    folder = own_code(tiny_llama, tmp_path / "own", "self.odd = True")
    model = loading.load_model(loading.resolve(str(folder), trust_remote_code=True))
    assert type(model).__name__ == "OddForCausalLM"
    assert model.odd


def test_own_code_is_refused_without_a_prompt(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    folder = own_code(tiny_llama, tmp_path / "own", "self.odd = True")
    with pytest.raises(ConfigurationError, match="which runs only with trust_remote_code true"):
        loading.load_config(loading.resolve(str(folder)))


def test_a_bug_in_own_code_keeps_its_type_and_traceback(tiny_llama: Path, tmp_path: Path) -> None:
    folder = own_code(tiny_llama, tmp_path / "own", "self.table = {}['no such key']")
    source = loading.resolve(str(folder), trust_remote_code=True)
    with pytest.raises(KeyError, match="no such key") as raised:
        loading.load_model(source)
    assert raised.traceback[-1].path.name == "modeling_odd.py"


def test_other_errors_keep_their_cause() -> None:
    error = OSError("first\nsecond")
    with (
        pytest.raises(ConfigurationError, match=r"^model: cannot load x: first$") as raised,
        as_refusals("model: cannot load x"),
    ):
        raise error
    assert raised.value.__cause__ is error


def test_an_error_without_a_message_shows_its_type() -> None:
    with pytest.raises(ConfigurationError, match=r"^x: RecursionError$"), as_refusals("x"):
        raise RecursionError


@pytest.mark.parametrize("error", [MemoryError("too large"), KeyboardInterrupt(), ConfigurationError("as it is")])
def test_what_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, as_refusals("x"):
        raise error
    assert raised.value is error
