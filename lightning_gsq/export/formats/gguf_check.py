"""Is a GGUF file what the run computes? Asked of its bytes, of transformers, and of llama.cpp.

The bytes have to dequantize to the run's own weights bit for bit (but for a projection, whose error is reported). The
values of the file then go into the original model in fp32, and transformers has to compute the same logits from the
same file. llama.cpp rounds activations to 8 bits in blocks on the CPU, so that its log-probabilities are compared
loosely: the mean over a text may differ by :data:`LOGPROB_TOLERANCE`.
"""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from lightning_gsq.export.check import LOGIT_TOLERANCE, NEW_TOKENS, PROMPTS, greedy, perplexity, short_text, token_ids
from lightning_gsq.export.contract import CheckFailedError, CheckReport
from lightning_gsq.export.formats.gguf_storage import (
    F16,
    ROTARY,
    SUPPORTED_BY_TRANSFORMERS,
    Storage,
    in_model_order,
)
from lightning_gsq.export.readers import llama_cpp
from lightning_gsq.export.readers.packages import missing
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.names import Layout
from lightning_gsq.gguf.types.codec import dequantize

LOGPROB_TOLERANCE = 0.2
"""Natural units, of the mean log-probability of a token."""
OTHER_TOLERANCE = 0.01
"""Of a parameter's largest value: what F16, bfloat16 and Q8_0 round, and far less than a wrong order of rows."""
TEXT_TOKENS, TOP = 64, 8


@torch.no_grad()
def check_file(run: FinishedRun, path: Path, source: GGUFFile | None) -> CheckReport:
    """Compares a written file with its run.

    Args:
        run: The run.
        path: The file.
        source: The file that the run started from, if it did.

    Raises:
        CheckFailedError: it does not load, or is something else.
    """
    file, layout = GGUFFile(path), Layout.of(run.config)
    network = run.reference()
    ids_BT = short_text(run.tokenizer)[:, :TEXT_TOKENS]
    own = perplexity(network, ids_BT)
    exact, error = _compare_values(run, network, file, layout, source)
    notes = [] if exact == len(run.weights) else [f"a projection: weights change by up to {error:.2g} of the largest"]
    if ROTARY in file.tensors:
        notes.append("transformers ignores the scaling of the rotary frequencies in GGUF files")
    elif {stored.number for stored in file.tensors.values()} <= SUPPORTED_BY_TRANSFORMERS:
        difference = _compare_with_transformers(run, network, path)
        notes.append(f"transformers {version('transformers')}: logits differ by {difference:.2g}")
    else:
        notes.append("transformers cannot read these block types")
    without = missing(llama_cpp.PACKAGE)
    if without:
        return CheckReport("the bytes of the file", (len(run.weights), exact), note="; ".join([without, *notes]))
    answer = llama_cpp.ask(path, PROMPTS, NEW_TOKENS, TOP, ids_BT[0].tolist())
    difference, same = _compare_with_llama_cpp(run, network, answer)
    notes.append(f"log-probabilities of the next token differ by up to {difference:.2g}, same greedy text for {same}")
    report = CheckReport(
        f"{llama_cpp.PACKAGE} {version(llama_cpp.PACKAGE)}",
        weights=(len(run.weights), exact),
        perplexity=(own, math.exp(-sum(answer.logprobs) / len(answer.logprobs))),
        note="; ".join(notes),
    )
    gap = math.log(report.perplexity[1]) - math.log(perplexity(network, ids_BT))  # type: ignore[index]
    if not abs(gap) <= LOGPROB_TOLERANCE:
        raise CheckFailedError(
            f"{report.runtime}: a token's mean log-probability differs by {gap:.3g} from the same weights in PyTorch"
        )
    return report


def _compare_values(
    run: FinishedRun, network: PreTrainedModel, file: GGUFFile, layout: Layout, source: GGUFFile | None
) -> tuple[int, float]:
    """Compares every tensor and puts the file's values into the network.

    Returns:
        How many quantized weights are bit-identical, and the largest error of the others, as a share of the largest.
    """
    exact, worst = 0, 0.0
    for name in [*run.other_names(), *run.weights]:
        stored_name = layout.name_of(name)
        if stored_name not in file.tensors:
            raise CheckFailedError(f"{file.path} has no tensor {stored_name}")
        stored = file.tensors[stored_name]
        value = in_model_order(layout, stored_name, dequantize(file.raw(stored_name), stored.number))
        parameter = network.get_parameter(name)
        if value.numel() != parameter.numel() or stored.shape != tuple(parameter.shape):
            raise CheckFailedError(f"{file.path}: {stored_name} has the shape {stored.shape}")
        value = value.view_as(parameter)
        error = float((value - parameter).abs().max() / parameter.abs().max().clamp(min=1e-30))
        if name not in run.weights:
            if source is not None and source.tensors[stored_name].number == stored.number:
                if source.raw(stored_name).tobytes() != file.raw(stored_name).tobytes():
                    raise CheckFailedError(f"{file.path}: {stored_name} is not that of {source.path}")
            elif not error <= OTHER_TOLERANCE:
                raise CheckFailedError(f"{file.path}: {stored_name} differs by {error:.2g} of its largest value")
        else:
            weight = run.weights[name]
            same = torch.equal(value, parameter)
            if not same and Storage.of(weight.scheme, weight.site.in_features, "Q8_0").exact:
                raise CheckFailedError(f"{file.path}: {stored_name} differs from the run's weight by {error:.2g}")
            if stored.number == F16 and not torch.equal(value, parameter.half().float()):
                raise CheckFailedError(f"{file.path}: {stored_name} is not the run's weight rounded to fp16")
            exact, worst = exact + same, max(worst, error)
        parameter.copy_(value)
    return exact, worst


def _compare_with_transformers(run: FinishedRun, network: PreTrainedModel, path: Path) -> float:
    """Largest difference of a logit between transformers' reading of the file and the network with its values."""
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            trust_remote_code=False,
        ).eval()
    except Exception as error:  # whatever the package raises, the file is not what it should be
        raise CheckFailedError(f"transformers cannot load {path}: {error}") from error
    difference = largest = 0.0
    for prompt in PROMPTS:
        ids_BT = token_ids(run.tokenizer, prompt)
        own, other = (model(ids_BT, use_cache=False).logits.float() for model in (network, loaded))
        difference = max(difference, float((own - other).abs().max()))
        largest = max(largest, float(own.abs().max()))
    if not difference <= LOGIT_TOLERANCE * largest:
        raise CheckFailedError(f"transformers: logits differ by {difference:.3g}, the largest is {largest:.3g}")
    return difference


def _compare_with_llama_cpp(run: FinishedRun, network: PreTrainedModel, answer: llama_cpp.Answer) -> tuple[float, str]:
    """Largest difference of a log-probability among llama.cpp's most probable tokens; how many texts are the same."""
    difference, same = 0.0, 0
    for prompt, text, top, ids in zip(PROMPTS, answer.texts, answer.tops, answer.ids, strict=True):
        ids_BT = token_ids(run.tokenizer, prompt)
        if ids != ids_BT[0].tolist():
            raise CheckFailedError(f"llama.cpp splits {prompt!r} into the tokens {ids}, expected {ids_BT[0].tolist()}")
        logprobs_V = network(ids_BT, use_cache=False).logits[0, -1].float().log_softmax(-1)
        difference = max(difference, *(abs(value - float(logprobs_V[token])) for token, value in top.items()))
        same += text == run.tokenizer.decode(greedy(network, ids_BT), skip_special_tokens=True)
    return difference, f"{same} of {len(PROMPTS)} prompts"
