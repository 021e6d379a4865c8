"""Data too large to decode before training: what is checked then, what is checked later, and how a run goes on."""

import re
import shutil
from unittest import mock

import pytest
import torch
from conftest import ROOT, log
from PIL import ExifTags, Image, ImageFile
from recipes import chat, sequences
from safetensors.torch import load_file
from test_bad_rows import says, shows

from tools import inspect_recipe

GOOD = 14  # rows
RUN = {"max_steps": 7, "eval_steps": 1, "save_steps": 1, "save_total_limit": 9, "logging_steps": 1, "sample_rows": 0}
RUN |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "load_best_model_at_end": False}
RUN |= {"learning_rate": 1e-3, "eval_strategy": "no"}


@pytest.fixture
def large(case, monkeypatch):
    """A few rows are now too many to decode them all before training: the first two are, one by seed, the longest."""
    for name, value in (("MOST_SECONDS", 0), ("ROWS_TO_TIME", 2), ("ROWS_OF_A_SAMPLE", 1), ("LARGEST_ROWS", 1)):
        monkeypatch.setattr(case.module, name, value)
    return case


@pytest.fixture
def rows(case, images, tmp_path):
    """Rows with an answer of their own each, and pictures of four sizes; the second is the longest."""
    images(2)
    for n, size in enumerate([(56, 56), (90, 64), (64, 200), (300, 120)]):
        Image.new("RGB", size, (60 * n, 90, 10)).save(tmp_path / f"{n}.png")
    return [case.row(f"q{'?' * n}", "two " * (9 if n == 1 else 1 + n % 4), image=f"{n % 4}.png") for n in range(GOOD)]


def decoded(case, monkeypatch):
    """A list into which the numbers of all rows will go that the collator gets."""
    numbers, collate = [], case.module.Collator.__call__

    def note(self, rows):
        numbers.extend(row["row"] for row in rows if "row" in row)
        return collate(self, rows)

    monkeypatch.setattr(case.module.Collator, "__call__", note)
    return numbers


# ----------------------------------------------------------------------------------------------------- before training
def test_what_needs_no_decoding_is_found_in_every_row_before_training(large, rows, write, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (3000, 9)).save(tmp_path / "wide.png")
    rows += [shows(large, name) for name in ("nowhere.png", "empty.png", "text.png", "film.gif", "wide.png")]
    token = "<|im_end|>" if large.name == "finetune_minicpm_lora" else "</s>"
    rows += [says(large, " ", "two"), says(large, "q", token)]
    message = large.refusal(large.flags_for(write(rows)))
    reasons = "unreadable image|several frames|image too narrow|empty \\w+|control token|one answer"
    assert len(re.findall(f"\n  row {GOOD}: unreadable image: .*nowhere.png", message)) == 1
    assert re.findall(rf"\n  row (\d+): (?:{reasons})", message) == [str(GOOD + n) for n in range(7)], message


def test_only_a_sample_is_decoded_and_the_start_says_so(large, rows, write, monkeypatch, capsys):
    numbers = decoded(large, monkeypatch)
    settings, training = large.module.parse(large.flags_for(write(rows)))
    collator = large.module.Collator(large.module.load_processor(settings), settings, training)
    train, _ = large.module.load_data(settings, training, collator)
    assert len(train) == GOOD and {0, 1} <= set(numbers) and len(set(numbers)) <= 5
    said = capsys.readouterr().out
    assert re.search(rf": 1 of {GOOD} rows are decoded before training.*--check_rows all would take \d+ minutes", said)
    assert training.as_given["check_rows"] == "auto:1"


def test_lengths_are_upper_bounds(large, rows, write):
    """Close ones, also for rows other than those that the bound was fitted to."""
    collator = large.collator()
    train, _ = large.load_data(**{"dataset_name": write(rows), "image_folder": large.tmp_path, "eval_fraction": 0})
    lengths = [max(len(ids) for ids, _ in sequences(collator([row]))) for row in train]
    both = 40 if large.name == "dpo_idefics2" else 0  # of a pair both answers are counted
    for row, length in zip(train, lengths):
        assert length <= row["length"] <= 1.2 * length + 15 + both


@pytest.mark.parametrize("case", ["sft_llava"], indirect=True)
def test_text_beside_images_within_a_turn_counts(large, rows, write):
    parts = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "two " * 50}]
    rows = [chat(("user", parts), ("assistant", "two")) for _ in range(GOOD)]
    train, _ = large.load_data(dataset_name=write(rows), image_folder=large.tmp_path, eval_fraction=0)
    assert min(train["length"]) >= len(sequences(large.collator()([train[0]]))[0][0]) >= 50 + 16  # words, and an image


def test_only_the_header_of_an_image_is_read_for_its_size(case, tmp_path):
    """Of each kind of file, turned upright; an image of the caller's stays open."""
    picture, exif = Image.effect_noise((300, 200), 90), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name in ("a.jpg", "a.png", "a.webp", "a.tiff"):
        picture.save(tmp_path / name, exif=exif)
        content = (tmp_path / name).read_bytes()
        with mock.patch.object(ImageFile.ImageFile, "load", side_effect=AssertionError("pixels are decoded")):
            assert case.module.load_image(str(tmp_path / name), only_size=True) == (200, 300), name
            assert case.module.load_image({"bytes": content}, only_size=True) == (200, 300), name
    assert case.module.load_image(picture, only_size=True) == picture.size and picture.getpixel((0, 0)) is not None


