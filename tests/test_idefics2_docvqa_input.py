"""idefics2_docvqa.py and bad input: one message that names the row and the remedy, exit status 1, before any weights load."""

import json
import re
import shutil
import subprocess
import sys

import datasets
import pytest
import torch
from conftest import ROOT, Loaded, asks, load_data, stopped_by
from PIL import Image
from transformers import CLIPProcessor

import idefics2_docvqa as recipe
from tiny import idefics2, llava

GOOD = asks("What is the total?", "47")
END, FAKE = "<end_of_utterance>", "<fake_token_around_image>"


@pytest.fixture
def stops(form_flags, monkeypatch):
    """A function: settings as keywords -> the message with which main() ends, before it loads any weights."""
    return stopped_by(recipe, form_flags, monkeypatch)


@pytest.fixture
def pages(odd_images):
    """Good pages, red.png and lime.png, and those that are not."""


def page(image):
    return {**GOOD, "image": image}


def answered(answers):
    return {**GOOD, "answers": answers}


NONE, NO_TEXT, BLANK, NO_PAGE = (
    "no accepted answer: .*--answers_column",
    "is not a text: ",
    "empty answer: .*white space",
    "unreadable image: ",
)
LANGUAGE = r"language: no question in 'en', there are "
BAD_ROWS = {  # what is wrong: the row, what the message says
    "answers null": (answered(None), NONE),
    "no answers": (answered([]), NONE),
    "answers missing": ({"image": "red.png", "question": "q"}, NONE),
    "answer empty": (answered([""]), BLANK),
    "answer a blank text": (answered(" \n\t"), BLANK),
    "answer a no-break space": (answered(["\u00a0"]), BLANK),
    "a blank answer among good ones": (answered(["47", " ", "forty-seven"]), BLANK),
    "answer a number": (answered([47]), rf"answer {NO_TEXT}47; .*quotes"),
    "answers a number": (answered(47), rf"answer {NO_TEXT}47; .*quotes"),
    "answer a truth value": (answered([True]), rf"answer {NO_TEXT}True"),
    "a null among answers": (answered(["47", None]), rf"answer {NO_TEXT}None"),
    "answers a dict": (answered({"text": ["47"]}), rf"answer {NO_TEXT}.*text"),
    "an answer a dict": (answered([{"text": "47", "start": 2}]), rf"answer {NO_TEXT}.*text"),
    "an answer a list": (answered([["47"]]), rf"answer {NO_TEXT}"),
    "question null": (asks(None, "47"), rf"question {NO_TEXT}None"),
    "question a number": (asks(47, "47"), rf"question {NO_TEXT}47"),
    "question a list": (asks(["What?"], "47"), rf"question {NO_TEXT}"),
    "question empty": (asks("", "47"), "empty question"),
    "question blank": (asks(" \n", "47"), "empty question: .*white space"),
    "question blank in this language": (asks({"en": "\t", "de": "Was?"}, "47"), "empty question: .*white space"),
    "question a number in this language": (asks({"en": 5}, "47"), rf"question {NO_TEXT}5"),
    "question not in this language": (
        asks({"en": None, "de": "Was?", "fr": "Quoi ?"}, "47"),
        LANGUAGE + r"\['de', 'fr'\].*--language",
    ),
    "question empty in this language": (asks({"en": "", "de": "Was?"}, "47"), LANGUAGE + r"\['de'\].*--language"),
    "question in another language": (asks({"de": "Was?"}, "47"), LANGUAGE + r"\['de'\].*--language"),
    "question in no language": (asks({}, "47"), LANGUAGE),
    "page null": (page(None), "not one page: 0 pages"),
    "page an empty list": (page([]), "not one page: 0 pages"),
    "page a list of null": (page([None]), "not one page: 0 pages"),
    "two pages": (page(["red.png", "lime.png"]), "not one page: 2 pages; .*--image_column"),
    "page a number": (page(5), NO_PAGE + "5 "),
    "page a list of a number": (page([5]), NO_PAGE + "5 "),
    "page without bytes": (page({"bytes": None, "path": None}), "not one page: 0 pages"),
    "page of no known kind": (page({"url": "x"}), "not one page: 0 pages"),
    "page missing": (page("nowhere.png"), NO_PAGE + ".*nowhere.png.*No such file.*--image_folder"),
    "page of an empty name": (page(""), "not one page: 0 pages"),
    "page a folder": (page("."), NO_PAGE + ".*Is a directory"),
    "several pages in one file": (page("pages.tiff"), "several images: .*pages.tiff holds 3.*its own file"),
    "a moving picture": (page("film.gif"), "several images: .*film.gif holds 3"),
    "a moving picture, too": (page("film.webp"), "several images: .*film.webp holds 3"),
    "page of no numbers": (page("nan.tiff"), NO_PAGE + ".*nan.tiff .its brightest value is nan"),
    "page of infinite numbers": (page("inf.tiff"), NO_PAGE + ".*inf.tiff .its brightest value is inf"),
    "page of negative numbers": (page("negative.tiff"), NO_PAGE + ".*negative.tiff .its brightest value is -1"),
    "page empty": (page("empty.png"), NO_PAGE + ".*empty.png"),
    "page truncated": (page("truncated.jpg"), NO_PAGE + ".*truncated.jpg.*truncated"),
    "page no picture": (page("text.png"), NO_PAGE + ".*text.png"),
    "page with a NUL in its name": (page("red\0.png"), NO_PAGE),
    "page too wide": (page("wide.png"), "image too narrow: .*wide.png.*1000 x 49"),
    "page too high": (page("high.png"), "image too narrow: .*high.png.*49 x 1000"),
    "page of one pixel": (page("dot.png"), "page too small: 1 x 1"),
    "page of one line": (page("line.png"), "page too small: 20 x 1"),
    "page of one column": (page("column.png"), "page too small: 1 x 20"),
    "<image> in a question": (asks("What is <image>?", "47"), "control token: .*<image>.*question"),
    "<image> in an answer": (asks("What?", "47", "<image>"), "control token: .*<image>.*answer"),
    "fake token in a question": (asks(f"What{FAKE}?", "47"), f"control token: .*{FAKE}.*question"),
    "end in an answer": (asks("What?", f"47{END}"), f"control token: .*{END}.*answer"),
    "</s> in a question": (asks("What</s>?", "47"), "control token: .*</s>.*question"),
    "<s> in an answer": (asks("What?", "<s>47"), "control token: .*<s>.*answer"),
    "<unk> in a question of this language": (asks({"en": "<unk>"}, "47"), "control token: .*<unk>.*question"),
}


