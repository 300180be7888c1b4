"""segment.py: masks through augmentation and metrics, equations against slow versions, and runs as commands."""
import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw

import common
import prepare as prepare_script
import segment
from conftest import TINY, killed, metrics, prepare, refused, square_by_pillow, stage, table, write_prepared

FAST = ["--data", "data", "--arch", "test_vit", "--epochs", "2", "--batch-size", "4", "--lr", "3e-3", *TINY]
SIZES = ((40, 48), (60, 40), (44, 44))  # of the sources, whose squares have SIDE pixels
SIDE = 40


def draw_disc(rng, size, values=(0, 1)):
    """A grey image (H, W) uint8 with a bright disc, and its mask (H, W) uint8."""
    y, x = np.mgrid[:size[0], :size[1]]
    disc = np.hypot(y - rng.uniform(12, size[0] - 12), x - rng.uniform(12, size[1] - 12)) < rng.uniform(8, 11)
    image = (60 + 120 * disc + rng.normal(0, 10, size)).clip(0, 255)
    return image.astype(np.uint8), np.where(disc, *values[::-1]).astype(np.uint8)


def write_discs(folder, counts=(20, 5, 5), values=lambda i: (0, 1), change=None, fit="squash", **meta):
    """A prepared folder of discs, grey, five images a group; counts of train, val, test. change(masks (N, SIDE, SIDE))
    alters the masks."""
    rng = np.random.default_rng(0)
    images, masks, rows = [], [], []
    for i in range(sum(counts)):
        size = SIZES[i % 3]
        image, mask = draw_disc(rng, size, values(i))
        images.append(prepare_script.to_square(image[..., None], SIDE, fit))
        masks.append(square_by_pillow(mask, common.fit_box(*size, fit), SIDE, Image.Resampling.NEAREST))
        split = np.repeat(["train", "val", "test"], counts)[i]
        rows.append({"image": f"deep/{i:02d}.png", "split": split, "group": f"p{i // 5}", "height": size[0],
                     "width": size[1]})
    masks = np.stack(masks)
    if change:
        change(masks)
    return write_prepared(folder, np.stack(images), rows, masks, fit=fit,
                          **{"mask_classes": ["background", "lesion"], **meta})


