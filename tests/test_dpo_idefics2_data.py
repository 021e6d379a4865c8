"""dpo_idefics2.py: what is learnt, after which prompt, read from which files. What completion_mask leaves is compared as text."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import load_data, prefers
from PIL import Image
from test_idefics2_docvqa_data import write_folder
from test_sft_llava_data import BOS_IN_TEMPLATE, CHATML, MODES, RED, WHITE, colours, same, trained, unpadded
from transformers import AutoProcessor

import dpo_idefics2 as recipe
from tiny import idefics2, llava, preferences

END = "<end_of_utterance>"
ROWS = [  # of different lengths; images of different sizes
    prefers("Which digit is this?", "It is a seven.", "It is a two, written by hand.", row=0),
    prefers("Is the digit even or odd?", "It is an odd number.", "even", row=1, image="lime.png"),
    prefers("What can you see in the image?", "Überweisung 漢字 😀\nनमस्ते", "x", row=2, image="blue.png"),
    prefers("What?", "a", "an even digit, written in black ink on white paper by hand", row=3),
]
ANSWERS = [row[which] for which in ("chosen", "rejected") for row in ROWS]
MODELS = {  # name -> an answer and what is learnt with it
    "idefics2": " {}" + END,
    "llava": " {}</s>",
    "llava_next": " {}</s>",
    "bos": " {}</s>",
    "chatml": "{}<|im_end|>",
    "paligemma": "{}<eos>",
}


@pytest.fixture
def pictures(images):
    """red.png, lime.png and blue.png, each of another shape."""
    images(3)
    images(2, (70, 112))
    images(1, (112, 56))


@pytest.fixture(scope="module")
def models(tiny_pairs, tiny_next, tiny_paligemma, tmp_path_factory):
    """Name -> folder of a processor: of Idefics2, LLaVA-1.5 (whose template ends no answer), LLaVA-NeXT, PaliGemma (without a
    template), and of LLaVA-1.5 with a template that begins with BOS, or ends each turn with the tokenizer's own EOS."""
    folders = {
        "idefics2": tiny_pairs / "model",
        "llava_next": tiny_next / "model",
        "paligemma": tiny_paligemma / "model",
    }
    for name, template in (("llava", llava.CHAT_TEMPLATE), ("bos", BOS_IN_TEMPLATE), ("chatml", CHATML)):
        processor = llava.processor()
        processor.chat_template = template
        if name == "chatml":
            processor.tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
            processor.tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
        processor.save_pretrained(folders.setdefault(name, tmp_path_factory.mktemp(name)))
    return folders


def learnt(batch, tokenizer):
    """What is learnt of each row, as text; it is in one piece."""
    assert set(batch["completion_mask"].unique().tolist()) == {0, 1}
    assert (batch["completion_mask"] <= batch["attention_mask"]).all()
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return [text for [text] in trained({**batch, "labels": labels}, tokenizer)]


def prompt_of(batch, n=0):
    """The tokens of a row before the first that is learnt."""
    return batch["input_ids"][n][: batch["completion_mask"][n].argmax()].tolist()


def answers_of(data, which="chosen"):
    """Answers that are numbers."""
    return [int(answer) for answer in data[which]]


# --------------------------------------------------------------------------------------------------- what is learnt
@pytest.mark.parametrize("pad", ["<unk>", "</s>", END, None])
@pytest.mark.parametrize("side", ["left", "right"])
def test_learnt_are_the_answers_and_their_ends(side, pad, pair_collate, pictures, tmp_path):
    processor = preferences.processor()
    processor.tokenizer.padding_side, processor.tokenizer.pad_token = side, pad
    processor.save_pretrained(tmp_path / "model")
    collator = pair_collate(model_name_or_path=tmp_path / "model")
    tokenizer, batch = collator.processor.tokenizer, collator(ROWS)
    assert tokenizer.pad_token == (pad or "</s>")
    assert learnt(batch, tokenizer) == [
        f" {answer}{END}" for answer in ANSWERS
    ]  # nothing else: no image, no question, no newline
    assert {key: len(values) for key, values in batch.items()} == dict.fromkeys(batch, 2 * len(ROWS))
    assert batch.keys() == {"input_ids", "attention_mask", "completion_mask", "pixel_values", "pixel_attention_mask"}
    padded = batch["attention_mask"] == 0
    assert padded.any() and (batch["input_ids"][padded] == tokenizer.pad_token_id).all()
    assert (batch["attention_mask"].diff(dim=1) <= 0).all()  # padded on the right, whatever the tokenizer does
    assert padded.any(1).sum() == len(padded) - 1  # and no more than the longest row asks for
    image = f"<fake_token_around_image>{'<image>' * collator.processor.image_seq_len}<fake_token_around_image>"
    for n, answer in enumerate(ANSWERS):
        row = ROWS[n % len(ROWS)]
        text = tokenizer.decode(unpadded(batch, n))
        assert text == f"<s> User:{image} {row['question']}{END}\nAssistant: {answer}{END}"
        assert prompt_of(batch, n) == prompt_of(batch, n % len(ROWS))


