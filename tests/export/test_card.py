"""Names from a run folder stay text in a model card, whatever they are made of."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from lightning_gsq.export import open_run
from lightning_gsq.export.card import as_code, as_text, licence_of, model_card
from lightning_gsq.export.formats import DequantizedFormat, NativeFormat
from lightning_gsq.weights.ledger import Ledger, LedgerEntry
from tests.support.finished import MakeRun

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "a\n# own heading\n\n<script>",
    "https://evil.example/x",
    "www.evil.example",
    "a | b `code` **bold**",
    "![x](http://evil.example/pixel.png)",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_text_has_no_markup_left(name: str) -> None:
    for text in (as_text(name), as_code(name)):
        assert "\n" not in text
        outside = "" if text.startswith("`") else text
        for sign in ("<", "[", "](", "`", "**", "://", "|"):
            assert sign not in outside
    assert as_text("SmolLM2-135M, 3 bit") == "SmolLM2-135M, 3 bit"
    assert as_code("org/model") == "`org/model`"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_card_with_hostile_names(new_run: MakeRun, name: str) -> None:
    run = open_run(new_run())
    run.model.address = dataclasses.replace(run.model.address, pretrained=name.replace("/", "∕"))
    run.recipe["versions"]["torch"] = name
    run.recipe["settings"]["data"]["source"]["init_args"]["path"] = name
    run.summary["perplexity"][name] = 3.5
    run.summary["perplexity"]["blocks"] = "text"
    card = model_card(run, NativeFormat(), Ledger((LedgerEntry("w", 8, codes=8),), {"model.safetensors": 0}), None)
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == 5
    for sign in ("<img", "<script", "](javascript", "](http://", "\nhttps://", "**bold"):
        assert sign not in text


def test_a_card_says_what_was_measured_and_how_it_was_made(new_run: MakeRun) -> None:
    run = open_run(new_run())
    Path(run.model.address.pretrained, "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    text_of_the_hub = {"class_path": "lightning_gsq.data.HuggingFaceDataset", "init_args": {"path": "someones/texts"}}
    run.recipe["settings"]["data"]["source"] = text_of_the_hub
    about = {"text": "TextFile wiki.raw", "windows": 24, "tokens": 1024, "starts_with_bos": False}
    run.summary["evaluation"] = {**about, "precision": "bf16-mixed", "digest": "abc123"}
    run.recipe["command"] = "lightning-gsq fit /home/someone/model --data '~/texts/my text.txt' --model.scheme.bits 3"
    card = model_card(run, NativeFormat(), Ledger((LedgerEntry("w", 8, codes=8),), {"model.safetensors": 0}), None)
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "mit"
    assert yaml.safe_load(front)["datasets"] == ["someones/texts"]
    assert "On TextFile wiki.raw, 24 windows of 1,024 tokens, bf16-mixed; digest of the tokens abc123." in text
    assert "\n\n    lightning-gsq fit model --data 'my text.txt' --model.scheme.bits 3\n\n" in text
    assert "someone" not in text
    assert "`pip install lightning-gsq`" in text
    assert "pip install lightning-gsq" not in model_card(run, DequantizedFormat(), Ledger(), None)


FRONTS = ["license: [a, b]", ": : :", "license: a b <c>", "license: 3"]


@pytest.mark.parametrize("content", ["no front matter", *(f"---\n{front}\n---\n" for front in FRONTS)])
def test_a_licence_that_is_not_plain_is_left_out(content: str, new_run: MakeRun) -> None:
    run = open_run(new_run())
    Path(run.model.address.pretrained, "README.md").write_text(content)
    assert licence_of(run) is None
