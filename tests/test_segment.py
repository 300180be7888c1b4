"""segment.py: masks through cache and augmentation, equations against slow versions, and runs as commands."""
import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import common
import segment
from conftest import ROOT, TINY, metrics, refused, stage, table
from test_datasets import BUILD

FOLDER = ["--dataset", "folder", "--data-dir", "data"]
FAST = ["--arch", "test_vit", "--epochs", "2", "--batch-size", "4", "--lr", "3e-3", *TINY]


def write_pair(folder, name, rng, size=(40, 48), dtype=np.uint8, values=(0, 255)):
    """A grey image with a bright disc, and its mask."""
    y, x = np.mgrid[:size[0], :size[1]]
    disc = np.hypot(y - rng.uniform(12, size[0] - 12), x - rng.uniform(12, size[1] - 12)) < rng.uniform(8, 11)
    image = (60 + 120 * disc + rng.normal(0, 10, size)).clip(0, 255) * (256 if dtype == np.uint16 else 1)
    for part, pixels in (("images", image.astype(dtype)),
                         ("masks", np.where(disc, *values[::-1]).astype(np.uint8))):
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / part / f"{name}.png")


@pytest.fixture
def mask_data(tmp_path):
    """images/ and masks/ of 30 discs, grey, every third 16-bit; labels.csv with split and patient."""
    rng, rows = np.random.default_rng(0), []
    for i in range(30):
        size = ((40, 48), (48, 40), (44, 44))[i % 3]
        write_pair(tmp_path / "data", f"{i:02d}", rng, size, np.uint16 if i % 3 == 0 else np.uint8)
        rows.append([f"{i:02d}.png", "train" if i < 20 else "val" if i < 25 else "test", f"p{i // 5}"])
    with open(tmp_path / "data" / "labels.csv", "w", newline="") as out:
        csv.writer(out).writerows([["image", "split", "patient"], *rows])
    return tmp_path / "data"


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """refuse(arguments, words): segment.py within this process must end in one line with these words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "INDEX", dict(common.INDEX))

    def run(*args, words):
        monkeypatch.setattr(sys, "argv", ["segment.py", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            segment.main()
        refused(subprocess.CompletedProcess(args, end.value.code, *capsys.readouterr()), *words)
        assert not (tmp_path / "run").exists()
    return run


def test_learns_and_writes_what_the_design_names(mask_data, tmp_path):
    done = stage("segment.py", *FOLDER, "--csv", "data/labels.csv", "--split-column", "split", *FAST,
                 "--image-size", "96", "--epochs", "5", "--output", "run", cwd=tmp_path)
    run = tmp_path / "run"
    result = metrics(run)
    assert result["counts"] == {"train": 20, "val": 5, "test": 5} and result["metric"] == "iou"
    assert result["test"]["iou"] > 0.7, done.stdout
    assert result["test"]["iou"] > result["test"]["constant_iou"], done.stdout
    low, high = result["test"]["interval"]
    assert low <= result["test"]["iou"] <= high
    assert {"stage", "dataset", "arch", "init", "pretrained_on", "seed", "val", "epochs", "parameters",
            "seconds", "images_per_second", "device", "amp", "world_size", "loss"} <= result.keys()
    rows = table(run / "predictions.csv")
    assert np.mean([float(row["iou_lesion"]) for row in rows]) == pytest.approx(result["test"]["iou"],
                                                                                abs=1e-5)
    model = torch.load(run / "model.pt", weights_only=True)
    assert model["task"] == "masks" and model["classes"] == ["background", "lesion"]
    assert "patch_embed.proj.weight" in model["state_dict"]
    assert (run / "curves.png").exists() and not list(run.glob("*.partial"))
    # its backbone, in timm's names, is a start for the other stages and for segment.py itself
    done = stage("segment.py", *FOLDER, "--init", "run/model.pt", "--epochs", "1", "--batch-size", "4", *TINY,
                 "--csv", "data/labels.csv", "--split-column", "split", "--group-column", "patient",
                 "--output", "again", cwd=tmp_path)
    assert "backbone tensors loaded" in done.stdout and metrics(tmp_path / "again")["init"] == "segmenter"


def test_two_processes_equal_one(mask_data, tmp_path):
    """Batch norm in backbone and head, and the head's dropout, over both processes; 5 test images are odd."""
    args = [*FOLDER, *FAST, "--arch", "test_resnet", "--epochs", "1"]
    stage("segment.py", *args, "--output", "one", cwd=tmp_path)
    stage("segment.py", *args, "--output", "two", cwd=tmp_path, processes=2)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("one", "two")]
    for a, b in zip(*logs):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
        assert a["val"]["loss"] == pytest.approx(b["val"]["loss"], rel=2e-2)
    rows = [table(tmp_path / name / "predictions.csv") for name in ("one", "two")]
    assert [row["path"] for row in rows[0]] == [row["path"] for row in rows[1]]
    assert metrics(tmp_path / "two")["world_size"] == 2


