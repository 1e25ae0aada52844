"""Scores and choices of salient weights."""

import pytest
import torch

from lightning_gsq.saliency.scores import hessian_score, magnitude_score, salient_mask
from lightning_gsq.weights.salient_part import column_count


def test_magnitude_is_the_distance_from_the_mean_in_deviations() -> None:
    w_OI = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    torch.testing.assert_close(magnitude_score(w_OI), (w_OI - 4).abs() / w_OI.std())


def test_hessian_score_follows_the_inputs() -> None:
    w_OI = torch.randn(6, 3)
    score_OI = hessian_score(w_OI, torch.diag(torch.tensor([1.0, 4.0, 1.0])))
    ratio_OI = score_OI / magnitude_score(w_OI)
    torch.testing.assert_close(ratio_OI[:, 1], 2 * ratio_OI[:, 0])


@pytest.mark.parametrize("ratio", [0.0, 0.13, 0.5, 1.0])
def test_mask_has_the_asked_share_and_the_highest_scores(ratio: float) -> None:
    score_OI = torch.rand(10, 10)
    mask_OI = salient_mask(score_OI, ratio)
    assert int(mask_OI.sum()) == round(100 * ratio)
    if 0 < ratio < 1:
        assert float(score_OI[mask_OI].min()) >= float(score_OI[~mask_OI].max())


def test_mask_of_equal_scores_is_the_first_ones() -> None:
    assert salient_mask(torch.ones(2, 4), 0.25).tolist() == [[True, True, False, False], [False] * 4]


def test_columns() -> None:
    assert [column_count(r, 576) for r in (0.0, 0.02, 0.05, 0.5, 0.999)] == [0, 0, 32, 288, 544]
    assert [column_count(r, 48) for r in (0.0, 0.1, 0.999)] == [0, 5, 47]
