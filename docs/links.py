"""For mkdocs: links out of docs/ point into the repository, which a site does not have."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./[^)]*|[a-z]+/)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with such links as plain text."""
    return OUTSIDE.sub(r"\1", markdown)
