"""What the benchmarks share: one step of a Trainer, its time, FLOPs and memory, and how far the gradients of two are apart."""

import argparse
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
from torch.utils import flop_counter

from tools import generate

TOLERANCE = 1e-5
SMALL = "A small copy, to see that it runs: its figures say nothing of the real size"


def start(main):
    """main(), as a program that the tools' start() starts; SIGTERM ends it as Ctrl+C does, its processes and temporary folders with it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    generate.start(lambda: sys.exit(main()))


def flag_parser(doc):
    """A parser of flags, with `doc` as its help; a mistake in them ends the program with one line and exit status 1, as in recipes and tools."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = generate.fail
    return parser


def check_json(parser, path):
    """Ends the program where a file of figures could not be written once they are there."""
    try:
        if path:
            path.open("a").close()
    except OSError as e:
        parser.error(f"--json {path} cannot be written: {e.strerror}")


def step(trainer, batch):
    """Forward and backward of one batch, as `Trainer.train` calls it. Returns the loss."""
    (batch,), count = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    return trainer.training_step(trainer.model_wrapped, dict(batch), count)


def gradients(trainer):
    """{name: gradient} of all that is trained."""
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


def apart(stock, other):
    """Two results of `gradients` -> how many there are; the largest relative difference of any, in its largest element and
    in its norm."""
    assert all(g is not None and g.norm() > 0 for g in stock.values())
    pairs = [(g, other[name]) for name, g in stock.items()]
    return {
        "adapters": len(pairs),
        "gradient_max": torch.stack([(g - h).abs().max() / g.abs().max() for g, h in pairs])
        .max()
        .item(),  # a NaN stays one
        "gradient_norm": torch.stack([(g - h).norm() / g.norm() for g, h in pairs]).max().item(),
    }


def seconds(trainer, batch):
    """Of one step. CPU: process time. GPU: wall time of a synchronized device."""
    cuda = trainer.args.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    step(trainer, batch)
    if cuda:
        torch.cuda.synchronize()
    took = clock() - start
    trainer.model.zero_grad()
    return took


def counter():
    """A FlopCounterMode that also knows what PyTorch's own takes for free: the attention kernel of CPUs, addmm in place,
    bitsandbytes' product with 4-bit weights (N, K), where there is one."""
    aten, four_bit = torch.ops.aten, getattr(torch.ops.bitsandbytes, "gemm_4bit", None)
    return flop_counter.FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(
                q, k, v
            ),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
                flop_counter.sdpa_backward_flop_count(g, q, k, v)
            ),
            aten.addmm_: lambda _, a, b, *__, **___: flop_counter.mm_flop(a, b),
        }
        | ({four_bit: lambda a, _, weight, *__, **___: 2 * math.prod(a) * weight[0]} if four_bit else {}),
    )


def flops(trainer, batch):
    """FLOPs of forward and backward, recomputation included."""
    with counter() as counted:
        step(trainer, batch)
    trainer.model.zero_grad()
    return counted.get_total_flops()


def peak(trainer, batch):
    """Most bytes that PyTorch's allocator had given out at once during a step, above what was held before it. What libraries
    allocate for themselves is not in it, neither on a CPU nor on a GPU."""
    if trainer.args.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(trainer, batch)
        most = torch.cuda.max_memory_allocated() - before
    else:
        gc.collect()  # else an earlier trainer may go within the step, and what it gives back count against what the step takes
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step(trainer, batch)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held)
    trainer.model.zero_grad()
    return most


class Ready(Exception):
    """Carries a trainer out of a recipe's main()."""


def trainer_of(recipe, flags):
    """The trainer of a recipe's own main(), real weights in it, at the moment when it would train; as `train` then prepares it: checkpointing, autocast."""

    def ready(trainer, *args, **kwargs):
        raise Ready(trainer)

    with mock.patch.object(transformers.Trainer, "train", ready), contextlib.redirect_stdout(io.StringIO()):
        try:
            recipe.main(flags)
        except Ready as e:
            trainer = e.args[0]
    if trainer.args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    return trainer


def activations(trainer):
    """Bytes at most allocated in the second of several accumulated steps on the longest rows, besides weights and gradients: what tools/inspect_recipe.py
    foretells."""
    from tools.inspect_recipe import tensors  # here: the other benchmarks start without it

    rows = trainer.train_dataset
    longest = sorted(range(len(rows)), key=lambda n: -rows[n]["length"])[: trainer.args.per_device_train_batch_size]
    batch = dict(trainer.data_collator([rows[n] for n in longest]))
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    given = sum(value.nbytes for value in tensors(batch))
    return peak(trainer, batch) + given


