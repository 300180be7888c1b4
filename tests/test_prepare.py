"""prepare.py: tables, labels, splits, checks and the folder it writes, as commands on small sources."""
import argparse
import csv
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

import common
import prepare as script
import segment
from conftest import ROOT, TINY, metrics, prepare, refused, stage, table
from test_metrics import all_metrics
from test_prepare_files import write_dicom


def draw(path, seed=0, size=(24, 24)):
    """A small image file of noise, another one for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng([7, seed]).integers(0, 256, size, dtype=np.uint8)).save(path)


def write_source(folder, head, rows):
    """A labels.csv in a folder, with an image for each of its rows."""
    for i, row in enumerate(rows):
        if not (folder / row[0]).exists():
            draw(folder / row[0], i)
    with open(folder / "labels.csv", "w", newline="") as out:
        csv.writer(out).writerows([head, *rows])


def labels_of(folder):
    """{image: label} of a prepared folder."""
    return {row["image"]: row["label"] for row in table(folder / "labels.csv")}


def splits_of(folder):
    """{split: number of images} of a prepared folder."""
    return dict(Counter(row["split"] for row in table(folder / "labels.csv")))


@pytest.fixture
def small(tmp_path):
    """source/labels.csv: image, label, group, split of 40 images in two classes."""
    rows = [[f"{i}.png", "ab"[i % 2], f"p{i // 2}", ("train", "train", "val", "test")[i // 10]] for i in range(40)]
    write_source(tmp_path / "source", ["image", "label", "group", "split"], rows)
    return tmp_path


# ---------------------------------------------------------------- tables and labels -------------------------

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_of_every_program_are_read(tmp_path, encoding, separator):
    """Excel's encodings and separators, blanks around heads, empty rows at the end, Windows paths, CRLF."""
    for i in range(20):
        draw(tmp_path / "source" / "pictures" / f"{i}.png", i)
    rows = [[f"pictures\\{i}.png", ("négatif", " positif ")[i % 2]] for i in range(20)]
    lines = [separator.join(row) for row in [["image", " label"], *rows, ["", ""], ["", ""]]]
    (tmp_path / "source" / "labels.csv").write_bytes("\r\n".join(lines).encode(encoding))
    done = prepare("source", "data", cwd=tmp_path)
    assert Counter(labels_of(tmp_path / "data").values()) == {"négatif": 10, "positif": 10}
    assert set(labels_of(tmp_path / "data")) == {f"pictures/{i}.png" for i in range(20)}
    assert ("cp1252" in done.stdout) == (encoding == "cp1252")


def test_ids_without_a_suffix(small):
    text = (small / "source" / "labels.csv").read_text()
    (small / "source" / "labels.csv").write_text(text.replace(".png", ""))
    prepare("source", "data", cwd=small)
    assert set(labels_of(small / "data")) == {f"{i}.png" for i in range(40)}
    Image.open(small / "source" / "3.png").save(small / "source" / "3.jpg")
    refused(prepare("source", "again", cwd=small, check=False), "'3' may be", "3.jpg", "3.png")


def test_what_a_table_lacks_is_named(small):
    source = small / "source"
    refused(prepare("source", "x", "--label-column", "grade", cwd=small, check=False), "no column 'grade'",
            "separated by ','", "'image', 'label'")
    refused(prepare("source", "x", "--split-column", "label", cwd=small, check=False), "none of train, val, test")
    refused(prepare("source", "x", "--label-column", "label,group", cwd=small, check=False), "0 or 1", "0.png")
    refused(prepare("source", "x", "--csv", "none.csv", cwd=small, check=False), "none.csv", "no such table")
    text = (source / "labels.csv").read_text()
    (source / "labels.csv").write_text(text + "gone1.png,a,,train\ngone2.png,b,,train\n")
    refused(prepare("source", "x", cwd=small, check=False), "2 of 42 listed images", "gone1.png", "gone2.png",
            "--skip-broken")
    done = prepare("source", "x", "--skip-broken", cwd=small)
    assert "left out: 2 of 42" in done.stdout and sum(splits_of(small / "x").values()) == 40
    assert json.loads((small / "x" / "dataset.json").read_text())["left_out"]["missing"] == ["gone1.png", "gone2.png"]
    draw(source / "unlisted.png", 99)
    assert "1 images are not listed" in prepare("source", "y", "--skip-broken", cwd=small).stdout


@pytest.mark.parametrize("missing", ["", " ", "nan", "NA", "N/A"])
def test_missing_labels_are_named(small, missing):
    text = (small / "source" / "labels.csv").read_text()
    (small / "source" / "labels.csv").write_text(text.replace("\n3.png,b", f"\n3.png,{missing}"))
    refused(prepare("source", "x", cwd=small, check=False), "1 images have no label", "3.png", "--skip-broken")
    prepare("source", "x", "--skip-broken", cwd=small)
    assert len(labels_of(small / "x")) == 39 and set(labels_of(small / "x").values()) == {"a", "b"}
    lines = [line.replace(",a,", f",{missing},").replace(",b,", f",{missing},") for line in text.splitlines()]
    (small / "source" / "labels.csv").write_text("\n".join(lines))
    refused(prepare("source", "y", "--skip-broken", cwd=small, check=False), "40 images have no label")


@pytest.mark.parametrize("first, second", [("melanoma", "Melanoma"), ("No DR", "NoDR"), ("0", "0.0"), ("1", "01")])
def test_spellings_of_one_class_are_refused(tmp_path, first, second):
    rows = [[f"{i}.png", (first, second, "other")[i % 3]] for i in range(30)]
    write_source(tmp_path / "source", ["image", "label"], rows)
    refused(prepare("source", "x", cwd=tmp_path, check=False), repr(first), repr(second), "one class")


