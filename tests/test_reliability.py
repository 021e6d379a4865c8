"""What a run does about numbers that are not finite, signals, full disks, other starts; and how it evaluates."""

import errno
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys

import psutil
import pytest
import torch
import transformers
from conftest import log
from recipes import Recipe
from runs import VARIANTS, Runs
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

EACH = ["sft: float", "docvqa: float", "dpo: float", "4.6: lora", "2.6: lora", "align", "instruct: lora, joined"]
each_variant = pytest.mark.parametrize("variant", EACH)
TIMES = re.compile("runtime|per_second|flos|train_loss")
SAFE = {"load_best_model_at_end": True, "save_steps": 1, "eval_steps": 1, "save_total_limit": 9, "sample_rows": 1}


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    runs = Runs(request, tmp_path_factory)
    runs.folder("align")  # a run makes it, which no test may break
    return runs


@pytest.fixture
def stopped(runs, tmp_path):
    """A function: variant, callbacks, settings -> (what ended its run, its output_dir)."""

    def make(variant, callbacks=(), **settings):
        out = tmp_path / "out"
        with pytest.raises(SystemExit) as caught:
            runs.run(variant, out, callbacks=callbacks, **{**SAFE, **settings})
        return caught.value.code, out

    return make


def checkpoints(out):
    return sorted(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))


def history(out):
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in entry.items() if not TIMES.search(name)} for entry in entries]


# ----------------------------------------------------------------------------------------- numbers that are not finite
class BrokenGradients:
    """Makes the gradients of these steps (counted from 1) nan. `rows`: of each batch that was collated, the rows."""

    def __init__(self, module, monkeypatch, *steps):
        training_step, collate = module.Trainer.training_step, module.Collator.__call__
        self.rows = []

        def broken_step(trainer, *args, **kwargs):
            loss = training_step(trainer, *args, **kwargs)
            if trainer.state.global_step + 1 in steps:
                weight = next(weight for weight in trainer.model.parameters() if weight.grad is not None)
                weight.grad.view(-1)[0] = math.nan
            return loss

        def noted(collator, rows):
            self.rows.append([row.get("row") for row in rows])
            return collate(collator, rows)

        monkeypatch.setattr(module.Trainer, "training_step", broken_step)
        monkeypatch.setattr(module.Collator, "__call__", noted)


@each_variant
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(variant, runs, tmp_path, monkeypatch):
    """Neither weights nor checkpoints; the steps before and after it do."""
    BrokenGradients(runs.module(variant), monkeypatch, 2, 3)
    done = runs.run(variant, tmp_path / "out", **SAFE)
    moved = []
    for before, after in zip(done.weights, done.weights[1:]):
        moved.append(any(not torch.equal(before[name], after[name]) for name in before))
    assert moved == [True, False, False, True] and checkpoints(done.out) == [1, 4]
    assert done.text.count("its gradient is not finite, so the weights stay as they are") == 2
    assert all(torch.isfinite(weight).all() for weight in done.last.values())


@each_variant
def test_the_third_in_a_row_ends_the_run_and_its_rows_are_named(variant, runs, stopped, monkeypatch):
    settings = {"eval_strategy": "no", "load_best_model_at_end": False, "max_steps": 8}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    broken = BrokenGradients(runs.module(variant), monkeypatch, 5, 6, 7)  # twelve rows: the last one begins an epoch
    message, out = stopped(variant, **settings)
    rows = ", ".join(map(str, sorted(broken.rows[-3] + broken.rows[-2])))  # the loader is one batch ahead
    expected = f"3 steps in a row had gradients that are not finite, the last one of the rows {rows}\\."
    assert re.match(f"error: {expected}", message) and checkpoints(out) == [1, 2, 3, 4]
    assert not (out / "trainer_state.json").exists()


@each_variant
def test_the_number_of_such_steps_is_a_flag(variant, runs, stopped, monkeypatch):
    BrokenGradients(runs.module(variant), monkeypatch, 2)
    message, out = stopped(variant, stop_on_nonfinite=1)
    assert message.startswith("error: 1 steps in a row") and checkpoints(out) == [1]


