"""Checkpoints by the id of their repository on the Hugging Face hub: only what is needed of them is downloaded."""

import os
import re
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, HfFileSystem, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from modeling_mistral_large.conversion.safetensors_header import LARGEST_HEADER, LENGTH_BYTES
from modeling_mistral_large.errors import CheckpointError

LICENCE_PATTERNS = ("LICENSE*", "NOTICE*", "Notice*")
# The vendor's repository holds a second copy of the weights, model-*.safetensors: another 245 GB.
CONSOLIDATED_FILES = (
    "params.json",
    "consolidated.safetensors",
    "consolidated-*.safetensors",
    "consolidated.safetensors.index.json",
    "tokenizer.model.v3",
    *LICENCE_PATTERNS,
)
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
    "tokenizer.model.v3",
    "chat_template.jinja",
    "README.md",
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
    download goes on with the first file that is not whole.

    Raises:
        CheckpointError: neither a folder nor a repository that can be had, and what to do about it.
    """
    folder = Path(source)
    # An id has one slash. A Path drops the dot of ./owner/name, which says that it is a folder.
    is_folder = folder.exists() or not is_repository_id(os.fspath(source))
    if is_folder:
        if not folder.is_dir():
            finding = "is a file" if folder.exists() else "no such folder"
            raise CheckpointError(f"{source}: {finding}; give a folder, or a repository on the hub as owner/name")
        return folder
    repository = os.fspath(source)
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=list(patterns),
            )
        )
    # The client's HTTP library, whose errors also come through, is another one in each of its major versions.
    except Exception as error:
        raise CheckpointError(f"{repository}: {hub_finding(repository, error)}") from error


def fetch_headers(repository: str, folder: Path, *, token: str | bool | None = None) -> None:
    """Fill a folder with the small files of a repository, and with files of weights that have headers and no data.

    These are as long as those of the repository and take no room.

    Raises:
        CheckpointError: a repository that cannot be had, and what to do about it.
    """
    try:
        api, files = HfApi(token=token), HfFileSystem(token=token)
        commit = api.repo_info(repository).sha
        entries = api.list_repo_tree(repository, revision=commit)
        sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
        # A listing is not to be trusted with places outside of the folder.
        wanted = [name for name in sizes if "/" not in name]
        names = {name for name in wanted if any(fnmatchcase(name, part) for part in (*CONSOLIDATED_FILES, *HF_FILES))}
        weights = {name for name in names if name.endswith(".safetensors")}
        snapshot = resolve_source(repository, patterns=sorted(names - weights), revision=commit, token=token)
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
        raise CheckpointError(f"{repository}: {hub_finding(repository, error)}") from error


def is_repository_id(source: str) -> bool:
    """Whether a source can be the id of a repository: owner/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source, re.ASCII) is not None


def hub_finding(repository: str, error: Exception) -> str:
    """What an error of the hub's client means, and the way out, in one line."""
    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, LocalEntryNotFoundError):
        # The client looks into its cache when the hub refuses, and then says what it has not found there.
        if not isinstance(error.__cause__, HfHubHTTPError):
            return (
                "no folder of this name here, the hub cannot be reached or is not to be asked, and the cache has not "
                f"all that is needed of {page}"
            )
        error = error.__cause__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError) or status == 403:
        return f"gated: accept its terms at {page}, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return (
            f"no folder of this name here, and on the hub no repository open to you at {page}; check the name, or log "
            "in with `hf auth login` or set HF_TOKEN if it is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no such revision; {page}/commits/main lists them"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"the download stopped: {reason}; run it again, the files that are whole are kept"
