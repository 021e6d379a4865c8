"""sft_llava.py and bad input: one message that names the row and the remedy, exit status 1, before any weights load."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import datasets
import pytest
import torch
from conftest import ROOT, Loaded, chat, load_data, said, stopped_by
from PIL import Image
from transformers import CLIPProcessor

import sft_llava
from tiny import llava

# A template that, as Mistral's does, raises where the turns do not take turns; and ends answers itself.
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '[INST] ' if m.role == 'user' else ' ' }}"
    "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
    "{{ ' [/INST]' if m.role == 'user' else '</s>' }}{% endfor %}"
)
GOOD = said("Which digit comes after two?", "three")
PART, IMAGE = {"type": "text", "text": "Which?"}, {"type": "image"}


@pytest.fixture
def stops(flags, monkeypatch):
    """A function: settings as keywords -> the message with which main() ends, before it loads any weights."""
    return stopped_by(sft_llava, flags, monkeypatch)


@pytest.fixture
def pictures(images, tmp_path):
    """Good pictures, red.png and blue.png, and three that are not."""
    images(3)
    jpeg = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(jpeg, "JPEG")
    (tmp_path / "truncated.jpg").write_bytes(jpeg.getvalue()[:-500])
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")


def asked(content="Which?", answer="three", **more):
    return chat(("user", content), ("assistant", answer), **more)


RED = {"images": ["red.png"]}
BAD_ROWS = {  # what is wrong: the row, what the message says
    "no column": (
        {"question": "q", "answer": "a"},
        "missing column: .*messages or conversations; this one has question, answer",
    ),
    "fewer markers": (
        said("<image>\nWhich?", "two", image=["red.png", "blue.png"]),
        "images do not match: 1 .*2 images",
    ),
    "more markers": (said("<image><image>", "two", image="red.png"), "images do not match: 2 .*1 images"),
    "marker without image": (said("<image>\nWhich?", "two"), "images do not match: 1 .*0 images"),
    "image without marker": (said("Which?", "two", image="red.png"), "images do not match: 0 .*1 images"),
    "index too large": (asked([{**IMAGE, "index": 1}], **RED), r"images do not match.*\[1\]"),
    "index below zero": (asked([{**IMAGE, "index": -1}], **RED), r"images do not match.*\[-1\]"),
    "index twice": (
        asked([{**IMAGE, "index": 0}] * 2, images=["red.png", "blue.png"]),
        r"images do not match.*\[0, 0\]",
    ),
    "index a word": (asked([{**IMAGE, "index": "0"}], **RED), r"images do not match|malformed row"),
    "indices of several types": (
        asked([IMAGE, {**IMAGE, "index": "x"}], images=["red.png"] * 2),
        "images do not match|malformed row",
    ),
    "index a list": (asked([{**IMAGE, "index": [0]}], **RED), "malformed row"),
    "index a fraction": (asked([{**IMAGE, "index": 0.5}], **RED), r"images do not match.*\[0.5\]"),
    "both formats": ({**said("Which?", "two"), **asked()}, "two formats: .*messages or conversations, not both"),
    "only a question": (said("Which?"), "no answer.*assistant"),
    "no turn": (said(), "no answer.*assistant"),
    "answer first": (
        chat(("assistant", "three"), ("user", "Which?"), ("assistant", "two")),
        "order of turns|begins with|first turn",
    ),
    "empty answer": (said("Which?", ""), "empty answer"),
    "blank answer": (said("Which?", "two", "And?", " \n\t"), "empty answer"),
    "answer of no parts": (asked(answer=[]), "empty answer"),
    "unknown role": (chat(("user", "q"), ("tool", "a")), "unknown role: 'tool'.*known are"),
    "image in an answer": (asked(answer=[IMAGE, PART], **RED), "image in a turn of the assistant"),
    "video": (asked([{"type": "video"}, PART]), "video|malformed row"),
    "content null": (asked(None), "malformed row"),
    "content a number": (asked(5), "malformed row"),
    "part a text": (asked(["Which?"]), "malformed row"),
    "part without type": (asked([{"text": "Which?"}]), "malformed row"),
    "text null": (asked([{"type": "text", "text": None}]), "malformed row"),
    "text a number": (asked([{"type": "text", "text": 5}]), "malformed row"),
    "value a number": (said("Which?", 3), r"malformed row: .*; turn 1 must be \{\"from\": ..., \"value\": ...\}"),
    "turn without value": ({"conversations": [{"from": "human"}, {"from": "gpt"}]}, "malformed row"),
    "turn null": ({"conversations": [None]}, "malformed row"),
    "turn a text": ({"messages": ["Which?", "three"], "images": []}, "malformed row"),
    "missing picture": (
        said("<image>", "two", image="nowhere.png"),
        "unreadable image: .*nowhere.png.*No such file.*--image_folder",
    ),
    "empty picture": (said("<image>", "two", image="empty.png"), "unreadable image: .*empty.png"),
    "moving picture": (said("<image>", "two", image="film.gif"), "several images: .*film.gif holds 2, "),
    "truncated picture": (
        said("<image>", "two", image="truncated.jpg"),
        "unreadable image: .*truncated.jpg.*truncated",
    ),
    "no picture": (said("<image>", "two", image="text.png"), "unreadable image: .*text.png"),
    "picture a folder": (said("<image>", "two", image="."), "unreadable image: .*directory"),
    "picture a number": (asked([IMAGE], images=[5]), "unreadable image: 5"),
    "picture null": (asked([IMAGE], images=[None]), "images do not match: 1 <image> .*, 0 images"),
    "picture of no known kind": (asked([IMAGE], images=[{"url": "x"}]), "images do not match: 1 <image> .*, 0 images"),
    "picture without bytes": (asked([IMAGE], images=[{"bytes": None}]), "images do not match: 1 <image> .*, 0 images"),
    "<image> in an answer": (said("Which?", "the <image>"), "control token: <image> "),
    "<image> in a message": (asked("the <image>"), "control token: <image> "),
    "</s> in a question": (said("Which</s>?", "two"), "control token: </s> "),
    "<s> in an answer": (said("Which?", "<s>two"), "control token: <s> "),
    "<pad> in a question": (said("<pad>", "two"), "control token: <pad> "),
    "</s> in a system message": (chat(("system", "</s>"), ("user", "q"), ("assistant", "a")), "control token: </s> "),
}


@pytest.mark.parametrize("row, expected", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_with_a_remedy(row, expected, stops, write, pictures):
    message = stops(dataset_name=write([GOOD, row, GOOD]))
    assert re.search(rf"\n  row 1: {expected}", message), message
    assert "row 0" not in message and "row 2" not in message and "--on_bad_rows skip" in message


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_bad_rows_of_other_files_and_with_ids(name, stops, write, pictures):
    rows = [
        said("<image>", "two", image=image, id=f"n{n}")
        for n, image in enumerate(["red.png", "text.png", "nowhere.png"])
    ]
    message = stops(dataset_name=write(rows, name))
    assert re.search(r"2 of 3 rows of .*rows\.\w+ .*\n  row 1 \(id n1\): .*\n  row 2 \(id n2\): ", message)


def test_embedded_pictures_that_are_none(stops, tmp_path):
    image = {"bytes": b"no picture", "path": "scan.png"}
    row = llava.to_messages({"turns": [("Which?", "two")], "pictures": []})
    row["messages"][0]["content"].append({"index": 0, "text": None, "type": "image"})
    table = {"messages": [row["messages"]] * 2, "images": [[image], [{**image, "path": None}]]}
    datasets.Dataset.from_dict(table, features=llava.FEATURES).to_parquet(tmp_path / "rows.parquet")
    message = stops(dataset_name=tmp_path / "rows.parquet")
    assert re.search(r"row 0: unreadable image: scan.png .*\n  row 1: unreadable image: its bytes ", message)


@pytest.mark.parametrize(
    "roles", [("user", "user", "assistant"), ("user", "assistant", "assistant"), ("system", "assistant")]
)
def test_an_order_of_turns_that_the_template_refuses(roles, stops, write, tmp_path):
    processor = llava.processor()
    processor.chat_template = ALTERNATING
    processor.save_pretrained(tmp_path / "model")
    rows = [GOOD, chat(*((role, "three") for role in roles))]
    message = stops(dataset_name=write(rows), model_name_or_path=tmp_path / "model")
    assert re.search(r"\n  row 1: order of turns: .*Conversation roles must alternate", message), message


def test_a_prompt_that_the_answer_changes_is_refused(stops, write, tmp_path):
    """No space between prompt and answer: "odd:" and "odd" + ":" are other tokens to the tokenizer than to the reader."""
    processor = llava.processor()
    turn = "{% for c in m.content %}{{ c.text }}{% endfor %}{% if m.role == 'assistant' %}</s>{% endif %}"
    processor.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    processor.save_pretrained(tmp_path / "model")
    rows = [said("Which digit", "?"), said("Which di", "git")]
    message = stops(dataset_name=write(rows), model_name_or_path=tmp_path / "model")
    assert "1 of 2" in message and re.search(
        r"\n  row 1: .*first characters change the tokens of the prompt", message
    ), message


# ------------------------------------------------------------------------------------------------------ skipping
def test_skipped_rows_are_counted_and_the_first_twenty_listed(parse, write, images, capsys):
    [red] = images(1)
    bad = [said("q", "") if n % 3 else said("q", "</s>") for n in range(24)]
    rows = [GOOD, *bad, said("<image>q", "two", image="nowhere.png"), said("<image>q", "two", image=red)]
    settings = parse(dataset_name=write(rows), on_bad_rows="skip", eval_fraction=0)
    train, _ = load_data(sft_llava, *settings)
    assert train["row"] == [0, 26]
    out = capsys.readouterr().out
    assert "25 of 27 rows" in out and all(
        reason in out for reason in ("empty answer", "control token", "unreadable image")
    )
    counts = dict(zip((16, 8, 1), ("empty answer", "control token", "unreadable image")))
    assert all(re.search(rf"\b{n} x {reason}|{reason}'?: {n}\b", out) for n, reason in counts.items())
    assert re.findall(r"\n  row (\d+)", out) == [str(n) for n in range(1, 21)] and "at most 20 shown" in out


def test_bad_rows_to_evaluate_on(stops, parse, write, capsys, tmp_path):
    (tmp_path / "data").mkdir()
    write([GOOD, GOOD], "data/train.json")
    write([GOOD, said("q", " "), GOOD], "data/test.json")
    assert re.search(r"1 of 3 rows .*\n  row 1: empty answer", stops(dataset_name=tmp_path / "data"))
    train, held_out = load_data(sft_llava, *parse(dataset_name=tmp_path / "data", on_bad_rows="skip"))
    assert len(train) == 2 and sorted(held_out["row"]) == [0, 2] and "row 1: empty answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row, settings, remedy, other",
    [
        (said("q", ""), {"on_bad_rows": "skip"}, "", "--max_length"),
        (GOOD, {"max_length": 5}, "--max_length", "--on_bad_rows"),
    ],
)
def test_no_row_is_left(row, settings, remedy, other, stops, write):
    message = stops(dataset_name=write([row] * 3), **settings)
    assert re.search("3 of 3 rows|no row of", message) and remedy in message and other not in message, message


def test_long_rows_do_not_hide_bad_ones(stops, write):
    message = stops(dataset_name=write([said("q", "two and " * 30)] * 25 + [said("q", "")]), max_length=30)
    assert "row 25: empty answer" in message, message


# --------------------------------------------------------------------------------------------------------- files
def empty_parquet(path):
    datasets.Dataset.from_dict({"messages": [], "images": []}).to_parquet(path)


EMPTY, UNREADABLE = "empty|no data|no rows", "cannot read"
FILES = {  # name, how to write it, what the message says beside its name
    "empty json": ("x.json", lambda path: path.write_text("[]"), EMPTY),
    "empty jsonl": ("x.jsonl", lambda path: path.write_text(""), EMPTY),
    "empty parquet": ("x.parquet", empty_parquet, EMPTY),
    "empty saved": ("x", lambda path: datasets.Dataset.from_dict({"messages": []}).save_to_disk(path), EMPTY),
    "empty folder": ("x", lambda path: path.mkdir(), UNREADABLE),
    "json cut off": ("x.json", lambda path: path.write_text(json.dumps([GOOD] * 9)[:-30]), UNREADABLE),
    "json with a slip": ("x.json", lambda path: path.write_text('[{"conversations": [}]'), UNREADABLE),
    "jsonl with a slip": (
        "x.jsonl",
        lambda path: path.write_text(json.dumps(GOOD) + '\n{"conversations": \n'),
        UNREADABLE,
    ),
    "json not in UTF-8": ("x.json", lambda path: path.write_bytes('[{"a": "é"}]'.encode("latin-1")), UNREADABLE),
    "half a character": (
        "x.json",
        lambda path: path.write_text(json.dumps([GOOD, said("Which\ud83d?", "two")])),
        r"row 1 has invalid Unicode .a lone surrogate.; fix",
    ),
    "nested without end": ("x.json", lambda path: path.write_text("[" * 100_000), "recursion"),
    "no parquet": ("x.parquet", lambda path: path.write_text("PAR1"), UNREADABLE),
    "nowhere.json": ("nowhere.json", lambda path: None, UNREADABLE),
    "nowhere.parquet": ("nowhere.parquet", lambda path: None, UNREADABLE),
    "nowhere": ("nowhere", lambda path: None, UNREADABLE),
}


@pytest.mark.parametrize("flag", ["dataset_name", "eval_dataset_name"])
@pytest.mark.parametrize("name, create, expected", FILES.values(), ids=FILES)
def test_a_data_set_that_cannot_be_read_is_named(name, create, expected, flag, stops, write, tmp_path):
    create(tmp_path / name)
    message = stops(**{"dataset_name": write([GOOD] * 2), flag: tmp_path / name})
    assert str(tmp_path / name) in message and re.search(expected, message), message


@pytest.mark.parametrize("flag", ["dataset_train_split", "dataset_test_split"])
def test_an_unknown_split_is_answered_with_the_known_ones(flag, stops, tiny_llava):
    assert re.search("no split 'dev'; it has train, test", stops(**{flag: "dev"}))


def test_one_row_cannot_be_divided(stops, write):
    assert (
        "1 rows cannot be divided" in (message := stops(dataset_name=write([GOOD]), eval_fraction=0.1))
        and "--eval_fraction 0" in message
    )


# ------------------------------------------------------------------------------------------- machine, flags, model
@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"lora_r": 0}, "--lora_r 0 .*4 bits.*--load_in_4bit false"),
        ({"lora_r": 0, "load_in_4bit": False, "use_dora": True}, "--use_dora .*--lora_r 0"),
        ({"max_eval_rows": 0}, "--max_eval_rows"),
        (
            {"eval_steps": 5, "save_steps": 10, "max_steps": 20},
            "--save_steps equal to --eval_steps.*--load_best_model_at_end false",
        ),
        ({"output_dir": "/proc/nowhere"}, "--output_dir /proc/nowhere cannot be written"),
        ({"report_to": "nonsense"}, "--report_to .*nonsense"),
        ({"report_to": "clearml"}, "--report_to .*clearml"),
        ({"push_to_hub": True}, "--push_to_hub"),
    ],
)
def test_flags_that_cannot_work_together(settings, expected, stops):
    assert re.search(expected, stops(**settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(stops):
    assert re.search("no GPU.*--use_cpu", stops(use_cpu=False))


def write_clip(folder):
    processor = llava.processor()
    CLIPProcessor(processor.image_processor, processor.tokenizer).save_pretrained(folder)


def write_without_template(folder):
    processor = llava.processor()
    processor.chat_template = None
    processor.save_pretrained(folder)


MODELS = {
    "nowhere": (lambda folder: None, "--model_name_or_path"),
    "empty": (lambda folder: folder.mkdir(), "--model_name_or_path"),
    "CLIP": (write_clip, "CLIPProcessor.*LLaVA-1.5"),
    "no template": (write_without_template, "LlavaProcessor.*template"),
    "images only": (
        lambda folder: llava.processor().image_processor.save_pretrained(folder),
        "ImageProcessor|--model_name_or_path",
    ),
    "texts only": (
        lambda folder: llava.processor().tokenizer.save_pretrained(folder),
        "Tokenizer|--model_name_or_path",
    ),
}


@pytest.mark.parametrize("create, expected", MODELS.values(), ids=MODELS)
def test_another_kind_of_model_is_refused(create, expected, stops, write, tmp_path):
    create(tmp_path / "model")
    message = stops(model_name_or_path=tmp_path / "model", dataset_name=write([GOOD]))
    assert str(tmp_path / "model") in message and re.search(expected, message)


# ------------------------------------------------------------------------------------------------- the whole thing
def test_good_input_passes_every_check(flags, write, monkeypatch):
    """The other side of this file: with the same machinery, good rows get as far as the weights."""
    monkeypatch.setattr(sft_llava, "load_model", lambda *args: (_ for _ in ()).throw(Loaded))
    with pytest.raises(Loaded):
        sft_llava.main(flags(dataset_name=write([GOOD] * 3)))


def test_a_program_that_fails_ends_with_the_message(flags, write, tmp_path):
    argv = flags(dataset_name=write([GOOD, said("q", "")]), eval_fraction=0)
    done = subprocess.run(
        [sys.executable, str(ROOT / "sft_llava.py"), *argv], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr[done.stderr.rindex("error: ") :].splitlines()
    assert "1 of 2 rows" in last[0] and last[1].startswith("  row 1: empty answer") and "--on_bad_rows skip" in last[2]
    assert len(last) == 3 and not os.path.exists(tmp_path / "out")


def test_half_a_character_is_not_dropped(stops, write, collate):
    broken = chat(("user", "Which\ud83d?"), ("assistant", "three"))
    assert re.search(r"row 1 has invalid Unicode .a lone surrogate.; fix", stops(dataset_name=write([GOOD, broken])))
    with pytest.raises(sft_llava.BadRow, match="malformed row: UnicodeEncodeError"):
        collate()([broken])


def test_a_picture_that_changes_after_the_check(collate, parse, write, images, tmp_path):
    names = images(3)
    settings = parse(
        dataset_name=write([GOOD, *(said("<image>q", "two", image=name) for name in names)]), eval_fraction=0
    )
    train, _ = load_data(sft_llava, *settings)
    (tmp_path / "lime.png").write_bytes(b"changed")
    collator = sft_llava.Collator(sft_llava.load_processor(settings[0]), *settings)
    collator([train[1], train[3]])
    with pytest.raises(sft_llava.BadRow, match="^unreadable image: .*lime.png"):
        collator([train[n] for n in range(4)])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_changes_under_the_run_ends_it_with_one_message(
    workers, flags, write, images, tmp_path, monkeypatch
):
    names, load_model = images(4), sft_llava.load_model

    def change_then_load(*args):
        (tmp_path / "lime.png").write_bytes(b"changed")
        return load_model(*args)

    monkeypatch.setattr(sft_llava, "load_model", change_then_load)
    path = write([said("<image>q", "two", image=name) for name in names])
    options = {"load_in_4bit": False, "optim": "adamw_torch", "dataloader_num_workers": workers}
    with pytest.raises(SystemExit) as end:
        sft_llava.main(flags(dataset_name=path, eval_fraction=0, **options))
    assert re.fullmatch(r"error: .*changed during the run: unreadable image: .*lime\.png.*", end.value.code)
    assert not (tmp_path / "out" / "trainer_state.json").exists()
    shutil.rmtree(tmp_path / "out")
