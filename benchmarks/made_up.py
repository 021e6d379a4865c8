"""Models of the published sizes with random weights, their processors, and rows for every recipe."""

import contextlib
import gc
import json
import random
import re

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from tiny import idefics2, llava

SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 980,
    "patch_size": 14,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
VICUNA = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
PERCEIVER = {
    "hidden_size": 4096,
    "resampler_n_latents": 64,
    "resampler_depth": 3,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
}
MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32003,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
}
QWEN = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248094,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
}
# The published configurations as far as they decide on sizes, and as many parameters as they make. MiniCPM-V 4.6: its
# card says 1.3B (SigLIP2-400M, Qwen3.5-0.8B), its file of weights 1,300,428,016.
MODELS = {
    "llava-1.5-7b": {"parameters": 7_063_427_072, "vision_config": CLIP, "text_config": VICUNA},
    "idefics2-8b": {
        "parameters": 8_402_768_112,
        "vision_config": SIGLIP,
        "perceiver_config": PERCEIVER,
        "text_config": MISTRAL,
    },
    "minicpm-v-4.6": {"parameters": 1_300_428_016, "vision_config": SIGLIP, "text_config": QWEN},
}
# Put over them where there is no GPU.
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_PERCEIVER = {
    "hidden_size": 64,
    "resampler_n_latents": 8,
    "resampler_depth": 1,
    "resampler_n_heads": 4,
    "resampler_head_dim": 16,
    "num_key_value_heads": 2,
}
SMALL_QWEN = {
    **NARROW,
    "vocab_size": 512,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
SMALL_MODELS = {
    "llava-1.5-7b": {
        "vision_config": {**NARROW, "num_hidden_layers": 3, "image_size": 56, "projection_dim": 64},
        "text_config": {**NARROW, "vocab_size": 512, "num_key_value_heads": 4},
    },
    "idefics2-8b": {
        "vision_config": {**NARROW, "image_size": 140},
        "perceiver_config": SMALL_PERCEIVER,
        "text_config": {**NARROW, "vocab_size": 640, "num_key_value_heads": 2},
    },
    "minicpm-v-4.6": {"vision_config": {**NARROW, "image_size": 56}, "text_config": SMALL_QWEN},
}
SIDES = {"llava-1.5-7b": 336, "idefics2-8b": 980, "minicpm-v-4.6": 448}  # of a picture, in pixels, as each sees it
PICTURE = (1000, 800)


# ---------------------------------------------------------------- models


def sizes_of(name, small):
    """The parts' configurations of a model, or of its small copy."""
    sizes = {part: dict(values) for part, values in MODELS[name].items() if part.endswith("_config")}
    if small:
        for part, values in SMALL_MODELS[name].items():
            sizes[part] |= values
    return sizes


def sized_processor(name, side, image_tokens=64, tokenizer=None):
    """A model's processor for pictures of `side` pixels. Its tokenizer is a tiny model's, unless one is given.
    image_tokens: of a picture, for Idefics2."""
    if name == "llava-1.5-7b":
        processor = llava.processor(tok=tokenizer)
        processor.image_processor.size = {"shortest_edge": side}
        processor.image_processor.crop_size = {"height": side, "width": side}
    elif name == "idefics2-8b":
        processor = idefics2.processor(tokenizer, height=378 * side // 980, width=side)
        processor.image_seq_len = image_tokens
    else:
        from tiny import minicpm  # here: an older Transformers does not know all that it imports

        processor = minicpm.processor(tok=tokenizer)
        for part in (processor.image_processor, processor.video_processor):
            part.scale_resolution = side
    return processor


def make_processor(name, small):
    """The processor of a model, or of its small copy, with as many tokens as the model has."""
    sizes = sizes_of(name, small)
    vocabulary, side = sizes["text_config"]["vocab_size"], sizes["vision_config"]["image_size"]
    if name == "llava-1.5-7b":  # of its 32,064 rows 32,002 are of tokens
        return sized_processor(name, side, tokenizer=filled(llava.tokenizer(), vocabulary - 62))
    if name == "idefics2-8b":  # the processor adds three tokens
        tokenizer = filled(idefics2.tokenizer(), vocabulary - 3)
        return sized_processor(name, side, sizes["perceiver_config"]["resampler_n_latents"], tokenizer)
    from tiny import minicpm  # here: see sized_processor

    side = side if small else SIDES[name]
    return sized_processor(name, side, tokenizer=filled(minicpm.tokenizer(), vocabulary))


def filled(tokenizer, size):
    """A tokenizer with as many entries: behind its own stand some that no text is made of."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    own = state["model"]["vocab"]
    vocab = own | {f"<filler {n}>": n for n in range(len(own), size - (len(tokenizer) - len(own)))}
    options = {key: value for key, value in tokenizer.init_kwargs.items() if key not in ("vocab", "merges", "backend")}
    new = type(tokenizer)(vocab=vocab, merges=[tuple(pair) for pair in state["model"]["merges"]], **options)
    new.add_tokens([token["content"] for token in state["added_tokens"] if not token["special"]])
    return new


def configuration(name, sizes, tokenizer):
    """A model's name, its parts' configurations -> LlavaConfig, Idefics2Config or MiniCPMV4_6Config."""
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    parts = {part: dict(values) for part, values in sizes.items() if part.endswith("_config")}
    parts["text_config"] |= ids
    if name == "minicpm-v-4.6":
        return transformers.MiniCPMV4_6Config(
            **parts,
            image_token_id=tokenizer.image_token_id,
            video_token_id=tokenizer.video_token_id,
            insert_layer_id=6 if parts["vision_config"]["num_hidden_layers"] > 6 else 0,
            tie_word_embeddings=True,
        )
    image = tokenizer.convert_tokens_to_ids("<image>")
    if name == "idefics2-8b":
        return transformers.Idefics2Config(**parts, image_token_id=image)
    patches = (parts["vision_config"]["image_size"] // 14) ** 2
    return transformers.LlavaConfig(**parts, image_token_index=image, image_seq_length=patches)


def empty_model(config, device, dtype):
    """A model with this configuration, on a device; on "meta" without weights."""
    with torch.device(device):
        return transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)


def tidy(cuda):
    """Free what nobody holds any more, and start to look for the peak anew."""
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make_weights(name, small, folder, cuda):
    """Write a random model and its processor, unless an earlier run has. They are made on the GPU where it is large
    enough: a CPU takes minutes."""
    if (folder / "done").exists():  # written last
        return
    processor = make_processor(name, small)
    config = configuration(name, sizes_of(name, small), processor.tokenizer)
    dtype = torch.bfloat16 if cuda else torch.float32
    transformers.set_seed(0)
    model = None
    if cuda and torch.cuda.mem_get_info()[0] > 1.2 * 2 * MODELS[name]["parameters"]:
        with contextlib.suppress(RuntimeError):  # somebody else has filled it in the meantime
            model = empty_model(config, "cuda", dtype)
    if model is None:
        model = empty_model(config, "cpu", dtype)
    model.save_pretrained(folder, max_shard_size="4GB")
    processor.save_pretrained(folder)
    (folder / "done").write_text(f"{model.num_parameters()}\n")
    del model
    tidy(cuda)


def missing(models, folder, small):
    """Bytes that the weights of these models which are not yet complete in a folder will take there."""
    if small:
        return 0
    return sum(2 * MODELS[name]["parameters"] for name in models if not (folder / name / "done").exists())


def least_memory(name, bits):
    """Bytes of memory that a model's weights in "4" or "16" bits take at the very least."""
    return MODELS[name]["parameters"] * (2 if bits == "16" else 0.6)


def write_weights(name, small, folder, shard=1.5e9):
    """`make_weights` in little memory: in bfloat16, one file of some `shard` bytes after the other."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    processor = make_processor(name, small)
    config = configuration(name, sizes_of(name, small), processor.tokenizer)
    model = empty_model(config, "meta", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tied = set(model.all_tied_weights_keys)
    names = [key for key in model.state_dict() if key not in tied]
    weights, files = {}, {}
    for key in names:
        shape = model.get_parameter_or_buffer(key).shape
        if len(shape) > 1:
            weights[key] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        else:  # norms and biases
            weights[key] = torch.full(shape, float(key.endswith("weight")), dtype=torch.bfloat16)
        if key == names[-1] or sum(weight.nbytes for weight in weights.values()) > shard:
            files |= dict.fromkeys(weights, f"model-{len(set(files.values()))}.safetensors")
            save_file(weights, folder / files[key], metadata={"format": "pt"})
            weights = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "done").write_text(f"{model.num_parameters()}\n")


# ---------------------------------------------------------------- rows


def recipe_row(recipe, question, answers, image, marker="<image>\n"):
    """A question about an image and its answers -> a row as the recipe reads it. Of DPO they are the chosen answer and
    the rejected one. marker: what stands for the image in a conversation."""
    if recipe == "dpo_idefics2":
        return {"image": image, "question": question, "chosen": answers[0], "rejected": answers[1]}
    if recipe == "idefics2_docvqa":
        return {"image": image, "question": question, "answers": answers[:1]}
    who, what, user, assistant = ("from", "value", "human", "gpt")
    if recipe == "finetune_minicpm_lora":
        who, what, user, assistant = ("role", "content", "user", "assistant")
    turns = [{who: user, what: f"{marker}{question}"}, {who: assistant, what: answers[0]}]
    return {"image": image, "conversations": turns}


def trl_row(recipe, question, answers, image):
    """The same in the form that TRL's own collators take."""
    asked = [{"role": "user", "content": question}]
    answered = [[{"role": "assistant", "content": answer}] for answer in answers]
    if recipe == "dpo_idefics2":
        return {"images": [image], "prompt": asked, "chosen": answered[0], "rejected": answered[1]}
    return {"images": [image], "messages": asked + answered[0]}


def trl_data(rows):
    """Rows of `trl_row` with the files of their images -> a data set that reads an image with its row."""
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


def for_trl(recipe, path):
    """The data set of `trl_data` with the rows at `path`, which make_rows wrote."""
    rows = []
    for row in json.loads(path.read_text()):
        if recipe == "dpo_idefics2":
            question, answers = row["question"], [row["chosen"], row["rejected"]]
        else:
            question, answer = (turn["value"] for turn in row["conversations"])
            question, answers = question.removeprefix("<image>\n"), [answer]
        rows.append(trl_row(recipe, question, answers, str(path.parent / row["image"])))
    return trl_data(rows)


def photograph(n, size=PICTURE, seed=0):
    """The n-th picture, (width, height): large shapes and some grain, so that as a JPEG it is about as large as a
    photograph."""
    rng = np.random.default_rng([seed, n])
    coarse = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (size[1], size[0], 1))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


def make_rows(recipe, count, tokenizer, folder, seed=0):
    """Write `count` rows, as the recipe reads them, and eight JPEGs that they are about. Returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(8):
        photograph(n).save(folder / f"{n}.jpg", quality=90)
    draw = random.Random(seed)
    words = sorted(token[1:] for token in tokenizer.get_vocab() if re.fullmatch("[\u2581\u0120][a-z]{2,}", token))

    def text(least, most):
        """Words that make so many tokens."""
        wanted, words_so_far = draw.randint(least, most), draw.choice(words)
        while len(tokenizer(words_so_far, add_special_tokens=False)["input_ids"]) < wanted:
            words_so_far += f" {draw.choice(words)}"
        return words_so_far

    rows = []
    for n in range(count):
        question = text(12, 30)
        if recipe == "dpo_idefics2":
            answers = [text(60, 150), f"{text(60, 149)} {words[n % len(words)]}"]
        elif recipe == "idefics2_docvqa":
            answers = [text(3, 15)]
        else:
            answers = [text(60, 150)]
        rows.append({"id": str(n), **recipe_row(recipe, question, answers, f"{n % 8}.jpg")})
    path = folder / f"{recipe}.json"
    path.write_text(json.dumps(rows))
    return path
