"""Recipes in processes of their own: two that train as one, the one file alone, pictures that vanish under loaders."""

import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, log
from launched import free_port
from PIL import Image
from recipes import Recipe
from runs import VARIANTS, Runs
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    return Runs(request, tmp_path_factory)


# ------------------------------------------------------------------------------------------------------ two processes
# Eleven rows, four a step: the third and last step of an epoch has three, and its last row is for one process only.
RUN = {"max_steps": 5, "eval_steps": 2, "save_steps": 2, "save_total_limit": 9, "gradient_accumulation_steps": 2}
RUN |= {"learning_rate": 1e-4, "max_eval_rows": 5, "sample_rows": 5}
STILL = {"lora_dropout": 0}
JOINED = {"projector_learning_rate": 1e-3, "ddp_find_unused_parameters": False}  # a row without pictures uses all, too
TWO = {  # a variant of runs.py -> what differs here
    "sft: float": STILL,
    "sft: 4-bit": STILL,
    "sft: float, projector": STILL,
    "docvqa: float": STILL,
    "docvqa: 4-bit": STILL,
    "dpo: float": {"loss_type": ["sigmoid", "sft"]},
    "dpo: 4-bit": {},
    "4.6: lora": STILL,
    "4.7: full": {},
    "2.6: vision": STILL,
    "align": JOINED | {"learning_rate": None},
    "instruct: full": JOINED,
    "instruct: lora, joined": JOINED | STILL,
}
TIMES = re.compile("runtime|per_second|flos")


