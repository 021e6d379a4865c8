"""What only llava_two_stage.py has: the very tokens, masks and pixels of LLaVA's two stages, with its code written out
by hand; steps of rows that are alike; docs/llava_two_stage.md."""

import functools
import json
import re
import shutil

import pytest
import tokenizers
import torch
from conftest import ROOT, said
from PIL import Image
from recipes import Recipe, trained
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import llava_two_stage

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture
def two_stage(tiny_parts, images, tmp_path):
    """The recipe; red.png, lime.png, blue.png, yellow.png and black.png are there."""
    images(5)
    return Recipe("llava_two_stage", tiny_parts, tmp_path)


# ------------------------------------------------------------------------------------------- LLaVA's code, by hand
def plain(caption):
    """LLaVA's conv_plain: whatever was asked."""
    return f"<image>{caption}\n"


def v1(*turns, system=SYSTEM, eos="</s>"):
    """LLaVA's conv_vicuna_v1; it ends with the header of an answer where the last turn is a question."""
    text = f"{system} "
    for n, turn in enumerate(turns):
        text += f"ASSISTANT: {turn}{eos}" if n % 2 else f"USER: {turn} "
    return text + ("ASSISTANT:" if len(turns) % 2 else "")


def pieces(tokenizer, prompt):
    """LLaVA's tokenizer_image_token: what is between images is tokenized by itself; of all BOS only the first stays.
    An image is 16 times -1."""
    ids = []
    for n, piece in enumerate(prompt.split("<image>")):
        own = tokenizer(piece)["input_ids"]
        if n > 0:
            ids += [-1] * 16
            if tokenizer.bos_token_id is not None and own[:1] == [tokenizer.bos_token_id]:
                own = own[1:]
        ids += own
    return ids


def preprocess_v1(tokenizer, conversation):
    """The labels of LLaVA's preprocess_v1, in the branch of the tokenizer that it was written for, which marks words
    after </s>, too."""
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


def expand2square(image, colour):
    """LLaVA's own."""
    wide, high = image.size
    square = Image.new("RGB", (max(wide, high),) * 2, colour)
    square.paste(image, (0, (wide - high) // 2) if wide > high else ((high - wide) // 2, 0))
    return square


# ---------------------------------------------------------------------------------------------- kinds of tokenizers
def save_fast(folder, backend, bos="<s>", eos="</s>", unk=None):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token=unk)
    tokenizer.save_pretrained(folder)


def reload_with(folder, **changes):
    """Change parts of a folder's tokenizer.json, and make a fast tokenizer of it."""
    file = folder / "tokenizer.json"
    own = json.loads(file.read_text())
    own["model"].update(changes.pop("model", {}))
    file.write_text(json.dumps(own | changes))
    save_fast(folder, tokenizers.Tokenizer.from_file(str(file)), unk="<unk>")


def marks_everywhere(folder):
    """The tokenizer of Llama's first days: a word mark at the beginning and after every special token."""
    steps = [{"type": "Prepend", "prepend": "▁"}]
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    reload_with(folder, normalizer={"type": "Sequence", "normalizers": steps}, pre_tokenizer=None)


def byte_level(folder, bos="<s>", eos="</s>"):
    """A tokenizer without word marks, as Llama 3 has it."""
    bpe = tokenizers.Tokenizer(models.BPE())
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), to_bytes])
    bpe.decoder = decoders.ByteLevel()
    own = {"special_tokens": ["<s>", eos], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, **own)
    text = [SYSTEM, " USER: ASSISTANT: seven odd digit", "a digit.\n", "it is odd\n"]
    bpe.train_from_iterator(text * 20, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    save_fast(folder, bpe, bos=bos, eos=eos)


KINDS = {  # how to change the language model's tokenizer, its EOS
    "word marks": (None, "</s>"),
    "word marks after special tokens": (marks_everywhere, "</s>"),
    "bytes": (byte_level, "</s>"),
    "bytes, no BOS, another EOS": (functools.partial(byte_level, bos=None, eos="<|end|>"), "<|end|>"),
}


def with_tokenizer(two_stage, change):
    """(a function: settings -> a Collator for parts whose language model has this tokenizer, it)."""
    folder = two_stage.folder / "language"
    if change:
        folder = shutil.copytree(folder, two_stage.tmp_path / "language")
        change(folder)
    parts = {"pretrain_mm_mlp_adapter": two_stage.folder / "align", "language_model": folder}
    return lambda **settings: two_stage.collator(**parts, **settings), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=KINDS)
