"""Runs that start from weights: `train.py --init-from`, from checkpoints of ours and from other programs' files."""

import shutil

import numpy as np
import pytest
from scripts import RUN, TEXT, assert_complaint, log, run
from test_cli_train import main
from test_pretrained import GPT2, PLAIN, SETTINGS, write

from gpt.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from gpt.config import Config, GPTConfig, TrainConfig, load_preset
from gpt.models.kinds import build_model
from gpt.text.bpe import learn_bpe
from gpt.text.tokenizers import ByteTokenizer, CharTokenizer
from gpt.training.initial import load_initial, starting_point

OTHER = TEXT.replace("square", "cube: Ω").replace("i", "")  # with characters that TEXT has not, and without one it has
INIT = ["--init-from=run", "--data=text.txt", "--eval-iters=2", "--batch-size=4", "--micro-batch-size=2"]
SHAPES = {
    "tied": ("gpt", {}),
    "a head of its own, with a bias": ("gpt", {"tie_weights": False, "head_bias": True}),
    "bigram": ("bigram", {}),
}


def saved(path, tokenizer, model="gpt", **shape) -> Checkpoint:
    """A checkpoint with random weights, written to `path`."""
    shape = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=6, n_layer=1, n_head=2, n_embd=8, **shape)
    config = Config(shape, TrainConfig(model=model, tokenizer=tokenizer.kind))
    weights = build_model(model, shape, seed=3).state_dict()
    if "lm_head.bias" in weights:
        weights["lm_head.bias"] += np.arange(shape.vocab_size)
    save_checkpoint(path, Checkpoint(config, tokenizer, weights, Progress(step=9), "f"))
    return load_checkpoint(path)


# --- our own checkpoints ---


@pytest.mark.parametrize("case", SHAPES)
def test_symbols_are_carried_over_and_new_ones_are_the_mean(tmp_path, case):
    model, shape = SHAPES[case]
    old = saved(tmp_path / "c.safetensors", CharTokenizer("bdx"), model, **shape)
    initial = load_initial(tmp_path / "c.safetensors", {})
    tokenizer = initial.tokenizer_for("abcd" * 9)
    assert tokenizer.symbols == "abcdx"
    assert initial.described(tokenizer) == "vocabulary: 3 symbols carried over, 2 new"
    made = initial.build_model(GPTConfig(**vars(initial.shape) | {"vocab_size": 5}), tokenizer)
    kept, new = [1, 3, 4], [0, 2]
    for name, weight in made.named_parameters():
        weight, before = weight.numpy(), old.weights[name]
        if weight.shape == before.shape:
            np.testing.assert_array_equal(weight, before)
        elif weight.shape == (5, 5):  # the bigram table, whose columns are symbols too
            np.testing.assert_array_equal(weight[np.ix_(kept, kept)], before)
            np.testing.assert_allclose(weight[new][:, kept], [before.mean(0)] * 2, rtol=1e-6)
            np.testing.assert_allclose(weight[kept][:, new], before.mean(1)[:, None].repeat(2, 1), rtol=1e-6)
            np.testing.assert_allclose(weight[new][:, new], before.mean(), rtol=1e-6)
        else:
            np.testing.assert_array_equal(weight[kept], before)
            np.testing.assert_allclose(weight[new], [before.mean(0)] * 2, rtol=1e-6)


def test_what_the_model_says_of_old_symbols_stays(tmp_path):
    """Their logits are the same, whatever symbols came in between."""
    old = saved(tmp_path / "c.safetensors", CharTokenizer("bdx"))
    initial = load_initial(tmp_path / "c.safetensors", {})
    tokenizer = initial.tokenizer_for("abcd")
    new = initial.build_model(GPTConfig(**vars(initial.shape) | {"vocab_size": 5}), tokenizer)
    logits = [m(t.encode("bdxxd")[None])[0].numpy() for m, t in ((old.build_model(), old.tokenizer), (new, tokenizer))]
    np.testing.assert_allclose(logits[1][..., [1, 3, 4]], logits[0], rtol=1e-5, atol=1e-6)


