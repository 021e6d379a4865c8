"""sft_llava.py: what is trained, on which tokens, read from which files. Labels are decoded and compared as text."""

import io
import itertools
import json
import os
import re
import shutil

import datasets
import numpy as np
import pytest
import torch
from conftest import chat, load_data, said
from PIL import Image
from transformers import AutoProcessor

import sft_llava
from tiny import llava

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{{ '<image>\n' if c.type == 'image' else c.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOS_IN_TEMPLATE = "{{ bos_token }}" + llava.CHAT_TEMPLATE
ROWS = [  # of every shape, in one batch
    said("<image>\nWhich digit is this?", "seven", image="red.png"),
    chat(("system", "Be brief."), ("user", "Is seven even or odd?"), ("assistant", "odd")),
    said(
        "<image>\n<image>\nWhich digits are these?",
        "six and two",
        "Even or odd?",
        "even",
        image=["blue.png", "red.png"],
    ),
    said("Which digit comes after two?", "three", "What follows three?", "four", "Thanks.", "a digit"),
]
ANSWERS = [["seven"], ["odd"], ["six and two", "even"], ["three", "four", "a digit"]]
MODELS = ["llava", "llava_next", "chatml", "bos"]


@pytest.fixture(scope="module")
def models(tiny_llava, tiny_next, tmp_path_factory):
    """Name -> model folder; beside LLaVA-1.5 and LLaVA-NeXT, processors with other chat templates."""
    folders = {"llava": tiny_llava / "model", "llava_next": tiny_next / "model"}
    for name, template in (("chatml", CHATML), ("bos", BOS_IN_TEMPLATE)):
        processor = llava.processor()
        processor.chat_template = template
        if name == "chatml":
            processor.tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
            processor.tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
        processor.save_pretrained(folders.setdefault(name, tmp_path_factory.mktemp(name)))
    return folders


def decode(tokenizer, ids):
    """Ids -> text, the leading space too, which `decode` alone would drop."""
    return tokenizer.decode([tokenizer.unk_token_id, *ids]).removeprefix(tokenizer.unk_token)


def trained(batch, tokenizer):
    """The runs of trained tokens of each row, as text. Every label is the token itself or -100."""
    rows = []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
        assert all(label in (-100, token) for token, label in zip(ids, labels))
        runs = itertools.groupby(zip(ids, labels), key=lambda pair: pair[1] != -100)
        rows.append([decode(tokenizer, [token for token, _ in run]) for learned, run in runs if learned])
    return rows


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def unpadded(batch, n=0):
    return batch["input_ids"][n][batch["attention_mask"][n].bool()].tolist()


def answers_of(data):
    """The last answer of each row."""
    return [sft_llava.text_of(sft_llava.normalize(row)[-1]) for row in data]


# ------------------------------------------------------------------------------------------------- what is trained
@pytest.mark.parametrize("pad", ["<pad>", "</s>", "<unk>"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model", ["llava", "llava_next"])
def test_trained_are_the_answers_and_their_eos(model, side, pad, models, collate, images):
    images(3)
    collator = collate(model_name_or_path=models[model])
    tokenizer = collator.processor.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = side, pad
    batch = collator(ROWS)
    assert trained(batch, tokenizer) == [[f" {answer}</s>" for answer in row] for row in ANSWERS]
    padded = batch["attention_mask"] == 0
    assert padded.any() and (batch["input_ids"][padded] == tokenizer.pad_token_id).all()
    assert (
        batch["attention_mask"][:, -1] == 1
    ).all()  # padded on the left, as generation needs it, whatever the tokenizer says
    assert len(batch["pixel_values"]) == 3 and ("image_sizes" in batch) == (model == "llava_next")
    for n, row in enumerate(ROWS):  # and a row is the same tokens alone as in company
        assert unpadded(batch, n) == unpadded(collator([row]))


@pytest.mark.parametrize("model, end", [("chatml", "<|im_end|>"), ("bos", "</s>")])
def test_any_template_works(model, end, models, collate, images):
    images(3)
    collator = collate(model_name_or_path=models[model])
    space = "" if model == "chatml" else " "
    expected = [[f"{space}{answer}{end}" for answer in row] for row in ANSWERS]
    assert trained(collator(ROWS), collator.processor.tokenizer) == expected


@pytest.mark.parametrize("model", MODELS)
def test_train_on_all_leaves_out_images_and_padding_only(model, models, collate, images):
    images(3)
    collator = collate(model_name_or_path=models[model], train_on="all")
    batch, processor = collator(ROWS), collator.processor
    for n, row in enumerate(ROWS):
        words = [i for i in unpadded(batch, n) if i != processor.image_token_id]
        assert batch["labels"][n][batch["labels"][n] != -100].tolist() == words
        text = processor.apply_chat_template(sft_llava.normalize(row)).replace("<image>", "")
        start = {"llava": "<s> ", "llava_next": "<s> ", "chatml": "<s>", "bos": ""}[model]
        assert decode(processor.tokenizer, words) == start + text


def test_text_alone_has_no_pixels(collate):
    assert set(collate()([ROWS[1], ROWS[3]])) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("model", MODELS)
def test_the_prompt_in_training_is_the_prompt_at_inference(model, models, collate, images, tmp_path):
    images(3)
    collator = collate(model_name_or_path=models[model])
    collator.processor.save_pretrained(tmp_path / "saved")
    saved = AutoProcessor.from_pretrained(tmp_path / "saved")
    bos = saved.tokenizer.bos_token_id
    for row in ROWS:
        ids, messages = unpadded(collator([row])), collator.messages_of(row)
        assert ids[0] == bos and ids.count(bos) == 1
        for n in (n for n, message in enumerate(messages) if message["role"] == "assistant"):
            prompt = saved.apply_chat_template(
                messages[:n], add_generation_prompt=True, tokenize=True, return_dict=True
            )
            assert prompt["input_ids"][0] == ids[: len(prompt["input_ids"][0])]
            text = saved.apply_chat_template(messages[:n], add_generation_prompt=True)
            pictures = [
                part["image"] for m in messages[:n] for part in m["content"] if part["type"] == "image"
            ] or None
            stock = saved(text=text, images=pictures, add_special_tokens=model != "bos")["input_ids"][0]
            assert stock == prompt["input_ids"][0]


def test_the_saved_template_ends_answers_with_eos_where_the_public_one_does_not(models, collate):
    turns = [{"role": role, "content": [{"type": "text", "text": role}]} for role in ("user", "assistant", "user")]
    public = AutoProcessor.from_pretrained(models["llava"])
    ours = collate().processor
    assert public.apply_chat_template(turns) == "USER: user ASSISTANT: assistant USER: user "
    assert ours.apply_chat_template(turns) == "USER: user ASSISTANT: assistant</s> USER: user "


def test_contents_may_be_strings_with_the_saved_template(collate):
    turns = [{"role": "user", "content": "Even or odd?"}, {"role": "assistant", "content": "odd"}]
    assert collate().processor.apply_chat_template(turns) == "USER: Even or odd? ASSISTANT: odd</s> "


@pytest.mark.parametrize("model", ["llava_next", "chatml"])
def test_a_template_that_ends_answers_is_left_alone(model, models, collate):
    assert collate(model_name_or_path=models[model]).processor.chat_template == (
        AutoProcessor.from_pretrained(models[model]).chat_template
    )


def test_a_missing_pad_token_is_no_obstacle(collate, tmp_path):
    processor = llava.processor()
    processor.tokenizer.pad_token = None
    processor.save_pretrained(tmp_path / "no_pad")
    collator = collate(model_name_or_path=tmp_path / "no_pad")
    assert trained(collator(ROWS[1::2]), collator.processor.tokenizer)[0] == [" odd</s>"]


# ---------------------------------------------------------------------------------------------------------- images
def colours(batch):
    """One letter a picture, by its brightest channel."""
    return "".join("rgb"[picture.flatten(1).mean(1).argmax()] for picture in batch["pixel_values"])


def test_images_keep_their_order_and_number_of_tokens(collate, images):
    collator, names = collate(), images(3)
    question, parts = {"type": "text", "text": "Which?"}, [{"type": "image", "index": n} for n in (2, 0, 1)]
    rows = [said("<image>Which?<image>", "six", "And <image>?", "two", image=names)]
    rows += [
        chat(("user", p), ("assistant", "six"), images=names)
        for p in ([*parts, question], [question, *sorted(parts, key=str)])
    ]
    batches = [collator([row]) for row in rows]
    assert [colours(batch) for batch in batches] == ["rgb", "brg", "rgb"]
    for batch in batches:
        assert (batch["input_ids"] == collator.processor.image_token_id).sum() == 3 * 16
    assert torch.equal(batches[1]["pixel_values"], batches[2]["pixel_values"][[2, 0, 1]])
    assert colours(collator([rows[1], ROWS[1], rows[0]])) == "brgrgb"


def test_llava_json_and_messages_give_the_same_batch(tiny_llava, parse):
    data = {}
    for name in ("data/train.parquet", "json/train.json"):
        settings, training = parse(
            dataset_name=tiny_llava / name, image_folder=tiny_llava / "json" / "images", eval_fraction=0
        )
        collator = sft_llava.Collator(sft_llava.load_processor(settings), settings, training)
        rows = load_data(sft_llava, settings, training)[0].sort("row").select(range(40))
        data[name] = [collator([row]) for row in rows], collator([*rows])
    (one, one_batch), (other, other_batch) = data.values()
    assert all(map(same, one, other)) and same(one_batch, other_batch)
    assert {len(batch.get("pixel_values", ())) for batch in one} == {0, 1, 2}  # what was compared


def test_forms_of_one_row(collate, images):
    """A picture as path, list of one, absolute path, bytes, PIL image; contents as strings or as parts."""
    collator, [red] = collate(), images(1)
    path = os.path.join(collator.folder, red)
    with open(path, "rb") as file:
        png = file.read()
    cells = [
        red,
        [red],
        path,
        [{"bytes": png, "path": None}],
        {"bytes": None, "path": red},
        Image.open(io.BytesIO(png)),
    ]
    batches = [collator([said("<image>\nWhich?", "two", image=cell)]) for cell in cells]
    content = [{"type": "image", "index": None, "text": None}, {"type": "text", "text": "Which?", "index": None}]
    batches += [collator([{**chat(("user", content), ("assistant", "two")), "images": cell}]) for cell in cells]
    assert all(same(batches[0], batch) for batch in batches)
    assert colours(batches[0]) == "r"

    parts = [(role, [{"type": "text", "text": text}]) for role, text in (("user", "Which?"), ("assistant", "two"))]
    text_only = [said("Which?", "two"), chat(("user", "Which?"), ("assistant", "two")), chat(*parts)]
    text_only += [said("Which?", "two", image=""), {**text_only[0], "image": None, "messages": None}]
    assert all(same(collator([text_only[0]]), collator([row])) for row in text_only)


def picture(mode, *pixels, **changes):
    image = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    image.info.update(changes)
    return image


def palette(**changes):
    image = picture("P", 0, 1, **changes)
    image.putpalette([255, 0, 0, 0, 0, 255])
    return image


WHITE, GREY, BLACK, RED, BLUE = (255,) * 3, (128,) * 3, (0,) * 3, (255, 0, 0), (0, 0, 255)
MODES = {
    "1": (picture("1", 0, 255), "png", [BLACK, WHITE]),
    "L": (picture("L", 0, 128), "png", [BLACK, GREY]),
    "LA": (picture("LA", (0, 255), (0, 0), (0, 127)), "png", [BLACK, WHITE, GREY]),
    "P": (palette(), "png", [RED, BLUE]),
    "P transparent": (palette(transparency=1), "png", [RED, WHITE]),
    "P GIF": (palette(transparency=1), "gif", [RED, WHITE]),
    "RGB": (picture("RGB", RED, GREY), "png", [RED, GREY]),
    "RGB transparent": (picture("RGB", RED, BLACK, transparency=BLACK), "png", [RED, WHITE]),
    "RGBA": (picture("RGBA", (*RED, 255), (0, 0, 0, 0)), "png", [RED, WHITE]),
    "CMYK": (picture("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), "tiff", [RED, BLACK]),
    "I;16": (picture("I;16", 0, 128 * 257, 65535), "png", [BLACK, GREY, WHITE]),
    "I": (picture("I", 0, 128 * 257, 65535), "tiff", [BLACK, GREY, WHITE]),
    "I of 8 bits": (picture("I", 0, 128, 255), "tiff", [BLACK, GREY, WHITE]),
    "F": (picture("F", 0.0, 128.5, 255.0), "tiff", [BLACK, GREY, WHITE]),
    "F to 1": (picture("F", 0.0, 128.5 / 255, 1.0), "tiff", [BLACK, GREY, WHITE]),
}


@pytest.mark.parametrize("image, kind, expected", MODES.values(), ids=MODES)
def test_every_mode_becomes_rgb_on_white(image, kind, expected, tmp_path):
    image.save(tmp_path / f"x.{kind}")
    for cell in (str(tmp_path / f"x.{kind}"), {"bytes": (tmp_path / f"x.{kind}").read_bytes()}, image):
        loaded = sft_llava.load_image(cell)
        assert loaded.mode == "RGB"
        assert [loaded.getpixel((x, 0)) for x in range(loaded.width)] == expected


@pytest.mark.parametrize(
    "orientation, size, first", [(1, (2, 1), RED), (3, (2, 1), BLUE), (6, (1, 2), RED), (8, (1, 2), BLUE)]
)
def test_pictures_are_upright(orientation, size, first, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture("RGB", RED, BLUE).save(tmp_path / "x.png", exif=exif)
    loaded = sft_llava.load_image(str(tmp_path / "x.png"))
    assert (loaded.size, loaded.getpixel((0, 0))) == (size, first)


# ------------------------------------------------------------------------------------------------------- data sets
@pytest.fixture
def saved(write, tmp_path):
    """Kind -> path: the same 20 rows to train on (answers 0..19) in every form, some with a split of 5 (100..104)."""
    train, test = ([said("q", str(n)) for n in numbers] for numbers in (range(20), range(100, 105)))
    paths = {name: write(train, f"rows.{name}") for name in ("json", "jsonl", "parquet")}
    for name in ("folder", "json folder", "saved", "saved dict"):
        paths[name] = tmp_path / name
    for kind, name in (("parquet", "folder"), ("json", "json folder")):
        paths[name].mkdir()
        write(train, f"{name}/train.{kind}")
        write(test, f"{name}/test.{kind}")
    train, test = map(datasets.Dataset.from_list, (train, test))
    train.save_to_disk(paths["saved"])
    datasets.DatasetDict(train=train, test=test, other=test.select([3])).save_to_disk(paths["saved dict"])
    return paths


KINDS = {
    "json": False,
    "jsonl": False,
    "parquet": False,
    "folder": True,
    "json folder": True,
    "saved": False,
    "saved dict": True,
}


@pytest.mark.parametrize("kind, has_test", KINDS.items())
def test_every_kind_of_data_set_is_read(kind, has_test, saved, parse):
    train, held_out = load_data(sft_llava, *parse(dataset_name=saved[kind], eval_fraction=0.2, seed=5))
    again = load_data(sft_llava, *parse(dataset_name=saved[kind], eval_fraction=0.2, seed=5))
    other = load_data(sft_llava, *parse(dataset_name=saved[kind], eval_fraction=0.2, seed=6))
    assert answers_of(again[0]) == answers_of(train) and answers_of(again[1]) == answers_of(held_out)
    assert answers_of(train) == [str(n) for n in train["row"]]  # `row` is the number in the source
    if has_test:
        assert train["row"] == list(range(20)) and sorted(held_out["row"]) == list(range(5))
        assert sorted(answers_of(held_out)) == [str(n) for n in range(100, 105)]
    else:
        assert (len(train), len(held_out)) == (16, 4)
        assert sorted(train["row"]) != sorted(other[0]["row"])
        assert sorted([*train["row"], *held_out["row"]]) == list(range(20))
        assert answers_of(held_out) == [str(n) for n in held_out["row"]]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"dataset_name": "saved dict", "dataset_test_split": "other"}, ["103"]),
        ({"dataset_name": "json", "eval_dataset_name": "saved dict", "dataset_test_split": "other"}, ["103"]),
        ({"dataset_name": "json", "eval_dataset_name": "jsonl", "max_eval_rows": 20}, [str(n) for n in range(20)]),
        ({"dataset_name": "json", "eval_fraction": 0}, None),
        ({"dataset_name": "saved dict", "dataset_train_split": "test", "dataset_test_split": "other"}, ["103"]),
    ],
)
def test_what_is_evaluated_on_can_be_said(settings, expected, saved, parse):
    paths = {key: saved.get(value, value) for key, value in settings.items()}
    train, held_out = load_data(sft_llava, *parse(**paths))
    assert len(train) == (5 if "dataset_train_split" in settings else 20)
    assert (held_out and sorted(answers_of(held_out))) == (expected and sorted(expected))


def keys(row):
    image = row.get("image") or []
    return {image} if isinstance(image, str) else set(image)


CHAIN = [
    ["a"],
    ["a", "b"],
    ["c", "b"],
    ["c"],
]  # the first and the last share no picture, and are connected all the same


@pytest.mark.parametrize("seed", range(6))
def test_rows_connected_by_pictures_stay_on_one_side(seed, parse, write, tmp_path):
    names = {name for some in CHAIN for name in some} | {"lone"}
    for n, name in enumerate(sorted(names)):
        Image.new("RGB", (56, 56), (n, 0, 0)).save(tmp_path / f"{name}.png")
    rows = [
        said("<image>" * len(some) + "q", "a", image=[f"{name}.png" for name in some])
        for some in [*CHAIN, ["lone"], ["lone"]]
    ]
    rows += [said("q", str(n)) for n in range(6)]
    train, held_out = load_data(sft_llava, *parse(dataset_name=write(rows), eval_fraction=0.3, seed=seed))
    numbers = set(train["row"]), set(held_out["row"])
    assert not numbers[0] & numbers[1] and numbers[0] | numbers[1] == set(range(12)) and all(numbers)
    for together in ({0, 1, 2, 3}, {4, 5}):
        assert together <= numbers[0] or together <= numbers[1]
    pictures = [{key for row in side for key in keys(row)} for side in (train, held_out)]
    assert not pictures[0] & pictures[1]
    assert len(pictures[1]) + sum(n > 5 for n in numbers[1]) == 3  # of ten images, a row without one counted as one


def test_all_rows_connected_cannot_be_divided(parse, write, images, capsys):
    red, lime = images(2)
    rows = [
        said("<image>q", "a", image=red),
        said("<image><image>q", "b", image=[red, lime]),
        said("<image>q", "c", image=lime),
    ]
    with pytest.raises(SystemExit, match="^error: 3 rows cannot be divided .*--eval_fraction 0"):
        load_data(sft_llava, *parse(dataset_name=write(rows), eval_fraction=0.5))


def test_rows_trained_on_are_not_held_out_by_default(saved, parse):
    train, held_out = load_data(sft_llava, *parse(dataset_name=saved["saved dict"], dataset_train_split="test"))
    assert held_out is None or not set(answers_of(train)) & set(answers_of(held_out))


def test_evaluation_data_has_its_own_image_folder(parse, tmp_path):
    for name in COLOUR_FOLDERS:
        (tmp_path / name).mkdir()
        Image.new("RGB", (56, 56), name).save(tmp_path / name / "x.png")
        (tmp_path / name / "rows.json").write_text(json.dumps([said("<image>\nWhich?", "two", image="x.png")]))
    settings, training = parse(**{key: tmp_path / name / "rows.json" for name, key in COLOUR_FOLDERS.items()})
    collator = sft_llava.Collator(sft_llava.load_processor(settings), settings, training)
    assert [colours(collator([data[0]])) for data in load_data(sft_llava, settings, training)] == ["r", "b"]


COLOUR_FOLDERS = {"red": "dataset_name", "blue": "eval_dataset_name"}


@pytest.mark.parametrize("kind", ["json", "saved dict"])
def test_evaluation_is_bounded_to_the_same_rows_each_time(kind, saved, parse):
    settings = {"dataset_name": saved[kind], "eval_fraction": 0.5, "max_eval_rows": 3}
    runs = [load_data(sft_llava, *parse(**settings, seed=seed))[1]["row"] for seed in (1, 1, 2)]
    assert len(runs[0]) == 3 and runs[0] == runs[1] != runs[2]


def test_types_may_differ_between_rows(parse, write, images, collate):
    red, lime = images(2)
    megabytes = "x" * 6_000_000  # the first two rows are more than a JSON reader likes to take at once
    rows = [
        said("<image>\nWhich?", "one", image=red, id=1, note=megabytes),
        said("<image>\nWhich?", "two", image=lime, id=2, note=megabytes),
        said("<image><image>", "three", image=[lime, red], id="three", note=[megabytes]),
        said("Which?", "four", note=[megabytes]),
    ]
    parts = [{"type": "image"}, {"type": "text", "text": "Which?"}]
    rows_of_messages = [
        chat(("user", "Which?"), ("assistant", "one")),
        chat(("user", parts), ("assistant", [{"type": "text", "text": "two"}]), images=[red]),
        chat(("user", [*parts, {"type": "image", "index": 1}]), ("assistant", "three"), images=[red, lime]),
    ]
    for given, name in itertools.product(
        (rows, rows[::-1], rows_of_messages, rows_of_messages[::-1]), ("x.json", "x.jsonl")
    ):
        train, _ = load_data(sft_llava, *parse(dataset_name=write(given, name), eval_fraction=0))
        assert answers_of(train) == answers_of(given)
        collator = collate()
        assert all(same(collator([one]), collator([other])) for one, other in zip(train, given, strict=True))


def test_texts_that_look_like_json_stay_texts(parse, write, images, tmp_path):
    texts = ["1", "1e3", "07", "true", "null", '"quoted"', '{"total": 6}', "[1, 2]", "é 😀 \n / \\"]
    rows = [chat(("user", "q"), ("assistant", text)) for text in texts]
    rows += [chat(("user", [{"type": "text", "text": text}]), ("assistant", text)) for text in texts]
    train, _ = load_data(sft_llava, *parse(dataset_name=write(rows), eval_fraction=0))
    assert answers_of(train) == texts * 2
    os.rename(tmp_path / images(1)[0], tmp_path / "7")
    rows = [said("<image>", text, image=image) for text, image in zip(texts, ("7", ["7"]))]
    train, _ = load_data(sft_llava, *parse(dataset_name=write(rows), eval_fraction=0))
    assert train["image"] == ["7", ["7"]]


@pytest.fixture
def checked(parse, write, images, monkeypatch):
    """A function: settings as keywords -> how many of three rows with pictures load_data gave to the collator."""
    calls, call = [], sft_llava.Collator.__call__
    monkeypatch.setattr(sft_llava.Collator, "__call__", lambda self, rows: [calls.extend(rows), call(self, rows)][1])
    path = write([said("<image>\nWhich?", "two", image=name) for name in images(3)])

    def make(**settings):
        calls.clear()
        load_data(sft_llava, *parse(dataset_name=path, eval_fraction=0, **settings))
        return len(calls)

    return make


def test_the_check_is_cached_until_a_picture_changes(checked, tmp_path):
    assert [checked(), checked(), checked(on_long_rows="stop", learning_rate=1)] == [3, 0, 0]
    Image.new("RGB", (9, 9)).save(tmp_path / "lime.png")
    assert [checked(), checked()] == [3, 0]
    (tmp_path / "other").mkdir()
    (tmp_path / "red.png").write_bytes(b"not a picture any more")
    with pytest.raises(SystemExit, match="row 0: unreadable image"):
        checked()
    with pytest.raises(SystemExit, match="row 2"):
        checked(image_folder=tmp_path / "other")


def test_the_check_is_cached_whatever_the_settings_that_have_no_say_in_it(checked):
    assert [checked(), checked(on_bad_rows="skip"), checked(lora_r=8)] == [3, 0, 0]


def test_many_rows_are_checked_in_parallel(parse, write):
    rows = [said("q", str(n)) for n in range(1200)]
    rows[1100]["conversations"][1]["value"] = ""
    path = write(rows)
    with pytest.raises(SystemExit, match="row 1100: empty answer"):
        load_data(sft_llava, *parse(dataset_name=path, dataset_num_proc=2))
    settings = parse(dataset_name=path, dataset_num_proc=2, eval_fraction=0, on_bad_rows="skip")
    assert load_data(sft_llava, *settings)[0]["row"] == [n for n in range(1200) if n != 1100]


def test_columns_of_the_names_used_here_do_no_harm(parse, write):
    rows = [said("q", str(n), row="mine", length="long", labels=3) for n in range(3)]
    train, _ = load_data(sft_llava, *parse(dataset_name=write(rows), eval_fraction=0))
    assert train["row"] == [0, 1, 2] and all(length == train["length"][0] > 5 for length in train["length"])


def test_long_rows_are_dropped_or_refused_never_cut(parse, write, images, capsys):
    [red] = images(1)
    rows = [said("q", "two"), said("<image>\nq", "two", image=red), said("q", "two and " * 40), said("q", "six")]
    settings = {"dataset_name": write(rows), "eval_fraction": 0}
    lengths = load_data(sft_llava, *parse(**settings, max_length="none"))[0]["length"]
    assert lengths[0] < 20 < lengths[1] < 40 < lengths[2]
    capsys.readouterr()
    for limit, kept in ((lengths[2], [0, 1, 2, 3]), (lengths[2] - 1, [0, 1, 3]), (lengths[1] - 1, [0, 3])):
        options = parse(**settings, max_length=limit)
        train, _ = load_data(sft_llava, *options)
        assert (train["row"], train["length"]) == (kept, [lengths[n] for n in kept])
        assert ("too long" in capsys.readouterr().out) == (len(kept) < 4)
    collator = sft_llava.Collator(sft_llava.load_processor(options[0]), *options)
    with pytest.raises(sft_llava.BadRow, match=f"too long: {lengths[2]} tokens, --max_length is {limit}"):
        collator([rows[2]])
    with pytest.raises(
        SystemExit, match=rf"(?s)2 of 4 rows.*row 1: too long: {lengths[1]} .*row 2: too long.*--on_long_rows drop"
    ):
        load_data(sft_llava, *parse(**settings, max_length=limit, on_long_rows="stop"))


def test_dropped_rows_are_counted_in_print(parse, write, capsys):
    rows = [said("q", "two"), said("q", "two and " * 40)]
    load_data(sft_llava, *parse(dataset_name=write(rows), eval_fraction=0, max_length=30))
    assert re.search(r"1 of 2 rows(?s:.*)row 1: too long: \d+ tokens", capsys.readouterr().out)


def test_the_printed_example(collate, images):
    images(3)
    collator = collate()
    batch = collator([ROWS[2], ROWS[3]])
    assert sft_llava.mark_trained_tokens(batch, collator.processor) == (
        "<s> USER: <image> x 16\n<image> x 16\nWhich digits are these? ASSISTANT:« six and two</s>» "
        "USER: Even or odd? ASSISTANT:« even</s>» "
    )
    assert sft_llava.mark_trained_tokens(collator([ROWS[1], ROWS[2]]), collator.processor) == (  # padded
        "<s> Be brief. USER: Is seven even or odd? ASSISTANT:« odd</s>» "
    )


def test_settings_that_may_be_none_or_have_choices(flags):
    assert sft_llava.parse(flags(max_length="none"))[1].max_length is None
    with pytest.raises(SystemExit, match="^error: .*everything"):
        sft_llava.parse(flags(train_on="everything"))


def test_what_else_is_read(collate, write, images, tmp_path, parse):
    """Bytes in place of a picture, whole floats as indices (pandas' nullable integers), a 12-bit picture, no narrow one."""
    name = images(1)[0]
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "index": 0.0}]},
            {"role": "assistant", "content": "red"},
        ]
    }
    collator = collate()
    batches = [collator([{**row, "images": [cell]}]) for cell in (name, (tmp_path / name).read_bytes())]
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    ramp = Image.fromarray((np.arange(4096).reshape(64, 64)).astype(np.uint16))
    grey = np.asarray(sft_llava.load_image(ramp))[..., 0]
    assert grey.min() == 0 and grey.max() == 255 and abs(int(grey[32, 0]) - 127) <= 1
    with pytest.raises(sft_llava.BadRow, match="image too narrow: .* 1000 x 4 pixels"):
        sft_llava.load_image(Image.new("RGB", (1000, 4)))
    (tmp_path / "set" / "pics").mkdir(parents=True)
    Image.new("RGB", (56, 56), "blue").save(tmp_path / "set" / "pics" / "a.png")
    sft_llava.datasets.Dataset.from_list([said("<image>", "blue", image="pics/a.png")] * 2).save_to_disk(
        tmp_path / "set" / "saved"
    )
    (tmp_path / "set" / "saved" / "pics").mkdir()
    shutil.copy(tmp_path / "set" / "pics" / "a.png", tmp_path / "set" / "saved" / "pics")
    assert len(load_data(sft_llava, *parse(dataset_name=tmp_path / "set" / "saved", eval_strategy="no"))[0]) == 2
