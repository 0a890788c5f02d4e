"""The graph's page in a browser, used with keys and a pointer as by a reader."""

import numpy as np
import pytest
from browser import assert_quiet, show
from test_tools import leaves, watched

from tensorlite.tools import draw


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "graph.html"
    draw(watched(6), path, title="A GPT of 6 layers")
    return path


@pytest.fixture
def gpt(browser, page):
    """The page of a GPT of six layers, just opened."""
    show(browser, page)
    yield browser
    assert_quiet(browser)


def press(browser, *keys):
    """Keys by the names that the browser has for them, wherever the focus is."""
    from selenium.webdriver.common.keys import Keys

    for key in keys:
        browser.switch_to.active_element.send_keys(getattr(Keys, key.upper(), key))


def labels(browser, kind: str = "") -> list[str]:
    """What stands on the things that are seen, of a class if one is given."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.item' + arguments[0])].map(e => e.firstChild.textContent)", kind
    )


def panel(browser) -> str:
    return browser.find_element("id", "told").text


def test_at_first_sight_it_is_one_page(gpt):
    blocks = [f"▸ h.{i} · Block" for i in range(6)]
    assert [label for label in labels(gpt) if "Block" in label] == blocks
    assert len(labels(gpt)) == 13
    assert gpt.execute_script("return view.scrollHeight <= view.clientHeight")
    assert gpt.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert len(gpt.find_elements("css selector", "#edges path")) == 13


def test_a_box_folds_and_unfolds(gpt):
    gpt.execute_script("[...document.querySelectorAll('.item')].find(e => e.textContent.includes('h.2')).focus()")
    press(gpt, "enter")
    assert {"ln_1 · layer_norm", "▸ attn · CausalSelfAttention", "▸ mlp · MLP"} <= set(labels(gpt))
    press(gpt, "enter")  # the focus has stayed on the box
    assert len(labels(gpt)) == 13
    press(gpt, "o")
    assert labels(gpt).count("c_attn · linear") == 6
    assert not [label for label in labels(gpt) if label.startswith("▸")]
    press(gpt, "c")
    assert [label for label in labels(gpt) if label.startswith("▸")] == ["▸ transformer · Transformer"]


def test_the_backward_pass_is_stepped_through(gpt):
    press(gpt, "arrow_right")
    assert labels(gpt, ".now") == ["loss = cross_entropy"]
    assert "the start" in panel(gpt)
    press(gpt, "arrow_right", "arrow_right")
    assert labels(gpt, ".now") == ["ln_f · layer_norm"]
    assert labels(gpt, ".done") == ["lm_head · linear", "loss = cross_entropy"]
    assert labels(gpt, ".waits") == ["transformer.wte.weight"]
    assert "transformer.wte.weight: 1 of 2 arrived" in panel(gpt)
    press(gpt, "arrow_right", "arrow_right")
    assert labels(gpt, ".now") == ["▸ h.5 · Block"]
    assert "2 of 10" in gpt.find_element("css selector", ".now").text
    press(gpt, "arrow_left", "arrow_left", "arrow_left")
    assert labels(gpt, ".now") == ["lm_head · linear"]
    press(gpt, "end")
    assert labels(gpt, ".now") == ["wte · embedding"]
    assert len(labels(gpt, ".done")) == 12
    press(gpt, "home")
    assert not labels(gpt, ".now")
    assert not labels(gpt, ".done")


def test_what_flows_into_a_node_lights_up(gpt):
    from selenium.webdriver import ActionChains

    item = next(e for e in gpt.find_elements("css selector", ".item") if "h.1" in e.text)
    ActionChains(gpt).move_to_element(item).perform()
    assert set(labels(gpt, ".lit")) == {
        "transformer.wte.weight", "wte · embedding", "getitem", "add", "▸ h.0 · Block", "▸ h.1 · Block"
    }  # fmt: skip
    assert len(gpt.find_elements("css selector", "#edges .lit")) == 5
    assert "transformer.h.1" in panel(gpt)
    assert "2 layer_norm, 4 linear, self_attention, 2 add, gelu" in panel(gpt)


def test_search_opens_the_way_to_what_it_finds(gpt):
    press(gpt, "/")
    press(gpt, *"h.3.mlp.c_proj")
    assert labels(gpt, ".found") == ["c_proj · linear"]
    assert "transformer.h.3.mlp.c_proj" in panel(gpt)
    assert gpt.find_element("id", "hits").text == "1 found"
    press(gpt, *["backspace"] * 14, *"gelu", "enter", "enter")
    assert "transformer.h.2.mlp" in panel(gpt)
    press(gpt, "escape")
    assert not labels(gpt, ".found")


def test_a_shade_shows_where_the_time_goes(gpt):
    gpt.execute_script("shade.value = 'bytes'; shade.onchange()")
    shares = gpt.execute_script(
        "return [...document.querySelectorAll('.shaded')].map(e => +e.style.getPropertyValue('--share'))"
    )
    assert max(shares) == 1
    assert len(set(shares[4:10])) == 1  # of six equal blocks


def test_one_of_scalars_shows_values_and_gradients(browser, tmp_path):
    a, b, f = leaves(2.0, -3.0, -2.0)
    d = a * b + a
    loss = d * f
    draw(loss, tmp_path / "chain.html")
    show(browser, tmp_path / "chain.html", "dark")
    notes = browser.execute_script("return [...document.querySelectorAll('.item')].map(e => e.innerText)")
    assert notes == ["a\n2 g 4", "b\n-3 g -4", "mul\ng -2", "d = add\n-4 g -2", "f\n-2 g -4", "loss = mul\n8 g 1"]
    assert_quiet(browser)


def test_a_forward_pass_alone_can_be_looked_at(browser, tmp_path):
    from tensorlite.tools import watch

    (x,) = leaves(np.ones((2, 3)))
    with watch() as seen:
        (x * x).sum()
    draw(seen, tmp_path / "forward.html", title="<i>")
    show(browser, tmp_path / "forward.html")
    assert browser.find_element("tag name", "h1").text == "<i>"
    assert browser.find_element("id", "at").text == "no backward"
    press(browser, "arrow_right", "arrow_left", "end")
    assert labels(browser) == ["x", "mul", "sum"]
    assert_quiet(browser)
