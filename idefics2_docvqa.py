# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0", "pillow==13.0.0",
#   "bitsandbytes==0.50.2", "pyyaml==6.0.3", "jinja2==3.1.6", "tensorboard==2.21.0", "rapidfuzz==3.14.6",
#   "networkx==3.6.1",
# ]
# ///
"""Fine-tune Idefics2-8b on questions about documents: 4-bit NF4 + LoRA, transformers' Trainer, one 16 GB GPU.

    python idefics2_docvqa.py                                            # idefics2-8b on docvqa_1200_examples, English
    python idefics2_docvqa.py --dataset_name train.jsonl --image_folder pages   # your own: image, question, answers
    python idefics2_docvqa.py --language fr --longest_edge 700           # another language; smaller pages: faster
    accelerate launch --num_processes 4 idefics2_docvqa.py               # several GPUs, DDP
    python idefics2_docvqa.py --config idefics2-docvqa/settings.yaml     # resume that run after a crash

Loss: next-token cross-entropy, averaged over all trained tokens of an optimizer step.
Trained tokens: the answer and the <end_of_utterance> after it. Instruction, page and question are read, not trained.
    If a row has several accepted answers, each epoch trains one of them, drawn by seed.
Trained weights: LoRA on the attention projections of the language model and of the perceiver resampler, and on
    lm_head. The vision tower stays frozen.
Result: the checkpoint with the highest eval_anls, the mean ANLS of the answers to held-out questions.
    --load_best_model_at_end false keeps the last checkpoint instead.
Every setting is a flag: python idefics2_docvqa.py --help. The formats of a row are shown in load_data."""

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
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageOps
from rapidfuzz.distance import Levenshtein
from safetensors import SafetensorError, safe_open
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


@dataclass
class Settings:
    """Model, adapter, data, evaluation. Each line is a flag: --lora_r 32."""

    # model
    model_name_or_path: str = HfArg(default="HuggingFaceM4/idefics2-8b", help="Idefics2: hub id or folder.")
    model_revision: str | None = HfArg(default=None, help="Branch, tag or commit of the model, to repeat a run.")
    load_in_4bit: bool = HfArg(default=True, help="Language model in 4-bit NF4. false: 16 bits, 11 GB more.")
    # adapter
    lora_r: int = HfArg(default=8, help="Rank of the adapter.")
    lora_alpha: int = HfArg(default=8, help="The adapter is scaled by alpha / r.")
    lora_dropout: float = HfArg(default=0.1, help="Dropout before the adapter.")
    lora_target_modules: list[str] | None = HfArg(
        default=None, help="q_proj v_proj: only in the language model, not resampler or lm_head. Or one regex."
    )
    use_dora: bool = HfArg(default=False, help="DoRA: weight-decomposed LoRA; slower, at low ranks sometimes better.")
    # prompt and pages
    instruction: str = HfArg(default="Answer briefly.", help="Said before the page. Use the same words at inference.")
    language: str = HfArg(default="en", help="Language of the question, if a row has several.")
    image_splitting: bool = HfArg(default=False, help="Also show the page's four quarters; helps with small print.")
    longest_edge: int | None = HfArg(default=None, help="Longest side of a page in pixels. Default: the model's 980.")
    max_length: int = HfArg(default=1024, help="Longest row in tokens, 64 for the page (split: 320). Never cut.")
    # data
    dataset_name: str = HfArg(default="nielsr/docvqa_1200_examples", help="Hub id, folder or file of rows.")
    dataset_config: str | None = HfArg(default=None, help="Configuration of a hub data set that has several.")
    dataset_revision: str | None = HfArg(default=None, help="Branch, tag or commit of the data set.")
    dataset_train_split: str = HfArg(default="train", help="Split to train on.")
    dataset_test_split: str | None = HfArg(
        default=None, help="Split to evaluate on. Default: test, if any; of eval_dataset_name: dataset_train_split."
    )
    eval_dataset_name: str | None = HfArg(default=None, help="Evaluate on another data set, in any of the same forms.")
    image_folder: str | None = HfArg(default=None, help="Where relative image paths start. Default: beside the .json.")
    image_column: str = HfArg(default="image", help="Column of the page.")
    question_column: str | None = HfArg(default=None, help="Column of the question. Default: query, else question.")
    answers_column: str | None = HfArg(default=None, help="Column of the answers. Default: answers, else answer.")
    eval_fraction: float = HfArg(default=0.05, help="Share of the pages held out, if there is no such split. 0: none.")
    max_eval_rows: int = HfArg(default=100, help="Most rows to evaluate on, always the same ones.")
    on_bad_rows: Literal["stop", "skip"] = HfArg(default="stop", help="If rows cannot be trained on: stop, or skip.")
    on_long_rows: Literal["drop", "stop"] = HfArg(default="drop", help="Rows above max_length: drop them, or stop.")
    # evaluation
    max_new_tokens: int = HfArg(default=32, help="Most tokens of an answer at an evaluation; longer ones are cut.")
    sample_rows: int = HfArg(default=8, help="Number of scored rows to show in samples.md. 0: none.")


