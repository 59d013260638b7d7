"""Per-sample Kullback-Leibler divergence with gradients through both sides."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.reference import xlog_ratio


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over classes, in at least float32."""
    return F.log_softmax(logits / temperature, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))


def kl(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(p/t) || softmax(q/t)) per sample: (N, C), (N, C) -> (N,). No t^2 factor; both sides get gradients.

    `fastrd.losses.distillation_kl` is the form with a constant teacher; this one serves attacks through two
    networks (AdaAD) and self-distillation (TRADES, MART, IAD), where both sides are live.
    """
    log_p, log_q = log_softmax(p_logits, temperature), log_softmax(q_logits, temperature)
    return xlog_ratio(log_p, log_q).sum(dim=1)
