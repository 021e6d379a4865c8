"""Reading rows: every kind of data set and form of a row, what is evaluated on, the check and its cache, long rows."""

import functools
import json
import os
import pickle
import re
import shutil
from dataclasses import fields
from typing import get_args, get_type_hints

import datasets
import pytest
import torch
from PIL import Image
from recipes import OTHER_ANSWER, Recipe, asks, chat, flat, prefers, said, same, talks
from transformers import AutoProcessor

from tiny import forms, llava, preferences

in_turns = pytest.mark.parametrize("case", ["sft_llava", "finetune_minicpm_lora", "llava_two_stage"], indirect=True)

MODELS = {  # recipe, the fixture with its tiny model, what ends an answer
    "LLaVA": ("sft_llava", "tiny_llava", "</s>"),
    "Idefics2": ("idefics2_docvqa", "tiny_forms", "<end_of_utterance>"),
    "Idefics2 DPO": ("dpo_idefics2", "tiny_pairs", "<end_of_utterance>"),
    "MiniCPM-V 4.6": ("finetune_minicpm_lora", "tiny_minicpm", "<|im_end|>"),
    "MiniCPM-V 4.7": ("finetune_minicpm_lora", "tiny_minicpm47", "<|im_end|>"),
    "MiniCPM-V 2.6": ("finetune_minicpm_lora", "tiny_minicpm26", "<|im_end|>"),
    "align": ("llava_two_stage", "tiny_parts", "\n"),
    "instruct": ("llava_two_stage", "tiny_parts", "</s>"),
}
WITHOUT_DATA = {  # models of DPO for which there are no tiny data
    "LLaVA DPO": ("dpo_idefics2", "tiny_llava", "</s>"),
    "LLaVA-NeXT DPO": ("dpo_idefics2", "tiny_next", "</s>"),
    "PaliGemma DPO": ("dpo_idefics2", "tiny_paligemma", "<eos>"),
}


@pytest.fixture
def recipe_of(request, tmp_path):
    """A function: name of a model -> (Recipe, settings, what ends an answer)."""

    def make(model):
        name, fixture, end = (MODELS | WITHOUT_DATA)[model]
        settings = {"stage": model} if name == "llava_two_stage" else {}
        return Recipe(name, request.getfixturevalue(fixture), tmp_path), settings, end

    return make


def answers_of(case, data):
    """The last answer of each row; of preferences the chosen one."""
    collator = case.collator()
    return [case.module.text_of(collator.messages_of(row)[-1]) for row in data]


def numbers_of(case, data):
    """Answers that are numbers."""
    return [int(answer) for answer in answers_of(case, data)]


def marked(case, collator, rows):
    """The first of these rows as main prints it."""
    mark = case.module.mark_trained_pair if case.name == "dpo_idefics2" else case.module.mark_trained_tokens
    return mark(flat(collator(rows)), collator.processor)


def what_is_learnt(row):
    """The texts that a row of any recipe teaches."""
    if "chosen" in row:
        return [row["chosen"], row["rejected"]]
    if "answers" in row:
        return row["answers"][:1]
    turns = [(turn.get("from") or turn["role"], turn.get("value") or turn["content"]) for turn in row["conversations"]]
    return [text for role, text in turns if role in ("gpt", "assistant")]


# ------------------------------------------------------------------------------------------------ kinds of data sets
FILES = ["rows.json", "rows.jsonl"]
WITH_TEST = ["json folder", "parquet folder", "saved dict", "image folder with test"]  # these have a split `test`
KINDS = [*FILES, "rows.parquet", "saved", "image folder", *WITH_TEST]