def test_an_image_that_is_listed_twice_counts_once(small):
    source = small / "source"
    text = (source / "labels.csv").read_text()
    (source / "labels.csv").write_text(text + "3.png,b,p1,train\n./5.png,b,p2,train\n")
    done = prepare("source", "x", cwd=small)
    assert "2 images are listed more than once" in done.stdout and "3.png" in done.stdout
    assert len(table(small / "x" / "labels.csv")) == 40
    (source / "labels.csv").write_text(text + "3.png,a,p1,train\n")
    refused(prepare("source", "y", cwd=small, check=False), "listed twice", "3.png", "a and b")
    (source / "labels.csv").write_text(text + "3.png,b,p1,test\n")
    refused(prepare("source", "y", "--split-column", "split", cwd=small, check=False), "3.png", "test")


def test_classes_in_their_order_and_by_their_names(tmp_path):
    write_source(tmp_path / "source", ["image", "grade", "word"],
                 [[f"{i}.png", (10, 2, 1)[i % 3], ("Severe", "Mild", "No DR")[i % 3]] for i in range(30)])

    def facts(*args):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        prepare("source", "x", *args, cwd=tmp_path)
        found = json.loads((tmp_path / "x" / "dataset.json").read_text())
        return found["classes"], found["ordinal"]
    assert facts("--label-column", "grade") == (["1", "2", "10"], True)
    assert facts("--label-column", "word") == (["Mild", "No DR", "Severe"], False)
    assert facts("--label-column", "word", "--classes", "No DR,Mild,Severe") == (["No DR", "Mild", "Severe"], False)
    assert facts("--label-column", "word", "--classes", "No DR,Mild,Severe", "--ordinal") == (
        ["No DR", "Mild", "Severe"], True)
    refused(prepare("source", "y", "--label-column", "word", "--classes", "No DR,Mild", cwd=tmp_path, check=False),
            "--classes No DR,Mild", "Severe")
    rows = [[f"{i}.png", i % 3] for i in range(30)]
    write_source(tmp_path / "source", ["image", "label"], rows)
    assert facts("--classes", "none,mild,severe") == (["none", "mild", "severe"], True)
    assert labels_of(tmp_path / "x")["1.png"] == "mild"


def test_kappa_is_for_ordered_classes(tmp_path):
    """Every prediction one grade too high: 0.80 in the order of the grades; alphabetical it is not reported."""
    grades = ["No_DR", "Mild", "Moderate", "Severe", "Proliferate_DR"]
    truth = np.tile(np.arange(5), 10)
    scores = np.eye(5)[(truth + 1).clip(max=4)]
    assert all_metrics("classes", grades, truth, scores, ordinal=True)["quadratic_kappa"] == pytest.approx(0.8)
    assert "quadratic_kappa" not in all_metrics("classes", grades, truth, scores, ordinal=False)


def test_one_hot_columns_are_classes(tmp_path):
    rows = [[f"{i}.png", *(float(k == i % 3) for k in range(3))] for i in range(30)]
    write_source(tmp_path / "source", ["image", "x", "y", "z"], rows)
    done = prepare("source", "data", "--label-column", "x,y,z", cwd=tmp_path)
    assert "exactly one of the labels" in done.stdout and labels_of(tmp_path / "data")["4.png"] == "y"
    rows[0][2] = 1.0  # one image with two: labels
    write_source(tmp_path / "source", ["image", "x", "y", "z"], rows)
    prepare("source", "many", "--label-column", "x,y,z", cwd=tmp_path)
    first = table(tmp_path / "many" / "labels.csv")[0]
    assert (first["x"], first["y"], first["z"]) == ("1", "1", "0")


def test_one_class_is_said_and_refused_by_classifiers(tmp_path):
    write_source(tmp_path / "source", ["image", "label"], [[f"{i}.png", "yes"] for i in range(20)])
    assert "there is one class, 'yes'" in prepare("source", "data", cwd=tmp_path).stdout
    for name in ("finetune.py", "knn_eval.py"):
        refused(stage(name, "--data", "data", "--arch", "test_vit", *TINY, cwd=tmp_path, check=False), "one class, yes")


def test_tables_that_mean_two_things_are_refused(small):
    """A head that stands twice, a row longer than the head, an image with two patients; not a separator in a head."""
    file = small / "source" / "labels.csv"
    text = file.read_text()
    file.write_text(text.replace("group,split", "label,split", 1))
    refused(prepare("source", "x", cwd=small, check=False), "'label' stands twice")
    file.write_text(text.replace("3.png,b,p1,train", "3.png,b, or so,p1,train"))
    refused(prepare("source", "x", cwd=small, check=False), "3.png", "more cells than the head")
    file.write_text(text.replace("3.png,b,p1,train", "3.png,b,p1,train,,"))  # blank ones are Excel's
    prepare("source", "blank", cwd=small)
    file.write_text(text + "3.png,b,p7,train\n")
    refused(prepare("source", "x", "--group-column", "group", cwd=small, check=False), "3.png", "p1", "p7")
    file.write_text(text.replace(",", ";").replace("group;split", '"group, or patient";split', 1))
    prepare("source", "quoted", cwd=small)
    assert labels_of(small / "quoted") == labels_of(small / "blank")