@pytest.mark.parametrize("row, expected", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_with_a_remedy(row, expected, stops, write, pages):
    message = stops(dataset_name=write([GOOD, row, GOOD]))
    lines = message.splitlines()
    assert len(lines) == 3 and re.match(rf"  row 1: .*?{expected}", lines[1]), message
    assert lines[0].startswith("error: 1 of 3 rows") and "--on_bad_rows skip" in lines[2]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("image", ["dot.png", "line.png", "column.png"])
def test_no_page_crashes_the_image_processor(image, split, stops, write, pages):
    assert re.search("row 1: page too small", stops(dataset_name=write([GOOD, page(image)]), image_splitting=split))


def test_a_page_too_large_is_named(stops, write, pages, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 56 * 56)  # PIL refuses twice as many
    Image.new("RGB", (112, 112)).save(write([GOOD, page("scan.png")]).parent / "scan.png")
    message = stops(dataset_name=write([GOOD, page("scan.png")]))
    assert re.search(r"\n  row 1: unreadable image: .*scan.png .*12544 pixels.*shrink", message), message


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_bad_rows_of_other_files_and_with_ids(name, stops, write, pages):
    rows = [{**page(image), "id": f"n{n}"} for n, image in enumerate(["red.png", "text.png", "nowhere.png"])]
    rows += [{**answered([]), "id": ""}, {**GOOD, "question": " ", "id": None}]
    message = stops(dataset_name=write(rows, name))
    assert re.search(
        r"4 of 5 rows of .*rows\.\w+ .*\n  row 1 \(id n1\): .*\n  row 2 \(id n2\): .*\n  row 3: no.*\n  row 4: empty",
        message,
    )


def test_ids_may_be_numbers(stops, write, pages):
    assert re.search(
        r"\n  row 1 \(id 0\): ", stops(dataset_name=write([{**GOOD, "id": 5}, {**page("text.png"), "id": 0}]))
    )


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("listed", [False, True])
def test_embedded_pages_that_are_none(listed, kind, stops, tmp_path, pages):
    good = (tmp_path / "red.png").read_bytes()
    cells = [
        {"bytes": good, "path": None},
        {"bytes": b"no picture", "path": "scan.png"},
        {"bytes": b"no picture", "path": None},
        None,
    ]
    kinds = datasets.Features(
        image=datasets.Image(), question=datasets.Value("string"), answers=datasets.List(datasets.Value("string"))
    )
    if listed:
        kinds["image"], cells = datasets.List(datasets.Image()), [cell and [cell] for cell in cells]
    data = datasets.Dataset.from_list([page(cell) for cell in cells], features=kinds)
    (data.to_parquet if kind == "parquet" else data.save_to_disk)(tmp_path / f"x.{kind}")
    message = stops(dataset_name=tmp_path / f"x.{kind}")
    assert re.search(
        r"3 of 4 (?s:.)*row 1: .*scan.png(?s:.)*row 2: unreadable image: its bytes (?s:.)*row 3: .*page", message
    ), message


def test_a_prompt_that_the_answer_changes_is_refused(stops, write, pages, tmp_path):
    """No space between prompt and answer: two of the reader's tokens may be one token to the tokenizer."""
    processor = idefics2.processor()
    words = "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
    end = "{{ '<end_of_utterance>' if m.role == 'assistant' }}"
    processor.chat_template = "{% for m in messages %}" + words + end + "{% endfor %}"
    processor.save_pretrained(tmp_path / "model")
    rows = [asks("What is the", "?"), asks("What is t", "?", "he total"), asks("What is t", "he total", "47")]
    message = stops(dataset_name=write(rows), model_name_or_path=tmp_path / "model", instruction="")
    assert "2 of 3" in message and re.search(
        r"\n  row 1: prompt changed: .*'he total' change the prompt's tokens", message
    ), message
    assert "\n  row 2: " in message


@pytest.mark.parametrize("instruction", ["<image>", f"Read.{END}", "</s>", "   "])
def test_an_instruction_that_cannot_be(instruction, stops):
    assert "instruction" in stops(instruction=instruction)


# ------------------------------------------------------------------------------------------------------ skipping
def test_skipped_rows_are_counted_and_the_first_twenty_listed(form_parse, write, pages, capsys):
    bad = [answered([]) if n % 3 else asks("q", "</s>") for n in range(24)]
    path = write([GOOD, *bad, page("nowhere.png"), asks({"de": "Was?"}, "47"), asks("q", "two")])
    train, _ = load_data(recipe, *form_parse(dataset_name=path, on_bad_rows="skip", eval_fraction=0))
    assert train["row"] == [0, 27]
    out = capsys.readouterr().out
    assert "26 of 28 rows" in out
    for n, reason in ((16, "no accepted answer"), (8, "control token"), (1, "unreadable image"), (1, "language")):
        assert re.search(rf"\b{n} x {reason}|{reason}'?: {n}\b", out)
    assert re.findall(r"\n  row (\d+)", out) == [str(n) for n in range(1, 21)] and "at most 20 shown" in out


def test_bad_rows_to_evaluate_on(stops, form_parse, write, pages, capsys, tmp_path):
    (tmp_path / "data").mkdir()
    write([GOOD, GOOD], "data/train.json")
    write([GOOD, answered([" "]), GOOD], "data/test.json")
    folder = {"dataset_name": tmp_path / "data", "image_folder": tmp_path}
    assert re.search(r"1 of 3 rows .*\n  row 1: empty answer", stops(**folder))
    train, held_out = load_data(recipe, *form_parse(**folder, on_bad_rows="skip"))
    assert len(train) == 2 and sorted(held_out["row"]) == [0, 2] and "row 1: empty answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row, settings, remedy, other",
    [
        (answered([]), {"on_bad_rows": "skip"}, "", "--max_length"),
        (GOOD, {"max_length": 5}, "--max_length", "--on_bad_rows"),
        (GOOD, {"max_length": 5, "on_bad_rows": "skip"}, "--max_length", "--on_bad_rows"),
    ],
)
def test_no_row_is_left(row, settings, remedy, other, stops, write, pages):
    message = stops(dataset_name=write([row] * 3), **settings)
    assert (
        re.search("3 of 3 rows", message)
        and remedy in message
        and other not in message
        and "No row would be left" in message
    ), message