@each_variant
def test_a_run_whose_last_gradients_are_not_finite_saves_nothing_more(variant, runs, stopped, monkeypatch):
    BrokenGradients(runs.module(variant), monkeypatch, 4)
    message, out = stopped(variant)
    assert re.match("error: the last 1 gradients are not finite: nothing is saved", message)
    assert checkpoints(out) == [1, 2, 3] and not list(out.glob("*.safetensors"))


class BrokenWeight(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 3:
            weight = next(weight for weight in model.parameters() if weight.requires_grad)
            weight.data.view(-1)[0] = math.inf


@each_variant
def test_weights_that_are_not_finite_are_never_saved(variant, stopped):
    message, out = stopped(variant, callbacks=[BrokenWeight()])
    assert re.match(r"error: step 3: \['.+'\] has weights that are not finite: nothing is saved", message)
    assert checkpoints(out) == [1, 2] and not list(out.glob("*.safetensors"))


class Unmeasured(TrainerCallback):
    """Makes each eval_loss, but that of step `but`, nan."""

    def __init__(self, but=None):
        self.but = but

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if state.global_step != self.but:
            metrics["eval_loss"] = math.nan


@each_variant
def test_an_eval_loss_of_nan_is_never_the_best(variant, runs, tmp_path):
    metric = {"metric_for_best_model": "loss"} if "docvqa" in variant else {}
    done = runs.run(variant, tmp_path / "one", callbacks=[Unmeasured(but=2)], **SAFE, **metric)
    assert re.search(r"^best (eval_)?loss: \S+, at step 2; that is saved$", done.text, re.MULTILINE)
    done = runs.run(variant, tmp_path / "none", callbacks=[Unmeasured()], **SAFE, **metric)
    assert re.search("^no evaluation gave a .*loss that is a number, so the last weights are saved$", done.text, re.M)
    saved, last = (next(folder.glob("*model.safetensors")) for folder in (done.out, done.out / "checkpoint-4"))
    values = [
        sorted(tensor.float().numpy().tobytes() for tensor in load_file(file).values()) for file in (saved, last)
    ]
    assert values[0] == values[1]


# ------------------------------------------------------------------------------------------------------------- signals
class Terminated(TrainerCallback):
    """As if SIGTERM had come in the fourth step, after which the rows are evaluated."""

    def __init__(self, module):
        self.module = module

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.module.RUN.num_sigterms += 1


@pytest.mark.parametrize("steps", [4, 6], ids=["the last step", "not the last step"])
@each_variant
def test_an_evaluation_that_sigterm_left_no_time_for_comes_later(variant, steps, runs, stopped, tmp_path, monkeypatch):
    """The run that goes on logs and saves what an undisturbed one does, to the last bit."""
    settings = {"max_steps": steps, "save_steps": 2, "eval_steps": 2, "logging_steps": 3}
    module = runs.module(variant)
    whole = runs.run(variant, tmp_path / "whole", **{**SAFE, **settings})
    monkeypatch.setattr(module.RUN, "connections", ())
    monkeypatch.setattr(module.RUN, "num_sigterms", 0)
    code, out = stopped(variant, callbacks=[Terminated(module)], **settings)
    assert code == 143 and checkpoints(out) == [2, 4] and list(log(out / "checkpoint-4", "eval_loss")) == [2]
    monkeypatch.setattr(module.RUN, "num_sigterms", 0)
    again = runs.run(variant, out, **{**SAFE, **settings})
    assert f"resuming from {out}/checkpoint-4" in again.text and history(out) == history(whole.out)
    saved = [load_file(next(folder.glob("*model.safetensors"))) for folder in (out, whole.out)]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert (out / "samples.md").read_text() == (whole.out / "samples.md").read_text()


# ---------------------------------------------------------------------------------------------- the disk, other starts
@pytest.mark.parametrize("seconds, ends", [(0.1, False), (60, True)])
def test_a_second_sigterm_ends_the_run_at_once(seconds, ends, runs, monkeypatch):
    """But not one that comes with the first: Slurm sends one to all, and torchrun passes on its own."""
    module, clock, ended = runs.module("sft: float"), iter([100.0, 100.0, 100.0 + seconds]), []

    class Listener:
        signals = [signal.SIGTERM, signal.SIGTERM]

        def settimeout(self, seconds):
            pass

        def recv(self, count):
            return [self.signals.pop(0)]

    monkeypatch.setattr(module.RUN, "saves_soon", True)
    monkeypatch.setattr(module.RUN, "num_sigterms", 0)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(module, "end_now", lambda message, status: ended.append(status))
    with pytest.raises(IndexError):  # there are no more
        module.act_on_signals(Listener(), "")
    assert module.RUN.num_sigterms == 2 and ended == ([143] if ends else [])


def test_overflows_of_fp16_do_not_count(runs):
    """As long as the scaler can answer them with a smaller scale."""
    has_overflow = runs.module("sft: float").has_overflow
    options = [{"init_scale": 2.0}, {"init_scale": 1.0}, {"init_scale": 2.0, "enabled": False}]
    scalers = [torch.amp.GradScaler("cpu", **each) for each in options]
    assert [has_overflow(scaler) for scaler in (None, *scalers)] == [False, True, False, False]


DISK = {
    "python": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("error", DISK.values(), ids=DISK)
@pytest.mark.parametrize("what", ["checkpoint", "result"])
@pytest.mark.parametrize("variant", ["sft: float", "align"])
def test_a_full_disk_costs_what_is_being_written(variant, what, error, runs, stopped, monkeypatch):
    """Trainer writes the random numbers after a checkpoint's weights, and trainer_state.json after the result's."""
    module = runs.module(variant)
    save_random_numbers, save_state = module.Trainer._save_rng_state, transformers.TrainerState.save_to_json

    def fail_in_checkpoint(trainer, folder):
        if trainer.state.global_step == 3 and what == "checkpoint":
            raise error
        save_random_numbers(trainer, folder)

    def fail_in_result(state, path):
        if "checkpoint-" not in path and what == "result":
            raise error
        save_state(state, path)

    monkeypatch.setattr(module.Trainer, "_save_rng_state", fail_in_checkpoint)
    monkeypatch.setattr(transformers.TrainerState, "save_to_json", fail_in_result)
    message, out = stopped(variant)
    assert re.match(f"error: {out} cannot be written: .*GB are free.*make room", message) and "\n" not in message
    assert checkpoints(out) == ([1, 2] if what == "checkpoint" else [1, 2, 3, 4])
    assert not list(out.glob("*.safetensors"))
    assert module.damage_of(out / f"checkpoint-{checkpoints(out)[-1]}") is None


@each_variant
def test_a_disk_that_may_become_full_is_said_before_training(variant, runs, tmp_path, monkeypatch):
    """The size of a checkpoint is reckoned: it is that of a real one, but for processor and tokenizer."""
    module = runs.module(variant)
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1))
    done = runs.run(variant, tmp_path / "out", save_total_limit=1)
    said = re.search(r"warning: .* 1 checkpoints and one more are about (\S+) GB, 1e-09 GB are free", done.text)
    assert said
    checkpoint = next(done.out.glob("checkpoint-*"))
    files = [next(checkpoint.glob("*model.safetensors")), checkpoint / "optimizer.pt"]
    size = sum(file.stat().st_size for file in files)
    assert float(said[1]) == pytest.approx(2 * size / 1e9, rel=0.15)


