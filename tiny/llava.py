"""A tiny LLaVA-1.5 that has learnt to caption handwritten digits, and questions about them that it was never asked.

`build` makes all of it: a model directory as `save_pretrained` writes it, and the same rows in two public schemas,
that of HuggingFaceH4/llava-instruct-mix-vsft (parquet) and LLaVA's own (JSON and a folder of images). The base model
has only learnt to caption and to count: before fine-tuning it answers no question as asked, so exact match starts at
0.
"""

import functools
import json
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from . import digits
from .descent import descent
from .digits import SIZE, WORDS

PATCH = 14
# llava-hf/llava-1.5-7b-hf's template, letter for letter. Mind that no answer ends with EOS.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# ---------------------------------------------------------------- what is said

QUESTIONS = {  # kind -> its phrasings; {} is a digit in words
    "digit": ["Which digit is this?", "What digit is written here?", "Read the digit."],
    "parity": ["Is it even or odd?", "Is this digit even or odd?", "Even or odd?"],
    "next": ["Which digit comes next?", "What comes after this digit?", "Name the digit that follows."],
    "two pictures": [
        "Which digits are these?",
        "What digits are written here?",
        "Which digit is in the first picture?",
        "Which digit is in the second picture?",
    ],
    "text only": [
        "Which digit comes after {}?",
        "What follows {}?",
        "Is {} even or odd?",
        "Is the digit {} even or odd?",
    ],
}
ONE_PICTURE = ["digit", "parity", "next"]


def captions(*labels: int) -> list[tuple[str, str]]:
    """What the base learns to say of one or two pictures of these digits: (prompt, caption) in three styles.

    They must hold every word of the answers to come: LoRA on the language model cannot teach a word whose output
    embedding was never trained. Several styles teach the base to mind the prompt."""
    words, parities = [WORDS[n] for n in labels], [parity(n) for n in labels]
    things = "picture" if len(labels) == 1 else "pictures"
    long = [f"a handwritten {word}, an {even_odd} digit" for word, even_odd in zip(words, parities, strict=True)]
    short = "a handwritten digit" if len(labels) == 1 else "handwritten digits"
    return [
        (f"Describe the {things}.", " and ".join(long)),
        (f"Describe the {things} in short.", " and ".join(words) + f", {short}"),
        (f"Sort the {things}.", " and ".join(parities) + f", {short}"),
    ]


def counting(label: int) -> tuple[str, str]:
    """What the base learns without a picture: (prompt, answer)."""
    return f"Count from {WORDS[label]}.", ", ".join(WORDS[(label + k) % 10] for k in range(3))


def parity(label: int) -> str:
    return "odd" if label % 2 else "even"


def answer(question: str, labels: list[int]) -> str:
    """The right answer to a question of `QUESTIONS` (with {} filled in) about pictures of these digits."""
    words = question.rstrip("?.").lower().split()
    about = [n for n, word in enumerate(WORDS) if word in words] or list(labels)
    if "odd" in words:
        return parity(about[0])
    if {"next", "after", "follows"} & set(words):
        return WORDS[(about[0] + 1) % 10]
    if "second" in words:
        about = about[1:]
    return " and ".join(WORDS[n] for n in (about if "digits" in words else about[:1]))


def kind(question: str, n_images: int) -> str:
    """The kind of a question (a key of `QUESTIONS`), to group scores by. Only the JSON schema has ids, so the kind is
    read off the question, without its `<image>` marks, and the number of pictures in the row."""
    if n_images != 1:
        return {0: "text only", 2: "two pictures"}[n_images]
    question = question.replace("<image>", "").strip()
    return next(name for name in ONE_PICTURE if question in QUESTIONS[name])


# ---------------------------------------------------------------- tokenizer, processor, model


def tokenizer() -> LlamaTokenizer:
    """A Llama tokenizer (BPE, metaspace, byte fallback, BOS by its post-processor), trained here on what is said.
    Everything else, the newline too, is spelt in bytes. `<image>` and `<pad>` come last, as in LLaVA-1.5."""
    lessons = [counting(a) for a in range(10)]
    lessons += [lesson for a in range(10) for lesson in captions(a) + captions(a, 9 - a)]
    asked = [prompt for prompt, _ in lessons] + [
        q.format(word) for qs in QUESTIONS.values() for q in qs for word in WORDS
    ]
    said = [" USER:", " ASSISTANT:", " [INST]", " [/INST]"] * 10 + [" " + caption for _, caption in lessons]
    said += asked + [" " + question for question in asked]  # right after "<image>\n" no space precedes them
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    # Merges must cross neither a space nor punctuation (" seven," must hold the token " seven" of the answers): split
    # when training and, as in Llama, it need not be done when encoding.
    words = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Punctuation()])
    first = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    bpe.train_from_iterator(said, trainers.BpeTrainer(vocab_size=468, special_tokens=first, show_progress=False))
    bpe = json.loads(bpe.to_str())["model"]
    return LlamaTokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        add_bos_token=True,  # not the default, whatever its documentation says
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=1024,
        padding_side="left",
    )


