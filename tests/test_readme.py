"""What the README shows works, every file it names is there, and its tables hold what those files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastrd.recipe import available

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
RUNNABLE = [block for block in BLOCKS if "train(" not in block]  # that one trains ResNet-18 for thirty epochs

DEMO = "| run | clean | FGSM | PGD-20 | C&W | AutoAttack | GD | GC | training |"


@pytest.mark.parametrize("number", range(len(RUNNABLE)))
def test_python_blocks_run(number):
    exec(compile(RUNNABLE[number], f"README.md block {number}", "exec"), {})  # noqa: S102
    assert "fastrd" in RUNNABLE[number]


def test_the_training_block_compiles_and_its_recipe_exists():
    (block,) = [block for block in BLOCKS if "train(" in block]
    compile(block, "README.md", "exec")
    assert re.search(r'Recipe.load\("([^"]+)"', block)[1] in available()


def test_named_files_and_recipes_exist():
    files = re.findall(r"!\[[^]]*\]\(([^)]+)\)|\]\(([^)h][^)]*)\)|`(bench/results/[^`]+)`", TEXT)
    named = [name for group in files for name in group if name]
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
    recipes = re.findall(r"fastrd train (\S+)", TEXT)
    assert recipes and set(recipes) <= set(available())


def test_opening_commands_are_make_targets():
    opening = re.search(r"```bash\n(.*?)```", TEXT, re.DOTALL)[1]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", opening, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def measured(name: str) -> dict:
    return json.loads((ROOT / "bench" / "results" / name).read_text(encoding="utf-8"))


def table(header: str) -> dict[str, list[str]]:
    """First cell -> the other cells of the README's table under that header line."""
    lines = TEXT[TEXT.index(f"\n{header}\n") + 1 :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("`"): rest for first, *rest in rows}


def test_the_demo_table_is_what_was_measured():
    runs = measured("demo-cifar10-cpu.json")["runs"]
    for run, shown in zip(runs.values(), table(DEMO).values(), strict=True):
        accuracies = [
            f"{100 * run['results'][attack]['accuracy']:.0f}"
            for attack in ("clean", "fgsm", "pgd20", "cw", "aa")
        ]
        alignment = [f"{run['alignment'][key]:.3f}" if "alignment" in run else "" for key in ("gd", "gc")]
        assert shown == [*accuracies, *alignment, f"{run['train_seconds']:.0f} s"]


def test_the_step_table_is_what_was_measured():
    found: dict[str, dict[str, dict]] = {}
    for benchmark in measured("cpu-step.json")["benchmarks"]:
        info = benchmark["extra_info"]
        found.setdefault(info["problem"].split(":")[0], {})[info["variant"]] = info
    for case, shown in table("| | reference | input only | ours | ours, compiled | gain |").items():
        ways = [
            found[case][way] for way in ("reference", "reference, input gradient", "ours", "ours, compiled")
        ]
        speeds = [f"{way['images_per_s']:.0f} ({way['peak_bytes'] / 1e6:,.0f} MB)" for way in ways]
        speeds[1] = speeds[1].split(" ")[0]
        gains = [f"{way['images_per_s'] / ways[0]['images_per_s']:.1f}x" for way in ways[2:]]
        assert shown == [*speeds, ", ".join(gains)]


def test_the_table_of_convolutions_is_what_was_measured():
    found: dict[str, dict[str, list[float]]] = {}
    for benchmark in measured("cpu-conv2d.json")["benchmarks"]:
        problem = benchmark["extra_info"]["problem"].split(": ")[0]
        ways = found.setdefault(problem, {})
        ways.setdefault(benchmark["extra_info"]["variant"], []).append(1e3 * benchmark["stats"]["median"])
    header = "| 3x3, fp32, ours / PyTorch (oneDNN) | forward | and input gradient | and both gradients |"
    for problem, shown in table(header).items():
        pairs = zip(found[problem]["ours"], found[problem]["PyTorch"], strict=True)
        assert shown == [f"{ours:.1f} / {theirs:.1f} ms" for ours, theirs in pairs]


def test_the_table_of_networks_is_what_was_measured():
    found: dict[str, dict[str, str]] = {}
    for benchmark in measured("cpu-networks.json")["benchmarks"]:
        info = benchmark["extra_info"]
        problem, passes = info["problem"].split(": ")
        if passes == "input gradient":
            shown = f"{1e3 * benchmark['stats']['median']:.0f} ms ({info['peak_bytes'] / 1e6:.0f} MB)"
            found.setdefault(problem, {})[info["variant"]] = shown
    header = "| network, images, fp32 | ours | layer by layer | PyTorch (oneDNN) |"
    for problem, shown in table(header).items():
        assert shown == [found[problem][variant] for variant in ("ours", "layer by layer", "PyTorch")]


def test_the_loader_table_is_what_was_measured():
    found: dict[str, dict[str, list[float]]] = {}
    for benchmark in measured("cpu-loaders.json")["benchmarks"]:
        info = benchmark["extra_info"]
        shape = "cifar" if "CIFAR" in info["problem"] else "stl"
        found.setdefault(info["variant"], {}).setdefault(shape, []).append(info["images_per_s"])
    shown = table("| | CIFAR-10, real, in full | 5,000 of the shape of STL-10 |")
    assert shown == {
        variant: [
            " / ".join(f"{speed / 1000:#.3g}".strip(".") for speed in found[variant][shape])
            for shape in ("cifar", "stl")
        ]
        for variant in ("resident", "ffcv", "torch", "torchvision + DataLoader")
    }


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_the_small_scale_tables_are_what_was_measured(data):
    def shown(row: dict, metric: str, digits: int) -> str:
        if len(row["seeds"].get(metric, ())) < 3:
            return "–"
        return f"{row['mean'][metric]:.{digits}f} ± {row['deviation'][metric]:.{digits}f}"

    digits = {"clean": 1, "pgd20": 1, "aa": 1, "gd": 3, "gc": 3}
    rows = measured(f"small-scale-{data}.json")["rows"]
    header = f"| {data.upper().replace('CIFAR', 'CIFAR-')} | clean | PGD-20 | AutoAttack | GD | GC |"
    assert table(header) == {
        row["row"].split("/")[1]: [shown(row, metric, n) for metric, n in digits.items()] for row in rows
    }
