"""A GGUF file of any source that is converted, made by llama.cpp's own converter and llama-quantize."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from mistral_large_conversion.checkpoint.atomic_write import commit_file, json_bytes
from mistral_large_conversion.checkpoint.layout import TOKENIZER_CONFIG_NAME, TOKENIZER_JSON_NAME, TOKENIZER_STEM
from mistral_large_conversion.checkpoint.safetensors_header import BYTES_OF, FileTensor
from mistral_large_conversion.checkpoint.source_files import shown
from mistral_large_conversion.convert import Conversion, prepare_conversion
from mistral_large_conversion.destination import check_destination
from mistral_large_conversion.errors import (
    CheckpointError,
    DestinationError,
    MissingLibraryError,
    MistralLargeError,
    SettingError,
)
from mistral_large_conversion.folder_tokenizer import FolderTokenizer, PromptFormat, read_folder_tokenizer
from mistral_large_conversion.plan import OutputDtype
from mistral_large_conversion.progress import Progress
from mistral_large_conversion.vocabulary import VOCAB_SIZE, VOCABULARIES

CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
REPOSITORY = "https://github.com/ggml-org/llama.cpp"
# Bits a weight. The converter writes these types itself.
CONVERTER_TYPES = {"BF16": 16.0, "F16": 16.0, "F32": 32.0, "Q8_0": 8.5}
# These are mixtures: the figures are llama-quantize's for the shapes of the 123 B model.
QUANTIZER_TYPES = {
    "Q2_K": 2.95,
    "Q3_K_S": 3.45,
    "Q3_K_M": 3.86,
    "Q3_K_L": 4.21,
    "Q4_K_S": 4.54,
    "Q4_K_M": 4.78,
    "Q5_K_S": 5.5,
    "Q5_K_M": 5.64,
    "Q6_K": 6.56,
}
GGUF_TYPES = {**CONVERTER_TYPES, **QUANTIZER_TYPES}
# Of what a tool has printed, an error quotes the end.
QUOTED_LINES = 30
# How often the size of what a tool writes is looked at.
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class GgufConversion:
    """A conversion to a GGUF file that can begin.

    conversion: into the folder of stock Mistral that the converter reads, with the small files that it needs.
    name: of the model, which the file states.
    converter, quantizer: llama.cpp's tools; without a quantizer, the converter writes the type itself.
    """

    conversion: Conversion
    destination: Path
    gguf_type: str
    name: str
    converter: Path
    quantizer: Path | None

    @property
    def converted_type(self) -> str:
        """What the converter writes: for llama-quantize the dtype of the weights, so that they are rounded once."""
        return self.gguf_type if self.quantizer is None else self.conversion.plan.dtype

    @property
    def weight_files(self) -> tuple[Path, ...] | None:
        """The source's own files of weights, if the converter can read these; None if they have to be written anew."""
        tensors = [tensor for file in self.conversion.plan.files for tensor in file.tensors]
        sources = [tensor.source for tensor in tensors if isinstance(tensor.source, FileTensor)]
        is_same = all(not tensor.steps and tensor.source.name == tensor.outputs[0].name for tensor in tensors)
        return tuple(sorted({source.path for source in sources})) if is_same else None

    @property
    def folder_bytes(self) -> int:
        """Bytes of the temporary folder of stock Mistral."""
        return 0 if self.weight_files is not None else self.conversion.needed_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the GGUF file, estimated."""
        return self._estimated_bytes(self.gguf_type)

    @property
    def step_bytes(self) -> tuple[int, ...]:
        """Bytes that each step writes, estimated: the temporary folder, the converter's file, llama-quantize's."""
        quantized = () if self.quantizer is None else (self.file_bytes,)
        return (self.folder_bytes, self._estimated_bytes(self.converted_type), *quantized)

    @property
    def needed_bytes(self) -> int:
        """The most bytes that are on the disk at once: of a step and of the one before it."""
        return max(map(sum, zip(self.step_bytes, self.step_bytes[1:], strict=False)))

    def _estimated_bytes(self, gguf_type: str) -> int:
        plan = self.conversion.plan
        weights = plan.tensor_bytes // BYTES_OF[plan.dtype]
        return int(weights * GGUF_TYPES[gguf_type] / 8) + len(self.conversion.small_files.get(TOKENIZER_STEM, b""))

    def check_destination(self) -> None:
        """Refuse, before anything is written, a name that is taken, a place in the source, or a disk without room.

        Raises:
            DestinationError: such a destination.
        """
        self._refuse_taken_name()
        check_destination(self.conversion.source, self.destination, self.needed_bytes)

    def _refuse_taken_name(self) -> None:
        if os.path.lexists(self.destination):
            raise DestinationError(f"{self.destination}: is there already; choose a new name, or remove it first")

    def run(self, progress: Progress) -> None:
        """Write the file, whole or not at all; what is temporary is next to it and is removed in any case.

        progress: is told the bytes that the steps write.

        Raises:
            CheckpointError: a source that cannot be read to its end.
            DestinationError: a tool that fails, with the end of what it printed, or a file that cannot be written.
        """
        self.check_destination()
        try:
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            name, folder = self.destination.name, self.destination.parent
            # The tools run in it and get no other name: the converter takes braces in a name for a template.
            with TemporaryDirectory(prefix=f"{name}.partial-", dir=folder) as work:
                self._run_tools(Path(work), progress)
                # The tools run for hours: someone else may have taken it.
                self._refuse_taken_name()
                commit_file(self.destination, Path(work, "written.gguf"))
        except MistralLargeError:
            raise
        except OSError as error:
            raise DestinationError(
                f"{self.destination}: not written: {error}; when that is fixed, run it again"
            ) from error

    def _run_tools(self, work: Path, progress: Progress) -> None:
        folder = work / "mistral"
        if self.weight_files is None:
            replace(self.conversion, destination=folder).run(progress=progress)
        else:
            folder.mkdir()
            for path in self.weight_files:
                (folder / path.name).symlink_to(path.resolve())
            for name, content in self.conversion.small_files.items():
                (folder / name).write_bytes(content)
        converted = work / ("written.gguf" if self.quantizer is None else "converted.gguf")
        options = ("--outfile", converted.name, "--outtype", self.converted_type.lower(), "--model-name", self.name)
        self._run_tool((sys.executable, str(self.converter), folder.name, *options), converted, progress)
        if self.quantizer is not None:
            shutil.rmtree(folder)
            written = work / "written.gguf"
            self._run_tool((str(self.quantizer), converted.name, written.name, self.gguf_type), written, progress)

    def _run_tool(self, command: Sequence[str], output: Path, progress: Progress) -> None:
        log, told = output.with_suffix(".log"), 0
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, cwd=output.parent, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
            )
            try:
                while process.poll() is None:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(POLL_SECONDS)
                    size = output.stat().st_size if output.exists() else told
                    progress(size - told)
                    told = size
            except BaseException:
                process.kill()
                process.wait()
                raise
        if process.returncode:
            tool = CONVERTER if str(self.converter) in command else QUANTIZER
            printed = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            said = "\n".join(printed[-QUOTED_LINES:]) or "nothing"
            raise DestinationError(
                f"{self.destination}: not written: {tool} ended with exit code {process.returncode}; when what it "
                f"printed last is fixed, run it again:\n{said}"
            )


def prepare_gguf(
    source: Path,
    destination: Path,
    *,
    name: str,
    gguf_type: str | None = None,
    llama_cpp: Path,
    quantizer: Path | None = None,
    dtype: OutputDtype | None = None,
    adapter: Path | str | None = None,
    prompt_format: PromptFormat | None = None,
) -> GgufConversion:
    """Check a source and llama.cpp, and make ready all that writes a GGUF file; nothing is written.

    source: a folder of either layout.
    name: of the model, which the file states.
    gguf_type: of the weights; without it, their own dtype.
    llama_cpp: a checkout of llama.cpp.
    quantizer: llama-quantize or the folder that holds it; without it, it is looked for where llama.cpp is built, and
        on the PATH.
    dtype, adapter, prompt_format: see `convert_checkpoint`.

    Raises:
        SettingError: a type that is not one of `GGUF_TYPES`, or a quantizer for one that needs none.
        MissingLibraryError: llama.cpp is not there.
        CheckpointError, TokenizerFileError: the reasons of `convert_checkpoint`, and a tokenizer that the converter
            would not take exactly.
    """
    chosen = None if gguf_type is None else gguf_type.upper()
    if chosen is not None and chosen not in GGUF_TYPES:
        raise SettingError(f"GGUF type {shown(gguf_type)}: must be one of {', '.join(GGUF_TYPES)}")
    if chosen not in QUANTIZER_TYPES and quantizer is not None:
        raise SettingError(
            f"{QUANTIZER} {quantizer}: has no effect: {CONVERTER} writes {chosen or 'the dtype of the weights'} "
            "itself; leave it out"
        )
    converter = (llama_cpp / CONVERTER).absolute()
    if not converter.is_file():
        raise MissingLibraryError(
            f"{llama_cpp}: no {CONVERTER} in it; get llama.cpp with `git clone {REPOSITORY}` and give its folder"
        )
    tool = find_quantizer(llama_cpp, quantizer) if chosen in QUANTIZER_TYPES else None
    conversion = prepare_conversion(
        source, destination, model_type="mistral", dtype=dtype, adapter=adapter, prompt_format=prompt_format
    )
    if conversion.plan.dtype not in CONVERTER_TYPES:
        raise SettingError(f"{source}: weights of {conversion.plan.dtype}, which GGUF has not; ask for another dtype")
    tokenizer = read_folder_tokenizer(source, prompt_format=prompt_format)
    small_files = {**conversion.small_files, **vocabulary_files(conversion.small_files, tokenizer)}
    return GgufConversion(
        replace(conversion, small_files=small_files),
        destination,
        chosen or conversion.plan.dtype,
        name,
        converter,
        tool,
    )


def find_quantizer(llama_cpp: Path, quantizer: Path | None) -> Path:
    """Return the path of llama-quantize: the given one, or in the folder where it is given or built, or on the PATH.

    Raises:
        MissingLibraryError: it is in none of these.
    """
    places: tuple[Path, ...]
    if quantizer is None:
        places = (llama_cpp / "build" / "bin" / QUANTIZER, Path(QUANTIZER))
    else:
        places = (quantizer / QUANTIZER if quantizer.is_dir() else quantizer,)
    for place in places:
        # Of a bare name, the PATH is searched.
        if found := shutil.which(place):
            return Path(found).absolute()
    looked = f"neither at {places[0]} nor on the PATH" if quantizer is None else f"no program at {places[0]}"
    raise MissingLibraryError(
        f"{QUANTIZER}: {looked}; build it with `cmake -B build && cmake --build build --target {QUANTIZER}` in "
        f"{llama_cpp}, or say where it is"
    )


def vocabulary_files(small_files: dict[str, bytes], tokenizer: FolderTokenizer) -> dict[str, bytes]:
    """The files from which the converter takes a vocabulary exactly, next to those of stock Mistral.

    Without tokenizer.model it reads tokenizer.json, takes the control tokens for ordinary ones and loses the scores.
    With its space before each text, the one that the chat template writes would be doubled. Tokens that were added it
    knows from tokenizer_config.json alone.

    Raises:
        CheckpointError: another vocabulary, which the converter would read without the scores.
    """
    if tokenizer.vocabulary is None:
        decoder = json.loads(small_files.get(TOKENIZER_JSON_NAME, b"{}")).get("decoder")
        if '"ByteLevel"' not in json.dumps(decoder):
            raise CheckpointError(
                f"{tokenizer.folder}: {tokenizer.remarks[-1]}; {CONVERTER} loses the scores of such a vocabulary, and "
                "prompts would become other ids; convert it with llama.cpp alone if that is right"
            )
        # Of these it proves by a hash that llama.cpp splits texts in the same way, and stops if it does not.
        return {}
    settings = json.loads(small_files[TOKENIZER_CONFIG_NAME])
    settings["add_prefix_space"] = False
    settings["added_tokens_decoder"] = {
        str(VOCAB_SIZE + index): {"content": token.content, "special": token.special}
        for index, token in enumerate(tokenizer.added)
    }
    return {
        TOKENIZER_STEM: small_files[VOCABULARIES[tokenizer.vocabulary].file_name],
        TOKENIZER_CONFIG_NAME: json_bytes(settings),
    }
