"""Loading an export back: is the file what the run computes?

The run's own weights go into the original model, in fp32; the loaded model runs in fp32 as well. Weights have to agree
bit for bit. Logits, greedy text and perplexity then differ by the order of summation alone, where they differ at all.

Where the host has no room for both models, their blocks have weights in fp32 only while they run
(:mod:`lightning_gsq.models.in_turn`): each pass makes all of them anew. A text is shorter then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_gsq.data import PythonDocumentation
from lightning_gsq.export.contract import CheckFailedError, CheckReport
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.models import loading
from lightning_gsq.models.in_turn import float_in_turn

PROMPTS = ("The capital of France is", "Water boils when", "def fibonacci(n):")
NEW_TOKENS, FEW_TOKENS = 16, 2
"""Tokens of a greedy text; of one whose every token takes a pass that makes all weights anew."""
PERPLEXITY_TOKENS = 256
COPIES = 2
"""Models that are in memory in fp32 at once: the run's, and the one that was loaded."""
Model = TypeVar("Model", bound=Callable[..., Any])
LOGIT_TOLERANCE = 1e-3
"""Of the largest logit: a hundred times what summing in another order does in fp32."""


def compare_model(
    run: FinishedRun,
    folder: Path,
    package: str,
    dense_of: Callable[[PreTrainedModel, str], Tensor] | None = None,
    rounded_to: torch.dtype | None = None,
    as_stored: bool = True,
) -> CheckReport:
    """Loads a folder through transformers, as the class that the run's model is of, and compares it with the run.

    Args:
        run: The run.
        folder: The exported folder.
        package: The package that reads it, for the report.
        dense_of: Gives a quantized weight of the loaded model by name, in the shape of the original parameter; by
            default the parameter of that name.
        rounded_to: Dtype that the format rounds dequantized weights to; None compares in fp32.
        as_stored: Whether the package gives the same weights if it loads the folder in the dtype of its files, as is
            done where the host has no room for it in fp32.

    Raises:
        CheckFailedError: it does not load, or differs.
    """
    whole = run.fits(COPIES)
    try:
        loaded = run.auto_class.from_pretrained(
            folder,
            dtype="auto" if as_stored and not whole else torch.float32,
            local_files_only=True,
            # A plain yes or no: with None, transformers asks at the terminal.
            trust_remote_code=run.model.address.trust_remote_code,
        )
    except Exception as error:  # whatever the package raises, the file is not what it should be
        raise CheckFailedError(f"{package} cannot load {folder}: {error}") from error
    loaded.eval()
    # Fused experts that transformers unpacked keep the dtype of their scales, whatever dtype was asked for; and a
    # model's own `float` refuses quantized ones.
    loaded = nn.Module.float(loaded) if whole else float_in_turn(loaded)
    return compare(run, loaded, f"{package} {version(package)}", dense_of or nn.Module.get_parameter, rounded_to)


def compare_logits(
    runtime: str, reference: PreTrainedModel, loaded: Callable[..., Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[float, float]:
    """The largest difference of two models' logits over the built-in prompts, and the largest logit.

    Raises:
        CheckFailedError: they differ by more than rounding explains.
    """
    difference = largest = 0.0
    for prompt in PROMPTS:
        ids_BT = token_ids(tokenizer, prompt)
        ours, other = (model(ids_BT, use_cache=False).logits.float() for model in (reference, loaded))
        difference = max(difference, float((ours - other).abs().max()))
        largest = max(largest, float(ours.abs().max()))
    if not difference <= LOGIT_TOLERANCE * largest:
        raise CheckFailedError(f"{runtime}: logits differ by {difference:.3g}, the largest is {largest:.3g}")
    return difference, largest


@torch.no_grad()
def compare(
    run: FinishedRun,
    loaded: Model,
    runtime: str,
    dense_of: Callable[[Model, str], Tensor],
    rounded_to: torch.dtype | None = None,
) -> CheckReport:
    """Compares a loaded model with the run: weights, logits, text, perplexity.

    Args:
        run: The run.
        loaded: A model, called with token ids; its answer has ``logits``.
        runtime: What loaded it, for the report.
        dense_of: Gives a quantized weight of the loaded model by name, in the shape of the original parameter.
        rounded_to: Dtype that the format rounds dequantized weights to; None compares in fp32.

    Raises:
        CheckFailedError: a weight differs, or the logits differ by more than the order of summation explains.
    """
    try:
        different = [
            name
            for name in run.weights
            if not torch.equal(dense_of(loaded, name).float(), run.dense(name, rounded_to or torch.float32).float())
        ]
    except (AttributeError, TypeError, KeyError) as error:
        raise CheckFailedError(f"{runtime} loads another model than was written: {error}") from error
    if different:
        raise CheckFailedError(
            f"{runtime} loads {len(different)} of {len(run.weights)} weights with other values, first {different[0]}"
        )
    kept = run.fits(COPIES)
    reference = run.reference(rounded_to or torch.float32, kept=kept)
    difference, largest = compare_logits(runtime, reference, loaded, run.tokenizer)
    texts = []
    for prompt in PROMPTS if kept else PROMPTS[:1]:
        ids_BT = token_ids(run.tokenizer, prompt)
        texts.append(follows(loaded, ids_BT, greedy(reference, ids_BT, NEW_TOKENS if kept else FEW_TOKENS)))
    ids_BT = short_text(run.tokenizer)[:, : loading.max_length(run.config)]
    return CheckReport(
        runtime,
        weights=(len(run.weights), len(run.weights)),
        logits=(difference, largest),
        same_text=all(texts),
        perplexity=(perplexity(reference, ids_BT), perplexity(loaded, ids_BT)),
        note="" if kept else f"block by block, with a text of {FEW_TOKENS} tokens",
    )


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids ``1 T``."""
    ids: Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
    return ids


def short_text(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids ``1 T`` of a text that every Python installation has."""
    text = next(iter(PythonDocumentation(part="evaluation").documents()))
    return token_ids(tokenizer, text)[:, :PERPLEXITY_TOKENS]


def greedy(model: PreTrainedModel, ids_BT: Tensor, count: int = NEW_TOKENS) -> Tensor:
    """A text and its most probable continuation by so many tokens, token ids ``1 T``."""
    output: Tensor = model.generate(  # type: ignore[operator]
        ids_BT, attention_mask=torch.ones_like(ids_BT), do_sample=False, max_new_tokens=count
    )
    return output


@torch.no_grad()
def follows(model: Callable[..., Any], prompt_BT: Tensor, text_BT: Tensor) -> bool:
    """Whether a model continues the prompt to exactly this text: one forward pass in place of a token at a time."""
    start = prompt_BT.shape[1]
    predicted_T = model(text_BT, use_cache=False).logits[0, start - 1 : -1].argmax(-1)
    return torch.equal(predicted_T, text_BT[0, start:])


@torch.no_grad()
def perplexity(model: Callable[..., Any], ids_BT: Tensor) -> float:
    """Perplexity of one sequence."""
    logits_TV = model(ids_BT, use_cache=False).logits[0, :-1].float()
    return math.exp(float(nn.functional.cross_entropy(logits_TV, ids_BT[0, 1:])))
