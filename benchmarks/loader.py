"""What it takes to feed a GPU: rows per second of each recipe's collator by number of loader processes, beside TRL's
own collator, and what is padded in random batches, in the steps by length of llava_two_stage.py, and in Transformers'
group_by_length.

    python benchmarks/loader.py                            # all recipes, 0, 2 and 4 workers; takes its time on 2 cores
    python benchmarks/loader.py dpo_idefics2 --rows 256 --workers 4 8 16 --batch_size 2 --json loader.json

No model and no GPU is needed. The rows are synthesised: JPEGs of 1000 x 800 pixels on disk, one a row, a question of
8-20 tokens and answers of 60-150 (a pair has two), for documents of 3-15. The processors are the recipes' own, with
the tokenizer of a tiny model: LLaVA at 336 pixels (576 image tokens), Idefics2 at the recipe's --longest_edge (490
pixels for pairs, 980 for pages, 64 tokens), MiniCPM-V 4.6 with up to 9 slices of 448 pixels (64 tokens each).
`load_data` reads the rows from a .jsonl file, and the DataLoader is the one that a Trainer with the recipe's settings
makes. TRL's collators get the same processor and the same rows, as a data set whose column of images is decoded when a
row is read, and are as TRL makes them by default.

Timed is a pass over all rows, wall time, with workers that are there already (a pass before starts them); a round
takes every setting once, and the median of the rounds is shown. More workers than cores cannot be faster. Where other
programs share the cores, the CPU time of a row, taken without workers, says more.

Padding is counted from the lengths of the rows, drawn with replacement to some 4,096, at the recipe's default step
(more where a batch is larger): padded tokens / all tokens of the batches. For pairs a row is the longer of its two
sequences."""

import functools
import importlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from made_up import PICTURE, SIDES, photograph, recipe_row, sized_processor, trl_data, trl_row  # noqa: E402
from measure import (  # noqa: E402
    SMALL,
    add_recipes,
    as_flags,
    benchmark_parser,
    check_json,
    check_recipes,
    start,
    write_json,
)
from transformers.trainer_pt_utils import LengthGroupedSampler  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference  # noqa: E402
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling  # noqa: E402

TINY_PICTURE = (200, 160)
BATCHES = (2, 4, 8)  # whose padding is counted
DRAWN = 4096
SEED = 0
QUESTION = (8, 20)  # tokens, at least and at most
WORDS = """the a is of two red blue small large near on under left right picture shows there and with total form
name""".split()


@dataclass(frozen=True)
class Case:
    """What is fed to one recipe."""

    model: str
    trl_collator: type | None = DataCollatorForVisionLanguageModeling  # None: it asks for what the processor lacks
    answer: tuple = (60, 150)  # tokens, at least and at most
    flags: dict = field(default_factory=dict)


CASES = {
    "sft_llava": Case("llava-1.5-7b"),
    "llava_two_stage": Case("llava-1.5-7b", flags={"stage": "instruct"}),
    "dpo_idefics2": Case("idefics2-8b", DataCollatorForVisionPreference),
    "idefics2_docvqa": Case("idefics2-8b", answer=(3, 15)),
    "finetune_minicpm_lora": Case("minicpm-v-4.6", trl_collator=None),
}


# ---------------------------------------------------------------- rows


def text(draw, counts, bounds):
    """Words of a number of tokens within `bounds`, uniformly. `counts`: the tokens of each word with a space before
    it."""
    left, words = draw.randint(*bounds), []
    while fitting := [word for word, count in counts.items() if count <= left]:
        words.append(draw.choice(fitting))
        left -= counts[words[-1]]
    return " ".join(words)


def make_rows(n, tokenizer, bounds, images):
    """n times (question, [answer, another one], the name of its image)."""

    def tokens(words):
        return tokenizer(words, add_special_tokens=False).input_ids

    draw, rows = random.Random(SEED), []
    counts = {word: len(tokens(f"on {word}")) - len(tokens("on")) for word in WORDS}
    for image in images[:n]:
        question = text(draw, counts, QUESTION) + "?"
        rows.append((question, [text(draw, counts, bounds) for _ in range(2)], image))
    return rows


# ---------------------------------------------------------------- loaders


