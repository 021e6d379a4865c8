"""What it takes to feed a GPU: rows per second of each recipe's collator by number of loader processes, beside TRL's own
collator, and what is padded in random batches, in the steps by length of llava_two_stage.py, and in Transformers' group_by_length.

    python benchmarks/loader.py                              # all recipes, 0, 2 and 4 workers; takes its time on 2 cores
    python benchmarks/loader.py dpo_idefics2 --rows 256 --workers 4 8 16 --batch_size 2 --json loader.json

No model and no GPU is needed. The rows are synthesised: JPEGs of 1000 x 800 pixels on disk, one a row, a question of 8-20
tokens and answers of 60-150 (a pair has two), for documents of 3-15. The processors are the recipes' own, with the tokenizer
of a tiny model: LLaVA at 336 pixels (576 image tokens), Idefics2 at the recipe's --longest_edge (490 pixels for pairs, 980 for
pages, 64 tokens), MiniCPM-V 4.6 with up to 9 slices of 448 pixels (64 tokens each). `load_data` reads the rows from a .jsonl
file, and the DataLoader is the one that a Trainer with the recipe's settings makes. TRL's collators get the same processor and
the same rows, as a data set whose column of images is decoded when a row is read, and are as TRL makes them by default.

Timed is a pass over all rows, wall time, with workers that are there already (a pass before starts them); a round takes every
setting once, and the median of the rounds is shown. More workers than cores cannot be faster. Where other programs share the
cores, the CPU time of a row, taken without workers, says more.

Padding is counted from the lengths of the rows, drawn with replacement to some 4,096, at the recipe's default step (more
where a batch is larger): padded tokens / all tokens of the batches. For pairs a row is the longer of its two sequences."""

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
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from measure import SMALL, check_json, flag_parser, start  # noqa: E402
from PIL import Image  # noqa: E402
from transformers.trainer_pt_utils import LengthGroupedSampler  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference  # noqa: E402
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling  # noqa: E402

from tiny import idefics2, llava, minicpm  # noqa: E402

SIZE, TINY_SIZE = (1000, 800), (200, 160)
LONG, SHORT, QUESTION = (60, 150), (3, 15), (8, 20)
BATCHES = (2, 4, 8)  # whose padding is counted
DRAWN = 4096
SEED = 0
WORDS = "the a is of two red blue small large near on under left right picture shows there and with total form name".split()

# ---------------------------------------------------------------- processors


def llava_processor(tiny):
    """LLaVA-1.5's: 336 pixels, 576 image tokens."""
    processor, side = llava.processor(), 56 if tiny else 336
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    return processor


def idefics2_processor(tiny):
    """Idefics2's: from 378 to 980 pixels, 64 image tokens."""
    processor = idefics2.processor()
    processor.image_seq_len = 64
    processor.image_processor.size = {"shortest_edge": 37 if tiny else 378, "longest_edge": 980}
    return processor


def minicpm_processor(tiny):
    """MiniCPM-V 4.6's: a picture as a whole and in slices of 448 pixels."""
    processor = minicpm.processor()
    processor.image_processor.scale_resolution = 56 if tiny else 448
    return processor


# ---------------------------------------------------------------- rows: what a recipe reads, and the same for TRL


def talk(question, answers, image):
    messages = [
        ("user", [{"type": "image"}, {"type": "text", "text": question}]),
        ("assistant", [{"type": "text", "text": answers[0]}]),
    ]
    return {"messages": [{"role": role, "content": content} for role, content in messages], "images": [image]}


def pair(question, answers, image):
    return {"image": image, "question": question, "chosen": answers[0], "rejected": answers[1]}


def page(question, answers, image):
    return {"image": image, "question": question, "answers": answers[:1]}


def official(question, answers, image):
    turns = [("user", f"<image>\n{question}"), ("assistant", answers[0])]
    return {"id": image, "image": image, "conversations": [{"role": role, "content": text} for role, text in turns]}


