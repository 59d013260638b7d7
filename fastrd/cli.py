"""The command line: fastrd train | eval | recipes | report | demo | doctor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors a user can mend are one line on stderr, status 2."""
    arguments = _parser().parse_args(argv)
    from .engine.errors import Interrupted, NonFiniteLoss

    try:
        return arguments.run(arguments) or 0
    except Interrupted as stop:
        print(f"fastrd: {stop}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("fastrd: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away (| head); Python would complain once more at exit
        return 141
    except (ValueError, OSError, ImportError, NonFiniteLoss) as error:
        print(f"fastrd: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrd", description="Fast, faithful adversarial robust distillation."
    )
    parser.add_argument("--version", action="version", version=f"fastrd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--data", metavar="DIR", help="folder of the data sets (default: FASTRD_DATA, ./data, ./.data)"
    )
    common.add_argument("--download", action="store_true", help="let torchvision download an absent data set")
    common.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: CUDA where available)")
    common.add_argument("--quiet", action="store_true", help="no progress bars")

    train = commands.add_parser("train", parents=[common], help="train a recipe")
    train.add_argument("recipe", metavar="RECIPE", help="a TOML file or the name of a shipped recipe")
    train.add_argument("--out", required=True, metavar="RUN", help="run folder")
    train.add_argument(
        "--teacher", metavar="CKPT", help="robust teacher: run, checkpoint, state dict, RobustBench id"
    )
    train.add_argument("--clean-teacher", metavar="CKPT", help="accurate clean model (VFD)")
    train.add_argument("--resume", action="store_true", help="go on from the newest good checkpoint in RUN")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. schedule.epochs=10"
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", parents=[common], help="evaluate a saved model")
    evaluate.add_argument(
        "source", metavar="RUN|CKPT", help="run folder or any checkpoint `load_teacher` reads"
    )
    evaluate.add_argument(
        "--attacks", help="comma-separated: clean,fgsm,pgd20,cw,cw-quick,aa (default: the recipe's)"
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="only N test images, class-balanced")
    evaluate.add_argument("--checkpoint", choices=["last", "best"], default="last", help="which one of a RUN")
    evaluate.add_argument("--dataset", help="default: the one it was trained on, else cifar10")
    evaluate.add_argument("--arch", help="architecture of a bare state dict, where its keys do not tell")
    evaluate.add_argument(
        "--epsilon", help="l-infinity radius, e.g. 8/255 (default: the recipe's, else 8/255)"
    )
    evaluate.add_argument("--batch-size", type=int, default=250, metavar="N")
    evaluate.add_argument(
        "--teacher", metavar="CKPT", help="also measure gradient alignment (GD, GC) with it"
    )
    evaluate.add_argument(
        "--figures", action="store_true", help="also write curve.json and panel.npz for the report"
    )
    evaluate.add_argument(
        "--out", metavar="DIR", help="where evaluation.json goes (default: RUN, or beside CKPT)"
    )
    evaluate.set_defaults(run=_eval)

    recipes = commands.add_parser("recipes", help="list recipes, or print one with every default spelled out")
    recipes.add_argument("name", nargs="?", metavar="NAME")
    recipes.set_defaults(run=_recipes)

    report = commands.add_parser("report", help="one page from any set of runs")
    report.add_argument("runs", nargs="+", metavar="RUN")
    report.add_argument(
        "--out", default="report.html", metavar="FILE", help="HTML page (default: report.html)"
    )
    report.add_argument("--title")
    report.set_defaults(run=_report)

    demo = commands.add_parser(
        "demo", parents=[common], help="a robust teacher and three students, start to report"
    )
    demo.add_argument("--out", default="runs/demo", metavar="DIR")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="what this machine has, and what mends what is missing")
    doctor.add_argument("--json", action="store_true")
    doctor.add_argument("--kernels", action="store_true", help="resources and floors of every Triton kernel")
    doctor.set_defaults(run=_doctor)
    return parser


def _train(arguments: argparse.Namespace) -> None:
    from .engine.trainer import train
    from .recipe import Recipe, parse_assignment

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
    )
    best = ", ".join(f"{k} {v:.4g}" for k, v in trained.best.items())
    print(f"{trained.run}: done after {recipe.schedule.epochs} epochs" + (f"; best: {best}" if best else ""))


def _eval(arguments: argparse.Namespace) -> None:
    from .evaluation.source import evaluate_source, summary

    document = evaluate_source(
        arguments.source,
        attacks=tuple(arguments.attacks.split(",")) if arguments.attacks else None,
        limit=arguments.limit,
        checkpoint=arguments.checkpoint,
        dataset=arguments.dataset,
        arch=arguments.arch,
        epsilon=arguments.epsilon,
        batch_size=arguments.batch_size,
        teacher=arguments.teacher,
        figures=arguments.figures,
        out=arguments.out,
        data=arguments.data,
        download=arguments.download,
        device=arguments.device,
        progress=not arguments.quiet,
    )
    print(summary(document))


def _recipes(arguments: argparse.Namespace) -> None:
    from .recipe import Recipe, available

    if arguments.name is not None:
        print(Recipe.load(arguments.name).to_toml(), end="")
        return
    names = available()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {Recipe.load(name).description}")


def _report(arguments: argparse.Namespace) -> None:
    from . import report

    page = report.build(arguments.runs, Path(arguments.out), title=arguments.title)
    print(report.table(arguments.runs))
    print(f"report: {page}")


def _demo(arguments: argparse.Namespace) -> None:
    from .demo import run

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
