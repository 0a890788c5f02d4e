"""The benchmarks: that bench/README.md says what the results say, and both sides of a comparison do the same thing."""

import argparse
import json
import re
import sys
import time
from dataclasses import replace

import gpu
import gpu_parts
import gradcheck_study
import kernel_profile
import memory
import numpy as np
import occupancy
import ops
import pytest
import report
import torch
import traffic
import train_step
import turns
from tolerances import assert_close
from turns import preset_config

import tensorlite.backends
from gpt.config import Config, GPTConfig, TrainConfig
from gpt.device import Device
from gpt.models.kinds import build_model
from gpt.needs import run_needs
from gpt.training.cpu_trainer import CPUTrainer
from tensorlite import Tensor

MACHINE = {"cpu": "CPU", "cores": 2, "python": "3.11.7", "numpy": "2.4", "blas": "openblas 0.3", "torch": "2.13"}
STEP = {
    "preset": "tiny", "dropout": 0.2, "rival": "torch eager", "ours_ms": 12.34, "torch_ms": 24.68, "floor_share": 0.5,
    "ratio": 2.0, "ratios": [1.9, 2.0, 2.2], "ours_mb": 50, "torch_mb": 300,
}  # fmt: skip
SAMPLING = {
    "preset": "tiny", "batch": 1, "threads": 2, "cached_tokens_per_s": 1234.5, "uncached_tokens_per_s": 99.6,
    "torch_tokens_per_s": 617.0, "ratio": 2.0, "ratios": [2.0, 2.0],
}  # fmt: skip
STARTUP = [{"what": "import numpy", "ms": 100.4}, {"what": "import tensorlite", "ms": 110.2, "ratio": 1.1}]
OVERHEAD = {"add": {"numpy_us": 0.3, "forward_us": 1.2, "no_grad_us": 0.7, "backward_us": 1.05}}
RESULTS = {
    "train_step-b": [STEP | {"rival": "torch.compile"}, STEP | {"ratio": 1.5, "ratios": [1.4, 1.5], "ours_ms": 16.0}],
    "train_step-c": [STEP | {"ratio": 2.5, "ratios": [2.4, 2.6], "ours_ms": 10.0}],
    "generate": [SAMPLING],
    "ops": [],
    "startup": STARTUP,
    "memory": [{"shape": "tiny", "measured_mb": 100, "foreseen_mb": 104, "ratio": 1.04, "parts_mb": {}}],
    "text": [
        {
            "megabytes": 1000,
            "tokenizer": "char",
            "read_s": 10.0,
            "again_s": 4.0,
            "counted_s": 5.0,
            "peak_per_byte": 1.04,
        }
    ],
}
GPU = {"gpu": "H200", "cupy": "14.2", "cuda": 13010, "driver_cuda": 13010}
GPU_STEP = STEP | {"precision": "bfloat16", "graph": True, "tokens_per_s": 5_000_000}
ALONE = {"rival": None, "torch_ms": None, "torch_mb": None, "torch_tokens_per_s": None, "ratio": None, "ratios": []}
WHAT = {"preset": "tiny", "precision": "bfloat16"}
GPU_RESULTS = {
    "train_step-gpu-a": [GPU_STEP, GPU_STEP | ALONE | {"graph": False}],
    "generate-gpu-a": [WHAT | ALONE | {"batch": 1, "ours_tokens_per_s": 2000.4}],
    "agreement-gpu": [{"preset": "tiny", "how": "bfloat16", "steps": 20, "difference": 0.00123}],
    "training-gpu-tiny": [WHAT | {"text": "tinyshakespeare", "steps": 5000, "seconds": 30.2, "best_val_loss": 1.47}],
}
TRAFFIC = {
    "preset": "tiny",
    "shape": "two tokens",
    "kernels": [
        {"kernel": "layer_norm", "launches": 2, "bytes": 4_800_000_000, "asked": 9_600_000_000, "flop": 0},
        {"kernel": report.PRODUCTS, "launches": 3, "bytes": 480_000_000, "asked": 0, "flop": 1_978_000_000_000},
        {"kernel": "CuPy add", "launches": 9, "bytes": 100_000, "asked": 100_000, "flop": 0},
    ],
    "least": {"norms": 2_000_000_000, "the rest": 400_000_000},
}
OCCUPANCY = {"kernel": "f", "threads": 128, "dynamic": 0} | {
    sm: {"registers": 40, "shared": 1024, "occupancy": share} for sm, share in (("80", 0.75), ("89", 0.5), ("90", 1.0))
}
TINY = Config(
    GPTConfig(vocab_size=65, block_size=8, n_layer=1, n_head=2, n_embd=16),
    TrainConfig(preset="tiny", batch_size=4, eval_iters=2, learning_rate=1e-2, weight_decay=0.1, grad_clip=0.5),
)
STEP_ARGS = {
    "preset": ["tiny"], "threads": 1, "compile": False, "dropout": None, "rounds": 2, "seconds": 0.0, "alone": False,
    "dtype": "float32", "tf32": False, "graph": None, "backend": "numpy", "worker": None,
}  # fmt: skip


