"""The first minutes on a GPU: does all of it run there, how fast, in how much memory, and is that what was promised?

    benchmarks/gpu_first.sh --out first               # at most 9 minutes on one H100 or H200, without the internet
    benchmarks/gpu_first.sh --only versions tiny      # some of its parts
    benchmarks/gpu_first.sh --recipes sft_llava --minutes 4
    benchmarks/gpu_first.sh --cpu                     # without a GPU: small models throughout, to see that it runs
    benchmarks/gpu_first.sh --judge first/results.jsonl     # once more the tables of a run, one that was killed, too

  versions   Python, torch, CUDA, driver, GPU, the packages of requirements.txt, kernels of others
  tiny       each recipe with its own defaults, in 4 bits, on a small model with random weights: trains, is killed by
             SIGKILL and resumes by the same command to the losses of a run that was not, answers, is merged
  estimate   the memory that tools/inspect_recipe.py foretells at real size
  full_size  full_size.py: each recipe at its model's real size with its own batch beside the stock trainer, and with
             the batch that it chooses itself; memory against the estimate, the share of time that the GPU waits

The first three run side by side where there are processor cores for it. OUT/results.jsonl gets a line as soon as
something is known, OUT/table.md the tables at the end, OUT/log.txt what was printed. What fails or hangs ends alone,
with the last lines it printed. The exit status is 1 where a bar is missed, and where anything did not run.

Needed are 37 GB of disk (--scratch), removed at the end unless this program is killed itself. Losses count as equal
within 0.0005, of numbers above 1 relative; those of other rows are several times as far apart. Whether they are equal
to the last bit is noted. Merged and adapter are compared by logits (merge_adapter.py); answers are compared, too, but
in 16 bits random weights may answer otherwise. Memory is what PyTorch's allocator had given out. MFU counts forward
and backward of the model, no recomputation. It has not been run on a GPU yet."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from gpu_first_bars import CHECKS, RUNS, first, in_short, read, report  # noqa: E402

from tools.program import fail, flag_parser, start  # noqa: E402

PARTS = ["versions", "tiny", "estimate", "full_size"]
# How far apart two losses may be: by this, or, above 1, by this share.
TOLERANCE = 5e-4
COMPARED = re.compile(r"loss|eval_loss|logps/(chosen|rejected)")
# Shares of the time after which the parts before full_size end, whatever they have; seconds for the end.
VERSIONS_END, TINY_END, LAST = 0.15, 0.45, 15
POLL = 0.02  # seconds
WORK = ROOT / "benchmarks" / "gpu_first_work.py"


class Failed(Exception):
    """A command failed, or took too long; its text says how."""


# ---------------------------------------------------------------- commands and records


def last_lines(text, count=5):
    """The last lines that say something."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-count:])[-800:] or "nothing was printed"