def test_npz_labels_and_order(tmp_path):
    """A vector of labels will do; halves of a class are refused; what numpy stores by columns is never read by rows."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    labels = np.arange(20) % 2
    np.savez(tmp_path / "plain.npz", train_images=images, train_labels=labels)
    prepare("plain.npz", "plain", "--classes", "benign,malignant", cwd=tmp_path)
    rows = table(tmp_path / "plain" / "labels.csv")
    assert [row["label"] for row in rows] == ["benign", "malignant"] * 10
    assert splits_of(tmp_path / "plain") == {"train": 14, "val": 3, "test": 3}
    assert (np.load(tmp_path / "plain" / "images.npy")[..., 0] == images).all()
    np.savez(tmp_path / "half.npz", train_images=images, train_labels=labels + 0.5)
    refused(prepare("half.npz", "x", cwd=tmp_path, check=False), "half.npz", "whole numbers")
    np.savez(tmp_path / "columns.npz", train_images=np.asfortranarray(images), train_labels=labels)
    done = prepare("columns.npz", "columns", cwd=tmp_path, check=False)
    if done.returncode == 0:
        assert (np.load(tmp_path / "columns" / "images.npy")[..., 0] == images).all()
    else:
        refused(done, "columns.npz", "Fortran order")
    np.savez(tmp_path / "lacks.npz", train_images=images, train_labels=labels, val_images=images)
    refused(prepare("lacks.npz", "x", cwd=tmp_path, check=False), "lacks.npz",
            "found train_images, train_labels, val_images")


# ---------------------------------------------------------------- files -------------------------------------

def class_folders(root, count=10, classes="ab"):
    """root/CLASS/NUMBER.png."""
    for name in classes:
        for i in range(count):
            draw(root / name / f"{i}.png", 1000 * (1 + ord(name[0])) + i)


def test_links_to_folders_are_followed_wherever_they_stand(tmp_path):
    """A folder that two links name stands twice, as the check of duplicates says; one that a link in it names, once."""
    source = tmp_path / "source"
    for split in ("train", "val"):
        class_folders(source / split)
    draw(tmp_path / "far" / "scan.png", 5)
    for place in ("train/a/patient", "train/b/patient"):
        (source / place).symlink_to(tmp_path / "far")
    (source / "test").symlink_to("val")
    (source / "train" / "a" / "round").symlink_to(source)
    done = prepare("source", "data", cwd=tmp_path)
    found = labels_of(tmp_path / "data")
    assert found["train/a/patient/scan.png"] == "a" and found["train/b/patient/scan.png"] == "b"
    assert splits_of(tmp_path / "data") == {"train": 22, "val": 20, "test": 20}
    assert "20 of 20 test images also stand in val" in done.stdout


def test_names_that_are_not_utf8_are_named(tmp_path):
    class_folders(tmp_path / "source")
    os.rename(tmp_path / "source" / "a", os.fsencode(tmp_path / "source") + b"/n\xe9gatif")  # unzipped elsewhere
    refused(prepare("source", "data", cwd=tmp_path, check=False), "10 names", "UTF-8", "gatif/0.png")
    assert not (tmp_path / "data").exists()


def test_folders_without_labels(tmp_path):
    """Images alone, and --layout flat where folders are no classes: for DINO, not for classifiers."""
    class_folders(tmp_path / "nested")
    shutil.copytree(tmp_path / "nested" / "a", tmp_path / "alone")
    for source, args, count in (("alone", [], 10), ("nested", ["--layout", "flat"], 20)):
        prepare(source, f"of-{source}", *args, cwd=tmp_path)
        rows = table(tmp_path / f"of-{source}" / "labels.csv")
        assert len(rows) == count and list(rows[0]) == ["image", "split", "height", "width"]
        done = stage("knn_eval.py", "--data", f"of-{source}", "--arch", "test_vit", *TINY, cwd=tmp_path, check=False)
        refused(done, f"of-{source} has no labels")
    stage("pretrain_dino.py", "--data", "of-alone", "--arch", "test_vit", "--epochs", "1", "--batch-size", "4",
          "--out-dim", "64", "--output", "dino", *TINY, cwd=tmp_path)
    assert (tmp_path / "dino" / "model.pt").exists()


def test_a_test_folder_without_class_folders_is_said_as_that(tmp_path):
    class_folders(tmp_path / "source" / "train")
    for i in range(10):
        draw(tmp_path / "source" / "test" / f"{i}.png", i)
    refused(prepare("source", "data", cwd=tmp_path, check=False), "10 images stand in no class folder", "test/0.png")


def write_deep_tiff(path, pixels):
    """A TIFF of (H, W, 3) uint16, which Pillow does not write."""
    height, width, _ = pixels.shape
    content = pixels.astype("<u2").tobytes()
    # (tag, type, count, value or its place)
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2),
               (273, 4, 1, 128), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(content))]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    head += b"".join(struct.pack("<HHII", *entry) for entry in entries)
    path.write_bytes(head + struct.pack("<I3H", 0, 16, 16, 16) + content)


def test_deep_colours_that_cannot_be_read_are_named(tmp_path):
    """Pillow would hand over their upper 8 bits: black, of values up to 255."""
    class_folders(tmp_path / "source")
    write_deep_tiff(tmp_path / "source" / "a" / "deep.tif", np.random.default_rng(0).integers(0, 256, (24, 24, 3)))
    with Image.open(tmp_path / "source" / "a" / "deep.tif") as image:
        assert image.mode == "RGB" and np.asarray(image).max() == 0
    refused(prepare("source", "data", cwd=tmp_path, check=False), "a/deep.tif", "16 bits a channel", "PNG")


def test_dicom_of_rarer_kinds(tmp_path):
    """Signed values, an empty window, a window seen through MONOCHROME1, a palette, a DICOMDIR beside the images."""
    ramp = np.linspace(0, 4000, 400).reshape(20, 20).astype(np.uint16)
    signed = ramp.astype(np.int16) - 1000
    window = {"WindowCenter": 500, "WindowWidth": 1000}
    write_dicom(tmp_path / "signed.dcm", signed.view(np.uint16), PixelRepresentation=1, **window)
    expected = 255 * np.clip((signed - 499.5) / 999 + 0.5, 0, 1)
    assert np.abs(script.read_image(tmp_path / "signed.dcm")[0][..., 0] - expected).max() <= 0.51
    write_dicom(tmp_path / "inverted.dcm", ramp, PhotometricInterpretation="MONOCHROME1", **window)
    expected = 255 - 255 * np.clip((ramp - 499.5) / 999 + 0.5, 0, 1)
    assert np.abs(script.read_image(tmp_path / "inverted.dcm")[0][..., 0] - expected).max() <= 0.51
    write_dicom(tmp_path / "empty.dcm", ramp, WindowCenter=None, WindowWidth=None)
    assert np.abs(script.read_image(tmp_path / "empty.dcm")[0][..., 0] - ramp * (255 / 4000)).max() <= 0.51
    colours = np.random.default_rng(0).integers(0, 256, (3, 256)).astype("<u2")
    write_dicom(tmp_path / "plain.dcm", ramp // 16, PhotometricInterpretation="PALETTE COLOR", BitsStored=8, HighBit=7)
    data = pydicom.dcmread(tmp_path / "plain.dcm")
    for i in range(3):
        data.add_new(0x00281101 + i, "US", [256, 0, 16])
        data.add_new(0x00281201 + i, "OW", (colours[i] * 257).tobytes())
    data.save_as(tmp_path / "palette.dcm")
    assert (script.read_image(tmp_path / "palette.dcm")[0] == colours.T[ramp // 16]).all()
    for i in range(12):
        write_dicom(tmp_path / "source" / "ab"[i % 2] / f"IM{i}", np.roll(ramp, i))
    shutil.copy(tmp_path / "source" / "a" / "IM0", tmp_path / "source" / "a" / "DICOMDIR")
    prepare("source", "data", cwd=tmp_path)
    assert set(labels_of(tmp_path / "data")) == {f"{'ab'[i % 2]}/IM{i}" for i in range(12)}


# ---------------------------------------------------------------- splits ------------------------------------

def carved(labels, groups=None, seed=42, shares=(0.7, 0.15, 0.15)):
    """The splits that prepare.carve makes of labels: class names, or a matrix."""
    names = [str(i) for i in range(len(labels))]
    classes = sorted(set(labels)) if isinstance(labels, list) else [f"L{k}" for k in range(labels.shape[1])]
    rows = [script.Row(name, name, label, group=group) for name, label, group in zip(names, labels, groups or [None] * 1500)]
    source = script.Source(rows, classes, multilabel=not isinstance(labels, list))
    return script.carve(source, argparse.Namespace(split=list(shares), split_seed=seed))


@pytest.mark.parametrize("seed", range(8))
def test_several_labels_are_shared_out_in_proportion(seed):
    """Sizes within one image; each label within 12 % of its images, or 2, of its share; those of 7 or more everywhere."""
    rng = np.random.default_rng(seed)
    count, labels = int(rng.integers(100, 400)), int(rng.integers(3, 14))
    flags = (rng.random((count, labels)) < np.linspace(0.05, 0.5, labels)).astype(np.uint8)
    splits = np.array(carved(flags, seed=seed))
    for name, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        chosen = splits == name
        assert abs(chosen.sum() - share * count) <= 1
        for label in range(labels):
            total = flags[:, label].sum()
            assert abs(flags[chosen, label].sum() - share * total) <= max(2, 0.12 * total), (name, label)
            assert total < 7 or flags[chosen, label].any()


def test_the_case_of_300_images_and_10_labels():
    rng = np.random.default_rng(0)
    flags = np.array([rng.random(10) < np.linspace(.05, .5, 10) for _ in range(300)]).astype(np.uint8)
    splits = np.array(carved(flags))
    assert Counter(splits.tolist()) == {"train": 210, "val": 45, "test": 45}
    for label in range(10):
        for name in ("val", "test"):
            held, fair = flags[splits == name, label].sum(), 0.15 * flags[:, label].sum()
            assert held >= 1 and abs(held - fair) <= 3, (label, name)


def test_labels_are_shared_out_better_than_at_random():
    """Over 20 sets of 300 images and 10 labels, the mean distance of a label's count from its share is below one image
    and less than half of what a random split has."""
    ours, at_random = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        flags = (rng.random((300, 10)) < np.linspace(0.05, 0.5, 10)).astype(np.uint8)
        splits = np.array(carved(flags, seed=seed))
        shuffled = rng.permutation(splits)
        for name, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
            ours.append(np.abs(flags[splits == name].sum(0) - share * flags.sum(0)))
            at_random.append(np.abs(flags[shuffled == name].sum(0) - share * flags.sum(0)))
    assert np.mean(ours) < 1 and np.mean(ours) < np.mean(at_random) / 2


def test_small_classes():
    thirty = carved([f"c{i // 3:02d}" for i in range(90)])
    assert Counter(thirty) == {"train": 30, "val": 30, "test": 30}
    assert all(set(thirty[i:i + 3]) == {"train", "val", "test"} for i in range(0, 90, 3))
    labels = ["many"] * 60 + ["three"] * 3 + ["two"] * 2 + ["one"]
    splits = carved(labels)
    assert {s for s, label in zip(splits, labels) if label == "three"} == {"train", "val", "test"}
    assert {s for s, label in zip(splits, labels) if label in ("one", "two")} == {"train"}
    dozens = [f"c{i // 12:03d}" for i in range(1200)]
    splits = carved(dozens)
    assert Counter(splits) == {"train": 840, "val": 180, "test": 180}
    held = Counter(zip(dozens, splits))
    assert all(1 <= held[name, part] <= 3 for name in set(dozens) for part in ("val", "test"))


def test_small_classes_are_warned_of(tmp_path):
    write_source(tmp_path / "source", ["image", "label"], [[f"{i}.png", "rare" if i < 2 else "abc"[i % 3]] for i in range(40)])
    done = prepare("source", "data", cwd=tmp_path)
    assert done.stdout.count("fewer than 3 images") == 1 and "rare" in done.stdout
    assert {row["split"] for row in table(tmp_path / "data" / "labels.csv") if row["label"] == "rare"} == {"train"}


def test_groups_stay_whole_and_near_their_shares():
    """A patient with half of all images: no val or test below 7.5 %, whatever the seed."""
    groups = ["big"] * 100 + [f"p{i // 5}" for i in range(100)]
    labels = ["a"] * 50 + ["b"] * 50 + ["ab"[i // 5 % 2] for i in range(100)]
    for seed in range(60):
        splits = carved(labels, groups, seed)
        counts = Counter(splits)
        assert min(counts["val"], counts["test"]) >= 15 and len(counts) == 3, (seed, counts)
        assert len(set(zip(groups, splits))) == len(set(groups))
    assert Counter(carved(["a", "b"] * 6, ["x"] * 8 + ["y"] * 2 + ["z"] * 2)) == {"train": 8, "val": 2, "test": 2}
    rng = np.random.default_rng(3)
    flags = (rng.random((200, 5)) < 0.3).astype(np.uint8)
    groups = [f"p{v}" for v in rng.integers(0, 60, 200)]
    splits = carved(flags, groups)
    assert len(set(zip(groups, splits))) == len(set(groups))
    assert abs(splits.count("val") - 30) <= 4 and abs(splits.count("test") - 30) <= 4


def test_blank_groups_are_groups_of_their_own(tmp_path):
    rows = [[f"{i}.png", "ab"[i % 2], "" if i % 3 else f"p{i}"] for i in range(120)]
    write_source(tmp_path / "source", ["image", "label", "patient"], rows)
    done = prepare("source", "data", "--group-column", "patient", cwd=tmp_path)
    assert "80 images have no group" in done.stdout
    assert splits_of(tmp_path / "data") == {"train": 84, "val": 18, "test": 18}
    assert len({row["group"] for row in table(tmp_path / "data" / "labels.csv")}) == 120


def test_a_missing_val_takes_whole_patients_of_train(small):
    """40 images of 20 patients, 10 of them given as test: val comes out of the others, no patient is torn."""
    file = small / "source" / "labels.csv"
    file.write_text(file.read_text().replace(",val", ",train"))
    prepare("source", "data", "--split-column", "split", "--group-column", "group", cwd=small)
    rows = table(small / "data" / "labels.csv")
    assert {row["image"] for row in rows if row["split"] == "test"} == {f"{i}.png" for i in range(30, 40)}
    assert len({(row["group"], row["split"]) for row in rows}) == 20
    assert splits_of(small / "data") == {"train": 26, "val": 4, "test": 10}


def test_blank_splits_are_in_none(small):
    """Rows with a blank split, as --leakage drop leaves them, are counted, kept through another preparation, and seen
    by no stage."""
    shutil.copy(small / "source" / "0.png", small / "source" / "30.png")
    prepare("source", "first", "--split-column", "split", "--leakage", "drop", cwd=small)
    done = prepare("source", "data", "--csv", "first/labels.csv", "--split-column", "split", cwd=small)
    assert "1 images have a blank split" in done.stdout
    assert splits_of(small / "data") == splits_of(small / "first") == {"train": 19, "": 1, "val": 10, "test": 10}
    stage("knn_eval.py", "--data", "data", "--arch", "test_vit", "--k", "1", "--output", "knn", *TINY, cwd=small)
    assert metrics(small / "knn")["counts"] == {"train": 19, "val": 10, "test": 10}
    file = small / "data" / "labels.csv"
    file.write_text(file.read_text().replace(",test,", ",,", 5))
    stage("finetune.py", "--data", "data", "--arch", "test_vit", "--epochs", "1", "--batch-size", "4", "--output",
          "run", *TINY, cwd=small)
    blank = {row["image"] for row in table(file) if row["split"] == ""}
    tested = {row["image"] for row in table(small / "run" / "predictions.csv")}
    assert len(blank) == 6 and len(tested) == 5 and not blank & tested


def test_a_group_in_two_splits(small):
    args = ["--split-column", "split", "--group-column", "group"]
    text = (small / "source" / "labels.csv").read_text()
    (small / "source" / "labels.csv").write_text(text.replace("39.png,b,p19,test", "39.png,b,p0,test"))
    refused(prepare("source", "x", *args, cwd=small, check=False), "1 groups", "p0 (test, train)", "--leakage drop")
    done = prepare("source", "x", *args, "--leakage", "drop", cwd=small)
    assert "taken out of train" in done.stdout and splits_of(small / "x") == {"train": 18, "val": 10, "test": 10, "": 2}
    prepare("source", "y", *args, "--leakage", "warn", cwd=small)
    assert splits_of(small / "y") == {"train": 20, "val": 10, "test": 10}


def test_splits_as_given_and_what_is_missing(small):
    prepare("source", "given", "--split-column", "split", cwd=small)
    assert splits_of(small / "given") == {"train": 20, "val": 10, "test": 10}
    done = prepare("source", "carved", cwd=small)
    assert splits_of(small / "carved") == {"train": 28, "val": 6, "test": 6}
    assert "\"split\"" in done.stdout and "--split-column split" in done.stdout  # is said not to be used
    prepare("source", "again", cwd=small)
    assert (small / "again" / "labels.csv").read_bytes() == (small / "carved" / "labels.csv").read_bytes()
    prepare("source", "external", "--split", "0", "0", "1", cwd=small)
    assert splits_of(small / "external") == {"test": 40}
    text = (small / "source" / "labels.csv").read_text().replace(",val", ",train")
    (small / "source" / "labels.csv").write_text(text)
    prepare("source", "half", "--split-column", "split", cwd=small)
    assert splits_of(small / "half") == {"train": 26, "val": 4, "test": 10}  # of train alone
    for shares in (("0.5", "0.5", "0.5"), ("nan", "0", "1"), ("1.5", "-0.5", "0")):
        refused(prepare("source", "x", "--split", *shares, cwd=small, check=False), "--split", "sum to 1")


def test_a_class_without_a_training_image(small):
    text = (small / "source" / "labels.csv").read_text()
    (small / "source" / "labels.csv").write_text(text + "0.jpg,strange,p99,test\n")
    draw(small / "source" / "0.jpg", 77)
    refused(prepare("source", "x", "--split-column", "split", cwd=small, check=False), "no training image",
            "'strange'")
    for i in (1, 3):  # its training images turn out to be broken
        (small / "source" / f"{i}.png").write_text("no image")
    rows = [[f"{i}.png", "rare" if i in (1, 3, 25) else "ab"[i % 2], "", ("train", "train", "val", "test")[i // 10]]
            for i in range(40)]
    write_source(small / "source", ["image", "label", "group", "split"], rows)
    refused(prepare("source", "x", "--split-column", "split", "--skip-broken", cwd=small, check=False),
            "no training image", "'rare'")
    assert not (small / "x").exists()


def test_every_stage_sees_one_split(tmp_path):
    """The images that segmentation tests are those that fine-tuning and k-NN test."""
    source, rng = tmp_path / "source", np.random.default_rng(0)
    (source / "masks").mkdir(parents=True)
    for i in range(40):
        draw(source / "images" / f"{i}.png", i, (32, 32))
        Image.fromarray((rng.random((32, 32)) > 0.5).astype(np.uint8) * 255).save(source / "masks" / f"{i}.png")
    write_source(source, ["image", "label", "patient"], [[f"images/{i}.png", "ab"[i % 2], f"p{i // 4}"] for i in range(40)])
    prepare("source", "data", "--group-column", "patient", cwd=tmp_path)
    args = ["--data", "data", "--arch", "test_vit", *TINY]
    stage("finetune.py", *args, "--epochs", "1", "--batch-size", "8", "--output", "a", cwd=tmp_path)
    stage("segment.py", *args, "--epochs", "1", "--batch-size", "8", "--output", "b", cwd=tmp_path)
    tested = [{(row["image"], row["group"]) for row in table(tmp_path / name / "predictions.csv")} for name in "ab"]
    assert tested[0] == tested[1] and len(tested[0]) == metrics(tmp_path / "a")["counts"]["test"]
    assert metrics(tmp_path / "a")["counts"] == metrics(tmp_path / "b")["counts"]


# ---------------------------------------------------------------- duplicates --------------------------------

def test_duplicates_are_paired_named_and_dropped(small):
    source = small / "source"
    shutil.copy(source / "0.png", source / "30.png")  # train a, test a
    shutil.copy(source / "1.png", source / "32.png")  # train b, test a
    shutil.copy(source / "20.png", source / "35.png")  # val a, test b
    args = ["--split-column", "split"]
    done = prepare("source", "x", *args, cwd=small)
    assert "2 of 10 test images also stand in train" in done.stdout and "1 of 10 test images also stand in val" in done.stdout
    assert "2 of these pairs have different labels" in done.stdout
    pairs = [tuple(row.values()) for row in table(small / "x" / "duplicates.csv")]
    assert pairs == [("32.png", "test", "a", "1.png", "train", "b"), ("35.png", "test", "b", "20.png", "val", "a"),
                     ("30.png", "test", "a", "0.png", "train", "a")]
    leakage = json.loads((small / "x" / "dataset.json").read_text())["leakage"]
    assert leakage == {"test_in_train": 2, "val_in_train": 0, "test_in_val": 1}
    prepare("source", "y", *args, "--leakage", "drop", cwd=small)
    gone = {row["image"] for row in table(small / "y" / "labels.csv") if row["split"] == ""}
    assert gone == {"0.png", "1.png", "20.png"}
    refused(prepare("source", "z", *args, "--leakage", "error", cwd=small, check=False), "3 pairs", "--leakage drop")
    assert not (small / "z").exists() and not list(small.glob("*.partial"))


# ---------------------------------------------------------------- the folder --------------------------------

def test_what_is_written(small):
    prepare("source", "data", "--group-column", "group", cwd=small)
    folder = small / "data"
    assert {path.name for path in folder.iterdir()} == {"images.npy", "labels.csv", "dataset.json", "contact_sheet.png"}
    images, rows = np.load(folder / "images.npy", mmap_mode="r"), table(folder / "labels.csv")
    assert images.shape == (40, 24, 24, 1) and images.dtype == np.uint8
    assert list(rows[0]) == ["image", "split", "group", "height", "width", "label"]
    for pixels, row in zip(images, rows):
        with Image.open(small / "source" / row["image"]) as image:
            assert (pixels[..., 0] == np.asarray(image)).all()
        assert (row["height"], row["width"]) == ("24", "24")
    facts = json.loads((folder / "dataset.json").read_text())
    train = images[[i for i, row in enumerate(rows) if row["split"] == "train"]] / 255
    assert facts["mean"] == pytest.approx([train.mean()] * 3, abs=1e-4)
    assert facts["std"] == pytest.approx([train.std()] * 3, abs=1e-4)
    assert (facts["name"], facts["side"], facts["fit"], facts["channels"]) == ("data", 24, "squash", 1)
    assert facts["classes"] == ["a", "b"] and "prepare.py" in facts["command"]
    assert facts["metric"] is None and common.open_dataset(folder).metric == "roc_auc"  # what fits two classes


def test_any_number_of_processes_writes_the_same(small):
    for workers in ("0", "2"):
        prepare("source", f"w{workers}", "--workers", workers, cwd=small)
    for name in ("images.npy", "labels.csv"):
        assert (small / "w0" / name).read_bytes() == (small / "w2" / name).read_bytes()


def test_prepared_already_or_otherwise(small):
    prepare("source", "data", cwd=small)
    before = (small / "data" / "images.npy").stat().st_mtime_ns
    assert "prepared already" in prepare("source", "data", cwd=small).stdout
    refused(prepare("source", "data", "--fit", "pad", cwd=small, check=False), "prepared otherwise", "fit")
    assert (small / "data" / "images.npy").stat().st_mtime_ns == before
    shutil.copytree(small / "data", small / "data.old")  # the user's own copy
    prepare("source", "data", "--fit", "pad", "--overwrite", cwd=small)
    assert json.loads((small / "data" / "dataset.json").read_text())["fit"] == "pad"
    assert json.loads((small / "data.old" / "dataset.json").read_text())["fit"] == "squash"
    assert not list(small.glob("*.partial")) and not list(small.glob(".*.old"))
    (small / "mine").mkdir()
    (small / "mine" / "letter.txt").write_text("dear")
    refused(prepare("source", "mine", cwd=small, check=False), "no folder that prepare.py made")
    assert (small / "mine" / "letter.txt").exists()


def test_nothing_of_the_users_is_replaced(small):
    """--output that is SOURCE, around it or in it, or anything that prepare.py did not make: refused, also with
    --overwrite."""
    (small / "mine").mkdir()
    (small / "mine" / "letter.txt").write_text("dear")
    (small / "file").write_text("dear")
    class_folders(small / "classes")
    before = sorted(small.rglob("*"))
    mistakes = [("source", "source", "is SOURCE"), ("source", "../" + small.name, "around it"),
                ("source/labels.csv", "source", "is SOURCE"), ("source", ".", "data/NAME"), ("demo", ".", "data/NAME"),
                ("source", "mine", "prepare.py"), ("source", "file", "prepare.py"),
                ("classes", "classes/data", "lies in SOURCE")]
    for source, output, words in mistakes:
        refused(prepare(source, output, "--overwrite", cwd=small, check=False), f"--output {output}", words)
        found = [path for path in sorted(small.rglob("*")) if not path.name.endswith(".lock")]
        assert found == before, (source, output)


def test_memory_does_not_grow_with_the_images(tmp_path, monkeypatch):
    """300 colour images of 96 x 96 are 8 MB; preparing them takes at most 1 MB more at its peak than 40 of them do."""
    rng, peaks = np.random.default_rng(0), {}
    monkeypatch.chdir(tmp_path)
    for count in (8, 40, 300):  # the first warms up what is imported and kept
        (tmp_path / f"source{count}").mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"source{count}" / f"{i}.bmp")
        command = ["prepare.py", f"source{count}", "--output", f"data{count}", "--workers", "0"]
        monkeypatch.setattr(sys, "argv", command)
        tracemalloc.start()
        script.main()
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert np.load(tmp_path / "data300" / "images.npy", mmap_mode="r").shape == (300, 96, 96, 3)
    assert peaks[300] - peaks[40] < 1e6, peaks


def start_preparing(cwd, *args):
    """prepare.py as a process of its own, once it has begun to write."""
    command = [sys.executable, str(ROOT / "prepare.py"), *args, "--workers", "1"]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen = b""
    while b"preparing:" not in seen or b"/300" not in seen:
        assert process.poll() is None, "it ended before it could be looked at"
        seen += process.stderr.read(1)
    return process


def test_killed_and_shared_builds(tmp_path):
    """SIGKILL leaves nothing that is taken for whole; of two at once the second waits and finds it built."""
    for i in range(300):
        draw(tmp_path / "source" / f"{i}.png", i, (300, 300))
    process = start_preparing(tmp_path, "source", "--output", "data")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "data").exists() and (tmp_path / "data.partial").exists()
    refused(stage("pretrain_dino.py", "--data", "data", *TINY, cwd=tmp_path, check=False), "no prepared folder")
    process = start_preparing(tmp_path, "source", "--output", "data")
    second = prepare("source", "data", cwd=tmp_path)
    assert "prepared already" in second.stdout
    assert process.wait() == 0 and process.communicate() is not None
    assert np.load(tmp_path / "data" / "images.npy", mmap_mode="r").shape == (300, 256, 256, 1)
    assert not (tmp_path / "data.partial").exists()


def test_a_full_disk_is_seen_before_decoding(small, monkeypatch, capsys):
    monkeypatch.chdir(small)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: argparse.Namespace(free=1000))
    monkeypatch.setattr(sys, "argv", ["prepare.py", "source", "--output", "data"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "GB are free" in message and message.count("\n") == 1
    assert not (small / "data").exists() and not (small / "data.partial").exists()


def test_edited_labels_are_other_data(small):
    prepare("source", "data", "--split-column", "split", cwd=small)
    first = common.open_dataset(small / "data")
    text = (small / "data" / "labels.csv").read_text()
    for change in (text.replace("0.png,train,24,24,a", "0.png,train,24,24,b", 1), text.replace("0.png,train", "0.png,val", 1),
                   text.replace("0.png,train", "0.png,", 1)):
        (small / "data" / "labels.csv").write_text(change)
        assert common.open_dataset(small / "data").fingerprint != first.fingerprint
    assert common.open_dataset(small / "data").counts == {"train": 19, "val": 10, "test": 10}
    (small / "data" / "labels.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())  # as Excel saves it
    assert common.open_dataset(small / "data").fingerprint == first.fingerprint


def test_the_prepared_split_can_be_sent(small):
    """labels.csv of another group's folder gives their split."""
    prepare("source", "theirs", "--split-seed", "7", cwd=small)
    prepare("source", "mine", "--csv", "theirs/labels.csv", "--split-column", "split", cwd=small)
    both = [[(row["image"], row["split"], row["label"]) for row in table(small / name / "labels.csv")]
            for name in ("theirs", "mine")]
    assert both[0] == both[1]


