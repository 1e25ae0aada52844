"""Experts spread over processes (gloo, CPU): the result of one process, a share of its memory, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from lightning_gsq.cli import main
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.models.expert_parallel import check_parts, fused_experts, share_of
from lightning_gsq.run.block_plan import make_plan
from lightning_gsq.run.experts import check_expert_parallel
from lightning_gsq.training import ModelQuantization
from lightning_gsq.training.expert_parallel import clip_norm
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.decoders import DECODERS
from tests.support.expert_parallel import EXPERTS, MODELS, run_jobs
from tests.support.processes import kill_one, start_process
from tests.support.runs import block_files, summary_of, write_config
from tests.support.tiny import FAMILIES, byte_tokenizer

SPREAD = ["--model.expert_parallel", "true"]


def _model(family: str, folder: Path) -> Path:
    MODELS[family]().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _config(model: Path, corpus: Path, folder: Path) -> Path:
    """All sequences in one step, shared by any number of processes, and held-out ones that they do not share evenly."""
    config = write_config(
        model,
        corpus,
        folder,
        data__batch_size=8,
        data__num_sequences=8,
        data__num_validation_sequences=17,
        trainer__max_epochs=6,
    )
    settings = yaml.safe_load(config.read_text())
    # Initial noise, which each expert has from a generator of its own, is too small to matter.
    settings["model"]["gumbel"] |= {"sigma": 1e-8, "alpha": 6e6}
    settings["model"]["optimizer"]["init_args"]["lr"] = 0.006
    callbacks = [c for c in settings["trainer"]["callbacks"] if "Monitor" not in c["class_path"]]
    sizes = {"class_path": "tests.support.expert_parallel.Sizes", "init_args": {"file": str(folder / "sizes.json")}}
    settings["trainer"]["callbacks"] = [*callbacks, sizes]
    config.write_text(yaml.safe_dump(settings))
    return config


@pytest.fixture(scope="module")
def folders(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of one process, of two, and of four that go on after the first block of the two; blocks compared before."""
    root = tmp_path_factory.mktemp("experts")
    model = _model("deepseek_v3", root / "model")
    folders = {count: root / f"processes-{count}" for count in (1, 2, 4)}
    arguments = {
        count: ["fit", "--config", str(_config(model, corpus, folder)), *SPREAD] for count, folder in folders.items()
    }
    of_two = {"from": str(folders[2] / "run"), "to": str(folders[4] / "run"), "without": "block-001.safetensors"}
    run_jobs(
        root,
        {
            "blocks-2": {"processes": 2},
            "blocks-4": {"processes": 4},
            "one": {"processes": 1, "arguments": arguments[1]},
            "two": {"processes": 2, "arguments": arguments[2]},
            "four": {"processes": 4, "arguments": arguments[4], **of_two},
        },
    )
    return folders


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "run" / "blocks").glob("block-*.safetensors"))
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("processes", [2, 4])
def test_it_ends_as_on_one_process(processes: int, folders: dict[int, Path]) -> None:
    expected, found = _tensors(folders[1]), _tensors(folders[processes])
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, rtol=5e-3, atol=1e-5, msg=name)
        else:
            assert float((found[name] != tensor).float().mean()) < 0.01, name
    one, other = summary_of(folders[1]), summary_of(folders[processes])
    for number, block in one["blocks"].items():
        assert block["flip_rate"] > 0.05 and block["final"] < block["start"], "training moves codes"
        for figure in ("start", "final", "flip_rate"):
            assert other["blocks"][number][figure] == pytest.approx(block[figure], rel=1e-3)
    assert other["bits_per_weight"] == one["bits_per_weight"]
    for name, value in one["perplexity"].items():
        assert other["perplexity"][name] == pytest.approx(value, rel=1e-3)
    assert other["blocks"]["1"]["made_by"] == {
        "processes": processes,
        "nodes": 1,
        "strategy": "DDPStrategy",
        "expert_parallel": True,
    }


@pytest.mark.parametrize("processes", [2, 4])
def test_experts_are_accepted_one_by_one_as_on_one_process(processes: int, folders: dict[int, Path]) -> None:
    one, other = (summary_of(folders[count])["experts"] for count in (1, processes))
    assert one == other and list(one) == ["model.layers.1.mlp.experts"]
    (found,) = one.values()
    assert sum(found["held_out_tokens"]) == 17 * 32 * 2 and sum(found["tokens"]) == 8 * 32 * 2
    assert 0 < len(found["kept_start"]) < EXPERTS, "some go back, some stay trained"


