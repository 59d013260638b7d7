"""The report says what the run folders say: the right number in the right cell, and nothing that was not measured."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import statistics
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fastrd import report
from fastrd.report import content, figures
from fastrd.report.rows import group
from fastrd.report.runs import load
from fastrd.report.statistics import wilson_half_width
from fastrd.report.tables import escaped

ATTACKS = ("clean", "fgsm", "pgd20", "cw", "aa")
VOID = {"meta", "img", "br", "link", "path", "use"}


def write_run(
    folder: Path,
    *,
    name: str = "ard-small",
    seed: int = 0,
    method: str = '[base]\nname = "ard"\n',
    accuracies: dict[str, Any] | None = None,
    n: int = 1000,
    epsilon: float = 8 / 255,
    alignment: tuple[float, float] | None = None,
    epochs: int = 2,
    planned: int = 2,
    curve: bool = False,
    panel: bool = False,
    **terms: list[float | None],
) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(
        f"name = {json.dumps(name)}\nseed = {seed}\n[schedule]\nepochs = {planned}\n{method}",
        encoding="utf-8",
    )
    lines = []
    for epoch in range(1, epochs + 1):
        lines.append({"kind": "step", "epoch": epoch, "step": 5, "loss": 3.0, "images_per_s": 90.0})
        extra = {key: values[epoch - 1] for key, values in terms.items()}
        lines.append(
            {
                "kind": "epoch",
                "epoch": epoch,
                "lr": 0.1,
                "seconds": 10.0 + seed,
                "images_per_s": 100.0,
                "loss": 1.0,
            }
            | extra
        )
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if accuracies is not None:
        document = {
            "schema": 1,
            "checkpoint": "last",
            "dataset": "cifar10",
            "n": n,
            "epsilon": epsilon,
            "device": "cpu (2 threads)",
            "results": {
                k: v if isinstance(v, dict) else {"accuracy": v, "seconds": 1.0, "n": n} for k, v in accuracies.items()
            },
            "versions": {"torch": "2.15.0", "fastrd": "0.1.0", "pyautoattack": "0.2.0"},
        }
        if alignment:
            document["alignment"] = {"gd": alignment[0], "gc": alignment[1], "n": n}
        (folder / "evaluation.json").write_text(json.dumps(document))
    if curve:
        (folder / "curve.json").write_text(json.dumps({"epsilons": [0, 8 / 255], "accuracies": [0.6, 0.3]}))
    if panel:
        np.savez(folder / "panel.npz", **panel_arrays())
    return folder


def panel_arrays(channels: int = 3, classes: tuple[str, ...] = ("cat", "<b>dog")) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    clean = rng.random((3, 8, 8, channels)) * 0.5 + 0.25
    return {
        "clean": clean,
        "adv": clean + 8 / 255 * rng.choice([-1, 1], clean.shape),
        "label": np.array([0, 1, 1]),
        "pred_clean": np.array([0, 1, 0]),
        "pred_adv": np.array([1, 1, 0]),
        "class_names": np.array(classes),
    }


def accuracies(*values: float | None) -> dict[str, float | None]:
    return dict(zip(ATTACKS, values, strict=False))


class Page(HTMLParser):
    """The tables of a page as lists of rows of cell texts, and whether its tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).split())
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "data")]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if self.open and {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] = " ".join(f"{self.tables[-1][-1][-1]} {data}".split())


def cells(text: str) -> dict[str, dict[str, str]]:
    """A Markdown table: first cell of a row -> column -> cell."""
    lines = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def results(*folders: Path) -> dict[str, dict[str, str]]:
    return cells(content.results(group(load(folders))).markdown())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, list[Path]]:
    """One rich report: two seeds of one recipe, one with awkward names, one unevaluated."""
    root = tmp_path_factory.mktemp("report")
    runs = [
        write_run(
            root / f"igdm-{seed}",
            name="igdm-small",
            seed=seed,
            method='[base]\nname = "ard"\n[igdm]\nalpha = 10.0\n[gacd]\nestimator = "strict"\n'
            '[paper]\nsource = "Table 2 & 4"\nclean = 60.5\naa = 30.0\ngc = 0.5\n',
            accuracies=accuracies(0.6 + 0.02 * seed, 0.4, 0.35, 0.32, 0.3 + 0.01 * seed),
            alignment=(0.1, 0.55 + 0.01 * seed),
            curve=True,
            panel=seed == 0,
            igdm=[0.1, 0.2],
            val_clean=[0.5, 0.6],
            val_pgd=[0.3, None],
        )
        for seed in (0, 1)
    ]
    runs.append(
        write_run(
            root / "awkward",
            name="_<script>alert(1)</script> a|b $x^{$ *y* \x1b[31m",
            method='[base]\nname = "pgd_at"\n',
            accuracies=accuracies(0.55, None, 0.33, 0.3, 0.28),
            alignment=(0.2, 0.4),
        )
    )
    runs.append(write_run(root / "waiting", name="waiting"))
    page = report.build(runs, root / "out" / "report.html", title="A <title> & more", data="official CIFAR-10")
    return page, runs


