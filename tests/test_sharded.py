"""What configs/*.yaml start: gradients, optimizer and weights in shares train like one process that has them all."""

import json
import os
import re
import shutil

import pytest
import torch
from conftest import log
from launched import deepspeed_on_cpu, free_port, launch, wait_for  # noqa: F401
from recipes import Recipe
from runs import VARIANTS, Runs
from safetensors.torch import load_file
from test_processes import JOINED, RUN, STILL, TIMES, by_length

WAYS = {  # a variant of runs.py -> what differs here
    "sft: float, projector": STILL,
    "sft: 4-bit": STILL,
    "sft: full": {},
    "docvqa: float": STILL,
    "docvqa: 4-bit": STILL | {"load_best_model_at_end": True},
    "dpo: float": {"loss_type": ["sigmoid", "sft"]},
    "dpo: 4-bit": {},
    "dpo: stock path": {},
    "4.6: lora": STILL,
    "4.6: 4-bit": STILL,
    "2.6: vision": STILL,
    "4.7: full": {},
    "align": JOINED | {"learning_rate": None},
    "instruct: full": JOINED,
    "instruct: lora, joined": JOINED | STILL,
    "instruct: 4-bit": JOINED | STILL,
}
CELLS = {
    "zero2": ["sft: float, projector", "docvqa: 4-bit", "dpo: float", "4.6: lora"],
    "zero3": ["sft: full", "docvqa: float"],
    "fsdp2": ["sft: 4-bit", "sft: full", "docvqa: 4-bit", "dpo: 4-bit", "4.6: 4-bit", "2.6: vision", "instruct: full"],
}
OTHER_CELLS = {  # of docs/scaling.md, run by hand: EVERY_CELL=1 pytest tests/test_sharded.py
    "zero2": [way for way in WAYS if way not in (*CELLS["zero2"], "instruct: 4-bit")],
    "zero3": ["sft: float, projector", "dpo: float", "align", "instruct: full", "instruct: lora, joined"],
    "fsdp2": [way for way in WAYS if way not in (*CELLS["fsdp2"], "instruct: 4-bit")],
}
RESUMED = ["sft: 4-bit", "instruct: full"]
IN_16_BITS = [("zero2", "docvqa: float"), ("zero3", "instruct: lora, joined"), ("fsdp2", "sft: 4-bit")]
if os.environ.get("EVERY_CELL"):
    CELLS = OTHER_CELLS
    IN_16_BITS = [("zero2", "instruct: 4-bit"), ("fsdp2", "instruct: 4-bit")]


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    return Runs(request, tmp_path_factory)


@pytest.fixture(scope="module")
def settings_of(runs, tmp_path_factory):
    """A function: configuration, variant -> the settings of a run of eleven rows: some have no image, if they may."""

    def make(config, variant):
        case, rows = Recipe(VARIANTS[variant].recipe, runs.folder(variant), None), {}
        train, test = ("captions", "captions-test") if variant == "align" else ("train", "test")
        rows["train"] = json.loads((runs.rows(case.name) / f"{train}.json").read_text())
        rows["test"] = json.loads((case.folder / "json" / f"{test}.json").read_text())
        folder = tmp_path_factory.mktemp("rows")
        for name, some in rows.items():
            if config == "zero3" and case.name != "llava_two_stage":
                some = 2 * [row for row in some if row.get("image")]
            (folder / f"{name}.json").write_text(json.dumps(some[:11]))
        files = {"dataset_name": folder / "train.json", "eval_dataset_name": folder / "test.json"}
        settings = {**RUN, **files, "image_folder": case.folder / "json" / "images", **WAYS[variant]}
        if config == "fsdp2":
            settings["optim"] = "adamw_torch"
        return settings

    return make


