# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0", "pillow==13.0.0",
#   "bitsandbytes==0.50.2", "pyyaml==6.0.3", "jinja2==3.1.6", "tensorboard==2.21.0", "rapidfuzz==3.14.6",
# ]
# ///
"""Teach Idefics2-8b to answer questions about documents: 4-bit NF4 + LoRA, Trainer, one 16 GB GPU, scored by ANLS as it trains.

    python idefics2_docvqa.py                                            # idefics2-8b on docvqa_1200_examples, in English
    python idefics2_docvqa.py --dataset_name train.jsonl --image_folder pages   # your own: image, question, answers
    python idefics2_docvqa.py --language fr --longest_edge 700           # another language; smaller pages: faster
    accelerate launch --num_processes 4 idefics2_docvqa.py               # several GPUs, DDP
    python idefics2_docvqa.py --config idefics2-docvqa/settings.yaml     # the same again; after a crash it resumes

Trained are the answer and <end_of_utterance>, nothing else; of several accepted answers one is drawn each time. Every setting
is a flag; formats of data, the settings that matter and every logged metric: docs/idefics2_docvqa.md."""

import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_args, get_type_hints

import datasets
import torch
import transformers
import yaml
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageOps
from rapidfuzz.distance import Levenshtein
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    HfArgumentParser,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks


