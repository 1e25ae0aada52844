"""Weights that a block shares with another block or with something outside of the blocks."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from lightning_gsq.errors import ConfigurationError

SHOWN = 12


def refuse_shared(model: nn.Module, weights: Collection[str]) -> None:
    """Refuses to quantize a weight whose memory another parameter of the model uses as well.

    A run gives each weight codes of its own, trains block after block, and installs them one after another: of two
    codes for one memory the later would win, and the earlier block would have been trained for another weight.

    Args:
        model: The model; on the meta device, where nothing has memory, parameters are the same if they are one object.
        weights: Names of the parameters to quantize.

    Raises:
        ConfigurationError: naming the first such weight, the others in its memory, and all that have to be left out.
    """
    groups = {name: names for names in _overlapping(model) for name in names if len(names) > 1}
    shared = [name for name in weights if name in groups]
    if shared:
        others = [name for name in groups[shared[0]] if name != shared[0]]
        more = f", … ({len(shared)} in all)" if len(shared) > SHOWN else ""
        raise ConfigurationError(
            f"model: {shared[0]} and {', '.join(others[:3])} are the same numbers in memory, and codes for one of them "
            "would change the other; leave weights that are used in two places in full precision with --model.exclude "
            f"'[{', '.join(shared[:SHOWN])}{more}]'"
        )


def _overlapping(model: nn.Module) -> list[list[str]]:
    """Names of the parameters, those together that lie wholly or partly in the same memory."""
    groups: list[list[str]] = []
    end = 0
    # A module in two places, and a parameter in two modules, are named each time.
    places = [(*_memory(p), name) for name, p in model.named_parameters(remove_duplicate=False) if p.numel()]
    for begin, stop, name in sorted(places, key=lambda place: place[:2]):
        if begin < end:
            groups[-1].append(name)
        else:
            groups.append([name])
        end = max(end, stop)
    return groups


def _memory(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the one behind its last."""
    if tensor.is_meta:
        return id(tensor), id(tensor) + 1
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