def write_results(folder, results: dict, **machine) -> None:
    for name, rows in results.items():
        content = {"machine": MACHINE | machine, "results": rows, "overhead": OVERHEAD}
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def results(tmp_path):
    """A folder with a result of every kind on the CPU."""
    write_results(tmp_path, RESULTS, date="2026-01-02")
    write_results(tmp_path, {"train_step-a": [STEP]}, date="2026-01-03")
    return tmp_path


@pytest.fixture
def gpu_results(results):
    """The same folder with those of a GPU."""
    write_results(results, GPU_RESULTS, **GPU, date="2026-01-04")
    return results


@pytest.fixture
def runtime(device, monkeypatch):
    """Of the stand-in for CuPy, with what the benchmarks ask of it besides."""
    runtime = device.xp.cuda.runtime
    for name, value in (("deviceSynchronize", None), ("runtimeGetVersion", 13010), ("driverGetVersion", 13010)):
        monkeypatch.setattr(runtime, name, lambda value=value: value, raising=False)
    return runtime


def test_readme_says_what_the_committed_results_say():
    readme = report.README.read_text(encoding="utf-8")
    assert readme == report.rewritten(readme, report.RESULTS)


def test_every_figure_of_the_readme_is_in_the_tables():
    readme = report.README.parent.with_name("README.md").read_text(encoding="utf-8")
    speed = readme.split("## Speed\n")[1].split("\n## ")[0]
    tables = report.README.read_text(encoding="utf-8")
    figures = re.findall(r"\d+\.\d+x|\d+ MB", speed)
    assert len(figures) == 10
    assert [figure for figure in figures if figure not in tables] == []


def test_every_committed_result_is_reported():
    known = {path for kind in report.TABLES for path in report.RESULTS.glob(f"{kind}*.json")}
    known |= {path for kind in (*report.GPU_TABLES, "profile") for path in report.RESULTS.glob(f"{kind}-gpu*.json")}
    known |= {report.RESULTS / f"{name}.json" for name in ("gradcheck", "faults")}  # which print tables of their own
    known |= {report.RESULTS / f"{name}.json" for name in report.COUNTED_TABLES}
    assert known == set(report.RESULTS.glob("*.json"))


def assert_shown(section: str, tables: int, *rows: str) -> None:
    """The section has so many tables, each as wide as its header, and among their rows these."""
    found = [part.splitlines() for part in section.split("\n\n") if part.startswith("|")]
    assert len(found) == tables
    assert all(len({line.count("|") for line in lines}) == 1 for lines in found)
    assert [row for row in rows if row not in section.splitlines()] == []


def test_every_kind_of_result_is_shown(results):
    section = report.performance(results)
    assert_shown(
        section,
        len(report.TABLES),
        "| `tiny` | 0.2 | torch eager | 12.3 ms | 24.7 ms | 2.00x (1.40 to 2.60) | 50 MB | 300 MB | 50% |",
        "| `tiny` | 0.2 | torch.compile | 12.3 ms | 24.7 ms | 2.00x (1.90 to 2.20) | 50 MB | 300 MB | 50% |",
        "| `tiny` | 1 | 2 | 1,234 | 100 | 617 | 2.00x (2.00 to 2.00) |",
        "| `add` | 0.30 | +1.20 | +0.70 | +1.05 |",
        "| tiny | 100 MB | 104 MB | 1.04 |",
        "| 1,000 MB | char | 10.00 s, 100 MB/s | 4.00 s | 200 MB/s | 1.04 |",
        "| import numpy | 100 ms |",
        "| import tensorlite | 110 ms, 1.10 times NumPy's |",
    )
    versions = "CPU, 2 cores; Python 3.11.7, NumPy 2.4 with openblas 0.3, PyTorch 2.13"
    assert section.endswith(f"\n\nMeasured on {versions}; 2026-01-02 and 2026-01-03.")


