"""What a folder holds, from names, small files and headers alone."""

import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open

from modeling_mistral_large.chat_templates import prompt_format_of
from modeling_mistral_large.configuration_mistral_large import MistralLargeConfig
from modeling_mistral_large.conversion.destination import PARTIAL_SUFFIX, UNFINISHED_NAME, json_bytes
from modeling_mistral_large.conversion.hf_files import (
    ARCHITECTURES,
    CHAT_TEMPLATE_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    MODEL_CARD_NAME,
    SPECIAL_IDS,
)
from modeling_mistral_large.conversion.hub import fetch_headers, is_out_of_reach, is_repository_id, resolve_source
from modeling_mistral_large.conversion.manifest import MANIFEST_NAME, Manifest, ManifestFile, read_manifest
from modeling_mistral_large.conversion.model_card import (
    AGREEMENT_NAME,
    LICENCE_NAMES,
    NOTICE_NAME,
    is_research_licence,
    licence_files,
)
from modeling_mistral_large.conversion.names import expected_tensors, unwrapped_name
from modeling_mistral_large.conversion.params import PARAMS_NAME, params_from_config
from modeling_mistral_large.conversion.plan import (
    CONFIG_NAMES,
    TOKENIZER_NAME,
    WEIGHTS_STEM,
    Layout,
    quantization_in,
    read_checkpoint,
)
from modeling_mistral_large.conversion.quantize import FORMATS, Quantization, is_part, is_quantized, quantization_of
from modeling_mistral_large.conversion.safetensors_header import TORCH_NAMES, FileTensor
from modeling_mistral_large.conversion.source_files import adapter_finding, file_finding, read_json_object, shown
from modeling_mistral_large.errors import CheckpointError

