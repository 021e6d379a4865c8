"""Kill runs of the recipes, damage their checkpoints, fill their disk; start the same command again, and compare its
result with that of an undisturbed run: weights and log must be equal to the last bit.

    python benchmarks/kill_drill.py                                              # all of it
    python benchmarks/kill_drill.py --recipes sft_llava --kills 9 --jobs 1       # of one recipe
    python benchmarks/kill_drill.py --short                                      # what `make test` does

The models are tiny, with random weights, on the CPU: a run takes seconds. It has 4 rows a step, a checkpoint and an
evaluation every 3 steps, no loader processes or 2. Signals:

    KILL  To the process; of two that train together to one, and the other must end by itself or by the TERM that
          torchrun would send it. At most the steps since the last checkpoint are lost.
    TERM  To the process, or also to its loader processes, as Slurm does; to both of two, up to 100 ms apart. The exit
          status is 143, and no step is lost, but those since the last checkpoint where it comes in an evaluation.
    INT   To the process and its loader processes, as a terminal does at Ctrl-C. One message, exit status 1.

Each comes at a random moment of the run, or while a checkpoint or the result is written, and to two processes at
either. A quarter of the runs that are killed at random are killed again after they were started again. A run that does
not end within 180 s is a fault.

Damage: in each file of the newest checkpoint a byte is flipped, half is cut off, all is cut off, the file is deleted.
The run must name checkpoint and file, and resume from the checkpoint before.
Disk: it is full while a checkpoint is written, then while the result is. It is a small tmpfs, or where none may be
mounted a limit to the size of files, which fails with another error.

Exit status 1 if anything is not as it must be."""

import contextlib
import functools
import gc
import json
import multiprocessing
import multiprocessing.connection
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import kill_drill_runs as runs
from kill_drill_runs import RECIPES, Case, Run, wait_until

from tools import program

STEPS = {"max_steps": 18, "save_steps": 3, "eval_steps": 3}
SHORT_STEPS = {"max_steps": 4, "save_steps": 2, "eval_steps": 2}
SIGNALS, PLACES = ("KILL", "TERM", "INT"), ("at random", "in a save", "of two")
TRIES = 5  # a random moment may come after the end of the run
HANGS = 180  # seconds
HANDLERS = 1  # seconds a recipe has to install its handlers; before that a signal meets Python's own
LIMITS = {"KILL": 10, "TERM": 10, "INT": 2}  # seconds in which all processes must have ended after the signal
# What the first process prints if TERM came when no step ran, to it or to the other one, which prints nothing.
ENDED_AT_ONCE = re.compile("SIGTERM: ended at once|another process is dead|another process of this run has ended")
DAMAGES = ("flipped", "halved", "emptied", "deleted")
LARGE, SPARE = 2**30, 40 * 1024  # bytes of a disk with room, and of one that is nearly full


class Reference(NamedTuple):
    """A run that nothing disturbed."""

    recipe: str
    ranks: int
    workers: int
    result: dict
    seconds: float
    checkpoint_size: int  # bytes on disk


class Trial(NamedTuple):
    """A run that is to be killed. The seed draws the moments."""

    recipe: str
    signal: str
    place: str
    workers: int
    seed: str

    @property
    def ranks(self):
        return 2 if self.place == "of two" else 1


@dataclass
class Outcome:
    """What came of a trial, of one damage, or of a full disk."""

    recipe: str
    kind: str
    detail: str
    kills: int = 0
    resumed: bool = False  # from a checkpoint
    ended: bool = False  # started again, the command ended with status 0
    equal: bool = False
    steps_lost: int = 0
    seconds: float = 0.0  # from the signal to the end, the slowest
    faults: list = field(default_factory=list)

    def check_end(self, codes, text, out, expected):
        """Note how the command ended that was started again, and what its result differs in."""
        self.ended = set(codes) == {0}
        if not self.ended:
            self.faults.append(f"not resumable: exit status {codes}: {last_line(text)}")
            return
        differences = runs.differences(out, expected)
        self.equal = not differences
        self.faults += differences
        if "Traceback" in text:
            self.faults.append("a traceback when started again")


