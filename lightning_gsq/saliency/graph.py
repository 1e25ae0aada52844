"""How many groups of scales a matrix has: spectral structure of a sparse graph over a sample of its values.

Some thousand values become the vertices of a k-nearest-neighbour graph. The affinity of two neighbours is
``exp(-d^2 / (r_i r_j))``, each radius being the distance to the vertex's own k-th neighbour, so that dense and sparse
regions count alike (Zelnik-Manor and Perona, 2004). The smallest eigenvalues of the normalised Laplacian tell how well
the graph falls into n parts: a wide gap after the n-th, and compact clusters in the space of the first n eigenvectors
(silhouette), speak for n. SAGE-PTQ (arXiv 2606.05429) does this with the magnitudes of the unsalient weights.

Neighbours among single numbers make a graph close to a chain, whose eigenvalues grow with the square of their number:
the widest gap is then the last one, whatever the values. So a gap counts as a share of the eigenvalue that follows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.sparse.csgraph import laplacian
from torch import Tensor

from lightning_gsq.errors import ConfigurationError

RADIUS_FLOOR = 1e-6
"""Smallest radius of a vertex, as a share of the values' spread: equal values have neighbours at distance zero."""
EIGENVALUE_FLOOR = 1e-9
"""Smaller eigenvalues are zero up to rounding: parts of the graph that nothing connects."""


@dataclass(frozen=True)
class GraphOptions:
    """How the number of groups is found.

    Args:
        subsample: Values that become vertices.
        neighbours: Neighbours of each vertex, k.
        max_groups: The largest number of groups tried; the smallest is 2.
        seed: Seed of the sample and of the clustering.
    """

    subsample: int = 2000
    neighbours: int = 10
    max_groups: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.max_groups <= 64:
            raise ConfigurationError(f"max_groups must be 2 to 64, got {self.max_groups}")
        if self.neighbours < 2:
            raise ConfigurationError(f"neighbours must be at least 2, got {self.neighbours}")
        if self.subsample < 4 * max(self.neighbours, self.max_groups):
            raise ConfigurationError(
                f"subsample must be at least {4 * max(self.neighbours, self.max_groups)}, four times the neighbours "
                f"and groups, got {self.subsample}"
            )


@dataclass(frozen=True)
class GroupCount:
    """The number of groups and what spoke for it.

    Args:
        count: The choice.
        eigengaps: Gap after the n-th eigenvalue as a share of the next one, for n = 2, 3, ...
        silhouettes: Silhouette score of n clusters in the embedding, for the same n.
    """

    count: int
    eigengaps: list[float] = field(default_factory=list)
    silhouettes: list[float] = field(default_factory=list)


def graph_group_count(values: Tensor, options: GraphOptions) -> GroupCount:
    """The number of groups that the values fall into.

    Args:
        values: Any shape; usually magnitudes of unsalient weights.
        options: Sample size, neighbours, range.

    Returns:
        The count between 2 and ``max_groups`` with the largest sum of eigengap and silhouette score, each relative
        to its best; 1 when there are fewer distinct values than ``4 * max_groups``.
    """
    from sklearn.cluster import KMeans  # brings pandas: a seventh of what a command loads before it begins
    from sklearn.metrics import silhouette_score

    sample = _sample(values, options)
    if len(np.unique(sample)) < 4 * options.max_groups:
        return GroupCount(1)
    counts = range(2, options.max_groups + 1)
    eigenvalues, vectors = _spectrum(sample, options)
    gaps = [1 - float(eigenvalues[n - 1] / max(eigenvalues[n], EIGENVALUE_FLOOR)) for n in counts]
    silhouettes = []
    for n in counts:
        embedding = vectors[:, :n] / np.linalg.norm(vectors[:, :n], axis=1, keepdims=True).clip(1e-12)
        labels = KMeans(n, n_init=3, random_state=options.seed).fit_predict(embedding)
        distinct = len(np.unique(labels))
        silhouettes.append(float(silhouette_score(embedding, labels)) if distinct > 1 else -1.0)
    merit = np.array(gaps) / max(*gaps, 1e-12) + np.array(silhouettes) / max(*silhouettes, 1e-12)
    return GroupCount(counts[int(merit.argmax())], gaps, silhouettes)


def _sample(values: Tensor, options: GraphOptions) -> NDArray[np.float64]:
    flat = values.detach().flatten().double().cpu().numpy()
    if len(flat) > options.subsample:
        flat = np.random.default_rng(options.seed).choice(flat, options.subsample, replace=False)
    return np.sort(flat)


def _spectrum(sample: NDArray[np.float64], options: GraphOptions) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The smallest ``max_groups + 1`` eigenvalues of the normalised Laplacian, rising, and their vectors."""
    from sklearn.neighbors import kneighbors_graph

    k = min(options.neighbours, len(sample) - 1)
    graph = kneighbors_graph(sample[:, None], k, mode="distance", include_self=False)
    radius = graph.max(axis=1).toarray().ravel().clip(RADIUS_FLOOR * max(float(np.ptp(sample)), 1e-30))
    edges = graph.tocoo()
    edges.data = np.exp(-(edges.data**2) / (radius[edges.row] * radius[edges.col]))
    weights = edges.tocsr()
    weights = weights.maximum(weights.T)
    # Dense: separate clusters are equal eigenvalues, of which Lanczos' method finds only some.
    dense = laplacian(weights, normed=True).toarray()
    eigenvalues, vectors = eigh(dense, subset_by_index=(0, min(options.max_groups, len(sample) - 1)))
    return eigenvalues.clip(EIGENVALUE_FLOOR), vectors
