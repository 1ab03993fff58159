"""What is wrong in a folder besides its weights: settings, templates, licence, files that the manifest has."""

import os
from fnmatch import fnmatchcase
from pathlib import Path

from mistral_large_conversion.chat_templates import prompt_format_of
from mistral_large_conversion.checkpoint.atomic_write import PARTIAL_SUFFIX, json_bytes
from mistral_large_conversion.checkpoint.layout import (
    CHAT_TEMPLATE_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    MODEL_CARD_NAME,
    TOKENIZER_CONFIG_NAME,
    Layout,
)
from mistral_large_conversion.checkpoint.params import params_from_geometry
from mistral_large_conversion.checkpoint.read import Checkpoint
from mistral_large_conversion.checkpoint.safetensors_header import TORCH_NAMES
from mistral_large_conversion.checkpoint.source_files import file_problem, json_or_problem, read_json_object, shown
from mistral_large_conversion.destination import UNFINISHED_NAME
from mistral_large_conversion.errors import CheckpointError
from mistral_large_conversion.folder_templates import ADDITIONAL_TEMPLATES_NAME
from mistral_large_conversion.hf_files import ARCHITECTURES
from mistral_large_conversion.manifest import MANIFEST_NAME, Manifest, ManifestFile, read_manifest
from mistral_large_conversion.model_card import (
    AGREEMENT_NAME,
    LICENCE_NAMES,
    NOTICE_NAME,
    is_research_licence,
    licence_files,
)
from mistral_large_conversion.vocabulary import SPECIAL_IDS, VOCABULARY_NAMES

# Names, in small letters, of files and folders that transformers, PEFT or an engine reads where it finds them: other
# weights, adapters, tokenizers, processors, templates, code.
READ_BY_LOADERS = (
    "*.bin",
    "*.ckpt*",
    "*.gguf",
    "*.h5",
    "*.jinja",
    "*.json",
    "*.model",
    "*.model.*",
    "*.msgpack",
    "*.pt",
    "*.pth",
    "*.py",
    "*.safetensors",
    "*.tiktoken",
    "additional_chat_templates",
    "custom_generate",
    "merges.txt",
    "requirements.txt",
    "tokenizer*",
    "vocab*",
)


def unfinished_problems(folder: Path) -> list[str]:
    """What shows that a conversion did not end in a folder."""
    return [
        f"{path.name}: an unfinished conversion; run it again"
        for path in sorted(folder.iterdir())
        if path.name == UNFINISHED_NAME or path.name.endswith(PARTIAL_SUFFIX)
    ]


def config_problems(checkpoint: Checkpoint, origin: Checkpoint | None) -> list[str]:
    """Where the small JSON files say something else than the weights, each other, or the source."""
    problems = []
    if origin is not None:
        own, others = params_from_geometry(checkpoint.geometry), params_from_geometry(origin.geometry)
        problems += [f"{key} is {own[key]}, the source's is {others[key]}" for key in own if own[key] != others[key]]
    if checkpoint.layout == "consolidated":
        return problems
    config = read_json_object(checkpoint.folder / CONFIG_NAME)
    torch_name = config.get("dtype", config.get("torch_dtype"))
    if torch_name != TORCH_NAMES[checkpoint.dtype]:
        problems.append(f"{CONFIG_NAME}: dtype is {shown(torch_name)}, the weights are {TORCH_NAMES[checkpoint.dtype]}")
    if config.get("architectures") != [ARCHITECTURES[config["model_type"]]]:
        problems.append(
            f"{CONFIG_NAME}: architectures {shown(config.get('architectures'))} of a {config['model_type']}"
        )
    is_foreign = recorded_prompt_format(checkpoint.folder) is None
    if is_foreign and not os.path.lexists(checkpoint.folder / GENERATION_CONFIG_NAME):
        # Other programs need none.
        return problems
    generation_config, problem = json_or_problem(checkpoint.folder, GENERATION_CONFIG_NAME)
    if problem is not None:
        return [*problems, problem]
    return problems + [
        f"{GENERATION_CONFIG_NAME}: {name} is {shown(generation_config.get(name))}, "
        f"{CONFIG_NAME} has {shown(config.get(name))}"
        for name in SPECIAL_IDS
        if _differ(generation_config.get(name), config.get(name))
    ]


def _differ(one: object, other: object) -> bool:
    try:
        # In Python, True is 1.
        return type(one) is not type(other) or one != other
    except RecursionError:
        return True


