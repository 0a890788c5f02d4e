"""Write a trained model for other programs.

python -m gpt.export runs/mine --huggingface FOLDER    for transformers
python -m gpt.export runs/mine --onnx FILE             for ONNX Runtime; needs pip install -e ".[onnx]"
"""

import sys
from pathlib import Path

from gpt.cli import Parser, run_script

MEMORY_ADVICE = "export where there is more of it"


def main() -> int:
    args = build_parser().parse_args()
    from gpt.export.huggingface import check_folder, write_huggingface  # after --help and errors, which need not wait
    from gpt.export.onnx import check_file, write_onnx
    from gpt.terminal import say
    from gpt.training.run_folder import load_best

    check, target, write = check_file, args.onnx, write_onnx
    if args.huggingface:
        check, target, write = check_folder, args.huggingface, write_huggingface
    check(target)
    path, checkpoint = load_best(args.run, "take a smaller RUN")
    write(target, checkpoint)
    say(f"{path} -> {target}")
    return 0


def build_parser() -> Parser:
    parser = Parser(prog="python -m gpt.export", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder or a checkpoint")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--huggingface", type=Path, metavar="FOLDER", help="a new folder, or one with an earlier export")
    form.add_argument("--onnx", type=Path, metavar="FILE", help="a new file, or an earlier export")
    return parser


if __name__ == "__main__":
    sys.argv[0] = "gpt.export"  # how errors begin
    run_script(main, MEMORY_ADVICE)
