"""evals/: the scores by hand and as AMBER's own script gave them, and the two programs."""

import csv
import itertools
import json
import subprocess
import sys
import unicodedata

import pytest
from conftest import ROOT

import idefics2_docvqa
from evals import amber, docvqa


@pytest.fixture
def file(tmp_path):
    """A function: a name, rows (or lines of text) -> the path of a .json list or .jsonl file of them."""

    def make(name, rows):
        if name.endswith(".json"):
            text = json.dumps(rows)
        else:
            lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
            text = "\n".join(lines)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return make


def refusal(main, argv):
    """The one message with which a program ends."""
    with pytest.raises(SystemExit) as stopped:
        main([str(part) for part in argv])
    message = stopped.value.code
    assert message.startswith("error: ") and "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------------ ANLS, by hand


def answered(prediction, reference, **more):
    """A line of tools/generate.py."""
    return {"row": 0, "id": None, "turn": 0, "question": "?", "reference": reference, "prediction": prediction, **more}


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("pARIS", ["Paris"], 1),
        (" grand \t hotel\n", ["Grand  Hotel"], 1),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("a" * 50 + "b" * 50, ["a" * 100], 0.5),  # the limit itself counts
        ("a" * 49 + "b" * 51, ["a" * 100], 0),  # below it nothing does
        ("", ["Paris"], 0),
        # spaces count in the length, not in the distance: the longer one is measured as it was given
        ("ab", ["  ac  "], 1 - 1 / 6),
        # the nearest of several, each against its own length
        ("12", ["1245", "123"], 1 - 1 / 3),
        # letters, not bytes
        ("ZÜRICH", ["zürich"], 1),
        ("🙂🙂", ["🙂🙃"], 0.5),
    ],
)
def test_anls_by_hand(prediction, references, expected):
    assert docvqa.anls(prediction, references) == pytest.approx(expected, abs=1e-12)
    assert idefics2_docvqa.anls(prediction, references) == docvqa.anls(prediction, references)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Café É", ["other", "café é"], (1, 1)),
        ("J\u030c", ["\u01f0"], (1, 1)),  # a lower case of one character, a capital that is always two
        ("éa", ["éb"], (1 - 1 / 2, 0)),  # by lengths of the longer form 1 - 1 / 3
        ("ééé", ["ééab"], (1 - 2 / 4, 0)),  # the prediction is the longer one in the longer form only
        ("ééab", ["ééé"], (1 - 2 / 4, 0)),
    ],
)
def test_a_letter_and_its_accent_count_as_one_character(file, prediction, references, expected):
    """An é is one character or two, in the prediction, in the accepted answers or in both: the scores are the same."""
    forms = list(itertools.product(("NFC", "NFD"), repeat=2))
    lines = []
    for form, other in forms:
        accepted = [unicodedata.normalize(other, reference) for reference in references]
        lines.append(answered(unicodedata.normalize(form, prediction), accepted))
    assert len({json.dumps(line) for line in lines}) > 1
    rows = docvqa.score(file("after.jsonl", lines))
    assert [(row["anls"], row["exact_match"]) for row in rows] == [expected] * len(forms)


def test_exact_match_forgives_case_and_spaces_only(file):
    same = [("yes", "Yes"), ("a  b", "A b\n"), ("two", ["one", "TWO"])]
    other = [("ye", "yes"), ("yes.", "yes"), ("two", ["one", "three"]), ("", "yes")]
    rows = docvqa.score(file("after.jsonl", [answered(*pair) for pair in same + other]))
    matches = [(row["prediction"], row["reference"]) for row in rows if row["exact_match"] == 1]
    assert sorted(matches, key=str) == sorted(same, key=str) and len(rows) == 7


# ------------------------------------------------------------------------------------------------- docvqa, the program

LINES = [
    answered("Rome", ["Rome", "rome"], id="a", question="Which city?"),
    answered("Oslo", "Cairo", id="b", question="Which town?"),
    answered("123", ["124"], id="c", question="How many\nare there?"),
    answered("ab", "ac", row=7, question="Which letters?"),
]