def write_image_folder(folder, rows, source):
    """An image folder with metadata.jsonl, its pictures copied from `source`."""
    folder.mkdir(parents=True)
    lines = []
    for row in rows:
        shutil.copy(source / row["image"], folder)
        columns = {column: value for column, value in row.items() if column != "image"}
        lines.append(json.dumps({"file_name": row["image"], **columns}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.fixture
def numbered(case, write, tmp_path):
    """A function: kind of data set -> its path. Each row has an image of its own and is answered by its number: from 0
    to 19 to train on, and in kinds with a split `test` from 100 to 104."""
    splits = {"train": range(20), "test": range(100, 105)}
    rows = {}
    for split, numbers in splits.items():
        for n in numbers:
            Image.new("RGB", (28, 28), (n, n, n)).save(tmp_path / f"n{n:03d}.png")
        rows[split] = [case.row("q", str(n), image=f"n{n:03d}.png", id=f"n{n:03d}") for n in numbers]

    def make(kind):
        path = tmp_path / kind
        if kind.startswith("rows."):
            write(rows["train"], kind)
        elif kind in ("json folder", "parquet folder"):
            path.mkdir()
            for split in splits:
                write(rows[split], f"{kind}/{split}.{kind.split()[0]}")
        elif kind == "image folder with test":
            for split in splits:
                write_image_folder(path / split, rows[split], tmp_path)
        elif kind == "image folder":
            write_image_folder(path, rows["train"], tmp_path)
        else:
            tables = {split: datasets.Dataset.from_list(rows[split]) for split in splits}
            tables["other"] = tables["test"].select([3])
            (tables["train"] if kind == "saved" else datasets.DatasetDict(tables)).save_to_disk(path)
        return path

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_set_is_read_and_divided(case, kind, numbered, tmp_path):
    options = {"dataset_name": numbered(kind), "image_folder": tmp_path, "eval_fraction": 0.2}
    (train, held_out), again, other = (case.load_data(**options, seed=seed) for seed in (5, 5, 6))
    assert again[0]["row"] == train["row"] and again[1]["row"] == held_out["row"]
    assert numbers_of(case, train) == train["row"]  # `row` is the number in the source
    if kind in WITH_TEST:
        assert train["row"] == list(range(20)) and sorted(held_out["row"]) == list(range(5))
        assert numbers_of(case, held_out) == [100 + row for row in held_out["row"]]
    else:
        assert (len(train), len(held_out)) == (16, 4) and train["row"] != other[0]["row"]
        assert sorted([*train["row"], *held_out["row"]]) == list(range(20))
        assert numbers_of(case, held_out) == held_out["row"]


EVALUATED = [  # data, data to evaluate on, settings, numbers that are evaluated on
    ("rows.json", None, {"eval_fraction": 0}, None),
    ("rows.json", None, {"eval_strategy": "no"}, None),
    ("rows.json", "rows.jsonl", {"eval_strategy": "no"}, None),
    ("rows.json", "rows.jsonl", {"max_eval_rows": 20}, list(range(20))),
    ("rows.json", "saved dict", {"dataset_test_split": "other"}, [103]),
    ("saved dict", None, {"eval_strategy": "no"}, None),
    ("saved dict", None, {"dataset_test_split": "other"}, [103]),
    ("saved dict", None, {"dataset_train_split": "test", "dataset_test_split": "other"}, [103]),
]


def test_what_is_evaluated_on_can_be_said(case, numbered, tmp_path):
    paths = {kind: numbered(kind) for kind in ("rows.json", "rows.jsonl", "saved dict")}
    for data, eval_data, settings, expected in EVALUATED:
        flags = {"dataset_name": paths[data], "eval_dataset_name": paths.get(eval_data), "image_folder": tmp_path}
        train, evaluated = case.load_data(**flags, **settings)
        assert len(train) == (5 if "dataset_train_split" in settings else 20)
        assert (evaluated and sorted(numbers_of(case, evaluated))) == expected, settings


def test_rows_trained_on_are_not_held_out_by_default(case, numbered, tmp_path):
    flags = {"dataset_name": numbered("saved dict"), "dataset_train_split": "test", "image_folder": tmp_path}
    train, held_out = case.load_data(**flags)
    assert sorted(numbers_of(case, [*train, *held_out])) == list(range(100, 105)) and len(held_out) > 0


def test_the_same_few_rows_are_evaluated_each_time(case, numbered, tmp_path):
    """Whether they are held out, of another file or of a split."""
    held_out = {"dataset_name": numbered("rows.json")}
    of_file = held_out | {"eval_dataset_name": numbered("rows.jsonl")}
    for flags in (held_out, of_file, {"dataset_name": numbered("json folder")}):
        flags |= {"image_folder": tmp_path, "eval_fraction": 0.5, "max_eval_rows": 3}
        runs = [case.load_data(**flags, seed=seed)[1]["row"] for seed in (1, 1, 2)]
        assert len(runs[0]) == 3 and runs[0] == runs[1] != runs[2]


def test_rows_that_are_not_scored_are_not_checked(case, numbered, write, tmp_path):
    good, bad = case.row("q", "7", image="n000.png"), case.row("q", "7", image="nowhere.png")
    some = write([good] + [bad] * 30, "some.json")
    flags = {"dataset_name": numbered("rows.json"), "eval_dataset_name": some, "image_folder": tmp_path}
    seed = next(seed for seed in range(99) if datasets.Dataset.from_dict({"n": range(31)}).shuffle(seed)["n"][0] == 0)
    train, evaluated = case.load_data(**flags, max_eval_rows=1, seed=seed)
    assert evaluated["row"] == [0] and train["row"] == list(range(20))
    with pytest.raises(SystemExit, match="1 of 2 rows of the evaluation data"):
        case.load_data(**flags, max_eval_rows=2, seed=seed)


def test_the_hub_is_asked_for_what_the_flags_say(case, images, monkeypatch):
    """And of another data set, to evaluate on, neither the configuration nor the revision of the first is asked."""
    asked, make_processor = [], AutoProcessor.from_pretrained
    rows = [case.row("q", str(n), image=str(case.tmp_path / name)) for n, name in enumerate(images(4))]
    data = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))

    def load_dataset(*args, **options):
        asked.append((args, options))
        return data

    def from_pretrained(name, **options):
        asked.append(options["revision"])
        return make_processor(name)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", from_pretrained)
    flags = {"dataset_name": "a/b", "dataset_config": "c", "dataset_revision": "d", "model_revision": "e"}
    train, held_out = case.load_data(**flags)
    assert (len(train), len(held_out)) == (3, 1)
    first, other = (("a/b", "c"), {"revision": "d"}), (("x/y", None), {"revision": None})
    assert asked == ["e", first, first]
    case.load_data(**{**flags, "eval_dataset_name": "x/y"})
    assert asked[3:] == ["e", first, other]


