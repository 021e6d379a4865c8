"""benchmarks/docvqa_step.py and dpo_step.py: what they report, and that their checks can fail."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import dpo_idefics2
import idefics2_docvqa

sys.path.insert(0, str(ROOT / "benchmarks"))
import docvqa_step  # noqa: E402
import dpo_step  # noqa: E402

torch = dpo_step.torch


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(docvqa_step.torch.cuda, "is_available", lambda: False)  # as all other tests run


def test_reports_costs_and_equality_of_both_settings(tmp_path, capsys):
    assert docvqa_step.main(["--tiny", "--steps", "1", "--json", str(tmp_path / "step.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": equal") == 2 and "NOT EQUAL" not in printed and docvqa_step.SMALL in printed
    found = json.loads((tmp_path / "step.json").read_text())["settings"]
    assert [setting["checkpointing"] for setting in found] == [True, False]
    for setting in found:
        assert setting["equal"]
        assert setting["check"]["adapters"] == 2 * (4 * 2 + 4 * 3 + 1)  # A and B: language model, perceiver, lm_head
        for what in ("flops", "peak_bytes"):  # times of one tiny step say nothing
            assert setting[what]["stock"] > setting[what]["recipe"] > 0
    assert found[0]["flops"]["stock"] > found[1]["flops"]["stock"]  # recomputation is counted


@pytest.mark.parametrize(
    "wrong", [lambda loss: loss * 1.0001, lambda loss: loss + 1e-4 * (loss - loss.detach())], ids=["loss", "gradients"]
)
def test_exit_status_1_where_they_differ(monkeypatch, capsys, wrong):
    right = idefics2_docvqa.Trainer.compute_loss
    monkeypatch.setattr(idefics2_docvqa.Trainer, "compute_loss", lambda *args, **more: wrong(right(*args, **more)))
    assert docvqa_step.main(["--tiny", "--steps", "1", "--checkpointing", "off"]) == 1
    printed = capsys.readouterr().out
    assert "NOT EQUAL" in printed and "error: the recipe's loss or gradients" in printed


def test_nan_is_not_equal():
    assert not docvqa_step.equal(
        {"loss": {"stock": 1.0, "recipe": 1.0}, "gradient_max": float("nan"), "gradient_norm": 0.0}
    )


def test_weights_without_storage_cost_as_many_flops(tmp_path):
    shape, args = docvqa_step.SHAPES["tiny"], argparse.Namespace(batch_size=2, seed=0)
    settings, training = docvqa_step.prepare(args, True, tmp_path)
    processor = docvqa_step.make_processor(shape)
    processor.image_processor.do_image_splitting = False
    collator = idefics2_docvqa.Collator(processor, settings, training)
    rows = docvqa_step.make_rows(2, shape, processor.tokenizer, 0)
    counted, shares = docvqa_step.flops_without_storage(shape, collator, rows, settings, training)
    assert sum(shares.values()) == pytest.approx(1)
    model = docvqa_step.adapted(
        docvqa_step.configuration(shape, processor.image_token_id), settings, training.device, None
    )
    for side, trainer in docvqa_step.trainers(model, collator, rows, settings, training).items():
        trainer.model.activation_checkpointing_enable()
        assert docvqa_step.flops(trainer, collator(rows)) == counted[side]


def test_texts_have_the_stated_lengths():
    tokenizer = docvqa_step.make_processor(docvqa_step.SHAPES["tiny"]).tokenizer
    rows = docvqa_step.make_rows(50, docvqa_step.SHAPES["tiny"], tokenizer, 0)
    count = lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)
    assert all(12 <= count(row["question"]) <= 20 and 2 <= len(row["answers"][0]) <= 14 for row in rows)


def test_real_size_needs_a_gpu():
    with pytest.raises(SystemExit) as stop:
        docvqa_step.main(["--real_size"])
    assert "--real_size needs a CUDA GPU" in stop.value.code


# ---------------------------------------------------------------- dpo_step.py


def tiny_dpo(arch, adapters, *more):
    """main's exit status for a tiny model and one step."""
    return dpo_step.main(["--tiny", "--steps", "1", "--arch", arch, "--adapters", adapters, *more])


