"""Print what was tested with, and whether setup.py's range lets it be installed."""

import warnings
from importlib.metadata import version

from packaging.version import Version

warnings.simplefilter("ignore")

from modeling_mistral_large.supported import NEWEST_TRANSFORMERS, OLDEST_TRANSFORMERS  # noqa: E402  # it may warn

NAMES = ("transformers", "tokenizers", "huggingface_hub", "accelerate", "peft", "torch")

tested = Version(version("transformers")).release[:2]
is_inside = Version(OLDEST_TRANSFORMERS).release <= tested <= Version(NEWEST_TRANSFORMERS).release
bound = f"OUTSIDE the range, whose end is {NEWEST_TRANSFORMERS}: raise it on purpose"
outcome = "inside the range" if is_inside else bound
print("passed:", ", ".join(f"{name} {version(name)}" for name in NAMES), f"({outcome})")