# ------------------------------------------------------------------------------------------------------ forms of a row
FEATURES = {"sft_llava": llava.FEATURES, "idefics2_docvqa": forms.FEATURES, "dpo_idefics2": preferences.FEATURES}
TEXT = datasets.Value("string")
MESSAGES = datasets.List({"role": TEXT, "content": datasets.List({"type": TEXT, "text": TEXT})})
TRL = datasets.Features(images=datasets.List(datasets.Image()), prompt=MESSAGES, chosen=MESSAGES, rejected=MESSAGES)
IMAGE = {"type": "image"}


def part(text, **more):
    return {"type": "text", "text": text, **more}


def turn(role, *content):
    """A list of one message, as TRL's preference data have it."""
    return [{"role": role, "content": content[0] if isinstance(content[0], str) else list(content)}]


def to_trl(row, image):
    answers = {name: turn("assistant", part(row[name])) for name in ("chosen", "rejected")}
    return {"images": [image], "prompt": turn("user", IMAGE | {"text": None}, part(row["question"])), **answers}


@pytest.mark.parametrize("form", ["parquet", "saved", "saved dict"])
@pytest.mark.parametrize("case", FEATURES, indirect=True)
def test_the_published_schema_gives_the_same_batches_as_ones_own_rows(case, form, tmp_path):
    path, images = case.folder / "data" / "test.parquet", case.folder / "json" / "images"
    data = datasets.load_dataset("parquet", data_files=str(path), split="train")
    assert data.features == FEATURES[case.name]
    if form != "parquet":
        path = tmp_path / form
        (data if form == "saved" else datasets.DatasetDict(train=data)).save_to_disk(path)
    compare_with_own_rows(case, path, images)


@pytest.mark.parametrize("form", ["x.parquet", "saved", "x.json", "texts.json"])
def test_preferences_in_trls_form_give_the_same_batches(form, tiny_pairs, write, tmp_path):
    case, images = Recipe("dpo_idefics2", tiny_pairs, tmp_path), tiny_pairs / "json" / "images"
    own = json.loads((tiny_pairs / "json" / "test.json").read_text())
    if form == "x.json":
        write([to_trl(row, row["image"]) for row in own], form)
    elif form == "texts.json":
        answers = [{name: row[name] for name in ("chosen", "rejected")} for row in own]
        write([{"images": [row["image"]], "prompt": row["question"], **pair} for row, pair in zip(own, answers)], form)
    else:
        rows = [to_trl(row, {"bytes": (images / row["image"]).read_bytes(), "path": None}) for row in own]
        data = datasets.Dataset.from_list(rows, features=TRL)
        if form == "saved":
            data.save_to_disk(tmp_path / form)
        else:
            data.to_parquet(tmp_path / form)
    compare_with_own_rows(case, tmp_path / form, images)


def compare_with_own_rows(case, path, images):
    """The rows of `path` are those of json/test.json."""
    own, collator = json.loads((case.folder / "json" / "test.json").read_text()), case.collator(image_folder=images)
    rows, _ = case.load_data(**{"dataset_name": path, "image_folder": images, "eval_strategy": "no"})
    assert len(rows) == len(own) == 24
    assert all(same(collator([row]), collator([right])) for row, right in zip(rows, own))


@pytest.mark.parametrize("model", MODELS)
def test_a_whole_file_is_read_as_it_is_written(model, recipe_of):
    case, settings, end = recipe_of(model)
    file = case.folder / "json" / ("captions.json" if model == "align" else "train.json")
    own = json.loads(file.read_text())
    settings = {**settings, "dataset_name": file, "image_folder": case.folder / "json" / "images"}
    train, held_out = case.load_data(**settings, eval_strategy="no")
    collator = case.collator(**settings)
    assert held_out is None and train["row"] == list(range(len(own))) and train["id"] == [row["id"] for row in own]
    for row, right in zip(train.select(range(20)), own):
        batch = collator([row])
        assert same(batch, collator([right])) and row["length"] == batch["attention_mask"].shape[1]
        assert len(row["image_keys"]) == len(case.module.pil_images(collator.messages_of(right)))
        learnt = re.findall("«(.*?)»", marked(case, collator, [row]), re.DOTALL)
        assert [text.removeprefix(" ") for text in learnt] == [f"{text}{end}" for text in what_is_learnt(right)]


FORMS = {  # of `row("What?", "two")`
    "sft_llava": [
        chat(("user", [IMAGE, part("What?")]), ("assistant", "two"), images=["red.png"]),
        chat(("user", [IMAGE | {"index": 0.0}, part("What?")]), ("assistant", [part("two")]), images=["red.png"]),
        chat(("user", [part("What?", index=None), IMAGE | {"index": 0, "text": None}]), ("assistant", "two"))
        | {"images": ["red.png"], "conversations": None},
    ],
    "idefics2_docvqa": [asks("What?") | {"answers": "two"}, asks({"en": "What?", "fr": None}, "two")],
    "dpo_idefics2": [
        prefers(turn("user", "What?"), turn("assistant", "two"), turn("assistant", OTHER_ANSWER)),
        prefers(turn("user", IMAGE, part("What?")), turn("assistant", part("two")), OTHER_ANSWER),
        prefers(turn("user", part("What?"), IMAGE | {"text": None}), "two", turn("assistant", part(OTHER_ANSWER))),
        prefers([{"content": "What?"}], "two", OTHER_ANSWER),
    ],
    "finetune_minicpm_lora": [talks("What?", "two"), talks("<image_7>\nWhat?", "two", image={"<image_7>": "red.png"})],
    "llava_two_stage": [said("What?\n<image>", "two", image=["red.png"])],
}


