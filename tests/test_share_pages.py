"""idefics2_docvqa.py --share_pages: questions about one page as one sequence, with the losses and gradients of the same
rows apart, and the order of rows that brings them into one batch."""

import contextlib
import io
import json
import random
import re
import shutil
import time
from collections import Counter

import pytest
import torch
import transformers
import yaml
from conftest import asks, log
from PIL import Image
from recipes import Loaded, Recipe, no_weights, same
from runs import run, stir
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import idefics2_docvqa
from idefics2_docvqa import RowsOfAnImageTogether, join_rows_by_image, one_sequence

WORDS = "what is the total on this form which city room page seat score weight month number of it".split()
QUESTIONS = [1, 5, 3, 2, 4]  # of each page
FLOAT = {"load_in_4bit": False, "lora_dropout": 0, "eval_strategy": "no", "save_strategy": "no", "logging_steps": 1}


# ------------------------------------------------------------------------------------------------- what the tests use
def make_rows(counts, seed=0):
    """So many questions about each of some pages, with answers, of very different lengths; pages are shuffled."""
    dice = random.Random(seed)
    rows = []
    for page, count in enumerate(counts):
        for n in range(count):
            question = " ".join(dice.choices(WORDS, k=dice.randint(1, 9))) + "?"
            answer = " ".join(dice.choices(WORDS, k=dice.randint(1, 6)))
            rows.append(asks(question, answer, f"{answer} {n}", image=f"page-{page}.png", id=f"{page}-{n}"))
    dice.shuffle(rows)
    return rows


def write_data(folder, counts=QUESTIONS, seed=0):
    """Write rows.json, and their pages of noise."""
    dice = random.Random(seed)
    for page in range(len(counts)):
        width, height = dice.choice([(112, 56), (56, 112), (84, 84)])
        picture = Image.frombytes("RGB", (width, height), dice.randbytes(width * height * 3))
        picture.save(folder / f"page-{page}.png")
    (folder / "rows.json").write_text(json.dumps(make_rows(counts, seed)))
    return folder / "rows.json"


@pytest.fixture
def docvqa(tiny_forms, tmp_path):
    return Recipe("idefics2_docvqa", tiny_forms, tmp_path)


@pytest.fixture
def flags(docvqa, tmp_path):
    """Settings of a run on the pages above, without evaluation."""
    return {"dataset_name": write_data(tmp_path), "image_folder": tmp_path, "eval_fraction": 0, **FLOAT}


def made(docvqa, flags, **settings):
    """The trainer of a run before its first step; its adapters are not those that do nothing."""
    trainer = docvqa.trainer(**{**flags, **settings})
    docvqa.module.make_safe(trainer)
    stir(trainer.model)
    return trainer


def rows_of(trainer):
    """The training rows as a loader gives them, those of a page together."""
    rows = list(trainer.train_dataset)
    return sorted(rows, key=lambda row: row["id"])


def batch_of(trainer, rows, share):
    trainer.data_collator.share_pages = share
    try:
        return trainer.data_collator(rows)
    finally:
        trainer.data_collator.share_pages = True


def step(trainer, batches):
    """A step of these batches -> (its loss, {name: gradient})."""
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = len(batches)
    batches, count = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    loss = sum(trainer.training_step(trainer.model, batch, count) for batch in batches)
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same_step(got, want, tolerance=1e-5):
    """Loss and every gradient agree, relative to the size of each."""
    assert abs(got[0] - want[0]) <= tolerance * abs(want[0])
    assert got[1].keys() == want[1].keys() and len(got[1]) > 10
    largest = max(gradient.norm() for gradient in want[1].values())
    for name, gradient in want[1].items():
        size = max(gradient.norm(), 1e-4 * largest)
        assert (got[1][name] - gradient).norm() <= tolerance * size, name


class Watch:
    """How many pages go through the vision tower, and the shapes of what goes into the language model."""

    def __init__(self, trainer):
        inner = trainer.model.get_base_model().model
        self.pages, self.sequences = [], []
        self.hooks = [
            inner.vision_model.embeddings.register_forward_pre_hook(self.note_pages, with_kwargs=True),
            inner.text_model.register_forward_pre_hook(self.note_sequences, with_kwargs=True),
        ]

    def note_pages(self, module, args, kwargs):
        self.pages.append(len((*args, *kwargs.values())[0]))

    def note_sequences(self, module, args, kwargs):
        self.sequences.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


# --------------------------------------------------------------------------------------------------- the same numbers
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("splitting", [False, True])
def test_a_step_is_that_of_the_same_rows_apart(docvqa, flags, splitting, checkpointing):
    """Against the recipe without sharing, and against transformers' Trainer on one row at a time."""
    trainer = made(docvqa, flags, image_splitting=splitting, activation_checkpointing=checkpointing)
    assert trainer.data_collator.share_pages
    rows = rows_of(trainer)
    ways = {
        "shared": [batch_of(trainer, rows[:9], True), batch_of(trainer, rows[9:], True)],
        "apart": [batch_of(trainer, rows[:9], False), batch_of(trainer, rows[9:], False)],
    }
    assert [len(batch["input_ids"]) for batch in ways["shared"]] == [3, 2] and "parts" in ways["shared"][0]
    assert ways["shared"][0]["targets"].sort().values.equal(ways["apart"][0]["targets"].sort().values)
    shared, apart = step(trainer, ways["shared"]), step(trainer, ways["apart"])
    assert_same_step(shared, apart)

    stock = transformers.Trainer(trainer.model, trainer.args, data_collator=trainer.data_collator)
    stock.model_accepts_loss_kwargs = True
    inputs = [batch_of(trainer, [row], False) for row in rows]
    plain = [{name: batch[name] for name in batch if name not in ("trained_at", "targets")} for batch in inputs]
    assert_same_step(shared, step(stock, plain))
    assert any("perceiver" in name for name in shared[1]) and any("lm_head" in name for name in shared[1])


def test_in_float64_nothing_is_left_of_the_difference(docvqa, flags):
    trainer = made(docvqa, flags)
    trainer.model.double()
    rows = rows_of(trainer)[:9]
    steps = []
    for share in (True, False):
        batch = batch_of(trainer, rows, share)
        batch["pixel_values"] = batch["pixel_values"].double()
        with pytest.MonkeyPatch.context() as patch:  # the losses too; norms round to float32
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            steps.append(step(trainer, [batch]))
    assert_same_step(*steps, tolerance=1e-6)
