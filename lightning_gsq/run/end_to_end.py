"""The end-to-end phase of a run: the teacher, the Trainer, the files, and whether the result stands.

What it leaves in the run folder:

    blocks/end_to_end-003.safetensors   the block with its new scales, beside the blocks phase's own file
    end_to_end.safetensors              norms and head if they trained; in its header the settings and the losses
    teacher/                            the teacher's most probable tokens, if ``top_k`` asks for them

``end_to_end.safetensors`` is written last: a phase that has it is finished and is not run again. A phase that was
killed begins anew, from the blocks' result and with the teacher's stored tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_gsq.callbacks import EndToEndProgress
from lightning_gsq.data import CalibrationDataModule
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.head import find_head
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.blocks import to_cpu
from lightning_gsq.run.folder import RunFolder, compare
from lightning_gsq.run.recipe import WATCHERS
from lightning_gsq.system.fingerprint import fingerprint
from lightning_gsq.system.processes import Ranks
from lightning_gsq.system.seeding import generator_of
from lightning_gsq.system.sharding import private_copy
from lightning_gsq.training import EndToEndOptions, EndToEndQuantization, ModelQuantization
from lightning_gsq.training.teacher import StoredTeacher
from lightning_gsq.weights.quantized import QuantizedWeight

BESIDE_THE_RESULT = {"recompute", "chunk", "strategy"}
"""Settings that change what the phase costs, not what it finds."""


@dataclass(frozen=True)
class EndToEndResult:
    """What the phase found.

    Args:
        report: ``start`` and ``final`` held-out losses, ``rejected``, ``seconds``, ``settings``, ``blocks``.
        dense: Norms and head if they trained, fp32 by parameter name.
    """

    report: dict[str, Any]
    dense: dict[str, Tensor]

    @property
    def rejected(self) -> bool:
        """Whether no state was better than the blocks' result."""
        return bool(self.report["rejected"])


def check_end_to_end(
    model: ModelQuantization, options: EndToEndOptions, settings: dict[str, Any], folder: RunFolder, trainer: Trainer
) -> None:
    """Verifies, before the blocks, that the phase can do what it is asked for.

    Raises:
        ConfigurationError: it cannot, or the folder holds a finished phase with other settings.
    """
    vocabulary = len(find_head(model.network).weight_VD)
    if options.top_k is not None and options.top_k > vocabulary:
        raise ConfigurationError(
            f"end_to_end.top_k: {options.top_k} tokens were asked for, the vocabulary has {vocabulary}"
        )
    if trainer.limit_val_batches == 0:
        raise ConfigurationError(
            "trainer.limit_val_batches: the end-to-end phase keeps the state that is best on the held-out sequences, "
            "so it needs them; leave the option out"
        )
    logits = "logits" in options.train and model.gumbel.logits_dtype != "float32"
    if logits and _is_spread(options, trainer.world_size):
        raise ConfigurationError(
            f"model.gumbel.logits_dtype: {options.strategy} takes one dtype for all that trains, and scales train in "
            f"float32; got {model.gumbel.logits_dtype}. Use float32, or leave logits out of end_to_end.train"
        )
    known = folder.read_dense("end_to_end")
    if known is not None:
        _refuse_another(folder, known[1], _kept(settings))


def _is_spread(options: EndToEndOptions, world: int) -> bool:
    """Whether the model is spread over the processes; one has nobody to share it with."""
    return options.strategy is not None and world > 1


def _kept(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in BESIDE_THE_RESULT}


def _refuse_another(
    folder: RunFolder, report: dict[str, Any], settings: dict[str, Any], blocks: str | None = None
) -> None:
    differences = compare(report["settings"], settings, "end_to_end.")
    if blocks is not None and report["blocks"] != blocks:
        differences.append("blocks: the phase started from other codes and scales")
    if differences:
        raise ConfigurationError(
            f"end_to_end: {folder.root} holds a finished end-to-end phase of another kind; delete "
            f"{folder.dense_file('end_to_end')} to have it run again. What differs:\n"
            + "\n".join(f"  {line}" for line in differences)
        )


