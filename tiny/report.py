"""What a demo shows at its end: scores by kind of question, before and after."""

import json
from pathlib import Path

from . import forms, llava, minicpm, preferences


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def score(path: Path) -> dict[str, tuple[int, int]]:
    """{kind: (right, asked)} of a predictions file. "held out" sums up the single questions on one picture; questions
    from conversations of several turns count as a kind of their own. Right is a prediction equal to the reference."""
    said = lines(path)
    turns = {line["row"]: line["turn"] + 1 for line in said}  # the last line of a row has its last turn
    several = {row for row, count in turns.items() if count > 1}
    kinds = [
        "several turns" if line["row"] in several else llava.kind(line["question"], line["images"]) for line in said
    ]
    return exact(said, kinds, llava.ONE_PICTURE)


def exact(said: list[dict], kinds: list[str], single: list[str]) -> dict[str, tuple[int, int]]:
    """{kind: (right, asked)} of predictions and the kind of each, and of those of a kind in `single` together as "held
    out"."""
    counts: dict[str, tuple[int, int]] = {}
    for line, kind in zip(said, kinds, strict=True):
        for name in [kind, "held out"] if kind in single else [kind]:
            right, asked = counts.get(name, (0, 0))
            counts[name] = right + (line["prediction"].strip() == line["reference"].strip()), asked + 1
    return counts


def score_forms(path: Path) -> dict[str, tuple[float, float, int]]:
    """{kind: (ANLS, exact match, asked)} of a predictions file about `forms`, as evals/docvqa.py scores them."""
    from evals import docvqa

    rows = docvqa.score(path)
    kinds = {kind: [row for row in rows if forms.kind(row["id"]) == kind] for kind in forms.KINDS}
    means = {
        kind: [sum(row[name] for row in some) for name in ("anls", "exact_match")] for kind, some in kinds.items()
    }
    return {kind: (*(total / len(some) for total in means[kind]), len(some)) for kind, some in kinds.items() if some}


def score_preferences(path: Path) -> dict[str, tuple[int, int, int]]:
    """{kind: (right, readable, asked)} of a predictions file about `preferences`, "all" being all of them; right and
    readable are what `preferences.judge` says. The kind is read off the question: the public schema has no ids."""
    counts: dict[str, list[int]] = {}
    for line in lines(path):
        question = line["question"].strip()
        is_right, is_readable = preferences.judge(question, line["reference"].strip(), line["prediction"].strip())
        for name in (preferences.KIND[question], "all"):
            right, readable, asked = counts.get(name, (0, 0, 0))
            counts[name] = right + is_right, readable + is_readable, asked + 1
    return {kind: counts[kind] for kind in [*preferences.QUESTIONS, "all"] if kind in counts}


def score_conversations(path: Path) -> dict[str, tuple[int, int]]:
    """{kind: (right, asked)} of a predictions file about `minicpm`'s conversations, the kind being read off the row's
    id; "held out" sums up the single questions on one picture. Right is a prediction equal to the reference."""
    said = lines(path)
    return exact(said, [minicpm.kind(line["id"]) for line in said], minicpm.ONE_PICTURE)


def score_two_stage(run: Path, when: str) -> dict[str, tuple[int, int]]:
    """{kind: (right, asked)} of a two-stage run "before" or "after": its captions, of stage 1, and its questions, of
    stage 2."""
    said = lines(run / f"captions-{when}.jsonl")
    return exact(said, ["captions"] * len(said), []) | score(run / f"{when}.jsonl")


DIGITS = {kind: llava.QUESTIONS[kind][0] for kind in llava.ONE_PICTURE}  # kind -> its title
DIGITS |= {"held out": "all of these", "several turns": "several turns on one picture"}
DIGITS |= {"two pictures": "two pictures at once", "text only": "no picture"}


def report_digits(run: Path) -> dict[str, tuple[float, float]]:
    """Print the table of a run on questions about digits. Returns {kind: (before, after)}: exact match."""
    return report_exact(score(run / "before.jsonl"), score(run / "after.jsonl"), DIGITS)


def report_two_stage(run: Path) -> dict[str, tuple[float, float]]:
    """Print the table of a two-stage run, of stage 2's folder. Returns {kind: (before, after)}: exact match."""
    names = {"captions": "captions, stage 1"} | DIGITS
    shares = report_exact(score_two_stage(run, "before"), score_two_stage(run, "after"), names)
    print("captions: before and after stage 1, the projector alone; questions: before and after stage 2")
    return shares


