"""A tiny Idefics2 that has learnt to read forms aloud, to be taught to answer questions about them.

`build` makes all of it: a model directory as `save_pretrained` writes it, and the rows of `forms`. The base model has
only learnt to transcribe ("Total: 47"): before fine-tuning it answers no question as asked, so ANLS starts at 0.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
    LlamaTokenizer,
)
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from . import digits, forms
from .descent import descent

LATENTS = 8  # image tokens of a page
# HuggingFaceM4/idefics2-8b's template, letter for letter.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize()}}{% if message['content'][0]['type'] == 'image' %}"
    "{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# ---------------------------------------------------------------- what is said


def line(field: dict) -> str:
    """A field, read aloud."""
    return f"{field['name']}: {field['value']}"


def lessons(form: dict) -> list[tuple[str, str, str]]:
    """What the base learns to say of a form: (text before the image, text after it, what to say). First all of it,
    then all of it in small letters, then one line by the name that questions call it by, for each field.

    They must hold every token of the answers to come: LoRA cannot teach a word whose output embedding was never
    trained. Without the last ones, fine-tuning learns no better than chance which value belongs to which name.
    """
    full = ", ".join(line(field) for field in form["fields"])
    found = [("Read the form.", "", full), ("Read the form in small letters.", "", full.lower())]
    return found + [("Read one line.", forms.called(field["name"]), line(field)) for field in form["fields"]]


def lesson(form: dict, vocabulary: list[str], rng: np.random.Generator) -> tuple[str, str, str]:
    """One of `lessons`, at random, mostly one line. One of seven asks for all of the form by words without sense:
    whatever the base does not understand, it reads the form aloud, and every word's embedding is trained."""
    found = lessons(form)
    if rng.random() < 0.15:
        jumble = " ".join(rng.choice(vocabulary, rng.integers(1, 6)))
        texts = [("Read the form.", jumble), (jumble, ""), ("Answer briefly.", jumble)]
        return *texts[rng.choice(3, p=[0.2, 0.2, 0.6])], found[0][2]
    if rng.random() < 0.7:
        return found[rng.integers(2, len(found))]
    return found[int(rng.random() < 0.3)]


def vocabulary() -> list[str]:
    """Every word of the questions, in all languages."""
    asked = [
        text for name in forms.FIELDS for n in range(len(forms.QUESTIONS)) for text in forms.ask(name, n).values()
    ]
    return sorted({word.strip("?.,:¿") for text in asked for word in text.split()} - {""})


# ---------------------------------------------------------------- tokenizer, processor, model


def tokenizer() -> LlamaTokenizer:
    """A tokenizer for all that is said of forms."""
    said = ["User:", "Assistant:", "Answer briefly."] * 10
    for name in forms.FIELDS:
        said += [text for phrasing in range(len(forms.QUESTIONS)) for text in forms.ask(name, phrasing).values()]
        for value in forms.WORDS.get(name, [str(n) for n in range(10, 20)]):
            form = {"fields": [{"name": name, "value": value}]}
            said += [text for lesson in lessons(form) for text in lesson]
    return trained_tokenizer(said, size=573)


def trained_tokenizer(said: list[str], size: int) -> LlamaTokenizer:
    """A tokenizer of Mistral's kind (BPE, metaspace, byte fallback, digits one by one, BOS by its post-processor),
    trained here on what is said. As in Idefics2-8b, `<unk>` pads, on the left; the processor adds its own tokens."""
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    # Merges must cross neither a space, nor punctuation, nor digits: split when training and, as in Llama, it need not
    # be done when encoding.
    spaces = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [spaces, pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    first = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    texts = [" " + text for text in said] + said
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=first, show_progress=False))
    bpe = json.loads(bpe.to_str())["model"]
    return LlamaTokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        add_bos_token=True,  # not the default, whatever its documentation says
        pad_token="<unk>",
        model_max_length=1024,
        padding_side="left",
    )


def processor(
    tok: LlamaTokenizer | None = None, height: int = forms.HEIGHT, width: int = forms.WIDTH
) -> Idefics2Processor:
    """The processor. As in the public model, pictures are split in five unless `do_image_splitting=False` is said.
    Pictures of `width` x `height` px keep their size. Its image processor works on PIL images, without torchvision."""
    images = Idefics2ImageProcessorPil(
        size={"shortest_edge": height, "longest_edge": width},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_image_splitting=True,
    )
    return Idefics2Processor(images, tok or tokenizer(), image_seq_len=LATENTS, chat_template=CHAT_TEMPLATE)


