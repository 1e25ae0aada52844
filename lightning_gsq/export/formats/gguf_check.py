"""Is a GGUF file what the run computes? Asked of its bytes, of transformers, and of llama.cpp.

The bytes have to dequantize to the run's own weights bit for bit (but for a projection, whose error is reported). The
values of the file then go into the original model in fp32 (a block at a time where the host has no room for all), and
transformers has to compute the same logits from the same file. llama.cpp rounds activations to 8 bits in blocks on the
CPU, so that its log-probabilities are compared loosely: the mean over a text may differ by :data:`LOGPROB_TOLERANCE`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_gsq.export.check import (
    COPIES,
    FEW_TOKENS,
    NEW_TOKENS,
    PROMPTS,
    greedy,
    perplexity,
    short_text,
    token_ids,
)
from lightning_gsq.export.contract import CheckFailedError, CheckReport
from lightning_gsq.export.formats.gguf_layout import Layout, with_file
from lightning_gsq.export.formats.gguf_storage import F16, Storage, same_up_to
from lightning_gsq.export.formats.gguf_transformers import note_of_transformers
from lightning_gsq.export.readers import llama_cpp
from lightning_gsq.export.readers.packages import missing
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.models.in_turn import Values

LOGPROB_TOLERANCE = 0.2
"""Natural units, of the mean log-probability of a token."""
OTHER_TOLERANCE = 0.01
"""Of a parameter's largest value: what F16, bfloat16 and Q8_0 round, and far less than a wrong order of rows."""
TEXT_TOKENS, TOP = 64, 8


@torch.no_grad()
def check_file(run: FinishedRun, path: Path, layout: Layout) -> CheckReport:
    """Compares a written file with its run.

    Args:
        run: The run.
        path: The file.
        layout: Where its parameters lie.

    Raises:
        CheckFailedError: it does not load, or is something else.
    """
    file = GGUFFile(path)
    if layout.source is not None:
        _compare_copies(file, layout.source, layout)
    kept = run.fits(COPIES)
    longest = same_up_to(run.config, file.fields) or sys.maxsize
    ids_BT = short_text(run.tokenizer)[:, : min(TEXT_TOKENS, longest)]
    ours = perplexity(run.reference(kept=kept), ids_BT)
    exact, error = _compare_values(run, file, layout)
    network = run.reference(kept=kept, values=_values_of_file(run, file, layout))
    notes = [] if exact == len(run.weights) else [f"a projection: weights change by up to {error:.2g} of the largest"]
    if kept:
        notes.append(note_of_transformers(run, network, file))
    else:
        notes.append("not compared with transformers, which unpacks the whole file, for which the host has no room")
    without = missing(llama_cpp.PACKAGE)
    if without:
        return CheckReport("the bytes of the file", (len(run.weights), exact), note="; ".join([without, *notes]))
    prompts = [p for p in PROMPTS if token_ids(run.tokenizer, p).shape[1] + NEW_TOKENS <= longest]
    prompts, count = (prompts, NEW_TOKENS) if kept else (prompts[:1], FEW_TOKENS)
    answer = llama_cpp.ask(path, prompts, count, TOP, ids_BT[0].tolist())
    notes.append(_compare_with_llama_cpp(run, network, prompts, count, answer))
    report = CheckReport(
        f"{llama_cpp.PACKAGE} {version(llama_cpp.PACKAGE)}",
        weights=(len(run.weights), exact),
        perplexity=(ours, math.exp(-sum(answer.logprobs) / len(answer.logprobs))),
        note="; ".join(notes),
    )
    gap = math.log(report.perplexity[1]) - math.log(perplexity(network, ids_BT))  # type: ignore[index]
    if not abs(gap) <= LOGPROB_TOLERANCE:
        raise CheckFailedError(
            f"{report.runtime}: a token's mean log-probability differs by {gap:.3g} from the same weights in PyTorch"
        )
    return report


