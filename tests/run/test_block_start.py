"""Warm starts that follow the full-precision model, through whole blocks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning_gsq.data import CalibrationDataModule
from torch import Tensor

from lightning_gsq.cli import main
from lightning_gsq.quantizers import LeastSquares
from lightning_gsq.quantizers.warm_start import quantized, start_of
from lightning_gsq.run.block_start import start_block
from lightning_gsq.run.following import Entering
from lightning_gsq.run.forward_passes import embedded, hidden_store, propagate, working_copy
from lightning_gsq.run.hidden_states import ActivationOptions, Stream
from lightning_gsq.run.run import Run
from lightning_gsq.run.substitution import install
from tests.run.test_forward_passes import made_run
from tests.support.runs import block_files, summary_of, write_config

SEQUENCES, TOKENS = 24, 24


@contextmanager
def _streams(family: str, folder: Path, start: LeastSquares) -> Iterator[tuple[Run, Stream, Stream]]:
    """A run, and its full-precision and quantized streams at the first block."""
    run = made_run(family, folder)
    run.model.start = run.model.start.__class__(start, SEQUENCES, run.model.start.saliency)
    ids_NT = torch.randint(0, 250, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(3))
    assert isinstance(run.data, CalibrationDataModule)
    run.data.train_ids_NT = ids_NT
    with hidden_store((SEQUENCES, TOKENS, run.width), run.activations, streams=2) as store:
        yield run, embedded(run.model.network, ids_NT, store), embedded(run.model.network, ids_NT, store)


def _errors(family: str, folder: Path, follow: bool, activations: ActivationOptions | None = None) -> Tensor:
    """Mean squared distance of the two streams after each block, over the energy of the first."""
    errors, start = [], LeastSquares(follow=follow)
    with _streams(family, folder, start) as (run, full, own):
        run = replace(run, activations=activations or run.activations)
        for plan in run.plan:
            block = working_copy(run, plan.index)
            before = {name: parameter.clone() for name, parameter in block.named_parameters()}
            tensors, _ = start_block(
                run,
                plan,
                block,
                Entering(own, full if run.model.follows else None),
                lambda _, matrix, __: quantized(start_of(matrix, start), matrix.scheme, torch.float32),
                lambda tensor: tensor,
                says=False,
            )
            assert list(tensors) == [site.name for site in plan.weights]
            assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters())
            propagate(run, block, plan.index, full, full)
            install(block, plan, tensors)
            propagate(run, block, plan.index, own, own)
            off_NTD = own.hidden_NTD - full.hidden_NTD
            errors.append(off_NTD.square().mean() / full.hidden_NTD.square().mean())
    return torch.stack(errors)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe", "phi3"])
def test_errors_that_came_in_are_made_up_for(family: str, tmp_path: Path) -> None:
    followed, apart = (_errors(family, tmp_path / str(follow), follow) for follow in (True, False))
    assert followed[-1] < 0.9 * apart[-1], (followed, apart)


def test_what_is_not_kept_is_computed_again(tmp_path: Path) -> None:
    """Without room for what the full-precision blocks show, the result is the same to the bit."""
    limited = ActivationOptions(memory_limit_gb=0.0)
    kept, again = (_errors("llama", tmp_path / name, True, *o) for name, o in (("kept", ()), ("again", (limited,))))
    assert torch.equal(kept, again)


def test_a_whole_run(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    """Every phase; and stopped after the first block it goes on to the same bits."""
    changes = {"model__warm_start": {"class_path": "lightning_gsq.quantizers.LeastSquares"}}
    config = write_config(tiny_llama, corpus, tmp_path, **changes)
    assert main(["fit", "--config", str(config)]) == 0
    files = {kind: block_files(tmp_path, kind) for kind in ("warm_start", "block")}
    for kind in files:
        (tmp_path / "run" / "blocks" / f"{kind}-001.safetensors").unlink()
    assert main(["fit", "--config", str(config)]) == 0
    assert {kind: block_files(tmp_path, kind) for kind in files} == files
    local = write_config(tiny_llama, corpus, tmp_path / "local", **changes, model__target="local")
    assert main(["fit", "--config", str(local)]) == 0
    assert block_files(tmp_path / "local", "warm_start") != files["warm_start"]
    followed, apart = summary_of(tmp_path), summary_of(tmp_path / "local")
    assert followed["perplexity"]["warm_start"] < apart["perplexity"]["warm_start"]