@dataclass
class Training(TrainingArguments):
    """TrainingArguments with this recipe's defaults. All its other settings are flags, too."""

    output_dir: str = HfArg(default="idefics2-docvqa", help="Adapter, processor, settings, samples, checkpoints.")
    resume_from_checkpoint: str = HfArg(default="auto", help="auto: the newest one. false: a new run. Or a folder.")
    num_train_epochs: float = HfArg(default=3.0, help="Passes over the data. max_steps, if given, wins.")
    per_device_train_batch_size: int = HfArg(default=2, help="Raise it first if memory is left.")
    per_device_eval_batch_size: int = HfArg(default=4, help="Questions answered at once.")
    gradient_accumulation_steps: int = HfArg(default=8, help="Effective batch = this x per-device batch x GPUs.")
    learning_rate: float = HfArg(default=1e-4, help="1e-4 suits LoRA on short answers.")
    warmup_steps: float = HfArg(default=0.1, help="Steps, or below 1 a share of the run.")
    weight_decay: float = HfArg(default=0.01, help="AdamW's weight decay on the adapters.")
    eval_strategy: str = HfArg(default="steps", help="When to evaluate: steps, epoch, no.")
    eval_steps: float = HfArg(default=25, help="Steps between evaluations.")
    save_steps: float = HfArg(default=25, help="Steps between checkpoints; a crash loses at most this many.")
    save_total_limit: int | None = HfArg(default=2, help="Checkpoints kept: the newest and the best.")
    load_best_model_at_end: bool = HfArg(default=True, help="Result: the best checkpoint. false: last weights.")
    metric_for_best_model: str | None = HfArg(default="anls", help="anls or exact_match (highest), or loss (lowest).")
    logging_steps: float = HfArg(default=5, help="Steps between two lines of the log.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="true hides NaN losses in the log.")
    report_to: str = HfArg(default="tensorboard", help="tensorboard, wandb, trackio, ..., none.")
    dataloader_num_workers: int = HfArg(default=4, help="Processes that decode pages while the GPU works.")
    remove_unused_columns: bool = HfArg(default=False, help="Must stay false: the collator reads the columns.")
    prediction_loss_only: bool = HfArg(default=True, help="Must stay true: scores need generated answers, no logits.")
    ddp_find_unused_parameters: bool | None = HfArg(default=False, help="Not needed: every row uses all adapters.")
    activation_checkpointing: bool = HfArg(default=True, help="gradient_checkpointing's new name: saves memory.")
    bf16: bool | None = HfArg(default=None, help="Default: bf16 if the GPU has it, else fp16.")

    def __post_init__(self):
        pick_precision(self)
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False
        super().__post_init__()


# TrainingArguments' flags that this recipe does not use, beside UNUSED_FLAGS.
REFUSED = "label_smoothing_factor label_names prediction_loss_only use_liger_kernel".split()
METRICS = ("anls", "exact_match", "loss")  # what --metric_for_best_model may be; `score` computes the first two


def parse(argv=None):
    """Flags and `--config run.yaml` -> (Settings, Training). Raises SystemExit."""
    return parse_arguments(HfArgumentParser([Settings, Training], allow_abbrev=False), REFUSED, argv)


def check(settings, training):
    """Stop early if this machine or these flags cannot work. Raises SystemExit."""
    check_training(settings, training, "Idefics2-8b needs 16 GB", metrics=METRICS)
    require(training.learning_rate > 0, "--learning_rate must be above 0")
    for name in ("lora_r", "max_length", "max_new_tokens"):
        require(getattr(settings, name) >= 1, f"--{name} must be at least 1")


END = "<end_of_utterance>"  # what Idefics2's chat template puts after each turn
NEEDED = f"this needs an Idefics2Processor whose chat template ends each turn with {END}, such as idefics2-8b's"


def load_processor(settings):
    """The model's processor, set to this run's image splitting and size. Raises SystemExit for another model."""
    name = settings.model_name_or_path
    with fail_on_error(f"--model_name_or_path {name}: {NEEDED}"):
        processor = AutoProcessor.from_pretrained(name, revision=settings.model_revision)
    kind = type(processor).__name__
    if kind != "Idefics2Processor" or END not in (processor.chat_template or ""):
        fail(f"{name} has another processor or template ({kind}); {NEEDED}")
    image_processor = processor.image_processor
    image_processor.do_image_splitting = settings.image_splitting
    if settings.longest_edge is not None:
        least, most = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
        if not least <= settings.longest_edge <= most:
            fail(f"--longest_edge {settings.longest_edge}: this model shows pages with {least} to {most} pixels")
        image_processor.size = {"shortest_edge": least, "longest_edge": settings.longest_edge}
    if processor.tokenizer.pad_token is None:  # any token will do: padding is masked
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def load_data(settings, training):
    """-> (train, eval): Datasets of checked rows; eval is None if nothing is to be evaluated. Raises SystemExit.
    A row is a page, a question and its accepted answers. The page is a path, bytes or an embedded image:
        {"image": page, "question": "What is the total?", "answers": ["$47.00", "47.00"]}
        {"image": page, "question": "Who sent it?", "answer": "Ann Lee"}
        {"image": page, "query": {"en": "Who sent it?", "fr": "Qui l'a envoyé ?"}, "answers": ["Ann Lee"]}"""
    collator = Collator(load_processor(settings), settings, training)
    train_rows = read_rows(settings.dataset_name, settings.dataset_train_split, settings)
    eval_source = eval_name_and_split(settings, training)
    eval_rows = None  # None: prepare_rows holds out some training rows, unless evaluation is off
    if eval_source is not None:
        eval_rows = read_rows(*eval_source, settings)
    return prepare_rows(train_rows, eval_rows, settings.dataset_name, collator, settings, training)


class Collator:
    """Rows -> a batch: input_ids, attention_mask, labels (B, L), pixel_values (B, n, 3, H, W), pixel_attention_mask
    (B, n, H, W); n is 1, or 5 with image splitting. labels are the input_ids of the answer and the
    <end_of_utterance> after it, and -100 on all else: prompt, image tokens, padding, the template's last newline."""

    image_columns = ("image",)

    def __init__(self, processor, settings, training):
        # Keep only what shapes a batch: all attributes are part of the key by which checked rows are cached.
        self.processor = processor
        self.instruction = settings.instruction
        self.language = settings.language
        self.folder = settings.image_folder or ""
        self.max_length = settings.max_length
        self.seed = training.seed
        tokenizer = processor.tokenizer
        self.control_tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.end_id = tokenizer.convert_tokens_to_ids(END)
        self.stop_ids = [self.end_id, tokenizer.eos_token_id]  # where generation ends
        if self.instruction:
            with fail_on_error("--instruction"):
                check_text(self.instruction, "instruction", self.control_tokens)

    def __call__(self, rows):
        examples = []
        for row in rows:
            try:
                examples.append(self.prepare(row))
            except BadRow as error:
                error.row = row.get("row")
                raise
        pages, input_ids, labels = zip(*examples, strict=True)
        tokenizer = self.processor.tokenizer
        batch = tokenizer.pad({"input_ids": list(input_ids)}, return_tensors="pt")
        side = tokenizer.padding_side
        batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=-100, padding_side=side)
        batch.update(self.processor.image_processor(list(pages), return_tensors="pt"))
        return batch

    def prepare(self, row):
        """A row -> (list of PIL images, token ids, labels), with one of its accepted answers. Raises BadRow."""
        question, answers = self.read_texts(row)
        if not answers:
            raise BadRow("no accepted answer", "the row has none; see --answers_column")
        pages = self.load_pages(row)
        user_turn = self.ask(question, pages)
        # One answer is trained, but all are tokenized, so that the check before training finds a bad one.
        encoded = [self.tokens_and_labels(user_turn, answer) for answer in answers]
        length = max(len(ids) for ids, _ in encoded)
        if length > self.max_length:
            raise BadRow("too long", f"{length} tokens, --max_length is {self.max_length}")
        ids, labels = encoded[self.pick_answer(row, len(answers))]
        return pages, ids, labels

    def read_texts(self, row):
        """A row -> (question, list of accepted answers), without white space around them. Raises BadRow."""
        stored_question, stored_answers = row.get("question"), row.get("answers")
        question = stored_question
        if isinstance(stored_question, dict):
            languages = [name for name, text in stored_question.items() if text]
            if self.language not in languages:
                raise BadRow("language", f"no question in {self.language!r}, there are {languages}; see --language")
            question = stored_question[self.language]
        answers = stored_answers
        if not isinstance(stored_answers, list):
            answers = [] if stored_answers is None else [stored_answers]
        check_text(question, "question", self.control_tokens)
        for answer in answers:
            check_text(answer, "answer", self.control_tokens)
        return question.strip(), [answer.strip() for answer in answers]

    def load_pages(self, row):
        """The images of a row, as PIL RGB, upright. Raises BadRow."""
        # Edit pages here, to crop or augment them (for evaluation, too). Above 1 : 20 Idefics2 would distort them.
        return [load_image(image, max_aspect_ratio=20) for image in self.images_of(row)]

    def images_of(self, row):
        """The images of a row as it has them: paths, {"bytes": ...} or PIL images."""
        return stored_images(row.get("image"), row.get("folder") or self.folder)

    def ask(self, question, pages):
        """A question about a list of one PIL image -> the user's turn. Raises BadRow."""
        # For several pages a row: allow them here, and raise --max_length by 64 tokens for each (split: 320).
        if len(pages) != 1:
            raise BadRow("not one page", f"{len(pages)} pages; a question is about one (see --image_column)")
        for page in pages:
            if min(page.size) < 2:  # image splitting could not quarter it
                raise BadRow("page too small", f"{page.width} x {page.height} pixels, there is nothing to read on it")
        # Edit the prompt here: the order of the parts, other words around the question. Labels and evaluation follow
        # it. Change your inference code in the same way, and text_of, if the question is no longer the last part.
        parts = [{"type": "image", "image": page} for page in pages]
        if self.instruction:
            parts.insert(0, {"type": "text", "text": self.instruction})
        return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}

    def tokens_and_labels(self, user_turn, answer):
        """The user's turn and an answer -> token ids (a list) and labels (a tensor of the same length). Raises BadRow.
        The answer begins where the prompt that the model gets at inference ends, and runs to its END. The processor
        gets no images here: it writes the 64 image tokens of a page (split: 320) into the text without them, too."""
        assistant_turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        prompt = self.processor.apply_chat_template([user_turn], add_generation_prompt=True)
        whole = self.processor.apply_chat_template([user_turn, assistant_turn])
        prompt_ids, ids = self.processor(text=[prompt, whole])["input_ids"]
        start = len(prompt_ids)
        if ids[:start] != prompt_ids:
            raise BadRow("prompt changed", f"the first characters of the answer {answer!r} change the prompt's tokens")
        end = ids.index(self.end_id, start) + 1
        labels = torch.full((len(ids),), -100)
        labels[start:end] = torch.tensor(ids[start:end])
        return ids, labels

    def pick_answer(self, row, count):
        """The index of the answer to train, of `count` accepted ones. Edit here which answer is trained."""
        if row.get("epoch") is None:  # in an evaluation and in the check before training (see EpochColumn)
            return 0
        # Only seed, epoch and row number decide, so that neither loader processes nor a resumed run change the answer.
        return random.Random(f"{self.seed} {row['epoch']} {row['row']}").randrange(count)

    def read(self, row):
        """A row -> [the user's turn, with a PIL image in it; the assistant's turn, if there are accepted answers].
        For evaluation and tools/: the assistant says the first answer, and `references` has all. Raises BadRow."""
        question, answers = self.read_texts(row)
        messages = [self.ask(question, self.load_pages(row))]
        if answers:
            content = [{"type": "text", "text": answers[0]}]
            messages.append({"role": "assistant", "content": content, "references": answers})
        return messages

    def tokenize(self, conversations, prompt=False):
        """Lists of messages -> the processor's batch, padded left. With `prompt` it ends where answers begin."""
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": prompt}
        padding = {"padding": True, "padding_side": "left"}
        return self.processor.apply_chat_template(conversations, processor_kwargs=padding, **options)


