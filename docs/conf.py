"""The site: `sphinx-build -W docs site`, then open site/index.html. It needs neither a network nor a server."""

import re

project = html_title = "tensorlite"
extensions = ["myst_parser"]
root_doc = "index"
exclude_patterns = ["img", "data", "examples"]
html_theme = "furo"
html_show_copyright = html_show_sphinx = html_copy_source = html_show_sourcelink = False
html_theme_options = {"top_of_page_buttons": []}
myst_heading_anchors = 3
highlight_language = "text"

OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:tensorlite|gpt|tests|bench|README|train|sample)[^)]*\)")
PART = re.compile(r"^## (.*)\n((?:(?!## ).*\n)*)", re.MULTILINE)
PAGE = re.compile(r"\]\(([\w/-]+)\.md\)")


def adapted(app, name: str, source: list[str]) -> None:
    """What reads well in the repository, as the site needs it: links to files that are no pages become their names, and
    the pages that index.md links to, part by part, become the site's contents in that order."""
    source[0] = OUTSIDE.sub(r"\1", source[0])
    if name == root_doc:
        trees = [
            "\n".join(["```{toctree}", ":hidden:", f":caption: {title}", "", *PAGE.findall(text), "```", ""])
            for title, text in PART.findall(source[0])
        ]
        source[0] = "\n".join([source[0], *trees])


def setup(app) -> None:
    app.connect("source-read", adapted)