def test_long_rows_do_not_hide_bad_ones(stops, write, pages):
    message = stops(dataset_name=write([asks("q " * 99, "a")] * 25 + [answered([])]), max_length=60)
    assert "row 25: no accepted answer" in message and "25 x too long" in message, message


# --------------------------------------------------------------------------------------------------------- files
def empty_parquet(path):
    datasets.Dataset.from_dict({"image": [], "question": [], "answers": []}).to_parquet(path)


EMPTY, UNREADABLE = "empty|no data|no rows", "cannot read"
FILES = {  # name, how to write it, what the message says beside its name
    "empty json": ("x.json", lambda path: path.write_text("[]"), EMPTY),
    "empty jsonl": ("x.jsonl", lambda path: path.write_text(""), EMPTY),
    "empty parquet": ("x.parquet", empty_parquet, EMPTY),
    "empty saved": (
        "x",
        lambda path: datasets.Dataset.from_dict({"image": [], "question": []}).save_to_disk(path),
        EMPTY,
    ),
    "empty folder": ("x", lambda path: path.mkdir(), UNREADABLE),
    "json cut off": ("x.json", lambda path: path.write_text(json.dumps([GOOD] * 9)[:-30]), UNREADABLE),
    "json with a slip": ("x.json", lambda path: path.write_text('[{"image": }]'), UNREADABLE),
    "json of one row": ("x.json", lambda path: path.write_text(json.dumps(GOOD)), UNREADABLE),
    "json of texts": ("x.json", lambda path: path.write_text('["a", "b"]'), UNREADABLE),
    "json that is jsonl": (
        "x.json",
        lambda path: path.write_text("\n".join([json.dumps(GOOD)] * 2)),
        "(?s)cannot read.*jsonl",
    ),
    "jsonl with a slip": ("x.jsonl", lambda path: path.write_text(json.dumps(GOOD) + '\n{"image": \n'), UNREADABLE),
    "json not in UTF-8": ("x.json", lambda path: path.write_bytes('[{"a": "é"}]'.encode("latin-1")), UNREADABLE),
    "half a character": (
        "x.json",
        lambda path: path.write_text(json.dumps([asks("What\ud83d?", "47")])),
        r"row 0 has invalid Unicode .a lone surrogate.; fix",
    ),
    "no parquet": ("x.parquet", lambda path: path.write_text("PAR1"), UNREADABLE),
    "another kind": (
        "x.csv",
        lambda path: path.write_text("image,question"),
        r"cannot read.*\.json, \.jsonl and \.parquet",
    ),
    "nowhere.json": ("nowhere.json", lambda path: None, UNREADABLE),
    "nowhere.parquet": ("nowhere.parquet", lambda path: None, UNREADABLE),
    "nowhere": ("nowhere", lambda path: None, UNREADABLE),
}


