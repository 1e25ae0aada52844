"""A short run on the real embedded model: the shipped configuration, a block, few steps. It has to beat GPTQ."""

import json
from pathlib import Path

import pytest

from lightning_gsq.cli import main

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_block_of_smollm2_beats_gptq(tmp_path: Path) -> None:
    arguments = {
        "--trainer.default_root_dir": str(tmp_path),
        "--trainer.accelerator": "cpu",
        "--model.blocks": "0:1",
        "--model.scheme.bits": "2",
        "--model.hessian_sequences": "16",
        "--model.warm_start": "lightning_gsq.quantizers.GPTQ",
        "--model.phases": "[init, blocks]",
        "--model.gumbel.backend": "eager",
        "--model.compile_blocks": "false",
        "--data.sequence_length": "256",
        "--data.num_sequences": "48",
        "--data.batch_size": "2",
        "--data.num_validation_sequences": "4",
        "--evaluation.sequence_length": "256",
        "--evaluation.num_windows": "2",
    }
    given = [part for pair in arguments.items() for part in pair]
    assert main(["fit", "--config", str(ROOT / "cli.yaml"), *given]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    (block,) = summary["blocks"].values()
    assert block["final"] < 0.9 * block["start"]
    perplexity = summary["perplexity"]
    assert perplexity["full_precision"] < perplexity["blocks"] < perplexity["warm_start"]
    assert summary["bits_per_weight"]["total"] == pytest.approx(2.25)
