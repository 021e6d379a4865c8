"""Draw what a run logged: loss, learning rate and every other metric over its steps, from trainer_state.json to a PNG.

    python tools/plot_run.py llava-lora                                # -> llava-lora/curves.png
    python tools/plot_run.py llava-lora llava-dora --output both.png   # several runs in one picture, a colour each
    python tools/plot_run.py idefics2-docvqa --metrics loss anls       # only these; held out is drawn beside training

RUN is a folder that a Trainer of Transformers or TRL wrote. Of a run that goes on, or was cut off, its newest
checkpoint is drawn. A metric has one panel: what was logged in training as a line, what was held out (eval_...) with
dots. Needs matplotlib.
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.program import fail, flag_parser, run_labels, start  # noqa: E402

try:
    import matplotlib
except ImportError:
    fail("tools/plot_run.py needs matplotlib: pip install matplotlib==3.11.2")

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FIRST = ["loss", "learning_rate", "grad_norm"]  # the others follow by the alphabet
# Not drawn unless they are asked for.
LEFT_OUT = "epoch step runtime samples_per_second steps_per_second model_preparation_time".split()
COLUMNS = 3


def parse(argv=None):
    """-> the arguments. Raises SystemExit."""
    parser = flag_parser(__doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="output_dir of a run")
    parser.add_argument("--metrics", nargs="+", help="what to draw, in this order (default: all that was logged)")
    parser.add_argument(
        "--output",
        type=Path,
        help="the .png to write (default: curves.png in RUN, of several runs curves.png here, drawn anew each time)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT where it exists")
    args = parser.parse_args(argv)
    args.labels = run_labels(args.runs)
    if args.output and args.output.suffix.lower() != ".png":
        fail(f"--output {args.output}: its name must end in .png")
    if args.output and args.output.exists() and not args.overwrite:
        fail(f"{args.output} exists: choose another --output, or --overwrite it")
    return args


def states_of(run):
    """A run's folder -> its trainer_state.json files, the newest first. Raises SystemExit where there is none."""
    if run.is_file():
        fail(f"{run} is a file: needed is the folder of a run")
    if not run.is_dir():
        fail(f"{run}: there is no such folder")
    steps = [int(folder.name[11:]) for folder in run.glob("checkpoint-*") if folder.name[11:].isdigit()]
    folders = [run, *(run / f"checkpoint-{step}" for step in sorted(steps, reverse=True))]
    states = [folder / "trainer_state.json" for folder in folders if (folder / "trainer_state.json").exists()]
    if not states:
        fail(
            f"{run} holds no trainer_state.json, nor does a checkpoint in it: it is no run, or one that was cut off "
            "before its first checkpoint"
        )
    return states


def read(run):
    """A run's folder -> its log, [{"step": n, metric: value}]. Raises SystemExit where there is none."""
    states = states_of(run)
    for state in states:  # of a run that was cut off while it wrote its newest checkpoint, the one before
        try:
            log = [numbers(entry) for entry in json.loads(state.read_text(encoding="utf-8"))["log_history"]]
            break
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
            message = f"{state} is damaged ({type(e).__name__}: {e})"
            if state == states[-1]:
                fail(message)
            print(f"note: {message}", file=sys.stderr)
    if state.parent != run:
        print(f"{run} is not finished: drawn up to {state.parent.name}", file=sys.stderr)
    return log


def numbers(entry):
    """What of an entry of a log can be drawn; its step must be there, and a number."""
    return {key: float(value) for key, value in entry.items() if type(value) in (int, float)} | {
        "step": entry["step"] + 0
    }


def metric_of(key):
    """The name of a logged value, without what says where it was measured."""
    return key.removeprefix("eval_")


def metrics(logs, wanted=None):
    """Logs -> names of what is drawn, in order. Raises SystemExit where something is wanted that no run logged."""
    entries = [entry for log in logs for entry in log if "train_runtime" not in entry]  # that one sums up the run
    logged = sorted({metric_of(key) for entry in entries for key in entry} - {"step"})
    if wanted is None:
        first = [name for name in FIRST if name in logged]
        others = [name for name in logged if name not in FIRST + LEFT_OUT]
        if not first + others:
            fail("nothing was logged but the end of the run: --logging_steps is larger than its number of steps")
        return first + others
    wanted = list(dict.fromkeys(map(metric_of, wanted)))
    unknown = [name for name in wanted if name not in logged]
    if unknown:
        fail(f"--metrics {' '.join(unknown)}: not logged; there are {', '.join(logged)}")
    return wanted


def draw(runs, wanted=None):
    """{label: log} -> the figure, a panel for each metric, and what is to be said about it."""
    names, notes = metrics(runs.values(), wanted), []
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    size = (5 * columns, 3.6 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, name in zip(axes.flat, names):
        for number, (label, log) in enumerate(runs.items()):
            draw_curves(axis, name, log, label, number, len(runs), notes)
        axis.set(title=name.replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8 if len(runs) > 1 else None)
    return figure, notes


def draw_curves(axis, name, log, label, number, num_runs, notes):
    """Draw one metric of one run, in training and held out, into a panel; add to the notes what is no number."""
    both = any(f"eval_{name}" in entry for entry in log)
    for key, kind, style in ((name, "training", "-"), (f"eval_{name}", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in log if key in entry]
        if not points:
            continue
        odd = [step for step, value in points if not math.isfinite(value)]
        if odd:
            notes.append(f"{label}: {key} is no finite number at {len(odd)} of {len(points)} steps, first at {odd[0]}")
        options = {"color": f"C{number}", "label": f"{plain(label)}, {kind}", "markersize": 4}
        if num_runs == 1:
            options |= {"color": "C0" if kind == "training" else "C1", "label": kind}
        elif kind == "training" and both:
            options["alpha"] = 0.5
        axis.plot(*zip(*points), style if len(points) > 1 else "o", **options)


def plain(label):
    """A label as matplotlib shows it unchanged: it reads $ as a formula, and hides what begins with _."""
    label = label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def main(argv=None):
    """Parse, read, draw, write."""
    args = parse(argv)
    figure, notes = draw(dict(zip(args.labels, map(read, args.runs))), args.metrics)
    output = args.output
    if output is None:
        output = args.runs[0] / "curves.png" if len(args.runs) == 1 else Path("curves.png")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    try:
        figure.savefig(output, dpi=110)
    except OSError as e:
        fail(f"{output} cannot be written: {e}")
    plt.close(figure)
    print(f"curves: {output}")


if __name__ == "__main__":
    start(main)