class Loaders:
    """The loaders of a recipe over synthesised rows in a folder that holds JPEGs (`images`)."""

    def __init__(self, name, args, folder, images):
        self.case, self.module, self.args = CASES[name], importlib.import_module(name), args
        image_folder, folder = folder, folder / name
        side = 56 if args.tiny and self.case.model != "idefics2-8b" else SIDES[self.case.model]
        processor = sized_processor(self.case.model, side)
        processor.save_pretrained(folder / "model")
        rows = make_rows(args.rows, processor.tokenizer, self.case.answer, images)
        (folder / "rows.jsonl").write_text("\n".join(json.dumps(recipe_row(name, *row)) for row in rows))
        self.flags = {
            "model_name_or_path": folder / "model",
            "dataset_name": folder / "rows.jsonl",
            "image_folder": image_folder,
            "output_dir": folder / "out",
            "eval_strategy": "no",
            "report_to": "none",
            "per_device_train_batch_size": args.batch_size,
            "gradient_accumulation_steps": 1,
            "use_cpu": True,
            **self.case.flags,
        }
        self.settings, training = self.parse()
        self.processor = self.module.load_processor(self.settings)
        collator = self.module.Collator(self.processor, self.settings, training)
        self.rows, _ = self.module.load_data(self.settings, training, collator)
        self.sides = ["recipe"]
        if self.case.trl_collator:
            self.sides.append("trl")
            trl_rows = [trl_row(name, question, some, str(image_folder / image)) for question, some, image in rows]
            self.trl_rows = trl_data(trl_rows)

    def parse(self, workers=0):
        """The recipe's settings and training, with so many loader processes."""
        return self.module.parse(as_flags({**self.flags, "dataloader_num_workers": workers}))

    def loader(self, side, workers):
        """The DataLoader that a Trainer makes of the rows of a side, in their order; its workers outlive a pass."""
        settings, training = self.parse(workers)
        training.train_sampling_strategy, training.dataloader_persistent_workers = "sequential", workers > 0
        if side == "recipe":
            rows, collator = self.rows, self.module.Collator(self.processor, settings, training)
        else:
            rows, collator = self.trl_rows, self.case.trl_collator(self.processor)
        return transformers.Trainer(torch.nn.Linear(1, 1), training, collator, rows).get_train_dataloader()

    def step(self):
        """Rows of a step by the recipe's defaults, on one GPU."""
        _, training = self.module.parse(as_flags({"use_cpu": True, **self.case.flags}))
        return training.train_batch_size * training.gradient_accumulation_steps


