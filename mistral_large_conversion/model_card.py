"""Licence files and model card of a converted checkpoint: what its source says, never more."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mistral_large_conversion.checkpoint.adapter import Adapter
from mistral_large_conversion.checkpoint.calibration import Calibration
from mistral_large_conversion.checkpoint.layout import MODEL_CARD_NAME, is_consolidated
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
base_model: {base_model}"""
RESEARCH_FRONT_MATTER_OF_OTHERS = "\n".join(RESEARCH_FRONT_MATTER.splitlines()[:3])
# The vendor's models, by vocabulary.
VENDOR = "mistralai"
MODELS = {"v3": "Mistral-Large-Instruct-2407", "v7": "Mistral-Large-Instruct-2411"}
TITLE = "{model}, converted"
OWN_FRONT_MATTER = """\
license: other
license_link: LICENSE"""

CARD = """\
---
{front_matter}
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
CONVERTED_FROM_HF = """\
It was written anew from a checkpoint in the layout of Hugging Face transformers. {values} The tokenizer and its chat
template were written anew where their formats are known."""
SAME_VALUES = "No value was changed."
CAST_VALUES = "All values were rounded from {} to {}."
QUANTIZED_VALUES = """\
The weights of the linear layers of the decoder were quantized {how},
each rounded to the nearest, without any calibration. {others}"""
CALIBRATED_VALUES = """\
The weights of the linear layers of the decoder were quantized {how},
layer by layer by {calibration}: sequences of at most {length:,} tokens of the file `{data}`, whose SHA-256 is
`{sha256}`. {others}"""
SAME_OTHER_VALUES = "No other value was changed."
CAST_OTHER_VALUES = "All other values were rounded from {} to {}."
MERGED_VALUES = """\
The LoRA adapter `{name}` ({description}) was merged into the weights, as PEFT does: its file `{file}` has the checksum
`{checksum}` (xxh3_128). {values}"""
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


# Behind it is the card of the source, word for word.
SOURCE_HEADING = "\n## The model card of the source\n\n"
# In a card of ours, as nowhere else.
OWN_MARK = "\n**This checkpoint was modified.** "
LICENCE_KEYS = ("license", "license_name", "license_link")
# What our cards say themselves of how to load the folder.
READER_KEYS = ("library_name", "pipeline_tag", "tags")
_METADATA = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n.*?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class SourceCard:
    """What a folder of someone else says of itself in its README.md.

    metadata: its front matter, empty if it has none that can be read.
    text: all the rest; undecodable bytes as surrogates.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


def source_card(folder: Path) -> SourceCard:
    """Return the card that a checkpoint made of `folder` carries on: none of the vendor's own folder.

    Of a card of ours, it is the one that it carries itself, with the metadata that were taken from it.
    """
    if file_problem(folder, MODEL_CARD_NAME) is not None:
        return SourceCard()
    text = (folder / MODEL_CARD_NAME).read_bytes().decode(errors="surrogateescape")
    own, mark, carried = text.partition(SOURCE_HEADING)
    is_ours = OWN_MARK in own
    if not mark if is_ours else is_consolidated(folder):
        return SourceCard()
    # Takes a moment to import.
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(folder / MODEL_CARD_NAME) or {}
        metadata = {name: value for name, value in metadata.items() if isinstance(name, str)}
    # Whatever a parser of YAML makes of a file of anyone.
    except Exception:
        return SourceCard({}, carried if is_ours else text)
    return SourceCard(metadata, carried if is_ours else _METADATA.sub("", text))


