"""HTML that notebooks show of a result."""

from collections.abc import Iterable, Sequence


def html_table(rows: Iterable[Sequence[object]], *, head: Sequence[object] = ()) -> str:
    """A table of texts: every cell is escaped, as names in a checkpoint are anybody's."""
    lines = [_html_row(head, "th")] if head else []
    lines += [_html_row(row, "td") for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _html_row(cells: Sequence[object], tag: str) -> str:
    # Importing the package loads no more than stock Mistral does.
    from html import escape

    return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
