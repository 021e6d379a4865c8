"""Does it fit? The memory of every recipe at its model's real size, reckoned without a GPU and without weights:
tools/inspect_recipe.py on the published configurations and on the rows of benchmarks/full_size.py, which measures the
same where there is a GPU.

    python benchmarks/estimate.py                        # all recipes, as a Markdown table
    python benchmarks/estimate.py --cards                # by card: which batch, how many rows a second
    python benchmarks/estimate.py sft_llava --json sft.json
    python benchmarks/estimate.py --measure sft_llava --bits 4 --scratch /mnt/disk   # is it right? On a CPU, minutes
    python benchmarks/estimate.py --small                # a small copy of each, to see that it runs

A line is a recipe at its own settings in 4 or 16 bits: GB of frozen weights, of what is trained with gradients and
optimizer, of activations of a batch with checkpointing and without, the peak and the phase of a run that has it, and
the largest batch that fits in 16, 24, 40 and 80 GB, with and without checkpointing. docs/inspect.md says what each
figure is and how it was checked; no GPU was among that.

With --cards a line has a cell for each card: the batch that --per_device_train_batch_size auto would choose and how
many of them make a step, then rows a second. These are the FLOPs of the longest row, recomputation included, at 40 %
of the card's peak in 16 bits (a T4's is fp16's). That share is an assumption, which wants batches that fill the card
and a host that launches fast enough (benchmarks/step.py --host).

With --measure random weights of the real size are written (14 to 17 GB of a disk for a 7B or 8B), the recipe loads
them with its own flags and --use_cpu --bf16 true, and its own trainer takes a training step on the longest rows, with
checkpointing. Beside each other stand then what was foretold for that (a CPU keeps a little more than a GPU does:
dropout's masks) and the most that PyTorch's allocator had given out, by torch.profiler. Quantized weights need 16 GB
of memory, others 24."""

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
from full_size import CARDS, GB, PEAKS, RECIPES, RUNS  # noqa: E402
from made_up import (  # noqa: E402
    configuration,
    least_memory,
    make_processor,
    make_rows,
    missing,
    sizes_of,
    write_weights,
)
from measure import (  # noqa: E402
    SMALL,
    activations,
    add_recipes,
    as_flags,
    benchmark_parser,
    check_json,
    check_recipes,
    start,
    trainer_of,
    write_json,
)
from safetensors.torch import save_file  # noqa: E402

from tools.program import fail  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("with_checkpointing", "without_checkpointing")
GPUS = {  # memory in GB, the name in PEAKS
    "T4, 16 GB": (16, "T4"),
    "RTX 4090, 24 GB": (24, "RTX 4090"),
    "A100, 40 GB": (40, "A100"),
    "A100, 80 GB": (80, "A100"),
    "H100, 80 GB": (80, "H100"),
    "H200, 141 GB": (141, "H200"),
}
SHARE = 0.4  # of a card's peak, for its speed


def flags_of(name, bits, path, scratch, batch, more):
    """The recipe's flags for an entry of RUNS in one of its precisions."""
    run = RUNS[name]
    flags = {
        "model_name_or_path": scratch / run.model,
        "dataset_name": path,
        "output_dir": scratch / "run",
        "per_device_train_batch_size": batch or run.batch,
        **run.flags,
        **run.precisions[bits],
        **more,
    }
    return as_flags(flags)