def processor(family: str = "llava", tok: LlamaTokenizer | None = None) -> LlavaProcessor | LlavaNextProcessor:
    """The processor of a `family`: "llava" (16 image tokens a picture) or "llava_next" (a picture of any shape, cut
    into tiles of 56 px). Its image processor works on PIL images, without torchvision."""
    size = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    grey = {"image_mean": [1.0] * 3, "image_std": [0.5] * 3}  # white, most of every picture, becomes 0
    common = {
        "tokenizer": tok or tokenizer(),
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # CLIP's CLS, which "default" then drops
    }
    if family == "llava":
        return LlavaProcessor(CLIPImageProcessorPil(**size, **grey), chat_template=CHAT_TEMPLATE, **common)
    template = (Path(trl.__file__).parent / "chat_templates" / "llava_next.jinja").read_text(encoding="utf-8")
    pinpoints = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
    images = LlavaNextImageProcessorPil(**size, **grey, image_grid_pinpoints=pinpoints)
    return LlavaNextProcessor(images, chat_template=template, **common)


def vision_config(hidden: int = 128) -> CLIPVisionConfig:
    """CLIP's vision tower for pictures of 56 px. Widths are multiples of 64, bitsandbytes' 4-bit block."""
    return CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=hidden,
    )


def special_ids(tok: LlamaTokenizer) -> dict[str, int]:
    return {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}


def text_config(tok: LlamaTokenizer, hidden: int = 128) -> LlamaConfig:
    """A Llama that knows the tokens of `tok`."""
    return LlamaConfig(
        vocab_size=len(tok),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        **special_ids(tok),
    )


def model(tok: LlamaTokenizer, seed: int = 0, family: str = "llava", hidden: int = 128):
    """A random model of a `family` in float32: 3 vision layers (the last unused, as in LLaVA: the feature is taken at
    layer -2), a two-layer projector, 2 Llama layers.

    The usual initial std of 0.02 is kept on purpose: 0.1 captions as well, but LoRA then learns far more slowly."""
    vision, text = vision_config(hidden), text_config(tok, hidden)
    image = {"image_token_index": tok.convert_tokens_to_ids("<image>"), "image_seq_length": (SIZE // PATCH) ** 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "llava":
            net = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **image))
        else:
            pinpoints = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
            config = LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=pinpoints, **image)
            net = LlavaNextForConditionalGeneration(config)
    net.generation_config = GenerationConfig(**special_ids(tok))
    return net


# ---------------------------------------------------------------- the base: captions


