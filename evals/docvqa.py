"""Score answers to questions about documents: ANLS and exact match, and where it goes wrong.

    python evals/docvqa.py after.jsonl                   # both scores, and the 20 worst answers
    python evals/docvqa.py after.jsonl --worst 0 --csv table.csv     # the scores alone; every question into a table

A line of the file has `prediction` and `reference`, a text or a list of accepted ones, as tools/generate.py writes it.

ANLS, Average Normalized Levenshtein Similarity (Biten et al. 2019, arXiv:1905.13648), as the DocVQA challenge scores
it: of prediction and accepted answer, both in lower case with single spaces, the Levenshtein distance is divided by
the length of the longer one as it was given. The score of a question is 1 minus the smallest such share over its
accepted answers, and 0 where that is below 0.5; ANLS is the mean over the questions. Exact match: equal to an accepted
answer, case and spaces aside.

An é may be one character, or two: an e and an accent. Prediction and accepted answers are put into the form with one,
unicodedata.normalize("NFC"), before any distance or length is taken. Texts in ASCII stay as they are.
"""

import csv
import json
import statistics
import sys
import unicodedata
from pathlib import Path

from rapidfuzz.distance import Levenshtein

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.program import fail, flag_parser, print_table, start, text_table  # noqa: E402

COLUMNS = ["ANLS", "exact", "id", "question", "prediction", "accepted"]


def plain(text):
    """Lower case, single spaces, unicodedata.normalize("NFC"): what answers are compared by."""
    # the accent comes last: ǰ is one character, its capital J̌ is always two
    return unicodedata.normalize("NFC", " ".join(text.lower().split()))


def anls(prediction, references):
    """The score of one question, 0 to 1, from the model's answer and the list of accepted ones (Biten et al. 2019).
    Lengths are counted in unicodedata.normalize("NFC"). Raises ValueError where an accepted answer is blank or there
    is none."""
    if not references or not all(reference.strip() for reference in references):
        raise ValueError(f"accepted answers {references!r}: at least one is needed, and none may be blank")
    prediction = unicodedata.normalize("NFC", prediction)
    shares = []
    for reference in references:
        reference = unicodedata.normalize("NFC", reference)
        distance = Levenshtein.distance(plain(prediction), plain(reference))
        shares.append(distance / max(len(prediction), len(reference)))
    smallest = min(shares)
    return 1 - smallest if smallest <= 0.5 else 0.0


def score_row(row):
    """A line of a predictions file -> it, with `references` (a list), `anls` and `exact_match` (0 or 1). Raises
    ValueError, KeyError or TypeError where it cannot be scored."""
    json.dumps(row, ensure_ascii=False).encode()  # half a character could not be printed
    prediction, references = row["prediction"], row["reference"]
    if isinstance(references, str):
        references = [references]
    if not isinstance(references, list) or not all(isinstance(text, str) for text in [prediction, *references]):
        raise ValueError(
            f"prediction {prediction!r} must be a text, reference {row['reference']!r} a text or a list of texts"
        )
    is_exact = plain(prediction) in [plain(reference) for reference in references]
    scores = {"anls": anls(prediction, references), "exact_match": int(is_exact)}
    return {**row, "references": references, **scores}


def score(path):
    """A predictions file -> its scored lines, the worst first. Raises SystemExit for a line that cannot be scored."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as e:
        fail(f"cannot read {path}: {e}")
    scored = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            scored.append(score_row(json.loads(line)))
        except (ValueError, KeyError, TypeError) as e:
            cause = f"no {e}" if isinstance(e, KeyError) else e
            fail(f"{path}, line {number}: {cause}; tools/generate.py shows the form")
    if not scored:
        fail(f"{path} is empty: there is nothing to score")
    return sorted(scored, key=lambda row: row["anls"])


def cells_of(row):
    """A scored line -> what stands in the table, a text for each of COLUMNS."""
    number = row.get("id")
    if number is None:
        number = row.get("row", "")
    cells = [f"{row['anls']:.3f}", row["exact_match"], number, row.get("question", ""), row["prediction"]]
    return [*map(str, cells), " / ".join(row["references"])]


def main(argv=None):
    """Parse, score, print, write."""
    parser = flag_parser(__doc__)
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS.jsonl", help="what tools/generate.py wrote")
    parser.add_argument(
        "--worst", type=int, default=20, help="show so many questions, the worst first (default 20; -1: all)"
    )
    parser.add_argument("--csv", type=Path, help="write every question, the worst first, into this table")
    parser.add_argument("--overwrite", action="store_true", help="replace CSV where it exists")
    args = parser.parse_args(argv)
    if args.csv and args.csv.exists() and not args.overwrite:
        fail(f"{args.csv} exists: choose another --csv, or --overwrite it")
    rows = score(args.predictions)
    lines = [cells_of(row) for row in rows]
    if args.csv:
        try:
            with open(args.csv, "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *lines])
        except OSError as e:
            fail(f"cannot write {args.csv}: {e}")
    shown = lines[: args.worst] if args.worst >= 0 else lines
    if shown:
        table = text_table(*COLUMNS, left=len(COLUMNS), longest_cell=40)
        for line in shown:
            table.add_row(*(" ".join(cell.split()) for cell in line))
        print_table(table)
        print()
    means = [statistics.fmean(row[name] for row in rows) for name in ("anls", "exact_match")]
    summary = [f"ANLS {means[0]:.4f}", f"exact match {means[1]:.4f}", f"questions {len(rows)}"]
    if args.csv:
        summary.append(f"table: {args.csv}")
    print("   ".join(summary))


if __name__ == "__main__":
    start(main)
