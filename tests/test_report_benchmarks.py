"""The benchmark page: what the JSON says, with speed-ups and shares computed by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fastrd import cli, report
from fastrd.report import benchmarks

KEYS = ("problem", "variant", "median", "peak_bytes", "gb_per_s", "tflop_per_s", "floor_seconds")
MEASURED = {
    # Problem, variant, seconds, bytes, GB/s, TFLOP/s, floor.
    "test_fast[a]": ("N = 8, <D> = 2", "eager", 0.008, 579e6, 3.0, 0.5, 0.001),
    "test_fast[b]": ("N = 8, <D> = 2", "ours", 0.002, 15.6e6, 12.0, 2.0, 0.001),
    "test_slow[a]": ("M = 3", "ours", 1.5, 0, 0.00126, 0.0432, None),
    "test_slow[b]": ("M = 3", "peer", 0.6, None, None, None, None),
}
PARTS = {
    "test_fast[a]": {"copies": 0.002, "sums & products": 0.008},
    "test_fast[b]": {"sums & products": 0.0015, "copies": 0.0001},
}


def write(path: Path, *, device: str = "A board", names: tuple[str, ...] = tuple(MEASURED)) -> Path:
    entries = []
    for name in names:
        facts = dict(zip(KEYS, MEASURED[name], strict=True))
        median = facts.pop("median")
        facts = {key: value for key, value in facts.items() if value is not None}
        if name in PARTS:
            facts["seconds_by_kind"] = PARTS[name]
        stats = {"median": median, "q1": 0.9 * median, "q3": 1.25 * median}
        entries.append({"name": name, "extra_info": facts, "stats": stats})
    info = {"device": device, "cpus": 2, "threads": 1, "python_version": "3.11.7", "torch": "2.15.0"}
    path.write_text(json.dumps({"machine_info": info, "benchmarks": entries}))
    return path


def texts(measurements: list[benchmarks.Measurement]) -> list[list[str]]:
    return [[f"{cell.text} {cell.detail}".strip() for cell in row] for row in benchmarks.table(measurements).rows]


def test_numbers_by_hand(tmp_path):
    (machine,) = benchmarks.load([write(tmp_path / "x.json")])
    assert list(machine.kernels) == ["fast", "slow"]
    assert texts(machine.kernels["fast"]) == [
        ["N = 8, <D> = 2", "eager", "8.00 (7.20 to 10.0)", "4.00", "3.00", "0.500", "12.5", "579"],
        ["N = 8, <D> = 2", "ours", "2.00 (1.80 to 2.50)", "–", "12.0", "2.00", "50.0", "15.6"],
    ]
    assert texts(machine.kernels["slow"]) == [
        ["M = 3", "ours", "1500 (1350 to 1875)", "–", "0.00126", "0.0432", "0"],
        ["M = 3", "peer", "600 (540 to 750)", "0.400", "–", "–", "–"],
    ]
    told = {row[0].text: row[1].text for row in benchmarks.conditions(machine).rows}
    assert (told["Device"], told["Threads"], told["Triton"], told["Files"]) == ("A board", "1", "–", "x.json")


def test_where_the_time_goes_by_hand(tmp_path):
    (machine,) = benchmarks.load([write(tmp_path / "x.json")])
    table = benchmarks.breakdown(machine.kernels["fast"])
    assert [column.title for column in table.columns[2:]] == [
        "Sums & products, %",
        "Copies, %",
        "The rest, %",
    ]
    # The parts of the first are 10 ms, which is more than the 8 measured.
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["N = 8, <D> = 2", "eager", "80.0", "20.0", "0.0"],
        ["N = 8, <D> = 2", "ours", "75.0", "5.0", "20.0"],
    ]
    assert benchmarks.breakdown(machine.kernels["slow"]) is None


def test_files_of_one_machine_are_shown_together(tmp_path):
    names = tuple(MEASURED)
    files = [
        write(tmp_path / "1.json", names=names[:2]),
        write(tmp_path / "2.json", device="Another", names=names[:2]),
        write(tmp_path / "3.json", names=names[2:]),
    ]
    first, second = benchmarks.load(files)
    assert first.files == ["1.json", "3.json"] and list(first.kernels) == ["fast", "slow"]
    assert second.files == ["2.json"] and list(second.kernels) == ["fast"]


def test_marks_stand_where_the_numbers_are(tmp_path):
    (machine,) = benchmarks.load([write(tmp_path / "x.json")])
    time, memory = benchmarks.plots(machine.kernels["fast"])
    assert [s.label for s in time.series] == ["ours", "eager"]
    drawn = []
    for plot in (time, memory):
        axes = Figure().add_subplot()
        plot.draw(axes)
        drawn.append({line.get_xdata()[0]: line.get_marker() for line in axes.lines})
    ours, eager = (s.marker for s in time.series)
    assert drawn[0] == {8.0: eager, 1.0: "|", 2.0: ours} and ours != eager
    assert drawn[1] == {579.0: eager, 15.6: ours}
    assert [plot.title for plot in benchmarks.plots(machine.kernels["slow"])] == ["Time, ms"]


def test_the_page_and_the_terminal(tmp_path, capsys):
    files = [str(write(tmp_path / "x.json")), str(write(tmp_path / "y.json", device="Another"))]
    page = tmp_path / "out" / "kernels.html"
    assert cli.main(["report", "--bench", *files, "--out", str(page), "--title", "A & B"]) == 0
    terminal = capsys.readouterr().out
    markdown, html = page.with_suffix(".md").read_text(), page.read_text()
    for text, number in ((terminal, "4.00"), (markdown, "4.00"), (html, "4.00")):
        assert text.count(number) >= 2 and "Another" in text and "75.0" in text
    assert "A &amp; B" in html and "N = 8, &lt;D&gt; = 2" in html and "<D>" not in html
    assert html.count("<svg") > 6 and "http" not in html
    for name in ("kernels-fast.png", "kernels-slow.png", "kernels-fast-2.png", "kernels-slow-2.png"):
        assert f"({name})" in markdown
        assert imread(io.BytesIO((page.parent / name).read_bytes())).shape[1] > 600


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("{", ":1: not JSON"),
        ("{}", ": benchmarks: got None; accepted: a list"),
        ('{"benchmarks": [3]}', r": benchmarks\[0\]: got 3; accepted: "),
        (
            '{"benchmarks": [{"extra_info": {"problem": "p"}}]}',
            r"benchmarks\[0\]: extra_info.variant: got None",
        ),
        (
            '{"benchmarks": [{"extra_info": {"problem": "p", "variant": "v"}, "stats": {"median": 0}}]}',
            r"benchmarks\[0\]: stats.median: got 0; accepted: seconds above 0",
        ),
        (
            '{"benchmarks": [{"extra_info": {"problem": "p", "variant": "v"}, "stats": {"median": 1e99}}]}',
            r"benchmarks\[0\]: stats.median: got 1e\+99; accepted: seconds above 0",
        ),
        (
            '{"benchmarks": [{"extra_info": {"problem": "p", "variant": "v", "floor_seconds": 1e99}, "stats": '
            '{"median": 1}}]}',
            r"benchmarks\[0\]: floor_seconds: got 1e\+99; accepted: a number from 0 to 1e\+30",
        ),
        (
            '{"benchmarks": [{"extra_info": {"problem": "p", "variant": "v", "seconds_by_kind": {"a": "b"}}, "stats": '
            '{"median": 1}}]}',
            r"benchmarks\[0\]: extra_info.seconds_by_kind: got {'a': 'b'}; accepted: seconds by kind of work",
        ),
    ],
)
def test_a_malformed_file_is_named(tmp_path, text, where):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{path}.*{where}"):
        benchmarks.load([path])


def test_bad_arguments(tmp_path):
    file = write(tmp_path / "x.json")
    with pytest.raises(ValueError, match="fast, N = 8, <D> = 2, eager: measured twice"):
        benchmarks.load([file, file])
    with pytest.raises(FileNotFoundError, match=r"bench: .*nowhere.json: no such file"):
        report.benchmark_table([tmp_path / "nowhere.json"])
    with pytest.raises(ValueError, match="bench: none given"):
        report.benchmark_table([])
    with pytest.raises(ValueError, match="out: got"):
        report.build_benchmarks([file], tmp_path / "page.txt")
    with pytest.raises(SystemExit):
        cli.main(["report", "a run", "--bench", str(file)])
