"""The settings of a model's quantization, by what they are about; each checks itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch.cli import OptimizerCallable

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models import loading
from lightning_gsq.models.linear_weights import LinearSite, to_quantize
from lightning_gsq.quantizers import GumbelOptions, WarmStart
from lightning_gsq.saliency import SettleOptions
from lightning_gsq.training.target import TARGETS, Target, TargetName
from lightning_gsq.weights.assignment import SchemeOverride, assign_schemes, fit_rows, override_of
from lightning_gsq.weights.scheme import QuantScheme

Phase = Literal["init", "blocks", "end_to_end"]
PHASES: tuple[Phase, ...] = ("init", "blocks", "end_to_end")
ScaleDtype = Literal["float16", "bfloat16", "float32"]
OutputDtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Address:
    """Where a model comes from.

    Args:
        pretrained: Folder, GGUF file, name on the hub, or ``package://module/file.gguf``.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run Python code that comes with it.
        dtype: Dtype it is loaded in.
    """

    pretrained: str
    revision: str | None
    trust_remote_code: bool
    dtype: loading.Dtype

    def source(self, **options: bool) -> loading.ModelSource:
        """The address, resolved; options and errors as of :func:`lightning_gsq.models.loading.resolve`."""
        return loading.resolve(self.pretrained, self.revision, self.trust_remote_code, **options)


def override(pattern: str, value: SchemeOverride | str) -> SchemeOverride:
    """What the option says for a pattern.

    Raises:
        ConfigurationError: it makes no sense.
    """
    try:
        return override_of(value)
    except ConfigurationError as error:
        raise ConfigurationError(f"model.overrides: {pattern!r}: {error}") from error


@dataclass(frozen=True)
class Selection:
    """Which weights are quantized, and to what.

    Args:
        scheme: Grid and groups of every one.
        include: Patterns of the weights to quantize.
        exclude: Patterns of weights to leave as they are.
        overrides: Other schemes for the weights that a pattern names.
        blocks: Range of blocks, such as ``0:4``; None for all.
        fallback: Give rows that a preset does not hold the one that llama.cpp takes for them.
    """

    scheme: QuantScheme
    include: Sequence[str]
    exclude: Sequence[str]
    overrides: Mapping[str, SchemeOverride]
    blocks: str | None
    fallback: bool = False

    def schemes(self, sites: Mapping[str, LinearSite]) -> dict[str, QuantScheme]:
        """The weights to quantize, of these, and the scheme of each.

        Args:
            sites: Linear weights by their full names; one with a role is taken only if a pattern names it.

        Raises:
            ConfigurationError: a pattern matches no weight, nothing is left, or a scheme does not hold a weight's rows.
        """
        names = to_quantize(sites, self.include)
        in_features = {name: sites[name].in_features for name in names}
        schemes = assign_schemes(in_features, self.scheme, self.include, self.exclude, self.overrides)
        return fit_rows(schemes, in_features, self.fallback)

    def indices(self, count: int) -> range:
        """The numbers of the blocks to quantize, of ``count``.

        Raises:
            ConfigurationError: ``blocks`` is no range, or an empty one.
        """
        if self.blocks is None:
            return range(count)
        match = re.fullmatch(r"(\d*):(\d*)", self.blocks)
        if not match:
            raise ConfigurationError(f"model.blocks must be a range such as 0:4, got {self.blocks!r}")
        start, stop = int(match[1] or 0), int(match[2] or count)
        if not 0 <= start < stop <= count:
            raise ConfigurationError(f"model.blocks: {self.blocks} is not a range within the model's {count} blocks")
        return range(start, stop)


@dataclass(frozen=True)
class StartOptions:
    """What a block's training starts from.

    Args:
        warm_start: Gives codes and scales.
        hessian_sequences: Calibration sequences whose inputs it sees.
        saliency: How salient weights are chosen.
        imatrix: File whose mean squares take the place of those of these inputs.
        save_imatrix: Write those of the full-precision model.
    """

    warm_start: WarmStart
    hessian_sequences: int
    saliency: SettleOptions
    imatrix: str | None = None
    save_imatrix: bool = False

    @property
    def watches_inputs(self) -> bool:
        """Whether calibration inputs have to be collected for it."""
        return self.warm_start.needs_hessian and self.imatrix is None

    def __post_init__(self) -> None:
        if self.imatrix is not None and not (self.warm_start.needs_hessian and self.warm_start.diagonal_only):
            start = type(self.warm_start).__name__
            what = "weighs no errors by inputs" if not self.warm_start.needs_hessian else "needs whole Hessians"
            raise ConfigurationError(
                f"model.imatrix: an importance matrix has a number a column, and --model.warm_start {start} {what} as "
                f"it is set; got {self.imatrix}. Leave it out, or use RTN or LlamaCpp with weighted: true"
            )
        if self.hessian_sequences <= 0:
            raise ConfigurationError(f"model.hessian_sequences must be positive, got {self.hessian_sequences}")


@dataclass(frozen=True)
class BlockOptions:
    """How a block trains.

    Args:
        target: What it learns to output.
        inherited_error: Error of its inputs at which a token counts half; None: all count alike.
        gumbel: How logits start and how noisy their samples are.
        optimizer: Makes the optimizer; its learning rate is that of the logits.
        scale_learning_rate: Learning rate of the scales, relative to each scale.
        learning_rate_floor: End of the cosine schedule, as a share of its start.
        compiled: Run blocks through ``torch.compile`` where a compiler is there.
    """

    target: Target
    inherited_error: float | None
    gumbel: GumbelOptions
    optimizer: OptimizerCallable
    scale_learning_rate: float
    learning_rate_floor: float
    compiled: bool

    def __post_init__(self) -> None:
        if self.scale_learning_rate <= 0:
            raise ConfigurationError(f"model.scale_learning_rate must be positive, got {self.scale_learning_rate}")
        if self.inherited_error is not None and self.inherited_error <= 0:
            raise ConfigurationError(f"model.inherited_error must be positive or null, got {self.inherited_error}")
        if self.inherited_error is not None and not self.target.follows_original:
            raise ConfigurationError(
                f"model.inherited_error={self.inherited_error} needs --model.target stream, got {self.target.name}, "
                "which knows no error of the blocks before; use null"
            )
        if not 0 <= self.learning_rate_floor <= 1:
            raise ConfigurationError(
                f"model.learning_rate_floor must lie between 0 and 1, got {self.learning_rate_floor}"
            )


@dataclass(frozen=True)
class StorageOptions:
    """What is written.

    Args:
        scale_dtype: Dtype of the scales.
        output_dtype: Dtype of everything that is not quantized, and of the dequantized model.
    """

    scale_dtype: torch.dtype
    output_dtype: torch.dtype


def target_of(name: TargetName) -> Target:
    """The target of that name.

    Raises:
        ConfigurationError: there is none.
    """
    if name not in TARGETS:
        raise ConfigurationError(f"model.target must be one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]


def check_phases(phases: Sequence[Phase]) -> None:
    """Verifies that there is something to do, and in the order in which it is done.

    Raises:
        ConfigurationError: there is not, or it is not.
    """
    if not phases:
        raise ConfigurationError("model.phases is empty: name one or more of init, blocks and end_to_end")
    in_order = [phase for phase in PHASES if phase in phases]
    if list(phases) != in_order:
        raise ConfigurationError(
            f"model.phases: a run has each phase once, in the order {', '.join(PHASES)}; got {', '.join(phases)}. Use "
            f"[{', '.join(in_order)}]"
        )