@pytest.mark.parametrize("processes", [2, 4])
def test_a_process_has_its_share_of_the_experts(processes: int, folders: dict[int, Path]) -> None:
    (whole,) = json.loads((folders[1] / "sizes.json").read_text())
    parts = json.loads((folders[processes] / "sizes.json").read_text())
    assert len(parts) == processes and whole["experts"] > 0
    for rank, part in enumerate(parts):
        share = len(share_of(EXPERTS, rank, processes)) / EXPERTS
        assert part == {"experts": share * whole["experts"], "others": whole["others"]}


def test_a_process_that_dies_ends_the_run_which_another_number_resumes(corpus: Path, tmp_path: Path) -> None:
    config = _config(_model("mixtral", tmp_path / "model"), corpus, tmp_path)
    many = [*SPREAD, "--trainer.max_epochs", "4", "--model.phases", "[blocks]"]
    run = start_process("fit", "--config", str(config), *many, "--trainer.strategy", "ddp", "--trainer.devices", "2")
    kill_one(run, tmp_path, 1)
    kept = block_files(tmp_path)
    assert list(kept) == ["block-000.safetensors"]
    assert main(["fit", "--config", str(config), *many]) == 0
    assert block_files(tmp_path)["block-000.safetensors"] == kept["block-000.safetensors"]
    assert len(block_files(tmp_path)) == 2


def test_contiguous_shares() -> None:
    assert [share_of(6, rank, 4) for rank in range(4)] == [range(1), range(1, 3), range(3, 4), range(4, 6)]


# -- refusals


def _check(family: str, processes: int = 2, precision: Any = "32-true", **settings: Any) -> None:
    model = ModelQuantization("tiny", **{"scheme": QuantScheme(2, 16), "expert_parallel": True, **settings})
    model.network = (MODELS | DECODERS | FAMILIES)[family]()
    trainer: Any = SimpleNamespace(world_size=processes, precision=precision)
    check_expert_parallel(model, make_plan(model), trainer)


def test_what_can_be_spread() -> None:
    _check("qwen3_moe", include=["*.experts.*"])
    _check("llama", expert_parallel=False)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {}, "nothing to spread in LlamaForCausalLM: routed experts are not among those to quantize"),
        ("qwen3_moe", {"exclude": ["*.experts.*"]}, "routed experts are not among those to quantize"),
        ("llama4", {}, "do not run through transformers' interface"),
        ("mixtral", {"processes": 8}, "cannot be shared by 8 processes; give --trainer.devices at most"),
        ("mixtral", {"hessian_sequences": 1}, "model.hessian_sequences: 1 sequences cannot be shared by 2 processes"),
        ("mixtral", {"moe_calibrate_all_experts": True}, "model.moe_calibrate_all_experts: spread experts"),
        ("mixtral", {"precision": "16-mixed"}, "use --trainer.precision bf16-mixed"),
        ("mixtral", {"scheme": QuantScheme(1, 16, SalientPart(ratio=0.25))}, "the salient part of model.layers.0"),
    ],
)
def test_what_cannot(family: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        _check(family, **settings)


def test_experts_that_are_more_than_their_sum() -> None:
    (module,) = fused_experts(find_blocks(MODELS["mixtral"]())[1][0]).values()
    check_parts(module, 4)

    original: Any = type(module).forward.__wrapped__

    class WithBias(type(module)):  # type: ignore[misc]
        def forward(self, *arguments: Any) -> torch.Tensor:
            result: torch.Tensor = original(self, *arguments) + 1
            return result

        forward.__wrapped__ = forward  # type: ignore[attr-defined]

    module.__class__ = WithBias
    with pytest.raises(ConfigurationError, match="not the sum of what its experts compute"):
        check_parts(module, 4)


class _Alone:
    """Stands for processes of which this one has everything."""

    device, world = torch.device("cpu"), 1

    @staticmethod
    def sum(values: torch.Tensor) -> torch.Tensor:
        return values


def test_clipping_by_norm_is_that_of_torch() -> None:
    ours, theirs = ([nn.Parameter(torch.zeros(n)) for n in (3, 5)] for _ in range(2))
    for one, other in zip(ours, theirs, strict=True):
        one.grad = torch.randn(len(one))
        other.grad = one.grad.clone()
    clip_norm(ours[:1], ours[1:], 0.5, _Alone())  # type: ignore[arg-type]
    nn.utils.clip_grad_norm_(theirs, 0.5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