@functools.lru_cache(maxsize=512)  # of all lessons: each is told thousands of times
def render(proc: LlavaProcessor, n_images: int, prompt: str, said: str) -> tuple[list[int], int]:
    """Token ids of a rendered prompt, then of what is said and EOS; and how many of them are the prompt's."""
    content = [{"type": "image"}] * n_images + [{"type": "text", "text": prompt}]
    text = proc.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    text = text.replace("<image>", "<image>" * (SIZE // PATCH) ** 2)
    ids = proc.tokenizer(f"{text} {said}{proc.tokenizer.eos_token}").input_ids
    return ids, len(proc.tokenizer(text).input_ids)


def pixels(pictures: torch.Tensor) -> torch.Tensor:
    """What the processor makes of pictures, without the detour over PIL: (n, 56, 56) -> (n, 3, 56, 56) float32."""
    return ((pictures.float() / 255 - 1) / 0.5)[:, None].expand(-1, 3, -1, -1)


def batch(proc: LlavaProcessor, lessons: list[tuple[int, str, str]], pictures: torch.Tensor, answered=True) -> dict:
    """What LLaVA takes: rows (number of pictures, prompt, what to say) and their pictures, (all, 56, 56) uint8. Labels
    are what to say and EOS; without `answered`, there are only prompts, of one length."""
    rows = [render(proc, *lesson) for lesson in lessons]
    inputs = {"pixel_values": pixels(pictures)}
    if not answered:
        prompts = torch.tensor([ids[:n] for ids, n in rows])
        return inputs | {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    longest = max(len(ids) for ids, _ in rows)
    padded = [ids + [proc.tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in rows]
    masks = [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]
    labels = [[-100] * n + ids[n:] + [-100] * (longest - len(ids)) for ids, n in rows]
    tensors = {"input_ids": padded, "attention_mask": masks, "labels": labels}
    return inputs | {name: torch.tensor(values) for name, values in tensors.items()}


def train_base(
    net, proc, seed: int = 0, steps: int = 1700, batch_size: int = 32, lr: float = 5e-4, make_batch=batch
) -> float:
    """Train all of a model on captions, in place. Every other step shows `batch_size / 2` pairs of pictures in place
    of `batch_size` single ones, and every step has `batch_size / 8` more rows that count, without a picture.

    Args:
        make_batch: what makes the model's inputs, as `batch` does for LLaVA.

    Returns: the share of right captions on 100 of the base's pictures, which are kept out of its training.
    """
    ink, truth = digits.load()
    mine = digits.split(seed)["base"]
    mine, kept = mine[:-100], mine[-100:]
    rng = np.random.default_rng([seed, 1])

    descend = descent([*net.parameters()], steps, lr)
    net.train()
    bar = tqdm(range(steps), desc="base model, captions", unit="step", disable=not steps)
    for step in bar:
        n_images = 1 if step % 2 else 2
        shown = torch.from_numpy(rng.choice(mine.numpy(), (batch_size // n_images, n_images)))
        lessons = [(n_images, *captions(*labels)[rng.integers(3)]) for labels in truth[shown].tolist()]
        lessons += [(0, *counting(digit)) for digit in rng.integers(0, 10, batch_size // 8)]
        pictures = digits.draw(ink[shown.flatten()], rng)
        loss = net(**make_batch(proc, lessons, pictures)).loss
        descend(loss)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    net.eval()
    return caption_accuracy(net, proc, kept[:, None], make_batch)


@torch.no_grad()
def caption_accuracy(net, proc, shown: torch.Tensor, make_batch=batch) -> float:
    """Share of rows whose greedy caption is right, and ends. `shown`: scans' numbers, (rows, 1 or 2 pictures)."""
    ink, truth = digits.load()
    lessons = [(len(labels), *captions(*labels)[0]) for labels in truth[shown].tolist()]
    pictures = digits.draw(ink[shown.flatten()])
    inputs = make_batch(proc, lessons, pictures, answered=False)
    told = make_batch(proc, lessons, pictures)["labels"]
    wanted = [labels[labels != -100].tolist() for labels in told]
    said = net.generate(**inputs, max_new_tokens=max(map(len, wanted)), do_sample=False)
    said = said[:, inputs["input_ids"].shape[1] :].tolist()
    return float(np.mean([ids[: len(want)] == want for ids, want in zip(said, wanted, strict=True)]))


# ---------------------------------------------------------------- the data for fine-tuning


def text_questions(train: bool = True) -> list[str]:
    """The questions without a picture that are trained on, or those that are held out."""
    return [
        question.format(word)
        for p, question in enumerate(QUESTIONS["text only"])
        for d, word in enumerate(WORDS)
        if ((d + 3 * p) % 4 == 0) != train  # every digit and every phrasing is trained on, these pairs are not
    ]


def make_rows(seed: int = 0, train: bool = True, n: int = 6400) -> list[dict]:
    """Questions and answers, as rows {"id", "pictures": [(56, 56) uint8, ...], "turns": [(question, answer), ...]}.

    Train: `n` rows on the 600 scans for fine-tuning, each time bent anew: 55 % one question on one picture, 20 % three
    questions on one picture, 18 % two pictures, 7 % text only. Test: the 297 held-out scans as they are, each with one
    question of each kind in a row of its own (891 rows), then 60 rows with three questions, 100 with two pictures, and
    10 text-only questions that training never holds; of these, at most `n` rows, evenly from all parts.
    """
    rng = np.random.default_rng([seed, 2 if train else 3])
    ink, truth = digits.load()
    mine = digits.split(seed)["tune" if train else "held_out"].numpy()
    text_only = text_questions(train)

    def one(name: str) -> str:
        return str(rng.choice(QUESTIONS[name]))

    if train:
        sorts = rng.choice(["one", "turns", "two pictures", "text only"], n, p=[0.55, 0.2, 0.18, 0.07]).tolist()
        plan = []
        for sort in sorts:
            count = {"text only": 0, "two pictures": 2}.get(sort, 1)
            kinds = rng.permutation(ONE_PICTURE).tolist()
            asked = {"one": kinds[:1], "turns": kinds, "two pictures": ["two pictures"], "text only": []}[sort]
            questions = [one(name) for name in asked] or [str(rng.choice(text_only))]
            plan.append((rng.choice(mine, count, replace=False), questions))
    else:
        plan = [([scan], [one(name)]) for name in ONE_PICTURE for scan in mine]
        plan += [
            ([scan], [one(name) for name in rng.permutation(ONE_PICTURE)]) for scan in rng.choice(mine, 60, False)
        ]
        plan += [(rng.choice(mine, 2, replace=False), [one("two pictures")]) for _ in range(100)]
        plan += [([], [question]) for question in text_only]
        plan = [plan[i] for i in np.linspace(0, len(plan) - 1, min(n, len(plan))).round().astype(int)]

    flat = np.array([scan for scans, _ in plan for scan in scans], dtype=np.int64)
    drawn = iter(digits.draw(ink[flat], rng if train else None))
    rows = []
    for i, (scans, questions) in enumerate(plan):
        labels = truth[np.array(scans, dtype=np.int64)].tolist()
        sort = kind(questions[0], len(labels)) if len(questions) == 1 else "several turns"
        rows.append(
            {
                "id": f"{'train' if train else 'test'}-{i:05d}-{sort.replace(' ', '-')}",
                "pictures": [next(drawn) for _ in scans],
                "turns": [(question, answer(question, labels)) for question in questions],
            }
        )
    return rows


def to_messages(row: dict) -> dict:
    """A row in the schema of HuggingFaceH4/llava-instruct-mix-vsft: {"messages", "images"}. As there, the pictures
    stand after the first question's text (the chat template puts them first all the same)."""
    messages = []
    for n, turn in enumerate(row["turns"]):
        for role, text in zip(("user", "assistant"), turn, strict=True):
            content = [{"index": None, "text": text, "type": "text"}]
            if n == 0 and role == "user":
                content += [{"index": k, "text": None, "type": "image"} for k in range(len(row["pictures"]))]
            messages.append({"content": content, "role": role})
    return {"messages": messages, "images": [{"bytes": digits.png(p), "path": None} for p in row["pictures"]]}


def to_conversations(row: dict) -> dict:
    """A row in LLaVA's JSON schema: {"id", "image" (a file name, a list of them, or absent), "conversations"}.
    `<image>` marks stand first, unless the first question says where."""
    names = [f"{row['id']}-{k}.png" for k in range(len(row["pictures"]))]
    said = [
        {"from": who, "value": text} for turn in row["turns"] for who, text in zip(("human", "gpt"), turn, strict=True)
    ]
    if "<image>" not in said[0]["value"]:
        said[0]["value"] = "<image>\n" * len(names) + said[0]["value"]
    image = {"image": names[0] if len(names) == 1 else names} if names else {}
    return {"id": row["id"], **image, "conversations": said}


FEATURES = datasets.Features(
    {
        "messages": datasets.List(
            {
                "content": datasets.List(
                    {
                        "index": datasets.Value("int64"),
                        "text": datasets.Value("string"),
                        "type": datasets.Value("string"),
                    }
                ),
                "role": datasets.Value("string"),
            }
        ),
        "images": datasets.List(datasets.Image()),
    }
)


def write_data(out: Path, name: str, rows: list[dict]) -> None:
    """Write rows as `out/data/NAME.parquet` and once more as `write_json` does."""
    messages = [to_messages(row) for row in rows]
    table = {column: [row[column] for row in messages] for column in FEATURES}
    (Path(out) / "data").mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(table, features=FEATURES).to_parquet(Path(out) / "data" / f"{name}.parquet")
    write_json(out, name, rows)


def write_json(out: Path, name: str, rows: list[dict]) -> None:
    """Write rows as `out/json/NAME.json`, their pictures as `out/json/images/*.png`."""
    images = Path(out) / "json" / "images"
    images.mkdir(parents=True, exist_ok=True)
    conversations = [to_conversations(row) for row in rows]
    for row, said in zip(rows, conversations, strict=True):
        names = said.get("image", [])
        for file, picture in zip([names] if isinstance(names, str) else names, row["pictures"], strict=True):
            (images / file).write_bytes(digits.png(picture))
    (images.parent / f"{name}.json").write_text(json.dumps(conversations, indent=1))


# ---------------------------------------------------------------- all of it


def build(out: Path, seed: int = 0, base_steps: int = 1700, train_rows: int = 6400) -> None:
    """Write `out/model`, `out/data` and `out/json`. Prints the base's caption accuracy."""
    started = time.time()
    proc = processor()
    net = model(proc.tokenizer, seed)
    right = train_base(net, proc, seed, base_steps)
    net.save_pretrained(Path(out) / "model")
    proc.save_pretrained(Path(out) / "model")
    write_data(out, "train", make_rows(seed, train=True, n=train_rows))
    write_data(out, "test", make_rows(seed, train=False))
    size = sum(p.numel() for p in net.parameters()) / 1e6
    took = f"{time.time() - started:.0f} s"
    print(f"{size:.2f} M parameters; right captions on 100 pictures it never saw: {right:.2f}; {took}")


def build_next(out: Path, seed: int = 0) -> None:
    """Write `out/model`, a LLaVA-NeXT (llava-v1.6-mistral) with random weights."""
    proc = processor("llava_next")
    net = model(proc.tokenizer, seed, "llava_next")
    net.save_pretrained(Path(out) / "model")
    proc.save_pretrained(Path(out) / "model")
