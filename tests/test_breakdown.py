"""Where a benchmark says the time goes: kinds by the names that PyTorch, Triton and cuDNN give, and their seconds."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from fastrd.kernels import distillation, info_nce, nce_bank, pgd_step
from torch.profiler import DeviceType

from bench.breakdown import REST, RUNS, breakdown, kind

NAMES = {
    "Memcpy DtoD (Device -> Device)": "copies",
    "void cudnn::ops::nchwToNhwcKernel<float, float, float, false, true>": "copies",
    "void cudnn::bn_fw_tr_1C11_singleread": "batch norm",
    "aten::native_batch_norm_backward": "batch norm",
    "triton_red_fused__native_batch_norm_legit_functional_3": "batch norm",
    "triton_poi_fused_add_relu_threshold_backward_5": "compiled pointwise work",
    "## Call CompiledFxGraph fxxn2gyuf2 ##": "compiled pointwise work",
    "sm90_xmma_fprop_implicit_gemm_f32f32_tf32f32": "convolutions, matrix products",
    "nvjet_tst_128x64_64x6_1x2_h_bz_NNT": "convolutions, matrix products",
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_s1688wgrad_optimized>": "convolutions, matrix products",
    "_RunBackward": "convolutions, matrix products",
    "fastrd::conv2d_weight_gradient": "convolutions, matrix products",
    "aten::addmm": "convolutions, matrix products",
    "fastrd::nce_bank": "losses, banks, attack updates, crops",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedSgd>": "weight update",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": REST,
    "aten::threshold_backward": REST,
}


@pytest.mark.parametrize("name", NAMES)
def test_kinds(name):
    assert kind(name) == NAMES[name]


def test_our_kernels_are_known_by_their_names():
    target = "sm_90"
    launched = {
        launch.kernel.__name__
        for module in (distillation, info_nce, nce_bank, pgd_step)
        for launch in module.launches(target)
    }
    assert len(launched) > 6
    assert {kind(name) for name in launched} == {"losses, banks, attack updates, crops"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="names operators of the CPU")
def test_what_the_profiler_sees_is_sorted_into_kinds():
    x = torch.randn(256, 256)  # convolutions and sums copy on some processors, with some numbers of threads
    spent = breakdown(lambda: (x @ x, x.exp()))
    assert list(spent) == ["convolutions, matrix products", REST] and min(spent.values()) > 0


@pytest.mark.parametrize("gpu", [False, True])
def test_seconds_are_of_one_run_and_of_the_device(monkeypatch, gpu):
    """On a GPU the host's calls and the ranges that people name are no work of the device."""

    def event(name, device, seconds, annotation=False):
        return SimpleNamespace(
            name=name,
            device_type=device,
            is_user_annotation=annotation,
            self_cpu_time_total=1e6 * seconds,
            self_device_time_total=2e6 * seconds,
        )

    events = [
        event("aten::mm", DeviceType.CPU, 3.0),
        event("attack", DeviceType.CPU, 30.0, annotation=True),
        event("gemm", DeviceType.CUDA, 0.6),
        event("sum", DeviceType.CUDA, 6.0),
        event("attack", DeviceType.CUDA, 60.0, annotation=True),
    ]
    runs = []
    trace = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr("bench.breakdown.profile", lambda activities: contextlib.nullcontext(trace))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    expected = {REST: 4.0, "convolutions, matrix products": 0.4} if gpu else {"convolutions, matrix products": 1.0}
    assert breakdown(lambda: runs.append(1)) == pytest.approx(expected)
    assert len(runs) == RUNS == 3