@pytest.fixture
def mask_data(tmp_path):
    """data/: 30 discs, of which 5 for val and 5 for test."""
    return write_discs(tmp_path / "data")


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """refuse(arguments, words): segment.py within this process must end in one line with these words."""
    monkeypatch.chdir(tmp_path)

    def run(*args, words):
        monkeypatch.setattr(sys, "argv", ["segment.py", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            segment.main()
        refused(subprocess.CompletedProcess(args, end.value.code, *capsys.readouterr()), *words)
        assert not (tmp_path / "run").exists()
    return run


def trained(folder, **changes):
    """The segmenter of a run folder with what its model.pt says; `changes` are made to it first."""
    content = torch.load(folder / "model.pt", weights_only=True)
    if changes:
        torch.save({**content, **changes}, folder / "model.pt")
    return segment.load_segmenter(folder / "model.pt")


def predicted_squares(run, dataset, rows):
    """The masks (n, S, S) that a run's model gives rows of a dataset, one at a time and written out."""
    model, meta = trained(run)
    squares = []
    with torch.inference_mode():
        for row in rows:
            image = torch.from_numpy(dataset.images[row:row + 1].copy())
            view = common.eval_view(image, meta["image_size"], meta["mean"], meta["std"], whole=True)
            wide = F.interpolate(model(view), image.shape[1:3], mode="bilinear", align_corners=False)
            squares.append(wide[0].argmax(0).numpy())
    return np.stack(squares)


def test_learns_and_writes_what_the_design_names(mask_data, tmp_path):
    done = stage("segment.py", *FAST, "--image-size", "96", "--epochs", "5", "--output", "run", cwd=tmp_path)
    run = tmp_path / "run"
    result = metrics(run)
    assert result["counts"] == {"train": 20, "val": 5, "test": 5} and result["metric"] == "iou"
    assert result["test"]["iou"] > 0.7, done.stdout
    assert result["test"]["iou"] > result["test"]["constant_iou"], done.stdout
    low, high = result["test"]["interval"]
    assert low <= result["test"]["iou"] <= high
    assert (result["test"]["n"], result["test"]["lesions"]) == (5, 5) and result["test"]["found"] == 5
    assert len(list((run / "test_masks").glob("*.png"))) == 5 and (run / "examples.png").exists()
    assert {"stage", "dataset", "arch", "init", "pretrained_on", "seed", "val", "epochs", "parameters",
            "seconds", "images_per_second", "device", "amp", "world_size", "loss"} <= result.keys()
    assert "40 pixels of data are enlarged to --image-size 96" in done.stdout
    rows = table(run / "predictions.csv")
    assert np.mean([float(row["iou_lesion"]) for row in rows]) == pytest.approx(result["test"]["iou"], abs=1e-5)
    assert list(rows[0])[:2] == ["image", "group"]
    assert [(row["image"], row["group"]) for row in rows] == [(f"deep/{i}.png", "p5") for i in range(25, 30)]
    model = torch.load(run / "model.pt", weights_only=True)
    assert model["task"] == "masks" and model["classes"] == ["background", "lesion"]
    assert model["side"] == SIDE and model["fit"] == "squash" and model["ignore"] is None
    assert "patch_embed.proj.weight" in model["state_dict"]
    assert (run / "curves.png").exists() and not list(run.glob("*.partial*"))
    assert result["split"] == common.open_dataset(mask_data).fingerprint
    # its backbone, in timm's names, is a start for the other stages and for segment.py itself
    done = stage("segment.py", "--data", "data", "--init", "run/model.pt", "--epochs", "1", "--batch-size", "4", *TINY,
                 "--metric", "dice", "--output", "again", cwd=tmp_path)
    again = metrics(tmp_path / "again")
    assert "backbone tensors loaded" in done.stdout and again["init"] == "segmenter" and again["metric"] == "dice"


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
def test_areas_and_distances_are_in_pixels_of_the_source(fit, tmp_path):
    data = write_discs(tmp_path / "data", fit=fit)
    stage("segment.py", *FAST, "--image-size", "64", "--epochs", "5", "--output", "run", cwd=tmp_path)
    dataset = common.open_dataset(data)
    said = predicted_squares(tmp_path / "run", dataset, dataset.rows["test"])
    rows, far = table(tmp_path / "run" / "predictions.csv"), []
    for row, number, mask in zip(rows, dataset.rows["test"], said):
        height, width = SIZES[number % 3]
        if fit != "squash":
            height = width = max(height, width) if fit == "pad" else min(height, width)
        unit = height / SIDE, width / SIDE
        truth = dataset.masks[number] == 1
        assert float(row["pixels_lesion"]) == pytest.approx(truth.sum() * unit[0] * unit[1])
        assert float(row["predicted_lesion"]) == pytest.approx((mask == 1).sum() * unit[0] * unit[1])
        assert float(row["hd95_lesion"]) == pytest.approx(slow_hausdorff(truth, mask == 1, unit), rel=1e-4)
        assert float(row["iou_lesion"]) == pytest.approx((truth & (mask == 1)).sum() / (truth | (mask == 1)).sum())
        far.append(float(row["hd95_lesion"]))
    assert metrics(tmp_path / "run")["test"]["hd95"] == pytest.approx(np.mean(far))


def test_two_processes_equal_one(mask_data, tmp_path):
    """Batch norm in backbone and head, and the head's dropout, over both processes; 5 test images are odd. (Adam makes
    large what differs in the last digit: hence a small learning rate, and close bounds.)"""
    args = [*FAST, "--arch", "test_resnet", "--epochs", "1", "--lr", "1e-4"]
    stage("segment.py", *args, "--output", "one", cwd=tmp_path)
    stage("segment.py", *args, "--output", "two", cwd=tmp_path, processes=2)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("one", "two")]
    for a, b in zip(*logs):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
        assert a["val"]["loss"] == pytest.approx(b["val"]["loss"], rel=2e-4)
    rows = [table(tmp_path / name / "predictions.csv") for name in ("one", "two")]
    assert [row["image"] for row in rows[0]] == [row["image"] for row in rows[1]]
    assert metrics(tmp_path / "two")["world_size"] == 2


def test_resumed_after_sigkill_bit_for_bit(mask_data, tmp_path):
    args = [*FAST, "--epochs", "6"]
    stage("segment.py", *args, "--output", "whole", cwd=tmp_path)
    killed("segment.py", *args, "--output", "killed", cwd=tmp_path, log=tmp_path / "killed" / "log.jsonl", lines=3,
           text="epoch 4/6")  # the bar of the fourth epoch: killed inside an epoch
    assert not (tmp_path / "killed" / "metrics.json").exists()
    done = stage("segment.py", *args, "--output", "killed", cwd=tmp_path)
    assert "resuming killed after epoch 3" in done.stdout
    whole, resumed = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(whole["state_dict"][k], v) for k, v in resumed["state_dict"].items())
    assert metrics(tmp_path / "whole")["test"] == metrics(tmp_path / "killed")["test"]


