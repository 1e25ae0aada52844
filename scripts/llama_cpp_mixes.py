"""The mixes of types that llama.cpp's quantizer makes of a name such as Q4_K_M, for dense decoders.

What ``llama_tensor_get_type`` in llama.cpp's ``src/llama-quant.cpp`` says (autumn 2026): most matrices take the type of
the name; values, downward and output projections take a wider one, in some mixes only in the first and last blocks; a
tied embedding, or the head, takes Q6_K, or Q8_0 where its rows are no whole blocks. Rows that a type does not hold take
its fallback (``q3_k`` -> ``q4_0``), as ``--model.fallback`` says. Experts and Falcon have rules of their own, which are
not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from transformers import PreTrainedModel

from lightning_gsq.models.ends import find_ends
from lightning_gsq.weights.assignment import fit_rows, scheme_of
from lightning_gsq.weights.presets import preset_named

Rule = Callable[[int, int], str]
"""The type in a block, from its number and how many there are."""


def _first(count: Callable[[int], int], wide: str, other: str) -> Rule:
    return lambda index, depth: wide if index < count(depth) else other


def _outer_thirds(wide: str, other: str) -> Rule:
    """The first and last eighth of the blocks, and every third between."""

    def rule(index: int, depth: int) -> str:
        eighth = depth // 8
        return wide if index < eighth or index >= 7 * depth // 8 or (index - eighth) % 3 == 2 else other

    return rule


def _always(name: str) -> Rule:
    return lambda index, depth: name


BASES = {
    "Q2_K": "q2_k",
    "Q3_K_S": "q3_k",
    "Q3_K_M": "q3_k",
    "Q3_K_L": "q3_k",
    "Q4_K_S": "q4_k",
    "Q4_K_M": "q4_k",
    "Q5_K_S": "q5_k",
    "Q5_K_M": "q5_k",
    "Q6_K": "q6_k",
}
"""From the smallest to the largest: what most matrices take."""
WIDER: dict[str, dict[str, Rule]] = {
    "Q2_K": {"v_proj": _always("q3_k"), "down_proj": _always("q3_k"), "o_proj": _always("q3_k")},
    "Q3_K_M": {
        "v_proj": _first(lambda depth: 2, "q5_k", "q4_k"),
        "down_proj": _first(lambda depth: depth // 16, "q5_k", "q4_k"),
        "o_proj": _always("q4_k"),
    },
    "Q3_K_L": {"v_proj": _always("q5_k"), "down_proj": _always("q5_k"), "o_proj": _always("q5_k")},
    "Q4_K_S": {
        "v_proj": _first(lambda depth: 4, "q5_k", "q4_k"),
        "down_proj": _first(lambda depth: depth // 8, "q5_k", "q4_k"),
    },
    "Q4_K_M": {"v_proj": _outer_thirds("q6_k", "q4_k"), "down_proj": _outer_thirds("q6_k", "q4_k")},
    "Q5_K_M": {"v_proj": _outer_thirds("q6_k", "q5_k"), "down_proj": _outer_thirds("q6_k", "q5_k")},
}
"""What others take, by the end of their names."""
_BLOCK = re.compile(r"\.(\d+)\.")


def mix(kind: str, network: PreTrainedModel, columns: Mapping[str, int]) -> dict[str, str]:
    """What each matrix takes.

    Args:
        kind: A name of :data:`BASES`.
        network: The model.
        columns: Weights in a row of each matrix, by parameter name.

    Returns:
        The name of a preset for each.
    """
    config = network.config.get_text_config(decoder=True)
    depth, ends = int(config.num_hidden_layers), find_ends(network)
    head = ends.embedding if ends.tied else ends.head
    shares = config.num_attention_heads // getattr(config, "num_key_value_heads", config.num_attention_heads)
    widths = {}
    for name, width in columns.items():
        block, module = _BLOCK.search(name), name.removesuffix(".weight").rpartition(".")[2]
        if block is None:
            whole = width % preset_named(BASES[kind]).multiple == 0
            widths[name] = ("q6_k" if whole else "q8_0") if name == head else BASES[kind]
        elif kind == "Q2_K" and module == "v_proj" and shares >= 4:
            widths[name] = "q4_k"
        else:
            rule = WIDER.get(kind, {}).get(module, _always(BASES[kind]))
            widths[name] = rule(int(block[1]), depth)
    fitting = fit_rows({name: scheme_of(width) for name, width in widths.items()}, columns, fallback=True)
    return {name: str(scheme.preset) for name, scheme in fitting.items()}
