"""finetune_minicpm_lora.py and bad input: one message that names the row and the remedy, exit status 1, before any weights load."""

import base64
import builtins
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Loaded, load_data, minicpm_run, refusal, stopped_by, talks
from PIL import Image
from safetensors.torch import load_file, save_file

import finetune_minicpm_lora as recipe
from tiny import idefics2, minicpm

GOOD = talks("Which digit is this?", "seven")
END = "<|im_end|>"


@pytest.fixture
def stops(minicpm_flags, monkeypatch, tmp_path):
    """A function: settings as keywords -> the message with which main() ends, before it loads any weights."""
    made = stopped_by(recipe, minicpm_flags, monkeypatch)
    return lambda **settings: made(**{"image_folder": tmp_path, **settings})


def turns(*pairs, image="red.png"):
    """(role, content) pairs -> a row."""
    return {"image": image, "conversations": [{"role": role, "content": content} for role, content in pairs]}


def shows(image):
    """A row whose question names <image>."""
    return {**talks("<image>\nWhich?", "a"), "image": image}


def asks(*texts, image="red.png"):
    return talks(*texts, image=image)


TWO = {"<image_00>": "red.png", "<image_01>": "lime.png"}
MATCH, MALFORMED, NO_IMAGE, ORDER = (
    "images do not match: the turns name ",
    "malformed image: ",
    "unreadable image: ",
    "wrong order of roles: turn ",
)
TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<think>",
    "</think>",
    "<unk>",
    "</image>",
    "<image_id>",
    "</image_id>",
    "<slice>",
    "</slice>",
]
NATIVE = [*TOKENS, "<|image_pad|>", "<|video_pad|>"]
HUB = [*TOKENS, "<box>", "</ref>", "<point>"]
BAD_ROWS = {  # what is wrong: the row, what the message says
    "no conversations": ({"image": "red.png"}, "no conversation: .*a list of turns, {role, content}"),
    "conversations null": ({"conversations": None}, "no conversation"),
    "conversations empty": ({"conversations": []}, "no conversation"),
    "conversations a text": ({"conversations": "[]"}, "no conversation"),
    "conversations a dict": ({"conversations": {"role": "user", "content": "q"}}, "no conversation"),
    "turns of LLaVA": ({"conversations": [{"from": "human", "value": "q"}]}, ORDER + "0 must be the user's, {role, content}; it is {'from': 'human'"),
    "turns that are texts": ({"conversations": ["q", "a"]}, ORDER + "0 must be the user's, .* it is 'q'"),
    "a turn of null": ({"conversations": [*GOOD["conversations"], None]}, ORDER + "2 must be the user's, .* it is None"),
    "a list of lists": ({"conversations": [GOOD["conversations"]]}, ORDER + "0 must be the user's"),
    "the answer first": (turns(("assistant", "a"), ("user", "q")), ORDER + "0 must be the user's, .*'assistant'"),
    "two questions": (turns(("user", "q"), ("user", "q"), ("assistant", "a")), ORDER + "1 must be the assistant's"),
    "two answers": (turns(("user", "q"), ("assistant", "a"), ("assistant", "b")), ORDER + "2 must be the user's"),
    "a late system turn": (turns(("user", "q"), ("system", "s"), ("assistant", "a")), ORDER + "1 must be the assistant's"),
    "two system turns": (turns(("system", "s"), ("system", "s"), ("user", "q"), ("assistant", "a")), ORDER + "1 must be the user's"),
    "an unknown role": (turns(("human", "q"), ("gpt", "a")), ORDER + "0 must be the user's, .*'human'"),
    "a capital role": (turns(("User", "q"), ("Assistant", "a")), ORDER + "0 must be the user's, .*'User'"),
    "a role of null": (turns((None, "q"), ("assistant", "a")), ORDER + "0 must be the user's"),
    "a role that is a list": (turns((["user"], "q"), ("assistant", "a")), ORDER + "0 must be the user's"),
    "a question only": (turns(("user", "q")), "no answer: the last turn is not the assistant's"),
    "a question last": (turns(("user", "q"), ("assistant", "a"), ("user", "q")), "no answer: the last turn is not the assistant's"),
    "a system turn only": (turns(("system", "s"), image=None), "no answer: the last turn"),
    "answer missing": ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant"}]}, "empty answer: turn 1, the assistant's, says None"),
    "answer null": (asks("q", None), "empty answer: turn 1, the assistant's, says None; it must be a text"),
    "answer empty": (asks("q", ""), "empty answer: turn 1, the assistant's, says ''"),
    "answer blank": (asks("q", " \r\n\t\u00a0"), "empty answer: turn 1"),
    "answer a number": (asks("q", 7), "empty answer: turn 1, the assistant's, says 7; it must be a text"),
    "answer zero": (asks("q", 0), "empty answer: turn 1, the assistant's, says 0"),
    "answer a truth value": (asks("q", True), "empty answer: turn 1, the assistant's, says True"),
    "answer a list": (asks("q", ["a"]), r"empty answer: turn 1, the assistant's, says \['a'\]"),
    "answer of parts": (asks("q", [{"type": "text", "text": "a"}]), "empty answer: turn 1"),
    "second answer blank": (asks("q", "a", "q", " "), "empty answer: turn 3, the assistant's"),
    "question blank": (asks(" ", "a"), "empty turn: turn 0, the user's, says ' '"),
    "question null": (asks(None, "a"), "empty turn: turn 0, the user's, says None"),
    "question a number": (asks(5, "a"), "empty turn: turn 0, the user's, says 5"),
    "system turn blank": (turns(("system", ""), ("user", "q"), ("assistant", "a")), "empty turn: turn 0, the system's"),
    "image not in the row": (asks("<image> q", "a", image=None), MATCH + r"\['<image>'\], the row has \[\]; use each image exactly once"),
    "image an empty text": (asks("<image> q", "a", image=""), MATCH + r"\['<image>'\], the row has \[\]"),
    "numbered, but one image": (asks("<image_00> q", "a"), MATCH + r"\['<image_00>'\], the row has \['<image>'\]"),
    "one image, but named": (asks("<image> q", "a", image={"<image_00>": "red.png"}), MATCH + r"\['<image>'\], the row has \['<image_00>'\]"),
    "used twice": (asks("<image> <image>", "a"), MATCH + r"\['<image>', '<image>'\]"),
    "used in two turns": (asks("<image> q", "a", "<image> r", "b"), MATCH + r"\['<image>', '<image>'\]"),
    "numbered and used twice": (asks("<image_00> <image_01> <image_00>", "a", image=TWO), MATCH),
    "one of two used": (asks("<image_00> q", "a", image=TWO), MATCH + r"\['<image_00>'\], the row has \['<image_00>', '<image_01>'\]"),
    "none of two used": (asks("q", "a", image=TWO), MATCH + r"\[\], the row has \['<image_00>', '<image_01>'\]"),
    "an unknown name": (asks("<image_00> <image_02>", "a", image=TWO), MATCH + r"\['<image_00>', '<image_02>'\]"),
    "another way to write it": (asks("<image_0> <image_1>", "a", image=TWO), MATCH),
    "an odd name": (asks("<image_a> q", "a"), MATCH + r"\[\], the row has \['<image>'\]"),
    "a slip": (asks("<image q", "a"), MATCH + r"\[\]"),
    "image in an answer": (asks("q", "see <image>"), "image in a turn of the assistant: <image> in turn 1; only the user shows images"),
    "numbered image in an answer": (asks("<image_00>", "<image_01>", image=TWO), "image in a turn of the assistant: <image_01> in turn 1"),
    "image in the system turn": (turns(("system", "<image>"), ("user", "q"), ("assistant", "a")), "image in a turn of the system: <image> in turn 0"),
    "image a list": (shows(["red.png"]), MALFORMED + r"'<image>' is \['red.png'\]; it must be a path, or for several images {\"<image_00>\": a path"),
    "image an empty list": (shows([]), MALFORMED + r"'<image>' is \[\]"),
    "image a number": (shows(5), MALFORMED + "'<image>' is 5"),
    "image zero": (shows(0), MALFORMED + "'<image>' is 0"),
    "image a truth value": (shows(False), MALFORMED + "'<image>' is False"),
    "image of numbers": (shows([[[0, 0, 0]] * 9] * 99), MALFORMED),
    "image by a name without braces": (shows({"image_00": "red.png"}), MALFORMED + "'image_00' is 'red.png'"),
    "image by a path": (shows({"path": "red.png"}), MALFORMED + "'path' is 'red.png'"),
    "image by an odd name": (shows({"<image_a>": "red.png"}), MALFORMED + "'<image_a>'"),
    "image by a name of two lines": (shows({"<image>\n": "red.png"}), MALFORMED),
    "image null by its name": (shows({"<image>": None}), MALFORMED + "'<image>' is None"),
    "image empty by its name": (shows({"<image>": ""}), MALFORMED + "'<image>' is ''"),
    "image a list by its name": (shows({"<image>": ["red.png"]}), MALFORMED + r"'<image>' is \['red.png'\]"),
    "image a dict by its name": (shows({"<image>": {"path": "red.png"}}), MALFORMED),
    "no such image": (shows("nowhere.png"), NO_IMAGE + ".*nowhere.png.*No such file.*--image_folder"),
    "second of two missing": (asks("<image_00><image_01>", "a", image={**TWO, "<image_01>": "nowhere.png"}), NO_IMAGE + ".*nowhere.png"),
    "image in the web": (shows("https://example.org/red.png"), NO_IMAGE + ".*https://example.org/red.png .No such file"),
    "image a folder": (shows("."), NO_IMAGE + ".*Is a directory"),
    "image a blank": (shows(" "), NO_IMAGE),
    "image with a NUL in its name": (shows("red\0.png"), NO_IMAGE),
    "image empty": (shows("empty.png"), NO_IMAGE + ".*empty.png"),
    "image truncated": (shows("truncated.jpg"), NO_IMAGE + ".*truncated.jpg.*truncated"),
    "image no picture": (shows("text.png"), NO_IMAGE + ".*text.png"),
    "several images in one file": (shows("pages.tiff"), "several images: .*pages.tiff holds 3.*its own file"),
    "a moving picture": (shows("film.gif"), "several images: .*film.gif"),
    "a moving picture, too": (shows("film.webp"), "several images: .*film.webp"),
    "image of no numbers": (shows("nan.tiff"), NO_IMAGE + ".*nan.tiff .its brightest value is nan"),
    "image too wide": (shows("wide.png"), "image too narrow: .*wide.png.*1000 x 49"),
    "image too high": (shows("high.png"), "image too narrow: .*high.png.*49 x 1000"),
    **{f"{token} in {where}": (row, f"control token: .*{re.escape(token)}.* in turn {n}.*: remove it")
       for token in NATIVE for where, n, row in (
           ("a question", 0, asks(f"What is {token}?", "a")),
           ("a later question", 2, asks("q", "a", f"<image>{token}", "b")),
           ("an answer", 1, asks("q", f"{token}a")),
           ("the system turn", 0, turns(("system", f"x{token}"), ("user", "q"), ("assistant", "a"))))},
}  # fmt: skip


