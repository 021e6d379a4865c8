"""Models with the published sizes and random weights, their processors, and rows for every recipe, all made on the spot."""

import contextlib
import gc
import json
import random
import re

import datasets
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from tiny import idefics2, llava

# The published configurations as far as they decide on sizes, and as many parameters as they make. MiniCPM-V 4.6: its card says 1.3B
# (SigLIP2-400M, Qwen3.5-0.8B), its file of weights 1,300,428,016. `small` is put over it where there is no GPU.
SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 980,
    "patch_size": 14,
}
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


def sizes_of(name, small):
    """The entry of MODELS, with `small` put over it where that is wanted."""
    model = {key: dict(value) for key, value in MODELS[name].items() if key.endswith("_config")}
    for key, value in MODELS[name]["small"].items() if small else ():
        model[key] |= value
    return model


def make_processor(name, small):
    """The model's processor with a tiny model's tokenizer, whose vocabulary is filled up to the real one's size."""
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
        from tiny import minicpm  # here: an older Transformers does not know all that it imports

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
    model, ids = (
        sizes_of(name, small),
        {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")},
    )
    model["text_config"] |= ids
    if name == "minicpm-v-4.6":
        image = {"image_token_id": tokenizer.image_token_id, "video_token_id": tokenizer.video_token_id}
        return transformers.MiniCPMV4_6Config(
            **model, **image, insert_layer_id=0 if small else 6, tie_word_embeddings=True
        )
    image = tokenizer.convert_tokens_to_ids("<image>")
    if name == "idefics2-8b":
        return transformers.Idefics2Config(**model, image_token_id=image)
    patches = (model["vision_config"]["image_size"] // 14) ** 2
    return transformers.LlavaConfig(**model, image_token_index=image, image_seq_length=patches)


def tidy(cuda):
    """Give back what nobody holds any more, and begin to look for the peak anew."""
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make_weights(name, small, folder, cuda):
    """Write a random model and its processor, unless an earlier run has. On the GPU, where it is large enough; a CPU takes minutes."""
    if (folder / "done").exists():  # written last
        return
    processor = make_processor(name, small)
    config, weigh = configuration(name, small, processor.tokenizer), 2 * MODELS[name]["parameters"]
    roomy, model = cuda and torch.cuda.mem_get_info()[0] > 1.2 * weigh, None
    transformers.set_seed(0)
    for device in ("cuda", "cpu") if roomy else ("cpu",):
        with contextlib.suppress(RuntimeError) if device == "cuda" else contextlib.nullcontext(), torch.device(device):
            model = transformers.AutoModelForImageTextToText.from_config(
                config, dtype=torch.bfloat16 if cuda else torch.float32
            )
            break
    model.save_pretrained(folder, max_shard_size="4GB")
    processor.save_pretrained(folder)
    (folder / "done").write_text(f"{model.num_parameters()}\n")
    del model
    tidy(cuda)


def missing(models, folder, small):
    """Bytes that the weights of these models which are not yet whole in a folder will take there."""
    return sum(2 * MODELS[name]["parameters"] for name in models if not (small or (folder / name / "done").exists()))


def least_memory(name, bits):
    """Bytes of memory that a model's weights in "4" or "16" bits take at the very least."""
    return MODELS[name]["parameters"] * (2 if bits == "16" else 0.6)


def write_weights(name, small, folder, shard=1.5e9):
    """The same, in bfloat16 and a file after the other of some `shard` bytes each, so that it takes no more memory than that."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    processor = make_processor(name, small)
    config, weights, files = configuration(name, small, processor.tokenizer), {}, {}
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    tied, random_numbers = set(model.all_tied_weights_keys), torch.Generator().manual_seed(0)
    names = [key for key in model.state_dict() if key not in tied]
    for key in names:
        shape = model.get_parameter_or_buffer(key).shape
        if len(shape) > 1:
            weights[key] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=random_numbers)
        else:  # norms and biases
            weights[key] = torch.full(shape, float(key.endswith("weight")), dtype=torch.bfloat16)
        if key == names[-1] or sum(w.nbytes for w in weights.values()) > shard:
            files |= dict.fromkeys(weights, f"model-{len(set(files.values()))}.safetensors")
            save_file(weights, folder / files[key], metadata={"format": "pt"})
            weights = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "done").write_text(f"{model.num_parameters()}\n")


def make_rows(recipe, count, tokenizer, folder, seed=0):
    """Write `count` rows, as the recipe reads them, and eight JPEGs that they are about. -> the path."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(8):
        picture = (
            Image.effect_noise((100, 80), 90).resize((1000, 800)).convert("RGB")
        )  # as large a file as a photograph's, about
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
            row |= {
                "question": question,
                "chosen": text(60, 150),
                "rejected": f"{text(60, 149)} {words[n % len(words)]}",
            }
        elif recipe == "idefics2_docvqa":
            row |= {"question": question, "answers": [text(3, 15)]}
        else:
            names = (
                ("role", "content", "user", "assistant")
                if recipe == "finetune_minicpm_lora"
                else ("from", "value", "human", "gpt")
            )
            turns = zip(names[2:], (f"<image>\n{question}", text(60, 150)))
            row["conversations"] = [{names[0]: who, names[1]: what} for who, what in turns]
        rows.append(row)
    path = folder / f"{recipe}.json"
    path.write_text(json.dumps(rows))
    return path


def for_trl(recipe, path):
    """The rows at `path` in the form that TRL's own collators take."""
    turn = lambda who, text: [{"role": who, "content": text}]
    rows = []
    for row in json.loads(path.read_text()):
        new = {"images": [str(path.parent / row["image"])]}
        if recipe == "dpo_idefics2":
            new |= {
                "prompt": turn("user", row["question"]),
                "chosen": turn("assistant", row["chosen"]),
                "rejected": turn("assistant", row["rejected"]),
            }
        else:
            asked, said = (part["value"] for part in row["conversations"])
            new["messages"] = turn("user", asked.removeprefix("<image>\n")) + turn("assistant", said)
        rows.append(new)
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
