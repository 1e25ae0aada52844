"""llama.cpp on a GGUF file, in a process of its own: it ends the process over a file that it does not like.

Run as a program, it reads a request from standard input and writes the answer to the file named last:

    python -m lightning_gsq.export.llama_cpp model.gguf answer.json < request.json

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
from typing import Any

from lightning_gsq.export.formats import CheckFailedError

PACKAGE = "xllamacpp"
CONTEXT = 512
"""Tokens that the server keeps; prompts and texts of a check are shorter."""
FORCE = 1e6
SECONDS = 1800


@dataclass(frozen=True)
class Answer:
    """What llama.cpp made of a file.

    Args:
        texts: Greedy continuation of every prompt.
        tops: For every prompt, the most probable next tokens with their log-probabilities.
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
    request = {"prompts": list(prompts), "new_tokens": new_tokens, "top": top, "text_ids": list(text_ids)}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", __name__, str(file), str(answer)]
        result = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=SECONDS, check=False
        )
        if result.returncode != 0 or not answer.is_file():
            lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
            raise CheckFailedError(f"llama.cpp does not run {file}: " + " | ".join(lines[-3:]))
        content = json.loads(answer.read_text(encoding="utf-8"))
    content["tops"] = [{int(key): value for key, value in top.items()} for top in content["tops"]]
    return Answer(**content)


def _serve(file: str, request: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = CONTEXT, 1, 0
    parameters.warmup = False
    server = xllamacpp.Server(parameters)

    def complete(prompt: str | list[int], tokens: int, **options: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "cache_prompt": True, **options}
        answer = server.handle_completions(body)
        if "choices" not in answer:
            raise RuntimeError(str(answer))
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    texts, tops, ids, logprobs = [], [], [], []
    for prompt in request["prompts"]:
        choice = complete(prompt, request["new_tokens"], logprobs=request["top"])
        texts.append(choice["text"])
        first = choice["logprobs"]["content"][0]["top_logprobs"]
        tops.append({entry["id"]: entry["logprob"] for entry in first})
        ids.append(_tokenize(server.listening_address, prompt))
    text = request["text_ids"]
    for end in range(1, len(text)):
        choice = complete(text[:end], 1, logprobs=1, logit_bias=[[text[end], FORCE]])
        token = choice["logprobs"]["content"][0]
        if token["id"] != text[end]:
            raise RuntimeError(f"asked for token {text[end]}, got {token['id']}")
        logprobs.append(token["logprob"])
    return {"texts": texts, "tops": tops, "ids": ids, "logprobs": logprobs}


def _tokenize(address: str, text: str) -> list[int]:
    from urllib.request import Request, urlopen

    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    with urlopen(Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})) as response:
        tokens: list[int] = json.load(response)["tokens"]
    return tokens


if __name__ == "__main__":
    content = _serve(sys.argv[1], json.load(sys.stdin))
    Path(sys.argv[2]).write_text(json.dumps(content), encoding="utf-8")
