"""Licence files and model card of a converted checkpoint: what its source says, never more."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mistral_large_conversion.checkpoint.quantization import DESCRIPTIONS, Quantization
from mistral_large_conversion.checkpoint.remote_code import DISTRIBUTION, REMOTE_CODE_NAME
from mistral_large_conversion.checkpoint.source_files import file_problem
from mistral_large_conversion.errors import CheckpointError

ModelType = Literal["mistral_large", "mistral"]

LICENCE_FOLDER = Path(__file__).parent / "licence"
AGREEMENT_NAME = "LICENSE"
NOTICE_NAME = "Notice"
NOTICE_LINE = "Licensed by Mistral AI under the Mistral AI Research License"
# The agreement and the notice, under every name a source may have given them.
LICENCE_NAMES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "NOTICE.txt", "Notice", "Notice.txt")

RESEARCH_FRONT_MATTER = """\
license: other
license_name: mrl
license_link: https://mistral.ai/licenses/MRL-0.1.md
base_model: mistralai/Mistral-Large-Instruct-2407"""
OWN_FRONT_MATTER = """\
license: other
license_link: LICENSE"""

CARD = """\
---
{front_matter}
{reader}
---

# {title}

**This checkpoint was modified.** {modification}

## Use

{use}

## Licence

{licence}
"""
PIPELINE = """\
```python
{imports}from transformers import pipeline

chat = pipeline("text-generation", "path/to/this/folder", dtype="auto", device_map="auto")
print(chat([{{"role": "user", "content": "Who are you?"}}], max_new_tokens=64)[0]["generated_text"][-1]["content"])
```"""
REGISTERING_IMPORT = "import modeling_mistral_large  # registers the architecture with transformers\n"
# Front matter and text name what loads the folder: without it, the tokenizer is not safe.
NEEDS_PACKAGE = f"""\
This checkpoint needs the package `{DISTRIBUTION}`:

```bash
pip install {DISTRIBUTION}
```

{PIPELINE.format(imports=REGISTERING_IMPORT)}

Programs that do not import the package find it with `trust_remote_code=True` or `--trust_remote_code`: then
`{REMOTE_CODE_NAME}` imports the classes from the installed package. Without the package or the option,
transformers refuses to load this folder. Do not read `tokenizer.json` with a stock tokenizer class: there, `[INST]` or
`</s>` in a user's text is the control token. `mistral-large retag --as mistral` makes a folder for programs without the
package; see its documentation for what they cannot do."""
NATIVE_READERS = """\
Programs that read the vendor's layout read this folder: `params.json`, `consolidated*.safetensors` and
`tokenizer.model.v3`. For vLLM, add `--load-format mistral --config-format mistral --tokenizer-mode mistral`."""
TRANSFORMERS_FRONT_MATTER = """\
library_name: {library}
pipeline_tag: text-generation
tags:
- {model_type}"""
CONVERTED = """\
It was converted from the vendor's consolidated layout to the layout of Hugging Face transformers: tensors were renamed,
and the rows of the query and key weights were put into another order. {values} The tokenizer was rewritten as
`tokenizer.json`, and a chat template was added."""
CONVERTED_BACK = """\
It was converted from the layout of Hugging Face transformers to the vendor's consolidated layout: tensors were renamed,
and the rows of the query and key weights were put into another order. {values}"""
SAME_VALUES = "No value was changed."
CAST_VALUES = "All values were rounded from {} to {}."
QUANTIZED_VALUES = """\
The weights of the linear layers of the decoder were quantized {how},
each rounded to the nearest, without any calibration. {others}"""
SAME_OTHER_VALUES = "No other value was changed."
CAST_OTHER_VALUES = "All other values were rounded from {} to {}."
# What differs between the layouts and model types; None is the consolidated layout.
READERS: dict[ModelType | None, dict[str, str]] = {
    "mistral_large": {
        "front_matter": TRANSFORMERS_FRONT_MATTER.format(library=DISTRIBUTION, model_type="mistral_large"),
        "modification": CONVERTED,
        "use": NEEDS_PACKAGE,
    },
    "mistral": {
        "front_matter": TRANSFORMERS_FRONT_MATTER.format(library="transformers", model_type="mistral"),
        "modification": CONVERTED,
        "use": PIPELINE.format(imports=""),
    },
    None: {
        "front_matter": "pipeline_tag: text-generation\ntags:\n- mistral-common",
        "modification": CONVERTED_BACK,
        "use": NATIVE_READERS,
    },
}
RESEARCH_LICENCE = """\
Licensed by Mistral AI under the Mistral AI Research License: the agreement is in `LICENSE`, the attribution in
`Notice`, and both must accompany every copy. This is not an official product of Mistral AI, which has not endorsed,
approved or validated it."""
OWN_LICENCE = "The licence files of the source, copied unchanged: {names}. Not a product of Mistral AI."


def licence_files(source: Path) -> dict[str, bytes]:
    """Names and contents of the licence files that a checkpoint from `source` must carry.

    The vendor's folder holds none: a source without any is taken for the vendor's weights, and gets the agreement and
    the notice that must go with them. Licence files that the source does hold are passed on as they are.
    """
    files = {}
    for name in sorted(path.name for path in source.iterdir() if path.name in LICENCE_NAMES):
        if problem := file_problem(source, name):
            raise CheckpointError(f"{source}: {problem}; the licence must go with the weights")
        files[name] = (source / name).read_bytes()
    return files or {name: (LICENCE_FOLDER / name).read_bytes() for name in (AGREEMENT_NAME, NOTICE_NAME)}


def is_research_licence(files: Mapping[str, bytes]) -> bool:
    """Whether licence files are those of the vendor's weights."""
    return any(NOTICE_LINE.encode() in content for content in files.values())


def model_card(
    files: Mapping[str, bytes],
    *,
    model_type: ModelType | None,
    cast: tuple[str, str] | None = None,
    quantization: Quantization | None = None,
) -> str:
    """The README.md of a converted checkpoint with these licence files.

    model_type: None for the consolidated layout.
    cast: the dtypes of the source's weights and of these, as safetensors names them, where they differ.
    quantization: how the weights are quantized and in groups of how many, if they are.
    """
    if is_research_licence(files):
        title, front_matter, licence = "Mistral-Large-Instruct-2407, converted", RESEARCH_FRONT_MATTER, RESEARCH_LICENCE
    else:
        names = ", ".join(f"`{name}`" for name in files)
        title, front_matter, licence = "Converted checkpoint", OWN_FRONT_MATTER, OWN_LICENCE.format(names=names)
    values = CAST_VALUES.format(*cast) if cast else SAME_VALUES
    if quantization is not None:
        how = DESCRIPTIONS[quantization.scheme].format(group_size=quantization.group_size)
        others = CAST_OTHER_VALUES.format(*cast) if cast else SAME_OTHER_VALUES
        values = QUANTIZED_VALUES.format(how=how, others=others)
    reader = READERS[model_type]
    return CARD.format(
        front_matter=front_matter,
        reader=reader["front_matter"],
        title=title,
        modification=reader["modification"].format(values=values),
        use=reader["use"],
        licence=licence,
    )


def retag_model_card(content: bytes, model_type: ModelType) -> bytes:
    """A README.md for another model type; what in it is not ours stays."""
    text = content.decode(errors="surrogateescape")
    for other in READERS.values():
        for part in ("front_matter", "use"):
            # With the end of its line: one model type is the beginning of the other.
            text = text.replace(f"{other[part]}\n", f"{READERS[model_type][part]}\n")
    return text.encode(errors="surrogateescape")