def test_resumed_after_sigkill_bit_for_bit(mask_data, tmp_path):
    args = [*FOLDER, *FAST, "--epochs", "6"]
    stage("segment.py", *args, "--output", "whole", cwd=tmp_path)
    process = subprocess.Popen([sys.executable, str(ROOT / "segment.py"), *args, "--output", "killed"],
                               cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    seen = b""
    while b"epoch 4/6" not in seen:  # the bar of the fourth epoch: killed inside an epoch
        assert process.poll() is None, "ended before it could be killed"
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    done = stage("segment.py", *args, "--output", "killed", cwd=tmp_path)
    assert "resuming killed after epoch 3" in done.stdout
    whole, killed = (torch.load(tmp_path / name / "model.pt", weights_only=True)
                     for name in ("whole", "killed"))
    assert all(torch.equal(whole["state_dict"][k], v) for k, v in killed["state_dict"].items())
    assert metrics(tmp_path / "whole")["test"] == metrics(tmp_path / "killed")["test"]


def test_predict_at_the_images_own_sizes(mask_data, tmp_path):
    stage("segment.py", *FOLDER, *FAST, "--output", "run", cwd=tmp_path)
    rng, sizes = np.random.default_rng(5), {"a.png": (33, 90), "deep/b.png": (120, 50), "c.jpg": (64, 64)}
    (tmp_path / "new" / "deep").mkdir(parents=True)
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / "new" / name)
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "new" / "d.jpg",
                                                                            exif=turned)
    Image.fromarray(rng.integers(0, 65536, (70, 35), dtype=np.uint16)).save(tmp_path / "new" / "e.png")
    sizes.update({"d.jpg": (60, 40), "e.png": (70, 35)})
    for output, processes in (("out", 1), ("two", 2)):
        stage("segment.py", "--predict", "new", "--init", "run/model.pt", "--output", output, *TINY[2:],
              cwd=tmp_path, processes=processes)
        rows = table(tmp_path / output / "masks.csv")
        assert len(rows) == 5
        for row in rows:
            name = str(Path(row["path"]).relative_to("new"))
            with Image.open(tmp_path / row["mask"]) as image:
                mask = np.asarray(image)
            assert mask.shape == sizes[name] and set(np.unique(mask)) <= {0, 255}
            assert int(row["area_lesion"]) == (mask > 0).sum()
            assert float(row["fraction_lesion"]) == pytest.approx((mask > 0).mean(), abs=1e-6)
    assert all((tmp_path / "out" / "masks" / file).read_bytes()
               == (tmp_path / "two" / "masks" / file).read_bytes()
               for file in ("a.png", "deep/b.png"))
    refused(stage("segment.py", "--predict", "new", "--init", "run/model.pt", "--output", "run", cwd=tmp_path,
                  check=False), "training run")


