"""llava_two_stage.py and bad input: one message that names the row and the remedy, exit status 1, before any weights load."""

import base64
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Loaded, load_data, refusal, said, stopped_by, two_stage_run
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPConfig, GPT2Config, SiglipConfig, SiglipVisionConfig

import llava_two_stage as recipe

GOOD = said("<image>\nWhich digit is this?", "seven", image="red.png")
GOOD_CAPTION = {"image": "red.png", "caption": "a seven"}


@pytest.fixture
def stops(stage_flags, monkeypatch, tmp_path):
    """A function: settings as keywords -> the message with which main() ends, before it loads any weights."""
    made = stopped_by(recipe, lambda stage="instruct", **settings: stage_flags(stage, **settings), monkeypatch)
    return lambda **settings: made(**{"image_folder": tmp_path, **settings})


def turns(*pairs, **more):
    """(from, value) pairs -> a row."""
    return {**more, "conversations": [{"from": role, "value": value} for role, value in pairs]}


def shows(image):
    """A row whose question has an image."""
    return {"image": image, "conversations": GOOD["conversations"]}


TWO = ["red.png", "lime.png"]
MATCH, MALFORMED, NO_IMAGE, ORDER = (
    "images do not match: ",
    "malformed image: ",
    "unreadable image: ",
    "wrong order of roles: turn ",
)
SAYS = "empty answer: turn 1, the gpt's, says "
CONTROL = "control token: {} in turn {} .*: remove it"
BAD_ROWS = {  # what is wrong: the row, what the message says
    "no conversations": ({"image": "red.png"}, "no conversation: conversations must be a list of turns, {from, value}"),
    "conversations null": ({"conversations": None}, "no conversation"),
    "conversations empty": ({"conversations": []}, "no conversation"),
    "conversations a text": ({"conversations": "[]"}, "no conversation"),
    "conversations a dict": ({"conversations": {"from": "human", "value": "q"}}, "no conversation"),
    "a caption": (GOOD_CAPTION, "no conversation"),
    "turns of messages": ({"conversations": [{"role": "user", "content": "q"}]},
                          ORDER + "0 must be the human's, {from, value}: {'role': 'user'"),
    "turns that are texts": ({"conversations": ["q", "a"]}, ORDER + "0 must be the human's, .*: 'q'"),
    "a turn of null": ({"conversations": [*said("q", "a")["conversations"], None]}, ORDER + "2 must be the human's, .*: None"),
    "a list of lists": ({"conversations": [GOOD["conversations"]]}, ORDER + "0 must be the human's"),
    "the answer first": (turns(("gpt", "a"), ("human", "q")), ORDER + "0 must be the human's, .*'gpt'"),
    "two questions": (turns(("human", "q"), ("human", "q"), ("gpt", "a")), ORDER + "1 must be the gpt's"),
    "two answers": (turns(("human", "q"), ("gpt", "a"), ("gpt", "b")), ORDER + "2 must be the human's"),
    "a late system turn": (turns(("human", "q"), ("system", "s"), ("gpt", "a")), ORDER + "1 must be the gpt's"),
    "two system turns": (turns(("system", "s"), ("system", "s"), ("human", "q"), ("gpt", "a")), ORDER + "1 must be the human's"),
    "an unknown role": (turns(("user", "q"), ("assistant", "a")), ORDER + "0 must be the human's, .*'user'"),
    "a capital role": (turns(("Human", "q"), ("GPT", "a")), ORDER + "0 must be the human's, .*'Human'"),
    "a role of null": (turns((None, "q"), ("gpt", "a")), ORDER + "0 must be the human's"),
    "a role that is a list": (turns((["human"], "q"), ("gpt", "a")), ORDER + "0 must be the human's"),
    "a question only": (turns(("human", "q")), "no answer: the last turn is not gpt's"),
    "a question last": (said("q", "a", "q"), "no answer: the last turn is not gpt's"),
    "a system turn only": (turns(("system", "s")), "no answer: the last turn"),
    "answer missing": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt"}]}, SAYS + "None; it must be text"),
    "answer null": (said("q", None), SAYS + "None; it must be text"),
    "answer empty": (said("q", ""), SAYS + "''"),
    "answer blank": (said("q", " \r\n\t\u00a0"), SAYS),
    "answer a number": (said("q", 7), SAYS + "7; it must be text"),
    "answer zero": (said("q", 0), SAYS + "0"),
    "answer a truth value": (said("q", True), SAYS + "True"),
    "answer a list": (said("q", ["a"]), SAYS + r"\['a'\]"),
    "answer a dict": (said("q", {"text": "a"}), SAYS),
    "second answer blank": (said("q", "a", "q", " "), "empty answer: turn 3, the gpt's"),
    "question blank": (said(" ", "a"), "empty turn: turn 0, the human's, says ' '"),
    "question null": (said(None, "a"), "empty turn: turn 0, the human's, says None"),
    "question a number": (said(5, "a"), "empty turn: turn 0, the human's, says 5"),
    "system turn blank": (turns(("system", ""), ("human", "q"), ("gpt", "a")), "empty turn: turn 0, the system's"),
    "no image in the text": (said("q", "a", image="red.png"), MATCH + r".*\b0 <image>.* 1 images"),
    "no image in the row": (said("<image> q", "a"), MATCH + r".*\b1 <image>.* 0 images"),
    "image an empty text": (said("<image> q", "a", image=""), MATCH + r".*\b1 <image>.* 0 images"),
    "image an empty list": (said("<image> q", "a", image=[]), MATCH + r".*\b1 <image>.* 0 images"),
    "image null": ({**said("<image> q", "a"), "image": None}, MATCH + r".*\b1 <image>.* 0 images"),
    "used twice": (said("<image> <image>", "a", image="red.png"), MATCH + r".*\b2 <image>.* 1 images"),
    "used in two turns": (said("<image> q", "a", "<image> r", "b", image="red.png"), MATCH + r".*\b2 <image>.* 1 images"),
    "one of two used": (said("<image> q", "a", image=TWO), MATCH + r".*\b1 <image>.* 2 images"),
    "too many of two used": (said("<image><image><image>", "a", image=TWO), MATCH + r".*\b3 <image>.* 2 images"),
    "image in an answer": (said("q", "see <image>", image="red.png"), MATCH + r".*\b0 <image>.* 1 images"),
    "image in an answer, too": (said("<image> q", "see <image>", image="red.png"), CONTROL.format("<image>", 1)),
    "image in the system turn": (turns(("system", "<image>"), ("human", "q"), ("gpt", "a")), CONTROL.format("<image>", 0)),
    "image a number": (shows(5), MALFORMED + "5; it must be a path"),
    "image a list in a list": (shows([["red.png"]]), MALFORMED + r"\['red.png'\]; it must be a path, or a list of paths"),
    "image a number in a list": (shows([5]), MALFORMED + "5"),
    "image null in a list": (shows([None]), MALFORMED + "None"),
    "image blank in a list": (shows([""]), MALFORMED + "''"),
    "image a dict": (shows({"path": "red.png"}), MALFORMED + "{'path': 'red.png'}"),
    "image zero": (shows(0), MATCH + r".*\b1 <image>.* 0 images"),
    "image a truth value": (shows(False), MATCH + r".*\b1 <image>.* 0 images"),
    "no such image": (shows("nowhere.png"), NO_IMAGE + ".*nowhere.png.*No such file.*--image_folder"),
    "second of two missing": (said("<image><image>", "a", image=["red.png", "nowhere.png"]), NO_IMAGE + ".*nowhere.png"),
    "image in the web": (shows("https://example.org/red.png"), NO_IMAGE + ".*https://example.org/red.png .No such file"),
    "image a folder": (shows("."), NO_IMAGE + ".*Is a directory"),
    "image a blank": (shows(" "), NO_IMAGE),
    "image with a NUL in its name": (shows("red\0.png"), NO_IMAGE),
    "image empty": (shows("empty.png"), NO_IMAGE + ".*empty.png"),
    "image truncated": (shows("truncated.jpg"), NO_IMAGE + ".*truncated.jpg.*truncated"),
    "image no picture": (shows("text.png"), NO_IMAGE + ".*text.png"),
    "several images in one file": (shows("pages.tiff"), "several images: .*pages.tiff holds 3.*its own file"),
    "a moving picture": (shows("film.gif"), "several images: .*film.gif holds 3"),
    "a moving picture, too": (shows("film.webp"), "several images: .*film.webp holds 3"),
    "image too narrow": (shows("hair.png"), "image too narrow: .*hair.png has 201 x 1 pixels"),
    **{f"{token} in {where}": (row, CONTROL.format(re.escape(token), n))
       for token in ("<s>", "</s>", "<unk>") for where, n, row in (
           ("a question", 0, said(f"What is {token}?", "a")),
           ("a later question", 2, said("q", "a", f"<image>{token}", "b", image="red.png")),
           ("an answer", 1, said("q", f"{token}a")),
           ("the system turn", 0, turns(("system", f"x{token}"), ("human", "q"), ("gpt", "a"))))},
}  # fmt: skip
NO_CAPTION = "no caption: align takes one image and its caption, not {} turns, {} images"
BAD_CAPTIONS = {
    "nothing": ({"image": "red.png"}, "no conversation"),
    "caption null": ({"image": "red.png", "caption": None}, "no conversation"),
    "caption empty": ({"image": "red.png", "caption": ""}, SAYS + "''"),
    "caption blank": ({"image": "red.png", "caption": " \n"}, SAYS),
    "caption a number": ({"image": "red.png", "caption": 5}, SAYS + "5; it must be text"),
    "caption a list": ({"image": "red.png", "caption": ["a"]}, SAYS),
    "caption without an image": ({"caption": "a"}, MATCH + r".*\b1 <image>.* 0 images"),
    "caption of two images": ({"image": TWO, "caption": "a"}, MATCH + r".*\b1 <image>.* 2 images"),
    "caption with an image": ({"image": "red.png", "caption": "<image>"}, CONTROL.format("<image>", 1)),
    "caption with an end": ({"image": "red.png", "caption": "a</s>"}, CONTROL.format("</s>", 1)),
    "several turns": (said("<image>", "a", "q", "b", image="red.png"), NO_CAPTION.format(4, 1)),
    "no image": (said("q", "a"), NO_CAPTION.format(2, 0)),
    "two images": (said("<image><image>", "a", image=TWO), NO_CAPTION.format(2, 2)),
    "two lines": ({"image": "red.png", "caption": "a digit\nan odd one"}, "more than a caption: it has .* a second line"),
    "an empty line behind it": ({"image": "red.png", "caption": "a digit\n"}, "more than a caption: "),
    "a caption and a conversation": ({**GOOD_CAPTION, "caption": "a"} | {"conversations": GOOD["conversations"]}, "caption and conversations: .*one of them"),
    "a system turn": (turns(("system", "s"), ("human", "<image>"), ("gpt", "a"), image="red.png"), NO_CAPTION.format(3, 1)),
    "a question only": (turns(("human", "<image>"), image="red.png"), NO_CAPTION.format(1, 1)),
    "an answer only": (turns(("gpt", "a"), image="red.png"), ORDER + "0 must be the human's"),
    "answer blank": (said("<image>", " ", image="red.png"), SAYS),
    "no such image": ({"image": "nowhere.png", "caption": "a"}, NO_IMAGE + ".*nowhere.png"),
    **{f"roles: {text}": ({"image": "red.png", "caption": text}, "more than a caption: it has roles")
       for text in ("USER: q\nASSISTANT: a", "a\n  ASSISTANT: b", "Human : q", "### Assistant: b")},
}  # fmt: skip


