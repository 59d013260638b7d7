"""TINY: benchmarks run on problems that take no time, to try out what runs them (`python -m bench.gpu_report
--dry-run`)."""

import os

TINY = "FASTRD_BENCH_TINY" in os.environ
