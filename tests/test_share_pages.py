"""idefics2_docvqa.py --share_pages: questions about one page are one sequence. Losses and gradients are those of the
rows apart; an order of rows brings them into one batch."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
import transformers
import yaml
from conftest import ROOT, asks, log
from PIL import Image
from recipes import Recipe, same
from runs import run, stir
from test_processes import in_two_processes
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import idefics2_docvqa
from idefics2_docvqa import RowsOfAnImageTogether, epoch_generator

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
    for module in trainer.model.modules():
        if type(module) is torch.nn.Linear and not module.weight.requires_grad:
            module.weight.data *= 3  # as large as its width asks for, so that what is said depends on the page
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


def test_a_question_that_is_asked_twice_is_trained_twice(docvqa, flags, tmp_path):
    """With the same answer, and with one that begins alike: each predicts all of its own answer."""
    row = asks("What is the total?", "seven hundred", image="page-0.png")
    rows = [row, row, row | {"answers": ["seven"]}, row | {"answers": ["seven hundred and one"]}]
    trainer = made(docvqa, flags)
    shared, apart = (batch_of(trainer, rows, share) for share in (True, False))
    assert len(shared["input_ids"]) == 1 and len(shared["targets"]) == len(apart["targets"])
    assert_same_step(step(trainer, [shared]), step(trainer, [apart]))


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


def adapters_in_the_tower(patch):
    """As the recipe says it: LoRA in the vision tower, too, which then has a graph."""
    patch.setattr(idefics2_docvqa, "UNTRAINABLE", {})
    patch.setattr(
        idefics2_docvqa, "LORA_TARGETS", idefics2_docvqa.LORA_TARGETS + r"|model\.vision_model.*(q_proj|fc1)"
    )
    patch.setattr(idefics2_docvqa, "FrozenWithoutGraph", lambda *args: transformers.TrainerCallback())


@pytest.mark.parametrize("checkpointing", [True, False])
def test_with_adapters_in_the_vision_tower(docvqa, flags, checkpointing, monkeypatch):
    adapters_in_the_tower(monkeypatch)
    trainer = made(docvqa, flags, activation_checkpointing=checkpointing)
    rows = rows_of(trainer)
    shared, apart = (step(trainer, [batch_of(trainer, rows, share)]) for share in (True, False))
    assert_same_step(shared, apart)
    inside = {name: gradient.norm() for name, gradient in shared[1].items() if "vision_model" in name}
    assert len(inside) > 4 and all(size > 0 for size in inside.values())


def test_eager_attention_adds_the_mask(docvqa, flags):
    trainer = made(docvqa, flags)
    rows = rows_of(trainer)
    trainer.model.get_base_model().set_attn_implementation("eager")
    assert trainer.model.config.get_text_config()._attn_implementation == "eager"
    assert_same_step(*(step(trainer, [batch_of(trainer, rows, share)]) for share in (True, False)))


def test_4_bit_and_bf16_round_otherwise_and_no_worse(docvqa, tmp_path, flags):
    """The error against float32, in the mean of 20 batches."""
    flags |= {"dataset_name": write_data(tmp_path, [4] * 20), "load_in_4bit": True}
    exact, rounded = made(docvqa, flags, bf16=False), made(docvqa, flags, bf16=True)
    rows, errors = rows_of(exact), {True: [], False: []}
    for start in range(0, 80, 4):
        some = rows[start : start + 4]
        _, want = step(exact, [batch_of(exact, some, False)])
        for share, found in errors.items():
            with rounded.accelerator.autocast():
                _, got = step(rounded, [batch_of(rounded, some, share)])
            difference = sum(float((got[name] - want[name]).norm() ** 2) for name in want)
            found.append((difference / sum(float(gradient.norm() ** 2) for gradient in want.values())) ** 0.5)
    mean = {share: sum(found) / 20 for share, found in errors.items()}
    assert 0.001 < mean[True] < 1.1 * mean[False]


def losses(trainer, batch):
    """The loss of each trained token of a batch."""
    inputs = trainer._prepare_inputs(dict(batch))
    with torch.no_grad():
        return trainer.compute_loss(trainer.model.eval(), inputs, return_outputs=True)[1].logits


def test_questions_do_not_see_each_other(docvqa, flags):
    """With other words in one, the losses of the others stay the same to the last bit."""
    trainer = made(docvqa, flags)
    [row, *others] = [row for row in rows_of(trainer) if row["image"] == "page-1.png"]
    batch = batch_of(trainer, [*others[:2], row, *others[2:]], True)
    assert batch["parts"].max() == 5 and len(batch["parts"]) == 1
    before = losses(trainer, batch)
    words = batch["parts"][0] == 3
    changed = {**batch, "input_ids": batch["input_ids"].where(~words, batch["input_ids"].flip(1))}
    after = losses(trainer, changed)
    of_part = batch["parts"][0][batch["trained_at"]]
    assert torch.equal(before[of_part != 3], after[of_part != 3]) and not torch.equal(before, after)
    other_page = batch_of(trainer, [row for row in rows_of(trainer) if row["image"] == "page-2.png"], True)
    pixels = {**batch, **{name: other_page[name] for name in ("pixel_values", "pixel_attention_mask")}}
    assert (losses(trainer, pixels) != before).all()  # but they see the page


# -------------------------------------------------------------------------------------------------- what a batch holds
def test_a_sequence_is_the_page_and_then_each_question(docvqa, flags):
    trainer = made(docvqa, flags)
    collator, rows = trainer.data_collator, rows_of(trainer)[1:6]
    rows = [*rows, rows_of(trainer)[0]]
    batch, decode = collator(rows), collator.processor.tokenizer.decode
    assert batch["input_ids"].shape == batch["labels"].shape == batch["parts"].shape == batch["position_ids"].shape
    assert len(batch["input_ids"]) == len(batch["pixel_values"]) == 2
    assert torch.equal(batch["parts"] >= 0, batch["attention_mask"].bool())
    for sequence, some in enumerate((rows[:5], rows[5:])):
        ids, labels, positions, parts = (
            batch[name][sequence] for name in ("input_ids", "labels", "position_ids", "parts")
        )
        images = ids == collator.processor.image_token_id
        assert images.sum() == collator.processor.image_seq_len and (parts[images] == 0).all()
        for n, row in enumerate(some, start=1):
            _, row_ids, row_labels = collator.encode(row)
            own = (parts == 0) | (parts == n)
            assert ids[own].tolist() == row_ids and labels[own].equal(row_labels), decode(ids[own])
            assert positions[own].tolist() == list(range(len(row_ids)))


def test_rows_that_share_nothing_are_the_batch_of_today(docvqa, flags):
    trainer = made(docvqa, flags)
    of_each = [next(row for row in rows_of(trainer) if row["image"] == f"page-{page}.png") for page in range(5)]
    for rows in (of_each, of_each[:1]):
        shared, apart = (batch_of(trainer, rows, share) for share in (True, False))
        assert same(dict(shared), dict(apart)) and "parts" not in shared and "position_ids" not in shared
    assert same(losses(trainer, batch_of(trainer, of_each, True)), losses(trainer, batch_of(trainer, of_each, False)))


def test_rows_from_elsewhere_are_compared_by_their_pages(docvqa, flags, tmp_path):
    """Samples, tests: rows without the column that the check of all rows makes."""
    collator = made(docvqa, flags).data_collator
    collator.share_pages = True
    rows = [asks("What?", "one", image=f"page-{page}.png") for page in (0, 1, 0)]
    assert len(collator(rows)["input_ids"]) == 2
    rows[2]["image"] = Image.open(tmp_path / "page-0.png").convert("RGB")
    assert len(collator(rows)["input_ids"]) == 2


def test_rows_that_show_other_parts_of_a_picture_stay_apart(docvqa, flags, monkeypatch):
    """Where messages_of was edited: each row crops its own."""
    trainer = made(docvqa, flags)
    collator = trainer.data_collator
    messages_of = collator.messages_of

    def cropped(row):
        messages = messages_of(row)
        part = messages[0]["content"][1]
        part["image"] = part["image"].crop((0, 0, 30 + len(row["id"] + row["question"]), 30))
        return messages

    monkeypatch.setattr(collator, "messages_of", cropped)
    rows = rows_of(trainer)[1:6]
    assert len(collator(rows)["input_ids"]) == len({len(row["question"]) for row in rows}) > 1


def test_a_batch_is_never_larger_than_that_of_the_rows_apart(docvqa, flags, tmp_path):
    """Questions about one page beside three pages: with padding it would be, so they take several sequences, or one
    each. So do questions that together are longer than a row may be."""
    collator = made(docvqa, flags).data_collator
    collator.share_pages = True
    long = [asks(f"{n} " * 40, "one", image="page-0.png") for n in range(3)]
    others = [asks("What?", "one", image=f"page-{page}.png") for page in (1, 2, 3)]
    assert len(collator(long)["input_ids"]) == 1
    assert "parts" not in collator(long[:2] + others)
    short = [asks(f"What {n}?", "one", image="page-0.png") for n in range(6)]
    assert 4 < len(collator(short + others)["input_ids"]) < 9
    four = [*long, asks("3 " * 40, "one", image="page-0.png")]
    whole, alone = (collator(rows)["input_ids"].shape[1] for rows in (four, four[:1]))
    for max_length, count in ((whole, 1), (whole - 1, 2), (alone, 4)):
        collator.max_length = max_length
        assert len(collator(four)["input_ids"]) == count
    collator.max_length = 1024
    assert len(collator(long + [asks("Who?", "one", image="page-1.png")])["input_ids"]) == 4


def test_a_page_runs_once_for_its_questions(docvqa, flags, tmp_path):
    """Through vision tower and language model: four questions a page, in training and in an evaluation's loss."""
    flags |= {"dataset_name": write_data(tmp_path, [4, 4])}
    trainer = made(docvqa, flags)
    rows, work, seen = rows_of(trainer), {}, {}
    for share in (True, False):
        batch = batch_of(trainer, rows, share)
        with Watch(trainer) as watch, FlopCounterMode(display=False) as flops:
            step(trainer, [batch])
        work[share], seen[share] = flops.get_total_flops(), watch
    assert seen[True].pages == [2] and seen[False].pages == [8]
    assert seen[True].sequences[0][0] == 2 and seen[False].sequences[0][0] == 8
    assert work[False] > 2 * work[True]


