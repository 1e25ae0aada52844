"""The process that :mod:`lightning_gsq.gguf.quantizer` starts. It needs nothing but llama.cpp's library.

    python -P quantizer_process.py library threads

On standard input, matrix after matrix: a head (type, rows, columns, whether there is an importance), the fp32 rows, the
fp32 importance. On standard output, for each: the number of bytes, and the bytes. It ends when its input ends.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

HEAD, SIZE = struct.Struct("<iqqi"), struct.Struct("<q")


def load(path: str) -> ctypes.CDLL:
    """llama.cpp's library with the types of the functions that are called here."""
    library = ctypes.CDLL(path)
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_quantize_init.restype = None
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ]
    return library


def quantize(
    library: ctypes.CDLL,
    number: int,
    rows: int,
    columns: int,
    data: bytearray,
    importance: bytearray | None,
    threads: int,
) -> bytearray:
    """The bytes of a matrix; rows do not depend on each other, so that the threads change nothing but the time."""
    row_bytes = library.ggml_row_size(number, columns)
    result = bytearray(rows * row_bytes)
    source, target = _address(data), _address(result)
    weights = None if importance is None else _address(importance)
    library.ggml_quantize_init(number)
    share = -(-rows // threads)

    def part(begin: int) -> int:
        count = min(share, rows - begin)
        made: int = library.ggml_quantize_chunk(number, source, target, begin * columns, count, columns, weights)
        return made

    with ThreadPoolExecutor(threads) as pool:
        made = sum(pool.map(part, range(0, rows, share)))
    if made != len(result):
        raise RuntimeError(f"type {number}: made {made} bytes, expected {len(result)}")
    return result


def serve(library: ctypes.CDLL, threads: int, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers until there are no more requests."""
    while head := _read(requests, HEAD.size):
        number, rows, columns, has_importance = HEAD.unpack(head)
        data = _read(requests, 4 * rows * columns)
        importance = _read(requests, 4 * columns) if has_importance else None
        result = quantize(library, number, rows, columns, data, importance, threads)
        answers.write(SIZE.pack(len(result)))
        answers.write(result)
        answers.flush()


def _read(stream: BinaryIO, count: int) -> bytearray:
    """So many bytes; none at the end of the input."""
    data = bytearray(count)
    view, position = memoryview(data), 0
    while position < count:
        got = stream.readinto(view[position:])  # type: ignore[attr-defined]
        if not got:
            if position:
                raise EOFError(f"the input ended after {position} of {count} bytes")
            return bytearray()
        position += got
    return data


def _address(data: bytearray) -> int:
    return ctypes.addressof((ctypes.c_char * len(data)).from_buffer(data))


if __name__ == "__main__":
    # What the library prints must not fall among the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(load(sys.argv[1]), int(sys.argv[2]), sys.stdin.buffer, answers)
