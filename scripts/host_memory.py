"""Peak host memory of a run and of its exports, part by part, on a random Llama of a size that is asked for.

    OMP_NUM_THREADS=1 python scripts/host_memory.py                        # 24 blocks of width 768, bfloat16
    OMP_NUM_THREADS=1 python scripts/host_memory.py --formats native,gguf --end_to_end

What counts is anonymous memory (``RssAnon`` of /proc/self/status): pages of the mapped checkpoint are dropped by the
system where it needs room, and read again. A limit on the address space (``RLIMIT_AS``, ``RLIMIT_DATA``) would count
these mappings, which safetensors makes private and writable. A thread reads the figure every two milliseconds, and each
part of the work has the most that it saw there, less what Python and the libraries took before the model was loaded.

A block is counted in the dtype of the checkpoint. Without an accelerator the device's memory is the host's, so
that the training of a block is a line of the table too.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.tiny import byte_tokenizer

PARTS = {
    # what is looked at: module, function or method, and what the table calls it
    "fit": (
        ("lightning_gsq.training.model", "ModelQuantization.load", "load"),
        ("lightning_gsq.commands.fit", "make_plan", "look at the blocks"),
        ("lightning_gsq.commands.fit", "make_run", "look at the blocks"),
        ("lightning_gsq.commands.fit", "warm_start_phase", "warm start"),
        ("lightning_gsq.commands.fit", "blocks_phase", "blocks: training"),
        ("lightning_gsq.commands.fit", "end_to_end_phase", "end to end"),
        ("lightning_gsq.run.phases", "Perplexities.note", "perplexity"),
        ("lightning_gsq.commands.fit", "save_and_summarize", "save"),
    ),
    "export": (
        ("lightning_gsq.commands.export", "open_run", "export: open"),
        ("lightning_gsq.export.engine", "obstacles", "export: refusals"),
        ("FORMAT", "write", "export: write"),
        ("FORMAT", "check", "export: check"),
    ),
}


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
    """

    def __init__(self, every: float = 0.002) -> None:
        self.every, self.most, self.before = every, dict[str, int](), anonymous_bytes()
        self._parts, self._ended = [REST], threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self._ended.wait(self.every):
            self.note()

    def note(self) -> None:
        """Looks once."""
        part = self._parts[-1]
        self.most[part] = max(self.most.get(part, 0), anonymous_bytes())

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
        return {part: most - self.before for part, most in self.most.items()}


def make_model(folder: Path, blocks: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[int, int]:
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
    wide = {"gate_proj": (config.intermediate_size, width), "up_proj": (config.intermediate_size, width)}
    wide["down_proj"] = (width, config.intermediate_size)
    shapes = {f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
    shapes |= {f"mlp.{name}.weight": shape for name, shape in wide.items()}
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
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return block, total


def settings(model: Path, folder: Path, phases: list[str], bits: int) -> Path:
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
            "max_steps": 2,
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


def measured(what: str, arguments: list[str], format_name: str, host_mb: float | None, queue: Any) -> None:
    """In a process of its own: runs a command and sends its peaks."""
    import importlib

    import lightning_gsq.system.memory

    if host_mb is not None:
        lightning_gsq.system.memory.host_bytes = lambda: int(host_mb * 1e6)

    import matplotlib.figure  # noqa: F401 - a library that comes late is no part of a phase
    import torch.utils.tensorboard  # noqa: F401

    from lightning_gsq.cli import main
    from lightning_gsq.export import format_of

    modules = [importlib.import_module(module) for module, _, _ in PARTS[what] if module != "FORMAT"]
    del modules
    peaks = Peaks()
    for module, name, part in PARTS[what]:
        owner: Any = format_of(format_name) if module == "FORMAT" else importlib.import_module(module)
        *path, last = name.split(".")
        for step in path:
            owner = getattr(owner, step)
        peaks.watch(owner, last, part)
    code = main(arguments)
    queue.put((code, peaks.end()))


def peaks_of(what: str, arguments: list[str], format_name: str, host_mb: float | None) -> dict[str, int]:
    """The peaks of a command."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measured, args=(what, arguments, format_name, host_mb, queue))
    process.start()
    code, peaks = queue.get()
    process.join()
    if code:
        raise SystemExit(f"{what} ended with exit code {code}")
    return dict(peaks)


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--formats", default="native,dequantized", help="to export to, each by itself")
    parser.add_argument("--end_to_end", action="store_true", help="that phase too")
    parser.add_argument(
        "--host_mb", type=float, help="memory that the machine is said to have free, instead of its own"
    )
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        dtype = getattr(torch, options.dtype)
        block, total = make_model(root / "model", options.blocks, options.width, options.vocabulary, dtype)
        print(f"model {total / 1e6:,.0f} MB, {options.blocks} blocks of {block / 1e6:.1f} MB\n")
        phases = ["init", "blocks", *(["end_to_end"] if options.end_to_end else [])]
        config = settings(root / "model", root, phases, options.bits)
        rows = peaks_of("fit", ["fit", "--config", str(config), *more], "", options.host_mb)
        for name in filter(None, options.formats.split(",")):
            peaks = peaks_of("export", ["export", str(root / "run"), "--format", name], name, options.host_mb)
            rows |= {f"{part}, {name}": size for part, size in peaks.items()}
    print("| part | anonymous memory | blocks |\n|---|---|---|")
    for part, size in rows.items():
        print(f"| {part} | {size / 1e6:,.0f} MB | {size / block:.1f} |")


if __name__ == "__main__":
    main()
