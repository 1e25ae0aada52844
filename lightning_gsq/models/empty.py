"""A model without its weights: its modules, names and shapes, on the meta device."""

from __future__ import annotations

import contextlib
import io

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lightning_gsq.models.address import ModelSource
from lightning_gsq.models.classes import auto_class
from lightning_gsq.models.loader_errors import as_refusals
from lightning_gsq.system.hub import without_waiting


def empty_model(source: ModelSource, config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model that a configuration describes, in evaluation mode, without gradients.

    Args:
        source: Where it comes from.
        config: Its configuration.
        dtype: Dtype of its parameters; None for that of the configuration.

    Raises:
        ConfigurationError: there is no such model.
    """
    quiet = contextlib.redirect_stderr(io.StringIO())
    what = f"model.pretrained: cannot build a model from {source.shown}"
    own_code = without_waiting() if source.trust_remote_code else contextlib.nullcontext()
    with own_code, as_refusals(what, source.trust_remote_code), torch.device("meta"), quiet:
        model: PreTrainedModel = auto_class(config, source.trust_remote_code).from_config(
            config, trust_remote_code=source.trust_remote_code, **({} if dtype is None else {"dtype": dtype})
        )
    return model.eval().requires_grad_(False)