@each_variant
def test_a_second_start_is_refused_while_the_first_one_lives(variant, runs, tmp_path):
    out, argv = tmp_path / "out", runs.argv(variant, tmp_path / "out")
    out.mkdir()
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        owner = {"host": platform.node(), "pid": sleeper.pid, "started": psutil.Process(sleeper.pid).create_time()}
        (out / "run.lock").write_text(json.dumps(owner))
        message = Recipe(VARIANTS[variant].recipe, None, None).refusal(argv)
        assert f"process {sleeper.pid} on {platform.node()} is training in {out}" in message
        assert json.loads((out / "run.lock").read_text()) == owner
    finally:
        sleeper.kill()
        sleeper.wait()


def test_the_lock_of_a_dead_run_is_taken_over_and_one_left_behind(runs, tmp_path, capsys):
    """Of a process that is gone, of another machine, of another process that has its number by now."""
    module, out = runs.module("sft: float"), tmp_path / "out"
    _, training = module.parse(runs.argv("sft: float", out))
    out.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    owner = {"host": platform.node(), "pid": dead.pid, "started": 1.0}
    for stale in (owner, {**owner, "host": "elsewhere"}, {**owner, "pid": os.getppid()}):
        (out / "run.lock").write_text(json.dumps(stale))
        module.lock(training)
        assert f"process {stale['pid']} on {stale['host']}, which no longer runs" in capsys.readouterr().out
        assert json.loads((out / "run.lock").read_text())["pid"] == os.getpid()
        module.unlock()
        assert not (out / "run.lock").exists()
    (out / "run.lock").write_text("half a lo")
    module.lock(training)
    module.unlock()
    assert not (out / "run.lock").exists()


