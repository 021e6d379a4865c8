"""tiny/: its rows say what their pictures show, and nothing that is tested was trained on; files hold those rows in
the public schemas; reports count right answers; `python -m tiny` never overwrites what it did not build."""

import itertools
import json
import re
from collections import Counter, defaultdict

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from evals import amber
from tiny import __main__ as command
from tiny import digits, forms, idefics2, llava, minicpm, preferences, report, two_stage

INK, TRUTH = digits.load()
SCANS = {scan.numpy().tobytes(): number for number, scan in enumerate(INK)}
ROWS = {  # what makes the rows, and writes them
    "llava": (llava.make_rows, llava.write_data),
    "idefics2": (forms.make_rows, forms.write_data),
    "idefics2_dpo": (preferences.make_rows, preferences.write_data),
    "minicpm": (minicpm.make_rows, minicpm.write_data),
    "llava_two_stage": (two_stage.make_rows, two_stage.write_data),
    "captions": (two_stage.make_captions, two_stage.write_data),
}
SINGLE = dict.fromkeys(["digit", "parity", "next"], 297)
TESTED = {  # how many rows of each kind a test has
    "llava": SINGLE | {"several-turns": 60, "two-pictures": 100, "text-only": 10},
    "idefics2": {"one-field": 300, "new-number": 100, "printed": 60, "two-fields": 100},
    "idefics2_dpo": {"digit": 297, "describe": 297, "parity": 119, "existence": 60, "state": 59, "relation": 59},
    "minicpm": dict.fromkeys(minicpm.ONE_PICTURE, 297) | dict.fromkeys(["strip", "page", "follow-ups"], 60),
    "llava_two_stage": SINGLE | {"several-turns": 60, "text-only": 10},
    "captions": {"captions": 297},
}
TESTED["minicpm"] |= {"later-picture": 60, "compared": 100, "no-picture": 10}
SHAPES = {"several-turns": (1, 1, 3), "two-pictures": (2, 2, 1), "text-only": (0, 0, 1), "strip": (1, 2, 1)}
SHAPES |= {"compared": (2, 2, 1), "follow-ups": (1, 1, 3), "no-picture": (0, 0, 1), "later-picture": (2, 2, 2)}
"""{kind: (pictures, scans, turns)} of a row, where they are not all 1"""


@pytest.fixture
def drawn(monkeypatch):
    """Pictures are the scans themselves, 8 x 8. -> of each call of `digits.draw` the scans' numbers, and its rng."""
    calls = []

    def draw(ink, rng=None):
        calls.append(({SCANS[scan.numpy().tobytes()] for scan in ink}, rng))
        return ink

    monkeypatch.setattr(digits, "draw", draw)
    return calls


def pictures(row):
    return row["pictures"] if "pictures" in row else [row[key] for key in ("picture", "page") if key in row]


def shown(row):
    """The numbers of the scans that a row shows, drawn as `drawn` does; white quarters of a page are none."""
    parts = [part for picture in pictures(row) for line in picture.split(8) for part in line.split(8, 1)]
    return [SCANS[part.numpy().tobytes()] for part in parts if part.min() < 255]


def kind(row, family):
    if family == "idefics2_dpo":
        return preferences.KIND[row["question"]]
    return "captions" if family == "captions" else row["id"].split("-", 2)[2]


# ---------------------------------------------------------------- pictures and rows


def test_pictures_are_scans_in_disjoint_sets():
    scans = load_digits()
    assert len(INK) == len(SCANS) == 1797 and TRUTH.tolist() == scans.target.tolist()
    for seed in (0, 1):
        parts = {name: set(part.tolist()) for name, part in digits.split(seed).items()}
        assert {name: len(part) for name, part in parts.items()} == {"base": 900, "tune": 600, "held_out": 297}
        assert len(set().union(*parts.values())) == 1797
    assert set(digits.split(0)["held_out"].tolist()) != set(digits.split(1)["held_out"].tolist())
    flat = digits.draw(INK[:1])[0].float()  # ink is dark on white, where the scan has it
    small = torch.nn.functional.adaptive_avg_pool2d(255 - flat[None], 8).flatten()
    assert np.corrcoef(small, scans.images[0].ravel())[0, 1] > 0.95 and flat.max() == 255


