"""tools/generate.py: the answers are the model's own, in batches or one by one, with and without the adapter."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, chat, load_data, said
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import idefics2_docvqa
import sft_llava
from evals import amber
from tiny import forms
from tools import generate


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(tiny, out, **settings):
    """A short run of the tiny LLaVA without 4-bit, 6 rows held out by the run itself; -> its folder."""
    short = {"use_cpu": True, "model_name_or_path": tiny / "model", "dataset_name": tiny / "data", "output_dir": out}
    short |= {
        "max_steps": 6,
        "learning_rate": 2e-2,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
    }
    short |= {
        "sample_rows": 0,
        "max_eval_rows": 6,
        "logging_steps": 1,
        "load_in_4bit": False,
        "dataloader_num_workers": 0,
    }
    settings = {**short, "report_to": "none", **settings}
    sft_llava.main([part for name, value in settings.items() for part in (f"--{name}", str(value))])
    return out


@pytest.fixture(scope="module")
def run(tiny_llava, tmp_path_factory):
    return train(tiny_llava, tmp_path_factory.mktemp("generate") / "run")


@pytest.fixture
def ask(tmp_path):
    """A function: arguments -> the lines that generate.py writes for them."""

    def make(*argv, name="out.jsonl"):
        generate.main([*map(str, argv), "--max_new_tokens", "6", "--output", str(tmp_path / name), "--overwrite"])
        return lines(tmp_path / name)

    return make


@pytest.fixture
def calls(monkeypatch):
    """What the model was given to answer, and what it said: (arguments, its new tokens) of each call."""
    seen = []

    def spy(self, *args, stock=transformers.GenerationMixin.generate, **kwargs):
        out = stock(self, *args, **kwargs)
        seen.append((kwargs, out[:, kwargs["input_ids"].shape[1] :]))
        return out

    monkeypatch.setattr(transformers.GenerationMixin, "generate", spy)
    return seen


def by_hand(model, processor, messages):
    batch = processor.apply_chat_template(
        [messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=6, max_length=None, do_sample=False)
    return processor.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("base_only", [False, True])
def test_answers_are_those_of_the_model(run, tiny_llava, ask, base_only):
    data = tiny_llava / "json" / "test.json"
    found = ask(run, "--dataset_name", data, "--image_folder", data.parent / "images", *["--base_only"] * base_only)
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava / "model")
    model = model if base_only else PeftModel.from_pretrained(model, run)
    processor, rows = AutoProcessor.from_pretrained(run), json.loads(data.read_text())
    assert [line["row"] for line in found] == [
        n for n, r in enumerate(rows) for _ in range(len(r["conversations"]) // 2)
    ]
    for line in found:
        row = rows[line["row"]]
        question, right = (row["conversations"][2 * line["turn"] + k]["value"] for k in (0, 1))
        names = [row.get("image", [])] if isinstance(row.get("image"), str) else row.get("image", [])
        assert (line["id"], line["images"], line["reference"]) == (row["id"], len(names), right)
        assert line["question"] == question.replace("<image>\n", "")
        if line["row"] % 4 == 0 or line["turn"]:
            turns = row["conversations"][: 2 * line["turn"] + 1]
            messages = sft_llava.normalize({"conversations": turns + [{"from": "gpt", "value": right}]})[:-1]
            for part in messages[0]["content"]:
                if part["type"] == "image":
                    part["image"] = sft_llava.load_image(str(data.parent / "images" / names[part["index"]]))
            assert line["prediction"] == by_hand(model, processor, messages)
    assert any(line["turn"] == 2 for line in found) and any(line["images"] == 0 for line in found)


def test_the_adapter_changes_answers_and_batches_do_not(run, tiny_llava, ask):
    data = ["--dataset_name", tiny_llava / "data", "--dataset_train_split", "test"]
    before, after = ask(run, *data, "--base_only"), ask(run, *data)
    assert [x["reference"] for x in before] == [x["reference"] for x in after]
    assert [x["prediction"] for x in before] != [x["prediction"] for x in after]
    assert ask(run, *data, "--batch_size", 1) == after
    assert ask(run, *data, "--batch_size", 64) == after
    assert ask(tiny_llava / "model", "--use_cpu", *data) == before  # any model that the recipe can load


def test_without_a_data_set_the_rows_that_the_run_held_out(run, ask, tiny_llava):
    settings, training = sft_llava.parse(["--config", str(run / "settings.yaml")])
    rows = load_data(sft_llava, settings, training)[1]["row"]
    assert list(dict.fromkeys(line["row"] for line in ask(run))) == list(rows)


def test_one_question(run, tiny_llava, capsys, ask, tmp_path):
    picture = next((tiny_llava / "json" / "images").glob("*.png"))
    question = ["--question", "Which digit is this?", "--image", picture, "--system", "Answer briefly."]
    line = ask(run, *question)[0]
    assert line["question"] == "Which digit is this?" and line["images"] == 1 and line["reference"] is None
    capsys.readouterr()
    generate.main([str(run), *map(str, question), "--max_new_tokens", "6"])
    assert capsys.readouterr().out.removesuffix("\n").endswith(line["prediction"])
    messages = [{"role": "system", "content": [{"type": "text", "text": "Answer briefly."}]}]
    content = [{"type": "image", "image": sft_llava.load_image(str(picture))}, {"type": "text", "text": question[1]}]
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny_llava / "model"), run)
    messages.append({"role": "user", "content": content})
    assert line["prediction"] == by_hand(model, AutoProcessor.from_pretrained(run), messages)


def test_it_stops_at_eos(run, tiny_llava, ask, monkeypatch):
    """A model made to say EOS first answers with nothing."""

    def silent(settings, training, load=sft_llava.load_model):
        model = load(settings, training)
        model.lm_head.weight.data.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
        model.lm_head.bias.data[model.generation_config.eos_token_id] = 1.0
        return model

    monkeypatch.setattr(generate, "load_recipe", lambda *_: sft_llava)
    monkeypatch.setattr(sft_llava, "load_model", silent)
    data = ["--dataset_name", tiny_llava / "data", "--dataset_train_split", "test"]
    assert {line["prediction"] for line in ask(run, *data)} == {""}


def test_sampling_differs_from_greedy(run, tiny_llava, ask):
    data = ["--dataset_name", tiny_llava / "data", "--dataset_train_split", "test"]
    assert [x["prediction"] for x in ask(run, *data, "--temperature", 5)] != [x["prediction"] for x in ask(run, *data)]


def test_questions_without_answers(run, tmp_path, ask):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [said("Is three odd?"), said("a", "b", "c")])))
    found = ask(run, "--dataset_name", tmp_path / "rows.jsonl")
    assert [(x["row"], x["question"], x["reference"]) for x in found] == [
        (0, "Is three odd?", None), (1, "a", "b"), (1, "c", None)]  # fmt: skip
    assert found[0]["prediction"] == ask(run, "--question", "Is three odd?")[0]["prediction"]


def test_a_text_after_every_question(run, tmp_path, ask, calls):
    """Of all turns, with the space between; after the words where a picture comes last, and of a picture alone."""
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    image = {"type": "image", "index": 0}
    after, alone = ([*text, image] for text in ([{"type": "text", "text": "Is it odd?"}], []))
    rows = [
        said("Is three odd?", "yes", "Is it six?", "no"),
        *(chat(("user", parts), images=["red.png"]) for parts in (after, alone)),
    ]
    (tmp_path / "rows.json").write_text(json.dumps([chat(("user", "Why?")), *rows[1:]]))
    (tmp_path / "turns.json").write_text(json.dumps(rows[:1]))
    tokenizer = AutoProcessor.from_pretrained(run).tokenizer
    typed = lambda: [
        tokenizer.decode(asked["input_ids"][0]).split("USER:", 1)[1].replace("<image>", "") for asked, _ in calls
    ]
    found = ask(run, "--dataset_name", tmp_path / "rows.json", "--append", "Yes or no?", "--batch_size", 1)
    assert [line["question"] for line in found] == ["Why? Yes or no?", "Is it odd? Yes or no?", "Yes or no?"]
    assert [" ".join(text.split()) for text in typed()] == [f"{line['question']} ASSISTANT:" for line in found]
    calls.clear()
    found = ask(run, "--dataset_name", tmp_path / "turns.json", "--append", "Yes or no?", "--batch_size", 1)
    assert [(line["question"], line["reference"]) for line in found] == [
        ("Is three odd? Yes or no?", "yes"),
        ("Is it six? Yes or no?", "no"),
    ]
    assert typed()[1].count("Yes or no?") == 2 and "yes Yes" not in typed()[1]
    one = ask(run, "--question", "Is three odd?", "--append", "Yes or no?")[0]
    assert (one["question"], one["prediction"]) == (found[0]["question"], found[0]["prediction"])


def test_a_checkpoint_is_of_its_run(tmp_path, tiny_forms, ask):
    """It has no settings.yaml: recipe, instruction and data are those of the run around it."""
    more = {
        "load_in_4bit": False,
        "instruction": "Answer in one word.",
        "dataset_name": tiny_forms / "data",
        "model_name_or_path": tiny_forms / "model",
        "image_splitting": False,
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "save_steps": 1,
        "eval_steps": 1,
        "sample_rows": 0,
        "max_eval_rows": 2,
        "eval_fraction": 0.1,
        "max_new_tokens": 4,
        "report_to": "none",
        "dataloader_num_workers": 0,
        "learning_rate": 2e-2,
        "load_best_model_at_end": False,
    }
    idefics2_docvqa.main(["--use_cpu", *(part for name, value in more.items() for part in (f"--{name}", str(value)))])
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not (checkpoint / "settings.yaml").exists()
    assert ask(checkpoint, name="one.jsonl") == ask(tmp_path / "run", name="two.jsonl")
    assert generate.load(idefics2_docvqa, checkpoint, [])[2].instruction == "Answer in one word."


# -------------------------------------------------------------------------------------------------------- resume
def begun(out, flags):
    """What stands beside a file that is not finished, begun with these flags and the fixture's own."""
    args, rest = generate.parse([*map(str, flags), "--max_new_tokens", "6", "--output", str(out), "--resume"])
    generate.record(out).write_text(json.dumps(generate.how(args, rest)))


