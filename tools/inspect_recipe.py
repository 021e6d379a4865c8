"""Before a run: will it work, will it fit, what exactly will be trained? Data, examples, parameters, memory, plan.

    python tools/inspect_recipe.py sft_llava.py --dataset_name train.json --image_folder images
    python tools/inspect_recipe.py sft_llava.py --config llava-lora/settings.yaml --rows 1000   # a quick look
    python tools/inspect_recipe.py dpo_idefics2.py --load_in_4bit false --per_device_train_batch_size 4
    python tools/inspect_recipe.py llava_two_stage.py --stage instruct --gpus 8 --strategy zero3
    python tools/inspect_recipe.py llava_two_stage.py --stage instruct --fit 80   # on how many GPUs of 80 GB?
    python tools/inspect_recipe.py sft_llava.py --memory 12 48      # what fits into cards of 12 and of 48 GB
    python tools/inspect_recipe.py sft_llava.py --no-color > before.txt
    python tools/inspect_recipe.py sft_llava.py --json > before.json

Every other flag is the recipe's own. It needs no GPU and loads no weights: without --use_cpu everything is estimated
for a GPU with bf16 (--fp16 true: for an older one). Of the model only the configuration and the processor are read.
The recipe's own main() then builds its model and its trainer out of tensors that have a shape and no content. Its own
training step, evaluation step, answers and optimizer step are run on those; what they allocate is counted. What each
figure is, and how far off it can be: docs/inspect.md. Tables are drawn by rich, which comes with transformers.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import logging
import math
import multiprocessing
import operator
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
from typing import NamedTuple
from unittest.mock import patch

import bitsandbytes
import datasets
import numpy as np
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count
from transformers.generation.utils import GenerationMixin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.program import fail, flag_parser, parse_beside_recipe, start, text_table  # noqa: E402
from tools.runs import base_name, code_not_executed, load_recipe, trust_only_flags  # noqa: E402

CONTRACT = """Settings Training parse check load_processor load_data check_and_measure_rows BadRow load_image Collator
load_model main"""
STRATEGIES = {"ddp": "DDP", "zero2": "ZeRO-2", "fsdp2": "FSDP2", "zero3": "ZeRO-3"}  # the simplest and fastest first
DEEPSPEED = ("zero2", "zero3")
# What accelerate launch sets in the processes that it starts with configs/fsdp2.yaml.
AS_FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
FIT_GPUS = (1, 2, 4, *range(8, 65, 8))  # what --fit tries: parts of a machine of eight GPUs, then whole machines
LIVE_WEIGHTS = 10**9  # stage3_max_live_parameters of configs/zero3.yaml, and DeepSpeed's default
CARDS = (16, 24, 40, 80)  # memory of GPUs, GB, without --memory
MOST_MEMORY = 1000  # more in --memory is no GB
# Of a card's memory: CUDA's own context in bytes, and the share that its allocator cannot use because it is in pieces.
CONTEXT, PIECES = 1e9, 0.05
# --per_device_train_batch_size auto takes this share of what is free; for evaluation it tries these sizes.
FULL, EVALUATION_BATCHES = 0.9, (1, 2, 4, 8, 16, 32, 64)
# Rows that are run; what a larger batch takes is on the line through so many and twice as many.
MOST_ROWS = 16
# Bytes of a weight in NF4 with double quantization: half a byte, for each 64 weights one byte of scale, for each 256
# scales four bytes.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes that an optimizer keeps for each trained parameter: AdamW has two moments; 8-bit ones have scales for each 256.
STATES = {
    "8bit": 2 * (1 + 4 / 256),
    "lion_8bit": 1 + 4 / 256,
    "lion": 4,
    "sgd": 0,
    "adagrad": 4,
    "adafactor": 0.01,
    "rmsprop": 4,
}
CHECKPOINTING = {True: "with_checkpointing", False: "without_checkpointing"}
TRAINING, EVALUATION, GENERATION, OPTIMIZER = PHASES = ("training step", "evaluation", "generation", "optimizer step")


def parse(argv=None):
    """-> (own arguments, the recipe's flags). Raises SystemExit."""
    parser = flag_parser(__doc__)
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="the recipe's file: sft_llava.py, or a copy of it")
    parser.add_argument(
        "--rows",
        type=row_count,
        help="look at so many rows only, evenly drawn; all (the default): the recipe need not then",
    )
    parser.add_argument("--examples", type=int, default=2, help="rows to show as the model sees them (default 2)")
    parser.add_argument("--gpus", type=int, default=1, help="estimate for so many GPUs (default 1)")
    parser.add_argument(
        "--strategy", choices=[*STRATEGIES, "fsdp"], help="how several GPUs share the work (default ddp; fsdp: fsdp2)"
    )
    parser.add_argument("--memory", nargs="+", type=card_memory, metavar="GB", help="what fits into such cards")
    parser.add_argument("--fit", type=card_memory, metavar="GB", help="the fewest GPUs of so many GB that are enough")
    parser.add_argument("--no-color", action="store_true", help="plain text: what is trained on in «»")
    parser.add_argument("--json", action="store_true", help="one JSON object, for machines")
    args, recipe_flags = parse_beside_recipe(parser, argv)
    if (args.rows is not None and args.rows < 1) or args.gpus < 1 or args.examples < 0:
        fail("--rows and --gpus must be at least 1, --examples 0 or more")
    check_fit(args)
    if args.strategy == "fsdp":
        args.strategy = "fsdp2"
    args.strategy = args.strategy or "ddp"
    if args.fit:
        args.memory = [args.fit]
    args.memory = args.memory or list(CARDS)
    return args, recipe_flags


def row_count(text):
    """A number of rows; None for "all"."""
    return None if text == "all" else int(text)


def check_fit(args):
    """Raises SystemExit for flags that --fit goes without."""
    if args.fit and args.memory:
        fail("--fit and --memory: one of them; --fit 80 has the largest batches in 80 GB, too")
    if args.fit and (args.gpus > 1 or args.strategy):
        fail("--fit finds the number of GPUs and the strategy: without --gpus and --strategy")


def card_memory(text):
    """A card's memory in GB, as --memory and --fit have it -> a number. Raises argparse.ArgumentTypeError."""
    try:
        memory = float(text)
    except ValueError:
        memory = math.nan
    if not 1 <= memory <= MOST_MEMORY:  # NaN is not
        remedy = f"a card's memory is in GB, from 1 to {MOST_MEMORY}; RECIPE comes before this flag"
        raise argparse.ArgumentTypeError(f"{text}: {remedy}")
    return int(memory) if memory.is_integer() else memory


def asked_for(flag, recipe_flags):
    """Whether a flag of true or false is given, on the command line or in --config: True, False, or None where it is
    not."""
    parser = flag_parser(None)
    parser.add_argument("--config")
    parser.add_argument(f"--{flag}", nargs="?", const="true")
    given = parser.parse_known_args(recipe_flags)[0]
    value = getattr(given, flag)
    if value is None and given.config:
        # the recipe's own parse() has a message for a file that cannot be read
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError, AttributeError):
            value = yaml.safe_load(Path(given.config).read_text(encoding="utf-8")).get(flag)
    return None if value is None else str(value).lower() in ("true", "1", "yes", "y", "t")


@contextlib.contextmanager
def for_gpus(recipe, gpus):
    """Within it the recipe's pick_batch, which counts processes for the size of a step, sees so many."""
    pick_batch = getattr(recipe, "pick_batch", None)

    def pick(*args, **options):
        with patch.dict(os.environ, {"WORLD_SIZE": str(gpus)}):
            return pick_batch(*args, **options)

    with patch.object(recipe, "pick_batch", pick) if pick_batch else contextlib.nullcontext():
        yield


def read_flags(recipe, recipe_flags, gpus):
    """The recipe's flags -> (settings, training, dtype of what is frozen). They are read as on a CPU, so that they are
    understood where there is no GPU, and then set to 16 bits, which is what a run without --use_cpu has. Raises
    SystemExit, as the recipe does."""
    cpu, bf16, fp16 = (asked_for(flag, recipe_flags) for flag in ("use_cpu", "bf16", "fp16"))
    is_half = bool(bf16 or fp16 or (bf16 is None and not cpu))
    as_on_a_cpu = "--use_cpu true --bf16 false --fp16 false --tf32 false".split()
    with for_gpus(recipe, gpus):
        settings, training = recipe.parse([*recipe_flags, *as_on_a_cpu])
    trust_only_flags(settings, recipe_flags)
    recipe.check(settings, training)
    training.bf16, training.for_gpu = is_half, not cpu  # fp16 has the same sizes, but no CPU runs it
    dtype = torch.float32
    if is_half:
        dtype = torch.float16 if fp16 else torch.bfloat16
    return settings, training, dtype


