"""Draw what a run logged: loss, learning rate and every other metric over its steps, from trainer_state.json to a PNG.

    python tools/plot_run.py llava-lora                                # -> llava-lora/curves.png
    python tools/plot_run.py llava-lora llava-dora --output both.png   # several runs in one picture, a colour each
    python tools/plot_run.py idefics2-docvqa --metrics loss anls       # only these; held out is drawn beside training

RUN is a folder that a Trainer of Transformers or TRL wrote. Of a run that goes on, or was cut off, its newest checkpoint is drawn. A metric has one
panel: what was logged in training as a line, what was held out (eval_...) with dots. Needs matplotlib.
"""

import argparse
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

try:
    import matplotlib
except ImportError:
    sys.exit("error: tools/plot_run.py needs matplotlib: pip install matplotlib==3.11.2")

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FIRST = ["loss", "learning_rate", "grad_norm"]  # then by the alphabet
LEFT_OUT = (
    "epoch step runtime samples_per_second steps_per_second model_preparation_time".split()
)  # unless they are asked for
COLUMNS = 3


def fail(message):
    """End the program with one message and exit status 1."""
    sys.exit(f"error: {message}")


def parse(argv=None):
    """-> the arguments. Raises SystemExit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="output_dir of a run")
    parser.add_argument("--metrics", nargs="+", help="what to draw, in this order (default: all that was logged)")
    parser.add_argument(
        "--output",
        type=Path,
        help="the .png to write (default: curves.png in RUN, of several runs curves.png here, drawn anew each time)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT where it exists")
    parser.error = fail
    args = parser.parse_args(argv)
    if twice := [run for run, count in Counter(map(os.path.realpath, args.runs)).items() if count > 1]:
        fail(f"{twice[0]} is given twice")
    if args.output and args.output.suffix.lower() != ".png":
        fail(f"--output {args.output}: its name must end in .png")
    if args.output and args.output.exists() and not args.overwrite:
        fail(f"{args.output} exists: choose another --output, or --overwrite it")
    return args


def read(run):
    """A run's folder -> its log, [{"step": n, metric: value}]. Raises SystemExit where there is none."""
    if not run.is_dir():
        fail(f"{run} is a file: needed is the folder of a run" if run.exists() else f"{run}: there is no such folder")
    checkpoints = sorted(
        (c for c in run.glob("checkpoint-*/trainer_state.json") if c.parent.name[11:].isdigit()),
        key=lambda c: -int(c.parent.name[11:]),
    )
    states, log = [path for path in (run / "trainer_state.json", *checkpoints) if path.exists()], None
    if not states:
        fail(
            f"{run} holds no trainer_state.json, nor does a checkpoint in it: it is no run, or one that was cut off before its first checkpoint"
        )
    for state in states:  # of a run that was cut off while it wrote its newest checkpoint, the one before
        try:
            log = json.loads(state.read_text(encoding="utf-8"))["log_history"]
            log = [
                {k: float(v) for k, v in entry.items() if type(v) in (int, float)} | {"step": entry["step"] + 0}
                for entry in log
            ]
            break
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
            said = f"{state} is damaged ({type(e).__name__}: {e})"
            fail(said) if state == states[-1] else print(f"note: {said}", file=sys.stderr)
    if state.parent != run:
        print(f"{run} is not finished: drawn up to {state.parent.name}", file=sys.stderr)
    return log


def base(key):
    """The name of a logged value, without what says where it was measured."""
    return key.removeprefix("eval_")


def metrics(logs, wanted=None):
    """Logs -> names of what is drawn, in order. Raises SystemExit where something is wanted that no run logged."""
    steps = [entry for log in logs for entry in log if "train_runtime" not in entry]  # the last entry sums up the run
    logged = sorted({base(key) for entry in steps for key in entry} - {"step"})
    if wanted is None:
        names = [
            name
            for name in [*FIRST, *(name for name in logged if name not in FIRST)]
            if name in logged and name not in LEFT_OUT
        ]
        return names or fail(
            "nothing was logged but the end of the run: --logging_steps is larger than its number of steps"
        )
    wanted = list(dict.fromkeys(map(base, wanted)))
    if unknown := [name for name in wanted if name not in logged]:
        fail(f"--metrics {' '.join(unknown)}: not logged; there are {', '.join(logged)}")
    return wanted


def draw(runs, wanted=None):
    """{label: log} -> the figure, a panel for each metric, and what is to be said about it."""
    names, notes = metrics(runs.values(), wanted), []
    shown = {
        label: label.replace("$", r"\$").replace("_", " _", label.startswith("_")) for label in runs
    }  # matplotlib reads $ as a formula, and hides _
    columns = min(COLUMNS, len(names))
    figure, axes = plt.subplots(math.ceil(len(names) / columns), columns, figsize=(5 * columns, 3.6 * math.ceil(len(names) / columns)),
                                layout="constrained", squeeze=False)  # fmt: skip
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, name in zip(axes.flat, names):
        for n, (label, log) in enumerate(runs.items()):
            for key, kind, style in ((name, "training", "-"), (f"eval_{name}", "held out", "o-")):
                points = [(entry["step"], entry[key]) for entry in log if key in entry]
                if odd := [step for step, value in points if not math.isfinite(value)]:
                    notes.append(
                        f"{label}: {key} is no finite number at {len(odd)} of {len(points)} steps, first at {odd[0]}"
                    )
                if points:
                    colour = f"C{2 * n + (kind == 'held out')}" if len(runs) == 1 else f"C{n}"
                    style = style if len(points) > 1 else "o"
                    pale = len(runs) > 1 and kind == "training" and any(f"eval_{name}" in entry for entry in log)
                    axis.plot(
                        *zip(*points),
                        style,
                        color=colour,
                        alpha=0.5 if pale else 1,
                        label=f"{shown[label]}, {kind}" if len(runs) > 1 else kind,
                        markersize=4,
                    )
        axis.set(title=name.replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8 if len(runs) > 1 else None)
    return figure, notes


def main(argv=None):
    """Parse, read, draw, write."""
    args = parse(argv)
    short = Counter(run.absolute().name for run in args.runs)
    logs = {run.absolute().name if short[run.absolute().name] == 1 else str(run): read(run) for run in args.runs}
    figure, notes = draw(logs, args.metrics)
    output = args.output or (args.runs[0] / "curves.png" if len(args.runs) == 1 else Path("curves.png"))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    try:
        figure.savefig(output, dpi=110)
    except OSError as e:
        fail(f"{output} cannot be written: {e}")
    plt.close(figure)
    print(f"curves: {output}")


if __name__ == "__main__":
    main()
