"""Does it fit, how long does it take, is it faster than what I have? Every recipe at its model's real size, on one
CUDA GPU, with random weights and made-up rows: nothing is downloaded.

    python benchmarks/full_size.py --minutes 10              # all recipes' defaults first, then what time allows
    python benchmarks/full_size.py sft_llava dpo_idefics2 --json gpu.json
    python benchmarks/full_size.py idefics2_docvqa --bits 4 --checkpointing on --batch_sizes 1 2 4 8 16
    python benchmarks/full_size.py --scratch /mnt/disk --keep    # weights stay there for the next time: 34 GB in all
    python benchmarks/full_size.py --steps 2               # without a GPU: a small copy of it all, to see that it runs

Each configuration is a run of the recipe's own main(), by flags, on a model with the published widths and depths and
as many parameters as the published one has, and on rows read from disk: a JPEG of 1000 x 800, answers of 60-150 tokens
(documents: 3-15). Measured are whole optimizer steps without accumulation, the wait for the loader included, by the
wall clock of a device that is synchronized after each. The stock side is what a user would run instead, on the same
base, LoRA, flags and rows: TRL's SFTTrainer and DPOTrainer with their own collators, transformers.Trainer with the
recipe's. Runs of the two alternate; a time is the median of all steps of all runs, the first steps of each left out.
Batch "auto" is the recipe without a word about its batch: the step that it ships, accumulated from the batches that
fit, half as many of these steps.

  s/step, rows/s, tokens/s   a row of DPO is a pair, its tokens those of both sequences, images included
  MFU        model FLOP/s (forward and backward, no recomputation) by the GPU's peak: a table of dense 16-bit peaks, or
             for other GPUs a measured matmul. FLOPs are counted by PyTorch on one of the first steps, and taken to go
             with the number of tokens; inside kernels of Triton nothing is counted
  peak GB    most that PyTorch's allocator had given out, and had reserved, from loading to the last step; 10^9 bytes
  waits      share of the time in which the GPU waited for the loader
  idle       share of the time in which the GPU ran no kernel and copied nothing, for whatever reason: what kernels
             take is recorded for one forward and backward pass before the measured steps, by tokens as FLOPs are
  fits       largest batch measured (+: or more) whose peak is below a card's size, beside what CUDA and others took
             outside of PyTorch; (n) only if the allocator needs no more than it gives out, without its reserve here

MiniCPM-V is 4.6; 2.6 is code from the hub and left out, as is training LLaVA's language model in full, which no single
GPU holds. Random weights cost what trained ones cost. Nothing here says how well anything is learnt. It has not been
run on a GPU yet."""

import argparse
import contextlib
import copy
import functools
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
from dataclasses import dataclass, field
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
from measure import (  # noqa: E402
    SMALL,
    add_recipes,
    as_flags,
    benchmark_parser,
    check_json,
    check_recipes,
    counter,
    on_or_off,
    start,
    write_json,
)
from peft import get_peft_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

# Precisions of the frozen weights, the recipe's own first, and their flags.
FOUR_BITS_FIRST = {"4": {"load_in_4bit": True}, "16": {"load_in_4bit": False}}
SAME_ORDER = {"group_by_modality_length": False}  # or the two sides would not see the same rows


@dataclass(frozen=True)
class Run:
    """A recipe as it is run at its model's real size."""

    recipe: str
    model: str
    batch: int  # the recipe's own
    precisions: dict = field(default_factory=lambda: FOUR_BITS_FIRST)
    flags: dict = field(default_factory=dict)


RUNS = {
    "sft_llava": Run("sft_llava", "llava-1.5-7b", 1),
    "dpo_idefics2": Run("dpo_idefics2", "idefics2-8b", 2),
    "idefics2_docvqa": Run("idefics2_docvqa", "idefics2-8b", 2),
    "llava_two_stage align": Run("llava_two_stage", "llava-1.5-7b", 8, {"16": {}}, {"stage": "align", **SAME_ORDER}),
    "llava_two_stage instruct": Run(
        "llava_two_stage",
        "llava-1.5-7b",
        4,
        {"16": {}, "4": {"load_in_4bit": True}},
        {"stage": "instruct", "lora_r": 128, **SAME_ORDER},
    ),
    "finetune_minicpm_lora": Run("finetune_minicpm_lora", "minicpm-v-4.6", 1, {"16": {}, "4": {"q_lora": True}}),
}
RECIPES = list(dict.fromkeys(run.recipe for run in RUNS.values()))
# FLOP/s of dense matrices of 16 bits, added up in 32, as their makers say. Cards of such a name with less of it, for
# laptops or in slices (MIG), are measured.
PEAKS = {
    "B200": 2250e12,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100-PCIE": 112e12,
    "V100": 125e12,
    "T4": 65e12,
}
OF_RECIPES = ("trained_at", "targets", "pairs")  # in a batch, for a recipe's own trainer
CARDS = (16, 24, 40, 80)
GB = 1e9
SPARE = 3e9  # bytes on the disk beside the weights: rows, their cache, logs


