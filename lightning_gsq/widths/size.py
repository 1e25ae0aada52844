"""A size as a user gives it: bytes of the whole file, or true bits a parameter."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning_gsq.errors import ConfigurationError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MOST_BITS = 16
SLACK = 0.005
"""Share of the size that may stay unused."""
_FORM = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]+)\s*")


@dataclass(frozen=True)
class Size:
    """A size.

    Args:
        text: A number with a unit: ``80MB`` (10^6 bytes), ``76MiB``, ``4.5GB``, or ``2.6bpw``, bits a parameter of the
            model, everything in the file counted, embedding, head, norms and header too.

    Raises:
        ConfigurationError: it is none, or not above zero.
    """

    text: str

    def __post_init__(self) -> None:
        match = _FORM.fullmatch(self.text) if isinstance(self.text, str) else None
        unit = match[2].upper() if match else ""
        if match is None or (unit != "BPW" and unit not in UNITS) or float(match[1]) == 0:
            raise ConfigurationError(
                f"model.size must be a number above 0 with a unit, such as 80MB, 4.5GB, 76MiB or 2.6bpw (bits a "
                f"parameter), got {self.text!r}"
            )

    def num_bytes(self, parameters: int) -> int:
        """Bytes that the file of a model with so many parameters may have at most.

        Raises:
            ConfigurationError: they are more than 16 bits a parameter.
        """
        match = _FORM.fullmatch(self.text)
        assert match is not None
        number, unit = float(match[1]), match[2].upper()
        size = int(number * parameters / 8) if unit == "BPW" else int(number * UNITS[unit])
        if 8 * size > MOST_BITS * parameters:
            raise ConfigurationError(
                f"model.size: {self.text} are {8 * size / parameters:.2f} bits for each of the {parameters:,} "
                f"parameters, more than the {MOST_BITS} of the original; give at most "
                f"{MOST_BITS * parameters / 8e6:.1f}MB"
            )
        return size
