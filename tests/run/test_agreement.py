"""How far a model's next tokens are from another's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import LlamaConfig

from lightning_gsq.cli import main
from lightning_gsq.cli.defaults import QUIET_TRAINER
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.run.agreement import compare
from tests.support.tiny import COMMON, FAMILIES, random_model


def _trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, **QUIET_TRAINER)


def test_a_model_agrees_with_itself() -> None:
    network, ids = FAMILIES["llama"](), torch.randint(0, 250, (3, 300))
    found = compare(network, network, ids, _trainer())
    assert found.divergence == 0 and found.same_choice == 1 and found.tokens == 3 * 299


def test_the_sums_are_those_of_the_definition() -> None:
    network, other = FAMILIES["llama"](), FAMILIES["mistral"]()
    ids = torch.randint(0, 250, (2, 40))
    found = compare(network, other, ids, _trainer())
    own, wanted = (model(ids).logits[:, :-1].double() for model in (network, other))
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=wanted), torch.distributions.Categorical(logits=own)
    )
    assert found.divergence == pytest.approx(float(divergence.mean()), rel=1e-4)
    assert found.divergence_error == pytest.approx(float(divergence.mean(1).std() / 2**0.5), rel=1e-3)
    assert found.same_choice == float((own.argmax(-1) == wanted.argmax(-1)).double().mean())
    loss = torch.nn.functional.cross_entropy(wanted.flatten(0, 1), ids[:, 1:].flatten())
    assert found.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-4)


def test_another_vocabulary() -> None:
    other = random_model(LlamaConfig(**{**COMMON, "vocab_size": 300}))
    with pytest.raises(ConfigurationError, match="against: its vocabulary has 300 tokens, that of the model 258"):
        compare(FAMILIES["llama"](), other, torch.zeros(1, 8, dtype=torch.long), _trainer())


def test_validate_against(tiny_llama: Path, corpus: Path, capsys: Any) -> None:
    text = ["--evaluation", str(corpus), "--evaluation.sequence_length", "32", "--evaluation.num_windows", "2"]
    machine = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    assert main(["validate", str(tiny_llama), "--against", str(tiny_llama), *text, *machine]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "mean KL divergence 0.0000 ± 0.0000 nats a token, the same first choice for 100.00% of 62 tokens" in printed
    blockwise = ["--against", str(tiny_llama), "--evaluation.by_block", "true"]
    for more, message in (
        (["--against", "/no/such"], "error: against: there is no file or folder /no/such"),
        (
            blockwise,
            "against: two models are compared as a whole",
        ),
    ):
        assert main(["validate", str(tiny_llama), *more, *text, *machine]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
