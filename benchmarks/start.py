"""How long a run takes from its command to its first step, and how much memory, by the number of rows.

    python benchmarks/start.py                                    # 10,000 and 100,000 rows, three recipes
    python benchmarks/start.py --rows 665000 --recipes sft_llava --folder build/start
    python benchmarks/start.py --rows 10000 --json start.json

Each recipe is started twice, for one step of one row, as a program of its own: first with an empty cache, then with
what the first start left there. Rows are LLaVA JSON (pairs for dpo_idefics2): conversations of two to sixteen turns,
words drawn from 50,000 made-up ones by Zipf's law, some 1.3 kB of JSON each, like LLaVA's mix665k; each with a picture
of 640 x 480 pixels of its own. The pictures are hard links to 1,000 different JPEGs: other file systems than ext4 or
xfs may not allow as many. The models are small, with the real processors (336 pixels for LLaVA, 490 for Idefics2) and
a tokenizer that takes more tokens for a word than a real one; the longest row is set to four times the usual one.

Seconds: from the start of Python to the log of the first step. Memory: the most that all processes of the run have
together, looked at twice a second; what several share counts once (PSS). Where other programs share the cores, CPU
time, of all processes, says more."""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402
from made_up import SMALL_MODELS, configuration, empty_model, photograph, sized_processor, sizes_of  # noqa: E402

SIZE, PICTURES, IN_A_FOLDER = (640, 480), 1000, 1000
MODELS = {"sft_llava": "llava-1.5-7b", "llava_two_stage": "llava-1.5-7b", "dpo_idefics2": "idefics2-8b"}
SIDES = {"llava-1.5-7b": 336, "idefics2-8b": 490}
FLAGS = {
    "sft_llava": ["--max_length", "8192"],
    "llava_two_stage": ["--stage", "instruct", "--model_max_length", "8192"],
    "dpo_idefics2": ["--max_length", "4096"],
}


def make_model(name, folder):
    """Write a small model with the published one's processor, unless it is there."""
    if folder.exists():
        return
    assert name in SMALL_MODELS
    processor = sized_processor(name, SIDES[name])
    sizes = sizes_of(name, small=True)
    sizes["vision_config"]["image_size"] = SIDES[name]
    sizes["text_config"]["vocab_size"] = max(sizes["text_config"]["vocab_size"], len(processor.tokenizer) + 64)
    if "perceiver_config" in sizes:
        sizes["perceiver_config"]["resampler_n_latents"] = 64
    config = configuration(name, sizes, processor.tokenizer)
    empty_model(config, "cpu", torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)


def make_pictures(folder, count):
    """Write hard links to 1,000 JPEGs, one for each row; those that are there stay."""
    originals = folder / "originals"
    originals.mkdir(parents=True, exist_ok=True)
    for n in range(PICTURES):
        if not (originals / f"{n}.jpg").exists():
            photograph(n, SIZE).save(originals / f"{n}.jpg", quality=85)
    for n in range(count):
        path = folder / picture(n)
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.hardlink_to(originals / f"{n % PICTURES}.jpg")


def picture(n):
    return f"{n // IN_A_FOLDER:04}/{n:09}.jpg"


class Words:
    """Texts of made-up words."""

    def __init__(self):
        self.random = random.Random(0)
        letters = "etaoinshrdlucmfwypvbgk"
        self.words = ["".join(self.random.choices(letters, k=self.random.randint(1, 9))) for _ in range(50_000)]
        total, self.sums = 0.0, []
        for rank in range(1, 50_001):
            total += 1 / rank
            self.sums.append(total)

    def text(self, least, most):
        count = self.random.randint(least, most)
        return " ".join(self.random.choices(self.words, cum_weights=self.sums, k=count))


def make_rows(recipe, count, path):
    """Write a .json of rows, unless it is there."""
    if path.exists():
        return
    words = Words()
    with open(f"{path}.part", "w") as file:
        for n in range(count):
            row = {"id": f"{n:09}", "image": picture(n)}
            if recipe == "dpo_idefics2":
                row["question"] = words.text(6, 20)
                row |= {"chosen": words.text(40, 120), "rejected": words.text(40, 120)}
            else:
                turns = []
                for turn in range(words.random.choice([1, 1, 2, 3, 5, 8])):
                    question = words.text(6, 14) if turn else "<image>\n" + words.text(6, 14)
                    answer = words.text(*words.random.choice([(1, 3), (8, 20), (60, 100)]))
                    turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
                row["conversations"] = turns
            file.write(("[\n" if n == 0 else ",\n") + json.dumps(row, indent=1))
        file.write("\n]")
    os.replace(f"{path}.part", path)


class Memory(threading.Thread):
    """Looks twice a second at the memory of a process and its children: `peak`, in bytes."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.process, self.peak = psutil.Process(pid), 0
        self.start()

    def run(self):
        while True:
            total = 0
            try:
                for process in [self.process, *self.process.children(recursive=True)]:
                    try:
                        total += process.memory_full_info().pss
                    except psutil.Error:  # it has ended meanwhile
                        continue
            except psutil.Error:
                return
            self.peak = max(self.peak, total)
            time.sleep(0.5)


def start(recipe, folder, rows, cache, more=()):
    """Start a recipe -> {"seconds" to the log of its first step, "cpu" seconds, "memory" in bytes}."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--use_cpu", "--model_name_or_path", folder / MODELS[recipe], "--dataset_name", rows, "--output_dir", out]
    flags += ["--image_folder", folder / "pictures", "--max_steps", 1, "--logging_steps", 1, "--report_to", "none"]
    flags += ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 1, "--sample_rows", 0]
    flags += ["--load_best_model_at_end", "false", *FLAGS[recipe], *more]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    before, begun, lines = os.times(), time.perf_counter(), []
    seconds = None
    process = subprocess.Popen(
        [sys.executable, ROOT / f"{recipe}.py", *map(str, flags)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    memory = Memory(process.pid)
    for line in process.stdout:
        lines.append(line)
        if seconds is None and "'loss'" in line:
            seconds = time.perf_counter() - begun
    if process.wait() != 0 or seconds is None:
        sys.exit("".join(lines[-30:]))
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    said = [line.strip() for line in lines if "are decoded before training" in line]
    return {"seconds": seconds, "cpu": cpu, "memory": memory.peak, "said": said}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--recipes", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "start", help="Where data and models are made."
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    results = []
    print(f"{'recipe':16} {'rows':>8} {'start':>7} {'seconds':>8} {'CPU s':>7} {'GB':>5}")
    for count in args.rows:
        make_pictures(args.folder / "pictures", count)
        for recipe in args.recipes:
            make_model(MODELS[recipe], args.folder / MODELS[recipe])
            kind = "pairs" if recipe == "dpo_idefics2" else "talks"
            rows = args.folder / f"{kind}-{count}.json"
            make_rows(recipe, count, rows)
            cache = args.folder / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            for which in ("first", "second"):
                result = start(recipe, args.folder, rows, cache)
                results.append({"recipe": recipe, "rows": count, "start": which, **result})
                figures = f"{result['seconds']:8.1f} {result['cpu']:7.1f} {result['memory'] / 1e9:5.2f}"
                print(f"{recipe:16} {count:8} {which:>7} {figures}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