def refusals(recipe, settings, training, *all_rows):
    """{strategy: why the recipe refuses it with these settings and rows}. A refusal of the optimizer is none: another
    one is a flag away (see odd_memory)."""
    found = {}
    for strategy in STRATEGIES:
        with (
            patch.dict(os.environ, AS_FSDP2 if strategy == "fsdp2" else {}),
            patch.object(recipe, "is_deepspeed_zero3_enabled", functools.partial(operator.eq, strategy, "zero3")),
            patch.object(training, "optim", transformers.training_args.OptimizerNames.ADAMW_TORCH),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            try:
                recipe.check(settings, training)
                if hasattr(recipe, "require_images"):
                    recipe.require_images(*all_rows)
            except SystemExit as refused:
                found[strategy] = str(refused.code).removeprefix("error: ")
    return found


# ---------------------------------------------------------------------------------------------------------------- data


class Seen(Exception):
    """Carries what was looked for out of a recipe's own function."""


def shape_of(batch):
    """A collator's batch -> (token ids, whether trained on, whether real), each (B, L)."""
    inputs = batch.get("data", batch)  # MiniCPM-V 2.6 wants its inputs together
    trained = batch["completion_mask"].bool() if "completion_mask" in batch else batch["labels"] != -100
    return inputs["input_ids"], trained, batch["attention_mask"].bool()


class Remembering:
    """A collator whose last batch can be looked at."""

    def __init__(self, collator):
        self.collator, self.read, self.batch = collator, collator.read, None

    def __call__(self, rows):
        self.batch = self.collator(rows)
        return self.batch


def look_at(rows, collator, recipe):
    """Rows through the collator, one by one, as by the recipe's own check_row -> for each {result (of that), problem,
    length, trained (tokens), images ([width, height]), image_values (elements of its image tensors)}; length 0 where
    it is not known."""
    found, sizes, load_image = [], [], recipe.load_image
    remembering = Remembering(collator)

    def remember_size(cell, **options):
        image = load_image(cell, **options)
        sizes.append(list(image.size))
        return image

    with patch.object(recipe, "load_image", remember_size):
        for row in rows:
            sizes.clear()
            entry = {"problem": None, "length": 0, "trained": 0, "tokens": 0, "image_values": 0}
            result = recipe.check_row(row, remembering)
            entry |= {"result": result, "image_keys": result["image_keys"], "images": list(sizes)}
            if result["reason"] is None:
                batch = remembering.batch
                ids, trained, real = shape_of(batch)
                entry |= {"length": ids.shape[1], "trained": int(trained.sum()), "tokens": int(real.sum())}
                entry["image_values"] = sum(x.numel() for x in tensors(dict(batch)) if x.is_floating_point())
            else:
                entry["problem"] = f"{result['reason']}: {result['detail']}"
                length = re.match(r"too long: (\d+) tokens", entry["problem"])
                if length:
                    entry["length"] = int(length[1])
            found.append(entry)
    return found


def in_processes(job, count):
    """[job(0), job(1), ...], each in a process of its own where these can be forked. Raises BrokenProcessPool where
    one is ended from outside."""
    global _job
    _job = job
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if min(cores, count) == 1 or sys.platform != "linux":
        return [job(n) for n in range(count)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process would wait forever for OpenMP's threads, which only its parent has
    try:  # not multiprocessing's Pool, which waits forever for a process that the system has ended
        with ProcessPoolExecutor(min(cores, count), multiprocessing.get_context("fork")) as pool:
            return list(pool.map(_run_job, range(count)))
    finally:
        torch.set_num_threads(threads)


def _run_job(n):
    return _job(n)


class Data:
    """Stands in for a recipe's check_and_measure_rows: the same rows are left over, but nothing stops at a bad one,
    and what is seen is kept in `looked`, [(name, rows there are, row numbers, what look_at found)], one for the
    training rows and one for others."""

    def __init__(self, recipe, most):
        self.recipe, self.most, self.looked = recipe, most, []

    def __call__(self, data, name, collator, settings, training):
        """Rows -> those that can be trained on. Raises Seen where there are none, SystemExit for an empty data set."""
        if len(data) == 0:
            fail(f"{name} is empty: there is nothing to train on")
        whole = len(data)
        if self.most and whole > self.most:
            data = data.select([n * whole // self.most for n in range(self.most)])
        found = self.look(data, name, collator)
        if len(data) == whole:  # the recipe then takes these results instead of looking again
            results = datasets.Dataset.from_list([entry["result"] for entry in found], self.recipe.RESULT_COLUMNS)
            self.recipe.store_results(results, self.recipe.result_folder(data, collator))
        limit = max_length(settings, training) or math.inf
        for entry in found:
            if entry["problem"] is None and entry["length"] > limit:  # some recipes look at it after the collator
                entry["problem"] = f"too long: {entry['length']} tokens, --max_length is {limit}"
        self.looked.append((str(name), whole, list(data["row"]), found))
        good = [n for n, entry in enumerate(found) if entry["problem"] is None]
        if not good:
            raise Seen
        columns = {
            "length": [entry["length"] for entry in found],
            "image_keys": [entry.get("image_keys", []) for entry in found],
            "image_values": [entry["image_values"] for entry in found],
        }
        return datasets.concatenate_datasets([data, datasets.Dataset.from_dict(columns)], axis=1).select(good)

    def look(self, data, name, collator):
        """look_at, in several processes: decoding pictures is what takes the time."""
        parts = min(os.cpu_count() or 1, 1 + len(data) // 500)

        def look_at_part(n):
            return look_at(data.shard(parts, n, contiguous=True), collator, self.recipe)

        try:
            return list(itertools.chain(*in_processes(look_at_part, parts)))
        except BrokenProcessPool:
            fail(
                f"a process that looked at the rows of {name} was ended by the system, which mostly means that memory "
                "ran out: --rows 1000 looks at some only"
            )


def max_length(settings, training):
    """The longest row that the recipe takes, in tokens; None for any."""
    for holder, name in ((settings, "max_length"), (settings, "model_max_length"), (training, "max_length")):
        if hasattr(holder, name):
            return getattr(holder, name)
    return None


def about_data(looked, limit):
    """One entry of Data.looked -> the report's section on it."""
    name, whole, numbers, found = looked
    bad, good = collections.defaultdict(list), []
    for number, entry in zip(numbers, found):
        if entry["problem"]:
            bad[entry["problem"].split(":")[0]].append({"row": number, "why": entry["problem"]})
        else:
            good.append(entry)
    lengths = [entry["length"] for entry in found if entry["length"]]
    sizes = [size for entry in found for size in entry["images"]]
    image_sizes = tokens_per_row = None
    if sizes:
        image_sizes = {
            "smallest": min(sizes, key=math.prod),
            "median": [statistics.median(side) for side in zip(*sizes)],
            "largest": max(sizes, key=math.prod),
            "different": len(set(map(tuple, sizes))),
        }
    if lengths:
        tokens_per_row = {
            "median": statistics.median(lengths),
            "p95": int(np.quantile(lengths, 0.95, method="inverted_cdf")),
            "longest": max(lengths),
        }
    return {
        "name": name,
        "rows": whole,
        "looked_at": len(found),
        "good": len(good),
        "bad": dict(bad),
        "images_per_row": dict(sorted(collections.Counter(len(entry["images"]) for entry in good).items())),
        "image_sizes": image_sizes,
        "tokens_per_row": tokens_per_row,
        "max_length": limit,
        "too_long": len(bad.get("too long", [])),
        "trained_share": sum(entry["trained"] for entry in good) / max(1, sum(entry["tokens"] for entry in good)),
        "answers_per_row": 1,
    }


def sequences_of(batch, processor):
    """A batch of one row -> [{kind: text | trained | image, text, tokens}] for each of its sequences: DPO has two."""
    decode = processor.tokenizer.decode
    # several where rows of a picture end with a token of their own; MiniCPM-V 2.6's processor names one
    of_images = {*(getattr(processor, "image_token_ids", None) or [processor.image_token_id])}
    sequences = []
    for ids, is_trained, is_real in zip(*shape_of(batch)):
        ids, is_trained = ids[is_real].tolist(), is_trained[is_real].tolist()
        kinds = ["trained" if trained else "text" for trained in is_trained]
        kinds = ["image" if token in of_images else kind for token, kind in zip(ids, kinds)]
        pieces, start = [], 0
        for kind, run in itertools.groupby(kinds):
            end = start + len(list(run))
            text = decode(ids[:end])[len(decode(ids[:start])) :]  # a run by itself would lose its leading space
            if kind == "image":
                text = f"{decode(ids[end - 1 : end])} x {end - start}"
            pieces.append({"kind": kind, "text": text, "tokens": end - start})
            start = end
        sequences.append(pieces)
    return sequences


def example_of(row, collator, processor):
    """A row -> how the model sees it, as the report has it."""
    sequences = sequences_of(collator([row]), processor)
    pieces = list(itertools.chain(*sequences))
    tokens = sum(piece["tokens"] for piece in pieces)
    trained = sum(piece["tokens"] for piece in pieces if piece["kind"] == "trained")
    return {"row": row["row"], "sequences": sequences, "tokens": tokens, "trained_share": trained / tokens}


# --------------------------------------------------------------------------------------------- a model without content


def without_weights(cls, name, *args, config=None, dtype=None, quantization_config=None, **options):
    """Stands in for from_pretrained: the model on the meta device, from its configuration, with 4-bit layers where the
    quantizer would put them."""
    if config is None:
        config = cls.config_class.from_pretrained(name, revision=options.get("revision"))
    with torch.device("meta"):
        model = cls._from_config(config, dtype=dtype)
        model.name_or_path = str(name)
        if quantization_config is not None:
            quantizer = transformers.quantizers.auto.AutoHfQuantizer.from_config(quantization_config)
            quantizer.preprocess_model(model=model, device_map={"": "meta"}, dtype=dtype)
            model.hf_quantizer, model.is_loaded_in_4bit, model.is_4bit_serializable = quantizer, True, True
            model.config.quantization_config = quantization_config
    if options.get("output_loading_info"):
        return model, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    return model


def dequantized(layer, stock=peft.tuners.lora.dora.dequantize_module_weight):
    """Stands in for the 16-bit weights of a layer, which DoRA asks for at the beginning and in each forward pass."""
    if not isinstance(layer, bitsandbytes.nn.Linear4bit):
        return stock(layer)
    return layer.weight.new_empty(layer.out_features, layer.in_features, dtype=layer.compute_dtype or torch.float32)


def build(recipe, settings, training, train, held_out):
    """The recipe's own trainer, as its main() makes it, up to the moment when it would train; all that it would train
    and load is on the meta device. Nothing is written outside a folder that is gone afterwards."""
    stock_init = peft.PeftModel.__init__

    def init_on_meta(self, *args, **kwargs):
        with torch.device("meta"):
            stock_init(self, *args, **kwargs)

    def stop(trainer, *args, **kwargs):
        raise Seen(trainer)

    stand_ins = {
        "parse": lambda argv=None: (settings, training),
        "check": lambda *args: None,
        "checkpoint_to_resume": lambda training, *args, **options: None,
        "load_data": lambda *args: (train, held_out),
        # a joined model is written to the disk before it is adapted: of that only what from_pretrained reads above
        "save_renamed": lambda model, names, dtype, folder, *args, **kwargs: model.config.save_pretrained(folder),
    }
    patches = [patch.object(recipe, name, stand_ins[name]) for name in stand_ins.keys() & vars(recipe).keys()]
    patches += [
        patch.object(transformers.PreTrainedModel, "from_pretrained", classmethod(without_weights)),
        patch.object(peft.PeftModel, "__init__", init_on_meta),
        patch.object(peft.tuners.lora.dora, "dequantize_module_weight", dequantized),
        patch.object(transformers.Trainer, "_move_model_to_device", lambda self, model, device: model),
        patch.object(transformers.Trainer, "train", stop),
        contextlib.redirect_stdout(io.StringIO()),
    ]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        training.output_dir = training.logging_dir = folder
        training.report_to, training.push_to_hub = [], False
        for context in patches:
            stack.enter_context(context)
        try:
            recipe.main([])
        except Seen as seen:
            trainer = seen.args[0]
            if hasattr(trainer.data_collator, "share_pages"):
                trainer.data_collator.share_pages = False  # rows about different pages take the most
            return trainer
        finally:
            os.makedirs(folder, exist_ok=True)
    return fail(f"{recipe.__file__}: its main() trains nothing by a Trainer")


# ---------------------------------------------------------------------------------------------------------- parameters

KINDS = {
    "vision tower": r"vision|visual|vpm",
    "projector": r"projector|connector|merger|resampler|abstractor|aligner",
    "language model": r"language|text_model|llm|lm_head|decoder|embed_tokens",
    "LM head": r"$.",  # by name it belongs to the language model
}


def plain_name(name):
    """A weight's name, as it is without PEFT."""
    for added in ("original_module.", "modules_to_save.default."):
        name = name.replace(added, "")
    return name.removeprefix("base_model.model.")


def place_of(name):
    """The plain name of a weight -> the name of what in the model it belongs to."""
    path = name.split(".")
    return path[1] if path[0] == "model" and len(path) > 1 else path[0]


def kind_by_name(name):
    """The plain name of a weight -> vision tower, projector or language model (to which lm_head belongs), else where
    it is."""
    place = place_of(name)
    return next((kind for kind, words in KINDS.items() if re.search(words, place)), place)


def kinds_of(recipe, settings):
    """A function: the name of a weight -> the part of the model that it is in. sft_llava.py asks the model for its
    parts; of other recipes' models they are known by name."""
    if not hasattr(recipe, "find_parts"):
        return lambda name: kind_by_name(plain_name(name))
    parts = recipe.find_parts(settings, recipe.PROJECTORS)
    kinds = {parts.vision: "vision tower", parts.decoder: "language model", parts.head: "LM head"}
    kinds |= dict.fromkeys(parts.projectors, "projector")  # perhaps inside the tower

    def kind_of(name):
        name = plain_name(name)
        inside = [path for path in kinds if name.startswith(f"{path}.")]
        return kinds[max(inside, key=len)] if inside else place_of(name)

    return kind_of


def is_nf4(p):
    """Whether a parameter is in 4 bits."""
    return type(p).__name__ == "Params4bit"


def bytes_of(p):
    """What a parameter takes, in bytes; of one on the meta device what a real one would."""
    return p.numel() * (NF4 if is_nf4(p) else p.element_size())


def about_parameters(model, kind_of):
    """A model without content, adapters in it -> one entry for each part: all parameters, trained ones, 4-bit ones, of
    how many the weights are adapters; bytes of what is frozen and of what is trained. kind_of: see kinds_of."""
    columns = ("total", "trainable", "adapters", "four_bit", "frozen_bytes", "trained_bytes")
    parts = {}
    for name, p in model.named_parameters():
        part = parts.setdefault(kind_of(name), dict.fromkeys(columns, 0))
        part["total"] += p.numel()
        if is_nf4(p):
            part["four_bit"] += p.numel()
        if "lora_" in name:
            part["adapters"] += p.numel()
        if p.requires_grad:
            part["trainable"] += p.numel()
            part["trained_bytes"] += bytes_of(p)
        else:
            part["frozen_bytes"] += bytes_of(p)
    ordered = [kind for kind in KINDS if kind in parts] + [kind for kind in parts if kind not in KINDS]
    return {kind: parts[kind] for kind in ordered}


def sum_of(parts, key):
    """One column of about_parameters, of all parts."""
    return sum(part[key] for part in parts.values())


# ------------------------------------------------------------------------------------------- tensors without content


class Dequantized(torch.autograd.Function):
    """What bitsandbytes does with a 4-bit layer, as far as memory goes: 16-bit weights for the time of each product,
    never kept."""

    @staticmethod
    def forward(ctx, x, out_features, in_features):
        """x @ W.T, with weights made for it."""
        ctx.sizes = out_features, in_features
        return x @ x.new_empty(out_features, in_features).t()

    @staticmethod
    def backward(ctx, grad):
        """Weights are made once more."""
        return grad @ grad.new_empty(*ctx.sizes), None, None


def four_bit_forward(layer, x):
    """Stands in for Linear4bit.forward, on tensors without content."""
    dtype = layer.compute_dtype or x.dtype
    y = Dequantized.apply(x.to(dtype), layer.out_features, layer.in_features)
    if layer.bias is not None:
        y = y + layer.bias.to(dtype)
    return y.to(x.dtype)


class Hollow(torch.Tensor):
    """A tensor that says it is on the CPU and has a shape, but no content: operators run on its `meta`, on the meta
    device. Of torch's own kind, FakeTensor, a training step takes some ten times as long."""

    @staticmethod
    def __new__(cls, meta):
        layout = {"strides": meta.stride(), "storage_offset": meta.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, meta.size(), dtype=meta.dtype, device="cpu", **layout)
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


def is_known_mask(x):
    """Whether an index is a mask of known content."""
    return x is not None and x.dtype in (torch.bool, torch.uint8) and not isinstance(x, Hollow)


def without_content(func, args, kwargs):
    """An operator on tensors, some of them Hollow -> what it gives, Hollow. What depends on content: a mask of known
    content picks as many elements as it has, a number that nobody knows is 1."""
    if func is ATEN.equal.default:
        return True
    if func in NUMBERS:
        if args[0].dtype == torch.bool:
            return True
        return 1.0 if args[0].is_floating_point() else 1
    if func in INDEXED:
        places = []
        for index in args[1]:  # a mask has as many places as it has ones
            places += index.nonzero(as_tuple=True) if is_known_mask(index) else [index]
        args = (args[0], places, *args[2:])
    elif func is ATEN.masked_select.default and not isinstance(args[1], Hollow):
        shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
        return Hollow(args[0].meta.new_empty(int(args[1].expand(shape).sum())))
    owners = {}  # {id of a meta tensor: the Hollow one that it is of}

    def to_meta(x):
        if isinstance(x, Hollow):
            owners[id(x.meta)] = x
            return x.meta
        if isinstance(x, torch.Tensor):
            return x.to("meta")
        return torch.device("meta") if isinstance(x, torch.device) else x

    def from_meta(x):
        if not isinstance(x, torch.Tensor):
            return x
        return owners[id(x)] if id(x) in owners else Hollow(x)  # what was changed in place is the tensor that it was

    args, kwargs = tree_map(to_meta, (args, kwargs))
    run = grouped_mm_on_meta if func is ATEN._grouped_mm.default else func
    return tree_map(from_meta, run(*args, **kwargs))


def grouped_mm_on_meta(x, weights, *args, **kwargs):
    """The product of a mixture of experts, for any type: on the meta device there is one for bf16 only."""
    return ATEN._grouped_mm.default(x.bfloat16(), weights.bfloat16(), *args, **kwargs).to(x.dtype)


def tensors(tree):
    """The tensors in lists, tuples and dicts of such."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that operators make within it, alive (`now`) and at most (`peak`), real ones
    and hollow ones."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakValueDictionary()

    def new_storages(self, tree):
        """Those of the tensors that were not seen before; they are known from then on."""
        new = []
        for tensor in tensors(tree):
            storage = (tensor.meta if isinstance(tensor, Hollow) else tensor).untyped_storage()
            if storage._cdata not in self.known:
                self.known[storage._cdata] = storage
                new.append(storage)
        return new

    def watch(self, tree):
        """Count these tensors, where they are new."""
        for storage in self.new_storages(tree):
            self.now += storage.nbytes()
            weakref.finalize(storage, self.gone, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def gone(self, size):
        """A storage that was counted is not alive any more."""
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_hollow = any(isinstance(x, Hollow) for x in tensors((args, kwargs)))
        out = without_content(func, args, kwargs) if is_hollow else func(*args, **kwargs)
        self.watch(out)
        return out


def make_hollow(model):
    """Weights on the meta device -> Hollow ones. Some operators of training look at real masks and positions, which a
    meta tensor would swallow."""
    made = {}  # {id of a weight: (the weight, kept so that no other one gets its id; the Hollow one)}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.device.type == "meta":
                if id(p) not in made:
                    empty = Hollow(torch.empty(p.shape, dtype=p.dtype, device="meta"))
                    made[id(p)] = p, torch.nn.Parameter(empty, p.requires_grad)
                module._parameters[name] = made[id(p)][1]
        for name, b in module._buffers.items():
            if b is not None and b.device.type == "meta":
                module._buffers[name] = Hollow(b)


# -------------------------------------------------------------------------------------------------------------- memory


def step(trainer, rows, checkpointing):
    """The bytes at most alive within one training step of the trainer on these rows, besides weights, gradients and
    optimizer states."""
    model = trainer.model
    hooks = contextlib.nullcontext()
    if checkpointing:
        model.activation_checkpointing_enable()
    else:
        model.activation_checkpointing_disable()
        if trainer.args.activation_checkpointing and isinstance(model, peft.PeftModel):
            hooks = without_input_gradients(model)
    inputs, trained = dict(trainer.data_collator(rows)), trained_weights(model)
    for p in trained:  # the second of several accumulated batches: gradients are there
        p.grad = torch.zeros_like(p)
    count, trained_tokens = allocations_beside(model), None
    if "labels" in inputs:
        trained_tokens = inputs["labels"].ne(-100).sum()
    trainer.current_gradient_accumulation_steps = 1
    with in_16_bits(trainer), hooks, count:
        count.watch(inputs)
        trainer.training_step(model, inputs, trained_tokens)
    for p in trained:
        p.grad = None
    return count.peak


@contextlib.contextmanager
def without_input_gradients(model):
    """Within it embeddings of the input get no gradient, which a trainer that is made with checkpointing gives them by
    hooks: without it a run has none."""
    removed = []
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                removed.append((module, key, module._forward_hooks.pop(key)))
    yield
    for module, key, hook in removed:
        module._forward_hooks[key] = hook


def trained_weights(model):
    """The weights that are trained, a list."""
    return [p for p in model.parameters() if p.requires_grad]


def allocations_beside(model):
    """Allocations that does not count the model's weights and gradients."""
    count = Allocations()
    gradients = [p.grad for p in trained_weights(model) if p.grad is not None]
    count.new_storages([list(model.parameters()), list(model.buffers()), gradients])
    return count


@contextlib.contextmanager
def in_16_bits(trainer):
    """Within it the model's forward pass runs in 16 bits where the run does, as Accelerate prepares it before the
    first step."""
    forward = trainer.model.forward
    if trainer.args.bf16:
        forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(forward))
    with patch.object(trainer.model, "forward", forward):
        yield


def evaluation_step(trainer, rows):
    """The bytes at most alive while the trainer evaluates these rows together, besides weights and optimizer
    states."""
    model, inputs = trainer.model, dict(trainer.data_collator(rows))
    count = allocations_beside(model)
    model.eval()
    with in_16_bits(trainer), count:
        count.watch(inputs)
        trainer.prediction_step(model, inputs, prediction_loss_only=trainer.compute_metrics is None)
    return count.peak


def answering(trainer, recipe, new_tokens, rows):
    """The bytes at most alive while these rows are answered together, by as many new tokens, besides weights and
    optimizer states. The recipe's answer_batch runs for the prompt and for the last token: what is between them is
    put into the cache."""
    model, prepare_next = trainer.model, GenerationMixin._update_model_kwargs_for_generation
    count, passes = allocations_beside(model), []

    def prepare_last(generating, outputs, kwargs, *args, **options):
        kwargs = prepare_next(generating, outputs, kwargs, *args, **options)
        if not passes:
            highest = count.peak
            lengthen(outputs, kwargs, new_tokens - 2)
            count.peak = highest  # a run does this by and by
        passes.append(1)
        return kwargs

    def generate(*args, stock=model.generate, **options):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(trainer.args.bf16)):
            stock(*args, **options)
        raise Seen  # what follows reads the tokens, and there are none

    patches = [
        patch.object(GenerationMixin, "_update_model_kwargs_for_generation", prepare_last),
        patch.object(GenerationMixin, "_has_unfinished_sequences", lambda *_, **__: len(passes) < min(2, new_tokens)),
        patch.object(model, "generate", generate),
        contextlib.suppress(Seen),
        count,
    ]
    with contextlib.ExitStack() as stack:
        for context in patches:
            stack.enter_context(context)
        recipe.answer_batch(trainer, rows, new_tokens)
    return count.peak


def lengthen(outputs, kwargs, more):
    """Put keys and values of so many more tokens into the cache that a model's outputs hold, and as many places into
    the attention mask of generate()'s kwargs."""
    if more <= 0:
        return
    caches = [outputs[name] for name in ("cache", "past_key_values") if outputs.get(name) is not None]
    for layer in caches[0].layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None:  # linear attention keeps a state of one size
            added = [x.new_empty(*x.shape[:-2], more, x.shape[-1]) for x in (keys, values)]
            layer.update(*added)
    mask = kwargs.get("attention_mask")
    if mask is not None:
        kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), more)], dim=-1)


