"""Grids, ranges and the assignment of schemes by pattern."""

import pytest

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.weights.assignment import SchemeOverride, assign_schemes
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme

NAMES = [f"model.layers.{i}.{part}.weight" for i in range(2) for part in ("attn.q_proj", "mlp.down_proj")]


@pytest.mark.parametrize(
    ("bits", "levels", "storage"),
    [
        (1, (-1, 1), 1),
        ("ternary", (-1, 0, 1), 2),
        (2, (-2, -1, 0, 1), 2),
        (3, tuple(range(-4, 4)), 3),
        (8, tuple(range(-128, 128)), 8),
    ],
)
def test_grids(bits: object, levels: tuple[int, ...], storage: int) -> None:
    scheme = QuantScheme(bits)  # type: ignore[arg-type]
    assert scheme.grid.levels == levels
    assert scheme.storage_bits == storage


@pytest.mark.parametrize("bits", [0, 9, -1, "binary", 1.58])
def test_bits_out_of_range(bits: object) -> None:
    with pytest.raises(ConfigurationError, match="bits must be 1 to 8 or 'ternary', got"):
        QuantScheme(bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("group_size", [0, -2])
def test_group_size_out_of_range(group_size: int) -> None:
    with pytest.raises(ConfigurationError, match=f"group_size must be .* got {group_size}"):
        QuantScheme(2, group_size)


def test_ragged_and_per_row_groups() -> None:
    assert QuantScheme(2, 128).num_groups(576) == 5
    assert QuantScheme(2, -1).num_groups(576) == 1
    assert QuantScheme(2, 1024).group_length(576) == 576


def test_all_weights_by_default() -> None:
    assert assign_schemes(NAMES, QuantScheme(3)) == dict.fromkeys(NAMES, QuantScheme(3))


def test_include_exclude_and_overrides() -> None:
    chosen = assign_schemes(
        NAMES,
        QuantScheme(2, 64),
        include=["*.0.*"],
        exclude=["*.q_proj"],
        overrides={"*.down_proj": SchemeOverride(bits=4), "*.0.mlp.*": SchemeOverride(group_size=32)},
    )
    assert chosen == {"model.layers.0.mlp.down_proj.weight": QuantScheme(4, 32)}


@pytest.mark.parametrize("option", ["include", "exclude", "overrides"])
def test_a_pattern_that_matches_nothing(option: str) -> None:
    value = {"*.k_proj": SchemeOverride(bits=4)} if option == "overrides" else ["*.k_proj"]
    with pytest.raises(ConfigurationError, match=rf"{option}: the pattern '\*.k_proj' matches none of the 4"):
        assign_schemes(NAMES, QuantScheme(2), **{option: value})  # type: ignore[arg-type]


def test_nothing_left() -> None:
    with pytest.raises(ConfigurationError, match="leave no weight to quantize"):
        assign_schemes(NAMES, QuantScheme(2), exclude=["*"])


def test_an_override_switches_salient_part_and_budget_off() -> None:
    base = QuantScheme(1, 64, SalientPart(), budget=2.2)
    override = SchemeOverride(bits=4, salient=False, budget=False)
    schemes = assign_schemes(NAMES, base, overrides={"*.down_proj": override})
    assert schemes["model.layers.0.mlp.down_proj.weight"] == QuantScheme(4, 64)
    assert {scheme for name, scheme in schemes.items() if "down_proj" not in name} == {base}


def test_an_override_that_the_budget_forbids_says_how_to_leave_it() -> None:
    base = QuantScheme(1, 64, budget=2.2)
    with pytest.raises(ConfigurationError, match=r"overrides: '\*\.down_proj'.*4 bits.*budget: false"):
        assign_schemes(NAMES, base, overrides={"*.down_proj": SchemeOverride(bits=4)})


def test_true_switches_nothing_on() -> None:
    with pytest.raises(ConfigurationError, match="budget: true says nothing"):
        SchemeOverride(budget=True).check()
