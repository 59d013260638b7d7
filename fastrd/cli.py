"""The command line: `fastrd COMMAND`; `_parser` lists the commands."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .core.process_environment import plain_warnings, prepare_process
from .core.version import __version__

if TYPE_CHECKING:
    from .recipe import Recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Errors a user can fix are one line on stderr, status 2."""
    _fill_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of another encoding shows a question mark
    options = vars(_parser().parse_args(argv))
    command = options.pop("command")
    with _stoppable(), plain_warnings():
        try:
            os.getcwd()  # without it not even torch can be loaded, and what that says names a library
        except OSError as error:
            return _say(f"the current folder cannot be used ({error.strerror}); accepted: a command in another one", 2)
        prepare_process()
        from .engine.errors import Interrupted, message_of

        try:
            _check_texts(options)
            if "plugin" in options:
                from .core.plugins import load_plugins

                load_plugins(options.pop("plugin"))
            return command(**options) or 0
        except Interrupted as stop:
            how = " with --resume" if "resume" in options else ""
            return _say(f"{stop}; the same command{how} goes on", 128 + stop.signum)
        except BrokenPipeError:
            sys.stderr.close()  # the reader went away (| head); Python would complain once more at exit
            return 141
        except Exception as error:
            if (text := message_of(error)) is None:
                raise
            return _say(text, 2)


def run() -> NoReturn:
    """Is the program: runs the command that its arguments name, and ends the process."""
    status = None
    with suppress(KeyboardInterrupt):  # it may come outside of what `main` catches, and once more while that unwinds
        status = main()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # all is saved; a second signal is not to interrupt the exit
    sys.exit(_say("interrupted", 130) if status is None else status)


