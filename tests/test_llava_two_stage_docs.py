"""docs/llava_two_stage.md: its converter makes rows that the recipe takes, its table of rates is the recipe's."""

import json
import re

import pytest
from conftest import ROOT, load_data
from PIL import Image

import llava_two_stage

PAGE = (ROOT / "docs" / "llava_two_stage.md").read_text(encoding="utf-8")
ROW = {
    "question": "Which is heavier?",
    "choices": ["a feather", "a brick"],
    "answer": 1,
    "hint": "Look at the picture.",
    "lecture": "Mass is how much there is of a thing.",
    "solution": "A brick has more mass.",
    "image": None,
}


@pytest.fixture(scope="module")
def converter():
    """The page's own code."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "def to_llava" in block)
    names = {"__name__": "page"}
    exec(code, names)
    return names


def test_scienceqa_becomes_conversations(converter, stage_parse, tmp_path, capsys):
    picture = Image.new("RGB", (56, 56), "red")
    rows = [{**ROW, "image": picture}, {**ROW, "hint": "", "lecture": "", "solution": ""}]
    converter["convert"](rows, tmp_path / "scienceqa")
    settings, training = stage_parse(
        "instruct", data_path=tmp_path / "scienceqa" / "train.json", image_folder=None, eval_fraction=0
    )
    train, _ = load_data(llava_two_stage, settings, training)
    collator = llava_two_stage.Collator(llava_two_stage.load_processor(settings), settings, training)
    with_picture, without = (llava_two_stage.mark_trained_tokens(collator([row]), collator.processor) for row in train)
    context = "Context: Look at the picture. Mass is how much there is of a thing.\nOptions: (A) a feather (B) a brick ASSISTANT:"
    assert (
        f"USER: <image> x 16 \nWhich is heavier?\n{context}« A brick has more mass. The answer is B.</s>»"
        in with_picture
    )
    assert (
        "USER: Which is heavier?\nContext: N/A\nOptions: (A) a feather (B) a brick ASSISTANT:« The answer is B.</s>»"
        in without
    )


def test_the_table_of_both_stages_is_what_the_recipe_does(stage_flags):
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")
    ]
    said = {row[0]: row[1:4] for row in table if len(row) == 5}
    runs = [("align", {}), ("instruct", {}), ("instruct", {"lora_r": 128})]
    given = [
        ["--use_cpu", "--stage", stage, *(f"--{name}={value}" for name, value in more.items())] for stage, more in runs
    ]
    parsed = [llava_two_stage.parse(argv) for argv in given]
    rates = [[float(cell) for cell in said[f"learning rate, {part}"]] for part in ("language model", "projector")]
    assert rates == [
        [training.learning_rate for _, training in parsed],
        [settings.projector_learning_rate for settings, _ in parsed],
    ]
    rows = [t.per_device_train_batch_size * t.gradient_accumulation_steps for _, t in parsed]
    assert rows == [int(cell) for cell in said["rows in a step"]]
    assert [settings.image_aspect_ratio for settings, _ in parsed] == [
        cell.split()[0] for cell in said["`--image_aspect_ratio`"]
    ]
    assert said["adapter"][2] == f"r 128, alpha {parsed[2][0].lora_alpha}, dropout {parsed[2][0].lora_dropout}"
    for _, training in parsed:
        assert (
            training.num_train_epochs,
            training.lr_scheduler_type,
            training.warmup_steps,
            training.weight_decay,
        ) == (1, "cosine", 0.03, 0)


def test_the_rows_on_the_page_are_read(stage_parse, stage_collate, images, tmp_path):
    images(1)
    for name in ("sofa.jpg", "desk.jpg"):
        Image.open(tmp_path / "red.png").save(tmp_path / name)
    captions, conversations = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.S)]
    for stage, rows in (("align", captions), ("instruct", conversations)):
        collator = stage_collate(stage)
        assert (collator(rows)["labels"] != -100).any(1).all()
