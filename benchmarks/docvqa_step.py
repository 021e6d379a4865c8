"""One step of idefics2_docvqa.py against the stock Trainer: time, FLOPs, memory, and whether loss and gradients are the same.

    python benchmarks/docvqa_step.py         # a scaled-down Idefics2 in float32, one thread: about 2 minutes of a CPU
    python benchmarks/docvqa_step.py --checkpointing on --steps 3 --seed 1 --json step.json
    python benchmarks/docvqa_step.py --real_size   # idefics2-8b's widths, random 16-bit weights, on a CUDA GPU; not run yet

Measured is forward + backward of one batch, as both trainers' `training_step` does it, alternating, with the recipe's
dropout. Both get the same model, LoRA (the recipe's `lora_config`), collator (the recipe's) and batches: pages of about 980
x 700 pixels in 14-pixel patches, 64 image tokens, questions of 12-20 tokens, answers of 3-15 with <end_of_utterance>,
32,003 logits. The stock side is `transformers.Trainer` with PEFT and `activation_checkpointing` in TrainingArguments, and
nothing else. The recipe's side is its own Trainer, which computes logits at label positions only and runs the vision tower
without a graph. Time is process time on a CPU, wall time of a synchronized device on a GPU.

Exit status 1 where, in float32 and without dropout, the loss or any adapter's gradient differs by more than 1e-5 (gradients
relative to the stock one, both in the largest element and in the norm); nothing is measured then.

A full page through narrow layers is not idefics2-8b in small. Of its forward FLOPs vision tower, connector and language
model take 0.65 : 0.12 : 0.23 (pages of 3,500 patches, rows of 111 tokens), of the scaled model's 0.65 : 0.13 : 0.22. Yet
within these, attention has a larger part in the tower and lm_head in the language model. So a run on a CPU also counts
FLOPs for idefics2-8b itself: both trainers run on weights that have a shape and no storage. Both ratios and both shares are
printed. Times cannot be had that way."""

import contextlib
import copy
import os
import random
import statistics
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402
from measure import (  # noqa: E402
    SMALL,
    TOLERANCE,
    apart,
    check_flags,
    counter,
    flag_parser,
    flops,
    gradients,
    line,
    peak,
    seconds,
    start,
    step,
    without_storage,
    write,
)
from peft import get_peft_model  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from transformers.models.idefics2 import modeling_idefics2  # noqa: E402

import idefics2_docvqa as recipe  # noqa: E402
from tiny import idefics2  # noqa: E402

VOCABULARY = 32003
PARTS = {
    "vision tower": ["model.vision_model"],
    "connector": ["model.connector"],
    "language model": ["model.text_model", "lm_head"],
}
# hidden, intermediate, layers, heads; language model: and key-value heads; perceiver: heads, head width, key-value heads
SHAPES = {
    "idefics2-8b": {
        "page": 980,
        "vision": (1152, 4304, 27, 16),
        "text": (4096, 14336, 32, 32, 8),
        "perceiver": (16, 96, 4),
    },
    "scaled": {"page": 980, "vision": (192, 718, 2, 3), "text": (256, 896, 32, 8, 2), "perceiver": (4, 32, 1)},
    "tiny": {"page": 140, "vision": (64, 128, 2, 2), "text": (64, 128, 2, 2, 1), "perceiver": (2, 32, 1)},
}

# ---------------------------------------------------------------- model, data


