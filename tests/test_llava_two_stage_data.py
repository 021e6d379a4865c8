"""llava_two_stage.py: the very tokens, masks and pixels of LLaVA's two stages, with its code written out by hand; which rows go where."""

import itertools
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import datasets
import pytest
import tokenizers
import torch
from conftest import COLOURS, fresh, load_data, said, two_stage_run
from PIL import Image
from test_sft_llava_data import MODES, RED, WHITE, same
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import llava_two_stage as recipe

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEXTS = [
    "a",
    "seven, an odd digit",
    "Überweisung 漢字 😀\nनमस्ते",
    "x\n\ny ",
    "\na",
    "!",
    "USER",
    "ASSISTANT:",
    "« a »",
    "a  b",
    "1. one\n2. two",
    "-100",
]


@pytest.fixture(autouse=True)
def pictures(images):
    """red.png, lime.png, blue.png, yellow.png and black.png."""
    images(5)


def plain(caption):
    """LLaVA's conv_plain: whatever was asked."""
    return f"<image>{caption}\n"


def v1(*turns, system=SYSTEM, eos="</s>"):
    """LLaVA's conv_vicuna_v1; it ends with the header of an answer where the last turn is a question."""
    text = f"{system} "
    for n, turn in enumerate(turns):
        text += f"ASSISTANT: {turn}{eos}" if n % 2 else f"USER: {turn} "
    return text + "ASSISTANT:" * (len(turns) % 2)


def pieces(tokenizer, prompt, image=16):
    """LLaVA's tokenizer_image_token: what is between images is tokenized by itself; of all the BOS only the first stays.
    An image is `image` times -1."""
    ids = []
    for n, piece in enumerate(prompt.split("<image>")):
        own = tokenizer(piece)["input_ids"]
        begins = tokenizer.bos_token_id is not None and own[:1] == [tokenizer.bos_token_id]
        ids += [-1] * (image * (n > 0)) + own[begins and n > 0 :]
    return ids


def preprocess_v1(tokenizer, conversation):
    """The labels of LLaVA's preprocess_v1, in the branch of the tokenizer that it was written for (which marks words after </s>, too)."""
    labels, at = pieces(tokenizer, conversation), 1
    labels[:at] = [-100]
    for turn in conversation.split("</s>"):
        if turn:
            question = turn.split(" ASSISTANT: ")[0] + " ASSISTANT: "
            asked = len(pieces(tokenizer, question)) - 2
            labels[at : at + asked] = [-100] * asked
            at += len(pieces(tokenizer, turn))
    assert at == len(labels)  # else LLaVA warns of a tokenization mismatch and masks all
    return labels


def tokens(collator, batch, n=0):
    """The tokens of a row without padding, images as -1."""
    ids = batch["input_ids"][n][batch["attention_mask"][n].bool()].tolist()
    return [-1 if i == collator.processor.image_token_id else i for i in ids]


def trained(batch, tokenizer):
    """The runs of trained tokens of each row, as text, with the space before their first word. Every label is the token itself or -100."""
    rows, x = [], tokenizer("x", add_special_tokens=False)["input_ids"][-1]  # before it a space is seen
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
        assert all(label in (-100, token) for token, label in zip(ids, labels))
        runs = itertools.groupby(zip(ids, labels), key=lambda pair: pair[1] != -100)
        rows.append(
            [tokenizer.decode([x, *(token for token, _ in run)]).lstrip()[1:] for learned, run in runs if learned]
        )
    return rows


def plain_tokenizer(folder):
    """A language model's own tokenizer, before <image> was added."""
    return AutoTokenizer.from_pretrained(folder)


def seen(batch):
    """The colours of a batch's pictures, r g b y, in their order. Of white the tiny processor makes 0, of no light -2."""
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 0): "y", (0, 0, 0): "k"}
    return "".join(
        names[tuple(int(channel > -1) for channel in picture[:, 28, 28])] for picture in batch.get("pixel_values", [])
    )


