"""A tiny MiniCPM-V 4.6 or 4.7 that has learnt to caption handwritten digits, and questions about them in MiniCPM-V's
JSON.

`build` makes all of it: a model directory as `save_pretrained` writes it, and conversations in the schema of OpenBMB's
own fine-tuning code, with pictures as files. The base model has only learnt to caption and to count: before
fine-tuning it answers no question as asked, so exact match starts at 0.
"""

import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, trainers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6Processor,
    MiniCPMV4_7Config,
    MiniCPMV4_7ForConditionalGeneration,
    MiniCPMV4_7Processor,
    Qwen2Tokenizer,
    processing_utils,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor
from transformers.video_processing_utils import VideoProcessorMixin

from . import digits
from .digits import SIZE, WORDS
from .idefics2 import fit
from .llava import captions, counting, parity

# A processor checks that its video processor is one by a class that it asks transformers for by name, and that is not
# there where torchvision is missing. The class itself, and what derives from it, work without torchvision until a
# video comes.
processing_utils.transformers_module.VideoProcessorMixin = VideoProcessorMixin

PATCH = 14
FAMILIES = {
    "minicpmv4_6": (MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration, MiniCPMV4_6Processor),
    "minicpmv4_7": (MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration, MiniCPMV4_7Processor),
}
# The tokens of openbmb/MiniCPM-V-4.6 that a conversation without tools, audio and video can hold, in its order:
# Qwen3.5's, then MiniCPM's. Which of them are special, so that skip_special_tokens drops them, is Qwen3.5's; 4.7's
# tokenizer could not be seen.
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<think>", "</think>"]
TOKENS += ["<unk>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>"]
NAMED_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
# This renders what openbmb/MiniCPM-V-4.6's template renders of conversations without tools and video, letter for
# letter (its refusals are left out). Mind that the think block stands before the answers that follow the last question
# only, and that it is there whether or not a model thinks. 4.7's template could not be seen; it takes enable_thinking
# too.
CHAT_TEMPLATE = (
    "{%- macro render(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{{ '' if loop.first else '\\n' }}"
    "{{ '<|image_pad|>' if part.type == 'image' or 'image' in part or 'image_url' in part else part.text }}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{%- set last = namespace(question=messages | length - 1) -%}"
    "{%- for message in messages -%}{%- if message.role == 'user' -%}"
    "{%- set last.question = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for message in messages -%}{%- set text = render(message.content) | trim -%}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' -%}{%- set thought = message.reasoning_content or '' -%}"
    "{%- if not message.reasoning_content is string and '</think>' in text -%}"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1] -%}"
    "{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{{ '<think>\\n' + thought | trim + '\\n</think>\\n\\n' if loop.index0 > last.question else '' }}{{ text }}"
    "{%- else -%}{{ text }}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n' }}"
    "{{ '' if enable_thinking else '\\n</think>\\n\\n' }}{%- endif -%}"
)

# ---------------------------------------------------------------- what is said

QUESTIONS = {  # kind -> its phrasings; {0} and {1} are pictures
    "which-digit": ["Which digit is this?", "What digit is written here?", "Read the digit."],
    "even-or-odd": ["Is it even or odd?", "Is this digit even or odd?", "Even or odd?"],
    "next-digit": ["Which digit comes next?", "What comes after this digit?", "Name the digit that follows."],
    "strip": ["Which digits are these?", "Read the digits from left to right.", "What digits are written here?"],
    "page": ["Which digit is on this page?", "What is written on the page?", "Find the digit."],
    "compared": [
        "{0} vs {1}: which digits are these?",
        "{0}\n{1}\nWhich digit is in the first picture?",
        "Compare {0} with {1}. Which digit is in the second picture?",
    ],
    "follow-ups": [],  # the three above on one picture, in turn
    "later-picture": ["And {1}\nWhich digit is this?", "Now {1}: which digit is it?"],  # after a question on {0}
    "no-picture": [
        "Which digit comes after {}?",
        "What follows {}?",
        "Is {} even or odd?",
        "Is the digit {} even or odd?",
    ],
}
KINDS = {  # kind -> what a report calls it
    "which-digit": "Which digit is this?",
    "even-or-odd": "Is it even or odd?",
    "next-digit": "Which digit comes next?",
    "strip": "two digits on a strip, 2 slices",
    "page": "one digit on a page, 4 slices",
    "compared": "two pictures compared",
    "follow-ups": "several turns on one picture",
    "later-picture": "a picture in each of two turns",
    "no-picture": "no picture",
}
ONE_PICTURE = list(KINDS)[:3]


