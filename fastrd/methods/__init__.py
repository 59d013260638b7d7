"""Published methods as base losses and add-ons; importing this package registers all of them."""
# ruff: noqa: F401

from . import adaad, adversarial_training, akd, ard, direct, gacd, iad, igdm, mtard, rslad, smoothness, vfd
from .base import ADDONS, BASES, Method, Setup, Step, Term, addon, base

__all__ = ["ADDONS", "BASES", "Method", "Setup", "Step", "Term", "addon", "base"]
