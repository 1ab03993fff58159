"""The two layouts of a checkpoint: which files a folder of each has, and which of the two is read."""

from pathlib import Path
from typing import Literal

from mistral_large_conversion.checkpoint.params import PARAMS_NAME

Layout = Literal["consolidated", "hf"]

OTHER_LAYOUT: dict[Layout, Layout] = {"consolidated": "hf", "hf": "consolidated"}
WEIGHTS_STEM: dict[Layout, str] = {"consolidated": "consolidated", "hf": "model"}
CONFIG_NAME = "config.json"
CONFIG_NAMES: dict[Layout, str] = {"consolidated": PARAMS_NAME, "hf": CONFIG_NAME}
GENERATION_CONFIG_NAME = "generation_config.json"
TOKENIZER_NAME = "tokenizer.model.v3"
# Of all names of SentencePiece files.
TOKENIZER_STEM = "tokenizer.model"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TOKENIZER_JSON_NAME = "tokenizer.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
MODEL_CARD_NAME = "README.md"


def source_layout(source: Path | str) -> Layout:
    """The layout of a folder that is read: the vendor's, unless there is only the other one."""
    return next(iter(layouts_of(Path(source))), "consolidated")


def layouts_of(folder: Path) -> list[Layout]:
    """The layouts of which a folder holds weights, or else the geometry; the first is the one that is read."""
    return _with_weights(folder) or [layout for layout, name in CONFIG_NAMES.items() if (folder / name).exists()]


def is_consolidated(folder: Path) -> bool:
    """Whether a folder is read in the consolidated layout: where it has both, as the vendor's has, the other is not."""
    if "consolidated" in _with_weights(folder):
        return True
    return (folder / PARAMS_NAME).exists() and not (folder / CONFIG_NAME).exists()


def _with_weights(folder: Path) -> list[Layout]:
    return [layout for layout, stem in WEIGHTS_STEM.items() if any(folder.glob(f"{stem}*.safetensors"))]
