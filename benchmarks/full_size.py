"""Does it fit, how long does it take, is it faster than what I have? Every recipe at its model's real size, on one CUDA GPU, with
random weights and made-up rows: nothing is downloaded.

    python benchmarks/full_size.py --minutes 10                            # the defaults of all recipes first, then what time allows
    python benchmarks/full_size.py sft_llava dpo_idefics2 --json gpu.json
    python benchmarks/full_size.py idefics2_docvqa --bits 4 --checkpointing on --batch_sizes 1 2 4 8 16
    python benchmarks/full_size.py --scratch /mnt/disk --keep              # weights stay there for the next time: 34 GB in all
    python benchmarks/full_size.py --steps 2                               # without a GPU: a small copy of it all, to see that it runs

Each configuration is a run of the recipe's own main(), by flags, on a model with the published widths and depths and as many parameters
as the published one has, and on rows read from disk: a JPEG of 1000 x 800, answers of 60-150 tokens (documents: 3-15). Measured are whole
optimizer steps without accumulation, the wait for the loader included, by the wall clock of a device that is synchronized after
each. The stock side is what a user would run instead, on the same base, LoRA, flags and rows: TRL's SFTTrainer and DPOTrainer
with their own collators, transformers.Trainer with the recipe's. Runs of the two alternate; a time is the median of all steps of
all runs, the first steps of each left out.

  s/step, rows/s, tokens/s   a row of DPO is a pair, its tokens those of both sequences, images included
  MFU        model FLOP/s (forward and backward, no recomputation) by the GPU's peak: a table of dense 16-bit peaks, or for other GPUs a
             measured matmul. FLOPs are counted by PyTorch on one of the first steps, and taken to go with the number of tokens;
             inside kernels of Triton nothing is counted
  peak GB    most that PyTorch's allocator had given out, and had reserved, from loading to the last step; GB are 10^9 bytes
  waits      share of the time in which the GPU waited for the loader
  fits       largest batch measured (+: or more) whose peak is below a card's size, beside what CUDA and others took outside of PyTorch; (n) only if
             the allocator gets along with what it gives out, without the reserve it had here

MiniCPM-V is 4.6; 2.6 is code from the hub and left out, as is training LLaVA's language model in full, which no single GPU holds. Random
weights cost what trained ones cost. Nothing here says how well anything is learnt. It has not been run on a GPU yet."""

import argparse
import contextlib
import copy
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from made_up import for_trl, least_memory, make_rows, make_weights, missing, tidy  # noqa: E402
from measure import SMALL, check_json, counter, flag_parser, start  # noqa: E402
from peft import get_peft_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

