"""Where the time of a block goes."""

import pytest

from lightning_gsq.system.stopwatch import Stopwatch


def test_a_part_inside_another_counts_once() -> None:
    moments = iter([0.0, 1.0, 4.0, 6.0, 10.0, 11.0])
    watch = Stopwatch(lambda: next(moments))
    with watch("training"), watch("saliency"):  # 0 to 6, of which 1 to 4
        pass
    with watch("training"):  # 10 to 11
        pass
    assert watch.take() == {"training": 1.0 + 2.0 + 1.0, "saliency": 3.0}
    assert watch.take() == {}


def test_a_part_that_fails_is_counted_and_closed() -> None:
    moments = iter([0.0, 1.0, 5.0, 6.0])
    watch = Stopwatch(lambda: next(moments))
    with pytest.raises(ValueError, match="halfway"), watch("training"):
        raise ValueError("halfway")
    with watch("check"):
        pass
    assert watch.seconds == {"training": 1.0, "check": 1.0}