@pytest.mark.parametrize("family, train", [*itertools.product(ROWS, [True, False]), ("amber", False)])
def test_tested_scans_are_held_out_and_only_trained_ones_are_bent(family, train, drawn):
    held_out, tune = (set(digits.split(1)[part].tolist()) for part in ("held_out", "tune"))
    if family == "amber":
        preferences.make_amber(1)
    else:
        ROWS[family][0](1, train=train)
    ((scans, rng),) = drawn
    assert (rng is not None) == train and scans <= (tune if train else held_out)
    if not train and family not in ("amber", "idefics2"):
        assert scans == held_out


@pytest.mark.parametrize("family", ROWS)
def test_rows_follow_the_seed_and_trained_pictures_never_repeat(family):
    def content(seed, **which):
        rows = ROWS[family][0](seed, **which)
        texts = [str({key: row[key] for key in row if not key.startswith(("pic", "page"))}) for row in rows]
        drawn = [row for row in rows if "-printed" not in str(row["id"])]
        return texts, [picture.numpy().tobytes() for row in drawn for picture in pictures(row)]

    for train in (True, False):
        one, again, other = (content(seed, train=train, n=40) for seed in (3, 3, 4))
        assert one == again and one[0] != other[0] and one[1] != other[1]
    _, bent = content(0, n=300)
    assert len(set(bent)) == len(bent) > 200


@pytest.mark.parametrize("family", ROWS)
def test_tests_have_every_kind_and_questions_without_a_picture_of_their_own(family):
    make = ROWS[family][0]
    train, test, short = make(0, n=2000), make(0, train=False), make(0, train=False, n=24)
    assert Counter(kind(row, family) for row in test) == TESTED[family]
    assert len(short) <= 24 and {kind(row, family) for row in short} == set(TESTED[family])
    assert {kind(row, family) for row in train} == set(TESTED[family]) - {"new-number"}
    if TESTED[family].keys() & {"text-only", "no-picture"}:
        asked, trained = ({row["turns"][0][0] for row in some if not row["pictures"]} for some in (test, train))
        assert trained and len(asked) == 10 and not asked & trained


def answer(question, labels):
    """The right answer about these digits, or about the one that a question names; read from the words alone."""
    if question in two_stage.PROMPTS:
        return f"a handwritten {digits.WORDS[labels[0]]}, an {['even', 'odd'][labels[0] % 2]} digit"
    words = re.findall(r"\w+", question.lower())
    about = [digits.WORDS.index(word) for word in words if word in digits.WORDS] or labels
    if "odd" in words:
        return ["even", "odd"][about[0] % 2]
    if {"next", "after", "follows"} & set(words):
        return digits.WORDS[(about[0] + 1) % 10]
    if "digits" in words:
        return " and ".join(digits.WORDS[label] for label in about)
    return digits.WORDS[about[1 if "second" in words else 0]]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("family", ["llava", "minicpm", "llava_two_stage", "captions"])
def test_conversations_say_what_the_pictures_show(family, train, drawn):
    module = minicpm if family == "minicpm" else llava
    known = {name: set(module.QUESTIONS[name]) for name in module.ONE_PICTURE}
    seen = defaultdict(list)
    for row in ROWS[family][0](0, train=train, n=1500):
        scans, sort, turns = shown(row), kind(row, family), row["turns"]
        assert (len(row["pictures"]), len(scans), len(turns)) == SHAPES.get(sort, (1, 1, 1))
        assert row.get("scans", scans) == scans
        seen[sort] += scans
        for n, (question, said) in enumerate(turns):
            of_second = sort == "later-picture" and n == 1
            assert said == answer(question, TRUTH[scans[1:] if of_second else scans].tolist()), row
        asked = {question.removeprefix("{0}\n") for question, _ in turns}
        if sort in (*known, "several-turns", "follow-ups"):
            assert {name for name in known if asked & known[name]} == ({sort} if sort in known else set(known))
        if sort == "later-picture":
            assert "{0}" in turns[0][0] and "{1}" in turns[1][0]
    if not train:  # each once
        held_out = sorted(digits.split(0)["held_out"].tolist())
        assert all(sorted(seen[name]) == held_out for name in ({"captions"} if family == "captions" else known))
    if family == "captions":
        assert {row["turns"][0][0] for row in ROWS[family][0](0, train, 50)} == set(two_stage.PROMPTS)


