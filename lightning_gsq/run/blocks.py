"""A run: full-precision perplexity, warm start, blocks one after another, the result. Resumable at every block.

Data flow of the block phase, with ``F`` the full-precision stream and ``Q`` the quantized one (hidden states of all
calibration sequences at the current depth):

    target = block(F)                       "stream", or block(Q) for "local"
    codes, scales = fit(block, Q -> target)
    Q <- quantized block(Q),  F <- block(F)
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gsq.callbacks import SaliencyThreshold
from lightning_gsq.data import CalibrationDataModule
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.chain import BlockCall, compiled_run_block, embed, find_blocks, run_block, trace
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.quantizers import GumbelQuantizer, InputStatistics, Matrix
from lightning_gsq.quantizers.salient import MixedQuantizer
from lightning_gsq.quantizers.warm_start import start_of
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.hidden_states import ActivationDataset, ActivationOptions, ActivationStore, first
from lightning_gsq.run.substitution import install
from lightning_gsq.saliency import Choice
from lightning_gsq.saliency.choose import settled_start, settled_tensor
from lightning_gsq.saliency.unsettled import UnsettledQuantizer
from lightning_gsq.system.compiling import compiler_available
from lightning_gsq.system.processes import Ranks
from lightning_gsq.system.seeding import generator_of, seed_of
from lightning_gsq.system.slices import slices
from lightning_gsq.system.stopwatch import Stopwatch
from lightning_gsq.training import BlockQuantization, ModelQuantization
from lightning_gsq.training.token_weights import inherited_weights, typical_energy
from lightning_gsq.weights.quantized import QuantizedWeight

FORWARD_TOKENS = 4096
"""Tokens that pass through a block at once where nothing is trained."""


class BlockwiseRun:
    """The phases of a run over one model, folder and set of calibration sequences.

    Args:
        model: The model, loaded, and its settings.
        data: Calibration sequences, tokenised.
        plan: What to do with which block.
        folder: The run folder.
        make_trainer: Makes a Trainer with the user's settings; called once a block.
        activations: How hidden states are kept.
        seed: Seed of everything random.
        say: Prints a line for the user.
        ranks: This process among those that share the sequences.
    """

    def __init__(
        self,
        model: ModelQuantization,
        data: CalibrationDataModule,
        plan: list[BlockPlan],
        folder: RunFolder,
        make_trainer: Callable[..., Trainer],
        activations: ActivationOptions,
        seed: int,
        say: Callable[[str], None],
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    ) -> None:
        self.model, self.data, self.folder, self.seed, self.say = model, data, folder, seed, say
        self.ranks = ranks
        self.train_ids_NT = ranks.share(data.train_ids_NT)
        self.validation_ids_NT = ranks.share(data.validation_ids_NT, even=False)
        self.make_trainer, self.activations = make_trainer, activations
        self.plan, self.blocks = plan, find_blocks(model.network)[1]
        self.watch = Stopwatch()
        self.trainer = self._watched_trainer()
        self.saliency = _saliency(self.trainer, model, plan)
        self.device = self.trainer.strategy.root_device
        compiled = model.compile_blocks and compiler_available(self.device.type)
        self.run_block = compiled_run_block() if compiled else run_block
        self.forward_size = max(1, FORWARD_TOKENS // data.sequence_length)
        traced = trace(model.network, data.train_ids_NT[:1])
        self.calls: list[BlockCall] = traced.calls
        self.width = traced.output_BTD.shape[-1]

    # -- phases

    def warm_start(self) -> list[dict[str, QuantizedWeight]]:
        """The warm start alone, every block on the activations of the blocks before it, as a plain GPTQ run does.

        Returns:
            The quantized weights of each planned block. The model is left as it was.
        """
        if self.ranks.agree(self.folder.has_blocks("warm_start", [plan.index for plan in self.plan])):
            return [self.folder.read_block("warm_start", plan.index, plan.expected) for plan in self.plan]
        count = self._hessian_sequences if self.model.warm_start.needs_hessian else 0
        with self._store(count, streams=1) as store:
            hidden = store.new()
            self._embed(self.train_ids_NT[:count], hidden)
            plans = {plan.index: plan for plan in self.plan}
            results = []
            for index in range(self.plan[-1].index + 1):
                block = self._working_copy(index)
                if index in plans:
                    matrices = self._matrices(plans[index], block, hidden)
                    choices = self._choose(matrices)
                    own, dtype = self.model.warm_start, self.model.scale_dtype
                    with self.watch("warm_start"):
                        tensors = {
                            name: to_cpu(settled_tensor(matrix, choices.get(name), own, dtype))
                            for name, matrix in matrices.items()
                        }
                    self.folder.write_block("warm_start", index, tensors)
                    results.append(tensors)
                    install(block, plans[index], tensors)
                self._propagate(block, index, hidden, hidden)
        return results

    def train_blocks(self, finished: Callable[[BlockPlan, float, dict[str, float]], None]) -> None:
        """Trains every planned block that has no file yet. The model is left as it was.

        Args:
            finished: Called after each block with its plan, its seconds and its measures.
        """
        done = self._finished_blocks()
        if len(done) < len(self.plan):
            if done:
                self.say(f"Resuming after {len(done)} finished of {len(self.plan)} blocks")
            self._train_missing(done, finished)

    # -- steps

    def _train_missing(
        self,
        done: dict[int, dict[str, QuantizedWeight]],
        finished: Callable[[BlockPlan, float, dict[str, float]], None],
    ) -> None:
        plans = {plan.index: plan for plan in self.plan}
        ids_NT = torch.cat([self.train_ids_NT, self.validation_ids_NT])
        stream = self.model.target == "stream"
        with self._store(len(ids_NT), streams=3 if stream else 2) as store:
            quantized, target = store.new(), store.new()
            self._embed(ids_NT, quantized)
            if stream:
                full = store.new()
                full.copy_(quantized)
            for index in range(self.plan[-1].index + 1):
                began = time.perf_counter()
                self.watch.take()
                measures: dict[str, float] = {}
                block = self._working_copy(index)
                plan = plans.get(index)
                if stream:
                    self._propagate(block, index, full, target)
                elif plan is not None and index not in done:
                    self._propagate(block, index, quantized, target)
                if plan is not None:
                    tensors = done.get(index)
                    if tensors is None:
                        weights_NT = self._token_weights(quantized, full) if stream else None
                        tensors, measures = self._fit(plan, block, quantized, target, weights_NT)
                        # A Trainer and its module refer to each other: without this, the logits and optimizer
                        # states of many blocks pile up before Python looks for such cycles by itself.
                        gc.collect()
                        self.folder.write_block("block", index, tensors)
                    install(block, plan, tensors)
                self._propagate(block, index, quantized, quantized)
                if stream:
                    full, target = target, full
                if plan is not None and index not in done:
                    parts = {f"seconds/{part}": seconds for part, seconds in self.watch.take().items()}
                    finished(plan, time.perf_counter() - began, measures | parts)

    def _fit(
        self, plan: BlockPlan, block: nn.Module, inputs_NTD: Tensor, targets_NTD: Tensor, weights_NT: Tensor | None
    ) -> tuple[dict[str, QuantizedWeight], dict[str, float]]:
        train = len(self.train_ids_NT)
        streams = (inputs_NTD, targets_NTD, *([] if weights_NT is None else [weights_NT]))
        training = ActivationDataset(*(stream[:train] for stream in streams))
        matrices = self._matrices(plan, block, inputs_NTD[: self._hessian_sequences])
        quantizers = {site: self._quantizer(plan, site, matrices[site.name]) for site in plan.weights}
        module = BlockQuantization(
            block,
            self.calls[plan.index],
            quantizers,
            self.model.optimizer,
            scale_learning_rate=self.model.scale_learning_rate,
            learning_rate_floor=self.model.learning_rate_floor,
            target_power=self._mean_square(*training.tensors[1:]),
            index=plan.index,
            name=plan.name,
            seed=self.seed,
            position=(self.plan.index(plan), len(self.plan)),
            run=self.run_block,
        )
        del matrices, quantizers  # with the Hessians, as large as the weights; needed no more once the fit is set up
        own = (self.ranks.rank,) if self.ranks.rank else ()
        order = torch.Generator().manual_seed(seed_of(self.seed, plan.index, "order", *own))
        size = self.data.batch_size
        loader = DataLoader(
            training,
            batch_size=size,
            shuffle=True,
            generator=order,
            collate_fn=first,
            drop_last=train >= size,
            pin_memory=self.device.type == "cuda",  # copied while the step before still computes
        )
        held_out = DataLoader(
            ActivationDataset(*(stream[train:] for stream in streams)), batch_size=size, collate_fn=first
        )
        trainer = self._watched_trainer()
        with self.watch("training"):
            trainer.fit(module, loader, held_out)
        if trainer.interrupted:
            raise KeyboardInterrupt
        # Lightning binds it to the module: callbacks outlive a block, and would keep its training state alive.
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            vars(callback).pop("log", None)
            vars(callback).pop("log_dict", None)
        module.to(self.device)
        weights = {"start": module.start_weights(), "trained": module.hard_weights()}
        with self.watch("check"):
            measures = {key: self._error(module, held_out, own) for key, own in weights.items()}
        worse = not measures["trained"] <= measures["start"]
        if worse:
            self.say(
                f"{plan.name}: training raised the held-out error from {measures['start']:.4g} to "
                f"{measures['trained']:.4g}; the block keeps its warm start"
            )
        measures["final"] = measures["start" if worse else "trained"]
        flipped = sum(int((q.codes_OI() != q.start_codes).sum()) for _, q in module.named_quantizers())
        measures["flip_rate"] = flipped / sum(q.start_codes.numel() for _, q in module.named_quantizers())
        dtype = self.model.scale_dtype
        tensors = {
            name: to_cpu(quantizer.start_tensor(dtype) if worse else quantizer.harden(dtype))
            for name, quantizer in module.named_weights()
        }
        return tensors, measures | {key: float(value) for key, value in trainer.callback_metrics.items()}

    def _matrices(self, plan: BlockPlan, block: nn.Module, inputs_NTD: Tensor) -> dict[str, Matrix]:
        """The block's weights with the second moments of their inputs."""
        needed = self.model.warm_start.needs_hessian
        statistics = InputStatistics(list(plan.weights), self.device)
        if needed:
            with self.watch("statistics"), torch.no_grad(), statistics.watching(block), self._precision():
                for part in slices(len(inputs_NTD), self.forward_size):
                    run_block(block, self._fetch(inputs_NTD[part]), self.calls[plan.index].to(self.device))
            if self.ranks.world > 1:
                statistics.reduce(self.ranks.sum)
        return {
            site.name: Matrix(
                site.to_matrix(block.get_parameter(site.name)).detach().float(),
                statistics.hessians(site) if needed else None,
                scheme,
                f"{plan.name}.{site.name}",
            )
            for site, scheme in plan.weights.items()
        }

    def _choose(self, matrices: dict[str, Matrix]) -> dict[str, Choice]:
        """The salient part of each matrix whose scheme has one."""
        mixed = {name: matrix for name, matrix in matrices.items() if matrix.scheme.mixed}
        return self.saliency.choose(mixed) if self.saliency is not None else {}

    @torch.no_grad()
    def _quantizer(self, plan: BlockPlan, site: LinearSite, matrix: Matrix) -> GumbelQuantizer | UnsettledQuantizer:
        """The trainable form of a weight, from its warm start."""
        options, warm_start = self.model.gumbel, self.model.warm_start
        generator = generator_of(self.seed, plan.index, site.name, "logits")
        if not matrix.scheme.mixed:
            with self.watch("warm_start"):
                return GumbelQuantizer(start_of(matrix, warm_start), matrix.scheme, options, generator)

        def build(choice: Choice) -> MixedQuantizer:
            with self.watch("warm_start"), torch.no_grad():
                return MixedQuantizer(settled_start(matrix, choice, warm_start), choice.scheme, options, generator)

        return UnsettledQuantizer(site.name, matrix, build)

    @torch.no_grad()
    def _propagate(self, block: nn.Module, index: int, source_NTD: Tensor, out_NTD: Tensor) -> None:
        """Runs a block over a stream; ``out`` may be ``source``."""
        call = self.calls[index].to(self.device)
        with self.watch("streams"), self._precision():
            for part in slices(len(source_NTD), self.forward_size):
                out_NTD[part] = self.run_block(block, self._fetch(source_NTD[part]), call).to(out_NTD)

    @torch.no_grad()
    def _error(
        self, module: BlockQuantization, loader: Iterable[tuple[Tensor, ...]], weights: dict[str, Tensor]
    ) -> float:
        """Relative squared error of the block on held-out sequences."""
        total, count = 0.0, 0
        with self._precision():
            for batch in loader:
                own = tuple(tensor.to(self.device) for tensor in batch)
                total += float(module.loss(own, weights)) * len(own[0])
                count += len(own[0])
        total, count = self.ranks.sum(torch.tensor([total, count], dtype=torch.float64, device=self.device)).tolist()
        return total / count

    # -- helpers

    def _watched_trainer(self) -> Trainer:
        """A Trainer whose choice of salient weights counts as a part of its own."""
        trainer = self.make_trainer()
        for callback in getattr(trainer, "callbacks", []):
            if isinstance(callback, SaliencyThreshold):
                callback.watch = self.watch
        return trainer

    @property
    def _hessian_sequences(self) -> int:
        """This process's share of the sequences whose inputs the warm start sees."""
        return self.ranks.share_of(min(self.model.hessian_sequences, len(self.train_ids_NT) * self.ranks.world))

    def _mean_square(self, x_NTD: Tensor, weights_NT: Tensor | None = None) -> float:
        if weights_NT is None:
            return self._mean(sum(float(x.float().square().mean()) for x in x_NTD) / len(x_NTD))
        pairs = zip(x_NTD, weights_NT, strict=True)
        return self._mean(sum(float((x.float().square().mean(-1) * w).mean()) for x, w in pairs) / len(x_NTD))

    def _token_weights(self, quantized_NTD: Tensor, full_NTD: Tensor) -> Tensor | None:
        """How much each token counts in the loss; None where all count alike."""
        if self.model.inherited_error is None:
            return None
        tolerated = self.model.inherited_error * self._mean(typical_energy(full_NTD[: len(self.train_ids_NT)]))
        return inherited_weights(quantized_NTD, full_NTD, tolerated)

    def _mean(self, value: float) -> float:
        """Mean over the processes."""
        return float(self.ranks.sum(torch.tensor(value, dtype=torch.float64, device=self.device))) / self.ranks.world

    def _precision(self):  # type: ignore[no-untyped-def]  # a context manager of Lightning's, whose type varies
        return self.trainer.precision_plugin.forward_context()

    def _working_copy(self, index: int) -> nn.Module:
        """The block on the accelerator in fp32; the model itself stays where it is."""
        return copy.deepcopy(self.blocks[index]).to(self.device, torch.float32)

    def _fetch(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.device, torch.float32)

    def _embed(self, ids_NT: Tensor, out_NTD: Tensor) -> None:
        for part in slices(len(ids_NT), self.forward_size):
            out_NTD[part] = embed(self.model.network, ids_NT[part]).to(out_NTD.dtype)

    @contextmanager
    def _store(self, sequences: int, streams: int) -> Iterator[ActivationStore]:
        shape = (sequences, self.data.sequence_length, self.width)
        store = ActivationStore(shape, self.activations, streams)
        try:
            yield store
        finally:
            store.close()

    def _finished_blocks(self) -> dict[int, dict[str, QuantizedWeight]]:
        """Blocks on disk, up to the first that is missing."""
        done = {}
        there = [self.folder.has_blocks("block", [plan.index]) for plan in self.plan]
        for plan, exists in zip(self.plan, self.ranks.agree(there), strict=True):
            if not exists:
                break
            done[plan.index] = self.folder.read_block("block", plan.index, plan.expected)
        return done


