"""Small models, tokenizers and folders for the tests; nothing is downloaded."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "" if "gpu" not in " ".join(sys.argv) else "0")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: kernels then run on the CPU

from transformers import PreTrainedModel

import lightning_gsq.cli.errors  # noqa: F401 - all libraries, before what follows
from tests.support.finished import MakeRun, make_run
from tests.support.tiny import FAMILIES, save_tiny_model

gc.collect()
gc.freeze()  # a run collects cycles after every block: what libraries brought need not be looked at each time

assert "callbacks" not in sys.modules and "data" not in sys.modules, "import the packages by their full names"


def pytest_configure() -> None:
    """A shell has what it starts in the background ignore SIGINT, which tests send to themselves and to their runs."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu need one."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-block Llama with a byte-level tokenizer."""
    return save_tiny_model("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A random model of each family."""
    return FAMILIES[request.param]()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of some 40 kB."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    lines = [f"Line {i}: the square of {i} is {i * i}, and its cube is {i**3}.\n" for i in range(700)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def new_run(tmp_path: Path) -> MakeRun:
    """Makes runs, each in a folder of its own."""

    def make(**arguments: object) -> Path:
        return make_run(tmp_path / f"made{len(list(tmp_path.glob('made*')))}", **arguments)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def llama_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny Llama at 3 bits; not to be changed."""
    return make_run(tmp_path_factory.mktemp("runs"))
