"""Weights as the checkpoints of their family hold them: a fused expert parameter becomes a few matrices an expert.

vLLM and SGLang read a model's weights by the names of its published files (``mlp.experts.3.gate_proj`` for Qwen3-MoE,
``block_sparse_moe.experts.3.w1`` for Mixtral), while transformers fuses all experts of a block into one parameter.
Codes and scales go the way that transformers itself goes when it saves a model: no family is known by name here.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from lightning_gsq.export.companions import file_names
from lightning_gsq.export.planned import ExportedWeight, PlannedRun
from lightning_gsq.weights.quantized import QuantizedTensor

EXPERT = re.compile(r"(?P<parent>.*\.experts)\.\d+\.\w+")
"""The name of one matrix of one expert: readers look for ``experts`` and a number in it."""
ANY_BLOCK = r"\d+"

Kind = TypeVar("Kind", bound=Hashable)


def stem_of(run: PlannedRun, name: str) -> str:
    """A parameter's name in files, without ``.weight``; its name in the model where files hold it in several pieces."""
    shape = run.network.get_parameter(name).shape
    (stored, value), *others = file_names(run, {name: torch.empty(shape, device="meta")}).items()
    return (name if others or value.shape != shape else stored).removesuffix(".weight")


def expert_stems(run: PlannedRun, weight: ExportedWeight) -> list[str]:
    """Names of the matrices that files hold of a fused expert parameter, without ``.weight``.

    Empty where files hold it in another form than rows of each expert's matrices.
    """
    site = weight.site
    if site.shape:
        return []
    parameter = site.from_matrix(torch.empty(site.rows, site.in_features, device="meta"))
    stored = file_names(run, {weight.name: parameter})
    whole = sum(value.shape[0] for value in stored.values()) == site.rows and not len(stored) % site.experts
    matrices = all(value.ndim == 2 and value.shape[1] == site.in_features for value in stored.values())
    stems = [name.removesuffix(".weight") for name in stored if name.endswith(".weight")]
    named = len(stems) == len(stored) and all(EXPERT.fullmatch(stem) for stem in stems)
    return stems if whole and matrices and named else []


def expert_tensors(run: PlannedRun, weight: ExportedWeight, tensor: QuantizedTensor) -> dict[str, QuantizedTensor]:
    """Codes and scales of each matrix of :func:`expert_stems`, by its name."""

    def apart(rows_OC: Tensor) -> dict[str, Tensor]:
        site = replace(weight.site, in_features=rows_OC.shape[1])
        return file_names(run, {weight.name: site.from_matrix(rows_OC)})

    codes, scales = apart(tensor.codes_OI), apart(tensor.scales_OG)
    return {
        name.removesuffix(".weight"): QuantizedTensor(
            codes[name].contiguous(), scales[name].contiguous(), tensor.scheme
        )
        for name in codes
    }


def parent_of(stem: str) -> str:
    """The name of the module that holds an expert's matrix and all its like: ``model.layers.0.mlp.experts``."""
    match = EXPERT.fullmatch(stem)
    assert match is not None, stem
    return match["parent"]


def patterns(kinds: Mapping[str, Kind]) -> dict[str, Kind]:
    """Patterns (``re:`` and a regular expression) that tell experts of one kind from those of another.

    vLLM asks for the kind of a block's experts by the names ``…experts.0.gate_proj``, ``up_proj`` and ``down_proj``,
    whatever its files call them, so a pattern ends after ``experts``. Blocks are listed only where they differ.

    Args:
        kinds: What is asked of the experts of each parent (:func:`parent_of`).
    """
    places: dict[str, dict[str, Kind]] = {}
    for parent, kind in kinds.items():
        numbered = re.search(r"\.(\d+)\.", parent)
        number, rest = (numbered[1], parent[numbered.end() :]) if numbered else ("", parent)
        places.setdefault(rest, {})[number] = kind
    of_pattern: dict[str, Kind] = {}
    for rest, of_block in places.items():
        same = len(set(of_block.values())) == 1
        for number, kind in of_block.items():
            block = ANY_BLOCK if same else number
            of_pattern[rf"re:.*\.{block}\.{re.escape(rest)}\..*"] = kind
    return of_pattern


def parents(stems: Iterable[str]) -> set[str]:
    """The parents of all of these that are matrices of experts."""
    return {parent_of(stem) for stem in stems if EXPERT.fullmatch(stem)}
