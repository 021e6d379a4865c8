"""`python -m tiny`: see `python -m tiny --help`."""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

ABOUT = """\
Build a tiny vision-language model and its data, without any download.

what there is:
  llava       LLaVA-1.5 (0.9 M parameters, 56 px), trained here to caption scanned handwritten digits, and data
              to fine-tune it with: questions about digits that it was never asked. About 2 minutes on one CPU core
              (--base_steps 0: a model with random weights and the same data in a few seconds).
  llava_next  LLaVA-NeXT (llava-v1.6-mistral) with random weights, to test code with. Seconds. No data of its own.
  qwen3_vl    Qwen3-VL (2.0 M parameters, 56 px), trained and with data as llava. About 3 minutes on one CPU core
              (--base_steps 0: seconds). Its processor needs torchvision: see tiny/torchvision_on_cpu.py.
  smolvlm     SmolVLM2 (0.8 M parameters, 56 px), likewise. About 2 minutes.
  idefics2    Idefics2 (1.4 M parameters, pages of 112x56 px), trained here to read forms aloud, printed and with
              handwritten numbers, and questions about forms. About 3 minutes on one CPU core (--base_steps 0:
              seconds).
  idefics2_dpo  Idefics2 (1.4 M parameters, 56 px), trained here to see handwritten digits but to answer questions
              about them at random, and pairs of a right and a hallucinated answer. About 2 minutes on one CPU core
              (--base_steps 0: seconds).
  minicpmv4_6  MiniCPM-V 4.6 (0.5 M parameters, 56 px, larger pictures in slices), trained here to caption scanned
              handwritten digits, and conversations about them. About 2 minutes on one CPU core (--base_steps 0:
              seconds).
  minicpmv4_7  MiniCPM-V 4.7, likewise
  llava_two_stage
              a CLIP vision tower (0.5 M parameters, 56 px), trained here to tell scanned handwritten digits apart,
              and a Llama (0.4 M parameters), trained here on text alone; captions and conversations to join them with,
              in LLaVA's two stages. About 2 minutes on one CPU core (--base_steps 0: seconds).

what is written into DIR:
  model/                    model and processor, as save_pretrained writes them; of llava_two_stage:
  vision/, language/        tower and image processor, language model and tokenizer
  data/{train,test}.parquet rows in the schema of HuggingFaceH4/llava-instruct-mix-vsft (llava, qwen3_vl, smolvlm), of
                            nielsr/docvqa_1200_examples (idefics2) or of openbmb/RLAIF-V-Dataset (idefics2_dpo);
                            none of MiniCPM-V and llava_two_stage
  json/{train,test}.json    the same rows in LLaVA's own schema (llava, qwen3_vl, smolvlm, llava_two_stage), as plain
                            question and answers (idefics2), as question, chosen and rejected (idefics2_dpo) or in
                            MiniCPM-V's own schema (minicpmv4_6, minicpmv4_7); the pictures are in json/images/
  json/captions{,-test}.json
                            captions in the schema of LLaVA-Pretrain (llava_two_stage)
  amber/                    questions to be answered by yes or no, in AMBER's files (idefics2_dpo)
  built.json                what it was built from

A second call with the same arguments returns at once. The same seed gives the same files, bit for bit
(with the same package versions and CPU).
"""


# steps of the base's own training
STEPS = {"llava": 1700, "idefics2": 1400, "idefics2_dpo": 1500, "minicpmv4_6": 1000, "minicpmv4_7": 1000}
STEPS |= {"llava_two_stage": 1500, "qwen3_vl": 1500, "smolvlm": 1500}
SOURCES = {"idefics2": ["forms.py", "idefics2.py"], "idefics2_dpo": ["forms.py", "idefics2.py", "preferences.py"]}
SOURCES |= dict.fromkeys(["minicpmv4_6", "minicpmv4_7"], ["forms.py", "idefics2.py", "llava.py", "minicpm.py"])
SOURCES |= {"llava_two_stage": ["forms.py", "idefics2.py", "llava.py", "two_stage.py"]}
LEARNERS = ["qwen3_vl", "smolvlm"]  # of families.py
SOURCES |= dict.fromkeys(LEARNERS, ["forms.py", "idefics2.py", "llava.py", "families.py"])
FAMILIES = [
    "llava",
    "llava_next",
    *LEARNERS,
    "idefics2",
    "idefics2_dpo",
    "minicpmv4_6",
    "minicpmv4_7",
    "llava_two_stage",
]


