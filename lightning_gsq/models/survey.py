"""What passes between a model's blocks, found out on two short sequences, and whether that is all there is.

The model runs on one sequence and on both. An argument that is the same for both belongs to every sequence; one that
differs belongs to its own. The latter comes from the token ids alone, if the model computes the same where its blocks
only hand hidden states on; or it is a tensor that a block before computed. What is neither cannot be followed block by
block, and is refused. Then every block runs alone, on both sequences, and has to give what it gave inside the model.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.calls import BlockCall, Carried, Layout, leaves, with_containers
from lightning_gsq.models.chain import check_count, find_blocks, hidden_of, run_block, running, split_hidden
from lightning_gsq.models.finite import check_block
from lightning_gsq.models.passing import Forms, calls_without_blocks
from lightning_gsq.models.probe import probe_pair

TOLERANCE = 1e-2
"""Largest relative error of a token that the order of summation explains."""
HALF_TOLERANCE, HALF_QUANTILE = 5e-2, 0.75
"""In half precision, of this share of the tokens: rounding may send one or two to another expert."""
MASSIVE = 10.0
"""Activations above this many times a token's median count as this much: they must not hide an error of the others."""


@dataclass(frozen=True)
class Survey:
    """How a model calls its blocks, and what came in and out of each for two sequences.

    Args:
        calls: One a block, recorded from the first sequence.
        inputs_BTD: Hidden states that entered each block.
        outputs_BTD: What left it, as the next block or the head took it.
        bound: Tensors that each call takes for the two sequences, in the order of ``call.bound``.
        forms: What each block returns beside its hidden states.
    """

    calls: list[BlockCall]
    inputs_BTD: list[Tensor]
    outputs_BTD: list[Tensor]
    bound: list[tuple[Tensor, ...]]
    forms: Forms

    def bound_call(self, index: int) -> BlockCall:
        """The call of a block for the two sequences."""
        return self.calls[index].bind(self.bound[index])


@dataclass
class _Visit:
    """One run of one block inside the model."""

    hidden_BTD: Tensor
    before: BlockCall
    """Its arguments when it began."""
    after: dict[str, Any]
    """Arguments and output when it had ended, containers as the block left them."""
    output: Any
    output_BTD: Tensor

    def arguments(self) -> dict[str, Tensor]:
        return dict(leaves({"args": self.before.args, "kwargs": self.before.kwargs}))

    def computed(self) -> dict[str, Tensor]:
        """Tensors that were not there before: what it returned beside the hidden states, or wrote to a container."""
        old = {_identity(tensor) for tensor in self.arguments().values()}
        return {path: tensor for path, tensor in leaves(self.after) if _identity(tensor) not in old}


def survey(model: PreTrainedModel) -> Survey:
    """Surveys a model and verifies that its blocks are a chain.

    Raises:
        ConfigurationError: it cannot be run, it does not run each block once, or something passes between its blocks
            that cannot be followed.
    """
    ids_BT = probe_pair(model)
    with running(model, "on a few tokens"):
        one, both = _visits(model, ids_BT[:1]), _visits(model, ids_BT)
        forms = Forms({block: visit.output for block, visit in zip(find_blocks(model)[1], both, strict=True)})
        calls, bound = _arguments(model, forms, ids_BT, one, both)
    outputs = [*(visit.hidden_BTD for visit in both[1:]), both[-1].output_BTD]
    surveyed = Survey(calls, [visit.hidden_BTD for visit in both], outputs, bound, forms)
    return check_chain(model, surveyed)


def check_chain(model: PreTrainedModel, surveyed: Survey) -> Survey:
    """Verifies that the blocks, run one at a time, reproduce the model's own forward pass on both sequences.

    Returns:
        The survey, where arguments are repeated that some block does not broadcast.

    Raises:
        ConfigurationError: they do not, because something other than the hidden states passes between the blocks; or
            a block gives values that are not finite.
    """
    calls = []
    for index, block in enumerate(find_blocks(model)[1]):
        output_BTD, call = _run_alone(model, block, surveyed, index)
        calls.append(call)
        wanted_BTD = surveyed.outputs_BTD[index]
        for leaving_BTD in (wanted_BTD, output_BTD):
            check_block(model, index, surveyed.inputs_BTD[index], leaving_BTD)
        errors = token_errors(output_BTD, wanted_BTD)
        half = wanted_BTD.dtype in (torch.float16, torch.bfloat16)
        error = float(errors.quantile(HALF_QUANTILE) if half else errors.max())
        if not error <= (HALF_TOLERANCE if half else TOLERANCE):
            raise ConfigurationError(
                f"model: block {index} of {type(model).__name__}, run alone, differs from the model by {error:.3g} of "
                "a token's size: something other than the hidden states passes between its blocks, which cannot be "
                "quantized block by block"
            )
    return replace(surveyed, calls=calls)


