"""The pictures: drawn once with matplotlib, written as SVG for the page and as PNG for everywhere else.

Colours are those of Okabe and Ito, which stay apart under every common colour blindness; marker and dash repeat what
the colour shows.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .metrics import metric_of
from .rows import Row
from .runs import Panel, Run
from .statistics import wilson_half_width
from .tables import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("", "6 3", "2 2", "8 2 2 2")
SHAPES = {  # the markers as SVG paths around (17, 6), for the page's key
    "o": "M13 6a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "s": "M13.5 2.5h7v7h-7z",
    "^": "M17 1.5l4.3 8h-8.6z",
    "D": "M17 1l5 5l-5 5l-5 -5z",
    "v": "M17 10.5l4.3 -8h-8.6z",
    "P": "M15.3 1.5h3.4v2.8h2.8v3.4h-2.8v2.8h-3.4v-2.8h-2.8v-3.4h2.8z",
}
INK = "#1f2328"
EXAMPLES = 8
_NOT_TERMS = {"kind", "epoch", "step", "lr", "seconds", "stall_seconds", "images_per_s", "loss"}
_VALIDATION = {"val_clean": "Validation accuracy, clean, %", "val_pgd": "Validation accuracy under PGD, %"}


@dataclass(frozen=True)
class Series:
    """What a key shows, and how it is drawn, the same in every figure: a row of the table with its runs, or a variant
    of a benchmark."""

    label: str
    index: int
    runs: Sequence[Run] = ()

    @property
    def color(self) -> str:
        return PALETTE[self.index % len(PALETTE)]

    @property
    def marker(self) -> str:
        """Another one in each round of the colours: a point has no dash to distinguish it."""
        return MARKERS[(self.index + self.index // len(PALETTE)) % len(MARKERS)]

    @property
    def dash(self) -> str:
        """As SVG's stroke-dasharray; empty is a solid line."""
        return DASHES[self.index // len(PALETTE) % len(DASHES)]

    @property
    def shape(self) -> str:
        return SHAPES[self.marker]

    def line(self) -> dict[str, Any]:
        dash = tuple(map(float, self.dash.split()))
        linestyle = (0, dash) if dash else "-"
        return {"color": self.color, "marker": self.marker, "linestyle": linestyle, "markersize": 4}


@dataclass(frozen=True)
class Plot:
    title: str
    series: tuple[Series, ...]  # those with something to show
    draw: Callable[[Axes], None]
    height: float = 3  # inches


def series(rows: Sequence[Row]) -> list[Series]:
    return [Series(row.label, index, row.runs) for index, row in enumerate(rows)]


def training(every: Sequence[Series]) -> list[Plot]:
    """Returns one plot per logged quantity over epochs: total loss, its terms and metrics, validation, rate,
    throughput."""
    logged = {key for s in every for run in s.runs for line in run.epochs for key in line}
    terms = sorted(logged - _NOT_TERMS - _VALIDATION.keys())
    titles = {
        "loss": "Loss",
        **{key: f"{key}, as logged" for key in terms},
        **_VALIDATION,
        "lr": "Learning rate",
        "images_per_s": "Throughput, images/s",
        "stall_seconds": "Waited for data, seconds",
    }
    plots = []
    for key, title in titles.items():
        if shown := tuple(s for s in every if any(run.logged(key) for run in s.runs)):
            plots.append(Plot(title, shown, _over_epochs(shown, key)))
    return plots


def robustness(every: Sequence[Series]) -> Plot | None:
    """Plots accuracy against the radius of the attack, a line per run."""
    shown = tuple(s for s in every if any(run.curve for run in s.runs))
    runs = [(run, s) for s in shown for run in s.runs]
    units = {"linf": 255}  # of the axis; in other norms 1

    def draw(axes: Axes) -> None:
        for curve, s in ((run.curve, s) for run, s in runs if run.curve):
            order = np.argsort(curve.epsilons)
            radii = units.get(curve.norm, 1) * np.array(curve.epsilons)[order]
            axes.plot(radii, 100 * np.array(curve.accuracies)[order], **s.line())
        evaluated = [(units.get(run.norm, 1), run.facts.get("epsilon")) for run, _ in runs]
        for epsilon in {scale * epsilon for scale, epsilon in evaluated if epsilon is not None}:
            axes.axvline(epsilon, color=INK, alpha=0.5, linewidth=1, linestyle=":", zorder=0)
            axes.annotate(
                "table's epsilon", (epsilon, 1), xycoords=("data", "axes fraction"), xytext=(3, -3),
                textcoords="offset points", va="top", alpha=0.7, fontsize=7.5,
            )  # fmt: skip
        norms = {run.curve.norm for run, _ in runs if run.curve}
        axes.set_xlabel("epsilon, in 1/255" if norms == {"linf"} else "epsilon; of l-infinity in 1/255")
        axes.set_ylim(bottom=0)

    return Plot("Accuracy under PGD, %", shown, draw) if shown else None


def alignment(every: Sequence[Series]) -> list[Plot]:
    """Plots AutoAttack accuracy against GC and GD, a point per run; nothing with fewer than three points."""
    axes = {"gc": "gradient cosine GC (1: parallel)", "gd": "gradient distance GD (0: equal)"}
    pairs = [(name, _pairs(every, metric, "aa")) for metric, name in axes.items()]
    return [_scatter(name, points, "aa") for name, points in pairs if sum(len(at) for _, at in points) >= 3]


def trade_off(every: Sequence[Series]) -> Plot | None:
    """Plots AutoAttack accuracy (PGD-20 where a row lacks it) against clean accuracy; None for fewer than two rows."""
    attack = "aa" if len(_pairs(every, "clean", "aa")) == len(every) else "pgd20"
    points = _pairs(every, "clean", attack)
    return _scatter("clean accuracy, %", points, attack, bars=False) if len(points) >= 2 else None


def svg(plot: Plot) -> str:
    """Returns inline SVG in the colour of the text around it, as wide as its place, with no outside reference."""
    with _figure(4.4, plot.height, salt=plot.title) as figure:
        _draw(plot, figure.add_subplot())
        text = io.StringIO()
        # None leaves matplotlib's metadata block out, whose addresses and date have no place in the page.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    markup = text.getvalue()
    markup = re.sub(r' xmlns(:xlink)?="[^"]*"| (width|height)="[\d.]+pt"', "", markup[markup.index("<svg") :])
    markup = re.sub(r"<g id=\"[^\"]*\">", "<g>", markup)  # repeated in every figure and used by none
    return markup.replace(INK, "currentColor").strip()


def key(plots: Sequence[Plot]) -> list[Series]:
    """Returns what the plots show, each once."""
    return [s for _, s in sorted({s.index: s for plot in plots for s in plot.series}.items())]


def png(plots: Sequence[Plot]) -> bytes:
    """Returns the plots side by side with a common legend above, on white."""
    from matplotlib.lines import Line2D

    columns = min(3, len(plots))
    lines = math.ceil(len(plots) / columns)
    width = 3.4 * columns + 1.6 * (columns == 1)
    shown = key(plots)
    # A label that starts with an underscore would be left out of the legend.
    labels = [" " + _short(s.label, 44) for s in shown]
    fitting = max(1, int(width // (0.65 + 0.075 * max(map(len, labels)))))
    legend_lines = math.ceil(len(labels) / fitting)
    height = 0.9 * max(plot.height for plot in plots) * lines + 0.7 * (columns == 1) + 0.22 * legend_lines
    with _figure(width, height) as figure:
        for place, plot in enumerate(plots, 1):
            _draw(plot, figure.add_subplot(lines, columns, place))
        handles = [Line2D([], [], **s.line()) for s in shown]
        across = math.ceil(len(labels) / legend_lines)
        figure.legend(handles, labels, loc="outside upper left", ncols=across, frameon=False, handlelength=3)
        return _saved(figure)


def data_uri(image: np.ndarray) -> str:
    """Returns a (H, W, C) image in [0, 1] as a PNG that needs no file."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, _rgb(image), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def examples(panel: Panel) -> tuple[int, list[dict[str, Any]]]:
    """Returns the first images of a panel: clean, adv, perturbation (H, W, C) in [0, 1], and what each was taken for.

    The perturbation is shown around mid-grey, multiplied by the whole number that comes first in the result.
    """
    clean, adv = _pixels(panel.clean[:EXAMPLES]), _pixels(panel.adv[:EXAMPLES])
    largest = np.abs(adv - clean).max()
    factor = max(1, math.floor(0.5 / largest + 1e-4)) if largest > 0 else 1
    perturbation = np.clip(0.5 + factor * (adv - clean), 0, 1)
    shown: list[dict[str, Any]] = []
    for i in range(len(clean)):
        example = {"clean": clean[i], "adv": adv[i], "perturbation": perturbation[i]}
        example |= {name: panel.class_names[getattr(panel, name)[i]] for name in ("label", "pred_clean", "pred_adv")}
        example |= {f"right_{p}": getattr(panel, f"pred_{p}")[i] == panel.label[i] for p in ("clean", "adv")}
        shown.append(example)
    return factor, shown


def panel_png(panel: Panel) -> bytes:
    """Draws clean, adversarial and magnified perturbation, one column per image, predictions underneath."""
    factor, shown = examples(panel)
    parts = {"clean": "clean", "adv": "adversarial", "perturbation": f"perturbation\n× {factor}"}
    with _figure(1.22 * len(shown) + 0.9, 4.6) as figure:
        for row, (part, name) in enumerate(parts.items()):
            for column, example in enumerate(shown):
                axes = figure.add_subplot(3, len(shown), row * len(shown) + column + 1)
                axes.imshow(_rgb(example[part]), interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if column == 0:
                    axes.set_ylabel(name)
                if row == 0:
                    axes.set_title("true: " + _short(example["label"], 14), fontsize=8, loc="center")
                if part != "perturbation":
                    mark, color = ("✓", INK) if example[f"right_{part}"] else ("✗", PALETTE[1])
                    axes.set_xlabel(f"{mark} {_short(example[f'pred_{part}'], 14)}", color=color, fontsize=8)
        return _saved(figure)


def _over_epochs(shown: Sequence[Series], key: str) -> Callable[[Axes], None]:
    scale = 100 if key in _VALIDATION else 1

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for s in shown:
            for logged in ([line for line in run.epochs if key in line] for run in s.runs):
                values = scale * np.array([line[key] for line in logged], float)  # null is NaN: a gap in the line
                epochs = [line["epoch"] for line in logged]
                axes.plot(epochs, values, **s.line(), markevery=max(1, len(logged) // 10))
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        if key in ("lr", "images_per_s"):
            axes.set_ylim(bottom=0)

    return draw


_Points = list[tuple[Series, list[tuple[float, float, float]]]]


def _pairs(every: Sequence[Series], metric: str, attack: str) -> _Points:
    """Returns, by series with any, (metric, accuracy in %, half-width of its interval) of each run measured in both."""
    pairs = []
    for s in every:
        at = []
        for run in s.runs:
            x, y = run.measure(metric), run.measure(attack)
            if x is not None and y is not None:
                n = run.results[attack]["n"]
                at.append((metric_of(metric).scale * x, 100 * y, 100 * wilson_half_width(y, n) if n else 0.0))
        if at:
            pairs.append((s, at))
    return pairs


def _scatter(name: str, points: _Points, attack: str, *, bars: bool = True) -> Plot:
    """Plots accuracy under `attack` against what is called `name`, a point per run."""

    def draw(axes: Axes) -> None:
        for s, at in points:
            x, y, spread = zip(*at, strict=True)
            look: dict[str, Any] = {"color": s.color, "fmt": s.marker, "markersize": 6}
            axes.errorbar(x, y, yerr=spread if bars else None, **look, elinewidth=1, capsize=2)
        axes.set_xlabel(name)
        axes.margins(0.12)
        axes.locator_params(axis="x", nbins=5)

    return Plot(f"{metric_of(attack).title} accuracy, %", tuple(s for s, _ in points), draw)


def _draw(plot: Plot, axes: Axes) -> None:
    plot.draw(axes)
    axes.set_title(_short(plot.title, 48), loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=INK, alpha=0.12, linewidth=0.8)
    axes.set_axisbelow(True)


@contextmanager
def _figure(width: float, height: float, salt: str | None = None) -> Iterator[Figure]:
    import matplotlib
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {
        **dict.fromkeys(inked, INK),
        "text.parse_math": False,  # names from files may hold a dollar sign
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.linewidth": 0.8,
        "lines.linewidth": 1.6,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
    }
    with matplotlib.rc_context(settings):
        yield Figure(figsize=(width, height), layout="constrained")


def _saved(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def _pixels(images: np.ndarray) -> np.ndarray:
    return np.clip(np.nan_to_num(images.astype(np.float64)), 0, 1)


def _rgb(image: np.ndarray) -> np.ndarray:
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def _short(text: str, length: int) -> str:
    """At most `length` characters, cut in the middle: names of recipes and runs differ at their ends."""
    text = printable(" ".join(text.split()))
    tail = (length - 1) // 2
    return text if len(text) <= length else f"{text[: length - 1 - tail]}…{text[-tail:]}"