def model(
    tok: LlamaTokenizer, seed: int = 0, hidden: int = 128, width: int = forms.WIDTH
) -> Idefics2ForConditionalGeneration:
    """A random model in float32: 2 vision layers, a resampler of depth 2 to 8 latents, 2 Mistral layers with grouped
    queries. `tok` is a processor's: with the image's tokens; `width` is the pictures' longer side. The other widths
    are multiples of 64, bitsandbytes' 4-bit block."""
    ids = {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    config = Idefics2Config(
        vision_config={
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": width,
            "patch_size": forms.CELL,
        },
        perceiver_config={
            "hidden_size": hidden,
            "resampler_n_latents": LATENTS,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": hidden // 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
        },
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tok),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            **ids,
        },
        image_token_id=tok.convert_tokens_to_ids("<image>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Idefics2ForConditionalGeneration(config)
        with torch.no_grad():  # they start as ones, which makes every latent the same image token for ever
            net.model.connector.perceiver_resampler.latents.normal_(std=0.5)
            net.model.vision_model.embeddings.position_embedding.weight.normal_(std=0.5)
    stops = [tok.convert_tokens_to_ids("<end_of_utterance>"), tok.eos_token_id]
    net.generation_config = GenerationConfig(**ids | {"eos_token_id": stops})
    return net


# ---------------------------------------------------------------- the base: reading aloud


def prompt(proc: Idefics2Processor, before: str, after: str) -> str:
    """A rendered user turn: text, image, text (either may be empty), and the header of the answer."""
    content = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
    content = [part for part in content if part.get("text") != ""]
    return proc.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def batch(proc: Idefics2Processor, pages: torch.Tensor, said: list[tuple[str, str, str]], answer: bool = True) -> dict:
    """What the model takes: pages, (n, h, w) uint8, with a lesson each. Labels are what to say and
    <end_of_utterance>; without `answer`, only prompts."""
    prompts = [prompt(proc, *lesson[:2]) for lesson in said]
    texts = [f"{text} {lesson[2]}<end_of_utterance>" for text, lesson in zip(prompts, said)] if answer else prompts
    with Unsplit(proc):
        inputs = proc(text=texts, padding=True, return_tensors="pt")
        ends = [len(ids) for ids in proc(text=prompts).input_ids]
    rows = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "pixel_values": pixels(pages),
    }
    if answer:
        start = (inputs["attention_mask"] == 0).sum(1) + torch.tensor(ends)  # padding is on the left
        places = torch.arange(inputs["input_ids"].shape[1])
        rows["labels"] = inputs["input_ids"].masked_fill(places < start[:, None], -100)
    return rows


class Unsplit:
    """While it is open, a processor does not split pictures. (A call without pictures takes no such argument.)"""

    def __init__(self, proc: Idefics2Processor):
        self.images = proc.image_processor

    def __enter__(self):
        self.was, self.images.do_image_splitting = self.images.do_image_splitting, False

    def __exit__(self, *_):
        self.images.do_image_splitting = self.was


def pixels(pages: torch.Tensor) -> torch.Tensor:
    """What the processor makes of pages, without the detour over PIL: (n, h, w) -> (n, 1, 3, h, w) float32."""
    return ((pages.float() / 255 - 0.5) / 0.5)[:, None, None].expand(-1, -1, 3, -1, -1)


def fit(parameters: list, name: str, loss, steps: int, lr: float) -> None:
    """Take `steps` steps down `loss()`, showing it beside a bar called `name`."""
    step = descent(parameters, steps, lr)
    bar = tqdm(range(steps), desc=name, unit="step", disable=not steps)
    for number in bar:
        value = loss()
        step(value)
        if number % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.3f}")