def kind(request, two_stage):
    """(a function: settings -> a Collator, the language model's own tokenizer, its EOS), of every kind."""
    change, eos = KINDS[request.param]
    return *with_tokenizer(two_stage, change), eos


def tokens(collator, batch, n=0):
    """The tokens of a row without padding, those of images as -1."""
    ids = batch["input_ids"][n][batch["attention_mask"][n].bool()].tolist()
    return [-1 if token == collator.processor.image_token_id else token for token in ids]


# --------------------------------------------------------------------------------------------------- LLaVA's tokens
LIME = ["red.png", "lime.png"]
CONVERSATIONS = {  # the turns of a row, its image, how they are told where otherwise: LLaVA, too, puts images first
    "one turn": (["<image>\nWhich digit is this?", "seven"], "red.png"),
    "image last": (["Which digit?\n<image>", "seven"], "red.png", ["<image>\nWhich digit?", "seven"]),
    "image inside": (["Is <image> odd?", "yes"], "red.png", ["<image>\nIs  odd?", "yes"]),
    "white space": (["  <image>\n\n Odd? \n", "yes"], "red.png", ["<image>\n\n Odd? \n", "yes"]),
    "several turns": (["<image>\nWhich?", "seven", "Odd?", "yes", "Next?", "eight"], "red.png"),
    "image in a later turn": (["Hi", "Hello!", "q\n<image>", "a"], "red.png", ["Hi", "Hello!", "<image>\nq", "a"]),
    "no image": (["Is seven odd?", "yes"], None),
    "no image, spaces stay": ([" Is  seven odd? ", "yes\n"], None),
    "no question": (["<image>", "seven", "<image>\n", "six"], LIME, ["<image>", "seven", "<image>", "six"]),
    "two images": (["<image>\n<image>\nEqual?", "no"], LIME),
    "two images apart": (["<image> or\n<image>?", "red"], LIME, ["<image>\n<image>\n or\n?", "red"]),
    "an image in each turn": (["<image>\nq", "a", "r <image>", "b"], LIME, ["<image>\nq", "a", "<image>\nr", "b"]),
    "what looks like a turn": (["USER: x ASSISTANT: y", "USER: z ASSISTANT:"], None),
    "other scripts": (["<image>\nनमस्ते 😀?", "Überweisung 漢字\n"], "red.png"),
    "answer of spaces before": (["q", "  two"], None),
    "answer of lines and a space behind": (["q", "x\n\ny "], None),
}


def conversations():
    """[(name, row, its turns as LLaVA tells them)]."""
    rows = []
    for name, (turns, image, *told) in CONVERSATIONS.items():
        rows.append((name, said(*turns, image=image), *(told or [turns])))
    return rows


