"""The page of the benchmarks: each kernel beside what it was measured against, from pytest-benchmark's JSON."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.files import read_json
from ..core.values import as_number
from .document import Section
from .figures import INK, Plot, Series
from .tables import MISSING, Cell, Table, numeric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS = "ours"
LARGEST = 1e30  # of what a file measures: quotients of two such numbers are finite
BREAKDOWN = "Where the time goes"
NOTES = (
    "Time: median over the rounds, in parentheses their quartiles. Where these are far apart, so are two runs.",
    "Speed-up: this variant's time over ours on the same problem; below 1 ours is the slower one.",
    "GB/s and TFLOP/s: bytes and operations that the problem needs, whatever a variant does, over its time.",
    "Share of the floor: the least time in which the GPU could move those bytes and do those operations, over the "
    "time.",
    "Peak memory: taken beyond what was held before, gradients and what CUDA graphs hold included.",
    f"{BREAKDOWN}: shares of it that the device is busy with each kind of work; for the rest nobody works, or Python "
    "does.",
)


@dataclass(frozen=True)
class Measurement:
    """One variant on one problem. Seconds, bytes; None where the file does not say."""

    kernel: str
    problem: str
    variant: str
    seconds: float
    quartiles: tuple[float, float] | None
    peak_bytes: float | None
    images_per_s: float | None
    gb_per_s: float | None
    tflop_per_s: float | None
    floor_seconds: float | None
    seconds_by_kind: dict[str, float]  # of work

    @property
    def shares(self) -> Counter[str]:
        """Of the time, by kind of work."""
        # Measured apart, and maybe in a slower moment, the parts can be more than the whole.
        whole = max(self.seconds, sum(self.seconds_by_kind.values()))
        return Counter({kind: part / whole for kind, part in self.seconds_by_kind.items()})


class Machine(NamedTuple):
    """What was measured under one set of conditions, maybe over several files."""

    conditions: dict[str, str]
    files: list[str]
    measurements: list[Measurement]

    @property
    def kernels(self) -> dict[str, list[Measurement]]:
        names = dict.fromkeys(m.kernel for m in self.measurements)
        return {name: [m for m in self.measurements if m.kernel == name] for name in names}


def load(files: Sequence[str | os.PathLike]) -> list[Machine]:
    """Returns the measurements in these files, those made under the same conditions together.

    Raises FileNotFoundError and ValueError as `fastrd.report.build_benchmarks` says.
    """
    if not files:
        raise ValueError("bench: none given; accepted: JSON files of `pytest bench --benchmark-json=FILE`")
    machines: dict[tuple, Machine] = {}
    for path in map(Path, files):
        if (document := read_json(path)) is None:
            raise FileNotFoundError(f"bench: {path}: no such file")
        entries = document.get("benchmarks")
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{path}: benchmarks: got {entries!r}; accepted: a list of measurements")
        conditions = _conditions(document)
        machine = machines.setdefault(tuple(conditions.items()), Machine(conditions, [], []))
        machine.files.append(path.name)
        for place, entry in enumerate(entries):
            measurement = _measurement(entry, f"{path}: benchmarks[{place}]")
            if any(_name(measurement) == _name(other) for other in machine.measurements):
                raise ValueError(f"{path}: {', '.join(_name(measurement))}: measured twice; accepted: once")
            machine.measurements.append(measurement)
    return list(machines.values())


def sections(machines: Sequence[Machine]) -> list[Section]:
    """Returns the page about these measurements: each machine, its kernels, and how to read the tables."""
    found = []
    for number, machine in enumerate(machines):
        found.append(Section(machine.conditions.get("Device") or "Unknown device", tables=[conditions(machine)]))
        for name, measured in machine.kernels.items():
            file = f"{name}-{number + 1}" if number else name
            found.append(Section(name, 3, file, plots=plots(measured), tables=[table(measured)]))
            if (parts := breakdown(measured)) is not None:
                found.append(Section(BREAKDOWN, 4, tables=[parts]))
    return [*found, Section("How to read it", notes=NOTES)]


def table(measurements: Sequence[Measurement]) -> Table:
    """Returns one kernel's measurements, a line each."""
    ours = {m.problem: m.seconds for m in measurements if m.variant == OURS}
    numbers = [_numbers(m, ours.get(m.problem)) for m in measurements]
    titles = [title for title in numbers[0] if any(row[title] is not None for row in numbers)]
    rows = []
    for m, found in zip(measurements, numbers, strict=True):
        quartiles = "" if m.quartiles is None else "({} to {})".format(*(_three(1e3 * q) for q in m.quartiles))
        rows.append(
            [m.problem, m.variant, Cell(_three(1e3 * m.seconds), quartiles), *(_three(found[t]) for t in titles)]
        )
    return Table.of(["Problem", "Variant", *map(numeric, ("Time, ms", *titles))], rows)


def breakdown(measurements: Sequence[Measurement]) -> Table | None:
    """Returns a table of where the time of one kernel's measurements goes; None where no file says."""
    known = [m for m in measurements if m.seconds_by_kind]
    if not known:
        return None
    kinds = [kind for kind, _ in sum((m.shares for m in known), Counter()).most_common()]
    rows = []
    for m in known:
        shares: list[float] = [m.shares[kind] for kind in kinds]
        shares.append(max(0.0, 1 - sum(shares)))
        rows.append([m.problem, m.variant, *(f"{100 * share:.1f}" for share in shares)])
    titles = [f"{kind[:1].upper()}{kind[1:]}, %" for kind in (*kinds, "the rest")]
    return Table.of(["Problem", "Variant", *map(numeric, titles)], rows)


