"""Recipes: everything that decides a training run, in one strictly validated TOML file."""

from __future__ import annotations

import functools
import inspect
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import published
from .core.files import check_path
from .core.kinds import check_kinds
from .core.plugins import check_plugins
from .core.schema import RecipeError, Section, check_tree, checked, construct, convert, nearest, suggest
from .core.toml import assign, flat, merge, read_toml, to_toml, without_none
from .core.values import check_integer, check_number, shown

if TYPE_CHECKING:
    from .methods import Method

__all__ = ["Recipe", "RecipeError", "RecipeWarning", "available", "decides"]


class RecipeWarning(UserWarning):
    """A setting of a recipe has no effect in the run that it describes."""


@dataclass(frozen=True)
class Data(Section):
    name: str = "cifar10"  # of a data set, or the path of a file or folder of images
    augment: bool = True  # random crop and flip, as the data set allows
    # where the batches come from, see make_loader; they are the same
    loader: Literal["auto", "resident", "ffcv", "torch"] = "auto"
    holdout: int = 1000  # training images kept aside to choose `best`; the test set never chooses
    train_limit: int | None = None  # so many training images, of each class its share
    test_limit: int | None = None  # likewise, of the test set
    image_size: int | None = None  # side in pixels that a folder of images is brought to
    extra: str | None = None  # further training images: an .npz file, or "unlabelled", see `add_extra`
    extra_fraction: float = 0.5  # of each batch

    def check(self) -> None:
        check_integer(least=0, holdout=self.holdout)
        check_integer(least=1, optional=True, train_limit=self.train_limit, test_limit=self.test_limit)
        check_integer(least=1, optional=True, image_size=self.image_size)
        check_number(above=0, below=1, what="a fraction of a batch", extra_fraction=self.extra_fraction)
        if not self.name:
            raise ValueError("name: got ''; accepted: the name of a data set, or the path of a file")
        if self.train_limit is not None and self.holdout >= self.train_limit:
            got = f"{self.holdout} of train_limit = {self.train_limit} images"
            raise ValueError(f"holdout: got {got}; accepted: fewer than these")


@dataclass(frozen=True)
class Student(Section):
    arch: str  # a network of ours, timm:NAME, torchvision:NAME, or a plugin's
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of build_model, e.g. width
    weights: str | None = None  # file or run that the student starts from, its last layer where it fits
    repeat_grey: bool = False  # grey images for a network of another maker that takes colour


@dataclass(frozen=True)
class Teacher(Section):
    source: str | None = None  # checkpoint, run folder, state dict or RobustBench id
    arch: str | None = None  # only where the keys of a state dict do not show it
    normalize: str | None = None  # likewise: a name that `build_model` knows, "per-image" or "none"
    shortcut: str | None = None  # likewise, of a PreActResNet: "activated" or "input"

    def layout(self) -> dict[str, Any]:
        """Returns the options of `load_teacher` that give what a file does not hold."""
        return {name: value for name, value in asdict(self).items() if name != "source" and value is not None}


@dataclass(frozen=True)
class Attack(Section):
    inner: str | None = None  # a name of `attacks.INNER`; default: the base loss's own
    norm: Literal["linf", "l2"] = "linf"  # of the change of an image, which is at most epsilon
    epsilon: float = 8 / 255  # for pixels in [0, 1]; a number, or a fraction as "8/255"
    step_size: float = 2 / 255  # likewise
    steps: int = 10  # of PGD in training
    # of the networks while they are attacked; default: training.precision. Evaluation is in float32 always
    precision: Literal["fp32", "bf16"] | None = None
    attack_bn: Literal["eval", "train"] = "eval"  # the original ARD and IAD code attacks in train mode

    def check(self) -> None:
        from .attacks import check_settings, inner_maximisation

        if self.inner is not None:
            inner_maximisation(self.inner)
        check_settings(norm=self.norm, steps=self.steps, zero=False, epsilon=self.epsilon, step_size=self.step_size)
        if self.norm == "l2" and self.epsilon == Attack.epsilon:
            raise ValueError("epsilon: got 8/255, made for l-infinity; accepted: a radius for l2, such as 0.5")
        if self.norm == "l2" and self.step_size == Attack.step_size:
            warnings.warn("attack.step_size: 2/255 is small in l2; epsilon / 4 is usual", stacklevel=2)


