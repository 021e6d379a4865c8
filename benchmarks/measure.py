"""What the benchmarks share: flags and files, a Trainer's step, what it costs, whether two are equal."""

import contextlib
import gc
import io
import json
import math
import signal
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import transformers
import trl
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import flop_counter
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tools import program
from tools.program import flag_parser

TOLERANCE = 1e-5
SMALL = "A small copy, to see that it runs: its figures say nothing of the real size"


# ---------------------------------------------------------------- flags and files


def start(main):
    """Run a benchmark's main and exit with its status. SIGTERM ends it as Ctrl+C does: its processes end, its
    temporary folders are removed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    program.start(lambda: sys.exit(main()))


def benchmark_parser(doc):
    """A parser of flags, with `doc` as its help and --json. A mistake ends the program with one message."""
    parser = flag_parser(doc)
    parser.add_argument("--json", type=Path, help="Write all figures to this file.")
    return parser


def add_recipes(parser, known):
    """Let the flags name some of the `known` recipes; `check_recipes` reads them."""
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"Any of {', '.join(known)}. Default: all.")


def check_recipes(parser, args, known):
    """Make args.recipes the names of those that are meant, or all. Ends the program where one is unknown."""
    names = [Path(name).stem if name.endswith(".py") else name for name in args.recipes]
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"no recipe {', '.join(unknown)}; there are {', '.join(known)}")
    args.recipes = names or list(known)


def check_json(parser, path):
    """End the program where a file of figures could not be written once they are there."""
    try:
        if path:
            path.open("a").close()
    except OSError as error:
        parser.error(f"--json {path} cannot be written: {error.strerror}")


def write_json(args, **figures):
    """Write the flags, the versions and these figures to the file of --json, if one was given."""
    if args.json is None:
        return
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    args.json.write_text(json.dumps({"arguments": flags, **versions, **figures}, indent=1))


def as_flags(settings):
    """{name: value} -> the list of a recipe's flags."""
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", str(value)]
    return flags


def on_or_off(choice):
    """The value of --checkpointing -> the settings that are wanted."""
    return {"on": [True], "off": [False], "both": [True, False]}[choice]


# ---------------------------------------------------------------- one step


def step(trainer, batch):
    """Forward and backward of one batch, as `Trainer.train` calls it. Returns the loss."""
    if type(trainer).__module__.startswith(("transformers.", "trl.")):  # it does not know what is the recipes' own
        batch = {name: batch[name] for name in batch if name not in ("trained_at", "targets", "pairs")}
        if "target_sizes" in batch:  # of MiniCPM-V's slices; the recipe keeps them as NumPy's
            batch["target_sizes"] = torch.as_tensor(batch["target_sizes"])
    (batch,), count = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    return trainer.training_step(trainer.model_wrapped, dict(batch), count)


def gradients(trainer):
    """{name: gradient} of all that is trained."""
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


def apart(stock, other):
    """Two results of `gradients` -> how many there are, and the largest relative difference of any: in its largest
    element and in its norm. A NaN stays one."""
    assert all(g is not None and g.norm() > 0 for g in stock.values())
    pairs = [(g, other[name]) for name, g in stock.items()]
    in_elements = [(g - h).abs().max() / g.abs().max() for g, h in pairs]
    in_norms = [(g - h).norm() / g.norm() for g, h in pairs]
    return {
        "adapters": len(pairs),
        "gradient_max": torch.stack(in_elements).max().item(),
        "gradient_norm": torch.stack(in_norms).max().item(),
    }


def seconds(trainer, batch):
    """How long one step takes. CPU: process time. GPU: wall time of a synchronized device."""
    on_gpu = trainer.args.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    step(trainer, batch)
    if on_gpu:
        torch.cuda.synchronize()
    took = clock() - start
    trainer.model.zero_grad()
    return took


def attention_flops(query, key, value, *args, **kwargs):
    """FLOPs of the CPU's attention kernel, from the shapes of its inputs."""
    return flop_counter.sdpa_flop_count(query, key, value)


def attention_backward_flops(gradient, query, key, value, *args, **kwargs):
    """FLOPs of that kernel's backward pass."""
    return flop_counter.sdpa_backward_flop_count(gradient, query, key, value)


def addmm_flops(added, left, right, *args, **kwargs):
    """FLOPs of a product that is added in place."""
    return flop_counter.mm_flop(left, right)


