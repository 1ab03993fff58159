"""Packaging of modeling-mistral-large; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

version = re.search(r'^__version__ = "(.+)"$', (ROOT / "modeling_mistral_large/__init__.py").read_text(), re.MULTILINE)
assert version is not None

# The minor versions of transformers that the whole suite has passed on, see .ci/versions.
supported = dict(
    re.findall(r'^(\w+) = "(.+)"$', (ROOT / "modeling_mistral_large/supported.py").read_text(), re.MULTILINE)
)
major, minor = supported["NEWEST_TRANSFORMERS"].split(".")
transformers_range = f">={supported['OLDEST_TRANSFORMERS']},<{major}.{int(minor) + 1}"

demo = ["mistral-common>=1.13"]
quantized = ["compressed-tensors>=0.15"]
structured = ["llguidance>=1.3,<2"]
test = [
    *demo,
    *quantized,
    *structured,
    "hypothesis>=6.100",
    "jsonschema>=4.21",
    "mypy>=1.15",
    "optimum-quanto>=0.2.7",
    "pandas>=2",
    "peft>=0.18",
    "psutil>=6",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "regex",
    "ruff>=0.12",
    "setuptools>=77",
]

setup(
    name="modeling-mistral-large",
    version=version[1],
    description="Mistral-Large-Instruct-2407 for Hugging Face transformers: exact prompts, exact weights",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["modeling_mistral_large*", "mistral_large_conversion*", "mistral_large_cli*"]),
    package_data={
        "modeling_mistral_large": ["py.typed"],
        "mistral_large_conversion": ["py.typed", "licence/*"],
        "mistral_large_conversion.chat_templates": ["*.jinja", "*.json"],
        "mistral_large_cli": ["py.typed", "demo_checkpoint/*"],
    },
    install_requires=[
        "accelerate>=1.1",
        "huggingface-hub>=1.0",
        "jinja2>=3.1",
        "numpy>=1.26",
        "packaging>=23",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tokenizers>=0.22",
        "torch>=2.5",
        f"transformers{transformers_range}",
        "typer>=0.12",
        "rich>=13",
        "xxhash>=3",
    ],
    extras_require={"demo": demo, "quantized": quantized, "structured": structured, "test": test},
    entry_points={
        "console_scripts": ["mistral-large=mistral_large_cli:main"],
        "vllm.general_plugins": ["mistral_large=modeling_mistral_large.integrations.vllm_plugin:register"],
    },
)
