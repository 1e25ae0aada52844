"""Which weights are quantized, and how each: patterns over their names."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.weights.grid import Bits
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme


@dataclass(frozen=True)
class SchemeOverride:
    """Settings that replace the scheme's own for the weights that a pattern names; null keeps the scheme's.

    Args:
        bits: Bits a weight, 1 to 8, or "ternary".
        group_size: Weights that share one scale; -1 for one scale a row.
        salient: The salient part; false for none.
        budget: True bits a weight, instead of the scheme's; false for no budget.

    Raises:
        ConfigurationError: ``true``, which says nothing.
    """

    bits: Bits | None = None
    group_size: int | None = None
    salient: bool | SalientPart | None = None
    budget: bool | float | None = None

    def __post_init__(self) -> None:
        for name in ("salient", "budget"):
            if getattr(self, name) is True:
                raise ConfigurationError(f"{name}: true says nothing; give its settings, or false to switch it off")

    def apply(self, scheme: QuantScheme) -> QuantScheme:
        """The scheme with this override's settings in place."""
        settings: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changes: dict[str, Any] = {
            name: None if value is False else value for name, value in settings.items() if value is not None
        }
        return dataclasses.replace(scheme, **changes)


def assign_schemes(
    names: Iterable[str],
    scheme: QuantScheme,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    overrides: Mapping[str, SchemeOverride] | None = None,
) -> dict[str, QuantScheme]:
    """Chooses the weights to quantize and the scheme of each.

    A pattern is a shell pattern (``*``, ``?``, ``[...]``) matched against the full parameter name, such as
    ``model.layers.3.mlp.down_proj.weight``, or against a module name without the ending ``.weight``. Where several
    overrides match a name, they apply in their order, so that the last one wins.

    Raises:
        ConfigurationError: a pattern matches no weight, or nothing is left to quantize.
    """
    names = list(names)
    include, exclude, overrides = tuple(include), tuple(exclude), dict(overrides or {})
    for option, patterns in (("include", include), ("exclude", exclude), ("overrides", overrides)):
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in names):
                examples = ", ".join(names[:3])
                raise ConfigurationError(
                    f"{option}: the pattern {pattern!r} matches none of the {len(names)} linear weights; "
                    f"their names look like {examples}"
                )
    chosen = {}
    for name in names:
        if not any(_matches(name, p) for p in include) or any(_matches(name, p) for p in exclude):
            continue
        own = scheme
        for pattern, override in overrides.items():
            if _matches(name, pattern):
                own = _applied(pattern, override, own)
        chosen[name] = own
    if not chosen:
        raise ConfigurationError(f"include={list(include)} and exclude={list(exclude)} leave no weight to quantize")
    return chosen


def _applied(pattern: str, override: SchemeOverride, scheme: QuantScheme) -> QuantScheme:
    try:
        return override.apply(scheme)
    except ConfigurationError as error:
        way = "; budget: false and salient: false in the override switch them off" if scheme.mixed else ""
        raise ConfigurationError(f"overrides: {pattern!r}: {error}{way}") from error


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern)
