"""What other verbs wrote can be given to those that take a model."""

from pathlib import Path

import pytest

from lightning_gsq.commands.addresses import written_model
from lightning_gsq.errors import ConfigurationError


def test_addresses(tmp_path: Path) -> None:
    run, export, model = tmp_path / "run", tmp_path / "run" / "export" / "gguf", tmp_path / "model"
    for folder in (run / "model", export, model):
        folder.mkdir(parents=True)
    (run / "recipe.yaml").touch()
    (export / "recipe.yaml").touch()
    (export / "model.gguf").touch()
    (model / "config.json").touch()
    (model / "other.gguf").touch()
    with pytest.raises(ConfigurationError, match="is not finished; resume it"):
        written_model(str(run))
    (run / "model" / "config.json").touch()
    assert written_model(str(run)) == str(run / "model")
    assert written_model(str(export)) == str(export / "model.gguf")
    assert written_model(str(model)) == str(model)
    assert written_model("org/name") == "org/name"
    (export / "second.gguf").touch()
    with pytest.raises(ConfigurationError, match="holds 2 GGUF files; give one of them"):
        written_model(str(export))
