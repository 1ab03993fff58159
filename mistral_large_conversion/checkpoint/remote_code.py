"""The module that converted folders carry for programs that do not import this package, and where it is named.

`trust_remote_code=True` runs the module, which imports the classes from the installed package. Without it, the Auto
classes of transformers refuse a folder that names a module. They would read its tokenizer with a stock class otherwise,
for which `[INST]` in a text is the control token.
"""

from typing import Any

DISTRIBUTION = "modeling-mistral-large"

MODULE = "modeling_mistral_large_remote"

REMOTE_CODE_NAME = f"{MODULE}.py"

CONFIG_CLASS, TOKENIZER_CLASS = "MistralLargeConfig", "MistralLargeTokenizer"

MODEL_CLASSES = {
    "AutoModel": "MistralLargeModel",
    "AutoModelForCausalLM": "MistralLargeForCausalLM",
    "AutoModelForQuestionAnswering": "MistralLargeForQuestionAnswering",
    "AutoModelForSequenceClassification": "MistralLargeForSequenceClassification",
    "AutoModelForTokenClassification": "MistralLargeForTokenClassification",
}

# What config.json says of it besides the geometry. The class of a config in memory is known: there it says nothing.
IN_CONFIG: dict[str, Any] = {
    "auto_map": {auto: f"{MODULE}.{name}" for auto, name in {"AutoConfig": CONFIG_CLASS, **MODEL_CLASSES}.items()},
    "library_name": DISTRIBUTION,
}

# The second of the two is the class that the tokenizers library backs; there is no other.
TOKENIZER_AUTO_MAP: dict[str, Any] = {"AutoTokenizer": [None, f"{MODULE}.{TOKENIZER_CLASS}"]}

_NAMES = "".join(f"    {name},\n" for name in sorted([CONFIG_CLASS, TOKENIZER_CLASS, *MODEL_CLASSES.values()]))

REMOTE_CODE = f'''\
"""The classes of this checkpoint, from the package that it needs: pip install {DISTRIBUTION}"""

from modeling_mistral_large import (  # noqa: F401
{_NAMES})
'''.encode()
