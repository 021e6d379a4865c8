"""Rows and data that cannot be trained on: one message that names the row and the remedy, before any weights load."""

import base64
import contextlib
import io
import json
import multiprocessing
import re
import runpy
import sys

import datasets
import pytest
from PIL import Image
from recipes import NAMES, Loaded, Recipe, asks, chat, prefers, said, talks

pytestmark = pytest.mark.usefixtures("odd_images")
of_two_stage = pytest.mark.parametrize("case", ["llava_two_stage"], indirect=True)
TWO = ["red.png", "lime.png"]
END, FAKE = "<end_of_utterance>", "<fake_token_around_image>"
OF_IDEFICS2 = [FAKE, END, "<s>", "</s>", "<unk>"]
OF_MINICPM = """<|im_start|> <|im_end|> <|endoftext|> <think> </think> <unk> </image> <image_id> </image_id> <slice>
</slice>""".split()


@pytest.fixture
def stops(case, write):
    """A function: rows, settings as keywords -> the message with which the recipe refuses to train on them."""

    def make(rows, name="rows.json", **settings):
        return case.refusal(case.flags_for(write(rows, name), **settings))

    return make


def good(case):
    return case.row("Which digit is this?", "It is a seven.")


def shows(case, image):
    """A row whose question has what is in the cell `image`."""
    return case.row("Which digit is this?", "It is a seven.", image=image)


def says(case, question, answer):
    """A row of these two cells, whatever they are; the rest of it is good."""
    if case.name == "finetune_minicpm_lora":
        return talks(question, answer)
    return said(question, answer) if case.talks_in_turns else case.row(question, answer)


def turns(*pairs, **more):
    """(role, text) pairs -> a row of them in the column conversations."""
    return {**more, "conversations": [{"role": role, "content": text} for role, text in pairs]}


# ------------------------------------------------------------------------------------ what is bad to every recipe
UNREADABLE = "unreadable image: "
PICTURES = {  # an image's path: what the message says of it
    "nowhere.png": UNREADABLE + ".*nowhere.png .No such file.*--image_folder",
    ".": UNREADABLE + ".*Is a directory",
    "red\0.png": UNREADABLE,
    "text.png": UNREADABLE + ".*text.png",
    "truncated.jpg": UNREADABLE + ".*truncated.jpg.*truncated",
    "nan.tiff": UNREADABLE + ".*nan.tiff .its values are from nan",
    "negative.tiff": UNREADABLE + ".*negative.tiff .its values are from -1",
    "pages.tiff": "several frames: .*pages.tiff is animated or has pages, 3 of them; .*its own file",
}
NO_IMAGE = [None, "", [], [None], {"bytes": None, "path": None}]  # cells that count as none
ODD_IMAGES = [  # a cell of an image, what the message says
    (5, "malformed image: 5 must be a path, bytes, base64"),
    ([["red.png"]], r"malformed image: \['red.png'\] must be a path"),
    ([[[0, 0, 0]] * 9] * 9, r"malformed image: \[\[0, 0, 0\], "),
    ({"url": "http://x.org/a.png"}, "web address: http://x.org/a.png: .*save it to a file first"),
    ({"path": "nowhere.png", "bytes": None}, UNREADABLE + ".*nowhere.png.*--image_folder"),
]
NOT_ONE = "not one (page|image): {} (pages|images); .*--image_column"
UNEQUAL = r"images do not match: the turns show {} images .*, the row has {} .*; each must be shown exactly once"
OF_NO_IMAGE = dict.fromkeys(NAMES, UNEQUAL.format(1, 0))
OF_NO_IMAGE["idefics2_docvqa"] = NOT_ONE.format(0)
del OF_NO_IMAGE["dpo_idefics2"]  # a question need not be about an image
BLANK = [None, "", " \r\n\t", "\u00a0"]
OF_BLANK = dict.fromkeys(NAMES, "empty answer: ")  # what the message says of a blank answer
OF_BLANK |= {"idefics2_docvqa": "(no|empty) answer: .*--answers_column"}
OF_BLANK |= {"dpo_idefics2": "(one answer: .* only a rejected answer|empty .*chosen)"}
NO_TEXT = [(True, "True; it must be a text"), (0.5, "0.5: .*as text"), ([["a"]], r"\[+'a'\]+; ")]
NO_QUESTION = [(7, "7; it must"), (0, "0; it must")]  # an answer may be a whole number
CONTROL_TOKENS = {  # those that may be typed
    "sft_llava": ["<s>", "</s>", "<pad>", "<unk>"],
    "idefics2_docvqa": OF_IDEFICS2,
    "dpo_idefics2": OF_IDEFICS2,
    "finetune_minicpm_lora": [*OF_MINICPM, "<|image_pad|>", "<|video_pad|>"],
    "llava_two_stage": ["<s>", "</s>", "<unk>"],
}


