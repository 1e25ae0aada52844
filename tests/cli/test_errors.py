"""One line an error: which option, what it got, what it takes, the nearest name; and a traceback on demand."""

import errno
import threading
from pathlib import Path

import jinja2
import pytest

from lightning_gsq.cli import entry, errors, main
from lightning_gsq.cli.listings import option_names
from lightning_gsq.cli.names import nearest, unknown_option
from lightning_gsq.errors import ConfigurationError, ProcessLostError


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """The one line that a command ends with, which has exit code 2."""

    def run(*arguments: str) -> str:
        try:
            code = main(list(arguments))
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 2
        assert len(lines) == 1, lines
        return lines[0].removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("fit", "name the model, right after the verb (python -m lightning_gsq fit --help)"),
        ("predict", "name the model, right after the verb (python -m lightning_gsq predict --help)"),
        ("export run", "--format has to be given (python -m lightning_gsq export --help)"),
        ("fit m --bits 3", "there is no option --bits; did you mean --model.scheme.bits? (python -m lightning_gsq fit"),
        ("validate m --device cpu", "--device; did you mean --trainer.accelerator? (python -m lightning_gsq validate"),
        ("fit m --model.scheme q4k", "model.scheme: there is no preset 'q4k'; the nearest is q4_k"),
        ("fit m --model.warm_start FromFile", "--model.warm_start.file has to be given (python -m lightning_gsq fit"),
        (
            "fit m --model.warm_start FromFile --model.warm_start.file no.gguf",
            "model.warm_start.file: no.gguf cannot be read",
        ),
        (
            "fit m --model.scheme file",
            "model.scheme: file takes every weight's type from a GGUF file, which --model.warm_",
        ),
        ("plan m --model.scheme file --model.warm_start GPTQ", "names; the warm start is GPTQ. Or name a type"),
        (
            "fit m --model.scheme.preset File --model.size 80MB",
            "model.size: 80MB and --model.scheme file both say what",
        ),
        (
            "fit m --model.scheme file --model.scheme.bits 4",
            "model.scheme.bits: 4 and --model.scheme file both say what",
        ),
        ("fit m --model.scheme q4_k --model.size 80MB", "model.scheme q4_k one to all; leave one of the two out"),
        (
            "fit m --model.warm_start FromFile --model.warm_start.rounding fromfile",
            "model.warm_start.rounding: FromFile rounds nothing",
        ),
        (
            "fit m --model.embedding file",
            "file stands for the types of --model.warm_start.file in --model.scheme alone",
        ),
        ("fit m --model.scheme.bits abc", "model.scheme.bits: expected a whole number or ternary, got 'abc'"),
        ("fit m --data.num_sequences ten", "data.num_sequences: expected a whole number, got 'ten'"),
        ("fit m --model.gumbel.backend x", "model.gumbel.backend: expected auto, triton, compile, eager, got 'x'"),
        (
            "fit m --model.warm_start no",
            "there is no class 'no' of this kind; choose from GPTQ, RTN, DualMode, ",
        ),
        ("fit m --model.warm_start torch.optim.Adam", "there is no class 'torch.optim.Adam' of this kind"),
        ("fit m --model.warm_start.wight 1", "there is no argument 'wight'; LeastSquares takes"),
        ("fit m --model.optimizer.lr abc", "model.optimizer.lr: expected a number, got 'abc'"),
        ("fit m --model.overrides {a:{bitz:3}}", "model.overrides: "),
        ("fit m --model.optimizer lightning_gsq.optim.Lion", "is now lightning_gsq.training.Lion; write that"),
        ("fit m --model.warm_start lightning_gsq.sage.DualMode", "is now lightning_gsq.quantizers.DualMode"),
        (
            'fit m --model.scheme.salient {"ratio":2}',
            "salient.ratio must be a share of the weights, 0 to below 1",
        ),
        ("fit m --seed_everything -1", "seed_everything must be a number from 0 to 4294967295, got -1"),
        ("fit m --seed_everything false", "seed_everything must be a number from 0 to 4294967295, got false"),
        ("fit m --model.phases blocks,blocks", "model.phases: a run has each phase once"),
        ("fit m --model.phases end_to_end,blocks", "in the order init, blocks, end_to_end"),
        ("fit m --activations.memory_limit_gb -1", "activations.memory_limit_gb must not be negative, got -1"),
        ("fit m --trainer.accumulate_grad_batches 0", "trainer.accumulate_grad_batches must be at least 1, got 0"),
        ("plan m --trainer.accumulate_grad_batches -1", "trainer.accumulate_grad_batches must be at least 1, got -1"),
        ("fit m --trainer.max_epochs 0", "trainer.max_epochs must be at least 1, or -1 for no such limit, got 0"),
        ("fit m --trainer.max_steps -5", "trainer.max_steps must be at least 1, or -1 for no such limit, got -5"),
        ("fit m --trainer.limit_train_batches 0", "trainer.limit_train_batches must be a number of batches"),
        ("validate m --trainer.limit_val_batches 0.5", "trainer.limit_val_batches: 0.5 would measure on a part"),
        ("fit m --trainer.limit_val_batches 0", "trainer.limit_val_batches: 0"),
        ("fit m --trainer.fast_dev_run true", "trainer.fast_dev_run: true would measure on a part"),
        ("fit m --trainer.gradient_clip_val -1", "trainer.gradient_clip_val must be positive"),
        ("fit m --trainer.log_every_n_steps -1", "trainer.log_every_n_steps must not be negative"),
        ("fit m --trainer.default_root_dir=", "trainer.default_root_dir is empty: name the run folder"),
        ("fit m --trainer.accelerator cpu --trainer.devices abc", "trainer.devices=abc: "),
        ("fit m --trainer.accelerator cpu --trainer.devices 0", "trainer.devices=0: "),
        ("fit m --trainer.num_nodes 0", "trainer.num_nodes must be at least 1, got 0"),
        ("fit m --trainer.strategy nonsense", "trainer.strategy=nonsense: "),
        ("fit m --trainer.accelerator quantum", "trainer.accelerator=quantum: "),
        ("fit m --trainer.profiler X", "trainer.profiler=X: "),
        ("predict m --prompt a --seed -1", "seed must be a number from 0 to 4294967295, got -1"),
        ("predict m --prompt a --device meta", "device: meta holds no numbers; use cpu, or cuda"),
        ("fit " + "x" * 500, "File name too long"),
        ("fit m --model.scheme.bits 16", "model.scheme.bits must be 1 to 8 or 'ternary', got 16"),
        ("fit m --model.scheme.group_size 0", "model.scheme.group_size must be a positive number"),
        ("fit m --model.device_map auto", "did you mean --trainer.accelerator?"),
        ("fit m --model.some_thing 3", "there is no option --model.some_thing (python"),
        ("fit m --data wikitext2", "a data set of the hub as organisation/name"),
        ("quantize m", "there is no verb 'quantize'; did you mean fit? The verbs are fit, validate, plan, export,"),
        ("exprot m", "there is no verb 'exprot'; did you mean export?"),
        ("some-model", "there is no verb 'some-model'; a verb comes first, then the model. The verbs are fit, "),
        ("fit m n", "fit takes one model, got m and n; values of a list are joined by commas"),
        ("fit m --export gguf native", "fit takes one model, got m and native; values of a list are joined"),
        ("plan m --model n", "plan takes one model, got m and n"),
        (
            "plan --model /no/m.gguf --model /no/n.gguf",
            "there is no file or folder /no/n.gguf",
        ),
        ("predict m --model.dtype float16", "there is no option --model.dtype; did you mean --dtype?"),
    ],
)
def test_one_line(arguments: str, line: str, refused) -> None:
    assert line in refused(*arguments.split())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("fit m --bits 3", "did you mean --model.scheme.bits? (python -m lightning_gsq fit --help)"),
        ("fit m --data.bits 2 --w_bit=3", "did you mean --model.scheme.bits?"),
        ("predict m --max_tokens 3", "did you mean --max_new_tokens?"),
        ("fit m --data.source --bits", None),  # a value, however it looks
        ("fit m --model.anything 3 --optimizer.lr 3", "did you mean --model.optimizer.lr?"),
        ("fit m --seed 3 --data+ x --print_config", None),
        ("fit m --model.schem.bits 3", None),  # of a group that there is: the parser knows its classes
    ],
)
def test_an_option_of_no_group_ends_before_the_libraries_are_loaded(arguments: str, line: str | None) -> None:
    words = arguments.split()
    said = unknown_option(words, option_names(words[0]))
    assert line is None if said is None else line is not None and line in said
    assert unknown_option(words, ()) is None  # where nothing says which options there are


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            b"model:\n  schem:\n    bits: 2\n",
            "the configuration sets model.schem.bits, which is no option; did you mean model.scheme.bits?",
        ),
        ("model: {pretrained: caf\u00e9}\n".encode("latin-1"), "is not UTF-8 text (byte 23)"),
        (b"[1, 2]\n", "holds no settings by name"),
        (b"model: {pretrained: [\n", "is no YAML"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "cannot be used"),
        (b"model: {optimizer: {class_path: lightning_gsq.optim.Adam}}\n", "is now lightning_gsq.training.Adam"),
        (b"model: {trust_remote_code: true}\n", "which no file can allow; if you trust it"),
        (b"fit: {model: {trust_remote_code: true}}\n", "which no file can allow; if you trust it"),
        (
            b"x: &a [1, 2]\n"
            + b"".join(
                b"x%d: &b%d [%s]\n" % (i, i, b", ".join([b"*b%d" % (i - 1) if i else b"*a"] * 9)) for i in range(9)
            ),
            "stands for more than 200,000 values",
        ),
    ],
    ids=["unknown", "latin-1", "list", "broken", "deep", "moved", "remote code", "in a verb", "bomb"],
)
def test_files_that_are_no_configuration(content: bytes, line: str, refused, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_bytes(content)
    assert line in refused("fit", "m", "--config", str(tmp_path / "my.yaml"))


def test_a_text_in_place_of_settings_is_not_printed(refused, corpus: Path) -> None:
    assert len(refused("fit", "m", "--model.scheme", str(corpus))) < 400


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("bits", "model.scheme.bits"),
        ("group_size", "model.scheme.group_size"),
        ("output_dir", "trainer.default_root_dir"),
        ("nsamples", "data.num_sequences"),
        ("seqlen", "data.sequence_length"),
        ("dataset", "data.source"),
        ("calib", "data.source"),
        ("model.scheme.bit", "model.scheme.bits"),
        ("model.bits", "model.scheme.bits"),
        ("num_sequence", "data.num_sequences"),
        ("data.nsample", "data.num_sequences"),
        ("num_calibration_samples", "data.num_sequences"),
        ("model.scheme.sym", "model.scheme"),
        ("act_order", None),
        ("trainer.lr", "model.optimizer.lr"),
        ("zzzzzz", None),
    ],
)
def test_nearest(name: str, option: str | None) -> None:
    options = {"model.scheme.bits", "model.scheme.group_size", "trainer.default_root_dir", "data.num_sequences"}
    options |= {"data.sequence_length", "data.source", "model.dtype", "model.scheme", "model.optimizer"}
    assert nearest(name, options) == option


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigurationError("so: not"), 2, "so: not"),
        (ProcessLostError("gone"), 1, "gone"),
        (jinja2.TemplateError("no system role"), 2, "the tokenizer's chat template cannot be used: no system role"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "File name too long: x"),
        (OSError(errno.ENOSPC, "No space left on device", "y"), 1, "No space left on device: y"),
        (RecursionError("maximum"), 2, "a file or an option is nested too deeply to be read (maximum)"),
        (MemoryError(), 1, "this machine has too little memory: plan says how much is needed"),
    ],
)
def test_kinds_of_errors(error: Exception, code: int, line: str) -> None:
    assert errors.line_of(error) == (code, line)


