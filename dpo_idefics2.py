# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0",
#   "pillow==13.0.0", "bitsandbytes==0.50.2", "pyyaml==6.0.3", "jinja2==3.1.6", "tensorboard==2.21.0",
#   "networkx==3.6.1",
# ]
# ///
"""Align Idefics2-8b by DPO, on pairs of a better and a worse answer: 4-bit NF4 + LoRA, DPOTrainer, one 24 GB GPU.

    python dpo_idefics2.py                                                # idefics2-8b on RLAIF-V-Dataset
    python dpo_idefics2.py --dataset_name pairs.jsonl --image_folder pictures   # your own pairs
    python dpo_idefics2.py --loss_type sigmoid sft                        # also keeps the chosen answer likely
    python dpo_idefics2.py --model_name_or_path llava-hf/llava-1.5-7b-hf  # LLaVA-1.5, or google/paligemma-3b-mix-224
    accelerate launch --num_processes 4 dpo_idefics2.py                   # several GPUs, DDP
    python dpo_idefics2.py --config idefics2-dpo/settings.yaml            # resume that run after a crash

Loss: DPO (arXiv:2305.18290), -log sigmoid(beta x margin), averaged over the pairs, with
    margin = [log p(chosen) - log p(rejected)] of the policy - the same difference of the reference.
    log p is summed over the answer's tokens. The reference is the same model with its adapter off.
Tokens in the loss: both answers, each with the token that ends it. The question and its image are only read.
Trained weights: LoRA on all linear layers except lm_head; with --adapters language on the language model only.
Result: the last weights; with --load_best_model_at_end true the lowest eval_loss. Read samples.md: both can babble.
Every setting is a flag: python dpo_idefics2.py --help. The format of a row is shown in load_data."""

import contextlib
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
from collections import Counter, namedtuple
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_type_hints

import datasets
import torch
import transformers
import yaml
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub import HfApi
from jinja2 import TemplateError
from networkx.utils import UnionFind
from peft import LoraConfig, PeftModel
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, set_seed
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import DPOConfig, DPOTrainer, TrlParser


@dataclass
class Settings:
    """Model, adapter, data, samples. Each line is a flag: --lora_r 32."""

    # model
    model_name_or_path: str = HfArg(default="HuggingFaceM4/idefics2-8b", help="Idefics2, LLaVA, PaliGemma: hub id.")
    model_revision: str | None = HfArg(default=None, help="Branch, tag or commit of the model, to repeat a run.")
    load_in_4bit: bool = HfArg(default=True, help="Language model, connector in NF4. false: 16 bits, 11 GB more.")
    longest_edge: int = HfArg(default=490, help="Idefics2: longest side of an image, in pixels. 980: sharper, slower.")
    shared_prompt: bool = HfArg(default=True, help="Faster, same losses: compute prompt and image once for each pair.")
    # adapter
    adapters: Literal["all", "language"] = HfArg(default="all", help="Adapt all layers, or the language model's.")
    lora_target_modules: list[str] | None = HfArg(default=None, help="Overrides adapters: q_proj v_proj, or a regex.")
    lora_r: int = HfArg(default=16, help="Rank of the adapter.")
    lora_alpha: int = HfArg(default=32, help="The adapter is scaled by alpha / r.")
    use_dora: bool = HfArg(default=False, help="DoRA: weight-decomposed LoRA; slower, at low ranks sometimes better.")
    # data
    dataset_name: str = HfArg(default="openbmb/RLAIF-V-Dataset", help="Hub id, folder, saved data set or file.")
    dataset_config: str | None = HfArg(default=None, help="Configuration of a hub data set that has several.")
    dataset_revision: str | None = HfArg(default=None, help="Branch, tag or commit of the data set.")
    dataset_train_split: str = HfArg(default="train", help="Split to train on.")
    dataset_test_split: str | None = HfArg(default=None, help="Split to evaluate on. Default: test, if any.")
    eval_dataset_name: str | None = HfArg(default=None, help="Evaluate on this; default split: dataset_train_split.")
    image_folder: str | None = HfArg(default=None, help="Where relative image paths start. Default: beside the .json.")
    image_column: str | None = HfArg(default=None, help="Column of the image. Default: image, else images.")
    question_column: str | None = HfArg(default=None, help="Column of the question. Default: question, else prompt.")
    chosen_column: str = HfArg(default="chosen", help="Column of the better answer.")
    rejected_column: str = HfArg(default="rejected", help="Column of the worse answer.")
    eval_fraction: float = HfArg(default=0.01, help="Share of the images held out, if there is no such split.")
    max_eval_rows: int = HfArg(default=200, help="Most pairs scored per evaluation, always the same ones.")
    on_bad_rows: Literal["stop", "skip"] = HfArg(default="stop", help="Rows that cannot be trained on: stop, or skip.")
    on_long_rows: Literal["drop", "stop"] = HfArg(default="drop", help="Rows above max_length: drop them, or stop.")
    # samples.md
    sample_rows: int = HfArg(default=8, help="Number of held-out prompts to answer at each evaluation. 0: none.")
    max_new_tokens: int = HfArg(default=128, help="Longest answer in samples.md, in tokens.")


