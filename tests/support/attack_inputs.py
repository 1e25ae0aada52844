"""Command lines that make no sense, and a few that look so and are right."""

from __future__ import annotations

from collections.abc import Iterator

from tests.support.attack_targets import Target

WRONG = {
    "--trainer.devices": ["abc", "-1", "0", "1.5", "[0,0]"],
    "--trainer.num_nodes": ["0", "-1", "x"],
    "--trainer.strategy": ["nonsense", "3", "deepspeed"],
    "--trainer.accelerator": ["gpu", "quantum", "-1"],
    "--trainer.profiler": ["X", "0"],
    "--trainer.precision": ["8", "fp4", "64-true"],
    "--trainer.max_epochs": ["0", "-7", "x", "1.5"],
    "--trainer.max_steps": ["0", "-5", "x"],
    "--trainer.accumulate_grad_batches": ["0", "-1", "x"],
    "--trainer.gradient_clip_val": ["-1", "x"],
    "--trainer.log_every_n_steps": ["-1", "x"],
    "--trainer.limit_train_batches": ["0", "-1", "x"],
    "--trainer.default_root_dir": ["", "n" * 300],
    "--trainer.callbacks": ["3", "[nothing.Nobody]", "[{class_path: os.system}]"],
    "--trainer.logger": ["7", "nothing.Nobody"],
    "--seed_everything": ["-1", "1e20", "x"],
    "--model.pretrained": [
        "",
        "nowhere/at/all",
        "n" * 300,
        "package://..",
        "package://nothing/x.gguf",
        "/etc/passwd",
        "/",
    ],
    "--model.scheme.bits": ["0", "9", "-1", "2.5", "two", "null", "[2]"],
    "--model.scheme.group_size": ["0", "-2", "x", "1.5", "null"],
    "--model.scheme.budget": ["-1", "0", "99", "x"],
    "--model.scheme": ["7", "[]", "{bit: 2}", "nothing"],
    "--model.scheme.salient": ["{ratio: 2}", "{ratio: -0.1}", "{bits: 1}", "{bits: 99}", "{layout: round}", "7"],
    "--model.include": ["[nothing*]", "7"],
    "--model.exclude": ['["*"]', "[nothing*]"],
    "--model.overrides": ["{nothing*: {bits: 3}}", "{'*': {bits: 0}}", "7", "[]"],
    "--model.blocks": ["9:12", "1:1", "x", "-1:2", "2", "0:99"],
    "--model.phases": ["[]", "[block]", "blocks", "[blocks,blocks]", "[end_to_end,blocks]", "7"],
    "--model.target": ["river", "7", "null"],
    "--model.inherited_error": ["-1", "0", "x"],
    "--model.warm_start": ["Nobody", "7", "lightning_gsq.quantizers.Nobody"],
    "--model.hessian_sequences": ["0", "-3", "x", "1.5"],
    "--model.gumbel.sigma": ["-1", "x"],
    "--model.gumbel.noise": ["-1", "x"],
    "--model.gumbel.shifts": ["0", "-1", "x"],
    "--model.gumbel.center": ["middle", "7"],
    "--model.gumbel.backend": ["abacus", "7"],
    "--model.gumbel.logits_dtype": ["float8", "7"],
    "--model.optimizer": ["torch.optim.Nobody", "torch.optim.SparseAdam", "7"],
    "--model.optimizer.lr": ["-1", "x"],
    "--model.scale_learning_rate": ["0", "-1", "x"],
    "--model.learning_rate_floor": ["-0.1", "1.1", "x"],
    "--model.scale_dtype": ["float8", "int8", "7"],
    "--model.dtype": ["float8", "7"],
    "--model.output_dtype": ["int4", "7"],
    "--model.nonsense": ["1"],
    "--data.source": ["Nobody", "7", "lightning_gsq.data.TextSource"],
    "--data.source.path": ["", "nowhere.txt", "/", "n" * 300],
    "--data.sequence_length": ["0", "-1", "1", "x", "999999"],
    "--data.num_sequences": ["0", "-1", "x", "99999999"],
    "--data.num_validation_sequences": ["0", "-1", "x"],
    "--data.batch_size": ["0", "-1", "x", "1.5"],
    "--data.bos": ["maybe", "7"],
    "--data.retries": ["-1", "x"],
    "--data.retry_pause": ["-1", "x"],
    "--data.cache_folder": ["/etc/passwd", "n" * 300],
    "--evaluation.sequence_length": ["0", "1", "-1", "x", "999999"],
    "--evaluation.num_windows": ["0", "-1", "x"],
    "--evaluation.by_block": ["maybe", "7"],
    "--evaluation.source.path": ["nowhere.txt", ""],
    "--activations.memory_limit_gb": ["-1", "x"],
    "--activations.dtype": ["float8"],
    "--activations.folder": ["/nowhere/at/all"],
    "--end_to_end.train": ["[]", "[nothing]", "7"],
    "--end_to_end.batch_size": ["0", "-1", "x"],
    "--end_to_end.max_epochs": ["0", "-1", "x"],
    "--end_to_end.max_steps": ["0", "-2", "x"],
    "--end_to_end.temperature": ["0", "-1", "x"],
    "--end_to_end.cross_entropy": ["-0.1", "1.1", "x"],
    "--end_to_end.top_k": ["0", "-1", "999999", "x"],
    "--end_to_end.validations": ["0", "-1"],
    "--end_to_end.strategy": ["fsdp9", "7"],
    "--end_to_end.norm_learning_rate": ["0", "-1", "x"],
    "--export": ["[nothing]", "[nativ]", "7", "[os.system]"],
    "--config": ["nowhere.yaml", "/etc/passwd", "/"],
    "--bits": ["3"],
    "--nsamples": ["3"],
    "--output_dir": ["x"],
}
OTHERS = [
    ["nothing"],
    ["fitt"],
    ["export"],
    ["export", "--format", "native"],
    ["export", "--run", "nowhere", "--format", "native"],
    ["export", "--run", ".", "--format", "native"],
    ["predict"],
    ["predict", "--prompt", "a"],
    ["predict", "--model", "nowhere", "--prompt", "a"],
    ["validate", "--model.pretrained", "nowhere"],
    ["plan", "--model.pretrained", "nowhere"],
]
OF_A_MODEL = [
    ["--seed", "-1"],
    ["--seed", "1e20"],
    ["--device", "meta"],
    ["--device", "abacus"],
    ["--max_new_tokens", "0"],
    ["--max_new_tokens", "99999"],
    ["--temperature", "-1"],
    ["--file", "nowhere.txt"],
    ["--file", "/"],
    ["--dtype", "float8"],
]


def command_lines(target: Target) -> Iterator[tuple[list[str], bool]]:
    """Pairs of arguments and whether they may be accepted."""
    fit = target.arguments("input")
    for option, values in WRONG.items():
        for value in values:
            yield [*fit, f"{option}={value}"], False
    for arguments in OTHERS:
        yield arguments, False
    for arguments in OF_A_MODEL:
        yield ["predict", "--model", str(target.model), "--prompt", "a", *arguments], False
    for form in ("nothing", "nativ", "7", ""):
        yield ["export", "--run", str(target.finished), "--format", form], False
