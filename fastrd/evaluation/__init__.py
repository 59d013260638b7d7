"""Robust accuracy from clean images to AutoAttack, and how a student's gradients follow its teacher's."""

from .alignment import gradient_alignment, remainder_proportion
from .record import write_evaluation
from .robustness import (
    AdversarialExamples,
    Evaluation,
    Progress,
    adversarial_examples,
    check_attacks,
    evaluate,
    robustness_curve,
)

__all__ = [
    "AdversarialExamples",
    "Evaluation",
    "Progress",
    "adversarial_examples",
    "check_attacks",
    "evaluate",
    "gradient_alignment",
    "remainder_proportion",
    "robustness_curve",
    "write_evaluation",
]
