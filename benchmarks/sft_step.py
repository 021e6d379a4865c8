"""One step of sft_llava.py against TRL's SFTTrainer, or of finetune_minicpm_lora.py (MiniCPM-V 4.6) against the stock Trainer: time,
FLOPs, memory, and whether loss and gradients are the same.

    python benchmarks/sft_step.py                                         # sft_llava, scaled down, float32, one thread: 1 minute of a CPU
    python benchmarks/sft_step.py --recipe finetune_minicpm_lora --checkpointing both --json step.json
    python benchmarks/sft_step.py --recipe finetune_minicpm_lora --real_size   # FLOPs of MiniCPM-V-4.6, without its weights
    python benchmarks/sft_step.py --real_size --device cuda               # and llava-1.5-7b's time; not run yet

Measured is forward + backward of one batch, as both trainers' `training_step` does it, alternating, with the recipe's dropout.

At equal settings both get the same model, LoRA (the recipe's `lora_config`), checkpointing and batches of the recipe's collator, so the same
labels. The stock side is `trl.SFTTrainer` with the recipe's own Training, or `transformers.Trainer` with PEFT and
`activation_checkpointing` in TrainingArguments, and nothing else; the recipe's side is its own Trainer. Rows are an image, a prompt of about 40
tokens beside the image's and an answer of about 20: 576 image tokens of some 640 for LLaVA, for MiniCPM-V a picture of 896 x 896, seen as a whole and
in 4 slices, of 64 image tokens each.

At each one's defaults, for sft_llava and with checkpointing, which both have on: SFTTrainer once more as a script without this recipe would
have it, with its own collator (DataCollatorForVisionLanguageModeling), the model's own chat template and SFTConfig as it is, on the same rows,
with the recipe's LoRA, since TRL has none of its own, and the recipe's batch size. There the losses differ by design: TRL
trains every position but padding, the image's placeholders too. Printed are the costs, and how many of the trained positions are an answer's.

Time is process time on a CPU, wall time of a synchronized device on a GPU; a ratio of times is the median of those of pairs of steps, one after
the other. Memory is the most that PyTorch's allocator had given out at once, on a CPU as in torch.profiler's record of it, on a GPU by
torch.cuda.max_memory_allocated. On a GPU TRL scores label positions only, on a CPU every one. So that a CPU shows what a GPU does, here it scores
label positions only there, too (`label_positions_only`), which is in favour of the stock side.

The scaled models keep the proportions of the real ones as dpo_step.py's do: widths and lengths are a quarter, heads are as wide as they were;
layers are 3 of 24 and 4 of 32 (LLaVA), 4 of 27 and 4 of 24 (MiniCPM-V: 1 before patches are merged and 3 after it, 3 of linear and 1 of full
attention), and by the same factor vocabulary and projections between the parts are narrower still. --real_size counts the FLOPs of the real
one: the same code runs on weights that have a shape and no storage.

Exit status 1 where, in float64, the loss or any trained weight's gradient differs by more than 1e-5 (relative; gradients in the largest element
and in the norm); no ratio is printed then. Also where, with checkpointing and without --report_only, the scaled model misses its
THRESHOLDS."""

import argparse
import copy
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
import dpo_step  # noqa: E402
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
    line,
    missed,
    start,
    step,
    without_storage,
    write,
)
from PIL import Image  # noqa: E402

import finetune_minicpm_lora  # noqa: E402
import sft_llava  # noqa: E402
from tiny import minicpm  # noqa: E402
from tools.generate import user_turn  # noqa: E402