def test_bad_rows_are_named_with_a_remedy(stops, write, odd_images):
    """All of them in one file: there are as many lines as bad rows, in their order."""
    for start in range(0, len(BAD_ROWS), 20):  # so many are listed
        some = list(BAD_ROWS.items())[start : start + 20]
        lines = stops(data_path=write([GOOD, *(row for _, (row, _) in some), GOOD])).splitlines()
        assert (
            lines[0].startswith(f"error: {len(some)} of {len(some) + 2} rows of ") and len(lines) == len(some) + 2
        ), lines
        assert lines[-1] == "Fix these rows (counted from 0), or train without them: --on_bad_rows skip"
        for n, (line, (name, (_, expected))) in enumerate(zip(lines[1:], some), 1):
            assert re.match(rf"  row {n}: {expected}", line) and len(line) < 600, (name, line)


def test_the_same_rows_are_bad_to_26(tiny_minicpm26, write, odd_images, monkeypatch, tmp_path):
    stops = stopped_by(
        recipe,
        lambda **settings: minicpm_run(tiny_minicpm26, tmp_path / "out", image_folder=tmp_path, **settings),
        monkeypatch,
    )
    rows = [row for name, (row, _) in BAD_ROWS.items() if not re.match(r"<\|(image|video)_pad", name)] + [
        asks(f"x {token}", "a") for token in HUB
    ]
    lines = stops(data_path=write([GOOD, *rows])).splitlines()
    assert lines[0].startswith(f"error: {len(rows)} of {len(rows) + 1} rows of ") and len(lines) == 22
    assert (
        f"{len(HUB) + 4 * len(TOKENS)} x control token" in lines[0]
        and f"{sum(MATCH in e for _, e in BAD_ROWS.values())} x images do not match" in lines[0]
    )


