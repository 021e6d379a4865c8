"""tools/compare.py: both answers are the model's own, votes are pairs that dpo_idefics2.py reads, the page works in a
browser."""

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest
import yaml
from conftest import ROOT, load_data
from PIL import Image
from recipes import Recipe, minicpm_run, two_stage_run

import dpo_idefics2
import finetune_minicpm_lora
import llava_two_stage
from tools import compare, generate

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SHORT = {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
SHORT |= {"save_strategy": "no", "eval_strategy": "epoch", "sample_rows": 0, "max_eval_rows": 6}
SHORT |= {"load_in_4bit": False, "load_best_model_at_end": False}


@pytest.fixture(scope="module")
def runs(tiny_llava, tmp_path_factory):
    """A folder with two runs of one base model: lora/, and projector/, which has the projector in full beside its
    adapter."""
    out = tmp_path_factory.mktemp("compare")
    case = Recipe("sft_llava", tiny_llava, out)
    case.run(**SHORT, output_dir=out / "lora")
    case.run(**SHORT | {"learning_rate": 2e-3}, train_projector=True, output_dir=out / "projector")
    return out


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def load_runs(*argv):
    """Arguments -> (own arguments, the Runs)."""
    args, rest = compare.parse([*map(str, argv), "--port", str(free_port())])
    return args, compare.load_runs(args, rest)


def load(*argv):
    """Arguments -> (the Runs, Answers)."""
    args, found = load_runs(*argv, "--max_new_tokens", 6)
    return found, compare.Answers(found, args)


@pytest.fixture(scope="module")
def loaded(runs):
    return load(runs / "lora", runs / "projector")


def answer(answers, run, side, question="Is three odd?", picture=None):
    """All that is yielded of an answer."""
    batch = answers.prepare(run, picture and str(picture), question)
    return list(answers.stream(run, side, batch, threading.Event()))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def by_generate(tmp_path):
    """A function: run, side, flags -> the lines that tools/generate.py writes."""

    def make(run, side, *flags):
        own = ["--max_new_tokens", 6, "--output", tmp_path / "out.jsonl", "--overwrite"]
        base = ["--base_only"] if side == compare.BASE else []
        generate.main([str(part) for part in (run.path, *flags, *own, *base)])
        return lines(tmp_path / "out.jsonl")

    return make


def check_both_answers(run, answers, by_generate, tmp_path, *flags):
    """Both answers to an example are those of generate.py, and differ."""
    (image, question, _), picture = run.examples[0], tmp_path / "asked.png"
    image.save(picture)
    found = []
    for side in (compare.TUNED, compare.BASE):
        (line,) = by_generate(run, side, "--question", question, "--image", picture, *flags)
        pieces = answer(answers, run, side, question, picture)
        assert pieces[-1] == line["prediction"]
        found.append(pieces[-1])
    assert found[0] != found[1]
    return pieces


# ------------------------------------------------------------------------------------------------------------- answers


def test_answers_are_those_of_generate_whatever_was_asked_before(loaded, by_generate, tmp_path):
    """The projector that one run trained in full is neither the base's nor the other's; nor in two tabs at once."""
    (lora, projector), answers = loaded
    tuned, base, by_example = compare.TUNED, compare.BASE, {}
    jobs = [(lora, tuned), (projector, base), (projector, tuned), (lora, base)]
    for run, side in jobs:
        for line in by_generate(run, side):
            by_example.setdefault((line["question"], line["reference"]), {})[run.name, side] = line["prediction"]
    example = next(one for one in lora.examples if len(set(by_example[one[1:]].values())) == 3)
    want = by_example[example[1:]]
    example[0].save(tmp_path / "asked.png")

    def ask(run, side):
        return answer(answers, run, side, example[1], tmp_path / "asked.png")[-1]

    for run, side in [*jobs, *jobs[::-1], (projector, tuned), (lora, tuned)]:
        assert ask(run, side) == want[run.name, side]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, *zip(*jobs * 2)))
    assert found == [want[run.name, side] for run, side in jobs * 2]