def kind(row_id: str) -> str:
    """The kind of a row (a key of `KINDS`), read off its id."""
    return row_id.split("-", 2)[2]


def answer(question: str, labels: list[int]) -> str:
    """The right answer to a question of `QUESTIONS` about these digits: those that are shown, or the one that is
    named."""
    words = set(question.lower().rstrip("?.").replace(":", "").split())
    if "odd" in words:
        return parity(labels[0])
    if words & {"next", "after", "follows"}:
        return WORDS[(labels[0] + 1) % 10]
    if "digits" in words:
        return " and ".join(WORDS[n] for n in labels)
    return WORDS[labels[-1 if "second" in words else 0]]


# ---------------------------------------------------------------- tokenizer, processor, model


def tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of Qwen's kind (byte-level BPE, no BOS of its own), trained here on what is said. As in MiniCPM-V
    4.6, <|im_end|> ends a turn and is EOS, and <|endoftext|> pads."""
    said = ["assistant\n", "user\n", "system\n", "\n", "\n\n"] * 10
    learnt = lessons([0, 9], "strip") + lessons([0], "page")
    for n in range(10):
        learnt += [counting(n), *lessons([n]), *lessons([n, 9 - n], "pictures")]
    said += [text for lesson in learnt for text in lesson]
    said += [text.format(word, "") for texts in QUESTIONS.values() for text in texts for word in WORDS]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(Qwen2Tokenizer().backend_tokenizer.pre_tokenizer[1].alphabet())
    trainer = trainers.BpeTrainer(vocab_size=498, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(said, trainer)
    bpe = json.loads(bpe.to_str())["model"]
    tok = Qwen2Tokenizer(
        vocab=bpe["vocab"] | {token: len(bpe["vocab"]) + n for n, token in enumerate(TOKENS)},
        merges=[tuple(pair) for pair in bpe["merges"]],
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=NAMED_TOKENS,
        model_max_length=1024,
    )
    tok.add_tokens(["<think>", "</think>"])  # one token each, but not special ones: decoding shows them
    return tok


def processor(family: str = "minicpmv4_6", tok: Qwen2Tokenizer | None = None):
    """The processor of a `family` for pictures of 56 px: a larger one is seen as a whole and in up to 9 slices. 16
    patches become one image token, or 4 in downsample_mode="4x". Its image processor works on PIL images, without
    torchvision."""
    settings = {"scale_resolution": SIZE, "patch_size": PATCH, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images, videos = MiniCPMV4_6ImageProcessorPil(**settings), MiniCPMV4_6VideoProcessor(**settings)
    return FAMILIES[family][2](images, videos, tok or tokenizer(), chat_template=CHAT_TEMPLATE)


def processor_from(folder):
    """What AutoProcessor.from_pretrained makes of a folder or a hub id; it refuses where torchvision is missing. What
    this processor saves, AutoProcessor reads where torchvision is there."""
    tok = AutoTokenizer.from_pretrained(folder)
    images, videos = AutoImageProcessor.from_pretrained(folder), MiniCPMV4_6VideoProcessor.from_pretrained(folder)
    own = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(folder))]
    return own(images, videos, tok, chat_template=tok.chat_template)


def model(tok: Qwen2Tokenizer, seed: int = 0, family: str = "minicpmv4_6", hidden: int = 64):
    """A random model of a `family` in float32: 2 vision layers, the window merger after the first, as in the public
    models early on; a layer of linear and one of full attention. Widths are multiples of 64, bitsandbytes' 4-bit
    block."""
    ids = {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    image = {"image_token_id": tok.image_token_id, "video_token_id": tok.video_token_id, "image_size": SIZE}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
    if family == "minicpmv4_7":  # rows and columns of the canvas have frequencies of their own
        rope["mrope_section"] = [3, 3, 2]
        parts = ("image_start", "image_end", "slice_start", "slice_end")
        image |= {f"{part}_id": tok.convert_tokens_to_ids(NAMED_TOKENS[f"{part}_token"]) for part in parts}
        image["newline_id"] = tok("\n")["input_ids"][0]
    own_config, own, _ = FAMILIES[family]
    config = own_config(
        vision_config={
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
            "initializer_range": 0.1,
        },
        text_config={
            "model_type": "qwen3_5_text",
            "vocab_size": len(tok),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "max_position_embeddings": 1024,
            "rope_parameters": rope,
            "initializer_range": 0.1,
            "tie_word_embeddings": True,
            **ids,
        },
        insert_layer_id=0,
        tie_word_embeddings=True,
        initializer_range=0.1,
        **image,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = own(config)
    net.generation_config = GenerationConfig(**ids | {"eos_token_id": [tok.pad_token_id, tok.eos_token_id]})
    return net


# ---------------------------------------------------------------- the base: captions


def lessons(labels: list[int], thing: str = "picture") -> list[tuple[str, str]]:
    """What the base learns to say of digits in a picture each, or together on a "strip" or a "page": (prompt,
    caption)."""
    return [(re.sub("pictures?", thing, prompt), said) for prompt, said in captions(*labels)]


def batch(proc, rows: list[tuple[list[torch.Tensor], str, str]], answered: bool = True) -> dict:
    """What the model takes: rows of pictures, (h, w) uint8, a prompt and what to say. Labels are what to say and
    <|im_end|>; without `answered`, there are only prompts."""
    texts = []
    for pictures, prompt, _ in rows:
        content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": prompt}]
        texts.append(proc.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    images = [digits.to_pil(picture) for pictures, *_ in rows for picture in pictures] or None
    if answered:
        texts = [f"{text}{said}{proc.tokenizer.eos_token}" for text, (_, _, said) in zip(texts, rows)]
    inputs = dict(proc(text=texts, images=images))
    if answered:
        lengths = torch.tensor([len(ids) + 1 for ids in proc.tokenizer([said for *_, said in rows])["input_ids"]])
        longest = inputs["input_ids"].shape[1]  # padding is on the left
        inputs["labels"] = inputs["input_ids"].masked_fill(torch.arange(longest) < longest - lengths[:, None], -100)
    return inputs


def strip(pictures) -> torch.Tensor:
    """Pictures side by side, as one: n of (h, w) -> (h, n * w)."""
    return torch.cat([*pictures], 1)


def page(picture: torch.Tensor, quarter: int) -> torch.Tensor:
    """A page with a picture in one of its quarters: (h, w) -> (2 * h, 2 * w)."""
    quarters = [picture if n == quarter else torch.full_like(picture, 255) for n in range(4)]
    return torch.cat([strip(quarters[:2]), strip(quarters[2:])])


def train_base(net, proc, seed: int = 0, steps: int = 1000, rows: int = 32, lr: float = 1e-3) -> tuple[float, float]:
    """Train all of a random model in place.

    Returns: the shares of right captions, of one digit and of two side by side, of 100 of the base's scans, which are
    kept out of its training.
    """
    ink, truth = digits.load()
    mine = digits.split(seed)["base"].numpy()
    rng = np.random.default_rng([seed, 41])

    def loss() -> torch.Tensor:
        some = []
        scans = rng.choice(mine[:-100], (rows, 2))
        for pair, drawn in zip(truth[scans].tolist(), digits.draw(ink[scans.ravel()], rng).unflatten(0, scans.shape)):
            sorts = [
                ([drawn[0]], lessons(pair[:1])),
                ([*drawn], lessons(pair, "pictures")),
                ([strip(drawn)], lessons(pair, "strip")),
                ([page(drawn[0], rng.integers(4))], lessons(pair[:1], "page")),
                ([], [counting(pair[0])]),
            ]
            pictures, learnt = sorts[rng.choice(5, p=[0.45, 0.2, 0.15, 0.1, 0.1])]
            some.append((pictures, *learnt[rng.integers(len(learnt))]))
        return net(**batch(proc, some)).loss

    net.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fit(list(net.parameters()), "base model", loss, steps, lr)
    net.eval()
    return caption_accuracy(net, proc, mine[-100:, None]), caption_accuracy(net, proc, mine[-100:].reshape(50, 2))


@torch.no_grad()
def caption_accuracy(net, proc, shown: np.ndarray) -> float:
    """Share of pictures whose greedy caption is right. `shown`: scans' numbers, (pictures, 1 or 2 side by side)."""
    ink, truth = digits.load()
    drawn = digits.draw(ink[shown.ravel()]).unflatten(0, shown.shape)
    thing = "strip" if shown.shape[1] > 1 else "picture"
    rows = [([strip(some)], *lessons(labels, thing)[0]) for labels, some in zip(truth[shown].tolist(), drawn)]
    inputs = batch(proc, rows, answered=False)
    out = net.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    said = proc.post_process_image_text_to_text(out)
    return float(np.mean([text == right for text, (*_, right) in zip(said, rows, strict=True)]))


