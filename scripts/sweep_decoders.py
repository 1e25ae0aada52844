"""Every type of causal decoder that transformers knows, as a tiny random model: what is quantized, what is refused.

Each type runs in a process of its own: build, save, load, plan, run the blocks over other sequences, put rounded
weights in the place of the model's own, save that and load it again. A type ends as one of

    ok          all of that, and the logits of the saved model are those of the quantized one
    refused     one line says why (a ``ConfigurationError``)
    not built   no tiny configuration of it was found
    traceback   anything else: a fault of this project

    python scripts/sweep_decoders.py --output docs/decoders.md
    python scripts/sweep_decoders.py --only gemma3n bloom
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

VOCABULARY, HIDDEN, HEADS, LAYERS, EXPERTS = 256, 64, 4, 4, 4
SECONDS = 400
SIZES: dict[str, Any] = {
    # what configurations call their sizes -> a small one
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "dim"], HIDDEN),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"], 96),
    **dict.fromkeys(["decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp", "shared_intermediate_size"], 96),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["shared_expert_intermediate_size", "expert_dim", "moe_latent_size"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "n_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads"], HEADS),
    **dict.fromkeys(["encoder_attention_heads", "swa_num_attention_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "n_kv_heads", "swa_num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "global_head_dim", "v_head_dim", "attention_head_dim", "swa_head_dim"], 16),
    **dict.fromkeys(["kv_channels", "attn_head_dim", "linear_key_head_dim", "linear_value_head_dim"], 16),
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "rotary_dim", "index_head_dim"], 16),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "o_lora_rank", "laurel_rank", "index_n_heads"], 16),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads"], 4),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "n_experts"], EXPERTS),
    **dict.fromkeys(
        ["num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k", "num_selected_experts"], 2
    ),
    **dict.fromkeys(["n_shared_experts", "n_group", "topk_group", "moe_num_shared_experts", "num_shared_experts"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"], 256),
    **dict.fromkeys(["sliding_window", "attention_window", "local_attention_window", "index_topk"], 8),
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size", "mamba_state_dim"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "n_mamba_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "mamba_headdim"], 16),
    **dict.fromkeys(["mamba_d_ssm", "mamba_intermediate_size"], 128),
    **dict.fromkeys(["mamba_dt_rank", "time_step_rank"], 8),
    **dict.fromkeys(["num_nextn_predict_layers", "num_mtp_layers", "num_kv_shared_layers"], 0),
    **dict.fromkeys(["hidden_size_per_layer_input", "attention_hidden_size", "lru_width"], None),
    **dict.fromkeys(["bos_token_id", "eos_token_id", "decoder_start_token_id"], 1),
    "pad_token_id": 0,
    "encoder_hash_byte_group_vocab": 64,
    "rope_scaling": None,
}
PATTERNS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "moe_layers", "no_rope_layers")
PATTERNS += ("activation_sparsity_pattern", "attn_layer_indices", "moe_layer_pattern", "hybrid_layer_pattern")
"""Lists with an entry for each block."""
MOST_WEIGHTS = 120_000_000
FURTHER: dict[str, dict[str, Any]] = {
    # what a type needs beside that
    "gemma3n_text": {"hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2},
    "gemma4_text": {"hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": HIDDEN, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 16, "qk_head_dim": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "cohere_compass_text": {"layer_types": ["sliding_attention"] * LAYERS},
    "reformer": {"axial_pos_embds": False},
    "dots3_note": {"adapter_in_dim": HIDDEN},
    "dots3_note_text": {
        # blocks that see a window have sizes of their own
        "shared_experts_intermediate_size": 32,
        "per_layer_config": {
            index: {
                **dict.fromkeys(["num_attention_heads", "num_key_value_heads"], HEADS),
                **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"], 16),
                "v_head_dim": 16,
                "head_dim": 32,
            }
            for index in (1, 3)
        },
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    **{
        # rotary embeddings of time, height and width, whose dimensions are those of a head
        kind: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **share}}
        for kind, sections, share in (
            ("qwen2_vl_text", [2, 3, 3], {}),
            ("qwen2_5_vl_text", [2, 3, 3], {}),
            ("glm4v_text", [2, 3, 3], {}),
            ("glm4v_moe_text", [1, 1, 2], {"partial_rotary_factor": 0.5}),
        )
    },
}


def small(config: Any) -> dict[str, Any]:
    """What makes a configuration small: changes to its values."""
    changes = {name: value for name, value in SIZES.items() if value is not None and settable(config, name)}
    for name in PATTERNS:
        pattern = getattr(config, name, None) if settable(config, name) else None
        if isinstance(pattern, (list, tuple)) and pattern and len(pattern) != LAYERS:
            each = list(dict.fromkeys(pattern))  # one of each kind, and the first again
            changes[name] = (each * LAYERS)[:LAYERS]
    if settable(config, "kv_lora_rank"):  # latent attention has as many keys as queries
        changes |= {name: HEADS for name in ("num_key_value_heads",) if settable(config, name)}
    return changes


def settable(config: Any, name: str) -> bool:
    """Whether a configuration has a value of this name that can be given."""
    name = (getattr(type(config), "attribute_map", None) or {}).get(name, name)
    prop = getattr(type(config), name, None)
    if isinstance(prop, property) and prop.fset is None:
        return False
    try:
        return hasattr(config, name)
    except Exception:  # a value that differs from block to block has none for all
        return name in vars(config)


def configuration(kind: str) -> Any:
    """A small configuration of a type."""
    from transformers import AutoConfig

    plain = AutoConfig.for_model(kind)
    parts = {
        name: AutoConfig.for_model(part.model_type, **small(part) | FURTHER.get(part.model_type, {})).to_dict()
        for name, part in vars(plain).items()
        if getattr(part, "model_type", None) in CONFIG_MAPPING_NAMES
    }
    return AutoConfig.for_model(kind, **(parts or small(plain)) | FURTHER.get(kind, {}))


def build(kind: str) -> Any:
    """A random model of a type."""
    import torch

    from lightning_gsq.models.classes import auto_class

    config = configuration(kind)
    if getattr(config, "is_encoder_decoder", False):
        config.is_encoder_decoder = False
    config.is_decoder = True
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    torch.manual_seed(0)
    with torch.device("meta"):
        count = sum(p.numel() for p in auto_class(config).from_config(config, dtype=torch.float32).parameters())
    if count > MOST_WEIGHTS:
        raise ValueError(f"{count:,} weights with these sizes")
    model = auto_class(config).from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model(torch.arange(2, 15)[None] % VOCABULARY, use_cache=False)
    return model


def examine(kind: str, folder: Path) -> dict[str, Any]:
    """What becomes of one type."""
    import torch

    from lightning_gsq.errors import ConfigurationError
    from lightning_gsq.models import loading
    from tests.support.tiny import byte_tokenizer

    try:
        model = build(kind)
        model.save_pretrained(folder / "model")
        tokenizer = byte_tokenizer()
        tokenizer.save_pretrained(folder / "model")
    except Exception as error:  # a configuration that does not fit is no finding about this project
        return {"outcome": "not built", "line": _line(error)}
    try:
        source = loading.resolve(str(folder / "model"))
        with torch.no_grad():
            return quantize(source, folder, tokenizer)
    except ConfigurationError as error:
        return {"outcome": "refused", "line": _line(error)}


def quantize(source: Any, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Load, plan, streams, rounded weights, save, load again."""
    import torch

    from lightning_gsq.estimate.skeleton import make_skeleton
    from lightning_gsq.models import loading
    from lightning_gsq.models.chain import find_blocks
    from lightning_gsq.models.linear_weights import to_quantize
    from lightning_gsq.models.saving import write_dense
    from lightning_gsq.quantizers import RTN
    from lightning_gsq.quantizers.warm_start import quantized
    from lightning_gsq.run.block_plan import make_plan, not_quantized
    from lightning_gsq.run.substitution import install
    from lightning_gsq.training import ModelQuantization
    from lightning_gsq.weights.scheme import QuantScheme

    model = ModelQuantization(source.path, scheme=QuantScheme(4, 16), dtype="float32")
    model.load(source)
    plan = make_plan(model)
    skeleton = make_skeleton(source, loading.load_config(source), "float32")
    same = {
        f"{skeleton.prefix}.{index}.{site.name}": site
        for index, block in enumerate(skeleton.blocks)
        for site in block.sites
    }
    wanted = {f"{own.name}.{site.name}" for own in plan for site in own.weights}
    if wanted != set(to_quantize(same, ["*"])):
        raise AssertionError(f"plan sees other weights: {sorted(wanted ^ set(to_quantize(same, ['*'])))[:3]}")
    ids = torch.randint(2, VOCABULARY - 2, (3, 40), generator=torch.Generator().manual_seed(1))
    error = stream_error(model.network, ids)
    if not error < 1e-2:
        raise AssertionError(f"the stream of other sequences is off by {error:.3g}")
    blocks = find_blocks(model.network)[1]
    for own in plan:
        tensors = {}
        for site, scheme in own.weights.items():
            w_OI = site.to_matrix(blocks[own.index].get_parameter(site.name)).float()
            tensors[site.name] = quantized(RTN(weighted=False)(w_OI, None, scheme), scheme, torch.float32)
        install(blocks[own.index], own, tensors)
    before = model.network(ids, use_cache=False).logits
    (folder / "saved").mkdir()
    write_dense(model.network, tokenizer, folder / "saved", torch.float32)
    again = loading.load_model(loading.resolve(str(folder / "saved")), "float32")
    difference = float((again(ids, use_cache=False).logits - before).abs().max() / before.abs().max())
    if not difference < 1e-5:
        raise AssertionError(f"the saved model's logits differ by {difference:.3g}")
    weights = sum(site.rows * site.in_features for own in plan for site in own.weights)
    total = sum(p.numel() for p in blocks.parameters())
    return {"outcome": "ok", "share": weights / total, "left": not_quantized(model, plan), "line": ""}


