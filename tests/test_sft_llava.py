"""What only sft_llava.py has: LLaVA's template with an EOS, images by index, LLaVA-NeXT, a layer not run twice."""

import math

import pytest
import torch
import transformers
from conftest import chat, log
from peft import PeftModel
from recipes import Recipe
from runs import stir
from transformers import AutoProcessor
from trl import SFTTrainer

import sft_llava


@pytest.fixture
def sft(tiny_llava, tmp_path):
    return Recipe("sft_llava", tiny_llava, tmp_path)


def test_the_saved_template_ends_answers_with_eos_where_the_public_one_does_not(sft):
    turns = [{"role": role, "content": [{"type": "text", "text": role}]} for role in ("user", "assistant", "user")]
    public, ours = AutoProcessor.from_pretrained(sft.folder / "model"), sft.collator().processor
    assert public.apply_chat_template(turns) == "USER: user ASSISTANT: assistant USER: user "
    assert ours.apply_chat_template(turns) == "USER: user ASSISTANT: assistant</s> USER: user "
    as_strings = [{"role": turn["role"], "content": turn["role"]} for turn in turns]
    assert ours.apply_chat_template(as_strings) == ours.apply_chat_template(turns)


def test_a_template_that_ends_answers_is_left_alone(tiny_next, tmp_path):
    ours = Recipe("sft_llava", tiny_next, tmp_path).collator().processor
    assert ours.chat_template == AutoProcessor.from_pretrained(tiny_next / "model").chat_template


def test_images_may_be_named_by_their_index(sft, images):
    names, question = images(3), {"type": "text", "text": "Which?"}
    first, second, third = ({"type": "image", "index": n} for n in range(3))
    for content, colours in (([third, first, second, question], "brg"), ([question, first, third, second], "rbg")):
        batch = sft.collator()([chat(("user", content), ("assistant", "six"), images=names)])
        assert "".join("rgb"[image[:, 28, 28].argmax()] for image in batch["pixel_values"]) == colours


class Stop(Exception):
    pass


def in_training(sft, monkeypatch, **settings):
    """A Trainer as it is when its first step begins, with an adapter that has an effect."""

    def stop(*args, **kwargs):
        raise Stop

    trainer = sft.trainer(**settings)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(SFTTrainer, "training_step", stop)
        trainer.train()
    stir(trainer.model)
    return trainer


def count_products(model, monkeypatch):
    """A list that grows with every finished product of a base layer down_proj, and how many such layers there are."""
    layers = [layer.base_layer for name, layer in model.named_modules() if name.endswith(".down_proj")]
    linear, finished = type(layers[0]), []
    product = linear.forward

    def spy(self, x):
        y = product(self, x)  # does not come back where recomputation stops
        if any(self is layer for layer in layers):
            finished.append(self)
        return y

    monkeypatch.setattr(linear, "forward", spy)
    return finished, len(layers)


KINDS = {  # settings, how often a layer's last product is computed in a step
    "4-bit": ({}, 1),
    "float": ({"load_in_4bit": False}, 1),
    "bf16": ({"bf16": True}, 1),
    "DoRA": ({"use_dora": True}, 2),
}


@pytest.mark.parametrize("settings, times", KINDS.values(), ids=KINDS)
def test_a_layers_last_product_is_not_recomputed(sft, monkeypatch, settings, times):
    """To the bit what PEFT's own order of the sum gives, with the adapter switched off, too."""
    found, counted = {}, {}
    for kind in ("ours", "stock"):
        with monkeypatch.context() as patch:
            if kind == "stock":
                patch.setattr(sft_llava, "adapter_first", lambda layer, x: type(layer).forward(layer, x))
            trainer = in_training(sft, monkeypatch, activation_checkpointing=True, **settings)
            model = trainer.model.train()
            rows = sorted(trainer.train_dataset, key=lambda row: len(row["images"]))[:8]
            assert {len(row["images"]) for row in rows} == {0, 1}
            batch = trainer.data_collator(rows)
            finished, layers = count_products(model, patch)
            transformers.set_seed(0)  # dropout's masks
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(model, dict(batch))
            loss.backward()
            counted[kind] = len(finished) / layers
            found[kind] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            found[kind]["loss"] = loss.detach()
            with torch.no_grad(), model.eval().disable_adapter():
                found[kind]["base"] = model(**{key: some for key, some in batch.items() if key != "labels"}).logits
    assert counted == {"ours": times, "stock": 2}
    for name, value in found["stock"].items():
        assert value.abs().max() > 0 and torch.equal(value, found["ours"][name]), name


@pytest.mark.parametrize(
    "settings", [{}, {"load_in_4bit": False, "train_projector": True}], ids=["4-bit", "projector"]
)
def test_llava_next(tiny_llava, tiny_next, tmp_path, settings):
    """It trains, its result is loaded into the same model, and that answers."""
    case = Recipe("sft_llava", tiny_next, tmp_path)
    few = {
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "gradient_accumulation_steps": 1,
        "sample_rows": 0,
    }
    few |= {"dataset_name": tiny_llava / "data", "max_eval_rows": 4}
    trainer = case.trainer(train=True, **few, **settings)
    losses = log(tmp_path / "out")
    assert list(losses) == [1, 2] and all(map(math.isfinite, losses.values()))
    batch = trainer.data_collator([trainer.eval_dataset[n] for n in range(4)])
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "trained_at", "targets")}
    assert "image_sizes" in inputs

    base = sft_llava.load_model(*case.parse(**few, **settings)).eval()
    with torch.no_grad():
        untrained, trained = (model(**inputs).logits for model in (base, trainer.model.eval()))
        model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
        reloaded = model(**inputs).logits
    torch.testing.assert_close(reloaded, trained, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(trained, untrained, atol=1e-3)
    ids = model.generate(**inputs, min_new_tokens=3, max_new_tokens=3, do_sample=False)
    assert ids.shape == (4, inputs["input_ids"].shape[1] + 3)
