"""tools/plot_run.py: what is drawn is what was logged; what cannot be drawn gets a message."""

import json
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT
from PIL import Image

import sft_llava
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
def write(tmp_path):
    """A function: name and log -> a run's folder."""

    def write(name, log=LOG, file="trainer_state.json"):
        (path := tmp_path / name / file).parent.mkdir(parents=True)
        path.write_text(json.dumps({"log_history": log}))
        return tmp_path / name

    yield write
    plt.close("all")


def lines(axis):
    """{label of a line: its points}."""
    return {line.get_label(): list(zip(line.get_xdata(), line.get_ydata())) for line in axis.lines}


def test_every_metric_has_a_panel_with_what_was_logged(write):
    figure, notes = plot_run.draw({"run": plot_run.read(write("run"))})
    panels = {axis.get_title(): lines(axis) for axis in figure.axes}
    assert list(panels) == ["loss", "learning rate", "grad norm", "anls", "mean token accuracy"] and not notes
    assert panels["loss"] == {"training": [(1, 2.0), (2, 1.5), (3, 1.0)], "held out": [(2, 1.7), (4, 1.2)]}
    assert panels["learning rate"] == {"training": [(1, 1e-4), (2, 9e-5), (3, 8e-5)]}
    assert panels["anls"] == {"held out": [(2, 0.5), (4, 0.7)]}
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["training", "held out"]


def test_several_runs_have_a_colour_each(write):
    logs = {
        name: plot_run.read(write(name, [entry | {"loss": 1.0 + n} if "loss" in entry else entry for entry in LOG]))
        for n, name in enumerate("ab")
    }
    figure, _ = plot_run.draw(logs, ["loss", "eval_anls"])
    loss, anls = figure.axes
    assert (loss.get_title(), anls.get_title()) == ("loss", "anls")
    assert {name: points[0] for name, points in lines(loss).items()} == {
        "a, training": (1, 1.0), "a, held out": (2, 1.7), "b, training": (1, 2.0), "b, held out": (2, 1.7)}  # fmt: skip
    colours = {line.get_label(): line.get_color() for line in loss.lines}
    assert colours["a, training"] == colours["a, held out"] != colours["b, training"] == colours["b, held out"]


def test_a_picture_is_written_where_it_belongs(write, tmp_path, monkeypatch, capsys):
    one, two, other = write("one"), write("two"), write("elsewhere/one")
    monkeypatch.chdir(tmp_path)
    plot_run.main([str(one)])
    plot_run.main([str(one)])  # its own picture is drawn anew
    with Image.open(one / "curves.png") as picture:
        assert picture.format == "PNG" and picture.size[0] > 1400 and len(picture.convert("L").getcolors(1000)) > 20
    plot_run.main([str(one), str(two), "--metrics", "loss"])
    with Image.open(tmp_path / "curves.png") as picture:
        assert 500 < picture.size[0] < 700
    plot_run.main([str(one), str(other), "--output", "both.PNG"])
    with pytest.raises(SystemExit, match="^error: both.PNG exists: choose another --output, or --overwrite it"):
        plot_run.main([str(one), str(other), "--output", "both.PNG"])
    plot_run.main([str(one), str(other), "--output", "both.PNG", "--overwrite"])
    assert capsys.readouterr().out.splitlines()[-1] == "curves: both.PNG"


def test_runs_of_one_name_are_told_apart_by_their_paths(write, monkeypatch):
    one, other, seen = write("one"), write("elsewhere/one"), {}
    stock = plot_run.draw
    monkeypatch.setattr(plot_run, "draw", lambda runs, wanted: stock(seen.update(runs) or runs, wanted))
    plot_run.main([str(one), str(other), "--output", str(one / "both.png")])
    assert list(seen) == [str(one), str(other)]


def test_an_unfinished_run_is_drawn_from_its_newest_checkpoint(write, capsys):
    run = write("run", LOG[:1], "checkpoint-1/trainer_state.json")
    write("run", LOG[:4], "checkpoint-10/trainer_state.json")
    (run / "checkpoint-20").mkdir()  # cut off while it was written
    assert (
        plot_run.read(run)[-1]["step"] == 3 and "is not finished: drawn up to checkpoint-10" in capsys.readouterr().err
    )
    (run / "checkpoint-10/trainer_state.json").write_text('{"log_history": [')
    assert (
        plot_run.read(run)[-1]["step"] == 1
        and "drawn up to checkpoint-1\n" in (said := capsys.readouterr().err)
        and "is damaged" in said
    )


