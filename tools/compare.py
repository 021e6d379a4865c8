"""A page on which a fine-tuned model and the untouched one beneath it answer the same question side by side, and on
which the better answer is voted for. Votes are pairs in the format of dpo_idefics2.py.

    python tools/compare.py llava-lora                                  # then open http://127.0.0.1:7860
    python tools/compare.py llava-lora llava-dora --votes mine.jsonl    # several adapters of one model, one at a time
    python tools/compare.py llava-instruct                              # a whole model, and what it was trained from
    python tools/compare.py llava-lora --port 8000 --use_cpu            # any flag of the recipe goes behind the RUNs
    python tools/compare.py minicpm26-lora --trust_remote_code          # MiniCPM-V 2.6 has code of its own
    python dpo_idefics2.py --dataset_name mine.jsonl                    # on to preference optimization

RUN is what a recipe saved. With an adapter the model is in memory once: the adapter is switched off for the base's
answer and on for the other. Of a whole model (trained in full, or merged) the base is loaded beside it, and what is
equal in both is kept once. Examples are rows that the run held out. A vote is written at once, as one line of the file
of votes, its picture into a folder beside it: {"image", "question", "chosen", "rejected", "preferred": "base" or
"fine-tuned", "run", "base", "blind", "at"}.
Needs Gradio: pip install --no-deps -r requirements-compare.txt
"""

import contextlib
import copy
import datetime
import functools
import hashlib
import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.program import fail, flag_parser, parse_beside_recipe, run_labels, start  # noqa: E402
from tools.runs import (  # noqa: E402
    answering,
    base_name,
    forget_projector,
    generation_options,
    load,
    load_collator,
    load_model,
    load_recipe,
    own_rows,
    put_on,
    user_turn,
)

MAX_QUESTION = 4000  # characters
# Settings that change the model beneath the adapter: runs can share one in memory only where these are equal.
OF_THE_BASE = "model_revision load_in_4bit q_lora pretrain_mm_mlp_adapter downsample_mode".split()
BASE, TUNED = "base", "fine-tuned"


class Refused(ValueError):
    """A question or a vote that cannot be taken; the text is for the page."""


