"""The page of what each head attends to: its numbers, what a reader sees of them, and what is refused."""

import base64
import json
import re
import sys

import numpy as np
import pytest
from browser import assert_quiet, show
from scripts import TEXT, assert_complaint, run
from tolerances import assert_close

import gpt.attention
import sample as script
import tensorlite as tl
from gpt import GPT, GPTConfig
from gpt.attention import FEW, attention_weights, look, most_tokens, page_data, plain_pattern, shown_part
from gpt.checkpoint import load_checkpoint, save_checkpoint
from gpt.cli import run_script
from gpt.generate import draw
from gpt.text.bpe import learn_bpe
from gpt.text.tokenizers import ByteTokenizer, CharTokenizer
from tensorlite.tools.page import render

SHAPE = {"vocab_size": 11, "block_size": 16, "n_layer": 2, "n_head": 3, "n_embd": 12}


def model_of(seed: int = 1, scale: float = 20.0, **shape) -> GPT:
    """One whose scores are far apart, and its attention uneven."""
    model = GPT(GPTConfig(**SHAPE | shape), seed=seed).eval()
    for p in model.parameters():
        if p.ndim == 2:
            p.data *= scale
    return model


def draws(model, given, n: int, **options) -> list:
    """What `remembering` keeps of a sample."""
    return [(int(new[0]), logits[0]) for new, logits in draw(model, np.array([given]), n, **options)]


# --- the numbers ---


@pytest.mark.parametrize("shape", [
    {}, {"bias": False, "qkv_bias": True}, {"tie_weights": False, "head_bias": True, "activation": "relu"},
    {"dropout": 0.5}, {"n_layer": 1, "n_head": 1},
])  # fmt: skip
def test_the_weights_are_those_of_the_models_own_pass(shape):
    model, ids = model_of(**shape), np.arange(11) * 7 % 11
    logits, weights = look(model, ids)
    L, H, T = model.config.n_layer, model.config.n_head, len(ids)  # noqa: N806
    assert weights.shape == (L, H, T, T)
    np.testing.assert_array_equal(logits, model(ids[None])[0].numpy()[0])
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert not weights[..., ~np.tri(T, dtype=bool)].any()
    x = model.transformer.wte(ids[None]) + model.transformer.wpe.weight[:T]
    for layer, block in enumerate(model.transformer.h):
        qkv = block.attn.c_attn(block.ln_1(x))
        q, k, v = qkv.numpy()[0].astype(np.float64).reshape(T, 3, H, -1).transpose(1, 2, 0, 3)
        scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])) * np.tri(T)
        np.testing.assert_allclose(weights[layer], scores / scores.sum(-1, keepdims=True), atol=1e-5)
        gathered = (weights[layer] @ v).swapaxes(0, 1).reshape(1, T, -1)
        assert_close(gathered.astype(np.float32), tl.self_attention(qkv, H).numpy())
        x = block(x)


def test_losses_and_guesses():
    model, tokenizer = model_of(), CharTokenizer("abcdefghijk")
    ids = tokenizer.encode("abacadaehhk")
    data = page_data(model, tokenizer, ids)
    logits, loss = model(ids[None, :-1], ids[None, 1:])
    assert data["losses"][0] is None
    assert np.mean(data["losses"][1:]) == pytest.approx(loss.item(), rel=1e-3)
    p = tl.softmax(tl.cast(model(ids[None])[0], "float64")).numpy()[0]
    assert data["likeliest"][0] == []
    for row, found in zip(p, data["likeliest"][1:], strict=True):  # also of what comes after the last
        assert [token for token, _ in found] == np.argsort(-row)[:5].tolist()
        assert [share for _, share in found] == pytest.approx(np.sort(row)[:-6:-1].tolist(), rel=1e-3)
    weights = look(model, ids)[1]
    shown = (np.frombuffer(base64.b64decode(data["weights"]), np.uint8) / 255) ** 2
    np.testing.assert_allclose(shown, weights[:, :, *np.tril_indices(len(ids))].ravel(), atol=0.004)
    assert data["texts"] == list("abacadaehhk")
    assert data["first"] == len(ids)  # nothing was sampled


