"""The student of a run: built from the recipe or given, checked once, with the weights it starts from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..core.seeding import derive_seed
from ..data import Dataset
from ..models import build_model
from ..models.foreign import Factory, adopt, check_network, load_start
from ..models.teacher import read_weights
from ..recipe import Recipe


def build_student(
    recipe: Recipe,
    data: Dataset,
    given: nn.Module | Factory | None,
    device: torch.device,
    memory_format: torch.memory_format,
) -> tuple[Recipe, Any]:
    """Returns the student on its device, and the recipe that names it. Its weights are a function of the recipe's seed.

    Raises:
        ValueError: a network that cannot be trained on this data, or weights that do not fit it; see `check_network`
            and `load_start`.
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
