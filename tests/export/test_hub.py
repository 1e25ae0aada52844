"""Uploading, against a hub on this machine that knows just what an upload asks for."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import hub


class Hub(BaseHTTPRequestHandler):
    """Takes every file inside the commit itself."""

    calls: list[tuple[str, str, Any]] = []
    refuse = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        Hub.calls.append(("POST", self.path, lines))
        if Hub.refuse:
            self._answer({"error": "no"}, 403)
        elif self.path == "/api/repos/create":
            self._answer({"url": f"{self.server.address}/me/tiny", "name": "me/tiny", "id": "me/tiny"})  # type: ignore[attr-defined]
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            self._answer(
                {"commitUrl": f"{self.server.address}/me/tiny/commit/abc", "commitOid": "abc", "pullRequestUrl": None}  # type: ignore[attr-defined]
            )
        else:
            self._answer({"valid": True})

    def do_GET(self) -> None:
        Hub.calls.append(("GET", self.path, None))
        self._answer({"id": "me/tiny", "sha": "abc", "siblings": [], "name": "me"})

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    server.address = address  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.calls, Hub.refuse = [], False
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield address
    server.shutdown()


def test_a_folder_arrives(stub: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# card")
    (tmp_path / "config.json").write_text("{}")
    assert hub.push(tmp_path, "me/tiny", private=True) == f"{stub}/me/tiny"
    ((created,),) = [lines for _, path, lines in Hub.calls if path == "/api/repos/create"]
    assert created["name"] == "tiny" and created["organization"] == "me"
    assert created["visibility"] == "private"
    (commit,) = [lines for _, path, lines in Hub.calls if "/commit/" in path]
    assert {line["value"]["path"] for line in commit if line["key"] == "file"} == {"README.md", "config.json"}


def test_a_refusal_is_explained(stub: str, tmp_path: Path) -> None:
    Hub.refuse = True
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"the hub did not take me/tiny.*hf upload"):
        hub.push(tmp_path, "me/tiny", private=True)


def test_no_answer_is_explained(stub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(ConfigurationError, match=r"the hub did not take me/tiny: .*refused; the files are in"):
        hub.push(tmp_path, "me/tiny", private=True)


def test_names() -> None:
    hub.check_name("me/model-{format}", 2)
    hub.check_name("model", 1)
    with pytest.raises(ConfigurationError, match="cannot share the repository 'me/model'"):
        hub.check_name("me/model", 2)
    with pytest.raises(ConfigurationError, match="push_to_hub"):
        hub.check_name("no/such/name", 1)