# ---------------------------------------------------------------- --predict ---------------------------------

@pytest.fixture(scope="module")
def run_of_discs(tmp_path_factory):
    """A folder with a finished run/ on discs that tells them from the ground. Copied, never changed."""
    folder = tmp_path_factory.mktemp("discs")
    write_discs(folder / "data")
    stage("segment.py", *FAST, "--image-size", "64", "--epochs", "5", "--output", "run", cwd=folder)
    return folder


def new_images(folder):
    """Discs of several sizes, depths and suffixes, one of them lying on its side: {name: size}."""
    rng, sizes = np.random.default_rng(5), {"a.png": (33, 90), "deep/b.png": (120, 50), "c.jpg": (64, 64)}
    (folder / "deep").mkdir(parents=True)
    for name, size in sizes.items():
        Image.fromarray(draw_disc(rng, size)[0]).convert("RGB").save(folder / name)
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray(draw_disc(rng, (40, 60))[0]).save(folder / "d.jpg", exif=turned)
    Image.fromarray(draw_disc(rng, (70, 35))[0].astype(np.uint16) * 256).save(folder / "e.png")
    return {**sizes, "d.jpg": (60, 40), "e.png": (70, 35)}


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
def test_predict_at_the_images_own_sizes(fit, run_of_discs, tmp_path):
    shutil.copytree(run_of_discs / "run", tmp_path / "run")
    model, meta = trained(tmp_path / "run", fit=fit)
    sizes = new_images(tmp_path / "new")
    done = stage("segment.py", "--predict", "new", "--init", "run/model.pt", "--output", "out", "--overlay", *TINY[2:],
                 cwd=tmp_path)
    assert len(list((tmp_path / "out" / "overlays").rglob("*.png"))) == len(sizes)
    assert ("outside of it is background" in done.stdout) == (fit == "crop")
    rows = table(tmp_path / "out" / "masks.csv")
    assert {row["image"]: (int(row["height"]), int(row["width"])) for row in rows} == sizes
    assert list(rows[0]) == ["image", "mask", "height", "width", "area_lesion", "fraction_lesion"]
    for row in rows:
        height, width = size = sizes[row["image"]]
        assert row["mask"] == "masks/" + row["image"].rsplit(".", 1)[0] + ".png"
        with Image.open(tmp_path / "out" / row["mask"]) as image:
            mask = np.asarray(image)
        assert mask.shape == size and set(np.unique(mask)) == {0, 255}
        assert int(row["area_lesion"]) == (mask > 0).sum()
        assert float(row["fraction_lesion"]) == pytest.approx((mask > 0).mean(), abs=1e-6)
        # the square that the model has seen, put back into the image
        pixels = prepare_script.read_image(tmp_path / "new" / row["image"], SIDE)[0]
        square = torch.from_numpy(prepare_script.to_square(pixels, SIDE, fit))[None]
        with torch.inference_mode():
            logits = model(common.eval_view(square, 64, meta["mean"], meta["std"], whole=True))
        wanted = np.zeros(size, bool)
        if fit == "squash":
            wanted = F.interpolate(logits, size, mode="bilinear")[0].argmax(0).bool().numpy()
        else:
            side = max(size) if fit == "pad" else min(size)
            box = F.interpolate(logits, (side, side), mode="bilinear")[0].argmax(0).bool().numpy()
            top, left = abs(height - side) // 2, abs(width - side) // 2
            if fit == "crop":
                wanted[top:top + side, left:left + side] = box
            else:  # Python rounds half of a negative odd number down
                top, left = -((height - side) // 2), -((width - side) // 2)
                wanted = box[top:top + height, left:left + width]
        assert ((mask > 0) == wanted).all()
    assert not (tmp_path / "out" / "masks.partial").exists()


def test_predict_on_two_processes_writes_the_same_bytes(run_of_discs, tmp_path):
    new_images(tmp_path / "new")
    (tmp_path / "list.csv").write_text("image\nnew/a.png\nnew/deep/b.png\nnew/e.png\n")
    common_args = ["--init", run_of_discs / "run" / "model.pt", *TINY[2:]]
    for source in ("new", "list.csv"):
        for output, processes in (("one", 1), ("two", 2)):
            stage("segment.py", "--predict", source, "--output", f"{source}-{output}", *common_args, cwd=tmp_path,
                  processes=processes)
        one, two = (tmp_path / f"{source}-{output}" for output in ("one", "two"))
        files = sorted(file.relative_to(one) for file in one.rglob("*") if file.is_file())
        assert files == sorted(file.relative_to(two) for file in two.rglob("*") if file.is_file())
        assert len(files) == (6 if source == "new" else 4)
        for file in files:
            assert (one / file).read_bytes() == (two / file).read_bytes()


def test_predict_leaves_nothing_half_written(run_of_discs, tmp_path, refuse):
    new_images(tmp_path / "new")
    for name in ("broken.png", "deep/a.jpg"):
        (tmp_path / "new" / name).write_bytes(b"no picture")
    args = ["--predict", "new", "--init", run_of_discs / "run" / "model.pt", "--output", "out", *TINY[2:]]
    refuse(*args, words=["2 of 7 images", "broken.png", "deep/a.jpg", "--skip-broken"])
    done = stage("segment.py", *args, cwd=tmp_path, processes=2, check=False)  # each process has met one of them
    assert done.returncode and done.stderr.count("error: ") == 1, done.stderr
    assert "2 of 7 images" in done.stderr and "new/broken.png" in done.stderr and "new/deep/a.jpg" in done.stderr
    assert not [*(tmp_path / "out").glob("*")]
    (tmp_path / "out" / "masks.partial").mkdir(parents=True)  # of a run that was killed
    (tmp_path / "out" / "masks.partial" / "old.png").write_bytes(b"")
    done = stage("segment.py", *args, "--skip-broken", cwd=tmp_path)
    assert "left out" in done.stdout and "new/broken.png" in done.stdout
    assert len(table(tmp_path / "out" / "masks.csv")) == 5
    assert sorted(file.name[0] for file in (tmp_path / "out").rglob("*.png")) == list("abcde")
    refuse(*args, "--skip-broken", words=["out/masks", "--overwrite"])
    (tmp_path / "new" / "c.jpg").unlink()
    stage("segment.py", *args, "--skip-broken", "--overwrite", cwd=tmp_path)
    assert len(table(tmp_path / "out" / "masks.csv")) == len([*(tmp_path / "out").rglob("*.png")]) == 4


def test_predict_refuses_what_it_cannot_do(run_of_discs, tmp_path, refuse, monkeypatch, capsys):
    new_images(tmp_path / "new")
    shutil.copytree(run_of_discs / "run", tmp_path / "trained")
    predict = ["--predict", "new", "--output", "out", *TINY[2:]]
    refuse(*predict, "--init", "random", words=["--init"])
    refuse("--predict", "new", "--init", "trained/model.pt", "--output", "trained", words=["training run"])
    Image.new("L", (9, 9)).save(tmp_path / "new" / "a.tif")
    refuse(*predict, "--init", "trained/model.pt", words=["a.png", "a.tif", "rename"])
    Image.new("L", (9, 9)).save(tmp_path / "trained" / "b.png")
    (tmp_path / "new" / "list.csv").write_text("image\n../trained/b.png\n")
    refuse("--predict", "new/list.csv", "--init", "trained/model.pt", "--output", "out", words=["trained/b.png", "masks/"])
    # a model of the other stage
    content = torch.load(tmp_path / "trained" / "model.pt", weights_only=True)
    torch.save({**content, "stage": "finetune", "task": "classes"}, tmp_path / "classifier.pt")
    refuse(*predict, "--init", "classifier.pt", words=["classifier.pt", "finetune.py"])
    torch.save({**content, "stage": "pretrain_dino", "task": None, "classes": []}, tmp_path / "dino.pt")
    refuse(*predict, "--init", "dino.pt", words=["dino.pt", "not the model.pt of a segment.py run"])
    refused(stage("finetune.py", "--predict", "new", "--init", "trained/model.pt", "--output", "out", *TINY[2:],
                  cwd=tmp_path, check=False), "trained/model.pt", "segmenter", "segment.py --predict")
    assert not (tmp_path / "out").exists()


def test_files_without_a_known_suffix_keep_their_names():
    assert segment.mask_files("x", ["1.2.840.1", "1.2.840.2", "deep/A.JPG", "IM1"]) == [
        "1.2.840.1.png", "1.2.840.2.png", "deep/A.png", "IM1.png"]


def test_several_classes_and_palette(tmp_path):
    write_discs(tmp_path / "data", (8, 2, 3), lambda i: (0, 1 + i % 2),
                mask_classes=["background", "red", "green", "never"])
    args = [*FAST, "--amp", "bf16"]
    done = stage("segment.py", *args, "--loss", "dice", "--output", "run", cwd=tmp_path)
    result = metrics(tmp_path / "run")
    assert result["counts"] == {"train": 8, "val": 2, "test": 3} and result["amp"] == "bf16"
    each = result["test"]["classes"]
    defined = [each[name]["iou"] for name in ("red", "green", "never") if each[name]["iou"] is not None]
    assert result["test"]["iou"] == pytest.approx(np.mean(defined))
    assert set(result["test"]["undefined"]) == {n for n in each if each[n]["iou"] is None}, done.stdout
    new_images(tmp_path / "new")
    stage("segment.py", "--predict", "new", "--init", "run/model.pt", "--output", "out", *TINY[2:], cwd=tmp_path)
    with Image.open(tmp_path / "out" / "masks" / "a.png") as image:
        assert image.mode == "P" and np.asarray(image).max() < 4
        assert image.getpalette()[:6] == [0, 0, 0, *bytes.fromhex(common.COLOURS[0][1:])]
    assert {"area_red", "area_never"} <= table(tmp_path / "out" / "masks.csv")[0].keys()


# ---------------------------------------------------------------- --compare ---------------------------------

def test_compare(tmp_path, refuse):
    def corner(masks):  # a large disc and a small one in the far corner
        masks[:, :3, :3] = 1
    write_discs(tmp_path / "data", (14, 6, 4), change=corner)
    stage("segment.py", *FAST, "--output", "a", cwd=tmp_path)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    done = stage("segment.py", "--compare", "a", "b", "--output", "figure.png", "--device", "cpu", cwd=tmp_path)
    found = json.loads((tmp_path / "figure.json").read_text())
    assert found["names"] == ["a", "b"] and found["regions"]["main region"]["count"] == 4
    assert sum(part["count"] for part in found["regions"].values()) == 8, done.stdout
    assert found["iou"][0] == pytest.approx(metrics(tmp_path / "a")["test"]["iou"], abs=1e-6)
    with Image.open(tmp_path / "figure.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(10 ** 6)}
    assert ImageColor.getrgb(segment.YELLOW) in colours and min(image.size) > 600
    refuse("--compare", "a", "nowhere", "--output", "c.png", words=["nowhere"])
    refuse("--compare", "a", "b", "--output", "c.pdf", words=["c.pdf", ".png"])
    args = json.loads((tmp_path / "b" / "args.json").read_text())
    args["data"]["fingerprint"] = "0"
    (tmp_path / "b" / "args.json").write_text(json.dumps(args))
    refuse("--compare", "a", "b", "--output", "c.png", words=["different data"])
    shutil.copy(tmp_path / "a" / "args.json", tmp_path / "b")
    labels = tmp_path / "data" / "labels.csv"
    labels.write_text(labels.read_text().replace("00.png,train", "00.png,test"))
    refuse("--compare", "a", "b", "--output", "c.png", words=["data is not as it was"])
    labels.unlink()
    refuse("--compare", "a", "b", "--output", "c.png", words=["data", "labels.csv"])


# ---------------------------------------------------------------- mistakes ----------------------------------

def test_mistakes_are_named(mask_data, tmp_path, refuse):
    train = [*FAST, "--output", "run"]
    masks = np.load(mask_data / "masks.npy")
    np.save(mask_data / "masks.npy", masks * 255)
    refuse(*train, words=["masks.npy", "255", "0 to 1", "mask_classes"])
    masks[3, 0, 0] = 7
    np.save(mask_data / "masks.npy", masks)
    refuse(*train, words=["masks.npy", "7"])
    (mask_data / "dataset.json").write_text(json.dumps({"mask_classes": ["lesion"]}))
    refuse(*train, words=["dataset.json", "mask_classes", "two"])
    (mask_data / "masks.npy").unlink()
    refuse(*train, words=["data", "no masks"])
    refuse(*train, "--metric", "accuracy", words=["--metric"])
    refuse(*train, "--batch-size", "1", words=["--batch-size"])
    refuse(*train, "--scale", "0.9", "0.5", words=["--scale"])


def test_batch_of_more_than_the_training_images(mask_data, refuse):
    refuse(*FAST, "--batch-size", "22", "--output", "run", words=["--batch-size 22", "20"])


# ---------------------------------------------------------------- pixels that count nowhere, annotators ----

def hidden(masks, generator):
    """Some pixels of masks (B, H, W) as 255, in blocks and alone; a whole image for the last one."""
    masks = masks.clone()
    masks[torch.rand(masks.shape, generator=generator) < 0.2] = 255
    masks[:, :, :2] = 255
    masks[-1] = 255
    return masks


def test_ignored_pixels_count_nowhere_in_the_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 5, 6, generator=generator, requires_grad=True)
    targets = hidden(torch.randint(0, 3, (4, 5, 6), generator=generator), generator)
    for kind in ("ce", "dice", "ce+dice"):
        losses = segment.loss_function(logits, targets, kind, 255)
        for b in range(3):  # the same as of the list of the known pixels alone
            keep = targets[b] != 255
            slow = segment.loss_function(logits[b:b + 1, :, keep][..., None], targets[b:b + 1, keep][..., None], kind)
            assert losses[b].item() == pytest.approx(slow.item(), abs=1e-5)
        assert losses[3].item() == 0  # nothing is known of it
        gradient = torch.autograd.grad(losses.sum(), logits)[0]
        assert gradient.isfinite().all() and (gradient.permute(0, 2, 3, 1)[targets == 255] == 0).all()
        assert (gradient.permute(0, 2, 3, 1)[targets != 255] != 0).any(1).all()


def test_ignored_pixels_count_nowhere_in_a_run(tmp_path):
    """A band over every disc is unknown: scores are those of the rest, by a slow version."""
    def band(masks):
        masks[:, 15:19] = 255
        masks[:, :, 20:22] = 255
    data = write_discs(tmp_path / "data", change=band, ignore=255)
    stage("segment.py", *FAST, "--image-size", "64", "--epochs", "5", "--output", "run", cwd=tmp_path)
    dataset, run = common.open_dataset(data), tmp_path / "run"
    rows, result = dataset.rows["test"], metrics(run)
    said = predicted_squares(run, dataset, rows)
    for row, number, mask in zip(table(run / "predictions.csv"), rows, said):
        truth, unit = dataset.masks[number], np.array(SIZES[number % 3]) / SIDE
        assert mask[truth == 255].any()  # what is predicted there must not matter
        both = either = 0
        for y, x in np.ndindex(SIDE, SIDE):
            if truth[y, x] != 255:
                both += truth[y, x] == 1 and mask[y, x] == 1
                either += truth[y, x] == 1 or mask[y, x] == 1
        assert float(row["iou_lesion"]) == pytest.approx(both / either)
        assert float(row["pixels_lesion"]) == pytest.approx((truth == 1).sum() * unit.prod())
        assert float(row["predicted_lesion"]) == pytest.approx(((mask == 1) & (truth != 255)).sum() * unit.prod())
        slow = slow_hausdorff(truth == 1, (mask == 1) & (truth != 255), unit)
        assert float(row["hd95_lesion"]) == pytest.approx(slow, rel=1e-4)
    assert result["test"]["constant_iou"] == pytest.approx(slow_constant(dataset), abs=1e-6)
    assert torch.load(run / "model.pt", weights_only=True)["ignore"] == 255
    shutil.copytree(run, tmp_path / "b")
    stage("segment.py", "--compare", "run", "b", "--output", "figure.png", "--device", "cpu", cwd=tmp_path)
    found = json.loads((tmp_path / "figure.json").read_text())
    assert found["iou"][0] == pytest.approx(result["test"]["iou"], abs=1e-6)
    # new pictures have no such pixels
    (tmp_path / "new").mkdir()
    Image.fromarray(dataset.images[rows[0], ..., 0]).save(tmp_path / "new" / "x.png")
    stage("segment.py", "--predict", "new", "--init", "run/model.pt", "--output", "out", *TINY[2:], cwd=tmp_path)
    assert int(table(tmp_path / "out" / "masks.csv")[0]["area_lesion"]) == (said[0] == 1).sum()


def slow_constant(dataset):
    """The best constant mask of two classes, pixel by pixel at 128 x 128, with NaN for what is unknown."""
    def grid(name):
        places = [int((i + 0.5) * SIDE / 128) for i in range(128)]
        masks = dataset.masks[dataset.rows[name]][:, places][:, :, places].astype(float)
        masks[masks == 255] = np.nan
        return masks

    def score(masks, constant):
        values = []
        for mask in masks:
            keep = ~np.isnan(mask)
            truth, said = mask[keep] == 1, constant[keep]
            if (truth | said).any():
                values.append((truth & said).sum() / (truth | said).sum())
        return np.mean(values)
    train = grid("train")
    seen = (~np.isnan(train)).sum(0)
    share = np.nansum(train, 0) / np.maximum(seen, 1)
    best = max(np.arange(0, 1, 0.05), key=lambda level: score(train, share > level))
    return score(grid("test"), share > best)


@pytest.mark.parametrize("ignore", [None, 255])
def test_constant_mask_equals_the_slow_version(ignore, tmp_path):
    def hide(masks):
        hidden_masks = hidden(torch.from_numpy(masks), torch.Generator().manual_seed(1))
        masks[:] = hidden_masks.numpy() if ignore else masks
    dataset = common.open_dataset(write_discs(tmp_path / "data", change=hide, ignore=ignore))
    assert segment.constant_score(dataset, "cpu") == pytest.approx(slow_constant(dataset), abs=1e-6)


def test_majority_of_three_masks():
    parts = np.random.default_rng(0).choice([0, 1, 2, 255], (3, 8, 9)).astype(np.uint8)
    ours = segment.majority(parts, [0, 1, 2, 255])
    seen = set()
    for y, x in np.ndindex(8, 9):
        counts = np.bincount(parts[:, y, x], minlength=256)
        assert ours[y, x] == (counts.argmax() if counts.max() >= 2 else 0)
        seen.add((int(counts.max()), int(ours[y, x])))
    assert {(1, 0), (2, 1), (2, 255), (3, 0)} <= seen
    assert (segment.majority(np.array([[[1]], [[2]]], np.uint8), [0, 1, 2]) == 0).all()  # one half is no majority


def test_scores_against_annotators(mask_data, tmp_path):
    """Annotators that draw too much, just right and too little, of test alone: their majority is the second."""
    masks, test = np.load(mask_data / "masks.npy"), slice(25, 30)
    wide, narrow = np.zeros_like(masks), np.zeros_like(masks)
    for row in range(25, 30):
        disc = torch.from_numpy(masks[row:row + 1]).float()
        wide[row] = F.max_pool2d(disc, 3, 1, 1)[0]
        narrow[row] = -F.max_pool2d(-disc, 3, 1, 1)[0]
    same = np.zeros_like(masks)
    same[test] = masks[test]
    for name, array in (("annotator_1", wide), ("annotator_2", same), ("annotator_3", narrow)):
        np.save(mask_data / f"masks-{name}.npy", array)
    done = stage("segment.py", *FAST, "--output", "run", cwd=tmp_path)
    result = metrics(tmp_path / "run")["test"]
    scores = result["annotators"]
    assert set(scores) == {"annotator_1", "annotator_2", "annotator_3", "majority"}
    assert scores["majority"] == scores["annotator_2"] != scores["annotator_3"]
    assert scores["annotator_2"]["iou"] == result["iou"] != scores["annotator_1"]["iou"]
    said = predicted_squares(tmp_path / "run", common.open_dataset(mask_data), range(25, 30)) == 1
    ious = [(said[i] & (wide[25 + i] == 1)).sum() / (said[i] | (wide[25 + i] == 1)).sum() for i in range(5)]
    assert scores["annotator_1"]["iou"] == pytest.approx(np.mean(ious)), done.stdout


# ---------------------------------------------------------------- equations ---------------------------------

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
    square = masks[:, :, :60].byte()
    for rotate in (0, 90):
        args = argparse.Namespace(image_size=32, scale=[0.3, 1.0], jitter=[0, 0, 0, 0], flips="both", rotate=rotate)
        draws = common.Draws(0, 4, torch.arange(4), torch.device("cpu"))
        images, targets = segment.train_view(square[..., None] * 255, square, draws, args, [0] * 3, [1] * 3)
        assert images.shape == (4, 3, 32, 32) and targets.shape == (4, 32, 32)
        assert ((images[:, 0] > 0.5) != targets.bool()).float().mean() < 0.02


def slow_hausdorff(a, b, unit=(1, 1)):
    """The definition, pixel by pixel; unit: height and width of a pixel."""
    def edge(mask):
        wide = np.pad(mask, 1)
        return [(y * unit[0], x * unit[1]) for y, x in zip(*np.nonzero(mask))
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
    scores = segment.score_masks(pixels, ["background", "one", "two"])
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
        assert scores["classes"][name]["hd95"] is None and scores["classes"][name]["hd95_n"] == 0
        assert scores["classes"][name]["n"] == len(iou)
        assert scores["classes"][name]["lesions"] == sum((t == c).any() for t, s in masks)
        assert scores["classes"][name]["found"] == sum(((t == c) & (s == c)).any() for t, s in masks)
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
    """Pixels within 2 rows and 2 columns of each other are one region."""
    rng = np.random.default_rng(3)
    for _ in range(6):
        mask, todo, sizes = blobs(rng, count=5), set(), []
        todo = {*zip(*np.nonzero(mask))}
        while todo:
            front, size = [todo.pop()], 0
            while front:
                y, x = front.pop()
                size += 1
                near = {(y + dy, x + dx) for dy in range(-2, 3) for dx in range(-2, 3)} & todo
                todo -= near
                front += near
            sizes.append(size)
        labels = segment.components(torch.from_numpy(mask.copy()))
        assert torch.equal(labels > 0, torch.from_numpy(mask.copy()))
        assert torch.bincount(labels.flatten())[1:].tolist() == sorted(sizes, reverse=True)
    line = torch.zeros(9, 30, dtype=torch.bool)
    line[4, ::2] = True  # a vessel that resampling has broken
    line[8, 0] = True
    assert segment.components(line).max() == 2 and (segment.components(line)[4, ::2] == 1).all()
    line[4, 12] = False  # 3 pixels without any: two pieces
    assert segment.components(line).max() == 3
    truth, said = torch.zeros(2, 30, 40, dtype=torch.bool)
    truth[2:12, 2:12], truth[20:24, 30:34] = True, True
    said[2:12, 2:12], said[20:24, 30:36] = True, True
    said[0, 0] = True  # nearer to the large region
    (near, [first]), (far, [second]) = segment.region_scores(truth, [said])
    assert near == 0 and first == pytest.approx(100 / 101) and second == pytest.approx(16 / 24)
    assert far == pytest.approx(np.hypot(20 - 11, 30 - 11))
    # in pixels of a source that is high and narrow: also what a predicted pixel is nearest to
    said[4, 24] = True  # 13 columns from the large region, 16 rows and 6 columns from the small one
    far, (small, perfect, missed) = segment.region_scores(truth, [said, truth, ~truth], (0.5, 2.0))[1]
    assert far == pytest.approx(np.hypot(0.5 * (20 - 11), 2 * (30 - 11))) and small == pytest.approx(16 / 25)
    assert perfect == 1 and missed == 0
    assert segment.region_scores(truth, [said])[1][1] == pytest.approx([16 / 24])


def test_head_on_narrow_maps_and_any_backbone():
    """ReachConv is the convolution it replaces, gradients too; every kind of backbone gives a map."""
    for rate, size in ((12, (14, 14)), (3, (5, 4)), (9, (8, 8)), (1, (6, 6))):
        plain = torch.nn.Conv2d(6, 4, 3, padding=rate, dilation=rate, bias=False)
        x = torch.randn(2, 6, *size, requires_grad=True)
        y = plain(x)
        wanted = [y, *torch.autograd.grad(y.square().sum(), (x, plain.weight))]
        y = segment.ReachConv(plain)(x)
        for a, b in zip(wanted, [y, *torch.autograd.grad(y.square().sum(), (x, plain.weight))]):
            assert torch.allclose(a, b, atol=1e-4)
    for arch, stride, side in (("test_vit", 8, 64), ("test_resnet", 8, 64), ("test_resnet", 16, 64),
                               ("test_convnext", 8, 64), ("swin_tiny_patch4_window7_224", 8, 224)):
        model, _ = segment.build_segmenter(arch, "random", side, stride, 3)
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
    prepare(Path(os.environ["MEDVIT_DATA"]) / "ph2", "data", "--side", "96", cwd=tmp_path)
    done = stage("segment.py", *FAST, "--image-size", "96", "--epochs", "3", "--batch-size", "10", "--output", "run",
                 cwd=tmp_path)
    result = metrics(tmp_path / "run")
    assert sum(result["counts"].values()) == 200
    assert result["test"]["iou"] > result["test"]["constant_iou"] + 0.1, done.stdout


@pytest.mark.parametrize("name", ["isic2018", "csaws"])
def test_the_papers_datasets(name, tmp_path):
    """One epoch on a fixture in the owners' layout. CSAW-S' annotators drew discs of radius 3, 4 and 5, so their
    majority is the second's."""
    from test_datasets import BUILD
    BUILD[name](tmp_path / "source")
    prepare("source", name, "--layout", name, cwd=tmp_path)
    stage("segment.py", *FAST, "--data", name, "--epochs", "1", "--batch-size", "2", "--output", "run", cwd=tmp_path)
    result = metrics(tmp_path / "run")
    assert result["dataset"] == name and result["metric"] == "iou"
    if name == "csaws":
        scores = result["test"]["annotators"]
        assert set(scores) == {"annotator_1", "annotator_2", "annotator_3", "majority"}
        assert scores["majority"] == scores["annotator_2"] != scores["annotator_3"]
        assert scores["annotator_1"]["iou"] == result["test"]["iou"]
