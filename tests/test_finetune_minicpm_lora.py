"""What only finetune_minicpm_lora.py has: pictures at their placeholders and in slices, tied words, an adapter that is
trained further, and MiniCPM-V 2.6 repaired. On tiny models of 4.6 and 4.7, and on the stand-in for 2.6."""

import contextlib
import functools
import json
import re
import shutil
import sys
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import log, talks
from peft import PeftModel
from PIL import Image
from recipes import Recipe, same
from runs import logits, run, stir, write_rows
from test_labels import flat, prompts, trained
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

import finetune_minicpm_lora
from tiny import minicpm

END = "<|im_end|>"
SYSTEM = {"role": "system", "content": "Be brief."}
FOLDERS = {"4.6": "tiny_minicpm", "4.7": "tiny_minicpm47", "2.6": "tiny_minicpm26"}
COMPARED = {"<image_00>": "red.png", "<image_01>": "large.png", "<image_02>": "lime.png"}
TOLD = talks("What?", "a", "Even or odd?", "Überweisung 漢字 😀\nनमस्ते", "e", "f")["conversations"]
ROWS = [  # of every shape and of different lengths, in one batch; large.png is cut into slices
    talks("<image>\nWhich digit is this?", "seven"),
    talks("Hi!", "odd!", image=None),
    talks("Compare <image_01> with <image_00>. Which?", "!!", "And <image_02>?", "six and two!", image=COMPARED),
    {"image": "blue.png", "conversations": [SYSTEM, *TOLD]},
    talks("Is seven even or odd?", "odd", image=None),
]
ANSWERS = [["seven"], ["odd!"], ["!!", "six and two!"], ["a", "Überweisung 漢字 😀\nनमस्ते", "f"], ["odd"]]
TURNS = [  # their turns up to the last answer, parts divided by |, as one would write them for inference
    ["red.png|Which digit is this?"],
    ["Hi!"],
    ["Compare |large.png| with |red.png|. Which?", "!!", "And |lime.png|?"],
    ["blue.png|What?", "a", "Even or odd?", "Überweisung 漢字 😀\nनमस्ते", "e"],
    ["Is seven even or odd?"],
]
RATES = {"tune_vision": True, "vision_learning_rate": 1e-4, "projector_learning_rate": 1e-2}
families = pytest.mark.parametrize("family", FOLDERS)
native = pytest.mark.parametrize("family", ["4.6", "4.7"])


# ------------------------------------------------------------------------------------------------- what the tests use
@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with red.png, lime.png and blue.png of one size, and large.png (yellow), which is cut into slices."""
    out = tmp_path_factory.mktemp("pictures")
    for colour in ("red", "lime", "blue"):
        Image.new("RGB", (56, 56), colour).save(out / f"{colour}.png")
    Image.new("RGB", (160, 100), "yellow").save(out / "large.png")
    return out


@pytest.fixture(scope="module")
def recipe(request, pictures):
    """A function: family -> the recipe with its model. Relative image paths start in `pictures`."""
    return lambda family: Recipe("finetune_minicpm_lora", request.getfixturevalue(FOLDERS[family]), pictures)


@pytest.fixture(scope="module")
def collator_of(recipe):
    """A function: family, settings as keywords -> a Collator."""
    return functools.cache(lambda family, **settings: recipe(family).collator(**settings))


@pytest.fixture(scope="module")
def flags(recipe, tiny_minicpm, tmp_path_factory):
    """A function: family, output folder, settings as keywords -> the flags of two steps on rows of each kind."""
    data = write_rows(tiny_minicpm, tmp_path_factory.mktemp("rows"))
    own = {"dataset_name": data / "train.json", "eval_dataset_name": data / "train-held.json"}
    own |= {"image_folder": data / "images", "save_strategy": "no", "load_best_model_at_end": False}
    own |= {"max_steps": 2, "eval_steps": 2, "logging_steps": 1, "warmup_steps": 0, "sample_rows": 0}
    own |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 6, "per_device_eval_batch_size": 4}
    own |= {"disable_tqdm": True, "learning_rate": 2e-3}
    return lambda family, out, **settings: recipe(family).flags(output_dir=out, **{**own, **settings})


def parts(batch):
    """Every picture and slice of a batch, in the order of the rows and of their texts, each (3, 14, 14 * patches)."""
    batch = flat(batch)
    if "target_sizes" in batch:
        return list(batch["pixel_values"][0].split((batch["target_sizes"].prod(1) * minicpm.PATCH).tolist(), dim=-1))
    return [part for row in batch.get("pixel_values", []) for part in row]


def seen(batch):
    """The colours of the parts: r, g, b or y."""
    names = {(True, False, False): "r", (False, True, False): "g", (False, False, True): "b", (True, True, False): "y"}
    return "".join(names[tuple((part[:, 0, 0] > 0).tolist())] for part in parts(batch))


def for_inference(turns, folder):
    """[(role, parts of the message)], pictures as PIL images."""

    def opened(part):
        return Image.open(folder / part).convert("RGB") if part.endswith(".png") else part

    return [(("user", "assistant")[n % 2], list(map(opened, turn.split("|")))) for n, turn in enumerate(turns)]


def prompt_of(batch):
    """The tokens of a batch's only row before its last answer."""
    [ids], [labels] = flat(batch)["input_ids"].tolist(), flat(batch)["labels"].tolist()
    last = max(n for n, label in enumerate(labels) if label != -100)
    return ids[: max(n for n in range(last) if labels[n] == -100) + 1]


