"""Rerunning published tables: from a table of facts to one page that puts the paper beside what came out here."""

from __future__ import annotations

__all__ = ["Outcome", "reproduce"]


def __getattr__(name: str):
    # A job is a module of this package, and prepares its process before torch is imported.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import run

    return getattr(run, name)