@pytest.mark.parametrize("flag", ["dataset_name", "eval_dataset_name"])
@pytest.mark.parametrize("name, create, expected", FILES.values(), ids=FILES)
def test_a_data_set_that_cannot_be_read_is_named(name, create, expected, flag, stops, write, pages, tmp_path):
    create(tmp_path / name)
    message = stops(**{"dataset_name": write([GOOD] * 2), flag: tmp_path / name})
    assert (str(tmp_path / name) in message or "the evaluation data" in message) and re.search(expected, message), (
        message
    )


def test_the_hub_cannot_be_reached(stops):
    assert "cannot read nobody/nothing" in stops(dataset_name="nobody/nothing")


@pytest.mark.parametrize("flag", ["dataset_train_split", "dataset_test_split"])
def test_an_unknown_split_is_answered_with_the_known_ones(flag, stops):
    message = stops(**{flag: "dev"})
    assert re.search("no split 'dev'; it has ", message) and set(re.split("[ ,]+", message.split("it has ")[1])) == {
        "train",
        "test",
    }


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize(
    "row, flags, expected",
    [
        (
            {"page": "red.png", "question": "q", "answer": "a"},
            {},
            "no column 'image' .--image_column.*page, question, answer",
        ),
        (
            {"image": "red.png", "frage": "q", "answer": "a"},
            {},
            "no column 'question' .--question_column.*image, frage, answer",
        ),
        (
            {"page": "red.png", "frage": "q"},
            {},
            "no column 'image' .--image_column. and 'question' .--question_column. and 'answer' .--answers",
        ),
        (GOOD, {"image_column": "scan"}, "no column 'scan' .--image_column"),
        (GOOD, {"question_column": "frage"}, "no column 'frage' .--question_column"),
        (GOOD, {"answers_column": "antwort"}, "no column 'antwort' .--answers_column.*image, question, answers"),
        (GOOD, {"answers_column": "question"}, "one column cannot be two"),
        (GOOD, {"image_column": "question"}, "one column cannot be two"),
    ],
)
def test_columns_that_are_not_there_are_named_with_their_flags(row, flags, expected, kind, stops, write, pages):
    message = stops(dataset_name=write([row] * 2, f"rows.{kind}"), **flags)
    assert re.search(expected, message) and "\n" not in message, message


