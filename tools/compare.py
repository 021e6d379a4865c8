"""A page on which a fine-tuned model and the untouched one beneath it answer the same question side by side, and on which the
better answer is voted for. Votes are pairs in the format of dpo_idefics2.py.

    python tools/compare.py llava-lora                                      # then open http://127.0.0.1:7860
    python tools/compare.py llava-lora llava-dora --votes mine.jsonl        # several adapters of one model, one at a time
    python tools/compare.py llava-instruct                                  # a whole model, and the one it was trained from
    python tools/compare.py llava-lora --port 8000 --use_cpu                # any flag of the recipe goes behind the RUNs
    python dpo_idefics2.py --dataset_name mine.jsonl                        # on to preference optimization

RUN is what a recipe saved. With an adapter the model is in memory once: the adapter is switched off for the base's answer and on
for the other. Of a whole model (trained in full, or merged) the base is loaded beside it, and what is equal in both is kept once. Examples are rows that the run held out. A vote is written at once, as one line of the file of votes, its picture into a
folder beside it: {"image", "question", "chosen", "rejected", "preferred": "base" or "fine-tuned", "run", "base", "blind", "at"}.
Needs Gradio: pip install --no-deps -r requirements-compare.txt
"""

import argparse
import contextlib
import copy
import datetime
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
from safetensors import SafetensorError
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.generate import fail, load, load_recipe, own_rows, put_on, start, underscored, user_turn  # noqa: E402

MAX_QUESTION = 4000  # characters
# Settings that change the model beneath the adapter: runs can share one in memory only where these are equal.
OF_THE_BASE = "model_revision load_in_4bit q_lora pretrain_mm_mlp_adapter downsample_mode".split()
BASE, TUNED = "base", "fine-tuned"


class Refused(ValueError):
    """A question or a vote that cannot be taken; the text is for the page."""


def parse(argv=None):
    """-> (own arguments, the recipe's flags)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, is greedy; above it answers are sampled"
    )
    parser.add_argument(
        "--max_upload", type=int, default=20, metavar="MB", help="largest picture that is taken (default 20)"
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        help="file that trained the RUNs (default: what each settings.yaml says, else sft_llava.py)",
    )
    parser.error = fail
    args, rest = parser.parse_known_args(argv)
    rest = underscored(rest)
    if min(args.max_new_tokens, args.max_upload) < 1 or args.examples < 0 or not 0 <= args.temperature < math.inf:
        fail("--max_new_tokens and --max_upload must be at least 1, --examples and --temperature 0 or more")
    if not 0 < args.port < 65536:
        fail(f"--port {args.port}: ports go from 1 to 65535")
    if twice := [run for run, count in Counter(map(os.path.realpath, args.runs)).items() if count > 1]:
        fail(f"{twice[0]} is given twice")
    try:  # now, and not when the weights are loaded
        with socket.create_server((args.host, args.port)):
            pass
    except OSError as e:
        fail(
            f"--host {args.host} --port {args.port} cannot be opened ({e.strerror or e}): choose another --port, or --host"
        )
    return args, rest


def load_gradio():
    """Gradio as a module, without its telemetry. Raises SystemExit where it is not installed, with the command that does so."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as e:
        fail(f"tools/compare.py needs Gradio ({e}): pip install --no-deps -r requirements-compare.txt")
    return gradio


# --------------------------------------------------------------------------------------------------------------------- runs
@dataclass
class Run:
    """What a recipe saved: its adapter's name in the model, how it is shown, and what asks it."""

    name: str
    path: str
    recipe: ModuleType
    settings: object
    training: object
    collator: object
    whole: bool = False  # a model of its own, not an adapter
    label: str = ""
    examples: list = field(default_factory=list)  # of (PIL image, question, reference)

    @property
    def base(self):
        return self.settings.model_name_or_path or f"{self.settings.vision_tower} + {self.settings.language_model}"