def test_a_picture_or_a_text_written_in_the_wrong_place_is_not_printed_as_a_whole(stops, write, odd_images, tmp_path):
    text = base64.b64encode((tmp_path / "large.png").read_bytes() * 100).decode()
    rows = [
        shows(text),
        shows([text]),
        shows({text: "red.png"}),
        {"conversations": [text]},
        asks("q", [text]),
        asks("q", {"a": text}),
        asks([text], "a"),
    ]
    lines = stops(data_path=write([GOOD, *rows])).splitlines()
    assert len(lines) == len(rows) + 2 and max(map(len, lines)) < 600, lines
    assert re.search(rf"row 1: {NO_IMAGE}.* \(File name too long\)", lines[1])


def test_an_image_too_large_is_named(stops, write, odd_images, monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 56 * 56)  # PIL refuses twice as many
    Image.new("RGB", (112, 112)).save(tmp_path / "photo.png")
    message = stops(data_path=write([GOOD, shows("photo.png")]))
    assert re.search(r"\n  row 1: unreadable image: .*photo.png .*12544 pixels.*shrink", message), message


def test_what_a_telephone_writes_is_one_image(minicpm_collate, odd_images):
    [picture] = [
        part["image"]
        for part in minicpm_collate().messages_of(shows("telephone.jpg"))[0]["content"]
        if part["type"] == "image"
    ]
    assert picture.getpixel((5, 5))[0] > 240


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_are_named_by_their_ids_too(name, stops, write, odd_images):
    ids = ["n1", 0, "", None, 7.5, ["a\nb"]]
    lines = stops(
        data_path=write(
            [{**GOOD, "id": "n0"}, *({**shows("text.png"), "id": one} for one in ids), shows("text.png")], name
        )
    ).splitlines()
    assert lines[0].startswith("error: 7 of 8 rows") and len(lines) == 9
    shown = [re.match(r"  row \d( \(id .*\))?: ", line)[1] for line in lines[1:-1]]
    assert shown == [" (id n1)", " (id 0)", None, None, " (id 7.5)", r" (id ['a\nb'])", None]


def test_a_key_given_twice_does_not_lose_a_picture(stops, write, odd_images, tmp_path):
    turns = json.dumps(talks("<image_00>", "a")["conversations"])
    for twice in (
        '{"image": {"<image_00>": "red.png", "<image_00>": "lime.png"}, "conversations": TURNS}'.replace(
            "TURNS", turns
        ),
        '{"image": "red.png", "image": "lime.png", "conversations": TURNS}'.replace("TURNS", turns),
        '{"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "content": "lime.png"}]}',
    ):
        for name, text in (("x.json", f"[{twice}]"), ("x.jsonl", twice)):
            (tmp_path / name).write_text(text)
            assert re.search(
                rf"cannot read .*{name}: .*a key appears twice in .*lime.png", stops(data_path=tmp_path / name)
            )


# ------------------------------------------------------------------------------------------------------- the prompt
def write_templated(folder, template):
    """The tiny 4.6 with another template, without weights."""
    processor = minicpm.processor()
    minicpm.model(processor.tokenizer).config.save_pretrained(folder)
    processor.chat_template = processor.tokenizer.chat_template = template
    processor.save_pretrained(folder)