def test_without_a_step_the_losses_are_the_best_checkpoints(copy):
    done = run("train.py", *INIT, "--max-iters=0", "--out=new", cwd=copy.parent).stdout
    assert "weights: run/best.safetensors\nvocabulary: 24 symbols carried over, 0 new\n" in done
    best, new = load_checkpoint(copy / "best.safetensors"), load_checkpoint(copy.parent / "new/last.safetensors")
    assert "step 0: train loss" in done
    (row,) = log(copy.parent / "new")
    assert row["step"] == 0
    assert row["val_loss"] == new.progress.best_val_loss == best.progress.best_val_loss
    assert new.progress.step == 0
    assert not new.optimizer["m"].any()
    for name, weight in best.weights.items():
        np.testing.assert_array_equal(new.weights[name], weight)


def test_another_text_and_its_configuration_again(copy):
    """A run's config.toml starts it again, from the same weights and to the same losses."""
    (copy.parent / "other.txt").write_text(OTHER)
    given = [option for option in INIT if option != "--data=text.txt"]
    first = run("train.py", *given, "--data=other.txt", "--block-size=6", "--dropout=0.2", "--max-iters=6", "--out=one",
                cwd=copy.parent).stdout  # fmt: skip
    assert "vocabulary: 24 symbols carried over, 4 new\n" in first
    config = load_preset(str(copy.parent / "one/config.toml"))
    assert (config.gpt.block_size, config.gpt.dropout, config.gpt.n_embd) == (6, 0.2, 16)
    assert config.train.init_from == str(copy / "best.safetensors")
    run("train.py", "one/config.toml", "--out=two", cwd=copy.parent)
    assert [row["val_loss"] for row in log(copy.parent / "two")] == [
        row["val_loss"] for row in log(copy.parent / "one")
    ]
    again = run("train.py", "--resume", "--out=two", "--max-iters=8", cwd=copy.parent).stdout
    assert "step 8" in again
    assert {path.name for path in (copy.parent / "two").iterdir()} == RUN


def test_a_preset_gives_settings_for_training_only(copy):
    preset = load_preset("nanogpt-cpu")
    config, initial = starting_point(preset, {"init_from": str(copy), "learning_rate": 0.5})
    here = load_checkpoint(copy / "last.safetensors").config
    assert config.gpt == here.gpt == initial.shape
    assert (config.train.preset, config.train.beta2, config.train.learning_rate) == ("nanogpt-cpu", 0.99, 0.5)
    config, _ = starting_point(load_preset("bigram"), {"init_from": str(copy), "block_size": 8, "n_layer": 1})
    assert config.train.model == "gpt"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--n-layer=3", "--n-layer comes from run/best.safetensors, as 1: leave it out"),
        ("--no-bias", "--bias comes from run/best.safetensors, as True: leave it out"),
        ("--activation=gelu", "--activation comes from run/best.safetensors, as 'relu': leave it out"),
        ("--tokenizer=byte", "--tokenizer comes from run/best.safetensors, as 'char': leave it out"),
        ("--vocab-size=300", "--vocab-size comes from run/best.safetensors, as 24: leave it out"),
        ("--block-size=9", "run/best.safetensors has 8 positions: give a --block-size of at most that, or none"),
        ("--init-from=empty", "empty holds no weights: expected a run's best.safetensors, or model.safetensors with"),
        ("--init-from=text.txt", "cannot read text.txt: it is damaged or not a safetensors file"),
        ("--init-from=cut.safetensors", "it is damaged or not a safetensors file (it has "),
        ("--init-from=run --resume", "--resume goes on with a run and --init-from begins a new one"),
        ("--init-from=gpt2", "has no tokenizer.json beside it, which tells what its symbols are: put it there, or"),
        ("--init-from=gpt2 --tokenizer=char", "gpt2 has 11 symbols, and the tokenizer char 24: put its own"),
        ("--init-from=gpt2/pytorch_model.bin", "gpt2/pytorch_model.bin is a pickle, which can run code when it is"),
        ("--init-from=wide", "wide has 11 symbols, and the tokenizer "),
        ("--init-from=nano", "nano does not tell its number of attention heads: give it with --n-head"),
        ("--init-from=nano --n-head=2 --tokenizer=bpe", "nano has no tokenizer.json beside it"),
        ("--dropout=2", "dropout must be at most 1, got 2.0"),
    ],
)  # fmt: skip
def test_mistake_is_one_sentence_and_leaves_nothing_behind(copy, capsys, args, said):
    (copy.parent / "empty").mkdir()
    (copy.parent / "cut.safetensors").write_bytes((copy / "last.safetensors").read_bytes()[:-9])
    write(copy.parent / "nano", PLAIN, None)
    for name in ("gpt2", "wide"):
        write(copy.parent / name, GPT2, SETTINGS)
    (copy.parent / "gpt2/pytorch_model.bin").write_bytes(b"")
    (copy.parent / "wide/tokenizer.json").write_text(learn_bpe(TEXT, 260).to_dict()["json"])
    before = sorted(copy.parent.rglob("*"))
    status, out, err = main(*INIT, "--out=new", *args.split(), capsys=capsys)
    assert (status, out) == (2, "")
    assert_complaint(err, said, "train.py")
    assert sorted(copy.parent.rglob("*")) == before