def load_run(path, name, recipe_path, rest):
    """A folder -> its Run, without examples. Nothing of the weights is loaded. Raises SystemExit where it is none, or a model of which nobody
    knows the base."""
    if not Path(path).is_dir():
        fail(f"{path}: there is no such folder")
    recipe = load_recipe(recipe_path, path)
    adapter, processor, settings, training = load(recipe, path, rest, base_only=True)
    base = settings.model_name_or_path
    if not adapter and base and os.path.realpath(base) == os.path.realpath(path):
        fail(
            f"{path} is a whole model, and what it was trained from is not said (settings.yaml) or is itself: give --model_name_or_path BASE"
        )
    processor.tokenizer.padding_side = "left"
    return Run(
        name, str(path), recipe, settings, training, recipe.Collator(processor, settings, training), not adapter
    )


def load_runs(args, rest):
    """-> the Runs, all of one base model, with labels that differ and their examples. Raises SystemExit."""
    runs = [load_run(path, f"run{n}", args.recipe, rest) for n, path in enumerate(args.runs)]
    first, short = runs[0], Counter(Path(run.path).absolute().name for run in runs)
    for run in runs:
        name = Path(run.path).absolute().name
        run.label = name if short[name] == 1 else run.path
        if run.whole and len(runs) > 1:
            fail(f"{run.path} is a whole model, no adapter: start the page for it alone")
        if os.path.realpath(run.base) != os.path.realpath(first.base):
            fail(
                f"{first.path} is of {first.base}, {run.path} is of {run.base}: one model is in memory, start the page for each"
            )
        for key in OF_THE_BASE:
            if (one := getattr(first.settings, key, None)) != (other := getattr(run.settings, key, None)):
                fail(
                    f"{first.path} has {key} {one}, {run.path} has {other}: one model is in memory, give --{key} or start the page for each"
                )
        quantized = getattr(run.settings, "load_in_4bit", False) or getattr(run.settings, "q_lora", False)
        if quantized and Path(run.recipe.__file__).name != Path(first.recipe.__file__).name:
            fail(
                f"{first.path} and {run.path} are of different recipes, which quantize different parts: give --load_in_4bit false"
            )
    for run in runs if args.examples else ():
        run.examples = examples(run, args.examples)
    return runs


def examples(run, most):
    """-> [(PIL image, question, reference)] of at most so many rows that the run held out. Rows that the page has no place for (a system
    message, several pictures or none before the first answer) are passed over; without its data a run has no examples."""
    try:
        rows = own_rows(run.recipe, run.path, run.settings, run.training, run.collator)
    except SystemExit as e:  # the data need not be where they were: the page works without
        rows = print(
            f"note: no examples of {run.label}, its data cannot be read: {str(e.code).removeprefix('error: ')}",
            file=sys.stderr,
        )
    found = []
    for row in rows or ():
        with contextlib.suppress(run.recipe.BadRow):
            asked, *answers = run.collator.messages_of(row)
            pictures = [part["image"] for part in asked["content"] if part["type"] == "image"]
            words = any(part["type"] == "text" for part in asked["content"])
            if asked["role"] == "user" and len(pictures) == 1 and words:
                reference = answers[0].get("references", run.recipe.text_of(answers[0])) if answers else ""
                reference = reference if isinstance(reference, str) else " / ".join(dict.fromkeys(reference))
                found.append((pictures[0], run.recipe.text_of(asked), reference))
        if len(found) == most:
            break
    if rows and not found:
        print(
            f"note: no examples of {run.label}: of its {len(rows)} held-out rows none begins with a question about one picture",
            file=sys.stderr,
        )
    return found


