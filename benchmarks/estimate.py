"""Does it fit? The memory of every recipe at its model's real size, reckoned without a GPU and without weights: tools/inspect_recipe.py on the
published configurations and on the rows of benchmarks/full_size.py, which measures the same where there is a GPU.

    python benchmarks/estimate.py                        # all recipes, as a Markdown table
    python benchmarks/estimate.py sft_llava --json sft.json
    python benchmarks/estimate.py --measure sft_llava --bits 4 --scratch /mnt/disk   # is it right? A step of the real size on a CPU, minutes
    python benchmarks/estimate.py --small                # a small copy of each, to see that it runs

A line is a recipe at its own settings in 4 or 16 bits: GB of frozen weights, of what is trained with gradients and optimizer, of activations of a
batch with checkpointing and without, and the largest batch that fits in 16, 24, 40 and 80 GB, with and without checkpointing. docs/inspect.md says what each
figure is and how it was checked; no GPU was among that.

With --measure random weights of the real size are written (14 to 17 GB of a disk for a 7B or 8B), the recipe loads them with its own flags and --use_cpu
--bf16 true, and its own trainer takes a training step on the longest rows, with checkpointing. Beside each other stand then what was foretold for that (a CPU keeps a
little more than a GPU does: dropout's masks) and the most that PyTorch's allocator had given out, by torch.profiler. Quantized weights need 16 GB of memory, others 24."""

import contextlib
import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets  # noqa: E402
import psutil  # noqa: E402
import transformers  # noqa: E402
from full_size import CARDS, GB, RECIPES, RUNS  # noqa: E402
from made_up import configuration, least_memory, make_processor, make_rows, missing, write_weights  # noqa: E402
from measure import SMALL, activations, check_json, flag_parser, start, trainer_of  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("with_checkpointing", "without_checkpointing")


def flags_of(run, bits, path, scratch, batch, more):
    """The recipe's flags for an entry of RUNS in one of its precisions."""
    _, model, data, own_batch, own, precisions = RUNS[run]
    flags = {
        "model_name_or_path": scratch / model,
        data: path,
        "output_dir": scratch / "run",
        "per_device_train_batch_size": batch or own_batch,
    }
    return [
        part for name, value in (flags | own | precisions[bits] | more).items() for part in (f"--{name}", str(value))
    ]


