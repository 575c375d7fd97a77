"""Batches that are made ahead are those that would be made when they are asked for, and their thread ends with the run."""

import threading
import time

import pytest

from alignax.run.prefetch import DEPTH, Prefetch, late, prefetched


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_values_are_made_once_in_order_ahead_of_their_use_and_not_beyond_the_end():
    made = []
    ahead = Prefetch(lambda i: made.append((i, threading.current_thread() is threading.main_thread())) or 10 * i, 6)
    assert not made
    for i in range(3, 6):
        assert ahead(i) == 10 * i
        until(lambda i=i: len(made) == min(i + 1 + DEPTH, 6) - 3)
    assert made == [(3, False), (4, False), (5, False)]
    assert ahead(3) == 30  # a value may be asked for again, and at any index
    ahead.close()
    assert not threads()


def test_an_exception_of_the_thread_is_raised_where_its_value_is_asked_for():
    def make(i):
        if i == 1:
            raise ValueError("row 7 cannot be read")
        return i

    with pytest.raises(ValueError, match="^row 7 cannot be read$"), prefetched(make, 3) as values:
        assert next(values) == 0
        next(values)
    assert not threads()


def test_the_thread_ends_at_once_where_its_values_are_left():
    begun, free = [], threading.Event()

    def make(i):
        begun.append(i)
        if i == 1:
            free.wait(20)
        return i

    with pytest.raises(KeyboardInterrupt), prefetched(make, 100) as values:
        next(values)
        until(lambda: 1 in begun)
        free.set()
        raise KeyboardInterrupt
    assert not threads() and len(begun) <= DEPTH + 1


def test_a_result_is_read_once_the_next_program_was_started():
    started = []
    read = [(x, len(started)) for x in late(started.append(i) or i for i in range(3))]
    assert read == [(0, 2), (1, 3), (2, 3)] and list(late([])) == []