@dataclass(frozen=True)
class Optimizer(Section):
    lr: float = 0.1  # of SGD
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False  # momentum in Nesterov's form
    head_lr: float | None = None  # of the student's last layer; default: lr

    def check(self) -> None:
        check_number(least=0, lr=self.lr, weight_decay=self.weight_decay)
        check_number(least=0, optional=True, head_lr=self.head_lr)
        if self.head_lr is not None and self.lr == 0:
            raise ValueError(f"head_lr: got {self.head_lr} with lr = 0; accepted: an lr > 0, whose schedule it follows")
        check_number(least=0, below=1, momentum=self.momentum)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: got true with momentum 0; accepted: false, or a momentum > 0")


@dataclass(frozen=True)
class Schedule(Section):
    epochs: int = 200
    kind: Literal["multistep", "cosine"] = "multistep"  # lr falls at the milestones, or from batch to batch to 0
    milestones: tuple[int, ...] = (100, 150)  # finished epochs after which lr is multiplied by gamma
    gamma: float = 0.1  # see milestones
    warmup_epochs: float = 0.0  # linear, for "cosine"

    def check(self) -> None:
        check_integer(least=1, epochs=self.epochs)
        check_number(least=0, gamma=self.gamma, warmup_epochs=self.warmup_epochs)
        if list(self.milestones) != sorted(set(self.milestones)) or min(self.milestones, default=1) < 1:
            raise ValueError(f"milestones: got {shown(list(self.milestones))}; accepted: increasing epoch numbers >= 1")
        try:
            _ = self.gamma ** len(self.milestones)
        except OverflowError:
            accepted = "a factor that can be taken at each milestone"
            raise ValueError(f"gamma: got {self.gamma}; accepted: {accepted}") from None
        got = f"warmup_epochs: got {self.warmup_epochs}"
        if self.kind == "multistep" and self.warmup_epochs:
            raise ValueError(f"{got} with kind = 'multistep'; accepted: 0, or kind = 'cosine'")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"{got} for a run of {self.epochs} epochs; accepted: at most these")


@dataclass(frozen=True)
class Training(Section):
    batch_size: int = 128  # images, of all processes together
    # tf32 speeds up matrix products of GPUs; bf16 is autocast of forward passes. Weights are float32 in each.
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    # torch.compile and, on CUDA, graphs of the attack and of all passes; default: on CUDA only
    compile: bool | None = None
    sync_bn: bool = False  # batch normalisation over all processes of a distributed run
    ema: float | None = None  # decay of an averaged copy of the weights, evaluated instead of the weights
    clip_grad: float | None = None  # largest norm of the gradient
    extra_clean_bn_pass: bool = False  # the authors' IGDM code runs S(x) where its weight is zero, moving BN statistics
    # order of the student's passes in a step, which decides BN statistics; "authors": as their code has it
    student_passes: Literal["views", "authors"] = "views"
    drop_last: bool = True  # leave out an incomplete last batch
    channels_last: bool = True  # memory format of images and weights

    def check(self) -> None:
        check_integer(least=1, batch_size=self.batch_size)
        check_number(above=0, below=1, what="a decay", optional=True, ema=self.ema)
        check_number(above=0, what="a norm", optional=True, clip_grad=self.clip_grad)


@dataclass(frozen=True)
class Validation(Section):
    every: int = 1  # epochs between validations on the held-out images
    steps: int = 10  # PGD steps; 0 chooses `best` by clean accuracy
    remainder: bool = False  # also log the remainder proportion, see `fastrd.evaluation.remainder_proportion`

    def check(self) -> None:
        check_integer(least=1, every=self.every)
        check_integer(least=0, most=9_999_999, steps=self.steps)  # the largest N of pgdN


