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
from dataclasses import fields
from pathlib import Path

from gpt.advice import argument, as_option
from gpt.cli import Parser, add_option, run_script
from gpt.config import SampleConfig
from gpt.device import Device, add_device_options
from gpt.errors import UserError
from gpt.terminal import SHADES, printable, shaded, shortened, show, warn, write
from gpt.text.tokenizers import readable, with_known_line_ends
from gpt.training.interrupt import hold_interrupts
from tensorlite import get_backend

MEMORY_ADVICE = "lower --num-samples, or take a smaller --model"
MOST_PROMPT = 2**24  # bytes; a pipe or a device may have no end
SEPARATOR = "\n---------------\n"


def main() -> int:
    args, config = parse_arguments(sys.argv[1:])
    with hold_interrupts():
        from threadpoolctl import threadpool_limits

        from gpt.files import atomic_write
        from gpt.generate import default_prompt
        from gpt.memory import check_sampling
        from gpt.training.initial import load_model

    device = Device(args.backend, args.dtype, args.tf32, args.graph)
    out, page = writable(args.out), writable(args.attention)
    if page and out and page.resolve() == out.resolve():
        raise UserError(f"--out and --attention both name {page}: give two files")
    path, checkpoint = load_model(args.model)
    tokenizer = checkpoint.tokenizer
    drawn, keep = [], iter
    if page:
        from gpt.attention import remembering, write_page

        keep = remembering(drawn, checkpoint)
    prompt = read_prompt(args, tokenizer)
    prompt = default_prompt(tokenizer) if prompt is None else prompt
    for text in args.stop:
        refuse_escape("--stop", text, tokenizer)
    tokenizer.encode(prompt)  # characters that the model does not know are refused before any output
    kept = config.num_samples > 1 or out is not None  # else the text is shown and gone
    new_tokens = config.max_new_tokens if kept else 0
    check_sampling(checkpoint.config, get_backend(args.backend), config.num_samples, len(prompt), new_tokens)
    model = device.place(checkpoint.build_model(), checkpoint.config.train.model)
    if not args.quiet:
        progress = checkpoint.progress
        best = "" if progress.best_val_loss is None else f", best val loss {progress.best_val_loss:.4f}"
        step = f": step {progress.step}{best}" if checkpoint.fingerprint else ""  # another program's says nothing of it
        print(printable(f"{path}{step}"), file=sys.stderr)
    with threadpool_limits(1, user_api="blas"):  # the same text whatever the number of cores
        samples = write_samples(model, tokenizer, prompt, args, config, kept, keep)
        if page:
            about = [str(path), f"sampled at temperature {config.temperature:g}; probabilities are those at 1"]
            note = write_page(page, checkpoint, model, tokenizer.encode(prompt), drawn, about)
            if not args.quiet:
                print(printable(f"attention: {page}{note and f', {note}'}"), file=sys.stderr)
    if out:
        atomic_write(out, SEPARATOR.join(prompt + sample for sample in samples) + "\n")
    return 0


def writable(path: Path | None) -> Path | None:
    """Where to write, for a link stays, and what it leads to is written. UserError if that cannot be."""
    from gpt.files import explained, try_write

    if path:
        with explained("write", path):
            path = path.resolve() if path.is_symlink() else path
        try_write(path)
    return path