@pytest.mark.parametrize(
    "change, message",
    [
        (["--base_only"], "base_only False -> True"),
        (["--max_new_tokens", "7"], "max_new_tokens 6 -> 7"),
        (["--temperature", "1"], "temperature 0.0 -> 1.0"),
        (["--batch_size", "3"], "batch_size 4 -> 3"),
        (["--append", "Be brief."], "is no answer to the question that would be asked there"),  # which says it earlier
        (["--load_in_4bit", "false"], r"flags \[.*'--load_in_4bit', 'false'\]"),
        ("run", "run /.*/run -> /.*/other"),
        ("again", r"written [\d.]+ -> [\d.]+"),
        ("unknown", "nobody knows how it was begun .half.jsonl.flags beside it is missing"),
        ("damaged", "nobody knows how it was begun"),
    ],
)
def test_a_file_is_not_gone_on_with_by_another_model_or_otherwise(
    run, tiny_llava, ask, tmp_path, monkeypatch, change, message
):
    flags = [
        run,
        "--dataset_name",
        tiny_llava / "json" / "test.json",
        "--image_folder",
        tiny_llava / "json" / "images",
        "--batch_size",
        "4",
    ]
    ask(*flags, name="whole.jsonl")
    (out := tmp_path / "half.jsonl").write_text(
        "".join((tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)[:6])
    )
    begun(out, flags)
    match change:
        case "run":
            flags[0] = shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoint-*"))
        case "again":  # the folder holds another adapter by now
            flags[0] = shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoint-*"))
            begun(out, flags)
            os.utime(flags[0] / "adapter_model.safetensors", (1, 1))
        case "unknown":
            generate.record(out).unlink()
        case "damaged":
            generate.record(out).write_text("{")
        case _:
            flags += change
    before = out.read_bytes()
    monkeypatch.setattr(sft_llava, "load_model", None)
    flags = [*map(str, flags), "--output", str(out), "--resume"]
    with pytest.raises(SystemExit, match=f"^error: --resume .*half.jsonl: .*{message}"):
        generate.main(flags if "--max_new_tokens" in flags else [*flags, "--max_new_tokens", "6"])
    assert out.read_bytes() == before