def load_model(settings, training):
    """The base model, frozen: language model and connector in NF4 if asked, the rest in 16 bits (CPU: float32)."""
    dtype = weight_dtype(training)
    options = {"dtype": dtype, "device_map": {"": training.device}, "revision": settings.model_revision}
    if settings.load_in_4bit:
        options["quantization_config"] = nf4_quantization(dtype, skip_modules=["lm_head", "model.vision_model"])
    model = AutoModelForImageTextToText.from_pretrained(settings.model_name_or_path, **options)
    keep_4bit_trainable_on_cpu(model)
    return model.requires_grad_(False)


# Edit the LoRA targets here, or give --lora_target_modules. Bare names ("q_proj") would match the vision tower, too.
LORA_TARGETS = r"model\.(text_model|connector\.perceiver_resampler)\..*\.(q|k|v|o)_proj|lm_head"
# Targets in these parts are refused. To adapt the vision tower: delete its line here and the one of FrozenWithoutGraph
# in Trainer, and extend LORA_TARGETS.
UNTRAINABLE = {"vision_model": "which runs without a graph, so no gradient would reach it"}


def lora_config(settings):
    """LoRA on the attention projections of language model and perceiver resampler, and on lm_head."""
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_dora=settings.use_dora,
        target_modules=lora_targets(settings.lora_target_modules, "model.text_model", LORA_TARGETS),
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )


