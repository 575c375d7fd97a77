"""The link of several processes, here several links in one process, each of which notes how it would end its process."""

import socket
import threading
import time

import pytest

from alignax import link as links
from alignax.link import GOES_ON, Link, Peer

LONG = 60.0


@pytest.fixture
def linked(monkeypatch):
    """Makes the links of so many processes; `linked.ends` is a dict of how they ended: process -> (line, exit code)."""
    made = []

    def make(count, lost=LONG, patience=LONG):
        ends = {}
        hosts = [f"host-{i}" for i in range(count)]
        pairs = [socket.socketpair() for _ in range(count - 1)]
        note = lambda i: lambda line, code: ends.setdefault(i, (line, code))
        mains = [Peer(i + 1, ours) for i, (ours, _) in enumerate(pairs)]
        found = [Link(0, hosts, mains, lost, patience, note(0))]
        found += [Link(i + 1, hosts, [Peer(0, theirs)], lost, patience, note(i + 1)) for i, (_, theirs) in enumerate(pairs)]
        made.extend(pairs)
        return found, ends, pairs

    monkeypatch.setattr(links, "GRACE", 0.3)
    monkeypatch.setattr(links, "LEAVE", 0.1)
    yield make
    for pair in made:
        for end in pair:
            end.close()


def ended(ends, *processes):
    """How these processes ended."""
    end = time.monotonic() + 5
    while not ends.keys() >= set(processes) and time.monotonic() < end:
        time.sleep(0.01)
    return [ends.get(i) for i in processes]


def at_once(*calls):
    """The results of calls that wait for one another."""
    found = [None] * len(calls)

    def run(i):
        found[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return found


def test_every_process_gets_the_texts_of_all_in_their_order(linked):
    group, ends, _ = linked(3)
    for call in range(3):
        texts = [f"{call} of {i}\n é" for i in range(3)]
        assert at_once(*(lambda i=i, texts=texts: group[i].gather(texts[i]) for i in (2, 0, 1))) == [texts] * 3
    assert not ends


@pytest.mark.parametrize("who", [0, 2])
def test_a_process_that_is_killed_ends_the_others_with_its_name(who, linked):
    group, ends, pairs = linked(3)
    group[who]._leaving = True  # its thread, which lives on here, says nothing
    for i, pair in enumerate(pairs):
        if who in (0, i + 1):
            pair[0 if who == 0 else 1].shutdown(socket.SHUT_RDWR)
    line = f"process {who} on host-{who} was killed, or its machine is gone; {GOES_ON}"
    assert ended(ends, *(i for i in range(3) if i != who)) == [(line, 1)] * 2


@pytest.mark.parametrize("who", [0, 1])
def test_a_silent_process_ends_the_others_and_hears_of_it_when_it_wakes_up(who, linked, monkeypatch):
    """Its thread has stopped, as after SIGSTOP, and its connection stays open."""
    quiet = threading.Event()
    watch = Link._read

    def read(self, peer):
        if self.index == who:
            quiet.wait(5)
        watch(self, peer)

    monkeypatch.setattr(Link, "_read", read)
    monkeypatch.setattr(links, "BEAT", 0.05)
    _, ends, _ = linked(3, lost=0.5)
    line = f"process {who} on host-{who} has given no sign of life for 0 s: it hangs, or its machine is gone; {GOES_ON}"
    assert ended(ends, *(i for i in range(3) if i != who)) == [(line, 1)] * 2 and who not in ends
    quiet.set()
    assert ended(ends, who) == [(line, 1)]


def test_a_process_says_why_it_ends_and_one_that_ends_well_ends_no_other(linked):
    group, ends, pairs = linked(3)
    group[2].bye()
    pairs[1][1].shutdown(socket.SHUT_RDWR)
    time.sleep(0.5)
    assert not {0, 1} & ends.keys()
    group[1].tell("error: the disk is full", 2)
    assert ended(ends, 0) == [("process 1 on host-1 ended: error: the disk is full", 2)]


def test_a_process_has_time_to_end_with_an_error_of_its_own(linked):
    group, ends, _ = linked(2)
    before = time.monotonic()
    group[1].tell("error: of one", 2)
    assert ended(ends, 0) == [("process 1 on host-1 ended: error: of one", 2)] and time.monotonic() - before > 0.3
    group, ends, _ = linked(2)
    at_once(lambda: group[1].tell("error: of both", 2), lambda: group[0].tell("error: of both", 2))
    time.sleep(0.6)
    assert not ends


def test_an_error_that_follows_from_the_end_of_another_process_waits_for_its_words(linked):
    group, ends, _ = linked(2)
    group[1].tell("stopped by SIGTERM", 143)
    threading.Thread(target=group[0].settle, daemon=True).start()  # never returns, as the process ends
    assert ended(ends, 0) == [("process 1 on host-1 ended: stopped by SIGTERM", 143)]


def test_who_is_missing_is_named(linked):
    group, ends, _ = linked(3, patience=0.3)
    threading.Thread(target=lambda: group[1].gather("here"), daemon=True).start()
    line = "process 0 on host-0 and process 2 on host-2 are alive, but are not where the others have waited for 0 s"
    assert ended(ends, 0, 1, 2) == [(f"{line} (ALIGNAX_WAIT_SECONDS); {GOES_ON}", 1)] * 3


@pytest.mark.parametrize("who", [0, 2])
def test_all_stop_at_the_same_call_which_none_has_begun(who, linked):
    group, _, _ = linked(3)
    for own, calls in zip(group, (5, 7, 4), strict=True):
        assert [own.reached() for _ in range(calls)] == [0] * calls
    group[who].ask(15)
    end = time.monotonic() + 5
    while not all(own._point for own in group) and time.monotonic() < end:
        time.sleep(0.01)
    for own, calls in zip(group, (5, 7, 4), strict=True):
        found = [own.reached() for _ in range(9 - calls)]
        assert found == [0] * (7 - calls) + [15, 15]  # the eighth call, and all later ones


def test_a_call_waits_while_the_processes_agree(linked):
    """Else a process could be past the call at which the others stop."""
    group, _, _ = linked(2)
    taken = threading.Event()
    counted = Link._counted
    try:
        Link._counted = lambda self, *said: taken.wait(5) and counted(self, *said)
        group[1].ask(2)
        while not group[1]._frozen:
            time.sleep(0.01)
        waiting = [threading.Thread(target=own.reached, daemon=True) for own in group]
        for thread in waiting:
            thread.start()
        time.sleep(0.2)
        assert all(thread.is_alive() for thread in waiting)
        taken.set()
        for thread in waiting:
            thread.join(5)
        assert [own._count for own in group] == [1, 1] and group[0]._point == group[1]._point == (1, 2)
    finally:
        taken.set()
        Link._counted = counted
