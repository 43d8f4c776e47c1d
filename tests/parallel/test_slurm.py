"""Joining under srun: what its variables mean, and processes that are started with them."""

from __future__ import annotations

import pytest

from free_port import free_port
from megacore.parallel.launch.slurm import expand_counts, first_host, srun_variables
from warm_commands import Command

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "node[01-03]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
"""Of the fourth of five tasks, the second on its node."""


def test_a_task_of_a_step_is_told_in_torchruns_words():
    assert srun_variables(STEP) == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node01",
        "MASTER_PORT": str(10_000 + 4711 * 31 % 20_000),
    }


def test_all_tasks_of_a_step_agree_on_the_port_and_another_step_of_the_job_has_another_one():
    of_a_sibling = srun_variables(STEP | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"})
    of_another_step = srun_variables(STEP | {"SLURM_STEP_ID": "1"})

    assert srun_variables(STEP)["MASTER_PORT"] == of_a_sibling["MASTER_PORT"] != of_another_step["MASTER_PORT"]


def test_an_address_and_a_port_that_the_user_has_set_are_kept():
    variables = srun_variables(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})

    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("10.0.0.1", "1234")


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, STEP | {"SLURM_STEP_NUM_TASKS": "1"}],
    ids=["no SLURM", "a batch script", "a step of one task"],
)
def test_a_process_that_is_not_one_of_several_tasks_is_on_its_own(environment):
    assert srun_variables(environment) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node[01-03,07]", "node01"),
        ("node[07,09-12],login", "node07"),
        ("a-1,b-[2-3]", "a-1"),
        ("rack[2-3]n[08-09]-ib,other", "rack2n08-ib"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_the_tasks_of_each_node():
    assert expand_counts("4") == [4]
    assert expand_counts("2(x2),1,16(x3)") == [2, 2, 1, 16, 16, 16]


def test_two_tasks_of_a_step_join_and_sum(tmp_path):
    step = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    step |= {"SLURM_STEP_NODELIST": "localhost,elsewhere", "MASTER_PORT": str(free_port())}

    tasks = [
        Command("sum", module="launched", environment=step | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)})
        for rank in (0, 1)
    ]

    assert [task.communicate(timeout=60)[0] for task in tasks] == [
        "(0, 2, False, 15.0)\nspeaks\n",
        "(0, 2, False, 15.0)\n",
    ]
