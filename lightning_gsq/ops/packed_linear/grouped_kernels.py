"""The Triton kernels for tokens sorted by weight: each program finds out on the device which weight is its own.

Where each weight's tokens begin stays on the device, so that nothing waits for it. A grid has as many tiles of tokens
as there could be, ``min(S, E) + S // TOKENS``; those that turn out to be more than there are do nothing.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lightning_gsq.ops.packed_linear.kernels import ONE, _batch_kernel, _constants, _gemv_kernel, arrange
from lightning_gsq.ops.packed_linear.tuning import Tile


def weight_of_token(offsets_E: Tensor, tokens: int) -> Tensor:
    """The weight that each token meets, int32; -1 for tokens beyond the last weight's."""
    place_S = torch.arange(tokens, device=offsets_E.device)
    weight_S = torch.searchsorted(offsets_E, place_S, right=True) - 1
    return torch.where(weight_S < len(offsets_E) - 1, weight_S, -1).to(torch.int32)


def tiles_of(offsets_E: Tensor, tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, first token and end of the tokens of each tile, int32; tiles without tokens are the last ones.

    Args:
        offsets_E: Where each weight's tokens begin, and where the last one's end.
        tokens: ``S``.
        width: Tokens of a full tile.
    """
    experts = len(offsets_E) - 1
    most = min(tokens, experts) + tokens // width
    count_E = offsets_E.diff()
    last_tile_E = ((count_E + width - 1) // width).cumsum(0)
    tile_T = torch.arange(most, device=offsets_E.device)
    weight_T = torch.searchsorted(last_tile_E, tile_T, right=True).clamp(max=experts - 1)
    before_T = last_tile_E[weight_T] - (count_E[weight_T] + width - 1) // width
    end_T = offsets_E[weight_T + 1]
    first_T = torch.minimum(offsets_E[weight_T] + (tile_T - before_T) * width, end_T)
    return weight_T.to(torch.int32), first_T.to(torch.int32), end_T.to(torch.int32)


def linear(
    x_SI: Tensor,
    words_OW: Tensor,
    scales_OG: Tensor,
    offsets_E: Tensor,
    *,
    bits: int,
    group_length: int,
    tile: Tile,
) -> Tensor:
    """``x w_e^T`` for each weight's tokens, ``S O``."""
    (tokens, in_features), word_count = x_SI.shape, words_OW.shape[1]
    rows = words_OW.shape[0] // (len(offsets_E) - 1)
    constants = _constants(bits)
    fields, words = int(constants["FIELDS"]), int(constants["WORDS"])
    arranged, sums = arrange(x_SI, fields, tile.units)
    units, padded = -(-in_features // fields), arranged.shape[-1]
    units_per_group = group_length // fields if group_length < in_features else units
    sizes = (tokens, rows, units, padded, word_count, units_per_group, ONE)
    even = padded == units and word_count == units * words
    options = {**constants, "HAS_BIAS": False, "GROUPED": True, "EVEN": even}
    options |= {"ROWS": tile.rows, "UNITS": tile.units, "num_warps": tile.warps}
    y_SO = torch.zeros(tokens, rows, dtype=x_SI.dtype, device=x_SI.device)
    if tile.tokens == 1:
        _gemv_kernel[(triton.cdiv(rows, tile.rows), tokens)](
            arranged, sums, words_OW, scales_OG, None, weight_of_token(offsets_E, tokens), y_SO, *sizes,
            *words_OW.stride(), *scales_OG.stride(), **options,
        )  # fmt: skip
        return y_SO
    weight_T, first_T, end_T = tiles_of(offsets_E, tokens, tile.tokens)
    _batch_kernel[(triton.cdiv(rows, tile.rows), len(weight_T))](
        arranged, words_OW, scales_OG, None, weight_T, first_T, end_T, y_SO, *sizes,
        *words_OW.stride(), *scales_OG.stride(),
        UPCAST=x_SI.dtype == torch.float32 or not x_SI.is_cuda, TOKENS=tile.tokens, **options,
    )  # fmt: skip
    return y_SO