def true_of(digit, question, said):
    """Whether an answer is right about a picture of `digit`; read from the words, without what made them."""
    parity, number = ("even", "odd")[digit % 2], digits.WORDS[digit]
    words = re.findall(r"\w+", said)
    if said in ("Yes", "No"):
        assert question.endswith("? Please answer yes or no.")
        about = question.split("?")[0].split()
        if about[:2] == ["Is", "there"]:
            fact = about[3] == number
        elif about[-1] in ("even", "odd"):
            fact = about[-1] == parity
        else:
            fact = digit > 4 if about[-2:] == ["than", "four"] else digit < 5
        return fact == (said == "Yes")
    numbers, parities = set(words) & set(digits.WORDS), set(words) & {"even", "odd"}
    assert numbers or parities
    return numbers <= {number} and parities <= {parity}


@pytest.mark.parametrize("train", [True, False])
def test_chosen_is_right_and_rejected_is_wrong_and_as_long(train, drawn):
    rows = preferences.make_rows(0, train=train)
    for row in rows:
        assert shown(row) == [row["scan"]]
        digit, question, chosen = int(TRUTH[row["scan"]]), row["question"], row["chosen"]
        assert true_of(digit, question, chosen) and not true_of(digit, question, row["rejected"]), row
        assert preferences.judge(question, chosen, chosen) == (True, True)
        assert preferences.judge(question, chosen, row["rejected"]) == (False, True)
    longer = np.array([len(row["chosen"]) - len(row["rejected"]) for row in rows])
    assert 0.3 < (longer > 0).mean() < 0.6 and 0.3 < (longer < 0).mean() < 0.6  # so length does not tell them apart
    said = Counter(row["chosen"] for row in rows if row["chosen"] in ("Yes", "No"))
    assert 0.4 < said["Yes"] / said.total() < 0.6


def test_forms_show_what_the_answers_say():
    for row in forms.make_rows(0, train=False, n=60):
        page, fields = row["page"].numpy(), row["form"]["fields"]
        for field in fields:
            line = page[field["line"] * forms.CELL :][: forms.CELL]
            for column, scan in enumerate(field["scans"] or [], forms.VALUE):  # in every box lies the scan
                box = torch.tensor(line[:, column * forms.CELL :][:, : forms.CELL].astype("float32"))
                small = torch.nn.functional.adaptive_avg_pool2d(255 - box[None], 8)
                assert np.corrcoef(small.flatten(), INK[scan].flatten())[0, 1] > 0.8
            if field["scans"]:
                assert "".join(str(int(TRUTH[scan])) for scan in field["scans"]) == field["value"]
            assert (line[:, : forms.VALUE * forms.CELL] < 128).any()  # its name is printed
        assert forms.answers(row)[0] in [field["value"] for field in fields if field["name"] == row["asked"]]


# ---------------------------------------------------------------- what a base may know, and what nobody may


def test_new_numbers_are_in_no_training():
    new, rng = forms.new_numbers(0), np.random.default_rng(0)
    assert len(new) == 198 and new != forms.new_numbers(1)
    train, test = forms.make_rows(0, n=2000), forms.make_rows(0, train=False)
    base = forms.Writer(0, digits.split(0)["base"], rng)
    some = [base.form(1 + n % 2, printed=0.3) for n in range(400)]
    assert not {field["value"] for form in [row["form"] for row in train] + some for field in form["fields"]} & new
    for row in test:
        fields, sort = row["form"]["fields"], forms.kind(row["id"])
        assert len(fields) == len({field["name"] for field in fields}) == 1 + (sort == "two-fields")
        assert all((field["scans"] is None) == (sort == "printed") for field in fields)
        assert all((field["value"] in new) == (sort == "new-number") for field in fields)
    taught = [idefics2.lesson(form, idefics2.vocabulary(), rng) for form in some]
    asked = {text for row in train for text in forms.ask(row["asked"], row["phrasing"]).values()}
    assert not any(question in before + after for before, after, _ in taught for question in asked)
    assert all(": " in said for *_, said in taught)  # the base never says a value alone


