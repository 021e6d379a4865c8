"""tiny/preferences.py: pairs tell a right answer from a wrong one, in the public schemas, and no picture of the tests was trained on."""

import filecmp
import functools
import json
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from evals import amber
from tiny import __main__ as command
from tiny import digits, idefics2, llava, preferences, report


@pytest.fixture(scope="module")
def proc():
    return preferences.processor()


def true_of(digit, question, answer):
    """Whether an answer is right about a picture of `digit`; read from the words, without what made them."""
    parity, number = ("even", "odd")[digit % 2], digits.WORDS[digit]
    words = answer.replace(",", "").replace(".", "").split()
    if answer in ("Yes", "No"):
        assert question.endswith("? Please answer yes or no.")
        about = question.split("?")[0].split()
        if about[:2] == ["Is", "there"]:
            fact = about[3] == number
        elif about[-1] in ("even", "odd"):
            fact = about[-1] == parity
        else:
            fact = digit > 4 if about[-2:] == ["than", "four"] else digit < 5
        return fact == (answer == "Yes")
    numbers, parities = set(words) & set(digits.WORDS), set(words) & {"even", "odd"}
    assert numbers or parities
    return numbers <= {number} and parities <= {parity}


@pytest.mark.parametrize("train", [True, False])
def test_chosen_is_right_and_rejected_is_wrong(train):
    _, truth = digits.load()
    rows = preferences.make_rows(0, train=train)
    for row in rows:
        digit = int(truth[row["scan"]])
        assert true_of(digit, row["question"], row["chosen"]), row
        assert not true_of(digit, row["question"], row["rejected"]), row
        assert preferences.judge(row["question"], row["chosen"], row["chosen"]) == (True, True)
        assert preferences.judge(row["question"], row["chosen"], row["rejected"]) == (False, True)
    kinds = Counter(preferences.KIND[row["question"]] for row in rows)
    assert set(kinds) == set(preferences.QUESTIONS)
    if not train:
        assert kinds == {"digit": 297, "describe": 297, "parity": 119, "existence": 60, "state": 59, "relation": 59}
    longer = np.mean([len(row["chosen"]) > len(row["rejected"]) for row in rows])
    shorter = np.mean([len(row["chosen"]) < len(row["rejected"]) for row in rows])
    assert 0.3 < longer < 0.6 and 0.3 < shorter < 0.6  # so length does not tell which is chosen
    said = Counter(row["chosen"] for row in rows if row["chosen"] in ("Yes", "No"))
    assert 0.4 < said["Yes"] / said.total() < 0.6


def test_no_held_out_scan_is_trained_on():
    for seed in (0, 1):
        parts = {name: set(part.tolist()) for name, part in digits.split(seed).items()}
        assert {row["scan"] for row in preferences.make_rows(seed)} <= parts["tune"]
        test, asked = preferences.make_rows(seed, train=False), preferences.make_amber(seed)
        assert {row["scan"] for row in test} == parts["held_out"] and {row["scan"] for row in asked} < parts[
            "held_out"
        ]
        assert not parts["held_out"] & (parts["tune"] | parts["base"])
    ink, _ = digits.load()
    assert all(torch.equal(row["picture"], digits.draw(ink[[row["scan"]]])[0]) for row in test[:20] + asked[:20])
    bent = [row["picture"].numpy().tobytes() for row in preferences.make_rows(0, n=300)]
    assert len(set(bent)) == 300
    kinds = {preferences.KIND[row["question"]] for row in preferences.make_rows(0, train=False, n=24)}
    assert kinds == set(preferences.QUESTIONS)


def test_the_published_schema(tmp_path):
    """Columns, order and types are those of the card of openbmb/RLAIF-V-Dataset, where all but the image are strings."""
    rows = preferences.make_rows(0, n=12)
    preferences.write_data(tmp_path, "train", rows)
    data = datasets.load_dataset("parquet", data_files=str(tmp_path / "data/train.parquet"), split="train")
    names = "ds_name image question chosen rejected origin_dataset origin_split idx image_path".split()
    assert data.column_names == names and data.features["image"] == datasets.Image()
    assert {data.features[name].dtype for name in names if name != "image"} == {"string"}
    own = json.loads((tmp_path / "json/train.json").read_text())
    for row, said, other in zip(rows, data, own, strict=True):
        picture = Image.open(tmp_path / "json/images" / other["image"])
        assert said["image"].size == picture.size == (56, 56) and said["image"].mode == picture.mode == "RGB"
        assert np.array_equal(np.asarray(said["image"]), np.asarray(picture))
        assert np.array_equal(np.asarray(picture)[:, :, 0], row["picture"].numpy())
        assert (
            set(other) == {"id", "image", "question", "chosen", "rejected"} and said["idx"] == other["id"] == row["id"]
        )
        assert all(said[part] == other[part] == row[part] for part in ("question", "chosen", "rejected"))
        assert json.loads(said["origin_split"])["type"] in ("detailed_description", "question_answering")