def test_a_result_may_be_absent(results):
    for path in results.glob("[!s]*.json"):
        path.unlink()
    assert report.performance(results).count("\n|---|") == 1


def test_foreseen_memory_is_that_of_the_runs_that_were_measured():
    """Within 20 %."""
    rows = json.loads((report.RESULTS / "memory.json").read_text())["results"]
    assert [row["shape"] for row in rows] == list(memory.SHAPES)
    for row in rows:
        needs = run_needs(memory.config_of(row["shape"]), workers=2, text=memory.CHARACTERS)
        assert needs.total / 2**20 == pytest.approx(row["measured_mb"], rel=0.2), row


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what a process holds")
def test_a_run_is_measured(monkeypatch):
    monkeypatch.setattr(memory, "CHARACTERS", 3000)
    tiny = {"n_layer": 1, "batch_size": 2, "micro_batch_size": 1, "max_iters": 1, "eval_iters": 1}
    assert 40 < memory.measured_mb("little-shakespeare", tiny, 20, threads=2) < 100


def test_the_command_checks_and_rewrites(results, monkeypatch):
    def run(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["report.py", *options])
        report.main()
        return readme.read_text()

    readme = results / "README.md"
    after = f"after\n{report.COUNTED_BEGIN}\n\n{report.COUNTED_END}\n"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\n{after}")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "RESULTS", results)
    with pytest.raises(SystemExit, match="run python bench/report.py"):
        run("--check")
    written = f"before\n{report.BEGIN}\n{report.performance(results)}\n{report.END}\n{after}"
    assert run() == written
    assert run("--check") == written


def test_a_gpu_has_a_section_of_its_own_if_there_are_results(gpu_results):
    section = report.gpu_performance(gpu_results)
    assert_shown(
        section,
        len(report.GPU_TABLES),
        "| `tiny` | bfloat16 | yes | torch eager | 12.34 ms | 24.68 ms | 2.00x (1.90 to 2.20) | 5,000,000 | 50 MB"
        " | 300 MB | 50% |",
        "| `tiny` | bfloat16 | no | – | 12.34 ms | – | – | 5,000,000 | 50 MB | – | 50% |",
        "| `tiny` | bfloat16 | 1 | 2,000 | – | – |",
        "| `tiny` | bfloat16 | 20 | 1.2e-03 |",
        "| `tiny` | tinyshakespeare | bfloat16 | 5000 | 30 s | 1.4700 |",
    )
    measured = " ".join(section.split("\n\n")[-1].split())
    assert measured.startswith("Measured on H200 with CPU, 2 cores; ")
    assert measured.endswith("PyTorch 2.13, CuPy 14.2, CUDA 13.1; 2026-01-04.")


def test_results_of_a_gpu_are_not_the_cpus(results, gpu_results):
    with_gpu = report.performance(gpu_results)
    for name in GPU_RESULTS:
        (gpu_results / f"{name}.json").unlink()
    assert report.performance(results) == with_gpu
    assert report.gpu_performance(results) == ""


def test_the_gpus_section_comes_and_goes():
    readme = f"before\n{report.BEGIN}\ncpu\n{report.END}\n\nafter\n"
    assert report.with_gpu_section(readme, "") == readme
    with_one = report.with_gpu_section(readme, "one")
    assert f"{report.END}\n\n{report.GPU_BEGIN}\none\n{report.GPU_END}\n\nafter\n" in with_one
    assert report.with_gpu_section(with_one, "two") == with_one.replace("one", "two")
    assert report.with_gpu_section(with_one, "") == readme


