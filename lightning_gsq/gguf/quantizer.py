"""llama.cpp's own quantizers, in a process of their own: a failed assertion in them ends the process that they run in.

The library is the one inside the package ``xllamacpp``. One process quantizes many matrices, and starts in a fraction
of a second; it is started by the first matrix and again after it died.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.quantizer_process import HEAD, SIZE
from lightning_gsq.gguf.types.codec import decode
from lightning_gsq.gguf.types.table import GgmlType

PACKAGE = "xllamacpp"
SCRIPT = Path(__file__).with_name("quantizer_process.py")


def library_path() -> Path:
    """The shared library with llama.cpp's quantizers.

    Raises:
        ConfigurationError: the package that has it is not installed.
    """
    spec = find_spec(PACKAGE)
    candidates = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    libraries = sorted(file for folder in candidates for file in folder.glob(f"{PACKAGE}*.so"))
    if not libraries:
        raise ConfigurationError(
            f"llama.cpp's quantizers are in the package {PACKAGE}, which is not installed; install it with "
            "pip install 'lightning-gsq[export]'"
        )
    return libraries[0]


def quantize_with_llama_cpp(w_OI: Tensor, kind: GgmlType, importance_I: Tensor | None = None) -> np.ndarray:
    """A matrix rounded to a type by llama.cpp, which searches for scales that lose least.

    Args:
        w_OI: The matrix, its rows whole blocks.
        kind: The type.
        importance_I: How much the error of each column counts, such as the mean square of its input: non-negative.
            IQ1_S, IQ2_XXS and IQ2_XS cannot be made without.

    Returns:
        uint8, ``O row_bytes``.

    Raises:
        ConfigurationError: the type does not hold such rows, weights or importance are not finite, an importance is
            missing, weights are too large for the type's fp16 scales, ``xllamacpp`` is not installed, or llama.cpp
            failed on them.
    """
    rows, columns = w_OI.shape
    row_bytes = kind.row_bytes(columns)
    w_OI = w_OI.detach().to("cpu", torch.float32).contiguous()
    if not w_OI.numel():
        raise ConfigurationError(f"{kind.name}: a matrix of shape {tuple(w_OI.shape)} has no weights to quantize")
    if not bool(torch.isfinite(w_OI).all()):
        raise ConfigurationError(f"{kind.name}: the weights to quantize are not all finite")
    if importance_I is None and kind.needs_importance:
        raise ConfigurationError(
            f"{kind.name} cannot be made without an importance: give the mean square of every input, from calibration "
            "or an imatrix file"
        )
    if importance_I is not None:
        importance_I = _checked(importance_I, kind, columns)
    raw = _process().quantize(w_OI, kind, importance_I).reshape(rows, row_bytes)
    stored = decode(raw, kind)
    for scale in [stored] if isinstance(stored, Tensor) else stored.scales():
        if not bool(torch.isfinite(scale).all()):
            raise ConfigurationError(
                f"{kind.name} does not reach weights as large as {float(w_OI.abs().max()):.3g}: its numbers of 16 bits "
                "would be infinite; choose BF16 or F32 for them"
            )
    return raw


def _checked(importance_I: Tensor, kind: GgmlType, columns: int) -> Tensor:
    importance_I = importance_I.detach().to("cpu", torch.float32).contiguous()
    if tuple(importance_I.shape) != (columns,):
        raise ConfigurationError(
            f"{kind.name}: expected an importance for each of {columns} columns, got {tuple(importance_I.shape)}"
        )
    if not bool(torch.isfinite(importance_I).all()) or bool((importance_I < 0).any()):
        raise ConfigurationError(f"{kind.name}: an importance is negative or not finite")
    return importance_I


class QuantizerProcess:
    """A running process of llama.cpp's quantizers.

    Args:
        library: The shared library.
        threads: Rows that are quantized at the same time.
    """

    def __init__(self, library: Path, threads: int) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        environment: Mapping[str, str] = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        self._process = subprocess.Popen(
            # -P keeps this folder, whose names are those of packages, out of the import path.
            [sys.executable, "-P", str(SCRIPT), str(library), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )
        self._lock = threading.Lock()

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def quantize(self, w_OI: Tensor, kind: GgmlType, importance_I: Tensor | None) -> np.ndarray:
        """The bytes of a matrix; see :func:`quantize_with_llama_cpp`, which checks what goes in.

        Raises:
            ConfigurationError: the process died.
        """
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None and answers is not None
        with self._lock:
            try:
                requests.write(HEAD.pack(kind.number, *w_OI.shape, importance_I is not None))
                requests.write(w_OI.numpy().reshape(-1).view(np.uint8).data)
                if importance_I is not None:
                    requests.write(importance_I.numpy().view(np.uint8).data)
                requests.flush()
                head = answers.read(SIZE.size)
                result = answers.read(SIZE.unpack(head)[0]) if len(head) == SIZE.size else b""
            except BrokenPipeError:
                result = b""
        if not result:
            raise self._failure(w_OI, kind)
        return np.frombuffer(result, np.uint8)

    def close(self) -> None:
        """Ends it, whether or not a fork of this process still holds its input open."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # it died with a request in the pipe
        self._process.wait()
        self._errors.close()

    def _failure(self, w_OI: Tensor, kind: GgmlType) -> ConfigurationError:
        status = self._process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        said = " | ".join(lines[-3:]) or "it said nothing"
        return ConfigurationError(
            f"llama.cpp's quantizer to {kind.name} ended with status {status} on a matrix of shape "
            f"{tuple(w_OI.shape)}: {said}; choose another type for it"
        )


_starting = threading.Lock()
_shared: dict[int, QuantizerProcess] = {}
"""The process that this one started, by this one's id: a fork must not write to its parent's."""


def _process() -> QuantizerProcess:
    with _starting:
        process = _shared.get(os.getpid())
        if process is not None and process.alive:
            return process
        started = QuantizerProcess(library_path(), torch.get_num_threads())
        if process is None:
            atexit.register(close)
        else:
            process.close()
        _shared[os.getpid()] = started
        return started


def close() -> None:
    """Ends the shared process, if there is one; the next matrix starts another."""
    process = _shared.pop(os.getpid(), None)
    if process is not None:
        process.close()
