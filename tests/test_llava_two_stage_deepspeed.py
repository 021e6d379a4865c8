"""llava_two_stage.py on several processes: what configs/*.yaml start trains like one process with as many rows a step.

`accelerate launch` itself reads the configuration and sets the environment. Only the processes are not started anew by
torch.distributed.run, but forked from this one, which has imported everything: that takes seconds off each of them."""

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
import traceback

import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT, log
from recipes import Recipe
from safetensors.torch import load_file

import llava_two_stage

SHORT = {
    "max_steps": 4,
    "eval_steps": 2,
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 1,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "group_by_modality_length": False,  # while one process has an image, the other has none
    "per_device_eval_batch_size": 1,  # eval_loss is a mean of batches
    "max_eval_rows": 4,  # as many for each process, or a few would count twice
    "sample_rows": 1,
    "sample_tokens": 4,
}
RATES = {"projector_learning_rate": 1e-3, "learning_rate": 1e-3}
KINDS = {
    "align": {"stage": "align", "projector_learning_rate": 1e-3},
    "full": RATES | {"projector_learning_rate": 2e-3},
    "LoRA": RATES | {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0},
}
pytestmark = pytest.mark.slow


# -------------------------------------------------------------------------------------------------- several processes
def work(rank, run, argv, file):
    """One of the processes that torch.distributed.run starts, in its place."""
    local_size = int(run.nproc_per_node)
    os.environ["RANK"] = str(rank + local_size * int(run.node_rank))
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(local_size)}
    os.environ["WORLD_SIZE"] = str(local_size * int(run.nnodes.split(":")[-1]))  # "1:1": at least, at most
    address, port = run.rdzv_endpoint.split(":") if run.rdzv_endpoint else (run.master_addr, run.master_port)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    code = 0
    with open(file, "a", encoding="utf-8") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            llava_two_stage.main(argv)
        except BaseException:  # of which nobody would hear
            traceback.print_exc()
            code = 1
        out.flush()
    os._exit(code)  # Python's own end would wait for, or trip over, threads of the group's communication


def launch(config, argv, folder, num_processes=2, more=()):
    """`accelerate launch --config_file configs/CONFIG.yaml`, on the CPU -> its processes, and where they write."""
    if config != "ddp":
        pytest.importorskip("deepspeed")
    started, fork = [], multiprocessing.get_context("fork")

    def run(args):
        for rank in range(int(args.nproc_per_node)):
            file = folder / f"{len(list(folder.glob('*.txt')))}.txt"
            file.touch()
            process = fork.Process(target=work, args=(rank, args, args.training_script_args, file), daemon=True)
            process.start()
            started.append((process, file))

    flags = ["--config_file", ROOT / "configs" / f"{config}.yaml", "--num_processes", num_processes]
    flags += more or ["--main_process_port", 0]  # any that is free
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.run.run", run)
        launch_command(launch_command_parser().parse_args([*map(str, flags), "llava_two_stage.py", *argv]))
    return started


def wait_for(started):
    """Wait for the end of all, which is a good one -> what they printed."""
    processes, latest = [process for process, _ in started], time.monotonic() + 120
    while any(process.is_alive() for process in processes) and time.monotonic() < latest:
        if any(process.exitcode for process in processes):
            break  # the others would wait for it for ever
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.join()
    texts = [file.read_text(encoding="utf-8") for _, file in started]
    assert not any(process.exitcode for process in processes), "\n".join(text[-3000:] for text in texts)
    return texts


@pytest.fixture(scope="module", autouse=True)
def imported():
    """DeepSpeed for the CPU; without the communication that it compiles for processes of one machine, as on GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        if importlib.util.find_spec("deepspeed"):
            patch.setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
        yield


@pytest.fixture(scope="module")
def flags_of(tiny_parts, tmp_path_factory):
    """A function: kind of run, output_dir, settings -> its flags; of the conversations every other has no image."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = json.loads((tiny_parts / "json" / "train.json").read_text())
    shown, blind = ([row for row in rows if ("image" in row) == wanted] for wanted in (True, False))
    train = [row for n in range(18) for row in (shown[n], blind[n % len(blind)])]
    # Answers of one length: rows that several processes evaluate at a time are weighed by their labels.
    held = [row for row in shown if row["conversations"][-1]["value"] == "even"][-4:]
    for name, some in (("train", train), ("held", held)):
        (folder / f"{name}.json").write_text(json.dumps(some))
    recipe = Recipe("llava_two_stage", tiny_parts, folder)

    def make(kind, out, **more):
        if kind == "align":
            data = {"eval_dataset_name": tiny_parts / "json" / "captions-test.json"}
        else:
            data = {"dataset_name": folder / "train.json", "eval_dataset_name": folder / "held.json"}
        return recipe.flags(output_dir=out, **{**data, **SHORT, **KINDS[kind], **more})

    return make