class Session:
    """What the parts share: flags, the clock, folders that are removed, the results so far. temporary: for sockets,
    whose paths must be short."""

    def __init__(self, args, scratch, temporary):
        self.args, self.scratch = args, scratch
        self.begin, self.records, self.stopped = time.time(), [], False
        self.lock, self.commands = threading.Lock(), 0
        for folder in ("run", "datasets", "logs"):
            (scratch / folder).mkdir()
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # recipes refuse several in one process
        self.environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_DATASETS_CACHE": str(scratch / "datasets"),
            "CUDA_VISIBLE_DEVICES": "" if args.cpu else gpu,
            "TMPDIR": str(temporary),
        }
        if args.cpu:
            self.environment.setdefault("OMP_NUM_THREADS", "1")  # more are slower for small models

    def until(self, share=1.0):
        """The time at which a share of the minutes is over."""
        return self.begin + share * (60 * self.args.minutes - LAST)

    def record(self, part, name, status, **found):
        """Write a result at once, and print it in short."""
        entry = {"part": part, "name": name, "status": status, "at": round(time.time() - self.begin, 2), **found}
        with self.lock:
            self.records.append(entry)
            with open(self.args.out / "results.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
        words = [part, name, found.get("check"), status, in_short(entry)]
        print(f"{entry['at']:6.1f} s ", " ".join(filter(None, words)), flush=True)

    def run(self, command, until, watch=None, patience=0, **environment):
        """Run a command -> (its exit status, what it printed). Raises Failed where it takes too long. watch(): called
        over and over; where it is true the command is killed. patience: seconds for it to end by itself on SIGTERM."""
        with self.lock:
            self.commands += 1
            log = self.scratch / "logs" / f"{self.commands}.txt"
        late, words = False, list(map(str, command))
        with open(log, "w") as file:
            process = subprocess.Popen(
                words,
                stdout=file,
                stderr=file,
                env=self.environment | environment,
                cwd=self.scratch,
                start_new_session=True,
            )
        try:
            while process.poll() is None and not late and not (watch and watch()):
                late = self.stopped or time.time() > until
                time.sleep(POLL)
        finally:
            end(process, patience)
            text = log.read_text(errors="replace")
            with self.lock, open(self.args.out / "log.txt", "a") as file:
                file.write(f"\n--- {' '.join(words)}\n{text}\n--- exit status {process.returncode}\n")
        if late:
            raise Failed(f"{'interrupted' if self.stopped else 'it took too long'}\n{last_lines(text)}")
        return process.returncode, text

    def must(self, command, until, **options):
        """Run a command -> what it printed. Raises Failed where it fails, too."""
        status, text = self.run(command, until, **options)
        if status != 0:
            raise Failed(f"exit status {status}\n{last_lines(text)}")
        return text

    def work(self, *words, until, **environment):
        """What a function of gpu_first_work.py returns. Raises Failed."""
        answer = Path(tempfile.mkdtemp(dir=self.scratch)) / "answer.json"
        self.must([sys.executable, WORK, answer, *words], until, **environment)
        return json.loads(answer.read_text())

    def attempt(self, part, name, until, function, check=None):
        """Call function(until) and record what it returns, a dict -> that. None where it fails: an error is a result
        like others."""
        begin, found = time.time(), None
        more = {} if check is None else {"check": check}
        if self.stopped or begin > until:
            self.record(part, name, "not run", error="interrupted" if self.stopped else "time is up", **more)
            return None
        try:
            found = function(until)
            status = found.get("status", "ok")
            self.record(part, name, **{**more, "status": status, "seconds": round(time.time() - begin, 2), **found})
        except Exception as error:  # whatever it is, the others go on
            text = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
            self.record(part, name, "failed", error=text, **more)
        return found

    def together(self, calls):
        """Call functions side by side -> what they return, in their order."""
        if self.args.jobs == 1:
            return [call() for call in calls]
        with ThreadPoolExecutor(self.args.jobs) as pool:
            futures = [pool.submit(call) for call in calls]
            try:
                return [future.result() for future in futures]
            except KeyboardInterrupt:
                self.stopped = True
                raise


def end(process, patience):
    """End a process with all that it has started, unless it has ended already."""
    if process.poll() is None and patience:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---------------------------------------------------------------- a recipe on its tiny model


def try_recipe(session, name, plan):
    """All CHECKS of a recipe, side by side where one does not need another. plan: see small_models."""
    trains, is_killed, equal_losses, answers, is_merged, merged_answers = CHECKS
    folder, flags, on = session.scratch / "run" / name, plan["flags"], plan["on"]
    adapter, again, merged = folder / "adapter", folder / "again", folder / "merged"

    def attempt(check, function, *args):
        """A function: does it, and records it as this check."""
        function = functools.partial(function, session, *args)
        return functools.partial(session.attempt, "tiny", name, session.until(TINY_END), function, check)

    runs = [attempt(trains, train, name, flags, adapter), attempt(is_killed, kill_and_resume, name, flags, again)]
    whole, resumed = session.together(runs)
    if whole and resumed:
        attempt(equal_losses, compare_losses, whole, resumed)()
    if whole is None:
        return
    in_16_bits = [*on, f"--{plan['four_bit_flag']}", "false"]
    uses = [
        attempt(answers, generate, adapter, on),
        attempt(is_merged, merge, adapter, merged, on),
        attempt("answers in 16 bits", generate, adapter, in_16_bits),  # no check itself: what merged ones should be
    ]
    _, has_merged, wanted = session.together(uses)
    if has_merged and wanted:
        attempt(merged_answers, compare_answers, merged, wanted, on)()


def recipe_command(name, flags, out):
    """A run of a recipe, as a user starts it."""
    return [sys.executable, ROOT / f"{name}.py", *flags, "--output_dir", out]


def log_of(out):
    """What a finished run has logged."""
    return json.loads((out / "trainer_state.json").read_text())["log_history"]


def train(session, name, flags, out, until):
    """A run of the recipe -> its log."""
    session.must(recipe_command(name, flags, out), until)
    log = log_of(out)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    if not losses or not all(abs(loss) < 1e4 for loss in losses):  # NaN is not, either
        raise Failed(f"losses {losses}")
    return {"log": log, "losses": losses}


def kill_and_resume(session, name, flags, out, until):
    """The same run, killed after its first checkpoint and started again -> the log, and the step that it resumed
    from."""

    def has_checkpoint():
        """Whether there is one that is whole: the file is written last."""
        with contextlib.suppress(ValueError):  # not all of it yet
            return [json.loads(state.read_text()) for state in out.glob("checkpoint-*/trainer_state.json")]

    status, text = session.run(recipe_command(name, flags, out), until, watch=has_checkpoint)
    if status != -signal.SIGKILL:
        raise Failed(f"exit status {status} before it could be killed\n{last_lines(text)}")
    text = session.must(recipe_command(name, flags, out), until)
    resumed_from = re.search(r"resuming from \S*checkpoint-(\d+)", text)
    if not resumed_from:
        raise Failed(f"it did not resume\n{last_lines(text)}")
    return {"log": log_of(out), "resumed_from": int(resumed_from[1])}


def compare_losses(session, whole, resumed, until):
    """How far apart the losses of two runs are after the step that one of them resumed from. Raises Failed where that
    is too far."""
    after = resumed["resumed_from"]
    one, other = numbers_of(whole["log"], after), numbers_of(resumed["log"], after)
    if not one or one.keys() != other.keys():
        raise Failed(f"after step {after} one run has logged {list(one)}, the other {list(other)}")
    differences = {key: abs(one[key] - other[key]) / max(1, abs(one[key])) for key in one}
    too_large = {key: (one[key], other[key]) for key in one if not differences[key] <= TOLERANCE}  # NaN is, too
    if too_large:
        raise Failed(f"after step {after} they differ: {too_large}")
    found = {"compared": len(one), "largest_difference": max(differences.values()), "tolerance": TOLERANCE}
    step = next(iter(one))  # what comes after it has gradients in it, whose sums on a GPU depend on the order
    return {**found, "bit_equal": one == other, "first_bit_equal": one[step] == other[step]}


def numbers_of(log, after):
    """{name and step: value} of what is compared."""
    found = {}
    for entry in log:
        if entry["step"] > after:
            found |= {f"{name} {entry['step']}": entry[name] for name in entry if COMPARED.fullmatch(name)}
    return found


def generate(session, model, flags, until):
    """The answers of a run or a merged model to the rows that were held out."""
    output = Path(tempfile.mkdtemp(dir=session.scratch)) / "answers.jsonl"
    command = [sys.executable, ROOT / "tools" / "generate.py", model, "--output", output, "--max_new_tokens", "16"]
    session.must([*command, *flags], until)
    answers = [json.loads(line)["prediction"] for line in output.read_text().splitlines()]
    if not answers:
        raise Failed("no answers")
    return {"answers": answers, "empty": answers.count("")}  # random weights may say nothing


def merge(session, adapter, merged, flags, until):
    """tools/merge_adapter.py, which compares logits itself -> what it says of them."""
    text = session.must([sys.executable, ROOT / "tools" / "merge_adapter.py", adapter, merged, *flags], until)
    return {"logits": [line for line in text.splitlines() if "differ" in line]}


def compare_answers(session, merged, wanted, flags, until):
    """What the merged model answers, beside what the adapter on its base in 16 bits does. Raises Failed where they
    must be equal and are not."""
    answers = generate(session, merged, flags, until)["answers"]
    equal = sum(one == other for one, other in zip(answers, wanted["answers"], strict=True))
    if session.args.cpu and equal < len(answers):  # in float32
        raise Failed(f"{equal} of {len(answers)} answers are those of the adapter")
    return {"answers": len(answers), "equal": equal}


# ---------------------------------------------------------------- real size


def full_size(session, until):
    """full_size.py for all recipes; its results are recorded as they come."""
    args, file, done = session.args, session.scratch / "full_size.json", []
    command = [sys.executable, ROOT / "benchmarks" / "full_size.py", *args.recipes, "--json", file]
    command += ["--bits", "own", "--checkpointing", "on", "--batch_sizes", "own", "auto"]
    command += ["--workers", 0 if args.cpu else 4, "--rounds", args.rounds, "--steps", args.measured]
    command += ["--scratch", session.scratch / "large", "--keep", "--minutes", max(0.1, (until - time.time()) / 60)]

    def follow():
        """Record what has come since the last time."""
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError):  # not there yet, or just being written
            return
        if found["device"] and first(session.records, "full_size", name="device") is None:
            session.record("full_size", "device", "ok", device=found["device"], machine=found["machine"])
        for one in found["results"][len(done) :]:
            status, _, why = one["status"].partition(": ")
            more = {} if status == "ok" else {"error": why or status}
            session.record("full_size", one["run"], **{**one, "status": status, **more})
            done.append(one)

    try:
        status, text = session.run(command, until, watch=follow, patience=8)
    finally:
        follow()
    if status != 0:
        raise Failed(f"exit status {status}\n{last_lines(text)}")
    return {"results": len(done)}


