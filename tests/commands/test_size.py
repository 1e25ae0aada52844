"""A size in place of a width: choices within it to the byte, kept, given back, resumed, refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig

from lightning_gsq.cli import main
from lightning_gsq.export import open_run
from tests.support.exported import SHAPE, quantize, save_model
from tests.support.processes import start_process
from tests.support.runs import block_files, write_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks whose rows are multiples of 128, an embedding and a head."""
    return save_model(tmp_path_factory.mktemp("model"), LlamaConfig(**SHAPE))


def _bytes(folder: Path, format_: str) -> int:
    files = (folder / "export" / format_).glob("*.gguf" if format_ == "gguf" else "*.safetensors")
    return sum(file.stat().st_size for file in files)


@pytest.mark.parametrize(
    ("format_", "choices", "size", "least"),
    [
        ("native", ["w2g64", "w3g64", "w4g64", "w6g64"], "200kB", 0.995),
        ("gguf", ["q2_0", "q4_0", "q5_0", "q8_0"], "230kB", 0.995),
        ("native", ["q4_0", "w3g32", "mlx6g64"], "4.9bpw", 0.995),
        ("native", ["w1g64s10", "w1g64s25b3", "wtg128s5", "w3g64", "w5g64"], "157kB", 0.97),  # names weigh as well
    ],
)
def test_the_file_is_as_large_as_was_asked_for(
    model: Path, tmp_path: Path, format_: str, choices: list[str], size: str, least: float
) -> None:
    run = quantize(model, tmp_path / "run", 3, 64, size=size, choices=choices, export=[format_])
    choice = run.recipe["choice"]
    written = _bytes(tmp_path / "run", format_)
    assert written == choice["num_bytes"]
    assert least * choice["limit"] <= written <= choice["limit"]
    assert len(set(choice["widths"].values())) > 1
    assert set(choice["widths"]) == set(run.weights)
    card = tmp_path / "run" / "export" / format_
    assert (card / "widths.png").stat().st_size > 1000
    assert "## Widths" in (card / "README.md").read_text()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert "widths" in events.Tags()["images"]
    assert {name: str(run.weights[name].scheme) for name in run.outer}.keys() >= {"model.embed_tokens.weight"}


def _fit(folder: Path, model: Path, corpus: Path, *arguments: str, **changes: object) -> int:
    config = write_config(model, corpus, folder, **changes)
    return main(["fit", "--config", str(config), *arguments])


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_was_asked_to_stay_has_no_choice(tmp_path: Path, tied: bool) -> None:
    """It was chosen for like every matrix, though ``null`` says 16 bits."""
    model = save_model(tmp_path / "model", LlamaConfig(**{**SHAPE, "tie_word_embeddings": tied}))
    choices = ["w2g64", "w3g64", "w4g64", "w6g64"]
    run = quantize(model, tmp_path / "run", 3, 64, size="300kB", choices=choices, embedding=None)
    chosen = set(run.recipe["choice"]["widths"])
    assert "model.embed_tokens.weight" not in chosen | set(run.weights)
    assert ("lm_head.weight" in chosen) != tied