def optimizer_step(trainer):
    """The bytes at most alive within one step of the trainer's optimizer, besides weights, gradients and its own
    states."""
    trained = trained_weights(trainer.model)
    trainer.optimizer = None  # one that was made before has other weights
    optimizer = trainer.create_optimizer()
    if is_bitsandbytes(optimizer):
        return 0  # its kernels change weights and states in place
    for group in optimizer.param_groups:  # PyTorch's choice on a GPU: all weights at once
        if trainer.args.for_gpu and group.get("foreach", "unknown") is None and not group.get("fused"):
            group["foreach"] = True
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes the states
    count = allocations_beside(trainer.model)
    count.new_storages([list(state.values()) for state in optimizer.state.values()])
    with count:
        optimizer.step()
    for p in trained:
        p.grad = None
    return count.peak


def is_bitsandbytes(optimizer):
    """Whether an optimizer is one of bitsandbytes', perhaps inside Accelerate's."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return any(made.__module__.startswith("bitsandbytes") for made in type(optimizer).__mro__)


# FLOPs, from the shapes of the inputs, of what PyTorch's counter takes for free.
UNCOUNTED_FLOPS = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, **__: (
        sdpa_backward_flop_count(gradient, q, k, v)
    ),
    ATEN.addmm_: lambda added, left, right, *_, **__: mm_flop(left, right),
}


def work(trainer, rows):
    """FLOPs of a training step on these rows, as the settings have it: forward, recomputation, backward."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED_FLOPS) as counted:
        step(trainer, rows, trainer.args.activation_checkpointing)
    return counted.get_total_flops()