CHANGED = {  # a template in which what comes before an answer depends on it: the answer that is refused
    "a space before the answer": (minicpm.CHAT_TEMPLATE.replace("</think>\\n\\n'", "</think>\\n\\n '"), "seven"),
    "another header in training": (
        minicpm.CHAT_TEMPLATE.replace("<|im_start|>assistant\\n<think>\\n", "<|im_start|>assistant\\n<think>\\n\\n"),
        "seven",
    ),
}


@pytest.mark.parametrize("template, answer", CHANGED.values(), ids=CHANGED)
def test_a_prompt_that_an_answer_changes_is_refused(template, answer, stops, write, odd_images, tmp_path):
    assert template != minicpm.CHAT_TEMPLATE
    write_templated(tmp_path / "model", template)
    message = stops(data_path=write([asks("q", answer)]), model_name_or_path=tmp_path / "model")
    assert re.search(
        rf"  row 0: prompt changed: '{answer}' changes the tokens before it: start it differently", message
    ), message


def test_line_breaks_around_an_answer_are_taken_off(every_minicpm, odd_images, tmp_path):
    """They would melt into the prompt's: of no token that comes before an answer does it decide."""
    settings, training = recipe.parse(minicpm_run(every_minicpm, tmp_path / "out", image_folder=tmp_path))
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    ids = lambda row: (batch := collator([row])).get("data", batch)["input_ids"].tolist()
    plain = ids(asks("q", "a\nb", "r", "c"))
    for space in ("\n", "\r\n\r\n", " ", "\t", "\u3000", "\x85", "\u2028"):
        assert ids(asks(f"{space}q{space}", f"{space}a\nb{space}", f"{space}r", f"{space}c{space}")) == plain


# --------------------------------------------------------------------------------------------------------- skipping
def test_skipped_rows_are_counted_and_the_first_twenty_listed(minicpm_parse, write, odd_images, capsys, tmp_path):
    bad = [asks("q", " ") if n % 3 else asks("q", "</think>") for n in range(24)]
    path = write([GOOD, *bad, shows("nowhere.png"), asks("q"), asks("q", "two")])
    train, _ = load_data(
        recipe, *minicpm_parse(data_path=path, on_bad_rows="skip", eval_fraction=0, image_folder=tmp_path)
    )
    assert train["row"] == [0, 27]
    out = capsys.readouterr().out
    assert "26 of 28 rows" in out
    for n, reason in ((16, "empty answer"), (8, "control token"), (1, "unreadable image"), (1, "no answer")):
        assert re.search(rf"\b{n} x {reason}\b", out)
    assert re.findall(r"\n  row (\d+)", out) == [str(n) for n in range(1, 21)] and "at most 20 shown" in out


def test_bad_rows_to_evaluate_on(stops, minicpm_parse, write, odd_images, capsys, tmp_path):
    files = {
        "data_path": write([GOOD, GOOD], "train.json"),
        "eval_data_path": write([GOOD, asks("q", ""), GOOD], "test.json"),
    }
    assert re.search(r"1 of 3 rows of the evaluation data .*\n  row 1: empty answer", stops(**files))
    train, held_out = load_data(recipe, *minicpm_parse(**files, on_bad_rows="skip", image_folder=tmp_path))
    assert len(train) == 2 and sorted(held_out["row"]) == [0, 2] and "row 1: empty answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row, settings, remedy, other",
    [
        (asks("q", " "), {"on_bad_rows": "skip"}, "", "--model_max_length"),
        (GOOD, {"model_max_length": 5}, "--model_max_length is 5: raise it", "--on_bad_rows"),
        (GOOD, {"model_max_length": 5, "on_bad_rows": "skip"}, "--model_max_length is 5: raise it", "--on_bad_rows"),
        (GOOD, {"model_max_length": 5, "on_long_rows": "stop"}, "--on_long_rows drop", "--on_bad_rows"),
    ],
)
def test_no_row_is_left(row, settings, remedy, other, stops, write, odd_images):
    message = stops(data_path=write([row] * 3), **settings)
    assert (
        re.search("3 of 3 rows", message)
        and remedy in message
        and other not in message
        and "No row would be left" in message
    ), message


