"""Tiny models in the layouts that large ones are published in, with the numbers that those stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DeepseekV3Config, GptOssConfig, LlamaConfig, PretrainedConfig

from lightning_gsq.export.formats.compressed_tensors import quantization_config
from lightning_gsq.weights.packing import pack
from tests.support.tiny import COMMON, byte_tokenizer, random_model

BLOCK = 16
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "deepseek_v3": DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
    ),
}
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""Magnitudes of the four bits E2M1."""


def in_fp8(kind: str | PretrainedConfig, folder: Path, block: int = BLOCK) -> dict[str, Tensor]:
    """Writes a model as DeepSeek-V3 is published: E4M3 with a scale a square block; returns what it stands for."""
    config = CONFIGS[kind] if isinstance(kind, str) else kind
    plain, stored, meant = _saved(config, folder), dict[str, Tensor](), dict[str, Tensor]()
    for name, value in plain.items():
        stored[name] = meant[name] = value
        if _is_quantized(name, value):
            rows, columns = value.shape
            beyond = (0, -columns % block, 0, -rows % block)
            blocks = nn.functional.pad(value, beyond).unflatten(1, (-1, block)).unflatten(0, (-1, block))
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            codes = (blocks / scale).to(torch.float8_e4m3fn)
            stored[name] = codes.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()
            stored[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
            meant[name] = (codes.float() * scale).flatten(2).flatten(0, 1)[:rows, :columns].contiguous()
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    _write(folder, stored, method)
    return meant


def in_int4(kind: str, folder: Path, only: str = "") -> dict[str, Tensor]:
    """Writes a model as Kimi K2 is published: INT4 with a scale a group; returns what it stands for.

    Args:
        kind: A name of :data:`CONFIGS`.
        folder: Where to.
        only: What the names of the quantized weights contain; Kimi-K2.5 has routed experts in INT4 alone.
    """
    block = BLOCK // 2 if only else BLOCK  # that of all experts, whose matrices have 32 and 16 columns
    plain, stored, meant = _saved(CONFIGS[kind], folder), dict[str, Tensor](), dict[str, Tensor]()
    layers = {}
    for name, value in plain.items():
        if not _is_quantized(name, value) or only not in name:
            stored[name] = meant[name] = value
            continue
        rows, columns = value.shape
        groups = value.view(rows, columns // block, block)
        scale = 2.0 ** torch.ceil(torch.log2(groups.abs().amax(-1) / 7))  # products of codes and scales are exact
        codes = (groups / scale[..., None]).round().clamp(-8, 7)
        stem = name.removesuffix(".weight")
        stored[f"{stem}.weight_packed"] = pack(codes.view(rows, columns).to(torch.int16) + 8, 4)
        stored[f"{stem}.weight_scale"] = scale.half()
        stored[f"{stem}.weight_shape"] = torch.tensor([rows, columns])
        meant[name] = (codes * scale[..., None]).view(rows, columns)
        layers[stem] = (4, block if columns > block else None)
    ignored = ["re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|down)_proj.*"] if only else []
    _write(folder, stored, quantization_config(layers, ["lm_head", "re:.*gate$", *ignored]))
    return meant


def in_mxfp4(folder: Path) -> dict[str, Tensor]:
    """Writes a gpt-oss as it is published: MXFP4 in the experts; returns what it stands for."""
    sizes = {**COMMON, "hidden_size": 64, "intermediate_size": 64}
    config = GptOssConfig(**sizes, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)
    plain, stored, meant = _saved(config, folder), dict[str, Tensor](), dict[str, Tensor]()
    generator = torch.Generator().manual_seed(0)
    for name, value in plain.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = meant[name] = value.bfloat16()
            continue
        experts, inputs, outputs = value.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 127, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        nibbles = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).int()
        levels = FP4[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0) * 2.0 ** (scales[..., None].float() - 127)
        meant[name] = levels.flatten(-2).transpose(1, 2).contiguous()
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
    method["modules_to_not_convert"] += ["model.layers.*.self_attn", "model.layers.*.mlp.router"]  # type: ignore[operator]
    _write(folder, stored, method, dtype="bfloat16")
    return meant


def _saved(config: PretrainedConfig, folder: Path) -> dict[str, Tensor]:
    random_model(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def _is_quantized(name: str, value: Tensor) -> bool:
    return ".layers." in name and value.ndim == 2 and not name.endswith("gate.weight")


def _write(folder: Path, tensors: Mapping[str, Tensor], method: Mapping[str, Any], **changes: str) -> None:
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes, "quantization_config": dict(method)}))