@pytest.fixture
def docvqa_prints(file, capsys):
    """A function: lines, flags -> what the program prints about them, line by line."""

    def make(lines, *flags):
        docvqa.main([str(file("after.jsonl", lines)), *map(str, flags)])
        return capsys.readouterr().out.splitlines()

    return make


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_the_worst_documents_come_first_and_only_so_many_are_shown(docvqa_prints):
    head, *rows, empty, summary = docvqa_prints(LINES)
    assert head.split() == docvqa.COLUMNS and empty == ""
    scores = [["0.000", "0", "b"], ["0.500", "0", "7"], ["0.667", "0", "c"], ["1.000", "1", "a"]]
    assert [row.split()[:3] for row in rows] == scores
    assert "How many are there?" in rows[2] and rows[-1].rstrip().endswith("Rome / rome")
    mean = (0 + 0.5 + 2 / 3 + 1) / 4
    assert summary.split() == ["ANLS", f"{mean:.4f}", "exact", "match", "0.2500", "questions", "4"]
    for worst, shown in ((0, 0), (1, 1), (-1, 4)):
        *lines, summary = docvqa_prints(LINES, "--worst", worst)
        assert sum("Which" in line or "How" in line for line in lines) == shown and "questions 4" in summary


def test_every_document_goes_into_a_table_uncut(docvqa_prints, file, tmp_path):
    """On the screen long cells are cut, and [red] is no colour."""
    long, table = "word [red] " * 30, tmp_path / "t.csv"
    shown = docvqa_prints([answered(long, long, question="[b]?"), *LINES], "--csv", table)
    assert all(text in shown[4] for text in ("…", "word [red]", "[b]?")) and len(shown[4]) < 170
    assert str(table) in shown[-1]
    head, *rows = read_csv(table)
    assert head == docvqa.COLUMNS and rows[3][4] == long and len(rows) == 5
    assert rows[2] == ["0.667", "0", "c", "How many\nare there?", "123", "124"]
    before = table.read_bytes()
    again = [file("one.jsonl", LINES[:1]), "--csv", table]
    assert "--overwrite" in refusal(docvqa.main, again) and table.read_bytes() == before
    docvqa.main([*map(str, again), "--overwrite"])
    assert len(read_csv(table)) == 2


def test_files_as_editors_leave_them(file):
    """A byte order mark, Windows' line ends, empty lines, a line separator within a text."""
    path = file("after.jsonl", [answered("a\u2028b", "a b"), "", answered("Ü", "ü"), "  "])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [row["anls"] for row in docvqa.score(path)] == [1, 1]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["", "", "{"], "line 4"),
        (["[1]"], "line 2"),
        ([{"reference": "x"}], "line 2.*no 'prediction'"),
        ([answered("x", None)], "line 2.*None"),  # what generate.py writes of a row without answers
        ([answered("x", ["x", 7])], "line 2.*7"),
        ([answered("x", ["x", ""])], "line 2.*blank"),
        ([answered("x", [])], "line 2.*at least one"),
        (['{"prediction": "\\ud83d", "reference": "a"}'], "line 2.*surrogates"),
    ],
)
def test_a_document_that_cannot_be_scored_is_named(file, tmp_path, lines, words):
    path = file("after.jsonl", [answered("x", "x"), *lines])
    with pytest.raises(SystemExit, match=f"^error: {path}, {words}"):
        docvqa.main([str(path), "--csv", str(tmp_path / "t.csv")])
    assert not (tmp_path / "t.csv").exists()


def test_mistakes_with_docvqa_get_one_message(file, tmp_path):
    good, empty, latin = file("good.jsonl", LINES), file("empty.jsonl", ["", " "]), tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(answered("é", "é"), ensure_ascii=False).encode("latin-1"))
    for argv, words in (
        (["nowhere.jsonl"], "cannot read nowhere.jsonl"),
        ([latin], "cannot read"),
        ([empty], "is empty"),
        ([good, "--csv", "nowhere/t.csv"], "cannot write nowhere/t.csv"),
        ([good, "--worst", "many"], "--worst"),
    ):
        assert words in refusal(docvqa.main, argv)


# ----------------------------------------------------------------------------------------------- AMBER, scores by hand

TYPES = {"existence": "discriminative-hallucination", "relation": "discriminative-relation"}
TYPES |= {kind: f"discriminative-attribute-{kind}" for kind in ("state", "number", "action")}
SMALL = [("existence", "no"), ("state", "yes"), ("state", "no"), ("number", "yes"), ("action", "no")]
SMALL += [("relation", "yes"), ("relation", "no")]


