"""Waiting for another process: until something is there, and no longer than said."""

from lightning_gsq.system.waiting import wait_for


def test_the_first_thing_seen_ends_it() -> None:
    looks = iter([None, None, {}, "late"])
    assert wait_for(lambda: next(looks), seconds=1, pause=0.001) == {}
    assert next(looks) == "late"


def test_it_ends_without_anything() -> None:
    looks = []
    assert wait_for(lambda: looks.append(1), seconds=0.01, pause=0.001) is None
    assert len(looks) == 10
