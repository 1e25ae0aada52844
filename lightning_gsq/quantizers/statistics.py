"""Second moments of the inputs of linear weights: the Hessians that GPTQ needs, and their diagonals alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_gsq.models.linear_weights import LinearSite, watch_inputs


class InputStatistics:
    """Accumulates ``2 / n * sum x xᵀ`` in fp32 for every linear weight of a block, one per expert.

    Weights that read the same tensor (queries, keys and values) share the product.

    Args:
        sites: The weights to watch.
        device: Where to accumulate.
    """

    def __init__(self, sites: list[LinearSite], device: torch.device) -> None:
        self.sites = {site.name: site for site in sites}
        self.device = device
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.counts: dict[tuple[str, int], int] = {}
        self._last: tuple[Tensor, Tensor] | None = None
        """The tensor seen last and its second moment; the reference keeps it alive, so that identity means equality."""

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Accumulates over every run of ``block`` inside the context."""
        with watch_inputs(block, self._add):
            yield
        self._last = None

    def reduce(self, add: Callable[[Tensor], Tensor], sites: Iterable[LinearSite]) -> None:
        """Adds up what several processes have seen.

        Args:
            add: Sums a tensor over the processes, in place. Called in the same order everywhere.
            sites: The weights that all of them have.
        """
        for site in sites:
            for expert in range(max(site.experts, 1)):
                key = (site.name, expert)
                empty = self.empty(site)
                count = torch.tensor([self.counts.get(key, 0)], device=self.device)
                self.sums[key], self.counts[key] = add(self.sums.get(key, empty)), int(add(count))

    def hessians(self, site: LinearSite) -> list[Tensor]:
        """The Hessian ``I I`` of each of the site's matrices; zeros for an expert that no token reached."""
        per_expert = []
        for expert in range(max(site.experts, 1)):
            key = (site.name, expert)
            count = self.counts.get(key, 0)
            per_expert.append(self.sums[key] * (2 / count) if count else self.empty(site))
        return per_expert

    def tokens(self, site: LinearSite) -> list[int]:
        """How many tokens each of the site's matrices has seen."""
        return [self.counts.get((site.name, expert), 0) for expert in range(max(site.experts, 1))]

    def moment(self, x_NI: Tensor) -> Tensor:
        """What is summed up over inputs: ``I I``."""
        return x_NI.T @ x_NI

    def empty(self, site: LinearSite) -> Tensor:
        """That of no inputs."""
        return torch.zeros(site.in_features, site.in_features, device=self.device)

    def _add(self, name: str, expert: int, inputs: Tensor) -> None:
        if name not in self.sites:
            return
        key = (name, expert if self.sites[name].experts else 0)  # a plain weight may be used a few rows at a time
        x_NI = inputs.detach().reshape(-1, inputs.shape[-1])
        if self._last is None or self._last[0] is not inputs:
            with torch.autocast(x_NI.device.type, enabled=False):
                wide_NI = x_NI.float()
                self._last = (inputs, self.moment(wide_NI))
        moment = self._last[1]
        self.sums[key] = self.sums[key].add_(moment) if key in self.sums else moment.clone()
        self.counts[key] = self.counts.get(key, 0) + len(x_NI)


class InputSquareSums(InputStatistics):
    """Accumulates ``sum x²`` in fp32 for every column of every linear weight of a block, one row an expert."""

    def moment(self, x_NI: Tensor) -> Tensor:
        """The diagonal alone: ``I``."""
        return x_NI.square().sum(0)

    def empty(self, site: LinearSite) -> Tensor:
        """That of no inputs."""
        return torch.zeros(site.in_features, device=self.device)

    def of(self, site: LinearSite) -> tuple[Tensor, Tensor]:
        """Sums ``E I`` and how many tokens each is of, ``E``; fp32 on the host."""
        keys = [(site.name, expert) for expert in range(max(site.experts, 1))]
        sums_EI = torch.stack([self.sums.get(key, self.empty(site)) for key in keys])
        return sums_EI.cpu(), torch.tensor([float(self.counts.get(key, 0)) for key in keys])