def _fill_streams() -> None:
    """Opens /dev/null in the place of standard streams that are closed, where a file would be opened next."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


LONGEST_MESSAGE = 2000  # characters


def _say(message: object, status: int) -> int:
    """Prints `message` as one line of printable characters on stderr; returns `status`."""
    line = " ".join(str(message).split())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    if len(line) > LONGEST_MESSAGE:
        line = f"{line[:LONGEST_MESSAGE]}... ({len(line)} characters)"
    with suppress(OSError):  # the status says it too
        print(f"fastrd: {line}", file=sys.stderr, flush=True)
    return status


def _check_texts(options: dict[str, Any]) -> None:
    for name, value in options.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (not text.strip() or "\0" in text):
                raise ValueError(f"{name}: got {text!r}; accepted: a text that is not empty")


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ends the command with status 128 + n on SIGTERM and SIGHUP, until training sets handlers that save the state."""

    def stop(signum: int, _frame: object) -> None:
        with suppress(OSError):  # the terminal may be what is gone
            os.write(2, f"fastrd: stopped by {signal.Signals(signum).name}\n".encode())
        sys.exit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stops = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]  # as nohup asks
    before = {s: signal.signal(s, stop) for s in stops}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands. What an option stores is named as the argument it becomes."""
    parser = argparse.ArgumentParser(prog="fastrd", description="Fast, faithful adversarial robust distillation.")
    parser.add_argument("--version", action="version", version=f"fastrd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    several: dict[str, Any] = {"action": "append", "default": []}

    def command(run: Callable[..., Any], name: str, text: str, *parents: Any) -> argparse.ArgumentParser:
        found = commands.add_parser(name, parents=parents, help=text)
        found.set_defaults(command=run)
        return found

    plugged = argparse.ArgumentParser(add_help=False)
    text = "code of yours that registers networks, methods, attacks, data sets or measures; may be given again"
    plugged.add_argument("--plugin", **several, metavar="FILE.py|MODULE", help=text)
    data = argparse.ArgumentParser(add_help=False, parents=[plugged])
    add = data.add_argument
    add("--data", metavar="DIR", help="folder of the data sets (default: FASTRD_DATA, ./data, ./.data)")
    add("--download", action="store_true", help="let torchvision download an absent data set")
    add("--quiet", dest="progress", action="store_false", help="no progress bars")
    common = argparse.ArgumentParser(add_help=False, parents=[data])
    common.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: CUDA where available)")
    recipe = argparse.ArgumentParser(add_help=False, parents=[common])
    add = recipe.add_argument
    add("recipe", metavar="RECIPE", help="a TOML file or the name of a shipped recipe")
    add("--teacher", metavar="CKPT", help="robust teacher: run, checkpoint, state dict, RobustBench id")
    add("--clean-teacher", metavar="CKPT", help="accurate clean model (VFD)")
    add("--set", **several, dest="overrides", metavar="KEY=VALUE", help="e.g. schedule.epochs=10; may be given again")

    add = command(_train, "train", "train a recipe", recipe).add_argument
    add("--out", required=True, metavar="RUN", help="run folder")
    add("--resume", action="store_true", help="go on from the newest good checkpoint in RUN")
    text = "also log to this tracker, through its own client; may be given again"
    add("--log", **several, choices=["wandb", "mlflow", "tensorboard"], help=text)
    add("--profile", action="store_true", help="print where the time goes; leaves trace.json.gz in RUN")

    command(_batch_sizes, "batch-sizes", "time a recipe's step at growing batch sizes, until memory runs out", recipe)

    add = command(_eval, "eval", "evaluate a saved model", common).add_argument
    add("source", metavar="RUN|CKPT", help="run folder or any checkpoint `load_teacher` reads")
    add("--attacks", help="e.g. clean,fgsm,pgd20,cw,aa; see `fastrd.evaluate` (default: the recipe's)")
    add("--limit", type=int, metavar="N", help="only N test images, of each class its share (default: all)")
    add("--checkpoint", choices=["last", "best"], default="last", help="of a RUN (default: last)")
    add("--dataset", help="default: the one it was trained on, else cifar10")
    add("--arch", help="architecture of a bare state dict, where its keys do not show it")
    add("--norm", choices=["linf", "l2"], help="of the perturbation (default: the recipe's, else linf)")
    add("--epsilon", help="radius for pixels in [0, 1]: 0.03, 8/255, ... (default: the recipe's, else 8/255; l2: 0.5)")
    add("--batch-size", type=int, default=250, metavar="N", help="random starts depend on it (default: 250)")
    add("--teacher", metavar="CKPT", help="also measure gradient alignment (GD, GC) with it")
    text = "also measure: remainder, cka, pointwise, probe:DATA (a linear probe on another data set)"
    add("--measure", **several, dest="measures", metavar="WHAT", help=text)
    add("--figures", action="store_true", help="also write curve.json and panel.npz for the report")
    text = "keep the adversarial images, and judge them rounded to 8 bits too"
    add("--save-adversarial", metavar="FILE.npz", help=text)
    add("--out", metavar="DIR", help="where evaluation.json goes (default: RUN, or beside CKPT)")

    text = "list recipes, or print one with every default spelled out"
    add = command(_recipes, "recipes", text, plugged).add_argument
    add("name", nargs="?", metavar="NAME", help="print this one; without a name, list all")
    text = "the rows of a table: the paper's numbers, and those under --out with the difference in parentheses"
    add("--table", metavar="TABLE", help=text)
    add("--out", default="runs", metavar="DIR", help="where `fastrd reproduce` put its runs (default: runs)")

    text = "train and evaluate a published table; go on where it was stopped"
    add = command(_reproduce, "reproduce", text, common).add_argument
    add("table", metavar="TABLE", help="see `fastrd recipes`; or a facts file, FILE:TABLE")
    add("--rows", nargs="+", default=[], metavar="ROW", help="labels, with shell wildcards")
    add("--seeds", type=int, metavar="N", help="default: the table's, else 3")
    add("--budget", metavar="TIME", help="stop cleanly after, e.g., 2h or 45m")
    add("--plan", dest="plan_only", action="store_true", help="only print what there is to do")
    text = "file or run of a teacher, by its name in the plan"
    add("--teacher", **several, dest="teachers", metavar="NAME=CKPT", help=text)
    text = "also train with a teacher that does not have the published accuracy"
    add("--any-teacher", action="store_true", help=text)
    add("--set", **several, dest="overrides", metavar="KEY=VALUE", help="change a recipe key in every row")
    add("--jobs", type=int, metavar="N", help="runs at the same time (default: 1 on a GPU, else one a core)")
    add("--out", default="runs", metavar="DIR", help="default: runs")

    report = command(_report, "report", "one page from any set of runs, or of benchmark results")
    content = report.add_mutually_exclusive_group(required=True)
    content.add_argument("runs", nargs="*", default=[], metavar="RUN")
    text = "JSON files of pytest-benchmark, e.g. in bench/results/"
    content.add_argument("--bench", nargs="+", metavar="FILE", help=text)
    report.add_argument("--out", default="report.html", metavar="FILE", help="HTML page (default: report.html)")
    report.add_argument("--title", help="heading of the page")

    add = command(_pack, "pack", "write a data set to a .beton file for FFCV, or check one", data).add_argument
    add("dataset", nargs="?", metavar="DATASET", help="cifar10, ..., arrays, FILE.npz, or a folder of images")
    add("out", nargs="?", metavar="OUT.beton")
    add("--check", metavar="FILE", help="read a packed file through instead of writing one")
    add("--jpeg", dest="quality", type=int, metavar="QUALITY", help="compress, 1..100 (default: raw pixels)")
    add("--unlabelled", action="store_true", help="with STL-10's 100,000 unlabelled images")
    add("--size", dest="image_size", type=int, metavar="N", help="side in pixels, of a folder of images of any size")

    add = command(_export, "export", "write a trained student as one file for others to run", plugged).add_argument
    add("run", metavar="RUN|CKPT", help="run folder or checkpoint of `fastrd train`")
    formats = ["safetensors", "onnx", "torch-export"]
    add("--format", choices=formats, default=formats[0], help="default: safetensors")
    add("--out", metavar="FILE", help="default: RUN/student with the suffix of the format")
    add("--checkpoint", choices=["last", "best"], default="last", help="of a RUN (default: last)")
    add("--fold", action="store_true", help="fold batch normalisation into the convolutions before it")
    add("--dynamic-batch", action="store_true", help="any number of images, not exactly one")

    add = command(_demo, "demo", "a robust teacher, four methods over five seeds, start to report", common).add_argument
    add("--out", default="runs/demo", metavar="DIR", help="default: runs/demo")

    add = command(_doctor, "doctor", "what this machine has, and what fixes what is missing").add_argument
    add("--json", action="store_true", help="for programs")
    add("--kernels", action="store_true", help="resources and floors of every Triton kernel")
    return parser


def _assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Returns the recipe keys that `--set` changes, with their values."""
    from .core.toml import parse_assignment

    return dict(parse_assignment(text) for text in texts)


