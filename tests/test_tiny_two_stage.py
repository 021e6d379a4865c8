"""tiny/two_stage.py: two models that know nothing of each other, and the captions and conversations to join them with."""

import filecmp
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tiny import __main__ as command
from tiny import digits, llava, report, two_stage


@pytest.fixture(scope="module")
def tok():
    return two_stage.tokenizer()


def scans(rows, among):
    """The numbers of the scans that unbent pictures were drawn from."""
    ink, _ = digits.load()
    drawn = {digits.draw(ink[scan : scan + 1])[0].numpy().tobytes(): scan for scan in among.tolist()}
    return [drawn.get(picture.numpy().tobytes()) for row in rows for picture in row["pictures"]]


def test_captions_say_what_the_pictures_show():
    _, truth = digits.load()
    parts = digits.split(0)
    rows = two_stage.make_captions(0, train=False)
    seen = scans(rows, parts["held_out"])
    assert sorted(seen) == sorted(parts["held_out"].tolist())
    for row, scan in zip(rows, seen, strict=True):
        (prompt, said), digit = row["turns"][0], int(truth[scan])
        assert (
            said == f"a handwritten {digits.WORDS[digit]}, an {'odd' if digit % 2 else 'even'} digit"
            and prompt in two_stage.PROMPTS
        )
    assert {row["turns"][0][0] for row in rows} == set(two_stage.PROMPTS)
    trained = two_stage.make_captions(0, n=500)
    assert len({row["pictures"][0].numpy().tobytes() for row in trained}) == 500  # each is bent anew
    assert len(two_stage.make_captions(0, train=False, n=5)) == 5


@pytest.mark.parametrize("rows", [two_stage.make_captions, two_stage.make_rows])
def test_training_shows_scans_for_fine_tuning_only(rows, monkeypatch):
    ink, truth = digits.load()
    shown = []
    monkeypatch.setattr(digits, "draw", lambda some, rng=None: shown.append(some) or some)
    made = rows(0, n=400)
    tune = {ink[scan].numpy().tobytes(): int(truth[scan]) for scan in digits.split(0)["tune"].tolist()}
    assert len(shown) == 1 and {scan.numpy().tobytes() for scan in shown[0]} <= set(tune)
    for row in made:
        labels = [tune[picture.numpy().tobytes()] for picture in row["pictures"]]
        for question, said in row["turns"]:
            assert said == (
                two_stage.caption(labels[0]) if question in two_stage.PROMPTS else llava.answer(question, labels)
            )


def test_questions_are_those_of_the_tiny_llava_on_one_picture():
    for train in (True, False):
        mine, all_of_them = two_stage.make_rows(1, train, 800), llava.make_rows(1, train, 800)
        assert [row["id"] for row in mine] == [row["id"] for row in all_of_them if len(row["pictures"]) < 2]
        assert {len(row["pictures"]) for row in mine} == {0, 1}
    single = [row for row in two_stage.make_rows(1, train=False) if len(row["pictures"]) == len(row["turns"]) == 1]
    assert len(single) == 3 * 297


def test_the_language_model_hears_of_no_picture():
    rng = np.random.default_rng(0)
    talks = [two_stage.talk(rng) for _ in range(400)]
    pictures = {question for kind in llava.ONE_PICTURE for question in llava.QUESTIONS[kind]}
    held_out = set(llava.text_questions(train=False))
    asked = set()
    for text in talks:
        assert text.startswith(f"{two_stage.SYSTEM} USER: ") and text.endswith("</s>") and "<image>" not in text
        turns = re.findall(r"USER: (.*?) ASSISTANT: (.*?)</s>", text)
        assert two_stage.chat(turns) == text and 1 <= len(turns) <= 2
        for question, said in turns:
            asked.add(question)
            if question.startswith("Count"):
                assert (question, said) in [llava.counting(n) for n in range(10)]
            else:
                assert said == llava.answer(question, [])
    assert asked > set(llava.text_questions()) and not asked & (held_out | pictures)
    assert len(held_out) == 10
    for text in {two_stage.lines(rng) for _ in range(200)}:
        said, name = sorted(text.splitlines(), key=len, reverse=True)
        assert two_stage.caption(digits.WORDS.index(name)) == said and text.endswith("\n")


def test_tokenizer_is_vicunas_in_small(tok, tmp_path):
    tok.save_pretrained(tmp_path)
    tok = AutoTokenizer.from_pretrained(tmp_path)
    assert (tok.pad_token, tok.bos_token, tok.eos_token) == ("<unk>", "<s>", "</s>") and tok.padding_side == "right"
    assert (tok.pad_token_id, tok.bos_token_id, tok.eos_token_id) == (0, 1, 2)
    assert "<image>" not in tok.get_vocab() and len(tok) == max(tok.get_vocab().values()) + 1
    text = "A größe 好, seven\nnine"
    assert tok.decode(tok(text).input_ids, skip_special_tokens=True) == text
    assert len(tok(two_stage.SYSTEM).input_ids) == 30  # BOS, and a token for every word
    ids = tok(two_stage.chat([("Which digit is this?", "seven"), ("Even or odd?", "odd")])).input_ids
    assert len(ids) == 30 + 21 and ids.count(tok.eos_token_id) == 2 and tok.bos_token_id not in ids[1:]
    captioned = tok(f"{two_stage.caption(7)}\n").input_ids
    assert tok.convert_ids_to_tokens(captioned)[1:] == [
        "▁a",
        "▁handwritten",
        "▁seven",
        ",",
        "▁an",
        "▁odd",
        "▁digit",
        "<0x0A>",
    ]