def control(token, place):
    return rf"control token: {re.escape(token)} in {place} .*: remove it"


def common_faults(case):
    """{what is wrong: (row, what the message says)}, of what a row of every recipe can have."""
    images = [*PICTURES.items(), *ODD_IMAGES]
    if case.name in OF_NO_IMAGE:
        images += [(cell, OF_NO_IMAGE[case.name]) for cell in NO_IMAGE]
    faults = {f"image {cell!r}": (shows(case, cell), expected) for cell, expected in images}
    for cell in BLANK:
        faults[f"question {cell!r}"] = (says(case, cell, "a"), "empty question: ")
        faults[f"answer {cell!r}"] = (says(case, "q", cell), OF_BLANK[case.name])
    for cell, expected in NO_TEXT + NO_QUESTION:
        faults[f"question {cell!r}"] = (says(case, cell, "a"), f"question is not a text: {expected}")
    for cell, expected in NO_TEXT:
        faults[f"answer {cell!r}"] = (says(case, "q", cell), f"answer is not a text: {expected}")
    faults["<image1>"] = (says(case, "<image1> q", "a"), "unknown placeholder: '<image1>' .*write <image>")
    for token in CONTROL_TOKENS[case.name]:
        faults[f"{token} in a question"] = (says(case, f"What is {token}?", "a"), control(token, "the question"))
    for token in ["<image>", *CONTROL_TOKENS[case.name]]:
        faults[f"{token} in an answer"] = (says(case, "q", f"{token}a"), control(token, "the answer"))
    return faults


# ------------------------------------------------------------------------- what only rows of some recipes can have
ALTERNATE = {  # roles of the turns: which one is wrong, and whose it must be
    "assistant user": (0, "user"),
    "user user assistant": (1, "assistant"),
    "user assistant assistant": (2, "user"),
    "system system user assistant": (1, "user"),
}


def faults_of_turns(case):
    """Of the two recipes whose turns must alternate."""
    of_turns, question_and_answer = "no conversation: .*a list of turns, {", [("user", "q"), ("assistant", "a")]
    faults = {}
    for roles, (n, role) in ALTERNATE.items():
        pairs = [(role, "a") for role in roles.split()]
        faults[roles] = (turns(*pairs), f"order of turns: turn {n} must be the {role}'s")
    for roles in ("user", "user assistant user", "system"):
        pairs = [(role, "a") for role in roles.split()]
        faults[f"only {roles}"] = (turns(*pairs), "no answer: the last turn is not ")

    some = turns(*question_and_answer)["conversations"]
    for cell, expected in ((None, NO_TURNS), ([], NO_TURNS), ("[]", of_turns), (some[0], of_turns)):
        faults[f"conversations {cell!r}"] = ({"image": "red.png", "conversations": cell}, expected)
    faults["no conversations"] = ({"image": "red.png"}, NO_TURNS)
    faults["texts"] = ({"conversations": ["q", "a"]}, "malformed row: turn 0 must be {role, content} or .*'q'")
    blank = turns(*question_and_answer, ("user", "q"), ("assistant", " "))
    faults["a second answer that is blank"] = (blank, "empty answer: .*turn 3")
    faults["a blank system turn"] = (turns(("system", " "), *question_and_answer), "empty system message: ")
    token = CONTROL_TOKENS[case.name][0]
    typed = turns(("system", f"x{token}"), *question_and_answer)
    faults["a token in the system turn"] = (typed, control(token, "the system message"))
    return faults


NO_TURNS = "missing column: it has nothing in (messages or conversations|conversations or messages)"
MARKERS = {  # texts of a conversation, its images: how many are shown, and how many there are
    "image without <image>": (["q", "a"], "red.png", 0, 1),
    "<image> in two turns": (["<image> q", "a", "<image> r", "b"], "red.png", 2, 1),
    "one <image> of two": (["<image> q", "a"], TWO, 1, 2),
}


def faults_of_llava_json():
    """Of the two recipes that read LLaVA's JSON, in which <image> stands for an image."""
    faults = {}
    for kind, (texts, image, markers, images) in MARKERS.items():
        faults[kind] = (said(*texts, image=image), UNEQUAL.format(markers, images))
    second = said("<image><image>", "a", image=["red.png", "nowhere.png"])
    return {**faults, "second of two images": (second, UNREADABLE + ".*nowhere.png")}