def test_conversations_are_the_tokens_of_llava(kind):
    """And each prompt is the beginning: trained is what follows it, up to the EOS."""
    make, tokenizer, eos = kind
    collator = make()
    assert collator.processor.image_token_id == len(tokenizer)  # a new one
    for name, row, turns in conversations():
        batch, messages = collator([row]), collator.messages_of(row)
        assert tokens(collator, batch) == pieces(tokenizer, v1(*turns, eos=eos)), name
        expected = [-100] * len(batch["labels"][0])
        for n in range(1, len(turns), 2):
            begin, end = (len(pieces(tokenizer, v1(*turns[:k], eos=eos))) for k in (n, n + 1))
            expected[begin:end] = batch["input_ids"][0, begin:end].tolist()
            asked = collator.tokenize([messages[:n]], prompt=True)
            assert tokens(collator, asked) == pieces(tokenizer, v1(*turns[:n], eos=eos)), name
        assert batch["labels"][0].tolist() == expected, name
        assert trained(batch, collator.processor.tokenizer) == [[f" {turn}{eos}" for turn in turns[1::2]]], name


def test_captions_are_the_tokens_of_llava(kind):
    make, tokenizer, _ = kind
    collator = make(stage="align")
    captions = ["a", "seven, an odd digit", "Überweisung 漢字 😀", "!", "« a »", "a  b", "-100", "</im_end>"]
    for caption in [*captions, "The user: a long story", "Human skeleton", "Assistant coach", "USER manual"]:
        for row in (
            said("<image>\nDescribe it.", caption, image="red.png"),
            said("Describe it.\n<image>", caption, image="lime.png"),
            {"image": ["blue.png"], "caption": caption},
        ):
            batch, expected = collator([row]), pieces(tokenizer, plain(caption))
            assert tokens(collator, batch) == expected, caption
            start = len(pieces(tokenizer, "<image>"))  # BOS, where there is one, and the image's
            assert batch["labels"][0].tolist() == [-100] * start + expected[start:]
            [[learnt]] = trained(batch, collator.processor.tokenizer)
            assert learnt.removeprefix(" ") == f"{caption}\n"
    asked = collator.tokenize([collator.messages_of(row)[:1]], prompt=True)
    assert tokens(collator, asked) == pieces(tokenizer, "<image>")


def test_a_file_may_have_captions_of_both_forms(two_stage, write):
    rows = [{"image": "red.png", "caption": "07"}, said("x\n<image>", "b", image="lime.png")]
    rows += [{"image": ["blue.png"], "caption": "c", "url": "x"}]
    settings = {"stage": "align", "dataset_name": write(rows), "image_folder": two_stage.tmp_path}
    collator, (train, _) = two_stage.collator(**settings), two_stage.load_data(**settings, eval_fraction=0)
    batch = collator(list(train))
    assert trained(batch, collator.processor.tokenizer) == [[" 07\n"], [" b\n"], [" c\n"]]
    assert ["rgb"[image[:, 28, 28].argmax()] for image in batch["pixel_values"]] == ["r", "g", "b"]


