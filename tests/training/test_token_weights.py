"""How much a token counts in a block's loss."""

import json
from pathlib import Path

import pytest
import torch

from lightning_gsq.cli import main
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.run.hidden_states import ActivationDataset
from lightning_gsq.training import ModelQuantization
from lightning_gsq.training.token_weights import inherited_weights, typical_energy
from tests.support.runs import block_files, write_config


def test_energy_of_a_typical_token_ignores_massive_ones() -> None:
    hidden_NTD = torch.full((2, 5, 4), 3.0)
    hidden_NTD[:, 0] = 1e4
    assert typical_energy(hidden_NTD) == 9.0


def test_a_token_counts_half_at_the_tolerated_error() -> None:
    full_NTD = torch.zeros(1, 3, 4)
    quantized_NTD = torch.zeros(1, 3, 4)
    quantized_NTD[0, 1], quantized_NTD[0, 2] = 2.0, 6.0
    weights_NT = inherited_weights(quantized_NTD, full_NTD, tolerated=4.0)
    torch.testing.assert_close(weights_NT, torch.tensor([[1.0, 0.5, 0.1]]))


def test_dataset_yields_weights_where_given() -> None:
    x_NTD, w_NT = torch.randn(4, 3, 2), torch.rand(4, 3)
    ((inputs, targets, weights),) = ActivationDataset(x_NTD, -x_NTD, w_NT).__getitems__([2, 0])
    torch.testing.assert_close(inputs, -targets)
    torch.testing.assert_close(weights, w_NT[[2, 0]])


@pytest.mark.parametrize(("value", "target"), [(0.0, "stream"), (-1.0, "stream"), (1.0, "local")])
def test_bad_settings_are_refused(value: float, target: str) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.inherited_error"):
        ModelQuantization("x", inherited_error=value, target=target)  # type: ignore[arg-type]


def test_only_blocks_after_the_first_weigh_tokens(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    for name, value in (("alike", None), ("weighted", 0.01)):
        config = write_config(
            tiny_llama, corpus, tmp_path / name, model__inherited_error=value, model__phases=["blocks"]
        )
        assert main(["fit", "--config", str(config)]) == 0
    alike, weighted = block_files(tmp_path / "alike"), block_files(tmp_path / "weighted")
    assert alike["block-000.safetensors"] == weighted["block-000.safetensors"]
    assert alike["block-001.safetensors"] != weighted["block-001.safetensors"]
    measures = json.loads((tmp_path / "weighted" / "run" / "summary.json").read_text())["blocks"]["1"]
    assert 0 < measures["final"] <= measures["start"]
