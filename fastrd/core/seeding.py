"""Counter-based seeds: every random draw of a run is a function of where it happens, not of what ran before."""

from __future__ import annotations

import hashlib
import json
import operator
from typing import Any


def derive_seed(seed: int, *path: int | str) -> int:
    """Returns a seed in [0, 2**63) for the place `path` of a run seeded with `seed`, e.g. `derive_seed(0, "attack",
    epoch, step)`.

    The first 63 bits of SHA-256 over the JSON list `[seed, *path]`: the same on every platform and version, with no
    relation between neighbouring places. `1` and `"1"` are different places. torch's CPU generator uses only the
    low 32 bits of a seed.

    Raises TypeError: `seed` is not an integer, or a part of `path` is neither an integer nor a string.
    """
    parts = [_integer("seed", seed), *(p if isinstance(p, str) else _integer("path", p) for p in path)]
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        accepted = "an integer" if name == "seed" else "integers and strings"
        raise TypeError(f"{name}: got {value!r}; accepted: {accepted}") from None