def train_sight(net, writer: forms.Writer, steps: int, rows: int, lr: float = 2e-3) -> None:
    """Train the vision tower and the connector to tell characters and names of fields, in place, as the public model's
    tower was trained before it met a language model. Without it the digits stay unread for thousands of steps.

    The heads that tell are thrown away. They are asked at each box's patch and at one latent for each box: what stands
    in it, and what its line is called (so that a value and its name are found in one place); the last two latents are
    asked what the lines are called.
    """
    classes, names = [*"0123456789", ""] + sum(forms.WORDS.values(), []), [*forms.FIELDS, ""]
    width = net.config.text_config.hidden_size
    heads = torch.nn.ModuleList(torch.nn.Linear(width, n) for n in 2 * [len(classes), len(names)])
    tower, connector = net.model.vision_model, net.model.connector

    def loss() -> torch.Tensor:
        some = [writer.form(1 + (writer.rng.random() < 0.8), printed=0.25) for _ in range(rows)]
        inside = torch.full((rows, len(forms.LINES), forms.BOXES), classes.index(""))
        called = torch.full((rows, len(forms.LINES)), names.index(""))
        for n, form in enumerate(some):
            for field in form["fields"]:
                at, value = forms.LINES.index(field["line"]), field["value"]
                called[n, at] = names.index(field["name"])
                found = [classes.index(part) for part in ([value] * forms.BOXES if value.isalpha() else value)]
                inside[n, at, : len(found)] = torch.tensor(found)
        seen = tower(pixels(writer.draw(some, bend=True))[:, 0].contiguous()).last_hidden_state
        latents = connector(seen, torch.ones(seen.shape[:2], dtype=torch.bool))
        patches = seen.unflatten(1, (forms.HEIGHT // forms.CELL, forms.WIDTH // forms.CELL))
        patches = patches[:, list(forms.LINES), forms.VALUE : forms.VALUE + forms.BOXES].flatten(1, 2)
        of_box = called.repeat_interleave(forms.BOXES, 1)
        pairs = [
            (heads[0](patches), inside.flatten(1)),
            (heads[1](patches), of_box),
            (heads[2](latents[:, : of_box.shape[1]]), inside.flatten(1)),
            (heads[3](latents), torch.cat([of_box, called], 1)),
        ]
        return sum(torch.nn.functional.cross_entropy(told.flatten(0, 1), right.flatten()) for told, right in pairs)

    parameters = [*tower.parameters(), *connector.parameters(), *heads.parameters()]
    fit(parameters, "base model, seeing", loss, steps, lr)


def train_reading(net, proc, writer: forms.Writer, steps: int, rows: int, lr: float = 1e-3) -> None:
    """Train the model but for the vision tower, which sees by now, to read forms aloud, in place."""
    frozen = set(net.model.vision_model.parameters())
    words = vocabulary()

    def loss() -> torch.Tensor:
        some = [writer.form(1 + (writer.rng.random() < 0.9), printed=0.3) for _ in range(rows)]
        said = [lesson(form, words, writer.rng) for form in some]
        return net(**batch(proc, writer.draw(some, bend=True), said)).loss

    net.model.vision_model.requires_grad_(False)
    fit([p for p in net.parameters() if p not in frozen], "base model, reading", loss, steps, lr)
    net.model.vision_model.requires_grad_(True)


def train_base(net, proc, seed: int = 0, steps: int = 1400, rows: int = 32) -> tuple[float, float]:
    """Train a random model in place: first to see (5 of 14 steps), then to read forms aloud.

    Returns: the shares of right readings, of forms with one field and of one line of forms with two, on forms
    written with 100 of the base's scans, which are kept out of its training.
    """
    mine = digits.split(seed)["base"]
    if steps:
        with torch.no_grad():  # an initial deviation of 0.05 in place of 0.02: attention finds its place sooner
            for module in net.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight *= 2.5
            net.model.vision_model.embeddings.position_embedding.weight *= 2
    writer = forms.Writer(seed, mine[:-100], np.random.default_rng([seed, 11]))
    net.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        train_sight(net, writer, steps * 5 // 14, rows)
        train_reading(net, proc, writer, steps - steps * 5 // 14, rows)
    net.eval()
    writer = forms.Writer(seed, mine[-100:], np.random.default_rng([seed, 14]))
    some = {count: [writer.form(count) for _ in range(100)] for count in (1, 2)}
    return tuple(reading_accuracy(net, proc, writer, some[count], which) for count, which in ((1, 0), (2, 2)))


@torch.no_grad()
def answers(net, proc, pages: torch.Tensor, said: list[tuple[str, str, str]], longest: int = 16) -> list[str]:
    """What the model says, greedily, of pages, (n, h, w) uint8, with a lesson each, in at most `longest` tokens."""
    inputs = batch(proc, pages, said, answer=False)
    out = net.generate(**inputs, max_new_tokens=longest, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in proc.batch_decode(out, skip_special_tokens=True)]


def accuracy(net, proc, pages: torch.Tensor, said: list[tuple[str, str, str]], longest: int = 16) -> float:
    """Share of pages of which the model says what its lesson says."""
    texts = answers(net, proc, pages, said, longest)
    return float(np.mean([text == right for text, (_, _, right) in zip(texts, said, strict=True)]))


def reading_accuracy(net, proc, writer: forms.Writer, some: list[dict], which: int = 0) -> float:
    """Share of forms that are read without a mistake, greedily; `which` is the place in `lessons`."""
    said = [lessons(form)[which] for form in some]
    return accuracy(net, proc, writer.draw(some, bend=False), said)


# ---------------------------------------------------------------- all of it


def build(out: Path, seed: int = 0, base_steps: int = 1400, train_rows: int = 6400) -> None:
    """Write `out/model`, `out/data` and `out/json`. Prints how well the base reads."""
    started = time.time()
    proc = processor()
    net = model(proc.tokenizer, seed)
    one, two = train_base(net, proc, seed, base_steps)
    net.save_pretrained(Path(out) / "model")
    proc.save_pretrained(Path(out) / "model")
    forms.write_data(out, "train", forms.make_rows(seed, train=True, n=train_rows))
    forms.write_data(out, "test", forms.make_rows(seed, train=False))
    size = sum(p.numel() for p in net.parameters()) / 1e6
    took = f"{time.time() - started:.0f} s"
    print(f"{size:.2f} M parameters; {took}")
    print(f"100 forms with scans it never saw: read right {one:.2f}, one line of two {two:.2f}")
