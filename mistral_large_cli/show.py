"""`mistral-large show`: a conversation as the model reads it, the exact prompt, its control tokens coloured by role."""

import json
import re
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mistral_large_conversion.errors import ConversationError
from mistral_large_conversion.prompt_roles import COLOURS, ROLES, roles_of
from mistral_large_conversion.vocabulary import VOCABULARIES

from .conversation_file import read_conversation
from .highlighting import control_style
from .options import CacheDir, HtmlFile, Revision, SvgFile, Token, hub_options
from .terminal import console, one_line, printable, write_picture

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, RenderableType
    from rich.text import Text

    from modeling_mistral_large import MistralLargeTokenizer
    from modeling_mistral_large.instruct import Segment

PICTURE_WIDTH = 100
MASK_STYLE = "underline"
# A picture must not ask the network for its letters.
_WEB_FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def show(
    conversation: Annotated[
        Path,
        typer.Argument(
            help="Conversation in JSON, as /save in chat or an OpenAI client writes it; - reads standard input."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or repository on the hub whose tokenizer counts tokens and decides the prompt format."
        ),
    ] = None,
    prompt_format: Annotated[
        Literal["v3", "v7"] | None,
        typer.Option(help="Format of the 2407 (v3) or 2411 (v7) model; default: that of --model, or v3."),
    ] = None,
    tools: Annotated[
        Path | None, typer.Option(help="Tools instead of the file's own: functions in a Python file, or JSON.")
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print token ids; needs --model.")] = False,
    mask: Annotated[bool, typer.Option("--mask", help="Underline the assistant tokens, which training uses.")] = False,
    html: HtmlFile = None,
    svg: SvgFile = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Print the exact prompt of a conversation, its control tokens coloured by role."""
    if ids and model is None:
        raise ConversationError("--ids: no tokenizer; ids are those of a model's; name its folder with --model")
    hub = hub_options(model, revision, token, cache_dir)
    tokenizer = None if model is None else read_tokenizer(model, prompt_format, hub)
    shown = prompt_format or (None if tokenizer is None else tokenizer.prompt_format) or "v3"
    messages, own_tools = read_conversation(conversation, shown)
    from modeling_mistral_large.instruct import build_prompt

    prompt = build_prompt(messages, own_tools if tools is None else read_tools(tools), prompt_format=shown)
    segment_ids = None if tokenizer is None else encode(tokenizer, prompt)

    def print_on(out: "Console") -> None:
        if segment_ids is not None and ids:
            out.print(with_ids(prompt, segment_ids, mask=mask))
        else:
            # Into a file or a pipe goes the prompt to the letter; a terminal breaks lines by itself.
            out.print(flowing(prompt, mask=mask), soft_wrap=not out.record)
        out.print()
        out.print(legend(shown, None if segment_ids is None else sum(map(len, segment_ids)), mask=mask))

    print_on(console())
    if html is None and svg is None:
        return
    picture = console(record=True, file=StringIO(), width=PICTURE_WIDTH, force_terminal=True)
    print_on(picture)
    if html is not None:
        write_picture(html, picture.export_html(clear=False, inline_styles=True))
    if svg is not None:
        write_picture(svg, _WEB_FONTS.sub("", picture.export_svg(title=one_line(conversation.name))))


def read_tools(path: Path) -> "Sequence[Any]":
    """Return the tools in a Python file, or in a JSON file: a list of definitions, alone or under `tools`.

    Raises:
        ConversationError: no such file, or no tools in it.
    """
    if path.suffix != ".json":
        from .tools_file import load_tools

        return load_tools(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversationError(f"{path}: {error}; tools are JSON definitions or a Python file; name one") from error
    tools = content.get("tools") if isinstance(content, dict) else content
    if not isinstance(tools, list) or not tools:
        raise ConversationError(f"{path}: no tools; they are a list of definitions as OpenAI has them; name one")
    return tools


def read_tokenizer(model: str, prompt_format: str | None, hub: dict[str, Any]) -> "MistralLargeTokenizer":
    """Return the tokenizer of a folder or repository; `hub` are the options of `hub_options`.

    Raises:
        TokenizerFileError: no tokenizer of ours in it, or one without the control tokens of the prompt format.
        ConversationError: its prompts have a format of their own, and no other is asked for.
    """
    from modeling_mistral_large import MistralLargeTokenizer

    tokenizer = MistralLargeTokenizer.from_pretrained(model, prompt_format=prompt_format, **hub)
    if tokenizer.prompt_format is None:
        raise ConversationError(
            f"{model}: its chat template is none of this package's, so its prompts are neither v3's nor v7's; show "
            "writes these two; choose one with --prompt-format, or use tokenizer.apply_chat_template"
        )
    return tokenizer


def encode(tokenizer: "MistralLargeTokenizer", prompt: "Sequence[Segment]") -> list[list[int]]:
    """Return the ids of each segment."""
    control_tokens = tokenizer.vocabulary.control_tokens
    texts = iter(tokenizer.encode_texts([segment.text for segment in prompt if not segment.is_control]))
    return [[control_tokens[segment.text]] if segment.is_control else next(texts) for segment in prompt]


def flowing(prompt: "Sequence[Segment]", *, mask: bool) -> "Text":
    """Return the prompt as one text, as `apply_chat_template(…, tokenize=False)` gives it."""
    from rich.text import Text

    return Text.assemble(*((_written(segment), style) for segment, style in styled(prompt, mask=mask)))


def with_ids(prompt: "Sequence[Segment]", segment_ids: "Sequence[Sequence[int]]", *, mask: bool) -> "RenderableType":
    """Return the prompt as a table: a row for each control token and for each text that is encoded on its own."""
    from rich.table import Table
    from rich.text import Text

    table = Table("text", "ids", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for (segment, style), ids in zip(styled(prompt, mask=mask), segment_ids, strict=True):
        table.add_row(Text(printable(segment.text), style=style), Text(" ".join(map(str, ids)), style="dim"))
    return table


def legend(prompt_format: str, token_count: int | None, *, mask: bool) -> "Text":
    from rich.text import Text

    roles = {ROLES[token] for token in VOCABULARIES[prompt_format].control_tokens}
    parts = [(f"{role}  ", colour) for role, colour in COLOURS.items() if role in roles]
    parts += [("underlined: assistant tokens  ", MASK_STYLE)] if mask else []
    parts += [] if token_count is None else [(f"{token_count:,} tokens", "dim")]
    return Text.assemble(*parts)


def styled(prompt: "Sequence[Segment]", *, mask: bool) -> "Iterator[tuple[Segment, str]]":
    """Yield each segment and its style: texts have the colour of the control token before them."""
    roles = roles_of((segment.text, segment.is_control) for segment in prompt)
    for segment, role in zip(prompt, roles, strict=True):
        style = control_style(segment.text) if segment.is_control else COLOURS[role]
        yield segment, f"{style} {MASK_STYLE}" if mask and segment.is_generated else style


def _written(segment: "Segment") -> str:
    """Return a segment as a rendered prompt has it: a text that is not empty follows the space of its dummy ▁."""
    return segment.text if segment.is_control or not segment.text else f" {printable(segment.text)}"