@dataclass(frozen=True)
class Tricks(Section):
    """Additions to any method, each off by default."""

    # Adversarial weight perturbation (Wu et al. 2020): its relative size; the authors have 0.01, with TRADES 0.005
    awp: float = 0.0
    awp_warmup: int = 0  # epochs before it sets in
    label_smoothing: float = 0.0  # of cross-entropies with labels in the base loss (Szegedy et al. 2016)
    # end after so many epochs without a better robust accuracy on the held-out images (Rice et al. 2020)
    early_stopping: int | None = None

    def check(self) -> None:
        check_number(least=0, below=1, awp=self.awp, label_smoothing=self.label_smoothing)
        check_integer(least=0, awp_warmup=self.awp_warmup)
        check_integer(least=1, optional=True, early_stopping=self.early_stopping)


@dataclass(frozen=True)
class EvaluationSettings(Section):
    attacks: tuple[str, ...] = ("clean", "fgsm", "pgd20", "cw", "aa")  # see `fastrd.evaluate`

    def check(self) -> None:
        from .evaluation.robustness import check_names

        for given, name in zip(self.attacks, check_names(self.attacks), strict=True):
            if given != name:  # results are looked up by it
                raise ValueError(f"attacks: got {given!r}; accepted: {name!r}, without spaces")


@dataclass(frozen=True)
class Paper(Section):
    """What the paper prints for this configuration, in percent (gd, gc and what follows: as printed)."""

    source: str
    clean: float | None = None
    fgsm: float | None = None
    pgd20: float | None = None
    cw: float | None = None
    aa: float | None = None
    gd: float | None = None
    gc: float | None = None
    pd_uniform: float | None = None  # point-wise distance to the teacher, see `pointwise_distance`
    pd_adv: float | None = None
    minutes: float | None = None  # of an epoch
    memory: float | None = None  # MB on the GPU


SECTIONS = {
    "data": Data,
    "student": Student,
    "teacher": Teacher,
    "clean_teacher": Teacher,
    "attack": Attack,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "training": Training,
    "tricks": Tricks,
    "validation": Validation,
    "evaluation": EvaluationSettings,
    "paper": Paper,
}
SCALARS = {"name": str, "description": str, "seed": int, "plugins": tuple[str, ...]}
# What a key or table decides, where that is not the weights a run ends with. Teachers are compared by their contents.
_DECIDES_EVALUATION = ("evaluation", "data.test_limit")
_DECIDES_NOTHING = (
    *("name", "description", "plugins", "paper"),
    *(f"{teacher}.{key}" for teacher in ("teacher", "clean_teacher") for key in ("source", "arch")),
    *("data.loader", "validation.remainder"),
)
_FILES = ("data.name", "data.extra", "student.weights", "teacher.source", "clean_teacher.source")


def decides(key: str) -> Literal["weights", "evaluation", "nothing"]:
    """Returns what the dotted `key` of a recipe decides."""
    names = {key, key.split(".")[0]}
    if names & {*_DECIDES_NOTHING}:
        return "nothing"
    return "evaluation" if names & {*_DECIDES_EVALUATION} else "weights"