def test_a_system_turn_takes_the_place_of_llavas(kind):
    make, tokenizer, eos = kind
    turns = ["<image>\nWhich?", "seven", "Odd?", "yes"]
    row = said(*turns, image="red.png")
    row["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    collator = make()
    batch = collator([row])
    assert tokens(collator, batch) == pieces(tokenizer, v1(*turns, system="Be brief.", eos=eos))
    assert trained(batch, collator.processor.tokenizer) == [[f" seven{eos}", f" yes{eos}"]]


def test_a_caption_ends_at_any_token_that_ends_its_line(kind):
    """Llama 3's tokenizer has one for a full stop and a newline together; with "\\n" alone generation would run on."""
    make, _, eos = kind
    align = make(stage="align")
    tokenizer, stop = align.processor.tokenizer, set(align.stop_ids)
    ends = {n for n in range(len(tokenizer)) if tokenizer.decode([n]).endswith("\n")}
    assert stop == ends | {tokenizer.convert_tokens_to_ids(eos)}
    for caption in ("a digit.", "it is odd", "seven"):
        assert tokenizer(f" {caption}\n", add_special_tokens=False)["input_ids"][-1] in stop
    if "Ġ" in "".join(tokenizer.get_vocab()):
        assert len(ends) > 1  # the point of it


MASKED_RIGHT = ["one turn", "image last", "several turns", "image in a later turn", "no image", "two images"]


def test_labels_are_those_of_llavas_own_masking(two_stage):
    """With the tokenizer that it was written for; where white space is usual."""
    make, tokenizer = with_tokenizer(two_stage, marks_everywhere)
    collator = make()
    for name, row, turns in conversations():
        if name in MASKED_RIGHT:
            assert collator([row])["labels"][0].tolist() == preprocess_v1(tokenizer, v1(*turns)), name


def test_pad_may_be_a_word(two_stage):
    """With a tokenizer that knows no bytes an unknown character is <unk>, which pads, too: it is read and trained."""
    no_bytes = {"byte_fallback": False, "unk_token": "<unk>", "fuse_unk": False}
    make, _ = with_tokenizer(two_stage, lambda folder: reload_with(folder, model=no_bytes))
    collator = make()
    unk = collator.processor.tokenizer.unk_token_id
    batch = collator([said("漢 seven", "漢字 odd"), said("Is seven even or odd? " * 5, "odd")])
    assert collator.processor.tokenizer.pad_token_id == unk and (batch["labels"][0] == unk).sum() == 2
    read = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    assert (read == unk).sum() == 3 + (batch["input_ids"][1] == unk).sum()


# ------------------------------------------------------------------------------------------------------------ pixels
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's
SIZES = [(56, 56), (120, 56), (57, 100), (31, 20), (20, 31), (300, 7), (1, 1), (90, 91)]
ROW = said("<image>\nq", "a", image="x.png")


def noise(path, size):
    image = Image.merge("RGB", [Image.effect_noise(size, 90) for _ in range(3)])
    image.save(path)
    return image


@pytest.fixture
def clip(two_stage):
    """(settings with a vision encoder that has CLIP's own mean and deviation, its image processor)."""
    folder = shutil.copytree(two_stage.folder / "vision", two_stage.tmp_path / "vision")
    size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    images = CLIPImageProcessorPil(**size, image_mean=MEAN, image_std=STD)
    images.save_pretrained(folder)
    return {"vision_tower": folder, "pretrain_mm_mlp_adapter": two_stage.folder / "align"}, images


@pytest.mark.parametrize("stage", ["align", "instruct"])
@pytest.mark.parametrize("shape", ["pad", "square"])
def test_pixels_are_padded_or_cropped_as_in_llava(shape, stage, clip, two_stage, tmp_path):
    """And so they are by the saved processor."""
    own, square = clip
    collator = two_stage.collator(stage=stage, image_aspect_ratio=shape, **own)
    collator.processor.save_pretrained(tmp_path / "saved")
    saved = AutoProcessor.from_pretrained(tmp_path / "saved")
    for size in SIZES:
        image = noise(tmp_path / "x.png", size)
        shown = expand2square(image, tuple(int(mean * 255) for mean in MEAN)) if shape == "pad" else image
        expected, pixels = square(shown, return_tensors="pt")["pixel_values"], collator([ROW])["pixel_values"]
        assert pixels.shape == (1, 3, 56, 56) and torch.allclose(pixels, expected, atol=1e-5), size
        assert torch.equal(saved(text="<image>", images=image, return_tensors="pt")["pixel_values"], pixels)


def test_a_model_may_change_from_padded_to_square_and_back(two_stage, tmp_path):
    image = noise(tmp_path / "x.png", (120, 56))
    model = shutil.copytree(two_stage.folder / "align", tmp_path / "model")
    shown = {shape: two_stage.collator(image_aspect_ratio=shape)([ROW])["pixel_values"] for shape in ("pad", "square")}
    assert not torch.allclose(*shown.values())
    for shape in ("pad", "square", "pad", "pad", "square", "square"):
        collator = two_stage.collator(model_name_or_path=model, image_aspect_ratio=shape)
        collator.processor.save_pretrained(model)
        saved = AutoProcessor.from_pretrained(model)(text="<image>", images=image, return_tensors="pt")
        assert torch.equal(collator([ROW])["pixel_values"], shown[shape])
        assert torch.equal(saved["pixel_values"], shown[shape])


# ------------------------------------------------------------------------------------------------- the order of rows
def mixed(seed=0, n=203, share=0.6):
    """(lengths of n rows, how many images each has)."""
    dice = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 900, (n,), generator=dice).tolist()
    return lengths, (torch.rand(n, generator=dice) < share).long().tolist()