def test_examples_are_of_the_rows_held_out(loaded):
    """Of those that begin with a question about one picture."""
    for run in loaded[0]:
        rows = load_data(run.recipe, run.settings, run.training)[1]
        expected = []
        for row in rows:
            turns = run.collator.messages_of(row)
            images = [part["image"].tobytes() for part in turns[0]["content"] if part["type"] == "image"]
            if len(images) == 1:
                expected.append((images[0], *map(run.recipe.text_of, turns[:2])))
        assert [(image.tobytes(), *texts) for image, *texts in run.examples] == expected and len(expected) > 2


def test_answers_are_streamed_and_can_be_stopped(loaded, monkeypatch):
    (run, _), answers = loaded
    monkeypatch.setattr(answers.args, "max_new_tokens", 40)
    batch, stop = answers.prepare(run, None, "Is three odd?"), threading.Event()
    pieces = list(answers.stream(run, compare.BASE, batch, stop))
    assert len(set(pieces)) > 2 and pieces[-1].startswith(pieces[0])
    short = []
    for piece in answers.stream(run, compare.BASE, batch, stop):
        short.append(piece)
        stop.set()
    assert len(short[-1]) < len(pieces[-1]) and not answers.lock.locked()
    assert answer(answers, run, compare.BASE)[-1] == pieces[-1]


def test_a_failure_of_the_model_is_raised_and_the_next_question_is_answered(loaded, monkeypatch):
    (run, _), answers = loaded
    failing = mock.Mock(side_effect=RuntimeError("out of memory"))
    want = answer(answers, run, compare.TUNED)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(answers.model, "generate", failing)
        answer(answers, run, compare.BASE)
    assert answer(answers, run, compare.TUNED) == want


def test_minicpm_26_is_shown_at_once(tiny_minicpm26, tmp_path, by_generate):
    settings = {name: value for name, value in SHORT.items() if name != "load_in_4bit"} | {"max_steps": 2}
    finetune_minicpm_lora.main(minicpm_run(tiny_minicpm26, tmp_path / "run", **settings, eval_fraction=0.1))
    (run,), answers = load(tmp_path / "run", "--examples", 2, "--trust_remote_code")
    assert len(check_both_answers(run, answers, by_generate, tmp_path, "--trust_remote_code")) == 1


@pytest.mark.parametrize("kind", ["joined", "instruct", "align"])
def test_what_is_beneath_a_run_from_parts(tiny_parts, tmp_path, by_generate, kind):
    """An adapter on joined parts, in a folder that was moved: no model of that name is anywhere else. Whole models,
    trained from a stage-1 model, or joined from parts with nothing but the projector trained: what training did not
    change is in memory once. Nothing is written."""
    settings = {**SHORT, "eval_fraction": 0.1, "learning_rate": 1e-2, "max_steps": 2}
    if kind == "joined":
        settings |= {"pretrain_mm_mlp_adapter": tiny_parts / "align", "lora_r": 4}
    elif kind == "align":
        settings |= {"learning_rate": None, "projector_learning_rate": 1e-1}
    stage = "align" if kind == "align" else "instruct"
    llava_two_stage.main(two_stage_run(tiny_parts, tmp_path / "run", stage, **settings))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "moved").rglob("*")}
    (run,), answers = load(tmp_path / "moved")
    assert run.label == "moved" and run.is_whole == (kind != "joined")
    check_both_answers(run, answers, by_generate, tmp_path)
    assert not (tmp_path / "run").exists()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "moved").rglob("*")}
    if kind == "joined":
        assert run.base == str(tmp_path / "moved/base")
        return

    def is_shared(part):
        weights = [model.get_submodule(part).parameters() for model in (answers.base, answers.model)]
        return {ours.data_ptr() == theirs.data_ptr() for ours, theirs in zip(*weights)}

    assert is_shared("model.vision_tower") == {True} and is_shared("model.multi_modal_projector") == {False}
    assert is_shared("model.language_model.layers") == {kind == "align"}