# Rows that a phase runs on together, `size` of them; `what` they are; new_tokens: of their answers, in GENERATION.
Batch = collections.namedtuple("Batch", "phase what rows size new_tokens", defaults=[0])


def largest_batches(phase, rows, size, new_tokens=0):
    """The batches that may take most: of the rows with most tokens and, where those are others, of the rows with the
    largest pictures. A list of Batch."""
    chosen, values = {}, rows["image_values"]
    for what, column in (("longest", "length"), ("largest pictures", "image_values")):
        sizes = rows[column]
        chosen[what] = sorted(range(len(rows)), key=lambda n: -sizes[n])[:size]
    if sum(values[n] for n in chosen["largest pictures"]) <= sum(values[n] for n in chosen["longest"]):
        del chosen["largest pictures"]
    return [Batch(phase, what, [rows[n] for n in numbers], size, new_tokens) for what, numbers in chosen.items()]


def measure(trainer, rows, batch):
    """-> {with or without checkpointing: (bytes of a step at this batch, bytes for each row more)}, on these rows,
    over and over where they are too few, at most 2 * MOST_ROWS at a time. The steps are independent of each other:
    where processes can be forked each has its own."""
    few = min(batch, MOST_ROWS)
    jobs = list(itertools.product((True, False), (few, 2 * few)))

    def run(n):
        checkpointing, size = jobs[n]
        return step(trainer, repeated(rows, size), checkpointing)

    make_hollow(trainer.model)
    with as_on_a_gpu(trainer.args), contextlib.redirect_stdout(io.StringIO()):
        found = dict(zip(jobs, in_processes(run, len(jobs))))
    return {kind: on_the_line(found[kind, few], found[kind, 2 * few], few, batch) for kind in (True, False)}


def repeated(rows, size):
    """As many rows, over and over where they are too few."""
    return list(itertools.islice(itertools.cycle(rows), size))


def on_the_line(size, twice, few, batch):
    """What `few` rows take and what twice as many take -> (what a batch takes, what each row more does)."""
    for_each_row = (twice - size) / few
    return size + (batch - few) * for_each_row, for_each_row


def measure_others(trainer, recipe, batches):
    """What a run does besides training steps, and how much work such a step is -> ({phase: entry of the report},
    FLOPs of a training step on one row, or None).

    batches: of the phases EVALUATION and GENERATION; of several of a phase the one that takes most is kept."""
    one_row = [trainer.train_dataset[int(np.argmax(trainer.train_dataset["length"]))]]
    runs = [(optimizer_step, trainer), (work, trainer, one_row)]
    for batch in batches:
        few = min(batch.size, MOST_ROWS)
        for rows in (repeated(batch.rows, few), repeated(batch.rows, 2 * few)):
            if batch.phase == GENERATION:
                runs.append((answering, trainer, recipe, batch.new_tokens, rows))
            else:
                runs.append((evaluation_step, trainer, rows))
    temporary, flops, *sizes = try_all(trainer, runs)
    found = {}
    for n, batch in enumerate(batches):
        entry = phase_entry(batch, *sizes[2 * n : 2 * n + 2])
        known = found.setdefault(batch.phase, entry)
        if "not_counted" in entry or entry["bytes"] > known.get("bytes", math.inf):
            found[batch.phase] = entry
    found[OPTIMIZER] = {"not_counted": temporary}
    if not isinstance(temporary, str):
        found[OPTIMIZER] = {"bytes": temporary}
    return found, None if isinstance(flops, str) else flops


def phase_entry(batch, size, twice):
    """A batch, what its rows take (at most MOST_ROWS of them), what twice as many take -> the report's entry."""
    entry = about_batch(batch)
    for result in (size, twice):
        if isinstance(result, str):
            return entry | {"not_counted": result}
    size, more = on_the_line(size, twice, min(batch.size, MOST_ROWS), batch.size)
    return entry | {"bytes": size, "for_each_row": more}


def try_all(trainer, runs):
    """[(function, its arguments)] -> for each what it gives or, as text, why it cannot be run without content. Where
    processes can be forked each has its own."""

    def run(n):
        function, *arguments = runs[n]
        try:
            return function(*arguments)
        except Exception as e:
            return reason(e)

    make_hollow(trainer.model)
    with as_on_a_gpu(trainer.args), contextlib.redirect_stdout(io.StringIO()):
        try:
            return in_processes(run, len(runs))
        except BrokenProcessPool as e:
            return [reason(e)] * len(runs)


def reason(error):
    """An exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def as_on_a_gpu(training):
    """Within it 4-bit layers run without content, and what differs on a GPU is as there, if the run is for one."""
    patches = [
        patch.object(bitsandbytes.nn.Linear4bit, "forward", four_bit_forward),
        patch.object(peft.tuners.lora.dora, "dequantize_module_weight", dequantized),
    ]
    if training.for_gpu:  # it has Triton, so that TRL scores label positions only, and keeps dropout's masks as bytes
        patches += [
            patch.object(trl.trainer.utils, "_use_triton", lambda device: True),
            patch.object(torch.nn.functional, "dropout", dropout_of_a_gpu),
        ]
    if training.for_gpu and training.bf16:  # PEFT and CUDA's autocast
        patches += [
            patch.object(torch, "is_autocast_enabled", lambda *device: True),
            patch.object(torch.nn.functional, "layer_norm", layer_norm_of_a_gpu),
        ]
    with contextlib.ExitStack() as stack:
        for context in patches:
            stack.enter_context(context)
        yield


def dropout_of_a_gpu(x, p=0.5, training=True, inplace=False):
    """F.dropout as it runs on a GPU; on a CPU its mask is as large as what it masks."""
    return torch.native_dropout(x, p, training)[0] if training and p > 0 else x


def layer_norm_of_a_gpu(x, shape, weight=None, bias=None, eps=1e-5, stock=torch.nn.functional.layer_norm):
    """F.layer_norm as CUDA's autocast runs it: in float32, which a CPU's does not."""
    weight, bias = (None if tensor is None else tensor.float() for tensor in (weight, bias))
    return stock(x.float(), shape, weight, bias, eps)


def state_bytes(optim):
    """What an optimizer keeps for each trained parameter, in bytes."""
    known = [name for name in STATES if all(word in optim for word in name.split("_"))]
    return STATES[max(known, key=len)] if known else 8


class Weights(NamedTuple):
    """What the sums of memory are made of; in bytes, where it does not say otherwise."""

    frozen: float
    scales: float  # of 4-bit weights; not in `frozen`
    trained: float
    trained_count: int  # how many weights are trained
    states: float  # of the optimizer, for each trained weight
    width: int  # of a weight in the forward pass: 2 in 16 bits, else 4
    layer: float  # all weights of the largest layer, as the forward pass has them
    trained_layer: float  # the trained ones of those
    outside: float  # weights that are in no layer, as the forward pass has them, without the input's embeddings
    live: float  # what DeepSpeed gathers at most, unless two layers are more
    hidden: int  # the hidden size
    holds_gradients: bool  # FSDP2: gradients are whole until the last of several accumulated batches


def about_weights(trainer, parts):
    """The trainer and its parts -> Weights. A layer is one of the language model, as the recipes share them out by
    FSDP2; all else stays whole during a step."""
    model, training = trainer.model, trainer.args
    width = 2 if training.bf16 else 4
    layers = list(getattr(model.get_decoder(), "layers", ()))
    largest = max(layers, key=lambda layer: gathered_bytes(layer.parameters(), width), default=torch.nn.Module())
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    outside = [p for p in model.parameters() if id(p) not in in_layers and not is_input_embedding(p, model)]
    scales = (NF4 - 0.5) * sum_of(parts, "four_bit")
    return Weights(
        frozen=sum_of(parts, "frozen_bytes") - scales,
        scales=scales,
        trained=sum_of(parts, "trained_bytes"),
        trained_count=sum_of(parts, "trainable"),
        states=state_bytes(getattr(training.optim, "value", training.optim)),
        width=width,
        layer=gathered_bytes(largest.parameters(), width),
        trained_layer=gathered_bytes(trained_weights(largest), width),
        outside=gathered_bytes(outside, width),
        live=min(gathered_bytes(model.parameters(), width), width * LIVE_WEIGHTS),
        hidden=model.config.get_text_config().hidden_size if hasattr(model, "config") else 0,
        holds_gradients=holds_gradients(training, training.gradient_accumulation_steps),
    )


def holds_gradients(training, batches):
    """Whether FSDP2 keeps whole gradients in a step of so many accumulated batches."""
    options = training.accelerator_config.gradient_accumulation_kwargs or {}
    return batches > 1 and not options.get("sync_each_batch")


def gathered_bytes(weights, width):
    """What weights take when they are gathered: `width` bytes each, packed ones in 4 bits stay packed."""
    return sum(p.numel() * (0.5 if is_nf4(p) else width) for p in weights)


def is_input_embedding(p, model):
    """Whether a weight is the input's embedding, and not the head as well: FSDP2 wraps that by itself."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or p is not getattr(embedding, "weight", None):
        return False
    return p is not getattr(head, "weight", None)