def asked(content="Which?", answer="three", images=("red.png",)):
    return chat(("user", content), ("assistant", answer), images=images)


PART, IMAGE = {"type": "text", "text": "Which?"}, {"type": "image"}
MALFORMED = "malformed row"
FOR_SFT = {
    "no column": ({"question": "q", "answer": "a"}, NO_TURNS),
    "both formats": ({**said("q", "a"), **asked(images=())}, "two formats: .*--ignore_columns conv"),
    "no turn": (said(), NO_TURNS),
    "answer first": (chat(("assistant", "a"), ("user", "q"), ("assistant", "b")), "order of turns: .*comes first"),
    "unknown role": (chat(("user", "q"), ("tool", "a")), "unknown role: turn 1 is by 'tool'; known"),
    "index too large": (asked([{**IMAGE, "index": 1}]), UNEQUAL.format(1, 1)),
    "index twice": (asked([{**IMAGE, "index": 0}] * 2, images=TWO), UNEQUAL.format(2, 2)),
    "index a letter": (asked([{**IMAGE, "index": "x"}]), MALFORMED + ".*index 'x'; it must be a number"),
    "index a list": (asked([{**IMAGE, "index": [0]}]), MALFORMED + r".*index \[0\]"),
    "image in an answer": (asked(answer=[IMAGE, PART]), "image in a turn of the assistant"),
    "<image> in a message": (asked("the <image>", images=()), UNEQUAL.format(1, 0)),
    "</s> of the system": (chat(("system", "</s>"), ("user", "q"), ("assistant", "a")), "control token: </s> .*sys"),
    "video": (asked([{"type": "video"}, PART], images=()), "unknown part: turn 0 .*'video'.*known are"),
    "text null": (asked([{"type": "text", "text": None}], images=()), "empty question: "),
    "turn without value": ({"conversations": [{"from": "human", "text": "q"}]}, "key that is not .*turn 0 has 'text'"),
}

LANGUAGE = r"language: no question in 'en', there are \[{}\]; see --language"
FOR_DOCVQA = {
    "answers null": ({**asks("q"), "answers": None}, "no answer: .*--answers_column"),
    "answers a number": ({**asks("q"), "answers": 0.5}, "answer is not a text: 0.5: .*as text"),
    "<image> in the second answer": (asks("q", "47", "<image>"), control("<image>", "the answer")),
    "question of a language with a token": (asks({"en": "<unk>"}, "47"), control("<unk>", "the question")),
    "question null in this language": (asks({"en": None, "de": "W", "fr": "Q"}, "47"), LANGUAGE.format("'de', 'fr'")),
    "question in another language": (asks({"de": "Was?"}, "47"), LANGUAGE.format("'de'")),
    "question {'text': 'a'}": (asks({"text": "a"}, "47"), LANGUAGE.format("'text'")),  # the name of a language
}

PAIR = prefers("Which digit is this?", "It is a seven.", "It is a two.")


def message(content, role=None):
    return [{"content": content} if role is None else {"role": role, "content": content}]


def faults_of_pairs():
    """Of dpo_idefics2.py: a text may be messages, and there are two answers."""
    two, blank = message("x", "user") + message("y", "assistant"), message([{"type": "text", "text": " "}])
    typed, no_content = message(f"{END}\nWhat?"), [{"role": None}]
    faults = {
        "question no message": ({**PAIR, "question": []}, "(no|empty) question: "),
        "question a message without content": ({**PAIR, "question": no_content}, "(no|empty) question: "),
        "question a blank message": ({**PAIR, "question": blank}, "empty question: "),
        "question a message with a token": ({**PAIR, "question": typed}, control(END, "the question")),
        "question and answer": ({**PAIR, "question": two}, "no question: .*must end with a turn of the user"),
        "question the other side's": ({**PAIR, "question": two[1:]}, "order of turns: turn 0 must be the user's"),
    }
    for which, other in (("chosen", "rejected"), ("rejected", "chosen")):
        cells = {
            "no message": ([], ONE_ANSWER.format(other)),
            "a message without content": (no_content, ONE_ANSWER.format(other)),
            "a blank message": (blank, f"empty .*{which}"),
            "a message with a token": (typed, control(END, "the answer")),
            "two messages": (two, f"different prompts: the {which} conversation begins with other turns"),
            "the other side's": (two[:1], f"order of turns: the {which} answer must be a turn of the ass"),
        }
        faults |= {f"{which} {kind}": ({**PAIR, which: cell}, expected) for kind, (cell, expected) in cells.items()}
    return faults


