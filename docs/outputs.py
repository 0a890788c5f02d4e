"""Run the Python of pages, and put what each block prints right below it:

    python docs/outputs.py docs/lessons/*.md

A block of `python` that prints is followed by one of `text`. What a page shows is what it did on some machine; the test
suite runs every page again and compares. Pictures that a page writes go into docs/img.
"""

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

BLOCK = re.compile(r"```python\n(.*?)```\n?(?:```text\n(.*?)```\n)?", re.DOTALL)
IMAGES = Path(__file__).parent.absolute() / "img"


def run(page: Path, module: ModuleType | None = None) -> Iterator[tuple[re.Match, str]]:
    """Each block of a page, with what it prints when they run one after the other in this folder.

    module: where their names go; it can be found, as a script's can, for `explain` reads the docstrings of ops.
    """
    module = module or ModuleType(page.stem)
    sys.modules[module.__name__] = module
    try:
        for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block[1], str(page), "exec"), vars(module))
            yield block, printed.getvalue()
    finally:
        del sys.modules[module.__name__]


def refreshed(page: Path) -> str:
    """The page's text with what its blocks print now."""
    text, parts, end = page.read_text(encoding="utf-8"), [], 0
    for block, printed in run(page):
        shown = f"```text\n{printed}```\n" if printed else ""
        parts += [text[end : block.start()], f"```python\n{block[1]}```\n{shown}"]
        end = block.end()
    return "".join([*parts, text[end:]])


def main() -> None:
    for page in [Path(name).absolute() for name in sys.argv[1:]]:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            page.write_text(refreshed(page), encoding="utf-8")
            for picture in Path(folder).glob("*.svg"):
                shutil.copy(picture, IMAGES)
            os.chdir("/")


if __name__ == "__main__":
    main()
