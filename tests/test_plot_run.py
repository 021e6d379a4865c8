"""tools/plot_run.py: what is drawn is what was logged; what cannot be drawn gets a message."""

import json
import math
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT, log
from PIL import Image
from recipes import Recipe

from tools import plot_run

LOG = [
    {"epoch": 0.1, "step": 1, "loss": 2.0, "grad_norm": 3.0, "learning_rate": 1e-4, "mean_token_accuracy": 0.2},
    {"epoch": 0.2, "step": 2, "loss": 1.5, "grad_norm": 2.0, "learning_rate": 9e-5, "mean_token_accuracy": 0.4},
    {"epoch": 0.2, "step": 2, "eval_loss": 1.7, "eval_anls": 0.5, "eval_runtime": 3.1, "eval_samples_per_second": 7.0},
    {"epoch": 0.3, "step": 3, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 8e-5, "mean_token_accuracy": 0.6},
    {"epoch": 0.4, "step": 4, "eval_loss": 1.2, "eval_anls": 0.7, "eval_runtime": 3.2, "eval_samples_per_second": 7.1},
    {"epoch": 0.4, "step": 4, "train_runtime": 60.0, "train_loss": 1.5, "total_flos": 1e9},
]


@pytest.fixture
def finished(tmp_path):
    """A function: name and log -> a run's folder."""

    def make(name, entries=LOG, file="trainer_state.json"):
        path = tmp_path / name / file
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"log_history": entries}))
        return tmp_path / name

    yield make
    plt.close("all")


def curves(axis):
    """{label of a line: its points}."""
    return {line.get_label(): list(zip(line.get_xdata(), line.get_ydata())) for line in axis.lines}


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_every_metric_has_a_panel_with_what_was_logged(finished):
    figure, notes = plot_run.draw({"run": plot_run.read(finished("run"))})
    panels = {axis.get_title(): curves(axis) for axis in figure.axes}
    assert list(panels) == ["loss", "learning rate", "grad norm", "anls", "mean token accuracy"] and not notes
    assert panels["loss"] == {"training": [(1, 2.0), (2, 1.5), (3, 1.0)], "held out": [(2, 1.7), (4, 1.2)]}
    assert panels["learning rate"] == {"training": [(1, 1e-4), (2, 9e-5), (3, 8e-5)]}
    assert panels["anls"] == {"held out": [(2, 0.5), (4, 0.7)]}
    assert legend(figure.axes[0]) == ["training", "held out"]


def test_several_runs_have_a_colour_each(finished):
    logs = {"a": plot_run.read(finished("a"))}
    logs["b"] = [{**entry, "loss": 5.0} if "loss" in entry else entry for entry in logs["a"]]
    figure, _ = plot_run.draw(logs, ["loss", "eval_anls"])
    loss, anls = figure.axes
    assert (loss.get_title(), anls.get_title()) == ("loss", "anls")
    first = {label: points[0] for label, points in curves(loss).items()}
    assert first["a, training"] == (1, 2.0) and first["b, training"] == (1, 5.0)
    assert first["a, held out"] == first["b, held out"] == (2, 1.7)
    colours = {line.get_label(): line.get_color() for line in loss.lines}
    assert colours["a, training"] == colours["a, held out"] != colours["b, training"] == colours["b, held out"]


def test_a_picture_is_written_where_it_belongs(finished, tmp_path, monkeypatch, capsys):
    one, two = finished("one"), finished("two")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # its own picture is drawn anew
        plot_run.main([str(one), "--metrics", "loss", "anls"])
    with Image.open(one / "curves.png") as picture:
        assert picture.format == "PNG" and picture.size[0] > 1000 and len(picture.convert("L").getcolors(1000)) > 20
    plot_run.main([str(one), str(two), "--metrics", "loss"])
    with Image.open(tmp_path / "curves.png") as picture:
        assert 500 < picture.size[0] < 700
    own = [str(one), "--metrics", "loss", "--output", "own.PNG"]
    plot_run.main(own)
    with pytest.raises(SystemExit, match="^error: own.PNG exists: choose another --output, or --overwrite it"):
        plot_run.main(own)
    plot_run.main([*own, "--overwrite"])
    assert capsys.readouterr().out.splitlines()[-1] == "curves: own.PNG"


def test_runs_of_one_name_are_told_apart_by_their_paths(finished):
    one, other, third = finished("one"), finished("elsewhere/one"), finished("third")
    assert plot_run.parse([str(one), str(other), str(third)]).labels == [str(one), str(other), "third"]


