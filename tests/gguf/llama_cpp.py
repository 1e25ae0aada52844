"""llama.cpp's own functions in this process: only such as do not end it."""

import ctypes
import functools
from pathlib import Path

import numpy as np

from lightning_gsq.gguf.quantizer import library_path
from lightning_gsq.gguf.types.table import GgmlType

NO_FUNCTION = ("F32",)
ROWS = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}


class _Parameters(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]


@functools.cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library_path()))
    lib.ggml_type_name.restype = ctypes.c_char_p
    lib.ggml_blck_size.restype = ctypes.c_int64
    lib.ggml_row_size.restype, lib.ggml_row_size.argtypes = ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _Parameters]
    for name, result, extra in (
        ("gguf_free", None, []),
        ("gguf_get_n_tensors", ctypes.c_int64, []),
        ("gguf_get_n_kv", ctypes.c_int64, []),
        ("gguf_find_key", ctypes.c_int64, [ctypes.c_char_p]),
        ("gguf_get_val_str", ctypes.c_char_p, [ctypes.c_int64]),
        ("gguf_get_val_u32", ctypes.c_uint32, [ctypes.c_int64]),
        ("gguf_get_arr_n", ctypes.c_size_t, [ctypes.c_int64]),
        ("gguf_get_arr_str", ctypes.c_char_p, [ctypes.c_int64, ctypes.c_size_t]),
        ("gguf_get_tensor_name", ctypes.c_char_p, [ctypes.c_int64]),
        ("gguf_get_tensor_type", ctypes.c_int, [ctypes.c_int64]),
        ("gguf_get_tensor_size", ctypes.c_size_t, [ctypes.c_int64]),
        ("gguf_get_tensor_offset", ctypes.c_size_t, [ctypes.c_int64]),
        ("gguf_get_data_offset", ctypes.c_size_t, []),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, [ctypes.c_void_p, *extra]
    return lib


def dequantize(raw: np.ndarray, kind: GgmlType) -> np.ndarray:
    """What llama.cpp's own code makes of bytes."""
    if kind.name in NO_FUNCTION:
        return raw.view(np.float32)
    family, _, letter = kind.name.partition("_")
    name = f"{family.lower()}_{letter if letter == 'K' else letter.lower()}"
    function = getattr(library(), ROWS.get(kind.name, f"dequantize_row_{name}"))
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    raw = np.ascontiguousarray(raw)
    values = np.empty((len(raw), raw.shape[1] // kind.num_bytes * kind.length), np.float32)
    function(raw.ctypes.data, values.ctypes.data, values.size)
    return values


class Reader:
    """A file as llama.cpp's own reader sees it."""

    def __init__(self, path: Path) -> None:
        lib, self._at = library(), ctypes.c_void_p(library().gguf_init_from_file(str(path).encode(), _Parameters(True)))
        assert self._at, f"llama.cpp does not read {path}"
        begin = lib.gguf_get_data_offset(self._at)
        self.tensors = {
            lib.gguf_get_tensor_name(self._at, i).decode(): (
                lib.gguf_get_tensor_type(self._at, i),
                begin + lib.gguf_get_tensor_offset(self._at, i),
                lib.gguf_get_tensor_size(self._at, i),
            )
            for i in range(lib.gguf_get_n_tensors(self._at))
        }

    def text(self, key: str) -> str:
        return library().gguf_get_val_str(self._at, self._key(key)).decode()

    def number(self, key: str) -> int:
        return library().gguf_get_val_u32(self._at, self._key(key))

    def texts(self, key: str) -> list[str]:
        place = self._key(key)
        count = library().gguf_get_arr_n(self._at, place)
        return [library().gguf_get_arr_str(self._at, place, i).decode() for i in range(count)]

    def _key(self, key: str) -> int:
        place = library().gguf_find_key(self._at, key.encode())
        assert place >= 0, f"no key {key}"
        return place