@pytest.mark.parametrize("model", ["bigram", "gpt"])
def test_a_model_of_bytes_and_a_bigram(cwd, model):
    tokenizer = ByteTokenizer() if model == "gpt" else CharTokenizer.from_text(TEXT)
    saved(cwd / "c.safetensors", tokenizer, model)
    (cwd / "text.txt").write_text(OTHER)
    out = run("train.py", *INIT, "--init-from=c.safetensors", "--max-iters=3", cwd=cwd).stdout
    new = 0 if model == "gpt" else 4
    assert f"vocabulary: {tokenizer.vocab_size} symbols carried over, {new} new\n" in out
    assert load_checkpoint(cwd / "runs/little-shakespeare-text/last.safetensors").config.train.model == model
    if model == "bigram":
        done = run("train.py", *INIT, "--init-from=c.safetensors", "--n-layer=2", cwd=cwd, status=2)
        assert_complaint(done.stderr, "--n-layer has no effect on a bigram table: leave it out", "train.py")


# --- other programs' ---


def test_a_gpt2_with_its_tokenizer_and_a_padded_table(cwd):
    """It is sampled and resumed as any other run."""
    tokenizer = learn_bpe(TEXT, 270)
    rng = np.random.default_rng(0)
    table = {"transformer.wte.weight": rng.normal(size=(288, 8)).astype(np.float32)}
    write(cwd / "gpt2", GPT2 | table, SETTINGS | {"vocab_size": 288})
    (cwd / "gpt2/tokenizer.json").write_text(tokenizer.to_dict()["json"])
    (cwd / "text.txt").write_text(TEXT)
    out = run("train.py", *INIT, "--init-from=gpt2", "--max-iters=3", "--out=run", cwd=cwd).stdout
    left = "18 rows that the tokenizer has no symbols for left out"
    assert f"weights: gpt2\nvocabulary: 270 symbols carried over, 0 new; {left}\n" in out
    config = load_checkpoint(cwd / "run/last.safetensors").config
    assert (config.train.tokenizer, config.gpt.vocab_size) == (str(cwd / "gpt2/tokenizer.json"), 270)
    shutil.rmtree(cwd / "gpt2")
    run("train.py", "--resume", "--out=run", "--max-iters=5", cwd=cwd)
    assert run("sample.py", "--model=run", "--prompt=the square", "--max-new-tokens=9", cwd=cwd).stdout


def test_nanogpts_characters(cwd):
    """Those of the text in order, as its prepare.py numbers them."""
    symbols = CharTokenizer.from_text(TEXT).vocab_size
    wide = np.random.default_rng(0).normal(size=(symbols, 8)).astype(np.float32)
    write(cwd / "nano", PLAIN | {"transformer.wte.weight": wide}, {"n_head": 2})
    (cwd / "text.txt").write_text(TEXT)
    run(
        "train.py",
        *INIT,
        "--init-from=nano/model.safetensors",
        "--tokenizer=char",
        "--max-iters=0",
        "--out=run",
        cwd=cwd,
    )
    loaded = load_checkpoint(cwd / "run/last.safetensors")
    assert loaded.config.gpt.activation == "gelu"
    np.testing.assert_array_equal(loaded.weights["lm_head.weight"], wide)