def recipe(args: argparse.Namespace) -> dict:
    """What a build depends on: arguments, package versions and the sources that make it."""
    own = SOURCES.get(args.family, ["llava.py"])
    packages = ["torch", "transformers", "tokenizers", "trl", "datasets", "scikit-learn", "pillow", "numpy"]
    if args.family in LEARNERS:
        packages.append("torchvision")
    sources = [Path(__file__).with_name(name) for name in ("descent.py", "digits.py", *own)]
    return {
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "versions": {name: version(name) for name in packages},
        "sources": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
    }


def flags() -> argparse.ArgumentParser:
    """The program's flags: of each family, and of the report."""
    parser = argparse.ArgumentParser(
        prog="python -m tiny",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    families = parser.add_subparsers(dest="family", required=True, metavar=f"{{{','.join(FAMILIES)},report}}")
    for family in FAMILIES:
        sub = families.add_parser(family, help=f"see above; {family} --help lists its flags", allow_abbrev=False)
        sub.add_argument(
            "--out", type=Path, required=True, metavar="DIR", help="folder to write; an older build is replaced"
        )
        sub.add_argument(
            "--seed", type=int, default=0, help="of the weights, the pictures' split and the rows (default 0)"
        )
        if family in STEPS:
            sub.add_argument(
                "--base_steps",
                type=int,
                default=STEPS[family],
                help=f"of the base's own training; 0: random (default {STEPS[family]})",
            )
    sub = families.add_parser("report", help="what a demo's run has learned: a table", allow_abbrev=False)
    sub.add_argument(
        "run", type=Path, metavar="RUN", help="output_dir of the run, with before.jsonl and after.jsonl in it"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Build what is asked for, unless it is there, or print a report."""
    args = flags().parse_args(argv)
    if args.family == "report":
        from .report import report

        report(args.run)
        return

    if args.family in LEARNERS and importlib.util.find_spec("torchvision") is None:
        sys.exit(
            f"error: the processor of {args.family} needs torchvision. With a CPU build of torch:\n"
            "  python tiny/torchvision_on_cpu.py .venv/vision\n"
            f"  PYTHONPATH=.venv/vision python -m tiny {args.family} ...\n"
            "With another: pip install -r requirements-vision.txt"
        )
    wanted, done = recipe(args), args.out / "built.json"
    if done.is_file() and json.loads(done.read_text()) == wanted:
        print(f"{args.out} is built already")
        return
    if args.out.exists() and not done.is_file() and any(args.out.iterdir()):
        sys.exit(f"error: {args.out} exists and holds no built.json of this program: it is not overwritten")

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads are slower at this size
    import torch

    from . import families, idefics2, llava, minicpm, preferences, two_stage

    torch.set_num_threads(1)
    work = args.out.with_name(f"{args.out.name}.part-{os.getpid()}")
    work.mkdir(parents=True)
    try:
        if args.family == "llava_next":
            llava.build_next(work, args.seed)
        elif args.family.startswith("minicpm"):
            minicpm.build(work, args.seed, args.base_steps, family=args.family)
        elif args.family in LEARNERS:
            families.build_learner(work, args.seed, args.base_steps, family=args.family)
        else:
            built = {"llava": llava, "idefics2": idefics2, "idefics2_dpo": preferences, "llava_two_stage": two_stage}
            built[args.family].build(work, args.seed, args.base_steps)
        (work / "built.json").write_text(json.dumps(wanted, indent=1))  # last: what is cut off before is not a build
        if args.out.exists():
            shutil.rmtree(args.out)
        work.rename(args.out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"built {args.out}")


if __name__ == "__main__":
    main()
