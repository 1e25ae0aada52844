"""What a block is called with beside the hidden states, and how that is given to a batch of other sequences.

Most arguments are the same for every sequence (masks, rotary embeddings): they are recorded once. Some belong to their
sequence: they come from its token ids (Gemma's per-layer inputs), or from a block before (keys and values that later
blocks use again, indices that an indexer hands on). Those are bound to a call sequence by sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError


@dataclass(frozen=True)
class Layout:
    """How a model shapes its hidden states; everywhere else they are ``B T D``.

    Args:
        batch: The dimension of the sequences; tokens are the next.
        inner: Sizes of all the others, in order; their product is ``D``.
    """

    batch: int = 0
    inner: tuple[int, ...] = ()

    @classmethod
    def of(cls, hidden: Tensor, ids_BT: Tensor) -> Layout:
        """The layout of hidden states that belong to these token ids.

        Raises:
            ConfigurationError: they have no dimension of sequences followed by one of tokens.
        """
        shape = tuple(hidden.shape)
        for batch in range(len(shape) - 1):
            if shape[batch : batch + 2] == tuple(ids_BT.shape) and len(shape) > 2:
                return cls(batch, shape[:batch] + shape[batch + 2 :])
        raise ConfigurationError(
            f"model: its blocks pass on a tensor of shape {shape} for token ids of shape {tuple(ids_BT.shape)}; only "
            "models whose blocks pass on hidden states of every token can be quantized block by block"
        )

    @property
    def plain(self) -> bool:
        """Whether it is ``B T D`` already."""
        return self.batch == 0 and len(self.inner) < 2

    def pack(self, hidden: Tensor) -> Tensor:
        """From the model's shape to ``B T D``."""
        return hidden if self.plain else hidden.movedim((self.batch, self.batch + 1), (0, 1)).flatten(2)

    def unpack(self, hidden_BTD: Tensor) -> Tensor:
        """Inverse of :meth:`pack`."""
        if self.plain:
            return hidden_BTD
        return hidden_BTD.unflatten(2, self.inner).movedim((0, 1), (self.batch, self.batch + 1))


