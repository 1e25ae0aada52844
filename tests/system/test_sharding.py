"""The end-to-end phase spread over two processes (gloo, CPU): the same result as with copies, half of the memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lightning_gsq.cli import main
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.system.sharding import _dimension, asked_for, private_copy
from tests.support.processes import clean_environment, start_process
from tests.support.runs import summary_of, write_config
from tests.support.sharded import CASES
from tests.support.tiny import FAMILIES

FSDP2 = ["--trainer.strategy", "fsdp2", "--trainer.devices", "2"]


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(file, framework="pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - no mapping
        return tensors, json.loads(content.metadata()["figures"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both strategies left their results."""
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "tests.support.sharded", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=clean_environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("case", list(CASES))
def test_spread_over_processes_it_ends_as_copies_do(case: str, folder: Path) -> None:
    (copies, expected), (spread, found), (other, _) = (
        _read(folder / f"{case}-{name}.safetensors") for name in ("ddp-0", "fsdp2-0", "fsdp2-1")
    )
    assert found["start"] == pytest.approx(expected["start"], rel=1e-5)
    assert found["best"] == pytest.approx(expected["best"], rel=1e-4) and found["best"] < found["start"]
    assert found["steps"] == expected["steps"] == 3
    assert copies.keys() == spread.keys() == other.keys()
    for name, value in copies.items():
        torch.testing.assert_close(spread[name], value, rtol=2e-3, atol=1e-5, msg=name)
        assert torch.equal(spread[name], other[name])
    assert found["intact"], "the model is what it was before the phase"
    assert expected["share"] == 1 and found["share"] == pytest.approx(0.5, abs=0.02)


def test_a_whole_run_on_the_command_line(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    config = write_config(tiny_llama, corpus, tmp_path, trainer__max_steps=2)
    command = ["fit", "--config", str(config), "--model.phases", "[init, blocks, end_to_end]", *FSDP2]
    run = start_process(*command)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    summary = summary_of(tmp_path)
    assert summary["end_to_end"]["final"] < summary["end_to_end"]["start"]
    assert set(summary["perplexity"]) == {"full_precision", "warm_start", "blocks", "end_to_end"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").dtype == torch.bfloat16
    # The finished run goes on alone, and with another strategy: nothing is left to do.
    assert main(["fit", "--config", str(config), "--model.phases", "[init, blocks, end_to_end]"]) == 0
    assert summary_of(tmp_path)["perplexity"] == summary["perplexity"]


def test_on_one_device_it_is_a_run_like_any_other(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    config = write_config(tiny_llama, corpus, tmp_path, data__num_sequences=8)
    one = ["--trainer.strategy", "fsdp2", "--trainer.devices", "1", "--end_to_end.max_steps", "2"]
    assert main(["fit", "--config", str(config), "--model.phases", "[init, end_to_end]", *one]) == 0
    assert "end_to_end" in summary_of(tmp_path)


@pytest.mark.parametrize(
    "strategy",
    [
        "fsdp",
        "deepspeed_stage_3",
        Namespace(class_path="lightning.pytorch.strategies.ModelParallelStrategy"),
    ],
)
def test_other_ways_to_spread_a_model_are_refused(strategy: Any) -> None:
    with pytest.raises(ConfigurationError, match="fsdp2 spreads the model"):
        asked_for(strategy)


@pytest.mark.parametrize("strategy", ["auto", "ddp", Namespace(class_path="lightning.pytorch.strategies.DDPStrategy")])
def test_copies_are_no_matter_of_it(strategy: Any) -> None:
    assert asked_for("FSDP2") and not asked_for(strategy)


def test_a_private_copy_shares_values_and_nothing_else() -> None:
    network = FAMILIES["gemma2"]()
    copy = private_copy(network)
    own, others = dict(network.named_parameters()), dict(copy.named_parameters())
    assert own.keys() == others.keys()
    assert all(own[name] is not others[name] for name in own)
    assert all(own[name].data_ptr() == others[name].data_ptr() for name in own)
    assert copy.get_output_embeddings().weight is copy.get_input_embeddings().weight, "a tied head stays tied"
    copy.get_input_embeddings().register_forward_hook(lambda *_: None)
    find_blocks(copy)[1][0].__dict__["forward"] = None
    assert not network.get_input_embeddings()._forward_hooks and "forward" not in find_blocks(network)[1][0].__dict__


def test_logits_are_split_along_rows() -> None:
    shapes = {(49152, 576): 0, (4, 576, 8): 0, (1, 576, 8): 1, (3, 576, 8): 1, (3, 5): 0, (3,): 0}
    assert {shape: _dimension(torch.empty(shape, device="meta"), 2).dim for shape in shapes} == shapes
