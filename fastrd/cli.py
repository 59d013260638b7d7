"""The command line: fastrd train | eval | export | reproduce | recipes | report | demo | doctor."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .core.process_environment import prepare_process
from .core.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Errors a user can fix are one line on stderr, status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of another encoding shows a question mark
    arguments = _parser().parse_args(argv)
    with _stoppable(), _plain_warnings():
        prepare_process()
        from .engine.errors import Interrupted, message_of

        try:
            _check_texts(arguments)
            if hasattr(arguments, "plugin"):
                from .core.plugins import load_plugins

                load_plugins(arguments.plugin)
            return arguments.run(arguments) or 0
        except Interrupted as stop:
            return _say(stop, 128 + stop.signum)
        except KeyboardInterrupt:
            return _say("interrupted", 130)
        except BrokenPipeError:
            sys.stderr.close()  # the reader went away (| head); Python would complain once more at exit
            return 141
        except Exception as error:
            text = message_of(error)
            if text is None:
                raise
            return _say(text, 2)


LONGEST_MESSAGE = 2000  # characters


def _say(message: object, status: int) -> int:
    """Prints `message` as one line of printable characters on stderr; returns `status`."""
    line = " ".join(str(message).split())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    if len(line) > LONGEST_MESSAGE:
        line = f"{line[:LONGEST_MESSAGE]}... ({len(line)} characters)"
    print(f"fastrd: {line}", file=sys.stderr)
    return status


def _check_texts(arguments: argparse.Namespace) -> None:
    for name, value in vars(arguments).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (not text.strip() or "\0" in text):
                raise ValueError(f"{name}: got {text!r}; accepted: a text that is not empty")


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, with status 143,
    until training sets a handler that saves the state first."""

    def stop(signum: int, _frame: object) -> None:
        os.write(2, b"fastrd: stopped by SIGTERM\n")
        sys.exit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the place in the program."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"fastrd: warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastrd", description="Fast, faithful adversarial robust distillation.")
    parser.add_argument("--version", action="version", version=f"fastrd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plugged = argparse.ArgumentParser(add_help=False)
    plugged.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE.py|MODULE",
        help="code of yours that registers networks, methods, attacks, data sets or measures; may be given again",
    )
    common = argparse.ArgumentParser(add_help=False, parents=[plugged])
    common.add_argument("--data", metavar="DIR", help="folder of the data sets (default: FASTRD_DATA, ./data, ./.data)")
    common.add_argument("--download", action="store_true", help="let torchvision download an absent data set")
    common.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: CUDA where available)")
    common.add_argument("--quiet", action="store_true", help="no progress bars")

    train = commands.add_parser("train", parents=[common], help="train a recipe")
    train.add_argument("recipe", metavar="RECIPE", help="a TOML file or the name of a shipped recipe")
    train.add_argument("--out", required=True, metavar="RUN", help="run folder")
    train.add_argument("--teacher", metavar="CKPT", help="robust teacher: run, checkpoint, state dict, RobustBench id")
    train.add_argument("--clean-teacher", metavar="CKPT", help="accurate clean model (VFD)")
    train.add_argument("--resume", action="store_true", help="go on from the newest good checkpoint in RUN")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. schedule.epochs=10")
    train.add_argument(
        "--log",
        action="append",
        default=[],
        choices=["wandb", "mlflow", "tensorboard"],
        help="also log to this tracker, through its own client; may be given again",
    )
    train.add_argument("--profile", action="store_true", help="say where the time goes; leaves trace.json.gz in RUN")
    train.set_defaults(run=_train)

    sizes = commands.add_parser(
        "batch-sizes",
        parents=[common],
        help="time a recipe's step at growing batch sizes, until memory runs out",
    )
    sizes.add_argument("recipe", metavar="RECIPE", help="a TOML file or the name of a shipped recipe")
    sizes.add_argument("--teacher", metavar="CKPT", help="robust teacher")
    sizes.add_argument("--clean-teacher", metavar="CKPT", help="accurate clean model (VFD)")
    sizes.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    sizes.set_defaults(run=_batch_sizes)

    evaluate = commands.add_parser("eval", parents=[common], help="evaluate a saved model")
    evaluate.add_argument("source", metavar="RUN|CKPT", help="run folder or any checkpoint `load_teacher` reads")
    evaluate.add_argument("--attacks", help="comma-separated: clean,fgsm,pgd20,cw,cw-quick,aa (default: the recipe's)")
    evaluate.add_argument("--limit", type=int, metavar="N", help="only N test images, class-balanced")
    evaluate.add_argument("--checkpoint", choices=["last", "best"], default="last", help="which one of a RUN")
    evaluate.add_argument("--dataset", help="default: the one it was trained on, else cifar10")
    evaluate.add_argument("--arch", help="architecture of a bare state dict, where its keys do not tell")
    evaluate.add_argument(
        "--norm", choices=["linf", "l2"], help="of the change of an image (default: the recipe's, else linf)"
    )
    evaluate.add_argument("--epsilon", help="largest norm, e.g. 8/255 (default: the recipe's, else 8/255; l2: 0.5)")
    evaluate.add_argument("--batch-size", type=int, default=250, metavar="N")
    evaluate.add_argument("--teacher", metavar="CKPT", help="also measure gradient alignment (GD, GC) with it")
    evaluate.add_argument(
        "--measure",
        action="append",
        default=[],
        metavar="WHAT",
        help="also measure: remainder, cka, pointwise, probe:DATA (a linear probe on another data set)",
    )
    evaluate.add_argument("--figures", action="store_true", help="also write curve.json and panel.npz for the report")
    evaluate.add_argument(
        "--save-adversarial",
        metavar="FILE.npz",
        help="keep the adversarial images, and judge them rounded to 8 bits too",
    )
    evaluate.add_argument("--out", metavar="DIR", help="where evaluation.json goes (default: RUN, or beside CKPT)")
    evaluate.set_defaults(run=_eval)

    recipes = commands.add_parser(
        "recipes", parents=[plugged], help="list recipes, or print one with every default spelled out"
    )
    recipes.add_argument("name", nargs="?", metavar="NAME")
    recipes.add_argument(
        "--table",
        metavar="TABLE",
        help="the rows of a table: the paper's numbers, those under --out, the difference",
    )
    recipes.add_argument("--out", default="runs", metavar="DIR", help="where `fastrd reproduce` put its runs")
    recipes.set_defaults(run=_recipes)

    reproduce = commands.add_parser(
        "reproduce", parents=[common], help="train and evaluate a published table; go on where it was stopped"
    )
    reproduce.add_argument("table", metavar="TABLE", help="see `fastrd recipes`; or a facts file, FILE:TABLE")
    reproduce.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="labels, with shell wildcards")
    reproduce.add_argument("--seeds", type=int, metavar="N", help="default: 3")
    reproduce.add_argument("--budget", metavar="TIME", help="stop cleanly after, e.g., 2h or 45m")
    reproduce.add_argument("--plan", action="store_true", help="only say what there is to do")
    reproduce.add_argument(
        "--teacher",
        action="append",
        default=[],
        metavar="NAME=CKPT",
        help="where a teacher lies, by its name in the plan",
    )
    reproduce.add_argument(
        "--any-teacher",
        action="store_true",
        help="also train with a teacher that does not have the published accuracy",
    )
    reproduce.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a recipe key in every row"
    )
    reproduce.add_argument("--jobs", type=int, metavar="N", help="runs at the same time (default: 1; CPU: cores)")
    reproduce.add_argument("--out", default="runs", metavar="DIR", help="default: runs")
    reproduce.set_defaults(run=_reproduce)

    report = commands.add_parser("report", help="one page from any set of runs, or of benchmark results")
    content = report.add_mutually_exclusive_group(required=True)
    content.add_argument("runs", nargs="*", default=[], metavar="RUN")
    content.add_argument(
        "--bench", nargs="+", metavar="FILE", help="JSON files of pytest-benchmark, e.g. in bench/results/"
    )
    report.add_argument("--out", default="report.html", metavar="FILE", help="HTML page (default: report.html)")
    report.add_argument("--title")
    report.set_defaults(run=_report)

    pack = commands.add_parser(
        "pack", parents=[plugged], help="write a data set to a .beton file for FFCV, or check one"
    )
    pack.add_argument(
        "dataset", nargs="?", metavar="DATASET", help="cifar10, ..., arrays, FILE.npz, or a folder of images"
    )
    pack.add_argument("out", nargs="?", metavar="OUT.beton")
    pack.add_argument("--check", metavar="FILE", help="read a packed file through instead of writing one")
    pack.add_argument("--jpeg", type=int, metavar="QUALITY", help="compress, 1..100 (default: raw pixels)")
    pack.add_argument("--unlabelled", action="store_true", help="with STL-10's 100,000 unlabelled images")
    pack.add_argument("--size", type=int, metavar="N", help="side in pixels, of a folder of images of any size")
    pack.add_argument("--data", metavar="DIR", help="folder of the data sets")
    pack.add_argument("--download", action="store_true", help="let torchvision download an absent data set")
    pack.add_argument("--quiet", action="store_true", help="no progress bars")
    pack.set_defaults(run=_pack)

    export = commands.add_parser(
        "export", parents=[plugged], help="write a trained student as one file for others to run"
    )
    export.add_argument("source", metavar="RUN|CKPT")
    export.add_argument(
        "--format",
        choices=["safetensors", "onnx", "torch-export"],
        default="safetensors",
        help="default: safetensors",
    )
    export.add_argument("--out", metavar="FILE", help="default: RUN/student with the suffix of the format")
    export.add_argument("--checkpoint", choices=["last", "best"], default="last", help="which one of a RUN")
    export.add_argument("--fold", action="store_true", help="fold batch normalisation into the convolutions before it")
    export.add_argument("--dynamic-batch", action="store_true", help="any number of images, not exactly one")
    export.set_defaults(run=_export)

    demo = commands.add_parser(
        "demo", parents=[common], help="a robust teacher, four methods over five seeds, start to report"
    )
    demo.add_argument("--out", default="runs/demo", metavar="DIR")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="what this machine has, and what fixes what is missing")
    doctor.add_argument("--json", action="store_true")
    doctor.add_argument("--kernels", action="store_true", help="resources and floors of every Triton kernel")
    doctor.set_defaults(run=_doctor)
    return parser


