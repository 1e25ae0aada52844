"""Settings that would do nothing, or something else than they say, are refused by name."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_gsq.cli.defaults import QUIET_TRAINER
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers import GumbelOptions
from lightning_gsq.run.block_plan import make_plan
from lightning_gsq.run.checks import check_scales, check_trainer
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.run.trial import try_settings
from lightning_gsq.training import EndToEndOptions, ModelQuantization
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.tiny import FAMILIES

WHOLE: dict[str, Any] = {"default_root_dir": "run", "limit_val_batches": None, "fast_dev_run": False}
TRAINER: Any = SimpleNamespace(precision="32-true", max_epochs=1, max_steps=-1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accumulate_grad_batches", 0),
        ("accumulate_grad_batches", -1),
        ("gradient_clip_val", -1.0),
        ("log_every_n_steps", -1),
        ("max_epochs", 0),
        ("max_epochs", -7),
        ("max_steps", 0),
        ("max_steps", -5),
        ("limit_train_batches", 0),
        ("limit_train_batches", -0.5),
        ("limit_val_batches", 1),
        ("limit_val_batches", 0),
        ("limit_val_batches", 0.5),
        ("fast_dev_run", True),
        ("fast_dev_run", 2),
        ("overfit_batches", 1),
        ("barebones", True),
        ("num_nodes", 0),
        ("default_root_dir", ""),
        ("default_root_dir", " "),
    ],
)
def test_the_option_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"trainer.{name}"):
        check_trainer({**WHOLE, name: value}, TRAINER, ["init", "blocks"])


def test_what_means_something_passes() -> None:
    settings = {**WHOLE, "limit_val_batches": 1.0, "limit_train_batches": 0.5, "max_steps": 3, "gradient_clip_val": 1.0}
    check_trainer(settings, TRAINER, ["init", "blocks"])
    check_trainer({**WHOLE, "max_steps": 0}, TRAINER, ["init"])


@pytest.mark.parametrize(
    ("phases", "way_out"),
    [
        (["blocks", "init"], r"\[init, blocks\]"),
        (["blocks", "blocks"], r"\[blocks\]"),
        (["end_to_end", "blocks"], r"\[blocks, end_to_end\]"),
        ([], "is empty"),
    ],
)
def test_phases_in_their_order_and_once(phases: list[Any], way_out: str) -> None:
    with pytest.raises(ConfigurationError, match=f"model.phases.*{way_out}"):
        ModelQuantization("x", phases=phases)


@pytest.mark.parametrize(("name", "value"), [("max_steps", 0), ("max_steps", -2), ("accumulate_grad_batches", 0)])
def test_an_end_to_end_phase_of_nothing(name: str, value: int) -> None:
    with pytest.raises(ConfigurationError, match=f"end_to_end.{name}"):
        EndToEndOptions(**{name: value})


def test_negative_memory() -> None:
    with pytest.raises(ConfigurationError, match=r"activations.memory_limit_gb"):
        ActivationOptions(memory_limit_gb=-1)


def _make_trainer(**settings: Any) -> Trainer:
    return Trainer(accelerator="cpu", precision="32-true", inference_mode=False, **{**QUIET_TRAINER, **settings})


def _adam(**settings: Any) -> Any:
    return lambda groups: torch.optim.Adam(groups, **settings)


@pytest.mark.parametrize(
    "optimizer",
    [
        _adam(lr=-1.0),
        lambda groups: torch.optim.LBFGS(groups),
        lambda groups: torch.optim.SparseAdam(groups),
        _adam(lr=float("nan")),
        _adam(lr=1e-3, betas=(0.9, 1.5)),
    ],
)
def test_an_optimizer_that_cannot_step_is_refused_before_the_work(optimizer: Any) -> None:
    model = ModelQuantization("x", optimizer=optimizer, phases=["blocks"])
    with pytest.raises(ConfigurationError, match=r"^model.optimizer and trainer"):
        try_settings(model, EndToEndOptions(), _make_trainer)
    model = ModelQuantization("x", phases=["end_to_end"])
    with pytest.raises(ConfigurationError, match=r"^end_to_end.optimizer and trainer"):
        try_settings(model, EndToEndOptions(optimizer=optimizer), _make_trainer)


def test_one_that_can_passes() -> None:
    model = ModelQuantization("x", optimizer=_adam(lr=1e-3, fused=True))
    try_settings(model, EndToEndOptions(train=["scales", "norms", "head", "codes"]), _make_trainer)
    model = ModelQuantization("x", gumbel=GumbelOptions(logits_dtype="bfloat16"))
    with pytest.raises(ConfigurationError, match="rounds stochastically"):
        try_settings(model, EndToEndOptions(), _make_trainer)


@pytest.mark.parametrize(("factor", "word"), [(1e-12, "small"), (1e8, "large")])
def test_scales_that_float16_does_not_reach(factor: float, word: str) -> None:
    model = ModelQuantization("x", scheme=QuantScheme(3, 16))
    model.network = FAMILIES["llama"]()
    plan = make_plan(model)
    check_scales(model, plan)
    weight = model.network.get_parameter("model.layers.1.mlp.down_proj.weight")
    weight.data[3, :16] *= factor
    with pytest.raises(ConfigurationError, match=rf"as {word} as those of model.layers.1.mlp.down_proj.weight"):
        check_scales(model, plan)
    weight.data[3, :16] = 0
    check_scales(model, plan)