def test_long_rows_do_not_hide_bad_ones(stops, write, odd_images):
    message = stops(data_path=write([asks("q", "a " * 99)] * 25 + [asks("q", " ")]), model_max_length=60)
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
    "a comma too many": ("x.json", f"[{ROW},\n]", "(Expecting value|Illegal trailing comma).*: line [12] column"),
    "single quotes": ("x.json", str([GOOD]), "double quotes: line 1 column 3"),
    "a line break in a text": ("x.json", '[{"conversations": "a\nb"}]', "Invalid control character at: line 1 column 22"),
    "one row": ("x.json", ROW, NEEDED),
    "rows by their ids": ("x.json", json.dumps({"1": GOOD}), NEEDED),
    "texts": ("x.json", '["a", "b"]', NEEDED),
    "a null among rows": ("x.json", f"[{ROW}, null]", NEEDED),
    "null": ("x.json", "null", NEEDED),
    "a number": ("x.json", "5", NEEDED),
    "jsonl called json": ("x.json", f"{ROW}\n{ROW}", "Extra data: line 2 column 1"),
    "json called jsonl": ("x.jsonl", json.dumps([GOOD], indent=1), r"line 1: .*one row a line"),
    "jsonl of lists": ("x.jsonl", f"[{ROW}]", NEEDED),
    "jsonl with a slip": ("x.jsonl", f'{ROW}\n\n{ROW}\n{{"image": \n{ROW}', r"line 4: Expecting value.*a .jsonl file has one row a line\)"),
    "jsonl cut off": ("x.jsonl", f"{ROW}\n{ROW[:-9]}", "line 2: "),
    "other keys": ("x.json", '[{"image": "a", "messages": []}] ', r"no row has 'conversations', only \['image', 'messages'\]"),
    "images": ("x.json", '[{"conversations": []}, {"images": ["a"], "conversations": []}]', "row 1 has a key 'images': images go under 'image'"),
    "Image": ("x.json", '[{"Image": "a", "conversations": []}]', "row 0 has a key 'Image': images go under 'image'"),
    "a system key": ("x.json", '[{"system": "a", "conversations": []}]', "row 0 has a key 'system': .*a system message is the first turn"),
    "no keys": ("x.json", "[{}]", ""),
    "nested too deep": ("x.json", "[" * 100000, "recursion"),
    "latin-1": ("x.json", json.dumps([asks("é", "a")], ensure_ascii=False).encode("latin-1"), "utf-8"),
    "utf-16": ("x.json", json.dumps([GOOD]).encode("utf-16"), "utf-8"),
    "half a character": ("x.json", json.dumps([GOOD, asks("What\ud83d?", "a"), GOOD, asks("q", "\udc00")]), r"row 1 has invalid Unicode .a lone surrogate.; fix"),
    "csv": ("x.csv", "image,question", r"this reads .json and .jsonl files"),
    "no ending": ("x", ROW, r"this reads .json and .jsonl files"),
    "a parquet file": ("x.parquet", b"PAR1", r"this reads .json and .jsonl files"),
    "missing": ("nowhere.json", None, "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("flag", ["data_path", "eval_data_path"])
@pytest.mark.parametrize("name, content, expected", FILES.values(), ids=FILES)
def test_a_file_that_cannot_be_read_is_named(name, content, expected, flag, stops, write, odd_images, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = stops(**{"data_path": write([GOOD] * 2), flag: tmp_path / name})
    assert (
        message.startswith(f"error: cannot read {tmp_path / name}: ")
        and re.search(expected, message)
        and "\n" not in message
    ), message


def test_a_folder_or_a_file_that_may_not_be_read(stops, tmp_path):
    (tmp_path / "folder.json").mkdir()
    assert re.search("cannot read .*folder.json: .*directory", stops(data_path=tmp_path / "folder.json"))
    assert re.search("cannot read nobody/nothing: this reads .json", stops(data_path="nobody/nothing"))


def test_one_image_cannot_be_divided(stops, write, odd_images):
    for rows in ([GOOD], [GOOD] * 5, [GOOD, asks("q", "a", image="./red.png")]):
        message = stops(data_path=write(rows), eval_fraction=0.1)
        assert "cannot be divided into training and evaluation" in message and "--eval_fraction" in message


# ----------------------------------------------------------------------------------------------- machine and flags
FULL = {"use_lora": False, "tune_llm": True}
RATES = "learning.rates? must be from 0.* to below 10"


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"greater_is_better": True}, "--greater_is_better true would keep the worst checkpoint by loss"),
        ({"tune_llm": True}, "--use_lora adapts the language model, --tune_llm trains all of it: for --tune_llm add --use_lora false"),
        ({**FULL, "q_lora": True}, "--q_lora: 4-bit weights cannot be trained themselves.*--use_lora true"),
        ({"use_lora": False, "q_lora": True}, "--q_lora: "),
        *(({**FULL, name: value}, f"--{name}: for --use_lora true only") for name, value in (
            ("lora_target_modules", "x"), ("lora_weight_path", "x"), ("lora_modules_to_save", "x"), ("lora_layers_to_transform", 1))),
        ({**FULL, "lora_target_modules": "x", "lora_layers_to_transform": [0, 1]}, "--lora_target_modules: for --use_lora true"),
        ({"vision_learning_rate": 1e-5}, "--vision_learning_rate is for --tune_vision"),
        ({"tune_vision": True, "vision_learning_rate": 0}, "--vision_learning_rate 0 means a frozen tower: omit --tune_vision"),
        ({"learning_rate": 0}, "--learning_rate 0 means a frozen language model: then --use_lora false and no --tune_llm"),
        ({**FULL, "learning_rate": 0, "projector_learning_rate": 1e-4}, "--learning_rate 0 means a frozen language model"),
        *(({name: value, "tune_vision": True}, RATES) for name in ("learning_rate", "projector_learning_rate", "vision_learning_rate")
          for value in (-1, 10, "nan", "inf")),
        ({"use_lora": False, "projector_learning_rate": 0}, "nothing would be trained: every part is frozen"),
        ({"use_lora": False, "learning_rate": 0}, "nothing would be trained"),
        ({"max_eval_rows": 0}, "--max_eval_rows"),
        ({"load_best_model_at_end": True, "eval_steps": 5, "save_steps": 10}, "--save_steps equal to --eval_steps.*--load_best_model_at_end false"),
        ({"metric_for_best_model": "eval_accuracy"}, "--metric_for_best_model accuracy: .*loss"),
        ({"output_dir": "/proc/nowhere"}, "--output_dir /proc/nowhere cannot be written"),
        ({"report_to": "nonsense"}, "--report_to .*nonsense"),
        ({"report_to": "clearml"}, "--report_to .*clearml"),
        ({"push_to_hub": True}, "--push_to_hub"),
        ({"lora_target_modules": "llm.("}, r"--lora_target_modules 'llm\.\(' is not a valid regular expression: .*position"),
        ({"lora_target_modules": "*proj"}, "--lora_target_modules .* is not a valid regular expression"),
        ({"lora_bias": "some"}, "--lora_bias"),
        ({"downsample_mode": "8x"}, "--downsample_mode"),
        ({"max_slice_nums": 1.5}, "--max_slice_nums"),
    ],
)  # fmt: skip
def test_flags_that_cannot_work(settings, expected, stops):
    message = stops(**settings)
    assert re.search(expected, message) and "\n" not in message, message


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"q_lora": True},
        FULL,
        {"use_lora": False},
        {"use_lora": False, "learning_rate": 0, "projector_learning_rate": 1e-4},
        {"use_lora": False, "tune_vision": True, "projector_learning_rate": 0},
        {"tune_vision": True, "vision_learning_rate": 1e-5, "projector_learning_rate": 0},
        {**FULL, "lora_r": 4, "lora_dropout": 0},  # as a settings.yaml has them
        {"lora_layers_to_transform": [0, 1], "lora_modules_to_save": ["embed_tokens"], "lora_target_modules": ".*proj"},
        {"eval_fraction": 0, "sample_rows": 0, "lora_r": 1, "model_max_length": 1, "max_slice_nums": 1, "max_eval_rows": 1, "sample_tokens": 1},
        {"metric_for_best_model": "eval_loss"},
        {"eval_strategy": "no", "metric_for_best_model": "x"},
        {"max_steps": 1},
    ],
)  # fmt: skip
def test_flags_that_can(settings, minicpm_parse):
    recipe.check(*minicpm_parse(**settings))


