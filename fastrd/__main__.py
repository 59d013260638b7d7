"""`python -m fastrd`, and what `torchrun -m fastrd train ...` starts."""

import sys

from .cli import main

sys.exit(main())
