"""Index, decoding, cache, leakage, demo."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import ROOT, TINY, picture, stage, table


def arguments(**changes):
    """Parsed defaults of the shared arguments, with changes."""
    parser, _ = common.make_parser("test")
    args = parser.parse_args([])
    vars(args).update({"image_size": 32, "resize": 36, "workers": 0, **changes})
    return args


def test_16_bit_greys_keep_their_range(tmp_path):
    ramp = np.linspace(1000, 60000, 64 * 64).reshape(64, 64)
    for name, values in (("a.png", ramp.astype(np.uint16)), ("b.tif", ramp.astype(np.float32)),
                         ("c.tif", ramp.astype(np.int32))):
        Image.fromarray(values).save(tmp_path / name)
        pixels = common.open_image(str(tmp_path / name))
        assert pixels.shape == (64, 64, 1) and pixels.dtype == np.uint8
        assert np.abs(pixels[..., 0] - np.linspace(0, 255, 64 * 64).reshape(64, 64)).max() <= 0.51, name
    Image.fromarray(np.full((4, 4), 700, np.uint16)).save(tmp_path / "flat.png")
    assert (common.open_image(str(tmp_path / "flat.png")) == 0).all()


def test_modes_and_rotation(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image, grey = Image.fromarray(colour), Image.fromarray(colour[..., 0])
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    grey.save(tmp_path / "grey.png")
    Image.merge("RGB", [grey] * 3).save(tmp_path / "grey3.png")
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.fromarray(np.repeat([[0, 255]], 20, 0).repeat(15, 1).astype(np.uint8)))
    alpha.save(tmp_path / "alpha.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # "rotate by 90 degrees to see it upright"
    image.save(tmp_path / "turned.png", exif=turned)
    read = lambda name: common.open_image(str(tmp_path / name))  # noqa: E731
    assert read("palette.png").shape == (20, 30, 3)
    assert np.abs(read("palette.png").astype(int) - colour).mean() < 30
    assert np.abs(read("cmyk.tif").astype(int) - colour).max() <= 2
    assert (read("grey.png")[..., 0] == colour[..., 0]).all() and read("grey3.png").shape == (20, 30, 1)
    assert (read("alpha.png")[:, :15] == 0).all() and (read("alpha.png")[:, 15:] == colour[:, 15:]).all()
    assert (read("turned.png") == np.rot90(colour, -1)).all()


def test_resize_keeps_the_aspect():
    pixels = np.zeros((100, 250, 1), np.uint8)
    assert common.resize_short_side(pixels, 40).shape == (40, 100, 1)
    assert common.resize_short_side(pixels[:30, :20].repeat(3, 2), 40).shape == (60, 40, 3)


def test_cache_holds_every_image_and_is_reused(folder_data, tmp_path):
    args = arguments(dataset="folder", data_dir=str(folder_data), cache_dir=str(tmp_path / "cache"),
                     workers=2)
    first = common.load_dataset(args)
    for split in first.splits.values():
        for path, row in zip(split.paths, split.rows):
            expected = common.resize_short_side(common.open_image(path), args.resize)
            assert (first.store.image(row) == expected).all()
    pixels = first.store.folder / "pixels.bin"
    before = pixels.stat().st_mtime_ns
    common.load_dataset(args)
    assert pixels.stat().st_mtime_ns == before and len(list((tmp_path / "cache").glob("data-*"))) == 1
    image = sorted((folder_data / "test" / "level").iterdir())[0]
    Image.fromarray(picture(np.random.default_rng(9), 0)).save(image)  # a changed file is another cache
    common.load_dataset(args)
    assert len(list((tmp_path / "cache").glob("data-*"))) == 2


def test_killed_cache_build_is_not_taken_for_whole(tmp_path):
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(40):
            noise = Image.fromarray(rng.integers(0, 256, (600, 600), dtype=np.uint8))
            noise.save(tmp_path / "data" / name / f"{i}.png")
    command = [sys.executable, ROOT / "knn_eval.py", "--dataset", "folder", "--data-dir", "data",
               "--arch", "test_vit", "--output", "run", "--resize", "512", *TINY]
    process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "cache").glob("*.partial/pixels.bin")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock" and p.suffix != ".partial"]
    stage(*[str(part) for part in command[1:]], cwd=tmp_path)
    (built,) = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    index = np.load(built / "index.npz")
    assert (index["shapes"] == [512, 512, 1]).all() and len(index["shapes"]) == 160


def test_memory_of_the_loader_is_a_batch(tmp_path):
    """read_batch copies its own images alone and pads them to the largest."""
    store = common.Store(None, np.arange(200, dtype=np.uint8), np.array([0, 12, 100]),
                         np.array([[3, 4, 1], [4, 5, 3], [2, 2, 1]]), None, None, {})
    batch, sizes = common.read_batch(store, np.array([2, 0]))
    assert batch.shape == (2, 3, 4, 3) and sizes.tolist() == [[2, 2], [3, 4]]
    assert batch[0, :2, :2, 1].tolist() == [[100, 101], [102, 103]] and batch[0, 2:].sum() == 0
    assert batch[1, :, :, 0].flatten().tolist() == list(range(12))


def test_carved_splits_are_stratified_and_whole(csv_data):
    args = arguments(dataset="csv", data_dir=str(csv_data), group_column="patient")
    dataset = common.index_csv(args)
    common.complete_splits(dataset, 42)
    groups = {name: set(split.groups) for name, split in dataset.splits.items()}
    assert not groups["train"] & groups["test"] and not groups["train"] & groups["val"]
    assert not groups["val"] & groups["test"] and sum(dataset.counts.values()) == 60
    again = common.index_csv(args)
    common.complete_splits(again, 42)
    assert again.splits["test"].paths == dataset.splits["test"].paths
    plain = common.index_csv(arguments(dataset="csv", data_dir=str(csv_data)))
    common.complete_splits(plain, 42)
    assert plain.counts == {"train": 42, "val": 9, "test": 9}
    assert all((np.bincount(split.labels) == len(split) // 3).all() for split in plain.splits.values())


def test_limit_keeps_proportions():
    split = common.Split([str(i) for i in range(100)], np.array([0] * 80 + [1] * 20))
    for count in (5, 10, 50):
        kept = common.limit_images(split, count, 0)
        assert len(kept) == count and abs((kept.labels == 1).sum() - count / 5) <= 1


def test_numeric_classes_are_in_order(csv_data):
    rows = table(csv_data / "labels.csv")
    (csv_data / "labels.csv").write_text("image,grade\n" + "".join(
        f"{row['image']},{(1, 2, 10)[i % 3]}\n" for i, row in enumerate(rows)))
    assert common.index_csv(arguments(dataset="csv", data_dir=str(csv_data), label_column="grade")).classes \
        == ["1", "2", "10"]


def test_leakage_is_counted_and_dropped(folder_data, tmp_path, capsys):
    train, test = folder_data / "train" / "level", folder_data / "test" / "level"
    for i in range(3):
        shutil.copy(test / f"{i}.png", train / f"copy{i}.png")
    args = arguments(dataset="folder", data_dir=str(folder_data), cache_dir=str(tmp_path / "cache"))
    loose = common.load_dataset(args)
    held_out = loose.leakage["test_in_train"] + loose.leakage["test_in_val"]
    assert held_out == 3 and "of 13 test images also stand in" in capsys.readouterr().out
    args.leakage = "drop"
    clean = common.load_dataset(args)
    hashes = {name: set(clean.store.hashes[split.rows].tolist()) for name, split in clean.splits.items()}
    assert not hashes["train"] & hashes["test"] and not hashes["val"] & hashes["test"]
    assert len(clean.splits["test"]) == 13
    args.leakage = "error"
    with pytest.raises(SystemExit) as stopped:
        common.load_dataset(args)
    assert stopped.value.code == 2


def test_demo_has_masks_and_does_not_give_its_class_away_by_colour():
    images, masks = zip(*(common.demo_image(i) for i in range(400)))
    assert images[0].shape == (128, 128, 3) and images[0].dtype == np.uint8 and masks[0].dtype == bool
    shares = np.array([mask.mean() for mask in masks])
    assert shares.min() > 0.02 and shares.max() < 0.6
    assert (common.demo_image(7)[0] == images[7]).all() and (images[7] != images[11]).any()
    colour = torch.tensor(np.array([[*im[m].mean(0), *im[~m].mean(0)] for im, m in zip(images, masks)]))
    labels = torch.arange(400) % 4
    distance = torch.cdist(colour, colour).fill_diagonal_(torch.inf)
    neighbours = labels[distance.topk(20, largest=False).indices]
    right = (neighbours.mode(1).values == labels).float().mean()
    assert right < 0.40, f"20 nearest by mean colour: {right:.2f}, chance 0.25"


@pytest.mark.skipif("MEDVIT_DATA" not in os.environ, reason="MEDVIT_DATA names no folder with real images")
def test_real_images(tmp_path):
    data = os.environ["MEDVIT_DATA"]
    done = stage("knn_eval.py", "--dataset", "folder", "--data-dir", f"{data}/brain_mri",
                 "--arch", "test_vit", "--output", "run", *TINY, cwd=tmp_path)
    counted = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert counted["counts"]["test"] == 394 and counted["leakage"]["test_in_train"] > 0
    assert f"{counted['leakage']['test_in_train']} of 394 test images also stand in train" in done.stdout
    stage("knn_eval.py", "--dataset", "csv", "--data-dir", f"{data}/ph2", "--label-column", "diagnosis",
          "--arch", "test_vit", "--output", "ph2", *TINY, cwd=tmp_path)
    assert len(table(tmp_path / "ph2" / "predictions.csv")) == 30