def test_a_file_says_how_it_was_begun(run, tiny_llava, ask, tmp_path, monkeypatch):
    stock, count = generate.answer, []

    def killed(*args):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return stock(*args)

    flags = [
        run,
        "--dataset_name",
        tiny_llava / "json" / "test.json",
        "--image_folder",
        tiny_llava / "json" / "images",
        "--batch_size",
        "4",
    ]
    whole = ask(*flags, name="whole.jsonl")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate, "answer", killed)
        ask(*flags, name="half.jsonl")
    assert len(lines(tmp_path / "half.jsonl")) == 8 and generate.record(tmp_path / "half.jsonl").exists()
    generate.main([*map(str, flags), "--max_new_tokens", "6", "--output", str(tmp_path / "half.jsonl"), "--resume"])
    assert lines(tmp_path / "half.jsonl") == whole
    for other in (
        ["--base_only"],
        ["--batch_size", "3"],
    ):  # it is finished now: these are still not that model's answers, or not asked for in that way
        with pytest.raises(SystemExit, match="half.jsonl: it was begun otherwise"):
            generate.main(
                [
                    *map(str, flags),
                    *other,
                    "--max_new_tokens",
                    "6",
                    "--output",
                    str(tmp_path / "half.jsonl"),
                    "--resume",
                ]
            )
    assert lines(tmp_path / "half.jsonl") == whole


@pytest.mark.parametrize("kept, cut", [(0, 0), (1, 30), (4, 0), (7, 12), (10, 1), (-1, 0), (-1, 5), (None, 0)])
def test_a_file_half_written_is_gone_on_with(run, tiny_llava, ask, tmp_path, calls, kept, cut):
    """After whole lines, and a part of one; the batches are the same, so are the answers. None: there is no file yet."""
    flags = [
        run,
        "--dataset_name",
        tiny_llava / "json" / "test.json",
        "--image_folder",
        tiny_llava / "json" / "images",
        "--batch_size",
        "4",
    ]
    whole = ask(*flags, name="whole.jsonl")
    text, out = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True), tmp_path / "half.jsonl"
    kept = len(text) + kept + (cut == 0) if (kept or 0) < 0 else kept  # -1: all of them, or all but the last
    if kept is not None:
        out.write_bytes(b"".join(text[:kept]) + (text[kept][:cut] if cut else b""))
        begun(out, flags)
    whole_calls = len(calls)
    calls.clear()
    generate.main([*map(str, flags), "--max_new_tokens", "6", "--output", str(out), "--resume"])
    assert out.read_bytes() == b"".join(text) and len(whole) == len(text) > 25
    assert generate.record(out).exists()
    left = 0 if kept == len(text) else len(text) - (kept or 0) // 4 * 4
    assert len(calls) == -(-left // 4) <= whole_calls


def test_a_file_begun_by_resume_can_be_resumed(run, tiny_llava, ask, tmp_path, monkeypatch):
    """As a script does that is started again and again."""
    flags = ["--dataset_name", tiny_llava / "data", "--dataset_train_split", "test", "--batch_size", "4"]
    whole, out, stock = ask(run, *flags), tmp_path / "again.jsonl", generate.answer
    again = lambda: generate.main(
        [*map(str, (run, *flags)), "--max_new_tokens", "6", "--output", str(out), "--resume"]
    )
    calls = iter(range(3))

    def killed(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return stock(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate, "answer", killed)
        again()
    assert len(lines(out)) == 8
    again()
    assert lines(out) == whole


def test_a_full_disk_is_said_and_gone_on_after(run, tiny_llava, ask, tmp_path, monkeypatch):
    flags = [
        "--dataset_name",
        tiny_llava / "data",
        "--dataset_train_split",
        "test",
        "--batch_size",
        "4",
        "--max_new_tokens",
        "6",
    ]
    whole, out, calls, stock = ask(run, *flags[:-2]), tmp_path / "full.jsonl", iter(range(9)), json.dumps

    def full(*args, **kwargs):
        if "ensure_ascii" in kwargs and next(calls) == 5:
            raise OSError(28, "No space left on device")
        return stock(*args, **kwargs)

    command = [*map(str, (run, *flags)), "--output", str(out)]
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            SystemExit, match="full.jsonl cannot be written, after 5 answers: No space left on device; .*--resume"
        ),
    ):
        patch.setattr(generate.json, "dumps", full)
        generate.main(command)
    generate.main([*command, "--resume"])
    assert lines(out) == whole