def reckon(run, bits, rows, small, scratch, batch=None, more=None):
    """An entry of RUNS, one of its precisions -> tools/inspect_recipe.py's report. Raises SystemExit with what that says."""
    recipe, model, *_ = RUNS[run]
    processor = make_processor(model, small)
    if not (scratch / model).exists():
        processor.save_pretrained(scratch / model)
        configuration(model, small, processor.tokenizer).save_pretrained(scratch / model)
        save_file(
            {}, scratch / model / "model.safetensors"
        )  # llava_two_stage.py looks whether there are weights; nobody loads them
    path = make_rows(recipe, rows, processor.tokenizer, scratch / "rows")
    flags = flags_of(run, bits, path, scratch, batch, ({"use_cpu": True} if small else {}) | (more or {}))
    command = [
        sys.executable,
        ROOT / "tools/inspect_recipe.py",
        ROOT / f"{recipe}.py",
        "--json",
        "--examples",
        "0",
        *flags,
    ]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_DATASETS_CACHE": str(scratch / "cache")},
    )
    if done.returncode:
        sys.exit(f"error: {run}, {bits} bits: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def measure(run, bits, rows, small, scratch, batch=None):
    """The same -> {"foretold", "measured": bytes of activations, "seconds" of a step, "tokens", "batch"}, on this machine's CPU, in bfloat16."""
    name, model, *_ = RUNS[run]
    gc.collect()  # the model before this one
    write_weights(model, small, scratch / model)
    more = {"use_cpu": True, "bf16": True, "dataloader_num_workers": 0, "report_to": "none"}
    report = reckon(run, bits, rows, small, scratch, batch, more)["memory"]
    trainer = trainer_of(
        importlib.import_module(name), flags_of(run, bits, scratch / "rows" / f"{name}.json", scratch, batch, more)
    )
    begin = time.perf_counter()
    found = {
        "measured": activations(trainer),
        "seconds": time.perf_counter() - begin,
        "batch": trainer.args.per_device_train_batch_size,
    }
    return found | {"foretold": report["activations"][KINDS[0]]["bytes"], "tokens": report["longest"]}


def line(run, bits, report, scale=GB):
    """A report -> the cells of a line."""
    memory, batch = report["memory"], RUNS[run][3]
    fixed = memory["fixed"][memory["strategy"]]
    cells = [f"`{run}`", f"{bits} bit", str(batch), str(memory["longest"]), f"{fixed['weights'] / scale:.1f}"]
    cells.append(f"{sum(value for name, value in fixed.items() if name != 'weights') / scale:.1f}")
    cells += [f"{memory['activations'][kind]['bytes'] / scale:.1f}" for kind in KINDS]
    return cells + [" / ".join(str(memory["fits"][str(card)][kind] or "no") for kind in KINDS) for card in CARDS]


def measured_line(run, bits, found, scale=GB):
    """What `measure` gives -> the cells of a line."""
    cells = [f"`{run}`", f"{bits} bit", str(found["batch"]), str(found["tokens"])]
    cells += [f"{found[which] / scale:.3f}" for which in ("foretold", "measured")]
    return cells + [f"{found['foretold'] / found['measured'] - 1:+.1%}", f"{found['seconds']:.3g}"]


def main(argv=None):
    """Flags -> a table."""
    parser = flag_parser(__doc__)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"Default: all of {', '.join(RECIPES)}.")
    parser.add_argument(
        "--rows", type=int, default=32, help="Rows that are made up; the longest are reckoned with (default 32)."
    )
    parser.add_argument("--bits", choices=["4", "16", "both"], default="both", help="Precision of the frozen weights.")
    parser.add_argument("--batch_size", type=int, help="With --measure: rows of the step. Default: the recipe's own.")
    parser.add_argument("--measure", action="store_true", help="Take a step of each on this CPU, and compare.")
    parser.add_argument(
        "--scratch",
        type=Path,
        help="With --measure: a folder for the weights, which stay there. Default: a temporary one.",
    )
    parser.add_argument("--small", action="store_true", help="Small models, in MB: for the tests.")
    parser.add_argument("--json", type=Path, help="Write the reports to this file.")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.recipes if name not in RECIPES]:
        parser.error(f"no recipe {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    if args.rows < 16:  # a batch of the largest default, and what is held out
        parser.error("--rows: at least 16")
    if (args.batch_size or args.scratch) and not args.measure:
        parser.error("--batch_size and --scratch are for --measure")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error("--batch_size: at least 1")
    check_json(parser, args.json)
    unit, scale, found = "MB" if args.small else "GB", 1e6 if args.small else GB, {}
    head = [
        "recipe",
        "weights in",
        "batch",
        "tokens",
        f"weights, {unit}",
        "trained, gradients, optimizer",
        "activations, checkpointing",
        "without",
    ]
    head += [f"fits {card} GB" for card in CARDS]
    if args.measure:
        head = [
            "recipe",
            "weights in",
            "batch",
            "tokens",
            f"foretold, {unit}",
            "measured",
            "difference",
            "seconds a step",
        ]
    wanted = [
        (run, bits)
        for run, (recipe, *_, precisions) in RUNS.items()
        if recipe in (args.recipes or RECIPES)
        for bits in precisions
        if args.bits in ("both", bits)
    ]
    with contextlib.ExitStack() as stack:
        scratch = args.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.measure:
            check_room(parser, scratch, {(RUNS[run][1], bits) for run, bits in wanted}, args.small)
        if args.small:
            print(f"{SMALL}\n")
        print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
        for run, bits in wanted:
            if args.measure:
                found[f"{run}, {bits} bits"] = one = measure(
                    run, bits, args.rows, args.small, scratch, args.batch_size
                )
                cells = measured_line(run, bits, one, scale)
            else:
                found[f"{run}, {bits} bits"] = one = reckon(run, bits, args.rows, args.small, scratch)
                cells = line(run, bits, one, scale)
            print("| " + " | ".join(cells) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def check_room(parser, scratch, models, small):
    """Ends the program where the weights that are still to be written find no room, or no folder, or, of `models`, (name, bits), one does not fit into memory."""
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    for name, bits in sorted(models):
        if not small and free < (need := least_memory(name, bits)):
            parser.error(
                f"--measure: the weights of {name} in {bits} bits alone take {need / GB:.3g} GB of memory, {free / GB:.3g} GB are free"
            )
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(scratch).free) < (need := missing({name for name, _ in models}, scratch, small)):
            parser.error(
                f"{need / GB:.3g} GB are needed in {scratch} for the weights, {free / GB:.3g} GB are free: --scratch FOLDER on a larger disk"
            )
    except OSError as e:
        parser.error(f"--scratch {scratch}: {e.strerror}")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # in the table
    datasets.disable_progress_bars()
    start(main)
