"""Does it fit, how long does it take, is it faster than what I have? Every recipe at its model's real size, on one CUDA GPU, with
random weights and made-up rows: nothing is downloaded.

    python benchmarks/full_size.py --minutes 10                            # the defaults of all recipes first, then what time allows
    python benchmarks/full_size.py sft_llava dpo_idefics2 --json gpu.json
    python benchmarks/full_size.py idefics2_docvqa --bits 4 --checkpointing on --batch_sizes 1 2 4 8 16
    python benchmarks/full_size.py --scratch /mnt/disk --keep              # weights stay there for the next time: 34 GB in all
    python benchmarks/full_size.py --steps 2                               # without a GPU: a small copy of it all, to see that it runs

Each configuration is a run of the recipe's own main(), by flags, on a model with the published widths and depths and as many parameters
as the published one has, and on rows read from disk: a JPEG of 1000 x 800, answers of 60-150 tokens (documents: 3-15). Measured are whole
optimizer steps without accumulation, the wait for the loader included, by the wall clock of a device that is synchronized after
each. The stock side is what a user would run instead, on the same base, LoRA, flags and rows: TRL's SFTTrainer and DPOTrainer
with their own collators, transformers.Trainer with the recipe's. Runs of the two alternate; a time is the median of all steps of
all runs, the first steps of each left out.

  s/step, rows/s, tokens/s   a row of DPO is a pair, its tokens those of both sequences, images included
  MFU        model FLOP/s (forward and backward, no recomputation) by the GPU's peak: a table of dense 16-bit peaks, or for other GPUs a
             measured matmul. FLOPs are counted by PyTorch on one of the first steps; inside kernels of Triton nothing is counted
  peak GB    most that PyTorch's allocator had given out, and had reserved, from loading to the last step; GB are 10^9 bytes
  waits      share of the time in which the GPU waited for the loader
  fits       largest batch measured whose peak is below a card's size, beside what CUDA and others took outside of PyTorch; (n) only if
             the allocator gets along with what it gives out, without the reserve it had here

MiniCPM-V is 4.6; 2.6 is code from the hub and left out, as is training LLaVA's language model in full, which no single GPU holds. Random
weights cost what trained ones cost. Nothing here says how well anything is learnt."""

import argparse
import contextlib
import copy
import gc
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from measure import counter  # noqa: E402
from peft import get_peft_model  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

# The published configurations as far as they decide on sizes, and as many parameters as they make. MiniCPM-V 4.6: its card says 1.3B
# (SigLIP2-400M, Qwen3.5-0.8B), its file of weights 1,300,428,016. `small` is put over it where there is no GPU.
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 980, "patch_size": 14}
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llava-1.5-7b": {
        "parameters": 7_063_427_072,
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
        },
        "text_config": {
            "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        },
        "small": {
            "vision_config": {**NARROW, "num_hidden_layers": 3, "image_size": 56, "projection_dim": 64},
            "text_config": {**NARROW, "vocab_size": 512, "num_key_value_heads": 4},
        },
    },
    "idefics2-8b": {
        "parameters": 8_402_768_112,
        "vision_config": SIGLIP,
        "perceiver_config": {
            "hidden_size": 4096, "resampler_n_latents": 64, "resampler_depth": 3, "resampler_n_heads": 16, "resampler_head_dim": 96,
            "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
        },
        "text_config": {
            "model_type": "mistral", "vocab_size": 32003, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        },
        "small": {
            "vision_config": {**NARROW, "image_size": 140},
            "perceiver_config": {"hidden_size": 64, "resampler_n_latents": 8, "resampler_depth": 1, "resampler_n_heads": 4,
                                 "resampler_head_dim": 16, "num_key_value_heads": 2},
            "text_config": {**NARROW, "vocab_size": 640, "num_key_value_heads": 2},
        },
    },
    "minicpm-v-4.6": {
        "parameters": 1_300_428_016,
        "vision_config": SIGLIP,
        "text_config": {
            "model_type": "qwen3_5_text", "vocab_size": 248094, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16,
            "linear_key_head_dim": 128, "linear_value_head_dim": 128, "max_position_embeddings": 262144, "tie_word_embeddings": True,
        },
        "small": {
            "vision_config": {**NARROW, "image_size": 56},
            "text_config": {**NARROW, "vocab_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
                            "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 4, "linear_num_value_heads": 4,
                            "linear_key_head_dim": 16, "linear_value_head_dim": 16},
        },
    },
}  # fmt: skip
# What is run: a recipe's file, model, the flag that names its data, the recipe's own batch, its flags, and those of each precision, the
# recipe's own first.
RUNS = {
    "sft_llava": ("sft_llava", "llava-1.5-7b", "dataset_name", 1, {}, {"4": {"load_in_4bit": True}, "16": {"load_in_4bit": False}}),
    "dpo_idefics2": ("dpo_idefics2", "idefics2-8b", "dataset_name", 2, {}, {"4": {"load_in_4bit": True}, "16": {"load_in_4bit": False}}),
    "idefics2_docvqa": ("idefics2_docvqa", "idefics2-8b", "dataset_name", 2, {}, {"4": {"load_in_4bit": True}, "16": {"load_in_4bit": False}}),
    "llava_two_stage align": ("llava_two_stage", "llava-1.5-7b", "data_path", 8, {"stage": "align"}, {"16": {}}),
    "llava_two_stage instruct": (
        "llava_two_stage", "llava-1.5-7b", "data_path", 4, {"stage": "instruct", "lora_r": 128}, {"16": {}, "4": {"load_in_4bit": True}},
    ),
    "finetune_minicpm_lora": ("finetune_minicpm_lora", "minicpm-v-4.6", "data_path", 1, {}, {"16": {}, "4": {"q_lora": True}}),
}  # fmt: skip
RECIPES = list(dict.fromkeys(recipe for recipe, *_ in RUNS.values()))
# FLOP/s of dense matrices of 16 bits, added up in 32, as their makers say. Cards of the same name with less, for laptops among them, are measured.
PEAKS = {
    r"B200": 2250e12, r"H200": 989e12, r"H100 PCIe": 756e12, r"H100 NVL": 835e12, r"H100": 989e12, r"A100": 312e12, r"L40S": 362e12,
    r"L40": 181e12, r"L4": 121e12, r"A10G": 70e12, r"A10": 125e12, r"RTX 4090": 165e12, r"RTX 3090": 71e12, r"V100": 125e12, r"T4": 65e12,
}  # fmt: skip
CARDS = (16, 24, 40, 80)
GB = 1e9
SPARE = 3e9  # bytes on the disk beside the weights: rows, their cache, logs