@dataclass
class Training(DPOConfig):
    """TRL's DPOConfig with this recipe's defaults. All its other settings are flags, too."""

    output_dir: str = HfArg(default="idefics2-dpo", help="Adapter, processor, settings, samples, logs, checkpoints.")
    resume_from_checkpoint: str = HfArg(default="auto", help="auto: the newest one. false: a new run. Or a folder.")
    num_train_epochs: float = HfArg(default=1.0, help="Passes over the data. max_steps, if given, wins.")
    per_device_train_batch_size: int = HfArg(default=2, help="Pairs. Raise it first if memory is left.")
    per_device_eval_batch_size: int = HfArg(default=4, help="Pairs scored, and prompts answered, at once.")
    gradient_accumulation_steps: int = HfArg(default=32, help="Effective batch = this x per-device batch x GPUs.")
    loss_type: list[str] = HfArg(default_factory=lambda: ["sigmoid"], help="sigmoid is DPO; several: sigmoid sft.")
    beta: float = HfArg(default=0.1, help="Strength of the pull towards the reference.")
    learning_rate: float = HfArg(default=5e-5, help="Lower it if rewards rise while answers in samples.md decay.")
    warmup_steps: float = HfArg(default=0.03, help="Steps, or below 1 a share of the run.")
    max_length: int | None = HfArg(default=1024, help="Longest prompt + answer in tokens, image included. Never cut.")
    eval_strategy: str = HfArg(default="steps", help="When to evaluate: steps, epoch, no.")
    eval_steps: float = HfArg(default=50, help="Steps between evaluations.")
    save_steps: float = HfArg(default=50, help="Steps between checkpoints: what a crash can cost.")
    save_total_limit: int | None = HfArg(default=2, help="Checkpoints kept: the newest, and the best if asked for.")
    load_best_model_at_end: bool = HfArg(default=False, help="Result: lowest eval_loss. false: last weights.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="true hides NaN losses in the log.")
    report_to: str = HfArg(default="tensorboard", help="tensorboard, wandb, trackio, ..., none.")
    dataloader_num_workers: int = HfArg(default=4, help="Processes that decode images while the GPU works.")
    remove_unused_columns: bool = HfArg(default=False, help="Must stay false: the collator reads the columns.")
    ddp_find_unused_parameters: bool | None = HfArg(default=False, help="true if DDP reports unused parameters.")
    activation_checkpointing: bool = HfArg(default=True, help="New name of gradient_checkpointing: saves memory.")
    bf16: bool | None = HfArg(default=None, help="Default: if the GPU has it, else fp16.")

    def __post_init__(self):
        pick_precision(self)
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False
        super().__post_init__()


def parse(argv=None):
    """Flags and `--config run.yaml` -> (Settings, Training). Raises SystemExit."""
    return parse_arguments(TrlParser([Settings, Training], allow_abbrev=False), REFUSED, argv)


def check(settings, training):
    """Stop early if this machine or these flags cannot work. Raises SystemExit."""
    check_training(settings, training, "Idefics2-8b needs 24 GB", metrics=("loss",))
    require(training.learning_rate > 0, "--learning_rate must be above 0")
    require(training.beta > 0, "--beta must be above 0")
    require(settings.lora_r >= 1, "--lora_r must be at least 1: the reference is the model without its adapter")
    check_losses(training)


def load_processor(settings):
    """The model's processor, set to --longest_edge. Raises SystemExit if it does not fit this recipe."""
    name = settings.model_name_or_path
    needed = "this needs the processor of a model of images and text, such as idefics2-8b"
    with fail_on_error(f"--model_name_or_path {name}: {needed}"):
        processor = AutoProcessor.from_pretrained(name, revision=settings.model_revision)
    kind = type(processor).__name__
    require(hasattr(processor, "image_processor"), f"{name} has a {kind}; {needed}")
    require(processor.tokenizer.eos_token, f"{name}: tokenizer without an eos_token (no tokenizer_config.json?)")
    # Edit the prompt here: set processor.chat_template to your own. Nothing else changes: the loss and samples.md
    # follow the template, and the processor is saved with the adapter, for inference. An answer must begin where the
    # prompt ends. It ends with <end_of_utterance> or EOS; if the template writes neither, the collator adds EOS.
    if kind != "PaliGemmaProcessor":  # it has no template: edit its prompt in Collator.render
        require(processor.chat_template, f"{name} has a {kind} without a chat template, which makes the prompt")
        with fail_on_error(f"{name} has a {kind} whose chat template cannot put a question about an image"):
            text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
            processor(text=[text], images=[[Image.new("RGB", (64, 64))]])  # fails if the text has no image token
    set_image_size(processor, settings.longest_edge)
    if processor.tokenizer.pad_token is None:  # any token will do: padding is masked
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def load_data(settings, training):
    """-> (train, eval): Datasets of checked rows; eval is None if nothing is to be evaluated. Raises SystemExit.
    An image is a path, bytes or an embedded image, or a list of one; a text may be one message, as in TRL's data:
        {"image": "sofa.png", "question": "What is on it?", "chosen": "A cat.", "rejected": "A cat and a dog."}
        {"images": ["sofa.png"], "prompt": [{"role": "user", "content": "What is on it?"}], "chosen": ...}"""
    train_rows = read_rows(settings.dataset_name, settings.dataset_train_split, settings)
    require("chosen" in train_rows.column_names, "the rows have no answers; see --chosen_column and --rejected_column")
    eval_source = eval_name_and_split(settings, training)
    eval_rows = None  # None: prepare_rows holds out some training rows, unless evaluation is off
    if eval_source is not None:
        eval_rows = read_rows(*eval_source, settings)
    collator = Collator(load_processor(settings), settings, training)
    return prepare_rows(train_rows, eval_rows, settings.dataset_name, collator, settings, training)


class Collator:
    """B rows -> a batch for DPOTrainer: input_ids, attention_mask, completion_mask (2B, L), padded on the right, and
    tensors of the images. The first B rows have the chosen answers, the other B the rejected ones, in the same order.
    completion_mask is 1 on the tokens of the loss: an answer and the token that ends it. Raises BadRow."""

    image_columns = ("image",)

    def __init__(self, processor, settings, training):
        # Keep only what shapes a batch: if any attribute changes between two runs, all rows are checked again.
        self.processor = processor
        self.folder = settings.image_folder or ""
        self.max_length = training.max_length or math.inf
        tokenizer = processor.tokenizer
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.control_tokens = {*special, tokenizer.eos_token, processor.image_token}
        self.end_tokens = [end for end in ("<end_of_utterance>", tokenizer.eos_token) if end in self.control_tokens]
        self.stop_ids = tokenizer.convert_tokens_to_ids(self.end_tokens)  # where generation ends

    def __call__(self, rows):
        conversations, chosen_ids, rejected_ids = [], [], []
        for row in rows:
            try:
                user_turn, chosen, rejected = self.read_pair(row)
                if chosen is None:
                    raise BadRow("no answers", "the row has none; see --chosen_column and --rejected_column")
                chosen_ids.append(self.answer_ids(user_turn, chosen))
                rejected_ids.append(self.answer_ids(user_turn, rejected))
                if chosen_ids[-1] == rejected_ids[-1]:
                    raise BadRow("equal answers", f"to the tokenizer {chosen!r} and {rejected!r} are the same")
            except BadRow as error:
                error.row = row.get("row")
                raise
            conversations.append([user_turn])
        prompts = self.tokenize(conversations, prompt=True)
        real = prompts["attention_mask"] == 1
        prompt_ids = [ids[mask].tolist() for ids, mask in zip(prompts["input_ids"], real, strict=True)]
        sequences, masks = [], []
        for row, prompt, answer in zip([*rows, *rows], prompt_ids * 2, chosen_ids + rejected_ids, strict=True):
            length = len(prompt) + len(answer)
            if length > self.max_length:
                raise BadRow("too long", f"{length} tokens, --max_length is {self.max_length}", row.get("row"))
            sequences.append(prompt + answer)
            masks.append((torch.arange(length) >= len(prompt)).long())
        batch = dict(self.processor.tokenizer.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt"))
        batch["completion_mask"] = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
        # Two tensors of some models have a value for each token, so they must cover the answers, too.
        if "token_type_ids" in prompts:  # PaliGemma: 0 on the prompt, which sees all of itself, 1 on the answer
            batch["token_type_ids"] = batch["completion_mask"]
        if "mm_token_type_ids" in prompts:  # 1 on image tokens
            batch["mm_token_type_ids"] = (batch["input_ids"] == self.processor.image_token_id).long()
        for name, values in prompts.items():
            if name not in batch:  # images: once for the chosen rows, once for the rejected rows
                batch[name] = torch.cat([values, values])
        return batch

    def answer_ids(self, user_turn, answer):
        """The user's turn and an answer -> the answer's token ids, up to where generation ends. Raises BadRow.
        They continue the prompt that the model gets at inference, so the prompt's own tokens must not change."""
        prompt = self.render([user_turn], prompt=True)
        if not self.processor.chat_template:
            prompt += "\n"  # PaliGemma's processor adds it to a prompt, render does not
        whole = self.render([user_turn, self.answer(answer)])
        text = whole.removeprefix(prompt)
        if not whole.startswith(prompt) or answer not in text:
            raise BadRow("prompt changed", f"with the answer {answer!r} the chat template changes the question")
        answer_end = text.index(answer) + len(answer)
        tail = text[answer_end:]
        end_tokens = [token for token in self.end_tokens if token in tail]
        if end_tokens:  # train up to the first one: Idefics2's template has a newline after it
            end_token = min(end_tokens, key=tail.index)
            trained = text[: answer_end + tail.index(end_token)] + end_token
        else:  # LLaVA's template puts none after an answer. Without one, a model would never learn to stop.
            trained = text[:answer_end] + self.processor.tokenizer.eos_token
        prompt_ids, ids = self.processor.tokenizer([prompt, prompt + trained], add_special_tokens=False)["input_ids"]
        if ids[: len(prompt_ids)] != prompt_ids:
            raise BadRow("prompt changed", f"the first characters of {answer!r} change its tokens; begin otherwise")
        return ids[len(prompt_ids) :]

    def render(self, messages, prompt=False):
        """Messages -> text with a token for each image. With `prompt` it ends where the model is to answer."""
        if self.processor.chat_template:
            return self.processor.apply_chat_template(messages, add_generation_prompt=prompt)
        return self.processor.image_token + "\n".join(map(text_of, messages))  # PaliGemma: no roles, one image

    def tokenize(self, conversations, prompt=False):
        """Lists of messages -> the processor's batch, padded on the left, as generation needs it."""
        texts = [self.render(messages, prompt) for messages in conversations]
        images = [images_in(messages) for messages in conversations]
        bos = self.processor.tokenizer.bos_token
        has_bos = bos is not None and texts[0].startswith(bos)  # some templates write it themselves
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": not has_bos}
        batch = self.processor(text=texts, images=images, **options)
        batch.pop("labels", None)  # PaliGemma's: all -100
        return batch

    def read(self, row):
        """A row -> [the user's turn, the assistant's turn with the chosen text and, as `rejected`, the other one].
        A row without answers has only the first turn. Raises BadRow."""
        user_turn, chosen, rejected = self.read_pair(row)
        if chosen is None:
            return [user_turn]
        return [user_turn, self.answer(chosen) | {"rejected": rejected}]

    def read_pair(self, row):
        """A row -> the user's turn with a PIL image, chosen text, rejected text (both None if it has no answers)."""
        answers = [name for name in ("chosen", "rejected") if row.get(name) is not None]
        texts = {name: plain_text(row.get(name), name) for name in ("question", *answers)}
        if len(answers) == 1:
            raise BadRow("one answer", f"the row has only a {answers[0]} answer; both are needed")
        for name, text in texts.items():
            typed = [token for token in self.control_tokens if token in text]
            if typed:
                raise BadRow("control token", f"{typed[0]} is typed in the {name} and would become real; take it out")
        if answers and texts["chosen"] == texts["rejected"]:
            raise BadRow("equal answers", f"chosen and rejected are both {texts['chosen']!r}")
        images = self.images_of(row)
        if len(images) != 1:
            raise BadRow("not one image", f"{len(images)} images; give one path, or its bytes: see --image_column")
        # Edit images here, to crop or augment them (for evaluation, too). For a second image in a row change the check
        # above, most_images in text_of_message, and render for PaliGemma. `ask` puts all images before the question.
        # Each image needs room in --max_length: 64 tokens (LLaVA 576).
        images = [load_image(image, max_aspect_ratio=20) for image in images]  # Idefics2 would stretch narrower ones
        return self.ask(texts["question"], images), texts.get("chosen"), texts.get("rejected")

    def images_of(self, row):
        """The images of a row as it has them: paths, {"bytes": ...} or PIL images."""
        return stored_images(row.get("image"), row.get("folder") or self.folder)

    def ask(self, question, images):
        """A question about PIL images -> the user's turn."""
        parts = [{"type": "image", "image": image} for image in images]
        return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}

    def answer(self, text):
        """A text -> the assistant's turn."""
        return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def load_model(settings, training):
    """The base model, frozen: language model and connector in NF4 if asked for, the rest in 16 bits (32 on a CPU)."""
    dtype = weight_dtype(training)
    options = {"revision": settings.model_revision, "dtype": dtype, "device_map": {"": training.device}}
    if settings.load_in_4bit:
        parts_in_16_bits = ["lm_head", "model.vision_model", "model.vision_tower", "model.visual"]
        options["quantization_config"] = nf4_quantization(dtype, parts_in_16_bits)
    model = AutoModelForImageTextToText.from_pretrained(settings.model_name_or_path, **options)
    keep_4bit_trainable_on_cpu(model)
    return model.requires_grad_(False)


# The LoRA targets of --adapters language. (The default, all, is PEFT's "all-linear": edit that in lora_config, or give
# --lora_target_modules.) Any linear layer except those in UNTRAINABLE can be adapted.
LANGUAGE_TARGETS = r"model\.(text_model|language_model)\..*\.(q|k|v|o|gate|up|down)_proj"
UNTRAINABLE = {"lm_head": "which DPOTrainer merges with the loss and cannot adapt"}


def lora_config(settings):
    """LoRA on all linear layers except lm_head; with --adapters language only on those of the language model."""
    config = AutoConfig.from_pretrained(settings.model_name_or_path, revision=settings.model_revision)
    language_model = "model.text_model" if config.model_type == "idefics2" else "model.language_model"
    default = "all-linear" if settings.adapters == "all" else LANGUAGE_TARGETS
    targets = lora_targets(settings.lora_target_modules, language_model, default)
    layers = {"target_modules": targets, "exclude_modules": unused_tower_layers(config), "task_type": "CAUSAL_LM"}
    return LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, use_dora=settings.use_dora, **layers)