# ----------------------------------------------------------------------------------------------------- whole runs
RUN = {"max_steps": 7, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
RUN |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}
RUN |= {"max_new_tokens": 4, "metric_for_best_model": "loss", "warmup_steps": 0, "per_device_eval_batch_size": 4}


@pytest.fixture
def whole_run(docvqa, flags, tmp_path):
    """A function: folder, settings -> a run of seven steps on 25 rows of nine pages, with evaluations (runs.run)."""
    flags |= {"dataset_name": write_data(tmp_path, [1, 5, 3, 2, 4, 1, 2, 3, 4]), "eval_fraction": 0.2, **RUN}
    return lambda out, **settings: run(idefics2_docvqa, docvqa.flags(**{**flags, "output_dir": out, **settings}))


class SameOrder(RowsOfAnImageTogether):
    """The order with sharing, for a run without."""

    def __init__(self, trainer):
        rows = trainer.train_dataset.with_format(None)["image_keys"][:]
        per_step = idefics2_docvqa.rows_per_step(trainer.args)
        super().__init__(map(tuple, rows), per_step, lambda: epoch_generator(trainer))


def test_a_run_in_the_same_order_without_sharing_gives_the_same_losses(whole_run, tmp_path, monkeypatch):
    """And the same evaluations: of the loss, of answers, in samples.md."""
    with monkeypatch.context() as patch:
        patch.setattr(idefics2_docvqa.Trainer, "_get_train_sampler", lambda self, rows=None: SameOrder(self))
        apart = whole_run(tmp_path / "apart", share_pages=False)
    shared = whole_run(tmp_path / "shared")
    assert "questions a page: those of a batch share it (--share_pages true)" in shared.text
    assert "questions a page: the page is shown again for each of them (--share_pages false)" in apart.text
    for name in ("loss", "grad_norm", "eval_loss", "eval_anls", "eval_exact_match"):
        want = log(apart.out, name)
        assert len(want) > 3 and log(shared.out, name) == pytest.approx(want, rel=1e-4, abs=1e-6), name
    assert (shared.out / "samples.md").read_text() == (apart.out / "samples.md").read_text()


