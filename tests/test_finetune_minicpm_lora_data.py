"""finetune_minicpm_lora.py: what is trained, after which prompt, on which pixels, read from which files. Labels are compared as text."""

import json
import os
import pickle

import datasets
import pytest
import torch
from conftest import load_data, minicpm_run, talks
from PIL import Image
from test_sft_llava_data import MODES, RED, WHITE, trained
from transformers import AutoProcessor

import finetune_minicpm_lora as recipe
from tiny import minicpm

END = "<|im_end|>"
SYSTEM = {"role": "system", "content": "Be brief."}
ROWS = [  # of every shape and of different lengths, in one batch; large.png is cut into slices
    talks("<image>\nWhich digit is this?", "seven"),
    talks("Hi!", "odd!", image=None),
    talks("Compare <image_01> with <image_00>. Which?", "!!", "And <image_02>?", "six and two!",
          image={"<image_00>": "red.png", "<image_01>": "large.png", "<image_02>": "lime.png"}),
    {"image": "blue.png", "conversations": [SYSTEM, *talks("What?", "a", "Even or odd?", "Überweisung 漢字 😀\nनमस्ते", "e", "f")["conversations"]]},
    {**talks("Is seven even or odd?", "odd", image=None), "id": 5},
]  # fmt: skip
ANSWERS = [["seven"], ["odd!"], ["!!", "six and two!"], ["a", "Überweisung 漢字 😀\nनमस्ते", "f"], ["odd"]]
MESSAGES = [  # the same up to the last answer, as one would write them for inference: a part with a dot in it is a picture
    [("user", ["red.png", "Which digit is this?"])],
    [("user", ["Hi!"])],
    [("user", ["Compare", "large.png", "with", "red.png", ". Which?"]), ("assistant", ["!!"]), ("user", ["And", "lime.png", "?"])],
    [("system", ["Be brief."]), ("user", ["blue.png", "What?"]), ("assistant", ["a"]), ("user", ["Even or odd?"]),
     ("assistant", ["Überweisung 漢字 😀\nनमस्ते"]), ("user", ["e"])],
    [("user", ["Is seven even or odd?"])],
]  # fmt: skip


@pytest.fixture(autouse=True)
def pictures(images, tmp_path):
    """red.png, lime.png and blue.png of one size, large.png (yellow), which is cut into slices."""
    images(3)
    Image.new("RGB", (160, 100), "yellow").save(tmp_path / "large.png")


def collator_of(folder, tmp_path, **settings):
    settings, training = recipe.parse(minicpm_run(folder, tmp_path / "out", **{"image_folder": tmp_path, **settings}))
    return recipe.Collator(recipe.load_processor(settings), settings, training)


@pytest.fixture
def collate(every_minicpm, tmp_path):
    """A function: settings as keywords -> a Collator of each kind of model in turn."""
    return lambda **settings: collator_of(every_minicpm, tmp_path, **settings)


@pytest.fixture
def parse(minicpm_parse, tmp_path):
    """A function: settings as keywords -> (settings, training); relative image paths start beside the data."""

    def make(**settings):
        own, training = minicpm_parse(**settings)
        own.image_folder = str(settings["image_folder"]) if "image_folder" in settings else None
        return own, training

    return make


def flat(batch):
    """A batch with all of the model's inputs side by side."""
    return {**batch.get("data", {}), **{key: value for key, value in batch.items() if key != "data"}}


def tokens(batch, n=0):
    """The tokens of a row, without padding."""
    batch = flat(batch)
    return batch["input_ids"][n][batch["attention_mask"][n].bool()].tolist()


def prompt_of(batch, n=0):
    """The tokens of a row before its last answer."""
    labels = flat(batch)["labels"][n][flat(batch)["attention_mask"][n].bool()].tolist()
    start = len(labels) - next(
        k for k, label in enumerate(reversed(labels)) if label != -100
    )  # behind the last answer
    return tokens(batch, n)[: max(k for k in range(start) if labels[k] == -100) + 1]


def parts(batch):
    """Every picture and slice of a batch, in the order of the rows and of their texts, each (3, 14, 14 * patches)."""
    batch = flat(batch)
    if "target_sizes" in batch:
        return list(batch["pixel_values"][0].split((batch["target_sizes"].prod(1) * minicpm.PATCH).tolist(), dim=-1))
    return [part for row in batch.get("pixel_values", []) for part in row]