class Trainer(DPOTrainer):
    """DPOTrainer's loss, optimizer and loop. Adapters are float32, and held-out prompts are answered."""

    def __init__(self, settings, *args, **kwargs):
        super().__init__(*args, **kwargs)
        train_in_float32(self.model)  # DPOTrainer made them bf16
        self.settings = settings
        self.answers_before = None  # a list of Answer: those of the base model, from the first evaluation on

    def _get_train_sampler(self, train_dataset=None):
        sampler = longest_first(self)
        if sampler is None or {"aot", "aot_unpaired"}.intersection(self.args.loss_type):  # they sort a batch's pairs
            return super()._get_train_sampler(train_dataset)
        return sampler

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """DPOTrainer's, then answers to the first held-out prompts."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        rows = self.eval_dataset.take(min(self.settings.sample_rows, len(self.eval_dataset)))
        if len(rows) > 0:
            answers = self.answer_samples(rows)
            output.metrics[f"{metric_key_prefix}_samples/ended"] = sum(a.ended for a in answers) / len(rows)
            output.metrics[f"{metric_key_prefix}_samples/tokens"] = sum(a.num_tokens for a in answers) / len(rows)
        # Your own metric. To keep the best by it: metrics=("loss", "mine") in check, --metric_for_best_model mine.
        # answers = answer_rows(self, self.eval_dataset, max_new_tokens=64)  # answers[0].text answers the first row
        # output.metrics[f"{metric_key_prefix}_mine"] = my_score(answers, self.eval_dataset)
        return output

    def answer_samples(self, rows):
        """Write the answers before training and now into samples.md. Returns those of now, a list of Answer."""
        if self.answers_before is None:
            with self.model.disable_adapter():
                self.answers_before = answer_rows(self, rows, self.settings.max_new_tokens)
        answers = answer_rows(self, rows, self.settings.max_new_tokens)
        samples = []
        for row, before, after in zip(rows, self.answers_before, answers, strict=True):
            question, chosen = self.data_collator.read(row)
            texts = [text_of(question), before.text, after.text, text_of(chosen), chosen["rejected"]]
            samples.append((row["row"], [question], texts))
        if self.is_world_process_zero():
            columns = ["image", "prompt", "before", "after", "chosen", "rejected"]
            append_samples(self.args.output_dir, f"Step {self.state.global_step}", columns, samples)
        return answers


def main(argv=None):
    """Parse, check, read the rows, show a pair, load the model, train, save."""
    settings, training = parse(argv)
    check(settings, training)
    checkpoint = checkpoint_to_resume(training)
    set_seed(training.seed)

    train_dataset, eval_dataset = load_data(settings, training)
    if eval_dataset is None:
        training.eval_strategy, training.load_best_model_at_end = "no", False
    processor = load_processor(settings)  # (load_data has its own copy: it can be called alone)
    collator = Collator(processor, settings, training)
    example = marked_pair(collator([train_dataset[0]]), processor)
    PartialState().print(f"\nOne pair as the model sees it, trained on in «»:\n\n{example}\n")

    empty = empty_model(settings)
    adapter = lora_config(settings)
    check_lora_targets(settings, adapter, empty, UNTRAINABLE)
    if settings.shared_prompt:
        check_sliding_window(f"--max_length {training.max_length}", collator.max_length, empty.config)
    with fail_on_error(f"cannot load the weights of {settings.model_name_or_path}"):
        model = load_model(settings, training)
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "data_collator": collator}
    options = {"args": training, "processing_class": processor, "peft_config": adapter}
    trainer = SharedPromptDPOTrainer(settings, model, **data, **options)  # or Trainer: the same losses, slower
    print_parameters(trainer.model, [*dict(model.model.named_children()), "lm_head"])
    train_and_save(trainer, checkpoint)


# ------------------------------------------------------------ optional, for speed: prompt and image once for each pair

SHARED = ("idefics2", "llava", "paligemma")  # families whose forward pass takes a 4-D mask and restarting positions


class SharedPromptDPOTrainer(Trainer):
    """Optional, for speed: runs a pair as one sequence, its image once. Losses, gradients and logs stay the same.
    DPOTrainer runs prompt + chosen and prompt + rejected as two sequences, each with the image, first for the policy,
    then for the reference. Here both answers follow one prompt (drawn: a prompt of 4 tokens, answers of 3 and 2):

        token      p0 p1 p2 | p3 c0 c1 end | p3 r0 end
        position    0  1  2    3  4  5  6     3  4  5     restarts: each answer comes right after the prompt
        part        0  0  0    1  1  1  1     2  2  2     a token sees part 0 and its own part, not the other answer
        predicts    -  -  -   c0 c1 end -    r0 end -     p3 appears twice: it predicts the first token of each answer

    Each token therefore sees the same tokens, at the same positions, as in its own separate sequence. Second saving:
    frozen parts before the language model run once per batch, without a graph, for policy and reference.
    Gain, measured on a CPU (small Idefics2, images of 980 pixels): 1.80 times as fast, 3.40 with --adapters language.
    To do without it: --shared_prompt false. Or make a Trainer in main and delete this section and its check there."""

    def __init__(self, settings, *args, **kwargs):
        super().__init__(settings, *args, **kwargs)
        self.frozen_outputs = None  # in compute_loss: {frozen part: its output}
        self.why_not_shared = "--shared_prompt false"  # None if prompts are shared
        if settings.shared_prompt:
            self.why_not_shared = obstacle_to_sharing(self.model, self.ref_model)
        if self.why_not_shared is not None:
            PartialState().print(f"path: stock DPOTrainer, since {self.why_not_shared}")
            return
        PartialState().print("path: shared prompts, each pair one sequence with its image once")
        model, forwards = self.model.get_base_model(), ReplacedForwards()
        forwards.replace(model, functools.partial(self.forward_pairs, model.forward))
        for part in model.model.children():  # in the order in which they run: tower, connector, language model
            is_trained = any(parameter.requires_grad for parameter in part.parameters())
            if is_trained or part is model.model.get_decoder():
                break
            forwards.replace(part, functools.partial(self.run_once, part, part.forward))
        self.add_callback(forwards)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """DPOTrainer's loss. It calls the model for the policy, then for the reference, with the same images."""
        self.frozen_outputs = None if return_outputs else {}  # return_outputs adds a third call, with 2B images
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.frozen_outputs = None

    def run_once(self, part, forward, *args, **kwargs):
        """Stands in for a frozen part's `forward`: no graph, and in compute_loss the output of its first call."""
        outputs = {} if self.frozen_outputs is None else self.frozen_outputs
        if part not in outputs:
            with torch.no_grad():
                outputs[part] = forward(*args, **kwargs)
        return outputs[part]

    def forward_pairs(self, forward, *args, **inputs):
        """Stands in for the model's `forward`, to which TRL added a fused head: log-probabilities instead of logits.
        In: DPOTrainer's batch, input_ids, attention_mask, labels (2B, L), images (2B, ...). Out: (2B, L - 1)."""
        if not inputs.pop("fused_lm_head", False):  # generation
            return forward(*args, **inputs)
        ids, mask, labels = inputs.pop("input_ids"), inputs.pop("attention_mask"), inputs.pop("labels")
        check_sliding_window(f"a row of {ids.shape[1]} tokens", ids.shape[1], self.model.config)
        pairs = pack_pairs(ids, mask, labels, self._tokenizer.pad_token_id)
        inputs.pop("token_type_ids", None)  # PaliGemma would make a mask of them
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                inputs[name] = value[: len(value) // 2]  # the images of the chosen rows, which the others repeat
        inputs |= {"input_ids": pairs.ids, "position_ids": pairs.position, "shift_labels": pairs.predicts}
        output = forward(*args, attention_mask=attention_of(pairs, self.model), fused_lm_head=True, **inputs)
        for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
            values = getattr(output, name)
            if values is not None:
                setattr(output, name, unpack(values, pairs, labels))
        return output


def pack_pairs(input_ids, attention_mask, labels, pad_token_id):
    """DPOTrainer's batch, all (2B, L), chosen rows first, padded on any side -> B pairs, each one sequence of S tokens
    as drawn above: ids, real (not padding), position, part, in_prompt (also its last token), predicts, all (B, S)."""
    num_pairs = len(input_ids) // 2
    real = attention_mask.bool()
    is_answer = labels != -100
    predicts = next_tokens(labels)
    ends_prompt = (predicts != -100) & ~is_answer
    part = torch.ones_like(labels)
    part[num_pairs:] = 2
    part[~(ends_prompt | is_answer)] = 0
    needed = torch.cat([real[:num_pairs], part[num_pairs:] == 2])  # the prompt only of the chosen rows
    values = {"ids": input_ids, "real": needed, "position": real.cumsum(dim=1) - 1}
    values |= {"part": part, "in_prompt": real & ~is_answer, "predicts": predicts}
    for name, value in values.items():
        values[name] = torch.cat([value[:num_pairs], value[num_pairs:]], dim=1)  # (B, 2L): both rows side by side
    # Needed tokens move left, in their order. What then ends a shorter row may be image tokens: it becomes padding.
    length = int(values["real"].sum(dim=1).max())
    order = values["real"].long().argsort(dim=1, descending=True, stable=True)[:, :length]
    pairs = SimpleNamespace(**{name: value.gather(1, order) for name, value in values.items()})
    pairs.ids[~pairs.real] = pad_token_id
    return pairs


def attention_of(pairs, model):
    """The attention mask (B, 1, S, S) of packed pairs: tokens along dim 2 see those along dim 3."""
    seen_part, own_part = pairs.part[:, None, :], pairs.part[:, :, None]
    seen_position, own_position = pairs.position[:, None, :], pairs.position[:, :, None]
    mask = ((seen_part == 0) | (seen_part == own_part)) & (seen_position <= own_position)
    if model.config.model_type == "paligemma":  # its prompt sees all of itself
        in_prompt = pairs.in_prompt & (pairs.part < 2)
        mask |= in_prompt[:, None, :] & in_prompt[:, :, None]
    mask &= pairs.real[:, None, :]
    mask |= torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)  # padding sees itself, or gives NaN
    if model.config.get_text_config()._attn_implementation == "eager":  # it adds its mask to the scores
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    return mask[:, None]


