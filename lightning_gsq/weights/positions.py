"""Where the salient weights are, as few bits: a bitmap, or the gaps between them.

A bitmap costs one bit a weight. Gaps cost about ``log2(1 / ratio) + 2`` bits a *salient* weight: each is the number of
unsalient weights since the last salient one, in a fixed width; the largest value of that width means "that many, and
go on". The width is the one that costs least, which stays within a bit or so of the entropy of random positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gsq.weights.packing import WORD_BITS, pack, packed_words, unpack

BITMAP = 0
"""Width that stands for the bitmap."""
WIDTHS = range(2, 9)


def encode_positions(mask_OI: Tensor) -> tuple[int, Tensor]:
    """The cheaper of bitmap and gaps.

    Args:
        mask_OI: bool.

    Returns:
        Width of the gaps (0 for the bitmap), and int32 words, ``1 W``, on the CPU.
    """
    flat = mask_OI.flatten().cpu()
    gaps = _gaps(flat)
    symbols = {width: _symbol_count(gaps, width) for width in WIDTHS}
    sizes = {BITMAP: packed_words(len(flat), 1), **{w: packed_words(count, w) for w, count in symbols.items()}}
    width = min(sizes, key=lambda w: sizes[w])
    if width == BITMAP:
        return BITMAP, pack(flat[None].to(torch.uint8), 1)
    escape = 2**width - 1
    escapes = gaps // escape
    values = torch.full((symbols[width],), escape, dtype=torch.uint8)
    values[torch.cumsum(escapes + 1, 0) - 1] = (gaps % escape).to(torch.uint8)
    return width, pack(values[None], width)


def decode_positions(width: int, words: Tensor, shape: tuple[int, int], count: int) -> Tensor:
    """Inverse of :func:`encode_positions`.

    Args:
        width: As returned.
        words: As returned.
        shape: ``(O, I)``.
        count: Salient weights.

    Raises:
        ValueError: the words do not describe that many weights of that shape.
    """
    size = shape[0] * shape[1]
    if width == BITMAP:
        mask = unpack(words, 1, size)[0].bool()
    else:
        values = unpack(words, width, words.shape[1] * WORD_BITS // width)[0].long()
        escape = 2**width - 1
        # Everything up to the last wanted gap; what fills the last word up is dropped.
        ends = (values != escape).nonzero().flatten()[:count]
        positions = torch.cumsum(torch.where(values == escape, escape, values + 1), 0)[ends] - 1
        if len(ends) != count or (count and int(positions[-1]) >= size):
            raise ValueError(f"the positions do not describe {count} salient weights of a matrix {shape}")
        mask = torch.zeros(size, dtype=torch.bool)
        mask[positions] = True
    if int(mask.sum()) != count:
        raise ValueError(f"the positions mark {int(mask.sum())} weights, expected {count}")
    return mask.view(shape)


def _gaps(mask: Tensor) -> Tensor:
    """Unsalient weights before each salient one, since the one before it."""
    positions = mask.nonzero().flatten()
    return torch.diff(positions, prepend=torch.tensor([-1])) - 1


def _symbol_count(gaps: Tensor, width: int) -> int:
    return int((gaps // (2**width - 1) + 1).sum())
