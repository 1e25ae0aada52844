"""Which weights are quantized, and how each: patterns over their names."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.weights.grid import Bits
from lightning_gsq.weights.presets import preset_named
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme


def scheme_of(value: QuantScheme | Mapping[str, Any] | str) -> QuantScheme:
    """A scheme from a preset's name, or from its settings as plain data.

    Raises:
        ConfigurationError: there is no such preset, or a setting is out of range.
        TypeError: a setting does not exist.
    """
    if isinstance(value, QuantScheme):
        return value
    return QuantScheme(preset=value) if isinstance(value, str) else QuantScheme(**_with_salient(value))


def override_of(value: SchemeOverride | Mapping[str, Any] | str) -> SchemeOverride:
    """An override from a preset's name, or from its settings as plain data; checked.

    Raises:
        ConfigurationError: there is no such preset, or a setting makes no sense.
        TypeError: a setting does not exist.
    """
    if isinstance(value, SchemeOverride):
        return value.check()
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            settings = ", ".join(field.name for field in dataclasses.fields(SchemeOverride))
            raise ConfigurationError(f"expected the name of a preset, or settings ({settings}), got {value}")
        return SchemeOverride(preset=value).check()
    return SchemeOverride(**_with_salient(value)).check()


def _with_salient(settings: Mapping[str, Any]) -> dict[str, Any]:
    salient = settings.get("salient")
    return {**settings, "salient": SalientPart(**salient) if isinstance(salient, Mapping) else salient}


@dataclass(frozen=True)
class SchemeOverride:
    """Settings that replace the scheme's own for the weights that a pattern names; null keeps the scheme's.

    Args:
        bits: Bits a weight, 1 to 8, or "ternary".
        group_size: Weights that share one scale; -1 for one scale a row.
        salient: The salient part; false for none.
        preset: Name of a scheme that takes the place of the whole scheme, such as q4_k or w4g32.
        budget: True bits a weight, instead of the scheme's; false for no budget.
    """

    bits: Bits | None = None
    group_size: int | None = None
    salient: bool | SalientPart | None = None
    budget: bool | float | None = None
    preset: str | None = None

    def check(self) -> SchemeOverride:
        """Itself, if it makes sense.

        Raises:
            ConfigurationError: ``true``, which says nothing, settings beside a preset, or a preset that does not exist.
        """
        for name in ("salient", "budget"):
            if getattr(self, name) is True:
                raise ConfigurationError(f"{name}: true says nothing; give its settings, or false to switch it off")
        if self.preset is not None:
            QuantScheme(preset=self.preset)
            beside = [f.name for f in dataclasses.fields(self) if f.name != "preset" and getattr(self, f.name)]
            if beside:
                raise ConfigurationError(f"{beside[0]} does not go with the preset {self.preset}: give one of the two")
        return self

    def apply(self, scheme: QuantScheme) -> QuantScheme:
        """The scheme with this override's settings in place; bits or a group size take the place of a preset."""
        if self.preset is not None:
            return scheme_of(self.preset)
        if scheme.preset is not None and (self.bits is not None or self.group_size is not None):
            scheme = QuantScheme(group_size=scheme.group_size, bits=scheme.bits)
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
    outside: Iterable[str] = (),
) -> dict[str, QuantScheme]:
    """Chooses the weights to quantize and the scheme of each.

    A pattern is a shell pattern (``*``, ``?``, ``[...]``) matched against the full parameter name, such as
    ``model.layers.3.mlp.down_proj.weight``, or against a module name without the ending ``.weight``. Where several
    overrides match a name, they apply in their order, so that the last one wins. Overrides and exclude may name weights
    ``outside`` of these too (:func:`names_it`), and then need match no other.

    Raises:
        ConfigurationError: a pattern matches no weight, or nothing is left to quantize.
    """
    names, outside = list(names), tuple(outside)
    include, exclude, overrides = tuple(include), tuple(exclude), dict(overrides or {})
    for option, patterns in (("include", include), ("exclude", exclude), ("overrides", overrides)):
        for pattern in patterns:
            beside = option != "include" and any(names_it(pattern, name, outside=True) for name in outside)
            if not beside and not any(_matches(name, pattern) for name in names):
                examples = ", ".join(names[:3])
                wider = f"*{pattern}*"
                hint = f"; did you mean {wider!r}?" if any(_matches(name, wider) for name in names) else ""
                raise ConfigurationError(
                    f"model.{option}: the pattern {pattern!r} matches none of the {len(names)} linear weights of the "
                    f"blocks; their names look like {examples}{hint}"
                )
    chosen = {}
    for name in names:
        if not any(_matches(name, p) for p in include) or any(_matches(name, p) for p in exclude):
            continue
        fitting = scheme
        for pattern, override in overrides.items():
            if _matches(name, pattern):
                fitting = applied(pattern, override, fitting)
        chosen[name] = fitting
    if not chosen:
        raise ConfigurationError(
            f"model.include={list(include)} and model.exclude={list(exclude)} leave no weight to quantize"
        )
    return chosen


