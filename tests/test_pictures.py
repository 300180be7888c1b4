"""Pictures, read back from their files; and that everything else works where matplotlib is not installed."""
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageColor

import common
import finetune
from conftest import ROOT, TINY, metrics, picture, stage, write_prepared

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


def test_plot_shows_every_series(tmp_path):
    """Two panels side by side, of every kind of series; no colour that was not asked for."""
    line = {"label": "line", "x": [1, 2, 3], "y": [1, 3, 2], "error": [0.5, (0.2, 0.4), None]}
    dashed = {"label": "dashed", "x": [1, 3], "y": [4, 4], "kind": "dashed", "colour": 4}
    points = {"label": "points", "x": [1, 2, 3], "y": [2, 2, 2], "kind": "points", "colour": 3, "marker": 3}
    panels = [{"title": "a", "xlabel": "x", "ylabel": "y", "series": [line, dashed]},
              {"title": "b", "series": [points]}]
    common.draw_plot(tmp_path / "a.png", panels, size=(400, 300))
    image = pixels(tmp_path / "a.png")
    assert image.shape == (600, 1600, 3) and [file.name for file in tmp_path.iterdir()] == ["a.png"]
    left, right = image[:, :800], image[:, 800:]
    assert where(left, 0).sum() > 500 and where(left, 4).sum() > 500
    blended = 0.8 * np.array(ImageColor.getrgb(common.COLOURS[3])) + 0.2 * 255  # points let others shine through
    assert (np.abs(right - blended).max(2) < 2).sum() > 300
    assert not any(where(image, colour).any() for colour in (1, 2, 5)) and not where(right, 0).any()