def _recipe(source: str, overrides: Sequence[str]) -> Recipe:
    from .recipe import Recipe

    return Recipe.load(source, _assignments(overrides))


def _train(recipe: str, overrides: Sequence[str], **options: Any) -> None:
    from .engine.distributed import is_main_process
    from .workflow import train

    loaded = _recipe(recipe, overrides)
    trained = train(loaded, **options)
    if is_main_process():
        epochs, best = loaded.schedule.epochs, trained.best
        line = f"{trained.run}: done after {epochs} epoch{'s' * (epochs != 1)}"
        if best:
            titles = {"val_clean": "clean", "val_pgd": "under PGD"}
            scores = ", ".join(f"{titles[key]} {100 * best[key]:.2f} %" for key in titles if key in best)
            line += f"; best.pt is of epoch {best['epoch']:.0f}, on the held-out images {scores}"
        print(line)


def _batch_sizes(recipe: str, overrides: Sequence[str], progress: bool, **options: Any) -> None:
    from .engine.batch_size import try_batch_sizes

    for number, row in enumerate(try_batch_sizes(_recipe(recipe, overrides), **options)):
        if number == 0:
            print(f"{'batch':>8} {'images/s':>10} {'peak memory':>12}")
        speed = "no memory" if row.images_per_s is None else f"{row.images_per_s:,.0f}"
        print(f"{row.batch_size:>8} {speed:>10} {row.peak_bytes / 2**30:>8.1f} GiB", flush=True)
    print("the recipe's learning rate belongs to its own batch size; change them together")


