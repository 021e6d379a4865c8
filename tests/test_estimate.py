"""benchmarks/estimate.py: its figures are those of tools/inspect_recipe.py, of the published sizes."""

import importlib
import json
import re
import sys
from types import SimpleNamespace

import pytest
import transformers
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
estimate = importlib.import_module("estimate")
made_up = importlib.import_module("made_up")


def test_a_table_of_all_precisions(capsys, tmp_path):
    estimate.main(["finetune_minicpm_lora", "--small", "--rows", "16", "--json", str(tmp_path / "found.json")])
    small, _, head, rule, *lines = capsys.readouterr().out.splitlines()
    assert small == estimate.SMALL
    reports = json.loads((tmp_path / "found.json").read_text())
    assert list(reports) == ["finetune_minicpm_lora, 16 bits", "finetune_minicpm_lora, 4 bits"] and len(lines) == 2
    assert len({line.count("|") for line in (head, rule, *lines)}) == 1
    whole, packed = reports.values()
    four_bit = lambda report: sum(part["four_bit"] for part in report["parts"].values())
    assert four_bit(packed) > 0 == four_bit(whole)
    for line, report in zip(lines, reports.values()):
        cells, fixed = line.split(" | "), report["memory"]["fixed"]["ddp"]
        assert cells[2:5] == ["1", str(report["memory"]["longest"]), f"{fixed['weights'] / 1e6:.1f}"]
        assert re.fullmatch(r"\d+ / \d+ \|", " / ".join(cells[-1].split(" / ")))


@pytest.mark.parametrize(
    "run, bits",
    [
        (run, bits)
        for run, (recipe, *_, precisions) in estimate.RUNS.items()
        for bits in precisions
        if recipe == "llava_two_stage"
    ],
)
def test_both_stages_are_reckoned(run, bits, tmp_path):
    trained = {
        name: part["trainable"] > 0 for name, part in estimate.reckon(run, bits, 16, True, tmp_path)["parts"].items()
    }
    assert trained == {"vision tower": False, "projector": True, "language model": "instruct" in run}


@pytest.mark.parametrize("bits", ["4", "16"])
def test_a_step_is_measured_beside(bits, tmp_path, capsys):
    estimate.main(
        [
            "sft_llava",
            "--measure",
            "--small",
            "--bits",
            bits,
            "--rows",
            "16",
            "--scratch",
            str(tmp_path / "disk"),
            "--json",
            str(tmp_path / "found.json"),
        ]
    )
    (found,) = json.loads((tmp_path / "found.json").read_text()).values()
    assert found["foretold"] == pytest.approx(found["measured"], rel=0.15) and found["batch"] == 1
    *_, row = capsys.readouterr().out.splitlines()
    assert row.split(" | ")[:3] == ["| `sft_llava`", f"{bits} bit", "1"]
    written = (tmp_path / "disk" / "llava-1.5-7b" / "model-0.safetensors").stat().st_mtime_ns
    made_up.write_weights("llava-1.5-7b", True, tmp_path / "disk" / "llava-1.5-7b")  # once
    assert (tmp_path / "disk" / "llava-1.5-7b" / "model-0.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("model", list(made_up.MODELS))
def test_weights_of_several_files_are_whole(model, tmp_path):
    made_up.write_weights(model, True, tmp_path / "model", shard=100_000)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    loaded, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.num_parameters() == int((tmp_path / "model" / "done").read_text())


def test_no_room_for_the_weights(tmp_path, monkeypatch):
    memory = SimpleNamespace(available=int(40e9))
    monkeypatch.setattr(estimate.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(estimate.psutil, "swap_memory", lambda: SimpleNamespace(free=0))
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(9.5e9)))
    with pytest.raises(SystemExit, match=f"16.8 GB are needed in {tmp_path} for the weights, 9.5 GB are free"):
        estimate.main(["idefics2_docvqa", "--measure", "--scratch", str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file: File exists"):
        estimate.main(["--measure", "--scratch", str(tmp_path / "file")])
    memory.available = int(8e9)
    with pytest.raises(
        SystemExit, match="the weights of idefics2-8b in 16 bits alone take 16.8 GB of memory, 8 GB are free"
    ):
        estimate.main(["idefics2_docvqa", "--measure", "--scratch", str(tmp_path)])
    with pytest.raises(SystemExit, match="GB are needed in"):  # in memory there is room for 4 bits
        estimate.main(["idefics2_docvqa", "--bits", "4", "--measure", "--scratch", str(tmp_path)])


def test_what_does_not_fit_is_said():
    kinds = {kind: {"bytes": 5e9, "for_each_row": 1e9} for kind in estimate.KINDS}
    fits = {str(card): dict.fromkeys(estimate.KINDS, max(0, card - 20)) for card in estimate.CARDS}
    fixed = {"weights": 14e9, "trained": 1e9, "gradients": 1e9, "optimizer": 2e9, "exchange": 0}
    report = {
        "memory": {"strategy": "ddp", "fixed": {"ddp": fixed}, "longest": 700, "activations": kinds, "fits": fits}
    }
    assert estimate.line("sft_llava", "16", report) == [
        "`sft_llava`", "16 bit", "1", "700", "14.0", "4.0", "5.0", "5.0", "no / no", "4 / 4", "20 / 20", "60 / 60"]  # fmt: skip


def test_a_refusal_of_the_recipe_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setitem(
        estimate.RUNS,
        "sft_llava",
        ("sft_llava", "llava-1.5-7b", "dataset_name", 1, {"learning_rate": 0}, {"16": {"load_in_4bit": False}}),
    )
    with pytest.raises(SystemExit, match="^error: sft_llava, 16 bits: error: --learning_rate must be above 0"):
        estimate.reckon("sft_llava", "16", 16, True, tmp_path)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["no_recipe"], "no recipe no_recipe; there are sft_llava"),
        (["--rows", "15"], "at least 16"),
        (["--batch_size", "2"], "are for --measure"),
        (["--measure", "--batch_size", "0"], "at least 1"),
        (["--json", "nowhere/x.json"], "cannot be written"),
    ],
)
def test_mistakes_get_one_message(argv, message):
    with pytest.raises(SystemExit) as e:
        estimate.main(argv)
    assert message in e.value.code