def test_a_large_table_opens(tmp_path):
    """As many rows and labels as CheXpert has, beside an images.npy of holes."""
    count, names = 224316, [f"label {k}" for k in range(14)]
    with open(tmp_path / "images.npy", "wb") as out:
        script.write_head(out, count, 8, 8, 1)
        out.truncate(out.tell() + count * 64)
    flags = (np.random.default_rng(0).random((count, 14)) < 0.2).astype(np.uint8)
    with open(tmp_path / "labels.csv", "w") as out:
        out.write(f"image,split,group,{','.join(names)}\n")
        for i, row in enumerate(flags.tolist()):
            out.write(f"{i}.jpg,{('train', 'val', 'test')[max(0, i % 10 - 7)]},p{i // 3},{','.join(map(str, row))}\n")
    dataset = common.open_dataset(tmp_path)
    assert dataset.task == "multilabel" and dataset.classes == names and (dataset.labels == flags).all()
    assert dataset.counts == {"train": 179454, "val": 22431, "test": 22431} and dataset.groups[-1] == "p74771"


def test_demo_has_masks_and_no_cue_of_it_is_sure(demo):
    """Neither the mean colour nor the size of its lesions gives a class away; a fifth of the images has two lesions."""
    images, masks = np.load(demo / "images.npy"), np.load(demo / "masks.npy")
    assert images.shape == (900, 128, 128, 3) and masks.shape == (900, 128, 128)
    drawn, outline = script.draw_lesion(5)
    assert (images[5] == drawn).all() and (masks[5] == outline).all()
    shares = masks.mean((1, 2))
    assert shares.min() > 0.02 and shares.max() < 0.6
    assert splits_of(demo) == {"train": 600, "val": 100, "test": 200}
    labels = np.arange(900) % 4
    colour = images.reshape(900, -1, 3).mean(1) / 255
    inside = (images * masks[..., None]).sum((1, 2)) / masks.sum((1, 2))[:, None] / 255
    for cue in (colour, inside, shares[:, None]):
        distance = np.linalg.norm(cue[:, None] - cue[None], axis=2)
        np.fill_diagonal(distance, np.inf)
        nearest = labels[np.argsort(distance, axis=1)[:, :20]]
        votes = np.array([np.bincount(row, minlength=4).argmax() for row in nearest])
        assert (votes == labels).mean() < 0.55, "20 nearest by one cue; chance is 0.25"
    regions = [int(segment.components(torch.from_numpy(mask > 0)).max()) for mask in masks[:200]]
    assert set(regions) == {1, 2} and 0.15 < regions.count(2) / 200 < 0.25


