"""What gpu_first.py has done in processes of their own, which import torch:

python benchmarks/gpu_first_work.py ANSWER WORK ...     # what WORK returns goes to the file ANSWER, as JSON"""

import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from gpu_first_bars import RUNS  # noqa: E402

from tools.program import fail, start  # noqa: E402

# What is not in requirements.txt, and makes something faster or possible.
OTHERS = ["fla-core", "flash-linear-attention", "einops", "causal-conv1d", "triton", "liger-kernel", "torchvision"]
ROWS = {"gpu": 192, "cpu": 48}  # of a small run; a step of llava_two_stage.py has 128
# Where there is no GPU: steps of a few rows.
ON_A_CPU = {
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 4,
    "dataloader_num_workers": 1,
}


def version(name):
    """The version of an installed package; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def driver():
    """The version of the GPU's driver; None where nvidia-smi does not say."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split()
        return lines[0] if lines else None
    return None


def bitsandbytes_library():
    """The file of the library that bitsandbytes has loaded, or why it has none."""
    try:
        from bitsandbytes import cextension

        library = getattr(cextension.lib, "_lib", None)
        return getattr(library, "_name", None) or type(cextension.lib).__name__
    except Exception as error:  # it imports others, which may not fit the driver
        return f"{type(error).__name__}: {error}"


def versions():
    """The machine and its packages."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    found |= {"cores": os.cpu_count(), "gpu": None, "driver": driver()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "memory": torch.cuda.mem_get_info()[1]}
        found |= {"capability": list(torch.cuda.get_device_capability())}
    pinned = re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    found["pinned"] = {name: {"wanted": wanted, "found": version(name)} for name, wanted in pinned}
    found["others"] = {name: version(name) for name in OTHERS}
    names = ("fla", "causal_conv1d", "triton")
    found["importable"] = [name for name in names if importlib.util.find_spec(name)]
    found["bitsandbytes_library"] = bitsandbytes_library()
    return found


def small_models(folder, steps, where, *recipes):
    """Write the small models and their rows -> {recipe: {"flags" of its run, "on": those of where it runs,
    "four_bit_flag"}}. where: cpu or gpu."""
    from full_size import RUNS as ENTRIES
    from full_size import SAME_ORDER
    from made_up import make_rows, make_weights
    from measure import as_flags
    from transformers import AutoTokenizer

    folder, steps, plans = Path(folder), int(steps), {}
    every = max(1, steps // 3)
    for recipe in recipes:
        entry = ENTRIES[RUNS[recipe][-1]]
        make_weights(entry.model, True, folder / entry.model, where == "gpu")
        rows = make_rows(recipe, ROWS[where], AutoTokenizer.from_pretrained(folder / entry.model), folder / "rows")
        four_bits = entry.precisions["4"]
        flags = {"model_name_or_path": folder / entry.model, "dataset_name": rows, "max_steps": steps}
        flags |= {"logging_steps": 1, "save_steps": every, "eval_steps": every}
        flags |= {name: value for name, value in entry.flags.items() if name not in SAME_ORDER}
        on = {}
        if where == "cpu":
            on["use_cpu"] = True
            flags |= ON_A_CPU
        plan = {"flags": as_flags(flags | four_bits), "on": as_flags(on)}
        plans[recipe] = {**plan, "four_bit_flag": next(iter(four_bits))}
    return plans


def estimate(folder, size, run):
    """The memory that tools/inspect_recipe.py foretells for one of full_size.py's runs, in the precision that is
    measured: bytes that PyTorch's allocator gives out at a batch, for each row more, and in an optimizer's step at
    least. size: small or real."""
    from estimate import RUNS as ENTRIES
    from estimate import reckon

    bits = next(iter(ENTRIES[run].precisions))
    more = {"eval_strategy": "no"}  # as full_size.py runs it
    memory = reckon(run, bits, 32, size == "small", Path(folder), more=more)["memory"]
    if memory["activations"] is None:
        fail(f"activations were not counted: {memory.get('not_counted')}")
    fixed = dict(memory["fixed"][memory["strategy"]])
    if "paged" in memory["optim"]:
        fixed.pop("optimizer")  # is not PyTorch's to give out
    least = sum(fixed.values()) + memory["phases"].get("optimizer step", {}).get("bytes", 0)
    step = memory["activations"]["with_checkpointing"]
    parts = {**fixed, "activations": step["bytes"]}
    found = {"bits": bits, "batch": memory["batch"], "bytes": sum(parts.values())}
    return {**found, "least": least, "for_each_row": step["for_each_row"], "parts": parts, "tokens": memory["longest"]}


def real_weights(folder, *recipes):
    """Write random weights of the real size where full_size.py looks for them."""
    from full_size import RUNS as ENTRIES
    from full_size import SPARE
    from made_up import make_weights, missing

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    models = list(dict.fromkeys(ENTRIES[RUNS[recipe][0]].model for recipe in recipes))
    free, needed = shutil.disk_usage(folder).free, SPARE + missing(models, folder, False)
    if free < needed:
        fail(f"{needed / 1e9:.3g} GB are needed for the weights, {free / 1e9:.3g} GB are free: --scratch FOLDER")
    for model in models:
        make_weights(model, False, folder / model, True)
    return {"models": models}


WORK = {work.__name__: work for work in (versions, small_models, estimate, real_weights)}


def main():
    """A file, a name of WORK, what it takes."""
    answer, work, *words = sys.argv[1:]
    Path(answer).write_text(json.dumps(WORK[work](*words)))


if __name__ == "__main__":
    start(main)
