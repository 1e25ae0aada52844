"""What the teacher says, computed once: of the training sequences its most probable tokens, of held-out ones all.

The tokens are stored in the run folder, one file for some sequences each, so that a pass that was interrupted goes on,
and several processes share the work. Held-out sequences are few, and come again in every evaluation: their last hidden
states are kept in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from lightning_gsq.ops.distillation import Head
from lightning_gsq.system.digests import tensors_digest
from lightning_gsq.system.files import write_atomically
from lightning_gsq.training.losses import LOSS_POSITIONS

SEQUENCES_A_FILE = 32


class StoredTeacher(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Calibration sequences with the teacher's ``k`` most probable next tokens: ``T``, ``T K``, ``T K``.

    Log-probabilities are those at the temperature of the loss, half precision; what they leave of the probability is
    one event more (see :class:`lightning_gsq.ops.distillation.TopKTarget`).

    Args:
        folder: Where the files are.
        ids_NT: The sequences.
        k: Tokens a position.
        key: What the files have to say about themselves: fingerprint of model and text, ``k``, temperature.
    """

    def __init__(self, folder: Path, ids_NT: Tensor, k: int, key: dict[str, str]) -> None:
        self.folder, self.ids_NT, self.k, self.key = folder, ids_NT, k, key

    def __len__(self) -> int:
        return len(self.ids_NT)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        part, row = divmod(index, SEQUENCES_A_FILE)
        with safe_open(self._file(part), framework="pt") as content:
            tokens_TK, log_probs_TK = (content.get_slice(name)[row] for name in ("tokens", "log_probs"))
        return self.ids_NT[index], tokens_TK, log_probs_TK

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """Numbers of the files that are to be computed, those of this process among ``world``."""
        return [n for n in range(rank, -(-len(self) // SEQUENCES_A_FILE), world) if not self._is_whole(n)]

    def passes(self, numbers: list[int], size: int) -> int:
        """Forward passes of ``size`` sequences that these files take."""
        return sum(len(self._part(number).split(size)) for number in numbers)

    def compute(self, numbers: list[int], top: Callable[[Tensor], tuple[Tensor, Tensor]], size: int) -> None:
        """Computes files and writes them.

        Args:
            numbers: Which.
            top: Most probable tokens and their log-probabilities, ``B T K`` each, of token ids ``B T``.
            size: Sequences of one forward pass.

        Raises:
            ConfigurationError: the disk is full.
        """
        for number in numbers:
            tops = [top(ids_BT) for ids_BT in self._part(number).split(size)]
            content = {
                "tokens": torch.cat([tokens_BTK.int().cpu() for tokens_BTK, _ in tops]),
                "log_probs": torch.cat([log_probs_BTK.half().cpu() for _, log_probs_BTK in tops]),
            }
            metadata = {"key": json.dumps(self.key), "digest": tensors_digest(content)}
            write_atomically(self._file(number), save(content, metadata))

    def _part(self, number: int) -> Tensor:
        return self.ids_NT[number * SEQUENCES_A_FILE : (number + 1) * SEQUENCES_A_FILE]

    def _is_whole(self, part: int) -> bool:
        try:
            with safe_open(self._file(part), framework="pt") as content:
                metadata = content.metadata() or {}
                if json.loads(metadata["key"]) != self.key:
                    return False
                tensors = {name: content.get_tensor(name) for name in ("tokens", "log_probs")}
        except (OSError, SafetensorError, ValueError, KeyError, RecursionError):
            return False
        shape = (*self._part(part).shape, self.k)
        whole = all(tuple(tensor.shape) == shape for tensor in tensors.values())
        return whole and tensors_digest(tensors) == metadata.get("digest")

    def _file(self, part: int) -> Path:
        return self.folder / f"top_k-{part:05d}.safetensors"


class HeldOutStates:
    """The teacher's last hidden states of held-out batches, kept on the host."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, number: int, ids_BT: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Those of one batch, ``B T D``, on the device of its ids.

        Args:
            number: The batch's number.
            ids_BT: Its token ids.
            compute: Computes them, the first time, and where the batch of that number has become another.
        """
        ids = ids_BT.cpu()
        if number not in self._kept or not torch.equal(self._kept[number][0], ids):
            self._kept[number] = ids, compute(ids_BT).cpu()
        return self._kept[number][1].to(ids_BT.device)


def top_tokens(hidden_BTD: Tensor, head: Head, temperature: float, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` most probable tokens and their log-probabilities, ``B T k`` each, some positions at a time."""
    tokens, log_probs = [], []
    for hidden_CD in hidden_BTD.flatten(0, 1).split(LOSS_POSITIONS):
        logits_CV = head.to(hidden_CD.dtype).logits(hidden_CD).float() / temperature
        log_probs_CK, tokens_CK = torch.log_softmax(logits_CV, dim=-1).topk(k)
        tokens.append(tokens_CK)
        log_probs.append(log_probs_CK)
    shape = (*hidden_BTD.shape[:2], k)
    return torch.cat(tokens).view(shape), torch.cat(log_probs).view(shape)
