"""What a demo shows at its end: exact match by kind of question, before and after, and the learning curve as a picture."""

import json
from pathlib import Path

from . import llava


def score(path: Path) -> dict[str, tuple[int, int]]:
    """{kind: (right, asked)} of a predictions file. "held out" sums up the single questions on one picture; questions
    from conversations of several turns count as a kind of their own. Right is a prediction equal to the reference."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    turns = {line["row"]: line["turn"] + 1 for line in lines}  # the last line of a row has its last turn
    counts: dict[str, list[int]] = {}
    for line in lines:
        several = turns[line["row"]] > 1
        kind = "several turns" if several else llava.kind(line["question"], line["images"])
        for name in [kind] + ["held out"] * (kind in llava.ONE_PICTURE):
            right, asked = counts.setdefault(name, [0, 0])
            counts[name] = [right + (line["prediction"].strip() == line["reference"].strip()), asked + 1]
    return {kind: tuple(n) for kind, n in counts.items()}


def curves(run: Path, log: list[dict]) -> Path:
    """Draw loss and token accuracy over steps, training and held out, from a log history; -> `run/curves.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, name, title in zip(axes, ("loss", "mean_token_accuracy"), ("loss", "token accuracy"), strict=True):
        for key, label, style in ((name, "training", "-"), (f"eval_{name}", "held out", "o-")):
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            axis.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(run / "curves.png", dpi=110)
    return run / "curves.png"


def report(run: Path) -> dict[str, tuple[float, float]]:
    """Print the table of `run/before.jsonl` and `run/after.jsonl`, draw the curves. Returns {kind: (before, after)}."""
    before, after = score(run / "before.jsonl"), score(run / "after.jsonl")
    names = {kind: llava.QUESTIONS[kind][0] for kind in llava.ONE_PICTURE}
    names |= {"held out": "all of these", "several turns": "several turns on one picture"}
    names |= {"two pictures": "two pictures at once", "text only": "no picture"}
    print("\nExact match on pictures that neither the base model nor the fine-tuning has seen")
    print(f"{'question':<32}{'asked':>6}{'before':>9}{'after':>9}")
    shares = {}
    for kind, name in names.items():
        if kind not in after:
            continue
        shares[kind] = before[kind][0] / before[kind][1], after[kind][0] / after[kind][1]
        print(f"{name:<32}{after[kind][1]:>6}{shares[kind][0]:>9.3f}{shares[kind][1]:>9.3f}")
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    print(f"fine-tuning took {next(entry['train_runtime'] for entry in log[::-1] if 'train_runtime' in entry):.0f} s")
    print(f"learning curve: {curves(run, log)}")
    print(f"answers while it trained: {run / 'samples.md'}")
    return shares