def unpack(values, pairs, labels):
    """Values of packed pairs (B, S) -> those of DPOTrainer's batch (2B, L - 1), with its labels (2B, L): 0 where
    nothing is predicted. Values are read and filled in row by row, each from left to right, first all chosen rows."""
    is_predicting = pairs.predicts != -100
    of_chosen = values[is_predicting & (pairs.part == 1)]  # one dimension
    of_rejected = values[is_predicting & (pairs.part == 2)]
    is_predicted = labels[:, 1:] != -100
    return values.new_zeros(is_predicted.shape).masked_scatter(is_predicted, torch.cat([of_chosen, of_rejected]))


def obstacle_to_sharing(model, ref_model=None):
    """Why a model's prompts cannot be shared; None if they can."""
    attention = model.config.get_text_config()._attn_implementation
    if model.config.model_type not in SHARED:
        return f"sharing is for {', '.join(SHARED)}, this is {model.config.model_type}"
    if not isinstance(model, PeftModel) or ref_model is not None:
        return "there is a reference model beside the policy"
    if attention not in ("sdpa", "eager"):
        return f"{attention} takes no 4-D attention mask"
    return None


def check_sliding_window(what, length, config):
    """Stop if rows of this length exceed the model's sliding window, which attention_of leaves out."""
    window = getattr(config.get_text_config(), "sliding_window", None) or math.inf
    if length > window and config.model_type in SHARED:
        problem = f"this model has a sliding window of {window} tokens, which shared prompts do not support"
        fail(f"{what}: {problem}: --max_length {window}, or --shared_prompt false")


# ---------------------------------------------------------------------------------------- details: rows, flags, losses

