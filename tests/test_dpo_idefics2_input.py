"""dpo_idefics2.py and bad input: one message that names the row and the remedy, exit status 1, before any weights load."""

import base64
import json
import re
import shutil
import subprocess
import sys

import datasets
import pytest
import torch
from conftest import ROOT, Loaded, load_data, prefers, stopped_by
from PIL import Image
from test_idefics2_docvqa_input import FILES as DOCVQA_FILES
from transformers import CLIPProcessor

import dpo_idefics2 as recipe
from tiny import idefics2, llava, preferences

HALF = {
    "half a character": (*DOCVQA_FILES["half a character"][:2], r"row 0 has invalid Unicode .a lone surrogate.; fix")
}
FILES = DOCVQA_FILES | HALF
GOOD = prefers("Which digit is this?", "It is a seven.", "It is a two.")
END, FAKE = "<end_of_utterance>", "<fake_token_around_image>"
IMAGE = "{{ '<image>' if c.type == 'image' else c.text }}"


@pytest.fixture
def stops(pair_flags, monkeypatch):
    """A function: settings as keywords -> the message with which main() ends, before it loads any weights."""
    return stopped_by(recipe, pair_flags, monkeypatch)


def shows(image):
    return {**GOOD, "image": image}


def with_text(which, text):
    return {**GOOD, which: text}


def message(text, role=None):
    return [{"content": text} if role is None else {"role": role, "content": text}]


