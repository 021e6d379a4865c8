"""llava_two_stage.py on several processes: what configs/*.yaml start trains like one process with as many rows a step."""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, log, two_stage_run
from safetensors.torch import load_file

import llava_two_stage

SCRIPT = ROOT / "llava_two_stage.py"
SHORT = {
    "max_steps": 4,
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "per_device_eval_batch_size": 1,  # eval_loss is a mean of batches: of more rows, it would depend on the processes
    "max_eval_rows": 8,  # as many for each process, or a few would count twice
    "sample_rows": 1,
    "sample_tokens": 4,
    "save_total_limit": 2,
}
KINDS = {
    "align": {"stage": "align", "projector_learning_rate": 1e-3},
    "full": {"stage": "instruct", "projector_learning_rate": 2e-3, "learning_rate": 1e-3},
    "LoRA": {
        "stage": "instruct",
        "projector_learning_rate": 1e-3,
        "learning_rate": 1e-3,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0,
    },
}
ZERO = [
    name for name in ("zero2", "zero3") if shutil.which("g++")
]  # DeepSpeed compiles its communication for the CPU once


@pytest.fixture(scope="session")
def extensions(tmp_path_factory):
    """Where DeepSpeed puts what it compiles: a folder of this session's own, or a killed build's lock would stop every later one."""
    pytest.importorskip("deepspeed")
    return tmp_path_factory.mktemp("extensions")


def launch(config, argv, processes=2, extensions=None, script=SCRIPT, more=(), timeout=300):
    """Start a script as `accelerate launch --config_file configs/CONFIG.yaml` does on GPUs, in processes on the CPU. Returns how it ended,
    as subprocess.run() does."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja may be beside Python only
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}
    environment |= {"TORCH_EXTENSIONS_DIR": str(extensions)} if extensions else {}
    # Port 0: any that is free. Without --cpu, which would start one process.
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        ROOT / "configs" / f"{config}.yaml",
    ]
    command += ["--num_processes", processes, *(more or ("--main_process_port", 0)), script, *argv]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:  # processes that wait for each other would do so for ever
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="session")
def mixed(tiny_parts, tmp_path_factory):
    """A file of conversations, every third one without a picture."""
    rows = json.loads((tiny_parts / "json" / "train.json").read_text())
    pictures, words = ([row for row in rows if ("image" in row) == wanted] for wanted in (True, False))
    file = tmp_path_factory.mktemp("mixed") / "train.json"
    file.write_text(
        json.dumps([row for n in range(20) for row in (*pictures[2 * n : 2 * n + 2], words[n % len(words)])])
    )
    return file


@pytest.fixture(scope="session")
def flags_of(tiny_parts, mixed):
    """A function: kind of run, output_dir, settings -> the list of its flags."""

    def make(kind, out, **more):
        file, data = ("captions-test.json", {}) if kind == "align" else ("test.json", {"data_path": mixed})
        data["eval_data_path"] = tiny_parts / "json" / file
        return two_stage_run(tiny_parts, out, **{**data, **SHORT, **KINDS[kind], **more})

    return make


@pytest.fixture(scope="session")
def alone(flags_of, tmp_path_factory):
    """A function: kind of run, settings -> the folder of a run of one process with twice the rows at once, done at most once."""

    @functools.cache
    def run(kind, **more):
        out = tmp_path_factory.mktemp("alone") / "out"
        llava_two_stage.main(flags_of(kind, out, per_device_train_batch_size=2, **more))
        return out

    return run


def same(one, two):
    """The logs and the results of two runs agree to float32's rounding."""
    for key in ("loss", "grad_norm", "eval_loss"):
        assert log(one, key) and log(two, key) == pytest.approx(log(one, key), rel=2e-5), key
    name = "adapter_model.safetensors" if (one / "adapter_config.json").exists() else "model.safetensors"
    weights, others = load_file(one / name), load_file(two / name)
    assert weights.keys() == others.keys()
    for key in weights:
        torch.testing.assert_close(weights[key], others[key], atol=2e-3, rtol=2e-3)


def aborted(done):
    return "terminate called without an active exception" in done.stderr and "exitcode: -6" in done.stderr


