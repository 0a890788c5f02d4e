"""The graph as a still picture (SVG): what the page shows before anything is opened."""

from html import escape

CHARACTER, LINE, GAP, MARGIN, HEADING = 7.3, 16, 18, 14, 22  # pixels
_STYLE = """
svg { --paper: #fff; --panel: #f4f5f7; --line: #b9bec8; --ink: #1b1f27; --faint: #666e7b; background: var(--paper); }
@media (prefers-color-scheme: dark) {
  svg { --paper: #14171c; --panel: #1d2128; --line: #4a515d; --ink: #e6e9ee; --faint: #98a1b0; }
}
text { font: 12px ui-monospace, monospace; fill: var(--ink); }
.faint { fill: var(--faint); }
rect { fill: var(--paper); stroke: var(--line); }
.box { fill: var(--panel); }
.closed { stroke-width: 2; }
.leaf { stroke-dasharray: 4 3; }
path { fill: none; stroke: var(--faint); }
marker path { fill: var(--faint); }
"""


def still(items: list[dict], title: str) -> str:
    """The picture of what `draw` made of a graph, the first of which is the outermost box."""
    places: dict[int, tuple[float, float, float, float]] = {}  # left, top, width, height
    sizes = _sizes(items)
    _place(items, sizes, 0, MARGIN, MARGIN, places)
    edges = _edges(items, places)
    lanes = max([right for _, right in edges], default=0)
    width, height = max(sizes[0][0] + 2 * MARGIN, lanes + MARGIN), sizes[0][1] + 2 * MARGIN
    boxes = [_box(items[i], *place) for i, place in places.items() if items[i].get("open")]
    shown = [_item(items[i], *place) for i, place in places.items() if not items[i].get("open")]
    arrow = '<marker id="a" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="6" markerHeight="6" orient="auto"><path d="M0,0 6,3 0,6z"/></marker>'  # noqa: E501
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}">'
    name = f"<title>{escape(title)}</title><style>{_STYLE}</style>{arrow}"
    return "\n".join([head, name, *boxes[1:], *(path for path, _ in edges), *shown, "</svg>\n"])


def _sizes(items: list[dict]) -> list[tuple[float, float]]:
    """Width and height of each item: of an open box what its rows take."""
    sizes = [(0.0, 0.0)] * len(items)
    for i in reversed(range(len(items))):  # what is in a box comes after it
        item = items[i]
        if item.get("open"):
            rows = [[sizes[child] for child in row] for row in item["rows"]]
            width = max((sum(w for w, _ in row) + GAP * (len(row) - 1) for row in rows), default=0)
            height = sum(max(h for _, h in row) for row in rows) + GAP * (len(rows) - 1)
            frame = (3 * MARGIN, HEADING + MARGIN) if i else (0, 0)
            width = max(width, CHARACTER * len(item["label"]))
            sizes[i] = width + frame[0], height + frame[1]
        else:
            sizes[i] = CHARACTER * max(map(len, _lines(item))) + 18, LINE * len(_lines(item)) + 8
    return sizes


def _place(items: list[dict], sizes: list, i: int, left: float, top: float, places: dict) -> None:
    width, height = sizes[i]
    places[i] = left, top, width, height
    if not items[i].get("open"):
        return
    y = top + (HEADING if i else 0)
    for row in items[i]["rows"]:
        x = left + (width - sum(sizes[child][0] for child in row) - GAP * (len(row) - 1)) / 2
        for child in row:
            _place(items, sizes, child, x, y, places)
            x += sizes[child][0] + GAP
        y += max(sizes[child][1] for child in row) + GAP


def _edges(items: list[dict], places: dict) -> list[tuple[str, float]]:
    """A path for each pair of things of which one uses the other's result, and how far right it goes."""
    shown = _shown(items)
    pairs = {(shown[p], shown[i]) for i, item in enumerate(items) for p in item.get("inputs", ()) if p is not None}
    boxes, closed = [], []
    for i, place in places.items():
        (boxes if items[i].get("open") else closed).append(place)
    return [_edge(places[a], places[b], closed, boxes, n % 3) for n, (a, b) in enumerate(sorted(pairs)) if a != b]


def _shown(items: list[dict]) -> list[int]:
    """What stands for each item in the picture: itself, or the outermost closed box around it."""
    shown = list(range(len(items)))
    for i, item in enumerate(items):
        for child in (child for row in item.get("rows", ()) for child in row):
            shown[child] = child if item["open"] and shown[i] == i else shown[i]
    return shown


def _edge(a, b, closed: list, boxes: list, lane: int) -> tuple[str, float]:
    ax, ay, bx, by = a[0] + a[2] / 2, a[1] + a[3], b[0] + b[2] / 2, b[1]
    between, around = ([p for p in some if p[1] > ay and p[1] + p[3] < by] for some in (closed, boxes))
    if any(p[0] < max(ax, bx) + 4 and p[0] + p[2] > min(ax, bx) - 4 for p in between):
        right = max(p[0] + p[2] for p in (a, b, *between, *around)) + 10 + 5 * lane
        d = f"M{ax:.0f},{ay:.0f} v3 q0,5 5,5 H{right - 5:.0f} q5,0 5,5 V{by - 13:.0f} q0,5 -5,5 H{bx + 5:.0f}"
        return f'<path marker-end="url(#a)" d="{d} q-5,0 -5,5 V{by:.0f}"/>', right
    bend = max(8, (by - ay) / 2)
    d = f"M{ax:.0f},{ay:.0f} C{ax:.0f},{ay + bend:.0f} {bx:.0f},{by - bend:.0f} {bx:.0f},{by:.0f}"
    return f'<path marker-end="url(#a)" d="{d}"/>', 0


def _box(item: dict, left: float, top: float, width: float, height: float) -> str:
    frame = f'<rect class="box" x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{height:.0f}" rx="9"/>'
    return f'{frame}<text class="faint" x="{left + 8:.0f}" y="{top + 16:.0f}">{escape(item["label"])}</text>'


def _item(item: dict, left: float, top: float, width: float, height: float) -> str:
    middle, radius = left + width / 2, 18 if item["kind"] == "leaf" else 6
    frame = f'x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{height:.0f}" rx="{radius}"'
    texts = [
        f'<text class="{kind}" text-anchor="middle" x="{middle:.0f}" y="{top + LINE * n:.0f}">{escape(text)}</text>'
        for n, (kind, text) in enumerate(zip(("", "faint"), _lines(item), strict=False), 1)
    ]
    return f'<rect class="{"closed" if item["kind"] == "box" else item["kind"]}" {frame}/>' + "".join(texts)


def _lines(item: dict) -> list[str]:
    """What stands in it: of a closed box one line, and two of an op or a leaf."""
    return [f"{item['label']}  {item['note']}"] if item["kind"] == "box" else [item["label"], item["note"]]
