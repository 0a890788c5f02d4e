"""Write text with a trained model.

python sample.py --prompt "ROMEO:"              the newest run in runs/
echo "To be" | python sample.py -               the prompt from standard input
python sample.py --model runs/mine --num-samples 3 --temperature 0.8 --out output.txt
"""

import _signal as signal  # which is there already, and so leaves Ctrl-C no time for a traceback
import os
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until run_script: some modules take an exception, while they are imported, for a fault of their own.
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"sample.py: interrupted\n") and 130))

import argparse
import io
from pathlib import Path

from gpt.advice import argument
from gpt.cli import Parser, run_script
from gpt.device import Device, add_device_options
from gpt.errors import UserError
from gpt.terminal import printable, shortened, show
from gpt.text.tokenizers import readable
from gpt.training.interrupt import hold_interrupts
from tensorlite import get_backend

MEMORY_ADVICE = "lower --num-samples, or take a smaller --model"
MOST_PROMPT = 2**24  # bytes; a pipe or a device may have no end
SEPARATOR = "\n---------------\n"


def main() -> int:
    args, words = build_parser().parse_known_args()
    check(args, words)
    with hold_interrupts():
        from threadpoolctl import threadpool_limits

        from gpt.checkpoint import load_checkpoint
        from gpt.files import atomic_write, check_size, explained, try_write
        from gpt.generate import default_prompt, stream_text
        from gpt.memory import check_sampling
        from gpt.training.run_folder import find_checkpoint

    device = Device(args.backend, args.dtype, args.tf32, args.graph)
    out = args.out
    if out:
        with explained("write", out):
            out = out.resolve() if out.is_symlink() else out  # a link stays, and what it leads to is written
        try_write(out)
    path = find_checkpoint(args.model)
    check_size(path, 1, "take a smaller --model")
    checkpoint = load_checkpoint(path, for_resume=False)
    prompt = read_prompt(args, checkpoint.tokenizer)
    prompt = default_prompt(checkpoint.tokenizer) if prompt is None else prompt
    checkpoint.tokenizer.encode(prompt)  # characters that the model does not know are refused before any output
    kept = args.num_samples > 1 or args.out is not None  # else the text is shown and gone
    new_tokens = args.max_new_tokens if kept else 0
    check_sampling(checkpoint.config, get_backend(args.backend), args.num_samples, len(prompt), new_tokens)
    model = device.place(checkpoint.build_model(), checkpoint.config.train.model)
    progress = checkpoint.progress
    best = "" if progress.best_val_loss is None else f", best val loss {progress.best_val_loss:.4f}"
    print(printable(f"{path}: step {progress.step}{best}"), file=sys.stderr)
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    samples = [io.StringIO() for _ in range(args.num_samples if kept else 0)]
    show(readable(prompt))
    with threadpool_limits(1, user_api="blas"):  # the same text whatever the number of cores
        for pieces in stream_text(
            model, checkpoint.tokenizer, prompt, args.max_new_tokens, args.num_samples, **options
        ):
            show(readable(pieces[0]))  # the first sample as it is made, the others after it
            for text, piece in zip(samples, pieces, strict=False):
                text.write(piece)
    samples = [prompt + text.getvalue() for text in samples]
    show(readable("".join(SEPARATOR + text for text in samples[1:])) + "\n")
    if out:
        atomic_write(out, SEPARATOR.join(samples) + "\n")
    return 0