def slice_ids(collator):
    return collator.processor.tokenizer.convert_tokens_to_ids(["<slice>", "</slice>"])


def seen(batch):
    """The colours of the parts: r, g, b or y."""
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 0): "y"}
    return "".join(names[tuple(int(part[channel, 0, 0] > 0) for channel in range(3))] for part in parts(batch))


def same(one, other):
    one, other = flat(one), flat(other)
    plain = [key for key in one if isinstance(one[key], torch.Tensor)]
    if one.keys() != other.keys() or not all(
        torch.equal(one[key], other[key]) for key in plain if key != "pixel_values"
    ):
        return False
    lists = all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        for key in ("image_bound", "tgt_sizes")
        for a, b in zip(one.get(key, []), other.get(key, []))
    )
    return lists and len(parts(one)) == len(parts(other)) and all(map(torch.equal, parts(one), parts(other)))


# ------------------------------------------------------------------------------------------------- what is trained
def test_trained_are_the_answers_and_their_ends(collate):
    collator = collate()
    tokenizer, batch = collator.processor.tokenizer, collator(ROWS)
    rows = flat(batch)
    assert trained(rows, tokenizer) == [
        [f"{answer}{END}" for answer in answers] for answers in ANSWERS
    ]  # nothing else
    assert not (rows["labels"] == collator.processor.image_token_id).any()
    padded = rows["attention_mask"] == 0
    assert padded.any(1).sum() == len(ROWS) - 1 and (rows["input_ids"][padded] == tokenizer.pad_token_id).all()
    assert (rows["attention_mask"].diff(dim=1) >= 0).all() and (rows["labels"][padded] == -100).all()  # on the left
    if collator.is_26:
        assert batch.keys() == {"data", "attention_mask", "labels"}
        assert batch["data"].keys() == {"input_ids", "position_ids", "pixel_values", "tgt_sizes", "image_bound"}
        for ids, positions, mask in zip(rows["input_ids"], rows["position_ids"], rows["attention_mask"].bool()):
            assert positions[mask].tolist() == list(range(len(ids[mask])))


def test_a_row_is_the_same_alone_as_in_company(collate):
    collator = collate()
    batch, alone = collator(ROWS), [collator([row]) for row in ROWS]
    rows = flat(batch)
    for n, one in enumerate(alone):
        mask = rows["attention_mask"][n].bool()
        for key, value in flat(one).items():
            if isinstance(value, torch.Tensor) and value.shape == one["labels"].shape:
                assert torch.equal(rows[key][n][mask], value[0]), key
        if collator.is_26:
            assert torch.equal(rows["image_bound"][n], one["data"]["image_bound"][0] + int((~mask).sum()))
            image = collator.processor.image_token_id
            assert all((rows["input_ids"][n][a:b] == image).all() for a, b in rows["image_bound"][n])
    assert len(parts(batch)) == sum(len(parts(one)) for one in alone) > 5
    assert all(map(torch.equal, parts(batch), [part for one in alone for part in parts(one)]))


def opened(message, tmp_path):
    role, texts = message
    return role, [Image.open(tmp_path / text).convert("RGB") if text.endswith(".png") else text for text in texts]


@pytest.mark.parametrize(
    "flags", [{}, {"max_slice_nums": 1}, {"downsample_mode": "4x", "max_slice_nums": 2}], ids=["", "1 slice", "4x"]
)
@pytest.mark.parametrize("kind", ["tiny_minicpm", "tiny_minicpm47"])
def test_the_prompt_is_the_one_of_inference(kind, flags, request, tmp_path):
    collator = collator_of(request.getfixturevalue(kind), tmp_path, **flags)
    collator.processor.save_pretrained(tmp_path / "saved")  # with this run's slices, as the run itself does
    (tmp_path / "saved" / "config.json").write_bytes(
        (request.getfixturevalue(kind) / "model" / "config.json").read_bytes()
    )
    saved = minicpm.processor_from(tmp_path / "saved")
    assert (saved.image_processor.max_slice_nums, saved.image_processor.downsample_mode) == (
        flags.get("max_slice_nums", 9), flags.get("downsample_mode", "16x"))  # fmt: skip
    for row, messages in zip(ROWS, MESSAGES):
        messages = [{"role": role, "content": [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in some]}
                    for role, some in (opened(message, tmp_path) for message in messages)]  # fmt: skip
        prompt = saved.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        batch = collator([row])
        assert prompt_of(batch) == prompt["input_ids"][0].tolist()
        assert len(parts(batch)) == len(parts(prompt)) and all(map(torch.equal, parts(batch), parts(prompt)))
        asked = collator.tokenize([collator.messages_of(row)[:-1]], prompt=True)  # what samples.md asks
        assert same(asked, prompt)


