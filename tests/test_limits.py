"""No value eats the machine: what cannot fit, or may have no end, is refused before anything is made for it."""

import os
import shlex
import socket
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from scripts import ROOT, TINY, assert_complaint, environment

import gpt.text.dataset
import gpt.text.sources
import gpt.text.tokenizers
from gpt.errors import UserError
from gpt.text.dataset import make_dataset, optima
from gpt.text.sources import Text, load_text
from gpt.text.tokenizers import make_tokenizer

# A process starts with the peak of the one it was forked from: this small one starts the script, and tells its peak.
MEASURED = """if True:
    import resource, subprocess, sys
    status = subprocess.call(sys.argv[1:])
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    sys.exit(status)
"""
HUGE = 10**12
TRAIN, RESUME = shlex.join(["train.py", *TINY, "--out=new"]), "train.py --resume --out=run --max-iters=30"
SAMPLE = "sample.py --model=run"
REFUSED = {
    f"{TRAIN} --data=/dev/zero": "/dev/zero is a pipe or a device",
    f"{TRAIN} --data=fifo --tokenizer=byte": "fifo is a pipe or a device",
    f"{TRAIN} --data=sparse": "sparse has 1,099,511,627,776 bytes, which need 2 times as much memory, and there are ",
    f"{TRAIN} --data=ab --block-size={10**9} --batch-size=1": "lower --block-size",
    f"{TRAIN} --block-size=1 --batch-size=1 --gradient-accumulation-steps={10**9}": "lower --gradient-accum",
    f"{TRAIN} --n-layer={10**8} --n-embd=1 --n-head=1": "--n-layer",
    f"{TRAIN} --block-size=400000 --batch-size=1": "--block-size",
    f"{TRAIN} --init-from=sparse": "sparse has 1,099,511,627,776 bytes, which need as much memory",
    f"{TRAIN} --init-from=fifo": "fifo is not a regular file: give another",
    f"{RESUME} --eval-iters={HUGE}": "lower --eval-iters",
    f"{RESUME} --batch-size={10**9}": "lower --batch-size",
    f"{SAMPLE} --num-samples={2**31 - 1}": "lower --num-samples",
    f"{SAMPLE} --max-new-tokens={HUGE} --out=text": "lower --max-new-tokens",
    f"{SAMPLE} --prompt-file=/dev/zero": "the prompt has more than 16,777,216 bytes",
    f"{SAMPLE} --model=sparse": "sparse has 1,099,511,627,776 bytes, which need as much memory",
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_made_for_it(copy, command):
    pytest.importorskip("resource", reason="tells a process's peak of memory, where there is one")
    os.mkfifo("fifo")
    with open("sparse", "wb") as file:  # noqa: PTH123
        file.truncate(2**40)
    script, *arguments = shlex.split(command)
    before = sorted(copy.parent.rglob("*"))
    measured = [sys.executable, "-c", MEASURED, sys.executable, ROOT / script, *arguments]
    done = subprocess.run(measured, capture_output=True, text=True, env=environment(copy.parent), timeout=30)
    assert done.returncode == 2
    assert_complaint(done.stderr, REFUSED[command], script)
    assert int(done.stdout) < 100_000_000
    assert sorted(copy.parent.rglob("*")) == before


# --- texts ---


@pytest.mark.parametrize("record", [0, 5])
@pytest.mark.parametrize("kind", ["char", "byte"])
@pytest.mark.parametrize("piece", [1, 7, 50])
def test_a_text_in_pieces_is_the_same_text(monkeypatch, kind, record, piece):
    text = Text("abäab" * 3 + "ccbba" * 7 if kind == "char" else "abcab" * 3 + "ccbba" * 7, "test", "test", record)

    def made():
        data = make_dataset(text, make_tokenizer(kind, text.text), 2, 0.4)
        return data.train.tokens.tolist(), data.val.tokens.tolist(), data.fingerprint, optima(data)

    expected = made()
    for module in (gpt.text.dataset, gpt.text.stored):
        monkeypatch.setattr(module, "PIECE", piece)
    assert made() == expected
    with pytest.raises(UserError, match="not in the model's vocabulary of 2: 'c', 'd'; leave"):
        make_tokenizer("char", "ab").encode("abdab" * 20 + "c")
    with pytest.raises(UserError, match="byte 0xFF at position 60"):
        make_tokenizer("char", "ab").encode("a" * 60 + "\udcff")


@pytest.mark.parametrize("symbols", ["ab \n", "äöü ", "日本語\n", "😀ab "])
@pytest.mark.parametrize("kind", ["char", "byte"])
def test_memory_is_a_few_bytes_a_character(kind, symbols):
    text = symbols * 1_000_000
    size = len(text.encode()) if kind == "byte" else len(text)  # tokens
    tracemalloc.start()
    optima(make_dataset(Text(text, "test", "test"), make_tokenizer(kind, text), 8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6 + 2 * size + sys.getsizeof(text)  # a piece's indices; the tokens; the part that is encoded


# --- downloads ---


@pytest.mark.parametrize("slow", [True, False])
def test_a_download_without_an_end_is_ended(cwd, monkeypatch, slow):
    ended = threading.Event()

    def serve(server):
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            try:
                while not (slow and ended.wait(0.01)):
                    connection.sendall(b"x" * (1 if slow else 2**16))
            except OSError:  # hung up
                ended.set()

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(gpt.text.sources, "DEADLINE_ASKED", 0.5 if slow else 60.0)
    before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(gpt.text.sources, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.getsockname()[1]}/")
        thread = threading.Thread(target=serve, args=(server,), daemon=True)
        thread.start()
        said = "not complete after 0.5 seconds|wrong sha256" if slow else "bytes that came are not the expected text"
        with pytest.raises(UserError, match=said):
            load_text("shakespeare", block_size=8)
        assert ended.wait(30)  # the client is no longer there, be it with a deadline or with bytes enough
        thread.join(30)
    for thread in threading.enumerate()[before:]:
        thread.join(30)
    assert threading.active_count() == before


def test_an_answer_is_repeated_in_part_only(cwd, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with server.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 500 " + b"no way \x1b[31m" * 900 + b"\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        monkeypatch.setattr(gpt.text.sources, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.getsockname()[1]}/")
        with pytest.raises(UserError) as error:
            load_text("shakespeare", block_size=8)
        thread.join()
    assert "no way" in str(error.value)
    assert len(str(error.value)) < 600


def test_optima_of_large_vocabularies_take_no_table(monkeypatch):
    monkeypatch.setattr(gpt.text.dataset, "MAX_BIGRAM_VOCAB", 2)
    text = Text("abc" * 30, "test", "test")
    monkeypatch.setattr(gpt.text.dataset, "MAX_TRIGRAM_VOCAB", 2)
    assert list(optima(make_dataset(text, make_tokenizer("char", text.text), 2))) == ["uniform", "unigram"]
    assert np.isfinite(optima(make_dataset(text, make_tokenizer("char", text.text), 2))["unigram"]).all()