def per_gpu(weights, strategy, gpus):
    """Weights, a strategy, a number of GPUs -> bytes on each of them, apart from activations: weights (frozen ones),
    trained (adapters, and parts that are trained in full), gradients, optimizer, exchange (what is gathered, and what
    the GPUs send each other).

    DDP keeps everything everywhere. ZeRO-2 shares out gradients and optimizer, ZeRO-3 and FSDP2 the weights as well
    (Rajbhandari et al. 2019, arXiv 1910.02054; Zhao et al. 2023, arXiv 2304.11277, docs.pytorch.org/docs/stable/
    distributed.fsdp.fully_shard.html).
    """
    if strategy == "ddp":
        return per_gpu_ddp(weights, gpus)
    if strategy == "fsdp2":
        return per_gpu_fsdp2(weights, gpus)
    return per_gpu_deepspeed(weights, strategy, gpus)


def per_gpu_ddp(weights, gpus):
    """per_gpu of DDP, whose buckets are as large as the gradients."""
    return {
        "weights": weights.frozen + weights.scales,
        "trained": weights.trained,
        "gradients": weights.trained,
        "optimizer": weights.trained_count * weights.states,
        "exchange": weights.trained if gpus > 1 else 0,
    }


def per_gpu_fsdp2(weights, gpus):
    """per_gpu of FSDP2, as Accelerate prepares it (accelerate/utils/fsdp_utils.py, fsdp2_prepare_model).

    Two layers are gathered at a time, and the gradients of one are whole, in a bucket once more. What is in no layer
    stays gathered during a step, the head for one. 4-bit weights are packed into tensors of the compute dtype
    (bnb_4bit_quant_storage) and shared out as such. Their scales are no parameters, so each GPU has all of them.
    Without sync_each_batch, accumulated gradients are whole, in the compute dtype, until the last batch
    (transformers.Trainer calls no_sync).
    """
    gradients = weights.trained / gpus
    if weights.holds_gradients:
        gradients = weights.trained_count * weights.width
    return {
        "weights": weights.frozen / gpus + weights.scales,
        "trained": weights.trained / gpus,
        "gradients": gradients,
        "optimizer": weights.trained_count * weights.states / gpus,
        "exchange": 2 * weights.layer + 2 * weights.trained_layer + weights.outside,
    }


def per_gpu_deepspeed(weights, strategy, gpus):
    """per_gpu of ZeRO-2 and ZeRO-3, with configs/zero2.yaml and configs/zero3.yaml.

    DeepSpeed trains in 16 bits and keeps a float32 copy with the optimizer's states. There are two buckets of hidden
    size squared (reduce_bucket_size "auto", overlap_comm). ZeRO-3 gathers ahead until LIVE_WEIGHTS are whole.
    """
    frozen = weights.frozen + weights.scales
    trained = gradients = weights.trained_count * weights.width
    optimizer = weights.trained_count * weights.states
    if weights.width == 2:
        optimizer += 4 * weights.trained_count
    exchange = 2 * weights.width * weights.hidden**2
    if strategy == "zero3":
        frozen, trained = frozen / gpus, trained / gpus
        exchange += max(2 * weights.layer, weights.live)
    return {
        "weights": frozen,
        "trained": trained,
        "gradients": gradients / gpus,
        "optimizer": optimizer / gpus,
        "exchange": exchange,
    }


def by_the_rule(parameters, trained, has_reference):
    """The rule of thumb of the post on DPO for vision-language models (huggingface.co/blog/dpo_vlm, 2024), in bytes:
    everything in float32, and 16 bits with an adapter; weights, reference, gradients, AdamW's states."""
    settings = {"all in float32": (4, parameters)}
    if trained < parameters:
        settings["16 bits, adapter"] = (2, trained)
    table = {}
    for name, (width, count) in settings.items():
        row = {"weights": width * parameters, "reference": width * parameters if has_reference else 0}
        row |= {"gradients": width * count, "optimizer": 2 * width * count}
        table[name] = {**row, "sum": sum(row.values())}
    return table


def about_memory(trainer, recipe, parts, batches, args, refused):
    """The trainer, its parts, the batches to run (see largest_batches), the refused strategies -> the report's section
    on memory."""
    training = trainer.args
    weights = about_weights(trainer, parts)
    fixed = {name: None if name in refused else per_gpu(weights, name, args.gpus) for name in STRATEGIES}
    parameters, trained = sum_of(parts, "total") - sum_of(parts, "adapters"), sum_of(parts, "trainable")
    optim = getattr(training.optim, "value", training.optim)
    report = {
        "optim": optim,
        "batch": training.per_device_train_batch_size,
        "for_gpu": training.for_gpu,
        "gpus": args.gpus,
        "strategy": args.strategy,
        "fixed": fixed,
        "refused": refused,
        "checkpointing": training.activation_checkpointing,
        "by_the_rule": by_the_rule(parameters, trained, isinstance(trainer, trl.DPOTrainer)),
        "activations": None,
        "activations_by_strategy": None,
        "fits": None,
        "phases": {},
        "peak": None,
        "auto": None,
        "auto_batch": sorted(getattr(training, "auto_batch", ())),
        "optimizer_is_paged": "paged" in optim,
        "flops_of_a_row": None,
        "fit": None,
    }
    try:
        counted, report["flops_of_a_row"] = count_by_strategy(trainer, recipe, batches, args)
    except Exception as e:  # a model that looks at content somewhere: the other figures hold all the same
        return report | {"not_counted": reason(e)}
    report["activations_by_strategy"] = {name: activations for name, (activations, _) in counted.items()}
    report["activations"], phases = counted[args.strategy]
    report["phases"] = {name: dict(phase) for name, phase in phases.items()}
    if fixed[args.strategy]:
        add_sums(report, weights, args)
    if args.fit:
        accepted = {name: found for name, found in counted.items() if name not in refused}
        report["fit"] = about_fit(args.fit, weights, accepted, training)
    return report


def count_by_strategy(trainer, recipe, batches, args):
    """-> ({strategy: (activations, phases)}, FLOPs of a training step on one row, or None).

    DDP's forward pass makes 16-bit copies of the weights that are trained in float32. The other strategies hand the
    weights out in 16 bits, so everything is counted once more with such, where the report is about these."""
    activations, phases, flops = count(trainer, recipe, batches)
    counted = dict.fromkeys(STRATEGIES, (activations, phases))
    if args.gpus > 1 or args.strategy != "ddp" or args.fit:
        with trained_in_16_bits(trainer):
            activations, sharded_phases, _ = count(trainer, recipe, batches)
        sharded_phases[OPTIMIZER] = phases[OPTIMIZER]  # its copy of the weights is in float32
        for name in STRATEGIES:
            if name != "ddp":
                counted[name] = activations, sharded_phases
    return counted, flops


def count(trainer, recipe, batches):
    """-> (activations, see about_activations; {phase: entry of the report}; FLOPs, see measure_others)."""
    kind = CHECKPOINTING[bool(trainer.args.activation_checkpointing)]
    activations, worst = about_activations(trainer, [one for one in batches if one.phase == TRAINING])
    phases = {TRAINING: about_batch(worst[kind]) | activations[kind]}
    others, flops = measure_others(trainer, recipe, [one for one in batches if one.phase != TRAINING])
    return activations, phases | others, flops


