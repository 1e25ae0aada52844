"""The command line as a user meets it: help, the shipped configuration, and every way to get it wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lightning_gsq.cli import main

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def fit(tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``fit`` on the tiny model with further arguments; returns exit code and everything printed."""

    def run(*arguments: str, config: str | None = None) -> tuple[int, str]:
        settings = {
            "--trainer.default_root_dir": str(tmp_path / "run"),
            "--trainer.accelerator": "cpu",
            "--trainer.logger": "false",
            "--model.pretrained": str(tiny_llama),
            "--model.gumbel.backend": "eager",
            "--model.compile_blocks": "false",
            "--model.scheme.group_size": "16",
            "--data.source": "lightning_gsq.data.TextFile",
            "--data.source.path": str(corpus),
            "--data.sequence_length": "32",
            "--data.num_sequences": "8",
            "--data.num_validation_sequences": "2",
            "--evaluation.source": "lightning_gsq.data.TextFile",
            "--evaluation.source.path": str(corpus),
            "--evaluation.sequence_length": "32",
            "--evaluation.num_windows": "2",
        }
        given = [part for name, value in settings.items() for part in (name, value)]
        if config is not None:
            (tmp_path / "more.yaml").write_text(config)
            given += ["--config", str(tmp_path / "more.yaml")]
        try:
            code = main(["fit", *given, *arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        output = capsys.readouterr()
        return code, " ".join((output.out + output.err).split())

    return run


def test_no_arguments_show_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    output = capsys.readouterr().out
    assert "fit MODEL" in output and "export RUN" in output


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help.all"]) == 0
    output = capsys.readouterr().out
    for option in (
        "--model.scheme.bits",
        "--data.num_sequences",
        "--evaluation.num_windows",
        "--activations.dtype",
    ):
        after = output.split(f"  {option} ", 1)[1].split("\n\n")[0]
        explanation = after.split("(type:")[0].split(None, 1)[1]
        assert len(explanation.split()) >= 3, option


@pytest.mark.parametrize("given", [["--model.scheme", "Q4_0"], ["--model.scheme=q4_0"], "model:\n  scheme: q4_0\n"])
def test_a_scheme_can_be_given_by_its_name(
    given: list[str] | str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name replaces the whole scheme, whatever a configuration before it says."""
    (tmp_path / "config.yaml").write_text(given if isinstance(given, str) else "")
    before = ["--config", str(ROOT / "cli.yaml")]
    arguments = ["--config", str(tmp_path / "config.yaml")] if isinstance(given, str) else given
    with pytest.raises(SystemExit):
        main(["fit", *before, *arguments, "--print_config"])
    scheme = yaml.safe_load(capsys.readouterr().out)["model"]["scheme"]
    assert scheme.pop("preset").lower() == "q4_0"
    assert scheme == {"bits": 3, "group_size": 64, "salient": None, "budget": None}


def test_shipped_configuration_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    """Every model, data and evaluation option stands in cli.yaml with its own value."""
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(ROOT / "cli.yaml"), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    shipped = yaml.safe_load((ROOT / "cli.yaml").read_text())
    for group in ("model", "data", "evaluation", "activations"):
        assert set(printed[group]) == set(shipped[group]), group
    assert printed["model"]["scheme"] == shipped["model"]["scheme"]
    assert set(printed["model"]["gumbel"]) == set(shipped["model"]["gumbel"])


def test_defaults_can_be_written_down(capsys: pytest.CaptureFixture[str]) -> None:
    """A default that has no YAML form would make every recipe differ from itself."""
    with pytest.raises(SystemExit):
        main(["fit", "--model.pretrained", "org/name", "--print_config"])
    printed = capsys.readouterr().out
    assert "Unable to serialize" not in printed
    assert yaml.safe_load(printed)["model"]["optimizer"]["class_path"] == "torch.optim.Adam"


def test_unknown_option_names_the_nearest(fit: Run) -> None:
    code, output = fit(config="model:\n  schem:\n    bits: 2\n")
    assert code == 2
    assert "schem" in output and "did you mean" in output.lower() and "scheme" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.pretrained", "/no/such/model"], "there is no file or folder /no/such/model"),
        (["--model.pretrained", "no-org/no-model"], "cannot find or read 'no-org/no-model'"),
        (["--model.scheme.bits", "9"], "bits must be 1 to 8 or 'ternary', got 9"),
        (["--model.scheme.bits", "1.5"], "model.scheme.bits"),
        (["--model.scheme.group_size", "0"], "group_size must be a positive number"),
        (["--model.scheme", "q4k"], "there is no preset 'q4k'; the nearest is q4_k"),
        (["--model.scheme", "q3_k"], "q3_k holds rows of whole blocks of 256 weights"),
        (["--model.scheme", "q4_0", "--model.scheme.bits", "5"], "bits 5 does not go with the preset q4_0"),
        (["--model.overrides", '{"*.down_proj": "mlx7g64"}'], "model.overrides: '*.down_proj': there is no preset"),
        (["--model.overrides", '{"*.down_proj": {"bit": 4}}'], "expected the name of a preset, or settings (bits, "),
        (["--model.include", "[nothing*]"], "model.include: the pattern 'nothing*' matches none"),
        (["--model.exclude", "q_proj"], "did you mean '*q_proj*'?"),
        (["--model.overrides", '{"*.nope": {"bits": 4}}'], "overrides: the pattern '*.nope' matches none"),
        (["--model.blocks", "3:9"], "model.blocks: 3:9 is not a range within the model's 2 blocks"),
        (["--model.blocks", "first"], "model.blocks must be a range such as 0:4, got 'first'"),
        (["--model.scale_learning_rate", "0"], "model.scale_learning_rate must be positive, got 0"),
        (
            ["--data.sequence_length", "4096"],
            "data.sequence_length: 4096 tokens exceed the model's limit of 128; choose at most that",
        ),
        (["--evaluation.sequence_length", "4096"], "evaluation.sequence_length: 4096 tokens exceed"),
        (["--data.source.path", "/no/such/text"], "data.source.path: there is no file or folder /no/such/text"),
        (["--evaluation", "/no/such/text"], "evaluation.source.path: there is no file or folder /no/such/text"),
        (["--export", "q4_0"], "there is no format 'q4_0' (q4_0 is a scheme: fit --model.scheme q4_0)"),
        (["--data.num_sequences", "999999"], "the source has"),
        (["--data.num_sequences", "0"], "data.num_sequences must be at least 1, got 0"),
        (["--trainer.precision", "bf16-true"], "logits and scales train in 32 bits, got bf16-true"),
        (["--trainer.max_epochs", "-1"], "trainer.max_epochs: -1 would train the first block for ever"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_ends_before_any_work(fit: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, output = fit(*arguments)
    assert code == 2
    assert message in output
    assert "Traceback" not in output
    assert not list(tmp_path.glob("run/blocks/*"))


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), ("caf\u00e9".encode("latin-1"), "is not UTF-8 text")]
)
def test_bad_text(fit: Run, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    code, output = fit("--data.source.path", str(tmp_path / "text.txt"))
    assert code == 2
    assert message in output


def test_bad_models(fit: Run, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, output = fit("--model.pretrained", str(tmp_path / "empty"))
    assert code == 2 and "has no config.json" in output
    (tmp_path / "weights.pt").write_bytes(b"x")
    code, output = fit("--model.pretrained", str(tmp_path / "weights.pt"))
    assert code == 2 and "is not a GGUF file" in output
    code, output = fit("--model.pretrained", str(tiny_llama / "config.json"))
    assert code == 2 and f"is not a GGUF file; give its folder, {tiny_llama}" in output
    shutil.copytree(tiny_llama, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*"))
    code, output = fit("--model.pretrained", str(tmp_path / "bare"))
    assert code == 2 and "has no readable tokenizer (tokenizer.json and what else the original has): " in output
    assert not output.rstrip().endswith(":")
    (tmp_path / "empty" / "recipe.yaml").touch()
    code, output = fit("--model.pretrained", str(tmp_path / "empty"))
    assert code == 2 and "it is a run folder: start from the run's original" in output
    shutil.copytree(tiny_llama, tmp_path / "quantized")
    file = tmp_path / "quantized" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "awq"}}))
    code, output = fit("--model.pretrained", str(tmp_path / "quantized"))
    assert code == 2 and "already quantized (awq)" in output


def test_unwritable_run_folder(fit: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, output = fit("--trainer.default_root_dir", str(tmp_path / "file" / "run"))
    assert code == 2
    assert "trainer.default_root_dir: cannot make the run folder" in output


def test_full_disk(fit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10, 10, 0)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code, output = fit()
    assert code == 2
    assert "the run needs about" in output and "free" in output


def test_validate_reports_the_perplexity_of_a_folder(
    tiny_llama: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--model.pretrained",
        str(tiny_llama),
        "--trainer.accelerator",
        "cpu",
        "--trainer.precision",
        "32-true",
    ]
    text = ["--evaluation.source", "lightning_gsq.data.TextFile", "--evaluation.source.path", str(corpus)]
    assert (
        main(
            [
                "validate",
                *arguments,
                *text,
                "--evaluation.sequence_length",
                "64",
                "--evaluation.num_windows",
                "3",
            ]
        )
        == 0
    )
    assert "(TextFile corpus.txt, 3 windows of 64 tokens, 32-true)" in capsys.readouterr().out