# DPOConfig's flags that this recipe does not use, beside UNUSED_FLAGS.
REFUSED = """precompute_ref_log_probs precompute_ref_batch_size sync_ref_model padding_free pad_to_multiple_of
truncation_mode pad_token model_init_kwargs trust_remote_code router_aux_loss_coef use_liger_kernel neftune_noise_alpha
label_smoothing_factor label_names prediction_loss_only activation_offloading torch_compile""".split()
LOSSES = """sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop
sft sigmoid_norm""".split()
ONLY_REVERSE_KL = {"nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def read_rows(name, split, settings):
    """The numbered rows of a split; None if `split` is None and there is no test split. Raises SystemExit."""
    rows = read_dataset(name, split, settings)
    if rows is None:
        return None
    image = "images" if "images" in rows.column_names and "image" not in rows.column_names else "image"
    question = "prompt" if "prompt" in rows.column_names and "question" not in rows.column_names else "question"
    columns = {"image": settings.image_column or image, "question": settings.question_column or question}
    columns |= {"chosen": settings.chosen_column, "rejected": settings.rejected_column}
    return rename_columns(rows, columns, name, optional=("chosen", "rejected"))


def plain_text(cell, name):
    """A text, or a list of one message as in TRL's data -> the text without white space around it. Raises BadRow."""
    role = "user" if name == "question" else "assistant"
    text = text_of_message(cell, role) if isinstance(cell, list) else cell
    if not isinstance(text, str):
        form = f"a text in quotes, or a list of one message of the {role} with one text (only a question has an image)"
        raise BadRow(f"{name} is not a text", f"{cell!r:.200}; make it {form}")
    if not text.strip():
        raise BadRow(f"empty {name}", f"{cell!r} holds nothing but white space")
    return text.strip()


def text_of_message(messages, role):
    """A list of one message with one text -> that text (a user's may have an image, too). Other lists: not a text."""
    if len(messages) != 1 or not isinstance(messages[0], dict) or messages[0].get("role") not in (None, role):
        return None
    content = messages[0].get("content")
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    most_images = 1 if role == "user" else 0
    if len(texts) != 1 or len(content) - len(texts) > most_images:
        return None
    return texts[0]


def marked_pair(batch, processor):
    """The first pair of a batch as text: the prompt, then both answers, tokens of the loss in «»."""
    batch = batch | {"labels": batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)}
    prompt = marked(batch | {"attention_mask": batch["attention_mask"] - batch["completion_mask"]}, processor)
    chosen = marked(batch, processor).removeprefix(prompt)
    rejected = marked(batch, processor, n=len(batch["labels"]) // 2).removeprefix(prompt)
    return f"{prompt}\n  chosen:   {chosen}\n  rejected: {rejected}"


def set_image_size(processor, edge):
    """No image splitting and, for Idefics2, this longest edge. Raises SystemExit if the model does not take it."""
    image_processor = processor.image_processor
    if hasattr(image_processor, "do_image_splitting"):
        image_processor.do_image_splitting = False
    kind = type(processor).__name__
    if kind != "Idefics2Processor":
        require(edge == Settings.longest_edge, f"--longest_edge is for Idefics2; a {kind} has a size of its own")
        return
    smallest, largest = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
    if edge == Settings.longest_edge:  # the default also fits models that only take smaller images
        edge = min(edge, largest)
    require(smallest <= edge <= largest, f"--longest_edge {edge}: it must be from {smallest} to {largest} pixels")
    image_processor.size = {**dict(image_processor.size), "longest_edge": edge}


def unused_tower_layers(config):
    """A regex of the last layers of LLaVA's vision tower, which its image features do not come from: adapters there
    would never get a gradient. None if all layers are used."""
    features = getattr(config, "vision_feature_layer", None)
    if features is None:
        return None
    features = features if isinstance(features, list) else [features]
    depth = config.vision_config.num_hidden_layers
    # Features count hidden states: 0 is before all layers, state i is the output of layer i - 1, -1 is the last.
    num_used = max(state % (depth + 1) for state in features)
    unused = [str(layer) for layer in range(num_used, depth)]
    return rf".*vision_tower\..*layers\.({'|'.join(unused)})\..*" if unused else None


def check_losses(training):
    """Stop if a loss is not DPOTrainer's, or does not take the flags that go with it. Raises SystemExit."""
    losses, smoothing, divergence = set(training.loss_type), training.label_smoothing, training.f_divergence_type
    unknown = " ".join(sorted(losses.difference(LOSSES)))
    if unknown or not losses:
        elsewhere = "kto, orpo, cpo, simpo and others have trainers of their own in TRL"
        fail(f"--loss_type {unknown}: known are {', '.join(LOSSES)} ({elsewhere})")
    weights = training.loss_weights or [1]
    require(min(weights) >= 0 and sum(weights) > 0, "--loss_weights: none below 0, and not all 0")
    if "exo_pair" in losses:
        require(0 < smoothing < 1, "--loss_type exo_pair needs --label_smoothing above 0 and below 1, such as 0.001")
    if losses & {"robust", "aot", "aot_unpaired"}:
        require(0 <= smoothing < 0.5, "--loss_type robust and aot take --label_smoothing from 0 to below 0.5")
    if not losses & {"exo_pair", "robust", "aot", "aot_unpaired"}:
        require(smoothing == 0, "--label_smoothing is for the losses exo_pair, robust and aot")
    require(divergence in DIVERGENCES, f"--f_divergence_type {divergence}: known are {', '.join(DIVERGENCES)}")
    others = " ".join(sorted(losses & ONLY_REVERSE_KL))
    if others and divergence != "reverse_kl":
        fail(f"--f_divergence_type {divergence}: {others} can only have reverse_kl")


# =====================================================================================================================
# The workbench: flags, files, rows, checkpoints. The same in every recipe; which tokens and weights are trained is
# decided above. In your own copy edit anything. In this repository: edit workbench/workbench.py, then `make sync`.
# =====================================================================================================================

# --------------------------------------------------------------------------------------------------------------- flags

# Inherited flags that no recipe uses: they would be ignored, or break what a recipe promises.
UNUSED_FLAGS = """save_only_model remove_unused_columns gradient_checkpointing gradient_checkpointing_kwargs deepspeed
fsdp do_train do_eval do_predict dataloader_drop_last""".split()


OTHER_NAMES = {"gradient_checkpointing": "; its new name is --activation_checkpointing"}


OTHER_NAMES["deepspeed"] = "; give it to the launcher: accelerate launch --config_file"


# Settings that may change when a run is resumed: they have no effect on what is trained.
FREE_TO_CHANGE = """output_dir resume_from_checkpoint report_to run_name disable_tqdm log_level dataloader_num_workers
dataset_num_proc push_to_hub hub_model_id hub_strategy hub_private_repo max_eval_rows sample_rows sample_tokens
max_new_tokens shared_prompt logging_steps save_total_limit per_device_eval_batch_size""".split()


SPLIT_NOTE = "# Evaluation rows without a split of their own: whole groups of rows that share images."  # settings.yaml


def fail(message):
    """End the program (SystemExit) with exit status 1 and one message, which only the first process prints."""
    sys.exit(f"error: {message}" if os.environ.get("RANK", "0") == "0" else 1)


def require(condition, message):
    """End the program with this message unless the condition holds."""
    if not condition:
        fail(message)


# What a damaged file of a model, or one of another kind of model, can raise.
READ_ERRORS = (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError, RuntimeError, TemplateError)


@contextlib.contextmanager
def fail_on_error(message):
    """End the program with this message if files of a model cannot be read, or do not fit, in the `with` block."""
    try:
        yield
    except (*READ_ERRORS, SafetensorError) as error:
        fail(f"{message}: {' '.join(str(error).split()):.600}")


def pick_precision(training):
    """Unless the user chose: bf16 where the GPU has it, fp16 on an older GPU, float32 on a CPU."""
    if training.bf16 is None and not training.fp16:
        has_gpu = torch.cuda.is_available() and not training.use_cpu
        training.bf16 = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        training.fp16 = has_gpu and not training.bf16


def weight_dtype(training):
    """The dtype of the frozen weights."""
    if training.bf16:
        return torch.bfloat16
    if training.fp16:
        return torch.float16
    return torch.float32


def parse_arguments(parser, refused, argv=None, fill=None):
    """Flags, and the YAML file of --config, as (settings, training). A flag wins over the file. Raises SystemExit.
    refused: inherited flags that this recipe does not use, beside UNUSED_FLAGS. fill: a function that completes
    {name: value} with defaults that depend on other settings. training.given: the values before __post_init__ or
    `fill` changed any, for settings.yaml."""
    # Loader processes are forked after the tokenizer was used.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser.error = fail
    parser.add_argument("--config", help="YAML file of any of these flags.")
    argv = sys.argv[1:] if argv is None else list(argv)
    config_file = parser.parse_known_args(argv)[0].config
    if config_file:
        argv = flags_from_yaml(config_file, parser) + argv
    try:
        given = vars(parser.parse_args(argv))
        del given["config"]
        for field in fields(parser.dataclass_types[1]):
            if field.name in UNUSED_FLAGS + refused and given[field.name] != field.default:
                fail(f"--{field.name}: not used by this recipe{OTHER_NAMES.get(field.name, '')}")
        settings, training = parser.parse_dict(fill(given) if fill else given)
    except (OSError, ValueError, TypeError, OverflowError) as error:
        fail(error)
    training.given = {name: value for name, value in given.items() if name != "hub_token"}
    return settings, training


def flags_from_yaml(file, parser):
    """A YAML file of settings -> a list of flags, so that argparse checks their types and choices."""
    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        fail(f"--config {file} cannot be read: {error}")
    require(isinstance(config, dict), f"--config {file} must hold lines of 'name: value'")
    types = get_type_hints(parser.dataclass_types[0]) | get_type_hints(parser.dataclass_types[1])
    flags = []
    for name, value in config.items():
        if value is None or value == []:  # no flag can say these, so they become the default
            may_be_none = name not in types or type(None) in get_args(types[name]) or parser.get_default(name) is None
            require(value == [] or may_be_none, f"--config {file}: {name} must have a value")
            parser.set_defaults(**{name: value})
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def check_training(settings, training, memory_needed, metrics=("loss",)):
    """Stop if the machine, or flags that every recipe has, cannot work. Raises SystemExit.
    `metrics`: what the best checkpoint may be chosen by. The lowest loss is the best, the highest of all others."""
    gpus, has_device = training.n_gpu, training.use_cpu or training.device.type != "cpu"
    launch = f"accelerate launch --num_processes {gpus} {Path(__file__).name}"
    require(has_device, f"no GPU found ({memory_needed}); for tiny models: --use_cpu")
    require(gpus <= 1, f"{gpus} GPUs, but one process. For all: {launch}. For one: CUDA_VISIBLE_DEVICES=0")
    require(not (training.fp16 and training.use_cpu), "--fp16 needs a GPU")

    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        require(getattr(training, name) >= 1, f"--{name}: batch sizes and accumulation steps must be at least 1")
    for name in ("eval", "save", "logging"):
        if getattr(training, f"{name}_strategy") == "steps":
            steps = getattr(training, f"{name}_steps")
            require(steps > 0, f"--{name}_steps: above 0 is needed; --{name}_strategy no turns it off")
    is_positive = training.max_steps != 0 and training.num_train_epochs > 0
    require(is_positive, "--max_steps and --num_train_epochs must be above 0")
    require(0 <= training.learning_rate < 10, "--learning_rate must be from 0 to below 10")
    require(0 <= settings.eval_fraction < 1, "--eval_fraction must be from 0 to below 1")
    require(settings.max_eval_rows >= 1, "--max_eval_rows must be at least 1; --eval_strategy no turns evaluation off")
    if training.load_best_model_at_end:
        check_best_model(training, metrics)
    try:  # tested now: otherwise they fail after the long loading of the weights
        for callback in transformers.integrations.get_reporting_integration_callbacks(training.report_to):
            callback()
        if training.push_to_hub:
            HfApi(token=training.hub_token).whoami()
    except Exception as error:  # each integration has exceptions of its own
        fail(f"--report_to or --push_to_hub: {error}")


def check_best_model(training, metrics):
    """Stop if the best checkpoint could not be found: another metric, the wrong direction, or not saved."""
    metric = str(training.metric_for_best_model).removeprefix("eval_")
    require(metric in metrics, f"--metric_for_best_model {metric}: this recipe computes {' and '.join(metrics)} only")
    higher_is_better = metric != "loss"
    message = f"--greater_is_better {not higher_is_better} would keep the worst checkpoint by {metric}".lower()
    require(training.greater_is_better == higher_is_better, message)
    if training.eval_strategy == training.save_strategy == "steps":
        message = "to keep the best: --save_steps equal to --eval_steps, or --load_best_model_at_end false"
        require(training.eval_steps == training.save_steps, message)


# ----------------------------------------------------------------------------------------------------- images and rows


class BadRow(ValueError):
    """A row that cannot be trained on. Rows are counted by `reason`; `detail` says what is wrong and how to fix it."""

    def __init__(self, reason, detail="", row=None):
        super().__init__(reason, detail, row)
        self.reason = reason
        self.detail = detail
        self.row = row

    def __str__(self):
        text = f"{self.reason}: {self.detail}" if self.detail else self.reason
        return text if self.row is None else f"row {self.row}: {text}"


def stored_images(value, folder):
    """A row's image or list of images -> list of paths (relative ones: in `folder`), {"bytes": ...} or PIL images."""
    if value is None or value == "":
        return []
    images = []
    for image in value if isinstance(value, list) else [value]:
        if isinstance(image, bytes):
            image = {"bytes": image}
        if isinstance(image, dict) and not image.get("bytes"):
            image = image.get("path")
        if isinstance(image, str):
            image = os.path.join(folder, image)
        images.append(image)
    if images == [None]:  # an embedded image with neither path nor bytes
        return []
    return images


def image_key(image):
    """The same text for the same image: its real path or, for an embedded one, a hash of its bytes."""
    if isinstance(image, dict):
        return hashlib.sha256(image["bytes"]).hexdigest()
    return os.path.realpath(image) if isinstance(image, str) else repr(image)


def load_image(image, max_aspect_ratio=200):
    """A path, {"bytes": ...} or a PIL image -> PIL RGB, upright. Raises BadRow if that is not possible."""
    source = (image.get("path") or "its bytes") if isinstance(image, dict) else str(image)
    if len(source) > 500:  # an image written as text, perhaps
        source = f"{source[:100]}... ({len(source)} characters)"
    try:
        if isinstance(image, dict):
            image = Image.open(io.BytesIO(image["bytes"]))
        elif not isinstance(image, Image.Image):
            image = Image.open(image)
        frames = getattr(image, "n_frames", 1)
        is_several = frames > 1 and image.format != "MPO"  # a phone's MPO holds the picture and a preview of it
        image.load()  # verify() would accept a truncated JPEG
        upright = to_rgb(image)
    except Image.DecompressionBombError as error:
        raise BadRow("image too large", f"{source} ({error}); shrink it") from error
    except Exception as error:  # decoders raise all kinds of exceptions
        cause = getattr(error, "strerror", None) or error
        raise BadRow("unreadable image", f"{source} ({cause}); repair it, or see --image_folder") from error
    if is_several:
        raise BadRow(
            "several images", f"{source} holds {frames}, only the first would be seen; give each its own file"
        )
    width, height = upright.size
    if max(width, height) > max_aspect_ratio * min(width, height):
        detail = f"{source} has {width} x {height} pixels; above 1 : {max_aspect_ratio} little can be seen: crop it"
        raise BadRow("image too narrow", detail)
    return upright


def to_rgb(image):
    """A PIL image of any mode -> RGB, upright, on white. Raises ValueError for brightness that is no number."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits: PIL's own conversion would clip them to white
        brightest = image.getextrema()[1]
        if not 0 < brightest < math.inf:
            raise ValueError(f"its brightest value is {brightest}")
        is_0_to_1 = image.mode == "F" and brightest <= 1
        scale = 255 / brightest if is_0_to_1 or brightest > 255 else 1
        # For these modes PIL only accepts a function of the form value * scale + offset.
        image = image.convert("F").point(lambda value: value * scale + 0).convert("L")
    if image.has_transparency_data:  # dropping alpha would turn black ink on nothing into black on black
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def refuse_duplicate_keys(pairs):
    """A JSON object -> dict. Raises ValueError for a key that appears twice: json.loads would keep its last value."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a key appears twice in {str(pairs):.200}")
    return row


