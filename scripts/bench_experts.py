"""How fast packed fused experts are over sorted tokens, against the loop over experts that a model's own code has.

    python scripts/bench_experts.py                     # 64 experts, 1024 -> 512 -> 1024, 8 a token
    python scripts/bench_experts.py --bits 2 4 --experts 128 --hidden 2048 --intermediate 768

One layer of Qwen3-MoE's experts with random codes; who meets whom is drawn evenly. All forms take turns within a round,
so that a drifting machine affects them alike: only ratios within a run mean something. "loop" is the class's own
forward, which makes one expert's matrix after the other dense; "grouped" is
:mod:`lightning_gsq.packed.expert_products`; "dense" is the loop over a bf16 model that is not packed. Calls take turns
among copies that no cache holds together.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Any

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.packed.expert_products import NAME
from lightning_gsq.packed.layers import PackedExperts
from lightning_gsq.weights.scheme import QuantScheme

COLD_BYTES = 64 << 20


def layer(options: argparse.Namespace, bits: int | None) -> Any:
    """The experts of one layer; packed with so many bits, or dense."""
    config = Qwen3MoeConfig(
        hidden_size=options.hidden,
        moe_intermediate_size=options.intermediate,
        num_experts=options.experts,
    )
    config._experts_implementation = "eager"
    with torch.device("meta"):
        module: Any = Qwen3MoeExperts(config)
    for name, parameter in list(module.named_parameters()):
        _, rows, columns = parameter.shape
        if bits is None:
            value = torch.randn(parameter.shape, dtype=torch.bfloat16, device=options.device) / 32
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
            continue
        site = LinearSite(name, options.experts, rows, columns, False)
        packed = PackedExperts(QuantScheme(bits, options.group_size), site, dtype=torch.bfloat16, device=options.device)
        packed.codes.random_(-(2**31), 2**31 - 1)
        packed.scales.uniform_(0, 0.01)
        delattr(module, name)
        setattr(module, name, packed)
    return module


def copies(options: argparse.Namespace, bits: int | None) -> list[Any]:
    """Enough layers to be cold."""
    first = layer(options, bits)
    size = sum(tensor.nbytes for tensor in first.state_dict().values())
    return [first, *(layer(options, bits) for _ in range(COLD_BYTES // size))]


def seconds(layers: list[Any], way: str, inputs: tuple[torch.Tensor, ...], calls: int) -> float:
    """One call's time."""
    for module in layers:
        module.config._experts_implementation = way
    wait = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    for call in range(calls):
        layers[call % len(layers)](*inputs)
    wait()
    return (time.perf_counter() - began) / calls


@torch.inference_mode()
def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--chosen", type=int, default=8, help="experts a token")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--group_size", type=int, default=128)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.device}")
    print(f"{options.experts} experts, {options.hidden} -> {options.intermediate}, {options.chosen} a token, bf16\n")
    names = ["bits", "tokens", "loop, ms", "grouped, ms", "dense, ms", "loop / grouped", "dense / grouped", "error"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    torch.manual_seed(0)
    dense = copies(options, None)
    for bits in options.bits:
        packed = copies(options, bits)
        for tokens in options.tokens:
            hidden = torch.randn(tokens, options.hidden, device=options.device, dtype=torch.bfloat16)
            index = torch.rand(tokens, options.experts, device=options.device).topk(options.chosen).indices
            inputs = (hidden, index, torch.full(index.shape, 1 / options.chosen, device=hidden.device).bfloat16())
            ways = {"loop": (packed, "eager"), "grouped": (packed, NAME), "dense": (dense, "eager")}
            taken: dict[str, list[float]] = {way: [] for way in ways}
            results = {}
            for name, (layers, way) in ways.items():
                seconds(layers, way, inputs, 1)
                results[name] = layers[0](*inputs).float()
            for _ in range(options.rounds):
                for name, (layers, way) in ways.items():
                    taken[name].append(seconds(layers, way, inputs, max(2, 32 // tokens)))
            middle = {name: statistics.median(values) for name, values in taken.items()}
            shown = [
                f"{1e3 * middle[name]:.3g} ({1e3 * min(values):.3g}–{1e3 * max(values):.3g})"
                for name, values in taken.items()
            ]
            error = (results["grouped"] - results["loop"]).abs().max() / results["loop"].abs().max()
            ratios = [f"{middle[name] / middle['grouped']:.2f}" for name in ("loop", "dense")]
            print(f"| {bits} | {tokens} | {' | '.join([*shown, *ratios])} | {float(error):.1e} |", flush=True)


if __name__ == "__main__":
    main()