def token_errors(output_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    """Relative error of each token, fp32; massive activations count no more than others."""
    output_ND, wanted_ND = (t.detach().float().flatten(0, -2) for t in (output_BTD, wanted_BTD))
    limit_N1 = MASSIVE * wanted_ND.abs().median(dim=-1, keepdim=True).values
    limit_N1 = torch.where(limit_N1 > 0, limit_N1, torch.inf)
    output_ND, wanted_ND = (torch.clamp(t, -limit_N1, limit_N1) for t in (output_ND, wanted_ND))
    return (output_ND - wanted_ND).norm(dim=-1) / wanted_ND.norm(dim=-1).clamp_min(1e-12)


@torch.no_grad()
def _visits(model: PreTrainedModel, ids_BT: Tensor) -> list[_Visit]:
    """Runs the model and records every run of a block."""
    blocks = find_blocks(model)[1]
    begun: list[tuple[Tensor, BlockCall]] = []
    visits: list[_Visit] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_BTD, call = split_hidden(args, kwargs, ids_BT)
        begun.append((hidden_BTD.detach().clone(), with_containers(call)))

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden, (entered_BTD, call) = hidden_of(output), begun[-1]
        left = with_containers(split_hidden(args, kwargs, ids_BT)[1])  # as it is now: the next block may write to it
        ended = {"args": left.args, "kwargs": left.kwargs, "output": _rest(output)}
        visits.append(_Visit(entered_BTD, call, ended, output, Layout.of(hidden, ids_BT).pack(hidden)))

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(after, with_kwargs=True).remove)
        model(ids_BT, use_cache=False)
    check_count(model, len(blocks), len(visits))
    return visits


def _rest(output: Any) -> dict[str, Any]:
    """What a block returned beside the hidden states, by position."""
    return {str(i): value for i, value in enumerate(output) if i} if isinstance(output, (tuple, list)) else {}


def _arguments(
    model: PreTrainedModel, forms: Forms, ids_BT: Tensor, one: list[_Visit], both: list[_Visit]
) -> tuple[list[BlockCall], list[tuple[Tensor, ...]]]:
    """The calls, each with which of its arguments belong to their sequence, and those of the two sequences."""
    without: list[BlockCall] | None = None
    calls, bound = [visit.before for visit in one], list[tuple[Tensor, ...]]()
    sources: dict[Any, tuple[int, str]] = {}
    for index, (single, double) in enumerate(zip(one, both, strict=True)):
        alone, repeated = single.arguments(), dict[str, int]()
        from_ids, from_blocks = list[tuple[Carried, Tensor]](), dict[str, tuple[Carried, Tensor]]()
        for path, tensor in double.arguments().items():
            batch = _batch_dimension(alone.get(path), tensor)
            if not _belongs_to_sequence(alone.get(path), tensor, batch):
                if batch is not None and alone[path].shape[batch] != 1:
                    repeated[path] = batch
                continue
            if batch is None or tensor.shape[batch] != len(ids_BT):
                _refuse(model, index, path)
            carried = Carried(path, batch)
            if without is None:
                without = calls_without_blocks(model, forms.emptied(), ids_BT)
            apart = dict(leaves({"args": without[index].args, "kwargs": without[index].kwargs})).get(path)
            source = sources.get(_identity(tensor))
            if source is not None:
                name = f"{source[0]}.{source[1]}"
                from_blocks[name] = carried, tensor.movedim(batch, 0)
                gives = {**calls[source[0]].gives, name: Carried(source[1], batch)}
                calls[source[0]] = replace(calls[source[0]], gives=gives)
            elif apart is not None and apart.shape == tensor.shape and torch.allclose(apart, tensor):
                from_ids.append((carried, tensor.movedim(batch, 0)))
            else:
                _refuse(model, index, path)
        calls[index] = replace(
            calls[index],
            repeated=repeated,
            from_ids=tuple(carried for carried, _ in from_ids),
            from_blocks={name: carried for name, (carried, _) in from_blocks.items()},
        )
        bound.append((*(tensor for _, tensor in from_ids), *(tensor for _, tensor in from_blocks.values())))
        sources |= {_identity(tensor): (index, path) for path, tensor in double.computed().items()}
    return calls, bound


def _batch_dimension(one: Tensor | None, two: Tensor) -> int | None:
    """The dimension that two sequences make twice as large; None if there is none."""
    if one is None or one.ndim != two.ndim or one.shape == two.shape:
        return None
    grown = [d for d in range(one.ndim) if two.shape[d] != one.shape[d]]
    return grown[0] if len(grown) == 1 and two.shape[grown[0]] == 2 * one.shape[grown[0]] else None


def _belongs_to_sequence(one: Tensor | None, two: Tensor, batch: int | None) -> bool:
    if batch is not None:
        first, second = two.chunk(2, batch)
        return not torch.equal(first, second)
    return one is None or one.shape != two.shape or not torch.equal(one, two)


def _identity(tensor: Tensor) -> Any:
    """What two references to one tensor have in common; the tensors are kept alive, so no memory is used again."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _refuse(model: PreTrainedModel, index: int, path: str) -> NoReturn:
    raise ConfigurationError(
        f"model: block {index} of {type(model).__name__} is called with an argument ({path}) that depends on the "
        "tokens and is neither computed from their ids nor what another block gives: it cannot be quantized block by "
        "block"
    )


@torch.no_grad()
def _run_alone(model: PreTrainedModel, block: nn.Module, surveyed: Survey, index: int) -> tuple[Tensor, BlockCall]:
    """A block's output on both sequences, and its call, all of whose masks are repeated if the block wants that."""
    call, hidden_BTD = surveyed.calls[index], surveyed.inputs_BTD[index]
    try:
        return run_block(block, hidden_BTD, surveyed.bound_call(index)), call
    except (RuntimeError, ValueError, TypeError, IndexError):  # shapes that do not broadcast, or a check of shapes
        call = call.repeating(1)
    with running(model, f"block by block (block {index})"):
        return run_block(block, hidden_BTD, call.bind(surveyed.bound[index])), call
