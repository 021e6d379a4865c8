"""evals/amber.py: the scores by hand, by a second implementation and as AMBER's own script gave them, and the program around it."""

import json
import random
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest
from conftest import ROOT

from evals import amber

TYPE = {"existence": "discriminative-hallucination", "relation": "discriminative-relation"}
TYPE |= {kind: f"discriminative-attribute-{kind}" for kind in ("state", "number", "action")}
FULL = [("state", "yes", 2382), ("state", "no", 2382), ("number", "yes", 1036), ("number", "no", 1036), ("action", "yes", 396),
        ("action", "no", 396), ("existence", "no", 4924), ("relation", "yes", 975), ("relation", "no", 689)]  # fmt: skip


def annotated(*asked):
    """(kind, right answer) of each question -> AMBER's annotations: 1,004 pictures to describe come first, and a relation
    that is not there has a type of its own."""
    rows = [{"id": n, "type": "generative", "truth": ["sky"], "hallu": ["cloud"]} for n in range(1, 1005)]
    types = ("relation" if (kind, truth) == ("relation", "no") else TYPE[kind] for kind, truth in asked)
    return rows + [
        {"id": n, "type": own, "truth": truth} for n, (own, (_, truth)) in enumerate(zip(types, asked), 1005)
    ]


SMALL = [
    ("existence", "no"),
    ("state", "yes"),
    ("state", "no"),
    ("number", "yes"),
    ("action", "no"),
    ("relation", "yes"),
    ("relation", "no"),
]


@pytest.fixture
def files(write):
    """A function: questions as (kind, right answer), lists of answers to them -> [annotations, answers of each list as
    generate.py writes them]."""

    def make(asked, *told):
        lines = [
            [
                {"row": n, "id": 1005 + n, "question": f"Q{n}?", "reference": None, "prediction": said}
                for n, said in enumerate(own)
            ]
            for own in told
        ]
        return [
            write(annotated(*asked), "annotations.json"),
            *(write(own, f"{'abc'[n]}.jsonl") for n, own in enumerate(lines)),
        ]

    return make


@pytest.fixture
def run(capsys):
    """A function: predictions, annotations, flags -> what the program prints, or, with --json, the object."""

    def make(predictions, annotations, *flags):
        amber.main([str(predictions), "--annotations", str(annotations), *map(str, flags)])
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in flags else out

    return make


@pytest.fixture
def refused(run):
    """A function: as run -> the one message with which it ends."""

    def make(*argv):
        with pytest.raises(SystemExit) as stopped:
            run(*argv)
        assert stopped.value.code.startswith("error: ") and "\n" not in stopped.value.code
        return stopped.value.code.replace(f"{argv[0]}", "FILE").replace(f"{argv[1]}", "ANNOTATIONS")

    return make


def values(scores, kind="all"):
    return [scores[kind][metric] for metric in ("accuracy", "precision", "recall", "f1")]


# ---------------------------------------------------------------------------------------------------------- the scores
@pytest.mark.parametrize(
    "right, said, expected",
    [  # denominators are off by 0.001: of three, 33.3 is 1 / 3.001; of one, 99.9 is 1 / 1.001
        ("nnny", ["no", "no", "yes", "no"], [50.0, 66.6, 66.6, 66.6]),
        ("ny", ["no", "yes"], [100.0, 99.9, 99.9, 99.9]),
        ("ny", ["yes", "yes"], [50.0, 0.0, 0.0, 0.0]),  # never no: nothing is divided by 0
        ("yy", ["yes", None], [50.0, 0.0, 0.0, 0.0]),
        ("nn", [None, None], [0.0, 0.0, 0.0, 0.0]),
        ("nnyy", ["no", None, None, "yes"], [50.0, 99.9, 50.0, 66.6]),  # no answer: wrong, and neither yes nor no
        ("nyy", ["no", "no", "no"], [33.3, 33.3, 99.9, 49.9]),  # of P and R as they are, not rounded, F1 would be 50.0
    ],
)
def test_scores_by_hand(right, said, expected):
    rows = [("state", {"n": "no", "y": "yes"}[letter], answer) for letter, answer in zip(right, said)]
    found = amber.measure(rows, "state")
    assert [*found.values()] == [len(said), *expected] and amber.measure(rows) == found


