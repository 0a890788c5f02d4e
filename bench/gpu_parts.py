"""Parts of what bench/gpu.py runs, those that are no script of their own: python bench/gpu_parts.py agreement

    agreement       losses step by step against the CPU's from the same seed; is a captured step the same to the bit?
    tests           pytest -m gpu
    training        a whole run of train.py, to its best validation loss
    generate        tokens per second of sampling, against torch's

Two parts need no GPU: they count, and measure nothing.

    traffic         what the kernels of a step move and compute, beside the least possible and what was last committed
    occupancy       their registers and shared memory, and how full they let a GPU be

Results go to --out/*-gpu*.json, those of the last two to --out/traffic.json and --out/occupancy.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import report
from machine import gpu_facts, write_results
from turns import ROOT, ask, preset_config, serve, start_worker, stop, time_queued_calls

from gpt.config import Config
from gpt.device import Device
from gpt.errors import UserError
from gpt.generate import sample_tokens
from gpt.models.kinds import build_model
from gpt.text.dataset import make_dataset
from gpt.text.sources import load_text
from gpt.text.tokenizers import make_tokenizer
from gpt.training.cpu_trainer import CPUTrainer
from gpt.training.gpu_trainer import GPUTrainer
from tensorlite import BackendError, get_backend


def main() -> None:
    args = parse_arguments()
    try:
        if args.worker:
            serve(sampling_turn(args))
        else:
            PARTS[args.part](args)
    except (UserError, BackendError) as error:
        sys.exit(str(error))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--preset", default="shakespeare-char", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--alone", action="store_true", help="generate: our side only, without torch's")
    parser.add_argument("--data", metavar="FILE", help="text to train on (default: what train.py finds)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder (default: runs/gpu)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


# -- agreement --

GPU_SETTINGS = {
    "float32": {"tf32": False},
    "float32, no graph": {"tf32": False, "graph": False},
    "float32 with TF32": {"tf32": True},
    "bfloat16": {"dtype": "bfloat16"},
}
AGREEMENT = 1e-3  # that float32's losses must have with the CPU's


def agreement_part(args: argparse.Namespace) -> None:
    gpu = get_backend("cupy")
    rows = agreement(preset_config(args.preset), args.data or "pydoc", steps=6 if args.quick else 20)
    for row in rows:
        same = {None: "", True: ", the same bits as captured", False: ", OTHER BITS than captured"}[row["same_bits"]]
        print(
            f"{row['preset']}, {row['how']}, {row['steps']} steps: the losses differ from the CPU's by up to"
            f" {row['difference']:.1e}, the gradients' norms by {row['norm_difference']:.1e} of them{same}"
        )
    write_results(args.out / "agreement-gpu.json", gpu_facts(gpu), results=rows)
    if not rows[0]["difference"] < AGREEMENT:
        sys.exit(f"the GPU disagrees with the CPU: expected losses within {AGREEMENT}, got {rows[0]['difference']}")


def agreement(config: Config, source: str, steps: int) -> list[dict]:
    """How far the losses and the gradients' norms of the first steps on that text are from the CPU's, for each setting
    of the GPU."""
    text = load_text(source, block_size=config.gpt.block_size)
    tokenizer = make_tokenizer("char", text.text)
    dataset = make_dataset(text, tokenizer, config.gpt.block_size, config.train.val_fraction)
    config = Config(replace(config.gpt, vocab_size=tokenizer.vocab_size), config.train)
    expected = losses_and_norms(config, dataset, Device(threads=1), steps)
    rows, captured = [], None
    for how, settings in GPU_SETTINGS.items():
        got = losses_and_norms(config, dataset, Device("cupy", **settings), steps)
        captured = got if captured is None else captured
        rows.append(
            {
                "preset": config.train.preset,
                "how": how,
                "steps": steps,
                "difference": float(np.abs(got - expected)[:, 0].max()),
                "norm_difference": float((np.abs(got - expected) / expected)[:, 1].max()),
                "same_bits": bool((got == captured).all()) if how == "float32, no graph" else None,
                "losses": got[:, 0].tolist(),
                "cpu_losses": expected[:, 0].tolist(),
            }
        )
    return rows


def losses_and_norms(config: Config, dataset, device: Device, steps: int) -> np.ndarray:
    """Those of the first steps, (steps, 2)."""
    model = device.place(build_model("gpt", config.gpt, config.train.seed), "gpt")
    on_cpu = device.backend == "numpy"
    trainer = (CPUTrainer if on_cpu else GPUTrainer)(model, dataset, config.train)
    with trainer:
        return np.array([[float(x) for x in trainer.train_step()] for _ in range(steps)])


# -- tests --


def tests_part(args: argparse.Namespace) -> None:
    get_backend("cupy")  # or all of them would be skipped
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-k", "gelu"] if args.quick else []
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # our tests know of no plugin
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


# -- a whole run --


def training_part(args: argparse.Namespace) -> None:
    gpu = get_backend("cupy")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "train.py", args.preset, "--backend", "cupy", "--dtype", "bfloat16", "--out", run]
        command += ["--data", args.data] if args.data else []
        command += ["--max-iters", "20", "--eval-iters", "2"] if args.quick else []
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
        print(done.stdout)
        if done.returncode:
            sys.exit(f"train.py ended with status {done.returncode}")
        row = {"preset": args.preset, "precision": "bfloat16", "seconds": round(seconds, 1)}
        row |= run_facts(done.stdout, (run / "log.jsonl").read_text(encoding="utf-8"))
    print(
        f"{row['preset']} in bfloat16 on {row['text']}: {row['steps']} steps in {seconds:.1f} s,"
        f" best val loss {row['best_val_loss']:.4f}"
    )
    write_results(args.out / f"training-gpu-{args.preset}.json", gpu_facts(gpu), results=[row])


def run_facts(output: str, log: str) -> dict:
    """What train.py's output and its log say of a run."""
    rows = [json.loads(line) for line in log.splitlines()]
    return {
        "text": next(line for line in output.splitlines() if line.startswith("text: "))[6:].partition(";")[0],
        "steps": rows[-1]["step"],
        "best_val_loss": min(row["val_loss"] for row in rows),
        "log": rows,
    }


