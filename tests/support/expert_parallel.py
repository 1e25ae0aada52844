"""Runs on several processes (gloo, CPU), forked once everything is imported.

    python -m tests.support.expert_parallel JOB ...

A job is the path of a JSON file: a number of ``processes``, ``arguments`` of the command line, and a file ``sizes`` in
which the first process leaves what each process held in its first block. The jobs run one after another.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed as dist

from lightning_gsq.cli import main as command
from lightning_gsq.training import BlockQuantization


class Sizes(Callback):
    """Bytes that train, their optimizer's state and codes, of this process's experts and of everything else."""

    watches_only = True

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what all processes held; the last block's stays."""
        assert isinstance(pl_module, BlockQuantization)
        state = trainer.optimizers[0].state
        held = {"own": 0, "shared": 0, "parameters": 0}
        for name, weight in pl_module.named_weights():
            kind = "own" if name in pl_module.own else "shared"
            for parameter in weight.parameters():
                held[kind] += parameter.nbytes + sum(
                    v.nbytes for v in state[parameter].values() if torch.is_tensor(v) and v.numel() > 1
                )
            held[kind] += sum(buffer.nbytes for buffer in weight.buffers())
        held["parameters"] = sum(p.nbytes for p in pl_module.block.parameters())
        everybody: list[Any] = [held]
        if trainer.world_size > 1:
            everybody *= trainer.world_size
            dist.all_gather_object(everybody, held)
        if trainer.is_global_zero:
            self.file.write_text(json.dumps(everybody))


def start(rank: int, processes: int, port: int, arguments: list[str]) -> int:
    """One process of a job."""
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        arguments = [*arguments, "--trainer.strategy", "ddp", "--trainer.devices", str(processes)]
    return command(arguments)


def run(job: dict[str, Any]) -> int:
    """Runs a job; the exit code of the worst process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(job["processes"]):
        child = os.fork()
        if child == 0:
            os._exit(start(rank, job["processes"], port, job["arguments"]))
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(max(run(json.loads(Path(file).read_text())) for file in sys.argv[1:]))
