"""Which compilers this machine has, asked once and said once."""

from __future__ import annotations

import functools
import logging
import os
import shutil

import torch

_log = logging.getLogger(__name__)


@functools.cache
def cxx() -> str | None:
    """The C++ compiler: what the variable CXX names, else g++ or clang++; None, with a warning, without one."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    _log.warning(
        "no C++ compiler found (g++ or clang++): uncompiled PyTorch does its work on the CPU, some five times slower; "
        "install one, or choose the backend eager to silence this"
    )
    return None


@functools.cache
def compiler_available(device_type: str) -> bool:
    """Whether code can be compiled for this device: Triton for CUDA, a C++ compiler for the CPU."""
    if device_type == "cuda":
        return bool(torch.utils._triton.has_triton())
    return cxx() is not None
