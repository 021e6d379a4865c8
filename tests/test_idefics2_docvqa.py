"""What only idefics2_docvqa.py has: an answer drawn for each epoch, pages in five views, scores of its answers."""

import json
import random
import re
from collections import Counter

import pytest
import torch
from conftest import asks, log
from peft import get_peft_model
from PIL import Image
from recipes import Recipe
from transformers import AutoProcessor, TrainerState

import idefics2_docvqa
from evals import docvqa
from tiny import forms, idefics2
from tools import generate

END = "<end_of_utterance>"
THREE = ["one", "two", "three"]


@pytest.fixture
def docvqa_recipe(tiny_forms, tmp_path):
    return Recipe("idefics2_docvqa", tiny_forms, tmp_path)


@pytest.fixture
def collate(docvqa_recipe, images):
    """A function: settings -> a Collator; red.png, lime.png and blue.png are there."""
    images(3)
    return docvqa_recipe.collator


def trained(batch, tokenizer):
    """The answer that is trained of each row."""
    texts = [tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert all(text.endswith(END) for text in texts)
    return [text.removesuffix(END).strip() for text in texts]


def drawn(collator, rows):
    return trained(collator(rows), collator.processor.tokenizer)


# ------------------------------------------------------------------------------------- which of the accepted answers
def test_the_answer_is_drawn_by_seed_epoch_and_row_alone(collate):
    rows = [asks("What?", *THREE, row=row, epoch=epoch) for row in range(12) for epoch in range(4)]
    random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), torch.get_rng_state()
    collator = collate(seed=1)
    first = drawn(collator, rows)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])  # from no shared stream
    random.seed(6)
    assert drawn(collate(seed=1), rows[::-1]) == first[::-1]  # whatever was drawn before it
    assert [drawn(collator, [row]) for row in rows[:8]] == [[answer] for answer in first[:8]]
    assert set(first) == set(THREE) and drawn(collate(seed=2), rows) != first
    by_epoch = [tuple(first[epoch::4]) for epoch in range(4)]
    assert len(set(by_epoch)) == 4 and all(len(set(answers)) > 1 for answers in by_epoch)

    others = dict(zip(THREE, ["six", "seven", "eight"], strict=True))
    changed = {"question": "Which city?", "image": "blue.png", "answers": list(others.values())}
    assert drawn(collator, [row | changed for row in rows]) == [others[answer] for answer in first]


def test_in_an_evaluation_it_is_the_first(collate):
    collator, rows = collate(), [asks("What?", *THREE, row=row) for row in range(12)]
    assert drawn(collator, rows) == drawn(collator, [row | {"epoch": None} for row in rows]) == ["one"] * 12
    assert drawn(collator, [asks("What?", "one", row=row, epoch=row) for row in range(5)]) == ["one"] * 5


@pytest.mark.parametrize("changing, fixed", [("row", "epoch"), ("epoch", "row")])
def test_every_accepted_answer_comes_about_equally_often(changing, fixed, collate):
    page = Image.new("RGB", (8, 8))
    rows = [asks("What?", *THREE, image=page, **{changing: n, fixed: 3}) for n in range(300)]
    counts = Counter(drawn(collate(), rows))
    assert counts.keys() == set(THREE) and all(abs(count - 100) <= 25 for count in counts.values())  # three sigma


@pytest.mark.parametrize("state, epoch", [(None, 0), (0, 0), (1.0, 1), (1.5, 1), (2, 2)])
def test_the_column_is_the_epoch_begun(state, epoch):
    column = idefics2_docvqa.EpochColumn()
    assert column.add({"row": [4, 5]}) == {"row": [4, 5], "epoch": [0, 0]}
    column.epoch.fill_(7)
    column.on_epoch_begin(None, TrainerState(epoch=state), None)
    assert column.add({"row": [4, 5]})["epoch"] == [epoch] * 2 and column.epoch.is_shared()
    assert column.add({"length": [4, 5, 6]})["epoch"] == [epoch] * 3  # whatever the columns


