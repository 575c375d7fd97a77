"""How several processes find one another, here in threads of one process."""

import json
import socket
import threading

import pytest

from alignax import meeting
from alignax.meeting import meet, open_link

LONG = 60.0


@pytest.fixture(autouse=True)
def unharmed(monkeypatch):
    """Keeps this process alive."""
    monkeypatch.setattr(meeting, "ended", lambda line, code: None)


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


def offered(monkeypatch, count, strangers=()):
    """The links that so many processes open with one another."""
    offer, came = [], threading.Event()
    monkeypatch.setattr(meeting, "_addresses", lambda: [socket.gethostname()])

    def give(text):
        offer.append(text)
        for hello in strangers:
            with socket.create_connection(("127.0.0.1", json.loads(text)[0])) as stranger:
                stranger.sendall(hello)
        came.set()
        return text

    take = lambda _: came.wait(5) and offer[0]
    return at_once(*(lambda i=i: open_link(i, count, take if i else give, LONG, LONG) for i in range(count)))


def test_processes_find_one_another_and_strangers_are_no_processes(monkeypatch):
    wrong = json.dumps({"process": 1, "host": "evil", "secret": "0" * 32}).encode() + b"\n"
    group = offered(monkeypatch, 3, [wrong, b"GET / HTTP/1.1\r\n\r\n"])
    assert [own.hosts for own in group] == [[socket.gethostname()] * 3] * 3
    assert at_once(*(lambda own=own: own.gather(str(own.index)) for own in group)) == [["0", "1", "2"]] * 3
    for own in reversed(group):
        own.bye()


def test_a_process_that_cannot_be_reached_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(meeting, "CONNECT", 0.3)
    monkeypatch.setattr(meeting, "_addresses", list)
    with pytest.raises(OSError, match=r"processes 1, 2 of 3 have not reached process 0 at port \d+ of .* within 0 s"):
        open_link(0, 3, lambda text: text, LONG, LONG)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(OSError, match=rf"process 2 has not reached process 0 at port {port} within 0 s \(127.0.0.1: .*refused"):
            open_link(2, 3, lambda _: json.dumps([port, "secret", ["127.0.0.1"]]), LONG, LONG)


def test_processes_that_come_hear_who_has_not():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def come(index):
        try:
            return meet(index, 3, address, 1.0, LONG, LONG)
        except OSError as e:
            return str(e)

    line = rf"process 2 of 3 has not reached process 0 at port {address[10:]} of {socket.gethostname()} within 1 s; start all processes"
    assert [said.startswith(line) for said in at_once(lambda: come(0), lambda: come(1))] == [True, True]


def test_the_port_is_free_again_for_jax_and_a_run_waits_for_the_one_before_it():
    with socket.create_server(("", 0)) as before:
        port = before.getsockname()[1]
        threading.Timer(0.5, before.close).start()
        found = at_once(*(lambda i=i: meet(i, 2, f"localhost:{port}", 10.0, LONG, LONG) for i in range(2)))
    assert at_once(*(lambda own=own: own.gather(str(own.index)) for own in found)) == [["0", "1"]] * 2
    with socket.create_server(("", port)):  # with the connections of the link still open
        found[1].bye()
        found[0].bye()


def test_two_processes_of_one_number_are_refused_on_all():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def come(index):
        try:
            return meet(index, 3, address, 5.0, LONG, LONG)
        except OSError as e:
            return str(e)

    line = f"two processes, on {socket.gethostname()} and on {socket.gethostname()}, have the number 1; give each process its own number"
    assert at_once(*(lambda i=i: come(i) for i in (0, 1, 1))) == [line] * 3
