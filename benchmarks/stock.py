"""What TRL's own trainer makes of the same base model, data, adapter, steps and learning rate, beside a run of ours.

    make demo RECIPE=sft_llava                              # the run to compare with: build/sft_llava-0
    python benchmarks/stock.py build/sft_llava-0            # up to three trainings, each as long as the demo's

RUN is a finished demo. Its settings.yaml says how it was trained, and after.jsonl which questions it was asked. TRL's
trainer gets the model and the adapter that the recipe makes (but none on lm_head, which it refuses), and the recipe's
rows as messages; its own are the processor's chat template, the collator, and with it the labels. The same questions
are then asked of all, greedily.

Printed are a row as each trains on it («» around what has a label), the share of answers that equal the reference and
of those whose first word is right, and two answers of each. The models are tiny: what such a run has learned, not what
a 7B would.
"""

import copy
import gc
import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import transformers
from rich.console import Console
from rich.table import Table
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import preferences, report  # noqa: E402
from tools import generate  # noqa: E402
from tools.program import fail, flag_parser, start  # noqa: E402
from tools.runs import load_recipe  # noqa: E402

# What the recipe's run and TRL's have in common, of TrainingArguments.
SHARED = """max_steps num_train_epochs learning_rate lr_scheduler_type warmup_steps per_device_train_batch_size
gradient_accumulation_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed data_seed bf16
fp16 use_cpu activation_checkpointing loss_type beta""".split()


def variants(recipe_name):
    """{name: (form of the rows, TRL's settings)}: the ways in which TRL's own trainer can be used for this task."""
    if recipe_name == "dpo_idefics2":
        return {"DPOTrainer": ("preference", {})}
    return {
        "SFTTrainer": ("messages", {}),
        "SFTTrainer, assistant_only_loss": ("messages", {"assistant_only_loss": True}),
        "SFTTrainer, prompt and completion": ("completion", {}),
    }


def turn(message):
    """A message of the recipe -> one of TRL: its images are placeholders."""
    content = []
    for part in message["content"]:
        content.append({"type": part["type"], "text": part.get("text")})
    return {"role": message["role"], "content": content}


def trl_row(recipe, collator, row, form):
    """A row of the recipe's data -> one of TRL's, with the same images and texts."""
    messages = collator.messages_of(row)
    images = recipe.pil_images(messages)
    turns = [turn(message) for message in messages]
    if form == "messages":
        return {"messages": turns, "images": images}
    if form == "completion":
        return {"prompt": turns[:-1], "completion": turns[-1:], "images": images}
    rejected = {"role": "assistant", "content": [{"type": "text", "text": row["rejected"].strip()}]}
    return {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [rejected], "images": images}


def trl_rows(recipe, collator, rows, form):
    """All of them, as a Dataset."""
    return datasets.Dataset.from_list([trl_row(recipe, collator, row, form) for row in rows])


def train(recipe, settings, training, rows, form, options, out):
    """Train by TRL's trainer into the folder `out`. Returns a row as it is trained on. Raises ValueError where TRL
    refuses the model or the data."""
    trainer_class, config_class = (DPOTrainer, DPOConfig) if form == "preference" else (SFTTrainer, SFTConfig)
    known = {field.name for field in fields(config_class)}
    shared = {name: getattr(training, name) for name in SHARED if name in known and hasattr(training, name)}
    quiet = {"report_to": "none", "save_strategy": "no", "logging_steps": 50}
    config = config_class(output_dir=str(out), **quiet, **shared, **options)
    transformers.set_seed(training.seed)
    processor = transformers.AutoProcessor.from_pretrained(settings.model_name_or_path)
    adapter = recipe.lora_config(settings)
    if adapter.target_modules != "all-linear":  # which leaves lm_head out by itself
        adapter.target_modules = f"(?!lm_head$)(?:{adapter.target_modules})"  # SFTTrainer refuses adapters on lm_head
    trainer = trainer_class(
        model=recipe.load_model(settings, training),
        args=config,
        train_dataset=rows,
        processing_class=processor,
        peft_config=adapter,
    )
    first = trainer.data_collator([copy.deepcopy(rows[0])])
    trainer.train()
    trainer.save_model()
    processor.save_pretrained(out)
    return labelled(recipe, first, processor, form)


