"""What vLLM is told of a Mistral Large checkpoint, of its adapter and its tokenizer, and what cannot be served so."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_large_conversion.checkpoint.adapter_config import largest_rank
from mistral_large_conversion.checkpoint.adapter_folder import (
    ADAPTER_MARKS,
    adapter_layout,
    is_other_base,
    require_adapter,
)
from mistral_large_conversion.checkpoint.hub import find_small_file, refuse_adapter, resolve_adapter
from mistral_large_conversion.checkpoint.layout import CONFIG_NAME
from mistral_large_conversion.checkpoint.params import PARAMS_NAME
from mistral_large_conversion.checkpoint.source_files import (
    ADAPTER_CONFIG_NAME,
    adapter_problem,
    file_problem,
    read_adapter_base,
    read_json_object,
)
from mistral_large_conversion.errors import CheckpointError

# Calls as tool_calls, and no tools in the prompt of a request that wants none called.
TOOL_OPTIONS = (
    "--enable-auto-tool-choice",
    *("--tool-call-parser", "mistral"),
    "--exclude-tools-when-tool-choice-none",
)
CONSOLIDATED_OPTIONS = ("--load-format", "mistral", "--config-format", "mistral", "--tokenizer-mode", "mistral")
# The ranks that vLLM reserves memory for.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def base_of_adapter(model: str, options: dict[str, Any]) -> str | None:
    """Return the base of the adapter in `model`, a folder or a repository, None where it is a checkpoint.

    Raises:
        CheckpointError: an adapter that names none.
    """

    folder = Path(model)
    # Only a repository has to be looked for with the library.
    if not folder.is_dir():
        from modeling_mistral_large.adapter_loading import adapter_folder

        folder = adapter_folder(model, options) or folder
    if adapter_problem(folder) is None:
        return None
    base = read_adapter_base(folder)
    if base is None:
        refuse_adapter(folder, name=model)
    return base


def refuse_unserved_adapter(folder: Path, adapter: Path | None) -> None:
    """Refuse a checkpoint with an adapter next to it, which vLLM passes over or takes for weights.

    adapter: the folder of the one that is served.

    Raises:
        CheckpointError: such a folder, unless it is that adapter's.
    """
    layout = adapter_layout(folder)
    if layout is None or (layout == "hf" and adapter is not None and adapter.resolve() == folder.resolve()):
        return
    mark = ADAPTER_MARKS[layout]
    way_out = f"give --adapter {folder}, or move {mark} elsewhere" if layout == "hf" else f"move {mark} elsewhere"
    raise CheckpointError(f"{folder}: holds {mark} next to the checkpoint, which vLLM would not apply; {way_out}")


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that is served on a base.

    given: as the user named it.
    folder: where it is on this machine.
    name: the model's name in requests.
    base: that which it names where it is called otherwise than the one it is served on, else None.
    """

    given: str
    folder: Path
    name: str
    base: str | None


def served_adapter(adapter: str, model: str, options: dict[str, Any]) -> ServedAdapter:
    """Return how an adapter, a folder or a repository, is served on a base.

    options: those of `from_pretrained` for it.

    Raises:
        CheckpointError: no adapter, or one that is not available.
    """

    folder, name = resolve_adapter(adapter, **options)
    require_adapter(folder)
    try:
        base = read_adapter_base(folder)
    except CheckpointError:
        # It names none, or cannot be read, which loading it says.
        base = None
    base = base if is_other_base(base, model) else None
    return ServedAdapter(adapter, folder, name, base)


def vllm_lora_options(lora: ServedAdapter, model: str) -> tuple[str, ...]:
    """Return how vLLM is told of an adapter of PEFT.

    Raises:
        CheckpointError: an adapter that it does not load, and the way out.
    """

    if adapter_layout(lora.folder) == "consolidated":
        raise CheckpointError(
            f"{lora.given}: vLLM loads adapters of PEFT only; convert it with `mistral-large convert {lora.given} "
            "DESTINATION --to hf` and give that, or take --engine transformers"
        )
    path = lora.folder / ADAPTER_CONFIG_NAME
    try:
        rank = largest_rank(read_json_object(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; save or download it again") from error
    largest = next((each for each in VLLM_RANKS if each >= rank), None)
    if largest is None:
        raise CheckpointError(
            f"{lora.given}: rank {rank}, vLLM loads adapters up to {VLLM_RANKS[-1]}; merge it with `mistral-large "
            f"convert {model} DESTINATION --adapter {lora.given}` and serve that, or take --engine transformers"
        )
    module = f"{lora.name}={lora.folder.absolute()}"
    return ("--enable-lora", "--max-lora-rank", str(largest), "--lora-modules", module)


def vllm_tokenizer_options(model: str, hub: dict[str, Any], options: Sequence[str]) -> tuple[str, ...]:
    """Return how vLLM is told to take our prompts for a checkpoint of type `mistral`, of which it takes stock ones.

    model: a folder or repository in the HF layout; `hub` are the options of `reachable_options` for it.
    options: those that are passed on to vLLM.

    Raises:
        CheckpointError: our tokenizer does not know the folder's vocabulary.
        TokenizerFileError: a folder whose tokenizer cannot be read.
    """
    from mistral_large_conversion.folder_tokenizer import read_folder_tokenizer

    names = {option.partition("=")[0].replace("_", "-") for option in options}
    if names & {"--tokenizer", "--tokenizer-mode"}:
        return ()
    config = find_small_file(model, CONFIG_NAME, hub)
    if config is None or file_problem(config.parent, config.name):
        return ()
    try:
        model_type = read_json_object(config).get("model_type")
    except (OSError, ValueError):
        # vLLM says what is wrong with it.
        return ()
    # A repository with both layouts is consolidated for vLLM, as a folder is.
    if model_type != "mistral" or (not Path(model).is_dir() and find_small_file(model, PARAMS_NAME, hub) is not None):
        return ()
    if Path(model).is_dir():
        tokenizer = read_folder_tokenizer(model, layout="hf")
        if tokenizer.vocabulary is None:
            raise CheckpointError(
                f"{model}: {tokenizer.remarks[-1]}; prompts of vLLM would be no better; add --tokenizer-mode hf to "
                "serve it so"
            )
    return ("--tokenizer-mode", "mistral_large")