def test_what_a_telephone_writes_is_one_page_and_a_listed_binary_too(form_collate, pages, tmp_path):
    collate = form_collate()
    for cell in ("telephone.jpg", [(tmp_path / "telephone.jpg").read_bytes()]):
        assert collate.messages_of(page(cell))[0]["content"][1]["image"].getpixel((5, 5))[0] > 240


@pytest.mark.parametrize("listed", [False, True])
def test_no_bytes_are_printed(listed, stops, write):
    cell = b"\x89PNG no"
    message = stops(dataset_name=write([page([cell] if listed else cell)] * 2, "rows.parquet"))
    assert "unreadable image: its bytes" in message and "x89" not in message


def test_no_answers_anywhere_is_a_matter_of_columns(stops, write, pages):
    message = stops(dataset_name=write([{"image": "red.png", "question": "q", "antwort": "47"}] * 2))
    assert re.search("(?s)2 of 2 rows.*no accepted answer.*--answers_column", message), message


def test_one_page_cannot_be_divided(stops, write, pages):
    for rows in ([GOOD], [GOOD] * 5):
        message = stops(dataset_name=write(rows), eval_fraction=0.1)
        assert (
            f"{len(rows)} rows cannot be divided" in message
            and "without an image in both" in message
            and "--eval_fraction" in message
        )


