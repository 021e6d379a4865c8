"""benchmarks/sft_step.py: what it reports, and that its checks can fail."""

import argparse
import json
import sys

import pytest
from conftest import ROOT

import finetune_minicpm_lora
import sft_llava

sys.path.insert(0, str(ROOT / "benchmarks"))
import dpo_step  # noqa: E402
import sft_step  # noqa: E402

torch = sft_step.torch
recipes = pytest.mark.parametrize("recipe", ["sft_llava", "finetune_minicpm_lora"])


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as all other tests run


def tiny(recipe, *more):
    """main's exit status for a tiny model and one step."""
    return sft_step.main(["--tiny", "--steps", "1", "--recipe", recipe, *more])


def arguments(recipe, **more):
    """Flags, as sft_step's functions take them."""
    return argparse.Namespace(**{"recipe": recipe, "steps": 1, "batch_size": 1, "seed": 0, "device": "cpu"} | more)


@recipes
def test_reports_costs_and_equality(tmp_path, capsys, recipe):
    assert tiny(recipe, "--batch_size", "2", "--checkpointing", "both", "--json", str(tmp_path / "step.json")) == 0
    printed = capsys.readouterr().out
    assert printed.count(": equal") == printed.count("at equal settings") == 2
    assert "NOT EQUAL" not in printed and "MISSED" not in printed and sft_step.SMALL in printed
    found = json.loads((tmp_path / "step.json").read_text())["settings"]
    assert [setting["checkpointing"] for setting in found] == [True, False]
    for setting in found:
        assert setting["equal"] and setting["check"]["gradient_max"] < 1e-5
        assert setting["check"]["adapters"] == (
            2 * 7 * 2 if recipe == "sft_llava" else 2 * (3 + 4 + 2 * 3) + 4 + 2 + 2 * 2
        )
        saved = setting["flops"]["stock"] - setting["flops"]["recipe"]
        assert (
            saved > 0 or recipe == "sft_llava" and not setting["checkpointing"] and saved == 0
        )  # times of one tiny step say nothing
        assert setting["peak_bytes"]["stock"] >= setting["peak_bytes"]["recipe"] > 0
        assert ("defaults" in setting) == (recipe == "sft_llava" and setting["checkpointing"])
    assert found[0]["flops"]["stock"] > found[1]["flops"]["stock"]  # recomputation is counted
    if recipe == "sft_llava":
        assert (
            printed.count("losses differ by design") == 1
            and "label positions a row: image 0.0%, prompt 0.0%, answer 100.0%" in printed
        )
        assert found[0]["defaults"]["flops"]["stock"] > found[0]["flops"]["stock"]  # more positions are scored
        assert found[0]["defaults"]["flops"]["recipe"] == found[0]["flops"]["recipe"]


def test_what_trl_trains_by_default(tmp_path):
    """Every position: all of an image's placeholders, prompt and answer. The recipe: the answer and its EOS, which TRL's lacks."""
    args = arguments("sft_llava", steps=3)
    with sft_step.label_positions_only():
        _, batches, (trainer, own, trained) = sft_step.measured_sides(args, True, tmp_path, "tiny")
    sizes = sft_step.shape("sft_llava", "tiny")
    assert all((batch["labels"] == batch["input_ids"]).all() for batch in own)
    assert sum(trained["stock"].values()) == sum(batch["labels"].numel() for batch in own)
    assert trained["stock"]["image"] == 3 * sizes["tokens"] and trained["stock"]["prompt"] > 0
    assert trained["recipe"]["image"] == trained["recipe"]["prompt"] == 0
    assert trained["recipe"]["answer"] == sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert trained["recipe"]["answer"] == trained["stock"]["answer"] + 3 * 1
    assert (
        trainer.args.activation_checkpointing
        and type(trainer.data_collator).__name__ == "DataCollatorForVisionLanguageModeling"
    )


def scaled_loss(patch):
    right = sft_llava.Trainer.compute_loss
    patch.setattr(sft_llava.Trainer, "compute_loss", lambda *args, **more: right(*args, **more) * 1.0001)


def gradient_alone(patch):
    right = sft_llava.Trainer.compute_loss
    wrong = lambda loss: loss + 1e-4 * (loss - loss.detach())
    patch.setattr(sft_llava.Trainer, "compute_loss", lambda *args, **more: wrong(right(*args, **more)))


def adapter_scaled(patch):
    right = sft_llava.adapter_first
    patch.setattr(sft_llava, "adapter_first", lambda layer, x: right(layer, x) * 1.001)


