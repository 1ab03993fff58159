"""Conversions to calibrated int4: the data, as token sequences of the source's own prompts, and the plan."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mistral_large_conversion import Conversion, ConversionPlan, prepare_conversion
from mistral_large_conversion.checkpoint.calibration import Calibration
from mistral_large_conversion.checkpoint.hub import resolve_conversion_source
from mistral_large_conversion.checkpoint.layout import Layout
from mistral_large_conversion.errors import CheckpointError, SampleFileError, SettingError
from mistral_large_conversion.folder_tokenizer import PromptFormat
from mistral_large_conversion.model_card import ModelType
from mistral_large_conversion.plan import DEFAULT_SHARD_SIZE, OutputDtype
from mistral_large_conversion.progress import Progress
from mistral_large_conversion.samples import Sample, read_samples
from modeling_mistral_large.any_folder import load_tokenizer
from modeling_mistral_large.calibration.layers import LayerCalibrator
from modeling_mistral_large.configuration_mistral_large import MistralLargeConfig
from modeling_mistral_large.quantization.gptq import DAMPING
from modeling_mistral_large.streamed.token_sequences import DEFAULT_LENGTH, TokenSequence, tokenize_samples

DEFAULT_DATA = "default"
DEFAULT_FILE = Path(__file__).parent / "default.jsonl"
# More data changes little: the memory of a Hessian does not depend on it, and the time does.
DEFAULT_SAMPLES = 256
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class CalibrationData:
    """Token sequences of a file, and what is said of the ones that were left out."""

    name: str
    sha256: str
    sequences: tuple[tuple[int, ...], ...]
    remarks: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))

    @property
    def tokens_sha256(self) -> str:
        checksum = hashlib.sha256()
        for ids in self.sequences:
            # A sequence cut elsewhere is another one.
            checksum.update(len(ids).to_bytes(4, "little"))
            checksum.update(b"".join(number.to_bytes(4, "little") for number in ids))
        return checksum.hexdigest()


def read_calibration_data(
    data: Path | str, tokenizer: PreTrainedTokenizerBase, *, samples: int | None = None, length: int = DEFAULT_LENGTH
) -> CalibrationData:
    """Read a file of samples, or the default one, as token sequences; see `tokenize_samples`.

    samples: how many sequences; without it, all, or the first 256 of more.
    length: the most tokens of a sequence.

    Raises:
        SampleFileError: a file that cannot be read, or a conversation in it that the prompt format does not have; or
            fewer sequences than `samples`.
        SettingError: a number that means nothing.
    """
    _check_numbers(samples, length)
    is_default = str(data) == DEFAULT_DATA
    path = DEFAULT_FILE if is_default else Path(data)
    found = read_samples(path)
    left_out = 0
    if is_default:
        renderable = [sample for sample in found if _is_rendered(sample, tokenizer)]
        left_out, found = len(found) - len(renderable), renderable or found
    limit = DEFAULT_SAMPLES if samples is None else samples
    sequences = tokenize_samples(found, tokenizer, length=length, limit=limit, scores_prompts=True)
    if samples is not None and len(sequences) < samples:
        raise SampleFileError(
            f"{path}: {len(sequences)} sequences of at most {length} tokens, {samples} asked for; take a longer file, "
            "or fewer samples"
        )
    remarks = _remarks(sequences, left_out)
    content = path.read_bytes()
    ids = tuple(sequence.ids for sequence in sequences)
    name = DEFAULT_DATA if is_default else path.name
    return CalibrationData(name, hashlib.sha256(content).hexdigest(), ids, remarks)


def _check_numbers(samples: int | None, length: int) -> None:
    for name, value, least in (("samples", samples, 1), ("length", length, 2)):
        if value is not None and (type(value) is not int or value < least):
            raise SettingError(f"{name} {value!r}: must be a whole number, {least} or more")


def _is_rendered(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        tokenize_samples([sample], tokenizer, scores_prompts=True)
    except SampleFileError:
        return False
    return True


def _remarks(sequences: Sequence[TokenSequence], left_out: int) -> tuple[str, ...]:
    remarks = []
    if left_out:
        remarks.append(
            f"calibration: {left_out} default conversations left out, which the chat template of the source refuses"
        )
    if cut := sum(sequence.is_cut for sequence in sequences):
        remarks.append(f"calibration: of {cut} conversations only the start is taken, as they are longer than --length")
    return tuple(remarks)


def prepare_calibrated_conversion(
    source: Path | str,
    destination: Path | str,
    *,
    calibration: Path | str = DEFAULT_DATA,
    samples: int | None = None,
    length: int = DEFAULT_LENGTH,
    device: str | None = None,
    to: Layout = "hf",
    model_type: ModelType = "mistral_large",
    dtype: OutputDtype | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    adapter: Path | str | None = None,
    prompt_format: PromptFormat | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | str | None = None,
) -> Conversion:
    """Check a source and the data, and make ready all that `convert_calibrated` does; nothing is written.

    to, dtype: there for what `convert_checkpoint` says of them with a quantization.

    Raises:
        CheckpointError, TokenizerFileError, SampleFileError, SettingError: the reasons of `convert_calibrated`.
    """
    # What takes no time comes first.
    _check_numbers(samples, length)
    where = _device(device)
    folder = resolve_conversion_source(source, to="hf", revision=revision, token=token, cache_dir=cache_dir)
    options: dict[str, Any] = {
        "to": to,
        "dtype": dtype,
        "quantize": "int4",
        "max_shard_size": max_shard_size,
        "adapter": adapter,
        "prompt_format": prompt_format,
    }
    # What is converted without data has the small files of what is calibrated, but for the card.
    rounded = prepare_conversion(folder, destination, **options)
    tokenizer, config = _read_small_files(rounded.small_files)
    data = read_calibration_data(calibration, tokenizer, samples=samples, length=length)
    largest = max(max(ids) for ids in data.sequences)
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"{folder}: the calibration data has token {largest}, the model {config.vocab_size} embeddings; the "
            "tokenizer must be the model's; take the folder with its own"
        )
    assert rounded.plan.quantization is not None
    is_bf16 = rounded.plan.source_dtypes == ("BF16",)
    computes_in = torch.bfloat16 if where.type == "cuda" and is_bf16 else torch.float32
    calibrator = LayerCalibrator(
        calibration=Calibration(
            data=data.name,
            data_sha256=data.sha256,
            samples=len(data.sequences),
            length=length,
            tokens=data.tokens,
            tokens_sha256=data.tokens_sha256,
            damping=DAMPING,
            device=where.type,
            dtype=str(computes_in).removeprefix("torch."),
        ),
        sequences=data.sequences,
        config=config,
        group_size=rounded.plan.quantization.group_size,
        dtype=computes_in,
        device=where,
    )
    conversion = prepare_conversion(folder, destination, model_type=model_type, calibrator=calibrator, **options)
    return replace(conversion, remarks=(*conversion.remarks, *data.remarks))


def _read_small_files(files: Mapping[str, bytes]) -> tuple[PreTrainedTokenizerBase, MistralLargeConfig]:
    """Return tokenizer and config of a folder with these small files: prompts are those of the converted model."""
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        config = MistralLargeConfig.from_pretrained(folder)
        with warnings.catch_warnings():
            # The remarks of the conversion say it of the source.
            warnings.simplefilter("ignore")
            tokenizer = load_tokenizer(folder, {})
    # The decoder layers are of plain linear layers until they are quantized.
    del config.quantization_config
    return tokenizer, config


def convert_calibrated(
    source: Path | str,
    destination: Path | str,
    *,
    calibration: Path | str = DEFAULT_DATA,
    samples: int | None = None,
    length: int = DEFAULT_LENGTH,
    device: str | None = None,
    jobs: int | None = None,
    progress: Progress | bool = True,
    **options: Any,
) -> ConversionPlan:
    """Convert the checkpoint in `source` to calibrated int4, in the layout and the files of `quantize="int4"`.

    Codes and scales are chosen by GPTQ, layer by layer: one decoder layer is in memory, and the activations of all
    sequences are in a file of the destination until they are used. An interrupted conversion goes on at the layer it
    had come to. The same data, settings, device, number of torch's threads and version of torch give the same bytes.

    calibration: a file of texts or conversations, see `read_samples`; "default" for the one that this package brings.
    samples, length: see `read_calibration_data`.
    device: "cpu" or "cuda"; without it, the GPU where there is one.
    jobs, progress: see `convert_checkpoint`; they hold for what is not calibrated, too.
    options: those of `convert_checkpoint`, with which it refuses what does not go with int4.

    Raises:
        CheckpointError: a source that is not a complete, sound checkpoint of finite weights, or is quantized.
        TokenizerFileError, DestinationError: the reasons of `convert_checkpoint`.
        SampleFileError: data that cannot be read, or that the source's prompt format does not have.
        SettingError: a device that is not there, or a number that means nothing.
    """
    conversion = prepare_calibrated_conversion(
        source, destination, calibration=calibration, samples=samples, length=length, device=device, **options
    )
    conversion.run(jobs=jobs, progress=progress)
    return conversion.plan


def _device(name: str | None) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if has_gpu else "cpu")
    if name not in DEVICES:
        raise SettingError(f"device {name!r}: must be one of {', '.join(map(repr, DEVICES))}")
    if name == "cuda" and not has_gpu:
        raise SettingError("device 'cuda': torch finds no GPU; calibrating takes the CPU or a CUDA GPU; pass 'cpu'")
    return torch.device(name)
