"""Formats by name: those of the package, registered ones, and a class path; a format that is somebody else's."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lightning_gsq import export
from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export import (
    CheckReport,
    ExportedWeight,
    ExportFormat,
    ExportOptions,
    FinishedRun,
    PlannedRun,
    Runtime,
    registry,
)
from lightning_gsq.weights.ledger import Ledger, LedgerEntry

BUILT_IN = {"native", "dequantized", "compressed-tensors", "gptq", "gguf"}
WIDTH = 4


class Sizes(ExportFormat):
    """Stores how many weights a run has: what a format of one's own has to define."""

    name = "sizes"

    def refuse(self, run: PlannedRun) -> str | None:
        return None

    def write(self, run: FinishedRun, folder: Path, options: ExportOptions) -> Ledger:
        counts = {name: weight.shape[0] * weight.shape[1] for name, weight in run.weights.items()}
        (folder / "sizes.bin").write_bytes(b"".join(count.to_bytes(WIDTH, "little") for count in counts.values()))
        entries = (LedgerEntry(name, count, codes=8 * WIDTH) for name, count in counts.items())
        return Ledger(tuple(entries), {"sizes.bin": 0})

    def check(self, run: FinishedRun, folder: Path) -> CheckReport:
        size = (folder / "sizes.bin").stat().st_size
        return CheckReport("nothing", weights=(len(run.weights), size // WIDTH))

    def runtimes(self, weights: Sequence[ExportedWeight]) -> list[Runtime]:
        return [Runtime("hexdump", "sizes alone", "hexdump {folder}/sizes.bin")]

    def weight_files(self, folder: Path) -> list[Path]:
        return [folder / "sizes.bin"]


@pytest.fixture
def emptied(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_FORMATS", dict(registry._FORMATS))
    yield


def test_the_packages_formats_are_there_and_the_module_is_not_shadowed() -> None:
    assert set(export.all_formats()) >= BUILT_IN
    assert export.formats.__name__ == "lightning_gsq.export.formats"
    assert isinstance(export.format_of("gguf"), export.formats.GGUFFormat)


def test_a_registered_format_has_a_name(emptied: None) -> None:
    assert export.register(Sizes) is Sizes
    assert export.register(Sizes) is Sizes  # a module that is imported again
    assert isinstance(export.format_of("sizes"), Sizes)

    class Other(Sizes):
        pass

    with pytest.raises(ConfigurationError, match="are both called 'sizes'"):
        export.register(Other)
    with pytest.raises(ConfigurationError, match="is no subclass of"):
        export.register(int)  # type: ignore[type-var]


def test_a_class_path_names_a_format() -> None:
    assert isinstance(export.format_of("tests.export.test_registry.Sizes"), Sizes)
    assert export.format_of("lightning_gsq.export.formats.GGUFFormat") is export.format_of("gguf")
    assert export.format_of("GGUF") is export.format_of("gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module.Sizes", "the class no_such_module.Sizes cannot be imported"),
        ("tests.export.test_registry.Nothing", "cannot be imported"),
        ("pathlib.Path", "pathlib.Path is no subclass of lightning_gsq.export.ExportFormat"),
        ("compressed_tensors", "did you mean compressed-tensors"),
        ("", "there is no format ''"),
        ("Q4_K", r"Q4_K is a scheme: fit --model.scheme q4_k"),
        ("..x", "there is no format"),
    ],
)
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        export.format_of(name)
