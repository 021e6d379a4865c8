"""tiny/idefics2.py and tiny/forms.py: forms are real handwriting in the public schema, the model is a real Idefics2."""

import filecmp
import functools
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tiny import __main__ as command
from tiny import digits, forms, idefics2, report


@pytest.fixture(scope="module")
def proc():
    return idefics2.processor()


def scans(row):
    return [scan for field in row["form"]["fields"] for scan in field["scans"] or []]


def test_forms_show_what_the_answers_say():
    ink, truth = digits.load()
    for row in forms.make_rows(0, train=False, n=60):
        page = row["page"].numpy()
        for field in row["form"]["fields"]:
            top = field["line"] * forms.CELL
            if field["scans"]:
                assert "".join(str(int(truth[scan])) for scan in field["scans"]) == field["value"]
                for column, scan in enumerate(field["scans"], forms.VALUE):  # in every box lies the scan
                    box = page[top : top + forms.CELL, column * forms.CELL : (column + 1) * forms.CELL]
                    small = torch.nn.functional.adaptive_avg_pool2d(255 - torch.tensor(box.astype("float32"))[None], 8)
                    assert np.corrcoef(small.flatten(), ink[scan].flatten())[0, 1] > 0.8
            assert (page[top : top + forms.CELL, : forms.VALUE * forms.CELL] < 128).any()  # its name is printed
        assert forms.answers(row)[0] in [
            field["value"] for field in row["form"]["fields"] if field["name"] == row["asked"]
        ]
    line = forms.printed("City:")
    assert line.shape[0] == forms.CELL and line.min() < 64 and line.max() == 255


def test_what_is_tested_was_never_trained_on():
    new = forms.new_numbers(0)
    assert len(new) == 198 and new != forms.new_numbers(1)
    train, test = forms.make_rows(0, n=2000), forms.make_rows(0, train=False)
    parts = {name: set(part.tolist()) for name, part in digits.split(0).items()}
    assert {scan for row in train for scan in scans(row)} <= parts["tune"]
    assert {scan for row in test for scan in scans(row)} <= parts["held_out"]
    numbers = [{field["value"] for row in rows for field in row["form"]["fields"]} for rows in (train, test)]
    assert not numbers[0] & new
    kinds = [forms.kind(row["id"]) for row in test]
    assert {kind: kinds.count(kind) for kind in forms.KINDS} == {
        "one-field": 300,
        "new-number": 100,
        "printed": 60,
        "two-fields": 100,
    }
    assert {forms.kind(row["id"]) for row in train} == set(forms.KINDS) - {"new-number"}
    for row, kind in zip(test, kinds):
        fields = row["form"]["fields"]
        assert len(fields) == 1 + (kind == "two-fields") and all(
            (field["scans"] is None) == (kind == "printed") for field in fields
        )
        assert all((field["value"] in new) == (kind == "new-number") for field in fields)
        assert len({field["name"] for field in fields}) == len(fields)
    asked = {text for row in train for text in forms.ask(row["asked"], row["phrasing"]).values()}
    base = forms.Writer(0, digits.split(0)["base"], np.random.default_rng(0))
    words, some = idefics2.vocabulary(), [base.form(1 + n % 2, printed=0.3) for n in range(400)]
    taught = [idefics2.lesson(form, words, base.rng) for form in some]
    assert not {field["value"] for form in some for field in form["fields"]} & new
    assert not any(question in before + after for before, after, _ in taught for question in asked)
    assert all(": " in said for *_, said in taught)  # the base never says a value alone


def test_both_schemas_hold_the_same_rows(tmp_path):
    rows = forms.make_rows(0, train=False, n=24)
    forms.write_data(tmp_path, "test", rows)
    data = datasets.load_dataset("parquet", data_files=str(tmp_path / "data/test.parquet"), split="train")
    assert data.features == forms.FEATURES
    own = json.loads((tmp_path / "json/test.json").read_text())
    for row, said, other in zip(rows, data, own, strict=True):
        picture = Image.open(tmp_path / "json/images" / other["image"])
        assert said["image"].size == picture.size == (112, 56)
        assert np.array_equal(np.asarray(said["image"]), np.asarray(picture))
        assert np.array_equal(np.asarray(picture)[:, :, 0], row["page"].numpy())
        assert said["id"] == other["id"] == row["id"] and said["query"]["en"] == other["question"]
        assert said["answers"] == other["answers"] and len(set(said["query"].values())) == 5
        start = said["answer"]["start"]
        assert said["words"][start] == said["answer"]["text"] == said["answers"][0] == said["answer"]["matched_text"]
        assert said["words"][start - 1] == f"{row['asked']}:" and len(said["bounding_boxes"]) == len(said["words"])
        page = row["page"].numpy()
        for x0, y0, x1, y1 in said["bounding_boxes"]:  # there is ink in each, and they hold all of it
            x0, x1, y0, y1 = (round(edge * size) for edge, size in zip((x0, x1, y0, y1), (112, 112, 56, 56)))
            assert (page[y0:y1, x0:x1] < 128).any()
            page[y0:y1, x0:x1] = 255
        assert page.min() >= forms.GREY


