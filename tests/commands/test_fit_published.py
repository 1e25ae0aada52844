"""Whole runs from checkpoints that are published with quantized weights: fit, load back, export."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lightning_gsq
from lightning_gsq.cli import main
from lightning_gsq.models import computed_weights
from lightning_gsq.models.dequantizing import DequantizedWarning
from tests.support.published import in_fp8, in_int4, in_mxfp4
from tests.support.runs import block_files, write_config

KINDS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "FP8": lambda folder: in_fp8("deepseek_v3", folder),
    "INT4": lambda folder: in_int4("deepseek_v3", folder, only=".mlp.experts."),
    "MXFP4": in_mxfp4,
}
SHORT = {"model__scheme": {"bits": 4, "group_size": 16}, "data__num_sequences": 16, "trainer__max_steps": 4}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_ends_in_ordinary_files(kind: str, corpus: Path, tmp_path: Path) -> None:
    meant = KINDS[kind](tmp_path / "model")
    config = write_config(tmp_path / "model", corpus, tmp_path, **SHORT)
    with pytest.warns(DequantizedWarning, match=f"is published in {kind.replace('INT4', 'compressed-tensors')}"):
        assert main(["fit", "--config", str(config), "--export", "[native,dequantized]"]) == 0
    run = tmp_path / "run"
    saved = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    packed = lightning_gsq.load(run / "export" / "native", dtype=torch.float32)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, saved(ids).logits, rtol=5e-2, atol=5e-2)  # saved in bfloat16
    # What is not quantized is what the files stand for; what is, is near it.
    kept, changed = load_file(run / "model" / "model.safetensors"), 0
    for name, value in meant.items():
        if "layers" not in name or "norm" in name:
            assert torch.equal(kept[name].float(), value.bfloat16().float()), name
        elif value.ndim > 1 and not torch.equal(kept[name].float(), value.bfloat16().float()):
            changed += 1
            error = (kept[name].float() - value.float()).square().sum() / value.float().square().sum()
            assert error < 0.05, name
    assert changed


@pytest.mark.filterwarnings("ignore::lightning_gsq.models.dequantizing.DequantizedWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_run_where_memory_is_short(
    kind: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed on loading is in files then, which a second start finds, and which are gone at the end."""
    KINDS[kind](tmp_path / "model")
    short = {**SHORT, "model__blocks": "0:1"}
    assert main(["fit", "--config", str(write_config(tmp_path / "model", corpus, tmp_path / "usual", **short))]) == 0
    monkeypatch.setattr(computed_weights, "PART_OF_MEMORY", 0)
    config = write_config(tmp_path / "model", corpus, tmp_path / "files", **short)
    folder, written = tmp_path / "files" / "run" / computed_weights.FOLDER, []
    write = computed_weights._write
    monkeypatch.setattr(computed_weights, "_write", lambda place, values: (written.append(place), write(place, values)))
    with monkeypatch.context() as stopped:
        stopped.setattr("lightning_gsq.commands.fit.warm_start_phase", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["fit", "--config", str(config)])
    assert written and {place.parent.parent for place in written} == {folder}
    before = len(written)
    assert main(["fit", "--config", str(config)]) == 0
    assert len(written) == before and not folder.exists()
    assert block_files(tmp_path / "files") == block_files(tmp_path / "usual")