NO_TEXT, NO_IMAGE = "is not a text: ", "unreadable image: "
NEEDED = "images; give one path, or its bytes: see --image_column"
TEXTS = {  # of a question or an answer: a cell, what the message says behind its name
    "a number": (47, NO_TEXT + "47; .*quotes"),
    "a fraction": (0.5, NO_TEXT + "0.5"),
    "a truth value": (True, NO_TEXT + "True"),
    "a dict": ({"text": "x"}, NO_TEXT + ".*text"),
    "a message out of its list": ({"role": "user", "content": "x"}, NO_TEXT + ".*content"),
    "no message": ([], NO_TEXT + r"\[\]; make it .*a list of one message of the (user|assistant) with one text"),
    "a list of a text": (["x"], NO_TEXT + r"\['x'\]"),
    "a list of null": ([None], NO_TEXT + r"\[None\]"),
    "a list of lists": ([["x"]], NO_TEXT + r"\[\['x'\]\]"),
    "several messages": (
        [*message("x", "user"), *message("y", "assistant")],
        NO_TEXT + ".*'y'.*; make it .* one message",
    ),
    "a message without content": ([{"role": None}], NO_TEXT + r"\[{'role': None}\]"),
    "a message of null": (message(None), NO_TEXT + ".*None"),
    "a message of a number": (message(5), NO_TEXT + ".*5"),
    "a message of a dict": (message({"type": "text", "text": "x"}), NO_TEXT),
    "a message of LLaVA's": ([{"from": "human", "value": "x"}], NO_TEXT + ".*'human'"),
    "a message of no parts": (message([]), NO_TEXT),
    "a message of an image": (message([{"type": "image"}]), NO_TEXT),
    "a message of bare texts": (message(["x"]), NO_TEXT + r".*\['x'\]"),
    "a message of null and a part": (message([None, {"type": "text", "text": "x"}]), NO_TEXT),
    "a message of two texts": (
        message([{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]),
        NO_TEXT + ".*'x'.*'y'.*; make it .* with one text",
    ),
    "a message of a part of null": (message([{"type": "text", "text": None}]), NO_TEXT + ".*None"),
    "a message of a part without text": (message([{"type": "text"}]), NO_TEXT),
    "a message of the system": (message("x", "system"), NO_TEXT + ".*'system'.* one message of the (user|assistant)"),
}
BLANKS = {
    "empty": "",
    "blank": " \r\n\t",
    "a no-break space": "\u00a0",
    "a message of blanks": message([{"type": "text", "text": " "}]),
}
TOKENS = ["<image>", FAKE, END, "<s>", "</s>", "<unk>"]
BAD_ROWS = {  # what is wrong: the row, what the message says
    **{f"{which} {kind}": (with_text(which, cell), f"{which} {expected}")
       for which in ("question", "chosen", "rejected") for kind, (cell, expected) in TEXTS.items()},
    **{f"{which} {kind}": (with_text(which, cell), f"empty {which}: .*white space")
       for which in ("question", "chosen", "rejected") for kind, cell in BLANKS.items()},
    **{f"{token} in {which}": (with_text(which, text), f"control token: .*{token}.* in the {which}.*remove it")
       for which in ("question", "chosen", "rejected") for token in TOKENS for text in (f"What {token}?", message(f"{token}\nWhat?"))},
    "question null": (with_text("question", None), f"question {NO_TEXT}None"),
    "question missing": ({key: GOOD[key] for key in ("image", "chosen", "rejected")}, f"question {NO_TEXT}None"),
    "question of the assistant": (with_text("question", message("x", "assistant")), f"question {NO_TEXT}.*'assistant'.* one message of the user"),
    "chosen null": (with_text("chosen", None), "one answer: the row has only a rejected answer"),
    "chosen missing": ({key: GOOD[key] for key in ("image", "question", "rejected")}, "one answer: the row has only a rejected answer"),
    "chosen of the user": (with_text("chosen", message("x", "user")), f"chosen {NO_TEXT}.*'user'.* one message of the assistant"),
    "rejected null": (with_text("rejected", None), "one answer: the row has only a chosen answer"),
    "rejected not a number": (with_text("rejected", float("nan")), "one answer: the row has only a chosen answer"),
    "rejected of the user": (with_text("rejected", message("x", "user")), f"rejected {NO_TEXT}.*'user'.* one message of the assistant"),
    "no answers": ({"image": "red.png", "question": "q"}, "no answers: .*--chosen_column and --rejected_column"),
    "answers null": ({**GOOD, "chosen": None, "rejected": None}, "no answers: .*--chosen_column and --rejected_column"),
    "equal answers": (prefers("q", "a b", "a b"), "equal answers: chosen 'a b' and rejected 'a b' are the same to the tokenizer"),
    "answers equal but for space around": (prefers("q", " a b\n", "\ta b"), "equal answers: chosen 'a b' and rejected 'a b' are the same"),
    "a text and a message that are equal": (prefers("q", "a b", message("a b ", "assistant")), "equal answers"),
    "answers equal to the tokenizer": (prefers("q", "a b", "a\u2581b"), "equal answers: chosen 'a b' and rejected 'a\u2581b' are the same to the tokenizer"),
    "image null": (shows(None), "not one image: 0 " + NEEDED),
    "image an empty list": (shows([]), "not one image: 0 " + NEEDED),
    "image a list of null": (shows([None]), "not one image: 0 " + NEEDED),
    "image missing": ({key: GOOD[key] for key in ("question", "chosen", "rejected")}, "not one image: 0 " + NEEDED),
    "image without bytes": (shows({"bytes": None, "path": None}), "not one image: 0 " + NEEDED),
    "image of no known kind": (shows({"url": "x"}), "not one image: 0 " + NEEDED),
    "two images": (shows(["red.png", "lime.png"]), "not one image: 2 " + NEEDED),
    "image a list of a list": (shows([["red.png"]]), NO_IMAGE + r"\['red.png'\]"),
    "image of numbers": (shows([[[0, 0, 0]] * 9] * 9), "not one image: 9 " + NEEDED),
    "image a number": (shows(5), NO_IMAGE + "5 "),
    "image a list of a number": (shows([5]), NO_IMAGE + "5 "),
    "bytes that are a text": (shows({"bytes": "red.png"}), NO_IMAGE + "its bytes"),
    "no such image": (shows("nowhere.png"), NO_IMAGE + ".*nowhere.png.*No such file.*--image_folder"),
    "image a path without a file": (shows({"path": "nowhere.png", "bytes": None}), NO_IMAGE + ".*nowhere.png.*No such file.*--image_folder"),
    "image in the web": (shows("https://example.org/red.png"), NO_IMAGE + ".*https://example.org/red.png .No such file"),
    "image of an empty name": (shows(""), "not one image: 0 " + NEEDED),
    "image a folder": (shows("."), NO_IMAGE + ".*Is a directory"),
    "several images in one file": (shows("pages.tiff"), "several images: .*pages.tiff holds 3, .*its own file"),
    "a moving picture": (shows("film.gif"), "several images: .*film.gif holds 3"),
    "a moving picture, too": (shows("film.webp"), "several images: .*film.webp holds 3"),
    "image of no numbers": (shows("nan.tiff"), NO_IMAGE + ".*nan.tiff .its brightest value is nan"),
    "image of infinite numbers": (shows("inf.tiff"), NO_IMAGE + ".*inf.tiff .its brightest value is inf"),
    "image of negative numbers": (shows("negative.tiff"), NO_IMAGE + ".*negative.tiff .its brightest value is -1"),
    "image empty": (shows("empty.png"), NO_IMAGE + ".*empty.png"),
    "image truncated": (shows("truncated.jpg"), NO_IMAGE + ".*truncated.jpg.*truncated"),
    "image no picture": (shows("text.png"), NO_IMAGE + ".*text.png"),
    "image with a NUL in its name": (shows("red\0.png"), NO_IMAGE),
    "image too wide": (shows("wide.png"), "image too narrow: .*wide.png.*1000 x 49"),
    "image too high": (shows("high.png"), "image too narrow: .*high.png.*49 x 1000"),
}  # fmt: skip


def test_bad_rows_are_named_with_a_remedy(stops, write, odd_images):
    """All of them in one file: there are as many lines as bad rows, in their order."""
    for start in range(0, len(BAD_ROWS), 20):  # so many are listed
        some = list(BAD_ROWS.items())[start : start + 20]
        lines = stops(dataset_name=write([GOOD, *(row for _, (row, _) in some), GOOD])).splitlines()
        assert (
            lines[0].startswith(f"error: {len(some)} of {len(some) + 2} rows of ") and len(lines) == len(some) + 2
        ), lines
        assert lines[-1] == "Fix these rows (counted from 0), or train without them: --on_bad_rows skip"
        for n, (line, (name, (_, expected))) in enumerate(zip(lines[1:], some), 1):
            assert re.match(rf"  row {n}: {expected}", line), (name, line)


def test_a_picture_written_as_text_is_not_printed_as_a_whole(stops, write, odd_images, tmp_path):
    text = base64.b64encode((tmp_path / "large.png").read_bytes() * 100).decode()
    message = stops(dataset_name=write([GOOD, shows(text), shows({"path": text, "bytes": None})]))
    assert len(message) < 1200 and re.search(rf"row 1: {NO_IMAGE}.* \(File name too long\)", message), message


def test_an_image_too_large_is_named(stops, write, odd_images, monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 56 * 56)  # PIL refuses twice as many
    Image.new("RGB", (112, 112)).save(tmp_path / "photo.png")
    message = stops(dataset_name=write([GOOD, shows("photo.png")]))
    assert re.search(r"\n  row 1: unreadable image: .*photo.png .*12544 pixels.*shrink", message), message


def test_what_a_telephone_writes_is_one_image(pair_collate, odd_images, tmp_path):
    collate = pair_collate()
    for cell in ("telephone.jpg", [(tmp_path / "telephone.jpg").read_bytes()]):
        assert collate.messages_of(shows(cell))[0]["content"][0]["image"].getpixel((5, 5))[0] > 240


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_bad_rows_of_other_files_and_with_ids(name, stops, write, odd_images):
    rows = [{**shows(image), "id": f"n{n}"} for n, image in enumerate(["red.png", "text.png", "nowhere.png"])]
    rows += [{**GOOD, "rejected": GOOD["chosen"], "id": ""}, {**GOOD, "question": " ", "id": None}]
    message = stops(dataset_name=write(rows, name))
    assert re.search(
        r"4 of 5 rows of .*rows\.\w+ .*\n  row 1 \(id n1\): .*\n  row 2 \(id n2\): .*\n  row 3: equal.*\n  row 4: empty",
        message,
    )


def test_ids_may_be_numbers(stops, write, odd_images):
    assert re.search(
        r"\n  row 1 \(id 0\): ", stops(dataset_name=write([{**GOOD, "id": 5}, {**shows("text.png"), "id": 0}]))
    )


TYPES = {  # of a parquet file's column: a cell, what the message says
    "question int": ("question", 5, f"question {NO_TEXT}5"),
    "question bytes": ("question", b"What?", f"question {NO_TEXT}b'What"),
    "chosen null": ("chosen", None, "one answer: .*only a rejected answer"),
    "chosen float": ("chosen", float("nan"), f"chosen {NO_TEXT}nan"),
    "rejected list": ("rejected", ["x"], f"rejected {NO_TEXT}.*'x'"),
    "image bytes": ("image", b"\x89PNG no", NO_IMAGE + "its bytes .cannot identify"),
    "image bytes in a list": ("image", [b"\x89PNG no"], NO_IMAGE + "its bytes .cannot identify"),
    "image numbers": ("image", [[[0, 0, 0]] * 9] * 9, "not one image: 9 " + NEEDED),
}


@pytest.mark.parametrize("which, cell, expected", TYPES.values(), ids=TYPES)
def test_columns_of_another_type(which, cell, expected, stops, write, odd_images):
    message = stops(dataset_name=write([{**GOOD, which: cell}] * 2, "rows.parquet"))
    assert (
        re.search(rf"2 of 2 rows(?s:.*)  row 0: {expected}(?s:.*)  row 1: {expected}", message)
        and "x89" not in message
    ), message


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("listed", [False, True])
def test_embedded_images_that_are_none(listed, kind, stops, tmp_path, odd_images):
    good = (tmp_path / "red.png").read_bytes()
    cells = [
        {"bytes": good, "path": None},
        {"bytes": b"no picture", "path": "photo.png"},
        {"bytes": b"no picture", "path": None},
        None,
    ]
    kinds = datasets.Features({name: datasets.Value("string") for name in GOOD} | {"image": datasets.Image()})
    if listed:
        kinds["image"], cells = datasets.List(datasets.Image()), [cell and [cell] for cell in cells]
    data = datasets.Dataset.from_list([shows(cell) for cell in cells], features=kinds)
    (data.to_parquet if kind == "parquet" else data.save_to_disk)(tmp_path / f"x.{kind}")
    message = stops(dataset_name=tmp_path / f"x.{kind}")
    assert re.search(
        rf"3 of 4 (?s:.)*row 1: .*photo.png(?s:.)*row 2: {NO_IMAGE}its bytes (?s:.)*row 3: not one image: 0 {NEEDED}",
        message,
    ), message


def write_templated(folder, template, **tokens):
    """The tiny Idefics2's processor with another template."""
    processor = preferences.processor()
    processor.chat_template = template
    for name, token in tokens.items():
        setattr(processor.tokenizer, name, token)
    processor.save_pretrained(folder)


def test_a_prompt_that_an_answer_changes_is_refused(stops, write, odd_images, tmp_path):
    """No space between prompt and answer: two of the reader's tokens may be one token to the tokenizer."""
    end = "{{ '<end_of_utterance>' if m.role == 'assistant' }}"
    write_templated(
        tmp_path / "model",
        "{% for m in messages %}{% for c in m.content %}" + IMAGE + "{% endfor %}" + end + "{% endfor %}",
    )
    rows = [
        prefers("Which digit", "?", "!"),
        prefers("Which di", "?", "git is this?"),
        prefers("Which di", "git is this?", "?"),
    ]
    message = stops(dataset_name=write(rows), model_name_or_path=tmp_path / "model")
    changed = r"prompt changed: the first characters of 'git is this\?' change its tokens; begin otherwise"
    assert re.search(rf"2 of 3(?s:.)*\n  row 1: {changed}\n  row 2: {changed}", message), message


UNFIT = {  # templates that do not go from a question on to an answer
    "answer left out": "{% for m in messages if m.role == 'user' %}{% for c in m.content %}" + IMAGE + "{% endfor %}{% endfor %}",
    "answer changed": "{% for m in messages %}{% for c in m.content %}" + IMAGE.replace("c.text", "c.text.upper()") + "{% endfor %}{% endfor %}",
    "no header of the answer": "{% for m in messages %}{% for c in m.content %}" + IMAGE + "{% endfor %}{% endfor %}"
                               "{% if add_generation_prompt %} ANSWER:{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("template", UNFIT.values(), ids=UNFIT)
def test_a_template_that_does_not_go_on_to_the_answer_is_refused(template, stops, write, odd_images, tmp_path):
    write_templated(tmp_path / "model", template)
    message = stops(dataset_name=write([GOOD]), model_name_or_path=tmp_path / "model")
    assert re.search(
        r"row 0: prompt changed: with the answer 'It is a seven\.' the chat template changes the question", message
    )


# ------------------------------------------------------------------------------------------------------ skipping
def test_skipped_rows_are_counted_and_the_first_twenty_listed(pair_parse, write, odd_images, capsys):
    bad = [prefers("q", "a", "a ") if n % 3 else prefers("q", "a", "</s>") for n in range(24)]
    path = write([GOOD, *bad, shows("nowhere.png"), {**GOOD, "chosen": None}, prefers("q", "two", "six")])
    train, _ = load_data(recipe, *pair_parse(dataset_name=path, on_bad_rows="skip", eval_fraction=0))
    assert train["row"] == [0, 27]
    out = capsys.readouterr().out
    assert "26 of 28 rows" in out
    for n, reason in ((16, "equal answers"), (8, "control token"), (1, "unreadable image"), (1, "one answer")):
        assert re.search(rf"\b{n} x {reason}\b", out)
    assert re.findall(r"\n  row (\d+)", out) == [str(n) for n in range(1, 21)] and "at most 20 shown" in out


def test_bad_rows_to_evaluate_on(stops, pair_parse, write, odd_images, capsys, tmp_path):
    (tmp_path / "data").mkdir()
    write([GOOD, GOOD], "data/train.json")
    write([GOOD, with_text("rejected", " "), GOOD], "data/test.json")
    folder = {"dataset_name": tmp_path / "data", "image_folder": tmp_path}
    assert re.search(r"1 of 3 rows of the evaluation data .*\n  row 1: empty rejected", stops(**folder))
    train, held_out = load_data(recipe, *pair_parse(**folder, on_bad_rows="skip"))
    assert len(train) == 2 and sorted(held_out["row"]) == [0, 2] and "row 1: empty rejected" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row, settings, remedy, other",
    [
        (with_text("chosen", " "), {"on_bad_rows": "skip"}, "", "--max_length"),
        (GOOD, {"max_length": 5}, "--max_length", "--on_bad_rows"),
        (GOOD, {"max_length": 5, "on_bad_rows": "skip"}, "--max_length", "--on_bad_rows"),
    ],
)
def test_no_row_is_left(row, settings, remedy, other, stops, write, odd_images):
    message = stops(dataset_name=write([row] * 3), **settings)
    assert (
        re.search("3 of 3 rows", message)
        and remedy in message
        and other not in message
        and "No row would be left" in message
    ), message


def test_long_rows_do_not_hide_bad_ones(stops, write, odd_images):
    message = stops(
        dataset_name=write([prefers("q", "a", "q " * 99)] * 25 + [with_text("chosen", " ")]), max_length=60
    )
    assert "row 25: empty chosen" in message and "25 x too long" in message, message


# --------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("flag", ["dataset_name", "eval_dataset_name"])
@pytest.mark.parametrize("name, create, expected", FILES.values(), ids=FILES)
def test_a_data_set_that_cannot_be_read_is_named(name, create, expected, flag, stops, write, odd_images, tmp_path):
    create(tmp_path / name)
    message = stops(**{"dataset_name": write([GOOD] * 2), flag: tmp_path / name})
    assert (str(tmp_path / name) in message or "the evaluation data" in message) and re.search(expected, message), (
        message
    )


@pytest.mark.parametrize(
    "row", [prefers("What\ud83d?", "a", "b"), prefers("q", "a\udc00", "b"), prefers("q", "a", message("\ud83d"))]
)
def test_half_a_character_is_not_dropped(row, stops, write, odd_images):
    assert re.search(
        r"cannot read .*row 1 has invalid Unicode .a lone surrogate.; fix",
        stops(dataset_name=write([GOOD, row, GOOD, row])),
    )


def test_the_hub_cannot_be_reached(stops):
    assert "cannot read nobody/nothing" in stops(dataset_name="nobody/nothing")


@pytest.mark.parametrize("flag", ["dataset_train_split", "dataset_test_split"])
def test_an_unknown_split_is_answered_with_the_known_ones(flag, stops):
    message = stops(**{flag: "dev"})
    assert re.search("no split 'dev'; it has ", message) and set(re.split("[ ,]+", message.split("it has ")[1])) == {
        "train",
        "test",
    }


WITHOUT = {which: {key: value for key, value in GOOD.items() if key != which} for which in GOOD}


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize(
    "row, flags, expected",
    [
        (WITHOUT["image"], {}, "no column 'image' .--image_column.; it has question, chosen, rejected"),
        (WITHOUT["question"], {}, "no column 'question' .--question_column.; it has image, chosen, rejected"),
        (WITHOUT["chosen"], {}, "no column 'chosen' .--chosen_column.; it has image, question, rejected"),
        (WITHOUT["rejected"], {}, "no column 'rejected' .--rejected_column.; it has image, question, chosen"),
        (
            {"a": 5},
            {},
            "no column 'image' .--image_column. and 'question' .* and 'chosen' .* and 'rejected' .--rejected_column.; it has a$",
        ),
        (GOOD, {"image_column": "photo"}, "no column 'photo' .--image_column"),
        (GOOD, {"question_column": "frage"}, "no column 'frage' .--question_column"),
        (GOOD, {"chosen_column": "besser"}, "no column 'besser' .--chosen_column"),
        (GOOD, {"rejected_column": "schlechter"}, "no column 'schlechter' .--rejected_column"),
        (GOOD, {"chosen_column": "rejected"}, "one column cannot be two"),
        (GOOD, {"image_column": "question"}, "one column cannot be two"),
    ],
)
def test_columns_that_are_not_there_are_named_with_their_flags(row, flags, expected, kind, stops, write, odd_images):
    message = stops(dataset_name=write([row] * 2, f"rows.{kind}"), **flags)
    assert re.search(expected, message) and "\n" not in message, message


def test_a_data_set_of_questions_is_not_one_of_pairs(stops, write, odd_images):
    for row, flags in (
        ({"image": "red.png", "question": "q"}, {}),
        (GOOD, {"chosen_column": "besser", "rejected_column": "schlechter"}),
    ):
        message = stops(dataset_name=write([row] * 2), **flags)
        assert re.search("no answers.*--chosen_column and --rejected_column", message) and "\n" not in message, message


def test_one_image_cannot_be_divided(stops, write, odd_images):
    for rows in ([GOOD], [GOOD] * 5):
        message = stops(dataset_name=write(rows), eval_fraction=0.1)
        assert "rows cannot be divided" in message and "--eval_fraction 0" in message


# -------------------------------------------------------------------------------------------------- machine, flags
ELSEWHERE = "kto orpo cpo simpo grpo sigmoid_norms Sigmoid".split()


@pytest.mark.parametrize(
    "settings, expected",
    [
        *(({"loss_type": loss}, f"--loss_type {loss}: .*sigmoid, hinge, .*kto, orpo, cpo, simpo and others have trainers of their own") for loss in ELSEWHERE),
        ({"loss_type": ["sigmoid", "kto", "nll"]}, "--loss_type kto nll: "),
        ({"greater_is_better": True, "load_best_model_at_end": True}, "--greater_is_better true would keep the worst checkpoint by loss"),
        ({"loss_type": "exo_pair"}, "exo_pair needs --label_smoothing above 0"),
        ({"loss_type": ["sft", "exo_pair"], "label_smoothing": 1}, "exo_pair needs --label_smoothing above 0 and below 1"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "robust and aot take --label_smoothing from 0 to below 0.5"),
        ({"loss_type": "robust", "label_smoothing": -0.1}, "robust and aot take --label_smoothing"),
        ({"loss_type": "aot", "label_smoothing": 2}, "robust and aot take --label_smoothing"),
        ({"loss_type": "aot_unpaired", "label_smoothing": "nan"}, "robust and aot take --label_smoothing"),
        ({"label_smoothing": 0.1}, "--label_smoothing is for the losses exo_pair, robust and aot"),
        ({"loss_type": ["hinge", "sft"], "label_smoothing": 0.1}, "--label_smoothing is for the losses"),
        *(({"loss_type": loss, "f_divergence_type": "js_divergence"}, f"--f_divergence_type js_divergence: {loss} can only have reverse_kl")
          for loss in "nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero apo_down".split()),
        ({"f_divergence_type": "kl"}, "--f_divergence_type.*kl"),
        ({"loss_weights": [1, 2]}, "weights.*Got 2 weights for 1 loss"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": 1}, "weights.*Got 1 weights for 2 loss"),
        ({"learning_rate": -1}, "--learning_rate"),
        ({"learning_rate": 0}, "--learning_rate must be above 0"),
        ({"learning_rate": "nan"}, "--learning_rate"),
        ({"lora_r": 0}, "--lora_r"),
        ({"max_eval_rows": 0}, "--max_eval_rows"),
        ({"longest_edge": 0}, "--longest_edge"),
        ({"load_best_model_at_end": True, "eval_steps": 5, "save_steps": 10}, "--save_steps equal to --eval_steps.*--load_best_model_at_end false"),
        ({"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/accuracies"}, "--metric_for_best_model rewards/accuracies: .*loss"),
        ({"output_dir": "/proc/nowhere"}, "--output_dir /proc/nowhere cannot be written"),
        ({"report_to": "nonsense"}, "--report_to .*nonsense"),
        ({"report_to": "clearml"}, "--report_to .*clearml"),
        ({"push_to_hub": True}, "--push_to_hub"),
    ],
)  # fmt: skip
def test_flags_that_cannot_work(settings, expected, stops):
    message = stops(**settings)
    assert re.search(expected, message) and "\n" not in message, message


def test_a_config_file_without_a_loss(stops, tmp_path):
    for text, expected in (
        ("loss_type: []", "--loss_type : .*sigmoid, hinge"),
        ("loss_type: null", "loss_type must have a value"),
    ):
        (tmp_path / "run.yaml").write_text(text)
        assert re.search(expected, stops(config=tmp_path / "run.yaml"))


NEEDS = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1}, "aot": {"label_smoothing": 0.2}}


