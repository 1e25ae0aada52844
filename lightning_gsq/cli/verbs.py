"""The verbs, by name; without the libraries that carry them out."""

EXIT_USAGE = 2
"""Exit code for what cannot be done as asked."""
SUMMARIES = {
    "fit": "Quantize a model into a run folder (--trainer.default_root_dir).",
    "validate": "Measure the perplexity of a model, a finished run folder or an exported one.",
    "plan": "Say what fit would take with the same options, without doing it.",
    "export": "Write a finished run as files that other programs load.",
    "predict": "Write text from prompts.",
    "test": "Measure a model on zero-shot tasks of lm-eval.",
}

USAGE = {"export": "RUN --format FORMAT", "predict": "MODEL --prompt TEXT", "test": "MODEL --tasks TASKS"}


def overview() -> str:
    """What there is to do, for ``--help`` without a verb."""
    lines = ["usage: python -m lightning_gsq VERB MODEL [options]", ""]
    lines += ["Quantize large language models to 1-4 bits a weight, block by block.", ""]
    lines += [f"  {verb + ' ' + USAGE.get(verb, 'MODEL'):30} {summary}" for verb, summary in SUMMARIES.items()]
    lines += ["", "  VERB --help                    the options that are used first"]
    lines += ["  VERB --help.all                every option, in groups"]
    lines += ["  --version                      the version", "  --debug                        errors with tracebacks"]
    return "\n".join(lines)
