"""How a model's logits come from its last hidden states: found by comparing, not by the model's name."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.chain import find_blocks, trace
from lightning_gsq.models.finite import check_activations
from lightning_gsq.models.probe import probe_ids
from lightning_gsq.ops.distillation import Head

TOLERANCE = 2e-2
"""Relative error of the probe's logits that half precision alone explains."""


@torch.no_grad()
def find_head(
    model: PreTrainedModel,
    purpose: str = "model.phases: the end-to-end phase",
    way_out: str = "leave out end_to_end",
) -> Head:
    """The head of a causal decoder, verified on a short sequence.

    The logits have to be those of the output embedding applied to what the :func:`body` returns, times one factor (as
    in Granite or Cohere), then capped by ``final_logit_softcapping`` (as in Gemma 2).

    Args:
        model: The model.
        purpose: What needs it, for the message.
        way_out: What to do where there is none.

    Raises:
        ConfigurationError: they are something else.
    """
    embedding = model.get_output_embeddings()
    weight = getattr(embedding, "weight", None)
    ids = probe_ids(model)
    if isinstance(weight, Tensor) and body(model) is not model:
        hidden_ND = last_hidden(model, ids)[0]
        bias = getattr(embedding, "bias", None)
        cap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
        if hidden_ND.shape[-1] == weight.shape[-1]:
            wanted_NV = model(ids, use_cache=False).logits[0].float()
            plain_NV = Head(weight, bias).logits(hidden_ND).float()
            raw_NV = wanted_NV if cap is None else cap * torch.atanh((wanted_NV / cap).clamp(-1 + 1e-6, 1 - 1e-6))
            scale = float((raw_NV * plain_NV).sum() / plain_NV.square().sum())
            head = Head(weight, bias, 1.0 if abs(scale - 1) < TOLERANCE / 10 else scale, cap)
            error = (head.logits(hidden_ND).float() - wanted_NV).abs().max() / wanted_NV.abs().max()
            if float(error) < TOLERANCE:
                return head
    check_activations(model, trace(model, ids))
    raise ConfigurationError(
        f"{purpose} computes logits from the last hidden states, and those of {type(model).__name__} are not its "
        f"output embedding applied to them; {way_out}"
    )


def body(model: PreTrainedModel) -> nn.Module:
    """The part of a model that returns what enters its head: all but the head."""
    base: nn.Module = model.base_model
    if base is model:  # the class does not say which part that is; the one with the blocks then
        base = model.get_submodule(find_blocks(model)[0].partition(".")[0])
    return model if isinstance(base, nn.ModuleList) else base


def last_hidden(model: PreTrainedModel, ids_BT: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    """What enters the head, ``B T D``.

    Args:
        model: The model.
        ids_BT: Token ids.
        weights: Parameters to use in place of the base model's own, by name inside its :func:`body`.
    """
    output = torch.func.functional_call(body(model), weights or {}, (ids_BT,), {"use_cache": False})
    hidden: Tensor = output[0]
    return hidden


def head_name(network: PreTrainedModel) -> str:
    """Name of the head's matrix in the model, also where it is tied to the embedding."""
    head = network.get_output_embeddings()
    return next(f"{name}.weight" for name, module in network.named_modules() if module is head)
