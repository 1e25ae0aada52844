"""Which parameters of a model belong to its normalisation layers."""

from __future__ import annotations

from torch import nn


def norm_names(module: nn.Module) -> list[str]:
    """Names of the parameters of norms: of modules without parts, named as norms, that own vectors and nothing else.

    Other vectors are no norms, whatever their shape: attention sinks, the time steps and decays of state-space layers.
    """
    names = []
    for prefix, part in module.named_modules():
        parameters = dict(part.named_parameters(recurse=False))
        is_norm = "norm" in type(part).__name__.lower() and not any(True for _ in part.children())
        if is_norm and parameters and all(parameter.ndim == 1 for parameter in parameters.values()):
            names += [f"{prefix}.{name}" if prefix else name for name in parameters]
    return names