def test_the_questions_of_amber(tmp_path):
    _, truth = digits.load()
    rows = preferences.make_amber(0)
    preferences.write_amber(tmp_path, rows)
    asked = json.loads((tmp_path / "amber/query_discriminative.json").read_text())
    truths = json.loads((tmp_path / "amber/annotations.json").read_text())
    trained = {row["question"] for row in preferences.make_rows(0)}
    for n, (row, query, right) in enumerate(zip(rows, asked, truths, strict=True), 1):
        assert list(query) == ["id", "image", "query"] and list(right) == ["id", "type", "truth"]
        assert query["id"] == right["id"] == n
        picture = np.asarray(Image.open(tmp_path / "amber/image" / query["image"]))
        assert np.array_equal(picture[:, :, 0], row["picture"].numpy())
        question = query["query"] + " Please answer yes or no."
        assert true_of(int(truth[row["scan"]]), question, right["truth"].title())
        assert question in trained and amber.TYPES[right["type"]] == row["kind"]
        assert (right["type"] == "relation") == (row["kind"] == "relation" and right["truth"] == "no")
        assert row["kind"] != "existence" or right["truth"] == "no"
    assert len(rows) == 600 and len(list((tmp_path / "amber/image").iterdir())) == 120
    assert 0.64 < np.mean([right["truth"] == "no" for right in truths]) < 0.72
    assert len({(query["image"], query["query"]) for query in asked}) == 600


def test_the_base_can_say_every_answer_and_knows_none():
    rng = np.random.default_rng(0)
    taught = [preferences.lesson(digit, rng) for digit in rng.integers(10, size=8000).tolist()]
    questions = [(after, said) for before, after, said in taught if after in preferences.KIND and not before]
    assert 0.22 < len(questions) / len(taught) < 0.28
    assert set(preferences.KIND) == {question for question, _ in questions}
    for kind, known in preferences.FACT.items():
        said = {answer for question, answer in questions if preferences.KIND[question] == kind}
        at_odds = [
            sentence for sentence, fact in known.items() if kind == "describe" and fact["digit"] % 2 != fact["parity"]
        ]
        assert said == set(known) - set(at_odds)  # it never says "a seven, an even digit"
    agreed = [answer for _, answer in questions if answer in ("Yes", "No")]
    assert 0.7 < agreed.count("Yes") / len(agreed) < 0.8
    assert not set(preferences.KIND) & {after for _, after, _ in preferences.lessons(3, 4)}
    assert not set(preferences.KIND) & {
        text for texts in llava.QUESTIONS.values() for text in texts
    }  # a report tells them apart
    checks = [preferences.lessons(7, other)[2:] for other in (7, 8, 3)]
    assert [said for check in checks for _, _, said in check] == [
        *("Yes: a seven", "Yes: odd", "Yes: larger than four"),
        *("No: a seven", "No: odd", "Yes: larger than four"),
        *("No: a seven", "Yes: odd", "No: larger than four"),
    ]
    assert preferences.lessons(8, 8)[2][1:] == ("Check for an eight.", "Yes: an eight")


def test_what_is_trained_of_a_lesson(proc):
    rng = np.random.default_rng(0)
    said = [preferences.lessons(4, 8)[0], preferences.random_answer(rng)]
    ink, _ = digits.load()
    pictures = digits.draw(ink[:2])
    batch = idefics2.batch(proc, pictures, said)
    for ids, labels, (_, question, answer) in zip(batch["input_ids"], batch["labels"], said):
        assert proc.tokenizer.decode(labels[labels >= 0]).strip() == f"{answer}<end_of_utterance>"
        text = proc.tokenizer.decode(ids)
        assert "User:<fake_token_around_image><image>" in text.replace(" ", "")
        assert text.endswith(f"{question}<end_of_utterance>\nAssistant: {answer}<end_of_utterance>")
        assert ids.tolist().count(proc.image_token_id) == idefics2.LATENTS
    with idefics2.Unsplit(proc):
        images = [[digits.to_pil(picture)] for picture in pictures]
        assert torch.equal(
            proc(text=["<image>"] * 2, images=images, return_tensors="pt")["pixel_values"], batch["pixel_values"]
        )


