"""python -m gpt.export: transformers and ONNX Runtime compute our logits from what it writes, and nothing is lost."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from scripts import ROOT, assert_complaint, environment, run
from test_checkpoint import make

import gpt.export.huggingface
import gpt.export.onnx
from gpt.checkpoint import Checkpoint, save_checkpoint
from gpt.cli import run_script
from gpt.export.__main__ import MEMORY_ADVICE, main
from gpt.generate import generate
from gpt.text.bpe import learn_bpe
from gpt.text.tokenizers import ByteTokenizer, CharTokenizer, readable
from gpt.training.initial import load_initial
from tensorlite import no_grad

SYMBOLS = CharTokenizer("".join(sorted(set("\0\t\n\r !#.<>Theabcn|é\u0301\u2028▁Ġ日😀"))))
SUBWORDS = learn_bpe("The bees hum, and then the others do. " * 9, 270)
SHAPE = {"tokenizer": SYMBOLS, "block_size": 16, "n_layer": 2, "n_embd": 16, "dropout": 0.1}
GPT2 = [
    {},
    {"activation": "relu", "bias": False},
    {"activation": "gelu", "bias": False, "qkv_bias": True, "n_head": 1},
    {"qkv_bias": False, "n_head": 16, "block_size": 1},
    {"tie_weights": False, "tokenizer": ByteTokenizer()},
    {"tokenizer": SUBWORDS},
]
OTHERS = [{"head_bias": True}, {"head_bias": True, "tie_weights": False, "n_layer": 1}, {"model": "bigram"}]
BATCHES = ((1, 1), (3, 5), (2, 16))
TIE = 1e-5  # between the two best logits, of which rounding may then choose either


def random_checkpoint(**options) -> Checkpoint:
    """Of a model none of whose parameters is what another could take for it: no zeros, and no ones."""
    checkpoint, rng = make(for_resume=False, **SHAPE | options), np.random.default_rng(5)
    model = checkpoint.build_model()
    for parameter in model.parameters():
        parameter.data = rng.normal(0.1, 0.3, parameter.shape).astype(np.float32)
    checkpoint.weights = model.state_dict()
    return checkpoint


def save(**options) -> Checkpoint:
    """In the run folder run/, from which it is exported."""
    checkpoint = random_checkpoint(**options)
    Path("run").mkdir()
    save_checkpoint(Path("run/best.safetensors"), checkpoint)
    return checkpoint


def export(monkeypatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpt.export", *args])
    return main()


def named(options: dict) -> str:
    return ", ".join(f"{key}={getattr(value, 'kind', value)}" for key, value in options.items()) or "defaults"


def logits(model, ids) -> np.ndarray:
    with no_grad():
        return model.eval()(ids)[0].numpy()


def ids_of(model) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, model.vocab_size, (B, min(T, model.block_size))) for B, T in BATCHES]


# --- ONNX ---


@pytest.mark.parametrize("options", GPT2 + OTHERS, ids=named)
def test_onnx_runtime_continues_as_we_do(cwd, monkeypatch, options):
    checkpoint = save(**options)
    assert export(monkeypatch, "run", "--onnx", "model.onnx") == 0
    proto = onnx.load("model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    model = checkpoint.build_model()
    floats = [i for i in proto.graph.initializer if i.data_type == onnx.TensorProto.FLOAT and len(i.dims)]
    assert sum(np.prod(i.dims) for i in floats) == model.num_parameters()  # tied weights once
    session = onnxruntime.InferenceSession("model.onnx")
    assert [output.name for output in session.get_outputs()] == ["logits", "next_logits"]
    for ids in ids_of(model):
        every, last = session.run(None, {"ids": ids})
        np.testing.assert_allclose(every, logits(model, ids), rtol=0, atol=1e-4)
        np.testing.assert_array_equal(last, every[:, -1])
    text = generate(model, [[3], [5]], 200, temperature=0)
    assert len(set(text[0])) > 1, "a text of one token tells nothing"
    length = 1
    for end in range(1, text.shape[1]):
        length = max(model.block_size // 2, 1) if length > model.block_size else length
        (scores,) = session.run(["next_logits"], {"ids": text[:, end - length : end]})
        chosen = np.take_along_axis(scores, text[:, end, None], axis=1)
        assert (chosen > scores.max(axis=1, keepdims=True) - TIE).all()
        length += 1


def test_onnx_metadata_are_the_model_and_no_path(cwd, monkeypatch):
    checkpoint = save()
    export(monkeypatch, "run", "--onnx", "model.onnx")
    about = onnxruntime.InferenceSession("model.onnx").get_modelmeta().custom_metadata_map
    about = {key: json.loads(value) for key, value in about.items()}
    assert about["tokenizer"] == checkpoint.tokenizer.to_dict()
    shape = {key: value for key, value in vars(checkpoint.config.gpt).items() if value is not None}
    assert about["config"] == {"model": "gpt", **shape}


@pytest.mark.parametrize(("options", "said"), [({}, "at_most_16_tokens"), ({"block_size": 1}, "Got: 2 Expected: 1")])
def test_onnx_runtime_refuses_more_than_block_size(cwd, monkeypatch, options, said):
    model = save(**options).build_model()
    export(monkeypatch, "run", "--onnx", "model.onnx")
    silent = onnxruntime.SessionOptions()
    silent.log_severity_level = 4
    session = onnxruntime.InferenceSession("model.onnx", silent)
    with pytest.raises(Exception, match=said):
        session.run(None, {"ids": np.zeros((1, model.block_size + 1), np.int64)})


# --- Hugging Face ---


@pytest.fixture(scope="module")
def auto():
    """Loads what is in a folder: the model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return lambda folder: (AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("options", GPT2, ids=named)
def test_transformers_continue_as_we_do(cwd, monkeypatch, auto, options):
    import torch

    checkpoint = save(**options)
    assert export(monkeypatch, "run", "--huggingface", "hf") == 0
    assert {path.name for path in Path("hf").iterdir()} == set(gpt.export.huggingface.FILES)
    model, (theirs, tokenizer) = checkpoint.build_model(), auto("hf")
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    assert theirs.config.tie_word_embeddings == checkpoint.config.gpt.tie_weights
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (None, None)
    for ids in ids_of(model):
        with torch.no_grad():
            got = theirs(torch.tensor(ids)).logits.numpy()
        np.testing.assert_allclose(got, logits(model, ids), rtol=0, atol=1e-5)
    if model.block_size > 1:
        text = "The b"
        given = tokenizer(text, return_tensors="pt")
        got = theirs.generate(**given, max_new_tokens=11, do_sample=False, pad_token_id=0)[0].numpy()
        ours = generate(model, checkpoint.tokenizer.encode(text)[None], 11, temperature=0)[0]
        np.testing.assert_array_equal(got, ours)
        assert tokenizer.decode(got) == readable(checkpoint.tokenizer.decode(ours))


TEXTS = [
    "",
    " ",
    "\n",
    "\r\n  \n\n ",
    " The bee .\n",
    "e\u0301\u0301é",
    "\0\t!",
    "<|Then|>",
    "日😀 ▁Ġ\u2028",
    "n # a . b",
]
UNUSUAL = ["Don't, isn't", "<|endoftext|>", "ΑΒΓ\xa0\x85", "".join(map(chr, range(0x500)))]


@pytest.mark.parametrize(
    ("tokenizer", "texts"), [(SYMBOLS, TEXTS), (ByteTokenizer(), TEXTS + UNUSUAL), (SUBWORDS, TEXTS + UNUSUAL)]
)
def test_their_tokenizer_is_ours(cwd, monkeypatch, tokenizer, texts):
    from transformers import AutoTokenizer

    save(tokenizer=tokenizer, block_size=4096)
    export(monkeypatch, "run", "--huggingface", "hf")
    theirs = AutoTokenizer.from_pretrained("hf")
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.model_max_length == 4096
    for text in texts:
        given = theirs(text)
        assert set(given) == {"input_ids", "attention_mask"}  # GPT-2 would add token types to the embeddings
        assert given["input_ids"] == tokenizer.encode(text).tolist()
        assert theirs.decode(given["input_ids"]) == text
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 1000)
    assert theirs.decode(ids.tolist()) == readable(tokenizer.decode(ids))