# ---------------------------------------------------------------- the data for fine-tuning


def turns_about(name: str, texts: dict[str, str], labels: list[int], rng) -> list[tuple[str, str]]:
    """The turns (question, answer) of a row of this kind about pictures of these digits. `texts`: a question of each
    kind; {0} and {1} stand where a picture is."""
    if name == "later-picture":
        first = str(rng.choice(ONE_PICTURE))
        turns = [(texts[first], answer(texts[first], labels[:1])), (texts[name], answer(texts[name], labels[1:]))]
    elif name == "follow-ups":
        turns = [(texts[each], answer(texts[each], labels)) for each in rng.permutation(ONE_PICTURE)]
    else:
        turns = [(texts[name], answer(texts[name], labels))]
    if "{" not in turns[0][0]:
        turns[0] = ("{0}\n" + turns[0][0], turns[0][1])
    return turns


def make_rows(seed: int = 0, train: bool = True, n: int = 6400) -> list[dict]:
    """Conversations, as rows {"id", "scans", "pictures": [(h, w) uint8, ...], "turns": [(question, answer), ...]}; a
    question holds {0} and {1} where a picture stands.

    Train: `n` rows on the 600 scans for fine-tuning, each time bent anew. Test: the 297 held-out scans as they are,
    each with one question of each of the first three kinds in a row of its own (891 rows), then 60 strips, 60 pages,
    100 rows compared, 60 with follow-ups, 60 with a later picture and 10 without, whose questions training never
    holds; of these, at most `n`, evenly from all parts.
    """
    rng = np.random.default_rng([seed, 42 if train else 43])
    ink, truth = digits.load()
    mine = digits.split(seed)["tune" if train else "held_out"].numpy()
    no_picture = [
        (text, digit)
        for p, text in enumerate(QUESTIONS["no-picture"])
        for digit in range(10)
        if ((digit + 3 * p) % 4 == 0) != train  # every digit and every phrasing is trained on, these pairs are not
    ]
    if train:
        shares = dict.fromkeys(KINDS, 0.13) | dict.fromkeys(("strip", "page", "no-picture"), 0.08)
        shares |= {"compared": 0.17, "follow-ups": 0.1, "later-picture": 0.1}
        plan = rng.choice(list(shares), n, p=list(shares.values())).tolist()
    else:
        counts = dict.fromkeys(KINDS, 60) | dict.fromkeys(ONE_PICTURE, len(mine))
        counts |= {"compared": 100, "no-picture": len(no_picture)}
        plan = [name for name in KINDS for _ in range(counts[name])]
    asked = iter(no_picture)
    at_once = {name: iter(mine.tolist()) for name in ONE_PICTURE}  # in a test, each scan once
    whole = []
    for name in plan:
        count = {"strip": 2, "compared": 2, "later-picture": 2, "no-picture": 0}.get(name, 1)
        scans = rng.choice(mine, count, replace=False).tolist()
        if not train and name in at_once:
            scans = [next(at_once[name])]
        labels = truth[scans].tolist()
        texts = {each: str(rng.choice(texts)) for each, texts in QUESTIONS.items() if texts}
        if name == "no-picture":
            text, digit = no_picture[rng.integers(len(no_picture))] if train else next(asked)
            turns = [(text.format(WORDS[digit]), answer(text, [digit]))]
        else:
            turns = turns_about(name, texts, labels, rng)
        whole.append((name, scans, turns, int(rng.integers(4))))
    if not train:
        whole = [whole[i] for i in np.linspace(0, len(whole) - 1, min(n, len(whole))).round().astype(int)]

    flat = np.array([scan for _, scans, *_ in whole for scan in scans], dtype=np.int64)
    drawn = iter(digits.draw(ink[flat], rng if train else None))
    rows = []
    for i, (name, scans, turns, quarter) in enumerate(whole):
        pictures = [next(drawn) for _ in scans]
        if name in ("strip", "page"):
            pictures = [strip(pictures) if name == "strip" else page(pictures[0], quarter)]
        row_id = f"{'train' if train else 'test'}-{i:05d}-{name}"
        rows.append({"id": row_id, "scans": scans, "pictures": pictures, "turns": turns})
    return rows