@pytest.mark.parametrize("model", MODELS)
def test_a_pair_is_the_same_alone_as_in_company(model, models, pair_collate, pictures):
    collator = pair_collate(model_name_or_path=models[model])
    batch, count = collator(ROWS), len(ROWS)
    assert learnt(batch, collator.processor.tokenizer) == [MODELS[model].format(answer) for answer in ANSWERS]
    per_token = [key for key in batch if batch[key].shape == batch["input_ids"].shape]
    for n, row in enumerate(ROWS):
        alone = collator([row])
        for which in (0, 1):
            real = [some["attention_mask"][at].bool() for some, at in ((alone, which), (batch, n + which * count))]
            for key in per_token:
                assert torch.equal(alone[key][which][real[0]], batch[key][n + which * count][real[1]]), key
        if model == "idefics2":  # here images are padded, too
            shown = [
                some["pixel_values"][at, 0] * some["pixel_attention_mask"][at] for some, at in ((alone, 0), (batch, n))
            ]
            height, width = shown[0].shape[1:]
            assert (
                torch.equal(shown[0], shown[1][:, :height, :width])
                and shown[0].any()
                and not shown[1][:, height:].any()
            )
        elif model != "llava_next":
            assert torch.equal(alone["pixel_values"][0], batch["pixel_values"][n])
    images = [key for key in batch if key not in per_token]
    assert "pixel_values" in images
    assert all(torch.equal(*batch[key].chunk(2)) for key in images)  # the prompts' twice


@pytest.mark.parametrize("model", MODELS)
def test_the_prompt_is_the_one_of_inference(model, models, pair_collate, pictures, tmp_path):
    collator = pair_collate(model_name_or_path=models[model])
    collator.processor.save_pretrained(tmp_path / "saved")  # with this run's image size, as the run itself does
    saved = AutoProcessor.from_pretrained(tmp_path / "saved")
    for row in ROWS:
        picture, batch = Image.open(tmp_path / row["image"]), collator([row])
        if model == "paligemma":  # without a template
            prompt = saved(text="<image>" + row["question"], images=picture, return_tensors="pt")
        else:
            content = [{"type": "image", "image": picture}, {"type": "text", "text": row["question"]}]
            prompt = saved.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
                                               return_dict=True, return_tensors="pt")  # fmt: skip
        [ids] = prompt["input_ids"].tolist()
        assert [prompt_of(batch), prompt_of(batch, 1)] == [ids, ids]
        assert ids.count(saved.tokenizer.bos_token_id) == 1  # one, whether the template has one or not
        asked = collator.tokenize([collator.messages_of(row)[:1]], prompt=True)  # what samples.md asks
        assert asked["input_ids"].tolist() == [ids] and asked.keys() == prompt.keys() - {"labels"}
        for key in prompt.keys() - {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}:
            assert torch.equal(torch.cat([prompt[key]] * 2), batch[key]), key
        for key in {"token_type_ids", "mm_token_type_ids"} & prompt.keys():
            assert batch[key][:, : len(ids)].tolist() == prompt[key].tolist() * 2


def test_paligemma_sees_its_prompt_as_a_whole(models, pair_collate, pictures):
    collator = pair_collate(model_name_or_path=models["paligemma"])
    batch, tokenizer = collator(ROWS), collator.processor.tokenizer
    assert torch.equal(batch["token_type_ids"] == 1, batch["completion_mask"] == 1) and "labels" not in batch
    assert tokenizer.decode(prompt_of(batch, 1)) == f"{'<image>' * 16}<bos>{ROWS[1]['question']}\n"


@pytest.mark.parametrize("model", ["idefics2", "chatml"])
def test_a_row_is_how_the_chat_template_goes_on(model, models, pair_collate, pictures):
    """Both templates end an answer: what is learnt is the beginning of what they make of it, up to the end."""
    collator = pair_collate(model_name_or_path=models[model])
    for row in ROWS:
        batch, asked = collator([row]), collator.messages_of(row)[0]
        for which in ("chosen", "rejected"):
            answer = {"role": "assistant", "content": [{"type": "text", "text": row[which]}]}
            whole = collator.processor.apply_chat_template([asked, answer], tokenize=True, return_dict=True)[
                "input_ids"
            ][0]
            ids = unpadded(batch, int(which == "rejected"))
            assert whole[: len(ids)] == ids
            assert collator.processor.tokenizer.decode(whole[len(ids) :]) == "\n"


def test_prompts_to_answer_are_padded_on_the_left(pair_collate, pictures):
    collator = pair_collate()
    collator.processor.tokenizer.padding_side = "right"
    prompts = collator.tokenize([collator.messages_of(row)[:1] for row in ROWS], prompt=True)
    assert (prompts["attention_mask"][:, -1] == 1).all() and (prompts["attention_mask"][:, 0] == 0).any()
    assert collator.stop_ids == [collator.processor.tokenizer.convert_tokens_to_ids(token) for token in (END, "</s>")]


def test_generation_stops_at_what_is_learnt_last(models, pair_collate, pictures):
    for model in MODELS:
        collator = pair_collate(model_name_or_path=models[model])
        batch = collator(ROWS)
        last = batch["input_ids"].gather(1, batch["attention_mask"].sum(1, keepdim=True) - 1).unique().tolist()
        assert len(last) == 1 and last[0] in collator.stop_ids


def test_what_a_template_puts_behind_the_first_end_is_not_learnt(pair_collate, pictures, tmp_path):
    processor = preferences.processor()
    processor.chat_template = idefics2.CHAT_TEMPLATE.replace("<end_of_utterance>", "<end_of_utterance></s>")
    processor.save_pretrained(tmp_path / "model")
    collator = pair_collate(model_name_or_path=tmp_path / "model")
    assert learnt(collator(ROWS), collator.processor.tokenizer) == [f" {answer}{END}" for answer in ANSWERS]


def test_white_space_around_texts_is_taken_off(pair_collate, pictures):
    collator = pair_collate()
    plain = collator([prefers("Which?", "a seven", "a\ntwo")])
    for question, chosen, rejected in (
        (" Which?\n", "a seven ", "\ta\ntwo"),
        ("Which?", "\n\na seven\r\n", "\u00a0a\ntwo\u3000"),
    ):
        assert same(collator([prefers(question, chosen, rejected)]), plain)
    assert learnt(plain, collator.processor.tokenizer) == [f" a seven{END}", f" a\ntwo{END}"]


