"""Checkpoints by the id of their repository on the Hugging Face hub: only what is needed of them is downloaded."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import huggingface_hub

from mistral_large_conversion.checkpoint.layout import (
    CONFIG_NAMES,
    OTHER_LAYOUT,
    WEIGHTS_STEM,
    Layout,
    is_consolidated,
)
from mistral_large_conversion.checkpoint.params import PARAMS_NAME
from mistral_large_conversion.checkpoint.safetensors_header import LARGEST_HEADER, LENGTH_BYTES
from mistral_large_conversion.checkpoint.source_files import (
    ADAPTER_CONFIG_NAME,
    LORA_NAME,
    adapter_problem,
)
from mistral_large_conversion.errors import CheckpointError, CheckpointNotFoundError

LICENCE_PATTERNS = ("LICENSE*", "NOTICE*", "Notice*")
# The vendor's repository holds a second copy of the weights, model-*.safetensors: another 245 GB.
CONSOLIDATED_FILES = (
    "params.json",
    "consolidated.safetensors",
    "consolidated-*.safetensors",
    "consolidated.safetensors.index.json",
    "tokenizer.model.v3",
    "tokenizer.model.v7",
    ADAPTER_CONFIG_NAME,
    LORA_NAME,
    *LICENCE_PATTERNS,
)
ADAPTER_FILES = (ADAPTER_CONFIG_NAME, "adapter_model.safetensors", "adapter_model.bin", LORA_NAME, "params.json")
# A hub that does not respond for so long is taken for out of reach; HF_HUB_ETAG_TIMEOUT is for slow networks.
ANSWER_SECONDS = 1.5
# A repository of which the cache has one of these may be read without the hub.
TELLING_FILES = (
    "config.json",
    "params.json",
    "tokenizer.json",
    "tokenizer.model.v3",
    "tokenizer.model.v7",
    ADAPTER_CONFIG_NAME,
)
# Options of `from_pretrained` that say where in the hub and how to get it.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")
# Most headers are shorter.
FIRST_BYTES = 100_000
HF_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "README.md",
    ADAPTER_CONFIG_NAME,
    LORA_NAME,
    *LICENCE_PATTERNS,
)


def resolve_source(
    source: Path | str,
    *,
    patterns: Sequence[str] = CONSOLIDATED_FILES,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a checkpoint: `source` itself, or its snapshot in the hub's cache if it is a repository's id.

    Of a repository, the files that match `patterns` are downloaded, unless the cache has them: an interrupted
    download goes on with the first file that is not whole. Of a hub that does not respond, there is what the cache has.

    Raises:
        CheckpointError: neither a folder nor a repository that can be had, or an adapter, and what to do about it.
    """
    folder = _find_folder(
        source, patterns, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    refuse_adapter(folder, name=None if folder == Path(source) else os.fspath(source))
    return folder


def resolve_adapter(source: Path | str, **hub_options: Any) -> tuple[Path, str]:
    """The folder of an adapter and its name: that of the folder, or the id of a repository.

    hub_options: those of `resolve_source`.

    Raises:
        CheckpointError: neither a folder nor a repository that can be had, and what to do about it.
    """
    folder = _find_folder(source, ADAPTER_FILES, **hub_options)
    return folder, folder.resolve().name if folder == Path(source) else os.fspath(source)


def _find_folder(
    source: Path | str, patterns: Sequence[str], *, local_files_only: bool = False, **options: Any
) -> Path:
    """The folder `source`, or the snapshot of a repository with the files that match `patterns`."""
    folder, repository = Path(source), os.fspath(source)
    if folder.is_dir():
        return folder
    # An id has one slash. A Path drops the dot of ./owner/name, which says that it is a folder.
    if folder.exists() or not is_repository_id(repository):
        problem = "is a file" if folder.exists() else "no such folder"
        raise CheckpointError(f"{source}: {problem}; give a folder, or a repository on the hub as owner/name")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                **options,
                local_files_only=local_files_only or is_out_of_reach(repository),
                allow_patterns=list(patterns),
            )
        )
    # The client's HTTP library, whose errors also come through, is another one in each of its major versions.
    except Exception as error:
        raise CheckpointError(f"{repository}: {hub_problem(repository, error)}") from error


