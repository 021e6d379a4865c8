"""benchmarks/gpu_first.py: whole on a CPU for one recipe, in forks of this process; what fails or hangs ends alone;
bars that are missed make the exit status 1."""

import contextlib
import json
import math
import multiprocessing
import os
import runpy
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import full_size  # noqa: E402
import gpu_first  # noqa: E402
import gpu_first_bars as bars  # noqa: E402

GB = 10**9
POPEN = subprocess.Popen


class Forked:
    """Stands in for subprocess.Popen: runs a Python program in a fork, which need not import torch again."""

    def __init__(self, words, stdout, env, cwd, **options):
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self.run, args=(words[1:], stdout, env, cwd))
        self.process.start()
        self.pid = self.process.pid

    @staticmethod
    def run(words, log, environment, folder):
        subprocess.Popen = POPEN
        os.setsid()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)

    def terminate(self):
        self.process.terminate()


def has_ended(pid):
    """Whether a process ends within some seconds; one that nobody has waited for counts as ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for _ in range(100):
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.1)
        return False
    return True


def records_in(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- all of it, on a CPU


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(exit status, folder) of a run of all parts for one recipe."""
    out = tmp_path_factory.mktemp("first") / "out"
    flags = ["--cpu", "--recipes", "sft_llava", "--out", str(out), "--jobs", "1", "--steps", "6", "--measured", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_first.subprocess, "Popen", Forked)
        return gpu_first.main(flags), out


def test_all_parts_on_a_cpu(whole):
    status, out = whole
    records = records_in(out)
    assert status == 0, (out / "log.txt").read_text()[-3000:]
    assert all(record["status"] == "ok" for record in records)
    found = {record["check"]: record for record in records if record["part"] == "tiny"}
    assert set(bars.CHECKS) < found.keys()
    assert len(found["trains"]["losses"]) == 6 and all(map(math.isfinite, found["trains"]["losses"]))
    assert 0 < found["is killed and resumes"]["resumed_from"] < 6
    losses = found["losses are equal"]
    assert losses["bit_equal"] and losses["compared"] >= 2 and losses["largest_difference"] == 0
    assert found["merged answers"]["equal"] == found["merged answers"]["answers"] > 4
    assert found["answers"]["empty"] == 0 and len(found["answers"]["answers"]) > 4
    assert any(line.startswith("merged, they differ") for line in found["is merged"]["logits"])
    versions = bars.first(records, "versions")
    assert versions["pinned"]["torch"]["found"].startswith(versions["pinned"]["torch"]["wanted"])
    assert versions["gpu"] is None and "libbitsandbytes" in versions["bitsandbytes_library"]


def test_real_defaults_but_for_what_is_given(whole):
    """A run is the recipe's own in 4 bits; on a CPU only its steps are smaller."""
    _, out = whole
    flags = bars.first(records_in(out), "prepare")["sft_llava"]["flags"]
    given = dict(zip(flags[::2], flags[1::2]))
    assert given["--load_in_4bit"] == "True" and given["--use_cpu"] == "True"
    on_a_gpu = {"model_name_or_path", "dataset_name", "max_steps", "logging_steps", "save_steps", "eval_steps"}
    others = {name.removeprefix("--") for name in given} - on_a_gpu - {"load_in_4bit"}
    from gpu_first_work import ON_A_CPU

    assert others == set(ON_A_CPU)


def test_results_of_full_size_are_there_and_not_judged(whole):
    _, out = whole
    records = records_in(out)
    own, auto = (bars.result_of(records, "sft_llava", is_auto) for is_auto in (False, True))
    assert own["batch"] == 1 and own["stock"]["median"] > 0 and own["recipe"]["idle"] is None
    assert auto["recipe"]["rows"] == 4 and auto["bits"] == "4" and "stock" not in auto
    verdicts = {one["what"]: one for one in bars.judge(records)}
    for what in ("stock / sft_llava", "MFU: sft_llava", "memory: sft_llava, batch auto"):
        assert verdicts[what]["status"] == "not judged"
    assert verdicts["stock / sft_llava"]["figure"] > 0
    text = (out / "table.md").read_text()
    assert "bars are not judged" in text and "| sft_llava | 4 | auto: 1 | 4 |" in text


