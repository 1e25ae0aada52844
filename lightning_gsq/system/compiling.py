"""What every use of ``torch.compile`` in this package shares."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

RECOMPILE_LIMIT = 64
"""Variants kept of one function: one per level grid, layout, kind of block, with and without gradients. Beyond
torch's own limit of 8 a function would run uncompiled from then on."""

_log = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])


@functools.cache
def cxx() -> str | None:
    """Path of the C++ compiler: what the variable CXX names, else g++ or clang++; None, with a warning, without one."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++"):
        if name and (compiler := shutil.which(name)):
            return compiler
    _log.warning(
        "no C++ compiler found (g++ or clang++): blocks, the sampling of weights and packed layers run as uncompiled "
        "PyTorch, two to five times slower; install one, or set --model.gumbel.backend eager and "
        "--model.compile_blocks false to silence this"
    )
    return None


@functools.cache
def compiler_available(device_type: str) -> bool:
    """Whether code can be compiled for this device: Triton for CUDA, a C++ compiler for the CPU."""
    if device_type == "cuda":
        return torch.utils._triton.has_triton()
    return cxx() is not None


def compile_function(function: F, dynamic: bool | None = None) -> F:
    """``torch.compile`` with room for all variants of a run."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return cast(F, torch.compile(function, dynamic=dynamic))
