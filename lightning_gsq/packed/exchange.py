"""Packed modules in the place of a model's own, checked against what the files hold before a number of them is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.packed.config import Layouts
from lightning_gsq.packed.embedding import QuantEmbedding, is_packable_embedding, tie_heads
from lightning_gsq.packed.layers import PackedExperts, PackedWeight, QuantLinear
from lightning_gsq.packed.own_experts import ROWS, class_name, run_own_experts
from lightning_gsq.packed.salient_linear import SCALES, SageLinear, is_part
from lightning_gsq.system.safetensors_headers import TensorInfo

LINEAR = (nn.Linear, Conv1D)
"""Layers that a packed one takes the place of, and classes derived from them."""
SCALE_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


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
        if site.experts and tuple(parameter.shape) == (site.experts * shape[0], shape[1]):
            site = replace(site, shape=tuple(parameter.shape))
        elif tuple(parameter.shape) != ((site.experts, *shape) if site.experts else shape):
            raise ConfigurationError(
                f"quantization_config: {name} has shape {tuple(parameter.shape)} in the model, {site} in the file"
            )
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        reason = why_no_packed_form(owner, attribute, site)
        if reason is not None:
            raise ConfigurationError(f"quantization_config: {name} {reason}; export the run as dequantized")
        is_linear = isinstance(owner, LINEAR)
        bias = getattr(owner, "bias", None) is not None
        if scheme.salient is not None and is_linear:
            parts = _stored_parts(owner_name, of_owner.get(owner_name, {}), parameter.device)
            model.set_submodule(owner_name, SageLinear(scheme, site, parts, bias, parameter.dtype))
            continue
        settings: dict[str, Any] = {
            "scale_dtype": _scale_dtype(stem_of(name, site), stored),
            "dtype": parameter.dtype,
            "device": parameter.device,
        }
        if site.experts:
            delattr(owner, attribute)
            setattr(owner, attribute, PackedExperts(scheme, site, **settings))
        elif is_linear:
            model.set_submodule(owner_name, QuantLinear(scheme, site, bias, **settings))
        else:
            assert isinstance(owner, nn.Embedding)
            model.set_submodule(owner_name, QuantEmbedding(scheme, site, owner, **settings))
    tie_heads(model)
    if any(site.experts for _, site in layouts.values()):
        _select_packed_experts(model)
        run_own_experts(model)


def why_no_packed_form(owner: nn.Module, attribute: str, site: LinearSite) -> str | None:
    """Why no packed module takes the place of a weight's module; None if one does.

    Args:
        owner: The module that has the weight; what it computes is looked at where it has values.
        attribute: The weight's name in it.
        site: Its shape and orientation.
    """
    if site.experts:
        known = not site.shape or class_name(owner) in ROWS
        return (
            None
            if known
            else f"holds experts in rows of one matrix of a {type(owner).__name__}, which has no packed form"
        )
    if isinstance(owner, LINEAR) and attribute == "weight" and not site.shape:
        other = type(owner) not in LINEAR and not _multiplies(owner, site)
        return f"belongs to a {type(owner).__name__}, which does more than to multiply" if other else None
    if isinstance(owner, nn.Embedding) and is_packable_embedding(owner) and not site.transposed:
        return None
    return f"belongs to a {type(owner).__name__}, which has no packed form"


@torch.no_grad()
def _multiplies(owner: nn.Module, site: LinearSite) -> bool:
    """Whether a class derived from a linear layer computes what that does; taken for granted without values."""
    weight, bias = owner.get_parameter("weight"), getattr(owner, "bias", None)
    if weight.is_meta:
        return True
    x_BI = torch.linspace(-1, 1, 2 * site.in_features, dtype=weight.dtype, device=weight.device).view(2, -1)
    plain_BO = nn.functional.linear(x_BI, site.to_matrix(weight), bias)
    return torch.allclose(owner(x_BI).float(), plain_BO.float(), rtol=1e-2, atol=1e-2 * float(plain_BO.abs().max()))


def check_stored(model: nn.Module, stored: Mapping[str, TensorInfo]) -> None:
    """Checks the packed tensors of the files against the modules that they are for.

    Raises:
        ConfigurationError: one is missing, or has another dtype or shape.
    """
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            for part, wanted in module.parts.items():
                stored_part = stored.get(f"{name}.{part}")
                if stored_part is None:
                    raise ConfigurationError(f"model: no file holds {name}.{part}")
                if stored_part.shape != tuple(wanted.shape) or _torch_dtype(stored_part) != wanted.dtype:
                    raise ConfigurationError(
                        f"model: {name}.{part} is {stored_part.dtype} {stored_part.shape} in {stored_part.file.name}, "
                        f"expected {wanted.dtype} {tuple(wanted.shape)}"
                    )


def _stored_parts(stem: str, infos: Mapping[str, TensorInfo], device: torch.device) -> dict[str, Tensor]:
    """The parts of a weight with salient columns or elements as tensors without values; they are checked when loaded.

    Raises:
        ConfigurationError: there are none, or one has a dtype that its kind never has.
    """
    parts = {}
    for part, info in infos.items():
        if not is_part(part):
            continue
        allowed = SCALE_DTYPES if part in SCALES else {"I32": torch.int32}
        if info.dtype not in allowed:
            raise ConfigurationError(f"model: {stem}.{part} is {info.dtype}, expected one of {', '.join(allowed)}")
        parts[part] = torch.empty(info.shape, dtype=allowed[info.dtype], device=device)
    if not parts:
        raise ConfigurationError(f"model: no file holds {stem}.codes")
    return parts


def stem_of(name: str, site: LinearSite) -> str:
    """What the names of a packed weight's tensors begin with: the module that takes its, or its parameter's, place."""
    return name if site.experts else name.removesuffix(".weight")


def _scale_dtype(stem: str, stored: Mapping[str, TensorInfo]) -> torch.dtype:
    stored_part = stored.get(f"{stem}.scales")
    if stored_part is None:
        raise ConfigurationError(f"model: no file holds {stem}.scales")
    if stored_part.dtype not in SCALE_DTYPES:
        raise ConfigurationError(
            f"model: {stem}.scales is {stored_part.dtype}, expected one of {', '.join(SCALE_DTYPES)}"
        )
    return SCALE_DTYPES[stored_part.dtype]


def _torch_dtype(info: TensorInfo) -> torch.dtype | None:
    return {**SCALE_DTYPES, "I32": torch.int32}.get(info.dtype)


def _select_packed_experts(model: nn.Module) -> None:
    """Lets fused experts run over sorted tokens: transformers' own forms want all of their matrices in one tensor."""
    # Imports scipy, which `import lightning_gsq` does not wait for.
    from transformers import PreTrainedModel

    from lightning_gsq.packed.expert_products import NAME

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._experts_implementation = NAME