# -------------------------------------------------------------------------------------------------------------------- model
class Stopped(StoppingCriteria):
    """Ends an answer at its next token once the event is set."""

    def __init__(self, event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class Answers:
    """One base model in memory with the adapters of all runs, or with one whole model: asks either, one question at a time."""

    def __init__(self, runs, args):
        """Loads the weights. Raises SystemExit, with both names, where an adapter does not fit the base model."""
        first, self.lock, self.args = runs[0], threading.Lock(), args
        try:
            model = self.base = first.recipe.load_model(first.settings, first.training).eval()
        except (OSError, ValueError, SafetensorError) as e:
            fail(f"cannot load {first.base} (another place: --model_name_or_path): {e}")
        if first.whole:
            model = self.whole(first)
        for run in runs if not first.whole else ():
            model = put_on(model, run.path, run.base, run.name)
        self.model = model.eval()  # for adapters it holds the base
        self.longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def whole(self, run):
        """-> the model of a run that is no adapter. What is equal in the base is shared with it. Raises SystemExit."""
        settings = copy.copy(run.settings)
        settings.model_name_or_path = run.path
        if hasattr(settings, "pretrain_mm_mlp_adapter"):  # it has a projector of its own by now
            settings.pretrain_mm_mlp_adapter = None
        try:
            model = run.recipe.load_model(settings, run.training)
        except (OSError, ValueError, SafetensorError) as e:
            fail(f"cannot load {run.path}: {e}")
        mine = dict(model.named_parameters())
        for name, weight in self.base.named_parameters():
            if (
                name in mine
                and weight.shape == mine[name].shape
                and weight.dtype == mine[name].dtype
                and weight.equal(mine[name])
            ):
                weight.data = mine[name].data
        return model

    def prepare(self, run, path, question):
        """A file or None, and a question -> the processor's batch of one. Raises Refused, with what is wrong and the remedy."""
        if not question.strip():
            raise Refused("There is no question yet: type one, or pick an example.")
        if len(question) > MAX_QUESTION:
            raise Refused(
                f"The question is too long: {len(question)} characters, {MAX_QUESTION} are taken. Shorten it."
            )
        if typed := [token for token in run.collator.control_tokens if token in question]:
            raise Refused(
                f"`{typed[0]}` in the question would become a real control token: take it out. Pictures need no mark."
            )
        try:
            turn = user_turn(run.collator, question.strip(), [run.recipe.load_image(path)] if path else [])
        except run.recipe.BadRow as e:  # uploads have names of their own, which say nothing
            raise Refused(
                f"This cannot be asked: {str(e).replace(str(path), 'the picture').split('; repair it')[0]}."
            ) from e
        batch = run.collator.tokenize([[turn]], prompt=True)
        if self.longest and (count := batch["input_ids"].shape[1]) >= self.longest:
            raise Refused(
                f"The question is too long: {count} tokens with the picture, the model reads {self.longest} with its answer. Shorten it."
            )
        return batch

    def stream(self, run, side, batch, stop):
        """Yields the answer as far as it goes, at last the whole of it as tools/generate.py would give it. `stop`, an event, ends it early.
        The lock is the thread's that computes: however the page goes away, no other question meets an adapter half switched."""
        tokenizer, done = run.collator.processor.tokenizer, SimpleNamespace(text="", error=None)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = (
            {"do_sample": True, "temperature": self.args.temperature}
            if self.args.temperature > 0
            else {"do_sample": False}
        )
        sampling["eos_token_id"] = run.collator.stop_ids
        if not getattr(
            run.collator, "is_26", False
        ):  # MiniCPM-V 2.6 generates by code of its own: it is shown at once
            sampling["streamer"] = streamer

        def work():
            try:
                with self.lock:
                    if stop.is_set():
                        return
                    model = self.base if run.whole and side == BASE else self.model
                    if not run.whole:
                        model.set_adapter(
                            run.name
                        )  # again each time: switching off and on forgets which parts this adapter does not have
                    inputs = batch.to(model.device)
                    length = inputs["input_ids"].shape[1]
                    new = min(self.args.max_new_tokens, (self.longest or sys.maxsize) - length)
                    with (
                        model.disable_adapter() if side == BASE and not run.whole else contextlib.nullcontext(),
                        torch.inference_mode(),
                        torch.autocast(model.device.type, dtype=model.dtype, enabled=model.device.type == "cuda"),
                    ):
                        out = model.generate(
                            **inputs,
                            max_new_tokens=new,
                            max_length=None,
                            stopping_criteria=StoppingCriteriaList([Stopped(stop)]),
                            **sampling,
                        )
                done.text = tokenizer.decode(out[0, length:], skip_special_tokens=True).strip()
            except Exception as e:  # out of memory, above all; it is the page that must say so
                done.error = e
            finally:
                streamer.end()

        thread, text = threading.Thread(target=work, daemon=True), ""
        thread.start()
        for piece in streamer:
            text += piece
            if piece:  # the last one is empty
                yield text.strip()
        thread.join()
        if done.error:
            raise done.error
        yield done.text


# -------------------------------------------------------------------------------------------------------------------- votes
class Votes:
    """The file of votes, in the format of dpo_idefics2.py, and the folder of their pictures beside it."""

    def __init__(self, path):
        """Raises SystemExit where there is something else in their place."""
        self.path, self.folder, self.lock = path, path.with_name(f"{path.stem}-images"), threading.Lock()
        if path.suffix != ".jsonl":
            fail(f"--votes {path}: its name must end in .jsonl, by which dpo_idefics2.py knows how to read it")
        if not path.absolute().parent.is_dir():
            fail(f"--votes {path}: there is no such folder")
        if path.exists() and not path.is_file() or self.folder.exists() and not self.folder.is_dir():
            fail(
                f"--votes {path}: {path if path.exists() and not path.is_file() else self.folder} is in its place: choose another"
            )
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            fail(f"--votes {path} cannot be written")
        try:
            self.read()
        except (OSError, ValueError) as e:
            fail(f"--votes {path} exists, and is no file of votes: {e}. Choose another")

    def read(self):
        """-> the rows of the file, [] where there is none. Raises ValueError naming the line that is no pair, or OSError."""
        rows = []
        for n, line in enumerate(self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else (), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as e:
                raise ValueError(f"line {n}: {e}") from e
            if rows and not (
                isinstance(rows[-1], dict) and {"image", "question", "chosen", "rejected"} <= rows[-1].keys()
            ):
                raise ValueError(f"line {n} has no image, question, chosen and rejected")
        return rows

    def add(self, image, question, answers, better, **more):
        """Append one pair: `image` is PIL RGB, `answers` is {"base", "fine-tuned"}, `better` one of these. -> the row. Raises Refused where
        they are no pair that can be trained on, OSError where the disk does not take it; then nothing is written."""
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
            with open(self.path, "a+b") as file:  # in one piece, so that two programs may vote into one file
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                whole = file.read() in (b"", b"\n")
                file.write(b"\n" * (not whole) + json.dumps(row, ensure_ascii=False).encode() + b"\n")
        return row

    def summary(self):
        """-> (what there is to say about the votes so far, in Markdown; the last row of the file, or None)."""
        try:
            rows = self.read()
        except (OSError, ValueError) as e:
            return f"**{self.path.name} cannot be read any more: {e}**", None
        table = Counter((row.get("run", "-"), row.get("preferred")) for row in rows)
        lines = [
            f"**{len(rows)} {'vote' if len(rows) == 1 else 'votes'}** in `{self.path.name}`",
            "",
            "| run | fine-tuned is better | base is better |",
            "|---|---|---|",
        ]
        lines += [
            f"| {Path(run).name} | {table[run, TUNED]} | {table[run, BASE]} |"
            for run in dict.fromkeys(run for run, _ in table)
        ]
        return "\n".join(lines) if rows else f"No votes yet in `{self.path.name}`", rows[-1] if rows else None


# --------------------------------------------------------------------------------------------------------------------- page
CSS = """
.gradio-container { width: 100%; max-width: 1240px !important; margin: auto !important; }
#examples .container, #examples img { height: 56px; width: 56px; margin: auto; object-fit: contain; }
#left label > span, #right label > span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#status { min-height: 1.6em; }
#votes table { width: 100%; } #votes th, #votes td { padding: 2px 8px; border-color: var(--border-color-primary); }
"""


def page(gr, runs, answers, votes, keep):
    """-> the page as gradio.Blocks; pictures of examples are written into the folder `keep`."""
    by_label, samples = {run.label: run for run in runs}, {}
    for run in runs:
        samples[run.label] = []
        for n, (image, question, reference) in enumerate(run.examples):
            image.save(file := Path(keep, f"{run.name}-{n}.png"))  # lossless: the model sees the row's own pixels
            samples[run.label].append([str(file), question, reference])

    def titles(run, order, blind):
        base = " + ".join("/".join(Path(part).parts[-2:]) for part in run.base.split(" + "))
        names = {BASE: f"Base: {base}", TUNED: f"Fine-tuned: {run.label}"}
        return ["Answer A", "Answer B"] if blind else [names[side] for side in order]

    def ask(path, question, label, blind, reference):
        """The asking itself: a generator of updates for (left, right, status, asked, three buttons)."""
        run, order, said, stop = by_label[label], [BASE, TUNED], ["", ""], threading.Event()
        if blind:
            random.shuffle(order)
        left, right = titles(run, order, blind)

        def show(status, asked=None):
            buttons = [gr.update(interactive=asked is not None)] * 3
            return gr.update(value=said[0], label=left), gr.update(value=said[1], label=right), status, asked, *buttons

        try:
            batch = answers.prepare(run, path, question)
            yield show("Waiting for the model ..." if answers.lock.locked() else "Answering ...")
            for n, side in enumerate(order):
                for said[n] in answers.stream(run, side, batch, stop):
                    yield show("Answering ...")
        except Refused as e:
            yield show(f"**{e}**")
            return
        except Exception as e:
            yield show(f"**The model failed: {type(e).__name__}: {str(e)[:300]}**")
            return
        finally:
            stop.set()
        asked = {
            "run": run,
            "path": path,
            "question": question.strip(),
            "order": order,
            "answers": dict(zip(order, said)),
            "blind": blind,
            "reference": reference,
            "voted": False,
        }
        if said[0] == said[1]:
            left, right = titles(run, order, False)
            yield show("The answers are equal: there is nothing to prefer, no pair is written.")
        else:
            yield show("Which answer is better?", asked)

    def so_far():
        text, row = votes.summary()
        return text, gr.update(value=json.dumps(row, ensure_ascii=False, indent=1) if row else None, visible=bool(row))

    voting = threading.Lock()

    def vote(asked, choice):
        """-> updates for (left, right, status, asked, three buttons, votes, last vote)."""
        with voting:  # of two quick clicks the first one counts
            if asked is None or asked["voted"]:
                message = "**Ask first: one vote for each pair of answers.**"
                return gr.update(), gr.update(), message, asked, *[gr.update()] * 5
            asked["voted"] = True
        run = asked["run"]
        try:
            if choice == "tie":
                message = "A tie: no pair was written, because DPO needs a better answer and a worse one."
            else:
                better = asked["order"][choice == "right"]
                image = run.recipe.load_image(asked["path"]) if asked["path"] else None
                more = {"run": run.path, "base": run.base, "blind": asked["blind"]}
                more |= {"reference": asked["reference"]} if asked["reference"] else {}
                votes.add(image, asked["question"], asked["answers"], better, **more)
                message = f"Written: the {better} answer is better."
        except Refused as e:
            message = f"**{e}**"
        except (OSError, run.recipe.BadRow) as e:
            message, asked["voted"] = f"**The vote could not be written: {e}**", False  # it can be tried again
        left, right = titles(run, asked["order"], False)
        buttons = [gr.update(interactive=not asked["voted"])] * 3
        return gr.update(label=left), gr.update(label=right), message, asked, *buttons, *so_far()

    def pick(n, label):
        path, question, reference = samples[label][n]
        return path, question, gr.update(value=reference, visible=bool(reference))

    with gr.Blocks(title="Compare", analytics_enabled=False) as demo:
        asked = gr.State(None)
        gr.Markdown(f"## {', '.join(by_label)}: fine-tuned and base, side by side")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    label="Picture",
                    height=280,
                    elem_id="picture",
                    buttons=[],
                )
                question = gr.Textbox(
                    label="Question", lines=2, max_lines=6, elem_id="question", placeholder="What is in the picture?"
                )
                reference = gr.Textbox(label="Reference answer", interactive=False, visible=False, elem_id="reference")
                chosen = gr.Dropdown(
                    list(by_label), value=runs[0].label, label="Fine-tuned run", visible=len(runs) > 1, elem_id="run"
                )
                blind = gr.Checkbox(
                    label="Blind: shuffle the sides, show the names after the vote", container=False, elem_id="blind"
                )
                with gr.Row():
                    go = gr.Button("Ask both", variant="primary", min_width=80, elem_id="ask")
                    halt = gr.Button("Stop", min_width=80, elem_id="stop")
            with gr.Column(scale=3, min_width=400):
                with gr.Row():
                    names = titles(runs[0], [BASE, TUNED], False)
                    left, right = (
                        gr.Textbox(
                            label=names[n], lines=7, max_lines=20, interactive=False, min_width=120, elem_id=side
                        )
                        for n, side in enumerate(("left", "right"))
                    )
                status = gr.Markdown("Upload or pick a picture, and ask.", elem_id="status")
                with gr.Row(equal_height=True):
                    buttons = [
                        gr.Button(text, interactive=False, min_width=80, elem_id=f"vote-{choice}")
                        for choice, text in (("left", "Left is better"), ("tie", "Tie"), ("right", "Right is better"))
                    ]
                tally = gr.Markdown(elem_id="votes")
                last = gr.Code(
                    language="json",
                    label="Last vote, as dpo_idefics2.py reads it",
                    interactive=False,
                    visible=False,
                    wrap_lines=True,
                    elem_id="last",
                    buttons=[],
                    show_line_numbers=False,
                )
        if any(samples.values()):
            data = gr.Dataset(
                components=["image", "textbox", "textbox"],
                headers=["Picture", "Question", "Reference"],
                layout="table",
                type="index",
                samples_per_page=5,
                samples=samples[runs[0].label],
                label="Examples: rows that the run held out",
                elem_id="examples",
            )
            data.click(pick, [data, chosen], [image, question, reference], api_visibility="private")
            chosen.change(lambda label: gr.Dataset(samples=samples[label]), chosen, data, api_visibility="private")
        # Gradio's own would open the file first, and fail with a message about a path that nobody has seen.
        image.preprocess = lambda payload: payload and payload.path
        shown = [left, right, status, asked, *buttons]
        # private: no second way in, beside the page
        gr.on(
            [question.input, image.input],
            lambda: gr.update(value="", visible=False),
            None,
            reference,
            show_progress="hidden",
            api_visibility="private",
        )
        event = gr.on(
            [go.click, question.submit],
            ask,
            [image, question, chosen, blind, reference],
            shown,
            show_progress="hidden",
            concurrency_limit=8,
            api_visibility="private",
        )
        halt.click(
            lambda: ("Stopped: ask again, or something else.", None),
            None,
            [status, asked],
            cancels=[event],
            api_visibility="private",
        )
        for button, choice in zip(buttons, ("left", "tie", "right")):
            button.click(
                lambda state, choice=choice: vote(state, choice),
                asked,
                [*shown, tally, last],
                show_progress="hidden",
                api_visibility="private",
            )
        demo.load(so_far, None, [tally, last], show_progress="hidden", api_visibility="private")
    return demo


def main(argv=None):
    """Parse, check, load, show."""
    args, rest = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # as Ctrl+C: uploads are not left behind
    keep = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="compare-")  # read when Gradio is imported
    try:
        gr, votes = load_gradio(), Votes(args.votes)
        runs = load_runs(args, rest)
        demo = page(gr, runs, Answers(runs, args), votes, keep)
        theme = gr.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        )  # its own fonts would come from elsewhere
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
                theme=theme,
                css=CSS,
                inbrowser=False,
            )
        except OSError as e:
            fail(f"--port {args.port} cannot be opened: {e}")
        if args.host not in ("127.0.0.1", "localhost", "::1"):
            print(f"note: whoever reaches {args.host} can ask and vote, there is no password", file=sys.stderr)
        print(f"open http://{args.host}:{args.port} (votes go to {args.votes}; Ctrl+C ends it)", flush=True)
        demo.block_thread()
    finally:
        shutil.rmtree(keep, ignore_errors=True)


if __name__ == "__main__":
    start(main)
