"""One block of a model as a module to train in a Trainer of one's own, with the batches it trains on.

Every block before it is taken in full precision. A run is the same thing for all blocks in turn, where each also sees
what the blocks before it became: :mod:`lightning_gsq.run.blocks`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.calls import BlockCall
from lightning_gsq.models.chain import find_blocks, run_block, trace
from lightning_gsq.models.linear_weights import find_all_sites, to_quantize
from lightning_gsq.models.passing import arguments_from_ids
from lightning_gsq.models.survey import Survey, survey
from lightning_gsq.quantizers import RTN, GumbelOptions, InputStatistics, Matrix, WarmStart
from lightning_gsq.run.block_fit import make_quantizer
from lightning_gsq.run.hidden_states import ActivationDataset, first
from lightning_gsq.saliency import SettleOptions, settle
from lightning_gsq.system.seeding import generator_of, seed_of
from lightning_gsq.training import BlockQuantization
from lightning_gsq.weights.assignment import scheme_of
from lightning_gsq.weights.quantized import QuantizedWeight
from lightning_gsq.weights.scheme import QuantScheme

Loader = DataLoader[tuple[Tensor, ...]]


def adam(groups: Any) -> torch.optim.Optimizer:
    """The optimizer of the recipe."""
    return torch.optim.Adam(groups, lr=1e-3, betas=(0.9, 0.95))


@dataclass(frozen=True)
class PreparedBlock:
    """What a Trainer takes.

    Args:
        module: The block, from its warm start.
        batches: Training batches: what enters the block and what should leave it, each ``B T D``, fp32.
        held_out: Batches of the sequences that nothing trains on; None where none were kept.
    """

    module: BlockQuantization
    batches: Loader
    held_out: Loader | None

    def quantized(self, scale_dtype: torch.dtype = torch.float16) -> dict[str, QuantizedWeight]:
        """Every weight rounded to its most probable level, by its parameter name inside the block.

        Args:
            scale_dtype: Dtype that scales are stored in.
        """
        return {name: quantizer.harden(scale_dtype) for name, quantizer in self.module.named_weights()}


def prepare_block(
    network: PreTrainedModel,
    index: int,
    ids_NT: Tensor,
    scheme: QuantScheme | str | Mapping[str, Any] = "w3g64",
    warm_start: WarmStart | None = None,
    optimizer: OptimizerCallable = adam,
    gumbel: GumbelOptions = GumbelOptions(),  # noqa: B008 - frozen
    scale_learning_rate: float = 3e-3,
    held_out: int = 2,
    batch_size: int = 2,
    seed: int = 0,
) -> PreparedBlock:
    """One block of a model, ready for ``Trainer.fit(prepared.module, prepared.batches, prepared.held_out)``.

    Args:
        network: The model, as ``from_pretrained`` gives it; it stays as it is.
        index: Number of the block, from 0.
        ids_NT: Token ids of the calibration sequences, int64, on the CPU.
        scheme: How each linear weight is quantized: a scheme, a preset's name or settings.
        warm_start: Codes and scales to start from; None for RTN with scales weighted by the inputs. With nothing before
            the block quantized, none follows the full-precision model.
        optimizer: Makes the optimizer from parameter groups.
        gumbel: How the logits start and how noisy their samples are.
        scale_learning_rate: Learning rate of the scales' logarithms.
        held_out: How many of the last sequences are kept for validation.
        batch_size: Sequences of a batch.
        seed: Seed of noise and order.

    Raises:
        ConfigurationError: an argument is out of range or of another shape, or the block takes tensors that other
            blocks computed, which only a whole run follows.
    """
    if not isinstance(network, PreTrainedModel):
        raise ConfigurationError(
            f"network: expected a model as AutoModelForCausalLM.from_pretrained gives it, got {type(network).__name__}"
        )
    chosen, start = _scheme(scheme), warm_start or RTN()
    prefix, blocks = find_blocks(network)
    _check(network, index, len(blocks), ids_NT, held_out, batch_size, start)
    surveyed = survey(network)
    call = surveyed.calls[index]
    if call.from_blocks:
        raise ConfigurationError(
            f"index: block {index} of {type(network).__name__} takes what other blocks compute "
            f"({', '.join(call.from_blocks)}); quantize the whole model with lightning_gsq.quantize"
        )
    inputs_NTD, targets_NTD, call, arguments = _streams(network, surveyed, index, ids_NT)
    block, name = copy.deepcopy(blocks[index]).float(), f"{prefix}.{index}"
    probe = functools.partial(run_block, block, surveyed.inputs_BTD[index].float(), surveyed.bound_call(index))
    sites = {site.name: site for site in find_all_sites(block, probe)}
    names = to_quantize(sites, ["*"])
    statistics = InputStatistics([sites[key] for key in names], inputs_NTD.device)
    train = len(ids_NT) - held_out
    if start.needs_hessian:
        with torch.no_grad(), statistics.watching(block):
            for row in range(train):
                run_block(block, inputs_NTD[row : row + 1], call.bind([a[row : row + 1] for a in arguments]))
    matrices = {
        key: Matrix(
            sites[key].to_matrix(block.get_parameter(key)).detach(),
            statistics.hessians(sites[key]) if start.needs_hessian else None,
            chosen,
            f"{name}.{key}",
        )
        for key in names
    }
    mixed = {key: matrix for key, matrix in matrices.items() if matrix.scheme.mixed}
    choices = settle(mixed, SettleOptions()) if mixed else {}
    quantizers = {
        sites[key]: make_quantizer(matrix, choices.get(key), start, gumbel, generator_of(seed, index, key, "logits"))
        for key, matrix in matrices.items()
    }
    module = BlockQuantization(
        block,
        call,
        quantizers,
        optimizer,
        scale_learning_rate=scale_learning_rate,
        target_power=float(targets_NTD[:train].square().mean()),
        index=index,
        name=name,
        seed=seed,
        saliency={key: choice.figures for key, choice in choices.items()},
    )
    streams = (inputs_NTD, targets_NTD, *arguments)
    order = torch.Generator().manual_seed(seed_of(seed, index, "order"))
    training = ActivationDataset(*(stream[:train] for stream in streams))
    validation = ActivationDataset(*(stream[train:] for stream in streams))
    return PreparedBlock(
        module,
        DataLoader(training, batch_size, shuffle=True, generator=order, collate_fn=first),
        DataLoader(validation, batch_size, collate_fn=first) if held_out else None,
    )


@torch.no_grad()
def _streams(
    network: PreTrainedModel, surveyed: Survey, index: int, ids_NT: Tensor
) -> tuple[Tensor, Tensor, BlockCall, list[Tensor]]:
    """What enters and leaves the block in the full-precision model, ``N T D`` fp32; its call, and what that takes."""
    inputs, targets, arguments = list[Tensor](), list[Tensor](), list[list[Tensor]]()
    surveyed_call, call = surveyed.calls[index], None
    for row in range(len(ids_NT)):
        ids_BT = ids_NT[row : row + 1].to(network.device)
        traced = trace(network, ids_BT)
        inputs.append(traced.inputs_BTD[index].float())
        targets.append([*traced.inputs_BTD[1:], traced.output_BTD][index].float())
        call = call or traced.calls[index].like(surveyed_call)
        arguments.append(list(arguments_from_ids(network, surveyed.forms, ids_BT, index, call)) if call.bound else [])
    assert call is not None
    return torch.cat(inputs), torch.cat(targets), call, [torch.cat(parts) for parts in zip(*arguments, strict=True)]


def check_scheme(value: Any) -> None:
    """Verifies that an argument can say a scheme.

    Raises:
        ConfigurationError: it is no scheme, name or mapping, or an empty one.
    """
    if not isinstance(value, QuantScheme) and not (isinstance(value, str | Mapping) and value):
        raise ConfigurationError(
            f"scheme: expected a QuantScheme, a name such as 'w3g64' or settings such as {{'bits': 3}}, got {value!r}"
        )


def _scheme(value: Any) -> QuantScheme:
    check_scheme(value)
    try:
        scheme = scheme_of(value)
    except TypeError as error:
        raise ConfigurationError(f"scheme: {error}") from error
    if scheme.salient is not None and scheme.salient.layout == "element":
        raise ConfigurationError("scheme: salient.layout element is the published layout, which is not trained")
    return scheme


def _check(network: Any, index: int, count: int, ids_NT: Any, held_out: int, batch_size: int, warm_start: Any) -> None:
    if not isinstance(index, int) or not 0 <= index < count:
        raise ConfigurationError(f"index: {type(network).__name__} has blocks 0 to {count - 1}, got {index!r}")
    if not isinstance(ids_NT, Tensor) or ids_NT.ndim != 2 or ids_NT.is_floating_point():
        shown = f"{ids_NT.dtype} {tuple(ids_NT.shape)}" if isinstance(ids_NT, Tensor) else type(ids_NT).__name__
        raise ConfigurationError(f"ids_NT: expected token ids, int64 of shape (sequences, tokens), got {shown}")
    rows = network.get_input_embeddings().weight.shape[0]
    if ids_NT.numel() and not 0 <= int(ids_NT.min()) <= int(ids_NT.max()) < rows:
        raise ConfigurationError(f"ids_NT: the model embeds ids 0 to {rows - 1}, got {int(ids_NT.max())}")
    if not isinstance(held_out, int) or not 0 <= held_out < len(ids_NT):
        raise ConfigurationError(
            f"held_out: of {len(ids_NT)} sequences in ids_NT some have to train; hold out 0 to {len(ids_NT) - 1}, got "
            f"{held_out!r}"
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigurationError(f"batch_size must be at least 1, got {batch_size!r}")
    if not isinstance(warm_start, WarmStart):
        raise ConfigurationError(f"warm_start: expected a WarmStart such as RTN(), got {warm_start!r}")