ADDITIONAL_TEMPLATES_NAME = "additional_chat_templates"
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", TOKENIZER_NAME)
ADAPTER_KIND = "an adapter (PEFT)"
WRAPPED = (
    "tensor {name!r} has the name of a wrapper in its name, from torch.compile or a trainer: loaders do not find it, "
    "`mistral-large convert` does"
)
LAYOUT_NAMES: dict[Layout, str] = {"consolidated": "the vendor's consolidated layout", "hf": "HF layout"}
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
# What loads a folder, by what it is; `text` and `word` are its name in Python and in a shell.
PIPELINE = 'transformers.pipeline("text-generation", {text}, dtype="auto", device_map="auto")'
LOADS_WITH: dict[str, tuple[str, ...]] = {
    "consolidated": (
        "import modeling_mistral_large; modeling_mistral_large.MistralLargeForCausalLM.from_pretrained({text})",
        "vllm serve {word} --load-format mistral --config-format mistral --tokenizer-mode mistral",
    ),
    "mistral_large": (
        f"import modeling_mistral_large, transformers; {PIPELINE}",
        "vllm serve {word}  # with this package installed beside it; other engines: mistral-large retag --as mistral",
    ),
    "mistral": (f"import transformers; {PIPELINE}", "vllm serve {word}"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers are sound."""

    folder: Path
    layout: Layout
    config: MistralLargeConfig
    tensors: dict[str, FileTensor]

    @property
    def dtype(self) -> str:
        """That of the weights, or of those that are not quantized."""
        return self.tensors[getattr(expected_tensors(self.config)[0], self.layout)].dtype

    @property
    def quantization(self) -> tuple[Quantization, int] | None:
        """How the weights are quantized and in groups of how many, or None."""
        return quantization_in(self.config)

    @property
    def parameters(self) -> int:
        """How many numbers the model has, quantized or not."""
        return sum(math.prod(tensor.shape) for tensor in expected_tensors(self.config))

    @property
    def bits_per_weight(self) -> float | None:
        """Bits in the file, with scales, of a quantized weight, or None if none is."""
        if self.quantization is None:
            return None
        weights = sum(math.prod(tensor.shape) for tensor in expected_tensors(self.config) if is_quantized(tensor.hf))
        return 8 * sum(tensor.size for tensor in self.tensors.values() if is_part(tensor.name)) / weights


@dataclass(frozen=True)
class Inspection:
    """What a folder is, what it holds, what loads it and what is wrong with it.

    geometry: under the names of params.json, or None if nothing sound says it.
    bits_per_weight: in the file, with scales, of the weights that are quantized as we do it; else None.
    dtypes: numbers of tensors by dtype, as safetensors names it.
    file_bytes: of the files of weights; `None` for one that cannot be read.
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
    licence: str | None
    loads_with: tuple[str, ...]
    findings: tuple[str, ...]


def layouts_of(folder: Path) -> list[Layout]:
    """The layouts of which a folder holds weights, or else the geometry; the first is the one that is read."""
    with_weights: list[Layout] = [
        layout for layout, stem in WEIGHTS_STEM.items() if any(folder.glob(f"{stem}*.safetensors"))
    ]
    return with_weights or [layout for layout, name in CONFIG_NAMES.items() if (folder / name).exists()]


def load_headers(folder: Path, layout: Layout | None = None, *, may_mix_dtypes: bool = False) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        CheckpointError: the reasons of `read_checkpoint`.
    """
    if layout is None:
        layouts = layouts_of(folder) if folder.is_dir() else []
        layout = layouts[0] if layouts else "consolidated"
    config, tensors = read_checkpoint(
        folder, layout, needs_tokenizer=False, may_mix_dtypes=may_mix_dtypes, may_be_quantized=True
    )
    return Checkpoint(folder, layout, config, {tensor.name: tensor for tensor in tensors})


def inspect_checkpoint(source: Path | str) -> Inspection:
    """Say what a folder or a repository on the hub holds; what is wrong is a finding, not an error.

    Raises:
        CheckpointError: neither a folder nor a repository that can be read.
    """
    if Path(source).is_dir():
        return _inspect(Path(source), str(source))
    if Path(source).exists() or not is_repository_id(str(source)):
        return _inspect(resolve_source(source), str(source))
    if is_out_of_reach(str(source)):
        return _inspect(resolve_source(source, local_files_only=True), str(source))
    with TemporaryDirectory() as folder:
        fetch_headers(str(source), Path(folder))
        return _inspect(Path(folder), str(source))


def _inspect(folder: Path, name: str) -> Inspection:
    try:
        layouts = layouts_of(folder)
        findings = unfinished_findings(folder)
        adapter = adapter_finding(folder)
        is_unfinished = bool(findings)
        config, config_findings_ = _settings(folder)
        quantization = _quantization(config, layouts)
        dtypes, parameters, file_bytes, file_findings, name_findings = _weights(folder, layouts)
        checkpoint = None
        if adapter is not None:
            findings.append(adapter)
        elif layouts and (quantization is None or quantization_of((config or {}).get("quantization_config"))):
            try:
                checkpoint = load_headers(folder, layouts[0])
            except CheckpointError as error:
                findings += finding_lines(error)
        else:
            findings += config_findings_ + file_findings
        if not layouts and adapter is None:
            findings.append(f"no {' and no '.join(CONFIG_NAMES.values())}: not a checkpoint")
        if checkpoint is not None:
            findings += name_findings + config_findings(checkpoint, None)
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            findings += finding_lines(error)
        else:
            findings += [] if manifest is None or manifest.files is None else manifest_findings(folder, manifest)
        if "hf" in layouts[:1]:
            findings += chat_template_findings(folder)
        if layouts:
            findings += [finding for file in _tokenizer_names(layouts[0]) if (finding := file_finding(folder, file))]
            findings += licence_findings(folder, None, layouts[0])
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read: {error}") from error
    model_type = None if config is None else config.get("model_type")
    reader = layouts[0] if layouts[:1] == ["consolidated"] else str(model_type)
    is_loadable = checkpoint is not None and not is_unfinished and not name_findings
    loaders = LOADS_WITH.get(reader, ()) if is_loadable else ()
    return Inspection(
        name=name,
        kind=_kind(layouts, model_type, quantization, is_unfinished) if adapter is None else ADAPTER_KIND,
        geometry=None if checkpoint is None else params_from_config(checkpoint.config),
        bits_per_weight=None if checkpoint is None else checkpoint.bits_per_weight,
        dtypes=dict(dtypes),
        tensors=sum(dtypes.values()),
        parameters=parameters if checkpoint is None else checkpoint.parameters,
        file_bytes=file_bytes,
        tokenizer=tuple(file for file in TOKENIZER_NAMES if (folder / file).exists()),
        licence=_licence(folder),
        loads_with=tuple(call.format(text=json.dumps(name), word=shlex.quote(name)) for call in loaders),
        findings=tuple(findings),
    )


def finding_lines(error: CheckpointError) -> list[str]:
    """The findings that an error lists, or the error itself if it lists none."""
    heading, *findings = str(error).splitlines()
    return [finding.strip() for finding in findings] or [heading]


def unfinished_findings(folder: Path) -> list[str]:
    """What shows that a conversion did not end in a folder."""
    return [
        f"{path.name}: an unfinished conversion; run it again"
        for path in sorted(folder.iterdir())
        if path.name == UNFINISHED_NAME or path.name.endswith(PARTIAL_SUFFIX)
    ]


def config_findings(checkpoint: Checkpoint, origin: Checkpoint | None) -> list[str]:
    """Where the small JSON files say something else than the weights, each other, or the source."""
    findings = []
    if origin is not None:
        own, others = params_from_config(checkpoint.config), params_from_config(origin.config)
        findings += [f"{key} is {own[key]}, the source's is {others[key]}" for key in own if own[key] != others[key]]
    if checkpoint.layout == "consolidated":
        return findings
    config = read_json_object(checkpoint.folder / CONFIG_NAME)
    torch_name = config.get("dtype", config.get("torch_dtype"))
    if torch_name != TORCH_NAMES[checkpoint.dtype]:
        findings.append(f"{CONFIG_NAME}: dtype is {shown(torch_name)}, the weights are {TORCH_NAMES[checkpoint.dtype]}")
    if config.get("architectures") != [ARCHITECTURES[config["model_type"]]]:
        findings.append(
            f"{CONFIG_NAME}: architectures {shown(config.get('architectures'))} of a {config['model_type']}"
        )
    if finding := file_finding(checkpoint.folder, GENERATION_CONFIG_NAME):
        return [*findings, finding]
    try:
        generation_config = read_json_object(checkpoint.folder / GENERATION_CONFIG_NAME)
    except (OSError, ValueError) as error:
        return [*findings, f"{GENERATION_CONFIG_NAME}: {error}"]
    return findings + [
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


def chat_template_findings(folder: Path) -> list[str]:
    """What is wrong with the chat template of an HF layout."""
    if finding := file_finding(folder, CHAT_TEMPLATE_NAME):
        return [finding]
    # With tools, transformers takes a template of this folder named `tool_use`; any of them can be asked for.
    more = folder / ADDITIONAL_TEMPLATES_NAME
    names = [CHAT_TEMPLATE_NAME, *sorted(f"{more.name}/{path.name}" for path in more.glob("*.jinja"))]
    findings = []
    for name in names:
        if finding := file_finding(folder, name) if name == CHAT_TEMPLATE_NAME else file_finding(more, Path(name).name):
            findings.append(finding)
        elif prompt_format_of((folder / name).read_bytes().decode("utf-8", errors="replace")) is None:
            findings.append(f"{name} is not the bundled one: prompts are what it renders")
    return findings


def manifest_findings(folder: Path, manifest: Manifest) -> list[str]:
    """Where the files of a folder are not those of its manifest; tensors have their own checksums.

    Files that were added are named if a loader reads such files.
    """
    findings = []
    present = {path.name for path in folder.iterdir()}
    if (folder / MANIFEST_NAME).read_bytes() != json_bytes(manifest.to_json()):
        findings.append(f"{MANIFEST_NAME} is not as a conversion writes it")
    for name, entry in (manifest.files or {}).items():
        # Anything may stand in a manifest: only names that are there are looked up.
        if name not in present:
            findings.append(f"{name} is missing")
        elif finding := file_finding(folder, name):
            findings.append(finding)
        elif ManifestFile.of_file(folder / name) != entry:
            findings.append(f"{name} has changed since the conversion")
    return findings + [
        f"{name!r} was added since the conversion: a loader may read it"
        for name in added_files(folder, manifest)
        if any(fnmatchcase(name.lower(), pattern) for pattern in READ_BY_LOADERS)
    ]


def added_files(folder: Path, manifest: Manifest) -> list[str]:
    """The names of what a folder holds beside a conversion: files, and folders, of which a conversion writes none."""
    known = {*(manifest.files or {}), MANIFEST_NAME, UNFINISHED_NAME}
    return sorted(
        path.name for path in folder.iterdir() if path.name not in known and not path.name.endswith(PARTIAL_SUFFIX)
    )


def licence_findings(folder: Path, origin: Checkpoint | None, layout: Layout) -> list[str]:
    """Which files are not there that must go with the weights.

    The vendor's own folder has none of them.
    """
    names = [name for name in (*LICENCE_NAMES, MODEL_CARD_NAME) if (folder / name).exists()]
    if layout == "consolidated" and not names:
        return []
    if findings := [finding for name in names if (finding := file_finding(folder, name))]:
        return findings
    present = {name: (folder / name).read_bytes() for name in names if name != MODEL_CARD_NAME}
    if origin is not None:
        wanted = licence_files(origin.folder)
        findings = [f"{name} is not the source's" for name in wanted if present.get(name) != wanted[name]]
    elif not present:
        findings = [f"no {AGREEMENT_NAME}: it must go with the weights"]
    elif is_research_licence(present):
        findings = [f"no {name}" for name in (AGREEMENT_NAME, NOTICE_NAME) if name not in present]
    if layout == "hf" and MODEL_CARD_NAME not in names:
        findings.append(f"no {MODEL_CARD_NAME}, which states the modification")
    return findings


def _settings(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The content of config.json or else params.json, or None with the reason."""
    name = next((name for name in (CONFIG_NAME, PARAMS_NAME) if (folder / name).exists()), None)
    if name is None:
        return None, []
    if finding := file_finding(folder, name):
        return None, [finding]
    try:
        return read_json_object(folder / name), []
    except ValueError as error:
        return None, [f"{name}: {error}"]


def _quantization(config: dict[str, Any] | None, layouts: Sequence[Layout]) -> str | None:
    """How the weights are quantized, or None."""
    settings = (config or {}).get("quantization_config") or (config or {}).get("quantization")
    if not settings or not layouts:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    ours = quantization_of(settings)
    if ours is None:
        return method if isinstance(method, str) and method else "by an unknown method"
    groups = f", groups of {ours[1]}" if ours[0] == "int4" else ""
    return f"{ours[0]}{groups} ({method}, {FORMATS[ours[0]]})"


def _weights(
    folder: Path, layouts: Sequence[Layout]
) -> tuple[Counter[str], int, dict[str, int | None], list[str], list[str]]:
    """Tensors by dtype, number of parameters and sizes of files of the layout that is read.

    Then what is wrong with the files, and with names that `convert` reads and no loader does.
    """
    dtypes: Counter[str] = Counter()
    wrapped = None
    parameters, file_bytes, findings = 0, dict[str, int | None](), []
    stem = WEIGHTS_STEM[layouts[0]] if layouts else ""
    for path in sorted(folder.glob(f"{stem}*.safetensors")):
        finding = file_finding(folder, path.name)
        file_bytes[path.name] = None if finding else path.stat().st_size
        if finding is None:
            try:
                with safe_open(path, "numpy") as opened:
                    for name in opened.keys():  # noqa: SIM118  # not a dict
                        if unwrapped_name(name) != name:
                            wrapped = name
                        tensor = opened.get_slice(name)
                        dtypes[tensor.get_dtype()] += 1
                        parameters += math.prod(tensor.get_shape())
            except SafetensorError as error:
                finding = f"{path.name}: {error}"
        findings += [finding] if finding else []
    name_findings = [] if wrapped is None else [WRAPPED.format(name=wrapped)]
    return dtypes, parameters, file_bytes, findings, name_findings


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


def _tokenizer_names(layout: Layout) -> tuple[str, ...]:
    return (TOKENIZER_NAME,) if layout == "consolidated" else TOKENIZER_NAMES


def _licence(folder: Path) -> str | None:
    names = [name for name in LICENCE_NAMES if file_finding(folder, name) is None]
    if not names:
        return None
    is_research = is_research_licence({name: (folder / name).read_bytes() for name in names})
    return "Mistral AI Research License" if is_research else f"its own: {', '.join(names)}"
