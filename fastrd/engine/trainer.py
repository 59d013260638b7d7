"""The training run: data, networks, step, optimiser, log and checkpoints, resumable at any batch."""

from __future__ import annotations

import copy
import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..attacks import check_settings
from ..core import checkpoint
from ..core.documents import write_state
from ..core.files import check_path
from ..core.fingerprint import fingerprint
from ..core.process_environment import contention
from ..core.toml import differences
from ..core.values import check_integer
from ..core.version import __version__
from ..data import Batch, Dataset, add_extra, derive_seed, load_dataset, make_loader, split_holdout
from ..data.catalog import check_name
from ..evaluation import evaluate, remainder_proportion
from ..models import build_model, classifier, load_teacher, with_features
from ..models.foreign import Factory, adopt, check_network, load_start
from ..models.teacher import CHECK_IMAGES, borrowed, read_weights
from ..recipe import Recipe
from .average import MovingAverage
from .distributed import World, synchronised
from .errors import Interrupted, NonFiniteLoss
from .log import RunLog, check_names
from .process import stop_signals
from .profile import Profiler, peak_flops
from .schedule import learning_rate
from .step import build_distiller

STEP_LINES_PER_EPOCH = 10


@dataclass(frozen=True)
class Trained:
    """What a finished run leaves: its folder, the evaluated student (EMA weights where asked for), best validation."""

    run: Path
    student: nn.Module
    best: dict[str, float]


def load_inputs(
    recipe: Recipe,
    data: Dataset | str | os.PathLike | None,
    teacher: nn.Module | str | os.PathLike | None,
    clean_teacher: nn.Module | str | os.PathLike | None,
    download: bool,
    device: torch.device,
    before: Recipe | None = None,
) -> tuple[Recipe, Dataset, dict[str, nn.Module]]:
    """Returns the recipe with the absolute paths of its files, the data set, and the frozen networks by their roles.

    before: the recipe that the run was started with, where this goes on with one; see `Recipe.located`.
    """
    networks = {"teacher": teacher, "clean_teacher": clean_teacher}
    for name, given in networks.items():
        if given is not None and not isinstance(given, nn.Module):
            section = replace(getattr(recipe, name), source=os.fspath(check_path(**{name: given})))
            recipe = replace(recipe, **{name: section})
    # Checked once more: a path may hold bytes that no recipe, and so no run that goes on, can name.
    recipe = Recipe.stored(recipe.located(before).to_dict(), recipe.name)
    if not isinstance(data, Dataset):
        check_name("data.name", recipe.data.name)
        data = load_dataset(
            recipe.data.name,
            root=None if data is None else check_path(data=data),
            download=download,
            train_limit=recipe.data.train_limit,
            test_limit=recipe.data.test_limit,
            image_size=recipe.data.image_size,
        )
    if recipe.data.extra is not None:
        data = add_extra(data, recipe.data.extra)
    frozen = {}
    small = data.limit(train=CHECK_IMAGES)
    labelled = np.asarray(small.x_train), small.y_train
    for name, given in networks.items():
        section = getattr(recipe, name)
        if isinstance(given, nn.Module):
            given = borrowed(name, given, labelled, data.num_classes)
        elif section.source is None:
            continue
        else:
            options = {"dataset": data.name, **section.layout(), **data.network_shape}
            try:
                given = load_teacher(section.source, check=labelled, **options)
            except (FileNotFoundError, ValueError) as error:
                if os.path.exists(section.source):
                    raise
                option = f"--{name.replace('_', '-')}"
                raise FileNotFoundError(f"{name}: {error}; {option} CKPT says where it is now") from None
        frozen[name] = with_features(given).to(device).eval().requires_grad_(False)
    return recipe, data, frozen


def _check_batch_of_one(student: nn.Module, image: Tensor, batch_size: int) -> None:
    """Raises ValueError where a network cannot train on one image alone, before a run folder is made."""
    try:
        with torch.no_grad():
            copy.deepcopy(student).train()(image)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"training.batch_size: got {batch_size}, which leaves a batch of one image, of which batch normalisation "
            "has no statistics; accepted: a size that leaves two or more"
        ) from None


