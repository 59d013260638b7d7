"""What the processor can do, and what that means here."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

MEANING = {
    "AVX2": (("avx2", "fma"), "float32 8 numbers at a time"),
    "AVX-512": (("avx512f", "avx512bw", "avx512dq", "avx512vl"), "float32 16 numbers at a time"),
    "AVX512-BF16": (("avx512_bf16",), "products of bfloat16, at most twice as fast as float32"),
    "AMX": (("amx_tile", "amx_bf16"), "products of whole tiles of bfloat16, several times as fast as float32"),
}
"""name -> (flags of /proc/cpuinfo, meaning)"""
BF16 = ("AVX512-BF16", "AMX")
"""With none of these a processor computes bfloat16 in float32, which is slower than float32 itself."""


@functools.cache
def features() -> tuple[str, ...]:
    """Those of `MEANING` that the processor has; none where that cannot be known."""
    flags = {flag for line in identity().splitlines() if line.startswith("flags") for flag in line.split()}
    return tuple(name for name, (needed, _) in MEANING.items() if flags.issuperset(needed))


def describe(found: tuple[str, ...]) -> str:
    """One line about such features."""
    said = [f"{name}: {MEANING[name][1]}" for name in found]
    if not {*found} & {*BF16}:
        said.append("no AVX512-BF16 and no AMX: bf16 is slower than fp32" if said else "nothing known of it")
    return "; ".join(said)


@functools.cache
def identity() -> str:
    """What code made for this processor depends on, for a home folder that different machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def cache() -> Path:
    """The folder of what was found out or built for this machine; an OSError where there is no home, or no room."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not named.is_absolute():  # the standard has such a one ignored
        try:
            named = Path.home() / ".cache"
        except RuntimeError as error:  # a user without an entry in the system's list
            raise OSError(str(error)) from None
    folder = named / "fastrd"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