def one_of_two(rank, port, file, main, argv):
    """Run main as torchrun would in one of two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)  # a run in the process of the tests has made one
    with open(file, "w") as sys.stdout:
        main(argv)


def in_two_processes(main, argv, folder, expected=(0, 0)):
    """Run main(argv) in two processes that train together, and end with these codes. Returns what each printed."""
    folder.mkdir()
    port = free_port()
    context = multiprocessing.get_context("fork")  # a new Python would need seconds to import
    files = [folder / f"{rank}.txt" for rank in range(2)]
    both = [context.Process(target=one_of_two, args=(rank, port, files[rank], main, argv)) for rank in range(2)]
    for process in both:
        process.start()
    allowed = {None, *expected}
    while any(process.is_alive() for process in both) and all(process.exitcode in allowed for process in both):
        time.sleep(0.05)
    codes = [process.exitcode for process in both]
    for process in both:
        process.kill()  # if the other one failed, it would wait for it
        process.join()
    assert codes == list(expected)
    return [file.read_text() for file in files]


def by_length(answer, accepted):
    """A score that is another one for each answer, and for each row."""
    return {"anls": len(answer) + 0.01 * len(accepted[0]), "exact_match": 1.0}


@pytest.mark.parametrize("variant", TWO)
def test_two_processes_train_like_one(variant, runs, tmp_path, monkeypatch):
    """Each has one row at a time, so that one may have a picture while the other has none. Of five rows that are
    evaluated one has three, the other two, in batches of other sizes than one process has."""
    case = Recipe(VARIANTS[variant].recipe, runs.folder(variant), tmp_path)
    rows = "captions-test" if "align" in variant else "test"
    settings = {**RUN, "eval_dataset_name": case.folder / "json" / f"{rows}.json", **TWO[variant]}
    train = json.loads((runs.rows(case.name) / f"{'captions' if 'align' in variant else 'train'}.json").read_text())
    assert len(train) == 12
    (tmp_path / "train.json").write_text(json.dumps(train[:11]))
    settings["dataset_name"] = tmp_path / "train.json"
    if case.name == "idefics2_docvqa":
        monkeypatch.setattr(case.module, "score", by_length)
    alone = {**settings, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    argv = runs.argv(variant, tmp_path / "two", **alone)
    printed, silent = in_two_processes(case.module.main, argv, tmp_path / "printed")
    for words in ("11 rows to train on", " as the model sees it", "5 steps of 4 rows", "saved "):
        assert printed.count(words) == 1
    assert silent == ""

    double = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3}
    one = runs.run(variant, tmp_path / "one", **settings, **double)
    names = {name for entry in one.trainer.state.log_history for name in entry if not TIMES.search(name)}
    assert {"loss", "grad_norm", "eval_loss"} < names
    for name in names:
        assert log(tmp_path / "two", name) == pytest.approx(log(one.out, name), rel=1e-4, abs=1e-4), name
    assert (tmp_path / "two" / "samples.md").read_text() == (one.out / "samples.md").read_text()
    files = [next((tmp_path / name).glob("*model.safetensors")) for name in ("one", "two")]
    torch.testing.assert_close(load_file(files[0]), load_file(files[1]), atol=1e-3, rtol=1e-3)

    again = {"resume_from_checkpoint": tmp_path / "two" / "checkpoint-4"}
    in_two_processes(case.module.main, runs.argv(variant, tmp_path / "again", **alone, **again), tmp_path / "printed2")
    for name in ("loss", "grad_norm"):  # in the second epoch, whose order is not the first one's
        assert log(tmp_path / "again", name) == log(tmp_path / "two", name)


def on_two_machines(file, argv, folders):
    """Run a recipe by an agent of torchrun in each folder, with one process, as configs/skypilot.yaml starts them."""
    agents, port = [], str(free_port())
    for rank, folder in enumerate(folders):
        meet = ["--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1"]
        meet += ["--master_addr", "127.0.0.1", "--master_port", port]
        command = [sys.executable, "-m", "torch.distributed.run", *meet, file, *map(str, argv)]
        with open(folder / "printed.txt", "w") as output:
            agents.append(subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT))
    codes = [agent.wait(timeout=200) for agent in agents]
    printed = [(folder / "printed.txt").read_text() for folder in folders]
    assert codes == [0, 0], "\n".join(text[-2000:] for text in printed)
    return printed


@pytest.mark.parametrize("variant", ["sft: 4-bit"])
def test_two_machines_train_like_one(variant, runs, tmp_path):
    """Each with a disk of its own, on which it finds what it needs to resume."""
    module, settings = runs.module(variant), {**RUN, **STILL, "max_steps": 3, "eval_strategy": "no"}
    alone = {**settings, "per_device_train_batch_size": 1, "save_on_each_node": True}
    argv = runs.argv(variant, "out", **alone)
    machines = [tmp_path / "first", tmp_path / "second"]
    for folder in machines:
        folder.mkdir()
    printed = on_two_machines(module.__file__, argv, machines)
    assert all("3 steps of 4 rows" in text for text in printed)  # the first process of each machine says it
    one = runs.run(variant, tmp_path / "one", **settings, per_device_train_batch_size=2)

    def is_like_one():
        for name, folder in itertools.product(("loss", "grad_norm"), machines):
            assert log(folder / "out", name) == pytest.approx(log(one.out, name), rel=1e-4, abs=1e-4), name

    is_like_one()
    for folder in machines:  # as if they had been taken away after step 2
        (folder / "out" / "trainer_state.json").unlink()
        shutil.rmtree(folder / "out" / "checkpoint-3")
    printed = on_two_machines(module.__file__, argv, machines)
    assert all("resuming from out/checkpoint-2" in text for text in printed)
    is_like_one()


ONE_OF_EACH = {name: TWO[name] for name in ("sft: float", "docvqa: float", "dpo: float", "4.6: lora", "align")}


@pytest.mark.parametrize("variant", ONE_OF_EACH)
def test_a_run_goes_on_with_another_number_of_processes(variant, runs, tmp_path):
    """From one to two, and back: a step keeps its rows, by another accumulation, and the rest of the log is the same.
    Where that is impossible, the run is refused."""
    case = Recipe(VARIANTS[variant].recipe, runs.folder(variant), tmp_path)
    settings = {**RUN, **ONE_OF_EACH[variant], "per_device_train_batch_size": 1, "per_device_eval_batch_size": 2}
    flags = {"four": {**settings, "gradient_accumulation_steps": 4}, "two": settings}
    one = runs.run(variant, tmp_path / "one", **flags["four"])
    in_two_processes(case.module.main, runs.argv(variant, tmp_path / "two", **flags["two"]), tmp_path / "printed")

    def copy_half(name, out):
        """A run as it was at step 2."""
        shutil.copytree(tmp_path / name / "checkpoint-2", tmp_path / out / "checkpoint-2")
        shutil.copy(tmp_path / name / "settings.yaml", tmp_path / out)

    copy_half("one", "one to two")
    argv = runs.argv(variant, tmp_path / "one to two", **flags["four"])
    printed = in_two_processes(case.module.main, argv, tmp_path / "printed 2")[0]
    assert "processes 1 -> 2: gradient_accumulation_steps 4 -> 2, so that a step keeps its 4 rows" in printed
    assert f"5 steps of 4 rows, 1.67 epochs; resuming from {tmp_path}/one to two/checkpoint-2" in printed
    assert "# Processes: 2\n" in (tmp_path / "one to two" / "settings.yaml").read_text()

    copy_half("two", "two to one")
    text = runs.run(variant, tmp_path / "two to one", **flags["two"]).text
    assert "processes 2 -> 1: gradient_accumulation_steps 2 -> 4, so that a step keeps its 4 rows" in text
    for name in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        for out in ("one to two", "two to one"):
            assert log(tmp_path / out, name) == pytest.approx(log(one.out, name), rel=1e-4, abs=1e-4), (name, out)

    copy_half("two", "refused")
    with pytest.raises(SystemExit) as stopped:
        case.module.main(
            runs.argv(variant, tmp_path / "refused", **{**flags["two"], "per_device_train_batch_size": 3})
        )
    assert re.search("rows in a step 4 -> 6, 3 at once on each of 1 processes", stopped.value.code)


@pytest.mark.parametrize("variant", ONE_OF_EACH)
def test_a_run_goes_on_with_a_smaller_batch(variant, runs, tmp_path):
    """As after one that ran out of memory. A step keeps its rows, by another accumulation, so the log is the same."""
    settings = {**RUN, **ONE_OF_EACH[variant], "gradient_accumulation_steps": None}
    large = {**settings, "per_device_train_batch_size": 4, "rows_per_step": 4}
    one = runs.run(variant, tmp_path / "one", **large)
    (tmp_path / "two").mkdir()
    shutil.copytree(tmp_path / "one" / "checkpoint-2", tmp_path / "two" / "checkpoint-2")
    text = (tmp_path / "one" / "settings.yaml").read_text().replace("rows_per_step: 4", "rows_per_step: null")
    (tmp_path / "two" / "settings.yaml").write_text(text)
    two = runs.run(variant, tmp_path / "two", **settings, per_device_train_batch_size=2)
    said = r"per_device_train_batch_size 4 -> 2: gradient_accumulation_steps \d+ -> 2, so that a step keeps its 4 rows"
    assert re.search(said, two.text)
    for name in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        assert log(two.out, name) == pytest.approx(log(one.out, name), rel=1e-4, abs=1e-4), name


def test_a_loss_that_compares_the_pairs_of_a_batch_keeps_it(runs, tmp_path):
    settings = {**RUN, "loss_type": "aot", "gradient_accumulation_steps": None, "rows_per_step": 4}
    runs.run("dpo: float", tmp_path / "out", **settings, per_device_train_batch_size=4)
    with pytest.raises(SystemExit, match="per_device_train_batch_size 4 -> 2"):
        runs.run("dpo: float", tmp_path / "out", **settings, per_device_train_batch_size=2)


# ------------------------------------------------------------------------------------------------ the one file alone
def started_alone(folder, *argv, launcher=()):
    """Run a program in a folder, where nothing else of this project is found. Returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *launcher, *map(str, argv)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("variant", ["sft: 4-bit", "docvqa: 4-bit", "dpo: 4-bit", "2.6: lora"])
