"""What the tests on the fake GPU share: how they run tests/fake_cuda.py, and what must hold for each run."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, for tests/fake_cuda.cpp")
GPU, BATCHES = "cuda:0", 3  # two in training, one in evaluation
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
# dtype, bits, checkpointing. In PAIRWISE each two settings meet, in OPPOSITE each is met.
PAIRWISE = ["bf16-4-on", "bf16-16-off", "fp16-4-off", "fp16-16-on"]
OPPOSITE = ["bf16-4-on", "fp16-16-off"]
STEP, EVALUATION = "step", "evaluation"
WAIT, COPY, MASKED, IN_FLOAT32, WIDE = (
    "wait",
    "blocking copy",
    "masked attention",
    "product in float32",
    "as wide as the vocabulary",
)
# A product that is meant to be in float32. Linear attention (MiniCPM-V 4.6, Qwen3.5) solves a triangular system in
# float32 where fla is not installed, and so does the backward pass of that.
TRIANGULAR_SYSTEM = r"bmm \(\d+, 64, 16\) x \(\d+, 16, 64\) at the backward pass"


class Bound(NamedTuple):
    """The most that may happen in a run: in an optimizer step of two batches of two rows, and in the evaluation of one
    batch. A wait is a line at which the host waits for the GPU."""

    waits: int
    waits_of_ours: int  # of these, at a line of the recipe itself
    copies: int  # from the host, for which it waits
    masked: int  # calls of attention with a mask, which rules out the flash kernel
    evaluation_waits: int


@functools.cache
def reports(*command):
    """The reports of `fake_cuda.py COMMAND`, a list of dicts. Each command runs once, in a process of its own: it
    changes torch for good."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "reports.json")
        script = Path(__file__).with_name("fake_cuda.py")
        done = subprocess.run(
            [sys.executable, script, *map(str, command), "--json", output],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_MODULES_CACHE": folder},
        )
        assert output.exists(), done.stderr[-3000:]
        return json.loads(output.read_text())


def report_of(settings, command, **parts):
    """The one report among those of a command with these settings, and with these values, such as model."""
    for report in reports(*command):
        run = f"{report['dtype']}-{report['bits']}-{report['checkpointing']}"
        if run == settings and all(report[name] == value for name, value in parts.items()):
            return report
    raise LookupError(f"{command}: no report of {settings} {parts}")


def events(report, part, *kinds, ours=False):
    """The events of these kinds in a part of the run; with `ours` only those at a line of the recipe."""
    found = [event for event in report["events"] if event["part"] == part and event["kind"] in kinds]
    return [event for event in found if event["is_ours"]] if ours else found


def total(found):
    """How often events happened."""
    return sum(event["count"] for event in found)


def listed(found):
    """Events as text: those at lines of the recipe first, then those of libraries, the most frequent first."""
    lines = []
    for is_ours, title in ((True, "by lines of the recipe"), (False, "by lines of libraries")):
        some = sorted((event for event in found if event["is_ours"] is is_ours), key=lambda event: -event["count"])
        lines.append(f"{title}: {total(some)}")
        for event in some:
            caller = f" (from {event['caller']})" if event["caller"] else ""
            lines.append(f"  {event['count']} x {event['what']} at {event['place']}{caller}")
    return "\n".join(lines)


def check_run(report):
    """It trained and evaluated to the end, and each loss is on the GPU."""
    assert not report["error"], report["error"]
    assert set(report["loss_devices"]) == {GPU} and len(report["loss_devices"]) >= BATCHES


def check_trained(report):
    """What is trained is float32, on the GPU, and has a gradient there."""
    assert report["trained"], "nothing is trained"
    for name, dtype, device, has_gradient in report["trained"]:
        assert (dtype, device) == ("float32", GPU), f"trained: {name} is {dtype} on {device}"
        assert has_gradient, f"trained: {name} has no gradient"


def check_frozen(report):
    """What is frozen is on the GPU, in the run's dtype; in 4 bits, layers of the language model are bytes, and no
    others: those of the vision tower and lm_head never are."""
    quantized = []
    for name, dtype, device in report["frozen"]:
        assert device == GPU, f"frozen: {name} is on {device}"
        if dtype == "uint8":
            quantized.append(name)
        else:
            assert dtype == DTYPES[report["dtype"]], f"frozen: {name} is {dtype}"
    assert bool(quantized) == (report["bits"] == "4")
    for name in quantized:
        assert not any(part in name for part in ("vision", "visual", "lm_head", "embed")), f"in 4 bits: {name}"


def check_dtypes_of_products(report, known=()):
    """No matrix product and no attention computes in float32, but for those that match one of the regexes `known`."""
    found = []
    for event in events(report, STEP, IN_FLOAT32) + events(report, EVALUATION, IN_FLOAT32):
        if not any(re.fullmatch(regex, f"{event['what']} at {event['place']}") for regex in known):
            found.append(event)
    assert not found, f"in float32:\n{listed(found)}"


def check_width(report):
    """Training makes no logits but those of trained tokens."""
    found = events(report, STEP, WIDE)
    assert not found, f"logits of tokens that are not trained:\n{listed(found)}"


def check_bound(report, bound):
    """The run waits, copies and masks no more than its bound says."""
    waits, copies, masked = (events(report, STEP, kind) for kind in (WAIT, COPY, MASKED))
    waits_of_ours = events(report, STEP, WAIT, ours=True)
    evaluation_waits = events(report, EVALUATION, WAIT)
    measured = [
        ("waits for the GPU in a step", waits, bound.waits),
        ("waits for the GPU by the recipe's own lines", waits_of_ours, bound.waits_of_ours),
        ("blocking copies in a step", copies, bound.copies),
        ("attention with a mask in a step", masked, bound.masked),
        ("waits for the GPU in an evaluation batch", evaluation_waits, bound.evaluation_waits),
    ]
    for title, found, most in measured:
        assert total(found) <= most, f"{total(found)} {title}, at most {most} are allowed\n{listed(found)}"