def test_an_answer_may_be_in_the_question_and_in_the_other_answer(pair_collate, pictures):
    collator = pair_collate()
    for chosen, rejected in (("odd", "odd, odd"), ("Assistant: odd", "User"), ("Is it odd?", "?")):
        said = learnt(collator([prefers("Is it odd?", chosen, rejected)]), collator.processor.tokenizer)
        assert said == [f" {chosen}{END}", f" {rejected}{END}"]


# ------------------------------------------------------------------------------------------------- the printed pair
def test_the_printed_example(models, pair_collate, pictures):
    collator = pair_collate()
    batch = collator([ROWS[3], ROWS[0]])  # both rows of the pair padded
    image = "<fake_token_around_image><image> x 8<fake_token_around_image>"
    assert recipe.mark_trained_pair(batch, collator.processor) == (
        f"<s> User:{image} What?{END}\nAssistant:\n  chosen:   « a{END}»\n  rejected: « {ROWS[3]['rejected']}{END}»"
    )
    shown = {
        "llava": "<s> USER: <image> x 16\nWhat? ASSISTANT:\n  chosen:   « a</s>»\n  rejected: « b</s>»",
        "bos": "<s>USER: <image> x 16\nWhat? ASSISTANT:\n  chosen:   « a</s>»\n  rejected: « b</s>»",
        "paligemma": "<image> x 16<bos>What?\n\n  chosen:   «a<eos>»\n  rejected: «b<eos>»",
    }
    for model, expected in shown.items():
        collator = pair_collate(model_name_or_path=models[model])
        assert recipe.mark_trained_pair(collator([prefers("What?", "a", "b")]), collator.processor) == expected


def test_the_marks_may_be_in_the_question_and_in_the_answers(pair_collate, pictures):
    collator = pair_collate()
    shown = recipe.mark_trained_pair(collator([prefers("What is «x»?", "«a»", "b")]), collator.processor)
    assert shown.endswith(f" What is «x»?{END}\nAssistant:\n  chosen:   « «a»{END}»\n  rejected: « b{END}»")


def test_an_eos_that_is_not_special_ends_answers(models, pair_collate, pictures):
    """Of a tokenizer whose files do not mark it so."""
    collator = pair_collate(model_name_or_path=models["llava"])
    tokenizer = collator.processor.tokenizer
    unmarked = [
        SimpleNamespace(content=token.content, special=token.content != "</s>")
        for token in tokenizer.added_tokens_decoder.values()
    ]
    decoder, settings = dict(enumerate(unmarked)), SimpleNamespace(image_folder=None, max_length=None)
    fake = SimpleNamespace(
        tokenizer=SimpleNamespace(added_tokens_decoder=decoder, eos_token="</s>", convert_tokens_to_ids=list),
        image_token="<image>",
    )
    made = recipe.Collator(fake, settings, settings)
    assert made.end_tokens == ["</s>"] and made.control_tokens == collator.control_tokens


# ---------------------------------------------------------------------------------------------------- rows and images
def test_a_row_without_answers_is_a_question(pair_collate, pictures):
    collator = pair_collate()
    row = {"image": "red.png", "question": " What? "}
    for some in (row, {**row, "chosen": None, "rejected": None}):
        [asked] = collator.messages_of(some)
        assert (asked["role"], recipe.text_of(asked)) == ("user", "What?") and asked["content"][0]["image"].size == (
            112,
            56,
        )
        with pytest.raises(recipe.BadRow, match=r"^no answers: .*--chosen_column and --rejected_column"):
            collator([some])
    asked, answered = collator.messages_of({**row, "chosen": "a ", "rejected": " b"})
    assert (
        recipe.text_of(asked),
        answered["role"],
        recipe.text_of(answered),
        collator.read_pair({**row, "chosen": "a ", "rejected": " b"})[2],
    ) == ("What?", "assistant", "a", "b")
    assert same(collator.tokenize([[asked]], prompt=True), collator.tokenize([collator.messages_of(row)], prompt=True))


def turn(role, *content):
    """A list of one message, as TRL's preference data have it."""
    return [{"role": role, "content": content[0] if isinstance(content[0], str) else list(content)}]


def test_forms_of_one_row(pair_collate, images, tmp_path):
    """An image as path, list of one, absolute path, bytes, PIL image; texts as they are or as one message."""
    collator, [red] = pair_collate(), images(1, (112, 56))
    png = (tmp_path / red).read_bytes()
    cells = [
        red,
        [red],
        str(tmp_path / red),
        png,
        [png],
        {"bytes": png},
        {"bytes": png, "path": None},
        {"bytes": None, "path": red},
    ]
    cells += [
        {"path": red},
        [{"bytes": png, "path": "elsewhere.png"}],
        Image.open(io.BytesIO(png)),
        [Image.open(io.BytesIO(png))],
    ]
    batches = [collator([prefers("What?", "two", "six", image=cell)]) for cell in cells]
    texts, image = [{"type": "text", "text": text} for text in ("What?", "two", "six")], {"type": "image"}
    batches += [collator([prefers(turn("user", "What?"), turn("assistant", "two"), turn("assistant", "six"))])]
    for question in (
        turn("user", image, texts[0]),
        turn("user", texts[0], image),
        turn("user", {**image, "text": None}, texts[0]),
    ):
        batches += [collator([prefers(question, turn("assistant", texts[1]), turn("assistant", texts[2]))])]
    batches += [collator([prefers([{"content": "What?"}], "two", turn("assistant", texts[2]), folder=str(tmp_path))])]
    assert all(same(batches[0], batch) for batch in batches)
    assert colours({"pixel_values": batches[0]["pixel_values"][:, 0]}) == "rr"