def score(answer, accepted):
    """The model's answer and the accepted ones -> its scores, 0 to 1. Edit the metrics here; each mean is eval_NAME.
    To keep the checkpoint with the highest, add NAME to METRICS, too, and give --metric_for_best_model NAME."""
    is_accepted = normalized(answer) in [normalized(text) for text in accepted]
    return {"anls": anls(answer, accepted), "exact_match": float(is_accepted)}


class Trainer(transformers.Trainer):
    """transformers' Trainer: its loss, optimizer and loop. An evaluation answers the held-out questions, too."""

    def __init__(self, settings, **kwargs):
        super().__init__(**kwargs)
        self.settings = settings
        # Optional, for speed: with checkpointing this saves half the work of a step. The result is the same.
        self.add_callback(FrozenWithoutGraph(self.model, "vision_model"))

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """The stock loop, which computes eval_loss; then the mean scores of the model's answers to the same rows."""
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        answers = answer_rows(self, self.eval_dataset, self.settings.max_new_tokens)
        scores = []
        for row, answer in zip(self.eval_dataset, answers, strict=True):
            _, accepted = self.data_collator.read_texts(row)
            scores.append(score(answer.text, accepted))
        for name in scores[0]:
            output.metrics[f"{metric_key_prefix}_{name}"] = sum(each[name] for each in scores) / len(scores)
        if self.is_world_process_zero() and self.settings.sample_rows > 0:
            self.write_samples(answers, scores, mean_anls=output.metrics[f"{metric_key_prefix}_anls"])
        return output

    def write_samples(self, answers, scores, mean_anls):
        """Append the first --sample_rows of the scored rows to samples.md, as a table."""
        samples = []
        rows = itertools.islice(self.eval_dataset, self.settings.sample_rows)
        for row, answer, row_scores in zip(rows, answers, scores, strict=False):
            question, accepted = self.data_collator.read_texts(row)
            texts = [question, answer.text, " / ".join(accepted), f"{row_scores['anls']:.2f}"]
            samples.append((row["row"], self.data_collator.read(row), texts))
        title = f"Step {self.state.global_step}: ANLS {mean_anls:.3f}"
        append_samples(self.args.output_dir, title, ["page", "question", "answered", "accepted", "ANLS"], samples)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Optional, for speed: the stock loss, with logits only where a token is trained. It saves 1 % of the work
        and, for 2 rows of 1,024 tokens, 2 x 1,024 x 32,003 logits x 4 bytes = 0.26 GB. To do without it, delete it."""
        targets = next_tokens(inputs["labels"])
        is_trained = targets != -100
        inputs = {**inputs, "shift_labels": targets[is_trained]}
        with logits_only_at(is_trained, self.model.get_output_embeddings()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def main(argv=None):
    """Parse, check, read the rows, show an example, load the model, train, save."""
    settings, training = parse(argv)
    check(settings, training)
    checkpoint = checkpoint_to_resume(training)
    set_seed(training.seed)

    train_dataset, eval_dataset = load_data(settings, training)
    if eval_dataset is None:  # nothing to evaluate (--eval_fraction 0), so no checkpoint can be the best
        training.eval_strategy, training.load_best_model_at_end = "no", False
    processor = load_processor(settings)  # (load_data has its own copy: it can be called alone)
    collator = Collator(processor, settings, training)
    example = marked(collator([train_dataset[0]]), processor)
    PartialState().print(f"\nOne row as the model sees it, trained on in «»:\n\n{example}\n")

    adapter = lora_config(settings)
    check_lora_targets(settings, adapter, empty_model(settings), UNTRAINABLE)
    with fail_on_error(f"cannot load the weights of {settings.model_name_or_path}"):
        model = load_model(settings, training)
    model = get_peft_model(model, adapter)  # the adapter is float32, whatever the base is
    # By default PEFT saves the frozen lm_head in every checkpoint, because an adapter is on it.
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)

    epochs = EpochColumn()
    train_dataset = train_dataset.with_transform(epochs.add)
    data = {"data_collator": collator, "train_dataset": train_dataset, "eval_dataset": eval_dataset}
    trainer = Trainer(settings, model=model, args=training, processing_class=processor, callbacks=[epochs], **data)
    print_parameters(model, ["vision_model", "modality_projection", "perceiver_resampler", "text_model", "lm_head"])
    train_and_save(trainer, checkpoint)


# --------------------------------------------------------------------------------------- details: metric, rows, epochs


def anls(answer, accepted):
    """Average Normalized Levenshtein Similarity of an answer to the most similar accepted one, 0 to 1; below 0.5 it
    counts as 0. White space and case do not matter. As scored by DocVQA (Biten et al. 2019, arXiv:1905.13648)."""
    best = 0.0
    for text in accepted:
        distance = Levenshtein.distance(normalized(answer), normalized(text))
        length = max(len(answer), len(text))  # of the raw texts, as in the challenge's own script
        best = max(best, 1 - distance / length)
    return best if best >= 0.5 else 0.0


def normalized(text):
    """Lower case, single spaces: as answers are compared."""
    return " ".join(text.lower().split())


def text_of(message):
    """The question of a user's turn, without the instruction; the answer of an assistant's."""
    return message["content"][-1]["text"]


def read_rows(name, split, settings):
    """The rows of a split: image, question, answers, row; None if `split` is None and there is no test split.
    The column of answers may be missing, so that tools can ask the questions. Raises SystemExit."""
    rows = read_dataset(name, split, settings)
    if rows is None:
        return None
    question = settings.question_column or ("query" if "query" in rows.column_names else "question")
    answers = settings.answers_column or ("answers" if "answers" in rows.column_names else "answer")
    columns = {"image": settings.image_column, "question": question, "answers": answers}
    optional = () if settings.answers_column else ("answers",)
    return rename_columns(rows, columns, name, optional)


def check_text(text, name, control_tokens):
    """Raises BadRow for what is not a text, is blank, or holds a control token."""
    if not isinstance(text, str):
        raise BadRow(f"{name} is not a text", f"{text!r}; write it in quotes, as the model shall read or say it")
    if not text.strip():
        raise BadRow(f"empty {name}", f"{text!r} holds nothing but white space")
    typed = [token for token in control_tokens if token in text]
    if typed:
        raise BadRow("control token", f"{typed[0]} is typed in the {name} and would become a real one; take it out")


class EpochColumn(transformers.TrainerCallback):
    """Adds a column `epoch` to the training rows, so that Collator.pick_answer draws anew in each epoch. Loader
    processes are forks, and may live through several epochs: a shared tensor tells them the current one."""

    def __init__(self):
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def add(self, rows):
        count = len(next(iter(rows.values())))  # rows: {column: values}
        return {**rows, "epoch": [self.epoch.item()] * count}

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Called before the loader of the epoch starts. In a resumed run `state.epoch` is where the run was.
        self.epoch.fill_(int(state.epoch or 0))


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


@contextlib.contextmanager
def logits_only_at(positions, lm_head):
    """Optional, for speed: within the `with` block lm_head scores these positions only. Pass it shift_labels to match.

    positions: (B, L) bool. Logits become (trained positions, vocabulary) instead of (B, L, vocabulary)."""

    def select(module, inputs):
        return inputs[0][positions]

    hook = lm_head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


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


class FrozenWithoutGraph(ReplacedForwards):
    """Optional, for speed: a frozen part of the model (the vision tower) runs without a graph until training ends.
    Activation checkpointing makes a model's inputs require a gradient, so it would compute a frozen tower twice and
    backpropagate through it. To do without this, delete the line that adds it: the result is the same."""

    def __init__(self, model, part):
        super().__init__()
        for name, module in model.named_modules():
            if f".{name}".endswith(f".{part}"):
                trained = [weight for weight, parameter in module.named_parameters() if parameter.requires_grad]
                remedy = "freeze it, or delete the line that adds FrozenWithoutGraph"
                require(not trained, f"{part} runs without a graph, so {trained[:1]} would get no gradient: {remedy}")
                self.replace(module, torch.no_grad()(module.forward))


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
