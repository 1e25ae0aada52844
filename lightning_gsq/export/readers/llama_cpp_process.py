"""The process that :mod:`lightning_gsq.export.readers.llama_cpp` starts. It imports ``xllamacpp`` alone.

python -P llama_cpp_process.py model.gguf answer.json < request.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

FORCE = 1e6


def serve(file: str, request: dict[str, Any]) -> dict[str, Any]:
    """Loads the file and answers; see ``Answer`` in the module that starts this one."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = request["context"], 1, 0
    parameters.warmup = False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = request["threads"]
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
        texts.append(complete(prompt, request["new_tokens"])["text"])
        # A token without a text of its own (a part of a character, a placeholder) is not reported.
        first = (complete(prompt, 1, logprobs=request["top"])["logprobs"] or {}).get("content") or [
            {"top_logprobs": []}
        ]
        tops.append({entry["id"]: entry["logprob"] for entry in first[0]["top_logprobs"]})
        ids.append(tokenize(server.listening_address, prompt))
    text = request["text_ids"]
    for end in range(1, len(text)):
        choice = complete(text[:end], 1, logprobs=1, logit_bias=[[text[end], FORCE]])
        token = choice["logprobs"]["content"][0]
        if token["id"] != text[end]:
            raise RuntimeError(f"asked for token {text[end]}, got {token['id']}")
        logprobs.append(token["logprob"])
    return {"texts": texts, "tops": tops, "ids": ids, "logprobs": logprobs}


def tokenize(address: str, text: str) -> list[int]:
    """Token numbers, as the server's tokenizer gives them."""
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    with urlopen(Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})) as response:
        tokens: list[int] = json.load(response)["tokens"]
    return tokens


if __name__ == "__main__":
    content = serve(sys.argv[1], json.load(sys.stdin))
    Path(sys.argv[2]).write_text(json.dumps(content), encoding="utf-8")
