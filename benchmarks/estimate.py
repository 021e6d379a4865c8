"""Does it fit? The memory of every recipe at its model's real size, reckoned without a GPU and without weights: tools/inspect_recipe.py on the
published configurations and on the rows of benchmarks/full_size.py, which measures the same where there is a GPU.

    python benchmarks/estimate.py                        # all recipes, as a Markdown table
    python benchmarks/estimate.py sft_llava --json sft.json
    python benchmarks/estimate.py --small                # a small copy of each, to see that it runs

A line is a recipe at its own settings in 4 or 16 bits: GB of frozen weights, of what is trained with gradients and optimizer, of activations of a
batch with checkpointing and without, and the largest batch that fits in 16, 24, 40 and 80 GB, with and without checkpointing. docs/inspect.md says what each
figure is and how it was checked; no GPU was among that."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from full_size import CARDS, GB, RECIPES, RUNS  # noqa: E402
from made_up import configuration, make_processor, make_rows  # noqa: E402
from measure import check_json  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("with_checkpointing", "without_checkpointing")


def reckon(run, bits, rows, small, scratch):
    """An entry of RUNS, one of its precisions -> tools/inspect_recipe.py's report. Raises SystemExit with what that says."""
    recipe, model, data, batch, own, precisions = RUNS[run]
    processor = make_processor(model, small)
    if not (scratch / model).exists():
        processor.save_pretrained(scratch / model)
        configuration(model, small, processor.tokenizer).save_pretrained(scratch / model)
        save_file({}, scratch / model / "model.safetensors")  # llava_two_stage.py looks whether there are weights; nobody loads them
    path = make_rows(recipe, rows, processor.tokenizer, scratch / "rows")
    flags = {"model_name_or_path": scratch / model, data: path, "output_dir": scratch / "run", "per_device_train_batch_size": batch} | own | precisions[bits]
    flags = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, ROOT / "tools/inspect_recipe.py", ROOT / f"{recipe}.py", "--json", "--examples", "0", *flags, *["--use_cpu"] * small]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=os.environ | {"HF_DATASETS_CACHE": str(scratch / "cache")})
    if done.returncode:
        sys.exit(f"error: {run}, {bits} bits: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def line(run, bits, report, scale=GB):
    """A report -> the cells of a line."""
    memory, batch = report["memory"], RUNS[run][3]
    fixed = memory["fixed"][memory["strategy"]]
    cells = [f"`{run}`", f"{bits} bit", str(batch), str(memory["longest"]), f"{fixed['weights'] / scale:.1f}"]
    cells.append(f"{sum(value for name, value in fixed.items() if name != 'weights') / scale:.1f}")
    cells += [f"{memory['activations'][kind]['bytes'] / scale:.1f}" for kind in KINDS]
    return cells + [" / ".join(str(memory["fits"][str(card)][kind] or "no") for kind in KINDS) for card in CARDS]


def main(argv=None):
    """Flags -> a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"Default: all of {', '.join(RECIPES)}.")
    parser.add_argument("--rows", type=int, default=32, help="Rows that are made up; the longest are reckoned with (default 32).")
    parser.add_argument("--small", action="store_true", help="Small models, in float32, in MB: for the tests.")
    parser.add_argument("--json", type=Path, help="Write the reports to this file.")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.recipes if name not in RECIPES]:
        parser.error(f"no recipe {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    if args.rows < 16:  # a batch of the largest default, and what is held out
        parser.error("--rows: at least 16")
    check_json(parser, args.json)
    unit, reports = "MB" if args.small else "GB", {}
    head = ["recipe", "weights in", "batch", "tokens", f"weights, {unit}", "trained, gradients, optimizer", "activations, checkpointing", "without"]
    print("| " + " | ".join([*head, *(f"fits {card} GB" for card in CARDS)]) + " |\n" + "|---" * (len(head) + len(CARDS)) + "|")
    with tempfile.TemporaryDirectory() as scratch:
        for run, (recipe, *_, bits) in RUNS.items():
            for one in bits if recipe in (args.recipes or RECIPES) else ():
                reports[f"{run}, {one} bits"] = report = reckon(run, one, args.rows, args.small, Path(scratch))
                print("| " + " | ".join(line(run, one, report, 1e6 if args.small else GB)) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1))


if __name__ == "__main__":
    main()
