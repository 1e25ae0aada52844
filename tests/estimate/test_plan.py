"""Plans: what they say against what really is, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning_gsq.data import CalibrationDataModule, PerplexityData, PythonDocumentation
from transformers import PreTrainedModel

import lightning_gsq.estimate as plan
from lightning_gsq.cli import main
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.estimate import limits, quantities, simulate
from lightning_gsq.estimate.block_terms import block_terms
from lightning_gsq.estimate.perplexity_terms import by_block as runs_by_block
from lightning_gsq.estimate.perplexity_terms import perplexity_terms
from lightning_gsq.estimate.skeleton import Skeleton, make_skeleton
from lightning_gsq.models import loading
from lightning_gsq.models.chain import find_blocks, run_block, trace
from lightning_gsq.models.linear_weights import find_all_sites
from lightning_gsq.quantizers import RTN, GumbelOptions, GumbelQuantizer
from lightning_gsq.quantizers.warm_start import quantized
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.training import BlockQuantization, EndToEndOptions, ModelQuantization
from lightning_gsq.weights.quantized import BitsLedger
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.tiny import FAMILIES

CONFIGS = Path(__file__).parent / "configs"
IDS = torch.zeros(1, 16, dtype=torch.long)


def _skeleton(model: PreTrainedModel) -> Skeleton:
    return make_skeleton(loading.ModelSource("tiny"), model.config, "auto")


def test_structure_of_every_family(family: PreTrainedModel) -> None:
    """From the configuration alone: the sites that watching the real blocks finds."""
    skeleton, traced = _skeleton(family), trace(family, IDS)
    prefix, blocks = find_blocks(family)
    assert skeleton.prefix == prefix
    assert skeleton.parameters == sum(p.numel() for p in family.parameters())
    assert skeleton.width == traced.output_BTD.shape[-1]
    for block, hidden, call, own in zip(blocks, traced.inputs_BTD, traced.calls, skeleton.blocks, strict=True):
        assert own.sites == find_all_sites(block, lambda b=block, h=hidden, c=call: run_block(b, h, c))
        assert own.parameters == sum(p.numel() for p in block.parameters())


@pytest.mark.parametrize(("name", "blocks", "parameters"), [("8b", 32, 8_030_261_248), ("70b", 80, 70_553_706_496)])
def test_llama_from_its_configuration(name: str, blocks: int, parameters: int) -> None:
    source = loading.resolve(str(CONFIGS / f"llama-3.1-{name}"), need_weights=False)
    skeleton = make_skeleton(source, loading.load_config(source), "auto")
    assert (len(skeleton.blocks), skeleton.parameters, skeleton.dtype) == (blocks, parameters, torch.bfloat16)
    assert len(skeleton.blocks[-1].sites) == 7


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_simulated_activations_are_those_of_a_real_pass(name: str, training: bool) -> None:
    model = FAMILIES[name]()
    skeleton = _skeleton(model)
    block = skeleton.blocks[0]
    told = simulate.activation_bytes(block, skeleton.width, 2, 48, False, training).peak

    def random(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    real = simulate._run(block, random, skeleton.width, 2, 48, False, training).peak
    # A router sends tokens unevenly, and the extrapolation assumes a straight line.
    assert told == pytest.approx(real, rel=0.3 if name == "qwen3_moe" else 0.05)


def test_half_precision_takes_less() -> None:
    block, width = _skeleton(FAMILIES["llama"]()).blocks[0], 32
    sizes = [simulate.activation_bytes(block, width, 2, 64, bf16, True).peak for bf16 in (False, True)]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("bits", [1, "ternary", 2, 3])
def test_terms_of_training_are_the_tensors_of_a_block(bits: object) -> None:
    model = FAMILIES["llama"]()
    scheme = QuantScheme(bits, 24)  # type: ignore[arg-type]
    skeleton, traced = _skeleton(model), trace(model, IDS)
    block = find_blocks(model)[1][0]
    sites = skeleton.blocks[0].sites
    starts = {s: RTN()(s.to_matrix(block.get_parameter(s.name)), None, scheme) for s in sites}
    own = {s: GumbelQuantizer(starts[s], scheme, GumbelOptions(backend="eager"), torch.Generator()) for s in sites}
    settings = ModelQuantization("x", scheme=scheme, gumbel=GumbelOptions(backend="eager"))
    module = BlockQuantization(block, traced.calls[0], own, settings.block.optimizer)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = settings.block.optimizer([{"params": trained, "name": "logits"}])
    module.loss((traced.inputs_BTD[0], traced.inputs_BTD[1]), module.sampled_weights(0)).backward()
    optimizer.step()
    state = quantities.optimizer_state(settings)
    around = quantities.Surroundings(False, state, 0, None, False, True, accumulates=True)
    data = CalibrationDataModule(sequence_length=16)
    terms = block_terms(settings, data, 32, skeleton.blocks[0], dict.fromkeys(sites, scheme), around).training
    by_kind = {name.split()[0]: count for name, count in terms.items()}
    assert by_kind["logits"] == sum(p.nbytes for p in trained)
    assert by_kind["their"] == sum(p.grad.nbytes for p in trained if p.grad is not None)
    states = [v for p in trained for v in optimizer.state[p].values() if v.numel() > 1]
    assert by_kind["optimizer"] == sum(v.nbytes for v in states)
    assert by_kind["block"] == sum(p.nbytes for p in block.parameters())
    started = sum(q.start_codes.nbytes + q.start_scales.nbytes for q in own.values())
    assert by_kind["start:"] == started
    tensors = [BitsLedger.of(quantized(start, scheme, torch.float16)) for start in starts.values()]
    assert quantities.ledger_of(((s, scheme) for s in sites), torch.float16) == sum(tensors, BitsLedger())


def test_optimizer_state() -> None:
    for optimizer, expected in ((torch.optim.Adam, 2.0), (torch.optim.SGD, 0.0)):
        model = ModelQuantization("x", optimizer=lambda groups, make=optimizer: make(groups, lr=1.0))
        assert quantities.optimizer_state(model) == expected


def _estimate(pretrained: Path, folder: Path, **trainer: object) -> plan.Estimate:
    return plan.estimate(
        ModelQuantization(str(pretrained), scheme=QuantScheme(2, 16), gumbel=GumbelOptions(backend="eager")),
        CalibrationDataModule(PythonDocumentation(), 32, num_sequences=48, num_validation_sequences=8, batch_size=2),
        PerplexityData(sequence_length=64, num_windows=2),
        ActivationOptions(),
        EndToEndOptions(),
        Trainer(default_root_dir=folder, accelerator="cpu", logger=False, **trainer),  # type: ignore[arg-type]
        with_probe=False,
    )


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": 1}, 24),
        ({"max_epochs": 3, "accumulate_grad_batches": 5}, 15),
        ({"max_epochs": 3, "max_steps": 30}, 30),
        ({"max_epochs": -1, "max_steps": 7}, 7),
        ({"max_epochs": 2, "limit_train_batches": 4}, 8),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 24),
    ],
)
def test_steps(tiny_llama: Path, tmp_path: Path, settings: dict[str, object], steps: int) -> None:
    assert _estimate(tiny_llama, tmp_path, **settings).steps == steps


def test_a_plan_against_the_run_itself(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    found = _estimate(tiny_llama, tmp_path / "none", max_epochs=1)
    assert not (tmp_path / "none").exists()
    arguments = {
        "--model.pretrained": str(tiny_llama),
        "--model.gumbel.backend": "eager",
        "--model.compile_blocks": "false",
        "--model.scheme": '{"bits": 2, "group_size": 16}',
        "--data.source": "TextFile",
        "--data.source.path": str(corpus),
        "--data.sequence_length": "32",
        "--data.num_sequences": "48",
        "--data.num_validation_sequences": "8",
        "--evaluation.sequence_length": "64",
        "--evaluation.num_windows": "2",
        "--trainer.accelerator": "cpu",
        "--trainer.logger": "false",
        "--trainer.default_root_dir": str(tmp_path / "run"),
    }
    assert main(["fit", *(part for pair in arguments.items() for part in pair)]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (ledger,) = found.ledgers.values()
    assert ledger.per_weight() == pytest.approx(summary["bits_per_weight"])
    assert all(block["step"] == found.steps for block in list(summary["blocks"].values())[:1])
    files = list((tmp_path / "run" / "blocks").iterdir())
    headers = 4096 * len(files)
    planned = next(count for name, count in found.run_folder.items() if name.startswith("block files"))
    assert planned <= sum(file.stat().st_size for file in files) <= planned + headers
    weights = (tmp_path / "run" / "model" / "model.safetensors").stat().st_size
    assert weights == pytest.approx(found.run_folder["quantized model, dequantized"], rel=0.1)


def _plan(*arguments: str) -> int:
    common = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--model.gumbel.backend", "eager"]
    return main(["plan", *common, *arguments])


def test_command(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the probe, on a folder that holds nothing but a configuration."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tiny_llama / "config.json").read_text())
    small = ["--data.sequence_length", "32", "--data.num_sequences", "8", "--evaluation.sequence_length", "32"]
    folder = ["--trainer.default_root_dir", str(tmp_path / "run")]
    assert _plan("--model.pretrained", str(tmp_path / "bare"), *small, *folder) == 0
    output = " ".join(capsys.readouterr().out.split())
    for words in ("parameters", "blocks: training of a block", "optimizer state", "steps", "ms a step", "fits"):
        assert words in output
    assert not (tmp_path / "run").exists()
    assert main(["plan", "--help"]) == 0
    assert "--device_memory_gb" in capsys.readouterr().out


def test_what_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = ["--model.pretrained", str(CONFIGS / "llama-3.1-70b"), "--probe", "false", "--model.phases", "[blocks]"]
    large += ["--activations.memory_limit_gb", "1000", "--trainer.default_root_dir", str(tmp_path)]
    assert _plan(*large, "--host_memory_gb", "4", "--device_memory_gb", "24") == 2
    output = capsys.readouterr()
    error = " ".join(output.err.split())
    assert "this run does not fit" in error
    assert "host memory: " in error and "device memory: " in error and "4.0 GB are available" in error
    assert "<- peak" in output.out


def test_every_phase_that_does_not_fit_has_its_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the option named makes that phase fit, with the number that was told."""
    large = ["--model.pretrained", str(CONFIGS / "llama-3.1-8b"), "--probe", "false", "--data.num_sequences", "128"]
    large += ["--model.phases", "blocks,end_to_end", "--trainer.default_root_dir", str(tmp_path)]
    room = ["--host_memory_gb", "4", "--device_memory_gb", "8"]
    assert _plan(*large, *room) == 2
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    blocks = next(line for line in lines if line.startswith("host memory: ") and "(blocks: warm start" in line)
    device = next(line for line in lines if line.startswith("device memory: ") and "(blocks: warm start" in line)
    assert "; with --model.warm_start RTN 4.7 GB, which fits" in device
    assert "; with --activations.memory_limit_gb 0 " in blocks and blocks.endswith(", which fits")
    end = next(line for line in lines if line.startswith("device memory: ") and "(end to end)" in line)
    assert "; with --end_to_end.recompute true --end_to_end.batch_size 1 --trainer.strategy fsdp2" in end
    assert any("takes" in line and "largest block" in line for line in lines)
    assert _plan(*large, *room, "--activations.memory_limit_gb", "0") == 2
    again = capsys.readouterr()
    assert not any("(blocks: warm start" in line and "host memory" in line for line in again.err.splitlines())
    number = blocks.partition("memory_limit_gb 0 ")[2].partition(" GB")[0]
    assert float(number) < 4


