"""One training step of a recipe beside what a user would run instead: time, FLOPs, memory, and whether both are equal.

    python benchmarks/step.py                                      # sft_llava, scaled down: 1 minute of one CPU
    python benchmarks/step.py --recipe idefics2_docvqa --checkpointing both                # 3 minutes
    python benchmarks/step.py --recipe idefics2_docvqa --questions 4   # that share a page, too: 5 minutes
    python benchmarks/step.py --recipe dpo_idefics2 --arch llava --adapters all --json step.json
    python benchmarks/step.py --recipe finetune_minicpm_lora --real_size  # FLOPs of MiniCPM-V-4.6, without its weights
    python benchmarks/step.py --recipe dpo_idefics2 --real_size --device cuda   # and idefics2-8b's time; not run yet
    python benchmarks/step.py --host                               # operations and host time, all recipes: 3 minutes

Measured is forward + backward of one batch, as both trainers' `training_step` does it, alternating, with the recipe's
dropout. Both sides get the same model, LoRA (the recipe's `lora_config`), checkpointing, and batches of the recipe's
collator. The stock side is trl.SFTTrainer (sft_llava) or trl.DPOTrainer (dpo_idefics2) with the recipe's Training; for
the others it is transformers.Trainer with PEFT and `activation_checkpointing` in TrainingArguments, and nothing else.

A row is an image of noise (LLaVA 336 x 336 pixels, Idefics2 980 x 980, MiniCPM-V 4.6 896 x 896, seen as a whole and in
4 slices), a prompt of about 40 tokens beside the image's, and an answer of about 20; a pair has two of about 90. Of
idefics2_docvqa: a printed page of about 980 x 700 pixels, a question of 12-20 tokens, an answer of 3-15.

For sft_llava with checkpointing, which both have on by default, also at each one's defaults: SFTTrainer once more as a
script without this recipe would have it, with its own collator (DataCollatorForVisionLanguageModeling), the model's
own chat template and SFTConfig as it is, on the same rows, with the recipe's LoRA, since TRL has none of its own, and
its batch size. There the losses differ by design: TRL trains every position but padding, the image's placeholders too.
Printed are the costs, and how many of the trained positions are an answer's.

Time is process time on a CPU, wall time of a synchronized device on a GPU; a ratio of times is the median of those of
pairs of steps, one after the other. Memory is the most that PyTorch's allocator had given out at once, on a CPU as in
torch.profiler's record of it, on a GPU by torch.cuda.max_memory_allocated. On a GPU TRL scores label positions only,
on a CPU every one. So that a CPU shows what a GPU does, here it scores label positions only there, too, which is in
favour of the stock side.

The scaled models keep the proportions of the real ones: widths, lengths (patches, image tokens, texts), rank and
number of heads are a quarter, heads are as wide as they were; layers are 5 of 27 and 6 of 32 (Idefics2), 3 of 24 and 4
of 32 (LLaVA), 4 of 27 and 4 of 24 (MiniCPM-V: 1 before patches are merged and 3 after it, 3 of linear and 1 of full
attention). By the same factor, since they are not layers, vocabulary and projections between the parts are narrower
still. So each part has about the same share of a step as in the real model. idefics2_docvqa shows full pages to narrow
layers instead, where attention is more of the tower's work; so there idefics2-8b's FLOPs are counted, too, and the
parts' shares of both printed. --real_size counts the FLOPs of the real model: the same code runs on weights that have
a shape and no storage. Of dpo_idefics2 the speed-up is taken apart: image once and without a graph through what is
frozen, prompt once.

--host has no stock side: it counts the operations that Python launches in a micro-step of each recipe at real depth,
their time on this CPU with next to nothing to compute in each (benchmarks/host.py), and, by tests/fake_cuda.py, where
the host would wait for a GPU.

Exit status 1 where, in float64, the loss, an answer's log-probability (DPO) or any trained weight's gradient differs
by more than 1e-5 (relative; gradients in the largest element and in the norm); no ratio is printed then. Also where,
with checkpointing and without --report_only, the scaled model misses its THRESHOLDS."""

import contextlib
import copy
import functools
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets  # noqa: E402
import measure  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from made_up import configuration, sized_processor, trl_row  # noqa: E402
from peft import get_peft_model  # noqa: E402
from PIL import Image  # noqa: E402
from scaled import PICTURES, make_model, noise_rows, page_rows, page_shape, shape  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

import dpo_idefics2  # noqa: E402
import finetune_minicpm_lora  # noqa: E402
import idefics2_docvqa  # noqa: E402
import llava_two_stage  # noqa: E402
import sft_llava  # noqa: E402