@pytest.mark.parametrize("image, kind, expected", MODES.values(), ids=MODES)
def test_every_mode_becomes_rgb_on_white(image, kind, expected, tmp_path):
    image.save(tmp_path / f"x.{kind}")
    for cell in (str(tmp_path / f"x.{kind}"), {"bytes": (tmp_path / f"x.{kind}").read_bytes()}, image):
        loaded = recipe.load_image(cell)
        assert loaded.mode == "RGB"
        assert [loaded.getpixel((x, 0)) for x in range(loaded.width)] == expected


@pytest.mark.parametrize("orientation, upright", [(1, (2, 3)), (3, (2, 3)), (6, (3, 2)), (8, (3, 2))])
def test_images_are_upright(orientation, upright, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (2, 3), "white")
    image.putpixel((0, 0), RED)
    image.save(tmp_path / "x.png", exif=exif)
    loaded = recipe.load_image(str(tmp_path / "x.png"))
    corner = {1: (0, 0), 3: (1, 2), 6: (2, 0), 8: (0, 1)}[orientation]
    assert loaded.size == upright and loaded.getpixel(corner) == RED
    assert sum(loaded.getpixel((x, y)) == WHITE for x in range(upright[0]) for y in range(upright[1])) == 5


@pytest.mark.parametrize("size", [(40, 2), (2, 40), (20, 1), (3, 3), (1, 1)])
def test_the_narrowest_and_the_smallest_images_are_processed(size, pair_collate):
    batch = pair_collate()([prefers("What?", "two", "six", image=Image.new("RGB", size, "lime"))])
    assert colours({"pixel_values": batch["pixel_values"][:, 0] * batch["pixel_attention_mask"]}) == "gg"


@pytest.mark.parametrize("given, edge", [(None, 490), (378, 378), (700, 700), (980, 980)])
def test_longest_edge_of_the_public_model(given, edge, pair_collate, pictures, tmp_path):
    idefics2.processor(preferences.tokenizer(), height=378, width=980).save_pretrained(tmp_path / "model")
    Image.new("RGB", (1000, 1000)).save(tmp_path / "large.png")
    Image.new("RGB", (400, 380)).save(tmp_path / "small.png")
    Image.new("RGB", (1000, 600), "blue").save(tmp_path / "wide.png")
    collator = pair_collate(model_name_or_path=tmp_path / "model", **({"longest_edge": given} if given else {}))
    sizes = {
        image: tuple(collator([prefers("What?", "a", "b", image=image)])["pixel_values"].shape)
        for image in ("large.png", "small.png")
    }
    assert sizes["large.png"] == (2, 1, 3, edge, edge)
    assert sizes["small.png"] == (2, 1, 3, 380 if edge > 400 else 378, min(edge, 400))
    collator.processor.save_pretrained(tmp_path / "saved")  # what is found beside the adapter
    saved = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert dict(saved.image_processor.size) == {"shortest_edge": 378, "longest_edge": edge}
    assert saved.image_processor.do_image_splitting is False
    again = saved(text="<image>", images=Image.open(tmp_path / "wide.png"), return_tensors="pt")["pixel_values"]
    assert torch.equal(again, collator([prefers("What?", "a", "b", image="wide.png")])["pixel_values"][:1])


def test_a_smaller_model_keeps_its_own_size_and_no_image_is_split(pair_collate):
    """490, the default, is more than a tiny Idefics2 takes."""
    assert dict(pair_collate().processor.image_processor.size) == dict(preferences.processor().image_processor.size)
    assert preferences.processor().image_processor.do_image_splitting  # as in the public model
    assert pair_collate().processor.image_processor.do_image_splitting is False


# ------------------------------------------------------------------------------------------------------- the loader
def test_a_collator_can_be_pickled(models, pair_collate, pictures):
    for model in MODELS:
        collator = pair_collate(model_name_or_path=models[model])
        assert same(pickle.loads(pickle.dumps(collator))(ROWS), collator(ROWS))


def test_loader_workers_make_the_same_batches(pair_parse):
    settings, training = pair_parse()
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    train, _ = load_data(recipe, settings, training)
    some = train.select(range(6))
    one, other = (list(torch.utils.data.DataLoader(some, 2, collate_fn=collator, num_workers=n)) for n in (0, 2))
    assert len(one) == 3 and all(map(same, one, other))


# --------------------------------------------------------------------------------------------------------- data sets
TEXT = datasets.Value("string")
MESSAGES = datasets.List({"role": TEXT, "content": datasets.List({"type": TEXT, "text": TEXT})})
TRL = datasets.Features(images=datasets.List(datasets.Image()), prompt=MESSAGES, chosen=MESSAGES, rejected=MESSAGES)


def answers(row):
    return {which: row[which] for which in ("chosen", "rejected")}


def to_trl(row, image):
    """A row as TRL's preference data have it."""
    part = lambda text: {"type": "text", "text": text}
    question = turn("user", {"type": "image", "text": None}, part(row["question"]))
    return {
        "images": [image],
        "prompt": question,
        **{which: turn("assistant", part(text)) for which, text in answers(row).items()},
    }


KINDS = [
    "parquet",
    "saved",
    "dict",
    "json",
    "jsonl",
    "json folder",
    "image folder",
    "TRL",
    "TRL saved",
    "TRL json",
    "TRL texts",
]


