"""Several processes (gloo, CPU), forked once everything is imported, that share the experts of a block.

    python -m tests.support.expert_parallel JOB ...

A job is the path of a JSON file: a number of ``processes``, and ``arguments`` of the command line; ``from`` may name a
folder to copy ``to`` another first, without a file. Without arguments, each process compares spread blocks of random
models with whole ones. The jobs run one after another.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch import distributed as dist
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig

from lightning_gsq.cli import main as command
from lightning_gsq.models.chain import find_blocks, run_block
from lightning_gsq.models.expert_parallel import held_weights, in_step, spread
from lightning_gsq.models.survey import survey
from lightning_gsq.system.token_exchange import TokenExchange
from lightning_gsq.training import BlockQuantization
from tests.support.forks import renew_thread_pool
from tests.support.processes import clean_environment
from tests.support.tiny import COMMON, random_model

EXPERTS = 6
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_moe": lambda: random_model(
        Qwen3MoeConfig(**COMMON, head_dim=8, moe_intermediate_size=24, num_experts=EXPERTS, num_experts_per_tok=2)
    ),
    "mixtral": lambda: random_model(MixtralConfig(**COMMON, num_local_experts=EXPERTS)),
    "qwen2_moe": lambda: random_model(
        Qwen2MoeConfig(
            **COMMON,
            num_experts=EXPERTS,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=32,
        )
    ),
    "gpt_oss": lambda: random_model(
        GptOssConfig(**COMMON, head_dim=8, num_local_experts=EXPERTS, num_experts_per_tok=2)
    ),
    "deepseek_v3": lambda: random_model(
        DeepseekV3Config(
            **{**COMMON, "num_key_value_heads": 4},
            first_k_dense_replace=1,
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=16,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
    ),
}


class Sizes(Callback):
    """What every process has of the routed experts of the last block, and of everything else of it: bytes of codes,
    logits, scales and their optimizer's state."""

    watches_only = True

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what all processes held."""
        assert isinstance(pl_module, BlockQuantization)
        state = trainer.optimizers[0].state
        held = {"experts": 0, "others": 0}
        for name, weight in pl_module.named_weights():
            tensors = [*weight.parameters(), *weight.buffers()]
            for parameter in weight.parameters():
                tensors += [v for v in state[parameter].values() if torch.is_tensor(v) and v.numel() > 1]
            held["experts" if ".experts." in name else "others"] += sum(tensor.nbytes for tensor in tensors)
        everybody: list[Any] = [held] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(everybody, held)
        if trainer.is_global_zero:
            self.file.write_text(json.dumps(everybody))


def compare_blocks(rank: int, world: int, port: int) -> int:
    """Compares outputs and all gradients of spread blocks with those of whole ones; 0 if they are equal."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for family in MODELS:
        network = MODELS[family]()
        surveyed, blocks = survey(network), find_blocks(network)[1]
        exchange = TokenExchange(rank, world, torch.device("cpu"))
        run = functools.partial(run_block, call=surveyed.bound_call(1))
        hidden_BTD = surveyed.inputs_BTD[1][:1].repeat(2 * world, 1, 1).float()
        one_token_BTD = hidden_BTD[:, :1].expand_as(hidden_BTD)
        hidden_BTD = hidden_BTD * torch.linspace(0.5, 1.5, 2 * world)[:, None, None]
        # Shares of unequal sizes; in the second case all tokens are alike, so that most experts meet none.
        for everybody_BTD in (hidden_BTD, one_token_BTD):
            _compare(blocks[1], exchange, run, everybody_BTD, slice(rank, None if rank == world - 1 else rank + 1))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _compare(
    block: Any, exchange: TokenExchange, run: Callable[..., Tensor], everybody_BTD: Tensor, own: slice
) -> None:
    upstream_BTD = torch.randn(everybody_BTD.shape, generator=torch.Generator().manual_seed(1))
    whole = copy.deepcopy(block).requires_grad_()
    part = spread(block, exchange, torch.device("cpu"), torch.float32).requires_grad_()
    held = held_weights(part, exchange.rank, exchange.world)
    assert held and all(len(part.get_parameter(name)) == len(held[name]) < EXPERTS for name in held)
    inputs_BTD = everybody_BTD.clone().requires_grad_()
    expected_BTD = run(whole, inputs_BTD)
    ((expected_BTD * upstream_BTD).sum() / exchange.world).backward()
    own_BTD = everybody_BTD[own].clone().requires_grad_()
    output_BTD = run(part, own_BTD)
    _close(output_BTD, expected_BTD[own], "output")
    (output_BTD * upstream_BTD[own]).sum().backward()
    assert own_BTD.grad is not None and inputs_BTD.grad is not None
    _close(own_BTD.grad / exchange.world, inputs_BTD.grad[own], "gradient of the input")
    for name, parameter in part.named_parameters():
        wanted = whole.get_parameter(name).grad
        assert wanted is not None, name
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if name in held:  # none, where no token has met any of them
            _close(found, wanted[held[name].start : held[name].stop], name)
        else:
            _close(exchange.sum(found) / exchange.world, wanted, name)
    with torch.no_grad(), in_step(part, 2 if exchange.rank == 0 else 1):
        for _ in range(2 if exchange.rank == 0 else 1):
            _close(run(part, own_BTD), expected_BTD[own], "output without gradients")


def _close(found: Tensor, expected: Tensor, what: str) -> None:
    error, largest = ((found - expected).detach().abs().max(), expected.detach().abs().max())
    assert error <= 1e-4 * largest + 1e-5, f"{what}: off by {error:.3g}, where the largest is {largest:.3g}"


def run_jobs(folder: Path, jobs: dict[str, dict[str, Any]]) -> None:
    """Runs jobs, whose files go into the folder, one after another in a process of their own."""
    files = []
    for name, job in jobs.items():
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps(job))
    command = [sys.executable, "-m", "tests.support.expert_parallel", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=clean_environment(), check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


def start(rank: int, processes: int, port: int, job: dict[str, Any]) -> int:
    """One process of a job."""
    if "arguments" not in job:
        return compare_blocks(rank, processes, port)
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        job["arguments"] += ["--trainer.strategy", "ddp", "--trainer.devices", str(processes)]
    return command(job["arguments"])


def run(job: dict[str, Any]) -> int:
    """Runs a job; the exit code of the worst process."""
    if "from" in job:
        shutil.copytree(job["from"], job["to"], ignore=shutil.ignore_patterns(job["without"]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(job["processes"]):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                renew_thread_pool()
                status = start(rank, job["processes"], port, job)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            sys.stdout.flush()
            os._exit(status)
        children.append(child)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(max(run(json.loads(Path(file).read_text())) for file in sys.argv[1:]))
