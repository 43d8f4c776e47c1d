"""Several nodes in one run: how the commands that are started on them meet, and hear why a run failed elsewhere.

The command on node 0 listens at ``address:port``. Those on the other nodes connect to it and stay connected while the
run lasts. Messages are JSON objects:

    another node to node 0    {"rank": 1, "settings": {...}}    who it is, and what all nodes must have been told alike
    node 0 to all others      {"store_port": 40213}             all are there, and torch's store listens at that port
    each to each              {"failed": {...}}                 a :class:`Failure`, in place of any other message
    each to each              {"done": true}                    the run is over

A connection that ends without one of the last two tells that the node is gone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import SignalException

from megacore.errors import ConfigError, MegacoreError, WorkerError
from megacore.parallel.launch.failures import Failure

_HEAR_THE_CAUSE = 40.0
"""Seconds to wait for another node to say why it failed: its launcher first gives its other ranks 30 s to end."""

_INTRODUCTION = 10.0
"""Seconds that who connects has to say which node it is, and that a connection may take."""

_REMINDER = 20.0
"""Seconds after which a person is told, and told again, which nodes are awaited."""

_LONGEST_MESSAGE = 1 << 20
"""Bytes; a traceback is a few thousand."""


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, and which one this is.

    Attributes:
        count: of the machines.
        rank: of this one, from 0.
        address: of node 0, under which all reach it.
        port: at which node 0 listens for the others.

    Raises:
        ConfigError: when there is no node of that rank.
    """

    count: int = 1
    rank: int = 0
    address: str = "localhost"
    port: int = 29500

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            known = "0" if self.count == 1 else f"0 to {self.count - 1}"
            raise ConfigError(f"there is no node of rank {self.rank}: with {self.count} in all, --node-rank is {known}")


ONE_NODE = Nodes()


class Link:
    """What connects the commands of a run: node 0 with all others, another one with node 0.

    Attributes:
        store: host and port of torch's store, which is on node 0, as this node reaches it.
        failure_elsewhere: why the run failed, once another node has said so.
    """

    def __init__(self, nodes: Nodes, connections: Mapping[int, Connection], store: tuple[str, int]) -> None:
        self.store = store
        self.failure_elsewhere: Failure | None = None
        self._failure: Failure | None = None
        self._nodes = nodes
        self._connections = dict(connections)
        self._one_cause = threading.Lock()
        self._ranks_run = False
        self._has_heard = threading.Event()
        self._is_over = False
        self._watch = threading.Thread(target=self._listen, daemon=True)
        self._watch.start()

    @contextmanager
    def ending_ranks(self) -> Iterator[None]:
        """Within the block, which runs the ranks here, this process gets a SIGHUP when another node has failed.

        torch's launcher passes it on to the ranks, and raises :class:`SignalException`.
        """
        with self._one_cause:
            self._ranks_run = self.failure_elsewhere is None
        if self.failure_elsewhere is not None:
            raise self.failure_elsewhere.error()
        try:
            yield
        finally:
            with self._one_cause:
                self._ranks_run = False

    def settle(self, failure: Failure) -> Failure:
        """Why the run failed, where ``failure`` is why the ranks of this node did. The other nodes are told."""
        if failure.is_echo and self._connections:
            self._has_heard.wait(_HEAR_THE_CAUSE)
        return self._learn(failure)

    def close(self) -> None:
        """End the connections, when the run is over or has failed."""
        if self._failure is None:
            self._tell(done=True)
            self._watch.join(_INTRODUCTION)  # until the others are done too
        self._is_over = True
        self._watch.join()
        for connection in self._connections.values():
            connection.close()

    def _listen(self) -> None:
        open_connections = dict(self._connections)
        while open_connections and not self._is_over:
            ready = wait(list(open_connections.values()), timeout=0.2)
            for node in [node for node, connection in open_connections.items() if connection in ready]:
                message = _receive(open_connections.pop(node), _INTRODUCTION)
                if message is None:
                    message = {"failed": asdict(Failure("WorkerError", f"node {node} is gone: its command was killed"))}
                if "failed" in message:
                    self._learn(Failure.told(message["failed"]), of_node=node)
                    self._has_heard.set()
                    with self._one_cause:  # so that it comes while the launcher still takes signals
                        if self._ranks_run:
                            os.kill(os.getpid(), signal.SIGHUP)

    def _learn(self, failure: Failure, *, of_node: int | None = None) -> Failure:
        """Why the run failed: what was learnt first, ``failure`` or another one. Nodes that cannot know are told."""
        with self._one_cause:
            if self._failure is None:
                self._failure = failure
                self.failure_elsewhere = failure if of_node is not None else None
                if of_node is None or self._nodes.rank == 0:
                    self._tell(failed=asdict(failure), but=of_node)
            return self._failure

    def _tell(self, *, but: int | None = None, **message: Any) -> None:
        for node, connection in self._connections.items():
            if node != but:
                _send(connection, **message)


