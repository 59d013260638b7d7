"""Fused losses: Triton kernels on the GPU, chunked PyTorch elsewhere, and the plain oracle both must agree with.

Imports torch; Triton only when a kernel is first launched. `fastrd.losses` is the public door.
"""