# ---------------------------------------------------------------- one run


def peaks(cuda):
    """Most bytes given out and reserved by PyTorch's allocator since `tidy`; None on a CPU."""
    if not cuda:
        return None
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def outside(cuda):
    """Bytes of the GPU that are taken and not PyTorch's: CUDA's context, libraries, paged optimizer states, other
    programs."""
    if not cuda:
        return None
    free, whole = torch.cuda.mem_get_info()
    return whole - free - torch.cuda.memory_reserved()


class Finished(Exception):
    """All steps are done; what follows, saving, is not measured."""


class Watch(transformers.TrainerCallback):
    """Clocks a Trainer's steps and its waits for the loader, and counts the tokens and, in the first batch of the last
    step of the warm-up, the FLOPs and, with `profiled`, the time of the GPU's kernels."""

    def __init__(self, warm_up, cuda, profiled=False):
        self.warm_up, self.cuda, self.profiled = warm_up, cuda, profiled
        self.ends, self.waits, self.tokens = [], [], []
        self.counter, self.recomputed = None, 0
        self.flops = self.uncounted = self.checkpointed = None
        self.batch = self.rows = self.tokens_counted = self.kernel_seconds = None
        self.has_tried = False  # batches, before the training

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Remember whether activations are checkpointed, and the batch, which the recipe may have chosen."""
        self.checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        self.batch = args.per_device_train_batch_size
        self.rows = self.batch * args.gradient_accumulation_steps
        if self.cuda and self.has_tried:  # what was tried is not the run
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, *args, **kwargs):
        """Remember when a step has ended."""
        if self.cuda:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_train_end(self, *args, **kwargs):
        """Go no further."""
        raise Finished

    def batches(self, loader):
        """The loader's batches for one step; how long it took to get them is remembered."""
        self.waits.append(0.0)
        while True:
            start = time.perf_counter()
            batch = next(loader, None)
            if batch is None:
                return
            self.waits[-1] += time.perf_counter() - start
            yield batch

    @contextlib.contextmanager
    def recomputing(self):
        """Put around what checkpointing computes once more: those FLOPs are the hardware's, not the model's."""
        counter = self.counter
        before = counter.get_total_flops() if counter else 0
        try:
            yield
        finally:
            if counter:
                self.recomputed += counter.get_total_flops() - before

    @contextlib.contextmanager
    def profiling(self):
        """Put around a forward and backward pass: how long the GPU's kernels run in it is remembered."""
        if not (self.cuda and self.profiled):
            yield
            return
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            yield
            torch.cuda.synchronize()
        if self.uncounted is None:  # else the pass has run twice
            self.kernel_seconds = busy_seconds(profile.profiler.kineto_results.events())

    def step(self, compute, inputs):
        """compute(inputs); its tokens, and of one batch what it costs, are remembered."""
        if self.checkpointed is None:  # not in training: the recipe tries a batch to choose its own
            self.has_tried = True
            return compute(inputs)
        tokens = inputs["attention_mask"].sum()
        is_first = len(self.tokens) == len(self.ends)  # of several batches that make a step
        if is_first:
            self.tokens.append(0)
        self.tokens[-1] = self.tokens[-1] + tokens
        if len(self.ends) != self.warm_up - 1 or not is_first:
            return compute(inputs)
        self.tokens_counted = tokens
        with self.profiling():
            return self.count(compute, inputs)

    def count(self, compute, inputs):
        """compute(inputs); its FLOPs are remembered."""
        try:
            with counter() as self.counter:
                loss = compute(dict(inputs))
            total = self.counter.get_total_flops()
            self.flops = {"hardware": total, "model": total - self.recomputed}
            return loss
        except Exception as error:  # a kernel that the counter does not know is no reason to measure nothing
            if ran_out(error):
                raise
            self.uncounted = f"{type(error).__name__}: {error}"[:300]
        finally:
            self.counter = None
        return compute(inputs)

    def figures(self):
        """What was measured after the warm-up, one value a step."""
        seconds = [end - start for start, end in itertools.pairwise(self.ends)][self.warm_up - 1 :]
        tokens, measured = [int(n) for n in self.tokens], slice(self.warm_up, len(self.ends))
        return {
            "batch": self.batch,
            "rows": self.rows,
            "seconds": seconds,
            "waits": self.waits[measured],
            "tokens": tokens[measured],
            "tokens_counted": int(self.tokens_counted),
            "kernel_seconds": self.kernel_seconds,
        }


