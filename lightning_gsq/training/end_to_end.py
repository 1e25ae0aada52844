"""The whole quantized model as a LightningModule: scales, and what else is asked for, against the original's logits.

Teacher and student are the same network. Its blocks' full-precision weights stay where they are; each block is run by a
:class:`StudentBlock`, which for the student computes its weights from codes and scales. Everything between the blocks
(embedding, masks, rotary embeddings, the last norm) is the model's own code.

Under the strategy ``fsdp2`` each of these blocks is one unit of :mod:`lightning_gsq.system.sharding`, the rest of the
model another; ``loss`` and ``teacher_top`` are its forward passes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from lightning_gsq.models.chain import find_blocks
from lightning_gsq.models.head import body, find_head, head_name, last_hidden
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.models.norms import norm_names
from lightning_gsq.models.standing_in import standing_in
from lightning_gsq.ops.distillation import IGNORED, Head, HiddenTarget, TopKTarget, distillation_loss
from lightning_gsq.quantizers.trained_scales import SCALE_PARAMETERS
from lightning_gsq.system.sharding import (
    FSDP2Strategy,
    idle_batch,
    is_sharded,
    local,
    passes_of_others,
    shard,
    whole,
)
from lightning_gsq.training.end_to_end_options import KINDS, EndToEndOptions, Trained, kind_of
from lightning_gsq.training.losses import loss_mean, refuse_non_finite
from lightning_gsq.training.schedule import cosine_to_floor
from lightning_gsq.training.step_shares import mean_share, scale_shares
from lightning_gsq.training.student_block import StudentBlock
from lightning_gsq.training.student_outer import StudentEnds, StudentOuter
from lightning_gsq.training.teacher import HeldOutStates, StoredTeacher, top_tokens
from lightning_gsq.weights.quantized import QuantizedWeight

Batch = list[Tensor]
"""Token ids ``B T``, and for a stored teacher its tokens and log-probabilities, each ``B T K``."""


WAY_OUT = (
    "lower the learning rates (--end_to_end.optimizer.init_args.lr and those beside it). What it began with is in the "
    "run folder: without end_to_end in --model.phases the run ends with it"
)


class EndToEndQuantization(LightningModule):
    """Trains group scales, and what else the options name, on the divergence from the full-precision model.

    Args:
        network: The full-precision model; frozen here, and left as it is.
        tensors: The quantized weights of each block, by the block's number.
        options: What trains and how.
        outer: The quantized weights outside of the blocks, by name in the model.

    Raises:
        ConfigurationError: the model's logits are not a linear map of its last hidden states.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tensors: Mapping[int, Mapping[LinearSite, QuantizedWeight]],
        options: EndToEndOptions,
        outer: Mapping[str, QuantizedWeight] | None = None,
    ) -> None:
        super().__init__()
        self.options = options
        self.network = network.requires_grad_(False)
        self.prefix, self.originals = find_blocks(network)
        head = find_head(network)  # its matrix is not kept: it may be spread over processes later
        self.logit_scale, self.softcap = head.scale, head.softcap
        norms = "norms" in options.train
        self.blocks = nn.ModuleDict(
            {
                str(index): StudentBlock(
                    block,
                    tensors.get(index, {}),
                    norm_names(block) if norms and index in tensors else [],
                    "codes" in options.train,
                    options.recompute,
                )
                for index, block in enumerate(self.originals)
            }
        )
        base = body(network)
        inside = {id(parameter) for block in self.originals for parameter in block.parameters()}
        self.norm_names = [n for n in norm_names(base) if norms and id(base.get_parameter(n)) not in inside]
        self.norms = nn.ParameterList(
            nn.Parameter(base.get_parameter(n).detach().float().clone()) for n in self.norm_names
        )
        self.head = nn.Parameter(head.weight_VD.detach().float().clone()) if "head" in options.train else None
        for name, parameter in self.named_parameters():
            if "scales" not in options.train and name.rpartition(".")[2] in SCALE_PARAMETERS:
                parameter.requires_grad_(False)
        self.outer = StudentOuter(network, outer or {}, trains="embedding" in options.train)
        # Means over the sequences of all processes, however many each of them has.
        self.held_out = nn.ModuleDict({name: loss_mean() for name in ("loss", "divergence", "cross_entropy")})
        self.stored: StoredTeacher | None = None
        """The teacher's stored tokens of the training sequences; what is missing is computed when the fit begins."""
        self.held_out_states = HeldOutStates()
        self.idle_passes = 0  # forward passes of a validation that other processes make and this one does not
        self.best_loss, self.last_loss, self.validated_step = math.inf, math.inf, -1
        self.start_divergence = math.inf  # of the first evaluation; as if far away where there was none
        self.best_state: dict[str, Tensor] = {}

    # -- the two models

    def teacher_hidden(self, ids_BT: Tensor) -> Tensor:
        """The last hidden states of the full-precision model, ``B T D``."""
        with torch.no_grad(), self._standing_in(as_teacher=True):
            return last_hidden(self.network, ids_BT)

    def student_hidden(self, ids_BT: Tensor, ends: StudentEnds | None = None) -> Tensor:
        """The last hidden states of the quantized model, ``B T D``; ``ends`` as they are at this step, if at hand."""
        outer = dict(zip(self.norm_names, self.norms, strict=True)) | (ends or self.outer()).inside
        with self._standing_in(as_teacher=False):
            return last_hidden(self.network, ids_BT, outer)

    def _standing_in(self, as_teacher: bool) -> AbstractContextManager[None]:
        blocks = {int(i): functools.partial(block, as_teacher=as_teacher) for i, block in self.blocks.items()}
        return standing_in(blocks, self.originals)

    @torch.no_grad()
    def teacher_top(self, ids_BT: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The full-precision model's ``k`` most probable next tokens and their log-probabilities, ``B T k`` each."""
        return top_tokens(self.teacher_hidden(ids_BT), self._head_here(), self.options.loss.temperature, k)

    def loss(self, batch: Batch, held_out: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the divergence and the cross-entropy of a batch; ``held_out`` is the number of a held-out one."""
        ids_BT = batch[0]
        teacher = self._head_here()
        if len(batch) == 3:
            target: HiddenTarget | TopKTarget = TopKTarget(batch[1].flatten(0, 1), batch[2].flatten(0, 1))
        else:
            if held_out is None or is_sharded(self):  # spread: all make the same passes, and some have fewer batches
                hidden_BTD = self.teacher_hidden(ids_BT)
            else:
                hidden_BTD = self.held_out_states.of(held_out, ids_BT, self.teacher_hidden)
            target = HiddenTarget(hidden_BTD.flatten(0, 1), teacher)
        labels_BT = torch.nn.functional.pad(ids_BT[:, 1:], (0, 1), value=IGNORED)
        ends = self.outer()
        matrix = ends.head if self.head is None else self.head
        head = teacher if matrix is None else Head(matrix, teacher.bias_V, teacher.scale, teacher.softcap)
        return distillation_loss(
            self.student_hidden(ids_BT, ends).flatten(0, 1),
            head,
            target,
            labels_BT.flatten(),
            temperature=self.options.loss.temperature,
            cross_entropy=self.options.loss.cross_entropy,
            chunk=self.options.loss.chunk,
        )

    # -- Lightning

    def configure_model(self) -> None:
        """Spreads the module over the processes if the strategy asks for it."""
        if isinstance(self.trainer.strategy, FSDP2Strategy) and not is_sharded(self):
            mesh = self.trainer.strategy.device_mesh["data_parallel"]
            shard(self, self.blocks.values(), mesh, ("loss", "teacher_top"))

    def on_fit_start(self) -> None:
        """Computes what is missing of the stored teacher."""
        if self.stored is not None:
            missing = self.stored.missing(self.global_rank, self.trainer.world_size)
            size, k = self.options.passes.batch_size, self.stored.k
            idle = passes_of_others(self, self.stored.passes(missing, size)) if is_sharded(self) else 0
            with self.trainer.precision_plugin.forward_context():
                self.stored.compute(missing, lambda ids_BT: self.teacher_top(ids_BT.to(self.device), k), size)
            for _ in range(idle):
                self.teacher_top(idle_batch(self.device), k)
            self.trainer.strategy.barrier()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch.

        Raises:
            NonFiniteLossError: it is NaN or infinite.
        """
        loss, kl, ce = self.loss(batch)
        refuse_non_finite(loss, f"the loss of the end-to-end phase at step {self.global_step}", WAY_OUT)
        figures = (("loss", loss.detach()), ("divergence", kl), ("cross_entropy", ce))
        self.log_dict({f"end_to_end/{name}": value for name, value in figures})
        return loss

    def on_validation_start(self) -> None:
        """Learns how many batches the others have: held-out sequences are not always divided evenly."""
        batches = sum(int(count) for count in self.trainer.num_val_batches)
        self.idle_passes = passes_of_others(self, batches) if is_sharded(self) else 0

    def on_validation_batch_end(self, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Takes part in the last batches of the others, before the means over all processes are computed."""
        if batch_idx + 1 == sum(int(count) for count in self.trainer.num_val_batches):
            for _ in range(self.idle_passes):
                self.loss([idle_batch(self.device)])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the losses of some held-out sequences, scales rounded as they are stored."""
        values = self.loss(batch, batch_idx)
        refuse_non_finite(
            values[0],
            f"the held-out loss of the end-to-end phase in batch {batch_idx + 1} after step {self.global_step}",
            WAY_OUT,
        )
        for (name, mean), value in zip(self.held_out.items(), values, strict=True):
            assert isinstance(mean, MeanMetric)
            mean.update(value, weight=len(batch[0]))
            self.log(f"end_to_end/val_{name}", mean, metric_attribute=f"held_out.{name}")

    def on_validation_end(self) -> None:
        """Keeps the state if it is the best so far."""
        loss = self.last_loss = float(self.trainer.callback_metrics["end_to_end/val_loss"])
        if self.validated_step < 0:
            self.start_divergence = float(self.trainer.callback_metrics["end_to_end/val_divergence"])
        self.validated_step = self.trainer.global_step
        if loss < self.best_loss:
            self.best_loss = loss
            self.best_state = {name: local(p.detach()).cpu().clone() for name, p in self.trained()}

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that train, with their names."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    @torch.no_grad()
    def restore_best(self) -> None:
        """Goes back to the state with the lowest validation loss."""
        for name, parameter in self.trained():
            local(parameter).copy_(self.best_state[name])

    def configure_optimizers(self) -> Any:
        """One parameter group for each kind of parameter and width; rates rise, then fall to the floor."""
        groups: dict[tuple[Trained, float], list[nn.Parameter]] = {(kind, 1.0): [] for kind in KINDS}
        blocks: Any = self.blocks.values()
        divergence = self.start_divergence
        shares, norm_share = scale_shares([*blocks, self.outer], divergence), mean_share(blocks, divergence)
        for name, parameter in self.trained():
            kind = kind_of(name)
            share = norm_share if kind == "norms" else shares.get(parameter, 1.0)
            groups.setdefault((kind, share), []).append(parameter)
        rates = self.options.rates
        optimizer = rates.make_optimizer(groups)
        schedule = cosine_to_floor(optimizer, self.trainer.estimated_stepping_batches, rates.floor, rates.warmup)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    # -- results

    def tensors(self) -> Iterator[tuple[int, dict[str, QuantizedWeight]]]:
        """The quantized weights as they stand: a block's number, and its weights by name inside the block.

        Those of a block hold until the next is asked for; sharded, all processes have to ask.
        """
        for index, block in self.blocks.items():
            assert isinstance(block, StudentBlock)
            if block.sites:
                with whole(block):
                    yield int(index), block.tensors()

    def outer_tensors(self) -> dict[str, QuantizedWeight]:
        """The quantized weights outside of the blocks as they stand, by name; all processes have to ask."""
        with whole(self):
            return {name: tensor.cpu() for name, tensor in self.outer.tensors().items()}

    def dense(self) -> dict[str, Tensor]:
        """Norms and head as they stand, fp32 on the CPU, by parameter name in the model; as in ``tensors``, of all."""

        def copied(names: list[str], parameters: Iterable[Tensor]) -> dict[str, Tensor]:
            return {name: p.detach().cpu().clone() for name, p in zip(names, parameters, strict=True)}

        base = body(self.network)
        with whole(self):
            network = {id(parameter): name for name, parameter in self.network.named_parameters(remove_duplicate=False)}
            copies = copied([network[id(base.get_parameter(name))] for name in self.norm_names], self.norms)
            if self.head is not None:
                copies |= copied([head_name(self.network)], [self.head])
        for index, block in self.blocks.items():
            assert isinstance(block, StudentBlock)
            if block.norm_names:
                with whole(block):
                    copies |= copied([f"{self.prefix}.{index}.{name}" for name in block.norm_names], block.norms)
        return copies

    def _head_here(self) -> Head:
        """The teacher's head on the device where the module is now."""
        embedding = self.network.get_output_embeddings()
        return Head(embedding.weight, getattr(embedding, "bias", None), self.logit_scale, self.softcap)
