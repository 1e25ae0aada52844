"""One transformer block as a LightningModule: its trainable parameters are logits and scales, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.calls import BlockCall
from lightning_gsq.models.chain import BlockRunner, run_block
from lightning_gsq.models.expert_parallel import held_weights, passes_of_others, without_tokens
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.quantizers import GumbelQuantizer
from lightning_gsq.quantizers.salient import MixedQuantizer
from lightning_gsq.system.seeding import seed_of
from lightning_gsq.system.token_exchange import TokenExchange
from lightning_gsq.training import expert_parallel
from lightning_gsq.training.losses import refuse_non_finite
from lightning_gsq.training.optim import Adam, Lion
from lightning_gsq.training.schedule import cosine_to_floor
from lightning_gsq.weights.quantized import QuantizedWeight

WeightQuantizer = GumbelQuantizer | MixedQuantizer
"""One trainable weight; its parts are Gumbel quantizers."""
Batch = tuple[Tensor, ...]
"""Hidden states that enter the block, and what should leave it, each ``B T D``; then, optionally, how much each token
counts, ``B T``; then what the block's call takes for each sequence."""


class BlockQuantization(LightningModule):
    """Trains the level choices and group scales of one block against its full-precision output.

    The block itself stays as it is: it runs through ``torch.func.functional_call`` with sampled weights in place of
    its own. The loss is the mean squared error over the mean square of the targets, so that 0.01 means one percent
    of the block's output energy, in every block. Batches may weigh tokens.

    Args:
        block: The full-precision block; frozen here.
        call: Its arguments beside the hidden states.
        quantizers: One quantizer for each linear weight to quantize.
        optimizer: Makes the optimizer from parameter groups; its learning rate is that of the logits.
        scale_learning_rate: Learning rate of the scales' logarithms; no weight decay applies to them.
        learning_rate_floor: Where the cosine schedule ends, as a share of the start.
        target_power: Mean square of the targets, weighed like the batches.
        index: The block's number in the model, for logging and for the noise.
        name: The block's name in the model, for messages.
        seed: Seed of the noise.
        position: How many blocks of this run come before this one, and how many there are.
        run: How a block is run: plainly, or compiled.
        saliency: What was chosen for the weights with a salient part, as figures by name; for callbacks that log them.
        exchange: The processes that the block's experts are spread over, if it has any; what each of them has is
            trained by all, with one sample of the weights for a step. None where a process has the block to itself, or
            shares it as its strategy says.
    """

    def __init__(
        self,
        block: nn.Module,
        call: BlockCall,
        quantizers: Mapping[LinearSite, WeightQuantizer],
        optimizer: OptimizerCallable,
        scale_learning_rate: float = 1e-3,
        learning_rate_floor: float = 0.1,
        target_power: float = 1.0,
        index: int = 0,
        name: str = "block",
        seed: int = 0,
        position: tuple[int, int] = (0, 1),
        run: BlockRunner = run_block,
        saliency: Mapping[str, Mapping[str, float]] | None = None,
        exchange: TokenExchange | None = None,
    ) -> None:
        super().__init__()
        self.block = block.requires_grad_(False).eval()
        self.sites = list(quantizers)
        self.quantizers = nn.ModuleList(quantizers.values())
        self.optimizer, self.scale_learning_rate = optimizer, scale_learning_rate
        self.learning_rate_floor, self.target_power = learning_rate_floor, max(target_power, 1e-12)
        self.index, self.name, self.seed, self.position = index, name, seed, position
        self.saliency = dict(saliency or {})
        self.measured_afterwards = False
        """Whether a run will say how good the block has become, so that callbacks need not."""
        self._call, self._run = call, run
        self.exchange = exchange
        self.own = set() if exchange is None else set(held_weights(block, exchange.rank, exchange.world))
        """Names of the weights of which this process has some experts, others the others."""
        self._validated: tuple[dict[str, Tensor], dict[str, Tensor]]
        self._batches = self._further = 0
        """Validation batches of this process, and those of another beyond them, whose tokens come here as well."""

    @property
    def first_step(self) -> int:
        """Optimizer steps of the blocks before, so that the curves of successive blocks join along one axis."""
        return self.position[0] * max(1, int(self.trainer.estimated_stepping_batches))

    def named_weights(self) -> Iterator[tuple[str, WeightQuantizer]]:
        """Pairs of parameter name and quantizer of the whole weight."""
        for site, quantizer in zip(self.sites, self.quantizers, strict=True):
            assert isinstance(quantizer, GumbelQuantizer | MixedQuantizer)
            yield site.name, quantizer

    def named_quantizers(self) -> Iterator[tuple[str, GumbelQuantizer]]:
        """Pairs of name and Gumbel quantizer: all of a weight, or its salient and its other columns apart."""
        for name, quantizer in self.named_weights():
            for suffix, part in quantizer.parts():
                yield name + suffix, part

    def _parameters_of(self, own: bool) -> list[nn.Parameter]:
        """What trains: of this process's experts, or of everything else, of which each process has a copy."""
        return [p for name, weight in self.named_weights() if (name in self.own) == own for p in weight.parameters()]

    def sampled_weights(self, *key: int) -> dict[str, Tensor]:
        """One relaxed sample of every weight; ``key`` selects the noise."""
        return {
            site.name: site.from_matrix(quantizer(seed_of(self.seed, self.index, site.name, *key)))
            for site, quantizer in zip(self.sites, self.quantizers, strict=True)
        }

    def hard_weights(self) -> dict[str, Tensor]:
        """Every weight rounded to its most probable level."""
        return self._dense({name: quantizer.harden() for name, quantizer in self.named_weights()})

    def start_weights(self) -> dict[str, Tensor]:
        """Every weight as the warm start left it."""
        return self._dense({name: quantizer.start_tensor() for name, quantizer in self.named_weights()})

    def forward(
        self,
        hidden_BTD: Tensor,
        weights: dict[str, Tensor],
        arguments: Sequence[Tensor] = (),
        run: BlockRunner | None = None,
    ) -> Tensor:
        """Runs the block with these weights, on the arguments of these sequences where it has any.

        Args:
            hidden_BTD: What enters it.
            weights: Dense weights to use, by name.
            arguments: Of these sequences.
            run: How it is run, where not as it trains.
        """
        self._call = self._call.to(hidden_BTD.device)
        call = self._call.bind(arguments, hidden_BTD.dtype)
        return (run or self._run)(self.block, hidden_BTD, call, weights)

    def inputs_of(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Hidden states that enter the block, and the arguments of their sequences."""
        return batch[0], batch[len(batch) - len(self._call.bound) :]

    def loss(self, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
        """Relative squared error of the block's output with these weights, fp32."""
        (hidden, arguments), target = self.inputs_of(batch), batch[1]
        weight_BT = batch[2 : len(batch) - len(arguments)]
        output = self(hidden.float(), weights, arguments).float()
        if not weight_BT:
            return nn.functional.mse_loss(output, target.float()) / self.target_power
        return ((output - target.float()).square().mean(-1) * weight_BT[0]).mean() / self.target_power

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss with sampled weights.

        Raises:
            NonFiniteLossError: it is NaN or infinite.
        """
        loss = self.loss(batch, self.sampled_weights(self.global_step, batch_idx, self._noise))
        refuse_non_finite(
            loss,
            f"the loss of {self.name} at step {self.global_step}",
            "lower the learning rates (--model.optimizer.init_args.lr, --model.scale_learning_rate) or use "
            "--trainer.precision 32-true",
        )
        # A logged value named "step" becomes the x axis of all loggers.
        self.log_dict({"block/loss_soft": loss.detach(), "step": float(self.first_step + self.global_step)})
        return loss

    @property
    def _noise(self) -> int:
        """Which noise a process draws: its own, unless they share a block, of which a step has one sample."""
        return self.global_rank if self.exchange is None else 0

    def on_fit_start(self) -> None:
        """Where experts are spread, makes everything else that of the first process."""
        if self.exchange is not None:
            for name, weight in self.named_weights():
                if name not in self.own:
                    expert_parallel.share([*weight.parameters(), *weight.buffers()], self.exchange)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Where experts are spread, averages the gradients of everything else."""
        if self.exchange is not None:
            # An optimizer moves on what it remembers, also where a step has met no token.
            expert_parallel.gradients(self._parameters_of(own=True))
            expert_parallel.average(self._parameters_of(own=False), self.exchange)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the Trainer says; a norm is that over all processes' experts."""
        if self.exchange is None or not gradient_clip_val or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            shared, own = (self._parameters_of(own) for own in (False, True))
            expert_parallel.clip_norm(shared, own, gradient_clip_val, self.exchange)

    def on_validation_epoch_start(self) -> None:
        """Draws one sample of the weights and rounds them once, for all validation batches."""
        if self.trainer.accumulate_grad_batches == 1:  # a step has used the gradients, and the next one drops them
            for parameter in self.parameters():
                parameter.grad = None
        self._validated = self.sampled_weights(-1, self.global_step, self._noise), self.hard_weights()
        trainer = self.trainer
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._batches = int(sum(batches))
        self._further = passes_of_others(self.block, self._batches)

    def on_validation_epoch_end(self) -> None:
        """Frees them."""
        del self._validated

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the losses of a sample and of the rounded weights on held-out sequences."""
        soft, hard = (self.loss(batch, weights) for weights in self._validated)
        for _ in range(self._further if batch_idx + 1 == self._batches else 0):
            for weights in self._validated:
                without_tokens(self.block, weights)
        losses = {"block/val_loss_soft": soft, "block/val_loss_hard": hard}
        self.log_dict({**losses, "step": float(self.first_step + self.global_step)}, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """The optimizer over logits and scales, with a cosine schedule that ends at the floor.

        Raises:
            ConfigurationError: the optimizer rounds its steps away, or the block is rounded and trains no more.
        """
        if all(quantizer.hard for _, quantizer in self.named_quantizers()):
            raise ConfigurationError(
                f"{self.name}: its weights are rounded (HardRounding), which ends their training; make a new module, "
                "or leave HardRounding to the last fit"
            )
        logits = [quantizer.logits for _, quantizer in self.named_quantizers()]
        scales = [part for _, quantizer in self.named_quantizers() for part in quantizer.scale_parameters()]
        optimizer = self.optimizer(block_groups(logits, scales, self.scale_learning_rate))
        check_rounding(optimizer, logits)
        schedule = cosine_to_floor(optimizer, self.trainer.estimated_stepping_batches, self.learning_rate_floor)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    @torch.no_grad()
    def flip_rate(self, rows: Mapping[str, Tensor] | None = None) -> float:
        """The share of codes that differ from the warm start, over the experts of all processes.

        Args:
            rows: Rows of each weight that stay trained, by name: bool ``O``; the others count as at the start. None
                for all.
        """
        counts = torch.zeros(2, 2, dtype=torch.float64)
        for name, weight in self.named_weights():
            for _, part in weight.parts():
                moved_OI = part.codes_OI() != part.start_codes
                changed = int((moved_OI if rows is None else moved_OI[rows[name].to(moved_OI.device)]).sum())
                counts[int(name in self.own)] += torch.tensor([changed, part.start_codes.numel()])
        if self.exchange is not None:
            counts[1] = self.exchange.sum(counts[1].to(self.exchange.device)).cpu()
        flipped, total = counts.sum(0).tolist()
        return float(flipped / total)

    def _dense(self, tensors: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
        return {site.name: site.from_matrix(tensors[site.name].dequantize()) for site in self.sites}


def block_groups(
    logits: list[nn.Parameter], scales: list[nn.Parameter], scale_learning_rate: float
) -> list[dict[str, Any]]:
    """The optimizer's parameter groups."""
    return [
        {"params": logits, "name": "logits"},
        {"params": scales, "name": "scales", "lr": scale_learning_rate, "weight_decay": 0.0},
    ]


def check_rounding(optimizer: torch.optim.Optimizer, logits: Iterable[Tensor]) -> None:
    """Verifies that the optimizer moves logits as they are stored.

    Raises:
        ConfigurationError: they are bfloat16, and it would round its steps away.
    """
    if any(p.dtype == torch.bfloat16 for p in logits) and not isinstance(optimizer, (Lion, Adam)):
        raise ConfigurationError(
            f"gumbel.logits_dtype=bfloat16 needs an optimizer that rounds stochastically, got {type(optimizer)}; "
            "use lightning_gsq.training.Lion or lightning_gsq.training.Adam, or float32 logits"
        )
