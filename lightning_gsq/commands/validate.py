"""What ``validate`` does: the perplexity of any model that can be loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

from lightning.pytorch import Trainer
from rich.console import Console

from lightning_gsq.commands.addresses import written_model
from lightning_gsq.data import PerplexityData
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.estimate import limits
from lightning_gsq.models import loading
from lightning_gsq.run.agreement import compare
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.run.perplexity import Room, make_measure
from lightning_gsq.run.report import about_text
from lightning_gsq.run.standard_errors import with_error
from lightning_gsq.run.substitution import Substitution
from lightning_gsq.system.console import make_console
from lightning_gsq.system.processes import Ranks, check_shares
from lightning_gsq.training import ModelQuantization


def validate(
    model: ModelQuantization,
    evaluation: PerplexityData,
    activations: ActivationOptions,
    make_trainer: Callable[[], Trainer],
    console: Console,
    against: str | None = None,
) -> float:
    """Measures and prints the perplexity of a model, or of the model in a finished run folder.

    Args:
        model: The model, not loaded yet.
        evaluation: Text.
        activations: How hidden states are kept, where the model passes block by block.
        make_trainer: Makes a Trainer that only evaluates.
        console: Where to print.
        against: Another model, such as the original, to compare next tokens with: mean divergence, same first choice.

    Raises:
        ConfigurationError: the model cannot be loaded, or the text is too short.
    """
    finished = written_model(model.address.pretrained)
    source = dataclasses.replace(model.address, pretrained=finished).source()
    evaluation.check(loading.max_length(loading.load_config(source, quantized=True)))
    reference = None if against is None else _reference(against, evaluation)
    if reference is not None:
        with _said_of_against():
            loading.load_config(reference, quantized=True)
    model.load(source, quantized=True)
    evaluation.tokenize(model.tokenizer, model.network)
    trainer = make_trainer()
    room = Room(limits.device_bytes(trainer.strategy.root_device), limits.host_bytes())
    check_shares(trainer.world_size, evaluation__num_windows=len(evaluation.ids_NT))
    if trainer.global_rank:
        console = make_console(quiet=True)
    say = functools.partial(console.print, soft_wrap=True)
    with Ranks.joined(trainer) as ranks:
        measure = make_measure(model, evaluation, activations, make_trainer, room, say, ranks)
        perplexity = measure(Substitution(model))
    say(f"perplexity {perplexity}  ({about_text(evaluation.about(str(trainer.precision)))})")
    if reference is not None:
        with _said_of_against():
            other = loading.load_model(reference, model.address.dtype, quantized=True)
        with Ranks.joined(trainer) as ranks:
            agreement = compare(model.network, other, evaluation.ids_NT, trainer, ranks)
        divergence = with_error(agreement.divergence, agreement.divergence_error, 4)
        say(
            f"against {against}: mean KL divergence {divergence} nats a token, the same first choice for "
            f"{agreement.same_choice:.2%} of {agreement.tokens:,} tokens, perplexity there {agreement.perplexity:.3f}"
        )
    return perplexity.value


def _reference(against: str, evaluation: PerplexityData) -> loading.ModelSource:
    """The model to compare with; refused where whole models do not fit."""
    if evaluation.by_block is True:
        raise ConfigurationError("against: two models are compared as a whole; leave evaluation.by_block out")
    with _said_of_against():
        return loading.resolve(written_model(against))


@contextlib.contextmanager
def _said_of_against() -> Iterator[None]:
    """Names the option in what is wrong with the other model."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"against: {str(error).removeprefix('model.pretrained: ')}") from error
