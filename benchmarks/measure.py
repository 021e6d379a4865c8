"""What the benchmarks share: one step of a Trainer, its time, FLOPs and memory, and how far the gradients of two are apart."""

import contextlib
import math
import time
from unittest import mock

import torch
import trl
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import flop_counter

TOLERANCE = 1e-5


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
        "gradient_max": torch.stack([(g - h).abs().max() / g.abs().max() for g, h in pairs]).max().item(),  # a NaN stays one
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
            aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v),
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
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step(trainer, batch)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held)
    trainer.model.zero_grad()
    return most


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