def finished(done, out):
    """Whether a run came to its end. On a CPU a process with ZeRO-3 now and then aborted after that: while Python shut down, a thread of Gloo let go of
    the last barrier (PyTorch's issue 190489); DeepSpeed holds the group, so that no end of it waits for that thread. The launcher then takes the others
    down, too, and exits with 1."""
    return (done.returncode == 0 or aborted(done)) and (out / "trainer_state.json").exists()  # it is written last


def folder_of(request, config):
    return request.getfixturevalue("extensions") if config in ZERO else None


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", ["ddp", *ZERO])
def test_two_processes_train_like_one(flags_of, alone, request, tmp_path, config, kind):
    """Rows in any order: while one process has a picture the other has none."""
    argv = flags_of(kind, tmp_path / "out", per_device_train_batch_size=1, group_by_modality_length=False)
    done = launch(config, argv, extensions=folder_of(request, config))
    assert finished(done, tmp_path / "out"), done.stderr[-5000:]
    assert done.stdout.count("rows to train on") == 1
    same(alone(kind, group_by_modality_length=False), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", *ZERO][-1:])
def test_two_machines_train_like_one(flags_of, alone, request, tmp_path, config):
    """Two launchers, with one process each, that meet at an address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv, folder = flags_of("full", tmp_path / "out", per_device_train_batch_size=1), folder_of(request, config)
    meet = ("--num_machines", 2, "--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank")

    def machine(rank):
        try:
            return launch(config, argv, extensions=folder, more=(*meet, rank), timeout=200)
        except subprocess.TimeoutExpired:
            return None

    with ThreadPoolExecutor(2) as machines:
        done = [one for one in machines.map(machine, range(2)) if one]
    assert done and all(finished(one, tmp_path / "out") for one in done), done and done[0].stderr[-5000:]
    assert len(done) == 2 or aborted(
        done[0]
    )  # then the other launcher, its own process well at its end, waits for it for five minutes
    same(alone("full"), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("config", ZERO)
def test_a_killed_run_goes_on_with_the_same_losses_and_only_in_the_same_way(
    flags_of, alone, request, tmp_path, config
):
    argv, folder = flags_of("full", tmp_path / "out", per_device_train_batch_size=1), folder_of(request, config)
    same_rows = ["--gradient_accumulation_steps", "4"]  # of one process, as many in a step as of two
    first = launch(config, argv, extensions=folder)
    assert finished(first, tmp_path / "out"), first.stderr[-5000:]
    whole = log(tmp_path / "out")
    for end in (
        "checkpoint-4",
        "trainer_state.json",
        "model.safetensors",
    ):  # as if it had been killed after its second step
        (shutil.rmtree if end.startswith("checkpoint") else os.remove)(tmp_path / "out" / end)
    assert llava_two_stage.is_complete(tmp_path / "out" / "checkpoint-2")
    with pytest.raises(
        SystemExit, match="checkpoint-2 was written by 2 processes with DeepSpeed: resume it in the same way"
    ):
        llava_two_stage.main(argv + same_rows)
    alone_now = launch(config, argv + same_rows, processes=1, extensions=folder)
    assert alone_now.returncode == 1 and "was written by 2 processes with DeepSpeed" in alone_now.stderr
    again = launch(config, argv, extensions=folder)
    assert finished(again, tmp_path / "out") and "resuming from" in again.stdout, again.stderr[-5000:]
    assert log(tmp_path / "out") == whole
    for part in (tmp_path / "out" / "checkpoint-4").glob("global_step*/*"):
        part.write_bytes(part.read_bytes()[:-500])
        assert not llava_two_stage.is_complete(tmp_path / "out" / "checkpoint-4")
        break
    (tmp_path / "out" / "checkpoint-2" / "latest").unlink(missing_ok=True)
    assert not llava_two_stage.is_complete(tmp_path / "out" / "checkpoint-2")


def test_a_run_without_deepspeed_is_not_gone_on_with_in_shares(stage_flags, tmp_path):
    llava_two_stage.main(stage_flags(max_steps=2, save_steps=1, eval_fraction=0))
    (tmp_path / "out" / "trainer_state.json").unlink()
    settings, training = llava_two_stage.parse(stage_flags(max_steps=2, save_steps=1, eval_fraction=0))
    training.deepspeed_plugin = object()
    with pytest.raises(SystemExit, match="checkpoint-2 was written without DeepSpeed: resume it in the same way"):
        llava_two_stage.check_processes(llava_two_stage.checkpoint_to_resume(training), training)