def _train(arguments: argparse.Namespace) -> None:
    from .core.toml import parse_assignment
    from .engine.distributed import is_main_process
    from .recipe import Recipe
    from .workflow import train

    recipe = Recipe.load(arguments.recipe, dict(parse_assignment(text) for text in arguments.set))
    trained = train(
        recipe,
        out=arguments.out,
        data=arguments.data,
        teacher=arguments.teacher,
        clean_teacher=arguments.clean_teacher,
        resume=arguments.resume,
        download=arguments.download,
        device=arguments.device,
        progress=not arguments.quiet,
        profile=arguments.profile,
        log=arguments.log,
    )
    if not is_main_process():
        return
    best = ", ".join(f"{k} {v:.4g}" for k, v in trained.best.items())
    print(f"{trained.run}: done after {recipe.schedule.epochs} epochs" + (f"; best: {best}" if best else ""))


def _batch_sizes(arguments: argparse.Namespace) -> None:
    from .core.toml import parse_assignment
    from .engine.batch_size import try_batch_sizes
    from .recipe import Recipe

    recipe = Recipe.load(arguments.recipe, dict(parse_assignment(text) for text in arguments.set))
    rows = try_batch_sizes(
        recipe,
        data=arguments.data,
        teacher=arguments.teacher,
        clean_teacher=arguments.clean_teacher,
        download=arguments.download,
        device=arguments.device,
    )
    for number, row in enumerate(rows):
        if number == 0:
            print(f"{'batch':>8} {'images/s':>10} {'peak memory':>12}")
        speed = "no memory" if row.images_per_s is None else f"{row.images_per_s:,.0f}"
        print(f"{row.batch_size:>8} {speed:>10} {row.peak_bytes / 2**30:>8.1f} GiB", flush=True)
    print("the recipe's learning rate belongs to its own batch size; change them together")