def read_json(path):
    """A .json (list of rows) or .jsonl file (a row a line) -> Dataset; columns may mix types. Raises ValueError."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".jsonl":
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                if line.strip():
                    rows.append(json.loads(line, object_pairs_hook=refuse_duplicate_keys))
            except ValueError as error:
                raise ValueError(f"line {number}: {error} (a .jsonl file has one row a line)") from None
    else:
        try:
            rows = json.loads(text, object_pairs_hook=refuse_duplicate_keys)
        except json.JSONDecodeError as error:
            raise ValueError(f"{error} (a .json file is one list of rows; one row a line is a .jsonl file)") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError('it must be a list of rows: [{"column": value, ...}, ...]')
    if not any(rows):
        raise ValueError("it is empty")
    broken = [n for n, row in enumerate(rows) if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))]
    if broken:
        raise ValueError(f"half a character (a lone surrogate) is in rows {broken[:20]}; fix their encoding")

    # from_generator may divide every list among its arguments, so columns, which it must not divide, are a tuple.
    columns = tuple(dict.fromkeys(key for row in rows for key in row))

    def encoded_rows(rows, columns):  # as JSON text: datasets.Json() would read the text "7" as the number 7
        for row in rows:
            yield {column: json.dumps(row.get(column), ensure_ascii=False) for column in columns}

    features = datasets.Features({column: datasets.Json() for column in columns})
    arguments = {"rows": rows, "columns": columns}
    return datasets.Dataset.from_generator(encoded_rows, features=features, gen_kwargs=arguments)


def load_splits(name, config, revision):
    """{split: Dataset} of a hub id, folder, saved data set or file; a file has only `train`. Raises SystemExit."""
    path = Path(name)
    try:
        if path.suffix.lower() in (".json", ".jsonl"):
            splits = {"train": read_json(path)}
        elif path.suffix.lower() == ".parquet":
            splits = datasets.load_dataset("parquet", data_files=name)
        elif path.is_file():
            raise ValueError("known are .json, .jsonl and .parquet files, folders, saved data sets and hub ids")
        elif (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            splits = datasets.load_from_disk(name)
        else:
            splits = datasets.load_dataset(name, config, revision=revision)
    except (StopIteration, IndexError):
        fail(f"cannot read {name}: it is empty")
    except (OSError, ValueError, RecursionError, datasets.exceptions.DatasetsError) as error:
        fail(f"cannot read {name}: {error.__cause__ or error}")
    return splits if isinstance(splits, dict) else {"train": splits}


def read_dataset(name, split, settings):
    """One split as a Dataset; for split None `test`, or None if there is none. Raises SystemExit.

    New columns: `row`, the number of the row, and `folder`, where its relative image paths start."""
    config, revision = None, None
    if name == getattr(settings, "dataset_name", None):  # they are not those of another data set, for evaluation
        config, revision = settings.dataset_config, settings.dataset_revision
    splits = load_splits(name, config, revision)
    if split is None and "test" not in splits:
        return None
    split = split or "test"
    require(split in splits, f"{name} has no split {split!r}; it has {', '.join(splits)}")

    rows = splits[split]
    undecoded = datasets.Image(decode=False)  # so that the collator can name the row of a broken image
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, undecoded)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(column, datasets.List(undecoded))
    new_columns = ("row", "folder", "length", "image_keys")
    rows = rows.remove_columns([column for column in new_columns if column in rows.column_names])
    folder = os.path.abspath(settings.image_folder or (name if os.path.isdir(name) else os.path.dirname(name)))
    return rows.add_column("row", list(range(len(rows)))).add_column("folder", [folder] * len(rows))


def rename_columns(rows, columns, name, optional=()):
    """Rows of which only these columns are left, under new names: {new: old}. (`id`, `row`, `folder` stay.)

    Columns in `optional` may be missing, all of them together. Raises SystemExit with the flags to name a column."""
    missing = {new: f"{old!r} (--{new}_column)" for new, old in columns.items() if old not in rows.column_names}
    if missing and set(missing) != set(optional):
        own = [column for column in rows.column_names if column not in ("row", "folder")]
        fail(f"{name} has no column {' and '.join(missing.values())}; it has {', '.join(own)}")
    is_unique = len(set(columns.values())) == len(columns)
    require(is_unique, f"one column cannot be two of {', '.join(columns)}: {columns}")
    kept = {old: new for new, old in columns.items() if new not in missing}
    for column in ("id", "row", "folder"):
        if column in rows.column_names:
            kept.setdefault(column, column)
    parts = []
    for old, new in kept.items():
        part = rows.select_columns(old)
        parts.append(part if old == new else part.rename_column(old, new))
    return datasets.concatenate_datasets(parts, axis=1)


def eval_name_and_split(settings, training):
    """(data set, split) of the evaluation rows; split None is `test`, if there is one. None: there are none of their
    own, or nothing is evaluated."""
    if training.eval_strategy == "no":
        return None
    if settings.eval_dataset_name:
        return settings.eval_dataset_name, settings.dataset_test_split or settings.dataset_train_split
    if settings.dataset_test_split is None and settings.dataset_train_split == "test":
        return None  # that is trained on
    return settings.dataset_name, settings.dataset_test_split


def prepare_rows(train_rows, eval_rows, name, collator, settings, training):
    """(train, eval): the rows that the collator accepts. If eval_rows is None, some of train are held out instead;
    eval is None if nothing is to be evaluated (--eval_strategy no, --eval_fraction 0)."""
    if eval_rows is not None:  # drawn before they are checked: no need to decode images that are never scored
        eval_rows = draw_rows(eval_rows, settings.max_eval_rows, training.seed)
        eval_rows = check_rows(eval_rows, "the evaluation data", collator, settings, training)
    train_rows = check_rows(train_rows, name, collator, settings, training)
    if eval_rows is not None:
        return train_rows, eval_rows
    if training.eval_strategy == "no" or settings.eval_fraction == 0:
        return train_rows, None
    refuse_run_with_other_split(training)
    return hold_out(train_rows, settings, training)


def check_rows(rows, name, collator, settings, training):
    """The rows that the collator accepts, with two new columns that hold_out and the sampler use: `length`, in tokens,
    and `image_keys`. The other rows are left out, or the program ends and names them (--on_bad_rows)."""

    def try_row(row, changed_at):
        try:
            length = collator([row])["attention_mask"].shape[1]
            keys = [image_key(image) for image in collator.images_of(row)]
        except BadRow as error:
            return {"reason": error.reason, "detail": error.detail, "length": 0, "image_keys": []}
        return {"reason": None, "detail": None, "length": length, "image_keys": keys}

    require(len(rows) > 0, f"{name} is empty: there is nothing to train on")
    text, number = datasets.Value("string"), datasets.Value("int64")
    features = datasets.Features(reason=text, detail=text, length=number, image_keys=datasets.List(text))
    # map() reuses its result while function and arguments stay the same. The function holds the collator with all its
    # attributes; `changed_at` is given so that rows are checked again when an image file has changed.
    options = {"features": features, "fn_kwargs": {"changed_at": times_of_change(rows, collator)}}
    if len(rows) > 1000:
        options["num_proc"] = getattr(training, "dataset_num_proc", None) or os.cpu_count()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process would wait forever for OpenMP's threads, which only its parent has
    with training.main_process_first(desc=f"checking {name}"):
        results = rows.map(try_row, remove_columns=rows.column_names, desc=f"Checking {name}", **options)
    torch.set_num_threads(threads)

    found = zip(results["reason"], results["detail"], strict=True)
    problems = {n: (reason, detail) for n, (reason, detail) in enumerate(found) if reason is not None}
    report_problems(rows, problems, name, settings)
    rows = datasets.concatenate_datasets([rows, results.select_columns(["length", "image_keys"])], axis=1)
    return rows.select([n for n in range(len(rows)) if n not in problems])


def times_of_change(rows, collator):
    """[(path, time of its last change)] of the image files that these rows name."""
    columns = []
    for column in set(collator.image_columns).intersection(rows.column_names):
        has_paths = isinstance((stored_images(rows[0][column], "") or [None])[0], str)
        if has_paths or "Image(" not in str(rows.features[column]):  # embedded images are no files
            columns.append(column)
    if not columns:
        return []
    paths = set()
    for row in rows.select_columns([*columns, "folder"]):
        with contextlib.suppress(BadRow):  # such a row is reported when the collator reads it
            paths.update(image for image in collator.images_of(row) if isinstance(image, str))
    return [(path, os.stat(path).st_mtime_ns) for path in sorted(paths) if os.path.exists(path)]


def report_problems(rows, problems, name, settings):
    """Print the rows with a problem, which are left out; or stop with that as the message. Raises SystemExit."""
    if not problems:
        return
    counts = Counter(reason for reason, _ in problems.values())
    totals = ", ".join(f"{count} x {reason}" for reason, count in counts.most_common())
    lines = [f"{len(problems)} of {len(rows)} rows of {name} cannot be trained on: {totals}"]
    shown = sorted(problems, key=lambda n: problems[n][0] == "too long")[:20]  # broken rows first
    for n, row in zip(shown, rows.select(shown), strict=True):
        reason, detail = problems[n]
        identity = f" (id {row['id']})" if row.get("id") not in (None, "") else ""
        lines.append(f"  row {row['row']}{identity}: {reason}: {detail}")
    if len(problems) > len(shown):
        lines.append(f"  ... and {len(problems) - len(shown)} more")

    too_long = counts["too long"]
    broken = len(problems) - too_long
    none_left = len(problems) == len(rows)
    stop_on_broken = broken > 0 and settings.on_bad_rows == "stop"
    stop_on_long = too_long > 0 and settings.on_long_rows == "stop"
    if not (none_left or stop_on_broken or stop_on_long):
        PartialState().print("left out:", "\n".join(lines))
        return
    if broken > 0:
        lines.append("Fix these rows (counted from 0), or train without them: --on_bad_rows skip")
    if too_long > 0:
        lines.append("Raise the maximum length, or train without the long rows: --on_long_rows drop")
    if none_left:
        lines.append("No row would be left.")
    fail("\n".join(lines))


def draw_rows(rows, count, seed):
    """At most `count` of these rows, drawn by seed: the same ones in every evaluation."""
    return rows.shuffle(seed).select(range(min(len(rows), count))).flatten_indices()


def hold_out(rows, settings, training):
    """Divide rows into (train, eval): about --eval_fraction of the images, chosen by seed, are for evaluation. Of
    their rows --max_eval_rows are scored, and the rest are not used. Rows that share an image go to the same side,
    directly or through other rows: another question about an image that was trained on would be no test."""
    # 1. Groups of images that rows connect. A row without images counts as one image.
    images_of_row = [keys or [f"row {number}"] for number, keys in zip(rows["row"], rows["image_keys"], strict=True)]
    connected = UnionFind()
    for images in images_of_row:
        connected.union(*images)
    groups = list(connected.to_sets())
    group_of_image = {image: group for group in groups for image in group}
    # 2. Image by image in random order, take its group, until there are enough.
    order = sorted(group_of_image)
    random.Random(training.seed).shuffle(order)
    held_out, room = set(), max(1, round(settings.eval_fraction * len(order)))
    for image in order:
        group = group_of_image[image]
        if image not in held_out and len(group) <= room:  # a larger group than there is room for is trained on
            held_out |= group
            room -= len(group)
    if not held_out:
        held_out = min(groups, key=len)
    train = rows.select([n for n, images in enumerate(images_of_row) if images[0] not in held_out])
    evaluation = rows.select([n for n, images in enumerate(images_of_row) if images[0] in held_out])
    remedy = "without an image in both: --eval_fraction 0 turns evaluation off"
    require(len(train) > 0, f"{len(rows)} rows cannot be divided into training and evaluation {remedy}")
    return train, draw_rows(evaluation, settings.max_eval_rows, training.seed)


def refuse_run_with_other_split(training):
    """Stop if output_dir holds a run of an earlier version: it lacks SPLIT_NOTE, and has held out other rows."""
    output_dir = Path(training.output_dir)
    settings = output_dir / "settings.yaml"
    is_begun = any(output_dir.glob("checkpoint-*")) or (output_dir / "trainer_state.json").exists()
    if is_begun and settings.exists() and SPLIT_NOTE not in settings.read_text(encoding="utf-8"):
        problem = f"{output_dir} holds a run of an earlier version, which held out other rows for evaluation"
        fail(f"{problem}: use that version for it, or choose another --output_dir")


# ------------------------------------------------------------------------------------------------------------ training


def keep_4bit_trainable_on_cpu(model):
    """On a CPU, bitsandbytes' first eval() would repack 4-bit weights for a kernel that has no autograd."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def nf4_quantization(dtype, skip_modules):
    """4-bit NF4 with double quantization (QLoRA, arXiv:2305.14314), computing in `dtype`.
    `skip_modules` keep their 16 bits. They replace bitsandbytes' own list, so name lm_head, too. They are full paths:
    a bare "vision_tower" would match nothing."""
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip_modules, **nf4)