@pytest.mark.parametrize("options", GPT2, ids=named)
def test_there_and_back_every_bit_is_the_same(cwd, monkeypatch, options):
    """What train.py --init-from starts with, beside what was exported."""
    checkpoint = save(**options)
    export(monkeypatch, "run", "--huggingface", "hf")
    initial = load_initial(Path("hf"), {})
    model, back = checkpoint.build_model(), initial.build_model(initial.shape, initial.tokenizer)
    for ids in ids_of(model):
        np.testing.assert_array_equal(logits(back, ids), logits(model, ids))
    for text in TEXTS:
        np.testing.assert_array_equal(initial.tokenizer.encode(text), checkpoint.tokenizer.encode(text))


def test_unknown_characters_are_refused_there_too(cwd, monkeypatch):
    from transformers import AutoTokenizer

    save()
    export(monkeypatch, "run", "--huggingface", "hf")
    with pytest.raises(Exception, match="Missing"):
        AutoTokenizer.from_pretrained("hf")("Q")


# --- what is refused, and what is replaced ---


def test_an_export_is_replaced(cwd, monkeypatch):
    for place in (["--huggingface", "new/hf"], ["--onnx", "model.onnx"]):
        contents = []
        for options in ({}, {}, {"bias": False}):
            if Path("run").exists():
                Path("run/best.safetensors").unlink()
                Path("run").rmdir()
            save(**options)
            export(monkeypatch, "run", *place)
            contents.append(snapshot(Path(place[1])))
        assert contents[0] == contents[1] != contents[2]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, or a file."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in [folder, *folder.rglob("*")]}


