"""The command line: ``python -m lightning_gsq fit | validate | plan | export | predict``, on LightningCLI."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich.console import Console

from lightning_gsq import loading, sharding
from lightning_gsq.data import ActivationOptions, CalibrationDataModule, PerplexityData
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.command import export
from lightning_gsq.fit import fit
from lightning_gsq.modules import EndToEndOptions, ModelQuantization, NonFiniteLossError
from lightning_gsq.perplexity import make_measure
from lightning_gsq.plan import estimate, limits, print_estimate
from lightning_gsq.predict import predict
from lightning_gsq.ranks import Ranks, check_shares

TRAINER_DEFAULTS = {
    "default_root_dir": "runs/quantized",
    "max_epochs": 1,
    "precision": None,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "inference_mode": False,  # torch.no_grad is enough, and compiles nothing a second time
    "use_distributed_sampler": False,  # each process has its share of the sequences already
    "log_every_n_steps": 5,
}
EXIT_USAGE, EXIT_FAILURE, EXIT_INTERRUPTED = 2, 1, 130


@dataclass(frozen=True)
class Command:
    """A subcommand that needs no Trainer.

    Args:
        run: What it does; its signature and docstring are its options. It also gets the console.
        summary: One line for ``--help``.
        repeated: Options that can be given several times, with several values each.
        flags: Options that can be given without a value.
    """

    run: Callable[..., Any]
    summary: str
    repeated: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def add_arguments(self, parser: LightningArgumentParser) -> None:
        """Adds its options to its parser."""
        parser.add_function_arguments(self.run, skip={"console", *self.repeated, *self.flags})
        explained = {p.arg_name: p.description for p in parse_docstring(self.run.__doc__ or "").params}
        for name in self.repeated:
            required = inspect.signature(self.run).parameters[name].default is inspect.Parameter.empty
            settings: dict[str, Any] = {"type": str, "nargs": "+", "action": "extend", "required": required}
            parser.add_argument(f"--{name}", **settings, help=explained[name])
        for name in self.flags:
            parser.add_argument(f"--{name}", action=ActionYesNo, nargs="?", default=False, help=explained[name])


COMMANDS = {
    "export": Command(export, "Write a finished run as files that other programs load.", ("format",), ("overwrite",)),
    "predict": Command(predict, "Write text from prompts.", ("prompt",)),
}


class GSQArgumentParser(LightningArgumentParser):
    """Prints an error alone, without two pages of usage, and names the nearest option to one that does not exist."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with exit code 2."""
        known = {
            name.removeprefix("--") for parser in [self, *self._parsers()] for name in parser._option_string_actions
        }
        unknown = (
            re.findall(r"option '([^']+)'|--([\w.]+)", message)
            if "not accept" in message or "nrecognized" in message
            else []
        )
        for name in ("".join(parts) for parts in unknown):
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            if nearest:
                message += f"\ndid you mean {nearest[0]!r}?"
        command = next((name for name in sys.argv[1:] if name in COMMANDS), "fit")
        self.exit(EXIT_USAGE, f"error: {message}\n(every option: python -m lightning_gsq {command} --help)\n")

    def _parsers(self) -> list[LightningArgumentParser]:
        subcommands = getattr(self, "_subcommands_action", None)
        return list(subcommands._name_parser_map.values()) if subcommands is not None else []


class PlanningTrainer(Trainer):
    """Lightning's Trainer; its further methods are the further commands, and say what arguments they take."""

    def plan(
        self, probe: bool = True, host_memory_gb: float | None = None, device_memory_gb: float | None = None
    ) -> None:
        """Say what ``fit`` would take with the same options: sizes, memory, disk, steps, time.

        Args:
            probe: Measure a few steps on one block of random weights, for an estimate of the time.
            host_memory_gb: Plan for a machine with this much memory, in gigabytes (10^9 bytes); null for this one.
            device_memory_gb: Plan for an accelerator with this much memory; null for this machine's.
        """