def test_two_processes_train_like_one(docvqa, whole_run, flags, tmp_path):
    """Twice two rows at once, of each process; the last step of an epoch is short."""
    one = whole_run(tmp_path / "one")
    assert "(--share_pages true)" in one.text
    settings = {**flags, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "share_pages": True}
    more = {"output_dir": tmp_path / "two", "gradient_accumulation_steps": 2}
    argv = docvqa.flags(**{**settings, **more})
    printed, _ = in_two_processes(idefics2_docvqa.main, argv, tmp_path / "printed")
    assert printed.count("questions a page") == 1 and "steps of 8 rows" in printed
    again = {"output_dir": tmp_path / "again", "resume_from_checkpoint": tmp_path / "two" / "checkpoint-4"}
    in_two_processes(idefics2_docvqa.main, docvqa.flags(**{**settings, **more, **again}), tmp_path / "printed 2")
    for name in ("loss", "grad_norm"):
        assert log(tmp_path / "again", name) == log(tmp_path / "two", name)
    single = whole_run(tmp_path / "single", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for name in ("loss", "grad_norm", "eval_loss", "eval_anls"):
        assert log(tmp_path / "two", name) == pytest.approx(log(single.out, name), rel=1e-4, abs=1e-5), name
    assert (tmp_path / "two" / "samples.md").read_text() == (single.out / "samples.md").read_text()


def test_the_rows_of_a_step_are_named(whole_run, tmp_path, monkeypatch):
    """Where --stop_on_nonfinite asks for them: those that the step is of, also in the second epoch."""
    named, collated, trained = [], [], []
    call, training_step = idefics2_docvqa.Collator.__call__, idefics2_docvqa.Trainer.training_step

    def collate(self, rows):
        batch = call(self, rows)
        collated.append((batch["targets"], [row.get("row") for row in rows]))
        return batch

    def note(self, model, inputs, *args, **kwargs):
        [rows] = [rows for targets, rows in collated if targets is inputs["targets"]]
        trained.append((self.state.global_step, rows))
        if self.accelerator.sync_gradients:
            named.append(idefics2_docvqa.rows_of_step(self))
        return training_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(idefics2_docvqa.Trainer, "training_step", note)
    monkeypatch.setattr(idefics2_docvqa.Collator, "__call__", collate)
    whole_run(tmp_path / "out", eval_strategy="no", eval_fraction=0)
    of_steps = [sorted(itertools.chain(*(rows for n, rows in trained if n == step))) for step in range(7)]
    assert named == of_steps and [len(rows) for rows in named] == [8, 8, 8, 1, 8, 8, 8]
    assert sorted(itertools.chain(*named[:4])) == list(range(25)) and named[:3] != named[4:]


# ---------------------------------------------------------------------------------------------------------- answers
def test_answers_are_the_same_from_each_page_once(docvqa, flags):
    """Texts, in the order of the rows; and how many pages go through the tower."""
    trainer = made(docvqa, flags, per_device_eval_batch_size=15, max_new_tokens=12)
    rows, seen, texts = trainer.train_dataset.with_format(None), {}, {}
    for share in (True, False):
        trainer.data_collator.share_pages = share
        with Watch(trainer) as watch:
            texts[share] = [answer.text for answer in trainer.answer(rows)]
        seen[share] = watch.pages
    assert texts[True] == texts[False] and len(set(texts[True])) > 5
    assert seen[True] == [5] and seen[False] == [15]
    assert "features_of_distinct" not in repr(trainer.model.get_base_model().model.get_image_features)


def test_an_evaluation_is_of_the_same_rows(docvqa, flags):
    """Loss and scores; its batches hold the rows of a page together."""
    trainer = made(docvqa, flags, per_device_eval_batch_size=5, max_new_tokens=4)
    rows, metrics, pages = trainer.train_dataset.with_format(None), {}, {}
    for share in (True, False):
        trainer.data_collator.share_pages = share
        with Watch(trainer) as watch:
            metrics[share] = trainer.evaluate(rows)
        pages[share] = sum(watch.pages)
    for name in ("eval_loss", "eval_anls", "eval_exact_match"):
        assert metrics[True][name] == pytest.approx(metrics[False][name], rel=1e-5)
    assert pages[False] == 30 and pages[True] <= 16
    trainer.data_collator.share_pages = True
    shown = [rows["image"][n] for n in trainer.get_eval_dataloader(rows).batch_sampler.sampler]
    assert len(shown) == 15 and len(list(itertools.groupby(shown))) == 5


def test_what_fits_a_gpu_is_tried_without_sharing(docvqa, flags, monkeypatch):
    """Whatever the longest rows are about."""
    trainer, tried = docvqa.trainer(**flags), []
    collator = trainer.data_collator

    def run(trainer, rows, dataset, sizes, before):
        tried.append(len(collator(rows_of(trainer)[1:6])["pixel_values"]))
        return 2, 0

    monkeypatch.setattr(idefics2_docvqa, "gpu_memory", lambda device: (1, 1))
    monkeypatch.setattr(idefics2_docvqa, "largest_batch", run)
    idefics2_docvqa.fill_card(trainer)
    assert tried == [5] and collator.share_pages and len(collator(rows_of(trainer)[1:6])["pixel_values"]) == 1


# ------------------------------------------------------------------------------------------------- what is chosen
def chosen(docvqa, flags, **settings):
    """(what is shared, the line about it, share_pages in settings.yaml) of a run that takes no step."""
    made = run(idefics2_docvqa, docvqa.flags(**{**flags, **settings}), train=False)
    [line] = [line for line in made.text.splitlines() if "questions a page" in line]
    stored = yaml.safe_load((docvqa.tmp_path / "out" / "settings.yaml").read_text())["share_pages"]
    shutil.rmtree(docvqa.tmp_path / "out")
    return made.trainer.data_collator.share_pages, line, stored


def test_by_default_pages_are_shared_from_one_and_a_half_questions_on(docvqa, flags, tmp_path):
    shares = "those of a batch share it"
    apart = "the page is shown again for each of them"
    expected = {
        (2, 1): (True, "1.5", shares, "true"),
        (2, 1, 1): (False, "1.3", f"{apart}, since there are few", "false"),
    }
    for counts, (share, questions, how, flag) in expected.items():
        flags["dataset_name"] = write_data(tmp_path, counts)
        line = f"{questions} questions a page: {how} (--share_pages {flag})"
        assert chosen(docvqa, flags) == (share, line, share)
    line = f"1.3 questions a page: {shares} (--share_pages true)"
    assert chosen(docvqa, flags, share_pages=True) == (True, line, True)
    flags["dataset_name"] = write_data(tmp_path, (4, 4))
    line = f"4.0 questions a page: {apart} (--share_pages false)"
    assert chosen(docvqa, flags, share_pages=False) == (False, line, False)


def with_config(folder, model, **changes):
    """A copy of a model whose text model has another configuration."""
    shutil.copytree(model, folder)
    config = AutoConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config.text_config, name, value)
    config.save_pretrained(folder)
    return folder