def test_another_norm_is_named_in_tables_notes_and_cards_and_makes_another_row(tmp_path):
    assert content.epsilon_text(8 / 255) == "8/255" and content.epsilon_text(0.5, "l2") == "l2 0.5"
    a = write_run(tmp_path / "a", name="one", accuracies=accuracies(0.5), epsilon=0.5)
    b = write_run(tmp_path / "b", name="one", seed=1, accuracies=accuracies(0.5), epsilon=0.5)
    document = json.loads((b / "evaluation.json").read_text())
    (b / "evaluation.json").write_text(json.dumps({**document, "norm": "l2"}))
    curve = {"norm": "l2", "epsilons": [0, 0.5], "accuracies": [0.6, 0.3], "warnings": ["no gradient"]}
    (b / "curve.json").write_text(json.dumps(curve))
    told = report.table([a, b])
    assert "l-infinity and l2 attacks" in told and "The robustness curve warned: no gradient." in told
    assert "the epsilon is 0.5 for" in told and "l2 0.5 for" in told
    report.build([a, b], tmp_path / "report.html")
    (b / "curve.json").write_text(json.dumps({**curve, "norm": ["l2"]}))
    with pytest.raises(ValueError, match=r"curve.json: got norm \['l2'\]"):
        report.table([a, b])
    (b / "evaluation.json").write_text(json.dumps({**document, "norm": "l3"}))
    with pytest.raises(ValueError, match="evaluation.json: norm: got 'l3'"):
        report.table([a, b])


def test_numbers_stand_in_their_cells(tmp_path):
    run = write_run(tmp_path / "a", accuracies=accuracies(0.81, 0.604, 0.5, 0.444, 0.4321), alignment=(0.10249, 0.5674))
    row = results(run)["ard-small"]
    assert row["Method"] == "ARD"
    assert [row[key].split()[0] for key in ("Clean", "FGSM", "PGD-20", "C&amp;W", "AutoAttack")] == [
        "81.0", "60.4", "50.0", "44.4", "43.2",
    ]  # fmt: skip
    assert row["PGD-20"] == "50.0 (±3.1)"
    assert (row["n"], row["GD"], row["GC"], row["Training, s"]) == ("1000", "0.1025", "0.567", "20")


def test_the_page_and_the_terminal_show_the_same_table(built):
    page, runs = built
    table = Page(page.read_text(encoding="utf-8")).tables[0]
    assert table[0][-1] == "Paper"
    assert table[1][:7] == ["Run", "Method", "Clean", "FGSM", "PGD-20", "C&W", "AutoAttack"]
    first = table[2]
    assert first[0] == "igdm-small (2 seeds)"
    assert first[1] == "ARD + IGDM + GACD"
    assert first[2] == "61.0 ± 1.4 (±3.0)"
    waiting = next(row for row in table if row[0] == "waiting")
    assert waiting == ["waiting", "ARD", "not evaluated", "–", "–", "20", "–", "–", "–"]
    text = report.table(runs)
    line = next(line for line in text.splitlines() if line.startswith("waiting"))
    assert re.split(r"\s{2,}", line)[:4] == ["waiting", "ARD", "not evaluated", "–"]
    assert re.split(r"\s{2,}", text.splitlines()[2])[:3] == first[:3]


def test_without_an_evaluation_there_is_no_number(tmp_path):
    row = results(write_run(tmp_path / "a"))["ard-small"]
    assert row["Clean"] == "not evaluated"
    assert {row[key] for key in ("FGSM", "PGD-20", "C&amp;W", "AutoAttack", "n", "GD", "GC")} == {"–"}


def test_values_that_are_not_finite_are_not_measured(tmp_path):
    run = write_run(tmp_path / "a", accuracies=accuracies(0.5, None, math.nan), alignment=(math.nan, math.inf))
    row = results(run)["ard-small"]
    assert [row[key] for key in ("FGSM", "PGD-20", "GD", "GC")] == ["–"] * 4
    assert row["Clean"] == "50.0 (±3.1)"
    assert "AutoAttack" not in row
    assert '"–": not measured.' in report.table([run])


