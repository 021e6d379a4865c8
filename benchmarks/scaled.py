"""Models scaled down in the proportions of the published ones, and rows for one step of theirs."""

import functools
import random

import torch
from made_up import MODELS, SIDES, empty_model, recipe_row
from PIL import Image, ImageDraw
from transformers.models.idefics2.modeling_idefics2 import Idefics2MLP

from tools.runs import user_turn

# What widths and lengths are divided by, layers of the vision tower, layers of the language model. Deep: as many
# operations as the real model has, with next to nothing to compute in each.
LAYERS = {
    "idefics2-8b": {"real": (1, 27, 32), "scaled": (4, 5, 6), "tiny": (16, 2, 2), "deep": (32, 27, 32)},
    "llava-1.5-7b": {"real": (1, 24, 32), "scaled": (4, 3, 4), "tiny": (16, 3, 2), "deep": (32, 24, 32)},
    "minicpm-v-4.6": {"real": (1, 27, 24), "scaled": (4, 4, 4), "tiny": (16, 2, 2), "deep": (16, 27, 24)},
}
# idefics2_docvqa's own: full pages, narrow layers. Hidden, intermediate, layers, heads, key-value heads.
PAGES = {
    "scaled": {"side": 980, "vision": (192, 718, 2, 3), "text": (256, 896, 32, 8, 2), "perceiver": (4, 32, 1)},
    "tiny": {"side": 140, "vision": (64, 128, 2, 2), "text": (64, 128, 2, 2, 1), "perceiver": (2, 32, 1)},
}
WIDTHS = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
HEADS = ["num_attention_heads", "num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads"]
PICTURES = {  # whose FLOPs --real_size counts; the first one is measured
    "idefics2-8b": [(980, 980), (640, 480), (490, 490)],
    "llava-1.5-7b": [(336, 336)],
    "minicpm-v-4.6": [(896, 896), (640, 480), (448, 448)],
}


# ---------------------------------------------------------------- sizes and models