@pytest.mark.parametrize(("given", "n"), [(1, 40), (5, 3), (8, 0), (12, 4), (16, 1), (40, 20), (40, 0)])
def test_what_was_sampled_keeps_the_chances_it_was_drawn_by(given, n):
    model, ids = model_of(), np.arange(given) * 3 % 11
    drawn = draws(model, ids, n, temperature=0.7, top_k=6)
    part, data = shown_part(model.config, given, given + n), page_data(model, CharTokenizer("abcdefghijk"), ids, drawn)
    whole = [*ids.tolist(), *(token for token, _ in drawn)]
    assert data["ids"] == whole[part.start : part.stop]
    assert data["first"] == given - part.start
    for at in range(data["first"], len(part)):
        token, logits = drawn[at - data["first"]]
        assert data["losses"][at] == pytest.approx(-tl.log_softmax(logits.astype(np.float64)).numpy()[token], rel=1e-3)
    if part.start == 0:  # nothing of the context was cut off by then: the page's own pass has the same
        own = page_data(model, CharTokenizer("abcdefghijk"), np.array(data["ids"]))
        assert data["losses"] == [None, *(pytest.approx(loss, rel=2e-3, abs=1e-4) for loss in own["losses"][1:])]


@pytest.mark.parametrize(("given", "total", "start", "stop"), [
    (5, 5, 0, 5), (16, 16, 0, 16), (17, 17, 1, 17), (99, 99, 83, 99),  # of a text the end
    (1, 99, 0, 16), (8, 99, 0, 16), (9, 99, 1, 17), (16, 99, 8, 24), (50, 99, 42, 58), (50, 52, 36, 52),
])  # fmt: skip
def test_which_part_is_shown(given, total, start, stop):
    assert shown_part(GPTConfig(**SHAPE), given, total) == range(start, stop)


@pytest.mark.parametrize(("layers", "heads", "block", "most"), [
    (1, 1, 8, 8), (6, 6, 256, 256), (12, 12, 1024, 208), (48, 25, 1024, 71), (2000, 2000, 8, 1),
])  # fmt: skip
def test_a_page_has_a_size_that_browsers_like(layers, heads, block, most):
    shape = GPTConfig(block_size=block, n_layer=layers, n_head=heads, n_embd=heads)
    assert most_tokens(shape) == most
    assert layers * heads * most * (most + 1) // 2 <= max(2**22, layers * heads)


T = 24
IDS = np.arange(T) % 6
ROW, COLUMN = np.indices((T, T))


def rows(scores) -> np.ndarray:
    weights = np.where(COLUMN <= ROW, scores, 0.0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("scores", "ids", "expected"), [
    ((COLUMN == ROW - 1) + 1e-9, IDS, "previous token"),
    ((COLUMN == 0) + 1e-9, IDS, "first token"),
    ((COLUMN == ROW) + 1e-9, IDS, "itself"),
    ((IDS[:, None] == IDS) * (COLUMN < ROW) + 1e-9, IDS, "same token"),
    ((COLUMN == ROW - 1) * 30 + 1, IDS, "previous token"),  # two thirds of it
    ((COLUMN == ROW - 1) * 4 + 1, IDS, None),  # a third
    ((COLUMN == ROW - 2) + 1e-9, IDS, None),
    (np.ones((T, T)), IDS, None),
    (np.ones((T, T)), IDS * 0, None),  # all is the same token: nothing is plain about looking there
])  # fmt: skip
def test_a_pattern_is_named_where_it_is_plain(scores, ids, expected):
    found = plain_pattern(rows(scores), ids)
    assert (found and found[0]) == expected
    assert found is None or 0.5 <= found[1] <= 1


def test_a_few_tokens_name_no_pattern():
    for n in range(1, 2 * FEW):
        assert plain_pattern(np.eye(n), np.arange(n)) is None
    assert plain_pattern(np.eye(2 * FEW), np.arange(2 * FEW)) == ("itself", 1.0)


