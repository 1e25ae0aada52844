"""Streams of hidden states, and what goes with them, against the model's own forward pass."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning_gsq.data import CalibrationDataModule, TextFile
from torch import Tensor

from lightning_gsq.cli.defaults import QUIET_TRAINER
from lightning_gsq.models.chain import find_blocks, hidden_of
from lightning_gsq.quantizers import GumbelOptions, GumbelQuantizer
from lightning_gsq.quantizers.rtn import RTN
from lightning_gsq.run.block_plan import make_plan
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.forward_passes import arguments_of, embedded, hidden_store, propagate, working_copy
from lightning_gsq.run.hidden_states import ActivationOptions
from lightning_gsq.run.run import Run, make_run
from lightning_gsq.system.seeding import generator_of
from lightning_gsq.training import BlockQuantization, ModelQuantization
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.decoders import DECODERS
from tests.support.tiny import FAMILIES

SEQUENCES, TOKENS = 5, 24
IN_FILES = ActivationOptions(memory_limit_gb=0.0)


def made_run(name: str, folder: Path, activations: ActivationOptions = ActivationOptions()) -> Run:  # noqa: B008
    model = ModelQuantization("tiny", scheme=QuantScheme(4, 16))
    model.network = {**FAMILIES, **DECODERS}[name]()
    data = CalibrationDataModule(TextFile("none.txt"), num_sequences=SEQUENCES, sequence_length=TOKENS)
    data.train_ids_NT = torch.randint(0, 250, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(2))

    def make_trainer() -> Trainer:
        return Trainer(accelerator="cpu", precision="32-true", logger=False, **QUIET_TRAINER)

    plan, run_folder = make_plan(model), RunFolder(folder / "run")
    return make_run(model, data, plan, run_folder, {}, make_trainer, activations, 0, lambda _: None)


def _outputs(run: Run) -> list[Tensor]:
    """What leaves each block inside the model, for all sequences."""
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, o: outputs.append(hidden_of(o))) for block in run.blocks]
    with torch.no_grad():
        run.model.network(run.train_ids_NT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [run.calls[0].layout.pack(output) for output in outputs]


@pytest.mark.parametrize("name", ["llama", "gemma3n", "gemma4", "bloom", "xglm", "dbrx", "openai_gpt"])
@pytest.mark.parametrize("activations", [ActivationOptions(), IN_FILES], ids=["memory", "files"])
def test_a_stream_is_the_model(name: str, activations: ActivationOptions, tmp_path: Path) -> None:
    run = made_run(name, tmp_path, activations)
    with hidden_store((SEQUENCES, TOKENS, run.width), activations, streams=1) as store:
        stream = embedded(run.model.network, run.train_ids_NT, store)
        for index, wanted in enumerate(_outputs(run)):
            propagate(run, working_copy(run, index), index, stream, stream)
            torch.testing.assert_close(stream.hidden_NTD, wanted, rtol=1e-3, atol=1e-3)
        assert not stream.beside, "nothing is kept that no block needs any more"
        assert activations is not IN_FILES or len(list(store.folder.glob("*.bin"))) == 1, (
            "files of arguments stay behind"
        )


def test_what_is_carried_is_kept_as_long_as_it_is_needed(tmp_path: Path) -> None:
    run = made_run("gemma3n", tmp_path)
    with hidden_store((SEQUENCES, TOKENS, run.width), run.activations, streams=1) as store:
        stream, kept = embedded(run.model.network, run.train_ids_NT, store), list[int]()
        for index in range(len(run.blocks)):
            propagate(run, working_copy(run, index), index, stream, stream)
            kept.append(len(stream.beside))
    assert kept == [2, 4, 4, 0]


@pytest.mark.parametrize("weighted", [False, True])
def test_a_block_trains_on_the_arguments_of_its_own_sequences(weighted: bool, tmp_path: Path) -> None:
    """With its own weights a block reaches its target, sequence by sequence, and with those of others it does not."""
    run, index = made_run("gemma3n", tmp_path), 3
    network, plan = run.model.network, run.plan[index]
    block = find_blocks(network)[1][index]
    with hidden_store((SEQUENCES, TOKENS, run.width), run.activations, streams=1) as store:
        stream = embedded(network, run.train_ids_NT, store)
        for earlier in range(index):
            propagate(run, working_copy(run, earlier), earlier, stream, stream)
        arguments = arguments_of(network, run.forms, run.calls[index], index, stream)
        inputs = stream.hidden_NTD.clone()
    quantizers = {}
    for site, scheme in plan.weights.items():
        start = RTN(weighted=False)(site.to_matrix(block.get_parameter(site.name)), None, scheme)
        quantizers[site] = GumbelQuantizer(start, scheme, GumbelOptions(), generator_of(0, site.name))
    module = BlockQuantization(block, run.calls[index], quantizers, torch.optim.Adam)
    own = {site.name: block.get_parameter(site.name) for site in plan.weights}
    weights = [torch.rand(SEQUENCES, TOKENS)] if weighted else []
    batch = (inputs, _outputs(run)[index], *weights, *arguments)
    with torch.no_grad():
        assert float(module.loss(batch, own)) < 1e-6
        assert float(module.loss(tuple(part[[3, 1]] for part in batch), own)) < 1e-6
        others = (*batch[: len(batch) - len(arguments)], *(argument.roll(1, 0) for argument in arguments))
        assert float(module.loss(others, own)) > 1e-3
