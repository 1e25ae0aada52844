"""How much tokens count by the end loss: against gradients of the whole model, and what a run does with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.models.output_gradients import watch_output_gradients
from lightning_gsq.quantizers import GPTQ, InputStatistics
from lightning_gsq.run.end_loss import draw, token_weights
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.system.seeding import generator_of
from lightning_gsq.training import ModelQuantization
from lightning_gsq.training.losses import LOSS_POSITIONS
from tests.run.test_forward_passes import IN_FILES, SEQUENCES, TOKENS, made_run
from tests.support.exported import SHAPE, quantize, save_model


def _squares(network: PreTrainedModel, ids_NT: Tensor) -> dict[str, Tensor]:
    """Mean squares ``N T`` of the gradients at the outputs of every linear module, of the same labels."""
    assert SEQUENCES * TOKENS <= LOSS_POSITIONS, "labels are drawn for all positions at once here"
    squares: dict[str, Tensor] = {}

    def watch(name: str, output: Tensor) -> None:
        output.register_hook(lambda g: squares.__setitem__(name, g.square().mean(-1).view(ids_NT.shape)))

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: watch(name, output))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    embedding = network.get_input_embeddings().weight.requires_grad_(True)
    with torch.enable_grad():
        log_probs_NV = network(ids_NT, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
        chances = [torch.rand(ids_NT.shape[1], generator=generator_of(0, "end loss", n)) for n in range(len(ids_NT))]
        labels_N1 = draw(log_probs_NV.detach(), torch.cat(chances))
        log_probs_NV.gather(1, labels_N1).sum().backward()
    embedding.requires_grad_(False)
    for hook in hooks:
        hook.remove()
    return {name: square_NT / square_NT.mean() for name, square_NT in squares.items()}


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("activations", [ActivationOptions(), IN_FILES], ids=["memory", "files"])
def test_weights_are_gradients_of_the_whole_model(name: str, activations: ActivationOptions, tmp_path: Path) -> None:
    run = made_run(name, tmp_path, activations)
    found = token_weights(run)
    wanted = _squares(run.model.network, run.train_ids_NT)
    assert set(found) == {plan.index for plan in run.plan}
    for plan in run.plan:
        plain = {site.name for site in plan.weights if not site.experts}
        assert set(found[plan.index]) == plain
        for weight in plain:
            torch.testing.assert_close(
                found[plan.index][weight], wanted[f"{plan.name}.{weight.removesuffix('.weight')}"], rtol=2e-3, atol=2e-3
            )


def test_labels_are_drawn_from_the_predictions() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    labels = draw(probabilities.log().expand(20_000, -1), torch.rand(20_000))
    shares = torch.bincount(labels.flatten(), minlength=4) / len(labels)
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)
    assert shares[1] == 0


def test_statistics_count_tokens_by_their_weights() -> None:
    block = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 4, bias=False))
    sites = [LinearSite("0.weight", 0, 6, 6, False), LinearSite("1.weight", 0, 4, 6, False)]
    statistics, x_NI, weight_N = InputStatistics(sites, torch.device("cpu")), torch.randn(10, 6), torch.rand(10)
    with torch.no_grad(), statistics.watching(block):
        statistics.weigh({"0.weight": weight_N, "1.weight": torch.ones(7)})  # of other rows: all count alike
        block(x_NI)
    torch.testing.assert_close(statistics.hessians(sites[0])[0], 0.2 * (x_NI * weight_N[:, None]).T @ x_NI)
    hidden_NI = block[0](x_NI).detach()
    torch.testing.assert_close(statistics.hessians(sites[1])[0], 0.2 * hidden_NI.T @ hidden_NI)


def test_products_whose_outputs_lie_otherwise_are_left_out() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.first @ (x @ self.second)

    block, seen = Block(), list[str]()
    with watch_output_gradients(block, lambda name, _: seen.append(name)):
        output = block(torch.randn(4, 4, requires_grad=True))
    output.sum().backward()
    assert seen == ["second"]


def test_a_run_with_them_is_another_and_resumes_to_the_bit(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", LlamaConfig(**SHAPE))
    start = {"class_path": "lightning_gsq.quantizers.LeastSquares"}
    runs = {
        name: quantize(model, tmp_path / name, 2, 32, warm_start=start, end_loss_weights=weighted)
        for name, weighted in (("plain", False), ("weighted", True), ("again", True))
    }
    codes = {name: {k: run.tensor(k).codes_OI for k in run.weights} for name, run in runs.items()}
    assert all(torch.equal(codes["again"][name], value) for name, value in codes["weighted"].items())
    assert any(not torch.equal(codes["plain"][name], value) for name, value in codes["weighted"].items())


def test_a_start_that_sees_no_inputs_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"end_loss_weights.*--model.imatrix x.gguf"):
        ModelQuantization("tiny", imatrix="x.gguf", end_loss_weights=True)
    ModelQuantization("tiny", warm_start=GPTQ(), end_loss_weights=True)