# ------------------------------------------------------------------------------------------- machine, flags, model
@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"lora_r": 0}, "--lora_r"),
        ({"lora_r": -1}, "--lora_r"),
        ({"max_eval_rows": 0}, "--max_eval_rows"),
        ({"max_length": 0}, "--max_length"),
        (
            {"eval_steps": 5, "save_steps": 10, "max_steps": 20},
            "--save_steps equal to --eval_steps.*--load_best_model_at_end false",
        ),
        ({"learning_rate": -1}, "--learning_rate"),
        ({"learning_rate": "nan"}, "--learning_rate"),
        ({"output_dir": "/proc/nowhere"}, "--output_dir /proc/nowhere cannot be written"),
        (
            {"metric_for_best_model": "rouge"},
            "--metric_for_best_model rouge: this recipe computes anls and exact_match and loss only",
        ),
        ({"report_to": "nonsense"}, "--report_to .*nonsense"),
        ({"report_to": "clearml"}, "--report_to .*clearml"),
        ({"push_to_hub": True}, "--push_to_hub"),
    ],
)
def test_flags_that_cannot_work(settings, expected, stops):
    assert re.search(expected, stops(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {
            "eval_fraction": 0,
            "lora_dropout": 0,
            "sample_rows": 0,
            "lora_r": 1,
            "max_length": 1,
            "max_eval_rows": 1,
            "max_new_tokens": 1,
        },
        {"metric_for_best_model": "eval_exact_match"},
        {"eval_steps": 5, "save_steps": 10, "load_best_model_at_end": False},
        {"metric_for_best_model": "loss"},
        {"metric_for_best_model": "rouge", "load_best_model_at_end": False},
        {"metric_for_best_model": "rouge", "eval_strategy": "no"},
        {"max_steps": 1},
    ],
)
def test_flags_that_can(settings, form_parse):
    recipe.check(*form_parse(**settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(stops):
    assert re.search("no GPU.*--use_cpu", stops(use_cpu=False))


@pytest.mark.parametrize("beyond", ["below", "above", "zero", "negative"])
def test_longest_edge_has_the_bounds_of_the_processor(beyond, stops, form_parse):
    size = idefics2.processor().image_processor.size
    least, most = size["shortest_edge"], size["longest_edge"]
    edge = {"below": least - 1, "above": most + 1, "zero": 0, "negative": -least}[beyond]
    message = stops(longest_edge=edge)
    assert f"--longest_edge {edge}:" in message and str(least) in message and str(most) in message
    for edge in (least, most):
        recipe.load_processor(form_parse(longest_edge=edge)[0])


def write_without_template(folder):
    processor = idefics2.processor()
    processor.chat_template = None
    processor.save_pretrained(folder)


def write_with_another_template(folder):
    processor = idefics2.processor()
    processor.chat_template = llava.CHAT_TEMPLATE
    processor.save_pretrained(folder)


def write_clip(folder):
    processor = llava.processor()
    CLIPProcessor(processor.image_processor, processor.tokenizer).save_pretrained(folder)


MODELS = {
    "nowhere": (lambda folder: None, "--model_name_or_path"),
    "empty": (lambda folder: folder.mkdir(), "--model_name_or_path"),
    "LLaVA": (
        lambda folder: llava.processor().save_pretrained(folder),
        "LlavaProcessor.*this needs an Idefics2Processor",
    ),
    "CLIP": (write_clip, "CLIPProcessor.*this needs an Idefics2Processor"),
    "no template": (
        write_without_template,
        f"Idefics2Processor.; this needs an Idefics2Processor whose chat template.*{END}",
    ),
    "another template": (
        write_with_another_template,
        f"Idefics2Processor.; this needs an Idefics2Processor whose chat template.*{END}",
    ),
    "images only": (
        lambda folder: idefics2.processor().image_processor.save_pretrained(folder),
        "ImageProcessor|--model_name_or_path",
    ),
    "texts only": (
        lambda folder: idefics2.processor().tokenizer.save_pretrained(folder),
        "Tokenizer|--model_name_or_path",
    ),
}


@pytest.mark.parametrize("create, expected", MODELS.values(), ids=MODELS)
def test_another_kind_of_model_is_refused(create, expected, stops, write, pages, tmp_path):
    create(tmp_path / "model")
    message = stops(model_name_or_path=tmp_path / "model", dataset_name=write([GOOD]))
    assert str(tmp_path / "model") in message and re.search(expected, message)


@pytest.mark.parametrize(
    "name, damage",
    [
        ("config.json", None),
        ("config.json", lambda whole: b"{"),
        ("model.safetensors", None),
        ("model.safetensors", lambda whole: whole[:-99]),
    ],
)
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_damaged_weights_are_one_message(load_in_4bit, name, damage, tiny_forms, form_flags, write, pages, tmp_path):
    shutil.copytree(tiny_forms / "model", tmp_path / "model")
    whole = (tmp_path / "model" / name).read_bytes()
    (tmp_path / "model" / name).unlink()
    if damage:
        (tmp_path / "model" / name).write_bytes(damage(whole))
    argv = form_flags(
        model_name_or_path=tmp_path / "model", dataset_name=write([GOOD]), eval_fraction=0, load_in_4bit=load_in_4bit
    )
    with pytest.raises(SystemExit, match=rf"^error: .*{tmp_path / 'model'}"):
        recipe.main(argv)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- the whole thing
def test_good_input_passes_every_check(form_flags, write, pages, monkeypatch, capsys):
    """The other side of this file: with the same machinery, good rows get as far as the weights."""
    monkeypatch.setattr(recipe, "load_model", lambda *args: (_ for _ in ()).throw(Loaded))
    with pytest.raises(Loaded):
        recipe.main(form_flags(dataset_name=write([GOOD, page("lime.png"), asks({"en": "Q", "de": ""}, "a", "b")])))
    assert f"What is the total?{END}\nAssistant:« 47{END}»" in capsys.readouterr().out


def test_a_program_that_fails_ends_with_the_message(form_flags, write, pages, tmp_path):
    argv = form_flags(dataset_name=write([GOOD, answered([" "])]), eval_fraction=0)
    done = subprocess.run(
        [sys.executable, str(ROOT / "idefics2_docvqa.py"), *argv], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr[done.stderr.rindex("error: ") :].splitlines()
    assert "1 of 2 rows" in last[0] and last[1].startswith("  row 1: empty answer") and "--on_bad_rows skip" in last[2]
    assert len(last) == 3 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "row", [asks("What\ud83d?", "47"), asks("What?", "47", "\udc00"), asks({"en": "\ud83d"}, "47")]
)
def test_half_a_character_is_not_dropped(row, stops, write, pages):
    assert re.search(
        r"cannot read .*row 1 has invalid Unicode .a lone surrogate.; fix",
        stops(dataset_name=write([GOOD, row, GOOD, row])),
    )


def test_a_page_that_changes_after_the_check(form_parse, write, images, tmp_path):
    names = images(3)
    settings = form_parse(dataset_name=write([GOOD, *(page(name) for name in names)]), eval_fraction=0)
    train, _ = load_data(recipe, *settings)
    (tmp_path / "lime.png").write_bytes(b"changed")
    collator = recipe.Collator(recipe.load_processor(settings[0]), *settings)
    collator([train[1], train[3]])
    with pytest.raises(recipe.BadRow, match="^unreadable image: .*lime.png"):
        collator([train[n] for n in range(4)])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_page_that_changes_under_the_run_ends_it_with_one_message(
    workers, form_flags, write, images, tmp_path, monkeypatch
):
    names, load_model = images(4), recipe.load_model

    def change_then_load(*args):
        (tmp_path / "lime.png").write_bytes(b"changed")
        return load_model(*args)

    monkeypatch.setattr(recipe, "load_model", change_then_load)
    options = {"load_in_4bit": False, "optim": "adamw_torch", "dataloader_num_workers": workers, "eval_fraction": 0}
    with pytest.raises(SystemExit) as end:
        recipe.main(form_flags(dataset_name=write([page(name) for name in names]), **options))
    assert re.fullmatch(r"error: the data changed during the run: unreadable image: .*lime\.png.*", end.value.code)
    assert not (tmp_path / "out" / "trainer_state.json").exists()
