"""Which weights of a model a GGUF file lacks, and which of its tensors the model has no place for.

transformers' reader says nothing of a tensor that it does not use, fills half of a fused pair of experts' matrices with
zeros where the other half is missing, and finds other missing ones only after the rest has been dequantized. Its own
map of names is asked here, with the header alone.
"""

from __future__ import annotations

import re
from collections import defaultdict

from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.models.gguf_reader import quick_reader

IN_A_BLOCK = re.compile(r"blk\.\d+\.")
EXPERTS = "_exps"
"""End of the names, without ``.weight``, of tensors that the reader may fuse by two into one parameter."""
COMPUTED = "attn_rot_embd"


def compare_gguf(header: GGUFFile, model: PreTrainedModel) -> tuple[list[str], list[str], list[str]]:
    """Compares a file's tensors with a model.

    Args:
        header: The file.
        model: The model, with or without weights.

    Returns:
        Names in the model of weights that are not in the file; names in the file of tensors of modules of the model
        that have no such weight; names in the file of tensors of modules that the model does not have.
    """
    names = _names(header, model)
    tensors = {*header.tensors, *(_stem(name) for name in header.tensors if _stem(name).endswith(EXPERTS))}
    sources: dict[str, list[str]] = defaultdict(list)
    for stored, parameter in names.items():
        sources[parameter].append(stored)
    missing = [
        name
        for name, _ in model.named_parameters()  # a tied one once
        if name in sources and not (all if _fused(sources[name]) else any)(part in tensors for part in sources[name])
    ]
    unnamed = [name for name in header.tensors if name not in names and _stem(name) not in names]
    belonging = [name for name in unnamed if _belongs(name, names) and COMPUTED not in name]
    return missing, belonging, [name for name in unnamed if name not in belonging and COMPUTED not in name]


def _names(header: GGUFFile, model: PreTrainedModel) -> dict[str, str]:
    """The parameter of each tensor that the reader would use."""
    field = header.fields.get("general.architecture")
    processor = TENSOR_PROCESSORS.get(field.value if field else "", TensorProcessor)
    with quick_reader():
        names: dict[str, str] = get_gguf_hf_weights_map(model, processor(config=model.config.to_dict()))
    return names


def _stem(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _fused(stored: list[str]) -> bool:
    return all(_stem(name).endswith(EXPERTS) for name in stored)


def _belongs(name: str, names: dict[str, str]) -> bool:
    return bool(IN_A_BLOCK.match(name)) or f"{_stem(name)}.weight" in names