def test_the_bar_counts_rows(run, tiny_llava, ask, tmp_path, monkeypatch):
    """Those that are answered, of all; after a restart it begins where the file ended."""
    bars = []

    class Bar(generate.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.seen = [self.n]
            bars.append(self)

        def update(self, n=1):
            super().update(n)
            self.seen.append(self.n)

    monkeypatch.setattr(generate, "tqdm", Bar)
    flags = [
        run,
        "--dataset_name",
        tiny_llava / "json" / "test.json",
        "--image_folder",
        tiny_llava / "json" / "images",
        "--batch_size",
        "4",
    ]
    found = ask(*flags)
    over = [
        len({x["row"] for x in found[:n]}) - (n < len(found) and found[n]["row"] == found[n - 1]["row"])
        for n in range(0, len(found), 4)
    ]
    answering = lambda: next(bar for bar in reversed(bars) if bar.desc and bar.desc.startswith("Answering"))
    assert answering().total == 24 and answering().seen == [0, *over[1:], 24]
    text = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text("".join(text[:14]))
    begun(tmp_path / "out.jsonl", flags)
    generate.main([*map(str, flags), "--max_new_tokens", "6", "--output", str(tmp_path / "out.jsonl"), "--resume"])
    assert answering().seen == [over[3], *over[4:], 24]


def test_a_file_of_other_questions_is_not_gone_on_with(run, tiny_llava, ask, tmp_path, monkeypatch):
    data = ["--dataset_name", str(tiny_llava / "data"), "--dataset_train_split", "test"]
    ask(run, *data)
    text, out = (tmp_path / "out.jsonl").read_text(), tmp_path / "other.jsonl"
    monkeypatch.setattr(generate, "load_recipe", lambda *_: sft_llava)
    monkeypatch.setattr(sft_llava, "load_model", None)  # it is found before weights load
    rows = [json.loads(line) for line in text.splitlines()]
    other = json.dumps(rows[1] | {"question": "What is it?"})
    for start, line in (
        ("\n".join(text.splitlines()[:1] + [other]), 2),
        (text + text.splitlines()[0], len(rows) + 1),
        ("no json\n" + text, 1),
        ("[]\n", 1),
    ):
        out.write_text(start.removesuffix("\n") + "\n")
        with pytest.raises(SystemExit, match=f"^error: --resume .*other.jsonl: line {line} is no answer"):
            generate.main([str(run), *data, "--output", str(out), "--resume"])
        assert out.read_text() == start.removesuffix("\n") + "\n"
    with pytest.raises(SystemExit, match="^error: .*--resume it"):
        generate.main([str(run), *data, "--output", str(out)])


@pytest.mark.slow
def test_whole_models(tiny_llava, tmp_path, ask):
    """Trained in full, or merged: a folder without an adapter."""
    full = train(tiny_llava, tmp_path / "full", lora_r=0, learning_rate=1e-2)
    data = ["--dataset_name", tiny_llava / "data", "--dataset_train_split", "test"]
    found = ask(full, *data)
    model, processor = AutoModelForImageTextToText.from_pretrained(full), AutoProcessor.from_pretrained(full)
    row = sft_llava.datasets.load_dataset(
        "parquet", data_files=str(tiny_llava / "data" / "test.parquet"), split="train"
    )[0]
    messages = [{"role": "user", "content": [{"type": "image", "image": row["images"][0]}]}]
    messages[0]["content"].append({"type": "text", "text": row["messages"][0]["content"][0]["text"]})
    assert found[0]["prediction"] == by_hand(model, processor, messages)
    assert ask(full, *data, "--base_only") == ask(tiny_llava / "model", "--use_cpu", *data) != found
    adapter = train(tiny_llava, tmp_path / "adapter", train_projector=True)
    merged = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny_llava / "model"), adapter)
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoProcessor.from_pretrained(adapter).save_pretrained(tmp_path / "merged")
    assert ask(tmp_path / "merged", "--use_cpu", *data) == ask(adapter, *data)