def build_student(
    recipe: Recipe,
    data: Dataset,
    given: nn.Module | Factory | None,
    device: torch.device,
    memory_format: torch.memory_format,
) -> tuple[Recipe, Any]:
    """Returns the recipe that names the student, and the student on its device, its weights a function of the seed.

    Raises ValueError: a network that cannot be trained on this data (`check_network`), or weights that do not fit it.
    """
    section, shape = recipe.student, data.network_shape
    torch.manual_seed(derive_seed(recipe.seed, "init"))
    if given is not None:
        student: Any = adopt(given, shape)
        recipe = replace(recipe, student=replace(section, arch=student.spec["arch"], options={}, repeat_grey=False))
    else:
        grey: dict[str, Any] = {"repeat_grey": True} if section.repeat_grey else {}
        student = build_model(section.arch, **shape, **grey, **section.options)
    if section.weights is not None:
        load_start(student, read_weights(section.weights, student), section.weights)
    student = student.to(device, memory_format=memory_format)
    example = torch.rand(2, *data.image_shape, generator=torch.Generator().manual_seed(0)).to(device)
    check_network(student, example.contiguous(memory_format=memory_format), data.num_classes)
    return recipe, student


class _ValidationStopped(Exception):
    """A signal came: a validation can take longer than the sender of the signal waits."""