def test_without_its_data_a_run_has_no_examples(runs, tmp_path, capsys):
    (run,) = load_runs(runs / "lora", "--dataset_name", tmp_path / "gone.json")[1]
    assert run.examples == [] and "note: no examples of lora" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("picture", "question", "message"),
    [
        (None, " \n", "no question yet"),
        (None, "x" * 4001, "too long: 4001 characters, 4000 are taken"),
        (None, "why " * 900, r"too long: \d+ tokens with the picture, the model reads \d+"),
        (None, "What is <image>?", "`<image>` in the question"),
        ("truncated.jpg", "What is this?", r"unreadable image: the picture \("),
    ],
)
def test_what_cannot_be_asked_gets_a_message(loaded, odd_images, tmp_path, picture, question, message):
    (run, _), answers = loaded
    with pytest.raises(compare.Refused, match=message) as refused:
        answers.prepare(run, picture and str(tmp_path / picture), question)
    assert str(tmp_path) not in str(refused.value) and "--" not in str(refused.value)


# --------------------------------------------------------------------------------------------------------------- votes

BOTH = {compare.BASE: "A cat and two cushions.", compare.TUNED: "A cat."}


def test_votes_are_pairs_that_dpo_reads(tmp_path, tiny_pairs):
    """Also after a restart, and after an editor that left no line end; a picture is kept once."""
    path, picture = tmp_path / "votes.jsonl", Image.effect_noise((64, 64), 90).convert("RGB")
    pictures, sides = [picture, picture, picture.rotate(90)], [compare.TUNED, compare.BASE, compare.TUNED]
    for n, (image, better) in enumerate(zip(pictures, sides)):
        if path.exists():
            path.write_text(path.read_text().removesuffix("\n"))
        compare.Votes(path).add(image, f"What is thís, {n}?", BOTH, better, run="out/lora", base="tiny")
    assert path.read_text().endswith("\n") and len(list((tmp_path / "votes-images").iterdir())) == 2
    votes = compare.Votes(path)
    text, last = votes.summary()
    assert "**3 votes**" in text and "| lora | 2 | 1 |" in text and last == lines(path)[-1]
    rows = Recipe("dpo_idefics2", tiny_pairs, tmp_path).load_data(dataset_name=path, eval_strategy="no")[0]
    for n, (row, image, better) in enumerate(zip(rows, pictures, sides, strict=True)):
        other = BOTH[compare.BASE if better == compare.TUNED else compare.TUNED]
        assert (row["question"], row["chosen"], row["rejected"]) == (f"What is thís, {n}?", BOTH[better], other)
        read = dpo_idefics2.load_image(*dpo_idefics2.as_image_list(row["image"], row["folder"]))
        assert read.tobytes() == image.tobytes()
    path.write_text("gone")
    assert "cannot be read any more" in votes.summary()[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "about one picture"),
        ({"image": Image.new("RGB", (1000, 49))}, "narrower"),
        ({"answers": dict.fromkeys(BOTH, "A cat.")}, "equal"),
        ({"answers": BOTH | {compare.TUNED: ""}}, "empty"),
    ],
)
def test_what_is_no_pair_is_not_written_and_said(tmp_path, change, message):
    votes = compare.Votes(tmp_path / "votes.jsonl")
    row = {"image": Image.new("RGB", (64, 64)), "question": "x", "answers": BOTH, "better": compare.BASE} | change
    with pytest.raises(compare.Refused, match=message):
        votes.add(**row)
    assert not list(tmp_path.iterdir()) and votes.summary() == ("No votes yet in `votes.jsonl`", None)


# ------------------------------------------------------------------------------------------------------------ mistakes


def copy(run, out):
    return shutil.copytree(run, out, ignore=shutil.ignore_patterns("checkpoint-*"))


