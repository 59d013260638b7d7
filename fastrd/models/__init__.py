"""Networks, and the loading of other people's."""

from .base import FeatureExtractor, Network, classifier, with_features
from .folded import Folded
from .registry import ARCHITECTURES, NORMALIZATION, build_model, network
from .teacher import load_teacher

__all__ = [
    "ARCHITECTURES",
    "NORMALIZATION",
    "FeatureExtractor",
    "Folded",
    "Network",
    "build_model",
    "classifier",
    "load_teacher",
    "network",
    "with_features",
]