def stream_error(network: Any, ids_NT: Any) -> float:
    """Largest relative error of a token where each block runs alone on what the blocks before it gave."""
    import torch

    from lightning_gsq.models.chain import embed, find_blocks, hidden_of, run_block_giving, trace
    from lightning_gsq.models.passing import arguments_from_ids
    from lightning_gsq.models.survey import survey, token_errors

    surveyed, outputs = survey(network), []
    handle = find_blocks(network)[1][-1].register_forward_hook(lambda _, __, output: outputs.append(hidden_of(output)))
    network(ids_NT, use_cache=False)
    handle.remove()
    calls = [call.like(known) for call, known in zip(trace(network, ids_NT[:1]).calls, surveyed.calls, strict=True)]
    hidden, beside = embed(network, ids_NT), dict[str, torch.Tensor]()
    for index, (block, call) in enumerate(zip(find_blocks(network)[1], calls, strict=True)):
        arguments = arguments_from_ids(network, surveyed.forms, ids_NT, index, call) if call.from_ids else []
        hidden, given = run_block_giving(block, hidden, call.bind([*arguments, *(beside[n] for n in call.from_blocks)]))
        beside |= given
    return float(token_errors(hidden, calls[-1].layout.pack(outputs[0])).max())


def _cell(line: str) -> str:
    """A line as it can stand in a table: without the name of the temporary folder."""
    return re.sub(r"/\S*/(model|saved)\b", r"\1", line).replace("|", "/")


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def one(kind: str, answer: Connection) -> None:
    """Examines a type and sends the result: what a process of its own does."""
    import torch

    # After a fork torch makes its threads anew without a lock: here, while there is one thread to ask for them.
    torch.set_num_threads(torch.get_num_threads())
    nowhere = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            result = examine(kind, Path(folder))
        except Exception as error:  # the finding
            result = {"outcome": "traceback", "line": _line(error), "trace": traceback.format_exc()}
    answer.send(result)


