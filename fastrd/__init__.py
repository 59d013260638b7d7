"""fastrd: fast, faithful adversarial robust distillation.

Names are loaded on first use, so that `from fastrd.losses import ...` brings in the losses and nothing else.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core.version import __version__

if TYPE_CHECKING:
    from . import report
    from .core.plugins import load_plugins
    from .deploy import export
    from .evaluation import evaluate
    from .models import build_model, load_teacher
    from .recipe import Recipe
    from .workflow import evaluate_run, load_student, train

__all__ = [
    "Recipe",
    "__version__",
    "build_model",
    "evaluate",
    "evaluate_run",
    "export",
    "load_plugins",
    "load_student",
    "load_teacher",
    "report",
    "train",
]

_HOMES = {
    "Recipe": "recipe",
    "build_model": "models",
    "evaluate": "evaluation",
    "evaluate_run": "workflow",
    "export": "deploy",
    "load_plugins": "core.plugins",
    "load_student": "workflow",
    "load_teacher": "models",
    "train": "workflow",
}

_here = Path(__file__).parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "reference.py").is_file():
    # In a checkout that is not installed `fastrd.kernels` is the folder beside this one (see setup.py).
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastrd' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