def write_samples(
    model, tokenizer, prompt: str, args: argparse.Namespace, config: SampleConfig, kept: bool, through
) -> list[str]:
    """Show the first sample as it is made, and the others after it. The new texts, if they are to be `kept`.

    through: see `stream_pieces`.
    """
    from gpt.generate import stream_pieces

    coloured = args.show_probs and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if args.show_probs and not coloured:
        warn("--show-probs has no effect, for the output is no terminal that may show colours")
    options = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p, "seed": config.seed}
    options |= {"stop": args.stop, "probabilities": coloured, "through": through}
    samples = [io.StringIO() for _ in range(config.num_samples if kept else 0)]
    shown_prompt = "" if args.quiet else prompt
    show(readable(shown_prompt))
    for made in stream_pieces(model, tokenizer, prompt, config.max_new_tokens, config.num_samples, **options):
        for text, probability in made[0]:
            if coloured and probability is not None:
                write(shaded(readable(text), probability))
            else:
                show(readable(text))
        for sample, pieces in zip(samples, made, strict=False):
            sample.write("".join(piece.text for piece in pieces))
    samples = [sample.getvalue() for sample in samples]
    show(readable("".join(SEPARATOR + shown_prompt + sample for sample in samples[1:])) + "\n")
    if coloured and not args.quiet:
        legend = "".join(shaded(f" to {most:.0%} ", most) for most, _ in SHADES)
        print(f"how likely the model held each token: {legend}", file=sys.stderr)
    return samples


def build_parser() -> Parser:
    parser = Parser(prog="sample.py", description=__doc__)
    option = parser.add_argument
    option("--model", type=Path, metavar="PATH", help="a checkpoint or a run's folder (default: the newest run)")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="what to continue (default: a new line)")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="continue a text; for a byte model any file")
    prompt.add_argument("stdin", nargs="?", metavar="-", help="continue the text on standard input")
    for field in fields(SampleConfig):
        add_option(parser, field, field.default)
    option(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    option("--quiet", action="store_true", help="print the new text alone, as for a pipe (default: no)")
    option("--show-probs", action="store_true",
           help="on a terminal, colour each token by how likely it was to the model (default: no)")  # fmt: skip
    option("--out", type=Path, metavar="FILE", help="write a file too, with every byte of a byte model (default: no)")
    option("--attention", type=Path, metavar="FILE",
           help="write a page too: what each head attends to, how likely each token was (default: no)")  # fmt: skip
    add_device_options(parser, threads=False)
    return parser


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, SampleConfig]:
    """What was given. UserError for values that make no sense, and for words that belong to no option."""
    args, words = build_parser().parse_known_args(argv)
    words = [word for word in (args.stdin, *words) if word not in (None, "-")]
    if words:
        option = "--model" if os.path.exists(words[0]) else "--prompt"  # noqa: PTH110 - Path's fails for a long name
        raise UserError(
            f"expected options, or - for standard input: write {argument(option, shortened(' '.join(words)))}"
        )
    config = SampleConfig(**{f.name: getattr(args, f.name) for f in fields(SampleConfig) if f.name in args})
    for name in ("top_k", "top_p"):
        if config.temperature == 0 and getattr(config, name) is not None:
            warn(f"{as_option(name)} has no effect at --temperature 0, which takes the likeliest")
    for file in filter(None, (args.out, args.attention)):
        if os.path.isdir(file) or not os.path.isdir(file.parent):  # noqa: PTH112 - as above
            raise UserError(f"cannot write {file}: give a file name in a folder that exists")
    if args.attention and config.num_samples > 1:
        warn("--attention shows the first sample alone")
    if args.stdin and sys.stdin is None:
        raise UserError("standard input is closed: give the text with --prompt or --prompt-file")
    return args, config


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
            refuse_escape("--prompt", prompt or "", tokenizer)
    except OSError as error:
        raise UserError(f"cannot read the prompt {args.prompt_file}: {error.strerror}; give a text file") from None
    if prompt is None:
        return None
    if prompt == "":
        raise UserError("the prompt is empty: give at least one character, or no prompt at all")
    return with_known_line_ends(prompt, tokenizer)


def refuse_escape(option: str, text: str, tokenizer) -> None:
    """UserError for a backslash that the model does not know: it was meant for a new line, say."""
    if "\\" in text and not tokenizer.knows("\\"):
        written = shortened(text.replace("'", "\\'"))
        raise UserError(
            f"the model knows no backslash: for a new line write {option} $'{written}' in bash"
            + (", or give the text with --prompt-file or on standard input" if option == "--prompt" else "")
        )


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