@pytest.mark.parametrize(
    ("truths", "answers", "expected"),
    [  # denominators are off by 0.001: of three, 33.3 is 1 / 3.001; of one, 99.9 is 1 / 1.001
        ("nnny", ["no", "no", "yes", "no"], [50.0, 66.6, 66.6, 66.6]),
        ("ny", ["yes", "yes"], [50.0, 0.0, 0.0, 0.0]),  # never no: nothing is divided by 0
        ("nnyy", ["no", None, None, "yes"], [50.0, 99.9, 50.0, 66.6]),  # no answer: wrong, and neither yes nor no
        ("nyy", ["no", "no", "no"], [33.3, 33.3, 99.9, 49.9]),  # of P and R not rounded, F1 would be 50.0
    ],
)
def test_amber_by_hand(truths, answers, expected):
    rows = [("state", {"n": "no", "y": "yes"}[truth], answer) for truth, answer in zip(truths, answers)]
    scores = amber.measure(rows, "state")
    assert [*scores.values()] == [len(truths), *expected] and amber.measure(rows) == scores


def test_the_constants_of_existence_and_of_the_attributes_together():
    """The former's F1 has 0.001 in its denominator, in place of 0.0001; the latter have three denominators' 0.001."""
    rows = [("existence", "no", "no" if n < 17 else "yes") for n in range(20)]
    assert [*amber.measure(rows, "existence").values()] == [20, 85.0, 100.0, 85.0, 91.8]
    assert amber.measure(rows)["f1"] == 91.9
    rows = [("state", "no", "no"), ("relation", "no", "no")]
    assert amber.measure(rows, "attribute")["recall"] == 99.7 and amber.measure(rows, "state")["recall"] == 99.9


@pytest.mark.parametrize(
    ("answer", "exact", "first_word"),
    [
        ("Yes", "yes", "yes"),
        ("No", "no", "no"),
        ("No.", None, "no"),
        ("yes!", None, "yes"),
        ("YES", None, "yes"),
        ("**Yes**", None, "yes"),
        ("_No_", None, "no"),
        ('"No".', None, "no"),
        (" (no) ", None, "no"),
        # then a mark
        ("No, there is not", None, "no"),
        ("No - there is none", None, "no"),
        ("No—there is none", None, "no"),
        ("**No,** there is none", None, "no"),
        ("Yes: 5 of them", None, "yes"),
        ("No, 5 of them", None, "no"),
        ("No.\n1. A dog is a pet", None, "no"),
        ("Yes\nBoth are red", None, "yes"),
        ("No,no,no", None, "no"),
        # then a sentence about the picture
        ("Yes it is", None, "yes"),
        ("No it's not", None, "no"),
        ("No there isn't", None, "no"),
        ("No there’s none", None, "no"),
        ("**No** the dog is red", None, "no"),
        ("Yes (I see it)", None, "yes"),
        ("Yes a dog", None, "yes"),
        # then something else: no answer, or none that is sure
        ("No doubt, there is a dog", None, None),
        ("No problem: yes", None, None),
        ("No problem, it is", None, None),
        ("No dog is there", None, None),
        ("**No** dog is there", None, None),
        ('No "dog"', None, None),
        ("No theatre", None, None),  # the, but not as a word
        ("No a-frame", None, None),
        ("No one is there", None, None),
        ("No-one is there", None, None),
        ("no_one", None, None),
        ("No's", None, None),
        ("No?", None, None),
        ("No & low", None, None),
        # no, short for number
        ("No. 5 is red", None, None),
        ("No.5", None, None),
        ("No 5", None, None),
        ("Yes. 5 are red", None, "yes"),
        # both words
        ("Yes or no? No.", None, None),
        ("Yes/No", None, None),
        ("yes\nno", None, None),
        ("No, yes", None, None),
        ("Yes. There is no dog", None, None),
        ("Yes, a no-smoking sign", None, "yes"),
        # another first word
        ("Not at all", None, None),
        ("Maybe no", None, None),
        ("Nope", None, None),
        ("The answer is yes.", None, None),
        ("1. No", None, None),
        ("ye\u017f", None, None),  # an old s, the same letter only in a search that ignores case
        ("no\u0308, it is", None, None),  # nö
        ("Yes, it says no\u0308", None, "yes"),
        ("No\u20e0, it is", None, None),  # a mark on the o with which it is never one character
        ("", None, None),
        (" .", None, None),
    ],
)
def test_how_an_answer_is_read(answer, exact, first_word):
    assert (amber.exact(answer), amber.first_word(answer)) == (exact, first_word)


# -------------------------------------------------------------------------------------------------- AMBER, the program


