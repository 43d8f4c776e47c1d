"""Several nodes in one run: their commands meet in a TCPStore, and share why the run failed.

Node 0 serves the store at ``--port``, where torch's rendezvous and the ranks use it too. One key holds the id of the
run, and below that id are:

    node/<rank>      the settings of a node, and the address at which it reaches node 0; the first command sets it
    started          all nodes are there, with equal settings
    failure          the first failure of any node
    alive/<rank>     the heartbeat of a node, a counter
    done/<rank>      the node needs the store no more

torch's elastic agent starts and ends the ranks of its node, and meets the other agents. No library does the rest:
torch's static rendezvous neither names missing nodes nor compares settings, an agent does not learn why the ranks of
another one failed, and the store does not notice that a client has died.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistNetworkError, PrefixStore, Store, TCPStore
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.utils.distributed import get_socket_with_port

from megacore.errors import ConfigError, MegacoreError, WorkerError
from megacore.parallel.launch.failures import Failure

_POLL_INTERVAL = 0.5
"""Seconds between two looks into the store, and between two heartbeats."""

_HEARTBEAT_TIMEOUT = 30.0
"""Seconds without a heartbeat after which a node is gone."""

_CAUSE_TIMEOUT = 40.0
"""Seconds to wait for another node to report the cause: its agent first gives its other ranks 30 s to end."""

_CONNECT_TIMEOUT = 30.0
"""Seconds for one attempt to connect."""

_CLOSE_TIMEOUT = 10.0
"""Seconds that node 0 serves the store for nodes that are not done yet."""

_NOTE_INTERVAL = 20.0
"""Seconds between two notes on the nodes that are missing."""

_RUN, _STARTED, _FAILURE = "megacore/run", "started", "failure"


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, and the place of this one.

    Attributes:
        count: Number of machines.
        rank: Rank of this one, from 0.
        address: Address of node 0, at which all nodes reach it.
        port: Port at which node 0 serves the store.

    Raises:
        ConfigError: When there is no node of that rank.
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


@contextmanager
def join_nodes(
    nodes: Nodes,
    settings: Mapping[str, Any],
    *,
    timeout: timedelta,
    on_note: Callable[[str], None] | None = None,
) -> Iterator[JoinedNodes]:
    """Wait for the commands on the other nodes, and share with them how the block ends.

    Args:
        nodes: All nodes.
        settings: Settings by name that must be equal on all nodes; JSON.
        timeout: Time limit for the last node to come.
        on_note: Called now and then, while waiting, with a note on the nodes that are missing.

    Raises:
        ConfigError: When the settings differ, another command has this rank, or node 0 cannot be reached.
        WorkerError: When a node does not come in time.
    """
    own = json.loads(json.dumps({"--nodes": nodes.count} | dict(settings)))
    wait = _Wait(time.monotonic() + timeout.total_seconds(), on_note)
    joined = _serve(nodes, own, timeout) if nodes.rank == 0 else _join(nodes, own, wait)
    try:
        joined.start(own, wait)
        yield joined
    except BaseException as error:
        reason = error.sigval.name if isinstance(error, SignalException) else repr(error)
        failure = Failure("WorkerError", f"node {nodes.rank} was stopped by {reason}")
        if isinstance(error, MegacoreError):
            failure = Failure(type(error).__name__, str(error))
        joined.settle(failure)  # changes nothing where the failure is settled already
        raise
    finally:
        joined.close()


class JoinedNodes:
    """The nodes of a run, as the command on one of them sees them through the store.

    Attributes:
        run_id: A name that no other run has.
        endpoint: Host and port of the store, as the ranks of this node reach it.
        failure_elsewhere: The reason why the run failed, once another node has reported it.
    """

    def __init__(self, nodes: Nodes, run_id: str, store: TCPStore) -> None:
        self.run_id = run_id
        self.endpoint = ""
        self.failure_elsewhere: Failure | None = None
        self._failure: Failure | None = None
        self._rank = nodes.rank
        self._address = nodes.address
        self._others = [rank for rank in range(nodes.count) if rank != nodes.rank]
        self._silent = self._others  # without a heartbeat; only node 0 listens for those
        self._tcp_store = store
        self._store = PrefixStore(run_id, store)
        self._lock = threading.Lock()
        self._runs_ranks = self._is_started = False
        self._is_settled, self._is_over = threading.Event(), threading.Event()
        self._last_contact = time.monotonic()
        self._threads: list[threading.Thread] = []

    @contextmanager
    def interrupted_on_failure(self) -> Iterator[None]:
        """Send this process a SIGHUP when another node fails while the block runs the ranks.

        torch's launcher passes it on to the ranks, and raises :class:`SignalException`.
        """
        with self._lock:
            if self.failure_elsewhere is not None:
                raise self.failure_elsewhere.error()
            self._runs_ranks = True
        try:
            yield
        finally:
            with self._lock:
                self._runs_ranks = False

    def settle(self, failure: Failure) -> Failure:
        """Return why the run failed, where ``failure`` is why the ranks of this node did; the first cause wins."""
        if failure.is_echo and self._others:
            self._is_settled.wait(_CAUSE_TIMEOUT)
        if self._failure is None:
            with suppress(RuntimeError):  # the store is gone
                self._learn(*_publish(self._store, failure, self._rank))
            self._learn(failure, self._rank)
        assert self._failure is not None
        return self._failure

    def claim_rank(self, settings: Mapping[str, Any], address: str) -> bool:
        """Publish this node under its rank; return False where that belongs to an earlier run, which is about to end.

        Raises:
            ConfigError: When another command has the rank.
        """
        own = json.dumps({"command": uuid.uuid4().hex, "settings": settings, "address": address})
        key, heartbeat = f"node/{self._rank}", f"alive/{self._rank}"
        holder = self._store.compare_set(key, "", own).decode()
        if holder != own:
            beats = self._store.add(heartbeat, 0)
            time.sleep(4 * _POLL_INTERVAL)
            if self._store.check([f"done/{self._rank}"]):
                return False
            is_alive = self._store.add(heartbeat, 0) != beats or self._store.check([_STARTED])
            if is_alive or self._store.compare_set(key, holder, own).decode() != own:
                raise ConfigError(f"another command has --node-rank {self._rank} already")
        tasks = [self._poll_store] if self._rank == 0 else [self._poll_store, self._watch_contact]
        self._threads = [threading.Thread(target=task, daemon=True) for task in tasks if self._others]
        for thread in self._threads:
            thread.start()
        return True

    def start(self, settings: Mapping[str, Any], wait: _Wait) -> None:
        """Wait until all nodes are there.

        Raises:
            ConfigError: When the settings differ.
            WorkerError: When a node does not come in time.
        """
        address, port = self._address, self._tcp_store.port
        if self._rank > 0:
            _require_equal(_record(self._store, 0)["settings"], settings, self._rank)
        while self._silent if self._rank == 0 else not self._is_started:
            if self.failure_elsewhere is not None:
                raise self.failure_elsewhere.error()
            missing = ", ".join(map(str, self._silent))
            absent = f"node{'s' * (len(self._silent) > 1)} {missing}" if self._rank == 0 else "the other nodes"
            wait.pause(
                f"node {self._rank} waits for {absent}, for {{:.0f}} seconds more at most",
                error=f"{absent} did not come to {address}:{port} in time",
            )
        if self._rank == 0 and self._others:
            for node in self._others:
                _require_equal(settings, _record(self._store, node)["settings"], node)
            self._store.set(_STARTED, "")
            self._is_started = True
            address = _record(self._store, 1)["address"]  # its own name may well stand for 127.0.1.1 here
        self.endpoint = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"

    def close(self) -> None:
        """Leave the store; on node 0, serve it until the others are done."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(4 * _POLL_INTERVAL)
        with suppress(RuntimeError):
            if self._rank > 0 and self._failure != _gone(0):
                self._store.set(f"done/{self._rank}", "")
            if self._rank == 0:
                self._tcp_store.delete_key(_RUN)  # a later run of this process may find the same store at the port
                busy = [f"done/{node}" for node in self._others if node not in self._silent]
                deadline = time.monotonic() + _CLOSE_TIMEOUT
                while busy and not self._store.check(busy) and time.monotonic() < deadline:
                    time.sleep(_POLL_INTERVAL / 10)

    def _poll_store(self) -> None:
        """Keep up the heartbeat of this node; look for the other nodes, and for failures.

        This has a client of its own, since one client serves one call at a time.
        """
        beats = dict.fromkeys(self._others, (0, -math.inf))
        try:
            store = PrefixStore(self.run_id, self._tcp_store.clone())  # type: ignore[attr-defined]
            while not self._is_over.wait(_POLL_INTERVAL):
                store.add(f"alive/{self._rank}", 1)
                self._last_contact = now = time.monotonic()
                if self._rank == 0:
                    counts = {node: store.add(f"alive/{node}", 0) for node in self._others}
                    beats |= {node: (count, now) for node, count in counts.items() if count != beats[node][0]}
                    self._silent = [node for node in self._others if now - beats[node][1] > _HEARTBEAT_TIMEOUT]
                    if self._is_started and self._silent and not store.check([f"done/{self._silent[0]}"]):
                        _publish(store, _gone(self._silent[0]), self._silent[0])
                else:
                    self._is_started = store.check([_STARTED])
                if store.check([_FAILURE]):
                    self._learn(*_parse_failure(store.get(_FAILURE)))
                    store.set(f"done/{self._rank}", "")
                    return
        except RuntimeError:  # the store is gone
            self._learn(_gone(0), 0)

    def _watch_contact(self) -> None:
        """Take node 0 for gone when a call to its store does not return, as for minutes when the machine is gone."""
        while not self._is_over.wait(_POLL_INTERVAL) and self._failure is None:
            if time.monotonic() - self._last_contact > _HEARTBEAT_TIMEOUT:
                self._learn(_gone(0), 0)

    def _learn(self, failure: Failure, node: int) -> None:
        """Take ``failure`` of ``node`` for that of the run, unless another one was first."""
        with self._lock:
            if self._failure is None:
                self._failure = failure
                self.failure_elsewhere = None if node == self._rank else failure
                if self.failure_elsewhere is not None and self._runs_ranks:  # while torch's launcher handles signals
                    os.kill(os.getpid(), signal.SIGHUP)
        self._is_settled.set()