@pytest.mark.parametrize("below", ["", "inside/deep"])
def test_a_file_in_place_of_the_output(below, stops, tmp_path):
    (tmp_path / "file").write_text("mine")
    message = stops(output_dir=tmp_path / "file" / below)
    assert "--output_dir" in message and "cannot be written" in message and (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(stops):
    assert re.search("no GPU.*--use_cpu", stops(use_cpu=False))


# ----------------------------------------------------------------------------------------------------------- model
REFUSED = "this recipe was tested with MiniCPM-V 4.6, 4.7 and 2.6, and refuses other versions"
BOOBY_TRAP = "import pathlib\npathlib.Path(r'{}').touch()\n"
CONFIGS = {  # config.json, what the message says
    "2.5": ({"model_type": "minicpmv"}, f"is minicpmv: {REFUSED}"),
    "4.0": ({"model_type": "minicpmv", "version": "4.0"}, f"is minicpmv 4.0: {REFUSED}"),
    "4.5": ({"model_type": "minicpmv", "version": 4.5}, f"is minicpmv 4.5: {REFUSED}"),
    "o 2.6": ({"model_type": "minicpmo", "version": "2.6"}, f"is minicpmo 2.6: {REFUSED}"),
    "of tomorrow": ({"model_type": "minicpmv5_0"}, f"is minicpmv5_0: {REFUSED}"),
    "Idefics2": ({"model_type": "idefics2"}, f"is idefics2: {REFUSED}"),
    "no type": ({"hidden_size": 5}, f"has no config.json that names a model_type: {REFUSED}"),
    "empty": ({}, f"has no config.json that names a model_type: {REFUSED}"),
}


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("config, expected", CONFIGS.values(), ids=CONFIGS)
def test_other_models_are_refused_by_name_before_their_code_runs(
    config, expected, trust, stops, tmp_path, monkeypatch
):
    monkeypatch.setattr(builtins, "input", lambda *args: pytest.fail("a question on the terminal"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoConfig": "trap.Config", "AutoModel": "trap.Model"}} if config else {})
    )
    (tmp_path / "model" / "trap.py").write_text(BOOBY_TRAP.format(tmp_path / "ran"))
    message = stops(model_name_or_path=tmp_path / "model", trust_remote_code=trust)
    assert message == f"error: {tmp_path / 'model'} {expected}" and not (tmp_path / "ran").exists()


def test_26_without_its_code_is_one_message_and_no_question(tiny_minicpm26, stops, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *args: pytest.fail("a question on the terminal"))
    for flags in ({}, {"trust_remote_code": False}):
        message = stops(model_name_or_path=tiny_minicpm26 / "model", **flags)
        assert (
            re.search(
                "brings code of its own that runs on this machine.*--model_revision.*--trust_remote_code", message
            )
            and "\n" not in message
        )


def test_26_whose_code_wants_another_package(tiny_minicpm26, stops, tmp_path):
    shutil.copytree(tiny_minicpm26 / "model", tmp_path / "model")
    code = tmp_path / "model" / "configuration_minicpm.py"
    code.write_text(f"import nowhere_at_all\n{code.read_text()}")
    message = stops(model_name_or_path=tmp_path / "model", trust_remote_code=True)
    assert (
        re.search("--model_name_or_path .*nowhere_at_all. Run `pip install nowhere_at_all`", message)
        and "\n" not in message
    )


def test_26_knows_no_4x(tiny_minicpm26, stops):
    for trust in (True, False):
        message = stops(model_name_or_path=tiny_minicpm26 / "model", trust_remote_code=trust, downsample_mode="4x")
        assert message == "error: --downsample_mode 4x: 2.6 does not know it; 4.6 and 4.7 do"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", "\x00"], ids=["empty", "damaged", "a list", "a number", "no text"]
)
def test_a_config_that_cannot_be_read_is_one_message(text, tiny_minicpm, stops, tmp_path):
    shutil.copytree(tiny_minicpm / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(text)
    message = stops(model_name_or_path=tmp_path / "model")
    assert message.startswith(f"error: --model_name_or_path {tmp_path / 'model'}: ") and "\n" not in message, message


@pytest.mark.parametrize("name", ["nowhere", "nobody/nothing"])
def test_no_such_model(name, stops, tmp_path):
    (tmp_path / "run").mkdir()  # an adapter, say
    assert (
        stops(model_name_or_path=tmp_path / "run")
        == f"error: {tmp_path / 'run'} has no config.json that names a model_type: {REFUSED}"
    )
    message = stops(model_name_or_path=name)
    assert message.startswith(f"error: --model_name_or_path {name}: ") and "\n" not in message, message


def only(*names):
    """What leaves nothing but these files of a model."""
    return lambda folder: [path.unlink() for path in folder.iterdir() if path.name not in names]


def of_idefics2(folder):
    only("config.json")(folder)
    idefics2.processor().save_pretrained(folder)


PROCESSORS = {  # how to spoil a model folder
    "no processor": only("config.json", "model.safetensors"),
    "texts only": only("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    "of Idefics2": of_idefics2,
    "tokenizer damaged": lambda folder: (folder / "tokenizer_config.json").write_text("{"),
}


@pytest.mark.parametrize("kind", ["tiny_minicpm", "tiny_minicpm26"])
@pytest.mark.parametrize("spoil", PROCESSORS.values(), ids=PROCESSORS)
def test_a_processor_of_another_model_is_one_message(spoil, kind, request, stops, write, odd_images, tmp_path):
    shutil.copytree(request.getfixturevalue(kind) / "model", tmp_path / "model")
    spoil(tmp_path / "model")
    message = stops(model_name_or_path=tmp_path / "model", data_path=write([GOOD]), trust_remote_code=True)
    assert str(tmp_path / "model") in message and "\n" not in message, message


# ----------------------------------------------------------------------------------------------- weights and adapter
def test_damaged_weights_are_one_message(every_minicpm, write, odd_images, tmp_path):
    shutil.copytree(every_minicpm / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    argv = minicpm_run(
        every_minicpm,
        tmp_path / "out",
        model_name_or_path=tmp_path / "model",
        data_path=write([GOOD]),
        eval_fraction=0,
        image_folder=tmp_path,
    )
    for damaged in (whole[:-99], b"", None):
        weights.write_bytes(damaged) if damaged is not None else weights.unlink()
        assert refusal(recipe.main, argv).startswith(f"error: cannot load the weights of {tmp_path / 'model'}")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def adapter(tiny_minicpm, tmp_path_factory):
    """A folder with an adapter of rank 4 for the tiny 4.6, untrained."""
    out = tmp_path_factory.mktemp("adapter")
    settings, training = recipe.parse(minicpm_run(tiny_minicpm, out / "run", lora_r=4, lora_alpha=4))
    recipe.add_adapter(recipe.load_model(settings, training), settings, recipe.lora_config(settings)).save_pretrained(
        out
    )
    return out


def damaged(content):
    return lambda folder: (folder / "adapter_model.safetensors").write_bytes(content)


def of_another_width(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: torch.cat([value, value], -1) if "lora_A" in name else value for name, value in weights.items()},
        folder / "adapter_model.safetensors",
    )


ADAPTERS = {  # how to spoil it, flags, what the message says
    "missing": (shutil.rmtree, {}, ""),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), {}, ""),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), {}, "adapter_config.json"),
    "config damaged": (lambda folder: (folder / "adapter_config.json").write_text("{"), {}, ""),
    "weights damaged": (damaged(b""), {}, ""),
    "weights of nothing": (damaged(b"\x00" * 64), {}, ""),
    "another width": (of_another_width, {}, ""),
    "another rank": (None, {"lora_r": 8}, "has r 4, not 8: give the flags that it was trained with"),
    "another alpha": (None, {"lora_alpha": 8}, "has lora_alpha 4, not 8: give the flags"),
    "another dropout": (None, {"lora_dropout": 0}, "has lora_dropout 0.05, not 0"),
    "other modules": (
        None,
        {"lora_target_modules": ".*q_proj"},
        "has target_modules .*, not .*q_proj: give the flags",
    ),
    "other layers": (None, {"lora_layers_to_transform": 0}, "has target_modules "),
    "another bias": (None, {"lora_bias": "all"}, "has bias none, not all"),
    "a frozen projector": (None, {"projector_learning_rate": 0}, "has modules_to_save "),
    "the tower too": (None, {"tune_vision": True}, "has modules_to_save "),
}