# ------------------------------------------------------------------------------------------------- rows and prompts
THOUGHT, PLAIN = "<think>\nIt has a bar.\n\nSo </think>\n\nseven", talks("<image>\nEven?", "odd")


@native
def test_thoughts_are_trained_if_the_model_is_to_think(family, collator_of):
    """With a thought the prompt is that of inference with thinking on; without one, that of inference without."""
    collator = collator_of(family, enable_thinking=True)
    rows = [talks("Hi", "odd", "<image>\nWhich?", THOUGHT), talks("Which?", "<think>\n\n</think>\n\nseven"), PLAIN]
    expected = [
        ["odd<|im_end|>", "It has a bar.\n\nSo\n</think>\n\nseven<|im_end|>"],
        ["seven<|im_end|>"],
        ["odd<|im_end|>"],
    ]
    assert trained(collator(rows), collator.processor.tokenizer) == expected
    prompts = [prompt_of(collator([row])) for row in rows]
    thinking = collator.tokenize([collator.messages_of(rows[0])[:-1]], prompt=True)["input_ids"][0].tolist()
    assert prompts[0] == thinking and thinking != prompts[2]
    quick = collator_of(family)
    assert prompts[2] == quick.tokenize([quick.messages_of(PLAIN)[:1]], prompt=True)["input_ids"][0].tolist()
    assert same(collator([PLAIN]), quick([PLAIN]))


@native
@pytest.mark.parametrize(
    "row, settings, problem",
    [
        (talks("q", THOUGHT), {}, "thought in an answer: .It has a bar.*--enable_thinking"),
        (talks("q", THOUGHT, "q", "a"), {"enable_thinking": True}, "thought in an earlier answer: .*a row that ends"),
        (talks("q", "<think>open"), {"enable_thinking": True}, "control token: <think> in the answer"),
    ],
)
def test_thoughts_that_would_not_be_trained_are_bad(family, collator_of, row, settings, problem):
    with pytest.raises(finetune_minicpm_lora.BadRow, match=problem):
        collator_of(family, **settings)([row])


@families
def test_pictures_are_at_their_places_in_a_batch_as_in_a_row(family, collator_of):
    collator = collator_of(family)
    batch, alone = collator(ROWS), [collator([row]) for row in ROWS]
    rows = flat(batch)
    assert trained(batch, collator.processor.tokenizer) == [[f"{text}{END}" for text in some] for some in ANSWERS]
    assert not (rows["labels"] == collator.processor.image_token_id).any()
    one_by_one = [part for one in alone for part in parts(one)]
    assert len(one_by_one) > 5 and same(parts(batch), one_by_one)
    if family != "2.6":
        return
    assert batch.keys() == {"data", "attention_mask", "labels", "trained_at", "targets"}
    assert batch["data"].keys() == {"input_ids", "position_ids", "pixel_values", "tgt_sizes", "image_bound"}
    for n, one in enumerate(alone):
        mask = batch["attention_mask"][n].bool()
        assert rows["position_ids"][n][mask].tolist() == list(range(int(mask.sum())))
        assert torch.equal(rows["image_bound"][n], one["data"]["image_bound"][0])  # padding is on the right
        for start, end in rows["image_bound"][n]:
            assert (rows["input_ids"][n][start:end] == collator.processor.image_token_id).all()


