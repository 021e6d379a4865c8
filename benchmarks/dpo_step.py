"""One step of dpo_idefics2.py against TRL's stock DPOTrainer: time, FLOPs, memory, and whether loss, log-probabilities and
gradients are the same.

    python benchmarks/dpo_step.py --arch idefics2 --adapters language     # scaled down, float32, one thread: 2 minutes of a CPU
    python benchmarks/dpo_step.py --arch llava --adapters all --checkpointing both --json step.json
    python benchmarks/dpo_step.py --arch idefics2 --adapters all --real_size   # FLOPs of idefics2-8b, without its weights
    python benchmarks/dpo_step.py --arch idefics2 --adapters all --real_size --device cuda   # and its time; not run yet

Measured is forward + backward of one batch of pairs, policy and reference, as both trainers' `training_step` does it, alternating.
Both get the same model, LoRA (the recipe's `lora_config`), Training, collator and batches: prompts of about 40 tokens beside
the image's, answers of 80 to 100. The stock side is `trl.DPOTrainer` and nothing else, the recipe's side is
SharedPromptDPOTrainer. Time is process time on a CPU, wall time of a synchronized device on a GPU; a ratio of times is the median of
those of pairs of steps, one after the other. Memory is the most that PyTorch's allocator had given out at once, on a CPU
as in torch.profiler's record of it, on a GPU by torch.cuda.max_memory_allocated.

On a GPU both score label positions only; on a CPU TRL would score every position. So that a CPU shows what a GPU does, here
both score label positions only there, too (`label_positions_only`), which is in favour of the stock side.

The scaled model keeps the proportions of the real one: all widths and all lengths (patches, image tokens, texts) are a quarter, rank and
number of heads too, heads are as wide as they were; layers are 5 of 27 and 6 of 32 (LLaVA: 3 of 24 and 4 of 32), and by the
same factor, since they are not layers, the vocabulary and the projection behind the vision tower are narrower still. So attention, MLP,
connector, lm_head and LoRA have about the same share of a pair as in the real model. --real_size counts the FLOPs of that one: the same
code runs on weights that have a shape and no storage. It also takes the speed-up apart: image once and without a graph through what is
frozen, prompt once.

Exit status 1 where, in float64, loss, log-probabilities or any adapter's gradient differ by more than 1e-5 (all but the loss
relative; gradients in the largest element and in the norm); no speed-up is printed then. Also where, with checkpointing and
without --report_only, the scaled model's time or FLOPs miss their thresholds (THRESHOLDS)."""

import copy
import functools
import io
import os
import random
import sys
import tempfile
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from measure import (  # noqa: E402
    SMALL,
    TOLERANCE,
    StaticShapes,
    add_flags,
    apart,
    check_flags,
    costs,
    counter,
    flag_parser,
    flops,
    gradients,
    held,
    label_positions_only,
    missed,
    start,
    step,
    without_storage,
    write,
)
from PIL import Image  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402
from transformers.models.idefics2 import modeling_idefics2  # noqa: E402

import dpo_idefics2 as recipe  # noqa: E402
from tiny import idefics2, llava  # noqa: E402

# hidden, intermediate, layers, heads; language model: and key-value heads. side: of the image in pixels
REAL = {
    "idefics2": {
        "vision": (1152, 4304, 27, 16),
        "text": (4096, 14336, 32, 32, 8),
        "side": 980,
        "tokens": 64,
        "vocabulary": 32003,
    },
    "llava": {
        "vision": (1024, 4096, 24, 16),
        "text": (4096, 11008, 32, 32, 32),
        "side": 336,
        "tokens": 576,
        "vocabulary": 32064,
    },
}
SIZES = {  # -> what widths and lengths are divided by, layers of the vision tower and of the language model
    "idefics2": {"real": (1, 27, 32), "scaled": (4, 5, 6), "tiny": (16, 2, 2)},
    "llava": {"real": (1, 24, 32), "scaled": (4, 3, 4), "tiny": (16, 3, 2)},
}
PICTURES = {"idefics2": [(980, 980), (640, 480), (490, 490)], "llava": [(336, 336)]}  # whose FLOPs --real_size counts
THRESHOLDS = {  # least speed-up of the scaled model with checkpointing
    ("idefics2", "language"): {"time": 2.2, "FLOPs": 2.3},
    ("idefics2", "all"): {"time": 1.45, "FLOPs": 1.55},
    ("llava", "language"): {"time": 1.55, "FLOPs": 1.7},
    ("llava", "all"): {"time": 1.45, "FLOPs": 1.6},
}

