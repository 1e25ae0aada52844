"""Warm starts on several processes (gloo, CPU), which have unequal shares: the codes of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from lightning_gsq.cli import main
from tests.support.expert_parallel import MODELS, run_jobs
from tests.support.runs import summary_of, write_config
from tests.support.tiny import FAMILIES, byte_tokenizer

FOLLOWS = ["--model.warm_start", "LeastSquares"]
STARTS = {
    "follows": ("gemma3", FOLLOWS),
    "by_end_loss": ("llama", [*FOLLOWS, "--model.end_loss_weights", "true"]),
    "spread": ("qwen3_moe", [*FOLLOWS, "--model.expert_parallel", "true"]),
    "stands_alone": ("llama", ["--model.warm_start", "GPTQ"]),
}
SEQUENCES = 7


@pytest.fixture(scope="module")
def folders(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Runs of one and of three processes."""
    root = tmp_path_factory.mktemp("starts")
    folders, jobs = {}, {}
    for name, (family, arguments) in STARTS.items():
        model = root / name / "model"
        (MODELS | FAMILIES)[family]().save_pretrained(model)
        byte_tokenizer().save_pretrained(model)
        for processes in (1, 3):
            folder = folders[name, processes] = root / name / str(processes)
            config = write_config(model, corpus, folder, model__phases=["init"], model__hessian_sequences=SEQUENCES)
            jobs[f"{name}-{processes}"] = {
                "processes": processes,
                "arguments": ["fit", "--config", str(config), *arguments],
            }
    run_jobs(root, jobs)
    return folders


@pytest.mark.parametrize("name", STARTS)
def test_it_starts_as_on_one_process(name: str, folders: dict[tuple[str, int], Path]) -> None:
    one, three = (load_file(folders[name, count] / "run" / "model" / "model.safetensors") for count in (1, 3))
    assert one.keys() == three.keys()
    for weight, tensor in one.items():
        off = (three[weight] - tensor).abs() > 0.02 * tensor.abs().max()
        assert float(off.float().mean()) < 0.01, f"{weight}: sums in another order move few codes"
    perplexities = [summary_of(folders[name, count])["perplexity"]["warm_start"] for count in (1, 3)]
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-3)


@pytest.mark.parametrize("arguments", [FOLLOWS, ["--model.warm_start", "GPTQ", "--model.end_loss_weights", "true"]])
def test_fewer_sequences_than_processes_are_refused_before_anything(
    arguments: list[str], tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tiny_llama, corpus, tmp_path, model__hessian_sequences=3, data__num_sequences=8)
    many = ["--trainer.strategy", "ddp", "--trainer.devices", "4"]
    assert main(["fit", "--config", str(config), *arguments, *many]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "model.hessian_sequences: 3 sequences cannot be shared by 4 processes; give at least 4" in said
    assert not list((tmp_path / "run").glob("recipe*"))
