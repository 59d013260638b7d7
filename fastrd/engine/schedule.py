"""Learning rate as a pure function of the place in the run: nothing to save, nothing to restore wrongly."""

from __future__ import annotations

import math

from ..recipe import Schedule


def learning_rate(schedule: Schedule, base: float, epoch: int, batch: int, batches: int) -> float:
    """Returns the rate for batch `batch` (from 0) of `batches` in epoch `epoch` (from 1).

    multistep: constant within an epoch, times gamma once `milestone` epochs are finished.
    cosine: from `base` to 0 over the run, per batch, after a linear warm-up.
    """
    if schedule.kind == "multistep":
        return base * schedule.gamma ** sum(epoch > milestone for milestone in schedule.milestones)
    done = epoch - 1 + batch / batches
    if done < schedule.warmup_epochs:
        return base * min(1.0, (done + 1 / batches) / schedule.warmup_epochs)
    span = max(schedule.epochs - schedule.warmup_epochs, 1e-9)
    return base * 0.5 * (1 + math.cos(math.pi * (done - schedule.warmup_epochs) / span))
