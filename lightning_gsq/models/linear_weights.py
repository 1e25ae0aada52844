"""Which parameters of a block are linear weights, and what flows into them, found by watching the block run.

Nothing is matched by class or by name. A block runs once under a ``TorchFunctionMode`` that sees every matrix
product; a parameter whose memory is used as the matrix of one is a linear weight. That covers ``nn.Linear``,
GPT-2's transposed ``Conv1D``, and experts fused into one ``E O I`` parameter, of which each product uses a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS: dict[Any, tuple[int, int, bool]] = {
    # function -> positions of the inputs and of the matrix among its arguments, whether the matrix is O I (or I O)
    nn.functional.linear: (0, 1, True),
    torch.addmm: (1, 2, False),
    torch.mm: (0, 1, False),
    torch.matmul: (0, 1, False),
    Tensor.matmul: (0, 1, False),
    Tensor.mm: (0, 1, False),
    Tensor.__matmul__: (0, 1, False),
}


@dataclass(frozen=True)
class LinearSite:
    """A linear weight inside a block.

    Args:
        name: Parameter name inside the block, such as ``mlp.down_proj.weight``.
        experts: Matrices fused in the parameter, ``E``; 0 for a plain weight.
        out_features: ``O``.
        in_features: ``I``.
        transposed: The parameter stores ``I O`` (per expert) rather than ``O I``.
    """

    name: str
    experts: int
    out_features: int
    in_features: int
    transposed: bool

    @property
    def rows(self) -> int:
        """Rows of the weight seen as one matrix: ``O``, or ``E * O``."""
        return max(self.experts, 1) * self.out_features

    def to_matrix(self, parameter: Tensor) -> Tensor:
        """The parameter as one matrix of ``rows`` by ``I``."""
        if self.transposed:
            parameter = parameter.transpose(-1, -2)
        return parameter.reshape(self.rows, self.in_features)

    def from_matrix(self, w_OI: Tensor) -> Tensor:
        """Inverse of :meth:`to_matrix`; differentiable."""
        if self.experts:
            w_OI = w_OI.view(self.experts, self.out_features, self.in_features)
        return w_OI.transpose(-1, -2) if self.transposed else w_OI


@dataclass(frozen=True)
class _Product:
    """One matrix product seen: ``inputs`` times a matrix that lies inside the parameter ``name``."""

    name: str
    expert: int
    inputs: Tensor
    out_features: int
    transposed: bool


class _WatchProducts(TorchFunctionMode):
    """Calls ``seen`` for every product with a matrix that lies inside one of the parameters."""

    def __init__(self, parameters: Mapping[str, Tensor], seen: Callable[[_Product], None]) -> None:
        super().__init__()
        self.seen = seen
        self.parameters = {name: p for name, p in parameters.items() if p.ndim in (2, 3)}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = _PRODUCTS.get(func)
        if known is not None and len(args) > max(known[:2]):
            inputs, matrix = args[known[0]], args[known[1]]
            if isinstance(matrix, Tensor) and matrix.ndim == 2 and isinstance(inputs, Tensor):
                for name, parameter in self.parameters.items():
                    # By address range, not by storage: a memory-mapped file is one storage for all its tensors.
                    if 0 <= matrix.data_ptr() - parameter.data_ptr() < parameter.nbytes:
                        self.seen(_product(name, parameter, inputs, matrix, rows_are_outputs=known[2]))
        return func(*args, **(kwargs or {}))


def _product(name: str, parameter: Tensor, inputs: Tensor, matrix: Tensor, rows_are_outputs: bool) -> _Product:
    expert = 0
    if parameter.ndim == 3:
        expert = (matrix.storage_offset() - parameter.storage_offset()) // parameter[0].numel()
    stored_as_seen = matrix.stride(1) == 1
    return _Product(
        name=name,
        expert=expert,
        inputs=inputs,
        out_features=matrix.shape[0 if rows_are_outputs else 1],
        transposed=stored_as_seen != rows_are_outputs,
    )


@contextmanager
def watch_inputs(block: nn.Module, seen: Callable[[str, int, Tensor], None]) -> Iterator[None]:
    """While active, calls ``seen(parameter name, expert, inputs ... I)`` for each product inside ``block``."""
    with _WatchProducts(dict(block.named_parameters()), lambda p: seen(p.name, p.expert, p.inputs)):
        yield


def find_linear_sites(block: nn.Module, run: Callable[[], Any]) -> list[LinearSite]:
    """The linear weights of a block, in the order of its parameters.

    A router (a weight with one output per expert in a block with fused experts) is left out: it is tiny, and a
    wrong choice of expert costs more than it saves.

    Args:
        block: The block.
        run: Runs the block once on any input.
    """
    parameters = dict(block.named_parameters())
    found: dict[str, LinearSite] = {}

    def seen(product: _Product) -> None:
        parameter = parameters[product.name]
        found[product.name] = LinearSite(
            name=product.name,
            experts=parameter.shape[0] if parameter.ndim == 3 else 0,
            out_features=product.out_features,
            in_features=product.inputs.shape[-1],
            transposed=product.transposed,
        )

    with torch.no_grad(), _WatchProducts(parameters, seen):
        run()
    expert_counts = {site.experts for site in found.values() if site.experts}
    return [
        found[name]
        for name in parameters
        if name in found and not (found[name].experts == 0 and found[name].out_features in expert_counts)
    ]