def busy_seconds(events):
    """The profiler's events -> seconds in which a GPU computed or copied, counted once where it did several things at
    a time; None where nothing was recorded, which a machine may forbid."""
    spans = []
    for event in events:
        on_gpu = event.device_type() == torch.autograd.DeviceType.CUDA
        if on_gpu and not event.is_user_annotation():  # a span that somebody named, with its pauses
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
    busy = until = 0
    for begin, end in sorted(spans):
        busy += max(0, end - max(begin, until))
        until = max(until, end)
    return busy / 1e9 if spans else None


@contextlib.contextmanager
def watching(watch):
    """Within it, every Trainer is watched."""
    own = transformers.Trainer
    train, get_batch_samples, training_step = own.train, own.get_batch_samples, own.training_step

    def contexts():
        return contextlib.nullcontext(), watch.recomputing()

    def watched_train(self, *args, **kwargs):
        self.add_callback(watch)
        # TRL still reads the second one, by its old name.
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            options = getattr(self.args, name, None) or {}
            setattr(self.args, name, {"use_reentrant": False, **options, "context_fn": contexts})
        return train(self, *args, **kwargs)

    def watched_batches(self, loader, *args, **kwargs):
        if watch.checkpointed is None:  # not in training
            return get_batch_samples(self, loader, *args, **kwargs)
        return get_batch_samples(self, watch.batches(loader), *args, **kwargs)

    def watched_step(self, model, inputs, *args, **kwargs):
        return watch.step(lambda inputs: training_step(self, model, inputs, *args, **kwargs), inputs)

    with mock.patch.multiple(own, train=watched_train, get_batch_samples=watched_batches, training_step=watched_step):
        yield


@contextlib.contextmanager
def lent(recipe, loaded, cuda):
    """Within it, the recipe's load_model() loads once. Each call gets modules of its own around the same frozen
    weights, and copies of those that are trained. `loaded`: {} at first; {"model", "loading": its peak, "seconds"}
    then."""
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
    """What a user would run instead of the recipe's main(), with the same flags: TRL's trainer with its own collator,
    or transformers.Trainer with the recipe's."""
    settings, training = recipe.parse(flags)
    recipe.check(settings, training)
    transformers.set_seed(training.seed)
    processor, name = recipe.load_processor(settings), recipe.__name__
    if name in ("sft_llava", "dpo_idefics2"):
        import trl  # here: the others' processes do without it

        trainer_class = trl.SFTTrainer if name == "sft_llava" else trl.DPOTrainer
        trainer = trainer_class(
            model=recipe.load_model(settings, training),
            args=training,
            train_dataset=for_trl(name, path),
            processing_class=processor,
            peft_config=recipe.lora_config(settings),
        )
    else:
        collator = recipe.Collator(processor, settings, training)
        rows, _ = recipe.load_data(settings, training, collator)
        model, adapter = recipe.load_model(settings, training), recipe.lora_config(settings)
        if name == "finetune_minicpm_lora":
            model = recipe.add_adapter(model, settings, adapter)
        elif adapter is not None:
            model = get_peft_model(model, adapter)
        trainer = transformers.Trainer(model, training, functools.partial(stock_batch, collator), rows)
    trainer.train()


def stock_batch(collator, rows):
    """A batch of a recipe's collator without what only the recipe's own trainer reads."""
    batch = collator(rows)
    for name in OF_RECIPES:
        batch.pop(name, None)
    return batch


def ran_out(error):
    """Whether an exception says that there was not enough memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower()
    return any(part in message for part in ("out of memory", "alloc_failed", "cannot allocate memory"))


def flags_of(cell, job, path, out):
    """A configuration -> the recipe's flags."""
    run = RUNS[cell["run"]]
    flags = {
        "model_name_or_path": Path(job["weights"]) / run.model,
        "dataset_name": path,
        "output_dir": out,
        "max_steps": sum(lengths(cell, job)),
        "dataloader_num_workers": cell["workers"],
        "activation_checkpointing": cell["checkpointing"],
        "seed": job["seed"],
        "report_to": "none",
        "disable_tqdm": True,
        **dict.fromkeys(["eval_strategy", "save_strategy", "logging_strategy"], "no"),
        **run.flags,
        **run.precisions[cell["bits"]],
    }
    if cell["batch"] != "auto":
        flags |= {"per_device_train_batch_size": cell["batch"], "gradient_accumulation_steps": 1}
    if not job["cuda"]:
        flags["use_cpu"] = True
    return as_flags(flags)


