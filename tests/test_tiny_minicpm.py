"""tiny/minicpm.py: pictures are real handwriting, rows are MiniCPM-V's own JSON, the models are real MiniCPM-V 4.6 and 4.7."""

import filecmp
import functools
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

from tiny import __main__ as command
from tiny import digits, minicpm, report

MARK = re.compile(r"<image(?:_\d\d)?>")
FAMILIES = list(minicpm.FAMILIES)


@pytest.fixture(scope="module")
def proc():
    return minicpm.processor()


def drawn(n=4):
    return digits.draw(digits.load()[0][:n])


def rows_of_all_sorts():
    """Rows of `batch` of all sorts: one picture, two digits in slices, none, two pictures."""
    some = drawn()
    long = "Which digits are these? Say it slowly, one after the other, and then once more."
    return [
        ([some[0]], "Which digit is this?", "zero"),
        ([minicpm.strip(some[:2])], long, "zero and one"),
        ([], "What follows four?", "five"),
        ([some[2], some[3]], "Which digits are these?", "two and three"),
    ]


def test_rows_ask_what_the_pictures_show():
    _, truth = digits.load()
    rows = minicpm.make_rows(0, train=False)
    shown = {picture.numpy().tobytes(): n for n, picture in enumerate(digits.draw(digits.load()[0]))}
    for row in rows:
        parts = [part for picture in row["pictures"] for line in picture.split(56) for part in line.split(56, 1)]
        assert [shown[part.numpy().tobytes()] for part in parts if part.min() < 255] == row["scans"]
        labels, kind = truth[row["scans"]].tolist(), minicpm.kind(row["id"])
        asked, said = row["turns"][-1]
        words = [digits.WORDS[n] for n in labels]
        assert len(parts) == {"strip": 2, "page": 4, "compared": 2, "later-picture": 2, "no-picture": 0}.get(kind, 1)
        if kind == "compared":
            assert said == (" and ".join(words) if "digits" in asked else words["second" in asked])
        elif kind in ("strip", "page"):
            assert said == " and ".join(words) and len(row["pictures"]) == 1
        elif kind == "later-picture":
            assert said == words[1] and "{1}" in asked and "{0}" in row["turns"][0][0]
        elif kind in ("which-digit", "even-or-odd", "next-digit"):
            right = {"w": words[0], "e": ["even", "odd"][labels[0] % 2], "n": digits.WORDS[(labels[0] + 1) % 10]}
            assert said == right[kind[0]] and len(row["turns"]) == 1
        elif kind == "no-picture":
            about = next(n for n, word in enumerate(digits.WORDS) if word in asked)
            assert said in (digits.WORDS[(about + 1) % 10], ["even", "odd"][about % 2]) and not row["pictures"]
        else:
            assert kind == "follow-ups" and len(row["turns"]) == 3 and len({answer for _, answer in row["turns"]}) == 3


def test_what_is_tested_was_never_trained_on():
    parts = {name: set(part.tolist()) for name, part in digits.split(0).items()}
    train, test = minicpm.make_rows(0, n=2000), minicpm.make_rows(0, train=False)
    assert {scan for row in train for scan in row["scans"]} <= parts["tune"]
    assert {scan for row in test for scan in row["scans"]} == parts["held_out"]
    kinds = [minicpm.kind(row["id"]) for row in test]
    counts = {"strip": 60, "page": 60, "compared": 100, "follow-ups": 60, "later-picture": 60, "no-picture": 10}
    assert {kind: kinds.count(kind) for kind in minicpm.KINDS} == dict.fromkeys(minicpm.ONE_PICTURE, 297) | counts
    for kind in minicpm.ONE_PICTURE:
        assert {scan for row in test if minicpm.kind(row["id"]) == kind for scan in row["scans"]} == parts["held_out"]
    assert {minicpm.kind(row["id"]) for row in train} == set(minicpm.KINDS)
    texts = [{turn for row in rows for turn in row["turns"] if not row["pictures"]} for rows in (train, test)]
    assert texts[0] and not texts[0] & texts[1]
    asked = {text for texts in minicpm.QUESTIONS.values() for text in texts}
    lessons = [lesson for n in range(10) for lesson in minicpm.lessons([n]) + minicpm.lessons([n, 9 - n], "strip")]
    said = {answer for row in train for _, answer in row["turns"]}
    assert not asked & {prompt for prompt, _ in lessons} and not said & {caption for _, caption in lessons}
    assert {word for answer in said for word in answer.split()} <= {
        word.strip(",") for _, caption in lessons for word in caption.split()
    }  # LoRA cannot teach a word whose output embedding was never trained