def run_end_to_end(
    model: ModelQuantization,
    data: CalibrationDataModule,
    plan: list[BlockPlan],
    start: list[dict[str, QuantizedWeight]],
    options: EndToEndOptions,
    settings: dict[str, Any],
    folder: RunFolder,
    make_trainer: Callable[..., Trainer],
    seed: int,
    say: Callable[[str], None],
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
) -> EndToEndResult:
    """Trains the quantized model end to end, or reads what a finished phase left.

    Args:
        model: The full-precision model and the settings of its quantization.
        data: Calibration sequences, tokenised.
        plan: The quantized weights of each block.
        start: Their codes and scales so far.
        options: What trains and how.
        settings: The same as plain data, to be kept with the result.
        folder: The run folder.
        make_trainer: Makes a Trainer with the user's settings, some of them replaced.
        seed: Seed of everything random.
        say: Prints a line for the user.
        ranks: This process among those that share the sequences.

    Raises:
        ConfigurationError: the folder holds a finished phase with other settings or of other blocks.
    """
    settings = _kept(settings)
    blocks = fingerprint(part for own in start for t in own.values() for part in t.parts())
    known = folder.read_dense("end_to_end")
    if ranks.agree(known is not None):
        assert known is not None
        dense, report = known
        _refuse_another(folder, report, settings, blocks)
        return EndToEndResult(report, dense)

    began = time.perf_counter()
    # What an earlier end of this phase left behind, if its file was deleted, is not true of the coming one.
    perplexity = folder.progress.get("perplexity", {})
    folder.update_progress(perplexity={k: v for k, v in perplexity.items() if k != "end_to_end"}, model=None)
    callbacks: list[Callback] = make_trainer().callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
    quiet = [callback for callback in callbacks if not isinstance(callback, WATCHERS)]
    own: dict[str, Any] = {}
    if options.accumulate_grad_batches is not None:
        own["accumulate_grad_batches"] = options.accumulate_grad_batches
    spread = _is_spread(options, ranks.world)
    if spread:
        own["strategy"] = options.strategy
    batches = max(1, data.num_sequences // ranks.world // options.batch_size)
    trainer = make_trainer(
        max_epochs=options.max_epochs,
        max_steps=options.max_steps,
        val_check_interval=max(1, batches // options.validations),
        check_val_every_n_epoch=None,  # counts batches across passes, however few a pass has
        callbacks=[*quiet, EndToEndProgress()],
        **own,
    )
    module = EndToEndQuantization(
        private_copy(model.network) if spread else model.network,
        {
            own.index: {site: tensors[site.name] for site in own.weights}
            for own, tensors in zip(plan, start, strict=True)
        },
        options,
        model.gumbel,
        seed,
    )
    sequences: Dataset[Any] = TensorDataset(data.train_ids_NT)
    if options.top_k is not None:
        key = {
            "text": fingerprint([data.train_ids_NT]),
            "temperature": str(options.temperature),
            "top_k": str(options.top_k),
        }
        sequences = module.stored = StoredTeacher(folder.root / "teacher", data.train_ids_NT, options.top_k, key)
    own_numbers = ranks.share(torch.arange(data.num_sequences)).tolist()
    loader = DataLoader(
        Subset(sequences, own_numbers),
        batch_size=options.batch_size,
        shuffle=True,
        generator=generator_of(seed, "end_to_end", "order", *([ranks.rank] if ranks.rank else [])),
        drop_last=len(own_numbers) >= options.batch_size,
    )
    held_out = DataLoader(TensorDataset(ranks.share(data.validation_ids_NT, even=False)), batch_size=options.batch_size)
    (found,) = trainer.validate(module, held_out, verbose=False)
    start_loss = float(found["end_to_end/val_loss"])
    trainer.fit(module, loader, held_out)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if module.validated_step != trainer.global_step:
        trainer.validate(module, held_out, verbose=False)
    rejected = not module.best_loss < start_loss
    module.restore_best()
    dense = {} if rejected else module.dense()
    report = {
        "start": start_loss,
        "final": module.best_loss,
        "trained": module.last_loss,
        "rejected": rejected,
        "seconds": time.perf_counter() - began,
        "settings": settings,
        "blocks": blocks,
    }
    if rejected:
        say(
            f"The end-to-end phase did not lower the held-out loss of {start_loss:.4g} (it ended at "
            f"{module.last_loss:.4g}): the result of the blocks stands"
        )
    else:
        for index, tensors in module.tensors():
            folder.write_block("end_to_end", index, {n: to_cpu(t) for n, t in tensors.items()})
    folder.write_dense("end_to_end", dense, report)
    ranks.wait()
    return EndToEndResult(report, dense)
