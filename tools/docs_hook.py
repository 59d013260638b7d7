"""mkdocs calls this after it built the site: a public name that no page documents is an error."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

MODULES = ("fastrd", "fastrd.losses", "fastrd.attacks", "fastrd.methods", "fastrd.evaluation", "fastrd.data")


def public_names(module: str) -> list[str]:
    """Returns what `__all__` lists, or else what the module defines; modules and dunder names left out."""
    found = importlib.import_module(module)
    own = [name for name, value in vars(found).items() if getattr(value, "__module__", None) == module]
    names = getattr(found, "__all__", own)
    return [n for n in names if not n.startswith("_") and not inspect.ismodule(getattr(found, n))]


def on_post_build(config: Any) -> None:
    for module in MODULES:
        page = Path(config["site_dir"]) / "api" / module.rpartition(".")[2] / "index.html"
        html = page.read_text(encoding="utf-8")
        found = importlib.import_module(module)
        missing = []
        for name in public_names(module):
            home = getattr(getattr(found, name), "__module__", module)  # where a name hides a module of that name
            if not any(f'id="{place}.{name}"' in html for place in (module, home)):
                missing.append(name)
        if missing:
            raise PluginError(f"{module}: no documentation for {', '.join(missing)}; accepted: a docstring")