def _front_matter(own: str, reader: str, source: SourceCard) -> str:
    """Return the front matter of a card: ours, and what the source says of licence, base model and itself."""
    kept = {name: value for name, value in source.metadata.items() if value is not None and name not in READER_KEYS}
    lines = own.splitlines()
    if "license" in kept:
        lines = [line for line in lines if line.partition(":")[0] not in LICENCE_KEYS]
    lines = [line for line in lines if line.partition(":")[0] not in kept]
    if kept:
        from huggingface_hub.repocard_data import CardData

        lines.append(CardData(**kept).to_yaml().rstrip("\n"))
    tags = source.metadata.get("tags")
    known = {*READERS} - {None} | {"mistral-common"}
    others = [tag for tag in tags if isinstance(tag, str) and tag not in known] if isinstance(tags, list) else []
    # Each on a line of its own behind ours.
    return "\n".join([*lines, reader, *(f"- {tag}" for tag in others if re.fullmatch(r"[\w.:/-]+", tag))])


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
    adapter: Adapter | None = None,
    calibration: Calibration | None = None,
    model: str | None = "v3",
    source: SourceCard | None = None,
) -> str:
    """The README.md of a converted checkpoint with these licence files.

    model_type: None for the consolidated layout.
    cast: the dtypes of the source's weights and of these, as safetensors names them, where they differ.
    quantization: how the weights are quantized and in groups of how many, if they are.
    adapter: the LoRA that was merged into the weights, if one was.
    calibration: what quantized weights were calibrated with, if they were.
    model: the vocabulary of the vendor's model that it is; None for a checkpoint of someone else.
    source: the card of that one, which is carried on.
    """
    source = source or SourceCard()
    if is_research_licence(files) and model is not None:
        title, licence = TITLE.format(model=MODELS[model]), RESEARCH_LICENCE
        front_matter = RESEARCH_FRONT_MATTER.format(base_model=f"{VENDOR}/{MODELS[model]}")
    elif is_research_licence(files):
        title, front_matter, licence = "Converted checkpoint", RESEARCH_FRONT_MATTER_OF_OTHERS, RESEARCH_LICENCE
    else:
        names = ", ".join(f"`{name}`" for name in files)
        title, front_matter, licence = "Converted checkpoint", OWN_FRONT_MATTER, OWN_LICENCE.format(names=names)
    values = CAST_VALUES.format(*cast) if cast else SAME_VALUES
    if quantization is not None:
        how = DESCRIPTIONS[quantization.scheme].format(group_size=quantization.group_size)
        others = CAST_OTHER_VALUES.format(*cast) if cast else SAME_OTHER_VALUES
        values = QUANTIZED_VALUES.format(how=how, others=others)
        if calibration is not None:
            values = CALIBRATED_VALUES.format(
                how=how,
                calibration=f"{calibration.method} on {calibration.samples:,} sequences, {calibration.tokens:,} tokens",
                length=calibration.length,
                data=_as_code(calibration.data),
                sha256=calibration.data_sha256,
                others=others,
            )
    if adapter is not None:
        file, checksum = list(adapter.checksums.items())[-1]
        values = MERGED_VALUES.format(
            name=_as_code(adapter.name),
            description=adapter.description,
            file=file,
            checksum=checksum,
            values=SAME_OTHER_VALUES if values == SAME_VALUES else values,
        )
    reader = READERS[model_type]
    modification = CONVERTED_FROM_HF if model is None and model_type is not None else reader["modification"]
    card = CARD.format(
        front_matter=_front_matter(front_matter, reader["front_matter"], source),
        title=title,
        modification=modification.format(values=values),
        use=reader["use"],
        licence=licence,
    )
    return card + (f"{SOURCE_HEADING}{source.text}" if source.text or source.metadata else "")


def _as_code(name: str) -> str:
    """A name as it is shown: it is any text, and must not end the code that shows it."""
    return " ".join(name.replace("`", "'").split())


def is_vendors(folder: Path) -> bool:
    """Whether a folder holds the vendor's model: in the consolidated layout, or with a card of ours that says so.

    Anything else may be a fine-tune, and so is what a card of ours says to be one.
    """
    text, is_carried = "", ""
    if file_problem(folder, MODEL_CARD_NAME) is None:
        card = (folder / MODEL_CARD_NAME).read_bytes().decode(errors="replace")
        text, is_carried, _ = card.partition(SOURCE_HEADING)
    if is_consolidated(folder) and not is_carried:
        return True
    return OWN_MARK in text and any(f"\n# {TITLE.format(model=model)}\n" in text for model in MODELS.values())


def retag_model_card(content: bytes, model_type: ModelType) -> bytes:
    """A README.md for another model type; what in it is not ours stays."""
    text, mark, carried = content.decode(errors="surrogateescape").partition(SOURCE_HEADING)
    for other in READERS.values():
        for part in ("front_matter", "use"):
            # With the end of its line: one model type is the beginning of the other.
            text = text.replace(f"{other[part]}\n", f"{READERS[model_type][part]}\n")
    return f"{text}{mark}{carried}".encode(errors="surrogateescape")
