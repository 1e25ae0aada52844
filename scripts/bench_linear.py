"""How fast linear layers over packed codes are, against dense ones, and which tiles suit the GPU at hand.

    python scripts/bench_linear.py                    # this machine; Llama-3.1-8B shapes on a GPU, one of them on a CPU
    python scripts/bench_linear.py --model 70b --bits 2 4 --tokens 1 16
    python scripts/bench_linear.py --tune             # GPU: measure tiles, rewrite this GPU's entries of the table

Medians and the spread; every form is timed in turn within each round, so that a drifting machine affects them alike.
Each call uses another copy of the weight, of more than 50 MB together, so that none is found in the cache. On a GPU the
packages of ``peers.py`` that are installed take part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import peers
import torch
from rich.console import Console
from rich.table import Table

from lightning_gsq.ops.packed_linear import packed_linear, tuning
from lightning_gsq.ops.packed_linear.reference import packed_linear_reference
from lightning_gsq.system.compiling import compile_function
from lightning_gsq.weights.packing import packed_words

SHAPES = {
    "8b": {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)},
    "70b": {"q, o": (8192, 8192), "k, v": (1024, 8192), "gate, up": (28672, 8192), "down": (8192, 28672)},
}
"""Rows and columns of the matrices of Llama-3.1."""
COLD_BYTES = 64 << 20
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}
"""Peak memory bandwidth, bytes a second, of SXM boards as their maker states it."""


class Case:
    """One shape and width: the packed weight and the dense one, in enough copies to be cold."""

    def __init__(self, rows: int, columns: int, bits: int, group: int, device: str) -> None:
        self.settings = {"bits": bits, "in_features": columns, "group_length": group}
        words, groups = packed_words(columns, bits), -(-columns // group)
        copies = 1 + COLD_BYTES // (4 * rows * words)
        self.packed = [
            (
                torch.randint(-(2**31), 2**31 - 1, (rows, words), dtype=torch.int32, device=device),
                torch.rand(rows, groups, dtype=torch.float16, device=device),
            )
            for _ in range(copies)
        ]
        copies = 1 + COLD_BYTES // (2 * rows * columns)
        self.dense = {
            dtype: [torch.randn(rows, columns, device=device).to(dtype) for _ in range(copies)]
            for dtype in (torch.bfloat16, torch.float32)
        }
        self.packed_bytes = rows * (4 * words + 2 * groups)
        self.peers: dict[str, list[torch.nn.Module]] = {}
        for peer in peers.installed() if device == "cuda" else ():
            try:
                self.peers[peer] = [peers.PEERS[peer](rows, columns, bits, group) for _ in range(len(self.packed))]
            except Exception as error:  # a width that the package does not have: its column stays empty
                print(f"{peer}, {bits} bits: {type(error).__name__}: {error}")

    def forms(self, x: torch.Tensor) -> dict[str, Callable[[int], object]]:
        """Name and call of every form; the argument counts calls."""
        forms: dict[str, Callable[[int], object]] = {}

        def packed(form: str) -> Callable[[int], object]:
            return lambda i: packed_linear(x, *self.packed[i % len(self.packed)], form=form, **self.settings)

        def dense(dtype: torch.dtype) -> Callable[[int], object]:
            inputs, weights = x.to(dtype), self.dense[dtype]
            return lambda i: torch.nn.functional.linear(inputs, weights[i % len(weights)])

        forms["packed"] = packed("auto")
        forms["dequantize, then matmul"] = packed("dense")
        compiled = compile_function(packed_linear_reference)
        forms["torch.compile"] = lambda i: compiled(x, *self.packed[i % len(self.packed)], **self.settings)
        forms["bf16 dense"] = dense(torch.bfloat16)
        forms["fp32 dense"] = dense(torch.float32)
        for name, layers in self.peers.items():
            forms[name] = lambda i, layers=layers: layers[i % len(layers)](x)  # type: ignore[misc]
        return forms


def seconds(call: Callable[[int], object], count: int, device: str) -> float:
    """One call's time, over so many calls in a row; on a GPU between events."""
    if device == "cpu":
        began = time.perf_counter()
        for i in range(count):
            call(i)
        return (time.perf_counter() - began) / count
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(count):
        call(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def graphed(call: Callable[[int], object], count: int) -> Callable[[int], object]:
    """So many calls as one CUDA graph, so that launches do not count; the weights' copies take turns inside."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    return lambda _: graph.replay()


def measure(case: Case, x: torch.Tensor, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every form, one figure a round."""
    calls, inner = case.forms(x), 1 if device == "cpu" else 20
    if device == "cuda":
        calls = {name: graphed(call, inner) for name, call in calls.items()}
    for call in calls.values():
        call(0)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            repeats = 3 if device == "cpu" else 1
            taken[name].append(seconds(call, repeats, device) / inner)
    return taken


def tune(bits: list[int], device: str) -> None:
    """Tries tiles on the down projection of the 8B model and writes the best into the table."""
    from lightning_gsq.ops.packed_linear import kernels

    table = json.loads(tuning.TABLE.read_text())
    family = tuning.family(torch.device(device))
    entries = table["tiles"].setdefault(family, dict(table["tiles"][tuning.FALLBACK]))
    for width, tokens in itertools.product(bits, (1, 16, 32, 64)):
        case = Case(4096, 14336, width, 128, device)
        x = torch.randn(tokens, 14336, device=device, dtype=torch.bfloat16)
        rows = (4, 8, 16, 32) if tokens == 1 else (32, 64, 128)
        found: list[tuple[float, tuple[int, int, int]]] = []
        for choice in itertools.product(rows, (32, 64, 128) if tokens == 1 else (16, 32, 64), (4, 8)):
            tile = tuning.Tile(choice[0], choice[1], tokens, choice[2])

            def call(
                i: int, case: Case = case, x: torch.Tensor = x, tile: tuning.Tile = tile, width: int = width
            ) -> object:
                words, scales = case.packed[i % len(case.packed)]
                return kernels.linear(x, words, scales, None, bits=width, group_length=128, tile=tile)

            try:
                replay = graphed(call, 20)
            except Exception as error:  # a tile that does not fit the GPU is no candidate
                print(f"{width} bits, {tokens} tokens, {choice}: {type(error).__name__}")
                continue
            found.append((statistics.median(seconds(replay, 1, device) for _ in range(7)), choice))
        best, (tile_rows, units, warps) = min(found)
        name = f"gemv-{width}" if tokens == 1 else f"batch{tokens}-{width}"
        entries[name] = {"rows": tile_rows, "units": units, "warps": warps}
        print(f"{family} {name}: {entries[name]}, {best / 20 * 1e6:.1f} us")
    table["measured"][family] = True
    tuning.TABLE.write_text(json.dumps(table, indent=2) + "\n")
    print(f"wrote {tuning.TABLE}")


def figure(rows: list[dict], path: Path) -> None:
    """Speed against bf16 over tokens, one line a width and shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(7, 4))
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        lines.setdefault(f"{row['shape']}, {row['bits']} bit", []).append((row["tokens"], row["against bf16"]))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="tokens", ylabel="speed against bf16 dense")
    axes.legend(fontsize="small")
    fig.tight_layout()
    fig.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--model", default="8b", choices=sorted(SHAPES))
    parser.add_argument("--matrices", nargs="+", help="some of the model's matrices; on a CPU: down")
    parser.add_argument("--bits", nargs="+", type=int, default=[1, 2, 3, 4], help="stored bits; ternary is 2")
    parser.add_argument("--tokens", nargs="+", type=int, default=None)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tune", action="store_true", help="measure tiles and rewrite this GPU's entries")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--figure", type=Path, help="also draw them here")
    options = parser.parse_args()
    device = options.device
    if options.tune:
        if device == "cpu":
            parser.error("--tune measures Triton's tiles and needs a CUDA device")
        tune(options.bits, device)
        return
    tokens = options.tokens or ([1, 4, 16] if device == "cpu" else [1, 2, 4, 8, 16, 32, 64, 512])
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    title = f"{name}, torch {torch.__version__}, groups of {options.group_size}, ms: median (min-max)"
    if device == "cuda":
        import triton

        title += f", triton {triton.__version__}"
    peak = next((value for key, value in BANDWIDTH.items() if key in name), None)
    table = Table(title=title, title_justify="left")
    rows = []
    for matrix, (out_features, in_features) in SHAPES[options.model].items():
        if matrix not in (options.matrices or (["down"] if device == "cpu" else list(SHAPES[options.model]))):
            continue
        for bits in options.bits:
            case = Case(out_features, in_features, bits, options.group_size, device)
            for count in tokens:
                x = torch.randn(count, in_features, device=device, dtype=torch.bfloat16)
                with torch.inference_mode():
                    taken = measure(case, x, options.rounds, device)
                middle = {form: statistics.median(values) for form, values in taken.items()}
                row = {"shape": f"{out_features} x {in_features}", "bits": bits, "tokens": count}
                row |= {
                    form: f"{1e3 * middle[form]:.3g} ({1e3 * min(values):.3g}-{1e3 * max(values):.3g})"
                    for form, values in taken.items()
                }
                row["against bf16"] = round(middle["bf16 dense"] / middle["packed"], 2)
                row["against fp32"] = round(middle["fp32 dense"] / middle["packed"], 2)
                if peak:
                    row["of peak bandwidth"] = f"{case.packed_bytes / middle['packed'] / peak:.0%}"
                rows.append(row)
            del case
    names = list(dict.fromkeys(key for row in rows for key in row))
    for key in names:
        table.add_column(key, justify="right")
    for row in rows:
        table.add_row(*(str(row.get(key, "")) for key in names))
    Console(width=200).print(table)
    if options.json:
        options.json.write_text(json.dumps({"title": title, "rows": rows}, indent=2) + "\n")
    if options.figure:
        figure(rows, options.figure)


if __name__ == "__main__":
    main()