def test_what_keeps_pages_from_being_shared_is_said(docvqa, flags, tmp_path, monkeypatch):
    """With --share_pages true it is refused, before weights load; by default pages are not shared."""
    by_length = {"train_sampling_strategy": "group_by_length"}
    message = docvqa.refusal(docvqa.flags(**flags, **by_length, share_pages=True))
    obstacle = "--train_sampling_strategy group_by_length orders the rows"
    assert message == f"error: --share_pages true is not possible: {obstacle}"
    share, line, stored = chosen(docvqa, flags, **by_length)
    assert (share, stored) == (False, False) and f"since {obstacle} (" in line

    window = {"model_name_or_path": with_config(tmp_path / "window", docvqa.folder / "model", sliding_window=512)}
    message = docvqa.refusal(docvqa.flags(**{**flags, **window}, share_pages=True))
    assert message.startswith(
        "error: --share_pages true is not possible: --max_length must be at most 512, this model's sliding window"
    )
    assert "since --max_length must be at most 512" in chosen(docvqa, {**flags, **window})[1]
    assert chosen(docvqa, {**flags, **window}, max_length=512)[0]

    empty_model = idefics2_docvqa.empty_model

    def with_flash_attention(settings):
        model = empty_model(settings)
        model.config.get_text_config()._attn_implementation = "flash_attention_2"
        return model

    with monkeypatch.context() as patch:
        patch.setattr(idefics2_docvqa, "empty_model", with_flash_attention)
        message = docvqa.refusal(docvqa.flags(**flags, share_pages=True))
        assert "not possible: flash_attention_2 takes no 4-D attention mask" in message

    user_turn = idefics2_docvqa.Collator.user_turn

    def page_last(self, question, pages):
        turn = user_turn(self, question, pages)
        return {**turn, "content": turn["content"][::-1]}

    monkeypatch.setattr(idefics2_docvqa.Collator, "user_turn", page_last)
    message = docvqa.refusal(docvqa.flags(**flags, share_pages=True))
    assert "not possible: user_turn must show the page before what differs from question to question" in message
    assert not chosen(docvqa, flags)[0]