# ---------------------------------------------------------------- weights, processors, rows


def sizes_of(name, small):
    """The entry of MODELS, with `small` put over it where that is wanted."""
    model = {key: dict(value) for key, value in MODELS[name].items() if key.endswith("_config")}
    for key, value in MODELS[name]["small"].items() if small else ():
        model[key] |= value
    return model


def make_processor(name, small):
    """The model's processor with a tiny model's tokenizer, whose vocabulary is filled up to the real one's size."""
    from tiny import idefics2, llava  # minicpm below: an older Transformers does not know all that it imports

    model = sizes_of(name, small)
    words, side = model["text_config"]["vocab_size"], model["vision_config"]["image_size"]
    if name == "llava-1.5-7b":  # of its 32,064 rows 32,002 are of tokens
        processor = llava.processor(tok=filled(llava.tokenizer(), words - 62))
        processor.image_processor.size = {"shortest_edge": side}
        processor.image_processor.crop_size = {"height": side, "width": side}
    elif name == "idefics2-8b":  # the processor adds three tokens
        processor = idefics2.processor(filled(idefics2.tokenizer(), words - 3), height=378 * side // 980, width=side)
        processor.image_seq_len = model["perceiver_config"]["resampler_n_latents"]
    else:
        from tiny import minicpm

        processor = minicpm.processor(tok=filled(minicpm.tokenizer(), words))
        processor.image_processor.scale_resolution = 56 if small else 448
    return processor


def filled(tokenizer, size):
    """A tokenizer with as many entries: behind its own stand some that no text is made of."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    own = state["model"]["vocab"]
    vocab = own | {f"<filler {n}>": n for n in range(len(own), size - (len(tokenizer) - len(own)))}
    given = {key: value for key, value in tokenizer.init_kwargs.items() if key not in ("vocab", "merges", "backend")}
    new = type(tokenizer)(vocab=vocab, merges=[tuple(pair) for pair in state["model"]["merges"]], **given)
    new.add_tokens([token["content"] for token in state["added_tokens"] if not token["special"]])
    return new


def configuration(name, small, tokenizer):
    """-> LlavaConfig, Idefics2Config or MiniCPMV4_6Config."""
    model, ids = sizes_of(name, small), {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    model["text_config"] |= ids
    if name == "minicpm-v-4.6":
        image = {"image_token_id": tokenizer.image_token_id, "video_token_id": tokenizer.video_token_id}
        return transformers.MiniCPMV4_6Config(**model, **image, insert_layer_id=0 if small else 6, tie_word_embeddings=True)
    image = tokenizer.convert_tokens_to_ids("<image>")
    if name == "idefics2-8b":
        return transformers.Idefics2Config(**model, image_token_id=image)
    patches = (model["vision_config"]["image_size"] // 14) ** 2
    return transformers.LlavaConfig(**model, image_token_index=image, image_seq_length=patches)


def make_weights(name, small, folder, cuda):
    """Write a random model and its processor, unless an earlier run has. On the GPU, where it is large enough."""
    if (folder / "done").exists():  # written last
        return
    processor = make_processor(name, small)
    config, weigh = configuration(name, small, processor.tokenizer), 2 * MODELS[name]["parameters"]
    device = "cuda" if cuda and torch.cuda.mem_get_info()[0] > 1.2 * weigh else "cpu"
    transformers.set_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")
    processor.save_pretrained(folder)
    (folder / "done").write_text(f"{model.num_parameters()}\n")
    del model
    tidy(cuda)


def make_rows(run, count, tokenizer, folder, seed=0):
    """Write `count` rows, as the recipe reads them, and eight JPEGs that they are about. -> the path."""
    draw, recipe = random.Random(seed), RUNS[run][0]
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(8):
        picture = Image.effect_noise((100, 80), 90).resize((1000, 800)).convert("RGB")  # as large a file as a photograph's, about
        picture.save(folder / f"{n}.jpg", quality=90)
    words = sorted(token[1:] for token in tokenizer.get_vocab() if re.fullmatch("[\u2581\u0120][a-z]{2,}", token))

    def text(least, most):
        """Words that make so many tokens."""
        wanted, said = draw.randint(least, most), draw.choice(words)
        while len(tokenizer(said, add_special_tokens=False)["input_ids"]) < wanted:
            said += f" {draw.choice(words)}"
        return said

    rows = []
    for n in range(count):
        row, question = {"id": str(n), "image": f"{n % 8}.jpg"}, text(12, 30)
        if recipe == "dpo_idefics2":
            row |= {"question": question, "chosen": text(60, 150), "rejected": f"{text(60, 149)} {words[n % len(words)]}"}
        elif recipe == "idefics2_docvqa":
            row |= {"question": question, "answers": [text(3, 15)]}
        else:
            names = ("role", "content", "user", "assistant") if recipe == "finetune_minicpm_lora" else ("from", "value", "human", "gpt")
            turns = zip(names[2:], (f"<image>\n{question}", text(60, 150)))
            row["conversations"] = [{names[0]: who, names[1]: what} for who, what in turns]
        rows.append(row)
    path = folder / f"{run.replace(' ', '-')}.json"
    path.write_text(json.dumps(rows))
    return path


def for_trl(recipe, path):
    """The rows at `path` in the form that TRL's own collators take."""
    turn = lambda who, text: [{"role": who, "content": text}]
    rows = []
    for row in json.loads(path.read_text()):
        new = {"images": [str(path.parent / row["image"])]}
        if recipe == "dpo_idefics2":
            new |= {"prompt": turn("user", row["question"]), "chosen": turn("assistant", row["chosen"]), "rejected": turn("assistant", row["rejected"])}
        else:
            asked, said = (part["value"] for part in row["conversations"])
            new["messages"] = turn("user", asked.removeprefix("<image>\n")) + turn("assistant", said)
        rows.append(new)
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


# ---------------------------------------------------------------- one run


def tidy(cuda):
    """Give back what nobody holds any more, and begin to look for the peak anew."""
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks(cuda):
    """Most bytes given out and reserved by PyTorch's allocator since `tidy`; None on a CPU."""
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()} if cuda else None