@pytest.fixture
def annotated(file):
    """A function: (kind, right answer) of each question -> AMBER's annotations: 1,004 pictures to describe come first,
    and a relation that is not there has a type of its own."""

    def make(asked):
        rows = [{"id": n, "type": "generative", "truth": ["sky"], "hallu": ["cloud"]} for n in range(1, 1005)]
        for number, (kind, truth) in enumerate(asked, 1005):
            own = "relation" if (kind, truth) == ("relation", "no") else TYPES[kind]
            rows.append({"id": number, "type": own, "truth": truth})
        return file("annotations.json", rows)

    return make


@pytest.fixture
def predicted(file):
    """A function: answers -> a file of them, as generate.py writes it."""

    def make(answers, name="after.jsonl"):
        rows = [answered(text, None, row=n, id=1005 + n, question=f"Q{n}?") for n, text in enumerate(answers)]
        return file(name, rows)

    return make


@pytest.fixture
def amber_prints(capsys):
    """A function: predictions, annotations, flags -> what the program prints, or, with --json, the object."""

    def make(predictions, annotations, *flags):
        amber.main([str(predictions), "--annotations", str(annotations), *map(str, flags)])
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in flags else out

    return make


def words_of(text):
    return [line.split() for line in text.splitlines()]


def scores_of(report, kind="all"):
    return [report["after"]["exact"]["scores"][kind][metric] for metric in amber.METRICS]


def test_as_ambers_own_script_scored_them(annotated, predicted, amber_prints):
    """All 14,216 questions, answered by rule; the values are what inference.py printed of the same answers."""
    asked = [pair for pair, count in amber.FULL.items() for _ in range(count)]
    answers = []
    for number, (_, truth) in enumerate(asked, 1005):
        if number % 11 == 0:
            answers.append("No. It is not.")
        elif number % 13 == 0:
            answers.append("yes")
        elif number % 7 == 0:
            answers.append({"yes": "No", "no": "Yes"}[truth])
        else:
            answers.append(truth.capitalize())
    annotations, predictions = annotated(asked), predicted(answers)
    report = amber_prints(predictions, annotations, "--json")
    assert report["full"] and {kind: scores_of(report, kind) for kind in report["after"]["exact"]["scores"]} == {
        "all": [71.9, 92.2, 72.0, 80.9],
        "existence": [71.9, 100.0, 71.9, 83.6],
        "attribute": [71.9, 85.6, 72.0, 78.2],
        "state": [71.9, 85.6, 71.9, 78.1],
        "number": [72.0, 85.7, 72.0, 78.2],
        "action": [71.8, 85.4, 72.2, 78.2],
        "relation": [71.9, 80.9, 72.0, 76.2],
    }
    always = report["always_no"]["scores"]
    assert [*always["all"].values()] == [14216, 66.3, 66.3, 100.0, 79.7] and always["existence"]["f1"] == 100.0
    assert [always[kind]["questions"] for kind in ("existence", "attribute", "relation")] == [4924, 7628, 1664]
    shown = words_of(amber_prints(predictions, annotations, "--worst", 0))
    assert ["all", "14216", "71.9", "92.2", "72.0", "80.9"] in shown
    assert ["published:", "Idefics2", "85.8", "89.1"] in shown
    assert ["published:", "Idefics2", "+", "DPO", "85.9", "89.4"] in shown


def test_published_values_are_those_of_all_questions_only(annotated, predicted, amber_prints):
    """Not of so many others, either."""
    for asked, words in ((SMALL, "not of these 7"), ([("state", "no")] * 14216, "these are not they")):
        text = amber_prints(predicted(["No"] * len(asked)), annotated(asked))
        assert words in text and "published:" not in text


def test_both_readings_are_shown_and_one_is_the_table(annotated, predicted, amber_prints):
    annotations = annotated(SMALL)
    predictions = predicted(["No", "Yes.", "No, it is not", "Yes", "Maybe", "No", "No"])
    strict = amber_prints(predictions, annotations)
    free = amber_prints(predictions, annotations, "--first_word")
    for text in (strict, free):
        ends = {
            line.split(": ")[1].split("  ")[0]: line.split()[-4:] for line in text.splitlines() if ".jsonl" in line
        }
        assert ends["exactly Yes or No"] == ["42.9", "57.1", "3", "42.9"]
        assert ends["by the first word"] == ["71.4", "75.0", "1", "57.1"]
    assert ["all", "7", "42.9", "66.6", "50.0", "57.1"] in words_of(strict)
    assert ["all", "7", "71.4", "75.0", "75.0", "75.0"] in words_of(free)
    assert [line[1:3] for line in words_of(free) if line[:1] == ["attribute"]] == [["4", "74.9"]]