def test_batches_of_one_row_share_nothing_and_say_so(docvqa, flags):
    text = run(idefics2_docvqa, docvqa.flags(**flags, per_device_train_batch_size=1, max_steps=1)).text
    assert "no page is shared in training: one row at once" in text


def test_a_resumed_run_keeps_what_was_chosen(docvqa, whole_run, tmp_path):
    """By default, or by a flag that says the same; the other way is another run. A run of an earlier version, whose
    settings.yaml has no share_pages, goes on with pages of their own, since another order would be another run."""
    first = whole_run(tmp_path / "out", max_steps=2, load_best_model_at_end=False)
    settings = tmp_path / "out" / "settings.yaml"
    (tmp_path / "out" / "trainer_state.json").unlink()
    assert "share_pages: true\n" in settings.read_text() and "(--share_pages true)" in first.text
    for given in ({}, {"share_pages": True}):
        shutil.copytree(tmp_path / "out", tmp_path / "copy")
        text = whole_run(tmp_path / "copy", max_steps=2, load_best_model_at_end=False, **given).text
        assert "(--share_pages true)" in text and "resuming from" in text
        shutil.rmtree(tmp_path / "copy")
    with pytest.raises(SystemExit, match="share_pages True -> False"):
        whole_run(tmp_path / "out", max_steps=2, load_best_model_at_end=False, share_pages=False)

    settings.write_text(settings.read_text().replace("share_pages: true\n", ""))
    with pytest.raises(SystemExit, match="share_pages False -> True"):
        whole_run(tmp_path / "out", max_steps=2, load_best_model_at_end=False, share_pages=True)
    text = whole_run(tmp_path / "out", max_steps=2, load_best_model_at_end=False).text
    assert "(--share_pages false)" in text and "share_pages: false\n" in settings.read_text()