def four_bit_flops(left, packed, shape, *args, **kwargs):
    """FLOPs of a product with a 4-bit weight, whose unpacked shape is (N, K)."""
    return 2 * math.prod(left) * shape[0]


def counter():
    """A FlopCounterMode that also knows what PyTorch's own takes for free: the CPU's attention kernel, addmm in place,
    and bitsandbytes' product with 4-bit weights."""
    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
        aten.addmm_: addmm_flops,
    }
    four_bit = getattr(torch.ops.bitsandbytes, "gemm_4bit", None)
    if four_bit is not None:
        kernels[four_bit] = four_bit_flops
    return flop_counter.FlopCounterMode(display=False, custom_mapping=kernels)


def flops(trainer, batch):
    """FLOPs of forward and backward, recomputation included."""
    with counter() as counted:
        step(trainer, batch)
    trainer.model.zero_grad()
    return counted.get_total_flops()


def flops_by_part(trainer, batch):
    """FLOPs of a step of pairs: of `all`, and of `language`, what is left where the image's features are there
    already."""
    model = trainer.model.get_base_model().model
    original, kept = model.get_image_features, []

    def keep(*args, **kwargs):
        output = original(*args, **kwargs)
        kept.append(output.pooler_output)
        return output

    def leaf(tensor):
        return torch.zeros_like(tensor, requires_grad=tensor.requires_grad)

    def give(*args, **kwargs):
        return BaseModelOutputWithPooling(pooler_output=pytree.tree_map(leaf, kept.pop(0)))

    found = {}
    try:
        for part, forward in (("all", keep), ("language", give)):
            model.get_image_features = forward
            found[part] = flops(trainer, batch)
    finally:
        del model.get_image_features
    return found