def seconds(loader):
    """-> (wall time, CPU time of this process) of a pass over a loader."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in loader:
        pass
    return time.perf_counter() - wall, time.process_time() - cpu


# ---------------------------------------------------------------- padding


def padded(order, lengths, batch):
    """Rows in `order`, in batches of so many -> (tokens that are padding, all tokens)."""
    real, total = 0, 0
    for n in range(0, len(order), batch):
        some = [lengths[row] for row in order[n : n + batch]]
        real += sum(some)
        total += len(some) * max(some)
    return total - real, total


def seeded():
    """A generator of random numbers, the same each time."""
    return torch.Generator().manual_seed(SEED)


def samplers(module, lengths, step, batch):
    """{name: order of rows} of the three ways, at steps of so many rows."""
    random_order = torch.randperm(len(lengths), generator=seeded()).tolist()
    by_length = random_order  # the Trainer's own sampler, and where a step is one batch
    if step != batch and hasattr(module, "ByModalityAndLength"):
        by_length = list(module.ByModalityAndLength(lengths, [1] * len(lengths), step, seeded))
    grouped = LengthGroupedSampler(step, lengths=lengths, generator=seeded())
    return {"random": random_order, "steps by length": by_length, "group_by_length": list(grouped)}


def padding(module, lengths, step):
    """-> {batch size: {order: {"share": of padding, "tokens": a row, padding included}}} of rows of these lengths."""
    found, drawn = {}, random.Random(SEED).choices(lengths, k=DRAWN)
    for batch in BATCHES:
        found[batch] = {}
        for name, order in samplers(module, drawn, max(step, batch), batch).items():
            pad, total = padded(order, drawn, batch)
            found[batch][name] = {"share": pad / total, "tokens": total / len(drawn)}
    return found


# ---------------------------------------------------------------- the run


def time_loaders(loaders, args):
    """-> {(side, workers): [(wall time, CPU time) of each round]}."""
    settings = {(side, workers): loaders.loader(side, workers) for workers in args.workers for side in loaders.sides}
    timed = {setting: [] for setting in settings}
    for loader in settings.values():
        seconds(loader)  # starts the workers
    for n in range(args.rounds):
        order = list(settings) if n % 2 == 0 else list(reversed(settings))  # else the same one finds warm caches
        for setting in order:
            timed[setting].append(seconds(settings[setting]))
    return timed


def measure(name, args, folder, images, report):
    """One recipe: rows per second and padding. Prints as it goes; returns all of it."""
    loaders = Loaders(name, args, folder, images)
    timed = time_loaders(loaders, args)
    each = {setting: [args.rows / wall for wall, _ in passes] for setting, passes in timed.items()}
    rates, cpu = {}, {}
    for side in loaders.sides:
        rates[side] = {workers: statistics.median(each[side, workers]) for workers in args.workers}
        if 0 in args.workers:
            cpu[side] = 1000 * statistics.median(used for _, used in timed[side, 0]) / args.rows
    lengths, step = list(loaders.rows["length"]), loaders.step()
    found = {
        "rows_per_second": rates,
        "rows_per_second_each": {f"{side} {workers}": values for (side, workers), values in each.items()},
        "cpu_ms_a_row": cpu,
        "lengths": lengths,
        "step": step,
        "padding": padding(loaders.module, lengths, step),
    }
    report(f"\n{name}: rows of {min(lengths)}-{max(lengths)} tokens, steps of {step}")
    report_rates(rates, cpu, report)
    for batch, orders in found["padding"].items():
        shares = [f"{order} {one['share']:6.2%}, {one['tokens']:.1f} tokens a row" for order, one in orders.items()]
        report(f"  batches of {batch}  padding: {'   '.join(shares)}")
    return found


def report_rates(rates, cpu, report):
    """A line for each number of workers: rows per second of both sides; without workers also the CPU time of a row."""
    for workers in rates["recipe"]:
        pair = {side: values[workers] for side, values in rates.items()}
        columns = [f"{side} {rate:6.1f} rows/s" for side, rate in pair.items()]
        if "trl" in pair:
            columns.append(f"{pair['recipe'] / pair['trl']:.2f}x")
        if workers == 0:
            columns += [f"{side} {milliseconds:6.1f} ms of CPU a row" for side, milliseconds in cpu.items()]
        report(f"  {workers:2d} workers    {'   '.join(columns)}")


def parse(argv=None):
    """Flags, checked. Ends the program with one message where they cannot work."""
    parser = benchmark_parser(__doc__)
    add_recipes(parser, CASES)
    parser.add_argument("--rows", type=int, help="Rows a pass. Default: 32.")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4], help="Numbers of loader processes.")
    parser.add_argument("--batch_size", type=int, default=4, help="Rows of a batch.")
    rounds_help = "Passes of each setting, of which the median is shown; with --tiny 1."
    parser.add_argument("--rounds", type=int, default=3, help=rounds_help)
    parser.add_argument("--tiny", action="store_true", help="Small pictures, few rows, of no meaning: for the tests.")
    args = parser.parse_args(argv)
    check_recipes(parser, args, CASES)
    if args.rows is None:
        args.rows = 8 if args.tiny else 32
    if min(args.workers) < 0 or min(args.rows, args.batch_size, args.rounds) < 1:
        parser.error("--workers: 0 or more; --rows, --batch_size, --rounds: at least 1")
    if args.tiny:
        args.rounds = 1
    check_json(parser, args.json)
    return args


def measure_all(args, folder, report):
    """All recipes that are asked for, on one set of JPEGs; prints as it goes, and writes --json."""
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"  # nothing is left in the user's own
    cores, size = len(os.sched_getaffinity(0)), TINY_PICTURE if args.tiny else PICTURE
    images = [f"{n}.jpg" for n in range(args.rows)]
    for n, name in enumerate(images):
        photograph(n, size, SEED).save(folder / name, quality=90)
    kilobytes = statistics.mean((folder / name).stat().st_size for name in images) / 1000
    versions = ", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, trl))
    report(
        f"{cores} CPU cores; {versions}; {args.rows} rows with a JPEG of {size[0]} x {size[1]} pixels, "
        f"{kilobytes:.0f} kB; batches of {args.batch_size}; median of {args.rounds}, wall time"
    )
    if args.tiny:
        report(SMALL)
    found = {name: measure(name, args, folder, images, report) for name in args.recipes}
    write_json(args, cores=cores, recipes=found)


def main(argv=None):
    """Flags -> exit status. One message and status 1 where rows or batches find no room."""
    args = parse(argv)
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure_all(args, Path(folder), functools.partial(print, flush=True))
    except (OSError, RuntimeError) as error:
        # Workers hand over batches in shared memory.
        if isinstance(error, RuntimeError) and "shared memory" not in str(error):
            raise
        cause = " ".join(str(error).split())
        room = f"{args.rows // 2 + 10} MB free"
        sys.exit(f"error: no scratch space: {cause}; give TMPDIR a folder with {room}, or less --rows, --workers")
    return 0


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*(pin_memory|This DataLoader will create).*")
    start(main)