def lengths(cell, job):
    """(steps of the warm-up, measured steps) of a run: fewer where one is made of many batches."""
    if cell["batch"] == "auto":
        return 1, max(1, job["steps"] // 2)
    return job["warm_up"], job["steps"]


def rows_needed(cell, job, path):
    """How many rows a configuration goes through, and two batches more."""
    rows = cell["batch"]
    if rows == "auto":
        recipe = importlib.import_module(RUNS[cell["run"]].recipe)
        training = recipe.parse(flags_of(cell, job, path, path))[1]
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return (sum(lengths(cell, job)) + 2) * rows


def run_and_see(train, cell, watch):
    """Call train() -> how it ended: "ok", "out of memory" or "failed: why"."""
    try:
        train()
        return "failed: it ended without training"
    except Finished:
        if watch.checkpointed == cell["checkpointing"]:
            return "ok"
        found = "on" if watch.checkpointed else "off"
        return f"failed: activation checkpointing is {found} with this Transformers, whatever the flag says"
    except (Exception, SystemExit) as error:
        if ran_out(error):
            return "out of memory"
        cause = str(error) if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        return f"failed: {cause}".split("\n")[0][:300]


def one_run(side, cell, job, path, loaded):
    """One run of one side -> {"status": "ok", "out of memory" or "failed: why", ...}."""
    recipe = importlib.import_module(RUNS[cell["run"]].recipe)
    watch = Watch(lengths(cell, job)[0], job["cuda"], cell.get("profiled", False))
    tidy(job["cuda"])
    with tempfile.TemporaryDirectory(dir=job["scratch"]) as out, open(job["log"], "a") as log:
        flags = flags_of(cell, job, path, Path(out) / "run")
        print(f"\n--- {side}: {recipe.__name__} {' '.join(flags)}", file=log)
        if side == "recipe":
            train = functools.partial(recipe.main, flags)
        else:
            train = functools.partial(stock, recipe, flags, path)
        with contextlib.redirect_stdout(log), watching(watch), lent(recipe, loaded, job["cuda"]):
            status = run_and_see(train, cell, watch)
    found = {"status": status, "memory": peaks(job["cuda"]), "flops": watch.flops, "uncounted": watch.uncounted}
    if found["memory"] and loaded.get("loading"):
        found["memory"] = {kind: max(value, loaded["loading"][kind]) for kind, value in found["memory"].items()}
    loaded.setdefault("outside", outside(job["cuda"]))  # once: paged optimizers leave theirs behind in the process
    if status == "ok":
        found |= watch.figures()
    return found


def measure(cell, job, path, loaded):
    """A configuration, all of its runs -> the configuration with what was found, {"recipe": {...}, "stock": {...}}."""
    found, rounds = {}, job["rounds"] if len(cell["sides"]) > 1 else 1
    for n in range(rounds):
        order = (
            cell["sides"] if n % 2 == 0 else cell["sides"][::-1]
        )  # else the second one would always find warm caches
        for side in order:
            before = found.get(side)
            if before and before["status"] != "ok":
                continue
            # last, for a GPU that was profiled may be slower; then both sides alike, before their measured steps
            one = one_run(side, {**cell, "profiled": n == rounds - 1}, job, path, loaded)
            found[side] = joined(before, one) if before and one["status"] == "ok" else one
    for one in found.values():
        if one["status"] == "ok":
            one |= rates(one)
    return {**cell, "status": found["recipe"]["status"], "outside": loaded.get("outside"), **found}


def joined(before, one):
    """Two runs of a side as one."""
    one = one | {what: before[what] + one[what] for what in ("seconds", "waits", "tokens")}
    if one["memory"]:
        one["memory"] = {kind: max(value, before["memory"][kind]) for kind, value in one["memory"].items()}
    return one


def rates(one):
    """What follows from the figures of all steps."""
    median = statistics.median(one["seconds"])
    tokens = statistics.mean(one["tokens"]) / median
    found = {"median": median, "rows_per_second": one["rows"] / median, "tokens_per_second": tokens, "idle": None}
    if one["kernel_seconds"] is not None:
        found["idle"] = max(0.0, 1 - one["kernel_seconds"] / one["tokens_counted"] * tokens)
    found["waiting"] = sum(one["waits"]) / sum(one["seconds"])
    if one["flops"]:
        found["flops_per_second"] = {kind: n / one["tokens_counted"] * tokens for kind, n in one["flops"].items()}
    return found


# ---------------------------------------------------------------- a process of its own for each recipe and precision


def peak_flops(name, device, side=8192):
    """(FLOP/s at 16 bits, where that is from) of a GPU; measured with matrices of `side` for a GPU that PEAKS does not
    have, and for a CPU."""
    for pattern, peak in PEAKS.items():
        if re.search(rf"\b{pattern}\b(?! (D|Ti)\b)(?!.*(Laptop|Max-Q|MIG))", name):
            return peak, "data sheet"
    dtype = torch.float32
    if device != "cpu":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if has_bf16 else torch.float16
    matrix, times = torch.ones(side, side, device=device, dtype=dtype), []
    for _ in range(8):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times), f"measured: a matmul of {side} in {str(dtype).removeprefix('torch.')}"