@pytest.mark.parametrize("settings", [{}, {"max_slice_nums": 1}, {"downsample_mode": "4x", "max_slice_nums": 2}])
@native
def test_the_prompt_is_the_one_of_inference(family, settings, recipe, pictures, collator_of, tmp_path):
    """By the processor that is saved beside the adapter, which knows the slices of the run."""
    collator = collator_of(family, **settings)
    collator.processor.save_pretrained(tmp_path)
    shutil.copy(recipe(family).folder / "model" / "config.json", tmp_path)
    saved = minicpm.processor_from(tmp_path)
    kept = (saved.image_processor.max_slice_nums, saved.image_processor.downsample_mode)
    assert kept == (settings.get("max_slice_nums", 9), settings.get("downsample_mode", "16x"))
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for row, turns in zip(ROWS, TURNS, strict=True):
        messages = [turn for turn in row["conversations"] if turn["role"] == "system"]
        for role, texts in for_inference(turns, pictures):
            kinds = [("text" if isinstance(part, str) else "image", part) for part in texts]
            messages.append({"role": role, "content": [{"type": kind, kind: part} for kind, part in kinds]})
        prompt, batch = saved.apply_chat_template(messages, **options), collator([row])
        asked = collator.tokenize([collator.messages_of(row)[:-1]], prompt=True)  # what samples.md asks
        assert [prompt_of(batch)] == prompt["input_ids"].tolist()
        assert same(asked, prompt) and same(parts(batch), parts(prompt))


@pytest.mark.parametrize("slices", [9, 1])
def test_the_prompt_is_the_one_of_26s_own_chat(slices, recipe, pictures, collator_of):
    collator = collator_of("2.6", max_slice_nums=slices)
    model, processor, calls = finetune_minicpm_lora.load_model(*recipe("2.6").parse()), collator.processor, []
    model.generate = lambda **inputs: [calls.append(inputs), ""]
    for row, turns in zip(ROWS, TURNS, strict=True):
        system = "".join(turn["content"] for turn in row["conversations"] if turn["role"] == "system")
        messages = [{"role": role, "content": texts} for role, texts in for_inference(turns, pictures)]
        options = {"sampling": False, "system_prompt": system, "max_slice_nums": slices}
        model.chat(None, messages, processor.tokenizer, processor, **options)
        batch, asked = collator([row]), collator.tokenize([collator.messages_of(row)[:-1]], prompt=True)
        assert prompt_of(batch) == prompts(asked)[0] == calls[-1]["input_ids"][0].tolist()
        for mine in (batch["data"], asked):
            assert all(same(mine[key][0], calls[-1][key][0]) for key in ("tgt_sizes", "image_bound"))
            assert same(parts(mine), parts(calls[-1]))


def test_an_exclamation_mark_is_a_word(collator_of):
    """In 2.6 it is token 0, by which the model's own processor knows padding."""
    collator = collator_of("2.6")
    assert collator.processor.tokenizer.convert_tokens_to_ids("!") == 0
    batch = collator([talks("!! Hi! !", "! odd!!", "!", "!"), talks("Hi", "odd", image=None)])
    assert [ids.count(0) for ids in prompts(flat(batch))] == [9, 0] and batch["attention_mask"][0].all()
    assert trained(batch, collator.processor.tokenizer)[0] == [f"! odd!!{END}", f"!{END}"]
    questions = [collator.messages_of(talks(text, "x"))[:1] for text in ("!", "Which digit is this?")]
    asked = collator.tokenize(questions, prompt=True)
    assert prompts(asked)[0].count(0) == 1 and (asked["attention_mask"][:, -1] == 1).all()


@families
def test_the_model_sees_in_a_batch_what_it_sees_in_single_rows(family, recipe, collator_of):
    """Slices, too; and it gives the same answers."""
    collator = collator_of(family)
    model = finetune_minicpm_lora.load_model(*recipe(family).parse()).eval()

    def scores(rows):
        batch = {key: value for key, value in collator(rows).items() if key != "labels"}
        return logits(model, batch)

    def answers(conversations):
        batch = collator.tokenize(conversations, prompt=True)
        options = {"max_new_tokens": 8, "max_length": None, "do_sample": False, "eos_token_id": collator.stop_ids}
        with torch.no_grad():
            ids = model.generate(**batch, **options)
        return ids[:, batch["input_ids"].shape[1] :].tolist()

    alone = [scores([row]) for row in ROWS]
    torch.testing.assert_close(scores(ROWS), torch.cat(alone), atol=1e-4, rtol=1e-4)
    another = scores([{**ROWS[0], "image": "lime.png"}])
    assert (another - alone[0])[-1].abs().max() > 1e-3  # so a picture makes a difference
    asked = [collator.messages_of(row)[:-1] for row in ROWS]
    together, single = answers(asked), [answers([one])[0] for one in asked]
    assert together == single and len({tuple(ids) for ids in single}) > 2


