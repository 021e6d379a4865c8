"""A tiny CLIP vision tower and a tiny Llama that know nothing of each other, and the data of LLaVA's two training
stages.

`build` makes all of it. The tower has learnt to tell handwritten digits apart, the language model to speak of digits
that it never saw: joined, they see and speak only once a projector between them is trained (stage 1, on captions), and
answer questions about a picture only once the language model is trained too (stage 2, on conversations).
"""

import time
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionModel, GenerationConfig, LlamaForCausalLM, LlamaTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from . import digits, llava
from .digits import WORDS
from .idefics2 import fit, trained_tokenizer
from .llava import answer, captions, counting, pixels, text_questions

write_data = llava.write_json  # as the other families call it: rows as JSON and pictures, here without a parquet file
LAYER = -2  # whose features LLaVA takes
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# a caption's two places for the picture, as in LLaVA-Pretrain; training in LLaVA's plain format drops the text
PROMPTS = ["Describe the digit.\n<image>", "<image>\nDescribe the digit."]

# ---------------------------------------------------------------- what is said


def caption(label: int) -> str:
    return captions(label)[0][1]


def chat(turns: list[tuple[str, str]]) -> str:
    """A conversation in LLaVA's v1 format, that of Vicuna v1.1: only answers end with EOS, and nothing follows it."""
    return f"{SYSTEM} " + "".join(f"USER: {question} ASSISTANT: {said}</s>" for question, said in turns)


def lines(rng: np.random.Generator) -> str:
    """Two lines: a caption and the digit's name, in either order. That a line tells what the next one is about makes
    the language model look back, at what it will find a picture in one day."""
    digit = int(rng.integers(10))
    return "".join(f"{line}\n" for line in rng.permutation([caption(digit), WORDS[digit]]))


def talk(rng: np.random.Generator) -> str:
    """A conversation without any picture, of one or two turns."""
    asked = [(question, answer(question, [])) for question in text_questions()] + [counting(n) for n in range(10)]
    return chat([asked[n] for n in rng.choice(len(asked), rng.integers(1, 3), replace=False)])


# ---------------------------------------------------------------- the two models


def tokenizer() -> LlamaTokenizer:
    """A tokenizer of Vicuna's kind, `<unk>` padding, trained here on what is said. It knows no `<image>`."""
    said = [SYSTEM, "USER:", "ASSISTANT:"] * 10 + ["Describe the digit."]
    said += [text for digit in range(10) for text in (caption(digit), *counting(digit))]
    said += [
        question.format(word) for questions in llava.QUESTIONS.values() for question in questions for word in WORDS
    ]
    tok = trained_tokenizer(said, size=600)
    tok.padding_side = "right"  # as Vicuna's
    return tok


def image_processor() -> CLIPImageProcessorPil:
    """The tiny LLaVA's."""
    return llava.processor().image_processor


def vision(seed: int = 0, hidden: int = 128) -> CLIPVisionModel:
    """A random vision tower, the tiny LLaVA's, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPVisionModel(llava.vision_config(hidden))


def language(tok: LlamaTokenizer, seed: int = 0, hidden: int = 128) -> LlamaForCausalLM:
    """A random language model, the tiny LLaVA's, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = LlamaForCausalLM(llava.text_config(tok, hidden))
    net.generation_config = GenerationConfig(**llava.special_ids(tok))
    return net


def features(net: CLIPVisionModel, pictures: torch.Tensor) -> torch.Tensor:
    """What LLaVA takes of pictures (n, 56, 56): the patches' features at `LAYER`, (n, 16, hidden)."""
    return net(pixels(pictures), output_hidden_states=True).hidden_states[LAYER][:, 1:]


def train_vision(net: CLIPVisionModel, seed: int = 0, steps: int = 1500, batch: int = 32, lr: float = 1e-3) -> float:
    """Train a random tower in place: every patch is to tell the whole picture's digit, by a linear layer that is then
    thrown away.

    Returns: the share of right digits of 100 of the base's scans, which are kept out of its training.
    """
    ink, truth = digits.load()
    mine = digits.split(seed)["base"].numpy()
    rng = np.random.default_rng([seed, 41])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = torch.nn.Linear(net.config.hidden_size, 10)

    def loss() -> torch.Tensor:
        scans = rng.choice(mine[:-100], batch)
        logits = head(features(net, digits.draw(ink[scans], rng)))
        return torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), truth[scans, None].expand(-1, logits.shape[1])
        )

    net.train()
    used = [
        *net.embeddings.parameters(),
        *net.pre_layrnorm.parameters(),
        *net.encoder.layers[: LAYER + 1].parameters(),
    ]
    fit([*used, *head.parameters()], "vision tower, digits", loss, steps, lr)
    net.eval()
    with torch.no_grad():
        said = head(features(net, digits.draw(ink[mine[-100:]]))).mean(1).argmax(1)
    return (said == truth[mine[-100:]]).float().mean().item()