def describe(cuda):
    """The machine, as far as PyTorch knows it."""
    if cuda:
        name, (free, whole) = torch.cuda.get_device_name(), torch.cuda.mem_get_info()
        peak, source = peak_flops(name, "cuda")
    else:
        name, free, whole = "CPU", None, None
        peak, source = peak_flops(name, "cpu", 512)
    memory = {"memory": whole, "free": free}
    return {"kind": "device", "name": name, **memory, "peak_flops": peak, "peak_flops_from": source}


def work(job):
    """A job, whose cells are of one recipe and one precision: yields a description of the device, then one result for
    each cell."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    cells, cuda = job["cells"], job["cuda"]
    device = describe(cuda)
    yield device
    run, bits = RUNS[cells[0]["run"]], cells[0]["bits"]
    least = least_memory(run.model, bits)
    if cuda and not job["small"] and device["free"] < least:
        why = f"the weights alone take {least / GB:.1f} GB in {bits} bits"
        why = f"does not fit: {why}, {device['free'] / GB:.1f} GB of this GPU are free"
        yield from ({**cell, "status": why} for cell in cells)
        return
    weights = Path(job["weights"]) / run.model
    make_weights(run.model, job["small"], weights, cuda)
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights)
    folder = Path(job["scratch"]) / "rows"
    count = max(rows_needed(cell, job, folder) for cell in cells)
    path = make_rows(run.recipe, count, tokenizer, folder, job["seed"])
    loaded, too_large, took = {}, {}, 0
    for cell in cells:
        kind = (cell["checkpointing"], cell["workers"], cell["batch"] == "auto")
        if cell["batch"] != "auto" and cell["batch"] > too_large.get(kind, cell["batch"]):
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
    """`work` in a process of its own, which a lack of memory, a crash or a deadline can end without harm to the rest.
    Yields its exit status, too."""
    folder = Path(tempfile.mkdtemp(dir=job["scratch"]))
    (folder / "job.json").write_text(json.dumps(job))
    # What a killed process leaves, the loader's sockets, goes with this folder; not with --scratch, whose path may be
    # too long for a socket.
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
    if not Path(log).exists():
        return "nothing was said"
    lines = [line.strip() for line in Path(log).read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was said"


# ---------------------------------------------------------------- what to run, in which order


def plan(args):
    """-> lists of configurations, each list of one recipe and precision: first every recipe with its own batch as a
    number beside the stock side, as it is shipped, and with other numbers of workers; then its other batches, then
    without checkpointing; then all of that in the other precision. Recipes in the order in which they are named."""
    first, second, third = [], [], []
    wanted = [item for item in RUNS.items() if item[1].recipe in args.recipes]
    for name, run in sorted(wanted, key=lambda item: args.recipes.index(item[1].recipe)):
        for bits in run.precisions:
            own = next(iter(run.precisions))
            if args.bits != "both" and bits != (own if args.bits == "own" else args.bits):
                continue
            cells = configurations(args, name, bits)
            if bits != own:
                third.append(cells)
                continue
            other_workers = [{**cells[0], "workers": n, "sides": ["recipe"]} for n in args.workers[1:]]
            shipped = [cell for cell in cells[1:2] if cell["batch"] == "auto"]  # in one process with the first
            first.append([cells[0], *shipped, *other_workers])
            second.append(cells[1 + len(shipped) :])
    return [cells for cells in first + second + third if cells]


def configurations(args, name, bits):
    """All configurations of a run in one precision, those with checkpointing and the recipe's own batch first."""
    own = RUNS[name].batch
    batches = args.batch_sizes or ["own", "auto", 1, 2, 4, 8]
    batches = list(dict.fromkeys(own if batch == "own" else batch for batch in batches))
    main = own if own in batches else batches[0]
    cells = []
    for checkpointing in on_or_off(args.checkpointing):
        for batch in (main, *(other for other in batches if other != main)):
            with_stock = args.stock == "all" or (args.stock == "default" and batch == main)
            with_stock = with_stock and batch != "auto"  # which the stock side does not know
            cell = {"run": name, "bits": bits, "checkpointing": checkpointing, "batch": batch}
            sides = ["recipe", "stock"] if with_stock else ["recipe"]
            cells.append({**cell, "workers": args.workers[0], "sides": sides})
    return cells


