"""Folders, files and names that are no model, each refused in one line before anything is loaded."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from gguf import GGUFWriter

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.fields import text, uint
from lightning_gsq.gguf.write import write_gguf
from lightning_gsq.models import loading
from lightning_gsq.models.address import ModelSource, gguf_header
from tests.support.tiny import FAMILIES, save_tiny_model


def refused(address: Path | str) -> str:
    with pytest.raises(ConfigurationError) as raised:
        loading.resolve(str(address))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    FAMILIES["llama"]().save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    return tmp_path / "sharded"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("a" * 300, "(300 characters)' cannot be a file or folder: File name too long"),
        ("/" + "b/" * 3000, "(6001 characters)' cannot be a file or folder: File name too long"),
        ("~nosuchuser/model", "cannot be a file or folder: Could not determine home directory"),
        ("package://..", "names no package"),
        ("package://os.path/x.gguf", "names no package"),
    ],
)
def test_names_that_cannot_be(address: str, reason: str) -> None:
    assert reason in refused(address)
    assert len(refused(address)) < 200


def test_names_that_cannot_be_are_no_finished_runs() -> None:
    with pytest.raises(ConfigurationError, match="File name too long"):
        loading.finished_model("a" * 300)


def test_a_configuration_nested_too_deep(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "deep")
    (folder / "config.json").write_text('{"a":' + "[" * 200_000 + "]" * 200_000 + "}")
    assert "config.json cannot be read: " in refused(folder)


@pytest.mark.parametrize("content", ["[]", "3", '"llama"'])
def test_a_configuration_that_is_no_object(content: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "odd")
    (folder / "config.json").write_text(content)
    assert "expected an object" in refused(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_git_lfs_pointer(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "pointer")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 130248\n")
    assert f"{name} is a Git LFS pointer in place of the file itself; run `git lfs pull`" in refused(folder)


def test_pickled_weights_alone(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "it holds pytorch_model.bin, a pickle, which is never read: convert it to safetensors" in refused(folder)


def test_weights_under_another_name(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "named")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    assert "it holds consolidated.safetensors, a name that is not looked for: rename it" in refused(folder)


def test_an_adapter_without_its_model(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "it holds an adapter: merge it into its base model" in refused(tmp_path)


@pytest.mark.parametrize("keep", [0, 1000, -1])
def test_truncated_weights(keep: int, tiny_llama: Path, tmp_path: Path) -> None:
    file = shutil.copytree(tiny_llama, tmp_path / "short") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors is no complete safetensors file" in refused(file.parent)


def test_a_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard.name} is no complete safetensors file" in refused(sharded)


def test_a_shard_that_is_gone(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[-1]
    shard.unlink()
    assert f"lacks {shard.name}, which its index names" in refused(sharded)


def test_all_shards_gone(sharded: Path) -> None:
    for shard in sharded.glob("model-*.safetensors"):
        shard.unlink()
    assert "-of-00003.safetensors, which its index names" in refused(sharded)


@pytest.mark.parametrize("count", [10**8, 2**31 - 1])
def test_more_gguf_blocks_than_tensors(count: int, tmp_path: Path) -> None:
    """transformers' reader takes minutes for such a number; here no other reader has opened the file yet."""
    writer = GGUFWriter(tmp_path / "many.gguf", "llama")
    writer.add_block_count(count)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    begin = time.monotonic()
    assert f"is damaged: it says llama.block_count {count} and holds 0 tensors" in refused(tmp_path / "many.gguf")
    assert time.monotonic() - begin < 2


def test_a_truncated_gguf_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 4)
    assert f"model.pretrained: {tmp_path / 'short.gguf'} is not a GGUF file that can be read" in refused(
        tmp_path / "short.gguf"
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "whisper"}, "is an encoder-decoder, not a causal decoder|is a whisper model"),
        ({"model_type": "clip"}, "is a clip model, which transformers has no decoder of text for"),
        ({"model_type": "vit"}, "is a vit model, which transformers has no decoder of text for"),
    ],
)
def test_models_of_another_kind_say_what_they_are(
    config: dict[str, object], said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "other")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=said):
        loading.load_config(loading.resolve(str(folder)))


def test_every_family_is_a_decoder(tmp_path: Path) -> None:
    for family in FAMILIES:
        source = loading.resolve(str(save_tiny_model(family, tmp_path / family)))
        assert loading.load_config(source).vocab_size > 0


def test_a_gguf_file_of_an_architecture_without_a_reader_names_those_with_one(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", {"general.architecture": text("granite"), "granite.block_count": uint(0)}, [])
    with pytest.raises(ConfigurationError, match=r"'granite', which transformers reads no .* bloom, .*, qwen3_moe"):
        gguf_header(ModelSource(str(tmp_path), "x.gguf"))
    write_gguf(tmp_path / "y.gguf", {"general.architecture": text("qwen3moe")}, [])
    assert gguf_header(ModelSource(str(tmp_path), "y.gguf")).fields["general.architecture"].value == "qwen3moe"