class GSQCLI(LightningCLI):
    """LightningCLI whose ``fit`` runs a Trainer for every block.

    Groups of options: ``trainer`` (Lightning's own), ``model`` (the model and how to quantize it), ``data``
    (calibration text), ``evaluation`` (text for perplexity), ``activations`` (memory), ``end_to_end`` (the last phase).
    """

    trainer: Trainer

    def __init__(self, args: list[str] | None = None) -> None:
        self.console = Console(highlight=False)
        self._logger: Logger | None = None
        super().__init__(
            ModelQuantization,
            CalibrationDataModule,
            trainer_class=PlanningTrainer,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=GSQArgumentParser,
            parser_kwargs={
                "prog": "python -m lightning_gsq",
                "description": "Quantize large language models to 1-4 bits a weight, block by block.",
                "fit": {"description": "Quantize a model into a run folder (--trainer.default_root_dir)."},
                "validate": {
                    "description": "Measure the perplexity of a model, a finished run folder or an exported one."
                },
                "plan": {"description": "Say what fit would take with the same options, without doing it."},
            },
            args=args,
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name, command in COMMANDS.items():
            own = self.init_parser(prog=f"{kwargs.get('prog', parser.prog)} {name}", description=command.summary)
            command.add_arguments(own)
            self._subcommand_parsers[name] = own
            subcommands = parser._subcommands_action
            assert subcommands is not None  # made by the call above
            subcommands.add_subcommand(name, own, help=command.summary)

    def _set_seed(self) -> None:
        if self.subcommand not in COMMANDS:
            super()._set_seed()

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand in COMMANDS:
            COMMANDS[subcommand].run(**command_arguments(self.config[subcommand]), console=self.console)
        else:
            super()._run_subcommand(subcommand)

    def instantiate_classes(self) -> None:
        """Makes the model, the data and a Trainer, for the commands that take them."""
        if self.subcommand not in COMMANDS:
            super().instantiate_classes()

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and the Trainer arguments that they do not take."""
        skip = {"model", "datamodule", "ckpt_path", "weights_only", "verbose"}
        return {
            "fit": {*skip, "train_dataloaders", "val_dataloaders"},
            "validate": {*skip, "dataloaders"},
            "plan": set(),
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the groups that are not Lightning's."""
        parser.add_lightning_class_args(PerplexityData, "evaluation")
        parser.add_class_arguments(ActivationOptions, "activations")
        parser.add_argument(
            "--export",
            type=list[str],
            default=[],
            help="Formats that fit exports the finished run to, into its folder export; as of the command export.",
        )
        parser.add_class_arguments(EndToEndOptions, "end_to_end")

    def before_instantiate_classes(self) -> None:
        """Settles the precision, so that the recipe says which it was, and which phases a strategy is for."""
        if self.subcommand in COMMANDS:
            return
        settings = self.config[self.subcommand]
        trainer = settings.trainer
        if sharding.asked_for(trainer.strategy):
            trainer.strategy, settings.end_to_end.strategy = "ddp", sharding.FSDP2
        if trainer.precision is None:
            trainer.precision = native_precision(str(trainer.accelerator))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A new Trainer with the user's settings; all Trainers of a run share one logger and the callbacks."""
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        config["callbacks"] = list(config.get("callbacks") or [])
        if config.get("logger") in (None, True):
            if self._logger is None:
                self._logger = TensorBoardLogger(config["default_root_dir"], name="", version="tensorboard")
            config["logger"] = self._logger
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PlanningTrainer(**config)

    def evaluation_trainer(self) -> Trainer:
        """A Trainer that only evaluates: neither logger nor callbacks."""
        return self.instantiate_trainer(logger=False, callbacks=[])

    def fit(self, model: ModelQuantization, datamodule: CalibrationDataModule) -> None:
        """Quantizes the model into the run folder."""
        settings = self.config[self.subcommand]
        fit(
            model=model,
            data=datamodule,
            evaluation=self.config_init[self.subcommand].evaluation,
            activations=self.config_init[self.subcommand].activations,
            end_to_end=self.config_init[self.subcommand].end_to_end,
            make_trainer=self.instantiate_trainer,
            make_evaluation_trainer=self.evaluation_trainer,
            settings=as_plain(self._parser(self.subcommand), settings),
            seed=int(settings.seed_everything),
            console=self.console,
            formats=settings.export,
        )

    def validate(self, model: ModelQuantization, datamodule: CalibrationDataModule) -> None:
        """Prints the perplexity of a model, or of the model in a finished run folder."""
        evaluation: PerplexityData = self.config_init[self.subcommand].evaluation
        source = loading.resolve(loading.finished_model(model.pretrained), model.revision, model.trust_remote_code)
        evaluation.check(loading.max_length(loading.load_config(source, quantized=True)))
        model.load(source, quantized=True)
        evaluation.tokenize(model.tokenizer, model.network)
        trainer = self.evaluation_trainer()
        room = limits.device_bytes(trainer.strategy.root_device)
        check_shares(trainer.world_size, evaluation__num_windows=len(evaluation.ids_NT))
        console = self.console if trainer.global_rank == 0 else Console(quiet=True)
        say = functools.partial(console.print, soft_wrap=True)
        activations = self.config_init[self.subcommand].activations
        with Ranks.joined(trainer) as ranks:
            perplexity = make_measure(model, evaluation, activations, self.evaluation_trainer, room, say, ranks)()
        windows, length = evaluation.ids_NT.shape
        started = "" if evaluation.start is None else ", the first of them BOS"
        console.print(f"perplexity {perplexity:.3f}  ({windows} windows of {length} tokens{started})")

    def plan(
        self,
        model: ModelQuantization,
        datamodule: CalibrationDataModule,
        probe: bool,
        host_memory_gb: float | None,
        device_memory_gb: float | None,
    ) -> None:
        """Prints what ``fit`` would take.

        Raises:
            ConfigurationError: it does not fit.
        """
        settings = self.config_init[self.subcommand]
        host, device = (None if gb is None else gb * 1e9 for gb in (host_memory_gb, device_memory_gb))
        trainer = self.evaluation_trainer()
        own = (settings.evaluation, settings.activations, settings.end_to_end)
        found = estimate(model, datamodule, *own, trainer, probe, host, device)
        print_estimate(self.console, found, datamodule, model.pretrained)
        limits.refuse(found.problems)


def command_arguments(settings: Namespace) -> dict[str, Any]:
    """A command's settings as keyword arguments."""
    return {key: value for key, value in settings.as_dict().items() if key != "config"}


def native_precision(accelerator: str) -> str:
    """``bf16-mixed`` where the hardware multiplies bfloat16 natively, else ``32-true``."""
    if accelerator in {"auto", "gpu", "cuda"} and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


def as_plain(parser: LightningArgumentParser, settings: Namespace) -> dict[str, Any]:
    """The resolved settings as plain data."""
    import yaml

    plain: dict[str, Any] = yaml.safe_load(parser.dump(settings, skip_none=False, skip_validation=True))
    return plain


def quiet_libraries() -> None:
    """Silences what dozens of Trainers would repeat: banners, tips and advice on data loader workers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.pytorch.accelerators.cuda",
        "lightning.fabric",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*The number of training batches.*",
        ".*module.s. in eval mode at the start.*",
        ".*isinstance.treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main(args: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if args is None else args
    quiet_libraries()
    errors = Console(stderr=True, highlight=False)
    try:
        if not arguments:
            arguments, args = ["--help"], ["--help"]
        GSQCLI(args)
    except (ConfigurationError, NonFiniteLossError) as error:
        errors.print(f"error: {error}", markup=False, soft_wrap=True)
        return EXIT_USAGE if isinstance(error, ConfigurationError) else EXIT_FAILURE
    except KeyboardInterrupt:
        errors.print("stopped; the same command resumes after the last finished block or phase")
        return EXIT_INTERRUPTED
    return 0
