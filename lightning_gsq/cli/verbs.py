"""The verbs, by name; without the libraries that carry them out."""

SUMMARIES = {
    "fit": "Quantize a model into a run folder (--trainer.default_root_dir).",
    "validate": "Measure the perplexity of a model, a finished run folder or an exported one.",
    "plan": "Say what fit would take with the same options, without doing it.",
    "export": "Write a finished run as files that other programs load.",
    "predict": "Write text from prompts.",
}
