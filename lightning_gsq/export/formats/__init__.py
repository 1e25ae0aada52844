"""One file a format; importing this package registers them all.

native              this package's own, packed
dequantized         an ordinary Hugging Face folder
linear              what formats made of linear layers have in common
compressed_tensors  vLLM and transformers
expert_tensors      experts one by one, under the names of the family's own checkpoints
gptq                GPTQModel and what reads its files
mlx                 Apple's MLX
gguf                llama.cpp
gguf_storage        how a run lies in such a file: types, rows, the file it came from
gguf_embedding      whose embedding it gets where nobody asked for one
gguf_layout         where each parameter lies in it, before and after training
gguf_tensors        its tensors before they are written
gguf_check          is the file what the run computes?
gguf_transformers   does transformers compute the same from it?
"""

from lightning_gsq.export.formats.compressed_tensors import CompressedTensorsFormat
from lightning_gsq.export.formats.dequantized import DequantizedFormat
from lightning_gsq.export.formats.gguf import GGUFFormat
from lightning_gsq.export.formats.gptq import GPTQFormat
from lightning_gsq.export.formats.mlx import MLXFormat
from lightning_gsq.export.formats.native import NativeFormat

__all__ = ["CompressedTensorsFormat", "DequantizedFormat", "GGUFFormat", "GPTQFormat", "MLXFormat", "NativeFormat"]