@pytest.mark.parametrize(("right", "n"), [(0, 20), (1, 20), (7, 41), (500, 1000), (999, 1000)])
def test_the_interval_is_wilsons(right, n):
    """Its ends are the p whose z-statistic against the observed fraction is 1.96, found here by bisection."""
    observed = right / n

    def bisect(outside_at: float) -> float:
        outer, inner = outside_at, observed
        for _ in range(80):
            p = (outer + inner) / 2
            if (observed - p) ** 2 > 1.959964**2 * p * (1 - p) / n:
                outer = p
            else:
                inner = p
        return p

    lower = 0.0 if right == 0 else bisect(0.0)
    assert wilson_half_width(observed, n) == pytest.approx((bisect(1.0) - lower) / 2, abs=1e-9)


def test_more_images_get_a_second_decimal(tmp_path):
    run = write_run(tmp_path / "a", accuracies=accuracies(0.6151), n=10000)
    assert results(run)["ard-small"]["Clean"] == "61.51 (±0.95)"


def test_seeds_become_mean_and_sample_deviation(tmp_path):
    values = [0.30, 0.32, 0.37]
    runs = [
        write_run(tmp_path / str(s), seed=s, accuracies=accuracies(0.5, 0.4, 0.3, 0.3, v), alignment=(0.1, v))
        for s, v in enumerate(values)
    ]
    (row,) = results(*runs).values()
    deviation = statistics.stdev(100 * v for v in values)
    assert row["AutoAttack"] == f"33.0 ± {deviation:.1f} (±2.9)"
    assert row["Clean"] == "50.0 ± 0.0 (±3.1)"
    assert row["GC"] == f"0.330 ± {deviation / 100:.3f}"
    assert row["Training, s"] == "22 ± 2"
    assert row["Run"] == "ard-small (3 seeds)"
    assert "sample standard deviation over the seeds" in report.table(runs)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 0},
        {"seed": 1, "planned": 3},
        {"seed": 1, "epsilon": 4 / 255},
        {"seed": 1, "n": 500},
        {"seed": 1, "name": "another"},
        {"seed": 1, "accuracies": None},
    ],
    ids=lambda o: next((k for k in o if k != "seed"), "same seed"),
)
def test_only_seeds_of_one_recipe_and_evaluation_are_averaged(tmp_path, other):
    first = write_run(tmp_path / "a", accuracies=accuracies(0.5))
    second = write_run(tmp_path / "b", **{"accuracies": accuracies(0.6), **other})
    rows = results(first, second)
    assert len(rows) == 2
    assert all("±" not in row["Clean"].split("(")[0] for row in rows.values())
    if "name" not in other:
        assert list(rows) == ["ard-small (a)", "ard-small (b)"]


IGDM = '[base]\nname = "ard"\n[igdm]\nalpha = 1\n'


def test_what_each_part_changes_is_told_seed_by_seed_and_whether_it_is_decided(tmp_path):
    methods = {"at": '[base]\nname = "pgd_at"\n', "ard": '[base]\nname = "ard"\n', "igdm": IGDM}
    clean = {"at": (0.50, 0.60, 0.70), "ard": (0.52, 0.63, 0.72), "igdm": (0.40, 0.51, 0.62)}
    robust = {"at": (0.30, 0.31, 0.32), "ard": (0.35, 0.30, 0.33), "igdm": (0.36, 0.30, 0.33)}
    folders = [
        write_run(
            tmp_path / f"{name}-{seed}",
            name=name,
            seed=seed,
            method=method,
            accuracies={"clean": clean[name][seed], "pgd20": robust[name][seed]},
        )
        for name, method in methods.items()
        for seed in range(3)
    ]
    text = report.table(folders)
    # differences 2, 3, 2: mean 2.33, deviation 0.577, t(2 degrees of freedom) 4.303
    assert "ard against at, 3 seeds: Clean +2.3 ± 1.4, higher; PGD-20 +1.7 ± 7.6, undecided." in text
    lower = next(line for line in text.splitlines() if line.startswith("igdm against ard"))
    assert "Clean -11.3 ± 2.9, lower" in lower and "igdm.alpha" in lower, "with the reason"
    assert "igdm against at" not in text
    one_seed = [folder for folder in folders if folder.name.endswith("-0")]
    assert "against" not in report.table(one_seed)


