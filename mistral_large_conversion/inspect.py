"""What a folder holds, from names, small files and headers alone."""

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open

from mistral_large_conversion.checkpoint.adapter_folder import vendors_adapter_problem
from mistral_large_conversion.checkpoint.auto_classes import is_another_model, is_named_mistral_large
from mistral_large_conversion.checkpoint.calibration import Calibration
from mistral_large_conversion.checkpoint.hub import fetch_headers, is_out_of_reach, is_repository_id, resolve_source
from mistral_large_conversion.checkpoint.layout import (
    CONFIG_NAME,
    CONFIG_NAMES,
    TOKENIZER_NAME,
    WEIGHTS_STEM,
    Layout,
    layouts_of,
)
from mistral_large_conversion.checkpoint.names import unwrapped_name
from mistral_large_conversion.checkpoint.params import PARAMS_NAME, params_from_geometry
from mistral_large_conversion.checkpoint.quantization import FORMATS, quantization_of
from mistral_large_conversion.checkpoint.read import load_headers, problem_lines
from mistral_large_conversion.checkpoint.source_files import (
    ADAPTER_CONFIG_NAME,
    LORA_NAME,
    adapter_problem,
    file_problem,
    json_or_problem,
    shown,
)
from mistral_large_conversion.errors import CheckpointError, TokenizerFileError
from mistral_large_conversion.folder_checks import (
    chat_template_problems,
    config_problems,
    has_model_file,
    licence_problems,
    manifest_problems,
    recorded_prompt_format,
    unfinished_problems,
)
from mistral_large_conversion.folder_tokenizer import FolderTokenizer, read_folder_tokenizer
from mistral_large_conversion.manifest import read_manifest
from mistral_large_conversion.model_card import LICENCE_NAMES, is_research_licence
from mistral_large_conversion.notebook import html_table
from mistral_large_conversion.vocabulary import VOCABULARY_NAMES, find_vocabulary

JSON_NAMES = ("tokenizer.json", "tokenizer_config.json")
PROMPTS_OF_ITS_OWN = "its own chat template: prompts are what it renders, exactness to the vendor's format is not meant"
STOCK_CLASSES = (
    "model type mistral: the Auto classes load stock ones{unless}; modeling_mistral_large.load({text}) or "
    "`mistral-large adopt` load ours"
)
UNLESS_NAMED = " unless modeling_mistral_large is imported"
UNLESS_RENAMED = ", also with modeling_mistral_large imported, as its name does not say Mistral-Large"
WRAPPED = (
    "tensor {name!r} has the name of a wrapper in its name, from torch.compile or a trainer: loaders do not find it, "
    "`mistral-large convert` does"
)
ADAPTER_NEXT_TO_IT = (
    "an adapter (PEFT) next to the checkpoint: transformers and this package load it as well; `mistral-large convert` "
    "and vLLM need --adapter for it"
)
LAYOUT_NAMES: dict[Layout, str] = {"consolidated": "the vendor's consolidated layout", "hf": "HF layout"}
# What loads a folder, by what it is; `text` and `word` are its name in Python and in a shell.
PIPELINE = 'transformers.pipeline("text-generation", {text}, dtype="auto", device_map="auto")'
LOADS_WITH: dict[str, tuple[str, ...]] = {
    "consolidated": (
        "import modeling_mistral_large; modeling_mistral_large.MistralLargeForCausalLM.from_pretrained({text})",
        "vllm serve {word} --load-format mistral --config-format mistral --tokenizer-mode mistral",
    ),
    "mistral_large": (
        f"import modeling_mistral_large, transformers; {PIPELINE}",
        "vllm serve {word}  # with this package installed next to it; other engines: mistral-large retag --as mistral",
    ),
    "mistral": (
        "import modeling_mistral_large; modeling_mistral_large.load({text})",
        f"import transformers; {PIPELINE}  # stock classes, prompts of the folder's own template",
        "vllm serve {word}  # the same",
    ),
}


@dataclass(frozen=True)
class Inspection:
    """What a folder is, what it holds, what loads it and what is wrong with it.

    geometry: under the names of params.json, or None if nothing sound says it.
    bits_per_weight: in the file, with scales, of the weights that are quantized as we do it; else None.
    calibration: what its int4 weights were calibrated with, as its manifest says, or None.
    dtypes: numbers of tensors by dtype, as safetensors names it.
    file_bytes: of the files of weights; `None` for one that cannot be read.
    vocabulary: "v3", "v7", or None for another one, or none that can be read.
    prompts: the prompt format and why, or None where there is no tokenizer that can be read.
    notes: what is not exact, or loads otherwise than one would think.
    """

    name: str
    kind: str
    geometry: dict[str, Any] | None
    bits_per_weight: float | None
    dtypes: dict[str, int]
    tensors: int
    parameters: int
    file_bytes: dict[str, int | None]
    tokenizer: tuple[str, ...]
    vocabulary: str | None
    prompts: str | None
    notes: tuple[str, ...]
    licence: str | None
    loads_with: tuple[str, ...]
    problems: tuple[str, ...]
    calibration: dict[str, Any] | None = None

    def _repr_html_(self) -> str:
        sizes = [size for size in self.file_bytes.values() if size is not None]
        rows = [
            ("name", self.name),
            ("kind", self.kind),
            *(self.geometry or {}).items(),
            *([] if self.calibration is None else [("calibration", Calibration(**self.calibration).description)]),
            ("tensors", f"{self.tensors}, {', '.join(self.dtypes)}"),
            ("parameters", f"{self.parameters:,}"),
            ("weights", f"{len(self.file_bytes)} files, {sum(sizes):,} bytes"),
            ("tokenizer", ", ".join(self.tokenizer) or "none"),
            ("vocabulary", self.vocabulary or "unknown"),
            ("prompts", self.prompts or "unknown"),
            ("licence", self.licence or "none"),
            *(("loads with", call) for call in self.loads_with),
            *(("note", note) for note in self.notes),
            *(("problem", problem) for problem in self.problems),
        ]
        return html_table(rows)