def test_a_run_stopped_and_resumed_is_the_same_to_the_bit(
    tiny_llama: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_gsq.commands import sizing

    choices: dict[str, object] = {"model__size": "32kB", "model__choices": ["w2g16", "w4g16", "w8g16"]}
    assert _fit(tmp_path / "whole", tiny_llama, corpus, **choices) == 0
    assert _fit(tmp_path / "parts", tiny_llama, corpus, **choices, model__phases=["init"]) == 0
    # From here on nothing may be measured or chosen again: the recipe has the choice.
    monkeypatch.setattr(sizing, "measure_worth", None)
    monkeypatch.setattr(sizing, "decide", None)
    (tmp_path / "parts" / "run" / "choice.yaml").unlink()
    assert _fit(tmp_path / "parts", tiny_llama, corpus, **choices) == 0
    assert block_files(tmp_path / "parts") == block_files(tmp_path / "whole")
    assert block_files(tmp_path / "parts", "rounded") == block_files(tmp_path / "whole", "rounded")
    texts = [(tmp_path / name / "run" / "choice.yaml").read_text() for name in ("parts", "whole")]
    assert texts[0] == texts[1]
    capsys.readouterr()
    assert _fit(tmp_path / "parts", tiny_llama, corpus, **{**choices, "model__size": "31kB"}) == 2
    assert "--model.size: the run has '32kB', asked for '31kB'" in capsys.readouterr().err


def test_an_edited_choice_is_given_back_as_overrides(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choices: dict[str, object] = {"model__size": "32kB", "model__choices": ["w2g16", "w4g16", "w8g16"]}
    changes: dict[str, object] = {"model__phases": ["init"], **choices}
    assert _fit(tmp_path / "first", tiny_llama, corpus, **changes) == 0
    file = tmp_path / "first" / "run" / "choice.yaml"
    widths = yaml.safe_load(file.read_text())
    widths["model.layers.1.mlp.down_proj.weight"] = "w5g32"
    widths["model.embed_tokens.weight"] = "w3g16"
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    file.write_text("\n".join([*header, yaml.safe_dump(widths, sort_keys=False)]))
    capsys.readouterr()
    assert _fit(tmp_path / "first", tiny_llama, corpus, **changes) == 2
    assert "was edited" in capsys.readouterr().err
    arguments = ["--model.overrides", str(file)]
    assert _fit(tmp_path / "second", tiny_llama, corpus, *arguments, model__phases=["init"]) == 0
    run = open_run(tmp_path / "second" / "run")
    assert {name: (w.scheme.bits, w.scheme.group_size) for name, w in run.weights.items()} == {
        name: (int(width[1]), int(width[3:])) for name, width in widths.items()
    }


def test_plan_chooses_what_fit_then_takes(
    tiny_llama: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_gsq.commands import sizing

    changes: dict[str, object] = {
        "model__phases": ["init"], "model__size": "8.5bpw", "model__choices": ["w2g16", "w4g16", "w8g16"],
        "model__overrides": {"*.v_proj": "w8g16"}, "model__exclude": ["lm_head"],
    }  # fmt: skip
    config = write_config(tiny_llama, corpus, tmp_path, **changes)
    assert main(["plan", "--config", str(config), "--probe", "false"]) == 0
    told = capsys.readouterr().out
    assert "Widths for 8.5bpw as native" in told and "not estimated: --probe false" in told
    planned = yaml.safe_load((tmp_path / "run" / "choice.yaml").read_text())
    assert not any("v_proj" in name or "lm_head" in name for name in planned)
    monkeypatch.setattr(sizing, "measure_worth", None)  # kept in worth.json
    assert main(["fit", "--config", str(config)]) == 0
    run = open_run(tmp_path / "run")
    assert run.recipe["choice"]["widths"] == planned
    assert run.weights["model.layers.0.self_attn.v_proj.weight"].scheme.bits == 8
    assert "lm_head.weight" not in run.weights
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["scheme"]["name"] == "mixed widths within 8.5bpw"


REFUSALS = {
    "unparsable": ({"size": "80"}, "model.size must be a number above 0 with a unit"),
    "above 16 bits": ({"size": "17bpw"}, "more than the 16 of the original"),
    "below the least": ({"size": "12kB"}, r"the narrowest of w2g16, w4g16 take [\d,]+; give at least \d+\.\d+kB"),
    "above the most": ({"size": "15bpw"}, "the widest of w2g16, w4g16 fill"),
    "one choice": ({"choices": ["w2g16"]}, "model.choices must name two presets or more"),
    "no such preset": ({"choices": ["w2g16", "q9_k"]}, "model.choices: there is no preset 'q9_k'"),
    "rows": ({"choices": ["q2_k", "q3_k"]}, "q2_k holds rows of whole blocks of 256 weights"),
    "a pin": ({"overrides": {"*.mlp.*": "w8g16"}, "size": "22kB"}, r"for 6 pinned matrices, such as .*\(w8g16\)"),
    "no size": ({"size": None}, "are for --model.size"),
    "a budget": ({"scheme": {"bits": 1, "budget": 1.5}}, "both say what matrices cost"),
    "a preset": ({"scheme": "q4_0"}, "one of model.choices, and model.scheme q4_0 one to all"),
    "all pinned": ({"overrides": {"*": "w4g16"}, "embedding": "w4g16", "head": "w4g16"}, "nothing is left to choose"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_is_refused_before_any_work(
    case: str, tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, message = REFUSALS[case]
    settings = {"size": "32kB", "choices": ["w2g16", "w4g16"], **settings}
    assert _fit(tmp_path, tiny_llama, corpus, **{f"model__{name}": value for name, value in settings.items()}) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "run" / "worth.json").exists()


def test_choices_that_the_runtime_lacks_and_exports_without_a_size_are_refused(
    model: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, object] = {"model__size": "200kB", "model__choices": ["q4_0", "w3g64"]}
    assert _fit(tmp_path, model, corpus, "--export", "[gguf]", **changes) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "model.choices: gguf holds w3g64 as Q4_0, 4.5 bits a weight instead of 3.25; choose among " in error
    assert "w1g128, w2g64, w4g32, w5g32, w8g32 and ggml's own types" in error
    changes["model__choices"] = ["q4_0", "mlx6g64"]
    assert _fit(tmp_path, model, corpus, "--export", "[gguf]", **changes) == 2
    assert "gguf has no type that holds mlx6g64" in capsys.readouterr().err
    changes["model__choices"] = ["q4_0", "w1g64s10"]
    assert _fit(tmp_path, model, corpus, "--export", "[gguf]", **changes) == 2
    assert "model.choices: gguf has no salient columns, as w1g64s10 has" in capsys.readouterr().err
    changes["model__choices"] = ["w1g64s10", "w1g64s25"]
    assert _fit(tmp_path, model, corpus, **changes) == 2
    assert "salient columns are for plain matrices in the blocks, and model.embed_tokens" in capsys.readouterr().err
    assert _fit(tmp_path, model, corpus, "--export", "[dequantized]", **changes) == 2
    assert "counts the bytes of a gguf or a native file" in capsys.readouterr().err


PINS: dict[str, object] = {"overrides": {"*.v_proj": "w3g64"}, "embedding": "w4g64", "head": "mlx6g64"}
"""One of each kind, none of which a GGUF file holds in as many bits."""


def test_pins_that_the_file_holds_in_more_bits_are_counted_so_and_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = ["q2_0", "q4_0", "q5_0", "q8_0"]
    run = quantize(model, tmp_path / "run", 3, 64, size="230kB", choices=choices, export=["gguf"], **PINS)
    told = " ".join(capsys.readouterr().out.split())
    assert "note: gguf holds w3g64 as Q4_0, 4.5 bits a weight instead of 3.25; choose among " in told
    assert "model.layers.0.self_attn.v_proj.weight and 1 more stay as pinned, and count in the size as they are" in told
    assert "note: gguf holds w4g64 as Q4_0, 4.5 bits a weight instead of 4.25; choose among " in told
    assert "rounded anew, gguf holds mlx6g64 as Q8_0, 8.5 bits a weight instead of 6.5" in told
    choice = run.recipe["choice"]
    assert _bytes(tmp_path / "run", "gguf") == choice["num_bytes"] <= choice["limit"]
    assert not any("v_proj" in name or "embed" in name or "head" in name for name in choice["widths"])


def test_pins_that_leave_too_little_are_said_to_take_what_the_file_takes(
    model: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pins = {f"model__{name}": value for name, value in PINS.items()}
    changes: dict[str, object] = {"model__size": "100kB", "model__choices": ["q4_0", "q8_0"], **pins}
    assert _fit(tmp_path, model, corpus, "--export", "[gguf]", **changes) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(r"for 4 pinned matrices, such as .* pin less .*; gguf holds w3g64 as Q4_0, 4.5 bits", error), error


def test_rows_that_a_type_does_not_hold_take_the_fallback(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    changes: dict[str, object] = {"model__size": "9bpw", "model__choices": ["q2_k", "q6_k"], "model__fallback": True}
    excluded = ["*.down_proj"]  # rows of 48 are no blocks of 32
    assert _fit(tmp_path, tiny_llama, corpus, model__phases=["init"], model__exclude=excluded, **changes) == 0
    widths = open_run(tmp_path / "run").recipe["choice"]["widths"]
    assert set(widths.values()) <= {"q4_0", "q8_0"}


def test_of_several_processes_the_first_one_chooses(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    choices: dict[str, object] = {"model__size": "32kB", "model__choices": ["w2g16", "w4g16", "w8g16"]}
    config = write_config(tiny_llama, corpus, tmp_path, model__phases=["init"], **choices)
    launcher = "torch.distributed.run --standalone --nproc-per-node 2 -m lightning_gsq"
    arguments = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    run = start_process("fit", "--config", str(config), *arguments, module=launcher)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert output.count("what each of") == 1, "one process alone measures"
    widths = yaml.safe_load((tmp_path / "run" / "choice.yaml").read_text())
    assert open_run(tmp_path / "run").recipe["choice"]["widths"] == widths