ONE_ANSWER = "one answer: the row has only a {} answer"
NO_ANSWERS = "no answer: .*--chosen_column and --rejected_column"
EQUAL = "equal answers: chosen 'a b' and rejected '{}' are the same to the tokenizer"
SHOWN_IN = message([IMAGE, PART], "assistant")
FOR_DPO = {
    "nothing but an empty system turn": ({**PAIR, "question": message("", "system")}, "empty question: "),
    "rejected null": ({**PAIR, "rejected": None}, ONE_ANSWER.format("chosen")),
    "rejected NaN": ({**PAIR, "rejected": float("nan")}, ONE_ANSWER.format("chosen")),
    "no answers": ({"image": "red.png", "question": "q"}, NO_ANSWERS),
    "equal answers": (prefers("q", "a b", "a b"), EQUAL.format("a b")),
    "equal but for space around": (prefers("q", " a b\n", "\ta b"), EQUAL.format("a b")),
    "equal to the tokenizer": (prefers("q", "a b", "a\u2581b"), EQUAL.format("a\u2581b")),
    "two images in a question": ({**PAIR, "question": message([IMAGE, IMAGE, PART], "user")}, UNEQUAL.format(2, 1)),
    "an answer with an image": ({**PAIR, "chosen": SHOWN_IN}, "image in a turn of the assistant"),
}

NUMBERED = {"<image_00>": "red.png", "<image_01>": "lime.png"}
ODD = "malformed image: {}.*; it must be .*, or for several .*<image_00>"
PLACEHOLDERS = {  # texts of a conversation, its images: what the message says
    "used twice": (["<image> <image>", "a"], "red.png", UNEQUAL.format(2, 1)),
    "one of two used": (["<image_00> q", "a"], NUMBERED, UNEQUAL.format(1, 2)),
    "another way to write it": (["<image_0> <image_1>", "a"], NUMBERED, UNEQUAL.format(2, 2)),
    "second of two": (["<image_00><image_01>", "a"], {**NUMBERED, "<image_01>": "nowhere.png"}, UNREADABLE + ".*nowh"),
    "a name without braces": (["<image>", "a"], {"image_00": "red.png"}, ODD.format("'image_00' is 'red.png'")),
    "two of one name": (["<image>", "a"], {"<image>": TWO}, ODD.format("'<image>' is ")),
}
FOR_MINICPM = {kind: (talks(*texts, image=image), shown) for kind, (texts, image, shown) in PLACEHOLDERS.items()}
FOR_MINICPM["image in the system turn"] = (
    turns(("system", "<image>"), ("user", "q"), ("assistant", "a")),
    control("<image>", "the system message"),
)

FOR_TWO_STAGE = {
    "a caption": ({"image": "red.png", "caption": "a seven"}, "missing column"),
    "image in an answer": (said("q", "a <image>", image="red.png"), UNEQUAL.format(0, 1)),
    "image in an answer, too": (said("<image> q", "see <image>", image="red.png"), control("<image>", "the answer")),
}


def faults(case):
    """All that can be wrong with a row of this recipe; what is its own takes the place of what is common."""
    found = common_faults(case)
    if case.name in ("sft_llava", "llava_two_stage"):
        found |= faults_of_llava_json()
    if case.name in ("finetune_minicpm_lora", "llava_two_stage"):
        found |= faults_of_turns(case)
    if not case.talks_in_turns:
        unequal = UNEQUAL.format(0, 2) if case.name == "dpo_idefics2" else NOT_ONE.format(2)
        found["two images"] = (shows(case, TWO), unequal)
        found["<image> twice"] = (says(case, "<image> q <image>", "a"), UNEQUAL.format(2, 1))
    if case.name == "dpo_idefics2":
        found |= faults_of_pairs()
    own = (FOR_SFT, FOR_DOCVQA, FOR_DPO, FOR_MINICPM, FOR_TWO_STAGE)
    return found | own[NAMES.index(case.name)]


def assert_each_is_named(stops, bad_rows, some_good, **settings):
    """All of the bad rows in files of twenty: each has its line."""
    wrong = {}
    for start in range(0, len(bad_rows), 20):  # so many are listed
        some = list(bad_rows.items())[start : start + 20]
        first, *lines, last = stops([some_good, *(row for _, (row, _) in some), some_good], **settings).splitlines()
        assert first.startswith(f"error: {len(lines)} of {len(some) + 2} rows of ")
        assert last == "Fix these rows (counted from 0), or train without them: --on_bad_rows skip"
        named = dict(re.match(r"  row (\d+): (.*)", line).groups() for line in lines)
        for n, (kind, (_, expected)) in enumerate(some, 1):
            problem = named.pop(str(n), "accepted")
            if not re.match(expected, problem) or len(problem) > 600:
                wrong[kind] = problem
        assert named == {}
    assert wrong == {}


