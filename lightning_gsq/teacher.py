"""The teacher's most probable tokens at every calibration position, computed once and stored in the run folder.

One file for some sequences each, so that a pass that was interrupted goes on, and several processes share the work.
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

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.ops.distillation import Head
from lightning_gsq.run_folder import write_atomically

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

    @torch.no_grad()
    def compute(
        self,
        hidden: Callable[[Tensor], Tensor],
        head: Head,
        temperature: float,
        size: int,
        rank: int = 0,
        world: int = 1,
    ) -> int:
        """Fills in the files that are missing, those of this process.

        Args:
            hidden: Last hidden states ``B T D`` of token ids ``B T``.
            head: The teacher's head.
            temperature: Temperature of the loss.
            size: Sequences of one forward pass.
            rank: Number of this process.
            world: How many there are.

        Returns:
            How many files were written.

        Raises:
            ConfigurationError: ``k`` exceeds the vocabulary, or the disk is full.
        """
        if self.k > len(head.weight_VD):
            raise ConfigurationError(
                f"end_to_end.top_k: {self.k} tokens were asked for, the vocabulary has {len(head.weight_VD)}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = self.ids_NT.split(SEQUENCES_A_FILE)
        missing = [n for n in range(rank, len(parts), world) if not self._is_whole(n)]
        for number in missing:
            tokens, log_probs = [], []
            for ids_BT in parts[number].split(size):
                for hidden_TD in hidden(ids_BT):
                    found = [self._top(hidden_CD, head, temperature) for hidden_CD in hidden_TD.split(128)]
                    tokens.append(torch.cat([part[1] for part in found]).int().cpu())
                    log_probs.append(torch.cat([part[0] for part in found]).half().cpu())
            content = {"tokens": torch.stack(tokens), "log_probs": torch.stack(log_probs)}
            write_atomically(self._file(number), save(content, {"key": json.dumps(self.key)}))
        return len(missing)

    def _top(self, hidden_CD: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
        logits_CV = head.to(hidden_CD.dtype).logits(hidden_CD).float() / temperature
        return torch.log_softmax(logits_CV, dim=-1).topk(self.k)

    def _is_whole(self, part: int) -> bool:
        try:
            with safe_open(self._file(part), framework="pt") as content:
                return json.loads((content.metadata() or {}).get("key", "null")) == self.key
        except (OSError, SafetensorError, ValueError):
            return False

    def _file(self, part: int) -> Path:
        return self.folder / f"top_k-{part:05d}.safetensors"