SAME_ORDER = {"group_by_modality_length": False}  # or the two sides would not see the same rows
# What is run: a recipe's file, model, the flag that names its data, the recipe's own batch, its flags, and those of each precision, the
# recipe's own first.
RUNS = {
    "sft_llava": ("sft_llava", "llava-1.5-7b", "dataset_name", 1, {}, {"4": {"load_in_4bit": True}, "16": {"load_in_4bit": False}}),
    "dpo_idefics2": ("dpo_idefics2", "idefics2-8b", "dataset_name", 2, {}, {"4": {"load_in_4bit": True}, "16": {"load_in_4bit": False}}),
    "idefics2_docvqa": ("idefics2_docvqa", "idefics2-8b", "dataset_name", 2, {}, {"4": {"load_in_4bit": True}, "16": {"load_in_4bit": False}}),
    "llava_two_stage align": ("llava_two_stage", "llava-1.5-7b", "data_path", 8, {"stage": "align", **SAME_ORDER}, {"16": {}}),
    "llava_two_stage instruct": (
        "llava_two_stage", "llava-1.5-7b", "data_path", 4, {"stage": "instruct", "lora_r": 128, **SAME_ORDER}, {"16": {}, "4": {"load_in_4bit": True}},
    ),
    "finetune_minicpm_lora": ("finetune_minicpm_lora", "minicpm-v-4.6", "data_path", 1, {}, {"16": {}, "4": {"q_lora": True}}),
}  # fmt: skip
RECIPES = list(dict.fromkeys(recipe for recipe, *_ in RUNS.values()))
# FLOP/s of dense matrices of 16 bits, added up in 32, as their makers say. Cards of such a name with less of it, for laptops or in slices (MIG), are measured.
PEAKS = {
    "B200": 2250e12, "H200 NVL": 836e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L40": 181e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100-PCIE": 112e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip
CARDS = (16, 24, 40, 80)
GB = 1e9
SPARE = 3e9  # bytes on the disk beside the weights: rows, their cache, logs


# ---------------------------------------------------------------- one run


def peaks(cuda):
    """Most bytes given out and reserved by PyTorch's allocator since `tidy`; None on a CPU."""
    return (
        {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        if cuda
        else None
    )


def outside(cuda):
    """Bytes of the GPU that are taken and not PyTorch's: CUDA's context, libraries, paged optimizer states, other programs."""
    if not cuda:
        return None
    free, whole = torch.cuda.mem_get_info()
    return whole - free - torch.cuda.memory_reserved()


class Finished(Exception):
    """All steps are done; what follows, saving, is not measured."""


class Watch(transformers.TrainerCallback):
    """Clocks a Trainer's steps, its waits for the loader, and counts the tokens and, in the last step of the warm-up, FLOPs."""

    def __init__(self, warm_up, cuda):
        self.warm_up, self.cuda, self.ends, self.waits, self.tokens = warm_up, cuda, [], [], []
        self.counter, self.recomputed, self.flops, self.uncounted, self.checkpointed = None, 0, None, None, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    def on_step_end(self, *args, **kwargs):
        if self.cuda:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_train_end(self, *args, **kwargs):
        raise Finished

    def batches(self, loader):
        """The loader's batches; how long it took to get each is remembered."""
        while True:
            start = time.perf_counter()
            batch = next(loader, None)
            if batch is None:
                return
            self.waits.append(time.perf_counter() - start)
            yield batch

    @contextlib.contextmanager
    def recomputing(self):
        """Put around what checkpointing computes once more: those FLOPs are the hardware's, not the model's."""
        before = self.counter.get_total_flops() if self.counter else 0
        try:
            yield
        finally:
            self.recomputed += self.counter.get_total_flops() - before if self.counter else 0

    def step(self, compute, inputs):
        """compute(inputs), and what is to be known of it."""
        self.tokens.append(inputs["attention_mask"].sum())
        if len(self.ends) != self.warm_up - 1:
            return compute(inputs)
        try:
            with counter() as self.counter:
                loss = compute(dict(inputs))
            self.flops = {
                "hardware": self.counter.get_total_flops(),
                "model": self.counter.get_total_flops() - self.recomputed,
            }
            return loss
        except Exception as e:  # a kernel that the counter does not get along with is no reason to measure nothing
            if ran_out(e):
                raise
            self.uncounted = f"{type(e).__name__}: {e}"[:300]
        finally:
            self.counter = None
        return compute(inputs)

    def figures(self):
        """What was measured after the warm-up, one value a step."""
        seconds = [end - start for start, end in itertools.pairwise(self.ends)][self.warm_up - 1 :]
        tokens, last = [int(n) for n in self.tokens], slice(self.warm_up, len(self.ends))
        return {
            "seconds": seconds,
            "waits": self.waits[last],
            "tokens": tokens[last],
            "tokens_counted": tokens[self.warm_up - 1],
        }


@contextlib.contextmanager
def watching(watch):
    """Within it, every Trainer is watched."""
    own, contexts = transformers.Trainer, lambda: (contextlib.nullcontext(), watch.recomputing())
    train, get_batch_samples, training_step = own.train, own.get_batch_samples, own.training_step

    def watched_train(self, *args, **kwargs):
        self.add_callback(watch)
        for name in (
            "activation_checkpointing_kwargs",
            "gradient_checkpointing_kwargs",
        ):  # TRL still reads the second, by its old name
            setattr(
                self.args,
                name,
                {"use_reentrant": False, **(getattr(self.args, name, None) or {}), "context_fn": contexts},
            )
        return train(self, *args, **kwargs)

    def watched_batches(self, loader, *args, **kwargs):
        return get_batch_samples(self, watch.batches(loader), *args, **kwargs)

    def watched_step(self, model, inputs, *args, **kwargs):
        return watch.step(lambda inputs: training_step(self, model, inputs, *args, **kwargs), inputs)

    with mock.patch.multiple(own, train=watched_train, get_batch_samples=watched_batches, training_step=watched_step):
        yield


@contextlib.contextmanager
def lent(recipe, loaded, cuda):
    """Within it, the recipe's load_model() loads once. Each call gets modules of its own around the same frozen weights, and copies
    of those that are trained. `loaded`: {} at first; {"model", "loading": its peak, "seconds"} then."""
    load_model = recipe.load_model

    def lend(settings, training):
        if "model" not in loaded:
            start = time.time()
            loaded["model"] = load_model(settings, training)
            loaded.update(loading=peaks(cuda), seconds=time.time() - start)
            tidy(cuda)
        shared = [p for p in loaded["model"].parameters() if not p.requires_grad]
        shared += [p.quant_state for p in shared if getattr(p, "quant_state", None) is not None]
        return copy.deepcopy(loaded["model"], {id(one): one for one in shared})

    with mock.patch.object(recipe, "load_model", lend):
        yield


def stock(recipe, flags, path):
    """What a user would run instead of the recipe's main(), with the same flags: TRL's trainer with its own collator, or transformers.Trainer
    with the recipe's."""
    settings, training = recipe.parse(flags)
    recipe.check(settings, training)
    transformers.set_seed(training.seed)
    processor, name = recipe.load_processor(settings), recipe.__name__
    if name in ("sft_llava", "dpo_idefics2"):
        import trl

        trainer = (trl.SFTTrainer if name == "sft_llava" else trl.DPOTrainer)(
            model=recipe.load_model(settings, training),
            args=training,
            train_dataset=for_trl(name, path),
            processing_class=processor,
            peft_config=recipe.lora_config(settings),
        )
    else:
        collator = recipe.Collator(processor, settings, training)
        rows, _ = recipe.load_data(settings, training, collator)
        model = recipe.load_model(settings, training)
        if name == "finetune_minicpm_lora":
            model = recipe.add_adapter(model, settings, recipe.lora_config(settings))
        elif adapter := recipe.lora_config(settings):
            model = get_peft_model(model, adapter)
        trainer = transformers.Trainer(model, training, collator, rows)
    trainer.train()


def ran_out(error):
    """Whether an exception says that there was not enough memory."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        one in said for one in ("out of memory", "alloc_failed", "cannot allocate memory")
    )


def flags_of(cell, job, path, out):
    """A configuration -> the recipe's flags."""
    recipe, model, data, _, own, bits = RUNS[cell["run"]]
    flags = {
        "model_name_or_path": Path(job["weights"]) / model,
        data: path,
        "output_dir": out,
        "max_steps": job["warm_up"] + job["steps"],
    }
    flags |= {
        "per_device_train_batch_size": cell["batch"],
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": cell["workers"],
    }
    flags |= {
        "activation_checkpointing": cell["checkpointing"],
        "seed": job["seed"],
        "report_to": "none",
        "disable_tqdm": True,
    }
    flags |= {f"{what}_strategy": "no" for what in ("eval", "save", "logging")} | own | bits[cell["bits"]]
    flags |= {} if job["cuda"] else {"use_cpu": True}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def one_run(side, cell, job, path, loaded):
    """One run of one side -> {"status": "ok", "out of memory" or "failed: why", ...}."""
    recipe, watch = importlib.import_module(RUNS[cell["run"]][0]), Watch(job["warm_up"], job["cuda"])
    tidy(job["cuda"])
    status = "ok"
    with tempfile.TemporaryDirectory(dir=job["scratch"]) as out, open(job["log"], "a") as log:
        flags = flags_of(cell, job, path, Path(out) / "run")
        print(f"\n--- {side}: {recipe.__name__} {' '.join(flags)}", file=log)
        try:
            with contextlib.redirect_stdout(log), watching(watch), lent(recipe, loaded, job["cuda"]):
                recipe.main(flags) if side == "recipe" else stock(recipe, flags, path)
            status = "failed: it ended without training"
        except Finished:
            if watch.checkpointed != cell["checkpointing"]:
                status = f"failed: activation checkpointing is {'on' if watch.checkpointed else 'off'} with this Transformers, whatever the flag says"
        except SystemExit as e:
            status = "out of memory" if ran_out(e) else f"failed: {e}"
        except Exception as e:
            status = "out of memory" if ran_out(e) else f"failed: {type(e).__name__}: {e}"
    found = {
        "status": status.split("\n")[0][:300],
        "memory": peaks(job["cuda"]),
        "flops": watch.flops,
        "uncounted": watch.uncounted,
    }
    if found["memory"] and loaded.get("loading"):
        found["memory"] = {kind: max(value, loaded["loading"][kind]) for kind, value in found["memory"].items()}
    loaded.setdefault("outside", outside(job["cuda"]))  # once: paged optimizers leave theirs behind in the process
    return found | (watch.figures() if status == "ok" else {})


def measure(cell, job, path, loaded):
    """A configuration, all of its runs -> the configuration with what was found, {"recipe": {...}, "stock": {...}}."""
    found = {}
    for n in range(job["rounds"] if len(cell["sides"]) > 1 else 1):
        for side in (
            cell["sides"] if n % 2 == 0 else cell["sides"][::-1]
        ):  # whoever is first may find the caches otherwise
            if side in found and found[side]["status"] != "ok":
                continue
            one = one_run(side, cell, job, path, loaded)
            if (before := found.get(side)) and one["status"] == "ok":
                one |= {what: before[what] + one[what] for what in ("seconds", "waits", "tokens")}
                if one["memory"]:
                    one["memory"] = {kind: max(value, before["memory"][kind]) for kind, value in one["memory"].items()}
            found[side] = one
    for one in found.values():
        if one["status"] == "ok":
            one["median"] = statistics.median(one["seconds"])
            one["waiting"] = sum(one["waits"]) / sum(one["seconds"])
            one["rows_per_second"] = cell["batch"] / one["median"]
            one["tokens_per_second"] = statistics.mean(one["tokens"]) / one["median"]
            if one["flops"]:
                one["flops_per_second"] = {
                    kind: n / one["tokens_counted"] * one["tokens_per_second"] for kind, n in one["flops"].items()
                }
    return {**cell, "status": found["recipe"]["status"], "outside": loaded.get("outside"), **found}


# ---------------------------------------------------------------- a process of its own for each recipe and precision


def peak_flops(name, device, side=8192):
    """(FLOP/s at 16 bits, where that is from) of a GPU; measured with matrices of `side` for one that PEAKS does not have, and for a CPU."""
    for pattern, peak in PEAKS.items():
        if re.search(rf"\b{pattern}\b(?! (D|Ti)\b)(?!.*(Laptop|Max-Q|MIG))", name):
            return peak, "data sheet"
    half = (
        torch.float32
        if device == "cpu"
        else torch.bfloat16
        if torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.float16
    )
    a, times = torch.ones(side, side, device=device, dtype=half), []
    for _ in range(8):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times), f"measured: a matmul of {side} in {str(half).removeprefix('torch.')}"


def describe(cuda):
    """The machine, as far as PyTorch knows it."""
    name = torch.cuda.get_device_name() if cuda else "CPU"
    peak, source = peak_flops(name, "cuda") if cuda else peak_flops(name, "cpu", 512)
    free, whole = torch.cuda.mem_get_info() if cuda else (None, None)
    return {
        "kind": "device",
        "name": name,
        "memory": whole,
        "free": free,
        "peak_flops": peak,
        "peak_flops_from": source,
    }


def work(job):
    """A job, whose cells are of one recipe and one precision: yields a description of the device, then one result for each cell."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    cells, cuda, loaded, too_large, took = job["cells"], job["cuda"], {}, {}, 0
    yield (device := describe(cuda))
    run, bits = cells[0]["run"], cells[0]["bits"]
    model, weights = RUNS[run][1], Path(job["weights"]) / RUNS[run][1]
    if cuda and not job["small"] and device["free"] < (least := least_memory(model, bits)):
        why = f"does not fit: the weights alone take {least / GB:.1f} GB in {bits} bits, {device['free'] / GB:.1f} GB of this GPU are free"
        yield from ({**cell, "status": why} for cell in cells)
        return
    make_weights(model, job["small"], weights, cuda)
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights)
    count = (job["warm_up"] + job["steps"] + 2) * max(cell["batch"] for cell in cells)
    path = make_rows(RUNS[run][0], count, tokenizer, Path(job["scratch"]) / "rows", job["seed"])
    for cell in cells:
        kind = (cell["checkpointing"], cell["workers"])
        if cell["batch"] > too_large.get(kind, cell["batch"]):
            yield {**cell, "status": f"not run: a batch of {too_large[kind]} did not fit"}
        elif job["until"] and job["until"] - time.time() < took:
            yield {**cell, "status": "not run: time is up"}
        else:
            start = time.time()
            result = measure(cell, job, path, loaded)
            took = time.time() - start - loaded.pop("seconds", 0)
            if result["status"] == "out of memory":
                too_large[kind] = cell["batch"]
            yield result


def first_gpu():
    """The one GPU that is used, as CUDA_VISIBLE_DEVICES names it: recipes refuse several in one process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def apart(job):
    """`work` in a process of its own, which a lack of memory, a crash or a deadline can end without harm to the rest. Yields its exit
    status, too."""
    folder = Path(tempfile.mkdtemp(dir=job["scratch"]))
    (folder / "job.json").write_text(json.dumps(job))
    # What a process that is killed leaves, the loader's sockets, goes with this folder; not in --scratch, whose path may be too long for a socket.
    temporary = tempfile.TemporaryDirectory(prefix="full-size-", ignore_cleanup_errors=True)
    environment = os.environ | {
        "HF_DATASETS_CACHE": f"{job['scratch']}/datasets",
        "CUDA_VISIBLE_DEVICES": first_gpu(),
        "TMPDIR": temporary.name,
    }
    with open(job["log"], "a") as log:
        command = [sys.executable, __file__, "--worker", str(folder)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        done, out = 0, folder / "results.jsonl"
        while True:
            ended = process.poll() is not None
            lines = out.read_text().splitlines(keepends=True) if out.exists() else []
            for line in (line for line in lines[done:] if line.endswith("\n")):
                done += 1
                yield json.loads(line)
            if ended:
                yield {"kind": "end", "status": process.returncode}
                return
            if job["until"] and time.time() > job["until"] + 60:
                return
            time.sleep(0.2)
    finally:
        with contextlib.suppress(ProcessLookupError):  # the loader's processes with it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        temporary.cleanup()


def last_words(log):
    """The last line of a log that says something."""
    lines = (
        [line.strip() for line in Path(log).read_text(errors="replace").splitlines() if line.strip()]
        if Path(log).exists()
        else []
    )
    return lines[-1][:300] if lines else "nothing was said"


# ---------------------------------------------------------------- what to run, in which order


def plan(args):
    """-> lists of configurations, each list of one recipe and precision: first every recipe as it is shipped, with all numbers of workers;
    then its other batches, then without checkpointing; then all of that in the other precision."""
    first, second, third = [], [], []
    for run, (recipe, _, _, own, _, bits) in RUNS.items():
        if recipe not in args.recipes:
            continue
        batches = args.batch_sizes or sorted({own, 1, 2, 4, 8})
        main = own if own in batches else batches[0]
        shown = [
            checkpointing
            for checkpointing in (True, False)
            if args.checkpointing in ("both", "on" if checkpointing else "off")
        ]
        for n, precision in enumerate(bits):
            if args.bits not in ("both", precision):
                continue
            cells = []
            for checkpointing in shown:
                for batch in (main, *(other for other in batches if other != main)):
                    stock = args.stock == "all" or args.stock == "default" and batch == main
                    cell = {
                        "run": run,
                        "bits": precision,
                        "checkpointing": checkpointing,
                        "batch": batch,
                        "workers": args.workers[0],
                    }
                    cells.append({**cell, "sides": ["recipe", "stock"] if stock else ["recipe"]})
                    if len(cells) == 1 and n == 0:
                        cells += [{**cell, "workers": workers, "sides": ["recipe"]} for workers in args.workers[1:]]
            if n == 0:
                head = len(args.workers)
                first.append(cells[:head])
                second.append(cells[head:])
            else:
                third.append(cells)
    return [cells for cells in first + second + third if cells]


def needed(args, weights):
    """Bytes that the weights still to be made will take on the disk, and what comes beside them."""
    models = {model for recipe, model, *_ in RUNS.values() if recipe in args.recipes}
    return SPARE / (1 if args.cuda and not args.small else 100) + missing(models, weights, args.small)


def fits(results, memory):
    """{(run, bits, checkpointing): {card in GB: largest batch that fits, as text}} from the peaks that were measured. A + says that a
    larger one may, as none was measured, or one only that a GPU of `memory` bytes, smaller than the card, had no room for."""
    table, out = {}, set()
    for one in (one for one in results if "recipe" in one):
        key, mine = (one["run"], one["bits"], one["checkpointing"]), one["recipe"]
        out |= {key} if mine["status"] == "out of memory" else set()
        if mine["status"] == "ok" and mine["memory"]:
            for kind, peak in mine["memory"].items():
                table.setdefault(key, {}).setdefault(kind, {})[one["batch"]] = peak + one["outside"]
    shown = {key: {} for key in table}
    for key, card in itertools.product(table, CARDS):
        sure, tight = (
            max((n for n, peak in table[key][kind].items() if peak <= card * GB), default=0)
            for kind in ("reserved", "allocated")
        )
        more = "+" if tight == max(table[key]["allocated"]) and not (key in out and card * GB <= memory) else ""
        shown[key][card] = (
            f"{sure}{more}" if sure and sure == tight else f"{sure or 'none'} ({tight}{more})" if tight else "none"
        )
    return shown


# ---------------------------------------------------------------- the report


def named(one, *more):
    """A configuration in words; with more, that differ in the batch only."""
    batches, checkpointing = (
        ", ".join(str(each["batch"]) for each in (one, *more)),
        "on" if one["checkpointing"] else "off",
    )
    return (
        f"{one['run']}, {one['bits']} bits, checkpointing {checkpointing}, {one['workers']} workers, batch {batches}"
    )


def show(results, device, console):
    """The tables, then all that was not measured, and why."""
    table = Table(title="Real size, random weights" if device.get("real") else SMALL)
    columns = "recipe|bits|ckpt|batch|workers|s/step|rows/s|tokens/s|h/100k rows|MFU|peak GB|reserved|waits|stock s/step|stock GB|stock/recipe"
    for n, column in enumerate(columns.split("|")):
        table.add_column(column, justify="right" if n else "left", no_wrap=n == 0)
    gigabytes = lambda one, kind: f"{one['memory'][kind] / GB:.1f}" if one["memory"] else "-"
    for one in (one for one in results if "recipe" in one):
        mine, other = one["recipe"], one.get("stock")
        cells = [
            one["run"],
            one["bits"],
            "on" if one["checkpointing"] else "off",
            str(one["batch"]),
            str(one["workers"]),
        ]
        if mine["status"] == "ok":
            cells += [f"{mine['median']:.3f}", f"{mine['rows_per_second']:.2f}", f"{mine['tokens_per_second']:,.0f}"]
            cells += [f"{1e5 / mine['rows_per_second'] / 3600:.1f}"]
            cells += [f"{mine['flops_per_second']['model'] / device['peak_flops']:.1%}" if mine["flops"] else "-"]
            cells += [gigabytes(mine, "allocated"), gigabytes(mine, "reserved"), f"{mine['waiting']:.0%}"]
        else:
            cells += [mine["status"].split(":")[0], *["-"] * 7]
        if other and other["status"] == "ok":
            cells += [f"{other['median']:.3f}", gigabytes(other, "allocated")]
            cells += [f"{other['median'] / mine['median']:.2f}x" if mine["status"] == "ok" else "-"]
        else:
            cells += [other["status"].split(":")[0] if other else "-", "-", "-"]
        table.add_row(*cells)
    if table.row_count:
        console.print(table)
    if shown := fits(results, device.get("memory")):
        table = Table(
            "recipe", "bits", "ckpt", *(f"{card} GB" for card in CARDS), title="Largest batch measured that fits"
        )
        for (run, bits, checkpointing), cards in shown.items():
            table.add_row(run, bits, "on" if checkpointing else "off", *cards.values())
        console.print(table)
    alike = lambda one: "recipe" in one or [one[key] for key in ("run", "bits", "checkpointing", "workers", "status")]
    for key, some in itertools.groupby(results, alike):
        if key is not True:
            console.print(f"{named(*some)}: {key[-1]}", markup=False)
    for one in results:
        for side in ("recipe", "stock"):
            found = one.get(side, {"status": "ok"})
            if found["status"] != "ok" or found.get("uncounted"):
                why = found["status"] if found["status"] != "ok" else f"FLOPs were not counted: {found['uncounted']}"
                console.print(f"{named(one)}, {side}: {why}", markup=False)


def machine(cuda):
    """GPU, driver and versions."""
    try:
        command = [
            "nvidia-smi",
            f"--id={first_gpu()}",
            "--query-gpu=name,driver_version,memory.total",
            "--format=csv,noheader",
        ]
        gpu = (
            subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip().splitlines()
            if cuda
            else []
        )
    except (OSError, subprocess.SubprocessError):
        gpu = []
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
    return {"gpu": gpu[0] if gpu else "unknown" if cuda else None, "cuda": torch.version.cuda, "python": sys.version.split()[0],
            "cores": os.cpu_count(), "versions": {name: metadata.version(name) for name in names}}  # fmt: skip


def parse(argv=None):
    """Flags, checked. Raises SystemExit with one line."""
    parser = flag_parser(__doc__)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"Default: all of {', '.join(RECIPES)}.")
    parser.add_argument(
        "--minutes", type=float, help="Start nothing that would not be done by then; what was not run is listed."
    )
    parser.add_argument("--bits", choices=["4", "16", "both"], default="both", help="Precision of the frozen weights.")
    parser.add_argument(
        "--checkpointing", choices=["on", "off", "both"], default="both", help="Activation checkpointing."
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="Default: the recipe's own, 1, 2, 4 and 8.")
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[4, 0],
        help="Loader processes; all but the first for the defaults only.",
    )
    parser.add_argument("--steps", type=int, default=5, help="Measured steps of a run.")
    parser.add_argument("--warm_up", type=int, default=2, help="Steps before them; FLOPs are counted in the last.")
    parser.add_argument("--rounds", type=int, default=2, help="Runs of each side, alternating.")
    parser.add_argument(
        "--stock",
        choices=["default", "all", "none"],
        default="default",
        help="Measure the stock trainer: for one batch, for all, never.",
    )
    parser.add_argument("--scratch", type=Path, help="Folder for weights and rows. Default: a temporary one.")
    parser.add_argument("--keep", action="store_true", help="Leave the weights there for another run.")
    parser.add_argument(
        "--small", action="store_true", help="The small copy that a machine without GPU gets, on a GPU."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of rows and adapters.")
    parser.add_argument(
        "--json",
        type=Path,
        help="Write everything to this file, again after all configurations of a recipe in one precision.",
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := [name for name in args.recipes if name not in RECIPES]:
        parser.error(f"no recipe {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    if (
        min(args.steps, args.warm_up, args.rounds, *(args.batch_sizes or [1])) < 1
        or min(args.workers) < 0
        or args.seed < 0
    ):
        parser.error("--steps, --warm_up, --rounds, --batch_sizes: at least 1; --workers, --seed: at least 0")
    if args.minutes is not None and not args.minutes > 0:
        parser.error("--minutes: above 0")
    check_json(parser, args.json)
    args.recipes, args.cuda = args.recipes or RECIPES, torch.cuda.is_available()
    args.batch_sizes, args.workers = list(dict.fromkeys(args.batch_sizes or [])), list(dict.fromkeys(args.workers))
    args.small |= not args.cuda
    return args


def main(argv=None):
    """Flags -> exit status: 1 where nothing could be measured, or it was interrupted."""
    args = parse(argv)
    if args.worker:
        job = json.loads((args.worker / "job.json").read_text())
        with open(args.worker / "results.jsonl", "a") as out:
            for one in work(job):
                print(json.dumps(one), file=out, flush=True)
        return 0
    until = time.time() + 60 * args.minutes if args.minutes else None
    groups = plan(args)
    if not groups:
        sys.exit(f"error: --bits {args.bits}: nothing to run, {', '.join(args.recipes)} has no such precision")
    try:
        for folder in [args.scratch] if args.scratch else []:
            folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="full-size-", dir=args.scratch)).absolute()
        weights = (args.scratch or scratch).absolute() / ("weights-small" if args.small else "weights")
        there = {folder.name for folder in weights.glob("*") if (folder / "done").exists()}
    except OSError as e:
        sys.exit(f"error: --scratch {args.scratch or tempfile.gettempdir()}: {e.strerror}")
    try:
        return run_all(args, groups, until, scratch, weights)
    finally:
        for folder in () if args.keep else weights.glob("*"):
            if folder.name not in there:  # what an earlier run has kept is not this one's to remove
                shutil.rmtree(folder, ignore_errors=True)
        if args.scratch or not args.keep:
            shutil.rmtree(scratch, ignore_errors=True)