def shape(name, size):
    """A model's name and "real", "scaled" or "tiny" -> its parts' configurations; `by`, what widths and lengths were
    divided by; `depth`, the share of layers left; `side` of a picture; `tokens` of an image."""
    by, vision_layers, text_layers = LAYERS[name][size]
    depth = text_layers / MODELS[name]["text_config"]["num_hidden_layers"]
    sizes = {"by": by, "depth": depth, "side": 14 * round(SIDES[name] / by**0.5 / 14)}
    for part, layers in (("vision_config", vision_layers), ("text_config", text_layers)):
        sizes[part] = {**MODELS[name][part], "num_hidden_layers": layers}
        for width in ["hidden_size", "intermediate_size", *HEADS]:
            if width in sizes[part]:
                sizes[part][width] = max(1, sizes[part][width] // by)
    text = sizes["text_config"]
    text["vocab_size"] = max(700, round(text["vocab_size"] / by * depth))
    if name == "minicpm-v-4.6":
        text["layer_types"] = ((["linear_attention"] * 3 + ["full_attention"]) * 6)[-text_layers:]
        return {**sizes, "tokens": 64 // by}
    sizes["vision_config"]["image_size"] = sizes["side"]
    if name == "llava-1.5-7b":
        return {**sizes, "tokens": (sizes["side"] // 14) ** 2}
    heads = max(1, 16 // by)
    sizes["perceiver_config"] = {
        **MODELS[name]["perceiver_config"],
        "hidden_size": text["hidden_size"],
        "resampler_n_latents": 64 // by,
        "resampler_n_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "resampler_depth": max(1, round(3 * depth)),
    }
    return {**sizes, "tokens": 64 // by}


def page_shape(name, size):
    """The same for idefics2_docvqa: the scaled and the tiny model see full pages, and have all of the vocabulary."""
    if size == "real":
        return shape(name, size)
    small = PAGES[size]
    perceiver = dict(zip(["resampler_n_heads", "resampler_head_dim", "num_key_value_heads"], small["perceiver"]))
    sizes = {"vision_config": {"image_size": small["side"]}, "perceiver_config": perceiver, "text_config": {}}
    sizes["vision_config"] |= zip(WIDTHS, small["vision"])
    sizes["text_config"] |= zip(WIDTHS, small["text"])
    sizes["perceiver_config"]["hidden_size"] = sizes["text_config"]["hidden_size"]
    parts = {part: {**MODELS[name][part], **values} for part, values in sizes.items()}
    return {"by": 1, "depth": 1, "side": small["side"], "tokens": 64, **parts}


def make_model(config, sizes, device, dtype):
    """The frozen base as the recipe's `load_model` leaves it, with random weights."""
    model = empty_model(config, device, dtype)
    if sizes["depth"] < 1:
        with torch.device(device):
            narrow_projections(model, sizes)
    if config.model_type == "idefics2":  # at their initial 1 all image tokens are equal, and gradients rounding errors
        model.model.connector.perceiver_resampler.latents.data.normal_(std=0.5)
    return model.to(dtype).requires_grad_(False)


def narrow_projections(model, sizes):
    """Give the projections between the parts of a scaled model their share: they cannot have fewer layers."""
    depth = sizes["depth"]
    vision, text = sizes["vision_config"], sizes["text_config"]
    seen, width = vision["hidden_size"], text["hidden_size"]
    linear = torch.nn.Linear
    if model.config.model_type == "llava":
        projector, inner = model.model.multi_modal_projector, round(width * depth)
        projector.linear_1, projector.linear_2 = linear(seen, inner), linear(inner, width)
    elif model.config.model_type == "idefics2":
        inner = round(text["intermediate_size"] * depth)
        projection = Idefics2MLP(seen, inner, width, model.config.text_config.hidden_act)
        model.model.connector.modality_projection = projection
    else:
        merger, inner = model.model.vision_tower.vit_merger, round(4 * vision["intermediate_size"] * depth)
        merger.linear_1, merger.linear_2 = linear(4 * seen, inner), linear(inner, seen)
        last, inner = model.model.merger.mlp[0], round(4 * seen * depth)
        last.linear_1, last.linear_2 = linear(4 * seen, inner), linear(inner, width)


# ---------------------------------------------------------------- rows


def count_tokens(tokenizer, text):
    """Tokens of a text, without BOS."""
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def digits(draw, least, count):
    """A text of digits, added one by one until `count` of it is at least `least`."""
    text = str(draw.randrange(1, 10))
    while count(text) < least:
        text += draw.choice("0123456789")
    return text


def noise_rows(args, setup, picture, spread):
    """Rows as the recipe reads them: an image of noise, as large as a `picture` for the real model; a prompt of 40
    tokens, the image's not counted, or of 36-44 with `spread`; answers of the case's lengths. All divided by `by`, as
    near as the chat template allows."""
    case, sizes, processor = setup.case, setup.sizes, setup.collator.processor
    draw, noise, rows = random.Random(args.seed), random.Random(args.seed), []
    width, height = (round(length * sizes["side"] / SIDES[args.model]) for length in picture)
    count = functools.partial(count_tokens, processor.tokenizer)

    def prompt_length(text, image):
        messages = [user_turn(setup.collator, text, [image])]
        return count(processor.apply_chat_template(messages, add_generation_prompt=True)) - case.uncounted

    for n in range(args.batch_size * args.steps):
        image = Image.frombytes("RGB", (width, height), noise.randbytes(3 * width * height))
        file = str(setup.folder / f"{n}.png")
        image.save(file)
        least = (40 + spread * draw.randrange(-4, 5)) // sizes["by"]
        question = digits(draw, least, functools.partial(prompt_length, image=image))
        answers = []
        for middle, most in case.answers:
            least = (middle + spread * draw.randrange(-most, most + 1)) // sizes["by"]
            answers.append(digits(draw, least, count))
        rows.append({**recipe_row(args.recipe, question, answers, file, marker="<image>"), "row": n})
    return rows


def page_rows(args, setup, picture, spread):
    """Rows of idefics2_docvqa: a printed page, a question of 12-20 tokens, an answer of 2-14 digits, each of them a
    token. A page is as large as the model sees it. Several rows have the same, if args.questions says so."""
    draw, rows, side = random.Random(args.seed), [], setup.sizes["side"]
    for n in range(args.batch_size * args.steps):
        if n % args.questions == 0:
            page = Image.new("RGB", (draw.randrange(680, 721) * side // 980, side), "white")
            pen = ImageDraw.Draw(page)
            for y in range(20, page.height - 20, 24):
                pen.text((20, y), f"{draw.random()} " * draw.randrange(1, 5), fill="black")
        question, length = "What is", draw.randrange(12, 21)
        while count_tokens(setup.collator.processor.tokenizer, question) < length:
            question += " " + draw.choice(["the", "total", "on", "this", "form", "number"])
        answer = "".join(draw.choices("0123456789", k=draw.randrange(2, 15)))
        rows.append({**recipe_row(args.recipe, question, [answer], page), "row": n})
    return rows