def reckon(name, bits, rows, small, scratch, batch=None, more=None):
    """An entry of RUNS, one of its precisions -> tools/inspect_recipe.py's report. Raises SystemExit with what that
    says. `more`: flags of the recipe."""
    run, more = RUNS[name], dict(more or {})
    processor, folder = make_processor(run.model, small), scratch / run.model
    if not folder.exists():
        processor.save_pretrained(folder)
        configuration(run.model, sizes_of(run.model, small), processor.tokenizer).save_pretrained(folder)
        save_file({}, folder / "model.safetensors")  # llava_two_stage.py asks for weights; none are read
    path = make_rows(run.recipe, rows, processor.tokenizer, scratch / "rows")
    tool = [sys.executable, str(ROOT / "tools/inspect_recipe.py"), str(ROOT / f"{run.recipe}.py")]
    cards = sorted({*CARDS, *(memory for memory, _ in GPUS.values())})
    flags = [
        "--memory",
        *map(str, cards),
        "--json",
        "--examples",
        "0",
        *flags_of(name, bits, path, scratch, batch, more),
    ]
    environment = os.environ | {"HF_DATASETS_CACHE": str(scratch / "cache")}
    done = subprocess.run([*tool, *flags], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"error: {name}, {bits} bits: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def measure(name, bits, rows, small, scratch, batch=None):
    """The same -> {"foretold", "measured": bytes of activations, "seconds" of a step, "tokens", "batch"}, on this
    machine's CPU, in bfloat16."""
    run = RUNS[name]
    gc.collect()  # the model before this one
    write_weights(run.model, small, scratch / run.model)
    more = {"use_cpu": True, "bf16": True, "dataloader_num_workers": 0, "report_to": "none"}
    memory = reckon(name, bits, rows, small, scratch, batch, more)["memory"]
    path = scratch / "rows" / f"{run.recipe}.json"
    trainer = trainer_of(importlib.import_module(run.recipe), flags_of(name, bits, path, scratch, batch, more))
    begin = time.perf_counter()
    return {
        "measured": activations(trainer),
        "seconds": time.perf_counter() - begin,
        "batch": trainer.args.per_device_train_batch_size,
        "foretold": memory["activations"][KINDS[0]]["bytes"],
        "tokens": memory["longest"],
    }


# ---------------------------------------------------------------- the table


def head(args, unit):
    """The names of the columns."""
    names = ["recipe", "weights in", "batch", "tokens"]
    if args.cards:
        return ["recipe", "weights in", "tokens", "TFLOP a row", *GPUS]
    if args.measure:
        return [*names, f"foretold, {unit}", "measured", "difference", "seconds a step"]
    names += [f"weights, {unit}", "trained, gradients, optimizer", "activations, checkpointing", "without", "peak"]
    return names + [f"fits {card} GB" for card in CARDS]


def line(name, bits, report, scale=GB):
    """A report -> the cells of a line."""
    memory = report["memory"]
    fixed = dict(memory["fixed"][memory["strategy"]])
    weights = fixed.pop("weights")
    cells = [f"`{name}`", f"{bits} bit", str(RUNS[name].batch), str(memory["longest"])]
    cells += [f"{weights / scale:.1f}", f"{sum(fixed.values()) / scale:.1f}"]
    cells += [f"{memory['activations'][kind]['bytes'] / scale:.1f}" for kind in KINDS]
    cells.append(f"{memory['peak']['bytes'] / scale:.1f}, {memory['peak']['phase']}")
    return cells + [" / ".join(str(memory["fits"][str(card)][kind] or "no") for kind in KINDS) for card in CARDS]


def cards_line(name, bits, report):
    """A report -> the cells of a line of --cards."""
    memory, flops = report["memory"], report["memory"]["flops_of_a_row"]
    cells = [f"`{name}`", f"{bits} bit", str(memory["longest"]), f"{flops / 1e12:.3g}"]
    for size, card in GPUS.values():
        chosen = memory["auto"][str(size)]
        if chosen["train"]:
            rows = SHARE * PEAKS[card] / flops
            cells.append(f"{chosen['train']} x {chosen['accumulation']}, {rows:.2g}/s")
        else:
            cells.append("no")
    return cells


def measured_line(name, bits, found, scale=GB):
    """What `measure` gives -> the cells of a line."""
    cells = [f"`{name}`", f"{bits} bit", str(found["batch"]), str(found["tokens"])]
    cells += [f"{found[which] / scale:.3f}" for which in ("foretold", "measured")]
    return [*cells, f"{found['foretold'] / found['measured'] - 1:+.1%}", f"{found['seconds']:.3g}"]


def parse(argv=None):
    """Flags, checked. Ends the program with one message where they cannot work."""
    parser = benchmark_parser(__doc__)
    add_recipes(parser, RECIPES)
    rows_help = "Rows that are made up; the longest are reckoned with (default 32)."
    parser.add_argument("--rows", type=int, default=32, help=rows_help)
    parser.add_argument("--bits", choices=["4", "16", "both"], default="both", help="Precision of the frozen weights.")
    parser.add_argument("--batch_size", type=int, help="With --measure: rows of the step. Default: the recipe's own.")
    parser.add_argument("--cards", action="store_true", help="Which batch and what speed on which card.")
    parser.add_argument("--measure", action="store_true", help="Take a step of each on this CPU, and compare.")
    scratch_help = "With --measure: a folder for the weights, which stay there. Default: a temporary one."
    parser.add_argument("--scratch", type=Path, help=scratch_help)
    parser.add_argument("--small", action="store_true", help="Small models, in MB: for the tests.")
    args = parser.parse_args(argv)
    check_recipes(parser, args, RECIPES)
    if args.cards and args.measure:
        parser.error("--cards is an estimate, --measure measures: one of them")
    if args.rows < 16:  # a batch of the largest default, and what is held out
        parser.error("--rows: at least 16")
    if not args.measure and (args.batch_size or args.scratch):
        parser.error("--batch_size and --scratch are for --measure")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error("--batch_size: at least 1")
    check_json(parser, args.json)
    return args


def check_room(scratch, models, small):
    """End the program where, of `models`, (name, bits), one does not fit into memory, or the weights still to be
    written find no room, or no folder."""
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    for name, bits in sorted(models):
        need = 0 if small else least_memory(name, bits)
        if free < need:
            weights = f"the weights of {name} in {bits} bits alone take {need / GB:.3g} GB of memory"
            fail(f"--measure: {weights}, {free / GB:.3g} GB are free")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        free, need = shutil.disk_usage(scratch).free, missing({name for name, _ in models}, scratch, small)
    except OSError as error:
        fail(f"--scratch {scratch}: {error.strerror}")
    if free < need:
        room = f"{need / GB:.3g} GB are needed in {scratch} for the weights, {free / GB:.3g} GB are free"
        fail(f"{room}: --scratch FOLDER on a larger disk")


def main(argv=None):
    """Flags -> a table."""
    args = parse(argv)
    unit, scale = ("MB", 1e6) if args.small else ("GB", GB)
    wanted = []
    for name, run in RUNS.items():
        if run.recipe in args.recipes:
            wanted += [(name, bits) for bits in run.precisions if args.bits in ("both", bits)]
    found = {}
    with contextlib.ExitStack() as stack:
        scratch = args.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.measure:
            check_room(scratch, {(RUNS[name].model, bits) for name, bits in wanted}, args.small)
        if args.small:
            print(f"{SMALL}\n")
        columns = head(args, unit)
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for name, bits in wanted:
            if args.measure:
                one = measure(name, bits, args.rows, args.small, scratch, args.batch_size)
                cells = measured_line(name, bits, one, scale)
            else:
                on_a_cpu = {"use_cpu": True} if args.small and not args.cards else {}
                one = reckon(name, bits, args.rows, args.small, scratch, more=on_a_cpu)
                cells = cards_line(name, bits, one) if args.cards else line(name, bits, one, scale)
            found[f"{name}, {bits} bits"] = one
            print(f"| {' | '.join(cells)} |", flush=True)
    write_json(args, reports=found)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # in the table
    datasets.disable_progress_bars()
    start(main)