def listed(stops, write, cases, stage, good):
    """All of the cases in one file: there are as many lines as bad rows, in their order."""
    for start in range(0, len(cases), 20):  # so many are listed
        some = list(cases.items())[start : start + 20]
        lines = stops(stage=stage, data_path=write([good, *(row for _, (row, _) in some), good])).splitlines()
        assert (
            lines[0].startswith(f"error: {len(some)} of {len(some) + 2} rows of ") and len(lines) == len(some) + 2
        ), lines
        assert lines[-1] == "Fix these rows (counted from 0), or train without them: --on_bad_rows skip"
        for n, (line, (name, (_, expected))) in enumerate(zip(lines[1:], some), 1):
            assert re.match(rf"  row {n}: {expected}", line) and len(line) < 600, (name, line)


@pytest.fixture(autouse=True)
def hair(odd_images, tmp_path):
    Image.new("RGB", (201, 1)).save(tmp_path / "hair.png")


def test_bad_rows_are_named_with_a_remedy(stops, write):
    listed(stops, write, BAD_ROWS, "instruct", GOOD)


def test_bad_captions_are_named_with_a_remedy(stops, write):
    listed(stops, write, BAD_CAPTIONS, "align", GOOD_CAPTION)


def test_what_is_bad_to_instruct_is_bad_to_align(stops, write):
    rows = [row for row, _ in BAD_ROWS.values() if row != GOOD_CAPTION]
    lines = stops(stage="align", data_path=write([GOOD_CAPTION, *rows])).splitlines()
    assert (
        lines[0].startswith(f"error: {len(rows)} of {len(rows) + 1} rows of ") and len(lines) == 22
    )  # the first 20 are listed


