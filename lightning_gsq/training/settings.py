"""The settings of a model's quantization, by what they are about; each checks itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch.cli import OptimizerCallable

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models import loading
from lightning_gsq.quantizers import FromFile, GumbelOptions, WarmStart
from lightning_gsq.saliency import SettleOptions
from lightning_gsq.training.target import TARGETS, Target, TargetName
from lightning_gsq.weights.assignment import SchemeOverride, override_of, scheme_of
from lightning_gsq.weights.scheme import QuantScheme
from lightning_gsq.widths.size import Size

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
class SizeOptions:
    """A size in place of a width.

    Args:
        size: Of the whole file.
        choices: Names of presets that matrices may take; empty for those that the file's format is known for.
    """

    size: Size
    choices: tuple[str, ...] = ()


def size_of(
    size: str | None, choices: Sequence[str] | None, scheme: QuantScheme, warm_start: WarmStart
) -> SizeOptions | None:
    """What ``model.size`` and ``model.choices`` say.

    Raises:
        ConfigurationError: it makes no sense, or does not go with the other settings.
    """
    if size is None:
        if choices is not None:
            raise ConfigurationError(
                f"model.choices: {list(choices)} are for --model.size, which is not given (80MB, 2.6bpw)"
            )
        return None
    if choices is not None and len(set(choices)) < 2:
        raise ConfigurationError(
            f"model.choices must name two presets or more, got {list(choices)}; with one width use --model.scheme"
        )
    for name in choices or ():
        try:
            scheme_of(str(name))
        except ConfigurationError as error:
            raise ConfigurationError(f"model.choices: {error}") from error
    if scheme.mixed:
        raise ConfigurationError(
            f"model.size: a size and {scheme} both say what matrices cost; leave out --model.scheme.budget and "
            "--model.scheme.salient, or --model.size"
        )
    if scheme.preset is not None:
        raise ConfigurationError(
            f"model.size: a size gives each matrix one of model.choices, and model.scheme {scheme.preset} one to all; "
            f"leave one of the two out, or pin what has to be {scheme.preset} with --model.overrides"
        )
    if isinstance(warm_start, FromFile):
        raise ConfigurationError(
            "model.size: the warm start takes widths from its file; leave --model.size out, or use another warm start"
        )
    return SizeOptions(Size(size), tuple(choices or ()))


@dataclass(frozen=True)
class ExpertOptions:
    """How many tokens routed experts see where the inputs of weights are watched.

    Args:
        all_experts: Every token goes through every expert, whatever their router says.
        min_tokens: Tokens that each expert should see; None for those that come.
        max_extra_sequences: How many sequences more may be passed through for it.
    """

    all_experts: bool = False
    min_tokens: int | None = None
    max_extra_sequences: int = 256

    def __post_init__(self) -> None:
        if self.min_tokens is not None and self.min_tokens < 1:
            raise ConfigurationError(
                f"model.moe_min_tokens_per_expert must be at least 1 or null, got {self.min_tokens}"
            )
        if self.max_extra_sequences < 1:
            raise ConfigurationError(
                f"model.moe_max_extra_sequences must be at least 1, got {self.max_extra_sequences}; for none leave "
                "--model.moe_min_tokens_per_expert out"
            )
        if self.all_experts and self.min_tokens is not None:
            raise ConfigurationError(
                f"model.moe_min_tokens_per_expert: got {self.min_tokens} with --model.moe_calibrate_all_experts, which "
                "sends every token to every expert; leave one of them out"
            )

    @property
    def extra_sequences(self) -> int:
        """Sequences that are passed through for experts beside those whose inputs are watched, at most."""
        return 0 if self.min_tokens is None else self.max_extra_sequences

    @property
    def option(self) -> str | None:
        """The name of the option that asks for more than the tokens that come."""
        if self.all_experts:
            return "model.moe_calibrate_all_experts"
        return None if self.min_tokens is None else "model.moe_min_tokens_per_expert"


@dataclass(frozen=True)
class StartOptions:
    """What a block's training starts from.

    Args:
        warm_start: Gives codes and scales.
        hessian_sequences: Calibration sequences whose inputs it sees.
        saliency: How salient weights are chosen.
        imatrix: File whose mean squares take the place of those of these inputs.
        save_imatrix: Write those of the full-precision model.
        experts: How many of these inputs routed experts see.
        end_loss_weights: Weigh their tokens by the gradients of the end loss.
    """

    warm_start: WarmStart
    hessian_sequences: int
    saliency: SettleOptions
    imatrix: str | None = None
    save_imatrix: bool = False
    experts: ExpertOptions = ExpertOptions()
    end_loss_weights: bool = False

    def spare_sequences(self, num_sequences: int) -> int:
        """Sequences beyond the calibration sequences that experts may need; those that are not watched come first."""
        return max(0, self.experts.extra_sequences - max(0, num_sequences - self.hessian_sequences))

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
        asking = ("model.end_loss_weights" if self.end_loss_weights else None, self.experts.option)
        for option in filter(None, () if self.watches_inputs else asking):
            what = f"--model.imatrix {self.imatrix}" if self.imatrix is not None else "--model.warm_start"
            raise ConfigurationError(
                f"{option}: {what} looks at no calibration inputs, so that this would do nothing; leave it out, or use "
                "a start that weighs errors by them: LeastSquares, GPTQ, or RTN or LlamaCpp with weighted: true"
            )


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
        expert_parallel: Each process has its own routed experts of a block.
    """

    target: Target
    inherited_error: float | None
    gumbel: GumbelOptions
    optimizer: OptimizerCallable
    scale_learning_rate: float
    learning_rate_floor: float
    compiled: bool
    expert_parallel: bool = False

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
