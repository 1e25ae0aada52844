"""Bars of other packages are silent inside the context, and only there."""

import pytest
from huggingface_hub.utils import tqdm as hub_tqdm
from tqdm.auto import tqdm

from lightning_gsq.system.progress_bars import no_foreign_bars


def test_bars_are_silent_inside(capfd: pytest.CaptureFixture[str]) -> None:
    with no_foreign_bars():
        assert list(tqdm(range(3), desc="Compressing model", disable=False)) == [0, 1, 2]
        assert list(hub_tqdm(range(2), desc="Loading weights")) == [0, 1]
    assert capfd.readouterr().err == ""
    list(tqdm(range(3), desc="after"))
    assert "after" in capfd.readouterr().err
