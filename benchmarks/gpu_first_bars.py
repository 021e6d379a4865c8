"""What the results of gpu_first.py are worth: each bar met or missed, and the tables for RESULTS.md."""

import json

# In order of worth; of full_size.py's runs those of each.
RUNS = {
    "sft_llava": ["sft_llava"],
    "dpo_idefics2": ["dpo_idefics2"],
    "idefics2_docvqa": ["idefics2_docvqa"],
    "finetune_minicpm_lora": ["finetune_minicpm_lora"],
    "llava_two_stage": ["llava_two_stage align", "llava_two_stage instruct"],
}
CHECKS = ["trains", "is killed and resumes", "losses are equal", "answers", "is merged", "merged answers"]
# Times as fast as the stock trainer, share of the estimate that memory may be off, share of the GPU's peak.
SPEED = {"sft_llava": 1.05, "dpo_idefics2": 1.5}
MEMORY, MFU = 0.10, 0.40
GOOD = ("met", "not judged")


def read(path):
    """The records of a results.jsonl; a last line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def first(records, part, **wanted):
    """The first record of a part with these values; None where there is none."""
    for record in records:
        if record["part"] == part and all(record.get(key) == value for key, value in wanted.items()):
            return record
    return None


def result_of(records, run, is_auto):
    """The record of full_size.py's run with its own batch, or with the one that it chooses."""
    for record in records:
        is_of_run = record["part"] == "full_size" and record["name"] == run
        if is_of_run and (record["batch"] == "auto") == is_auto:
            return record
    return None


def in_short(record):
    """How a record failed, in a line: the first one, which says how it ended, and the last that was printed."""
    lines = record.get("error", "").splitlines()
    return ": ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))


def problem(record, *sides):
    """(status, why) where a record holds no figures; None where it does. sides: of a run, those that are needed."""
    if record is None:
        return "not run", "no result"
    if record["status"] != "ok":
        status = "not run" if record["status"] == "not run" else "failed"
        return status, in_short(record) or record["status"]
    for side in sides:
        found = record.get(side, {"status": "not run: no result"})["status"]
        if found != "ok":
            return ("not run" if found.startswith("not run") else "failed"), f"{side}: {found}"
    return None


# ---------------------------------------------------------------- the bars


def verdict(what, bar, trouble, figure=None, text=None, is_met=None):
    """A line of the table of bars. trouble: see `problem`. is_met: None where nothing is judged."""
    if trouble:
        return {"what": what, "bar": bar, "figure": None, "text": trouble[1], "status": trouble[0]}
    status = {True: "met", False: "missed", None: "not judged"}[is_met]
    return {"what": what, "bar": bar, "figure": figure, "text": text, "status": status}


def judge(records):
    """All records of a run -> the verdicts on it. Bars that need a GPU are not judged without one."""
    begin = records[0]
    parts, recipes, cpu = begin["parts"], begin["recipes"], begin["cpu"]
    runs = [run for recipe in recipes for run in RUNS[recipe]]
    verdicts = []
    if "versions" in parts:
        record = first(records, "versions")
        verdicts.append(verdict("versions", "known", problem(record), is_met=True, text="known"))
    if "tiny" in parts:
        verdicts += [judge_tiny(records, recipe) for recipe in recipes]
    if "estimate" in parts:
        for run in runs:
            record = first(records, "estimate", name=run)
            text = None if problem(record) else f"{record['bytes'] / 1e9:.2f} GB at batch {record['batch']}"
            verdicts.append(verdict(f"estimate: {run}", "made", problem(record), text=text, is_met=True))
    if "full_size" in parts:
        verdicts += [judge_speed(records, recipe, cpu) for recipe in recipes if recipe in SPEED]
        verdicts += [judge_mfu(records, run, cpu) for run in runs]
        for run in runs:
            with_estimate = [judge_memory(records, run, is_auto, cpu) for is_auto in (False, True)]
            verdicts += with_estimate if "estimate" in parts else []
    return verdicts