@pytest.fixture
def rlaif(tiny_pairs, tmp_path):
    """A function: kind of data set -> path: the same 10 pairs, in the schema of RLAIF-V-Dataset, as one's own data, or as TRL's."""
    own, images = json.loads((tiny_pairs / "json" / "test.json").read_text())[:10], tiny_pairs / "json" / "images"
    data = datasets.load_dataset("parquet", data_files=str(tiny_pairs / "data" / "test.parquet"), split="train")
    assert data.features == preferences.FEATURES  # what `datasets` reads is the published schema
    data = data.select(range(10))

    def make(kind):
        path = tmp_path / {"TRL": "x.parquet", "TRL json": "x.json", "TRL texts": "x.json"}.get(kind, f"x.{kind}")
        trl = [to_trl(row, {"bytes": (images / row["image"]).read_bytes(), "path": None}) for row in own]
        if kind == "parquet":
            data.to_parquet(path)
        elif kind == "saved":
            data.save_to_disk(path)
        elif kind == "dict":
            datasets.DatasetDict(train=data).save_to_disk(path)
        elif kind == "image folder":
            write_folder(
                path, [{**row, "id": f"pair{row['id'][-5:]}"} for row in own], images
            )  # a name with "test" makes a split
        elif kind == "json folder":
            path.mkdir()
            (path / "train.json").write_text(json.dumps(own))
        elif kind == "TRL":
            datasets.Dataset.from_list(trl, features=TRL).to_parquet(path)
        elif kind == "TRL saved":
            datasets.Dataset.from_list(trl, features=TRL).save_to_disk(path)
        elif kind == "TRL json":
            path.write_text(json.dumps([to_trl(row, row["image"]) for row in own]))
        elif kind == "TRL texts":
            texts = ({"prompt": row["question"], "images": [row["image"]], **answers(row)} for row in own)
            path.write_text(json.dumps(list(texts)))
        else:
            path.write_text("\n".join(map(json.dumps, own)) if kind == "jsonl" else json.dumps(own))
        return path

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_every_schema_gives_the_same_batches(kind, rlaif, tiny_pairs, pair_parse):
    settings, training = pair_parse(
        dataset_name=rlaif(kind), image_folder=tiny_pairs / "json" / "images", eval_fraction=0
    )
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    train, held_out = load_data(recipe, settings, training)
    assert held_out is None and train["row"] == list(range(10))
    made = preferences.make_rows(0, train=False, n=24)[:10]
    for row, right in zip(train, made):
        pair = prefers(
            *(right[part] for part in ("question", "chosen", "rejected")),
            image=Image.fromarray(right["picture"].numpy()),
        )
        batch = collator([row])
        assert same(batch, collator([pair])) and row["length"] == batch["input_ids"].shape[1]
        assert learnt(batch, collator.processor.tokenizer) == [
            f" {right[which]}{END}" for which in ("chosen", "rejected")
        ]


@pytest.fixture
def saved(write, tmp_path):
    """Kind -> path: the same 20 rows to train on (chosen 0..19) in several forms, some with a split of 5 (100..104)."""
    numbers = (range(20), range(100, 105))
    for n in (*numbers[0], *numbers[1]):
        Image.new("RGB", (56, 56), (n, n, n)).save(tmp_path / f"n{n:03d}.png")
    train, test = (
        [prefers("q", str(n), "no", id=f"n{n:03d}", image=f"n{n:03d}.png") for n in some] for some in numbers
    )
    paths = {name: write(train, f"rows.{name}") for name in ("json", "jsonl", "parquet")}
    for name in ("folder", "json folder", "saved", "saved dict", "image folder"):
        paths[name] = tmp_path / name
    for kind, name in (("parquet", "folder"), ("json", "json folder")):
        paths[name].mkdir()
        write(train, f"{name}/train.{kind}")
        write(test, f"{name}/test.{kind}")
    write_folder(paths["image folder"], train, tmp_path)
    train, test = map(datasets.Dataset.from_list, (train, test))
    train.save_to_disk(paths["saved"])
    datasets.DatasetDict(train=train, test=test, other=test.select([3])).save_to_disk(paths["saved dict"])
    return paths


@pytest.mark.parametrize(
    "kind", ["json", "jsonl", "parquet", "folder", "json folder", "saved", "saved dict", "image folder"]
)
def test_every_kind_of_data_set_is_read_and_divided(kind, saved, pair_parse, tmp_path):
    options = {"dataset_name": saved[kind], "eval_fraction": 0.2, "image_folder": tmp_path}
    (train, held_out), again, other = (load_data(recipe, *pair_parse(**options, seed=seed)) for seed in (5, 5, 6))
    assert answers_of(again[0]) == answers_of(train) and answers_of(again[1]) == answers_of(held_out)
    assert answers_of(train) == train["row"]  # `row` is the number in the source
    if kind in ("folder", "json folder", "saved dict"):
        assert train["row"] == list(range(20)) and sorted(held_out["row"]) == list(range(5))
        assert answers_of(held_out) == [100 + row for row in held_out["row"]]
    else:
        assert (len(train), len(held_out)) == (16, 4)
        assert sorted(train["row"]) != sorted(other[0]["row"])
        assert sorted([*train["row"], *held_out["row"]]) == list(range(20))
        assert answers_of(held_out) == held_out["row"]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"dataset_name": "saved dict", "dataset_test_split": "other"}, [103]),
        ({"dataset_name": "json", "eval_dataset_name": "saved dict", "dataset_test_split": "other"}, [103]),
        ({"dataset_name": "json", "eval_dataset_name": "jsonl", "max_eval_rows": 20}, list(range(20))),
        ({"dataset_name": "json", "eval_fraction": 0}, None),
        ({"dataset_name": "saved dict", "eval_strategy": "no"}, None),
        ({"dataset_name": "json", "eval_strategy": "no"}, None),
        ({"dataset_name": "saved dict", "dataset_train_split": "test", "dataset_test_split": "other"}, [103]),
    ],
)
def test_what_is_evaluated_on_can_be_said(settings, expected, saved, pair_parse, tmp_path):
    paths = {key: saved.get(value, value) for key, value in settings.items()}
    train, held_out = load_data(recipe, *pair_parse(**paths, image_folder=tmp_path))
    assert len(train) == (5 if "dataset_train_split" in settings else 20)
    assert (held_out and sorted(answers_of(held_out))) == expected