def test_an_unfinished_run_is_drawn_from_its_newest_checkpoint(finished, capsys):
    run = finished("run", LOG[:1], "checkpoint-1/trainer_state.json")
    finished("run", LOG[:4], "checkpoint-10/trainer_state.json")
    (run / "checkpoint-20").mkdir()  # cut off while it was written
    assert plot_run.read(run)[-1]["step"] == 3
    assert "is not finished: drawn up to checkpoint-10" in capsys.readouterr().err
    (run / "checkpoint-10/trainer_state.json").write_text('{"log_history": [')
    assert plot_run.read(run)[-1]["step"] == 1
    notes = capsys.readouterr().err
    assert "drawn up to checkpoint-1\n" in notes and "is damaged" in notes


def test_names_of_runs_are_shown_as_they_are(finished):
    """$ would begin a formula, and what begins with _ be left out."""
    entries = plot_run.read(finished("run"))
    figure, _ = plot_run.draw({"a$b$c": entries, "_x": entries}, ["anls"])
    figure.canvas.draw()
    assert legend(figure.axes[0]) == [r"a\$b\$c, held out", " _x, held out"]


def test_what_is_no_number_is_said():
    entries = [{"step": step, "loss": 1.0 if step == 1 else math.nan} for step in (1, 2, 3)]
    assert plot_run.draw({"run": entries})[1] == ["run: loss is no finite number at 2 of 3 steps, first at 2"]


STATES = {  # what stands in a run's trainer_state.json
    "DAMAGED": '{"log_',
    "OTHER": "{}",
    "LIST": "[]",
    "SILENT": '{"log_history": [{"step": 1, "note": "x"}]}',
    "SHORT": json.dumps({"log_history": LOG[-1:]}),
    "HUGE": json.dumps({"log_history": [{"step": 1, "loss": 10**400}]}),
}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["NOWHERE"], "there is no such folder"),
        (["EMPTY"], "holds no trainer_state.json, nor does a checkpoint in it"),
        (["DAMAGED"], r"is damaged \(JSONDecodeError"),
        (["OTHER"], r"is damaged \(KeyError: 'log_history'"),
        (["LIST"], r"is damaged \(TypeError"),
        (["SILENT"], "nothing was logged but the end of the run: --logging_steps"),
        (["SHORT"], "nothing was logged but the end of the run: --logging_steps"),
        (["HUGE"], r"is damaged \(OverflowError"),
        (["FILE"], "is a file: needed is the folder of a run"),
        (["RUN", "./RUN"], "is given twice"),
        (["RUN", "--metrics", "loss", "bleu"], "--metrics bleu: not logged; there are anls, epoch, grad_norm, "),
        (["RUN", "--output", "curves.pdf"], "its name must end in .png"),
        (["RUN", "--metrics", "anls", "--output", "NOWHERE/x.png"], "cannot be written"),
        (["RUN", "--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_mistakes_get_one_message(finished, tmp_path, monkeypatch, argv, message):
    run = finished("RUN")
    (tmp_path / "EMPTY" / "checkpoint-x").mkdir(parents=True)
    (tmp_path / "FILE").touch()
    for name, text in STATES.items():
        (finished(name) / "trainer_state.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        plot_run.main(argv)
    assert not (run / "curves.png").exists()


def test_matplotlib_is_asked_for():
    code = "import runpy, sys; sys.modules['matplotlib'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, ROOT / "tools/plot_run.py"], capture_output=True, text=True)
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    version = next(line for line in lines if line.startswith("matplotlib"))
    assert done.returncode == 1
    assert done.stderr == f"error: tools/plot_run.py needs matplotlib: pip install {version}\n"


def test_a_real_run_from_the_shell(tiny_llava, tmp_path):
    case = Recipe("sft_llava", tiny_llava, tmp_path)
    settings = {"max_steps": 2, "logging_steps": 1, "eval_steps": 1, "save_steps": 1, "sample_rows": 0}
    case.run(**settings, per_device_train_batch_size=2, gradient_accumulation_steps=1, max_eval_rows=2)
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "tools/plot_run.py", out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == f"curves: {out}/curves.png\n", done.stderr
    figure, _ = plot_run.draw({"run": plot_run.read(out)})
    panels = {axis.get_title(): curves(axis) for axis in figure.axes}
    assert {"loss", "learning rate", "grad norm", "mean token accuracy"} <= set(panels)
    assert panels["loss"] == {"training": [*log(out).items()], "held out": [*log(out, "eval_loss").items()]}
    assert [step for step, _ in panels["loss"]["training"]] == [1, 2]
