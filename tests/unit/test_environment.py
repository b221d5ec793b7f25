"""From Slurm's variables to a rank's: what the allocation says, and who is which rank.

The variables are those that Slurm 22.05 sets, written down from its manual for each way to ask for GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from strop.errors import UserError
from strop.slurm import env


@pytest.mark.parametrize(
    ("variables", "tasks"),
    [
        ({}, 1),  # a CPU node: one rank
        ({"SLURM_NTASKS_PER_NODE": "4"}, 4),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_GPUS_PER_NODE": "8"}, 8),
        ({"SLURM_GPUS_PER_NODE": "a100:4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "a100:4,v100:2"}, 6),
        ({"SLURM_JOB_GPUS": "0,1,2"}, 3),
        ({"SLURM_JOB_GPUS": "0-3"}, 4),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "2"}, 2),  # what was asked for is obeyed
    ],
)
def test_tasks_per_node(variables, tasks):
    assert env.tasks_per_node(variables) == tasks


def test_more_tasks_than_gpus_is_refused():
    with pytest.raises(UserError, match="--ntasks-per-node=9"):
        env.tasks_per_node({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "9"})


SRUN = {  # rank 5 of 7 on the second node of three
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURMD_NODENAME": "node2",
    "STROP_RUN_DIR": "/runs/a",
    "STROP_ATTEMPT": "3",
    "STROP_JOB_ID": "12_4",
    "STROP_END_TIME": "1700000000",
}


def test_a_rank_reads_what_its_wrapper_wrote():
    variables = env.rank_variables(env.read_task(SRUN), SRUN, num_cpus=16)
    e = env.read_env(variables)
    assert (e.rank, e.world_size, e.local_rank, e.local_size, e.node) == (5, 7, 2, 3, "node2")
    assert (str(e.run_dir), e.attempt, e.job_id, e.end_time) == ("/runs/a", 3, "12_4", 1.7e9)


def test_nobody_launched_this_process():
    e = env.read_env({"STROP_RUN_DIR": "/left/over"})  # of a shell that once was a job
    assert (e.rank, e.world_size, e.run_dir, e.attempt) == (0, 1, None, None)


@pytest.mark.parametrize(
    ("extra", "num_cpus", "threads"),
    [
        ({}, 16, "5"),  # three ranks share the node's 16
        ({}, 2, "1"),  # never none
        ({"SLURM_CPUS_PER_TASK": "4"}, 16, "4"),
        ({"SLURM_CPUS_PER_TASK": "16"}, 2, "2"),  # the node claims more than there are
        ({"OMP_NUM_THREADS": "7"}, 16, "7"),  # the user's word
    ],
)
def test_threads(extra, num_cpus, threads):
    variables = {**SRUN, **extra}
    assert env.rank_variables(env.read_task(variables), variables, num_cpus)["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    ("extra", "preloaded"),
    [
        ({}, "env/lib/libtcmalloc.so.4"),
        ({"LD_PRELOAD": "/mine.so"}, "/mine.so"),  # the user's word
        ({"STROP_GPUS_PER_NODE": "8"}, None),  # the host's memory is not what a GPU waits for
    ],
)
def test_the_allocator(tmp_path, extra, preloaded):
    library = tmp_path / "env" / "lib" / "libtcmalloc.so.4"
    library.parent.mkdir(parents=True)
    library.touch()
    variables = {**SRUN, "CONDA_PREFIX": str(tmp_path / "env"), **extra}
    found = env.rank_variables(env.read_task(variables), variables, 1).get("LD_PRELOAD")
    assert found == (str(tmp_path / preloaded) if preloaded else None)


def test_no_allocator_anywhere(tmp_path):
    assert env.allocator({}, [str(tmp_path)]) is None


def test_interface_for_both_libraries():
    variables = {**SRUN, "STROP_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib1"}
    result = env.rank_variables(env.read_task(variables), variables, 1)
    assert (result["GLOO_SOCKET_IFNAME"], result["NCCL_SOCKET_IFNAME"]) == ("ib0", "ib1")


@pytest.mark.parametrize(
    ("variables", "target"),
    [
        ({"SLURM_JOB_ID": "12"}, "12"),
        # The last task of an array has the array's own number: a requeue by number would hit all tasks.
        ({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "4"}, "12_4"),
        ({"SLURM_JOB_ID": "12", "STROP_LAUNCHER": "local"}, None),
    ],
)
def test_the_name_for_scontrol(variables, target):
    assert env.read_job({"SLURM_JOB_NODELIST": "n1", **variables}).target == target


SHOW = """import os, re, sys
print("args:", *sys.argv[1:])
sys.stdout.flush()
if "STROP_STDOUT_FD" in os.environ:
    os.write(int(os.environ["STROP_STDOUT_FD"]), b"to the job's output")
