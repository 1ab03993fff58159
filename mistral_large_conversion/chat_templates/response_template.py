"""The response templates: how transformers (its pipelines, its server) reads the model's responses without our parser.

There is one region per tool call, the only form that its server can stream. A call opens a region only when it is
complete and well formed, so that whatever else the model writes stays text. In a text the parser cannot tell a
`[TOOL_CALLS]` the model spelled out from the control token.
"""

from typing import Any

# Named parts, for the `regex` module: each may use the others, and itself.
_GRAMMAR = r"""(?(DEFINE)
    (?P<space>[ \t\n\r]*+)
    (?P<string>"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+")
    (?P<number>-?(?:0|[1-9]\d{0,999})(?:\.\d+)?(?:[eE][+-]?\d+)?)
    (?P<member>(?&string)(?&space):(?&space)(?&value)(?&space))
    (?P<object>\{(?&space)(?:(?&member)(?:,(?&space)(?&member))*+)?+\})
    (?P<list>\[(?&space)(?:(?&value)(?&space)(?:,(?&space)(?&value)(?&space))*+)?+\])
    (?P<value>(?&string)|(?&number)|(?&object)|(?&list)|true|false|null|NaN|-?Infinity)
    (?P<call>\{(?&space)"name"(?&space):(?&space)(?&string)(?&space),
        (?&space)"arguments"(?&space):(?&space)(?&value)(?&space)(?:,(?&space)(?&member))*+\})
)"""

# `\G` is where the parser stands. The first call follows the control token, the others a call and a comma.
_OPEN_CALL = r"""
    (?:\[TOOL_CALLS\](?&space)\[|\G(?<=\[TOOL_CALLS\][ \t\n\r]*\[[ \t\n\r]*\{.*\})(?&space),)
    (?&space)(?=(?&call)(?&space)[,\]])"""
# `\K` leaves the call to the region. When the parser was interrupted after it, the call is behind it already.
_CLOSE_CALL = r"""
    \G(?:(?&call)\K|(?<=\}))(?:(?&space)\](?:(?&space)(?=</s>|\Z))?|(?=(?&space),))"""

_FIELDS: dict[str, Any] = {
    "tool_calls": {
        "open_pattern": "(?x)" + _GRAMMAR + _OPEN_CALL,
        "close_pattern": "(?x)" + _GRAMMAR + _CLOSE_CALL,
        "repeats": True,
        "content": "json",
        "transform": {
            "type": "function",
            "function": {"name": "{content.name}", "arguments": "{content.arguments}"},
        },
    },
    "content": {
        # The end of the response, with the padding of a batch.
        "close_pattern": r"</s>(?:</s>|\[control_\d+\])*\Z",
        "repeats": True,
        "join": "",
        "content": "text",
        "content_args": {"strip": False},
    },
}

# By prompt format: the control tokens after which a response begins.
START_ANCHORS = {
    "v3": ["[/INST]", "[/TOOL_RESULTS]"],
    "v7": ["[/INST]", "[/TOOL_RESULTS]", "[/SYSTEM_PROMPT]"],
}

RESPONSE_TEMPLATES: dict[str, dict[str, Any]] = {
    prompt_format: {
        "version": 1,
        "start_anchor": start_anchor,
        # An empty content stays in the message: a pipeline takes no chat back in which a message has none.
        "defaults": {"role": "assistant", "content": ""},
        "fields": _FIELDS,
    }
    for prompt_format, start_anchor in START_ANCHORS.items()
}