def outside(cuda):
    """Bytes of the GPU that are taken and not PyTorch's: CUDA's context, libraries, paged optimizer states, other programs."""
    if not cuda:
        return None
    free, whole = torch.cuda.mem_get_info()
    return whole - free - torch.cuda.memory_reserved()


class Finished(Exception):
    """All steps are done; what follows, saving, is not measured."""


class Watch(transformers.TrainerCallback):
    """Clocks a Trainer's steps, its waits for the loader, and counts the tokens and, in the last step of the warm-up, FLOPs."""

    def __init__(self, warm_up, cuda):
        self.warm_up, self.cuda, self.ends, self.waits, self.tokens = warm_up, cuda, [], [], []
        self.counter, self.recomputed, self.flops, self.uncounted, self.checkpointed = None, 0, None, None, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    def on_step_end(self, *args, **kwargs):
        if self.cuda:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_train_end(self, *args, **kwargs):
        raise Finished

    def batches(self, loader):
        """The loader's batches; how long it took to get each is remembered."""
        while True:
            start = time.perf_counter()
            batch = next(loader, None)
            if batch is None:
                return
            self.waits.append(time.perf_counter() - start)
            yield batch

    @contextlib.contextmanager
    def recomputing(self):
        """Put around what checkpointing computes once more: those FLOPs are the hardware's, not the model's."""
        before = self.counter.get_total_flops() if self.counter else 0
        try:
            yield
        finally:
            self.recomputed += self.counter.get_total_flops() - before if self.counter else 0

    def step(self, compute, inputs):
        """compute(inputs), and what is to be known of it."""
        self.tokens.append(inputs["attention_mask"].sum())
        if len(self.ends) != self.warm_up - 1:
            return compute(inputs)
        try:
            with counter() as self.counter:
                loss = compute(dict(inputs))
            self.flops = {"hardware": self.counter.get_total_flops(), "model": self.counter.get_total_flops() - self.recomputed}
            return loss
        except Exception as e:  # a kernel that the counter does not get along with is no reason to measure nothing
            if ran_out(e):
                raise
            self.uncounted = f"{type(e).__name__}: {e}"[:300]
        finally:
            self.counter = None
        return compute(inputs)

    def figures(self):
        """What was measured after the warm-up, one value a step."""
        seconds = [end - start for start, end in itertools.pairwise(self.ends)][self.warm_up - 1 :]
        last = slice(self.warm_up, len(self.ends))
        return {"seconds": seconds, "waits": self.waits[last], "tokens": [int(n) for n in self.tokens[last]]}


