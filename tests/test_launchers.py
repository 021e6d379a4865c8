"""configs/slurm.sh with stand-ins for Slurm's commands, and configs/skypilot.yaml as far as it can be read here."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, log
from recipes import short_run

SCRIPT = ROOT / "configs" / "slurm.sh"
# srun OPTIONS bash ...: a process for each task of one machine; signals are passed on, the highest status is its own.
SRUN = """#!{python}
import os, signal, subprocess, sys
command = sys.argv[sys.argv.index("bash"):]
tasks = []
for n in range(int(os.environ["SLURM_NTASKS"])):
    tasks.append(subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}}))
signal.signal(signal.SIGTERM, lambda number, frame: [task.send_signal(number) for task in tasks])
statuses = [task.wait() for task in tasks]
print("statuses", statuses, flush=True)
sys.exit(max(status if status >= 0 else 128 - status for status in statuses))
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi
"""


@pytest.fixture
def submit(tiny_llava, tmp_path):
    """A function: flags -> slurm.sh, started as Slurm would for two tasks on this machine."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(stat.S_IRWXU)
    (commands / "python").symlink_to(sys.executable)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = (free.getsockname()[1] - 20000) % 20000  # whose port is free
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": str(job)}
    environment |= {"SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2", "VIRTUAL_ENV": sys.prefix}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)

    def start(**settings):
        flags = short_run(tiny_llava, tmp_path / "out", load_in_4bit=False, lora_dropout=0, **settings)
        command = ["bash", SCRIPT, ROOT / "sft_llava.py", *flags]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(list(map(str, command)), cwd=tmp_path, env=environment, **output)

    return start


RUN = {"max_steps": 30, "save_steps": 4, "logging_steps": 1, "eval_strategy": "no", "optim": "adamw_torch"}


def test_a_job_that_slurm_stops_saves_queues_itself_again_and_resumes(submit, tmp_path):
    job = submit(**RUN)
    deadline = time.monotonic() + 240
    while not (tmp_path / "out" / "checkpoint-4" / "checksums.json").exists():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)  # to the script alone: --signal=B:TERM
    printed, _ = job.communicate(timeout=120)
    assert job.returncode == 143 and "statuses [143, 143]" in printed
    assert re.fullmatch(r"requeue \d+\n", (tmp_path / "requeued").read_text())
    assert not (tmp_path / "out" / "trainer_state.json").exists()

    printed, _ = (again := submit(**RUN)).communicate(timeout=240)
    assert again.returncode == 0 and re.search(r"resuming from .*checkpoint-\d+\n", printed)
    assert "30 steps of 8 rows" in printed and list(log(tmp_path / "out")) == list(range(1, 31))
    assert (tmp_path / "requeued").read_text().count("requeue") == 1


def test_a_job_that_fails_is_not_queued_again(submit, tmp_path):
    printed, _ = (job := submit(**RUN, learning_rate=-1)).communicate(timeout=120)
    assert job.returncode == 1 and "error: --learning_rate must be" in printed
    assert not (tmp_path / "requeued").exists()


def test_a_step_that_ends_at_once_gives_its_status(submit, tmp_path):
    """Before the script can wait for it."""
    (tmp_path / "bin" / "srun").write_text("#!/usr/bin/env bash\nexit 7\n")
    for _ in range(5):
        (job := submit()).communicate(timeout=60)
        assert job.returncode == 7
    assert not (tmp_path / "requeued").exists()


def test_slurm_reads_these_lines():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SCRIPT.read_text(), re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8" and options["nodes"] == "2"
    assert options["signal"] == "B:TERM@300" and options["requeue"] == ""


def test_the_task_of_skypilot_has_what_a_spot_machine_needs():
    task = yaml.safe_load((ROOT / "configs" / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2 and task["resources"]["use_spot"] and task["resources"]["job_recovery"]
    assert "requirements.txt" in task["setup"] and "$SKYPILOT_NODE_RANK" in task["run"]
    assert (
        re.search(r"--output_dir /checkpoints/", task["run"])
        and task["file_mounts"]["/checkpoints"]["mode"] == "MOUNT_CACHED"
    )