def test_bad_rows_are_named_with_reason_and_remedy(case, stops):
    assert_each_is_named(stops, faults(case), good(case))


def test_the_same_rows_are_bad_to_minicpm_26(tiny_minicpm26, write, tmp_path):
    """Its processor and its tokens are others."""
    case = Recipe("finetune_minicpm_lora", tiny_minicpm26, tmp_path)
    bad = {kind: row for kind, (row, _) in faults(case).items() if "_pad|> in" not in kind}  # no tokens of 2.6
    bad |= {token: says(case, f"x {token}", "a") for token in ("<box>", "</ref>", "<point>")}
    lines = case.refusal(case.flags_for(write([good(case), *bad.values()]))).splitlines()
    assert lines[0].startswith(f"error: {len(bad)} of {len(bad) + 1} rows of ") and len(lines) == 22
    assert f"{2 * len(OF_MINICPM) + 3 + 3} x control token" in lines[0]


# ---------------------------------------------------------------------------------------------------- captions
CAPTION = {"image": "red.png", "caption": "a seven"}
NO_CAPTION = "no caption: align takes one image and its caption, not {} turns, {} images"
BAD_CAPTIONS = {
    "null": ({**CAPTION, "caption": None}, NO_TURNS),
    "no image": ({"caption": "a"}, UNEQUAL.format(1, 0)),
    "two images": ({**CAPTION, "image": TWO}, UNEQUAL.format(1, 2)),
    "with an image": ({**CAPTION, "caption": "<image>"}, control("<image>", "the answer")),
    "two lines": ({**CAPTION, "caption": "a digit\nan odd one"}, "more than a caption: it has .* a second line"),
    "and a conversation": (CAPTION | said("<image>", "a"), "two formats: .*--ignore_columns caption"),
    "several turns": (said("<image>", "a", "q", "b", image="red.png"), NO_CAPTION.format(4, 1)),
    "turns without an image": (said("q", "a"), NO_CAPTION.format(2, 0)),
    "turns with two images": (said("<image><image>", "a", image=TWO), NO_CAPTION.format(2, 2)),
    "USER:": ({**CAPTION, "caption": " USER: q"}, "more than a caption: it has roles"),
    "### Assistant:": ({**CAPTION, "caption": "### Assistant: b"}, "more than a caption: it has roles"),
}


@of_two_stage
def test_bad_captions_are_named_with_reason_and_remedy(case, write):
    def stops(rows):
        return case.refusal(case.flags_for(write(rows), stage="align"))

    system = turns(("system", "s"), ("user", "<image>"), ("assistant", "a"), image="red.png")
    bad = {**BAD_CAPTIONS, "a system turn": (system, NO_CAPTION.format(3, 1))}
    assert_each_is_named(stops, bad, CAPTION)


@of_two_stage
def test_what_is_bad_to_instruct_is_bad_to_align(case, write):
    rows = [row for kind, (row, _) in faults(case).items() if kind != "a caption"]
    message = case.refusal(case.flags_for(write([CAPTION, *rows]), stage="align"))
    assert message.startswith(f"error: {len(rows)} of {len(rows) + 1} rows of ")


# ------------------------------------------------------------------------------------- how rows and images are named
def test_what_is_written_in_the_wrong_place_is_not_printed_as_a_whole(case, stops):
    text, broken = (base64.b64encode(some * 500).decode() for some in (b"no image", b"\x89PNG\r\n\x1a\n"))
    cells = [text, [[text]], {"path": text}, broken, {"bytes": broken}, f"data:image/png;base64,{broken[1:]}"]
    rows = [shows(case, cell) for cell in cells]
    rows += [says(case, "q", [[text]]), says(case, "q", {"a": text}), says(case, [[text]], "a")]
    if case.name == "sft_llava":
        rows.append(asked([{"type": "image_url", "image_url": text}], images=()))
    _, *lines, _ = stops([good(case), *rows]).splitlines()
    assert len(lines) == len(rows) and re.match(rf"  row 1: {UNREADABLE}.* \(File name too long\)", lines[0])
    assert max(map(len, lines)) < 600


