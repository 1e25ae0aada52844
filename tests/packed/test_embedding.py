"""Packed embeddings and the heads that are tied to them."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.packed.embedding import QuantEmbedding, TiedHead, is_packable_embedding
from lightning_gsq.quantizers import RTN
from lightning_gsq.quantizers.warm_start import quantized
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme

ROWS, WIDTH = 20, 256
SITE = LinearSite("weight", 0, ROWS, WIDTH, transposed=False)


def _table(scheme: QuantScheme, original: nn.Embedding | None = None) -> tuple[QuantEmbedding, QuantizedTensor]:
    tensor = quantized(RTN()(torch.randn(ROWS, WIDTH), None, scheme), scheme, torch.float16)
    table = QuantEmbedding(scheme, SITE, original or nn.Embedding(ROWS, WIDTH), dtype=torch.float32)
    return table.fill(tensor), tensor


@pytest.mark.parametrize("preset", ["w8g32", "w3g40", "q4_k", "mlx4g64"])
def test_rows_are_those_of_the_dense_table(preset: str) -> None:
    table, tensor = _table(QuantScheme(preset=preset))
    ids = torch.tensor([[3, 0, 19], [7, 7, 1]])
    assert torch.equal(table(ids), tensor.dequantize()[ids])
    assert table(ids[:, :0]).shape == (2, 0, WIDTH)
    assert torch.equal(table.weight, tensor.dequantize())


@pytest.mark.parametrize("preset", ["w8g32", "q4_k"])
def test_a_tied_head_multiplies_with_the_tables_codes(preset: str) -> None:
    table, tensor = _table(QuantScheme(preset=preset))
    head = TiedHead(table, nn.Parameter(torch.randn(ROWS), requires_grad=False))
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(head(x), nn.functional.linear(x, tensor.dequantize(), head.bias), rtol=1e-4, atol=1e-4)
    assert list(head.state_dict()) == ["bias"]
    assert torch.equal(head.weight, table.weight)


def test_a_copied_model_has_a_head_of_its_own_table() -> None:
    table, _ = _table(QuantScheme(8, 32))
    model = nn.ModuleDict({"table": table, "head": TiedHead(table)})
    other = copy.deepcopy(model)
    other["table"].codes.zero_()
    x = torch.randn(1, WIDTH)
    assert not torch.equal(model["head"](x), other["head"](x))
    assert torch.equal(other["head"].weight, other["table"].weight)


def test_casting_leaves_the_scales_and_changes_what_is_looked_up() -> None:
    table, tensor = _table(QuantScheme(4, 32))
    table.to(torch.bfloat16)
    assert table.scales.dtype == torch.float16
    assert torch.equal(table(torch.arange(ROWS)), tensor.dequantize(torch.bfloat16))


def test_a_factor_is_rounded_like_the_embeddings_that_it_comes_from() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    original = Gemma3TextScaledWordEmbedding(ROWS, WIDTH, 0, embed_scale=WIDTH**0.5 + 0.1).to(torch.bfloat16)
    table, tensor = _table(QuantScheme(8, 32), original)
    original.weight.data = tensor.dequantize(torch.bfloat16)
    ids = torch.arange(ROWS)[None]
    assert torch.equal(table.to(torch.bfloat16)(ids), original(ids))


def test_embeddings_that_do_more_have_no_packed_form() -> None:
    class Other(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    assert is_packable_embedding(nn.Embedding(2, 3))
    assert not is_packable_embedding(Other(2, 3))
    assert not is_packable_embedding(nn.Linear(2, 3))


def test_a_loaded_tied_model_moves_compiles_and_saves(tmp_path_factory: pytest.TempPathFactory) -> None:
    from lightning_gsq.export import ExportOptions, format_of
    from lightning_gsq.export.engine import export_run
    from lightning_gsq.packed.load import load
    from lightning_gsq.system.console import make_console
    from tests.support.outer import EMBEDDING, outer_run

    root = tmp_path_factory.mktemp("tied")
    run = outer_run(root, "tied", embedding={"bits": 8, "group_size": 32})
    export_run(run, [format_of("native")], root, ExportOptions(), False, False, make_console(quiet=True))
    model = load(root / "native", dtype=torch.float32)
    assert isinstance(model.lm_head, TiedHead) and isinstance(model.model.embed_tokens, QuantEmbedding)
    assert not any(name.startswith("lm_head") for name in model.state_dict())
    assert torch.equal(model.model.embed_tokens.weight, run.dense(EMBEDDING, torch.float32))
    ids = torch.tensor([[1, 2, 3]])
    wanted = model(ids).logits
    assert torch.equal(copy.deepcopy(model)(ids).logits, wanted)
    model.tie_weights()
    assert torch.equal(model(ids).logits, wanted)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, wanted)
    model.save_pretrained(tmp_path := root / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(ids).logits, wanted)
    assert again.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 6)