def lora_targets(names, language_model, default):
    """--lora_target_modules -> what LoraConfig takes: `default`, or a regex that must match a module's full path.

    One name with regex characters is that regex. Others are names of layers within `language_model`, a path."""
    if not names:
        return default
    is_one_regex = len(names) == 1 and re.search(r"[\\^$*+?|()\[\]{}]", names[0])
    if not is_one_regex:
        return rf"{re.escape(language_model)}\.(.*\.)?({'|'.join(map(re.escape, names))})"
    try:
        re.compile(names[0])
    except re.error as error:
        fail(f"--lora_target_modules {names[0]!r} is no regular expression: {error}")
    return names[0]


def check_lora_targets(settings, adapter, model, untrainable):
    """Stop if a LoRA target is no linear layer of the model, or one that cannot be trained. Raises SystemExit.
    adapter: the LoraConfig, or None. model: may be an empty_model. untrainable: {part of a path: reason}."""
    if adapter is None:
        return
    targets = adapter.target_modules
    matched = []
    for name, module in model.named_modules():
        if targets == "all-linear":  # PEFT leaves lm_head out
            is_target = module is not model.get_output_embeddings()
        elif isinstance(targets, str):
            is_target = re.fullmatch(targets, name)
        else:
            is_target = f".{name}".endswith(tuple(f".{target}" for target in targets))
        if is_target and isinstance(module, torch.nn.Linear):
            matched.append(name)
    names = settings.lora_target_modules or []
    for wanted in names:
        is_found = any(f".{name}".endswith(f".{wanted}") for name in matched)
        if len(names) == 1 and not is_found:  # it may be a regex
            is_found = any(re.fullmatch(wanted, name) for name in matched)
        require(is_found, f"--lora_target_modules {wanted}: no such linear layer; give names (q_proj) or one regex")
    for part, reason in untrainable.items():
        inside = [name for name in matched if f".{part}." in f".{name}."]
        require(not inside, f"--lora_target_modules: {inside[:1]} is in {part}, {reason}")


def empty_model(settings):
    """The model without weights (on the meta device), to look at its modules before any are loaded."""
    with fail_on_error(f"--model_name_or_path {settings.model_name_or_path}"), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(settings.model_name_or_path, revision=settings.model_revision)
        return transformers.AutoModelForImageTextToText.from_config(config)


def train_in_float32(model):
    """Make trained weights float32: in 16 bits small steps round to nothing, and fp16 gradients cannot be scaled."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def print_parameters(model, parts, rate_of=None):
    """Print how many parameters each part of the model has, how many are trained and in 4-bit, and their learning rate
    by `rate_of(name)`. A weight belongs to the first part whose name is in its own, or else to the last one."""
    counts = {part: Counter() for part in parts}
    rates = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        if "original_module." in name:  # PEFT trains a copy of it
            continue
        part = next((part for part in parts if part in name), parts[-1])
        size = getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 a process has a share of it
        if type(parameter).__name__ == "Params4bit":
            size *= 2  # a byte holds two
            counts[part]["in 4-bit"] += size
        counts[part]["all"] += size
        if parameter.requires_grad:
            counts[part]["trained"] += size
            rates[part] = rate_of(name) if rate_of else 0
    for part, count in counts.items():
        if count["all"] > 0:
            rate = f" at {rates[part]:g}" if rate_of else ""
            line = f"{part:22s}{count['trained']:>14,} of {count['all']:>14,} parameters trained{rate}"
            PartialState().print(f"{line}, {count['in 4-bit']:>14,} in 4-bit")


def marked(batch, processor, n=0):
    """Row n of a batch as text: trained tokens in «», runs of image tokens folded, padding left out."""
    real = batch["attention_mask"][n].bool()
    ids = batch["input_ids"][n][real].tolist()
    is_trained = (batch["labels"][n][real] != -100).tolist()
    is_image = [token == processor.image_token_id for token in ids]
    text, decoded, end = "", "", 0
    for (image, trained), run in itertools.groupby(zip(is_image, is_trained, strict=True)):
        count = len(list(run))
        end += count
        # Decoded from the start each time: a run by itself would lose its leading space.
        before, decoded = decoded, processor.tokenizer.decode(ids[:end])
        piece = decoded[len(before) :]
        if image:
            text += f"<image> x {count}"
        elif trained:
            text += f"«{piece}»"
        else:
            text += piece
    return text


def next_tokens(labels):
    """labels (B, L) -> what each position must predict (B, L): the label of the next one, -100 where there is none."""
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


class ReplacedForwards(transformers.TrainerCallback):
    """Gives modules another forward until training ends, then their own again, so that the model can be merged."""

    def __init__(self):
        self.modules = []

    def replace(self, module, forward):
        module.forward = functools.wraps(module.forward)(forward)  # generate() reads the names of its arguments
        self.modules.append(module)

    def on_train_end(self, args, state, control, **kwargs):
        for module in self.modules:
            vars(module).pop("forward", None)  # from here on the forward of its class again


class LongestFirst(torch.utils.data.Sampler):
    """Optional, for speed: the Trainer's random order, but within each optimizer step the longest rows come first.
    Rows of similar length then share a batch, so there is less padding. A step has the same rows and the same loss.
    `generator()` returns the random numbers of the current epoch."""

    def __init__(self, lengths, rows_per_step, generator):
        self.lengths = list(lengths)
        self.rows_per_step = rows_per_step
        self.generator = generator

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        order = torch.randperm(len(self), generator=self.generator()).tolist()
        for start in range(0, len(order), self.rows_per_step):
            step = order[start : start + self.rows_per_step]
            if len(step) == self.rows_per_step:
                step.sort(key=lambda row: -self.lengths[row])
            yield from step


def longest_first(trainer):
    """A LongestFirst sampler for this trainer; None if it would change nothing, or if another order was asked for."""
    args = trainer.args
    batches_per_step = args.gradient_accumulation_steps * args.world_size
    has_padding = args.train_batch_size * args.world_size > 1  # or GPUs that wait for each other
    if batches_per_step == 1 or not has_padding or args.train_sampling_strategy != "random":
        return None
    lengths = trainer.train_dataset.with_format(None)["length"]
    return LongestFirst(lengths, args.train_batch_size * batches_per_step, lambda: epoch_generator(trainer))


def epoch_generator(trainer):
    """Random numbers for the order of rows in the current epoch, the same on all GPUs and after a resume."""
    seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
    epoch = int(trainer.state.epoch or 0)  # after a resume Trainer does not call set_epoch on samplers of ours
    return torch.Generator().manual_seed(seed + epoch)


def text_of(message):
    """The words of a message, without its images."""
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


def images_in(messages):
    """The images of a conversation, in their order."""
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]


def last_answer(messages):
    """The index of the assistant's last message."""
    return max(n for n, message in enumerate(messages) if message["role"] == "assistant")