def test_json_is_the_official_schema(tmp_path):
    rows = minicpm.make_rows(0, n=60)
    minicpm.write_data(tmp_path, "train", rows)
    said = json.loads((tmp_path / "json/train.json").read_text())
    assert len({row["id"] for row in said}) == len(rows)
    for row, other in zip(rows, said, strict=True):
        image = other.get("image", {})
        image = {"<image>": image} if isinstance(image, str) else image
        contents = [turn["content"] for turn in other["conversations"]]
        assert [turn["role"] for turn in other["conversations"]] == ["user", "assistant"] * len(row["turns"])
        assert [mark for content in contents for mark in MARK.findall(content)] == list(image)  # each once, in order
        assert list(image) in ([], ["<image>"], ["<image_00>", "<image_01>"])
        for name, picture in zip(image.values(), row["pictures"], strict=True):
            assert np.array_equal(np.asarray(Image.open(tmp_path / "json/images" / name))[:, :, 0], picture.numpy())
        if minicpm.kind(row["id"]) == "later-picture":
            assert "<image_01>" in contents[2] and "<image_01>" not in contents[0]
    assert any("image" not in row for row in said)


def test_tokens_and_template(proc):
    tok = proc.tokenizer
    for token in minicpm.TOKENS:
        assert tok.tokenize(f"a{token}b") == ["a", token, "b"]
    assert (tok.bos_token, tok.eos_token, tok.pad_token, tok.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<unk>",
    )
    assert tok.tokenize("</think>\n\nfour") == ["</think>", "ĊĊ", "four"] and len(tok("\n")["input_ids"]) == 1
    assert tok("four")["input_ids"] == [tok.convert_tokens_to_ids("four")]  # no BOS
    assert tok.decode(tok("a größe 好")["input_ids"]) == "a größe 好"
    assert tok.decode(tok("<think>four<|im_end|>")["input_ids"], skip_special_tokens=True) == "<think>four"
    content = [{"type": "image"}, {"type": "text", "text": "Which digit is this? "}]
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": " four "}]},
        {"role": "user", "content": "<|image_pad|> vs <|image_pad|>: even?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nno"},
    ]
    first = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|image_pad|>\nWhich digit is this?<|im_end|>\n"
    )
    last = "<|im_start|>user\n<|image_pad|> vs <|image_pad|>: even?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    middle = "<|im_start|>assistant\nfour<|im_end|>\n"  # the think block stands before the last answer only
    assert proc.apply_chat_template(said) == f"{first}{middle}{last}hm\n</think>\n\nno<|im_end|>\n"
    assert proc.apply_chat_template(said[:4], add_generation_prompt=True) == f"{first}{middle}{last}\n</think>\n\n"
    assert (
        proc.apply_chat_template(said[:4], add_generation_prompt=True, enable_thinking=True)
        == f"{first}{middle}{last}"
    )
    said[4] = said[4] | {"content": "no"}
    assert proc.apply_chat_template(said).startswith(proc.apply_chat_template(said[:4], add_generation_prompt=True))
    again = said[:3] + said[1:3]  # the same question once more
    assert proc.apply_chat_template(again).count("<think>") == 1