@pytest.mark.parametrize("spoil, flags, expected", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_that_does_not_fit_is_one_message(
    spoil, flags, expected, adapter, minicpm_flags, write, odd_images, tmp_path
):
    shutil.copytree(adapter, tmp_path / "old")
    if spoil:
        spoil(tmp_path / "old")
    argv = minicpm_flags(
        lora_weight_path=tmp_path / "old",
        data_path=write([GOOD]),
        eval_fraction=0,
        image_folder=tmp_path,
        **{"lora_r": 4, "lora_alpha": 4, **flags},
    )
    with pytest.raises(SystemExit) as end:
        recipe.main(argv)
    message = end.value.code
    assert message.startswith(f"error: --lora_weight_path {tmp_path / 'old'}") and re.search(expected, message), (
        message
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [
        {"lora_target_modules": "nothing"},
        {"lora_target_modules": [".*q_proj", ".*k_proj"]},  # names, not regexes: there is more than one
        {"lora_target_modules": ["q_proj", "k_porj"]},
        {"lora_target_modules": "conv1d"},  # there, but no linear layer
        {"lora_layers_to_transform": [7]},
    ],
)
def test_modules_that_are_not_there(flags, every_minicpm, write, odd_images, tmp_path):
    argv = minicpm_run(
        every_minicpm, tmp_path / "out", data_path=write([GOOD]), eval_fraction=0, image_folder=tmp_path, **flags
    )
    with pytest.raises(SystemExit) as end:
        recipe.main(argv)
    assert re.match("error: .*target", end.value.code), end.value.code


def test_an_adapter_inside_of_what_is_trained_in_full_is_refused(every_minicpm, write, odd_images, tmp_path):
    """PEFT would pass over these layers."""
    flags = {
        "data_path": write([GOOD]),
        "eval_fraction": 0,
        "image_folder": tmp_path,
        "lora_target_modules": ["q_proj", "up_proj"],
    }
    message = refusal(recipe.main, minicpm_run(every_minicpm, tmp_path / "out", lora_modules_to_save="mlp", **flags))
    assert re.search(r"--lora_target_modules: \['.*mlp.up_proj'\] is in mlp, which is trained in full", message)


def test_a_module_that_stays_frozen_is_not_trained_in_full(every_minicpm, write, odd_images, tmp_path):
    """It would be saved, and never change."""
    flags = {"data_path": write([GOOD]), "eval_fraction": 0, "image_folder": tmp_path}
    is_26 = "26" in every_minicpm.name
    vision, projector = ("vpm", "resampler") if is_26 else ("model.vision_tower", "model.merger")
    inside = "patch_embedding"
    for wanted, more, frozen in (
        (inside, {}, [vision]),
        (vision, {}, [vision]),
        (projector, {"projector_learning_rate": 0}, [vision, projector]),
    ):
        message = refusal(
            recipe.main, minicpm_run(every_minicpm, tmp_path / "out", lora_modules_to_save=wanted, **flags, **more)
        )
        assert (
            message == f"error: --lora_modules_to_save {wanted}: no such module outside of the frozen parts {frozen}"
        )


@pytest.mark.parametrize(
    "text, names", [(".*q_proj", [".*q_proj"]), ("[q_proj, k_proj]", ["q_proj", "k_proj"]), ("null", None)]
)
def test_lora_target_modules_of_a_file_may_be_a_text(text, names, minicpm_flags, tmp_path):
    """As earlier runs wrote it."""
    (tmp_path / "run.yaml").write_text(f"lora_target_modules: {text}")
    settings, _ = recipe.parse(minicpm_flags(config=tmp_path / "run.yaml"))
    assert settings.lora_target_modules == names


# ------------------------------------------------------------------------------------------------- the whole thing
def test_good_input_passes_every_check(stops, write, odd_images, capsys):
    """The other side of this file: with the same machinery, good rows get as far as the weights."""
    with pytest.raises(Loaded):
        stops(
            data_path=write(
                [GOOD, shows("lime.png"), asks("<image_01>, <image_00>", "a", image=TWO), asks("q", "a", image=None)]
            )
        )
    assert (
        f"Which digit is this?{END}\n<|im_start|>assistant\n<think>\n\n</think>\n\n«seven{END}»\n"
        in capsys.readouterr().out
    )


def test_a_program_that_fails_ends_with_the_message(tiny_minicpm, write, odd_images, tmp_path):
    argv = minicpm_run(
        tiny_minicpm, tmp_path / "out", data_path=write([GOOD, asks("q", " ")]), eval_fraction=0, image_folder=tmp_path
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "finetune_minicpm_lora.py"), *argv], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr[done.stderr.rindex("error: ") :].splitlines()
    assert "1 of 2 rows" in last[0] and last[1].startswith("  row 1: empty answer") and "--on_bad_rows skip" in last[2]
    assert len(last) == 3 and not (tmp_path / "out").exists()


