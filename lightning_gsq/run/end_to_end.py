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

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.head import find_head
from lightning_gsq.run.block_files import Blocks, DamagedFileError
from lightning_gsq.run.blocks import made_by
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.matrices import as_stored
from lightning_gsq.run.recipe import compare
from lightning_gsq.run.run import Run
from lightning_gsq.system.fingerprint import fingerprint
from lightning_gsq.system.seeding import generator_of
from lightning_gsq.system.sharding import private_copy
from lightning_gsq.training import EndToEndOptions, EndToEndQuantization, ModelQuantization
from lightning_gsq.training.teacher import StoredTeacher

BESIDE_THE_RESULT = {"recompute", "chunk", "strategy"}
"""Settings that change what the phase costs, not what it finds."""


@dataclass(frozen=True)
class EndToEndResult:
    """What the phase found.

    Args:
        report: ``start`` and ``final`` held-out losses, ``rejected``, ``seconds``, ``settings``, ``blocks`` (what it
            began with), ``weights`` (digests of what it ended with), ``made_by``.
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
    vocabulary, top_k = len(find_head(model.network).weight_VD), options.loss.top_k
    if top_k is not None and top_k > vocabulary:
        raise ConfigurationError(f"end_to_end.top_k: {top_k} tokens were asked for, the vocabulary has {vocabulary}")
    dtype = model.block.gumbel.logits_dtype
    if "logits" in options.train and dtype != "float32" and _is_spread(options, trainer.world_size):
        raise ConfigurationError(
            f"model.gumbel.logits_dtype: {options.strategy} takes one dtype for all that trains, and scales train in "
            f"float32; got {dtype}. Use float32, or leave logits out of end_to_end.train"
        )
    finished = _on_disk(folder, lambda _: None)
    if finished is not None:
        _refuse_other_settings(folder, finished.report, _kept(settings))


def _is_spread(options: EndToEndOptions, world: int) -> bool:
    """Whether the model is spread over the processes; one has nobody to share it with."""
    return options.strategy is not None and world > 1


def _kept(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in BESIDE_THE_RESULT}


def _refuse_other_settings(folder: RunFolder, report: dict[str, Any], settings: dict[str, Any]) -> None:
    differences = compare(report["settings"], settings, "end_to_end.")
    if differences:
        raise ConfigurationError(
            f"end_to_end: {folder.root} holds a finished end-to-end phase of another kind; delete "
            f"{folder.dense_file('end_to_end')} to have it run again. What differs:\n"
            + "\n".join(f"  {line}" for line in differences)
        )


def _on_disk(folder: RunFolder, say: Callable[[str], None]) -> EndToEndResult | None:
    """What a finished phase left in its own file; None where there is none that can be used."""
    try:
        content = folder.read_dense("end_to_end")
    except DamagedFileError as error:
        say(str(error))
        return None
    if content is None or not {"settings", "blocks", "weights", "rejected", "seconds"} <= set(content[1]):
        return None
    return EndToEndResult(content[1], content[0])


def _finished(run: Run, settings: dict[str, Any], blocks: str) -> EndToEndResult | None:
    """The finished phase, if all of it is there and began with these blocks; says what has to be made again."""
    result = _on_disk(run.folder, run.say)
    if result is None:
        return None
    _refuse_other_settings(run.folder, result.report, settings)
    again = "; the phase is run again"
    if result.report["blocks"] != blocks:
        run.say(f"The end-to-end phase began with other codes and scales than those of the blocks now{again}")
        return None
    parameters = dict(run.model.network.named_parameters(remove_duplicate=False))
    for name, value in result.dense.items():
        if name not in parameters or parameters[name].shape != value.shape:
            run.say(
                f"{run.folder.dense_file('end_to_end')} holds {name} in a shape that the model does not have{again}"
            )
            return None
    for plan in [] if result.rejected else run.plan:
        header = run.folder.header("end_to_end", plan.index)
        try:
            run.folder.read_block("end_to_end", plan.index, plan.expected)
        except DamagedFileError as error:
            run.say(str(error))
            return None
        if header is None or result.report["weights"].get(str(plan.index)) != header.digest:
            run.say(f"{plan.name} is not the one that the end-to-end phase ended with{again}")
            return None
    return result


def run_end_to_end(
    run: Run, start: list[Blocks], options: EndToEndOptions, settings: dict[str, Any], progress: Callback | None = None
) -> EndToEndResult:
    """Trains the quantized model end to end, or reads what a finished phase left.

    Args:
        run: The run.
        start: Codes and scales of each planned block so far.
        options: What trains and how.
        settings: The same as plain data, to be kept with the result.
        progress: Shows how far the phase is.

    Raises:
        ConfigurationError: the folder holds a finished phase with other settings.
    """
    settings = _kept(settings)
    blocks = fingerprint(part for tensors in start for tensor in tensors.values() for part in tensor.parts())
    finished = run.ranks.agree(_finished(run, settings, blocks) if run.ranks.first else None)
    if finished is not None:
        return finished
    began = time.perf_counter()
    # What an earlier end of this phase left behind is not true of the coming one.
    if run.ranks.first:
        run.folder.dense_file("end_to_end").unlink(missing_ok=True)
    trainer = _trainer(run, options, [] if progress is None else [progress])
    module = _module(run, start, options)
    training, held_out = _batches(run, module, options)
    start_loss = _train(trainer, module, training, held_out)
    rejected = not module.best_loss < start_loss
    module.restore_best()
    dense = {} if rejected else module.dense()
    if rejected:
        run.say(
            f"The end-to-end phase did not lower the held-out loss of {start_loss:.4g} (it ended at "
            f"{module.last_loss:.4g}): the result of the blocks stands"
        )
    report = {
        "start": start_loss,
        "final": module.best_loss,
        "trained": module.last_loss,
        "rejected": rejected,
        "seconds": time.perf_counter() - began,
        "settings": settings,
        "blocks": blocks,
        "weights": {} if rejected else _write_blocks(run, module),
        "made_by": made_by(run),
    }
    run.folder.write_dense("end_to_end", dense, report)
    run.ranks.wait()
    return EndToEndResult(report, dense)


def _write_blocks(run: Run, module: EndToEndQuantization) -> dict[str, str]:
    """Writes the blocks with what trained in them; digests by the block's number."""
    digests = {}
    for index, tensors in module.tensors():
        block, name = run.blocks[index], run.plan_of[index].name
        originals = {site.name: site.to_matrix(block.get_parameter(site.name)) for site in run.plan_of[index].weights}
        stored = {key: as_stored(tensors[key], w_OI, f"{name}.{key}") for key, w_OI in originals.items()}
        run.folder.write_block("end_to_end", index, stored)
        header = run.folder.header("end_to_end", index) if run.ranks.first else None
        digests[str(index)] = "" if header is None else header.digest
    return digests


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


def _module(run: Run, start: list[Blocks], options: EndToEndOptions) -> EndToEndQuantization:
    network = run.model.network
    return EndToEndQuantization(
        private_copy(network) if _is_spread(options, run.ranks.world) else network,
        {
            plan.index: {site: tensors[site.name] for site in plan.weights}
            for plan, tensors in zip(run.plan, start, strict=True)
        },
        options,
        run.model.block.gumbel,
        run.seed,
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
