"""Brent's search for the salient ratio."""

import pytest

from lightning_gsq.saliency.threshold import adaptive_ratio


def test_minimum_inside() -> None:
    """error (r - 0.3)^2 + price * r has its minimum at 0.3 - price / 2."""
    found = adaptive_ratio(lambda r: ((r - 0.3) ** 2, r), price=0.2)
    assert found.ratio == pytest.approx(0.2, abs=2e-3)
    assert found.error == pytest.approx((found.ratio - 0.3) ** 2) and found.bits == pytest.approx(found.ratio)


@pytest.mark.parametrize(("price", "ratio"), [(1e-6, 0.5), (1e6, 0.0)])
def test_minimum_at_an_end(price: float, ratio: float) -> None:
    assert adaptive_ratio(lambda r: (1 - r, 1 + 3 * r), price).ratio == ratio


def test_no_ratio_is_measured_twice() -> None:
    seen = []
    found = adaptive_ratio(lambda r: (seen.append(r) or (r - 0.1) ** 2, 1.0), 1.0)
    assert len(seen) == len(set(seen)) == found.evaluations < 40