def test_an_image_too_large_is_named(case, stops, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 56 * 56)  # PIL refuses twice as many
    Image.new("RGB", (112, 112)).save(tmp_path / "photo.png")
    message = stops([good(case), shows(case, "photo.png")])
    assert re.search(r"\n  row 1: image too large: .*photo.png has more than 6,272 pixels: shrink it", message), (
        message
    )


def test_what_a_telephone_writes_is_one_image(case, tmp_path):
    """An MPO file has a preview beside the photo."""
    collator = case.collator()
    for cell in ("telephone.jpg", (tmp_path / "telephone.jpg").read_bytes()):
        [image] = case.module.pil_images(collator.messages_of(shows(case, cell)))
        assert image.getpixel((5, 5))[0] > 240


IDS = {"n1": " (id n1)", "": None, 0: " (id 0)", None: None, 7.5: " (id 7.5)"}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_rows_are_named_by_their_ids_too(case, name, stops):
    ids = ["n1", ""] if name == "rows.parquet" else IDS
    rows = [{**good(case), "id": "n0"}, *({**shows(case, "text.png"), "id": one} for one in ids)]
    first, *lines, _ = stops([*rows, shows(case, "text.png")], name).splitlines()
    assert first.startswith(f"error: {len(ids) + 1} of {len(ids) + 2} rows of ") and name in first
    shown = [re.match(rf"  row {n}( \(id .*\))?: {UNREADABLE}", line)[1] for n, line in enumerate(lines, 1)]
    assert shown == [*(IDS[one] for one in ids), None]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_embedded_images_that_are_none_are_named_without_their_bytes(case, kind, tmp_path):
    def stops(cells, feature):
        rows = [shows(case, None)] * len(cells)
        features = datasets.Dataset.from_list(rows).features | {"image": feature}
        rows = [{**row, "image": cell} for row, cell in zip(rows, cells, strict=True)]
        data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        (data.to_parquet if kind == "parquet" else data.save_to_disk)(tmp_path / f"{len(cells)}.{kind}")
        return case.refusal(case.flags_for(tmp_path / f"{len(cells)}.{kind}"))

    none = b"\x89PNG no"
    cells = [{"bytes": (tmp_path / "red.png").read_bytes(), "path": None}, {"bytes": none, "path": "scan.png"}]
    cells += [{"bytes": none, "path": None}, None]
    first, *lines, _ = stops(cells, datasets.Image()).splitlines()
    expected = ["1: unreadable image: scan.png ", "2: unreadable image: its bytes "]
    if case.name in OF_NO_IMAGE:
        expected.append(f"3: {OF_NO_IMAGE[case.name]}")
    assert first.startswith(f"error: {len(expected)} of 4 rows of ")
    assert all(re.match(f"  row {one}", line) for one, line in zip(expected, lines, strict=True)), lines
    binary = datasets.Value("binary")
    bad = [(none, binary), ([none], datasets.List(binary)), ([{"bytes": none}], datasets.List(datasets.Image()))]
    for cell, feature in bad:
        message = stops([cell] * 2, feature)
        assert "row 0: unreadable image: its bytes " in message and "x89" not in message


# ---------------------------------------------------------------------------------------------- skipped, left, divided
def test_skipped_rows_are_counted_and_the_first_twenty_listed(case, write, capsys):
    token = CONTROL_TOKENS[case.name][1]
    bad = [says(case, "q", " ") if n % 3 else says(case, "q", token) for n in range(24)]
    path = write([good(case), *bad, shows(case, "nowhere.png"), good(case)])
    settings = {"dataset_name": path, "image_folder": case.tmp_path, "eval_fraction": 0}
    train, _ = case.load_data(**settings, on_bad_rows="skip")
    assert train["row"] == [0, 26]
    out = capsys.readouterr().out
    assert re.search(r"25 of 27 rows .*: 16 x empty \w+, 8 x control token, 1 x unreadable image .at most 20", out)
    assert re.findall(r"\n  row (\d+)", out) == [str(n) for n in range(1, 21)]


def test_bad_rows_to_evaluate_on_are_named_or_skipped(case, stops, write, capsys):
    path = write([good(case), says(case, "q", " "), good(case)], "test.json")
    both = {"eval_dataset_name": path, "image_folder": case.tmp_path}
    assert re.search(r"1 of 3 rows of the evaluation data .*\n  row 1: empty ", stops([good(case)] * 2, **both))
    train, held_out = case.load_data(**{"dataset_name": write([good(case)] * 2)}, **both, on_bad_rows="skip")
    assert len(train) == 2 and sorted(held_out["row"]) == [0, 2] and "row 1: empty " in capsys.readouterr().out