def test_the_constants_of_existence_and_of_the_attributes_together():
    """The former's F1 has 0.001 in its denominator, in place of 0.0001; the latter have three denominators' 0.001."""
    rows = [("existence", "no", "no" if n < 17 else "yes") for n in range(20)]
    assert amber.measure(rows, "existence") == {
        "questions": 20,
        "accuracy": 85.0,
        "precision": 100.0,
        "recall": 85.0,
        "f1": 91.8,
    }
    assert amber.measure(rows)["f1"] == 91.9
    rows = [("state", "no", "no"), ("relation", "no", "no")]
    assert amber.measure(rows, "attribute")["recall"] == 99.7 and amber.measure(rows, "state")["recall"] == 99.9


def test_always_no_on_all_of_amber():
    rows = [(kind, truth, "no") for kind, truth, count in FULL for _ in range(count)]
    assert [amber.measure(rows, kind)["questions"] for kind in ("all", "existence", "attribute", "relation")] == [
        14216,
        4924,
        7628,
        1664,
    ]
    assert sum(truth == "no" for _, truth, _ in rows) == 9427  # 66.3 %
    found = amber.measure(rows)
    assert (found["accuracy"], found["precision"], found["recall"], found["f1"]) == (66.3, 66.3, 100.0, 79.7)


def by_definition(rows, kind):
    """One kind's scores in fractions, from a table of truth by answer; nothing is rounded but what AMBER rounds."""
    own = {"all": TYPE, "attribute": ("state", "number", "action")}.get(kind, (kind,))
    grid = Counter((truth, said) for k, truth, said in rows if k in own)
    little = Fraction(3 if kind == "attribute" else 1, 1000)
    percent = lambda a, b: round(1000 * Fraction(a) / b) / 10
    column, row = sum(grid[t, "no"] for t in ("yes", "no")), sum(count for (t, _), count in grid.items() if t == "no")
    a = percent(grid["no", "no"] + grid["yes", "yes"], sum(grid.values()) + little)
    p, r = percent(grid["no", "no"], column + little), percent(grid["no", "no"], row + little)
    share = lambda value: Fraction(round(10 * value), 1000)
    harmonic = 2 * share(p) * share(r) / (share(p) + share(r) + Fraction(1, 1000 if kind == "existence" else 10000))
    return {"questions": sum(grid.values()), "accuracy": a, "precision": p, "recall": r, "f1": percent(harmonic, 1)}


def test_a_second_implementation_agrees():
    rng = random.Random(0)
    for _ in range(300):
        good, lean = rng.random(), rng.choice([["yes"], ["no"], ["yes", "no", None]])
        truths = [(rng.choice([*TYPE]), rng.choice(["yes", "no"])) for _ in range(rng.choice([1, 3, 10, 100, 700]))]
        rows = [(kind, truth, truth if rng.random() < good else rng.choice(lean)) for kind, truth in truths]
        for kind in amber.KINDS:
            assert amber.measure(rows, kind) == by_definition(rows, kind)