def change(file, **more):
    read, write = (yaml.safe_load, yaml.safe_dump) if file.suffix == ".yaml" else (json.loads, json.dumps)
    file.write_text(write(read(file.read_text()) | more))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["NOWHERE"], "no such folder"),
        (["WHOLE", "--use_cpu"], "is a whole model, and what it was trained from is not said"),
        (["RUN", "WHOLE", "--use_cpu", "--model_name_or_path", "MOVED"], "no adapter: start the page for it alone"),
        (["FOREIGN"], "FOREIGN is one for somebody/else-7b, settings.yaml says"),
        (["RUN", "OTHER"], "OTHER is of MOVED: one model is in memory, start the page for each"),
        (["RUN", "QUANTIZED"], "has load_in_4bit False,"),
        (["RUN", "--recipe", "LESS"], "it has no check, load_processor, .*BadRow, Settings, Collator.messages_of"),
        (["RUN", "--port", "TAKEN"], "choose another --port"),
        (["RUN", "--port", "70000"], "--port 70000"),
        (["RUN", "--votes", "votes.json"], "must end in .jsonl"),
        (["RUN", "--votes", "PREDICTIONS"], "exists, and is no file of votes: line 1 has no image"),
    ],
)
def test_mistakes_get_one_message(runs, tiny_llava, tmp_path, argv, message):
    run = runs / "lora"
    paths = {"NOWHERE": tmp_path / "nowhere", "RUN": run, "WHOLE": tiny_llava / "model"}
    paths["MOVED"] = shutil.copytree(tiny_llava / "model", tmp_path / "base")
    for name in ("FOREIGN", "OTHER", "QUANTIZED"):
        paths[name] = copy(run, tmp_path / name)
    change(paths["FOREIGN"] / "adapter_config.json", base_model_name_or_path="somebody/else-7b")
    change(paths["OTHER"] / "adapter_config.json", base_model_name_or_path=str(paths["MOVED"]))
    change(paths["OTHER"] / "settings.yaml", model_name_or_path=str(paths["MOVED"]))
    change(paths["QUANTIZED"] / "settings.yaml", load_in_4bit=True)
    paths |= {"LESS": tmp_path / "less.py", "PREDICTIONS": tmp_path / "p.jsonl"}
    paths["LESS"].write_text("class Collator: ask = print\ndef parse(argv): pass\n")
    paths["PREDICTIONS"].write_text('{"row": 0}\n')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        paths["TAKEN"] = taken.getsockname()[1]
        own = ["--port", free_port(), "--votes", tmp_path / "votes.jsonl", "--examples", 0]  # given again, it wins
        for name in ("OTHER", "MOVED", "FOREIGN"):
            message = message.replace(name, str(paths[name]))
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            compare.main([str(paths.get(word, word)) for word in (*own, *argv)])


def test_another_place_of_the_base_is_said(runs, tmp_path, tiny_llava, capsys):
    moved = shutil.copytree(tiny_llava / "model", tmp_path / "moved")
    load(runs / "lora", "--examples", 0, "--model_name_or_path", moved)
    assert f"was trained on {tiny_llava / 'model'}, it is put on {moved}" in capsys.readouterr().err


def test_without_gradio_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"^error: .*pip install --no-deps -r requirements-compare\.txt$"):
        compare.load_gradio()


# ------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def served(learnt, tmp_path_factory):
    """The program, as a user starts it, for the run that knows 16 forms by heart."""
    out, port = tmp_path_factory.mktemp("served"), free_port()
    (out / "tmp").mkdir()
    command = [sys.executable, ROOT / "tools/compare.py", learnt / "run", "--port", port, "--votes"]
    command += [out / "votes.jsonl", "--max_new_tokens", 8, "--max_upload", 1]
    with open(out / "log", "w") as log:
        environment = {**os.environ, "TMPDIR": str(out / "tmp")}
        program = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=environment)
    until = time.monotonic() + 300
    while "open http" not in (out / "log").read_text():
        assert program.poll() is None and time.monotonic() < until, (out / "log").read_text()[-3000:]
        time.sleep(0.2)
    yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, votes=out / "votes.jsonl", pid=program.pid)
    program.terminate()
    assert program.wait(180) == 0 and not list((out / "tmp").glob("compare-*"))


