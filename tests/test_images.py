"""Images: every mode and orientation, every way to name or embed one, the folders where they are looked for."""

import importlib
import io
import json

import datasets
import pytest
from PIL import Image
from recipes import NAMES, Recipe, flat, same

every_recipe = pytest.mark.parametrize("name", NAMES)
WHITE, GREY, BLACK, RED, BLUE = (255,) * 3, (128,) * 3, (0,) * 3, (255, 0, 0), (0, 0, 255)


def picture(mode, *pixels, **info):
    """An image of one line."""
    image = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    image.info.update(info)
    return image


def palette(**info):
    """An image of one red and one blue pixel, as numbers of colours."""
    image = picture("P", 0, 1, **info)
    image.putpalette([*RED, *BLUE])
    return image


MODES = {  # image, format of its file, pixels
    "1": (picture("1", 0, 255), "png", [BLACK, WHITE]),
    "L": (picture("L", 0, 128), "png", [BLACK, GREY]),
    "LA": (picture("LA", (0, 255), (0, 0), (0, 127)), "png", [BLACK, WHITE, GREY]),
    "P": (palette(), "png", [RED, BLUE]),
    "P transparent": (palette(transparency=1), "png", [RED, WHITE]),
    "P GIF": (palette(transparency=1), "gif", [RED, WHITE]),
    "RGB": (picture("RGB", RED, GREY), "png", [RED, GREY]),
    "RGB transparent": (picture("RGB", RED, BLACK, transparency=BLACK), "png", [RED, WHITE]),
    "RGBA": (picture("RGBA", (*RED, 255), (0, 0, 0, 0)), "png", [RED, WHITE]),
    "CMYK": (picture("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), "tiff", [RED, BLACK]),
    "I;16": (picture("I;16", 0, 128 * 257, 65535), "png", [BLACK, GREY, WHITE]),
    "I;16 of 12 bits": (picture("I;16", 0, 2056, 4095), "png", [BLACK, GREY, WHITE]),
    "I": (picture("I", 0, 128 * 257, 65535), "tiff", [BLACK, GREY, WHITE]),
    "I of 8 bits": (picture("I", 0, 128, 255), "tiff", [BLACK, GREY, WHITE]),
    "I below 0": (picture("I", -128, 0, 127), "tiff", [BLACK, GREY, WHITE]),
    "I darker than 8 bits": (picture("I", 0, 128), "tiff", [BLACK, GREY]),
    "F": (picture("F", 0.0, 128.5, 255.0), "tiff", [BLACK, GREY, WHITE]),
    "F below 0": (picture("F", -128.0, 0.0, 127.0), "tiff", [BLACK, GREY, WHITE]),
    "F to 1": (picture("F", 0.0, 128.5 / 255, 1.0), "tiff", [BLACK, GREY, WHITE]),
}


@every_recipe
@pytest.mark.parametrize("image, kind, expected", MODES.values(), ids=MODES)
def test_every_mode_becomes_rgb_on_white(image, kind, expected, name, tmp_path):
    file = tmp_path / f"x.{kind}"
    image.save(file)
    for cell in (str(file), {"bytes": file.read_bytes()}, image):
        loaded = importlib.import_module(name).load_image(cell)
        assert loaded.mode == "RGB" and loaded.size == image.size
        assert [loaded.getpixel((x, 0)) for x in range(loaded.width)] == expected


@every_recipe
@pytest.mark.parametrize(
    "orientation, size, corner",
    [(1, (2, 3), (0, 0)), (3, (2, 3), (1, 2)), (6, (3, 2), (2, 0)), (8, (3, 2), (0, 1))],
)
def test_images_are_upright(orientation, size, corner, name, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (2, 3), "white")
    image.putpixel((0, 0), RED)
    image.save(tmp_path / "x.png", exif=exif)
    loaded = importlib.import_module(name).load_image(str(tmp_path / "x.png"))
    pixels = {(x, y): loaded.getpixel((x, y)) for x in range(loaded.width) for y in range(loaded.height)}
    assert loaded.size == size and pixels.pop(corner) == RED and set(pixels.values()) == {WHITE}


# --------------------------------------------------------------------------------------------------------------- sizes
SIZES = {  # recipe, fixture of its tiny model, settings, sizes, a size that is refused
    "LLaVA": ("sft_llava", "tiny_llava", {}, [(200, 1), (1, 200), (1, 1), (3, 3)], (1, 201)),
    "two stages": ("llava_two_stage", "tiny_parts", {}, [(200, 1), (1, 200), (1, 1), (3, 3)], (201, 1)),
    "page": ("idefics2_docvqa", "tiny_forms", {}, [(40, 2), (2, 40), (2, 2)], (41, 2)),
    "split page": ("idefics2_docvqa", "tiny_forms", {"image_splitting": True}, [(40, 2), (2, 40), (2, 2)], (1, 2)),
    "DPO": ("dpo_idefics2", "tiny_pairs", {}, [(40, 2), (2, 40), (20, 1), (3, 3), (1, 1)], (2, 41)),
}
SLICED = [(20, 1), (1, 20), (1, 1), (3, 3), (400, 20), (20, 400)]
SIZES |= {
    family: ("finetune_minicpm_lora", fixture, {}, SLICED, (401, 20))
    for family, fixture in (("4.6", "tiny_minicpm"), ("4.7", "tiny_minicpm47"), ("2.6", "tiny_minicpm26"))
}


def colours(batch):
    """The brightest channels of a batch's pictures: a set of r, g, b."""
    pixels = flat(batch)["pixel_values"]
    if isinstance(pixels, list):  # of MiniCPM-V 2.6: of each row a list
        pictures = [picture for row in pixels for picture in row]
    else:
        pictures = pixels.reshape(-1, *pixels.shape[-3:])
    return {"rgb"[picture.flatten(1).mean(1).argmax()] for picture in pictures}


@pytest.mark.parametrize("name, fixture, settings, sizes, refused", SIZES.values(), ids=SIZES)
def test_the_narrowest_and_the_smallest_images_are_processed(
    name, fixture, settings, sizes, refused, request, tmp_path
):
    case = Recipe(name, request.getfixturevalue(fixture), tmp_path)
    collator = case.collator(**settings)
    for size in sizes:
        Image.new("RGB", size, "lime").save(tmp_path / "x.png")
        assert colours(collator([case.row("q", "a", image="x.png")])) == {"g"}, size
    Image.new("RGB", refused, "lime").save(tmp_path / "x.png")
    with pytest.raises(case.module.BadRow, match=f"too (narrow|small): .*{refused[0]} x {refused[1]} pixels"):
        collator([case.row("q", "a", image="x.png")])


# ---------------------------------------------------------------------------------------------- where and in what form
def test_an_image_may_be_a_path_or_embedded(case, images, tmp_path):
    [red] = images(1, (112, 56))
    path, png = str(tmp_path / red), (tmp_path / red).read_bytes()
    cells = [path, png, {"bytes": png}, {"bytes": png, "path": None}, {"bytes": png, "path": "elsewhere.png"}]
    cells += [{"bytes": None, "path": red}, Image.open(io.BytesIO(png))]
    if case.name == "finetune_minicpm_lora":  # here several images are a dict
        cells += [{"<image>": cell} for cell in [red, *cells]]
    else:
        cells += [{"path": red}, *([cell] for cell in [red, *cells])]
    collator = case.collator()
    batch = collator([case.row("q", "a", image=red)])
    assert colours(batch) == {"r"}
    for cell in cells:
        assert same(collator([case.row("q", "a", image=cell)]), batch), str(cell)[:80]


def seen(case, collator, data):
    """The colours of the rows' images, in the order of the rows in their source."""
    rows = sorted(data, key=lambda row: row["row"])
    images = [case.module.pil_images(collator.messages_of(row)) for row in rows]
    return [image.getpixel((0, 0)) for [image] in images]


def test_images_are_looked_for_beside_the_data_or_in_image_folder(case, images, tmp_path):
    images(3)
    lime, flags = (0, 255, 0), {}
    for name, flag in (("red", "dataset_name"), ("blue", "eval_dataset_name")):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.png").rename(tmp_path / name / "x.png.txt")  # read by its content, not by its name
        rows = [case.row("q", "a", image="x.png.txt"), case.row("q", "a", image=str(tmp_path / "lime.png"))]
        flags[flag] = tmp_path / name / "rows.json"
        flags[flag].write_text(json.dumps(rows))
    for folder, first in ((None, RED), (tmp_path / "blue", BLUE)):
        settings = {**flags, "image_folder": folder}
        collator = case.collator(**settings)
        train, evaluated = case.load_data(**settings)
        assert seen(case, collator, train) == [first, lime] and seen(case, collator, evaluated) == [BLUE, lime]


@pytest.mark.parametrize("kind", ["json folder", "saved"])
def test_images_are_looked_for_within_a_folder_of_data(case, kind, images, tmp_path):
    images(1)
    rows, folder = [case.row("q", "a", image="pages/x.png")] * 2, tmp_path / kind
    if kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(folder)
    (folder / "pages").mkdir(parents=True)
    if kind == "json folder":
        (folder / "train.json").write_text(json.dumps(rows))
    (tmp_path / "red.png").rename(folder / "pages" / "x.png")
    train, _ = case.load_data(**{"dataset_name": folder, "image_folder": None, "eval_fraction": 0})
    assert seen(case, case.collator(), train) == [RED, RED]


@pytest.mark.parametrize("kind", ["parquet", "parquet of several", "saved"])
def test_rows_about_one_embedded_image_are_on_one_side(case, kind, tmp_path):
    images = [Image.new("RGB", (28, 28), (n, n, n)) for n in range(8)]
    rows = [case.row(f"q{n}", str(n), image=images[n % 8]) for n in range(24)]
    if kind == "parquet of several":
        as_dict = case.name == "finetune_minicpm_lora"
        rows = [row | {"image": {"<image>": row["image"]} if as_dict else [row["image"]]} for row in rows]
    path, data = tmp_path / f"rows.{kind.split()[0]}", datasets.Dataset.from_list(rows)
    if kind == "saved":
        data.save_to_disk(path)
    else:
        data.to_parquet(path)
    train, held_out = case.load_data(**{"dataset_name": path, "eval_fraction": 0.25})
    sides = [{n % 8 for n in part["row"]} for part in (train, held_out)]
    assert (len(train), len(held_out)) == (18, 6) and not sides[0] & sides[1]
    assert seen(case, case.collator(), train) == [(n % 8,) * 3 for n in sorted(train["row"])]


def test_rows_about_one_embedded_image_in_a_dict_are_on_one_side(tiny_minicpm, tmp_path):
    """As a data set of datasets.Image features has them, by placeholders."""
    case, text = Recipe("finetune_minicpm_lora", tiny_minicpm, tmp_path), datasets.Value("string")
    turns = datasets.List({"role": text, "content": text})
    features = datasets.Features(image={"<image>": datasets.Image()}, conversations=turns)
    images = [Image.new("RGB", (28, 28), (n, n, n)) for n in range(8)]
    rows = [case.row("q", str(n), image={"<image>": images[n % 8]}) for n in range(24)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    train, held_out = case.load_data(**{"dataset_name": tmp_path / "rows.parquet", "eval_fraction": 0.25})
    assert not {n % 8 for n in train["row"]} & {n % 8 for n in held_out["row"]}
