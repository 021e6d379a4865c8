"""Score yes-or-no answers about what a picture does not show: AMBER's discriminative task, and where they go wrong.

    git clone https://github.com/junyangwang0410/AMBER  # questions and annotations; its README links 1,004 pictures
    python tools/generate.py RUN --dataset_name AMBER/data/query/query_discriminative.json --image_folder image \\
        --question_column query --append "Please answer yes or no." --max_new_tokens 8 --output after.jsonl
    python evals/amber.py after.jsonl --annotations AMBER/data/annotations.json --compare before.jsonl

Answers are lines of tools/generate.py (`id`, `prediction`) or AMBER's own list of {"id", "response"}. `--questions
query_discriminative-relation.json` scores answers to a part of the questions, `--answered_only` any answers there are.

AMBER (Wang et al. 2023, arXiv:2311.07397) asks 14,216 questions about existence (4,924, the right answer is always
no), attributes (7,628: state, number, action) and relations (1,664); to 9,427 of all, 66.3 %, the right answer is no.
Scores are those of its inference.py, commit 534babf:

- accuracy: right answers / questions. What is neither "Yes" nor "No" is wrong.
- "No" is the positive class: precision = right "No" / answered "No", recall = right "No" / questions whose right
  answer is no.
- Denominators start at 0.001 (at 0.003 for the attributes together, three counts of 0.001 each): no answer "No" gives
  0, no error.
- All three in percent, rounded to 0.1. Of these rounded values F1 = 2PR / (P + R + c) as shares of 1, in percent,
  rounded to 0.1; c is 0.0001, but 0.001 for existence.
- Answers must be exactly "Yes" or "No". "No." and "no, there is not" count as neither: how many, is printed, and the
  scores beside that come of taking an answer by its first word (`--first_word` makes them the table).

By its first word, in any case, an answer is a yes or a no if that is the first word and the other one is nowhere in
the answer. After it must come the end of the line, one of . , ; : ! … or a dash, or a word with which a sentence about
the picture begins: there, it, they, he, she, this, that, these, those, the, a, an, I, we, you. So "No doubt, there is
a dog", "No dog is there", "Yes?" and "Yes or no? No." are neither, and "No-one" (another word) and "No. 5" (a number)
are neither. Quotes, brackets, asterisks and underscores around the first word change nothing.

Always answering "No" gives 66.3 accuracy and 79.7 F1. A model that learns to deny more gains recall and, up to a
point, F1: look at precision and at how often it says No, too. Published values are of the post on DPO for
vision-language models (huggingface.co/blog/dpo_vlm, 2024); they are shown where the questions are all 14,216.
"""

import json
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.program import fail, flag_parser, print_table, start, text_table  # noqa: E402

TYPES = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",  # where the right answer is no
}
ATTRIBUTES = ("state", "number", "action")
KINDS = {
    "all": ("action", "existence", "number", "relation", "state"),
    "existence": ("existence",),
    "attribute": ATTRIBUTES,
    "state": ("state",),
    "number": ("number",),
    "action": ("action",),
    "relation": ("relation",),
}
FULL = {  # how many questions AMBER has of each kind and right answer
    ("existence", "no"): 4924,
    ("state", "yes"): 2382,
    ("state", "no"): 2382,
    ("number", "yes"): 1036,
    ("number", "no"): 1036,
    ("action", "yes"): 396,
    ("action", "no"): 396,
    ("relation", "yes"): 975,
    ("relation", "no"): 689,
}
PUBLISHED = {"Idefics2": {"accuracy": 85.8, "f1": 89.1}, "Idefics2 + DPO": {"accuracy": 85.9, "f1": 89.4}}
METRICS = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1"}
READ_BY = {"exact": "exactly Yes or No", "first_word": "by the first word"}

# for --first_word; texts are in lower case
WORD = re.compile(r"[^\W_]+(?:[-‐‑][^\W_]+)*")  # no-one is one word
OPPOSITE = {"yes": "no", "no": "yes"}
NUMBER = re.compile(r"\. *\d")  # behind no, which is then short for number
AFTER = re.compile(  # what may come after yes or no, behind spaces, quotes, brackets and Markdown
    r"""[\s"'“”‘’«»()\[\]*_`]*"""
    r"(?:\Z|[.,;:!…–—\n-]|(?:there|it|they|he|she|this|that|these|those|the|an?|i|we|you)(?![-‐‑\w]))"
)