def test_a_picture_or_a_text_written_in_the_wrong_place_is_not_printed_as_a_whole(stops, write, tmp_path):
    text = base64.b64encode((tmp_path / "large.png").read_bytes() * 100).decode()
    rows = [
        shows(text),
        shows([[text]]),
        shows({text: "red.png"}),
        {"conversations": [text]},
        said("q", [text]),
        said("q", {"a": text}),
        said([text], "a"),
    ]
    lines = stops(data_path=write([GOOD, *rows])).splitlines()
    assert len(lines) == len(rows) + 2 and max(map(len, lines)) < 600, lines
    assert re.search(rf"row 1: {NO_IMAGE}.*\(File name too long\)", lines[1])


def test_an_image_too_large_is_named(stops, write, monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 56 * 56)  # PIL refuses twice as many
    Image.new("RGB", (112, 112)).save(tmp_path / "photo.png")
    message = stops(data_path=write([GOOD, shows("photo.png")]))
    assert re.search(r"\n  row 1: .*photo.png .*12544 pixels.*shrink", message), message


def test_what_a_telephone_writes_is_one_image(stage_collate):
    [picture] = [
        part["image"]
        for part in stage_collate("instruct").messages_of(shows("telephone.jpg"))[0]["content"]
        if part["type"] == "image"
    ]
    assert picture.getpixel((5, 5))[0] > 240


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_are_named_by_their_ids_too(name, stops, write):
    ids = ["n1", 0, "", None, 7.5, ["a\nb"]]
    lines = stops(
        data_path=write(
            [{**GOOD, "id": "n0"}, *({**shows("text.png"), "id": one} for one in ids), shows("text.png")], name
        )
    ).splitlines()
    assert lines[0].startswith("error: 7 of 8 rows") and len(lines) == 9
    shown = [re.match(r"  row \d( \(id .*\))?: ", line)[1] for line in lines[1:-1]]
    assert shown == [" (id n1)", " (id 0)", None, None, " (id 7.5)", r" (id ['a\nb'])", None]


def test_a_key_given_twice_does_not_lose_a_picture(stops, tmp_path):
    twice = json.dumps(GOOD).replace('"image": "red.png"', '"image": {"a": "red.png", "a": "lime.png"}')
    (tmp_path / "x.json").write_text(
        f'[{twice}, {{"conversations": [{{"from": "human", "value": "q"}}, {{"from": "gpt", "value": "a", "value": "b"}}]}}]'
    )
    assert "a key appears twice in [('a', 'red.png'), ('a', 'lime.png')]" in stops(data_path=tmp_path / "x.json")
    (tmp_path / "x.json").write_text(f"[{json.dumps(GOOD)[:-1]}, " + '"image": "lime.png"}]')
    assert "a key appears twice in [('image', 'red.png')" in stops(data_path=tmp_path / "x.json")


# --------------------------------------------------------------------------------------------------------- skipping
def test_skipped_rows_are_counted_and_the_first_twenty_listed(stage_parse, write, capsys, tmp_path):
    bad = [said("q", " ") if n % 3 else said("q", "</s>") for n in range(24)]
    path = write([GOOD, *bad, shows("nowhere.png"), said("q", "a", "q"), said("q", "two")])
    train, _ = load_data(
        recipe, *stage_parse("instruct", data_path=path, on_bad_rows="skip", eval_fraction=0, image_folder=tmp_path)
    )
    assert train["row"] == [0, 27]
    out = capsys.readouterr().out
    assert "26 of 28 rows" in out
    for n, reason in ((16, "empty answer"), (8, "control token"), (1, "unreadable image"), (1, "no answer")):
        assert re.search(rf"\b{n} x {reason}\b", out)
    assert re.findall(r"\n  row (\d+)", out) == [str(n) for n in range(1, 21)]


def test_bad_captions_are_skipped_and_counted(stage_parse, write, capsys, tmp_path):
    rows = [
        GOOD_CAPTION,
        said("q", "a"),
        {**GOOD_CAPTION, "caption": "USER: a"},
        said("<image>", "a", "q", "b", image="red.png"),
        GOOD,
    ]
    train, _ = load_data(
        recipe,
        *stage_parse("align", data_path=write(rows), on_bad_rows="skip", eval_fraction=0, image_folder=tmp_path),
    )
    out = capsys.readouterr().out
    assert (
        train["row"] == [0, 4]
        and "3 of 5 rows" in out
        and "2 x no caption" in out
        and "1 x more than a caption" in out
    )


def test_bad_rows_to_evaluate_on(stops, stage_parse, write, capsys, tmp_path):
    files = {
        "data_path": write([GOOD, GOOD], "train.json"),
        "eval_data_path": write([GOOD, said("q", ""), GOOD], "test.json"),
    }
    assert re.search(r"1 of 3 rows of the evaluation data .*\n  row 1: empty answer", stops(**files))
    train, held_out = load_data(recipe, *stage_parse("instruct", **files, on_bad_rows="skip", image_folder=tmp_path))
    assert len(train) == 2 and sorted(held_out["row"]) == [0, 2] and "row 1: empty answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row, settings, remedy, other",
    [
        (said("q", " "), {"on_bad_rows": "skip"}, "", "--model_max_length"),
        (GOOD, {"model_max_length": 5}, "raise the maximum length", "--on_bad_rows"),
        (GOOD, {"model_max_length": 5, "on_bad_rows": "skip"}, "raise the maximum length", "--on_bad_rows"),
        (GOOD, {"model_max_length": 5, "on_long_rows": "stop"}, "--on_long_rows drop", "--on_bad_rows"),
        (GOOD_CAPTION, {"stage": "align", "model_max_length": 17}, "raise the maximum length", "--on_bad_rows"),
    ],
)
def test_no_row_is_left(row, settings, remedy, other, stops, write):
    message = stops(data_path=write([row] * 3), **settings)
    assert (
        re.search("3 of 3 rows", message)
        and remedy in message
        and other not in message
        and "No row would be left" in message
    ), message


