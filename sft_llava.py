# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0", "pillow==13.0.0",
#   "bitsandbytes==0.50.2", "pyyaml==6.0.3", "jinja2==3.1.6", "tensorboard==2.21.0",
# ]
# ///
"""Fine-tune LLaVA-1.5 or LLaVA-NeXT on conversations about images: 4-bit NF4 + LoRA, TRL's SFTTrainer, one 24 GB GPU.

    python sft_llava.py                                                   # llava-1.5-7b on llava-instruct-mix-vsft
    python sft_llava.py --dataset_name train.json --image_folder images   # your own LLaVA JSON
    python sft_llava.py --model_name_or_path llava-hf/llava-v1.6-mistral-7b-hf --max_length 4096
    accelerate launch --num_processes 4 sft_llava.py                      # several GPUs, DDP
    python sft_llava.py --config llava-lora/settings.yaml                 # the same again; after a crash it resumes

Trained are the assistant's words and the EOS that ends each answer, nothing else. Every setting is a flag; formats of
data, the settings that matter and every logged metric: docs/sft_llava.md."""

import functools
import io
import itertools
import json
import math
import os
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
import yaml
from accelerate import PartialState
from huggingface_hub import HfApi
from jinja2 import TemplateError
from peft import LoraConfig
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TrainerState, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig, SFTTrainer, TrlParser