def test_bad_rows_stop_it_before_weights_load_or_are_skipped(run, ask, tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "some.json", tmp_path / "none.jsonl"
    data.write_text(json.dumps([said("a", "b"), said("a", ""), said("c", "d"), *[said("a", "")] * 20]))
    answers = ask(run, "--dataset_name", data, "--on_bad_rows", "skip")
    assert [(line["row"], line["reference"]) for line in answers] == [(0, "b"), (2, "d")]
    printed = capsys.readouterr().err
    assert "left out: 21 of 23 rows" in printed and printed.count("empty answer") == 20 and "... and 1 more" in printed
    monkeypatch.setattr(generate, "load_recipe", lambda *_: sft_llava)
    monkeypatch.setattr(sft_llava, "load_model", None)
    for rows, more in ((range(23), []), ([1], ["--on_bad_rows", "skip"])):
        data.write_text(json.dumps([json.loads(json.dumps(said("a", "b" * (n in (0, 2))))) for n in rows]))
        with pytest.raises(SystemExit, match="row 1: empty answer" if not more else "No row would be left"):
            generate.main([str(run), "--dataset_name", str(data), "--output", str(out), *more])
        assert not out.exists()


def test_flags_may_have_dashes(run, ask, tmp_path):
    """The recipe's own parser takes them: they must not mean something else here."""
    (tmp_path / "own.json").write_text(json.dumps([said("Is three odd?", "odd"), said("Is four odd?", "even")]))
    assert ask(run, "--dataset-name", tmp_path / "own.json") == ask(run, "--dataset_name", tmp_path / "own.json") != []
    assert generate.underscored(["--a-b=c-d", "--use-cpu", "-1", "a-b", "--x_y"]) == [
        "--a_b=c-d",
        "--use_cpu",
        "-1",
        "a-b",
        "--x_y",
    ]


def test_what_leaves_no_room_for_an_answer_is_found_before_weights_load(run, ask, tmp_path, monkeypatch, capsys):
    (tmp_path / "long.json").write_text(
        json.dumps([said("Is three odd?", "odd"), said("odd " * 1200, "odd", "And?", "even")])
    )
    assert [line["row"] for line in ask(run, "--dataset_name", tmp_path / "long.json", "--on_bad_rows", "skip")] == [0]
    assert "row 1: too long: " in capsys.readouterr().err
    monkeypatch.setattr(generate, "load_recipe", lambda *_: sft_llava)
    monkeypatch.setattr(sft_llava, "load_model", None)
    for argv in (
        ["--dataset_name", str(tmp_path / "long.json")],
        ["--question", "odd " * 1200],
        ["--question", "odd?", "--append", "odd " * 1200],
    ):
        with pytest.raises(
            SystemExit, match=r"too long: \d+ tokens with its pictures, and the model reads 1024 with its answer"
        ):
            generate.main([str(run), *argv])


def test_a_recipe_is_loaded_once(run, tmp_path):
    """What is sent to other processes must be the functions of the module that has the name."""
    one = generate.load_recipe(ROOT / "sft_llava.py", run)
    assert generate.load_recipe(None, run) is one is sys.modules["recipe_sft_llava"]
    (tmp_path / "sft_llava.py").write_text((ROOT / "sft_llava.py").read_text())
    other = generate.load_recipe(tmp_path / "sft_llava.py", run)
    assert other is not one and other.__file__ == str(tmp_path / "sft_llava.py")
    for text in ("import sys; sys.exit(3)", "1 / 0"):
        (tmp_path / "ends.py").write_text(text)
        with pytest.raises(SystemExit, match="^error: .*ends.py cannot be imported as a recipe: "):
            generate.load_recipe(tmp_path / "ends.py", run)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["nowhere", "--question", "x", "--use_cpu"], "nowhere"),
        (["RUN", "--image", "x.png"], "--question"),
        (["RUN", "--image", "x.png", "--question", "x"], "x.png"),
        (["RUN", "--output", "TAKEN"], "--overwrite"),
        (["RUN", "--resume"], "an --output"),
        (["RUN", "--output", "TAKEN", "--resume", "--overwrite"], "one of them"),
        (["RUN", "--recipe", "no.py"], "no.py"),
        (["RUN", "--datset_name", "x"], "--datset_name"),
        (["RUN", "--dataset_name", "BAD"], "row 1: empty answer"),
        (["RUN", "--dataset_name", "BAD", "--question", "x"], "one of them"),
        (["RUN", "--question", " "], "blank"),
        (["RUN", "--question", "<image> x"], "<image> in --question"),
        (["RUN", "--question", "x", "--system", "<image>"], "<image> in --system"),
        (["RUN", "--question", "x", "--append", "<image>"], "<image> in --append"),
        (["RUN", "--append", "now </s>"], "</s> in --append"),
        (["RUN", "--append", " "], "--append is blank"),
        (["RUN", "--dataset_name", "AMBER"], "row 0: missing column: a row needs messages or conversations"),
        (["RUN", "--dataset_name", "AMBER", "--question_column", "query"], "--question_column"),
        (["RUN", "--question", "x", "--batch_size", "0"], "--batch_size"),
        (["RUN", "--question", "x", "--output", "nowhere/x.jsonl"], "no such folder"),
        (["RUN", "--question", "x", "--model_name_or_path", "nowhere"], "cannot load nowhere"),
        (["nowhere", "--question", "x", "--use_cpu"], "there is no such folder, and as a model of the hub: "),
        (["RUN", "--question", "x", "--output", "FOLDER", "--overwrite"], "is a folder: needed is the .jsonl"),
        (["RUN", "--question", "x", "--recipe", "FOLDER"], "it is a folder; needed is a recipe"),
        (["RUN", "--question", "x", "--recipe", "README"], "is no Python file; needed is a recipe"),
        (["RUN", "--question", "x", "--recipe", str(ROOT / "idefics2_docvqa.py")], "is of sft_llava.py, and "),
        (
            ["RUN", "--question", "x", "--model-name-or-path", "RUN"],
            "is an adapter itself; needed is the model beneath",
        ),
        (["RUN", "--question", "x", "--temperature", "inf"], "--temperature 0 or more"),
        (["RUN", "--question", "x", "--dataset-name", "BAD"], "--question and a data set: one of them"),
    ],
)
def test_mistakes_get_one_message(run, tmp_path, argv, message):
    (tmp_path / "TAKEN").write_text("")
    (tmp_path / "BAD.json").write_text(json.dumps([said("a", "b"), said("a", "")]))
    (tmp_path / "AMBER.json").write_text(
        json.dumps([{"id": 1005, "image": "AMBER_1.jpg", "query": "Is the sky sunny in this image?"}])
    )
    (tmp_path / "FOLDER").mkdir()
    names = {"FOLDER": tmp_path / "FOLDER", "README": ROOT / "README.md"}
    names |= {"RUN": run, "TAKEN": tmp_path / "TAKEN", "BAD": tmp_path / "BAD.json", "AMBER": tmp_path / "AMBER.json"}
    with pytest.raises(SystemExit) as e:
        generate.main([str(names.get(word, word)) for word in argv])
    assert str(e.value.code).startswith("error: ") and message in e.value.code


