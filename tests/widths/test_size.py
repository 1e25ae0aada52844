"""Sizes as a user writes them; matrices that choose together."""

from __future__ import annotations

import pytest

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.weights.assignment import names_it, scheme_of
from lightning_gsq.widths.groups import group_name, make_groups, scheme_name
from lightning_gsq.widths.size import Size


@pytest.mark.parametrize(
    ("text", "size"),
    [("80MB", 80_000_000), ("1.5 kB", 1500), ("2MiB", 2 * 2**20), ("2.6bpw", 32_500_000), ("0.1gb", 100_000_000)],
)
def test_sizes(text: str, size: int) -> None:
    assert Size(text).num_bytes(100_000_000) == size


@pytest.mark.parametrize("text", ["80", "MB", "-3MB", "0MB", "80 MBit", "2,6bpw", "nan MB", "1e3MB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.size must be a number above 0 with a unit"):
        Size(text)


def test_sixteen_bits_are_the_most() -> None:
    assert Size("16bpw").num_bytes(1000) == 2000
    with pytest.raises(ConfigurationError, match=r"16\.01 bits.*give at most 0\.0MB"):
        Size("2001B").num_bytes(1000)


def test_experts_of_a_list_choose_together() -> None:
    assert group_name("model.layers.3.mlp.experts.12.down_proj.weight", "model.layers") == (
        "model.layers.3.mlp.experts.*.down_proj.weight"
    )
    assert group_name("lm_head.weight", "model.layers") == "lm_head.weight"
    options = {"w2g16": scheme_of("w2g16"), "w4g16": scheme_of("w4g16")}
    names = [f"h.{block}.experts.{expert}.up.weight" for block in range(2) for expert in range(3)]
    groups = make_groups({"h.0.q.weight": scheme_of("q4_0")}, dict.fromkeys(names, options), "h")
    assert [(group.name, len(group.members), group.pinned) for group in groups] == [
        ("h.0.experts.*.up.weight", 3, False),
        ("h.1.experts.*.up.weight", 3, False),
        ("h.0.q.weight", 1, True),
    ]


def test_names_of_schemes_are_presets() -> None:
    for name in ("w3g64", "wtg128", "q4_k", "mlx4g64"):
        assert scheme_name(scheme_of(name)) == name


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("*", False),
        ("model.*", False),
        ("*.embed_tokens", True),
        ("model.embed_tokens.weight", True),
        ("*tokens", False),
    ],
)
def test_patterns_that_mean_many_weights_do_not_mean_the_embedding(pattern: str, named: bool) -> None:
    assert names_it(pattern, "model.embed_tokens.weight", outside=True) == named
