"""The command as a user meets it: what it writes, what it refuses, what a crash leaves."""

import json
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import lightning_gsq
import lightning_gsq.commands.export as export_command
from lightning_gsq.cli import main
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import CheckFailedError, preflight
from lightning_gsq.export.formats.native import NativeFormat
from lightning_gsq.run.folder import RunFolder
from tests.support.exported import with_own_code
from tests.support.finished import MakeRun
from tests.support.hostile import YAML_BOMB


def _command(*arguments: str) -> int:
    try:
        return main(["export", *arguments])
    except SystemExit as exit_:
        return int(exit_.code or 0)


def test_several_formats_at_once(new_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run()
    assert _command("--run", str(run), "--format", "native", "--format", "dequantized") == 0
    output = capsys.readouterr().out
    for expected in ("What loads 3 bit, groups of 16", "exact", "codes", "14 of 14 quantized weights bit-identical"):
        assert expected in output
    for name in ("native", "dequantized"):
        folder = run / "export" / name
        assert {file.name for file in folder.iterdir()} >= {
            "README.md",
            "config.json",
            "generation_config.json",
            "ledger.json",
            "ledger.png",
            "model.safetensors",
            "recipe.yaml",
            "tokenizer.json",
        }
        assert (folder / "ledger.png").read_bytes().startswith(b"\x89PNG")
        ledger = json.loads((folder / "ledger.json").read_text())["ledger"]
        size = (folder / "model.safetensors").stat().st_size
        assert ledger["bytes"]["total"] == size
        bits = sum(sum(v for k, v in entry.items() if k != "weights") for entry in ledger["entries"].values())
        assert bits // 8 + sum(ledger["headers"].values()) == size
        assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    assert {path.name for path in (run / "export").iterdir()} == {"native", "dequantized"}
    exports = RunFolder(run, create=False).summary["exports"]
    assert exports["native"]["check"]["weights"] == [14, 14]
    ids = torch.arange(9)[None]
    plain = AutoModelForCausalLM.from_pretrained(run / "export" / "dequantized", dtype=torch.float32)
    packed = lightning_gsq.load(run / "export" / "native", dtype=torch.float32)
    torch.testing.assert_close(plain(ids).logits, packed(ids).logits, rtol=0.1, atol=0.5)  # one rounds to bfloat16


def test_model_card(new_run: MakeRun) -> None:
    run = new_run()
    assert _command("--run", str(run), "--format", "native", "--check", "false") == 0
    card = (run / "export" / "native" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["quantization"]["scheme"] == ["3 bit, groups of 16"] and "3-bit" in matter["tags"]
    for expected in ("210.250", "200.500", "4 sequences of 32 tokens", 'lightning_gsq.load("FOLDER")', "weight files"):
        assert expected in text
    assert "/home/someone" not in text and "Checked" not in text
    size = (run / "export" / "native" / "model.safetensors").stat().st_size
    assert f"**{size:,}**" in text


def test_nothing_is_overwritten_unasked_and_nothing_foreign_at_all(
    new_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run()
    arguments = ["--run", str(run), "--format", "native", "--check", "false"]
    mine = run / "export" / "native" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    for options, message in (([], "exists; use --overwrite"), (["--overwrite"], "was not written by an export")):
        assert _command(*arguments, *options) == 2
        assert message in capsys.readouterr().err
        assert mine.read_text() == "precious"
    mine.unlink()
    assert _command(*arguments, "--overwrite") == 0
    before = (mine.parent / "model.safetensors").stat().st_mtime_ns
    assert _command(*arguments) == 2
    assert _command(*arguments, "--overwrite") == 0
    assert (mine.parent / "model.safetensors").stat().st_mtime_ns > before
    mine.write_text("precious")
    assert _command(*arguments, "--overwrite") == 2
    assert "holds mine.txt, which no export wrote" in capsys.readouterr().err
    assert mine.read_text() == "precious"


def test_a_crash_leaves_nothing_that_looks_whole(new_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run()
    (run / "export" / "native").mkdir(parents=True)

    def stop(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(NativeFormat, "check", stop)
    assert _command("--run", str(run), "--format", "native", "--overwrite") == 130
    assert [path.name for path in (run / "export").iterdir()] == ["native"]
    assert not list((run / "export" / "native").iterdir())


def test_a_model_s_own_folder_is_no_place_for_exports(llama_run: Path, tiny_llama: Path) -> None:
    before = sorted(tiny_llama.rglob("*"))
    with pytest.raises(ConfigurationError, match=r"is a model's own folder \(it holds config.json\).*export"):
        export_command.export(str(llama_run), ["native"], str(tiny_llama))
    assert sorted(tiny_llama.rglob("*")) == before


def test_output_elsewhere_and_small_shards(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    out = tmp_path / "elsewhere"
    assert _command("--run", str(run), "--format", "native", "--output", str(out), "--shard_size_gb", "1e-5") == 0
    assert len(list((out / "native").glob("model-*.safetensors"))) > 1


def test_a_format_that_cannot_be_written_takes_no_other_with_it(
    new_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run()
    (run / "export" / "dequantized").mkdir(parents=True)
    formats = ["--format", "gguf", "native", "dequantized"]
    assert _command("--run", str(run), *formats, "--check", "false") == 1
    captured = capsys.readouterr()
    assert "written: native; formats that cannot be written:" in captured.err
    assert "gguf: the tokenizer has no merges" in captured.err and "dequantized exists; use" in captured.err
    assert "gguf is left out: " in captured.out
    assert (run / "export" / "native" / "model.safetensors").is_file()
    assert {path.name for path in (run / "export").iterdir()} == {"native", "dequantized"}
    assert list(RunFolder(run, create=False).summary["exports"]) == ["native"]


def test_formats_that_exist_are_refused_before_the_model_is_loaded(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run()
    for name in ("native", "gguf"):
        (run / "export" / name).mkdir(parents=True)
    monkeypatch.setattr(export_command, "open_run", None)
    assert _command("--run", str(run), "--format", "native", "gguf") == 2
    error = capsys.readouterr().err
    assert f"native: {run / 'export' / 'native'} exists" in error and f"gguf: {run / 'export' / 'gguf'} exists" in error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (OSError(28, "No space left on device"), "native: output: cannot write"),
        (CheckFailedError("lightning-gsq loads 3 of 14 weights with other values"), "native: lightning-gsq loads 3 of"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_format_that_fails_is_a_line_and_the_others_go_on(
    new_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    message: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(NativeFormat, "check" if isinstance(error, CheckFailedError) else "write", fail)
    run = new_run()
    assert _command("--run", str(run), "--format", "native", "dequantized") == 1
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert {path.name for path in (run / "export").iterdir()} == {"dequantized"}


def test_a_full_disk_is_told_before_anything_is_written(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run()
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=20_100_000))
    assert _command("--run", str(run), "--format", "native", "dequantized", "--check", "false") == 1
    assert "dequantized takes about 0.02 GB, its disk has 0.00 GB free" in capsys.readouterr().err
    assert {path.name for path in (run / "export").iterdir()} == {"native"}


def test_names_are_printed_as_they_are_and_paths_in_one_piece(
    new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ("with 'quotes' and [bold]brackets[/2] " + "long" * 20)
    run = new_run()
    capsys.readouterr()
    assert _command("--run", str(run), "--format", "native", "compressed-tensors", "--output", str(out)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # no bar of another package, no warning
    assert f'  lightning-gsq: lightning_gsq.load("{out / "native"}")\n' in captured.out
    line = next(line for line in captured.out.splitlines() if "vllm serve" in line)
    assert shlex.split(line.partition("vllm serve ")[2]) == [str(out / "compressed-tensors")]
    assert f"native: {out / 'native'}\n" in captured.out


def test_a_format_of_ones_own_by_its_class_path(new_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run()
    assert _command("--run", str(run), "--format", "tests.export.test_registry.Sizes") == 0
    assert "checked with nothing: 14 of 14 quantized weights" in capsys.readouterr().out
    assert len((run / "export" / "sizes" / "sizes.bin").read_bytes()) == 14 * 4


def test_a_recipe_does_not_decide_what_code_runs(new_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    """A model with code of its own: never because the recipe says so, and with the user's option without a prompt."""
    run = new_run()
    original = run.parent / "original"
    with_own_code(original, leaves=run / "it ran")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["settings"]["model"]["trust_remote_code"] = True
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["--run", str(run), "--format", "native", "dequantized"]
    assert _command(*arguments) == 2
    error = capsys.readouterr().err
    assert "That is never run because a recipe says so" in error and "add --trust_remote_code" in error
    assert not (run / "it ran").exists()
    assert _command(*arguments, "--trust_remote_code") == 0
    output = capsys.readouterr().out
    assert "--trust_remote_code: running Python code that comes with the model" in output
    assert (run / "it ran").exists() and output.count("14 of 14 quantized weights bit-identical") == 2
    native = run / "export" / "native"
    with pytest.raises(ConfigurationError, match="trust_remote_code=True"):
        lightning_gsq.load(native)
    assert type(lightning_gsq.load(native, trust_remote_code=True)).__name__ == "OwnLlama"


def test_a_recipe_that_stands_for_gigabytes_is_refused(new_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run()
    (run / "recipe.yaml").write_text(YAML_BOMB)
    assert _command("--run", str(run), "--format", "native") == 2
    assert "stands for more than 200,000 values" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "/no/run", "--format", "native"], "/no/run is not a run folder"),
        (["--run", "RUN", "--format", "nativ"], "there is no format 'nativ' (did you mean native?); choose from"),
        (["--run", "RUN"], "format"),
        (["--run", "RUN", "--format", "native", "--shard_size_gb", "0"], "shard_size_gb must be positive"),
        (["--run", "RUN", "--format", "native", "dequantized", "--push_to_hub", "me/x"], "cannot share the repository"),
        (["--run", "RUN", "--format", "native", "--push_to_hub", "a/b/c"], "push_to_hub"),
        (["--run", "RUN", "--frmat", "native"], "did you mean --format?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(llama_run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert _command(*[str(llama_run) if part == "RUN" else part for part in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (llama_run / "export").exists()


def test_runs_that_cannot_be_exported(new_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run()
    (run / "blocks" / "block-001.safetensors").rename(run / "away")
    assert _command("--run", str(run), "--format", "native") == 2
    assert "has no block-001.safetensors; resume the run" in capsys.readouterr().err
    (run / "away").rename(run / "blocks" / "block-001.safetensors")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["fingerprints"] = {"model": "0" * 16}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert _command("--run", str(run), "--format", "native") == 2
    assert "is no longer the model that the run" in capsys.readouterr().err
    RunFolder(run, create=False).update_progress(model="../../x")
    del recipe["fingerprints"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert _command("--run", str(run), "--format", "native") == 0  # an entry that no run writes counts for nothing
    assert json.loads((run / "export" / "native" / "config.json").read_text())["model_type"] == "llama"
    (run / "recipe.yaml").write_text("settings: [")
    assert _command("--run", str(run), "--format", "native", "--overwrite") == 2
    assert "cannot be read" in capsys.readouterr().err