# ---------------------------------------------------------------- model, data


def shape(arch, size):
    """-> the entry of REAL at a size, with `by`, what it was divided by, and `depth`, the share of layers left."""
    by, *layers = SIZES[arch][size]
    real, found = REAL[arch], {"by": by, "depth": layers[1] / REAL[arch]["text"][2]}
    for part, count in zip(("vision", "text"), layers):
        hidden, intermediate, _, *heads = real[part]
        found[part] = (hidden // by, intermediate // by, count, *(max(1, n // by) for n in heads))
    found["side"] = 14 * round(real["side"] / by**0.5 / 14)
    found["tokens"] = (found["side"] // 14) ** 2 if arch == "llava" else real["tokens"] // by
    found["vocabulary"] = max(700, round(real["vocabulary"] / by * found["depth"]))
    return found


def make_processor(arch, sizes):
    """The model's processor with a tiny model's tokenizer: its tokens are below 700 whatever the vocabulary."""
    if arch == "llava":
        processor = llava.processor()
        processor.image_processor.size = {"shortest_edge": sizes["side"]}
        processor.image_processor.crop_size = {"height": sizes["side"], "width": sizes["side"]}
    else:
        processor = idefics2.processor()
        processor.image_seq_len = sizes["tokens"]
        processor.image_processor.size = {"shortest_edge": 378 * sizes["side"] // 980, "longest_edge": sizes["side"]}
    return processor


def configuration(arch, sizes, tokenizer):
    """-> Idefics2Config or LlavaConfig."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    vision = {**dict(zip(names, sizes["vision"])), "image_size": sizes["side"], "patch_size": 14}
    text = {**dict(zip(names, sizes["text"])), "vocab_size": sizes["vocabulary"], "max_position_embeddings": 4096}
    text |= {"rms_norm_eps": 1e-5, "pad_token_id": tokenizer.pad_token_id}
    image = tokenizer.convert_tokens_to_ids("<image>")
    if arch == "llava":
        return transformers.LlavaConfig(
            vision_config={**vision, "model_type": "clip_vision_model"},
            text_config={**text, "model_type": "llama"},
            image_token_index=image,
            image_seq_length=sizes["tokens"],
        )
    heads = max(1, 16 // sizes["by"])
    resampler = {"hidden_size": sizes["text"][0], "rms_norm_eps": 1e-5, "resampler_n_latents": sizes["tokens"]}
    resampler |= {"resampler_n_heads": heads, "resampler_head_dim": 96, "num_key_value_heads": max(1, heads // 4)}
    resampler |= {"resampler_depth": max(1, round(3 * sizes["depth"]))}
    return transformers.Idefics2Config(
        vision_config=vision,
        perceiver_config=resampler,
        text_config={**text, "model_type": "mistral"},
        image_token_id=image,
    )


def make_model(config, sizes, device, dtype):
    """The frozen base as the recipe's `load_model` leaves it, with random weights."""
    (seen, *_), (width, inner, *_) = sizes["vision"], sizes["text"]
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
        if sizes["depth"] < 1 and config.model_type == "llava":  # it gets narrower, since it cannot have fewer layers
            projector, inner = model.model.multi_modal_projector, round(width * sizes["depth"])
            projector.linear_1, projector.linear_2 = torch.nn.Linear(seen, inner), torch.nn.Linear(inner, width)
        elif sizes["depth"] < 1:
            projection = modeling_idefics2.Idefics2MLP(
                seen, round(inner * sizes["depth"]), width, config.text_config.hidden_act
            )
            model.model.connector.modality_projection = projection
        if (
            config.model_type == "idefics2"
        ):  # at their initial 1 all image tokens are the same, and gradients rounding errors
            model.model.connector.perceiver_resampler.latents.data.normal_(std=0.5)
    return model.to(dtype).requires_grad_(False)


def make_rows(n, collator, sizes, side, seed, spread=1):
    """n rows as the recipe reads them: an image of noise, `side` wide and high, a question that makes a prompt of 40 tokens, the image's
    not counted, and answers of 90; of 36-44 and 80-100 with `spread`. All divided by `by`, as near as the chat template allows."""
    draw, noise, rows, tokenizer = random.Random(seed), random.Random(seed), [], collator.processor.tokenizer
    count = lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)

    def digits(middle, most, tokens_of=count):
        """Digits, added one by one until they make as many tokens as are drawn."""
        least = (middle + spread * draw.randrange(-most, most + 1)) // sizes["by"]
        text = str(draw.randrange(1, 10))
        while tokens_of(text) < least:
            text += draw.choice("0123456789")
        return text

    for row in range(n):
        image = Image.frombytes("RGB", side, noise.randbytes(3 * side[0] * side[1]))
        prompt = lambda text, image=image: count(collator.render([recipe.question_turn(text, [image])], prompt=True))
        question, chosen, rejected = digits(40, 4, prompt), digits(90, 10), digits(90, 10)
        cell = {"bytes": png(image), "path": None}
        rows.append({"image": cell, "question": question, "chosen": chosen, "rejected": rejected, "row": row})
    return rows


def png(image):
    """An image as a file's bytes."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# ---------------------------------------------------------------- the two sides


def trainers(base, collator, rows, settings, training):
    """-> {"stock": DPOTrainer, "recipe": SharedPromptDPOTrainer} on one frozen base, with equal adapters of their own. lora_B is
    random: at its initial 0 policy and reference would be the same, and every gradient of lora_A 0."""
    copied = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    sides = {}
    shared = functools.partial(recipe.SharedPromptDPOTrainer, settings)
    for name, kind, model in (("stock", trl.DPOTrainer, base), ("recipe", shared, copied)):
        sides[name] = kind(
            model=model,
            args=training,
            data_collator=collator,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=collator.processor,
            peft_config=recipe.lora_config(settings),
        )
        sides[name].remove_callback(transformers.PrinterCallback)
        sides[name].remove_callback(
            recipe.ReplacedForwards
        )  # prompts stay shared after train(), for what is measured then
        transformers.set_seed(training.seed)
        for part, weight in sides[name].model.named_parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()  # as the recipe's own Trainer does it
                weight.data.normal_(std=0.02 if "lora_B" in part else weight.shape[1] ** -0.5)
    assert sides["recipe"].why_not_shared is None
    return sides


# ---------------------------------------------------------------- what is measured


def difference(sides, batch):
    """Loss of both sides; largest relative difference of any answer's log-probability, under policy and reference, and of any adapter's
    gradient. In float64: the rounding errors of float32 are near TOLERANCE. (Norms and the fused head go through float32 all the same.)"""
    losses, said, found = {}, {}, {}
    for name, trainer in sides.items():
        trainer.model.double()
        outputs = []
        hook = trainer.model.register_forward_hook(
            lambda _, __, output, outputs=outputs: outputs.append(output.log_probs.detach())
        )
        losses[name] = step(trainer, batch).item()
        hook.remove()
        said[name] = torch.stack([values.sum(dim=1) for values in outputs])  # policy, reference
        found[name] = {key: gradient.clone() for key, gradient in gradients(trainer).items()}
        trainer.model.zero_grad()
    for trainer in sides.values():
        trainer.model.float()
    assert said["stock"].shape == (2, len(batch["input_ids"])) and (said["stock"][0] != said["stock"][1]).all()
    gap = ((said["stock"] - said["recipe"]).abs() / said["stock"].abs()).max().item()
    return {"loss": losses, "log_probabilities": gap, **apart(found["stock"], found["recipe"])}


def equal(found):
    """Whether a result of `difference` is within TOLERANCE. NaN is not."""
    loss = abs(found["loss"]["stock"] - found["loss"]["recipe"])
    return all(
        value <= TOLERANCE
        for value in (loss, *(found[what] for what in ("log_probabilities", "gradient_max", "gradient_norm")))
    )


def flops_by_part(trainer, batch):
    """FLOPs of a step: of `all`, and of `language`, what is left where the image's features need not be computed."""
    model = trainer.model.get_base_model().model
    original, kept = model.get_image_features, []

    def keep(*args, **kwargs):
        output = original(*args, **kwargs)
        kept.append(output.pooler_output)
        return output

    def give(*args, **kwargs):
        leaf = lambda t: torch.zeros_like(t, requires_grad=t.requires_grad)
        return transformers.modeling_outputs.BaseModelOutputWithPooling(
            pooler_output=pytree.tree_map(leaf, kept.pop(0))
        )

    found = []
    try:
        for forward in (keep, give):
            model.get_image_features = forward
            found.append(flops(trainer, batch))
    finally:
        del model.get_image_features
    return dict(zip(("all", "language"), found))


def flops_of_image(trainer, batch):
    """FLOPs to see each image of the batch once: vision tower and connector, forward."""
    images = {
        name: batch[name][: len(batch[name]) // 2]
        for name in ("pixel_values", "pixel_attention_mask")
        if name in batch
    }
    with counter() as counted, torch.no_grad():
        trainer.model.get_base_model().model.get_image_features(
            **{key: value.to(trainer.args.device) for key, value in images.items()}
        )
    return counted.get_total_flops()


# ---------------------------------------------------------------- the run


def prepare(args, checkpointing, folder, size, side=None, spread=1, **more):
    """Flags -> (settings, training, collator, rows, sizes, config); the configuration and the processor of a size are in `folder`,
    where the recipe finds them. `side` and `spread`: see make_rows; without a `side` images are as large as the model takes them."""
    sizes = shape(args.arch, size)
    processor = make_processor(args.arch, sizes)
    config = configuration(args.arch, sizes, processor.tokenizer)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    flags = {
        "model_name_or_path": folder,
        "output_dir": Path(folder) / "out",
        "load_in_4bit": False,
        "adapters": args.adapters,
        "lora_r": max(1, 16 // sizes["by"]),
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
        "use_cpu": args.device == "cpu",
        **({"longest_edge": sizes["side"]} if args.arch == "idefics2" else {}),
        **more,
    }
    settings, training = recipe.parse([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    rows = make_rows(
        args.batch_size * args.steps, collator, sizes, side or (sizes["side"], sizes["side"]), args.seed, spread
    )
    return settings, training, collator, rows, sizes, config


def measured_sides(args, checkpointing, folder, size, dtype=None, **more):
    """-> (the two trainers, warm, batches)."""
    settings, training, collator, rows, sizes, config = prepare(args, checkpointing, folder, size, **more)
    batches = [collator(rows[n : n + args.batch_size]) for n in range(0, len(rows), args.batch_size)]
    dtype = dtype or (torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32)
    transformers.set_seed(args.seed)
    base = make_model(config, sizes, training.device, dtype)
    both = trainers(base, collator, rows[: args.batch_size], settings, training)
    for trainer in both.values():
        trainer.train()  # a step at learning rate 0: checkpointing and autocast are set up as for a user, kernels are warm
    return both, batches


def counted_sides(args, checkpointing, folder, size, side=None, spread=0):
    """FLOPs of both sides (see flops_by_part) and of seeing the images, on the CPU, without weights."""
    settings, training, collator, rows, sizes, config = prepare(
        args, checkpointing, folder, size, side, spread, use_cpu=True
    )
    batch, found = collator(rows[: args.batch_size]), {}
    with mock.patch.object(transformers.Trainer, "_move_model_to_device"):  # weights without storage cannot be moved
        base = make_model(config, sizes, "meta", torch.float32)
        both = trainers(base, collator, rows[: args.batch_size], settings, training)
        for name, trainer in both.items():
            without_storage(trainer.model)
            trainer.current_gradient_accumulation_steps = 1  # what `train` does first
            if checkpointing:
                trainer.model.activation_checkpointing_enable()
            with StaticShapes():
                found[name] = flops_by_part(trainer, batch)
                found["image"] = flops_of_image(trainer, batch)
    return found


def parts(found, pairs, scale, unit):
    """Counts of both sides -> a line that takes the speed-up apart."""
    stock, mine = found["stock"], found["recipe"]
    seen = {side: found[side]["all"] - found[side]["language"] for side in ("stock", "recipe")}
    image, prompt = seen["recipe"] + stock["language"], seen["stock"] + mine["language"]
    return (
        f"  per pair: an image seen once {found['image'] / pairs / scale:.2f} {unit}; stock {stock['all'] / pairs / scale:.1f} {unit} "
        f"(image {seen['stock'] / pairs / scale:.1f}, language model {stock['language'] / pairs / scale:.1f}), recipe {mine['all'] / pairs / scale:.1f} {unit} "
        f"(image {seen['recipe'] / pairs / scale:.1f}, language model {mine['language'] / pairs / scale:.1f})\n"
        f"  speed-up: image once {stock['all'] / image:.2f}x, prompt once {stock['all'] / prompt:.2f}x, both {stock['all'] / mine['all']:.2f}x"
    )


def measure(args, checkpointing, folder, report):
    """One setting: the check, then what it costs. Prints as it goes; returns all of it."""
    size = "tiny" if args.tiny else "real" if args.real_size else "scaled"
    report(f"\nactivation checkpointing {'on' if checkpointing else 'off'}")
    found = {"checkpointing": checkpointing}
    if args.real_size:
        found["counted"] = {}
        for side in PICTURES[args.arch]:
            name = f"{side[0]}x{side[1]}"
            found["counted"][name] = counted_sides(args, checkpointing, folder, "real", side)
            report(f" image {name}\n{parts(found['counted'][name], args.batch_size, 1e12, 'TFLOP')}")
        if args.device == "cpu":
            return found

    small = "tiny" if args.tiny else "scaled"
    both, batches = measured_sides(args, checkpointing, folder, small, torch.float32, bf16=False, fp16=False)
    found["check"] = check = difference(both, batches[0])
    found["equal"] = equal(check)
    report(
        f"  same?    loss {check['loss']['stock']:.7f} and {check['loss']['recipe']:.7f}; log-probabilities differ by at most "
        f"{check['log_probabilities']:.1e}, gradients of {check['adapters']} adapter matrices by {check['gradient_max']:.1e} (largest "
        f"element), {check['gradient_norm']:.1e} (norm): {'equal' if found['equal'] else 'NOT EQUAL'}"
    )
    if not found["equal"]:
        return found  # what it costs to compute something else is of no interest

    if args.device == "cuda":
        both, batches = measured_sides(args, checkpointing, folder, size)
    counted = {side: flops_by_part(trainer, batches[0]) for side, trainer in both.items()}
    found |= costs(
        both, dict.fromkeys(both, batches), report, {side: counts["all"] for side, counts in counted.items()}
    )
    found["flops_by_part"] = counted | {"image": flops_of_image(both["stock"], batches[0])}
    report(parts(found["flops_by_part"], args.batch_size, 1e9, "GFLOP"))
    if size == "scaled" and checkpointing:
        held(found, THRESHOLDS[args.arch, args.adapters], report)
    return found


def main(argv=None):
    """Flags -> exit status: 1 where the two sides are not equal, or a threshold is missed."""
    parser = flag_parser(__doc__)
    parser.add_argument(
        "--arch", choices=list(REAL), default="idefics2", help="Idefics2-8b's proportions or LLaVA-1.5-7b's."
    )
    parser.add_argument("--adapters", choices=["language", "all"], default="all", help="As in the recipe.")
    add_flags(parser, steps=5, rows="Pairs")
    args = parser.parse_args(argv)
    device = check_flags(parser, args)
    torch.set_num_threads(1)

    report = lambda text: print(text, flush=True)
    report(
        f"{device}; torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}\n{args.arch}, adapters: "
        f"{args.adapters}, {args.batch_size} pair(s) a step; both sides score label positions only, as TRL does on a GPU"
        + f"\n{SMALL}"
        * args.tiny
    )
    wanted = [on for on in (True, False) if args.checkpointing in ("both", "on" if on else "off")]
    with tempfile.TemporaryDirectory() as folder, label_positions_only():
        found = [measure(args, on, folder, report) for on in wanted]
    write(args, device, found)
    if not all(setting.get("equal", True) for setting in found):
        report("\nerror: the recipe's loss, log-probabilities or gradients are not the stock trainer's")
        return 1
    if len(found) == 2 and "seconds" in found[0]:
        report("\nwithout checkpointing, as a share of what it takes with it:")
        for side in ("stock", "recipe"):
            share = {what: found[1][what][side] / found[0][what][side] for what in ("seconds", "flops", "peak_bytes")}
            report(
                f"  {side:7s}time {share['seconds']:.2f}, FLOPs {share['flops']:.2f}, memory {share['peak_bytes']:.2f}"
            )
    if missed(args, found, report):
        return 1
    return 0


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    start(main)
