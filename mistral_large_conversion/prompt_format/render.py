"""Render chat templates as transformers does, in a process of its own that has limits: run as a script.

It reads a JSON object with `path` (of Python), `template`, `tokens` (special ones by name) and `conversations` (each
the variables of one rendering) from standard input, and writes a list with the text of each, or null where the template
refused it. A template that compiles to nothing ends it with an error.
"""

import json
import sys
from typing import Any

CPU_SECONDS = 2
MEMORY_BYTES = 2**30
# A prompt of the probes has a few hundred characters.
LONGEST_TEXT = 100_000


def set_limits() -> None:
    """Limit processor time and memory of this process, where the system can."""
    try:
        import resource
    except ImportError:
        # Windows: the time limit of the parent is all there is.
        return
    for limit, value in ((resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_AS, MEMORY_BYTES)):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def render(template: str, tokens: dict[str, str], conversations: list[dict[str, Any]]) -> list[str | None]:
    """Return the text of each conversation, or None where the template refuses it.

    Raises:
        jinja2.TemplateError: text that is no template.
    """
    from datetime import datetime

    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """transformers' own tag, which marks what the assistant says and renders nothing."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

    def raise_exception(message: Any) -> None:
        raise TemplateError(str(message))

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    compiled = environment.from_string(template)
    rendered: list[str | None] = []
    for conversation in conversations:
        try:
            text = ""
            for part in compiled.generate(**tokens, **conversation):
                text += part
                if len(text) > LONGEST_TEXT:
                    raise ValueError("text without end")
            rendered.append(text)
        # Whatever a template does wrong.
        except Exception:
            rendered.append(None)
    return rendered


def main() -> None:
    """Render what standard input asks for."""
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    set_limits()
    rendered = render(request["template"], request["tokens"], request["conversations"])
    # Lone surrogates, too.
    json.dump(rendered, sys.stdout)


if __name__ == "__main__":
    main()
