"""Threads whose results, errors and ends reach whoever waits, in whatever order things happen."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from support.runs.faults import threads

from layerpack.formats.errors import StalledError
from layerpack.runtime.core.patience import CancelledError, Patience
from layerpack.runtime.core.threads import Job, Worker, beside, in_order


@pytest.fixture
def worker() -> Iterator[Worker]:
    patience = Patience()
    worker = Worker("test", patience)
    yield worker
    worker.close()
    assert threads() == []


def test_jobs_run_one_after_the_other_in_one_thread(worker: Worker) -> None:
    begun: list[tuple[int, str]] = []

    def note(number: int) -> None:
        begun.append((number, threading.current_thread().name))
        time.sleep(random.Random(number).random() / 100)

    jobs = [worker.submit(lambda number=number: note(number)) for number in range(20)]  # type: ignore[misc]
    for job in reversed(jobs):
        job.wait()
    assert begun == [(number, "layerpack-test") for number in range(20)]


def test_an_error_is_raised_where_it_is_waited_for_and_the_next_job_runs(worker: Worker) -> None:
    def fail() -> None:
        raise ZeroDivisionError("injected")

    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="injected"):
            worker.call(fail)
    assert worker.call(lambda: 7) == 7


def test_ctrl_c_cancels_the_job_and_is_raised_once_it_has_ended() -> None:
    patience = Patience()
    worker = Worker("test", patience)
    ended: list[float] = []

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            while True:
                patience.check()
                time.sleep(0.01)
        finally:
            time.sleep(0.3)  # what has to be undone takes a while
            ended.append(time.monotonic())

    with pytest.raises(KeyboardInterrupt):
        worker.call(work)
    assert len(ended) == 1 and time.monotonic() >= ended[0]
    worker.call(patience.check)  # the next job is not cancelled
    worker.close()


def test_who_cancels_a_waiting_job_leaves_the_running_one_alone() -> None:
    patience = Patience()
    worker = Worker("test", patience)
    go_on = threading.Event()

    def run() -> None:
        go_on.wait(5)
        patience.check()

    running = worker.submit(run)
    waiting = worker.submit(patience.check)
    waiting.cancel()
    go_on.set()
    running.wait()
    with pytest.raises(CancelledError):
        waiting.wait()
    worker.close()


def test_a_job_is_over_when_its_thread_is() -> None:
    for _ in range(50):
        job = beside("short", lambda: 1)
        assert job.wait() == 1
        assert threads() == []


def test_a_job_that_runs_on_has_not_ended() -> None:
    over = threading.Event()
    job: Job[bool] = beside("long", lambda: over.wait(20))
    assert not job.ended(0.1)
    over.set()
    assert job.ended(5) and job.wait() and not job.failed


def test_results_come_in_order_whatever_takes_long() -> None:
    rng = random.Random(3)
    pauses_s = [rng.random() / 50 for _ in range(60)]
    done = in_order(
        lambda place: time.sleep(pauses_s[place]),
        range(60),
        num_threads=5,
        patience=Patience(),
        stalled=str,
    )
    assert list(done) == list(range(60))
    assert threads() == []


@pytest.mark.parametrize("broken", [0, 3, 39])
def test_an_error_begins_nothing_more(broken: int) -> None:
    begun: list[int] = []

    def work(place: int) -> None:
        begun.append(place)
        time.sleep(0.002)
        if place == broken:
            raise ZeroDivisionError

    taken = []
    with pytest.raises(ZeroDivisionError):
        for place in in_order(work, range(1000), num_threads=3, patience=Patience(), stalled=str):
            taken.append(place)
    assert taken == list(range(broken))
    assert len(begun) < broken + 20
    assert threads() == []


def test_what_stands_still_is_told_in_the_callers_words() -> None:
    over = threading.Event()
    work = in_order(
        lambda place: place == 2 and over.wait(1),
        range(5),
        num_threads=2,
        patience=Patience(0.2),
        stalled=lambda place: f"number {place} stands still",
    )
    with pytest.raises(StalledError, match="number 2 stands still"):
        list(work)
    over.set()


def test_nobody_waits_for_what_was_given_up() -> None:
    patience, over = Patience(20), threading.Event()
    threading.Timer(0.2, patience.cancel).start()
    begin_s = time.monotonic()
    with pytest.raises(CancelledError):
        list(
            in_order(
                lambda _: over.wait(1), range(50), num_threads=2, patience=patience, stalled=str
            )
        )
    assert time.monotonic() - begin_s < 5
    over.set()