def test_as_ambers_own_script_scored_them(files, run):
    """All 14,216 questions, answered by rule; the values are what inference.py printed of the same answers."""
    asked = [
        (kind, truth)
        for kind, truth, count in sorted(FULL, key=lambda x: (x[0] != "existence", FULL.index(x)))
        for _ in range(count)
    ]
    wrong, told = {"yes": "No", "no": "Yes"}, []
    for n, (_, truth) in enumerate(asked, 1005):
        told.append(
            "No. It is not."
            if n % 11 == 0
            else "yes"
            if n % 13 == 0
            else wrong[truth]
            if n % 7 == 0
            else truth.capitalize()
        )
    annotations, answers = files(asked, told)
    whole = run(answers, annotations, "--json")
    scores = whole["after"]["exact"]["scores"]
    assert {kind: values(scores, kind) for kind in scores} == {
        "all": [71.9, 92.2, 72.0, 80.9], "existence": [71.9, 100.0, 71.9, 83.6], "attribute": [71.9, 85.6, 72.0, 78.2],
        "state": [71.9, 85.6, 71.9, 78.1], "number": [72.0, 85.7, 72.0, 78.2], "action": [71.8, 85.4, 72.2, 78.2],
        "relation": [71.9, 80.9, 72.0, 76.2]}  # fmt: skip
    assert (
        values(whole["always_no"]["scores"]) == [66.3, 66.3, 100.0, 79.7]
        and values(whole["always_no"]["scores"], "existence") == [100.0] * 4
    )
    assert whole["full"] and whole["published"]["Idefics2 + DPO"] == {"accuracy": 85.9, "f1": 89.4}
    shown = [line.split() for line in run(answers, annotations, "--worst", 0).splitlines()]
    assert ["all", "14216", "71.9", "92.2", "72.0", "80.9"] in shown and [
        "always",
        '"No"',
        "66.3",
        "79.7",
        "0",
        "100.0",
    ] in shown
    assert ["published:", "Idefics2", "85.8", "89.1"] in shown and [
        "published:",
        "Idefics2",
        "+",
        "DPO",
        "85.9",
        "89.4",
    ] in shown


@pytest.mark.parametrize(
    "said, strict, lenient",
    [
        ("Yes", "yes", "yes"),
        ("No", "no", "no"),
        ("No.", None, "no"),
        ("no", None, "no"),
        (" No", None, "no"),
        ("YES!", None, "yes"),
        ("No, there is not.", None, "no"),
        ("**Yes**", None, "yes"),
        ("yes\nno", None, "yes"),
        ("Not at all", None, None),
        ("Nothing", None, None),
        ("Yesterday", None, None),
        ("Answer: No", None, None),
        ("The answer is yes.", None, None),
        ("", None, None),
        ("...", None, None),
    ],
)
def test_how_an_answer_is_read(said, strict, lenient):
    assert (amber.exact(said), amber.first_word(said)) == (strict, lenient)


# --------------------------------------------------------------------------------------------------------- the program
def test_both_readings_are_shown_and_one_is_the_table(files, run):
    annotations, answers = files(SMALL, ["No", "Yes.", "No, it is not", "Yes", "Maybe", "No", "No"])
    plain, free = (run(answers, annotations, *flags) for flags in ([], ["--first_word"]))
    for text in (plain, free):
        assert any(
            line.startswith(f"{answers}: exactly Yes or No ") and line.split()[-4:] == ["42.9", "57.1", "3", "42.9"]
            for line in text.splitlines()
        )
        assert any(
            line.startswith(f"{answers}: by the first word ") and line.split()[-4:] == ["71.4", "75.0", "1", "57.1"]
            for line in text.splitlines()
        )
    row = lambda text, kind: next(
        line.split()[1:] for line in text.splitlines() if line.split()[:1] == [kind] and "?" not in line
    )
    assert row(plain, "all") == ["7", "42.9", "66.6", "50.0", "57.1"] and row(free, "all") == [
        "7",
        "71.4",
        "75.0",
        "75.0",
        "75.0",
    ]
    assert row(plain, "attribute")[:2] == ["4", "25.0"] and row(free, "attribute")[:2] == ["4", "74.9"]
    assert "as AMBER reads answers (otherwise: --first_word)" in plain and "Each kind: by the first word." in free


def test_published_values_are_those_of_all_questions_only(files, run):
    annotations, answers = files(SMALL, ["No"] * 7)
    text = run(answers, annotations)
    assert (
        "not of these 7" in text
        and "published:" not in text
        and run(answers, annotations, "--json")["published"] is None
    )
    annotations, answers = files([("state", "no")] * 14216, ["No"] * 14216)
    assert "these are not they" in run(answers, annotations)


