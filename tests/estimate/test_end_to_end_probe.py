"""``plan`` counts the end-to-end phase, which the time it said left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning_gsq.data import CalibrationDataModule

from lightning_gsq.cli import main
from lightning_gsq.estimate.end_to_end_probe import EndToEndTiming
from lightning_gsq.training import EndToEndOptions
from tests.support.runs import write_config


@pytest.mark.parametrize(
    ("settings", "world", "several", "steps", "batches", "held_out", "of_teacher"),
    [
        ({}, 1, 2, 4, 8, 5 * 2, 2),  # 16 sequences in batches of two; before, and four times in the pass
        ({}, 2, 1, 4, 4, 5 * 1, 1),
        ({"strategy": "fsdp2"}, 2, 1, 4, 4, 5 * 1, 5),
        ({"max_epochs": 2}, 1, 2, 8, 16, 9 * 2, 2),
        ({"max_steps": 1}, 1, 2, 1, 2, 2 * 2, 2),
        ({"max_steps": 100}, 1, 1, 8, 8, 5 * 2, 2),
    ],
)
def test_batches_and_evaluations(
    settings: dict[str, Any], world: int, several: int, steps: int, batches: int, held_out: int, of_teacher: int
) -> None:
    data = CalibrationDataModule(num_sequences=16, num_validation_sequences=4)
    timing = EndToEndTiming(forward=1.0, trained=10.0, measured=100.0, head=1000.0)
    options = EndToEndOptions(batch_size=2, **settings)
    work = timing.work(options, data, 3, world, several)
    assert work.steps == steps and work.a_step == several * (3 * 11 + 1000)
    assert work.seconds == batches * (3 * 11 + 1000) + held_out * (3 + 100) + of_teacher * 3
    again = timing.work(EndToEndOptions(batch_size=2, recompute=True, **settings), data, 3, world, several)
    assert again.seconds - work.seconds == batches * 3


def test_the_time_has_it(tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And of a run that trains no block no step is tried, and nothing is said of its steps."""
    for phases, words, others in (
        (["init", "end_to_end"], "end to end │", "a block,"),
        (["init", "blocks"], "a block,", "end to end │"),
    ):
        settings = {"model__phases": phases, "end_to_end__max_steps": 3}
        config = write_config(tiny_llama, corpus, tmp_path, **settings)
        assert main(["plan", "--config", str(config)]) == 0
        memory, _, work = capsys.readouterr().out.partition("Work")
        said = " ".join(work.split())
        assert words in said and others not in said
        assert ("ms a step" in said) == ("blocks" in phases)
        assert ("what the teacher says of held-out text" in memory) == ("end_to_end" in phases)
        assert ("3 steps of about" in said) == ("end_to_end" in phases)