def to_cpu(tensor: QuantizedWeight) -> QuantizedWeight:
    """The tensor as it is stored.

    Raises:
        ConfigurationError: a scale overflowed.
    """
    for scales in tensor.scales:
        if not bool(torch.isfinite(scales).all()):
            raise ConfigurationError(
                f"model.scale_dtype: a scale does not fit into {scales.dtype}; use bfloat16 or float32"
            )
    return tensor.cpu()


def _saliency(trainer: Trainer, model: ModelQuantization, plan: list[BlockPlan]) -> SaliencyThreshold | None:
    """The callback that settles salient weights; None where no scheme has any."""
    mixed = {scheme for own in plan for scheme in own.weights.values() if scheme.mixed}
    if not mixed:
        return None
    found = [callback for callback in getattr(trainer, "callbacks", []) if isinstance(callback, SaliencyThreshold)]
    if not found:
        raise ConfigurationError(
            "trainer.callbacks: salient weights and a budget need the callback "
            "lightning_gsq.callbacks.SaliencyThreshold"
        )
    element = any(scheme.salient is not None and scheme.salient.layout == "element" for scheme in mixed)
    if element and "blocks" in model.phases:
        raise ConfigurationError(
            "model.scheme.salient.layout: element is the published layout, which is not trained; use "
            "--model.phases [init], or structured"
        )
    return found[0]