@contextlib.contextmanager
def watching(watch):
    """Within it, every Trainer is watched."""
    own, contexts = transformers.Trainer, lambda: (contextlib.nullcontext(), watch.recomputing())
    train, get_batch_samples, training_step = own.train, own.get_batch_samples, own.training_step

    def watched_train(self, *args, **kwargs):
        self.add_callback(watch)
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):  # TRL still reads the second, by its old name
            setattr(self.args, name, {"use_reentrant": False, **(getattr(self.args, name, None) or {}), "context_fn": contexts})
        return train(self, *args, **kwargs)

    def watched_batches(self, loader, *args, **kwargs):
        return get_batch_samples(self, watch.batches(loader), *args, **kwargs)

    def watched_step(self, model, inputs, *args, **kwargs):
        return watch.step(lambda inputs: training_step(self, model, inputs, *args, **kwargs), inputs)

    with mock.patch.multiple(own, train=watched_train, get_batch_samples=watched_batches, training_step=watched_step):
        yield


@contextlib.contextmanager
def lent(recipe, loaded, cuda):
    """Within it, the recipe's load_model() loads once. Each call gets modules of its own around the same frozen weights, and copies
    of those that are trained. `loaded`: {} at first; {"model", "loading": its peak}."""
    load_model = recipe.load_model

    def lend(settings, training):
        if "model" not in loaded:
            loaded["model"] = load_model(settings, training)
            loaded["loading"] = peaks(cuda)
            tidy(cuda)
        shared = [p for p in loaded["model"].parameters() if not p.requires_grad]
        shared += [p.quant_state for p in shared if getattr(p, "quant_state", None) is not None]
        return copy.deepcopy(loaded["model"], {id(one): one for one in shared})

    with mock.patch.object(recipe, "load_model", lend):
        yield


def stock(recipe, flags, path):
    """What a user would run instead of the recipe's main(), with the same flags: TRL's trainer with its own collator, or transformers.Trainer
    with the recipe's."""
    settings, training = recipe.parse(flags)
    recipe.check(settings, training)
    transformers.set_seed(training.seed)
    processor, name = recipe.load_processor(settings), recipe.__name__
    if name in ("sft_llava", "dpo_idefics2"):
        import trl

        trainer = (trl.SFTTrainer if name == "sft_llava" else trl.DPOTrainer)(
            model=recipe.load_model(settings, training),
            args=training,
            train_dataset=for_trl(name, path),
            processing_class=processor,
            peft_config=recipe.lora_config(settings),
        )
    else:
        rows, _ = recipe.load_data(settings, training)
        model = recipe.load_model(settings, training)
        if name == "finetune_minicpm_lora":
            model = recipe.adapted(model, settings)
        elif adapter := recipe.lora_config(settings):
            model = get_peft_model(model, adapter)
        trainer = transformers.Trainer(model, training, recipe.Collator(processor, settings, training), rows)
    trainer.train()