def test_attention_weights_of_low_precision_are_float32():
    qkv = tl.cast(tl.randn(1, 5, 12), "bfloat16")
    assert attention_weights(qkv, 2).dtype == np.float32


# --- texts ---

BYTES = ByteTokenizer()
WORDS = "the cat and the hat, the rat and the bat; " * 9


@pytest.mark.parametrize(("tokenizer", "text", "texts"), [
    (CharTokenizer("\n\r ab"), "a b\n\r", ["a", " ", "b", "\n", "\\r"]),
    (BYTES, "é\n", ["\\xc3", "é", "\n"]),
    (BYTES, "\udcc3a\udcff\x1b\u202e", ["\\xc3", "\\xc3a", "\\xff", "\\x1b", "\\xe2", "\\x80", "\\u202e"]),
    ("bpe", "the é", ["the", " ", "#128", "é"]),
])  # fmt: skip
def test_what_a_token_looks_like(tokenizer, text, texts):
    tokenizer = learn_bpe(WORDS, 265) if tokenizer == "bpe" else tokenizer
    model = model_of(vocab_size=tokenizer.vocab_size)
    data = page_data(model, tokenizer, tokenizer.encode(text))
    shown = [re.sub(r"^#\d+$", "#128", one) for one in data["texts"]]
    assert shown == texts
    assert {*data["ids"], *(token for row in data["likeliest"] for token, _ in row)} == data["names"].keys()
    assert all(data["names"].values())
    json.dumps(data, allow_nan=False)


# --- the commands ---


@pytest.fixture
def command(copy, monkeypatch, capsys):
    """command(*args, status=0): what python -m gpt.attention prints, or with main=sample.main that script."""

    def call(*args, status: int = 0, main=gpt.attention.main, name: str = "attention") -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            run_script(main, "take a smaller model")
        out, err = capsys.readouterr()
        assert stop.value.code == status, err
        return out, err

    return call


def data_of(page) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())[1])


def test_a_page_of_a_text(command, copy, cwd):
    (cwd / "short.txt").write_bytes(b"\xef\xbb\xbf9 is\r\n")
    assert command("run", "--text=short.txt")[0] == "written: attention.html\n"
    data = data_of(cwd / "attention.html")
    assert "".join(data["texts"]) == "9 is\n"
    assert data["facts"] == ["run/best.safetensors", "short.txt"]
    note = f"tokens {len(TEXT) - 7:,} to {len(TEXT):,} of {len(TEXT):,}: the model reads 8 at a time"
    assert command(copy / "best.safetensors", "--text=text.txt", "--out=p.html")[0] == f"written: p.html, {note}\n"
    data = data_of(cwd / "p.html")
    assert data["facts"][-1] == note
    assert "".join(data["texts"]) == TEXT[-8:]


def test_a_page_of_a_sample(command, cwd):
    sampling = {"main": script.main, "name": "sample.py"}
    args = ["--model=run", "--prompt=9 is", "--max-new-tokens=30", "--temperature=2"]
    plain = command(*args, **sampling)
    out, err = command(*args, "--attention=p.html", **sampling)
    assert out == plain[0]
    assert err.endswith("attention: p.html, tokens 1 to 8 of 34: the model reads 8 at a time\n")
    data = data_of(cwd / "p.html")
    assert ("".join(data["texts"]), data["first"]) == (out[:8], 4)
    assert "sampled at temperature 2; probabilities are those at 1" in data["facts"]
    out, err = command(*args, "--attention=p.html", "--num-samples=2", "--quiet", **sampling)
    assert err == "warning: --attention shows the first sample alone\n"
    assert data_of(cwd / "p.html") == data
    for changed, first in (("--max-new-tokens=0", len("9 is")), ("--prompt=9", 1)):  # nothing of it, and nearly all
        command(*args, changed, "--attention=p.html", **sampling)
        assert data_of(cwd / "p.html")["first"] == first