@native
def test_4x_keeps_four_times_as_many_tokens_that_the_model_takes(family, recipe, collator_of):
    counts = {}
    for mode in ("16x", "4x"):
        collator = collator_of(family, downsample_mode=mode)
        batch = collator(ROWS)
        counts[mode] = (batch["input_ids"] == collator.processor.image_token_id).sum(1)
        model = finetune_minicpm_lora.load_model(*recipe(family).parse(downsample_mode=mode))
        with torch.no_grad():
            assert model(**batch).loss.isfinite()
    assert counts["16x"][0] > 0 and torch.equal(counts["4x"], 4 * counts["16x"])


# ---------------------------------------------------------------------------------------------------------- pictures
TWO = {"<image_00>": "red.png", "<image_01>": "lime.png"}
REVERSED = dict(reversed(TWO.items()))
NUMBERED = {"<image_7>": "blue.png", "<image_12>": "red.png"}
ONE_UNNUMBERED = {"<image>": "blue.png", "<image_1>": "red.png"}
TWICE = {"<image_0>": "red.png", "<image_1>": "red.png"}
INSTRUCTED = {"image": "blue.png", "conversations": [SYSTEM, *talks("Which?", "a")["conversations"]]}
PLACES = {  # a row, what is seen of it, its user's turns as text with # for a picture
    "first": (talks("<image>\nWhich?", "a"), "r", ["#\nWhich?"]),
    "last": (talks("Which?\n<image>", "a"), "r", ["Which?\n#"]),
    "inside": (talks("Is <image> odd?", "a"), "r", ["Is \n#\n odd?"]),
    "inside, a line each": (talks("Is\n<image>\nodd?", "a"), "r", ["Is\n#\n\nodd?"]),
    "nowhere": (talks("Which?", "a", "And?", "b"), "r", ["#\nWhich?", "And?"]),
    "nowhere, by its name": (talks("Which?", "a", image={"<image_00>": "lime.png"}), "g", ["#\nWhich?"]),
    "in a later turn": (talks("Hi", "a", "And <image>?", "b"), "r", ["Hi", "And \n#\n?"]),
    "alone": (talks("<image>", "a"), "r", ["#"]),
    "two the other way round": (talks("<image_01><image_00>Which?", "a", image=TWO), "gr", ["#\n#\nWhich?"]),
    "the dict the other way round": (talks("<image_00>, <image_01>", "a", image=REVERSED), "rg", ["#\n, \n#"]),
    "in two turns": (talks("Is <image_01> odd?", "a", "<image_00>", "b", image=TWO), "gr", ["Is \n#\n odd?", "#"]),
    "another number": (talks("<image_7> or <image_12>", "a", image=NUMBERED), "br", ["#\n or \n#"]),
    "with one unnumbered": (talks("<image_1> <image>", "a", image=ONE_UNNUMBERED), "rb", ["#\n#"]),
    "the same file twice": (talks("<image_0>\n<image_1>", "a", image=TWICE), "rr", ["#\n#"]),
    "no picture": (talks("Which?", "a", image=None), "", ["Which?"]),
    "an empty cell": (talks("Which?", "a", image=""), "", ["Which?"]),
    "an empty dict": (talks("Which?", "a", image={}), "", ["Which?"]),
    "with a system turn": (INSTRUCTED, "b", ["#\nWhich?"]),
    "white space": (talks("\n <image>\n\n  Which\n\n digit?", "a b"), "r", ["#\n\n  Which\n\n digit?"]),
    "a line break of Windows": (talks("<image>\r\nWhich?", "a"), "r", ["#\nWhich?"]),
}


@families
@pytest.mark.parametrize("row, colours, asked", PLACES.values(), ids=PLACES)
def test_a_picture_stands_where_its_placeholder_does(row, colours, asked, family, collator_of):
    collator = collator_of(family)
    batch = collator([row])
    assert seen(batch) == colours
    text = finetune_minicpm_lora.mark_trained_tokens(flat(batch), collator.processor)
    text = text.replace("«", "").replace("»", "")
    for n in range(len(colours)):
        head, rest = text.split(f"<image_id>{n}</image_id><image>")
        text = head + "#" + rest.split("</image>", 1)[1]  # numbered in the order of the text
    turns = [turn.removesuffix(f"{END}\n").split("\n", 1) for turn in text.split("<|im_start|>") if turn]
    assert [words for role, words in turns if role == "user"] == asked and "<image" not in text
    said = {role: [t["content"].strip() for t in row["conversations"] if t["role"] == role] for role, _ in turns}
    assert trained(batch, collator.processor.tokenizer) == [[f"{answer}{END}" for answer in said["assistant"]]]
    for words in said.get("system", []):  # 2.6 has one by default
        assert ["system", words] in turns