@pytest.fixture(scope="module")
def alone(flags_of, tmp_path_factory):
    """A function: kind of run -> the folder of a run of one process with twice the rows at once, done at most once."""

    @functools.cache
    def run(kind):
        out = tmp_path_factory.mktemp("alone") / "out"
        with contextlib.redirect_stdout(sys.stderr):
            llava_two_stage.main(flags_of(kind, out, per_device_train_batch_size=2))
        return out

    return run


@pytest.fixture(scope="module")
def together(flags_of, tmp_path_factory):
    """A function: configuration, kind of run -> the folder of a run of two processes, done at most once."""

    @functools.cache
    def run(config, kind):
        folder = tmp_path_factory.mktemp("together")
        argv = flags_of(kind, folder / "out", per_device_train_batch_size=1)
        first, second = wait_for(launch(config, argv, folder))
        assert "rows to train on" in first and "rows to train on" not in second  # said once
        return folder / "out"

    return run


def assert_same_run(one, two):
    """The logs and the results of two runs agree to float32's rounding."""
    for key in ("loss", "grad_norm", "eval_loss"):
        assert log(one, key) and log(two, key) == pytest.approx(log(one, key), rel=2e-5), key
    name = "adapter_model.safetensors" if (one / "adapter_config.json").exists() else "model.safetensors"
    weights, others = load_file(one / name), load_file(two / name)
    assert weights.keys() == others.keys()
    for key in weights:
        torch.testing.assert_close(weights[key], others[key], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    "config, kind",
    [("ddp", "full"), ("zero2", "full"), ("zero2", "LoRA"), ("zero3", "align"), ("zero3", "full"), ("zero3", "LoRA")],
)
def test_two_processes_train_like_one(together, alone, config, kind):
    assert_same_run(alone(kind), together(config, kind))


def test_two_machines_train_like_one(flags_of, alone, tmp_path):
    """Two launchers, with one process each, that meet at an address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv, started = flags_of("full", tmp_path / "out", per_device_train_batch_size=1), []
    for rank in (0, 1):
        meet = ["--num_machines", 2, "--machine_rank", rank, "--main_process_ip", "127.0.0.1"]
        started += launch("zero3", argv, tmp_path, more=[*meet, "--main_process_port", port])
    assert len(wait_for(started)) == 2
    assert_same_run(alone("full"), tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_a_killed_run_goes_on_with_the_same_losses_and_only_in_the_same_way(flags_of, together, tmp_path, config):
    whole, out = together(config, "full"), tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoint-4")  # as if it had been killed after its second step
    for end in ("trainer_state.json", "model.safetensors"):
        (out / end).unlink()
    checkpoint, argv = out / "checkpoint-2", flags_of("full", out, per_device_train_batch_size=1)
    assert llava_two_stage.damage_of(checkpoint) is None
    one_process = [*argv, "--gradient_accumulation_steps", "4"]  # as many rows in a step
    in_the_same_way = "checkpoint-2 was written by 2 processes with DeepSpeed: resume it in the same way"
    with pytest.raises(SystemExit, match=in_the_same_way):
        llava_two_stage.main(one_process)
    _, training = llava_two_stage.parse(one_process)
    training.deepspeed_plugin = object()  # of one process with DeepSpeed
    with pytest.raises(SystemExit, match=in_the_same_way):
        llava_two_stage.check_processes(checkpoint, training)

    first, _ = wait_for(launch(config, argv, tmp_path))
    assert f"resuming from {checkpoint}" in first and log(out) == log(whole)
    part = next((out / "checkpoint-4").glob("global_step*/*"))
    part.write_bytes(part.read_bytes()[:-500])
    (checkpoint / "latest").unlink()
    assert part.name in llava_two_stage.damage_of(out / "checkpoint-4")
    assert "latest is missing" in llava_two_stage.damage_of(checkpoint)


def test_a_run_without_deepspeed_is_not_gone_on_with_in_shares(flags_of, alone):
    _, training = llava_two_stage.parse(flags_of("align", alone("align")))
    training.deepspeed_plugin = object()
    with pytest.raises(SystemExit, match="checkpoint-4 was written without DeepSpeed: resume it in the same way"):
        llava_two_stage.check_processes(alone("align") / "checkpoint-4", training)