def parse(argv=None):
    """-> (own arguments, the recipe's flags). Raises SystemExit."""
    parser = flag_parser(__doc__)
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="folder that a recipe wrote; several adapters of one base model"
    )
    parser.add_argument(
        "--votes",
        type=Path,
        default=Path("votes.jsonl"),
        help="where votes go (default votes.jsonl); an earlier file is gone on with",
    )
    parser.add_argument("--port", type=int, default=7860, help="port of the page (default 7860)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address of the page (default 127.0.0.1: this machine only, there is no password)",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=20,
        help="held-out rows to pick from, for each run (default 20); 0 does not read the data",
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy; above it, sampled")
    parser.add_argument(
        "--max_upload", type=int, default=20, metavar="MB", help="largest picture that is taken (default 20)"
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        help="file that trained the RUNs; it is executed (default: the recipe that each settings.yaml names, else "
        "sft_llava.py)",
    )
    args, recipe_flags = parse_beside_recipe(parser, argv)
    args.labels = run_labels(args.runs)
    if min(args.max_new_tokens, args.max_upload) < 1 or args.examples < 0 or not 0 <= args.temperature < math.inf:
        fail("--max_new_tokens and --max_upload must be at least 1, --examples and --temperature 0 or more")
    if not 0 < args.port < 65536:
        fail(f"--port {args.port}: ports go from 1 to 65535")
    try:  # now, and not when the weights are loaded
        socket.create_server((args.host, args.port)).close()
    except OSError as e:
        fail(
            f"--host {args.host} --port {args.port} cannot be opened ({e.strerror or e}): choose another --port, "
            "or --host"
        )
    return args, recipe_flags


def load_gradio():
    """Gradio as a module, without its telemetry. Raises SystemExit where it is not installed, with the command that
    does so."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as e:
        fail(f"tools/compare.py needs Gradio ({e}): pip install --no-deps -r requirements-compare.txt")
    return gradio


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """What a recipe saved: its adapter's name in the model, how it is shown, and what asks it."""

    name: str
    path: str
    label: str
    recipe: ModuleType
    settings: object
    training: object
    collator: object
    is_whole: bool  # a model of its own, not an adapter
    examples: list = field(default_factory=list)  # of (PIL image, question, reference)

    @property
    def base(self):
        """The model beneath, as messages name it."""
        return base_name(self.settings)


def load_run(path, name, label, recipe_path, recipe_flags):
    """A folder -> its Run, without examples. Nothing of the weights is loaded. Raises SystemExit where it is none, or
    a model of which nobody knows the base."""
    if not Path(path).is_dir():
        fail(f"{path}: there is no such folder")
    recipe = load_recipe(recipe_path, path)
    is_adapter, processor, settings, training = load(recipe, path, recipe_flags, base_only=True)
    base = settings.model_name_or_path
    if not is_adapter and base and os.path.realpath(base) == os.path.realpath(path):
        fail(
            f"{path} is a whole model, and what it was trained from is not said (settings.yaml) or is itself: give "
            "--model_name_or_path BASE"
        )
    processor.tokenizer.padding_side = "left"
    collator = load_collator(recipe, processor, settings, training)
    return Run(name, str(path), label, recipe, settings, training, collator, not is_adapter)


def load_runs(args, recipe_flags):
    """-> the Runs, all of one base model, with labels that differ and their examples. Raises SystemExit."""
    runs = [
        load_run(path, f"run{n}", label, args.recipe, recipe_flags)
        for n, (path, label) in enumerate(zip(args.runs, args.labels))
    ]
    for run in runs:
        if run.is_whole and len(runs) > 1:
            fail(f"{run.path} is a whole model, no adapter: start the page for it alone")
        check_same_base(runs[0], run)
    if args.examples:
        for run in runs:
            run.examples = examples(run, args.examples)
    return runs


def check_same_base(first, other):
    """Raises SystemExit where two Runs cannot share one model in memory."""
    if os.path.realpath(first.base) != os.path.realpath(other.base):
        fail(
            f"{first.path} is of {first.base}, {other.path} is of {other.base}: one model is in memory, start the "
            "page for each"
        )
    for key in OF_THE_BASE:
        ours, theirs = getattr(first.settings, key, None), getattr(other.settings, key, None)
        if ours != theirs:
            fail(
                f"{first.path} has {key} {ours}, {other.path} has {theirs}: one model is in memory, give --{key} or "
                "start the page for each"
            )
    is_quantized = getattr(other.settings, "load_in_4bit", False) or getattr(other.settings, "q_lora", False)
    if is_quantized and Path(other.recipe.__file__).name != Path(first.recipe.__file__).name:
        fail(
            f"{first.path} and {other.path} are of different recipes, which quantize different parts: give "
            "--load_in_4bit false"
        )


def examples(run, most):
    """-> [(PIL image, question, reference)] of at most so many rows that the run held out. Rows that the page has no
    place for are skipped (example_of); without its data a run has no examples."""
    try:
        rows = own_rows(run.recipe, run.path, run.settings, run.training, run.collator) or ()
    except SystemExit as e:  # the data need not be where they were: the page works without
        cause = str(e.code).removeprefix("error: ")
        print(f"note: no examples of {run.label}, its data cannot be read: {cause}", file=sys.stderr)
        return []
    found, numbers = [], set()
    for row in rows:
        if row["row"] in numbers:  # of some models a row comes once for each of its answers
            continue
        numbers.add(row["row"])
        with contextlib.suppress(run.recipe.BadRow):
            found += example_of(run, row)
        if len(found) == most:
            break
    if rows and not found:
        print(
            f"note: no examples of {run.label}: of its {len(rows)} held-out rows none begins with a question about "
            "one picture",
            file=sys.stderr,
        )
    return found


def example_of(run, row):
    """A row -> [(PIL image, question, reference)], or [] where it does not begin with a question about one picture:
    where it has a system message, several pictures or none before the first answer. Raises the recipe's BadRow."""
    turn, *answers = run.collator.messages_of(row)
    pictures = [part["image"] for part in turn["content"] if part["type"] == "image"]
    has_words = any(part["type"] == "text" for part in turn["content"])
    if turn["role"] != "user" or len(pictures) != 1 or not has_words:
        return []
    reference = ""
    if answers:
        reference = answers[0].get("references", run.recipe.text_of(answers[0]))
    if not isinstance(reference, str):
        reference = " / ".join(dict.fromkeys(reference))
    return [(pictures[0], run.recipe.text_of(turn), reference)]


# --------------------------------------------------------------------------------------------------------------- model


class Stopped(StoppingCriteria):
    """Ends an answer at its next token once the event is set."""

    def __init__(self, event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class Answers:
    """One base model in memory with the adapters of all runs, or with one whole model: asks either, one question at a
    time."""

    def __init__(self, runs, args):
        """Loads the weights. Raises SystemExit, with both names, where an adapter does not fit the base model."""
        first, self.lock, self.args = runs[0], threading.Lock(), args
        self.base = load_model(first.recipe, first.settings, first.training)
        if first.is_whole:
            self.model = self.load_whole(first)
        else:
            model = self.base
            for run in runs:
                model = put_on(model, run.path, run.base, run.name)
            self.model = model.eval()  # it holds the base
        self.longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def load_whole(self, run):
        """-> the model of a run that is no adapter. What is equal in the base is shared with it. Raises SystemExit."""
        settings = copy.copy(run.settings)
        settings.model_name_or_path = run.path
        forget_projector(settings)
        model = load_model(run.recipe, settings, run.training)
        weights = dict(model.named_parameters())
        for name, weight in self.base.named_parameters():
            other = weights.get(name)
            if other is not None and weight.dtype == other.dtype and torch.equal(weight, other):
                weight.data = other.data
        return model

    def prepare(self, run, path, question):
        """A file or None, and a question -> the processor's batch of one. Raises Refused, with what is wrong and the
        remedy."""
        if not question.strip():
            raise Refused("There is no question yet: type one, or pick an example.")
        if len(question) > MAX_QUESTION:
            raise Refused(
                f"The question is too long: {len(question)} characters, {MAX_QUESTION} are taken. Shorten it."
            )
        for token in run.collator.control_tokens:
            if token in question:
                raise Refused(
                    f"`{token}` in the question would become a real control token: take it out. Pictures need no mark."
                )
        try:
            images = [run.recipe.load_image(path)] if path else []
            turn = user_turn(run.collator, question.strip(), images)
        except run.recipe.BadRow as e:  # uploads have names of their own, which say nothing
            cause = str(e).replace(str(path), "the picture").split("; repair it")[0]
            raise Refused(f"This cannot be asked: {cause}.") from e
        batch = run.collator.tokenize([[turn]], prompt=True)
        count = batch["input_ids"].shape[1]
        if self.longest and count >= self.longest:
            raise Refused(
                f"The question is too long: {count} tokens with the picture, the model reads {self.longest} with its "
                "answer. Shorten it."
            )
        return batch

    def stream(self, run, side, batch, stop):
        """Yields the answer as far as it goes, at last the whole of it as tools/generate.py would give it. `stop`, an
        event, ends it early. Raises what the model raised."""
        tokenizer, result = run.collator.processor.tokenizer, SimpleNamespace(text="", error=None)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

        def work():  # in a thread of its own
            try:
                ids = self.generate(run, side, batch, stop, streamer)
                result.text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            except Exception as e:  # out of memory, above all; it is the page that must say so
                result.error = e
            finally:
                streamer.end()

        thread, text = threading.Thread(target=work, daemon=True), ""
        thread.start()
        for piece in streamer:
            text += piece
            if piece:  # the last one is empty
                yield text.strip()
        thread.join()
        if result.error:
            raise result.error
        yield result.text

    def generate(self, run, side, batch, stop, streamer):
        """The token ids of an answer. The lock is held by the thread that computes: however the page goes away, no
        other question meets an adapter half switched."""
        with self.lock:
            if stop.is_set():
                return []
            model = self.base if run.is_whole and side == BASE else self.model
            with_adapter = contextlib.nullcontext()
            if not run.is_whole:
                # again each time: switching off and on forgets which parts this adapter does not have
                model.set_adapter(run.name)
                if side == BASE:
                    with_adapter = model.disable_adapter()
            options = generation_options(run.collator, self.args)
            length = batch["input_ids"].shape[1]
            if self.longest:
                options["max_new_tokens"] = min(options["max_new_tokens"], self.longest - length)
            if not getattr(run.collator, "is_26", False):  # MiniCPM-V 2.6 generates by code of its own
                options["streamer"] = streamer
            stops = StoppingCriteriaList([Stopped(stop)])
            with with_adapter, answering(model):
                ids = model.generate(**batch.to(model.device), stopping_criteria=stops, **options)
            return ids[0, length:]


# --------------------------------------------------------------------------------------------------------------- votes


class Votes:
    """The file of votes, in the format of dpo_idefics2.py, and the folder of their pictures beside it."""

    def __init__(self, path):
        """Raises SystemExit where there is something else in their place."""
        self.path, self.folder, self.lock = path, path.with_name(f"{path.stem}-images"), threading.Lock()
        if path.suffix != ".jsonl":
            fail(f"--votes {path}: its name must end in .jsonl, by which dpo_idefics2.py knows how to read it")
        if not path.absolute().parent.is_dir():
            fail(f"--votes {path}: there is no such folder")
        if path.exists() and not path.is_file():
            fail(f"--votes {path}: {path} is in its place: choose another")
        if self.folder.exists() and not self.folder.is_dir():
            fail(f"--votes {path}: {self.folder} is in its place: choose another")
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            fail(f"--votes {path} cannot be written")
        try:
            self.read()
        except (OSError, ValueError) as e:
            fail(f"--votes {path} exists, and is no file of votes: {e}. Choose another")

    def read(self):
        """-> the rows of the file, [] where there is none. Raises ValueError naming the line that is no pair, or
        OSError."""
        if not self.path.exists():
            return []
        rows = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as e:
                raise ValueError(f"line {number}: {e}") from e
            if not isinstance(row, dict) or not {"image", "question", "chosen", "rejected"} <= row.keys():
                raise ValueError(f"line {number} has no image, question, chosen and rejected")
            rows.append(row)
        return rows

    def add(self, image, question, answers, better, **more):
        """Append one pair: `image` is PIL RGB, `answers` is {"base", "fine-tuned"}, `better` one of these. -> the row.
        Raises Refused where they are no pair that can be trained on, OSError where the disk does not take it; then
        nothing is written."""
        if image is None:
            raise Refused("Nothing was written: a pair for DPO is about one picture.")
        if answers[BASE] == answers[TUNED]:
            raise Refused("Nothing was written: the answers are equal, there is nothing to prefer.")
        if not all(answers.values()):
            raise Refused("Nothing was written: one answer is empty, and DPO needs two.")
        if max(image.size) > 20 * min(image.size):
            raise Refused(
                "Nothing was written: the picture is narrower than 1 : 20, which dpo_idefics2.py does not take."
            )
        name = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:16] + ".png"
        row = {
            "image": f"{self.folder.name}/{name}",
            "question": question,
            "chosen": answers[better],
            "rejected": answers[TUNED if better == BASE else BASE],
            "preferred": better,
            **more,
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        with self.lock:
            self.folder.mkdir(exist_ok=True)
            if not (self.folder / name).exists():
                image.save(self.folder / f"{name}.part", "PNG")
                os.replace(self.folder / f"{name}.part", self.folder / name)
            with open(self.path, "a+b") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                text = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                if file.read() not in (b"", b"\n"):  # an editor left no line end
                    text = b"\n" + text
                file.write(text)  # in one piece, so that two programs may vote into one file
        return row

    def summary(self):
        """-> (what there is to say about the votes so far, in Markdown; the last row of the file, or None)."""
        try:
            rows = self.read()
        except (OSError, ValueError) as e:
            return f"**{self.path.name} cannot be read any more: {e}**", None
        if not rows:
            return f"No votes yet in `{self.path.name}`", None
        counts = Counter((row.get("run", "-"), row.get("preferred")) for row in rows)
        lines = [f"**{len(rows)} {'vote' if len(rows) == 1 else 'votes'}** in `{self.path.name}`", ""]
        lines += ["| run | fine-tuned is better | base is better |", "|---|---|---|"]
        for run in dict.fromkeys(run for run, _ in counts):
            lines.append(f"| {Path(run).name} | {counts[run, TUNED]} | {counts[run, BASE]} |")
        return "\n".join(lines), rows[-1]


# ---------------------------------------------------------------------------------------------------------------- page

CSS = """
.gradio-container { width: 100%; max-width: 1240px !important; margin: auto !important; }
#examples .container, #examples img { height: 56px; width: 56px; margin: auto; object-fit: contain; }
#left label > span, #right label > span { display: block; overflow: hidden; }
#left label > span, #right label > span { text-overflow: ellipsis; white-space: nowrap; }
#status { min-height: 1.6em; }
#votes table { width: 100%; } #votes th, #votes td { padding: 2px 8px; border-color: var(--border-color-primary); }
"""


def titles(run, order, is_blind):
    """What stands above the two answers, the left one first; order: [BASE, TUNED] or the other way round."""
    if is_blind:
        return ["Answer A", "Answer B"]
    base = " + ".join("/".join(Path(part).parts[-2:]) for part in run.base.split(" + "))
    names = {BASE: f"Base: {base}", TUNED: f"Fine-tuned: {run.label}"}
    return [names[side] for side in order]


def path_of(upload):
    """A picture on the page, or None -> its file, or None."""
    return upload and upload.path


class Page:
    """The page as gradio.Blocks (`demo`). Pictures of examples are written into the folder `keep`."""

    def __init__(self, gr, runs, answers, votes, keep):
        self.gr, self.answers, self.votes = gr, answers, votes
        self.runs = {run.label: run for run in runs}
        self.voting = threading.Lock()
        self.samples = {}  # of each label: [picture's file, question, reference]
        for run in runs:
            self.samples[run.label] = []
            for number, (image, question, reference) in enumerate(run.examples):
                file = Path(keep, f"{run.name}-{number}.png")
                image.save(file)  # lossless: the model sees the row's own pixels
                self.samples[run.label].append([str(file), question, reference])
        with gr.Blocks(title="Compare", analytics_enabled=False) as self.demo:
            self.make_widgets()
            self.connect()

    # ---------------------------------------------------------------------------------------------------- what it does

    def buttons(self, is_active):
        """Updates for the three buttons of a vote."""
        return [self.gr.update(interactive=is_active)] * 3

    def ask(self, path, question, label, is_blind, reference):
        """The asking itself: a generator of updates for (left, right, status, asked, three buttons)."""
        run, order, texts, stop = self.runs[label], [BASE, TUNED], ["", ""], threading.Event()
        if is_blind:
            random.shuffle(order)

        def show(status, asked=None, is_blind=is_blind):
            names = titles(run, order, is_blind)
            sides = [self.gr.update(value=text, label=name) for text, name in zip(texts, names)]
            return *sides, status, asked, *self.buttons(asked is not None)

        try:
            batch = self.answers.prepare(run, path, question)
            yield show("Waiting for the model ..." if self.answers.lock.locked() else "Answering ...")
            for number, side in enumerate(order):
                for text in self.answers.stream(run, side, batch, stop):
                    texts[number] = text
                    yield show("Answering ...")
        except Refused as e:
            yield show(f"**{e}**")
            return
        except Exception as e:
            yield show(f"**The model failed: {type(e).__name__}: {str(e)[:300]}**")
            return
        finally:
            stop.set()
        if texts[0] == texts[1]:
            yield show("The answers are equal: there is nothing to prefer, no pair is written.", is_blind=False)
            return
        asked = {"run": run, "path": path, "question": question.strip(), "order": order, "reference": reference}
        asked |= {"answers": dict(zip(order, texts)), "blind": is_blind, "voted": False}
        yield show("Which answer is better?", asked)

    def vote(self, choice, asked):
        """left, tie or right -> updates for (left, right, status, asked, three buttons, votes, last vote)."""
        with self.voting:  # of two quick clicks the first one counts
            if asked is None or asked["voted"]:
                message = "**Ask first: one vote for each pair of answers.**"
                return self.gr.update(), self.gr.update(), message, asked, *[self.gr.update()] * 5
            asked["voted"] = True
        run = asked["run"]
        try:
            message = self.write_vote(choice, asked)
        except Refused as e:
            message = f"**{e}**"
        except (OSError, run.recipe.BadRow) as e:
            message, asked["voted"] = f"**The vote could not be written: {e}**", False  # it can be tried again
        sides = [self.gr.update(label=name) for name in titles(run, asked["order"], False)]
        return *sides, message, asked, *self.buttons(not asked["voted"]), *self.summary()

    def write_vote(self, choice, asked):
        """Write a vote, if it is no tie -> what there is to say about it. Raises Refused, BadRow or OSError."""
        if choice == "tie":
            return "A tie: no pair was written, because DPO needs a better answer and a worse one."
        run = asked["run"]
        better = asked["order"][0 if choice == "left" else 1]
        image = run.recipe.load_image(asked["path"]) if asked["path"] else None
        more = {"run": run.path, "base": run.base, "blind": asked["blind"]}
        if asked["reference"]:
            more["reference"] = asked["reference"]
        self.votes.add(image, asked["question"], asked["answers"], better, **more)
        return f"Written: the {better} answer is better."

    def summary(self):
        """Updates for (votes, last vote)."""
        text, row = self.votes.summary()
        code = json.dumps(row, ensure_ascii=False, indent=1) if row else None
        return text, self.gr.update(value=code, visible=row is not None)

    def pick(self, number, label):
        """The example of that number -> updates for (picture, question, reference)."""
        path, question, reference = self.samples[label][number]
        return path, question, self.gr.update(value=reference, visible=bool(reference))

    # --------------------------------------------------------------------------------------------------- what it shows

    def make_widgets(self):
        """The page's parts, from above to below."""
        gr = self.gr
        self.asked = gr.State(None)
        gr.Markdown(f"## {', '.join(self.runs)}: fine-tuned and base, side by side")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.make_question()
            with gr.Column(scale=3, min_width=400):
                self.make_answers()
        self.data = None
        if any(self.samples.values()):
            self.data = gr.Dataset(
                components=["image", "textbox", "textbox"],
                headers=["Picture", "Question", "Reference"],
                layout="table",
                type="index",
                samples_per_page=5,
                samples=next(iter(self.samples.values())),
                label="Examples: rows that the run held out",
                elem_id="examples",
            )

    def make_question(self):
        """The left column: what is asked, and whom."""
        gr, labels = self.gr, list(self.runs)
        options = {"sources": ["upload", "clipboard"], "type": "filepath", "image_mode": None, "buttons": []}
        self.image = gr.Image(label="Picture", height=280, elem_id="picture", **options)
        # Gradio's own would open the file first, and fail with a message about a path that nobody has seen.
        self.image.preprocess = path_of
        self.question = gr.Textbox(
            label="Question", lines=2, max_lines=6, elem_id="question", placeholder="What is in the picture?"
        )
        self.reference = gr.Textbox(label="Reference answer", interactive=False, visible=False, elem_id="reference")
        self.chosen = gr.Dropdown(
            labels, value=labels[0], label="Fine-tuned run", visible=len(labels) > 1, elem_id="run"
        )
        self.blind = gr.Checkbox(
            label="Blind: shuffle the sides, show the names after the vote", container=False, elem_id="blind"
        )
        with gr.Row():
            self.go = gr.Button("Ask both", variant="primary", min_width=80, elem_id="ask")
            self.halt = gr.Button("Stop", min_width=80, elem_id="stop")

    def make_answers(self):
        """The right column: the answers, and which is better."""
        gr = self.gr
        names = titles(next(iter(self.runs.values())), [BASE, TUNED], False)
        options = {"lines": 7, "max_lines": 20, "interactive": False, "min_width": 120}
        with gr.Row():
            self.left = gr.Textbox(label=names[0], elem_id="left", **options)
            self.right = gr.Textbox(label=names[1], elem_id="right", **options)
        self.status = gr.Markdown("Upload or pick a picture, and ask.", elem_id="status")
        choices = {"left": "Left is better", "tie": "Tie", "right": "Right is better"}
        with gr.Row(equal_height=True):
            self.choices = {
                choice: gr.Button(text, interactive=False, min_width=80, elem_id=f"vote-{choice}")
                for choice, text in choices.items()
            }
        self.tally = gr.Markdown(elem_id="votes")
        self.last = gr.Code(
            language="json",
            label="Last vote, as dpo_idefics2.py reads it",
            interactive=False,
            visible=False,
            wrap_lines=True,
            elem_id="last",
            buttons=[],
            show_line_numbers=False,
        )

    def connect(self):
        """What happens at a click."""
        gr = self.gr
        own = {"api_visibility": "private"}  # no second way in, beside the page
        quiet = {"show_progress": "hidden", **own}
        shown = [self.left, self.right, self.status, self.asked, *self.choices.values()]
        if self.data:
            self.data.click(self.pick, [self.data, self.chosen], [self.image, self.question, self.reference], **own)
            self.chosen.change(lambda label: gr.Dataset(samples=self.samples[label]), self.chosen, self.data, **own)
        typed = [self.question.input, self.image.input]
        gr.on(typed, lambda: gr.update(value="", visible=False), None, self.reference, **quiet)
        inputs = [self.image, self.question, self.chosen, self.blind, self.reference]
        asking = gr.on([self.go.click, self.question.submit], self.ask, inputs, shown, concurrency_limit=8, **quiet)
        stopped = ("Stopped: ask again, or something else.", None)
        self.halt.click(lambda: stopped, None, [self.status, self.asked], cancels=[asking], **own)
        for choice, button in self.choices.items():
            vote = functools.partial(self.vote, choice)
            button.click(vote, self.asked, [*shown, self.tally, self.last], **quiet)
        self.demo.load(self.summary, None, [self.tally, self.last], **quiet)


def launch(gr, demo, args):
    """Open the page. Raises SystemExit where the port cannot be opened."""
    # Gradio's own fonts would come from elsewhere.
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        demo.launch(
            server_name=args.host,
            server_port=args.port,
            max_file_size=args.max_upload * 2**20,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            run_history=False,  # kept in the browser, and from there offered to a service
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            theme=gr.themes.Default(**fonts),
            css=CSS,
            inbrowser=False,
        )
    except OSError as e:
        fail(f"--port {args.port} cannot be opened: {e}")


def main(argv=None):
    """Parse, check, load, show."""
    args, recipe_flags = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # as Ctrl+C: uploads are not left behind
    keep = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="compare-")  # read when Gradio is imported
    try:
        gr, votes = load_gradio(), Votes(args.votes)
        runs = load_runs(args, recipe_flags)
        demo = Page(gr, runs, Answers(runs, args), votes, keep).demo
        launch(gr, demo, args)
        if args.host not in ("127.0.0.1", "localhost", "::1"):
            print(f"note: whoever reaches {args.host} can ask and vote, there is no password", file=sys.stderr)
        print(f"open http://{args.host}:{args.port} (votes go to {args.votes}; Ctrl+C ends it)", flush=True)
        demo.block_thread()
    finally:
        shutil.rmtree(keep, ignore_errors=True)


if __name__ == "__main__":
    start(main)