def test_a_link_stays(command, cwd):
    (cwd / "link.html").symlink_to("there.html")
    for args in (["--attention=link.html"], ["--attention=link.html", "--out=o"]):
        command("--model=run", "--max-new-tokens=3", *args, main=script.main)
        assert (cwd / "link.html").is_symlink()
        assert data_of(cwd / "there.html")


MISTAKES = {  # arguments of python -m gpt.attention, and what is said
    "no text": (["run"], "the following arguments are required: --text (see --help)"),
    "no run": (["nowhere", "--text=a.txt"], "there is no checkpoint nowhere"),
    "no such text": (["run", "--text=nowhere.txt"], "cannot read the text nowhere.txt: No such file or directory"),
    "a folder": (["run", "--text=run"], "run is not a regular file: give another"),
    "empty": (["run", "--text=empty.txt"], "empty.txt is empty: give a file with text"),
    "Latin-1": (["run", "--text=latin1.txt"], "the text is not UTF-8, for it has the byte 0xE9 at position 3"),
    "unknown characters": (["run", "--text=other.txt"], "not in the model's vocabulary of 24: '漢'"),
    "a page in no folder": (["run", "--text=a.txt", "--out=no/p.html"], "cannot write no/p.html: No such file"),
    "a page that is a folder": (["run", "--text=a.txt", "--out=run"], "cannot write run: it is not a regular file"),
    "a bigram table": (["bigram", "--text=a.txt"], "a bigram table has no attention to show: take a run of another"),
    "not finite": (["huge", "--text=a.txt"], "the model's logits are not finite: take a checkpoint of a run that went"),
}


