"""Each callback alone, in a plain Lightning script with a module of its own."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_gsq.callbacks import BlockProgress, GumbelAnnealing, HardRounding, QuantizationMonitor
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_gsq.cli.defaults import QUIET_TRAINER
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.chain import find_blocks, run_block, trace
from lightning_gsq.models.linear_weights import find_linear_sites
from lightning_gsq.quantizers import RTN, GumbelOptions, GumbelQuantizer
from lightning_gsq.training import BlockQuantization
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.tiny import FAMILIES

QUIET = QUIET_TRAINER | {"logger": False, "accelerator": "cpu"}


class Regression(LightningModule):
    """Anyone's module: a linear map with a quantized weight, and a validation loss under other names."""

    def __init__(self) -> None:
        super().__init__()
        w = torch.randn(4, 8)
        self.target = w
        scheme = QuantScheme(2, 8)
        self.quantizer = GumbelQuantizer(
            RTN()(w, None, scheme), scheme, GumbelOptions(backend="eager"), torch.Generator().manual_seed(0)
        )
        self.seen: list[tuple[float, float]] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Squared error of the outputs."""
        self.seen.append((self.quantizer.temperature, self.quantizer.logit_scale))
        return (batch @ (self.quantizer(batch_idx) - self.target).T).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        """Soft and hard losses."""
        soft = (batch @ (self.quantizer(batch_idx) - self.target).T).square().mean()
        hard = (batch @ (self.quantizer.harden().dequantize() - self.target).T).square().mean()
        self.log_dict({"soft": soft, "hard": hard})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def _batches(count: int = 10) -> DataLoader[torch.Tensor]:
    return DataLoader(torch.randn(count * 4, 8), batch_size=4)  # type: ignore[arg-type]


def test_annealing_goes_from_first_to_last_step() -> None:
    module = Regression()
    annealing = GumbelAnnealing(temperature=(2.0, 0.1), logit_scale=(100.0, 500.0))
    Trainer(max_steps=5, callbacks=[annealing], **QUIET).fit(module, _batches())
    assert module.seen[0] == (2.0, 100.0)
    assert module.seen[-1] == pytest.approx((0.1, 500.0))
    taus = [tau for tau, _ in module.seen]
    assert taus == sorted(taus, reverse=True)


def test_annealing_counts_optimizer_steps_under_accumulation() -> None:
    module = Regression()
    Trainer(max_epochs=1, accumulate_grad_batches=5, callbacks=[GumbelAnnealing()], **QUIET).fit(module, _batches())
    assert [tau for tau, _ in module.seen] == pytest.approx([2.0] * 5 + [0.05] * 5)


@pytest.mark.parametrize("options", [{"temperature": (2.0, 0.0)}, {"logit_scale": (-1.0, 5.0)}])
def test_annealing_refuses_what_is_not_positive(options: dict[str, tuple[float, float]]) -> None:
    with pytest.raises(ConfigurationError, match="must be positive"):
        GumbelAnnealing(**options)


def test_hard_rounding_swaps_in_hard_weights_and_reports() -> None:
    module = Regression()
    rounding = HardRounding(soft_metric="soft", hard_metric="hard", max_gap=None)
    trainer = Trainer(max_epochs=1, callbacks=[GumbelAnnealing(), rounding], **QUIET)
    trainer.fit(module, _batches(), _batches(2))
    assert torch.equal(module.quantizer(123), module.quantizer.harden().dequantize())
    flips = (module.quantizer.codes_OI() != module.quantizer.start_codes).float().mean()
    assert rounding.report.flip_rate == pytest.approx(float(flips))
    metrics = trainer.callback_metrics
    assert rounding.report.gap == pytest.approx(float(metrics["hard"] - metrics["soft"]))


def test_hard_rounding_works_without_validation() -> None:
    rounding = HardRounding()
    Trainer(max_steps=2, callbacks=[rounding], **QUIET).fit(Regression(), _batches())
    assert rounding.report.gap is None


def test_hard_rounding_warns_of_a_wide_gap() -> None:
    module = Regression()
    rounding = HardRounding(soft_metric="soft", hard_metric="hard", max_gap=1e-9)
    module.validation_step = lambda batch, batch_idx: module.log_dict({"soft": 1.0, "hard": 2.0})  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="rounding raised the loss from 1 to 2"):
        Trainer(max_epochs=1, callbacks=[rounding], **QUIET).fit(module, _batches(2), _batches(1))


def test_hard_rounding_needs_a_quantizer() -> None:
    class Plain(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer = torch.nn.Linear(8, 4)  # type: ignore[assignment]

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.quantizer(batch).square().mean()

    with pytest.raises(ConfigurationError, match="Plain has no GumbelQuantizer"):
        Trainer(max_steps=1, callbacks=[HardRounding()], **QUIET).fit(Plain(), _batches())


def block_module(family: str = "llama", bits: int = 2, position: tuple[int, int] = (0, 2)) -> BlockQuantization:
    """Block 0 of a tiny model, its quantizers started by rounding."""
    model = FAMILIES[family]()
    traced = trace(model, torch.arange(16)[None])
    block = find_blocks(model)[1][0]
    sites = find_linear_sites(block, lambda: run_block(block, traced.inputs_BTD[0], traced.calls[0]))
    scheme = QuantScheme(bits, 16)
    quantizers = {
        site: GumbelQuantizer(
            RTN()(site.to_matrix(block.get_parameter(site.name)), None, scheme),
            scheme,
            GumbelOptions(backend="eager"),
            torch.Generator().manual_seed(0),
        )
        for site in sites
    }
    return BlockQuantization(
        block,
        traced.calls[0],
        quantizers,
        lambda groups: torch.optim.Adam(groups, lr=1e-3),
        name="model.layers.0",
        position=position,
    )


def block_batches(module: BlockQuantization, count: int = 6) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
    """Random inputs and the full-precision block's outputs."""
    batches = []
    for _ in range(count):
        hidden = torch.randn(2, 16, 32)
        with torch.no_grad():
            batches.append((hidden, run_block(module.block, hidden, module._call)))
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def test_monitor_fills_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="tb")
    for position in (0, 1):
        module = block_module(position=(position, 2))
        trainer = Trainer(
            max_epochs=1,
            callbacks=[GumbelAnnealing(), HardRounding(), QuantizationMonitor(every_n_steps=2)],
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            **{**QUIET, "logger": logger},
        )
        trainer.fit(module, block_batches(module), block_batches(module, 2))
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {
        "block/loss_soft",
        "block/loss_hard",
        "block/val_loss_hard",
        "annealing/temperature",
        "annealing/logit_scale",
        "learning_rate/logits",
        "learning_rate/scales",
        "rounding/flip_rate",
        "rounding/gap",
    } <= scalars
    assert {
        "levels/mlp.down_proj.weight",
        "entropy_bits/mlp.down_proj.weight",
        "scale_drift/mlp.down_proj.weight",
    } <= set(events.Tags()["histograms"])
    assert events.Tags()["images"] == ["weight_error"]
    steps = [event.step for event in events.Scalars("block/loss_soft")]
    assert steps == sorted(steps) and steps[-1] >= 11, "the curves of two blocks join along one axis"


