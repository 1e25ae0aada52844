"""What TensorBoard shows of a run beside its curves: the recipe as text, and a row of its hyperparameter table."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import yaml
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HYPERPARAMETERS = {
    # columns of the hyperparameter table -> where they stand in the recipe's settings
    "scheme": "model.scheme",
    "bits": "model.scheme.bits",
    "group_size": "model.scheme.group_size",
    "warm_start": "model.warm_start.class_path",
    "target": "model.target",
    "shifts": "model.gumbel.shifts",
    "noise": "model.gumbel.noise",
    "optimizer": "model.optimizer.class_path",
    "lr_logits": "model.optimizer.init_args.lr",
    "lr_scales": "model.scale_learning_rate",
    "sequences": "data.num_sequences",
    "sequence_length": "data.sequence_length",
    "batch_size": "data.batch_size",
    "epochs": "trainer.max_epochs",
    "seed": "seed_everything",
}


PAGES = {
    # what a run has -> the pages that it then fills, and what they show
    "blocks": {
        "`block/loss_soft`, `block/loss_hard`": "error with sampled and with rounded weights, block after block",
        "`block/val_loss_soft`, `block/val_loss_hard`": "the same on held-out sequences, at the end of each pass",
        "`annealing/temperature`, `annealing/logit_scale`": "how decided the choice of levels has to be",
        "`learning_rate/logits`, `learning_rate/scales`": "of the level choices and of the scales",
        "`rounding/flip_rate`, `rounding/gap`": "share of codes that left their start; what the final rounding cost",
        "Histograms": "levels used, undecidedness in bits, change of the scales; one step a block",
        "Images: `weight_error`": "error of every weight matrix, one step a block",
    },
    "end_to_end": {"`end_to_end/...`": "divergence from the original, whole model"},
    "size": {"Images: `widths`": "bits of every matrix over depth, and where the bytes go"},
    "": {
        "`perplexity/...`": "after each phase",
        "`experts/...`": "tokens that routed experts saw, and how many keep their start; one step a block",
        "`zero_shot/...`": "tasks of lm-eval (the command `test`)",
        "HParams": "one row a run: point `--logdir` at the folder above several runs",
    },
}
ERROR = (
    "*Error* is the squared error of a block's output over the mean square of what it should be: 0.01 is one percent."
)


def log_recipe(loggers: Iterable[Logger], recipe: Mapping[str, Any]) -> None:
    """Shows the recipe under Text."""
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    for logger in _boards(loggers):
        logger.experiment.add_text("recipe", "".join(f"    {line}\n" for line in text.splitlines()))
        logger.save()


def log_figure(loggers: Iterable[Logger], name: str, figure: Figure) -> None:
    """Shows a figure under Images."""
    for logger in _boards(loggers):
        FigureCanvasAgg(figure)
        logger.experiment.add_figure(name, figure)
        logger.save()


def log_guide(loggers: Iterable[Logger], has: Collection[str]) -> None:
    """Shows what the other pages hold, under Text.

    Args:
        loggers: The run's loggers; those that are no TensorBoardLogger are passed over.
        has: Its phases, and ``size`` where a size chose its widths.
    """
    pages = [page for needed, pages in PAGES.items() if needed in ("", *has) for page in pages.items()]
    rows = [f"| {page} | {what} |" for page, what in pages]
    text = "\n".join(["| page | what it shows |", "|---|---|", *rows, *(["", ERROR] if "blocks" in has else [])])
    for logger in _boards(loggers):
        logger.experiment.add_text("what_you_see_here", text)
        logger.save()


def log_experts(loggers: Iterable[Logger], experts: Mapping[str, Mapping[str, Any]]) -> None:
    """Shows how many tokens the routed experts of each place saw: scalars, a histogram, and a picture of all places.

    Args:
        loggers: The run's loggers; those that are no TensorBoardLogger are passed over.
        experts: By place, in order, as in ``summary.json``; steps are their numbers.
    """
    boards = _boards(loggers)
    for step, own in enumerate(experts.values()):
        figures = {"experts/kept_start": len(own["kept_start"])} if "kept_start" in own else {}
        if "tokens" in own:
            figures |= {"experts/fewest_tokens": min(own["tokens"]), "experts/no_tokens": own["tokens"].count(0)}
        for logger in boards:
            for name, value in figures.items():
                logger.experiment.add_scalar(name, value, step)
            if "tokens" in own:
                logger.experiment.add_histogram("experts/tokens", torch.tensor(own["tokens"]), step)
    counted = {place: own["tokens"] for place, own in experts.items() if "tokens" in own}
    if boards and counted:
        log_figure(boards, "experts/tokens", _picture(counted))


def _picture(tokens: Mapping[str, Sequence[int]]) -> Figure:
    """Tokens of each expert, a row a place, brighter with each power of ten; experts without any are white."""
    counts = torch.full((len(tokens), max(map(len, tokens.values()))), float("nan"))
    for row, own in enumerate(tokens.values()):
        counts[row, : len(own)] = torch.tensor(own, dtype=torch.float32)
    counts[counts == 0] = float("nan")
    figure = Figure(figsize=(8, 1.5 + 0.25 * len(tokens)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(counts.log10().numpy(), aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(tokens)), list(tokens), fontsize=6)
    axes.set_xlabel("expert")
    figure.colorbar(image, ax=axes, label="calibration tokens, as a power of ten")
    return figure


def log_result(loggers: Iterable[Logger], recipe: Mapping[str, Any], figures: Mapping[str, float]) -> None:
    """Adds the run to the table under HParams.

    Args:
        loggers: The run's loggers; those that are no TensorBoardLogger are passed over.
        recipe: The run's recipe.
        figures: Its results, by name: the metrics of the row.
    """
    columns = {name: _found(recipe["settings"], path) for name, path in HYPERPARAMETERS.items()}
    for logger in _boards(loggers):
        logger.log_hyperparams(columns, {f"result/{name}": value for name, value in figures.items()})
        logger.save()


def _boards(loggers: Iterable[Logger]) -> list[TensorBoardLogger]:
    return [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]


def _found(settings: Mapping[str, Any], path: str) -> Any:
    value: Any = settings
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, str):
        return value.rpartition(".")[2]
    return value if isinstance(value, int | float) else str(value)