def test_one_row_may_be_written_in_several_forms(case, images):
    images(1)
    collator = case.collator()
    batch = collator([case.row("What?", "two")])
    assert all(same(collator([row]), batch) for row in FORMS[case.name])
    elsewhere = case.collator(image_folder="nowhere")
    assert same(elsewhere([case.row("What?", "two", folder=str(case.tmp_path))]), batch)


def test_text_without_a_picture_in_several_forms(collate):
    collator, row = collate(), said("Which?", "two")
    parts = [(role, [part(text)]) for role, text in (("user", "Which?"), ("assistant", "two"))]
    others = [chat(("user", "Which?"), ("assistant", "two")), chat(*parts), said("Which?", "two", image="")]
    others += [{**row, "image": None, "messages": None}]
    assert all(same(collator([other]), collator([row])) for other in others)


TEXTS = [
    "1",
    "1e3",
    "07",
    "true",
    "null",
    '"quoted"',
    '{"total": 6}',
    "[1, 2]",
    "é 😀 \r\n / \\",
    "[{'role': 'user'}]",
]
IDS = [0, "1", None, [3], {"a": 4}, 0.5, 10**30, True, "", "é"]


def other_form(case, text):
    """A row of the red image whose columns have other types than those of `case.row`."""
    image = {"finetune_minicpm_lora": {"<image>": "red.png"}, "llava_two_stage": ["red.png"]}
    if case.name == "sft_llava":
        return chat(("user", [IMAGE, part(text)]), ("assistant", text), images=["red.png"])
    if case.name == "idefics2_docvqa":
        return asks({"en": text, "fr": "non"}, image=["red.png"]) | {"answers": text}
    if case.name == "dpo_idefics2":
        return prefers(
            turn("user", text), turn("assistant", part(text)), "no", image={"path": "red.png", "bytes": None}
        )
    return case.row(text, text, image=image[case.name])


@pytest.mark.parametrize("name", FILES)
def test_types_may_differ_between_rows_and_texts_stay_texts(case, name, write, images, tmp_path):
    images(2)
    os.rename(tmp_path / "lime.png", tmp_path / "7")
    rows = [case.row(text, text, image="7", id=number) for text, number in zip(TEXTS, IDS)]
    rows += [other_form(case, text) for text in TEXTS]
    train, _ = case.load_data(**{"dataset_name": write(rows, name), "image_folder": None, "eval_fraction": 0})
    assert list(map(str, train["id"])) == list(map(str, IDS + [None] * len(TEXTS)))
    collator, seen = case.collator(), []
    for row, text in zip(train, TEXTS * 2, strict=True):
        asked, answered = collator.messages_of(row)
        assert (case.module.text_of(asked), case.module.text_of(answered)) == (text, text)
        [image] = case.module.pil_images([asked])
        seen.append(image.getpixel((0, 0)))
    assert seen == [(0, 255, 0)] * len(TEXTS) + [(255, 0, 0)] * len(TEXTS)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "X.JSON", "x.JsonL"])
def test_files_as_windows_writes_them(name, case, images, tmp_path):
    images(2)
    rows = [case.row("q", "é 😀"), case.row("r", "b", image="lime.png", id=7)]
    text = json.dumps(rows, indent=1) if name.lower() == "x.json" else "\n".join(map(json.dumps, rows))
    text = text.replace("\\u00e9", "é").replace("\n", "\r\n") + "\r\n\r\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    train, _ = case.load_data(**{"dataset_name": tmp_path / name, "image_folder": None, "eval_fraction": 0})
    assert answers_of(case, train) == ["é 😀", "b"] and train["id"] == [None, 7]
    assert train["image"] == ["red.png", "lime.png"]