RECIPES = {"sft_llava": sft_llava, "finetune_minicpm_lora": finetune_minicpm_lora}
# MiniCPM-V-4.6, by its config.json. Hidden, intermediate, layers, heads; language model: and key-value heads, then linear attention's heads
MINICPM = {"vision": (1152, 4304, 27, 16), "text": (1024, 3584, 24, 8, 2, 16), "view": 448, "vocabulary": 248094}
SIZES = {
    "real": (1, 27, 24),
    "scaled": (4, 4, 4),
    "tiny": (16, 2, 2),
}  # as in dpo_step.py: divided by, layers of tower and language model
PICTURES = {
    "sft_llava": [(336, 336)],
    "finetune_minicpm_lora": [(896, 896), (640, 480), (448, 448)],
}  # the first one is measured
PROMPT, ANSWER = 40, 20  # tokens
THRESHOLDS = {  # least speed-up of the scaled model with checkpointing
    "sft_llava": {"time": 1.05, "FLOPs": 1.05},
    "finetune_minicpm_lora": {"time": 1.3},
}

# ---------------------------------------------------------------- model, data


def shape(name, size):
    """-> what a recipe's model is made of at a size, with `by`, what it was divided by, and `depth`, the share of layers left."""
    if name == "sft_llava":
        return dpo_step.shape("llava", size)
    by, *layers = SIZES[size]
    found = {"by": by, "depth": layers[1] / MINICPM["text"][2]}
    for part, count in zip(("vision", "text"), layers):
        hidden, intermediate, _, *heads = MINICPM[part]
        found[part] = (hidden // by, intermediate // by, count, *(max(1, n // by) for n in heads))
    found["side"] = round(MINICPM["view"] / by**0.5)
    found["vocabulary"] = max(700, round(MINICPM["vocabulary"] / by * found["depth"]))
    return found


def make_processor(name, sizes):
    """The model's processor with a tiny model's tokenizer: its tokens are below 700 whatever the vocabulary."""
    if name == "sft_llava":
        return dpo_step.make_processor("llava", sizes)
    processor = minicpm.processor()
    for part in (processor.image_processor, processor.video_processor):
        part.scale_resolution = sizes["side"]
    return processor


def configuration(name, sizes, tokenizer):
    """-> LlavaConfig or MiniCPMV4_6Config."""
    if name == "sft_llava":
        return dpo_step.configuration("llava", sizes, tokenizer)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    *text, linear = sizes["text"]
    ids = {token: getattr(tokenizer, token) for token in ("bos_token_id", "eos_token_id", "pad_token_id")}
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    return transformers.MiniCPMV4_6Config(
        vision_config={**dict(zip(names, sizes["vision"])), "image_size": 14 * 70, "patch_size": 14},
        text_config={
            "model_type": "qwen3_5_text",
            **dict(zip(names, text)),
            "vocab_size": sizes["vocabulary"],
            "head_dim": 256,
            "layer_types": (kinds * 6)[-text[2] :],
            **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), linear),
            **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 128),
            "tie_word_embeddings": True,
            **ids,
        },
        insert_layer_id=6 if sizes["by"] == 1 else 0,
        tie_word_embeddings=True,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )


def make_model(config, sizes, device, dtype):
    """The frozen base as the recipe's `load_model` leaves it, with random weights."""
    if config.model_type == "llava":
        return dpo_step.make_model(config, sizes, device, dtype)
    (seen, inner, *_), (width, *_) = sizes["vision"], sizes["text"]
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
        if sizes["depth"] < 1:  # they get narrower, since they cannot have fewer layers
            merge, narrow = model.model.vision_tower.vit_merger, round(4 * inner * sizes["depth"])
            merge.linear_1, merge.linear_2 = torch.nn.Linear(4 * seen, narrow), torch.nn.Linear(narrow, seen)
            last, narrow = model.model.merger.mlp[0], round(4 * seen * sizes["depth"])
            last.linear_1, last.linear_2 = torch.nn.Linear(4 * seen, narrow), torch.nn.Linear(narrow, width)
    return model.to(dtype).requires_grad_(False)


