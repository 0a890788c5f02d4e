"""The fixture `gradcheck`, which pytest finds wherever this package is installed."""

import pytest

import tensorlite


@pytest.fixture(scope="session")
def gradcheck():
    """`tensorlite.gradcheck`, which shows what is wrong as a table of the worst elements."""

    def gradcheck(fn, *inputs, **options) -> bool:
        __tracebackhide__ = True  # the test is where to look
        try:
            return tensorlite.gradcheck(fn, *inputs, **options)
        except tensorlite.GradcheckError as error:
            wrong = [e for e in error.report.worst if e.wrong] if error.report else []
            if wrong:
                error.add_note(_table(wrong))
            raise error.with_traceback(None) from None

    return gradcheck


def _table(elements) -> str:
    rows = [("", "element", "expected", "got", "ratio")]
    for e in elements:
        where = "a direction" if e.index is None else str(e.index)
        rows.append((e.name, where, f"{e.expected:.9g} ± {e.error:.0e}", f"{e.got:.9g}", f"{e.ratio:.2g}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