Answer = namedtuple("Answer", "text num_tokens ended")  # ended: whether it stopped by itself, and not at the limit


def answer_rows(trainer, rows, max_new_tokens):
    """Greedy answers to the last question of each row: a list of Answer, the same in all processes. Each answers a
    share of the rows; under ZeRO-3, where all must use the same weights at the same time, each answers all."""
    share = range(len(rows))
    if not is_deepspeed_zero3_enabled():
        share = share[PartialState().process_index :: PartialState().num_processes]
    batch_size = trainer.args.per_device_eval_batch_size
    answers = {}  # number of a row -> Answer
    for start in range(0, len(share), batch_size):
        numbers = share[start : start + batch_size]
        answers |= zip(numbers, answer_batch(trainer, [rows[n] for n in numbers], max_new_tokens), strict=True)
    all_answers = dict(gather_object(list(answers.items())))
    return [all_answers[n] for n in range(len(rows))]


def answer_batch(trainer, rows, max_new_tokens):
    """Greedy answers to the last question of each row, generated together: a list of Answer."""
    collator, device = trainer.data_collator, trainer.args.device
    conversations = [collator.read(row) for row in rows]
    questions = [messages[: last_answer(messages)] for messages in conversations]
    batch = collator.tokenize(questions, prompt=True).to(device)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "use_cache": True}
    options["eos_token_id"] = collator.stop_ids
    options["max_length"] = None  # the one in the model's generation config would only cause a warning
    trainer.model.eval()  # each training step turns training mode on again
    with torch.no_grad(), trainer.accelerator.autocast():
        ids = trainer.model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    # From the stop token on, also in the padding after it:
    is_over = torch.isin(ids, torch.tensor(collator.stop_ids, device=device)).cumsum(dim=1) > 0
    answers = []
    for row_ids, over in zip(ids, is_over, strict=True):
        text = collator.processor.tokenizer.decode(row_ids, skip_special_tokens=True).strip()
        answers.append(Answer(text, num_tokens=int((~over).sum()), ended=bool(over.any())))
    return answers


def append_samples(output_dir, title, columns, samples):
    """Append a table to samples.md, its images to samples/. A sample is (row number, messages with images, texts); the
    texts fill the columns after the first, which holds the images."""
    folder = Path(output_dir, "samples")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"\n## {title}\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for number, messages, texts in samples:
        links = []
        for n, image in enumerate(images_in(messages)):
            ImageOps.contain(image, (336, 336)).save(folder / f"{number}-{n}.png")
            links.append(f"![](samples/{number}-{n}.png)")
        cells = [" ".join(text.replace("|", "&#124;").split()) for text in [" ".join(links), *texts]]
        lines.append(f"| {' | '.join(cells)} |")
    with open(Path(output_dir, "samples.md"), "a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


# --------------------------------------------------------------------------------------------------------- checkpoints


def is_whole(checkpoint):
    """Whether a run can be resumed from this checkpoint, which may have been cut off while it was written."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        if "global_step" not in state or "train_batch_size" not in state:
            return False
        weights, random_states = list(checkpoint.glob("*.safetensors")), list(checkpoint.glob("rng_state*"))
        for file in weights:
            safe_open(file, "pt")  # raises where the end of the file is missing
        optimizer = [checkpoint / "optimizer.pt"]
        if (checkpoint / "latest").exists():  # DeepSpeed's, which names a folder with a share of each process
            optimizer = list((checkpoint / (checkpoint / "latest").read_text().strip()).glob("*.pt")) or optimizer
        others = [*optimizer, checkpoint / "scheduler.pt", *random_states]
        return bool(weights) and bool(random_states) and all(zipfile.is_zipfile(file) for file in others)
    except (OSError, ValueError, TypeError, SafetensorError):
        return False


def checkpoint_to_resume(training):
    """The checkpoint to resume from, or None. Exits with status 0 where the run is finished. Raises SystemExit."""
    output_dir, wanted = Path(training.output_dir), training.resume_from_checkpoint
    checkpoints = [folder for folder in output_dir.glob("checkpoint-*") if folder.name.split("-")[1].isdigit()]
    checkpoints.sort(key=lambda folder: int(folder.name.split("-")[1]))
    whole = [folder for folder in checkpoints if is_whole(folder)]
    finished = (output_dir / "trainer_state.json").exists()

    if wanted.lower() == "false":
        require(not checkpoints and not finished, f"{output_dir} holds a run already: choose another --output_dir")
        require_writable(output_dir)
        return None
    if wanted.lower() != "auto":
        names = [str(folder) for folder in whole]
        require(is_whole(Path(wanted)), f"--resume_from_checkpoint {wanted}: no whole checkpoint; whole are {names}")
        return wanted
    if whole or finished:
        require_same_settings(training)
    if finished:
        PartialState().print(f"{output_dir} holds this run, finished. For another one choose another --output_dir.")
        PartialState().destroy_process_group()
        sys.exit(0)
    require_writable(output_dir)
    for folder in checkpoints:
        if folder not in whole:
            PartialState().print(f"{folder} is incomplete, skipped")
    return str(whole[-1]) if whole else None


def require_same_settings(training):
    """Stop if output_dir holds a run with other settings. Raises SystemExit."""
    output_dir = Path(training.output_dir)
    remedy = "choose another --output_dir, or resume from it all the same with --resume_from_checkpoint CHECKPOINT"
    try:
        old = dict(yaml.safe_load((output_dir / "settings.yaml").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, yaml.YAMLError):
        fail(f"{output_dir} holds a run without the settings.yaml that says which one: {remedy}")
    changes = []
    for name, value in training.given.items():
        if name in old and old[name] != value and name not in FREE_TO_CHANGE:
            changes.append(f"{name} {old[name]} -> {value}")
    require(not changes, f"{output_dir} holds a run with other settings ({', '.join(changes)}): {remedy}")


def require_writable(output_dir):
    """Stop if output_dir could not be written. Raises SystemExit."""
    existing = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        fail(f"--output_dir {output_dir} cannot be written: {error}")


def write_settings(training):
    """Write settings.yaml, atomically. A trainer_state.json, the mark of a finished run, is removed."""
    output_dir = Path(training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    text = f"# {Path(__file__).name}\n{SPLIT_NOTE}\n" + yaml.safe_dump(training.given, sort_keys=False)
    (output_dir / "settings.part").write_text(text, encoding="utf-8")
    os.replace(output_dir / "settings.part", output_dir / "settings.yaml")
    (output_dir / "trainer_state.json").unlink(missing_ok=True)


def train_and_save(trainer, checkpoint=None):
    """Print the plan, train, save the result in output_dir. Raises SystemExit."""
    args, say = trainer.args, PartialState().print
    steps = print_plan(trainer, checkpoint)
    if args.process_index == 0:
        write_settings(args)
    try:
        is_trained = checkpoint is not None and load_finished_training(trainer, checkpoint, steps)
        if not is_trained:
            trainer.train(resume_from_checkpoint=checkpoint)
    except BadRow as error:
        # From a loader it is a traceback, whose last line is the message. Perhaps only this process has met the row.
        sys.exit(f"error: the data changed during the run: {str(error).splitlines()[-1]}")
    except KeyboardInterrupt:
        fail(f"interrupted; the same command resumes from the newest checkpoint in {args.output_dir}, if there is one")

    trainer.save_model()  # also pushes to the hub with --push_to_hub
    trainer.save_state()  # last: its file says that the run is finished
    state = trainer.state
    if args.load_best_model_at_end and state.best_metric is not None:
        best = f"{args.metric_for_best_model}: {state.best_metric:.4g}, at step {state.best_global_step}"
        say(f"best {best}; that is saved")
    trainer.accelerator.wait_for_everyone()  # a process that leaves while another one writes may take it down
    if args.world_size > 1:
        time.sleep(0.5)  # Gloo ends that barrier in a thread, which aborts as Python ends: PyTorch's issue 190489
    trainer.accelerator.end_training()
    say(f"saved {args.output_dir}: what was trained, processor, settings.yaml, trainer_state.json (the log)")


def print_plan(trainer, checkpoint):
    """Print what will be trained. Returns the number of optimizer steps of the whole run."""
    args, num_rows = trainer.args, len(trainer.train_dataset)
    rows_per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(num_rows / rows_per_step)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    start = f"resuming from {checkpoint}" if checkpoint else "from the start"
    PartialState().print(
        f"{num_rows} rows to train on, {len(trainer.eval_dataset or ())} to evaluate; "
        f"{steps} steps of {rows_per_step} rows, {steps / steps_per_epoch:.2f} epochs; {start}"
    )
    if args.eval_strategy == "steps" and args.eval_steps > steps:
        PartialState().print(f"warning: nothing will be evaluated, --eval_steps {args.eval_steps:g} is above {steps}")
    return steps


def load_finished_training(trainer, checkpoint, steps):
    """If a run was killed after its last step, but before its result was saved, load the result and return True."""
    state = transformers.TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    is_at_end = state.global_step >= max(steps, state.max_steps)
    if not is_at_end or trainer.is_deepspeed_enabled:  # DeepSpeed can load a checkpoint only in train()
        return False
    trainer.state = state  # train() is not called, it would take one more step
    result = Path(checkpoint)
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        result = Path(checkpoint).parent / Path(state.best_model_checkpoint).name  # the folder may have moved
    remedy = "--load_best_model_at_end false saves the last one"
    require(is_whole(result), f"{result}, the best checkpoint, is missing or damaged: {remedy}")
    trainer._load_from_checkpoint(str(result))
    return True


if __name__ == "__main__":
    main()
