"""Count the lines of the product: code, and all that is not blank (with comments and docstrings).

python bench/lines.py
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def main() -> None:
    files = [
        *sorted(ROOT.glob("tensorlite/**/*.py")),
        *sorted(ROOT.glob("tensorlite/**/*.cu*")),
        *sorted(ROOT.glob("gpt/**/*.py")),
        ROOT / "train.py",
        ROOT / "sample.py",
    ]
    counts = [(*count(file), str(file.relative_to(ROOT))) for file in files]
    for code, text, name in counts:
        print(f"{code:6} {text:6}  {name}")
    print(f"{sum(c for c, _, _ in counts):6} {sum(t for _, t, _ in counts):6}  in all")


def count(file: Path) -> tuple[int, int]:
    """(lines of code, lines that are not blank)."""
    source, docstrings, comment = file.read_text(encoding="utf-8"), set(), "//"
    if file.suffix == ".py":
        comment = "#"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
                docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = [(i, line.strip()) for i, line in enumerate(source.splitlines(), 1) if line.strip()]
    return sum(1 for i, line in lines if i not in docstrings and not line.startswith(comment)), len(lines)


if __name__ == "__main__":
    main()
