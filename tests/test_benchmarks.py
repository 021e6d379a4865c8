"""benchmarks/docvqa_step.py: what it reports, and that its check can fail."""

import argparse
import json
import sys

import pytest
from conftest import ROOT

import idefics2_docvqa

sys.path.insert(0, str(ROOT / "benchmarks"))
import docvqa_step  # noqa: E402


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(docvqa_step.torch.cuda, "is_available", lambda: False)  # as all other tests run


def test_reports_costs_and_equality_of_both_settings(tmp_path, capsys):
    assert docvqa_step.main(["--tiny", "--steps", "1", "--json", str(tmp_path / "step.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": equal") == 2 and "NOT EQUAL" not in printed
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
    assert not docvqa_step.equal({"loss": {"stock": 1.0, "recipe": 1.0}, "gradient_max": float("nan"), "gradient_norm": 0.0})


def test_weights_without_storage_cost_as_many_flops(tmp_path):
    shape, args = docvqa_step.SHAPES["tiny"], argparse.Namespace(batch_size=2, seed=0)
    settings, training = docvqa_step.prepare(args, True, tmp_path)
    processor = docvqa_step.make_processor(shape)
    processor.image_processor.do_image_splitting = False
    collator = idefics2_docvqa.Collator(processor, settings, training)
    rows = docvqa_step.make_rows(2, shape, processor.tokenizer, 0)
    counted, shares = docvqa_step.flops_without_storage(shape, collator, rows, settings, training)
    assert sum(shares.values()) == pytest.approx(1)
    model = docvqa_step.adapted(docvqa_step.configuration(shape, processor.image_token_id), settings, training.device, None)
    for side, trainer in docvqa_step.trainers(model, collator, rows, settings, training).items():
        trainer.model.activation_checkpointing_enable()
        assert docvqa_step.flops(trainer, collator(rows)) == counted[side]


def test_texts_have_the_stated_lengths():
    tokenizer = docvqa_step.make_processor(docvqa_step.SHAPES["tiny"]).tokenizer
    rows = docvqa_step.make_rows(50, docvqa_step.SHAPES["tiny"], tokenizer, 0)
    count = lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)
    assert all(12 <= count(row["question"]) <= 20 and 2 <= len(row["answers"][0]) <= 14 for row in rows)


def test_real_size_needs_a_gpu(capsys):
    with pytest.raises(SystemExit) as stop:
        docvqa_step.main(["--real_size"])
    assert stop.value.code == 2 and "--real_size needs a CUDA GPU" in capsys.readouterr().err