def last_line(text):
    return (text.strip().splitlines() or ["nothing printed"])[-1][:200]


# ---------------------------------------------------------------- kills


class Attempt:
    """The runs of one trial in one output_dir: killed, started again, and at last let end."""

    def __init__(self, trial, case, reference, out, stack):
        self.trial, self.case, self.reference, self.out, self.stack = trial, case, reference, out, stack
        self.rng = random.Random(f"{trial.seed} {out.name}")
        self.outcome = Outcome(trial.recipe, f"{trial.signal} {trial.place}", f"{trial.workers} workers, {trial.seed}")
        self.sent = ""  # the last signal, and to whom
        self.ended_at_once = False  # by TERM, since it was not in a step: in an evaluation steps are lost
        self.started = 0
        self.step = 0  # that was reached before the last kill

    def start(self):
        """Start the command. The loader processes of a killed run live on meanwhile, as they would."""
        command = self.case.command(self.out, self.trial.ranks, dataloader_num_workers=self.trial.workers)
        self.started += 1
        return self.stack.enter_context(Run(self.case, command, f"{self.out}-{self.started}", self.trial.ranks))

    def interrupt(self):
        """Start the command and kill it. Returns False if it ended before that."""
        whole, run = runs.newest_whole(self.out), self.start()
        in_save = self.trial.place == "in a save" or self.trial.place == "of two" and self.rng.random() < 0.5
        self.wait_for_moment(run, in_save)
        if not run.has_ended:
            self.send_signals(run)
        sent = time.monotonic()
        wait_until(lambda: run.has_ended, HANGS)
        if set(run.codes) == {0}:
            return False
        seconds, outcome = time.monotonic() - sent, self.outcome
        outcome.kills += 1
        outcome.seconds = max(outcome.seconds, seconds)
        if not runs.is_finished(self.out):
            outcome.faults += self.faults_of_end(run.codes, run.text, seconds)
        if not run.has_ended:
            run.kill()
        if run.start_step is not None:
            if outcome.kills > 1:
                self.note_restart(run, whole)
            self.step = run.step
        self.ended_at_once = bool(ENDED_AT_ONCE.search(run.text))
        return True

    def wait_for_moment(self, run, in_save):
        """Wait for a random moment of the run's time, or of the writing of one of its checkpoints, or its result."""
        share, case = self.rng.random(), self.case
        if not in_save:
            earlier = 0.7 ** int(self.out.name.removeprefix("out"))  # than the last time, when it had ended before
            wait_until(lambda: run.has_ended, share * earlier * self.reference.seconds)
            return
        step = case.save_steps * (1 + int(share * (1 + case.steps // case.save_steps)))
        folder = self.out / f"checkpoint-{step}"

        def is_written():
            if step > case.steps:
                return any(self.out.glob(runs.WEIGHTS)) and not runs.is_finished(self.out)
            return folder.exists() and not runs.is_listed(folder)

        wait_until(lambda: run.has_ended or is_written(), HANGS)
        time.sleep(self.rng.uniform(0, 0.02))

    def send_signals(self, run):
        name, rng = self.trial.signal, self.rng
        number, first = getattr(signal, f"SIG{name}"), rng.randrange(self.trial.ranks)
        self.sent = name
        if name != "KILL":
            wait_until(lambda: run.catches(signal.SIGTERM), HANDLERS)
        if name == "INT" or name == "TERM" and self.trial.workers and rng.random() < 0.5:
            self.sent = f"{name} (to loader processes as well)"
        whole_group = self.sent != name
        if name == "INT":
            run.send(number, whole_group)
            return
        run.send(number, whole_group, rank=first)
        if name == "TERM" and self.trial.ranks == 2:
            time.sleep(rng.uniform(0, 0.1))
            run.send(number, whole_group, rank=1 - first)
        if name == "KILL" and self.trial.ranks == 2 and rng.random() < 0.5:
            self.sent = "KILL of one and TERM to the other"
            time.sleep(0.1)  # torchrun looks every so often
            run.send(signal.SIGTERM, rank=1 - first)

    def faults_of_end(self, codes, text, seconds):
        """What is wrong with how a run ended after its signal."""
        if None in codes:
            return [f"hangs after {self.sent}: exit status {codes}"]
        faults, name = [], self.trial.signal
        expected = {"KILL": -9, "TERM": 143, "INT": 1}[name]
        if name == "KILL" and self.trial.ranks == 2:
            if 0 in codes:
                faults.append(f"exit status {codes} after {self.sent}: one ended as if finished")
        elif name == "TERM" and self.trial.ranks == 2 and ENDED_AT_ONCE.search(text):
            # The other one, which is told later, may end by the error that this one is gone.
            if 143 not in codes or not set(codes) <= {1, 143}:
                faults.append(f"exit status {codes} after {self.sent}, expected 143 and perhaps 1: {last_line(text)}")
            return faults
        elif set(codes) != {expected}:
            faults.append(f"exit status {codes} after {self.sent}, expected {expected}: {last_line(text)}")
        if name != "KILL" and "Traceback" in text:
            faults.append(f"a traceback after {self.sent}: {last_line(text)}")
        messages = text.count("error: interrupted")
        if name == "INT" and messages != 1:
            faults.append(f"{messages} messages after {self.sent}, expected 1")
        if seconds > LIMITS[name]:
            faults.append(f"{seconds:.1f} s to the end after {self.sent}, expected {LIMITS[name]}")
        return faults

    def finish(self):
        """Start the command again, let it end, and compare its result with the expected one."""
        whole, was_finished = runs.newest_whole(self.out), runs.is_finished(self.out)
        run = self.start()
        wait_until(lambda: run.has_ended, HANGS)
        self.outcome.check_end(run.codes, run.text, self.out, self.reference.result)
        if self.outcome.ended and not was_finished:
            self.note_restart(run, whole)

    def note_restart(self, run, whole):
        """Count what was lost between a killed run and the next one. `whole`: the newest whole checkpoint before."""
        if run.start_step is None:
            self.outcome.faults.append("started again, it does not say from where")
            return
        self.outcome.resumed |= run.start_step > 0
        lost = max(0, self.step - run.start_step)
        self.outcome.steps_lost = max(self.outcome.steps_lost, lost)
        allowed = 0 if self.trial.signal == "TERM" and not self.ended_at_once else self.case.save_steps
        if lost > allowed:
            self.outcome.faults.append(f"{lost} steps lost after {self.sent}, at most {allowed} expected")
        if whole is not None and run.start_step < whole:
            self.outcome.faults.append(f"resumed from step {run.start_step}, though checkpoint-{whole} is whole")


def run_trial(trial, case, reference, scratch):
    """Kill a run, perhaps twice, start it again, compare. Returns a list with its Outcome."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    for number in range(TRIES):
        with contextlib.ExitStack() as stack:
            attempt = Attempt(trial, case, reference, folder / f"out{number}", stack)
            if attempt.interrupt():
                if trial.place == "at random" and attempt.rng.random() < 0.25:
                    attempt.interrupt()
                attempt.finish()
                break
    else:
        attempt.outcome.faults.append(f"no kill: the run ended before its moment, {TRIES} times")
    shutil.rmtree(folder)
    return [attempt.outcome]


# ---------------------------------------------------------------- undisturbed, damaged, without room


def run_to_end(case, out, ranks=1, workers=0, prepare=None):
    """Run a command to its end; `prepare(run)` comes early in it. Returns (exit statuses, output, seconds)."""
    began, log = time.monotonic(), out.with_name(f"{out.name}-{time.monotonic_ns()}")
    with Run(case, case.command(out, ranks, dataloader_num_workers=workers), log, ranks) as run:
        if prepare is not None:
            prepare(run)
        wait_until(lambda: run.has_ended, HANGS)
        return run.codes, run.text, time.monotonic() - began


def run_undisturbed(case, ranks, workers, out):
    """-> Reference. Raises RuntimeError if it does not end well."""
    codes, text, seconds = run_to_end(case, out, ranks, workers)
    if set(codes) != {0}:
        raise RuntimeError(f"{case.name}, undisturbed: exit status {codes}\n{text[-3000:]}")
    size = max(runs.disk_usage(folder) for folder in runs.checkpoints(out).values())
    return Reference(case.name, ranks, workers, runs.result(out), seconds, size)


def damage(file, how):
    """Do one of DAMAGES to a file."""
    content = file.read_bytes()
    middle = len(content) // 2
    if how == "deleted":
        file.unlink()
    elif how == "flipped":
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.write_bytes(content[:middle] if how == "halved" else b"")


def damage_all(case, scratch, files=None, damages=DAMAGES):
    """Damage each file, or only some `files`, of the newest of two checkpoints in each way. Returns Outcomes."""
    case = Case(case.name, case.folder, {**case.flags, **SHORT_STEPS})
    out, saved = scratch / f"{case.name}-damaged", scratch / f"{case.name}-saved"
    expected = run_undisturbed(case, 1, 0, out).result
    runs.take_result_away(out)
    out.rename(saved)  # each run is in `out`: a checkpoint knows the path of the best one
    newest = saved / f"checkpoint-{case.steps}"
    names = files or sorted(path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file())
    outcomes = []
    for name in names:
        for how in damages:
            shutil.copytree(saved, out)
            damage(out / newest.name / name, how)
            codes, text, _ = run_to_end(case, out)
            outcome = Outcome(case.name, f"damage: {how}", name)
            outcome.check_end(codes, text, out, expected)
            outcome.resumed = f"checkpoint-{case.save_steps}\n" in text
            # Without checksums.json a checkpoint is taken for one of an earlier version. Damaged, it blames others.
            is_list = name == "checksums.json"
            file = r"\S+" if is_list else re.escape(name)
            if not re.search(rf"{newest.name}\b.*\W{file}\W.*skipped", text) and not (is_list and how == "deleted"):
                outcome.faults.append("the damage is not named")
            outcomes.append(outcome)
            shutil.rmtree(out)
    return outcomes


def faults_of_full_disk(codes, text, out, kept):
    """What is wrong with how a run ended on a full disk. `kept`: the checkpoints that must be left, whole."""
    faults, found = [], runs.checkpoints(out)
    messages = len(re.findall("^error: ", text, re.MULTILINE))
    if codes != [1] or messages != 1 or "Traceback" in text:
        faults.append(f"exit status {codes}, {messages} messages, expected one: {last_line(text)}")
    if list(found) != kept:
        faults.append(f"the checkpoints {list(found)} are left, expected {kept}")
    faults += [f"{folder.name} is not whole" for step, folder in found.items() if not runs.is_whole(folder)]
    if runs.is_finished(out):
        faults.append("it is marked as finished")
    return faults


def fill_disk(case, reference, scratch, use_tmpfs):
    """A disk that is full while a checkpoint is written, and one while the result is. Returns Outcomes."""
    out = scratch / f"{case.name}-disk" / "out"
    out.parent.mkdir()
    size = max(map(len, reference.result["weights"].values())) // 2  # so large files may be, without a tmpfs
    outcomes = []

    def limit_after_first_save(run):
        wait_until(lambda: run.has_ended or run.step > case.save_steps, HANGS)
        run.limit_files(size)

    with runs.small_disk(out.parent, LARGE) if use_tmpfs else contextlib.nullcontext() as resize:
        for what in ("a checkpoint", "the result"):
            kept, prepare = [case.save_steps], limit_after_first_save
            room = int(1.5 * reference.checkpoint_size)
            if what == "the result":  # the checkpoints of the first time are there
                kept, room = list(runs.checkpoints(out)), runs.disk_usage(out)
                prepare = functools.partial(Run.limit_files, size=size)
            if use_tmpfs:
                prepare = None
                resize(room + SPARE)
            codes, text, _ = run_to_end(case, out, prepare=prepare)
            outcome = Outcome(case.name, f"disk full: {what}", "", faults=faults_of_full_disk(codes, text, out, kept))
            if use_tmpfs:
                resize(LARGE)
            codes, text, _ = run_to_end(case, out)
            outcome.check_end(codes, text, out, reference.result)
            outcome.resumed = "resuming from" in text
            outcomes.append(outcome)
            runs.take_result_away(out)
    return outcomes


# ---------------------------------------------------------------- all of it


def plan(recipes, kills, seed):
    """At least so many Trials: all recipes, signals and places, as often as it takes."""
    kinds = [(recipe, name, place) for place in PLACES for name in SIGNALS for recipe in recipes]
    every = [(number, *kind) for number in range(-(-kills // len(kinds))) for kind in kinds]
    return [Trial(*kind, 2 * ((number + n) % 2), f"{seed}-{n}") for n, (number, *kind) in enumerate(every)]


def short_plan(recipes):
    """One Trial of each signal for each recipe, and one of two processes."""
    kinds = [(name, "in a save") for name in SIGNALS]
    trials = [Trial(name, *kind, 2 * (n % 2), f"short-{n}") for n, name in enumerate(recipes) for kind in kinds]
    return [*trials, Trial(recipes[0], "KILL", "of two", 0, "short")]


def work(tasks, sender):
    """In a process of its own: do the tasks, send what each returns, at last None. SIGTERM ends it with all that it
    has started; at Ctrl-C the drill sends that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for task in tasks:
        try:
            sender.send(task())
        except KeyboardInterrupt:
            return
        except Exception:
            sender.send(RuntimeError(traceback.format_exc()))
    sender.send(None)


def spread(tasks, jobs):
    """Do tasks (functions without arguments) in so many processes, and yield what each returns, in any order. Raises
    RuntimeError where one fails. No thread may be started here: those processes are forks, and fork again."""
    context, working = multiprocessing.get_context("fork"), {}
    for number in range(jobs):
        receiver, sender = context.Pipe(duplex=False)
        working[receiver] = context.Process(target=work, args=(tasks[number::jobs], sender))
        working[receiver].start()
    try:
        while working:
            for receiver in multiprocessing.connection.wait(list(working), timeout=10):
                result = receiver.recv()
                if isinstance(result, Exception):
                    raise result
                if result is None:
                    working.pop(receiver).join()
                else:
                    yield result
            if any(process.exitcode for process in working.values()):
                raise RuntimeError("a process of the drill itself died")
    finally:
        for process in working.values():
            process.terminate()
            process.join()


def drill(recipes, trials, scratch, steps, jobs=1, disturbed=(), files=None, damages=DAMAGES, use_tmpfs=False):
    """Do the trials; damage the checkpoints and fill the disks of the recipes `disturbed`. Yields Outcomes."""
    cases = {name: runs.build(name, scratch / name, steps) for name in recipes}
    needed = {(trial.recipe, trial.ranks, trial.workers) for trial in trials} | {(name, 1, 0) for name in disturbed}
    tasks = [functools.partial(run_undisturbed, cases[key[0]], *key[1:], scratch / repr(key)) for key in needed]
    references = {reference[:3]: reference for reference in spread(tasks, jobs)}
    tasks = [functools.partial(damage_all, cases[name], scratch, files, damages) for name in disturbed]
    tasks += [functools.partial(fill_disk, cases[n], references[n, 1, 0], scratch, use_tmpfs) for n in disturbed]
    for trial in trials:
        reference = references[trial.recipe, trial.ranks, trial.workers]
        tasks.append(functools.partial(run_trial, trial, cases[trial.recipe], reference, scratch))
    for outcomes in spread(tasks, jobs):
        yield from outcomes


def table(outcomes):
    """A line for each recipe and kind."""
    columns = "runs|kills|resumed|equal|different|lost|most steps lost|slowest end|faults".split("|")
    lines = program.text_table("recipe", "kind", *columns, left=2)
    for key in sorted({(outcome.recipe, outcome.kind) for outcome in outcomes}):
        some = [outcome for outcome in outcomes if (outcome.recipe, outcome.kind) == key]
        ended = sum(outcome.ended for outcome in some)
        equal = sum(outcome.equal for outcome in some)
        counts = [len(some), sum(outcome.kills for outcome in some), sum(outcome.resumed for outcome in some)]
        counts += [equal, ended - equal, len(some) - ended, max(outcome.steps_lost for outcome in some)]
        slowest = f"{max(outcome.seconds for outcome in some):.1f} s"
        lines.add_row(*key, *map(str, counts), slowest, str(sum(len(outcome.faults) for outcome in some)))
    return lines


def verdict(outcomes):
    """One line, which begins with "all held" or "faults"."""
    kills, faults = (sum(counts) for counts in zip(*((o.kills, len(o.faults)) for o in outcomes)))
    lost = sum(not outcome.ended for outcome in outcomes)
    different = sum(outcome.ended and not outcome.equal for outcome in outcomes)
    held = "all held" if faults == 0 else f"faults: {faults}"
    return f"{held}; {len(outcomes)} runs, {kills} kills, {lost} lost, {different} different"


def read_flags(argv):
    parser = program.flag_parser(__doc__)
    parser.add_argument("--kills", type=int, default=225, help="At least so many. Default: 225.")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--seed", type=int, default=0, help="Draws the moments.")
    parser.add_argument("--jobs", type=int, default=2, help="Runs at the same time. Default: 2.")
    parser.add_argument("--short", action="store_true", help="A few kills, one damage: a minute.")
    parser.add_argument("--json", type=Path, help="Write all outcomes to this file.")
    return parser.parse_args(argv)


def short_form(recipes, scratch, jobs=1, use_tmpfs=False):
    """The drill as the tests do it. Yields Outcomes."""
    few = {"disturbed": recipes[:1], "files": ["optimizer.pt"], "damages": ["flipped"], "use_tmpfs": use_tmpfs}
    return drill(recipes, short_plan(recipes), scratch, SHORT_STEPS, jobs, **few)


def main(argv=None):
    args, began, outcomes = read_flags(argv), time.monotonic(), []
    runs.datasets.disable_progress_bars()
    runs.transformers.utils.logging.disable_progress_bar()
    gc.collect()
    gc.freeze()  # the collections of forks leave alone what is here already
    with tempfile.TemporaryDirectory(prefix="kill-drill-") as folder:
        scratch = Path(folder)
        use_tmpfs = runs.can_mount(scratch / "mount")
        print(
            "full disk: a small tmpfs" if use_tmpfs else "full disk: no tmpfs may be mounted, file sizes are limited"
        )
        if args.short:
            running = short_form(args.recipes, scratch, args.jobs, use_tmpfs)
        else:
            trials = plan(args.recipes, args.kills, args.seed)
            running = drill(args.recipes, trials, scratch, STEPS, args.jobs, args.recipes, use_tmpfs=use_tmpfs)
        for outcome in running:
            outcomes.append(outcome)
            for fault in outcome.faults:
                print(f"FAULT: {outcome.recipe}, {outcome.kind}, {outcome.detail}: {fault}", flush=True)
    program.print_table(table(outcomes))
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    last = verdict(outcomes)
    print(f"{time.monotonic() - began:.0f} s\n{last}")
    return 0 if last.startswith("all held") else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what it has started ends with it
    program.start(lambda: sys.exit(main()))
