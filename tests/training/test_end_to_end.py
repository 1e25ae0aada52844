"""The end-to-end module on tiny models: what the student computes, what trains, that training helps."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel

from lightning_gsq.cli.defaults import QUIET_TRAINER
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.models.head import find_head, last_hidden
from lightning_gsq.training import EndToEndOptions, EndToEndQuantization, NonFiniteLossError
from tests.support.tiny import FAMILIES
from tests.support.weights import rounded


def _module(network: PreTrainedModel, **options: Any) -> EndToEndQuantization:
    return EndToEndQuantization(network, rounded(network), EndToEndOptions(batch_size=4, **options))


def _fit(module: EndToEndQuantization, epochs: int = 2) -> tuple[float, float]:
    """Held-out losses before and after training."""
    ids = torch.randint(0, 250, (16, 12))
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        inference_mode=False,
        **QUIET_TRAINER,
    )
    held_out = DataLoader(TensorDataset(ids[:8]), batch_size=4)
    (found,) = trainer.validate(module, held_out, verbose=False)
    trainer.fit(module, DataLoader(TensorDataset(ids), batch_size=4), held_out)
    module.restore_best()
    return found["end_to_end/val_loss"], module.best_loss


@torch.no_grad()
def test_student_is_the_model_with_dequantized_weights(family: PreTrainedModel) -> None:
    ids = torch.randint(0, 250, (2, 12))
    module = _module(family)
    own = {name: parameter.clone() for name, parameter in family.named_parameters()}
    before = last_hidden(family, ids)
    student = module.student_hidden(ids)
    assert torch.equal(module.teacher_hidden(ids), before), "the teacher stays what it was"
    torch.testing.assert_close(find_head(family).logits(before), family(ids).logits)
    prefix, _ = find_blocks(family)
    for index, tensors in module.tensors():
        for site in module.blocks[str(index)].sites:
            dense = site.from_matrix(tensors[site.name].dequantize())
            family.get_parameter(f"{prefix}.{index}.{site.name}").copy_(dense)
    torch.testing.assert_close(last_hidden(family, ids), student)
    for name, parameter in own.items():
        family.get_parameter(name).copy_(parameter)


@pytest.mark.parametrize(
    "options",
    [
        {"train": ["scales"]},
        {"train": ["scales", "norms"], "recompute": True, "temperature": 2.0},
        {"train": ["norms"]},
        {"train": ["scales", "head"], "head_learning_rate": 1e-2, "cross_entropy": 0.2},
        {"train": ["scales", "codes"], "code_learning_rate": 1e-2},
        {"train": ["codes"], "code_learning_rate": 1e-2, "recompute": True},
    ],
    ids=lambda options: "-".join(options["train"]),
)
def test_training_lowers_the_held_out_divergence(options: dict[str, Any]) -> None:
    network = FAMILIES["llama"]()
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    module = _module(network, **options)
    kinds = {name.rpartition(".")[2] for name, _ in module.trained()}
    assert ("log_scale" in kinds) == ("scales" in options["train"])
    assert ("positions" in kinds) == ("codes" in options["train"])
    start, end = _fit(module)
    assert end < start
    assert all(torch.equal(network.get_parameter(name), value) for name, value in before.items())


def test_the_teacher_sees_held_out_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two held-out batches and four for training, in three evaluations and two passes; the losses stay the same."""
    module = _module(FAMILIES["llama"]())
    seen: list[torch.Tensor] = []
    compute = module.teacher_hidden
    monkeypatch.setattr(module, "teacher_hidden", lambda ids_BT: seen.append(ids_BT) or compute(ids_BT))
    _fit(module)
    assert len(seen) == 2 + 2 * 4
    own, other = seen[0], seen[0].flip(0)
    for ids in (own, other, own):
        assert torch.equal(module.eval().loss([ids], 0)[0], module.loss([ids])[0])


