"""tiny/: what it builds is real, reproducible and disjoint; and a model learns from it."""

import filecmp
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from test_generate import generate, lines
from transformers import AutoModelForImageTextToText, AutoProcessor

import sft_llava
from tiny import __main__ as command
from tiny import digits, llava, report


def test_pictures_are_scans_in_disjoint_sets():
    ink, truth = digits.load()
    scans = load_digits()
    assert len(ink) == 1797 and truth.tolist() == scans.target.tolist()
    for seed in (0, 1):
        parts = {name: set(part.tolist()) for name, part in digits.split(seed).items()}
        assert {name: len(part) for name, part in parts.items()} == {"base": 900, "tune": 600, "held_out": 297}
        assert len(set().union(*parts.values())) == 1797
    assert set(digits.split(0)["held_out"].tolist()) != set(digits.split(1)["held_out"].tolist())
    flat = digits.draw(ink[:1])[0].float()  # ink is dark on white, where the scan has it
    small = torch.nn.functional.adaptive_avg_pool2d(255 - flat[None], 8).flatten()
    assert np.corrcoef(small, scans.images[0].ravel())[0, 1] > 0.95 and flat.max() == 255
    bent = digits.draw(ink[:1].repeat(8, 1, 1), np.random.default_rng(0))
    assert len({picture.numpy().tobytes() for picture in bent}) == 8


def test_rows_ask_what_the_pictures_show():
    _, truth = digits.load()
    parts = digits.split(0)
    for train in (True, False):
        rows = llava.make_rows(0, train=train, n=300)
        assert {len(row["pictures"]) for row in rows} == {0, 1, 2} and max(len(row["turns"]) for row in rows) == 3
    held_out = llava.make_rows(0, train=False)
    single = [row for row in held_out if len(row["pictures"]) == 1 and len(row["turns"]) == 1]
    assert len(single) == 3 * 297
    pictures = {
        digits.draw(digits.load()[0][scan : scan + 1])[0].numpy().tobytes(): scan
        for scan in parts["held_out"].tolist()
    }
    for row in single:
        digit = int(truth[pictures[row["pictures"][0].numpy().tobytes()]])
        question, said = row["turns"][0]
        right = {
            "digit": digits.WORDS[digit],
            "parity": ["even", "odd"][digit % 2],
            "next": digits.WORDS[(digit + 1) % 10],
        }
        assert said == right[llava.kind(question, 1)]
    asked = {turn for row in llava.make_rows(0, n=2000) for turn in row["turns"] if not row["pictures"]}
    assert asked and not asked & {turn for row in held_out for turn in row["turns"] if not row["pictures"]}


def test_both_schemas_hold_the_same_rows(tiny_llava):
    for name in ("train", "test"):
        rows = sft_llava.datasets.load_dataset(
            "parquet", data_files=str(tiny_llava / f"data/{name}.parquet"), split="train"
        )
        assert set(rows.column_names) == {"messages", "images"} and "Image(" in str(rows.features["images"])
        said = json.loads((tiny_llava / f"json/{name}.json").read_text())
        assert len(said) == len(rows)
        for row, other in zip(
            rows.cast_column("images", sft_llava.datasets.List(sft_llava.datasets.Image(decode=False))), said
        ):
            names = other.get("image", [])
            names = [names] if isinstance(names, str) else names
            assert [(tiny_llava / "json/images" / n).read_bytes() for n in names] == [
                cell["bytes"] for cell in row["images"]
            ]
            texts = [turn["value"].replace("<image>\n", "") for turn in other["conversations"]]
            assert texts == [sft_llava.text_of(message) for message in row["messages"]]
            assert all(Image.open(io.BytesIO(cell["bytes"])).size == (56, 56) for cell in row["images"])


def test_model_and_processor_survive_saving(tiny_llava, tiny_next):
    for folder, kind in ((tiny_llava, "Llava"), (tiny_next, "LlavaNext")):
        processor = AutoProcessor.from_pretrained(folder / "model")
        assert type(processor).__name__ == f"{kind}Processor"
        model = AutoModelForImageTextToText.from_pretrained(folder / "model")
        assert type(model).__name__ == f"{kind}ForConditionalGeneration"
        tokenizer = processor.tokenizer
        assert tokenizer("four")["input_ids"][0] == tokenizer.bos_token_id == 1 and tokenizer.eos_token_id == 2
        text = "ASSISTANT: four, a größe 好"
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
        assert tokenizer.convert_tokens_to_ids("<image>") == processor.image_token_id == model.config.image_token_id


def test_a_build_is_reproducible_and_cached(tmp_path, capsys):
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        command.main(["llava", "--out", str(out), "--seed", "3", "--base_steps", "2"])
    files = sorted(
        path.relative_to(outs[0]) for path in outs[0].rglob("*") if path.is_file() and path.name != "built.json"
    )
    same, other, missing = filecmp.cmpfiles(*outs, files, shallow=False)
    assert len(same) == len(files) > 10 and not other and not missing
    before = (outs[0] / "model/model.safetensors").stat().st_mtime_ns
    command.main(["llava", "--out", str(outs[0]), "--seed", "3", "--base_steps", "2"])
    assert "already" in capsys.readouterr().out and (outs[0] / "model/model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    with pytest.raises(SystemExit, match="^error: .*not overwritten"):
        command.main(["llava_next", "--out", str(tmp_path / "mine")])
    with pytest.raises(SystemExit) as e:
        command.main(["--help"])
    assert e.value.code == 0 and "handwritten" in capsys.readouterr().out


@pytest.mark.slow
def test_it_learns(tmp_path, capsys):
    """The whole way, with fewer steps than `make demo`: base, 4-bit + LoRA, held-out questions before and after."""
    tiny, run = tmp_path / "tiny", tmp_path / "run"
    command.main(["llava", "--out", str(tiny), "--base_steps", "900"])
    flags = f"""--use_cpu --model_name_or_path {tiny}/model --dataset_name {tiny}/data --output_dir {run} --max_steps 200
        --learning_rate 2e-3 --per_device_train_batch_size 32 --gradient_accumulation_steps 1 --sample_tokens 8
        --activation_checkpointing false --dataloader_num_workers 0"""
    sft_llava.main(flags.split())
    for name, more in (("before", ["--base_only"]), ("after", [])):
        data = ["--dataset_name", f"{tiny}/data", "--dataset_train_split", "test", "--output", f"{run}/{name}.jsonl"]
        generate.main([str(run), *data, *more, "--batch_size", "64", "--max_new_tokens", "16"])
    shares = report.report(run)
    table = capsys.readouterr().out
    answers = lines(run / "after.jsonl")
    print({kind: tuple(round(x, 3) for x in pair) for kind, pair in shares.items()})
    # the table's figures are the file's
    single = [x for x in answers if x["images"] == 1 and sum(y["row"] == x["row"] for y in answers) == 1]
    assert len(single) == 891 and sum(x["prediction"] == x["reference"] for x in single) / 891 == shares["held out"][1]
    assert re.search(rf"all of these +891 +0\.0\d\d +{shares['held out'][1]:.3f}", table)
    assert shares["held out"][0] <= 0.10 and shares["held out"][1] >= 0.85
    assert min(shares[kind][1] for kind in llava.ONE_PICTURE) >= 0.75 and shares["several turns"][1] >= 0.75
    assert (run / "samples.md").read_text().count("## Step") == 2
