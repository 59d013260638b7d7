"""`python -m tests.fuzz [--seconds S] [--first SEED] [TARGET ...]`: fuzz the readers; status 1 where one fails."""

from __future__ import annotations

import argparse
import sys

from .runner import load_targets, run


def main() -> int:
    targets = load_targets()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(targets)} (default: all)")
    parser.add_argument("--seconds", type=float, default=600, help="for all targets together (default: 600)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="number of the first mutation")
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - targets.keys():
        parser.error(f"unknown target {', '.join(sorted(unknown))}")
    failed = False
    for name, tried, failures in run(arguments.targets or list(targets), arguments.seconds, arguments.first):
        print(f"{name}: {tried} mutations, {len(failures)} failures", flush=True)
        for text in failures:
            print(f"  {text.strip()}", flush=True)
        failed = failed or bool(failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