@pytest.fixture(scope="module")
def bigram(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bigram")
    (folder / "text.txt").write_text(TEXT)
    run("train.py", "bigram", "--data=text.txt", "--max-iters=1", "--eval-iters=1", "--out=bigram", cwd=folder)
    return folder / "bigram"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(mistake, command, cwd, bigram):
    args, said = MISTAKES[mistake]
    for name, content in {"a": b"9 is", "empty": b"", "latin1": b"caf\xe9", "other": "漢".encode()}.items():
        (cwd / f"{name}.txt").write_bytes(content)
    (cwd / "bigram").symlink_to(bigram)
    if mistake == "not finite":
        spoil(cwd / "run", cwd / "huge")
    before = sorted(cwd.rglob("*"))
    out, err = command(*args, status=2)
    assert out == ""
    assert_complaint(err, said, "attention")
    assert sorted(cwd.rglob("*")) == before


def spoil(folder, to) -> None:
    checkpoint = load_checkpoint(folder / "best.safetensors")
    for weight in checkpoint.weights.values():
        weight *= 1e30
    to.mkdir()
    save_checkpoint(to / "best.safetensors", checkpoint)


@pytest.mark.parametrize(("args", "said"), [
    (["--model=bigram"], "a bigram table has no attention to show"),
    (["--model=run", "--out=p.html"], "--out and --attention both name p.html: give two files"),
    (["--model=run", "--attention=run"], "cannot write run: give a file name in a folder that exists"),
])  # fmt: skip
def test_a_sample_without_a_page_is_refused_before_it_begins(args, said, command, cwd, bigram):
    (cwd / "bigram").symlink_to(bigram)
    out, err = command("--attention=p.html", *args, main=script.main, name="sample.py", status=2)
    assert out == ""
    assert_complaint(err, said, "sample.py")
    assert not (cwd / "p.html").exists()


# --- what a reader sees ---

HOSTILE = "ab</script><img src=x onerror=alert(1)>\n"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages by name: of plain attention, with a sample; of text that would be run if it could."""
    folder, tokenizer = tmp_path_factory.mktemp("pages"), CharTokenizer.from_text(HOSTILE + "xyz")
    model = model_of(vocab_size=tokenizer.vocab_size, block_size=64)
    ids = tokenizer.encode(HOSTILE[:20])
    for name, data in {
        "sample": page_data(model, tokenizer, ids, draws(model, ids, 12)),
        "hostile": page_data(model, tokenizer, tokenizer.encode(HOSTILE)),
        "one": page_data(model, tokenizer, ids[:1]),
    }.items():
        data["patterns"][0][1] = ("previous token", 0.62)
        if name == "hostile":
            data["texts"][3] = HOSTILE
            data["names"] = dict.fromkeys(data["names"], HOSTILE)
        page = render(gpt.attention.TEMPLATE, "Attention", data | {"facts": [HOSTILE, "32 tokens"]})
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return folder


@pytest.fixture
def opened(browser, pages):
    """opened(name, scheme) -> the browser with it; an error in its script fails the test at its end too."""

    def call(name: str, scheme: str = "light"):
        show(browser, pages / f"{name}.html", scheme)
        return browser

    yield call
    assert_quiet(browser)


def text_of(browser, selector: str) -> list[str]:
    return browser.execute_script("return [...document.querySelectorAll(arguments[0])].map(n => n.innerText)", selector)


def press(browser, *keys: str) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    for key in keys:
        ActionChains(browser).send_keys(getattr(Keys, key)).perform()


def hover(browser, selector: str, i: int) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).move_to_element(browser.find_elements("css selector", selector)[i]).perform()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hovering_a_token_shows_what_it_was_and_could_have_been(opened, pages, scheme):
    browser, data = opened("sample", scheme), data_of(pages / "sample.html")
    assert text_of(browser, "#drawn") == ["sampled"]
    hover(browser, ".token", 21)
    (what,) = text_of(browser, "#what")
    assert f"{data['losses'][21]:.2f} nats, {data['losses'][21] / np.log(2):.2f} bits" in what
    assert "token 22 of 32" in what
    assert what.endswith(", sampled")
    guesses = text_of(browser, "#likeliest .row")
    assert len(guesses) == 5 + (data["ids"][21] not in dict(data["likeliest"][21]))
    for row, (token, p) in zip(guesses, data["likeliest"][21], strict=False):
        name, share = row.split("\n")[0], row.split("\n")[-1]
        assert name == data["names"][str(token)].replace(" ", "·").replace("\n", "↵")
        assert float(share.strip("< %")) == pytest.approx(100 * p, rel=0.06, abs=0.01)
    assert len(text_of(browser, "#likeliest .it")) == 1
    assert text_of(browser, "#looks") == ["attends to · mean of all heads"]
    hover(browser, ".token", 32)
    assert text_of(browser, "#what") == ["?what comes next"]
    assert len(text_of(browser, "#likeliest .row")) == 5


def test_what_a_head_attends_to_is_marked_in_the_text(opened, pages):
    browser, data = opened("sample"), data_of(pages / "sample.html")
    weights = np.frombuffer(base64.b64decode(data["weights"]), np.uint8).reshape(6, -1)
    hover(browser, ".tile", 4)
    row = weights[4, -32:] / 255.0  # the last token's
    bars = "return cells.map(c => +c.style.getPropertyValue('--a'))"
    np.testing.assert_allclose(browser.execute_script(bars), [*(row**2 / (row**2).max()), 0], atol=1e-3)
    assert text_of(browser, "#looks") == ["attends to · layer 1, head 1"]
    press(browser, "TAB", "TAB")  # from the page to the text
    hover(browser, "h1", 0)
    assert text_of(browser, "#looks") == ["attends to · mean of all heads"]
    mean = ((weights / 255.0) ** 2).mean(0)[-32:]
    np.testing.assert_allclose(browser.execute_script(bars), [*(mean / mean.max()), 0], atol=1e-3)


def test_all_of_it_goes_by_keys(opened):
    browser = opened("sample")
    state = "return [state.token, state.head, state.large]"
    hover(browser, "h1", 0)
    press(browser, "TAB")
    assert browser.execute_script(state) == [31, -1, False]
    press(browser, "ARROW_LEFT", "ARROW_LEFT", "ARROW_RIGHT")
    assert browser.execute_script(state) == [30, -1, False]
    press(browser, "HOME", "ARROW_LEFT")
    assert browser.execute_script(state) == [0, -1, False]
    assert "where the text begins: no guess was made" in text_of(browser, "#what")[0]
    press(browser, "END", "TAB", "TAB")  # over the button of the mean
    assert browser.execute_script(state) == [32, 0, False]
    press(browser, "ARROW_RIGHT")
    assert text_of(browser, "#head") == ["layer 0, head 1: previous token, 62 % of its attention"]
    press(browser, "ENTER")
    assert browser.execute_script(state) == [32, 1, True]
    shown = "return [...document.querySelectorAll('#grid, #large')].map(n => n.checkVisibility())"
    assert browser.execute_script(shown) == [False, True]
    press(browser, "ARROW_DOWN", "ARROW_RIGHT", "ARROW_RIGHT", "ARROW_DOWN")
    assert text_of(browser, "#head") == ["layer 1, head 2"]
    press(browser, "ESCAPE")
    assert browser.execute_script(state) == [32, 5, False]
    assert browser.execute_script(shown) == [True, False]
    press(browser, "ESCAPE")
    assert browser.execute_script(state) == [32, -1, False]


def test_a_click_enlarges_and_a_point_says_who_looks_at_whom(opened):
    from selenium.webdriver import ActionChains

    browser = opened("sample")
    tile = browser.find_elements("css selector", ".tile")[1]
    assert tile.text == "previous token"
    tile.click()
    i, j = 12, 7
    x, y = browser.execute_script("return [...arguments].map(k => gutter + (k + 0.5) * side / T)", j, i)
    canvas = browser.find_element("css selector", "#large canvas")
    width, height = canvas.rect["width"], canvas.rect["height"]
    ActionChains(browser).move_to_element_with_offset(canvas, int(x - width / 2), int(y - height / 2)).perform()
    texts = browser.execute_script("return texts")
    assert text_of(browser, "#caption")[0].startswith(f"“{texts[i]}” ({i + 1}) looks at “{texts[j]}” ({j + 1}) with ")
    assert f"token {i + 1} of 32" in text_of(browser, "#what")[0]
    browser.find_element("css selector", "#back").click()
    assert not browser.execute_script("return state.large")


PIXELS = """return tiles.map(tile => { const c = tile.querySelector("canvas");
return [...c.getContext("2d").getImageData(0, c.height - 1, c.width, 1).data]; })"""


def test_the_maps_are_drawn_in_the_colours_of_the_scheme(opened, pages):
    data, maps = data_of(pages / "sample.html"), {}
    weights = np.frombuffer(base64.b64decode(data["weights"]), np.uint8).reshape(6, -1)[:, -32:] / 255.0
    for scheme, (low, high) in {"light": ("f4f5f7", "0b62c4"), "dark": ("1d2128", "6fb1ff")}.items():
        low, high = (np.array([*bytes.fromhex(colour)]) for colour in (low, high))
        maps = np.array(opened("sample", scheme).execute_script(PIXELS)).reshape(6, 32, 4)
        np.testing.assert_allclose(maps[..., :3], low + weights[..., None] * (high - low), atol=1.01)
        assert (maps[..., 3] == 255).all()


@pytest.mark.parametrize("name", ["sample", "hostile", "one"])
@pytest.mark.parametrize("width", [360, 1366])
def test_it_fits_the_screen(opened, name, width):
    browser = opened(name)
    metrics = {"width": width, "height": 768, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        for act in ("", "tiles[0].click()"):
            browser.execute_script(act)
            whole = "const d = document.documentElement; return [d.scrollWidth, d.scrollHeight]"
            right, bottom = browser.execute_script(whole)
            assert right <= width
            assert bottom <= 768 or width < 900  # there one scrolls down
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_text_is_never_markup(opened):
    browser = opened("hostile")
    hover(browser, ".token", 3)
    assert HOSTILE.strip() in text_of(browser, "#facts")[0]
    for seen in (text_of(browser, ".token")[3], *text_of(browser, "#what"), *text_of(browser, "#likeliest .row")):
        assert seen.startswith(HOSTILE.replace(" ", "·").strip())
    assert browser.execute_script("return document.images.length") == 0
