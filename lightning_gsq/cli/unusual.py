"""Lines on settings of ``fit`` that somebody may not know to have made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning.pytorch import Callback

from lightning_gsq.callbacks import GumbelAnnealing
from lightning_gsq.commands.addresses import is_written_here
from lightning_gsq.training import ModelQuantization


def unusual(model: ModelQuantization, callbacks: Sequence[Callback]) -> Iterator[str]:
    """What to say of a run before it begins.

    Args:
        model: The model and its settings; not loaded.
        callbacks: Those of its Trainers.
    """
    address = model.address
    if "blocks" in model.phases and not any(isinstance(callback, GumbelAnnealing) for callback in callbacks):
        yield (
            "note: trainer.callbacks holds no GumbelAnnealing: temperature and logit scale stay where they start, "
            "and blocks come out worse; --trainer.callbacks GumbelAnnealing adds it"
        )
    if is_written_here(address.pretrained):
        yield (
            f"note: {address.pretrained} was written by a run or an export: its weights are quantized already, and "
            "what is called full precision below is these"
        )
    if address.trust_remote_code:
        yield f"note: Python code that comes with {address.pretrained} is run (model.trust_remote_code)"