@families
def test_a_large_picture_is_seen_as_a_whole_and_in_slices(family, collator_of):
    counts = []
    for most in (1, 2, 4, 9):
        collator = collator_of(family, max_slice_nums=most)
        batch = collator([talks("Which?", "a", image="large.png")])
        assert set(seen(batch)) == {"y"}
        counts.append(len(parts(batch)))
        for token in collator.processor.tokenizer.convert_tokens_to_ids(["<slice>", "</slice>"]):
            assert (flat(batch)["input_ids"] == token).sum() == counts[-1] - 1
        assert seen(collator([talks("<image>", "b")])) == "r"  # a small one never is
    assert counts[:2] == [1, 3] and 3 < counts[2] <= 5 < counts[3] <= 10


@families
def test_answers_may_hold_what_looks_like_a_turn(family, collator_of):
    collator = collator_of(family)
    for text in ("assistant\nodd", "user", "<|im_end", "im_start|>", "</im_end>", "<p>&lt;</p>", "\u0301x", "\u200b"):
        batch = collator([talks(text, text, text, text)])
        assert trained(batch, collator.processor.tokenizer) == [[f"{text}{END}"] * 2], text


@families
def test_the_processor_is_the_librarys_or_the_hubs(family, collator_of, tmp_path):
    collator = collator_of(family, max_slice_nums=3)
    kinds = {"4.6": "MiniCPMV4_6Processor", "4.7": "MiniCPMV4_7Processor", "2.6": "MiniCPMVProcessor"}
    assert type(collator.processor).__name__ == kinds[family] and collator.is_26 == (family == "2.6")
    assert collator.stop_ids == collator.processor.tokenizer.convert_tokens_to_ids([END, "<|endoftext|>"])
    if collator.is_26:  # what is saved beside an adapter answers with the slices of the model
        collator.processor.save_pretrained(tmp_path)
        assert AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True).image_processor.max_slice_nums == 9


# ---------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("words", ["embed_tokens", "lm_head"])
def test_tied_words_stay_tied(flags, tmp_path, words):
    """4.6 and 4.7 read and write with one matrix: trained, it is still one."""
    done = run(finetune_minicpm_lora, flags("4.6", tmp_path / "out", lora_modules_to_save=words))
    base = done.trainer.model.get_base_model()
    wrapped = base.get_input_embeddings(), base.get_output_embeddings()
    read, write = (module.modules_to_save["default"].weight for module in wrapped)
    assert read.data_ptr() == write.data_ptr() and read.requires_grad
    assert len([name for name in done.first if re.search(r"(embed_tokens|lm_head).*modules_to_save", name)]) == 1

    untouched = finetune_minicpm_lora.load_model(*finetune_minicpm_lora.parse(done.argv))
    inputs = done.inputs(done.trainer.eval_dataset)
    before = logits(untouched, inputs)
    reloaded = PeftModel.from_pretrained(untouched, done.out)
    after = logits(reloaded, inputs)
    torch.testing.assert_close(after, logits(done.trainer.model, inputs), atol=1e-6, rtol=1e-6)
    assert (after - before).abs().max() > 0.01
    merged = reloaded.merge_and_unload()
    assert merged.get_input_embeddings().weight.data_ptr() == merged.get_output_embeddings().weight.data_ptr()


def test_untied_words_are_counted_and_trained_with_the_language_model(tiny_minicpm, flags, tmp_path):
    """A model of 4.6 that writes with a matrix of its own."""
    shutil.copytree(tiny_minicpm / "model", tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "model")
    settings = {"model_name_or_path": tmp_path / "model", "use_lora": False, "tune_llm": True}
    done = run(finetune_minicpm_lora, flags("4.6", tmp_path / "out", **settings))
    count = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("model.language_model.", "lm_head.")))
    assert model.lm_head.weight.numel() < count  # it is in it
    assert re.search(rf"model\.language_model +{count:,} of +{count:,} parameters trained", done.text)
    assert not torch.equal(done.first["lm_head.weight"], done.last["lm_head.weight"])