def run_all(args, groups, until, scratch, weights):
    """All groups of configurations, one after the other; prints as it goes. -> the exit status of main."""
    free, need, say = shutil.disk_usage(scratch).free, needed(args, weights), lambda text: print(text, flush=True)
    if free < need:
        sys.exit(f"error: {need / GB:.3g} GB are needed in {scratch.parent} for the weights, {free / GB:.3g} GB are free: --scratch FOLDER on a "
                 "larger disk, or fewer recipes")  # fmt: skip
    about, results, device = machine(args.cuda), [], {}
    say(f"{about['gpu'] or 'no GPU found: a small copy of everything, on the CPU, in float32 for 16 bits'}; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items()))  # fmt: skip
    job = {
        "scratch": str(scratch),
        "weights": str(weights),
        "log": str(scratch / "log.txt"),
        "until": until,
        "cuda": args.cuda,
    }
    job |= {name: getattr(args, name) for name in ("small", "steps", "warm_up", "rounds", "seed")}
    stopped = False
    for cells in groups:
        ran, why, end = 0, "not run: interrupted", None
        try:
            for one in apart({**job, "cells": cells}) if not (stopped or until and time.time() > until) else ():
                if "kind" in one:
                    device, end = (one, end) if one["kind"] == "device" else (device, one["status"])
                    continue
                ran += 1
                results.append(one)
                sides = [f"{side} {one[side]['median']:.3f} s" if one[side]["status"] == "ok" else f"{side} {one[side]['status']}"
                         for side in one["sides"] if side in one]  # fmt: skip
                say(f"  {named(one)}: {', '.join(sides) or one['status']}")
            if not stopped:
                over = until and time.time() > until
                why = (
                    "not run: time is up"
                    if over
                    else f"failed: its process ended early, exit status {end}: {last_words(job['log'])}"
                )
        except KeyboardInterrupt:
            stopped = True
        results += [{**cell, "status": why} for cell in cells[ran:]]
        if args.json:
            given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
            fit = [
                {"run": run, "bits": bits, "checkpointing": on, "largest_batch": cards}
                for (run, bits, on), cards in fits(results, device.get("memory")).items()
            ]
            everything = {"arguments": given, "machine": about, "device": device, "results": results, "fits": fit}
            args.json.write_text(json.dumps(everything, indent=1))
    if device:
        say(f"peak for MFU: {device['peak_flops'] / 1e12:.3g} TFLOP/s ({device['peak_flops_from']})")
    show(
        results,
        {**device, "real": not args.small},
        Console(width=None if sys.stdout.isatty() else 190, highlight=False),
    )
    if args.keep:
        say(f"the weights are kept in {weights}")
    return 0 if not stopped and any(one.get("recipe", {}).get("status") == "ok" for one in results) else 1


if __name__ == "__main__":
    start(main)  # ended by Ctrl+C or SIGTERM: its processes end, its weights are removed, what was measured is shown