def judge_tiny(records, recipe):
    """A recipe on its small model: all checks passed."""
    found = {check: first(records, "tiny", name=recipe, check=check) for check in CHECKS}
    what, bar, failed, not_run = f"small model: {recipe}", "all checks", [], []
    for check, record in found.items():
        trouble = problem(record)
        if trouble and trouble[0] == "failed":
            failed.append(f"{check}: {trouble[1]}")
        elif trouble:
            not_run.append(check)
    text = "; ".join([*failed, *([f"not run: {', '.join(not_run)}"] if not_run else [])])
    if text:
        return verdict(what, bar, ("failed" if failed else "not run", text))
    losses, answers = found["losses are equal"], found["merged answers"]
    text = f"{losses['compared']} losses after the resume within {losses['largest_difference']:.1e}"
    if losses["bit_equal"]:
        text += ", bit-equal"
    elif losses["first_bit_equal"]:
        text += ", the first bit-equal"
    text += f"; {answers['equal']} of {answers['answers']} merged answers equal"
    return verdict(what, bar, None, losses["largest_difference"], text, True)


def judge_speed(records, recipe, cpu):
    """As fast as the stock trainer, at the recipe's own batch."""
    record, bar = result_of(records, RUNS[recipe][0], False), SPEED[recipe]
    what, trouble = f"stock / {recipe}", problem(record, "recipe", "stock")
    if trouble:
        return verdict(what, f">= {bar}x", trouble)
    ratio = record["stock"]["median"] / record["recipe"]["median"]
    return verdict(what, f">= {bar}x", None, ratio, f"{ratio:.2f}x", None if cpu else ratio >= bar)


def judge_mfu(records, run, cpu):
    """Share of the GPU's peak, at the batch that the recipe chooses."""
    record, device = result_of(records, run, True), first(records, "full_size", name="device")
    what, bar, trouble = f"MFU: {run}", f">= {MFU:.0%}", problem(record, "recipe") or problem(device)
    if trouble is None and not record["recipe"]["flops"]:
        trouble = "failed", f"FLOPs were not counted: {record['recipe']['uncounted']}"
    if trouble:
        return verdict(what, bar, trouble)
    found = record["recipe"]["flops_per_second"]
    share, hardware = (found[kind] / device["device"]["peak_flops"] for kind in ("model", "hardware"))
    text = f"{share:.1%}, with recomputation {hardware:.1%}"
    return verdict(what, bar, None, share, text, None if cpu else share >= MFU)


def memory_ratio(records, run, is_auto):
    """(measured, estimated) peak in bytes of a run that was measured; None where either is not known."""
    record, foretold = result_of(records, run, is_auto), first(records, "estimate", name=run)
    if problem(record, "recipe") or problem(foretold) or not record["recipe"]["memory"]:
        return None
    more_rows = record["recipe"]["batch"] - foretold["batch"]
    expected = foretold["bytes"] + more_rows * foretold["for_each_row"]
    return record["recipe"]["memory"]["allocated"], max(foretold["least"], expected)


def judge_memory(records, run, is_auto, cpu):
    """Peak memory against the estimate."""
    record, foretold = result_of(records, run, is_auto), first(records, "estimate", name=run)
    what = f"memory: {run}, batch {'auto' if is_auto else 'own'}"
    bar, trouble = f"within {MEMORY:.0%}", problem(record, "recipe") or problem(foretold)
    if trouble:
        return verdict(what, bar, trouble)
    both = memory_ratio(records, run, is_auto)
    if both is None:  # on a CPU
        return verdict(what, bar, None if cpu else ("failed", "no peak was measured"))
    ratio = both[0] / both[1]
    text = f"{both[0] / 1e9:.2f} GB, estimate {both[1] / 1e9:.2f} GB: {ratio:.2f}"
    return verdict(what, bar, None, ratio, text, None if cpu else abs(ratio - 1) <= MEMORY)


# ---------------------------------------------------------------- the tables