def test_kinds_that_are_not_asked_about_are_not_shown(files, run, write):
    annotations, answers = files([("existence", "no")] * 3, ["No", "Yes", "No"])
    assert [*run(answers, annotations, "--json")["after"]["exact"]["scores"]] == ["all", "existence"]
    annotations, answers = files(SMALL, ["No"] * 7)
    queries = write(
        [{"id": n, "image": "AMBER_1.jpg", "query": "Is it so?"} for n in (1010, 1011)],
        "query_discriminative-relation.json",
    )
    some = write([{"id": n, "response": "No"} for n in (1011, 1010)], "some.json")
    whole = run(some, annotations, "--questions", queries, "--json")
    assert (
        whole["questions"] == 2
        and [*whole["after"]["exact"]["scores"]] == ["all", "relation"]
        and whole["left_out"] == 0
    )


def test_before_and_after(files, run):
    annotations, before, after = files(
        SMALL, ["Yes", "Yes", "Yes", "Yes", "No", "No", "No"], ["No", "Yes", "No", "No", "No", "Yes", "no"]
    )
    whole = run(after, annotations, "--compare", before, "--json")
    assert whole["changed"] == {"to_right": 3, "to_wrong": 2}
    assert [values(whole[name]["exact"]["scores"])[0] for name in ("before", "after")] == [57.1, 71.4]
    assert (
        whole["after"] == run(after, annotations, "--json")["after"]
        and whole["before"] == run(before, annotations, "--json")["after"]
    )
    text = run(after, annotations, "--compare", before)
    assert (
        "57.1 -> 71.4" in text and "3 answers became right, 2 wrong." in text and "Each kind: before -> after" in text
    )
    assert text.count(f"{before}: ") == text.count(f"{after}: ") == 2
    head, unread, wrong = (line.split() for line in text.splitlines()[:3])
    assert head == ["kind", "id", "question", "right", "before", "after"]
    assert unread == ["relation", "1011", "Q6?", "no", "No", "no"] and wrong == [
        "number",
        "1008",
        "Q3?",
        "yes",
        "Yes",
        "No",
    ]
    assert run(after, annotations, "--compare", before, "--first_word", "--json")["changed"] == {
        "to_right": 3,
        "to_wrong": 1,
    }


def test_wrong_answers_are_shown_by_turns_of_their_kinds(files, run, write):
    asked = [("state", "yes")] * 30 + [("relation", "no")] * 2 + [("state", "no")]
    annotations, answers = files(asked, ["No"] * 30 + ["Yes"] * 2 + ["Hm\nm " + "long " * 30])
    shown = lambda *flags: run(answers, annotations, *flags).split("\n\n")[0].splitlines()
    assert [line.split()[:2] for line in shown("--worst", 4)] == [
        ["kind", "id"], ["state", "1037"], ["relation", "1035"], ["state", "1005"], ["relation", "1036"]]  # fmt: skip
    assert (
        len(shown()) == 21
        and len(shown("--worst", -1)) == 34
        and shown("--worst", 0)[0].split()[:2] == ["kind", "questions"]
    )
    assert "Hm m long" in shown()[1] and shown()[1].endswith("…") and max(map(len, shown())) < 150
    queries = write([{"id": n, "image": f"{n}.jpg", "query": "Is it?"} for n in range(1005, 1038)], "queries.json")
    assert shown("--questions", queries)[0].split() == ["kind", "id", "image", "question", "right", "answer"]
    assert shown("--questions", queries)[2].split()[:5] == ["relation", "1035", "1035.jpg", "Is", "it?"]
    annotations, answers = files(asked, [truth.capitalize() for _, truth in asked])
    assert shown()[0].split()[:2] == ["kind", "questions"]  # nothing is wrong


