"""The matrices outside of a decoder's blocks: the embedding, and the head, which may be the same one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError


@dataclass(frozen=True)
class Ends:
    """Names of the two matrices, ``V D`` each.

    Args:
        embedding: Parameter name of the embedding; None where the model has none that is one matrix.
        head: Parameter name of the head, also where it is the embedding; None where the model names none.
        tied: Whether the head is the embedding.
    """

    embedding: str | None
    head: str | None
    tied: bool


def find_ends(model: PreTrainedModel) -> Ends:
    """The ends of a model; its weights may be on the meta device."""
    embedding, head = _matrix(model, model.get_input_embeddings()), _matrix(model, model.get_output_embeddings())
    tied = embedding is not None and head is not None and embedding[1] is head[1]
    return Ends(embedding and embedding[0], head and head[0], tied)


def end_names(model: PreTrainedModel) -> list[str]:
    """Parameter names of the embedding and of a head of its own, as far as there are any."""
    ends = find_ends(model)
    return [name for name in dict.fromkeys((ends.embedding, None if ends.tied else ends.head)) if name is not None]


def _matrix(model: PreTrainedModel, module: nn.Module | None) -> tuple[str, Tensor] | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        return None
    return next((f"{name}.weight" for name, owner in model.named_modules() if owner is module), ""), weight


class _Stop(Exception):  # noqa: N818 - no error
    """Ends a forward pass before the logits."""


@torch.no_grad()
def head_inputs(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """What enters the head, ``B T D``, without computing logits.

    Raises:
        ConfigurationError: the model does not call the module that it names as its head.
    """
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Stop

    handle = model.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        model(ids_BT, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    if not seen:
        raise ConfigurationError(
            f"model.embedding, model.head: {type(model).__name__} does not call the module that it names as its head, "
            "so that what enters it is not known; leave both out"
        )
    return seen[0]
