"""llama.cpp on a GGUF file, in a process of its own: it ends the process over a file that it does not like.

The package is ``xllamacpp``, llama.cpp's server with Python bindings. Its sampler reports log-probabilities before any
bias, so that a bias towards a token is a way to read that token's own log-probability: one request a token.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_gsq.export.contract import CheckFailedError

PACKAGE = "xllamacpp"
SECONDS = 1800
CONTEXT = 512
"""Tokens that the server keeps, unless a text is longer; prompts and texts of a check are shorter."""


@dataclass(frozen=True)
class Answer:
    """What llama.cpp made of a file.

    Args:
        texts: Greedy continuation of every prompt.
        tops: For every prompt, the most probable next tokens with their log-probabilities; empty where the first of
            them has no text of its own.
        ids: Token numbers of every prompt, as llama.cpp's tokenizer gives them.
        logprobs: Of every token of the text after the first.
    """

    texts: list[str]
    tops: list[dict[int, float]]
    ids: list[list[int]]
    logprobs: list[float]


def ask(file: Path, prompts: Sequence[str], new_tokens: int, top: int, text_ids: Sequence[int]) -> Answer:
    """Loads a file in llama.cpp and asks it.

    Args:
        file: The GGUF file.
        prompts: Texts to continue.
        new_tokens: Tokens of each continuation.
        top: Log-probabilities to report for the first of them.
        text_ids: A text whose tokens are to be rated.

    Raises:
        CheckFailedError: llama.cpp does not load it, or fails.
    """
    request = {
        "prompts": list(prompts),
        "new_tokens": new_tokens,
        "top": top,
        "text_ids": list(text_ids),
        "threads": torch.get_num_threads(),
        "context": max(CONTEXT, len(text_ids)),
    }
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        # -P keeps this folder, whose names are those of packages, out of the import path.
        script = Path(__file__).with_name("llama_cpp_process.py")
        command = [sys.executable, "-P", str(script), str(file), str(answer)]
        result = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=SECONDS, check=False
        )
        if result.returncode != 0 or not answer.is_file():
            lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
            raise CheckFailedError(f"llama.cpp does not run {file}: " + " | ".join(lines[-3:]))
        content = json.loads(answer.read_text(encoding="utf-8"))
    content["tops"] = [{int(key): value for key, value in top.items()} for top in content["tops"]]
    return Answer(**content)
