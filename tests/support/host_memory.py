"""The memory of this process that is no page of a file, and a model that is larger than what it may have of it.

What counts is anonymous memory (``RssAnon`` of /proc/self/status): pages of a mapped checkpoint are dropped by the
system where it needs room, and read again. A limit on the address space (``RLIMIT_AS``, ``RLIMIT_DATA``) would count
these mappings, which safetensors makes private and writable.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig, Qwen3MoeConfig

from tests.support.published import in_fp8
from tests.support.tiny import byte_tokenizer, random_model

GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "250000"}
"""Environment of a process in which a freed matrix of a small model is given back to the system, as those of a large
one are: glibc keeps for later what is small, which may mean up to 32 MB."""
REST = "between these"
"""What is done in no part of the work."""


def anonymous_bytes() -> int:
    """Memory of this process that is no page of a file."""
    with Path("/proc/self/status").open(encoding="ascii") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


class Peaks:
    """The most anonymous memory in each part of the work, as a thread sees it.

    Args:
        every: Seconds between two looks.
        stop_above: Bytes beside what was there at the start; with more the process ends at once, with exit code 70.
    """

    def __init__(self, every: float = 0.002, stop_above: int | None = None) -> None:
        self.every, self.most, self.before = every, dict[str, int](), anonymous_bytes()
        self.stop_above = stop_above
        self._parts, self._ended = [REST], threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self._ended.wait(self.every):
            self.note()

    def note(self) -> None:
        """Looks once."""
        part, now = self._parts[-1], anonymous_bytes()
        self.most[part] = max(self.most.get(part, 0), now)
        if self.stop_above is not None and now - self.before > self.stop_above:
            sys.stderr.write(f"{part}: {(now - self.before) / 1e6:.0f} MB, of {self.stop_above / 1e6:.0f} MB allowed\n")
            sys.stderr.flush()
            os._exit(70)

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """What is seen inside counts as this part's."""
        self._parts.append(part)
        try:
            self.note()
            yield
            self.note()
        finally:
            self._parts.pop()

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Counts what a function takes as a part's."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.during(part):
                return function(*args, **kwargs)

        setattr(owner, name, watched)

    def end(self) -> dict[str, int]:
        """The peaks, less what was there at the start."""
        self._ended.set()
        return {part: most - self.before for part, most in self.most.items() if part != REST or most > self.before}


def large_llama(folder: Path, blocks: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[int, int]:
    """Writes a random Llama, a file a block; returns the bytes of a block, and of all of it."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=(8 * width // 3 + 63) // 64 * 64,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=False,
        dtype=str(dtype).removeprefix("torch."),
        architectures=["LlamaForCausalLM"],
    )
    wide = (config.intermediate_size, width)
    shapes = {f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
    shapes |= {"mlp.gate_proj.weight": wide, "mlp.up_proj.weight": wide, "mlp.down_proj.weight": wide[::-1]}
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> int:
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        return sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    ends = {f"{name}.weight": random(vocabulary, width) for name in ("model.embed_tokens", "lm_head")}
    total = write("ends.safetensors", {**ends, "model.norm.weight": torch.ones(width)})
    block = 0
    for index in range(blocks):
        tensors = {f"model.layers.{index}.{name}": random(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{index}.{name}.weight"] = torch.ones(width)
        block = write(f"block-{index}.safetensors", tensors)
        total += block
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return block, total


def large_experts(folder: Path, blocks: int, width: int, experts: int, fp8: bool) -> tuple[int, int]:
    """Writes a random Qwen3-MoE, a matrix an expert as it is published, in bfloat16 or FP8.

    Returns:
        The bytes of a block, and of all of it, as the model has them: in bfloat16.
    """
    config = Qwen3MoeConfig(
        vocab_size=300,
        hidden_size=width,
        moe_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=2,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=257,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )
    folder.mkdir(parents=True)
    if fp8:
        in_fp8(config, folder, block=64)
    else:
        random_model(config).bfloat16().save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    block = 2 * (4 * width * width + 3 * experts * width * width)
    return block, blocks * block + 4 * 300 * width


def short_run(model: Path, folder: Path, phases: list[str], bits: int, steps: int = 2) -> Path:
    """A configuration of a run of few steps: what is measured is memory."""
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"Line {i}: the square of {i} is {i * i}.\n" for i in range(700)), encoding="utf-8")
    text = {"class_path": "lightning_gsq.data.TextFile", "init_args": {"path": str(corpus)}}
    callbacks = [{"class_path": f"lightning_gsq.callbacks.{name}"} for name in ("GumbelAnnealing", "HardRounding")]
    content = {
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "accelerator": "cpu",
            "precision": "32-true",
            "max_steps": steps,
            "callbacks": callbacks,
        },
        "model": {
            "pretrained": str(model),
            "phases": phases,
            "scheme": {"bits": bits, "group_size": 64},
            "gumbel": {"backend": "eager", "logits_dtype": "bfloat16"},
            "compile_blocks": False,
            "warm_start": {"class_path": "lightning_gsq.quantizers.RTN", "init_args": {"weighted": False}},
            "optimizer": {"class_path": "lightning_gsq.training.Lion", "init_args": {"lr": 1e-4}},
        },
        "end_to_end": {"max_steps": 1},
        "data": {"source": text, "sequence_length": 64, "num_sequences": 4, "num_validation_sequences": 2},
        "evaluation": {"source": text, "sequence_length": 64, "num_windows": 2},
    }
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(content))
    return file