ARCHITECTURES = {"idefics2": "idefics2-8b", "llava": "llava-1.5-7b"}
THRESHOLDS = {  # least speed-up of the scaled model with checkpointing
    "sft_llava": {"time": 1.05, "FLOPs": 1.05},
    "finetune_minicpm_lora": {"time": 1.3},
    "dpo_idefics2 idefics2 language": {"time": 2.2, "FLOPs": 2.3},
    "dpo_idefics2 idefics2 all": {"time": 1.45, "FLOPs": 1.55},
    "dpo_idefics2 llava language": {"time": 1.55, "FLOPs": 1.7},
    "dpo_idefics2 llava all": {"time": 1.45, "FLOPs": 1.6},
    "shared pages": {"time": 2, "FLOPs": 2.5, "memory": 1},  # idefics2_docvqa beside itself, 4 questions a page
}
SIDE_NAMES = ("stock", "recipe")


# ---------------------------------------------------------------- the two sides


def as_trl_reads(row):
    """A row of sft_llava in TRL's own schema."""
    question, answer = (turn["value"] for turn in row["conversations"])
    return trl_row("sft_llava", question.removeprefix("<image>"), [answer], Image.open(row["image"]))


def trl_sides(stock_class, own_class, setup, base, rows):
    """-> {"stock": TRL's trainer, "recipe": the recipe's} on one frozen base."""
    copied = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    options = {
        "args": setup.training,
        "data_collator": setup.collator,
        "train_dataset": datasets.Dataset.from_list(rows),
        "processing_class": setup.collator.processor,
        "peft_config": setup.case.module.lora_config(setup.settings),
    }
    stock = stock_class(model=base, **options)
    if getattr(setup.settings, "attn_implementation", None):
        copied.set_attn_implementation(setup.case.module.attention_kernel(setup.settings))
    recipe = own_class(setup.settings, model=copied, **options)
    assert getattr(recipe, "why_not_shared", None) is None
    return {"stock": stock, "recipe": recipe}