def table(columns, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [str(cell).replace("|", "/").replace("\n", " ") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


FIGURES = ["recipe", "bits", "batch", "rows a step", "s/step", "rows/s", "MFU", "peak GB", "estimate GB", "ratio"]
FIGURES += ["waits for the loader", "GPU idle", "stock s/step", "stock GB", "stock/recipe"]


def percent(share):
    """A share as a cell."""
    return "-" if share is None else f"{share:.0%}"


def figures(records):
    """A row for each of full_size.py's results: FIGURES."""
    rows = []
    for record in records:
        if record["part"] != "full_size" or "batch" not in record:
            continue
        trouble = problem(record, "recipe")
        if trouble:
            rows.append([record["name"], record["bits"], record["batch"], ": ".join(trouble), *["-"] * 11])
        else:
            rows.append(figures_of(record, records))
    return rows


def figures_of(record, records):
    """One of full_size.py's results -> its row."""
    mine, other, device = record["recipe"], record.get("stock"), first(records, "full_size", name="device")
    is_auto = record["batch"] == "auto"
    batch = f"auto: {mine['batch']}" if is_auto else mine["batch"]
    row = [record["name"], record["bits"], batch, mine["rows"], f"{mine['median']:.3f}"]
    row.append(f"{mine['rows_per_second']:.2f}")
    has_mfu = device and mine["flops"]
    row.append(f"{mine['flops_per_second']['model'] / device['device']['peak_flops']:.1%}" if has_mfu else "-")
    row.append(gigabytes(mine))
    both = memory_ratio(records, record["name"], is_auto)
    row += [f"{both[1] / 1e9:.1f}", f"{both[0] / both[1]:.2f}"] if both else ["-", "-"]
    row += [percent(mine["waiting"]), percent(mine["idle"])]
    if other and other["status"] == "ok":
        return [*row, f"{other['median']:.3f}", gigabytes(other), f"{other['median'] / mine['median']:.2f}x"]
    return [*row, other["status"].split(":")[0] if other else "-", "-", "-"]


def gigabytes(side):
    """The peak of a side, as a cell."""
    return f"{side['memory']['allocated'] / 1e9:.1f}" if side["memory"] else "-"


def machine(records):
    """The machine and its packages in a line."""
    found = first(records, "versions", status="ok")
    if found is None:
        return "versions: not known"
    names = {name: package["found"] for name, package in found["pinned"].items() if package["found"]}
    names |= {name: version for name, version in found["others"].items() if version}
    gpu = "no GPU"
    if found["gpu"]:
        gpu = f"{found['gpu']}, {found['memory'] / 1e9:.0f} GB, driver {found['driver']}, CUDA {found['cuda']}"
    packages = ", ".join(f"{name} {version}" for name, version in names.items())
    return f"{gpu}, {found['cores']} cores; Python {found['python']}, {packages}"


def differing(records):
    """A line on packages in other versions than requirements.txt's; None where there are none."""
    found = first(records, "versions", status="ok")
    others = [
        f"{name} {package['found']} instead of {package['wanted']}"
        for name, package in (found["pinned"] if found else {}).items()
        if (package["found"] or "").split("+")[0] != package["wanted"]
    ]
    return f"Not as in requirements.txt: {', '.join(others)}" if others else None


def report(records):
    """All records of a run -> (the tables as Markdown, whether all is well)."""
    begin, verdicts = records[0], judge(records)
    lines = [f"gpu_first.py, {begin['date']}: {machine(records)}", differing(records), ""]
    if begin["cpu"]:
        lines.insert(1, "Small models on the CPU, to see that it runs: the figures say nothing, bars are not judged")
    cells = [[one["what"], one["bar"], one["status"], one["text"] or "-"] for one in verdicts]
    lines += [table(["what", "bar", "result", "figure"], cells), ""]
    rows = figures(records)
    if rows:
        lines += [table(FIGURES, rows), ""]
    left_out = [part for part in begin["all_parts"] if part not in begin["parts"]]
    if left_out:
        lines.append(f"Left out: {', '.join(left_out)}")
    for status, words in (("missed", "Bars missed"), ("failed", "Failed"), ("not run", "Not run")):
        names = [one["what"] for one in verdicts if one["status"] == status]
        if names:
            lines.append(f"{words}: {', '.join(names)}")
    is_well = bool(verdicts) and all(one["status"] in GOOD for one in verdicts)
    return "\n".join(line for line in lines if line is not None), is_well
