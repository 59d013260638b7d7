"""Views: which network outputs a training step needs, each computed once.

A view is one network seen at one image. Losses declare their views; `compute` runs them. Frozen networks run in
eval mode, where samples do not interact, so their images share one batch on a GPU. The student trains with batch
normalisation, where they do: it gets one pass per image, in the order of `IMAGES` or in a declared one, so that
running statistics are updated in a defined order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.values import check_option

IMAGES = ("adv", "plus", "clean", "mirror", "reflection")
"""x' ; x + beta d where beta != 1 ; x ; x - gamma d ; x - d for a regulariser of the student; with d = x' - x."""


class View(NamedTuple):
    network: str  # "student", "teacher" or "clean_teacher"
    image: str  # one of IMAGES


class Output(NamedTuple):
    logits: Tensor  # (N, classes)
    features: Tensor  # (N, D), penultimate


def student(*images: str) -> frozenset[View]:
    """Returns views of the student at these images. Raises ValueError for a name that is not in `IMAGES`."""
    return _at("student", images)


def teacher(*images: str) -> frozenset[View]:
    """Likewise, of the teacher."""
    return _at("teacher", images)


def clean_teacher(*images: str) -> frozenset[View]:
    """Likewise, of the accurate clean model."""
    return _at("clean_teacher", images)


def _at(network: str, images: Iterable[str]) -> frozenset[View]:
    for image in images:
        check_option("image", image, IMAGES)
    return frozenset(View(network, image) for image in images)


def compute(
    views: Iterable[View],
    networks: Mapping[str, Callable[..., Any]],
    images: Mapping[str, Tensor],
    *,
    known: Mapping[View, Output] | None = None,
    student_passes: Sequence[str] | None = None,
) -> dict[View, Output]:
    """Returns the outputs of all `views`, each computed once; `known` ones are reused.

    `student_passes` names images in the order in which the student runs on them, those of its views among them;
    default: those alone, in the order of `IMAGES`. A pass that is no view, or repeats one, runs without gradient, only
    for what it does to batch-normalisation statistics: in train mode a repeated pass has the outputs of the first.
    """
    outputs = dict(known or {})
    wanted = set(views) - outputs.keys()
    for name in sorted({view.network for view in wanted} - {"student"}):
        outputs.update(_frozen_views(name, networks[name], [i for i in IMAGES if View(name, i) in wanted], images))
    if student_passes is None:
        student_passes = [image for image in IMAGES if View("student", image) in wanted]
    for image in student_passes:
        view = View("student", image)
        if view in wanted and view not in outputs:
            outputs[view] = Output(*networks["student"](images[image], features=True))
        else:
            with torch.no_grad():
                networks["student"](images[image])
    return outputs


def _one_batch(x: Tensor) -> bool:
    """On a CPU a batch of all images outgrows the caches: one after the other is faster there."""
    return x.is_cuda


@torch.no_grad()
def _frozen_views(
    name: str, network: Callable[..., Any], names: list[str], images: Mapping[str, Tensor]
) -> dict[View, Output]:
    if not _one_batch(images[names[0]]):
        return {View(name, image): Output(*network(images[image], features=True)) for image in names}
    sizes = [images[image].shape[0] for image in names]
    logits, features = network(torch.cat([images[image] for image in names]), features=True)
    return {
        View(name, image): Output(*parts)
        for image, *parts in zip(names, logits.split(sizes), features.split(sizes), strict=True)
    }