# ---------------------------------------------------------------- all of it


def run_parts(session):
    """The parts that are wanted, in order of worth."""
    args, scratch = session.args, session.scratch
    where, size = ("cpu", "small") if args.cpu else ("gpu", "real")

    def attempt(part, name, share, *words, **environment):
        """A function: has gpu_first_work.py do something, and records it."""
        work = functools.partial(session.work, *words, **environment)
        return functools.partial(session.attempt, part, name, session.until(share), lambda until: work(until=until))

    begin, plans = [], None
    if "versions" in args.only:
        begin.append(attempt("versions", "machine", VERSIONS_END, "versions"))
    if "tiny" in args.only:
        words = ("small_models", scratch / "small", args.steps, where, *args.recipes)
        begin.append(attempt("prepare", "small models", VERSIONS_END, *words))
    found = session.together(begin)
    if "versions" in args.only and not args.cpu and found[0] and found[0]["gpu"] is None:
        fail("PyTorch finds no GPU; --cpu tries all of it on small models")
    if "tiny" in args.only:
        plans = found[-1]
    beside = [functools.partial(try_recipe, session, name, plan) for name, plan in (plans or {}).items()]
    if "full_size" in args.only and not args.cpu:
        words = ("real_weights", scratch / "large" / "weights", *args.recipes)
        beside.append(attempt("prepare", "weights", TINY_END, *words))
    if "estimate" in args.only:
        for run in (run for recipe in args.recipes for run in RUNS[recipe]):
            words = ("estimate", tempfile.mkdtemp(dir=scratch), size, run)
            beside.append(attempt("estimate", run, TINY_END, *words, CUDA_VISIBLE_DEVICES=""))
    session.together(beside)
    shutil.rmtree(scratch / "run", ignore_errors=True)
    if "full_size" in args.only:
        session.attempt("full_size", "all", session.until(), functools.partial(full_size, session))