def ran_out(error):
    """Whether an exception says that there was not enough memory."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(one in said for one in ("out of memory", "alloc_failed", "cannot allocate memory"))


def flags_of(cell, job, path, out):
    """A configuration -> the recipe's flags."""
    recipe, model, data, _, own, bits = RUNS[cell["run"]]
    flags = {"model_name_or_path": Path(job["weights"]) / model, data: path, "output_dir": out, "max_steps": job["warm_up"] + job["steps"]}
    flags |= {"per_device_train_batch_size": cell["batch"], "gradient_accumulation_steps": 1, "dataloader_num_workers": cell["workers"]}
    flags |= {"activation_checkpointing": cell["checkpointing"], "seed": job["seed"], "report_to": "none", "disable_tqdm": True}
    flags |= {f"{what}_strategy": "no" for what in ("eval", "save", "logging")} | own | bits[cell["bits"]]
    flags |= {} if job["cuda"] else {"use_cpu": True}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def one_run(side, cell, job, path, loaded):
    """One run of one side -> {"status": "ok", "out of memory" or "failed: why", ...}."""
    recipe, watch = importlib.import_module(RUNS[cell["run"]][0]), Watch(job["warm_up"], job["cuda"])
    tidy(job["cuda"])
    status = "ok"
    with tempfile.TemporaryDirectory(dir=job["scratch"]) as out, open(job["log"], "a") as log:
        flags = flags_of(cell, job, path, Path(out) / "run")
        print(f"\n--- {side}: {recipe.__name__} {' '.join(flags)}", file=log)
        try:
            with contextlib.redirect_stdout(log), watching(watch), lent(recipe, loaded, job["cuda"]):
                recipe.main(flags) if side == "recipe" else stock(recipe, flags, path)
            status = "failed: it ended without training"
        except Finished:
            if watch.checkpointed != cell["checkpointing"]:
                status = f"failed: activation checkpointing is {'on' if watch.checkpointed else 'off'} with this Transformers, whatever the flag says"
        except SystemExit as e:
            status = "out of memory" if ran_out(e) else f"failed: {e}"
        except Exception as e:
            status = "out of memory" if ran_out(e) else f"failed: {type(e).__name__}: {e}"
    found = {"status": status.split("\n")[0][:300], "memory": peaks(job["cuda"]), "flops": watch.flops, "uncounted": watch.uncounted}
    if found["memory"] and loaded.get("loading"):
        found["memory"] = {kind: max(value, loaded["loading"][kind]) for kind, value in found["memory"].items()}
    loaded.setdefault("outside", outside(job["cuda"]))  # once: paged optimizers leave theirs behind in the process
    return found | (watch.figures() if status == "ok" else {})


def measure(cell, job, path, loaded):
    """A configuration, all of its runs -> the configuration with what was found, {"recipe": {...}, "stock": {...}}."""
    found = {}
    for n in range(job["rounds"] if len(cell["sides"]) > 1 else 1):
        for side in cell["sides"] if n % 2 == 0 else cell["sides"][::-1]:  # whoever is first may find the caches otherwise
            if side in found and found[side]["status"] != "ok":
                continue
            one = one_run(side, cell, job, path, loaded)
            if (before := found.get(side)) and one["status"] == "ok":
                one |= {what: before[what] + one[what] for what in ("seconds", "waits", "tokens")}
                if one["memory"]:
                    one["memory"] = {kind: max(value, before["memory"][kind]) for kind, value in one["memory"].items()}
            found[side] = one
    for one in found.values():
        if one["status"] == "ok":
            one["median"] = statistics.median(one["seconds"])
            one["waiting"] = sum(one["waits"]) / sum(one["seconds"])
            one["rows_per_second"] = cell["batch"] / one["median"]
            one["tokens_per_second"] = statistics.mean(one["tokens"]) / one["median"]
    return {**cell, "status": found["recipe"]["status"], "outside": loaded.get("outside"), **found}


# ---------------------------------------------------------------- a process of its own for each recipe and precision


def peak_flops(name, device, side=8192):
    """(FLOP/s at 16 bits, where that is from) of a GPU; measured with matrices of `side` for one that PEAKS does not have, and for a CPU."""
    for pattern, peak in PEAKS.items():
        if re.search(rf"\b{pattern}\b(?! D\b)(?!.*(Laptop|Max-Q))", name):
            return peak, "data sheet"
    half = torch.float32 if device == "cpu" else torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    a, times = torch.ones(side, side, device=device, dtype=half), []
    for _ in range(8):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times), f"measured: a matmul of {side} in {str(half).removeprefix('torch.')}"


def describe(cuda):
    """The machine, as far as PyTorch knows it."""
    name = torch.cuda.get_device_name() if cuda else "CPU"
    peak, source = peak_flops(name, "cuda") if cuda else peak_flops(name, "cpu", 512)
    free, whole = torch.cuda.mem_get_info() if cuda else (None, None)
    return {"kind": "device", "name": name, "memory": whole, "free": free, "peak_flops": peak, "peak_flops_from": source}


