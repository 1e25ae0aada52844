"""Embedding and head of the quantized model during the end-to-end phase, where they are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.models.ends import find_ends
from lightning_gsq.training.student_weights import trainable_weight
from lightning_gsq.weights.quantized import QuantizedWeight


@dataclass(frozen=True)
class StudentEnds:
    """The dense matrices of one step.

    Args:
        inside: Parameters of the base model, by their names there.
        head: The head ``V D``; None where that is the original's.
    """

    inside: dict[str, Tensor] = field(default_factory=dict)
    head: Tensor | None = None


class StudentOuter(nn.Module):
    """Dense matrices from frozen codes and scales, which may train.

    Args:
        network: The full-precision model.
        tensors: The quantized weights, by name in the model.
        trains: Whether their scales train.
    """

    def __init__(self, network: PreTrainedModel, tensors: Mapping[str, QuantizedWeight], trains: bool) -> None:
        super().__init__()
        self.names = list(tensors)
        self.weights = nn.ModuleList(trainable_weight(tensor, None) for tensor in tensors.values())
        if not trains:
            self.weights.requires_grad_(False)
        ends = find_ends(network)
        self.dtypes = [network.get_parameter(name).dtype for name in self.names]
        self.heads = {ends.head, ends.embedding} if ends.tied else {ends.head}
        names = {id(parameter): name for name, parameter in network.base_model.named_parameters()}
        self.names_inside = [names.get(id(network.get_parameter(name))) for name in self.names]
        """Names inside the base model; None for a head, which lies outside of it."""

    def forward(self) -> StudentEnds:
        """The matrices as they are now; made once a step, also where one is both embedding and head."""
        inside, head = {}, None
        for name, name_inside, dtype, weight in zip(
            self.names, self.names_inside, self.dtypes, self.weights, strict=True
        ):
            w_VD: Tensor = weight(dtype)
            if name_inside is not None:
                inside[name_inside] = w_VD
            if name in self.heads:
                head = w_VD
        return StudentEnds(inside, head)

    def tensors(self) -> dict[str, QuantizedWeight]:
        """The quantized weights as they stand, by name in the model."""
        return {
            name: weight.tensor()  # type: ignore[operator]
            for name, weight in zip(self.names, self.weights, strict=True)
        }