def configuration(shape, image_token_id):
    """An entry of SHAPES -> Idefics2Config."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    text = dict(zip(names, shape["text"]))
    resampler = dict(zip(("resampler_n_heads", "resampler_head_dim", "num_key_value_heads"), shape["perceiver"]))
    return transformers.Idefics2Config(
        vision_config={**dict(zip(names, shape["vision"])), "image_size": shape["page"], "patch_size": 14},
        perceiver_config={
            "hidden_size": text["hidden_size"],
            "rms_norm_eps": 1e-5,
            "resampler_n_latents": 64,
            "resampler_depth": 3,
        }
        | resampler,
        text_config={
            "model_type": "mistral",
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
        }
        | text,
        image_token_id=image_token_id,
    )


def adapted(config, settings, device, dtype):
    """The frozen base as the recipe's `load_model` leaves it, with random weights, and the recipe's LoRA. lora_B is random,
    too: at its initial 0 every gradient of lora_A would be 0, and equal for nothing."""
    with torch.device(device):
        base = modeling_idefics2.Idefics2ForConditionalGeneration._from_config(config, dtype=dtype).requires_grad_(
            False
        )
    with warnings.catch_warnings(action="ignore"):
        model = get_peft_model(base, recipe.lora_config(settings))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.02)
    return model


def make_processor(shape):
    """Idefics2's processor with the tiny model's tokenizer: its tokens are below 600, the logits are 32,003 all the same."""
    processor = idefics2.processor()
    processor.image_seq_len = 64
    processor.image_processor.size = {"shortest_edge": min(378, shape["page"] // 2), "longest_edge": shape["page"]}
    return processor


def make_rows(n, shape, tokenizer, seed):
    """n rows as the recipe reads them: a printed page, a question of 12-20 tokens, an answer of 2-14 and <end_of_utterance>."""
    draw, rows = random.Random(seed), []
    for row in range(n):
        page = Image.new("RGB", (draw.randrange(680, 721) * shape["page"] // 980, shape["page"]), "white")
        pen = ImageDraw.Draw(page)
        for y in range(20, page.height - 20, 24):
            pen.text((20, y), f"{draw.random()} " * draw.randrange(1, 5), fill="black")
        question, length = "What is", draw.randrange(12, 21)
        while len(tokenizer(question, add_special_tokens=False).input_ids) < length:
            question += " " + draw.choice(["the", "total", "on", "this", "form", "number"])
        answer = "".join(draw.choices("0123456789", k=draw.randrange(2, 15)))  # digits are tokens one by one
        rows.append({"image": page, "question": question, "answers": [answer], "row": row})
    return rows


# ---------------------------------------------------------------- the two sides


def trainers(model, collator, rows, settings, training):
    """-> {"stock": Trainer, "recipe": Trainer} on two copies of the adapters and one frozen base."""
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
    same = """output_dir use_cpu bf16 fp16 activation_checkpointing per_device_train_batch_size gradient_accumulation_steps seed
    max_steps learning_rate disable_tqdm dataloader_num_workers remove_unused_columns""".split()
    arguments = transformers.TrainingArguments(
        **{name: getattr(training, name) for name in same}, report_to="none", save_strategy="no", logging_strategy="no"
    )
    stock = transformers.Trainer(model, arguments, collator, rows)

    mine = recipe.Trainer(settings, model=copied, args=training, data_collator=collator, train_dataset=rows)
    for trainer in (stock, mine):
        trainer.remove_callback(transformers.PrinterCallback)
    return {"stock": stock, "recipe": mine}


# ---------------------------------------------------------------- what is measured


def difference(sides, batch):
    """Loss of both sides; largest relative difference of any adapter's gradient, in its largest element and in its norm."""
    losses, found = {}, {}
    for name, trainer in sides.items():
        losses[name] = step(trainer, batch).item()
        found[name] = gradients(trainer)
    return {"loss": losses, **apart(found["stock"], found["recipe"])}


def equal(found):
    """Whether a result of `difference` is within TOLERANCE. NaN is not."""
    loss = abs(found["loss"]["stock"] - found["loss"]["recipe"])
    return all(value <= TOLERANCE for value in (loss, found["gradient_max"], found["gradient_norm"]))


def shares(model, batch):
    """Forward FLOPs of the parts, as shares of their sum."""
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    with counter() as counted, torch.no_grad():
        model(**inputs)  # of the Trainer's, which casts where it casts in training
    found = {
        part: sum(
            sum(counts.values())
            for name, counts in counted.flop_counts.items()
            for end in ends
            if name.endswith(f"base_model.model.{end}")
        )
        for part, ends in PARTS.items()
    }
    return {part: count / sum(found.values()) for part, count in found.items()}


@contextlib.contextmanager
def static_shapes():
    """Within it the label positions are looked up as indices. A boolean mask on a tensor without storage has no known shape."""
    original = recipe.logits_only_at
    recipe.logits_only_at = lambda positions, lm_head: original(positions.nonzero(as_tuple=True), lm_head)
    try:
        yield
    finally:
        recipe.logits_only_at = original


def flops_without_storage(shape, collator, rows, settings, training):
    """FLOPs of both sides and shares of the parts for a shape of any size, on the CPU, without its weights."""
    batch, config = collator(rows), configuration(shape, collator.processor.image_token_id)
    found = {}
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # copy.deepcopy looks at it
    for name in ("stock", "recipe"):
        model = without_storage(adapted(config, settings, "meta", torch.float32))
        trainer = trainers(model, collator, rows, settings, training)[name]
        if training.activation_checkpointing:
            trainer.model.activation_checkpointing_enable()  # what `train` does first
        with static_shapes():
            found[name] = flops(trainer, batch)
    return found, shares(model, batch)


# ---------------------------------------------------------------- the run


def prepare(args, checkpointing, folder, **more):
    """Flags -> the recipe's own (settings, training)."""
    flags = {
        "output_dir": folder,
        "activation_checkpointing": checkpointing,
        "seed": args.seed,
        "max_steps": 1,
        "learning_rate": 0,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        **more,
    }
    return recipe.parse([part for name, value in flags.items() for part in (f"--{name}", str(value))])


