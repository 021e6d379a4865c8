"""tools/compare.py: both answers are the model's own, votes are pairs that dpo_idefics2.py reads, and the page works in a browser."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, load_data, minicpm_run, said, two_stage_run
from PIL import Image
from test_generate import lines, train

import dpo_idefics2
import finetune_minicpm_lora
import llava_two_stage
from tools import compare, generate, merge_adapter

CHROMIUM = next(
    (path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if path), None
)


@pytest.fixture(scope="module")
def runs(tiny_llava, tmp_path_factory):
    """A folder with two runs of one base model: lora/, and projector/, which has the projector in full beside its adapter."""
    out = tmp_path_factory.mktemp("compare")
    train(tiny_llava, out / "lora")
    train(tiny_llava, out / "projector", train_projector=True, learning_rate=1e-2)
    return out


def load(*argv):
    """Arguments -> (runs, answers)."""
    args, rest = compare.parse([*map(str, argv), "--port", str(free_port())])
    found = compare.load_runs(args, rest)
    return found, compare.Answers(found, args)


@pytest.fixture(scope="module")
def loaded(runs):
    return load(runs / "lora", runs / "projector", "--max_new_tokens", 6)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def copy(run, out):
    return shutil.copytree(run, out, ignore=shutil.ignore_patterns("checkpoint-*"))


def asked(loaded, run, side, example, tmp_path):
    """What is yielded for an example of a run."""
    image, question, _ = example
    image.save(tmp_path / "asked.png")
    return list(
        loaded.stream(run, side, loaded.prepare(run, str(tmp_path / "asked.png"), question), threading.Event())
    )


# ------------------------------------------------------------------------------------------------------------------ answers
def test_answers_are_those_of_generate_whatever_was_asked_before(runs, loaded, tmp_path):
    """The projector that one run trained in full is neither the base's nor the other's."""
    (lora, projector), answers = loaded
    want = {}
    for run in loaded[0]:
        for side, flags in ((compare.TUNED, []), (compare.BASE, ["--base_only"])):
            generate.main(
                [run.path, "--max_new_tokens", "6", "--output", str(tmp_path / "out.jsonl"), "--overwrite", *flags]
            )
            want[run.name, side] = {
                (line["question"], line["reference"]): line["prediction"]
                for line in lines(tmp_path / "out.jsonl")
                if line["turn"] == 0
            }
    order = [
        (lora, compare.TUNED),
        (projector, compare.BASE),
        (projector, compare.TUNED),
        (lora, compare.BASE),
        (lora, compare.TUNED),
        (projector, compare.TUNED),
    ]
    for n, (run, side) in enumerate([*order, *order]):
        example = run.examples[n % len(run.examples)]
        assert asked(answers, run, side, example, tmp_path)[-1] == want[run.name, side][example[1:]]
    first = lora.examples[0][1:]
    assert len({answer[first] for answer in want.values()}) > 1 and len(lora.examples) > 2


def test_examples_are_of_the_rows_held_out(loaded):
    for run in loaded[0]:
        rows = [run.collator.messages_of(row) for row in load_data(run.recipe, run.settings, run.training)[1]]
        first = [(turns[0]["content"], *map(run.recipe.text_of, turns[:2])) for turns in rows]
        images = [[part["image"].tobytes() for part in content if part["type"] == "image"] for content, *_ in first]
        assert [([image.tobytes()], question, reference) for image, question, reference in run.examples] == [
            (pictures, *texts) for pictures, (_, *texts) in zip(images, first) if len(pictures) == 1]  # fmt: skip


def test_answers_are_streamed_and_can_be_stopped(loaded, runs, tmp_path):
    (run, _), answers = loaded
    batch = answers.prepare(run, None, "Is three odd?")
    answers.args.max_new_tokens, stop = 40, threading.Event()
    try:
        pieces = list(answers.stream(run, compare.BASE, batch, stop))
        assert len(pieces) > 2 and len(set(pieces)) > 1 and pieces[-1].startswith(pieces[0])
        short = []
        for piece in answers.stream(run, compare.BASE, batch, stop):
            short.append(piece)
            stop.set()
        assert len(short[-1]) < len(pieces[-1]) and not answers.lock.locked()
        assert list(answers.stream(run, compare.BASE, batch, threading.Event()))[-1] == pieces[-1]
    finally:
        answers.args.max_new_tokens = 6


def test_two_tabs_do_not_switch_the_adapter_under_each_other(loaded, tmp_path):
    found, answers = loaded
    jobs = [(run, side) for run in found for side in (compare.BASE, compare.TUNED)]
    ask = lambda run, side: list(
        answers.stream(run, side, answers.prepare(run, None, "Is three odd?"), threading.Event())
    )[-1]
    want, got = [ask(*job) for job in jobs], {}
    threads = [threading.Thread(target=lambda n=n: got.update({n: ask(*jobs[n % 4])})) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[n] for n in range(12)] == want * 3 and len(set(want)) > 1


def test_a_failure_of_the_model_is_raised_and_the_next_question_is_answered(loaded, monkeypatch):
    (run, _), answers = loaded
    batch = answers.prepare(run, None, "Is three odd?")
    want = list(answers.stream(run, compare.TUNED, batch, threading.Event()))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(answers.model, "generate", lambda **kwargs: (_ for _ in ()).throw(RuntimeError("out of memory")))
        list(answers.stream(run, compare.BASE, batch, threading.Event()))
    assert list(answers.stream(run, compare.TUNED, batch, threading.Event())) == want


def test_minicpm_26_is_shown_at_once(tiny_minicpm26, tmp_path):
    flags = minicpm_run(
        tiny_minicpm26,
        tmp_path / "run",
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        sample_rows=0,
        eval_fraction=0.1,
    )
    finetune_minicpm_lora.main(flags)
    (run,), answers = load(tmp_path / "run", "--max_new_tokens", 4, "--examples", 2)
    image, question, _ = run.examples[0]
    image.save(tmp_path / "x.png")
    for side, flags in ((compare.TUNED, []), (compare.BASE, ["--base_only"])):
        generate.main([run.path, "--question", question, "--image", str(tmp_path / "x.png"), "--max_new_tokens", "4", "--output",
                       str(tmp_path / "out.jsonl"), "--overwrite", *flags])  # fmt: skip
        assert asked(answers, run, side, run.examples[0], tmp_path) == [lines(tmp_path / "out.jsonl")[0]["prediction"]]


def test_a_run_that_holds_its_own_base_can_be_moved(tiny_parts, tmp_path):
    """Joined from two parts by the recipe itself, so that no model of that name is anywhere else."""
    settings = {
        "pretrain_mm_mlp_adapter": tiny_parts / "align",
        "lora_r": 4,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "eval_fraction": 0.1,
    }
    llava_two_stage.main(
        two_stage_run(tiny_parts, tmp_path / "run", "instruct", **settings, load_in_4bit=False, sample_rows=0)
    )
    shutil.move(tmp_path / "run", tmp_path / "moved")
    (run,), answers = load(tmp_path / "moved", "--max_new_tokens", 6)
    assert run.base == str(tmp_path / "moved" / "base") and run.label == "moved" and run.examples
    for side, flags in ((compare.TUNED, []), (compare.BASE, ["--base_only"])):
        generate.main(
            [
                run.path,
                "--question",
                "Is three odd?",
                "--max_new_tokens",
                "6",
                "--output",
                str(tmp_path / "out.jsonl"),
                "--overwrite",
                *flags,
            ]
        )
        said = list(answers.stream(run, side, answers.prepare(run, None, "Is three odd?"), threading.Event()))[-1]
        assert said == lines(tmp_path / "out.jsonl")[0]["prediction"]


@pytest.mark.parametrize("kind", ["instruct", "align", "merged"])
def test_a_whole_model_stands_beside_its_base(tiny_parts, tmp_path, kind):
    """Trained in full from a stage-1 model; joined from parts, with nothing but the projector trained; merged from an adapter on joined
    parts, whose run is gone. What training did not change is in memory once."""
    settings = {"max_steps": 2, "learning_rate": 1e-2, "eval_fraction": 0.1, "sample_rows": 0, "save_strategy": "no"}
    match kind:
        case "instruct":
            llava_two_stage.main(two_stage_run(tiny_parts, run := tmp_path / "run", "instruct", **settings))
        case "align":
            settings |= {"learning_rate": llava_two_stage.Training.learning_rate, "projector_learning_rate": 1e-1}
            llava_two_stage.main(two_stage_run(tiny_parts, run := tmp_path / "run", "align", **settings))
        case "merged":
            settings |= {"pretrain_mm_mlp_adapter": tiny_parts / "align", "lora_r": 4, "load_in_4bit": False}
            llava_two_stage.main(two_stage_run(tiny_parts, tmp_path / "adapter", "instruct", **settings))
            merge_adapter.main([str(tmp_path / "adapter"), str(run := tmp_path / "merged"), "--use_cpu"])
            shutil.rmtree(tmp_path / "adapter")
    (found,), answers = load(run, "--max_new_tokens", 6)
    assert found.whole and found.examples
    said = {}
    for side, flags in ((compare.TUNED, []), (compare.BASE, ["--base_only"])):
        question = "What digit is this?"
        found.examples[0][0].save(picture := tmp_path / "asked.png")
        generate.main([str(run), "--question", question, "--image", str(picture), "--max_new_tokens", "6", "--output", str(tmp_path / "out.jsonl"),
                       "--overwrite", *flags])  # fmt: skip
        said[side] = list(
            answers.stream(found, side, answers.prepare(found, str(picture), question), threading.Event())
        )[-1]
        assert said[side] == lines(tmp_path / "out.jsonl")[0]["prediction"]
    assert said[compare.BASE] != said[compare.TUNED]
    shared = lambda part: {
        a.data_ptr() == b.data_ptr()
        for a, b in zip(*(m.get_submodule(part).parameters() for m in (answers.base, answers.model)))
    }
    assert shared("model.vision_tower") == {True}
    assert shared("model.multi_modal_projector") == {False} or kind == "merged"
    assert (
        shared("model.language_model.layers") == {"instruct": {False}, "align": {True}, "merged": {True, False}}[kind]
    )
    assert not (tmp_path / "adapter").exists()  # nothing is written beside the page's own files


def test_examples_of_several_runs_on_many_rows(runs, tmp_path):
    """Rows are read by several processes then."""
    for n in range(20):
        Image.new("RGB", (56, 56), (n, 0, 0)).save(tmp_path / f"{n}.png")
    rows = [said("<image>\nWhich?", f"number {n}", image=f"{n % 20}.png") for n in range(1100)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = ["--dataset_name", str(tmp_path / "rows.json"), "--image_folder", str(tmp_path), "--eval_fraction", "0.1"]
    args, rest = compare.parse([str(runs / "lora"), str(runs / "projector"), "--port", str(free_port()), *data])
    assert [len(run.examples) for run in compare.load_runs(args, rest)] == [6, 6]


def test_runs_of_the_same_name_are_shown_by_their_paths(runs, tmp_path):
    other = copy(runs / "projector", tmp_path / "lora")
    args, rest = compare.parse([str(runs / "lora"), str(other), "--port", str(free_port()), "--examples", "0"])
    assert [run.label for run in compare.load_runs(args, rest)] == [str(runs / "lora"), str(other)]


@pytest.mark.parametrize(
    "picture, question, message",
    [
        (None, " \n", "no question yet"),
        (None, "x" * 4001, "too long: 4001 characters, 4000 are taken"),
        (None, "why " * 900, r"too long: \d+ tokens with the picture, the model reads \d+"),
        (None, "What is <image>?", "`<image>` in the question"),
        ("truncated.jpg", "What is this?", r"unreadable image: the picture \("),
        ("text.png", "What is this?", "cannot identify image file"),
        ("pages.tiff", "What is this?", "several images: the picture holds 3"),
    ],
)
def test_what_cannot_be_asked_gets_a_message(loaded, odd_images, tmp_path, picture, question, message):
    (run, _), answers = loaded
    with pytest.raises(compare.Refused, match=message) as e:
        answers.prepare(run, picture and str(tmp_path / picture), question)
    assert str(tmp_path) not in str(e.value) and "--" not in str(e.value)


# -------------------------------------------------------------------------------------------------------------------- votes
SAID = {compare.BASE: "A cat and two cushions.", compare.TUNED: "A cat."}


def test_votes_are_pairs_that_dpo_reads(tmp_path, pair_parse):
    path, picture = tmp_path / "votes.jsonl", Image.effect_noise((64, 64), 90).convert("RGB")
    for n, better in enumerate([compare.TUNED, compare.BASE, compare.TUNED]):
        votes = compare.Votes(path)  # as after a restart
        votes.add(
            picture if n < 2 else picture.rotate(90), f"What is thís, {n}?", SAID, better, run="out/lora", base="tiny"
        )
    assert len(list((tmp_path / "votes-images").iterdir())) == 2  # one picture was asked about twice
    text, last = votes.summary()
    assert "**3 votes**" in text and "| lora | 2 | 1 |" in text and last == lines(path)[-1]
    for n, row in enumerate(load_data(dpo_idefics2, *pair_parse(dataset_name=path, eval_strategy="no"))[0]):
        assert (row["question"], row["chosen"], row["rejected"]) == (
            f"What is thís, {n}?",
            *list(SAID.values())[:: 1 if n == 1 else -1],
        )
        image = dpo_idefics2.load_image(*dpo_idefics2.as_image_list(row["image"], row["folder"]))
        assert image.tobytes() == (picture if n < 2 else picture.rotate(90)).tobytes()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": None}, "about one picture"),
        ({"image": Image.new("RGB", (1000, 49))}, "narrower"),
        ({"answers": dict.fromkeys(SAID, "A cat.")}, "equal"),
        ({"answers": SAID | {compare.TUNED: ""}}, "empty"),
    ],
)
def test_what_is_no_pair_is_not_written_and_said(tmp_path, change, message):
    votes = compare.Votes(tmp_path / "votes.jsonl")
    row = {"image": Image.new("RGB", (64, 64)), "question": "x", "answers": SAID, "better": compare.BASE} | change
    with pytest.raises(compare.Refused, match=message):
        votes.add(**row)
    assert not list(tmp_path.iterdir()) and votes.summary() == ("No votes yet in `votes.jsonl`", None)


def test_a_file_is_gone_on_with(tmp_path):
    """Even one that an editor left without a newline at its end, and with pairs that nobody voted for."""
    path = tmp_path / "votes.jsonl"
    path.write_text(earlier := json.dumps({"image": "a.png", "question": "x", "chosen": "y", "rejected": "z"}))
    votes = compare.Votes(path)
    votes.add(Image.new("RGB", (64, 64)), "What?", SAID, compare.BASE, run="lora")
    assert path.read_text().startswith(earlier + "\n") and path.read_text().endswith("\n") and len(lines(path)) == 2
    assert "**2 votes**" in votes.summary()[0]
    path.write_text("gone")
    assert "cannot be read any more" in votes.summary()[0]


# ----------------------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    "argv, message",
    [
        (["NOWHERE"], "no such folder"),
        (["EMPTY"], "holds no adapter (adapter_config.json) and no model (config.json); needed"),
        (["UNFINISHED"], "but checkpoints: the same"),
        (["WHOLE", "--use_cpu"], "is a whole model, and what it was trained from is not said"),
        (["WHOLE", "--use_cpu", "--model_name_or_path", "WHOLE"], "or is itself: give --model_name_or_path BASE"),
        (
            ["RUN", "WHOLE", "--use_cpu", "--model_name_or_path", "WHOLE2"],
            "is a whole model, no adapter: start the page for it alone",
        ),
        (["BARE"], "holds no processor (processor_config.json)"),
        (["LIGHT"], "without its weights"),
        (["DAMAGED"], "adapter_config.json is damaged"),
        (["FOREIGN"], "is one for somebody/else-7b, settings.yaml says"),
        (["RUN", "OTHER"], "one model is in memory, start the page for each"),
        (["RUN", "QUANTIZED"], "has load_in_4bit False,"),
        (["RUN", "RUN"], "is given twice"),
        (["RUN", "--recipe", "NOWHERE"], "no such file"),
        (["RUN", "--recipe", "NOT_PYTHON"], "is no Python file"),
        (["RUN", "--recipe", "BROKEN"], "cannot be imported as a recipe: SyntaxError"),
        (
            ["RUN", "--recipe", "LESS"],
            "it has no check, load_processor, load_data, load_model, load_image, text_of, BadRow, Settings, Collator.messages_of, Collator.tokenize",
        ),
        (["RUN", "--no_such_flag", "1"], "--no_such_flag"),
        (["RUN", "--port", "TAKEN"], "choose another --port"),
        (["RUN", "--port", "70000"], "--port 70000"),
        (["RUN", "--max_upload", "0"], "--max_upload"),
        (["RUN", "--votes", "votes.json"], "must end in .jsonl"),
        (["RUN", "--votes", "nowhere/votes.jsonl"], "no such folder"),
        (["RUN", "--votes", "FOLDER"], "is in its place"),
        (["RUN", "--votes", "PREDICTIONS"], "exists, and is no file of votes: line 1 has no image"),
        (["RUN", "--votes", "TEXT"], "exists, and is no file of votes: line 2: "),
    ],
)
def test_mistakes_get_one_message(runs, tiny_llava, tmp_path, argv, message):
    run, paths = (
        runs / "lora",
        {
            name: tmp_path / name
            for name in "NOWHERE EMPTY UNFINISHED BARE LIGHT DAMAGED FOREIGN OTHER QUANTIZED FOLDER.jsonl".split()
        },
    )
    paths |= {"RUN": run, "WHOLE": tiny_llava / "model", "WHOLE2": tmp_path / "WHOLE2"} | {
        name.split(".")[0]: tmp_path / name for name in ("FOLDER.jsonl", "PREDICTIONS.jsonl", "TEXT.jsonl")
    }
    paths |= {name.split(".")[0]: tmp_path / name for name in ("NOT_PYTHON.txt", "BROKEN.py", "LESS.py")}
    for name in ("EMPTY", "FOLDER.jsonl"):
        paths[name].mkdir()
    shutil.copytree(tiny_llava / "model", paths["WHOLE2"])
    (paths["UNFINISHED"] / "checkpoint-3").mkdir(parents=True)
    for name in {"BARE", "LIGHT", "DAMAGED", "FOREIGN", "OTHER", "QUANTIZED"} & {*argv}:
        copy(run, paths[name])
    for name, gone in (("BARE", "processor_config.json"), ("LIGHT", "adapter_model.safetensors")):
        (paths[name] / gone).unlink(missing_ok=True)

    def change(name, file, **more):
        if name in argv:
            read, write = (yaml.safe_load, yaml.safe_dump) if file.endswith("yaml") else (json.loads, json.dumps)
            (paths[name] / file).write_text(write(read((paths[name] / file).read_text()) | more))

    change("FOREIGN", "adapter_config.json", base_model_name_or_path="somebody/else-7b")
    change("OTHER", "adapter_config.json", base_model_name_or_path=str(paths["WHOLE2"]))
    change("OTHER", "settings.yaml", model_name_or_path=str(paths["WHOLE2"]))
    change("QUANTIZED", "settings.yaml", load_in_4bit=True)
    if "DAMAGED" in argv:
        (paths["DAMAGED"] / "adapter_config.json").write_text("{")
    paths["NOT_PYTHON"].write_text("x")
    paths["BROKEN"].write_text("def (")
    paths["LESS"].write_text("class Collator:\n    ask = print\ndef parse(argv): pass\n")
    paths["PREDICTIONS"].write_text('{"row": 0, "prediction": "x"}\n')
    paths["TEXT"].write_text(json.dumps({"image": "a", "question": "b", "chosen": "c", "rejected": "d"}) + "\nhello\n")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as e:
        own = {"--port": free_port(), "--votes": tmp_path / "votes.jsonl"}
        more = [str(part) for flag, value in own.items() if flag not in argv for part in (flag, value)]
        words = [str(taken.getsockname()[1]) if word == "TAKEN" else str(paths.get(word, word)) for word in argv]
        compare.main([*words, *more, "--examples", "0"])
    assert str(e.value.code).startswith("error: ") and message in e.value.code
    named = {
        "OTHER": [run, paths["OTHER"], tiny_llava / "model", paths["WHOLE2"]],
        "FOREIGN": [paths["FOREIGN"], tiny_llava / "model"],
    }
    assert all(str(name) in e.value.code for word in argv for name in named.get(word, ()))


def test_an_adapter_that_does_not_fit_is_named(runs, learnt, tiny_llava, tmp_path, capsys):
    other = copy(learnt / "run", tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "", "target_modules": ["no_such_layer"]})
    )
    with pytest.raises(SystemExit, match=rf"^error: the adapter in {other} does not fit {learnt / 'model'}: "):
        load(other, "--examples", 0)
    load(
        copy(runs / "lora", tmp_path / "same"),
        "--examples",
        0,
        "--model_name_or_path",
        shutil.copytree(tiny_llava / "model", tmp_path / "moved"),
    )
    assert f"was trained on {tiny_llava / 'model'}, it is put on {tmp_path / 'moved'}" in capsys.readouterr().err


def test_without_its_data_a_run_has_no_examples(runs, tmp_path, capsys):
    args, rest = compare.parse(
        [str(runs / "lora"), "--port", str(free_port()), "--dataset_name", str(tmp_path / "gone.json")]
    )
    assert compare.load_runs(args, rest)[0].examples == [] and "note: no examples of lora" in capsys.readouterr().err


def test_without_gradio_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"^error: .*pip install --no-deps -r requirements-compare\.txt$"):
        compare.load_gradio()


# ------------------------------------------------------------------------------------------------------------------ browser
@dataclasses.dataclass
class Served:
    url: str
    votes: Path
    temporary: Path


@pytest.fixture(scope="module")
def served(learnt, tmp_path_factory):
    """The program, as a user starts it, for the run that knows 16 forms by heart."""
    out = tmp_path_factory.mktemp("served")
    (out / "tmp").mkdir()
    port = free_port()
    command = [
        sys.executable,
        ROOT / "tools/compare.py",
        learnt / "run",
        "--port",
        port,
        "--votes",
        out / "votes.jsonl",
        "--max_new_tokens",
        8,
        "--max_upload",
        1,
    ]
    with open(out / "log", "w") as log:
        program = subprocess.Popen(
            [*map(str, command)], stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(out / "tmp")}
        )
    until = time.monotonic() + 300
    while "open http" not in (out / "log").read_text():
        assert program.poll() is None and time.monotonic() < until, (out / "log").read_text()[-3000:]
        time.sleep(0.2)
    yield Served(f"http://127.0.0.1:{port}", out / "votes.jsonl", out / "tmp")
    program.terminate()
    assert program.wait(180) == 0 and not list((out / "tmp").glob("compare-*"))


@pytest.fixture
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here to open the page with: apt install chromium")
    from playwright.sync_api import sync_playwright

    with (
        sync_playwright() as playwright,
        contextlib.closing(playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])) as chromium,
    ):
        yield chromium


def test_in_a_browser(browser, served, learnt, pair_parse, tmp_path):
    """Pick an example, ask, see both answers, vote, reload; blind; and what cannot be taken."""
    from playwright.sync_api import expect

    expect.set_options(timeout=120_000)
    page, visited = browser.new_page(), []
    page.on("request", lambda request: visited.append(request.url))
    value = lambda name: page.locator(f"#{name} textarea, #{name} input").first.input_value()
    box = lambda name: page.locator(f"#{name} textarea, #{name} input").first
    page.goto(served.url)
    expect(page.locator("#votes")).to_have_text("No votes yet in votes.jsonl")
    expect(page.locator("#vote-left")).to_be_disabled()
    page.locator("#ask").click()
    expect(page.locator("#status")).to_contain_text("There is no question yet")

    rows = {
        row["question"]: row["answers"] for row in json.loads((learnt / "held_out.json").read_text())[:16]
    }  # those it knows
    known = next(
        n
        for n, text in enumerate(page.locator("#examples tbody tr").all_inner_texts())
        if any(q in text for q in rows)
    )
    page.locator("#examples tbody tr").nth(known).click()
    expect(box("question")).not_to_have_value("")
    expect(page.locator("#picture img")).to_be_visible()
    question, reference = value("question"), value("reference")
    page.locator("#ask").click()
    expect(page.locator("#status")).to_have_text("Which answer is better?")
    assert value("right") and value("left") and value("left") != value("right") and reference
    answers = {"base": value("left"), "fine-tuned": value("right")}
    page.locator("#vote-right").click()
    expect(page.locator("#status")).to_have_text("Written: the fine-tuned answer is better.")
    expect(page.locator("#votes")).to_contain_text("1 vote in votes.jsonl")
    expect(page.locator("#vote-left")).to_be_disabled()
    (vote,) = lines(served.votes)
    assert (vote["question"], vote["chosen"], vote["rejected"], vote["preferred"]) == (
        question,
        answers["fine-tuned"],
        answers["base"],
        "fine-tuned",
    )
    assert vote["reference"] == reference and vote["run"] == str(learnt / "run") and vote["blind"] is False

    page.reload()
    expect(page.locator("#votes")).to_contain_text("1 vote in votes.jsonl")
    expect(page.locator("#last")).to_contain_text(vote["image"])

    # blind: a picture of one's own, names only after the vote
    page.set_input_files("#picture input[type=file]", served.votes.parent / vote["image"])
    expect(page.locator("#picture img")).to_be_visible()
    box("question").fill(question)
    page.locator("#blind input").check()
    page.locator("#ask").click()
    expect(page.locator("#status")).to_have_text("Which answer is better?")
    expect(page.locator("#left")).to_contain_text("Answer A")
    assert {value("left"), value("right")} == {*answers.values()}
    page.locator("#vote-left").click()
    expect(page.locator("#votes")).to_contain_text("2 votes in votes.jsonl")
    vote = lines(served.votes)[1]
    assert vote["blind"] and vote["chosen"] == value("left") == answers[vote["preferred"]] and "reference" not in vote
    names = {
        "base": f"Base: {learnt.name}/model",
        "fine-tuned": "Fine-tuned: run",
    }  # both sides: which is left is shuffled
    expect(page.locator("#left")).to_contain_text(names.pop(vote["preferred"]))
    expect(page.locator("#right")).to_contain_text(*names.values())

    # a tie is no pair
    page.locator("#ask").click()
    expect(page.locator("#status")).to_have_text("Which answer is better?")
    page.locator("#vote-tie").click()
    expect(page.locator("#status")).to_contain_text("A tie: no pair was written")
    assert len(lines(served.votes)) == 2

    # what cannot be taken
    box("question").fill("why " * 1001)
    page.locator("#ask").click()
    expect(page.locator("#status")).to_contain_text("too long: 4004 characters")
    (tmp_path / "broken.png").write_bytes((served.votes.parent / vote["image"]).read_bytes()[:200])
    page.reload()
    with page.expect_response(re.compile("/upload")):
        page.set_input_files("#picture input[type=file]", tmp_path / "broken.png")
    expect(page.locator("#picture img")).to_have_count(1)
    box("question").fill(question)
    page.locator("#ask").click()
    expect(page.locator("#status")).to_contain_text("unreadable image: the picture")
    expect(page.locator("#vote-left")).to_be_disabled()
    noise = Image.effect_noise((1200, 1200), 90)  # as a PNG above the 1 MB that are taken
    noise.save(tmp_path / "large.png")
    page.reload()
    page.set_input_files("#picture input[type=file]", tmp_path / "large.png")
    expect(page.locator("body")).to_contain_text(re.compile("exceed|too large|maximum", re.IGNORECASE))
    assert all(url.startswith((served.url, "data:", "blob:")) for url in visited), [
        url for url in visited if not url.startswith(served.url)
    ]

    with contextlib.redirect_stdout(io.StringIO()):
        pairs = load_data(dpo_idefics2, *pair_parse(dataset_name=served.votes, eval_strategy="no"))[0]
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [
        (vote["chosen"], vote["rejected"]) for vote in lines(served.votes)
    ]