def parse(argv=None):
    """Flags, checked. Ends the program with one message where they cannot work."""
    parser = flag_parser(__doc__)

    def add(name, default, text, **options):
        parser.add_argument(name, default=default, help=text, **options)

    add("--minutes", None, "End by then (default 9; with --cpu 60).", type=float)
    add("--only", PARTS, "Some of the parts.", nargs="+", choices=PARTS)
    add("--recipes", list(RUNS), "Some of the recipes.", nargs="+", choices=list(RUNS))
    add("--out", None, "Folder for results.jsonl, table.md, log.txt. Default: build/gpu-first-DATE.", type=Path)
    add("--scratch", None, "Folder on a disk with 37 GB. Default: a temporary one.", type=Path)
    add("--cpu", False, "Small models on the CPU.", action="store_true")
    add("--steps", 12, "Steps of the small runs.", type=int)
    add("--measured", 5, "Measured steps of a run of full_size.py.", type=int)
    add("--rounds", 1, "Runs of each side in full_size.py.", type=int)
    add("--jobs", max(1, min(8, (os.cpu_count() or 1) // 2)), "Things done side by side.", type=int)
    add("--judge", None, "Print the tables of this results.jsonl; run nothing.", type=Path)
    args = parser.parse_args(argv)
    if args.minutes is None:
        args.minutes = 60 if args.cpu else 9
    if not args.minutes > 0 or args.steps < 4 or min(args.measured, args.rounds, args.jobs) < 1:
        fail("--minutes must be above 0, --steps at least 4, --measured, --rounds and --jobs at least 1")
    if args.out is None:
        args.out = ROOT / "build" / f"gpu-first-{time.strftime('%Y%m%d-%H%M%S')}"
    if args.judge and not args.judge.is_file():
        fail(f"--judge {args.judge}: no such file")
    args.only = [part for part in PARTS if part in args.only]
    args.recipes = [recipe for recipe in RUNS if recipe in args.recipes]
    return args


def make_folder(out):
    """Make the folder for the results. Ends the program where it cannot be, or holds other results."""
    if (out / "results.jsonl").exists():
        fail(f"--out {out} holds results already: choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.txt").touch()
    except OSError as error:
        fail(f"--out {out} cannot be written: {error.strerror}")


def main(argv=None):
    """Flags -> exit status: 1 where a bar is missed, or anything failed or did not run."""
    args = parse(argv)
    if args.judge:
        text, is_well = report(read(args.judge))
        print(text)
        return 0 if is_well else 1
    make_folder(args.out)
    if args.scratch:
        args.scratch.mkdir(parents=True, exist_ok=True)
    removed = functools.partial(tempfile.TemporaryDirectory, prefix="gpu-first-", ignore_cleanup_errors=True)
    with removed(dir=args.scratch) as scratch, removed() as temporary:
        session = Session(args, Path(scratch).resolve(), temporary)
        plan = {"parts": args.only, "all_parts": PARTS, "recipes": args.recipes, "cpu": args.cpu}
        date = time.strftime("%Y-%m-%d %H:%M")
        session.record("begin", "run", "ok", **plan, date=date, minutes=args.minutes, arguments=sys.argv[1:])
        try:
            run_parts(session)
        except KeyboardInterrupt:
            session.record("end", "run", "interrupted")
    text, is_well = report(session.records)
    (args.out / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\n{args.out}: results.jsonl, table.md, log.txt")
    return 0 if is_well else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl+C: what it has started ends, too
    start(lambda: sys.exit(main()))