def plain_sides(adapted, own_class, setup, base, rows):
    """-> {"stock": transformers.Trainer, "recipe": the recipe's} on one frozen base. adapted: settings, base -> the
    base with the recipe's LoRA."""
    model = adapted(setup.settings, base)
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
    same = """output_dir use_cpu bf16 fp16 activation_checkpointing per_device_train_batch_size seed max_steps
    gradient_accumulation_steps learning_rate disable_tqdm dataloader_num_workers remove_unused_columns""".split()
    plain = {name: getattr(setup.training, name) for name in same}
    plain |= {"report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
    collate = functools.partial(as_stock_takes, setup.collator)
    stock = transformers.Trainer(model, transformers.TrainingArguments(**plain), collate, rows)
    options = {"model": copied, "args": setup.training, "data_collator": setup.collator, "train_dataset": rows}
    return {"stock": stock, "recipe": own_class(setup.settings, **options)}


def as_stock_takes(collator, rows):
    """Rows -> the recipe's batch, without what only the recipe's trainer knows; sizes of slices as a tensor."""
    batch = {name: value for name, value in collator(rows).items() if name not in ("trained_at", "targets")}
    if "target_sizes" in batch:
        batch["target_sizes"] = torch.as_tensor(batch["target_sizes"])
    return batch


def with_docvqa_adapter(settings, base):
    """idefics2_docvqa's LoRA on a base."""
    with warnings.catch_warnings(action="ignore"):
        return idefics2_docvqa.add_adapter(base, idefics2_docvqa.lora_config(settings))


def with_minicpm_adapter(settings, base):
    """finetune_minicpm_lora's LoRA on a base."""
    return finetune_minicpm_lora.add_adapter(base, settings, finetune_minicpm_lora.lora_config(settings))


def with_two_stage_adapter(settings, base):
    """llava_two_stage's LoRA on a base, whose projector is trained in full."""
    base.model.multi_modal_projector.requires_grad_(True)
    return get_peft_model(base, llava_two_stage.lora_config(settings))


def minicpm_trainer(settings, **options):
    """finetune_minicpm_lora's Trainer; MiniCPM-V 4.6."""
    return finetune_minicpm_lora.Trainer(settings, finetune_minicpm_lora.PARTS["minicpmv4_6"], **options)


def sft_by_itself(args, setup, base, rows):
    """TRL's SFTTrainer with its own collator and its own defaults, on a frozen base, with the recipe's LoRA."""
    options = {
        "output_dir": str(setup.folder / "trl"),
        "per_device_train_batch_size": args.batch_size,
        "seed": args.seed,
        "max_steps": 1,
        "learning_rate": 0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    if args.device == "cpu":
        options |= {"use_cpu": True, "bf16": False}
    trainer = trl.SFTTrainer(
        base,
        trl.SFTConfig(**options),
        train_dataset=datasets.Dataset.from_list([as_trl_reads(row) for row in rows]),
        processing_class=transformers.AutoProcessor.from_pretrained(setup.folder),
        peft_config=sft_llava.lora_config(setup.settings),
    )
    randomize(trainer)
    return trainer


def randomize(trainer):
    """Equal random adapters, by the seed, and all that is trained in float32, as the recipes have it. At lora_B's
    initial 0 policy and reference would be equal, and every gradient of lora_A 0."""
    trainer.remove_callback(transformers.PrinterCallback)
    transformers.set_seed(trainer.args.seed)
    for name, weight in trainer.model.named_parameters():
        if not weight.requires_grad:
            continue
        weight.data = weight.data.float()
        if "lora_" in name and weight.device.type != "meta":
            weight.data.normal_(std=0.02 if "lora_B" in name else weight.shape[1] ** -0.5)


# ---------------------------------------------------------------- what is counted


def count_total(trainer, batch):
    """FLOPs of a step -> {"all": them}."""
    return {"all": measure.flops(trainer, batch)}


def trained_positions(collate, rows, image, prompt):
    """What of the label positions of rows, collated one by one, are an image's placeholders, words of the prompt, and
    the answer. `prompt`: for each row, how many tokens there are before the answer."""
    found = {"image": 0, "prompt": 0, "answer": 0}
    for row, length in zip(rows, prompt, strict=True):
        batch = collate([row])
        is_trained, ids = batch["labels"][0] != -100, batch["input_ids"][0]
        is_answer = torch.arange(len(ids)) >= length
        found["image"] += int((is_trained & (ids == image)).sum())
        found["answer"] += int((is_trained & is_answer).sum())
        found["prompt"] += int((is_trained & ~is_answer & (ids != image)).sum())
    return found


# ---------------------------------------------------------------- reports of what was counted


def report_totals(counted, unit, scale, pairs, note, report):
    """FLOPs of both sides -> a line."""
    note += f"; of it to see the images once {counted['image'] / scale:.2f} {unit}"
    if "apart" in counted:
        apart, shared = counted["apart"]["all"], counted["recipe"]["all"]
        note += f"; the recipe without shared pages {apart / scale:.2f} {unit}, {apart / shared:.2f}x"
    report(measure.line("FLOPs", {side: counted[side]["all"] for side in SIDE_NAMES}, unit, scale, note))


def report_parts(counted, unit, scale, pairs, note, report):
    """FLOPs of both sides by part -> lines that take DPO's speed-up apart. note: what picture it is, or ""."""
    stock, recipe = counted["stock"], counted["recipe"]
    if note:
        report(f" {note}")
    sides = []
    seen = {}
    for name in SIDE_NAMES:
        of_all, of_language = counted[name]["all"], counted[name]["language"]
        seen[name] = of_all - of_language
        total, image, language = (count / pairs / scale for count in (of_all, seen[name], of_language))
        sides.append(f"{name} {total:.1f} {unit} (image {image:.1f}, language model {language:.1f})")
    once = counted["image"] / pairs / scale
    report(f"  per pair: an image seen once {once:.2f} {unit}; {', '.join(sides)}")
    image_once = stock["all"] / (seen["recipe"] + stock["language"])
    prompt_once = stock["all"] / (seen["stock"] + recipe["language"])
    both = stock["all"] / recipe["all"]
    report(f"  speed-up: image once {image_once:.2f}x, prompt once {prompt_once:.2f}x, both {both:.2f}x")


# ---------------------------------------------------------------- where the recipes differ


@dataclass(frozen=True)
class Case:
    """What a step of one recipe is made of."""

    module: ModuleType
    stock: str  # its stock side, as the report names it
    sides: Callable  # setup, base, rows -> {"stock": trainer, "recipe": trainer}
    model: str | None = None  # the published one; None: --arch says which
    shape: Callable = shape
    rows: Callable = noise_rows
    answers: tuple = ((20, 4),)  # of a row of noise_rows: tokens, at most so many more or fewer
    uncounted: int = 1  # tokens of a prompt that are not counted: the image's placeholder
    sequences: int = 1  # of a row
    flags: dict = field(default_factory=dict)  # of the recipe
    flags_of_check: dict = field(default_factory=dict)  # more of them where both sides are compared
    count: Callable = count_total  # trainer, batch -> FLOPs
    report_counts: Callable = report_totals
    shares: Callable | None = None  # trainer, batch -> each part's share of the forward FLOPs
    by_itself: Callable | None = None  # the stock side at its own defaults
    batch_size: int = 1
    steps: int = 9


LABELS = "scores label positions only, as on a GPU"
CASES = {
    "sft_llava": Case(
        sft_llava,
        f"SFTTrainer, which {LABELS}",
        functools.partial(trl_sides, trl.SFTTrainer, sft_llava.Trainer),
        model="llava-1.5-7b",
        flags={"load_in_4bit": False, "optim": "adamw_torch", "learning_rate": 0},
        by_itself=sft_by_itself,
    ),
    "idefics2_docvqa": Case(
        idefics2_docvqa,
        "transformers.Trainer",
        functools.partial(plain_sides, with_docvqa_adapter, idefics2_docvqa.Trainer),
        model="idefics2-8b",
        shape=page_shape,
        rows=page_rows,
        flags={"learning_rate": 0},
        flags_of_check={"lora_dropout": 0},  # on lm_head it draws for other positions on either side
        shares=measure.forward_shares,
        batch_size=2,
        steps=5,
    ),
    "dpo_idefics2": Case(
        dpo_idefics2,
        f"DPOTrainer, which {LABELS}",
        functools.partial(trl_sides, trl.DPOTrainer, dpo_idefics2.SharedPromptDPOTrainer),
        answers=((90, 10), (90, 10)),
        uncounted=0,
        sequences=2,
        flags={"load_in_4bit": False, "learning_rate": 0},
        count=measure.flops_by_part,
        report_counts=report_parts,
        steps=5,
    ),
    "finetune_minicpm_lora": Case(
        finetune_minicpm_lora,
        "transformers.Trainer",
        functools.partial(plain_sides, with_minicpm_adapter, minicpm_trainer),
        model="minicpm-v-4.6",
        flags={"learning_rate": 1e-4},  # 0 means frozen there
    ),
    "llava_two_stage": Case(
        llava_two_stage,
        "transformers.Trainer",
        functools.partial(plain_sides, with_two_stage_adapter, llava_two_stage.Trainer),
        model="llava-1.5-7b",
        flags={"stage": "instruct", "lora_r": 128, "learning_rate": 1e-4, "group_by_modality_length": False},
    ),
}


# ---------------------------------------------------------------- the run


def prepare(args, checkpointing, folder, size, picture=None, spread=1, **more):
    """Flags -> what a step is made of: the case, sizes, the recipe's settings, training and collator, rows. `more`:
    flags of the recipe. Configuration and processor of that size are written to `folder`, where the recipe finds
    them."""
    case, folder = CASES[args.recipe], Path(folder)
    sizes = case.shape(args.model, size)
    processor = sized_processor(args.model, sizes["side"], sizes["tokens"])
    config = configuration(args.model, sizes, processor.tokenizer)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    defaults, _ = case.module.parse(measure.as_flags(case.flags))
    flags = {
        **case.flags,
        "model_name_or_path": folder,
        "output_dir": folder / "out",
        "lora_r": max(1, defaults.lora_r // sizes["by"]),
        "activation_checkpointing": checkpointing,
        "seed": args.seed,
        "max_steps": 1,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        **dict.fromkeys(["eval_strategy", "save_strategy", "logging_strategy"], "no"),
        **more,
    }
    if args.recipe == "dpo_idefics2":
        flags["adapters"] = args.adapters
        if args.arch == "idefics2":
            flags["longest_edge"] = sizes["side"]
        if args.attn_implementation:
            flags.setdefault("attn_implementation", args.attn_implementation)
    settings, training = case.module.parse(measure.as_flags(flags))
    collator = case.module.Collator(case.module.load_processor(settings), settings, training)
    setup = SimpleNamespace(case=case, folder=folder, sizes=sizes, config=config, collator=collator)
    setup.settings, setup.training = settings, training
    setup.rows = case.rows(args, setup, picture or PICTURES[args.model][0], spread)
    return setup


def in_batches(collate, rows, batch_size):
    """Rows -> batches of so many."""
    return [collate(rows[n : n + batch_size]) for n in range(0, len(rows), batch_size)]


def batches_of_both(args, setup, rows):
    """Rows -> {side: batches}. With several questions a page the recipe's share it, and the stock side's do not."""
    batches = in_batches(setup.collator, rows, args.batch_size)
    both = dict.fromkeys(SIDE_NAMES, batches)
    if args.questions > 1:
        sharing = copy.copy(setup.collator)
        sharing.share_pages = True
        both["recipe"] = in_batches(sharing, rows, args.batch_size)
    return both


def measured_sides(args, checkpointing, folder, size, dtype=None, **more):
    """-> (the two trainers, warm; {side: batches}; what `at_its_defaults` gives, where the case and checkpointing ask
    for it)."""
    setup = prepare(args, checkpointing, folder, size, **more)
    if dtype is None:
        dtype = setup.case.module.weight_dtype(setup.training)
    transformers.set_seed(args.seed)
    base = make_model(setup.config, setup.sizes, setup.training.device, dtype)
    other_base = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    first = setup.rows[: args.batch_size]
    both = setup.case.sides(setup, base, first)
    alone = None
    if setup.case.by_itself and checkpointing:
        alone = at_its_defaults(args, setup, other_base)
    # Forwards stay replaced after train(), for what is measured then.
    replaced = setup.case.module.ReplacedForwards
    for callback in [one for one in both["recipe"].callback_handler.callbacks if isinstance(one, replaced)]:
        both["recipe"].remove_callback(callback)
    for trainer in both.values():
        randomize(trainer)
    for trainer in [*both.values(), *([alone[0]] if alone else [])]:
        trainer.train()  # a step: checkpointing and autocast are set up as for a user, kernels are warm
    for stock, recipe in zip(*(trainer.model.parameters() for trainer in both.values())):
        if recipe.requires_grad:
            recipe.data.copy_(stock.data)  # MiniCPM-V's recipe has no learning rate of 0, and an AdamW of its own
    return both, batches_of_both(args, setup, setup.rows), alone


def at_its_defaults(args, setup, base):
    """-> (SFTTrainer by itself, its batches, {side: what is trained in the batches of each})."""
    collator, rows = setup.collator, setup.rows
    trainer = setup.case.by_itself(args, setup, base, rows[: args.batch_size])
    own_rows = [as_trl_reads(row) for row in rows]
    image = collator.processor.image_token_id
    prompts = [collator.tokenize([collator.messages_of(row)[:1]], prompt=True)["input_ids"][0] for row in rows]
    lengths = [len(prompt) for prompt in prompts]
    copies = [dict(row) for row in own_rows]  # TRL's collator changes the rows it gets
    trained = {
        "stock": trained_positions(trainer.data_collator, copies, image, lengths),
        "recipe": trained_positions(collator, rows, image, lengths),
    }
    return trainer, in_batches(trainer.data_collator, own_rows, args.batch_size), trained


def counted_sides(args, checkpointing, folder, size, picture=None, spread=0):
    """FLOPs of both sides and of seeing the images, and the case's `shares`; on the CPU, without weights."""
    cpu = SimpleNamespace(**{**vars(args), "device": "cpu", "steps": 1})
    setup = prepare(cpu, checkpointing, folder, size, picture, spread)
    rows, case, found = setup.rows[: args.batch_size], setup.case, {}
    batch_of = {side: batches[0] for side, batches in batches_of_both(args, setup, rows).items()}
    if args.recipe == "dpo_idefics2":
        setup.collator.shares_prompts = True  # as its trainer sets it
        found["mask"] = setup.config, setup.collator(rows)
    with mock.patch.object(transformers.Trainer, "_move_model_to_device"):  # weights without storage cannot be moved
        base = make_model(setup.config, setup.sizes, "meta", torch.float32)
        for side, trainer in case.sides(setup, base, rows).items():
            randomize(trainer)
            measure.without_storage(trainer.model)
            trainer.current_gradient_accumulation_steps = 1  # what `train` does first
            if checkpointing:
                trainer.model.activation_checkpointing_enable()
            with measure.StaticShapes():
                found[side] = case.count(trainer, batch_of[side])
                found["image"] = measure.flops_of_images(trainer, batch_of["stock"], case.sequences)
                if case.shares and side == "stock":
                    found["shares"] = case.shares(trainer, batch_of["stock"])
                if args.questions > 1:
                    found["apart"] = case.count(trainer, batch_of["stock"])  # in the end the recipe's
    return found


@contextlib.contextmanager
def log_probabilities_of(model):
    """Within it, the list fills with what each of the model's calls gives: the answers' log-probabilities (TRL's
    DPO)."""
    outputs = []

    def keep(module, inputs, output):
        if getattr(output, "log_probs", None) is not None:
            outputs.append(output.log_probs.detach().sum(dim=1))

    hook = model.register_forward_hook(keep)
    yield outputs
    hook.remove()


def in_float64(value):
    """A tensor of floating-point numbers in float64; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return value


def difference(sides, batch_of):
    """{side: trainer}, {side: batch} -> loss of both sides; largest relative difference of any trained weight's
    gradient, and, of DPO, of any answer's log-probability under policy and reference. Dropout draws the same on
    both sides. In float64: the rounding errors of float32 are near measure.TOLERANCE. (Norms and the fused head go
    through float32 all the same.)"""
    losses, answers, found = {}, {}, {}
    is_dpo = isinstance(sides["stock"], trl.DPOTrainer)
    for side, trainer in sides.items():
        trainer.model.double()
        batch = tree_map(in_float64, dict(batch_of[side]))
        transformers.set_seed(trainer.args.seed)
        with log_probabilities_of(trainer.model) as outputs:
            losses[side] = measure.step(trainer, batch).item()
        found[side] = {name: gradient.clone() for name, gradient in measure.gradients(trainer).items()}
        trainer.model.zero_grad()
        if is_dpo:
            answers[side] = torch.stack(outputs)  # policy, reference
    for trainer in sides.values():
        trainer.model.float()
    check = {"loss": losses, **measure.apart(found["stock"], found["recipe"])}
    if is_dpo:
        stock, recipe = answers["stock"], answers["recipe"]
        assert stock.shape == (2, len(batch["input_ids"])) and (stock[0] != stock[1]).all()
        check["log_probabilities"] = ((stock - recipe).abs() / stock.abs()).max().item()
    return check


def equal(check):
    """Whether a result of `difference` is within measure.TOLERANCE. NaN is not."""
    stock, recipe = check["loss"]["stock"], check["loss"]["recipe"]
    gaps = [abs(stock - recipe) / abs(stock), check["gradient_max"], check["gradient_norm"]]
    gaps.append(check.get("log_probabilities", 0))
    return all(gap <= measure.TOLERANCE for gap in gaps)


def report_check(check, is_equal, report):
    """The line of a result of `difference`."""
    text = f"  same?    loss {check['loss']['stock']:.7f} and {check['loss']['recipe']:.7f}; "
    if "log_probabilities" in check:
        text += f"log-probabilities differ by at most {check['log_probabilities']:.1e}; "
    text += (
        f"gradients of {check['adapters']} trained matrices differ by at most {check['gradient_max']:.1e} (largest "
    )
    text += f"element), {check['gradient_norm']:.1e} (norm): {'equal' if is_equal else 'NOT EQUAL'}"
    report(text)


def report_mask(config, batch, report):
    """What the mask of shared prompts costs, by arithmetic from a batch of pairs at real size."""
    pairs, text = SimpleNamespace(**batch["pairs"]), config.get_text_config()
    num_pairs, length = pairs.ids.shape
    width = text.num_attention_heads * (text.head_dim or text.hidden_size // text.num_attention_heads)
    per_score = 4 * width * text.num_hidden_layers / num_pairs / 1e12  # of q k and p v, both 2 FLOPs a number

    model = SimpleNamespace(config=copy.deepcopy(config), dtype=torch.bfloat16)
    model.config.get_text_config()._attn_implementation = "flex_attention"
    blocks = dpo_idefics2.shared_start_mask(pairs.part, pairs.position, pairs.real, model)
    size = math.prod(blocks.BLOCK_SIZE)
    counts = {"each with each": num_pairs * length**2, "flex_attention": int(blocks.kv_num_blocks.sum()) * size}
    if blocks.full_kv_num_blocks is not None:
        counts["flex_attention"] += int(blocks.full_kv_num_blocks.sum()) * size
    counts["stock, causal"] = int((batch["attention_mask"].sum(dim=1) ** 2).sum()) / 2
    scores = ", ".join(f"{name} {count * per_score:.3f}" for name, count in counts.items())
    report(f"  mask: {length} x {length} for a pair, {2 * length**2 / 1e6:.2f} MB in 16 bits; TFLOP of attention in a")
    report(f"  forward pass of the language model: {scores}")


def count_real(args, checkpointing, folder, report):
    """FLOPs of the real model for each of its PICTURES; reports them."""
    case, found = CASES[args.recipe], {}
    pictures = PICTURES[args.model] if case.rows is noise_rows else [None]
    for picture in pictures:
        name = f"{picture[0]}x{picture[1]}" if picture else "page"
        found[name] = counted_sides(args, checkpointing, folder, "real", picture)
        note = f"{args.model}, image {name}"
        case.report_counts(found[name], "TFLOP", 1e12, args.batch_size, note, report)
        if args.recipe == "dpo_idefics2":
            report_mask(*found[name].pop("mask"), report)
    return found


def measure_setting(args, checkpointing, folder, report):
    """One setting: the check, then what it costs. Prints as it goes; returns all of it."""
    case = CASES[args.recipe]
    report(f"\nactivation checkpointing {'on' if checkpointing else 'off'}")
    found = {"checkpointing": checkpointing}
    if args.size == "real":
        found["counted"] = count_real(args, checkpointing, folder, report)
        if args.device == "cpu":
            return found

    small = "tiny" if args.size == "tiny" else "scaled"
    exact = {"bf16": False, "fp16": False, **case.flags_of_check}
    if args.attn_implementation:
        exact["attn_implementation"] = "sdpa"  # kernels for GPUs know no float64
    both, batches, alone = measured_sides(args, checkpointing, folder, small, torch.float32, **exact)
    found["check"] = difference(both, {side: batches[side][0] for side in SIDE_NAMES})
    found["equal"] = equal(found["check"])
    report_check(found["check"], found["equal"], report)
    if not found["equal"]:
        return found  # what it costs to compute something else is of no interest

    if args.device == "cuda" or case.flags_of_check:
        both, batches, alone = measured_sides(args, checkpointing, folder, args.size)
    report(" at equal settings")
    counted = {side: case.count(trainer, batches[side][0]) for side, trainer in both.items()}
    counted["image"] = measure.flops_of_images(both["stock"], batches["stock"][0], case.sequences)
    total = {side: counted[side]["all"] for side in SIDE_NAMES}
    found |= measure.costs(both, batches, report, total)
    found["flops_by_part"] = counted
    if case.report_counts is report_parts:
        report_parts(counted, "GFLOP", 1e9, args.batch_size, "", report)
    if case.shares:
        found["shares"] = case.shares(both["stock"], batches["stock"][0])
        if args.size == "scaled":
            found["counted"] = count_real(args, checkpointing, folder, report)
    if args.questions > 1:
        found["pages"] = measure_pages(args, both["recipe"], batches, checkpointing, report)
    if alone:
        found["defaults"] = measure_defaults(args, both, batches["recipe"], alone, report)
    if args.size == "scaled" and checkpointing:
        measure.check_thresholds(found, THRESHOLDS.get(args.thresholds, {}), report)
    return found


def measure_pages(args, recipe, batches, checkpointing, report):
    """What shared pages cost, beside the recipe's own step with a page for each question."""
    report(" the recipe beside itself: here stock is its own step without shared pages")
    found = measure.costs(dict.fromkeys(SIDE_NAMES, recipe), batches, report)
    if args.size == "scaled" and checkpointing:
        measure.check_thresholds(found, THRESHOLDS["shared pages"], report)
    return found


def measure_defaults(args, both, batches, alone, report):
    """What the stock side costs at its own defaults, beside the recipe's; and what either trains."""
    trainer, own_batches, trained = alone
    report(
        " at each one's defaults: stock is SFTTrainer with its own collator; "
        "it trains other positions, so losses differ by design"
    )
    found = measure.costs({**both, "stock": trainer}, {"stock": own_batches, "recipe": batches}, report)
    found["trained_positions"] = trained
    for side, counts in trained.items():
        total = sum(counts.values())
        shares = ", ".join(f"{part} {count / total:.1%}" for part, count in counts.items())
        rows = len(own_batches) * args.batch_size
        report(f"  {side:7s}{total / rows:6.1f} label positions a row: {shares}")
    return found


def parse(argv=None):
    """Flags, checked. Ends the program with one message where they cannot work."""
    parser = measure.benchmark_parser(__doc__)
    recipe_help = "Whose step is measured. Default: sft_llava; with --host all."
    parser.add_argument("--recipe", choices=list(CASES), help=recipe_help)
    parser.add_argument("--arch", choices=list(ARCHITECTURES), help="Of dpo_idefics2: the model. Default: idefics2.")
    parser.add_argument("--adapters", choices=["language", "all"], help="Of dpo_idefics2, as there. Default: all.")
    kernel = "Of dpo_idefics2: its attention; the stock side keeps sdpa. On a GPU also flex_attention."
    parser.add_argument("--attn_implementation", help=kernel)
    parser.add_argument("--steps", type=int, help="Measured steps of each side. Default: 5 or 9, by recipe.")
    rows = "Rows of a step. Default: 1, or of idefics2_docvqa 2, or --questions."
    parser.add_argument("--batch_size", type=int, help=rows)
    questions = "Of idefics2_docvqa: questions about a page, which the recipe shares. Default: 1."
    parser.add_argument("--questions", type=int, default=1, help=questions)
    parser.add_argument("--seed", type=int, default=0, help="Of weights, images and texts.")
    choices = {"choices": ["on", "off", "both"], "default": "on"}
    parser.add_argument("--checkpointing", **choices, help="Activation checkpointing, of both sides.")
    device = {"choices": ["cpu", "cuda"], "default": "cpu"}
    parser.add_argument("--device", **device, help="cuda: 16 bits, after the same check.")
    parser.add_argument("--report_only", action="store_true", help="Exit status 0 although a threshold is missed.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--real_size", action="store_true", help="Count the real model's FLOPs; on a GPU measure it, too."
    )
    size.add_argument("--tiny", action="store_true", help="A model of no meaning, for the tests.")
    size.add_argument("--host", action="store_true", help="Operations, waits and the host's time, at real depth.")
    args = parser.parse_args(argv)
    if args.host:
        return check_host(parser, args)
    args.recipe = args.recipe or "sft_llava"
    case = CASES[args.recipe]
    if args.recipe != "dpo_idefics2" and (args.arch or args.adapters or args.attn_implementation):
        parser.error("--arch, --adapters and --attn_implementation are for --recipe dpo_idefics2")
    if args.attn_implementation not in (None, "sdpa", "eager") and args.device == "cpu":
        parser.error(f"--attn_implementation {args.attn_implementation}: on a CPU it has no backward pass")
    args.arch, args.adapters = args.arch or "idefics2", args.adapters or "all"
    args.model = case.model or ARCHITECTURES[args.arch]
    args.steps = case.steps if args.steps is None else args.steps
    if args.recipe != "idefics2_docvqa" and args.questions != 1:
        parser.error("--questions is for --recipe idefics2_docvqa")
    if args.batch_size is None:
        args.batch_size = max(case.batch_size, args.questions)
    args.size = "tiny" if args.tiny else "real" if args.real_size else "scaled"
    args.thresholds = args.recipe
    if args.recipe == "dpo_idefics2":
        args.thresholds += f" {args.arch} {args.adapters}"
    if min(args.steps, args.batch_size, args.questions) < 1:
        parser.error("--steps, --batch_size and --questions: at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU found")
    if not 0 <= args.seed < 2**32:
        parser.error("--seed: from 0 to below 2**32")
    measure.check_json(parser, args.json)
    return args


def check_host(parser, args):
    """The flags of --host, checked."""
    used = {"host", "recipe", "steps", "json"}
    others = [name for name in vars(args) if name not in used and getattr(args, name) != parser.get_default(name)]
    if others:
        parser.error(f"--host takes --recipe, --steps and --json, not --{others[0]}")
    args.steps = 5 if args.steps is None else args.steps
    if args.steps < 1:
        parser.error("--steps and --batch_size: at least 1")
    measure.check_json(parser, args.json)
    return args


def report_host(args, report):
    """What --host prints and writes."""
    import host  # here: it wants more than the other measurements do

    recipes = [args.recipe] if args.recipe else list(CASES)
    report(f"host: CPU, one thread, bfloat16, process time, median of {args.steps}; torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as folder:
        figures = host.report_operations(recipes, args.steps, Path(folder), report)
        waits = host.report_waits(recipes, Path(folder), report)
    measure.write_json(args, operations=figures, waits=waits)


def report_head(args, device, report):
    """What is measured, where and with what."""
    versions = [f"{library.__name__} {library.__version__}" for library in (torch, transformers, trl)]
    report(f"{device}; {', '.join(versions)}")
    what = f"{args.recipe}, {args.model}"
    if args.recipe == "dpo_idefics2":
        what += f", adapters: {args.adapters}"
    report(f"{what}, {args.batch_size} row(s) a step; against {CASES[args.recipe].stock}")
    if args.tiny:
        report(measure.SMALL)


def report_all(args, found, report):
    """What follows from all settings together."""
    if len(found) == 2 and "seconds" in found[0]:
        report("\nwithout checkpointing, as a share of what it takes with it:")
        for side in SIDE_NAMES:
            shares = []
            for name, what in (("time", "seconds"), ("FLOPs", "flops"), ("memory", "peak_bytes")):
                shares.append(f"{name} {found[1][what][side] / found[0][what][side]:.2f}")
            report(f"  {side:7s}{', '.join(shares)}")
    shares = {"as measured": found[0].get("shares")}
    for name, counted in found[0].get("counted", {}).items():
        shares[f"{args.model}, {name}"] = counted.get("shares")
    for name, parts in shares.items():
        if parts:
            text = ", ".join(f"{part} {share:.2f}" for part, share in parts.items())
            report(f"\nforward FLOPs, {name}: {text}")


def main(argv=None):
    """Flags -> exit status: 1 where the two sides are not equal, or a threshold is missed."""
    args = parse(argv)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, one thread, float32, process time"
    torch.set_num_threads(1)
    report = functools.partial(print, flush=True)
    if args.host:
        report_host(args, report)
        return 0
    report_head(args, device, report)
    with tempfile.TemporaryDirectory() as folder, measure.label_positions_only():
        found = [measure_setting(args, on, folder, report) for on in measure.on_or_off(args.checkpointing)]
    measure.write_json(args, device=device, settings=found)
    if not all(setting.get("equal", True) for setting in found):
        report("\nerror: the recipe's loss, log-probabilities or gradients are not the stock trainer's")
        return 1
    report_all(args, found, report)
    parts = [part for setting in found for part in (setting, setting.get("pages", {}))]
    missed = [what for part in parts for what, holds in part.get("held", {}).items() if not holds]
    if missed and not args.report_only:
        report(f"\nerror: {' and '.join(missed)} below what this benchmark asks for")
        return 1
    return 0


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # in the tables
    datasets.disable_progress_bars()
    measure.start(main)