def accumulated(trainer, batches, compute_loss):
    """The batches of one step -> their losses, the gradients of all of them together, their logits."""
    trainer.model.train().zero_grad()
    batches, count = trainer.get_batch_samples(iter([dict(batch) for batch in batches]), 3, trainer.args.device)
    steps = []
    for batch in batches:
        steps.append(compute_loss(trainer.model, batch, return_outputs=True, num_items_in_batch=count))
        steps[-1][0].backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    return [loss.detach() for loss, _ in steps], gradients, [output["logits"].detach() for _, output in steps]


@pytest.mark.parametrize("settings", [{}, {"lora_modules_to_save": "lm_head"}], ids=["lora", "words"])
@families
def test_logits_only_where_there_is_a_label(flags, tmp_path, family, settings):
    """Token by token the stock Trainer's, of batches of unequal lengths that are accumulated, and its eval_loss."""
    trainer = run(finetune_minicpm_lora, flags(family, tmp_path, lora_dropout=0, **settings), train=False).trainer

    def stock(model, inputs, **options):
        inputs = {name: inputs[name] for name in inputs if name not in ("trained_at", "targets")}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "compute_loss_func", None)
            return transformers.Trainer.compute_loss(trainer, model, inputs, **options)

    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    rows = trainer.train_dataset
    batches = [trainer.data_collator([rows[n] for n in some]) for some in ((0, 3, 6), (5,), (1, 7, 8))]
    labelled = [int(batch["labels"].ne(-100).sum()) for batch in batches]
    assert len(set(labelled)) == 3
    scored = []
    trainer.lm_head.register_forward_hook(lambda head, hidden, logits: scored.append(tuple(logits.shape)))
    losses, gradients, scores = accumulated(trainer, batches, stock)
    own_losses, own_gradients, own_scores = accumulated(trainer, batches, trainer.compute_loss)
    words = scored[0][-1]
    assert scored == [(*batch["labels"].shape, words) for batch in batches] + [(number,) for number in labelled]
    for mine, every, batch in zip(own_scores, scores, batches, strict=True):
        by_token = torch.nn.functional.cross_entropy(
            every[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
        )
        torch.testing.assert_close(mine, by_token[batch["labels"][:, 1:].flatten() != -100], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own_losses, losses, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        assert gradient.norm() > 0 and (own_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    said = trainer.evaluate()["eval_loss"]
    trainer.compute_loss = stock
    assert trainer.evaluate()["eval_loss"] == pytest.approx(said, rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"lora_modules_to_save": "embed_tokens"} | RATES], ids=["lora", "words"])
@families
def test_an_adapter_is_gone_on_from(flags, tmp_path, family, settings):
    """Its weights to the last bit, so that the first loss is the last one of its run; all else begins anew."""
    first = run(finetune_minicpm_lora, flags(family, tmp_path / "first", **settings))
    more = {"lora_weight_path": first.out, "eval_on_start": True}
    again = run(finetune_minicpm_lora, flags(family, tmp_path / "again", **settings, **more))
    assert again.first.keys() == first.last.keys()
    assert all(torch.equal(value, first.last[name]) for name, value in again.first.items())
    assert log(again.out, "eval_loss")[0] == pytest.approx(log(first.out, "eval_loss")[2], abs=1e-6)
    assert list(log(again.out)) == [1, 2]
    assert [name for name, value in again.last.items() if torch.equal(value, first.last[name])] == []


# ---------------------------------------------------------------------------------------- slices of one size together
SHAPES = {"a.png": (28, 112), "b.png": (300, 60), "c.png": (112, 28), "d.png": (56, 56)}  # b.png is cut into slices


@pytest.mark.parametrize("mode", ["16x", "4x"])
@native
def test_slices_of_one_size_are_one_batch(flags, tmp_path, family, mode, recipe, monkeypatch):
    """Each layer of the tower attends once for each size. Features, loss, gradients and answers are the library's."""
    for name, (width, height) in SHAPES.items():
        Image.effect_noise((width, height), 99).convert("RGB").save(tmp_path / name)
    settings = {"downsample_mode": mode, "tune_vision": True, "lora_dropout": 0}
    trainer = run(finetune_minicpm_lora, flags(family, tmp_path / "out", **settings), train=False).trainer
    model, collator = trainer.model, trainer.data_collator
    stir(model)
    two = {"<image>": str(tmp_path / "c.png"), "<image_1>": str(tmp_path / "d.png")}
    pictures = (talks("<image>\nEven?", "odd", image=str(tmp_path / name)) for name in SHAPES)
    rows = [
        talks("Hi!", "odd", image=None),
        talks("<image>\nA?", "seven", "And <image_1>?", "odd", image=two),
        *pictures,
    ]
    batch, questions = collator(rows), [collator.messages_of(row)[:-1] for row in rows]
    sizes = [tuple(size) for size in batch["target_sizes"].tolist()]
    assert len({*sizes}) == 3 and sizes != sorted(sizes)
    attended, attention = [], torch.nn.functional.scaled_dot_product_attention

    def count(query, *args, **kwargs):
        attended.append(len(query))
        return attention(query, *args, **kwargs)

    def everything():
        attended.clear()
        pictures = {name: batch[name] for name in ("pixel_values", "target_sizes")}
        features = model.get_base_model().get_image_features(**pictures, downsample_mode=mode).pooler_output
        calls = len(attended)
        model.train().zero_grad()
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        asked = collator.tokenize(questions, prompt=True)
        answers = model.eval().generate(**asked, max_new_tokens=4, max_length=None, do_sample=False)
        return calls, features, loss.detach(), gradients, answers

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    calls, *own = everything()
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, finetune_minicpm_lora.ReplacedForwards):
            callback.on_train_end(None, None, None)
    assert isinstance(batch["target_sizes"], np.ndarray)  # it stays where the host can read it without waiting
    batch = trainer.data_collator(rows)
    assert isinstance(batch["target_sizes"], torch.Tensor)  # as the library needs it
    calls_of_the_library, *the_librarys = everything()
    layers = model.config.vision_config.num_hidden_layers
    assert calls == (layers + (mode == "16x")) * len({*sizes}) and calls_of_the_library >= layers * len(sizes)
    torch.testing.assert_close(own, the_librarys, rtol=1e-5, atol=1e-5)
    weights = [name for name in own[2] if "vision_tower" in name and "layers" in name and name.endswith("weight")]
    assert len(weights) > 10 and all(own[2][name].abs().max() > 1e-5 for name in weights)