def cut(path, size=200):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    "change, flags, message",
    [
        (lambda run: (run / "adapter_model.safetensors").unlink(), [], "holds an adapter without its weights"),
        (
            lambda run: cut(run / "adapter_model.safetensors"),
            [],
            "adapter_model.safetensors is damaged, or cannot be read",
        ),
        (lambda run: cut(run / "adapter_config.json", 40), [], "its adapter_config.json is damaged (JSONDecodeError"),
        (
            lambda run: (run / "adapter_config.json").write_text("[]"),
            [],
            "its adapter_config.json is damaged (TypeError",
        ),
        (lambda run: (run / "processor_config.json").unlink(), [], "holds no processor (processor_config.json)"),
        (lambda run: (run / "settings.yaml").write_bytes(b"\xff\xfe# sft"), [], "settings.yaml cannot be read: "),
        (
            lambda run: (run / "adapter_config.json").unlink(),
            [],
            "holds no adapter (adapter_config.json) and no model (config.json); needed is",
        ),
        (
            lambda run: (run / "adapter_config.json").rename(run / "checkpoint-6"),
            [],
            "but checkpoints: the same training command finishes it",
        ),
        (
            None,
            ["--model_name_or_path", "NEXT"],
            "does not fit NEXT: that is a llava_next, and the run has a LlavaProcessor",
        ),
    ],
)
def test_what_is_no_whole_run_is_said(run, tiny_next, tmp_path, capsys, change, flags, message):
    shutil.copytree(run, out := tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    if change:
        change(out)
    names = {"NEXT": str(tiny_next / "model")}
    with pytest.raises(SystemExit) as e:
        generate.main([str(out), "--question", "Is three odd?", *(names.get(flag, flag) for flag in flags)])
    assert str(e.value.code).startswith("error: ") and message.replace("NEXT", names["NEXT"]) in e.value.code


def test_an_adapter_of_other_layers_is_not_half_put_on(run, tmp_path):
    """PEFT would warn of weights that it has no place for, and answer with the rest."""
    shutil.copytree(run, out := tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": config["target_modules"].replace("q|k|v", "q|k")})
    )
    with pytest.raises(
        SystemExit, match=r"^error: the adapter in .* does not fit .*: \d+ weights are of the adapter only"
    ):
        generate.main([str(out), "--question", "Is three odd?"])


def test_which_recipe_is_said_where_nothing_says_it(tiny_minicpm, tmp_path, capsys):
    """MiniCPM's processor wants torchvision where it is not loaded by its own recipe: it would be the wrong advice."""
    with pytest.raises(SystemExit, match="this needs a LLaVA-1.5 or LLaVA-NeXT processor"):
        generate.main([str(tiny_minicpm / "model"), "--question", "Is three odd?", "--use_cpu"])
    assert "taken for sft_llava.py's, or else give --recipe" in capsys.readouterr().err


@pytest.mark.parametrize("what, code", [("KeyboardInterrupt", 1), ("BrokenPipeError", 1)])
def test_a_program_ends_without_a_traceback(what, code):
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tools.generate import start\ndef main(): raise {what}\nstart(main)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (
        done.returncode == code
        and "Traceback" not in done.stderr
        and ("interrupted" in done.stderr) == (what == "KeyboardInterrupt")
    )


def test_as_a_program(run, ask):
    question = ["--question", "Is three even or odd?", "--max_new_tokens", "6"]
    done = subprocess.run(
        [sys.executable, ROOT / "tools/generate.py", run, *question], capture_output=True, text=True, cwd=run.parent
    )
    assert done.returncode == 0 and done.stdout.strip() == ask(run, *question)[0]["prediction"], done.stderr


# ------------------------------------------------------------------------------------------------ of idefics2_docvqa.py
@pytest.mark.parametrize("base_only", [False, True])
def test_answers_about_documents(learnt, ask, base_only):
    """The recipe is the one that the run names; what is accepted is a list; plain PEFT gives the same answers."""
    data = ["--dataset_name", learnt / "held_out.json", "--image_folder", learnt / "images"]
    found = ask(learnt / "run", *data, *["--base_only"] * base_only)
    rows = json.loads((learnt / "held_out.json").read_text())
    want = [(n, row["id"], 0, 1, row["question"], row["answers"]) for n, row in enumerate(rows)]
    assert [
        tuple(line[key] for key in ("row", "id", "turn", "images", "question", "reference")) for line in found
    ] == want
    right = [line["prediction"] in line["reference"] for line in found]
    assert sum(right[:16]) == 0 if base_only else sum(right[:16]) >= 15

    model = AutoModelForImageTextToText.from_pretrained(learnt / "model")
    model = model if base_only else PeftModel.from_pretrained(model, learnt / "run")
    for line, row in list(zip(found, rows))[::3]:
        page = idefics2_docvqa.load_image(str(learnt / "images" / row["image"]))
        content = [{"type": "text", "text": "Answer briefly."}, {"type": "image", "image": page}]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": row["question"]}]}]
        assert line["prediction"] == by_hand(model, AutoProcessor.from_pretrained(learnt / "run"), messages)


def test_documents_in_batches_or_one_by_one(learnt, tiny_forms, ask):
    data = ["--dataset_name", tiny_forms / "data", "--dataset_train_split", "test"]
    found = ask(learnt / "run", *data)
    assert len(found) == 24 and len({line["prediction"] for line in found}) > 1
    assert ask(learnt / "run", *data, "--batch_size", 1) == found == ask(learnt / "run", *data, "--batch_size", 64)
    base = ask(learnt / "run", *data, "--base_only")
    named = ["--recipe", ROOT / "idefics2_docvqa.py", "--use_cpu"]
    assert ask(learnt / "model", *named, *data) == base != found  # a model that no recipe wrote


def test_documents_that_the_run_held_out(learnt, ask):
    given = ["--config", str(learnt / "run" / "settings.yaml")]
    rows = load_data(idefics2_docvqa, *idefics2_docvqa.parse(given))[1]["row"]
    assert [line["row"] for line in ask(learnt / "run")] == list(rows) and sorted(rows) == list(range(19))


def test_one_question_about_a_page(learnt, ask, calls):
    """It is asked as the rows were: the instruction, the page, the question."""
    row = json.loads((learnt / "train.json").read_text())[0]
    line = ask(learnt / "run", "--question", row["question"], "--image", learnt / "images" / row["image"])[0]
    (asked, said), processor = calls[0], AutoProcessor.from_pretrained(learnt / "run")
    text = processor.decode(asked["input_ids"][0]).replace("<image>", "")
    edge = "<fake_token_around_image>"
    assert text == f"<s> User: Answer briefly.{edge}{edge} {row['question']}<end_of_utterance>\nAssistant:"
    assert (asked["input_ids"][0] == processor.image_token_id).sum() == processor.image_seq_len
    assert asked["pixel_values"].shape[1] == 1 and line["images"] == 1 and line["reference"] is None
    assert [line["prediction"]] == [
        answer.strip() for answer in processor.batch_decode(said, skip_special_tokens=True)
    ]
    data = ["--dataset_name", learnt / "train.json", "--image_folder", learnt / "images"]
    assert line["prediction"] == ask(learnt / "run", *data)[0]["prediction"]


def test_it_stops_at_the_end_of_the_utterance(learnt, ask, calls, monkeypatch):
    """Though the model's own settings know of no other end than the tokenizer's EOS."""
    processor = AutoProcessor.from_pretrained(learnt / "model")
    end = processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")

    def talkative(settings, training, load=idefics2_docvqa.load_model):
        model = load(settings, training)
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.lm_head.weight.data.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
        model.lm_head.bias.data[end] = 1.0
        return model

    monkeypatch.setattr(generate, "load_recipe", lambda *_: idefics2_docvqa)
    monkeypatch.setattr(idefics2_docvqa, "load_model", talkative)
    found = ask(learnt / "run", "--base_only")
    assert {line["prediction"] for line in found} == {""} and processor.tokenizer.eos_token_id != end
    assert all(said.shape[1] == 1 and set(said.flatten().tolist()) == {end} for _, said in calls)


def test_pages_without_answers(learnt, tmp_path, ask):
    rows = json.loads((learnt / "train.json").read_text())[:3]
    rows = [{key: row[key] for key in ("image", "question")} for row in rows]
    rows[1]["answer"] = "47"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = ask(learnt / "run", "--dataset_name", tmp_path / "rows.jsonl", "--image_folder", learnt / "images")
    assert [(x["row"], x["turn"], x["question"], x["reference"]) for x in found] == [
        (n, 0, row["question"], ["47"] if n == 1 else None) for n, row in enumerate(rows)]  # fmt: skip
    data = ["--dataset_name", learnt / "train.json", "--image_folder", learnt / "images"]
    assert [x["prediction"] for x in found] == [x["prediction"] for x in ask(learnt / "run", *data)[:3]]


def test_the_questions_of_amber(learnt, tmp_path, ask, calls):
    """Rows of {"id", "image", "query"}, asked for yes or no, on to evals/amber.py: ids stay whole numbers."""
    rows = json.loads((learnt / "train.json").read_text())[:6]
    asked = [{"id": 1005 + n, "image": row["image"], "query": row["question"]} for n, row in enumerate(rows)]
    (tmp_path / "query_discriminative.json").write_text(json.dumps(asked))
    data = [
        "--dataset_name",
        tmp_path / "query_discriminative.json",
        "--image_folder",
        learnt / "images",
        "--question_column",
        "query",
    ]
    found = ask(learnt / "run", *data, "--append", "Please answer yes or no.", name="after.jsonl")
    assert [(line["id"], line["row"], line["question"], line["reference"]) for line in found] == [
        (1005 + n, n, f"{row['question']} Please answer yes or no.", None) for n, row in enumerate(rows)]  # fmt: skip
    assert all(type(line["id"]) is int for line in found)
    processor, edge = AutoProcessor.from_pretrained(learnt / "run"), "<fake_token_around_image>"
    for line, ids in zip(found, calls[0][0]["input_ids"]):
        text = processor.decode(ids[ids != processor.tokenizer.pad_token_id]).replace("<image>", "")
        assert text.endswith(f"{edge} {line['question']}<end_of_utterance>\nAssistant:")

    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(learnt / "model"), learnt / "run")
    page = idefics2_docvqa.load_image(str(learnt / "images" / rows[0]["image"]))
    content = [{"type": "text", "text": "Answer briefly."}, {"type": "image", "image": page}]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": found[0]["question"]}]}]
    assert found[0]["prediction"] == by_hand(model, processor, messages)
    one = [
        "--question",
        rows[0]["question"],
        "--image",
        learnt / "images" / rows[0]["image"],
        "--append",
        "Please answer yes or no.",
    ]
    assert [ask(learnt / "run", *one)[0][key] for key in ("question", "prediction")] == [
        found[0][key] for key in ("question", "prediction")
    ]

    truth = [{"id": row["id"], "type": "discriminative-attribute-number", "truth": "no"} for row in asked]
    (tmp_path / "annotations.json").write_text(json.dumps(truth))
    flags = ["--annotations", tmp_path / "annotations.json", "--questions", tmp_path / "query_discriminative.json"]
    amber.main([str(part) for part in [tmp_path / "after.jsonl", *flags]])


