"""evals/docvqa.py: ANLS by hand and by a second implementation, and the program around it."""

import csv
import json
import random
import subprocess
import sys

import pytest
from conftest import ROOT

import idefics2_docvqa
from evals import docvqa


def line(prediction, reference, **more):
    return {
        "row": 0,
        "id": None,
        "turn": 0,
        "images": 1,
        "question": "?",
        "reference": reference,
        "prediction": prediction,
    } | more


@pytest.fixture
def predictions(tmp_path):
    """A function: lines, as dicts or as text -> the path of a file of them."""

    def make(*lines, name="after.jsonl"):
        text = "\n".join(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return make


@pytest.fixture
def score(predictions, capsys):
    """A function: lines, flags -> what the program prints about a file of these lines, line by line."""

    def make(*lines, flags=()):
        docvqa.main([str(predictions(*lines)), *map(str, flags)])
        return capsys.readouterr().out.splitlines()

    return make


def table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


# ---------------------------------------------------------------------------------------------------------- the score
@pytest.mark.parametrize(
    "prediction, references, right",
    [
        ("Paris", ["Paris"], 1),
        ("pARIS", ["Paris"], 1),
        (" grand \t hotel\n", ["Grand  Hotel"], 1),
        ("grand\u00a0hotel", ["grand hotel"], 1),
        ("hotels", ["hotel"], 1 - 1 / 6),  # one more letter
        ("hote", ["hotel"], 1 - 1 / 5),  # one less
        ("hobel", ["hotel"], 1 - 1 / 5),  # another one
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("ab", ["ac"], 0.5),  # the limit itself counts
        ("a" * 50 + "b" * 50, ["a" * 100], 0.5),
        ("a" * 49 + "b" * 51, ["a" * 100], 0),  # below it nothing does
        ("abc", ["axy"], 0),
        ("", ["Paris"], 0),
        ("Rome", ["Paris"], 0),
        ("$ 12.50", ["12.50"], 1 - 2 / 7),
        # spaces count in the length, not in the distance: the longer one is measured as it was given
        ("ab", ["  ac  "], 1 - 1 / 6),
        ("ac      ", ["ab"], 1 - 1 / 8),
        ("a  c", ["a b"], 1 - 1 / 4),
        # the nearest of several, each against its own length
        ("Oslo", ["Rome", "oslo"], 1),
        ("12", ["1245", "123"], 1 - 1 / 3),
        ("12", ["12 kg of it", "1"], 0.5),
        ("x", ["Rome", "Oslo"], 0),
        # letters, not bytes
        ("zurich", ["Zürich"], 1 - 1 / 6),
        ("ZÜRICH", ["zürich"], 1),
        ("straße", ["STRASSE"], 1 - 2 / 7),
        ("日本", ["日本語"], 1 - 1 / 3),
        ("🙂🙂", ["🙂🙃"], 0.5),
    ],
)
def test_anls_by_hand(prediction, references, right):
    assert docvqa.anls(prediction, references) == pytest.approx(right, abs=1e-12)
    assert idefics2_docvqa.anls(prediction, references) == docvqa.anls(prediction, references)


def by_definition(prediction, references):
    """ANLS of one question with nothing but the definitions: a grid of edit distances, prefix against prefix."""
    nearest = 1.0
    for reference in references:
        a, b = (" ".join(text.strip().lower().split()) for text in (prediction, reference))
        grid = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                same = grid[i - 1][j - 1] + (a[i - 1] != b[j - 1])
                grid[i][j] = min(same, grid[i - 1][j] + 1, grid[i][j - 1] + 1)
        nearest = min(nearest, grid[-1][-1] / max(len(prediction), len(reference)))
    similarity = 1 - nearest
    return similarity if similarity >= 0.5 else 0.0


def test_a_second_implementation_agrees():
    rng, seen = random.Random(0), []
    text = lambda least: "".join(rng.choice("aabbAB é  \t1") for _ in range(rng.randint(least, 10)))
    while len(seen) < 1500:
        references = [text(1) for _ in range(rng.randint(1, 3))]
        if all(reference.strip() for reference in references):
            prediction = text(0) if rng.random() < 0.5 else references[0][: rng.randint(0, 10)] + text(0)[:3]
            seen.append((docvqa.anls(prediction, references), by_definition(prediction, references)))
            assert seen[-1][0] == pytest.approx(seen[-1][1], abs=1e-12), (prediction, references)
            assert idefics2_docvqa.anls(prediction, references) == seen[-1][0]
    kinds = [sum(value == edge for value, _ in seen) for edge in (0, 0.5, 1)]
    assert min(kinds) > 10 and sum(kinds) < len(seen) - 100  # zeros, the limit, ones, and others


@pytest.mark.parametrize("references", [[], [""], ["yes", " \n"]])
def test_an_accepted_answer_that_is_blank_cannot_be_scored(references):
    with pytest.raises(ValueError, match="none may be blank"):
        docvqa.anls("yes", references)


def test_exact_match_forgives_case_and_spaces_only(predictions):
    same = [("yes", "Yes"), ("a  b", "A b\n"), ("two", ["one", "TWO"])]
    other = [("ye", "yes"), ("yes.", "yes"), ("two", ["one", "three"]), ("", "yes")]
    path = predictions(*(line(prediction, reference) for prediction, reference in same + other))
    found = {(row["prediction"], str(row["reference"])): row["exact_match"] for row in docvqa.score(path)}
    assert found == {(p, str(r)): 1 for p, r in same} | {(p, str(r)): 0 for p, r in other}


# -------------------------------------------------------------------------------------------------------- the program
LINES = [
    line("Rome", ["Rome", "rome"], id="a", question="Which city?"),
    line("Oslo", "Cairo", id="b", question="Which town?"),
    line("123", ["124"], id="c", question="How many\nare there?"),
    line("ab", "ac", id=None, row=7, question="Which letters?"),
]


def test_the_worst_come_first(score):
    head, *shown, empty, end = score(*LINES)
    assert head.split() == ["ANLS", "exact", "id", "question", "prediction", "accepted"] and empty == ""
    assert [row.split()[:3] for row in shown] == [
        ["0.000", "0", "b"],
        ["0.500", "0", "7"],
        ["0.667", "0", "c"],
        ["1.000", "1", "a"],
    ]
    assert "How many are there?" in shown[2] and shown[-1].endswith("Rome / rome")
    mean = (0 + 0.5 + 2 / 3 + 1) / 4
    assert end.split() == ["ANLS", f"{mean:.4f}", "exact", "match", "0.2500", "questions", "4"]


@pytest.mark.parametrize("worst, shown", [(0, 0), (1, 1), (3, 3), (99, 4), (-1, 4)])
def test_only_so_many_are_shown(score, worst, shown):
    *lines, end = score(*LINES, flags=["--worst", worst])
    assert len(lines) == (shown + 2 if shown else 0) and "questions 4" in end


def test_long_cells_are_cut_on_the_screen_only(score, tmp_path):
    long = "word " * 30
    shown = score(line(long, long), flags=["--csv", tmp_path / "t.csv"])
    assert "…" in shown[1] and max(map(len, shown[:2])) < 170
    assert table(tmp_path / "t.csv")[1][4] == long


def test_every_question_into_a_table(score, predictions, tmp_path):
    end = score(*LINES, flags=["--worst", 0, "--csv", tmp_path / "t.csv"])[-1]
    assert str(tmp_path / "t.csv") in end
    head, *rows = table(tmp_path / "t.csv")
    assert head == ["ANLS", "exact", "id", "question", "prediction", "accepted"]
    assert rows[2] == ["0.667", "0", "c", "How many\nare there?", "123", "124"] and len(rows) == 4
    before = (tmp_path / "t.csv").read_bytes()
    again = [str(predictions(LINES[0])), "--csv", str(tmp_path / "t.csv")]
    with pytest.raises(SystemExit, match="^error: .*--overwrite"):
        docvqa.main(again)
    assert (tmp_path / "t.csv").read_bytes() == before
    docvqa.main([*again, "--overwrite"])
    assert len(table(tmp_path / "t.csv")) == 2


def test_files_as_editors_leave_them(predictions, tmp_path):
    """A byte order mark, Windows' line ends, empty lines, a line separator within a text."""
    path = predictions(line("a\u2028b", "a b"), "", line("Ü", "ü"), "  ")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [row["anls"] for row in docvqa.score(path)] == [1, 1]


@pytest.mark.parametrize(
    "lines, words",
    [
        (["{"], ["line 2"]),
        (["[1]"], ["line 2"]),
        (["7"], ["line 2"]),
        ([{"prediction": "x"}], ["line 2", "no 'reference'"]),
        ([{"reference": "x"}], ["line 2", "no 'prediction'"]),
        ([line("x", None)], ["line 2", "None"]),  # what generate.py writes of a row without answers
        ([line(None, "x")], ["line 2", "None"]),
        ([line("x", 7)], ["line 2", "7"]),
        ([line("x", ["x", 7])], ["line 2", "7"]),
        ([line("x", " ")], ["line 2", "blank"]),
        ([line("x", ["x", ""])], ["line 2", "blank"]),
        ([line("x", [])], ["line 2", "at least one"]),
        (["", "", "{"], ["line 4"]),
        (['{"prediction": "\\ud83d", "reference": "a"}'], ["line 2", "surrogates"]),
    ],
)
def test_a_bad_line_is_named(predictions, lines, words):
    path = predictions(line("x", "x"), *lines)
    with pytest.raises(SystemExit) as stopped:
        docvqa.main([str(path), "--csv", str(path.parent / "t.csv")])
    message = stopped.value.code
    assert message.startswith(f"error: {path}, ") and "\n" not in message and all(word in message for word in words)
    assert not (path.parent / "t.csv").exists()


@pytest.mark.parametrize(
    "argv, word",
    [
        (["nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["FOLDER"], "cannot read"),
        (["LATIN"], "cannot read"),
        (["EMPTY"], "is empty"),
        (["GOOD", "--csv", "nowhere/t.csv"], "cannot write nowhere/t.csv"),
        (["GOOD", "--worst", "many"], "--worst"),
        (["GOOD", "--cvs", "t.csv"], "--cvs"),
        ([], "PREDICTIONS.jsonl"),
    ],
)
def test_mistakes_get_one_message(predictions, tmp_path, argv, word):
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(line("é", "é"), ensure_ascii=False).encode("latin-1"))
    names = {"FOLDER": tmp_path, "LATIN": tmp_path / "latin.jsonl", "GOOD": predictions(LINES[0])}
    names["EMPTY"] = predictions("", " ", name="empty.jsonl")
    with pytest.raises(SystemExit) as stopped:
        docvqa.main([str(names.get(part, part)) for part in argv])
    assert stopped.value.code.startswith("error: ") and word in stopped.value.code


def test_as_a_program(predictions, tmp_path):
    program = [sys.executable, ROOT / "evals" / "docvqa.py"]
    runs = [[predictions(*LINES), "--worst", "1"], [predictions("{", name="bad.jsonl")]]
    good, bad = (subprocess.run([*program, *argv], capture_output=True, text=True, cwd=tmp_path) for argv in runs)
    assert good.returncode == 0 and good.stderr == "" and "Oslo" in good.stdout and "ANLS 0.5417" in good.stdout
    assert (
        bad.returncode == 1 and bad.stdout == "" and bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr
    )
