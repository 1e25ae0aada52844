"""A run as one object: the model, its text, its folder, and how this process takes part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_gsq.data import CalibrationDataModule
from lightning_gsq.models.calls import BlockCall
from lightning_gsq.models.chain import BlockRunner, compiled_run_block, find_blocks, run_block, trace
from lightning_gsq.models.expert_parallel import held_weights
from lightning_gsq.models.passing import Forms
from lightning_gsq.models.survey import survey
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.run.importance import Importance
from lightning_gsq.system.compiling import compiler_available
from lightning_gsq.system.processes import Ranks
from lightning_gsq.system.stopwatch import Stopwatch
from lightning_gsq.system.token_exchange import TokenExchange
from lightning_gsq.training import ModelQuantization

TokenWeights = Mapping[str, Tensor]
"""How much each token counts in what a matrix sees, ``N T``, fp32 of mean 1, by the parameter's name in its block."""


@dataclass(frozen=True)
class Run:
    """What every phase of a run works with.

    Args:
        model: The model, loaded, and its settings.
        data: Calibration sequences, tokenised.
        plan: What to do with which block.
        folder: The run folder.
        recipe: What makes it this run.
        make_trainer: Makes a Trainer with the user's settings, some of them replaced where arguments name them.
        activations: How hidden states are kept.
        seed: Seed of everything random.
        say: Prints a line for the user.
        ranks: This process among those that share the sequences.
        trainer: One such Trainer: its device, precision and loggers are those of all.
        blocks: All blocks of the model.
        calls: What each is called with beside the hidden states.
        forms: What each returns beside them.
        width: Width of the hidden states, ``D``.
        run_block: How a block is run: plainly, or compiled.
        exchange: The processes that the experts of a block are spread over; None where each has whole blocks.
        importance: Mean squares of inputs that a file gives in place of the run's own; None without one.
        token_weights: Those of this process's tokens by the block's number, once they were found.
        watch: Where the seconds go.
    """

    model: ModelQuantization
    data: CalibrationDataModule
    plan: list[BlockPlan]
    folder: RunFolder
    recipe: dict[str, Any]
    make_trainer: Callable[..., Trainer]
    activations: ActivationOptions
    seed: int
    say: Callable[[str], None]
    ranks: Ranks
    trainer: Trainer
    blocks: nn.ModuleList
    calls: list[BlockCall]
    forms: Forms
    width: int
    run_block: BlockRunner
    exchange: TokenExchange | None = None
    importance: Importance | None = None
    token_weights: dict[int, TokenWeights] = field(default_factory=dict)
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def device(self) -> torch.device:
        """Where blocks are computed."""
        return self.trainer.strategy.root_device

    @property
    def train_ids_NT(self) -> Tensor:
        """This process's calibration sequences."""
        return self.ranks.share(self.data.train_ids_NT)

    @property
    def validation_ids_NT(self) -> Tensor:
        """This process's held-out sequences."""
        return self.ranks.share(self.data.validation_ids_NT, even=False)

    @property
    def spare_ids_NT(self) -> Tensor:
        """This process's sequences for experts that few tokens reach: first those that train and are not watched."""
        start = self.model.start
        ids_NT = torch.cat([self.data.train_ids_NT[start.hessian_sequences :], self.data.spare_ids_NT])
        return self.ranks.share(ids_NT[: start.experts.extra_sequences])

    @property
    def last_block(self) -> int:
        """Number of the last block that is quantized."""
        return self.plan[-1].index

    @property
    def plan_of(self) -> dict[int, BlockPlan]:
        """What to do with a block, by its number."""
        return {plan.index: plan for plan in self.plan}

    def own(self, plan: BlockPlan) -> BlockPlan:
        """This process's part of what is done with a block: all of it, unless its experts are spread."""
        if not self.model.block.expert_parallel:
            return plan
        return plan.own(held_weights(self.blocks[plan.index], self.ranks.rank, self.ranks.world))

    def mean(self, value: float) -> float:
        """Mean over the processes."""
        return float(self.ranks.sum(torch.tensor(value, dtype=torch.float64, device=self.device))) / self.ranks.world

    def precision(self) -> Any:
        """A context with the dtypes that the user chose; of Lightning's, whose type varies."""
        return self.trainer.precision_plugin.forward_context()


def make_run(
    model: ModelQuantization,
    data: CalibrationDataModule,
    plan: list[BlockPlan],
    folder: RunFolder,
    recipe: dict[str, Any],
    make_trainer: Callable[..., Trainer],
    activations: ActivationOptions,
    seed: int,
    say: Callable[[str], None],
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    importance: Importance | None = None,
) -> Run:
    """The run of these parts; looks at how the model calls its blocks. Arguments as in :class:`Run`."""
    trainer = make_trainer()
    surveyed, traced = survey(model.network), trace(model.network, data.train_ids_NT[:1])
    device = trainer.strategy.root_device
    compiled = model.block.compiled and compiler_available(device.type)
    spread = model.block.expert_parallel and ranks.world > 1
    return Run(
        model=model,
        data=data,
        plan=plan,
        folder=folder,
        recipe=recipe,
        make_trainer=make_trainer,
        activations=activations,
        seed=seed,
        say=say,
        ranks=ranks,
        trainer=trainer,
        blocks=find_blocks(model.network)[1],
        calls=[call.like(surveyed_call) for call, surveyed_call in zip(traced.calls, surveyed.calls, strict=True)],
        forms=surveyed.forms,
        width=traced.output_BTD.shape[-1],
        run_block=compiled_run_block() if compiled else run_block,
        exchange=TokenExchange(ranks.rank, ranks.world, device) if spread else None,
        importance=importance,
    )
