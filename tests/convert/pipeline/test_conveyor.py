"""Jobs done by several threads: in order again at the end, few at a time, stopped by an error."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest

from layerpack.convert.pipeline.conveyor import Conveyor
from layerpack.convert.pipeline.crew import Crew

pytestmark = pytest.mark.timeout(20)


def run(
    jobs: list[Callable[[], int]], *, sizes: list[int] | None = None, workers: int = 4
) -> list[int]:
    results: list[int] = []
    with Crew() as crew:
        belt: Conveyor[int] = Conveyor(crew, max_jobs=5, max_bytes=100)

        def give() -> None:
            for number, job in enumerate(jobs):
                belt.put(job, sizes[number] if sizes else 1)
            belt.close()

        crew.start("give", give)
        for number in range(workers):
            crew.start(f"work-{number}", belt.work_all)
        results += belt
    return results


def test_results_keep_the_order_whatever_the_threads_do() -> None:
    chance = random.Random(3)

    def job(number: int, pause_s: float) -> Callable[[], int]:
        def work() -> int:
            time.sleep(pause_s)
            return number

        return work

    jobs = [job(number, chance.random() * 0.005) for number in range(200)]
    assert run(jobs) == list(range(200))
    assert run([]) == []


def test_no_more_is_under_way_than_was_allowed() -> None:
    chance, lock = random.Random(5), threading.Lock()
    sizes = [chance.choice([1, 30, 60, 1000]) for _ in range(100)]
    running: list[int] = []
    seen: list[tuple[int, int]] = []

    def job(number: int) -> Callable[[], int]:
        def work() -> int:
            with lock:
                running.append(sizes[number])
                seen.append((len(running), sum(running)))
            time.sleep(0.002)
            with lock:
                running.remove(sizes[number])
            return number

        return work

    assert run([job(number) for number in range(100)], sizes=sizes) == list(range(100))
    assert max(count for count, _ in seen) in range(2, 5)  # four workers, seldom room for five
    assert all(size_bytes <= 100 or count == 1 for count, size_bytes in seen)


def test_the_takers_result_counts_until_it_asks_for_the_next() -> None:
    with Crew() as crew:
        belt: Conveyor[int] = Conveyor(crew, max_jobs=1, max_bytes=10)
        begun: list[int] = []

        def work() -> int:
            begun.append(len(begun))
            return begun[-1]

        def give() -> None:
            for _ in range(3):
                belt.put(work, 1)
            belt.close()

        crew.start("give", give)
        crew.start("work", belt.work_all)
        for number in belt:
            time.sleep(0.02)
            assert begun == list(range(number + 1))


def test_a_jobs_error_ends_everybody() -> None:
    def fail() -> int:
        raise ValueError("job")

    jobs: list[Callable[[], int]] = [lambda: 1, fail, *[lambda: 2] * 50]
    with pytest.raises(ValueError, match="job"):
        run(jobs)
    assert not [t for t in threading.enumerate() if t.name.startswith("layerpack-")]
