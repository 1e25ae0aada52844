"""Embedding and head as quantized weights outside of the blocks: rounded, kept, installed, trained, refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from lightning_gsq.cli import main
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import open_run
from lightning_gsq.models import loading
from lightning_gsq.models.chain import embed
from lightning_gsq.models.ends import find_ends, head_inputs
from lightning_gsq.run import blocks as blocks_module
from lightning_gsq.run import outer_weights as outer_module
from lightning_gsq.run.hidden_states import Stream
from lightning_gsq.run.outer_weights import round_rows, visiting
from lightning_gsq.run.substitution import outer_installed
from lightning_gsq.training import EndToEndOptions, EndToEndQuantization, ModelQuantization
from lightning_gsq.training.outer_options import OuterOptions
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.outer import EMBEDDING, HEAD
from tests.support.runs import block_files, summary_of, write_config
from tests.support.tiny import COMMON, FAMILIES, byte_tokenizer, random_model

SCHEME = QuantScheme(8, 32)
CPU = torch.device("cpu")


def _tied() -> LlamaConfig:
    return LlamaConfig(**COMMON, tie_word_embeddings=True)


def _rounded(network: torch.nn.Module, *names: str, bits: int = 4) -> dict[str, object]:
    scheme = QuantScheme(bits, 16)
    return {name: round_rows(network.get_parameter(name).data, scheme, None, torch.float16, CPU) for name in names}


def test_ends_of_tied_and_untied_models() -> None:
    assert find_ends(random_model(_tied())) == find_ends(random_model(_tied()))
    assert find_ends(random_model(_tied())).tied
    untied = find_ends(FAMILIES["llama"]())
    assert (untied.embedding, untied.head, untied.tied) == (EMBEDDING, HEAD, False)
    assert find_ends(FAMILIES["gpt2"]()).embedding == "transformer.wte.weight"


def test_what_is_on_the_grid_stays_as_it_is() -> None:
    codes = torch.randint(-127, 128, (10000, 32))
    codes[:, 0] = 127
    w_VD = codes * torch.rand(10000, 1).half().float()
    assert torch.equal(round_rows(w_VD, SCHEME, None, torch.float16, CPU).dequantize(), w_VD)


def test_columns_that_matter_are_rounded_better() -> None:
    w_VD, moments_D = torch.randn(500, 32), torch.ones(32)
    moments_D[3] = 1000
    plain, weighted = (
        (round_rows(w_VD, QuantScheme(3, 32), m, torch.float16, CPU).dequantize() - w_VD)[:, 3].square().mean()
        for m in (None, moments_D)
    )
    assert weighted < 0.5 * plain


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_blocks_that_visit_a_device_compute_what_they_did(family: str) -> None:
    network = FAMILIES[family]()
    from lightning_gsq.models.chain import find_blocks
    from lightning_gsq.models.standing_in import standing_in

    blocks, ids_BT = find_blocks(network)[1], torch.arange(9)[None]
    wanted = head_inputs(network, ids_BT)
    with standing_in({i: visiting(block, CPU) for i, block in enumerate(blocks)}, blocks):
        assert torch.equal(head_inputs(network, ids_BT), wanted)
    logits = network.get_output_embeddings()(wanted)
    assert torch.allclose(logits, network(ids_BT, use_cache=False).logits, atol=1e-5)


def test_installed_for_a_while_the_tied_head_goes_along() -> None:
    network, ids = random_model(_tied()), torch.arange(5)[None]
    before, outer = network(ids).logits, _rounded(network, EMBEDDING)
    with outer_installed(network, outer):  # type: ignore[arg-type]
        assert torch.equal(network.lm_head.weight, outer[EMBEDDING].dequantize())  # type: ignore[attr-defined]
        assert not torch.equal(network(ids).logits, before)
    assert torch.equal(network(ids).logits, before)


def test_refusals() -> None:
    tied, untied = random_model(_tied()), FAMILIES["llama"]()
    with pytest.raises(ConfigurationError, match=r"model\.head: .* tied to its embedding.*give model\.embedding"):
        OuterOptions(head=SCHEME).expected(tied)
    assert OuterOptions(SCHEME, SCHEME).expected(untied) == {EMBEDDING: (SCHEME, (258, 32)), HEAD: (SCHEME, (258, 32))}
    assert OuterOptions().expected(tied) == {}
    with pytest.raises(ConfigurationError, match=r"model\.embedding: salient weights"):
        OuterOptions(QuantScheme(1, 32, SalientPart()))
    with pytest.raises(ConfigurationError, match="q6_k holds rows of whole blocks of 256"):
        OuterOptions(QuantScheme(preset="q6_k")).expected(tied)
    with pytest.raises(ConfigurationError, match=r"model\.embedding: .*nonsense"):
        ModelQuantization("somewhere", embedding="nonsense")


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_student_has_them_and_the_teacher_does_not(tied: bool, trains: bool) -> None:
    network = random_model(_tied()) if tied else FAMILIES["llama"]()
    outer = _rounded(network, *([EMBEDDING] if tied else [EMBEDDING, HEAD]))
    options = EndToEndOptions(train=["norms", "embedding"] if trains else ["norms"])
    module = EndToEndQuantization(network, {}, options, outer=outer)  # type: ignore[arg-type]
    ids = torch.arange(12)[None]
    teacher, student = module.teacher_hidden(ids), module.student_hidden(ids)
    with outer_installed(network, outer):  # type: ignore[arg-type]
        torch.testing.assert_close(module.student_hidden(ids), student)
        assert torch.equal(embed(network, ids), embed(network, ids))
    assert not torch.equal(teacher, student)
    module.loss([ids])[0].backward()
    scales = [p for name, p in module.named_parameters() if name.startswith("outer.") and name.endswith("log_scale")]
    assert len(scales) == len(outer)
    for scale in scales:
        assert scale.requires_grad == trains
        assert not trains or float(scale.grad.abs().sum()) > 0  # type: ignore[union-attr]
    for name, tensor in module.outer_tensors().items():
        assert torch.equal(tensor.dequantize(), outer[name].dequantize())  # type: ignore[attr-defined]


def _run(folder: Path, corpus: Path, *options: str, **changes: object) -> int:
    source = folder.parent / f"{folder.name}-model"
    random_model(_tied()).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    changes = {
        "model__embedding": {"bits": 4, "group_size": 16},
        "model__phases": ["blocks"],
        "model__compile_blocks": False,
        **changes,
    }
    config = write_config(source, corpus, folder, trainer__max_steps=2, data__num_sequences=8, **changes)
    return main(["fit", "--config", str(config), *options])


def test_blocks_learn_on_the_quantized_embedding(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    original = blocks_module.fit_block

    def watched(run: Any, plan: Any, block: Any, quantized: Stream, full: Stream, *rest: Any) -> object:
        seen.append((quantized.hidden_NTD.clone(), full.hidden_NTD.clone()))
        return original(run, plan, block, quantized, full, *rest)

    monkeypatch.setattr(blocks_module, "fit_block", watched)
    folder = tmp_path / "one"
    assert _run(folder, corpus) == 0
    network = loading.load_model(loading.resolve(str(tmp_path / "one-model")))
    rows, near = seen[0][1].flatten(0, 1), network.get_input_embeddings().weight
    same = (rows[:5, None] == near[None]).all(-1)
    assert bool(same.any(1).all())  # the full-precision stream begins with its own rows
    assert not torch.equal(*seen[0])
    error = float((seen[0][0] - seen[0][1]).norm() / seen[0][1].norm())
    assert 0.01 < error < 0.2

    summary = summary_of(folder)
    size = (folder / "run/blocks/rounded-outer.safetensors").stat().st_size
    assert summary["bytes"]["outer"] == size
    assert summary["outer"][EMBEDDING]["bits_per_weight"] == 5.0
    assert summary["ledger"]["headers"]["rounded-outer.safetensors"] == size - 258 * 32 * 5 // 8
    assert summary["bits_per_weight"]["codes"] == 2.0
    assert set(summary["perplexity"]) == {"full_precision", "outer", "blocks"}

    # A block is made again from the stored embedding; a damaged file is named and made again.
    before = block_files(folder)
    (folder / "run/blocks/block-001.safetensors").unlink()
    assert _run(folder, corpus) == 0
    assert block_files(folder) == before
    (folder / "run/blocks/rounded-outer.safetensors").write_bytes(b"no")
    assert _run(folder, corpus) == 0
    assert "rounded-outer.safetensors cannot be used" in capsys.readouterr().out.replace("\n", "")
    assert block_files(folder) == before and (folder / "run/blocks/rounded-outer.safetensors").stat().st_size == size


@pytest.mark.parametrize(
    ("train", "embedding", "said"),
    [
        ("[scales,head]", {"bits": 4, "group_size": 16}, "name embedding instead"),
        ("[scales,embedding]", None, "give --model.embedding"),
    ],
)
def test_what_cannot_train_is_refused(
    tmp_path: Path, corpus: Path, train: str, embedding: object, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"model__embedding": embedding, "model__phases": ["init", "end_to_end"]}
    assert _run(tmp_path / "one", corpus, f"--end_to_end.train={train}", **changes) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_end_to_end_trains_the_scales_and_keeps_the_codes(tmp_path: Path, corpus: Path) -> None:
    from lightning_gsq.run.block_files import OUTER
    from lightning_gsq.run.folder import RunFolder

    folder = tmp_path / "one"
    changes = {"model__phases": ["init", "end_to_end"], "model__output_dtype": "float32"}
    assert _run(folder, corpus, "--end_to_end.train=[scales,embedding]", "--export=[native]", **changes) == 0
    run, expected = RunFolder(folder / "run"), {EMBEDDING: (QuantScheme(4, 16), (258, 32))}
    start, end = (run.read_block(kind, OUTER, expected)[EMBEDDING] for kind in ("rounded", "end_to_end"))
    assert torch.equal(start.codes_OI, end.codes_OI)  # type: ignore[attr-defined]
    assert not torch.equal(start.scales_OG, end.scales_OG)  # type: ignore[attr-defined]
    saved = loading.load_model(loading.resolve(str(folder / "run/model")))
    assert torch.equal(saved.get_input_embeddings().weight, end.dequantize())  # type: ignore[arg-type]
    report = json.loads((folder / "run/export/native/ledger.json").read_text())
    assert report["check"]["weights"][0] == report["check"]["weights"][1] == 15


@pytest.mark.parametrize(
    ("sizes", "scheme", "expected"),
    [
        ({"hidden_size": 64}, QuantScheme(3, 32), QuantScheme(8, 32)),
        ({"hidden_size": 64}, QuantScheme(preset="q4_0"), QuantScheme(preset="q8_0")),
        ({"hidden_size": 48}, QuantScheme(3, 16), None),
    ],
)
def test_an_embedding_has_eight_bits_by_itself_where_its_rows_are_whole_groups(
    sizes: dict[str, int], scheme: QuantScheme, expected: QuantScheme | None
) -> None:
    model = ModelQuantization("x", scheme=scheme, embedding="auto")
    network = random_model(LlamaConfig(**{**COMMON, **sizes}, tie_word_embeddings=True))
    assert [own for own, _ in model.outer.expected(network).values()] == ([] if expected is None else [expected])
    line = model.outer.left(network)
    assert (line is None) == (expected is not None)
    if line is not None:
        assert "model.embed_tokens.weight has rows of 48 weights, no whole groups of 32; kept at 16 bits" in line
    with pytest.raises(ConfigurationError, match="there is no preset 'auto'"):
        ModelQuantization("x", head="auto")


@pytest.mark.parametrize(("hidden_size", "quantized"), [(64, True), (48, False)])
def test_a_run_without_the_option(
    hidden_size: int, quantized: bool, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe's own setting: opened again, exported, and never refused."""
    network = random_model(LlamaConfig(**{**COMMON, "hidden_size": hidden_size}, tie_word_embeddings=True))
    network.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    changes = {"model__phases": ["init"], "model__scheme": {"bits": 4, "group_size": 16}, "model__embedding": "auto"}
    config = write_config(tmp_path / "model", corpus, tmp_path, **changes)
    formats = "[native,dequantized,compressed-tensors]"
    assert main(["fit", "--config", str(config), "--export", formats]) == 0
    assert ("kept at 16 bits" in capsys.readouterr().out.replace("\n", " ")) != quantized
    assert open_run(tmp_path / "run").outer == ([EMBEDDING] if quantized else [])


def test_a_head_that_is_not_called_is_no_obstacle_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: object) -> Tensor:
        raise ConfigurationError("does not call")

    lines: list[str] = []
    monkeypatch.setattr(outer_module, "head_moments", refuse)
    automatic, asked = (
        SimpleNamespace(model=ModelQuantization("x", embedding=embedding), say=lines.append)
        for embedding in ("auto", SCHEME)
    )
    assert outer_module._moments_if_known(automatic) is None  # type: ignore[arg-type]
    assert lines == ["note: all columns of the embedding count alike: does not call"]
    with pytest.raises(ConfigurationError):
        outer_module._moments_if_known(asked)  # type: ignore[arg-type]