# -- sampling --


def generate_part(args: argparse.Namespace) -> None:
    """Tokens per second, in bfloat16 on either side, over whole cycles from one cut of the context to the next. Ours
    draws on the CPU, from scores that it reads back for each token; torch's waits for the GPU in the end alone."""
    gpu, sides = get_backend("cupy"), ("ours",) if args.alone else ("ours", "torch")
    workers = {side: start_worker("generate", "--worker", side, "--preset", args.preset) for side in sides}
    speeds = {side: [] for side in sides}
    for _ in range(1 if args.quick else 5):
        for side, worker in workers.items():
            speeds[side].append(ask(worker, 0.2 if args.quick else 2))
    for worker in workers.values():
        stop(worker)
    row = {"preset": args.preset, "precision": "bfloat16", "batch": 1}
    row |= {f"{side}_tokens_per_s": round(statistics.median(of_side), 1) for side, of_side in speeds.items()}
    row = {"torch_tokens_per_s": None, "ratio": None, "ratios": []} | row
    print(f"{args.preset}, one sequence, tokens per second: ours {row['ours_tokens_per_s']}", end="")
    if not args.alone:
        row["ratios"] = [round(o / t, 3) for o, t in zip(speeds["ours"], speeds["torch"], strict=True)]
        row["ratio"] = round(statistics.median(row["ratios"]), 3)
        print(f", torch {row['torch_tokens_per_s']}; ours has {row['ratio']:.2f}x its speed", end="")
    print()
    write_results(args.out / f"generate-gpu-{args.preset}.json", gpu_facts(gpu), results=[row])


def sampling_turn(args: argparse.Namespace):
    """What a worker does in its turn: whole cycles of generation."""
    shape = preset_config(args.preset).gpt
    kept = max(shape.block_size // 2, 1)
    cycle = shape.block_size + 1 - kept
    model = build_model("gpt", shape, seed=0)
    if args.worker == "ours":
        tokens = sample_tokens(
            Device("cupy", "bfloat16").place(model, "gpt").eval(), np.zeros((1, kept), np.int64), 10**9
        )
        synchronize = get_backend("cupy").xp.cuda.runtime.deviceSynchronize
    else:
        import torch
        from torch_gpt import TorchGPT

        theirs = TorchGPT(shape).eval()
        theirs.load_state_dict({name: torch.from_numpy(array) for name, array in model.state_dict().items()})
        tokens = theirs.to("cuda", torch.bfloat16).sample_tokens(torch.zeros((1, kept), dtype=torch.int64).cuda())
        synchronize = torch.cuda.synchronize
    for _ in range(2):
        list(islice(tokens, cycle))
    return lambda seconds: cycle / time_queued_calls(lambda: list(islice(tokens, cycle)), synchronize, seconds)


# -- what is counted --


def traffic_part(args: argparse.Namespace) -> None:
    use_stand_in()
    import traffic

    committed = {row["preset"]: row for row in counted_results("traffic")}
    rows = []
    for preset in traffic.PRESETS:
        config = preset_config(preset)
        uses = traffic.traced_uses(traffic.traced_shape(config))
        rows.append(traffic.results(preset, config, traffic.recorded_step(config), uses))
        print(report.traffic_of(rows[-1], committed.get(preset)), end="\n\n", flush=True)
    write_counts(args.out / "traffic.json", rows)


def occupancy_part(args: argparse.Namespace) -> None:
    use_stand_in()
    import occupancy
    import traffic

    launches = [launch for preset in traffic.PRESETS for launch in traffic.recorded_step(preset_config(preset))]
    rows = occupancy.occupancies(launches)
    print(report.occupancy([{"results": rows}]))
    write_counts(args.out / "occupancy.json", rows)


def use_stand_in() -> None:
    """From here on CuPy is the tests' stand-in for it."""
    sys.path.append(str(ROOT / "tests" / "gpu"))
    import strict_cupy

    sys.modules.update(strict_cupy.MODULES)


def counted_results(name: str) -> list[dict]:
    """Those that are committed."""
    path = report.RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []


def write_counts(path: Path, rows: list[dict]) -> None:
    """Without a machine or a date: they are the same on any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"results": rows}, indent=1) + "\n")


COUNTED = {"traffic": traffic_part, "occupancy": occupancy_part}
PARTS = {
    "agreement": agreement_part, "tests": tests_part, "training": training_part, "generate": generate_part
} | COUNTED  # fmt: skip


if __name__ == "__main__":
    main()