def identity(table: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the dotted keys of a recipe's dictionary that decide the weights, with their values.

    Two runs are the same run where these and the contents of their data and teachers agree. Of a data file the name
    counts, not the folder.
    """
    kept = {key: value for key, value in flat(table).items() if decides(key) == "weights"}
    if kept.get("schedule.kind") == "cosine":  # which has neither
        kept = {key: value for key, value in kept.items() if key not in ("schedule.milestones", "schedule.gamma")}
    for key in _FILES:
        if isinstance(name := kept.get(key), str):
            kept[key] = os.path.basename(name)
    return kept


@dataclass(frozen=True)
class Recipe:
    """One training configuration. Build it with `load`, `from_dict` or `override`, which validate."""

    name: str
    student: Student
    base: dict[str, Any]  # name and options of the base loss, see fastrd.methods
    description: str = ""
    seed: int = 0
    plugins: tuple[str, ...] = ()  # that must be loaded, see `fastrd.core.plugins`
    addons: dict[str, dict[str, Any]] = field(default_factory=dict)  # TOML tables [igdm], [gacd], [vfd]
    data: Data = field(default_factory=Data)
    teacher: Teacher = field(default_factory=Teacher)
    clean_teacher: Teacher = field(default_factory=Teacher)
    attack: Attack = field(default_factory=Attack)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    training: Training = field(default_factory=Training)
    tricks: Tricks = field(default_factory=Tricks)
    validation: Validation = field(default_factory=Validation)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    paper: Paper | None = None

    @classmethod
    def load(cls, source: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Loads a TOML file or the name of a shipped recipe (see `available`), with dotted `overrides` applied.

        `extends = "NAME"` in a file starts from another recipe and replaces single keys.

        Raises:
            FileNotFoundError: no such file or shipped recipe.
            RecipeError: not TOML, or not a valid recipe; names the file, the key, what came and what is accepted.
        """
        table, where = _read(check_path(recipe=source))
        for key, value in _overrides(overrides):
            assign(table, key, value, where)
        return cls.from_dict(table, where=where)

    @classmethod
    @check_kinds
    def from_dict(cls, table: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Returns the recipe of the nested dictionary that a TOML recipe parses to (what `to_dict` returns).

        Warns with a `RecipeWarning` where a setting has no effect. Raises RecipeError as `load` does.
        """
        from .methods import ADDONS, BASES

        check_tree(table, where)
        if "plugins" in table:
            check_plugins(convert(table["plugins"], SCALARS["plugins"], f"{where}: plugins"), where)
        known = {*SCALARS, *SECTIONS, *ADDONS, "base"}
        for key in table:
            if key not in known:
                raise RecipeError(f"{where}: {key}: unknown key (value {shown(table[key])}); {suggest(key, known)}")
        for key in ("name", "student", "base"):
            if key not in table:
                raise RecipeError(f"{where}: {key}: missing; every recipe has it")
        place = {key: f"{where}: {key}" for key in table}
        values = {key: convert(table[key], SCALARS[key], place[key]) for key in SCALARS if key in table}
        values |= {key: construct(SECTIONS[key], table[key], place[key]) for key in SECTIONS if key in table}
        values["base"] = _method_options(table["base"], BASES, place["base"])
        values["addons"] = {key: checked(ADDONS[key], table[key], place[key]) for key in ADDONS if key in table}
        recipe = cls(**values)
        recipe._check(where)
        return recipe

    @classmethod
    def stored(cls, source: Mapping[str, Any] | str | os.PathLike, where: str = "") -> Recipe:
        """Returns the recipe that a run was made with, from its file or dictionary, without warning of it once more."""
        if not isinstance(source, Mapping):
            where = where or os.fspath(source)
            source = read_toml(Path(source))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls.from_dict(source, where=where or "recipe")

    def located(self, before: Recipe | None = None) -> Recipe:
        """Returns the recipe with the paths of all files in it absolute, so that it holds in any folder.

        A file that is not there, for its path is relative to another folder, is the one of `before`, the recipe of the
        run that goes on, where that path ends in this one.
        """
        from .data.catalog import DATASETS

        recipe = self
        for key in _FILES:
            section, name = key.split(".")
            value = getattr(getattr(self, section), name)
            if value is not None and value not in DATASETS:
                known = None if before is None else getattr(getattr(before, section), name)
                paths = [value, known] if known and _ends_in(known, value) else [value]
                if there := [path for path in map(os.path.expanduser, paths) if os.path.exists(path)]:
                    changed = replace(getattr(recipe, section), **{name: os.path.abspath(there[0])})
                    recipe = replace(recipe, **{section: changed})
        return recipe

    def _check(self, where: str) -> None:
        method = self.build_method(where)
        for text in self._contradictions(method):
            raise RecipeError(f"{where}: {text}")
        try:
            _check_student(self.student)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{where}: student: {error}") from None
        except (RuntimeError, OverflowError) as error:  # of torch, for a network beyond all memory
            got = f"got {shown(dict(self.student.options))}, of which no network can be built ({error})"
            raise RecipeError(f"{where}: student.options: {got}; accepted: smaller numbers") from None
        for text in self._idle(method):
            warnings.warn(f"{where}: {text}", RecipeWarning, stacklevel=5)

    def _contradictions(self, method: Method) -> Iterator[str]:
        """Yields what the sections forbid each other."""
        tricks = self.tricks
        if tricks.awp and self.training.compile:
            yield f"tricks.awp: got {tricks.awp} with training.compile = true; accepted: false"
        if tricks.label_smoothing and not method.base.smoothed:
            without = f"the base loss {self.base['name']!r} has no cross-entropy with labels"
            yield f"tricks.label_smoothing: got {tricks.label_smoothing}; accepted: 0, {without}"
        if tricks.early_stopping and not (self.validation.steps and self.data.holdout):
            needed = "with validation.steps > 0 and data.holdout > 0, which it goes by"
            yield f"tricks.early_stopping: got {tricks.early_stopping}; accepted: {needed}"
        if decided := {"num_classes", "in_channels", "image_size"} & self.student.options.keys():
            yield f"student.options.{min(decided)}: decided by the data; accepted: leave it out"
        if twice := {"arch", "repeat_grey"} & self.student.options.keys():
            yield f"student.options.{min(twice)}: a key of its own; accepted: student.{min(twice)}"

    def _idle(self, method: Method) -> Iterator[str]:
        """Yields what has been set and decides nothing in this run."""
        from .attacks import inner_maximisation

        schedule, tricks = self.schedule, self.tricks
        beyond = [str(milestone) for milestone in schedule.milestones if milestone >= schedule.epochs]
        if schedule.kind == "multistep" and beyond:
            yield f"schedule.milestones: {', '.join(beyond)} have no effect with schedule.epochs = {schedule.epochs}"
        first = {
            "tricks.awp": tricks.awp_warmup + 1 if tricks.awp else 1,
            "tricks.early_stopping": tricks.early_stopping + 2 if tricks.early_stopping else 1,
            "base.start_epoch": getattr(method.base, "start_epoch", 1),
        }
        for key, epoch in first.items():
            if epoch > schedule.epochs:
                yield f"{key}: has no effect in a run of {schedule.epochs} epochs, before epoch {epoch}"
        no_drop = "with schedule.kind = 'cosine'" if schedule.kind == "cosine" else ""
        reasons = {
            "data.extra_fraction": "without data.extra" * (self.data.extra is None),
            "schedule.milestones": no_drop,
            "schedule.gamma": no_drop or "without milestones" * (not schedule.milestones),
            "tricks.awp_warmup": "without tricks.awp" * (not tricks.awp),
            "validation.every": "without data.holdout" * (not self.data.holdout),
            "validation.remainder": "without data.holdout" * (not self.data.holdout),
        }
        if not inner_maximisation(method.inner).passes:
            if "igdm" in self.addons:
                yield "igdm: has no effect as no attack is trained on"
            names = ("step_size", "steps", "precision", "attack_bn")
            reasons |= dict.fromkeys((f"attack.{name}" for name in names), "as no attack is trained on")
        for key, reason in reasons.items():
            section, name = key.split(".")
            value = getattr(getattr(self, section), name)
            if reason and value != getattr(SECTIONS[section], name):
                yield f"{key}: {shown(value)} has no effect {reason}"
        for key, table in {"base": self.base, **self.addons}.items():
            term = method.base if key == "base" else method.addon(key)
            defaults = inspect.signature(type(term)).parameters
            for name, reason in term.idle().items():
                if table[name] != defaults[name].default:
                    yield f"{key}.{name}: {shown(table[name])} has no effect {reason}"

    def build_method(self, where: str = "recipe") -> Method:
        """Returns a fresh `fastrd.methods.Method` of this recipe."""
        from .methods import ADDONS, BASES, Method

        options = {key: value for key, value in self.base.items() if key != "name"}
        base = construct(BASES[self.base["name"]], options, f"{where}: base")
        addons = {key: construct(ADDONS[key], table, f"{where}: {key}") for key, table in self.addons.items()}
        return Method(base, addons, self.attack.inner)

    @check_kinds
    def override(self, overrides: Mapping[str, Any]) -> Recipe:
        """Returns a copy with dotted keys replaced: `recipe.override({"schedule.epochs": 10, "igdm.alpha": 20})`.

        Another `base.name` starts from the defaults of that base loss.
        """
        table = self.to_dict()
        if overrides.get("base.name", self.base["name"]) != self.base["name"]:
            table["base"] = {}
        for key, value in _overrides(overrides):
            assign(table, key, value, self.name)
        return Recipe.from_dict(table, where=self.name)

    def to_dict(self) -> dict[str, Any]:
        """Returns the nested dictionary of the TOML form, every default spelled out, None left out."""
        table = without_none(asdict(self))
        addons = table.pop("addons")
        if not self.plugins:
            del table["plugins"]
        return {**table, **addons}

    def to_toml(self) -> str:
        """Returns TOML that `load` reads back to an equal recipe."""
        return to_toml(self.to_dict(), self.name)

    def identity(self) -> dict[str, Any]:
        """Returns the dotted keys that decide the weights of this run; see `identity`."""
        return identity(self.to_dict())


def _ends_in(path: str, end: str) -> bool:
    """Tells whether a path ends in the parts of another that are no "." or ".."."""
    parts = [part for part in Path(os.path.normpath(end)).parts if part != ".."]
    return bool(parts) and list(Path(path).parts[-len(parts) :]) == parts


def _overrides(given: Mapping[str, Any] | None) -> Iterable[tuple[str, Any]]:
    if not isinstance(given or {}, Mapping) or not all(isinstance(key, str) for key in given or {}):
        raise RecipeError(f"overrides: got {shown(given)}; accepted: a table of dotted keys and values")
    return (given or {}).items()


def _check_student(student: Student) -> None:
    from .models.foreign import check_name, is_foreign

    if is_foreign(student.arch):
        check_name(student.arch)  # the rest needs the shape of the data
    elif student.repeat_grey:
        accepted = "only for a network of another maker, ours take images of any number of channels"
        raise ValueError(f"repeat_grey: got true for {student.arch}; accepted: {accepted}")
    else:
        _build_empty(student.arch, json.dumps(student.options, sort_keys=True))


@functools.cache  # a wide network takes a second even on the meta device, and recipes share architectures
def _build_empty(arch: str, options: str) -> None:
    import torch

    from .models import build_model

    given, channels = json.loads(options), 3
    match given.get("normalize"):
        case [list() as mean, _]:
            channels = max(1, len(mean))  # those of the data are known only when the run starts
    with torch.device("meta"):
        build_model(arch, num_classes=2, in_channels=channels, **given)


def available() -> tuple[str, ...]:
    """Returns the names of the shipped recipes: files, and the rows of the tables in `fastrd.published`."""
    return (*sorted(_files()), *published.rows())


def _files() -> dict[str, Path]:
    return {path.stem: path for path in Path(str(resources.files("fastrd") / "recipes")).glob("*.toml")}


def _read(source: str | os.PathLike, chain: tuple[str, ...] = ()) -> tuple[dict[str, Any], str]:
    """Returns the table of a recipe, with what it extends merged in, and the name to call it in errors."""
    path, name = Path(source), str(source)
    if not path.is_file():
        if (row := published.rows().get(name)) is not None:
            return merge(row.recipe, {"name": name}), name
        if name not in _files():
            hint = nearest(name, available())
            raise FileNotFoundError(f"recipe: no file or shipped recipe {name!r}{hint}; see `fastrd recipes`")
        path = _files()[name]
    where = path.name
    if where in chain:
        raise RecipeError(f"{where}: extends: recipes extend each other in a circle: {' -> '.join((*chain, where))}")
    table = read_toml(path)
    if (parent := table.pop("extends", None)) is not None:
        parent = convert(parent, str, f"{where}: extends")
        if Path(parent).is_absolute() or ".." in Path(parent).parts:
            accepted = "a shipped recipe, or one in the folder of this file"
            raise RecipeError(f"{where}: extends: got {parent!r}; accepted: {accepted}")
        beside = path.parent / f"{parent}.toml"
        merged, _ = _read(beside if beside.is_file() else parent, (*chain, where))
        table = merge(merged, table)
    return table, where


def _method_options(table: Any, registry: Mapping[str, type], where: str) -> dict[str, Any]:
    name = table.get("name") if isinstance(table, Mapping) else None
    if not isinstance(name, str) or name not in registry:
        raise RecipeError(f"{where}.name: got {shown(name)}; {suggest(str(name), registry)}")
    options = {key: value for key, value in table.items() if key != "name"}
    return {"name": name, **checked(registry[name], options, where)}