def dpo_arguments(**more):
    """Flags, as dpo_step's functions take them."""
    return argparse.Namespace(
        **{"arch": "idefics2", "adapters": "all", "steps": 1, "batch_size": 1, "seed": 0, "device": "cpu"} | more
    )


@pytest.mark.parametrize("adapters", ["language", "all"])
@pytest.mark.parametrize("arch", ["idefics2", "llava"])
def test_dpo_reports_costs_and_equality(tmp_path, capsys, arch, adapters):
    assert (
        tiny_dpo(arch, adapters, "--batch_size", "2", "--checkpointing", "both", "--json", str(tmp_path / "step.json"))
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        printed.count(": equal") == 2
        and "NOT EQUAL" not in printed
        and "MISSED" not in printed
        and dpo_step.SMALL in printed
    )
    found = json.loads((tmp_path / "step.json").read_text())["settings"]
    assert [setting["checkpointing"] for setting in found] == [True, False]
    for setting in found:
        assert setting["equal"] and setting["check"]["gradient_max"] < 1e-5
        for what in ("flops", "peak_bytes"):  # times of one tiny step say nothing
            assert setting[what]["stock"] > setting[what]["recipe"] > 0
        parts = setting["flops_by_part"]
        seen = {side: parts[side]["all"] - parts[side]["language"] for side in ("stock", "recipe")}
        if adapters == "language":
            assert seen["recipe"] == parts["image"]  # once, forward, for policy and reference
        assert seen["stock"] > 1.9 * seen["recipe"]
    assert found[0]["flops"]["stock"] > found[1]["flops"]["stock"]  # recomputation is counted


def restarting_nowhere(forward, position_ids, **more):
    return forward(position_ids=torch.arange(position_ids.shape[1]).expand_as(position_ids), **more)


def seeing_each_other(forward, attention_mask, **more):
    return forward(attention_mask=torch.ones_like(attention_mask).tril(), **more)


def loss_alone(forward, **more):
    output = forward(**more)
    output.log_probs = output.log_probs * (1 + 1e-4)
    return output


@pytest.mark.parametrize("wrong", [restarting_nowhere, seeing_each_other, loss_alone])
def test_dpo_exit_status_1_where_they_differ(monkeypatch, capsys, wrong):
    right = dpo_idefics2.SharedPromptDPOTrainer.forward_pairs
    broken = lambda self, forward, **more: right(self, lambda **inputs: wrong(forward, **inputs), **more)
    monkeypatch.setattr(dpo_idefics2.SharedPromptDPOTrainer, "forward_pairs", broken)
    assert tiny_dpo("idefics2", "language") == 1
    printed = capsys.readouterr().out
    assert "NOT EQUAL" in printed and "error: the recipe's loss, log-probabilities or gradients" in printed
    assert "speed-up" not in printed and "FLOPs" not in printed


@pytest.mark.parametrize("what", ["log_probabilities", "gradient_max", "gradient_norm"])
def test_dpo_nan_is_not_equal(what):
    same = {"loss": {"stock": 1.0, "recipe": 1.0}, "log_probabilities": 0.0, "gradient_max": 0.0, "gradient_norm": 0.0}
    assert (
        dpo_step.equal(same)
        and not dpo_step.equal(same | {what: float("nan")})
        and not dpo_step.equal(same | {what: 2e-5})
    )


@pytest.mark.parametrize("arch", ["idefics2", "llava"])
def test_dpo_weights_without_storage_cost_as_many_flops(tmp_path, arch):
    args = dpo_arguments(arch=arch)
    with dpo_step.label_positions_only():
        counted = dpo_step.counted_sides(args, True, tmp_path, "tiny", spread=1)
        both, batches = dpo_step.measured_sides(args, True, tmp_path, "tiny")
        for side, trainer in both.items():
            assert dpo_step.flops_by_part(trainer, batches[0]) == counted[side]
        assert dpo_step.flops_of_image(both["stock"], batches[0]) == counted["image"]


def test_dpo_stock_side_scores_label_positions_only(tmp_path):
    both, batches = dpo_step.measured_sides(dpo_arguments(), True, tmp_path, "tiny")
    everywhere = dpo_step.flops(both["stock"], batches[0]), dpo_step.step(both["stock"], batches[0]).item()
    both["stock"].model.zero_grad()
    with dpo_step.label_positions_only():
        assert dpo_step.flops(both["stock"], batches[0]) < everywhere[0]
        assert dpo_step.step(both["stock"], batches[0]).item() == pytest.approx(everywhere[1], abs=1e-6)


