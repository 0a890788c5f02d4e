"""Workers: every job is done once by each, in turn where asked, and none outlives the others or hangs."""

import errno
import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import gpt.training.workers
from gpt.errors import UserError
from gpt.training.workers import Workers
from tensorlite import get_backend

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="workers are processes on Linux only")

COUNTS = [1, 2, 5]


def shared(size: int) -> np.ndarray:
    return get_backend("numpy").shared_zeros(size, np.int64)


@pytest.fixture(params=[False, pytest.param(True, marks=needs_fork)], ids=["threads", "processes"])
def processes(request, monkeypatch) -> bool:
    monkeypatch.setattr(gpt.training.workers, "PROCESSES", request.param)
    return request.param


@pytest.fixture
def start(processes):
    """Workers(...), closed in the end."""
    started = []

    def start(*args) -> Workers:
        started.append(Workers(*args))
        return started[-1]

    yield start
    for workers in started:
        workers.close()


def gone(pid: int) -> bool:
    """Whether the process ends within ten seconds."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("count", COUNTS)
def test_each_worker_runs_each_job_with_its_argument_and_its_share(start, count):
    sums, calls = shared(7), shared(count)

    def add(worker, argument):
        for i in worker.share(range(7)):
            sums[i] += argument + i
        calls[worker.index] += 1

    def negate(worker, _):
        for i in worker.share(range(7)):
            sums[i] *= -1

    workers = start(count, {"add": add, "negate": negate})
    workers.run("add", 10)
    assert sums.tolist() == [10 + i for i in range(7)]
    workers.run("negate")
    workers.run("add", -(2**40))
    assert sums.tolist() == [-(10 + i) - 2**40 + i for i in range(7)]
    assert calls.tolist() == [2] * count


@pytest.mark.parametrize("count", COUNTS)
def test_turns_come_in_the_order_of_the_items(start, count):
    turns, too_early = shared(8), shared(8)

    def job(worker, _):
        for i in worker.share(range(8)):
            for n in range(5):
                if i > 0:
                    worker.wait_turn()
                    too_early[i] += turns[i - 1] <= n  # its n-th turn comes after that of the item before it
                time.sleep(0.0002 * (7 - i))  # the earlier ones are slower
                turns[i] += 1
                if i < 7:
                    worker.pass_turn()

    start(count, {"job": job}).run("job")
    assert turns.tolist() == [5] * 8
    assert too_early.tolist() == [0] * 8


def test_local_arguments_are_the_callers_own(start):
    seen = []

    def job(worker, _, tell=None):
        assert (tell is None) == (worker.index > 0)
        if tell:
            tell(worker.index)

    start(3, {"job": job}).run("job", tell=seen.append)
    assert seen == [0]


@pytest.mark.parametrize("where", [0, 1, 4])
def test_a_failed_job_ends_all_workers_and_says_why(start, processes, where, capfd):
    pids = shared(5)

    def job(worker, _):
        pids[worker.index] = os.getpid()
        if worker.index == where:
            raise ZeroDivisionError("planted")

    workers = start(5, {"job": job})
    with pytest.raises(ZeroDivisionError if where == 0 else UserError):
        workers.run("job")
    with pytest.raises(RuntimeError, match="close"):
        workers.run("job")
    if processes:
        assert all(gone(pid) for pid in pids[1:] if pid)
    assert ("planted" in capfd.readouterr().err) == (where != 0)


@needs_fork
@pytest.mark.parametrize("busy", [True, False])
def test_killed_worker_is_an_error_and_not_a_hang(busy):
    pids = shared(3)

    def job(worker, argument):
        pids[worker.index] = os.getpid()
        if argument and worker.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with closing(Workers(3, {"job": job})) as workers:
        workers.run("job", 0)
        if not busy:
            os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(UserError, match="worker process was killed"):
            workers.run("job", int(busy))
    assert all(gone(pid) for pid in pids[1:])


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python's own, of a fork beside threads
def test_workers_follow_a_killed_caller_and_outlive_an_interrupt():
    pids = shared(3)

    def job(worker, _):
        pids[worker.index] = os.getpid()

    caller = os.fork()
    if caller == 0:
        workers = Workers(3, {"job": job})
        workers.run("job")
        for pid in pids[1:]:
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        workers.run("job")
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(caller, 0)[1]) == signal.SIGKILL
    assert all(gone(pid) for pid in pids[1:])


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python's own, of a fork beside threads
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None], ids=["killed", "terminated", "exits"])
@pytest.mark.parametrize("busy", [True, False])
def test_no_worker_outlives_its_caller_or_holds_its_files(tmp_path, end, busy):
    """Not even one in the middle of a long job: another process may lock at once what the caller had locked."""
    fcntl, pids = pytest.importorskip("fcntl"), shared(3)

    def job(worker, _):
        pids[worker.index] = os.getpid()
        while busy and (worker.index or not pids.all()):  # the others for ever
            time.sleep(0.001)

    with (tmp_path / "lock").open("w") as lock:
        caller = os.fork()
        if caller == 0:
            with (tmp_path / "lock").open("w") as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                workers = Workers(3, {"job": job})
                if busy:
                    workers._me.receive = lambda _: os.kill(os.getpid(), end) if end else os._exit(0)
                workers.run("job")
                os.kill(os.getpid(), end) if end else os._exit(0)
        os.waitpid(caller, 0)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert all(gone(pid) for pid in pids[1:])


@needs_fork
def test_workers_that_cannot_be_started_are_one_sentence(monkeypatch):
    real, calls = os.fork, iter([True, True, False])
    refused = BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def fork():
        if next(calls):
            return real()
        raise refused

    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(UserError, match="cannot start 9 workers: Resource temporarily unavailable; lower --threads"):
        Workers(9, {"job": lambda worker, _: None})
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_interrupted_job_ends_the_workers(start):
    def job(worker, _):
        if worker.index == 0:
            signal.raise_signal(signal.SIGINT)
        worker.wait_turn()

    workers = start(2, {"job": job})
    with pytest.raises(KeyboardInterrupt):
        workers.run("job")
    workers.close()  # again, as a context manager's end will


def test_closing_leaves_no_pipe_and_no_process_behind(start, processes):
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0

    before = open_files()
    workers = start(4, {"job": lambda worker, _: None})
    workers.run("job")
    workers.close()
    assert open_files() == before
    if processes:
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


def test_more_shared_memory_than_there_is():
    with pytest.raises(MemoryError, match="shared numbers"):
        shared(2**60)