def test_several_classes_palette_and_split_folders(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2), ("test", 3)):
        for i in range(count):
            write_pair(tmp_path / "data" / split, f"{i}", rng, values=(0, 1 + i % 2))
            file = tmp_path / "data" / split / "masks" / f"{i}.png"
            picture = Image.fromarray(np.asarray(Image.open(file)))
            picture.putpalette([0, 0, 0, 250, 0, 0, 0, 250, 0])
            picture.save(file)
    args = [*FOLDER, *FAST, "--classes", "background,red,green,never", "--amp", "bf16"]
    done = stage("segment.py", *args, "--loss", "dice", "--output", "run", cwd=tmp_path)
    result = metrics(tmp_path / "run")
    assert result["counts"] == {"train": 8, "val": 2, "test": 3} and result["amp"] == "bf16"
    each = result["test"]["classes"]
    defined = [each[name]["iou"] for name in ("red", "green", "never") if each[name]["iou"] is not None]
    assert result["test"]["iou"] == pytest.approx(np.mean(defined))
    assert set(result["test"]["undefined"]) == {n for n in each if each[n]["iou"] is None}, done.stdout
    stage("segment.py", "--predict", "data/test/images", "--init", "run/model.pt", "--output", "out",
          *TINY[2:], cwd=tmp_path)
    with Image.open(tmp_path / "out" / "masks" / "0.png") as image:
        assert image.mode == "P" and np.asarray(image).max() < 4
    assert {"area_red", "area_never"} <= table(tmp_path / "out" / "masks.csv")[0].keys()


def test_compare(tmp_path, refuse):
    rng = np.random.default_rng(1)
    for i in range(24):  # a large disc and a small one in the far corner
        write_pair(tmp_path / "data", f"{i:02d}", rng, (48, 64))
        file = tmp_path / "data" / "masks" / f"{i:02d}.png"
        mask = np.asarray(Image.open(file)).copy()
        mask[:3, :3] = 255
        Image.fromarray(mask).save(file)
    stage("segment.py", *FOLDER, *FAST, "--output", "a", cwd=tmp_path)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    done = stage("segment.py", "--compare", "a", "b", "--output", "figure.png", "--device", "cpu",
                 cwd=tmp_path)
    found = json.loads((tmp_path / "figure.json").read_text())
    assert found["names"] == ["a", "b"] and found["regions"]["main region"]["count"] == 4
    assert sum(part["count"] for part in found["regions"].values()) == 8, done.stdout
    assert found["iou"][0] == pytest.approx(metrics(tmp_path / "a")["test"]["iou"], abs=0.02)
    with Image.open(tmp_path / "figure.png") as image:
        colours = {colour for _, colour in image.getcolors(10 ** 6)}
    assert segment.YELLOW in colours and min(image.size) > 600
    args = json.loads((tmp_path / "b" / "args.json").read_text())
    args["arguments"]["split_seed"] = 7
    (tmp_path / "b" / "args.json").write_text(json.dumps(args))
    refuse("--compare", "a", "b", "--output", "c.png", words=["split_seed"])
    refuse("--compare", "a", "nowhere", "--output", "c.png", words=["nowhere"])


def test_mistakes_are_named(mask_data, tmp_path, refuse):
    train = [*FOLDER, *FAST, "--output", "run"]
    mask = mask_data / "masks" / "03.png"
    pixels = np.asarray(Image.open(mask)).copy()
    mask.unlink()
    refuse(*train, words=["1 of 30", "03.png", "masks/"])
    Image.fromarray(pixels[:-1]).save(mask)
    refuse(*train, words=["03.png", "not as large", f"{pixels.shape[1]}x{pixels.shape[0] - 1}"])
    pixels[0, 0] = 7
    Image.fromarray(pixels).save(mask)
    refuse(*train, words=["03.png", "value 7"])
    refuse("--dataset", "csv", "--data-dir", "data", "--label-column", "split", *FAST, words=["no masks"])
    refuse(*train, "--csv", "data/labels.csv", "--split-column", "patient", words=["labels.csv", "patient"])
    refuse(*train, "--classes", "lesion", words=["--classes"])
    refuse(*train, "--metric", "accuracy", words=["--metric"])
    refuse("--predict", "data", "--init", "random", words=["--init"])
    done = stage("segment.py", *FOLDER, *FAST, "--epochs", "1", "--skip-broken", "--output", "run",
                 cwd=tmp_path)
    assert sum(metrics(tmp_path / "run")["counts"].values()) == 29, done.stdout