@pytest.mark.parametrize("slices", [9, 1])
def test_the_prompt_is_the_one_of_26s_own_chat(slices, tiny_minicpm26, tmp_path):
    settings, training = recipe.parse(
        minicpm_run(tiny_minicpm26, tmp_path / "out", image_folder=tmp_path, max_slice_nums=slices)
    )
    model, processor = recipe.load_model(settings, training), recipe.load_processor(settings)
    collator, calls = recipe.Collator(processor, settings, training), []
    model.generate = lambda **inputs: [calls.append(inputs), ""]
    for row, messages in zip(ROWS, MESSAGES):
        system = messages[0][1][0] if messages[0][0] == "system" else ""
        turns = [
            {"role": role, "content": some}
            for role, some in (opened(message, tmp_path) for message in messages)
            if role != "system"
        ]
        model.chat(
            None, turns, processor.tokenizer, processor, sampling=False, system_prompt=system, max_slice_nums=slices
        )
        batch, asked = collator([row]), collator.tokenize([collator.messages_of(row)[:-1]], prompt=True)
        assert prompt_of(batch) == tokens(asked) == calls[-1]["input_ids"][0].tolist()
        for mine in (batch["data"], asked):
            assert torch.equal(torch.as_tensor(mine["tgt_sizes"][0]), torch.as_tensor(calls[-1]["tgt_sizes"][0]))
            assert torch.equal(mine["image_bound"][0], calls[-1]["image_bound"][0])
            assert len(parts(mine)) == len(parts(calls[-1])) and all(map(torch.equal, parts(mine), parts(calls[-1])))


def test_a_native_row_is_how_the_chat_template_goes_on(minicpm_collate):
    collator = minicpm_collate()
    for row in ROWS:
        whole = collator.processor.apply_chat_template(collator.messages_of(row), tokenize=True, return_dict=True)[
            "input_ids"
        ][0]
        assert tokens(collator([row])) == list(whole)


def test_an_exclamation_mark_is_a_word(tiny_minicpm26, tmp_path):
    """In 2.6 it is token 0, by which the model's own processor knows padding."""
    collator = collator_of(tiny_minicpm26, tmp_path)
    assert collator.processor.tokenizer.convert_tokens_to_ids("!") == 0
    batch = collator([talks("!! Hi! !", "! odd!!", "!", "!"), talks("Hi", "odd", image=None)])
    assert [tokens(batch, n).count(0) for n in (0, 1)] == [9, 0] and batch["attention_mask"][0].all()
    assert trained(flat(batch), collator.processor.tokenizer)[0] == [f"! odd!!{END}", f"!{END}"]
    asked = collator.tokenize(
        [collator.messages_of(talks("!", "x"))[:1], collator.messages_of(talks("Which digit is this?", "x"))[:1]],
        prompt=True,
    )
    assert tokens(asked, 0).count(0) == 1 and (asked["attention_mask"][:, -1] == 1).all()


