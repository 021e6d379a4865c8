"""What kill_drill.py kills: a tiny model and a few rows for each recipe, its command in a process of its own or in two
that train together, signals to them, and what they leave behind. Linux only."""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads are slower at this size, and none may run at a fork
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(ROOT))

# All that a recipe imports is imported here once: a fork has it at once, a new Python would need ten seconds.
import bitsandbytes  # noqa: E402, F401
import datasets  # noqa: E402
import networkx  # noqa: E402, F401
import torch  # noqa: E402
import transformers  # noqa: E402, F401
from accelerate.state import AcceleratorState  # noqa: E402
from peft import PeftModel  # noqa: E402, F401
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer  # noqa: E402, F401
from trl import DPOTrainer, SFTTrainer  # noqa: E402, F401

from tiny import forms, idefics2, llava, minicpm, preferences, two_stage  # noqa: E402

MODELS = {
    "sft_llava": llava,
    "idefics2_docvqa": idefics2,
    "dpo_idefics2": preferences,
    "finetune_minicpm_lora": minicpm,
    "llava_two_stage": llava,
}
ROWS = MODELS | {"idefics2_docvqa": forms, "llava_two_stage": two_stage}
RECIPES = list(MODELS)
TRAIN_ROWS, EVAL_ROWS = 10, 4  # four rows a step: the last step of an epoch is an incomplete one
COMMON = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "sample_rows": 2}
COMMON |= {"save_total_limit": 2, "eval_strategy": "steps", "gradient_accumulation_steps": 2}
COMMON |= {"learning_rate": 1e-3}  # the shipped ones hardly move a model in a few steps
OWN = {
    "sft_llava": {"sample_tokens": 4, "neftune_noise_alpha": 5},
    "idefics2_docvqa": {"max_new_tokens": 4},
    "dpo_idefics2": {"max_new_tokens": 4},
    "finetune_minicpm_lora": {"sample_tokens": 4, "lora_r": 8},
    "llava_two_stage": {"sample_tokens": 4, "stage": "instruct"},  # all weights: its saves take longest
}
TIMES = re.compile("runtime|per_second|flos|train_loss")  # train_loss: the mean since the last start
WEIGHTS = "*.safetensors"


# ---------------------------------------------------------------- what is run