def test_only_the_questions_of_a_query_file_are_scored(annotated, file, amber_prints):
    annotations = annotated(SMALL)
    queries = file("queries.json", [{"id": n, "image": "AMBER_1.jpg", "query": "Is it so?"} for n in (1010, 1011)])
    some = file("some.json", [{"id": n, "response": "No"} for n in (1011, 1010)])
    report = amber_prints(some, annotations, "--questions", queries, "--json")
    assert (report["questions"], report["left_out"], report["published"]) == (2, 0, None)
    assert [*report["after"]["exact"]["scores"]] == ["all", "relation"]  # other kinds are not shown
    head, line = words_of(amber_prints(some, annotations, "--questions", queries))[:2]
    assert head == ["kind", "id", "image", "question", "right", "answer"]
    assert line[:5] == ["relation", "1010", "AMBER_1.jpg", "Is", "it"]


def test_before_and_after(annotated, predicted, amber_prints):
    annotations = annotated(SMALL)
    before = predicted(["Yes", "Yes", "Yes", "Yes", "No", "No", "No"], "before.jsonl")
    after = predicted(["No", "Yes", "No", "No", "No", "Yes", "no"])
    report = amber_prints(after, annotations, "--compare", before, "--json")
    assert report["changed"] == {"to_right": 3, "to_wrong": 2}
    for name, path in (("before", before), ("after", after)):
        assert report[name] == amber_prints(path, annotations, "--json")["after"]
    text = amber_prints(after, annotations, "--compare", before)
    assert "57.1 -> 71.4" in text and "3 answers became right, 2 wrong." in text
    head, unread, wrong = words_of(text)[:3]
    assert head == ["kind", "id", "question", "right", "before", "after"]
    assert unread == ["relation", "1011", "Q6?", "no", "No", "no"]
    assert wrong == ["number", "1008", "Q3?", "yes", "Yes", "No"]
    free = amber_prints(after, annotations, "--compare", before, "--first_word", "--json")
    assert free["changed"] == {"to_right": 3, "to_wrong": 1}


def test_wrong_answers_are_shown_by_turns_of_their_kinds(annotated, predicted, amber_prints):
    """Those that are neither yes nor no come first; long ones are cut."""
    asked = [("state", "yes")] * 30 + [("relation", "no")] * 2 + [("state", "no")]
    annotations = annotated(asked)
    predictions = predicted(["No"] * 30 + ["Yes"] * 2 + ["Hm\nm " + "long " * 30])

    def shown(*flags):
        return amber_prints(predictions, annotations, *flags).split("\n\n")[0].splitlines()

    first = [["kind", "id"], ["state", "1037"], ["relation", "1035"], ["state", "1005"], ["relation", "1036"]]
    assert [line.split()[:2] for line in shown("--worst", 4)] == first
    assert len(shown()) == 21 and len(shown("--worst", -1)) == 34
    assert shown("--worst", 0)[0].split()[:2] == ["kind", "questions"]
    assert "Hm m long" in shown()[1] and "…" in shown()[1] and max(map(len, shown())) < 150


