# ruff: noqa: E402  (the fake device must be there before torch is imported)
"""Runs one step of a recipe at its CUDA settings on a machine without a GPU: no number is computed, but each operator,
shape, dtype and device is as on CUDA. Takes g++ and some seconds.

    python tests/fake_cuda.py [RECIPE ...] [--dtype bf16 fp16] [--bits 4 16] [--checkpointing on off] [--model FAMILY]
        [--set FLAG=VALUE ...]

A recipe is a name, or the path of a changed copy. What is run is its main, up to the end of one optimizer step of two
batches of two rows, and of one evaluation batch with its answers. FAMILY is one of tiny/families.py.

Printed is, for each of these parts of the run: where the host waits for the GPU, and where it would for a copy;
attention with and without a mask; matrix products in float32; results as wide as the vocabulary.

How: the parameters and batches are PyTorch's FakeTensors, which have shape, dtype and device but no content, and
fake_cuda.cpp makes torch believe in a CUDA device. What is computed from the batch alone (ids, labels, masks) is also
computed in earnest, on the CPU, because sizes depend on it: see Watch."""

import argparse
import collections
import contextlib
import ctypes
import functools
import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
CACHE = tempfile.TemporaryDirectory(prefix="fake-cuda-")
FOLDER = Path(CACHE.name)
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
os.environ.update(HF_DATASETS_CACHE=f"{FOLDER}/datasets", TRL_EXPERIMENTAL_SILENCE="1")