def inspect_checkpoint(
    source: Path | str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | str | None = None,
) -> Inspection:
    """Say what a folder or a repository on the hub holds; what is wrong is a problem, not an error.

    revision, token, cache_dir: of a repository, as `resolve_source` has them.

    Raises:
        CheckpointError: neither a folder nor a repository that can be read.
    """
    if Path(source).is_dir():
        return _inspect(Path(source), str(source))
    if Path(source).exists() or not is_repository_id(str(source)):
        return _inspect(resolve_source(source), str(source))
    if is_out_of_reach(str(source)):
        cached = resolve_source(source, revision=revision, cache_dir=cache_dir, local_files_only=True)
        return _inspect(cached, str(source))
    with TemporaryDirectory() as folder:
        fetch_headers(str(source), Path(folder), revision=revision, token=token, cache_dir=cache_dir)
        return _inspect(Path(folder), str(source))


def _inspect(folder: Path, name: str) -> Inspection:
    try:
        layouts = layouts_of(folder)
        problems = unfinished_problems(folder)
        adapter = adapter_problem(folder)
        is_unfinished = bool(problems)
        config, config_problems_ = _settings(folder)
        quantization = _quantization(config, layouts)
        dtypes, parameters, file_bytes, file_problems, name_problems = _weights(folder, layouts)
        checkpoint = None
        if adapter is not None:
            problems.append(adapter)
        elif layouts and (quantization is None or quantization_of((config or {}).get("quantization_config"))):
            try:
                checkpoint = load_headers(folder, layouts[0])
            except CheckpointError as error:
                problems += problem_lines(error)
        else:
            problems += config_problems_ + file_problems
        if not layouts and adapter is None:
            problems.append(f"no {' and no '.join(CONFIG_NAMES.values())}: not a checkpoint")
        if checkpoint is not None:
            problems += name_problems + config_problems(checkpoint, None)
        if adapter is None and (vendors := vendors_adapter_problem(folder)):
            problems.append(vendors)
        calibration = None
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            problems += problem_lines(error)
        else:
            calibration = None if manifest is None else manifest.calibration
            problems += [] if manifest is None or manifest.files is None else manifest_problems(folder, manifest)
        if "hf" in layouts[:1]:
            problems += chat_template_problems(folder)
        is_foreign = "hf" in layouts[:1] and recorded_prompt_format(folder) is None
        tokenizer, tokenizer_problem = _tokenizer(folder, layouts) if adapter is None else (None, None)
        if is_foreign:
            problems += [] if tokenizer_problem is None else [tokenizer_problem]
        elif layouts:
            problems += _tokenizer_file_problems(folder, layouts[0])
        if layouts:
            problems += licence_problems(folder, None, layouts[0])
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read: {error}") from error
    model_type = None if config is None else config.get("model_type")
    reader = layouts[0] if layouts[:1] == ["consolidated"] else str(model_type)
    is_loadable = checkpoint is not None and not is_unfinished and not name_problems
    loaders = LOADS_WITH.get(reader, ()) if is_loadable else ()
    return Inspection(
        name=name,
        kind=_kind(layouts, model_type, quantization, is_unfinished)
        if adapter is None
        else f"an adapter ({LORA_NAME if (folder / LORA_NAME).exists() else 'PEFT'})",
        calibration=None if calibration is None else calibration.to_json(),
        geometry=None if checkpoint is None else params_from_geometry(checkpoint.geometry),
        bits_per_weight=None if checkpoint is None else checkpoint.bits_per_weight,
        dtypes=dict(dtypes),
        tensors=sum(dtypes.values()),
        parameters=parameters if checkpoint is None else checkpoint.parameters,
        file_bytes=file_bytes,
        tokenizer=tuple(file for file in (*JSON_NAMES, *VOCABULARY_NAMES) if (folder / file).exists()),
        vocabulary=None if tokenizer is None else tokenizer.vocabulary,
        prompts=None if tokenizer is None else _prompts(tokenizer),
        notes=_notes(folder, name, layouts, config or {}, tokenizer) if is_loadable else (),
        licence=_licence(folder),
        loads_with=tuple(call.format(text=json.dumps(name), word=shlex.quote(name)) for call in loaders),
        problems=tuple(problems),
    )