def test_the_forms_of_a_predictions_file(files, run, write):
    annotations, answers = files(SMALL, ["No", "Yes", "No", "Yes", "No", "Yes", "No"])
    rows = [{"id": 1005 + n, "response": said} for n, said in enumerate(["No", "Yes", "No", "Yes", "No", "Yes", "No"])]
    found = run(answers, annotations, "--json")
    assert values(found["after"]["exact"]["scores"])[0] == 100.0
    for name in ("own.json", "own.jsonl"):
        assert run(write(rows[::-1], name), annotations, "--json") == found
    answers.write_bytes(b"\xef\xbb\xbf" + answers.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert run(answers, annotations, "--json") == found


def test_some_questions_are_not_answered(files, run, refused, write):
    annotations, answers = files(SMALL, ["No"] * 7)
    some, other = (
        write([{"id": n, "response": "No"} for n in ids], name)
        for ids, name in (((1006, 1007, 1008), "x.json"), ((1008, 1005), "y.json"))
    )
    message = refused(some, annotations)
    assert (
        message.startswith("error: FILE lacks answers to 4 of 7 questions: ids 1005, 1009, 1010, 1011; ")
        and "--answered_only" in message
    )
    whole = run(some, annotations, "--answered_only", "--json")
    assert (whole["questions"], whole["left_out"]) == (3, 4) and whole["after"]["exact"]["scores"]["all"][
        "questions"
    ] == 3
    assert "4 questions are not answered and left out." in run(some, annotations, "--answered_only")
    assert "lacks answers to 5 of 7" in refused(answers, annotations, "--compare", other)
    both = run(some, annotations, "--compare", other, "--answered_only", "--json")
    assert (both["questions"], both["left_out"], both["before"]["exact"]["no"]) == (1, 6, 1)
    none = write([{"id": 1011, "response": "No"}], "z.json")
    assert "answer no question in common" in refused(none, annotations, "--compare", other, "--answered_only")
    assert (
        "left out" not in run(answers, annotations)
        and run(answers, annotations, "--answered_only", "--json")["left_out"] == 0
    )


def test_long_lists_of_ids_are_cut(files, refused, write):
    annotations, _ = files(SMALL * 3, ["No"] * 21)
    assert (
        amber.some({3, 1}) == "ids 1, 3"
        and amber.some(range(11)).endswith("8, 9 and 1 more")
        and amber.some(range(10)).endswith("8, 9")
    )
    message = refused(write([{"id": 1005, "response": "No"}], "x.json"), annotations)
    assert (
        "lacks answers to 20 of 21 questions: ids 1006, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 1015 and 10 more; "
        in message
    )


def row(n=1005, **more):
    return {"id": n, "response": "No", **more}


@pytest.mark.parametrize(
    "rows, words",
    [
        ([row(1), row(1004)], ["answers 2 questions that are not asked: ids 1, 1004;", "from 1005 on"]),
        ([row(9999)], ["answers 1 questions that are not asked: id 9999;"]),
        ([row(), row(1006), row(1006), row()], ["more than one row for ids 1005, 1006"]),
        ([row(), {"response": "No"}], ["row 1 (they count from 0): no id; needed is"]),
        ([row("1005")], ["row 0", "id '1005' must be a whole number"]),
        ([row(1005.0)], ["id 1005.0 must be"]),
        ([row(True)], ["id True must be"]),
        ([row(None)], ["id None must be"]),
        ([{"id": 1005}], ["row 0", "no prediction or response", "tools/generate.py"]),
        ([row(response=None)], ["response None must be a text"]),
        ([row(prediction=True)], ["prediction True must be a text"]),
        ([row(response=["No"])], ["response ['No'] must be"]),
        ([row(response="\ud83d")], ["row 0", "surrogates"]),
        (["No"], ["row 0", "'No' is no row in braces"]),
        ([7], ["7 is no row in braces"]),
        ([], ["is empty"]),
    ],
)
def test_a_bad_row_is_named(files, refused, write, rows, words):
    annotations, _ = files(SMALL, ["No"] * 7)
    found = refused(write(rows, "x.json"), annotations)
    assert all(word in found for word in words), found
    if rows and isinstance(rows[0], dict):
        named = refused(write([*rows], "x.jsonl"), annotations)
        assert named.replace("line 1", "row 0").replace("line 2", "row 1") == found.replace(" (they count from 0)", "")


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("FILE", "[{]", ["cannot read FILE", "property name"]),
        ("FILE", "\n{\n", ["FILE, line 2: Expecting property name"]),
        ("FILE", " \n", ["FILE is empty"]),
        ("FILE", b"[\xff]", ["cannot read FILE", "utf-8"]),
        ("ANNOTATIONS", "{", ["ANNOTATIONS, line 1", "AMBER's own annotations.json"]),
        (
            "ANNOTATIONS",
            '[{"id": 1005, "image": "a.jpg", "query": "Is it?"}]',
            ["ANNOTATIONS, row 0", "no type", "AMBER's own annotations.json"],
        ),
        (
            "ANNOTATIONS",
            '[{"id": 1, "type": "generative"}]',
            ["ANNOTATIONS has no question of the discriminative task"],
        ),
        (
            "ANNOTATIONS",
            '[{"id": 7, "type": "discriminative", "truth": "no"}]',
            ["ANNOTATIONS, id 7: type 'discriminative', truth 'no'"],
        ),
        ("ANNOTATIONS", '[{"id": 7, "type": "relation", "truth": "No"}]', ["id 7", "truth 'No'"]),
        ("ANNOTATIONS", '[{"id": 7, "type": "relation", "truth": []}]', ["id 7", "truth []"]),
        ("ANNOTATIONS", '[{"id": 7, "type": "relation"}]', ["id 7", "truth None"]),
        ("QUERIES", '[{"id": 1005}]', ["QUERIES, row 0", "no query", "query_discriminative files"]),
        (
            "QUERIES",
            '[{"id": 1, "query": "Describe it."}, {"id": 1005, "query": "Is it?"}]',
            ["QUERIES asks 1 questions", "id 1;"],
        ),
        (
            "QUERIES",
            '[{"id": 1005, "query": "a"}, {"id": 1005, "query": "a"}]',
            ["QUERIES has more than one row for id 1005"],
        ),
        (
            "QUERIES",
            '[{"id": 1005, "query": "a"}]',
            ["answers 6 questions that are not asked: ids 1006,", "--questions"],
        ),
    ],
)
def test_a_bad_file_is_named(files, refused, tmp_path, name, text, words):
    annotations, answers = files(SMALL, ["No"] * 7)
    path = {"FILE": answers, "ANNOTATIONS": annotations, "QUERIES": tmp_path / "QUERIES"}[name]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = refused(answers, annotations, *(["--questions", path] if name == "QUERIES" else []))
    assert all(word in found for word in words), found