def report_conversations(run: Path) -> dict[str, tuple[float, float]]:
    """Print the table of a run on conversations about digits. Returns {kind: (before, after)}: exact match."""
    single = {kind: minicpm.KINDS[kind] for kind in minicpm.ONE_PICTURE}
    names = single | {"held out": "all of these"} | minicpm.KINDS
    shares = report_exact(score_conversations(run / "before.jsonl"), score_conversations(run / "after.jsonl"), names)
    if (run / "shuffled.jsonl").exists():
        blind = {kind: right / asked for kind, (right, asked) in score_conversations(run / "shuffled.jsonl").items()}
        found = ", ".join(f"{title} {blind[kind]:.3f}" for kind, title in single.items() if kind in blind)
        print(f"with the picture of another row: {found}")
    return shares


def report_exact(before: dict, after: dict, names: dict[str, str]) -> dict[str, tuple[float, float]]:
    """Print a table of scores {kind: (right, asked)}; `names` are the kinds' titles. Returns {kind: (before, after)}:
    shares."""
    print("\nExact match on pictures that neither the base model nor the fine-tuning has seen")
    print(f"{'question':<32}{'asked':>6}{'before':>9}{'after':>9}")
    shares = {}
    for kind, name in names.items():
        if kind not in after:
            continue
        shares[kind] = before[kind][0] / before[kind][1], after[kind][0] / after[kind][1]
        print(f"{name:<32}{after[kind][1]:>6}{shares[kind][0]:>9.3f}{shares[kind][1]:>9.3f}")
    return shares


def report_forms(run: Path) -> dict[str, tuple[float, float]]:
    """Print the table of a run on questions about forms. Returns {kind: (before, after)}: ANLS."""
    before, after = score_forms(run / "before.jsonl"), score_forms(run / "after.jsonl")
    print("\nForms written with scans of digits that neither the base model nor the fine-tuning has seen")
    print(f"{'':<49}{'ANLS':>14}{'exact match':>18}")
    print(f"{'form':<43}{'asked':>6}{'before':>9}{'after':>9}{'before':>9}{'after':>9}")
    for kind, (anls, exact, asked) in after.items():
        was_anls, was_exact, _ = before[kind]
        print(f"{forms.KINDS[kind]:<43}{asked:>6}{was_anls:>9.3f}{anls:>9.3f}{was_exact:>9.3f}{exact:>9.3f}")
    if "two-fields" in after:
        print("two fields: to read both values right and pick one by chance gives ANLS 0.52, exact match 0.50")
    return {kind: (before[kind][0], after[kind][0]) for kind in after}


def report_preferences(run: Path) -> dict[str, tuple[float, float]]:
    """Print the table of a run on pairs about digits. Returns {kind: (before, after)}: right answers."""
    before, after = score_preferences(run / "before.jsonl"), score_preferences(run / "after.jsonl")
    names = {kind: texts[0].format(a="a seven", parity="odd") for kind, texts in preferences.QUESTIONS.items()}
    print("\nGenerated answers about pictures that neither the base model nor the fine-tuning has seen")
    print(f"{'':<52}{'right':>12}{'readable':>18}")
    print(f"{'question':<46}{'asked':>6}{'before':>9}{'after':>9}{'before':>9}{'after':>9}")
    shares = {}
    for kind, (right, readable, asked) in after.items():
        shares[kind] = before[kind][0] / asked, right / asked
        columns = [*shares[kind], before[kind][1] / asked, readable / asked]
        print(f"{names.get(kind, kind):<46}{asked:>6}" + "".join(f"{share:>9.3f}" for share in columns))
    print("right: what the reference states, in any of its wordings")
    print("readable: one of the sentences that may answer, right or wrong")
    return shares


def report(run: Path) -> dict[str, tuple[float, float]]:
    """Print the table of `run/before.jsonl` and `run/after.jsonl`, whichever recipe wrote them. Returns {kind:
    (before, after)}: exact match of questions about digits, ANLS of questions about forms, right answers where it was
    trained on pairs."""
    first = lines(run / "after.jsonl")[0]
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    if (run / "captions-after.jsonl").exists():
        table = report_two_stage
    elif str(first.get("question")).strip() in preferences.KIND:
        table = report_preferences
    elif str(first["id"]).endswith(tuple(f"-{kind}" for kind in forms.KINDS)):
        table = report_forms
    elif str(first["id"]).endswith(tuple(f"-{kind}" for kind in minicpm.KINDS)):
        table = report_conversations
    else:
        table = report_digits
    shares = table(run)
    print(f"fine-tuning took {next(entry['train_runtime'] for entry in log[::-1] if 'train_runtime' in entry):.0f} s")
    if (run / "samples.md").exists():
        print(f"answers while it trained: {run / 'samples.md'}")
    return shares
