"""`python -m tests.fuzz [--seconds S] [--first SEED] [TARGET ...]`: fuzz the readers; status 1 where one fails."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .runner import load_targets, run


def main() -> int:
    targets = load_targets()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"of {', '.join(targets)} (default: all)"
    )
    parser.add_argument("--seconds", type=float, default=600, help="for all targets together (default: 600)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="number of the first mutation")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for the files that led to a failure")
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - targets.keys():
        parser.error(f"unknown target {', '.join(sorted(unknown))}")
    failed = 0
    for name, (tried, failures) in run(
        arguments.targets or list(targets), arguments.seconds, arguments.first
    ).items():
        print(f"{name}: {tried} mutations, {len(failures)} failures", flush=True)
        for failure in failures:
            print(f"  seed {failure.seed}: {failure.text.strip()}")
            if arguments.keep:
                arguments.keep.mkdir(parents=True, exist_ok=True)
                (arguments.keep / f"{name}-{failure.seed}").write_bytes(failure.blob)
        failed += len(failures)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