def llava_json(question, answers, image):
    turns = [("human", f"<image>\n{question}"), ("gpt", answers[0])]
    return {"image": image, "conversations": [{"from": who, "value": text} for who, text in turns]}


def trl_talk(question, answers, image):
    return {
        "images": [image],
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answers[0]}],
    }


def trl_pair(question, answers, image):
    said = {name: [{"role": "assistant", "content": text}] for name, text in zip(("chosen", "rejected"), answers)}
    return {"images": [image], "prompt": [{"role": "user", "content": question}], **said}


SFT, DPO = (trl_talk, DataCollatorForVisionLanguageModeling), (trl_pair, DataCollatorForVisionPreference)
# name: processor, rows, tokens of an answer, TRL's rows and collator, the recipe's flag of its data, more flags
RECIPES = {
    "sft_llava": (llava_processor, talk, LONG, SFT, "dataset_name", []),
    "llava_two_stage": (llava_processor, llava_json, LONG, SFT, "data_path", ["--stage", "instruct"]),
    "dpo_idefics2": (idefics2_processor, pair, LONG, DPO, "dataset_name", []),
    "idefics2_docvqa": (idefics2_processor, page, SHORT, SFT, "dataset_name", []),
    "finetune_minicpm_lora": (
        minicpm_processor,
        official,
        LONG,
        None,
        "data_path",
        [],
    ),  # TRL's asks for what its processor lacks
}


def picture(n, size):
    """The n-th picture, (width, height): large shapes and some grain, so that it compresses about as a photograph does."""
    rng = np.random.default_rng([SEED, n])
    coarse = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (size[1], size[0], 1))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


def text(draw, counts, bounds):
    """Words of a number of tokens within `bounds`, uniformly. `counts`: the tokens of each word with a space before it."""
    left, words = draw.randint(*bounds), []
    while fitting := [word for word, count in counts.items() if count <= left]:
        words.append(draw.choice(fitting))
        left -= counts[words[-1]]
    return " ".join(words)


def make_rows(n, tokenizer, bounds, images):
    """n times (question, [answer, another one], the name of its image)."""
    draw, tokens = random.Random(SEED), lambda text: tokenizer(text, add_special_tokens=False).input_ids
    counts = {word: len(tokens(f"on {word}")) - len(tokens("on")) for word in WORDS}
    return [
        (text(draw, counts, QUESTION) + "?", [text(draw, counts, bounds) for _ in range(2)], images[row])
        for row in range(n)
    ]


# ---------------------------------------------------------------- loaders


