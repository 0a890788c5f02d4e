"""A self-contained page: a template with a title, the common style, and data for its script, which a browser opens
without a network."""

import html
import json
import os
import re
from importlib.resources.abc import Traversable
from pathlib import Path

_STYLE = Path(__file__).with_name("page.css")
_PLACE = re.compile(r"\{\{(title|style|data)\}\}")


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name first, so that there is never half of it."""
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def render(template: Path | Traversable, title: str, data) -> str:
    """The template's text with {{title}}, {{style}} and {{data}} in it replaced.

    data: what JSON has, without NaN and infinity. It stands in <script type="application/json">, and nothing in it ends
    that early or is run.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {"title": html.escape(title), "style": _STYLE.read_text(encoding="utf-8"), "data": text}
    return _PLACE.sub(lambda place: parts[place[1]], template.read_text(encoding="utf-8"))