def work(job):
    """A job, whose cells are of one recipe and one precision: yields a description of the device, then one result for each cell."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    cells, cuda, loaded, too_large, took = job["cells"], job["cuda"], {}, {}, 0
    yield (device := describe(cuda))
    run, bits = cells[0]["run"], cells[0]["bits"]
    model, weights = RUNS[run][1], Path(job["weights"]) / RUNS[run][1]
    least = MODELS[model]["parameters"] * (2 if bits == "16" else 0.6)
    if cuda and device["free"] < least:
        why = f"does not fit: the weights alone take {least / GB:.1f} GB in {bits} bits, {device['free'] / GB:.1f} GB of this GPU are free"
        yield from ({**cell, "status": why} for cell in cells)
        return
    make_weights(model, job["small"], weights, cuda)
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights)
    count = (job["warm_up"] + job["steps"] + 2) * max(cell["batch"] for cell in cells)
    path = make_rows(run, count, tokenizer, Path(job["scratch"]) / "rows", job["seed"])
    for cell in cells:
        kind = (cell["checkpointing"], cell["workers"])
        if cell["batch"] > too_large.get(kind, cell["batch"]):
            yield {**cell, "status": f"not run: a batch of {too_large[kind]} did not fit"}
        elif job["until"] and job["until"] - time.time() < took:
            yield {**cell, "status": "not run: time is up"}
        else:
            start = time.time()
            result = measure(cell, job, path, loaded)
            took = time.time() - start
            if result["status"] == "out of memory":
                too_large[kind] = cell["batch"]
            yield result


def apart(job):
    """`work` in a process of its own, which a lack of memory, a crash or a deadline can end without harm to the rest."""
    folder = Path(tempfile.mkdtemp(dir=job["scratch"]))
    (folder / "job.json").write_text(json.dumps(job))
    environment = os.environ | {"HF_DATASETS_CACHE": f"{job['scratch']}/datasets"}
    with open(job["log"], "a") as log:
        command = [sys.executable, __file__, "--worker", str(folder)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        done, out = 0, folder / "results.jsonl"
        while True:
            ended = process.poll() is not None
            lines = out.read_text().splitlines(keepends=True) if out.exists() else []
            for line in (line for line in lines[done:] if line.endswith("\n")):
                done += 1
                yield json.loads(line)
            if ended:
                return
            if job["until"] and time.time() > job["until"] + 60:
                return
            time.sleep(0.2)
    finally:
        with contextlib.suppress(ProcessLookupError):  # the loader's processes with it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_words(log):
    """The last line of a log that says something."""
    lines = [line.strip() for line in Path(log).read_text(errors="replace").splitlines() if line.strip()] if Path(log).exists() else []
    return lines[-1][:300] if lines else "nothing was said"


# ---------------------------------------------------------------- what to run, in which order


def plan(args):
    """-> lists of configurations, each list of one recipe and precision: first every recipe as it is shipped, with all numbers of workers;
    then its other batches, then without checkpointing; then all of that in the other precision."""
    first, second, third = [], [], []
    for run, (recipe, _, _, own, _, bits) in RUNS.items():
        if recipe not in args.recipes:
            continue
        batches = args.batch_sizes or sorted({own, 1, 2, 4, 8})
        main = own if own in batches else batches[0]
        shown = [checkpointing for checkpointing in (True, False) if args.checkpointing in ("both", "on" if checkpointing else "off")]
        for n, precision in enumerate(bits):
            if args.bits not in ("both", precision):
                continue
            cells = []
            for checkpointing in shown:
                for batch in (main, *(other for other in batches if other != main)):
                    stock = args.stock == "all" or args.stock == "default" and batch == main
                    cell = {"run": run, "bits": precision, "checkpointing": checkpointing, "batch": batch, "workers": args.workers[0]}
                    cells.append({**cell, "sides": ["recipe", "stock"] if stock else ["recipe"]})
                    if len(cells) == 1 and n == 0:
                        cells += [{**cell, "workers": workers, "sides": ["recipe"]} for workers in args.workers[1:]]
            if n == 0:
                head = len(args.workers)
                first.append(cells[:head])
                second.append(cells[head:])
            else:
                third.append(cells)
    return [cells for cells in first + second + third if cells]


def needed(args, weights):
    """Bytes that the weights still to be made will take on the disk, and what comes beside them."""
    models = {model for recipe, model, *_ in RUNS.values() if recipe in args.recipes and not (weights / model / "done").exists()}
    return SPARE / (1 if args.cuda and not args.small else 100) + sum(2 * MODELS[name]["parameters"] for name in models if not args.small)


def fits(results, side="recipe"):
    """{(run, bits, checkpointing): {card in GB: largest batch that fits, as text}} from the peaks that were measured."""
    table = {}
    for one in results:
        if (one.get(side) or {}).get("memory") and one[side]["status"] == "ok":
            found = table.setdefault((one["run"], one["bits"], one["checkpointing"]), {})
            for kind in ("allocated", "reserved"):
                found.setdefault(kind, {})[one["batch"]] = one[side]["memory"][kind] + one["outside"]
    shown = {}
    for key, found in table.items():
        shown[key] = {}
        for card in CARDS:
            sure, tight = (max((b for b, peak in found[kind].items() if peak <= card * GB), default=0) for kind in ("reserved", "allocated"))
            more = "+" if max(sure, tight) == max(found["reserved"]) else ""
            shown[key][card] = f"{sure}{more}" if sure and sure == tight else f"{sure or 'none'} ({tight}{more})" if tight else "none"
    return shown


# ---------------------------------------------------------------- the report


def gigabytes(memory, kind):
    """Bytes of a kind -> text; where nothing was measured, a dash."""
    return f"{memory[kind] / GB:.1f}" if memory else "-"


def show(results, device, console):
    """The tables, then all that was not measured, and why."""
    table = Table(title="Real size, random weights" if device.get("real") else "A small copy, to see that it runs: its figures say nothing of the real size")
    for column in "recipe bits ckpt batch workers|s/step|rows/s|tokens/s|h / 100k rows|MFU|peak GB|reserved|waits|stock s/step|stock peak|stock / recipe".split("|"):
        for name in column.split() if column.startswith("recipe") else [column]:
            table.add_column(name, justify="left" if name == "recipe" else "right")
    for one in results:
        what = [one["run"], one["bits"], "on" if one["checkpointing"] else "off", str(one["batch"]), str(one["workers"])]
        mine, other = one.get("recipe", {}), one.get("stock", {})
        if not mine or "ok" not in (mine["status"], other.get("status")):
            continue
        cells = [mine["status"].split(":")[0], *["-"] * 8]
        if mine["status"] == "ok":
            model = mine["flops"]["model"] / mine["median"] / device["peak_flops"] if mine["flops"] else None
            cells = [f"{mine['median']:.3f}", f"{mine['rows_per_second']:.2f}", f"{mine['tokens_per_second']:,.0f}"]
            cells += [f"{1e5 / mine['rows_per_second'] / 3600:.1f}", "-" if model is None else f"{model:.1%}"]
            cells += [gigabytes(mine["memory"], kind) for kind in ("allocated", "reserved")] + [f"{mine['waiting']:.0%}"]
        if other.get("status") == "ok":
            ratio = f"{other['median'] / mine['median']:.2f}x" if mine["status"] == "ok" else "-"
            cells += [f"{other['median']:.3f}", gigabytes(other["memory"], "allocated"), ratio]
        else:
            cells += [other.get("status", "-").split(":")[0], "-", "-"]
        table.add_row(*what, *cells[:8], *cells[8:]) if len(cells) == 11 else table.add_row(*what, *cells[:8], *cells[9:])
    console.print(table)
    if shown := fits(results):
        table = Table("recipe", "bits", "ckpt", *(f"{card} GB" for card in CARDS), title="Largest batch measured that fits")
        for (run, bits, checkpointing), cards in shown.items():
            table.add_row(run, bits, "on" if checkpointing else "off", *cards.values())
        console.print(table)
    for one in results:
        name = f"{one['run']}, {one['bits']} bits, checkpointing {'on' if one['checkpointing'] else 'off'}, batch {one['batch']}, {one['workers']} workers"
        for side in [one] if "recipe" not in one else []:
            console.print(f"{name}: {side['status']}", markup=False)
        for side in ("recipe", "stock"):
            if side in one and one[side]["status"] != "ok":
                console.print(f"{name}, {side}: {one[side]['status']}", markup=False)
            if one.get(side, {}).get("uncounted"):
                console.print(f"{name}, {side}: FLOPs not counted: {one[side]['uncounted']}", markup=False)


def machine(cuda):
    """GPU, driver and versions."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        gpu = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip().splitlines() if cuda else []
    except (OSError, subprocess.SubprocessError):
        gpu = []
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
    return {"gpu": gpu[0] if gpu else "unknown" if cuda else None, "cuda": torch.version.cuda, "python": sys.version.split()[0],
            "cores": os.cpu_count(), "versions": {name: metadata.version(name) for name in names}}  # fmt: skip