def make_rows(n, name, collator, sizes, folder, picture, seed, spread=1):
    """n rows as the recipe reads them, with an image of noise in `picture`'s proportions: a prompt of 40 tokens, the image's not counted, and an
    answer of 20; of 36-44 and 16-24 with `spread`. All divided by `by`, as near as the chat template allows."""
    draw, noise, rows, processor = random.Random(seed), random.Random(seed), [], collator.processor
    render = getattr(
        collator,
        "render",
        lambda messages, prompt: processor.apply_chat_template(messages, add_generation_prompt=prompt),
    )
    count = lambda text: len(processor.tokenizer(text, add_special_tokens=False).input_ids)

    def digits(middle, tokens_of=count):
        """Digits, added one by one until they make as many tokens as are drawn."""
        least, text = (middle + spread * draw.randrange(-4, 5)) // sizes["by"], str(draw.randrange(1, 10))
        while tokens_of(text) < least:
            text += draw.choice("0123456789")
        return text

    side = tuple(round(length / sizes["by"] ** 0.5) for length in picture)
    for row in range(n):
        image = Image.frombytes("RGB", side, noise.randbytes(3 * side[0] * side[1]))
        prompt = lambda text, image=image: count(render([user_turn(collator, text, [image])], True)) - 1
        question, answer, file = digits(PROMPT, prompt), digits(ANSWER), str(Path(folder) / f"{row}.png")
        image.save(file)
        said = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
        if name == "sft_llava":
            said = [{"from": turn["role"], "value": turn["content"]} for turn in said]
        rows.append({"image": file, "conversations": said, "row": row})
    return rows


def as_trl_reads(row):
    """A row of sft_llava.py's in TRL's own schema."""
    roles = [{"role": turn["from"], "content": turn["value"].removeprefix("<image>")} for turn in row["conversations"]]
    return {"images": [Image.open(row["image"])], "messages": roles}


# ---------------------------------------------------------------- the sides


def trainers(name, base, collator, rows, settings, training):
    """-> {"stock": SFTTrainer or Trainer, "recipe": the recipe's} on one frozen base, with equal adapters, and projectors where
    trained, of their own. lora_B is random: at its initial 0 every gradient of lora_A would be 0, and equal for nothing."""
    if name == "sft_llava":
        copied, data = copy.deepcopy(base, {id(p): p for p in base.parameters()}), datasets.Dataset.from_list(rows)
        lora = sft_llava.lora_config(settings)
        stock = trl.SFTTrainer(base, training, collator, data, processing_class=collator.processor, peft_config=lora)
        parts = {"model": copied, "args": training, "data_collator": collator, "train_dataset": data}
        mine = sft_llava.Trainer(settings, **parts, processing_class=collator.processor, peft_config=lora)
    else:
        model = finetune_minicpm_lora.add_adapter(base, settings, finetune_minicpm_lora.lora_config(settings))
        copied = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
        same = """output_dir use_cpu bf16 fp16 activation_checkpointing per_device_train_batch_size gradient_accumulation_steps seed
        max_steps learning_rate disable_tqdm dataloader_num_workers remove_unused_columns""".split()
        plain = {part: getattr(training, part) for part in same}
        plain = transformers.TrainingArguments(**plain, report_to="none", save_strategy="no", logging_strategy="no")
        parts = finetune_minicpm_lora.PARTS[base.config.model_type]
        stock = transformers.Trainer(model, plain, collator, rows)
        inputs = {"model": copied, "args": training, "data_collator": collator, "train_dataset": rows}
        mine = finetune_minicpm_lora.Trainer(settings, parts, **inputs)
    for trainer in (stock, mine):
        ready(trainer)
    return {"stock": stock, "recipe": mine}