@dataclass
class Settings:
    """What is trained on what: model, data, adapter, quantization."""

    model_name_or_path: str = field(default="HuggingFaceM4/idefics2-8b", metadata={"help": "Idefics2: hub id or folder."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model: pin it for a run to be repeated."})
    dataset_name: str = field(default="nielsr/docvqa_1200_examples", metadata={"help": "Hub id, folder, saved data set, or .json / .jsonl / .parquet file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set that has several."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on. Default: 'test' where there is one, else eval_fraction."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Evaluate on another data set, in any of the same forms."})
    image_folder: str | None = field(default=None, metadata={"help": "Where relative image paths start. Default: the folder of the .json file."})
    image_column: str = field(default="image", metadata={"help": "Column of the page."})
    question_column: str | None = field(default=None, metadata={"help": "Column of the question, a text or one for each language. Default: query, else question."})
    answers_column: str | None = field(default=None, metadata={"help": "Column of the accepted answers, a list or a text. Default: answers, else answer."})
    language: str = field(default="en", metadata={"help": "Which question to take where a row has it in several languages."})
    instruction: str = field(default="Answer briefly.", metadata={"help": "What the user says before the page; at inference say the same."})
    eval_fraction: float = field(default=0.05, metadata={"help": "Share of the pages held out, by seed, where there is no split to evaluate on. 0: none."})
    max_eval_rows: int = field(default=100, metadata={"help": "Answer and score at most so many rows at each evaluation, the same ones each time."})
    on_bad_rows: str = field(default="stop", metadata={"help": "Rows that cannot be trained on: list them and stop, or skip them.", "choices": ["stop", "skip"]})
    on_long_rows: str = field(default="drop", metadata={"help": "Rows longer than max_length: drop and count them, or stop.", "choices": ["drop", "stop"]})
    max_length: int = field(default=1024, metadata={"help": "Longest row in tokens, the page's 64 (split: 320) included. Never cut."})
    image_splitting: bool = field(default=False, metadata={"help": "Show each page also as four quarters, for small print: 5 times the image tokens and tower time."})
    longest_edge: int | None = field(default=None, metadata={"help": "Pages are shrunk to this many pixels. Default: the processor's own, 980. Smaller: faster, blurrier."})
    load_in_4bit: bool = field(default=True, metadata={"help": "Language model and connector in 4-bit NF4. false: 16 bits, about 11 GB more."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=8, metadata={"help": "The adapter is scaled by alpha / r."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout before the adapter."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA: weight-decomposed LoRA; slower, at low ranks sometimes better."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest answer at an evaluation, in tokens."})
    sample_rows: int = field(default=8, metadata={"help": "Show so many of the scored rows in samples.md. 0: none."})


@dataclass
class Training(TrainingArguments):
    """TrainingArguments with this recipe's defaults; docs/idefics2_docvqa.md says why where they differ from the 2024 post."""

    output_dir: str = field(default="idefics2-docvqa", metadata={"help": "Adapter, processor, settings.yaml, samples.md, logs, checkpoints."})
    resume_from_checkpoint: str = field(default="auto", metadata={"help": "auto: go on from the newest whole checkpoint in output_dir. false: refuse a used output_dir. Or a checkpoint."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the data; max_steps bounds them."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Raise it first where memory is left."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Pages answered at once."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Effective batch = this x per-device batch x GPUs."})
    learning_rate: float = field(default=1e-4, metadata={"help": "1e-4 suits LoRA on short answers."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or below 1 a share of the run."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's, on what is trained."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: steps, epoch, no."})
    eval_steps: float = field(default=25, metadata={"help": "Steps between evaluations."})
    save_steps: float = field(default=25, metadata={"help": "Steps between checkpoints, eval_steps while the best is kept: what a crash can cost."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept: the newest and the best."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Save the checkpoint with the highest eval_anls, not the last one."})
    metric_for_best_model: str | None = field(default="anls", metadata={"help": "anls, exact_match or loss."})
    logging_steps: float = field(default=5, metadata={"help": "Steps between two lines of the log."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "true hides NaN losses in the log."})
    report_to: str = field(default="tensorboard", metadata={"help": "tensorboard, wandb, trackio, ..., none."})
    dataloader_num_workers: int = field(default=4, metadata={"help": "Processes that decode pages while the GPU works."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Stays false: the row number is one of those columns."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Stays true: answers are generated, not read off the logits."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Every row has a page, so every adapter is used."})
    activation_checkpointing: bool = field(default=True, metadata={"help": "Recompute activations in the backward pass: far less memory, slower."})
    bf16: bool | None = field(default=None, metadata={"help": "Default: where the GPU has it, else fp16."})

    def __post_init__(self):
        if self.bf16 is None and not self.fp16:
            gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
            self.fp16 = gpu and not self.bf16
        self.load_best_model_at_end &= self.eval_strategy != "no"  # nothing tells which would be the best
        super().__post_init__()


# Inherited, but this recipe would ignore them, they would break a promise, or have a new name (gradient_... is
# activation_checkpointing); and those that may change when a run is taken up again without making it another run.
REFUSED = """label_smoothing_factor label_names prediction_loss_only use_liger_kernel
save_only_model remove_unused_columns gradient_checkpointing gradient_checkpointing_kwargs deepspeed fsdp do_train do_eval
do_predict dataloader_drop_last""".split()
FREE_TO_CHANGE = """output_dir resume_from_checkpoint report_to run_name disable_tqdm log_level dataloader_num_workers
push_to_hub hub_model_id hub_strategy hub_private_repo max_eval_rows sample_rows max_new_tokens logging_steps
save_total_limit per_device_eval_batch_size""".split()


def fail(message):
    """End the program with one message, of the first process where there are several, and exit status 1."""
    sys.exit(f"error: {message}" if os.environ.get("RANK", "0") == "0" else 1)


def parse(argv=None):
    """Flags and `--config run.yaml` -> (Settings, Training), on any machine. Raises SystemExit with one line."""
    parser = HfArgumentParser([Settings, Training], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--config", help="YAML file of any of these flags.")
    argv, hints = sys.argv[1:] if argv is None else list(argv), get_type_hints(Settings) | get_type_hints(Training)
    if file := parser.parse_known_args(argv)[0].config:  # turned into flags, so that types and choices are checked
        try:
            for name, value in yaml.safe_load(Path(file).read_text()).items():
                if value in (None, []):
                    if value is None and parser.get_default(name) is not None and type(None) not in get_args(hints[name]):
                        raise ValueError(f"{name} must have a value")
                    parser.set_defaults(**{name: value})
                else:
                    value = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
                    argv = [f"--{name}", *map(str, value), *argv]
        except (OSError, AttributeError, ValueError, yaml.YAMLError) as e:
            fail(f"--config {file} must hold lines of 'name: value': {e}")
    try:
        given = {k: v for k, v in vars(parser.parse_args(argv)).items() if k != "config"}
        if refused := [f"--{f.name}" for f in fields(Training) if f.name in REFUSED and given[f.name] != f.default]:
            fail(f"{', '.join(refused)}: not used by this recipe" + ", it is activation_checkpointing now" * ("--gradient_checkpointing" in refused))
        settings, training = parser.parse_dict(given)
    except (OSError, ValueError, TypeError) as e:
        fail(e)
    training.given = {k: v for k, v in given.items() if k != "hub_token"}  # what settings.yaml holds
    return settings, training


def check(settings, training):
    """Stop before anything is loaded where the machine or a combination of flags cannot work. Raises SystemExit."""
    gpus, out = training.n_gpu, Path(training.output_dir)
    steps = [f"--{name}_steps" for name in ("eval", "save", "logging") if getattr(training, f"{name}_strategy") == "steps" and getattr(training, f"{name}_steps") <= 0]
    for wrong, message in (
        (steps, f"{', '.join(steps)}: above 0; --eval_strategy no and --save_strategy no switch them off"),
        (not training.use_cpu and training.device.type == "cpu", "no GPU found (Idefics2-8b needs 16 GB); for tiny models: --use_cpu"),
        (gpus > 1, f"{gpus} GPUs, one process. All: accelerate launch --num_processes {gpus} idefics2_docvqa.py. One: CUDA_VISIBLE_DEVICES=0"),
        (min(settings.sample_rows, training.dataloader_num_workers, training.seed) < 0 or training.seed >= 2**32,
         "--sample_rows, --dataloader_num_workers, --seed: 0 or more, and a seed below 2**32"),
        (not 0 < training.learning_rate < 10 or settings.lora_alpha <= 0, "--learning_rate and --lora_alpha must be above 0"),
        (min(settings.lora_r, settings.max_eval_rows, settings.max_new_tokens, settings.max_length, training.per_device_train_batch_size,
             training.gradient_accumulation_steps, training.per_device_eval_batch_size) < 1,
         "--lora_r, batch sizes, accumulation steps, --max_eval_rows, --max_new_tokens, --max_length: at least 1"),
        (training.max_steps == 0 or not 0 < training.num_train_epochs < math.inf, "--max_steps and --num_train_epochs must be above 0"),
        (any(folder.is_file() for folder in (out, *out.parents)), f"--output_dir {out}: there is a file in its place"),
        (not 0 <= settings.eval_fraction < 1 or not 0 <= settings.lora_dropout < 1, "--eval_fraction, --lora_dropout: from 0 to below 1"),
        (training.load_best_model_at_end and training.eval_strategy == training.save_strategy == "steps" and training.eval_steps != training.save_steps,
         "what is best must have been saved: --save_steps equal to --eval_steps, or else --load_best_model_at_end false"),
        (training.fp16 and training.use_cpu, "--fp16 needs a GPU"),
        (training.load_best_model_at_end and str(training.metric_for_best_model).removeprefix("eval_") not in ("anls", "exact_match", "loss"),
         f"--metric_for_best_model {training.metric_for_best_model}: known are anls, exact_match and loss"),
        (training.load_best_model_at_end and training.greater_is_better == str(training.metric_for_best_model).endswith("loss"),
         f"--greater_is_better {str(training.greater_is_better).lower()} would keep the checkpoint that is worst by {training.metric_for_best_model}"),
    ):
        if wrong:
            fail(message)
    try:  # what would fail only after the weights are loaded
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
        if training.push_to_hub:
            HfApi(token=training.hub_token).whoami()
    except Exception as e:
        fail(f"--report_to or --push_to_hub: {e}")


def load_processor(settings):
    """The model's processor, set to this run's image splitting and size. Raises SystemExit for another model."""
    try:
        processor = AutoProcessor.from_pretrained(settings.model_name_or_path, revision=settings.model_revision)
    except (OSError, ValueError, ImportError) as e:  # another kind of model may want packages of its own
        fail(f"--model_name_or_path {settings.model_name_or_path}: {'needed is Idefics2; ' * isinstance(e, ImportError)}{e}")
    kind, template = type(processor).__name__, getattr(processor, "chat_template", None)
    if kind != "Idefics2Processor" or "<end_of_utterance>" not in (template or ""):
        fail(f"{settings.model_name_or_path} has a {kind} {'with' if template else 'without'} a chat template; needed is an Idefics2Processor "
             "whose template ends each turn with <end_of_utterance>, such as idefics2-8b's")
    processor.image_processor.do_image_splitting = settings.image_splitting
    size = dict(processor.image_processor.size)
    if settings.longest_edge is not None:
        if not size["shortest_edge"] <= settings.longest_edge <= size["longest_edge"]:
            fail(f"--longest_edge {settings.longest_edge}: this model's pages have from {size['shortest_edge']} (smaller ones are enlarged) "
                 f"to {size['longest_edge']} pixels")
        processor.image_processor.size = {**size, "longest_edge": settings.longest_edge}
    if processor.tokenizer.pad_token is None:  # any will do: padding is masked by attention, never by its id
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


class BadRow(ValueError):
    """A row that cannot be trained on. The text is 'what: details and remedy'; rows are counted by what."""


def text_of(message):
    """The question of a user's turn, without the instruction; the answer of an assistant's."""
    return message["content"][-1]["text"]


def page_of(row, folder):
    """The page of a row as it has it: a path (from its own `folder` or this one), {"bytes"}, a PIL image; None where there is none."""
    cell = row.get("image")
    cell = cell[0] if isinstance(cell, list) and len(cell) == 1 else cell
    cell = {"bytes": cell} if isinstance(cell, bytes) else cell
    cell = cell.get("path") if isinstance(cell, dict) and not cell.get("bytes") else cell
    return os.path.join(row.get("folder") or folder, cell) if isinstance(cell, str) else cell


def load_image(cell):
    """A path, {"bytes"} or a PIL image, of any mode -> PIL RGB, upright. Raises BadRow where it is no image, or none to read."""
    if cell is None or isinstance(cell, list):
        raise BadRow(f"{len(cell or ())} pages: needed is one for each question; --image_column names the column")
    where = (cell.get("path") or "its bytes") if isinstance(cell, dict) else cell
    try:
        if isinstance(cell, str) and os.path.exists(cell) and not os.path.isfile(cell):
            raise ValueError("it is no file")  # a pipe would be waited for
        image = cell if isinstance(cell, Image.Image) else Image.open(io.BytesIO(cell["bytes"]) if isinstance(cell, dict) else cell)
        if (pages := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":  # an MPO, from a telephone, has its preview behind
            raise BadRow(f"{pages} pages: {where} holds several, and only the first would be seen; give each its own file")
        image.load()  # verify() passes a truncated JPEG
        image = ImageOps.exif_transpose(image)
        if min(image.size) < 2:  # has no quarters for image splitting
            raise BadRow(f"page too small: {where} has {image.size[0]} x {image.size[1]} pixels, there is nothing to read on it; take it out")
        if max(image.size) > 20 * min(image.size):  # each side by itself is brought to at least 378 pixels
            raise BadRow(f"page too narrow: {where} has {image.size[0]} x {image.size[1]} pixels, above 1 : 20 it is stretched beyond reading; crop it")
        if image.mode[0] in "IF":  # 16 and 32 bits: PIL's own conversion clips them to white
            if not 0 < (most := image.getextrema()[1]) < math.inf:
                raise ValueError(f"its brightest value is {most}")
            scale = 255 / most if most > 255 or image.mode == "F" and 0 < most <= 1 else 1
            image = image.convert("F").point(lambda grey: grey * scale + 0).convert("L")
        if image.has_transparency_data:  # on white: dropping alpha turns black ink on nothing into black on black
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except BadRow:
        raise
    except Image.DecompressionBombError as e:
        raise BadRow(f"page too large: {where} ({e}); shrink it") from e
    except Exception as e:  # decoders raise whatever they like, SyntaxError and struct.error among them
        raise BadRow(f"unreadable image: {where} ({getattr(e, 'strerror', None) or e}); mend it, or see --image_folder") from e


def once(pairs):
    """A JSON object -> dict. Raises ValueError where a key stands twice: the last one would win without a word."""
    if len(named := dict(pairs)) < len(pairs):
        raise ValueError(f"a key stands twice in {str(pairs):.200}; once is right")
    return named


def read_rows(name, split, settings):
    """A split of a hub id, folder, saved data set or file (a file is all `train`), with row numbers in `row`; for split None
    `test`, or None where there is none. Raises SystemExit."""
    path = Path(name)
    try:
        if path.suffix.lower() in (".json", ".jsonl"):
            text, lines = path.read_text(encoding="utf-8-sig"), path.suffix.lower() == ".jsonl"
            try:
                rows = json.loads("[" + ",\n".join(x for x in text.split("\n") if x.strip()) + "]" if lines else text, object_pairs_hook=once)
            except json.JSONDecodeError as e:
                raise ValueError(f"{e} (a .json file is one list of rows, a .jsonl file has one row a line)") from None
            if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError("it is empty" if rows == [] else "needed is a list of rows in braces: see the README")
            if half := [n for n, row in enumerate(rows) if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))]:
                raise ValueError(f"half a character (a lone surrogate) is in rows {half[:20]}; mend their encoding")
            cells = {key: datasets.Json() for row in rows for key in row}  # a column may hold values of different types
            data = datasets.Dataset.from_generator(  # dumps: Json() would read the text "7" as the number 7
                lambda rows, keys: ({key: json.dumps(row.get(key), ensure_ascii=False) for key in keys} for row in rows),
                features=datasets.Features(cells), gen_kwargs={"rows": rows, "keys": tuple(cells)})
        elif path.suffix.lower() == ".parquet":
            data = datasets.load_dataset("parquet", data_files=name)
        elif path.is_file():
            raise ValueError("read are .json, .jsonl and .parquet files, folders, saved data sets and hub ids")
        elif (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, settings.dataset_config, revision=settings.dataset_revision)
    except (OSError, ValueError, RecursionError, StopIteration, IndexError, datasets.exceptions.DatasetsError) as e:
        fail(f"cannot read {name}: {'it is empty' if isinstance(e, (StopIteration, IndexError)) else e.__cause__ or e}")
    data = data if isinstance(data, dict) else {"train": data}
    if (split or "test") not in data:
        return None if split is None else fail(f"{name} has no split {split!r}; it has {', '.join(data)}")
    data, columns = data[split or "test"], data[split or "test"].column_names
    wanted = {"image": settings.image_column,
              "question": settings.question_column or ("query" if "query" in columns else "question"),
              "answers": settings.answers_column or ("answers" if "answers" in columns else "answer")}
    missing = {key: f"{column!r} (--{key}_column)" for key, column in wanted.items() if column not in columns}
    if missing.keys() - {"answers"} or missing and settings.answers_column:  # to ask questions, no answers are needed
        fail(f"{name} has no column {' and '.join(missing.values())}; it has {', '.join(columns)}")
    if len(set(wanted.values())) < 3:
        fail(f"one column cannot be two of image, question and answers: {wanted}")
    keep = {key: data.select_columns(column).rename_column(column, key) if column != key else data.select_columns(column)
            for key, column in {"id": "id", **wanted}.items() if column in columns}
    data = datasets.concatenate_datasets(list(keep.values()), axis=1)
    if "Image(" in str(image := data.features["image"]):  # the collator decodes: it can name the row
        cell = datasets.Image(decode=False)
        data = data.cast_column("image", cell if isinstance(image, datasets.Image) else datasets.List(cell))
    folder = os.path.abspath(settings.image_folder or (path if path.is_dir() else path.parent))
    return data.add_column("row", list(range(len(data)))).add_column("folder", [folder] * len(data))


def check_rows(data, name, collator, settings, training):
    """Every row through the collator, in parallel and cached -> those that can be trained on, with their `length`.
    Raises SystemExit with the first 20 bad or too long rows and counts by reason where the policy is to stop."""
    def attempt(row, version):
        try:
            return {"problem": None, "length": collator([row])["input_ids"].shape[1]}
        except BadRow as e:
            return {"problem": str(e).split(": ", 1)[1], "length": 0}

    if len(data) == 0:
        fail(f"{name} is empty: there is nothing to train on")
    own = [] if "Image(" in str(data.features["image"]) else data.select_columns(["image", "folder"])
    files = {cell for cell in (page_of(row, "") for row in own) if isinstance(cell, str)}
    version = sorted((f, os.stat(f).st_mtime_ns) for f in files if os.path.exists(f))  # map's cache key: a changed file is read again
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process would wait forever for OpenMP's threads, which only its parent has
    with training.main_process_first(desc=f"checking {name}"):
        found = data.map(
            attempt, fn_kwargs={"version": version}, remove_columns=data.column_names, desc=f"Checking {name}",
            features=datasets.Features(problem=datasets.Value("string"), length=datasets.Value("int64")),
            num_proc=os.cpu_count() if len(data) > 1000 else None)
    torch.set_num_threads(threads)
    problems = found["problem"]
    bad = sorted((n for n, problem in enumerate(problems) if problem), key=lambda n: problems[n].startswith("too long"))
    counts = Counter(problems[n].split(":")[0] for n in bad)
    report = [f"{len(bad)} of {len(data)} rows of {name} cannot be trained on: {dict(counts)}"]
    for row, n in zip(data.select(bad[:20]), bad):
        report.append(f"  row {row['row']}" + (f" (id {row['id']})" if row.get("id") not in (None, "") else "") + f": {problems[n]}")
    report += [f"  ... and {len(bad) - 20} more"] * (len(bad) > 20)
    stop = settings.on_bad_rows == "stop" and len(bad) > counts["too long"]
    if stop or settings.on_long_rows == "stop" and counts["too long"] or len(bad) == len(data):
        report += ["Mend them (rows count from 0), or train without them: --on_bad_rows skip"] * (len(bad) > counts["too long"])
        report += ["Raise --max_length, or train without the long ones: --on_long_rows drop"] * (counts["too long"] > 0)
        fail("\n".join([*report, "No row would be left."] if len(bad) == len(data) else report))
    if bad:
        PartialState().print("left out:", "\n".join(report))
    good = [n for n, problem in enumerate(problems) if not problem]
    return datasets.concatenate_datasets([data, found.select_columns("length")], axis=1).select(good)


def load_data(settings, training):
    """-> (train, eval): Datasets of rows that the Collator accepts, with their number in `row`; eval may be None."""
    collator = Collator(load_processor(settings), settings, training)
    train = read_rows(settings.dataset_name, settings.dataset_train_split, settings)
    split, held_out = settings.dataset_test_split or (settings.dataset_train_split if settings.eval_dataset_name else None), None
    if training.eval_strategy != "no" and (split or settings.dataset_train_split != "test"):
        held_out = read_rows(settings.eval_dataset_name or settings.dataset_name, split, settings)
    if held_out is not None:  # bounded before it is checked: no need to decode what is never scored
        held_out = held_out.shuffle(training.seed).select(range(min(len(held_out), settings.max_eval_rows))).flatten_indices()
        held_out = check_rows(held_out, "the evaluation data", collator, settings, training)
    train = check_rows(train, settings.dataset_name, collator, settings, training)
    if held_out is None and settings.eval_fraction > 0 and training.eval_strategy != "no":
        pages = [os.path.realpath(page) if isinstance(page, str) else hashlib.sha256(page["bytes"]).hexdigest()
                 for page in (page_of(row, "") for row in train.select_columns(["image", "folder"]))]
        every = sorted(set(pages))  # of pages, not of rows: other questions about a page are no test
        random.Random(training.seed).shuffle(every)
        apart = set(every[: max(1, round(settings.eval_fraction * len(every)))])
        if len(apart) == len(every):
            fail(f"{len(every)} pages cannot be divided into training and evaluation: --eval_fraction 0 (none), or give --eval_dataset_name")
        train, held_out = (train.select([n for n, page in enumerate(pages) if (page in apart) == held]) for held in (False, True))
        held_out = held_out.shuffle(training.seed).select(range(min(len(held_out), settings.max_eval_rows)))
    return train, held_out


class Collator:
    """Rows -> input_ids, attention_mask, labels (B, L), pixel_values (B, n, 3, H, W) and pixel_attention_mask (B, n, H, W), n being
    1 or, with image splitting, 5.

    Labels are -100 but on the answer and its <end_of_utterance>; the newline after that is not trained, since generation has
    stopped by then. Where a row has a `visit`, the answer is drawn from the accepted ones by seed, visit and row number alone,
    so that neither loader workers nor a restart change it; else it is the first. Raises BadRow."""

    def __init__(self, processor, settings, training):
        # no setting that has no say in a batch: all of this is the key under which the check is cached
        self.processor, self.seed, self.folder, self.max_length = processor, training.seed, settings.image_folder or "", settings.max_length
        self.instruction, self.language = settings.instruction, settings.language
        tokenizer = processor.tokenizer
        self.control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.end = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
        self.stop = [self.end, tokenizer.eos_token_id]  # where generation ends

    def ask(self, question, pages):
        """The user's turn, as in the post: instruction, page, question. Raises BadRow where it is not one page."""
        if len(pages) != 1:
            raise BadRow(f"{len(pages)} pages: a question is about one")
        texts = [[{"type": "text", "text": text}] if text else [] for text in (self.instruction, question)]
        return {"role": "user", "content": texts[0] + [{"type": "image", "image": page} for page in pages] + texts[1]}

    def read(self, row):
        """A row -> [the user's turn, with a PIL image inside, and the assistant's, with all `references`, where the row has
        answers]. Raises BadRow."""
        question, answers = row.get("question"), row.get("answers")
        if isinstance(question, dict):
            if not (there := [name for name, text in question.items() if text]) or self.language not in there:
                raise BadRow(f"language: no question in {self.language!r}, there are {there}; see --language")
            question = question[self.language]
        answers = answers if isinstance(answers, list) else [] if answers is None else [answers]
        instruction = [("instruction", self.instruction)] if self.instruction else []
        for what, text in [*instruction, ("question", question), *(("answer", answer) for answer in answers)]:
            if not isinstance(text, str):
                raise BadRow(f"{what} is no text: {text!r}; write it in quotes, as the model shall read or say it")
            if not text.strip():
                raise BadRow(f"empty {what}: {text!r} holds nothing but white space")
            if found := [token for token in self.control if token in text]:
                raise BadRow(f"control token: {found[0]} is typed in the {what} and would become a real one; take it out")
        question, answers = question.strip(), [answer.strip() for answer in answers]
        turns = [self.ask(question, [load_image(page_of(row, self.folder))])]
        said = {"role": "assistant", "content": [{"type": "text", "text": answers[0]}], "references": answers} if answers else None
        return turns + [said] * bool(answers)

    def tokenize(self, conversations, prompt=False):
        """Lists of messages -> the processor's batch, padded on the left; with `prompt`, ready to generate the next answer."""
        return self.processor.apply_chat_template(conversations, add_generation_prompt=prompt, tokenize=True, return_dict=True,
                                                  return_tensors="pt", processor_kwargs={"padding": True, "padding_side": "left"})

    def encode(self, asked, answer):
        """The user's turn and an answer -> token ids, image tokens among them, and labels, both lists of length L. Raises BadRow."""
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        prompt, ids = self.processor(text=[self.processor.apply_chat_template([asked], add_generation_prompt=True),
                                           self.processor.apply_chat_template([asked, said])])["input_ids"]
        if ids[: len(prompt)] != prompt:  # what is trained must continue the very prompt of inference
            raise BadRow(f"prompt changed: by its first characters the answer {answer!r} changes its tokens; begin it otherwise")
        end = ids.index(self.end, len(prompt)) + 1
        return ids, [-100] * len(prompt) + ids[len(prompt) : end] + [-100] * (len(ids) - end)

    def __call__(self, rows):
        pages, ids, labels = [], [], []
        for row in rows:
            try:
                asked, *said = self.read(row)
                if not said:
                    raise BadRow("no accepted answer: the row has none; see --answers_column")
                answers = said[0]["references"]
                every = [self.encode(asked, answer) for answer in answers]  # all, so that the check before training is one of all
                if (longest := max(len(tokens) for tokens, _ in every)) > self.max_length:
                    raise BadRow(f"too long: {longest} tokens, --max_length is {self.max_length}")
            except BadRow as e:
                raise BadRow(f"row {row.get('row', '?')}: {e}") from e
            drawn = 0 if row.get("visit") is None else random.Random(f"{self.seed} {row['visit']} {row['row']}").randrange(len(answers))
            pages.append([part["image"] for part in asked["content"] if part["type"] == "image"])
            ids.append(every[drawn][0])
            labels += every[drawn][1]
        batch = self.processor.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        batch["labels"][batch["attention_mask"].bool()] = torch.tensor(labels)
        batch.update(self.processor.image_processor(pages, return_tensors="pt"))
        return batch


def load_model(settings, training):
    """The base model, frozen: language model and connector in NF4 where asked, the rest in bf16 / fp16 (float32 on a CPU)."""
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        # replaces bitsandbytes' own list, so lm_head is named again; names count from the start of the full path
        llm_int8_skip_modules=["lm_head", "model.vision_model"])
    model = AutoModelForImageTextToText.from_pretrained(
        settings.model_name_or_path, revision=settings.model_revision, dtype=dtype, device_map={"": training.device},
        quantization_config=nf4 if settings.load_in_4bit else None)  # BitsAndBytesConfig(load_in_4bit=False) still quantizes
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # on a CPU the first eval() would repack 4-bit weights for a
            module.support_avx512bf16_for_cpu = False  # kernel without autograd, and adapters would get no gradient
    return model.requires_grad_(False)


def lora_config(settings):
    """The post's LoRA: attention projections of language model and perceiver, and lm_head, by full path."""
    return LoraConfig(
        r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout, use_dora=settings.use_dora,
        init_lora_weights="gaussian", task_type="CAUSAL_LM",
        target_modules=r"model\.(text_model|connector\.perceiver_resampler)\..*\.(q|k|v|o)_proj|lm_head")


def marked(batch, processor):
    """The first row of a batch as text: what is trained on in «», runs of image tokens folded, padding left out."""
    out, shown, end, real = "", "", 0, batch["attention_mask"][0].bool()
    ids, labels = batch["input_ids"][0][real].tolist(), batch["labels"][0][real].tolist()
    kinds = ((token == processor.image_token_id, label != -100) for token, label in zip(ids, labels))
    for (image, trained), run in itertools.groupby(kinds):
        end += (count := len(list(run)))
        text = processor.tokenizer.decode(ids[:end])  # from the start: by itself a run would lose its leading space
        out += f"<image> x {count}" if image else f"«{text[len(shown) :]}»" if trained else text[len(shown) :]
        shown = text
    return out


def anls(prediction, references):
    """Average Normalized Levenshtein Similarity of one answer, 0 to 1, the best over the accepted ones; below 0.5 it counts as 0.
    White space and case do not matter. Source: Biten et al. 2019, arXiv:1905.13648, as scored by the DocVQA challenge."""
    distance = min(Levenshtein.distance(plain(prediction), plain(r)) / max(len(prediction), len(r)) for r in references)
    return 1 - distance if distance <= 0.5 else 0.0


def plain(text):
    """Lower case, single spaces: what answers are compared by."""
    return " ".join(text.lower().split())


class AlikeInAStep(torch.utils.data.Sampler):
    """Numbers of rows in the Trainer's random order, but within a step (`rows` of them: all processes, all accumulated) the longest first, so
    that rows of like length share a batch and little is padded. What is left over of an epoch stays as it is. `epoch` says which one begins."""

    def __init__(self, lengths, rows, seed, epoch):
        self.lengths, self.rows, self.seed, self.epoch = list(lengths), rows, seed, epoch

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.seed + self.epoch())).tolist()
        for n in range(0, len(order), self.rows):
            step = order[n : n + self.rows]
            yield from sorted(step, key=lambda row: -self.lengths[row]) if len(step) == self.rows else step


class Trainer(transformers.Trainer):
    """Trainer that computes logits only where there is a label, runs the frozen vision tower without a graph, and at each
    evaluation answers the held-out questions: eval_anls, eval_exact_match, samples.md."""

    def __init__(self, settings, model, *args, **kwargs):
        tower = model.get_base_model().model.vision_model
        tower.forward = torch.no_grad()(tower.forward)  # checkpointing's hook on its input would back-propagate through it
        self.settings = settings
        super().__init__(model, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        data, args = self.train_dataset if train_dataset is None else train_dataset, self.args
        if args.gradient_accumulation_steps * args.world_size == 1 or args.train_sampling_strategy != "random":
            return super()._get_train_sampler(data)
        rows, seed = args.train_batch_size * args.world_size * args.gradient_accumulation_steps, args.seed if args.data_seed is None else args.data_seed
        # asked for its epoch, not told by set_epoch: where several processes go on from a checkpoint, Accelerate's does not get there
        return AlikeInAStep(data.with_format(None)["length"], rows, seed, epoch=lambda: int(self.state.epoch or 0))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The stock loss. Of some hundred positions a row a dozen are trained; the others' logits would be thrown away."""
        following = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]  # what each position must say next
        inputs = {**inputs, "logits_to_keep": following != -100, "shift_labels": following[following != -100]}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """The stock loop, then answers, greedily, each process its share of the rows. The scores stand beside eval_loss."""
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        rows, collator, size, scored = self.eval_dataset, self.data_collator, self.args.per_device_eval_batch_size, []
        with self.accelerator.split_between_processes(list(range(len(rows)))) as mine:
            for n in range(0, len(mine), size):
                turns = [collator.read(rows[i]) for i in mine[n : n + size]]
                batch = collator.tokenize([messages[:1] for messages in turns], prompt=True).to(self.args.device)
                with torch.no_grad(), self.accelerator.autocast():  # max_length None: the model's own would only warn
                    ids = self.model.generate(**batch, max_new_tokens=self.settings.max_new_tokens, max_length=None, do_sample=False,
                                              use_cache=True, eos_token_id=collator.stop)[:, batch["input_ids"].shape[1] :]
                said = [text.strip() for text in collator.processor.batch_decode(ids, skip_special_tokens=True)]
                scored += [(i, text, anls(text, m[1]["references"]), plain(text) in map(plain, m[1]["references"]))
                           for i, text, m in zip(mine[n : n + size], said, turns)]
        scored = gather_object(scored)
        output.metrics[f"{metric_key_prefix}_anls"] = sum(score for _, _, score, _ in scored) / len(scored)
        output.metrics[f"{metric_key_prefix}_exact_match"] = sum(exact for *_, exact in scored) / len(scored)
        if self.is_world_process_zero() and self.settings.sample_rows:
            self.write_samples(scored[: self.settings.sample_rows], output.metrics[f"{metric_key_prefix}_anls"])
        return output

    def write_samples(self, scored, mean):
        """Append a table of [(index of the row, answer, ANLS, whether exact)] to samples.md, with the pages in samples/."""
        out, cells = Path(self.args.output_dir), []
        (out / "samples").mkdir(parents=True, exist_ok=True)
        for i, said, score, _ in scored:
            row, (asked, right) = self.eval_dataset[i], self.data_collator.read(self.eval_dataset[i])
            page = next(part["image"] for part in asked["content"] if part["type"] == "image")
            ImageOps.contain(page, (336, 336)).save(out / f"samples/{row['row']}.png")
            cells.append([f"![](samples/{row['row']}.png)", text_of(asked), said, " / ".join(right["references"]), f"{score:.2f}"])
        table = "\n".join(f"| {' | '.join(' '.join(cell.replace('|', '&#124;').split()) for cell in line)} |" for line in cells)
        with open(out / "samples.md", "a", encoding="utf-8") as file:
            file.write(f"\n## Step {self.state.global_step}: ANLS {mean:.3f}\n\n| page | question | answered | accepted | ANLS |\n|---|---|---|---|---|\n{table}\n")


class CountVisits(transformers.TrainerCallback):
    """Tells the rows of an epoch, in whichever loader process they are read, which visit to them it is."""

    def __init__(self):
        self.visit = torch.zeros(1, dtype=torch.int64).share_memory_()

    def mark(self, rows):
        """A transform for a Dataset: rows with a column `visit`."""
        return {**rows, "visit": [self.visit.item()] * len(rows["row"])}

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Called before the loader of the epoch starts; after a restart `state.epoch` is where the run was."""
        self.visit.fill_(int(state.epoch or 0))


def is_whole(folder):
    """Whether a checkpoint has all that it takes to go on from it; one that was cut off while it was written has not."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
        state["global_step"] + state["train_batch_size"]  # fails where one is missing
        weights = [safe_open(file, "pt") for file in folder.glob("*.safetensors")]  # fails where the end is missing
        files = [folder / "optimizer.pt", folder / "scheduler.pt", *(list(folder.glob("rng_state*")) or [folder / "rng_state.pth"])]
        return bool(weights) and all(map(zipfile.is_zipfile, files))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False


def checkpoint_to_resume(training):
    """The checkpoint to go on from, None for a new run; exits 0 where this very run is finished. Raises SystemExit."""
    out, wanted = Path(training.output_dir), training.resume_from_checkpoint
    wanted = wanted.lower() if wanted.lower() in ("auto", "false") else wanted
    found = [c for c in out.glob("checkpoint-*") if c.name[11:].isdigit()]
    whole = sorted(filter(is_whole, found), key=lambda c: int(c.name[11:]))
    finished = (out / "trainer_state.json").exists()
    if wanted not in ("auto", "false"):
        if not is_whole(Path(wanted)):
            fail(f"--resume_from_checkpoint {wanted}: no whole checkpoint there; there are {[str(c) for c in whole]}")
        return wanted
    if wanted == "false" and (found or finished):
        fail(f"{out} holds a run, and --resume_from_checkpoint false would overwrite it: choose another --output_dir")
    if whole or finished:
        try:
            old, new = dict(yaml.safe_load((out / "settings.yaml").read_text())), training.given
        except (OSError, TypeError, ValueError, yaml.YAMLError):
            fail(f"{out} holds a run without the settings.yaml that says which (missing or damaged): choose another --output_dir, or go on from it "
                 "all the same with --resume_from_checkpoint CHECKPOINT")
        if changes := [f"{k} {old[k]} -> {new[k]}" for k in new if k in old and old[k] != new[k] and k not in FREE_TO_CHANGE]:
            fail(f"{out} holds a run with other settings ({', '.join(changes)}): choose another --output_dir, or go on from it "
                 "all the same with --resume_from_checkpoint CHECKPOINT")
    if finished:
        PartialState().print(f"{out} holds this run, finished. For another one choose another --output_dir.")
        PartialState().destroy_process_group()  # as at the end of main
        sys.exit(0)
    try:  # now, and not when the weights are loaded
        tempfile.TemporaryFile(dir=next(folder for folder in (out, *out.absolute().parents) if folder.exists())).close()
    except OSError as e:
        fail(f"--output_dir {out} cannot be written: {e}")
    return str(whole[-1]) if whole else None


def main(argv=None):
    """Parse, check, load, say what will happen, train, save."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers fork after the tokenizer was used
    settings, training = parse(argv)
    check(settings, training)
    checkpoint, say = checkpoint_to_resume(training), PartialState().print
    set_seed(training.seed)
    train, held_out = load_data(settings, training)
    if held_out is None:
        training.eval_strategy, training.load_best_model_at_end = "no", False
    processor = load_processor(settings)
    collator = Collator(processor, settings, training)
    say(f"\nOne row as the model sees it, trained on in «»:\n\n{marked(collator([train[0]]), processor)}\n")

    try:
        model = get_peft_model(load_model(settings, training), lora_config(settings))  # adapters in float32, whatever the base is
    except (OSError, ValueError, SafetensorError) as e:
        fail(f"cannot load the weights of {settings.model_name_or_path}: {e}")
    # "auto" would put the whole frozen lm_head into every checkpoint, because an adapter sits on it
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    for part in ("vision_model", "modality_projection", "perceiver_resampler", "text_model", "lm_head"):
        own = [(p, type(p).__name__ == "Params4bit") for name, p in model.named_parameters() if part in name]
        packed, trained = sum(2 * p.numel() for p, nf4 in own if nf4), sum(p.numel() for p, _ in own if p.requires_grad)
        count = packed + sum(p.numel() for p, nf4 in own if not nf4)  # 4-bit: two in a byte
        say(f"{part:22s}{trained:>14,} of {count:>14,} parameters trained, {packed:>14,} in 4-bit")
    visits = CountVisits()
    trainer = Trainer(settings, model, training, collator, train.with_transform(visits.mark), held_out, processor, callbacks=[visits])
    batch = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * math.ceil(len(train) / batch))
    say(f"{len(train)} rows to train on, {len(held_out or ())} to evaluate; {steps} steps of {batch} rows, "
        f"{steps / math.ceil(len(train) / batch):.2f} epochs; {f'going on from {checkpoint}' if checkpoint else 'from the start'}")
    if training.process_index == 0:
        Path(training.output_dir).mkdir(parents=True, exist_ok=True)
        Path(training.output_dir, "settings.part").write_text(f"# {Path(__file__).name}\n" + yaml.safe_dump(training.given, sort_keys=False))
        os.replace(Path(training.output_dir, "settings.part"), Path(training.output_dir, "settings.yaml"))
        Path(training.output_dir, "trainer_state.json").unlink(missing_ok=True)  # an earlier end is not this one's
    try:
        state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json")) if checkpoint else None
        if state and state.global_step >= steps:  # killed when it had only to save the result: train() would take a step more
            trainer.state, best = state, training.load_best_model_at_end and state.best_model_checkpoint
            wanted = Path(training.output_dir, Path(best).name) if best else Path(checkpoint)  # the folder may have another name by now
            if not is_whole(wanted):
                fail(f"{wanted}, the best checkpoint, is missing or damaged: --load_best_model_at_end false saves the last one")
            trainer._load_from_checkpoint(str(wanted))
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
    except BadRow as e:  # out of a loader's process it comes with a traceback before it
        fail(f"the data changed under the run: {str(e).strip().splitlines()[-1].removeprefix(f'{__name__}.BadRow: ')}")
    except KeyboardInterrupt:
        fail(f"interrupted; the same command goes on from the newest checkpoint in {training.output_dir}, where there is one")
    trainer.save_model()  # pushes to the hub, too, where asked
    trainer.save_state()  # last: its presence says that the run is finished
    if training.load_best_model_at_end and trainer.state.best_metric is not None:
        say(f"best of the evaluations by {training.metric_for_best_model}: {trainer.state.best_metric:.4g}, at step {trainer.state.best_global_step}; that is saved")
    trainer.accelerator.wait_for_everyone()  # a process that leaves while another one still writes may take it down
    time.sleep(0.5 * (training.world_size > 1))  # Gloo (CPUs) lets go of that barrier in a thread, which aborts where Python shuts down: PyTorch's issue 190489
    trainer.accelerator.end_training()
    say(f"saved {training.output_dir}: what was trained, processor, settings.yaml, trainer_state.json (the log)")


if __name__ == "__main__":
    main()
