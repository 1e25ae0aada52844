"""Serving a packed model takes nothing of what quantizing takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lightning_gsq.export.contract import ExportOptions
from lightning_gsq.export.formats.native import NativeFormat
from lightning_gsq.export.opening import open_run
from tests.support.finished import make_run

SHOW = """
import sys
{before}
seen = set(sys.modules)
{work}
heavy = ("sklearn", "scipy.", "gguf", "lightning.", "lightning_gsq.saliency", "lightning_gsq.quantizers")
print([name for name in sys.modules if name.startswith(heavy) and name not in seen])
"""


def heavy_modules(work: str, before: str = "") -> str:
    """Names of the modules that ``work`` imports beyond those of ``before``, run in a process of its own."""
    command = [sys.executable, "-c", SHOW.format(work=work, before=before)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert heavy_modules("import lightning_gsq") == "[]"


def test_loading_a_packed_model_imports_nothing_heavy_beyond_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "native"
    folder.mkdir()
    NativeFormat().write(open_run(make_run(tmp_path)), folder, ExportOptions())
    work = f"import lightning_gsq, torch; model = lightning_gsq.load({str(folder)!r}); model(torch.tensor([[1, 2]]))"
    # transformers' own model classes import parts of scipy.
    assert heavy_modules(work, before="from transformers import AutoModelForCausalLM, PreTrainedModel") == "[]"


def test_the_check_sees_a_heavy_package() -> None:
    seen = heavy_modules("import lightning_gsq.saliency")
    assert "scipy.optimize" in seen
    assert "sklearn" not in seen, "it brings pandas, and is for graphs alone, which hardly a run counts groups by"
