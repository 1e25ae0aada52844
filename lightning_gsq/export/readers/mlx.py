"""``mlx_lm`` on the CPU, seen as a model of PyTorch: token ids in, logits out."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gsq.export.contract import CheckFailedError
from lightning_gsq.export.readers.packages import missing

PACKAGE = "mlx-lm"


def version() -> str:
    """Those of ``mlx_lm`` and of MLX itself."""
    return f"{metadata.version('mlx-lm')} on mlx {metadata.version('mlx')}"


def refuse_architecture(model_type: str) -> str | None:
    """Why ``mlx_lm`` cannot load such a model; None if it can, or if it is not installed and cannot be asked."""
    if missing(PACKAGE):
        return None
    from mlx_lm.utils import MODEL_REMAPPING

    module = MODEL_REMAPPING.get(model_type, model_type)
    if module.isidentifier() and importlib.util.find_spec(f"mlx_lm.models.{module}") is not None:
        return None
    return f"mlx_lm {metadata.version('mlx-lm')} has no model {model_type}; use native, or dequantized"


class LoadedModel:
    """A model in fp32 on the CPU.

    Args:
        model: What ``mlx_lm`` loaded.
    """

    def __init__(self, model: Any) -> None:
        import mlx.core as mx
        from mlx.utils import tree_map

        def widened(value: Any) -> Any:
            return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value

        self.model = model
        model.update(tree_map(widened, model.parameters()))

    def __call__(self, ids_BT: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits ``B T V`` of token ids, as the ``logits`` of what is returned."""
        import mlx.core as mx

        with mx.stream(mx.cpu):
            logits_BTV = self.model(mx.array(ids_BT.numpy())).astype(mx.float32)
            return SimpleNamespace(logits=torch.from_numpy(np.array(logits_BTV)))

    def dense(self, name: str) -> Tensor:
        """A quantized weight ``O I`` as MLX unpacks it, fp32.

        Raises:
            AttributeError: the model has no such layer, or it is not quantized.
        """
        import mlx.core as mx

        layer: Any = self.model
        for part in name.removesuffix(".weight").split("."):
            layer = layer[int(part)] if isinstance(layer, list) else getattr(layer, part)
        with mx.stream(mx.cpu):
            dense = mx.dequantize(
                layer.weight, layer.scales, layer.biases, group_size=layer.group_size, bits=layer.bits
            )
            return torch.from_numpy(np.array(dense))


def load(folder: Path) -> LoadedModel:
    """The model of a folder, with its tokenizer read as well.

    Raises:
        CheckFailedError: ``mlx_lm`` does not load it.
    """
    import mlx.core as mx
    from mlx_lm import load as load_folder

    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        return LoadedModel(load_folder(str(folder))[0])
    except Exception as error:  # whatever the package raises, the file is not what it should be
        raise CheckFailedError(f"{PACKAGE} cannot load {folder}: {error}") from error
    finally:
        mx.set_default_device(device)
