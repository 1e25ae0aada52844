"""The end-to-end phase of a run: the teacher, the Trainer, the files, and whether the result stands.

What it leaves in the run folder:

    blocks/end_to_end-003.safetensors   the block with its new scales, beside the blocks phase's own file
    blocks/end_to_end-outer.safetensors the same of embedding and head, where these are quantized
    end_to_end.safetensors              norms and head if they trained; in its header the settings and the losses
    teacher/                            the teacher's most probable tokens, if ``top_k`` asks for them

``end_to_end.safetensors`` is written last: a phase that has it is finished and is not run again. A phase that was
killed begins anew, from the blocks' result and with the teacher's stored tokens.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.ends import find_ends
from lightning_gsq.models.head import find_head
from lightning_gsq.run.block_files import Blocks
from lightning_gsq.run.blocks import made_by
from lightning_gsq.run.end_to_end_files import (
    EndToEndResult,
    finished_phase,
    on_disk,
    refuse_other_settings,
    write_blocks,
)
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.run import Run
from lightning_gsq.system.fingerprint import fingerprint
from lightning_gsq.system.seeding import generator_of
from lightning_gsq.system.sharding import private_copy
from lightning_gsq.training import EndToEndOptions, EndToEndQuantization, ModelQuantization
from lightning_gsq.training.teacher import StoredTeacher

BESIDE_THE_RESULT = {"recompute", "chunk", "strategy"}
"""Settings that change what the phase costs, not what it finds."""


def check_end_to_end(
    model: ModelQuantization, options: EndToEndOptions, settings: dict[str, Any], folder: RunFolder
) -> None:
    """Verifies, before the blocks, that the phase can do what it is asked for.

    Raises:
        ConfigurationError: it cannot, or the folder holds a finished phase with other settings.
    """
    vocabulary, top_k = len(find_head(model.network).weight_VD), options.loss.top_k
    if top_k is not None and top_k > vocabulary:
        raise ConfigurationError(f"end_to_end.top_k: {top_k} tokens were asked for, the vocabulary has {vocabulary}")
    _check_outer(model, options)
    finished = on_disk(folder, lambda _: None)
    if finished is not None:
        refuse_other_settings(folder, finished.report, _kept(settings))


def _check_outer(model: ModelQuantization, options: EndToEndOptions) -> None:
    """What trains outside of the blocks has to be there in the form in which it trains."""
    expected, ends = model.outer.expected(model.network), find_ends(model.network)
    if "embedding" in options.train and not expected:
        raise ConfigurationError(
            "end_to_end.train: embedding trains the scales of a quantized embedding or head, and neither is quantized; "
            "give --model.embedding, or leave embedding out"
        )
    if "head" in options.train and (ends.embedding if ends.tied else ends.head) in expected:
        option = "embedding, which the head is tied to," if ends.tied else "head"
        raise ConfigurationError(
            f"end_to_end.train: head trains a matrix that is not quantized, and model.{option} is; name embedding "
            "instead, which trains its scales, or leave it in 16 bits with null"
        )


def _is_spread(options: EndToEndOptions, world: int) -> bool:
    """Whether the model is spread over the processes; one has nobody to share it with."""
    return options.strategy is not None and world > 1


def _kept(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in BESIDE_THE_RESULT}


def run_end_to_end(
    run: Run,
    start: list[Blocks],
    outer: Blocks,
    options: EndToEndOptions,
    settings: dict[str, Any],
    progress: Callback | None = None,
) -> EndToEndResult:
    """Trains the quantized model end to end, or reads what a finished phase left.

    Args:
        run: The run.
        start: Codes and scales of each planned block so far.
        outer: Those of the weights outside of the blocks.
        options: What trains and how.
        settings: The same as plain data, to be kept with the result.
        progress: Shows how far the phase is.

    Raises:
        ConfigurationError: the folder holds a finished phase with other settings.
    """
    settings = _kept(settings)
    blocks = fingerprint(part for tensors in (*start, outer) for tensor in tensors.values() for part in tensor.parts())
    finished = run.ranks.agree(finished_phase(run, settings, blocks) if run.ranks.first else None)
    if finished is not None:
        return finished
    began = time.perf_counter()
    # What an earlier end of this phase left behind is not true of the coming one.
    if run.ranks.first:
        run.folder.dense_file("end_to_end").unlink(missing_ok=True)
    trainer = _trainer(run, options, [] if progress is None else [progress])
    module = _module(run, start, outer, options)
    training, held_out = _batches(run, module, options)
    start_loss = _train(trainer, module, training, held_out)
    rejected = not module.best_loss < start_loss
    module.restore_best()
    dense = {} if rejected else module.dense()
    if rejected:
        run.say(
            f"The end-to-end phase did not lower the held-out loss of {start_loss:.4g} (it ended at "
            f"{module.last_loss:.4g}): what it began with stands"
        )
    report = {
        "start": start_loss,
        "final": module.best_loss,
        "trained": module.last_loss,
        "rejected": rejected,
        "seconds": time.perf_counter() - began,
        "settings": settings,
        "blocks": blocks,
        "weights": {} if rejected else write_blocks(run, module, bool(outer)),
        "made_by": made_by(run),
    }
    run.folder.write_dense("end_to_end", dense, report)
    run.ranks.wait()
    return EndToEndResult(report, dense)


def _trainer(run: Run, options: EndToEndOptions, watching: list[Callback]) -> Trainer:
    """The phase's Trainer: the user's, with this phase's lengths, and without what is for blocks alone."""
    callbacks: list[Callback] = run.make_trainer().callbacks  # type: ignore[attr-defined]  # Lightning's connector
    replaced: dict[str, Any] = {}
    if options.passes.accumulate_grad_batches is not None:
        replaced["accumulate_grad_batches"] = options.passes.accumulate_grad_batches
    if _is_spread(options, run.ranks.world):
        replaced["strategy"] = options.strategy
    batches = max(1, run.data.num_sequences // run.ranks.world // options.passes.batch_size)
    return run.make_trainer(
        max_epochs=options.passes.max_epochs,
        max_steps=options.passes.max_steps,
        val_check_interval=max(1, batches // options.passes.validations),
        check_val_every_n_epoch=None,  # counts batches across passes, however few a pass has
        callbacks=[*(c for c in callbacks if not getattr(c, "blocks_only", False)), *watching],
        **replaced,
    )


def _module(run: Run, start: list[Blocks], outer: Blocks, options: EndToEndOptions) -> EndToEndQuantization:
    network = run.model.network
    return EndToEndQuantization(
        private_copy(network) if _is_spread(options, run.ranks.world) else network,
        {
            plan.index: {site: tensors[site.name] for site in plan.weights}
            for plan, tensors in zip(run.plan, start, strict=True)
        },
        options,
        outer,
    )


def _batches(
    run: Run, module: EndToEndQuantization, options: EndToEndOptions
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """This process's training batches and held-out ones; where tokens of the teacher are stored, they come along."""
    train_ids_NT, ranks = run.data.train_ids_NT, run.ranks
    sequences: Dataset[Any] = TensorDataset(train_ids_NT)
    if options.loss.top_k is not None:
        key = {
            "model": run.recipe["fingerprints"]["model"],
            "text": fingerprint([train_ids_NT]),
            "temperature": str(options.loss.temperature),
            "top_k": str(options.loss.top_k),
        }
        sequences = module.stored = StoredTeacher(run.folder.root / "teacher", train_ids_NT, options.loss.top_k, key)
    numbers = ranks.share(torch.arange(run.data.num_sequences)).tolist()
    training: DataLoader[Any] = DataLoader(
        Subset(sequences, numbers),
        batch_size=options.passes.batch_size,
        shuffle=True,
        generator=generator_of(run.seed, "end_to_end", "order", *([ranks.rank] if ranks.rank else [])),
        drop_last=len(numbers) >= options.passes.batch_size,
    )
    return training, DataLoader(TensorDataset(run.validation_ids_NT), batch_size=options.passes.batch_size)


def _train(
    trainer: Trainer, module: EndToEndQuantization, training: DataLoader[Any], held_out: DataLoader[Any]
) -> float:
    """Trains; returns the held-out loss before it."""
    (before,) = trainer.validate(module, held_out, verbose=False)
    trainer.fit(module, training, held_out)
    if module.validated_step != trainer.global_step:
        trainer.validate(module, held_out, verbose=False)
    return float(before["end_to_end/val_loss"])