def resolve_conversion_source(source: Path | str, *, to: Layout, **options: Any) -> Path:
    """The folder of what is converted to layout `to`, see `resolve_source`.

    Of a repository that has no params.json, the files of the HF layout are downloaded.

    Raises:
        CheckpointError: the reasons of `resolve_source`.
    """
    folder = resolve_source(source, patterns=CONSOLIDATED_FILES if to == "hf" else HF_FILES, **options)
    is_repository = not Path(source).exists() and is_repository_id(os.fspath(source))
    if to == "hf" and is_repository and not (folder / PARAMS_NAME).exists():
        return resolve_source(source, patterns=HF_FILES, **options)
    return folder


def reachable_options(source: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `from_pretrained` for `source`: with `local_files_only` where the hub does not respond.

    Raises:
        CheckpointNotFoundError: neither a folder nor the id of a repository, or one that is not in the cache, and out
            of reach.
    """
    if source is None or Path(source).exists():
        return dict(options)
    repository = os.fspath(source)
    if not is_repository_id(repository):
        raise CheckpointNotFoundError(
            f"{source}: no such folder; give a folder, or a repository on the hub as owner/name"
        )
    if not options.get("local_files_only") and not is_out_of_reach(repository):
        return dict(options)
    if not any(_in_cache(repository, file, options) for file in TELLING_FILES):
        raise CheckpointNotFoundError(f"{repository}: {_not_in_cache(repository)}")
    return {**options, "local_files_only": True}


def is_out_of_reach(repository: str) -> bool:
    """Whether the hub is not to be asked, or does not respond in time; any response will do.

    The client itself would try again for each file, for minutes.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return True
    is_set = "HF_HUB_ETAG_TIMEOUT" in os.environ
    try:
        huggingface_hub.get_session().get(
            f"{huggingface_hub.constants.ENDPOINT}/api/models/{repository}",
            timeout=huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT if is_set else ANSWER_SECONDS,
        )
    # The client's HTTP library, whose errors come through, is another one in each of its major versions.
    except Exception:
        return True
    return False


def fetch_headers(
    repository: str,
    folder: Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | str | None = None,
) -> None:
    """Fill a folder with the small files of a repository, and with files of weights that have headers and no data.

    These are as long as those of the repository and take no room.

    Raises:
        CheckpointError: a repository that cannot be had, and what to do about it.
    """
    try:
        api, files = huggingface_hub.HfApi(token=token), huggingface_hub.HfFileSystem(token=token)
        commit = api.repo_info(repository, revision=revision).sha
        entries = api.list_repo_tree(repository, revision=commit)
        sizes = {entry.path: entry.size for entry in entries if isinstance(entry, huggingface_hub.hf_api.RepoFile)}
        # A listing is not to be trusted with places outside of the folder.
        wanted = [name for name in sizes if "/" not in name]
        names = {name for name in wanted if any(fnmatchcase(name, part) for part in (*CONSOLIDATED_FILES, *HF_FILES))}
        weights = {name for name in names if name.endswith(".safetensors")}
        small = sorted(names - weights)
        snapshot = resolve_source(repository, patterns=small, revision=commit, token=token, cache_dir=cache_dir)
        for name in names - weights:
            shutil.copyfile(snapshot / name, folder / name)
        for name in weights:
            path = f"{repository}@{commit}/{name}"
            # Without a cache, which would read megabytes ahead.
            with files.open(path, "rb", cache_type="none") as stream:
                start = stream.read(FIRST_BYTES)
                header_end = LENGTH_BYTES + int.from_bytes(start[:LENGTH_BYTES], "little")
                if FIRST_BYTES < header_end <= min(LARGEST_HEADER, sizes[name]):
                    start += stream.read(header_end - FIRST_BYTES)
            (folder / name).write_bytes(start[:header_end])
            os.truncate(folder / name, sizes[name])
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{repository}: {hub_problem(repository, error)}") from error


def refuse_adapter(folder: Path, name: str | None = None) -> None:
    """Raise a CheckpointError if a folder holds an adapter of PEFT and no checkpoint; `name` is how it was named."""
    if problem := adapter_problem(folder, name):
        raise CheckpointError(f"{name or folder}: {problem}")


def find_small_file(source: str, name: str, options: Mapping[str, Any]) -> Path | None:
    """Where a file of a folder or repository is on this machine, or None if it has none or cannot be reached.

    options: those of `reachable_options`.
    """
    if Path(source).is_dir():
        return Path(source, name) if Path(source, name).exists() else None
    try:
        return Path(huggingface_hub.hf_hub_download(source, name, **_given(options, *HUB_OPTIONS)))
    # The client's HTTP library, whose errors also come through, is another one in each of its major versions.
    except Exception:
        return None


def is_repository_id(source: str) -> bool:
    """Whether a source can be the id of a repository: owner/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source, re.ASCII) is not None


def _not_in_cache(repository: str) -> str:
    return (
        "no folder of this name here, the hub cannot be reached or is not to be asked, and the cache has not all that "
        f"is needed of {huggingface_hub.constants.ENDPOINT}/{repository}; connect, without HF_HUB_OFFLINE and "
        "local_files_only"
    )


def hub_problem(repository: str, error: Exception) -> str:
    """What an error of the hub's client means, and the way out, in one line."""
    errors = huggingface_hub.errors
    page = f"{huggingface_hub.constants.ENDPOINT}/{repository}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        # The client looks into its cache when the hub refuses, and then says what it has not found there.
        if not isinstance(error.__cause__, errors.HfHubHTTPError):
            return _not_in_cache(repository)
        error = error.__cause__
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return f"gated: accept its terms at {page}, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return (
            f"no folder of this name here, and on the hub no repository open to you at {page}; check the name, or log "
            "in with `hf auth login` or set HF_TOKEN if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no such revision; {page}/commits/main lists them"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"the download stopped: {reason}; run it again, the files that are whole are kept"


def cached_layout(repository: str, options: Mapping[str, Any]) -> Layout | None:
    """The layout of which the hub's cache holds all weights and the geometry, the vendor's first, or None.

    `options` are those of `from_pretrained`; of these, `revision` and `cache_dir` say which snapshot.
    """
    for layout in OTHER_LAYOUT:
        config = _in_cache(repository, CONFIG_NAMES[layout], options)
        if config is not None and _has_all_weights(config.parent, WEIGHTS_STEM[layout]):
            return layout
    return None


def _in_cache(repository: str, name: str, options: Mapping[str, Any]) -> Path | None:
    """Where the hub's cache has a file of a repository, if it does."""
    found = huggingface_hub.try_to_load_from_cache(repository, name, **_given(options, "revision", "cache_dir"))
    return Path(found) if isinstance(found, str) else None


def _given(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names if options.get(name)}


def _has_all_weights(snapshot: Path, stem: str) -> bool:
    names = {path.name for path in snapshot.glob(f"{stem}*.safetensors") if path.exists()}
    totals = {match[1] for name in names if (match := re.fullmatch(rf"{stem}-\d{{5}}-of-(\d{{5}})\.safetensors", name))}
    if f"{stem}.safetensors" in names or len(totals) != 1:
        return f"{stem}.safetensors" in names
    (total,) = totals
    return names >= {f"{stem}-{number:05d}-of-{total}.safetensors" for number in range(1, int(total) + 1)}


def find_consolidated(
    source: Any, options: Mapping[str, Any], *, patterns: Sequence[str] = (PARAMS_NAME,)
) -> Path | None:
    """The folder of a consolidated checkpoint, or None where `source` is anything else, for transformers to judge.

    A repository on the hub is consolidated if it has a params.json, and what the cache holds whole is read rather than
    downloaded in the other layout; of its other files those of `patterns` are downloaded. `options` are those of
    `from_pretrained`.

    Raises:
        CheckpointError: the files cannot be downloaded, and what to do about it.
    """
    if source is None or options.get("gguf_file") or options.get("variant") or options.get("use_safetensors") is False:
        return None
    subfolder = options.get("subfolder") or ""
    folder = Path(source, subfolder)
    if folder.is_dir():
        return folder if is_consolidated(folder) else None
    repository = str(source)
    if subfolder or Path(source).exists() or not is_repository_id(repository):
        return None
    hub_options = _given(options, *HUB_OPTIONS)
    if cached_layout(repository, hub_options) == "hf" and not options.get("force_download"):
        return None
    try:
        folder = Path(huggingface_hub.hf_hub_download(repository, PARAMS_NAME, **hub_options)).parent
    except Exception:
        # No such file, no access or no network: transformers, which asks for its own files next, has words for it.
        return None
    if set(patterns) == {PARAMS_NAME}:
        return folder
    return resolve_source(repository, patterns=patterns, **hub_options)
