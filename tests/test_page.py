"""Pages that open by themselves: the template, and what stands between text of the user's and the browser."""

from browser import show

from tensorlite.tools.page import render

HOSTILE = ["</script><script>document.title='run'</script>", "{{title}}", "<!--", "\ud800", "\u2028", "é"]


def test_data_reaches_the_script_as_it_is_and_is_never_run(browser, tmp_path):
    template, page = tmp_path / "template.html", tmp_path / "page.html"
    template.write_text(
        '<!doctype html><meta charset="utf-8"><title>{{title}}</title><style>{{style}}</style>'
        '<script type="application/json" id="data">{{data}}</script>'
    )
    page.write_text(render(template, "<b>&{{data}}", HOSTILE), encoding="utf-8")
    show(browser, page)
    assert browser.title == "<b>&{{data}}"
    codes = "return JSON.parse(data.textContent).map(s => Array.from(s, c => c.codePointAt()))"
    assert browser.execute_script(codes) == [[ord(c) for c in s] for s in HOSTILE]


def test_the_scheme_is_the_readers(browser, tmp_path):
    template, page = tmp_path / "template.html", tmp_path / "page.html"
    template.write_text("<!doctype html><title>{{title}}</title><style>{{style}}</style><p>text")
    page.write_text(render(template, "page", None))
    papers = []
    for scheme in ("light", "dark"):
        show(browser, page, scheme)
        papers.append(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert papers == ["rgb(255, 255, 255)", "rgb(20, 23, 28)"]
