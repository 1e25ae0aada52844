"""Embedding and head: quantized weights outside of the blocks.

At low bits they are most of a small model's file, and no block trains them. So they come first:

1. Each is a matrix ``V D`` with groups along ``D``, rounded to nearest in row chunks on the device. What is a head,
   also one tied to the embedding, is rounded with importance: an error in column ``d`` counts by the mean square of
   feature ``d`` of the last hidden states. A pure embedding is looked up, not multiplied, and has no such weights.
2. A tied head shares the embedding's codes, as it shared its numbers: ``model.embedding`` is for both, and
   ``model.head`` is refused there (two matrices would make the file larger, which is not what the option is for).
3. The quantized stream of the warm start and of the blocks phase begins with the quantized embedding, the
   full-precision stream with the original: blocks learn to repair its error as they do that of the blocks before.
4. In the end-to-end phase the student has these weights, the teacher the originals. Their scales train where
   ``end_to_end.train`` names "embedding".

They lie in ``blocks/rounded-outer.safetensors``, after the end-to-end phase in ``blocks/end_to_end-outer.safetensors``,
written and read like a block. They are listed apart from the blocks in the summary: bits per weight are of the blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.models.ends import find_ends, head_inputs
from lightning_gsq.models.standing_in import standing_in
from lightning_gsq.quantizers import RTN
from lightning_gsq.quantizers.warm_start import quantized, stack
from lightning_gsq.run.block_files import OUTER, ROUNDED, Blocks, DamagedFileError, Expected
from lightning_gsq.run.forward_passes import sequences_at_once
from lightning_gsq.run.matrices import as_stored
from lightning_gsq.run.run import Run
from lightning_gsq.weights.quantized import QuantizedWeight
from lightning_gsq.weights.scheme import QuantScheme

ROWS = 8192
"""Rows that are rounded at once."""


def quantize_outer(run: Run) -> Blocks:
    """Rounds embedding and head where the settings ask for it, or reads what an earlier start left.

    Returns:
        The quantized weights by parameter name; none where both stay as they are. The model is left as it was.
    """
    network = run.model.network
    expected = run.model.outer.expected(network)
    if not expected:
        return {}
    if run.ranks.agree(_is_whole(run, expected)):
        return run.folder.read_block(ROUNDED, OUTER, expected)
    ends = find_ends(network)
    heads = {ends.head, ends.embedding} if ends.tied else {ends.head}
    moments_D = _moments_if_known(run) if heads & set(expected) else None
    dtype = run.model.storage.scale_dtype
    tensors = {
        name: round_rows(
            network.get_parameter(name).data, scheme, moments_D if name in heads else None, dtype, run.device
        )
        for name, (scheme, _) in expected.items()
    }
    run.folder.write_block(ROUNDED, OUTER, tensors)
    return tensors


def _is_whole(run: Run, expected: Expected) -> bool:
    """Whether the file of an earlier start is there and what it was."""
    if not run.ranks.first or not run.folder.has_blocks(ROUNDED, [OUTER]):
        return False
    try:
        run.folder.read_block(ROUNDED, OUTER, expected)
    except DamagedFileError as error:
        run.say(str(error))
        return False
    return True


def read_outer(run: Run, kind: str) -> Blocks:
    """The weights outside of the blocks that belong to the blocks of that kind."""
    expected = run.model.outer.expected(run.model.network)
    return run.folder.read_block(outer_kind(kind), OUTER, expected) if expected else {}


def outer_kind(kind: str) -> str:
    """The kind of the outer weights' file that belongs to a kind of block files: only the last phase trains them."""
    return kind if kind == "end_to_end" else ROUNDED


def round_rows(
    w_VD: Tensor, scheme: QuantScheme, moments_D: Tensor | None, scale_dtype: torch.dtype, device: torch.device
) -> QuantizedWeight:
    """A matrix rounded to nearest, some rows at a time, on the CPU in the end.

    Args:
        w_VD: The matrix.
        scheme: Grid and groups.
        moments_D: How much a squared error in each column counts; None if all count alike.
        scale_dtype: Stored dtype of the scales.
        device: Where to compute.

    Raises:
        ConfigurationError: a scale does not fit its dtype.
    """
    round_to_nearest = RTN(weighted=moments_D is not None)
    importance_DD = None if moments_D is None else torch.diag(moments_D.to(device, torch.float32))
    starts = [round_to_nearest(w.to(device, torch.float32), importance_DD, scheme) for w in w_VD.split(ROWS)]
    return as_stored(quantized(stack(starts), scheme, scale_dtype), w_VD, "a weight outside of the blocks")


def _moments_if_known(run: Run) -> Tensor | None:
    """Those of :func:`head_moments`; None, said aloud, where they cannot be had and nobody asked for such a head."""
    try:
        return head_moments(run)
    except ConfigurationError as error:
        if not run.model.outer.automatic:
            raise
        run.say(f"note: all columns of the embedding count alike: {error}")
        return None


@torch.no_grad()
def head_moments(run: Run) -> Tensor:
    """Mean square of each feature that enters the full-precision model's head, fp32 ``D``; one forward pass."""
    network, blocks = run.model.network, find_blocks(run.model.network)[1]
    ids_NT = run.train_ids_NT[: sequences_at_once(run.data.sequence_length)]
    elsewhere = network.device != run.device
    visits = {index: visiting(block, run.device) for index, block in enumerate(blocks)} if elsewhere else {}
    with standing_in(visits, blocks):
        hidden_ND = head_inputs(network, ids_NT).flatten(0, -2).double()
    sums_D = hidden_ND.square().sum(0).to(run.device)
    count = torch.tensor(float(len(hidden_ND)), dtype=torch.float64, device=run.device)
    return (run.ranks.sum(sums_D) / run.ranks.sum(count)).float()


def visiting(block: nn.Module, device: torch.device) -> Callable[..., Any]:
    """A function that does what a block does, on a device that only it visits: its results come back."""
    home = next(block.parameters()).device

    def move(to: torch.device) -> Callable[[Any], Any]:
        return lambda value: value.to(to) if isinstance(value, Tensor) else value

    def forward(*args: Any, **kwargs: Any) -> Any:
        visitor = copy.deepcopy(block).to(device)
        # The class's own forward: the instance's is this function.
        output = type(block).forward(visitor, *tree_map(move(device), args), **tree_map(move(device), kwargs))
        return tree_map(move(home), output)

    return forward
