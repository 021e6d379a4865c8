"""tools/generate.py: the answers are the model's own, in batches or one by one, with and without the adapter."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, said
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

import sft_llava

spec = importlib.util.spec_from_file_location("generate", ROOT / "tools" / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(tiny, out, **settings):
    """A short run of the tiny LLaVA without 4-bit, 6 rows held out by the run itself; -> its folder."""
    short = {"use_cpu": True, "model_name_or_path": tiny / "model", "dataset_name": tiny / "data", "output_dir": out}
    short |= {"max_steps": 6, "learning_rate": 2e-2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    short |= {"sample_rows": 0, "max_eval_rows": 6, "logging_steps": 1, "load_in_4bit": False, "dataloader_num_workers": 0}
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
    assert [line["row"] for line in found] == [n for n, r in enumerate(rows) for _ in range(len(r["conversations"]) // 2)]
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
    rows = sft_llava.load_data(settings, training)[1]["row"]
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


@pytest.mark.slow
def test_whole_models(tiny_llava, tmp_path, ask):
    """Trained in full, or merged: a folder without an adapter."""
    full = train(tiny_llava, tmp_path / "full", lora_r=0, learning_rate=1e-2)
    data = ["--dataset_name", tiny_llava / "data", "--dataset_train_split", "test"]
    found = ask(full, *data)
    model, processor = AutoModelForImageTextToText.from_pretrained(full), AutoProcessor.from_pretrained(full)
    row = sft_llava.datasets.load_dataset("parquet", data_files=str(tiny_llava / "data" / "test.parquet"), split="train")[0]
    messages = [{"role": "user", "content": [{"type": "image", "image": row["images"][0]}]}]
    messages[0]["content"].append({"type": "text", "text": row["messages"][0]["content"][0]["text"]})
    assert found[0]["prediction"] == by_hand(model, processor, messages)
    assert ask(full, *data, "--base_only") == ask(tiny_llava / "model", "--use_cpu", *data) != found
    adapter = train(tiny_llava, tmp_path / "adapter", train_projector=True)
    merged = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny_llava / "model"), adapter)
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoProcessor.from_pretrained(adapter).save_pretrained(tmp_path / "merged")
    assert ask(tmp_path / "merged", "--use_cpu", *data) == ask(adapter, *data)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["nowhere", "--question", "x", "--use_cpu"], "nowhere"),
        (["RUN", "--image", "x.png"], "--question"),
        (["RUN", "--image", "x.png", "--question", "x"], "x.png"),
        (["RUN", "--output", "TAKEN"], "--overwrite"),
        (["RUN", "--recipe", "no.py"], "no.py"),
        (["RUN", "--datset_name", "x"], "--datset_name"),
        (["RUN", "--dataset_name", "BAD"], "row 1: empty answer"),
        (["RUN", "--dataset_name", "BAD", "--question", "x"], "one of them"),
        (["RUN", "--question", "<image> x"], "<image>"),
        (["RUN", "--question", "x", "--batch_size", "0"], "--batch_size"),
        (["RUN", "--question", "x", "--output", "nowhere/x.jsonl"], "no such folder"),
        (["RUN", "--question", "x", "--model_name_or_path", "nowhere"], "cannot load nowhere"),
    ],
)
def test_mistakes_get_one_message(run, tmp_path, argv, message):
    (tmp_path / "TAKEN").write_text("")
    (tmp_path / "BAD.json").write_text(json.dumps([said("a", "b"), said("a", "")]))
    names = {"RUN": run, "TAKEN": tmp_path / "TAKEN", "BAD": tmp_path / "BAD.json"}
    with pytest.raises(SystemExit) as e:
        generate.main([str(names.get(word, word)) for word in argv])
    assert str(e.value.code).startswith("error: ") and message in e.value.code


def test_as_a_program(run, ask):
    question = ["--question", "Is three even or odd?", "--max_new_tokens", "6"]
    done = subprocess.run(
        [sys.executable, ROOT / "tools/generate.py", run, *question], capture_output=True, text=True, cwd=run.parent
    )
    assert done.returncode == 0 and done.stdout.strip() == ask(run, *question)[0]["prediction"], done.stderr
