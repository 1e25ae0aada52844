"""What the end-to-end phase leaves on the disk, and whether all of it is there and what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.run.block_files import OUTER, Blocks, DamagedFileError, Expected
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.matrices import as_stored
from lightning_gsq.run.recipe import compare
from lightning_gsq.run.run import Run
from lightning_gsq.training import EndToEndQuantization


@dataclass(frozen=True)
class EndToEndResult:
    """What the phase found.

    Args:
        report: ``start`` and ``final`` held-out losses, ``rejected``, ``seconds``, ``settings``, ``blocks`` (what it
            began with), ``weights`` (digests of what it ended with), ``made_by``.
        dense: Norms and head if they trained, fp32 by parameter name.
    """

    report: dict[str, Any]
    dense: dict[str, Tensor]

    @property
    def rejected(self) -> bool:
        """Whether no state was better than what it began with."""
        return bool(self.report["rejected"])


def refuse_other_settings(folder: RunFolder, report: dict[str, Any], settings: dict[str, Any]) -> None:
    """Verifies that a finished phase had these settings.

    Raises:
        ConfigurationError: it had not.
    """
    differences = compare(report["settings"], settings, "end_to_end.")
    if differences:
        raise ConfigurationError(
            f"end_to_end: {folder.root} holds a finished end-to-end phase of another kind; delete "
            f"{folder.dense_file('end_to_end')} to have it run again. What differs:\n"
            + "\n".join(f"  {line}" for line in differences)
        )


def on_disk(folder: RunFolder, say: Callable[[str], None]) -> EndToEndResult | None:
    """What a finished phase left in its own file; None where there is none that can be used."""
    try:
        content = folder.read_dense("end_to_end")
    except DamagedFileError as error:
        say(str(error))
        return None
    if content is None or not {"settings", "blocks", "weights", "rejected", "seconds"} <= set(content[1]):
        return None
    return EndToEndResult(content[1], content[0])


def finished_phase(run: Run, settings: dict[str, Any], blocks: str) -> EndToEndResult | None:
    """The finished phase, if all of it is there and began with these blocks; says what has to be made again."""
    result = on_disk(run.folder, run.say)
    if result is None:
        return None
    refuse_other_settings(run.folder, result.report, settings)
    again = "; the phase is run again"
    if result.report["blocks"] != blocks:
        run.say(f"The end-to-end phase began with other codes and scales than those of the blocks now{again}")
        return None
    parameters = dict(run.model.network.named_parameters(remove_duplicate=False))
    for name, value in result.dense.items():
        if name not in parameters or parameters[name].shape != value.shape:
            run.say(
                f"{run.folder.dense_file('end_to_end')} holds {name} in a shape that the model does not have{again}"
            )
            return None
    files: dict[int | str, Expected] = {plan.index: plan.expected for plan in run.plan}
    if outer := run.model.outer.expected(run.model.network):
        files[OUTER] = outer
    for index, expected in () if result.rejected else files.items():
        header = run.folder.header("end_to_end", index)
        try:
            run.folder.read_block("end_to_end", index, expected)
        except DamagedFileError as error:
            run.say(str(error))
            return None
        if header is None or result.report["weights"].get(str(index)) != header.digest:
            run.say(f"{run.folder.block_file('end_to_end', index)} is not what the end-to-end phase ended with{again}")
            return None
    return result


def write_blocks(run: Run, module: EndToEndQuantization, outer: bool) -> dict[str, str]:
    """Writes the blocks, and what is quantized outside of them, as they have trained; digests by number."""
    digests = {}

    def write(index: int | str, stored: Blocks) -> None:
        run.folder.write_block("end_to_end", index, stored)
        header = run.folder.header("end_to_end", index) if run.ranks.first else None
        digests[str(index)] = "" if header is None else header.digest

    for index, tensors in module.tensors():
        block, name = run.blocks[index], run.plan_of[index].name
        originals = {site.name: site.to_matrix(block.get_parameter(site.name)) for site in run.plan_of[index].weights}
        stored = {key: as_stored(tensors[key], w_OI, f"{name}.{key}") for key, w_OI in originals.items()}
        write(index, stored)
    if outer:
        network = run.model.network
        write(OUTER, {n: as_stored(t, network.get_parameter(n), n) for n, t in module.outer_tensors().items()})
    return digests