@dataclass(frozen=True)
class Case:
    """One recipe with its tiny model and rows."""

    name: str
    folder: Path
    flags: dict

    @property
    def steps(self):
        return self.flags["max_steps"]

    @property
    def save_steps(self):
        return self.flags["save_steps"]

    def command(self, out, ranks=1, **changes):
        """The list of flags of a run into `out`, always of four rows a step."""
        flags = {**self.flags, "per_device_train_batch_size": 2 // ranks, "output_dir": out, **changes}
        return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def pick_rows(rows, count):
    """So many rows: in turn one without pictures, one with one, one with several, as far as there are."""
    by_pictures = defaultdict(list)
    for row in rows:
        image = row.get("image") or ()
        by_pictures[1 if isinstance(image, str) else len(image)].append(row)
    in_turn = [row for some in itertools.zip_longest(*by_pictures.values()) for row in some if row is not None]
    return in_turn[:count]


def build(name, folder, steps):
    """Write a tiny model (random weights), 14 rows and a copy of the recipe into a new folder. -> Case. `steps`: flags
    with the number of steps."""
    folder.mkdir()
    processor = MODELS[name].processor()
    MODELS[name].model(processor.tokenizer).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    ROWS[name].write_data(folder, "train", ROWS[name].make_rows(0, n=48))
    rows = pick_rows(json.loads((folder / "json" / "train.json").read_text()), TRAIN_ROWS + EVAL_ROWS)
    (folder / "train.json").write_text(json.dumps(rows[:TRAIN_ROWS]))
    (folder / "eval.json").write_text(json.dumps(rows[TRAIN_ROWS:]))
    shutil.copy(ROOT / f"{name}.py", folder)  # the one in the repository may be edited meanwhile
    flags = {"model_name_or_path": folder / "model", "image_folder": folder / "json" / "images"}
    flags |= {"dataset_name": folder / "train.json", "eval_dataset_name": folder / "eval.json"}
    return Case(name, folder, {**flags, **COMMON, **OWN[name], **steps})


# ---------------------------------------------------------------- processes


def run_recipe(case, argv, log, environment):
    """The recipe as a script, in this process, which is a fork of its own: what it prints goes to the file `log`."""
    os.setsid()  # a session of its own: a signal to its group is what a terminal sends at Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.update(environment)
    datasets.config.HF_DATASETS_CACHE = case.folder / "cache"
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # in a test, its process may have made one
    sys.argv = [f"{case.name}.py", *argv]
    runpy.run_path(str(case.folder / f"{case.name}.py"), run_name="__main__")


def environments(ranks):
    """What torchrun would set for each of so many processes."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def wait_until(condition, seconds):
    """Whether the condition came true within so many seconds; looked at every millisecond."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


class Run:
    """A command that was started, in one process or several. As a context: whatever is left of it is killed."""

    def __init__(self, case, argv, log, ranks=1):
        context = multiprocessing.get_context("fork")
        self.logs = [Path(f"{log}-{rank}.txt") for rank in range(ranks)]
        arguments = [(case, argv, file, more) for file, more in zip(self.logs, environments(ranks))]
        self.processes = [context.Process(target=run_recipe, args=args) for args in arguments]
        for process in self.processes:
            process.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    def kill(self):
        """Kill what is left of it: the loader processes of a killed run live on for some seconds."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()

    @property
    def codes(self):
        """Of each process the exit status, -9 if it was killed by signal 9, None if it runs."""
        return [process.exitcode for process in self.processes]

    @property
    def has_ended(self):
        return None not in self.codes

    @property
    def text(self):
        return "".join(file.read_text(errors="replace") for file in self.logs if file.exists())

    @property
    def start_step(self):
        """The step of the checkpoint it resumed from; 0 from the start, None where it did not come so far."""
        found = re.search(r"; (?:from the start|resuming from \S*checkpoint-(\d+))$", self.text, re.MULTILINE)
        return None if found is None else int(found[1] or 0)

    @property
    def step(self):
        """The last step that it finished: each logs one loss."""
        return (self.start_step or 0) + len(re.findall("^{'loss': ", self.text, re.MULTILINE))

    def catches(self, number):
        """Whether each process that runs has a handler for this signal, of its own."""
        if not all(file.exists() for file in self.logs):  # until then it has the drill's
            return False
        for process in self.processes:
            if process.exitcode is None:
                status = Path(f"/proc/{process.pid}/status").read_text()
                caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
                if not caught >> (number - 1) & 1:
                    return False
        return True

    def send(self, number, whole_group=False, rank=None):
        """A signal to all of its processes, or to one; with `whole_group` to their loader processes, too."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with contextlib.suppress(ProcessLookupError):
                if process.exitcode is None:
                    (os.killpg if whole_group else os.kill)(process.pid, number)

    def limit_files(self, size):
        """From now on it can write no file beyond so many bytes."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))


# ---------------------------------------------------------------- what is left behind


def checkpoints(out):
    """{step: folder} of all checkpoints, whole or not, the oldest first."""
    found = {int(path.name.split("-")[1]): path for path in Path(out).glob("checkpoint-*") if path.name[11:].isdigit()}
    return dict(sorted(found.items()))


def is_listed(folder):
    """Whether a checkpoint has its checksums, which are written last. While it is written, they are of no file."""
    with contextlib.suppress(OSError, ValueError):
        return bool(json.loads((folder / "checksums.json").read_text()))
    return False


def is_whole(folder):
    """Whether a checkpoint holds all that its checksums.json says. Of one without it this is not known: False."""
    try:
        listed = json.loads((folder / "checksums.json").read_text())
        digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in listed}
    except (OSError, ValueError):
        return False
    return len(listed) > 0 and all(digests[name] == entry["sha256"] for name, entry in listed.items())


def newest_whole(out):
    """The step of the newest whole checkpoint, or None."""
    return max((step for step, folder in checkpoints(out).items() if is_whole(folder)), default=None)


def is_finished(out):
    return (out / "trainer_state.json").exists()


def take_result_away(out):
    """Leave what a run leaves that was killed after its last checkpoint."""
    for path in out.iterdir():
        if path.is_file() and path.name not in ("settings.yaml", "samples.md"):
            path.unlink()


def result(out):
    """What a finished run is compared by: its weights, its log without times, the tables of samples.md. Raises OSError
    or ValueError where one of them is broken."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    log = [{name: value for name, value in entry.items() if not TIMES.search(name)} for entry in history]
    weights = {file.name: file.read_bytes() for file in out.glob(WEIGHTS)}
    return {"weights": weights, "log": log, "samples": set((out / "samples.md").read_text().split("\n## ")[1:])}


def differences(out, expected):
    """What a finished run differs in from the expected result, in words. (An evaluation that a kill made a run repeat
    may stand in samples.md twice.)"""
    try:
        found, texts = result(out), []
    except (OSError, ValueError) as error:
        return [f"marked as finished, with a broken trainer_state.json or samples.md: {error}"]
    for name in sorted(expected["weights"].keys() | found["weights"].keys()):
        if found["weights"].get(name) != expected["weights"].get(name):
            texts.append(f"other weights: {name}")
    fields = {}  # each that differs -> where first
    for one, other in itertools.zip_longest(expected["log"], found["log"], fillvalue={}):
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                place = f"step {one.get('step', other.get('step'))}: {other.get(name)}, expected {one.get(name)}"
                fields.setdefault(name, place)
    texts += [f"another log: {name} at {place}" for name, place in fields.items()]
    missing = sorted(table.splitlines()[0] for table in expected["samples"] - found["samples"])
    return texts + [f"samples.md lacks {title}" for title in missing]


def disk_usage(folder):
    """Bytes of all files in a folder, in blocks of 4,096."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in Path(folder).rglob("*") if path.is_file())


@contextlib.contextmanager
def small_disk(folder, size):
    """A disk of so many bytes, in memory, mounted at `folder`; yields a function that gives it another size. Raises
    OSError where mounting is not permitted."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o"]
    done = subprocess.run([*mount, f"size={size}", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(done.stderr.strip())
    try:
        yield lambda size: subprocess.run([*mount, f"remount,size={size}", "tmpfs", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def can_mount(folder):
    """Whether this user may mount a small_disk."""
    try:
        with small_disk(folder, 4096):
            return True
    except OSError:
        return False