def test_what_is_counted_is_shown(tmp_path):
    assert report.counted(tmp_path) == ""
    for name, row in (("traffic", TRAFFIC), ("occupancy", OCCUPANCY)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"results": [row]}))
    assert_shown(
        report.counted(tmp_path),
        3,
        "| layer_norm | 2 | 4,800.0 MB | 2.0x | – | 1,000 us | 4,762 us |",
        "| products (cuBLAS) | 3 | 480.0 MB | – | 1,978 G | 2,000 us | 11,973 us |",
        "| others, together | 9 | 0.1 MB | 1.0x | – | 0 us | 0 us |",
        "| all but the products | 11 | 4,800.1 MB | 2.0x | – | 1,000 us | 4,762 us |",
        "| a step | 14 | 5,280.1 MB | – | 1,978 G | 3,000 us | 16,735 us |",
        "| all but the products | 2,400.0 MB |",
        "| `f` | 128 | 40 | 1,024 | 75% | 40 | 1,024 | 50% | 40 | 1,024 | 100% |",
    )
    before = TRAFFIC | {"kernels": TRAFFIC["kernels"][:2]}
    lines = report.traffic_of(TRAFFIC, before).splitlines()
    assert [line.split(" | ")[-1] for line in lines[4:9]] == [
        "4,800.0 MB |",
        "480.0 MB |",
        "0.0 MB |",
        "4,800.0 MB |",
        "5,280.0 MB |",
    ]
    assert "of which a step moves 2.00 times as much:" in "\n".join(lines)


@pytest.mark.parametrize("readme", ["", report.BEGIN, f"{report.END}\n{report.BEGIN}"])
def test_a_readme_without_the_comments_is_refused(readme):
    with pytest.raises(SystemExit, match="must have the line <!-- performance: begin -->"):
        report.with_section(readme, "text")


@pytest.mark.parametrize("preset", ["little-shakespeare", "nanogpt-cpu"])
def test_both_sides_of_the_op_benchmark_compute_the_same(preset):
    for op in ops.hot_path(preset_config(preset, dropout=0.0)):
        ours = op.ours(*(Tensor(x) for x in op.inputs)).numpy()
        theirs = op.theirs(*(torch.tensor(x) for x in op.inputs)).numpy()
        assert_close(ours, theirs, op.name)


# -- the study of gradcheck --


def test_the_page_on_gradcheck_says_what_the_study_found():
    page = (report.README.parents[1] / "docs" / "gradcheck.md").read_text(encoding="utf-8")
    results = json.loads((report.RESULTS / "gradcheck.json").read_text())["results"]
    correct, *rest = results
    said = f"Of {correct['draws']:,} correct gradients it accuses none and leaves {correct['undecided']} undecided."
    assert correct["accused"] == 0
    assert said in page
    assert gradcheck_study.table([row for row in rest if row["what"] == "planted"]) in page


def test_gradcheck_accuses_no_correct_gradient_and_catches_planted_errors():
    rng = np.random.default_rng(1)
    count = gradcheck_study.study_correct(300, rng)
    assert count["accused"] == 0
    assert count["undecided"] <= 6
    rows = [gradcheck_study.study_planted(error, 20, rng) for error in (1.0, 1e-5)]
    assert all(row["caught"] >= 17 for row in rows)
    assert gradcheck_study.table(rows).splitlines()[-1].startswith("| 1e-05 | ")
    assert gradcheck_study.study_large("x * x", 3000)["seconds"] > 0


