"""Pictures, read back from their files; and that everything else works where matplotlib is not installed."""
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageColor

import common
import finetune
import report
from conftest import ROOT, TINY, WITHOUT_MATPLOTLIB, metrics, picture, stage, write_prepared

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def pixels(file):
    """A picture as (H, W, 3) int."""
    with Image.open(file) as image:
        return np.array(image.convert("RGB")).astype(int)


def where(image, colour):
    """(H, W) bool: the pixels of just this colour, an index into COLOURS or (red, green, blue)."""
    return (image == np.array(ImageColor.getrgb(common.COLOURS[colour]) if isinstance(colour, int) else colour)).all(2)


def box(mask):
    """(top, bottom, left, right) of what is true in a mask, the ends included."""
    y, x = np.nonzero(mask)
    return y.min(), y.max(), x.min(), x.max()


def flat(colour, height, width):
    """An image of one colour."""
    return np.full((height, width, 3), colour, np.uint8)


def test_curves_show_every_line(tmp_path):
    """Two panels side by side; no colour that was not asked for; a line goes on over what is not a number."""
    x = list(range(20))
    gaps = [1, float("nan")] * 10
    panels = [("a", "nats", {"one": (x, gaps), "two": (x, [3] * 20)}), ("b", "share", {"one": ([1, 2], [1, 2])})]
    common.draw_curves(tmp_path / "a.png", "epoch", panels)
    image = pixels(tmp_path / "a.png")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"] and image.shape[1] > 2 * image.shape[0]
    half = image.shape[1] // 2
    left, right = image[:, :half], image[:, half:]
    assert where(left, 1).sum() > 500 and where(right, 0).sum() > 500 and not where(right, 1).any()
    assert not any(where(image, colour).any() for colour in (2, 3, 4, 5))


def cells_of(scores, kind="finetune", interval=None):
    """Cells of report.py out of scores {(arch, init): [score of each seed]}."""
    cells = []
    for (arch, init), values in scores.items():
        runs = [{"metric": "accuracy", "parameters": 10 ** 7 * len(arch), "arguments": {}, "seed": seed,
                 "test": {"accuracy": value, "interval": interval}}
                for seed, value in enumerate(values)]
        cells.append(report.Cell("made", "abc", 32, "accuracy", kind, arch, init, runs))
    return cells