print(re.search("SigBlk.*", open("/proc/self/status").read())[0], file=sys.stderr)
"""


def test_launch_redirects_and_blocks(tmp_path):
    """The real wrapper: what is written to 1 and 2 goes to the rank's file, rank 0 keeps a way to the job's
    output, and all start with the signals blocked."""
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\n{SHOW}")  # no shell: dash clears the mask for its children
    fake.chmod(0o755)
    outputs = {}
    for rank in ("0", "1"):
        variables = {
            **os.environ,
            "SLURM_PROCID": rank,
            "SLURM_NTASKS": "2",
            "SLURM_LOCALID": rank,
            "SLURM_STEP_TASKS_PER_NODE": "2",
            "STROP_RUN_DIR": str(tmp_path),
            "STROP_ATTEMPT": "1",
            "PYTHON": str(fake),
            "PYTHONPATH": "src",
        }
        command = [sys.executable, "-m", "strop.slurm.launch", "--", "dpo", "a.b=c d"]
        outputs[rank] = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert outputs["0"].stdout == "to the job's output"
    assert outputs["1"].stdout == ""
    assert outputs["0"].stderr == outputs["1"].stderr == ""
    blocked = f"SigBlk:\t{(1 << 9) | (1 << 14):016x}\n"  # USR1 is 10, TERM is 15
    for rank in (0, 1):
        raw = (tmp_path / f"logs/0001/rank{rank:05d}.err").read_text()
        assert raw == f"args: -m strop.train dpo a.b=c d\n{blocked}"


def test_a_wrapper_that_can_make_no_log_starts_the_trainer_all_the_same(tmp_path):
    """A file stands where the logs should go. What the rank says goes where srun's own output goes."""
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\n{SHOW}")
    fake.chmod(0o755)
    (tmp_path / "logs").touch()
    variables = {
        **os.environ,
        **{"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"},
        **{"STROP_RUN_DIR": str(tmp_path), "STROP_ATTEMPT": "1", "PYTHON": str(fake), "PYTHONPATH": "src"},
    }
    command = [sys.executable, "-m", "strop.slurm.launch", "--", "dpo"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    first, second, *_ = done.stderr.splitlines()
    assert "rank 0" in first
    assert "has no log of its own" in first
    assert second == "args: -m strop.train dpo"
    assert done.stdout == "to the job's output"


def test_ranks_log_to_the_nodes_own_disk_where_the_site_says_so(tmp_path):
    """Files of a namesake's attempt, which an earlier job has left there, are not taken for this run's."""
    run, disk = tmp_path / "runs/r", tmp_path / "disk"
    (disk / "r/0003").mkdir(parents=True)
    (disk / "r/0003/rank00000.2.err").write_text("old")
    (disk / "r/0003/rank00000.jsonl").write_text("old")
    (disk / "r/0003/rank00001.jsonl").write_text("another rank of this attempt")
    variables = {
        **os.environ,
        **{"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2"},
        **{"STROP_RUN_DIR": str(run), "STROP_ATTEMPT": "3", "STROP_LOG_DIR": str(disk)},
        **{"PYTHON": "/bin/false", "PYTHONPATH": "src"},
    }
    subprocess.run([sys.executable, "-m", "strop.slurm.launch", "--", "dpo"], env=variables, check=False)
    assert sorted(path.name for path in (disk / "r/0003").iterdir()) == ["rank00000.err", "rank00001.jsonl"]
    assert not run.exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"STROP_GPUS_PER_NODE": "8"}, "expandable_segments:True"),
        ({"STROP_GPUS_PER_NODE": "0"}, None),
        ({}, None),
        ({"STROP_GPUS_PER_NODE": "8", "PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"STROP_GPUS_PER_NODE": "8", "PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
    ],
)
def test_memory_of_gpus_grows_in_segments_unless_the_user_says_otherwise(given, expected):
    variables = {**SRUN, **given}
    found = env.rank_variables(env.read_task(variables), variables, 1)
    assert found.get("PYTORCH_ALLOC_CONF") == expected
