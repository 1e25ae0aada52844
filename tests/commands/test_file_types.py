"""``--model.scheme file``: every weight as the GGUF file has it, mixed types included."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lightning_gsq.cli import main
from lightning_gsq.commands.file_types import patterns, types_of_file
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.contract import ExportOptions
from lightning_gsq.export.formats.gguf import FILE, GGUFFormat
from lightning_gsq.gguf.file import BLOCK_SIZES, GGUFFile
from lightning_gsq.gguf.types.table import TYPES
from lightning_gsq.gguf.write import NewTensor, write_gguf
from lightning_gsq.quantizers import FromFile
from tests.support.exported import quantize, save_model
from tests.support.runs import write_config
from tests.support.tiny import save_tiny_model

OVERRIDES = {"*.down_proj": "q4_k", "model.layers.1.self_attn.v_proj": "q8_0"}
MXFP4 = 39


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` and ``small.gguf``: Q4_0, some Q4_K, one Q8_0, k_proj in F16."""
    folder = tmp_path_factory.mktemp("mixed")
    model = save_model(folder / "model")
    run = quantize(model, folder / "run", 3, 64, scheme="q4_0", overrides=OVERRIDES, exclude=["*.k_proj"])
    GGUFFormat().write(run, folder, ExportOptions(gguf_embedding="Q8_0"))
    (folder / FILE).rename(folder / "small.gguf")
    return folder


def start(file: Path) -> dict[str, Any]:
    return {"class_path": "lightning_gsq.quantizers.FromFile", "init_args": {"file": str(file)}}


def settings(mixed: Path, **changes: Any) -> dict[str, Any]:
    """Settings of the model as ``fit`` resolves them."""
    return {
        "pretrained": str(mixed / "model"),
        "revision": None,
        "trust_remote_code": False,
        "dtype": "auto",
        "size": None,
        "include": ["*"],
        "exclude": [],
        "overrides": {},
        "blocks": None,
        "fallback": False,
        "warm_start": start(mixed / "small.gguf"),
        **changes,
    }