def test_perplexity_of_a_model_beyond_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The 70B model on 80 GB: block by block, and no longer refused; forced to be whole, it is."""
    large = ["--model.pretrained", str(CONFIGS / "llama-3.1-70b"), "--probe", "false", "--model.phases", "[blocks]"]
    large += ["--model.scheme.bits", "2", "--model.scheme.group_size", "128", "--data.sequence_length", "1024"]
    large += ["--data.num_sequences", "128", "--trainer.default_root_dir", str(tmp_path)]
    large += ["--activations.memory_limit_gb", "1000", "--evaluation.num_windows", "24"]
    large += ["--host_memory_gb", "1000", "--device_memory_gb", "80"]
    monkeypatch.setattr(limits, "free_disk", lambda _: 10**12)
    assert _plan(*large) == 0
    output = capsys.readouterr()
    assert "perplexity, block by block" in output.out and "largest block" in output.out
    assert _plan(*large, "--evaluation.by_block", "false") == 2
    output = capsys.readouterr()
    assert "(perplexity, whole model; " in output.err and "with --evaluation.by_block true 3.4 GB" in output.err
    assert "device memory: 14" in output.err


@pytest.mark.parametrize("choice", ["auto", False, True])
def test_terms_of_perplexity(choice: bool | str) -> None:
    network = FAMILIES["llama"]()
    skeleton = _skeleton(network)
    evaluation = PerplexityData(sequence_length=64, num_windows=7, by_block=choice)  # type: ignore[arg-type]
    for room, accelerated in ((None, False), (10**12, True), (100_000, True)):
        around = quantities.Surroundings(False, 0, 0, room, accelerated, True)
        way, host, device = perplexity_terms(evaluation, ActivationOptions(), skeleton, {}, around)
        by_block = choice is True or (choice == "auto" and room == 100_000)
        assert runs_by_block(evaluation, skeleton, {}, around) == by_block == (way == ", block by block")
        back = {"the model on its way back from the device": device["model"]} if "model" in device else {}
        assert host == ({"hidden states of the windows": 7 * 64 * 32 * 4} if by_block else back)
        assert ("model" in device) == (accelerated and not by_block)
        block = sum(p.nbytes for p in find_blocks(network)[1][0].parameters())
        assert device.get("largest block", block) == block
        mapped = perplexity_terms(evaluation, ActivationOptions(memory_limit_gb=0), skeleton, {}, around)
        assert mapped[1] == back


def test_fit_refuses_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = ModelQuantization("x"), CalibrationDataModule(sequence_length=1024, num_sequences=1024)
    monkeypatch.setattr(limits, "host_bytes", lambda: 10**9)
    with pytest.raises(ConfigurationError, match=r"memory_limit_gb: hidden states of 52.3 GB .* 1.0 GB are"):
        plan.refuse_early(model, data, ActivationOptions(memory_limit_gb=100), 4096)
    with pytest.raises(ConfigurationError, match=r"26.2 GB .* live in files, or use fewer sequences$"):
        plan.refuse_early(model, data, ActivationOptions("bfloat16", memory_limit_gb=100), 4096)
    monkeypatch.setattr(limits, "free_disk", lambda _: 10**9)
    with pytest.raises(ConfigurationError, match=r"activations.folder: hidden states take 52.3 GB"):
        plan.refuse_early(model, data, ActivationOptions(), 4096)
    monkeypatch.setattr(limits, "free_disk", lambda _: 10**12)
    plan.refuse_early(model, data, ActivationOptions(), 4096)


def test_limits(tmp_path: Path) -> None:
    assert 0 < limits.own_bytes() < 1e11 and limits.host_bytes() > 0
    assert limits.free_disk(tmp_path / "not" / "there") > 0
    assert limits.device_bytes(torch.device("cpu")) is None


def test_passes_of_gradients_are_a_phase_where_they_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(CONFIGS / "llama-3.1-8b")
    common = [
        "plan",
        config,
        "--probe",
        "false",
        "--trainer.default_root_dir",
        str(tmp_path),
        "--model.warm_start",
        "GPTQ",
    ]
    shown = {}
    for weighted in ("false", "true"):
        main([*common, "--model.end_loss_weights", weighted])
        shown[weighted] = capsys.readouterr().out
    assert "gradients of the end loss" not in shown["false"]
    assert "gradients of the end loss" in shown["true"]
    assert main([*common, "--model.end_loss_weights", "true", "--host_memory_gb", "4", "--device_memory_gb", "2"]) == 2
    assert "gradients of the end loss" in capsys.readouterr().err
    assert "weights of tokens" in shown["true"] and "activations of a pass and its gradients" in shown["true"]
