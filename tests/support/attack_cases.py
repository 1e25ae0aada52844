"""The attacks: each yields a case's name, its outcome in a few words, and whether that outcome is a right one."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.attack import (
    Outcome,
    after,
    at_operation,
    finish,
    judged,
    largest_file,
    no_space,
    read_only,
    run_forked,
    send,
)
from tests.support.attack_targets import Target

Case = tuple[str, str, bool]
OPERATIONS = 90
"""About as many changes of files as the run makes."""
SECONDS = 6.0
"""About as long as it takes."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EXPECTED_CODES = {signal.SIGKILL: {-9}, signal.SIGTERM: {143, -15}, signal.SIGINT: {130, -2}}
LIMIT = 90.0


def kills(target: Target, first: int, count: int) -> Iterator[Case]:
    """Signals before a file operation, or at some moment; then the same command until it ends."""
    for number in range(first, first + count):
        chosen, choose = SIGNALS[number % 3], random.Random(number)
        name = f"kill{number}"
        run = target.run_of(name)
        if number % 2:
            moment = at_operation(run, choose.randrange(1, OPERATIONS), send(chosen))
        else:
            moment = after(choose.uniform(0.2, SECONDS), send(chosen))
        outcome = run_forked(target.arguments(name), target.root / "log", moment, LIMIT)
        yield f"{number} {chosen.name}", *_judged(target, name, outcome, EXPECTED_CODES[chosen] | {0})
        shutil.rmtree(target.root / name, ignore_errors=True)


def failures(target: Target, first: int, count: int) -> Iterator[Case]:
    """A full disk, a disk that became read-only, a file that may not grow; then the same command on a good one."""
    for number in range(first, first + count):
        choose, name = random.Random(number), f"failure{number}"
        run = target.run_of(name)
        kind = number % 3
        if kind < 2:
            act = (no_space, read_only)[kind]
            moment = at_operation(run, choose.randrange(1, OPERATIONS), act)
        else:
            moment = largest_file(choose.choice([100, 2_000, 20_000, 60_000, 200_000, 500_000]))
        outcome = run_forked(target.arguments(name), target.root / "log", moment, LIMIT)
        yield f"{number} {outcome.errors[:1]}", *_judged(target, name, outcome, {0, 1, 2})
        shutil.rmtree(target.root / name, ignore_errors=True)


def _judged(target: Target, name: str, outcome: Outcome, codes: set[int]) -> tuple[str, bool]:
    """What an interrupted run, and its resumption, came to."""

    def resume() -> Outcome:
        *_, last = finish(target.arguments(name), target.root / "log")
        return last

    return judged(outcome, codes, resume, target.run_of(name), target.expected)


def mutations(target: Target, first: int, count: int) -> Iterator[Case]:
    """Files with flipped bits, cut off, or with other bytes in between: read, or refused in one line."""
    from tests.support.attack_readers import readers

    read_by = readers(target)
    files = sorted(read_by)
    for number in range(first, first + count):
        choose = random.Random(number)
        file = files[number % len(files)]
        original = file.read_bytes()
        file.write_bytes(mutated(original, choose))
        try:
            outcome, fine = read_by[file]()
        finally:
            file.write_bytes(original)
        yield f"{number} {file.name}", outcome, fine


def mutated(content: bytes, choose: random.Random) -> bytes:
    """The content with one thing wrong."""
    data = bytearray(content)
    if not data:
        return b"\x00"
    place = choose.randrange(len(data))
    kind = choose.randrange(5)
    if kind == 0:
        data[place] ^= 1 << choose.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data[place : place + choose.randrange(1, 9)] = choose.randbytes(choose.randrange(1, 9))
    elif kind == 3:
        start = choose.randrange(min(len(data), 200))  # headers are where lengths and offsets are
        data[start : start + 8] = choose.choice([b"\xff" * 8, b"\x00" * 8, choose.randbytes(8)])
    else:
        data += choose.randbytes(choose.randrange(1, 50))
    return bytes(data)


def bad_inputs(target: Target, first: int, count: int) -> Iterator[Case]:
    """Command lines that make no sense: one line, exit code 2, before anything is written."""
    from tests.support.attack_inputs import command_lines

    for number, (arguments, accepted) in enumerate(command_lines(target)):
        if not first <= number < first + count:
            continue
        outcome = run_forked(arguments, target.root / "log", limit=LIMIT)
        shown = " ".join(arguments[-2:])
        shutil.rmtree(target.root / "input", ignore_errors=True)
        yield f"{number} {shown}", *_judged_input(outcome, accepted)


def _judged_input(outcome: Outcome, accepted: bool) -> tuple[str, bool]:
    if outcome.code is None:
        return "hang", False
    if outcome.traceback:
        return "traceback", False
    if outcome.code == 0:
        return "accepted", accepted
    if outcome.code != 2 or not outcome.errors:
        return f"exit code {outcome.code}", False
    return "refused in one line" if len(outcome.text.strip().splitlines()) <= 3 else "refused in many lines", True


Reader = Callable[[], tuple[str, bool]]
Files = dict[Path, Reader]