def with_type(file: Path, folder: Path, tensor: str, number: int) -> Path:
    """The file with a tensor in another type, its content zeros."""
    source = GGUFFile(file)
    shapes = {name: (stored.shape, stored.number) for name, stored in source.tensors.items()}
    shapes[tensor] = (shapes[tensor][0], number)
    tensors = []
    for name, (shape, kind) in shapes.items():
        length, size = BLOCK_SIZES[kind]
        zeros = np.zeros(int(np.prod(shape)) // length * size, np.uint8)
        tensors.append(NewTensor(name, shape, kind, lambda zeros=zeros: zeros))  # type: ignore[misc]
    write_gguf(folder / "other.gguf", source.fields, tensors)
    return folder / "other.gguf"


def test_a_file_goes_in_and_out_byte_by_byte(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe names types, so that a command that names them goes on in the folder, and another file does not."""
    small = mixed / "small.gguf"
    taken = {"warm_start": start(small), "embedding": "auto", "export": ["gguf"]}
    quantize(mixed / "model", tmp_path / "run", 3, 64, scheme="file", **taken)
    said = " ".join(capsys.readouterr().out.split())
    assert "down_proj │ Q4_K" in said and "1 × Q8_0" in said and f"file of {small.stat().st_size:,} bytes" in said
    assert "not quantized in the file, and left as they are: model.layers.*.self_attn.k_proj (F16)" in said
    assert (tmp_path / "run" / "export" / "gguf" / FILE).read_bytes() == small.read_bytes()
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    model = recipe["settings"]["model"]
    assert model["scheme"]["preset"] == "q4_0" and model["overrides"] == OVERRIDES and model["exclude"] == ["*.k_proj"]
    config = tmp_path / "run.yaml"
    plain = yaml.safe_load(config.read_text())
    plain["model"] |= {"scheme": "q4_0", "overrides": OVERRIDES, "exclude": ["*.k_proj"]}
    config.write_text(yaml.safe_dump(plain))
    assert main(["fit", "--config", str(config)]) == 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text()) == recipe
    capsys.readouterr()
    other = with_type(small, tmp_path, "blk.0.attn_q.weight", TYPES["Q5_0"].number)
    plain["model"] |= {"scheme": "file", "overrides": {}, "exclude": [], "warm_start": start(other)}
    config.write_text(yaml.safe_dump({**plain, "export": []}))
    assert main(["fit", "--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert "holds a run with another recipe" in said and "the file of the warm start" in said


def test_codes_are_found_anew_in_the_types_of_the_file(mixed: Path, tmp_path: Path) -> None:
    """The same types, and so the same size and everything that is not quantized; other codes."""
    small = GGUFFile(mixed / "small.gguf")
    settings = start(small.path)
    settings["init_args"]["rounding"] = {"class_path": "lightning_gsq.quantizers.LeastSquares"}
    taken = {"warm_start": settings, "embedding": "auto", "hessian_sequences": 2}
    run = quantize(mixed / "model", tmp_path / "run", 3, 64, scheme="file", **taken)
    GGUFFormat().write(run, tmp_path, ExportOptions())
    made = GGUFFile(tmp_path / FILE)
    assert {name: (t.shape, t.number) for name, t in made.tensors.items()} == {
        name: (t.shape, t.number) for name, t in small.tensors.items()
    }
    same = {name for name in small.tensors if np.array_equal(made.raw(name), small.raw(name))}
    changed = {f"blk.{i}.{part}.weight" for i in (0, 1) for part in ("attn_q", "attn_v", "ffn_up", "ffn_down")}
    assert not same & changed and {"token_embd.weight", "blk.0.attn_k.weight", "blk.1.attn_norm.weight"} <= same


def test_types_become_options(mixed: Path) -> None:
    types = types_of_file(settings(mixed))
    assert types.options == {"scheme.preset": "q4_0", "overrides": OVERRIDES, "exclude": ["*.k_proj"]}
    assert types.parts["model.layers.0.mlp.down_proj.weight"] == ("Q4_K", 128 * 256, 128 * TYPES["Q4_K"].num_bytes)
    assert set(types.left) == {f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1)}
    again = types_of_file(settings(mixed, overrides=types.overrides, exclude=types.exclude))  # those of its recipe
    assert again.options == types.options
    part = types_of_file(settings(mixed, blocks="0:1", exclude=["*.self_attn.*"]))
    assert part.overrides == {"*.down_proj": "q4_k"} and part.exclude == ["*.self_attn.*"]


@pytest.mark.parametrize("number", [TYPES["IQ3_XXS"].number, TYPES["Q6_K"].number])
def test_code_vectors_are_types_like_others(mixed: Path, tmp_path: Path, number: int) -> None:
    file = with_type(mixed / "small.gguf", tmp_path, "blk.1.ffn_down.weight", number)
    overrides = types_of_file(settings(mixed, warm_start=start(file))).overrides
    name = "iq3_xxs" if number == TYPES["IQ3_XXS"].number else "q6_k"
    assert overrides["model.layers.1.mlp.down_proj"] == name and overrides["model.layers.0.mlp.down_proj"] == "q4_k"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"overrides": {"*.up_proj": "q8_0"}},
            "ffn_up.weight is stored as Q4_0, the run's is q8_0; use --model.scheme f",
        ),
        ({"overrides": {"*.k_proj": "q8_0"}}, "attn_k.weight is stored as F16, whose weights cannot be refined"),
        ({"overrides": {"*.up_proj": "q8k"}}, "model.overrides: '*.up_proj': there is no preset 'q8k'"),
        ({"overrides": {"*.upproj": "q4_0"}}, "model.overrides: the pattern '*.upproj' matches none"),
        ({"overrides": {"*.up_proj": "file"}}, "file stands for the types of --model.warm_start.file"),
        ({"include": ["*.k_proj"]}, "has all weights of the run as F16, without codes to refine"),
        ({"blocks": "0:9"}, "model.blocks: 0:9 is not a range"),
        ({"pretrained": "/no/such"}, "there is no file or folder /no/such"),
        ({"warm_start": start(Path("no.gguf"))}, "model.warm_start.file: no.gguf cannot be read"),
    ],
    ids=str,
)
def test_refusals(mixed: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        types_of_file(settings(mixed, **changes))
    assert message in str(error.value)


def test_an_override_of_what_the_file_has_is_none(mixed: Path) -> None:
    overrides = {"*.up_proj": {"bits": 4, "group_size": 32}, "*.down_proj": "q4_k"}
    types = types_of_file(settings(mixed, overrides=overrides))
    assert list(types.overrides) == ["model.layers.1.self_attn.v_proj", "*.up_proj", "*.down_proj"]


def test_a_type_without_a_preset_is_named_with_the_way_out(mixed: Path, tmp_path: Path) -> None:
    file = with_type(mixed / "small.gguf", tmp_path, "blk.0.ffn_up.weight", MXFP4)
    with pytest.raises(
        ConfigurationError, match=r"weights in MXFP4.* --model\.exclude 'model\.layers\.0\.mlp\.up_proj'"
    ):
        types_of_file(settings(mixed, warm_start=start(file)))
    types_of_file(settings(mixed, warm_start=start(file), exclude=["model.layers.0.mlp.up_proj"]))


def test_parts_of_one_matrix_in_several_types(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As gates and upward matrices of experts are, which the model has as one."""
    from_file = FromFile(str(with_type(mixed / "small.gguf", tmp_path, "blk.0.ffn_up.weight", TYPES["Q8_0"].number)))
    monkeypatch.setattr(from_file.names, "of", lambda *_: ["blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"])
    with pytest.raises(
        ConfigurationError, match=r"stored as Q4_0 and Q8_0; leave x\.gate_up_proj out with --model\.ex"
    ):
        from_file.types({"x.gate_up_proj": (512, 128)})


def test_a_file_of_another_model(mixed: Path, tmp_path: Path) -> None:
    other = save_tiny_model("llama", tmp_path / "other")
    with pytest.raises(ConfigurationError, match="it is a file of another model"):
        types_of_file(settings(mixed, pretrained=str(other)))


def test_patterns_mean_no_matrix_outside_of_the_blocks() -> None:
    values = {f"layers.{i}.{name}.weight": name for i in (0, 1) for name in ("down", "output")}
    assert patterns(values, ["model.tok.weight", "model.output.weight"]) == {
        "*.down": "down",
        "layers.0.output": "output",
        "layers.1.output": "output",
    }


@pytest.mark.parametrize("rounding", [None, {"class_path": "LeastSquares"}], ids=["as it is", "anew"])
def test_plan_tries_a_block(
    mixed: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rounding: dict[str, str] | None
) -> None:
    settings = start(mixed / "small.gguf")
    settings["init_args"]["rounding"] = rounding
    config = write_config(mixed / "model", corpus, tmp_path, model__scheme="file", model__warm_start=settings)
    assert main(["plan", "--config", str(config)]) == 0
    said = capsys.readouterr().out
    assert "warm start" in said and "ms a step" in said


def test_plan_prints_the_types(mixed: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model of which only the configuration is there."""
    bare = shutil.copytree(mixed / "model", tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    config = write_config(bare, corpus, tmp_path, model__scheme="file", model__warm_start=start(mixed / "small.gguf"))
    assert main(["plan", "--config", str(config), "--probe", "false"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Types of " in said and "1 × Q8_0" in said and "q4_k │ 65,536 weights" in said


def test_validate_takes_a_configuration_with_the_word(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tiny_llama, corpus, tmp_path, model__scheme="file", evaluation__num_windows=1)
    assert main(["validate", "--config", str(config)]) == 0
    assert "perplexity" in capsys.readouterr().out