def without_storage(model):
    """A model on the meta device -> the same with fake CPU weights: all of the code runs, only shapes are computed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, w in module._parameters.items():
                if w is not None:
                    module._parameters[name] = torch.nn.Parameter(
                        torch.empty(w.shape, dtype=w.dtype), requires_grad=w.requires_grad
                    )
            for name, w in module._buffers.items():
                if w is not None:
                    module._buffers[name] = torch.empty(w.shape, dtype=w.dtype)
    model.to = lambda *_, **__: model  # called by Trainer; fake weights cannot be moved, and are where they belong
    return model


@contextlib.contextmanager
def label_positions_only():
    """Within it TRL's fused head scores label positions only, on a CPU, too, as on a GPU. The kernel itself stays the CPU's."""
    with mock.patch.object(trl.trainer.utils, "_use_triton", lambda device: True):
        yield


class StaticShapes(TorchFunctionMode):
    """Within it code that asks tensors without storage for what they hold runs on: a boolean mask is looked up as indices, and a
    number, which only metrics ask for, is 0."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.item and isinstance(args[0], FakeTensor):
            return 0.0
        if function is torch.Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.bool:
            args = (args[0], args[1].nonzero(as_tuple=True))
        return function(*args, **(kwargs or {}))


def line(what, pair, unit, scale, note, ratio=None):
    """{"stock": value, "recipe": value} -> a line of a report."""
    figures = "".join(f"{side} {value / scale:8.2f} {unit:5s} " for side, value in pair.items())
    return f"  {what:9s}{figures}{ratio or pair['stock'] / pair['recipe']:5.2f}x  {note}"


def costs(sides, batches, report, counted=None):
    """{"stock" and "recipe": trainer}, {the same: batches} -> time, FLOPs and memory of both, and their ratios; reports them. `counted`: FLOPs of the
    first batch of both, where they are known."""
    timed = {side: [] for side in sides}
    for n in range(len(batches["stock"])):
        for side in sorted(sides, reverse=n % 2 == 0):  # whoever is first may find the caches otherwise
            timed[side].append(seconds(sides[side], batches[side][n]))
    ratios = [stock / mine for stock, mine in zip(timed["stock"], timed["recipe"])]
    found = {"seconds_each": timed, "seconds": {side: statistics.median(values) for side, values in timed.items()}}
    found["flops"] = counted or {side: flops(trainer, batches[side][0]) for side, trainer in sides.items()}
    found["peak_bytes"] = {side: peak(trainer, batches[side][0]) for side, trainer in sides.items()}
    found["ratios"] = {"time": statistics.median(ratios)}
    for what, values in (("FLOPs", found["flops"]), ("memory", found["peak_bytes"])):
        found["ratios"][what] = values["stock"] / values["recipe"]
    note = f"median of {len(ratios)}, alternating; ratios from {min(ratios):.2f} to {max(ratios):.2f}"
    report(line("time", found["seconds"], "s", 1, note, found["ratios"]["time"]))
    report(line("FLOPs", found["flops"], "GFLOP", 1e9, "forward, recomputation, backward"))
    report(
        line("memory", found["peak_bytes"], "MiB", 2**20, "most that PyTorch's allocator held at once, above weights")
    )
    return found


def held(found, thresholds, report, when=""):
    """A result of `costs`, {what: least ratio} -> the same with whether they hold; reports it."""
    found |= {
        "thresholds": thresholds,
        "held": {what: found["ratios"][what] >= least for what, least in thresholds.items()},
    }
    for what, least in thresholds.items():
        report(f"  {what} at least {least}x{when}: {'holds' if found['held'][what] else 'MISSED'}")


def add_flags(parser, steps, rows):
    """The flags of a benchmark of two sides. `rows`: what a step has."""
    parser.add_argument("--steps", type=int, default=steps, help="Measured steps of each side.")
    parser.add_argument("--batch_size", type=int, default=1, help=f"{rows} of a step.")
    parser.add_argument("--seed", type=int, default=0, help="Of weights, images and texts.")
    parser.add_argument(
        "--checkpointing", choices=["on", "off", "both"], default="on", help="Activation checkpointing, of both sides."
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: 16 bits, after the same check."
    )
    parser.add_argument("--report_only", action="store_true", help="Exit status 0 although a threshold is missed.")
    parser.add_argument("--json", type=Path, help="Write all figures to this file.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--real_size", action="store_true", help="Count the real model's FLOPs; with --device cuda measure it, too."
    )
    size.add_argument("--tiny", action="store_true", help="A model of no meaning, for the tests.")


def check_flags(parser, args):
    """Ends the program where the flags of `add_flags` cannot work. -> the name of the device."""
    if min(args.steps, args.batch_size) < 1:
        parser.error("--steps and --batch_size: at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU found")
    if not 0 <= args.seed < 2**32:
        parser.error("--seed: from 0 to below 2**32")
    check_json(parser, args.json)
    return torch.cuda.get_device_name() if args.device == "cuda" else "CPU, one thread, float32, process time"


def write(args, device, found):
    """All figures into the file that was asked for."""
    if args.json:
        everything = {"arguments": {**vars(args), "json": str(args.json)}, "device": device, "settings": found}
        everything |= {"torch": torch.__version__, "trl": trl.__version__}
        args.json.write_text(json.dumps(everything, indent=1))


def missed(args, found, report):
    """Whether the benchmark fails because a threshold was missed; says which."""
    below = [what for setting in found for what, ok in setting.get("held", {}).items() if not ok]
    if below and not args.report_only:
        report(f"\nerror: {' and '.join(below)} below what this benchmark asks for")
    return bool(below) and not args.report_only
