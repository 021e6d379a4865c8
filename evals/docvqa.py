"""Score answers to questions about documents: ANLS and exact match, and where it goes wrong.

    python evals/docvqa.py after.jsonl                   # both scores, and the 20 worst answers
    python evals/docvqa.py after.jsonl --worst 0 --csv table.csv     # the scores alone; every question into a table

A line of the file has `prediction` and `reference`, a text or a list of accepted ones, as tools/generate.py writes it.

ANLS, Average Normalized Levenshtein Similarity (Biten et al. 2019, arXiv:1905.13648), as the DocVQA challenge scores it: of
prediction and accepted answer, both in lower case with single spaces, the Levenshtein distance is divided by the length of the
longer one as it was given. The score of a question is 1 minus the smallest such share over its accepted answers, and 0 where
that is below 0.5; ANLS is the mean over the questions. Exact match: equal to an accepted answer, case and spaces aside.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from rapidfuzz.distance import Levenshtein


def fail(message):
    """End the program with one message and exit status 1."""
    sys.exit(f"error: {message}")


def plain(text):
    """Lower case, single spaces: what answers are compared by."""
    return " ".join(text.lower().split())


def anls(prediction, references):
    """The score of one question, 0 to 1, from the model's answer and the list of accepted ones. Raises ValueError where an
    accepted answer is blank or there is none."""
    if not references or not all(reference.strip() for reference in references):
        raise ValueError(f"accepted answers {references!r}: at least one is needed, and none may be blank")
    distance = min(
        Levenshtein.distance(plain(prediction), plain(r)) / max(len(prediction), len(r)) for r in references
    )
    return 1 - distance if distance <= 0.5 else 0.0


def score(path):
    """A predictions file -> its lines as dicts, each with `references` (a list), `anls` and `exact_match` (0 or 1), worst first.
    Raises SystemExit for a line that cannot be scored."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as e:
        fail(f"cannot read {path}: {e}")
    scored = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a character could not be printed
            references = [row["reference"]] if isinstance(row["reference"], str) else row["reference"]
            if not isinstance(references, list) or not all(
                isinstance(said, str) for said in [row["prediction"], *references]
            ):
                raise ValueError(
                    f"prediction {row['prediction']!r} must be a text, reference {row['reference']!r} a text or a list of texts"
                )
            exact = plain(row["prediction"]) in [plain(reference) for reference in references]
            scored.append(
                {
                    **row,
                    "references": references,
                    "anls": anls(row["prediction"], references),
                    "exact_match": int(exact),
                }
            )
        except (ValueError, KeyError, TypeError) as e:
            fail(
                f"{path}, line {number}: {f'no {e}' if isinstance(e, KeyError) else e}; tools/generate.py shows the form"
            )
    if not scored:
        fail(f"{path} is empty: there is nothing to score")
    return sorted(scored, key=lambda row: row["anls"])


def main(argv=None):
    """Parse, score, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS.jsonl", help="what tools/generate.py wrote")
    parser.add_argument(
        "--worst", type=int, default=20, help="show so many questions, the worst first (default 20; -1: all)"
    )
    parser.add_argument("--csv", type=Path, help="write every question, the worst first, into this table")
    parser.add_argument("--overwrite", action="store_true", help="replace CSV where it exists")
    parser.error = fail
    args = parser.parse_args(argv)
    if args.csv and args.csv.exists() and not args.overwrite:
        fail(f"{args.csv} exists: choose another --csv, or --overwrite it")
    rows = score(args.predictions)
    table = [
        [
            f"{row['anls']:.3f}",
            str(row["exact_match"]),
            str(row.get("id") if row.get("id") is not None else row.get("row", "")),
            str(row.get("question", "")),
            row["prediction"],
            " / ".join(row["references"]),
        ]
        for row in rows
    ]
    names = ["ANLS", "exact", "id", "question", "prediction", "accepted"]
    if args.csv:
        try:
            with open(args.csv, "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([names, *table])
        except OSError as e:
            fail(f"cannot write {args.csv}: {e}")
    shown = [[" ".join(cell.split()) for cell in line] for line in table[: args.worst if args.worst >= 0 else None]]
    if shown:
        shown = [[cell if len(cell) <= 40 else cell[:39] + "…" for cell in line] for line in [names, *shown]]
        widths = [max(map(len, column)) for column in zip(*shown)]
        print(
            "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in shown),
            end="\n\n",
        )
    print(
        f"ANLS {sum(row['anls'] for row in rows) / len(rows):.4f}   exact match {sum(row['exact_match'] for row in rows) / len(rows):.4f}   "
        f"questions {len(rows)}" + (f"   table: {args.csv}" if args.csv else "")
    )


if __name__ == "__main__":
    main()