def get(served, path, body=None):
    """The page's answer to a path, which is sent as it is, and to a JSON body, if there is one: (status, bytes)."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=120)) as connection:
        options = {"body": json.dumps(body), "headers": {"Content-Type": "application/json"}} if body else {}
        connection.request("POST" if body else "GET", path, **options)
        response = connection.getresponse()
        return response.status, response.read()


def page_of(served):
    """What the page is made of, as it tells every browser."""
    return json.loads(get(served, "/config")[1])


def test_it_listens_on_this_machine_only(served):
    found = psutil.Process(served.pid).net_connections()
    assert {one.laddr for one in found if one.status == psutil.CONN_LISTEN} == {("127.0.0.1", served.port)}


def test_it_serves_no_file_but_its_own(served, learnt):
    """By any of Gradio's ways to files: those of the run, of its data, of this repository and of the system. A picture
    of the examples, which the page itself made, shows that the first of these ways is one."""
    (examples,) = [part for part in page_of(served)["components"] if part["type"] == "dataset"]
    own = examples["props"]["samples"][0][0]["path"]
    status, picture = get(served, f"/gradio_api/file={own}")
    assert status == 200 and picture.startswith(b"\x89PNG")
    image = next((learnt / "images").glob("*.png"))
    files = [learnt / "run/settings.yaml", learnt / "train.json", image, ROOT / "README.md", "/etc/passwd"]
    for file in map(Path, files):
        up = "../" * 20 + str(file).lstrip("/")
        hidden = up.replace("/", "%2f").replace(".", "%2e")
        names = [file, os.path.relpath(file, ROOT), f"{os.path.dirname(own)}/{up}", hidden]
        paths = [f"{way}{name}" for way in ("/gradio_api/file=", "/file=", "/gradio_api/file/") for name in names]
        paths += [f"{way}{name}" for way in ("/static/", "/assets/", "/svelte/") for name in (up, hidden)]
        paths += [f"/gradio_api/proxy=file://{file}", f"/gradio_api/stream/x/0/1/{hidden}", f"/{up}"]
        secret = file.read_bytes()[:40]
        for path in paths:
            status, text = get(served, path)
            assert 400 <= status < 500 and secret not in text, (path, status)


def test_it_asks_about_no_picture_of_another_place(served, learnt):
    """A path that somebody sends, instead of an uploaded picture or an example's."""
    page = page_of(served)
    (button,) = [part["id"] for part in page["components"] if part["props"].get("elem_id") == "ask"]
    asking = next(part["id"] for part in page["dependencies"] if [button, "click"] in part["targets"])
    (examples,) = [part for part in page["components"] if part["type"] == "dataset"]
    own, other = examples["props"]["samples"][0][0]["path"], next((learnt / "images").glob("*.png"))
    answers = []
    for path in (own, other):
        picture = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        body = {
            "data": [picture, "What is the total?", "run", False, ""],
            "fn_index": asking,
            "session_hash": str(path),
        }
        assert get(served, "/gradio_api/queue/join", body)[0] == 200
        answers.append(get(served, f"/gradio_api/queue/data?session_hash={path}")[1].decode())
    assert '"success":true' in answers[0] and "Which answer is better?" in answers[0]
    assert '"success":false' in answers[1] and "Answering" not in answers[1]