@contextmanager
def joined_nodes(
    nodes: Nodes,
    settings: Mapping[str, Any],
    *,
    timeout: timedelta,
    on_note: Callable[[str], None] | None = None,
) -> Iterator[Link]:
    """Meet the commands on the other nodes, and tell them how the block ends.

    Args:
        nodes: all of them.
        settings: by name, what each node must have been told alike; JSON.
        timeout: how long to wait for the last one.
        on_note: is told, now and then, which ones are awaited.

    Raises:
        ConfigError: when another node was told something else, or node 0 cannot be asked.
        WorkerError: when a node does not come in time.
    """
    own: dict[str, Any] = json.loads(json.dumps({"--nodes": nodes.count} | dict(settings)))
    deadline = time.monotonic() + timeout.total_seconds()
    if nodes.rank == 0:
        store = _open_store(timeout)
        address, connections = _meet_all(nodes, own, deadline, on_note or _to_nobody)
        for connection in connections.values():
            _send(connection, store_port=store.port)
        link = Link(nodes, connections, (address, store.port))
    else:
        connection = _connect(nodes, deadline, on_note or _to_nobody)
        store_port = _join(nodes, connection, own, deadline)
        link = Link(nodes, {0: connection}, (nodes.address, store_port))
    try:
        yield link
    except BaseException as error:  # a failure that is settled already stays as it is
        reason = error.sigval.name if isinstance(error, SignalException) else repr(error)
        link.settle(Failure("WorkerError", f"node {nodes.rank} was stopped by {reason}"))
        raise
    finally:
        link.close()


def _open_store(timeout: timedelta) -> TCPStore:
    """A store that torch's rendezvous shares: its port is free for certain, and it listens before the others know it.

    It is given its socket, since torch (2.13) does not find a store again for which it chose the port itself, where an
    earlier store of this process had the same one: it tries to listen there once more.
    """
    if socket.has_dualstack_ipv6():
        server = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", 0))
    port = server.getsockname()[1]
    return TCPStore(
        "localhost", port, None, True, timeout,
        multi_tenant=True, wait_for_workers=False, master_listen_fd=server.detach(),
    )  # fmt: skip


def _to_nobody(note: str) -> None:
    pass


def _meet_all(
    nodes: Nodes, settings: dict[str, Any], deadline: float, on_note: Callable[[str], None]
) -> tuple[str, dict[int, Connection]]:
    """On node 0, wait for the others: the address at which they reach it, and their connections by the node's rank.

    The former need not be what ``nodes.address`` is here: many a machine takes its own name for 127.0.1.1.
    """
    if nodes.count == 1:
        return nodes.address, {}
    try:
        server = socket.create_server(("", nodes.port))
    except OSError as error:
        raise ConfigError(
            f"node 0 cannot listen at port {nodes.port}: {error.strerror}. If another run is at it, give this one "
            "another --port, on all nodes"
        ) from error
    joined: dict[int, Connection] = {}
    with server:
        try:
            while missing := sorted(set(range(1, nodes.count)) - set(joined)):
                remaining = deadline - time.monotonic()
                absent = f"node {missing[0]}" if len(missing) == 1 else f"nodes {', '.join(map(str, missing))}"
                if remaining <= 0:
                    raise WorkerError(f"{absent} did not come to {nodes.address}:{nodes.port} in time")
                server.settimeout(min(_REMINDER, remaining))
                try:
                    accepted, _ = server.accept()
                except TimeoutError:
                    on_note(f"node 0 waits for {absent}, for {remaining:.0f} seconds more at most")
                    continue
                reached_at = accepted.getsockname()[0]
                connection = _connection_of(accepted)
                hello = _receive(connection, _INTRODUCTION)
                if hello is None or not isinstance(hello.get("settings"), dict):  # somebody else's
                    connection.close()
                    continue
                rank = hello.get("rank")
                if not isinstance(rank, int) or not 0 < rank < nodes.count:
                    _refuse([connection], ConfigError(f"there is no node of rank {rank!r} among {nodes.count}"))
                    continue
                if rank in joined and not joined[rank].poll():  # nothing to read: it is not gone
                    _refuse([connection], ConfigError(f"another command has --node-rank {rank} already"))
                    continue
                joined[rank], address = connection, reached_at
                _require_equal(settings, hello["settings"], rank)
        except MegacoreError as error:
            _refuse(joined.values(), error)
            raise
    return address, joined


