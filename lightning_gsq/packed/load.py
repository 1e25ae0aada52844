"""Loading a folder in the native format, whose weights stay packed.

    model = AutoModelForCausalLM.from_pretrained("runs/x/export/native")

works because importing ``lightning_gsq`` registers the format with transformers; :func:`load` is what
``lightning_gsq.load`` does with such a folder.

The model is built without weights, its quantized modules are exchanged for packed ones, and the files are then loaded
into those. Everything that the files say is checked against the model before a number of them is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.packed.config import METHOD, GSQConfig
from lightning_gsq.packed.transformers_quantizer import GSQQuantizer
from lightning_gsq.system.safetensors_headers import read_json, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["GSQQuantizer", "load"]


def load(
    root: Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a native folder; arguments as of :func:`lightning_gsq.load`.

    Raises:
        ConfigurationError: it is no native folder, or a damaged one.
    """
    from transformers import AutoConfig  # imports scipy, which `import lightning_gsq` does not wait for

    from lightning_gsq.models.classes import auto_class

    _refuse_other_kinds(root)
    config = read_json(root / "config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise ConfigurationError(
            f"model: {root} is not in the native format (its quantization_config names no {METHOD}); load it with "
            "AutoModelForCausalLM.from_pretrained"
        )
    GSQConfig(**quantization)
    weight_files(root)
    report: dict[str, Any]
    loaded: PreTrainedModel
    try:
        # A plain yes or no: with None, transformers asks at the terminal.
        options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        loader = auto_class(AutoConfig.from_pretrained(root, **options), trust_remote_code)
        loaded, report = loader.from_pretrained(
            root,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except ConfigurationError:
        raise
    except Exception as error:  # transformers raises a dozen unrelated types
        raise ConfigurationError(f"model: cannot load {root}: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise ConfigurationError(
                f"model: the files in {root} do not fit the model: {problem.replace('_', ' ')} "
                f"{', '.join(str(key) for key in sorted(report[problem], key=str)[:3])}"
            )
    return nn.Module.to(loaded, device) if device is not None else loaded


def _refuse_other_kinds(root: Path) -> None:
    """Says of a GGUF file and its folder, and of nothing at all, how it is loaded."""
    if (root / "config.json").is_file():
        return
    gguf = next(iter([root] if root.suffix == ".gguf" else sorted(root.glob("*.gguf"))), None)
    if gguf is not None and gguf.is_file():
        raise ConfigurationError(
            f"model: {root} is not in the native format; load it with AutoModelForCausalLM.from_pretrained("
            f"{str(gguf.parent)!r}, gguf_file={gguf.name!r})"
        )
    if not root.is_dir():
        raise ConfigurationError(f"model: there is no folder {root}")