def sampler(lengths, images, rows=8, seed=7, epoch=0):
    make = llava_two_stage.ByModalityAndLength
    return make(lengths, images, rows, lambda: torch.Generator().manual_seed(seed + epoch))


def order(*args, **more):
    made = sampler(*args, **more)
    assert len(made) == len(args[0])
    return list(made)


def test_a_step_has_images_or_has_none_and_is_about_as_long():
    lengths, images = mixed(n=2003)
    mine = order(lengths, images)
    assert sorted(mine) == list(range(2003))
    counts = [sum(images), len(images) - sum(images)]
    num_full = 8 * sum(count // 8 for count in counts)  # the rest comes last
    steps = [mine[n : n + 8] for n in range(0, num_full, 8)]
    assert all(len({images[n] for n in step}) == 1 for step in steps)
    spread = [max(lengths[n] for n in step) - min(lengths[n] for n in step) for step in steps]
    assert sum(spread) / len(spread) < 0.05 * (max(lengths) - min(lengths))
    kinds = [images[step[0]] for step in steps]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)  # both are mixed over the epoch


def test_the_longest_row_comes_in_the_first_step():
    """So that memory that does not suffice is seen at once."""
    for seed in range(5):
        lengths, images = mixed(seed)
        lengths[100] = 2000
        assert 100 in order(lengths, images, seed=seed)[:8]


def test_every_epoch_has_its_own_order_and_a_seed_always_the_same():
    data = mixed()
    assert order(*data) == order(*data) != order(*data, epoch=1)
    assert order(*data, epoch=1) == order(*data, epoch=1) != order(*data, epoch=2)
    assert order(*data, seed=8) != order(*data)
    again = sampler(*data)
    assert list(again) == list(again) == order(*data)


@pytest.mark.parametrize("n, share, rows", [(5, 0.5, 8), (16, 1, 8), (20, 0, 8), (9, 0.5, 1), (0, 0, 4)])
def test_few_rows_or_one_kind(n, share, rows):
    lengths, images = mixed(n=n, share=share)
    assert sorted(order(lengths, images, rows)) == list(range(n))


