"""Configurations of runs of a few seconds, and what such runs left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from lightning_gsq.system.digests import tensors_digest


def write_config(model: Path, corpus: Path, folder: Path, **changes: object) -> Path:
    """A configuration file for a run of a few seconds."""
    text = {"class_path": "lightning_gsq.data.TextFile", "init_args": {"path": str(corpus)}}
    settings: dict[str, dict[str, object]] = {
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "accelerator": "cpu",
            "precision": "32-true",
            "callbacks": [
                {"class_path": f"lightning_gsq.callbacks.{name}"}
                for name in ("GumbelAnnealing", "HardRounding", "QuantizationMonitor", "BlockProgress")
            ],
        },
        "model": {
            "pretrained": str(model),
            "embedding": "auto" if "model__size" in changes else None,
            "phases": ["init", "blocks"],
            "scheme": {"bits": 2, "group_size": 16},
            "gumbel": {"backend": "eager"},
            "compile_blocks": False,
            "warm_start": {"class_path": "lightning_gsq.quantizers.RTN", "init_args": {"weighted": True}},
            "hessian_sequences": 64,
            "optimizer": _adam(1e-3),
        },
        "end_to_end": {"optimizer": _adam(2e-3), "max_steps": -1},
        "data": {"source": text, "sequence_length": 32, "num_sequences": 48, "num_validation_sequences": 8},
        "evaluation": {"source": text, "sequence_length": 64, "num_windows": 4},
    }
    for key, value in changes.items():
        group, _, name = key.partition("__")
        settings.setdefault(group, {})[name] = value
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


def _adam(rate: float) -> dict[str, object]:
    """Adam with torch's own settings rather than those of the recipe."""
    return {"class_path": "torch.optim.Adam", "init_args": {"lr": rate, "betas": [0.9, 0.999], "fused": None}}


def block_files(folder: Path, kind: str = "block") -> dict[str, str]:
    """Digests of the tensors in a run's block files, by the file's name; their headers also say how long they took."""
    files = sorted((folder / "run" / "blocks").glob(f"{kind}-*"))
    return {file.name: tensors_digest(load_file(file)) for file in files}


def summary_of(folder: Path) -> dict[str, Any]:
    """The summary of the run in ``folder``."""
    content: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    return content