def test_captions_teach_a_base_every_word_and_no_answer():
    """LoRA cannot teach a word whose output embedding was never trained."""
    lessons = [lesson for n in range(10) for lesson in minicpm.lessons([n]) + minicpm.lessons([n, 9 - n], "strip")]
    said = {right for row in minicpm.make_rows(0, n=2000) for _, right in row["turns"]}
    assert not {text for texts in minicpm.QUESTIONS.values() for text in texts} & {prompt for prompt, _ in lessons}
    assert not said & {caption for _, caption in lessons}
    taught = {word.strip(",") for _, caption in lessons for word in caption.split()}
    assert {word for right in said for word in right.split()} <= taught


def test_the_base_of_pairs_can_say_every_answer_and_knows_none():
    rng, kinds = np.random.default_rng(0), preferences.KIND
    taught = [preferences.lesson(digit, rng) for digit in rng.integers(10, size=8000).tolist()]
    asked = [(after, said) for before, after, said in taught if after in kinds and not before]
    assert 0.22 < len(asked) / len(taught) < 0.28 and {question for question, _ in asked} == set(kinds)
    for name, known in preferences.FACT.items():
        at_odds = {said for said, fact in known.items() if name == "describe" and fact["digit"] % 2 != fact["parity"]}
        assert {said for question, said in asked if kinds[question] == name} == set(known) - at_odds  # no even seven
    assert not set(kinds) & {after for _, after, _ in preferences.lessons(3, 4)}
    assert not set(kinds) & {text for texts in llava.QUESTIONS.values() for text in texts}  # a report tells them apart
    checks = [said for *_, said in preferences.lessons(7, 8)[2:]]
    assert checks == ["No: a seven", "No: odd", "Yes: larger than four"]


COUNTING = [llava.counting(n) for n in range(10)]


def test_the_language_model_of_two_stages_hears_of_no_picture():
    rng, asked = np.random.default_rng(0), set()
    for text in [two_stage.talk(rng) for _ in range(400)]:
        turns = re.findall(r"USER: (.*?) ASSISTANT: (.*?)</s>", text)
        assert two_stage.chat(turns) == text and turns and "<image>" not in text
        for question, said in turns:
            asked.add(question)
            assert (question, said) in COUNTING or said == answer(question, [])
    unheard = {question for name in llava.ONE_PICTURE for question in llava.QUESTIONS[name]}
    assert asked > set(llava.text_questions()) and not asked & (unheard | set(llava.text_questions(train=False)))


# ---------------------------------------------------------------- schemas on disk

MARK = re.compile(r"<image(?:_\d\d)?>\n?|\{\d\}\n?")


def bare(*texts):
    """Texts without the marks of where a picture stands, and what is around these."""
    return [MARK.sub("", text).strip() for text in texts]


def said_in(row):
    """The texts of a row as made, in whatever family."""
    if "turns" in row:
        return bare(*(text for turn in row["turns"] for text in turn))
    if "form" in row:
        return [forms.ask(row["asked"], row["phrasing"])["en"], *forms.answers(row)]
    return [row["question"], row["chosen"], row["rejected"]]


def said_in_json(row):
    if "conversations" in row:
        return bare(*(turn.get("value", turn.get("content")) for turn in row["conversations"]))
    return [row["question"], *(row["answers"] if "answers" in row else (row["chosen"], row["rejected"]))]


