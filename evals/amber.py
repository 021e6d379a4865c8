"""Score yes-or-no answers about what a picture does not show: the discriminative task of AMBER, and where they go wrong.

    git clone https://github.com/junyangwang0410/AMBER     # questions and annotations; its README links the 1,004 pictures
    python tools/generate.py RUN --dataset_name AMBER/data/query/query_discriminative.json --image_folder image \\
        --question_column query --append "Please answer yes or no." --max_new_tokens 8 --output after.jsonl
    python evals/amber.py after.jsonl --annotations AMBER/data/annotations.json --compare before.jsonl

Answers are lines of tools/generate.py (`id`, `prediction`) or AMBER's own list of {"id", "response"}. `--questions
query_discriminative-relation.json` scores answers to a part of the questions, `--answered_only` any answers there are.

AMBER (Wang et al. 2023, arXiv:2311.07397) asks 14,216 questions about existence (4,924, the right answer is always no), attributes
(7,628: state, number, action) and relations (1,664); to 9,427 of all, 66.3 %, the right answer is no. Scores are those of its
inference.py, commit 534babf:

- accuracy: right answers / questions. What is neither "Yes" nor "No" is wrong.
- "No" is the positive class: precision = right "No" / answered "No", recall = right "No" / questions whose right answer is no.
- Denominators start at 0.001 (at 0.003 for the attributes together, three counts of 0.001 each): no answer "No" gives 0, no error.
- All three in percent, rounded to 0.1. Of these rounded values F1 = 2PR / (P + R + c) as shares of 1, in percent, rounded to 0.1; c is
  0.0001, but 0.001 for existence.
- Answers must be exactly "Yes" or "No". "No." and "no, there is not" count as neither: how many, is printed, and the scores beside
  that come of taking an answer by its first word, in any case (`--first_word` makes them the table).

Always answering "No" gives 66.3 accuracy and 79.7 F1. A model that learns to deny more gains recall and, up to a point, F1: look
at precision and at how often it says No, too. Published values are of the post on DPO for vision-language models
(huggingface.co/blog/dpo_vlm, 2024); they are shown where the questions are all 14,216.
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

TYPES = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}  # fmt: skip  (the latter where the right answer is no)
ATTRIBUTES = ("state", "number", "action")
KINDS = {"all": tuple(sorted(set(TYPES.values()))), "existence": ("existence",), "attribute": ATTRIBUTES,
         **{kind: (kind,) for kind in ATTRIBUTES}, "relation": ("relation",)}  # fmt: skip
FULL = {("existence", "no"): 4924, ("state", "yes"): 2382, ("state", "no"): 2382, ("number", "yes"): 1036, ("number", "no"): 1036,
        ("action", "yes"): 396, ("action", "no"): 396, ("relation", "yes"): 975, ("relation", "no"): 689}  # fmt: skip
PUBLISHED = {"Idefics2": {"accuracy": 85.8, "f1": 89.1}, "Idefics2 + DPO": {"accuracy": 85.9, "f1": 89.4}}


def fail(message):
    """End the program with one message and exit status 1."""
    sys.exit(f"error: {message}")


def some(ids):
    """Ids -> text: how the first ten are named in a message."""
    ids = sorted(ids)
    return f"id{'s' * (len(ids) > 1)} {', '.join(map(str, ids[:10]))}" + (
        f" and {len(ids) - 10} more" if len(ids) > 10 else ""
    )


def read(path, names, needed):
    """A .json list or a .jsonl file -> {id: row}, each row a dict with a whole number as `id` and a text under one of the names.
    Raises SystemExit where it is not so, with the row and what is `needed`, and for an id that comes twice."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        listed = text.lstrip().startswith("[")
        lines = json.loads(text) if listed else [line for line in enumerate(text.split("\n"), 1) if line[1].strip()]
    except (OSError, ValueError) as e:
        fail(f"cannot read {path}: {e}")
    rows, twice = {}, set()
    for number, line in enumerate(lines) if listed else lines:
        try:
            row = line if listed else json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a character could not be printed
            if type(row["id"]) is not int:  # True is an int, too
                raise ValueError(f"id {row['id']!r} must be a whole number, as in AMBER's query files")
            if not (there := [name for name in names if name in row]):
                raise ValueError(f"no {' or '.join(names)}")
            if not isinstance(row[there[0]], str):
                raise ValueError(f"{there[0]} {row[there[0]]!r} must be a text")
        except (ValueError, KeyError, TypeError) as e:
            what = (
                "no id"
                if isinstance(e, KeyError)
                else e
                if isinstance(e, ValueError)
                else f"{row!r} is no row in braces"
            )
            fail(f"{path}, {f'row {number} (they count from 0)' if listed else f'line {number}'}: {what}; {needed}")
        twice |= {row["id"]} & rows.keys()
        rows[row["id"]] = row
    if twice:
        fail(f"{path} has more than one row for {some(twice)}: leave one of each")
    return rows if rows else fail(f"{path} is empty: there is nothing to score")


def questions(annotations, queries=None):
    """AMBER's annotations.json and, for a part of the questions, a query file -> {id: row} with `kind`, `truth` ("yes" or "no")
    and, of the query file, `query` and `image`. Raises SystemExit where one of them is another file."""
    found, own = {}, "needed is AMBER's own annotations.json"
    for number, row in read(annotations, ["type"], own).items():
        if row["type"] == "generative":
            continue
        if row["type"] not in TYPES or row.get("truth") not in ("yes", "no"):
            fail(f"{annotations}, id {number}: type {row['type']!r}, truth {row.get('truth')!r}; {own}")
        found[number] = {"kind": TYPES[row["type"]], "truth": row["truth"]}
    if queries is not None:
        one = "needed is one of AMBER's query_discriminative files"
        asked = read(queries, ["query"], one)
        if strange := asked.keys() - found.keys():
            fail(
                f"{queries} asks {len(strange)} questions to which {annotations} has no yes or no: {some(strange)}; {one}"
            )
        found = {
            number: {**found[number], "query": row["query"], "image": str(row.get("image", ""))}
            for number, row in asked.items()
        }
    return found or fail(f"{annotations} has no question of the discriminative task; {own}")


def answers(path, asked, answered_only=False):
    """A predictions file -> {id: {"said": the answer, "question": as it was asked, where the file says}}, for the ids in `asked`.
    Raises SystemExit for other ids and, unless only what is answered counts, for ids that are missing."""
    rows = read(
        path,
        ["prediction", "response"],
        'needed is what tools/generate.py writes, or a list of {"id": 1005, "response": "No"}',
    )
    if strange := rows.keys() - asked.keys():
        fail(f"{path} answers {len(strange)} questions that are not asked: {some(strange)}; scored are yes-or-no questions (from 1005 on), "
             "those of --questions where it is given")  # fmt: skip
    if (missing := asked.keys() - rows.keys()) and not answered_only:
        fail(f"{path} lacks answers to {len(missing)} of {len(asked)} questions: {some(missing)}; answer them, or name the query file "
             "that was asked (--questions), or score what there is: --answered_only")  # fmt: skip
    return {
        n: {"said": row.get("prediction", row.get("response")), "question": str(row.get("question", ""))}
        for n, row in rows.items()
    }


def exact(said):
    """An answer -> "yes", "no" or None, as AMBER reads it."""
    return {"Yes": "yes", "No": "no"}.get(said)


def first_word(said):
    """An answer -> "yes", "no" or None, by its first word: "No, there is not." is "no", "Not at all" and "Maybe no" are None."""
    found = re.match(r"\W*(yes|no)\b", said, re.IGNORECASE)
    return found and found[1].lower()


def measure(rows, kind="all"):
    """Scores of one kind, of [(kind, truth, said)], truth "yes" or "no", said one of them or None -> questions (a count),
    accuracy, precision, recall, f1 (percent, rounded to 0.1). Source: AMBER's inference.py."""
    rows = [(truth, said) for own, truth, said in rows if own in KINDS[kind]]
    start = 0.003 if kind == "attribute" else 0.001
    share = lambda part, whole: round(part / (whole + start) * 100, 1)
    denied = sum(said == "no" for _, said in rows)
    rightly = sum(truth == said == "no" for truth, said in rows)
    precision, recall = share(rightly, denied), share(rightly, sum(truth == "no" for truth, _ in rows))
    p, r = precision / 100, recall / 100
    f1 = round(2 * p * r / (p + r + (0.001 if kind == "existence" else 0.0001)) * 100, 1)
    return {"questions": len(rows), "accuracy": share(sum(truth == said for truth, said in rows), len(rows)),
            "precision": precision, "recall": recall, "f1": f1}  # fmt: skip


METRICS = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1"}
READINGS = {"exact": exact, "first_word": first_word}
WORDS = {"exact": "exactly Yes or No", "first_word": "by the first word"}


def score(asked, given, reading):
    """Questions {id: row} and answers {id: {"said"}} -> {"yes", "no", "neither": how often it was answered, "scores": {kind: ...}}
    with the kinds that are asked about."""
    rows = [(row["kind"], row["truth"], reading(given[n]["said"])) for n, row in asked.items()]
    counts, present = Counter(said for *_, said in rows), {kind for kind, *_ in rows}
    scores = {kind: measure(rows, kind) for kind, own in KINDS.items() if present & set(own)}
    return {"yes": counts["yes"], "no": counts["no"], "neither": counts[None], "scores": scores}


def columns(lines, left=1):
    """Lines of cells -> text, the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = (
        [cell.ljust(w) if n < left else cell.rjust(w) for n, (cell, w) in enumerate(zip(line, widths))]
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def by_kind(found):
    """[{kind: scores}] of one file, or of the one before and the one after -> a table of the kinds."""
    lines = [["kind", "questions", *METRICS.values()]]
    for kind, scores in found[0].items():
        cells = [" -> ".join(str(own[kind][metric]) for own in found) for metric in METRICS]
        lines.append(["  " * (kind in ATTRIBUTES) + kind, str(scores["questions"]), *cells])
    return columns(lines)


def worst(asked, given, reading, most):
    """The first `most` (-1: all) of the wrong answers, as text: those that are neither yes nor no first, then the kinds by turns."""
    wrong, seen = [], Counter()
    for n, row in sorted(asked.items()):
        if (read := reading(given["after"][n]["said"])) != row["truth"]:
            wrong.append((read is not None, seen[row["kind"]], row["kind"], n))
            seen[row["kind"]] += 1
    lines = [["kind", "id", "image", "question", "right", *(given if len(given) > 1 else ["answer"])]]
    for *_, n in sorted(wrong)[: most if most >= 0 else None]:
        row, said = asked[n], [own[n]["said"] for own in given.values()]
        cells = [
            row["kind"],
            str(n),
            row.get("image", ""),
            row.get("query", given["after"][n]["question"]),
            row["truth"],
            *said,
        ]
        cells = [" ".join(cell.split()) for cell in cells]
        lines.append([cell if len(cell) <= 48 else cell[:47] + "…" for cell in cells])
    keep = [
        n for n, column in enumerate(zip(*lines[1:])) if n > 3 or any(column)
    ]  # without a query file there is no image
    return columns([[line[n] for n in keep] for line in lines], left=len(keep)) if wrong else ""


def main(argv=None):
    """Parse, score, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
        help="read an answer by its first word, in any case; AMBER's own way is exact",
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
    parser.error = fail
    args = parser.parse_args(argv)
    asked = questions(args.annotations, args.questions)
    files = {"before": args.compare} if args.compare else {}
    files["after"] = args.predictions
    given = {name: answers(path, asked, args.answered_only) for name, path in files.items()}
    missing = {n for n in asked if any(n not in own for own in given.values())}
    asked = {n: row for n, row in asked.items() if n not in missing}
    if not asked:
        fail(f"{args.predictions} and {args.compare} answer no question in common")
    full = Counter((row["kind"], row["truth"]) for row in asked.values()) == FULL
    found = {
        name: {way: score(asked, own, reading) for way, reading in READINGS.items()} for name, own in given.items()
    }
    floor = score(asked, dict.fromkeys(asked, {"said": "No"}), exact)
    way, changed = "first_word" if args.first_word else "exact", None
    if args.compare:
        right = {
            name: {n for n in asked if READINGS[way](own[n]["said"]) == asked[n]["truth"]}
            for name, own in given.items()
        }
        changed = {
            "to_right": len(right["after"] - right["before"]),
            "to_wrong": len(right["before"] - right["after"]),
        }
    if args.json:
        whole = {
            "questions": len(asked),
            "left_out": len(missing),
            "full": full,
            "reading": way,
            **found,
            "changed": changed,
        }
        return print(json.dumps({**whole, "always_no": floor, "published": PUBLISHED if full else None}, indent=1))
    if args.worst and (shown := worst(asked, given, READINGS[way], args.worst)):
        print(shown, end="\n\n")
    print(by_kind([own[way]["scores"] for own in found.values()]), end="\n\n")
    lines = [[f"{len(asked)} questions", "accuracy", "F1", "neither", "No in %"]]
    named = [(f"{path}: {WORDS[way]}", found[name][way]) for name, path in files.items() for way in READINGS]
    for name, own in [*named, ('always "No"', floor)]:
        scores = own["scores"]["all"]
        lines.append(
            [
                name,
                str(scores["accuracy"]),
                str(scores["f1"]),
                str(own["neither"]),
                f"{own['no'] / len(asked) * 100:.1f}",
            ]
        )
    lines += [
        [f"published: {name}", str(own["accuracy"]), str(own["f1"]), "", ""] for name, own in PUBLISHED.items() if full
    ]
    print(columns(lines), end="\n\n")
    whose = "." if args.first_word else ", as AMBER reads answers (otherwise: --first_word)."
    print(f"Each kind: {'before -> after, ' if changed else ''}{WORDS[way]}{whose}")
    if changed:
        print(f"{changed['to_right']} answers became right, {changed['to_wrong']} wrong.")
    if missing:
        print(f"{len(missing)} questions are not answered and left out.")
    if not full:
        others = "these are not they" if len(asked) == sum(FULL.values()) else f"not of these {len(asked)}"
        print(f"Published values are of AMBER's {sum(FULL.values())} questions, {others}: they are not shown.")


if __name__ == "__main__":
    main()