def test_open_mask_merges_binary_maps_and_checks_values(tmp_path):
    grid = np.zeros((4, 5), np.uint8)
    a, b = grid.copy(), grid.copy()
    a[1:3], b[2:, 1:] = 255, 1
    for name, pixels in (("a", a), ("b", b), ("c", grid + 2), ("colour", np.dstack([a, b, a]))):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    Image.fromarray(a > 0).save(tmp_path / "bits.png")
    mask = segment.open_mask([(3, str(tmp_path / "a.png")), (1, str(tmp_path / "b.png"))], 4)[..., 0]
    assert (mask == np.where(b > 0, 1, np.where(a > 0, 3, 0))).all() and mask.dtype == np.uint8
    assert (segment.open_mask(str(tmp_path / "bits.png"), 2)[..., 0] == (a > 0)).all()
    assert (segment.open_mask(str(tmp_path / "c.png"), 3) == 2).all()
    for name, classes, word in (("c", 2, "value 2"), ("a", 3, "value 255"), ("colour", 3, "colour")):
        with pytest.raises(ValueError, match=word):
            segment.open_mask(str(tmp_path / f"{name}.png"), classes)


def test_masks_move_with_their_images():
    """A smooth image and the same as a mask: after the same crop and flips they still agree."""
    y, x = torch.meshgrid(torch.arange(60.0), torch.arange(80.0), indexing="ij")
    masks = torch.stack([(torch.hypot(y - cy, x - cx) < 20)
                         for cy, cx in ((20, 30), (30, 50), (40, 20), (25, 60))])
    boxes = torch.tensor([[0, 0, 60, 80], [5, 7, 41, 55], [10, 0, 50, 50], [3, 20, 30, 60]]).float()
    flips = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]]).bool()
    for side in (32, 96):
        images = common.crop_resize(masks[..., None].byte() * 255, boxes, side, flips)[:, 0]
        cut = segment.crop_masks(masks.byte(), boxes, side, flips)
        assert ((images > 0.5) != cut.bool()).float().mean() < 0.015
        slow = torch.zeros_like(cut)
        for b in range(4):
            top, left, height, width = boxes[b].tolist()
            for i in range(side):
                for j in range(side):
                    u, v = (side - 1 - i if flips[b, 0] else i), (side - 1 - j if flips[b, 1] else j)
                    place = int(top + (u + 0.5) * height / side), int(left + (v + 0.5) * width / side)
                    slow[b, i, j] = masks[b, place[0], place[1]]
        assert torch.equal(cut, slow)
    args = argparse.Namespace(image_size=32, scale=[0.3, 1.0], jitter=[0, 0, 0, 0])
    draws = common.Draws(0, 4, torch.arange(4), torch.device("cpu"))
    sizes = torch.tensor([[60, 80]] * 4)
    # a mask in the cache may differ from its image by a rounded pixel
    half = masks[:, ::2, ::2].byte()[..., None]
    images, targets = segment.train_view(masks[..., None].byte() * 255, half, sizes, sizes // 2, draws, args,
                                         [0] * 3, [1] * 3)
    assert ((images[:, 0] > 0.5) != targets.bool()).float().mean() < 0.04


def slow_hausdorff(a, b):
    """The definition, pixel by pixel."""
    def edge(mask):
        wide = np.pad(mask, 1)
        return [(y, x) for y, x in zip(*np.nonzero(mask))
                if not all(wide[y + 1 + dy, x + 1 + dx] for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)))]
    p, q = edge(a), edge(b)
    one = [min(np.hypot(y - v, x - u) for v, u in q) for y, x in p]
    two = [min(np.hypot(y - v, x - u) for v, u in p) for y, x in q]
    return max(np.percentile(one, 95), np.percentile(two, 95))


def blobs(rng, size=(24, 31), count=3):
    """A random mask of a few ellipses."""
    image = Image.new("1", size[::-1])
    for _ in range(count):
        y, x = rng.integers(0, size[0] - 5), rng.integers(0, size[1] - 5)
        ImageDraw.Draw(image).ellipse([int(x), int(y), int(x + rng.integers(2, 12)),
                                       int(y + rng.integers(2, 9))], 1)
    return np.asarray(image)


def test_distances_are_exact_far_from_the_origin():
    mask = torch.zeros(4200, 4200, dtype=torch.bool)
    mask[4000:4100, 4000:4150] = True
    moved = mask.roll(3, 1)
    assert segment.hausdorff95(mask, mask, (1.37, 1.21)) == 0
    assert segment.hausdorff95(mask, moved, (1.37, 1.21)) == pytest.approx(3 * 1.21, rel=1e-3)