def test_loader_processes_draw_the_same_in_every_epoch(docvqa_recipe, write, images):
    """They live through all epochs, and see the number change."""
    names = images(3)
    rows = [asks("What?", *THREE, str(n), id=n, image=names[n % 3]) for n in range(12)]
    flags = {"dataset_name": write(rows), "eval_fraction": 0}
    collator, (train, _) = docvqa_recipe.collator(**flags), docvqa_recipe.load_data(**flags)
    batches = {}
    for workers in (0, 2):
        column, more = idefics2_docvqa.EpochColumn(), {"num_workers": workers, "persistent_workers": workers > 0}
        if workers:
            more["multiprocessing_context"] = "fork"
        loader = torch.utils.data.DataLoader(train.with_transform(column.add), 5, collate_fn=collator, **more)
        for epoch in range(3):
            column.on_epoch_begin(None, TrainerState(epoch=float(epoch)), None)
            batches[workers, epoch] = list(loader)
    answers = {}
    for epoch in range(3):
        for one, other in zip(batches[0, epoch], batches[2, epoch], strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        answers[epoch] = [text for batch in batches[2, epoch] for text in trained(batch, collator.processor.tokenizer)]
        assert answers[epoch] == drawn(collator, [{**row, "epoch": epoch} for row in train])
    assert answers[0] != answers[1] != answers[2]


def several_answers(n):
    """The accepted answers of row `n`, of several lengths; no two rows have one in common."""
    return [f"{n}", f"it is {n}", f"Room {n} on the form of Oslo"]


@pytest.fixture(scope="module")
def several(tiny_forms, tmp_path_factory):
    """A file of eight rows with three accepted answers each."""
    rows = json.loads((tiny_forms / "json" / "train.json").read_text())[:8]
    file = tmp_path_factory.mktemp("several") / "rows.json"
    file.write_text(json.dumps([{**row, "answers": several_answers(n)} for n, row in enumerate(rows)]))
    return file


@pytest.fixture
def run_of(docvqa_recipe, several):
    """A function: settings -> the flags of a run on the rows with several answers, without an evaluation."""
    own = {"dataset_name": several, "image_folder": docvqa_recipe.folder / "json" / "images", "eval_strategy": "no"}
    own |= {"load_in_4bit": False, "lora_dropout": 0, "logging_steps": 1, "save_strategy": "no"}
    return lambda **settings: {**own, **settings}


@pytest.mark.slow
def test_each_epoch_draws_anew_whatever_the_loader_processes(docvqa_recipe, run_of, monkeypatch):
    """One of the accepted answers for every row in every epoch; in time all of them; with another seed others."""
    answers, step = [], idefics2_docvqa.Trainer.training_step

    def spy(self, model, inputs, *args, **kwargs):
        answers.extend(trained(inputs, self.processing_class.tokenizer))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(idefics2_docvqa.Trainer, "training_step", spy)
    which = {answer: (n, k) for n in range(8) for k, answer in enumerate(several_answers(n))}
    lasting = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    seen, losses = {}, {}
    for name, settings in (("alone", {}), ("processes", lasting), ("another seed", {"seed": 7})):
        answers.clear()
        out = docvqa_recipe.tmp_path / name
        steps = {"max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
        docvqa_recipe.run(**run_of(output_dir=out, **steps, **settings))
        epochs = [dict(which[answer] for answer in answers[start : start + 8]) for start in (0, 8, 16)]
        assert len(answers) == 24 and all(set(epoch) == set(range(8)) for epoch in epochs)
        assert all(max(epoch.values()) > 0 for epoch in epochs)  # no epoch just takes the first
        assert {k for epoch in epochs for k in epoch.values()} == {0, 1, 2}
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        seen[name], losses[name] = list(answers), log(out)
    assert seen["alone"] == seen["processes"] != seen["another seed"]
    assert losses["alone"] == losses["processes"] and len(losses["alone"]) == 6


# -------------------------------------------------------------------------------------------------- pages, questions
def test_quarters_and_the_whole_are_what_splitting_shows(collate):
    page = Image.new("RGB", (112, 112))
    for n, colour in enumerate(("red", "lime", "blue", "red")):
        page.paste(Image.new("RGB", (56, 56), colour), (56 * (n % 2), 56 * (n // 2)))
    collator = collate(image_splitting=True)
    batch = collator([asks("What?", "it", image=page)])
    [views] = batch["pixel_values"]
    assert "".join("rgb"[view.mean((1, 2)).argmax()] for view in views[:4]) == "rgbr"
    assert views[4, :, :40, 70:].mean((1, 2)).argmax() == 1  # the whole: its quarter at the top right is lime
    assert (batch["input_ids"] == collator.processor.image_token_id).sum() == 5 * collator.processor.image_seq_len
    assert idefics2.processor().image_processor.do_image_splitting  # as in the public model; here only if asked for
    plain = collate()([asks("What?", "it", image=page)])
    assert plain["pixel_values"].shape[:2] == (1, 1)
    assert (plain["input_ids"] == collator.processor.image_token_id).sum() == collator.processor.image_seq_len


def test_longest_edge_shrinks_the_pages_and_is_saved(collate, images, tmp_path):
    size = idefics2.processor().image_processor.size
    least, most = size["shortest_edge"], size["longest_edge"]
    images(1, (most, most))
    row = asks("What?", "two")
    for given, edge in ((None, most), ((least + most) // 2, (least + most) // 2), (least, least)):
        collator = collate(longest_edge=given, image_splitting=True)
        batch = collator([row])
        assert batch["pixel_values"].shape[-2:] == batch["pixel_attention_mask"].shape[-2:] == (edge, edge)
        collator.processor.save_pretrained(tmp_path / f"saved-{edge}")
        saved = AutoProcessor.from_pretrained(tmp_path / f"saved-{edge}").image_processor  # found beside the adapter
        assert saved.do_image_splitting and saved.size["shortest_edge"] == least
        again = saved([[Image.open(tmp_path / "red.png")]], return_tensors="pt")
        assert torch.equal(again["pixel_values"], batch["pixel_values"])


@pytest.mark.parametrize(
    "instruction, begins", [("", "User:<fake"), ("Be brief, bitte:", "User: Be brief, bitte:<fake")]
)
def test_the_instruction_is_before_the_page(instruction, begins, collate):
    """And what is asked at inference is what is trained."""
    collator, row = collate(instruction=instruction), asks("What?", "two")
    [ids] = collator([row])["input_ids"]
    assert collator.processor.tokenizer.decode(ids).startswith(f"<s> {begins}")
    [asked] = collator.tokenize([collator.messages_of(row)[:1]], prompt=True)["input_ids"]
    assert torch.equal(ids[: len(asked)], asked)


@pytest.mark.parametrize("language", ["en", "de"])
def test_the_question_is_asked_in_the_language_wanted(language, docvqa_recipe):
    collator = docvqa_recipe.collator(language=language)
    for data, is_train in zip(docvqa_recipe.load_data(language=language), (True, False), strict=True):
        asked = {row["row"]: idefics2_docvqa.text_of(collator.messages_of(row)[0]) for row in data}
        made = forms.make_rows(0, train=is_train, n=96 if is_train else 24)
        wanted = {n: forms.ask(row["asked"], row["phrasing"])[language] for n, row in enumerate(made)}
        for n, question in asked.items():
            assert question == wanted[n]
        assert len(asked) == len(made)


def tables(out):
    """samples.md -> {step: (its ANLS, [[page, question, answered, accepted, ANLS] of a row])}."""
    text, found = (out / "samples.md").read_text(encoding="utf-8"), {}
    for section in text.split("## Step ")[1:]:
        step, mean = re.match(r"(\d+): ANLS ([\d.]+)\n", section).groups()
        lines = [line for line in section.splitlines() if line.startswith("| ")]
        head, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
        assert head == ["page", "question", "answered", "accepted", "ANLS"]
        found[int(step)] = float(mean), rows
    return found


def test_pages_in_five_views_and_another_language(docvqa_recipe):
    """The rows of a hub data set; in training, in evaluation, and in what is saved for inference."""
    few = {"max_steps": 2, "logging_steps": 1, "eval_steps": 1, "save_steps": 1, "max_new_tokens": 4}
    docvqa_recipe.run(gradient_accumulation_steps=1, image_splitting=True, language="fr", max_eval_rows=3, **few)
    out = docvqa_recipe.tmp_path / "out"
    assert list(log(out)) == list(log(out, "eval_anls")) == [1, 2]
    assert AutoProcessor.from_pretrained(out).image_processor.do_image_splitting
    made = forms.make_rows(0, train=False, n=24)
    french = {forms.ask(row["asked"], row["phrasing"])["fr"] for row in made}
    shown = [row[1] for _, rows in tables(out).values() for row in rows]
    assert len(shown) == 6 and set(shown) <= french


# ------------------------------------------------------------------------------------------------ training and scores
def test_without_evaluation_there_is_no_best_model(docvqa_recipe):
    _, training = docvqa_recipe.parse(eval_strategy="no")
    assert training.load_best_model_at_end is False
    _, training = docvqa_recipe.parse()
    assert training.load_best_model_at_end and training.metric_for_best_model == "anls" and training.greater_is_better


@pytest.mark.parametrize("dora", [False, True])
def test_the_adapter_starts_gaussian_and_without_effect(docvqa_recipe, dora):
    shape = {"lora_r": 16, "lora_alpha": 4, "lora_dropout": 0.25}
    settings, training = docvqa_recipe.parse(load_in_4bit=False, use_dora=dora, **shape)
    base = idefics2_docvqa.load_model(settings, training)
    norms = {n: m.weight.norm(dim=1) for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    torch.manual_seed(0)
    model = get_peft_model(base, idefics2_docvqa.lora_config(settings))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (16, 4, 0.25, dora)
    weights = {name.removeprefix("base_model.model."): p.detach() for name, p in model.named_parameters()}
    a = torch.cat([value.flatten() for name, value in weights.items() if "lora_A" in name]) * 16
    assert abs(a.mean()) < 0.05 and a.std() == pytest.approx(1, abs=0.05)  # 1 / r
    assert (a**4).mean() == pytest.approx(3, abs=0.3)  # of a uniform distribution 1.8
    assert not any(value.any() for name, value in weights.items() if "lora_B" in name)
    magnitudes = {name.split(".lora_mag")[0]: value for name, value in weights.items() if "magnitude" in name}
    adapted = {name.split(".lora_A")[0] for name in weights if "lora_A" in name}
    assert set(magnitudes) == (adapted if dora else set())
    for name, magnitude in magnitudes.items():
        torch.testing.assert_close(magnitude, norms[name].detach())


def test_scores_are_those_of_the_answers(learnt, tmp_path):
    """Logged beside eval_loss at each evaluation, and what evals/docvqa.py says of tools/generate.py's answers."""
    out = learnt / "run"
    scores, exact, shown = log(out, "eval_anls"), log(out, "eval_exact_match"), tables(out)
    assert list(scores) == list(exact) == list(log(out, "eval_loss")) == list(shown) and len(shown) > 1
    for step, (mean, rows) in shown.items():
        single = [docvqa.anls(answered, accepted.split(" / ")) for _, _, answered, accepted, _ in rows]
        assert sum(single) / 19 == pytest.approx(scores[step], abs=0.01)
        assert mean == pytest.approx(scores[step], abs=6e-4)
        assert [float(row[4]) for row in rows] == pytest.approx(single, abs=0.01)
    assert any(0 < scores[step] < 1 and exact[step] != scores[step] for step in scores)

    best, answers = json.loads((out / "trainer_state.json").read_text())["best_global_step"], tmp_path / "a.jsonl"
    generate.main([str(out), "--output", str(answers), "--max_new_tokens", "8"])
    rows = docvqa.score(answers)
    assert sum(row["anls"] for row in rows) / 19 == scores[best]
    assert sum(row["exact_match"] for row in rows) / 19 == exact[best]
    generated = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [" ".join(line["prediction"].split()) for line in generated] == [row[2] for row in shown[best][1]]
    assert [line["reference"] for line in generated] == [row[3].split(" / ") for row in shown[best][1]]


def test_scores_and_loss_are_of_the_rows_that_are_evaluated(docvqa_recipe, monkeypatch):
    """Also of rows that are given to evaluate(), instead of those that were held out."""
    trainer = docvqa_recipe.trainer(load_in_4bit=False, max_eval_rows=5, max_new_tokens=4, sample_rows=9)
    others, answered, answer_rows = trainer.eval_dataset.select([3, 1]), [], idefics2_docvqa.answer_rows
    scored = []

    def spy(trainer, rows, most):
        answered.append(list(rows["row"]))
        return answer_rows(trainer, rows, most)

    def score(answer, accepted):
        scored.append(accepted)
        return {"anls": len(accepted[0]), "exact_match": 1.0}

    monkeypatch.setattr(idefics2_docvqa, "answer_rows", spy)
    monkeypatch.setattr(idefics2_docvqa, "score", score)
    some, all_of_them = trainer.evaluate(others), trainer.evaluate()
    assert answered == [list(others["row"]), list(trainer.eval_dataset["row"])]
    assert scored == [*others["answers"], *trainer.eval_dataset["answers"]]
    assert some["eval_anls"] == sum(len(answers[0]) for answers in others["answers"]) / 2
    assert some["eval_loss"] != all_of_them["eval_loss"]
    pages = [row[0] for row in tables(docvqa_recipe.tmp_path / "out")[0][1]]  # of the second evaluation at step 0
    assert pages == [f"![](samples/{n}-0.png)" for n in trainer.eval_dataset["row"]]
