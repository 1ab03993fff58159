"""Links out of docs/: pictures come with the site, and anything else is linked in the repository."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK_OUT = re.compile(r"(!?)\[([^\]]*)\]\((?:\.\./)+([^)]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Take every picture that a page shows."""
    for page in files.documentation_pages():
        for is_picture, _, name in LINK_OUT.findall(page.content_string):
            if is_picture and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Let a page show the pictures of the site, and link the rest where it is published."""

    def link(match: re.Match[str]) -> str:
        is_picture, text, name = match.groups()
        return f"![{text}]({name})" if is_picture else f"[{text}]({config['repo_url']}/blob/main/{name})"

    return LINK_OUT.sub(link, markdown)