def other_folder():
    Path("there").mkdir()
    Path("there/model.safetensors").write_bytes(Path("run/best.safetensors").read_bytes())


def other_file():
    Path("there").write_text("To be, or not to be, that is the question")


def read_only_folder():
    gpt.export.huggingface.write_huggingface(Path("there"), random_checkpoint(bias=False))
    Path("there/config.json").chmod(0o444)


def read_only_file():
    gpt.export.onnx.write_onnx(Path("there"), random_checkpoint())
    Path("there").chmod(0o444)


def linked_folder():
    Path("there").mkdir()
    Path("there/model.safetensors").symlink_to("../run/best.safetensors")


REFUSED = [
    ("", "the following arguments are required: RUN"),
    ("run", "one of the arguments --huggingface --onnx is required"),
    ("run --onnx", "--onnx needs a value after it"),
    ("run --onnx there --huggingface there", "not allowed with argument"),
    ("run --torch there", "unknown option --torch"),
    ("nowhere --onnx there", "there is no checkpoint nowhere"),
    ("empty --onnx there", "empty holds no checkpoint"),
    ("text --onnx there", "cannot read text: it is damaged or not a safetensors file"),
    ("text --huggingface there", "cannot read text: it is damaged or not a safetensors file"),
    ("run --huggingface there", "no bias on the logits: train a model with --no-head-bias, or export with --onnx"),
    ("bigram --huggingface there", "a bigram table has no place in GPT-2's architecture: export it with --onnx"),
    ("heads --huggingface there", "a model of heads alone has no place in GPT-2's architecture: train a GPT"),
    ("heads --onnx there", "a model of heads alone cannot be written as ONNX: train a GPT"),
    ("run --onnx nowhere/there", "cannot write nowhere/there: No such file or directory"),
    ("run --onnx empty", "empty is a folder"),
    ("run --onnx text/there", "cannot write text/there: Not a directory"),
    ("plain --huggingface text/there", "cannot write text/there: Not a directory"),
    ("plain --huggingface text", "text exists and is no earlier export"),
    ("plain --huggingface there", "there exists and is no earlier export", other_folder),
    ("plain --huggingface there", "there exists and is no earlier export", linked_folder),
    ("plain --huggingface run", "run exists and is no earlier export"),
    ("run --onnx there", "there exists and is no earlier export", other_file),
    ("run --onnx run/best.safetensors", "run/best.safetensors exists and is no earlier export"),
    ("plain --huggingface there", "cannot write there/config.json: it is read-only", read_only_folder),
    ("run --onnx there", "cannot write there: it is read-only", read_only_file),
    ("run --onnx /dev/null", "cannot write /dev/null: it is not a regular file"),
]


