"""Threads of a crew: what is put arrives in order, the first error ends all, nothing hangs."""

from __future__ import annotations

import threading
import time

import pytest

from layerpack.convert.pipeline.crew import Channel, Crew, StoppedError

pytestmark = pytest.mark.timeout(20)


def no_threads_left() -> bool:
    return not [t for t in threading.enumerate() if t.name.startswith("layerpack-")]


def test_everything_arrives_in_order_and_never_more_than_fits() -> None:
    waiting: list[int] = []
    with Crew() as crew:
        channel: Channel[int] = Channel(crew, 2)

        def produce() -> None:
            for number in range(200):
                channel.put(number)
                waiting.append(1)
            channel.close()

        crew.start("produce", produce)
        taken = []
        for number in channel:
            taken.append(number)
            assert len(waiting) - len(taken) <= 2
    assert taken == list(range(200)) and no_threads_left()


def test_an_error_in_a_thread_wakes_everybody_and_is_raised_as_it_is() -> None:
    error = OSError("first")
    ended = []
    with pytest.raises(OSError) as raised, Crew() as crew:
        empty: Channel[int] = Channel(crew, 1)
        full: Channel[int] = Channel(crew, 1)
        full.put(0)

        def wait_for_room() -> None:
            try:
                full.put(1)
            except StoppedError:
                ended.append("full")
                raise

        def fail() -> None:
            time.sleep(0.05)
            raise error

        crew.start("room", wait_for_room)
        crew.start("fail", fail)
        for _ in empty:
            pass
    assert raised.value is error and ended == ["full"] and no_threads_left()


def test_an_error_in_the_block_ends_the_threads() -> None:
    with pytest.raises(KeyboardInterrupt), Crew() as crew:
        channel: Channel[int] = Channel(crew, 1)

        def take() -> None:
            for _ in channel:
                pass

        crew.start("take", take)
        raise KeyboardInterrupt
    assert no_threads_left()


def test_the_first_of_several_errors_is_kept() -> None:
    with pytest.raises(ValueError, match="early"), Crew() as crew:

        def late() -> None:
            try:
                with crew.condition:
                    crew.wait(lambda: False)
            except StoppedError:
                raise ValueError("late") from None

        def early() -> None:
            raise ValueError("early")

        crew.start("late", late)
        crew.start("early", early)


def test_work_that_only_checks_is_stopped_too() -> None:
    with pytest.raises(ValueError), Crew() as crew:

        def spin() -> None:
            while True:
                crew.check()
                time.sleep(0.001)

        crew.start("spin", spin)
        raise ValueError
    assert no_threads_left()
