"""Perplexity of GGUF files as llama.cpp itself computes it, with activations rounded to 8 bits on the CPU.

    python scripts/llama_cpp_perplexity.py runs/quickstart/export/gguf/model.gguf --windows 4

Windows and tokens are those of ``validate``: each token but the first of a window is predicted from those before it. A
token is a request to llama.cpp's server, some ten milliseconds for a model of 135 million weights.
"""

from __future__ import annotations

import argparse
import math

from lightning_gsq.data import PerplexityData
from runs import text_of

from lightning_gsq.export.readers.llama_cpp import ask
from lightning_gsq.models import address, loading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="GGUF files of one model")
    parser.add_argument("--evaluation", help="text file, a document a row; held-out Python documentation if left out")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--windows", type=int, help="the first so many; all if left out")
    options = parser.parse_args()
    source = address.resolve(options.files[0])
    text = text_of(options.evaluation, "evaluation")
    data = PerplexityData(text, options.length, options.windows)
    data.tokenize(loading.load_tokenizer(source), loading.load_model(source))
    for file in options.files:
        losses = [-value for ids_T in data.ids_NT for value in ask(file, [], 0, 0, ids_T.tolist()).logprobs]
        print(f"{file}: {math.exp(sum(losses) / len(losses)):.2f} over {len(losses):,} tokens", flush=True)


if __name__ == "__main__":
    main()
