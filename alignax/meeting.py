"""How the processes of a run find one another: the others connect to process 0, and each gets its `alignax.link.Link`."""

import errno
import json
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, NoReturn

from alignax.link import GRACE, TICK, Link, Peer, ended

CONNECT = 60.0  # seconds in which all processes must have connected, after jax has brought them together
REMEDY = "; start all processes, on hosts that connect by TCP (ALIGNAX_START_SECONDS)"


def meet(index: int, count: int, address: str, start: float, lost: float, patience: float) -> Link:
    """Connects the processes of a run at the address that jax uses after that; every process calls it.

    Args:
      index: the number of this process.
      count: the number of processes.
      address: HOST:PORT of process 0.
      start: seconds in which all processes must have come.
      lost, patience: see `Link`.

    Raises:
      OSError: on every process that has come, who is missing.
    """
    place, _, port = address.rpartition(":")
    if index:
        return _joined(index, [place.strip("[]")], int(port), address, start, lost, patience)
    end = time.monotonic() + start
    while True:
        try:
            with _listening(int(port)) as server:
                return _accepted(server, count, address, end - time.monotonic(), lost, patience)
        except OSError as e:
            if e.errno != errno.EADDRINUSE or time.monotonic() > end:
                raise
        time.sleep(TICK)  # the run before this one may still be ending


def open_link(index: int, count: int, share: Callable[[str], str], lost: float, patience: float) -> Link:
    """Connects the processes of a run that jax has brought together; every process calls it.

    Args:
      index: the number of this process.
      count: the number of processes.
      share: gives every process the text of process 0.
      lost, patience: see `Link`.

    Raises:
      OSError: the processes cannot reach one another.
    """
    if index:
        port, secret, places = json.loads(share(""))
        return _joined(index, places, port, secret, CONNECT, lost, patience)
    with _listening(0) as server:
        secret = secrets.token_hex(16)  # who does not know it is no process of this run
        share(json.dumps([server.getsockname()[1], secret, _addresses()]))
        return _accepted(server, count, secret, CONNECT, lost, patience)


def _listening(port: int) -> socket.socket:
    six = socket.has_dualstack_ipv6()
    return socket.create_server(("", port), family=socket.AF_INET6 if six else socket.AF_INET, dualstack_ipv6=six, backlog=1024)


def _addresses() -> list[str]:
    """The addresses under which other hosts may know this one."""
    found = [socket.gethostname()]
    with suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    for family, outside in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):  # addresses of no host: nothing is sent
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((outside, 9))
            found.append(probe.getsockname()[0])
    return list(dict.fromkeys(found))


def _accepted(server: socket.socket, count: int, secret: str, start: float, lost: float, patience: float) -> Link:
    """The link of process 0, once all others have connected."""
    peers: dict[int, Peer] = {}
    hosts, end = {0: socket.gethostname()}, time.monotonic() + start
    while len(hosts) < count:
        server.settimeout(max(end - time.monotonic(), 0.01))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            missing = [str(i) for i in range(count) if i not in hosts]
            many = f"processes {', '.join(missing)} of {count} have" if len(missing) > 1 else f"process {missing[0]} of {count} has"
            port = server.getsockname()[1]
            _refuse(peers, f"{many} not reached process 0 at port {port} of {hosts[0]} within {start:.0f} s{REMEDY}")
        try:
            line, rest = _line(connection, 5.0)
            said = json.loads(line)
            index, host, known = int(said["process"]), str(said["host"]), secrets.compare_digest(said["secret"], secret)
        except (OSError, ValueError, KeyError, TypeError):
            known, index, host, rest = False, 0, "", b""
        if not known or index >= count:  # no process of this run
            connection.close()
            continue
        if index in hosts:
            peers[-1] = Peer(-1, connection)
            _refuse(peers, f"two processes, on {hosts[index]} and on {host}, have the number {index}; give each process its own number")
        hosts[index], peers[index] = host, Peer(index, connection, rest)
    names = [hosts[i] for i in range(count)]
    _answer(peers, {"hosts": names})
    return Link(0, names, list(peers.values()), lost, patience, ended)


def _refuse(peers: Mapping[int, Peer], line: str) -> NoReturn:
    """Raises an error here, and in all processes that have come."""
    _answer(peers, {"error": line})
    for peer in peers.values():
        peer.connection.close()
    raise OSError(line) from None


def _answer(peers: Mapping[int, Peer], said: Mapping[str, Any]) -> None:
    for peer in peers.values():
        with suppress(OSError):
            peer.connection.sendall(json.dumps(said).encode() + b"\n")
        peer.heard = time.monotonic()


def _joined(index: int, places: list[str], port: int, secret: str, start: float, lost: float, patience: float) -> Link:
    """The link of another process, which connects to the first place that answers."""
    host = socket.gethostname()
    end, errors = time.monotonic() + start, {}
    hello = json.dumps({"process": index, "host": host, "secret": secret}).encode() + b"\n"
    if places[0] == host:
        places = ["127.0.0.1", *places]
    while time.monotonic() < end:
        for place in places:
            with ExitStack() as stack:
                try:
                    connection = stack.enter_context(socket.create_connection((place, port), timeout=5))
                    connection.sendall(hello)
                    line, rest = _line(connection, end + 5 - time.monotonic())
                    said = json.loads(line)
                except (OSError, ValueError) as e:
                    errors[place] = str(e)
                    continue
                if "error" in said:
                    raise OSError(said["error"])
                stack.pop_all()
                return Link(index, said["hosts"], [Peer(0, connection, rest)], lost, patience, ended)
        time.sleep(TICK)
    tried = "; ".join(f"{place}: {why}" for place, why in errors.items())
    raise OSError(f"process {index} has not reached process 0 at port {port} within {start:.0f} s ({tried}){REMEDY}")


def _line(connection: socket.socket, seconds: float) -> tuple[bytes, bytes]:
    """The first line from a connection, and what follows it."""
    data = b""
    connection.settimeout(max(seconds, 0.01))
    while b"\n" not in data:
        if not (more := connection.recv(1 << 16)):
            raise ConnectionError("it closed the connection")
        data += more
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(GRACE)
    line, _, rest = data.partition(b"\n")
    return line, rest
