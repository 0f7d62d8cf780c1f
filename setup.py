"""Packaging. `pip install -c constraints.txt .` installs the library with its hard dependencies."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
HF = ["transformers>=5.8", "tokenizers", "peft>=0.18", "gguf>=0.17"]
DATA = ["datasets>=4.0", "pyarrow>=18"]
SERVER = ["openai>=2.0"]
BITSANDBYTES = ["bitsandbytes>=0.46"]  # optimisers in 8 bit, models in 4 bit
NOTEBOOKS = ["matplotlib>=3.9", "ipykernel>=7.0"]
EXAMPLES = [*NOTEBOOKS, "reasoning-gym>=0.1.25"]
DOCS = [
    "matplotlib>=3.9",
    "sphinx>=9.0",
    "furo>=2025.9.25",
    "myst-parser>=5.0",
    "sphinx-copybutton>=0.5.2",
]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",  # a worker a core
    "scipy",
    "tensorboard",
    *HF,
    *DATA,
    *SERVER,
    "jsonschema>=4.20",
    "fastapi",
    "uvicorn",  # of transformers serve
    "hypothesis>=6.100",
    *NOTEBOOKS,
    "nbclient>=0.10",
    "playwright>=1.50",  # with the Chromium of the machine
    "setuptools>=77",  # a test builds the wheel
]

setup(
    name="self-rewarding-lm",
    version="0.2.0",
    description="Train a language model on rewards that it gives itself (arXiv:2401.10020)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["self_rewarding_lm", "self_rewarding_lm.*"]),
    package_data={
        "self_rewarding_lm": ["py.typed", "__init__.pyi", "report/report.*", "recipes/*.json*"]
    },
    install_requires=[
        "torch>=2.9",  # torch.optim.Muon
        "einops>=0.8",
        "accelerate>=1.10",
        "beartype>=0.20",
        "jaxtyping>=0.3",
        "x-transformers>=2.11",
        "pydantic>=2.11",
        "jinja2>=3.1",
        "numpy>=2.0",
        "psutil>=6.0",
        "safetensors>=0.5",
        "tqdm>=4.66.3",  # as datasets wants it
        "rapidfuzz>=3.9",
        "PyYAML>=6.0.1",  # 6.0 has no wheel for Python 3.11
    ],
    entry_points={"console_scripts": ["self-rewarding-lm = self_rewarding_lm.cli:main"]},
    extras_require={
        "hf": HF,
        "data": DATA,
        "server": SERVER,
        "bitsandbytes": BITSANDBYTES,
        "test": TEST,
        "bench": [
            *HF,
            "trl==1.16.0",
            "self-rewarding-lm-pytorch==0.2.12",
            "psutil",
        ],
        "examples": EXAMPLES,
        "docs": DOCS,
        "dev": [*TEST, *DOCS, "ruff", "pyright[nodejs]"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