def test_rows_trained_on_are_not_held_out_by_default(saved, pair_parse, tmp_path):
    train, held_out = load_data(
        recipe, *pair_parse(dataset_name=saved["saved dict"], dataset_train_split="test", image_folder=tmp_path)
    )
    assert not set(answers_of(train)) & set(answers_of(held_out)) and len(train) + len(held_out) == 5


def test_two_ways_to_write_a_path_are_one_image(images, write, pair_parse, tmp_path):
    rows = [
        prefers(f"q{n}", str(n), "no", image=f"{'./' * (n % 2)}{name}")
        for n, name in enumerate([name for name in images(5) for _ in "ab"])
    ]
    train, held_out = load_data(
        recipe, *pair_parse(dataset_name=write(rows), eval_fraction=0.4, image_folder=tmp_path)
    )
    assert len(held_out) == 4 and not {n // 2 for n in train["row"]} & {n // 2 for n in held_out["row"]}


def test_an_image_that_changes_under_a_parquet_of_paths_is_read_again(images, pair_parse, tmp_path):
    names = [str(tmp_path / name) for name in images(4)]
    rows = {
        "image": [{"bytes": None, "path": name} for name in names],
        "question": ["q"] * 4,
        "chosen": ["a"] * 4,
        "rejected": ["b"] * 4,
    }
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False)).to_parquet(
        tmp_path / "rows.parquet"
    )
    settings = pair_parse(dataset_name=tmp_path / "rows.parquet", eval_fraction=0)
    assert len(load_data(recipe, *settings)[0]) == 4
    Path(names[2]).write_bytes(b"x")
    with pytest.raises(SystemExit, match="row 2: unreadable image"):
        load_data(recipe, *settings)


@pytest.mark.parametrize("kind", ["json", "parquet", "parquet of lists", "saved"])
def test_pairs_about_one_image_are_on_one_side(kind, pair_parse, tmp_path):
    images = [Image.new("RGB", (28, 28), (n, n, n)) for n in range(8)]
    rows = [prefers(f"q{n}", str(n), "no", image=images[n % 8]) for n in range(24)]
    path = tmp_path / f"rows.{kind.split()[0]}"
    if kind == "json":
        for n, image in enumerate(images):
            image.save(tmp_path / f"{n}.png")
        path.write_text(json.dumps([{**row, "image": f"{n % 8}.png"} for n, row in enumerate(rows)]))
    else:
        data = datasets.Dataset.from_list(
            [{**row, "image": [row["image"]]} for row in rows] if "lists" in kind else rows
        )
        data.to_parquet(path) if path.suffix == ".parquet" else data.save_to_disk(path)
    train, held_out = load_data(recipe, *pair_parse(dataset_name=path, eval_fraction=0.25))
    there = [{n % 8 for n in answers_of(data)} for data in (train, held_out)]
    assert (len(there[1]), len(held_out), len(train)) == (2, 6, 18) and not there[0] & there[1]


@pytest.mark.parametrize("kind", ["json", "folder"])
def test_evaluation_is_bounded_to_the_same_rows_each_time(kind, saved, pair_parse, tmp_path):
    options = {"dataset_name": saved[kind], "eval_fraction": 0.5, "max_eval_rows": 3, "image_folder": tmp_path}
    runs = [load_data(recipe, *pair_parse(**options, seed=seed))[1]["row"] for seed in (1, 1, 2)]
    assert len(runs[0]) == 3 and runs[0] == runs[1] != runs[2]


def test_rows_that_are_not_scored_are_not_checked(saved, pair_parse, write, tmp_path):
    write([prefers("q", "7", "8", image="n000.png")] + [prefers("q", "7", "8", image="nowhere.png")] * 30, "some.json")
    settings = {"dataset_name": saved["json"], "eval_dataset_name": tmp_path / "some.json", "image_folder": tmp_path}
    seed = next(seed for seed in range(99) if datasets.Dataset.from_dict({"n": range(31)}).shuffle(seed)["n"][0] == 0)
    assert load_data(recipe, *pair_parse(**settings, max_eval_rows=1, seed=seed))[1]["row"] == [0]
    with pytest.raises(SystemExit, match="1 of 2 rows of the evaluation data"):
        load_data(recipe, *pair_parse(**settings, max_eval_rows=2, seed=seed))


def test_images_are_looked_for_beside_the_data(pair_parse, tmp_path):
    folders = {"red": "dataset_name", "blue": "eval_dataset_name"}
    for name in folders:
        (tmp_path / name).mkdir()
        Image.new("RGB", (56, 56), name).save(tmp_path / name / "x.png")
        (tmp_path / name / "rows.json").write_text(json.dumps([prefers("Which?", "two", "six", image="x.png")]))
    settings, training = pair_parse(**{key: tmp_path / name / "rows.json" for name, key in folders.items()})
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    batches = [collator([data[0]]) for data in load_data(recipe, settings, training)]
    assert [colours({"pixel_values": batch["pixel_values"][:1, 0]}) for batch in batches] == ["r", "b"]


