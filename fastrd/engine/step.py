"""One training step: attack -> views -> losses -> gradients.

Frozen networks, and the student while it is attacked, run as folded copies in eval mode (`models.folded`): the same
functions with less work. The student of the outer loss is the student itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .. import attacks
from ..core import capture
from ..core.capture import compiled
from ..core.fingerprint import device_of
from ..core.images import check_pixels
from ..methods import Method, Setup, Step, Term, views
from ..methods.views import Output, View
from ..models import Folded
from ..models.fastest import trained
from ..recipe import Attack, Tricks
from .distributed import ALONE, World
from .profile import forward_flops
from .weight_perturbation import perturbed

EXAMPLES = 2  # images that a network is folded by

Phase = Callable[[str], AbstractContextManager]


class Distiller:
    """The student, its frozen networks and a method, as one step that fills the student's gradients.

    Args:
        method: a prepared `Method`.
        networks: "student" (trained), and as the method needs "teacher" and "clean_teacher" (frozen, eval), each
            under the contract `network(x, features=True) -> (logits, features)`, on their device.
        attack: norm, epsilon, step size, steps, precision and BN mode of the inner maximisation.
        precision: "fp32", "tf32" (the caller sets torch's switches) or "bf16" for autocast forward passes; of the
            attack too, unless it has its own.
        compile: compile the student, and frozen networks that are no chains, with `torch.compile`; on CUDA also the
            attack. There the attack becomes one CUDA graph and, in one process, each pass of a network another:
            backward belongs before the next step.
        extra_clean_bn_pass: also run the student on x where no loss needs it, for its BN statistics.
        student_passes: order of the student's passes: "views" = x', x, x - d, each once where a loss needs it;
            "authors" = as the authors' code has them (`Term.student_passes`), repeats included, so that running
            statistics of BN equal theirs; the same as "views" where the method declares none.
        unlabelled: some labels are -1: these images get the class that the teacher predicts for the clean image, in the
            attack and in the losses. (Which of them it is stays known to a method from `Setup.labels`.)
        tricks: AWP and label smoothing, see `fastrd.recipe.Tricks`. AWP raises the base loss alone, so that what an
            add-on keeps (banks, say) changes once a step. It is not possible with `compile`.
        images: so many of a full batch are this process's; the forms of networks are chosen for these
            (`models.fastest`), whatever batch comes first. None: for as many as that has.
        world: the processes that share each batch; random starts are drawn for the whole batch.
        phase: called with "attack", "teacher" and "student", gives the context each part of the step runs in.

    Raises ValueError: a network that the method needs is missing; an unknown inner maximisation; when called: images
    outside [0, 1], an l2 radius that reaches every image.
    """

    tables: dict[View, Output]  # outputs of frozen networks on the whole training set, see `tabulate`

    # Made by the first batch, see `_prepare`:
    _folded: dict[str, Folded]  # frozen networks
    _frozen: dict[str, Callable[..., Any]]  # frozen networks in the form that gives views
    _trained: Callable[..., Any]  # the student in the form that gives views
    _attacked_copy: Folded | None  # the student in eval mode; None: it is attacked itself, in train mode
    _pgd: attacks.PGD
    _compile_attack: bool
    _captures_passes: bool

    def __init__(
        self,
        method: Method,
        networks: Mapping[str, nn.Module],
        attack: Attack,
        *,
        precision: str = "fp32",
        compile: bool = False,
        extra_clean_bn_pass: bool = False,
        student_passes: Literal["views", "authors"] = "views",
        unlabelled: bool = False,
        tricks: Tricks | None = None,
        images: int | None = None,
        world: World = ALONE,
        phase: Phase = lambda name: nullcontext(),
    ) -> None:
        self.method, self.inner = method, attacks.inner_maximisation(method.inner)
        self.networks, self.config = dict(networks), attack
        self.precision, self.compile, self.world, self.phase = precision, compile, world, phase
        self.extra_clean_bn_pass, self.student_passes = extra_clean_bn_pass, student_passes
        self.tricks = tricks or Tricks()
        if self.tricks.awp and compile:
            raise ValueError(f"awp: got {self.tricks.awp} with compile; accepted: without")
        self.images = images
        self.tables, self.unlabelled = {}, unlabelled
        if unlabelled and "teacher" not in self.networks:
            raise ValueError(
                "teacher: some training images have no label, which a teacher must predict, and none was given "
                "(--teacher CHECKPOINT)"
            )
        for name, network in self.networks.items():
            parameters = inspect.signature(network.forward).parameters.values()
            if not any(p.name == "features" or p.kind is p.VAR_KEYWORD for p in parameters):
                raise TypeError(
                    f"{name}: got {type(network).__name__}, which returns logits alone; accepted: a network that "
                    "returns its features on request, see fastrd.models.with_features"
                )
        needed = {view.network for view in self._views()} | self.inner.networks
        for name in sorted(needed - self.networks.keys()):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{name}: this method needs one and none was given ({option} CHECKPOINT)")
        self._ready = False

    @property
    def student(self) -> nn.Module:
        return self.networks["student"]

    def attack(
        self,
        x: Tensor,
        y: Tensor,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        known: dict[View, Output] | None = None,
    ) -> Tensor:
        """Returns x' by the method's inner maximisation; (N, C, H, W) in [0, 1], constant.

        `start` replaces the random start. Teacher views the attack computes anyway are left in `known`.
        """
        if not self.inner.passes:
            return x
        self._prepare(x)
        if start is None:
            start = self.start(x, generator)
        known = {} if known is None else known
        with self._attacked(), self._autocast(x):
            return self._pgd(x, start, self._objective(x, y, known))

    def start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns the random start of the method's attack on x."""
        rank, size = self.world.rank, self.world.size
        batch = x
        if size > 1:
            # Noise for the whole batch, of which this process keeps its rows: each image gets that of one process.
            batch = x.repeat_interleave(size, dim=0)
            if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
                batch = batch.contiguous(memory_format=torch.channels_last)
        return attacks.STARTS[self.inner.start](batch, self.config.epsilon, self.config.norm, generator)[rank::size]

    def _objective(self, x: Tensor, y: Tensor, known: dict[View, Output]) -> attacks.Objective:
        logits = {}
        for name in self.inner.clean:
            if name == "student":
                with torch.no_grad():
                    logits[name] = self._pgd.model(x)
            else:
                logits[name] = self._clean_logits(name, x, known)
        networks = {name: self._attacked_form(self._folded[name]) for name in self.inner.passes if name != "student"}
        return self.inner.objective(attacks.Clean(x, y, {"student": self._pgd.model, **networks}, logits))

    def _clean_logits(self, name: str, x: Tensor, known: dict[View, Output]) -> Tensor:
        """A frozen network's logits at the clean images, left in `known`."""
        view = View(name, "clean")
        if view not in known:
            known.update(views.compute([view], self._frozen, {"clean": x}))
        return known[view].logits

    def losses(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        x_adv: Tensor,
        *,
        epoch: int,
        epochs: int,
        batch: int = 0,
        known: dict[View, Output] | None = None,
        of: Method | Term | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns named weighted losses, whose sum is the training loss, and logged metrics, in train mode.

        Outputs of frozen networks are taken from `known` and left there. of: one term of the method, alone.
        """
        self._prepare(x)
        if self._captures_passes:
            capture.new_step(self.student)
        self.student.train()
        known, of = {} if known is None else known, of or self.method
        wanted, images = of.views(epoch), self.method.images(x, x_adv)
        with self._autocast(x):
            with self.phase("teacher"):
                frozen = [view for view in wanted if view.network != "student"]
                known.update(views.compute(frozen, self._frozen, images, known=known))
            with self.phase("student"):
                passes = self._passes(wanted, epoch) if of is self.method else None
                student = {"student": self._trained}
                outputs = views.compute(wanted, student, images, known=known, student_passes=passes)
                options: dict[str, Any] = {"gather": self.world.gather, "label_smoothing": self.tricks.label_smoothing}
                step = Step(x, y, index, x_adv, epoch, epochs, batch, outputs, **options)
                return of(step), step.metrics

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        *,
        epoch: int,
        epochs: int,
        batch: int = 0,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Attack, then losses, then backward: gradients are added to the student's and the method's parameters.

        Returns detached losses and metrics by name, still on the device.
        """
        known = {view: Output(*(part[index] for part in table)) for view, table in self.tables.items()}
        if self.unlabelled:
            self._prepare(x)
            with self.phase("teacher"), self._autocast(x):
                y = torch.where(y < 0, self._clean_logits("teacher", x, known).argmax(1), y)
        with self.phase("attack"):
            x_adv = self.attack(x, y, start=start, generator=generator, known=known)
        place: dict[str, Any] = {"epoch": epoch, "epochs": epochs, "batch": batch, "known": known}

        def loss(of: Method | Term) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
            losses, metrics = self.losses(x, y, index, x_adv, **place, of=of)
            return torch.stack(list(losses.values())).sum(), losses, metrics

        weights: AbstractContextManager = nullcontext()
        if self.tricks.awp and epoch > self.tricks.awp_warmup:
            weights = perturbed(self.student, lambda: loss(self.method.base)[0], self.tricks.awp, self.world)
        with weights:
            total, losses, metrics = loss(self.method)
            with self.phase("student"):
                total.backward()
        return {name: value.detach() for name, value in losses.items()}, metrics

    def flops(self, example: Tensor, epoch: int) -> dict[str, float]:
        """Returns model FLOPs of one image by phase, two for a multiply-add; a gradient counts as one more forward pass
        for the input and one for the weights. example: one image (1, C, H, W)."""
        forward = {name: forward_flops(network, example) for name, network in self.networks.items()}
        wanted = self.method.views(epoch)
        return {
            "attack": 2 * self.config.steps * sum(n * forward[name] for name, n in self.inner.passes.items())
            + forward["student"] * ("student" in self.inner.clean),
            "teacher": sum(forward[view.network] for view in wanted if view.network != "student"),
            "student": forward["student"]
            * (len(self._passes(wanted, epoch)) + 2 * sum(view.network == "student" for view in wanted)),
        }

    def tabulate(self, batches: Iterable[Tensor]) -> None:
        """Computes the frozen networks' outputs on clean images once, for a training set that is never augmented.

        batches: all images in the order of their index, (n, C, H, W) each.
        """
        wanted = {view for view in self._views() if view.image == "clean" and view.network != "student"}
        wanted |= {View(name, "clean") for name in self.inner.clean if name != "student"}
        if self.unlabelled:
            wanted.add(View("teacher", "clean"))
        parts: dict[View, list[Output]] = {view: [] for view in wanted}
        for x in batches if wanted else ():
            self._prepare(x)
            with self._autocast(x):
                for view, output in views.compute(wanted, self._frozen, {"clean": x}).items():
                    parts[view].append(output)
        self.tables = {view: Output(*map(torch.cat, zip(*rows, strict=True))) for view, rows in parts.items()}

    def _passes(self, wanted: Collection[View], epoch: int) -> Sequence[str]:
        """Images in the order in which the student runs on them."""
        authors = self.method.student_passes(epoch) if self.student_passes == "authors" else ()
        needed = {view.image for view in wanted if view.network == "student"}
        if self.extra_clean_bn_pass and not authors:
            needed.add("clean")
        return [*authors, *(image for image in views.IMAGES if image in needed.difference(authors))]

    def _views(self) -> set[View]:
        """All views of the run; terms that set in late have done so by the last of these epochs."""
        return {view for epoch in (1, 10**9) for view in self.method.views(epoch)}

    def _prepare(self, x: Tensor) -> None:
        """Folded copies and compiled forms, made by the first batch, when the networks are where they will stay."""
        if self._ready:
            return
        example, config = x[:EXAMPLES], self.config
        attacks.check_settings(norm=config.norm, shape=x.shape[1:], epsilon=config.epsilon, step_size=config.step_size)
        check_pixels(x, wait=True)
        # In train mode every step updates BN statistics, which a functional gradient cannot; on a CPU folded copies
        # compile themselves where that is faster.
        graphs = self.compile and capture.capturable(x)
        self._compile_attack = graphs and config.attack_bn == "eval"
        self._captures_passes = graphs and self.world.size == 1  # else SyncBN's collectives would be inside
        frozen_names = self.networks.keys() - {"student"}
        folded = partial(Folded, example=example, compile=self.compile and not graphs, images=self.images)
        self._folded = {name: folded(self.networks[name]) for name in frozen_names}
        self._frozen = {name: self._compiled(own.network) if graphs else own for name, own in self._folded.items()}
        if self._captures_passes:
            # Some are computed before the step's passes, or kept in tables.
            self._frozen = {name: capture.clone_outputs(network) for name, network in self._frozen.items()}
        student: Any = self.student
        if not self.compile and self.precision != "bf16":
            student = trained(student, x, self.images)
        self._trained = self._compiled(student)
        self._attacked_copy = folded(self.student) if config.attack_bn == "eval" else None
        self._pgd = attacks.PGD(
            student if self._attacked_copy is None else self._attacked_form(self._attacked_copy),
            epsilon=config.epsilon,
            step_size=config.step_size,
            steps=config.steps,
            norm=config.norm,
            precision=config.precision,
            compile=self._compile_attack,
        )
        self._ready = True

    def _attacked_form(self, folded: Folded) -> Callable[..., Any]:
        """What a network is attacked through: torch.compile wants to see its layers."""
        return folded.network if self._compile_attack else folded

    def _compiled(self, network: nn.Module) -> Callable:
        if self._captures_passes:
            return capture.captured_passes(network)
        return compiled(network, dynamic=False) if self.compile else network

    @contextmanager
    def _attacked(self) -> Iterator[None]:
        """The network under attack is up to date, in its mode, and takes no parameter gradients."""
        if self._attacked_copy is not None:
            self._attacked_copy.refresh()
            yield
            return
        training = self.student.training
        self.student.train()
        try:
            with attacks.frozen(self.student):
                yield
        finally:
            self.student.train(training)

    def _autocast(self, x: Tensor) -> torch.autocast:
        return capture.autocast(x, self.precision, cache=not self.compile)


def build_distiller(
    method: Method,
    networks: Mapping[str, nn.Module],
    attack: Attack,
    *,
    labels: Tensor,
    num_classes: int,
    seed: int = 0,
    **options: Any,
) -> Distiller:
    """Prepares `method` for the networks and the data (its heads and banks are drawn) and returns the step.

    Args:
        method, networks, attack, options: as for `Distiller`.
        labels: (M,) int64, of the training set by sample index; -1 for an image without one.
        seed: of what the method draws.

    Raises ValueError: a network that the method needs is missing.
    """
    distiller = Distiller(method, networks, attack, unlabelled=bool((labels < 0).any()), **options)
    student = networks["student"]
    device = device_of(student)
    dims = {name: int(cast(Any, network).feature_dim) for name, network in networks.items()}
    method.prepare(Setup(num_classes, dims, labels.to(device), student, device, seed, networks.get("teacher")))
    method.to(device)
    return distiller