def test_the_forms_of_a_predictions_file(annotated, predicted, file, amber_prints):
    answers = ["No", "Yes", "No", "Yes", "No", "Yes", "No"]
    annotations, predictions = annotated(SMALL), predicted(answers)
    rows = [{"id": 1005 + n, "response": answer} for n, answer in enumerate(answers)]
    report = amber_prints(predictions, annotations, "--json")
    assert scores_of(report)[0] == 100.0
    for name in ("own.json", "own.jsonl"):
        assert amber_prints(file(name, rows[::-1]), annotations, "--json") == report
    predictions.write_bytes(b"\xef\xbb\xbf" + predictions.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert amber_prints(predictions, annotations, "--json") == report


def test_some_questions_are_not_answered(annotated, predicted, file, amber_prints):
    annotations, predictions = annotated(SMALL), predicted(["No"] * 7)
    files = {"some.json": (1006, 1007, 1008), "other.json": (1008, 1005), "none.json": (1011,)}
    some, other, none = (file(name, [response(n) for n in ids]) for name, ids in files.items())
    flags = ["--annotations", annotations]
    message = refusal(amber.main, [some, *flags])
    assert "4 of 7 questions: ids 1005, 1009, 1010, 1011; " in message and "--answered_only" in message
    report = amber_prints(some, annotations, "--answered_only", "--json")
    assert (report["questions"], report["left_out"]) == (3, 4)
    assert "lacks answers to 5 of 7" in refusal(amber.main, [predictions, *flags, "--compare", other])
    report = amber_prints(some, annotations, "--compare", other, "--answered_only", "--json")
    assert (report["questions"], report["left_out"], report["before"]["exact"]["no"]) == (1, 6, 1)
    message = refusal(amber.main, [none, *flags, "--compare", other, "--answered_only"])
    assert "answer no question in common" in message


def response(number=1005, **more):
    """A row of AMBER's own form."""
    return {"id": number, "response": "No", **more}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([response(1), response(1004)], "answers 2 questions that are not asked: ids 1, 1004;.*from 1005 on"),
        ([response(n) for n in range(2000, 2011)], "2008, 2009 and 1 more;"),
        ([response(), response(1006), response(1006), response()], "more than one row for ids 1005, 1006"),
        ([response(), {"response": "No"}], "row 1 .*: no id; needed is"),
        ([response("1005")], "row 0 .*: id '1005' must be a whole number"),
        ([{"id": 1005}], "row 0 .*: no prediction or response; .*tools/generate.py"),
        ([response(response=None)], "row 0 .*: response None must be a text"),
        ([response(response="\ud83d")], "row 0 .*: .*surrogates"),
        ([7], "row 0 .*: 7 is no row in braces"),
        ([], "is empty"),
    ],
)
def test_an_answer_that_cannot_be_scored_is_named(annotated, file, rows, words):
    path = file("bad.json", rows)
    with pytest.raises(SystemExit, match=f"^error: {path}.* {words}"):
        amber.main([str(path), "--annotations", str(annotated(SMALL))])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("ANSWERS", "[{]", "cannot read ANSWERS.*property name"),
        ("ANSWERS", "\n{\n", "ANSWERS, line 2: Expecting property name"),
        ("ANNOTATIONS", '[{"id": 1005, "query": "Is it?"}]', "ANNOTATIONS, row 0.*no type.*own annotations.json"),
        ("ANNOTATIONS", '[{"id": 1, "type": "generative"}]', "ANNOTATIONS has no question of the discriminative task"),
        ("ANNOTATIONS", '[{"id": 7, "type": "other", "truth": "no"}]', "ANNOTATIONS, id 7: type 'other', truth 'no'"),
        ("ANNOTATIONS", '[{"id": 7, "type": "relation", "truth": "No"}]', "id 7.*truth 'No'"),
        ("QUERIES", '[{"id": 1005}]', "QUERIES, row 0.*no query.*query_discriminative files"),
        ("QUERIES", '[{"id": 1, "query": "Describe it."}]', "QUERIES asks 1 questions.*id 1;"),
        ("QUERIES", '[{"id": 1005, "query": "a"}]', "6 questions that are not asked: ids 1006,.*--questions"),
    ],
)
def test_a_bad_file_is_named(annotated, predicted, tmp_path, name, text, words):
    paths = {"ANSWERS": predicted(["No"] * 7), "ANNOTATIONS": annotated(SMALL), "QUERIES": tmp_path / "queries.json"}
    paths[name].write_text(text)
    flags = ["--questions", paths["QUERIES"]] if name == "QUERIES" else []
    for name, path in paths.items():
        words = words.replace(name, str(path))
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        amber.main([str(part) for part in [paths["ANSWERS"], "--annotations", paths["ANNOTATIONS"], *flags]])


def test_mistakes_with_amber_get_one_message(annotated, predicted):
    argv = [predicted(["No"] * 7), "--annotations", annotated(SMALL)]
    for flag, value in (("--annotations", "nowhere.json"), ("--compare", "nowhere.jsonl")):
        assert f"cannot read {value}" in refusal(amber.main, [*argv, flag, value])
    assert "--first" in refusal(amber.main, [*argv, "--first"])  # no part of a flag's name is one


@pytest.mark.parametrize("name", ["amber.py", "docvqa.py"])
def test_as_a_program(annotated, predicted, file, tmp_path, name):
    """From any folder; a mistake ends it with exit status 1 and no traceback."""
    argv, words = [file("good.jsonl", LINES)], "ANLS 0.5417"
    if name == "amber.py":
        argv, words = [predicted(["No"] * 7), "--annotations", annotated(SMALL)], 'always "No"'
    command = [sys.executable, ROOT / "evals" / name, *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and words in done.stdout
    argv[0].write_text("{")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