def test_metrics_equal_the_slow_versions():
    rng, masks = np.random.default_rng(0), []
    for i in range(12):
        truth, said = rng.integers(0, 3, (6, 7)), rng.integers(0, 3, (6, 7))
        if i < 3:
            truth[truth == 2] = 0
        if i == 0:
            said[said == 2] = 0  # class 2 in neither: left out
        masks.append((truth, said))
    pixels = np.array([[[((t == c) & (s == c)).sum(), (t == c).sum(), (s == c).sum(), np.nan]
                        for c in range(3)]
                       for t, s in masks], float)
    scores = segment.score_masks(pixels, ["background", "one", "two"], "iou")
    for c, name in ((1, "one"), (2, "two")):
        iou, dice = [], []
        for t, s in masks:
            t, s = {*zip(*np.nonzero(t == c))}, {*zip(*np.nonzero(s == c))}
            if t | s:
                iou.append(len(t & s) / len(t | s))
                dice.append(2 * len(t & s) / (len(t) + len(s)))
        assert len(iou) == (12 if c == 1 else 11)
        assert scores["classes"][name]["iou"] == pytest.approx(np.mean(iou))
        assert scores["classes"][name]["dice"] == pytest.approx(np.mean(dice))
        whole = [sum(join(t == c, s == c).sum() for t, s in masks)
                 for join in (np.logical_and, np.logical_or)]
        assert scores["classes"][name]["iou_set"] == pytest.approx(whole[0] / whole[1])
        assert scores["classes"][name]["dice_set"] == pytest.approx(2 * whole[0] / sum(whole))
        assert scores["classes"][name]["hd95"] is None
    assert scores["iou"] == pytest.approx(np.mean([scores["classes"][n]["iou"] for n in ("one", "two")]))
    for _ in range(6):
        a, b = blobs(rng), blobs(rng)
        mine = segment.hausdorff95(torch.from_numpy(a.copy()), torch.from_numpy(b.copy()))
        assert mine == pytest.approx(slow_hausdorff(a, b), abs=1e-3)
    empty = torch.zeros(5, 5, dtype=torch.bool)
    assert np.isnan(segment.hausdorff95(empty, ~empty))


def test_loss_equals_the_slow_version():
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 4):
        logits = torch.randn(3, classes, 5, 6, generator=generator)
        targets = torch.randint(0, classes, (3, 5, 6), generator=generator)
        targets[0] = 0
        for b in range(3):
            p, entropy, dice = logits[b].softmax(0).double(), 0.0, []
            for y in range(5):
                for x in range(6):
                    entropy -= float(p[targets[b, y, x], y, x].log()) / 30
            for c in range(1, classes):
                t = (targets[b] == c).double()
                dice.append((2 * float((p[c] * t).sum()) + 1) / (float(p[c].sum() + t.sum()) + 1))
            dice = 1 - np.mean(dice)
            for kind, value in (("ce", entropy), ("dice", dice), ("ce+dice", entropy + dice)):
                assert segment.loss_function(logits, targets, kind)[b].item() == pytest.approx(value,
                                                                                               abs=1e-5)


def test_regions_and_their_distance():
    rng = np.random.default_rng(3)
    for _ in range(4):
        mask, todo, sizes = blobs(rng, count=5), set(), []
        todo = {*zip(*np.nonzero(mask))}
        while todo:
            front, size = [todo.pop()], 0
            while front:
                y, x = front.pop()
                size += 1
                near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo
                todo -= near
                front += near
            sizes.append(size)
        labels = segment.components(torch.from_numpy(mask.copy()))
        assert torch.bincount(labels.flatten())[1:].tolist() == sorted(sizes, reverse=True)
    truth, said = torch.zeros(2, 30, 40, dtype=torch.bool)
    truth[2:12, 2:12], truth[20:24, 30:34] = True, True
    said[2:12, 2:12], said[20:24, 30:36] = True, True
    said[0, 0] = True  # nearer to the large region
    (near, first), (far, second) = segment.region_scores(truth, said)
    assert near == 0 and first == pytest.approx(100 / 101) and second == pytest.approx(16 / 24)
    assert far == pytest.approx(np.hypot(20 - 11, 30 - 11) / 50)