# ------------------------------------------------------------------------------------- what the model makes of a batch
def test_the_model_sees_in_a_batch_what_it_sees_in_single_rows(every_minicpm, tmp_path):
    settings, training = recipe.parse(minicpm_run(every_minicpm, tmp_path / "out", image_folder=tmp_path))
    collator, model = (
        recipe.Collator(recipe.load_processor(settings), settings, training),
        recipe.load_model(settings, training).eval(),
    )

    def learnt(rows):
        batch = collator(rows)
        count = (batch["labels"] != -100).sum()
        with torch.no_grad():
            return model(**batch).loss * count, count

    def answered(conversations):
        batch = collator.tokenize(conversations, prompt=True)
        with torch.no_grad():
            out = model.generate(
                **batch,
                max_new_tokens=8,
                max_length=None,
                do_sample=False,
                use_cache=True,
                eos_token_id=collator.stop_ids,
            )
        return out[:, batch["input_ids"].shape[1] :].tolist()

    total, count = learnt(ROWS)
    single = [learnt([row]) for row in ROWS]
    assert count == sum(n for _, n in single) and abs(total - sum(loss for loss, _ in single)) / count < 1e-5
    longer = talks("Which digit is this? " * 9, "seven", image=None)  # more padding for the others
    assert abs(learnt([ROWS[0], longer])[0] - single[0][0] - learnt([longer])[0]) / count < 1e-5
    asked = [collator.messages_of(row)[:-1] for row in ROWS]
    together, alone = answered(asked), [answered([one])[0] for one in asked]
    for one, other in zip(together, alone):  # padded once both have ended
        assert one[: len(other)] == other and set(one[len(other) :]) <= set(collator.stop_ids)
    assert len({tuple(ids) for ids in alone}) > 2


@pytest.mark.parametrize("kind", ["tiny_minicpm", "tiny_minicpm47"])
def test_4x_keeps_four_times_as_many_tokens_that_the_model_takes(kind, request, tmp_path):
    counts = {}
    for mode in ("16x", "4x"):
        settings, training = recipe.parse(
            minicpm_run(request.getfixturevalue(kind), tmp_path / "out", image_folder=tmp_path, downsample_mode=mode)
        )
        collator = recipe.Collator(recipe.load_processor(settings), settings, training)
        batch = collator(ROWS)
        counts[mode] = [row.count(collator.processor.image_token_id) for row in batch["input_ids"].tolist()]
        model = recipe.load_model(settings, training)
        with torch.no_grad():
            assert model(**batch).loss.isfinite()
    assert counts["16x"][0] > 0 and counts["4x"] == [4 * n for n in counts["16x"]]


# --------------------------------------------------------------------------------------------------- rows and images
TWO = {"<image_00>": "red.png", "<image_01>": "lime.png"}
PLACES = {  # a row, what is seen of it, its user's turns as text with # for a picture
    "first": (talks("<image>\nWhich?", "a"), "r", ["#\nWhich?"]),
    "last": (talks("Which? <image>", "a"), "r", ["Which?\n#"]),
    "inside": (talks("Is <image> odd?", "a"), "r", ["Is\n#\nodd?"]),
    "nowhere": (talks("Which?", "a", "And?", "b"), "r", ["#\nWhich?", "And?"]),
    "nowhere, by its name": (talks("Which?", "a", image={"<image_00>": "lime.png"}), "g", ["#\nWhich?"]),
    "in a later turn": (talks("Hi", "a", "And <image>?", "b"), "r", ["Hi", "And\n#\n?"]),
    "alone": (talks("<image>", "a"), "r", ["#"]),
    "two": (talks("<image_00>\n<image_01>\nWhich?", "a", image=TWO), "rg", ["#\n#\nWhich?"]),
    "two the other way round": (talks("<image_01><image_00>Which?", "a", image=TWO), "gr", ["#\n#\nWhich?"]),
    "the dict the other way round": (talks("<image_00>, <image_01>", "a", image=dict(reversed(TWO.items()))), "rg", ["#\n,\n#"]),
    "in two turns": (talks("Is <image_01> odd?", "a", "<image_00>", "b", image=TWO), "gr", ["Is\n#\nodd?", "#"]),
    "another number": (talks("<image_7> or <image_12>", "a", image={"<image_7>": "blue.png", "<image_12>": "red.png"}), "br", ["#\nor\n#"]),
    "with one unnumbered": (talks("<image_1> <image>", "a", image={"<image>": "blue.png", "<image_1>": "red.png"}), "rb", ["#\n#"]),
    "the same file twice": (talks("<image_0>\n<image_1>", "a", image={"<image_0>": "red.png", "<image_1>": "red.png"}), "rr", ["#\n#"]),
    "no picture": (talks("Which?", "a", image=None), "", ["Which?"]),
    "an empty cell": (talks("Which?", "a", image=""), "", ["Which?"]),
    "an empty dict": (talks("Which?", "a", image={}), "", ["Which?"]),
    "with a system turn": ({"image": "blue.png", "conversations": [SYSTEM, *talks("Which?", "a")["conversations"]]}, "b", ["#\nWhich?"]),
    "white space": (talks("\n <image>\r\n\n  Which\n\n digit? \u3000", " \n a b\n "), "r", ["#\nWhich\n\n digit?"]),
}  # fmt: skip