def by_itself(base, rows, settings, folder, args):
    """TRL's SFTTrainer with its own collator and its own defaults, on a frozen base, with the recipe's LoRA."""
    own = trl.SFTConfig(
        output_dir=str(Path(folder) / "trl"),
        use_cpu=args.device == "cpu",
        **({"bf16": False} if args.device == "cpu" else {}),
        per_device_train_batch_size=args.batch_size,
        seed=args.seed,
        max_steps=1,
        learning_rate=0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    processor = transformers.AutoProcessor.from_pretrained(folder)
    data = datasets.Dataset.from_list([as_trl_reads(row) for row in rows])
    trainer = trl.SFTTrainer(
        base, own, train_dataset=data, processing_class=processor, peft_config=sft_llava.lora_config(settings)
    )
    ready(trainer)
    return trainer


def ready(trainer):
    """Equal random adapters, by the seed; all that is trained in float32, as the recipes have it."""
    trainer.remove_callback(transformers.PrinterCallback)
    transformers.set_seed(trainer.args.seed)
    for part, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
            if "lora_" in part and weight.device.type != "meta":
                weight.data.normal_(std=0.02 if "lora_B" in part else weight.shape[1] ** -0.5)


# ---------------------------------------------------------------- what is measured


def difference(sides, batch):
    """Loss of both sides; largest relative difference of any trained weight's gradient. With the recipe's dropout, which draws
    the same on both sides, in float64: the rounding errors of float32 are near TOLERANCE."""
    losses, found = {}, {}
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    for name, trainer in sides.items():
        trainer.model.double()
        transformers.set_seed(trainer.args.seed)
        losses[name] = step(trainer, batch).item()
        found[name] = {key: gradient.clone() for key, gradient in gradients(trainer).items()}
        trainer.model.zero_grad()
    for trainer in sides.values():
        trainer.model.float()
    return {"loss": losses, **apart(found["stock"], found["recipe"])}


def equal(found):
    """Whether a result of `difference` is within TOLERANCE. NaN is not."""
    stock, mine = found["loss"]["stock"], found["loss"]["recipe"]
    return all(
        value <= TOLERANCE for value in (abs(stock - mine) / abs(stock), found["gradient_max"], found["gradient_norm"])
    )


def flops_of_image(trainer, batch):
    """FLOPs to see the images of the batch once: vision tower and projector, forward."""
    images = {name: batch[name].to(trainer.args.device) for name in ("pixel_values", "target_sizes") if name in batch}
    with counter() as counted, torch.no_grad():
        trainer.model.get_base_model().model.get_image_features(**images)
    return counted.get_total_flops()


def trained_positions(collate, rows, image, prompt):
    """What of the label positions of rows, collated one by one, are an image's placeholders, words of the prompt, and the answer.
    `prompt`: a row -> how many tokens there are before the answer."""
    found = {"image": 0, "prompt": 0, "answer": 0}
    for row in rows:
        batch = collate([row])
        labelled, ids, answered = (
            batch["labels"][0] != -100,
            batch["input_ids"][0],
            torch.arange(batch["labels"].shape[1]),
        )
        answered = answered >= prompt(row)
        found["image"] += int((labelled & (ids == image)).sum())
        found["answer"] += int((labelled & answered).sum())
        found["prompt"] += int((labelled & ~answered & (ids != image)).sum())
    return found


# ---------------------------------------------------------------- the run


def prepare(args, checkpointing, folder, size, picture=None, spread=1, **more):
    """Flags -> (settings, training, collator, rows, sizes, config); the configuration and the processor of a size are in `folder`,
    where the recipe finds them. `picture` and `spread`: see make_rows."""
    recipe, sizes = RECIPES[args.recipe], shape(args.recipe, size)
    processor = make_processor(args.recipe, sizes)
    config = configuration(args.recipe, sizes, processor.tokenizer)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    flags = {
        "model_name_or_path": folder,
        "output_dir": Path(folder) / "out",
        "activation_checkpointing": checkpointing,
        "seed": args.seed,
        "max_steps": 1,
        "learning_rate": 1e-4 if args.recipe == "finetune_minicpm_lora" else 0,  # there 0 means frozen
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        **({"load_in_4bit": False, "optim": "adamw_torch"} if args.recipe == "sft_llava" else {}),
        **more,
    }
    given, _ = recipe.parse([])
    flags["lora_r"] = max(1, given.lora_r // sizes["by"])
    settings, training = recipe.parse([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    rows = make_rows(
        args.batch_size * args.steps,
        args.recipe,
        collator,
        sizes,
        folder,
        picture or PICTURES[args.recipe][0],
        args.seed,
        spread,
    )
    return settings, training, collator, rows, sizes, config


def measured_sides(args, checkpointing, folder, size, dtype=None, **more):
    """-> (the two trainers, warm; batches; the third, of TRL by itself, and its batches, for sft_llava with checkpointing; what is
    trained in its batches and in the recipe's)."""
    settings, training, collator, rows, sizes, config = prepare(args, checkpointing, folder, size, **more)
    split = lambda collate, rows: [
        collate(rows[n : n + args.batch_size]) for n in range(0, len(rows), args.batch_size)
    ]
    dtype = dtype or (torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32)
    transformers.set_seed(args.seed)
    base, alone = make_model(config, sizes, training.device, dtype), None
    extra = (
        copy.deepcopy(base, {id(p): p for p in base.parameters()})
        if args.recipe == "sft_llava" and checkpointing
        else None
    )
    both = trainers(args.recipe, base, collator, rows[: args.batch_size], settings, training)
    if extra is not None:
        trainer = by_itself(extra, rows[: args.batch_size], settings, folder, args)
        own = [as_trl_reads(row) for row in rows]
        ids = lambda messages: len(collator.tokenize([messages], prompt=True)["input_ids"][0])
        before = [ids(collator.messages_of(row)[:1]) for row in rows]
        start = lambda row: before[next(n for n, other in enumerate(own) if other is row)]
        image = collator.processor.image_token_id
        trained = {
            "stock": trained_positions(
                lambda some: trainer.data_collator([dict(row) for row in some]), own, image, start
            ),
            "recipe": trained_positions(collator, rows, image, lambda row: before[row["row"]]),
        }
        alone = trainer, split(trainer.data_collator, own), trained
    replaced = sys.modules[type(both["recipe"]).__module__].ReplacedForwards
    for callback in [one for one in both["recipe"].callback_handler.callbacks if isinstance(one, replaced)]:
        both["recipe"].remove_callback(callback)  # forwards stay replaced after train(), for what is measured then
    for trainer in (*both.values(), *([alone[0]] if alone else [])):
        trainer.train()  # a step: checkpointing and autocast are set up as for a user, kernels are warm
    for stock, mine in zip(*(trainer.model.parameters() for trainer in both.values())):
        if mine.requires_grad:
            mine.data.copy_(stock.data)  # MiniCPM-V's recipe knows no learning rate of 0, and an AdamW of its own
    return both, split(collator, rows), alone


def counted_sides(args, checkpointing, folder, size, picture=None, spread=0):
    """FLOPs of both sides and of seeing the images, on the CPU, without weights."""
    cpu = argparse.Namespace(**{**vars(args), "device": "cpu", "steps": 1})
    settings, training, collator, rows, sizes, config = prepare(cpu, checkpointing, folder, size, picture, spread)
    batch, found = collator(rows[: args.batch_size]), {}
    with mock.patch.object(transformers.Trainer, "_move_model_to_device"):  # weights without storage cannot be moved
        base = make_model(config, sizes, "meta", torch.float32)
        for name, trainer in trainers(
            args.recipe, base, collator, rows[: args.batch_size], settings, training
        ).items():
            without_storage(trainer.model)
            trainer.current_gradient_accumulation_steps = 1  # what `train` does first
            if checkpointing:
                trainer.model.activation_checkpointing_enable()
            with StaticShapes():
                found[name] = flops(trainer, batch)
                found["image"] = flops_of_image(trainer, batch)
    return found


def measure(args, checkpointing, folder, report):
    """One setting: the check, then what it costs. Prints as it goes; returns all of it."""
    size = "tiny" if args.tiny else "real" if args.real_size else "scaled"
    report(f"\nactivation checkpointing {'on' if checkpointing else 'off'}")
    found = {"checkpointing": checkpointing}
    if args.real_size:
        found["counted"] = {}
        for picture in PICTURES[args.recipe]:
            name = f"{picture[0]}x{picture[1]}"
            found["counted"][name] = counted = counted_sides(args, checkpointing, folder, "real", picture)
            seen = f"image {name}; of it to see the images once {counted['image'] / 1e12:.2f} TFLOP"
            report(line("FLOPs", {side: counted[side] for side in ("stock", "recipe")}, "TFLOP", 1e12, seen))
        if args.device == "cpu":
            return found

    small = "tiny" if args.tiny else "scaled"
    both, batches, alone = measured_sides(args, checkpointing, folder, small, torch.float32, bf16=False, fp16=False)
    found["check"] = check = difference(both, batches[0])
    found["equal"] = equal(check)
    report(
        f"  same?    loss {check['loss']['stock']:.7f} and {check['loss']['recipe']:.7f}; gradients of {check['adapters']} trained matrices "
        f"differ by at most {check['gradient_max']:.1e} (largest element), {check['gradient_norm']:.1e} (norm): "
        f"{'equal' if found['equal'] else 'NOT EQUAL'}"
    )
    if not found["equal"]:
        return found  # what it costs to compute something else is of no interest

    if args.device == "cuda":
        both, batches, alone = measured_sides(args, checkpointing, folder, size)
    report(" at equal settings")
    found |= costs(both, dict.fromkeys(both, batches), report)
    found["image_flops"] = flops_of_image(both["recipe"], batches[0])
    if alone:
        trainer, own, trained = alone
        report(
            " at each one's defaults: stock is SFTTrainer with its own collator; it trains other positions, so losses differ by design"
        )
        found["defaults"] = costs({**both, "stock": trainer}, {"stock": own, "recipe": batches}, report)
        found["defaults"]["trained_positions"] = trained
        for side, counts in trained.items():
            total = sum(counts.values())
            shares = ", ".join(f"{part} {count / total:.1%}" for part, count in counts.items())
            report(f"  {side:7s}{total / len(own) / args.batch_size:6.1f} label positions a row: {shares}")
    if size == "scaled" and checkpointing:
        held(found, THRESHOLDS[args.recipe], report, " at equal settings")
    return found


def main(argv=None):
    """Flags -> exit status: 1 where the two sides are not equal, or a threshold is missed."""
    parser = flag_parser(__doc__)
    parser.add_argument("--recipe", choices=list(RECIPES), default="sft_llava", help="Whose step is measured.")
    add_flags(parser, steps=9, rows="Rows")
    args = parser.parse_args(argv)
    device = check_flags(parser, args)
    torch.set_num_threads(1)

    report = lambda text: print(text, flush=True)
    trl_too = args.recipe == "sft_llava"
    report(
        f"{device}; torch {torch.__version__}, transformers {transformers.__version__}"
        + f", trl {trl.__version__}" * trl_too
        + "\n"
        f"{args.recipe}, {args.batch_size} row(s) a step; "
        + (
            "SFTTrainer scores label positions only, as on a GPU"
            if trl_too
            else "MiniCPM-V 4.6, against transformers.Trainer"
        )
        + f"\n{SMALL}" * args.tiny
    )
    wanted = [on for on in (True, False) if args.checkpointing in ("both", "on" if on else "off")]
    with tempfile.TemporaryDirectory() as folder, label_positions_only():
        found = [measure(args, on, folder, report) for on in wanted]
    write(args, device, found)
    if not all(setting.get("equal", True) for setting in found):
        report("\nerror: the recipe's loss or gradients are not the stock trainer's")
        return 1
    if missed(args, found, report):
        return 1
    return 0


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    start(main)