def applied(pattern: str, override: SchemeOverride, scheme: QuantScheme) -> QuantScheme:
    """The scheme with an override in place.

    Raises:
        ConfigurationError: the two do not go together; the pattern is named.
    """
    try:
        return override.apply(scheme)
    except ConfigurationError as error:
        way = "; budget: false and salient: false in the override switch them off" if scheme.mixed else ""
        raise ConfigurationError(f"overrides: {pattern!r}: {error}{way}") from error


def names_it(pattern: str, name: str, outside: bool = False) -> bool:
    """Whether a pattern is for a weight.

    Args:
        pattern: A shell pattern.
        name: Full parameter name.
        outside: The weight is outside of the blocks. A pattern that means many weights does not mean this one: what
            follows its last wildcard has to cover a module's whole name, as in ``*.embed_tokens`` or ``lm_head``.
    """
    if not _matches(name, pattern):
        return False
    if not outside:
        return True
    module, literal = name.removesuffix(".weight"), re.split(r"[*?\]]", pattern.removesuffix(".weight"))[-1].lstrip(".")
    return len(literal) >= len(module.rpartition(".")[2]) and f".{module}".endswith(f".{literal}")


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern)


def fit_rows(
    schemes: Mapping[str, QuantScheme],
    in_features: Mapping[str, int],
    fallback: bool = False,
    option: str = "model.scheme",
) -> dict[str, QuantScheme]:
    """The schemes, each able to hold its weight's rows.

    Args:
        schemes: By parameter name.
        in_features: Weights in a row of each.
        fallback: Where a preset does not hold such rows, take the one that llama.cpp's rule names.
        option: Where the schemes come from.

    Raises:
        ConfigurationError: a preset does not, and ``fallback`` is off or of no help.
    """
    return {name: _fit(name, scheme, in_features[name], fallback, option) for name, scheme in schemes.items()}


def _fit(name: str, scheme: QuantScheme, columns: int, fallback: bool, option: str) -> QuantScheme:
    if scheme.preset is None:
        return scheme
    preset = preset_named(scheme.preset)
    if columns % preset.multiple == 0:
        return scheme
    said = (
        f"{option}: {preset.name} holds rows of whole blocks of {preset.multiple} weights, and {name} has rows of "
        f"{columns}"
    )
    other = None if preset.fallback is None else preset_named(preset.fallback)
    if other is None or columns % other.multiple:
        raise ConfigurationError(
            f'{said}: take another scheme for it (--model.overrides \'{{"PATTERN": "w4g32"}}\' takes rows of any '
            "length), or leave it out with --model.exclude"
        )
    if not fallback:
        raise ConfigurationError(
            f"{said}; llama.cpp takes {other.name} for those: so does --model.fallback true, or say so with "
            f'--model.overrides \'{{"PATTERN": "{other.name}"}}\''
        )
    return QuantScheme(preset=other.name)
