"""Targets, mutations of bytes and of trees, and the loop that tries them."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import math
import random
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fastrd.engine.errors import NonFiniteLoss

# What the command line turns into one line and status 2; anything else would be a traceback.
FORESEEN = (ValueError, OSError, ImportError, NonFiniteLoss)
Mutation = Callable[[bytes, random.Random], bytes]
Attempt = Callable[[random.Random], object]


@dataclass(frozen=True)
class Target:
    """Something that reads damaged files.

    Args:
        start: makes sound files in an empty folder and returns what damages one, by the random numbers it is given, and
            reads it as the product does. That may end in a `FORESEEN` error with a message.
        slow: left out of the short run in the tests.
    """

    name: str
    start: Callable[[Path], Attempt]
    slow: bool = False


TARGETS: dict[str, Target] = {}


def register(target: Target) -> None:
    TARGETS[target.name] = target


def file_target(
    name: str,
    make: Callable[[Path], Path],
    read: Callable[[Path], object],
    mutate: Mutation,
    *,
    slow: bool = False,
) -> None:
    """Registers the target of one file: `make` writes it, and what has to stand around it, into a folder."""

    def start(folder: Path) -> Attempt:
        sound = folder / "sound"
        sound.mkdir()
        relative = make(sound).relative_to(sound)
        blob = (sound / relative).read_bytes()
        read(sound / relative)

        def attempt(rng: random.Random) -> None:
            damaged = folder / "damaged"
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(sound, damaged)
            (damaged / relative).write_bytes(mutate(blob, rng))
            read(damaged / relative)

        return attempt

    register(Target(name, start, slow))


def load_targets() -> dict[str, Target]:
    for file in sorted(Path(__file__).parent.glob("targets_*.py")):
        importlib.import_module(f"{__package__}.{file.stem}")
    return TARGETS


def attempts(target: Target, first: int = 0) -> Iterator[str]:
    """Yields what is wrong with the outcome of each mutation, numbered from `first` on, without an end;
    "" for nothing."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attempt = target.start(Path(folder))
        for seed in itertools.count(first):
            try:
                attempt(random.Random(seed))
            except FORESEEN as error:
                yield "" if str(error).strip() else f"seed {seed}: {type(error).__name__} without a message"
            except Exception:  # whatever it is, it is what is looked for
                yield f"seed {seed}: {traceback.format_exc()}"
            else:
                yield ""


def run(names: list[str], seconds: float, first: int) -> Iterator[tuple[str, int, list[str]]]:
    """Yields (target, number of mutations, failures); the targets share the time."""
    for name in names:
        tried, failures, until = 0, [], time.monotonic() + seconds / len(names)
        for text in attempts(TARGETS[name], first):
            tried += 1
            failures += [text] if text else []
            if time.monotonic() > until or len(failures) >= 20:
                break
        yield name, tried, failures


def mutate_bytes(blob: bytes, rng: random.Random) -> bytes:
    """Flips, removes, repeats and inserts bytes."""
    data = bytearray(blob)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
            case 2:
                del data[place : place + rng.randrange(1, 40)]
            case 3:
                data[place:place] = data[place : place + rng.randrange(1, 200)]
            case 4:
                del data[place:]
            case 5:
                data[place:place] = rng.choice(TOKENS)
    return bytes(data)


TOKENS = (
    b"[" * 3000,
    b"{" * 3000,
    b"nan",
    b"-inf",
    b"1e999",
    b"9" * 400,
    b"9" * 5000,
    b"null",
    b"\x00",
    b'"',
    b"\\ud800",
)
TOKENS += (
    "é".encode(),
    "\U0001f600".encode(),
    b"\xff\xfe",
    b"\n",
    b"\r\n",
    b"a.b.c.d = 1\n",
    b"true",
    b"1979-05-27",
)


def strange(rng: random.Random) -> Any:
    """Returns a value that belongs hardly anywhere."""
    nest: Any = {}
    for _ in range(rng.choice((3, 40, 400))):
        nest = {"a": nest} if rng.random() < 0.5 else [nest]
    values = (None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, -1e308, 1e-320, math.nan, math.inf, 0.5)
    values += (
        "",
        "x" * 10_000,
        "\x00",
        "8/255",
        "0.3",
        "nan",
        "../..",
        "/",
        "a\nb",
        "é\U0001f600\x7f",
        [],
        {},
        [[]],
    )
    return rng.choice((*values, [None], {"a": 1}, ["a", 1], {"": {}}, [0.1] * 50, nest))


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """Returns a copy with a few values replaced, removed, renamed, moved or added."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(tree))
        if not places:
            return strange(rng)
        holder, key = rng.choice(places)
        match rng.randrange(7):
            case 0 | 1 | 2:
                holder[key] = strange(rng)
            case 3:
                del holder[key]
            case 4:
                holder[key] = copy.deepcopy(rng.choice(places)[0])
            case 5 if isinstance(holder, dict):
                holder[rng.choice(("name", "x", "", "a.b", "é", key + "x"))] = holder.pop(key)
            case _:
                holder[key] = [holder[key]]
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    left = [tree]
    while left:
        holder = left.pop()
        if isinstance(holder, dict):
            keys: list[Any] = list(holder)
        elif isinstance(holder, list):
            keys = list(range(len(holder)))
        else:
            continue
        for key in keys:
            yield holder, key
            left.append(holder[key])


def mutate_json(blob: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(blob, rng)
    return json.dumps(mutate_tree(json.loads(blob), rng)).encode()


def mutate_jsonl(blob: bytes, rng: random.Random) -> bytes:
    lines = blob.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    lines[place] = mutate_json(lines[place], rng) + rng.choice((b"\n", b"\n", b""))
    return b"".join(lines)


def mutate_toml(blob: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(blob, rng)
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib
    tree = mutate_tree(tomllib.loads(blob.decode()), rng)
    try:
        return tomli_w.dumps(tree).encode()
    except (TypeError, AttributeError, ValueError, RecursionError):  # what TOML, or its writer, cannot hold
        return mutate_bytes(blob, rng)