class Loaders:
    """The loaders of a recipe over synthesised rows in a folder that holds JPEGs (`images`): `recipe(workers)` and, where TRL
    has a collator for it, `trl(workers)`."""

    def __init__(self, name, args, folder, images):
        make, row, bounds, other, flag, more = RECIPES[name]
        self.module, self.args, folder = importlib.import_module(name), args, folder / name
        make(args.tiny).save_pretrained(folder / "model")
        rows = make_rows(args.rows, make(args.tiny).tokenizer, bounds, images)
        (folder / "rows.jsonl").write_text("\n".join(json.dumps(row(*one)) for one in rows))
        given = {
            "model_name_or_path": folder / "model",
            flag: folder / "rows.jsonl",
            "image_folder": folder.parent,
            "output_dir": folder / "out",
        }
        given |= {
            "eval_strategy": "no",
            "report_to": "none",
            "per_device_train_batch_size": args.batch_size,
            "gradient_accumulation_steps": 1,
        }
        self.flags = ["--use_cpu", *(str(part) for key, value in given.items() for part in (f"--{key}", value)), *more]
        self.settings, training = self.parse()
        self.processor = self.module.load_processor(self.settings)
        self.rows, _ = self.module.load_data(
            self.settings, training, self.module.Collator(self.processor, self.settings, training)
        )
        if other:
            described = datasets.Dataset.from_list([other[0](*one[:2], str(folder.parent / one[2])) for one in rows])
            self.other_rows, self.other = described.cast_column("images", datasets.List(datasets.Image())), other[1]
        self.sides = ["recipe", "trl"] if other else ["recipe"]

    def parse(self, workers=0):
        return self.module.parse([*self.flags, "--dataloader_num_workers", str(workers)])

    def loader(self, side, workers):
        """The DataLoader that a Trainer makes of the rows of a side, in their order; its workers outlive a pass."""
        settings, training = self.parse(workers)
        training.train_sampling_strategy, training.dataloader_persistent_workers = "sequential", workers > 0
        collator = (
            self.module.Collator(self.processor, settings, training)
            if side == "recipe"
            else self.other(self.processor)
        )
        rows = self.rows if side == "recipe" else self.other_rows
        return transformers.Trainer(torch.nn.Linear(1, 1), training, collator, rows).get_train_dataloader()

    def step(self):
        """Rows of a step by the recipe's defaults, on one GPU."""
        given = self.flags[self.flags.index("--stage") :] if "--stage" in self.flags else []
        training = self.module.parse(["--use_cpu", *given])[1]
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
    real, everything = 0, 0
    for n in range(0, len(order), batch):
        some = [lengths[row] for row in order[n : n + batch]]
        real, everything = real + sum(some), everything + len(some) * max(some)
    return everything - real, everything


def samplers(module, lengths, step, batch):
    """{name: order of rows} of the three ways, at steps of so many rows."""
    random_order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(SEED)).tolist()
    alike = random_order  # the Trainer's own sampler, and where a step is one batch
    if step != batch and hasattr(module, "ByModalityAndLength"):
        alike = list(
            module.ByModalityAndLength(lengths, [1] * len(lengths), step, lambda: torch.Generator().manual_seed(SEED))
        )
    grouped = LengthGroupedSampler(step, lengths=lengths, generator=torch.Generator().manual_seed(SEED))
    return {"random": random_order, "steps by length": alike, "group_by_length": list(grouped)}


def padding(module, lengths, step):
    """-> {batch size: {order: {"share": of padding, "tokens": a row, padding included}}} of rows of these lengths."""
    found, drawn = {}, random.Random(SEED).choices(lengths, k=DRAWN)
    for batch in BATCHES:
        orders = samplers(module, drawn, max(step, batch), batch)
        counts = {name: padded(order, drawn, batch) for name, order in orders.items()}
        found[batch] = {
            name: {"share": pad / every, "tokens": every / len(drawn)} for name, (pad, every) in counts.items()
        }
    return found


# ---------------------------------------------------------------- the run


def measure(name, args, folder, images, report):
    """One recipe: rows per second and padding. Prints as it goes; returns all of it."""
    loaders = Loaders(name, args, folder, images)
    settings = {(side, workers): loaders.loader(side, workers) for workers in args.workers for side in loaders.sides}
    timed = {setting: [] for setting in settings}
    for loader in settings.values():
        seconds(loader)  # starts the workers
    for n in range(args.rounds):
        for setting in list(settings)[:: 1 if n % 2 == 0 else -1]:  # whoever is first may find the caches otherwise
            timed[setting].append(seconds(settings[setting]))
    each = {setting: [args.rows / wall for wall, _ in passes] for setting, passes in timed.items()}
    rates = {
        side: {workers: statistics.median(each[side, workers]) for workers in args.workers} for side in loaders.sides
    }
    cpu = {
        side: 1000 * statistics.median(used for _, used in timed[side, 0]) / args.rows
        for side in loaders.sides
        if 0 in args.workers
    }
    lengths, step = list(loaders.rows["length"]), loaders.step()
    found = {
        "rows_per_second": rates,
        "rows_per_second_each": {f"{s} {w}": values for (s, w), values in each.items()},
        "cpu_ms_a_row": cpu,
    }
    found |= {"lengths": lengths, "step": step, "padding": padding(loaders.module, lengths, step)}

    report(f"\n{name}: rows of {min(lengths)}-{max(lengths)} tokens, steps of {step}")
    against = lambda pair, unit: "   ".join(f"{side} {value:6.1f} {unit}" for side, value in pair.items())
    for workers in args.workers:
        pair = {side: rates[side][workers] for side in rates}
        line = (
            f"  {workers:2d} workers    {against(pair, 'rows/s')}"
            + f"   {pair['recipe'] / pair.get('trl', 1):.2f}x" * ("trl" in pair)
        )
        report(line + f"   {against(cpu, 'ms of CPU a row')}" * (workers == 0))
    for batch, orders in found["padding"].items():
        shown = "   ".join(
            f"{order} {one['share']:6.2%}, {one['tokens']:.1f} tokens a row" for order, one in orders.items()
        )
        report(f"  batches of {batch}  padding: {shown}")
    return found


