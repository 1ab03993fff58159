"""A small MCP server: `python -m tests.support.mcp_server` on standard streams, with a port on HTTP."""

import os
import sys
from typing import Any

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp_types import ToolAnnotations

from mistral_large_cli.demo import golden_conversations

CELSIUS = {"Paris": 22, "London": 17}
# The definition that the demo model knows.
WEATHER: dict[str, Any] = (golden_conversations()["weather_call"].tools or [])[0]["function"]


def get_current_weather(location: str, format: str) -> str:
    return str(CELSIUS[location.partition(",")[0]])


def fail(text: str) -> str:
    """Fail"""
    raise ToolError(text)


def end_server() -> str:
    """End the server"""
    os._exit(3)


def serve() -> None:
    weather = Tool.from_function(
        get_current_weather,
        description=WEATHER["description"],
        annotations=ToolAnnotations(read_only_hint=True),
        structured_output=False,
    )
    weather.parameters = WEATHER["parameters"]
    others = [Tool.from_function(fail, structured_output=False)]
    others.append(Tool.from_function(end_server, name="end.server", structured_output=False))
    # Only the weather for a model that knows nothing else.
    tools = [weather] if "weather" in sys.argv else [weather, *others]
    server = MCPServer("weather", tools=tools, log_level="ERROR")
    port = next((int(each) for each in sys.argv[1:] if each.isdigit()), None)
    if port is None:
        server.run("stdio")
    else:
        server.run("streamable-http", port=port)


if __name__ == "__main__":
    serve()
