"""A hub that is out of reach is found out by one request, and what answers, whatever it answers, is within reach."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

SCRIPT = """
import time
from lightning_gsq.data import HuggingFaceDataset
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models import loading
from lightning_gsq.system.hub import why_out_of_reach

for attempt in (
    lambda: loading.load_config(loading.resolve("nobody/no-model")),
    lambda: loading.load_tokenizer(loading.resolve("nobody/no-model/file.gguf")),
    lambda: next(iter(HuggingFaceDataset("nobody/no-data").documents())),
):
    began = time.perf_counter()
    try:
        attempt()
    except ConfigurationError as error:
        print(time.perf_counter() - began < 4, error)
print("no name", why_out_of_reach("a name/of/nothing", "config.json", "model"))
"""


def run(script: str, endpoint: str, home: Path) -> list[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "*"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_hub_that_is_out_of_reach_is_found_out_at_once(tmp_path: Path) -> None:
    model, gguf, data, no_name = run(SCRIPT, "http://127.0.0.1:9", tmp_path)
    for line, name in ((model, "nobody/no-model,"), (gguf, "nobody/no-model/file.gguf,"), (data, "'nobody/no-data'")):
        assert line.startswith("True ") and name in line, line
        assert "out of reach" in line and "refused" in line and "give a local path" in line
    assert no_name == "no name None"


class NotFound(http.server.BaseHTTPRequestHandler):
    """Has nothing."""

    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_an_answer_is_an_answer(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = "from lightning_gsq.system.hub import why_out_of_reach as why; print(why('nobody/x', 'a.json', 'model'))"
    try:
        assert run(script, f"http://127.0.0.1:{server.server_address[1]}", tmp_path) == ["None"]
    finally:
        server.shutdown()


def test_a_file_in_the_cache_is_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from lightning_gsq.system.hub import why_out_of_reach

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    assert why_out_of_reach("org/model", "config.json", "model") is None
