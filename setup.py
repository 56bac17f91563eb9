"""Metadata of hpcinfer; the version stands in `hpcinfer/__init__.py`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version():
    """Return the version as text, without importing the package."""
    source = (ROOT / "hpcinfer" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', source, re.MULTILINE).group(1)


setup(
    name="hpcinfer",
    version=read_version(),
    description="Inference of large language models as an MPI program",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The hpcinfer developers",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    packages=find_packages(include=["hpcinfer", "hpcinfer.*"]),
    package_data={"hpcinfer": ["py.typed"], "hpcinfer.ops.cuda": ["*.cu", "*.cuh"]},
    python_requires=">=3.11",
    install_requires=[
        "numpy>=1.26",
        "ml_dtypes>=0.4",
        "h5py>=3.10",
        "mpi4py>=4.0",
        "tokenizers>=0.20",
        "jinja2>=3.1",
        "psutil>=5.9",
        "threadpoolctl>=3.1",
        "tqdm>=4.64",
    ],
    extras_require={
        "mpi": ["mpich>=4.3"],
        "openmpi": ["openmpi>=5.0"],
        "intel": ["impi-rt>=2021.13; platform_machine == 'x86_64'"],
        "cpu": [
            "numba>=0.60",
            "onednn-cpu-gomp>=2023.2; platform_machine == 'x86_64' and sys_platform == 'linux'",
        ],
        "cuda12": ["cupy-cuda12x[ctk]>=14.0", "numpy>=2.1.2"],
        "cuda13": ["cupy-cuda13x[ctk]>=14.0", "numpy>=2.1.2"],
        "test": [
            "pytest>=8.2",
            "pytest-mpi>=0.6",
            "pytest-timeout>=2.3",
            "ruff>=0.6",
            "import-linter>=2.1",
            "mypy>=1.11",
            "safetensors>=0.4.3",
            "matplotlib>=3.8",
        ],
        "plot": ["matplotlib>=3.8"],
        "parity": ["torch>=2.4", "transformers>=4.51", "safetensors>=0.4.3"],
    },
    entry_points={"console_scripts": ["hpcinfer = hpcinfer.__main__:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
    ],
)
