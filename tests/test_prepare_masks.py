"""prepare.py: which mask belongs to which image, what a mask file says, and what a smaller side leaves of it."""
import json

import numpy as np
import pytest
from PIL import Image

import common
import prepare as script
from conftest import prepare, refused, table

RNG = np.random.default_rng(15)
SIZE = 32
DISC = np.hypot(*np.mgrid[-SIZE // 2:SIZE // 2, -SIZE // 2:SIZE // 2] + 0.5) < 8
LEFT, RIGHT = DISC.copy(), DISC.copy()
LEFT[:, SIZE // 2:] = False
RIGHT[:, :SIZE // 2] = False


def save(path, pixels, **options):
    """An image file of an array, or of an Image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)


def noise(size=(SIZE, SIZE)):
    """Grey pixels, other ones at each call."""
    return RNG.integers(0, 256, size, dtype=np.uint8)


def white(mask):
    """A mask as 0 and 255."""
    return 255 * mask.astype(np.uint8)


def masks_of(folder):
    """{image: its mask} of a prepared folder."""
    masks = np.load(folder / "masks.npy")
    return {row["image"]: mask for row, mask in zip(table(folder / "labels.csv"), masks)}


# ---------------------------------------------------------------- pairs -------------------------------------

@pytest.mark.parametrize("image, mask, labels", [
    ("{split}/{name}/{i}.png", "masks/{split}/{name}/{i}.png", {"a", "b"}),
    ("{split}/{name}/{i}.png", "{split}/masks/{name}/{i}_mask.png", {"a", "b"}),
    ("{split}/images/{name}/{i}.png", "{split}/masks/{name}/{i}.png", {None}),
    ("images/{split}/{name}/{i}.jpg", "masks/{split}/{name}/{i}.png", {None}),
    ("{split}/{name}/images/{i}.png", "{split}/{name}/masks/{i}.png", {"a", "b"}),
    ("{name}/images/{split}{i}.png", "{name}/masks/{split}{i}.png", {"a", "b"}),
    ("Images/{split}{name}{i}.png", "Masks/{split}{name}{i}.png", {None})])
def test_masks_are_paired_by_path_never_by_stem(tmp_path, image, mask, labels):
    """a/0.png and b/0.png each get their own mask, no mask is taken for an image, and a split that is given is kept."""
    drawn = {}
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for name in "ab":
            for i in range(count):
                where = {"split": split, "name": name, "i": i}
                drawn[image.format(**where)] = np.roll(DISC, len(drawn), "ab".index(name))
                save(tmp_path / "source" / image.format(**where), noise())
                save(tmp_path / "source" / mask.format(**where), white(drawn[image.format(**where)]))
    done = prepare("source", "data", cwd=tmp_path)
    ours = masks_of(tmp_path / "data")
    assert ours.keys() == drawn.keys(), done.stdout
    assert all((ours[name] == drawn[name]).all() for name in drawn)
    rows = table(tmp_path / "data" / "labels.csv")
    assert {row.get("label") for row in rows} == labels
    if "{split}/" in image:
        assert all(f"{row['split']}/" in row["image"] for row in rows)


def test_masks_of_a_column(tmp_path):
    """--mask-column: by value, missing ones named; an image with a row a lesion has all its lesions."""
    source = tmp_path / "source"
    lines = ["image,label,outline"]
    for i in range(8):
        save(source / f"{i}.png", noise())
        save(source / "outlines" / f"left{i}.png", white(LEFT))
        save(source / "outlines" / f"right{i}.png", white(RIGHT))
        lines.append(f"{i}.png,{'ab'[i % 2]},outlines/left{i}.png")
    (source / "labels.csv").write_text("\n".join(lines))
    prepare("source", "one", "--mask-column", "outline", cwd=tmp_path)
    assert all((mask == LEFT).all() for mask in masks_of(tmp_path / "one").values())
    lines += [f"{i}.png,{'ab'[i % 2]},outlines/right{i}.png" for i in range(8)]
    (source / "labels.csv").write_text("\n".join(lines))
    prepare("source", "two", "--mask-column", "outline", cwd=tmp_path)
    assert len(masks_of(tmp_path / "two")) == 8
    assert all((mask == DISC).all() for mask in masks_of(tmp_path / "two").values())
    (source / "labels.csv").write_text("\n".join(lines[:8]) + "\n7.png,b,\n")
    done = prepare("source", "x", "--mask-column", "outline", cwd=tmp_path, check=False)
    refused(done, "1 masks are not there", "7.png")
    prepare("source", "x", "--mask-column", "outline", "--skip-broken", cwd=tmp_path)
    left_out = json.loads((tmp_path / "x" / "dataset.json").read_text())["left_out"]
    assert left_out == {"without a mask": ["7.png"]} and len(masks_of(tmp_path / "x")) == 7


def test_images_in_a_folder_called_label_are_no_masks(tmp_path):
    """A table may list images that lie in a folder of one of the names of masks."""
    lines = ["image,label"]
    for i in range(12):
        save(tmp_path / "source" / "label" / f"{i}.png", noise())
        lines.append(f"label/{i}.png,{'ab'[i % 2]}")
    (tmp_path / "source" / "labels.csv").write_text("\n".join(lines))
    done = prepare("source", "data", cwd=tmp_path)
    assert len(table(tmp_path / "data" / "labels.csv")) == 12 and "mask" not in done.stdout
    assert not (tmp_path / "data" / "masks.npy").exists()


# ---------------------------------------------------------------- what a file says --------------------------

def test_empty_masks_stay_empty_whatever_the_mode(tmp_path):
    """Opaque black is no lesion, and transparent nothing is none, in a set whose other masks have one."""
    opaque = np.dstack([np.zeros((SIZE, SIZE, 3), np.uint8), np.full((SIZE, SIZE), 255, np.uint8)])
    lesion = opaque.copy()
    lesion[DISC] = 255
    faint = np.clip(RNG.normal(3, 2, (SIZE, SIZE)), 0, 9).astype(np.uint8)  # what JPEG leaves of black
    kinds = {"grey.png": np.zeros((SIZE, SIZE), np.uint8), "opaque.png": opaque, "clear.png": opaque * 0,
             "white_clear.png": np.dstack([np.full((SIZE, SIZE, 3), 255, np.uint8), np.zeros((SIZE, SIZE), np.uint8)]),
             "noisy.jpg": faint, "bits.png": np.zeros((SIZE, SIZE), bool), "lesion.png": lesion,
             "full.png": opaque | 255}
    for name, pixels in kinds.items():
        stem = name.rsplit(".", 1)[0]
        save(tmp_path / "source" / "images" / f"{stem}.png", noise())
        save(tmp_path / "source" / "masks" / name, pixels)
    done = prepare("source", "data", cwd=tmp_path)
    ours = {name[len("images/"):-len(".png")]: mask for name, mask in masks_of(tmp_path / "data").items()}
    assert (ours.pop("lesion") == DISC).all() and ours.pop("full").all()
    assert {name: int(mask.sum()) for name, mask in ours.items()} == dict.fromkeys(ours, 0)
    assert "6 of 8 masks are empty" in done.stdout and "1 of 8 masks are full" in done.stdout


def test_pages_of_a_mask_are_named(tmp_path):
    for i in range(6):
        save(tmp_path / "source" / "images" / f"{i}.png", noise())
        save(tmp_path / "source" / "masks" / f"{i}.png", white(DISC))
    (tmp_path / "source" / "masks" / "3.png").unlink()
    second = Image.fromarray(white(RIGHT))
    save(tmp_path / "source" / "masks" / "3.tif", white(LEFT), save_all=True, append_images=[second])
    done = prepare("source", "data", cwd=tmp_path)
    assert "images/3.png: mask of 2 pages, the first is used" in done.stdout
    assert (masks_of(tmp_path / "data")["images/3.png"] == LEFT).all()


def test_masks_turn_with_their_images(tmp_path):
    """Both files say by EXIF that they lie on their side."""
    pixels, mask = noise((20, 40)), np.zeros((20, 40), np.uint8)
    mask[:5, 10:] = 255
    turned = Image.Exif()
    turned[0x0112] = 6  # "rotate by 90 degrees to see it upright"
    for i in range(6):
        save(tmp_path / "source" / "images" / f"{i}.png", pixels + np.uint8(i), exif=turned)
        save(tmp_path / "source" / "masks" / f"{i}.png", mask, exif=turned)
    prepare("source", "data", cwd=tmp_path)
    assert {(row["height"], row["width"]) for row in table(tmp_path / "data" / "labels.csv")} == {("40", "20")}
    upright = Image.fromarray(np.rot90(mask > 0, -1).astype(np.uint8)).resize((20, 20), Image.Resampling.BOX)
    ours = masks_of(tmp_path / "data")["images/0.png"]
    assert ours[:, -5:].mean() > 0.7 and (ours != np.asarray(upright)).mean() < 0.06


# ---------------------------------------------------------------- a smaller side ----------------------------

def pieces(mask):
    """The number of connected pieces of a mask (4- and 8-connected alike), by a union of runs of rows."""
    parent = {}

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    before, count = [], 0
    for line in np.pad(mask > 0, ((0, 0), (1, 1))).astype(np.int8):
        edges = np.flatnonzero(np.diff(line))
        runs = []
        for start, end in zip(edges[::2], edges[1::2]):
            parent[count] = count
            runs.append((start, end, count))
            for other_start, other_end, other in before:
                if other_start <= end and start <= other_end:  # corners touch too
                    parent[root(count)] = root(other)
            count += 1
        before = runs
    return len({root(i) for i in parent})


def test_vessels_stay_as_many_and_where_they_are():
    """Six curves of one pixel's width across 1,280 pixels are six at side 256, in every pixel that they go through and in
    no other one; by the nearest pixel they would be hundreds of pieces."""
    x = np.arange(0, 1280, 0.25)
    mask = np.zeros((1280, 1280), np.uint8)
    for k in range(6):
        y = 120 + 200 * k + 60 * np.sin(x / (40 + 25 * k))
        mask[y.astype(int), x.astype(int)] = 1
    small = script.reduce_mask(mask, 256, "squash", 2, None)
    nearest = np.asarray(Image.fromarray(mask).resize((256, 256), Image.Resampling.NEAREST))
    assert pieces(mask) == pieces(small) == 6 and pieces(nearest) > 100
    assert (small == mask.reshape(256, 5, 256, 5).max((1, 3))).all()


def test_an_ignored_value_is_reduced_too():
    """255 keeps its place, takes nothing of a lesion beside it, and is not spread as thin foreground is."""
    mask = np.zeros((800, 800), np.uint8)
    mask[:400] = 255
    mask[500:700, 100:300] = 1
    mask[600, 400:] = 255  # a line of one pixel
    small = script.reduce_mask(mask, 200, "squash", 2, 255)
    assert (small[:100] == 255).all() and (small[125:175, 25:75] == 1).all()
    assert (small[100:] == 255).sum() == 0 and (small == 1).sum() == 50 * 50


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
def test_enlarged_masks_go_back_to_what_they_were(fit):
    """At a side above the image's own size nothing is lost: back in the image's shape it is the mask again."""
    mask = np.zeros((30, 45), np.uint8)
    mask[5:20, 12:30] = 1
    mask[22, 10:35] = 1
    large = script.reduce_mask(mask, 180, fit, 2, None)
    assert (common.from_square(large, 30, 45, fit, Image.Resampling.NEAREST) == mask).all()