@pytest.mark.parametrize("row, colours, asked", PLACES.values(), ids=PLACES)
def test_a_picture_stands_where_its_placeholder_does(row, colours, asked, collate):
    collator = collate()
    batch = collator([row])
    assert seen(batch) == colours
    text = recipe.mark_trained_tokens(flat(batch), collator.processor).replace("«", "").replace("»", "")
    for n in range(len(colours)):
        head, rest = text.split(f"<image_id>{n}</image_id><image>")
        text = head + "#" + rest.split("</image>", 1)[1]  # numbered in the order of the text
    turns = [
        turn.removeprefix("user\n").removesuffix(f"{END}\n")
        for turn in text.split("<|im_start|>")
        if turn.startswith("user\n")
    ]
    assert turns == asked and "<image" not in text
    answers = [turn["content"].strip() for turn in row["conversations"] if turn["role"] == "assistant"]
    assert trained(flat(batch), collator.processor.tokenizer) == [[f"{answer}{END}" for answer in answers]]
    system = [turn["content"] for turn in row["conversations"] if turn["role"] == "system"]
    assert all(f"<|im_start|>system\n{words}{END}\n" in text for words in system)


def test_a_large_picture_is_seen_as_a_whole_and_in_slices(collate):
    row, counts = talks("Which?", "a", image="large.png"), []
    for most in (1, 2, 4, 9):
        collator = collate(max_slice_nums=most)
        batch = collator([row])
        assert set(seen(batch)) == {"y"}
        counts.append(len(parts(batch)))
        assert [tokens(batch).count(token) for token in slice_ids(collator)] == [counts[-1] - 1] * 2
        assert seen(collator([talks("<image>", "b")])) == "r"  # a small one never is
    assert counts[0] == 1 and counts[1] == 3 and 3 < counts[2] <= 5 < counts[3] <= 10


def test_answers_may_hold_what_looks_like_a_turn(collate):
    collator = collate()
    for answer in (
        "assistant\nodd",
        "user",
        "<|im_end",
        "im_start|>",
        "</im_end>",
        "a « b » c",
        "<p>&lt;</p>",
        "-100",
        "a\n\n\nb",
        "😀" * 9,
        "\u0301x",
        "\u200b",
    ):
        assert trained(flat(collator([talks(answer, answer, answer, answer)])), collator.processor.tokenizer) == [
            [f"{answer}{END}"] * 2
        ], answer


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


@pytest.mark.parametrize("size", [(20, 1), (1, 20), (1, 1), (3, 3), (400, 20), (20, 400)])
def test_the_narrowest_and_the_smallest_images_are_processed(size, collate, tmp_path):
    Image.new("RGB", size, "lime").save(tmp_path / "odd.png")
    assert set(seen(collate()([talks("Which?", "a", image="odd.png")]))) == {"g"}