def test_head_on_narrow_maps_and_any_backbone():
    """ReachConv is the convolution it replaces, gradients too; every kind of backbone gives a map."""
    for rate, size in ((12, (14, 14)), (3, (5, 4)), (9, (8, 8)), (1, (6, 6))):
        plain = torch.nn.Conv2d(6, 4, 3, padding=rate, dilation=rate, bias=False)
        x = torch.randn(2, 6, *size, requires_grad=True)
        y = plain(x)
        wanted = [y, *torch.autograd.grad(y.square().sum(), (x, plain.weight))]
        plain.__class__ = segment.ReachConv
        y = plain(x)
        for a, b in zip(wanted, [y, *torch.autograd.grad(y.square().sum(), (x, plain.weight))]):
            assert torch.allclose(a, b, atol=1e-4)
    for arch, stride, side in (("test_vit", 8, 64), ("test_resnet", 8, 64), ("test_resnet", 16, 64),
                               ("test_convnext", 8, 64), ("swin_tiny_patch4_window7_224", 8, 224)):
        args = argparse.Namespace(arch=arch, init="random", seed=0, image_size=side, output_stride=stride)
        model, _ = segment.build_segmenter(args, 3)
        with torch.no_grad():
            coarse = model.eval()(torch.rand(2, 3, side, side))
        stride = {"test_vit": 16, "swin_tiny_patch4_window7_224": 32}.get(arch, stride)
        assert coarse.shape == (2, 3, side // stride, side // stride)
        whole = segment.full_size(coarse[0], (50, 70))
        wide = F.interpolate(coarse[:1], (50, 70), mode="bilinear", align_corners=False)
        assert torch.equal(whole.long(), wide[0].argmax(0))


@pytest.mark.skipif("MEDVIT_DATA" not in os.environ, reason="MEDVIT_DATA does not name the real images")
def test_real_images(tmp_path):
    """Dermoscopy: even a tiny ViT soon beats the best constant mask."""
    done = stage("segment.py", "--dataset", "folder", "--data-dir", Path(os.environ["MEDVIT_DATA"]) / "ph2",
                 *FAST, "--image-size", "96", "--epochs", "3", "--batch-size", "10", "--output", "run",
                 cwd=tmp_path)
    result = metrics(tmp_path / "run")
    assert sum(result["counts"].values()) == 200
    assert result["test"]["iou"] > result["test"]["constant_iou"] + 0.1, done.stdout


@pytest.mark.parametrize("name", ["isic2018", "csaws"])
def test_the_papers_datasets(name, tmp_path):
    """One epoch on a fixture in the owners' layout. CSAW-S' annotators drew discs of radius 3, 4 and 5, so their
    majority is the second's."""
    BUILD[name](tmp_path / "data")
    stage("segment.py", "--dataset", name, "--data-dir", "data", *FAST[:2], "--epochs", "1", "--batch-size", "2",
          *TINY, "--output", "run", cwd=tmp_path)
    result = metrics(tmp_path / "run")
    assert result["dataset"] == name and result["metric"] == "iou"
    if name == "csaws":
        scores = result["test"]["annotators"]
        assert set(scores) == {"annotator_1", "annotator_2", "annotator_3", "majority"}
        assert scores["majority"] == scores["annotator_2"] != scores["annotator_3"]
        assert scores["annotator_1"]["iou"] == result["test"]["iou"]


def test_majority_of_three_masks(tmp_path):
    parts = np.random.default_rng(0).integers(0, 3, (3, 8, 9)).astype(np.uint8)
    for i, mask in enumerate(parts):
        Image.fromarray(mask).save(tmp_path / f"{i}.png")
    ours = segment.open_mask([("vote", str(tmp_path / f"{i}.png")) for i in range(3)], 3)[..., 0]
    for y, x in np.ndindex(8, 9):
        counts = np.bincount(parts[:, y, x], minlength=3)
        assert ours[y, x] == (counts.argmax() if counts.max() >= 2 else 0)
