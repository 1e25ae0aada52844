"""What every command shares: exit codes, settings of a Trainer, the precision of this machine, quiet libraries."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch

EXIT_FAILURE = 1
"""Exit code for what began and failed."""

_library_warning = warnings.formatwarning
QUIET_TRAINER: dict[str, Any] = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""A run makes dozens of Trainers; what is worth a line is said by the run itself."""

TRAINER_DEFAULTS: dict[str, Any] = QUIET_TRAINER | {
    "default_root_dir": "runs/quantized",
    "max_epochs": 1,
    "precision": None,
    "num_sanity_val_steps": 0,
    "inference_mode": False,  # torch.no_grad is enough, and compiles nothing a second time
    "use_distributed_sampler": False,  # each process has its share of the sequences already
    "log_every_n_steps": 5,
}


def native_precision(accelerator: str) -> str:
    """``bf16-mixed`` where the hardware multiplies bfloat16 natively, else ``32-true``."""
    if accelerator in {"auto", "gpu", "cuda"} and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


def quiet_libraries() -> None:
    """Silences what dozens of Trainers would repeat: banners, tips and advice on data loader workers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.pytorch.accelerators.cuda",
        "lightning.fabric",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*The number of training batches.*",
        ".*module.s. in eval mode at the start.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*recommended to use `self.log..*sync_dist=True.*",  # what a Trainer logs here is of all processes already
    ):
        warnings.filterwarnings("ignore", message)
    warnings.formatwarning = _one_line
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a hub out of reach ends in one line of ours


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of this project is a sentence for the user; one of a library keeps the place that it comes from."""
    if category.__module__.partition(".")[0] == "lightning_gsq":
        return f"warning: {message}\n"
    return _library_warning(message, category, filename, lineno, line)