def recorded_prompt_format(folder: Path) -> str | None:
    """The prompt format that this package has noted in tokenizer_config.json, "own" for a template of its own.

    None for a folder that another program has written.
    """
    try:
        settings = read_json_object(folder / TOKENIZER_CONFIG_NAME)
    except (OSError, ValueError):
        # What cannot be read is not someone else's.
        return "unknown"
    if "prompt_format" not in settings:
        return None
    prompt_format = settings["prompt_format"]
    return "own" if prompt_format is None else str(prompt_format)


def has_model_file(folder: Path) -> bool:
    """Whether the folder should have a SentencePiece file: all that a manifest does not say otherwise of."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return True
    return manifest is None or manifest.files is None or any(name in manifest.files for name in VOCABULARY_NAMES)


def chat_template_problems(folder: Path) -> list[str]:
    """What is wrong with the chat template of an HF layout; a template of its own is what the folder says it is."""
    # With tools, transformers takes a template of this folder named `tool_use`; any of them can be asked for.
    more = folder / ADDITIONAL_TEMPLATES_NAME
    names = [CHAT_TEMPLATE_NAME, *sorted(f"{more.name}/{path.name}" for path in more.glob("*.jinja"))]
    is_own = recorded_prompt_format(folder) in (None, "own")
    problems = []
    for name in names:
        if is_own and not os.path.lexists(folder / name):
            continue
        if problem := file_problem(folder, name) if name == CHAT_TEMPLATE_NAME else file_problem(more, Path(name).name):
            problems.append(problem)
        elif not is_own and prompt_format_of((folder / name).read_bytes().decode("utf-8", errors="replace")) is None:
            problems.append(f"{name} is not the bundled one: prompts are what it renders")
    return problems


def manifest_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Where the files of a folder are not those of its manifest; tensors have their own checksums.

    Files that were added are named if a loader reads such files.
    """
    problems = []
    present = {path.name for path in folder.iterdir()}
    if (folder / MANIFEST_NAME).read_bytes() != json_bytes(manifest.to_json()):
        problems.append(f"{MANIFEST_NAME} is not as a conversion writes it")
    for name, entry in (manifest.files or {}).items():
        # Anything may stand in a manifest: only names that are there are looked up.
        if name not in present:
            problems.append(f"{name} is missing")
        elif problem := file_problem(folder, name):
            problems.append(problem)
        elif ManifestFile.of_file(folder / name) != entry:
            problems.append(f"{name} has changed since the conversion")
    return problems + [
        f"{name!r} was added since the conversion: a loader may read it"
        for name in added_files(folder, manifest)
        if any(fnmatchcase(name.lower(), pattern) for pattern in READ_BY_LOADERS)
    ]


def added_files(folder: Path, manifest: Manifest) -> list[str]:
    """The names of what a folder holds that no conversion writes: other files, and all folders."""
    known = {*(manifest.files or {}), MANIFEST_NAME, UNFINISHED_NAME}
    return sorted(
        path.name for path in folder.iterdir() if path.name not in known and not path.name.endswith(PARTIAL_SUFFIX)
    )


def licence_problems(folder: Path, origin: Checkpoint | None, layout: Layout) -> list[str]:
    """Which files are not there that must go with the weights.

    The vendor's own folder has none of them, nor need a folder that another program has written.
    """
    names = [name for name in (*LICENCE_NAMES, MODEL_CARD_NAME) if (folder / name).exists()]
    is_foreign = layout == "hf" and recorded_prompt_format(folder) is None
    if (layout == "consolidated" or is_foreign) and not names:
        return []
    if problems := [problem for name in names if (problem := file_problem(folder, name))]:
        return problems
    present = {name: (folder / name).read_bytes() for name in names if name != MODEL_CARD_NAME}
    if origin is not None:
        wanted = licence_files(origin.folder)
        problems = [f"{name} is not the source's" for name in wanted if present.get(name) != wanted[name]]
    elif not present:
        problems = [f"no {AGREEMENT_NAME}: it must go with the weights"]
    elif is_research_licence(present):
        problems = [f"no {name}" for name in (AGREEMENT_NAME, NOTICE_NAME) if name not in present]
    if layout == "hf" and not is_foreign and MODEL_CARD_NAME not in names:
        problems.append(f"no {MODEL_CARD_NAME}, which states the modification")
    return problems