def test_the_tower_learns_at_the_layer_that_llava_takes():
    net = two_stage.vision(0)
    before = {name: p.clone() for name, p in net.named_parameters()}
    pictures = digits.draw(digits.load()[0][:4])
    with torch.no_grad():
        taken = two_stage.features(net, pictures)
        every = net(llava.pixels(pictures), output_hidden_states=True).hidden_states
    assert taken.shape == (4, 16, 128) and len(every) == 4 and torch.equal(taken, every[2][:, 1:])
    assert two_stage.train_vision(net, 0, steps=60) > 0.3  # of ten digits
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    above = {name for name in before if name.startswith(("encoder.layers.2.", "post_layernorm."))}
    assert moved.isdisjoint(above) and len(moved | above) == len(before) and not net.training


def test_the_language_model_learns(tok):
    net = two_stage.language(tok)
    said = tok([two_stage.talk(np.random.default_rng(n)) for n in range(8)], padding=True, return_tensors="pt")
    labels = said.input_ids.masked_fill(said.attention_mask == 0, -100)

    def loss():
        with torch.no_grad():
            return net(**said, labels=labels).loss.item()

    before = loss()
    assert before == pytest.approx(np.log(len(tok)), rel=0.05) and two_stage.text_accuracy(net, tok) == 0
    two_stage.train_language(net, tok, steps=15)
    assert loss() < before - 0.3 and not net.training


def test_a_build_is_reproducible_and_loads(tmp_path, capsys, monkeypatch):
    build = two_stage.build
    monkeypatch.setattr(two_stage, "build", lambda *args: build(*args, train_rows=64, caption_rows=48))
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        command.main(["llava_two_stage", "--out", str(out), "--seed", "3", "--base_steps", "3"])
    files = sorted(
        path.relative_to(outs[0]) for path in outs[0].rglob("*") if path.is_file() and path.name != "built.json"
    )
    same, other, missing = filecmp.cmpfiles(*outs, files, shallow=False)
    assert len(same) == len(files) > 400 and not other and not missing
    assert {path.parts[0] for path in files} == {"vision", "language", "json"}
    command.main(["llava_two_stage", "--out", str(outs[0]), "--seed", "3", "--base_steps", "3"])
    assert "already" in capsys.readouterr().out

    eyes, words = (
        AutoModel.from_pretrained(outs[0] / "vision"),
        AutoModelForCausalLM.from_pretrained(outs[0] / "language"),
    )
    assert (type(eyes).__name__, type(words).__name__) == ("CLIPVisionModel", "LlamaForCausalLM")
    assert (outs[0] / "vision/preprocessor_config.json").exists()
    tok = AutoTokenizer.from_pretrained(outs[0] / "language")
    assert words.config.vocab_size == len(tok) and words.generation_config.eos_token_id == tok.eos_token_id == 2
    pictures = digits.draw(digits.load()[0][:2])
    processed = AutoImageProcessor.from_pretrained(outs[0] / "vision", backend="pil")(
        [digits.to_pil(p) for p in pictures], return_tensors="pt"
    )
    assert torch.allclose(processed["pixel_values"], llava.pixels(pictures), atol=1e-6)

    sizes = {"train": None, "test": 961, "captions": 48, "captions-test": 297}
    names = []
    for name, n in sizes.items():
        rows = json.loads((outs[0] / "json" / f"{name}.json").read_text())
        assert n is None or len(rows) == n
        names += [row["image"] for row in rows if "image" in row]
        for row in rows:
            marks = [turn["value"].count("<image>") for turn in row["conversations"]]
            assert sum(marks) == marks[0] == ("image" in row) and [t["from"] for t in row["conversations"]][:2] == [
                "human",
                "gpt",
            ]
    assert {"id", "image", "conversations"} == set(rows[0]) and [turn["value"] for turn in rows[0]["conversations"]][
        0
    ] in two_stage.PROMPTS
    assert len(set(names)) == len(names) and set(names) == {path.name for path in (outs[0] / "json/images").iterdir()}
    assert all(Image.open(outs[0] / "json/images" / name).size == (56, 56) for name in names)


def test_report_of_a_two_stage_run(tmp_path, capsys):
    (run := tmp_path / "run").mkdir()
    for name in ("before", "after"):
        good = name == "after"
        asked = {
            name: [
                ("<image>\nRead the digit.", "four", "four" if good else ""),
                ("<image>\nEven or odd?", "odd", "even"),
            ],
            f"captions-{name}": [
                ("Describe the digit.\n<image>", two_stage.caption(n), two_stage.caption(n) * good) for n in range(3)
            ],
        }
        for file, rows in asked.items():
            said = [
                {
                    "row": n,
                    "id": f"x-{n}",
                    "turn": 0,
                    "images": 1,
                    "question": question,
                    "reference": right,
                    "prediction": got,
                }
                for n, (question, right, got) in enumerate(rows)
            ]
            (run / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.0}, {"step": 2, "train_runtime": 3}]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    expected = {"captions": (0, 1), "digit": (0, 1), "parity": (0, 0), "held out": (0, 0.5)}
    assert report.report(run) == expected
    table = capsys.readouterr().out
    assert re.search(r"captions, stage 1 +3 +0\.000 +1\.000", table) and re.search(
        r"all of these +2 +0\.000 +0\.500", table
    )