def test_model_and_processor_survive_saving(tmp_path, proc):
    preferences.model(proc.tokenizer, seed=1).save_pretrained(tmp_path)
    proc.save_pretrained(tmp_path)
    saved, model = AutoProcessor.from_pretrained(tmp_path), AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(saved).__name__ == "Idefics2Processor" and type(model).__name__ == "Idefics2ForConditionalGeneration"
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 2e6 and model.config.text_config.model_type == "mistral"
    assert saved.chat_template == idefics2.CHAT_TEMPLATE and saved.image_seq_len == idefics2.LATENTS
    assert len(saved.tokenizer) == model.config.text_config.vocab_size
    assert saved.tokenizer.get_vocab() == proc.tokenizer.get_vocab()
    assert saved.tokenizer("four")["input_ids"][0] == saved.tokenizer.bos_token_id == 1
    for text in [*preferences.KIND, *preferences.FACT["describe"], "a größe 好"]:
        assert saved.tokenizer.decode(saved.tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text
    config = model.config.vision_config
    assert (config.image_size, config.patch_size) == (56, 14)


def test_a_build_is_reproducible(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preferences, "build", functools.partial(preferences.build, train_rows=64))  # of 3200
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        command.main(["idefics2_dpo", "--out", str(out), "--seed", "3", "--base_steps", "3"])
    files = sorted(
        path.relative_to(outs[0]) for path in outs[0].rglob("*") if path.is_file() and path.name != "built.json"
    )
    same, other, missing = filecmp.cmpfiles(*outs, files, shallow=False)
    assert len(same) == len(files) > 10 and not other and not missing
    assert {path.parts[0] for path in files} == {"model", "data", "json", "amber"}
    command.main(["idefics2_dpo", "--out", str(outs[0]), "--seed", "3", "--base_steps", "3"])
    assert "already" in capsys.readouterr().out
    assert preferences.make_rows(3, n=64)[5]["chosen"] and not torch.equal(
        preferences.make_rows(3, n=1)[0]["picture"], preferences.make_rows(4, n=1)[0]["picture"]
    )


def test_report_of_a_run_on_pairs(tmp_path, capsys):
    number, parity = preferences.QUESTIONS["digit"][1], preferences.QUESTIONS["parity"][0]
    there = "Is there an eight in this image? Please answer yes or no."
    long = "The digit in the image is an eight, written by hand."
    rows = [  # question, reference, before, after
        (number, "It is an eight.", "It is a three.", "It is an eight."),
        (number, long, long, "It is an eight."),  # right in other words
        (number, "It is an eight.", "It is a three.", "eight eight eight"),  # neither right nor readable
        (number, "It is an eight.", "It is even.", "It is an eight. "),
        (parity, "It is even.", "It is odd.", "The digit in the image is an even number."),
        (there, "Yes", "Yes", "No"),
        (there, "No", "Yes", "No"),
        (there, "No", "Yes.", "no"),  # not as AMBER wants it
    ]
    for name, which in (("before", 2), ("after", 3)):
        said = [
            {
                "row": n,
                "id": None,
                "turn": 0,
                "images": 1,
                "question": row[0],
                "reference": row[1],
                "prediction": row[which],
            }
            for n, row in enumerate(rows)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    log = [{"step": 1, "loss": 2.0, "rewards/accuracies": 0.5, "rewards/margins": 0.1}]
    log += [
        {"step": 2, "eval_loss": 1.0, "eval_rewards/accuracies": 0.9, "eval_rewards/margins": 0.4, "train_runtime": 3}
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert report.score_preferences(tmp_path / "before.jsonl") == {
        "digit": (1, 3, 4),
        "parity": (0, 1, 1),
        "existence": (1, 2, 3),
        "all": (2, 6, 8),
    }
    shares = report.report(tmp_path)
    assert shares == {"digit": (0.25, 0.75), "parity": (0, 1), "existence": (1 / 3, 1 / 3), "all": (0.25, 0.625)}
    table = capsys.readouterr().out
    assert "samples.md" not in table
    line = next(line for line in table.splitlines() if line.startswith("all"))
    assert line.split() == ["all", "8", "0.250", "0.625", "0.750", "0.750"]
    (tmp_path / "samples.md").touch()
    report.report(tmp_path)
    assert "samples.md" in capsys.readouterr().out
