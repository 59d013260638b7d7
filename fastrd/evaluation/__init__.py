"""Robust accuracy from clean images to AutoAttack, how a student follows its teacher, what its features are worth."""

from .alignment import cka, gradient_alignment, pointwise_distance, remainder_proportion
from .measures import measure
from .record import write_evaluation
from .robustness import (
    AdversarialExamples,
    Curve,
    Evaluation,
    adversarial_examples,
    check_attacks,
    evaluate,
    robustness_curve,
)
from .runner import Progress, Share
from .transfer import linear_probe

__all__ = [
    "AdversarialExamples",
    "Curve",
    "Evaluation",
    "Progress",
    "Share",
    "adversarial_examples",
    "check_attacks",
    "cka",
    "evaluate",
    "gradient_alignment",
    "linear_probe",
    "measure",
    "pointwise_distance",
    "remainder_proportion",
    "robustness_curve",
    "write_evaluation",
]
