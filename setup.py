"""Packaging of modeling-mistral-large; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Where the project is published; mkdocs.yml, CITATION.cff and .github/ have it too, and a test compares them.
REPOSITORY = "https://github.com/OWNER/modeling-mistral-large"

version = re.search(r'^__version__ = "(.+)"$', (ROOT / "modeling_mistral_large/__init__.py").read_text(), re.MULTILINE)
assert version is not None

# The minor versions of transformers that the whole suite has passed on, see .ci/versions.
supported = dict(
    re.findall(r'^(\w+) = "(.+)"$', (ROOT / "modeling_mistral_large/supported.py").read_text(), re.MULTILINE)
)
major, minor = supported["NEWEST_TRANSFORMERS"].split(".")
transformers_range = f">={supported['OLDEST_TRANSFORMERS']},<{major}.{int(minor) + 1}"


def index_page(readme: str) -> str:
    """The README as an index shows it: links and pictures by their address instead of their path."""
    readme = re.sub(r"!\[([^\]]*)\]\((?!https?:)([^)]+)\)", rf"![\1]({REPOSITORY}/raw/main/\2)", readme)
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)", rf"[\1]({REPOSITORY}/blob/main/\2)", readme)


# 1.12 is the last one for Python 3.10.
demo = ["mistral-common>=1.12"]
mcp = ["mcp>=2,<3"]
quantized = ["compressed-tensors>=0.15"]
# The last two render what a model writes for the chat page.
serve = ["fastapi>=0.115", "uvicorn>=0.34", "markdown-it-py>=3", "pygments>=2.17"]
structured = ["llguidance>=1.3,<2"]
test = [
    *demo,
    *mcp,
    *quantized,
    *structured,
    "hypothesis>=6.100",
    "import-linter>=2.3",
    "mypy>=1.15",
    "optimum-quanto>=0.2.7",
    "pandas>=2",
    "peft>=0.18",
    "protobuf>=5",
    "pyte>=0.8.2",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "regex>=2024.4.16",
    "ruff>=0.12",
    "setuptools>=77",
]

setup(
    name="modeling-mistral-large",
    version=version[1],
    description="Mistral-Large-Instruct-2407 for Hugging Face transformers: exact prompts, exact weights",
    long_description=index_page((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    url=REPOSITORY,
    project_urls={
        "Documentation": f"{REPOSITORY}/tree/main/docs",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    },
    keywords="mistral, mistral-large, transformers, llm, function-calling, tokenizer, conversion, quantization",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Software Development :: Libraries :: Python Modules",
        "Typing :: Typed",
    ],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["modeling_mistral_large*", "mistral_large_conversion*", "mistral_large_cli*"]),
    package_data={
        "modeling_mistral_large": ["py.typed"],
        "modeling_mistral_large.calibration": ["default.jsonl"],
        "modeling_mistral_large.serving.page": ["static/*"],
        "mistral_large_conversion": ["py.typed", "licence/*"],
        "mistral_large_conversion.chat_templates": ["*.jinja", "*.json"],
        "mistral_large_cli": ["py.typed", "demo_checkpoint/*", "demo_checkpoint_v7/*"],
    },
    install_requires=[
        "accelerate>=1.1",
        "huggingface-hub>=1.0",
        "jinja2>=3.1",
        "jsonschema>=4.21",
        "numpy>=1.26",
        "packaging>=23",
        "prompt-toolkit>=3.0.36",
        "psutil>=6",
        "rich>=13",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tokenizers>=0.22",
        "torch>=2.5",
        f"transformers{transformers_range}",
        "typer>=0.12",
        "xxhash>=3",
    ],
    extras_require={
        "demo": demo,
        "mcp": mcp,
        "quantized": quantized,
        "serve": serve,
        "structured": structured,
        "test": test,
    },
    entry_points={
        "console_scripts": ["mistral-large=mistral_large_cli:main"],
        "vllm.general_plugins": ["mistral_large=modeling_mistral_large.integrations.vllm_plugin:register"],
    },
)
