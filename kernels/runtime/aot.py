"""Kernels compiled ahead of time, without their GPU: machine code, and what it costs in registers, stack and shared
memory.

A module with kernels offers `launches(target) -> list[Launch]`: each kernel at the block sizes it ships with on that
target, best taken from its own launchers by `recorded`. Compiling needs a process in which Triton does not interpret,
so `resources` starts one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .jit import OPTIONS, Kernel, recording
from .machine_code import loop_instructions

MODULES = ("info_nce", "nce_bank", "distillation", "pgd_step", "augment")

_TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
TARGETS = tuple(_TARGETS)

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory one program may take."""

MATRIX_INSTRUCTIONS = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
"""The target's own matrix instruction; sm_90 and sm_100 can also run sm_80's."""


@dataclass(frozen=True)
class Launch:
    """One kernel at shipped block sizes, on a named problem."""

    kernel: Kernel
    problem: str
    """E.g. "N = M = 32768, D = 128, bf16"; `kernel` and `problem` together name the launch."""
    signature: dict[str, str]
    """Type of each runtime argument: "*bf16", "*fp32", "*i64", "i32", "fp32"."""
    constants: dict[str, Any]
    """Each constexpr argument."""
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    """Integer arguments known to be multiples of 16; pointers always are."""
    bytes: int = 0
    """Bytes of the problem this launch must move between memory and chip."""
    flops: int = 0
    """Operations of the problem."""
    tiles: int = 0
    """Trips through the main loop, of all programs; 0: not counted."""
    flops_in: str = "fp32"
    """Unit they run on: "bf16", "tf32" or "tf32x3" (matrix units), or "fp32"."""


@dataclass(frozen=True)
class Resources:
    """What one launch takes on one target."""

    kernel: str
    problem: str
    target: str
    registers: int
    stack: int
    """Bytes per thread in local memory: above 0 means that registers were spilled."""
    shared: int
    """Bytes per program."""
    threads: int
    matrix: list[str] = field(default_factory=list)
    """The matrix instructions in the code."""
    bytes: int = 0
    flops: int = 0
    flops_in: str = "fp32"
    tiles: int = 0
    instructions: int | None = None
    """That a warp issues for a tile; None where they are not counted."""


SHORT_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
"""Triton's, of types."""


def recorded(run: Callable[[], object], target: str, problem: str, work: dict[str, tuple]) -> list[Launch]:
    """What `run()`, on tensors of the device "meta", would launch on `target`; each kernel and set of constants once.

    work: bytes, flops, their unit and, where they are counted, tiles (see Launch) by kernel name.
    """
    with recording(target) as tape:
        run()
    found: dict[str, Launch] = {}
    for kernel, arguments in tape.calls:
        options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
        constants, types, divisible = {}, {}, []
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                types[name] = f"*{SHORT_NAMES[value.dtype]}"
            elif value is None or "constexpr" in kernel.function.__annotations__.get(name, "") or value == 1:
                constants[name] = value
            elif isinstance(value, float):
                types[name] = "fp32"
            else:
                types[name] = "i32"
                divisible += [name] if value % 16 == 0 else []
        name = kernel.__name__.strip("_")
        key = f"{name} {types} {constants}"
        if key in found:
            continue
        first = next((other.constants for other in found.values() if kernel is other.kernel), constants)
        differs = [f"{k} = {v}" for k, v in constants.items() if first.get(k, v) != v]
        bytes_, flops, unit, *tiles = work.get(name, (0, 0, "fp32"))
        found[key] = Launch(
            kernel,
            ", ".join([problem, *differs]),
            types,
            constants,
            divisible=tuple(divisible),
            bytes=bytes_,
            flops=flops,
            flops_in=unit,
            tiles=tiles[0] if tiles else 0,
            **options,
        )
    return list(found.values())


def specialised(launch: Launch) -> Iterator[Launch]:
    """The launch with all its integers 1, which Triton makes constants, with all multiples of 16, and with neither."""
    integers = {name: 1 for name, kind in launch.signature.items() if kind == "i32"}
    types = {name: kind for name, kind in launch.signature.items() if name not in integers}
    yield replace(launch, signature=types, constants=launch.constants | integers, divisible=())
    yield replace(launch, divisible=tuple(integers))
    yield replace(launch, divisible=())