def arguments(argv=None):
    """Flags -> their values. Ends with one message and status 1 where one cannot be."""
    parser = flag_parser(__doc__)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"Any of {', '.join(RECIPES)}. Default: all.")
    parser.add_argument("--rows", type=int, help="Rows a pass. Default: 32.")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4], help="Numbers of loader processes.")
    parser.add_argument("--batch_size", type=int, default=4, help="Rows of a batch.")
    parser.add_argument(
        "--rounds", type=int, default=3, help="Passes of each setting, of which the median is shown; with --tiny 1."
    )
    parser.add_argument("--json", type=Path, help="Write all figures to this file.")
    parser.add_argument(
        "--tiny", action="store_true", help="Small pictures and few rows, of no meaning, for the tests."
    )
    args = parser.parse_args(argv)
    args.recipes = [Path(name).stem if name.endswith(".py") else name for name in args.recipes] or list(RECIPES)
    if unknown := [name for name in args.recipes if name not in RECIPES]:
        parser.error(f"no recipe {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    args.rows = (8 if args.tiny else 32) if args.rows is None else args.rows
    if min(args.workers) < 0 or min(args.rows, args.batch_size, args.rounds) < 1:
        parser.error("--workers: 0 or more; --rows, --batch_size, --rounds: at least 1")
    args.rounds = 1 if args.tiny else args.rounds
    check_json(parser, args.json)
    return args


def main(argv=None):
    """Flags -> exit status. One message and status 1 where rows or batches find no room."""
    args = arguments(argv)
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    report = functools.partial(print, flush=True)
    cores, size = len(os.sched_getaffinity(0)), TINY_SIZE if args.tiny else SIZE
    try:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            datasets.config.HF_DATASETS_CACHE = folder / "datasets"  # nothing is left in the user's own
            images = [f"{n}.jpg" for n in range(args.rows)]
            for n, name in enumerate(images):
                picture(n, size).save(folder / name, quality=90)
            large = statistics.mean((folder / name).stat().st_size for name in images) / 1000
            report(
                f"{cores} CPU cores; torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}; {args.rows} rows "
                f"with a JPEG of {size[0]} x {size[1]} pixels, {large:.0f} kB; batches of {args.batch_size}; median of {args.rounds}, wall time"
                + f"\n{SMALL}"
                * args.tiny
            )
            found = {name: measure(name, args, folder, images, report) for name in args.recipes}
            if args.json:
                given = {**vars(args), "json": str(args.json)}
                args.json.write_text(
                    json.dumps(
                        {"arguments": given, "cores": cores, "torch": torch.__version__, "recipes": found}, indent=1
                    )
                )
    except (OSError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "shared memory" not in str(e):  # what workers hand over batches in
            raise
        sys.exit(
            f"error: no scratch space: {' '.join(str(e).split())}; give TMPDIR a folder with {args.rows // 2 + 10} MB free, or less --rows, --workers"
        )
    return 0


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*(pin_memory|This DataLoader will create).*")
    start(main)