# ------------------------------------------------------------------------------------------------------ 2.6 repaired
@pytest.fixture
def hub(tiny_minicpm26, tmp_path):
    """A copy of 2.6 whose code no one has imported yet, in a folder of another name each time."""
    return str(shutil.copytree(tiny_minicpm26 / "model", tmp_path / f"model_{tmp_path.name}"))


def test_2_6_loads_without_torchvision(hub, monkeypatch):
    """And leaves no trace of what it put in its place; the code itself stays imported."""
    monkeypatch.setitem(sys.modules, "torchvision", None)  # not there, even where it is installed
    model = finetune_minicpm_lora.load_26(hub, None)
    assert sys.modules.get("torchvision") is None and not hasattr(torch.nn.functional, "List")
    assert type(model).__module__ in sys.modules and type(model.resampler).__module__ in sys.modules
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(finetune_minicpm_lora, "ModuleType", lambda name: None)
    with pytest.raises(ImportError, match="torchvision"):
        finetune_minicpm_lora.load_26(hub, None)


def test_2_6_loads_without_the_name_that_torch_has_no_more(hub, monkeypatch):
    with monkeypatch.context() as away, pytest.raises(NameError, match="'List' is not defined"):
        away.setattr(finetune_minicpm_lora, "patch", SimpleNamespace(object=lambda *_, **__: contextlib.nullcontext()))
        finetune_minicpm_lora.load_26(hub, None)
    assert finetune_minicpm_lora.load_26(hub, None)


def test_2_6_is_ended_by_post_init(hub, monkeypatch):
    stock = PreTrainedModel.post_init

    def not_of_26(self):
        return None if type(self).__name__ == "MiniCPMV" else stock(self)

    with monkeypatch.context() as away, pytest.raises(AttributeError, match="all_tied_weights_keys"):
        away.setattr(PreTrainedModel, "post_init", not_of_26)
        finetune_minicpm_lora.load_26(hub, None)
    assert finetune_minicpm_lora.load_26(hub, None)


def sines_and_cosines(rows, columns, width):
    """A position table (rows, columns, width): half of it tells the column, half the row."""
    scales = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) * 4 / width)
    angles = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * scales
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    of_column, of_row = waves[None, :columns].expand(rows, -1, -1), waves[:rows, None].expand(-1, columns, -1)
    return torch.cat([of_column, of_row], dim=2)


