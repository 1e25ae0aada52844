"""Configurations in the package, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_gsq.cli import configs, main


def says(given: Any, value: Any) -> bool:
    """Whether settings say at least this."""
    if isinstance(value, dict):
        return all(says(given[name], part) for name, part in value.items())
    return bool(given == value)


@pytest.mark.parametrize("name", ["5min", "10min", "experts-only", "moe", "quickstart", "trial", "ternary"])
def test_by_name(name: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "a/model", "--config", name, "--print_config"])
    assert ended.value.code == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    own = yaml.safe_load((configs.FOLDER / f"{name}.yaml").read_text())
    for group, values in own.items():
        for option, value in values.items():
            if option == "pretrained":
                continue
            assert says(settings[group][option], value)


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert configs.config_file("trial").endswith("trial.yaml")
    (tmp_path / "trial").write_text("model: {}")
    assert configs.config_file("trial") == "trial"


def test_another_name(capsys: Any) -> None:
    assert main(["fit", "a/model", "--config", "quickstar"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "there is no file quickstar; those of the package are 10min, 5min, default, experts-only, moe, q" in said