def other_positions(patch):
    """The logits of the labels' own positions, not of those before them."""
    right = torch.nn.functional.pad
    shifted = lambda values, by, *args, **more: right(values, (1, 0) if by == (0, 1) else by, *args, **more)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(torch.nn.functional, "pad", shifted)
            return mine(self, model, inputs, return_outputs, num_items_in_batch)

    mine = finetune_minicpm_lora.Trainer.compute_loss
    patch.setattr(finetune_minicpm_lora.Trainer, "compute_loss", compute_loss)


def each_batch_by_itself(patch):
    mine = finetune_minicpm_lora.Trainer.compute_loss
    halved = lambda *args, num_items_in_batch, **more: mine(*args, num_items_in_batch=num_items_in_batch + 1, **more)
    patch.setattr(finetune_minicpm_lora.Trainer, "compute_loss", halved)


@pytest.mark.parametrize(
    "recipe, wrong",
    [
        ("sft_llava", scaled_loss),
        ("sft_llava", gradient_alone),
        ("sft_llava", adapter_scaled),
        ("finetune_minicpm_lora", other_positions),
        ("finetune_minicpm_lora", each_batch_by_itself),
    ],
)
def test_exit_status_1_where_they_differ(monkeypatch, capsys, recipe, wrong):
    wrong(monkeypatch)
    assert tiny(recipe) == 1
    printed = capsys.readouterr().out
    assert "NOT EQUAL" in printed and "error: the recipe's loss or gradients are not" in printed
    assert "FLOPs" not in printed and "x  " not in printed


@pytest.mark.parametrize("what", ["gradient_max", "gradient_norm"])
def test_nan_is_not_equal(what):
    same = {"loss": {"stock": 2.0, "recipe": 2.0}, "gradient_max": 0.0, "gradient_norm": 0.0}
    assert (
        sft_step.equal(same)
        and not sft_step.equal(same | {what: float("nan")})
        and not sft_step.equal(same | {what: 2e-5})
    )
    assert not sft_step.equal(same | {"loss": {"stock": 2.0, "recipe": 2.00003}})
    assert not sft_step.equal(same | {"loss": {"stock": 2.0, "recipe": float("nan")}})


@recipes
@pytest.mark.parametrize("checkpointing", [True, False])
def test_weights_without_storage_cost_as_many_flops(tmp_path, recipe, checkpointing):
    args = arguments(recipe)
    with sft_step.label_positions_only():
        counted = sft_step.counted_sides(args, checkpointing, tmp_path, "tiny", spread=1)
        both, batches, _ = sft_step.measured_sides(args, checkpointing, tmp_path, "tiny")
        for side, trainer in both.items():
            assert sft_step.flops(trainer, batches[0]) == counted[side]
        assert sft_step.flops_of_image(both["stock"], batches[0]) == counted["image"]


def test_sft_llava_recomputes_neither_tower_nor_last_product(tmp_path, monkeypatch):
    """What checkpointing costs the stock side more is the tower again, its backward pass and each layer's last product."""
    found, sizes = {}, sft_step.shape("sft_llava", "tiny")
    with sft_step.label_positions_only():
        for name in ("recipe", "without"):
            both, batches, _ = sft_step.measured_sides(arguments("sft_llava"), True, tmp_path, "tiny")
            found[name] = sft_step.flops(both["recipe"], batches[0])
            monkeypatch.setattr(sft_llava, "adapter_first", lambda layer, x: type(layer).forward(layer, x))
        hidden, inner, layers, *_ = sizes["text"]
        saved = (
            2 * batches[0]["input_ids"].numel() * hidden * (inner - 1) * layers
        )  # 1: the rank; lora_B comes before it now
        assert found["without"] - found["recipe"] == saved
        tower = sft_step.flops(both["stock"], batches[0]) - found["without"]
        assert tower > 0.9 * sft_step.flops_of_image(both["stock"], batches[0])


def test_stock_side_scores_label_positions_only(tmp_path):
    both, batches, _ = sft_step.measured_sides(arguments("sft_llava"), False, tmp_path, "tiny")
    everywhere = sft_step.flops(both["stock"], batches[0])
    with sft_step.label_positions_only():
        less = everywhere - sft_step.flops(both["stock"], batches[0])
    labels = batches[0]["labels"]
    sizes = sft_step.shape("sft_llava", "tiny")
    each = (
        2 * sizes["text"][0] * sizes["vocabulary"]
    )  # of one position: its logits, and twice that at most for their gradients
    assert each <= less / (labels.numel() - int((labels != -100).sum())) <= 3 * each