def test_2_6_has_its_positions(hub, monkeypatch):
    """No file holds them; as the model is loaded, they would be what lay in the memory."""
    resampler = finetune_minicpm_lora.load_26(hub, None, device_map={"": torch.device("cpu")}).resampler
    table = sines_and_cosines(*resampler.max_size, resampler.embed_dim)
    torch.testing.assert_close(resampler.pos_embed.double(), table, atol=1e-5, rtol=0)
    for dtype in (torch.bfloat16, torch.float16):
        again = finetune_minicpm_lora.load_26(hub, None, dtype=dtype).resampler
        assert torch.equal(again.pos_embed, resampler.pos_embed) and again.query.dtype == dtype
    stock = type(resampler)._set_2d_pos_cache

    def only_as_it_is_made(self, size, device=None):
        return None if device else stock(self, size)

    monkeypatch.setattr(type(resampler), "_set_2d_pos_cache", only_as_it_is_made)
    torch.use_deterministic_algorithms(True)  # what is not written to is NaN, and not whatever lies there
    try:
        assert finetune_minicpm_lora.load_26(hub, None).resampler.pos_embed.isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_2_6_trains_with_checkpointing(flags, tmp_path, monkeypatch):
    """Without the repair images would be written into a leaf that has a gradient."""
    stock = finetune_minicpm_lora.load_26

    def unrepaired(*args, **kwargs):
        model = stock(*args, **kwargs)
        model.enable_input_require_grads = MethodType(PreTrainedModel.enable_input_require_grads, model)
        return model

    settings = {"activation_checkpointing": True, "eval_strategy": "no"}
    with monkeypatch.context() as away, pytest.raises(RuntimeError, match="leaf Variable"):
        away.setattr(finetune_minicpm_lora, "load_26", unrepaired)
        run(finetune_minicpm_lora, flags("2.6", tmp_path / "unrepaired", **settings))
    assert log(run(finetune_minicpm_lora, flags("2.6", tmp_path / "out", **settings)).out)[2] > 0


def test_2_6_has_an_eval_loss(flags, tmp_path):
    """Its forward() has no name for labels, so Trainer itself would not know that there is a loss."""
    trainer = run(finetune_minicpm_lora, flags("2.6", tmp_path), train=False).trainer
    assert transformers.utils.generic.find_labels(type(trainer.model.get_base_model())) == []
    losses = []  # of each trained token of all rows
    for row in trainer.eval_dataset:
        batch = trainer.data_collator([row])
        labels = batch["labels"][:, 1:]
        with torch.no_grad():
            scores = trainer.model.eval()(data=dict(batch["data"])).logits[:, :-1]
        by_token = torch.nn.functional.cross_entropy(scores.transpose(1, 2), labels, reduction="none")
        losses.append(by_token[labels != -100])
    assert len({len(some) for some in losses}) > 1  # else a mean of means would be the same
    expected = torch.cat(losses).mean().item()
    trainer.args.per_device_eval_batch_size = 3  # of four rows
    for names in (trainer.label_names, []):
        trainer.label_names = names
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_2_6_pads_answers_with_an_end(collator_of, hub, monkeypatch):
    """Its own code does so with token 0, which is a word; and gives no prompt."""
    model, (end, last) = finetune_minicpm_lora.load_26(hub, None), collator_of("2.6").stop_ids
    said = torch.tensor([[5, end, 0, 0], [0, 6, 0, 8]])
    monkeypatch.setattr(type(model).__base__, "generate", lambda self, **kwargs: said)
    answered = model.generate(torch.tensor([[1, 2], [3, 4]])).tolist()
    assert answered == [[1, 2, 5, end, last, last], [3, 4, 0, 6, 0, 8]]


def test_the_projector_alone_can_be_trained_on_steps_without_images(tiny_minicpm, tmp_path):
    """Such a step has nothing to teach it: no gradient, and no error either."""
    rows = [talks("What follows two?", "three", image=None), talks("<image>\nWhich digit?", "two", image="0.png")]
    Image.new("RGB", (56, 56), "red").save(tmp_path / "0.png")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    case = Recipe("finetune_minicpm_lora", tiny_minicpm, tmp_path)
    alone = {"use_lora": False, "activation_checkpointing": False, "per_device_train_batch_size": 1}
    steps = {"max_steps": 2, "gradient_accumulation_steps": 1, "logging_steps": 1, "eval_strategy": "no"}
    case.run(**alone, **steps, dataset_name=tmp_path / "rows.json", image_folder=tmp_path)
    norms = sorted(log(tmp_path / "out", "grad_norm").values())
    assert norms[0] == 0 < norms[1]
