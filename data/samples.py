"""Text that the model writes itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning_gsq.data.encoding import check_ids
from lightning_gsq.data.sources import TextSource
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.seeding import seed_of


class ModelSamples(TextSource):
    """Text that the model writes itself, from its start token: calibration without any data.

    Args:
        num_tokens: Tokens to sample in all.
        length: Tokens of one sample.
        temperature: Sampling temperature.
        top_p: Nucleus of the sampling distribution.
        seed: Seed of the samples.
        batch_size: Samples written at once.
    """

    needs_model = True

    def __init__(
        self,
        num_tokens: int = 100_000,
        length: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        for name, value in (("num_tokens", num_tokens), ("length", length), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigurationError(f"ModelSamples: {name} must be at least 1, got {value}")
        if not 0 < temperature < float("inf"):
            raise ConfigurationError(f"ModelSamples: temperature must be positive, got {temperature}")
        if not 0 < top_p <= 1:
            raise ConfigurationError(f"ModelSamples: top_p must lie between 0 and 1, got {top_p}")
        self.num_tokens, self.length, self.temperature, self.top_p = num_tokens, length, temperature, top_p
        self.seed, self.batch_size = seed, batch_size
        self._texts: list[str] | None = None

    def check(self) -> None:
        """Nothing can be missing: the model is checked where it is loaded."""

    def identity(self) -> dict[str, Any]:
        """See :meth:`TextSource.identity`; among the runs of one model."""
        names = ("num_tokens", "length", "temperature", "top_p", "seed", "batch_size")
        return {"ModelSamples": {name: getattr(self, name) for name in names}}

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the samples; :meth:`documents` yields them afterwards."""
        start = self._start(model, tokenizer)
        self._texts = []
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[]), torch.autocast(device.type, torch.bfloat16):
            torch.manual_seed(seed_of("samples", self.seed))
            left = -(-self.num_tokens // self.length)
            while left > 0:
                count = min(left, self.batch_size)
                generate: Any = model.generate
                ids = generate(
                    torch.full((count, 1), start, device=device),
                    attention_mask=torch.ones(count, 1, dtype=torch.long, device=device),
                    do_sample=True,
                    temperature=self.temperature,
                    top_p=self.top_p,
                    top_k=0,
                    max_new_tokens=self.length,
                    min_new_tokens=self.length,
                    pad_token_id=start,
                )
                self._texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
                left -= count

    def documents(self) -> Iterator[str]:
        """See :meth:`TextSource.documents`."""
        if self._texts is None:
            raise ConfigurationError("ModelSamples: there are no samples yet; call attach(model, tokenizer) first")
        yield from self._texts

    def _start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
        """The token to begin with, once it is sure that the model takes it and as many more as asked for."""
        start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
        if start is None:
            raise ConfigurationError("ModelSamples: the tokenizer has neither a start nor an end token to begin with")
        check_ids([start], tokenizer, model, "ModelSamples: the start")
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit and self.length >= limit:
            raise ConfigurationError(
                f"ModelSamples: length: the start token and {self.length} more exceed the model's limit of {limit}"
            )
        return int(start)
