"""The face of the package for scripts: what is public, what it gives, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_gsq.callbacks import GumbelAnnealing, HardRounding
from lightning_gsq.data import Texts, TextSource
from transformers import PreTrainedModel

import lightning_gsq
from lightning_gsq import Quantized, QuantScheme, prepare_block, quantize
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.quantizers import GPTQ, GumbelOptions
from tests.support.tiny import FAMILIES

SMALL: dict[str, Any] = {
    "trainer.accelerator": "cpu",
    "trainer.logger": False,
    "model.compile_blocks": False,
    "model.gumbel.backend": "eager",
    "model.phases": ["init", "blocks"],
    "data.sequence_length": 32,
    "data.num_sequences": 8,
    "data.num_validation_sequences": 2,
    "evaluation.sequence_length": 32,
    "evaluation.num_windows": 2,
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [f"Line {i}: the square of {i} is {i * i}, and its cube is {i**3}." for i in range(400)]


def test_public_names_are_there() -> None:
    assert set(lightning_gsq.__all__) <= set(dir(lightning_gsq))
    for name in lightning_gsq.__all__:
        assert getattr(lightning_gsq, name) is not None
    page = (Path(__file__).parents[1] / "docs" / "library.md").read_text()
    missing = [n for n in lightning_gsq.__all__ if n != "__version__" and f"lightning_gsq.{n}`" not in page]
    assert missing == []


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        lightning_gsq.quantise  # noqa: B018


def test_quantize_and_open_again(tiny_llama: Path, texts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = quantize(tiny_llama, QuantScheme(3, 16), texts, Texts(texts), folder, SMALL, quiet=True)
    assert set(result.perplexity) == {"full_precision", "outer", "warm_start", "blocks"}
    assert result.ledger["bits_per_quantized_weight"] >= 3
    assert isinstance(result.model, PreTrainedModel)
    again = quantize(tiny_llama, {"bits": 3, "group_size": 16}, texts, Texts(texts), folder, SMALL, quiet=True)
    assert again.summary["seconds_of"]["blocks"] == result.summary["seconds_of"]["blocks"]
    saved = Quantized(folder).save("native")
    assert saved == folder / "export" / "native"
    with pytest.raises(ConfigurationError, match=r"exists; use overwrite=True to replace it, or another folder$"):
        result.save("native")
    assert lightning_gsq.load(folder, device="cpu").config._name_or_path == str(saved)  # the run, by its export
    loaded = lightning_gsq.load(saved)
    ids = torch.arange(10)[None]
    assert torch.allclose(loaded(ids).logits.float(), result.model(ids).logits.float(), atol=0.05)


class Numbers(TextSource):
    def documents(self) -> Any:
        yield from (3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "model: expected a path or a name, got 3"),
        ({"model": "/no/such/model"}, "there is no file or folder /no/such/model"),
        ({"scheme": "w9g64"}, "there is no preset 'w9g64'"),
        ({"scheme": "file"}, "model.scheme: file takes every weight's type from a GGUF file"),
        ({"scheme": {"preset": "file"}}, "model.scheme: file takes every weight's type from a GGUF file"),
        ({"scheme": 3}, "scheme: expected a QuantScheme, a name such as 'w3g64'"),
        ({"scheme": {"bit": 3}}, "bit"),
        ({"text": "a text\nof two lines"}, "text: got a text itself"),
        ({"text": []}, "texts: expected a list of documents, got an empty list"),
        ({"text": 3}, "text: expected a path, a name on the hub, a list of documents or a TextSource, got int"),
        ({"text": Numbers()}, "Numbers.documents() must yield str or list of messages, got int"),
        ({"folder": ""}, "folder: expected a path or a name"),
        ({"options": {"bits": 3}}, "there is no option --bits; did you mean --model.scheme.bits?"),
        ({"options": {"data.num_sequences": "many"}}, "data.num_sequences: expected a whole number, got 'many'"),
        ({"options": {"data.num_sequences": 0}}, "data.num_sequences must be at least 1, got 0"),
        ({"options": ["a"]}, "options: expected option names and values"),
        ({"options": {"trainer.callbacks": [GumbelAnnealing()]}}, "is no plain data"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": tiny_llama, "text": corpus, "folder": tmp_path / "run", "quiet": True}
    given |= arguments
    given["options"] = given.get("options") and (
        {**SMALL, **arguments["options"]} if isinstance(arguments["options"], dict) else arguments["options"]
    )
    with pytest.raises(ConfigurationError) as error:
        quantize(**({"options": SMALL} | {k: v for k, v in given.items() if v is not None}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").glob("blocks/*"))


def test_a_model_in_memory_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigurationError, match="save_pretrained"):
        quantize(FAMILIES["llama"]())  # type: ignore[arg-type]


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no finished run"):
        Quantized(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma2"])
def test_one_block_of_many_families(family: str) -> None:
    from lightning.pytorch import Trainer

    network, ids = FAMILIES[family](), torch.randint(0, 200, (10, 24))
    eager = GumbelOptions(backend="eager")
    block = prepare_block(network, 1, ids, QuantScheme(2, 16), warm_start=GPTQ(), gumbel=eager, held_out=2)
    rounding = HardRounding(max_gap=None)
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[GumbelAnnealing(), rounding],
    )
    trainer.fit(block.module, block.batches, block.held_out)
    assert 0 < float(trainer.callback_metrics["block/val_loss_hard"]) < 1
    tensors = block.quantized()
    assert set(tensors) == {site.name for site in block.module.sites}
    assert all(tensor.scheme == QuantScheme(2, 16) for tensor in tensors.values())


def test_the_prepared_block_gives_the_model_s_own_output() -> None:
    """At 8 bits the block's error is next to nothing: inputs and targets belong together."""
    network, ids = FAMILIES["llama"](), torch.randint(0, 200, (4, 24))
    block = prepare_block(network, 1, ids, "w8g16", held_out=1)
    (batch,) = list(block.held_out or [])
    error = float(block.module.loss(batch, block.module.start_weights()))
    assert 0 < error < 1e-3
    with torch.no_grad():
        hidden = network(ids[3:], output_hidden_states=True).hidden_states
    assert torch.allclose(batch[0], hidden[1].float(), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "a/path"}, "network: expected a model"),
        ({"index": 2}, "index: LlamaForCausalLM has blocks 0 to 1, got 2"),
        ({"ids_NT": torch.zeros(3)}, r"ids_NT: expected token ids, int64 of shape .*got torch.float32 \(3,\)"),
        ({"ids_NT": [[1, 2]]}, "ids_NT: expected token ids.*got list"),
        ({"ids_NT": torch.full((4, 8), 9999)}, "ids_NT: the model embeds ids 0 to 257, got 9999"),
        ({"held_out": 4}, "held_out: of 4 sequences in ids_NT some have to train; hold out 0 to 3, got 4"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"scheme": 3}, "scheme: expected a QuantScheme"),
        ({"scheme": {"bit": 3}}, "scheme: .*bit"),
        ({"warm_start": GPTQ}, r"warm_start: expected a WarmStart such as RTN\(\)"),
    ],
    ids=str,
)
def test_one_block_of_bad_input(arguments: dict[str, Any], message: str) -> None:
    given = {"network": FAMILIES["llama"](), "index": 0, "ids_NT": torch.zeros(4, 8, dtype=torch.long), **arguments}
    with pytest.raises(ConfigurationError, match=message):
        prepare_block(**given)
