"""Train a GPT, or a bigram table, on any text file.

python train.py                                 little-shakespeare, about a minute
python train.py nanogpt-cpu --data book.txt     another preset, your own text
python train.py --resume --max-iters 10000      go on with the newest run
python train.py --init-from runs/mine --data x  a new run that starts from another's weights, or from a GPT-2's
"""

import _signal as signal  # which is there already, and so leaves Ctrl-C no time for a traceback
import os
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until run_script: some modules take an exception, while they are imported, for a fault of their own.
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"train.py: interrupted\n") and 130))

import argparse
import math
import time
from pathlib import Path

from gpt.advice import as_option
from gpt.cli import Parser, add_config_options, run_script
from gpt.config import PRESETS, load_preset
from gpt.device import Device, add_device_options
from gpt.errors import UserError
from gpt.training.interrupt import hold_interrupts

DEFAULT_PRESET = "little-shakespeare"
MEMORY_ADVICE = "take a smaller --data or a smaller model"
DEVICE_OPTIONS = ("backend", "dtype", "tf32", "graph", "threads")
MODES = ("resume", "overwrite", "dry_run", "eval_only", "profile")
NOT_CONFIGURED = ("help", "preset", "out", "max_minutes", *DEVICE_OPTIONS, *MODES)


def main() -> int:
    start = time.monotonic()
    args = parse_arguments(sys.argv[1:])
    with hold_interrupts():
        # After --help and usage errors, which need not wait.
        from gpt.training.initial import starting_point
        from gpt.training.run_folder import named_run
        from gpt.training.start import dry_run, resume_session, start_session

    if args.overwrite and not args.out:
        raise UserError("--overwrite has no effect without --out: add the run to replace, or leave it out")
    if not args.max_minutes >= 0:
        raise UserError(f"--max-minutes must be at least 0, got {args.max_minutes}")
    if args.profile is not None:
        check_profile(args)
    device = Device(**{name: getattr(args, name) for name in DEVICE_OPTIONS})
    options = {name: value for name, value in vars(args).items() if name not in NOT_CONFIGURED}
    if args.resume and args.preset and os.path.isdir(named_run(Path(args.preset))):  # noqa: PTH112 - may be too long
        if args.out:
            raise UserError(f"--resume {args.preset} and --out {args.out} name two runs: leave one of them out")
        args.out, args.preset = Path(args.preset), None
    if args.eval_only:
        return evaluated(args, options, device)
    if args.resume and "init_from" in options:
        raise UserError("--resume goes on with a run and --init-from begins a new one: leave one of them out")
    if args.resume:
        session = resume_session(args.out, args.preset, options, device)
    else:
        config, initial = starting_point(load_preset(args.preset or DEFAULT_PRESET), options)
        if "vocab_size" in options and config.train.tokenizer != "bpe":
            raise UserError("--vocab-size has no effect without --tokenizer bpe: add that, or leave it out")
        if args.dry_run:
            return dry_run(config, device, initial)
        if args.profile:
            from gpt.training.profile import profile_steps

            return profile_steps(config, device, initial, args.profile)
        session = start_session(config, args.out, args.overwrite, device, initial)
    return session.run(start + 60 * args.max_minutes)


def check_profile(args: argparse.Namespace) -> None:
    """--profile takes what says how a step is, and nothing of how a run is or how its work is shared."""
    if args.profile < 1:
        raise UserError(f"--profile must be at least 1, got {args.profile}")
    idle = {"out": args.out, "max_minutes": args.max_minutes < math.inf, "threads": args.threads, "graph": args.graph}
    for name, given in idle.items():
        if given:
            raise UserError(f"{as_option(name)} has no effect with --profile: leave one of them out")


def evaluated(args: argparse.Namespace, options: dict, device: Device) -> int:
    """--eval-only, with which nothing goes but --data and where to compute."""
    from gpt.training.evaluate import evaluate_only

    others = [as_option(name) for name in options if name != "data"]
    others += [as_option(name) for name in ("resume", "overwrite", "profile", "out", "preset") if getattr(args, name)]
    if others:
        raise UserError(f"{others[0]} has no effect with --eval-only, which takes --data: leave one of them out")
    return evaluate_only(args.eval_only, options.get("data"), device)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options that were given. --help shows the values of the preset named beside it."""
    args, words = build_parser({}).parse_known_args(argv)
    if words:
        load_preset(words[0])  # which says what else it may be
        raise UserError(f"expected one preset, got {args.preset} and {words[0]}: leave one out")
    if args.help:
        build_parser(load_preset(args.preset or DEFAULT_PRESET).to_dict()).print_help()
        sys.exit(0)
    return args


def build_parser(defaults: dict) -> Parser:
    parser = Parser(prog="train.py", description=__doc__, add_help=False)
    parser.add_argument(
        "preset", nargs="?", metavar="PRESET",
        help=f"{', '.join(PRESETS)}, or a TOML file; sets the defaults below (default: {DEFAULT_PRESET})",
    )  # fmt: skip
    parser.add_argument("-h", "--help", action="store_true", help="show this help, with PRESET's values, and exit")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: a new one, runs/PRESET)")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument(
        "--resume", action="store_true", help="go on with the run named after it, or else the newest (default: no)"
    )
    earlier.add_argument(
        "--dry-run", action="store_true", help="print parameters, memory and time, and write nothing (default: no)"
    )
    earlier.add_argument(
        "--profile", type=int, metavar="STEPS",
        help="print where the time and memory of so many steps go, and write trace.json here (default: no)",
    )  # fmt: skip
    earlier.add_argument("--overwrite", action="store_true", help="replace the run in --out (default: no)")
    parser.add_argument(
        "--max-minutes", type=float, default=math.inf, metavar="M",
        help="stop at the next step after so many minutes, saved and to be resumed (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--eval-only", type=Path, metavar="RUN",
        help="train nothing: print a run's or a checkpoint's losses over all of its text, or of --data (default: no)",
    )  # fmt: skip
    add_device_options(parser, threads=True)
    add_config_options(parser, defaults)
    return parser


if __name__ == "__main__":
    run_script(main, MEMORY_ADVICE)