def in_process(kind: str) -> dict[str, Any]:
    """The result of one type, from a process of its own, which begins with everything imported."""
    began = time.perf_counter()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=one, args=(kind, sender))
    process.start()
    sender.close()
    result = {"outcome": "traceback", "line": f"no end after {SECONDS} seconds"}
    if receiver.poll(SECONDS):
        try:
            result = receiver.recv()
        except EOFError:
            result = {"outcome": "traceback", "line": "the process ended without an answer"}
    process.kill()
    process.join()
    return {"kind": kind, **result, "seconds": time.perf_counter() - began}


def prepare() -> None:
    """Imports what every type needs, and makes it quiet."""
    warnings.simplefilter("ignore")
    import torch
    import transformers

    import lightning_gsq.estimate.skeleton
    import lightning_gsq.run.block_plan
    import lightning_gsq.run.substitution  # noqa: F401 - for the processes to come

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()


def kinds() -> list[str]:
    """Every type that transformers maps to a causal decoder, or to a model for more than text around one."""
    from transformers.models.auto import modeling_auto as mappings

    return sorted(mappings.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | mappings.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)


def page(results: list[dict[str, Any]], others: str = "") -> str:
    """The table as Markdown.

    Args:
        results: What was found.
        others: An earlier table, whose rows of other types stay.
    """
    from importlib.metadata import version

    rows = {row.split("`")[1]: row for row in others.splitlines() if row.startswith("| `")}
    for r in results:
        share = format(r["share"], ".1%") if "share" in r else ""
        rows[r["kind"]] = f"| `{r['kind']}` | {r['outcome']} | {share} | {_cell(r['line'])} |"
    counts = Counter(row.split("|")[2].strip() for row in rows.values())
    summary = ", ".join(f"{counts[name]} {name}" for name in ("ok", "refused", "not built", "traceback"))
    head = f"transformers {version('transformers')}, {len(rows)} types: {summary}."
    return "\n".join(
        [
            head,
            "",
            "| type | outcome | share of the blocks' weights | why |",
            "|---|---|---|---|",
            *(rows[kind] for kind in sorted(rows)),
            "",
        ]
    )


def main() -> None:
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="types, instead of all; rows of others stay in the file")
    parser.add_argument("--output", type=Path, help="Markdown file for the table, after a line `<!-- sweep -->`")
    parser.add_argument("--json", type=Path, help="file for everything that was found")
    options = parser.parse_args()
    prepare()
    results = []
    for kind in options.only or kinds():
        results.append(in_process(kind))
        last = results[-1]
        print(f"{kind:30} {last['outcome']:10} {last['seconds']:5.0f} s  {last['line'][:150]}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    written = options.output.read_text(encoding="utf-8") if options.output else ""
    before, _, earlier = written.partition("<!-- sweep -->")
    table = page(results, earlier if options.only else "")
    if options.output:
        options.output.write_text(f"{before}<!-- sweep -->\n{table}", encoding="utf-8")
    print(table.splitlines()[0])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