@dataclass
class Settings:
    """What is trained on what: model, data, adapter, quantization."""

    model_name_or_path: str = field(default="llava-hf/llava-1.5-7b-hf", metadata={"help": "LLaVA-1.5 or LLaVA-NeXT: hub id or folder."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model: pin it for a run to be repeated."})
    dataset_name: str = field(default="HuggingFaceH4/llava-instruct-mix-vsft", metadata={"help": "Hub id, folder, saved data set, or .json / .jsonl / .parquet file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set that has several."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on. Default: 'test' where there is one, else eval_fraction."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Evaluate on another data set, in any of the same forms."})
    image_folder: str | None = field(default=None, metadata={"help": "Where relative image paths start. Default: the folder of the .json file."})
    eval_fraction: float = field(default=0.02, metadata={"help": "Share of the rows held out, by seed, where there is no split to evaluate on. 0: none."})
    max_eval_rows: int = field(default=128, metadata={"help": "Score at most so many rows at each evaluation, the same ones each time."})
    on_bad_rows: str = field(default="stop", metadata={"help": "Rows that cannot be trained on: list them and stop, or skip them.", "choices": ["stop", "skip"]})
    on_long_rows: str = field(default="drop", metadata={"help": "Rows longer than max_length: drop and count them, or stop.", "choices": ["drop", "stop"]})
    train_on: str = field(default="answers", metadata={"help": "answers: the assistant's words and EOS. all: every word of the conversation.", "choices": ["answers", "all"]})
    load_in_4bit: bool = field(default=True, metadata={"help": "Language model in 4-bit NF4. false: 16 bits, about 10 GB more for a 7B."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter. 0: no adapter, the whole language model is trained."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA: weight-decomposed LoRA; slower, at low ranks sometimes better."})
    train_projector: bool = field(default=False, metadata={"help": "Train the projector too, in full: for pictures unlike photographs."})
    sample_rows: int = field(default=4, metadata={"help": "Answer so many held-out rows at each evaluation, into samples.md. 0: none."})
    sample_tokens: int = field(default=128, metadata={"help": "Longest answer in samples.md, in tokens."})


@dataclass
class Training(SFTConfig):
    """TRL's SFTConfig with this recipe's defaults; docs/sft_llava.md says why where they differ from the 2024 post."""

    output_dir: str = field(default="llava-lora", metadata={"help": "Adapter, processor, settings.yaml, samples.md, logs, checkpoints."})
    resume_from_checkpoint: str = field(default="auto", metadata={"help": "auto: go on from the newest whole checkpoint in output_dir. false: refuse a used output_dir. Or a checkpoint."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data; max_steps bounds them."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Raise it first where memory is left."})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Effective batch = this x per-device batch x GPUs."})
    learning_rate: float = field(default=2e-4, metadata={"help": "2e-4 suits LoRA; without an adapter (lora_r 0) take 2e-5."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rate over the run."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps, or below 1 a share of the run."})
    optim: str = field(default="paged_adamw_32bit", metadata={"help": "Pages optimizer states out when memory runs short."})
    max_length: int | None = field(default=2048, metadata={"help": "Longest row in tokens, image tokens included (576 an image). Never cut."})
    neftune_noise_alpha: float | None = field(default=None, metadata={"help": "NEFTune noise; 5 in the post. It helps long chatty answers, not short ones."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: steps, epoch, no."})
    eval_steps: float = field(default=100, metadata={"help": "Steps between evaluations."})
    save_steps: float = field(default=100, metadata={"help": "Steps between checkpoints: what a crash can cost."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept: the newest and the best."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Save the checkpoint with the lowest eval_loss, not the last one."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "true hides NaN losses in the log."})
    report_to: str = field(default="tensorboard", metadata={"help": "tensorboard, wandb, trackio, ..., none."})
    dataloader_num_workers: int = field(default=4, metadata={"help": "Processes that decode images while the GPU works."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Stays false: the row number is one of those columns."})
    activation_checkpointing: bool = field(default=True, metadata={"help": "Recompute activations in the backward pass: far less memory, slower."})
    bf16: bool | None = field(default=None, metadata={"help": "Default: where the GPU has it, else fp16."})

    def __post_init__(self):
        if self.bf16 is None and not self.fp16:
            gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
            self.fp16 = gpu and not self.bf16
        self.load_best_model_at_end &= self.eval_strategy != "no"  # nothing tells which would be the best
        self.dataset_kwargs = {"skip_prepare_dataset": True}  # the collator does it, for text-only data sets too
        super().__post_init__()


# Inherited, but the collator or loader would ignore them, they would break a promise, or have a new name (gradient_... is
# activation_checkpointing); and those that may change when a run is taken up again without making it another run.
REFUSED = """packing padding_free eval_packing assistant_only_loss completion_only_loss dataset_text_field truncation_mode
shuffle_dataset pad_to_multiple_of chat_template_path eos_token pad_token model_init_kwargs trust_remote_code save_only_model
remove_unused_columns gradient_checkpointing gradient_checkpointing_kwargs dataset_kwargs deepspeed fsdp do_train do_eval do_predict
dataloader_drop_last""".split()
FREE_TO_CHANGE = """output_dir resume_from_checkpoint report_to run_name disable_tqdm log_level dataloader_num_workers
dataset_num_proc push_to_hub hub_model_id hub_strategy hub_private_repo max_eval_rows sample_rows sample_tokens logging_steps
save_total_limit per_device_eval_batch_size""".split()


def fail(message):
    """End the program with one message, of the first process where there are several, and exit status 1."""
    sys.exit(f"error: {message}" if os.environ.get("RANK", "0") == "0" else 1)


def parse(argv=None):
    """Flags and `--config run.yaml` -> (Settings, Training), on any machine. Raises SystemExit with one line."""
    parser = TrlParser([Settings, Training], allow_abbrev=False)
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
    gpus, full, out = training.n_gpu, settings.lora_r == 0, Path(training.output_dir)
    steps = [f"--{name}_steps" for name in ("eval", "save", "logging") if getattr(training, f"{name}_strategy") == "steps" and getattr(training, f"{name}_steps") <= 0]
    for wrong, message in (
        (steps, f"{', '.join(steps)}: above 0; --eval_strategy no and --save_strategy no switch them off"),
        (not training.use_cpu and training.device.type == "cpu", "no GPU found (a 7B needs 24 GB); for tiny models: --use_cpu"),
        (gpus > 1, f"{gpus} GPUs, one process. All: accelerate launch --num_processes {gpus} sft_llava.py. One: CUDA_VISIBLE_DEVICES=0"),
        (training.use_liger_kernel and not is_liger_kernel_available(), "--use_liger_kernel wants a package of its own: pip install liger-kernel"),
        (min(settings.lora_r, settings.sample_rows, training.dataloader_num_workers, training.seed) < 0 or training.seed >= 2**32,
         "--lora_r, --sample_rows, --dataloader_num_workers, --seed: 0 or more, and a seed below 2**32"),
        (not 0 < training.learning_rate < 10, "--learning_rate must be above 0 and below 10"),
        (min(settings.max_eval_rows, settings.sample_tokens, training.per_device_train_batch_size, training.gradient_accumulation_steps,
             training.per_device_eval_batch_size) < 1, "batch sizes, accumulation steps, --max_eval_rows, --sample_tokens: at least 1"),
        (training.max_steps == 0 or not 0 < training.num_train_epochs < math.inf, "--max_steps and --num_train_epochs must be above 0"),
        (any(folder.is_file() for folder in (out, *out.parents)), f"--output_dir {out}: there is a file in its place"),
        (not 0 <= settings.eval_fraction < 1 or not 0 <= settings.lora_dropout < 1, "--eval_fraction, --lora_dropout: from 0 to below 1"),
        (training.load_best_model_at_end and training.eval_strategy == training.save_strategy == "steps" and training.eval_steps != training.save_steps,
         "what is best must have been saved: --save_steps equal to --eval_steps, or else --load_best_model_at_end false"),
        (training.fp16 and training.use_cpu, "--fp16 needs a GPU"),
        (training.load_best_model_at_end and training.metric_for_best_model not in ("loss", "eval_loss"),
         f"--metric_for_best_model {training.metric_for_best_model}: there is no other than loss"),
        (training.load_best_model_at_end and training.greater_is_better, "--greater_is_better true would keep the checkpoint with the highest loss"),
        (full and settings.load_in_4bit, "--lora_r 0 trains the language model, but 4-bit weights cannot be: --load_in_4bit false"),
        (full and settings.use_dora, "--use_dora is a kind of adapter and --lora_r 0 means none: give --lora_r 16 or drop --use_dora"),
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


# Put before a chat template that ends no answer with EOS (LLaVA-1.5's ends none: trained so, a model never learns to
# stop). It becomes part of the saved processor, so that a second turn at inference sees what training saw.
ADD_EOS = """{%- set eos = namespace(messages=[]) -%}{%- for m in messages -%}{%- set parts = [{'type': 'text', 'text':
m.content}] if m.content is string else m.content -%}{%- if m.role == 'assistant' -%}{%- set parts = parts[:-1] + [{'type':
'text', 'text': parts[-1].text + eos_token}] -%}{%- endif -%}{%- set eos.messages = eos.messages + [{'role': m.role,
'content': parts}] -%}{%- endfor -%}{%- set messages = eos.messages -%}"""


def load_processor(settings):
    """The model's processor, with a chat template that ends every answer with EOS. Raises SystemExit for another model."""
    try:
        processor = AutoProcessor.from_pretrained(settings.model_name_or_path, revision=settings.model_revision)
    except (OSError, ValueError, ImportError) as e:  # another kind of model may want packages of its own
        fail(f"--model_name_or_path {settings.model_name_or_path}: {'needed is LLaVA-1.5 or LLaVA-NeXT; ' * isinstance(e, ImportError)}{e}")
    kind, template = type(processor).__name__, getattr(processor, "chat_template", None)
    if kind not in ("LlavaProcessor", "LlavaNextProcessor") or not template:
        fail(f"{settings.model_name_or_path} has a {kind} {'with' if template else 'without'} a chat template; needed is LLaVA-1.5's "
             "or LLaVA-NeXT's processor, with one")
    turns = [{"role": role, "content": [{"type": "text", "text": "x"}]} for role in ("user", "assistant")]
    prompt = processor.apply_chat_template(turns[:1], add_generation_prompt=True)
    if processor.tokenizer.eos_token not in processor.apply_chat_template(turns).removeprefix(prompt):
        processor.chat_template = ADD_EOS + processor.chat_template
    if processor.tokenizer.pad_token is None:  # any will do: padding is masked by attention, never by its id
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


class BadRow(ValueError):
    """A row that cannot be trained on. The text is 'what: details and remedy'; rows are counted by what."""


def normalize(row):
    """A row of either format -> messages, their content lists of {"type", "text" | "index" of the image}. Raises BadRow."""
    llava, messages, count = row.get("conversations") is not None, [], itertools.count()
    if llava == (row.get("messages") is not None):
        raise BadRow(f"missing column: needed are messages + images, or else conversations + image; there are {', '.join(k for k, v in row.items() if v is not None and k not in ('row', 'folder'))}")
    try:
        for turn in row["conversations" if llava else "messages"]:
            name, content = (turn["from"], turn["value"]) if llava else (turn["role"], turn["content"])
            if (role := {"human": "user", "gpt": "assistant"}.get(name, name)) not in ("user", "assistant", "system"):
                raise BadRow(f"unknown role: {name!r}; known are human or user, gpt or assistant, system")
            if isinstance(content, str):  # LLaVA JSON marks images inside the user's text
                pieces = re.split("(<image>)", content) if llava and role == "user" else [content]
                pieces = [p.strip() for p in pieces if p.strip()] if len(pieces) > 1 else pieces
                content = [{"type": "image"} if p == "<image>" else {"type": "text", "text": p} for p in pieces]
            content = [{"type": "image", "index": next(count) if part.get("index") is None else part["index"] + 0}
                       if part["type"] == "image" else {"type": {"text": "text"}[part["type"]], "text": str(part["text"].encode(), "utf-8")}
                       for part in content]
            messages.append({"role": role, "content": content})
            if role != "user" and any(part["type"] == "image" for part in content):
                raise BadRow(f"image in a turn of the {role}: images belong to the user's turns")
            if role == "assistant" and not text_of(messages[-1]).strip():
                raise BadRow("empty answer: a turn of the assistant says nothing")
    except (KeyError, TypeError, AttributeError, UnicodeError) as e:
        raise BadRow(f"malformed row: {type(e).__name__} {e} (turn {len(messages)}); the README shows both formats") from e
    return messages


def text_of(message):
    """The words of a message, without its images."""
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


def image_cells(row, folder):
    """The images of a row as it has them: paths (from its own `folder` or this one), {"bytes"} or PIL images; a list."""
    cells = row.get("images") or row.get("image") or []
    cells = [{"bytes": c} if isinstance(c, bytes) else c for c in (cells if isinstance(cells, list) else [cells])]
    cells = [c.get("path") if isinstance(c, dict) and not c.get("bytes") else c for c in cells]
    return [os.path.join(row.get("folder") or folder, c) if isinstance(c, str) else c for c in cells]


def load_image(cell):
    """A path, {"bytes"} or a PIL image, of any mode -> PIL RGB, upright. Raises BadRow where it is no image."""
    try:
        image = cell if isinstance(cell, Image.Image) else Image.open(io.BytesIO(cell["bytes"]) if isinstance(cell, dict) else cell)
        if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":  # an MPO, from a telephone, has its preview behind
            raise ValueError(f"it holds {frames} pictures, and only the first would be seen")
        image.load()  # verify() passes a truncated JPEG
        image = ImageOps.exif_transpose(image)
        if max(image.size) > 200 * min(image.size):  # a processor scales the short side to its size first
            raise ValueError(f"{image.size[0]} x {image.size[1]} is too narrow")
        if image.mode[0] in "IF":  # 16 and 32 bits: PIL's own conversion clips them to white
            most = image.getextrema()[1]
            scale = 255 / most if most > 255 or image.mode == "F" and 0 < most <= 1 else 1
            image = image.convert("F").point(lambda grey: grey * scale + 0).convert("L")
        if image.has_transparency_data:  # on white: dropping alpha turns black ink on nothing into black on black
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as e:  # decoders raise whatever they like, SyntaxError and struct.error among them
        where = (cell.get("path") or "its bytes") if isinstance(cell, dict) else cell
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
    data, cell = data[split or "test"], datasets.Image(decode=False)  # the collator decodes: it can name the row
    for column in [c for c in ("image", "images") if "Image(" in str(data.features.get(c))]:
        data = data.cast_column(column, cell if isinstance(data.features[column], datasets.Image) else datasets.List(cell))
    data = data.remove_columns(list({"row", "length", "folder"} & set(data.column_names)))
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
    own = [c for c in ("image", "images") if c in data.column_names and "Image(" not in str(data.features[c])]
    files = {c for row in (data.select_columns([*own, "folder"]) if own else ()) for c in image_cells(row, "") if isinstance(c, str)}
    version = sorted((f, os.stat(f).st_mtime_ns) for f in files if os.path.exists(f))  # map's cache key: a changed file is read again
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process would wait forever for OpenMP's threads, which only its parent has
    with training.main_process_first(desc=f"checking {name}"):
        found = data.map(
            attempt, fn_kwargs={"version": version}, remove_columns=data.column_names, desc=f"Checking {name}",
            features=datasets.Features(problem=datasets.Value("string"), length=datasets.Value("int64")),
            num_proc=(training.dataset_num_proc or os.cpu_count()) if len(data) > 1000 else None)
    torch.set_num_threads(threads)
    limit = training.max_length or float("inf")
    problems = [p or f"too long: {n} tokens, --max_length is {limit}" * (n > limit) for p, n in zip(found["problem"], found["length"])]
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
        try:
            train, held_out = train.train_test_split(max(settings.eval_fraction, 1 / len(train)), seed=training.seed).values()
        except ValueError as e:
            fail(f"{len(train)} rows cannot be divided into training and evaluation (--eval_fraction {settings.eval_fraction}): {e}")
        held_out = held_out.select(range(min(len(held_out), settings.max_eval_rows)))
    return train, held_out


class Collator:
    """Rows of either format -> input_ids, attention_mask, labels (B, L), pixel_values (and image_sizes for LLaVA-NeXT).

    Labels are -100 but on the answers and the EOS that ends each (`train_on` all: but on text). An answer begins where the
    prompt of inference ends; a row that does not begin with the very tokens of that prompt is refused. Raises BadRow."""

    def __init__(self, processor, settings, training):
        self.processor, self.train_on, self.folder = processor, settings.train_on, settings.image_folder or ""
        tokens = processor.tokenizer.added_tokens_decoder.values()
        self.control = {token.content for token in tokens if token.special} | {processor.image_token}

    def ask(self, question, pictures):
        """A question about PIL images -> the user's turn."""
        return {"role": "user", "content": [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": question}]}

    def read(self, row):
        """A row -> its messages in the chat template's form, with PIL images inside. Raises BadRow."""
        messages, cells = normalize(row), image_cells(row, self.folder)
        parts = [part for message in messages for part in message["content"]]
        for text in (part["text"] for part in parts if part["type"] == "text"):
            if found := [token for token in self.control if token in text]:
                raise BadRow(f"control token: {found[0]} is typed in a text and would become a real one; take it out "
                             "(of messages, pictures are parts of type image)")
        if sorted(used := [p["index"] for p in parts if p["type"] == "image"]) != list(range(len(cells))):
            raise BadRow(f"images do not match: {len(used)} <image> markers (indices {used}), {len(cells)} images")
        for part in parts:
            if part["type"] == "image":
                part["image"] = load_image(cells[int(part["index"])])
        return messages

    def tokenize(self, conversations, prompt=False):
        """Lists of messages -> the processor's batch; with `prompt`, ready to generate the next answer."""
        return self.processor.apply_chat_template(conversations, add_generation_prompt=prompt, tokenize=True, return_dict=True,
                                                  return_tensors="pt", processor_kwargs={"padding": True})

    def words(self, messages, prompt=False):
        """Token ids of a conversation, as the processor makes them, but without its image tokens."""
        text, tokenizer = self.processor.apply_chat_template(messages, add_generation_prompt=prompt), self.processor.tokenizer
        bos = not text.startswith(tokenizer.bos_token or "\0")  # never a second one
        return [i for i in tokenizer(text, add_special_tokens=bos)["input_ids"] if i != self.processor.image_token_id]

    def learned(self, messages):
        """Which of the words of a conversation are trained: a list of bools. Raises BadRow, or the template's TemplateError."""
        tokens = self.words(messages)
        learned = [self.train_on == "all"] * len(tokens)
        for n in (n for n, message in enumerate(messages) if message["role"] == "assistant"):
            if n == 0:
                raise BadRow("order of turns: the assistant's comes first, nothing asks for it")
            prompt = self.words(messages[:n], prompt=True)
            if tokens[: len(prompt)] != prompt:
                raise BadRow(f"turn {n}: the answer's first characters change the tokens of the prompt; begin it otherwise")
            end = tokens.index(self.processor.tokenizer.eos_token_id, len(prompt)) + 1
            learned[len(prompt) : end] = [True] * (end - len(prompt))
        return learned

    def __call__(self, rows):
        conversations, learned = [], []
        for row in rows:
            try:
                conversations.append(self.read(row))
                if not any(message["role"] == "assistant" for message in conversations[-1]):
                    raise BadRow("no answer: the row has no turn of the assistant, nothing to learn")
                learned.append(torch.tensor(self.learned(conversations[-1])))
            except (BadRow, TemplateError) as e:
                raise BadRow(f"row {row.get('row', '?')}: {'' if isinstance(e, BadRow) else 'order of turns: '}{e}") from e
        batch = self.tokenize(conversations)
        words = batch["attention_mask"].bool() & (batch["input_ids"] != self.processor.image_token_id)
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        batch["labels"][words] = batch["input_ids"][words].where(torch.cat(learned), -100)
        return batch


def load_model(settings, training):
    """The base model, frozen: language model in NF4 where asked, everything else in bf16 / fp16 (float32 on a CPU)."""
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        # replaces bitsandbytes' own list, so lm_head is named again; names count from the start of the full path
        llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"])
    model = AutoModelForImageTextToText.from_pretrained(
        settings.model_name_or_path, revision=settings.model_revision, dtype=dtype, device_map={"": training.device},
        quantization_config=nf4 if settings.load_in_4bit else None)  # BitsAndBytesConfig(load_in_4bit=False) still quantizes
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # on a CPU the first eval() would repack 4-bit weights for a
            module.support_avx512bf16_for_cpu = False  # kernel without autograd, and adapters would get no gradient
    model.requires_grad_(False)
    if settings.lora_r == 0:
        for part in [model.model.language_model, model.lm_head] + [model.model.multi_modal_projector] * settings.train_projector:
            part.requires_grad_(True)
        # The original names of 2023 are not the ones that Trainer loads by: it would resume from the base, with a warning.
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    return model


def lora_config(settings):
    """LoRA on the language model's linear layers, by full path (bare names hit the vision tower too); None for r 0."""
    return None if settings.lora_r == 0 else LoraConfig(
        r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout, use_dora=settings.use_dora,
        target_modules=r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj", task_type="CAUSAL_LM",
        modules_to_save=["multi_modal_projector"] if settings.train_projector else None)


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


def product_last(layer):
    """Let a LoRA layer compute its adapter first and the frozen product last; the sum is the same. At a decoder layer's end checkpointing then need
    not compute the product again: recomputation stops with the last tensor that the backward pass needs."""
    adapted, base = layer.forward, layer.base_layer
    base.forward = lambda x: x.new_zeros(1)  # what PEFT adds the adapter to
    layer.forward = lambda x: adapted(x) + type(base).forward(base, x)


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


class Trainer(SFTTrainer):
    """SFTTrainer that runs the frozen vision tower without a graph and recomputes less, and after each evaluation answers the last question of a
    few held-out rows, greedily, into samples.md."""

    def __init__(self, settings, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.settings = settings
        for p in self.model.parameters():
            if p.requires_grad:  # TRL made them bf16 (4-bit), where small steps round to nothing; fp16 could not unscale them
                p.data = p.data.float()
        tower = next(m for name, m in self.model.named_modules() if name.endswith("vision_tower"))
        tower.forward = torch.no_grad()(tower.forward)  # frozen, yet checkpointing's hook on its input would back-propagate
        for name, layer in self.model.named_modules():
            if self.args.activation_checkpointing and name.endswith(".down_proj") and hasattr(layer, "lora_A") and not settings.use_dora:
                product_last(layer)  # DoRA needs the product for its norm

    def _get_train_sampler(self, train_dataset=None):
        data, args = self.train_dataset if train_dataset is None else train_dataset, self.args
        if args.gradient_accumulation_steps * args.world_size == 1 or args.train_sampling_strategy != "random":
            return super()._get_train_sampler(data)
        rows, seed = args.train_batch_size * args.world_size * args.gradient_accumulation_steps, args.seed if args.data_seed is None else args.data_seed
        # asked for its epoch, not told by set_epoch: where several processes go on from a checkpoint, Accelerate's does not get there
        return AlikeInAStep(data.with_format(None)["length"], rows, seed, epoch=lambda: int(self.state.epoch or 0))

    def evaluate(self, *args, **kwargs):
        metrics, collator, out = super().evaluate(*args, **kwargs), self.data_collator, Path(self.args.output_dir)
        rows = self.eval_dataset.select(range(min(self.settings.sample_rows, len(self.eval_dataset))))
        if len(rows) == 0 or not self.is_world_process_zero():
            return metrics
        text = f"\n## Step {self.state.global_step}\n\n| picture | question | right | answered |\n|---|---|---|---|\n"
        (out / "samples").mkdir(parents=True, exist_ok=True)
        for row in rows:
            messages = collator.read(row)
            last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
            batch = collator.tokenize([messages[:last]], prompt=True).to(self.model.device)
            with torch.no_grad(), self.accelerator.autocast():  # max_length None: the model's own would only warn
                ids = self.model.generate(**batch, max_new_tokens=self.settings.sample_tokens, max_length=None,
                                          do_sample=False, use_cache=True)[0, batch["input_ids"].shape[1] :]
            pictures = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
            for n, picture in enumerate(pictures):
                ImageOps.contain(picture, (224, 224)).save(out / f"samples/{row['row']}-{n}.png")
            cells = [" ".join(f"![](samples/{row['row']}-{n}.png)" for n in range(len(pictures))), text_of(messages[last - 1]),
                     text_of(messages[last]), collator.processor.decode(ids, skip_special_tokens=True)]
            text += f"| {' | '.join(' '.join(cell.replace('|', '&#124;').split()) for cell in cells)} |\n"
        with open(out / "samples.md", "a", encoding="utf-8") as file:
            file.write(text)
        return metrics


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
        model = load_model(settings, training)
    except (OSError, ValueError, SafetensorError) as e:
        fail(f"cannot load the weights of {settings.model_name_or_path}: {e}")
    trainer = Trainer(settings, model, training, collator, train, held_out, processor, peft_config=lora_config(settings))
    for part in ("vision_tower", "multi_modal_projector", "language_model", "lm_head"):
        own = [(p, type(p).__name__ == "Params4bit") for name, p in trainer.model.named_parameters() if part in name]
        packed, trained = sum(2 * p.numel() for p, nf4 in own if nf4), sum(p.numel() for p, _ in own if p.requires_grad)
        count = packed + sum(p.numel() for p, nf4 in own if not nf4)  # 4-bit: two in a byte
        say(f"{part:22s}{trained:>14,} of {count:>14,} parameters trained, {packed:>14,} in 4-bit")
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
        fail(f"the data changed under the run: {str(e).strip().splitlines()[-1]}")
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