# --------------------------------------------------------------------------------------------------- the printed row
def test_the_printed_example(collate):
    collator = collate()
    batch = collator([ROWS[2], ROWS[3], ROWS[0]])
    system, end = (
        ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", "")
        if collator.is_26
        else ("", "<think>\n\n</think>\n\n")
    )
    image = f"<image> x {8 if collator.is_26 else 1}"
    picture = lambda n: f"<image_id>{n}</image_id><image>{image}</image>"
    rows = [
        n
        for n in (2, 3, 4, 5)
        if f"<slice>{image}</slice>" * n + "\n" in recipe.mark_trained_tokens(flat(batch), collator.processor)
    ]
    large = picture(0) + "\n".join([f"<slice>{image}</slice>" * rows[-1]] * ((len(parts(batch)) - 5) // rows[-1]))
    assert recipe.mark_trained_tokens(flat(batch), collator.processor) == (
        f"{system}<|im_start|>user\nCompare\n{large}\nwith\n{picture(1)}\n. Which?{END}\n<|im_start|>assistant\n«!!{END}»\n"
        f"<|im_start|>user\nAnd\n{picture(2)}\n?{END}\n<|im_start|>assistant\n{end}«six and two!{END}»\n"
    )
    padded = collator([ROWS[0], ROWS[2]])
    assert recipe.mark_trained_tokens(flat(padded), collator.processor) == recipe.mark_trained_tokens(
        flat(collator([ROWS[0]])), collator.processor
    )


# ------------------------------------------------------------------------------------------------------- the loader
def test_a_collator_can_be_pickled(collate):
    collator = collate(max_slice_nums=4)
    assert same(pickle.loads(pickle.dumps(collator))(ROWS), collator(ROWS))


def test_loader_workers_make_the_same_batches(every_minicpm, tmp_path):
    settings, training = recipe.parse(minicpm_run(every_minicpm, tmp_path / "out"))
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    some = recipe.read_rows(settings.data_path, None, settings).select(range(6))
    one, other = (list(torch.utils.data.DataLoader(some, 2, collate_fn=collator, num_workers=n)) for n in (0, 2))
    assert len(one) == 3 and all(map(same, one, other))


def test_the_whole_of_a_data_set_passes(every_minicpm, tmp_path):
    settings, training = recipe.parse(minicpm_run(every_minicpm, tmp_path / "out", eval_fraction=0))
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    train, held_out = load_data(recipe, settings, training)
    own = json.loads((every_minicpm / "json" / "train.json").read_text())
    assert held_out is None and train["row"] == list(range(96)) and train["id"] == [row["id"] for row in own]
    for row, right in zip(train.select(range(20)), own):
        batch = collator([row])
        assert row["length"] == batch["labels"].shape[1] == len(tokens(batch))
        answers = [f"{turn['content']}{END}" for turn in right["conversations"] if turn["role"] == "assistant"]
        assert trained(flat(batch), collator.processor.tokenizer) == [answers]


# --------------------------------------------------------------------------------------------------------- files
def said_of(data):
    """The last answer of each row."""
    return [row["conversations"][-1]["content"] for row in data]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "X.JSON", "x.JsonL"])