@pytest.mark.parametrize(
    "settings",
    [
        *({"loss_type": loss, **NEEDS.get(loss, {})} for loss in recipe.LOSSES),
        {"loss_type": recipe.LOSSES, "loss_weights": [0.5] * len(recipe.LOSSES), "label_smoothing": 0.1},
        {"loss_type": "robust", "label_smoothing": 0},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0]},
        {"use_weighting": True, "ld_alpha": 0, "f_divergence_type": "alpha_divergence"},
        {"ld_alpha": 1, "f_divergence_type": "forward_kl", "loss_type": ["ipo", "exo_pair"], "label_smoothing": 0.01},
        {"eval_fraction": 0, "sample_rows": 0, "lora_r": 1, "max_length": 1, "max_eval_rows": 1, "max_new_tokens": 1, "longest_edge": 1},
        {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"},
        {"load_best_model_at_end": True, "metric_for_best_model": "x", "eval_strategy": "no"},
        {"eval_steps": 5, "save_steps": 10, "metric_for_best_model": "x"},
        {"max_steps": 1},
    ],
)  # fmt: skip
def test_flags_that_can(settings, pair_parse):
    recipe.check(*pair_parse(**settings))


@pytest.mark.parametrize("below", ["", "inside/deep"])
def test_a_file_in_place_of_the_output(below, stops, tmp_path):
    (tmp_path / "file").write_text("mine")
    message = stops(output_dir=tmp_path / "file" / below)
    assert "--output_dir" in message and "cannot be written" in message and (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(stops):
    assert re.search("no GPU.*--use_cpu", stops(use_cpu=False))


# ----------------------------------------------------------------------------------------------------------- model
@pytest.mark.parametrize("edge", [1, 377, 981, 5000])
def test_longest_edge_has_the_bounds_of_the_processor(edge, stops, pair_parse, tmp_path):
    idefics2.processor(preferences.tokenizer(), height=378, width=980).save_pretrained(tmp_path / "model")
    message = stops(longest_edge=edge, model_name_or_path=tmp_path / "model")
    assert re.search(f"--longest_edge {edge}: .* from 378 .*to 980 pixels", message), message


@pytest.mark.parametrize("family", ["tiny_llava", "tiny_next", "tiny_paligemma"])
def test_longest_edge_is_not_for_other_families(family, stops, pair_parse, request):
    model = request.getfixturevalue(family) / "model"
    for edge in (336, 980):
        assert "--longest_edge is for Idefics2; other models have a size of their own" in stops(
            longest_edge=edge, model_name_or_path=model
        )
    recipe.load_processor(pair_parse(model_name_or_path=model)[0])


def write_clip(folder):
    processor = llava.processor()
    CLIPProcessor(processor.image_processor, processor.tokenizer).save_pretrained(folder)


def write_llava_blind(folder):
    processor = llava.processor()
    processor.chat_template = llava.CHAT_TEMPLATE.replace("<image>", "")
    processor.save_pretrained(folder)


def write_without(name):
    def write(folder):
        preferences.processor().save_pretrained(folder)
        (folder / name).unlink()

    return write


TEXT_ONLY = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CANNOT = "whose chat template cannot put a question about an image"
MODELS = {
    "nowhere": (lambda folder: None, "--model_name_or_path"),
    "empty": (lambda folder: folder.mkdir(), "--model_name_or_path"),
    "CLIP": (write_clip, "CLIPProcessor without a chat template"),
    "no template": (lambda folder: write_templated(folder, None), "Idefics2Processor without a chat template"),
    "a template of texts": (lambda folder: write_templated(folder, TEXT_ONLY), CANNOT),
    "a template without an image": (write_llava_blind, f"LlavaProcessor {CANNOT}: .*number of images"),
    "a template that raises": (
        lambda folder: write_templated(folder, "{{ raise_exception('no roles') }}"),
        f"{CANNOT}: TemplateError: no roles",
    ),
    "a template with a slip": (lambda folder: write_templated(folder, "{% for %}"), CANNOT),
    "no EOS": (lambda folder: write_templated(folder, idefics2.CHAT_TEMPLATE, eos_token=None), "without an eos_token"),
    "no settings of the tokenizer": (
        write_without("tokenizer_config.json"),
        "without an eos_token.*tokenizer_config.json",
    ),
    "no settings of the processor": (write_without("processor_config.json"), "--model_name_or_path"),
    "images only": (
        lambda folder: preferences.processor().image_processor.save_pretrained(folder),
        "ImageProcessor.*images and text",
    ),
    "texts only": (
        lambda folder: preferences.processor().tokenizer.save_pretrained(folder),
        "Tokenizer.*images and text",
    ),
}


@pytest.mark.parametrize("create, expected", MODELS.values(), ids=MODELS)
def test_another_kind_of_model_is_refused(create, expected, stops, write, odd_images, tmp_path):
    create(tmp_path / "model")
    message = stops(model_name_or_path=tmp_path / "model", dataset_name=write([GOOD]))
    assert str(tmp_path / "model") in message and re.search(expected, message), message


def test_a_tokenizer_without_its_words_knows_no_answers(stops, write, odd_images, tmp_path):
    write_without("tokenizer.json")(tmp_path / "model")
    message = stops(model_name_or_path=tmp_path / "model", dataset_name=write([GOOD] * 2))
    assert re.search(
        r"2 of 2 rows(?s:.*)row 0: equal answers: chosen 'It is a seven\.' and rejected 'It is a two\.' are the same to the tokenizer",
        message,
    )


def test_a_question_with_two_images_is_refused(stops, write, odd_images):
    asked = message([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}], "user")
    assert "row 0: question is not a text: [{'role': 'user'" in stops(dataset_name=write([GOOD | {"question": asked}]))


