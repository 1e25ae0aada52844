"""``quantization_config`` of a native folder: the layout of each packed weight, as plain data and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme

METHOD = "lightning_gsq"
VERSION = 1
SALIENT_FIELDS: dict[str, Any] = {
    "layout": str,
    "bits": int,
    "ratio": (int, float),
    "group_size": int,
    "scale_groups": (int, type(None)),
}
"""What a reader has to know of the salient part, with the types; the rest is about finding and training it."""
Layouts = Mapping[str, tuple[QuantScheme, LinearSite]]
"""Scheme and shape of each packed weight, by parameter name."""


@register_quantization_config(METHOD)
class GSQConfig(QuantizationConfigMixin):
    """``quantization_config`` of a native folder.

    Args:
        weights: Layout of each packed weight, by parameter name: ``bits``, ``group_size``, ``shape`` (``[O, I]``), for
            fused experts ``experts`` and ``transposed``, ``preset`` for a scheme that has a name, and ``salient`` where
            some weights have more bits.
        version: Version of the format.

    Raises:
        ConfigurationError: it is another version, or a layout is not one.
    """

    def __init__(self, weights: dict[str, Any] | None = None, version: int = VERSION, **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # a registered method is no member of the enumeration
        self.version, self.weights = version, weights
        if version != VERSION:
            raise ConfigurationError(
                f"quantization_config: version {version!r} of the native format, this package reads {VERSION}; use "
                "the lightning-gsq that wrote it, or a newer one"
            )
        if not isinstance(weights, dict) or not weights:
            raise ConfigurationError("quantization_config: it lists no weights")
        self.layouts()

    @classmethod
    def of(cls, layouts: Layouts) -> GSQConfig:
        """The configuration of a model with these packed weights."""
        return cls({name: _to_plain(scheme, site) for name, (scheme, site) in layouts.items()})

    def layouts(self) -> Layouts:
        """Scheme and shape of each packed weight.

        Raises:
            ConfigurationError: a layout is not one.
        """
        return {name: _from_plain(name, content) for name, content in (self.weights or {}).items()}


def _to_plain(scheme: QuantScheme, site: LinearSite) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "shape": [site.out_features, site.in_features],
    }
    if scheme.preset is not None:
        plain["preset"] = scheme.preset
    if site.experts:
        plain["experts"] = site.experts
    if site.transposed:
        plain["transposed"] = True
    if scheme.salient is not None:
        plain["salient"] = {key: getattr(scheme.salient, key) for key in SALIENT_FIELDS}
    return plain


def _from_plain(name: str, content: Any) -> tuple[QuantScheme, LinearSite]:
    if not isinstance(content, dict):
        raise ConfigurationError(f"quantization_config: the layout of {name} is {content!r}, expected an object")
    bits: Any = content.get("bits")
    group_size: Any = content.get("group_size")
    shape: Any = content.get("shape")
    experts, transposed = content.get("experts", 0), content.get("transposed", False)
    whole = [group_size, experts, *(shape if isinstance(shape, list) and len(shape) == 2 else [None])]
    if not all(type(number) is int for number in whole) or min(experts, *shape, 0) < 0 or 0 in shape:
        raise ConfigurationError(
            f"quantization_config: {name} needs whole numbers as group_size, shape [O, I] and experts, got {content}"
        )
    if type(bits) not in (int, str) or not isinstance(transposed, bool):
        raise ConfigurationError(f"quantization_config: {name} has bits {bits!r} and transposed {transposed!r}")
    preset = content.get("preset")
    if preset is not None and not isinstance(preset, str):
        raise ConfigurationError(f"quantization_config: {name} has the preset {preset!r}")
    scheme = QuantScheme(bits, group_size, _salient_from_plain(name, content.get("salient")), preset=preset)
    if not scheme.settled or (scheme.mixed and experts):
        raise ConfigurationError(f"quantization_config: {name} has a salient part that is no layout: {content}")
    return scheme, LinearSite(name, experts, shape[0], shape[1], transposed)


def _salient_from_plain(name: str, content: Any) -> SalientPart | None:
    if content is None:
        return None
    if not isinstance(content, dict) or set(content) != set(SALIENT_FIELDS):
        raise ConfigurationError(f"quantization_config: the salient part of {name} is {content!r}")
    wrong = [key for key, value in content.items() if type(value) is bool or not isinstance(value, SALIENT_FIELDS[key])]
    if wrong or content["layout"] not in ("structured", "element"):
        raise ConfigurationError(f"quantization_config: the salient part of {name} is {content!r}")
    return SalientPart(**content)