# ------------------------------------------------------------------------------------------------------------- columns
PAGES = {  # columns of a row, flags without their ending _column or _columns, what is asked and answered
    "docvqa's": ({"query": "Q", "answers": ["A"]}, {}, "QA"),
    "one answer": ({"question": "Q", "answer": "A"}, {}, "QA"),
    "query before question": ({"query": "Q", "question": "no", "answers": ["A"], "answer": "no"}, {}, "QA"),
    "answer by flag": (
        {"query": "no", "question": "Q", "answers": ["no"], "answer": "A"},
        {"question": "question", "answers": "answer"},
        "QA",
    ),
    "other names": (
        {"scan": "red.png", "frage": "Q", "antworten": ["A", "B"], "image": "no.png", "query": "no"},
        {"image": "scan", "question": "frage", "answers": "antworten", "ignore": "image"},
        "QAB",
    ),
    "names exchanged": (
        {"image": "Q", "question": ["A"], "answers": "red.png"},
        {"image": "answers", "question": "image", "answers": "question"},
        "QA",
    ),
}
ANSWERS = {"chosen": "A", "rejected": "B"}
PAIRS = {
    "image, not images": ({"images": ["no.png"], "question": "Q", **ANSWERS}, {"ignore": "images"}, "QAB"),
    "images are missing": ({"images": None, "question": "Q", **ANSWERS}, {}, "QAB"),
    "question before prompt": ({"question": "Q", "prompt": "no", **ANSWERS}, {}, "QAB"),
    "prompt by flag": ({"question": "no", "prompt": "Q", **ANSWERS}, {"question": "prompt"}, "QAB"),
    "other names of a pair": (
        {
            "photo": "red.png",
            "frage": "Q",
            "besser": "A",
            "schlechter": "B",
            "image": "no.png",
            "question": 5,
            "chosen": 5,
        },
        {"image": "photo", "question": "frage", "chosen": "besser", "rejected": "schlechter", "ignore": "image"},
        "QAB",
    ),
    "names of a pair exchanged": (
        {"image": "Q", "question": "B", "chosen": "red.png", "rejected": "A"},
        {"image": "chosen", "question": "image", "chosen": "rejected", "rejected": "question"},
        "QAB",
    ),
}
COLUMNS = {name: ("idefics2_docvqa", *columns) for name, columns in PAGES.items()}
COLUMNS |= {name: ("dpo_idefics2", *columns) for name, columns in PAIRS.items()}


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("case, row, flags, expected", COLUMNS.values(), ids=COLUMNS, indirect=["case"])
def test_columns_have_their_names_by_themselves_or_by_flags(case, row, flags, expected, kind, write, images):
    images(1)
    path = write([{"image": "red.png", **row}] * 2, f"rows.{kind}")
    flags = {f"{name}_columns" if name == "ignore" else f"{name}_column": column for name, column in flags.items()}
    train, _ = case.load_data(dataset_name=path, eval_fraction=0, **flags)
    collator = case.collator(**flags)
    asked, answered = collator.messages_of(train[0])
    answers = answered["references"] if "references" in answered else [case.module.text_of(answered)]
    if case.name == "dpo_idefics2":
        answers.append(collator.read_pair(train[0])[2])
    assert [case.module.text_of(asked), *answers] == list(expected)
    assert all(text in marked(case, collator, [train[0]]) for text in ("<image>", "Q", "A"))


MINE = {"row": "mine", "folder": "/nowhere", "length": "long", "image_keys": "keys", "problem": "p", "epoch": 7}
MINE |= {"labels": [3], "input_ids": [1], "completion_mask": 3, "pixel_values": [0.5], "model": None}
ALSO_MINE = {"idefics2_docvqa": {"answer": {"text": 1}}, "dpo_idefics2": {"prompt": 5, "images": []}}


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_columns_of_the_names_used_here_do_no_harm(case, kind, write, images, tmp_path):
    images(1)
    plain = [case.row("q", f"a{n}", id=n) for n in range(3)]
    path = write([{**MINE, **ALSO_MINE.get(case.name, {}), **row} for row in plain], f"rows.{kind}")
    train, _ = case.load_data(**{"dataset_name": path, "image_folder": None, "eval_fraction": 0})
    collator = case.collator()
    batches = [collator([row]) for row in plain]
    assert (train["row"], train["id"], train["folder"]) == ([0, 1, 2], [0, 1, 2], [str(tmp_path)] * 3)
    assert train["length"] == [batch["attention_mask"].shape[1] for batch in batches]
    assert all(same(collator([row]), batch) for row, batch in zip(train, batches, strict=True))
    if case.name != "sft_llava":  # it keeps all columns, for your own edits
        assert set(train.column_names) == {*plain[0], "row", "folder", "length", "num_tokens", "image_keys"}


# ----------------------------------------------------------------------------------------------------------- one image
def test_rows_about_one_image_are_on_one_side(case, write, tmp_path):
    for n in range(8):
        Image.new("RGB", (28, 28), (n, n, n)).save(tmp_path / f"{n}.png")
    spelt = (
        [f"{n}.png" for n in range(8)] + [f"./{n}.png" for n in range(8)] + [f"{tmp_path}/{n}.png" for n in range(8)]
    )
    path = write([case.row("q", str(n), image=name) for n, name in enumerate(spelt)])
    train, held_out = case.load_data(**{"dataset_name": path, "image_folder": None, "eval_fraction": 0.25})
    sides = [{n % 8 for n in data["row"]} for data in (train, held_out)]
    assert (len(train), len(held_out)) == (18, 6) and not sides[0] & sides[1]


@in_turns
def test_every_image_of_a_row_connects_it_with_others(case, write, images):
    """The first and the last row share no image, and are on one side all the same. A row without images is alone."""
    images(4)
    rows = []
    for names in (["red"], ["red", "lime"], ["blue", "lime"], ["blue"], ["yellow"], *[[]] * 7):
        files = [f"{name}.png" for name in names]
        if case.name == "finetune_minicpm_lora":
            placeholders = {f"<image_{n}>": file for n, file in enumerate(files)}
            rows.append(talks("".join(placeholders) + "q", "a", image=placeholders or None))
        else:
            rows.append(said("<image>" * len(files) + "q", "a", image=files))
    flags = {"dataset_name": write(rows), "image_folder": None, "eval_fraction": 0.4}
    for seed in range(4):
        train, held_out = case.load_data(**flags, seed=seed)
        sides = [set(data["row"]) for data in (train, held_out)]
        assert all({0, 1, 2, 3} <= side or not {0, 1, 2, 3} & side for side in sides)
        keys = [len(keys) for keys in [*train["image_keys"], *held_out["image_keys"]]]
        assert sorted(keys) == [0] * 7 + [1, 1, 1, 2, 2] and sides[0] | sides[1] == set(range(12))
        assert sum(3 if n == 0 else 1 for n in sides[1] - {1, 2, 3}) == 4  # of eleven images