def _values_of_file(run: FinishedRun, file: GGUFFile, layout: Layout) -> Values:
    """Gives the parameters of the model that the file is, in fp32."""
    places = with_file(layout, run)

    def value(name: str) -> Tensor:
        if name in places:
            return _in_shape(run, name, places[name].value(file)).contiguous()
        # What no other format changes came as it is, not in their dtype.
        return run.value(name) if layout.source is None else run.values[name].float()

    return value


def _in_shape(run: FinishedRun, name: str, value: Tensor) -> Tensor:
    """What a file holds of a parameter, in the parameter's shape."""
    weight = run.weights.get(name)
    return value.view_as(run.values[name]) if weight is None else weight.site.from_matrix(value)


def _compare_values(run: FinishedRun, file: GGUFFile, layout: Layout) -> tuple[int, float]:
    """Compares every tensor.

    Returns:
        How many quantized weights are bit-identical, and the largest error of the others, as a share of the largest.
    """
    exact, worst = 0, 0.0
    for name, stored in with_file(layout, run).items():
        lacking = [place.name for place in stored.places if place.name not in file.tensors]
        if lacking:
            raise CheckFailedError(f"{file.path} has no tensor {lacking[0]}")
        value, parameter = stored.value(file), run.value(name)
        first = stored.places[0].name
        if value.numel() != parameter.numel():
            raise CheckFailedError(f"{file.path}: {first} has the shape {file.tensors[first].shape}")
        weight = run.weights.get(name)
        value = _in_shape(run, name, value)
        error = float((value - parameter).abs().max() / parameter.abs().max().clamp(min=1e-30))
        if weight is None:
            copied = layout.source is not None and name not in layout.others
            if not copied and not error <= OTHER_TOLERANCE:
                raise CheckFailedError(f"{file.path}: {first} differs by {error:.2g} of its largest value")
        else:
            same = torch.equal(value, parameter)
            if not same and Storage.of(weight.scheme, weight.site.in_features, "Q8_0").exact:
                raise CheckFailedError(f"{file.path}: {first} differs from the run's weight by {error:.2g}")
            if file.tensors[first].number == F16 and not torch.equal(value, parameter.half().float()):
                raise CheckFailedError(f"{file.path}: {first} is not the run's weight rounded to fp16")
            exact, worst = exact + same, max(worst, error)
    return exact, worst


def _compare_copies(file: GGUFFile, source: GGUFFile, layout: Layout) -> None:
    """Verifies that everything which was not written anew is the source's, byte by byte."""
    for name, stored in source.tensors.items():
        if name not in file.tensors:
            raise CheckFailedError(f"{file.path} has no tensor {name}")
        copied = name not in layout.parameters and file.tensors[name].number == stored.number
        if copied and source.raw(name).tobytes() != file.raw(name).tobytes():
            raise CheckFailedError(f"{file.path}: {name} is not that of {source.path}")


def _compare_with_llama_cpp(
    run: FinishedRun, network: PreTrainedModel, prompts: Sequence[str], count: int, answer: llama_cpp.Answer
) -> str:
    """How far llama.cpp's most probable tokens and its texts are from the network's, in words."""
    if not prompts:
        return "all prompts are longer than the model's window, which llama.cpp has not: no greedy text compared"
    difference, same = 0.0, 0
    for prompt, text, top, ids in zip(prompts, answer.texts, answer.tops, answer.ids, strict=True):
        ids_BT = token_ids(run.tokenizer, prompt)
        if ids != ids_BT[0].tolist():
            raise CheckFailedError(f"llama.cpp splits {prompt!r} into the tokens {ids}, expected {ids_BT[0].tolist()}")
        logprobs_V = network(ids_BT, use_cache=False).logits[0, -1].float().log_softmax(-1)
        difference = max([difference, *(abs(value - float(logprobs_V[token])) for token, value in top.items())])
        own_T = greedy(network, ids_BT, count)[0, ids_BT.shape[1] :]
        same += text.strip() == str(run.tokenizer.decode(own_T, skip_special_tokens=True)).strip()
    return (
        f"log-probabilities of the next token differ by up to {difference:.2g}, same greedy text for {same} of "
        f"{len(prompts)} prompts"
    )