def test_progress_prints_one_line_a_block_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = BlockProgress()
    for position in (0, 1):
        module = block_module(position=(position, 2))
        Trainer(max_epochs=1, callbacks=[progress], num_sanity_val_steps=0, **QUIET).fit(module, block_batches(module))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("block ")]
    assert [line.split("  ")[0] for line in lines] == ["block 1/2", "block 2/2"]


def test_a_rounded_block_says_that_it_trains_no_more() -> None:
    module = block_module()
    settings: dict[str, Any] = {"max_epochs": 1, "num_sanity_val_steps": 0, **QUIET}
    Trainer(callbacks=[HardRounding()], **settings).fit(module, block_batches(module))
    with pytest.raises(ConfigurationError, match=r"its weights are rounded .* make a new module"):
        Trainer(**settings).fit(module, block_batches(module))


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_block_of_a_run_leaves_its_line(terminal: bool) -> None:
    """Once the run has measured it, with its error before and after."""
    progress, shown = BlockProgress(), _Terminal()
    progress.console = Console(file=shown, force_terminal=terminal, width=200, markup=False, highlight=False)
    module = block_module(position=(2, 30))
    module.measured_afterwards = True
    Trainer(max_epochs=1, callbacks=[progress], num_sanity_val_steps=0, **QUIET).fit(module, block_batches(module))
    assert "error" not in shown.getvalue()
    progress.on_block_measured(module, {"start": 0.142, "final": 0.088, "flip_rate": 0.041, "seconds": 17.7})
    progress.close()
    line = "error 0.1420 -> 0.0880  codes moved 4.1%  17.7 s"
    assert shown.getvalue().count(line) == 1
    assert "block 3/30" in shown.getvalue()
    assert ("  about " in shown.getvalue().partition(line)[2]) is not terminal


def test_short_fits_have_curves(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="short")
    module = block_module()
    monitor = QuantizationMonitor(every_n_steps=20, histograms=False)
    settings = {**QUIET, "logger": logger}
    Trainer(max_steps=10, max_epochs=-1, callbacks=[monitor], num_sanity_val_steps=0, **settings).fit(
        module, block_batches(module)
    )
    events = EventAccumulator(str(tmp_path / "short")).Reload()
    assert len(events.Scalars("block/loss_hard")) == 5