def test_a_data_set_moved_elsewhere_is_divided_the_same(case, tmp_path):
    found = []
    for folder in (case.folder / "json", shutil.copytree(case.folder / "json", tmp_path / "moved")):
        flags = {"dataset_name": folder / "train.json", "image_folder": folder / "images"}
        train, held_out = case.load_data(**flags, eval_fraction=0.2, max_eval_rows=8)
        found.append((train["row"], held_out["row"], case.collator()([train[5], train[9]])))
    assert found[0][:2] == found[1][:2] and same(found[0][2], found[1][2]) and len(found[0][1]) == 8


# ----------------------------------------------------------------------------------------------- check, cache, loader
@pytest.fixture
def checked(case, monkeypatch):
    """A function: data file, settings as keywords -> how many of its rows load_data gives to the collator."""
    collate, given = case.module.Collator.__call__, []

    def count(self, rows):
        given.extend(rows)
        return collate(self, rows)

    monkeypatch.setattr(case.module.Collator, "__call__", count)

    def make(path, **settings):
        given.clear()
        case.load_data(**{"dataset_name": path, "image_folder": None, "eval_fraction": 0, **settings})
        return len(given)

    return make


NO_SAY = {"learning_rate": 1, "on_bad_rows": "skip", "on_long_rows": "stop", "lora_r": 3, "output_dir": "x"}
ALSO_NO_SAY = {  # a seed has a say where it draws the answer that is learnt
    "sft_llava": {"seed": 7, "sample_tokens": 9},
    "idefics2_docvqa": {"sample_rows": 1},
    "dpo_idefics2": {"seed": 7, "beta": 0.2, "loss_type": "ipo"},
    "finetune_minicpm_lora": {"seed": 7, "sample_rows": 1, "tune_vision": True},
    "llava_two_stage": {"seed": 7, "sample_rows": 1, "sample_tokens": 9},
}
HAVE_A_SAY = {
    "sft_llava": [{"max_length": 500}, {"train_on": "all"}],
    "idefics2_docvqa": [{"max_length": 500}, {"image_splitting": True}],
    "dpo_idefics2": [{"max_length": 500}],
    "finetune_minicpm_lora": [{"model_max_length": 500}, {"max_slice_nums": 3}, {"downsample_mode": "4x"}],
    "llava_two_stage": [{"model_max_length": 500}, {"image_aspect_ratio": "square"}, {"stage": "align"}],
}


def test_the_check_is_cached_until_a_file_or_a_setting_changes(case, checked, write, images, tmp_path):
    rows = [case.row("Which?", "two", image=name) for name in images(3)]
    path = write(rows)
    assert [checked(path), checked(path), checked(path, **NO_SAY, **ALSO_NO_SAY[case.name])] == [3, 0, 0]
    for settings in HAVE_A_SAY[case.name]:
        assert [checked(path, **settings), checked(path, **settings)] == [3, 0], settings
    Image.new("RGB", (9, 9)).save(tmp_path / "blue.png")
    assert [checked(path), checked(path)] == [3, 0]
    (tmp_path / "red.png").write_bytes(b"not a picture any more")
    with pytest.raises(SystemExit, match="row 0: unreadable image"):
        checked(path)
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit, match="3 of 3(?s:.)*row 2"):
        checked(path, image_folder=tmp_path / "other")
    write([case.row("Which?", " ", image="lime.png")])  # another file of the same name
    with pytest.raises(SystemExit, match="1 of 1 rows(?s:.)*row 0: empty"):
        checked(path)


@pytest.mark.parametrize("kind", ["image folder", "parquet of paths"])
def test_an_image_that_changes_under_a_data_set_of_paths_is_checked_again(case, kind, checked, numbered, tmp_path):
    path, file = numbered("image folder"), tmp_path / "image folder" / "n003.png"
    if kind == "parquet of paths":
        path, file = tmp_path / "rows.parquet", tmp_path / "n003.png"
        images = [{"bytes": None, "path": str(tmp_path / f"n{n:03d}.png")} for n in range(20)]
        rows = [case.row("q", "a", image=image, id=f"n{n:03d}") for n, image in enumerate(images)]
        datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False)).to_parquet(path)
    assert [checked(path), checked(path)] == [20, 0]
    file.write_bytes(b"not a picture any more")
    with pytest.raises(SystemExit, match=r"1 of 20 rows(?s:.*)row 3 \(id n003\): unreadable image"):
        checked(path)


def test_one_bad_row_in_a_thousand_is_found_in_parallel_and_left_out_where_asked_for(
    case, write, images, monkeypatch, capsys
):
    images(1, (8, 8))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    rows = [case.row("q", str(n), id=f"id{n}") for n in range(1001)]
    rows[900] = case.row("q", " ", id="id900")
    flags = {"dataset_name": write(rows), "image_folder": None, "eval_fraction": 0}
    if case.name == "sft_llava":
        flags["dataset_num_proc"] = 2
    with pytest.raises(SystemExit, match=r"1 of 1001 rows(?s:.*)\n  row 900 \(id id900\): empty (answer|chosen)"):
        case.load_data(**flags)
    train, _ = case.load_data(**flags, on_bad_rows="skip")
    assert train["row"] == [n for n in range(1001) if n != 900]
    assert re.search(r"left out: 1 of 1001 rows(?s:.*)row 900", capsys.readouterr().out)


