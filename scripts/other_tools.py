"""Quantizes a model by another tool, for ``compare_tools.py``, which starts this where that tool is installed.

    python scripts/other_tools.py auto_round --model FOLDER --tokens FILE --bits 3 --group 64 --output FOLDER

The weights come back as plain numbers in fp32, in a folder of the same layout, so that every tool is measured by the
same program; ``made.json`` beside them has the seconds of the quantization alone and the bits a weight takes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

HALF = 16
"""Bits of a scale."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--model", type=Path, required=True, help="folder of Hugging Face's layout")
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors file with ids, N T")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true", help="a zero point a group")
    parser.add_argument("--extended", action="store_true", help="AutoRound's enable_alg_ext")
    parser.add_argument("--steps", type=int, default=60, help="of AutoRound, 4 sequences each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    ids_NT = load_file(options.tokens)["ids"]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(options.seed)
    began = time.perf_counter()
    weights = TOOLS[options.tool](model, ids_NT, options)
    seconds = time.perf_counter() - began
    if all(torch.equal(weights[name].float(), value) for name, value in plain.items()):
        raise SystemExit(f"{options.tool} gave the weights back as they were")
    options.output.mkdir(parents=True, exist_ok=True)
    for file in options.model.iterdir():
        if file.suffix != ".safetensors":
            (options.output / file.name).write_bytes(file.read_bytes())
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    kept = {name: weights[name].float().contiguous() for name in plain if name not in tied}
    save_file(kept, options.output / "model.safetensors", {"format": "pt"})
    bits = options.bits + (HALF + (options.bits if options.asymmetric else 0)) / options.group
    made = {"seconds": round(seconds, 1), "bits": bits, "threads": torch.get_num_threads()}
    (options.output / "made.json").write_text(json.dumps(made))


def auto_round(model: Any, ids_NT: Tensor, options: argparse.Namespace) -> dict[str, Tensor]:
    """AutoRound: rounding and ranges by signed gradients, against each block's output."""
    from auto_round import AutoRound

    tuned = AutoRound(
        model,
        AutoTokenizer.from_pretrained(options.model),
        scheme=f"W{options.bits}A16",
        group_size=options.group,
        sym=not options.asymmetric,
        iters=options.steps,
        batch_size=4,
        nsamples=len(ids_NT),
        seed=options.seed,
        seqlen=ids_NT.shape[1],
        dataset=list(ids_NT.split(1)),
        enable_alg_ext=options.extended,
        device_map="cpu",
    )
    return dict(tuned.quantize()[0].state_dict())


def gptq(model: Any, ids_NT: Tensor, options: argparse.Namespace) -> dict[str, Tensor]:
    """GPTQ of llm-compressor: columns of the largest moments first, scales by error weighted by the inputs' moments."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    recipe = [GPTQModifier(config_groups=_groups(options, "imatrix_mse"), ignore=["lm_head"])]
    return _by_llm_compressor(recipe, model, ids_NT)


def awq(model: Any, ids_NT: Tensor, options: argparse.Namespace) -> dict[str, Tensor]:
    """AWQ of llm-compressor, then rounding with scales by squared error."""
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():  # memory is pinned for a GPU, whether there is one or not
        IntermediatesCache.pin_memory = lambda *_: None
    recipe = [AWQModifier(config_groups=_groups(options, "memoryless_mse"), ignore=["lm_head"])]
    return _by_llm_compressor(recipe, model, ids_NT)


def _groups(options: argparse.Namespace, observer: str) -> dict[str, Any]:
    weights = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": not options.asymmetric,
        "strategy": "group",
        "group_size": options.group,
        "observer": observer,
    }
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


def _by_llm_compressor(recipe: list[Any], model: Any, ids_NT: Tensor) -> dict[str, Tensor]:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot

    samples = [{"input_ids": ids_T, "attention_mask": [1] * len(ids_T)} for ids_T in ids_NT.tolist()]
    oneshot(
        model=model,
        dataset=Dataset.from_list(samples),
        recipe=recipe,
        num_calibration_samples=len(samples),
        max_seq_length=ids_NT.shape[1],
        shuffle_calibration_samples=False,
    )
    weights = dict(model.state_dict())
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            zero = getattr(module, "weight_zero_point", None)
            value = module.weight.detach()
            weights[f"{name}.weight"] = fake_quantize(value, module.weight_scale, zero, scheme.weights)
    return weights


TOOLS: dict[str, Callable[[Any, Tensor, argparse.Namespace], dict[str, Tensor]]] = {
    "auto_round": auto_round,
    "gptq": gptq,
    "awq": awq,
}

if __name__ == "__main__":
    main()