@pytest.mark.parametrize(
    "other",
    [
        {"epsilon": 2 / 255},
        {"n": 50},
        {"method": f"{IGDM}[attack]\nsteps = 3\n"},
        {"planned": 200},
        {"accuracies": {"fgsm": 0.5}},
    ],
)
def test_rows_that_differ_in_more_than_a_part_are_not_compared(tmp_path, other):
    plain = {"method": '[base]\nname = "ard"\n', "accuracies": {"clean": 0.5}}
    folders = [write_run(tmp_path / f"ard-{seed}", name="ard", seed=seed, **plain) for seed in range(2)]
    added = {"method": IGDM, "accuracies": {"clean": 0.6}}
    alike = [write_run(tmp_path / f"igdm-{seed}", name="igdm", seed=seed, **added) for seed in range(2)]
    assert "igdm against ard, 2 seeds: Clean +10.0" in report.table([*folders, *alike])
    added |= other
    folders += [write_run(tmp_path / f"other-{seed}", name="igdm", seed=seed, **added) for seed in range(2)]
    assert "against" not in report.table(folders)


def test_curves_and_pictures_of_other_weights_or_images_are_not_shown(tmp_path):
    folder = write_run(tmp_path / "a", accuracies={"clean": 0.5}, curve=True, panel=True)
    files = {name: folder / name for name in ("evaluation.json", "curve.json")}
    document, curve = (json.loads(file.read_text()) for file in files.values())
    (run,) = load([folder])
    assert run.curve and run.panel(), "older files do not say whose they are"
    files["evaluation.json"].write_text(json.dumps({**document, "fingerprint": "last"}))
    for whose, shown in (("last", True), ("best", False)):
        files["curve.json"].write_text(json.dumps({**curve, "fingerprint": whose}))
        np.savez(folder / "panel.npz", **panel_arrays(), fingerprint=np.array(whose))
        (run,) = load([folder])
        assert (run.curve is not None, run.panel() is not None) == (shown, shown)
    files["evaluation.json"].write_text(json.dumps({**document, "images": "these"}))
    for which, shown in (("these", True), ("others", False)):
        files["curve.json"].write_text(json.dumps({**curve, "images": which}))
        np.savez(folder / "panel.npz", **panel_arrays(), images=np.array(which))
        (run,) = load([folder])
        assert (run.curve is not None, run.panel() is not None) == (shown, shown)


def test_a_text_of_the_users_own_is_not_replaced(tmp_path):
    folder = write_run(tmp_path / "a", accuracies={"clean": 0.5})
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(FileExistsError, match=r"out: .*README.md would be replaced"):
        report.build([folder], tmp_path / "README.html")
    assert (tmp_path / "README.md").read_text() == "# Mine\n" and not (tmp_path / "README.html").exists()
    for _ in range(2):
        report.build([folder], tmp_path / "page.html")
    (tmp_path / "page.html").unlink()
    report.build([folder], tmp_path / "page.html")


def test_a_title_and_a_folder_that_are_not_utf_8_are_shown_as_they_are(tmp_path):
    folder = write_run(tmp_path / "run\udcff", name="", accuracies={"clean": 0.5})
    page = report.build([folder], tmp_path / "page.html", title="x\udcff")
    assert "<h1>x\\udcff</h1>" in page.read_text(encoding="utf-8")


def test_a_folder_given_twice_counts_once(tmp_path):
    run = write_run(tmp_path / "a", accuracies=accuracies(0.5))
    assert len(results(run, tmp_path / "." / "a")) == 1


def test_a_seed_without_a_result_is_said(tmp_path):
    a = write_run(tmp_path / "a", seed=0, accuracies=accuracies(0.5, 0.4))
    b = write_run(tmp_path / "b", seed=1, accuracies=accuracies(0.6))
    (row,) = results(a, b).values()
    assert row["FGSM"] == "40.0 (±3.0, 1 of 2 runs)"


def test_different_numbers_of_images_are_told_in_the_cells(tmp_path):
    run = write_run(tmp_path / "a", accuracies={**accuracies(0.5, 0.4), "aa": {"accuracy": 0.25, "n": 200}})
    row = results(run)["ard-small"]
    assert row["AutoAttack"] == "25.0 (±6.0, n 200)"
    assert row["n"] == "200 to 1000"


def test_attacks_beyond_the_usual_get_their_own_column(tmp_path):
    run = write_run(tmp_path / "a", accuracies={"clean": 0.5, "apgd-ce": 0.25})
    row = results(run)["ard-small"]
    assert row["apgd-ce"] == "25.0 (±2.7)"
    assert "AutoAttack" not in row


