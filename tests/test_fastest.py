"""Networks run in their fastest form, which is measured once, by a clock that these tests hold."""

from __future__ import annotations

import copy
import json
from unittest.mock import Mock

import pytest
import torch
from fastrd.kernels.cpu import machine, native

from fastrd import Recipe, train
from fastrd.models import Folded, build_model, fastest


@pytest.fixture
def forms(monkeypatch, tmp_path):
    """Forms that take the seconds they are told; they note when they run."""
    monkeypatch.delenv(fastest.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    now, runs = [0.0], []
    monkeypatch.setattr(fastest.time, "perf_counter", lambda: now[0])

    def make(**seconds):
        def form(name):
            def run(x):
                assert x.is_leaf
                now[0] += seconds[name]
                runs.append(name)
                return 2 * x

            return run

        return {name: form(name) for name in seconds}

    make.runs = runs
    return make


def linear(outputs=2):
    return torch.nn.Linear(2, outputs).requires_grad_(False)


NETWORK = linear()
X = torch.zeros(3, 2)


def test_the_fastest_form_is_measured_once_for_each_problem(forms):
    given = forms(chain=0.03, layers=0.01, pytorch=0.02)
    assert fastest.fastest(NETWORK, given, X) == "layers"
    assert {name: forms.runs.count(name) for name in given} == dict.fromkeys(given, 1 + fastest.ROUNDS)
    forms.runs.clear()
    assert fastest.fastest(linear(), given, X) == "layers"
    assert forms.runs == []
    fastest.fastest(NETWORK, given, torch.zeros(4, 2))
    assert forms.runs == [], "3 and 4 images are one problem"
    others = [
        (linear(3), X),
        (NETWORK, X[:2]),
        (NETWORK, X.double()),
        (NETWORK, X.requires_grad_()),
    ]
    for network, x in others:
        assert fastest.fastest(network, given, x) == "layers"
        assert forms.runs, "another problem is measured anew"
        forms.runs.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fastest.fastest(NETWORK, given, X)
    assert forms.runs


def test_the_form_of_a_smaller_first_batch_is_that_of_the_full_one(forms):
    """A run that goes on at its last, partial batch takes the form that it began with."""
    given, few = forms(layers=0.1, pytorch=0.2), torch.zeros(3, 2)
    fastest.fastest(NETWORK, given, torch.zeros(40, 2))
    forms.runs.clear()
    assert fastest.fastest(NETWORK, given, few, images=40) == "layers"
    assert forms.runs == [], "one problem"
    fastest.fastest(NETWORK, given, few)
    assert forms.runs


def test_a_run_chooses_forms_for_full_batches(monkeypatch, toy_arrays, tmp_path):
    sizes = []

    def choose(network, forms, x, images=None):
        sizes.append(images)
        return next(iter(forms))

    monkeypatch.setattr(fastest, "fastest", choose)
    monkeypatch.setattr("fastrd.models.folded.fastest", choose)
    recipe = {"name": "a", "base": {"name": "pgd_at"}, "student": {"arch": "cnn", "options": {"width": 16}}}
    recipe |= {"data": {"name": str(toy_arrays), "holdout": 0}, "training": {"batch_size": 150, "drop_last": False}}
    recipe |= {"attack": {"steps": 1}, "schedule": {"epochs": 1, "milestones": []}}
    train(Recipe.from_dict(recipe), out=tmp_path / "run", device="cpu", progress=False)
    assert sizes and set(sizes) == {150}


def test_slow_forms_are_run_twice(forms):
    given = forms(layers=fastest.SECONDS, pytorch=9 * fastest.SECONDS)
    assert fastest.fastest(NETWORK, given, X) == "layers"
    assert forms.runs == 2 * ["layers", "pytorch"]


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"a": 1}', 3, {"layers": "?", "pytorch": 1}])
def test_what_was_kept_is_measured_again_where_it_cannot_be_read(forms, tmp_path, damage):
    given = forms(layers=0.2, pytorch=0.1)
    fastest.fastest(NETWORK, given, X)
    (file,) = (tmp_path / "fastrd").glob("forms-*.json")
    if isinstance(damage, str):
        file.write_text(damage)
    else:
        file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), damage)))
    forms.runs.clear()
    assert fastest.fastest(NETWORK, given, X) == "pytorch"
    assert forms.runs


def test_where_nothing_can_be_kept_a_resumed_run_takes_the_form_it_began_with(forms, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fastest.fastest(NETWORK, forms(layers=0.2, pytorch=0.1), X) == "layers"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fastest, "atomic_write", Mock(side_effect=OSError(28, "No space left on device")))
    assert fastest.fastest(NETWORK, forms(layers=0.2, pytorch=0.1), X) == "layers"


