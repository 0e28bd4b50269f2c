"""`pip install .` installs the package `ats`. `requirements.txt` lists the versions it was tested with."""

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
    # `ats.configs` holds the YAML files of configs/ and the weights of the Digits and CIFAR-10 configs, so that the
    # commands find `--cfg ImageNet/DeiT_S.yaml` in any folder.
    packages=[*find_packages(include=["ats", "ats.*"]), "ats.configs"],
    package_dir={"ats.configs": "configs"},
    package_data={
        "ats": ["py.typed"],
        "ats.benchmark": ["suites/*.yaml"],
        "ats.study": ["*.yaml", "*.md"],
        "ats.visualize": ["page.html"],
        "ats.configs": ["*/*.yaml", "*/weights/*.safetensors"],
    },
    entry_points={
        "console_scripts": [
            "ats-run = ats.cli.run_net:main",
            "ats-benchmark = ats.cli.benchmark:main",
            "ats-visualize = ats.cli.visualize:main",
            "ats-calibrate = ats.cli.calibrate:main",
            "ats-export = ats.cli.export:main",
        ]
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "timm>=1.0.21",
        "av>=18",
        "fvcore>=0.1.5.post20221221",
        "simplejson",
        "tabulate",
        "pyyaml",
        "tqdm",
        "tensorboard",
        "numba",
        "numpy",
        "pillow",
        "safetensors",
    ],
    extras_require={
        "demo": ["scikit-learn", "matplotlib"],
        "hf": ["transformers>=5.23"],
        "export": ["onnx", "onnxruntime", "onnxscript", "openvino"],
        "dev": [
            "transformers>=5.23",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "openvino",
            "scikit-learn",
            "matplotlib",
            "scipy",
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "playwright",
            "ruff",
            "setuptools>=70.1",
        ],
    },
)