# ---------------------------------------------------------------------------------------------------------- evaluation
def stock_losses(trainer, rows):
    """Of each row (sum of its trained tokens' losses, how many), by the stock forward pass of a row alone."""
    found = []
    for row in rows:
        batch = trainer.data_collator([row])
        labels = batch["labels"][:, 1:]
        inputs = {name: batch[name] for name in batch if name not in ("labels", "trained_at", "targets")}
        with torch.no_grad():
            logits = trainer.model.eval()(**inputs).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="sum")
        found.append((losses.item(), (labels != -100).sum().item()))
    return found


@pytest.mark.parametrize("variant", [variant for variant in EACH if variant not in ("dpo: float", "2.6: lora")])
def test_eval_loss_is_the_mean_over_all_trained_tokens(variant, runs):
    done = runs.trained(variant)
    trainer, losses = done.trainer, stock_losses(done.trainer, done.trainer.eval_dataset)
    # If all rows had the same number of tokens, a mean of means would be the same. Captions of align have.
    assert variant == "align" or len({count for _, count in losses}) > 1
    expected = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    for size in (1, 3, 4):
        trainer.args.per_device_eval_batch_size = size
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variant", ["dpo: float", "dpo: stock path"])
def test_rewards_are_means_over_pairs_and_sft_is_one_over_tokens(variant, runs):
    done = runs.run(variant, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    trainer, counted, found = done.trainer, [], {}
    for row in trainer.eval_dataset:
        trainer.args.per_device_eval_batch_size = 1
        one = trainer.evaluate(trainer.eval_dataset.filter(lambda other, row=row: other["row"] == row["row"]))
        mask = trainer.data_collator([row])["completion_mask"].chunk(2)[0][:, 1:]
        counted.append({**one, **trainer.state.log_history[-1], "tokens": mask.sum().item()})
    for size in (1, 3, 4):
        trainer.args.per_device_eval_batch_size = size
        trainer.evaluate()
        found[size] = trainer.state.log_history[-1]
    for name in ("eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/chosen"):
        expected = sum(one[name] for one in counted) / len(counted)
        assert [found[size][name] for size in found] == pytest.approx([expected] * 3, rel=1e-5, abs=1e-6)
    margins = torch.tensor([one["eval_rewards/margins"] for one in counted])
    tokens = torch.tensor([float(one["tokens"]) for one in counted])
    assert len(set(tokens.tolist())) > 1
    preference = torch.nn.functional.softplus(-margins)  # = -log(sigmoid(margins))
    sft = torch.tensor([one["eval_loss"] for one in counted]) - preference  # half of the mean of a pair's own tokens
    expected = preference.mean() + (sft * tokens).sum() / tokens.sum()
    assert [found[size]["eval_loss"] for size in found] == pytest.approx([expected.item()] * 3, rel=1e-4)


# ----------------------------------------------------------------------------------------------------- what is written
@each_variant
def test_no_file_has_the_hub_token(variant, runs, tmp_path):
    done = runs.run(variant, tmp_path / "out", hub_token="hf_secretsecret", report_to="tensorboard")
    files = [path for path in done.out.rglob("*") if path.is_file()]
    assert {"training_args.bin", "settings.yaml"} <= {path.name for path in files}
    assert [path for path in files if b"secretsecret" in path.read_bytes()] == []
    assert done.trainer.args.hub_token == "hf_secretsecret"  # it is still there for --push_to_hub


@each_variant
def test_samples_of_the_newest_evaluations_are_kept(variant, runs, tmp_path):
    module = runs.module(variant)
    for step in range(1, 54):
        module.append_samples(tmp_path, f"Step {step}", ["picture", "question"], [(0, [], [f"What is {step}?"])])
    text = (tmp_path / "samples.md").read_text()
    assert re.findall("^## Step (.*)$", text, re.MULTILINE) == [str(step) for step in range(4, 54)]
    assert re.findall(r"What is (\d+)\?", text) == [str(step) for step in range(4, 54)]