def test_large_pictures_are_sliced(native_minicpm):
    proc = minicpm.processor_from(native_minicpm / "model")
    net = AutoModelForImageTextToText.from_pretrained(native_minicpm / "model")
    strip = digits.to_pil(minicpm.strip(drawn(2)))
    square = digits.to_pil(minicpm.page(drawn(1)[0], quarter=2))
    part = "<slice><|image_pad|></slice>"
    for mode, patches in (("16x", 16), ("4x", 4)):  # patches that become one token
        for image, most, slices in ((strip, 9, part * 2), (square, 9, f"{part * 2}\n{part * 2}"), (strip, 1, "")):
            inputs = proc(text=["<|image_pad|>\nfour"], images=[image], max_slice_nums=most, downsample_mode=mode)
            text = re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", proc.tokenizer.decode(inputs["input_ids"][0]))
            assert text == f"<image_id>0</image_id><image><|image_pad|></image>{slices}\nfour"
            sizes = inputs["target_sizes"]
            assert sizes[1:].tolist() == [[4, 4]] * slices.count("<slice>")  # in 4x, the whole may keep another shape
            assert (inputs["input_ids"] == proc.image_token_id).sum() == sizes.prod(1).sum() / patches
            with torch.no_grad():
                assert net(**inputs, downsample_mode=mode).logits.isfinite().all()
    with pytest.raises(ValueError, match="do not match"), torch.no_grad():
        net(
            **proc(text=["<|image_pad|>"], images=[digits.to_pil(drawn(1)[0])], downsample_mode="4x")
        )  # the model was not told
    inputs = proc(text=["<|image_pad|>"], images=[strip])
    halves = proc.image_processor([digits.to_pil(half) for half in drawn(2)], return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"][..., 16 * 14 :], halves)  # each slice is a digit, not resized


def test_what_is_trained_of_a_lesson(proc):
    batch = minicpm.batch(proc, rows_of_all_sorts())
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "target_sizes", "labels"}
    for ids, labels, mask, (pictures, prompt, said) in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], rows_of_all_sorts()
    ):
        assert proc.tokenizer.decode(labels[labels >= 0]) == f"{said}<|im_end|>"
        assert proc.tokenizer.decode(ids).endswith(
            f"{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n{said}<|im_end|>"
        )
        crops = sum(1 if picture.shape[1] == 56 else 3 for picture in pictures)
        assert (
            ids.tolist().count(proc.image_token_id) == crops
            and mask.sum() == (ids != proc.tokenizer.pad_token_id).sum()
        )


def test_model_and_processor_survive_saving(native_minicpm, proc, tmp_path, monkeypatch):
    saved = minicpm.processor_from(native_minicpm / "model")
    net = AutoModelForImageTextToText.from_pretrained(native_minicpm / "model")
    name = "MiniCPMV4_7" if "47" in native_minicpm.name else "MiniCPMV4_6"
    assert type(saved).__name__ == f"{name}Processor" and type(net).__name__ == f"{name}ForConditionalGeneration"
    monkeypatch.setattr(VIDEO_PROCESSOR_MAPPING, "_extra_content", {})  # what a recipe in this process registered
    with pytest.raises(ImportError, match="Torchvision"):  # when this no longer holds, processor_from can go
        AutoProcessor.from_pretrained(native_minicpm / "model")
    tok, config = saved.tokenizer, net.config
    assert tok.get_vocab() == proc.tokenizer.get_vocab() and len(tok) == config.text_config.vocab_size
    assert (
        saved.chat_template == minicpm.CHAT_TEMPLATE
        and saved.image_processor.to_dict() == proc.image_processor.to_dict()
    )
    saved.save_pretrained(tmp_path)
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    for file in files - {"tokenizer_config.json"}:  # it says, among others, whether it was read from a folder
        assert (tmp_path / file).read_text() == (native_minicpm / "model" / file).read_text()
    written = json.loads(
        (tmp_path / "processor_config.json").read_text()
    )  # what AutoProcessor goes by, with torchvision
    assert written["processor_class"] == f"{name}Processor" and written["image_processor"]["scale_resolution"] == 56
    assert written["video_processor"]["video_processor_type"] == "MiniCPMV4_6VideoProcessor"
    assert config.image_token_id == tok.convert_tokens_to_ids("<|image_pad|>") == saved.image_token_id
    if name == "MiniCPMV4_7":
        places = [
            config.image_start_id,
            config.image_end_id,
            config.slice_start_id,
            config.slice_end_id,
            config.newline_id,
        ]
        assert tok.convert_ids_to_tokens(places) == ["<image>", "</image>", "<slice>", "</slice>", "Ċ"]
    assert net.generation_config.eos_token_id == [tok.pad_token_id, tok.eos_token_id]
    assert net.lm_head.weight is net.model.language_model.embed_tokens.weight
    assert {part for part, _ in net.model.named_children()} == {"vision_tower", "merger", "language_model"}
    layers = net.model.language_model.layers
    assert config.text_config.layer_types == ["linear_attention", "full_attention"]
    linear = [{name for name, part in layer.named_modules() if isinstance(part, torch.nn.Linear)} for layer in layers]
    mlp = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert linear[0] == mlp | {
        f"linear_attn.{part}" for part in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
    }
    assert linear[1] == mlp | {f"self_attn.{part}_proj" for part in "qkvo"}
    assert sum(p.numel() for p in net.parameters()) < 1e6