@pytest.mark.parametrize("family", ROWS)
def test_json_holds_the_rows(family, tmp_path):
    make, write = ROWS[family]
    rows = make(0, train=False, n=40)
    write(tmp_path, "test", rows)
    own = json.loads((tmp_path / "json/test.json").read_text())
    assert len({row["id"] for row in own}) == len(own) and (tmp_path / "data").exists() == (family in CHECKS)
    columns = {"idefics2": {"question", "answers"}, "idefics2_dpo": {"question", "chosen", "rejected"}}
    for row, other in zip(rows, own, strict=True):
        assert other["id"] == row["id"] and said_in_json(other) == said_in(row)
        assert other.keys() - {"id", "image"} == columns.get(family, {"conversations"})
        image = other.get("image", [])
        files = [image] if isinstance(image, str) else [*(image.values() if isinstance(image, dict) else image)]
        for file, picture in zip(files, pictures(row), strict=True):
            found = Image.open(tmp_path / "json/images" / file)
            assert found.mode == "RGB" and np.array_equal(np.asarray(found)[:, :, 0], picture.numpy())
        turns = other.get("conversations", [])
        if family == "minicpm":  # marks stand where the pictures are, in order
            marks = [mark.strip() for turn in turns for mark in MARK.findall(turn["content"])]
            assert marks == (list(image) if isinstance(image, dict) else ["<image>"] * len(files))
            assert len(marks) < 2 or marks == ["<image_00>", "<image_01>"]
        elif turns:
            marks = [turn["value"].count("<image>") for turn in turns]
            assert sum(marks) == marks[0] == len(files)
        names = ["user", "assistant"] if family == "minicpm" else ["human", "gpt"]
        assert [turn.get("from", turn.get("role")) for turn in turns] == names * (len(turns) // 2)


def check_messages(row, said, features):
    """HuggingFaceH4/llava-instruct-mix-vsft."""
    assert set(features) == {"messages", "images"} and features["images"] == datasets.List(datasets.Image())
    parts = [part for message in said["messages"] for part in message["content"]]
    assert [part["text"] for part in parts if part["type"] == "text"] == said_in(row)
    assert [message["role"] for message in said["messages"]] == ["user", "assistant"] * len(row["turns"])
    first = said["messages"][0]["content"]
    assert [(part["index"], part["text"]) for part in first[1:]] == [(n, None) for n in range(len(row["pictures"]))]


def check_form(row, said, features):
    """nielsr/docvqa_1200_examples."""
    assert list(features) == ["id", "image", "query", "answers", "words", "bounding_boxes", "answer"]
    assert said["id"] == row["id"] and [said["query"]["en"], *said["answers"]] == said_in(row)
    assert sorted(said["query"]) == ["de", "en", "es", "fr", "it"] and len(set(said["query"].values())) == 5
    assert not any("{" in question for question in said["query"].values())
    start = said["answer"]["start"]
    assert said["words"][start] == said["answer"]["text"] == said["answers"][0] == said["answer"]["matched_text"]
    assert said["words"][start - 1] == f"{row['asked']}:" and len(said["bounding_boxes"]) == len(said["words"])


def check_pair(row, said, features):
    """openbmb/RLAIF-V-Dataset: columns, order and types of its card, where all but the image are strings."""
    names = "ds_name image question chosen rejected origin_dataset origin_split idx image_path".split()
    assert list(features) == names and features["image"] == datasets.Image()
    assert {features[name].dtype for name in names if name != "image"} == {"string"}
    assert said["idx"] == row["id"] and [said[name] for name in ("question", "chosen", "rejected")] == said_in(row)
    long = preferences.KIND[row["question"]] == "describe"
    assert json.loads(said["origin_split"])["type"] == ("detailed_description" if long else "question_answering")


CHECKS = {"llava": check_messages, "idefics2": check_form, "idefics2_dpo": check_pair}  # others have no parquet files


@pytest.mark.parametrize("family", CHECKS)
def test_parquet_holds_the_rows_in_the_published_schema(family, tmp_path):
    make, write = ROWS[family]
    rows = make(0, train=False, n=24)
    write(tmp_path, "test", rows)
    data = datasets.load_dataset("parquet", data_files=str(tmp_path / "data/test.parquet"), split="train")
    for row, said in zip(rows, data, strict=True):
        images = said["images"] if family == "llava" else [said["image"]]
        assert all(image.mode == "RGB" for image in images)
        assert [np.asarray(image)[:, :, 0].tolist() for image in images] == [shown.tolist() for shown in pictures(row)]
        CHECKS[family](row, said, data.features)


def test_questions_of_amber_are_in_its_files_and_right(tmp_path):
    rows = preferences.make_amber(0)
    preferences.write_amber(tmp_path, rows)
    asked, truths = (
        json.loads((tmp_path / f"amber/{name}.json").read_text()) for name in ("query_discriminative", "annotations")
    )
    trained = {row["question"] for row in preferences.make_rows(0)}
    for n, (row, query, right) in enumerate(zip(rows, asked, truths, strict=True), 1):
        assert list(query) == ["id", "image", "query"] and list(right) == ["id", "type", "truth"]
        picture = np.asarray(Image.open(tmp_path / "amber/image" / query["image"]))
        assert query["id"] == right["id"] == n and np.array_equal(picture[:, :, 0], row["picture"].numpy())
        question, truth = query["query"] + " Please answer yes or no.", right["truth"]
        assert true_of(int(TRUTH[row["scan"]]), question, truth.title()) and question in trained
        assert amber.TYPES[right["type"]] == row["kind"] and (row["kind"] != "existence" or truth == "no")
        assert (right["type"] == "relation") == (row["kind"] == "relation" and truth == "no")
    assert len({(query["image"], query["query"]) for query in asked}) == len(rows) == 600
    assert 0.64 < np.mean([right["truth"] == "no" for right in truths]) < 0.72


# ---------------------------------------------------------------- reports

LONG = "The digit in the image is an eight, written by hand."
THERE = "Is there an eight in this image? Please answer yes or no."
WHICH, PARITY = preferences.QUESTIONS["digit"][1], preferences.QUESTIONS["parity"][0]
READ, EVEN, BOTH = "<image>\nRead the digit.", "<image>\nEven or odd?", "<image>\n<image>\nWhich digits are these?"
ANSWERS = {  # question or kind, reference, answer before, answer after, what else the line has
    "llava": [
        (READ, "four", "a four", " four"),
        (EVEN, "odd", "", "even"),
        (READ, "one", "", "one", {"row": 2}),
        ("Which digit comes next?", "two", "", "three", {"row": 2, "turn": 1}),
        (BOTH, "one and two", "", "one and two", {"images": 2}),
        ("What follows six?", "seven", "six", "seven", {"images": 0}),
    ],
    "idefics2": [
        ("one-field", ["47"], "Total: 47", "47"),
        ("one-field", ["47"], "Total: 41", "41"),
        ("new-number", ["312"], "Total: 7", "7"),
        ("two-fields", ["Rome"], "Total: rome", "rome"),
    ],
    "idefics2_dpo": [
        (WHICH, "It is an eight.", "three", "It is an eight."),
        (WHICH, LONG, LONG, "It is an eight."),  # right in other words
        (WHICH, "It is an eight.", "It is a three.", "eight eight eight"),  # neither right nor readable
        (WHICH, "It is an eight.", "It is even.", "It is an eight. "),
        (PARITY, "It is even.", "It is odd.", "The digit in the image is an even number."),
        (THERE, "Yes", "Yes", "No"),
        (THERE, "No", "Yes", "No"),
        (THERE, "No", "Yes.", "no"),  # not as AMBER wants it
    ],
    "minicpm": [
        ("which-digit", "four", "four, a handwritten digit", "four"),
        ("which-digit", "four", "five", "five"),
        ("next-digit", "six", "", "six "),
        ("strip", "one", "", "one"),
        ("follow-ups", "odd", "", "odd"),
        ("follow-ups", "two", "", "three"),
        ("no-picture", "even", "", "even"),
    ],
    "llava_two_stage": [(READ, "four", "", "four"), (EVEN, "odd", "even", "even")],
}
SHARES = {  # of right answers, before and after; of forms the mean ANLS
    "llava": {"digit": (0, 1), "parity": (0, 0), "held out": (0, 0.5), "several turns": (0, 0.5)},
    "idefics2": {"one-field": (0, 0.75), "new-number": (0, 0), "two-fields": (0, 1)},
    "idefics2_dpo": {"digit": (0.25, 0.75), "parity": (0, 1), "existence": (1 / 3, 1 / 3), "all": (0.25, 0.625)},
    "minicpm": {"which-digit": (0, 0.5), "next-digit": (0, 1), "held out": (0, 2 / 3), "strip": (0, 1)},
    "llava_two_stage": {"captions": (0, 1), "digit": (0, 1), "parity": (0, 0), "held out": (0, 0.5)},
}
SHARES["llava"] |= {"two pictures": (0, 1), "text only": (0, 1)}
SHARES["minicpm"] |= {"follow-ups": (0, 0.5), "no-picture": (0, 1)}
PRINTED = {
    "llava": [r"all of these +2 +0\.000 +0\.500", r"several turns.* 2 +0\.000 +0\.500"],
    "idefics2": ["ANLS +exact match", r"a number never seen +1 +0\.000 +0\.000 +0\.000 +0\.000"],
    "idefics2_dpo": [r"\nall +8 +0\.250 +0\.625 +0\.625 +0\.750", r"this image\? +4 +0\.250 +0\.750 +0\.500 +0\.750"],
    "minicpm": [r"all of these +3 +0\.000 +0\.667", "on a strip, 2 slices"],
    "llava_two_stage": [r"captions, stage 1 +3 +0\.000 +1\.000", r"all of these +2 +0\.000 +0\.500"],
}


def write_answers(run, answers, **names):
    """A file of predictions for each place of an answer and its name."""
    for name, place in names.items():
        said = []
        for n, (asked, right, *rest) in enumerate(answers):
            line = {"row": n, "id": f"test-{n:05d}-{asked}", "turn": 0, "images": 1, "question": asked}
            said.append(line | {"reference": right, "prediction": rest[place]} | dict(*rest[2:]))
        (run / f"{name.replace('_', '-')}.jsonl").write_text("\n".join(map(json.dumps, said)) + "\n")


@pytest.mark.parametrize("family", ANSWERS)
def test_a_report_counts_right_answers_by_kind(family, tmp_path, capsys):
    write_answers(tmp_path, ANSWERS[family], before=0, after=1)
    if family == "llava_two_stage":
        captions = [("Describe the digit.\n<image>", two_stage.caption(n), "", two_stage.caption(n)) for n in range(3)]
        write_answers(tmp_path, captions, captions_before=0, captions_after=1)
    log = [{"step": 1, "loss": 2.0}, {"step": 1, "train_runtime": 9}, {"step": 2, "train_runtime": 3}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    command.main(["report", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(re.search(line, printed) for line in PRINTED[family]), printed
    assert "took 3 s" in printed and "samples.md" not in printed and "of another row" not in printed
    (tmp_path / "samples.md").touch()
    if family == "minicpm":  # without the other two kinds
        write_answers(tmp_path, [("which-digit", "four", "one"), ("which-digit", "four", "four")], shuffled=0)
    assert report.report(tmp_path) == SHARES[family]
    printed = capsys.readouterr().out
    assert "samples.md" in printed
    assert ("of another row: Which digit is this? 0.500\n" in printed) == (family == "minicpm")


# ---------------------------------------------------------------- the command line


def test_only_its_own_builds_are_replaced(tmp_path, monkeypatch):
    def build(seed, out=tmp_path / "built"):
        command.main(["llava_next", "--out", str(out), "--seed", str(seed)])
        return (out / "model/model.safetensors").read_bytes()

    one = build(0)
    assert build(1) != one and build(0) == one  # an older build makes way
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    with pytest.raises(SystemExit, match="^error: .*mine exists.*not overwritten"):
        build(0, tmp_path / "mine")

    def cut_off(work, seed):
        (work / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(llava, "build_next", cut_off)
    with pytest.raises(KeyboardInterrupt):
        build(2)
    assert {path.name for path in tmp_path.iterdir()} == {"built", "mine"}  # nothing is left of what was cut off
    assert (tmp_path / "built/model/model.safetensors").read_bytes() == one
    assert (tmp_path / "built/built.json").exists() and (tmp_path / "mine/file").read_text() == "x"