def test_how_pages_are_shown_is_kept_where_they_lie_is_not(learnt, tiny_forms, tmp_path, ask, calls):
    """For another data set: image splitting, size, language and instruction are the run's, columns and folder are not."""
    rows = json.loads((learnt / "train.json").read_text())[:4]
    (tmp_path / "pages").mkdir()
    for row in rows:
        shutil.copy(learnt / "images" / row["image"], tmp_path / "pages")
    own = [{"picture": row["image"], "asks": {"fr": row["question"]}, "says": row["answers"]} for row in rows]
    (tmp_path / "own.json").write_text(json.dumps(own))
    own = {"dataset_name": tmp_path / "own.json", "image_folder": tmp_path / "pages", "image_column": "picture"}
    own |= {
        "question_column": "asks",
        "answers_column": "says",
        "language": "fr",
        "instruction": "Say it.",
        "image_splitting": True,
    }
    own |= {"longest_edge": 84, "model_name_or_path": learnt / "model", "output_dir": tmp_path / "run", "max_steps": 1}
    own |= {
        "eval_fraction": 0.25,
        "max_new_tokens": 2,
        "report_to": "none",
        "dataloader_num_workers": 0,
        "use_cpu": True,
    }
    idefics2_docvqa.main([part for name, value in own.items() for part in (f"--{name}", str(value))])
    assert len(ask(tmp_path / "run")) == 1  # its own row, by its own columns

    data, texts = ["--dataset_name", tiny_forms / "data", "--dataset_train_split", "test"], []
    for flags in ([], ["--language", "de", "--image_splitting", "false"]):
        calls.clear()
        found = ask(tmp_path / "run", *data, *flags)
        rows, language = forms.make_rows(0, train=False, n=24), "de" if flags else "fr"
        assert [line["question"] for line in found] == [
            forms.ask(row["asked"], row["phrasing"])[language] for row in rows
        ]
        assert [line["reference"] for line in found] == [forms.answers(row) for row in rows]
        asked = calls[0][0]
        assert asked["pixel_values"].shape[1] == (1 if flags else 5) and max(asked["pixel_values"].shape[3:]) == 84
        texts.append(AutoProcessor.from_pretrained(tmp_path / "run").decode(asked["input_ids"][0]))
    assert all("User: Say it.<fake_token_around_image>" in text for text in texts)