def test_finer_codes_take_smaller_steps() -> None:
    """The learning rates are those of 3 bits; norms take the mean of the weights beside them."""
    network = FAMILIES["llama"]()
    tensors = {**rounded(network, bits=5), 0: rounded(network, bits=2)[0]}
    module = EndToEndQuantization(network, tensors, EndToEndOptions(norm_learning_rate=1e-3))
    module.trainer = Trainer(max_steps=1, logger=False, accelerator="cpu", **QUIET_TRAINER)
    module.trainer.fit_loop.setup_data = lambda: None
    groups = {group["name"]: group for group in module.configure_optimizers()["optimizer"].param_groups}
    coarse = sum(site.rows * site.in_features for site in tensors[0])
    total = sum(site.rows * site.in_features for own in tensors.values() for site in own)
    share = (coarse + (total - coarse) / 4) / total
    assert groups["scales"]["initial_lr"] == 2e-3 and len(groups["scales"]["params"]) == len(tensors[0])
    assert groups["scales x 0.25"]["initial_lr"] == 5e-4
    (norms,) = (group for name, group in groups.items() if name.startswith("norms"))
    assert norms["initial_lr"] == pytest.approx(1e-3 * share)


@pytest.mark.parametrize("bits", [3, 5])
def test_steps_are_no_longer_than_the_way(bits: int) -> None:
    """A model that begins near its original takes its divergence's share of the learning rates, if that is less."""
    network = FAMILIES["llama"]()
    module = EndToEndQuantization(network, rounded(network, bits=bits), EndToEndOptions())
    divergence, _ = _fit(module, epochs=1)  # the loss is nothing else
    assert 0 < divergence < 0.18 * 2.0 ** (3 - bits)
    rates = [group["initial_lr"] for group in module.trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([2e-3 * divergence / 0.18, 1e-3 * divergence / 0.18])


def test_recomputing_gives_the_same_gradient() -> None:
    network = FAMILIES["qwen3_moe"]()
    ids = torch.randint(0, 250, (2, 12))
    gradients = []
    for recompute in (False, True):
        module = _module(network, recompute=recompute)
        module.loss([ids])[0].backward()
        gradients.append([parameter.grad for _, parameter in module.trained()])
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, again)


def test_held_out_loss_is_that_of_the_stored_scales() -> None:
    network = FAMILIES["llama"]()
    module = _module(network)
    _fit(module, epochs=1)
    module.eval()
    ids = torch.randint(0, 250, (4, 12))
    tensors = dict(module.tensors())
    stored = {i: {s: tensors[i][s.name] for s in own} for i, own in rounded(network).items()}
    assert next(iter(stored[0].values())).scales_OG.dtype == torch.float16
    other = EndToEndQuantization(network, stored, EndToEndOptions(train=["scales"])).eval()
    other.norm_names, other.norms = module.norm_names, module.norms
    for index, block in module.blocks.items():
        other.blocks[index].norm_names, other.blocks[index].norms = block.norm_names, block.norms
    torch.testing.assert_close(other.loss([ids])[0], module.loss([ids])[0])


def test_a_tied_head_is_trained_as_a_matrix_of_its_own() -> None:
    network = FAMILIES["gemma2"]()
    assert network.config.tie_word_embeddings
    module = _module(network, train=["head"])
    embedding = network.get_input_embeddings().weight.clone()
    _fit(module, epochs=1)
    assert list(module.dense()) == ["lm_head.weight"]
    assert not torch.equal(module.dense()["lm_head.weight"], embedding)
    assert torch.equal(network.get_input_embeddings().weight, embedding)


def test_a_head_that_is_no_linear_map_is_refused() -> None:
    network = FAMILIES["llama"]()
    network.lm_head.register_forward_hook(lambda _, __, output: output**3)
    with pytest.raises(ConfigurationError, match="leave out end_to_end"):
        find_head(network)


def test_a_factor_on_the_logits_is_found() -> None:
    network = FAMILIES["llama"]()
    network.lm_head.register_forward_hook(lambda _, __, output: output / 8)
    assert find_head(network).scale == pytest.approx(0.125)


def test_a_loss_that_is_not_finite_stops() -> None:
    module = _module(FAMILIES["llama"](), optimizer=lambda groups: torch.optim.SGD(groups, lr=math.inf))
    with pytest.raises(NonFiniteLossError, match="end-to-end phase"):
        _fit(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"cross_entropy": 1.5}, "between 0 and 1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"train": []}, "train is empty"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        EndToEndOptions(**options)