def test_bars_and_their_errors(tmp_path):
    """Bars of 0.8 and 0.4, none where a run is missing or its score is not defined; whiskers where there are seeds."""
    cells = cells_of({("resnet18", "random"): [0.8], ("resnet18", "imagenet"): [0.4], ("deit", "random"): [None]})
    report.draw_bars(tmp_path / "a.png", cells)
    image = pixels(tmp_path / "a.png")
    blue = where(image, 0)[image.shape[0] // 6:].sum(0)  # of each column, without the legend
    tall = int(np.median(blue[blue > 0.9 * blue.max()]))
    heights = blue[blue > 0.4 * blue.max()]
    high = heights > 0.75 * tall
    assert 0 < high.sum() < len(heights) and np.abs(heights - np.where(high, tall, tall / 2)).max() <= 3
    grey = ImageColor.getrgb("#444444")
    cells = cells_of({("resnet18", "random"): [0.7, 0.8, 0.9]})
    report.draw_bars(tmp_path / "b.png", cells)
    image = pixels(tmp_path / "b.png")
    top, bottom, left, right = box(where(image, 0)[image.shape[0] // 6:, :])
    whisker = where(image, grey)[:, (left + right) // 2 - 3:(left + right) // 2 + 4].any(1)
    assert whisker.sum() == pytest.approx(2 * (bottom - top + 1) * 0.1 / 0.8, abs=8)  # one standard deviation each way


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_capacity_has_plain_ticks(tmp_path, suffix):
    cells = cells_of({("resnet18", "random"): [0.6], ("resnet152", "random"): [0.7], ("deit_t", "random"): [0.5]})
    report.draw_capacity(tmp_path / f"a.{suffix}", cells)
    content = (tmp_path / f"a.{suffix}").read_bytes()
    assert content.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix])
    if suffix == "svg":  # names of glyphs in comments
        text = content.decode()
        assert all(f"<!-- {tick} -->" in text for tick in ("60", "80", "90")) and "10^" not in text


def test_grid_shows_its_images(tmp_path):
    """Each in its own proportions, in its row and column, with captions in their colours and outlines over it."""
    rows = [[flat(RED, 50, 100), flat(GREEN, 90, 30)], [np.full((20, 20, 1), 77, np.uint8)]]
    captions = [[("caption", (0.8, 0, 0.8)), ("0123456789", "#00aaaa")], ["grey"]]
    mask = np.zeros((20, 20), bool)
    mask[5:15, 5:15] = True
    outlines = [[[], []], [[(mask, "#0000ff"), (~mask & False, "#ff00ff")]]]
    common.draw_grid(tmp_path / "a.png", rows, captions, ["first", "second"], "the title", outlines)
    image = pixels(tmp_path / "a.png")
    red, green, grey, blue = (where(image, colour) for colour in (RED, GREEN, (77, 77, 77), BLUE))
    grey &= (grey.sum(1, keepdims=True) > 50) & (grey.sum(0, keepdims=True) > 50)  # not the edges of letters
    for pure, proportion in ((red, 2), (green, 1 / 3)):
        top, bottom, left, right = box(pure)
        assert (right - left + 1) / (bottom - top + 1) == pytest.approx(proportion, rel=0.04)
        assert pure.sum() > 0.95 * (right - left) * (bottom - top)
    assert box(red)[3] < box(green)[2] and max(box(red)[1], box(green)[1]) < box(grey)[0]
    for pure, colour in ((red, (204, 0, 204)), (green, (0, 170, 170))):
        caption = where(image, colour)
        assert caption.sum() > 20 and box(pure)[1] < box(caption)[0]
        assert abs(box(caption)[2] + box(caption)[3] - box(pure)[2] - box(pure)[3]) < 40
    top, bottom, left, right = box(blue)
    assert (bottom - top) / (box(grey)[1] - box(grey)[0]) == pytest.approx(0.5, abs=0.04)
    assert blue.sum() < 0.2 * (bottom - top) * (right - left)  # an outline, not an area
    ink = image.max(2) < 60
    assert ink[:, :box(grey)[2]].sum() > 100  # labels


@pytest.mark.parametrize("columns, count", [(1, 1), (4, 8), (9, 2)])
def test_grid_sizes(tmp_path, columns, count):
    common.draw_grid(tmp_path / "a.png", [[flat(RED, 20, 20)] * columns] * count)
    image = pixels(tmp_path / "a.png")
    red = where(image, RED)
    assert red.sum() > 0.5 * columns * count * 200 ** 2 and max(image.shape) < 3200
    assert (np.diff(red[np.argmax(red.sum(1))].astype(int)) == 1).sum() == columns


@pytest.mark.parametrize("count", [2, 8, 30, 300])
def test_confusion(tmp_path, count):
    """The diagonal is the darkest where all are right; the picture stays of a size that a page can hold."""
    names = [f"{i} $\\frac$, a rather long name of a class with many words" for i in range(count)]
    table = np.diag(np.arange(count) * 10)  # of the first class there are no images
    finetune.draw_confusion(tmp_path / "a.png", table, names)
    image = pixels(tmp_path / "a.png")
    assert 500 < min(image.shape[:2]) and max(image.shape[:2]) < 4000
    dark = where(image, (8, 48, 107))  # the end of the scale "Blues", which all other classes reach
    light = where(image, (247, 251, 255))
    top, bottom, left, right = box(dark | light)
    cell = (bottom - top + 1) / count
    beside = 0.12 if count <= 40 else 0.5  # the number, where there is one
    for i in range(count):
        y, x = round(top + (i + beside) * cell), round(left + (i + beside) * cell)
        assert dark[y, x] == (i > 0) and light[y].sum() > 0.5 * (count - 1) * cell
    assert light.sum() > 0.9 * (1 - 1 / count) * (cell * count) ** 2 - dark.sum() / 2


def test_training_without_matplotlib(tmp_path):
    """A line for each picture that is left out, and all else; report.py then makes its page without figures."""
    rng = np.random.default_rng(0)
    rows, images = [], []
    for i in range(24):
        rows.append({"image": f"{i}.png", "split": ("train", "train", "val", "test")[i // 2 % 4], "height": 40,
                     "width": 40, "label": ("upright", "level")[i % 2]})
        images.append(picture(rng, i % 2, (40, 40))[..., None])
    write_prepared(tmp_path / "data", np.stack(images), rows)
    done = stage("finetune.py", "--data", "data", "--arch", "test_vit", "--epochs", "2", "--batch-size", "4",
                 "--output", "runs/a", *TINY, cwd=tmp_path, first=WITHOUT_MATPLOTLIB)
    for name in ("curves.png", "confusion.png"):
        notes = [line for line in done.stdout.splitlines() if f"{name} is left out" in line]
        assert len(notes) == 1 and "pip install matplotlib" in notes[0]
    assert metrics(tmp_path / "runs" / "a")["best_epoch"] in (1, 2)
    assert (tmp_path / "runs" / "a" / "predictions.csv").exists() and not list(tmp_path.rglob("*.png"))

    done = stage("report.py", "runs", cwd=tmp_path, first=WITHOUT_MATPLOTLIB)
    assert "figure1.png is left out" in done.stdout and "0 of 6 figures" in done.stdout
    assert "test_vit" in (tmp_path / "runs" / "report" / "report.html").read_text()


def test_nothing_imports_matplotlib_before_it_draws():
    names = sorted(file.stem for file in ROOT.glob("*.py"))
    assert len(names) == 10
    code = f"{WITHOUT_MATPLOTLIB}; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(names)}"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