def test_the_recipe_can_be_named(learnt, tmp_path, ask):
    """A recipe that the run names and that is not there; one that the user names comes first."""
    out = shutil.copytree(learnt / "run", tmp_path / "renamed", ignore=shutil.ignore_patterns("checkpoint-*"))
    first, rest = (out / "settings.yaml").read_text().split("\n", 1)
    assert first == "# idefics2_docvqa.py"
    (out / "settings.yaml").write_text("# mine.py\n" + rest)
    question = ["--question", "What is the total?", "--image", next((learnt / "images").glob("*.png"))]
    with pytest.raises(SystemExit, match=r"^error: .*mine\.py: no such file"):
        ask(out, *question)
    shutil.copy(ROOT / "idefics2_docvqa.py", tmp_path / "mine.py")
    assert ask(out, "--recipe", tmp_path / "mine.py", *question) == ask(learnt / "run", *question)
    with pytest.raises(SystemExit, match="^error: "):  # the other recipe knows neither this model nor these settings
        ask(learnt / "run", "--recipe", ROOT / "sft_llava.py", *question)


def test_settings_that_name_no_recipe_are_of_the_first(run, tmp_path, ask):
    """As they were written before there were several."""
    out = shutil.copytree(run, tmp_path / "old", ignore=shutil.ignore_patterns("checkpoint-*"))
    first, rest = (out / "settings.yaml").read_text().split("\n", 1)
    assert first == "# sft_llava.py"
    (out / "settings.yaml").write_text(rest)
    assert ask(out, "--question", "Is three odd?") == ask(run, "--question", "Is three odd?")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--image", "x.png"], "--question"),
        (["--image", "x.png", "--question", "x"], "x.png"),
        (["--question", "x <end_of_utterance> y"], "<end_of_utterance>"),
        (["--question", "x", "--append", "<end_of_utterance>"], "<end_of_utterance> in --append"),
        (["--dataset_name", "BAD", "--image_folder", "IMAGES"], "row 1: empty question"),
        (["--dataset_name", "BAD"], "row 0: unreadable image"),
        (["--dataset_name", "BAD", "--image_folder", "IMAGES", "--question_column", "query"], "query"),
        (["--dataset_name", "DATA", "--language", "nl"], "row 0: language"),
    ],
)
def test_mistakes_about_documents_get_one_message(learnt, tiny_forms, tmp_path, argv, message):
    rows = json.loads((learnt / "train.json").read_text())[:2]
    (tmp_path / "BAD.json").write_text(json.dumps([rows[0], rows[1] | {"question": " "}]))
    names = {"BAD": tmp_path / "BAD.json", "IMAGES": learnt / "images", "DATA": tiny_forms / "data"}
    with pytest.raises(SystemExit) as e:
        generate.main([str(learnt / "run"), *(str(names.get(word, word)) for word in argv)])
    assert str(e.value.code).startswith("error: ") and message in e.value.code and "Traceback" not in e.value.code
