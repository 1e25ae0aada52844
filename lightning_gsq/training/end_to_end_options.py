"""What trains in the end-to-end phase, and how; every part checks itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch.optim import Optimizer

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers.trained_scales import SCALE_PARAMETERS
from lightning_gsq.system.sharding import Sharding
from lightning_gsq.training.losses import LOSS_POSITIONS

OUTER = "outer"
"""Name of the module with what trains outside of the blocks, among the parts of the end-to-end module."""
Trained = Literal["scales", "norms", "head", "codes", "embedding"]
KINDS: tuple[Trained, ...] = get_args(Trained)


def _at_least_one(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigurationError(f"end_to_end.{name} must be at least 1, got {count}")


def _share(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ConfigurationError(f"end_to_end.{name} must lie between 0 and 1, got {share}")


def _positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ConfigurationError(f"end_to_end.{name} must be positive, got {number}")


@dataclass(frozen=True)
class LearningRates:
    """How fast each kind of parameter moves.

    Args:
        optimizer: Makes the optimizer; its learning rate is that of the scales of codes of up to 3 bits.
        norms: Learning rate of the norms beside such codes.
        head: Learning rate of the head.
        codes: Learning rate of the codes' positions, in codes.
        floor: End of the cosine schedule, as a share of its start.
        warmup: Steps in which the rates rise.
    """

    optimizer: OptimizerCallable
    norms: float
    head: float
    codes: float
    floor: float
    warmup: int

    def __post_init__(self) -> None:
        _positive(norm_learning_rate=self.norms, head_learning_rate=self.head, code_learning_rate=self.codes)
        _share(learning_rate_floor=self.floor)
        if self.warmup < 0:
            raise ConfigurationError(
                f"end_to_end.learning_rate_warmup must not be negative, got {self.warmup}; 0 starts at the whole rates"
            )

    def make_optimizer(self, parameters: Mapping[tuple[Trained, float], list[torch.nn.Parameter]]) -> Optimizer:
        """The optimizer, with a parameter group for each kind that trains and the share of its learning rate."""
        others: dict[str, float] = {"norms": self.norms, "head": self.head, "codes": self.codes}
        groups = {key: group for key, group in parameters.items() if group}
        optimizer: Optimizer = self.optimizer(
            [
                {
                    "params": group,
                    "name": kind if share == 1 else f"{kind} x {share:.3g}",
                    **({"lr": others[kind]} if kind in others else {}),
                }
                for (kind, share), group in groups.items()
            ]
        )
        for (_, share), group in zip(groups, optimizer.param_groups, strict=True):
            group["lr"] *= share
        return optimizer


@dataclass(frozen=True)
class Distillation:
    """The loss.

    Args:
        temperature: Of teacher and student in the divergence.
        cross_entropy: Share of the next tokens' cross-entropy; the rest is the divergence.
        top_k: Most probable tokens of the teacher that count; None for all.
        chunk: Positions whose logits are held at once.
    """

    temperature: float
    cross_entropy: float
    top_k: int | None
    chunk: int

    def __post_init__(self) -> None:
        _positive(temperature=self.temperature)
        _share(cross_entropy=self.cross_entropy)
        if self.top_k is not None and self.top_k < 1:
            raise ConfigurationError(f"end_to_end.top_k must be at least 1, or null for all tokens, got {self.top_k}")
        _at_least_one(chunk=self.chunk)


@dataclass(frozen=True)
class Passes:
    """How long it goes.

    Args:
        max_epochs: Passes over the calibration sequences.
        max_steps: Optimizer steps after which it ends; -1 for no such limit.
        batch_size: Sequences of one step, on one device.
        accumulate_grad_batches: Batches of one optimizer step; None for the trainer's own setting.
        validations: Evaluations in each pass.
    """

    max_epochs: int
    max_steps: int
    batch_size: int
    accumulate_grad_batches: int | None
    validations: int

    def __post_init__(self) -> None:
        _at_least_one(
            batch_size=self.batch_size,
            validations=self.validations,
            max_epochs=self.max_epochs,
            accumulate_grad_batches=self.accumulate_grad_batches,
        )
        if self.max_steps != -1 and self.max_steps < 1:
            raise ConfigurationError(
                f"end_to_end.max_steps must be at least 1, or -1 for no limit, got {self.max_steps}; without "
                "end_to_end in --model.phases the phase is left out"
            )


class EndToEndOptions:
    """The end-to-end phase: the whole model trained a little more, its codes frozen.

    Args:
        train: What trains: "scales" (of every group), "norms" (vectors of the normalisation layers), "head" (the
            language-model head; a head tied to the embedding gets a matrix of its own), "codes" (those of the blocks
            phase to start from; straight-through gradient), "embedding" (the scales of a quantized embedding or head).
        optimizer: Optimizer of all of them; lr is the learning rate of the scales, relative to each scale. Above 3
            bits a weight, each further bit halves it; where the divergence D from the original begins below 0.18
            nats, they take at most the share D / 0.18.
        norm_learning_rate: Learning rate of the norms; halved as that of the scales, on average over the weights.
        head_learning_rate: Learning rate of the head.
        code_learning_rate: Learning rate of the positions between codes, in codes.
        learning_rate_floor: End of the cosine learning rate schedule, as a share of its start.
        learning_rate_warmup: Steps in which the learning rates rise, at most a quarter of all: the first ones of Adam
            go by the sign of a single gradient, which leads away from a good start.
        temperature: Temperature of teacher and student in the divergence.
        cross_entropy: Share of the next tokens' cross-entropy in the loss; the rest is the divergence.
        top_k: Keep only this many of the teacher's most probable tokens, computed once and stored in the run folder;
            null computes the teacher's whole distribution at every step.
        max_epochs: Passes over the calibration sequences.
        max_steps: Optimizer steps after which it ends; -1 for no such limit.
        batch_size: Sequences of one step, on one device.
        accumulate_grad_batches: Batches of one optimizer step; null for the trainer's own setting.
        validations: Evaluations on the held-out sequences in each pass; the best state is kept.
        recompute: Keep only each block's input and run blocks again in the backward pass: less memory, more time.
        chunk: Positions whose logits are held at once.
        strategy: "fsdp2" spreads the model over the devices in this phase, for models that one of them does not hold;
            null for the trainer's own. --trainer.strategy fsdp2 sets it.
    """

    def __init__(
        self,
        train: list[Trained] = ["scales", "norms"],  # noqa: B006 - jsonargparse shows the default; never changed
        optimizer: OptimizerCallable = lambda groups: torch.optim.Adam(groups, lr=2e-3),
        norm_learning_rate: float = 1e-3,
        head_learning_rate: float = 1e-4,
        code_learning_rate: float = 1e-3,
        learning_rate_floor: float = 0.1,
        learning_rate_warmup: int = 5,
        temperature: float = 1.0,
        cross_entropy: float = 0.0,
        top_k: int | None = None,
        max_epochs: int = 1,
        max_steps: int = -1,
        batch_size: int = 4,
        accumulate_grad_batches: int | None = None,
        validations: int = 4,
        recompute: bool = False,
        chunk: int = LOSS_POSITIONS,
        strategy: Sharding | None = None,
    ) -> None:
        if not train:
            raise ConfigurationError("end_to_end.train is empty: name scales, norms, head, codes or embedding")
        self.train: Sequence[Trained] = train
        self.rates = LearningRates(
            optimizer,
            norm_learning_rate,
            head_learning_rate,
            code_learning_rate,
            learning_rate_floor,
            learning_rate_warmup,
        )
        self.loss = Distillation(temperature, cross_entropy, top_k, chunk)
        self.passes = Passes(max_epochs, max_steps, batch_size, accumulate_grad_batches, validations)
        self.recompute, self.strategy = recompute, strategy


def kind_of(name: str) -> Trained:
    """What a trained parameter is, by its name in the module."""
    if name.startswith(f"{OUTER}."):
        return "embedding"
    *_, owner, last = f".{name}".split(".")
    kinds: dict[str, Trained] = {"positions": "codes", "head": "head"}
    if owner == "norms":
        return "norms"
    return "scales" if last in SCALE_PARAMETERS else kinds[last]