def parse(argv=None):
    """Flags, checked. Raises SystemExit with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"Default: all of {', '.join(RECIPES)}.")
    parser.add_argument("--minutes", type=float, help="Start nothing that would not be done by then; what was not run is listed.")
    parser.add_argument("--bits", choices=["4", "16", "both"], default="both", help="Precision of the frozen weights.")
    parser.add_argument("--checkpointing", choices=["on", "off", "both"], default="both", help="Activation checkpointing.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="Default: the recipe's own, 1, 2, 4 and 8.")
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 0], help="Loader processes; all but the first for the defaults only.")
    parser.add_argument("--steps", type=int, default=6, help="Measured steps of a run.")
    parser.add_argument("--warm_up", type=int, default=2, help="Steps before them; FLOPs are counted in the last.")
    parser.add_argument("--rounds", type=int, default=2, help="Runs of each side, alternating.")
    parser.add_argument("--stock", choices=["default", "all", "none"], default="default", help="Measure the stock trainer: for one batch, for all, never.")
    parser.add_argument("--scratch", type=Path, help="Folder for weights and rows. Default: a temporary one.")
    parser.add_argument("--keep", action="store_true", help="Leave the weights there for another run.")
    parser.add_argument("--small", action="store_true", help="The small copy that a machine without GPU gets, on a GPU.")
    parser.add_argument("--seed", type=int, default=0, help="Of rows and adapters.")
    parser.add_argument("--json", type=Path, help="Write everything to this file, again after each configuration.")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := [name for name in args.recipes if name not in RECIPES]:
        parser.error(f"no recipe {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    if min(args.steps, args.warm_up, args.rounds, *(args.batch_sizes or [1])) < 1 or min(args.workers) < 0 or args.seed < 0:
        parser.error("--steps, --warm_up, --rounds, --batch_sizes: at least 1; --workers, --seed: at least 0")
    if args.minutes is not None and not args.minutes > 0:
        parser.error("--minutes: above 0")
    args.recipes, args.cuda = args.recipes or RECIPES, torch.cuda.is_available()
    args.batch_sizes, args.workers = list(dict.fromkeys(args.batch_sizes or [])), list(dict.fromkeys(args.workers))
    args.small |= not args.cuda
    return args


def main(argv=None):
    """Flags -> exit status: 1 where nothing could be measured."""
    args = parse(argv)
    if args.worker:
        job = json.loads((args.worker / "job.json").read_text())
        with open(args.worker / "results.jsonl", "a") as out:
            for one in work(job):
                print(json.dumps(one), file=out, flush=True)
        return 0
    until = time.time() + 60 * args.minutes if args.minutes else None
    groups = plan(args)
    if not groups:
        sys.exit(f"error: {', '.join(args.recipes)} has no run with --bits {args.bits}: llava_two_stage's first stage is in 16 bits only")
    try:
        if args.json:
            args.json.touch()
        if args.scratch:
            args.scratch.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="full-size-", dir=args.scratch))
    except OSError as e:
        sys.exit(f"error: {e.filename}: {e.strerror}")
    weights = (args.scratch or scratch).absolute() / ("weights-small" if args.small else "weights")
    say, results, device = lambda text: print(text, flush=True), [], {"real": not args.small}
    try:
        free, need = shutil.disk_usage(scratch).free, needed(args, weights)
        if free < need:
            sys.exit(f"error: {need / GB:.0f} GB are needed in {args.scratch or tempfile.gettempdir()} for the weights, {free / GB:.1f} GB are free: "
                     "--scratch FOLDER on a larger disk, or fewer recipes")  # fmt: skip
        about = machine(args.cuda)
        say(f"{about['gpu'] or 'no GPU found: a small copy of everything, on the CPU'}; " + ", ".join(f"{k} {v}" for k, v in about["versions"].items()))
        job = {"scratch": str(scratch), "weights": str(weights), "log": str(scratch / "log.txt"), "until": until, "cuda": args.cuda}
        job |= {name: getattr(args, name) for name in ("small", "steps", "warm_up", "rounds", "seed")}
        for cells in groups:
            ran = 0
            if until and time.time() > until:
                results += [{**cell, "status": "not run: time is up"} for cell in cells]
                continue
            for one in apart({**job, "cells": cells}):
                if one.get("kind") == "device":
                    device = one | {"real": not args.small}
                    continue
                ran += 1
                results.append(one)
                say(f"  {one['run']}, {one['bits']} bits, checkpointing {'on' if one['checkpointing'] else 'off'}, batch {one['batch']}, {one['workers']} workers: "
                    + ", ".join(f"{side} {one[side].get('median', 0):.3f} s" if one[side]["status"] == "ok" else f"{side} {one[side]['status']}"
                                for side in one["sides"] if side in one) + ("" if "recipe" in one else one["status"]))  # fmt: skip
            over = until and time.time() > until
            why = "not run: time is up" if over else f"failed: its process ended early: {last_words(job['log'])}"
            results += [{**cell, "status": why} for cell in cells[ran:]]
            if args.json:
                given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
                fit = [{"run": run, "bits": bits, "checkpointing": on, "largest_batch": cards} for (run, bits, on), cards in fits(results).items()]
                args.json.write_text(json.dumps({"arguments": given, "machine": about, "device": device, "results": results, "fits": fit}, indent=1))
        if device.get("peak_flops"):
            say(f"peak for MFU: {device['peak_flops'] / 1e12:.3g} TFLOP/s ({device['peak_flops_from']})")
        show(results, device, Console(width=None if sys.stdout.isatty() else 190, highlight=False))
        if args.keep:
            say(f"weights are kept in {weights}")
        return 0 if any(one.get("recipe", {}).get("status") == "ok" for one in results) else 1
    finally:
        if not args.keep:
            shutil.rmtree(weights, ignore_errors=True)
        if not args.keep or args.scratch:
            shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