def test_the_example_of_the_readme(tmp_path):
    """README's dataset in ten lines, added to a copy of prepare.py; mini-MIAS lists an image twice."""
    text = (ROOT / "README.md").read_text()
    example = text[text.index("def index_mias"):]
    example = example[:example.index("```")]
    for name in ("prepare.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    code = (tmp_path / "prepare.py").read_text()
    (tmp_path / "prepare.py").write_text(code.replace("\nMARKS = {", f"\n\n\n{example}\nMARKS = {{", 1))
    lines = ["explanation"] + [f"mdb{i:03d} {'FGD'[i % 3]} NORM" for i in range(1, 41)] + ["mdb005 D NORM"]
    (tmp_path / "mias").mkdir()
    (tmp_path / "mias" / "Info.txt").write_text("\n".join(lines))
    for i in range(1, 41):
        draw(tmp_path / "mias" / f"mdb{i:03d}.pgm", i)
    done = stage("prepare.py", "mias", "--layout", "mias", "--output", "data", "--workers", "0", cwd=tmp_path, root=tmp_path)
    assert "listed more than once" in done.stdout
    rows = table(tmp_path / "data" / "labels.csv")
    assert len(rows) == 40 and {row["label"] for row in rows} == {"fatty", "glandular", "dense"}
    assert len({(row["group"], row["split"]) for row in rows}) == len({row["group"] for row in rows})


@pytest.mark.skipif("MEDVIT_DATA" not in os.environ, reason="MEDVIT_DATA names no folder with real images")
def test_real_images(tmp_path):
    data = Path(os.environ["MEDVIT_DATA"])
    done = prepare(data / "brain_mri", "mri", "--layout", "folder", cwd=tmp_path)
    counted = json.loads((tmp_path / "mri" / "dataset.json").read_text())
    assert splits_of(tmp_path / "mri") == {"train": 2440, "val": 430, "test": 394}
    assert f"{counted['leakage']['test_in_train']} of 394 test images also stand in train" in done.stdout
    assert len(table(tmp_path / "mri" / "duplicates.csv")) > counted["leakage"]["test_in_train"] > 200
    prepare(data / "ph2", "ph2", "--label-column", "diagnosis", cwd=tmp_path)
    masks = np.load(tmp_path / "ph2" / "masks.npy")
    assert splits_of(tmp_path / "ph2") == {"train": 140, "val": 30, "test": 30} and 0.2 < masks.mean() < 0.5
    prepare(data / "medmnist" / "retinamnist.npz", "retina", cwd=tmp_path)
    with np.load(data / "medmnist" / "retinamnist.npz") as arrays:
        assert (np.load(tmp_path / "retina" / "images.npy")[-400:] == arrays["test_images"]).all()
    stage("knn_eval.py", "--data", "retina", "--arch", "test_vit", "--k", "5", "--output", "run", *TINY, cwd=tmp_path)
    assert metrics(tmp_path / "run")["counts"] == {"train": 1080, "val": 120, "test": 400}
