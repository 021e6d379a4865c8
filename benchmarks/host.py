"""What a micro-step, forward and backward of a batch, asks of the CPU that feeds a GPU: `step.py --host`.

Each recipe's own main() makes its trainer, at its defaults (weights in 4 bits, where it has them, bfloat16,
checkpointing), on a model of the published depth whose widths and lengths are a 32nd (MiniCPM-V: a 16th) of the
published ones. So there are as many operations as in the real model, and next to nothing to compute: the time that
they take here is the host's."""

import contextlib
import importlib
import io
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from full_size import RUNS
from made_up import PICTURE, SIDES, configuration, empty_model, photograph, recipe_row, sized_processor
from measure import as_flags, step, trainer_of
from scaled import count_tokens, digits, shape
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 4)
WAITS = ROOT / "tests" / "fake_cuda.py"
# Tokens of an answer. MiniCPM-V's linear attention computes 64 positions at a time, in as many operations each time:
# its rows are as long as real ones.
ANSWER, LONG_ANSWERS = 4, {"finetune_minicpm_lora": 450}
EDGES = {"dpo_idefics2": 490, "idefics2_docvqa": 980}  # the recipes' own --longest_edge


class Operations(TorchDispatchMode):
    """Counts the operators that are dispatched within it: `all`, and of them `kernels`, which are no views."""

    def __init__(self):
        super().__init__()
        self.all, self.kernels = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.all += 1
        if not function.is_view:
            self.kernels += 1
        return function(*args, **(kwargs or {}))


def make_folder(model, folder):
    """Write a deep model and its processor, and a picture for it, unless they are there. Returns the processor."""
    sizes = shape(model, "deep")
    processor = sized_processor(model, sizes["side"], sizes["tokens"])
    if not folder.exists():
        transformers.set_seed(0)
        config = configuration(model, sizes, processor.tokenizer)
        empty_model(config, "cpu", torch.float32).save_pretrained(folder)
        processor.save_pretrained(folder)
        picture = [round(length * sizes["side"] / SIDES[model]) for length in PICTURE]
        photograph(0, picture).save(folder / "picture.png")
    return processor


def write_rows(recipe, tokenizer, folder):
    """Write rows of a recipe about the picture in `folder`, with short texts. Returns the path."""
    draw, rows = random.Random(0), []
    for n in range(max(BATCHES) + 1):
        length = LONG_ANSWERS.get(recipe, ANSWER)
        answers = [digits(draw, length, lambda text: count_tokens(tokenizer, text)) for _ in range(2)]
        rows.append({"id": str(n), **recipe_row(recipe, "What is it?", answers, "picture.png")})
    path = folder / f"{recipe}.json"
    path.write_text(json.dumps(rows))
    return path


def deep_trainer(name, scratch):
    """An entry of RUNS -> the trainer of the recipe's main, after its first step."""
    run = RUNS[name]
    recipe, folder = importlib.import_module(run.recipe), scratch / run.model
    processor = make_folder(run.model, folder)
    precision = next(iter(run.precisions.values()))
    flags = {
        "model_name_or_path": folder,
        "dataset_name": write_rows(run.recipe, processor.tokenizer, folder),
        "output_dir": scratch / "out",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": 0,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": True,
        "disable_tqdm": True,
        "report_to": "none",
        **dict.fromkeys(["eval_strategy", "save_strategy", "logging_strategy"], "no"),
        **run.flags,
        **precision,
    }
    if run.recipe in EDGES:
        flags["longest_edge"] = EDGES[run.recipe] * shape(run.model, "deep")["side"] // SIDES[run.model]
    trainer = trainer_of(recipe, as_flags(flags))
    # Forwards stay replaced after train(), for what is measured then.
    for callback in [one for one in trainer.callback_handler.callbacks if isinstance(one, recipe.ReplacedForwards)]:
        trainer.remove_callback(callback)
    trainer.train()
    return trainer


def host_figures(trainer, size, repeats):
    """-> {"operations", "kernels", "milliseconds" of process time, the median of some} of a micro-step of so many
    rows."""
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(size)])
    with Operations() as counted:
        step(trainer, batch)
    times = []
    for _ in range(repeats):
        trainer.model.zero_grad()
        start = time.process_time()
        step(trainer, batch)
        times.append(1e3 * (time.process_time() - start))
    return {"operations": counted.all, "kernels": counted.kernels, "milliseconds": statistics.median(times)}


def count_waits(recipes, scratch):
    """Waits and blocking copies of an optimizer step of two micro-batches of two rows, by tests/fake_cuda.py -> what
    it reports of each recipe, or text that says why nothing is counted."""
    if not WAITS.exists():
        return f"{WAITS} is not there"
    if shutil.which("g++") is None:
        return "there is no g++"
    path = scratch / "waits.json"
    one = ["--dtype", "bf16", "--bits", "4", "--checkpointing", "on", "--json", str(path)]
    done = subprocess.run([sys.executable, str(WAITS), *recipes, *one], capture_output=True, text=True)
    if not path.exists():
        return (done.stderr.strip() or "it ended early").splitlines()[-1]
    return json.loads(path.read_text())


def report_waits(recipes, scratch, report):
    """The table of waits for these recipes -> its figures."""
    reports = count_waits(recipes, scratch)
    if isinstance(reports, str):
        report(f"\nwaits are not counted: {reports}")
        return {}
    columns = ["recipe", "waits in a step of two micro-batches", "of them by the recipe", "blocking copies"]
    report(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    found = {}
    for one in reports:
        counts = Counter()
        for event in one["events"]:
            if event["part"] == "step":
                counts[event["kind"]] += event["count"]
                counts[event["kind"], event["is_ours"]] += event["count"]
        name, waits, ours = one["recipe"], counts["wait"], counts["wait", True]
        found[name] = {"waits": waits, "by_the_recipe": ours, "blocking_copies": counts["blocking copy"]}
        cells = [str(waits), str(ours), str(counts["blocking copy"])]
        if one["error"]:
            found[name], cells = {"error": one["error"]}, ["failed", "", one["error"].strip().splitlines()[-1]]
        report(f"| `{name}` | {' | '.join(cells)} |")
    return found


def report_operations(recipes, repeats, scratch, report):
    """The table of operations and their time for these recipes -> its figures."""
    columns = ["recipe", "batch", "operations", "of them kernels", "host ms", "ms a row", "us an operation"]
    report(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    found = {}
    for name in [name for name, run in RUNS.items() if run.recipe in recipes]:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            trainer = deep_trainer(name, scratch)
        found[name] = {size: host_figures(trainer, size, repeats) for size in BATCHES}
        for size, one in found[name].items():
            cells = [f"`{name}`", str(size), f"{one['operations']:,}", f"{one['kernels']:,}"]
            cells += [f"{one['milliseconds']:.0f}", f"{one['milliseconds'] / size:.0f}"]
            report(f"| {' | '.join(cells)} | {1e3 * one['milliseconds'] / one['operations']:.1f} |")
    return found
