"""Training on several nodes: network namespaces that stand for machines, or several commands on this one."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.distributed import TCPStore

import megacore
from free_port import free_port
from megacore.checkpoint import Checkpoint
from megacore.cli import cli
from megacore.errors import ConfigError, DataError, LayoutError, MegacoreError, WorkerError
from megacore.parallel import Nodes, ParallelSizes, run_on_ranks
from megacore.parallel.launch.failures import Failure
from megacore.parallel.launch.nodes import JoinedNodes, join_nodes
from megacore.parallel.launch.process_group import interface_towards
from megacore.training import read_run_config
from megacore.training.resolved import parallel_sizes
from tiny_llama import published_model, write_dataset
from warm_commands import Command, script_environment

ROOT = Path(__file__).parents[2]
FINETUNE = ROOT / "examples/finetune.sh"
BOUND = 90
"""Seconds within which a run must be over; it takes a tenth of that on an idle machine."""

SETTINGS = (
    *("training.train_iters=3", "training.global_batch_size=4", "data.seq_length=8"),
    *("optimizer.lr=0.01", "optimizer.min_lr=0.001"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A checkpoint, a dataset, and what one process makes of them."""
    place = tmp_path_factory.mktemp("nodes")
    published_model(place / "published", num_hidden_layers=2)
    megacore.convert("llama", place / "published", place / "checkpoint")
    write_dataset(place / "data")
    megacore.train(read_run_config(run_file(place), [*SETTINGS, f"output.checkpoint={place / 'single'}"]))
    return place


def run_file(place: Path) -> Path:
    """The recipe of the fine-tuning script, for the models at hand."""
    text = (ROOT / "examples/finetune.toml").read_text()
    changes = {
        "checkpoints/llama2-7": place / "checkpoint",
        "data/text": place / "data",
        "bf16": "fp64",
        "warmup_fraction = 0.1": "",
        'directory = "runs/llama2-7-finetuned"': "",
    }
    for old, new in changes.items():
        text = text.replace(old, str(new), 1)
    (place / "run.toml").write_text(text)
    return place / "run.toml"


