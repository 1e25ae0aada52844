"""The number of groups: clusters are counted, equal values and few values do no harm."""

import pytest
import torch

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.saliency.graph import GraphOptions, graph_group_count

OPTIONS = GraphOptions(subsample=400, max_groups=6)


@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_separate_clusters_are_counted(clusters: int) -> None:
    values = torch.cat([10.0 * i + torch.randn(300) for i in range(clusters)])
    found = graph_group_count(values, OPTIONS)
    assert found.count == clusters
    assert len(found.eigengaps) == len(found.silhouettes) == 5


def test_repeats_exactly() -> None:
    values = torch.randn(50, 50)
    assert graph_group_count(values, OPTIONS) == graph_group_count(values, OPTIONS)


def test_values_on_a_coarse_grid() -> None:
    """Weights that were quantized before have many equal values, whose neighbours are at distance zero."""
    assert 1 <= graph_group_count(torch.randn(4000).mul(8).round(), OPTIONS).count <= 6
    assert graph_group_count(torch.ones(1000), OPTIONS).count == 1


def test_few_values() -> None:
    assert graph_group_count(torch.randn(5), OPTIONS).count == 1
    assert 2 <= graph_group_count(torch.randn(30), OPTIONS).count <= 6


@pytest.mark.parametrize(("name", "value"), [("subsample", 20), ("neighbours", 1), ("max_groups", 1)])
def test_bad_options(name: str, value: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be"):
        GraphOptions(**{name: value})