def to_official(row: dict) -> dict:
    """A row in MiniCPM-V's own JSON schema: {"id", "image" (a file name, a dict of them by placeholder, or absent),
    "conversations"}."""
    names = [f"{row['id']}-{k}.png" for k in range(len(row["pictures"]))]
    marks = ["<image>"] if len(names) == 1 else [f"<image_{k:02d}>" for k in range(len(names))]
    said = [
        {"role": role, "content": text.format(*marks) if role == "user" else text}
        for turn in row["turns"]
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    image = {"image": names[0] if len(names) == 1 else dict(zip(marks, names))} if names else {}
    return {"id": row["id"], **image, "conversations": said}


def write_data(out: Path, name: str, rows: list[dict]) -> None:
    """Write rows as `out/json/NAME.json` with `out/json/images/*.png`."""
    images = Path(out) / "json" / "images"
    images.mkdir(parents=True, exist_ok=True)
    for row in rows:
        for k, picture in enumerate(row["pictures"]):
            (images / f"{row['id']}-{k}.png").write_bytes(digits.png(picture))
    (images.parent / f"{name}.json").write_text(json.dumps([to_official(row) for row in rows], indent=1))


def write_shuffled(out: Path, seed: int = 0) -> None:
    """Write `out/json/shuffled.json`: the questions of test.json about one picture, each with the picture of another:
    what a model that looks answers by chance."""
    rows = [row for row in json.loads((Path(out) / "json/test.json").read_text()) if kind(row["id"]) in ONE_PICTURE]
    order = np.random.default_rng([seed, 44]).permutation(len(rows))
    images = {int(n): rows[int(other)]["image"] for n, other in zip(order, np.roll(order, 1))}  # nobody keeps its own
    (Path(out) / "json/shuffled.json").write_text(
        json.dumps([row | {"image": images[n]} for n, row in enumerate(rows)], indent=1)
    )


# ---------------------------------------------------------------- all of it


def build(
    out: Path, seed: int = 0, base_steps: int = 1000, train_rows: int = 6400, family: str = "minicpmv4_6"
) -> None:
    """Write `out/model` and `out/json`. Prints the base's caption accuracy."""
    started = time.time()
    proc = processor(family)
    net = model(proc.tokenizer, seed, family)
    one, two = train_base(net, proc, seed, base_steps)
    net.save_pretrained(Path(out) / "model")
    proc.save_pretrained(Path(out) / "model")
    write_data(out, "train", make_rows(seed, train=True, n=train_rows))
    write_data(out, "test", make_rows(seed, train=False))
    write_shuffled(out, seed)
    size = sum(p.numel() for p in net.parameters()) / 1e6
    took = f"{time.time() - started:.0f} s"
    print(
        f"{size:.2f} M parameters; right captions of pictures it never saw: {one:.2f}, of two digits {two:.2f}; {took}"
    )
