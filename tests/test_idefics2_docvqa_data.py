"""idefics2_docvqa.py: what is trained, on which tokens and pixels, read from which files. Labels are decoded and compared as text."""

import io
import json
import os
import random
import shutil
from collections import Counter

import datasets
import pytest
import torch
from conftest import asks, load_data
from PIL import Image
from test_sft_llava_data import MODES, RED, WHITE, colours, same, trained, unpadded
from transformers import AutoProcessor, TrainerState

import idefics2_docvqa as recipe
from tiny import forms, idefics2

ROWS = [  # of different lengths; pages of different sizes
    asks("What is the total?", "47", row=0),
    asks("According to the form, what is the room number?", "Room 12, Oslo", row=1, image="lime.png"),
    asks("What is the city on this form?", " Rome ", row=2, image="blue.png"),
    asks("What?", "Überweisung 漢字 😀\nनमस्ते", row=3),
]
END = "<end_of_utterance>"


@pytest.fixture
def pages(images):
    """red.png, lime.png and blue.png, each of another shape."""
    images(3)
    images(2, (70, 112))
    images(1, (112, 56))


def turns(collator, row):
    """A row as a conversation for the chat template, with its first answer."""
    asked, said = collator.messages_of(row)
    return [asked, {"role": "assistant", "content": [{"type": "text", "text": said["references"][0]}]}]


def questions(data, settings, training):
    """What the user says of each row, without the instruction."""
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    return [recipe.text_of(collator.messages_of(row)[0]) for row in data]


# ------------------------------------------------------------------------------------------------- what is trained
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("pad", ["<unk>", "</s>", END, None])
@pytest.mark.parametrize("side", ["left", "right"])
def test_trained_are_the_answer_and_its_end(side, pad, split, form_collate, pages, tmp_path):
    processor = idefics2.processor()
    processor.tokenizer.padding_side, processor.tokenizer.pad_token = side, pad
    processor.save_pretrained(tmp_path / "model")
    collator = form_collate(model_name_or_path=tmp_path / "model", image_splitting=split)
    tokenizer, batch = collator.processor.tokenizer, collator(ROWS)
    assert tokenizer.padding_side == side and tokenizer.pad_token == (pad or "</s>")
    assert trained(batch, tokenizer) == [
        [f" {row['answers'][0].strip()}{END}"] for row in ROWS
    ]  # nothing else: no page, no question
    padded = batch["attention_mask"] == 0
    assert padded.any() and (batch["input_ids"][padded] == tokenizer.pad_token_id).all()
    assert (batch["attention_mask"][:, 0 if side == "right" else -1] == 1).all()
    views = 5 if split else 1
    tokens = batch["input_ids"] == collator.processor.image_token_id
    assert tokens.sum(1).tolist() == [views * collator.processor.image_seq_len] * len(ROWS)
    assert batch["pixel_values"].shape[:2] == (len(ROWS), views) and batch["pixel_values"].shape[2] == 3
    for n, row in enumerate(ROWS):  # and a row is the same tokens alone as in company
        alone = collator([row])
        assert unpadded(batch, n) == unpadded(alone)
        assert torch.equal(batch["labels"][n][~padded[n]], alone["labels"][0])
        text = tokenizer.decode(unpadded(alone))
        assert text.startswith("<s> User: Answer briefly.<fake") and text.endswith(
            f"{row['answers'][0].strip()}{END}\n"
        )