class Trainer:
    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        data: Dataset,
        frozen: dict[str, nn.Module],
        device: torch.device,
        world: World,
        *,
        student: nn.Module | Factory | None = None,
        trackers: Sequence[str] = (),
        profile: bool,
    ) -> None:
        self.trackers = trackers
        self.run, self.device, self.world = run, device, world
        self.class_names = data.class_names
        self.profiler = None
        if profile and world.is_main:
            precision = recipe.training.precision
            peaks = [peak_flops(device, name) for name in (precision, recipe.attack.precision or precision)]
            self.profiler = Profiler(run, device, *peaks)
            self.example = torch.zeros(1, *data.image_shape, device=device)
        training = recipe.training
        memory_format = torch.channels_last if training.channels_last else torch.contiguous_format

        kept, held_out = split_holdout(data, recipe.data.holdout, seed=0)
        augment = data.augmentation if recipe.data.augment else None
        images, labels = data.training_images(kept)
        make = partial(
            make_loader,
            recipe.data.loader,
            images,
            labels,
            batch_size=training.batch_size,
            device=device,
            seed=recipe.seed,
            augment=augment,
            channels_last=training.channels_last,
        )
        extra: Any = {"extra": len(images) - len(kept), "extra_fraction": recipe.data.extra_fraction}
        self.loader = make(drop_last=training.drop_last, rank=world.rank, world_size=world.size, **extra)
        last = self.loader.last_batch
        largest = last if len(self.loader) == 1 else training.batch_size
        if last % world.size:
            problem = f"{world.size} processes cannot share the last {last} images evenly"
            raise ValueError(f"training.drop_last: got false, and {problem}; accepted: true here")
        check_settings(
            norm=recipe.attack.norm,
            shape=data.image_shape,
            epsilon=recipe.attack.epsilon,
            step_size=recipe.attack.step_size,
        )
        self.held_out = (np.asarray(data.x_train[held_out]), data.y_train[held_out])

        recipe, self.student = build_student(recipe, data, student, device, memory_format)
        self.recipe = recipe
        start = {} if recipe.student.weights is None else {"weights": fingerprint(self.student)}
        if training.sync_bn and world.size > 1:
            self.student = synchronised(self.student)
        if last == world.size and not (training.sync_bn and world.size > 1):
            _check_batch_of_one(self.student, torch.zeros(1, *data.image_shape, device=device), training.batch_size)
        networks = {name: module.to(memory_format=memory_format) for name, module in frozen.items()}
        compile = device.type == "cuda" and not recipe.tricks.awp if training.compile is None else training.compile
        self.distiller = build_distiller(
            recipe.build_method(),
            {**networks, "student": self.student},
            recipe.attack,
            labels=self.loader.labels,
            num_classes=data.num_classes,
            seed=recipe.seed,
            precision=training.precision,
            compile=compile,
            extra_clean_bn_pass=training.extra_clean_bn_pass,
            student_passes=training.student_passes,
            tricks=recipe.tricks,
            images=largest // world.size,
            world=world,
            phase=self._phase,
        )
        self.method = self.distiller.method
        if augment is None:
            # Alike in every epoch, so what the frozen networks make of the images is computed once.
            self.distiller.tabulate(batch.x for batch in make(shuffle=False, drop_last=False).epoch(1))
        self.parameters = [*self.student.parameters(), *self.method.parameters()]
        optimizer = recipe.optimizer
        self.optimizer = torch.optim.SGD(
            self._groups(),
            lr=optimizer.lr,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            nesterov=optimizer.nesterov,
            fused=True,  # one launch on a GPU
        )
        if optimizer.momentum:
            # Of all at once: the fused step starts none beside others, and takes each to lie in memory as its weights.
            for parameter in self.parameters:
                if parameter.requires_grad:
                    self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.ema = None if training.ema is None else MovingAverage(self.student, training.ema)
        teachers = {name: fingerprint(module) for name, module in sorted(frozen.items())}
        self.identity = {"data": data.fingerprint, **start, **teachers}
        self.epoch, self.batch = 1, 0  # the next batch to train on
        self.sums: dict[str, float] = {}
        self.spent = (0.0, 0.0)  # seconds of this epoch, and of waiting in it, before the run was resumed
        self.best: dict[str, float] = {}
        self.resumed = False

    @property
    def evaluated(self) -> nn.Module:
        return self.ema.network if self.ema is not None else self.student

    def _groups(self) -> list[Any]:
        """What the optimiser gets: the last layer apart where it has a learning rate of its own."""
        optimizer = self.recipe.optimizer
        if optimizer.head_lr is None:
            return self.parameters
        head = {id(p): p for p in classifier(self.student).parameters()}
        rest = [p for p in self.parameters if id(p) not in head]
        return [{"params": rest}, {"params": [*head.values()], "scale": optimizer.head_lr / optimizer.lr}]

    def fit(self, *, progress: bool) -> Trained:
        epochs, batches = self.recipe.schedule.epochs, len(self.loader)
        images = self.loader.images_in(0, batches)
        self.log = RunLog(
            self.run if self.world.is_main else None,
            after=(self.epoch, self.batch) if self.resumed else None,
            trackers=self.trackers,
            recipe=self.recipe.to_dict(),
        )
        bar = tqdm(
            total=epochs * images,
            initial=(self.epoch - 1) * images + self.loader.images_in(0, self.batch),
            desc=self.recipe.name,
            unit="img",
            unit_scale=True,
            disable=not progress,
            dynamic_ncols=True,
        )
        try:
            with stop_signals() as stop, bar:
                if not self.resumed:
                    self.save()
                if self.world.is_main:
                    write_state(self.run, finished=False, identity=self.identity)
                while self.epoch <= epochs and not self._stops_early():
                    self._train_epoch(bar, stop)
                    self._end_epoch(bar, stop)
        finally:
            self.log.close()
            if self.profiler is not None:
                self.profiler.close()
        if self.world.is_main:
            if not (self.run / "best.pt").exists():
                self._save_best(self.epoch - 1, {})
            write_state(self.run, finished=True, identity=self.identity)
        self.world.barrier()
        return Trained(self.run, self.evaluated.eval(), self.best)

    def _train_epoch(self, bar: tqdm, stop: list[int]) -> None:
        batches = len(self.loader)
        every = max(1, batches // STEP_LINES_PER_EPOCH)
        pending: dict[str, Tensor] = {}
        unread, since = 0, time.perf_counter()
        self.epoch_started, self.stalled_before = since - self.spent[0], self.loader.stall_seconds - self.spent[1]
        for batch in self._measured(self.loader.epoch(self.epoch, start=self.batch)):
            losses, metrics = self.step(batch)
            contention.look(torch.get_num_threads())
            self.batch += 1
            unread += 1
            # Values stay on the device until a log line needs them: a step has no synchronisation.
            for name, value in {**losses, **metrics}.items():
                pending[name] = pending[name] + value if name in pending else value
            due, stopping = self.batch % every == 0 or self.batch == batches, bool(stop)
            if self.world.size > 1:
                # All processes must stop after the same batch; they agree on it where they wait for each other anyway.
                stopping = due and self.world.any(stopping, self.device)
            if due or stopping:
                self._read(pending, unread, set(losses), time.perf_counter() - since, bar)
                pending, unread, since = {}, 0, time.perf_counter()
            if stopping:
                self._check_state()
                self._stop(stop, self._seconds())

    def _stop(self, stop: list[int], spent: tuple[float, float]) -> NoReturn:
        self.spent = spent
        self.save()
        raise Interrupted(stop[0] if stop else signal.SIGTERM, self.run)

    def step(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Trains on one batch: named losses and metrics, on the device."""
        schedule = self.recipe.schedule
        rate = learning_rate(schedule, self.recipe.optimizer.lr, self.epoch, self.batch, len(self.loader))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        generator = torch.Generator(self.device)
        generator.manual_seed(derive_seed(self.recipe.seed, "attack", self.epoch, self.batch))
        self.optimizer.zero_grad(set_to_none=True)
        losses, metrics = self.distiller(
            *batch, epoch=self.epoch, epochs=schedule.epochs, batch=self.batch, generator=generator
        )
        if self.device.type == "cpu" and self.world.size == 1:  # else at the next log line, which all processes share
            self._check_finite({f"loss term {name}": value for name, value in losses.items()})
        with self._phase("optimiser"):
            self._update()
        return losses, metrics

    def _update(self) -> None:
        self.world.average(p.grad for p in self.parameters if p.grad is not None)
        if self.recipe.training.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.training.clip_grad)
        self.optimizer.step()
        # Running means and variances: the processes then attack and save the same network.
        self.world.average(buffer for buffer in self.student.buffers() if buffer.is_floating_point())
        if self.ema is not None:
            self.ema.update(self.student)

    def _phase(self, name: str) -> AbstractContextManager:
        return nullcontext() if self.profiler is None else self.profiler.phase(name)

    def _measured(self, batches: Any) -> Iterator[Batch]:
        """The batches, with the wait for each counted as the phase "data"."""
        if self.profiler is None:
            yield from batches
            return
        with closing(batches):
            while True:
                with self._phase("data"):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch
                self.profiler.step()

    def _check_finite(self, values: dict[str, Any]) -> None:
        if bad := [name for name, value in values.items() if not bool(torch.isfinite(torch.as_tensor(value)))]:
            self._fail(", ".join(bad))

    def _fail(self, what: str) -> NoReturn:
        if self.world.is_main:
            checkpoint.write(self.run / "failed.pt", self._payload())
        raise NonFiniteLoss(
            f"{what} is not finite in epoch {self.epoch}, batch {self.batch + 1}; last.pt keeps "
            "the last good state, failed.pt this one. A lower optimizer.lr or training.clip_grad = 1.0 usually helps."
        )

    def _read(self, pending: dict[str, Tensor], steps: int, names: set[str], seconds: float, bar: tqdm) -> None:
        sums = self.world.mean(torch.stack([v.float() for v in pending.values()]))
        values = dict(zip(pending, sums.tolist(), strict=True))
        check_names(values)
        self._check_finite({f"loss term {name}": values[name] for name in names})
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        means = {name: value / steps for name, value in values.items()}
        loss = sum(means[name] for name in names)
        self.sums["loss"] = self.sums.get("loss", 0.0) + loss * steps
        images = self.loader.images_in(self.batch - steps, self.batch)
        self.log.write(
            "step",
            (self.epoch - 1) * len(self.loader) + self.batch,
            epoch=self.epoch,
            step=self.batch,
            loss=loss,
            **means,
            images_per_s=images / seconds,
        )
        bar.update(images)
        bar.set_postfix_str(f"epoch {self.epoch}/{self.recipe.schedule.epochs} loss {loss:.3f}", refresh=False)

    def _end_epoch(self, bar: tqdm, stop: list[int]) -> None:
        self._check_state()
        epochs, batches = self.recipe.schedule.epochs, len(self.loader)
        seconds, stalled = spent = self._seconds()
        means = {name: value / batches for name, value in self.sums.items()}
        lr = learning_rate(self.recipe.schedule, self.recipe.optimizer.lr, self.epoch, batches - 1, batches)
        due = self.epoch % self.recipe.validation.every == 0 or self.epoch == epochs
        scores = {}
        if due and len(self.held_out[0]) and self.world.is_main:
            try:
                scores = self._validate(stop)
            except _ValidationStopped:
                self._stop(stop, spent)  # after the last batch: the run that goes on validates anew
        memory = {}
        if self.device.type == "cuda":
            memory["memory_mb"] = torch.cuda.max_memory_allocated(self.device) / 1e6  # the most so far
        self.log.write(
            "epoch",
            self.epoch * batches,
            epoch=self.epoch,
            lr=lr,
            seconds=seconds,
            stall_seconds=stalled,  # of them, waiting for batches
            images_per_s=self.loader.images_in(0, batches) / seconds,
            **memory,
            **means,
            **scores,
        )
        chosen_by = "val_pgd" if "val_pgd" in scores else "val_clean"
        if scores and scores[chosen_by] > self.best.get(chosen_by, -1.0):
            self.best = {"epoch": self.epoch, **scores}
            self._save_best(self.epoch, scores)
        if self.profiler is not None:
            flops = self.distiller.flops(self.example, self.epoch)
            images = self.loader.images_in(0, batches) // self.world.size
            bar.write(f"epoch {self.epoch}\n{self.profiler.epoch(images, flops)}")
        self.epoch, self.batch, self.sums, self.spent = self.epoch + 1, 0, {}, (0.0, 0.0)
        self.save()

    def _seconds(self) -> tuple[float, float]:
        """Returns how long this epoch has taken so far, and what of it was waiting for batches."""
        return time.perf_counter() - self.epoch_started, self.loader.stall_seconds - self.stalled_before

    def _stops_early(self) -> bool:
        """Whether robust accuracy on the held-out images has not risen for as many epochs as the recipe allows."""
        patience, every = self.recipe.tricks.early_stopping, self.recipe.validation.every
        measured = (self.epoch - 1) // every * every  # the last epoch that was
        stops = patience is not None and bool(self.best) and measured - self.best["epoch"] >= patience
        return self.world.any(stops, self.device)  # the first process alone validates

    def _validate(self, stop: list[int]) -> dict[str, float]:
        def look(_: object) -> None:
            # Of several processes the others do not validate: they could not stop here too.
            if stop and self.world.size == 1:
                raise _ValidationStopped

        steps, attack = self.recipe.validation.steps, self.recipe.attack
        names = {"val_clean": "clean"} | ({"val_pgd": f"pgd{steps}"} if steps else {})
        ball: dict[str, Any] = {"norm": attack.norm, "epsilon": attack.epsilon}
        options = {**ball, "step_size": attack.step_size, "device": self.device, "progress": look}
        results = evaluate(self.evaluated, *self.held_out, attacks=tuple(names.values()), **options)
        scores = {name: results[attack_name]["accuracy"] for name, attack_name in names.items()}
        if self.recipe.validation.remainder:
            scores["remainder"] = remainder_proportion(self.evaluated, self.held_out[0], **ball)
        return scores

    def _model(self, network: nn.Module) -> dict[str, Any]:
        return {"spec": self.student.spec, "state": network.state_dict(), "class_names": list(self.class_names)}

    def _payload(self) -> dict[str, Any]:
        payload = {
            "recipe": self.recipe.to_dict(),
            "model": self._model(self.student),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": {"epoch": self.epoch, "batch": self.batch},
            "sums": self.sums,
            "spent": list(self.spent),
            "best": self.best,
            "identity": self.identity,
            "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
            "threads": torch.get_num_threads(),
            "versions": {"fastrd": __version__, "torch": str(torch.__version__)},
        }
        if self.ema is not None:
            payload["ema"] = self.ema.network.state_dict()
            payload["ema_updates"] = torch.tensor(self.ema.updates)
        return payload

    def save(self) -> None:
        if self.world.is_main:
            checkpoint.save_last(self.run, self._payload())

    def _check_state(self) -> None:
        """Raises NonFiniteLoss where a weight is not finite, which a loss shows one batch later."""
        states = {"the network": self.student.state_dict(), "the method": self.method.state_dict()}
        momenta = self.optimizer.state.values()
        states["the optimiser"] = {f"momentum {i}": entry.get("momentum_buffer") for i, entry in enumerate(momenta)}
        for owner, state in states.items():
            for name, tensor in state.items():
                if tensor is not None and not checkpoint.finite(tensor):
                    self._fail(f"{name} of {owner}")

    def _save_best(self, epoch: int, scores: dict[str, float]) -> None:
        model = self._model(self.evaluated)
        payload = {"recipe": self.recipe.to_dict(), "model": model, "epoch": epoch, "scores": scores}
        checkpoint.write(self.run / "best.pt", payload)

    def _check_same(self, what: str, stored: Any, own: Any) -> None:
        if changed := differences(stored, own):
            lines = ", ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())
            raise ValueError(f"resume: the {what} is not the one of {self.run}: {lines}")

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint. Raises ValueError: it is of another recipe, data, teacher or student."""
        restoring = partial(checkpoint.restoring, state)
        with restoring("recipe", "identity", "threads", "model"):
            before = Recipe.stored(state["recipe"])  # keys it did not know yet have their defaults
        self._check_same("recipe", before.identity(), self.recipe.identity())
        for name in state["identity"].keys() | self.identity.keys():
            if state["identity"].get(name) != self.identity.get(name):
                raise ValueError(f"resume: {name} is not the one {self.run} was started with (contents differ)")
        epochs, batches = self.recipe.schedule.epochs, len(self.loader)
        with restoring("position", "sums", "best"):
            self.epoch, self.batch = state["position"]["epoch"], state["position"]["batch"]
            check_integer(least=1, most=epochs + 1, epoch=self.epoch)
            check_integer(least=0, most=batches if self.epoch <= epochs else 0, batch=self.batch)
            self.sums, self.best = dict(state["sums"]), dict(state["best"])
            check_names(self.sums.keys() - {"loss"})
            self.spent = tuple(state.get("spent", (0.0, 0.0)))  # older runs did not keep it
            if self.best and self.best["epoch"] >= self.epoch:
                raise ValueError(f"best.epoch: got {self.best['epoch']}; accepted: one before epoch {self.epoch}")
        if self.epoch <= epochs and state["threads"] != torch.get_num_threads():
            warnings.warn(
                f"resuming with {torch.get_num_threads()} threads a run made with {state['threads']}: on the CPU, sums "
                "may round differently (OMP_NUM_THREADS sets the number)",
                stacklevel=3,
            )
        self._check_same("student", state["model"]["spec"], self.student.spec)
        steps = (self.epoch - 1) * batches + self.batch
        with restoring("model"):
            checkpoint.load(self.student, state["model"]["state"])
        with restoring("method"):
            checkpoint.load(self.method, state["method"])
        with restoring("optimizer"):
            self._restore_momenta(state["optimizer"]["state"], steps)
        if self.ema is not None:
            with restoring("ema"):
                checkpoint.load(self.ema.network, state["ema"])
            with restoring("ema_updates"):
                self.ema.updates = int(state["ema_updates"])
                check_integer(least=steps, most=steps, ema_updates=self.ema.updates)
        with restoring("rng"):
            torch.set_rng_state(state["rng"]["cpu"])
            if state["rng"]["cuda"] and len(state["rng"]["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        self.resumed = True

    def _restore_momenta(self, stored: dict[int, dict[str, Tensor | None]], steps: int) -> None:
        """Gives the optimiser the momenta of a checkpoint; its options are the recipe's."""
        found = {place: entry.get("momentum_buffer") for place, entry in stored.items()}
        momenta = {place: momentum for place, momentum in found.items() if momentum is not None}
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        states = {place: self.optimizer.state.get(p, {}) for place, p in enumerate(parameters)}
        own = {place: state["momentum_buffer"] for place, state in states.items() if state}
        # Single ones may be missing: older runs kept none of a layer that no loss had reached.
        if steps and own and not momenta:
            raise ValueError(f"state: got no momentum after {steps} steps; accepted: that of what is trained")
        for place, momentum in momenta.items():
            if place not in own:
                raise ValueError(f"state.{place}: got a momentum; accepted: none, as nothing there has one")
            if not steps and momentum.any():
                raise ValueError(f"state.{place}: got a momentum before the first step; accepted: none")
            checkpoint.check_like(f"state.{place}", momentum, own[place])
            own[place].copy_(momentum)
