"""The end-to-end phase on two processes, as copies and spread over them: ``python -m tests.support.sharded FOLDER``.

Each process writes what it found to ``FOLDER/<case>-<strategy>-<rank>.safetensors``. The two are forked once everything
is imported, which takes longer than what they do.
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
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from lightning_gsq.cli.defaults import QUIET_TRAINER
from lightning_gsq.system.sharding import is_sharded, local, private_copy
from lightning_gsq.training import EndToEndOptions, EndToEndQuantization
from lightning_gsq.training.optim import Adam
from lightning_gsq.training.teacher import StoredTeacher
from tests.support.forks import renew_thread_pool
from tests.support.tiny import FAMILIES
from tests.support.weights import rounded

CASES: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    # the family, the blocks that are quantized, options
    "llama": (
        "llama",
        [1],
        {
            "train": ["scales", "norms"],
            "batch_size": 1,
            "optimizer": lambda groups: torch.optim.Adam(groups, lr=2e-3, fused=True),
        },
    ),
    "gemma2": (
        "gemma2",
        [0, 1],
        {
            "train": ["scales", "norms", "head", "codes"],
            "batch_size": 2,
            "recompute": True,
            "top_k": 20,
            "cross_entropy": 0.2,
            "code_learning_rate": 1e-3,
            "optimizer": lambda groups: Adam(groups, lr=2e-3, backend="eager"),
        },
    ),
}


class _Sizes(Callback):
    """What a process holds between two steps, as a share of all bytes."""

    share = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts parameters and the optimizer's state."""
        tensors = [*pl_module.parameters()]
        tensors += [v for state in trainer.optimizers[0].state.values() for v in state.values() if torch.is_tensor(v)]
        self.share = sum(local(t).nbytes for t in tensors) / sum(t.numel() * t.dtype.itemsize for t in tensors)


def run(case: str, strategy: str, rank: int, folder: Path) -> None:
    """One short fit."""
    family, blocks, settings = CASES[case]
    torch.manual_seed(0)
    network = FAMILIES[family]()
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    weights = {index: own for index, own in rounded(network).items() if index in blocks}
    options = EndToEndOptions(**settings)
    module = EndToEndQuantization(private_copy(network) if strategy == "fsdp2" else network, weights, options)
    ids = torch.randint(0, 250, (37, 12), generator=torch.Generator().manual_seed(1))
    train, held_out = ids[:32], ids[32:]  # one file of the teacher, and 3 and 2 sequences held out: unequal work
    sequences: Any = TensorDataset(train)
    if options.loss.top_k is not None:
        sequences = module.stored = StoredTeacher(folder / f"{case}-{strategy}", train, options.loss.top_k, {})
    own = torch.utils.data.Subset(sequences, list(range(rank, 32, 2)))
    sizes = _Sizes()
    trainer = Trainer(
        strategy=strategy,
        devices=2,
        accelerator="cpu",
        max_epochs=1,
        max_steps=3,
        accumulate_grad_batches=2,
        gradient_clip_val=0.05,
        logger=False,
        callbacks=[sizes],
        num_sanity_val_steps=0,
        inference_mode=False,
        use_distributed_sampler=False,
        **QUIET_TRAINER,
    )
    batches = DataLoader(own, batch_size=options.passes.batch_size)
    validation = DataLoader(TensorDataset(held_out[rank::2]), batch_size=options.passes.batch_size)
    (found,) = trainer.validate(module, validation, verbose=False)
    trainer.fit(module, batches, validation)
    if module.validated_step != trainer.global_step:
        trainer.validate(module, validation, verbose=False)
    assert is_sharded(module) == (strategy == "fsdp2")
    module.restore_best()
    results = {
        f"{index}.{name}.{part}": value.clone()
        for index, tensors in module.tensors()
        for name, tensor in tensors.items()
        for part, value in (("codes", tensor.codes_OI), ("scales", tensor.scales_OG.float()))
    }
    results |= {f"dense.{name}": value for name, value in module.dense().items()}
    figures = {
        "start": found["end_to_end/val_loss"],
        "best": module.best_loss,
        "steps": trainer.global_step,
        "share": sizes.share,
        "intact": all(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters()),
    }
    save_file(results, folder / f"{case}-{strategy}-{rank}.safetensors", {"figures": json.dumps(figures)})


def main(folder: Path) -> int:
    """Runs all cases on two processes; the exit code of the worse."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            renew_thread_pool()
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
            os.environ |= {"LOCAL_RANK": str(rank)}
            for case in CASES:
                for strategy in ("ddp", "fsdp2"):
                    run(case, strategy, rank, folder)
            os._exit(0)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1])))