def test_the_recipe_alone_in_an_empty_folder_gives_the_same_run(variant, runs, tmp_path):
    file = f"{VARIANTS[variant].recipe}.py"
    shutil.copy(ROOT / file, tmp_path)
    printed = started_alone(tmp_path, file, *runs.argv(variant, "out"))
    assert {path.name for path in tmp_path.iterdir()} == {file, "out"}
    assert log(tmp_path / "out") == pytest.approx(log(runs.trained(variant).out), abs=1e-6)
    assert "saved out: model or adapter" in printed


def projector(folder):
    """The weights of the projector in a saved LLaVA."""
    return {name: p for name, p in load_file(folder / "model.safetensors").items() if "multi_modal_projector" in name}


def test_both_stages_alone_in_a_folder_with_their_data(runs, tiny_parts, tmp_path):
    """The second, which torchrun starts in two processes, finds what the first one made by a name that nobody gave."""
    shutil.copy(ROOT / "llava_two_stage.py", tmp_path)
    shutil.copytree(runs.rows("llava_two_stage"), tmp_path, dirs_exist_ok=True)
    for part in ("vision", "language"):
        shutil.copytree(tiny_parts / part, tmp_path / part)
    before = set(os.listdir(tmp_path))
    flags = (
        "--use_cpu --max_steps 2 --logging_steps 1 --dataloader_num_workers 0 --image_folder images --report_to none"
    )
    align = "--stage align --dataset_name captions.json --vision_tower vision --language_model language"
    printed = started_alone(tmp_path, "llava_two_stage.py", *align.split(), *flags.split())
    assert "2 steps of 256 rows" in printed and "saved llava-align: model or adapter" in printed
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    instruct = "--stage instruct --dataset_name train.json"
    printed = started_alone(tmp_path, "llava_two_stage.py", *instruct.split(), *flags.split(), launcher=launcher)
    assert printed.count("2 steps of 128 rows") == printed.count("saved llava-instruct: model or adapter") == 1
    assert set(os.listdir(tmp_path)) == before | {"llava-align", "llava-instruct"}
    assert list(log(tmp_path / "llava-align")) == list(log(tmp_path / "llava-instruct")) == [1, 2]
    first, second = projector(tmp_path / "llava-align"), projector(tmp_path / "llava-instruct")
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)  # two steps at 2e-5


