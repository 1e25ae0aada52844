"""A hub that is out of reach is found out by one request, and what answers, whatever it answers, is within reach."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
from datasets import config as datasets_config
from datasets.packaged_modules.json.json import Json

from lightning_gsq.system import hub
from tests.support.tiny import save_tiny_model

SCRIPT = """
import sys, time
from pathlib import Path
import datasets
from lightning_gsq.commands import harness
from lightning_gsq.data import HuggingFaceDataset
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models import loading
from lightning_gsq.models.empty import empty_model
from lightning_gsq.models.saving import copy_processor

def load(address):
    source = loading.resolve(address)
    empty_model(source, loading.load_config(source))
    loading.load_tokenizer(source)
    copy_processor(source, Path("."))
    return type(loading.load_model(source)).__name__

def read(name, streaming=False):
    return next(iter(HuggingFaceDataset(name, streaming=streaming).documents()))

def questions():
    harness.load_tasks(["task.yaml"], None, False)

for attempt in (
    lambda: load("nobody/no-model"),
    lambda: load("nobody/no-model/file.gguf"),
    lambda: read("nobody/no-data", streaming=True),
    lambda: read("nobody/no-data"),
    lambda: load("org/no-weights"),
    lambda: load("org/tiny"),
    lambda: read("org/data"),
    questions,
):
    began = time.perf_counter()
    try:
        said = attempt()
    except ConfigurationError as error:
        said = " ".join(str(error).split())
    print(time.perf_counter() - began < 15, said)  # one file that is asked for again takes 23 s
"""
TASK = """\
task: squares
dataset_path: nobody/no-questions
output_type: multiple_choice
test_split: test
doc_to_text: "{{n}}"
doc_to_choice: ["{{right}}", "{{wrong}}"]
doc_to_target: "{{key}}"
metric_list: [{metric: acc}]
"""


def run(script: str, endpoint: str, home: Path) -> list[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "*"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=home)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def cached(home: Path) -> None:
    """A model, another without weights and a set of texts, as their libraries keep what came from the hub."""
    for name in ("tiny", "no-weights"):
        folder = home / "hub" / f"models--org--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        save_tiny_model("llama", folder / "snapshots" / ("0" * 40))
    (home / "hub/models--org--no-weights/snapshots" / ("0" * 40) / "model.safetensors").unlink()
    (home / "rows.jsonl").write_text('{"text": "One row."}\n')
    builder = Json(str(home / "made"), "data", "default", hash="0", data_files={"train": str(home / "rows.jsonl")})
    builder.download_and_prepare()
    (home / "datasets" / "org___data").mkdir(parents=True)
    (made,) = (home / "made" / "data").iterdir()
    made.rename(home / "datasets" / "org___data" / "default")


def test_a_hub_that_is_out_of_reach_is_found_out_at_once(tmp_path: Path) -> None:
    """Of models and data sets; what their caches hold is taken, and no file of it is asked for."""
    cached(tmp_path)
    (tmp_path / "task.yaml").write_text(TASK)
    *refused, model, data, questions = run(SCRIPT, "http://127.0.0.1:9", tmp_path)
    names = ("nobody/no-model,", "nobody/no-model/file.gguf,", "'nobody/no-data'", "'nobody/no-data'", "org/no-weights")
    for line, name in zip(refused, names, strict=True):
        assert line.startswith("True ") and name in line, line
        assert "out of reach of this machine" in line and "refused" in line and "give a local path" in line
    assert (model, data) == ("True LlamaForCausalLM", "True One row.")
    pytest.importorskip("lm_eval")
    assert questions.startswith("True tasks: the data set of task.yaml, nobody/no-questions, is out of reach"), (
        questions
    )
    assert "refused" in questions and "get within reach of the hub (HF_ENDPOINT" in questions


class NotFound(http.server.BaseHTTPRequestHandler):
    """Has nothing."""

    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_an_answer_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    try:
        assert hub.why_out_of_reach() is None
    finally:
        server.shutdown()


def test_it_is_asked_again_after_a_minute_and_libraries_are_offline_inside_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = list[str]()
    now = [0.0]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://nowhere")
    monkeypatch.setattr(hub, "_no_answer", lambda address: asked.append(address) or "no answer")
    monkeypatch.setattr(hub.time, "monotonic", lambda: now[0])
    for now[0] in (0, 1, hub.FRESH + 1):
        with hub.without_waiting() as reason:
            assert reason == "no answer" and huggingface_hub.is_offline_mode() and datasets_config.HF_HUB_OFFLINE
            with hub.without_waiting() as inner:
                assert inner is None
        assert not huggingface_hub.is_offline_mode() and not datasets_config.HF_HUB_OFFLINE
    assert asked == ["http://nowhere"] * 2
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.why_out_of_reach() is None