def _eval(arguments: argparse.Namespace) -> None:
    from .engine.distributed import is_main_process
    from .workflow import evaluate_run, summary

    document = evaluate_run(
        arguments.source,
        attacks=arguments.attacks,
        limit=arguments.limit,
        checkpoint=arguments.checkpoint,
        dataset=arguments.dataset,
        arch=arguments.arch,
        norm=arguments.norm,
        epsilon=arguments.epsilon,
        batch_size=arguments.batch_size,
        teacher=arguments.teacher,
        measures=arguments.measure,
        figures=arguments.figures,
        save_adversarial=arguments.save_adversarial,
        out=arguments.out,
        data=arguments.data,
        download=arguments.download,
        device=arguments.device,
        progress=not arguments.quiet,
    )
    if is_main_process():
        print(summary(document))


def _recipes(arguments: argparse.Namespace) -> None:
    from . import published as facts
    from .recipe import Recipe, available

    if arguments.table is not None:
        if arguments.table in facts.printed():
            print("\n".join(facts.printed()[arguments.table].lines()))
            return
        from .reproduce.page import listing

        for table in facts.load(arguments.table):
            rows = [row for row in table.rows if not row.name.endswith("/faithful")]
            print(listing(table, rows, Path(arguments.out)))
        return
    if arguments.name is not None:
        print(Recipe.load(arguments.name).to_toml(), end="")
        return
    short = [name for name in available() if "/" not in name]
    width = max(map(len, [*short, *facts.tables()]))
    for name in short:
        print(f"{name:<{width}}  {Recipe.load(name).description}")
    print("\nTables, every row of which is a recipe; `fastrd recipes --table TABLE` shows them:")
    for table in facts.tables().values():
        print(f"{table.name:<{width}}  {table.title} ({len(table.rows)} rows)")
    for name, printed in facts.printed().items():
        print(f"{name:<{width}}  {printed.title} (printed numbers)")


