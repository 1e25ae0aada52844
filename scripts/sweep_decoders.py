"""Every type of causal decoder that transformers knows, as a tiny random model: what is quantized, what is refused.

Each type runs in a process of its own: build, save, load, plan, run the blocks over other sequences, put rounded
weights in the place of the model's own, save that and load it again. A type ends as one of

    ok          all of that, and the logits of the saved model are those of the quantized one
    refused     one line says why (a ``ConfigurationError``)
    not built   no tiny configuration of it was found
    traceback   anything else: a fault of this project

    python scripts/sweep_decoders.py --output docs/decoders.md
    python scripts/sweep_decoders.py --only gemma3n bloom
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tiny_decoders import VOCABULARY, build

SECONDS = 400


def examine(kind: str, folder: Path) -> dict[str, Any]:
    """What becomes of one type."""
    import torch

    from lightning_gsq.errors import ConfigurationError
    from lightning_gsq.models import loading
    from tests.support.tiny import byte_tokenizer

    try:
        model = build(kind)
        model.save_pretrained(folder / "model")
        tokenizer = byte_tokenizer()
        tokenizer.save_pretrained(folder / "model")
    except Exception as error:  # a configuration that does not fit is no finding about this project
        return {"outcome": "not built", "line": _line(error)}
    try:
        source = loading.resolve(str(folder / "model"))
        with torch.no_grad():
            return quantize(source, folder, tokenizer)
    except ConfigurationError as error:
        return {"outcome": "refused", "line": _line(error)}


def quantize(source: Any, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Load, plan, streams, rounded weights, save, load again."""
    import torch

    from lightning_gsq.estimate.skeleton import make_skeleton
    from lightning_gsq.models import loading
    from lightning_gsq.models.chain import find_blocks
    from lightning_gsq.models.linear_weights import to_quantize
    from lightning_gsq.models.saving import write_dense
    from lightning_gsq.quantizers import RTN
    from lightning_gsq.quantizers.warm_start import quantized
    from lightning_gsq.run.block_plan import make_plan, not_quantized
    from lightning_gsq.run.substitution import install
    from lightning_gsq.training import ModelQuantization
    from lightning_gsq.weights.scheme import QuantScheme

    model = ModelQuantization(source.path, scheme=QuantScheme(4, 16), dtype="float32")
    model.load(source)
    plan = make_plan(model)
    skeleton = make_skeleton(source, loading.load_config(source), "float32")
    same = {
        f"{skeleton.prefix}.{index}.{site.name}": site
        for index, block in enumerate(skeleton.blocks)
        for site in block.sites
    }
    wanted = {f"{own.name}.{site.name}" for own in plan for site in own.weights}
    if wanted != set(to_quantize(same, ["*"])):
        raise AssertionError(f"plan sees other weights: {sorted(wanted ^ set(to_quantize(same, ['*'])))[:3]}")
    ids = torch.randint(2, VOCABULARY - 2, (3, 40), generator=torch.Generator().manual_seed(1))
    error = stream_error(model.network, ids)
    if not error < 1e-2:
        raise AssertionError(f"the stream of other sequences is off by {error:.3g}")
    blocks = find_blocks(model.network)[1]
    for own in plan:
        tensors = {}
        for site, scheme in own.weights.items():
            w_OI = site.to_matrix(blocks[own.index].get_parameter(site.name)).float()
            tensors[site.name] = quantized(RTN(weighted=False)(w_OI, None, scheme), scheme, torch.float32)
        install(blocks[own.index], own, tensors)
    before = model.network(ids, use_cache=False).logits
    (folder / "saved").mkdir()
    write_dense(model.network, tokenizer, folder / "saved", torch.float32)
    again = loading.load_model(loading.resolve(str(folder / "saved")), "float32")
    difference = float((again(ids, use_cache=False).logits - before).abs().max() / before.abs().max())
    if not difference < 1e-5:
        raise AssertionError(f"the saved model's logits differ by {difference:.3g}")
    weights = sum(site.rows * site.in_features for own in plan for site in own.weights)
    total = sum(p.numel() for p in blocks.parameters())
    return {"outcome": "ok", "share": weights / total, "left": not_quantized(model, plan), "line": ""}