def train_language(
    net: LlamaForCausalLM, tok: LlamaTokenizer, seed: int = 0, steps: int = 500, batch: int = 32, lr: float = 1e-3
) -> None:
    """Train a random language model in place on every token of `lines` and of `talk`, a step on either at random."""
    rng = np.random.default_rng([seed, 42])

    def loss() -> torch.Tensor:
        text = (lines, talk)[rng.integers(2)]
        said = tok([text(rng) for _ in range(batch)], padding=True, return_tensors="pt")
        return net(**said, labels=said.input_ids.masked_fill(said.attention_mask == 0, -100)).loss

    net.train()
    fit([*net.parameters()], "language model, text", loss, steps, lr)
    net.eval()


@torch.no_grad()
def text_accuracy(net: LlamaForCausalLM, tok: LlamaTokenizer) -> float:
    """Share of the held-out questions without a picture that are answered right: by the right word, a token, and
    EOS."""
    asked = [
        tok(chat([(question, answer(question, []))]), return_tensors="pt").input_ids
        for question in text_questions(train=False)
    ]
    return float(np.mean([torch.equal(net(ids).logits[0, -3:-1].argmax(1), ids[0, -2:]) for ids in asked]))


# ---------------------------------------------------------------- the data of both stages


def make_captions(seed: int = 0, train: bool = True, n: int = 3000) -> list[dict]:
    """Captions as rows of `llava.make_rows`. Train: `n` on the 600 scans for fine-tuning, each time bent anew. Test:
    of the 297 held-out scans as they are, at most `n`."""
    rng = np.random.default_rng([seed, 43 if train else 44])
    ink, truth = digits.load()
    mine = digits.split(seed)["tune" if train else "held_out"].numpy()
    scans = rng.choice(mine, n) if train else mine[:n]
    return [
        {
            "id": f"captions-{'train' if train else 'test'}-{i:05d}",
            "pictures": [picture],
            "turns": [(str(rng.choice(PROMPTS)), caption(int(truth[scan])))],
        }
        for i, (scan, picture) in enumerate(zip(scans, digits.draw(ink[scans], rng if train else None), strict=True))
    ]


def make_rows(seed: int = 0, train: bool = True, n: int = 6400) -> list[dict]:
    """`llava.make_rows` without the rows on two pictures: LLaVA's own code knows one picture a row."""
    return [row for row in llava.make_rows(seed, train, n) if len(row["pictures"]) < 2]


# ---------------------------------------------------------------- all of it


def save(out: Path, eyes: CLIPVisionModel, tok: LlamaTokenizer, words: LlamaForCausalLM) -> None:
    """Write `out/vision` and `out/language`."""
    eyes.save_pretrained(Path(out) / "vision")
    image_processor().save_pretrained(Path(out) / "vision")
    words.save_pretrained(Path(out) / "language")
    tok.save_pretrained(Path(out) / "language")


def build(out: Path, seed: int = 0, base_steps: int = 1500, train_rows: int = 6400, caption_rows: int = 3000) -> None:
    """Write `out/vision`, `out/language` and `out/json`. Prints how well the one sees and the other speaks. The
    language model takes a third of the tower's steps."""
    started = time.time()
    tok = tokenizer()
    eyes, words = vision(seed), language(tok, seed)
    seen = train_vision(eyes, seed, base_steps)
    train_language(words, tok, seed, -(-base_steps // 3))
    save(out, eyes, tok, words)
    write_data(out, "train", make_rows(seed, n=train_rows))
    write_data(out, "test", make_rows(seed, train=False))
    write_data(out, "captions", make_captions(seed, n=caption_rows))
    write_data(out, "captions-test", make_captions(seed, train=False))
    sizes = " and ".join(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M" for net in (eyes, words))
    told = f"right digits of 100 pictures it never saw: {seen:.2f}"
    print(f"{sizes} parameters; {time.time() - started:.0f} s")
    print(f"{told}; right answers to questions it never heard: {text_accuracy(words, tok):.2f}")