def test_padding_and_neighbours_change_nothing(native_minicpm):
    """Linear attention has no mask to leave padding out with: the model zeroes it, where it gets an attention mask."""
    proc = minicpm.processor_from(native_minicpm / "model")
    net = AutoModelForImageTextToText.from_pretrained(native_minicpm / "model").eval()
    rows = rows_of_all_sorts()
    asked = {
        "do_sample": False,
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    together, prompts = minicpm.batch(proc, rows), minicpm.batch(proc, rows, answered=False)
    assert (together["attention_mask"] == 0).any()
    with torch.no_grad():
        logits = net(**together).logits
        said = net.generate(**prompts, **asked)
        losses = []
        for n, row in enumerate(rows):
            alone = net(**minicpm.batch(proc, [row]))
            assert torch.allclose(logits[n][together["attention_mask"][n] == 1], alone.logits[0], atol=1e-4)
            losses.append(alone.loss * (together["labels"][n] >= 0).sum())
            one = net.generate(**minicpm.batch(proc, [row], answered=False), **asked)
            assert said.sequences[n, -4:].tolist() == one.sequences[0, -4:].tolist()
            assert all(torch.allclose(a[n], b[0], atol=1e-4) for a, b in zip(said.logits, one.logits, strict=True))
        assert torch.allclose(net(**together).loss, sum(losses) / (together["labels"] >= 0).sum(), atol=1e-4)
        unmasked = net(**{name: value for name, value in together.items() if name != "attention_mask"}).logits
    assert (unmasked[0] - logits[0])[together["attention_mask"][0] == 1].abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_build_is_reproducible_and_cached(family, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(minicpm, "build", functools.partial(minicpm.build, train_rows=64))  # of 6400
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        command.main([family, "--out", str(out), "--seed", "3", "--base_steps", "3"])
    files = sorted(
        path.relative_to(outs[0]) for path in outs[0].rglob("*") if path.is_file() and path.name != "built.json"
    )
    same, other, missing = filecmp.cmpfiles(*outs, files, shallow=False)
    assert len(same) == len(files) > 10 and not other and not missing
    assert {path.parts[0] for path in files} == {"model", "json"}
    assert json.loads((outs[0] / "model/config.json").read_text())["model_type"] == family
    command.main([family, "--out", str(outs[0]), "--seed", "3", "--base_steps", "3"])
    assert "already" in capsys.readouterr().out


def test_report_of_a_run_on_conversations(tmp_path, capsys):
    rows = [
        ("which-digit", "four", "four"),
        ("which-digit", "four", "five"),
        ("next-digit", "six", "six "),
        ("strip", "one", "one"),
    ]
    rows += [("follow-ups", "odd", "odd"), ("follow-ups", "two", "three"), ("no-picture", "even", "even")]
    for name in ("before", "after"):
        said = [
            {
                "row": n,
                "id": f"test-{n:05d}-{kind}",
                "turn": 0,
                "images": 1,
                "question": "<image>\nWhich digit is this?",
            }
            | {"reference": right, "prediction": got if name == "after" else f"{got}, a handwritten digit"}
            for n, (kind, right, got) in enumerate(rows)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.0, "train_runtime": 3}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert report.score_conversations(tmp_path / "after.jsonl")["held out"] == (2, 3)
    after = {"which-digit": 0.5, "next-digit": 1, "held out": 2 / 3, "strip": 1, "follow-ups": 0.5, "no-picture": 1}
    assert report.report(tmp_path) == {kind: (0, share) for kind, share in after.items()}
    table = capsys.readouterr().out
    assert re.search(r"all of these +3 +0\.000 +0\.667", table) and "on a strip, 2 slices" in table
