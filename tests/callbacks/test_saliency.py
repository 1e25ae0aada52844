"""Salient weights in a Lightning module of one's own, what the callback logs, and how they are chosen."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning_gsq.callbacks import GumbelAnnealing, HardRounding, SaliencyThreshold
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gsq.cli.defaults import QUIET_TRAINER
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers import DualMode, GumbelOptions, Matrix
from lightning_gsq.quantizers.salient import MixedQuantizer
from lightning_gsq.saliency import Menu, settle
from lightning_gsq.saliency.choose import SettleOptions, settled_start, settled_tensor
from lightning_gsq.weights.mixed import MixedTensor
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme


def _inputs(count: int, outliers: int = 4) -> Tensor:
    """Correlated inputs, a few of which are five times as strong as the others."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(40, 40, generator=generator)
    x_NI = torch.randn(count, 40, generator=generator) @ mixing / 40**0.5
    x_NI[:, :outliers] *= 5
    return x_NI


def _matrix(scheme: QuantScheme, outliers: int = 4) -> Matrix:
    x_NI = _inputs(400, outliers)
    return Matrix(torch.randn(16, 40, generator=torch.Generator().manual_seed(4)), [2 * x_NI.T @ x_NI / 400], scheme)


class _Regression(LightningModule):
    """Fits a quantized weight to the products of the original one."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix
        choice = settle({"w": matrix}, SettleOptions())["w"]
        with torch.no_grad():
            start = settled_start(matrix, choice, DualMode(feedback=False))
        options = GumbelOptions(backend="eager", center="position")
        quantizer = MixedQuantizer(start, choice.scheme, options, torch.Generator().manual_seed(0))
        self.weights = nn.ModuleList([quantizer])
        self.saliency = {"w": choice.figures}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        difference_OI = self.weights[0](self.global_step) - self.matrix.w_OI
        return (batch @ difference_OI.T).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=4e-3)


def _trainer(tmp_path: Any, callback: SaliencyThreshold, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=CSVLogger(tmp_path),
        callbacks=[callback, GumbelAnnealing(), HardRounding()],
        **QUIET_TRAINER,
        **options,
    )


@pytest.mark.parametrize("trained", [True, False])
def test_both_parts_train_and_the_choice_is_logged(trained: bool, tmp_path: Any) -> None:
    part = SalientPart("structured", 4, 0.1, score="error", trained=trained)
    module = _Regression(_matrix(QuantScheme(1, 20, part)))
    trainer = _trainer(tmp_path, SaliencyThreshold())
    trainer.fit(module, DataLoader(_inputs(4000), batch_size=40))
    quantizer = module.weights[0]
    assert isinstance(quantizer, MixedQuantizer)
    assert quantizer.columns_K.tolist() == [0, 1, 2, 3]
    start, end = quantizer.start_tensor(), quantizer.harden()
    hessian_II, w_OI = module.matrix.hessians[0], module.matrix.w_OI  # type: ignore[index]

    def error(tensor: MixedTensor) -> float:
        difference_OI = w_OI - tensor.dequantize()
        return float((difference_OI @ hessian_II * difference_OI).sum())

    assert error(end) < 0.9 * error(start)
    assert end.salient is not None and start.salient is not None
    assert torch.equal(end.salient.scales_OG, start.salient.scales_OG) != trained
    torch.testing.assert_close(quantizer(0), end.dequantize())  # HardRounding has rounded both parts
    trainer.logger.save()  # type: ignore[union-attr]
    text = (next(tmp_path.rglob("metrics.csv"))).read_text()
    assert all(f"saliency_{what}/w" in text for what in ("ratio", "groups", "error", "bits"))


def test_a_module_without_salient_weights_is_left_alone() -> None:
    module = LightningModule()
    module.inner = nn.Linear(2, 2)
    SaliencyThreshold().setup(None, module, "fit")  # type: ignore[arg-type]
    assert isinstance(module.inner, nn.Linear)


def test_a_higher_price_buys_fewer_salient_columns() -> None:
    matrices = {"w": _matrix(QuantScheme(1, 20, SalientPart(score="error")), outliers=12)}
    ratios = [settle(matrices, SettleOptions(price))["w"].figures["ratio"] for price in (1e-3, 1e-1, 10.0)]
    assert ratios[0] >= ratios[1] >= ratios[2] == 0.0 and ratios[0] > 0


@pytest.mark.parametrize("score", ["magnitude", "hessian"])
def test_element_choice(score: str) -> None:
    scheme = QuantScheme(1, 64, SalientPart("element", 4, score=score))  # type: ignore[arg-type]
    matrix = _matrix(scheme)
    choice = settle({"w": matrix}, SettleOptions())["w"]
    assert choice.scheme.settled and scheme.admits(choice.scheme) and choice.mask_OI is not None
    tensor = settled_tensor(matrix, choice, DualMode(), torch.float16)
    assert tensor.ledger().per_weight()["total"] == pytest.approx(choice.figures["bits"])


def test_figures_of_columns_are_those_of_the_ledger() -> None:
    for scheme in (QuantScheme(1, 8, SalientPart(ratio=0.1, scale_groups=4)), QuantScheme(1, budget=2.5)):
        matrix = _matrix(scheme)
        choice = settle({"w": matrix}, SettleOptions(menu=Menu(group_sizes=[8, 16])))["w"]
        tensor = settled_tensor(matrix, choice, DualMode(), torch.float16)
        assert tensor.ledger().per_weight()["total"] == pytest.approx(choice.figures["bits"])


def test_without_hessians() -> None:
    matrix = Matrix(torch.randn(16, 40), None, QuantScheme(1, 20, SalientPart(ratio=0.1, score="error")))
    choice = settle({"w": matrix}, SettleOptions())["w"]
    tensor = settled_tensor(matrix, choice, DualMode(feedback=False), torch.float16)
    assert tensor.shape == (16, 40)


def test_budget_too_small() -> None:
    with pytest.raises(ConfigurationError, match="do not hold even the cheapest choice"):
        settle({"w": _matrix(QuantScheme(1, budget=1.01))}, SettleOptions())


@pytest.mark.parametrize(("name", "value"), [("price", 0.0), ("max_ratio", 1.0)])
def test_bad_options(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"model.saliency.{name} must .* got {value}"):
        SettleOptions(**{name: value})


@pytest.mark.parametrize("name", ["price", "max_ratio", "graph", "menu"])
def test_arguments_that_have_moved_name_their_new_place(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"--model.saliency.{name}"):
        SaliencyThreshold(**{name: 0.1})  # type: ignore[arg-type]