@dataclass(frozen=True)
class Carried:
    """A tensor that belongs to its sequence, on its way to or from a block.

    Args:
        path: Where it stands among the block's arguments, or in what the block returns.
        batch: Its dimension of the sequences.
    """

    path: str
    batch: int = 0


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with beside the hidden states.

    Tensors have a batch of one and broadcast, except those named here by their paths.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        layout: The shape of the hidden states.
        keyword: The name under which the hidden states are passed; None where they are the first positional argument.
        repeated: Arguments that do not broadcast, with the dimension along which they are repeated for each sequence.
        from_ids: Arguments that the model computes from token ids.
        from_blocks: Arguments that blocks before computed, by the names under which those gave them.
        gives: What this block computes for blocks after it, by name; paths in what it returns or is called with.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    layout: Layout = Layout()
    keyword: str | None = None
    repeated: dict[str, int] = field(default_factory=dict)
    from_ids: tuple[Carried, ...] = ()
    from_blocks: dict[str, Carried] = field(default_factory=dict)
    gives: dict[str, Carried] = field(default_factory=dict)

    def to(self, device: torch.device) -> BlockCall:
        """A copy on ``device``."""
        return self.mapped(lambda _, value: value.to(device))

    @property
    def bound(self) -> tuple[str, ...]:
        """Names of the tensors that :meth:`bind` takes, in order: arguments from ids by path, then those of blocks."""
        return (*(carried.path for carried in self.from_ids), *self.from_blocks)

    def bind(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> BlockCall:
        """The call with the arguments of these sequences, on its device.

        Args:
            tensors: One for each of ``bound``, sequences first.
            dtype: Dtype of those that are floating-point numbers: that of the hidden states; None leaves them.
        """
        if not self.bound:
            return self
        places = [*self.from_ids, *self.from_blocks.values()]
        values = {
            carried.path: tensor.movedim(0, carried.batch) for carried, tensor in zip(places, tensors, strict=True)
        }

        def put(path: str, value: Tensor) -> Tensor:
            tensor = values.get(path)
            if tensor is None:
                return value
            return tensor.to(value.device, dtype if tensor.is_floating_point() else value.dtype)

        return self.mapped(put)

    def for_batch(self, size: int) -> BlockCall:
        """The call for ``size`` sequences: what does not broadcast is repeated.

        Where an argument belongs to its sequence and is not bound, that of the recorded sequence is repeated: enough
        to measure time and memory, and nothing else.
        """
        if not self.repeated:
            return self

        def repeat(path: str, value: Tensor) -> Tensor:
            dim = self.repeated.get(path)
            if dim is None:
                return value
            return value.repeat([size if d == dim else 1 for d in range(value.ndim)])

        return self.mapped(repeat)

    def repeating(self, *dimensions: int) -> BlockCall:
        """The call whose tensors of two and more dimensions are repeated along the first, if it has one of these sizes.

        Args:
            dimensions: The sizes; none for any.
        """
        bound = {carried.path for carried in (*self.from_ids, *self.from_blocks.values())}
        first = {
            path: 0
            for path, tensor in leaves({"args": self.args, "kwargs": self.kwargs})
            if path not in bound and tensor.ndim > 1 and (not dimensions or tensor.shape[0] in dimensions)
        }
        return replace(self, repeated=first | self.repeated)

    def given(self, output: Any, call: BlockCall) -> dict[str, Tensor]:
        """What a run of the block gives to blocks after it, sequences first.

        Args:
            output: What it returned.
            call: What it was called with, whose containers it may have written to.
        """
        there = dict(leaves({"output": output, "args": call.args, "kwargs": call.kwargs}))
        return {name: there[carried.path].movedim(carried.batch, 0) for name, carried in self.gives.items()}

    def like(self, other: BlockCall) -> BlockCall:
        """These arguments, recorded from longer sequences, with what is known of the other's by their paths.

        A container that blocks before fill, and that is empty here, is taken over from the other.
        """
        there = {path for path, _ in leaves({"args": self.args, "kwargs": self.kwargs})}
        empty = {carried.path.split(".")[1] for carried in other.from_blocks.values() if carried.path not in there}
        args = tuple(other.args[i] if str(i) in empty else value for i, value in enumerate(self.args))
        kwargs = {key: other.kwargs[key] if key in empty else value for key, value in self.kwargs.items()}
        return replace(
            self,
            args=args,
            kwargs=kwargs,
            repeated=other.repeated,
            from_ids=other.from_ids,
            from_blocks=other.from_blocks,
            gives=other.gives,
        )

    def mapped(self, function: Callable[[str, Tensor], Tensor]) -> BlockCall:
        """The call with ``function(path, tensor)`` in the place of each tensor, and containers of its own."""
        args, kwargs = mapped(self.args, function, "args"), mapped(self.kwargs, function, "kwargs")
        return replace(self, args=args, kwargs=kwargs)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside nested tuples, lists and mappings, with its path, such as ``kwargs.shared.full.0``."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}.{index}" if path else str(index))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))


def mapped(value: Any, function: Callable[[str, Tensor], Tensor], path: str = "") -> Any:
    """A copy whose tensors went through ``function(path, tensor)``; containers are new, other values the same."""
    if isinstance(value, Tensor):
        return function(path, value)
    if isinstance(value, (tuple, list)):
        items = [mapped(item, function, f"{path}.{index}") for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        made: Any = {} if type(value) is dict else copy.copy(value)
        for key, item in value.items():
            made[key] = mapped(item, function, f"{path}.{key}")
        return made
    return value


def with_containers(call: BlockCall) -> BlockCall:
    """The call with containers of its own: a block may write to those that it is given."""
    return call.mapped(lambda _, tensor: tensor)
