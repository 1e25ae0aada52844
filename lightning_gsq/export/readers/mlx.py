"""``mlx_lm`` on the CPU, seen as a model of PyTorch: token ids in, logits out."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
LONGEST = 300
"""Characters of an error that are shown."""


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


@dataclass(frozen=True)
class Layer:
    """What the parts of a quantized layer say of it.

    Args:
        shape: ``(O, I)``.
        bits: Those of a stored code.
        group_size: Weights that share a scale and a bias.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int


def why_not_built(
    config: dict[str, Any], layers: Mapping[str, Layer], others: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Why ``mlx_lm`` cannot load a folder; None if it can, or is not there.

    A model of the configuration is built, and takes tensors of the shapes that the folder is to have. All of it is
    lazy: nothing of the model's size is computed or kept.

    Args:
        config: What becomes config.json.
        layers: The quantized layers, by name.
        others: Shapes of all other parameters, by name.
    """
    if missing(PACKAGE):
        return None
    try:
        with _on_cpu(), contextlib.redirect_stdout(io.StringIO()):
            _build(config, layers, others)
    except (Exception, SystemExit) as error:  # whatever the package does, it would do it to the user
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"mlx_lm {metadata.version('mlx-lm')} cannot build it: {type(error).__name__}: {reason[:LONGEST]}"
    return None


def windows_of(config: dict[str, Any]) -> list[int | None]:
    """The sliding window of every block's cache, in tokens; None for one that keeps the whole context.

    Args:
        config: What becomes config.json, of a model that can be built.
    """
    from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

    with _on_cpu():
        caches = make_prompt_cache(_empty(config))
    return [cache.max_size if isinstance(cache, RotatingKVCache) else None for cache in caches]


def _empty(config: dict[str, Any]) -> Any:
    """A model without weights."""
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(config)
    return model_class(arguments.from_dict(config))


def _build(config: dict[str, Any], layers: Mapping[str, Layer], others: Mapping[str, tuple[int, ...]]) -> None:
    """What ``mlx_lm.load`` does, with tensors that are never computed."""
    import mlx.core as mx
    from mlx import nn

    model = _empty(config)
    weights = {name: mx.zeros(shape) for name, shape in others.items()}
    for name, layer in layers.items():
        rows, columns = layer.shape
        weights[f"{name}.weight"] = mx.zeros((rows, columns * layer.bits // 32), mx.uint32)
        weights |= {f"{name}.{part}": mx.zeros((rows, columns // layer.group_size)) for part in ("scales", "biases")}
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)

    def settings(name: str, module: Any) -> Any:
        if not hasattr(module, "to_quantized") or f"{name}.scales" not in weights:
            return False
        layer = layers[name]
        return {"bits": layer.bits, "group_size": layer.group_size}

    nn.quantize(model, class_predicate=settings)
    model.load_weights(list(weights.items()), strict=True)


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
    from mlx_lm import load as load_folder

    try:
        with _on_cpu():
            return LoadedModel(load_folder(str(folder))[0])
    except Exception as error:  # whatever the package raises, the file is not what it should be
        raise CheckFailedError(f"{PACKAGE} cannot load {folder}: {error}") from error


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """With the CPU as the device that arrays are made on."""
    import mlx.core as mx

    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(device)