def needed(args, weights):
    """Bytes that the weights still to be made will take on the disk, and what comes beside them."""
    models = {run.model for run in RUNS.values() if run.recipe in args.recipes}
    spare = SPARE / 100 if args.small else SPARE
    return spare + missing(models, weights, args.small)


def fits(results, memory):
    """{(run, bits, checkpointing): {card in GB: largest batch that fits, as text}} from the peaks that were measured.
    A + says that a larger one may, as none was measured, or one only that a GPU of `memory` bytes, smaller than the
    card, had no room for."""
    peaks_of, out = {}, set()
    for one in results:
        if "recipe" not in one or one["batch"] == "auto":
            continue
        key, mine = (one["run"], one["bits"], one["checkpointing"]), one["recipe"]
        if mine["status"] == "out of memory":
            out.add(key)
        if mine["status"] == "ok" and mine["memory"]:
            batches = peaks_of.setdefault(key, {})
            batches[one["batch"]] = {kind: peak + one["outside"] for kind, peak in mine["memory"].items()}
    shown = {}
    for key, batches in peaks_of.items():
        shown[key] = {}
        for card in CARDS:
            may_be_more = key not in out or card * GB > memory
            shown[key][card] = largest_batch(batches, card * GB, may_be_more)
    return shown


def largest_batch(peaks_of, size, may_be_more):
    """{batch: its peaks} -> the largest that fits into a memory of `size` bytes, as text: with the allocator's
    reserve, and, in parentheses, without it."""
    sure = max((n for n, peak in peaks_of.items() if peak["reserved"] <= size), default=0)
    tight = max((n for n, peak in peaks_of.items() if peak["allocated"] <= size), default=0)
    if not tight:
        return "none"
    more = "+" if tight == max(peaks_of) and may_be_more else ""
    if sure == tight:
        return f"{sure}{more}"
    return f"{sure or 'none'} ({tight}{more})"


# ---------------------------------------------------------------- the report


COLUMNS = ["recipe", "bits", "ckpt", "batch", "workers", "s/step", "rows/s", "tokens/s", "h/100k rows", "MFU"]
COLUMNS += ["peak GB", "reserved", "waits", "idle", "stock s/step", "stock GB", "stock/recipe"]


def named(one, *more):
    """A configuration in words; with more, that differ in the batch only."""
    batches = ", ".join(str(each["batch"]) for each in (one, *more))
    checkpointing = "on" if one["checkpointing"] else "off"
    kind = f"{one['run']}, {one['bits']} bits, checkpointing {checkpointing}, {one['workers']} workers"
    return f"{kind}, batch {batches}"


def gigabytes(one, kind):
    """A peak of a run, as a cell of the table."""
    return f"{one['memory'][kind] / GB:.1f}" if one["memory"] else "-"


def table_row(one, peak):
    """A result -> the cells of its row. `peak`: FLOP/s of the device."""
    mine, other = one["recipe"], one.get("stock")
    checkpointing = "on" if one["checkpointing"] else "off"
    batch = str(one["batch"])
    if batch == "auto" and mine["status"] == "ok":
        batch = f"auto: {mine['batch']}, {mine['rows']} a step"
    cells = [one["run"], one["bits"], checkpointing, batch, str(one["workers"])]
    if mine["status"] == "ok":
        hours = 1e5 / mine["rows_per_second"] / 3600
        cells += [f"{mine['median']:.3f}", f"{mine['rows_per_second']:.2f}", f"{mine['tokens_per_second']:,.0f}"]
        cells += [f"{hours:.1f}", f"{mine['flops_per_second']['model'] / peak:.1%}" if mine["flops"] else "-"]
        cells += [gigabytes(mine, "allocated"), gigabytes(mine, "reserved"), f"{mine['waiting']:.0%}"]
        cells += ["-" if mine["idle"] is None else f"{mine['idle']:.0%}"]
    else:
        cells += [mine["status"].split(":")[0], *["-"] * 8]
    if other is None or other["status"] != "ok":
        return [*cells, other["status"].split(":")[0] if other else "-", "-", "-"]
    ratio = f"{other['median'] / mine['median']:.2f}x" if mine["status"] == "ok" else "-"
    return [*cells, f"{other['median']:.3f}", gigabytes(other, "allocated"), ratio]


