"""How far the output of each routed expert is off, with the weights of its start and with trained ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gsq.models.chain import run_block
from lightning_gsq.models.expert_parallel import passes_of_others, without_tokens
from lightning_gsq.models.experts import Experts, Part
from lightning_gsq.models.products import Product, WatchProducts
from lightning_gsq.run.run import Run
from lightning_gsq.training import BlockQuantization

Batches = DataLoader[tuple[Tensor, ...]] | list[tuple[Tensor, ...]]
"""Of held-out sequences, as a block's loss takes them."""
Unit = tuple[int, int]
"""An expert: the number of its place, and its own number there."""


@dataclass(frozen=True)
class OutputErrors:
    """Of the experts of one place, ``E`` of them; on the host.

    Args:
        tokens_E: Held-out tokens that reached each expert, int64.
        start_E: Squared error of its output with the weights of the start, against its full-precision output, fp64.
        trained_E: The same with trained weights. Both are NaN where the expert did not get the same tokens each time.
        routed: Some expert saw fewer tokens than there were: these are experts, and not modules that all tokens take.
    """

    tokens_E: Tensor
    start_E: Tensor
    trained_E: Tensor
    routed: bool


@torch.no_grad()
def output_errors(
    run: Run,
    module: BlockQuantization,
    places: Sequence[Experts],
    batches: Batches,
    start: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    held: Mapping[str, range] = MappingProxyType({}),
) -> list[OutputErrors]:
    """Errors of the experts of each place, over all processes, in one pass over the batches.

    The block runs three times on a batch: with the full-precision experts, with those of the start, with trained ones,
    and each time with the same weights outside of them. So an expert gets the same tokens; its output is that of the
    matrix that it uses last. Spread experts meet the tokens of all processes where they are: a process that has no
    batch left goes on for those of others.

    Args:
        run: The run.
        module: The block, trained.
        places: Its experts, those of other processes too.
        batches: Held-out batches, as the block's loss takes them.
        start: Dense weights of the start, by name.
        trained: Dense trained weights, by name.
        others: Dense weights that are used outside of the experts, by name.
        held: The matrices that this process has of each weight that is spread, by name.
    """
    unit_of = {
        (name, number - held[name].start if name in held else number): (place, expert)
        for place, experts in enumerate(places)
        for expert, parts in enumerate(experts.parts)
        for name, number in parts
        if name not in held or number in held[name]
    }
    names = dict.fromkeys(name for name, _ in unit_of)
    full = {name: module.block.get_parameter(name) for name in names}
    weights_of = [dict(others) | {name: weights[name] for name in names} for weights in (full, start, trained)]
    sums = [torch.zeros(3, len(experts), dtype=torch.float64) for experts in places]
    passed = torch.zeros(1, dtype=torch.float64)
    further = passes_of_others(module.block, len(batches))

    def passes(run_once: Callable[[Mapping[str, Tensor]], object]) -> None:
        outputs = [_Outputs(unit_of, {name: weights[name] for name in names}) for weights in weights_of]
        for watched, weights in zip(outputs, weights_of, strict=True):
            with run.precision(), watched.watching():
                run_once(weights)
        exact, *approximate = outputs
        for (place, expert), tokens in exact.tokens.items():
            errors = [watched.error((place, expert), exact) for watched in approximate]
            sums[place][:, expert] += torch.tensor([float(tokens), *errors], dtype=torch.float64)

    for batch in batches:
        hidden_BTD, arguments = module.inputs_of(tuple(tensor.to(run.device) for tensor in batch))
        passed += hidden_BTD.shape[0] * hidden_BTD.shape[1]
        passes(functools.partial(_passed, module, hidden_BTD.float(), arguments))
    for _ in range(further):
        passes(functools.partial(without_tokens, module.block))
    everywhere = run.ranks.sum(torch.cat([passed, *(part.flatten() for part in sums)]).to(run.device)).cpu()
    result = []
    for flat in everywhere[1:].split([part.numel() for part in sums]):
        tokens_E, start_E, trained_E = flat.view(3, -1)
        routed = bool((tokens_E < everywhere[0]).any())
        result.append(OutputErrors(tokens_E.long(), start_E, trained_E, routed))
    return result


def _passed(module: BlockQuantization, hidden_BTD: Tensor, arguments: Any, weights: Mapping[str, Tensor]) -> None:
    module(hidden_BTD, weights, arguments, run_block)


class _Outputs:
    """What the last matrix of each expert gives in one run of a block.

    Args:
        unit_of: The expert that a matrix belongs to.
        weights: The parameters that they lie in, as they are used, by name.
    """

    def __init__(self, unit_of: Mapping[Part, Unit], weights: Mapping[str, Tensor]) -> None:
        self._unit_of, self._weights = unit_of, weights
        self._fused = {name for name, number in unit_of if number}
        self._seen: dict[Unit, list[str]] = {}
        self.outputs: dict[Unit, list[Tensor]] = {}
        self.tokens: dict[Unit, Tensor] = {}
        """Vectors that are not zero: experts computed all at once get zeros for the tokens of others."""

    def watching(self) -> WatchProducts:
        """A context that looks at the products of a run."""
        return WatchProducts(self._weights, self._add)

    def error(self, unit: Unit, exact: _Outputs) -> float:
        """Squared error of an expert's output; NaN where it got other tokens than in the exact run."""
        own, wanted = self.outputs.get(unit, []), exact.outputs[unit]
        if [y.shape for y in own] != [y.shape for y in wanted]:
            return float("nan")
        return float(sum((y - z).square().sum(dtype=torch.float64) for y, z in zip(own, wanted, strict=True)))

    def _add(self, product: Product) -> None:
        unit = self._unit_of.get((product.name, product.part if product.name in self._fused else 0))
        if unit is None:
            return
        seen = self._seen.setdefault(unit, [])
        if product.name not in seen:  # it comes later than those before it: the output is its
            seen.append(product.name)
            self.outputs[unit], self.tokens[unit] = [], torch.zeros((), device=product.inputs.device)
        if product.name == seen[-1]:
            matrix_OI = product.matrix if product.rows_are_outputs else product.matrix.T
            with torch.autocast(product.inputs.device.type, enabled=False):
                x_NI = product.inputs.reshape(-1, product.inputs.shape[-1]).float()
                self.outputs[unit].append(x_NI @ matrix_OI.float().T)
            self.tokens[unit] += (x_NI != 0).any(-1).sum()