class _Wait:
    """A wait that ends at a deadline, with a note from time to time."""

    def __init__(self, deadline: float, on_note: Callable[[str], None] | None) -> None:
        self._deadline = deadline
        self._on_note = on_note
        self._next_note_at = time.monotonic() + _NOTE_INTERVAL

    def pause(self, note: str, *, error: str) -> None:
        """Sleep for a moment; after the deadline raise ``error``. ``note`` is a format of the seconds that remain."""
        now = time.monotonic()
        if now > self._deadline:
            raise WorkerError(error)
        if self._on_note and now > self._next_note_at:
            self._on_note(note.format(self._deadline - now))
            self._next_note_at = now + _NOTE_INTERVAL
        time.sleep(_POLL_INTERVAL / 5)

    def for_node_0(self, nodes: Nodes, reason: str) -> None:
        """Pause, where node 0 does not answer for that reason."""
        place = f"{nodes.address}:{nodes.port}"
        self.pause(
            f"node 0 does not answer at {place} yet ({reason}); node {nodes.rank} tries again for {{:.0f}} seconds",
            error=f"node 0 did not answer at {place} in time: {reason}",
        )


def _serve(nodes: Nodes, settings: Mapping[str, Any], timeout: timedelta) -> JoinedNodes:
    """Serve the store on node 0. torch's rendezvous finds it by its port, since it is multi-tenant."""
    if nodes.count == 1:  # any free port; torch does not find a store again for which it has chosen the port itself
        free = get_socket_with_port()
        port, descriptor = free.getsockname()[1], free.detach()
    else:
        port, descriptor = nodes.port, None
    try:
        store = TCPStore(
            "localhost", port, None, True, timeout,
            wait_for_workers=False, multi_tenant=True, master_listen_fd=descriptor,
        )  # fmt: skip
    except DistNetworkError as error:
        raise ConfigError(
            f"node 0 cannot listen at port {port}: {str(error).rpartition('message: ')[2]}. If another run is at it, "
            "give this one another --port, on all nodes"
        ) from error
    joined = JoinedNodes(nodes, uuid.uuid4().hex, store)
    joined.claim_rank(settings, nodes.address)
    store.set(_RUN, joined.run_id)
    return joined


