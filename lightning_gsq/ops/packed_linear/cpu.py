"""The CPU form: a small C++ library, compiled at first use for the machine it runs on.

``torch.compile`` of the same arithmetic, in the layout that suits it best (lanes are words, inputs laid out field by
field), took 6.2 ms where this takes 3.3 (one token, 4096 x 14336, 2 bits, one thread of a Zen 4), compiles five times
longer, and has no good form for widths that straddle words. The library knows nothing of torch (pointers in,
pointers out), so it compiles in two seconds a width, once; it lies in the user's cache, under a name that changes
with the source, the compiler and the instruction set. Its OpenMP is the one that torch loaded, so
``torch.set_num_threads`` holds for it too.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lightning_gsq.system.compiling import cxx

FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
# -ffast-math is left out: linked into a library, it changes denormals for the whole process.
MOST_TOKENS = 16
"""Tokens up to which this form is meant to run."""
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_log = logging.getLogger(__name__)


def supports(in_features: int, group_length: int) -> bool:
    """Whether :func:`linear` takes such groups: multiples of 32 weights, or one a row."""
    return group_length % 32 == 0 or group_length >= in_features


@functools.cache
def library(bits: int) -> ctypes.CDLL | None:
    """The library for stored values of this width; None, with a warning, where it cannot be compiled."""
    compiler = cxx()
    if compiler is None:
        return None
    source = Path(__file__).with_name("cpu.cpp")
    try:
        # What the compiler would predefine names its version and the instruction set that "native" means.
        probe = [compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull]
        macros = subprocess.run(probe, capture_output=True, check=True).stdout
        key = hashlib.blake2b(macros + source.read_bytes() + " ".join(FLAGS).encode(), digest_size=12).hexdigest()
        target = _cache_folder() / f"packed-linear-{bits}-{key}.so"
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                made = Path(scratch) / target.name
                command = [compiler, *FLAGS, f"-DGSQ_BITS={bits}", str(source), "-o", str(made)]
                subprocess.run(command, capture_output=True, check=True)
                made.replace(target)
        return ctypes.CDLL(str(target))
    except (subprocess.CalledProcessError, OSError) as error:
        reason = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else error
        _log.warning(
            "the packed linear layer for %d bits cannot be compiled here: uncompiled PyTorch does its work, "
            "many times slower.\n%s",
            bits,
            reason,
        )
        return None


def linear(x_TI: Tensor, words_OW: Tensor, scales_OG: Tensor, *, bits: int, group_length: int) -> Tensor:
    """``x w^T``, fp32, for few tokens; the weight is never made dense."""
    tokens, columns = x_TI.shape
    x_TI, words_OW, scales_OG = x_TI.float().contiguous(), words_OW.contiguous(), _scales(scales_OG)
    y_TO = torch.empty(tokens, words_OW.shape[0])
    scratch = torch.empty(tokens * 9 * (columns + 128))
    _library(bits).gsq_packed_linear(
        _pointer(y_TO),
        _pointer(x_TI),
        _pointer(scratch),
        _pointer(words_OW),
        _pointer(scales_OG),
        _KINDS[scales_OG.dtype],
        *_sizes(tokens, words_OW.shape[0], columns, words_OW.shape[1], scales_OG.shape[1], group_length),
    )
    return y_TO


def grouped(
    y_SO: Tensor, x_SI: Tensor, words_OW: Tensor, scales_OG: Tensor, offsets: list[int], *, bits: int, group_length: int
) -> None:
    """The products of :func:`linear` for weights one after the other, ``E O`` rows, into ``y_SO``.

    Args:
        y_SO: fp32; rows of weights with more than :data:`MOST_TOKENS` tokens are left as they are.
        x_SI: Tokens, those of the first weight first.
        words_OW: Packed codes of all weights.
        scales_OG: Their scales.
        offsets: Where each weight's tokens begin, and where the last one's end.
        bits: Bits that a stored value takes.
        group_length: Weights in a full group.
    """
    experts, columns = len(offsets) - 1, x_SI.shape[1]
    rows = words_OW.shape[0] // experts
    x_SI, words_OW, scales_OG = x_SI.float().contiguous(), words_OW.contiguous(), _scales(scales_OG)
    scratch = torch.empty(MOST_TOKENS * 9 * (columns + 128))
    _library(bits).gsq_grouped_linear(
        _pointer(y_SO),
        _pointer(x_SI),
        _pointer(scratch),
        _pointer(words_OW),
        _pointer(scales_OG),
        _KINDS[scales_OG.dtype],
        (ctypes.c_int64 * len(offsets))(*offsets),
        *_sizes(experts, MOST_TOKENS, rows, columns, words_OW.shape[1], scales_OG.shape[1], group_length),
    )


def dequantize(
    words_OW: Tensor, scales_OG: Tensor, *, bits: int, in_features: int, group_length: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight ``O I``, fp32, fp16 or bf16, rounded once."""
    words_OW, scales_OG = words_OW.contiguous(), _scales(scales_OG)
    w_OI = torch.empty(words_OW.shape[0], in_features, dtype=dtype)
    _library(bits).gsq_dequantize(
        _pointer(w_OI),
        _KINDS[dtype],
        _pointer(words_OW),
        _pointer(scales_OG),
        _KINDS[scales_OG.dtype],
        *_sizes(words_OW.shape[0], in_features, words_OW.shape[1], scales_OG.shape[1], group_length),
    )
    return w_OI


def _library(bits: int) -> ctypes.CDLL:
    loaded = library(bits)
    assert loaded is not None, "callers ask library() first"
    return loaded


def _scales(scales_OG: Tensor) -> Tensor:
    return (scales_OG if scales_OG.dtype in _KINDS else scales_OG.float()).contiguous()


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _sizes(*values: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(ctypes.c_int64(value) for value in values)


def _cache_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "lightning-gsq"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lightning-gsq-"))
