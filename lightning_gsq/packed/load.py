"""Loading a model whose weights stay packed.

    model = lightning_gsq.load("runs/x/export/native")

or, because importing ``lightning_gsq`` registers the format with transformers,

    model = AutoModelForCausalLM.from_pretrained("runs/x/export/native")

The model is built without weights, its quantized modules are exchanged for packed ones, and the files are then loaded
into those. Everything that the files say is checked against the model before a number of them is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.packed.layers import PackedExperts, PackedWeight, QuantLinear
from lightning_gsq.packed.salient_linear import SCALES, SageLinear, is_part
from lightning_gsq.system.safetensors_headers import TensorInfo, read_headers, read_json, weight_files
from lightning_gsq.weights.scheme import QuantScheme, SalientPart

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
SCALE_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
Layouts = Mapping[str, tuple[QuantScheme, LinearSite]]
"""Scheme and shape of each packed weight, by parameter name."""


@register_quantization_config(METHOD)
class GSQConfig(QuantizationConfigMixin):
    """``quantization_config`` of a native folder.

    Args:
        weights: Layout of each packed weight, by parameter name: ``bits``, ``group_size``, ``shape`` (``[O, I]``), for
            fused experts ``experts`` and ``transposed``, and ``salient`` where some weights have more bits.
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
    scheme = QuantScheme(bits, group_size, _salient_from_plain(name, content.get("salient")))
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


