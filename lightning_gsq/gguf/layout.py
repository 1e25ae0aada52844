"""How a model lies in a GGUF file: where each parameter is, from a table or from the file that it came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PretrainedConfig

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.architectures.common import WAY_OUT
from lightning_gsq.gguf.architectures.table import Architecture
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.names import Names
from lightning_gsq.gguf.rows import Place, experts_of, interleaved, parts_of_experts, places_in_file, to_model
from lightning_gsq.gguf.types.codec import dequantize

HEAD = "output.weight"
EMBEDDINGS = ("token_embd.weight", HEAD)
SHIFTS = (0.0, 1.0)
"""What a vector's stored value may be more than the model's parameter."""
ROTATED = ("attn_q", "attn_k")


@dataclass(frozen=True)
class Stored:
    """Where a parameter lies in a file.

    Args:
        places: The tensors that hold it, in the order of its rows.
        shift: What their values are more than the parameter.
    """

    places: tuple[Place, ...]
    shift: float = 0.0

    def value(self, file: GGUFFile) -> Tensor:
        """The parameter's values as a file has them, fp32 with all experts' rows one after another.

        Raises:
            ConfigurationError: a type in the file holds no weights that can be read.
        """
        parts = []
        for place in self.places:
            tensor = file.tensors[place.name]
            dense = dequantize(file.raw(place.name), tensor.number)
            parts.append(dense.reshape(-1) if len(tensor.shape) == 1 else dense)
        return to_model(self.places, parts) - self.shift


def heads_of(config: PretrainedConfig) -> tuple[int, ...]:
    """Numbers of query and of key heads."""
    text = config.get_text_config(decoder=True)
    counts = (getattr(text, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    return tuple(count for count in counts if isinstance(count, int) and count > 0)


def names_in_file(file: GGUFFile, config: PretrainedConfig) -> Names:
    """Names of a model's parameters in a file.

    Raises:
        ConfigurationError: the file names no architecture, or one that is not known.
    """
    return Names(architecture_name(file), config.get_text_config(decoder=True).num_hidden_layers)


def architecture_name(file: GGUFFile) -> str:
    """llama.cpp's name of a file's architecture.

    Raises:
        ConfigurationError: it has none.
    """
    field = file.fields.get("general.architecture")
    if field is None or not isinstance(field.value, str):
        raise ConfigurationError(f"{file.path} names no architecture (general.architecture)")
    return field.value


def matrices_in_file(
    file: GGUFFile, config: PretrainedConfig, matrices: Iterable[tuple[str, Tensor]], same: bool
) -> dict[str, Stored]:
    """Where a file holds a model's matrices, by parameter.

    Args:
        file: The file.
        config: The model's configuration.
        matrices: The matrices by name, ``O I`` with all experts' rows one after another.
        same: Whether the model's values are the file's; else those of the model that was quantized to it.

    Raises:
        ConfigurationError: it is a file of another model, or its rows lie in an unknown order.
    """
    names, heads = names_in_file(file, config), heads_of(config)
    return {
        parameter: Stored(tuple(places_in_file(file, names.of(parameter, file.tensors), w_OI, heads, same)))
        for parameter, w_OI in matrices
    }


def other_in_file(file: GGUFFile, config: PretrainedConfig, parameter: str, value: Tensor) -> Stored | None:
    """Where a file holds a parameter that is not quantized: of the orders and shifts that there are, the nearest one.

    Args:
        file: The file.
        config: The model's configuration.
        parameter: Its name in the model.
        value: Its value in the model that the file holds, or that was quantized to it.

    Returns:
        None where the file has no tensor of that name and size.

    Raises:
        ConfigurationError: it has no name in such a file.
    """
    names = names_in_file(file, config).of(parameter, file.tensors)
    shapes = [file.tensors[name].shape for name in names if name in file.tensors]
    transposed = value.ndim == 2 and len(shapes) == 1 and shapes[0] != tuple(value.shape)
    if len(shapes) < len(names) or sum(map(math.prod, shapes)) != value.numel() or transposed:
        return None
    if len(names) > 1:
        rows = sum(math.prod(shape[:-1]) for shape in shapes)
        orders = parts_of_experts(rows, experts_of(file, names[0]), len(names))
        return Stored(tuple(Place(name, order) for name, order in zip(names, orders, strict=True)))
    candidates = [Stored((Place(names[0]),), shift) for shift in (SHIFTS if value.ndim == 1 else SHIFTS[:1])]
    if names[0].split(".")[-2] in ROTATED:
        halves = {count for count in heads_of(config) if len(value) % (2 * count) == 0}
        candidates += [Stored((Place(names[0], interleaved(len(value), count)),)) for count in sorted(halves)]
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda stored: float((stored.value(file).view_as(value) - value).abs().max()))


def places_in_folder(
    architecture: Architecture, config: PretrainedConfig, rows: Mapping[str, int], head: str
) -> dict[str, Stored]:
    """Where the parameters of a model that comes from a folder are to lie.

    Args:
        architecture: Its architecture.
        config: Its configuration.
        rows: How many rows each parameter has, those of all experts together.
        head: Name of the head's matrix.

    Raises:
        ConfigurationError: llama.cpp cannot hold one.
    """
    names = Names(architecture.name, config.num_hidden_layers)
    places = {}
    for parameter, count in rows.items():
        if parameter == head and not architecture.own_head:
            raise ConfigurationError(
                f"format: gguf: llama.cpp takes the embedding for the head of every {architecture.name} model, this "
                f"one has a head of its own ({parameter}); {WAY_OUT}"
            )
        stored = names.of(parameter)
        _refuse_bias(architecture, parameter, stored[0])
        shift = architecture.shift if parameter.endswith("norm.weight") else 0.0
        if len(stored) > 1:
            orders = parts_of_experts(count, config.num_experts, len(stored))
            placed = tuple(Place(name, order) for name, order in zip(stored, orders, strict=True))
        else:
            placed = (Place(stored[0], _order(architecture, config, stored[0], count)),)
        places[parameter] = Stored(placed, shift)
    return places


def _refuse_bias(architecture: Architecture, parameter: str, stored: str) -> None:
    kind = stored.split(".")[-2]
    if stored.endswith(".bias") and kind not in architecture.biases:
        raise ConfigurationError(
            f"format: gguf: llama.cpp reads no {kind}.bias in files of the {architecture.name} architecture, and the "
            f"model has {parameter}; {WAY_OUT}"
        )


def _order(architecture: Architecture, config: PretrainedConfig, stored: str, rows: int) -> Tensor | None:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(stored.split(".")[-2])
    return interleaved(rows, heads) if architecture.interleaved and heads is not None else None