def test_what_another_process_kept_meanwhile_stands(forms, monkeypatch):
    slower = forms(layers=0.1, pytorch=0.2)

    def measured(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(fastest, "_measured", measure)
            fastest.fastest(NETWORK, slower, X)  # the other process
        return {"layers": 2.0, "pytorch": 1.0}

    measure = fastest._measured
    monkeypatch.setattr(fastest, "_measured", measured)
    assert fastest.fastest(NETWORK, slower, X) == "layers"


def test_the_environment_decides(forms, monkeypatch):
    given = forms(compiled=0.3, layers=0.1, pytorch=0.2)
    for named, chosen in (("pytorch", "pytorch"), ("chain", "compiled")):
        monkeypatch.setenv(fastest.VARIABLE, named)
        assert fastest.fastest(NETWORK, given, X) == chosen
    assert forms.runs == []
    monkeypatch.setenv(fastest.VARIABLE, "pytorhc")
    with pytest.raises(ValueError, match=r"FASTRD_FORM: got 'pytorhc'; accepted: chain, compiled, layers, pytorch.*"):
        fastest.fastest(NETWORK, given, X)


def test_where_there_is_nothing_to_choose_or_to_run_nothing_is_measured(forms):
    assert fastest.fastest(NETWORK, forms(pytorch=1.0), X) == "pytorch"
    assert fastest.fastest(NETWORK, forms(layers=1.0, pytorch=0.5), X[:0]) == "layers"
    assert forms.runs == []


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler that takes the kernels")
@pytest.mark.parametrize(("arch", "side"), [("cnn", 16), ("cnn", 8), ("mobilenet_v2", 16), ("preact_resnet18", 16)])
def test_all_forms_are_the_same_function(arch, side, monkeypatch):
    options = {"width": 16} if arch == "cnn" else {}
    model = build_model(arch, num_classes=3, **options).to(memory_format=torch.channels_last)
    x = torch.rand(2, 3, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    folded = Folded(model, x[:2].detach())
    forms = folded._forms(x)
    assert [*forms] == ["chain", "layers", "pytorch"]
    z = x.detach().double().requires_grad_()
    exact = copy.deepcopy(folded.network).double()(z)
    exact = exact, torch.autograd.grad(exact.sum(), z)[0]
    for name in forms:
        monkeypatch.setenv(fastest.VARIABLE, name)
        logits = Folded(model, x[:2].detach())(x)
        found = logits, torch.autograd.grad(logits.sum(), x)[0]
        for value, reference in zip(found, exact, strict=True):
            assert (value - reference).norm() <= 1e-4 * reference.norm(), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [*folded._forms(x)] == (["chain"] if torch.bfloat16 in folded.chains else []) + ["pytorch"]
    assert [*folded._forms(x.double())] == ["pytorch"]


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler that takes the kernels")
@pytest.mark.parametrize("form", ["layers", "pytorch"])
def test_a_student_is_left_as_it_was_and_trains_in_the_fastest_form(form, monkeypatch, tmp_path):
    monkeypatch.delenv(fastest.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    network = build_model("cnn", num_classes=3, width=16).to(memory_format=torch.channels_last).train()
    network.bn2.eval()
    before, modes = copy.deepcopy(network.state_dict()), [m.training for m in network.modules()]
    x = torch.rand(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    measured, seen = fastest._measured, []

    def rigged(*args):
        assert not any(m.training for m in args[0].modules())
        seen.append(measured(*args))
        return {name: float(name != form) for name in seen[0]}

    monkeypatch.setattr(fastest, "_measured", rigged)
    with torch.no_grad():
        chosen = fastest.trained(network, x)
    assert seen, "it is measured"
    assert (chosen is network) == (form == "layers")
    assert modes == [m.training for m in network.modules()]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    logits, _ = chosen(x, features=True)
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert any(
        "weights' gradients" in line for line in (next(tmp_path.glob("fastrd/forms-*"))).read_text().splitlines()
    )


def test_what_a_processor_can_do_is_read_from_its_flags(monkeypatch):
    text = "flags\t\t: fpu fma avx2 avx512f avx512bw avx512dq avx512vl\nmodel name: avx512_bf16 amx_tile amx_bf16"
    monkeypatch.setattr(machine, "identity", lambda: text)
    found = machine.features.__wrapped__()
    assert found == ("AVX2", "AVX-512")
    assert "no AVX512-BF16 and no AMX" in machine.describe(found)
    monkeypatch.setattr(machine, "identity", lambda: "arm")
    assert machine.describe(machine.features.__wrapped__()) == "nothing known of it"
    assert "AMX" in machine.describe(("AVX2", "AMX")) and "slower" not in machine.describe(("AVX2", "AMX"))
