"""`python -m fastrd`, and what `torchrun -m fastrd train ...` starts."""

from .cli import run

run()