def test_a_row_whose_bound_is_too_long_is_tokenized(large, rows, write, monkeypatch):
    lengths = [max(len(ids) for ids, _ in sequences(large.collator()([row]))) for row in rows]
    limit = {"finetune_minicpm_lora": "model_max_length", "llava_two_stage": "model_max_length"}
    longest = {limit.get(large.name, "max_length"): max(lengths) - 1}
    flags = {"dataset_name": write(rows), "image_folder": large.tmp_path, "eval_fraction": 0, **longest}
    train, _ = large.load_data(**flags)
    assert train["row"] == [n for n in range(GOOD) if lengths[n] < max(lengths)]


def test_rows_that_are_held_out_are_all_decoded(large, rows, write, monkeypatch):
    numbers = decoded(large, monkeypatch)
    flags = {"dataset_name": write(rows), "image_folder": large.tmp_path, "eval_fraction": 0.5}
    _, held_out = large.load_data(**flags)
    assert len(held_out) > 2 and set(held_out["row"]) <= set(numbers)


def test_all_rows_are_decoded_where_asked_for_and_then_never_again(large, rows, write, monkeypatch):
    numbers = decoded(large, monkeypatch)
    flags = {"dataset_name": write(rows), "image_folder": large.tmp_path, "eval_fraction": 0}
    large.load_data(**flags, check_rows="all")
    assert sorted(numbers) == list(range(GOOD))
    numbers.clear()
    large.load_data(**flags)  # auto takes what is known of all rows
    assert set(numbers) <= {0, 1}
    (large.tmp_path / "0.png").write_bytes(b"not a picture any more")
    with pytest.raises(SystemExit, match="row 0: unreadable image(?s:.*)row 4: unreadable image"):
        large.load_data(**flags, check_rows="all")


def test_what_the_report_before_a_run_has_decoded_is_not_decoded_again(large, rows, write, monkeypatch, capsys):
    rows[5] = shows(large, "nowhere.png")
    flags = {"dataset_name": write(rows), "image_folder": large.tmp_path, "eval_fraction": 0}
    report = [str(ROOT / f"{large.name}.py"), *large.flags(**flags), "--rows", "all", "--json"]
    with pytest.raises(SystemExit, match="1"):  # the run would stop at that row
        inspect_recipe.main(report)
    numbers = decoded(large, monkeypatch)
    with pytest.raises(SystemExit, match="1 of 14 rows(?s:.*)row 5: unreadable image"):
        large.load_data(**flags)
    assert set(numbers) <= {0, 1}  # which tell the time that it would take
    Image.new("RGB", (64, 64)).save(large.tmp_path / "nowhere.png")
    large.load_data(**flags, check_rows="all")
    assert set(numbers) == set(range(GOOD))


def test_a_number_of_rows_is_decoded_where_asked_for(large, rows, write, monkeypatch):
    numbers = decoded(large, monkeypatch)
    flags = {"dataset_name": write(rows), "image_folder": large.tmp_path, "eval_fraction": 0}
    large.load_data(**flags, check_rows=9)
    assert 9 <= len(set(numbers)) <= 12
    large.load_data(**flags, check_rows=GOOD)
    assert set(numbers) == set(range(GOOD))


@pytest.mark.parametrize("value", ["some", "0", "-3", "1.5", "auto:"])
def test_what_is_no_number_of_rows_is_refused(case, value):
    assert f"--check_rows {value}: it must be auto, all, or a number of rows" in case.refusal(
        case.flags(check_rows=value)
    )


# -------------------------------------------------------------------------------------------------------- in training
def with_bad_pictures(case, rows, write, numbers):
    """Rows of which those with these numbers have a picture whose header can be read, and whose pixels cannot."""
    for number in numbers:
        picture = case.tmp_path / f"bad{number}.jpg"
        Image.effect_noise((64, 64), 90).save(picture)
        picture.rename(case.tmp_path / f"right{number}.jpg")
        picture.write_bytes((case.tmp_path / f"right{number}.jpg").read_bytes()[:-500])
        rows[number] = case.row("q?", "two", image=picture.name)
    return write(rows)


def repair(case, numbers):
    for number in numbers:
        (case.tmp_path / f"right{number}.jpg").replace(case.tmp_path / f"bad{number}.jpg")


def flags_of(case, path, **settings):
    more = {"optim": "adamw_torch", "q_lora" if case.name == "finetune_minicpm_lora" else "load_in_4bit": False}
    if case.name == "llava_two_stage":
        more["group_by_modality_length"] = False
    return {"dataset_name": path, "image_folder": case.tmp_path, "eval_fraction": 0, **RUN, **more, **settings}


def weights(out):
    return load_file(next(out.glob("*model.safetensors")))