@contextlib.contextmanager
def trained_in_16_bits(trainer):
    """Within it the weights that are trained are in 16 bits where the forward pass is."""
    model, replaced, halved = trainer.model, [], {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if trainer.args.bf16 and p is not None and p.requires_grad and p.dtype == torch.float32:
                if id(p) not in halved:
                    halved[id(p)] = torch.nn.Parameter(p.detach().to(torch.bfloat16))
                replaced.append((module, name, p))
    for module, name, p in replaced:
        module._parameters[name] = halved[id(p)]
    try:
        yield
    finally:
        for module, name, p in replaced:
            module._parameters[name] = p


def about_activations(trainer, batches):
    """-> {with or without checkpointing: what activations of a training step take}, for the batch that takes most, and
    {the same: that batch}."""
    found, worst = {}, {}
    for batch in batches:
        for checkpointing, (size, more) in measure(trainer, batch.rows, batch.size).items():
            kind = CHECKPOINTING[checkpointing]
            if kind not in found or size > found[kind]["bytes"]:
                found[kind], worst[kind] = {"bytes": size, "for_each_row": more}, batch
    return found, worst


def about_batch(batch):
    """A Batch as the report has it."""
    about = {"batch": batch.size, "rows": batch.what, "tokens": max(row["length"] for row in batch.rows)}
    if batch.new_tokens:
        about["new_tokens"] = batch.new_tokens
    return about


def add_sums(report, weights, args):
    """Add to the section on memory what follows for the chosen strategy: `sum`, `all` of each phase, the `peak`, and
    what `fits`."""
    activations, phases = report["activations"], report["phases"]
    sums = sums_of_phases(phases, weights, args.strategy, args.gpus)
    for name, size in sums.items():
        phases[name]["all"] = size
    highest = max(sums, key=sums.get)
    report["peak"] = {"phase": highest, "bytes": sums[highest]}
    total = sum(report["fixed"][args.strategy].values())
    report["sum"] = {kind: total + size["bytes"] for kind, size in activations.items()}
    least = sums.get(OPTIMIZER, 0)
    report["fits"] = {card: largest_fits(card, total, activations, report["batch"], least) for card in args.memory}


def sums_of_phases(phases, weights, strategy, gpus):
    """{phase: bytes on each GPU in all}, of the phases that are counted."""
    sums = {}
    for name, phase in phases.items():
        if "bytes" in phase:
            own = phase["bytes"]
            if name == OPTIMIZER and strategy != "ddp":
                own /= gpus  # each has its share of the weights to change
            sums[name] = fixed_in(name, weights, strategy, gpus) + own
    return sums


def fixed_in(phase, weights, strategy, gpus):
    """Bytes that are there in a phase, besides what it allocates itself.

    Once the optimizer has used them, gradients are gone until the next training step; DeepSpeed keeps its own, and
    makes them float32 for the optimizer step. FSDP2 gathers nothing for that, and has shared out the gradients."""
    fixed = per_gpu(weights, strategy, gpus)
    total = sum(fixed.values())
    if phase in (EVALUATION, GENERATION) and strategy not in DEEPSPEED:
        total -= fixed["gradients"]
    if phase == OPTIMIZER and strategy in DEEPSPEED:
        total += (4 - weights.width) * weights.trained_count / gpus
    if phase == OPTIMIZER and strategy == "fsdp2":
        total += weights.trained / gpus - fixed["gradients"] - fixed["exchange"]
    return total


def room_on(card):
    """Bytes of a card of so many GB that PyTorch can give out."""
    return card * 1e9 * (1 - PIECES) - CONTEXT


def largest_fits(card, fixed, activations, batch, least):
    """{with or without checkpointing: the largest batch that fits a card of so many GB, 0 where none does}. least:
    what an optimizer step takes in all, whatever the batch."""
    largest = dict.fromkeys(activations, 0)
    for kind, size in activations.items():
        if size["for_each_row"] > 0 and least <= room_on(card):
            more = math.floor((room_on(card) - fixed - size["bytes"]) / size["for_each_row"])
            largest[kind] = max(0, batch + more)
    return largest


def about_fit(card, weights, counted, training):
    """For GPUs of so many GB, one row at a time: the fewest that are enough -> the report's section on --fit.

    counted: see count_by_strategy, without strategies that are refused. `strategies` has an entry of fewest_gpus for
    each. `best` is the one with the fewest GPUs, of several the first of STRATEGIES; None where none is enough."""
    kind = CHECKPOINTING[bool(training.activation_checkpointing)]
    batch = training.per_device_train_batch_size
    batches = batch * training.gradient_accumulation_steps
    weights = weights._replace(holds_gradients=holds_gradients(training, batches))
    strategies = {}
    for name, (activations, phases) in counted.items():
        strategies[name] = found = fewest_gpus(card, weights, name, with_one_row(phases))
        if found["gpus"]:
            fixed = sum(per_gpu(weights, name, found["gpus"]).values())
            found["batch"] = largest_fits(card, fixed, {kind: activations[kind]}, batch, least=0)[kind]
    enough = [name for name, found in strategies.items() if found["gpus"]]
    best = min(enough, key=lambda name: strategies[name]["gpus"], default=None)
    return {"memory": card, "best": best, "strategies": strategies, "help": what_helps(weights, training)}


def with_one_row(phases):
    """Phases of a report -> what they take with batches of one row."""
    found = {}
    for name, phase in phases.items():
        found[name] = dict(phase)
        if "for_each_row" in phase:
            found[name]["bytes"] = phase["bytes"] + (1 - phase["batch"]) * phase["for_each_row"]
    return found


def fewest_gpus(card, weights, strategy, phases):
    """How many GPUs of so many GB a strategy needs -> {"gpus": of FIT_GPUS, None where the most are too few; "bytes":
    the most on each of them; "phase": that takes these; "batch": the largest of a training step, 0 where none fits}.
    """
    numbers = FIT_GPUS[1:]
    if strategy == "ddp":
        numbers = (1,)  # with more it takes no less
    for gpus in numbers:
        sums = sums_of_phases(phases, weights, strategy, gpus)
        phase = max(sums, key=sums.get)
        found = {"gpus": gpus, "bytes": sums[phase], "phase": phase, "batch": 0}
        if sums[phase] <= room_on(card):
            return found
    return found | {"gpus": None}


def what_helps(weights, training):
    """What would take less memory on each GPU, a list of texts."""
    remedies = []
    if not training.activation_checkpointing:
        remedies.append("--activation_checkpointing true")
    if not weights.scales:
        remedies.append("an adapter on 4-bit weights")
    return [*remedies, "shorter rows", "smaller pictures", "GPUs with more memory"]


def about_auto(memory, plan, args):
    """What --per_device_train_batch_size auto and its like for evaluation would choose on each card -> {card:
    {"train", "eval": rows of a batch, 0 where not even one fits; "accumulation"; "bytes": the expected peak of a
    training step}}, or None where there is nothing to choose.

    As the recipes do it: of the divisors of the rows that a GPU has in a step, and of EVALUATION_BATCHES, the largest
    that leaves a tenth free (1 - FULL) of what was free when the weights were loaded. The recipes measure what is
    taken; here the share that is lost in pieces is added."""
    if not memory["fits"] or not memory["for_gpu"] or args.strategy != "ddp":
        return None
    fixed, phases = memory["fixed"][args.strategy], memory["phases"]
    rows = max(1, plan["effective_batch"] // args.gpus)
    divisors = [size for size in range(1, rows + 1) if rows % size == 0]
    evaluated = [name for name in (EVALUATION, GENERATION) if "all" in phases.get(name, {})]
    chosen = {}
    for card in args.memory:
        free = card * 1e9 - CONTEXT - fixed["weights"] - fixed["trained"]
        limit = room_on(card) - (1 - FULL) * free
        train = largest_below(limit, [TRAINING], divisors, phases)
        chosen[card] = {"train": train, "accumulation": 0, "bytes": 0, "eval": None}
        if train:
            peak = at_batch(phases[TRAINING], train)
            chosen[card] |= {"accumulation": rows // train, "bytes": peak}
        if evaluated:
            chosen[card]["eval"] = largest_below(limit, evaluated, EVALUATION_BATCHES, phases)
    return chosen


def at_batch(phase, size):
    """Bytes in all that a phase would take with batches of another size."""
    return phase["all"] + (size - phase["batch"]) * phase["for_each_row"]


def largest_below(limit, names, sizes, phases):
    """The largest of the batch sizes with which these phases stay below a limit, in bytes; 0 where none does."""
    fitting = [size for size in sizes if all(at_batch(phases[name], size) < limit for name in names)]
    return max(fitting, default=0)


# ---------------------------------------------------------------------------------------------------------------- plan


def learning_rates(trainer, kind_of):
    """{part: the rate that its weights are trained at}, out of the trainer's own optimizer; {} where that wants a GPU
    even to be made."""
    names, found = {id(p): name for name, p in trainer.model.named_parameters()}, {}
    try:
        groups = trainer.create_optimizer().param_groups
    except Exception:
        return {}
    for group in groups:
        for p in group["params"]:
            name = names[id(p)]
            what = f"{kind_of(name)}, {'adapters' if 'lora_' in name else 'in full'}"
            found[what] = max(found.get(what, 0), group["lr"])
    return found


def usual_rates(what, is_dpo):
    """The lowest and the highest learning rate that one would not wonder at."""
    if "adapters" in what:
        return (5e-7, 2e-4) if is_dpo else (1e-5, 1e-3)
    if what.startswith("projector"):
        return (1e-6, 2e-3)
    return (1e-8, 5e-6) if is_dpo else (1e-7, 1e-4)


def count_rows(data, train, held_out, settings):
    """-> (rows to train on, rows to evaluate on, whether these are estimates because only some were looked at)."""
    main = data[-1]  # the training rows are looked at last
    share = main["looked_at"] / main["rows"]
    rows, scored = round(len(train) / share), len(held_out) if held_out is not None else 0
    if data[0]["looked_at"] < data[0]["rows"]:  # a share of the rows was looked at: of those held out, too
        scored = round(scored * data[0]["rows"] / data[0]["looked_at"])
    if share < 1 and held_out is not None and len(data) == 1:  # of all rows another share is held out than of some
        whole = round(main["good"] / share)
        scored = math.ceil(whole * max(settings.eval_fraction, 1 / whole))
        rows = whole - scored
    if data[0]["looked_at"] < data[0]["rows"]:
        scored = min(scored, settings.max_eval_rows)
    return rows, scored, share < 1


def evaluation_steps(training, steps, a_pass):
    """-> (steps from one evaluation to the next, how many there are), as the Trainer counts them."""
    if training.eval_strategy == "epoch":  # after each, the last one whole or not
        every = a_pass
        marks = [min(n, steps / a_pass) for n in range(1, math.ceil(steps / a_pass) + 1)]
    else:  # and at the end
        every = training.eval_steps
        if every < 1:
            every = max(1, math.ceil(every * steps))
        marks = {*range(int(every), steps + 1, int(every)), steps}
    count = sum(mark >= training.eval_delay for mark in marks)  # --eval_delay counts in steps or epochs, as they do
    return every, count + 1 if training.eval_on_start else count


def about_plan(trainer, kind_of, settings, data, train, held_out, gpus):
    """-> the report's section on steps."""
    training = trainer.args
    rows, scored, is_sampled = count_rows(data, train, held_out, settings)
    batch = training.per_device_train_batch_size * gpus * training.gradient_accumulation_steps
    a_pass = math.ceil(rows / batch)
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * a_pass)
    evaluations = 0
    if training.eval_strategy != "no":
        evaluations = evaluation_steps(training, steps, a_pass)[1]
    return {
        "rows": rows,
        "evaluation_rows": scored,
        "effective_batch": batch,
        "steps": steps,
        "epochs": steps / a_pass,
        "evaluations": evaluations,
        "warmup_steps": training.get_warmup_steps(steps),
        "learning_rates": learning_rates(trainer, kind_of),
        "gpus": gpus,
        "would_stop": any(stopping_reasons(part, settings) for part in data),
        "sampled": is_sampled,
    }


def stopping_reasons(part, settings):
    """The kinds of bad rows, of an entry of about_data, that the run would stop at."""
    flags = {reason: "on_long_rows" if reason == "too long" else "on_bad_rows" for reason in part["bad"]}
    return [reason for reason, flag in flags.items() if getattr(settings, flag, "stop") == "stop"]


def odd_rates(plan, is_dpo):
    """What is odd about learning rates, a list of texts."""
    odd = []
    for what, rate in plan["learning_rates"].items():
        low, high = usual_rates(what, is_dpo)
        if not low <= rate <= high:
            direction = "low" if rate < low else "high"
            text = f"learning rate {rate:g} for {what}: unusually {direction}, usual are {low:g} to {high:g}"
            odd.append(f"{text} in DPO" if is_dpo else text)
    return odd


def answers_of(settings, scored):
    """How many of the rows that are evaluated are answered, and the new tokens of an answer at most."""
    help_of = {field.name: field.metadata.get("help", "") for field in dataclasses.fields(settings)}
    answered = min(scored, getattr(settings, "sample_rows", 0))
    if "answer" in help_of.get("max_eval_rows", "").lower():  # all of them are answered, to be scored
        answered = scored
    tokens = getattr(settings, "max_new_tokens", None) or getattr(settings, "sample_tokens", None) or 0
    return answered, tokens


def odd_evaluations(plan, settings, training, has_eval_rows, is_asked_for):
    """What is odd about evaluations, a list of texts. is_asked_for: there was an --eval_strategy."""
    steps = plan["steps"]
    if not is_asked_for:
        return ["nothing will be evaluated: --eval_strategy no"]
    if not has_eval_rows:
        return ["there is no evaluation split, and none is held out: nothing will tell when to stop"]
    if plan["evaluations"] == 0:
        return [
            f"no evaluation will happen: --eval_delay is {training.eval_delay:g}, and there are {steps} steps, "
            f"{plan['epochs']:.3g} epochs"
        ]
    odd, scored = [], plan["evaluation_rows"]
    every = evaluation_steps(training, steps, math.ceil(plan["rows"] / plan["effective_batch"]))[0]
    if training.eval_strategy == "steps" and steps < every:
        odd.append(f"no evaluation before the end: one comes every {every:g} steps, and there are {steps}")
    answered, tokens = answers_of(settings, scored)
    # In forward passes of a row: training takes three, four with checkpointing, a generated token of a batch a fifth.
    train_cost = steps * plan["effective_batch"] * (4 if training.activation_checkpointing else 3)
    batches = math.ceil(answered / training.per_device_eval_batch_size)
    if plan["evaluations"] * (scored + batches * tokens / 5) > train_cost:
        odd.append(
            f"evaluation takes longer than training: {plan['evaluations']} evaluations of {scored} rows, {answered} "
            f"of them answered with up to {tokens} tokens"
        )
    return odd


def odd_steps(plan, training):
    """What is odd about the number of steps, a list of texts."""
    odd, steps, epochs = [], plan["steps"], plan["epochs"]
    if training.save_strategy == "steps" and 1 <= steps < training.save_steps:
        odd.append(
            f"no checkpoint before the end: one comes every {training.save_steps:g} steps, and there are {steps}"
        )
    if plan["warmup_steps"] >= steps:
        odd.append(f"the learning rate never comes up: {plan['warmup_steps']:g} steps of warm-up, {steps} in all")
    if training.max_steps > 0 and epochs < 1:
        odd.append(f"--max_steps {steps} is less than one pass: {1 - epochs:.1%} of the rows are never seen")
    if plan["rows"] < plan["effective_batch"]:
        odd.append(f"a step takes {plan['effective_batch']} rows, and there are {plan['rows']}")
    if epochs > 10:
        odd.append(f"{epochs:.0f} passes over the data")
    return odd


def odd_rows(data, settings):
    """What is odd about the data, a list of texts."""
    odd = []
    for part in data:
        reasons = stopping_reasons(part, settings)
        if reasons:
            odd.append(
                f"the run would stop at bad rows of {part['name']} ({', '.join(reasons)}): fix them, or --on_bad_rows "
                "skip, --on_long_rows drop"
            )
        elif part["good"] < 0.9 * part["looked_at"]:
            share = 1 - part["good"] / part["looked_at"]
            odd.append(f"{share:.0%} of the rows of {part['name']} are left out")
    return odd


def odd_memory(memory, args, recipe, settings, training):
    """What is odd about memory, a list of texts."""
    odd = []
    largest = max(args.memory)
    peak = memory["peak"]
    if peak and peak["bytes"] > room_on(largest) and not memory["fit"]:
        odd.append(f"{peak['bytes'] / 1e9:.1f} GB on a GPU ({peak['phase']}): more than one of {largest} GB has")
    if args.strategy in memory["refused"]:
        odd.append(f"{STRATEGIES[args.strategy]} is refused: {memory['refused'][args.strategy]}")
    elif "fsdp2" in (args.strategy, (memory["fit"] or {}).get("best")):
        with patch.dict(os.environ, AS_FSDP2), contextlib.redirect_stdout(io.StringIO()):
            try:
                recipe.check(settings, training)
            except SystemExit as refused:  # for its optimizer: see refusals
                odd.append(str(refused.code).removeprefix("error: "))
    if memory["fit"] and not memory["fit"]["best"]:
        odd.append(
            f"up to {FIT_GPUS[-1]} GPUs of {args.fit} GB are too few; what helps: {', '.join(memory['fit']['help'])}"
        )
    return odd


# ------------------------------------------------------------------------------------------------------------- inspect


def batches_of(recipe, settings, training, train, held_out, plan):
    """The batches whose memory is counted: see largest_batches."""
    batches = largest_batches(TRAINING, train, training.per_device_train_batch_size)
    if held_out is None or not plan["evaluations"]:
        return batches
    most = training.per_device_eval_batch_size
    of_each_gpu = math.ceil(plan["evaluation_rows"] / plan["gpus"])
    batches += largest_batches(EVALUATION, held_out, min(most, of_each_gpu))
    answered, new_tokens = answers_of(settings, plan["evaluation_rows"])
    if answered and new_tokens and hasattr(recipe, "answer_batch"):
        rows = held_out.select(range(min(answered, len(held_out))))
        size = min(most, math.ceil(answered / plan["gpus"]))
        batches += largest_batches(GENERATION, rows, size, new_tokens)
    return batches


def inspect(recipe, args, recipe_flags):
    """A recipe, own arguments and the recipe's flags -> the report, a dict as --json prints it. Raises SystemExit."""
    settings, training, dtype = read_flags(recipe, recipe_flags, args.gpus)
    if args.fit and not training.for_gpu:
        fail("--fit is about GPUs: without --use_cpu")
    is_evaluated = training.eval_strategy != "no"
    try:
        processor = recipe.load_processor(settings)
    except SystemExit:
        message = code_not_executed(settings)
        if message:
            fail(message)
        raise
    collator = recipe.Collator(processor, settings, training)
    data, train, held_out = Data(recipe, args.rows), None, None
    with (
        patch.object(recipe, "check_and_measure_rows", data),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(Seen),
    ):
        train, held_out = recipe.load_data(settings, training, collator)
    report = {"recipe": str(args.recipe), "model": base_name(settings), "precision": str(dtype).removeprefix("torch.")}
    report["data"] = [about_data(looked, max_length(settings, training)) for looked in data.looked]
    if train is None:
        report["odd"] = [f"no row of {data.looked[-1][0]} can be trained on"]
        return report | {"examples": [], "parts": {}, "memory": None, "plan": None}
    refused = refusals(recipe, settings, training, train, held_out)
    few = min(args.examples, len(train))
    chosen = sorted((train[n * len(train) // few] for n in range(few)), key=lambda row: row["row"])
    report["examples"] = [example_of(row, collator, processor) for row in chosen]
    try:
        trainer = build(recipe, settings, training, train, held_out)
    except Exception as e:  # PEFT and TRL say so when a trainer cannot be made of these settings
        fail(
            f"{args.recipe} cannot make its trainer of these settings: {type(e).__name__}: {' '.join(str(e).split())}"
        )
    kind_of = kinds_of(recipe, settings)
    report["parts"] = about_parameters(trainer.model, kind_of)
    report["plan"] = plan = about_plan(trainer, kind_of, settings, report["data"], train, held_out, args.gpus)
    batches = batches_of(recipe, settings, training, train, held_out, plan)
    report["memory"] = memory = about_memory(trainer, recipe, report["parts"], batches, args, refused)
    memory["longest"] = max(train["length"])
    memory["auto"] = about_auto(memory, plan, args)
    odd = odd_rates(plan, isinstance(trainer, trl.DPOTrainer))
    odd += odd_evaluations(plan, settings, training, held_out is not None, is_evaluated)
    odd += odd_steps(plan, training) + odd_rows(report["data"], settings)
    if not sum_of(report["parts"], "trainable"):
        odd.append("nothing is trained")
    report["odd"] = odd + odd_memory(report["memory"], args, recipe, settings, training)
    return report


# -------------------------------------------------------------------------------------------------------------- report


def visible(text):
    """Text of somebody's data for rich, with its control characters (they could recolour the report) written out."""
    return escape("".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text))


def gigabytes(size):
    """Bytes -> GB as text."""
    if size >= 1e11:
        return f"{size / 1e9:.0f}"
    return f"{size / 1e9:.4f}" if 0 < size < 5e6 else f"{size / 1e9:.2f}"


class Report:
    """Prints a report as tables."""

    def __init__(self, report, console, has_colour):
        self.report, self.console, self.has_colour = report, console, has_colour

    def print(self):
        """All of it."""
        self.head("Data")
        for part in self.report["data"]:
            self.print_data(part)
        for example in self.report["examples"]:
            self.print_example(example)
        if self.report["parts"]:
            self.print_parameters(self.report["parts"])
        if self.report["memory"]:
            self.print_memory(self.report["memory"])
            self.print_rule(self.report["memory"]["by_the_rule"])
        if self.report["plan"]:
            self.print_plan(self.report["plan"])
        self.head("Odd" if self.report["odd"] else "Nothing odd")
        for text in self.report["odd"]:
            self.say(f"  [yellow]{escape(text)}[/yellow]")

    def say(self, text):
        """A line with rich's markup, not cut to the width of the screen."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def head(self, text):
        """The title of a section."""
        self.say(f"\n[bold]{text}[/bold]" if self.has_colour else f"\n== {text}")

    def table(self, *columns):
        """A table to add rows to."""
        return text_table(*columns, show_header=any(columns), header_style="dim" if self.has_colour else None)

    def print_data(self, part):
        """One entry of about_data."""
        seen = "" if part["looked_at"] == part["rows"] else f", {part['looked_at']:,} of them looked at"
        bad = part["looked_at"] - part["good"]
        self.say(escape(f"{part['name']}: {part['rows']:,} rows{seen}, {bad:,} bad"))
        for reason, rows in part["bad"].items():
            self.say(f"  [red]{escape(reason)}[/red]: {len(rows)}")
            for row in rows[:20]:
                self.say(visible(f"    row {row['row']}: {row['why']}"))
            if len(rows) > 20:
                self.say(f"    ... and {len(rows) - 20} more")
        tokens, sizes = part["tokens_per_row"], part["image_sizes"]
        if tokens:
            limit = ", no max_length"
            if part["max_length"]:
                limit = f", {part['too_long']} above max_length {part['max_length']}"
            self.say(
                f"  tokens per row: median {tokens['median']:g}, 95 % up to {tokens['p95']}, longest "
                f"{tokens['longest']}{limit}; {part['trained_share']:.1%} trained on"
            )
        if part["images_per_row"]:
            counts = [f"{n} in {count:,} rows" for n, count in part["images_per_row"].items()]
            self.say(f"  images per row: {', '.join(counts)}")
        if sizes:
            smallest, largest, median = (
                f"{sizes[key][0]:g} x {sizes[key][1]:g}" for key in ("smallest", "largest", "median")
            )
            text = f"{smallest} to {largest}, median {median}" if sizes["different"] > 1 else f"all {median}"
            self.say(f"  image sizes: {text}")

    def print_example(self, example):
        """One row as the model sees it; what is trained on is green, or in «»."""
        sequences = example["sequences"]
        both = " in both sequences" if len(sequences) > 1 else ""
        self.head(
            f"Row {example['row']} as the model sees it: {example['tokens']} tokens{both}, "
            f"{example['trained_share']:.1%} trained on"
        )
        style = {"text": "{}", "trained": "[bold green]{}[/]" if self.has_colour else "«{}»", "image": "[cyan]{}[/]"}
        for name, pieces in zip(("chosen", "rejected"), sequences):
            if len(sequences) > 1:
                self.say(f"[dim]{name}:[/dim]")
            self.say("".join(style[piece["kind"]].format(visible(piece["text"])) for piece in pieces))

    def print_parameters(self, parts):
        """What about_parameters found, and the sum."""
        self.head(f"Parameters of {self.report['model']}, {self.report['precision']}")
        columns = next(iter(parts.values()))
        total = {key: sum_of(parts, key) for key in columns}
        table = self.table("part", "all", "trained", "of it adapters", "in 4-bit", "GB")
        for name, part in {**parts, "all": total}.items():
            trained = "frozen"
            if part["trainable"]:
                trained = f"{part['trainable']:,} ({part['trainable'] / part['total']:.2%})"
            counts = [f"{part['total']:,}", trained, f"{part['adapters']:,}", f"{part['four_bit']:,}"]
            table.add_row(name, *counts, gigabytes(part["frozen_bytes"] + part["trained_bytes"]))
        self.console.print(table)

    def print_memory(self, memory):
        """What about_memory found; of several GPUs a column for each strategy."""
        gpus, strategies = memory["gpus"], [memory["strategy"]]
        where = "of the GPU" if memory["for_gpu"] else "of a CPU (--use_cpu)"
        if gpus > 1:
            where, strategies = f"of each of {gpus} GPUs", list(STRATEGIES)
        self.head(f"Memory {where}, in GB")
        table = self.table("", *(STRATEGIES[name] if gpus > 1 else "" for name in strategies))
        self.add_fixed(table, memory, strategies)
        self.add_activations(table, memory, strategies)
        self.console.print(table)
        if gpus > 1:
            for name, cause in memory["refused"].items():
                self.say(f"{STRATEGIES[name]} is refused: {cause}.")
        if not memory["activations"]:
            cause = escape(memory["not_counted"])
            self.say(f"Activations are not counted: this model cannot be run without content ({cause}).")
            return
        on_top = "Python and its libraries"
        if memory["for_gpu"]:
            on_top = f"{CONTEXT / 1e9:g} GB for CUDA, {PIECES:.0%} lost in pieces"
        step = memory["phases"][TRAINING]
        rows = f"{self.rows_of(step)}: {step['tokens']} tokens"
        self.say(f"Activations of a batch of {step['batch']}, {rows}. On top: {on_top}.")
        if memory["optimizer_is_paged"] and memory["for_gpu"]:
            self.say("The optimizer's states are paged: where the GPU is full, they move to the CPU's memory.")
        if memory["peak"]:
            self.print_phases(memory)
        if memory["fits"] and memory["for_gpu"]:  # a CPU keeps other things: what it takes says nothing of a card
            self.print_fits(memory)
        if memory["fit"]:
            self.print_fit(memory["fit"], memory["refused"])

    @staticmethod
    def add_fixed(table, memory, strategies):
        """Rows of the table of memory: all but activations."""
        fixed = [memory["fixed"][name] for name in strategies]
        labels = {"weights": "frozen weights", "trained": "what is trained", "gradients": "gradients"}
        labels |= {"optimizer": f"optimizer's states ({memory['optim']})", "exchange": "gathered, sent between GPUs"}
        for key, label in labels.items():
            if any(sizes and sizes[key] for sizes in fixed):
                table.add_row(label, *(gigabytes(sizes[key]) if sizes else "refused" for sizes in fixed))

    def add_activations(self, table, memory, strategies):
        """Rows of the table of memory: activations, and the sums."""
        chosen = CHECKPOINTING[bool(memory["checkpointing"])]
        by_strategy = memory["activations_by_strategy"] or {}
        for kind in memory["activations"] or {}:
            label = f"activations, {kind.replace('_', ' ')}"
            if kind != chosen:
                label += " (not chosen)"
            table.add_row(label, *(gigabytes(by_strategy[name][kind]["bytes"]) for name in strategies))
        for kind in memory["activations"] or {}:
            sums = []
            for name in strategies:
                sizes = memory["fixed"][name]
                sums.append(gigabytes(sum(sizes.values()) + by_strategy[name][kind]["bytes"]) if sizes else "-")
            style = "bold" if kind == chosen and self.has_colour else None
            table.add_row(f"all, {kind.replace('_', ' ')}", *sums, style=style)

    def print_fit(self, fit, refused):
        """How many GPUs each strategy needs, and the fewest of all."""
        self.head(f"GPUs of {fit['memory']} GB that are enough, one row at a time")
        table = self.table("", "GPUs", "GB on each", "phase", "largest batch")
        for name, found in fit["strategies"].items():
            number, batch = str(found["gpus"]), str(found["batch"])
            if not found["gpus"]:
                number, batch = f"more than {FIT_GPUS[-1]}", "-"
            if not found["gpus"] and name == "ddp":
                number = "none"
            table.add_row(STRATEGIES[name], number, gigabytes(found["bytes"]), found["phase"], batch)
        table.columns[3].justify = "left"
        self.console.print(table)
        for name, cause in refused.items():
            self.say(f"{STRATEGIES[name]} is refused: {cause}.")
        room = f"{room_on(fit['memory']) / 1e9:.1f} GB"
        reserved = f"{CONTEXT / 1e9:g} GB is for CUDA, {PIECES:.0%} are lost in pieces"
        self.say(f"Of {fit['memory']} GB, {room} are free for a run: {reserved}.")
        if fit["best"]:
            found = fit["strategies"][fit["best"]]
            gpus = "1 GPU" if found["gpus"] == 1 else f"{found['gpus']} GPUs, {STRATEGIES[fit['best']]}"
            self.say(f"The fewest: {gpus}.")
        else:
            self.say(f"The fewest: none up to {FIT_GPUS[-1]}. What helps: {', '.join(fit['help'])}.")

    @staticmethod
    def rows_of(phase):
        """Which rows a phase was run on."""
        if phase["rows"] == "longest":
            return "the longest rows"
        return "the rows with the largest pictures"

    def print_phases(self, memory):
        """What each phase takes; the peak is the largest of it."""
        strategy = f" ({STRATEGIES[memory['strategy']]})" if memory["gpus"] > 1 else ""
        self.head(f"Memory of each phase, in GB{strategy}")
        table = self.table("", "rows", "of its own", "in all", "", "what is run")
        missing = {}
        for name, phase in memory["phases"].items():
            what = ""
            if "rows" in phase:
                what = f"{self.rows_of(phase)}, up to {phase['tokens']} tokens"
            if "new_tokens" in phase:
                what = f"questions of {self.rows_of(phase)}, {phase['new_tokens']} new tokens"
            if "not_counted" in phase:
                missing[name] = phase["not_counted"]
                table.add_row(name, str(phase.get("batch", "")), "not counted", "-", "", what)
                continue
            is_peak = name == memory["peak"]["phase"]
            style = "bold" if is_peak and self.has_colour else None
            sizes = gigabytes(phase["bytes"]), gigabytes(phase["all"])
            table.add_row(name, str(phase.get("batch", "")), *sizes, "peak" if is_peak else "", what, style=style)
        for column in table.columns[-2:]:
            column.justify = "left"
        self.console.print(table)
        for name, cause in missing.items():
            self.say(f"{name}: this model cannot be run without content ({escape(cause)})")

    def print_fits(self, memory):
        """The largest batch for each card, and what `auto` would make of it."""
        strategy = f", {STRATEGIES[memory['strategy']]}" if memory["gpus"] > 1 else ""
        fits, auto = memory["fits"], memory["auto"]
        tokens = memory["phases"][TRAINING]["tokens"]
        self.head(f"Largest batch that fits, rows of {tokens} tokens{strategy}")
        table = self.table("", *(f"{card} GB" for card in fits))
        for kind in memory["activations"]:
            table.add_row(kind.replace("_", " "), *(str(largest[kind] or "none") for largest in fits.values()))
        if auto:
            choices = [f"{one['train']} x {one['accumulation']}" if one["train"] else "none" for one in auto.values()]
            table.add_row("auto x accumulation", *choices)
        if auto and all(one["eval"] is not None for one in auto.values()):
            table.add_row("auto, evaluation", *(str(one["eval"] or "none") for one in auto.values()))
        self.console.print(table)
        if auto:
            self.print_auto(memory)

    def print_auto(self, memory):
        """What `auto` means."""
        kind = CHECKPOINTING[bool(memory["checkpointing"])].replace("_", " ")
        self.say(
            f"auto: what --per_device_train_batch_size auto would choose, {kind}: the largest divisor of a GPU's rows "
            f"in a step, to evaluate at most {max(EVALUATION_BATCHES)}, in {FULL:.0%} of what the weights leave free."
        )
        if memory["auto_batch"]:
            flags = ", ".join(f"--{name}" for name in memory["auto_batch"])
            self.say(f"Here auto: {flags}. The figures above are for a CPU's batches; on a GPU these are taken.")

    def print_rule(self, rule):
        """The rule of thumb."""
        has_reference = rule["all in float32"]["reference"] > 0
        columns = "weights + reference model + gradients" if has_reference else "weights + gradients"
        self.say(f"By the rule of thumb, without activations: {columns} + optimizer")
        for name, row in rule.items():
            sizes = [row[key] for key in ("weights", "reference", "gradients", "optimizer") if row[key]]
            self.say(f"  {name}: {' + '.join(map(gigabytes, sizes))} = {gigabytes(row['sum'])}")
        if has_reference:
            self.say("  here the reference is the model without its adapter, and takes nothing")

    def print_plan(self, plan):
        """Rows, steps, evaluations, learning rates."""
        self.head("Plan")
        about = "about " if plan["sampled"] else ""
        gpus = f" on {plan['gpus']} GPUs" if plan["gpus"] > 1 else ""
        self.say(
            f"{about}{plan['rows']:,} rows to train on, {plan['evaluation_rows']:,} to evaluate; {plan['steps']:,} "
            f"steps of {plan['effective_batch']} rows{gpus}, {plan['epochs']:.2f} epochs; {plan['evaluations']} "
            f"evaluations; {plan['warmup_steps']} steps of warm-up"
        )
        rates = [f"{rate:g} ({what})" for what, rate in plan["learning_rates"].items()]
        self.say(f"learning rate: {', '.join(rates) or 'not known'}")


def be_quiet():
    """Libraries neither warn nor show progress that would stand between the lines of the report."""
    warnings.simplefilter("ignore")
    for name in ("transformers", "trl", "accelerate", "peft", "datasets", "bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are forked after the tokenizer was used


def main(argv=None):
    """Parse, look, report."""
    args, recipe_flags = parse(argv)
    be_quiet()
    if args.json or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    recipe = load_recipe(args.recipe, None, CONTRACT)
    try:
        report = inspect(recipe, args, recipe_flags)
    except recipe.BadRow as e:
        fail(f"the data changed while they were looked at: {e}")
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        is_plain = args.no_color or "NO_COLOR" in os.environ
        width = None if sys.stdout.isatty() else 160
        console = Console(no_color=is_plain, width=width, color_system=None if is_plain else "auto", emoji=False)
        Report(report, console, has_colour=not is_plain and console.is_terminal).print()
    if not report["plan"]:
        fail(report["odd"][0])
    if report["plan"]["would_stop"]:
        sys.exit(1)


if __name__ == "__main__":
    start(main)
