"""The yardstick: robust distillation as its papers' code writes it. Kept plain, and not to be made faster."""

from .trainer import GACD, Reference, loader

__all__ = ["GACD", "Reference", "loader"]