@pytest.mark.parametrize(
    "argv, word",
    [
        (["nowhere.jsonl", "--annotations", "GOOD"], "cannot read nowhere.jsonl"),
        (["FOLDER", "--annotations", "GOOD"], "cannot read"),
        (["ANSWERS", "--annotations", "nowhere.json"], "cannot read nowhere.json"),
        (["ANSWERS", "--annotations", "GOOD", "--questions", "nowhere.json"], "cannot read nowhere.json"),
        (["ANSWERS", "--annotations", "GOOD", "--compare", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["ANSWERS"], "--annotations"),
        (["--annotations", "GOOD"], "PREDICTIONS"),
        (["ANSWERS", "--annotations", "GOOD", "--worst", "many"], "--worst"),
        (["ANSWERS", "--annotations", "GOOD", "--first"], "--first"),
    ],
)
def test_mistakes_get_one_message(files, tmp_path, argv, word):
    annotations, answers = files(SMALL, ["No"] * 7)
    names = {"GOOD": annotations, "ANSWERS": answers, "FOLDER": tmp_path}
    with pytest.raises(SystemExit) as stopped:
        amber.main([str(names.get(part, part)) for part in argv])
    assert stopped.value.code.startswith("error: ") and word in stopped.value.code


def test_as_a_program(files, tmp_path):
    annotations, answers = files(SMALL, ["No"] * 7)
    program = [sys.executable, ROOT / "evals" / "amber.py"]
    runs = [[answers, "--annotations", annotations], [annotations, "--annotations", annotations]]
    good, bad = (subprocess.run([*program, *argv], capture_output=True, text=True, cwd=tmp_path) for argv in runs)
    assert good.returncode == 0 and good.stderr == "" and 'always "No"' in good.stdout
    assert (
        bad.returncode == 1 and bad.stdout == "" and bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr
    )