def resources(
    target: str,
    kernel: str = "",
    *,
    module: str | None = None,
    pythonpath: str | None = None,
    specialisations: bool = False,
) -> list[Resources]:
    """Compile every shipped launch whose name contains `kernel` for `target`, in a fresh process.

    Args:
        target: one of TARGETS.
        kernel: part of "module.kernel problem".
        module: one of MODULES; None: all.
        pythonpath: a folder put before the installed packages, e.g. one with another Triton.
        specialisations: only lower each launch in all its `specialised` forms; returns nothing.

    Raises:
        ValueError: an unknown target.
        RuntimeError: the compiler's output, where compilation failed.
    """
    if target not in _TARGETS:
        raise ValueError(f"target: got {target!r}; accepted: {', '.join(TARGETS)}")
    modules = MODULES if module is None else (module,)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if pythonpath is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (pythonpath, environment.get("PYTHONPATH"))))
    process = subprocess.run(
        [sys.executable, "-m", __spec__.name, target, "--kernel", kernel, "--module", *modules]
        + ["--specialisations"] * specialisations,
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    if process.returncode:
        raise RuntimeError(f"compiling {kernel or 'the kernels'} for {target} failed:\n{process.stderr[-4000:]}")
    return [Resources(**row) for row in json.loads(process.stdout)]


def lower(launch: Launch, target: str) -> None:
    """Take one launch through Triton's front end, where Python's objects and types end; a fraction of a second."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    source, gpu, options = _source(launch, target)
    backend, context = make_backend(gpu), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(options)
    source.make_ir(gpu, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


def _source(launch: Launch, target: str) -> tuple[Any, Any, dict[str, Any]]:
    """Triton's source and target objects, and its options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = launch.kernel.jit
    names = function.arg_names
    types = {**launch.signature, **dict.fromkeys(launch.constants, "constexpr")}
    if set(types) != set(names):
        raise ValueError(
            f"launch of {_name(launch)}: its arguments differ from the kernel's in {set(types) ^ set(names)}"
        )
    source = ASTSource(
        fn=function,
        signature={name: types[name] for name in names},
        constexprs=launch.constants,
        attrs={
            (position,): [["tt.divisibility", 16]]
            for position, name in enumerate(names)
            if types[name].startswith("*") or name in launch.divisible
        },
    )
    options = {**OPTIONS, "num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return source, GPUTarget(*_TARGETS[target]), options


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile one launch in this process."""
    import triton

    source, gpu, options = _source(launch, target)
    compiled = triton.compile(source, target=gpu, options=options)
    registers, stack, instructions = _amd(compiled) if target.startswith("gfx") else _nvidia(compiled)
    code = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    return Resources(
        kernel=_name(launch),
        problem=launch.problem,
        target=target,
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        threads=launch.num_warps * _TARGETS[target][2],
        matrix=[name for name in MATRIX_INSTRUCTIONS.values() if name in code],
        bytes=launch.bytes,
        flops=launch.flops,
        flops_in=launch.flops_in,
        tiles=launch.tiles,
        instructions=instructions if launch.tiles else None,
    )


def _name(launch: Launch) -> str:
    function = launch.kernel.function
    module = function.__module__.rpartition(".")[2].removesuffix("_triton")
    return f"{module}.{function.__name__.strip('_')}"


def _nvidia(compiled: Any) -> tuple[int, int, int | None]:
    """Registers, stack and instructions of the main loop."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report, code = (
            subprocess.run([tool, wanted, file.name], capture_output=True, text=True, check=True).stdout
            for wanted in ("--dump-resource-usage", "--dump-sass")
        )
    return _number(r"REG:(\d+)", report), _number(r"STACK:(\d+)", report), loop_instructions(code)


def _amd(compiled: Any) -> tuple[int, int, int | None]:
    code = compiled.asm["amdgcn"]
    registers = _number(r"\.vgpr_count:\s*(\d+)", code)
    return registers, _number(r"\.private_segment_fixed_size:\s*(\d+)", code), None


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"{pattern} is not in what the compiler reports")
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the shipped kernels and print their resources as JSON.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--kernel", default="", help='part of "module.kernel problem"')
    parser.add_argument("--module", nargs="+", choices=MODULES, default=MODULES)
    parser.add_argument("--specialisations", action="store_true", help="lower these instead, and print nothing")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.module:
        module = importlib.import_module(f"..{name}", __package__)
        for launch in module.launches(arguments.target):
            if arguments.kernel not in f"{_name(launch)} {launch.problem}":
                continue
            if arguments.specialisations:
                for form in specialised(launch):
                    lower(form, arguments.target)
            else:
                rows.append(asdict(compile_launch(launch, arguments.target)))
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