def test_names_are_those_of_full_size():
    assert sorted(run for runs in bars.RUNS.values() for run in runs) == sorted(full_size.RUNS)
    for recipe, runs in bars.RUNS.items():
        assert {full_size.RUNS[run].recipe for run in runs} == {recipe}
        assert "4" in full_size.RUNS[runs[-1]].precisions  # the small run is in 4 bits


# ---------------------------------------------------------------- what goes wrong


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function: flags -> (exit status, records). There are five seconds; recipes are shell scripts, of `scripts`."""
    monkeypatch.setattr(gpu_first, "LAST", 0)
    monkeypatch.setattr(gpu_first, "TINY_END", 5 / 6)
    scripts = {}

    def command(name, flags, out):
        return ["bash", "-c", scripts[name], "bash", out]

    def work(self, what, *words, until, **environment):
        assert what == "small_models"
        return {name: {"flags": [], "on": [], "four_bit_flag": "load_in_4bit"} for name in words[3:]}

    monkeypatch.setattr(gpu_first, "recipe_command", command)
    monkeypatch.setattr(gpu_first.Session, "work", work)

    def make(*flags, **own):
        scripts.update(own)
        status = gpu_first.main([*flags, "--out", str(tmp_path / "out"), "--minutes", "0.1"])
        return status, records_in(tmp_path / "out")

    return make


LOG = '{"log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}'


def test_what_hangs_or_fails_ends_alone(run, tmp_path, capsys):
    """One recipe hangs with a process of its own, one fails, one is too quick to be killed."""
    hangs = f"echo going; sleep 60 & echo $! > {tmp_path}/pid; wait"
    quick = f"mkdir -p $1; echo '{LOG}' > $1/trainer_state.json"
    recipes = ["sft_llava", "idefics2_docvqa", "dpo_idefics2"]
    fails = "echo; echo why it fails; exit 3"
    begin = time.time()
    scripts = {"sft_llava": hangs, "idefics2_docvqa": fails, "dpo_idefics2": quick}
    status, records = run("--only", "tiny", "--jobs", "3", "--recipes", *recipes, **scripts)
    assert status == 1 and time.time() - begin < 30
    found = {(record["name"], record.get("check")): record for record in records}
    assert found["sft_llava", "trains"]["error"] == "it took too long\ngoing"
    assert found["idefics2_docvqa", "trains"]["error"] == "exit status 3\nwhy it fails"
    assert found["dpo_idefics2", "trains"]["losses"] == [2, 1]
    assert "before it could be killed" in found["dpo_idefics2", "is killed and resumes"]["error"]
    assert found["dpo_idefics2", "answers"]["status"] == "failed"  # there is nothing to load
    assert has_ended(int((tmp_path / "pid").read_text()))
    printed = capsys.readouterr().out
    assert "idefics2_docvqa trains failed exit status 3: why it fails\n" in printed
    assert "Failed: small model: sft_llava, small model: dpo_idefics2, small model: idefics2_docvqa" in printed
    assert "why it fails" in (tmp_path / "out" / "log.txt").read_text()


def test_no_gpu_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_first.Session, "work", lambda self, *words, until: {"gpu": None})
    with pytest.raises(SystemExit, match="^error: PyTorch finds no GPU; --cpu tries"):
        gpu_first.main(["--out", str(tmp_path), "--recipes", "sft_llava"])
    assert [record["part"] for record in records_in(tmp_path)] == ["begin", "versions", "prepare"]


def test_time_that_is_up_is_no_success(run, monkeypatch):
    """Without any time left nothing is begun, and all is named."""
    monkeypatch.setattr(gpu_first, "TINY_END", -1)
    status, records = run("--only", "tiny", "--jobs", "1", "--recipes", "sft_llava")
    assert status == 1
    (verdict,) = bars.judge(records)
    assert verdict["status"] == "not run" and verdict["text"] == f"not run: {', '.join(bars.CHECKS)}"
    assert [record["error"] for record in records if "check" in record] == ["time is up"] * 2


def test_results_of_full_size_are_kept_when_it_hangs(tmp_path, monkeypatch):
    """And its own way to end is tried first: it has processes and weights to remove."""
    folder = tmp_path / "root" / "benchmarks"
    folder.mkdir(parents=True)
    result = {"run": "sft_llava", "bits": "4", "batch": 1, "status": "failed: ValueError: no"}
    late = {**result, "batch": "auto", "status": "not run: interrupted"}
    (folder / "full_size.py").write_text(f"""
