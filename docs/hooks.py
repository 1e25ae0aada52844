"""What MkDocs does beside the pages: options from the parser's listings, names of files that are outside of them."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LISTINGS = ROOT / "lightning_gsq" / "cli" / "listings"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fills in the options; shows files outside of the pages by their names."""
    markdown = re.sub(r"<!-- options of (\w+) -->", lambda match: options(match[1]), markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./([\w./-]+)\)", r"\1 (`\2`)", markdown)


def options(verb: str) -> str:
    """The options of a verb as a section."""
    text = (LISTINGS / f"{verb}.all.txt").read_text(encoding="utf-8").partition("\n")[2]
    return f"## {verb}\n\n```text\n{text}```\n"