def legacy(folder):
    """The tokenizer of Llama's first days: a word mark at the beginning and after every special token."""
    file = folder / "tokenizer.json"
    own = json.loads(file.read_text())
    own["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    own["pre_tokenizer"] = None
    file.write_text(json.dumps(own))
    backend = tokenizers.Tokenizer.from_file(str(file))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def byte_level(folder, bos=True, eos="</s>"):
    """A tokenizer without word marks, as Llama 3 has it."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = (
        normalizers.NFC(),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(
                    Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
                    "isolated",
                ),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", eos], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([SYSTEM, " USER: ASSISTANT: seven odd digit", "a digit.\n", "it is odd\n"] * 20, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>" if bos else None, eos_token=eos).save_pretrained(
        folder
    )


KINDS = {  # how to make the tokenizer of a language model, its EOS
    "word marks": (None, "</s>"),
    "word marks after special tokens": (legacy, "</s>"),
    "bytes": (byte_level, "</s>"),
    "bytes, no BOS, another EOS": (lambda folder: byte_level(folder, bos=False, eos="<|end|>"), "<|end|>"),
}


@pytest.fixture(params=KINDS)
def kind(request, tiny_parts, tmp_path, stage_collate):
    """(a function: stage, settings as keywords -> a Collator; the language model's tokenizer; its EOS), for every kind of tokenizer."""
    make, eos = KINDS[request.param]
    if make:
        shutil.copytree(tiny_parts / "language", tmp_path / "language")
        make(tmp_path / "language")
    folder = tmp_path / "language" if make else tiny_parts / "language"
    own = lambda stage, **settings: stage_collate(
        stage, pretrain_mm_mlp_adapter=tiny_parts / "align", language_model=folder, **settings
    )
    return own, plain_tokenizer(folder), eos


# ------------------------------------------------------------------------------------------------ LLaVA's own tokens
LIME = ["red.png", "lime.png"]
CONVERSATIONS = {  # a row, how LLaVA tells it
    "one turn": (said("<image>\nWhich digit is this?", "seven", image="red.png"), ["<image>\nWhich digit is this?", "seven"]),
    "image last": (said("Which digit is this?\n<image>", "seven", image="red.png"), ["<image>\nWhich digit is this?", "seven"]),
    "image inside": (said("Is <image> odd?", "yes", image="red.png"), ["<image>\nIs  odd?", "yes"]),
    "image after a line break": (said("Look \n<image>\n Odd?", "yes", image="red.png"), ["<image>\nLook \n\n Odd?", "yes"]),
    "no space": (said("<image>Odd?", "yes", image="red.png"), ["<image>\nOdd?", "yes"]),
    "white space": (said("  <image>\n\n Odd? \n", "yes", image="red.png"), ["<image>\nOdd?", "yes"]),
    "several turns": (said("<image>\nWhich?", "seven", "Odd?", "yes", "Next?", "eight", image="red.png"),
                      ["<image>\nWhich?", "seven", "Odd?", "yes", "Next?", "eight"]),
    "image in a later turn": (said("Hi", "Hello!", "Which?\n<image>", "seven", image="red.png"),
                              ["Hi", "Hello!", "<image>\nWhich?", "seven"]),
    "no image": (said("Is seven odd?", "yes"), ["Is seven odd?", "yes"]),
    "no image, several turns": (said("Is seven odd?", "yes", "Why?", "It is."), ["Is seven odd?", "yes", "Why?", "It is."]),
    "no image, spaces stay": (said(" Is  seven odd? ", "yes\n"), [" Is  seven odd? ", "yes\n"]),
    "empty image cell": (said("Odd?", "yes", image=""), ["Odd?", "yes"]),
    "no question": (said("<image>", "seven", "<image>\n", "six", image=LIME), ["<image>", "seven", "<image>", "six"]),
    "two images": (said("<image>\n<image>\nEqual?", "no", image=LIME), ["<image>\n<image>\nEqual?", "no"]),
    "two images apart": (said("<image> or\n<image>?", "red", image=LIME), ["<image>\n<image>\nor\n?", "red"]),
    "an image in each turn": (said("<image>\nWhich?", "seven", "And <image>", "six", image=LIME),
                              ["<image>\nWhich?", "seven", "<image>\nAnd", "six"]),
    "what looks like a turn": (said("USER: x ASSISTANT: y", "USER: z ASSISTANT:"), ["USER: x ASSISTANT: y", "USER: z ASSISTANT:"]),
    "other scripts": (said("<image>\nनमस्ते 😀?", "Überweisung 漢字\n", image="red.png"), ["<image>\nनमस्ते 😀?", "Überweisung 漢字\n"]),
    "answer of spaces before": (said("q", "  two"), ["q", "  two"]),
    "answer of a line break before": (said("q", "\ntwo"), ["q", "\ntwo"]),
}  # fmt: skip


def test_conversations_are_the_tokens_of_llava(kind):
    make, tokenizer, eos = kind
    collator = make("instruct")
    assert collator.processor.image_token_id == len(tokenizer)  # a new one
    for name, (row, turns) in CONVERSATIONS.items():
        batch = collator([row])
        assert tokens(collator, batch) == pieces(tokenizer, v1(*turns, eos=eos)), name
        assert batch["attention_mask"].all()
        assert trained(batch, collator.processor.tokenizer) == [[f" {turn}{eos}" for turn in turns[1::2]]], name
        for n in range(1, len(turns), 2):  # where each answer begins and ends
            begin, end = (len(pieces(tokenizer, v1(*turns[:k], eos=eos))) for k in (n, n + 1))
            before = len(pieces(tokenizer, v1(*turns[: n - 1], eos=eos))) if n > 1 else 0
            labels = batch["labels"][0].tolist()
            assert labels[begin:end] == batch["input_ids"][0, begin:end].tolist() and set(labels[before:begin]) == {
                -100
            }, name


def test_captions_are_the_tokens_of_llava(kind):
    make, tokenizer, _ = kind
    collator = make("align")
    for caption in [*TEXTS, "</im_end>", "The user: a long story", "Human skeleton", "Assistant coach", "USER manual"]:
        if caption == "ASSISTANT:" or "\n" in caption:
            continue  # is taken for a conversation; has lines that would never be said
        for row in (
            said("<image>\nDescribe it.", caption, image="red.png"),
            said("Describe it.\n<image>", caption, image="lime.png"),
            {"image": "blue.png", "caption": caption},
        ):
            batch = collator([row])
            expected = pieces(tokenizer, plain(caption))
            assert tokens(collator, batch) == expected, caption
            start = len(pieces(tokenizer, "<image>"))  # BOS, where there is one, and the image's
            assert batch["labels"][0].tolist() == [-100] * start + expected[start:]
            [[learnt]] = trained(batch, collator.processor.tokenizer)
            assert learnt.removeprefix(" ") == f"{caption}\n"


def test_a_system_turn_takes_the_place_of_llavas(kind):
    make, tokenizer, eos = kind
    turns = ["<image>\nWhich?", "seven", "Odd?", "yes"]
    row = said(*turns, image="red.png")
    row["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    collator = make("instruct")
    batch = collator([row])
    assert tokens(collator, batch) == pieces(tokenizer, v1(*turns, system="Be brief.", eos=eos))
    assert trained(batch, collator.processor.tokenizer) == [[f" seven{eos}", f" yes{eos}"]]


def test_labels_are_those_of_llavas_own_masking(tiny_parts, stage_collate, tmp_path):
    shutil.copytree(tiny_parts / "language", tmp_path / "language")
    legacy(tmp_path / "language")
    tokenizer = plain_tokenizer(tmp_path / "language")
    collator = stage_collate(
        "instruct", pretrain_mm_mlp_adapter=tiny_parts / "align", language_model=tmp_path / "language"
    )
    for name in (
        "one turn",
        "image last",
        "several turns",
        "image in a later turn",
        "no image",
        "no image, several turns",
        "two images",
        "an image in each turn",
    ):
        row, turns = CONVERSATIONS[name]
        assert collator([row])["labels"][0].tolist() == preprocess_v1(tokenizer, v1(*turns)), name


def test_with_todays_tokenizers_one_turn_is_masked_as_llava_does(tiny_parts, stage_collate):
    tokenizer, collator = plain_tokenizer(tiny_parts / "language"), stage_collate("instruct")
    for row, turns in CONVERSATIONS.values():
        if len(turns) == 2 and not turns[1][0].isspace() and "ASSISTANT" not in turns[1]:
            ids = pieces(tokenizer, v1(*turns))
            learned = (
                len(ids) - len(pieces(tokenizer, v1(turns[0]) + " ")) + 1
            )  # LLaVA's "- 2" less the BOS: the header's space is the answer's
            assert collator([row])["labels"][0].tolist() == [-100] * (len(ids) - learned) + ids[-learned:]


# ------------------------------------------------------------------------------------------------------ the prompt
def opened(turns, folder):
    """Turns as LLaVA tells them -> messages for inference, pictures taken from a list of names."""
    names, messages = iter(folder), []
    for n, turn in enumerate(turns):
        content = (
            [{"type": "image", "path": str(next(names))} for _ in range(turn.count("<image>"))] if n % 2 == 0 else []
        )
        words = turn.replace("<image>\n", "").replace("<image>", "")
        messages.append(
            {
                "role": ("user", "assistant")[n % 2],
                "content": content + [{"type": "text", "text": words}] * bool(words),
            }
        )
    return messages


def prompts(tmp_path):
    """[(row, messages up to an answer, the same as LLaVA tells it)] for every answer of every conversation."""
    out = []
    for row, turns in CONVERSATIONS.values():
        names = row.get("image") or []
        names = [tmp_path / name for name in (names if isinstance(names, list) else [names])]
        for n in range(1, len(turns), 2):
            cut = {**row, "conversations": row["conversations"][: n + 1]}
            shown = sum(turn.count("<image>") for turn in turns[:n:2])
            cut["image"] = list(map(str, names[:shown]))
            out.append((cut, opened(turns[:n], names[:shown]), turns[:n]))
    return out


def test_every_prompt_is_the_beginning_of_what_is_trained(kind, tmp_path):
    make, tokenizer, eos = kind
    collator = make("instruct")
    for row, _, turns in prompts(tmp_path):
        batch, asked = collator([row]), collator.tokenize([collator.messages_of(row)[:-1]], prompt=True)
        start = asked["input_ids"].shape[1]
        assert tokens(collator, asked) == pieces(tokenizer, v1(*turns, eos=eos))
        assert torch.equal(batch["input_ids"][:, :start], asked["input_ids"]) and batch["labels"][0, start] != -100
        assert (
            batch["labels"][0, start - 1] == -100
            and (batch["labels"][0, start:] == batch["input_ids"][0, start:]).all()
        )
        assert ("pixel_values" in batch) == ("pixel_values" in asked) == ("<image>" in "".join(turns))
        assert "pixel_values" not in batch or torch.equal(batch["pixel_values"], asked["pixel_values"])
    collator = make("align")
    asked = collator.tokenize([collator.messages_of({"image": "red.png", "caption": "a"})[:-1]], prompt=True)
    assert tokens(collator, asked) == pieces(tokenizer, "<image>")


@pytest.fixture(scope="module")
def instructed(tiny_parts, tmp_path_factory):
    """What a run of the second stage saves, after one step."""
    out = tmp_path_factory.mktemp("instructed") / "run"
    more = {"max_steps": 1, "lora_r": 4, "eval_fraction": 0, "save_strategy": "no", "disable_tqdm": True}
    recipe.main(two_stage_run(tiny_parts, out, "instruct", **more))
    return out


def test_the_prompt_is_the_one_of_inference(tiny_parts, instructed, stage_collate, tmp_path):
    """The processors that runs have saved, loaded by a program that knows nothing of the recipe."""
    all_of = prompts(tmp_path)
    (tmp_path / "messages.json").write_text(json.dumps([messages for _, messages, _ in all_of]))
    code = """
import json, sys, torch
from transformers import AutoProcessor
messages, out = json.load(open(sys.argv[1])), []
for folder in sys.argv[3:]:
    processor = AutoProcessor.from_pretrained(folder)
    ask = lambda one: processor.apply_chat_template(one, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    out.append([dict(ask(one)) for one in messages])
torch.save(out, sys.argv[2])
"""
    fresh(code, tmp_path / "messages.json", tmp_path / "asked.pt", instructed, tiny_parts / "align")
    instruct, align = torch.load(tmp_path / "asked.pt")
    collator = stage_collate("instruct")
    for (row, _, _), asked in zip(all_of, instruct):
        batch, start = collator([row]), asked["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][:, :start], asked["input_ids"]) and batch["labels"][0, start] != -100
        assert (batch["labels"][0, start:] == batch["input_ids"][0, start:]).all() and batch["labels"][
            0, start - 1
        ] == -100
        assert batch.keys() - {"labels"} == asked.keys()
        assert "pixel_values" not in batch or torch.equal(batch["pixel_values"], asked["pixel_values"])
    collator, asked = stage_collate("align"), align[0]
    batch = collator([{"image": "red.png", "caption": "seven"}])
    start = asked["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :start], asked["input_ids"]) and torch.equal(
        batch["pixel_values"], asked["pixel_values"]
    )
    assert batch["labels"][0, start - 1] == -100 and batch["labels"][0, start] != -100


def test_generation_ends_where_training_does(stage_collate):
    instruct, align = stage_collate("instruct"), stage_collate("align")
    assert instruct.stop_ids == [instruct.processor.tokenizer.eos_token_id]
    batch = align([{"image": "red.png", "caption": "seven"}])
    assert align.stop_ids == [align.processor.tokenizer.eos_token_id, batch["labels"][0, -1].item()]


# --------------------------------------------------------------------------------------------------------- batches
ROWS = [row for row, _ in CONVERSATIONS.values()]


def test_padding_is_on_the_left_and_masked_by_place(kind):
    make, tokenizer, _ = kind
    for stage, rows in (
        ("instruct", ROWS),
        ("align", [{"image": "red.png", "caption": text} for text in ("a", "a " * 20, "漢字", "x y z")]),
    ):
        collator = make(stage)
        batch = collator(rows)
        pad, mask = batch["attention_mask"] == 0, batch["attention_mask"]
        wanted = tokenizer.unk_token_id if tokenizer.unk_token_id is not None else tokenizer.eos_token_id
        assert (
            (batch["input_ids"][pad] == wanted).all()
            and (batch["labels"][pad] == -100).all()
            and (mask.diff(dim=1) >= 0).all()
        )
        assert (
            pad.any(1).sum() >= len(rows) - 2
            and mask.any(1).all()
            and not (batch["labels"] == collator.processor.image_token_id).any()
        )


def test_a_row_is_the_same_alone_as_in_company(stage_collate):
    collator = stage_collate("instruct")
    batch, alone = collator(ROWS), [collator([row]) for row in ROWS]
    for n, one in enumerate(alone):
        mask = batch["attention_mask"][n].bool()
        assert all(torch.equal(batch[key][n][mask], one[key][0]) for key in ("input_ids", "labels"))
    assert torch.equal(
        batch["pixel_values"], torch.cat([one["pixel_values"] for one in alone if "pixel_values" in one])
    )
    assert "pixel_values" not in collator([row for row in ROWS if not row.get("image")])


def test_pad_may_be_a_word(tiny_parts, stage_collate, tmp_path):
    """With a tokenizer that knows no bytes an unknown character is <unk>, which pads as well: it is seen and trained on all the same."""
    shutil.copytree(tiny_parts / "language", tmp_path / "language")
    own = json.loads((tmp_path / "language" / "tokenizer.json").read_text())
    own["model"].update(byte_fallback=False, unk_token="<unk>", fuse_unk=False)
    (tmp_path / "language" / "tokenizer.json").write_text(json.dumps(own))
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "language" / "tokenizer.json"))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "language")
    collator = stage_collate(
        "instruct", pretrain_mm_mlp_adapter=tiny_parts / "align", language_model=tmp_path / "language"
    )
    unk = collator.processor.tokenizer.unk_token_id
    batch = collator([said("漢 seven", "漢字 odd"), said("Is seven even or odd? " * 5, "odd")])
    assert collator.processor.tokenizer.pad_token_id == unk and (batch["labels"][0] == unk).sum() == 2
    assert (batch["input_ids"][0][batch["attention_mask"][0].bool()] == unk).sum() == 3 + (
        batch["input_ids"][1] == unk
    ).sum()


def test_pictures_come_in_the_order_of_the_text(stage_collate):
    collator = stage_collate("instruct")
    two, text = said("<image><image>", "a", image=["blue.png", "red.png"]), said("q", "a")
    apart = said("<image> q", "a", "r", "b", "And <image>", "c", image=["yellow.png", "lime.png"])
    one = said("q <image>", "a", image=["black.png"])
    assert (
        seen(collator([two, text, apart, text, one])) == "brygk" and seen(collator([text, one, apart, two])) == "kygbr"
    )
    assert "pixel_values" not in collator([text, text])
    batch = collator([two, text, one])
    assert [(ids == collator.processor.image_token_id).sum().item() for ids in batch["input_ids"]] == [32, 0, 16]


@pytest.mark.parametrize("answer", TEXTS)
def test_answers_may_be_any_text(answer, stage_collate):
    collator = stage_collate("instruct")
    tokenizer = collator.processor.tokenizer
    [texts] = trained(collator([said(answer, answer, answer, answer)]), tokenizer)
    assert texts == [f" {answer}</s>"] * 2  # the space, a word mark, belongs to the first word


def test_a_collator_can_be_pickled(stage_collate):
    collator = stage_collate("instruct")
    assert same(pickle.loads(pickle.dumps(collator))(ROWS), collator(ROWS))


# ---------------------------------------------------------------------------------------------------------- pixels
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's


@pytest.fixture
def clip(tiny_parts, tmp_path):
    """(a folder with a vision encoder that has CLIP's own mean and deviation, its image processor)."""
    shutil.copytree(tiny_parts / "vision", tmp_path / "vision")
    size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    images = CLIPImageProcessorPil(**size, image_mean=MEAN, image_std=STD)
    images.save_pretrained(tmp_path / "vision")
    return tmp_path / "vision", images


def noise(path, size):
    image = Image.merge("RGB", [Image.effect_noise(size, 90) for _ in range(3)])
    image.save(path)
    return image


def expand2square(image, colour):
    """LLaVA's own."""
    wide, high = image.size
    square = Image.new("RGB", (max(wide, high),) * 2, colour)
    square.paste(image, (0, (wide - high) // 2) if wide > high else ((high - wide) // 2, 0))
    return square


SIZES = [(56, 56), (120, 56), (57, 100), (31, 20), (20, 31), (300, 7), (1, 1), (90, 91)]


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_pixels_are_padded_or_cropped_as_in_llava(stage, clip, tiny_parts, stage_collate, tmp_path):
    folder, square = clip
    own = {"vision_tower": folder, "pretrain_mm_mlp_adapter": tiny_parts / "align"}
    both = {kind: stage_collate(stage, image_aspect_ratio=kind, **own) for kind in ("pad", "square")}
    for kind, collator in both.items():
        collator.processor.save_pretrained(tmp_path / kind)
        again = AutoProcessor.from_pretrained(tmp_path / kind)
        for size in SIZES:
            image = noise(tmp_path / "x.png", size)
            shown = expand2square(image, tuple(int(mean * 255) for mean in MEAN)) if kind == "pad" else image
            expected = square(shown, return_tensors="pt")["pixel_values"]
            batch = collator([said("<image>\nq", "a", image="x.png")])
            assert batch["pixel_values"].shape == (1, 3, 56, 56)
            assert torch.allclose(batch["pixel_values"], expected, atol=1e-5), (kind, size)
            assert torch.equal(
                again(text="<image>", images=image, return_tensors="pt")["pixel_values"], batch["pixel_values"]
            )
    usual, other = ("square", "pad") if stage == "align" else ("pad", "square")
    noise(tmp_path / "x.png", (120, 56))
    row = said("<image>\nq", "a", image="x.png")
    default, usual, other = (
        collator([row])["pixel_values"] for collator in (stage_collate(stage, **own), both[usual], both[other])
    )
    assert torch.equal(default, usual) and not torch.allclose(default, other)


def test_a_model_may_change_from_padded_to_square_and_back(tiny_parts, stage_collate, tmp_path):
    noise(tmp_path / "x.png", (120, 56))
    shutil.copytree(tiny_parts / "align", tmp_path / "model")
    pixels = lambda **flags: stage_collate("instruct", **flags)([said("<image>\nq", "a", image="x.png")])[
        "pixel_values"
    ]
    shown = {kind: pixels(image_aspect_ratio=kind) for kind in ("pad", "square")}
    assert not torch.allclose(*shown.values())
    for kind in ("pad", "square", "pad", "pad", "square", "square"):
        collator = stage_collate("instruct", model_name_or_path=tmp_path / "model", image_aspect_ratio=kind)
        collator.processor.save_pretrained(tmp_path / "model")
        assert torch.equal(pixels(model_name_or_path=tmp_path / "model", image_aspect_ratio=kind), shown[kind])
        saved = AutoProcessor.from_pretrained(tmp_path / "model")
        assert torch.equal(
            saved(text="<image>", images=Image.open(tmp_path / "x.png"), return_tensors="pt")["pixel_values"],
            shown[kind],
        )


@pytest.mark.parametrize("image, kind, expected", MODES.values(), ids=MODES)
def test_every_mode_becomes_rgb_on_white(image, kind, expected, tmp_path):
    image.save(tmp_path / f"x.{kind}")
    loaded = recipe.load_image(str(tmp_path / f"x.{kind}"))
    assert loaded.mode == "RGB" and [loaded.getpixel((x, 0)) for x in range(loaded.width)] == expected


@pytest.mark.parametrize("orientation, upright", [(1, (2, 3)), (3, (2, 3)), (6, (3, 2)), (8, (3, 2))])
def test_images_are_upright(orientation, upright, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (2, 3), "white")
    image.putpixel((0, 0), RED)
    image.save(tmp_path / "x.png", exif=exif)
    loaded = recipe.load_image(str(tmp_path / "x.png"))
    assert loaded.size == upright and loaded.getpixel({1: (0, 0), 3: (1, 2), 6: (2, 0), 8: (0, 1)}[orientation]) == RED
    assert sum(loaded.getpixel((x, y)) == WHITE for x in range(upright[0]) for y in range(upright[1])) == 5


# --------------------------------------------------------------------------------------------------- the printed row
def test_the_printed_example(stage_collate):
    align, instruct = stage_collate("align"), stage_collate("instruct")
    caption = {"image": "red.png", "caption": "a digit"}
    assert recipe.mark_trained_tokens(align([caption]), align.processor) == "<s><image> x 16« a digit\n»"
    first, longer = (
        said("<image>\nWhich?", "seven", "Odd?", "yes", image="red.png"),
        said("Is seven even or odd? " * 9, "odd"),
    )
    shown = f"<s> {SYSTEM} USER: <image> x 16 \nWhich? ASSISTANT:« seven</s>»USER: Odd? ASSISTANT:« yes</s>»"
    for rows in ([first], [first, longer]):
        assert recipe.mark_trained_tokens(instruct(rows), instruct.processor) == shown
    assert recipe.mark_trained_tokens(instruct([longer, first]), instruct.processor).endswith("ASSISTANT:« odd</s>»")
    two = recipe.mark_trained_tokens(instruct([said("<image><image>q", "a", image=LIME)]), instruct.processor)
    assert two.count("<image> x 16") == 2 and two.count("<image>") == 2


# ----------------------------------------------------------------------------------------------------- the order of rows
def mixed(seed=0, n=203, share=0.6):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 900, (n,), generator=random).tolist()
    return lengths, (torch.rand(n, generator=random) < share).long().tolist()


def order(lengths, images, rows=8, seed=7, epoch=0):
    sampler = recipe.ByModalityAndLength(lengths, images, rows, lambda: torch.Generator().manual_seed(seed + epoch))
    assert len(sampler) == len(lengths)
    return list(sampler)


def test_a_step_has_images_or_has_none_and_is_about_as_long():
    lengths, images = mixed(n=2003)
    mine = order(lengths, images)
    assert sorted(mine) == list(range(2003))
    full = [sum(images), len(images) - sum(images)]
    steps = [mine[n : n + 8] for n in range(0, 8 * sum(count // 8 for count in full), 8)]
    assert all(len({images[n] for n in step}) == 1 for step in steps)
    spread = [max(lengths[n] for n in step) - min(lengths[n] for n in step) for step in steps]
    assert sum(spread) / len(spread) < 0.05 * (max(lengths) - min(lengths))
    rest = mine[8 * len(steps) :]
    assert len(rest) == sum(count % 8 for count in full) and max(lengths[n] for n in steps[0]) == max(
        lengths[n] for step in steps for n in step
    )
    kinds = [images[step[0]] for step in steps]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)  # and both kinds are mixed over the epoch


def test_the_longest_row_comes_in_the_first_step():
    for seed in range(5):
        lengths, images = mixed(seed)
        lengths[100] = 2000
        assert 100 in order(lengths, images, seed=seed)[:8]


def test_every_epoch_has_its_own_order_and_a_seed_always_the_same():
    data = mixed()
    assert order(*data) == order(*data) != order(*data, epoch=1)
    assert order(*data, epoch=1) == order(*data, epoch=1) != order(*data, epoch=2) and order(*data, seed=8) != order(
        *data
    )
    sampler = recipe.ByModalityAndLength(*data, 8, lambda: torch.Generator().manual_seed(7))
    assert list(sampler) == list(sampler) == order(*data)


@pytest.mark.parametrize(
    "n, share, rows",
    [(5, 0.5, 8), (1, 1, 8), (20, 1, 8), (20, 0, 8), (16, 1, 8), (9, 0.5, 1), (0, 0, 4), (7, 0.5, 100)],
)
def test_few_rows_or_one_kind(n, share, rows):
    lengths, images = mixed(n=n, share=share)
    assert sorted(order(lengths, images, rows)) == list(range(n))


def test_a_run_takes_this_order(stage_parse, tiny_parts):
    settings, training = stage_parse(
        "instruct", eval_fraction=0, per_device_train_batch_size=2, gradient_accumulation_steps=3, seed=5
    )
    train, _ = load_data(recipe, settings, training)
    images = [len(keys) for keys in train["image_keys"]]
    trainer = object.__new__(recipe.Trainer)
    trainer.settings, trainer.args, trainer.train_dataset = settings, training, train
    trainer.state = SimpleNamespace(epoch=None)
    sampler = trainer._get_train_sampler()
    assert list(sampler) == order(train["length"], images, 6, 5)
    trainer.state.epoch = 2.5  # gone on with in the middle of the third: its own order, not that of the first
    assert list(sampler) == order(train["length"], images, 6, 5, epoch=2)
    training.data_seed = 0
    assert list(trainer._get_train_sampler()) == order(train["length"], images, 6, 0, epoch=2)
    assert 0 < sum(n > 0 for n in images) < len(train)
    settings.group_by_modality_length = False
    assert isinstance(trainer._get_train_sampler(), torch.utils.data.RandomSampler)


# ----------------------------------------------------------------------------------------------------------- files
@pytest.fixture
def parse(stage_parse, tmp_path):
    """A function: settings as keywords -> (settings, training) of the second stage; relative image paths start beside the data."""

    def make(stage="instruct", **settings):
        own, training = stage_parse(stage, **settings)
        own.image_folder = str(settings["image_folder"]) if "image_folder" in settings else None
        return own, training

    return make


def said_of(data):
    """The last answer of each row."""
    return [row["conversations"][-1]["value"] for row in data]


@pytest.mark.parametrize(
    "stage, data", [("align", "captions"), ("align", "captions-test"), ("instruct", "train"), ("instruct", "test")]
)
def test_the_whole_of_a_data_set_passes(stage, data, tiny_parts, stage_parse):
    file = tiny_parts / "json" / f"{data}.json"
    settings, training = stage_parse(stage, eval_fraction=0, data_path=file)
    collator, own = recipe.Collator(recipe.load_processor(settings), settings, training), json.loads(file.read_text())
    train, held_out = load_data(recipe, settings, training)
    assert held_out is None and train["row"] == list(range(len(own))) and train["id"] == [row["id"] for row in own]
    for row, right in zip(train.select(range(20)), own):
        batch, ends = collator([row]), "\n" if stage == "align" else "</s>"
        assert row["length"] == batch["labels"].shape[1] and len(row["image_keys"]) == len(
            batch.get("pixel_values", [])
        )
        answers = [f"{turn['value']}{ends}" for turn in right["conversations"] if turn["from"] == "gpt"]
        assert trained(batch, collator.processor.tokenizer) == [[f" {text}" for text in answers]]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "X.JSON", "x.JsonL"])
def test_files_as_windows_writes_them(name, parse, write, tmp_path):
    path = write([said("q", "é 😀"), said("r <image>", "b", image="lime.png", id=7)], name.lower()).rename(
        tmp_path / name
    )
    text = path.read_text().replace("\\u00e9", "é")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    train, _ = load_data(recipe, *parse(data_path=path, eval_fraction=0))
    assert (
        said_of(train) == ["é 😀", "b"]
        and train["id"] == [None, 7]
        and train["image"] == [None, "lime.png"]
        and [len(keys) for keys in train["image_keys"]] == [0, 1]
    )


def test_texts_stay_texts_and_other_keys_do_not_matter(parse, write):
    texts = ["1", "1e3", "07", "true", "null", '"quoted"', '{"total": 6}', "[1, 2]", "é 😀 \r\n / \\"]
    rows = [said(text, text, id=[n, text, None, [n], {"a": n}, 0.5, 10**30][n % 7]) for n, text in enumerate(texts)]
    rows += [
        {
            **said("q", text, "q", text),
            "row": "mine",
            "folder": "/nowhere",
            "length": "long",
            "images_": 5,
            "model": None,
        }
        for text in texts
    ]
    for name in ("x.json", "x.jsonl"):
        train, _ = load_data(recipe, *parse(data_path=write(rows, name), eval_fraction=0))
        assert said_of(train) == texts * 2 and train["row"] == list(range(18)) and not any(train["image_keys"])


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_captions_may_be_written_short(name, parse, write, tmp_path):
    rows = [
        {"image": "red.png", "caption": "07"},
        said("x\n<image>", "b", image="lime.png"),
        {"image": ["blue.png"], "caption": "c", "url": "x"},
    ]
    settings, training = parse("align", data_path=write(rows, name), eval_fraction=0)
    train, _ = load_data(recipe, settings, training)
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    batch = collator(list(train))
    assert trained(batch, collator.processor.tokenizer) == [[" 07\n"], [" b\n"], [" c\n"]] and seen(batch) == "rgb"


def test_images_are_looked_for_beside_the_data_or_in_image_folder(parse, tmp_path):
    folders = {"red": "data_path", "blue": "eval_data_path"}
    for name in folders:
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.png").rename(tmp_path / name / "x.png")
        (tmp_path / name / "rows.json").write_text(
            json.dumps(
                [said("<image>", "two", image="x.png"), said("<image>", "two", image=str(tmp_path / "lime.png"))]
            )
        )
    paths = {key: tmp_path / name / "rows.json" for name, key in folders.items()}
    for given, expected in (({}, ["rg", "bg"]), ({"image_folder": tmp_path / "blue"}, ["bg", "bg"])):
        settings, training = parse(**paths, **given)
        collator = recipe.Collator(recipe.load_processor(settings), settings, training)
        assert [
            seen(collator(sorted(data, key=lambda row: row["row"]))) for data in load_data(recipe, settings, training)
        ] == expected


# -------------------------------------------------------------------------------------------------------- held out
@pytest.fixture
def numbered(write, tmp_path):
    """The path of 20 rows, each with an image of its own, answered by its number."""
    for n in range(20):
        Image.new("RGB", (28, 28), (n, n, n)).save(tmp_path / f"n{n:03d}.png")
    return write([said("<image>", str(n), image=f"n{n:03d}.png") for n in range(20)], "numbered.json")


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_rows_are_held_out_by_seed(stage, numbered, parse):
    options = {"stage": stage, "data_path": numbered, "eval_fraction": 0.2}
    (train, held_out), again, other = (load_data(recipe, *parse(**options, seed=seed)) for seed in (5, 5, 6))
    assert (again[0]["row"], again[1]["row"]) == (train["row"], held_out["row"]) and (len(train), len(held_out)) == (
        16,
        4,
    )
    assert sorted([*train["row"], *held_out["row"]]) == list(range(20)) and other[0]["row"] != train["row"]
    assert said_of(train) == [str(n) for n in train["row"]] and said_of(held_out) == [str(n) for n in held_out["row"]]
    for none in ({"eval_fraction": 0}, {"eval_strategy": "no"}):
        train, held_out = load_data(recipe, *parse(**{**options, **none}))
        assert train["row"] == list(range(20)) and held_out is None


def test_rows_about_one_image_are_on_one_side(parse, write, tmp_path):
    for n in range(8):
        Image.new("RGB", (28, 28), (n, n, n)).save(tmp_path / f"{n}.png")
    names = lambda n: [f"{n % 8}.png", f"./{n % 8}.png", str(tmp_path / f"{n % 8}.png")][n // 8]  # of one file
    path = write([said("<image>", str(n), image=names(n)) for n in range(24)])
    train, held_out = load_data(recipe, *parse(data_path=path, eval_fraction=0.25))
    there = [{int(answer) % 8 for answer in said_of(data)} for data in (train, held_out)]
    assert (len(there[1]), len(held_out), len(train)) == (2, 6, 18) and not there[0] & there[1]
    chain = [said("<image><image>", str(n), image=[f"{n % 8}.png", f"{(n + 1) % 8}.png"]) for n in range(8)] + [
        said("q", "x")
    ] * 8
    train, held_out = load_data(recipe, *parse(data_path=write(chain), eval_fraction=0.1))
    shown = {name for row in train["image"] for name in row or []}
    assert 0 < len(held_out) <= 4 and not set(train["row"]) & set(held_out["row"])
    assert all(set(row["image"]) - shown for row in held_out if row["image"])  # one of its images at least is new


def test_rows_without_images_are_held_out_too(parse, write):
    path = write([said("q", str(n)) for n in range(20)])
    train, held_out = load_data(recipe, *parse(data_path=path, eval_fraction=0.1))
    assert (len(train), len(held_out)) == (18, 2) and sorted(map(int, said_of(train) + said_of(held_out))) == list(
        range(20)
    )


def test_evaluation_is_bounded_to_the_same_rows_each_time(numbered, parse):
    for more in ({"eval_fraction": 0.5}, {"eval_data_path": numbered}):
        runs = [
            load_data(recipe, *parse(data_path=numbered, max_eval_rows=3, seed=seed, **more))[1]["row"]
            for seed in (1, 1, 2)
        ]
        assert len(runs[0]) == 3 and runs[0] == runs[1] != runs[2]


def test_rows_that_are_not_scored_are_not_checked(numbered, parse, write):
    some = write([said("<image>", "7", image="red.png")] + [said("<image>", "7", image="nowhere.png")] * 30)
    settings = {"data_path": numbered, "eval_data_path": some}
    seed = next(seed for seed in range(99) if datasets.Dataset.from_dict({"n": range(31)}).shuffle(seed)["n"][0] == 0)
    train, held_out = load_data(recipe, *parse(**settings, max_eval_rows=1, seed=seed))
    assert held_out["row"] == [0] and train["row"] == list(range(20))
    with pytest.raises(SystemExit, match="1 of 2 rows of the evaluation data"):
        load_data(recipe, *parse(**settings, max_eval_rows=2, seed=seed))


# ------------------------------------------------------------------------------------------------------- the check
@pytest.fixture
def checked(parse, monkeypatch):
    """A function: settings as keywords -> how many rows load_data gave to the collator."""
    calls, call = [], recipe.Collator.__call__
    monkeypatch.setattr(recipe.Collator, "__call__", lambda self, rows: [calls.extend(rows), call(self, rows)][1])

    def make(**settings):
        calls.clear()
        load_data(recipe, *parse(**{"eval_fraction": 0, **settings}))
        return len(calls)

    return make


def test_the_check_is_cached_until_a_file_changes(checked, write, tmp_path):
    path = write([said("<image>", "two", image=name) for name in ("red.png", "lime.png", ["blue.png"])])
    assert [checked(data_path=path), checked(data_path=path)] == [3, 0]
    no_say = {
        "learning_rate": 1,
        "on_bad_rows": "skip",
        "lora_r": 3,
        "output_dir": "x",
        "seed": 7,
        "sample_rows": 1,
        "sample_tokens": 9,
    }
    assert checked(data_path=path, **no_say) == 0  # settings that have no say in it
    for say in ({"model_max_length": 500}, {"image_aspect_ratio": "square"}, {"stage": "align"}):
        assert [checked(data_path=path, **say), checked(data_path=path, **say)] == [3, 0], say
    Image.new("RGB", (9, 9)).save(tmp_path / "blue.png")
    assert [checked(data_path=path), checked(data_path=path)] == [3, 0]
    (tmp_path / "red.png").write_bytes(b"not a picture any more")
    with pytest.raises(SystemExit, match="row 0: unreadable image"):
        checked(data_path=path)
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit, match="3 of 3(?s:.)*row 2"):
        checked(data_path=path, image_folder=tmp_path / "other")
    write([said("<image>", " ", image="lime.png")])  # the same name
    with pytest.raises(SystemExit, match="row 0: empty answer"):
        checked(data_path=path)


def test_one_bad_row_in_a_thousand_is_found_in_parallel(parse, write, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    rows = [said("q", str(n), id=f"id{n}") for n in range(1001)]
    rows[900]["conversations"][1]["value"] = None
    path = write(rows)
    with pytest.raises(SystemExit, match=r"1 of 1001 rows(?s:.*)\n  row 900 \(id id900\): empty answer"):
        load_data(recipe, *parse(data_path=path))
    train, held_out = load_data(recipe, *parse(data_path=path, eval_fraction=0, on_bad_rows="skip"))
    assert train["row"] == [n for n in range(1001) if n != 900] and held_out is None


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_long_rows_are_never_cut_but_dropped_or_refused(stage, parse, write, capsys, stage_collate):
    rows = [said("<image>", "two " * n, image=COLOURS[n % 5] + ".png") for n in (1, 4, 9, 20)]
    settings, collator = {"stage": stage, "data_path": write(rows), "eval_fraction": 0}, stage_collate(stage)
    lengths = [len(tokens(collator, collator([row]))) for row in rows]
    assert lengths[0] < lengths[1] < lengths[2] < lengths[3]
    for limit, kept in (
        (lengths[3], [0, 1, 2, 3]),
        (lengths[3] - 1, [0, 1, 2]),
        (lengths[2] - 1, [0, 1]),
        (lengths[1] - 1, [0]),
    ):
        train, _ = load_data(recipe, *parse(**settings, model_max_length=limit))
        assert train["row"] == kept and train["length"] == [lengths[n] for n in kept]
        out = capsys.readouterr().out
        assert (
            f"row 3: too long: {lengths[3]} tokens, 16 of them of images; --model_max_length is {limit}" in out
        ) == (3 not in kept)
        assert (f"{4 - len(kept)} of 4 rows" in out) == (len(kept) < 4)
    with pytest.raises(
        SystemExit, match=rf"(?s)3 of 4 rows.*row 1: too long: {lengths[1]} .*row 2: too long.*--on_long_rows drop"
    ):
        load_data(recipe, *parse(**settings, model_max_length=limit, on_long_rows="stop"))


def test_loader_workers_make_the_same_batches(stage_parse):
    settings, training = stage_parse("instruct")
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    some = recipe.read_rows(settings.data_path, None, settings).select(range(6))
    one, other = (list(torch.utils.data.DataLoader(some, 2, collate_fn=collator, num_workers=n)) for n in (0, 2))
    assert len(one) == 3 and all(map(same, one, other))


def test_a_caption_ends_at_any_token_that_ends_its_line(kind):
    """Llama 3's tokenizer has one for a full stop and a newline together; with "\\n" alone generation would run on."""
    collator, _, eos = kind
    align = collator("align")
    tokenizer, stop = align.processor.tokenizer, set(align.stop_ids)
    ends = {n for n in range(len(tokenizer)) if tokenizer.decode([n]).endswith("\n")}
    assert stop == ends | {tokenizer.convert_tokens_to_ids(eos)}
    for caption in ("a digit.", "it is odd", "seven"):
        assert tokenizer(f" {caption}\n", add_special_tokens=False)["input_ids"][-1] in stop
    if "Ġ" in "".join(tokenizer.get_vocab()):
        assert len(ends) > 1  # the point of it


def test_adapters_are_scaled_by_two_unless_told_otherwise(stage_parse):
    alphas = [stage_parse("instruct", lora_r=8, **more)[0].lora_alpha for more in ({}, {"lora_alpha": 4})]
    assert alphas == [16, 4] and stage_parse("instruct")[1].as_given["lora_alpha"] is None
