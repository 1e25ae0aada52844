"""A finished run as exports see it: its values, whatever a check did with the model before."""

from pathlib import Path

import pytest
import torch

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import ExportOptions, open_run
from lightning_gsq.export.formats import GGUFFormat
from lightning_gsq.run.folder import RunFolder
from tests.support.exported import quantize, save_model
from tests.support.finished import MakeRun


def test_a_check_leaves_the_values_that_the_next_format_writes(tmp_path: Path) -> None:
    """The check of a GGUF file puts the file's rounded embedding into a model: not into the run's."""
    run = quantize(save_model(tmp_path / "model"), tmp_path / "run", 4, 32)
    before = {name: run.parameter(name).clone() for name in run.other_names()}
    GGUFFormat().write(run, tmp_path, ExportOptions(gguf_embedding="Q8_0"))
    GGUFFormat().check(run, tmp_path)
    assert {p.dtype for p in run.network.parameters()} == {torch.float32}
    for name, value in before.items():
        assert torch.equal(run.parameter(name), value), name


def _as_end_to_end(root: Path, dense: dict[str, torch.Tensor]) -> None:
    folder, plans = RunFolder(root, create=False), open_run(root).plans
    for index, plan in plans.items():
        folder.write_block("end_to_end", index, folder.read_block("block", index, plan.expected))
        folder.block_file("block", index).unlink()
    folder.write_dense("end_to_end", dense, {})
    folder.update_progress(model="end_to_end")


def test_parameters_that_were_trained_take_the_place_of_the_originals(new_run: MakeRun) -> None:
    root = new_run()
    norm, head = torch.full((32,), 1.5), torch.randn(258, 32)
    _as_end_to_end(root, {"model.norm.weight": norm, "lm_head.weight": head})
    run = open_run(root)
    assert torch.equal(run.parameter("model.norm.weight"), norm.bfloat16())
    assert torch.equal(run.parameter("lm_head.weight"), head.bfloat16())
    assert not run.config.tie_word_embeddings
    reference = run.reference()
    assert torch.equal(reference.get_parameter("lm_head.weight"), head.bfloat16().float())
    assert not torch.equal(run.network.get_parameter("lm_head.weight"), head)  # the original stays as it is


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("model.norm.weight", (31,), r"in the shape \(31,\), the model has \(32,\)"), ("x", (2,), "no such parameter")],
)
def test_trained_parameters_of_another_model_are_refused(
    new_run: MakeRun, name: str, shape: tuple[int, ...], message: str
) -> None:
    root = new_run()
    _as_end_to_end(root, {name: torch.ones(shape)})
    with pytest.raises(ConfigurationError, match=message):
        open_run(root)
