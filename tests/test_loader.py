"""benchmarks/loader.py: what it feeds to the collators, how it counts, what it reports and refuses."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import loader  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*(pin_memory|This DataLoader will create).*")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch):
    """main() sets another cache for the data sets, in a folder that is gone afterwards."""
    monkeypatch.setattr(loader.datasets.config, "HF_DATASETS_CACHE", loader.datasets.config.HF_DATASETS_CACHE)


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    """A function: recipe -> its Loaders over 6 rows with real image sizes."""
    folder, made = tmp_path_factory.mktemp("loaders"), {}
    images = [f"{n}.jpg" for n in range(6)]
    for n, name in enumerate(images):
        loader.picture(n, loader.SIZE).save(folder / name, quality=90)

    def make(name):
        if name not in made:
            made[name] = loader.Loaders(name, SimpleNamespace(rows=6, batch_size=3, tiny=False), folder, images)
        return made[name]

    return make


def test_reports_rates_and_padding_of_all_recipes(tmp_path, capsys):
    argv = [
        "--tiny",
        "--rows",
        "5",
        "--workers",
        "0",
        "1",
        "--batch_size",
        "2",
        "--json",
        str(tmp_path / "loader.json"),
    ]
    assert loader.main(argv) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "loader.json").read_text())
    assert (
        found["cores"] == len(os.sched_getaffinity(0))
        and f"{found['cores']} CPU cores" in printed
        and loader.SMALL in printed
    )
    assert list(found["recipes"]) == list(loader.RECIPES)
    for name, one in found["recipes"].items():
        assert set(one["rows_per_second"]) == ({"recipe"} if name == "finetune_minicpm_lora" else {"recipe", "trl"})
        assert all(set(rates) == {"0", "1"} and min(rates.values()) > 0 for rates in one["rows_per_second"].values())
        assert set(one["cpu_ms_a_row"]) == set(one["rows_per_second"]) and min(one["cpu_ms_a_row"].values()) > 0
        assert len(one["lengths"]) == 5 and set(one["padding"]) == {"2", "4", "8"}
        for orders in one["padding"].values():
            assert set(orders) == {"random", "steps by length", "group_by_length"}
            assert all(
                0 <= order["share"] < 0.5 and order["tokens"] > min(one["lengths"]) for order in orders.values()
            )
        assert (
            f"\n{name}: rows of {min(one['lengths'])}-{max(one['lengths'])} tokens, steps of {one['step']}\n"
            in printed
        )
    assert {name: one["step"] for name, one in found["recipes"].items()} == {
        "sft_llava": 4, "llava_two_stage": 128, "dpo_idefics2": 64, "idefics2_docvqa": 16, "finetune_minicpm_lora": 8}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- what is fed
IMAGES = {  # of a batch of three 1000 x 800 pictures: shape of pixel_values, image tokens of a row
    "sft_llava": ((3, 3, 336, 336), 576),
    "llava_two_stage": ((3, 3, 336, 336), 576),
    "dpo_idefics2": ((6, 1, 3, 392, 490), 64),
    "idefics2_docvqa": ((3, 1, 3, 784, 980), 64),
    "finetune_minicpm_lora": (None, 5 * 64),  # the whole and 2 x 2 slices, of some 448 x 448 pixels
}


@pytest.mark.parametrize("name", IMAGES)
def test_the_recipe_sees_images_at_their_real_size_and_texts_of_the_stated_length(loaders, name):
    one, (shape, tokens) = loaders(name), IMAGES[name]
    batches = list(one.loader("recipe", 0))
    assert len(batches) == 2 and one.loader("recipe", 2).num_workers == 2
    bounds = loader.RECIPES[name][2]
    for batch in batches:
        pixels, ids = batch["pixel_values"], batch["input_ids"]
        assert shape is None or pixels.shape == shape
        assert shape is not None or pixels.shape[-1] == pytest.approx(3 * 5 * 448 * 448 / 14, rel=0.1)
        assert set((ids == one.processor.image_token_id).sum(1).tolist()) == {tokens} or shape is None
        learnt = batch["completion_mask"].sum(1) if "completion_mask" in batch else (batch["labels"] != -100).sum(1)
        assert all(bounds[0] - 3 <= count <= bounds[1] + 3 for count in learnt.tolist())


@pytest.mark.parametrize("name", [name for name, recipe in loader.RECIPES.items() if recipe[3]])
def test_trl_gets_the_same_rows(loaders, name):
    """The same pictures, to the last pixel, and the same words but for BOS, EOS and what the recipe says besides."""
    one, words = loaders(name), []
    for mine, other in zip(one.loader("recipe", 0), one.loader("trl", 0), strict=True):
        assert torch.equal(mine["pixel_values"], other["pixel_values"])
        said = [
            [one.processor.tokenizer.decode(ids, skip_special_tokens=True).split() for ids in side["input_ids"]]
            for side in (mine, other)
        ]
        words += zip(*said, strict=True)
    for mine, other in words:
        mine, other = ([word for word in side if word.strip("?.") in loader.WORDS] for side in (mine, other))
        assert mine == other and len(mine) > (5 if name == "idefics2_docvqa" else 15)


def test_all_workers_together_read_each_row_once(loaders):
    shown = [[batch["labels"] for batch in loaders("idefics2_docvqa").loader("recipe", workers)] for workers in (0, 2)]
    assert len(shown[0]) == 2 and all(torch.equal(*pair) for pair in zip(*shown, strict=True))


# ------------------------------------------------------------------------------------------------------ how it counts
def test_padding_by_hand():
    assert loader.padded([0, 1, 2, 3], [10, 4, 7, 7], 2) == (6, 34)
    assert loader.padded([0, 2, 3, 1], [10, 4, 7, 7], 2) == (6, 34)
    assert loader.padded([2, 3, 0, 1], [10, 4, 7, 7], 4) == (12, 40)
    assert loader.padded([1, 0, 2], [3, 5, 1], 2) == (2, 11)  # the last batch is smaller


@pytest.mark.parametrize("name", loader.RECIPES)
def test_steps_by_length_pad_less_and_sorting_everything_least(loaders, name):
    module = loader.importlib.import_module(name)
    found = loader.padding(module, list(range(100, 200)), 16)
    for orders in found.values():
        share = {order: one["share"] for order, one in orders.items()}
        assert share["group_by_length"] <= share["steps by length"] <= share["random"]
        has_own_order = name == "llava_two_stage"  # the others take the Trainer's
        assert (share["steps by length"] < share["random"]) == has_own_order
        real = orders["random"]["tokens"] * (1 - share["random"])
        for one in orders.values():
            assert one["tokens"] * (1 - one["share"]) == pytest.approx(real)  # the rows are the same
    shares = [found[batch]["steps by length"]["share"] for batch in loader.BATCHES]
    assert shares == sorted(shares)
    one_batch = loader.padding(module, list(range(100, 200)), 4)
    assert (
        one_batch[8]["steps by length"] == one_batch[8]["random"]
        and one_batch[4]["steps by length"] == one_batch[4]["random"]
    )


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "argv, words",
    [
        (["llava"], "no recipe llava; there are sft_llava, llava_two_stage"),
        (["sft_llava", "--workers", "2", "-1"], "--workers: 0 or more"),
        (["--rows", "0"], "--rows, --batch_size, --rounds: at least 1"),
        (["--batch_size", "0"], "at least 1"),
        (["--json", "nowhere/loader.json"], "--json nowhere/loader.json cannot be written: No such file"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_a_bad_flag_is_one_message(argv, words):
    with pytest.raises(SystemExit) as stop:
        loader.main(argv)
    assert words in stop.value.code and stop.value.code.count("error:") == 1 and "\n" not in stop.value.code


def test_a_recipes_file_may_be_named():
    assert loader.arguments(["sft_llava.py", "dpo_idefics2"]).recipes == ["sft_llava", "dpo_idefics2"]
    assert loader.arguments([]).recipes == list(loader.RECIPES) and loader.arguments([]).workers == [0, 2, 4]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("DataLoader worker is killed; insufficient shared memory (shm)"),
    ],
)
def test_no_scratch_space_is_one_message(monkeypatch, error):
    def full(*args):
        raise error

    monkeypatch.setattr(loader, "picture", full)
    with pytest.raises(
        SystemExit, match="^error: no scratch space: .*(No space left|shm).*; give TMPDIR a folder with 26 MB free"
    ):
        loader.main(["sft_llava"])
    monkeypatch.setattr(loader.tempfile, "TemporaryDirectory", full)
    with pytest.raises(SystemExit, match="^error: no scratch space"):
        loader.main(["sft_llava"])


def test_another_error_is_not_taken_for_it(monkeypatch):
    def broken(*args):
        raise RuntimeError("shapes")

    monkeypatch.setattr(loader, "picture", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        loader.main(["sft_llava"])
