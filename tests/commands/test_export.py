"""The command as a user meets it: what it writes, what it refuses, what a crash leaves."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import lightning_gsq
from lightning_gsq.cli import main
from lightning_gsq.export.formats.native import NativeFormat
from lightning_gsq.run.folder import RunFolder
from tests.support.finished import MakeRun


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


def test_nothing_is_overwritten_unasked(new_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run()
    mine = run / "export" / "native" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    arguments = ["--run", str(run), "--format", "native", "--check", "false"]
    assert _command(*arguments) == 2
    assert "exists; use --overwrite" in capsys.readouterr().err
    assert mine.read_text() == "precious"
    assert _command(*arguments, "--overwrite") == 0
    assert not mine.exists() and (mine.parent / "model.safetensors").is_file()


def test_a_crash_leaves_nothing_that_looks_whole(new_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run()
    (run / "export" / "native").mkdir(parents=True)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(NativeFormat, "check", stop)
    assert _command("--run", str(run), "--format", "native", "--overwrite") == 130
    assert [path.name for path in (run / "export").iterdir()] == ["native"]
    assert not list((run / "export" / "native").iterdir())


def test_output_elsewhere_and_small_shards(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    out = tmp_path / "elsewhere"
    assert _command("--run", str(run), "--format", "native", "--output", str(out), "--shard_size_gb", "1e-5") == 0
    assert len(list((out / "native").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "/no/run", "--format", "native"], "/no/run is not a run folder"),
        (["--run", "RUN", "--format", "nativ"], "there is no format 'nativ' (did you mean native?); choose from"),
        (["--run", "RUN"], "format"),
        (["--run", "RUN", "--format", "native", "--shard_size_gb", "0"], "shard_size_gb must be positive"),
        (["--run", "RUN", "--format", "native", "dequantized", "--push_to_hub", "me/x"], "cannot share the repository"),
        (["--run", "RUN", "--format", "native", "--push_to_hub", "a/b/c"], "push_to_hub"),
        (["--run", "RUN", "--frmat", "native"], "did you mean 'format'?"),
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
    (run / "recipe.yaml").write_text("settings: [")
    assert _command("--run", str(run), "--format", "native") == 2
    assert "cannot be read" in capsys.readouterr().err