def measure(args, checkpointing, folder, report):
    """One setting: the check, then what it costs. Prints as it goes; returns all of it."""
    name = "tiny" if args.tiny else "idefics2-8b" if args.real_size else "scaled"
    small = "tiny" if args.tiny else "scaled"
    report(f"\nactivation checkpointing {'on' if checkpointing else 'off'}")

    def sides(shape, dtype, **more):
        settings, training = prepare(args, checkpointing, folder, **more)
        processor = make_processor(SHAPES[shape])
        processor.image_processor.do_image_splitting = settings.image_splitting
        collator = recipe.Collator(processor, settings, training)
        rows = make_rows(args.batch_size * args.steps, SHAPES[shape], processor.tokenizer, args.seed)
        batches = [collator(rows[n : n + args.batch_size]) for n in range(0, len(rows), args.batch_size)]
        transformers.set_seed(args.seed)
        dtype = dtype or (torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32)
        model = adapted(configuration(SHAPES[shape], processor.image_token_id), settings, training.device, dtype)
        both = trainers(model, collator, rows[: args.batch_size], settings, training)
        both["recipe"].remove_callback(
            recipe.FrozenWithoutGraph
        )  # the tower stays without a graph, for what is measured then
        for trainer in both.values():
            trainer.train()  # a step at learning rate 0: checkpointing and autocast are set up as for a user, kernels are warm
        return both, batches, collator, rows, settings, training

    exact = {"lora_dropout": 0, "bf16": False, "fp16": False}
    both, batches, *_ = sides(small, torch.float32, **exact)
    found = {"checkpointing": checkpointing, "check": difference(both, batches[0])}
    found["equal"], check = equal(found["check"]), found["check"]
    report(
        f"  same?    loss {check['loss']['stock']:.7f} and {check['loss']['recipe']:.7f}; gradients of {check['adapters']} "
        f"adapter matrices differ by at most {check['gradient_max']:.1e} (largest element), {check['gradient_norm']:.1e} "
        f"(norm): {'equal' if found['equal'] else 'NOT EQUAL'}"
    )
    if not found["equal"]:
        return found  # what it costs to compute something else is of no interest

    both, batches, collator, rows, settings, training = sides(name, None)
    timed = {side: [] for side in both}
    for n, batch in enumerate(batches):
        for side in sorted(both, reverse=n % 2 == 0):  # whoever is first may find the caches otherwise
            timed[side].append(seconds(both[side], batch))
    found["seconds_each"] = timed
    found["seconds"] = {side: statistics.median(values) for side, values in timed.items()}
    found["flops"] = {side: flops(trainer, batches[0]) for side, trainer in both.items()}
    found["peak_bytes"] = {side: peak(trainer, batches[0]) for side, trainer in both.items()}
    found["shares"] = {name: shares(both["stock"].model, batches[0])}
    spread = max(max(values) / min(values) for values in timed.values())

    report(
        line(
            "time",
            found["seconds"],
            "s",
            1,
            f"median of {args.steps}, alternating; slowest / fastest of one side {spread:.2f}",
        )
    )
    report(line("FLOPs", found["flops"], "GFLOP", 1e9, "forward, recomputation, backward"))
    report(
        line("memory", found["peak_bytes"], "MiB", 2**20, "most that PyTorch's allocator held at once, above weights")
    )
    if name == "scaled" and training.device.type == "cpu":
        found["flops_8b"], found["shares"]["idefics2-8b"] = flops_without_storage(
            SHAPES["idefics2-8b"], collator, rows[: args.batch_size], settings, training
        )
        report(line("FLOPs 8b", found["flops_8b"], "TFLOP", 1e12, "idefics2-8b, counted on weights without storage"))
    return found


def main(argv=None):
    """Flags -> exit status: 1 where the two sides are not equal."""
    parser = flag_parser(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="Measured steps of each side.")
    parser.add_argument("--batch_size", type=int, default=2, help="Rows of a step.")
    parser.add_argument("--seed", type=int, default=0, help="Of weights, pages and texts.")
    parser.add_argument(
        "--checkpointing",
        choices=["both", "on", "off"],
        default="both",
        help="Activation checkpointing, of both sides.",
    )
    parser.add_argument("--json", type=Path, help="Write all figures to this file.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--real_size", action="store_true", help="idefics2-8b's widths and depths; needs a CUDA GPU.")
    size.add_argument("--tiny", action="store_true", help="A model and pages of no meaning, for the tests.")
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device = check_flags(parser, args)
    if args.real_size and not torch.cuda.is_available():
        parser.error("--real_size needs a CUDA GPU; without one, idefics2-8b's FLOPs are counted, not its time")
    torch.set_num_threads(1)

    report = lambda text: print(text, flush=True)
    report(
        f"{device}; torch {torch.__version__}, transformers {transformers.__version__}; {args.batch_size} rows a step"
        + f"\n{SMALL}" * args.tiny
    )
    with tempfile.TemporaryDirectory() as folder:
        found = [
            measure(args, on, folder, report)
            for on in (True, False)
            if args.checkpointing in ("both", "on" if on else "off")
        ]
    write(args, device, found)
    if not all(setting["equal"] for setting in found):
        report("\nerror: the recipe's loss or gradients are not the stock Trainer's")
        return 1
    report("\nforward FLOPs: " + " : ".join(PARTS))
    for name, parts in found[0]["shares"].items():
        report(f"  {name:12s}" + " : ".join(f"{share:.2f}" for share in parts.values()))
    return 0


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    start(main)
