"""Attacks runs of a tiny model and counts what came of it: the table of docs/reliability.md.

    OMP_NUM_THREADS=1 python scripts/attack.py --kills 100 --ranks 12 --failures 60 --mutations 10000 --inputs 300

A case is made from its number, so that one that went wrong can be repeated: ``--only kills --first 17 --kills 1``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_gsq.cli.defaults import quiet_libraries
from tests.support.attack_cases import bad_inputs, failures, kills, mutations
from tests.support.attack_ranks import rank_kills
from tests.support.attack_targets import make_target

KINDS = {"kills": kills, "ranks": rank_kills, "failures": failures, "mutations": mutations, "inputs": bad_inputs}
COUNTS = {"kills": 100, "ranks": 12, "failures": 60, "mutations": 10_000, "inputs": 300}


def main() -> int:
    """Runs the attacks; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, count in COUNTS.items():
        parser.add_argument(f"--{kind}", type=int, default=count, help=f"how many {kind} (default {count})")
    parser.add_argument("--only", choices=KINDS, help="one kind alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    options = parser.parse_args()
    torch.set_num_threads(1)  # forks of a process with threads would wait for ones that they do not have
    quiet_libraries()
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        target = make_target(Path(temporary))
        print("| attack | cases | outcomes |\n|---|---|---|")
        for kind, attack in KINDS.items():
            if options.only not in (None, kind):
                continue
            counts: Counter[str] = Counter()
            for name, outcome, fine in attack(target, options.first, getattr(options, kind)):
                counts[outcome] += 1
                if not fine:
                    wrong += 1
                    print(f"<!-- {kind}: {name}: {outcome} -->", file=sys.stderr, flush=True)
            print(f"| {kind} | {sum(counts.values())} | {', '.join(f'{o}: {n}' for o, n in counts.most_common())} |")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
