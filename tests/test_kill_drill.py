"""benchmarks/kill_drill.py in its short form: each recipe is killed in three ways; one of them also as one of two
processes, and it has a damaged checkpoint, and a full disk. And the drill sees what differs."""

import json
import shutil
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import kill_drill  # noqa: E402
import kill_drill_runs  # noqa: E402


@pytest.fixture(scope="module")
def outcome_of(tmp_path_factory, quick_collections):
    """A function: recipe, kind -> the Outcome of the short form. Its disks are full by a limit to the size of files,
    which needs no rights."""
    scratch = tmp_path_factory.mktemp("drill")
    outcomes = {
        (outcome.recipe, outcome.kind): outcome for outcome in kill_drill.short_form(kill_drill.RECIPES, scratch)
    }
    shutil.rmtree(scratch)
    return lambda recipe, kind: outcomes[recipe, kind]


KILLS = [
    (recipe, kind) for recipe in kill_drill.RECIPES for kind in ("KILL in a save", "TERM in a save", "INT in a save")
]


@pytest.mark.parametrize("recipe, kind", [*KILLS, ("sft_llava", "KILL of two")])
def test_a_killed_run_comes_to_the_same_end(recipe, kind, outcome_of):
    """With the exit status and the message that belong to the signal, in time, and with no more steps lost than may
    be."""
    outcome = outcome_of(recipe, kind)
    assert outcome.faults == []
    assert outcome.kills == 1 and outcome.ended and outcome.equal
    assert outcome.steps_lost <= (0 if kind.startswith("TERM") else 2)


@pytest.mark.parametrize("kind", ["damage: flipped", "disk full: a checkpoint", "disk full: the result"])
def test_a_damaged_checkpoint_and_a_full_disk_are_named_and_cost_nothing(kind, outcome_of):
    outcome = outcome_of("sft_llava", kind)
    assert outcome.faults == []
    assert outcome.resumed and outcome.ended and outcome.equal


# ------------------------------------------------------------------------------------------------ what the drill sees
@pytest.fixture
def finished(tmp_path):
    """What a finished run may leave."""
    history = [{"step": 1, "loss": 2.0, "train_runtime": 1.0}, {"step": 2, "loss": 1.5}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "samples.md").write_text("\n## Step 1\n\n| a |\n\n## Step 2\n\n| b |\n\n## Step 3\n\n| c |\n")
    return tmp_path


@pytest.mark.parametrize(
    "file, old, new, named",
    [
        ("model.safetensors", "weights", "weightt", "other weights: model.safetensors"),
        ("trainer_state.json", "1.5", "1.25", "another log: loss at step 2: 1.25, expected 1.5"),
        ("trainer_state.json", '"step": 2, ', "", "another log: step at step 2: None, expected 2"),
        ("trainer_state.json", '"train_runtime": 1.0', '"train_runtime": 2.0', None),
        ("trainer_state.json", "}]}", "", "marked as finished, with a broken trainer_state.json"),
        ("samples.md", "\n## Step 2\n\n| b |\n", "", "samples.md lacks Step 2"),
        ("samples.md", "\n## Step 2", "\n## Step 1\n\n| a |\n\n## Step 2", None),  # a run may repeat an evaluation
    ],
)
def test_a_difference_is_named(file, old, new, named, finished):
    expected = kill_drill_runs.result(finished)
    assert kill_drill_runs.differences(finished, expected) == []
    text = (finished / file).read_text()
    assert old in text
    (finished / file).write_text(text.replace(old, new))
    differences = kill_drill_runs.differences(finished, expected)
    expected_texts = [] if named is None else [named]
    assert [text[: len(named or "")] for text in differences] == expected_texts


def test_the_verdict_counts_what_was_lost_and_what_differs():
    good = kill_drill.Outcome("sft_llava", "KILL at random", "", kills=2, ended=True, equal=True)
    other = kill_drill.Outcome("sft_llava", "KILL at random", "", kills=1, ended=True, faults=["other weights"])
    lost = kill_drill.Outcome("sft_llava", "KILL at random", "", kills=1, faults=["not resumable"])
    assert kill_drill.verdict([good, good]) == "all held; 2 runs, 4 kills, 0 lost, 0 different"
    assert kill_drill.verdict([good, other, lost]) == "faults: 2; 3 runs, 4 kills, 1 lost, 1 different"


def test_the_whole_form_kills_often_enough_and_evenly():
    trials = kill_drill.plan(kill_drill.RECIPES, 200, seed=0)
    assert len(trials) >= 200 and len({trial.seed for trial in trials}) == len(trials)
    counts = {}
    for trial in trials:
        counts[trial[:3]] = counts.get(trial[:3], 0) + 1
    assert len(counts) == 45 and set(counts.values()) == {5}
    assert {trial.workers for trial in trials if trial.signal == "INT" and trial.place == "at random"} == {0, 2}