def show(results, device, console):
    """The tables, then all that was not measured, and why."""
    table = Table(title="Real size, random weights" if device.get("real") else SMALL)
    for n, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if n else "left", no_wrap=n == 0)
    for one in results:
        if "recipe" in one:
            table.add_row(*table_row(one, device["peak_flops"]))
    if table.row_count:
        console.print(table)
    shown = fits(results, device.get("memory"))
    if shown:
        cards = [f"{card} GB" for card in CARDS]
        table = Table("recipe", "bits", "ckpt", *cards, title="Largest batch measured that fits")
        for (run, bits, checkpointing), batches in shown.items():
            table.add_row(run, bits, "on" if checkpointing else "off", *batches.values())
        console.print(table)
    show_failures(results, console)


def why_not_run(one):
    """What results that were not run have in common, where they are listed in one line; None for those that were."""
    if "recipe" in one:
        return None
    return [one[key] for key in ("run", "bits", "checkpointing", "workers", "status")]


def show_failures(results, console):
    """A line for all that was not run, and for what failed or was not counted."""
    for key, some in itertools.groupby(results, why_not_run):
        if key is not None:
            console.print(f"{named(*some)}: {key[-1]}", markup=False)
    for one in results:
        for side in one.get("sides", ()):
            found = one.get(side, {"status": "ok"})
            why = found["status"]
            if why == "ok" and found.get("uncounted"):
                why = f"FLOPs were not counted: {found['uncounted']}"
            if why != "ok":
                console.print(f"{named(one)}, {side}: {why}", markup=False)


def machine(cuda):
    """GPU, driver and versions."""
    gpu = None
    if cuda:
        command = ["nvidia-smi", f"--id={first_gpu()}", "--query-gpu=name,driver_version,memory.total"]
        gpu = "unknown"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run([*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=30)
            gpu = (done.stdout.strip().splitlines() or [gpu])[0]
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
    versions = {name: metadata.version(name) for name in names}
    python = sys.version.split()[0]
    return {"gpu": gpu, "cuda": torch.version.cuda, "python": python, "cores": os.cpu_count(), "versions": versions}


def batch_size(text):
    """A value of --batch_sizes: own, auto or a number. Raises ValueError."""
    return text if text in ("own", "auto") else int(text)


def flag_definitions():
    """The parser of this program's flags."""
    parser = benchmark_parser(__doc__)
    add_recipes(parser, RECIPES)

    def add(name, default=None, text=None, **options):
        parser.add_argument(name, default=default, help=text, **options)

    add("--minutes", None, "Start nothing that would not be done by then; what was not run is listed.", type=float)
    add("--bits", "both", "Precision of the frozen weights; own: the recipe's.", choices=["4", "16", "own", "both"])
    add("--checkpointing", "both", "Activation checkpointing.", choices=["on", "off", "both"])
    add("--batch_sizes", [], "Numbers, own, auto. Default: own auto 1 2 4 8.", type=batch_size, nargs="+")
    add("--workers", [4, 0], "Loader processes; all but the first for the defaults only.", type=int, nargs="+")
    add("--steps", 5, "Measured steps of a run.", type=int)
    add("--warm_up", 2, "Steps before them; FLOPs are counted in the last.", type=int)
    add("--rounds", 2, "Runs of each side, alternating.", type=int)
    stock_help = "Measure the stock trainer: for one batch, for all, never."
    add("--stock", "default", stock_help, choices=["default", "all", "none"])
    add("--scratch", None, "Folder for weights and rows. Default: a temporary one.", type=Path)
    add("--keep", False, "Leave the weights there for another run.", action="store_true")
    add("--small", False, "The small copy that a machine without GPU gets, on a GPU.", action="store_true")
    add("--seed", 0, "Of rows and adapters.", type=int)
    add("--worker", None, argparse.SUPPRESS, type=Path)
    return parser


def parse(argv=None):
    """Flags, checked. Raises SystemExit with one line."""
    parser = flag_definitions()
    args = parser.parse_args(argv)
    check_recipes(parser, args, RECIPES)
    counts = [args.steps, args.warm_up, args.rounds, *(n for n in args.batch_sizes if isinstance(n, int))]
    if min(counts) < 1 or min(args.workers) < 0 or args.seed < 0:
        parser.error("--steps, --warm_up, --rounds, --batch_sizes: at least 1; --workers, --seed: at least 0")
    if args.minutes is not None and not args.minutes > 0:
        parser.error("--minutes: above 0")
    check_json(parser, args.json)
    args.cuda = torch.cuda.is_available()
    args.batch_sizes, args.workers = list(dict.fromkeys(args.batch_sizes)), list(dict.fromkeys(args.workers))
    args.small = args.small or not args.cuda
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
    groups = plan(args)
    if not groups:
        sys.exit(f"error: --bits {args.bits}: nothing to run, {', '.join(args.recipes)} has no such precision")
    try:
        if args.scratch:
            args.scratch.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="full-size-", dir=args.scratch)).absolute()
        weights = (args.scratch or scratch).absolute() / ("weights-small" if args.small else "weights")
        there = {folder.name for folder in weights.glob("*") if (folder / "done").exists()}
    except OSError as error:
        sys.exit(f"error: --scratch {args.scratch or tempfile.gettempdir()}: {error.strerror}")
    try:
        return run_all(args, groups, scratch, weights)
    finally:
        made = [] if args.keep else [folder for folder in weights.glob("*") if folder.name not in there]
        for folder in made:  # what an earlier run has kept is not this one's to remove
            shutil.rmtree(folder, ignore_errors=True)
        if args.scratch or not args.keep:
            shutil.rmtree(scratch, ignore_errors=True)