def test_26_asks_nothing_of_a_terminal(tiny_minicpm26, tmp_path):
    """In a process with a terminal of its own, where the library would ask."""
    argv = [*minicpm_run(tiny_minicpm26, tmp_path / "out"), "--trust_remote_code", "false"]
    mother, child = os.openpty()
    done = subprocess.run(
        [sys.executable, str(ROOT / "finetune_minicpm_lora.py"), *argv],
        cwd=tmp_path,
        stdin=child,
        capture_output=True,
        text=True,
        timeout=120,
    )
    os.close(mother), os.close(child)
    assert done.returncode == 1 and "[y/N]" not in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("then give --trust_remote_code")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_changes_under_the_run_ends_it_with_one_message(
    workers, minicpm_flags, write, images, tmp_path, monkeypatch
):
    names, load_model = images(4), recipe.load_model

    def change_then_load(*args):
        (tmp_path / "lime.png").write_bytes(b"changed")
        return load_model(*args)

    monkeypatch.setattr(recipe, "load_model", change_then_load)
    options = {"dataloader_num_workers": workers, "eval_fraction": 0, "image_folder": tmp_path}
    with pytest.raises(SystemExit) as end:
        recipe.main(minicpm_flags(data_path=write([talks("q", "a", image=name) for name in names]), **options))
    assert re.fullmatch(r"error: the data changed during the run: unreadable image: .*lime\.png.*", end.value.code)
    assert not (tmp_path / "out" / "trainer_state.json").exists()
