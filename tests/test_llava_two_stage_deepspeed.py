"""llava_two_stage.py by DeepSpeed: what configs/*.yaml start trains like one process with as many rows a step."""

import contextlib
import functools
import json
import shutil
import sys

import pytest
import torch
from conftest import log
from launched import deepspeed_on_cpu, free_port, launch, wait_for  # noqa: F401
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
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("deepspeed_on_cpu")]


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
        first, second = wait_for(launch(config, llava_two_stage.main, argv, folder))
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
    port = free_port()
    argv, started = flags_of("full", tmp_path / "out", per_device_train_batch_size=1), []
    for rank in (0, 1):
        meet = ["--num_machines", 2, "--machine_rank", rank, "--main_process_ip", "127.0.0.1"]
        started += launch("zero3", llava_two_stage.main, argv, tmp_path, more=[*meet, "--main_process_port", port])
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
        llava_two_stage.require_same_shares(training, checkpoint)

    first, _ = wait_for(launch(config, llava_two_stage.main, argv, tmp_path))
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
        llava_two_stage.require_same_shares(training, alone("align") / "checkpoint-4")