ONE_AT_ONCE = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
TWO_AT_ONCE = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3}


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_on_cpu")
@pytest.mark.parametrize("config, variant", [(config, way) for config, ways in CELLS.items() for way in ways])
def test_two_processes_train_like_one(config, variant, runs, settings_of, tmp_path, monkeypatch):
    """Losses, gradients, metrics, answers, the result; with FSDP2 also the rest of a run that was interrupted."""
    module, settings = runs.module(variant), settings_of(config, variant)
    if VARIANTS[variant].recipe == "idefics2_docvqa":
        monkeypatch.setattr(module, "score", by_length)
    argv = runs.argv(variant, tmp_path / "two", **settings, **ONE_AT_ONCE)
    first, second = wait_for(launch(config, module.main, argv, tmp_path / "printed"))
    assert "11 rows to train on" in first and "rows to train on" not in second
    one = runs.run(variant, tmp_path / "one", **settings, **TWO_AT_ONCE)
    names = {name for entry in one.trainer.state.log_history for name in entry if not TIMES.search(name)}
    assert {"loss", "grad_norm", "eval_loss"} < names
    for name in names:
        assert log(tmp_path / "two", name) == pytest.approx(log(one.out, name), rel=1e-4, abs=1e-4), name
    assert (tmp_path / "two" / "samples.md").read_text() == (one.out / "samples.md").read_text()
    files = [next((tmp_path / name).glob("*model.safetensors")) for name in ("one", "two")]
    weights, shared_out = map(load_file, files)
    assert shared_out.keys() - weights.keys() <= {"lm_head.weight"}  # a tied weight is saved twice
    shared_out = {name: shared_out[name] for name in weights}
    torch.testing.assert_close(shared_out, weights, atol=1e-3, rtol=1e-3)
    if config != "fsdp2" or variant not in RESUMED:
        return

    assert module.damage_of(tmp_path / "two" / "checkpoint-4") is None
    again = {"resume_from_checkpoint": tmp_path / "two" / "checkpoint-2", **ONE_AT_ONCE}
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    argv = runs.argv(variant, tmp_path / "again", **settings, **again)
    wait_for(launch(config, module.main, argv, tmp_path / "printed again"))
    for name in ("loss", "grad_norm"):
        assert log(tmp_path / "again", name) == log(tmp_path / "two", name)
    in_one_process = {**again, "gradient_accumulation_steps": 4}
    with pytest.raises(SystemExit, match="checkpoint-2 was written with FSDP: resume it in the same way"):
        module.main(runs.argv(variant, tmp_path / "without", **{**settings, **in_one_process}))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["docvqa: float", "dpo: 4-bit", "4.6: lora"])
def test_two_machines_train_like_one(variant, runs, settings_of, tmp_path):
    """Two starts of `accelerate launch` with configs/two_machines.yaml, a process each, that meet at an address."""
    module, settings = runs.module(variant), {**settings_of("ddp", variant), "eval_strategy": "no"}
    argv, port, started = runs.argv(variant, tmp_path / "two", **settings, **ONE_AT_ONCE), free_port(), []
    for rank in (0, 1):
        meet = ["--machine_rank", rank, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        started += launch("two_machines", module.main, argv, tmp_path / "printed", more=meet)
    assert len(wait_for(started)) == 2
    one = runs.run(variant, tmp_path / "one", **settings, **TWO_AT_ONCE)
    for name in ("loss", "grad_norm"):
        assert log(tmp_path / "two", name) == pytest.approx(log(one.out, name), rel=1e-4, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_on_cpu")
@pytest.mark.parametrize("config, variant", IN_16_BITS)
def test_in_16_bits(config, variant, runs, settings_of, tmp_path):
    module, settings = runs.module(variant), {**settings_of(config, variant), "bf16": True, "eval_strategy": "no"}
    argv = runs.argv(variant, tmp_path / "two", **settings, **ONE_AT_ONCE)
    wait_for(launch(config, module.main, argv, tmp_path / "printed"))
    one = runs.run(variant, tmp_path / "one", **settings, **TWO_AT_ONCE)
    assert log(tmp_path / "two") == pytest.approx(log(one.out), rel=2e-2)
    weights = load_file(next((tmp_path / "two").glob("*model.safetensors")))
    assert all(torch.isfinite(weight).all() for weight in weights.values())


# -------------------------------------------------------------------------------------------- what is refused, and why
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
REFUSED = [  # environment, as accelerate launch makes it, settings, message
    (FSDP | {"FSDP_VERSION": "1"}, {}, "fsdp_version 1: .*take 2"),
    (FSDP | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {}, "fsdp_state_dict_type must be FULL_STATE_DICT"),
    (FSDP, {"save_on_each_node": True}, "--save_on_each_node: .* want one disk"),
    (FSDP, {"optim": "paged_adamw_8bit"}, "--optim paged_adamw_8bit and FSDP2: .*--optim adamw_torch"),
]


@pytest.mark.parametrize("environment, settings, message", REFUSED)
def test_what_fsdp_cannot_do_is_refused(case, environment, settings, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert re.search(message, case.refusal(case.flags(**settings)))


def test_what_zero3_cannot_do_is_refused(case, tmp_path, monkeypatch):
    """4-bit weights, rows without images where a recipe shows no blank one, and MiniCPM-V."""
    monkeypatch.setattr(case.module, "is_deepspeed_zero3_enabled", lambda: True)
    four_bits = {"lora_r": 8, "load_in_4bit": True} if case.name == "llava_two_stage" else {"load_in_4bit": True}
    if case.name == "finetune_minicpm_lora":
        assert re.search("ZeRO-3: MiniCPM-V.s slices", case.refusal(case.flags()))
        return
    assert re.search("4 bits and ZeRO-3", case.refusal(case.flags(**four_bits)))
    if case.name in ("sft_llava", "dpo_idefics2"):
        rows = [json.loads((case.folder / "json" / "train.json").read_text())[0]]
        rows += [case.row("Two and two?", "Four.", image=None)]
        if case.name == "sft_llava":
            rows[1]["conversations"][0]["value"] = "Two and two?"
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        flags = {"image_folder": case.folder / "json" / "images", "load_in_4bit": False}
        message = case.refusal(case.flags_for(tmp_path / "rows.json", **flags))
        assert re.search("1 rows have no image, with ZeRO-3", message)