def script(*words: str | Path, **environment: str) -> subprocess.Popen[str]:
    """Start the script that trains."""
    return subprocess.Popen(
        ["bash", FINETUNE, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | script_environment() | environment,
    )


def assert_trained_as_by_one_process(place: Path, out: Path) -> None:
    expected, found = Checkpoint(place / "single"), Checkpoint(out)
    for name in expected.manifest.parameters:
        matrices = [checkpoint.matrix(name) for checkpoint in (found, expected)]
        actual, wanted = (matrix.read(slice(0, matrix.rows), slice(0, matrix.columns)) for matrix in matrices)
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


# --- two nodes train together


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces, ``10.99.0.1`` and ``10.99.0.2``, that see nothing but each other."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip")
    hosts = f"megacore-{os.getpid()}-0", f"megacore-{os.getpid()}-1"

    def ip(words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True, capture_output=True)

    try:
        try:
            for host in hosts:
                ip(f"netns add {host}")
            ip(f"link add eth0 netns {hosts[0]} type veth peer name eth0 netns {hosts[1]}")
        except subprocess.CalledProcessError as refused:
            pytest.skip(f"network namespaces are refused: {refused.stderr.decode().strip()}")
        for number, host in enumerate(hosts):
            ip(f"-n {host} addr add 10.99.0.{number + 1}/24 dev eth0")
            ip(f"-n {host} link set eth0 up")
            ip(f"-n {host} link set lo up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)


def test_two_machines_train_as_one_process_does_and_the_first_one_speaks(two_hosts, place, tmp_path):
    overrides = [
        word for setting in (*SETTINGS, f"output.checkpoint={tmp_path / 'out'}") for word in ("--set", setting)
    ]
    train = ["train", run_file(place), *overrides, "--tp", "2", "--nproc-per-node", "2"]

    commands = [
        Command(
            *(*train, "--nodes", "2", "--node-rank", str(node), "--addr", "10.99.0.1"),
            network=host,
            # There is no name server, which torch asks for the machine's name.
            environment={"RES_OPTIONS": "timeout:1 attempts:1"},
        )
        for node, host in enumerate(two_hosts)
    ]
    (first, first_notes), (second, second_notes) = [command.communicate(timeout=BOUND) for command in commands]

    assert [command.returncode for command in commands] == [0, 0], first_notes + second_notes
    assert re.sub(r"\|.*", "", first).split() == [
        "iteration",
        "1/3",
        "iteration",
        "2/3",
        "iteration",
        "3/3",
        "Saved",
        f"{tmp_path / 'out'}.",
    ]
    assert second == ""
    assert "Note: tp 2 cuts unevenly" in first_notes and "cuts unevenly" not in second_notes
    assert_trained_as_by_one_process(place, tmp_path / "out")


def finetune(place: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """The script, as the guide calls it."""
    return script(
        *("llama", "--size", "7", "--checkpoint", place / "checkpoint"),
        *("--data", place / "data", "--out", out, "--dtype", "fp64", "--iters", "3", "--global-batch", "4"),
        *("--seq-len", "8", "--lr", "0.01", "--run", out.with_name("run"), *options),
    )


def test_the_script_trains_on_two_processes_of_one_machine(place, tmp_path):
    command = finetune(place, tmp_path / "out", "--tp", "2")
    _, error = command.communicate(timeout=BOUND)

    assert command.returncode == 0, error
    assert_trained_as_by_one_process(place, tmp_path / "out")
    megacore.report(tmp_path / "run")


def test_the_script_makes_a_run_longer_with_resume(place, tmp_path):
    finetune(place, tmp_path / "out", "--resume").communicate(timeout=BOUND)
    command = finetune(place, tmp_path / "out", "--resume", "--iters", "4")
    told, error = command.communicate(timeout=BOUND)

    assert command.returncode == 0, error
    assert [line.split()[1] for line in told.splitlines() if line.startswith("iteration")] == ["4/4"]
    assert (tmp_path / "out-iteration-0000003").is_dir()


@pytest.mark.soak
def test_the_script_started_twice_on_one_machine_trains_on_two_nodes(place, tmp_path):
    options = ("--tp", "2", "--nodes", "2", "--addr", "localhost", "--port", str(free_port()))

    commands = [finetune(place, tmp_path / "out", "--rank", str(rank), *options) for rank in (1, 0)]
    errors = [command.communicate(timeout=BOUND)[1] for command in commands]

    assert [command.returncode for command in commands] == [0, 0], errors
    assert_trained_as_by_one_process(place, tmp_path / "out")


def test_the_script_says_how_to_make_a_checkpoint_that_is_not_there():
    command = script("llama2", "--size", "7")
    _, error = command.communicate(timeout=BOUND)

    assert command.returncode == 2
    assert error.endswith(
        "there is no checkpoint checkpoints/llama2-7. Make it with\n"
        "    megacore convert --model llama2 --size 7 --out checkpoints/llama2-7\n"
    )


def test_the_script_refuses_a_checkpoint_of_another_model(place):
    command = script("llama2", "--size", "7", "--checkpoint", place / "checkpoint")
    _, error = command.communicate(timeout=BOUND)

    assert command.returncode == 2
    assert error == f"{FINETUNE}: {place / 'checkpoint'} is a checkpoint of llama, and MODEL is llama2\n"


@pytest.mark.parametrize(
    ("rates", "lr", "min_lr"),
    [((), "2e-5", "2e-06"), (("--lr", "1e-5"), "1e-5", "1e-06"), (("--lr", "1e-5", "3e-6"), "1e-5", "3e-6")],
    ids=["its own rates", "another", "two"],
)
def test_the_script_has_the_settings_of_the_recipe_for_conversations(tmp_path, rates, lr, min_lr):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "megacore").write_text(
        '#!/bin/sh\ncase $1 in plugins) echo llama2 ;; inspect) echo "family      llama2" ;; *) echo "$@" ;; esac\n'
    )
    (tmp_path / "megacore").chmod(0o755)
    command = script(
        *("llama2", "--size", "70", "--checkpoint", tmp_path / "checkpoint"),
        *("--data", "chats", "--instruct", "--loss-mask", "0.1", "--val-path", "held-back", "--wandb"),
        *("--wandb-project", "two cranes", "--wandb-name", "tall", *rates),
        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    )
    told, error = command.communicate(timeout=BOUND)

    assert command.returncode == 0, error
    settings = set(told.split(" --set "))
    assert settings >= {
        f"optimizer.lr={lr}",
        f"optimizer.min_lr={min_lr}",
        "data.kind=instruction",
        "data.prefix=chats",
    }
    assert settings >= {"data.scalar_loss_mask=0.1", "data.valid_prefix=held-back", "data.seq_length=4096"}
    assert settings >= {"evaluation.interval=200", "evaluation.iters=10"}
    assert settings >= {'logging.loggers=["wandb"]', "logging.project=two cranes", "logging.name=tall"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama", "--size", "7", "--loss-mask", "1"], "--loss-mask is for conversations: it needs --instruct"),
        (["gpt5", "--size", "7"], "megacore has no model gpt5: `megacore plugins` lists those that it has"),
        (["llama"], "--size N says how large the model is, in billions of parameters"),
        (["llama", "--size"], "--size needs a value"),
        (["llama", "--size", "7", "--tp", "two"], "--tp takes a whole number, not 'two'"),
        (["llama", "--size", "7", "--lr", "high"], "--lr takes a number, or two, not 'high'"),
        (["llama", "--size", "7", "--lr", "1e-4", "low"], "--lr takes a number, or two, not 'low'"),
        (["llama", "--size", "7", "--wandb-name", "a"], "--wandb-project and --wandb-name need --wandb"),
        (["llama", "--size", "7", "--rank", "1"], "--rank 1 needs --nodes, which says how many nodes there are"),
        (["llama", "--sise", "7"], "there is no option --sise; bash {script} --help lists them"),
    ],
)
def test_the_script_refuses_what_it_does_not_know(words, message):
    command = script(*words)
    _, error = command.communicate(timeout=BOUND)

    assert (command.returncode, error) == (2, f"{FINETUNE}: {message.format(script=FINETUNE)}\n")