def load_fake_device():
    """Compile fake_cuda.cpp and load it."""
    torch_folder = Path(sysconfig.get_paths()["purelib"], "torch")
    library = FOLDER / "fake_cuda.so"
    command = ["g++", "-w", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", HERE.with_suffix(".cpp")]
    command += ["-o", library, f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}/lib"]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library))


load_fake_device()

import bitsandbytes
import datasets
import made_up
import peft
import torch
import torch.cuda.amp.common
import torch.utils.data._utils.pin_memory
import transformers
import transformers.masking_utils
import trl.trainer.utils
from accelerate.utils import recursively_apply
from bitsandbytes.functional import QuantState
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_map

from tiny import families

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
ROWS, BATCHES = 2, 2  # rows of a batch, batches of an optimizer step
# Parts of a run. START: main until training. FILL: the batch size auto. BETWEEN: what logs and collects results.
START, FILL, STEP, EVALUATION, ANSWERS, BETWEEN = "start", "fill", "step", "evaluation", "answers", "between"
# Kinds of events.
WAIT, COPY, ATTENTION, MASKED, IN_FLOAT32, WIDE, GUESS = (
    "wait",
    "blocking copy",
    "attention",
    "masked attention",
    "product in float32",
    "as wide as the vocabulary",
    "unknown number, taken to be 0",
)
KINDS = [WAIT, COPY, ATTENTION, MASKED, IN_FLOAT32, WIDE, GUESS]

# ---------------------------------------------------------------------------------------------- a torch that has a GPU


def always(value):
    """A function that returns this value, whatever it is asked."""

    def answer(*args, **kwargs):
        return value

    return answer


def apply(module, function, recurse=True):
    """Stands in for Module._apply. Its own swaps the content of a parameter, which a FakeTensor does not allow."""
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        new = function(parameter.detach())
        if new.dtype != parameter.dtype or new.device != parameter.device:
            module._parameters[name] = torch.nn.Parameter(new, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def believe_in_cuda():
    """Change what torch and Transformers ask about the GPU, for the rest of the process."""
    answers = {"is_available": True, "device_count": 1, "is_bf16_supported": True, "current_device": 0}
    answers |= {"get_device_capability": (8, 0), "get_device_name": "fake", "mem_get_info": (80 * 10**9, 80 * 10**9)}
    answers["get_rng_state"] = torch.empty(0, dtype=torch.uint8)
    answers |= dict.fromkeys(["set_device", "manual_seed", "manual_seed_all", "set_rng_state", "empty_cache"])
    for name, value in answers.items():
        setattr(torch.cuda, name, always(value))
    torch.accelerator.current_device_index = always(0)
    torch.cuda.amp.common.amp_definitely_not_available = always(False)  # or autocast("cuda") turns itself off
    torch.nn.Module._apply = apply
    # torch.tensor([...], device="cuda") is made on the CPU and then copied, as on CUDA.
    FakeTensorMode.avoid_device_init = property(always(True))
    # PEFT copies modules_to_save with their tensors, and with these it would copy the mode.
    FakeTensorMode.__deepcopy__ = lambda self, memo: self
    # Transformers takes FakeTensors for a trace of the program, in which it leaves out what looks at content.
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers") and "is_tracing" in vars(module):
            module.is_tracing = always(False)


believe_in_cuda()

# ------------------------------------------------------------------------------------------------- what happens on it


@dataclass(frozen=True)
class Event:
    """Something worth to be counted."""

    part: str  # of the run
    kind: str
    what: str
    place: str  # the line that did it: of the recipe, or of a library other than torch
    caller: str  # if it is a library's: the line of the recipe that called the library
    is_ours: bool

    def __str__(self):
        return f"{self.what} at {self.place}{f' (from {self.caller})' if self.caller else ''}"


NOT_A_PLACE = (f"{os.sep}torch{os.sep}", f"{os.sep}unittest{os.sep}", always.__code__.co_filename, "contextlib.py")


def places(recipe_file):
    """-> (line that is at work, line of the recipe that called it). Each is "" if there is none: autograd runs the
    backward pass in a thread of its own."""
    place = caller = ""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not place and not any(part in path for part in NOT_A_PLACE):
            place = f"{os.sep.join(Path(path).parts[-2:])}:{frame.f_lineno}"
            if path == recipe_file:
                return f"{Path(path).name}:{frame.f_lineno}", ""
        if path == recipe_file:
            if frame.f_code.co_name not in ("main", "train_and_save"):
                caller = f"{Path(path).name}:{frame.f_lineno}"
            break
        frame = frame.f_back
    return place, caller


def tensors_of(*values):
    """All tensors in nested tuples, lists and dicts. (tree_leaves of torch takes five times as long.)"""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += tensors_of(*value)
        elif isinstance(value, dict):
            found += tensors_of(*value.values())
    return found


def is_known(tensor):
    """Whether its content is known."""
    return hasattr(tensor, "content") or not isinstance(tensor, FakeTensor)


def as_fake(tensor, device):
    """A FakeTensor on this device with the content of a real tensor, to be called in a fake mode."""
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    fake.content = tensor
    return fake


def compute(operator, args, kwargs):
    """What the operator makes of known content, on the CPU."""

    def real(value):
        if isinstance(value, torch.Tensor):
            return getattr(value, "content", value)
        return torch.device("cpu") if isinstance(value, torch.device) else value

    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    with unset_fake_temporarily(), torch.no_grad():
        return operator(*tree_map(real, args), **tree_map(real, kwargs))


# Operators whose result has a size that only the GPU knows, or that give a number to the host.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal"}
WAITING |= {"is_nonzero", "bincount"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
FACTORS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "convolution": (0, 1)}  # places in args
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}


def masks_among(name, args):
    """The masks by which an operator indexes. A mask that a single value is written to is none: nothing waits."""
    if name not in INDEXING or name != "index" and args[2].numel() == 1:
        return []
    return [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]


def without_masks(args, masks):
    """The arguments of an indexing operator, known masks replaced by the positions at which they are true."""
    if not all(hasattr(mask, "content") for mask in masks):
        return args
    indices = []
    for index in args[1]:
        if not any(index is mask for mask in masks):
            indices.append(index)
            continue
        with unset_fake_temporarily():
            positions = index.content.nonzero(as_tuple=True)
        indices += [as_fake(position, index.device) for position in positions]
    return (args[0], indices, *args[2:])


def copied_between(name, args, kwargs):
    """(device from which, device to which) an operator copies, or None if not at all, or without blocking. A copy from
    memory that is not pinned blocks all the same."""
    if name in ("index", "index_put", "index_put_") and args[0].device.type == "cuda":
        on_cpu = [index for index in args[1] if index is not None and index.device.type == "cpu"]
        return ("cpu", "cuda") if on_cpu else None
    if name == "copy_":
        to, source, *more = args
        target, blocks = to.device.type, not kwargs.get("non_blocking", more[0] if more else False)
    elif name == "_to_copy":
        source = args[0]
        target = torch.device(kwargs.get("device") or source.device).type
        blocks = not kwargs.get("non_blocking", False)
    else:
        return None
    if {source.device.type, target} != {"cpu", "cuda"}:
        return None
    is_unpinned = source.device.type == "cpu" and not getattr(source, "is_pinned_here", False)
    return (source.device.type, target) if blocks or is_unpinned else None


class Watch(TorchDispatchMode):
    """Counts what happens on the fake GPU, and keeps known content. It lies above the fake mode.
    Content is known of what depends on no weight and no random number: ids, labels, masks, pictures, positions. Such a
    FakeTensor carries a real tensor, .content; it is what decides on sizes (how many tokens are trained), on branches
    (is there padding?) and on waits. (A tensor into a part of which something unknown is written counts as known.)"""

    def __init__(self, recipe_file):
        super().__init__()
        self.fake_mode = FakeTensorMode()
        self.recipe_file = recipe_file
        self.part = START
        self.events = collections.Counter()
        self.vocabulary = None  # size, once it is known
        self.trained_tokens = 0  # of the batch at work

    @contextlib.contextmanager
    def active(self, device=None):
        """Within it, new tensors are fake, on this device, and what happens is counted."""
        with self.fake_mode, self, device or contextlib.nullcontext():
            yield

    def note(self, kind, what, count=1):
        """Count an event at the line that is at work."""
        place, caller = places(self.recipe_file)
        is_ours = place.startswith(f"{Path(self.recipe_file).name}:")
        self.events[Event(self.part, kind, what, place or "the backward pass", caller, is_ours)] += count

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operator._schema.name.partition("::")[2]
        inputs = tensors_of(args, kwargs)
        real = [tensor for tensor in inputs if not isinstance(tensor, FakeTensor)]
        if real and len(real) == len(inputs) and name.endswith("_"):
            with unset_fake_temporarily():  # a tensor of the recipe's own on the CPU, which it shares with the loader
                return operator(*args, **kwargs)
        if real:  # a constant of a library
            args, kwargs = tree_map(self.lift, args), tree_map(self.lift, kwargs)
        masks = masks_among(name, args)
        if any(tensor.device.type == "cuda" for tensor in inputs):
            self.note_waits(name, kwargs, masks)
        self.note_copies(name, args, kwargs)
        if masks:
            args = without_masks(args, masks)
        result = self.run(operator, name, args, kwargs)
        self.note_products(name, args, result)
        return result

    def lift(self, value):
        """A real tensor -> a FakeTensor with its content. Other values stay as they are."""
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        fake = self.fake_mode.from_tensor(value)
        fake.content = value
        fake.is_pinned_here = getattr(value, "is_pinned_here", False)
        return fake

    def run(self, operator, name, args, kwargs):
        """The operator's result, with its content if that is known."""
        inputs = tensors_of(args, kwargs)
        is_random = torch.Tag.nondeterministic_seeded in operator.tags or "empty" in name
        known = not is_random and all(is_known(tensor) for tensor in inputs)
        try:
            result = operator(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if known:
                content, device = compute(operator, args, kwargs), inputs[0].device
                return tree_map(lambda x: as_fake(x, device) if isinstance(x, torch.Tensor) else x, content)
            if operator not in READS:
                raise
            self.note(GUESS, name)
            is_question = bool(inputs) and inputs[0].dtype == torch.bool
            # Whether all answers have ended. They have, with their first token, or generation would not end.
            return self.part in (ANSWERS, FILL) if is_question else 0
        outputs = tensors_of(result)
        if known and outputs:
            for output, content in zip(outputs, tensors_of(compute(operator, args, kwargs)), strict=True):
                output.content = content
        else:
            for output in outputs:
                output.__dict__.pop("content", None)
        return result

    def note_waits(self, name, kwargs, masks):
        """Count it if an operator on the GPU makes the host wait for the result."""
        if masks:
            self.note(WAIT, f"{name} by a mask")
        elif name in WAITING:
            self.note(WAIT, "item" if name == "_local_scalar_dense" else name)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.note(WAIT, "repeat_interleave without output_size")

    def note_copies(self, name, args, kwargs):
        """Count it if an operator copies between host and GPU and the host waits for it."""
        copied = copied_between(name, args, kwargs)
        if copied is not None:
            source, target = copied
            self.note(WAIT if source == "cuda" else COPY, f"{source} -> {target}")

    def note_products(self, name, args, result):
        """Count it if the operator is a matrix product of float32, or if its result is as wide as the vocabulary."""
        if name not in FACTORS or result.device.type != "cuda":
            return
        factors = [args[place] for place in FACTORS[name]]
        shapes = " x ".join(str(tuple(factor.shape)) for factor in factors)
        if any(factor.dtype in (torch.float32, torch.float64) for factor in factors):
            self.note(IN_FLOAT32, f"{name} {shapes}")
        if result.shape[-1] == self.vocabulary and result.numel() > self.trained_tokens * self.vocabulary:
            self.note(WIDE, f"{name} {tuple(result.shape)} {result.dtype}, where {self.trained_tokens} are trained")


def to_list(watch, tensor):
    """Stands in for FakeTensor.tolist, which reads one number at a time. On a GPU it is one copy."""
    if tensor.device.type == "cuda":
        watch.note(WAIT, "tolist")
    return to_numpy(watch, tensor).tolist()


def to_numpy(watch, tensor):
    """Stands in for FakeTensor.numpy, which fails. Unknown numbers are taken to be 0."""
    with _disable_current_modes():
        if is_known(tensor):
            return tensor.content.numpy()
        watch.note(GUESS, "numpy")
        return torch.zeros(tensor.shape, dtype=tensor.dtype).numpy()


def make_tensor(make, data, **options):
    """Stands in for torch.tensor, which on CUDA reads the numbers of a list of tensors one by one."""

    def number(value):
        return value.item() if isinstance(value, FakeTensor) else value

    return make(tree_map(number, data) if isinstance(data, list | tuple) else data, **options)


def attend(watch, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Stands in for scaled_dot_product_attention, of which no kernel runs on a fake GPU. One product after the other,
    in the dtype that its kernels would take."""
    shape = f"q {tuple(q.shape)} {str(q.dtype).removeprefix('torch.')}"
    if attn_mask is None:
        watch.note(ATTENTION, f"{shape}, {'causal' if is_causal else 'no mask'}")
    else:
        watch.note(MASKED, f"{shape}, mask {tuple(attn_mask.shape)} {attn_mask.dtype}")
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled("cuda"):
        raise TypeError(f"attention of {q.dtype}, {k.dtype} and {v.dtype}")
    if k.shape[1] != q.shape[1]:  # a key for several queries
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    scores = q @ k.transpose(-2, -1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -1e4)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(dim=-1).to(v.dtype) @ v


# ------------------------------------------------------------------------------------------------------ fake weights


def quantize(layer, dtype):
    """Give a Linear4bit the weight that it has on CUDA: bytes, and their scales in double quantization. A plain
    Parameter: Params4bit cannot hold a FakeTensor."""
    count, shape = layer.weight.numel(), layer.weight.shape
    blocks = -(-count // 64)
    scales = torch.empty(blocks, dtype=torch.uint8, device=CUDA)
    scales_of_scales = torch.empty(-(-blocks // 256), device=CUDA)
    inner = QuantState(
        scales_of_scales, code=torch.empty(256, device=CUDA), blocksize=256, quant_type=None, dtype=torch.float32
    )
    state = QuantState(
        scales,
        shape=shape,
        code=torch.empty(16, device=CUDA),
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty((), device=CUDA),
        state2=inner,
    )
    weight = torch.nn.Parameter(torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device=CUDA), requires_grad=False)
    weight.quant_state, weight.quant_type, weight.quant_storage = state, "nf4", torch.uint8
    weight.bnb_quantized = weight.compress_statistics = True
    layer.weight, layer.quant_state = weight, state
    if layer.bias is not None:  # like the weight, it was made on "meta"
        layer.bias = torch.nn.Parameter(torch.empty(layer.bias.shape, dtype=dtype, device=CUDA), requires_grad=False)


def plain_parameter(data, requires_grad=False, **kwargs):
    """Stands in for Params4bit."""
    return torch.nn.Parameter(data, requires_grad=False)


def replace_linear_layers(model, config, dtype):
    """What from_pretrained does for a quantization_config, by Transformers' own choice of layers."""
    device_map = {"": 0}
    quantizer = transformers.quantizers.auto.AutoHfQuantizer.from_config(config)
    with patch.object(bitsandbytes.nn.modules, "Params4bit", plain_parameter):
        quantizer.preprocess_model(model=model, device_map=device_map, dtype=dtype)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            quantize(module, dtype)
    model.hf_quantizer, model.is_loaded_in_4bit, model.hf_device_map = quantizer, True, device_map
    model.config.quantization_config = config


def fake_weights(watch, model_class, name, *args, config=None, dtype=None, quantization_config=None, **kwargs):
    """Stands in for from_pretrained: a model on the fake GPU, whose weights have no content."""
    if config is None:
        config = model_class.config_class.from_pretrained(name)
    with watch.active(CUDA):
        model = model_class._from_config(config, dtype=dtype)
        if quantization_config is not None:
            replace_linear_layers(model, quantization_config, dtype)
    if kwargs.get("output_loading_info"):
        return model, {"missing_keys": set()}
    return model


@contextlib.contextmanager
def made_on_the_gpu(watch):
    """Within it, weights that are loaded, and new adapters, are on the fake GPU."""
    add_adapter = peft.PeftModel.__init__

    def add_fake_adapter(*args, **kwargs):
        with watch.active(CUDA):
            add_adapter(*args, **kwargs)

    @classmethod
    def load(model_class, *args, **kwargs):
        return fake_weights(watch, model_class, *args, **kwargs)

    with (
        patch.object(transformers.PreTrainedModel, "from_pretrained", load),
        patch.object(peft.PeftModel, "__init__", add_fake_adapter),
    ):
        yield


# ------------------------------------------------------------------------------------------------ batches and training


def pin(data, device=None):
    """Stands in for the loader's copy into pinned memory, which needs CUDA: the tensors are only marked."""

    def mark(tensor):
        tensor.is_pinned_here = True
        return tensor

    return recursively_apply(mark, data)


def fake_batches(watch, stock_iter, loader):
    """Stands in for DataLoader.__iter__: its batches as FakeTensors on the CPU, with known content."""
    with _disable_current_modes():
        batches = stock_iter(loader)
    while True:
        with _disable_current_modes():
            batch = next(batches, None)
        if batch is None:
            return
        yield recursively_apply(watch.lift, batch)


def outside(watch, function):
    """A method of a collator, which computes real tensors on the CPU in any case: it returns FakeTensors where a fake
    mode is on."""

    def call(*args, **kwargs):
        if _get_current_dispatch_mode() is None:  # in the loader, or before training
            return function(*args, **kwargs)
        with _disable_current_modes():
            batch = function(*args, **kwargs)
        return recursively_apply(watch.lift, batch)

    return call


def method(function, *first):
    """A method that calls function(*first, self, ...)."""

    def call(self, *args, **kwargs):
        return function(*first, self, *args, **kwargs)

    return call


class Trained(Exception):
    """The end of main: what comes after training writes weights."""


@dataclass
class Report:
    """What a run has shown."""

    recipe: str
    model: str
    dtype: str
    bits: str
    checkpointing: str
    error: str = ""  # a traceback
    seconds: float = 0.0
    optimizer: str = ""  # the class that --optim stands for
    is_paged: bool = False
    loss_devices: tuple = ()
    trained: tuple = ()  # (name, dtype, device, whether it has a gradient) of each weight
    frozen: tuple = ()  # (name, dtype, device)
    events: tuple = ()  # Event and its count, as a dict

    def __str__(self):
        return f"{self.recipe} {self.model} {self.dtype}, {self.bits} bits, checkpointing {self.checkpointing}"


def plain(dtype):
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


class Recorder(transformers.TrainerCallback):
    """Tells the watch which part of the run is on, and remembers the weights as the optimizer finds them."""

    def __init__(self, watch, report):
        self.watch, self.report = watch, report

    def on_epoch_begin(self, *args, **kwargs):
        self.watch.part = STEP

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained, frozen = [], []
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                has_gradient = weight.grad is not None and weight.grad.device == weight.device
                trained.append((name, plain(weight.dtype), str(weight.device), has_gradient))
            else:
                frozen.append((name, plain(weight.dtype), str(weight.device)))
        self.report.trained, self.report.frozen = tuple(trained), tuple(frozen)

    def on_step_end(self, *args, **kwargs):
        self.watch.part = BETWEEN


def during(watch, part, function):
    """The function, in whose calls another part of the run is on."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        before, watch.part = watch.part, part
        try:
            with watch.active() if before == START else contextlib.nullcontext():
                return function(*args, **kwargs)
        finally:
            watch.part = before

    return call


def noted_loss(watch, report, compute_loss, model, inputs, *args, **kwargs):
    """compute_loss; how many tokens are trained is known to the watch, the loss's device to the report."""
    with _disable_current_modes():
        if "targets" in inputs:
            watch.trained_tokens = inputs["targets"].numel()
        elif "labels" in inputs:
            watch.trained_tokens = int((inputs["labels"].content != -100).sum())
        else:  # DPO
            watch.trained_tokens = int(inputs["completion_mask"].content.sum())
    result = compute_loss(model, inputs, *args, **kwargs)
    loss = result[0] if isinstance(result, tuple) else result
    report.loss_devices += (str(loss.device),)
    return result


def choose_optimizer(report, choose, args, model=None):
    """Stands in for Trainer.get_optimizer_cls_and_kwargs. bitsandbytes' optimizers are made once, on real numbers, and
    take no step: PyTorch's own does, since theirs cannot work on FakeTensors."""
    optimizer_class, options = choose(args, model)
    report.optimizer = f"{optimizer_class.__module__.partition('.')[0]}.{optimizer_class.__name__}"
    with _disable_current_modes():
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **options)
    report.is_paged = getattr(optimizer, "is_paged", False)
    if report.optimizer.startswith("torch."):
        return optimizer_class, options
    return torch.optim.AdamW, {"lr": options["lr"]}


def train_fake(watch, report, stock_train, trainer, *args, **kwargs):
    """Stands in for Trainer.train: the same on FakeTensors. Ends main."""
    watch.vocabulary = trainer.model.config.get_text_config().vocab_size
    trainer.add_callback(Recorder(watch, report))
    trainer.compute_loss = functools.partial(noted_loss, watch, report, trainer.compute_loss)
    trainer.prediction_step = during(watch, EVALUATION, trainer.prediction_step)
    watch.part = BETWEEN
    with watch.active():
        stock_train(trainer)
    raise Trained


@contextlib.contextmanager
def trained_on_the_gpu(watch, report, recipe):
    """Within it, trainers train on FakeTensors, and main ends with training."""
    trainer, loader = transformers.Trainer, torch.utils.data.DataLoader
    optimizer = functools.partial(choose_optimizer, report, trainer.get_optimizer_cls_and_kwargs)
    replaced = [
        (trainer, "_move_model_to_device", always(None)),
        (trainer, "get_optimizer_cls_and_kwargs", staticmethod(optimizer)),
        (trainer, "train", method(train_fake, watch, report, trainer.train)),
        (loader, "__iter__", method(fake_batches, watch, loader.__iter__)),
        (torch.utils.data._utils.pin_memory, "pin_memory", pin),
        (torch.cuda, "synchronize", functools.partial(watch.note, WAIT, "synchronize")),
        (torch.nn.functional, "scaled_dot_product_attention", functools.partial(attend, watch)),
        (torch, "tensor", functools.partial(make_tensor, torch.tensor)),
        (FakeTensor, "tolist", method(to_list, watch)),
        (FakeTensor, "numpy", method(to_numpy, watch)),
        (trl.trainer.utils, "_use_triton", always(True)),  # there is Triton where there is CUDA
        (recipe, "answer_rows", during(watch, ANSWERS, recipe.answer_rows)),
        (recipe, "fill_card", during(watch, FILL, recipe.fill_card)),
        (recipe.Collator, "__call__", method(outside(watch, recipe.Collator.__call__))),
        (recipe.Collator, "tokenize", method(outside(watch, recipe.Collator.tokenize))),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        yield


# ------------------------------------------------------------------------------------------------------- one run, many

MODELS = {
    "sft_llava": "llava-1.5-7b",
    "dpo_idefics2": "idefics2-8b",
    "idefics2_docvqa": "idefics2-8b",
    "finetune_minicpm_lora": "minicpm-v-4.6",
    "llava_two_stage": "llava-1.5-7b",
}
OWN_FLAGS = {
    "sft_llava": {"sample_tokens": 2},
    "dpo_idefics2": {"max_new_tokens": 2},
    "idefics2_docvqa": {"max_new_tokens": 2},
    "finetune_minicpm_lora": {"sample_tokens": 2},
    "llava_two_stage": {"sample_tokens": 2, "stage": "instruct", "lora_r": 8},
}
SHORT = {
    "max_steps": 1,
    "eval_steps": 1,
    "max_eval_rows": ROWS,
    "sample_rows": 1,
    "per_device_train_batch_size": ROWS,
    "gradient_accumulation_steps": BATCHES,
    "per_device_eval_batch_size": ROWS,
    "eval_strategy": "steps",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "dataloader_num_workers": 0,
    "report_to": "none",
    "disable_tqdm": True,
}


def load_recipe(name_or_path):
    """A recipe of this repository by its name, or a changed copy by its path -> its module."""
    path = Path(name_or_path)
    if path.suffix != ".py":
        path = ROOT / f"{name_or_path}.py"
    name = f"{path.stem}_{len(sys.modules)}"  # several copies may be loaded
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def make_model(model):
    """A small model of MODELS, or a family of tiny/families.py -> (folder with it, but without weights, tokenizer)."""
    if model in MODELS.values():
        processor = made_up.make_processor(model, small=True)
        sizes = made_up.sizes_of(model, small=True)
        sizes["text_config"]["vocab_size"] = 1031  # nothing else is as wide
        config = made_up.configuration(model, sizes, processor.tokenizer)
    else:
        config, processor, _ = families.FAMILIES[model]()
    config.save_pretrained(FOLDER / model)
    processor.save_pretrained(FOLDER / model)
    return FOLDER / model, processor.tokenizer


def flags_of(recipe, model, dtype, bits, checkpointing, more):
    """The command line of a run, as a list. more: flags besides the usual ones."""
    folder, tokenizer = make_model(model)
    rows = made_up.make_rows(recipe, 2 * ROWS * BATCHES, tokenizer, FOLDER / f"{recipe}-{model}")
    eval_rows = made_up.make_rows(recipe, ROWS, tokenizer, FOLDER / f"{recipe}-{model}-eval", seed=1)
    flags = SHORT | OWN_FLAGS[recipe]
    flags |= {"model_name_or_path": folder, "output_dir": tempfile.mkdtemp(dir=FOLDER)}
    flags |= {"dataset_name": rows, "eval_dataset_name": eval_rows}
    flags |= {"bf16": dtype == "bf16", "fp16": dtype == "fp16", "activation_checkpointing": checkpointing == "on"}
    flags["q_lora" if recipe == "finetune_minicpm_lora" else "load_in_4bit"] = bits == "4"
    flags |= more
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def run(name_or_path, model, dtype, bits, checkpointing, more):
    """Train one step of a recipe -> Report."""
    recipe = load_recipe(name_or_path)
    name = Path(recipe.__file__).stem
    model = model or MODELS[name]
    report = Report(str(name_or_path), model, dtype, bits, checkpointing)
    watch, printed, start = Watch(recipe.__file__), io.StringIO(), time.perf_counter()
    try:
        argv = flags_of(name, model, dtype, bits, checkpointing, more)
        with made_on_the_gpu(watch), trained_on_the_gpu(watch, report, recipe), contextlib.redirect_stdout(printed):
            recipe.main(argv)
    except Trained:
        pass
    except SystemExit as stop:
        report.error = f"{printed.getvalue()}\n{stop.code}"
    except Exception:
        report.error = traceback.format_exc(limit=-40)
    report.seconds = time.perf_counter() - start
    report.events = tuple(asdict(event) | {"count": count} for event, count in watch.events.items())
    return report


def show(report):
    """Print a report."""
    weights = f"{len(report.trained)} weights trained by {report.optimizer}"
    print(f"\n### {report}: {report.seconds:.0f} s, {weights}, {len(report.frozen)} frozen")
    events = [(event.pop("count"), Event(**event)) for event in map(dict, report.events)]
    for part, kind in itertools.product([FILL, STEP, EVALUATION, ANSWERS, BETWEEN], KINDS):
        found = [(count, event) for count, event in events if (event.part, event.kind) == (part, kind)]
        if not found:
            continue
        ours = sum(count for count, event in found if event.is_ours)
        print(f"  {part}: {sum(count for count, _ in found)} x {kind}, {ours} of them by a line of the recipe")
        for count, event in sorted(found, key=lambda pair: -pair[0]):
            print(f"    {count:4d} x {event}")
    if report.error:
        print(f"FAILED\n{report.error}")


def combinations(args):
    """The (dtype, bits, checkpointing) to run."""
    if args.only:
        return [combination.split("-") for combination in args.only]
    return itertools.product(args.dtype, args.bits, args.checkpointing)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="default: all")
    parser.add_argument("--model", nargs="+", help="families of tiny/families.py")
    for flag, values in {"dtype": ["bf16", "fp16"], "bits": ["4", "16"], "checkpointing": ["on", "off"]}.items():
        parser.add_argument(f"--{flag}", choices=values, nargs="+", default=values)
    parser.add_argument("--set", nargs="+", metavar="FLAG=VALUE", default=[], help="flags for the recipe: lora_r=0")
    parser.add_argument("--only", nargs="+", metavar="DTYPE-BITS-CHECKPOINTING", help="bf16-4-on fp16-16-off")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a list of reports, instead of printing them")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    reports, more = [], dict(flag.split("=", 1) for flag in args.set)
    for recipe, model in itertools.product(args.recipes or MODELS, args.model or [None]):
        for combination in combinations(args):
            reports.append(run(recipe, model, *combination, more))
            if not args.json:
                show(reports[-1])
    if args.json:
        args.json.write_text(json.dumps([asdict(report) for report in reports]))
    sys.exit(int(any(report.error for report in reports)))


if __name__ == "__main__":
    main()