@pytest.fixture
def places(cwd) -> Path:
    """What the commands in REFUSED name."""
    kinds = {"bigram": {"model": "bigram"}, "heads": {"model": "heads"}}
    for name, options in {"run": {"head_bias": True}, "plain": {}, **kinds}.items():
        Path(name).mkdir()
        save_checkpoint(Path(name, "best.safetensors"), random_checkpoint(**options))
    Path("empty").mkdir()
    Path("text").write_text("To be, or not to be, that is the question")
    return cwd


@pytest.mark.parametrize(("command", "said", "prepare"), [(*row, None)[:3] for row in REFUSED])
def test_what_cannot_be_is_one_sentence_and_changes_nothing(places, monkeypatch, capsys, command, said, prepare):
    if prepare:
        prepare()
    assert_refused(monkeypatch, capsys, command, said)


def assert_refused(monkeypatch, capsys, command: str, said: str) -> None:
    before = snapshot(Path())
    monkeypatch.setattr(sys, "argv", ["gpt.export", *command.split()])
    with pytest.raises(SystemExit) as info:
        run_script(main, MEMORY_ADVICE)
    out, err = capsys.readouterr()
    assert (info.value.code, out) == (2, "")
    assert_complaint(err, said, "gpt.export")
    assert snapshot(Path()) == before


def test_without_onnx(places, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert_refused(monkeypatch, capsys, "run --onnx there", "--onnx needs the onnx library, which is not inst")


def test_too_large_for_protobuf(places, monkeypatch, capsys):
    monkeypatch.setattr(gpt.export.onnx, "MAX_WEIGHTS", 1000)
    assert_refused(monkeypatch, capsys, "run --onnx there", "2 GiB, and the weights take 29,092 bytes")


def test_what_was_trained_further_is_not_replaced(places, monkeypatch, capsys, auto):
    export(monkeypatch, "plain", "--huggingface", "hf")
    auto("hf")[0].save_pretrained("hf")
    capsys.readouterr()
    assert_refused(monkeypatch, capsys, "plain --huggingface hf", "hf exists and is no earlier export")


def test_as_a_command(places):
    command = [sys.executable, "-m", "gpt.export"]
    options = {"cwd": ROOT, "env": environment(places), "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([*command, places / "plain", "--huggingface", places / "hf"], **options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{places / 'plain/best.safetensors'} -> {places / 'hf'}\n"
    done = subprocess.run([*command, places / "run", "--huggingface", places / "other"], **options)
    assert done.returncode == 2
    assert_complaint(done.stderr, "--no-head-bias", "gpt.export")


# --- docs/interop.md ---


def test_the_page_does_what_it_says(cwd, monkeypatch, capsys):
    page = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")
    Path("runs").mkdir()
    save()
    Path("run").rename("runs/pydoc")
    commands = re.findall(r"^python -m gpt.export (.*)\n```\n\n```\n(.*\n)```", page, re.MULTILINE)
    assert len(commands) == 2
    for command, shown in commands:
        export(monkeypatch, *shlex.split(command))
        assert capsys.readouterr().out == shown
    from_huggingface, from_onnx = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(from_onnx.partition("\n\n")[2].splitlines()) == 8
    exec(from_onnx, {})
    assert len(capsys.readouterr().out) == len("The ") + 200 + len("\n")
    exec(from_huggingface.replace("max_new_tokens=60", "max_new_tokens=12"), {})
    assert capsys.readouterr().out.startswith("The ")


def test_sample_py_reads_what_was_exported(cwd, monkeypatch, capsys):
    """The same text as of the run itself, and a folder without a tokenizer is one sentence."""
    save()
    export(monkeypatch, "run", "--huggingface=there")
    texts = []
    for model in ("run", "there"):
        done = run("sample.py", f"--model={model}", "--temperature=0", "--max-new-tokens=40", cwd=cwd)
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert done.stderr == "there\n"
    Path("there/tokenizer.json").unlink()
    err = run("sample.py", "--model=there", cwd=cwd, status=2).stderr
    assert_complaint(err, "there has no tokenizer.json beside it, which tells what its symbols are", "sample.py")