# --- a node fails


def test_a_rank_that_is_killed_on_another_node_is_named_on_both():
    port = str(free_port())

    commands = [Command("kill", "3", str(node), port, module="launched") for node in (0, 1)]
    errors = [command.communicate(timeout=BOUND)[1] for command in commands]

    assert all(command.returncode == 1 for command in commands)
    for error in errors:
        assert error.splitlines()[-1] == (
            "megacore.errors.WorkerError: rank 3 on node 1 was killed by SIGKILL: was there too little memory?"
        )


def test_when_node_0_is_gone_the_ranks_of_the_other_one_are_ended_and_its_command_says_so(tmp_path):
    port = str(free_port())
    commands = [Command("sleep", tmp_path / "rank", str(node), port, module="launched") for node in (0, 1)]
    while not all((tmp_path / f"rank-{rank}-begun").exists() for rank in (0, 1)):
        assert all(command.poll() is None for command in commands)
        time.sleep(0.05)

    commands[0].kill()
    _, error = commands[1].communicate(timeout=BOUND)
    commands[0].communicate(timeout=BOUND)

    assert error.splitlines()[-1] == "megacore.errors.WorkerError: node 0 is gone: its command was killed"
    assert all((tmp_path / f"rank-{rank}-cleaned-up").exists() for rank in (0, 1))


LOST = Failure("WorkerError", "rank 0 timed out", is_echo=True)


def on_both_nodes(
    settings: list[dict[str, Any]], *bodies: Callable[[JoinedNodes], Any], count: int = 2
) -> list[Future[Any]]:
    """Let nodes meet in threads of this process; what came of their blocks, in order."""
    port = free_port()

    def node(rank: int, body: Callable[[JoinedNodes], Any]) -> Any:
        with join_nodes(Nodes(count, rank, port=port), settings[rank], timeout=timedelta(seconds=20)) as joined:
            return body(joined)

    with ThreadPoolExecutor() as threads:
        return [threads.submit(node, rank, body) for rank, body in enumerate(bodies)]


def test_the_mistake_that_a_rank_of_one_node_found_reaches_all_nodes_whose_ranks_lost_their_connection():
    mistake = Failure("DataError", "line 7: not a number")
    bodies = [lambda joined, failure=failure: joined.settle(failure).error() for failure in (LOST, LOST, mistake)]

    outcomes = on_both_nodes([{}, {}, {}], *bodies, count=3)

    assert [type(outcome.result()) for outcome in outcomes] == [DataError] * 3
    assert {str(outcome.result()) for outcome in outcomes} == {"line 7: not a number"}


def test_a_node_without_a_heartbeat_is_named_where_ranks_lost_their_connection(monkeypatch):
    monkeypatch.setattr("megacore.parallel.launch.nodes._HEARTBEAT_TIMEOUT", 3.0)
    monkeypatch.setattr("megacore.parallel.launch.nodes._CLOSE_TIMEOUT", 0.0)
    is_over = threading.Event()

    def settle(joined: JoinedNodes) -> Failure:
        try:
            return joined.settle(LOST)
        finally:
            is_over.set()

    def vanish(joined: JoinedNodes) -> None:
        joined._is_over.set()  # as if the process were gone
        is_over.wait(60)

    first, _ = on_both_nodes([{}, {}], settle, vanish)

    assert first.result().message == "node 1 is gone: its command was killed"


