"""Perplexity block by block against that of the whole model, and what it holds on the device."""

import functools
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning_gsq.data import PerplexityData
from torch import Tensor
from transformers import GraniteConfig, PreTrainedModel

from lightning_gsq.cli import main
from lightning_gsq.cli.defaults import QUIET_TRAINER
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.quantizers import RTN
from lightning_gsq.quantizers.warm_start import quantized
from lightning_gsq.run import blockwise_perplexity
from lightning_gsq.run.block_plan import make_plan
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.run.perplexity import Measure, Room, make_measure, runs_by_block, whole_model_terms
from lightning_gsq.run.standard_errors import standard_error, with_error
from lightning_gsq.run.substitution import Substitution
from lightning_gsq.system.processes import Ranks
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.decoders import DECODERS
from tests.support.tiny import COMMON, FAMILIES, deep_llama, random_model


def _trainer(precision: str = "32-true") -> Callable[[], Trainer]:
    return lambda: Trainer(accelerator="cpu", precision=precision, logger=False, inference_mode=False, **QUIET_TRAINER)


def _measures(
    network: PreTrainedModel,
    precision: str = "32-true",
    activations: ActivationOptions = ActivationOptions(),  # noqa: B008
    windows: int = 5,
    length: int = 48,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> tuple[Callable[..., float], Callable[..., float], ModelQuantization]:
    """Perplexity of random windows: of the whole model, block by block; and the module."""
    model = ModelQuantization("tiny", scheme=QuantScheme(3, 16))
    model.network = network
    found = []
    for by_block in (False, True):
        evaluation = PerplexityData(sequence_length=length, by_block=by_block)
        evaluation.ids_NT = torch.randint(0, 250, (windows, length), generator=torch.Generator().manual_seed(1))
        make = _trainer(precision)
        measure = make_measure(model, evaluation, activations, make, Room(), lambda _: None, ranks)
        found.append(functools.partial(_value, measure, model))
    return found[0], found[1], model


def _value(measure: Measure, model: ModelQuantization, **replaced: object) -> float:
    return measure(Substitution(model, **replaced)).value  # type: ignore[arg-type]


def test_every_family_as_the_whole_model(family: PreTrainedModel) -> None:
    whole, by_block, _ = _measures(family, length=64)
    assert by_block() == pytest.approx(whole(), rel=1e-5)


def test_a_factor_on_the_logits_and_positions_that_chunks_do_not_divide() -> None:
    granite = random_model(GraniteConfig(**{**COMMON, "max_position_embeddings": 512}, logits_scaling=4.0))
    whole, by_block, _ = _measures(granite, windows=3, length=300)
    assert by_block() == pytest.approx(whole(), rel=1e-5)


@pytest.mark.parametrize("by_block", [False, True])
def test_the_standard_error_is_that_of_the_windows_means(by_block: bool) -> None:
    model = ModelQuantization("tiny", scheme=QuantScheme(3, 16))
    model.network = FAMILIES["llama"]()
    evaluation = PerplexityData(sequence_length=200, by_block=by_block)
    evaluation.ids_NT = torch.randint(0, 250, (6, 200), generator=torch.Generator().manual_seed(1))
    measure = make_measure(model, evaluation, ActivationOptions(), _trainer(), Room(), lambda _: None)
    logits = model.network(evaluation.ids_NT).logits[:, :-1].double()
    labels = evaluation.ids_NT[:, 1:]
    means_N = -logits.log_softmax(-1).gather(-1, labels[..., None]).mean((1, 2))
    for _ in range(2):  # nothing is left over from the first time
        measured = measure(Substitution(model))
        assert measured.error == pytest.approx(float(means_N.std() / 6**0.5 * means_N.mean().exp()), rel=1e-4)
    assert str(measured) == f"{measured.value:.3f} ± {measured.error:.3f}"


def test_one_window_has_no_standard_error() -> None:
    assert standard_error([1.0], Ranks(), torch.device("cpu")) is None
    assert standard_error([2.0, 2.0], Ranks(), torch.device("cpu")) == 0
    assert with_error(1.25, None, 2) == "1.25" and with_error(1.25, 0.5, 1) == "1.2 ± 0.5"


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    whole, by_block, _ = _measures(FAMILIES[name]().to(dtype), "bf16-mixed")
    assert by_block() == pytest.approx(whole(), rel=1e-2)


def test_half_precision_that_converts_the_model() -> None:
    whole, _, _ = _measures(FAMILIES["llama"]().to(torch.bfloat16))
    _, by_block, _ = _measures(FAMILIES["llama"](), "bf16-true")
    assert by_block() == pytest.approx(whole(), rel=1e-2)


def test_hidden_states_in_files(tmp_path: Path) -> None:
    options = ActivationOptions(memory_limit_gb=0.0, folder=str(tmp_path))
    whole, by_block, _ = _measures(FAMILIES["llama"](), activations=options)
    assert by_block() == pytest.approx(whole(), rel=1e-5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_weights_that_are_installed(name: str) -> None:
    """Quantized weights, other parameters as they are stored, a head that is no longer tied; then the model's own."""
    network = FAMILIES[name]()
    whole, by_block, model = _measures(network)
    before, plan = by_block(), make_plan(model)
    _, blocks = find_blocks(network)
    tensors: list[dict[str, QuantizedTensor]] = []
    for own in plan:
        block = blocks[own.index]
        starts = {s: RTN()(s.to_matrix(block.get_parameter(s.name)), None, q) for s, q in own.weights.items()}
        tensors.append({s.name: quantized(start, own.weights[s], torch.float16) for s, start in starts.items()})
    head = network.get_output_embeddings().weight * 1.25
    replaced = {"plan": plan, "tensors": tensors, "dense": {"lm_head.weight": head}, "rounded": True}
    assert by_block(**replaced) == pytest.approx(whole(**replaced), rel=1e-5) != before
    assert by_block() == before == pytest.approx(whole(), rel=1e-5)


def test_the_device_holds_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that goes to the device goes through one function: here it copies, and counts what is alive."""
    live = peak = 0

    def fetch(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        nonlocal live, peak
        copied = tensor.detach().to(device, dtype, copy=True)
        live += copied.nbytes
        peak = max(peak, live)

        def freed(size: int = copied.nbytes) -> None:
            nonlocal live
            live -= size

        weakref.finalize(copied, freed)
        return copied

    network = deep_llama()
    whole, by_block, _ = _measures(network)
    monkeypatch.setattr(blockwise_perplexity, "_fetch", fetch)
    places = {name: p.data_ptr() for name, p in network.named_parameters()}
    assert by_block() == pytest.approx(whole(), rel=1e-5)
    assert places == {name: p.data_ptr() for name, p in network.named_parameters()}
    block, head = (sum(p.nbytes for p in part.parameters()) for part in (find_blocks(network)[1][0], network.lm_head))
    windows = 5 * 48 * 32 * 4
    assert max(block, head) <= peak <= max(block, head) + windows
    assert live == 0


def test_processes_share_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shares of five windows: weighted, their losses are those of all (test_distributed has the real thing)."""
    network = FAMILIES["llama"]()
    monkeypatch.setattr(Ranks, "sum", lambda _, values: values)
    whole, _, _ = _measures(network)
    shares = [_measures(network, ranks=Ranks(rank, 2))[1]() for rank in (0, 1)]
    mean = (3 * torch.tensor(shares[0]).log() + 2 * torch.tensor(shares[1]).log()) / 5
    assert float(mean.exp()) == pytest.approx(whole(), rel=1e-5)


def _odd_head() -> PreTrainedModel:
    network = FAMILIES["llama"]()
    network.lm_head.register_forward_hook(lambda _, __, output: output**3)
    return network


def _head_that_sees_another_block() -> PreTrainedModel:
    network = FAMILIES["llama"]()
    seen: list[Tensor] = []
    network.model.layers[0].register_forward_hook(lambda _, __, output: seen.append(output))
    network.model.norm.register_forward_pre_hook(lambda _, args: (args[0] + seen[-1],))
    return network


def _blocks_that_see_the_tokens() -> PreTrainedModel:
    network = FAMILIES["llama"]()

    def tell(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        ids_BT = args[0] if args else kwargs["input_ids"]
        mask = torch.zeros(1, 1, ids_BT.shape[1], ids_BT.shape[1])
        network.seen = mask.masked_fill(ids_BT[:, None, None] % 2 == 0, -1.0)

    def use(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> tuple[object, object]:
        return args, {**kwargs, "attention_mask": network.seen}

    network.model.register_forward_pre_hook(tell, with_kwargs=True)
    for layer in network.model.layers:
        layer.register_forward_pre_hook(use, with_kwargs=True, prepend=True)
    return network


@pytest.mark.parametrize(
    "make", [_blocks_that_see_the_tokens, DECODERS["gemma3n"], DECODERS["bloom"], DECODERS["openai_gpt"]]
)
def test_what_belongs_to_a_window_goes_with_it(make: Callable[[], PreTrainedModel]) -> None:
    whole, by_block, _ = _measures(make(), windows=3, length=300 if make is not DECODERS["openai_gpt"] else 100)
    assert by_block() == pytest.approx(whole(), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_odd_head, "evaluation.by_block: .* not its output embedding applied to them; set it to false"),
        (_head_that_sees_another_block, "something other than the hidden states"),
    ],
)
def test_models_that_are_no_chain_are_refused(make: Callable[[], PreTrainedModel], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        _measures(make())


def test_the_choice() -> None:
    terms = whole_model_terms(10**9, 1000, 100, 2)
    total = sum(terms.values())
    assert not runs_by_block("auto", terms, 0, Room()), "the host"
    assert not runs_by_block("auto", terms, 0, Room(2 * total)) and runs_by_block("auto", terms, 0, Room(total))
    assert runs_by_block(True, terms, 0, Room()) and not runs_by_block(False, terms, total, Room(1, 1))
    assert not runs_by_block("auto", terms, 90, Room(None, 100)) and runs_by_block("auto", terms, 91, Room(None, 100))


def test_a_small_device_is_noticed(
    tiny_llama: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``validate`` on a device that takes no whole model, then with each choice made for it: the same figure."""
    monkeypatch.setattr("lightning_gsq.estimate.limits.device_bytes", lambda _: 100_000)
    arguments = ["validate", "--model.pretrained", str(tiny_llama), "--trainer.accelerator", "cpu"]
    arguments += ["--trainer.precision", "32-true", "--evaluation.source", "TextFile"]
    arguments += ["--evaluation.source.path", str(corpus), "--evaluation.sequence_length", "64"]
    outputs = []
    for choice in ("auto", "true", "false"):
        assert main([*arguments, "--evaluation.num_windows", "4", "--evaluation.by_block", choice]) == 0
        outputs.append(capsys.readouterr().out)
    for output in outputs[:2]:
        assert "block by block: the model takes 0.0 GB, the device has 0.0 GB free" in output
    assert "block by block" not in outputs[2]
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1] == outputs[2].splitlines()[-1]
