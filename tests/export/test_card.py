"""Names from a run folder stay text in a model card, whatever they are made of."""

import dataclasses

import pytest
import yaml

from lightning_gsq.export import open_run
from lightning_gsq.export.card import as_code, as_text, model_card
from lightning_gsq.export.formats import NativeFormat
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