@pytest.mark.parametrize(
    "text", [None, "{", "{}", '{"model_type": "of_tomorrow"}'], ids=["missing", "damaged", "empty", "unknown"]
)
def test_a_config_that_cannot_be_read_is_one_message(text, tiny_pairs, stops, write, odd_images, tmp_path):
    shutil.copytree(tiny_pairs / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink() if text is None else (tmp_path / "model" / "config.json").write_text(
        text
    )
    assert stops(model_name_or_path=tmp_path / "model", dataset_name=write([GOOD])).startswith(
        f"error: --model_name_or_path {tmp_path / 'model'}: "
    )


def test_only_the_first_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        recipe.fail("too much")
    assert end.value.code == 1


def test_an_answer_with_an_image_is_refused(stops, write, odd_images):
    said = message([{"type": "image"}, {"type": "text", "text": "It is a seven."}], "assistant")
    message_of = stops(dataset_name=write([GOOD | {"chosen": said}]))
    assert (
        "row 0: chosen is not a text: [{'role': 'assistant'" in message_of
        and "(only a question has an image)" in message_of
    )


def test_damaged_weights_are_one_message(tiny_pairs, pair_flags, write, odd_images, tmp_path):
    shutil.copytree(tiny_pairs / "model", tmp_path / "model")
    whole = (tmp_path / "model" / "model.safetensors").read_bytes()
    argv = pair_flags(
        model_name_or_path=tmp_path / "model", dataset_name=write([GOOD]), eval_fraction=0, load_in_4bit=False
    )
    for damaged in (whole[:-99], b"", None):
        (tmp_path / "model" / "model.safetensors").write_bytes(damaged) if damaged is not None else (
            tmp_path / "model" / "model.safetensors"
        ).unlink()
        with pytest.raises(SystemExit, match=rf"^error: cannot load the weights of {tmp_path / 'model'}"):
            recipe.main(argv)
    assert not (tmp_path / "out").exists()


def widen(source, folder, window):
    """A copy of a model whose language model attends to `window` tokens back."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["sliding_window"] = window
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", ["tiny_pairs", "tiny_paligemma2"])
def test_rows_longer_than_the_sliding_window_are_for_the_stock_path(
    family, stops, write, odd_images, tmp_path, request
):
    widen(request.getfixturevalue(family) / "model", tmp_path / "model", 100)
    settings = {"dataset_name": write([GOOD]), "model_name_or_path": tmp_path / "model"}
    (tmp_path / "run.yaml").write_text("max_length: null\n")
    for given, limit in (({}, "1024"), ({"max_length": 101}, "101"), ({"config": tmp_path / "run.yaml"}, "None")):
        message = stops(**settings, **given)
        assert re.search(
            f"--max_length {limit}: .* sliding window of 100 tokens.*--max_length 100, or --shared_prompt false",
            message,
        ), message
    for given in (
        {"max_length": 100},
        {"max_length": 101, "shared_prompt": False},
        {"config": tmp_path / "run.yaml", "shared_prompt": False},
    ):
        with pytest.raises(Loaded):
            stops(**settings, **given)


# ------------------------------------------------------------------------------------------------- the whole thing
def test_good_input_passes_every_check(stops, write, odd_images, capsys):
    """The other side of this file: with the same machinery, good rows get as far as the weights."""
    with pytest.raises(Loaded):
        stops(
            dataset_name=write(
                [GOOD, shows("lime.png"), prefers(message("Q", "user"), "a", message("b", "assistant"))]
            )
        )
    shown = capsys.readouterr().out
    assert (
        f"Which digit is this?{END}\nAssistant:\n  chosen:   « It is a seven.{END}»\n  rejected: « It is a two.{END}»\n"
        in shown
    )


def test_a_program_that_fails_ends_with_the_message(pair_flags, write, odd_images, tmp_path):
    argv = pair_flags(dataset_name=write([GOOD, prefers("q", "a", "a")]), eval_fraction=0)
    done = subprocess.run(
        [sys.executable, str(ROOT / "dpo_idefics2.py"), *argv], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr[done.stderr.rindex("error: ") :].splitlines()
    assert (
        "1 of 2 rows" in last[0] and last[1].startswith("  row 1: equal answers") and "--on_bad_rows skip" in last[2]
    )
    assert len(last) == 3 and not (tmp_path / "out").exists()


def test_an_image_that_changes_after_the_check(pair_parse, write, images, tmp_path):
    names = images(3)
    settings = pair_parse(dataset_name=write([GOOD, *(shows(name) for name in names)]), eval_fraction=0)
    train, _ = load_data(recipe, *settings)
    (tmp_path / "lime.png").write_bytes(b"changed")
    collator = recipe.Collator(recipe.load_processor(settings[0]), *settings)
    collator([train[1], train[3]])
    with pytest.raises(recipe.BadRow, match="^unreadable image: .*lime.png"):
        collator([train[n] for n in range(4)])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_changes_under_the_run_ends_it_with_one_message(
    workers, pair_flags, write, images, tmp_path, monkeypatch
):
    names, load_model = images(4), recipe.load_model

    def change_then_load(*args):
        (tmp_path / "lime.png").write_bytes(b"changed")
        return load_model(*args)

    monkeypatch.setattr(recipe, "load_model", change_then_load)
    options = {"load_in_4bit": False, "optim": "adamw_torch", "dataloader_num_workers": workers, "eval_fraction": 0}
    with pytest.raises(SystemExit) as end:
        recipe.main(pair_flags(dataset_name=write([shows(name) for name in names]), **options))
    assert re.fullmatch(r"error: the data changed during the run: unreadable image: .*lime\.png.*", end.value.code)
    assert not (tmp_path / "out" / "trainer_state.json").exists()