def conditions(machine: Machine) -> Table:
    """Returns a table of where and with what a machine's figures were made."""
    rows = {**machine.conditions, "Files": ", ".join(machine.files)}
    return Table.of(["Condition", "Value"], [[name, value or MISSING] for name, value in rows.items()])


def plots(measurements: Sequence[Measurement]) -> list[Plot]:
    """Plots time and peak memory of one kernel, a line per problem and a mark per variant. An upright stroke is the
    floor."""
    names = sorted(dict.fromkeys(m.variant for m in measurements), key=lambda name: name != OURS)
    series = {name: Series(name, index) for index, name in enumerate(names)}
    problems = list(dict.fromkeys(m.problem for m in measurements))
    height = 0.9 + 0.42 * len(problems)

    def draw(axes: Axes, values: Sequence[float | None], floors: bool) -> None:
        for m, value in zip(measurements, values, strict=True):
            y, style = -problems.index(m.problem), series[m.variant]
            if value is not None:
                zorder = 4 if m.variant == OURS else 3
                axes.plot(value, y, style.marker, color=style.color, markersize=6, zorder=zorder)
            if floors and m.floor_seconds is not None:
                axes.plot(1e3 * m.floor_seconds, y, "|", color=INK, markersize=13)
        for place, problem in enumerate(problems):
            axes.annotate(
                problem, (0, -place), xycoords=("axes fraction", "data"), xytext=(2, 7),
                textcoords="offset points", fontsize=7.5, alpha=0.8,
            )  # fmt: skip
        axes.set(yticks=range(1 - len(problems), 1), yticklabels=[], ylim=(0.5 - len(problems), 0.75))
        axes.tick_params(axis="y", length=0)

    def draw_time(axes: Axes) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes.set_xscale("log")
        draw(axes, [1e3 * m.seconds for m in measurements], floors=True)
        axes.margins(x=0.1)
        decades = math.log10(axes.get_xlim()[1] / axes.get_xlim()[0])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())

    def draw_memory(axes: Axes) -> None:
        draw(axes, [m.peak_bytes and m.peak_bytes / 1e6 for m in measurements], floors=False)
        axes.set_xlim(left=0)

    found = [Plot("Time, ms", tuple(series.values()), draw_time, height)]
    if any(m.peak_bytes for m in measurements):
        found.append(Plot("Peak memory, MB", tuple(series.values()), draw_memory, height))
    return found


def _conditions(document: Mapping[str, Any]) -> dict[str, str]:
    info = document.get("machine_info")
    info = info if isinstance(info, Mapping) else {}
    keys = {"Device": "device", "CPU cores": "cpus", "Threads": "threads"}
    keys |= {"Python": "python_version", "torch": "torch", "Triton": "triton"}
    return {name: "" if info.get(key) is None else str(info[key]) for name, key in keys.items()}


def _measurement(entry: Any, where: str) -> Measurement:
    accepted = "accepted: what the benchmarks in bench/ record"
    if type(entry) is not dict:
        raise ValueError(f"{where}: got {entry!r}; {accepted}")
    info, stats = (x if type(x) is dict else {} for x in (entry.get("extra_info"), entry.get("stats")))
    for key in ("problem", "variant"):
        if type(info.get(key)) is not str:
            raise ValueError(f"{where}: extra_info.{key}: got {info.get(key)!r}; {accepted}")
    seconds = _number(stats.get("median"))
    if seconds is None or not 1 / LARGEST <= seconds <= LARGEST:
        raise ValueError(f"{where}: stats.median: got {stats.get('median')!r}; accepted: seconds above 0")
    low, high = _number(stats.get("q1")), _number(stats.get("q3"))
    keys = ("peak_bytes", "images_per_s", "gb_per_s", "tflop_per_s", "floor_seconds")
    numbers = {key: _number(info.get(key)) for key in keys}
    for key, number in {"stats.q1": low, "stats.q3": high, **numbers}.items():
        if number is not None and not 0 <= number <= LARGEST:
            raise ValueError(f"{where}: {key}: got {number}; accepted: a number from 0 to {LARGEST:g}")
    kernel = str(entry.get("name", "")).partition("[")[0].removeprefix("test_")
    parts = info.get("seconds_by_kind", {})
    if type(parts) is not dict or any(_number(part) is None or part < 0 for part in parts.values()):
        raise ValueError(f"{where}: extra_info.seconds_by_kind: got {parts!r}; accepted: seconds by kind of work")
    quartiles = None if low is None or high is None else (low, high)
    return Measurement(kernel, info["problem"], info["variant"], seconds, quartiles, seconds_by_kind=parts, **numbers)


def _number(value: Any) -> float | None:
    return None if isinstance(value, str) else as_number(value)


def _name(m: Measurement) -> tuple[str, str, str]:
    return m.kernel, m.problem, m.variant


def _numbers(m: Measurement, ours: float | None) -> dict[str, float | None]:
    """Returns numbers by column; one that no measurement of a kernel has is left out of its table."""
    return {
        "Speed-up": None if ours is None or m.variant == OURS else m.seconds / ours,
        "Images/s": m.images_per_s,
        "GB/s": m.gb_per_s,
        "TFLOP/s": m.tflop_per_s,
        "Share of the floor, %": None if m.floor_seconds is None else 100 * m.floor_seconds / m.seconds,
        "Peak memory, MB": None if m.peak_bytes is None else m.peak_bytes / 1e6,
    }


def _three(value: float | None) -> str:
    """Returns three significant digits, never as a power of ten."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"
