"""A hub on the loopback interface: as much of its API as the real client needs to download a repository.

`LoopbackHub(folder)` serves every file of a folder as the repository `owner/name` and logs what was asked for.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, hf_api

REPOSITORY = "owner/name"
COMMIT = "c0ffee" + "0" * 34


@dataclass
class LoopbackHub:
    """What is served, how it misbehaves, and what was asked for."""

    folder: Path
    # Files of the repository are refused as the hub refuses those of a gated one, with or without a login.
    gated: HTTPStatus | None = None
    # Everything is refused, with nothing but this status.
    refuse: HTTPStatus | None = None
    # After so many bytes of a file the connection ends, once.
    cut_after: dict[str, int] = field(default_factory=dict)
    # Files that cannot be had now.
    broken: set[str] = field(default_factory=set)
    # Names that the listing has besides those of the files.
    listed: list[str] = field(default_factory=list)
    # Names of its commit besides main.
    revisions: set[str] = field(default_factory=set)
    url: str = ""
    # Name of a file, and the Range header, for each GET of one.
    downloads: list[tuple[str, str | None]] = field(default_factory=list)
    # Method and path of each request.
    asked: list[str] = field(default_factory=list)
    # The Authorization header of each request that had one.
    authorizations: set[str] = field(default_factory=set)

    @property
    def downloaded(self) -> set[str]:
        return {name for name, _ in self.downloads}


@contextmanager
def serve(hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """Serve a hub on a free port for as long as the context lasts."""

    class Handler(_Handler):
        served = hub

    with _Server(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def in_place_of_the_hub(hub: LoopbackHub, cache: Path) -> Iterator[LoopbackHub]:
    """Serve a hub that the client takes for the real one, with an empty cache and without a token."""
    with serve(hub), pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            patch.delenv(name, raising=False)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        # The client reads HF_ENDPOINT when it is imported, and makes the others of it; transformers keeps the client
        # that it first needed, which would ask this hub when it is gone.
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(hf_api.api, "endpoint", hub.url)
        if "transformers.utils.hub" in sys.modules:
            patch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        yield hub


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that have gone; their tests say what came of it."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: LoopbackHub

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the tests' output clean."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.served.asked.append(f"POST {self.path}")
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if re.fullmatch(rf"/api/models/{REPOSITORY}/paths-info/[^/]+", urlsplit(self.path).path):
            wanted = json.loads(body)["paths"]
            self._json([entry for entry in self._tree() if entry["path"] in wanted])
        else:
            self._error(HTTPStatus.NOT_FOUND, "RepoNotFound")

    def do_GET(self) -> None:
        hub, path = self.served, unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path}")
        if token := self.headers.get("Authorization"):
            hub.authorizations.add(token)
        revision = "|".join(map(re.escape, ("main", COMMIT, *hub.revisions)))
        if hub.refuse is not None:
            self._error(hub.refuse, "")
        elif re.fullmatch(rf"/api/models/{REPOSITORY}(/revision/({revision}))?", path):
            self._json({"id": REPOSITORY, "sha": COMMIT, "gated": hub.gated and "auto", "siblings": []})
        elif re.fullmatch(rf"/api/models/{REPOSITORY}/tree/({revision})/?", path):
            self._json(self._tree())
        elif re.fullmatch(rf"/api/models/{REPOSITORY}/tree/({revision})/.+", path):
            # No repository here has folders.
            self._error(HTTPStatus.NOT_FOUND, "EntryNotFound")
        elif match := re.fullmatch(rf"/{REPOSITORY}/resolve/(?:{revision})/(.+)", path):
            self._file(match[1])
        elif path.startswith((f"/api/models/{REPOSITORY}/", f"/{REPOSITORY}/")):
            self._error(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        else:
            self._error(HTTPStatus.NOT_FOUND, "RepoNotFound")

    def _tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _etag(path)}
            for path in sorted(self.served.folder.iterdir())
        ] + [{"type": "file", "path": name, "size": 8, "oid": "0" * 40} for name in self.served.listed]

    def _file(self, name: str) -> None:
        hub, path = self.served, self.served.folder / name
        if hub.gated is not None:
            self._error(hub.gated, "GatedRepo")
            return
        if path.parent != hub.folder or not path.is_file():
            self._error(HTTPStatus.NOT_FOUND, "EntryNotFound")
            return
        size, range_header = path.stat().st_size, self.headers.get("Range")
        start, stop = 0, size
        if range_header and (match := re.fullmatch(r"bytes=(\d+)-(\d*)", range_header)):
            start, stop = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
        if self.command == "GET":
            hub.downloads.append((name, range_header))
            if name in hub.broken:
                self._error(HTTPStatus.SERVICE_UNAVAILABLE, "")
                return
        self.send_response(HTTPStatus.PARTIAL_CONTENT if range_header else HTTPStatus.OK)
        self.send_header("ETag", f'"{_etag(path)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if range_header:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if self.command == "GET":
            self._send(path, start, stop)

    def _send(self, path: Path, start: int, stop: int) -> None:
        with path.open("rb") as stream:
            stream.seek(start)
            if (most := self.served.cut_after.pop(path.name, None)) is not None:
                self.wfile.write(stream.read(most))
                self.close_connection = True
                return
            while start < stop:
                chunk = stream.read(min(2**16, stop - start))
                self.wfile.write(chunk)
                start += len(chunk)

    def _json(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: HTTPStatus, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(path: Path) -> str:
    """A name of the content, of 40 hexadecimal digits as git's; large sparse files are not read whole."""
    with path.open("rb") as stream:
        return hashlib.sha1(stream.read(2**16)).hexdigest()