def build_parser() -> Parser:
    parser = Parser(prog="sample.py", description=__doc__)
    option = parser.add_argument
    option("--model", type=Path, metavar="PATH", help="a checkpoint or a run's folder (default: the newest run)")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="what to continue (default: a new line)")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="continue a text; for a byte model any file")
    prompt.add_argument("stdin", nargs="?", metavar="-", help="continue the text on standard input")
    option("--max-new-tokens", type=int, default=500, metavar="N", help="tokens to write (default: %(default)s)")
    option("--temperature", type=float, default=0.8, metavar="T",
           help="below 1 likelier, above 1 more varied, 0 always the likeliest (default: %(default)s)")  # fmt: skip
    option("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only (default: all)")
    option("--top-p", type=float, metavar="P",
           help="draw from the likeliest tokens that make up this probability only (default: all)")  # fmt: skip
    option("--num-samples", type=int, default=1, metavar="N", help="texts to write (default: %(default)s)")
    option("--seed", type=int, default=1337, metavar="S", help="the same seed, the same text (default: %(default)s)")
    option("--out", type=Path, metavar="FILE", help="write a file too, with every byte of a byte model (default: no)")
    add_device_options(parser, threads=False)
    return parser


def check(args: argparse.Namespace, words: list[str]) -> None:
    """UserError for values that make no sense, and for words that belong to no option."""
    words = [word for word in (args.stdin, *words) if word not in (None, "-")]
    if words:
        option = "--model" if os.path.exists(words[0]) else "--prompt"  # noqa: PTH110 - Path's fails for a long name
        raise UserError(
            f"expected options, or - for standard input: write {argument(option, shortened(' '.join(words)))}"
        )
    rules = (
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 0, "0 or more"),
        ("--temperature", args.temperature, 0 <= args.temperature < float("inf"), "0 or more, and finite"),
        ("--top-k", args.top_k, args.top_k is None or args.top_k >= 1, "at least 1"),
        ("--top-p", args.top_p, args.top_p is None or 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("--num-samples", args.num_samples, 1 <= args.num_samples < 2**31, "from 1 to 2**31 - 1"),
        ("--seed", args.seed, 0 <= args.seed < 2**63, "from 0 to 2**63 - 1"),
    )
    for name, value, good, expected in rules:
        if not good:
            raise UserError(f"{name} must be {expected}, got {value}")
        if args.temperature == 0 and name.startswith("--top") and value is not None:
            print(f"warning: {name} has no effect at --temperature 0, which takes the likeliest", file=sys.stderr)
    if args.out and (os.path.isdir(args.out) or not os.path.isdir(args.out.parent)):  # noqa: PTH112 - as above
        raise UserError(f"cannot write {args.out}: give a file name in a folder that exists")
    if args.stdin and sys.stdin is None:
        raise UserError("standard input is closed: give the text with --prompt or --prompt-file")


def read_prompt(args: argparse.Namespace, tokenizer) -> str | None:
    """The prompt from wherever it was given; None for nowhere. Of a text from an editor or a shell the last line end
    and a byte order mark are not part, nor is the CR of its line ends for a model that knows none."""
    try:
        if args.stdin:
            prompt = without_line_end(sys.stdin.buffer)
        elif args.prompt_file:
            with args.prompt_file.open("rb") as file:
                prompt = without_line_end(file)
        else:
            prompt = args.prompt
            if prompt and "\\" in prompt and not tokenizer.knows("\\"):
                written = shortened(prompt.replace("'", "\\'"))
                raise UserError(
                    f"the model knows no backslash: for a new line write --prompt $'{written}' in bash, "
                    "or give the text with --prompt-file or on standard input"
                )
    except OSError as error:
        raise UserError(f"cannot read the prompt {args.prompt_file}: {error.strerror}; give a text file") from None
    if prompt is None:
        return None
    if prompt == "":
        raise UserError("the prompt is empty: give at least one character, or no prompt at all")
    return prompt if tokenizer.knows("\r") else prompt.replace("\r\n", "\n")


def without_line_end(file) -> str:
    """The text, or all of the bytes if they are none."""
    raw = file.read(MOST_PROMPT + 1)
    if len(raw) > MOST_PROMPT:
        raise UserError(f"the prompt has more than {MOST_PROMPT:,} bytes: give its end alone")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("utf-8", "surrogateescape")
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


if __name__ == "__main__":
    run_script(main, MEMORY_ADVICE)