def test_paper_numbers_and_differences(built):
    row = Page(built[0].read_text(encoding="utf-8")).tables[0][2]
    assert row[-3:] == ["60.50 (+0.5)", "30.00 (+0.5)", "0.500 (+0.055)"]
    assert "Paper's numbers for igdm-small: Table 2 & 4." in Page(built[0].read_text(encoding="utf-8")).text


def test_paper_numbers_stay_when_nothing_was_measured(tmp_path):
    run = write_run(tmp_path / "a", method='[base]\nname = "ard"\n[paper]\nsource = "T"\naa = 30.32\n')
    assert results(run)["ard-small"]["Paper AutoAttack"] == "30.32"


def test_a_changed_recipe_is_not_the_papers(tmp_path):
    from fastrd.recipe import Recipe

    name = "igdm-ard-cifar100-resnet18"
    for folder, overrides in (("as-shipped", {"seed": 3}), ("changed", {"seed": 3, "schedule.epochs": 7})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "recipe.toml").write_text(Recipe.load(name, overrides).to_toml())
    assert "Not the paper's configuration" not in report.table([tmp_path / "as-shipped"])
    said = report.table([tmp_path / "changed"])
    assert re.search(rf"Not the paper's configuration.*{name} \(schedule.epochs 200 -> 7\)", said)


def test_a_torn_last_line_is_tolerated_and_said(tmp_path):
    run = write_run(tmp_path / "a", epochs=2, planned=4)
    with (run / "log.jsonl").open("ab") as log:
        log.write('{"kind": "epoch", "epoch": 3, "loss": 0.5, "näm'.encode()[:-2])
    said = report.table([run])
    assert "ard-small: the last line of log.jsonl is torn" in said
    assert "the log ends after epoch 2 of 4" in said
    assert results(run)["ard-small"]["Training, s"] == "20"


def test_an_interrupted_epoch_is_said(tmp_path):
    run = write_run(tmp_path / "a", epochs=2, planned=4)
    with (run / "log.jsonl").open("a") as log:
        log.write('{"kind": "step", "epoch": 3, "step": 12, "loss": 1.0}\n')
    assert "after epoch 2 of 4, then step 12 of epoch 3; training is unfinished" in report.table([run])


