"""What passes between blocks: found, carried, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.chain import embed, find_blocks, run_block, run_block_giving, trace
from lightning_gsq.models.passing import arguments_from_ids
from lightning_gsq.models.survey import check_chain, survey, token_errors
from tests.support.decoders import DECODERS
from tests.support.tiny import FAMILIES


def _last_of_chain(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """The last block's output, each block run alone on what the blocks before it gave for these sequences."""
    surveyed, traced = survey(model), trace(model, ids_BT[:1])
    calls = [call.like(known) for call, known in zip(traced.calls, surveyed.calls, strict=True)]
    hidden_BTD, beside = embed(model, ids_BT), dict[str, Tensor]()
    for index, (block, call) in enumerate(zip(find_blocks(model)[1], calls, strict=True)):
        arguments = arguments_from_ids(model, surveyed.forms, ids_BT, index, call) if call.from_ids else []
        bound = call.bind([*arguments, *(beside[name] for name in call.from_blocks)])
        hidden_BTD, given = run_block_giving(block, hidden_BTD, bound)
        beside |= given
    return hidden_BTD


def _last_of_model(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    outputs: list[Any] = []
    block = find_blocks(model)[1][-1]
    handle = block.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        model(ids_BT, use_cache=False)
    handle.remove()
    output = outputs[0][0] if isinstance(outputs[0], (tuple, list)) else outputs[0]
    return survey(model).calls[0].layout.pack(output)


@pytest.mark.parametrize("name", [*FAMILIES, *DECODERS])
def test_a_chain_of_other_sequences_is_the_model(name: str) -> None:
    """Three other sequences, longer than those of the survey and than the sliding windows."""
    model = {**FAMILIES, **DECODERS}[name]()
    ids = torch.randint(0, 256, (3, 24))
    with torch.no_grad():
        chain = _last_of_chain(model, ids)
    torch.testing.assert_close(chain, _last_of_model(model, ids), rtol=1e-3, atol=1e-3)


def test_what_gemma_3n_passes_beside_hidden_states() -> None:
    calls = survey(DECODERS["gemma3n"]()).calls
    assert calls[0].layout.inner == (4, 32) and calls[0].layout.batch == 1
    assert all(len(call.from_ids) == 1 for call in calls), "per-layer inputs"
    assert [len(call.gives) for call in calls] == [2, 2, 0, 0], "keys and values of the first two blocks"
    assert set(calls[3].from_blocks) == set(calls[0].gives) | set(calls[1].gives)


@pytest.mark.parametrize("name", ["bloom", "xglm"])
def test_what_does_not_broadcast_is_repeated(name: str) -> None:
    model = DECODERS[name]()
    surveyed = survey(model)
    assert all(list(call.repeated.values()) == [0] for call in surveyed.calls)
    ten = torch.cat([surveyed.inputs_BTD[0]] * 5)
    one = run_block(find_blocks(model)[1][0], ten, surveyed.calls[0])
    assert torch.equal(one[:2], one[8:])


def test_a_list_comes_back() -> None:
    model = DECODERS["openai_gpt"]()
    assert isinstance(survey(model).forms.like(find_blocks(model)[1][0], torch.zeros(1)), list)


def test_half_precision_is_no_difference() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        survey(FAMILIES["qwen3_moe"]().to(dtype))


# -- refused


def _leak(model: PreTrainedModel, amount: Callable[[Tensor], Tensor]) -> None:
    """Adds something between block 0 and block 1 that no block computes."""
    model.model.layers[1].register_forward_pre_hook(
        lambda _, args: (args[0] + amount(args[0]), *args[1:]), prepend=True
    )


def test_a_model_whose_blocks_are_not_a_chain_is_refused() -> None:
    model = FAMILIES["llama"]()
    surveyed = survey(model)
    surveyed.inputs_BTD[1].add_(1.0)  # as if something else had been mixed in between
    with pytest.raises(ConfigurationError, match="block 0 of LlamaForCausalLM, run alone, differs"):
        check_chain(model, surveyed)


def test_a_massive_activation_does_not_hide_a_leak() -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 1000.0
    survey(model)
    _leak(model, lambda hidden: 0.5 * torch.ones_like(hidden))
    with pytest.raises(ConfigurationError, match="block 0 of LlamaForCausalLM, run alone, differs"):
        survey(model)


def test_an_error_of_one_token_counts() -> None:
    wanted = torch.randn(2, 5, 8)
    wrong = wanted.clone()
    wrong[1, 2] += 1.0
    errors = token_errors(wrong, wanted)
    assert int((errors > 1e-6).sum()) == 1 and float(errors[7]) > 0.1


def test_an_argument_of_unknown_origin_is_refused() -> None:
    model = FAMILIES["llama"]()

    def tell(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[object, object]:
        mean = args[0].mean(-1)[:, None, None] * torch.ones(1, 1, args[0].shape[1], 1)
        return args, {**kwargs, "attention_mask": mean}

    model.model.layers[1].register_forward_pre_hook(tell, with_kwargs=True, prepend=True)
    with pytest.raises(ConfigurationError, match=r"block 1 .* an argument \(kwargs.attention_mask\) that depends on"):
        survey(model)


def test_numbers_that_are_not_finite_are_named() -> None:
    model = FAMILIES["llama"]().to(torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(60000.0)
    said = r"the output of model.layers.1 .* not finite: float16 ends at 65504; .* --model.dtype bfloat16"
    with pytest.raises(ConfigurationError, match=said):
        survey(model)


def test_whatever_a_model_raises_is_its_cause() -> None:
    model = FAMILIES["llama"]()

    def fail(*_: object) -> None:
        raise KeyError("no such thing")

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ConfigurationError, match="cannot be run on a few tokens: KeyError: 'no such thing'") as caught:
        survey(model)
    assert isinstance(caught.value.__cause__, KeyError)