@pytest.fixture
def browser():
    """The page in Chromium, and what was visited; with the few things that the test does again and again."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here to open the page with: apt install chromium")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=120_000)
    with (
        sync_playwright() as playwright,
        contextlib.closing(playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])) as chromium,
    ):
        yield Browser(chromium.new_page(), expect)


class Browser:
    def __init__(self, page, expect):
        self.page, self.expect, self.visited = page, expect, []
        page.on("request", lambda request: self.visited.append(request.url))

    def box(self, name):
        return self.page.locator(f"#{name} textarea, #{name} input").first

    def value(self, name):
        return self.box(name).input_value()

    def shows(self, name, text):
        self.expect(self.page.locator(f"#{name}")).to_contain_text(text)

    def ask(self, status="Which answer is better?"):
        self.page.locator("#ask").click()
        self.shows("status", status)

    def upload(self, file):
        self.page.set_input_files("#picture input[type=file]", file)


def test_in_a_browser(browser, served, learnt):
    """Pick an example, ask, see both answers, vote, reload; blind; and what cannot be taken."""
    page, expect = browser.page, browser.expect
    page.goto(served.url)
    browser.shows("votes", "No votes yet in votes.jsonl")
    expect(page.locator("#vote-left")).to_be_disabled()
    browser.ask("There is no question yet")

    known = {row["question"] for row in json.loads((learnt / "held_out.json").read_text())[:16]}
    rows = page.locator("#examples tbody tr")
    number = next(n for n, text in enumerate(rows.all_inner_texts()) if any(question in text for question in known))
    rows.nth(number).click()
    expect(browser.box("question")).not_to_have_value("")
    expect(page.locator("#picture img")).to_be_visible()
    question, reference = browser.value("question"), browser.value("reference")
    browser.ask()
    answers = {"base": browser.value("left"), "fine-tuned": browser.value("right")}
    assert all(answers.values()) and answers["base"] != answers["fine-tuned"] and reference
    page.locator("#vote-right").click()
    browser.shows("status", "Written: the fine-tuned answer is better.")
    browser.shows("votes", "1 vote in votes.jsonl")
    expect(page.locator("#vote-left")).to_be_disabled()
    (vote,) = lines(served.votes)
    assert (vote["question"], vote["preferred"]) == (question, "fine-tuned")
    assert (vote["chosen"], vote["rejected"]) == (answers["fine-tuned"], answers["base"])
    assert vote["reference"] == reference and vote["run"] == str(learnt / "run") and vote["blind"] is False
    page.reload()
    browser.shows("votes", "1 vote in votes.jsonl")
    browser.shows("last", vote["image"])

    # blind: a picture of one's own, names only after the vote
    browser.upload(served.votes.parent / vote["image"])
    expect(page.locator("#picture img")).to_be_visible()
    browser.box("question").fill(question)
    page.locator("#blind input").check()
    browser.ask()
    browser.shows("left", "Answer A")
    assert {browser.value("left"), browser.value("right")} == set(answers.values())
    page.locator("#vote-left").click()
    browser.shows("votes", "2 votes in votes.jsonl")
    vote = lines(served.votes)[1]
    assert vote["blind"] and "reference" not in vote
    assert vote["chosen"] == browser.value("left") == answers[vote["preferred"]]
    names = {"base": f"Base: {learnt.name}/model", "fine-tuned": "Fine-tuned: run"}  # which is left is shuffled
    browser.shows("left", names.pop(vote["preferred"]))
    browser.shows("right", *names.values())

    browser.ask()
    page.locator("#vote-tie").click()
    browser.shows("status", "A tie: no pair was written")
    assert len(lines(served.votes)) == 2


def test_the_browser_says_what_cannot_be_taken(browser, served, learnt, tmp_path):
    """And has asked nobody but this machine."""
    page, expect = browser.page, browser.expect
    (tmp_path / "broken.png").write_bytes(next((learnt / "images").glob("*.png")).read_bytes()[:200])
    page.goto(served.url)
    browser.shows("votes", "otes")
    with page.expect_response(re.compile("/upload")):
        browser.upload(tmp_path / "broken.png")
    expect(page.locator("#picture img")).to_have_count(1)
    browser.box("question").fill("What is the total?")
    browser.ask("unreadable image: the picture")
    expect(page.locator("#vote-left")).to_be_disabled()
    Image.effect_noise((1200, 1200), 90).save(tmp_path / "large.png")  # above the 1 MB that are taken
    page.reload()
    browser.upload(tmp_path / "large.png")
    expect(page.locator("body")).to_contain_text(re.compile("exceed|too large|maximum", re.IGNORECASE))
    assert all(url.startswith((served.url, "data:", "blob:")) for url in browser.visited), browser.visited