def limit_of(case):
    """The setting of the longest row."""
    return "model_max_length" if hasattr(case.module.Settings, "model_max_length") else "max_length"


def test_where_no_row_is_left_the_message_names_the_setting_that_helps(case, stops):
    limit = limit_of(case)
    message = stops([says(case, "q", " ")] * 3, on_bad_rows="skip")
    assert "3 of 3 rows" in message and "No row would be left" in message and f"--{limit}" not in message
    for more in ({}, {"on_bad_rows": "skip"}, {"on_long_rows": "stop"}):
        message = stops([good(case)] * 3, **{limit: 5}, **more)
        assert re.search(rf"3 of 3 rows(?s:.*)--{limit} is 5(?s:.*)No row would be left", message), message
        assert "--on_bad_rows" not in message and ("--on_long_rows drop" in message) == ("on_long_rows" in more)


def test_long_rows_do_not_hide_bad_ones(case, stops):
    limit = limit_of(case)
    message = stops([says(case, "q " * 99, "a")] * 25 + [says(case, "q", " ")], **{limit: 64 + 20})
    assert "25 x too long" in message and re.search("\n  row 25: empty ", message), message


# ----------------------------------------------------------------------------------------------------------- files
NEEDED = "it must be a list of rows"
ROW = '{"image": "red.png"}'
FILES = {  # name, what is in it, what the message says behind the name; for more see test_workbench.py
    "empty file": ("x.json", "", "it is empty"),
    "no keys": ("x.json", "[{}]", "it is empty"),
    "cut off": ("x.json", f"[\n{ROW},\n{ROW[:14]}", r"line 3 column \d+"),
    "a null among rows": ("x.json", f"[{ROW}, null]", NEEDED),
    "jsonl called json": ("x.json", f"{ROW}\n{ROW}", r"it must be a list of rows.*a \.jsonl file has one row a"),
    "json called jsonl": ("x.jsonl", json.dumps([{"a": 1}], indent=1), r"line 1: .*one row a line"),
    "nested too deep": ("x.json", "[" * 100_000, "recursion"),
    "latin-1": ("x.json", '[{"a": "é"}]'.encode("latin-1"), "utf-8"),
    "another kind": ("x.csv", "image,question", r"known are \.json, \.jsonl and \.parquet"),
    "no parquet": ("x.parquet", b"PAR1", ""),
}


def test_a_file_that_cannot_be_read_is_named_with_the_place(case, write, tmp_path):
    for kind, (name, content, expected) in FILES.items():
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        message = case.refusal(case.flags_for(path))
        assert message.startswith(f"error: cannot read {path}: ") and "\n" not in message, (kind, message)
        assert re.search(expected, message), (kind, message)
    (tmp_path / "folder.json").mkdir()
    assert re.search("cannot read .*folder.json: .*directory", case.refusal(case.flags_for(tmp_path / "folder.json")))
    message = case.refusal(case.flags_for(write([good(case)] * 2), eval_dataset_name=tmp_path / "nowhere.json"))
    assert re.match(f"error: cannot read {tmp_path}/nowhere.json: there is no such file", message), message


def test_half_a_character_is_not_dropped(case):
    """Whatever the row was read from; of JSON files see test_workbench.py."""
    for broken in (says(case, "Which\ud83d?", "a"), says(case, "q", "\udc00")):
        with pytest.raises(case.module.BadRow, match="invalid Unicode: .*half a character"):
            case.collator()([broken])


def test_a_data_set_without_rows_or_out_of_reach_is_named(case, write, tmp_path):
    empty = datasets.Dataset.from_dict({column: [] for column in good(case)})
    empty.to_parquet(tmp_path / "x.parquet")
    empty.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    rows = write([good(case)] * 2)
    for name, expected in (("x.parquet", "no data|empty"), ("saved", "empty"), ("folder", "cannot read")):
        message = case.refusal(case.flags_for(tmp_path / name))
        assert str(tmp_path / name) in message and re.search(expected, message), message
        message = case.refusal(case.flags_for(rows, **{"eval_dataset_name": tmp_path / name}))
        assert re.search(f"(cannot read {tmp_path / name}|the evaluation data) ?.*({expected}|:)", message), message
    assert "cannot read nobody/nothing (no such file or folder here" in case.refusal(case.flags_for("nobody/nothing"))


