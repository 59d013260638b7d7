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
    return [*find_packages(include=["fastrd", "fastrd.*"]), "fastrd.kernels", *below]


def long_description() -> str:
    """The README, for package indexes; empty in a tree without one."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


ONNX = ["onnx", "onnxruntime", "onnxscript"]
DOCS = ["mkdocs-material", "mkdocstrings[python]"]

setup(
    name="fastrd",
    version=version(),
    description="Fast, faithful adversarial robust distillation",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=packages(),
    package_dir={"fastrd": "fastrd", "fastrd.kernels": "kernels"},
    package_data={
        "fastrd": ["py.typed", "**/*.toml", "**/*.j2", "**/*.css", "**/*.js"],
        "fastrd.kernels": ["cpu/*.cpp", "cpu/*.h"],
    },
    entry_points={"console_scripts": ["fastrd = fastrd.cli:run"]},
    # All that `fastrd demo` needs, evaluation and report included. The last five are small beside torch's gigabytes,
    # so that one `pip install` does the whole job. SciPy gives Student's t; scikit-learn requires it anyway.
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "triton; platform_system == 'Linux'",
        "numpy",
        "tqdm",
        "safetensors",
        "tomli; python_version < '3.11'",
        "tomli-w",
        "pyautoattack",
        "scikit-learn",
        "scipy",
        "matplotlib",
        "jinja2",
    ],
    extras_require={
        # NVML, which counts the energy that a run takes on a GPU.
        "gpu": ["nvidia-ml-py"],
        # Never in the default install: without the OpenCV and TurboJPEG headers its build fails and takes the
        # whole pip command down with it. It imports Pillow without declaring it. `make ffcv` does without OpenCV.
        "ffcv": ["ffcv", "pillow"],
        # `fastrd export --format onnx`.
        "onnx": ONNX,
        "docs": DOCS,
        # accelerate runs a guide of docs/ (33 MB with all it needs, a third less than lightning).
        "test": [
            *DOCS,
            *ONNX,
            "accelerate",
            "hypothesis",
            "mypy",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",
            "timm",
        ],
    },
)
