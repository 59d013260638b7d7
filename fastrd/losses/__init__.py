"""Losses of robust distillation, alone or in any trainer: functions, and nn.Module forms with the same options.

Shared conventions. Inputs are floating point; half precision is computed in float32 (also under autocast), float64
stays float64; the loss is at least float32. `weight` (N,) multiplies the per-sample losses and never gets a gradient.
Row and class indices are checked on the CPU; on a GPU nothing is copied to the host and no value is inspected, so all
of it can be compiled, captured or distributed. Rows of features without a direction (norm up to 2**-20, as of dead
ReLUs) get no gradient where they are normalised. In every divergence 0 log 0 = 0: classes may be masked with -inf.
Not in `gradient_matching`, which subtracts logits: the difference of two masked ones is NaN.
`backend`: "auto" takes the Triton kernels on CUDA, C++ on a CPU that has a compiler, and PyTorch elsewhere; "triton"
and "torch" insist. PyTorch means the plain equations for losses of logits, and for contrastive ones tiles with a
gradient of their own, parts of which are C++ on a CPU.
"""

from .contrastive import ContrastiveDistillation
from .functional import (
    FusedLosses,
    class_table,
    distillation_kl,
    feature_alignment,
    fused_objective,
    gradient_matching,
    info_nce,
    nce_bank,
    sample_negatives,
    update_bank,
)
from .modules import DistillationKL, FeatureAlignment, GradientMatching, InfoNCE

__all__ = [
    "ContrastiveDistillation",
    "DistillationKL",
    "FeatureAlignment",
    "FusedLosses",
    "GradientMatching",
    "InfoNCE",
    "class_table",
    "distillation_kl",
    "feature_alignment",
    "fused_objective",
    "gradient_matching",
    "info_nce",
    "nce_bank",
    "sample_negatives",
    "update_bank",
]