# --------------------------------------------------------------------------------------------------------------- files


def list_ids(ids):
    """Ids -> text: how the first ten are named in a message."""
    ids = sorted(ids)
    text = ("id " if len(ids) == 1 else "ids ") + ", ".join(map(str, ids[:10]))
    return f"{text} and {len(ids) - 10} more" if len(ids) > 10 else text


def checked(row, names):
    """A row, if it is a dict with a whole number as `id` and a text under the first of the names that it has. Raises
    ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"{row!r} is no row in braces")
    json.dumps(row, ensure_ascii=False).encode()  # half a character could not be printed
    if "id" not in row:
        raise ValueError("no id")
    if type(row["id"]) is not int:  # True is an int, too
        raise ValueError(f"id {row['id']!r} must be a whole number, as in AMBER's query files")
    name = next((name for name in names if name in row), None)
    if name is None:
        raise ValueError(f"no {' or '.join(names)}")
    if not isinstance(row[name], str):
        raise ValueError(f"{name} {row[name]!r} must be a text")
    return row


def read(path, names, needed):
    """A .json list or a .jsonl file -> {id: row}, each row as `checked`. Raises SystemExit where it is not so, with
    the row and what is `needed`, and for an id that comes twice."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_list = text.lstrip().startswith("[")
        if is_list:
            lines = [(f"row {n} (they count from 0)", row) for n, row in enumerate(json.loads(text))]
        else:
            lines = [(f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    except (OSError, ValueError) as e:
        fail(f"cannot read {path}: {e}")
    rows, repeated = {}, set()
    for place, line in lines:
        try:
            row = checked(line if is_list else json.loads(line), names)
        except ValueError as e:
            fail(f"{path}, {place}: {e}; {needed}")
        if row["id"] in rows:
            repeated.add(row["id"])
        rows[row["id"]] = row
    if repeated:
        fail(f"{path} has more than one row for {list_ids(repeated)}: leave one of each")
    if not rows:
        fail(f"{path} is empty: there is nothing to score")
    return rows


def questions(annotations, queries=None):
    """AMBER's annotations.json and, for a part of the questions, a query file -> {id: row} with `kind`, `truth` ("yes"
    or "no") and, of the query file, `query` and `image`. Raises SystemExit where one of them is another file."""
    found, needed = {}, "needed is AMBER's own annotations.json"
    for number, row in read(annotations, ["type"], needed).items():
        if row["type"] == "generative":
            continue
        if row["type"] not in TYPES or row.get("truth") not in ("yes", "no"):
            fail(f"{annotations}, id {number}: type {row['type']!r}, truth {row.get('truth')!r}; {needed}")
        found[number] = {"kind": TYPES[row["type"]], "truth": row["truth"]}
    if not found:
        fail(f"{annotations} has no question of the discriminative task; {needed}")
    if queries is None:
        return found
    needed = "needed is one of AMBER's query_discriminative files"
    asked = read(queries, ["query"], needed)
    strange = asked.keys() - found.keys()
    if strange:
        fail(
            f"{queries} asks {len(strange)} questions to which {annotations} has no yes or no: "
            f"{list_ids(strange)}; {needed}"
        )
    return {
        number: {**found[number], "query": row["query"], "image": str(row.get("image", ""))}
        for number, row in asked.items()
    }


def answers(path, asked, answered_only=False):
    """A predictions file -> {id: {"answer", "question": as it was asked, where the file says}}, for the ids in
    `asked`. Raises SystemExit for other ids and, unless only what is answered counts, for ids that are missing."""
    needed = 'needed is what tools/generate.py writes, or a list of {"id": 1005, "response": "No"}'
    rows = read(path, ["prediction", "response"], needed)
    strange = rows.keys() - asked.keys()
    if strange:
        fail(
            f"{path} answers {len(strange)} questions that are not asked: {list_ids(strange)}; scored are yes-or-no "
            "questions (from 1005 on), those of --questions where it is given"
        )
    missing = asked.keys() - rows.keys()
    if missing and not answered_only:
        fail(
            f"{path} lacks answers to {len(missing)} of {len(asked)} questions: {list_ids(missing)}; answer them, or "
            "name the query file that was asked (--questions), or score what there is: --answered_only"
        )
    return {
        number: {"answer": row.get("prediction", row.get("response")), "question": str(row.get("question", ""))}
        for number, row in rows.items()
    }


# -------------------------------------------------------------------------------------------------------------- scores


def exact(answer):
    """An answer -> "yes", "no" or None, as AMBER reads it."""
    return {"Yes": "yes", "No": "no"}.get(answer)


def first_word(answer):
    """An answer -> "yes", "no" or None. It is one of the two if that is its first word, in any case, and the other one
    is nowhere in it. After the word must come the end of the line, one of . , ; : ! … or a dash, or a word with which
    a sentence about the picture begins (there, it, the, ...: all are in AFTER). "No, there is not." and "No it isn't"
    are "no"; "No dog", "No-one", "No. 5" and "Maybe no" are None. Read in unicodedata.normalize("NFC")."""
    text = unicodedata.normalize("NFC", answer).lower()  # an o and its accent apart would end the word no
    words = WORD.findall(text)
    if not words or words[0] not in OPPOSITE:
        return None
    first = words[0]
    rest = text.split(first, 1)[1]
    is_number = first == "no" and NUMBER.match(rest)
    if OPPOSITE[first] in words or is_number or not AFTER.match(rest):
        return None
    return first


READINGS = {"exact": exact, "first_word": first_word}


def measure(rows, kind="all"):
    """Scores of one kind, of [(kind, truth, answer)], truth "yes" or "no", answer one of them or None -> questions (a
    count), accuracy, precision, recall, f1 (percent, rounded to 0.1). Source: AMBER's inference.py."""
    rows = [(truth, answer) for row_kind, truth, answer in rows if row_kind in KINDS[kind]]
    little = 0.003 if kind == "attribute" else 0.001  # added to denominators

    def percent(part, whole):
        return round(part / (whole + little) * 100, 1)

    right = sum(truth == answer for truth, answer in rows)
    rightly_denied = rows.count(("no", "no"))
    precision = percent(rightly_denied, sum(answer == "no" for _, answer in rows))
    recall = percent(rightly_denied, sum(truth == "no" for truth, _ in rows))
    p, r = precision / 100, recall / 100
    f1 = round(2 * p * r / (p + r + (0.001 if kind == "existence" else 0.0001)) * 100, 1)
    accuracy = percent(right, len(rows))
    return {"questions": len(rows), "accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}


def score(asked, given, reading):
    """Questions {id: row} and answers {id: {"answer"}} -> {"yes", "no", "neither": how often it was answered,
    "scores": {kind: ...}} with the kinds that are asked about."""
    rows = [(row["kind"], row["truth"], reading(given[number]["answer"])) for number, row in asked.items()]
    counts = Counter(answer for *_, answer in rows)
    present = {kind for kind, *_ in rows}
    scores = {kind: measure(rows, kind) for kind, parts in KINDS.items() if present.intersection(parts)}
    return {"yes": counts["yes"], "no": counts["no"], "neither": counts[None], "scores": scores}


def changes(asked, given, reading):
    """How many answers became right, and how many wrong, from `before` to `after`."""
    right = {
        name: {number for number in asked if reading(own[number]["answer"]) == asked[number]["truth"]}
        for name, own in given.items()
    }
    return {"to_right": len(right["after"] - right["before"]), "to_wrong": len(right["before"] - right["after"])}


# -------------------------------------------------------------------------------------------------------------- report


def print_worst(asked, given, reading, most):
    """The first `most` (-1: all) of the wrong answers: those that are neither yes nor no first, then the kinds by
    turns."""
    wrong, seen = [], Counter()
    for number, row in sorted(asked.items()):
        answer = reading(given["after"][number]["answer"])
        if answer != row["truth"]:
            wrong.append((answer is not None, seen[row["kind"]], row["kind"], number))
            seen[row["kind"]] += 1
    wrong = [number for *_, number in sorted(wrong)]
    if most >= 0:
        wrong = wrong[:most]
    if not wrong:
        return
    has_images = any(asked[number].get("image") for number in wrong)  # they are in a query file
    columns = ["kind", "id", *(["image"] if has_images else []), "question", "right"]
    columns += ["answer"] if len(given) == 1 else given.keys()
    table = text_table(*columns, left=len(columns), longest_cell=48)
    for number in wrong:
        row = asked[number]
        cells = [row["kind"], str(number)]
        if has_images:
            cells.append(row["image"])
        cells += [row.get("query", given["after"][number]["question"]), row["truth"]]
        cells += [own[number]["answer"] for own in given.values()]
        table.add_row(*(" ".join(cell.split()) for cell in cells))
    print_table(table)
    print()


def print_kinds(found):
    """[{kind: scores}] of one file, or of the one before and the one after, as a table of the kinds."""
    table = text_table("kind", "questions", *METRICS.values())
    for kind, scores in found[0].items():
        cells = [" -> ".join(str(own[kind][metric]) for own in found) for metric in METRICS]
        label = f"  {kind}" if kind in ATTRIBUTES else kind
        table.add_row(label, str(scores["questions"]), *cells)
    print_table(table)
    print()


def print_files(files, found, always_no, num_questions, is_full):
    """Both readings of each file, always answering no, and the published values, as a table."""
    table = text_table(f"{num_questions} questions", "accuracy", "F1", "neither", "No in %")
    named = {f"{path}: {READ_BY[way]}": found[name][way] for name, path in files.items() for way in READINGS}
    named['always "No"'] = always_no
    for name, own in named.items():
        scores = own["scores"]["all"]
        share = f"{own['no'] / num_questions * 100:.1f}"
        table.add_row(name, str(scores["accuracy"]), str(scores["f1"]), str(own["neither"]), share)
    if is_full:
        for name, scores in PUBLISHED.items():
            table.add_row(f"published: {name}", str(scores["accuracy"]), str(scores["f1"]))
    print_table(table)
    print()


def parse(argv=None):
    """-> the arguments. Raises SystemExit."""
    parser = flag_parser(__doc__)
    parser.add_argument(
        "predictions", type=Path, metavar="PREDICTIONS", help="what tools/generate.py wrote, or AMBER's own form"
    )
    parser.add_argument("--annotations", type=Path, required=True, help="AMBER's annotations.json")
    parser.add_argument(
        "--questions", type=Path, help="the query file that was asked (default: every question of the annotations)"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="BEFORE", help="answers of another model to the same questions, shown beside"
    )
    parser.add_argument(
        "--first_word",
        action="store_true",
        help="read an answer by its first word, as said above; AMBER's own way is exact",
    )
    parser.add_argument(
        "--answered_only",
        action="store_true",
        help="score the questions that are answered (with --compare: in both files)",
    )
    parser.add_argument("--worst", type=int, default=20, help="show so many wrong answers (default 20; -1: all)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead: both readings, every score"
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Parse, score, print."""
    args = parse(argv)
    asked = questions(args.annotations, args.questions)
    files = {"before": args.compare} if args.compare else {}
    files["after"] = args.predictions
    given = {name: answers(path, asked, args.answered_only) for name, path in files.items()}
    missing = {number for number in asked if any(number not in own for own in given.values())}
    asked = {number: row for number, row in asked.items() if number not in missing}
    if not asked:
        fail(f"{args.predictions} and {args.compare} answer no question in common")
    is_full = Counter((row["kind"], row["truth"]) for row in asked.values()) == FULL
    way = "first_word" if args.first_word else "exact"
    found = {name: {key: score(asked, own, READINGS[key]) for key in READINGS} for name, own in given.items()}
    always_no = score(asked, dict.fromkeys(asked, {"answer": "No"}), exact)
    changed = changes(asked, given, READINGS[way]) if args.compare else None
    if args.json:
        report = {"questions": len(asked), "left_out": len(missing), "full": is_full, "reading": way, **found}
        report |= {"changed": changed, "always_no": always_no, "published": PUBLISHED if is_full else None}
        print(json.dumps(report, indent=1))
        return
    print_worst(asked, given, READINGS[way], args.worst)
    print_kinds([own[way]["scores"] for own in found.values()])
    print_files(files, found, always_no, len(asked), is_full)
    whose = "." if args.first_word else ", as AMBER reads answers (otherwise: --first_word)."
    print(f"Each kind: {'before -> after, ' if changed else ''}{READ_BY[way]}{whose}")
    if changed:
        print(f"{changed['to_right']} answers became right, {changed['to_wrong']} wrong.")
    if missing:
        print(f"{len(missing)} questions are not answered and left out.")
    if not is_full:
        total = sum(FULL.values())
        others = "these are not they" if len(asked) == total else f"not of these {len(asked)}"
        print(f"Published values are of AMBER's {total} questions, {others}: they are not shown.")


if __name__ == "__main__":
    start(main)