def _eval(**options: Any) -> None:
    from .engine.distributed import is_main_process
    from .workflow import evaluate_run, summary

    document = evaluate_run(**options)
    if is_main_process():
        print(summary(document))


def _recipes(name: str | None, table: str | None, out: str) -> None:
    from . import published
    from .recipe import Recipe, available

    if table is not None:
        from .reproduce.page import listings

        print(listings(table, Path(out)))
        return
    if name is not None:
        print(Recipe.load(name).to_toml(), end="")
        return
    short = [each for each in available() if "/" not in each]
    width = max(map(len, [*short, *published.tables()]))
    for each in short:
        print(f"{each:<{width}}  {Recipe.load(each).description}")
    print("\nTables, every row of which is a recipe; `fastrd recipes --table TABLE` shows them:")
    for each, found in published.tables().items():
        faithful = sum(row.faithful for row in found.rows)
        more = f", {faithful} of them also .../faithful" if faithful else ""
        print(f"{each:<{width}}  {found.title} ({len(found.rows) - faithful} rows{more})")
    for each, numbers in published.printed().items():
        print(f"{each:<{width}}  {numbers.title} (printed numbers)")


def _reproduce(teachers: Sequence[str], overrides: Sequence[str], **options: Any) -> int:
    from .reproduce import reproduce

    outcome = reproduce(teachers=dict(map(_named_path, teachers)), overrides=_assignments(overrides), **options)
    for problem in outcome.problems:
        _say(problem, 2)
    if outcome.stopped_by:
        return 128 + outcome.stopped_by
    if options["plan_only"] or outcome.finished:
        return 0
    print("not finished: the same command goes on", file=sys.stderr)
    return 0 if outcome.out_of_time and not outcome.problems else 2


def _named_path(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not (separator and name and path):
        raise ValueError(f"--teacher: got {text!r}; accepted: NAME=CKPT")
    return name, path


def _report(runs: Sequence[str], bench: Sequence[str] | None, out: str, title: str | None) -> None:
    from . import report

    if bench:
        page, text = report.build_benchmarks(bench, out, title=title), report.benchmark_table(bench)
    else:
        page, text = report.build(runs, out, title=title), report.table(runs)
    print(f"{text}\nreport: {page}")


def _pack(dataset: str | None, out: str | None, check: str | None, data: str | None, **options: Any) -> None:
    from .data import pack

    if check is not None:
        print(f"{pack.check(check, progress=options['progress']).describe()}: as it was written")
    elif dataset is None or out is None:
        raise ValueError("pack: got no DATASET and OUT.beton; accepted: both, or --check FILE")
    else:
        print(pack.pack(dataset, out, root=data, **options).describe())


def _export(**options: Any) -> None:
    from .deploy import export

    done = export(**options)
    compared = "not compared, onnxruntime is not installed"
    if done.difference is not None:
        compared = f"largest difference of logits when read again {done.difference:.3g}"
    print(f"{done.path}: images ({', '.join(done.input_shape)}) -> {len(done.class_names)} logits; {compared}")
    print(f"model card: {done.card}")


def _demo(out: str, **options: Any) -> None:
    from .core.files import locked
    from .demo import run

    with locked(out):
        run(Path(out), **options)


def _doctor(**options: Any) -> int:
    from . import doctor

    return doctor.main(**options)


if __name__ == "__main__":
    run()
