"""Writes the measured tables into README.md and docs/, and what recipes take: `python -m bench.pages`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is between them comes from bench/results/*.json,
or from the classes of recipes and methods, and nowhere else. The tests fail where a page differs from what this module
would write.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from fastrd.methods import ADDONS, BASES
from fastrd.recipe import SECTIONS
from fastrd.report import benchmarks
from fastrd.report.metrics import ACCURACIES, METRICS, mean_text
from fastrd.report.statistics import t_half_width, wilson_half_width
from fastrd.report.tables import MISSING, Cell, Column, Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = ("README.md", "docs/recipes.md", "docs/results.md", "docs/performance.md", "docs/data.md", "docs/gacd.md")
SHORT = ("pgd_at", "ard", "ard+igdm", "ard+igdm+gacd", "adaad", "adaad+igdm")
DEMO = {
    "demo-teacher": "PGD-AT",
    "demo-at": "PGD-AT, no teacher",
    "demo-ard": "ARD",
    "demo-igdm": "ARD + IGDM",
    "demo-gacd": "ARD + IGDM + GACD",
}
PROBES = {
    "Probe cifar100, Clean": "CIFAR-100 probe, clean",
    "Probe cifar100, PGD-20": "CIFAR-100 probe, PGD-20",
}
_PLACE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


@cache
def measured(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def infos(name: str) -> Iterator[tuple[dict[str, Any], float]]:
    """(what the benchmark says of itself, median seconds) of each benchmark of a file."""
    for benchmark in measured(name)["benchmarks"]:
        yield benchmark["extra_info"], benchmark["stats"]["median"]


def table(head: str, rows: Iterator[list[str]] | list[list[str]], *, numeric: bool = True) -> str:
    """Markdown; `head` holds the titles, separated by |."""
    columns = [Column(title.strip(), numeric=numeric and place > 0) for place, title in enumerate(head.split("|"))]
    return Table(columns, [[Cell(text) for text in row] for row in rows]).markdown()


def recipe_keys() -> str:
    """The fields of a recipe's sections, with the comments that stand beside or above them."""
    field = re.compile(r"(\w+): ([^=#]+?)(?: = ([^#]+?))?(?:  # (.*))?")
    rows = []
    for section, kind in SECTIONS.items():
        above = []
        for line in map(str.strip, inspect.getsource(kind).splitlines() if section not in UNLISTED else ()):
            if line.startswith("def "):
                break
            if found := field.fullmatch(line):
                name, accepted, default, beside = found.groups()
                said = " ".join([*above, beside or ""]).strip()
                rows.append([f"{section}.{name}", _accepted(accepted), _default(default), said])
            above = [*above, line.removeprefix("# ")] if line.startswith("# ") else []
    return table("Key | Accepted | Default | Meaning", rows, numeric=False)


UNLISTED = ("clean_teacher", "paper")


def _accepted(annotation: str) -> str:
    kind, _, rest = annotation.removesuffix(" | None").partition("[")
    if kind == "Literal":
        return ", ".join(value.strip(' "]') for value in rest.split(","))
    words = {"str": "text", "int": "integer", "float": "number", "bool": "true, false", "dict": "table"}
    return "list" if kind == "tuple" else words[kind]


def _default(source: str | None) -> str:
    if source in (None, "None"):
        return "required" if source is None else MISSING
    words = {"True": "true", "False": "false", "field(default_factory=dict)": "empty"}
    return words.get(source, source.strip("()").replace('"', "").replace(" / ", "/"))


def losses() -> str:
    """Base losses and add-ons: the first paragraph of what is said of them, and their options."""
    rows = []
    for kind, terms in (("base loss", BASES), ("add-on", ADDONS)):
        for name, term in sorted(terms.items()):
            formula = " ".join((inspect.getdoc(term) or "").split("\n\n")[0].split()).replace("`", "")
            options = [
                f"{option.name.rstrip('_')}{'' if option.default is option.empty else f' = {_option(option.default)}'}"
                for option in inspect.signature(term).parameters.values()
                if option.kind is option.KEYWORD_ONLY
            ]
            rows.append([name, kind, formula, ", ".join(options) or MISSING])
    return table("Name | Kind | Loss | Options", rows, numeric=False)


