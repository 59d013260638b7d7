"""Packaging. A setup.py rather than a [project] table because of one mapping: the top-level folder `kernels/`
is installed as `fastrd.kernels`, so that no package called `kernels` ever lands in site-packages."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """Read, not imported: an import could want what is about to be installed."""
    source = (ROOT / "fastrd" / "core" / "version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', source, re.MULTILINE).group(1)


def packages() -> list:
    below = [f"fastrd.kernels.{name}" for name in find_packages("kernels")]
    return find_packages(include=["fastrd", "fastrd.*"]) + ["fastrd.kernels", *below]


setup(
    name="fastrd",
    version=version(),
    description="Fast, faithful adversarial robust distillation",
    python_requires=">=3.10",
    packages=packages(),
    package_dir={"fastrd": "fastrd", "fastrd.kernels": "kernels"},
    package_data={
        "fastrd": ["**/*.toml", "**/*.j2", "**/*.css", "**/*.js"],
        "fastrd.kernels": ["cpu/*.cpp", "cpu/*.h"],
    },
    entry_points={"console_scripts": ["fastrd = fastrd.cli:main"]},
    # All that `fastrd demo` needs, evaluation and report included: the last four are small beside torch's
    # gigabytes, and one `pip install` that does the whole job is worth more than extras to be known about.
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "triton; platform_system == 'Linux'",
        "numpy",
        "tqdm",
        "safetensors",
        "tomli; python_version < '3.11'",
        "pyautoattack",
        "scikit-learn",
        "matplotlib",
        "jinja2",
    ],
    extras_require={
        # Never in the default install: without the OpenCV and TurboJPEG headers its build fails and takes the
        # whole pip command down with it. It imports Pillow without declaring it. `make ffcv` does without OpenCV.
        "ffcv": ["ffcv", "pillow"],
        # accelerate runs a guide of docs/ (33 MB with all it needs, a third less than lightning).
        "test": [
            "accelerate",
            "hypothesis",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",
        ],
    },
)