def _require_equal(own: dict[str, Any], theirs: dict[str, Any], rank: int) -> None:
    different = [
        f"{name} is {theirs.get(name)!r} on node {rank} and {own.get(name)!r} on node 0"
        for name in own | theirs
        if own.get(name) != theirs.get(name)
    ]
    if different:
        raise ConfigError(f"the nodes were not started alike: {'; '.join(different)}")


def _connect(nodes: Nodes, deadline: float, on_note: Callable[[str], None]) -> Connection:
    """Reach node 0, which may not have been started yet."""
    reminder = time.monotonic() + _REMINDER
    while True:
        try:
            return _connection_of(socket.create_connection((nodes.address, nodes.port), timeout=_INTRODUCTION))
        except socket.gaierror as error:
            raise ConfigError(f"the address of node 0, {nodes.address}, is not known: {error.strerror}") from error
        except OSError as error:
            now = time.monotonic()
            if now > deadline:
                raise WorkerError(f"node 0 did not answer at {nodes.address}:{nodes.port} in time: {error}") from error
            if now > reminder:
                on_note(
                    f"node 0 does not answer at {nodes.address}:{nodes.port} yet ({error.strerror}); node {nodes.rank} "
                    f"tries again for {deadline - now:.0f} seconds"
                )
                reminder = now + _REMINDER
            time.sleep(0.5)


def _join(nodes: Nodes, connection: Connection, settings: dict[str, Any], deadline: float) -> int:
    """On another node than 0, introduce it and wait for the others; return the port of torch's store."""
    _send(connection, rank=nodes.rank, settings=settings)
    answer = _receive(connection, deadline + _INTRODUCTION - time.monotonic())
    if answer is None:
        raise WorkerError(f"node 0 at {nodes.address}:{nodes.port} ended before all nodes were there")
    if "failed" in answer:
        raise Failure.told(answer["failed"]).error()
    port = answer.get("store_port")
    if not isinstance(port, int):
        raise WorkerError(f"who answers at {nodes.address}:{nodes.port} is not node 0 of this run")
    return port


def _refuse(connections: Any, error: MegacoreError) -> None:
    for connection in connections:
        _send(connection, failed=asdict(Failure(type(error).__name__, str(error))))
        connection.close()


def _connection_of(connected: socket.socket) -> Connection:
    """Frames messages on a socket. A peer whose machine vanishes without a word is noticed within a minute."""
    connected.settimeout(None)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
        connected.setsockopt(socket.IPPROTO_TCP, option, value)
    return Connection(connected.detach())


def _send(connection: Connection, **message: Any) -> None:
    with suppress(OSError):  # who is gone is noticed where one reads
        connection.send_bytes(json.dumps(message).encode())


def _receive(connection: Connection, timeout: float) -> dict[str, Any] | None:
    """The next message; ``None`` when none comes within ``timeout`` seconds, or the peer is gone or no megacore."""
    try:
        if not connection.poll(timeout):
            return None
        message = json.loads(connection.recv_bytes(_LONGEST_MESSAGE))
    except (OSError, EOFError, ValueError):
        return None
    return message if isinstance(message, dict) else None