# -------------------------------------------------------------------------------------------------- the order of rows
def order_of(counts, per_step, seed=0):
    """(keys of rows, their order) for so many rows of each page."""
    keys = [f"page {page}" for page, count in enumerate(counts) for _ in range(count)]
    random.Random(1).shuffle(keys)
    sampler = RowsOfAnImageTogether(keys, per_step, lambda: torch.Generator().manual_seed(seed))
    assert len(sampler) == len(keys)
    return keys, list(sampler)


def in_parts(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("seed", range(60))
def test_every_row_once_and_two_pages_a_step_where_the_data_have_them(seed):
    """Random sizes of pages and of steps. As many steps are of one page as must be: those for which no row
    is left beside the page that most rows are of."""
    dice = random.Random(seed)
    per_step = dice.choice([1, 2, 3, 4, 6, 8, 9, 16, 24])
    counts = [dice.choice([1, 2, 3, 4, 20, 60 if seed % 3 else 1]) for _ in range(dice.randint(1, 30))]
    keys, order = order_of(counts, per_step, seed)
    assert sorted(order) == list(range(len(keys)))
    steps = [step for step in in_parts(order, per_step) if len(step) > 1]
    of_one = sum(len({keys[row] for row in step}) == 1 for step in steps)
    assert of_one == max(0, len(steps) - (len(keys) - max(counts)))


def test_one_big_page_and_some_small_ones():
    keys, order = order_of([80, 2, 3, 4, 3], per_step=8)
    steps = in_parts(order, 8)
    assert len(steps) == 12 and all(len({keys[row] for row in step}) == 2 for step in steps)


def test_the_order_is_by_seed_alone():
    """Not by how Python hashes texts, which differs from process to process."""
    counts = [40, 3, 5, 1, 2, 2, 7]
    _, first = order_of(counts, 4)
    assert order_of(counts, 4)[1] == first != order_of(counts, 4, seed=1)[1]
    code = "from test_share_pages import order_of; print(order_of([40, 3, 5, 1, 2, 2, 7], 4)[1])"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == first


@pytest.mark.parametrize("batch, per_step, most", [(4, 16, 1.03), (8, 16, 1.01), (16, 16, 1.01), (16, 64, 1.08)])
def test_few_pages_are_cut_and_it_is_fast(batch, per_step, most):
    """As many rows and pages as DocVQA has, of one to twenty questions; also pages of the same size. `most`: sequences
    by those if no chunk of at most half a step were cut by the end of a batch."""
    dice = random.Random(0)
    counts = [min(20, 1 + int(dice.expovariate(1 / 3.4))) for _ in range(10194)]
    for sizes in (counts, [4] * 10000):
        start = time.perf_counter()
        keys, order = order_of(sizes, per_step)
        assert time.perf_counter() - start < 2 and len(keys) > 39000
        sequences = sum(len({keys[row] for row in part}) for part in in_parts(order, batch))
        chunk = min(batch, per_step // 2)
        assert sequences <= most * sum(-(-count // chunk) for count in sizes)


def test_pages_and_the_chunks_of_a_page_are_spread_over_the_epoch():
    keys, order = order_of([80] + [2] * 200, per_step=16)
    quarters = [sum(keys[row] == "page 0" for row in part) for part in in_parts(order, 120)]
    assert len(quarters) == 4 and all(count >= 8 for count in quarters)
    places = Counter(min(3, order.index(row) // 120) for row in range(len(keys)) if keys[row] == "page 7")
    assert len(places) == 1