def test_node_0_reaches_torchs_store_where_the_others_do_whatever_its_own_name_stands_for():
    first, second = on_both_nodes([{}, {}], *[lambda joined: joined.endpoint] * 2)

    (first_host, first_port), (second_host, second_port) = (node.result().split(":") for node in (first, second))
    assert (first_host, second_host) == ("127.0.0.1", "localhost")
    assert first_port == second_port


# --- nodes that do not fit


def test_nodes_with_different_settings_are_refused_on_both_with_the_keys_that_differ():
    outcomes = on_both_nodes([{"lr": 1, "layout": "tp 2"}, {"lr": 2, "layout": "tp 2"}], *[lambda joined: None] * 2)

    for outcome in outcomes:
        with pytest.raises(ConfigError, match=r"^the nodes were not started alike: lr is 2 on node 1 and 1 on node 0$"):
            outcome.result()


def test_a_second_command_of_the_same_rank_is_refused_and_the_run_continues():
    port = free_port()

    def meet(rank: int) -> str:
        with join_nodes(Nodes(3, rank, port=port), {}, timeout=timedelta(seconds=20)):
            return "met"

    with ThreadPoolExecutor() as threads:
        twice = [threads.submit(meet, 1), threads.submit(meet, 1)]
        first = threads.submit(meet, 0)
        while not any(outcome.done() for outcome in twice):
            time.sleep(0.05)
        others = [first, threads.submit(meet, 2)]

    assert [outcome.result() for outcome in others] == ["met", "met"]
    assert sorted(str(outcome.exception()) for outcome in twice) == [
        "None",
        "another command has --node-rank 1 already",
    ]


def test_a_connection_from_elsewhere_is_ignored():
    port = free_port()

    def knock() -> None:
        while True:
            with suppress(ConnectionRefusedError), socket.create_connection(("localhost", port)) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                return

    def meet(rank: int) -> None:
        with join_nodes(Nodes(2, rank, port=port), {}, timeout=timedelta(seconds=20)):
            pass

    stranger = threading.Thread(target=knock)
    stranger.start()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(meet, 0)
        stranger.join()
        second = threads.submit(meet, 1)

    assert first.exception() is second.exception() is None


def meeting(nodes: Nodes) -> MegacoreError:
    """What a node says that nobody answers."""
    with (
        pytest.raises(MegacoreError) as raised,
        join_nodes(nodes, {}, timeout=timedelta(seconds=1)),
    ):
        pass
    return raised.value


def test_a_node_that_does_not_come_is_named_after_the_timeout():
    port = free_port()

    absent, unanswered = meeting(Nodes(3, 0, port=port)), meeting(Nodes(3, 1, port=port))

    assert isinstance(absent, WorkerError)
    assert str(absent) == f"nodes 1, 2 did not come to localhost:{port} in time"
    assert isinstance(unanswered, WorkerError)
    assert str(unanswered).startswith(f"node 0 did not answer at localhost:{port} in time: ")


@pytest.mark.parametrize("count", [1, 2])
def test_runs_of_one_process_start_one_after_another_at_the_same_port(monkeypatch, count):
    port = free_port()
    monkeypatch.setattr(
        "megacore.parallel.launch.nodes.get_socket_with_port", lambda: socket.create_server(("localhost", port))
    )

    def node(rank: int) -> str:
        with join_nodes(Nodes(count, rank, port=port), {}, timeout=timedelta(seconds=30)) as joined:
            if rank == 0:
                assert joined.endpoint.endswith(f":{port}")
                TCPStore("localhost", port, is_master=True, multi_tenant=True).set("who", "torch's rendezvous")
            return joined.run_id

    ids = []
    for _ in range(3):
        with ThreadPoolExecutor() as threads:
            [run_id] = set(threads.map(node, range(count)))
        ids.append(run_id)
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    ("rank", "note"),
    [(0, r"^node 0 waits for nodes 1, 2, for 1 seconds more at most$"), (1, r"^node 0 does not answer at localhost:")],
)
def test_notes_name_the_node_that_is_missing(monkeypatch, rank, note):
    monkeypatch.setattr("megacore.parallel.launch.nodes._NOTE_INTERVAL", 0.4)
    notes: list[str] = []

    with (
        pytest.raises(WorkerError),
        join_nodes(Nodes(3, rank, port=free_port()), {}, timeout=timedelta(seconds=1), on_note=notes.append),
    ):
        pass

    assert re.search(note, notes[0])


def test_a_kind_of_error_that_is_unknown_here_is_a_worker_error():
    assert type(Failure("NewerError", "line 7").error()) is WorkerError


def test_a_port_that_is_taken_and_an_address_that_is_not_known_are_errors_at_once():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert str(meeting(Nodes(2, 0, port=port))).startswith(f"node 0 cannot listen at port {port}: ")
    assert "the address of node 0, nowhere.invalid, is not known" in str(meeting(Nodes(2, 1, "nowhere.invalid")))