def test_quarters_and_the_whole_are_what_splitting_shows(form_collate):
    page = Image.new("RGB", (112, 112))
    for n, colour in enumerate(("red", "lime", "blue", "red")):
        page.paste(Image.new("RGB", (56, 56), colour), (56 * (n % 2), 56 * (n // 2)))
    [views] = form_collate(image_splitting=True)([asks("What?", "it", image=page)])["pixel_values"]
    assert colours({"pixel_values": views[:4]}) == "rgbr"
    assert colours({"pixel_values": views[4, None, :, :40, 70:]}) == "g"  # the whole: its quarter at the top right


@pytest.mark.parametrize(
    "settings", [{}, {"image_splitting": True}, {"instruction": ""}, {"instruction": "Be brief, bitte:"}]
)
def test_a_row_is_what_the_chat_template_makes_of_it(settings, form_collate, pages, tmp_path):
    collator = form_collate(**settings)
    processor = collator.processor
    conversations = [turns(collator, row) for row in ROWS]
    batch, options = collator(ROWS), {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    stock = processor.apply_chat_template(conversations, processor_kwargs={"padding": True}, **options)
    assert same(dict(stock), {key: value for key, value in batch.items() if key != "labels"})
    assert {"input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"} == stock.keys()

    processor.save_pretrained(tmp_path / "saved")  # with this run's splitting
    saved = AutoProcessor.from_pretrained(tmp_path / "saved")
    prompts = [collator.tokenize([c[:1] for c in conversations], prompt=True)]
    prompts += [
        saved.apply_chat_template(
            [c[:1] for c in conversations], add_generation_prompt=True, processor_kwargs={"padding": True}, **options
        )
    ]
    assert all((prompt["attention_mask"][:, -1] == 1).all() for prompt in prompts)  # padded on the left
    for n, row in enumerate(ROWS):
        alone = collator([row])
        ids, first = unpadded(alone), (alone["labels"][0] != -100).nonzero()[0].item()
        assert [unpadded(prompt, n) for prompt in prompts] == [
            ids[:first]
        ] * 2  # the prompt ends where the answer begins
        assert ids.count(processor.tokenizer.bos_token_id) == 1 == ids[0]
    assert torch.equal(prompts[0]["pixel_values"], batch["pixel_values"])


def test_prompts_are_padded_on_the_left_whatever_the_tokenizer_does(form_collate, pages):
    collator = form_collate()
    collator.processor.tokenizer.padding_side = "right"
    prompts = collator.tokenize([turns(collator, row)[:1] for row in ROWS], prompt=True)
    assert (prompts["attention_mask"][:, -1] == 1).all() and (prompts["attention_mask"][:, 0] == 0).any()
    assert collator.stop_ids == [collator.processor.tokenizer.convert_tokens_to_ids(token) for token in (END, "</s>")]


def test_the_printed_example(form_collate, pages):
    collator = form_collate()
    page = f"<fake_token_around_image><image> x {collator.processor.image_seq_len}<fake_token_around_image>"
    batch = collator([ROWS[0], ROWS[1]])  # padded
    assert (batch["attention_mask"][0] == 0).any() and recipe.mark_trained_tokens(batch, collator.processor) == (
        f"<s> User: Answer briefly.{page} What is the total?{END}\nAssistant:« 47{END}»\n"
    )
    plain = form_collate(instruction="")
    assert (
        recipe.mark_trained_tokens(plain([ROWS[0]]), plain.processor)
        == f"<s> User:{page} What is the total?{END}\nAssistant:« 47{END}»\n"
    )


def test_white_space_around_texts_is_not_learnt(form_collate, pages):
    collator, padded = form_collate(), asks("  What is the total?\r\n", "  47 \r\n", "\t47 dollars ")
    assert recipe.mark_trained_tokens(collator([padded]), collator.processor) == recipe.mark_trained_tokens(
        collator([asks("What is the total?", "47")]), collator.processor
    )
    assert collator.messages_of(padded)[1]["references"] == ["47", "47 dollars"]


# ------------------------------------------------------------------------------------------------ the drawn answer
THREE = ["one", "two", "three"]


def drawn(collator, rows):
    """The answers that a batch trains."""
    return [text.removesuffix(END).strip() for [text] in trained(collator(rows), collator.processor.tokenizer)]


def test_the_answer_is_drawn_by_seed_epoch_and_row_alone(form_collate, pages):
    collator, other = form_collate(seed=1), form_collate(seed=2)
    rows = [asks("What?", *THREE, row=row, epoch=epoch) for row in range(12) for epoch in range(4)]
    random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), torch.get_rng_state()
    first = drawn(collator, rows)
    assert random.getstate() == states[0] and torch.equal(
        torch.get_rng_state(), states[1]
    )  # draws from no shared stream
    random.seed(6)
    assert drawn(form_collate(seed=1), rows[::-1]) == first[::-1]  # whatever was drawn before it
    assert [drawn(collator, [row]) for row in rows[:8]] == [[answer] for answer in first[:8]]
    assert set(first) == set(THREE) and drawn(other, rows) != first
    by_epoch = [tuple(first[epoch::4]) for epoch in range(4)]
    assert len(set(by_epoch)) == 4 and all(len(set(answers)) > 1 for answers in by_epoch)
    changed = [
        {**row, "question": "Which city?", "image": "blue.png", "answers": ["six", "seven", "eight"]} for row in rows
    ]
    assert drawn(collator, changed) == [dict(zip(THREE, ["six", "seven", "eight"]))[answer] for answer in first]


def test_without_an_epoch_it_is_the_first(form_collate, pages):
    rows = [asks("What?", *THREE, row=row) for row in range(12)]
    assert (
        drawn(form_collate(), rows) == drawn(form_collate(), [{**row, "epoch": None} for row in rows]) == ["one"] * 12
    )
    assert drawn(form_collate(), [asks("What?", "one", row=row, epoch=row) for row in range(5)]) == ["one"] * 5


@pytest.mark.parametrize("rows", [lambda n: {"row": 3, "epoch": n}, lambda n: {"row": n, "epoch": 3}])
def test_every_accepted_answer_comes_about_equally_often(rows, form_collate, pages):
    page = Image.new("RGB", (8, 8))
    counts = Counter(drawn(form_collate(), [asks("What?", *THREE, image=page, **rows(n)) for n in range(300)]))
    assert counts.keys() == set(THREE) and all(abs(count - 100) <= 25 for count in counts.values()), (
        counts
    )  # three sigma


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_loader_workers_draw_the_same_in_every_epoch(kind, workers, form_parse, write, pages):
    rows = [asks("What?", *THREE, str(n), id=n, image=["red.png", "lime.png", "blue.png"][n % 3]) for n in range(12)]
    settings, training = form_parse(dataset_name=write(rows, f"rows.{kind}"), eval_fraction=0)
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    train, _ = load_data(recipe, settings, training)
    batches = {}
    for count in (0, workers):
        column = recipe.EpochColumn()
        data = train.with_transform(column.add)
        loader = torch.utils.data.DataLoader(
            data,
            5,
            collate_fn=collator,
            num_workers=count,
            persistent_workers=count > 0,
            multiprocessing_context="fork" if count else None,
        )
        for epoch in range(3):  # the workers live through all of them: they see the number change
            column.on_epoch_begin(training, TrainerState(epoch=float(epoch)), None)
            batches[count, epoch] = list(loader)
    for epoch in range(3):
        assert all(map(same, batches[0, epoch], batches[workers, epoch])) and len(batches[workers, epoch]) == 3
        expected = drawn(collator, [{**row, "epoch": epoch} for row in train])
        assert [
            text for batch in batches[workers, epoch] for [text] in trained(batch, collator.processor.tokenizer)
        ] == [f" {answer}{END}" for answer in expected]
    assert not same(batches[0, 0][0], batches[0, 1][0]) and not same(batches[0, 1][0], batches[0, 2][0])


@pytest.mark.parametrize("state, epoch", [(None, 0), (0, 0), (1.0, 1), (1.5, 1), (2, 2)])
def test_the_column_is_the_epoch_begun(state, epoch):
    column = recipe.EpochColumn()
    assert column.add({"row": [4, 5]}) == {"row": [4, 5], "epoch": [0, 0]}
    column.epoch.fill_(7)
    column.on_epoch_begin(None, TrainerState(epoch=state), None)
    assert column.add({"row": [4, 5]})["epoch"] == [epoch] * 2 and column.epoch.is_shared()
    assert column.add({"length": [4, 5, 6]})["epoch"] == [epoch] * 3  # whatever the columns


# ----------------------------------------------------------------------------------------------------------- pages
def test_forms_of_one_row(form_collate, images, tmp_path):
    """A page as path, list of one, absolute path, bytes, PIL image; an answer as a text or a list; a question by language."""
    collator, [red] = form_collate(), images(1, (112, 56))
    png = (tmp_path / red).read_bytes()
    cells = [
        red,
        [red],
        str(tmp_path / red),
        png,
        {"bytes": png},
        {"bytes": png, "path": None},
        {"bytes": None, "path": red},
    ]
    cells += [[{"bytes": png, "path": "elsewhere.png"}], Image.open(io.BytesIO(png)), [Image.open(io.BytesIO(png))]]
    batches = [collator([asks("What?", "two", image=cell)]) for cell in cells]
    batches += [collator([{**asks("What?", image=red), "answers": "two"}])]
    batches += [
        collator([asks({"en": "What?", "fr": None}, "two")]),
        collator([{**asks("What?", "two"), "folder": str(tmp_path)}]),
    ]
    assert all(same(batches[0], batch) for batch in batches)
    assert colours({"pixel_values": batches[0]["pixel_values"][0]}) == "r"
    assert drawn(collator, [asks("What?", "two")]) == ["two"]


@pytest.mark.parametrize("image, kind, expected", MODES.values(), ids=MODES)
def test_every_mode_becomes_rgb_on_white(image, kind, expected, tmp_path):
    info, image = image.info, image.resize((image.width, 2), Image.Resampling.NEAREST)
    image.info = info
    image.save(tmp_path / f"x.{kind}")
    for cell in (str(tmp_path / f"x.{kind}"), {"bytes": (tmp_path / f"x.{kind}").read_bytes()}, image):
        loaded = recipe.load_image(cell)
        assert loaded.mode == "RGB" and loaded.size == image.size
        assert [loaded.getpixel((x, 1)) for x in range(loaded.width)] == expected


@pytest.mark.parametrize("orientation, upright", [(1, (2, 3)), (3, (2, 3)), (6, (3, 2)), (8, (3, 2))])
def test_pages_are_upright(orientation, upright, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    page = Image.new("RGB", (2, 3), "white")
    page.putpixel((0, 0), RED)
    page.save(tmp_path / "x.png", exif=exif)
    loaded = recipe.load_image(str(tmp_path / "x.png"))
    corner = {1: (0, 0), 3: (1, 2), 6: (2, 0), 8: (0, 1)}[orientation]
    assert loaded.size == upright and loaded.getpixel(corner) == RED
    assert sum(loaded.getpixel((x, y)) == WHITE for x in range(upright[0]) for y in range(upright[1])) == 5


@pytest.mark.parametrize("size", [(40, 2), (2, 40), (2, 2)])
@pytest.mark.parametrize("split", [False, True])
def test_the_narrowest_and_the_smallest_pages_are_processed(split, size, form_collate):
    batch = form_collate(image_splitting=split)([asks("What?", "two", image=Image.new("RGB", size, "lime"))])
    views = batch["pixel_values"][0] * batch["pixel_attention_mask"][0][:, None]
    assert colours({"pixel_values": views}) == ("ggggg" if split else "g")


def test_longest_edge_shrinks_the_pages_and_is_saved(form_collate, form_parse, images, tmp_path):
    size = form_collate().processor.image_processor.size
    least, most = size["shortest_edge"], size["longest_edge"]
    images(1, (most, most))
    row = asks("What?", "two")
    for given, edge in ((None, most), (most, most), ((least + most) // 2, (least + most) // 2), (least, least)):
        collator = form_collate(**({"longest_edge": given} if given else {}), image_splitting=True)
        batch = collator([row])
        assert batch["pixel_values"].shape[-2:] == batch["pixel_attention_mask"].shape[-2:] == (edge, edge)
        collator.processor.save_pretrained(tmp_path / f"saved-{edge}")
        saved = AutoProcessor.from_pretrained(tmp_path / f"saved-{edge}")  # what generate.py finds beside the adapter
        assert saved.image_processor.do_image_splitting and saved.image_processor.size["shortest_edge"] == least
        again = saved.apply_chat_template([turns(collator, row)], tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(again["pixel_values"], batch["pixel_values"])


def test_splitting_is_off_unless_asked_for(form_collate):
    assert idefics2.processor().image_processor.do_image_splitting  # as in the public model
    assert form_collate().processor.image_processor.do_image_splitting is False


# ------------------------------------------------------------------------------------------------------- data sets
def write_folder(folder, rows, source):
    """An image folder with metadata.jsonl, its pages copied from `source`."""
    folder.mkdir(parents=True)
    for row in rows:
        shutil.copy(source / row["image"], folder / f"{row['id'][-14:]}.png")
    lines = [{"file_name": f"{row['id'][-14:]}.png", **{k: v for k, v in row.items() if k != "image"}} for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


DOCVQA = ["parquet", "saved", "dict", "json", "jsonl", "json folder", "image folder"]


@pytest.fixture
def docvqa(tiny_forms, tmp_path):
    """A function: kind of data set -> path: the same 10 forms, in the schema of docvqa_1200_examples or as one's own data."""
    own = json.loads((tiny_forms / "json" / "test.json").read_text())[:10]
    images = tiny_forms / "json" / "images"

    def make(kind):
        path = tmp_path / (f"x.{kind}" if kind in ("parquet", "json", "jsonl") else kind)
        data = datasets.load_dataset("parquet", data_files=str(tiny_forms / "data" / "test.parquet"), split="train")
        assert data.features == forms.FEATURES  # what `datasets` reads is the published schema
        data = data.select(range(10))
        if kind == "parquet":
            data.to_parquet(path)
        elif kind == "saved":
            data.save_to_disk(path)
        elif kind == "dict":
            datasets.DatasetDict(train=data).save_to_disk(path)
        elif kind == "image folder":
            write_folder(path, own, images)
        elif kind == "json folder":
            path.mkdir()
            (path / "train.json").write_text(json.dumps(own))
        else:
            path.write_text("\n".join(map(json.dumps, own)) if kind == "jsonl" else json.dumps(own))
        return path

    return make


@pytest.mark.parametrize("kind", DOCVQA)
def test_every_schema_gives_the_same_batches(kind, docvqa, tiny_forms, form_parse):
    settings, training = form_parse(
        dataset_name=docvqa(kind), image_folder=tiny_forms / "json" / "images", eval_fraction=0
    )
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    rows = sorted(load_data(recipe, settings, training)[0], key=lambda row: row["id"])
    expected = sorted(map(forms.to_docvqa, forms.make_rows(0, train=False, n=24)[:10]), key=lambda row: row["id"])
    assert [row["id"] for row in rows] == [row["id"] for row in expected]
    for row, right in zip(rows, expected):
        page = {"image": right["image"], "question": right["query"]["en"], "answers": right["answers"]}
        assert same(collator([row]), collator([page]))
        assert drawn(collator, [row]) == right["answers"][:1]


@pytest.fixture
def saved(write, tmp_path):
    """Kind -> path: the same 20 rows to train on (answers 0..19) in every form, some with a split of 5 (100..104)."""
    numbers = (range(20), range(100, 105))
    for n in (*numbers[0], *numbers[1]):
        Image.new("RGB", (56, 56), (n, n, n)).save(tmp_path / f"n{n:03d}.png")
    train, test = ([asks("q", str(n), id=f"n{n:03d}", image=f"n{n:03d}.png") for n in some] for some in numbers)
    paths = {name: write(train, f"rows.{name}") for name in ("json", "jsonl", "parquet")}
    for name in ("folder", "json folder", "saved", "saved dict", "image folder", "image folder with test"):
        paths[name] = tmp_path / name
    for kind, name in (("parquet", "folder"), ("json", "json folder")):
        paths[name].mkdir()
        write(train, f"{name}/train.{kind}")
        write(test, f"{name}/test.{kind}")
    write_folder(paths["image folder"], train, tmp_path)
    for name, rows in (("train", train), ("test", test)):
        write_folder(paths["image folder with test"] / name, rows, tmp_path)
    train, test = map(datasets.Dataset.from_list, (train, test))
    train.save_to_disk(paths["saved"])
    datasets.DatasetDict(train=train, test=test, other=test.select([3])).save_to_disk(paths["saved dict"])
    return paths


def said_of(data):
    """The accepted answers of rows that have one, as numbers."""
    return [int(answer) for [answer] in data["answers"]]


@pytest.mark.parametrize(
    "kind",
    [
        "json",
        "jsonl",
        "parquet",
        "folder",
        "json folder",
        "saved",
        "saved dict",
        "image folder",
        "image folder with test",
    ],
)
def test_every_kind_of_data_set_is_read(kind, saved, form_parse, tmp_path):
    options = {"dataset_name": saved[kind], "eval_fraction": 0.2, "image_folder": tmp_path}
    (train, held_out), again, other = (load_data(recipe, *form_parse(**options, seed=seed)) for seed in (5, 5, 6))
    assert said_of(again[0]) == said_of(train) and said_of(again[1]) == said_of(held_out)
    assert said_of(train) == train["row"]  # `row` is the number in the source
    if kind in ("folder", "json folder", "saved dict", "image folder with test"):
        assert train["row"] == list(range(20)) and sorted(held_out["row"]) == list(range(5))
        assert said_of(held_out) == [100 + row for row in held_out["row"]]
    else:
        assert (len(train), len(held_out)) == (16, 4)
        assert sorted(train["row"]) != sorted(other[0]["row"])
        assert sorted([*train["row"], *held_out["row"]]) == list(range(20))
        assert said_of(held_out) == held_out["row"]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"dataset_name": "saved dict", "dataset_test_split": "other"}, [103]),
        ({"dataset_name": "json", "eval_dataset_name": "saved dict", "dataset_test_split": "other"}, [103]),
        ({"dataset_name": "json", "eval_dataset_name": "jsonl", "max_eval_rows": 20}, list(range(20))),
        ({"dataset_name": "json", "eval_fraction": 0}, None),
        ({"dataset_name": "saved dict", "eval_strategy": "no"}, None),
        ({"dataset_name": "json", "eval_strategy": "no"}, None),
        ({"dataset_name": "saved dict", "dataset_train_split": "test", "dataset_test_split": "other"}, [103]),
    ],
)
def test_what_is_evaluated_on_can_be_said(settings, expected, saved, form_parse, tmp_path):
    paths = {key: saved.get(value, value) for key, value in settings.items()}
    train, held_out = load_data(recipe, *form_parse(**paths, image_folder=tmp_path))
    assert len(train) == (5 if "dataset_train_split" in settings else 20)
    assert (held_out and sorted(said_of(held_out))) == expected


def test_rows_trained_on_are_not_held_out_by_default(saved, form_parse, tmp_path):
    train, held_out = load_data(
        recipe, *form_parse(dataset_name=saved["saved dict"], dataset_train_split="test", image_folder=tmp_path)
    )
    assert not set(said_of(train)) & set(said_of(held_out)) and len(train) + len(held_out) == 5


FOLDERS = {"red": "dataset_name", "blue": "eval_dataset_name"}


def test_pages_are_looked_for_beside_the_data(form_parse, tmp_path):
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        Image.new("RGB", (56, 56), name).save(tmp_path / name / "x.png")
        (tmp_path / name / "rows.json").write_text(json.dumps([asks("Which?", "two", image="x.png")]))
    settings, training = form_parse(**{key: tmp_path / name / "rows.json" for name, key in FOLDERS.items()})
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    batches = [collator([data[0]]) for data in load_data(recipe, settings, training)]
    assert [colours({"pixel_values": batch["pixel_values"][0]}) for batch in batches] == ["r", "b"]
    (tmp_path / "red" / "rows.json").rename(tmp_path / "red" / "train.json")
    (tmp_path / "red" / "x.png").rename(tmp_path / "red" / "x.PNG.txt")  # read by its content, not by its name
    (tmp_path / "red" / "train.json").write_text(json.dumps([asks("Which?", "two", image="x.PNG.txt")] * 2))
    assert len(load_data(recipe, *form_parse(dataset_name=tmp_path / "red", eval_fraction=0))[0]) == 2


@pytest.mark.parametrize("kind", ["json", "parquet", "parquet of lists", "saved"])
def test_questions_about_one_page_are_on_one_side(kind, form_parse, tmp_path):
    images = [Image.new("RGB", (28, 28), (n, n, n)) for n in range(8)]
    rows = [asks(f"q{n}", str(n), image=images[n % 8]) for n in range(24)]
    path = tmp_path / f"rows.{kind.split()[0]}"
    if kind == "json":
        for n, image in enumerate(images):
            image.save(tmp_path / f"{n}.png")
        path.write_text(json.dumps([{**row, "image": f"{n % 8}.png"} for n, row in enumerate(rows)]))
    else:
        data = datasets.Dataset.from_list(
            [{**row, "image": [row["image"]]} for row in rows] if "lists" in kind else rows
        )
        data.to_parquet(path) if path.suffix == ".parquet" else data.save_to_disk(path)
    train, held_out = load_data(recipe, *form_parse(dataset_name=path, eval_fraction=0.25))
    there = [{n % 8 for n in said_of(data)} for data in (train, held_out)]
    assert (len(there[1]), len(held_out), len(train)) == (2, 6, 18) and not there[0] & there[1]


@pytest.mark.parametrize("kind", ["json", "folder"])
def test_evaluation_is_bounded_to_the_same_rows_each_time(kind, saved, form_parse, tmp_path):
    options = {"dataset_name": saved[kind], "eval_fraction": 0.5, "max_eval_rows": 3, "image_folder": tmp_path}
    runs = [load_data(recipe, *form_parse(**options, seed=seed))[1]["row"] for seed in (1, 1, 2)]
    assert len(runs[0]) == 3 and runs[0] == runs[1] != runs[2]


def test_rows_that_are_not_scored_are_not_checked(saved, form_parse, write, tmp_path):
    write([asks("q", "7", image="n000.png")] + [asks("q", "7", image="nowhere.png")] * 30, "folder.json")
    settings = {"dataset_name": saved["json"], "eval_dataset_name": tmp_path / "folder.json", "image_folder": tmp_path}
    seed = next(seed for seed in range(99) if datasets.Dataset.from_dict({"n": range(31)}).shuffle(seed)["n"][0] == 0)
    assert load_data(recipe, *form_parse(**settings, max_eval_rows=1, seed=seed))[1]["row"] == [0]
    with pytest.raises(SystemExit, match="1 of 2 rows of the evaluation data"):
        load_data(recipe, *form_parse(**settings, max_eval_rows=2, seed=seed))


COLUMNS = {  # columns of a row, flags, what is asked and answered
    "docvqa": ({"query": "Q", "answers": ["A"]}, {}, ("Q", ["A"])),
    "own": ({"question": "Q", "answer": "A"}, {}, ("Q", ["A"])),
    "query before question": ({"query": "Q", "question": "no", "answers": ["A"], "answer": "no"}, {}, ("Q", ["A"])),
    "answer by flag": ({"query": "no", "question": "Q", "answers": ["no"], "answer": "A"},
                       {"question_column": "question", "answers_column": "answer"}, ("Q", ["A"])),
    "other names": ({"scan": "red.png", "frage": {"de": "Q", "en": None}, "antworten": ["A", "B"], "image": "no.png", "query": "no"},
                    {"image_column": "scan", "question_column": "frage", "answers_column": "antworten", "language": "de"}, ("Q", ["A", "B"])),
    "names exchanged": ({"image": "Q", "question": ["A"], "answers": "red.png"},
                        {"image_column": "answers", "question_column": "image", "answers_column": "question"}, ("Q", ["A"])),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("row, flags, expected", COLUMNS.values(), ids=COLUMNS)
def test_columns_have_their_names_by_themselves_or_by_flags(
    row, flags, expected, kind, form_parse, write, images, tmp_path
):
    images(1)
    path = write([{"image": "red.png", **row}] * 2, f"rows.{kind}")
    settings, training = form_parse(dataset_name=path, eval_fraction=0, **flags)
    train, _ = load_data(recipe, settings, training)
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    asked, said = collator.messages_of(train[0])
    assert (recipe.text_of(asked), said["references"], recipe.text_of(said)) == (*expected, expected[1][0])
    assert expected[0] in recipe.mark_trained_tokens(collator([train[0]]), collator.processor)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_columns_of_the_names_used_here_do_no_harm(kind, form_parse, write, images):
    images(1)
    mine = {
        "row": "mine",
        "folder": "/nowhere",
        "length": "long",
        "epoch": 7,
        "labels": [3],
        "question": 5,
        "problem": "p",
        "answer": {"text": 1},
    }
    rows = [
        {**mine, "id": n, "image": "red.png", "query": "q", "answers": ["six", str(n)], "pixel_values": [n]}
        for n in range(3)
    ]
    settings, training = form_parse(dataset_name=write(rows, f"rows.{kind}"), eval_fraction=0)
    train, _ = load_data(recipe, settings, training)
    assert (train["row"], train["id"]) == ([0, 1, 2], [0, 1, 2]) and train["length"][0] > 5
    assert set(train.column_names) == {"id", "image", "question", "answers", "row", "folder", "length", "image_keys"}
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    marked = train.with_transform(recipe.EpochColumn().add)
    assert drawn(collator, [marked[n] for n in range(3)]) == drawn(
        collator, [asks("q", "six", str(n), row=n, epoch=0, folder=train["folder"][0]) for n in range(3)]
    )


def test_types_may_differ_between_rows_and_texts_stay_texts(form_parse, write, images, tmp_path):
    images(2)
    os.rename(tmp_path / "lime.png", tmp_path / "7")
    texts = ["1", "1e3", "07", "true", "null", '"quoted"', '{"total": 6}', "[1, 2]", "é 😀 \n / \\"]
    rows = [asks(text, text, image=("7", ["red.png"])[n % 2], id=(n, text)[n % 2]) for n, text in enumerate(texts)]
    rows += [{**asks({"en": text, "fr": "non"}), "answers": text} for text in texts]
    for name in ("x.json", "x.jsonl"):
        settings, training = form_parse(dataset_name=write(rows, name), eval_fraction=0)
        train, _ = load_data(recipe, settings, training)
        assert questions(train, settings, training) == texts * 2
        assert [row["answers"] for row in train] == [[text] for text in texts] + texts
        collator = recipe.Collator(recipe.load_processor(settings), settings, training)
        first = [colours({"pixel_values": collator([row])["pixel_values"][0]}) for row in train]
        assert "".join(first) == "grgrgrgrg" + "r" * 9


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_files_as_windows_writes_them(name, form_parse, write, images):
    images(1)
    path = write([asks("q", "é"), asks("r", "b")], name)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert load_data(recipe, *form_parse(dataset_name=path, eval_fraction=0))[0]["answers"] == [["é"], ["b"]]


@pytest.mark.parametrize("language", forms.LANGUAGES)
def test_the_question_is_asked_in_the_language_wanted(language, tiny_forms, form_parse):
    settings, training = form_parse(language=language, eval_fraction=0)
    train, held_out = load_data(recipe, settings, training)
    for data, is_train in ((train, True), (held_out, False)):
        rows = sorted(data, key=lambda row: row["row"])
        made = forms.make_rows(0, train=is_train, n=96 if is_train else 24)
        assert questions(rows, settings, training) == [
            forms.ask(row["asked"], row["phrasing"])[language] for row in made
        ]


def test_the_hub_is_asked_for_what_the_flags_say(form_parse, monkeypatch, images, tmp_path):
    seen, process = [], AutoProcessor.from_pretrained
    data = datasets.DatasetDict(
        train=datasets.Dataset.from_list([asks("q", "a", image=str(tmp_path / name)) for name in images(4)])
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: [data, seen.append((args, kwargs))][0])
    monkeypatch.setattr(
        AutoProcessor,
        "from_pretrained",
        lambda *args, **kwargs: [process(args[0]), seen.append(kwargs["revision"])][0],
    )
    assert (
        len(
            load_data(
                recipe, *form_parse(dataset_name="a/b", dataset_config="c", dataset_revision="d", model_revision="e")
            )[0]
        )
        == 3
    )
    assert seen == ["e", (("a/b", "c"), {"revision": "d"}), (("a/b", "c"), {"revision": "d"})]


@pytest.fixture
def checked(form_parse, monkeypatch):
    """A function: settings as keywords -> how many rows load_data gave to the collator."""
    calls, call = [], recipe.Collator.__call__
    monkeypatch.setattr(recipe.Collator, "__call__", lambda self, rows: [calls.extend(rows), call(self, rows)][1])

    def make(**settings):
        calls.clear()
        load_data(recipe, *form_parse(**{"eval_fraction": 0, **settings}))
        return len(calls)

    return make


def test_the_check_is_cached_until_a_page_changes(checked, write, pages, tmp_path):
    path = write([asks("Which?", "two", image=name) for name in ("red.png", "lime.png", "blue.png")])
    assert [checked(dataset_name=path), checked(dataset_name=path), checked(dataset_name=path, learning_rate=1)] == [
        3,
        0,
        0,
    ]
    Image.new("RGB", (9, 9)).save(tmp_path / "lime.png")
    assert [checked(dataset_name=path), checked(dataset_name=path)] == [3, 0]
    assert checked(dataset_name=path, image_splitting=True) == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "red.png").write_bytes(b"not a picture any more")
    with pytest.raises(SystemExit, match="row 0: unreadable image"):
        checked(dataset_name=path)
    with pytest.raises(SystemExit, match="row 2"):
        checked(dataset_name=path, image_folder=tmp_path / "other")


def test_a_page_that_changes_in_an_image_folder_is_checked_again(checked, saved):
    path = saved["image folder"]
    assert [checked(dataset_name=path), checked(dataset_name=path)] == [20, 0]
    (path / "n003.png").write_bytes(b"not a picture any more")
    with pytest.raises(SystemExit, match=r"1 of 20 rows(?s:.*)\(id n003\): unreadable image"):
        checked(dataset_name=path)


def test_the_check_is_cached_whatever_the_settings_that_have_no_say_in_it(checked, write, pages):
    path = write([asks("Which?", "two", image=name) for name in ("red.png", "lime.png", "blue.png")])
    assert [
        checked(dataset_name=path, **more)
        for more in ({}, {"on_bad_rows": "skip"}, {"lora_r": 3}, {"output_dir": "x"})
    ] == [3, 0, 0, 0]


def test_many_rows_are_checked_in_parallel(form_parse, write, images, monkeypatch):
    images(1, (8, 8))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    rows = [asks("q", str(n)) for n in range(1001)]
    rows[900]["answers"] = []
    path = write(rows)
    with pytest.raises(SystemExit, match="row 900: no accepted answer"):
        load_data(recipe, *form_parse(dataset_name=path))
    train, _ = load_data(recipe, *form_parse(dataset_name=path, eval_fraction=0, on_bad_rows="skip"))
    assert train["row"] == [n for n in range(1001) if n != 900]


def test_long_rows_are_dropped_or_refused_by_their_longest_answer(form_parse, write, images, capsys):
    images(1)
    rows = [asks("q", "two"), asks("q", "two", "two and " * 9), asks("q and " * 40, "two"), asks("q", "two")]
    settings = {"dataset_name": write(rows), "eval_fraction": 0}
    options = form_parse(**settings)
    collator = recipe.Collator(recipe.load_processor(options[0]), *options)
    lengths = [max(collator([{**row, "image": "red.png", "folder": str(options[0].dataset_name).rsplit("/", 1)[0],
                              "answers": [answer]}])["input_ids"].shape[1] for answer in row["answers"]) for row in rows]  # fmt: skip
    assert lengths[0] == lengths[3] < lengths[1] < lengths[2]
    for limit, kept in (
        (lengths[2], [0, 1, 2, 3]),
        (lengths[2] - 1, [0, 1, 3]),
        (lengths[1], [0, 1, 3]),
        (lengths[1] - 1, [0, 3]),
    ):
        train, _ = load_data(recipe, *form_parse(**settings, max_length=limit))
        assert train["row"] == kept
        out = capsys.readouterr().out
        assert (f"row 2: too long: {lengths[2]} tokens, --max_length is {limit}" in out) == (2 not in kept)
        assert (f"{4 - len(kept)} of 4 rows" in out) == (len(kept) < 4)
    with pytest.raises(
        SystemExit, match=rf"(?s)2 of 4 rows.*row 1: too long: {lengths[1]} .*row 2: too long.*--on_long_rows drop"
    ):
        load_data(recipe, *form_parse(**settings, max_length=limit, on_long_rows="stop"))


# -------------------------------------------------------------------------------------------------------- settings
def test_settings_that_may_be_none(form_flags, tmp_path):
    (tmp_path / "run.yaml").write_text("longest_edge: null\nquestion_column:\nlora_r: 3\n")
    settings, _ = recipe.parse(["--config", str(tmp_path / "run.yaml")])
    assert (settings.longest_edge, settings.question_column, settings.lora_r, settings.lora_alpha) == (
        None,
        None,
        3,
        8,
    )
    settings, _ = recipe.parse(["--config", str(tmp_path / "run.yaml"), "--longest_edge", "60", "--instruction", ""])
    assert (settings.longest_edge, settings.instruction) == (60, "")
    for argv, named in ((["--longest_edge", "9.5"], "9.5"), (["--image_splitting", "perhaps"], "perhaps")):
        with pytest.raises(SystemExit, match=f"^error: .*{named}"):
            recipe.parse([*form_flags(), *argv])


def test_without_evaluation_there_is_no_best_model(form_parse):
    _, training = form_parse(eval_strategy="no")
    assert training.load_best_model_at_end is False
    _, training = form_parse()
    assert training.load_best_model_at_end and training.metric_for_best_model == "anls" and training.greater_is_better