# ------------------------------------------------------------------------- rows that turn out unreadable in training
@pytest.mark.parametrize("variant", ["sft: float", "docvqa: float", "dpo: float", "4.6: lora", "instruct: full"])
def test_two_processes_agree_on_a_row_that_cannot_be_read(variant, runs, tmp_path, monkeypatch):
    """With skip they train like one process; with stop both end before the same step."""
    case = Recipe(VARIANTS[variant].recipe, runs.folder(variant), tmp_path)
    for name, value in (("MOST_SECONDS", 0), ("ROWS_TO_TIME", 1), ("ROWS_OF_A_SAMPLE", 1), ("LARGEST_ROWS", 1)):
        monkeypatch.setattr(case.module, name, value)
    shutil.copytree(runs.rows(case.name), tmp_path, dirs_exist_ok=True)
    rows = json.loads((tmp_path / "train.json").read_text())[:8]
    one_picture = [number for number, row in enumerate(rows) if isinstance(row.get("image"), str) and number > 1]
    number = min(
        one_picture, key=lambda number: len(str(rows[number]))
    )  # the first, the longest, and by seed 1, are decoded first
    rows[number]["image"] = "bad.jpg"
    bad = tmp_path / "images" / "bad.jpg"
    Image.effect_noise((64, 64), 90).save(bad)
    bad.write_bytes(bad.read_bytes()[:-500])  # its header can be read
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = {
        **TWO[variant],
        "dataset_name": tmp_path / "rows.json",
        "image_folder": tmp_path / "images",
        "max_steps": 4,
    }
    settings |= {"eval_strategy": "no", "load_best_model_at_end": False, "save_steps": 9}
    if case.name == "llava_two_stage":
        settings["group_by_modality_length"] = False
    half = {**settings, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}

    argv = runs.argv(variant, tmp_path / "two", **half, on_bad_rows="skip")
    printed, _ = in_two_processes(case.module.main, argv, tmp_path / "printed")
    assert "1 rows could not be trained on" in printed and f"  row {number}: unreadable image" in printed
    one = runs.run(variant, tmp_path / "one", **half | {"per_device_train_batch_size": 2}, on_bad_rows="skip")
    assert log(tmp_path / "two") == pytest.approx(log(one.out), rel=1e-4, abs=1e-4) and len(log(one.out)) == 4

    in_two_processes(case.module.main, runs.argv(variant, tmp_path / "stop", **half), tmp_path / "printed2", (1, 1))
    saved = [path.name for path in (tmp_path / "stop").glob("checkpoint-*")]
    resumed = runs.argv(variant, tmp_path / "stop", **half, on_bad_rows="skip")
    printed, _ = in_two_processes(case.module.main, resumed, tmp_path / "printed3")
    assert len(saved) <= 1 and all(name in printed for name in saved)
    assert log(tmp_path / "stop") == pytest.approx(log(tmp_path / "two"))


# ------------------------------------------------------------------------------------------------ pictures that vanish
@pytest.mark.parametrize("rows, workers", [("-held", 0), ("", 2)], ids=["evaluated", "trained on, by loaders"])
@pytest.mark.parametrize("variant", ["sft: 4-bit", "docvqa: 4-bit", "dpo: 4-bit", "4.6: lora", "2.6: lora", "align"])
def test_a_picture_that_vanishes_ends_the_run_with_one_message(variant, rows, workers, runs, tmp_path, monkeypatch):
    case = Recipe(VARIANTS[variant].recipe, runs.folder(variant), tmp_path)
    shutil.copytree(runs.rows(case.name), tmp_path, dirs_exist_ok=True)
    name = "captions" if variant == "align" else "train"
    pictures = [row.get("image") for row in json.loads((tmp_path / f"{name}{rows}.json").read_text())]
    picture = next(picture for picture in pictures if isinstance(picture, str))
    load_model = case.module.load_model

    def vanish(*args):
        (tmp_path / "images" / picture).unlink()
        return load_model(*args)

    monkeypatch.setattr(case.module, "load_model", vanish)
    settings = {"dataset_name": tmp_path / f"{name}.json", "eval_dataset_name": tmp_path / f"{name}-held.json"}
    settings |= {"image_folder": tmp_path / "images", "dataloader_num_workers": workers}
    with pytest.raises(SystemExit) as stopped:
        case.module.main(runs.argv(variant, tmp_path / "out", **settings))
    message = stopped.value.code
    problem = r"row \d+ cannot be trained on" if workers else "the data changed during the run"
    assert re.match(rf"error: {problem}: unreadable image: .*{re.escape(picture)}", message)
    assert message.count("\n") <= 1
