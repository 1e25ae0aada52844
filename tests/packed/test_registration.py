"""Importing the package costs nothing; transformers knows the format as soon as it can load a model."""

import subprocess
import sys

import pytest

SHOW = "; import sys; print('torch' in sys.modules, 'lightning_gsq.packed.load' in sys.modules)"


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("import lightning_gsq", "False False"),
        ("import lightning_gsq, transformers.modeling_utils", "True True"),
        ("import transformers.modeling_utils, lightning_gsq", "True True"),
        ("import lightning_gsq; lightning_gsq.load", "True True"),
    ],
)
def test_the_reader_comes_with_the_ability_to_load(code: str, shown: str) -> None:
    output = subprocess.run([sys.executable, "-c", code + SHOW], capture_output=True, text=True, check=True).stdout
    assert output.strip() == shown


def test_there_is_nothing_else() -> None:
    import lightning_gsq

    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        lightning_gsq.quantise  # noqa: B018
