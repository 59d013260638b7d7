"""A trained student as one file for others to run: safetensors, ONNX or torch.export, re-read and compared."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .core import checkpoint as checkpoints
from .core.arguments import check_option
from .core.files import atomic_path, atomic_write, check_path
from .core.plugins import load_plugins
from .models import FeatureExtractor, Folded, load_teacher
from .models.base import Conv2d
from .models.foreign import Factory
from .report.card import NAME as CARD
from .workflow import load_student

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
EXAMPLES = 4  # images that the file is compared on
CLASS_NAMES = "class_names"
# Largest difference of logits, relative to the largest logit: float32 sums of some hundred layers in another order.
TOLERANCE = 1e4 * torch.finfo(torch.float32).eps


class Exported(NamedTuple):
    """path: of the file. card: of the model card beside it. difference: largest of the logits; None: not compared."""

    path: Path
    card: Path
    difference: float | None
    class_names: tuple[str, ...]
    input_shape: tuple[str, ...]


def export(
    run: str | os.PathLike,
    *,
    format: str = "safetensors",
    out: str | os.PathLike | None = None,
    checkpoint: str = "last",
    fold: bool = False,
    dynamic_batch: bool = False,
    student: nn.Module | Factory | None = None,
    plugins: Sequence[str | os.PathLike] = (),
) -> Exported:
    """Writes the student of a run, with its normalisation and class names, and a model card beside it.

    The file takes images, float32 (N, C, H, W) in [0, 1], as "images" and gives logits (N, classes) as "logits". It is
    read again and compared with the student on random images before it gets its name: an ONNX file by onnxruntime where
    that is installed, else it is checked for validity alone.

    Args:
        run: run folder, or a checkpoint of it.
        format: "safetensors" (weights; `load_teacher` reads them), "onnx", "torch-export" (`torch.export.load`).
        out: the file; default RUN/student with the suffix of the format.
        checkpoint: "last" or "best", of a run folder.
        fold: fold batch normalisation into the convolutions before it; not for safetensors.
        dynamic_batch: any number of images, else exactly one; safetensors have no batch.
        student, plugins: see `fastrd.train`.

    Raises:
        FileNotFoundError, ValueError: nothing there, nothing that can be used, or the file does not give the logits of
            the student; nothing is left behind.
        ImportError: onnx and onnxscript are needed and not installed.
    """
    check_option("format", format, tuple(SUFFIXES))
    if format == "safetensors" and (fold or dynamic_batch):
        name = "fold" if fold else "dynamic_batch"
        raise ValueError(f"{name}: got True for safetensors; accepted: for onnx and torch-export")
    load_plugins(plugins)
    network = load_student(run, checkpoint=checkpoint, student=student).requires_grad_(False)
    source = Path(run) / f"{checkpoint}.pt" if Path(run).is_dir() else Path(run)
    model = checkpoints.read(source)["model"]
    spec = model["spec"]
    names = tuple(model.get(CLASS_NAMES) or map(str, range(spec["num_classes"])))
    path = check_path(out=out) if out is not None else source.parent / f"student{SUFFIXES[format]}"
    if path.suffix != SUFFIXES[format]:
        raise ValueError(f"out: got {str(path)!r}; accepted: a file name that ends in {SUFFIXES[format]}")
    size = (spec["in_channels"], spec["image_size"], spec["image_size"])
    images = torch.rand(EXAMPLES, *size, generator=torch.Generator().manual_seed(0))
    facts = {CLASS_NAMES: json.dumps(names), "fastrd_spec": json.dumps(spec)}
    with torch.no_grad():
        expected = network(images)
    with atomic_path(path) as temporary:
        difference: float | None
        if format == "safetensors":
            difference = _safetensors(temporary, network, facts, images, expected, student)
        else:
            write = {"onnx": _onnx, "torch-export": _torch_export}[format]
            plain = _Logits(_plain(network, images, fold)).eval()
            difference = write(temporary, plain, facts, images, expected, dynamic_batch)
        scale = expected.abs().max().item()
        if difference is not None and not difference <= TOLERANCE * scale:
            raise ValueError(
                f"{path}: its logits differ by {difference:.3g} from the student's, at most {scale:.3g}; not written"
            )
    batch = "N" if dynamic_batch or format == "safetensors" else "1"
    shape = (batch, *map(str, size))
    return Exported(path, _write_card(path, source, format, names, shape, difference, fold), difference, names, shape)


class _Logits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class _PlainConv2d(Conv2d):
    """In operators that every runtime knows."""

    def forward(self, x: Tensor, *, add: Tensor | None = None, relu: bool = False) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        y = y if add is None else y + add
        return F.relu(y) if relu else y


def _plain(network: nn.Module, images: Tensor, fold: bool) -> nn.Module:
    """A copy without our own operators and without hooks, folded on request."""
    copied = Folded(network, images).network if fold else copy.deepcopy(network)
    for module in copied.modules():
        if type(module) is Conv2d:
            module.__class__ = _PlainConv2d
        if isinstance(module, FeatureExtractor):
            module.head._forward_pre_hooks.clear()  # it records features, which nobody asks for here
    return copied


def _safetensors(
    path: Path,
    network: nn.Module,
    facts: dict[str, str],
    images: Tensor,
    expected: Tensor,
    student: nn.Module | Factory | None,
) -> float:
    from safetensors.torch import save_file

    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, path, metadata=facts)
    spec = json.loads(facts["fastrd_spec"])
    shape = {key: spec[key] for key in ("num_classes", "in_channels", "image_size")}
    # The reader goes by the suffix, which a temporary file does not have.
    link = path.with_suffix(".safetensors")
    os.link(path, link)
    try:
        again = load_teacher(link, module=student, **shape)
    finally:
        link.unlink()
    with torch.no_grad():
        return (again(images) - expected).abs().max().item()


def _shapes(dynamic_batch: bool) -> Any:
    return {"images": {0: torch.export.Dim("batch")}} if dynamic_batch else None


def _torch_export(
    path: Path, model: nn.Module, facts: dict[str, str], images: Tensor, expected: Tensor, dynamic_batch: bool
) -> float:
    example = images if dynamic_batch else images[:1]
    program = torch.export.export(model, (example,), dynamic_shapes=_shapes(dynamic_batch))
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files={f"{name}.json": text for name, text in facts.items()})
    with open(path, "rb") as file:
        again = torch.export.load(file).module()
    with torch.no_grad():
        found = torch.cat([again(part) for part in (images.split([1, 3]) if dynamic_batch else images.split(1))])
    return (found - expected).abs().max().item()


def _onnx(
    path: Path, model: nn.Module, facts: dict[str, str], images: Tensor, expected: Tensor, dynamic_batch: bool
) -> float | None:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"format: onnx needs the packages onnx and onnxscript ({error}): pip install onnx onnxscript"
        ) from None
    example = images if dynamic_batch else images[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            model,
            (example,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=_shapes(dynamic_batch),
            dynamo=True,
            verbose=False,
        )
    proto = program.model_proto
    for key, text in facts.items():
        proto.metadata_props.add(key=key, value=text)
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    parts = images.split([1, 3]) if dynamic_batch else images.split(1)
    found = torch.cat([torch.from_numpy(session.run(None, {"images": part.numpy()})[0]) for part in parts])
    return (found - expected).abs().max().item()


def _write_card(
    path: Path,
    source: Path,
    format: str,
    names: Sequence[str],
    shape: Sequence[str],
    difference: float | None,
    fold: bool,
) -> Path:
    """The card of the run with what the file is, beside it."""
    card = source.parent / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {path.stem}\n"
    checked = "not compared: onnxruntime is not installed" if difference is None else f"{difference:.3g}"
    lines = [
        "",
        "## Exported",
        "",
        f"- **File:** `{path.name}`, {format}, from `{source.name}`",
        f"- **Input:** `images`, float32 ({', '.join(shape)}) in [0, 1]; its normalisation is inside",
        f"- **Output:** `logits` ({shape[0]}, {len(names)})",
        f"- **Classes:** {', '.join(names)}",
        f"- **Batch normalisation:** {'folded into the convolutions' if fold else 'as trained'}",
        f"- **Largest difference of logits when read again:** {checked}",
    ]
    return atomic_write(path.with_name(f"{path.name}.md"), text + "\n".join(lines) + "\n")