def flops_of_images(trainer, batch, copies=1):
    """FLOPs to see each image of the batch once: vision tower and connector, forward. `copies`: of an image in it."""
    names = ("pixel_values", "pixel_attention_mask", "target_sizes")
    images = {name: batch[name][: len(batch[name]) // copies] for name in names if name in batch}
    with counter() as counted, torch.no_grad():
        model = trainer.model.get_base_model().model
        model.get_image_features(
            **{name: torch.as_tensor(value).to(trainer.args.device) for name, value in images.items()}
        )
    return counted.get_total_flops()


def forward_shares(trainer, batch):
    """Forward FLOPs of Idefics2's parts, as shares of their sum."""
    parts = {"vision tower": ["model.vision_model"], "connector": ["model.connector"]}
    parts["language model"] = ["model.text_model", "lm_head"]
    model = trainer.model
    inputs = {name: value.to(trainer.args.device) for name, value in batch.items() if name != "labels"}
    with counter() as counted, torch.no_grad():
        model(**inputs)  # of the Trainer's, which casts where it casts in training
    found = dict.fromkeys(parts, 0)
    for module, counts in counted.flop_counts.items():
        for part, ends in parts.items():
            if any(module.endswith(f"base_model.model.{end}") for end in ends):
                found[part] += sum(counts.values())
    total = sum(found.values())
    return {part: count / total for part, count in found.items()}


def peak(trainer, batch):
    """Most bytes that PyTorch's allocator had given out at once during a step, above what it held before. What
    libraries allocate for themselves is not in it, neither on a CPU nor on a GPU."""
    most = gpu_peak(trainer, batch) if trainer.args.device.type == "cuda" else cpu_peak(trainer, batch)
    trainer.model.zero_grad()
    return most


def gpu_peak(trainer, batch):
    """`peak` by torch.cuda.max_memory_allocated."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(trainer, batch)
    return torch.cuda.max_memory_allocated() - before


def cpu_peak(trainer, batch):
    """`peak` by the allocations in torch.profiler's record."""
    gc.collect()  # what an earlier trainer gives back within the step would count against what the step takes
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(trainer, batch)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


# ---------------------------------------------------------------- a recipe's trainer


class Ready(Exception):
    """Carries a trainer out of a recipe's main()."""


def trainer_of(recipe, flags):
    """The trainer of a recipe's own main(), with real weights, at the moment when it would train; prepared as `train`
    then prepares it: checkpointing, autocast."""

    def ready(trainer, *args, **kwargs):
        raise Ready(trainer)

    with mock.patch.object(transformers.Trainer, "train", ready), contextlib.redirect_stdout(io.StringIO()):
        try:
            recipe.main(flags)
        except Ready as error:
            trainer = error.args[0]
    if trainer.args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    return trainer


def activations(trainer):
    """Most bytes allocated in the second of several accumulated steps on the longest rows, besides weights and
    gradients: what tools/inspect_recipe.py foretells."""
    from tools.inspect_recipe import tensors  # here: the other benchmarks start without it

    rows = trainer.train_dataset
    longest = sorted(range(len(rows)), key=lambda n: -rows[n]["length"])[: trainer.args.per_device_train_batch_size]
    batch = dict(trainer.data_collator([rows[n] for n in longest]))
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    inputs = sum(value.nbytes for value in tensors(batch))
    return peak(trainer, batch) + inputs


# ---------------------------------------------------------------- models without weights


def without_storage(model):
    """A model on the meta device -> the same with fake CPU weights: all of the code runs, only shapes are computed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    fake = torch.empty(weight.shape, dtype=weight.dtype)
                    module._parameters[name] = torch.nn.Parameter(fake, requires_grad=weight.requires_grad)
            for name, weight in module._buffers.items():
                if weight is not None:
                    module._buffers[name] = torch.empty(weight.shape, dtype=weight.dtype)

    def stay(*args, **kwargs):
        return model

    model.to = stay  # called by Trainer; fake weights cannot be moved, and are where they belong
    return model


@contextlib.contextmanager
def label_positions_only():
    """Within it TRL's fused head scores label positions only on a CPU, too, as on a GPU. The kernel stays the
    CPU's."""
    with mock.patch.object(trl.trainer.utils, "_use_triton", lambda device: True):
        yield


class StaticShapes(TorchFunctionMode):
    """Within it code runs that asks tensors without storage for what they hold: a boolean mask is looked up as
    indices, and a number, which only metrics ask for, is 0."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """PyTorch calls it in place of each of its functions."""
        if function is torch.Tensor.item and isinstance(args[0], FakeTensor):
            return 0.0
        if function is torch.Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.bool:
            args = (args[0], args[1].nonzero(as_tuple=True))
        return function(*args, **(kwargs or {}))


# ---------------------------------------------------------------- two sides beside each other


def line(what, pair, unit, scale, note, ratio=None):
    """{"stock": value, "recipe": value} -> a line of a report."""
    figures = "".join(f"{side} {value / scale:8.2f} {unit:5s} " for side, value in pair.items())
    if ratio is None:
        ratio = pair["stock"] / pair["recipe"]
    return f"  {what:9s}{figures}{ratio:5.2f}x  {note}"


def costs(sides, batches, report, counted=None):
    """{"stock" and "recipe": trainer}, {the same: batches} -> time, FLOPs and memory of both, and their ratios;
    reports them. `counted`: their FLOPs, where they are known."""
    timed = {side: [] for side in sides}
    for n in range(len(batches["stock"])):
        for side in sorted(sides, reverse=n % 2 == 0):  # else the second one would always find warm caches
            timed[side].append(seconds(sides[side], batches[side][n]))
    ratios = [stock / recipe for stock, recipe in zip(timed["stock"], timed["recipe"])]
    found = {"seconds_each": timed, "seconds": {side: statistics.median(values) for side, values in timed.items()}}
    found["flops"] = counted or {side: flops(trainer, batches[side][0]) for side, trainer in sides.items()}
    found["peak_bytes"] = {side: peak(trainer, batches[side][0]) for side, trainer in sides.items()}
    found["ratios"] = {"time": statistics.median(ratios)}
    for what, values in (("FLOPs", found["flops"]), ("memory", found["peak_bytes"])):
        found["ratios"][what] = values["stock"] / values["recipe"]
    note = f"median of {len(ratios)}, alternating; ratios from {min(ratios):.2f} to {max(ratios):.2f}"
    report(line("time", found["seconds"], "s", 1, note, found["ratios"]["time"]))
    report(line("FLOPs", found["flops"], "GFLOP", 1e9, "forward, recomputation, backward"))
    memory_note = "most that PyTorch's allocator held at once, above weights"
    report(line("memory", found["peak_bytes"], "MiB", 2**20, memory_note))
    return found


def check_thresholds(found, thresholds, report):
    """A result of `costs` and {what: least ratio}: adds whether they hold, and reports it."""
    found["thresholds"] = thresholds
    found["held"] = {what: found["ratios"][what] >= least for what, least in thresholds.items()}
    for what, least in thresholds.items():
        verdict = "holds" if found["held"][what] else "MISSED"
        report(f"  {what} at least {least}x at equal settings: {verdict}")
