"""evaluation.json: what was measured on one set of weights, added to by each evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from ..core.arguments import check_module
from ..core.documents import EVALUATION_SCHEMA, read_evaluation, write_json
from ..core.files import check_path
from ..core.fingerprint import fingerprint
from ..core.values import shown
from ..core.version import __version__
from .measures import MEASURES, needs_teacher
from .robustness import Evaluation

_IDENTITY = ("fingerprint", "dataset", "images", "n", "norm", "epsilon")


def same_subject(a: Mapping[str, Any], b: Mapping[str, Any], ignore: str = "") -> bool:
    """Whether two documents are about the same weights, images, norm and epsilon, `ignore` of them apart."""
    keys = [key for key in _IDENTITY if key not in ignore.split()]
    unsaid = {"norm": "linf", "images": None}  # of older files, which are about no other norm
    a, b = {**unsaid, **a}, {**unsaid, **b}
    return all(a.get(key) == b.get(key) or (key == "images" and None in (a[key], b[key])) for key in keys)


def write_evaluation(
    path: str | os.PathLike,
    results: Evaluation,
    *,
    model: nn.Module,
    checkpoint: str,
    dataset: str,
    teacher: nn.Module | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """Writes `results` to the JSON file `path`, beside those already there for the same model; returns it all.

    Results in the file are kept when they are of the same weights, images, norm and epsilon, and replaced by new ones
    of the same name; a file about anything else is replaced whole. Where a teacher is given, sections that compare with
    another one, or with one that an older file does not name, go; `teachers` has the fingerprint of each section's.

    Args:
        model: the evaluated network, for the fingerprint of its weights.
        checkpoint: which one it is, "last" or "best" or a file name.
        teacher: what those of the sections that compare with a teacher compare with.
        sections: further parts of the document, e.g. `alignment=gradient_alignment(...)`, kept like results; of a
            measure that takes an argument those of other arguments are kept too.

    Raises ValueError, leaving the file alone, when it is not a document of this schema.
    """
    path = check_path(path=path)
    if not isinstance(results, Evaluation):
        raise TypeError(f"results: got {shown(results)}; accepted: what evaluate returned")
    check_module("model", model, "the torch.nn.Module that was evaluated")
    for name, text in (("checkpoint", checkpoint), ("dataset", dataset)):
        if not isinstance(text, str):
            raise TypeError(f"{name}: got {shown(text)}; accepted: a string")
    mine = None if teacher is None else fingerprint(teacher)
    teachers = {name: mine for name in sections if mine and _compares(name)}
    versions = {"torch": str(torch.__version__), "fastrd": __version__}
    with suppress(PackageNotFoundError):
        versions["pyautoattack"] = version("pyautoattack")
    document = {
        "schema": EVALUATION_SCHEMA,
        "checkpoint": checkpoint,
        "fingerprint": fingerprint(model),
        "dataset": dataset,
        "images": results.images,
        "n": results.n,
        "norm": results.norm,
        "epsilon": results.epsilon,
        "device": results.device,
        "results": {name: {**entry, "device": results.device} for name, entry in results.items()},
        **sections,
        "versions": versions,
    }
    if (old := read_previous(path)) and same_subject(old, document):
        others = old.get("teachers") or {}
        if mine:
            compared = {name for name in old if name in others or _compares(name)}
            old = {name: section for name, section in old.items() if name not in compared or others.get(name) == mine}
        teachers = {name: each for name, each in others.items() if name in old and name not in sections} | teachers
        joined = ("results", *(name for name, measure in MEASURES.items() if measure.argument))
        both = {key: {**(old.get(key) or {}), **document[key]} for key in joined if key in document}
        document = {**old, **document, **both}
    if teachers or "teachers" in document:
        document["teachers"] = teachers
    write_json(path, document)
    return document


def _compares(section: str) -> bool:
    """Whether a section of the document compares with a teacher."""
    return section == "alignment" or needs_teacher(section)


def read_previous(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the document that `write_evaluation` would add to, empty where there is none. Raises as it does."""
    try:
        return read_evaluation(path)
    except ValueError as error:
        raise ValueError(f"{error}; move the file away to start a new one") from None