@register_quantizer(METHOD)
class GSQQuantizer(HfQuantizer):
    """What transformers calls while it loads a native folder."""

    requires_calibration = True  # a model becomes one of these by a run, not by loading
    quantization_config: GSQConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        layouts, files = self.quantization_config.layouts(), [Path(file) for file in checkpoint_files or []]
        root = Path(model.config._name_or_path)
        outside = [file for file in files if root.is_dir() and file.parent.resolve() != root.resolve()]
        if outside:
            raise ConfigurationError(f"model: the index in {root} names {outside[0]}, outside of that folder")
        stored = read_headers(files)
        exchange_modules(model, layouts, stored)
        check_stored(model, stored)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, (PackedWeight, SageLinear)):
                try:
                    module.check_values()
                except ValueError as error:
                    raise ConfigurationError(f"model: {name}: {error}") from error
            if isinstance(module, SageLinear):
                module.look_up()
        return model

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the same format again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` and static caches work."""
        return True


def load(
    folder: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str | None = None
) -> PreTrainedModel:
    """A model with packed weights, in evaluation mode.

    Args:
        folder: A folder in the native format.
        dtype: Dtype of what is not quantized, and of the arithmetic; "auto" for that of the file.
        device: Where to put it; the CPU by default.

    Raises:
        ConfigurationError: it is no native folder, or a damaged one.
    """
    root = Path(folder).expanduser()
    config = read_json(root / "config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise ConfigurationError(
            f"model: {root} is not in the native format (its quantization_config names no {METHOD}); load it with "
            "AutoModelForCausalLM.from_pretrained"
        )
    GSQConfig(**quantization)
    weight_files(root)
    found: dict[str, Any]
    loaded: PreTrainedModel
    try:
        loaded, found = AutoModelForCausalLM.from_pretrained(
            root, dtype=dtype, local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True
        )  # type: ignore[misc]
    except ConfigurationError:
        raise
    except Exception as error:  # transformers raises a dozen unrelated types
        raise ConfigurationError(f"model: cannot load {root}: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[problem]:
            raise ConfigurationError(
                f"model: the files in {root} do not fit the model: {problem.replace('_', ' ')} "
                f"{', '.join(str(key) for key in sorted(found[problem], key=str)[:3])}"
            )
    return nn.Module.to(loaded, device) if device is not None else loaded


def exchange_modules(model: nn.Module, layouts: Layouts, stored: Mapping[str, TensorInfo]) -> None:
    """Puts packed modules, without values, in the place of those with the named weights.

    Args:
        model: The model, on the meta device.
        layouts: What to exchange, by parameter name.
        stored: What the files hold.

    Raises:
        ConfigurationError: there is no such weight, it has another shape, its module computes something else, or no
            file holds it.
    """
    parameters = dict(model.named_parameters())
    of_owner: dict[str, dict[str, TensorInfo]] = {}
    for name, info in stored.items():
        stem, _, part = name.rpartition(".")
        of_owner.setdefault(stem, {})[part] = info
    for name, (scheme, site) in layouts.items():
        parameter = parameters.get(name)
        if parameter is None:
            raise ConfigurationError(f"quantization_config: the model has no weight {name}")
        shape = (site.in_features, site.out_features) if site.transposed else (site.out_features, site.in_features)
        if tuple(parameter.shape) != ((site.experts, *shape) if site.experts else shape):
            raise ConfigurationError(
                f"quantization_config: {name} has shape {tuple(parameter.shape)} in the model, {site} in the file"
            )
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        known = type(owner) in (nn.Linear, Conv1D) and attribute == "weight"
        bias = getattr(owner, "bias", None) is not None
        if scheme.salient is not None and known:
            parts = _stored_parts(owner_name, of_owner.get(owner_name, {}), parameter.device)
            model.set_submodule(owner_name, SageLinear(scheme, site, parts, bias, parameter.dtype))
            continue
        settings: dict[str, Any] = {
            "scale_dtype": _scale_dtype(name, stored),
            "dtype": parameter.dtype,
            "device": parameter.device,
        }
        if site.experts:
            delattr(owner, attribute)
            setattr(owner, attribute, PackedExperts(scheme, site, **settings))
            _select_eager_experts(model)
        elif known:
            model.set_submodule(owner_name, QuantLinear(scheme, site, bias, **settings))
        else:
            raise ConfigurationError(
                f"quantization_config: {name} belongs to a {type(owner).__name__}, which has no packed form; export "
                "the run as dequantized"
            )


def check_stored(model: nn.Module, stored: Mapping[str, TensorInfo]) -> None:
    """Checks the packed tensors of the files against the modules that they are for.

    Raises:
        ConfigurationError: one is missing, or has another dtype or shape.
    """
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            for part in ("codes", "scales"):
                found, wanted = stored.get(f"{name}.{part}"), getattr(module, part)
                if found is None:
                    raise ConfigurationError(f"model: no file holds {name}.{part}")
                if found.shape != tuple(wanted.shape) or _torch_dtype(found) != wanted.dtype:
                    raise ConfigurationError(
                        f"model: {name}.{part} is {found.dtype} {found.shape} in {found.file.name}, expected "
                        f"{wanted.dtype} {tuple(wanted.shape)}"
                    )


def _stored_parts(stem: str, own: Mapping[str, TensorInfo], device: torch.device) -> dict[str, Tensor]:
    """The parts of a weight with salient columns or elements as tensors without values; they are checked when loaded.

    Raises:
        ConfigurationError: there are none, or one has a dtype that its kind never has.
    """
    parts = {}
    for part, info in own.items():
        if not is_part(part):
            continue
        allowed = SCALE_DTYPES if part in SCALES else {"I32": torch.int32}
        if info.dtype not in allowed:
            raise ConfigurationError(f"model: {stem}.{part} is {info.dtype}, expected one of {', '.join(allowed)}")
        parts[part] = torch.empty(info.shape, dtype=allowed[info.dtype], device=device)
    if not parts:
        raise ConfigurationError(f"model: no file holds {stem}.codes")
    return parts


def _scale_dtype(name: str, stored: Mapping[str, TensorInfo]) -> torch.dtype:
    stem = name.removesuffix(".weight")
    found = stored.get(f"{stem}.scales")
    if found is None:
        raise ConfigurationError(f"model: no file holds {stem}.scales")
    if found.dtype not in SCALE_DTYPES:
        raise ConfigurationError(f"model: {stem}.scales is {found.dtype}, expected one of {', '.join(SCALE_DTYPES)}")
    return SCALE_DTYPES[found.dtype]


def _torch_dtype(info: TensorInfo) -> torch.dtype | None:
    return {**SCALE_DTYPES, "I32": torch.int32}.get(info.dtype)


def _select_eager_experts(model: nn.Module) -> None:
    """Lets fused experts run one by one: the other forms want all of their matrices in one tensor."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._experts_implementation = "eager"