def assert_same_run(out, other):
    assert log(out) == log(other) and len(log(out)) == RUN["max_steps"]
    one, two = weights(out), weights(other)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stops_at_a_row_that_cannot_be_read_and_resumes_when_it_is_repaired(large, rows, write, workers):
    path = with_bad_pictures(large, rows, write, [5])
    stopped, whole = large.tmp_path / "stopped", large.tmp_path / "whole"
    flags = flags_of(large, path, dataloader_num_workers=workers)
    with pytest.raises(SystemExit) as end:
        large.run(**flags, output_dir=stopped)
    found = re.fullmatch(
        r"error: row 5 cannot be trained on: unreadable image: (?P<file>.*bad5\.jpg) .*truncated.*\n"
        r"(The checkpoint of step (?P<step>\d+) is saved|No step is done yet)\..*--on_bad_rows skip.*",
        end.value.code,
    )
    assert found, end.value.code
    checkpoints = sorted(int(path.name.rpartition("-")[2]) for path in stopped.glob("checkpoint-*"))
    assert checkpoints == list(range(1, int(found["step"] or 0) + 1)) and not (stopped / "trainer_state.json").exists()

    repair(large, [5])
    printed = large.run(**flags, output_dir=stopped)
    assert "resuming from" in printed or not checkpoints
    large.run(**flags, output_dir=whole)
    assert_same_run(stopped, whole)


def test_the_row_is_named_also_where_batches_are_pinned(large, rows, write, monkeypatch):
    """As for a GPU: that makes lists of tuples."""
    pin, collate = torch.utils.data._utils.pin_memory.pin_memory, large.module.ReadableRows.__call__

    def pinned(self, rows):
        batch = collate(self, rows)
        return batch | {"unreadable": pin(batch["unreadable"])} if "unreadable" in batch else batch

    monkeypatch.setattr(large.module.ReadableRows, "__call__", pinned)
    path = with_bad_pictures(large, rows, write, [5])
    with pytest.raises(SystemExit, match="^error: row 5 cannot be trained on: unreadable image"):
        large.run(**flags_of(large, path), output_dir=large.tmp_path / "out")


def test_bad_rows_are_no_trouble_where_not_one_good_row_is_left(large, rows, write, tmp_path):
    """As with an --image_folder that is not there."""
    flags = {"dataset_name": write(rows), "image_folder": tmp_path / "nowhere", "check_rows": 3}
    for on_bad_rows in ("stop", "skip"):
        with pytest.raises(SystemExit, match=f"^error: {GOOD} of {GOOD} rows of .*{GOOD} x unreadable image"):
            large.load_data(**flags, on_bad_rows=on_bad_rows)


def test_another_row_takes_the_place_of_one_that_cannot_be_read(large, rows, write):
    path = with_bad_pictures(large, rows, write, [5, 9])
    out, whole = large.tmp_path / "out", large.tmp_path / "whole"
    flags = flags_of(large, path, on_bad_rows="skip", dataloader_num_workers=1)
    printed = large.run(**flags, output_dir=whole)
    listed = r"2 rows could not be trained on.*\n  row 5: unreadable image: .*\n  row 9: unreadable image: "
    assert re.search(listed, printed) and f"{GOOD} rows to train on" in printed
    large.run(**flags, output_dir=out)
    (out / "trainer_state.json").unlink()  # as if it had been killed at step 5
    for step in range(6, RUN["max_steps"] + 1):
        shutil.rmtree(out / f"checkpoint-{step}")
    printed = large.run(**flags, output_dir=out)
    assert "checkpoint-5" in printed and re.search(listed, printed)
    assert_same_run(out, whole)


def test_a_run_that_stopped_goes_on_without_the_row_where_asked_for(large, rows, write):
    path = with_bad_pictures(large, rows, write, [5])
    flags = flags_of(large, path)
    with pytest.raises(SystemExit, match="row 5 cannot be trained on"):
        large.run(**flags, output_dir=large.tmp_path / "out")
    printed = large.run(**flags, output_dir=large.tmp_path / "out", on_bad_rows="skip")
    assert re.search(r"1 rows could not be trained on.*\n  row 5: ", printed)
    large.run(**flags, output_dir=large.tmp_path / "whole", on_bad_rows="skip")
    assert_same_run(large.tmp_path / "out", large.tmp_path / "whole")


def test_a_batch_keeps_its_number_of_rows(case):
    """Whatever it is made of; the same rows take the places of others again, and of several processes alike."""
    rows = [{"row": number} for number in range(20)]

    def collate(some):
        for row in some:
            if row["row"] % 3 == 0:
                raise case.module.BadRow("too bad", f"it is {row['row']}")
        return {"rows": [row["row"] for row in some]}

    readable = case.module.ReadableRows(collate, rows, seed=7)
    assert readable(rows[1:3]) == {"rows": [1, 2]}
    batch = readable(rows[2:5])
    assert batch["rows"][0] == 2 and batch["rows"][2] == 4 and batch["rows"][1] % 3 > 0
    assert batch["unreadable"][0] == (3, "too bad: it is 3")
    assert readable(rows[2:5]) == batch and readable(rows[3:4])["rows"] == batch["rows"][1:2]