@recipes
def test_exit_status_1_where_a_threshold_is_missed(monkeypatch, capsys, recipe):
    monkeypatch.setitem(dpo_step.SIZES["llava"], "scaled", dpo_step.SIZES["llava"]["tiny"])
    monkeypatch.setitem(sft_step.SIZES, "scaled", sft_step.SIZES["tiny"])
    monkeypatch.setitem(sft_step.THRESHOLDS, recipe, {"time": 0.01, "FLOPs": 100})
    flags = ["--recipe", recipe, "--steps", "1"]
    assert sft_step.main(flags) == 1
    printed = capsys.readouterr().out
    assert "time at least 0.01x at equal settings: holds" in printed
    assert "FLOPs at least 100x at equal settings: MISSED" in printed and "error: FLOPs below" in printed
    assert sft_step.main([*flags, "--report_only"]) == 0
    assert sft_step.main([*flags, "--checkpointing", "off"]) == 0  # thresholds are for steps with it


@recipes
def test_real_size_is_counted_and_not_timed(monkeypatch, tmp_path, capsys, recipe):
    monkeypatch.setitem(dpo_step.SIZES["llava"], "real", dpo_step.SIZES["llava"]["tiny"])
    monkeypatch.setitem(sft_step.SIZES, "real", sft_step.SIZES["tiny"])
    monkeypatch.setitem(sft_step.PICTURES, recipe, sft_step.PICTURES[recipe][-1:])
    flags = ["--recipe", recipe, "--real_size", "--checkpointing", "both", "--json", str(tmp_path / "step.json")]
    assert sft_step.main(flags) == 0
    printed = capsys.readouterr().out
    assert "time " not in printed.split("\n", 1)[1] and "same?" not in printed
    found = json.loads((tmp_path / "step.json").read_text())["settings"]
    for setting in found:
        assert list(setting["counted"]) == [f"{width}x{height}" for width, height in sft_step.PICTURES[recipe]]
        assert all(counts["stock"] >= counts["recipe"] > counts["image"] > 0 for counts in setting["counted"].values())


def test_minicpm_real_size_is_the_published_one():
    sizes = sft_step.shape("finetune_minicpm_lora", "real")
    config = sft_step.configuration(
        "finetune_minicpm_lora", sizes, sft_step.make_processor("finetune_minicpm_lora", sizes).tokenizer
    )
    model = sft_step.make_model(config, sizes, "meta", torch.bfloat16)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == 1.3  # as its model card rounds it
    assert config.text_config.layer_types == (["linear_attention"] * 3 + ["full_attention"]) * 6


def test_minicpm_scaled_model_keeps_the_proportions():
    real, scaled = (sft_step.shape("finetune_minicpm_lora", size) for size in ("real", "scaled"))
    for part in ("vision", "text"):
        assert real[part][0] / scaled[part][0] == pytest.approx(real[part][1] / scaled[part][1], rel=0.01) == 4
    assert real["vision"][0] / real["vision"][3] == scaled["vision"][0] / scaled["vision"][3]  # a head's
    assert (real["side"] / scaled["side"]) ** 2 == 4
    before = lambda sizes, inserted: (1 + inserted + (sizes["vision"][2] - 1 - inserted) / 4) / sizes["text"][2]
    merging = 0.35  # of a layer: the merger's own attention, which every size has once
    assert before(real, 6) + merging / 24 == pytest.approx(before(scaled, 0) + merging / 4, rel=0.03)


@recipes
@pytest.mark.parametrize("size, by", [("real", 1), ("scaled", 4)])
def test_texts_have_the_stated_lengths(tmp_path, recipe, size, by):
    *_, collator, rows, _, _ = sft_step.prepare(arguments(recipe, steps=6), True, tmp_path, size)
    views = {"sft_llava": 576, "finetune_minicpm_lora": 5 * 64}[recipe] // by
    image = collator.processor.image_token_id
    marks = (
        0 if recipe == "sft_llava" else 2 * 5 + 3 + 2
    )  # <image>, <slice> and their ends, the image's number, line ends
    for row in rows:
        batch = collator([row])
        answer, images = int((batch["labels"] != -100).sum()), int((batch["input_ids"] == image).sum())
        prompt = batch["input_ids"].numel() - answer - images - marks
        assert images == views
        assert 36 // by <= prompt <= 44 // by + (3 if recipe == "sft_llava" else 6)  # what the template alone takes
        assert 16 // by <= answer - 1 <= 24 // by


def test_needs_the_gpu_it_was_asked_for():
    with pytest.raises(SystemExit) as stop:
        sft_step.main(["--device", "cuda"])
    assert "no GPU found" in stop.value.code


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seed", "-1"], "--seed: from 0"),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json cannot be written"),
        (["--steps", "0"], "at least 1"),
    ],
)
def test_mistakes_are_said_before_anything_is_measured(flags, message, monkeypatch):
    monkeypatch.setattr(sft_step, "measure", None)
    with pytest.raises(SystemExit) as stop:
        sft_step.main(["--tiny", *flags])
    assert message in stop.value.code
