"""What holds without any option, and what options change of it."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_gsq.cli import main
from lightning_gsq.cli.configs import DEFAULTS

ROOT = Path(__file__).parents[2]
Resolve = Callable[..., dict[str, Any]]


@pytest.fixture
def resolve(capsys: pytest.CaptureFixture[str]) -> Resolve:
    """The settings of ``fit`` with these arguments."""

    def run(*arguments: str) -> dict[str, Any]:
        with contextlib.suppress(SystemExit):
            main(["fit", *arguments, "--print_config"])
        printed: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
        return printed

    return run


def _names(settings: dict[str, Any]) -> list[str]:
    return [callback["class_path"].rsplit(".", 1)[-1] for callback in settings["trainer"]["callbacks"]]


def test_no_option_is_cli_yaml(resolve: Resolve) -> None:
    plain, shipped = resolve("org/name"), resolve("--config", str(ROOT / "cli.yaml"))
    assert shipped["trainer"].pop("default_root_dir") == "runs/smollm2-135m-3bit"
    assert plain["trainer"].pop("default_root_dir") == "runs/quantized"
    assert plain["model"].pop("pretrained") == "org/name"
    shipped["model"].pop("pretrained")
    assert plain == shipped
    assert "GumbelAnnealing" in _names(plain)


def test_the_packaged_recipe_is_cli_yaml() -> None:
    lines = (ROOT / "cli.yaml").read_text().splitlines()[2:]
    example = ("  pretrained:", "  default_root_dir:")
    assert Path(DEFAULTS).read_text().splitlines()[1:] == [line for line in lines if not line.startswith(example)]


@pytest.mark.parametrize("value", ["GPTQ", "gptq", "lightning_gsq.quantizers.GPTQ"])
def test_another_class_starts_from_its_own_defaults(value: str, resolve: Resolve) -> None:
    start = resolve("m", "--model.warm_start", value)["model"]["warm_start"]
    assert start["class_path"] == "lightning_gsq.quantizers.GPTQ"
    assert start["init_args"]["activation_order"] is True and start["init_args"]["damping"] == 0.01


def test_another_class_in_a_file(resolve: Resolve, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "model: {optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.5}},\n"
        "        warm_start: {class_path: lightning_gsq.quantizers.GPTQ, init_args: {damping: 0.5}}}\n"
    )
    model = resolve("m", "--config", str(tmp_path / "my.yaml"))["model"]
    start = model["warm_start"]["init_args"]
    assert (start["damping"], start["block_columns"], start["follow"]) == (0.5, 128, False)
    assert model["optimizer"]["init_args"]["lr"] == 0.5
    assert model["optimizer"]["init_args"]["betas"] == [0.9, 0.95], "the same class keeps the recipe's"
    changed = resolve("m", "--config", str(tmp_path / "my.yaml"), "--model.warm_start", "RTN")["model"]
    assert changed["warm_start"] == {"class_path": "lightning_gsq.quantizers.RTN", "init_args": {"weighted": True}}


@pytest.mark.parametrize("name", ["q4_k", "file", "w3g64"])
def test_a_scheme_is_not_taken_for_a_file_of_its_name(
    name: str, resolve: Resolve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("no configuration")
    assert resolve("m", "--model.scheme", name)["model"]["scheme"]["preset"] == name


def test_options_win_over_files(resolve: Resolve, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("model: {scheme: {bits: 2}}\n")
    assert resolve("m", "--config", str(tmp_path / "my.yaml"))["model"]["scheme"]["bits"] == 2
    settings = resolve("m", "--config", str(tmp_path / "my.yaml"), "--model.scheme.bits", "4")
    assert settings["model"]["scheme"]["bits"] == 4
    (tmp_path / "named.yaml").write_text("model: {pretrained: n, scheme: {bits: 2}}\n")
    model = resolve("m", "--model.scheme.bits=4", "--config", str(tmp_path / "named.yaml"))["model"]
    assert (model["pretrained"], model["scheme"]["bits"]) == ("m", 4), "where they stand does not matter"


def test_a_callback_comes_to_those_of_the_recipe(resolve: Resolve) -> None:
    before = _names(resolve("m"))
    added = resolve("m", "--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "loss")
    assert _names(added) == [*before, "EarlyStopping"]
    assert added["trainer"]["callbacks"][-1]["init_args"]["monitor"] == "loss"
    assert _names(resolve("m", "--trainer.callbacks", "[]")) == []


def test_one_callback_of_a_class() -> None:
    from jsonargparse import Namespace

    from lightning_gsq.cli.trainers import latest_of_each_class

    first, other, second = (Namespace(class_path=path, init_args=i) for i, path in enumerate("aba"))
    assert latest_of_each_class([first, other, second]) == [second, other]
    assert latest_of_each_class(None) is None


@pytest.mark.parametrize(
    ("typed", "resolved"),
    [
        (["--model.exclude", "*down_proj"], {"exclude": ["*down_proj"]}),
        (["--model.exclude=*down_proj,*q_proj"], {"exclude": ["*down_proj", "*q_proj"]}),
        (["--model.exclude", "[a, b]"], {"exclude": ["a", "b"]}),
        (["--model.phases", "init,blocks"], {"phases": ["init", "blocks"]}),
    ],
)
def test_lists_as_typed(typed: list[str], resolved: dict[str, Any], resolve: Resolve) -> None:
    model = resolve("m", *typed)["model"]
    assert {name: model[name] for name in resolved} == resolved


def test_formats_as_typed(resolve: Resolve) -> None:
    assert resolve("m", "--export", "gguf,gptq")["export"] == ["gguf", "gptq"]


@pytest.mark.parametrize(
    ("typed", "kind", "path"),
    [
        ("corpus.txt", "TextFile", "corpus.txt"),
        ("chats.jsonl", "TextFile", "chats.jsonl"),
        ("./folder", "TextFile", "./folder"),
        ("shards/*.parquet", "LocalShards", "shards/*.parquet"),
        ("HuggingFaceFW/fineweb-edu", "HuggingFaceDataset", "HuggingFaceFW/fineweb-edu"),
        ("pythondocumentation", "PythonDocumentation", None),
    ],
)
@pytest.mark.parametrize("option", ["--data", "--data.source", "--evaluation.source"])
def test_text_by_its_path_or_name(option: str, typed: str, kind: str, path: str | None, resolve: Resolve) -> None:
    source = resolve("m", option, typed)[option.removeprefix("--").split(".")[0]]["source"]
    assert source["class_path"] == f"lightning_gsq.data.{kind}"
    assert source["init_args"].get("path") == path


@pytest.mark.parametrize("typed", [["org/name"], ["--model", "org/name"], ["--model.scheme.bits", "2", "org/name"]])
def test_the_model_has_one_name(typed: list[str], resolve: Resolve) -> None:
    assert resolve(*typed)["model"]["pretrained"] == "org/name"
