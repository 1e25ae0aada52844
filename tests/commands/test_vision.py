"""Models for more than text: the text decoder is quantized, everything else kept, the whole saved and exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lightning_gsq
from lightning_gsq.cli import main
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import format_of
from lightning_gsq.export.preflight import model_obstacle
from lightning_gsq.models import loading
from lightning_gsq.models.classes import outside_line, outside_of_text
from tests.support.exported import quantize
from tests.support.runs import write_config
from tests.support.scripts import script
from tests.support.tiny import byte_tokenizer

EXPORTED = {"llava": 28, "qwen2_5_vl": 28, "gemma3": 28}
"""Types whose whole way is taken here, with their linear weights."""
PROCESSOR = "preprocessor_config.json"


def saved(kind: str, folder: Path) -> Path:
    """A tiny random model of a type, with towers in half precision as published ones are."""
    script("sweep_decoders").build(kind).half().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / PROCESSOR).write_text('{"size": 30}')
    return folder


@pytest.mark.parametrize("kind", EXPORTED)
def test_the_whole_model_in_every_format_that_holds_it(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(kind, tmp_path / "model")
    formats = ["native", "dequantized", "compressed-tensors"]
    run = quantize(model, tmp_path / "run", 4, 16, export=formats, dtype="float32")
    assert len(run.weights) == EXPORTED[kind]
    assert all(".language_model." in name for name in run.weights)
    printed = capsys.readouterr().out
    assert "outside of the text decoder" in printed
    assert f"lightning-gsq export {tmp_path / 'run'}" not in printed  # every format that holds it was written
    for format_ in ("gguf", "gptq", "mlx"):
        assert f"{format_} is a file of a text decoder" in str(model_obstacle(format_of(format_), run))
    ids = torch.arange(2, 15)[None]
    wanted = run.reference(torch.bfloat16)(ids).logits.detach()
    for folder in ("model", *(f"export/{name}" for name in formats)):
        root = tmp_path / "run" / folder
        name = json.loads((root / "config.json").read_text())["architectures"][0]
        assert (root / PROCESSOR).read_text() == '{"size": 30}'
        loaded = getattr(transformers, name).from_pretrained(root, dtype=torch.float32)
        # Codes times scales, rounded to bfloat16 in two of the four.
        assert float((loaded(ids).logits.detach() - wanted).abs().max() / wanted.abs().max()) < 0.05
    again = lightning_gsq.load(tmp_path / "run" / "export" / "native")
    assert type(again).__name__ == name


def test_what_is_outside_of_the_decoder_keeps_every_bit(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved("llava", tmp_path / "model")
    config = write_config(model, corpus, tmp_path, trainer__max_steps=2, data__num_sequences=4)
    assert main(["fit", "--config", str(config), "--export", "[native]"]) == 0
    assert f"lightning-gsq export {tmp_path / 'run'} --format compressed-tensors\n" in capsys.readouterr().out
    before = load_file(model / "model.safetensors")
    towers = [name for name in before if not name.startswith("language_model.")]
    assert len(towers) > 60
    for folder in ("model", "export/native"):
        after = load_file(tmp_path / "run" / folder / "model.safetensors")
        assert all(torch.equal(after[name], before[name]) and after[name].dtype == torch.float16 for name in towers)
    decoder = load_file(tmp_path / "run/model/model.safetensors")["language_model.model.norm.weight"]
    assert decoder.dtype == torch.bfloat16


def test_gguf_is_refused_before_the_run(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(saved("llava", tmp_path / "model"), corpus, tmp_path)
    assert main(["fit", "--config", str(config), "--export", "[gguf]"]) == 2
    assert "gguf is a file of a text decoder" in capsys.readouterr().err
    assert main(["plan", "--config", str(config), "--probe", "false"]) == 0


def test_a_decoder_of_text_has_nothing_outside(tiny_llama: Path) -> None:
    model = loading.load_model(loading.resolve(str(tiny_llama)))
    assert outside_of_text(model) == [] and outside_line(model) is None


def test_a_model_without_a_decoder_of_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigurationError, match="a vit model, which transformers has no decoder of text for"):
        loading.load_config(loading.resolve(str(tmp_path), need_weights=False))
