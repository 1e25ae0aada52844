"""LightningCLI with this project's verbs: what each takes, and what it is given."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich.console import Console

from lightning_gsq.cli.arguments import rewritten
from lightning_gsq.cli.configs import DEFAULTS
from lightning_gsq.cli.defaults import TRAINER_DEFAULTS, native_precision
from lightning_gsq.cli.help import COMMON
from lightning_gsq.cli.messages import configuration_error
from lightning_gsq.cli.names import in_full
from lightning_gsq.cli.parser import PROGRAM, GSQArgumentParser
from lightning_gsq.cli.trainers import check_preset, check_seed, check_settings, latest_of_each_class, make_trainer
from lightning_gsq.cli.unusual import unusual
from lightning_gsq.cli.verbs import SUMMARIES, USAGE
from lightning_gsq.commands.export import export
from lightning_gsq.commands.file_types import FileTypes, is_asked_for, types_of_file
from lightning_gsq.commands.fit import fit
from lightning_gsq.commands.plan import plan
from lightning_gsq.commands.predict import predict
from lightning_gsq.commands.tables import print_types
from lightning_gsq.commands.test import test
from lightning_gsq.commands.validate import validate
from lightning_gsq.data import CalibrationDataModule, PerplexityData
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.system import sharding
from lightning_gsq.system.console import make_console
from lightning_gsq.training import EndToEndOptions, ModelQuantization
from lightning_gsq.weights.presets import is_name
from lightning_gsq.weights.scheme import QuantScheme


@dataclass(frozen=True)
class Verb:
    """What a subcommand takes.

    Args:
        run: The function whose remaining arguments and docstring are its options; None if there are none.
        given: Arguments of ``run`` that are no options.
        repeated: Options that can be given several times, with several values each.
        flags: Options that can be given without a value.
        trains: Takes the model, the data and a Trainer, with all their options.
    """

    run: Callable[..., Any] | None = None
    given: tuple[str, ...] = ("console",)
    repeated: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    trains: bool = False


PARTS = (
    "model",
    "data",
    "evaluation",
    "activations",
    "end_to_end",
    "trainer",
    "settings",
    "seed",
    "formats",
    "make_trainer",
    "console",
)
VERBS = {
    "fit": Verb(trains=True),
    "validate": Verb(validate, PARTS, trains=True),
    "plan": Verb(plan, PARTS, trains=True),
    "export": Verb(export, repeated=("format",), flags=("overwrite", "trust_remote_code")),
    "predict": Verb(predict, repeated=("prompt",)),
    "test": Verb(test, repeated=("tasks",), flags=("trust_remote_code",)),
}


class GSQCLI(LightningCLI):
    """LightningCLI whose ``fit`` runs a Trainer for every block.

    Groups of options: ``trainer`` (Lightning's own), ``model`` (the model and how to quantize it), ``data``
    (calibration text), ``evaluation`` (text for perplexity), ``activations`` (memory), ``end_to_end`` (the last phase).
    """

    trainer: Trainer
    parser_class: type[GSQArgumentParser] = GSQArgumentParser
    summary: dict[str, Any]
    """What ``fit`` found."""
    command = ""
    """The command line, for the recipe."""
    types: FileTypes | None = None
    """What weights have where their types are those of a file."""

    def __init__(self, args: list[str], console: Console | None = None) -> None:
        self.console = console or make_console()
        if args[:1] == ["fit"] and not self.command:
            self.command = f"lightning-gsq {shlex.join(args)}"
        self.all_help = "--help.all" in args
        args = ["--help" if argument == "--help.all" else argument for argument in args]
        # A parser of all options takes a second to build: only that of the verb, where it is one.
        self.verbs = [args[0]] if args[0] in VERBS else list(VERBS)
        self._logger: Logger | None = None
        super().__init__(
            ModelQuantization,
            CalibrationDataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=self.parser_class,
            parser_kwargs={
                "prog": PROGRAM,
                "description": "Quantize large language models to 1-4 bits a weight, block by block.",
            },
            args=args,
        )

    # -- options

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        self._subcommand_parsers = {}
        subcommands = parser.add_subcommands()
        recipe = {"default_config_files": [DEFAULTS]}
        for name in self.verbs:
            verb = VERBS[name]
            defaults = recipe if verb.trains else {}
            options = self.init_parser(description=SUMMARIES[name], **defaults)
            assert isinstance(options, GSQArgumentParser)  # as asked for above
            options.common = () if self.all_help else COMMON.get(name, ())
            if verb.trains:
                self._add_arguments(options)
                options.accept_name("model.scheme", dataclasses.asdict(QuantScheme()), "preset", is_name)
            if verb.run is not None:
                options.add_signature(verb.run, set(verb.given), verb.repeated, verb.flags)
            self._subcommand_parsers[name] = options
            subcommands.add_subcommand(name, options, help=SUMMARIES[name])
            options.prog = f"{parser.prog} {name}"
            options.usage = f"{options.prog} {USAGE.get(name, 'MODEL')} [options]"

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

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Reads the arguments that ``main`` was given; Lightning's own warns that they are not those of the process."""
        assert isinstance(args, list)  # as main gives them
        self.config = parser.parse_args(rewritten(args))

    # -- objects

    @property
    def settings(self) -> Namespace:
        """The resolved options of the verb."""
        settings: Namespace = self.config[self.subcommand]
        return settings

    @property
    def objects(self) -> Namespace:
        """The same, where classes are asked for with their instances."""
        objects: Namespace = self.config_init[self.subcommand]
        return objects

    def _set_seed(self) -> None:
        if VERBS[str(self.subcommand)].trains:
            check_seed("seed_everything", self.settings.seed_everything)
            super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Settles the precision, so that the recipe says which it was, and which phases a strategy is for."""
        if not VERBS[str(self.subcommand)].trains:
            return
        trainer = self.settings.trainer
        check_settings(trainer)
        model = self.settings.model
        if is_asked_for(model.scheme.as_dict()):
            self.types = None if self.subcommand == "validate" else types_of_file(model.as_dict())
            for name, value in ({"scheme.preset": None} if self.types is None else self.types.options).items():
                model[name] = value
        check_preset(model.scheme)
        trainer.callbacks = latest_of_each_class(trainer.callbacks)
        if sharding.asked_for(trainer.strategy):
            trainer.strategy, self.settings.end_to_end.strategy = "ddp", sharding.FSDP2
        if trainer.precision is None:
            trainer.precision = native_precision(str(trainer.accelerator))

    def instantiate_classes(self) -> None:
        """Makes the model, the data and a Trainer, for the verbs that take them."""
        if not VERBS[str(self.subcommand)].trains:
            return
        try:
            super().instantiate_classes()
        except ValueError as error:  # in which jsonargparse wraps what a class says of its arguments
            own = configuration_error(error)
            if own is None:
                raise
            options = [name.removeprefix("--") for name in self._parser(self.subcommand)._option_string_actions]
            raise ConfigurationError(in_full(str(own), options)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A new Trainer with the user's settings; all Trainers of a run share one logger and the callbacks."""
        config = {**self.objects.trainer, **kwargs}
        config["callbacks"] = list(config.get("callbacks") or [])
        if config.get("logger") in (None, True):
            if self._logger is None:
                self._logger = TensorBoardLogger(config["default_root_dir"], name="", version="tensorboard")
            config["logger"] = self._logger
        return make_trainer(config)

    def evaluation_trainer(self) -> Trainer:
        """A Trainer that only evaluates: neither logger nor callbacks."""
        return self.instantiate_trainer(logger=False, callbacks=[])

    # -- verbs

    def _run_subcommand(self, subcommand: str) -> None:
        verb = VERBS[subcommand]
        if verb.trains:
            getattr(self, subcommand)()
        elif verb.run is not None:
            options = {name: value for name, value in self.settings.as_dict().items() if name != "config"}
            verb.run(**options, console=self.console)

    def fit(self) -> None:
        """Quantizes the model into the run folder."""
        for line in unusual(self.model, self.objects.trainer.callbacks or []):
            self.console.print(line, soft_wrap=True)
        if self.types is not None and not self.trainer.global_rank:
            print_types(self.console, self.types)
        self.summary = fit(
            model=self.model,
            data=self.datamodule,
            evaluation=self.objects.evaluation,
            activations=self.objects.activations,
            end_to_end=self.objects.end_to_end,
            make_trainer=self.instantiate_trainer,
            make_evaluation_trainer=self.evaluation_trainer,
            settings=self.plain_settings(),
            seed=int(self.settings.seed_everything),
            console=self.console,
            formats=self.settings.export,
            command=self.command,
        )

    def plain_settings(self) -> dict[str, Any]:
        """The resolved settings as plain data, for the recipe."""
        plain: dict[str, Any] = yaml.safe_load(
            self._parser(self.subcommand).dump(self.settings, skip_none=False, skip_validation=True)
        )
        return plain

    def validate(self) -> None:
        """Prints the perplexity of a model, or of the model in a finished run folder."""
        validate(
            self.model,
            self.objects.evaluation,
            self.objects.activations,
            self.evaluation_trainer,
            self.console,
            against=self.settings.against,
        )

    def plan(self) -> None:
        """Prints what ``fit`` would take."""
        if self.types is not None:
            print_types(self.console, self.types)
        plan(
            self.model,
            self.datamodule,
            self.objects.evaluation,
            self.objects.activations,
            self.objects.end_to_end,
            self.evaluation_trainer(),
            self.plain_settings(),
            int(self.settings.seed_everything),
            self.settings.export,
            self.console,
            probe=self.settings.probe,
            host_memory_gb=self.settings.host_memory_gb,
            device_memory_gb=self.settings.device_memory_gb,
        )