def test_dpo_exit_status_1_where_a_threshold_is_missed(monkeypatch, capsys):
    monkeypatch.setitem(dpo_step.SIZES["llava"], "scaled", dpo_step.SIZES["llava"]["tiny"])
    monkeypatch.setitem(dpo_step.THRESHOLDS, ("llava", "language"), {"time": 0.01, "FLOPs": 100})
    flags = ["--arch", "llava", "--adapters", "language", "--steps", "1"]
    assert dpo_step.main(flags) == 1
    printed = capsys.readouterr().out
    assert (
        "time at least 0.01x: holds" in printed
        and "FLOPs at least 100x: MISSED" in printed
        and "error: FLOPs below" in printed
    )
    assert dpo_step.main([*flags, "--report_only"]) == 0
    assert dpo_step.main([*flags, "--checkpointing", "off"]) == 0  # thresholds are for steps with it


@pytest.mark.parametrize("arch, parameters", [("idefics2", 8_402_768_112), ("llava", 7_063_427_072)])
def test_dpo_real_size_is_the_published_one(arch, parameters):
    sizes = dpo_step.shape(arch, "real")
    config = dpo_step.configuration(arch, sizes, dpo_step.make_processor(arch, sizes).tokenizer)
    model = dpo_step.make_model(config, sizes, "meta", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("arch", ["idefics2", "llava"])
def test_dpo_scaled_model_keeps_the_proportions(arch):
    real, scaled = (dpo_step.shape(arch, size) for size in ("real", "scaled"))
    for part in ("vision", "text"):
        width = real[part][0] / scaled[part][0]
        assert width == pytest.approx(real[part][1] / scaled[part][1], rel=0.01)  # the MLP's
        assert real[part][0] / real[part][3] == scaled[part][0] / scaled[part][3]  # a head's
    assert (real["side"] / scaled["side"]) ** 2 == pytest.approx(real["tokens"] / scaled["tokens"]) == 4
    layers = [shape["vision"][2] / shape["text"][2] for shape in (real, scaled)]
    assert layers[0] == pytest.approx(layers[1], rel=0.02)


@pytest.mark.parametrize("arch", ["idefics2", "llava"])
@pytest.mark.parametrize("size, by", [("real", 1), ("scaled", 4)])
def test_dpo_texts_have_the_stated_lengths(tmp_path, arch, size, by):
    *_, collator, rows, sizes, _ = dpo_step.prepare(
        dpo_arguments(arch=arch, steps=8), True, tmp_path, size, side=(56, 56)
    )
    for row in rows:
        batch = collator([row])
        answers = batch["completion_mask"].sum(1)
        images = (batch["input_ids"][0] == collator.processor.image_token_id).sum()
        prompt = batch["attention_mask"].sum(1) - answers - images
        assert images == sizes["tokens"]
        assert 36 // by <= prompt[0] <= 44 // by + 3 and prompt[0] == prompt[1]
        assert all(80 // by <= answer <= 100 // by + 3 for answer in answers)


def test_dpo_needs_the_gpu_it_was_asked_for():
    with pytest.raises(SystemExit) as stop:
        dpo_step.main(["--device", "cuda"])
    assert "no GPU found" in stop.value.code


@pytest.mark.parametrize("argv, message", [(["--seed", "-1"], "--seed: from 0"), (["--json", "nowhere/x.json"], "--json nowhere/x.json cannot be written"),
                                           (["--steps", "0"], "at least 1")])  # fmt: skip
def test_docvqas_mistakes_get_one_message(argv, message):
    with pytest.raises(SystemExit) as e:
        docvqa_step.main(argv)
    assert message in e.value.code


ENDED = """
import os, signal, sys, tempfile
sys.path.insert(0, "benchmarks")
import measure

def main():
    with tempfile.TemporaryDirectory() as folder:
        print(folder, flush=True)
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        signal.pause()

measure.start(main)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_benchmark_that_is_ended_leaves_nothing(name):
    done = subprocess.run([sys.executable, "-c", ENDED, name], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.endswith("interrupted\n") and "Traceback" not in done.stderr
    assert not Path(done.stdout.strip().splitlines()[-1]).exists()