@pytest.mark.parametrize("model", [*MODELS, *WITHOUT_DATA])
def test_a_copy_of_the_collator_makes_the_same_batches_in_loader_processes(model, recipe_of, images):
    case, settings, _ = recipe_of(model)
    collator = case.collator(**settings)
    names = images(3)
    rows = [case.row("q " * n, f"answer {n}", image=names[n % 3], row=n) for n in range(1, 7)]
    loader = functools.partial(torch.utils.data.DataLoader, rows, batch_size=2)
    copy = pickle.loads(pickle.dumps(collator))
    batches = list(loader(collate_fn=copy, num_workers=2, multiprocessing_context="fork"))
    assert len(batches) == 3 and all(map(same, batches, loader(collate_fn=collator)))


# ----------------------------------------------------------------------------------------------------------- long rows
def width(batch):
    return batch["attention_mask"].shape[1]


def rows_by_length(case, collator):
    """[(row, its tokens)], the shortest first: the second has a long answer, the third a long question as well."""
    long = "two and " * 9
    if case.name == "idefics2_docvqa":
        rows = [asks("q", "two"), asks("q", "two", long), asks(f"q {long}", "two", long)]
        return [(row, max(width(collator([row | {"answers": [text]}])) for text in row["answers"])) for row in rows]
    rows = [case.row("q", "two"), case.row("q", long), case.row(f"q {long}", long)]
    if case.name == "dpo_idefics2":
        rows = [prefers("q", "two", "six"), prefers("q", "six", long), prefers(f"q {long}", long, "six")]
    return [(row, width(collator([row]))) for row in rows]


def test_long_rows_are_dropped_or_refused_never_cut(case, write, images, capsys):
    """By the longest accepted answer of a question, by the longer answer of a pair."""
    images(1)
    rows, lengths = zip(*rows_by_length(case, case.collator()), strict=True)
    assert lengths[0] < lengths[1] < lengths[2]
    flag = "model_max_length" if hasattr(case.module.Settings, "model_max_length") else "max_length"
    flags = {"dataset_name": write(rows), "image_folder": None, "eval_fraction": 0}
    of_images = ", 16 of them of images; " if case.name == "llava_two_stage" else ".*"
    for limit, kept in ((lengths[2], [0, 1, 2]), (lengths[2] - 1, [0, 1]), (lengths[1] - 1, [0])):
        capsys.readouterr()
        train, _ = case.load_data(**flags, **{flag: limit})
        assert train["row"] == kept
        assert case.name == "idefics2_docvqa" or train["length"] == list(lengths[: len(kept)])
        printed = capsys.readouterr().out
        left_out = (
            rf"{3 - len(kept)} of 3 rows(?s:.)*row 2: too long: {lengths[2]} tokens{of_images}.*--{flag} is {limit}"
        )
        assert bool(re.search(left_out, printed)) == ("too long" in printed) == (len(kept) < 3)
    message = rf"(?s)2 of 3 rows.*row 1: too long: {lengths[1]} .*row 2: too long.*--on_long_rows drop"
    with pytest.raises(SystemExit, match=message):
        case.load_data(**flags, **{flag: limit}, on_long_rows="stop")


def test_a_long_row_is_refused_with_its_tokens_and_those_of_its_slices(every_minicpm, images, tmp_path):
    case, row = Recipe("finetune_minicpm_lora", every_minicpm, tmp_path), talks("q", "two")
    images(1)
    whole = width(case.collator()([row]))
    images(1, (160, 100))  # is cut into slices, if that may be
    collator = case.collator()
    ids = flat(collator([row]))["input_ids"][0].tolist()
    num_slices = ids.count(collator.processor.tokenizer.convert_tokens_to_ids("<slice>"))
    of_images = (num_slices + 1) * (8 if collator.is_26 else 1)
    limit = whole + 3
    message = (
        f"^too long: {len(ids)} tokens, {of_images} of them of images; --model_max_length is {limit}: raise it, or"
    )
    with pytest.raises(case.module.BadRow, match=f"{message} lower --max_slice_nums$"):
        case.collator(model_max_length=limit)([row])
    assert width(case.collator(model_max_length=limit, max_slice_nums=1)([row])) == whole  # it does help
    with pytest.raises(case.module.BadRow, match="; --model_max_length is 5: raise it$"):
        case.collator(model_max_length=5, max_slice_nums=1)([row])


@pytest.mark.parametrize("case", ["sft_llava", "dpo_idefics2"], indirect=True)
def test_max_length_may_be_none(case, write, images, tmp_path):
    images(1)
    flags = {"dataset_name": write([case.row("q", "two " * 3000)]), "eval_fraction": 0}
    (tmp_path / "run.yaml").write_text("max_length: null\n")
    for none in ({"max_length": "none"}, {"config": tmp_path / "run.yaml"}):
        train, _ = case.load_data(**flags, **none)
        assert train["length"][0] > 3000
    default = case.parse()[1].max_length
    with pytest.raises(SystemExit, match=f"too long: {train['length'][0]} tokens, --max_length is {default}"):
        case.load_data(**flags)