def run_all(args, groups, scratch, weights):
    """All groups of configurations, one after the other; prints as it goes. -> the exit status of main."""
    say = functools.partial(print, flush=True)
    free, need = shutil.disk_usage(scratch).free, needed(args, weights)
    if free < need:
        room = f"{need / GB:.3g} GB are needed in {scratch.parent} for the weights, {free / GB:.3g} GB are free"
        sys.exit(f"error: {room}: --scratch FOLDER on a larger disk, or fewer recipes")
    about = machine(args.cuda)
    where = about["gpu"] or "no GPU found: a small copy of everything, on the CPU, in float32 for 16 bits"
    say(f"{where}; {', '.join(f'{name} {version}' for name, version in about['versions'].items())}")
    job = {"scratch": str(scratch), "weights": str(weights), "log": str(scratch / "log.txt"), "cuda": args.cuda}
    job |= {name: getattr(args, name) for name in ("small", "steps", "warm_up", "rounds", "seed")}
    job["until"] = time.time() + 60 * args.minutes if args.minutes else None
    results, device, stopped = [], {}, False

    def save():
        write_json(args, machine=about, device=device, results=results, fits=fits_as_list(results, device))

    for cells in groups:
        if stopped:
            results += [{**cell, "status": "not run: interrupted"} for cell in cells]
        else:
            stopped = run_group({**job, "cells": cells}, results, device, say, save)
        save()
    if device:
        say(f"peak for MFU: {device['peak_flops'] / 1e12:.3g} TFLOP/s ({device['peak_flops_from']})")
    console = Console(width=None if sys.stdout.isatty() else 190, highlight=False)
    show(results, {**device, "real": not args.small}, console)
    if args.keep:
        say(f"the weights are kept in {weights}")
    measured = any(one.get("recipe", {}).get("status") == "ok" for one in results)
    return 0 if measured and not stopped else 1


def run_group(job, results, device, say, save):
    """Run the configurations of one recipe in one precision; adds to `results` what was found, or why not, and to
    `device` what it is; calls save() after each. -> whether it was interrupted."""
    cells, until, end = job["cells"], job["until"], None
    first = len(results)
    try:
        for one in apart(job) if not until or time.time() <= until else ():
            if one.get("kind") == "device":
                device.update(one)
            elif one.get("kind") == "end":
                end = one["status"]
            else:
                results.append(one)
                say(f"  {named(one)}: {in_short(one)}")
                save()
        why = f"failed: its process ended early, exit status {end}: {last_words(job['log'])}"
        if until and time.time() > until:
            why = "not run: time is up"
        stopped = False
    except KeyboardInterrupt:
        why, stopped = "not run: interrupted", True
    results += [{**cell, "status": why} for cell in cells[len(results) - first :]]
    return stopped


def in_short(one):
    """A result in a few words."""
    sides = []
    for side in one["sides"]:
        if side in one:
            status = one[side]["status"]
            sides.append(f"{side} {one[side]['median']:.3f} s" if status == "ok" else f"{side} {status}")
    return ", ".join(sides) or one["status"]


def fits_as_list(results, device):
    """`fits` for the file of --json."""
    found = []
    for (run, bits, on), cards in fits(results, device.get("memory")).items():
        found.append({"run": run, "bits": bits, "checkpointing": on, "largest_batch": cards})
    return found


if __name__ == "__main__":
    start(main)  # ended by Ctrl+C or SIGTERM: its processes end, its weights are removed, what was measured is shown