def test_bars_errors_and_gaps(tmp_path):
    """Bars of 1 and 0.5, and none for None and NaN; whiskers only where an error is known."""
    series = {"label": "model", "kind": "bars", "x": range(4), "y": [1, 0.5, None, float("nan")]}
    names = ["random", "imagenet", "imagenet-dino", "imagenet-dino+dino"]

    def bars(**more):
        panel = {"title": "t", "xnames": names, "ylim": (0, 1), "series": [series | more]}
        common.draw_plot(tmp_path / "a.png", [panel])
        image = pixels(tmp_path / "a.png")
        _, bottom, left, _ = box(where(image, 0))
        axes = image[image.shape[0] // 6:bottom + 1, left:]  # without the legend and the numbers of the axes
        return where(axes, 0), where(axes, ImageColor.getrgb("#444444"))
    blue, grey = bars()
    assert not grey.any()
    top, bottom, _, right = box(blue)
    tall = blue[:, 5].sum()
    assert tall > 400 and tall == bottom - top + 1
    heights = blue.sum(0)
    assert sorted({int(n) for n in heights[heights > 20]}) == pytest.approx([tall / 2, tall], abs=2)
    assert right < blue.shape[1] * 0.5  # nothing over the third and the fourth name

    errors = [(0.4, 0.2), None, 0.1, 0.1]
    blue, grey = bars(error=errors)
    top, bottom, left, right = box(grey)
    tall = blue[:, 5].sum()
    assert right < blue.shape[1] * 0.25 and bottom - top == pytest.approx(0.6 * tall, abs=12)
    assert np.argmax(blue[:, 5]) - top == pytest.approx(0.2 * tall, abs=6)  # (down, up)


def test_line_goes_on_over_gaps(tmp_path):
    """Scores of every second epoch, as of a k-NN that runs now and then, are a line."""
    series = {"label": "k-NN", "x": list(range(20)), "y": [1, None] * 5 + [1, float("nan")] * 5}
    common.draw_plot(tmp_path / "a.png", [{"ylim": (0, 2), "series": [series]}])
    row = where(pixels(tmp_path / "a.png"), 0).sum(1).max()
    assert row > 0.7 * 1280


def test_legend_hides_nothing(tmp_path):
    """A line along the top of the axes is whole under the keys of 12 series, for which the picture grows."""
    names = ["imagenet-dino+dino", "imagenet", "random"] * 4
    others = [{"label": f"ViT, {name}", "x": [0, 1], "y": [0, 0.1 * i], "colour": 1}
              for i, name in enumerate(names[1:])]
    top = {"label": f"CNN, {names[0]}", "x": list(range(40)), "y": [2] * 40, "colour": 0}
    panel = {"title": "a title", "ylim": (0, 2), "series": [top, *others]}
    common.draw_plot(tmp_path / "one.png", [panel | {"series": [top]}])
    common.draw_plot(tmp_path / "all.png", [panel])
    one, every = pixels(tmp_path / "one.png"), pixels(tmp_path / "all.png")
    assert one.shape[:2] == (960, 1280) and every.shape[1] == 1280 and every.shape[0] > 1100
    for image in (one, every):
        row = where(image, 0)[where(image, 0).sum(1).argmax()]
        assert row.sum() > 0.7 * 1280 and row.sum() == np.ptp(np.nonzero(row)) + 1


def test_values_beyond_ylim_are_shown(tmp_path):
    series = {"label": "kappa", "kind": "bars", "x": [0, 1], "y": [-0.5, 0.5]}
    common.draw_plot(tmp_path / "a.png", [{"xnames": ["a", "b"], "ylim": (0, 0.5), "series": [series]}])
    blue = where(pixels(tmp_path / "a.png"), 0).sum(0)
    left, right = blue[np.flatnonzero(blue)[[5, -5]]]  # away from the legend, which is in the middle
    assert left > 200 and left == pytest.approx(right, abs=2)


def test_grid_shows_its_images(tmp_path):
    """Each in its own proportions, twice `side` pixels long, in its row; captions in their colours and columns."""
    rows = [[flat(RED, 50, 100), flat(GREEN, 90, 30)], [np.full((20, 20, 1), 77, np.uint8)]]
    captions = [[("caption " * 9, (200, 0, 200)), ("0123456789" * 4, "#00aaaa")], ["grey"]]
    labels = ["a label of many words that has to be wrapped", "one_name_without_any_blanks_in_it"]
    common.draw_grid(tmp_path / "a.png", rows, captions, labels, side=150, title="the title")
    image = pixels(tmp_path / "a.png")
    red, green, grey = where(image, RED), where(image, GREEN), where(image, (77, 77, 77))
    for mask, height, width in ((red, 150, 300), (green, 300, 100)):
        top, bottom, left, right = box(mask)
        assert (bottom - top + 1, right - left + 1) == (height, width) and mask.sum() == height * width
    assert grey.sum() >= 300 * 300  # and a few pixels at the edge of letters
    assert box(red)[3] < box(green)[2] and box(green)[1] < np.nonzero(grey.sum(1) > 200)[0].min()
    for mask, colour in ((red, (200, 0, 200)), (green, (0, 170, 170))):
        caption = where(image, colour)
        middle = (box(mask)[2] + box(mask)[3]) / 2
        assert caption.sum() > 50 and box(green)[1] < box(caption)[0]
        assert middle - 156 <= box(caption)[2] and box(caption)[3] <= middle + 156
    ink = image.max(2) < 60
    assert ink[:, :box(red)[2] - 12].sum() > 300  # labels
    assert not ink[:, box(red)[2] - 6:box(red)[2]][60:].any()  # do not reach the images


@pytest.mark.parametrize("columns, count", [(1, 1), (4, 8), (9, 2)])
def test_grid_sizes(tmp_path, columns, count):
    common.draw_grid(tmp_path / "a.png", [[flat(RED, 20, 20)] * columns] * count, side=64)
    image = pixels(tmp_path / "a.png")
    assert where(image, RED).sum() == columns * count * 128 ** 2
    assert image.shape[1] == columns * (128 + 12) + 12


@pytest.mark.parametrize("count", [2, 8, 30, 300])
def test_confusion(tmp_path, count):
    """The diagonal is the darkest where all are right; the picture stays of a size that a page can hold."""
    names = [f"{i} $\\frac$, a rather long name of a class with many words" for i in range(count)]
    table = np.diag(np.arange(count) * 10)  # of the first class there are no images
    finetune.draw_confusion(tmp_path / "a.png", table, names)
    image = pixels(tmp_path / "a.png")
    assert 500 < min(image.shape[:2]) and max(image.shape[:2]) < 3200
    dark = where(image, (8, 48, 107))  # the end of the scale "Blues", which all other classes reach
    light = where(image, (247, 251, 255))
    top, bottom, left, right = box(dark | light)
    cell = (bottom - top + 1) / count
    beside = 0.15 if count <= 40 else 0.5  # the number, where there is one
    for i in range(count):
        y, x = round(top + (i + beside) * cell), round(left + (i + beside) * cell)
        assert dark[y, x] == (i > 0) and light[y].sum() > 0.5 * (count - 1) * cell
    assert light.sum() > 0.9 * (1 - 1 / count) * (cell * count) ** 2 - dark.sum() / 2


@pytest.fixture
def no_matplotlib(tmp_path):
    """The environment of a machine without matplotlib."""
    fake = tmp_path / "fake" / "matplotlib"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise ImportError('No module named matplotlib')")
    return {"PYTHONPATH": str(fake.parent)}


def test_training_without_matplotlib(no_matplotlib, tmp_path):
    """A line for each picture that is left out, and all else; report.py then makes its page without figures."""
    rng = np.random.default_rng(0)
    rows, images = [], []
    for i in range(24):
        rows.append({"image": f"{i}.png", "split": ("train", "train", "val", "test")[i // 2 % 4], "height": 40,
                     "width": 40, "label": ("upright", "level")[i % 2]})
        images.append(picture(rng, i % 2, (40, 40))[..., None])
    write_prepared(tmp_path / "data", np.stack(images), rows)
    done = stage("finetune.py", "--data", "data", "--arch", "test_vit", "--epochs", "2", "--batch-size", "4",
                 "--output", "runs/a", *TINY, cwd=tmp_path, env=no_matplotlib)
    for name in ("curves.png", "confusion.png"):
        notes = [line for line in done.stdout.splitlines() if f"{name} is left out" in line]
        assert len(notes) == 1 and "pip install matplotlib" in notes[0]
    assert metrics(tmp_path / "runs" / "a")["best_epoch"] in (1, 2)
    assert (tmp_path / "runs" / "a" / "predictions.csv").exists() and not list(tmp_path.rglob("*.png"))

    done = stage("report.py", "runs", cwd=tmp_path, env=no_matplotlib)
    assert "figure1.png is left out" in done.stdout and "0 of 5 figures" in done.stdout
    assert "test_vit" in (tmp_path / "runs" / "report" / "report.html").read_text()


def test_nothing_imports_matplotlib_before_it_draws(no_matplotlib):
    names = sorted(file.stem for file in ROOT.glob("*.py"))
    assert len(names) == 9
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(names)}"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **no_matplotlib}, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