def test_files_as_windows_writes_them(name, parse, write, tmp_path):
    path = write([talks("q", "é 😀"), talks("r <image>", "b", image="lime.png", id=7)], name.lower()).rename(
        tmp_path / name
    )
    text = path.read_text().replace("\\u00e9", "é")
    if name.lower().endswith("json"):
        text = text.replace('{"image"', '\n{"image"')
    path.write_bytes(b"\xef\xbb\xbf" + text.encode().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    train, _ = load_data(recipe, *parse(data_path=path, eval_fraction=0))
    assert said_of(train) == ["é 😀", "b"] and train["id"] == [None, 7] and train["image"] == ["red.png", "lime.png"]


def test_types_may_differ_between_rows_and_texts_stay_texts(parse, write, tmp_path):
    os.rename(tmp_path / "lime.png", tmp_path / "7")
    texts = [
        "1",
        "1e3",
        "07",
        "true",
        "null",
        '"quoted"',
        '{"total": 6}',
        "[1, 2]",
        "é 😀 \r\n / \\",
        "[{'role': 'user'}]",
    ]
    images = ["7", "red.png", None, {}, {"<image_1>": "7"}, ""]
    rows = [
        talks(text, text, image=images[n % 6], id=[n, text, None, [n], {"a": n}, 0.5, 10**30][n % 7])
        for n, text in enumerate(texts)
    ]
    rows += [
        {**talks("q", text, "q", text), "row": "mine", "folder": "/nowhere", "length": "long", "problem": "p"}
        for text in texts
    ]
    for name in ("x.json", "x.jsonl"):
        settings, training = parse(data_path=write(rows, name), eval_fraction=0)
        train, _ = load_data(recipe, settings, training)
        collator = recipe.Collator(recipe.load_processor(settings), settings, training)
        assert said_of(train) == texts * 2 and train["row"] == list(range(20))
        assert "".join(seen(collator([row])) for row in train) == "grggr" + "r" * 10
        assert set(train.column_names) == {"id", "image", "conversations", "row", "folder", "length", "image_keys"}


def test_images_are_looked_for_beside_the_data_or_in_image_folder(parse, tmp_path):
    folders = {"red": "data_path", "blue": "eval_data_path"}
    for name in folders:
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.png").rename(tmp_path / name / "x.png")
        (tmp_path / name / "rows.json").write_text(
            json.dumps(
                [talks("Which?", "two", image="x.png"), talks("Which?", "two", image=str(tmp_path / "lime.png"))]
            )
        )
    paths = {key: tmp_path / name / "rows.json" for name, key in folders.items()}
    for given, expected in (({}, ["rg", "bg"]), ({"image_folder": tmp_path / "blue"}, ["bg", "bg"])):
        settings, training = parse(**paths, **given)
        collator = recipe.Collator(recipe.load_processor(settings), settings, training)
        assert [
            "".join(seen(collator([row])) for row in sorted(data, key=lambda row: row["row"]))
            for data in load_data(recipe, settings, training)
        ] == expected


# ------------------------------------------------------------------------------------------------------- held out
@pytest.fixture
def numbered(write, tmp_path):
    """The path of 20 rows, each with an image of its own, answered by its number."""
    for n in range(20):
        Image.new("RGB", (28, 28), (n, n, n)).save(tmp_path / f"n{n:03d}.png")
    return write([talks("q", str(n), image=f"n{n:03d}.png") for n in range(20)], "numbered.json")


def test_rows_are_held_out_by_seed(numbered, parse):
    options = {"data_path": numbered, "eval_fraction": 0.2}
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
    path = write([talks("q", str(n), image=names(n)) for n in range(24)])
    train, held_out = load_data(recipe, *parse(data_path=path, eval_fraction=0.25))
    there = [{int(said) % 8 for said in said_of(data)} for data in (train, held_out)]
    assert (len(there[1]), len(held_out), len(train)) == (2, 6, 18) and not there[0] & there[1]
    pair = lambda a, b: {"<image_0>": f"{a}.png", "<image_1>": f"{b}.png"}
    chain = [talks("<image_0><image_1>", str(n), image=pair(n % 8, (n + 1) % 8)) for n in range(8)] + [
        talks("q", "x", image=None)
    ] * 8
    train, held_out = load_data(recipe, *parse(data_path=write(chain), eval_fraction=0.1))
    shown = [{name for image in data["image"] for name in (image or {}).values()} for data in (train, held_out)]
    assert 0 < len(held_out) <= 4 and not set(train["row"]) & set(held_out["row"])
    assert all(
        set(row["image"].values()) - shown[0] for row in held_out if row["image"]
    )  # one of its images at least is new


def test_evaluation_is_bounded_to_the_same_rows_each_time(numbered, parse):
    for more in ({"eval_fraction": 0.5}, {"eval_data_path": numbered}):
        runs = [
            load_data(recipe, *parse(data_path=numbered, max_eval_rows=3, seed=seed, **more))[1]["row"]
            for seed in (1, 1, 2)
        ]
        assert len(runs[0]) == 3 and runs[0] == runs[1] != runs[2]


def test_rows_that_are_not_scored_are_not_checked(numbered, parse, write):
    some = write([talks("q", "7")] + [talks("q", "7", image="nowhere.png")] * 30)
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


def test_the_check_is_cached_until_a_file_changes(checked, write, images, tmp_path):
    path = write(
        [talks("Which?", "two", image=name) for name in ("red.png", "lime.png")]
        + [talks("<image_0>", "two", image={"<image_0>": "blue.png"})]
    )
    assert [checked(data_path=path), checked(data_path=path)] == [3, 0]
    no_say = {
        "learning_rate": 1,
        "on_bad_rows": "skip",
        "lora_r": 3,
        "output_dir": "x",
        "seed": 7,
        "tune_vision": True,
        "sample_rows": 1,
    }
    assert checked(data_path=path, **no_say) == 0  # settings that have no say in it
    for say in ({"model_max_length": 500}, {"max_slice_nums": 3}, {"downsample_mode": "4x"}):
        assert [checked(data_path=path, **say), checked(data_path=path, **say)] == [3, 0], say
    Image.new("RGB", (9, 9)).save(tmp_path / "blue.png")
    assert [checked(data_path=path), checked(data_path=path)] == [3, 0]
    (tmp_path / "red.png").write_bytes(b"not a picture any more")
    with pytest.raises(SystemExit, match="row 0: unreadable image"):
        checked(data_path=path)
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit, match="3 of 3(?s:.)*row 2"):
        checked(data_path=path, image_folder=tmp_path / "other")
    write([talks("Which?", " ", image="lime.png")])  # the same name
    with pytest.raises(SystemExit, match="row 0: empty answer"):
        checked(data_path=path)


