"""`pip install .` gives the package `ats`; `requirements.txt` holds the versions it was tested with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "ats" / "__init__.py").read_text()).group(1)

setup(
    name="adaptive-token-sampling",
    version=VERSION,
    description="Adaptive Token Sampling for efficient vision transformers (ECCV 2022)",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["ats", "ats.*"]),
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "timm>=1.0.20",
        "av>=18",
        "fvcore>=0.1.5.post20221221",
        "simplejson",
        "tabulate",
        "pyyaml",
        "tqdm",
        "tensorboard",
        "numpy",
        "pillow",
        "safetensors",
    ],
    extras_require={
        "demo": ["scikit-learn", "matplotlib"],
        "export": ["onnx", "onnxruntime", "onnxscript"],
        "dev": [
            "scikit-learn",
            "matplotlib",
            "scipy",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
        ],
    },
)
