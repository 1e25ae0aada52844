"""Whole runs whose every stored number is compared with digests taken before: moving code must not move a bit.

The numbers of a run depend on the processor's instructions and on torch. So the file of digests also holds a digest of
some plain arithmetic; where that differs, this machine is another kind and the digests say nothing about the code.
To take them anew, after a change that is meant to change results: ``python -m tests.test_bit_identity``.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_gsq.cli import main
from tests.support.exported import save_model
from tests.support.runs import write_config

DIGESTS = Path(__file__).with_name("bit_identity.json")
ADAM = {"betas": [0.9, 0.999], "fused": None}
ONE_PHASE = {
    # Whatever the recipe's defaults become, these runs stay what they are.
    "model__phases": ["init", "blocks"],
    "model__hessian_sequences": 64,
    "model__compile_blocks": False,
    "model__optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3, **ADAM}},
    "trainer__max_steps": 6,
    "data__num_sequences": 16,
}
END_TO_END = {"optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 2e-3, **ADAM}}, "max_steps": -1}
RUNS: dict[str, dict[str, Any]] = {
    "1 bit": {"model__scheme": {"bits": 1, "group_size": 128}},
    "ternary": {"model__scheme": {"bits": "ternary", "group_size": 64}},
    "2 bits": {"model__scheme": {"bits": 2, "group_size": 64}},
    "3 bits, GPTQ": {
        "model__scheme": {"bits": 3, "group_size": 32},
        "model__warm_start": {
            "class_path": "lightning_gsq.quantizers.GPTQ",
            "init_args": {"weighted": False, "activation_order": False},
        },
    },
    "salient columns": {
        "model__scheme": {"bits": 1, "group_size": 16, "salient": {"bits": 4, "ratio": 0.1}},
        "trainer__callbacks": [
            {"class_path": f"lightning_gsq.callbacks.{name}"} for name in ("SaliencyThreshold", "GumbelAnnealing")
        ],
    },
    "budget": {
        "model__scheme": {"bits": 1, "budget": 2.2},
        "trainer__callbacks": [
            {"class_path": f"lightning_gsq.callbacks.{name}"} for name in ("SaliencyThreshold", "GumbelAnnealing")
        ],
    },
    "end to end": {
        "model__scheme": {"bits": 2, "group_size": 64},
        "model__phases": ["init", "blocks", "end_to_end"],
        "end_to_end__optimizer": END_TO_END["optimizer"],
        "end_to_end__max_steps": END_TO_END["max_steps"],
        "end_to_end__learning_rate_warmup": 0,
    },
}
NATIVE_ALONE = {"salient columns", "budget"}


def machine_digest() -> str:
    """Of what the runs compute with: products, exponentials and sums of fixed numbers, and the version of torch."""
    x = torch.linspace(-3, 3, 48 * 48).reshape(48, 48)
    numbers = [x @ x.flip(0), x.exp(), x.softmax(1), torch.nn.functional.silu(x), (x @ x.T).sum(0).tanh()]
    digest = hashlib.blake2b(torch.__version__.encode(), digest_size=8)
    for number in numbers:
        digest.update(number.numpy().tobytes())
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    """Of a file's content; of a safetensors file, of its tensors by name, whatever its header says beside them."""
    digest = hashlib.blake2b(digest_size=8)
    if file.suffix != ".safetensors":
        digest.update(file.read_bytes())
        return digest.hexdigest()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def run_digests(name: str, model: Path, corpus: Path, folder: Path) -> dict[str, Any]:
    """What one of the runs stored: digests of its weights and exports, its perplexities and its bits."""
    config = write_config(model, corpus, folder, **{**ONE_PHASE, **RUNS[name]})
    formats = "[native]" if name in NATIVE_ALONE else "[native,dequantized,gguf,compressed-tensors]"
    assert main(["fit", "--config", str(config), "--export", formats]) == 0
    run = folder / "run"
    files = [*run.glob("blocks/*.safetensors"), *run.glob("*.safetensors"), *run.glob("model/*.safetensors")]
    files += [*run.glob("export/*/*.safetensors"), *run.glob("export/*/*.gguf")]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "files": {str(file.relative_to(run)): file_digest(file) for file in sorted(files)},
        "perplexity": summary["perplexity"],
        "bits_per_weight": summary["bits_per_weight"],
    }


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """A model and a text."""
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"Line {i}: the square of {i} is {i * i}.\n" for i in range(700)), encoding="utf-8")
    return save_model(folder / "llama"), corpus


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_stores_the_same_bits_as_before(name: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    expected = json.loads(DIGESTS.read_text())
    if machine_digest() != expected["machine"]:
        pytest.skip("the digests were taken on a processor, or with a torch, that computes otherwise")
    assert run_digests(name, *inputs, tmp_path) == expected["runs"][name]


def take() -> None:
    """Writes the digests of this machine."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        inputs = make_inputs(root)
        runs = {name: run_digests(name, *inputs, root / f"run{i}") for i, name in enumerate(RUNS)}
    DIGESTS.write_text(json.dumps({"machine": machine_digest(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    take()