# -- training steps --


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_both_sides_of_the_step_benchmark_take_the_same_steps(where, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    args = argparse.Namespace(**STEP_ARGS)
    theirs = train_step.torch_step(TINY, args) if where == "cpu" else train_step.torch_gpu_step(TINY, args, "cpu")
    model = build_model("gpt", TINY.gpt, TINY.train.seed)
    with CPUTrainer(model, train_step.make_dataset(TINY), TINY.train) as trainer:
        ours = np.array([float(trainer.train_step()[0]) for _ in range(5)], np.float32)
    assert_close(np.array([float(theirs()) for _ in range(5)], np.float32), ours)


def test_torch_computes_in_bfloat16_where_we_do():
    half, single = (
        train_step.TorchUpdate(TINY, argparse.Namespace(**STEP_ARGS | {"dtype": dtype}), "cpu")
        for dtype in ("bfloat16", "float32")
    )
    x, y = torch.arange(16).reshape(2, 8), torch.arange(1, 17).reshape(2, 8)
    assert 0 < abs(float(half(x, y)) - float(single(x, y))) < 0.02
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("alone", [False, True])
def test_a_gpus_row_holds_what_its_workers_say(alone, runtime, monkeypatch, tmp_path):
    args = argparse.Namespace(**STEP_ARGS | {"backend": "cupy", "alone": alone})
    monkeypatch.setattr(train_step, "preset_config", lambda *_, **__: TINY)
    monkeypatch.setattr(train_step, "PRODUCT", 8)
    free = iter(range(100 << 20, 0, -(10 << 20)))
    monkeypatch.setattr(runtime, "memGetInfo", lambda: (next(free), 0))

    def start_worker(*options):
        monkeypatch.setattr(sys, "argv", ["train_step.py", *map(str, options)])
        given = train_step.parse_arguments()
        assert (given.backend, given.dtype, given.tf32, given.graph) == ("cupy", "float32", False, None)
        if given.worker == "torch":
            return lambda seconds: {"times": [0.5], "mb": 40.0}
        return train_step.make_turn(TINY, given)

    monkeypatch.setattr(train_step, "start_worker", start_worker)
    monkeypatch.setattr(train_step, "ask", lambda turn, seconds: turn(seconds))
    monkeypatch.setattr(train_step, "stop", lambda turn: None)
    row = train_step.compare_on_gpu("tiny", args)
    assert (row["precision"], row["graph"], row["ours_mb"]) == ("float32", True, 10)
    assert (row["rival"], row["torch_ms"], row["torch_mb"]) == ((None,) * 3 if alone else ("torch eager", 500.0, 40))
    assert len(row["ratios"]) == (0 if alone else 2)
    assert row["tokens_per_s"] == pytest.approx(32e3 / row["ours_ms"], rel=0.01)
    report.gpu_train_step([{"results": [row]}])


def run_script(module, monkeypatch, *arguments: str) -> str:
    """What it exits with."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        module.main()
    return exit_info.value.code


def test_steps_on_a_gpu_are_refused_in_one_sentence_where_there_is_none(device, monkeypatch):
    assert "add --backend cupy" in run_script(train_step, monkeypatch, "--alone")
    monkeypatch.setattr(train_step, "torch_problem", lambda: "torch 2 cannot use a GPU here")
    said = run_script(train_step, monkeypatch, "--backend", "cupy")
    assert said == "train_step.py: error: torch 2 cannot use a GPU here; --alone times our side without it"
    tensorlite.backends._by_name.pop("cupy")
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "cannot import CuPy" in run_script(train_step, monkeypatch, "--backend", "cupy", "--alone")


def test_queued_calls_are_waited_for_in_the_end(monkeypatch):
    done = []
    monkeypatch.setattr(turns.time, "perf_counter", lambda: 0.1 * done.count("step"))
    each = turns.time_queued_calls(lambda: done.append("step"), lambda: done.append("wait"), 1.0)
    assert each == pytest.approx(0.1)
    assert done == ["wait", *["step"] * 3, "wait", *["step"] * 10, "wait"]


def test_gpt2_is_nanogpts():
    config = preset_config("gpt2", dropout=0.1)
    assert (config.gpt.vocab_size, config.gpt.dropout, config.train.batch_size) == (50257, 0.1, 12)
    assert config.gpt.num_parameters() == 124_439_808 - 102_144  # GPT-2's, less its biases
    assert train_step.make_dataset(config).train.tokens.dtype == np.uint16


# -- what a session with a GPU runs --


def test_the_losses_on_the_stand_in_agree_with_the_cpus(device):
    rows = gpu_parts.agreement(TINY, "ab", steps=5)
    assert [row["how"] for row in rows] == list(gpu_parts.GPU_SETTINGS)
    assert rows[0]["difference"] < 1e-5
    assert rows[0]["norm_difference"] < 1e-4
    assert 1e-5 < rows[3]["difference"] < 0.1  # bfloat16
    assert [row["same_bits"] for row in rows] == [None, True, None, None]
    assert len(rows[0]["losses"]) == len(rows[0]["cpu_losses"]) == 5


@pytest.mark.parametrize("n_embd", [16, 64])  # 64: with flash attention
def test_a_profile_has_every_kernel_and_product(n_embd, device):
    config = Config(GPTConfig(**vars(TINY.gpt) | {"n_embd": n_embd}), TINY.train)
    trainer = train_step.device_trainer(config, Device("cupy", "bfloat16", graph=False))
    trainer.train_step()
    busy = []
    rows, seconds = kernel_profile.profile(
        trainer, time.perf_counter, lambda start, end: end - start, lambda: busy.append(None), steps=2
    )
    names = {row["kernel"]: row for row in rows}
    attention = "flash_attention_vjp" if n_embd == 64 else "attention_softmax_vjp"
    assert {attention, "layer_norm", "adamw_step", f"product 32 x {n_embd} x {4 * n_embd}"} <= set(names)
    assert names["layer_norm"]["calls"] == 3
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=0.01)
    assert rows[-1]["kernel"].startswith("CuPy's own kernels")
    assert seconds > 0
    assert len(busy) == 4
    assert "_launch" not in vars(device)
    assert type(device._gemm).__name__ == "Gemm"
    assert all(len(line) < 120 for line in kernel_profile.format_profile("a title", rows).splitlines())


def test_a_product_is_named_by_its_shape_and_reads_its_factors():
    a, b, out = np.ones((2, 5, 3)), np.ones((2, 7, 5)), np.ones((2, 3, 7))
    name, arrays = kernel_profile.describe_product(a, b, trans_a=True, trans_b=True, out=out)
    assert (name, arrays) == ("product 2 x 3 x 5 x 7", (a, b, None))
    name, arrays = kernel_profile.describe_product(b, a, out=out, accumulate=True)
    assert (name, arrays[2] is out) == ("product 2 x 7 x 5 x 3", True)


def test_the_summary_of_a_profile():
    calls = [("a", 1e9, 1e-3), ("b", 8e6, 2e-3), ("a", 1e9, 1e-3), ("a", 1e9, 2e-3)]
    first, second, rest = kernel_profile.summarize(calls, steps=2, step_seconds=4e-3)
    assert first == {"kernel": "a", "calls": 1.5, "us": 2000.0, "share": 0.5, "gb_per_s": 750.0}
    assert second["share"] == 0.25
    assert (rest["us"], rest["share"], rest["gb_per_s"]) == (1000.0, 0.25, None)


def test_what_ncu_prints_is_read():
    output = """==PROF== Connected to process 1
the program's own line
==PROF== Profiling "layer_norm": 0%....100% - 1 pass
"ID","Process Name","Kernel Name","Grid Size","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum"
"","","","","byte","byte","ns"
"0","python","void layer_norm<float>(const float *, int)","(8, 1, 1)","1,000","500","2,000"
"1","python","adamw_step","(8, 1, 1)","10","20","30"
"""
    calls = kernel_profile.ncu_calls(output)
    assert calls == [("layer_norm<float>", 1500.0, pytest.approx(2e-6)), ("adamw_step", 30.0, pytest.approx(3e-8))]


def test_the_facts_of_a_run_are_read_from_its_output_and_log():
    output = "text: tinyshakespeare; 10 tokens to train on\nmodel: gpt\n"
    rows = [{"step": 0, "val_loss": 4.2, "tokens_per_second": None}]
    rows += [{"step": step, "val_loss": loss, "tokens_per_second": 10.0 * step} for step, loss in ((5, 1.5), (9, 1.6))]
    facts = gpu_parts.run_facts(output, "".join(json.dumps(row) + "\n" for row in rows))
    assert facts == {"text": "tinyshakespeare", "steps": 9, "best_val_loss": 1.5, "log": rows}


def test_sampling_is_timed(runtime, monkeypatch):
    monkeypatch.setattr(gpu_parts, "preset_config", lambda preset: TINY)
    turn = gpu_parts.sampling_turn(argparse.Namespace(preset="tiny", worker="ours"))
    assert turn(0.0) > 0


def test_parts_run_one_after_the_other_whatever_becomes_of_them(tmp_path, capfd):
    parts = [
        gpu.Part("bad", 60.0, ["-c", "raise SystemExit('a sentence')"]),
        gpu.Part("slow", 1.0, ["-c", "import time; print('so far', flush=True); time.sleep(60)"]),
        gpu.Part("good", 60.0, ["-c", "print('many lines\\n' * 50 + 'the last')"]),
    ]
    assert gpu.run_all(parts, tmp_path, 60.0) == 1
    said = capfd.readouterr().out
    bad, slow, good = said.split("== summary\n")[1].splitlines()
    assert re.fullmatch(r"bad +failed .* a sentence", bad)
    assert re.fullmatch(r"slow +too long .* so far", slow)
    assert re.fullmatch(r"good +ok .* the last", good)
    assert said.count("many lines") == gpu.TAIL - 1
    assert (tmp_path / "logs" / "good.txt").read_text().count("many lines") == 50
    assert gpu.run_all(parts, tmp_path, 0.0) == 1
    assert capfd.readouterr().out.count("no time was left") == 3


def test_every_part_ends_in_a_sentence_where_there_is_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(tensorlite.backends, "_by_name", {"numpy": tensorlite.get_backend("numpy")})
    monkeypatch.setitem(sys.modules, "cupy", None)
    commands = [(gpu_parts, part) for part in gpu_parts.PARTS if part not in gpu_parts.COUNTED]
    commands += [(kernel_profile, "nanogpt-cpu", *option) for option in ((), ("--ncu",), ("--one-step",))]
    for script, *arguments in commands:
        said = run_script(script, monkeypatch, *arguments, "--out", tmp_path)
        assert "cannot import CuPy" in said, arguments
        assert "\n" not in said


def test_the_counting_parts_need_none(monkeypatch, tmp_path, capsys, device):
    monkeypatch.setattr(traffic, "PRESETS", ["tiny"])
    monkeypatch.setattr(gpu_parts, "preset_config", lambda preset: Config(replace(TINY.gpt, n_embd=64), TINY.train))
    monkeypatch.setattr(traffic, "traced_shape", lambda config: config)
    monkeypatch.setattr(occupancy, "resources", lambda nvcc, code, options: AnyKernel())
    monkeypatch.setattr(occupancy.shutil, "which", lambda name: name)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for part, said in (
        ("traffic", "| moved before |"),
        ("traffic", "| moved before |"),
        ("occupancy", "| `layer_norm` |"),
    ):
        monkeypatch.setattr(sys, "argv", ["gpu_parts.py", part, "--out", str(tmp_path)])
        before = (tmp_path / f"{part}.json").exists()
        gpu_parts.main()
        assert (said in capsys.readouterr().out) == (before or part == "occupancy")
    kernels = {row["kernel"] for row in json.loads((tmp_path / "traffic.json").read_text())["results"][0]["kernels"]}
    assert {"flash_attention", "adamw_step", report.PRODUCTS} < kernels
    report.counted(tmp_path)


class AnyKernel(dict):
    """What nvcc says of one, whichever it is."""

    def __missing__(self, name):
        return dict.fromkeys(occupancy.MULTIPROCESSORS, (32, 0))


def test_the_parts_are_chosen_by_the_beginnings_of_their_names(monkeypatch, tmp_path):
    chosen = []
    monkeypatch.setattr(gpu, "run_all", lambda parts, out, seconds: chosen.extend(parts) or 0)
    monkeypatch.setattr(gpu, "torch_problem", lambda: None)
    run_script(gpu, monkeypatch, "--only", "step-char", "doctor", "--out", tmp_path, "--quick")
    assert [part.name for part in chosen][:3] == ["doctor", "step-char", "step-char-compile"]
    assert str(tmp_path / "train_step-gpu-char.json") in chosen[1].command
    chosen.clear()
    monkeypatch.setattr(gpu, "torch_problem", lambda: "no torch")
    run_script(gpu, monkeypatch, "--out", tmp_path)
    assert not any("--compile" in part.command for part in chosen)
    assert all(part.command.count("--alone") == 1 for part in chosen if part.name.startswith("step"))
    assert "there are doctor, agreement, " in run_script(gpu, monkeypatch, "--only", "nothing")
