"""Whole runs with salient weights on a tiny model: files, sizes, resuming, choices."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lightning_gsq
from lightning_gsq.cli import main
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.packed.salient_linear import SageLinear
from lightning_gsq.run.block_files import stored_scheme
from lightning_gsq.run.folder import RunFolder

CALLBACKS = ("SaliencyThreshold", "GumbelAnnealing", "HardRounding", "QuantizationMonitor")


def _arguments(model: Path, corpus: Path, folder: Path, *further: str) -> list[str]:
    data = [f"--{name}.source=lightning_gsq.data.TextFile" for name in ("data", "evaluation")]
    paths = [f"--{name}.source.path={corpus}" for name in ("data", "evaluation")]
    callbacks = "[" + ", ".join(f"{{class_path: lightning_gsq.callbacks.{name}}}" for name in CALLBACKS) + "]"
    return [
        "fit",
        *(*data, *paths),
        f"--trainer.default_root_dir={folder}",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        f"--trainer.callbacks={callbacks}",
        f"--model.pretrained={model}",
        "--model.gumbel.backend=eager",
        "--model.compile_blocks=false",
        "--data.sequence_length=32",
        "--data.num_sequences=12",
        "--data.num_validation_sequences=4",
        "--data.batch_size=4",
        "--evaluation.sequence_length=32",
        "--evaluation.num_windows=2",
        *further,
    ]


def _summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize(
    "scheme",
    [
        "{bits: 1, group_size: 8, salient: {ratio: 0.1}}",
        "{bits: 1, group_size: 8, salient: {ratio: 0.1, bits: 3, score: error, scale_groups: 4, trained: false}}",
        "{bits: ternary, group_size: 8, salient: {score: hessian, scale_groups: graph}}",
        "{bits: 1, budget: 3.5}",
    ],
)
def test_trained_with_salient_columns(scheme: str, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = _arguments(tiny_llama, corpus, tmp_path, f"--model.scheme={scheme}")
    assert main(arguments) == 0
    summary = _summary(tmp_path)
    assert all(block["final"] <= block["start"] for block in summary["blocks"].values())
    assert len(summary["saliency"]) == 14
    assert summary["seconds_of_block"]["blocks"]["saliency"] > 0
    stored = [load_file(file) for file in sorted((tmp_path / "blocks").glob("block-*"))]
    bits = 8 * sum(part.nbytes for block in stored for part in block.values())
    weights = 2 * (4 * 32 * 32 - 2 * 32 * 16 + 3 * 32 * 48)
    assert summary["bits_per_weight"]["total"] == pytest.approx(bits / weights)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    # Everything is there: the same command trains nothing and finds the same result.
    (tmp_path / "summary.json").unlink()
    assert main(arguments) == 0
    assert _summary(tmp_path)["perplexity"] == summary["perplexity"]


def test_budget_is_kept(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    assert main(_arguments(tiny_llama, corpus, tmp_path, "--model.scheme={bits: 1, budget: 3.2}")) == 0
    total = _summary(tmp_path)["bits_per_weight"]["total"]
    assert 3.0 < total <= 3.2


def test_published_layout_counts_every_position(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    scheme = "{bits: 1, salient: {layout: element, bits: 4, ratio: 0.05, scale_groups: 4}}"
    assert main(_arguments(tiny_llama, corpus, tmp_path, f"--model.scheme={scheme}", "--model.phases=[init]")) == 0
    summary = _summary(tmp_path)
    assert summary["bits_per_weight"]["codes"] == pytest.approx(1.15, rel=0.05)
    assert summary["bits_per_weight"]["positions"] > 0.95 * 2
    files = [load_file(file) for file in (tmp_path / "blocks").glob("warm_start-*")]
    weights = 2 * (4 * 32 * 32 - 2 * 32 * 16 + 3 * 32 * 48)
    bits = 8 * sum(part.nbytes for block in files for part in block.values())
    assert summary["bits_per_weight"]["total"] == pytest.approx(bits / weights)


def test_published_layout_is_not_trained(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_arguments(tiny_llama, corpus, tmp_path, "--model.scheme={bits: 1, salient: {layout: element}}")) == 2
    assert "--model.phases [init], or structured" in capsys.readouterr().err


def test_salient_weights_need_no_callback(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    scheme = "--model.scheme={bits: 1, salient: {ratio: 0.1}}"
    for name, extra in (("with", []), ("without", ["--trainer.callbacks=null"])):
        assert main([*_arguments(tiny_llama, corpus, tmp_path / name, scheme, "--model.phases=[init]"), *extra]) == 0
    one, other = (_summary(tmp_path / name)["saliency"] for name in ("with", "without"))
    assert one == other and len(one) == 14


def test_options_on_the_command_line(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    own = ["--model.scheme.bits=1", "--model.scheme.salient.ratio=0.1", "--model.scheme.salient.bits=3"]
    overrides = "--model.overrides={'*.down_proj': {salient: {ratio: 0.3, bits: 2}}}"
    assert main(_arguments(tiny_llama, corpus, tmp_path, *own, overrides, "--model.phases=[init]")) == 0
    chosen = _summary(tmp_path)["saliency"]
    assert chosen["model.layers.0.mlp.down_proj.weight"]["bits"] == 2
    assert chosen["model.layers.0.mlp.down_proj.weight"]["ratio"] == pytest.approx(14 / 48)
    assert chosen["model.layers.1.self_attn.q_proj.weight"]["bits"] == 3


def test_experts_share_their_salient_columns(corpus: Path, tmp_path: Path) -> None:
    from tests.support.tiny import save_tiny_model

    model = save_tiny_model("qwen3_moe", tmp_path / "moe")
    scheme = "--model.scheme={bits: 1, group_size: 8, salient: {ratio: 0.2, bits: 3}}"
    assert main(_arguments(model, corpus, tmp_path / "run", scheme, "--model.blocks=0:1")) == 0
    folder = RunFolder(tmp_path / "run")
    assert all(block["final"] <= block["start"] for block in _summary(folder.root)["blocks"].values())


def test_block_file_says_what_was_chosen(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    assert main(_arguments(tiny_llama, corpus, tmp_path, "--model.scheme={bits: 1, budget: 3.5}")) == 0
    with safe_open(tmp_path / "blocks" / "block-000.safetensors", framework="pt") as content:
        layout = json.loads(content.metadata()["layout"])
    for weight in layout.values():
        scheme = stored_scheme(weight)
        assert scheme.settled and scheme.salient is not None and scheme.salient.ratio is not None


@pytest.mark.parametrize(
    "scheme",
    [
        "{bits: 1, group_size: 8, salient: {ratio: 0.1, bits: 3, scale_groups: 4}}",
        "{bits: ternary, group_size: 8, salient: {ratio: 0.1, group_size: 2}}",
        "{bits: 1, salient: {layout: element, bits: 4, ratio: 0.05, scale_groups: 4}}",
        "{bits: 1, budget: 3.5}",
    ],
)
def test_native_holds_salient_weights(scheme: str, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = ["--model.phases=[init]", f"--model.scheme={scheme}", "--export=[native]"]
    assert main(_arguments(tiny_llama, corpus, tmp_path, *arguments)) == 0
    folder = tmp_path / "export" / "native"
    ledger = json.loads((folder / "ledger.json").read_text())["ledger"]
    assert ledger["bytes"]["total"] == (folder / "model.safetensors").stat().st_size
    assert ledger["bytes"]["positions"] > 0
    exact = lightning_gsq.load(folder, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(exact(ids).logits, dense(ids).logits, rtol=0.05, atol=0.05)
    model = lightning_gsq.load(folder)
    layers = [module for module in model.modules() if isinstance(module, SageLinear)]
    assert len(layers) == 14 and layers[0].weight.dtype == torch.bfloat16 and "SageLinear" in repr(model)
    assert model(ids).logits.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "again")
    again = [module for module in lightning_gsq.load(tmp_path / "again").modules() if isinstance(module, SageLinear)]
    for first, second in zip(layers, again, strict=True):
        assert all(torch.equal(part, second.parts[name]) for name, part in first.parts.items())


def test_damaged_salient_parts_are_refused(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    scheme = "{bits: 1, group_size: 8, salient: {ratio: 0.1, bits: 3, scale_groups: 4}}"
    run = tmp_path / "run"
    arguments = ["--model.phases=[init]", f"--model.scheme={scheme}", "--export=[native]"]
    assert main(_arguments(tiny_llama, corpus, run, *arguments)) == 0
    file = run / "export" / "native" / "model.safetensors"
    stored = load_file(file)
    stem = "model.layers.0.mlp.up_proj"
    damages = {
        "columns": torch.full_like(stored[f"{stem}.columns"], -1),
        "table": torch.full_like(stored[f"{stem}.table"], torch.inf),
        "members": stored[f"{stem}.members"][:, :-1],
        "codes": stored[f"{stem}.codes"][:-1],
        "salient_codes": stored[f"{stem}.salient_codes"].float(),
    }
    for part, damaged in damages.items():
        save_file({**stored, f"{stem}.{part}": damaged.contiguous()}, file, metadata={"format": "pt"})
        with pytest.raises(ConfigurationError, match="up_proj"):
            lightning_gsq.load(file.parent)
    save_file({name: part for name, part in stored.items() if not name.endswith("up_proj.table")}, file)
    with pytest.raises(ConfigurationError):
        lightning_gsq.load(file.parent)
