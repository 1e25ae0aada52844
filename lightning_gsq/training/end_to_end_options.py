"""What the end-to-end phase trains, and how."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.cli import OptimizerCallable

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.sharding import Sharding

Trained = Literal["scales", "norms", "head", "logits"]


class EndToEndOptions:
    """The end-to-end phase: the whole model trained a little more, its codes frozen.

    Args:
        train: What trains: "scales" (of every group), "norms" (vectors of the normalisation layers), "head" (the
            language-model head; a head tied to the embedding gets a matrix of its own), "logits" (the codes too, hard
            samples with a straight-through gradient).
        optimizer: Optimizer of all of them; lr is the learning rate of the scales, relative to each scale.
        norm_learning_rate: Learning rate of the norms.
        head_learning_rate: Learning rate of the head.
        logits_learning_rate: Learning rate of the logits.
        learning_rate_floor: End of the cosine learning rate schedule, as a share of its start.
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
        logits_learning_rate: float = 1e-3,
        learning_rate_floor: float = 0.1,
        temperature: float = 1.0,
        cross_entropy: float = 0.0,
        top_k: int | None = None,
        max_epochs: int = 1,
        max_steps: int = -1,
        batch_size: int = 4,
        accumulate_grad_batches: int | None = None,
        validations: int = 4,
        recompute: bool = False,
        chunk: int = 128,
        strategy: Sharding | None = None,
    ) -> None:
        rates = {
            "norm_learning_rate": norm_learning_rate,
            "head_learning_rate": head_learning_rate,
            "logits_learning_rate": logits_learning_rate,
            "temperature": temperature,
        }
        for name, rate in rates.items():
            if not rate > 0:
                raise ConfigurationError(f"end_to_end.{name} must be positive, got {rate}")
        counts = {"batch_size": batch_size, "validations": validations, "chunk": chunk, "max_epochs": max_epochs}
        for name, count in counts.items():
            if count < 1:
                raise ConfigurationError(f"end_to_end.{name} must be at least 1, got {count}")
        for name, share in (("learning_rate_floor", learning_rate_floor), ("cross_entropy", cross_entropy)):
            if not 0 <= share <= 1:
                raise ConfigurationError(f"end_to_end.{name} must lie between 0 and 1, got {share}")
        if top_k is not None and top_k < 1:
            raise ConfigurationError(f"end_to_end.top_k must be at least 1, or null for all tokens, got {top_k}")
        if not train:
            raise ConfigurationError("end_to_end.train is empty: name scales, norms, head or logits")
        self.train, self.optimizer = train, optimizer
        self.learning_rates = {"norms": norm_learning_rate, "head": head_learning_rate, "logits": logits_learning_rate}
        self.learning_rate_floor, self.temperature, self.cross_entropy = learning_rate_floor, temperature, cross_entropy
        self.top_k, self.batch_size = top_k, batch_size
        self.max_epochs, self.max_steps, self.validations = max_epochs, max_steps, validations
        self.accumulate_grad_batches, self.recompute, self.chunk = accumulate_grad_batches, recompute, chunk
        self.strategy = strategy