@pytest.mark.parametrize(
    ("file", "text", "where"),
    [
        ("log.jsonl", '{"kind": "step", "epoch": 1, "step": 1}\nnot json\n{"kind": "step"', "log.jsonl:2"),
        ("log.jsonl", "not json\n", "log.jsonl:1"),
        ("log.jsonl", "[1]\n", "log.jsonl:1"),
        ("log.jsonl", '{"kind": "epoch", "epoch": "1"}\n', "log.jsonl:1"),
        ("log.jsonl", '{"kind": "step", "epoch": 1, "step": 1}\n{"kind": "other"}\n', "log.jsonl:2"),
        ("recipe.toml", 'name = "a"\nseed = = 1\n', r"recipe.toml.*line 2"),
        ("recipe.toml", "data = 3\n", "recipe.toml: data: got 3"),
        ("recipe.toml", '[paper]\nsource = "x"\naa = "high"\n', "recipe.toml: paper.aa: got 'high'"),
        ("evaluation.json", '{"schema": 1,\n oops}', "evaluation.json:2"),
        ("evaluation.json", "[]", "evaluation.json:1"),
        ("evaluation.json", '{"schema": 7, "results": {}}', "evaluation.json: schema: got 7"),
        ("evaluation.json", '{"schema": 1}', "evaluation.json: results"),
        (
            "evaluation.json",
            '{"schema": 1, "results": {"aa": {"accuracy": 43.2}}}',
            "results.aa.*from 0 to 1",
        ),
        (
            "evaluation.json",
            '{"schema": 1, "results": {"aa": {"accuracy": true}}}',
            "results.aa.*from 0 to 1",
        ),
        ("evaluation.json", '{"schema": 1, "results": {"aa": {}}}', "results.aa.*from 0 to 1"),
        (
            "curve.json",
            '{"epsilons": [0, 0.1], "accuracies": [1]}',
            "curve.json: got 2 epsilons and 1 accuracies",
        ),
        ("curve.json", '{"epsilons": ["0"], "accuracies": [1]}', "curve.json: epsilons"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, file, text, where):
    run = write_run(tmp_path / "a")
    (run / file).write_text(text)
    with pytest.raises(ValueError, match=where) as caught:
        report.table([run])
    assert str(run / file) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"adv": np.zeros((3, 8, 8, 1))},
        {"clean": np.zeros((3, 8, 8, 3), np.uint8)},
        {"pred_adv": np.array([0, 1, 2])},
        {"label": np.array([0.0, 1.0, 1.0])},
        {"class_names": np.array(["cat", "dog"], dtype=object)},
        {"adv": None},
    ],
    ids=["shape", "dtype", "index", "float labels", "pickle", "missing"],
)
def test_a_malformed_panel_is_named(tmp_path, change):
    run = write_run(tmp_path / "a")
    arrays = {k: v for k, v in {**panel_arrays(), **change}.items() if v is not None}
    np.savez(run / "panel.npz", **arrays)
    with pytest.raises(ValueError, match="panel.npz"):
        report.build([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_what_is_not_there_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none"))):
        report.table([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: not a run folder"):
        report.build([tmp_path / "empty"], tmp_path / "report.html")


def test_bad_arguments(tmp_path):
    run = write_run(tmp_path / "a")
    with pytest.raises(ValueError, match="runs: none given"):
        report.table([])
    with pytest.raises(TypeError, match="runs: got .*; accepted: a list of paths"):
        report.table(str(run))
    for out in (tmp_path, tmp_path / "report.pdf"):
        with pytest.raises(ValueError, match="out: got"):
            report.build([run], out)


def test_a_folder_with_only_an_evaluation_is_enough(tmp_path):
    run = write_run(tmp_path / "downloaded", accuracies=accuracies(0.9))
    (run / "recipe.toml").unlink()
    (run / "log.jsonl").unlink()
    row = results(run)["downloaded"]
    assert (row["Method"], row["Clean"], row["Training, s"]) == ("–", "90.0 (±1.9)", "–")


def test_the_page_stands_alone(built):
    page = Page(built[0].read_text(encoding="utf-8"))
    html = built[0].read_text(encoding="utf-8")
    assert not page.tags & {"script", "link", "iframe", "object", "image"}
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert '<meta name="viewport"' in html
    assert "prefers-color-scheme: dark" in html


def test_everything_from_files_is_escaped(built):
    page, runs = built
    html, text = page.read_text(encoding="utf-8"), page.with_suffix(".md").read_text(encoding="utf-8")
    name = "_<script>alert(1)</script> a|b $x^{$ *y* \ufffd[31m"  # the escape character replaced
    assert "<script>" not in html
    assert "<script>" not in text
    assert "A &lt;title&gt; &amp; more" in html
    assert "<b>dog" not in html
    assert "&lt;b&gt;dog" in html
    assert not any("\x1b" in written for written in (html, text, report.table(runs)))
    assert "a\\|b" in text
    assert escaped(name) in text
    assert name in [row[0] for row in Page(html).tables[0]]


def test_escaped_text_is_the_same_on_the_documentation_site():
    markdown = pytest.importorskip("markdown", reason="the extra `docs` is not installed")
    text = r"x~ = x' or x, `a` *b* _c_ [d](e) {f} # g \ ~~h~~"
    assert unescape(markdown.markdown(escaped(text))) == f"<p>{text}</p>"


def test_long_names_keep_their_ends_in_a_legend():
    from fastrd.report.figures import _short

    names = [f"{'a-long-recipe-name-' * 4}variant-{i}" for i in (1, 2)]
    short = [_short(name, 44) for name in names]
    assert short[0] != short[1]
    assert [len(text) for text in short] == [44, 44]
    assert _short("as it is", 8) == "as it is"


def test_labels_of_a_curve_reach_the_svg_as_text():
    plot = figures.Plot("a < b & $c^{$", (), lambda axes: axes.plot([0, 1], [0, 1]))
    markup = figures.svg(plot)
    assert "a &lt; b &amp; $c^{$" in markup
    assert figures.svg(plot) == markup


def test_figures_are_files_that_decode(built):
    folder = built[0].parent
    names = {
        "report-training.png",
        "report-robustness.png",
        "report-alignment.png",
        "report-panel-igdm-small.png",
    }
    assert {path.name for path in folder.iterdir()} == names | {"report.html", "report.md"}
    for name in names:
        image = imread(folder / name)
        assert image.shape[0] > 200
        assert image.shape[1] > 400
        assert image[..., :3].std() > 0.02
        assert f"]({name})" in (folder / "report.md").read_text(encoding="utf-8")


def test_training_plots_show_what_was_logged(built):
    every = figures.series(group(load(built[1])))
    plots = {plot.title: plot for plot in figures.training(every)}
    assert list(plots) == [
        "Loss",
        "igdm, as logged",
        "Validation accuracy, clean, %",
        "Validation accuracy under PGD, %",
        "Learning rate",
        "Throughput, images/s",
    ]
    assert [s.label for s in plots["igdm, as logged"].series] == ["igdm-small"]
    axes = Figure().add_subplot()
    plots["Validation accuracy under PGD, %"].draw(axes)
    lines = axes.get_lines()
    assert len(lines) == 2  # one for each seed
    for line in lines:
        np.testing.assert_array_equal(line.get_xdata(), [1, 2])
        np.testing.assert_allclose(line.get_ydata(), [30, np.nan])


def test_the_robustness_curve_is_in_grey_levels_and_percent(built):
    plot = figures.robustness(figures.series(group(load(built[1]))))
    axes = Figure().add_subplot()
    plot.draw(axes)
    curve = axes.get_lines()[0]
    np.testing.assert_allclose(curve.get_xdata(), [0, 8])
    np.testing.assert_allclose(curve.get_ydata(), [60, 30])
    assert any(np.allclose(line.get_xdata(), 8) for line in axes.get_lines())  # the table's epsilon


def test_alignment_is_scattered_from_three_runs_on(built):
    rows = group(load(built[1]))
    assert len(figures.alignment(figures.series(rows))) == 2
    fewer = group(load(built[1][1:]))
    assert figures.alignment(figures.series(fewer)) == []
    axes = Figure().add_subplot()
    figures.alignment(figures.series(rows))[0].draw(axes)
    points = sorted(tuple(c.lines[0].get_xydata().ravel()) for c in axes.containers)
    assert points == [pytest.approx((0.4, 28.0)), pytest.approx((0.55, 30.0, 0.56, 31.0))]


@pytest.mark.parametrize("channels", [1, 3])
def test_examples_show_the_perturbation_magnified(tmp_path, channels):
    arrays = panel_arrays(channels)
    run = write_run(tmp_path / "a")
    np.savez(run / "panel.npz", **arrays)
    panel = load([run])[0].panel()
    factor, shown = figures.examples(panel)
    assert factor == 15  # 8/255 * 15 < 1/2 < 8/255 * 16
    np.testing.assert_allclose(shown[1]["perturbation"], 0.5 + 15 * (arrays["adv"] - arrays["clean"])[1])
    assert [(e["pred_clean"], e["right_clean"], e["pred_adv"], e["right_adv"]) for e in shown] == [
        ("cat", True, "<b>dog", False),
        ("<b>dog", True, "<b>dog", True),
        ("cat", False, "cat", False),
    ]
    blob = base64.b64decode(figures.data_uri(shown[0]["clean"]).split(",")[1])
    decoded = imread(io.BytesIO(blob))[..., :3]
    np.testing.assert_allclose(decoded, np.broadcast_to(arrays["clean"][0], (8, 8, 3)), atol=1 / 255)
    assert imread(io.BytesIO(figures.panel_png(panel))).ndim == 3


def test_identical_images_have_no_perturbation_to_magnify(tmp_path):
    run = write_run(tmp_path / "a")
    arrays = panel_arrays()
    np.savez(run / "panel.npz", **{**arrays, "adv": arrays["clean"]})
    factor, shown = figures.examples(load([run])[0].panel())
    assert factor == 1
    assert (shown[0]["perturbation"] == 0.5).all()


def test_missing_parts_are_said(built, tmp_path):
    text = Page(built[0].read_text(encoding="utf-8")).text
    assert re.search(r"No curve.json .* for _<script>.*, waiting\.", text)
    assert re.search(r"No panel.npz .* waiting\.", text)
    run = write_run(tmp_path / "a", epochs=0)
    page = report.build([run], tmp_path / "report.html")
    bare = Page(page.read_text(encoding="utf-8")).text
    assert "No finished epoch is logged for ard-small." in bare
    assert "at least three runs" in bare
    assert [path.name for path in tmp_path.glob("*.png")] == []


def test_conditions_and_differences(built):
    rows = group(load(built[1]))
    said = cells(content.conditions(rows, "official CIFAR-10").markdown())
    assert said["Seed"]["igdm-small"] == "0, 1"
    assert said["Data"]["igdm-small"] == "cifar10"
    assert said["Source of the data"]["igdm-small"] == "official CIFAR-10"
    assert said["Epsilon"]["igdm-small"] == "8/255"
    assert said["Epsilon"]["waiting"] == "–"
    assert said["Evaluated on"]["igdm-small"] == "cpu (2 threads)"
    assert said["Versions"]["igdm-small"] == "torch 2.15.0, fastrd 0.1.0, pyautoattack 0.2.0"
    different = cells(content.recipe_differences(rows).markdown())
    assert different["base.name"]["igdm-small"] == "ard"
    assert different["igdm.alpha"]["igdm-small"] == "10"
    assert different["igdm.alpha"]["waiting"] == "not set"
    assert "seed" not in different
    assert "schedule.epochs" not in different


def test_unequal_evaluations_are_said(tmp_path):
    a = write_run(tmp_path / "a", name="one", accuracies=accuracies(0.5))
    b = write_run(tmp_path / "b", name="two", accuracies=accuracies(0.5), epsilon=4 / 255)
    assert "Not evaluated alike: the epsilon is 8/255 for one; 4/255 for two." in report.table([a, b])


@pytest.mark.parametrize(("step", "shown"), [(1e307, "1e+307"), (-1e307, "-1e+307"), (1e300, "1e+300"), (1.0, "1")])
def test_an_absurd_step_size_is_shown(tmp_path, step, shown):
    method = f'[base]\nname = "ard"\n[attack]\nstep_size = {step!r}\n'
    runs = [write_run(tmp_path / "a", name="a", method=method), write_run(tmp_path / "b", name="b")]
    (line,) = re.findall("attack.step_size.*", content.recipe_differences(group(load(runs))).plain())
    assert line.split()[1] == shown


def test_the_largest_numbers_that_are_read_can_be_added(tmp_path):
    runs = []
    for seed, most in enumerate((1e100, 1e100, -1e100)):
        terms = {name: [most, 0.0] for name in ("seconds", "lr", "loss", "images_per_s", "memory_mb")}
        alignment = {"accuracies": accuracies(0.5), "alignment": (most, -most)}
        runs.append(write_run(tmp_path / str(seed), seed=seed, **alignment, **terms))
    assert "3 seeds" in report.table(runs)
    assert report.build(runs, tmp_path / "report.html").exists()


def test_evaluations_on_other_images_are_not_one_row(tmp_path):
    runs = [write_run(tmp_path / str(seed), seed=seed, accuracies=accuracies(0.5)) for seed in range(3)]
    for run, images in zip(runs, ("a" * 64, "b" * 64, "a" * 64), strict=True):
        document = json.loads((run / "evaluation.json").read_text())
        (run / "evaluation.json").write_text(json.dumps({**document, "images": images}))
    assert [len(row.runs) for row in group(load(runs))] == [2, 1]
    text = report.table(runs)
    said = "aaaaaaaa for ard-small (0, 2); bbbbbbbb for ard-small (1)"
    assert f"Not evaluated alike: the 1000 images of cifar10 have the hash {said}." in text
    assert "Not evaluated alike" not in report.table(runs[::2])


def test_warnings_of_an_attack_are_said(tmp_path):
    warned = {"accuracy": 0.25, "n": 1000, "warnings": ["Square beats the white-box attacks"]}
    run = write_run(tmp_path / "a", accuracies={**accuracies(0.5), "aa": warned})
    assert "ard-small: AutoAttack warned: Square beats the white-box attacks." in report.table([run])


@pytest.mark.parametrize(
    ("options", "named"),
    [("", True), ('estimator = "crd"\ninput = "clean"\nreweight = false\n', False)],
    ids=["gacd", "crd"],
)
def test_reconstructions_are_named(tmp_path, options, named):
    run = write_run(tmp_path / "a", method=f'[base]\nname = "ard"\n[gacd]\n{options}')
    assert any("GACD" in line for line in content.reconstructions(group(load([run])))) == named


def test_building_leaves_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    run = write_run(tmp_path / "a", panel=True)
    report.build([run], tmp_path / "deep" / "er" / "report.html")
    assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "deep" / "er" / "report.md").exists()


def test_more_runs_than_colours_stay_apart():
    styles = [figures.Series("", i) for i in range(24)]
    assert len({(s.color, s.dash) for s in styles}) == 24
    assert len({(s.color, s.marker) for s in styles}) == 24, "of points, which have no dash"


def test_a_terminal_table_needs_neither_torch_nor_matplotlib(tmp_path):
    run = write_run(tmp_path / "a", accuracies=accuracies(0.5))
    code = (
        "import sys; from fastrd import report; print(report.table(sys.argv[1:])); "
        "sys.exit(bool({'torch', 'matplotlib', 'jinja2'} & sys.modules.keys()))"
    )
    root = Path(report.__file__).parents[2]
    command = [sys.executable, "-c", code, str(run)]
    done = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "50.0 (±3.1)" in done.stdout