def _option(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return MISSING if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def demo(data: str) -> str:
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for folder, run in measured(f"demo-{data}-cpu.json")["runs"].items():
        runs[folder.split("/")[0]].append(run)
    attacks = [name for name in ACCURACIES if name in runs["demo-ard"][0]["results"]]
    rows = []
    for name, found in runs.items():
        accuracies = [
            mean_text([100 * run["results"][attack]["accuracy"] for run in found], "{:.1f}") for attack in attacks
        ]
        alignment = [
            mean_text([run["alignment"][key] for run in found if "alignment" in run], "{:.3f}") for key in ("gd", "gc")
        ]
        rows.append([f"{name}: {DEMO[name]}", *accuracies, *alignment])
    return table(" | ".join(["Run", *(METRICS[name].title for name in (*attacks, "gd", "gc"))]), rows)


def demo_changes(data: str) -> str:
    """What `fastrd demo` printed of each part."""
    return "\n".join(f"- {line}" for line in measured(f"demo-{data}-cpu.json")["changes"])


def small_scale(data: str, names: tuple[str, ...] = ()) -> str:
    digits = {"clean": 1, "pgd20": 1, "aa": 1, "gd": 3, "gc": 3}
    rows = {}
    for row in measured(f"small-scale-{data}.json")["rows"]:
        cells = [
            f"{row['mean'][metric]:.{n}f} ± {row['deviation'][metric]:.{n}f}"
            if len(row["seeds"].get(metric, ())) >= 3
            else MISSING
            for metric, n in digits.items()
        ]
        name = row["row"].split("/")[1]
        rows[name] = [name, *cells]
    titles = [METRICS[metric].title for metric in digits]
    return table(" | ".join([data.upper().replace("CIFAR", "CIFAR-"), *titles]), [rows[n] for n in names or rows])


def evidence(name: str) -> str:
    """All of a data set: networks of one seed each, accuracies ± half their 95 % interval over the test images."""
    document, data = measured(name), "CIFAR-100" if "cifar100" in name else "CIFAR-10"
    metrics = ("clean", "pgd20", "aa", "gd", "gc")
    found = {row["row"].split("/")[1]: row["measures"][0] if row["measures"] else {} for row in document["rows"]}
    probes = [probe for probe in PROBES if any(probe in measures for measures in found.values())]
    rows = []
    for name, teacher in document["teachers"].items():
        accuracies = {metric: 100 * teacher[metric] for metric in ("clean", "pgd20") if metric in teacher}
        counts = dict.fromkeys(accuracies, teacher["n"])
        rows.append([name, *_beside_images(accuracies, counts, metrics), *(MISSING for _ in probes)])
    for row, (name, measures) in zip(document["rows"], found.items(), strict=True):
        transferred = [f"{measures[probe]:.1f}" if probe in measures else MISSING for probe in probes]
        rows.append([name, *_beside_images(row["mean"], row["n"], metrics), *transferred])
    titles = [*(METRICS[metric].title for metric in metrics), *map(PROBES.__getitem__, probes)]
    return table(" | ".join([data, *titles]), rows)


def _beside_images(values: dict[str, float], n: dict[str, int], metrics: tuple[str, ...]) -> Iterator[str]:
    for metric in metrics:
        if metric not in values:
            yield MISSING
        elif metric in ACCURACIES:
            yield f"{values[metric]:.1f} ± {100 * wilson_half_width(values[metric] / 100, n[metric]):.1f}"
        else:
            yield f"{values[metric]:.3f}"


def step() -> str:
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for info, _ in infos("cpu-step.json"):
        found[info["problem"].split(":")[0]][info["variant"]] = info
    ways = ("reference", "reference, input gradient", "ours", "ours, compiled")
    rows = []
    for case, variants in found.items():
        if not variants.keys() >= set(ways):
            continue
        speeds = [variants[way]["images_per_s"] for way in ways]
        memory = [f"{variants[way]['peak_bytes'] / 1e6:,.0f}" for way in ("reference", "ours")]
        gain = max(speeds[2:]) / speeds[0]
        rows.append([case, *(f"{speed:.0f}" for speed in speeds), f"{gain:.1f}x", *memory])
    head = "Method | Reference | Input gradient only | fastrd | fastrd, compiled | Gain | Reference, MB | fastrd, MB"
    return table(head, rows)


def convolutions() -> str:
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for info, seconds in infos("cpu-conv2d.json"):
        found[info["problem"].split(": ")[0]][info["variant"]].append(1e3 * seconds)
    rows = [
        [problem, *(f"{a:.1f} / {b:.1f}" for a, b in zip(ways["ours"], ways["PyTorch"], strict=True))]
        for problem, ways in found.items()
    ]
    return table("3x3 convolution, ms, fastrd / PyTorch | Forward | And input gradient | And both gradients", rows)


def networks(file: str, *precisions: str) -> str:
    """Ours without and with compiling, beside the faster of PyTorch's two ways, for each precision."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for info, seconds in infos(file):
        problem, passes = info["problem"].split(": ")
        if passes.startswith("input gradient"):
            precision = "bf16" if passes.endswith("bf16") else "fp32"
            found[problem][f"{precision} {info['variant']}"] = 1e3 * seconds
    rows = []
    for problem, ways in found.items():
        row = [problem]
        for precision in precisions:
            theirs = [ways[way] for way in (f"{precision} PyTorch", f"{precision} PyTorch, compiled") if way in ways]
            ours = [ways.get(way) for way in (f"{precision} ours", f"{precision} ours, compiled")]
            row += [MISSING if ms is None else f"{ms:.1f}" for ms in (*ours, min(theirs, default=None))]
        rows.append(row)
    head = "fastrd | fastrd, compiled | best of PyTorch"
    titles = [f"{title.strip()}, {precision}" for precision in precisions for title in head.split("|")]
    return table(" | ".join(["Network, images, ms", *titles]), rows)


def host() -> str:
    """Operators and milliseconds that a step of each method costs the host, and those of a captured step."""
    found: dict[str, dict[str, tuple[dict[str, int], dict[str, int]]]] = defaultdict(dict)
    for info, _ in infos("cpu-host.json"):
        found[info["problem"].split(":")[0]][info["variant"]] = info["operators"], info["host_us"]
    rows = []
    for method, variants in found.items():
        (operators, times), captured = variants["ours"], variants["ours, captured"]
        count, total, attack = sum(operators.values()), sum(times.values()), times.get("attack", 0)
        milliseconds = [f"{us / 1000:.1f}" for us in (total, attack, total - attack, sum(captured[1].values()))]
        counts = str(count), str(count - operators.get("attack", 0))
        rows.append([method, *counts, *milliseconds[:3], str(sum(captured[0].values())), milliseconds[3]])
    head = "Operators | without the attack | Host, ms | the attack | the rest | Captured: operators | host, ms"
    return table(f"Method | {head}", rows)


def host_of_losses() -> str:
    times = [
        [info["problem"].removesuffix(", two samples, launches faked"), f"{1e6 * seconds:.0f}"]
        for info, seconds in infos("cpu-host-losses.json")
    ]
    return table("Loss, forward and backward | Host, us", times)


def loaders() -> str:
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file in ("cpu-loaders.json", "cpu-loaders-zen3.json"):
        for info, _ in infos(file):
            column = file + ("cifar" if "CIFAR" in info["problem"] else "stl")
            found[info["variant"]][column].append(f"{info['images_per_s'] / 1000:#.3g}".strip("."))
    rows = [[way, *map(" / ".join, columns.values())] for way, columns in found.items()]
    shapes = ("CIFAR-10", "5,000 of STL-10's shape")
    titles = [f"{shape}, {machine}" for machine in ("Xeon", "EPYC") for shape in shapes]
    return table(" | ".join(["Thousand images/s", *titles]), rows)


def gacd(kind: str) -> str:
    """GACD's variants against their base loss: means over the seeds that are there for both."""
    found: dict[tuple[str, str], dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    for key, job in measured("gacd-study.json")["jobs"].items():
        setting, seed, base, variant = key.split("/", 3)
        found[setting, base][variant][int(seed)] = job
    rows = []
    for (setting, base), variants in found.items():
        for variant, jobs in variants.items():
            seeds = [seed for seed in jobs if seed in variants["alone"] and kind in jobs[seed]]
            if not seeds:
                continue
            row = [f"{setting}, {base}, {variant}", str(len(seeds))]
            for metric in ("clean", "pgd20"):
                values = [jobs[seed][kind][metric] for seed in seeds]
                row.append(f"{mean(values):.1f}")
                if variant == "alone":
                    row.append("")
                    continue
                changes = [jobs[s][kind][metric] - variants["alone"][s][kind][metric] for s in seeds]
                half = f" ± {t_half_width(changes):.1f}" if len(seeds) >= 3 else ""
                row.append(f"{mean(changes):+.1f}{half}")
            rows.append(row)
    return table("Data, base, variant | Seeds | Clean | against alone | PGD-20 | against alone", rows)


def attack_precision_fixed() -> str:
    """Fixed networks under one attack from one start, in float32 and in bfloat16."""
    rows = []
    for key, job in measured("attack-precision.json")["jobs"].items():
        for attack in ("pgd10", "pgd20") if key.startswith("fixed/") else ():
            found = job[attack]
            shares = [100 - job["clean"], *found["broken"].values()]
            shares += [found[what] for what in ("only fp32", "only bf16", "only one of two starts", "signs differ")]
            rows.append([f"{key.removeprefix('fixed/')}, PGD-{attack[3:]}", *(f"{share:.2f}" for share in shares)])
    wrong = "Wrong clean | fp32 | bf16 | fp32, another start | only fp32 | only bf16 | only one of the starts"
    return table(f"Percent | {wrong} | Signs that differ", rows)


def attack_precision_students() -> str:
    """Students that differ in `attack.precision` alone, and their differences in pairs of one seed."""
    jobs, found = measured("attack-precision.json")["jobs"], defaultdict(dict)
    for key, job in jobs.items():
        kind, *place = key.split("/")
        if kind != "fixed":
            for metric in job.keys() - {"cpu_seconds"}:
                found[metric][tuple(place)] = job[metric]
    rows = []
    for metric, values in sorted(found.items(), key=lambda item: [*METRICS].index(item[0])):
        seeds = sorted({seed for seed, _ in values if {(seed, "fp32"), (seed, "bf16")} <= values.keys()})
        columns = {p: [values[seed, p] for seed in seeds] for p in ("fp32", "bf16")}
        changes = [half - full for full, half in zip(*columns.values(), strict=True)]
        change = f"{mean(changes):+.2f} ± {t_half_width(changes):.2f}" if len(seeds) >= 3 else MISSING
        rows.append([METRICS[metric].title, str(len(seeds)), *(f"{mean(c):.2f}" for c in columns.values()), change])
    return table("Accuracy | Pairs | fp32 inside | bf16 inside | Difference", rows)


def peers() -> str:
    """Attacks by fastrd and by other packages: images/s, and megabytes."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for info, seconds in infos("cpu-attacks.json"):
        name, network, images = info["problem"].split(", ")
        speed = int(images.split()[0]) / seconds
        found[f"{name}, {network}"][info["variant"]] = f"{speed:.1f} ({info['peak_bytes'] / 1e6:.0f} MB)"
    ways = ("ours", "torchattacks", "foolbox", "autoattack")
    rows = [[problem, *(speeds.get(way, MISSING) for way in ways)] for problem, speeds in found.items()]
    return table("Attack, network | fastrd | torchattacks | foolbox | AutoAttack", rows)


def growth() -> str:
    """How time and memory grow, from the smallest size of each series to the largest."""
    rows = []
    for name, found in measured("cpu-growth.json")["series"].items():
        first, last = found["points"][0], found["points"][-1]
        seconds = [f"{point['seconds']:.3g}" for point in (first, last)]
        memory = [f"{point['peak_bytes'] / 1e6:,.0f}" for point in (first, last)]
        sizes = f"{first['size']:,} to {last['size']:,}"
        exponent = f"{found['exponent']:.2f}"
        # Of other processes nothing is known.
        peak = MISSING if name == "processes" else " to ".join(memory)
        rows.append([found["title"], sizes, " to ".join(seconds), exponent, peak])
    return table("Series | Sizes | Seconds | Exponent | Peak, MB", rows)


def busy_machine() -> str:
    speeds = measured("cpu-busy-machine.json")["images_per_s"]
    rows = [[way, *(f"{found[beside]:.0f}" for beside in found)] for way, found in speeds.items()]
    return table("Threads wait by | Alone | Beside a busy loop | Two at once, each", rows)


def kernels() -> str:
    """Every other benchmark there is, one table for each kernel and machine."""
    shown = ("step", "conv2d", "networks", "loaders", "host", "host-losses", "attacks")
    files = [
        path
        for path in sorted(RESULTS.glob("*.json"))
        if path.stem.removeprefix("cpu-").removesuffix("-zen3") not in shown and "benchmarks" in measured(path.name)
    ]
    blocks = []
    for machine in benchmarks.load(files):
        conditions = {**machine.conditions, "files": ", ".join(machine.files)}
        blocks.append(", ".join(f"{name} {value}" for name, value in conditions.items() if value) + ":")
        for name, found in machine.kernels.items():
            blocks += [f"**{name}**", benchmarks.table(found).markdown()]
    return "\n\n".join(blocks)


TABLES: dict[str, Callable[[], str]] = {
    "demo": lambda: demo("digits"),
    "demo, changes": lambda: demo_changes("digits"),
    "demo, CIFAR-10": lambda: demo("cifar10"),
    "demo, CIFAR-10, changes": lambda: demo_changes("cifar10"),
    "small scale, CIFAR-10, short": lambda: small_scale("cifar10", SHORT),
    "small scale, CIFAR-10": lambda: small_scale("cifar10"),
    "small scale, CIFAR-100": lambda: small_scale("cifar100"),
    "losses": losses,
    "recipe keys": recipe_keys,
    "all of CIFAR-10": lambda: evidence("evidence-cifar10.json"),
    "all of CIFAR-10, IGDM": lambda: evidence("evidence-cifar10-igdm.json"),
    "all of CIFAR-10, TRADES": lambda: evidence("evidence-cifar10-trades.json"),
    "all of CIFAR-10, VFD": lambda: evidence("evidence-cifar10-vfd.json"),
    "all of CIFAR-10, GACD": lambda: evidence("evidence-cifar10-gacd.json"),
    "all of CIFAR-10, AdaAD": lambda: evidence("evidence-cifar10-adaad.json"),
    "all of CIFAR-100": lambda: evidence("evidence-cifar100.json"),
    "GACD, held out": lambda: gacd("held_out"),
    "GACD, test": lambda: gacd("test"),
    "GACD, probe": lambda: gacd("probe"),
    "step": step,
    "convolutions": convolutions,
    "networks": lambda: networks("cpu-networks.json", "fp32", "bf16"),
    "networks, Zen 3": lambda: networks("cpu-networks-zen3.json", "fp32"),
    "attack precision, fixed": attack_precision_fixed,
    "attack precision, students": attack_precision_students,
    "host": host,
    "host, losses": host_of_losses,
    "loaders": loaders,
    "peers": peers,
    "growth": growth,
    "busy machine": busy_machine,
    "kernels": kernels,
}


def filled(text: str) -> str:
    """Returns the page with its tables written anew. Raises KeyError for a table that is not in `TABLES`."""
    return _PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place[2]]()}\n\n{place[3]}", text)


def main() -> None:
    for name in PAGES:
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
