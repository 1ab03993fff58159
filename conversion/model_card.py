"""Licence files and model card of a converted checkpoint: what its source says, never more."""

from pathlib import Path

from modeling_mistral_large.conversion.source_files import file_finding
from modeling_mistral_large.errors import CheckpointError

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
library_name: transformers
pipeline_tag: text-generation
tags:
- mistral_large
---

# {title}

**This checkpoint was modified.** {modification}

## Use

```python
import modeling_mistral_large  # registers the architecture with transformers
from transformers import pipeline

chat = pipeline("text-generation", "path/to/this/folder", dtype="auto", device_map="auto")
print(chat([{{"role": "user", "content": "Who are you?"}}], max_new_tokens=64)[0]["generated_text"][-1]["content"])
```

## Licence

{licence}
"""
MODIFICATION = """\
It was converted from the vendor's consolidated layout to the layout of Hugging Face transformers: tensors were renamed,
and the rows of the query and key weights were put into another order. No value was changed. The tokenizer was rewritten
as `tokenizer.json`, and a chat template was added."""
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
        if finding := file_finding(source, name):
            raise CheckpointError(f"{source}: {finding}; the licence must go with the weights")
        files[name] = (source / name).read_bytes()
    return files or {name: (LICENCE_FOLDER / name).read_bytes() for name in (AGREEMENT_NAME, NOTICE_NAME)}


def is_research_licence(files: dict[str, bytes]) -> bool:
    """Whether licence files are those of the vendor's weights."""
    return any(NOTICE_LINE.encode() in content for content in files.values())


def model_card(files: dict[str, bytes]) -> str:
    """The README.md of the converted checkpoint that carries these licence files."""
    if is_research_licence(files):
        title, front_matter, licence = "Mistral-Large-Instruct-2407, converted", RESEARCH_FRONT_MATTER, RESEARCH_LICENCE
    else:
        names = ", ".join(f"`{name}`" for name in files)
        title, front_matter, licence = "Converted checkpoint", OWN_FRONT_MATTER, OWN_LICENCE.format(names=names)
    return CARD.format(front_matter=front_matter, title=title, modification=MODIFICATION, licence=licence)