def test_an_unknown_split_is_answered_with_the_known_ones(case, write, tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        write([good(case)] * 2, f"data/{split}.parquet")
    for flag in ("dataset_train_split", "dataset_test_split"):
        message = case.refusal(case.flags_for(tmp_path / "data", **{flag: "dev"}))
        assert set(re.split("[ ,]+", message.split("no split 'dev'; it has ")[1])) == {"train", "test"}


@pytest.mark.parametrize("case", ["idefics2_docvqa", "dpo_idefics2"], indirect=True)
def test_columns_that_are_not_there_are_named_with_their_flags(case, stops):
    def refused(row, expected, **settings):
        message = stops([row] * 2, **settings)
        assert re.search(expected, message) and "\n" not in message, message

    row = good(case)
    for column in row:
        expected = f"no column 'other' .--{column}_column.; it has {', '.join(row)}$"
        refused(row, expected, **{f"{column}_column": "other"})
    last = list(row)[-1]
    refused(row, "one column cannot be two", **{f"{last}_column": "question"})
    refused({"a": 5}, f"no column 'image' .--image_column. and 'question' .* and .*--{last}_column.; it has a$")
    message = stops([{"image": "red.png", "question": "q"}] * 2)  # that may be asked, but not trained on
    assert re.search("no (accepted )?answers?.*(--answers_column|--chosen_column and --rejected_column)", message)


def test_a_mistyped_column_is_answered_with_the_closest(case, stops):
    for column in ["conversations"] if case.talks_in_turns else good(case):
        typed = column[:1] + column[2:]
        row = {name.replace(column, typed): value for name, value in good(case).items()}
        assert f"did you mean {typed}?" in stops([row] * 2), column


# ------------------------------------------------------------------------------------------------- the whole program
ALSO_GOOD = {
    "sft_llava": [asked([IMAGE, PART]), said("<image><image>", "a", image=TWO), said("q", "a")],
    "idefics2_docvqa": [asks({"en": "Q", "de": ""}, "a", "b")],
    "dpo_idefics2": [prefers(message("Q", "user"), "a", message("b", "assistant"))],
    "finetune_minicpm_lora": [talks("<image_01>, <image_00>", "a", image=NUMBERED), talks("q", "a", image=None)],
    "llava_two_stage": [said("<image>, <image>", "a", image=TWO), said("q", "a")],
}


def test_good_rows_pass_every_check(case, write):
    """The other side of this file: with the same machinery, they get as far as the weights."""
    with pytest.raises(Loaded):
        case.refusal(case.flags_for(write([good(case), shows(case, "lime.png"), *ALSO_GOOD[case.name]])))
    if case.name == "llava_two_stage":
        with pytest.raises(Loaded):
            case.refusal(case.flags_for(write([CAPTION, good(case)]), stage="align"))


def run_as_program(path, argv):
    sys.argv = [path, *argv]
    runpy.run_path(path, run_name="__main__")


def test_a_program_that_fails_ends_with_the_message(case, write, capfd):
    argv = case.flags_for(write([good(case), says(case, "q", " ")]))
    program = multiprocessing.get_context("fork").Process(target=run_as_program, args=(case.module.__file__, argv))
    program.start()
    program.join(60)
    shown = capfd.readouterr().err
    assert program.exitcode == 1 and "Traceback" not in shown
    first, bad, remedy = shown[shown.rindex("error: ") :].splitlines()
    assert "1 of 2 rows" in first and bad.startswith("  row 1: empty ") and "--on_bad_rows skip" in remedy
    assert not (case.tmp_path / "out").exists()


# -------------------------------------------------------------------------------------- pictures that change meanwhile
@pytest.mark.parametrize("case, workers", [*((name, 1) for name in NAMES), ("sft_llava", 0)], indirect=["case"])
def test_an_image_that_changes_under_the_run_ends_it_with_one_message(case, workers, write, images, monkeypatch):
    """A loader process can only hand on its traceback."""
    load_model = case.module.load_model

    def change_then_load(*args):
        (case.tmp_path / "lime.png").write_bytes(b"changed")
        return load_model(*args)

    monkeypatch.setattr(case.module, "load_model", change_then_load)
    more = {"optim": "adamw_torch", "q_lora" if case.name == "finetune_minicpm_lora" else "load_in_4bit": False}
    rows = write([shows(case, name) for name in images(4)])
    with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(io.StringIO()):
        case.module.main(case.flags_for(rows, dataloader_num_workers=workers, **more))
    message = r"error: row 1 cannot be trained on: unreadable image: .*lime\.png.*\n.*Repair it, or train without .*"
    assert re.fullmatch(message, end.value.code)
    assert not (case.tmp_path / "out" / "trainer_state.json").exists()