def _join(nodes: Nodes, settings: Mapping[str, Any], wait: _Wait) -> JoinedNodes:
    """Join the run that node 0 serves, which may not have been started yet, or still serve an earlier one."""
    while True:
        address, store = _connect(nodes, wait)
        with suppress(RuntimeError):  # the store is gone, such as that of an earlier run
            if store.check([_RUN]):
                joined = JoinedNodes(nodes, store.get(_RUN).decode(), store)
                first = _record(joined._store, 0)["settings"]
                if nodes.rank >= first["--nodes"]:
                    _require_equal(first, settings, nodes.rank)
                if joined.claim_rank(settings, address):
                    return joined
        wait.for_node_0(nodes, "it serves no run")


def _connect(nodes: Nodes, wait: _Wait) -> tuple[str, TCPStore]:
    """Return the address of node 0 and a client of its store, once that listens.

    A plain connection finds that out, since TCPStore blocks signals while it waits, and logs each attempt.
    """
    while True:
        try:
            with socket.create_connection((nodes.address, nodes.port), timeout=_CONNECT_TIMEOUT) as connection:
                address = connection.getpeername()[0]
            return address, TCPStore(nodes.address, nodes.port, timeout=timedelta(seconds=_CONNECT_TIMEOUT))
        except socket.gaierror as error:
            raise ConfigError(f"the address of node 0, {nodes.address}, is not known: {error.strerror}") from error
        except (OSError, RuntimeError) as error:
            wait.for_node_0(nodes, str(error))


def _record(store: Store, rank: int) -> dict[str, Any]:
    """Return what a node has published, which must be there."""
    record: dict[str, Any] = json.loads(store.get(f"node/{rank}"))
    return record


def _require_equal(of_node_0: Mapping[str, Any], own: Mapping[str, Any], rank: int) -> None:
    different = [
        f"{name} is {own.get(name)!r} on node {rank} and {of_node_0.get(name)!r} on node 0"
        for name in [*of_node_0, *(name for name in own if name not in of_node_0)]
        if own.get(name) != of_node_0.get(name)
    ]
    if different:
        raise ConfigError(f"the nodes were not started alike: {'; '.join(different)}")


def _publish(store: Store, failure: Failure, node: int) -> tuple[Failure, int]:
    """Share a failure with all nodes; return the first one, and its node."""
    return _parse_failure(store.compare_set(_FAILURE, "", json.dumps({"node": node} | asdict(failure))))


def _parse_failure(published: bytes) -> tuple[Failure, int]:
    fields = json.loads(published)
    node: int = fields.pop("node")
    return Failure(**fields), node


def _gone(node: int) -> Failure:
    return Failure("WorkerError", f"node {node} is gone: its command was killed")
