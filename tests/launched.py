"""`accelerate launch --config_file configs/*.yaml RECIPE.py`, on the CPU.

`accelerate launch` itself reads the configuration and sets the environment. Only the processes are not started anew by
torch.distributed.run, but forked from this one, which has imported everything: that takes seconds off each of them."""

import contextlib
import importlib.util
import multiprocessing
import os
import socket
import time
import traceback

import pytest
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from conftest import ROOT


def free_port():
    """A port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def work(rank, run, main, argv, file):
    """One of the processes that torch.distributed.run starts, in its place."""
    local_size = int(run.nproc_per_node)
    os.environ["RANK"] = str(rank + local_size * int(run.node_rank))
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(local_size)}
    os.environ["WORLD_SIZE"] = str(local_size * int(run.nnodes.split(":")[-1]))  # "1:1": at least, at most
    address, port = run.rdzv_endpoint.split(":") if run.rdzv_endpoint else (run.master_addr, run.master_port)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    code = 0
    with open(file, "a", encoding="utf-8") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(argv)
        except BaseException:  # of which nobody would hear
            traceback.print_exc()
            code = 1
        out.flush()
    os._exit(code)  # Python's own end would wait for, or trip over, threads of the group's communication


def shard_on_cpu():
    """Make this process shard a model on the CPU. Accelerate does so for GPUs only, although FSDP2 can: it takes
    processes on CPUs for DDP. Here it takes them for those of another device."""
    begin = AcceleratorState.__init__

    def begin_as_on_another_device(self, *args, **kwargs):
        if not AcceleratorState._shared_state:
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_HPU
        begin(self, *args, **kwargs)

    AcceleratorState.__init__ = begin_as_on_another_device


def launch(config, main, argv, folder, num_processes=2, more=()):
    """`accelerate launch --config_file configs/CONFIG.yaml`, on the CPU -> its processes, and where they write."""
    if config.startswith("zero"):
        pytest.importorskip("deepspeed")
    started, fork = [], multiprocessing.get_context("fork")
    folder.mkdir(exist_ok=True)

    def run(args):
        for rank in range(int(args.nproc_per_node)):
            file = folder / f"{len(list(folder.glob('*.txt')))}.txt"
            file.touch()
            given = (rank, args, main, args.training_script_args, file)
            process = fork.Process(target=work, args=given, daemon=True)
            process.start()
            started.append((process, file))

    flags = ["--config_file", ROOT / "configs" / f"{config}.yaml", "--num_processes", num_processes]
    flags += more or ["--main_process_port", 0]  # any that is free
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.run.run", run)
        launch_command(launch_command_parser().parse_args([*map(str, flags), "recipe.py", *map(str, argv)]))
    return started


def wait_for(started):
    """Wait for the end of all, which is a good one -> what they printed."""
    processes, latest = [process for process, _ in started], time.monotonic() + 120
    while any(process.is_alive() for process in processes) and time.monotonic() < latest:
        if any(process.exitcode for process in processes):
            time.sleep(1)  # the others may say why
            break  # they would wait for it for ever
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.join()
    texts = [file.read_text(encoding="utf-8") for _, file in started]
    assert not any(process.exitcode for process in processes), "\n".join(text[-3000:] for text in texts)
    return texts


@pytest.fixture(scope="module")
def deepspeed_on_cpu():
    """DeepSpeed for the CPU; without the communication that it compiles for processes of one machine, as on GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        if importlib.util.find_spec("deepspeed"):
            patch.setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
        yield