def test_names_of_runs_are_shown_as_they_are(write):
    figure, _ = plot_run.draw({"a$b$c": plot_run.read(write("x")), "_x": plot_run.read(write("y"))}, ["loss"])
    figure.canvas.draw()
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        r"a\$b\$c, training", r"a\$b\$c, held out", " _x, training", " _x, held out"]  # fmt: skip


def test_what_is_no_number_is_said(write):
    log = [entry | ({"loss": float("nan")} if entry["step"] > 1 and "loss" in entry else {}) for entry in LOG]
    figure, notes = plot_run.draw({"run": plot_run.read(write("run", log))}, ["loss"])
    assert notes == ["run: loss is no finite number at 2 of 3 steps, first at 2"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["NOWHERE"], "there is no such folder"),
        (["EMPTY"], "holds no trainer_state.json, nor does a checkpoint in it"),
        (["DAMAGED"], "is damaged (JSONDecodeError"),
        (["OTHER"], "is damaged (KeyError: 'log_history')"),
        (["LIST"], "is damaged (TypeError"),
        (["SILENT"], "nothing was logged but the end of the run: --logging_steps"),
        (["SHORT"], "nothing was logged but the end of the run: --logging_steps"),
        (["HUGE"], "is damaged (OverflowError"),
        (["FILE"], "is a file: needed is the folder of a run"),
        (["RUN", "RUN/."], "is given twice"),
        (
            ["RUN", "--metrics", "loss", "bleu"],
            "--metrics bleu: not logged; there are anls, epoch, grad_norm, learning_rate, loss, ",
        ),
        (["RUN", "--output", "curves.pdf"], "its name must end in .png"),
        (["RUN", "--output", "NOWHERE/x.png"], "cannot be written"),
        (["RUN", "--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_mistakes_get_one_message(write, tmp_path, argv, message):
    run = write("RUN")
    (tmp_path / "EMPTY" / "checkpoint-x").mkdir(parents=True)
    for name, text in (
        ("DAMAGED", '{"log_'),
        ("OTHER", "{}"),
        ("LIST", "[]"),
        ("SILENT", '{"log_history": [{"step": 1, "note": "x"}]}'),
    ):
        (write(name) / "trainer_state.json").write_text(text)
    write("SHORT", LOG[-1:])
    write("HUGE", [{"step": 1, "loss": 10**400}])
    (tmp_path / "FILE").touch()
    with pytest.raises(SystemExit) as e:
        plot_run.main(
            [
                arg
                if arg.startswith("--")
                else arg.replace(arg.split("/")[0], str(tmp_path / arg.split("/")[0]))
                if arg.split("/")[0].isupper()
                else arg
                for arg in argv
            ]
        )
    assert (
        str(e.value.code).startswith("error: ") and message in str(e.value.code) and not (run / "curves.png").exists()
    )


def test_matplotlib_is_asked_for():
    code = "import runpy, sys; sys.modules['matplotlib'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, ROOT / "tools/plot_run.py"], capture_output=True, text=True)
    version = next(
        line for line in (ROOT / "requirements-dev.txt").read_text().split("\n") if line.startswith("matplotlib")
    )
    assert (
        done.returncode == 1 and done.stderr == f"error: tools/plot_run.py needs matplotlib: pip install {version}\n"
    )


def test_a_real_run_from_the_shell(tiny_llava, tmp_path):
    run = tmp_path / "run"
    flags = f"""--use_cpu --model_name_or_path {tiny_llava}/model --dataset_name {tiny_llava}/data --output_dir {run} --max_steps 2 --logging_steps 1
        --eval_steps 1 --save_steps 1 --sample_rows 0 --dataloader_num_workers 0 --per_device_train_batch_size 2 --gradient_accumulation_steps 1"""
    sft_llava.main(flags.split())
    done = subprocess.run(
        [sys.executable, ROOT / "tools/plot_run.py", run], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stdout == f"curves: {run}/curves.png\n", done.stderr
    figure, _ = plot_run.draw({"run": plot_run.read(run)})
    panels = {axis.get_title(): lines(axis) for axis in figure.axes}
    assert {"loss", "learning rate", "grad norm", "mean token accuracy"} <= set(panels)
    assert (
        [step for step, _ in panels["loss"]["training"]] == [step for step, _ in panels["loss"]["held out"]] == [1, 2]
    )