def test_long_rows_do_not_hide_bad_ones(stops, write):
    message = stops(data_path=write([said("q", "a " * 99)] * 25 + [said("q", " ")]), model_max_length=60)
    assert "row 25: empty answer" in message and "25 x too long" in message, message


# ------------------------------------------------------------------------------------------------------------ files
NEEDED = "it must be a list of rows"
ROW = json.dumps(GOOD)
FILES = {  # name, what is in it, what the message says beside its name
    "empty list": ("x.json", "[]", "it is empty"),
    "empty file": ("x.json", "", "it is empty"),
    "blank jsonl": ("x.jsonl", "\n \n", "it is empty"),
    "cut off": ("x.json", f"[\n{ROW},\n{ROW[:40]}", r"line 3 column \d+"),
    "a comma missing": ("x.json", f"[\n{ROW}\n{ROW}]", "Expecting ',' delimiter: line 3 column 1"),
    "single quotes": ("x.json", str([GOOD]), "double quotes: line 1 column 3"),
    "one row": ("x.json", ROW, NEEDED),
    "rows by their ids": ("x.json", json.dumps({"1": GOOD}), NEEDED),
    "texts": ("x.json", '["a", "b"]', NEEDED),
    "a null among rows": ("x.json", f"[{ROW}, null]", NEEDED),
    "null": ("x.json", "null", NEEDED),
    "jsonl called json": ("x.json", f"{ROW}\n{ROW}", "Extra data: line 2 column 1"),
    "json called jsonl": ("x.jsonl", json.dumps([GOOD], indent=1), r"line 1: .*one row a line"),
    "jsonl of lists": ("x.jsonl", f"[{ROW}]", NEEDED),
    "jsonl cut off": ("x.jsonl", f"{ROW}\n{ROW[:-9]}", "line 2: "),
    "other keys": ("x.json", '[{"image": "a", "messages": []}] ', "no row has 'conversations'.*image.*messages"),
    "images": ("x.json", '[{"conversations": []}, {"images": ["a"], "conversations": []}]', r"row \[1\] has a key 'images': images go under 'image'"),
    "Image": ("x.json", '[{"Image": "a", "conversations": []}]', r"row \[0\] has a key 'Image': images go under 'image'"),
    "a system key": ("x.json", '[{"system": "a", "conversations": []}]', r"row \[0\] has a key 'system': .*a system message is the first turn"),
    "no keys": ("x.json", "[{}]", "it is empty"),
    "nested too deep": ("x.json", "[" * 100000, "recursion"),
    "latin-1": ("x.json", json.dumps([said("é", "a")], ensure_ascii=False).encode("latin-1"), "utf-8"),
    "utf-16": ("x.json", json.dumps([GOOD]).encode("utf-16"), "utf-8"),
    "half a character": ("x.json", json.dumps([GOOD, said("What\ud83d?", "a"), GOOD, said("q", "\udc00")]),
                         "row 1 has invalid Unicode .a lone surrogate.; fix"),
    "csv": ("x.csv", "image,question", r"it must be a .json file"),
    "no ending": ("x", ROW, r"it must be a .json file"),
    "a parquet file": ("x.parquet", b"PAR1", r"it must be a .json file"),
    "missing": ("nowhere.json", None, "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("flag", ["data_path", "eval_data_path"])
@pytest.mark.parametrize("name, content, expected", FILES.values(), ids=FILES)
def test_a_file_that_cannot_be_read_is_named(name, content, expected, flag, stops, write, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = stops(**{"data_path": write([GOOD] * 2), flag: tmp_path / name})
    assert (
        message.startswith(f"error: cannot read {tmp_path / name}: ")
        and re.search(expected, message)
        and "\n" not in message
    ), message


def test_the_default_file_or_a_folder(stops, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    assert re.search("cannot read .*folder.json: .*directory", stops(data_path=tmp_path / "folder.json"))
    for stage, name in (("align", "blip_laion_cc_sbu_558k.json"), ("instruct", "llava_v1_5_mix665k.json")):
        assert stops(stage=stage, data_path=None).startswith(f"error: cannot read {name}: ")


def test_one_image_cannot_be_divided(stops, write):
    for rows in ([GOOD], [GOOD] * 5, [GOOD, shows("./red.png")]):
        message = stops(data_path=write(rows), eval_fraction=0.1)
        assert "rows cannot be divided" in message and "--eval_fraction" in message


# ----------------------------------------------------------------------------------------------- machine and flags
RATES = "learning rates: from 0, which means frozen, to below 10"
LORA = {"lora_r": 4}


@pytest.mark.parametrize("stage", ["align", "instruct"])
@pytest.mark.parametrize(
    "settings, expected",
    [
        *(({name: value}, RATES) for name in ("projector_learning_rate", "vision_learning_rate") for value in (-1, 10, "nan", "inf")),
        ({"max_eval_rows": 0}, "--max_eval_rows"),
        ({"load_best_model_at_end": True, "eval_steps": 5, "save_steps": 10},
         "--save_steps equal to --eval_steps.*--load_best_model_at_end false"),
        ({"load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy"}, "--metric_for_best_model accuracy: .*loss"),
        ({"load_best_model_at_end": True, "greater_is_better": True},
         "--greater_is_better true would keep the worst checkpoint by loss"),
        ({"output_dir": "/proc/nowhere"}, "--output_dir /proc/nowhere cannot be written"),
        ({"report_to": "nonsense"}, "--report_to .*nonsense"),
        ({"push_to_hub": True}, "--push_to_hub"),
        ({"stage": "both"}, "--stage"),
        ({"projector_type": "linear"}, "unrecognized arguments: --projector_type linear"),
        ({"image_aspect_ratio": "anyres"}, "--image_aspect_ratio"),
        ({"on_bad_rows": "mend"}, "--on_bad_rows"),
        ({"on_long_rows": "cut"}, "--on_long_rows"),
        ({"model_max_length": 1.5}, "--model_max_length"),
        ({"bits": 4}, "unrecognized arguments: --bits 4"),
        ({"deepspeed": "zero3.json"}, "--deepspeed: not used by this recipe; .*accelerate launch --config_file"),
        ({"gradient_checkpointing": True}, "--gradient_checkpointing: not used .*activation_checkpointing"),
        ({"remove_unused_columns": True}, "--remove_unused_columns: not used"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor: not used"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"logging_steps": "inf"}, "infinity"),
        ({"auto_find_batch_size": True}, "--auto_find_batch_size: not used"),
        ({"gradient_accumulation_steps": None, "per_device_train_batch_size": 3},
         r"(256|128) rows in a step, 3 at once: give --gradient_accumulation_steps"),
    ],
)  # fmt: skip
def test_flags_that_cannot_work(settings, expected, stage, stops):
    message = stops(**{"stage": stage, **settings})
    assert re.search(expected, message) and "\n" not in message, message


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"stage": "align", "learning_rate": 2e-5},
         "--learning_rate 2e-05: the language model is frozen in --stage align; .*--projector_learning_rate"),
        ({"stage": "align", **LORA}, "--lora_r 4: the language model is frozen in --stage align; adapters are for --stage instruct"),
        ({"stage": "align", "load_in_4bit": True}, "--load_in_4bit: for adapters, --stage instruct --lora_r 128"),
        ({"stage": "align", "projector_learning_rate": 0}, "nothing would be trained: every part is frozen"),
        ({"load_in_4bit": True}, "--load_in_4bit: for adapters, --stage instruct --lora_r 128"),
        ({"lora_alpha": 16}, "--lora_alpha: for adapters"),
        ({"lora_dropout": 0, "lora_alpha": 16, "load_in_4bit": True}, "--lora_alpha, --lora_dropout, --load_in_4bit: for adapters"),
        ({"learning_rate": 0, **LORA}, "--learning_rate 0 means a frozen language model: then --lora_r 0"),
        ({"learning_rate": 0, "projector_learning_rate": 0}, "nothing would be trained: every part is frozen"),
        *(({"learning_rate": value}, "--learning_rate must be from 0 to below 10") for value in (-1, 10, "nan", "inf")),
        ({"lora_target_modules": "q_proj"}, "--lora_target_modules: for adapters"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(settings, expected, stops):
    message = stops(**settings)
    assert re.search(expected, message) and "\n" not in message, message


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_a_whole_model_and_parts_are_two_beginnings(part, stage, stops, tiny_parts):
    message = stops(stage=stage, model_name_or_path=tiny_parts / "align", **{part: tiny_parts / part.split("_")[0]})
    assert re.search(
        f"^error: --{part}.* for joining two models, and {tiny_parts / 'align'} is a LLaVA already", message
    ), message
    assert "to join give --pretrain_mm_mlp_adapter and no --model_name_or_path" in message


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_the_projector_of_a_whole_model_is_not_replaced(stage, stops, tiny_parts, tmp_path):
    given = {"model_name_or_path": tiny_parts / "align", "pretrain_mm_mlp_adapter": tmp_path / "mm_projector.bin"}
    message = stops(stage=stage, **given, vision_tower=None, language_model=None)
    assert re.search(
        f"^error: --pretrain_mm_mlp_adapter.* for joining two models, and {tiny_parts / 'align'} is a LLaVA already",
        message,
    ), message


@pytest.mark.parametrize("stage, rows", [("align", 256), ("instruct", 128)])
def test_a_step_has_as_many_rows_on_any_number_of_processes(stage, rows, stage_parse, monkeypatch):
    given = stage_parse(stage)[1].as_given

    def steps(processes, batch, accumulated=None):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        return recipe.fill_defaults(
            {**given, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        )["gradient_accumulation_steps"]

    for processes in (1, 2, 8):
        assert (
            steps(processes, None) == rows // {"align": 8, "instruct": 4}[stage] // processes
            and steps(processes, 16) == rows // 16 // processes
        )
    for processes, batch in ((3, 4), (8, 12), (1, 512)):
        with pytest.raises(
            SystemExit,
            match=f"error: {rows} rows in a step, {processes * batch} at once: give --grad",
        ):
            steps(processes, batch)
        assert steps(processes, batch, 5) == 5


@pytest.mark.parametrize(
    "settings",
    [
        {"stage": "align"},
        {"stage": "align", "learning_rate": 0},  # as a settings.yaml has it
        {"stage": "align", "vision_learning_rate": 1e-6, "projector_learning_rate": 0},
        {},
        {"learning_rate": 0},
        {"projector_learning_rate": 0},
        {"vision_learning_rate": 2e-6},
        LORA,
        {**LORA, "load_in_4bit": True, "projector_learning_rate": 0, "vision_learning_rate": 1e-6},
        {"eval_fraction": 0, "sample_rows": 0, "model_max_length": 1, "max_eval_rows": 1, "sample_tokens": 1},
        {"eval_strategy": "no", "load_best_model_at_end": True, "metric_for_best_model": "x"},
        {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"},
        {"max_steps": 1},
    ],
)
def test_flags_that_can(settings, stage_parse):
    recipe.check(*stage_parse(**{"stage": "instruct", **settings}))


def test_what_is_not_given_depends_on_the_stage(stage_parse):
    free = dict.fromkeys(
        ("output_dir", "data_path", "per_device_train_batch_size", "gradient_accumulation_steps", "model_name_or_path")
    )
    for stage, more, rates, ratio, rest in (
        ("align", {}, (0, 1e-3, 0), "square", ("llava-align", "blip_laion_cc_sbu_558k.json", 8, 32, None)),
        ("instruct", {}, (0, 2e-5, 2e-5), "pad", ("llava-instruct", "llava_v1_5_mix665k.json", 4, 32, "llava-align")),
        (
            "instruct",
            LORA,
            (0, 2e-5, 2e-4),
            "pad",
            ("llava-instruct", "llava_v1_5_mix665k.json", 4, 32, "llava-align"),
        ),
        (
            "instruct",
            {"learning_rate": 1e-5, **LORA},
            (0, 2e-5, 1e-5),
            "pad",
            ("llava-instruct", "llava_v1_5_mix665k.json", 4, 32, "llava-align"),
        ),
    ):
        settings, training = stage_parse(stage, **free, **more)
        assert (
            tuple(recipe.learning_rates(settings, training).values()) == rates and settings.image_aspect_ratio == ratio
        )
        assert (training.output_dir, settings.data_path, training.per_device_train_batch_size, training.gradient_accumulation_steps,
                settings.model_name_or_path) == rest  # fmt: skip


@pytest.mark.parametrize("below", ["", "inside/deep"])
def test_a_file_in_place_of_the_output(below, stops, tmp_path):
    (tmp_path / "file").write_text("mine")
    message = stops(output_dir=tmp_path / "file" / below)
    assert "--output_dir" in message and "cannot be written" in message and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "stage, flag",
    [("instruct", "model_name_or_path"), ("align", "model_name_or_path"), ("instruct", "pretrain_mm_mlp_adapter")],
)
def test_the_result_does_not_overwrite_the_beginning(stage, flag, stops, tiny_parts, tmp_path):
    (tmp_path / "link").symlink_to(tiny_parts / "align")
    for out in (tiny_parts / "align", f"{tiny_parts}/align/", tmp_path / "link"):
        message = stops(stage=stage, output_dir=out, **{flag: tiny_parts / "align"})
        assert re.match(rf"error: --output_dir .* would overwrite --{flag}: choose another$", message), message
    message = stops(
        stage=stage, output_dir=tiny_parts, **{flag: tiny_parts / "align"}
    )  # as are checkpoints, which are cleared away
    assert re.match(rf"error: --output_dir .* would overwrite --{flag}: choose another$", message), message


@pytest.mark.parametrize("flag, folder", [("vision_tower", "vision"), ("language_model", "language")])
def test_the_result_does_not_overwrite_the_parts(flag, folder, stops, tiny_parts):
    message = stops(stage="align", output_dir=tiny_parts / folder)
    assert re.match(rf"error: --output_dir .* would overwrite --{flag}: choose another$", message), message


@pytest.mark.parametrize("flag", ["vision_tower", "language_model", "model_name_or_path"])
def test_a_path_that_does_not_exist_is_said_to(flag, stops):
    assert f"error: --{flag} no/where is no folder with a model (as --stage align makes one), nor a hub id: " in stops(
        stage="align", **{flag: "no/where"}
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(stops):
    assert re.search("no GPU.*--use_cpu", stops(use_cpu=False))


CONFIGS = {
    "missing": None,
    "empty": "",
    "a list": "- a",
    "damaged": "a: [",
    "an unknown name": "bits: 4",
    "null": "stage: null",
    "a wrong type": "seed: x",
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_a_config_file_that_cannot_be_read_is_one_message(text, tmp_path):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        recipe.main(["--config", str(tmp_path / "run.yaml")])
    assert re.match(
        "error: .*(run.yaml must hold lines|run.yaml cannot be read|--bits|stage|--seed)", end.value.code
    ), end.value.code


# ----------------------------------------------------------------------------------------------------------- models
def changed(source, target, change=None):
    """A copy of a folder, with its config.json or something else changed."""
    shutil.copytree(source, target)
    if isinstance(change, dict):
        (target / "config.json").write_text(json.dumps(json.loads((target / "config.json").read_text()) | change))
    elif change:
        change(target)
    return target


def without(*patterns):
    return lambda folder: [path.unlink() for pattern in patterns for path in folder.glob(pattern)]


def tokenizer_with(change):
    def make(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        change(tokenizer)
        tokenizer.save_pretrained(folder)

    return make


def no_eos(folder):
    own = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**own, "eos_token": None}))


def config_of(kind, **more):
    return lambda folder: kind(**more).save_pretrained(folder)


PARTS = {  # the part, how to spoil it, what the message says
    "GPT-2": ("language", config_of(GPT2Config), "its language model is gpt2; this recipe takes llama, mistral"),
    "a text with pictures": ("language", config_of(SiglipConfig), "its language model is siglip; this recipe takes llama, mistral"),
    "SigLIP": ("vision", config_of(SiglipConfig), "its vision encoder is siglip; this recipe takes clip_vision_model"),
    "SigLIP's tower": ("vision", config_of(SiglipVisionConfig), "siglip_vision_model; this recipe takes clip_vision_model"),
    "a language model as a tower": ("vision", config_of(GPT2Config), "its vision encoder is gpt2; this recipe takes clip"),
    "a whole LLaVA as a tower": ("vision", {"model_type": "llava"}, "its vision encoder is llava; this recipe takes clip"),
    "a whole LLaVA as language": ("language", {"model_type": "llava"}, "its language model is llava; this recipe takes"),
    "<image> is a token already": ("language", tokenizer_with(lambda t: t.add_tokens(["<image>", "<x>"])),
                                   "has a token <image>; take a plain"),
    "no EOS": ("language", no_eos, "its tokenizer has no EOS to end an answer"),
    "no tokenizer": ("language", without("tokenizer*"), "no processor: "),
    "no image processor": ("vision", without("preprocessor_config.json"), "no processor: "),
    "a damaged tokenizer": ("language", lambda folder: (folder / "tokenizer_config.json").write_text("{"), "no processor: "),
    "a damaged image processor": ("vision", lambda folder: (folder / "preprocessor_config.json").write_text("{"), "no processor: "),
    "a damaged config": ("language", lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
    "a config of nothing": ("vision", lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
    "no config": ("language", without("config.json"), "model_type"),
}  # fmt: skip


@pytest.mark.parametrize("part, spoil, expected", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_parts_that_cannot_be_joined_are_named(part, spoil, expected, stage, tiny_parts, stops, write, tmp_path):
    folder = changed(tiny_parts / part, tmp_path / "part", spoil)
    flag = {"vision": "vision_tower", "language": "language_model"}[part]
    more = {"pretrain_mm_mlp_adapter": tiny_parts / "align"} if stage == "instruct" else {}
    data = write([GOOD_CAPTION if stage == "align" else GOOD])
    message = stops(stage=stage, data_path=data, **{flag: folder}, **more)
    assert str(folder) in message and re.search(expected, message) and "\n" not in message, message


def test_a_whole_clip_is_a_vision_tower(tiny_parts, stage_parse, tmp_path):
    config = recipe.AutoConfig.from_pretrained(tiny_parts / "vision")
    CLIPConfig(vision_config=config.to_dict()).save_pretrained(tmp_path / "clip")
    joined = recipe.load_config(stage_parse("align", vision_tower=tmp_path / "clip")[0])
    assert (
        joined.vision_config.hidden_size == config.hidden_size
        and joined.vision_config.image_size == 56
        and joined.image_seq_length == 16
    )


WHOLE = {  # how to spoil a model, what the message says
    "several layers": ({"vision_feature_layer": [-2, -1]}, "takes features from several layers, not one"),
    "of GPT-2": ({"text_config": {"model_type": "gpt2"}}, "its language model is gpt2; this recipe takes"),
    "of SigLIP": (
        {"vision_config": {"model_type": "siglip_vision_model"}},
        "its vision encoder is siglip_vision_model; this recipe takes clip",
    ),
    "a LLaVA-NeXT": ({"model_type": "llava_next"}, "is llava_next, not a LLaVA"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "model_type"),
    "a number": (lambda folder: (folder / "config.json").write_text("5"), "--model_name_or_path"),
    "damaged": (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
    "empty": (lambda folder: (folder / "config.json").write_text(""), "not a valid JSON"),
    "no processor": (without("*processor*", "tokenizer*"), "no processor: "),
    "settings only": (
        without("*.json", "*.safetensors", "*.jinja", "*.bin"),
        "as --stage align makes one.*model_type",
    ),
    "no EOS": (no_eos, "its tokenizer has no EOS"),
}


@pytest.mark.parametrize("spoil, expected", WHOLE.values(), ids=WHOLE)
def test_a_whole_model_that_cannot_be_taken_is_named(spoil, expected, tiny_parts, stops, write, tmp_path):
    folder = changed(tiny_parts / "align", tmp_path / "model", spoil)
    message = stops(model_name_or_path=folder, data_path=write([GOOD]))
    assert str(folder) in message and re.search(expected, message) and "\n" not in message, message


def test_a_language_model_or_an_adapter_or_nothing_is_no_whole_model(tiny_parts, stops, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search("is llama, not a LLaVA", stops(model_name_or_path=tiny_parts / "language"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tiny_parts / "align")})
    )
    assert re.search(r"adapter is no folder with a model .*model_type", stops(model_name_or_path=tmp_path / "adapter"))
    for name in ("nowhere", "nobody/nothing", tmp_path / "nowhere"):
        message = stops(model_name_or_path=name)
        assert (
            message.startswith(
                f"error: --model_name_or_path {name} is no folder with a model (as --stage align makes one), nor a hub id: "
            )
            and "\n" not in message
        )
    assert stops(model_name_or_path=None).startswith(
        "error: --model_name_or_path llava-align is no folder with a model (as --stage align makes one), nor a hub id: "
    )  # stage 1 has not been run


# ------------------------------------------------------------------------------------------------------- projectors
def projector(model):
    """The projector of a model: {name: value}."""
    weights = load_file(model / "model.safetensors")
    return {
        name.split("multi_modal_projector.")[1]: value
        for name, value in weights.items()
        if "multi_modal_projector." in name
    }


def original(weights, prefix="model."):
    """A projector -> mm_projector.bin of the original LLaVA."""
    return {
        prefix + name.replace("linear_1", "mm_projector.0").replace("linear_2", "mm_projector.2"): value
        for name, value in weights.items()
    }


@pytest.fixture
def projects(stage_parse, tmp_path):
    """A function: what is in mm_projector.bin (or a path), settings as keywords -> the projector that the recipe takes from it."""

    def make(content, **settings):
        path = content
        if isinstance(content, dict):
            torch.save(content, path := tmp_path / "mm_projector.bin")
        settings, _ = stage_parse("instruct", pretrain_mm_mlp_adapter=path, **settings)
        return recipe.projector_weights(settings, recipe.load_config(settings))

    return make


def test_projectors_of_the_original_llava_are_taken(projects, tiny_parts):
    own = projector(tiny_parts / "align")
    equal = lambda one, other: one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert set(own) == {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}
    for content in (tiny_parts / "align", original(own), original(own, ""), original(own, "base_model.model.model.")):
        assert equal(projects(content), own)
    half = {name: value.half() for name, value in own.items()}
    assert equal(projects(original(half)), half)


def test_the_model_begins_with_the_projector_given(stage_parse, tiny_parts, tmp_path):
    own = {name: value + 1 for name, value in projector(tiny_parts / "align").items()}
    torch.save(original(own), tmp_path / "mm_projector.bin")
    for settings in ({}, LORA):
        model = recipe.load_model(
            *stage_parse("instruct", pretrain_mm_mlp_adapter=tmp_path / "mm_projector.bin", **settings)
        )
        assert all(
            torch.equal(value, own[name]) for name, value in model.model.multi_modal_projector.state_dict().items()
        )


FIT = "does not fit: it has .*linear_1.weight.*--vision_tower, --language_model"
NONE = "there is no projector in it; stage 1's output_dir or an mm_projector.bin is needed"
ODD_PROJECTORS = {  # what is made of the right one, what the message says
    "one layer": (lambda own: {f"model.mm_projector.{kind}": own[f"linear_1.{kind}"] for kind in ("weight", "bias")},
                  r"does not fit: it has .*weight': \(128, 128\).*--vision_tower, --language_model"),
    "another width of vision": (lambda own: original({**own, "linear_1.weight": torch.zeros(128, 64)}),
                                r"it has .*linear_1.weight': \(128, 64\).*--vision_tower, --language_model.*128"),
    "another width of text": (lambda own: original({name: torch.zeros([64] * value.dim()) for name, value in own.items()}), FIT),
    "a bias missing": (lambda own: original({name: value for name, value in own.items() if name != "linear_2.bias"}), FIT),
    "a third layer": (lambda own: original(own) | {"model.mm_projector.4.weight": torch.eye(128)}, r"4.weight': \(128"),
    "nested": (lambda own: {"state_dict": original(own)}, NONE),
    "other weights": (lambda own: {"model.layers.0.weight": torch.zeros(3)}, NONE),
    "numbers": (lambda own: dict.fromkeys(original(own), 5), NONE),
    "keys that are numbers": (lambda own: {0: torch.zeros(3)}, NONE),
    "nothing": (lambda own: {}, NONE),
    "a list": (lambda own: list(own.values()), NONE),
    "a tensor": (lambda own: own["linear_1.weight"], NONE),
    "a module": (lambda own: torch.nn.Linear(2, 2), "it is empty, damaged, or a pickle that holds more than weights"),
    "a text file": (b"version https://git-lfs.github.com/spec/v1\n", "it is empty, damaged, or a pickle that holds more than weights"),
    "an empty file": (b"", "it is empty, damaged"),
    "missing": (None, "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("make, expected", ODD_PROJECTORS.values(), ids=ODD_PROJECTORS)
def test_a_projector_that_does_not_fit_is_named(make, expected, stops, tiny_parts, tmp_path):
    path = tmp_path / "mm_projector.bin"
    if isinstance(make, bytes):
        path.write_bytes(make)
    elif make:
        torch.save(make(projector(tiny_parts / "align")), path)
    message = stops(pretrain_mm_mlp_adapter=path)
    assert (
        message.startswith(f"error: --pretrain_mm_mlp_adapter {path}")
        and re.search(expected, message)
        and "\n" not in message
    ), message


def test_a_damaged_or_a_wrong_projector_file_or_folder(stops, tiny_parts, tmp_path):
    torch.save(original(projector(tiny_parts / "align")), tmp_path / "cut.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-500])
    folder = changed(
        tiny_parts / "align", tmp_path / "model", lambda model: (model / "model.safetensors").write_bytes(b"\0" * 64)
    )
    for path, expected in (
        (tmp_path / "cut.bin", "corrupted"),
        (tiny_parts / "language", NONE),
        (tiny_parts / "json", NONE),
        (folder, "header"),
    ):
        message = stops(pretrain_mm_mlp_adapter=path)
        assert (
            message.startswith(f"error: --pretrain_mm_mlp_adapter {path}: ")
            and expected in message
            and "\n" not in message
        ), message


# --------------------------------------------------------------------------------------------------------- weights
def reweighted(folder, change):
    """Change the weights of a model in place: a function of {name: value} -> the new ones."""
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def dropped(text):
    return lambda folder: reweighted(
        folder, lambda weights: {name: value for name, value in weights.items() if text not in name}
    )


def narrower(text):
    return lambda folder: reweighted(
        folder, lambda weights: {n: v[..., :64].contiguous() if text in n else v for n, v in weights.items()}
    )


WEIGHTS = {  # which model, how to spoil it, what the message says
    "no projector": ("align", dropped("multi_modal_projector"),
                     "lacks 4 weights of a LlavaForConditionalGeneration: model.multi_modal_projector.linear_1.bias, "),
    "no head": ("language", dropped("lm_head"), "lacks 1 weights of a LlamaForCausalLM: lm_head.weight"),
    "a layer missing": ("vision", dropped("layers.1."), "lacks 16 weights of a CLIPVisionModel: "),
    "a projector of another size": ("align", narrower("linear_1.weight"), "mismatch"),
    "a layer of another size": ("language", narrower("0.self_attn.q_proj"), "mismatch"),
    "cut off": ("align", lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-99]), ""),
    "empty": ("language", lambda folder: (folder / "model.safetensors").write_bytes(b""), ""),
    "missing": ("vision", without("*.safetensors"), "no file named model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("part, spoil, expected", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_missing_are_not_made_up(part, spoil, expected, tiny_parts, stage_flags, write, tmp_path):
    folder = changed(tiny_parts / part, tmp_path / "model", spoil)
    flag = {"align": "model_name_or_path", "vision": "vision_tower", "language": "language_model"}[part]
    stage, row = ("instruct", GOOD) if part == "align" else ("align", GOOD_CAPTION)
    message = refusal(
        recipe.main,
        stage_flags(stage, **{flag: folder}, data_path=write([row]), eval_fraction=0, image_folder=tmp_path),
    )
    assert (
        message.startswith("error: cannot load the weights of ") and str(folder) in message and expected in message
    ), message
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- the whole thing
def test_good_input_passes_every_check(stops, write, capsys):
    """The other side of this file: with the same machinery, good rows get as far as the weights."""
    with pytest.raises(Loaded):
        stops(data_path=write([GOOD, shows("lime.png"), said("<image>, <image>", "a", image=TWO), said("q", "a")]))
    assert "USER: <image> x 16 \nWhich digit is this? ASSISTANT:« seven</s>»\n" in capsys.readouterr().out
    with pytest.raises(Loaded):
        stops(stage="align", data_path=write([GOOD_CAPTION, GOOD]))
    assert "<image> x 16« a seven\n»\n" in capsys.readouterr().out


def test_a_program_that_fails_ends_with_the_message(tiny_parts, write, tmp_path):
    rows = [GOOD, said("<image>", " ", image="red.png")]
    argv = two_stage_run(
        tiny_parts, tmp_path / "out", "instruct", data_path=write(rows), eval_fraction=0, image_folder=tmp_path
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "llava_two_stage.py"), *argv], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr[done.stderr.rindex("error: ") :].splitlines()
    assert "1 of 2 rows" in last[0] and last[1].startswith("  row 1: empty answer") and "--on_bad_rows skip" in last[2]
    assert len(last) == 3 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank, code", [("0", "error: x"), ("1", 1)])
def test_only_the_first_process_speaks(rank, code, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as end:
        recipe.fail("x")
    assert end.value.code == code


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_changes_under_the_run_ends_it_with_one_message(
    workers, stage_flags, write, images, tmp_path, monkeypatch
):
    names, load_model = images(4), recipe.load_model

    def change_then_load(*args):
        (tmp_path / "lime.png").write_bytes(b"changed")
        return load_model(*args)

    monkeypatch.setattr(recipe, "load_model", change_then_load)
    options = {"dataloader_num_workers": workers, "eval_fraction": 0, "image_folder": tmp_path}
    with pytest.raises(SystemExit) as end:
        recipe.main(
            stage_flags("align", data_path=write([{"image": name, "caption": "a"} for name in names]), **options)
        )
    assert re.fullmatch(r"error: .*unreadable image: .*lime\.png.*", end.value.code)
    assert not (tmp_path / "out" / "trainer_state.json").exists()