import json, pathlib, signal, sys, time
def ended(*args):
    found["results"].append({late!r})
    file.write_text(json.dumps(found))
    sys.exit(1)
signal.signal(signal.SIGTERM, ended)
file = pathlib.Path(sys.argv[sys.argv.index("--json") + 1])
found = {{"device": {{"name": "CPU", "peak_flops": 1}}, "machine": {{"gpu": None}}, "results": []}}
file.write_text(json.dumps(found))
time.sleep(0.5)
found["results"].append({result!r})
file.write_text(json.dumps(found))
time.sleep(60)
""")
    monkeypatch.setattr(gpu_first, "ROOT", tmp_path / "root")
    monkeypatch.setattr(gpu_first, "LAST", 0)
    out = tmp_path / "out"
    flags = ["--cpu", "--only", "full_size", "--recipes", "sft_llava", "--minutes", "0.05", "--out", str(out)]
    assert gpu_first.main(flags) == 1
    _, device, one, last, whole = records_in(out)
    assert device["device"]["name"] == "CPU" and one["error"] == "ValueError: no"
    assert last["status"] == "not run" and last["error"] == "interrupted"
    assert whole["status"] == "failed" and whole["error"].startswith("it took too long")
    statuses = {verdict["what"]: verdict["status"] for verdict in bars.judge(records_in(out))}
    assert statuses == {"stock / sft_llava": "failed", "MFU: sft_llava": "not run"}


def test_an_end_from_outside_leaves_results_and_nothing_else(tmp_path):
    """SIGTERM, while the first part runs."""
    out = tmp_path / "out"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [ROOT / "benchmarks" / "gpu_first.sh", "--cpu", "--only", "versions", "--out", out]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("gpu-first-*/logs/1.txt")):
        time.sleep(0.05)
    time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    printed = process.communicate(timeout=30)[0]
    assert process.returncode == 1 and "Not run: versions" in printed
    assert len(children) == 1 and has_ended(children[0].pid)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [record["status"] for record in records_in(out)] == ["ok", "interrupted"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--only", "tinny"], "--only: invalid choice: 'tinny'"),
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--judge", "nowhere.jsonl"], "--judge nowhere.jsonl: no such file"),
        (["--out", "{used}"], "--out .* holds results already: choose another folder"),
    ],
)
def test_mistakes(flags, message, tmp_path):
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        gpu_first.main([flag.format(used=tmp_path) for flag in flags])


# ---------------------------------------------------------------- losses


def logs(*losses, first=1):
    return [{"step": n, "loss": loss, "epoch": n / 10} for n, loss in enumerate(losses, first)]


@pytest.mark.parametrize("apart, equal", [(0, True), (4e-4, False)])
def test_equal_losses(apart, equal):
    one, other = logs(9, 8, 3, 2), logs(1, 1, 3, 2 * (1 + apart))  # before the resume they may be anything
    found = gpu_first.compare_losses(None, {"log": one}, {"log": other, "resumed_from": 2}, until=0)
    assert found["compared"] == 2 and found["bit_equal"] == equal and found["first_bit_equal"]
    assert found["largest_difference"] == pytest.approx(apart)


@pytest.mark.parametrize(
    "other, message",
    [
        (logs(9, 8, 3, 2.0012), "^after step 2 they differ: {'loss 4': .2, 2.0012.}$"),
        (logs(9, 8, 3, 2.1), "^after step 2 they differ: {'loss 4': .2, 2.1.}$"),
        (logs(9, 8, 3, math.nan), "^after step 2 they differ: {'loss 4': .2, nan.}$"),
        (logs(9, 8, 3), r"has logged \['loss 3', 'loss 4'\], the other \['loss 3'\]"),
        (logs(9, 8, 3, 2, first=2), "has logged"),
        ([], "has logged"),
    ],
)
def test_other_losses(other, message):
    with pytest.raises(gpu_first.Failed, match=message):
        gpu_first.compare_losses(None, {"log": logs(9, 8, 3, 2)}, {"log": other, "resumed_from": 2}, until=0)


# ---------------------------------------------------------------- the bars


def side(median, gigabytes, mfu=0.5, batch=1, rows=1):
    """Figures of a run, of a GPU that does 100 FLOP/s at best."""
    flops = {"model": 100 * mfu, "hardware": 130 * mfu}
    memory = {"allocated": gigabytes * GB, "reserved": gigabytes * GB}
    found = {"status": "ok", "median": median, "rows_per_second": rows / median, "flops": flops, "uncounted": None}
    found |= {"flops_per_second": flops, "memory": memory, "waiting": 0.1, "idle": 0.25}
    return {**found, "batch": batch, "rows": rows}


@pytest.fixture
def good():
    """All records of a run on a GPU that meets every bar."""
    parts = dict.fromkeys(["parts", "all_parts"], gpu_first.PARTS)
    recipes = list(bars.RUNS)
    records = [{"part": "begin", "status": "ok", "recipes": recipes, "cpu": False, "date": "today", **parts}]
    machine = {"python": "3.12", "cores": 16, "gpu": "H200", "memory": 150 * GB, "driver": "1", "cuda": "13"}
    machine |= {"pinned": {"torch": {"wanted": "2.13.0", "found": "2.13.0+cu130"}}, "others": {"triton": "3"}}
    records.append({"part": "versions", "name": "machine", "status": "ok", **machine})
    figures = {
        "compared": 8,
        "largest_difference": 1e-5,
        "bit_equal": False,
        "first_bit_equal": True,
        "equal": 3,
        "answers": 4,
    }
    for name in recipes:
        records += [{"part": "tiny", "name": name, "check": check, "status": "ok", **figures} for check in bars.CHECKS]
    records.append({"part": "full_size", "name": "device", "status": "ok", "device": {"peak_flops": 100}})
    for run in full_size.RUNS:
        estimate = {"bytes": 10 * GB, "batch": 1, "for_each_row": 2 * GB, "least": 8 * GB}
        records.append({"part": "estimate", "name": run, "status": "ok", **estimate})
        result = {"part": "full_size", "name": run, "status": "ok", "bits": "4"}
        records.append({**result, "batch": 1, "recipe": side(1.0, 10.5), "stock": side(1.6, 13)})
        records.append({**result, "batch": "auto", "recipe": side(2.0, 25, batch=8, rows=16)})
    return records


def judged(records, tmp_path, capsys):
    """(exit status, {what: its status}, what was printed) of --judge."""
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    status = gpu_first.main(["--judge", str(tmp_path / "results.jsonl")])
    return status, {one["what"]: one["status"] for one in bars.judge(records)}, capsys.readouterr().out


def test_all_bars_met(good, tmp_path, capsys):
    status, statuses, printed = judged(good, tmp_path, capsys)
    assert status == 0 and set(statuses.values()) == {"met"}
    assert len(statuses) == 1 + 5 + 6 + 2 + 6 + 2 * 6
    assert "missed" not in printed and "Not as in" not in printed  # +cu130 is the same release
    row = next(line for line in printed.splitlines() if line.startswith("| sft_llava | 4 | auto"))
    cells = "sft_llava|4|auto: 8|16|2.000|8.00|50.0%|25.0|24.0|1.04|10%|25%|-|-|-".split("|")
    assert [cell.strip() for cell in row.strip("|").split("|")] == cells
    assert "| stock / sft_llava | >= 1.05x | met | 1.60x |" in printed
    assert "8 losses after the resume within 1.0e-05, the first bit-equal; 3 of 4 merged answers equal" in printed


def result(records, name, batch):
    return next(one for one in records if (one.get("name"), one.get("batch")) == (name, batch) and "recipe" in one)


def slow_sft(records):
    result(records, "sft_llava", 1)["stock"] = side(1.04, 13)


def slow_dpo(records):
    result(records, "dpo_idefics2", 1)["stock"] = side(1.49, 13)


def much_memory(records):
    result(records, "idefics2_docvqa", 1)["recipe"] = side(1.0, 11.1)


def little_memory_at_auto(records):
    result(records, "idefics2_docvqa", "auto")["recipe"] = side(2.0, 21.5, batch=8, rows=16)


def much_for_the_optimizer(records):
    bars.first(records, "estimate", name="idefics2_docvqa")["least"] = 12 * GB  # more than a batch of one takes


def low_mfu(records):
    result(records, "sft_llava", "auto")["recipe"] = side(2.0, 25, mfu=0.39, batch=8, rows=16)


MISSED = {
    slow_sft: "stock / sft_llava | >= 1.05x | missed | 1.04x",
    slow_dpo: "stock / dpo_idefics2 | >= 1.5x | missed | 1.49x",
    much_memory: "memory: idefics2_docvqa, batch own | within 10% | missed | 11.10 GB, estimate 10.00 GB: 1.11",
    little_memory_at_auto: "memory: idefics2_docvqa, batch auto | within 10% | missed | 21.50 GB, estimate 24.00 GB",
    much_for_the_optimizer: "memory: idefics2_docvqa, batch own | within 10% | missed | 10.50 GB, estimate 12.00 GB",
    low_mfu: "MFU: sft_llava | >= 40% | missed | 39.0%, with recomputation 50.7%",
}


@pytest.mark.parametrize("change", MISSED, ids=lambda change: change.__name__)
def test_a_bar_is_missed(change, good, tmp_path, capsys):
    change(good)
    status, statuses, printed = judged(good, tmp_path, capsys)
    assert status == 1 and MISSED[change] in printed
    (missed,) = [what for what, status in statuses.items() if status != "met"]
    assert f"Bars missed: {missed}\n" in printed


def test_what_did_not_run_is_named(good, tmp_path, capsys):
    """A killed run has no more lines; some results say themselves that they are none."""
    late = result(good, "llava_two_stage instruct", "auto")
    late.update(status="not run", error="time is up")
    result(good, "dpo_idefics2", 1)["stock"] = {"status": "out of memory"}
    merged = next(one for one in good if one.get("check") == "merged answers" and one["name"] == "sft_llava")
    merged.update(status="failed", error="1 of 4")
    good.remove(next(one for one in good if one["part"] == "estimate" and one["name"] == "sft_llava"))
    status, statuses, printed = judged(good, tmp_path, capsys)
    assert status == 1
    not_run = [what for what, status in statuses.items() if status == "not run"]
    assert not_run == [
        "estimate: sft_llava",
        "MFU: llava_two_stage instruct",
        "memory: sft_llava, batch own",
        "memory: sft_llava, batch auto",
        "memory: llava_two_stage instruct, batch auto",
    ]
    failed = [what for what, status in statuses.items() if status == "failed"]
    assert failed == ["small model: sft_llava", "stock / dpo_idefics2"]
    assert "| failed | merged answers: 1 of 4 |" in printed and "stock: out of memory" in printed


def test_a_results_file_that_was_cut_off(good, tmp_path, capsys):
    """In the middle of a line."""
    path = tmp_path / "results.jsonl"
    judged(good[:20], tmp_path, capsys)
    with open(path, "a") as file:
        file.write('{"part": "tiny", "na')
    assert bars.read(path) == good[:20]
    assert gpu_first.main(["--judge", str(path)]) == 1 and "Not run: " in capsys.readouterr().out


def test_parts_that_were_not_wanted_are_no_failure(good, tmp_path, capsys):
    good[0]["parts"] = ["versions", "full_size"]
    status, statuses, printed = judged([one for one in good if one["part"] != "tiny"], tmp_path, capsys)
    assert status == 0 and "Left out: tiny, estimate" in printed
    assert not [what for what in statuses if "memory" in what or "small" in what]


def test_other_versions_are_named(good, tmp_path, capsys):
    good[1]["pinned"] |= {"trl": {"wanted": "1.16.0", "found": "1.15.0"}, "peft": {"wanted": "1", "found": None}}
    printed = judged(good, tmp_path, capsys)[2]
    assert "Not as in requirements.txt: trl 1.15.0 instead of 1.16.0, peft None instead of 1\n" in printed