COLUMNS = {  # columns of a row, flags
    "own": ({"question": "Q", "chosen": "A", "rejected": "B"}, {}),
    "image before images": ({"images": ["no.png"], "question": "Q", "chosen": "A", "rejected": "B"}, {}),
    "question before prompt": ({"question": "Q", "prompt": "no", "chosen": "A", "rejected": "B"}, {}),
    "prompt by flag": ({"question": "no", "prompt": "Q", "chosen": "A", "rejected": "B"}, {"question_column": "prompt"}),
    "other names": (
        {"photo": "red.png", "frage": "Q", "besser": "A", "schlechter": "B", "image": "no.png", "question": 5, "chosen": 5, "rejected": []},
        {"image_column": "photo", "question_column": "frage", "chosen_column": "besser", "rejected_column": "schlechter"},
    ),
    "names exchanged": (
        {"image": "Q", "question": "B", "chosen": "red.png", "rejected": "A"},
        {"image_column": "chosen", "question_column": "image", "chosen_column": "rejected", "rejected_column": "question"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("row, flags", COLUMNS.values(), ids=COLUMNS)
def test_columns_have_their_names_by_themselves_or_by_flags(row, flags, kind, pair_parse, write, images):
    images(1)
    settings, training = pair_parse(
        dataset_name=write([{"image": "red.png", **row}] * 2, f"rows.{kind}"), eval_fraction=0, **flags
    )
    train, _ = load_data(recipe, settings, training)
    collator = recipe.Collator(recipe.load_processor(settings), settings, training)
    asked, said = collator.messages_of(train[0])
    assert (recipe.text_of(asked), recipe.text_of(said), collator.read_pair(train[0])[2]) == ("Q", "A", "B")


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_columns_of_the_names_used_here_do_no_harm(kind, pair_parse, write, images):
    images(1)
    mine = {
        "row": "mine",
        "folder": "/nowhere",
        "length": "long",
        "problem": "p",
        "prompt": 5,
        "input_ids": [1],
        "completion_mask": 3,
    }
    rows = [{**mine, **prefers("q", f"a{n}", "b"), "id": n, "images": [], "pixel_values": [n]} for n in range(3)]
    train, _ = load_data(recipe, *pair_parse(dataset_name=write(rows, f"rows.{kind}"), eval_fraction=0))
    assert (train["row"], train["id"], train["chosen"]) == ([0, 1, 2], [0, 1, 2], ["a0", "a1", "a2"]) and train[
        "length"
    ][0] > 5
    assert set(train.column_names) == {
        "id",
        "image",
        "question",
        "chosen",
        "rejected",
        "row",
        "folder",
        "length",
        "image_keys",
    }


def test_types_may_differ_between_rows_and_texts_stay_texts(pair_parse, write, images, tmp_path):
    images(2)
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
    rows = [
        prefers(text, text, turn("assistant", "no"), image=("7", ["red.png"])[n % 2], id=(n, text)[n % 2])
        for n, text in enumerate(texts)
    ]
    rows += [
        prefers(
            turn("user", text),
            turn("assistant", {"type": "text", "text": text}),
            "no",
            image={"path": "7", "bytes": None},
        )
        for text in texts
    ]
    for name in ("x.json", "x.jsonl"):
        settings, training = pair_parse(dataset_name=write(rows, name), eval_fraction=0)
        train, _ = load_data(recipe, settings, training)
        collator = recipe.Collator(recipe.load_processor(settings), settings, training)
        said = [collator.messages_of(row) for row in train]
        assert (
            [recipe.text_of(asked) for asked, _ in said] == [recipe.text_of(answer) for _, answer in said] == texts * 2
        )
        assert {collator.read_pair(row)[2] for row in train} == {"no"}
        assert (
            "".join(colours({"pixel_values": collator([row])["pixel_values"][:1, 0]}) for row in train)
            == "gr" * 5 + "g" * 10
        )


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_files_as_windows_writes_them(name, pair_parse, write, images):
    images(1)
    path = write([prefers("q", "é", "a"), prefers("r", "b", "c")], name)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert load_data(recipe, *pair_parse(dataset_name=path, eval_fraction=0))[0]["chosen"] == ["é", "b"]


def test_the_hub_is_asked_for_what_the_flags_say(pair_parse, monkeypatch, images, tmp_path):
    seen, process = [], AutoProcessor.from_pretrained
    data = datasets.DatasetDict(
        train=datasets.Dataset.from_list([prefers("q", "a", "b", image=str(tmp_path / name)) for name in images(4)])
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: [data, seen.append((args, kwargs))][0])
    monkeypatch.setattr(
        AutoProcessor,
        "from_pretrained",
        lambda *args, **kwargs: [process(args[0]), seen.append(kwargs["revision"])][0],
    )
    train, held_out = load_data(
        recipe, *pair_parse(dataset_name="a/b", dataset_config="c", dataset_revision="d", model_revision="e")
    )
    assert (len(train), len(held_out)) == (3, 1)
    assert seen == ["e", (("a/b", "c"), {"revision": "d"}), (("a/b", "c"), {"revision": "d"})]


# --------------------------------------------------------------------------------------------------------- the check
@pytest.fixture
def checked(pair_parse, monkeypatch):
    """A function: settings as keywords -> how many rows load_data gave to the collator."""
    calls, call = [], recipe.Collator.__call__
    monkeypatch.setattr(recipe.Collator, "__call__", lambda self, rows: [calls.extend(rows), call(self, rows)][1])

    def make(**settings):
        calls.clear()
        load_data(recipe, *pair_parse(**{"eval_fraction": 0, **settings}))
        return len(calls)

    return make


def test_the_check_is_cached_until_an_image_changes(checked, write, pictures, tmp_path):
    path = write([prefers("Which?", "two", "six", image=name) for name in ("red.png", "lime.png", "blue.png")])
    assert [checked(dataset_name=path), checked(dataset_name=path)] == [3, 0]
    no_say = {
        "learning_rate": 1,
        "on_bad_rows": "skip",
        "lora_r": 3,
        "output_dir": "x",
        "beta": 0.2,
        "loss_type": "ipo",
        "seed": 7,
    }
    assert checked(dataset_name=path, **no_say) == 0  # settings that have no say in it
    assert checked(dataset_name=path, max_length=500) == 3
    Image.new("RGB", (9, 9)).save(tmp_path / "lime.png")
    assert [checked(dataset_name=path), checked(dataset_name=path)] == [3, 0]
    (tmp_path / "red.png").write_bytes(b"not a picture any more")
    with pytest.raises(SystemExit, match="row 0: unreadable image"):
        checked(dataset_name=path)
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit, match="row 2"):
        checked(dataset_name=path, image_folder=tmp_path / "other")
    write([prefers("Which?", "two", "two", image="blue.png")])  # the same name
    with pytest.raises(SystemExit, match="row 0: equal answers"):
        checked(dataset_name=path)


def test_an_image_that_changes_in_an_image_folder_is_checked_again(checked, saved):
    path = saved["image folder"]
    assert [checked(dataset_name=path), checked(dataset_name=path)] == [20, 0]
    (path / "n003.png").write_bytes(b"not a picture any more")
    with pytest.raises(SystemExit, match=r"1 of 20 rows(?s:.*)\(id n003\): unreadable image"):
        checked(dataset_name=path)


def test_one_bad_row_in_a_thousand_is_found_in_parallel(pair_parse, write, images, monkeypatch):
    images(1, (8, 8))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    rows = [prefers("q", str(n), "no", id=f"id{n}") for n in range(1001)]
    rows[900]["rejected"] = " 900"
    path = write(rows)
    with pytest.raises(SystemExit, match=r"1 of 1001 rows(?s:.*)\n  row 900 \(id id900\): equal answers"):
        load_data(recipe, *pair_parse(dataset_name=path))
    train, held_out = load_data(recipe, *pair_parse(dataset_name=path, eval_fraction=0, on_bad_rows="skip"))
    assert train["row"] == answers_of(train) == [n for n in range(1001) if n != 900] and held_out is None


def test_long_rows_are_dropped_or_refused_by_their_longer_answer(pair_parse, pair_collate, write, images, capsys):
    images(1)
    rows = [
        prefers("q", "two", "six"),
        prefers("q", "two", "six and " * 9),
        prefers("q and " * 40, "two", "six"),
        prefers("q", "six and " * 20, "two"),
    ]
    settings, collator = {"dataset_name": write(rows), "eval_fraction": 0}, pair_collate()
    lengths = [collator([row])["input_ids"].shape[1] for row in rows]
    assert [
        max(len(unpadded(collator([row]), n)) for n in (0, 1)) for row in rows
    ] == lengths  # prompt and longer answer
    assert lengths[0] < lengths[1] < lengths[3] < lengths[2]
    for limit, kept in (
        (lengths[2], [0, 1, 2, 3]),
        (lengths[2] - 1, [0, 1, 3]),
        (lengths[3] - 1, [0, 1]),
        (lengths[1] - 1, [0]),
    ):
        train, _ = load_data(recipe, *pair_parse(**settings, max_length=limit))
        assert train["row"] == kept and train["length"] == [lengths[n] for n in kept]
        out = capsys.readouterr().out
        assert (f"row 2: too long: {lengths[2]} tokens, --max_length is {limit}" in out) == (2 not in kept)
        assert (f"{4 - len(kept)} of 4 rows" in out) == (len(kept) < 4)
    with pytest.raises(
        SystemExit, match=rf"(?s)3 of 4 rows.*row 1: too long: {lengths[1]} .*row 2: too long.*--on_long_rows drop"
    ):
        load_data(recipe, *pair_parse(**settings, max_length=limit, on_long_rows="stop"))


def test_max_length_may_be_none(pair_flags, write, images, tmp_path):
    images(1)
    path = write([prefers("q", "two " * 2000, "six")])
    (tmp_path / "run.yaml").write_text("max_length: null\n")
    argv = pair_flags(dataset_name=path, eval_fraction=0, config=tmp_path / "run.yaml")
    [length] = load_data(recipe, *recipe.parse(argv))[0]["length"]
    assert length > 2000
    with pytest.raises(SystemExit, match=f"too long: {length} tokens, --max_length is 1024"):
        load_data(recipe, *recipe.parse(pair_flags(dataset_name=path, eval_fraction=0)))


def test_bad_rows_are_skipped_where_asked_for(pair_parse, write, pictures, capsys):
    rows = [
        prefers("q", "a", "b"),
        prefers("q", "a", " a "),
        prefers("q", "a", "b", image="nowhere.png"),
        prefers("r", "a", "b"),
    ]
    train, _ = load_data(recipe, *pair_parse(dataset_name=write(rows), eval_fraction=0, on_bad_rows="skip"))
    assert train["row"] == [0, 3] and train["question"] == ["q", "r"]
    out = capsys.readouterr().out
    assert "2 of 4 rows" in out and "row 1: equal answers" in out and "row 2: unreadable image" in out


def test_the_same_pixels_from_every_place(pair_parse, tiny_pairs, tmp_path):
    """A data set moved elsewhere is the same data set."""
    shutil.copytree(tiny_pairs / "data", tmp_path / "moved")
    some = []
    for path in (tiny_pairs / "data", tmp_path / "moved"):
        settings, training = pair_parse(dataset_name=path, max_eval_rows=4)
        collator = recipe.Collator(recipe.load_processor(settings), settings, training)
        train, held_out = load_data(recipe, settings, training)
        some.append((train["row"], held_out["row"], collator([train[5], train[9]])))
    assert some[0][:2] == some[1][:2] and same(some[0][2], some[1][2]) and len(some[0][1]) == 4