def labelled(recipe, batch, processor, form):
    """The first row of a batch as text, with «» around what has a label, and how many labels there are."""
    if form == "preference":
        mask = batch["completion_mask"].bool()
        batch = {**batch, "labels": batch["input_ids"].masked_fill(~mask, -100)}
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    of_images = int(((labels != -100) & (ids == processor.image_token_id)).sum())
    count = f"{int((labels != -100).sum())} labels, {of_images} of them on image tokens"
    return f"{recipe.mark_trained_tokens(batch, processor)}\n({count})"


def ask(run, out):
    """The questions of run/after.jsonl, asked of what was trained into `out` -> the lines of its predictions."""
    flags = json.loads((run / "after.jsonl.flags").read_text())
    shutil.copy(run / "settings.yaml", out / "settings.yaml")
    argv = [str(out), "--batch_size", str(flags["batch_size"]), "--max_new_tokens", str(flags["max_new_tokens"])]
    generate.main([*argv, *flags["flags"], "--output", str(out / "after.jsonl"), "--overwrite"])
    return report.lines(out / "after.jsonl")


def is_right(line, recipe_name):
    """Whether an answer is the reference; of preferences, whether it states the same fact, in any wording."""
    prediction, reference = line["prediction"].strip(), references(line)[0]
    if recipe_name == "dpo_idefics2":
        return preferences.judge(line["question"].strip(), reference, prediction)[0]
    return prediction in references(line)


def references(line):
    """The answers that are accepted."""
    wanted = line["reference"]
    return [text.strip() for text in (wanted if isinstance(wanted, list) else [wanted])]


def first_word_is_right(line):
    """Whether the answer begins with a reference's first word."""
    return line["prediction"].split()[:1] in [text.split()[:1] for text in references(line)]


def print_report(answers, rows_seen, recipe_name):
    """answers: {who: lines of predictions, or why there are none}. rows_seen: {who: a row as it is trained on}."""
    console = Console(width=10_000, markup=False, highlight=False)
    for who, text in rows_seen.items():
        console.print(f"\n{who} trains on:\n{text}")
    asked = next(lines for lines in answers.values() if isinstance(lines, list))
    table = Table(title=f"\n{len(asked)} held-out questions", box=None, pad_edge=False)
    shown = [f"{line['question']} ({references(line)[0]})" for line in asked[:2]]
    for column in ["trained by", "right", "first word", *shown]:
        table.add_column(column)
    for who, lines in answers.items():
        if isinstance(lines, str):
            table.add_row(who, "refused")
            continue
        right = sum(is_right(line, recipe_name) for line in lines) / len(lines)
        first = sum(map(first_word_is_right, lines)) / len(lines)
        table.add_row(who, f"{right:.3f}", f"{first:.3f}", *(lines[n]["prediction"] for n in (0, 1)))
    console.print(table)
    for who, lines in answers.items():
        if isinstance(lines, str):
            console.print(f"\n{who} refused: {lines}")


def main(argv=None):
    """Train each variant, ask, print."""
    parser = flag_parser(__doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished demo, such as build/sft_llava-0")
    args = parser.parse_args(argv)
    if not (args.run / "after.jsonl.flags").exists():
        fail(f"{args.run} holds no after.jsonl with its flags: make demo first")
    recipe = load_recipe(None, args.run)
    name = Path(recipe.__file__).stem
    settings, training = recipe.parse(["--config", str(args.run / "settings.yaml")])
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    rows = recipe.load_data(settings, training, collator)[0]
    form = "preference" if name == "dpo_idefics2" else "messages"
    rows_seen = {f"{name}.py": labelled(recipe, collator([rows[0]]), collator.processor, form)}
    answers = {}
    for who, (form, options) in variants(name).items():
        out = args.run.parent / f"{args.run.name}-stock-{len(answers)}"
        shutil.rmtree(out, ignore_errors=True)
        try:
            given = copy.deepcopy(settings)
            rows_seen[who] = train(recipe, given, training, trl_rows(recipe, collator, rows, form), form, options, out)
            answers[who] = ask(args.run, out)
        except ValueError as error:
            answers[who] = " ".join(str(error).split())
        gc.collect()
    answers[f"{name}.py"] = report.lines(args.run / "after.jsonl")
    print_report(answers, rows_seen, name)


if __name__ == "__main__":
    start(main)