def test_questions_are_in_five_languages():
    assert forms.ask("City", 0)["fr"] == "Quelle est la ville ?" and forms.ask("Month", 2)["fr"].endswith(
        "quel est le mois ?"
    )
    asked = [forms.ask(name, n) for name in forms.FIELDS for n in range(len(forms.QUESTIONS))]
    assert all(len({question[language] for question in asked}) == len(asked) for language in forms.LANGUAGES)
    assert not any("{" in text for question in asked for text in question.values())


def test_what_is_trained_of_a_lesson(proc):
    rng = np.random.default_rng(0)
    writer = forms.Writer(0, digits.split(0)["base"], rng)
    some = [writer.form(2), writer.form(1)]
    said = [idefics2.lessons(form)[-1] for form in some]
    pages = writer.draw(some, bend=True)
    batch = idefics2.batch(proc, pages, said)
    for ids, labels, (before, after, answer) in zip(batch["input_ids"], batch["labels"], said):
        assert proc.tokenizer.decode(labels[labels >= 0]).strip() == f"{answer}<end_of_utterance>"
        text = proc.tokenizer.decode(ids)
        assert text.endswith(f"Assistant: {answer}<end_of_utterance>") and before in text and f"> {after}<end" in text
        assert ids.tolist().count(proc.image_token_id) == idefics2.LATENTS
    with idefics2.Unsplit(proc):
        images = [[digits.to_pil(page)] for page in pages]
        asked = proc(text=["<image>"] * 2, images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(asked, batch["pixel_values"])  # no page is resized
    assert proc.image_processor.do_image_splitting


def test_model_and_processor_survive_saving(tiny_forms, proc):
    saved = AutoProcessor.from_pretrained(tiny_forms / "model")
    model = AutoModelForImageTextToText.from_pretrained(tiny_forms / "model")
    assert type(saved).__name__ == "Idefics2Processor" and type(model).__name__ == "Idefics2ForConditionalGeneration"
    assert saved.image_seq_len == idefics2.LATENTS == model.config.perceiver_config.resampler_n_latents
    assert saved.chat_template == proc.chat_template and saved.image_processor.do_image_splitting
    assert saved.image_token_id == model.config.image_token_id == saved.tokenizer.convert_tokens_to_ids("<image>")
    tokenizer = saved.tokenizer
    assert (
        tokenizer.get_vocab() == proc.tokenizer.get_vocab() and len(tokenizer) == model.config.text_config.vocab_size
    )
    assert tokenizer("four")["input_ids"][0] == tokenizer.bos_token_id == 1 and tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == [
        tokenizer.convert_tokens_to_ids("<end_of_utterance>"),
        tokenizer.eos_token_id,
    ]
    assert tokenizer.tokenize(" 471")[-3:] == ["4", "7", "1"]
    text = "Assistant: Total: 47, a größe 好"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_a_build_is_reproducible_and_cached(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(idefics2, "build", functools.partial(idefics2.build, train_rows=64))  # of 6400
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        command.main(["idefics2", "--out", str(out), "--seed", "3", "--base_steps", "4"])
    files = sorted(
        path.relative_to(outs[0]) for path in outs[0].rglob("*") if path.is_file() and path.name != "built.json"
    )
    same, other, missing = filecmp.cmpfiles(*outs, files, shallow=False)
    assert len(same) == len(files) > 10 and not other and not missing
    before = (outs[0] / "model/model.safetensors").stat().st_mtime_ns
    command.main(["idefics2", "--out", str(outs[0]), "--seed", "3", "--base_steps", "4"])
    assert "already" in capsys.readouterr().out and (outs[0] / "model/model.safetensors").stat().st_mtime_ns == before


def test_report_of_a_run_on_forms(tmp_path, capsys):
    rows = [
        ("one-field", "47", "47"),
        ("one-field", "47", "41"),
        ("new-number", "312", "7"),
        ("two-fields", "Rome", "rome"),
    ]
    for name in ("before", "after"):
        said = [
            {
                "row": n,
                "id": f"test-{n:05d}-{kind}",
                "reference": [right],
                "prediction": got if name == "after" else f"Total: {got}",
            }
            for n, (kind, right, got) in enumerate(rows)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    log = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "eval_loss": 1.0, "eval_anls": 0.5, "eval_exact_match": 0.4, "train_runtime": 3},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert report.report(tmp_path) == {"one-field": (0, 0.75), "new-number": (0, 0), "two-fields": (0, 1)}
    table = capsys.readouterr().out
    assert "ANLS" in table and "a number never seen" in table