def test_a_run_takes_this_order(two_stage, monkeypatch):
    """By its own seed; and gone on with in the middle of the third epoch, that of the third, not of the first."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "seed": 5, "eval_fraction": 0}
    trainer = two_stage.trainer(image_folder=two_stage.folder / "json" / "images", **settings)
    rows = trainer.train_dataset
    images = [len(keys) for keys in rows["image_keys"]]
    assert 0 < sum(n > 0 for n in images) < len(rows)
    made = trainer._get_train_sampler()
    assert list(made) == order(rows["length"], images, 6, 5)
    trainer.state.epoch = 2.5
    assert list(made) == order(rows["length"], images, 6, 5, epoch=2)
    trainer.args.data_seed = 0
    assert list(trainer._get_train_sampler()) == order(rows["length"], images, 6, 0, epoch=2)
    trainer.settings.group_by_modality_length = False
    assert isinstance(trainer._get_train_sampler(), torch.utils.data.RandomSampler)


# ---------------------------------------------------------------------------------------------------------- the page
PAGE = (ROOT / "docs" / "llava_two_stage.md").read_text(encoding="utf-8")
QUESTION = {"question": "Which is heavier?", "choices": ["a feather", "a brick"], "answer": 1}
EXPLAINED = {"hint": "Look at it.", "lecture": "Mass is much or little.", "solution": "A brick has more mass."}


def test_scienceqa_becomes_conversations_by_the_pages_own_code(two_stage, tmp_path):
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "def to_llava" in block)
    page = {"__name__": "page"}
    exec(code, page)
    rows = [QUESTION | EXPLAINED | {"image": Image.new("RGB", (56, 56), "red")}]
    rows.append(QUESTION | dict.fromkeys(EXPLAINED, "") | {"image": None})
    page["convert"](rows, tmp_path / "scienceqa")
    files = {"dataset_name": tmp_path / "scienceqa" / "train.json", "image_folder": None}
    collator, (train, _) = two_stage.collator(**files), two_stage.load_data(**files, eval_fraction=0)
    shown = [llava_two_stage.mark_trained_tokens(collator([row]), collator.processor) for row in train]
    options = "\nOptions: (A) a feather (B) a brick ASSISTANT:"
    hint = "Context: Look at it. Mass is much or little."
    answer = "« A brick has more mass. The answer is B.</s>»"
    assert f"USER: <image> x 16 \nWhich is heavier?\n{hint}{options}{answer}" in shown[0]
    assert f"USER: Which is heavier?\nContext: N/A{options}« The answer is B.</s>»" in shown[1]


def test_the_pages_table_of_both_stages_is_what_the_recipe_does():
    lines = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| ")]
    said_of = {line[0].strip(): [cell.strip() for cell in line[1:4]] for line in lines if len(line) == 5}
    runs = [("align",), ("instruct",), ("instruct", "--lora_r", "128")]
    parsed = [llava_two_stage.parse(["--use_cpu", "--stage", *flags]) for flags in runs]
    rates = [training.learning_rate for _, training in parsed]
    assert [float(cell) for cell in said_of["learning rate, language model"]] == rates
    rates = [settings.projector_learning_rate for settings, _ in parsed]
    assert [float(cell) for cell in said_of["learning rate, projector"]] == rates
    rows = [t.per_device_train_batch_size * t.gradient_accumulation_steps for _, t in parsed]
    assert [int(cell) for cell in said_of["rows in a step"]] == rows
    shapes = [settings.image_aspect_ratio for settings, _ in parsed]
    assert [cell.split()[0] for cell in said_of["`--image_aspect_ratio`"]] == shapes
    adapter = parsed[2][0]
    assert said_of["adapter"][2] == f"r 128, alpha {adapter.lora_alpha}, dropout {adapter.lora_dropout}"
    for _, training in parsed:
        same_in_all = training.num_train_epochs, training.lr_scheduler_type, training.warmup_steps
        assert (*same_in_all, training.weight_decay) == (1, "cosine", 0.03, 0)


def test_liger_computes_the_loss_where_it_is_asked_to(two_stage):
    """Its kernels need a GPU. Here its forward is Transformers' own, which computes the loss out of labels, too."""
    losses, seen = [], []
    for kernel in (False, True):
        trainer = two_stage.trainer(stage="instruct", use_liger_kernel=kernel)
        batch = trainer.data_collator([trainer.train_dataset[n] for n in range(3)])
        hook = trainer.model.register_forward_pre_hook(
            lambda module, args, inputs: seen.append(set(inputs)), with_kwargs=True
        )
        losses.append(trainer.compute_loss(trainer.model, batch).item())
        hook.remove()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "labels" in seen[1] and "labels" not in seen[0]


def test_the_rows_on_the_page_are_read(two_stage, tmp_path):
    for name in ("sofa.jpg", "desk.jpg"):
        Image.new("RGB", (56, 56), "red").save(tmp_path / name)
    captions, talks = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.S)]
    for stage, rows in (("align", captions), ("instruct", talks)):
        assert (two_stage.collator(stage=stage)(rows)["labels"] != -100).any(1).all()