def stream_error(network: Any, ids_NT: Any) -> float:
    """Largest relative error of a token where each block runs alone on what the blocks before it gave."""
    import torch

    from lightning_gsq.models.chain import embed, find_blocks, hidden_of, run_block_giving, trace
    from lightning_gsq.models.passing import arguments_from_ids
    from lightning_gsq.models.survey import survey, token_errors

    surveyed, outputs = survey(network), []
    handle = find_blocks(network)[1][-1].register_forward_hook(lambda _, __, output: outputs.append(hidden_of(output)))
    network(ids_NT, use_cache=False)
    handle.remove()
    calls = [call.like(known) for call, known in zip(trace(network, ids_NT[:1]).calls, surveyed.calls, strict=True)]
    hidden, beside = embed(network, ids_NT), dict[str, torch.Tensor]()
    for index, (block, call) in enumerate(zip(find_blocks(network)[1], calls, strict=True)):
        arguments = arguments_from_ids(network, surveyed.forms, ids_NT, index, call) if call.from_ids else []
        hidden, given = run_block_giving(block, hidden, call.bind([*arguments, *(beside[n] for n in call.from_blocks)]))
        beside |= given
    return float(token_errors(hidden, calls[-1].layout.pack(outputs[0])).max())


def _cell(line: str) -> str:
    """A line as it can stand in a table: without the name of the temporary folder."""
    return re.sub(r"/\S*/(model|saved)\b", r"\1", line).replace("|", "/")


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def one(kind: str, answer: Connection) -> None:
    """Examines a type and sends the result: what a process of its own does."""
    import torch

    # After a fork torch makes its threads anew without a lock: here, while there is one thread to ask for them.
    torch.set_num_threads(torch.get_num_threads())
    nowhere = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            result = examine(kind, Path(folder))
        except Exception as error:  # the finding
            result = {"outcome": "traceback", "line": _line(error), "trace": traceback.format_exc()}
    answer.send(result)


def in_process(kind: str) -> dict[str, Any]:
    """The result of one type, from a process of its own, which begins with everything imported."""
    began = time.perf_counter()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=one, args=(kind, sender))
    process.start()
    sender.close()
    result = {"outcome": "traceback", "line": f"no end after {SECONDS} seconds"}
    if receiver.poll(SECONDS):
        try:
            result = receiver.recv()
        except EOFError:
            result = {"outcome": "traceback", "line": "the process ended without an answer"}
    process.kill()
    process.join()
    return {"kind": kind, **result, "seconds": time.perf_counter() - began}


def prepare() -> None:
    """Imports what every type needs, and makes it quiet."""
    warnings.simplefilter("ignore")
    import torch
    import transformers

    import lightning_gsq.estimate.skeleton
    import lightning_gsq.run.block_plan
    import lightning_gsq.run.substitution  # noqa: F401 - for the processes to come

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()


def kinds() -> list[str]:
    """Every type that transformers maps to a causal decoder, or to a model for more than text around one."""
    from transformers.models.auto import modeling_auto as mappings

    return sorted(mappings.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | mappings.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)


def page(results: list[dict[str, Any]], others: str = "") -> str:
    """The table as Markdown.

    Args:
        results: What was found.
        others: An earlier table, whose rows of other types stay.
    """
    from importlib.metadata import version

    rows = {row.split("`")[1]: row for row in others.splitlines() if row.startswith("| `")}
    for r in results:
        share = format(r["share"], ".1%") if "share" in r else ""
        rows[r["kind"]] = f"| `{r['kind']}` | {r['outcome']} | {share} | {_cell(r['line'])} |"
    counts = Counter(row.split("|")[2].strip() for row in rows.values())
    summary = ", ".join(f"{counts[name]} {name}" for name in ("ok", "refused", "not built", "traceback"))
    head = f"transformers {version('transformers')}, {len(rows)} types: {summary}."
    return "\n".join(
        [
            head,
            "",
            "| type | outcome | share of the blocks' weights | why |",
            "|---|---|---|---|",
            *(rows[kind] for kind in sorted(rows)),
            "",
        ]
    )


def main() -> None:
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="types, instead of all; rows of others stay in the file")
    parser.add_argument("--output", type=Path, help="Markdown file for the table, after a line `<!-- sweep -->`")
    parser.add_argument("--json", type=Path, help="file for everything that was found")
    options = parser.parse_args()
    prepare()
    results = []
    for kind in options.only or kinds():
        results.append(in_process(kind))
        last = results[-1]
        print(f"{kind:30} {last['outcome']:10} {last['seconds']:5.0f} s  {last['line'][:150]}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    written = options.output.read_text(encoding="utf-8") if options.output else ""
    before, _, earlier = written.partition("<!-- sweep -->")
    table = page(results, earlier if options.only else "")
    if options.output:
        options.output.write_text(f"{before}<!-- sweep -->\n{table}", encoding="utf-8")
    print(table.splitlines()[0])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