def _settings(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The content of config.json or else params.json, or None with the reason."""
    name = next((name for name in (CONFIG_NAME, PARAMS_NAME) if (folder / name).exists()), None)
    if name is None:
        return None, []
    settings, problem = json_or_problem(folder, name)
    return (settings, []) if problem is None else (None, [problem])


def _quantization(config: dict[str, Any] | None, layouts: Sequence[Layout]) -> str | None:
    """How the weights are quantized, or None."""
    settings = (config or {}).get("quantization_config") or (config or {}).get("quantization")
    if not settings or not layouts:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    ours = quantization_of(settings)
    if ours is None:
        return method if isinstance(method, str) and method else "by an unknown method"
    groups = "" if ours.scheme == "fp8" else f", groups of {ours.group_size}"
    return f"{ours.scheme}{groups} ({method}, {FORMATS[ours.scheme]})"


def _weights(
    folder: Path, layouts: Sequence[Layout]
) -> tuple[Counter[str], int, dict[str, int | None], list[str], list[str]]:
    """Tensors by dtype, number of parameters and sizes of files of the layout that is read.

    Then what is wrong with the files, and with names that `convert` reads and no loader does.
    """
    dtypes: Counter[str] = Counter()
    wrapped = None
    parameters, file_bytes, problems = 0, dict[str, int | None](), []
    stem = WEIGHTS_STEM[layouts[0]] if layouts else ""
    for path in sorted(folder.glob(f"{stem}*.safetensors")):
        problem = file_problem(folder, path.name)
        file_bytes[path.name] = None if problem else path.stat().st_size
        if problem is None:
            try:
                with safe_open(path, "numpy") as opened:
                    for name in opened.keys():  # noqa: SIM118  # not a dict
                        if unwrapped_name(name) != name:
                            wrapped = name
                        tensor = opened.get_slice(name)
                        dtypes[tensor.get_dtype()] += 1
                        parameters += math.prod(tensor.get_shape())
            except SafetensorError as error:
                problem = f"{path.name}: {error}"
        problems += [problem] if problem else []
    name_problems = [] if wrapped is None else [WRAPPED.format(name=wrapped)]
    return dtypes, parameters, file_bytes, problems, name_problems


def _kind(layouts: Sequence[Layout], model_type: object, quantization: str | None, is_unfinished: bool) -> str:
    if is_unfinished:
        return "an unfinished conversion"
    if not layouts:
        return "something else"
    if len(layouts) > 1:
        return f"both layouts; {LAYOUT_NAMES[layouts[0]]} is the one that is read"
    kind = LAYOUT_NAMES[layouts[0]]
    if layouts[0] == "hf":
        kind += f", model type {model_type if isinstance(model_type, str) else shown(model_type)}"
    return kind if quantization is None else f"{kind}, quantized: {quantization}"


def _tokenizer_file_problems(folder: Path, layout: Layout) -> list[str]:
    """What is wrong with the files of the tokenizer that a folder of ours or the vendor's must have."""
    try:
        known = find_vocabulary(folder)
    except TokenizerFileError as error:
        return [str(error)]
    names = () if layout == "consolidated" else JSON_NAMES
    if known is not None or layout == "consolidated" or has_model_file(folder):
        names = (*names, TOKENIZER_NAME if known is None else known.name)
    return [problem for name in names if (problem := file_problem(folder, name))]


def _tokenizer(folder: Path, layouts: Sequence[Layout]) -> tuple[FolderTokenizer | None, str | None]:
    """The tokenizer of a folder, or None and the reason."""
    if not layouts:
        return None, None
    try:
        return read_folder_tokenizer(folder, layout=layouts[0]), None
    except TokenizerFileError as error:
        return None, str(error)


def _prompts(tokenizer: FolderTokenizer) -> str:
    return f"{tokenizer.prompt_format or PROMPTS_OF_ITS_OWN}; {tokenizer.format_reason}"


def _notes(
    folder: Path, name: str, layouts: Sequence[Layout], config: Mapping[str, Any], tokenizer: FolderTokenizer | None
) -> tuple[str, ...]:
    notes = [] if tokenizer is None else list(tokenizer.remarks)
    if (folder / ADAPTER_CONFIG_NAME).exists():
        notes.append(ADAPTER_NEXT_TO_IT)
    if "hf" in layouts and config.get("model_type") == "mistral":
        is_ours = is_named_mistral_large(name) or (len(layouts) > 1 and not is_another_model(config))
        unless = UNLESS_NAMED if is_ours else UNLESS_RENAMED
        notes.append(STOCK_CLASSES.format(unless=unless, text=json.dumps(name)))
    return tuple(notes)


def _licence(folder: Path) -> str | None:
    names = [name for name in LICENCE_NAMES if file_problem(folder, name) is None]
    if not names:
        return None
    is_research = is_research_licence({name: (folder / name).read_bytes() for name in names})
    return "Mistral AI Research License" if is_research else f"its own: {', '.join(names)}"