def test_settings_that_may_be_none_are_none_where_a_file_says_so(case, tmp_path):
    """And a flag wins over the file."""
    types = get_type_hints(case.module.Settings)
    names = [field.name for field in fields(case.module.Settings) if type(None) in get_args(types[field.name])]
    names = [name for name in names if name != "model_name_or_path"]
    (tmp_path / "run.yaml").write_text("".join(f"{name}:\n" for name in names) + "sample_rows: 3\n")
    start = ["--use_cpu", "--config", str(tmp_path / "run.yaml")]
    if case.name == "llava_two_stage":
        start += ["--stage", "instruct", "--model_name_or_path", "x"]
    settings, training = case.module.parse(start)
    assert len(names) > 5 and [training.as_given[name] for name in names] == [None] * len(names)
    assert (settings.sample_rows, settings.max_eval_rows) == (3, case.module.Settings.max_eval_rows)
    settings, _ = case.module.parse([*start, "--image_folder", "there", "--sample_rows", "5"])
    assert (settings.image_folder, settings.sample_rows) == ("there", 5)


# ----------------------------------------------------------------------------------------------------- the printed row
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PAGE = "<fake_token_around_image><image> x {}<fake_token_around_image>"
PLACES = {"<image_00>": "red.png", "<image_01>": "lime.png"}
MINICPM = (
    "{system}<|im_start|>user\nIs \n<image_id>0</image_id><image><image> x {image}</image>\n or \n"
    "<image_id>1</image_id><image><image> x {image}</image>\n larger?<|im_end|>\n<|im_start|>assistant\n"
    "«Neither.<|im_end|>»\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n{think}«Equal.<|im_end|>»\n"
)
COMPARED = talks("Is <image_01> or <image_00> larger?", "Neither.", "And?", "Equal.", image=PLACES)
THINK = MINICPM.format(system="", image=1, think="<think>\n\n</think>\n\n")
HELPFUL = MINICPM.format(system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", image=8, think="")
PRINTED = {  # model, settings, a row, how it is printed
    "LLaVA": (
        "LLaVA",
        {},
        said("<image>\n<image>\nWhich?", "six and two", "Even or odd?", "even", image=["blue.png", "red.png"]),
        "<s> USER: <image> x 16\n<image> x 16\nWhich? ASSISTANT:« six and two</s>» USER: Even or odd? "
        "ASSISTANT:« even</s>» ",
    ),
    "LLaVA without an image": (
        "LLaVA",
        {},
        chat(("system", "Be brief."), ("user", "Is seven even or odd?"), ("assistant", "odd")),
        "<s> Be brief. USER: Is seven even or odd? ASSISTANT:« odd</s>» ",
    ),
    "Idefics2": (
        "Idefics2",
        {},
        asks("What is «x»?", "«a»"),
        f"<s> User: Answer briefly.{PAGE.format(8)} What is «x»?<end_of_utterance>\n"
        "Assistant:« «a»<end_of_utterance>»\n",
    ),
    "Idefics2 without an instruction": (
        "Idefics2",
        {"instruction": ""},
        asks("What?", "47"),
        f"<s> User:{PAGE.format(8)} What?<end_of_utterance>\nAssistant:« 47<end_of_utterance>»\n",
    ),
    "Idefics2 DPO": (
        "Idefics2 DPO",
        {},
        prefers("What is «x»?", "«a»", "b and b"),
        f"<s> User:{PAGE.format(8)} What is «x»?<end_of_utterance>\nAssistant:\n"
        "  chosen:   « «a»<end_of_utterance>»\n  rejected: « b and b<end_of_utterance>»",
    ),
    "LLaVA DPO": (
        "LLaVA DPO",
        {},
        prefers("What?", "a", "b"),
        "<s> USER: <image> x 16\nWhat? ASSISTANT:\n  chosen:   « a</s>»\n  rejected: « b</s>»",
    ),
    "PaliGemma DPO": (
        "PaliGemma DPO",
        {},
        prefers("What?", "a", "b"),
        "<image> x 16<bos>What?\n\n  chosen:   «a<eos>»\n  rejected: «b<eos>»",
    ),
    "MiniCPM-V 4.6": ("MiniCPM-V 4.6", {}, COMPARED, THINK),
    "MiniCPM-V 4.7": ("MiniCPM-V 4.7", {}, COMPARED, THINK),
    "MiniCPM-V 2.6": ("MiniCPM-V 2.6", {}, COMPARED, HELPFUL),
    "align": ("align", {}, {"image": "red.png", "caption": "a digit"}, "<s><image> x 16« a digit\n»"),
    "instruct": (
        "instruct",
        {},
        said("<image>\nWhich?", "seven", "Odd?", "yes", image="red.png"),
        f"<s> {SYSTEM} USER: <image> x 16 \nWhich? ASSISTANT:« seven</s>»USER: Odd? ASSISTANT:« yes</s>»",
    ),
    "instruct with two images": (
        "instruct",
        {},
        said("<image><image>q", "a", image=["red.png", "lime.png"]),
        f"<s> {SYSTEM} USER: <image> x 16 \n<image> x 16 \nq ASSISTANT:« a</s>»",
    ),
}


@pytest.mark.parametrize("model, settings, row, expected", PRINTED.values(), ids=PRINTED)
def test_the_printed_example(model, settings, row, expected, recipe_of, images):
    images(3)
    case, own, _ = recipe_of(model)
    collator = case.collator(**own, **settings)
    assert marked(case, collator, [row]) == expected
    longer = case.row("Which of these is it? " * 9, "a long answer " * 5)
    assert marked(case, collator, [row, longer]) == expected  # without its padding