def test_the_interface_that_leads_to_a_host_is_known_where_the_host_is():
    assert interface_towards("localhost") == "lo"
    assert interface_towards("nowhere.invalid") is None


def test_ranks_that_the_nodes_cannot_share_equally_are_refused():
    with pytest.raises(LayoutError, match=r"^tp 3 takes 3 processes, which 2 nodes cannot share equally$"):
        run_on_ranks(print, sizes=ParallelSizes(tp=3), nodes=Nodes(2, 0))


# --- the layout that follows from the command line


@pytest.mark.parametrize(
    ("overrides", "nodes", "expected"),
    [
        ([], 1, ParallelSizes()),
        (["tensor_parallel=2"], 2, ParallelSizes(tp=2)),
        (["tensor_parallel=2", "nproc_per_node=2"], 2, ParallelSizes(tp=2, dp_replicate=2)),
        (["nproc_per_node=1"], 3, ParallelSizes(dp_replicate=3)),
    ],
    ids=["one process", "a model cut over the nodes", "two copies of a cut model", "a copy a node"],
)
def test_the_world_is_the_processes_of_a_node_times_the_nodes(place, overrides, nodes, expected):
    run = read_run_config(run_file(place), [f"parallel.{override}" for override in overrides])

    assert parallel_sizes(run.parallel, Nodes(nodes, 0)) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--nodes 2 --node-rank 0",
            "requires --node-rank, the rank of this node (0 to 1), and --addr",
        ),
        (
            "--nodes 2 --addr node1",
            "requires --node-rank, the rank of this node (0 to 1), and --addr",
        ),
        ("--nodes 2 --node-rank 2 --addr node1", "no node of rank 2: with 2 in all, --node-rank is 0 to 1"),
        ("--node-rank 1", "no node of rank 1: with 1 in all, --node-rank is 0"),
        (
            "--nodes 2 --node-rank 0 --addr node1",
            "tp 1 × pp 1 takes 1 process, which 2 nodes cannot share equally: say how many each of them starts, with "
            "--nproc-per-node or parallel.nproc_per_node",
        ),
        (
            "--tp 2 --nodes 3 --node-rank 0 --addr node1 --nproc-per-node 1",
            "3 processes cannot be laid out as tp 2 × pp 1, which takes a multiple of 2",
        ),
        ("--nproc-per-node 0", "0 is not in the range x>=1"),
        ("--nproc-per-node two", "'two' is not a valid integer"),
    ],
)
def test_a_mistake_in_the_options_is_one_message_and_exit_code_2(place, words, message):
    result = CliRunner().invoke(cli, ["train", str(run_file(place)), *words.split()])

    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_more_processes_than_a_node_has_gpus_are_refused(place, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    run = read_run_config(run_file(place), ["parallel.nproc_per_node=8"])

    with pytest.raises(LayoutError, match=r"^parallel.nproc_per_node is 8, and this node has 4 GPUs$"):
        parallel_sizes(run.parallel)


def started_by_torchrun(monkeypatch, num_here: int) -> None:
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": num_here}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")


def test_under_torchrun_another_number_of_processes_than_it_started_is_refused(place, monkeypatch):
    started_by_torchrun(monkeypatch, 2)
    run = read_run_config(run_file(place), ["parallel.nproc_per_node=4"])

    with pytest.raises(LayoutError, match=r"nproc_per_node is 4, and 2 processes were started on this node"):
        parallel_sizes(run.parallel)


def test_more_processes_under_torchrun_than_a_node_has_gpus_are_refused(place, monkeypatch):
    started_by_torchrun(monkeypatch, 4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    with pytest.raises(LayoutError, match=r"^4 processes were started on this node, which has 2 GPUs$"):
        parallel_sizes(read_run_config(run_file(place), []).parallel)


def test_a_rank_in_the_environment_without_the_rest_of_what_torchrun_says_is_refused(place, monkeypatch):
    monkeypatch.setenv("RANK", "0")

    with pytest.raises(ConfigError, match=r"but WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT of"):
        parallel_sizes(read_run_config(run_file(place), []).parallel)


def test_under_torchrun_the_option_nodes_is_refused(place, monkeypatch):
    started_by_torchrun(monkeypatch, 2)
    run = read_run_config(run_file(place), [*SETTINGS, "output.checkpoint=/tmp/never"])

    with pytest.raises(ConfigError, match=r"^under torchrun, which knows the nodes"):
        megacore.train(run, nodes=Nodes(2, 0))
