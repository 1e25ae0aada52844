"""Zero-shot tasks: from a file, by name, of every kind of model, kept where the model belongs."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gsq import Quantized, quantize
from lightning_gsq.cli import main
from lightning_gsq.commands.harness import automatic_batch
from lightning_gsq.export import folders
from lightning_gsq.system.owned_folders import read_mark
from tests.support.tiny import FAMILIES

pytest.importorskip("lm_eval")

TASK = """\
task: squares
dataset_path: json
dataset_kwargs: {data_files: {test: squares.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "The square of {{n}} is"
doc_to_choice: ["{{right}}", "{{wrong}}"]
doc_to_target: "{{key}}"
metric_list: [{metric: acc}]
"""

OPTIONS: dict[str, Any] = {
    "trainer.accelerator": "cpu",
    "model.compile_blocks": False,
    "model.phases": ["init"],
    "data.sequence_length": 32,
    "data.num_sequences": 8,
    "data.num_validation_sequences": 2,
    "evaluation.sequence_length": 32,
    "evaluation.num_windows": 2,
}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tables that datasets makes of the files go to a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task file with its data beside it."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "squares.yaml").write_text(TASK)
    questions = [{"n": n, "right": f" {n * n}", "wrong": f" {n * n + 1}", "key": n % 2} for n in range(2, 14)]
    (folder / "squares.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in questions))
    return folder / "squares.yaml"


@pytest.fixture(scope="module")
def run(tiny_llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an export."""
    folder = tmp_path_factory.mktemp("zero-shot") / "run"
    quantize(tiny_llama, "w4g32", corpus, corpus, folder, OPTIONS, quiet=True).save("native", check=False)
    return folder


def test_a_run_beside_its_original(run: Path, task: Path, tiny_llama: Path, capsys: Any) -> None:
    assert main(["test", str(run), "--tasks", str(task), "--against", str(tiny_llama), "--device", "cpu"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "squares" in printed and "±" in printed and "lm-eval 0" in printed
    kept = Quantized(run).summary["zero_shot"]
    value, error = kept["tasks"]["squares"]["metrics"]["acc"]
    assert 0 <= value <= 1 and 0 < error < 0.2
    assert kept["tasks"]["squares"]["documents"] == 12
    assert kept["against"]["model"] == str(tiny_llama)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert events.Scalars("zero_shot/squares/acc")[0].value == pytest.approx(value)


def test_an_export_keeps_its_own_in_its_card(run: Path, task: Path, capsys: Any) -> None:
    folder = run / "export" / "native"
    for limit in (3, 4):  # the second time in place of the first
        assert main(["test", str(folder), f"--tasks={task}", "--limit", str(limit), "--device", "cpu"]) == 0
    card = (folder / "README.md").read_text()
    assert card.count("## Zero-shot") == 1
    assert "the first 4 questions of each task" in card
    assert card.index("## Zero-shot") < card.index("## How it was made")
    assert folders.foreign(folder) is None
    mark = read_mark(folder, folders.MARK)
    assert mark is not None
    assert folders.out_of_date(folder, "native", mark["made_from"], checked=False) is None, (
        "the mark names the new card"
    )
    entry = Quantized(run).summary["exports"]["native"]["zero_shot"]
    assert entry["limit"] == 4 and entry["tasks"]["squares"]["documents"] == 4
    assert "README.md" in capsys.readouterr().out


def test_the_card_of_a_later_export_has_what_the_run_scored(run: Path, task: Path) -> None:
    assert main(["test", str(run), "--tasks", str(task), "--device", "cpu"]) == 0
    folder = Quantized(run).save("dequantized", check=False)
    assert "| squares | acc | 12 |" in (folder / "README.md").read_text()


def test_a_plain_folder_keeps_nothing(
    tiny_llama: Path, task: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tiny_llama.iterdir())
    monkeypatch.chdir(tmp_path)  # which is in no repository of git
    assert main(["test", str(tiny_llama), "--tasks", str(task), "--num_fewshot", "1", "--limit", "2"]) == 0
    assert sorted(tiny_llama.iterdir()) == before
    printed = capfd.readouterr()
    assert "kept in" not in printed.out and "fatal" not in printed.err


def test_what_was_measured_of_other_weights_is_dropped(
    run: Path, task: Path, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert main(["test", str(copy), "--tasks", str(task), "--device", "cpu"]) == 0
    again = quantize(tiny_llama, "w4g32", corpus, corpus, copy, OPTIONS, quiet=True)
    assert again.summary["zero_shot"]["tasks"], "a start that has nothing to do keeps it"
    summary = json.loads((copy / "summary.json").read_text())
    summary["zero_shot"]["made_from"] = "something else"
    (copy / "summary.json").write_text(json.dumps(summary))
    assert "zero_shot" not in quantize(tiny_llama, "w4g32", corpus, corpus, copy, OPTIONS, quiet=True).summary


def test_data_of_a_named_task_from_a_folder(tiny_llama: Path, tmp_path: Path, capsys: Any) -> None:
    """arc_easy by its name, its questions from a file."""
    choices = [{"text": [str(n), str(n + 1)], "label": ["A", "B"]} for n in range(6)]
    rows = [{"question": f"How much is {n} + 1?", "choices": own, "answerKey": "B"} for n, own in enumerate(choices)]
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert main(["test", str(tiny_llama), "--tasks", "arc_easy", "--task_data", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "arc_easy" in printed and "acc_norm" in printed
    code, said = _refused(["test", str(tiny_llama), "--tasks", "arc_easy,arc_eazy"], capsys)
    assert code == 2 and "lm-eval has no task 'arc_eazy'; did you mean arc_easy?" in said
    code, said = _refused(["test", str(tiny_llama), "--tasks", "arc_easy"], capsys)
    assert code == 2 and "the data set of arc_easy, allenai/ai2_arc, cannot be reached" in said
    assert "DATA/arc_easy/test.jsonl" in said and "--task_data DATA" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "no/such.yaml"], "tasks: there is no file no/such.yaml"),
        (["--tasks", "{folder}/function.yaml"], "names Python functions (!function)"),
        (["--tasks", "{folder}/empty.yaml"], "is no task of lm-eval"),
        (["--tasks", "{folder}/lost.yaml"], "names the data file lost.jsonl, and there is no"),
        (["--tasks", "{task}", "--limit", "0"], "limit must be at least 1, got 0"),
        (["--tasks", "{task}", "--against", "/no/such"], "there is no file or folder /no/such"),
        ([], "--tasks has to be given"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, tiny_llama: Path, task: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "function.yaml").write_text(TASK + "process_docs: !function utils.f\n")
    (tmp_path / "lost.yaml").write_text(TASK.replace("squares.jsonl", "lost.jsonl"))
    (tmp_path / "empty.yaml").write_text("a: 1\n")
    given = [argument.format(folder=tmp_path, task=task) for argument in arguments]
    code, said = _refused(["test", str(tiny_llama), *given], capsys)
    assert code == 2
    assert message in said


def test_without_lm_eval(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "lightning_gsq.commands.harness.find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    code, said = _refused(["test", str(tiny_llama), "--tasks", "arc_easy"], capsys)
    assert code == 2 and 'pip install "lightning-gsq[eval]"' in said


def test_the_batch_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    network = FAMILIES["llama"]()
    assert automatic_batch(network) == 16
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 4 * 2 * 4 * 258 * 128 * 3}))
    assert automatic_batch(network) == 3
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 0}))
    assert automatic_batch(network) == 1


def _refused(arguments: list[str], capsys: Any) -> tuple[int, str]:
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    output = capsys.readouterr()
    return code, " ".join((output.out + output.err).split())