def test_one_bad_row_in_a_thousand_is_found_in_parallel(parse, write, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    rows = [talks("q", str(n), image=None, id=f"id{n}") for n in range(1001)]
    rows[900]["conversations"][1]["content"] = None
    path = write(rows)
    with pytest.raises(SystemExit, match=r"1 of 1001 rows(?s:.*)\n  row 900 \(id id900\): empty answer"):
        load_data(recipe, *parse(data_path=path))
    train, held_out = load_data(recipe, *parse(data_path=path, eval_fraction=0, on_bad_rows="skip"))
    assert train["row"] == [n for n in range(1001) if n != 900] and held_out is None


def test_long_rows_are_never_cut_but_dropped_or_refused(parse, write, capsys, minicpm_collate):
    rows = [
        talks("q", "two"),
        talks("q", "two and " * 9),
        talks("q", "two", image="large.png"),
        talks("q " * 60, "two"),
    ]
    settings, collator = {"data_path": write(rows), "eval_fraction": 0}, minicpm_collate()
    lengths = [len(tokens(collator([row]))) for row in rows]
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
        assert (f"row 3: too long: {lengths[3]} tokens, " in out) == (3 not in kept)
        assert (f"{4 - len(kept)} of 4 rows" in out) == (len(kept) < 4)
    with pytest.raises(
        SystemExit, match=rf"(?s)3 of 4 rows.*row 1: too long: {lengths[1]} .*row 2: too long.*--on_long_rows drop"
    ):
        load_data(recipe, *parse(**settings, model_max_length=limit, on_long_rows="stop"))


def test_a_long_row_is_refused_with_its_tokens_and_those_of_its_images(collate):
    sliced, small = talks("q", "two", image="large.png"), talks("q", "two")
    longest = {name: len(tokens(collate()([row]))) for name, row in (("sliced", sliced), ("small", small))}
    limit = longest["small"]  # what large.png takes as a whole
    collator = collate(model_max_length=limit + 3)
    with pytest.raises(recipe.BadRow) as bad:
        collator([sliced])
    slices = tokens(collate()([sliced])).count(slice_ids(collator)[0])
    images = f"{(slices + 1) * (8 if collator.is_26 else 1)} of them of images"
    remedy = "raise it, or lower --max_slice_nums"
    assert (
        str(bad.value)
        == f"too long: {longest['sliced']} tokens, {images}; --model_max_length is {limit + 3}: {remedy}"
    )
    assert collate(model_max_length=limit + 3, max_slice_nums=1)([sliced])["labels"].shape[1] == limit  # it does help
    with pytest.raises(recipe.BadRow, match=r"; --model_max_length is 5: raise it$"):
        collate(model_max_length=5, max_slice_nums=1)([sliced])


def test_bad_rows_are_skipped_where_asked_for(parse, write, capsys):
    rows = [talks("q", "a"), talks("q", " "), talks("q", "b", image="nowhere.png"), talks("r", "c")]
    train, _ = load_data(recipe, *parse(data_path=write(rows), eval_fraction=0, on_bad_rows="skip"))
    assert train["row"] == [0, 3] and said_of(train) == ["a", "c"]
    out = capsys.readouterr().out
    assert "2 of 4 rows" in out and "row 1: empty answer" in out and "row 2: unreadable image" in out


def test_the_processor_of_each_kind_is_the_librarys_or_the_hubs(every_minicpm, tmp_path):
    collator = collator_of(every_minicpm, tmp_path, max_slice_nums=3)
    kind = type(collator.processor).__name__
    assert kind in ("MiniCPMV4_6Processor", "MiniCPMV4_7Processor", "MiniCPMVProcessor") and collator.is_26 == (
        kind == "MiniCPMVProcessor"
    )
    assert collator.stop_ids == collator.processor.tokenizer.convert_tokens_to_ids([END, "<|endoftext|>"])
    if collator.is_26:  # what is saved beside an adapter answers with the slices of the model
        collator.processor.save_pretrained(tmp_path / "saved")
        assert (
            AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True).image_processor.max_slice_nums
            == 9
        )
