"""Importing the package costs nothing; transformers knows the format as soon as it can load a model."""

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gsq.errors import ConfigurationError

SHOW = "; import sys; print('torch' in sys.modules, 'lightning_gsq.packed.load' in sys.modules)"


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("import lightning_gsq", "False False"),
        ("import lightning_gsq, transformers.modeling_utils", "True True"),
        ("import transformers.modeling_utils, lightning_gsq", "True True"),
        ("import lightning_gsq; lightning_gsq.load", "True True"),
    ],
)
def test_the_reader_comes_with_the_ability_to_load(code: str, shown: str) -> None:
    output = subprocess.run([sys.executable, "-c", code + SHOW], capture_output=True, text=True, check=True).stdout
    assert output.strip() == shown


def test_there_is_nothing_else() -> None:
    import lightning_gsq

    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        lightning_gsq.quantise  # noqa: B018


def test_what_is_no_native_folder_says_how_it_is_loaded(tmp_path: Path) -> None:
    import lightning_gsq

    def said(folder: Path) -> str:
        with pytest.raises(ConfigurationError) as refused:
            lightning_gsq.load(folder)
        return str(refused.value)

    assert "there is no folder" in said(tmp_path / "no")
    run, gguf = tmp_path / "run", tmp_path / "gguf"
    run.mkdir()
    (run / "recipe.yaml").touch()
    assert f"write one first: lightning-gsq export {run} --format native" in said(run)
    (run / "export" / "native").mkdir(parents=True)
    assert f"is a run folder, not one in the native format; load {run / 'export' / 'native'}" in said(run)
    gguf.mkdir()
    for name in ("recipe.yaml", "model.gguf"):
        (gguf / name).touch()
    how = f"from_pretrained({str(gguf)!r}, gguf_file='model.gguf')"
    assert how in said(gguf) and how in said(gguf / "model.gguf")