def test_a_disk_that_fails_says_what_is_lost() -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    code, line = errors.line_of(error)
    assert code == 1 and line.startswith("No space left on device: what was finished is kept, and the same command")


def test_a_thread_that_cannot_write_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As TensorBoard's writer, which runs in one."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back afterwards
    main(["plan", "nowhere", "--data.num_sequences", "0"])
    capsys.readouterr()

    def fail(error: Exception) -> None:
        raise error

    for error in (OSError(errno.EFBIG, "File too large"), ValueError("a mistake")):
        thread = threading.Thread(target=fail, args=(error,))
        thread.start()
        thread.join()
        shown = capsys.readouterr().err
        assert ("Traceback" in shown) == isinstance(error, ValueError), shown
        assert str(error.args[-1]) in shown


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["predict", "m", "--prompt", "a", "--seed", "-1"]
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main([*arguments, "--debug"]) == 2
    output = capsys.readouterr().err
    assert "Traceback" in output and output.splitlines()[-1].startswith("error: seed must be")


def test_mistakes_of_the_program_are_shown_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("mine")

    monkeypatch.setattr(errors, "GSQCLI", broken)
    with pytest.raises(KeyError, match="mine"):
        main(["fit", "m"])


def test_version_and_overview_load_no_library() -> None:
    import subprocess
    import sys

    code = "import sys; from lightning_gsq.cli import main; main(['--version']); main(['--help']); "
    code += "print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.startswith("lightning-gsq ") and "predict MODEL --prompt TEXT" in output
    assert output.splitlines()[-1] == "False"
    assert entry.main is main
