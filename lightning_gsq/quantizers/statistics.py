"""Second moments of the inputs of linear weights: the Hessians that GPTQ needs, and their diagonals alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_gsq.models.experts import Part, part_of
from lightning_gsq.models.linear_weights import LinearSite, watch_inputs
from lightning_gsq.system.slices import slices

MOMENT_COLUMNS = 256
"""Columns of a second moment that are computed at once: few enough to leave out most of what mirrors another part."""


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
        self.sums: dict[Part, Tensor] = {}
        self.counts: dict[Part, int] = {}
        """Vectors that were summed up, zeros included."""
        self.alive: dict[Part, Tensor] = {}
        """Those that are not zero: experts computed all at once get zeros for the tokens of others."""
        self.passed: dict[Part, Tensor] = {}
        """Those that came by while others were watched."""
        self._depth = 0
        self._weights: Mapping[str, Tensor] = {}
        self._last: tuple[Tensor, Tensor | None, Tensor] | None = None
        """The tensor seen last, its vectors' weights and its second moment; the references keep both alive, so that
        identity means equality."""

    @contextmanager
    def watching(self, block: nn.Module, parts: Collection[Part] | None = None) -> Iterator[None]:
        """Accumulates over every run of ``block`` inside the context.

        Args:
            block: The block.
            parts: The matrices whose inputs are summed up; those of others are counted. None for all.
        """

        self._depth += 1
        depth = self._depth

        def seen(name: str, number: int, inputs: Tensor) -> None:
            if name in self.sites and depth == self._depth:  # a context inside of another takes its place
                self.see(name, number, inputs, parts)

        try:
            with watch_inputs(block, seen):
                yield
        finally:
            self._depth -= 1
            self._last, self._weights = None, {}

    def see(self, name: str, number: int, inputs: Tensor, parts: Collection[Part] | None = None) -> None:
        """Takes in what one matrix was applied to.

        Args:
            name: The weight.
            number: The matrix's number in it.
            inputs: ``... I``.
            parts: As of :meth:`watching`.
        """
        part = part_of(self.sites[name], number)
        x_NI = inputs.detach().reshape(-1, inputs.shape[-1])
        if parts is None or part in parts:
            self._add(part, x_NI, inputs)
        else:
            self._count(self.passed, part, x_NI)

    def weigh(self, weights: Mapping[str, Tensor]) -> None:
        """Says how much the vectors that come next count, ``N`` of them by a weight's name, until it is called again.

        Matrices that see another number of vectors, such as experts, and those without a name there count all alike.
        """
        self._weights = weights

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
                none = torch.zeros((), dtype=torch.int64, device=self.device)
                self.alive[key] = add(self.alive.get(key, none.clone()))
                passed = add(self.passed.get(key, none.clone()))
                if int(passed):  # where nothing came by, nothing is known of it, rather than that it is nothing
                    self.passed[key] = passed

    def join(self, others: InputStatistics) -> None:
        """Takes in what others of the same weights have seen."""
        for key, moment in others.sums.items():
            self.sums[key] = self.sums[key] + moment if key in self.sums else moment
            self.counts[key] = self.counts.get(key, 0) + others.counts[key]
            self.alive[key] = self.alive.get(key, 0) + others.alive[key]

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
        return [int(self.alive.get((site.name, expert), 0)) for expert in range(max(site.experts, 1))]

    def moment(self, x_NI: Tensor, weight_N: Tensor | None) -> Tensor:
        """What is summed up over inputs: ``I I``."""
        return second_moment(x_NI, x_NI if weight_N is None else x_NI * weight_N[:, None])

    def empty(self, site: LinearSite) -> Tensor:
        """That of no inputs."""
        return torch.zeros(site.in_features, site.in_features, device=self.device)

    def _add(self, part: Part, x_NI: Tensor, inputs: Tensor) -> None:
        weight_N = self._weights.get(part[0])
        if weight_N is not None and len(weight_N) != len(x_NI):
            weight_N = None
        if self._last is None or self._last[0] is not inputs or self._last[1] is not weight_N:
            with torch.autocast(x_NI.device.type, enabled=False):
                on_device = None if weight_N is None else weight_N.to(x_NI.device)
                self._last = (inputs, weight_N, self.moment(x_NI.float(), on_device))
        moment = self._last[2]
        self.sums[part] = self.sums[part].add_(moment) if part in self.sums else moment.clone()
        self.counts[part] = self.counts.get(part, 0) + len(x_NI)
        self._count(self.alive, part, x_NI)

    def _count(self, counts: dict[Part, Tensor], part: Part, x_NI: Tensor) -> None:
        fused = self.sites[part[0]].experts
        number = (x_NI != 0).any(-1).sum() if fused else torch.tensor(len(x_NI), device=x_NI.device)
        counts[part] = counts[part] + number if part in counts else number


def second_moment(x_NI: Tensor, weighed_NI: Tensor) -> Tensor:
    """``weighedᵀ x``, fp32 ``I I``, of vectors and the same vectors weighed: symmetric, so half of it is computed."""
    moment_II = x_NI.new_empty(x_NI.shape[1], x_NI.shape[1])
    for rows in slices(x_NI.shape[1], MOMENT_COLUMNS):
        moment_II[rows, rows.start :] = weighed_NI[:, rows].T @ x_NI[:, rows.start :]
        moment_II[rows.stop :, rows] = moment_II[rows, rows.stop :].T
    return moment_II


class InputSquareSums(InputStatistics):
    """Accumulates ``sum x²`` in fp32 for every column of every linear weight of a block, one row an expert."""

    def moment(self, x_NI: Tensor, weight_N: Tensor | None) -> Tensor:
        """The diagonal alone: ``I``."""
        squares_NI = x_NI.square()
        return (squares_NI if weight_N is None else squares_NI * weight_N[:, None]).sum(0)

    def empty(self, site: LinearSite) -> Tensor:
        """That of no inputs."""
        return torch.zeros(site.in_features, device=self.device)

    def of(self, site: LinearSite) -> tuple[Tensor, Tensor]:
        """Sums ``E I`` and how many tokens each is of, ``E``; fp32 on the host."""
        keys = [(site.name, expert) for expert in range(max(site.experts, 1))]
        sums_EI = torch.stack([self.sums.get(key, self.empty(site)) for key in keys])
        return sums_EI.cpu(), torch.tensor([float(self.counts.get(key, 0)) for key in keys])
