"""Before a run: will it work, will it fit, what exactly will be trained? Data, examples, parameters, memory, plan; no weights loaded.

    python tools/inspect_recipe.py sft_llava.py --dataset_name train.json --image_folder images
    python tools/inspect_recipe.py sft_llava.py --config llava-lora/settings.yaml --rows 1000     # a quick look at large data
    python tools/inspect_recipe.py dpo_idefics2.py --load_in_4bit false --per_device_train_batch_size 4
    python tools/inspect_recipe.py llava_two_stage.py --stage instruct --gpus 8 --strategy zero3
    python tools/inspect_recipe.py sft_llava.py --no-color > before.txt
    python tools/inspect_recipe.py sft_llava.py --json > before.json

Every other flag is the recipe's own. It needs no GPU: without --use_cpu everything is reckoned for one with bf16 (--fp16 true: for an older one). Of
the model only the configuration and the processor are read. The recipe's own main() then builds its model and its trainer out of
tensors that have a shape and no content, and its own training step is run on those; what that allocates is counted. What each figure
is, and how far off it can be: docs/inspect.md. Tables are drawn by rich, which comes with transformers (else: pip install rich).
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import warnings
import weakref
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest.mock import patch

import bitsandbytes
import datasets
import peft
import peft.tuners.lora.dora
import torch
import transformers
import transformers.quantizers.auto
import trl.trainer.utils
import yaml
from accelerate.utils import convert_outputs_to_fp32
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.generate import fail, load_recipe, start, underscored  # noqa: E402

CONTRACT = "Settings Training parse check load_processor load_data check_and_measure_rows BadRow load_image Collator load_model main"
STRATEGIES = {"ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp": "FSDP"}
CARDS = (16, 24, 40, 80)
# Of a card's memory: CUDA's own context, and what its allocator cannot use because it is in pieces.
CONTEXT, PIECES = 1e9, 0.05
# Rows that are run; what a larger batch takes is on the line through so many and twice as many.
MOST_ROWS = 16
# NF4 with double quantization: half a byte, for each 64 weights one byte of scale, for each 256 scales four bytes.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# What an optimizer keeps for each trained parameter, in bytes: AdamW has two moments; 8-bit ones have scales for each 256.
STATES = {
    "8bit": 2 * (1 + 4 / 256),
    "lion_8bit": 1 + 4 / 256,
    "lion": 4,
    "sgd": 0,
    "adagrad": 4,
    "adafactor": 0.01,
    "rmsprop": 4,
}


def parse(argv=None):
    """-> (own arguments, the recipe's flags)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="the recipe's file: sft_llava.py, or a copy of it")
    parser.add_argument(
        "--rows", type=int, help="look at so many rows only, evenly drawn (default: all, as the recipe itself does)"
    )
    parser.add_argument("--examples", type=int, default=2, help="rows to show as the model sees them (default 2)")
    parser.add_argument("--gpus", type=int, default=1, help="reckon for so many GPUs (default 1)")
    parser.add_argument(
        "--strategy", choices=list(STRATEGIES), default="ddp", help="how several GPUs share the work (default ddp)"
    )
    parser.add_argument("--no-color", action="store_true", help="plain text: what is trained on in «»")
    parser.add_argument("--json", action="store_true", help="one JSON object, for machines")
    parser.error = fail
    args, rest = parser.parse_known_args(argv)
    rest = underscored(rest)
    if (args.rows is not None and args.rows < 1) or args.gpus < 1 or args.examples < 0:
        fail("--rows and --gpus must be at least 1, --examples 0 or more")
    return args, rest


def asked_for(flag, rest):
    """Whether a flag of true or false is given, on the command line or in --config: True, False, or None where it is not."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--config")
    own.add_argument(f"--{flag}", nargs="?", const="true")
    given, said = own.parse_known_args(rest)[0], None
    if given.config:
        with contextlib.suppress(
            OSError, ValueError, yaml.YAMLError, AttributeError
        ):  # the recipe's own parse() has a message for that
            said = yaml.safe_load(Path(given.config).read_text(encoding="utf-8")).get(flag)
    said = getattr(given, flag) or said
    return None if said is None else str(said).lower() in ("true", "1", "yes", "y", "t")


def read_flags(recipe, rest, gpus):
    """The recipe's flags -> (settings, training, dtype of what is frozen). They are read as on a CPU, so that they are understood where there is no
    GPU, and then set to 16 bits, which is what a run without --use_cpu has. Raises SystemExit, as the recipe does."""
    cpu, bf16, fp16 = (asked_for(flag, rest) for flag in ("use_cpu", "bf16", "fp16"))
    half = bf16 or fp16 or not cpu and bf16 is None
    with contextlib.ExitStack() as stack:
        if fill_defaults := getattr(recipe, "fill_defaults", None):  # makes up its step of the number of processes

            def for_these_gpus(given):
                with patch.dict(os.environ, {"WORLD_SIZE": str(gpus)}):
                    return fill_defaults(given)

            stack.enter_context(patch.object(recipe, "fill_defaults", for_these_gpus))
        settings, training = recipe.parse(
            [*rest, "--use_cpu", "true", "--bf16", "false", "--fp16", "false", "--tf32", "false"]
        )
        recipe.check(settings, training)
    training.bf16, training.for_gpu = bool(half), not cpu  # fp16 has the same sizes, but no CPU runs it
    return settings, training, (torch.float16 if fp16 else torch.bfloat16) if half else torch.float32


# ------------------------------------------------------------------------------------------------------------------ data


class Seen(Exception):
    """Carries what was looked for out of a recipe's own function."""


def shape_of(batch):
    """A collator's batch -> (token ids, whether trained on, whether real), each (B, L)."""
    inputs = batch.get("data", batch)  # MiniCPM-V 2.6 wants its inputs together
    trained = batch["completion_mask"].bool() if "completion_mask" in batch else batch["labels"] != -100
    return inputs["input_ids"], trained, batch["attention_mask"].bool()


def look_at(rows, collator, recipe):
    """Rows through the collator, one by one -> for each {problem, length, trained (tokens), images ([width, height])}; length 0 where it is not known."""
    found, sizes, load_image = [], [], recipe.load_image

    def remember(cell, **options):
        image = load_image(cell, **options)
        sizes.append(list(image.size))
        return image

    with patch.object(recipe, "load_image", remember):
        for row in rows:
            sizes.clear()
            try:
                ids, trained, real = shape_of(collator([row]))
                found.append(
                    {
                        "problem": None,
                        "length": ids.shape[1],
                        "trained": int(trained.sum()),
                        "tokens": int(real.sum()),
                        "images": list(sizes),
                    }
                )
                found[-1]["image_keys"] = [
                    recipe.image_key(image) for image in collator.images_of(row)
                ]  # rows are held out by these
            except recipe.BadRow as e:
                problem = f"{e.reason}: {e.detail}"
                length = re.match(r"too long: (\d+) tokens", problem)
                found.append(
                    {
                        "problem": problem,
                        "length": int(length[1]) if length else 0,
                        "trained": 0,
                        "tokens": 0,
                        "images": list(sizes),
                    }
                )
    return found


def apart(job, count):
    """[job(0), job(1), ...], each in a process of its own where these can be forked. Raises BrokenProcessPool where one is ended from outside."""
    global _job
    _job, cores = job, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if min(cores, count) == 1 or sys.platform != "linux":
        return [job(n) for n in range(count)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process would wait forever for OpenMP's threads, which only its parent has
    try:  # not multiprocessing's Pool, which waits forever for a process that the system has ended because memory ran out
        with ProcessPoolExecutor(min(cores, count), multiprocessing.get_context("fork")) as pool:
            return list(pool.map(_run_job, range(count)))
    finally:
        torch.set_num_threads(threads)


def _run_job(n):
    return _job(n)


class Data:
    """Stands in for a recipe's check_and_measure_rows: the same rows are left over, but nothing stops at a bad one, and what is seen is kept in `looked`,
    [(name, row numbers, what look_at found)], one for the training rows and one for others."""

    def __init__(self, recipe, most):
        self.recipe, self.most, self.looked = recipe, most, []

    def __call__(self, data, name, collator, settings, training):
        if len(data) == 0:
            fail(f"{name} is empty: there is nothing to train on")
        whole = len(data)
        if self.most and whole > self.most:
            data = data.select([n * whole // self.most for n in range(self.most)])
        parts = min(os.cpu_count() or 1, 1 + len(data) // 500)  # decoding pictures is what takes the time
        bounds = [n * len(data) // parts for n in range(parts + 1)]
        try:
            found = sum(
                apart(lambda n: look_at(data.select(range(bounds[n], bounds[n + 1])), collator, self.recipe), parts),
                [],
            )
        except BrokenProcessPool:
            fail(
                f"a process that looked at the rows of {name} was ended by the system, which mostly means that memory ran out: --rows 1000 looks at some only"
            )
        limit = max_length(settings, training) or math.inf
        for one in found:
            if one["problem"] is None and one["length"] > limit:  # some recipes look at the length after the collator
                one["problem"] = f"too long: {one['length']} tokens, --max_length is {limit}"
        self.looked.append((str(name), whole, list(data["row"]), found))
        good = [n for n, one in enumerate(found) if one["problem"] is None]
        if not good:
            raise Seen
        columns = {
            "length": [one["length"] for one in found],
            "image_keys": [one.get("image_keys", []) for one in found],
        }
        return datasets.concatenate_datasets([data, datasets.Dataset.from_dict(columns)], axis=1).select(good)


def max_length(settings, training):
    """The longest row that the recipe takes, in tokens; None for any."""
    for holder, name in ((settings, "max_length"), (settings, "model_max_length"), (training, "max_length")):
        if hasattr(holder, name):
            return getattr(holder, name)
    return None


def quantile(values, share):
    """The value below which so large a share of the values is."""
    values = sorted(values)
    return values[min(len(values) - 1, math.ceil(share * len(values)) - 1)] if values else 0


def about_data(looked, limit, per_row):
    """One entry of Data.looked -> the report's section on it."""
    name, whole, numbers, found = looked
    bad = collections.defaultdict(list)
    for number, one in zip(numbers, found):
        if one["problem"]:
            bad[one["problem"].split(":")[0]].append({"row": number, "why": one["problem"]})
    lengths = [one["length"] for one in found if one["length"]]
    images = collections.Counter(len(one["images"]) for one in found if not one["problem"])
    sizes = [size for one in found for size in one["images"]]
    good = [one for one in found if not one["problem"]]
    middle = lambda n: statistics.median(size[n] for size in sizes) if sizes else None
    return {
        "name": name,
        "rows": whole,
        "looked_at": len(found),
        "good": len(good),
        "bad": dict(bad),
        "images_per_row": dict(sorted(images.items())),
        "image_sizes": {
            "smallest": min(sizes, key=math.prod),
            "median": [middle(0), middle(1)],
            "largest": max(sizes, key=math.prod),
            "different": len(set(map(tuple, sizes))),
        }
        if sizes
        else None,
        "tokens_per_row": {
            "median": statistics.median(lengths),
            "p95": quantile(lengths, 0.95),
            "longest": max(lengths),
        }
        if lengths
        else None,
        "max_length": limit,
        "too_long": len(bad["too long"]) if "too long" in bad else 0,
        "trained_share": sum(one["trained"] for one in good) / max(1, sum(one["tokens"] for one in good)),
        "answers_per_row": per_row,
    }


def example(batch, processor, recipe):
    """A batch of one row -> [{kind: text | trained | image, text, tokens}] for each of its sequences: DPO has two, the pair."""
    token = getattr(recipe, "image_token_id", lambda processor: processor.image_token_id)(processor)
    ids, trained, real = shape_of(batch)
    shown = []
    for row, learnt, there in zip(ids, trained, real):
        row, learnt, pieces, said, end = row[there].tolist(), learnt[there].tolist(), [], "", 0
        for kind, run in itertools.groupby(
            ("image" if i == token else "trained" if one else "text") for i, one in zip(row, learnt)
        ):
            end += (count := len(list(run)))
            text = processor.tokenizer.decode(
                row[:end]
            )  # from the start: by itself a run would lose its leading space
            mark = f"{processor.tokenizer.decode(row[end - 1 : end])} x {count}"
            pieces.append({"kind": kind, "text": mark if kind == "image" else text[len(said) :], "tokens": count})
            said = text
        shown.append(pieces)
    return shown


# ------------------------------------------------------------------------------------- a model without content


def without_weights(
    cls,
    name,
    *args,
    config=None,
    dtype=None,
    quantization_config=None,
    output_loading_info=False,
    revision=None,
    **kwargs,
):
    """Stands in for from_pretrained: the model on the meta device, from its configuration, with 4-bit layers where the quantizer would put them."""
    config = config if config is not None else cls.config_class.from_pretrained(name, revision=revision)
    with torch.device("meta"):
        model = cls._from_config(config, dtype=dtype)
        model.name_or_path = str(name)
        if quantization_config is not None:
            quantizer = transformers.quantizers.auto.AutoHfQuantizer.from_config(quantization_config)
            quantizer.preprocess_model(model=model, device_map={"": "meta"}, dtype=dtype)
            model.hf_quantizer, model.is_loaded_in_4bit, model.is_4bit_serializable = quantizer, True, True
            model.config.quantization_config = quantization_config
    return (
        (model, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}) if output_loading_info else model
    )


def dequantized(layer, stock=peft.tuners.lora.dora.dequantize_module_weight):
    """Stands in for the 16-bit weights of a layer, which DoRA asks for at the beginning and in each forward pass."""
    if not isinstance(layer, bitsandbytes.nn.Linear4bit):
        return stock(layer)
    return layer.weight.new_empty(layer.out_features, layer.in_features, dtype=layer.compute_dtype or torch.float32)


def build(recipe, settings, training, train, held_out):
    """The recipe's own trainer, as its main() makes it, up to the moment when it would train; all that it would train and load is on the
    meta device. Nothing is written outside a folder that is gone afterwards."""
    made = peft.PeftModel.__init__

    def on_meta(self, *args, **kwargs):
        with torch.device("meta"):
            made(self, *args, **kwargs)

    def stop(trainer, *args, **kwargs):
        raise Seen(trainer)

    stand_ins = {
        "parse": lambda argv=None: (settings, training),
        "check": lambda *args: None,
        "checkpoint_to_resume": lambda training, *args: None,
        "load_data": lambda *args: (train, held_out),
        # a joined model is written to the disk before it is adapted: of that only what from_pretrained reads above
        "save_renamed": lambda model, names, dtype, folder, *args, **kwargs: model.config.save_pretrained(folder),
    }
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as out:
        training.output_dir, training.report_to, training.push_to_hub = out, [], False
        training.logging_dir = out
        for name in stand_ins.keys() & vars(recipe).keys():
            stack.enter_context(patch.object(recipe, name, stand_ins[name]))
        stack.enter_context(
            patch.object(transformers.PreTrainedModel, "from_pretrained", classmethod(without_weights))
        )
        stack.enter_context(patch.object(peft.PeftModel, "__init__", on_meta))
        stack.enter_context(patch.object(peft.tuners.lora.dora, "dequantize_module_weight", dequantized))
        stack.enter_context(
            patch.object(transformers.Trainer, "_move_model_to_device", lambda self, model, device: model)
        )
        stack.enter_context(patch.object(transformers.Trainer, "train", stop))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            recipe.main([])
        except Seen as seen:
            return seen.args[0]
        finally:
            os.makedirs(out, exist_ok=True)
    fail(f"{recipe.__file__}: its main() trains nothing by a Trainer")


# ------------------------------------------------------------------------------------------------------ parameters

KINDS = (
    ("vision tower", r"vision|visual|vpm"),
    ("projector", r"projector|connector|merger|resampler|abstractor|aligner"),
    ("language model", r"language|text_model|llm|lm_head|decoder|embed_tokens"),
)


def kind_of(name):
    """The full name of a weight -> vision tower, projector or language model (to which lm_head belongs), else where it is."""
    path = name.split(".")
    top = path[1] if path[0] == "model" and len(path) > 2 else path[0]
    return next((kind for kind, words in KINDS if re.search(words, top)), top)


def is_nf4(p):
    return type(p).__name__ == "Params4bit"


def about_parameters(model):
    """A model without content, adapters in it -> one entry for each part: all parameters, trained ones, 4-bit ones, of how many the weights are
    adapters; bytes of what is frozen and of what is trained."""
    parts = {}
    for name, p in model.named_parameters():
        plain = (
            name.removeprefix("base_model.model.")
            .replace("original_module.", "")
            .replace("modules_to_save.default.", "")
        )
        part = parts.setdefault(
            kind_of(plain),
            dict.fromkeys(("total", "trainable", "adapters", "four_bit", "frozen_bytes", "trained_bytes"), 0),
        )
        size = p.numel() * (NF4 if is_nf4(p) else p.element_size())
        part["total"] += p.numel()
        part["four_bit"] += p.numel() * is_nf4(p)
        part["trainable"] += p.numel() * p.requires_grad
        part["adapters"] += p.numel() * ("lora_" in name)
        part["trained_bytes" if p.requires_grad else "frozen_bytes"] += size
    order = [kind for kind, _ in KINDS]
    return dict(sorted(parts.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


# ---------------------------------------------------------------------------------------------------------- memory


class Dequantized(torch.autograd.Function):
    """What bitsandbytes does with a 4-bit layer, as far as memory goes: 16-bit weights for the time of each product, never kept."""

    @staticmethod
    def forward(ctx, x, out_features, in_features):
        ctx.sizes = out_features, in_features
        return x @ x.new_empty(out_features, in_features).t()

    @staticmethod
    def backward(ctx, grad):
        return grad @ grad.new_empty(*ctx.sizes), None, None


def four_bit_forward(layer, x):
    """Stands in for Linear4bit.forward, on tensors without content."""
    kept, dtype = x.dtype, layer.compute_dtype or x.dtype
    y = Dequantized.apply(x.to(dtype), layer.out_features, layer.in_features)
    return (y if layer.bias is None else y + layer.bias.to(dtype)).to(kept)


class Hollow(torch.Tensor):
    """A tensor that says it is on the CPU and has a shape, but no content: operators run on its `meta`, on the meta device. Of torch's own kind,
    FakeTensor, a training step takes some ten times as long."""

    @staticmethod
    def __new__(cls, meta):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device="cpu",
        )
        made.meta = meta
        return made

    def __repr__(self, **kwargs):
        return f"Hollow({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return without_content(func, args, kwargs or {})


ATEN = torch.ops.aten
NUMBERS = {ATEN._local_scalar_dense.default, ATEN.item.default, ATEN.is_nonzero.default}
INDEXED = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default}


def without_content(func, args, kwargs):
    """An operator on tensors, some of them Hollow -> what it gives, Hollow. What depends on content: a mask of known content picks as many
    elements as it has, a number that nobody knows is 1."""
    if func in NUMBERS:
        return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
    if func is ATEN.equal.default:
        return True
    if func in INDEXED:
        places = []
        for one in args[1]:  # a mask has as many places as it has ones
            mask = one is not None and one.dtype in (torch.bool, torch.uint8) and not isinstance(one, Hollow)
            places += one.nonzero(as_tuple=True) if mask else [one]
        args = (args[0], places, *args[2:])
    elif func is ATEN.masked_select.default and not isinstance(args[1], Hollow):
        return Hollow(
            args[0].meta.new_empty(int(args[1].expand(torch.broadcast_shapes(args[0].shape, args[1].shape)).sum()))
        )
    owners = {}
    args, kwargs = [to_meta(x, owners) for x in args], {name: to_meta(x, owners) for name, x in kwargs.items()}
    return from_meta(func(*args, **kwargs), owners)


# Not closures: such that call themselves are alive until the garbage collector comes, and their tensors with them.
def to_meta(x, owners):
    """An operator's argument as it takes it on the meta device; `owners`: {id of a meta tensor: the Hollow one that it is of}."""
    if isinstance(x, Hollow):
        owners[id(x.meta)] = x
        return x.meta
    if isinstance(x, torch.Tensor):
        return x.to("meta")
    if isinstance(x, (list, tuple)):
        return [to_meta(one, owners) for one in x]
    return torch.device("meta") if isinstance(x, torch.device) else x


def from_meta(x, owners):
    """What it gave, Hollow; what it changed in place is the tensor that it was."""
    if isinstance(x, torch.Tensor):
        return owners[id(x)] if id(x) in owners else Hollow(x)
    return type(x)([from_meta(one, owners) for one in x]) if isinstance(x, (list, tuple)) else x


def tensors(tree):
    """The tensors in lists, tuples and dicts of such."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple, dict)):
        for one in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(one)


class Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that operators make within it, alive (`now`) and at most (`peak`), real ones and hollow ones."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakValueDictionary()

    def storages(self, tree):
        for tensor in tensors(tree):
            storage = (tensor.meta if isinstance(tensor, Hollow) else tensor).untyped_storage()
            if storage._cdata not in self.known:
                self.known[storage._cdata] = storage
                yield storage

    def watch(self, tree):
        """Count these tensors, where they are new."""
        for storage in self.storages(tree):
            self.now += (size := storage.nbytes())
            weakref.finalize(storage, self.gone, size)
        self.peak = max(self.peak, self.now)

    def gone(self, size):
        self.now -= size

    def ignore(self, tree):
        """What was there before is not counted."""
        collections.deque(self.storages(tree), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        hollow = any(isinstance(x, Hollow) for x in tensors((args, kwargs)))
        out = without_content(func, args, kwargs) if hollow else func(*args, **kwargs)
        self.watch(out)
        return out


def hollow(model):
    """Weights on the meta device -> Hollow ones. Some operators of training look at real masks and positions, which a meta tensor would swallow."""
    seen = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.device.type == "meta":
                if id(p) not in seen:
                    seen[id(p)] = (
                        p,
                        torch.nn.Parameter(
                            Hollow(torch.empty(p.shape, dtype=p.dtype, device="meta")), p.requires_grad
                        ),
                    )  # p is kept: another one could get its id
                module._parameters[name] = seen[id(p)][1]
        for name, b in module._buffers.items():
            if b is not None and b.device.type == "meta":
                module._buffers[name] = Hollow(b)


def step(trainer, rows, checkpointing):
    """The bytes at most alive within one training step of the trainer on these rows, besides weights, gradients and optimizer states."""
    model, collator = trainer.model, trainer.data_collator
    if checkpointing:
        model.activation_checkpointing_enable()
    else:
        model.activation_checkpointing_disable()
    batch, count = collator(rows), Allocations()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:  # the second of several accumulated batches: gradients are there
        p.grad = torch.zeros_like(p)
    count.ignore([list(model.parameters()), list(model.buffers()), [p.grad for p in trained]])
    inputs = {name: value for name, value in batch.items()}
    items = sum(int(values.ne(-100).sum()) for name, values in inputs.items() if name == "labels") or None
    trainer.current_gradient_accumulation_steps, forward = 1, model.forward
    if trainer.args.bf16:  # what Accelerate makes of it before the first step
        forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(forward))
    with patch.object(model, "forward", forward), count:
        count.watch(inputs)
        trainer.training_step(model, inputs, items if items is None else torch.tensor(items))
    for p in trained:
        p.grad = None
    return count.peak


def measure(trainer, rows, batch):
    """-> {with or without checkpointing: (bytes of a step at this batch, bytes for each row more)}, on these rows, over and over where they are too few,
    at most 2 * MOST_ROWS at a time. The steps are independent of each other: where processes can be forked each has its own."""
    few = min(batch, MOST_ROWS)
    every = [(checkpointing, size) for checkpointing in (True, False) for size in (few, 2 * few)]
    rows = list(itertools.islice(itertools.cycle(rows), few))

    hollow(trainer.model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(bitsandbytes.nn.Linear4bit, "forward", four_bit_forward))
        stack.enter_context(patch.object(peft.tuners.lora.dora, "dequantize_module_weight", dequantized))
        if (
            trainer.args.for_gpu
        ):  # which has Triton, so that TRL scores label positions only, and keeps dropout's masks as bytes
            stack.enter_context(patch.object(trl.trainer.utils, "_use_triton", lambda device: True))
            stack.enter_context(patch.object(torch.nn.functional, "dropout", dropout_of_a_gpu))
            if trainer.args.bf16:  # PEFT and CUDA's autocast
                stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda *device: True))
                stack.enter_context(patch.object(torch.nn.functional, "layer_norm", layer_norm_of_a_gpu))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        found = apart(lambda n: step(trainer, rows * (every[n][1] // few), every[n][0]), len(every))
    found = dict(zip(every, found))
    each = {kind: (found[kind, 2 * few] - found[kind, few]) / few for kind in (True, False)}
    return {kind: (found[kind, few] + (batch - few) * each[kind], each[kind]) for kind in (True, False)}


def dropout_of_a_gpu(x, p=0.5, training=True, inplace=False):
    """F.dropout as it runs on a GPU; on a CPU its mask is as large as what it masks."""
    return torch.native_dropout(x, p, training)[0] if training and p > 0 else x


def layer_norm_of_a_gpu(x, shape, weight=None, bias=None, eps=1e-5, stock=torch.nn.functional.layer_norm):
    """F.layer_norm as CUDA's autocast runs it: in float32, which a CPU's does not."""
    return stock(x.float(), shape, *(None if one is None else one.float() for one in (weight, bias)), eps)


def state_bytes(optim):
    """What an optimizer keeps for each trained parameter, in bytes."""
    known = sorted((name for name in STATES if all(word in optim for word in name.split("_"))), key=len)
    return STATES[known[-1]] if known else 8


def per_gpu(parts, optim, strategy, gpus, half, layer, hidden):
    """Bytes on each GPU, apart from activations: weights, trained (adapters, and parts that are trained in full), gradients, optimizer,
    exchange (what the GPUs send each other); None where the strategy cannot do it.

    DDP keeps everything everywhere; ZeRO-2 shares out gradients and optimizer, ZeRO-3 and FSDP the weights as well, of which they gather two layers
    at a time. DeepSpeed trains in 16 bits and keeps a float32 copy with the optimizer's states; else what is trained is as the trainer has it."""
    frozen, trained, count, nf4 = (
        sum(part[key] for part in parts.values()) for key in ("frozen_bytes", "trained_bytes", "trainable", "four_bit")
    )
    states, wide = state_bytes(optim), 2 if half else 4
    if nf4 and strategy in ("zero3", "fsdp"):
        return None
    if strategy == "ddp":
        return {
            "weights": frozen,
            "trained": trained,
            "gradients": trained,
            "optimizer": count * states,
            "exchange": trained * (gpus > 1),
        }
    if strategy == "fsdp":
        return {
            "weights": frozen / gpus,
            "trained": trained / gpus,
            "gradients": trained / gpus,
            "optimizer": count * states / gpus,
            "exchange": 2 * layer,
        }
    share = gpus if strategy == "zero3" else 1
    return {
        "weights": frozen / share,
        "trained": count * wide / share,
        "gradients": count * wide / gpus,
        "optimizer": count * (states + 4 * half) / gpus,
        "exchange": 2 * wide * hidden**2 + 2 * layer * (strategy == "zero3"),
    }


def by_the_rule(parameters, trained, reference):
    """The rule of thumb of the DPO post, in bytes: everything in float32, and 16 bits with an adapter; weights, reference, gradients, AdamW's states."""
    table = {"all in float32": (4 * parameters, 4 * parameters * reference, 4 * parameters, 8 * parameters)}
    if trained < parameters:
        table["16 bits, adapter"] = (2 * parameters, 2 * parameters * reference, 2 * trained, 4 * trained)
    return {
        name: dict(zip(("weights", "reference", "gradients", "optimizer"), row)) | {"sum": sum(row)}
        for name, row in table.items()
    }


def about_memory(trainer, parts, rows, args):
    """The trainer, its parts, the rows of the longest batch -> the report's section on memory."""
    training, batch = trainer.args, trainer.args.per_device_train_batch_size
    optim = getattr(training.optim, "value", training.optim)
    hidden = trainer.model.config.get_text_config().hidden_size if hasattr(trainer.model, "config") else 0
    layers = [
        sum(p.numel() * (NF4 if is_nf4(p) else p.element_size()) for p in layer.parameters())
        for module in trainer.model.modules()
        if isinstance(module, torch.nn.ModuleList)
        for layer in module
    ]
    fixed = {
        name: per_gpu(parts, optim, name, args.gpus, training.bf16, max(layers, default=0), hidden)
        for name in STRATEGIES
    }
    total = {key: sum(part[key] for part in parts.values()) for key in ("total", "trainable", "adapters")}
    report = {
        "optim": optim,
        "batch": batch,
        "for_gpu": training.for_gpu,
        "gpus": args.gpus,
        "strategy": args.strategy,
        "fixed": fixed,
        "checkpointing": training.activation_checkpointing,
        "by_the_rule": by_the_rule(
            total["total"] - total["adapters"], total["trainable"], isinstance(trainer, trl.DPOTrainer)
        ),
        "activations": None,
        "fits": None,
    }
    try:
        found = measure(trainer, rows, batch)
    except Exception as e:  # a model that looks at content somewhere: the other figures hold all the same
        return report | {"not_counted": f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"}
    names = {True: "with_checkpointing", False: "without_checkpointing"}
    report["activations"] = {names[kind]: {"bytes": at, "for_each_row": more} for kind, (at, more) in found.items()}
    if mine := fixed[args.strategy]:
        report["fits"] = {}
        for card in CARDS:
            room = card * 1e9 * (1 - PIECES) - CONTEXT - sum(mine.values())
            report["fits"][card] = {
                names[kind]: max(0, batch + math.floor((room - at) / more) if more > 0 else 0)
                for kind, (at, more) in found.items()
            }
        report["sum"] = {names[kind]: sum(mine.values()) + at for kind, (at, _) in found.items()}
    return report


# ------------------------------------------------------------------------------------------------------------ plan


def learning_rates(trainer):
    """{part: the rate that its weights are trained at}, out of the trainer's own optimizer."""
    names, found = {id(p): name for name, p in trainer.model.named_parameters()}, {}
    for group in trainer.create_optimizer().param_groups:
        for p in group["params"]:
            name = names[id(p)]
            plain = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            what = f"{kind_of(plain)}, {'adapters' if 'lora_' in name else 'in full'}"
            found[what] = max(found.get(what, 0), group["lr"])
    return found


def usual(what, preferences):
    """The lowest and the highest learning rate that one would not wonder at."""
    if "adapters" in what:
        return (5e-7, 2e-4) if preferences else (1e-5, 1e-3)
    if what.startswith("projector"):
        return (1e-6, 2e-3)
    return (1e-8, 5e-6) if preferences else (1e-7, 1e-4)


def about_plan(trainer, settings, training, data, train, held_out, parts, asked_to_evaluate, gpus):
    """-> the report's section on steps, and a list of what is odd."""
    main = data[-1]  # the training rows are looked at last
    share = main["looked_at"] / main["rows"]
    rows, of_them = round(len(train) / share), None  # of_them: how many of the training rows the recipe holds out
    if share < 1 and held_out is not None and len(data) == 1:  # of all of them it holds out another share than of some
        whole = round(main["good"] / share)
        of_them = math.ceil(whole * max(settings.eval_fraction, 1 / whole))
        rows = whole - of_them
    batch = training.per_device_train_batch_size * gpus * training.gradient_accumulation_steps
    a_pass = math.ceil(rows / batch)
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * a_pass)
    every = {"no": None, "epoch": a_pass, "steps": training.eval_steps}[
        training.eval_strategy.value if asked_to_evaluate and held_out is not None else "no"
    ]
    every = every and (max(1, math.ceil(every * steps)) if every < 1 else every)
    marks = ()  # when it is evaluated, in what --eval_delay counts in
    if every and training.eval_strategy == "epoch":  # after each, the last one whole or not
        marks = [min(n, steps / a_pass) for n in range(1, math.ceil(steps / a_pass) + 1)]
    elif every:  # and at the end
        marks = {*range(int(every), steps + 1, int(every)), steps}
    evaluations = sum(mark >= training.eval_delay for mark in marks) + bool(every and training.eval_on_start)
    scored = len(held_out) if held_out is not None else 0
    if data[0]["looked_at"] < data[0]["rows"]:  # a share of the rows was looked at: of those held out, too
        scored = min(of_them or round(scored * data[0]["rows"] / data[0]["looked_at"]), settings.max_eval_rows)
    fields = {f.name: f.metadata.get("help", "") for f in dataclasses.fields(settings)}
    answered = (
        scored
        if "answer" in fields.get("max_eval_rows", "").lower()
        else min(scored, getattr(settings, "sample_rows", 0))
    )
    tokens = getattr(settings, "max_new_tokens", None) or getattr(settings, "sample_tokens", None) or 0
    # In forward passes of a row: training takes three, four with checkpointing, and a generated token of a batch a fifth of one.
    train_cost = steps * batch * (4 if training.activation_checkpointing else 3)
    eval_cost = evaluations * (scored + math.ceil(answered / training.per_device_eval_batch_size) * tokens / 5)
    warmup = training.get_warmup_steps(steps)
    try:
        rates = learning_rates(trainer)
    except Exception:  # an optimizer that wants a GPU even to be made
        rates = {}
    preferences, odd = isinstance(trainer, trl.DPOTrainer), []
    for what, rate in rates.items():
        low, high = usual(what, preferences)
        if not low <= rate <= high:
            odd.append(
                f"learning rate {rate:g} for {what}: unusually {'low' if rate < low else 'high'}, usual are {low:g} to {high:g}{' in DPO' * preferences}"
            )
    if not asked_to_evaluate:
        odd.append("nothing will be evaluated: --eval_strategy no")
    elif held_out is None:
        odd.append("there is no evaluation split, and none is held out: nothing will tell when to stop")
    elif evaluations == 0:
        odd.append(
            f"no evaluation will happen: --eval_delay is {training.eval_delay:g}, and there are {steps} steps, {steps / a_pass:.3g} epochs"
        )
    elif training.eval_strategy == "steps" and steps < every:
        odd.append(f"no evaluation before the end: one comes every {every:g} steps, and there are {steps}")
    if eval_cost > train_cost:
        odd.append(
            f"evaluation takes longer than training: {evaluations} evaluations of {scored} rows, {answered} of them answered with up to {tokens} tokens"
        )
    if training.save_strategy.value == "steps" and 1 <= steps < training.save_steps:
        odd.append(
            f"no checkpoint before the end: one comes every {training.save_steps:g} steps, and there are {steps}"
        )
    if warmup >= steps:
        odd.append(f"the learning rate never comes up: {warmup:g} steps of warm-up, {steps} in all")
    if training.max_steps > 0 and steps < a_pass:
        odd.append(f"--max_steps {steps} is less than one pass: {1 - steps / a_pass:.1%} of the rows are never seen")
    if rows < batch:
        odd.append(f"a step takes {batch} rows, and there are {rows}")
    if steps / a_pass > 10:
        odd.append(f"{steps / a_pass:.0f} passes over the data")
    would_stop = False
    for part in data:
        stops = [
            reason
            for reason in part["bad"]
            if getattr(settings, "on_long_rows" if reason == "too long" else "on_bad_rows", "stop") == "stop"
        ]
        if stops:
            would_stop = True
            odd.append(
                f"the run would stop at bad rows of {part['name']} ({', '.join(stops)}): fix them, or --on_bad_rows skip, --on_long_rows drop"
            )
        elif part["looked_at"] - part["good"] > 0.1 * part["looked_at"]:
            odd.append(f"{1 - part['good'] / part['looked_at']:.0%} of the rows of {part['name']} are left out")
    if not any(part["trainable"] for part in parts.values()):
        odd.append("nothing is trained")
    return {
        "rows": rows,
        "evaluation_rows": scored,
        "effective_batch": batch,
        "steps": steps,
        "epochs": steps / a_pass,
        "evaluations": evaluations,
        "warmup_steps": warmup,
        "learning_rates": rates,
        "gpus": gpus,
        "would_stop": would_stop,
        "sampled": share < 1,
    }, odd


# ---------------------------------------------------------------------------------------------------------- report


def inspect(recipe, args, rest):
    """A recipe, own arguments and the recipe's flags -> the report, a dict as --json prints it."""
    settings, training, dtype = read_flags(recipe, rest, args.gpus)
    data, batch = Data(recipe, args.rows), training.per_device_train_batch_size
    asked_to_evaluate, train, held_out = training.eval_strategy != "no", None, None
    processor = recipe.load_processor(settings)
    collator = recipe.Collator(processor, settings, training)
    with (
        patch.object(recipe, "check_and_measure_rows", data),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(Seen),
    ):
        train, held_out = recipe.load_data(settings, training, collator)
    report = {
        "recipe": str(args.recipe),
        "model": settings.model_name_or_path or f"{settings.vision_tower} + {settings.language_model}",
        "precision": str(dtype).removeprefix("torch."),
    }
    report["data"] = [about_data(one, max_length(settings, training), 1) for one in data.looked]
    if train is None:
        return report | {
            "examples": [],
            "parts": {},
            "memory": None,
            "plan": None,
            "odd": [f"no row of {data.looked[-1][0]} can be trained on"],
        }
    few = min(args.examples, len(train))
    chosen = sorted((train[n * len(train) // few] for n in range(few)), key=lambda row: row["row"])
    report["examples"] = [
        {"row": row["row"], "sequences": example(collator([row]), processor, recipe)} for row in chosen
    ]
    for shown in report["examples"]:
        pieces = [piece for pieces in shown["sequences"] for piece in pieces]
        shown["tokens"] = sum(piece["tokens"] for piece in pieces)
        shown["trained_share"] = (
            sum(piece["tokens"] for piece in pieces if piece["kind"] == "trained") / shown["tokens"]
        )
    lengths = train["length"]
    longest = sorted(range(len(train)), key=lambda n: -lengths[n])[:batch]
    if held_out is None:
        training.eval_strategy, training.load_best_model_at_end = (
            transformers.trainer_utils.IntervalStrategy("no"),
            False,
        )
    try:
        trainer = build(recipe, settings, training, train, held_out)
    except Exception as e:  # PEFT and TRL say so when a trainer cannot be made of these settings
        fail(
            f"{args.recipe} cannot make its trainer of these settings: {type(e).__name__}: {' '.join(str(e).split())}"
        )
    report["parts"] = about_parameters(trainer.model)
    report["plan"], report["odd"] = about_plan(
        trainer, settings, training, report["data"], train, held_out, report["parts"], asked_to_evaluate, args.gpus
    )
    report["memory"] = about_memory(trainer, report["parts"], [train[n] for n in longest], args)
    report["memory"]["longest"] = lengths[longest[0]]
    if (most := report["memory"].get("sum")) and (fits := report["memory"]["fits"]):
        now = "with_checkpointing" if training.activation_checkpointing else "without_checkpointing"
        if fits[CARDS[-1]][now] < batch:
            report["odd"].append(f"{most[now] / 1e9:.1f} GB on a GPU: more than one of {CARDS[-1]} GB has")
    if report["memory"]["fixed"][args.strategy] is None:
        report["odd"].append(f"4-bit weights are not split: {STRATEGIES[args.strategy]} cannot be used with them")
    refused = {*getattr(recipe, "REFUSED_HERE", ()), *getattr(recipe, "REFUSED_EVERYWHERE", ())}
    if hasattr(recipe, "check_processes"):  # it has DeepSpeed from its launcher
        refused.discard("deepspeed")
    if (flag := {"zero2": "deepspeed", "zero3": "deepspeed", "fsdp": "fsdp"}.get(args.strategy)) in refused:
        report["odd"].append(f"{args.recipe} takes no --{flag}: several GPUs share its work by DDP only")
    return report


def visible(text):
    """Text of somebody's data, with its control characters (they could recolour the report) written out."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def show(report, console, colour):
    """Print a report as tables."""
    gb = lambda size: f"{size / 1e9:.{4 if 0 < size < 5e6 else 2 if size < 1e11 else 0}f}"
    say = lambda text="": console.print(text, highlight=False, soft_wrap=True)
    head = lambda text: say(f"\n[bold]{text}[/bold]" if colour else f"\n== {text}")

    def table(*columns):
        made = Table(box=None, pad_edge=False, show_header=any(columns), header_style="dim" if colour else None)
        for n, column in enumerate(columns):
            made.add_column(column, justify="left" if n == 0 else "right", overflow="fold")
        return made

    head("Data")
    for part in report["data"]:
        seen = "" if part["looked_at"] == part["rows"] else f", {part['looked_at']:,} of them looked at"
        bad = part["looked_at"] - part["good"]
        say(escape(f"{part['name']}: {part['rows']:,} rows{seen}, {bad:,} bad"))
        for reason, rows in part["bad"].items():
            say(f"  [red]{escape(reason)}[/red]: {len(rows)}")
            for one in rows[:20]:
                say(escape(visible(f"    row {one['row']}: {one['why']}")))
            if len(rows) > 20:
                say(f"    ... and {len(rows) - 20} more")
        if tokens := part["tokens_per_row"]:
            limit = (
                f", {part['too_long']} above max_length {part['max_length']}"
                if part["max_length"]
                else ", no max_length"
            )
            say(
                f"  tokens per row: median {tokens['median']:g}, 95 % up to {tokens['p95']}, longest {tokens['longest']}{limit}; {part['trained_share']:.1%} trained on"
            )
        if part["images_per_row"]:
            say(
                "  images per row: "
                + ", ".join(f"{n} in {count:,} rows" for n, count in part["images_per_row"].items())
            )
        if sizes := part["image_sizes"]:
            of = lambda size: f"{size[0]:g} x {size[1]:g}"
            say(
                f"  image sizes: {of(sizes['smallest'])} to {of(sizes['largest'])}, median {of(sizes['median'])}"
                if sizes["different"] > 1
                else f"  image sizes: all {of(sizes['median'])}"
            )

    for shown in report["examples"]:
        both = " in both sequences" if len(shown["sequences"]) > 1 else ""
        head(
            f"Row {shown['row']} as the model sees it: {shown['tokens']} tokens{both}, {shown['trained_share']:.1%} trained on"
        )
        for n, pieces in enumerate(shown["sequences"]):
            if len(shown["sequences"]) > 1:
                say(f"[dim]{('chosen', 'rejected')[n % 2]}:[/dim]")
            style = {"text": "{}", "trained": "[bold green]{}[/]" if colour else "«{}»", "image": "[cyan]{}[/]"}
            say("".join(style[piece["kind"]].format(escape(visible(piece["text"]))) for piece in pieces))

    if report["parts"]:
        head(f"Parameters of {report['model']}, {report['precision']}")
        rows = table("part", "all", "trained", "of it adapters", "in 4-bit", "GB")
        parts = {
            **report["parts"],
            "all": {
                key: sum(part[key] for part in report["parts"].values())
                for key in next(iter(report["parts"].values()))
            },
        }
        for name, part in parts.items():
            trained = (
                f"{part['trainable']:,} ({part['trainable'] / part['total']:.2%})" if part["trainable"] else "frozen"
            )
            rows.add_row(
                name,
                f"{part['total']:,}",
                trained,
                f"{part['adapters']:,}",
                f"{part['four_bit']:,}",
                gb(part["frozen_bytes"] + part["trained_bytes"]),
            )
        console.print(rows)

    if memory := report["memory"]:
        shown = list(STRATEGIES) if memory["gpus"] > 1 else [memory["strategy"]]
        where = (
            f"of each of {memory['gpus']} GPUs"
            if memory["gpus"] > 1
            else "of the GPU"
            if memory["for_gpu"]
            else "of a CPU (--use_cpu)"
        )
        head(f"Memory {where}, in GB")
        rows = table("", *(STRATEGIES[name] if memory["gpus"] > 1 else "" for name in shown))
        for key, label in (
            ("weights", "frozen weights"),
            ("trained", "what is trained"),
            ("gradients", "gradients"),
            ("optimizer", f"optimizer ({memory['optim']})"),
            ("exchange", "sent between GPUs"),
        ):
            if any((memory["fixed"][name] or {}).get(key) for name in shown):
                rows.add_row(
                    label,
                    *(gb(memory["fixed"][name][key]) if memory["fixed"][name] else "not in 4-bit" for name in shown),
                )
        for kind, found in (memory["activations"] or {}).items():
            used = kind.startswith("with_") == bool(memory["checkpointing"])
            rows.add_row(
                f"activations, {kind.replace('_', ' ')}{'' if used else ' (not chosen)'}",
                *([gb(found["bytes"])] * len(shown)),
            )
        for kind, found in (memory["activations"] or {}).items():
            used = kind.startswith("with_") == bool(memory["checkpointing"])
            rows.add_row(
                f"all, {kind.replace('_', ' ')}",
                *(
                    gb(sum(memory["fixed"][name].values()) + found["bytes"]) if memory["fixed"][name] else "-"
                    for name in shown
                ),
                style="bold" if used and colour else None,
            )
        console.print(rows)
        if memory["activations"]:
            on_top = (
                f" On top: {CONTEXT / 1e9:g} GB for CUDA, {PIECES:.0%} lost in pieces."
                if memory["for_gpu"]
                else " On top: Python and its libraries."
            )
            say(f"Activations of a batch of {memory['batch']}, the longest rows: {memory['longest']} tokens.{on_top}")
        else:
            say(
                escape(
                    f"Activations are not counted: this model cannot be run without content ({memory['not_counted']})."
                )
            )
        if memory["fits"] and memory["for_gpu"]:  # a CPU keeps other things: what it takes says nothing of a card
            head(
                f"Largest batch that fits, rows of {memory['longest']} tokens{', ' + STRATEGIES[memory['strategy']] if memory['gpus'] > 1 else ''}"
            )
            rows = table("", *(f"{card} GB" for card in CARDS))
            for kind in memory["activations"]:
                rows.add_row(kind.replace("_", " "), *(str(memory["fits"][card][kind] or "none") for card in CARDS))
            console.print(rows)
        dpo = memory["by_the_rule"]["all in float32"]["reference"]
        say(
            f"By the rule of thumb, without activations: weights +{' reference model +' if dpo else ''} gradients + optimizer"
        )
        for name, row in memory["by_the_rule"].items():
            say(
                f"  {name}: {' + '.join(gb(row[key]) for key in ('weights', 'reference', 'gradients', 'optimizer') if row[key])} = {gb(row['sum'])}"
            )
        if dpo:
            say("  here the reference is the model without its adapter, and takes nothing")

    if plan := report["plan"]:
        head("Plan")
        say(
            f"{'about ' * plan['sampled']}{plan['rows']:,} rows to train on, {plan['evaluation_rows']:,} to evaluate; {plan['steps']:,} steps of {plan['effective_batch']} rows"
            f"{' on ' + str(plan['gpus']) + ' GPUs' if plan['gpus'] > 1 else ''}, {plan['epochs']:.2f} epochs; {plan['evaluations']} evaluations; {plan['warmup_steps']} steps of warm-up"
        )
        say(
            "learning rate: "
            + (", ".join(f"{rate:g} ({what})" for what, rate in plan["learning_rates"].items()) or "not known")
        )
    head("Odd" if report["odd"] else "Nothing odd")
    for one in report["odd"]:
        say(f"  [yellow]{escape(one)}[/yellow]")


def main(argv=None):
    """Parse, look, report."""
    args, rest = parse(argv)
    warnings.simplefilter("ignore")
    for name in ("transformers", "trl", "accelerate", "peft", "datasets", "bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    if args.json or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are forked after the tokenizer was used
    recipe = load_recipe(args.recipe, None, CONTRACT)
    try:
        report = inspect(recipe, args, rest)
    except recipe.BadRow as e:
        fail(f"the data changed while they were looked at: {e}")
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        plain = args.no_color or "NO_COLOR" in os.environ
        console = Console(
            no_color=plain,
            highlight=False,
            width=None if sys.stdout.isatty() else 160,
            color_system=None if plain else "auto",
        )
        show(report, console, colour=not plain and console.is_terminal)
    if not report["plan"]:
        fail(report["odd"][0])
    if report["plan"]["would_stop"]:
        sys.exit(1)


if __name__ == "__main__":
    start(main)
