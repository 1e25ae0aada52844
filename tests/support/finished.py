"""Run folders of tiny models, made without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from lightning_gsq.models import loading
from lightning_gsq.quantizers.rtn import RTN
from lightning_gsq.quantizers.warm_start import quantized
from lightning_gsq.run.block_plan import make_plan
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.system.versions import versions
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.assignment import SchemeOverride
from lightning_gsq.weights.quantized import QuantizedTensor
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.tiny import save_tiny_model

MakeRun = Callable[..., Path]


def make_run(
    root: Path,
    family: str = "llama",
    scheme: QuantScheme = QuantScheme(3, 16),  # noqa: B008 - frozen
    scale_dtype: str = "float16",
    output_dtype: str = "bfloat16",
    overrides: dict[str, SchemeOverride] | None = None,
) -> Path:
    """A finished run: the warm start of every block, in a run folder with its recipe."""
    source = save_tiny_model(family, root / "original")
    model = ModelQuantization(
        str(source),
        scheme,
        overrides=overrides or {},
        scale_dtype=scale_dtype,  # type: ignore[arg-type]
        output_dtype=output_dtype,  # type: ignore[arg-type]
        dtype="float32",
    )
    model.load(loading.resolve(str(source)))
    folder = RunFolder(root / "run")
    blocks = dict(model.network.named_modules())
    for own in make_plan(model):
        tensors: dict[str, QuantizedTensor] = {}
        for site, own_scheme in own.weights.items():
            w_OI = site.to_matrix(blocks[own.name].get_parameter(site.name)).float()
            tensors[site.name] = quantized(RTN()(w_OI, None, own_scheme), own_scheme, getattr(torch, scale_dtype))
        folder.write_block("block", own.index, tensors)
    settings = {
        "pretrained": str(source),
        "scheme": {"bits": scheme.bits, "group_size": scheme.group_size},
        "overrides": {name: {"bits": o.bits, "group_size": o.group_size} for name, o in (overrides or {}).items()},
        "scale_dtype": scale_dtype,
        "output_dtype": output_dtype,
        "dtype": "float32",
        "warm_start": {"class_path": "lightning_gsq.quantizers.RTN"},
    }
    text = {"class_path": "lightning_gsq.data.TextFile", "init_args": {"path": "/home/someone/text.txt"}}
    data = {"source": text, "num_sequences": 4, "sequence_length": 32}
    recipe = {"seed": 0, "settings": {"model": settings, "data": data}, "versions": versions()}
    (folder.root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    folder.update_progress(model="block")
    folder.write_summary({"perplexity": {"full_precision": 200.5, "blocks": 210.25}})
    return folder.root
