"""Tools of MCP servers, by the official client: started or connected to, listed, called, and ended with the chat."""

import asyncio
import json
import re
import shlex
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any

from mistral_large_conversion.errors import MissingLibraryError, SettingError

from .terminal import one_line

if TYPE_CHECKING:
    from mcp import Client

# What no name of a function may hold.
NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_-]")
LONGEST_NAME = 64
# Seconds a server has to start and to list its tools.
START = 60


class ToolError(Exception):
    """A tool says that it failed, or its server has ended: for the model to deal with."""


class McpTool:
    """A tool of a server, as the tool loop calls functions.

    read_only: whether the server says that it changes nothing.
    """

    def __init__(self, servers: "McpServers", client: "Client", source: str, name: str, tool: Any) -> None:
        self._servers, self._client, self._source, self._tool_name = servers, client, source, tool.name
        self.__name__ = name
        self.read_only = tool.annotations is not None and tool.annotations.read_only_hint is True
        function = {"name": name, "description": tool.description or "", "parameters": tool.input_schema}
        self.tool_definition = {"type": "function", "function": function}

    def __call__(self, **arguments: Any) -> str:
        from mcp import MCPError

        try:
            result = self._servers.run(self._client.call_tool(self._tool_name, arguments))
        except MCPError as error:
            raise ToolError(f"{self._source}: {error}") from error
        # anyio's, of a server that is gone.
        except Exception as error:
            raise ToolError(f"{self._source}: the server does not respond ({type(error).__name__})") from error
        text = _text_of(result)
        if result.is_error:
            raise ToolError(text)
        return text


class McpServers:
    """Servers by their commands or addresses, in an event loop of their own; `close` ends them.

    Raises:
        MissingLibraryError: the client is not installed.
        SettingError: a command or an address that no server responds at.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        try:
            import mcp  # noqa: F401
        except ImportError as error:
            raise MissingLibraryError(
                "--mcp: needs the official client, which is not installed; pip install 'modeling-mistral-large[mcp]'"
            ) from error
        self.tools: list[McpTool] = []
        self._loop = asyncio.new_event_loop()
        self._is_ready: Future[None] = Future()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, args=(list(sources),), daemon=True)
        self._thread.start()
        try:
            self._is_ready.result()
        except BaseException:
            self.close()
            raise

    def run(self, coroutine: Any) -> Any:
        """Return what a coroutine gives; ctrl-C cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def close(self) -> None:
        """End the connections, and the servers that were started."""
        if self._loop.is_closed():
            return
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(timeout=10)

    def _serve(self, sources: list[str]) -> None:
        with suppress(BaseException):
            self._loop.run_until_complete(self._stay_connected(sources))
        with suppress(RuntimeError):
            self._loop.close()

    async def _stay_connected(self, sources: list[str]) -> None:
        """Connect, list the tools, and stay in this task until the end, as each connection ends in its own."""
        try:
            async with AsyncExitStack() as stack:
                for source in sources:
                    await self._connect(source, stack)
                self._is_ready.set_result(None)
                await self._end.wait()
        except BaseException as error:
            if not self._is_ready.done():
                self._is_ready.set_exception(error)
            raise

    async def _connect(self, source: str, stack: AsyncExitStack) -> None:
        errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # closed by the stack
        stack.enter_context(errors)
        try:
            async with asyncio.timeout(START) if hasattr(asyncio, "timeout") else AsyncExitStack():
                client = await stack.enter_async_context(_client(source, errors))
                tools, cursor = [], None
                while True:
                    page = await client.list_tools(cursor=cursor)
                    tools += page.tools
                    cursor = page.next_cursor
                    if cursor is None:
                        break
        except SettingError:
            raise
        # Of the process, of the network and of the protocol.
        except Exception as error:
            raise SettingError(
                f"--mcp {source}: {_reason(error, errors)}; name a command that starts an MCP server, or the address "
                "of one"
            ) from error
        for tool in tools:
            self.tools.append(McpTool(self, client, source, self._free_name(tool.name), tool))

    def _free_name(self, name: str) -> str:
        """Return a name that the format takes and no other tool has."""
        name = NOT_IN_NAMES.sub("_", name)[:LONGEST_NAME] or "_"
        taken = {tool.__name__ for tool in self.tools}
        free, number = name, 2
        while free in taken:
            free = f"{name[: LONGEST_NAME - 4]}_{number}"
            number += 1
        return free


def _client(source: str, errors: Any) -> "Client":
    from mcp import Client, StdioServerParameters, stdio_client

    if source.startswith(("http://", "https://")):
        return Client(source)
    try:
        words = shlex.split(source)
    except ValueError as error:
        raise SettingError(f"--mcp {source!r}: no command ({error}); quote it as a shell takes it") from error
    if not words:
        raise SettingError(f"--mcp {source!r}: no command; name one that starts an MCP server, or the address of one")
    command, *arguments = words
    return Client(stdio_client(StdioServerParameters(command=command, args=arguments), errlog=errors))


def _reason(error: BaseException, errors: Any) -> str:
    """Return why a server does not respond: the innermost error, and the last thing that it said itself."""
    while isinstance(group := getattr(error, "exceptions", None), tuple) and group:
        error = group[0]
    text = str(error) or type(error).__name__
    errors.seek(0)
    said = [line for line in errors.read().splitlines() if line.strip()]
    return one_line(f"{text} ({said[-1].strip()})" if said else text)


def _text_of(result: Any) -> str:
    """Return the text parts of a result, what else it has by its kind."""
    parts = []
    for block in result.content:
        if block.type == "text":
            parts.append(block.text)
        elif block.type == "resource" and hasattr(block.resource, "text"):
            parts.append(block.resource.text)
        else:
            parts.append(f"[{block.type} left out: only text can be read]")
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)
