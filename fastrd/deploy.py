"""A trained student as one file for others to run: safetensors, ONNX or torch.export, re-read and compared."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .core import checkpoint as checkpoints
from .core.files import atomic_path, atomic_write, check_path, check_writable
from .core.kinds import check_kinds
from .core.plugins import load_plugins
from .core.values import check_option
from .evaluation.inputs import Logits
from .models import FeatureExtractor, Folded, load_teacher
from .models.base import Conv2d
from .models.foreign import Factory
from .report.card import NAME as CARD
from .report.tables import escaped
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


@check_kinds
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
    network: Any = load_student(run, checkpoint=checkpoint, student=student).requires_grad_(False)
    source = Path(run) / f"{checkpoint}.pt" if Path(run).is_dir() else Path(run)
    spec: dict[str, Any] = network.spec  # of the file, with what it leaves to defaults
    names = tuple(checkpoints.read(source)["model"].get(CLASS_NAMES) or map(str, range(spec["num_classes"])))
    if len(names) != spec["num_classes"]:
        raise ValueError(f"{source}: model.{CLASS_NAMES}: got {len(names)}; accepted: {spec['num_classes']}")
    if spec["image_size"] is None:
        raise ValueError(f"{source}: model.spec.image_size: missing; accepted: a student that knows its images' size")
    path = check_path(out=out) if out is not None else source.parent / f"student{SUFFIXES[format]}"
    if path.suffix != SUFFIXES[format]:
        raise ValueError(f"out: got {str(path)!r}; accepted: a file name that ends in {SUFFIXES[format]}")
    card = path.with_name(f"{path.name}.md")
    check_writable(path, card)
    size = (spec["in_channels"], spec["image_size"], spec["image_size"])
    images = torch.rand(EXAMPLES, *size, generator=torch.Generator().manual_seed(0))
    facts = {CLASS_NAMES: json.dumps(names), "fastrd_spec": json.dumps(spec)}
    any_batch = dynamic_batch or format == "safetensors"
    difference = None
    with atomic_path(path) as temporary:
        if format == "safetensors":
            read_again: Logits | None = _safetensors(temporary, network, facts, student)
        else:
            write = {"onnx": _onnx, "torch-export": _torch_export}[format]
            plain = _Plain(network, images, fold).eval()
            shapes = {"images": {0: torch.export.Dim("batch")}} if dynamic_batch else None
            read_again = write(temporary, plain, facts, images if dynamic_batch else images[:1], shapes)
        if read_again is not None:
            with torch.no_grad():
                found = torch.cat([read_again(part) for part in images.split([1, EXAMPLES - 1] if any_batch else 1)])
                expected = network(images)
            difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
            if not difference <= TOLERANCE * scale:
                text = f"its logits differ by {difference:.3g} from the student's, at most {scale:.3g}; not written"
                raise ValueError(f"{path}: {text}")
    done = Exported(path, card, difference, names, ("N" if any_batch else "1", *map(str, size)))
    _write_card(done, source, format, fold)
    return done


class _PlainConv2d(Conv2d):
    """The convolution in operators that every runtime knows."""

    def forward(self, x: Tensor, *, add: Tensor | None = None, relu: bool = False) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        y = y if add is None else y + add
        return F.relu(y) if relu else y


class _Plain(nn.Module):
    """Logits of a copy without our own operators and without hooks, folded on request."""

    def __init__(self, network: nn.Module, images: Tensor, fold: bool) -> None:
        super().__init__()
        self.network = Folded(network, images).network if fold else copy.deepcopy(network)
        for module in self.network.modules():
            if type(module) is Conv2d:
                module.__class__ = _PlainConv2d
            if isinstance(module, FeatureExtractor):
                module.head._forward_pre_hooks.clear()  # it records features, which nobody asks for here

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


def _safetensors(
    path: Path, network: nn.Module, facts: dict[str, str], student: nn.Module | Factory | None
) -> nn.Module:
    from safetensors.torch import save

    # Written here: the library has an error of its own for a full disk.
    path.write_bytes(save({name: value.contiguous() for name, value in network.state_dict().items()}, metadata=facts))
    spec = json.loads(facts["fastrd_spec"])
    shape = {key: spec[key] for key in ("num_classes", "in_channels", "image_size")}
    # The reader goes by the suffix, which a temporary file does not have. Not every file system has hard links.
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "student.safetensors"
        link.symlink_to(path.resolve())
        return load_teacher(link, module=student, **shape)


def _torch_export(path: Path, model: nn.Module, facts: dict[str, str], example: Tensor, shapes: Any) -> Logits:
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    buffer = io.BytesIO()  # where the disk is full torch would end the process
    torch.export.save(program, buffer, extra_files={f"{name}.json": text for name, text in facts.items()})
    path.write_bytes(buffer.getbuffer())
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def _onnx(path: Path, model: nn.Module, facts: dict[str, str], example: Tensor, shapes: Any) -> Logits | None:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        text = f"format: onnx needs the packages onnx and onnxscript ({error}): pip install onnx onnxscript"
        raise ImportError(text) from None
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(model, (example,), **names, dynamic_shapes=shapes, dynamo=True, verbose=False)
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
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_card(done: Exported, source: Path, format: str, fold: bool) -> None:
    """Writes the card of the run, and what the file is, beside the file."""
    card = source.parent / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {escaped(done.path.stem)}\n"
    compared = "not compared: onnxruntime is not installed" if done.difference is None else f"{done.difference:.3g}"
    lines = [
        "",
        "## Exported",
        "",
        f"- **File:** `{done.path.name}`, {format}, from `{source.name}`",
        f"- **Input:** `images`, float32 ({', '.join(done.input_shape)}) in [0, 1]; its normalisation is inside",
        f"- **Output:** `logits` ({done.input_shape[0]}, {len(done.class_names)})",
        f"- **Classes:** {', '.join(map(escaped, done.class_names))}",
        f"- **Batch normalisation:** {'folded into the convolutions' if fold else 'as trained'}",
        f"- **Largest difference of logits when read again:** {compared}",
    ]
    atomic_write(done.card, text + "\n".join(lines) + "\n")
