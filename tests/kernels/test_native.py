"""native: how C++ is built and kept, on a source of one line; and pgd_step in C++ against PyTorch."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from fastrd.kernels.cpu import native
from fastrd.kernels.pgd_step import pgd_step
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

COMPILER = shlex.join(native.compiler())
pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler that takes the kernels")
STEP = {"step_size": 2 / 255, "epsilon": 8 / 255}


def write(sources: Path, answer: int) -> None:
    (sources / "answer.cpp").write_text(f'extern "C" int answer() {{ return {answer}; }}')


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder that libraries are kept in, empty; what is to be compiled is in `cpu` beside it."""
    sources = tmp_path / "cpu"
    sources.mkdir()
    write(sources, 42)
    monkeypatch.setattr(native, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "fastrd"
    native.library.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """A compiler that has a version and otherwise runs `script`, for which the last argument is what to write."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/bash\n[[ ${{@: -1}} == --version ]] && exec {COMPILER} --version\n{script}\n")
    path.chmod(0o755)
    return shlex.quote(str(path))


def test_a_kept_library_is_for_all_users_and_is_built_again_where_it_cannot_be_loaded(kept):
    assert native.library().answer() == 42
    (built,) = kept.iterdir()
    umask = os.umask(0)
    os.umask(umask)
    assert built.stat().st_mode & 0o777 == 0o777 & ~umask
    built.unlink()  # the process has it open
    built.write_bytes(b"cut off")
    native.library.cache_clear()
    assert native.library().answer() == 42


@pytest.mark.parametrize("part", [0.3, 0.6, 0.99])
def test_a_kept_library_that_is_cut_off_is_built_again(part, kept):
    """To load half of one would kill the process."""
    assert native.library().answer() == 42
    (built,) = kept.iterdir()
    whole = built.read_bytes()
    built.unlink()
    built.write_bytes(whole[: int(part * len(whole))])
    native.library.cache_clear()
    assert native.library().answer() == 42 and built.read_bytes().endswith(built.name.encode())


def test_what_a_killed_builder_left_goes_after_an_hour(kept):
    assert native.library().answer() == 42
    (built,) = kept.iterdir()
    built.unlink()
    old, new = (kept / f".{built.name}.{name}" for name in ("old", "new"))
    old.touch(), new.touch()
    os.utime(old, (time.time() - 4000,) * 2)
    native.library.cache_clear()
    assert native.library().answer() == 42
    assert not old.exists() and new.exists()


def test_built_once_and_then_taken_from_the_cache(kept, monkeypatch):
    assert native.library().answer() == 42
    (built,) = kept.iterdir()
    ran, run = [], native._run
    monkeypatch.setattr(native, "_run", lambda command: (ran.append(command[-1]), run(command))[1])
    native.library.cache_clear()  # as in the next process
    assert native.library().answer() == 42
    assert ran == ["--version"] and list(kept.iterdir()) == [built]


@pytest.mark.parametrize(("name", "value"), [("CXX", "false"), ("CXX", "none-such"), ("CXX", "./not"), ("PATH", "")])
def test_no_compiler_no_library(name, value, kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("not").write_bytes(b"\x7fELF a program")
    Path("not").chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(name, value)
    assert native.library() is None and not kept.exists()


def test_a_compiler_that_fails_halfway_leaves_nothing_and_is_named(kept, tmp_path, monkeypatch):
    script = 'echo half > "${@: -1}"; echo "fatal error: it is broken" >&2; exit 1'
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    with pytest.warns(UserWarning, match="cannot compile fastrd's kernels .*: it is broken.*fastrd doctor"):
        assert native.library() is None
    assert not list(kept.iterdir())


@pytest.mark.parametrize("name", [".{}.left", "{}"])
def test_half_a_library_is_never_used(name, kept):
    native.library()
    (built,) = kept.iterdir()
    built.unlink()
    (kept / name.format(built.name)).write_text("half")
    native.library.cache_clear()
    assert native.library().answer() == 42


def test_a_cache_that_cannot_be_written_is_done_without(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cpu" / "answer.cpp"))  # root may write to any folder
    assert native.library().answer() == 42 and not kept.exists()


@pytest.mark.parametrize("home", ["nobody's", "full"])
def test_without_a_home_or_room_in_it_the_kernels_are_the_same(home, kept, monkeypatch):
    if home == "full":
        usage = native.shutil.disk_usage
        full = type("usage", (), {"free": 1000})
        monkeypatch.setattr(native.shutil, "disk_usage", lambda path: full if path == kept else usage(path))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard has ignored
        monkeypatch.setattr(Path, "home", _no_home)
    assert native.library().answer() == 42
    assert not Path("relative").exists()
    if home != "full":
        with pytest.raises(OSError, match="Could not determine home"):
            native.machine.cache()


def test_nowhere_to_build_is_said(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cpu" / "answer.cpp"))
    monkeypatch.setattr(native.tempfile, "TemporaryDirectory", _no_folder)
    with pytest.warns(UserWarning, match=r"cannot be kept anywhere \(no usable folder\); PyTorch's run instead"):
        assert native.library() is None


def _no_home():
    raise RuntimeError("Could not determine home directory.")


def _no_folder():
    raise FileNotFoundError("no usable folder")


@pytest.mark.parametrize("changed", ["source", "header", "flags", "own flags", "compiler", "processor"])
def test_what_it_depends_on_is_in_its_name(changed, kept, tmp_path, monkeypatch):
    native.library()
    if changed == "source":
        write(native.SOURCES, 43)
    elif changed == "header":
        (native.SOURCES / "answer.h").touch()
    elif changed == "flags":
        monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DOTHER"))
    elif changed == "own flags":
        monkeypatch.setenv("FASTRD_CXXFLAGS", "-DOTHER -DANOTHER")
    elif changed == "compiler":
        monkeypatch.setenv("CXX", f"{COMPILER} -DOTHER")
    else:
        monkeypatch.setattr(native.machine, "identity", lambda: "another")
    native.library.cache_clear()
    assert native.library().answer() == (43 if changed == "source" else 42)
    assert len(list(kept.iterdir())) == 2


def test_two_processes_that_build_at_once_both_get_it(kept, tmp_path):
    for part in (native, native.machine):
        shutil.copy(part.__file__, tmp_path / "cpu")
    for name in ("there", "back"):
        os.mkfifo(tmp_path / name)
    meet = "if [[ $FIRST ]]; then echo > there; read < back; else read < there; echo > back; fi"
    waiting = compiler(tmp_path, f"timeout 60 bash -c '{meet}' || exit 1\nexec {COMPILER} \"$@\"")
    command = [sys.executable, "-c", "from cpu import native; print(native.library().answer())"]
    start = partial(subprocess.Popen, command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    processes = [start(env={**os.environ, "CXX": waiting, "FIRST": first}) for first in ("1", "")]
    assert [process.communicate()[0] for process in processes] == ["42\n", "42\n"]
    assert len(list(kept.iterdir())) == 1


def images() -> list[Tensor]:
    """x_adv, gradient, x: near the faces of the ball and of the cube, gradients of both signs and zeros."""
    x = torch.rand(6, 3, 11, 7).mul_(1.2).sub_(0.1).clamp_(0, 1)
    gradient = torch.randn_like(x) * 1e-6
    gradient[gradient.abs() < 3e-7] *= 0
    return [(x + 0.05 * torch.randn_like(x)).clamp_(0, 1), gradient, x]


def assert_a_step_is_pytorchs(x_adv: Tensor, *others: Tensor, inplace: bool = False) -> None:
    options = STEP | {"inplace": inplace}
    expected, out = (
        pgd_step(torch.empty_strided(x_adv.shape, x_adv.stride()).copy_(x_adv), *others, **options, backend=backend)
        for backend in ("torch", "auto")
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True, check_stride=True)
    assert torch.equal(out.signbit()[~out.isnan()], expected.signbit()[~out.isnan()])


@pytest.fixture
def ran(monkeypatch) -> list[tuple]:
    """The arguments of the steps that C++ has taken."""
    steps, call = [], native.call
    monkeypatch.setattr(native, "call", lambda *given: (steps.append(given), call(*given)))
    return steps


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "laid_out",
    [
        pytest.param(Tensor.clone, id="contiguous"),
        pytest.param(lambda t: t.contiguous(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(lambda t: t.permute(3, 1, 0, 2), id="permuted"),
        pytest.param(lambda t: t[::2], id="every other image"),
    ],
)
def test_a_step_is_pytorchs_to_the_bit(laid_out, inplace, ran):
    assert_a_step_is_pytorchs(*map(laid_out, images()), inplace=inplace)
    assert ran


def test_tensors_may_lie_differently_but_not_be_of_another_type(ran):
    x_adv, gradient, x = images()
    assert_a_step_is_pytorchs(x_adv, gradient.double(), x)
    assert not ran
    assert_a_step_is_pytorchs(x_adv, gradient.contiguous(memory_format=torch.channels_last), x)
    assert ran


def test_tensors_without_numbers_are_not_read(ran):
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, 8)
        assert pgd_step(x, x, x, **STEP).shape == x.shape
    assert not ran


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), -0.0, 1e-40])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["x_adv", "gradient", "x"])
def test_special_numbers_go_where_pytorch_sends_them(where, special, ran):
    tensors = images()
    tensors[where].view(-1)[::3] = special
    assert_a_step_is_pytorchs(*tensors)
    assert ran


def test_autograd_notices_a_step_in_place(ran):
    x_adv, gradient, x = images()
    version = x_adv._version
    pgd_step(x_adv, gradient, x, **STEP, inplace=True)
    assert ran and x_adv._version > version


@pytest.mark.parametrize("variable", ["CXX", "FASTRD_CXXFLAGS"])
def test_an_open_quote_in_a_variable_is_said_and_ignored(monkeypatch, variable):
    monkeypatch.setenv(variable, 'g++ "-O3')
    with pytest.warns(UserWarning, match=f"{variable}: got .*No closing quotation.*ignored"):
        assert native._words(variable) == []