def _reproduce(arguments: argparse.Namespace) -> int:
    from .core.toml import parse_assignment
    from .reproduce import reproduce

    outcome = reproduce(
        arguments.table,
        out=arguments.out,
        rows=arguments.rows,
        seeds=arguments.seeds,
        budget=arguments.budget,
        plan_only=arguments.plan,
        teachers=dict(_named_path(text) for text in arguments.teacher),
        any_teacher=arguments.any_teacher,
        overrides=dict(parse_assignment(text) for text in arguments.set),
        jobs=arguments.jobs,
        data=arguments.data,
        download=arguments.download,
        device=arguments.device,
        progress=not arguments.quiet,
    )
    for problem in outcome.problems:
        _say(problem, 2)
    if outcome.stopped_by:
        return 128 + outcome.stopped_by
    if arguments.plan or outcome.finished:
        return 0
    print("not finished: the same command goes on", file=sys.stderr)
    return 0 if outcome.out_of_time and not outcome.problems else 2


def _named_path(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not (separator and name and path):
        raise ValueError(f"--teacher: got {text!r}; accepted: NAME=CKPT")
    return name, path


def _report(arguments: argparse.Namespace) -> None:
    from . import report

    if arguments.bench:
        page = report.build_benchmarks(arguments.bench, arguments.out, title=arguments.title)
        print(report.benchmark_table(arguments.bench))
    else:
        page = report.build(arguments.runs, arguments.out, title=arguments.title)
        print(report.table(arguments.runs))
    print(f"report: {page}")


def _pack(arguments: argparse.Namespace) -> None:
    from .data.pack import check, pack

    progress = not arguments.quiet
    if arguments.check is not None:
        print(f"{check(arguments.check, progress=progress).describe()}: as it was written")
        return
    if arguments.out is None:
        raise ValueError("pack: got no DATASET and OUT.beton; accepted: both, or --check FILE")
    packed = pack(
        arguments.dataset,
        arguments.out,
        root=arguments.data,
        download=arguments.download,
        quality=arguments.jpeg,
        unlabelled=arguments.unlabelled,
        image_size=arguments.size,
        progress=progress,
    )
    print(packed.describe())


def _export(arguments: argparse.Namespace) -> None:
    from .deploy import export

    done = export(
        arguments.source,
        format=arguments.format,
        out=arguments.out,
        checkpoint=arguments.checkpoint,
        fold=arguments.fold,
        dynamic_batch=arguments.dynamic_batch,
    )
    compared = (
        "not compared, onnxruntime is not installed"
        if done.difference is None
        else f"largest difference of logits when read again {done.difference:.3g}"
    )
    print(f"{done.path}: images ({', '.join(done.input_shape)}) -> {len(done.class_names)} logits; {compared}")
    print(f"model card: {done.card}")


def _demo(arguments: argparse.Namespace) -> None:
    from .core.files import locked
    from .demo import run

    with locked(arguments.out):
        run(
            Path(arguments.out),
            data=arguments.data,
            download=arguments.download,
            device=arguments.device,
            progress=not arguments.quiet,
        )


def _doctor(arguments: argparse.Namespace) -> int:
    from . import doctor

    return doctor.main(json=arguments.json, kernels=arguments.kernels)


if __name__ == "__main__":
    sys.exit(main())
