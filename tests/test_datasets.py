"""The paper's seven datasets in their owners' layouts, built small: index, split, odd cases, and a run of
each."""
import csv
import json
import os
import random
import sys

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import common
import finetune
import knn_eval
from conftest import TINY, metrics, refused, stage, table

RNG = np.random.default_rng(0)
CHEXPERT = ["No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
            "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
            "Pleural Other", "Fracture", "Support Devices"]
TISSUES = ["cancer", "calcifications", "axillary_lymph_nodes", "thick_vessels", "foreign_object", "skin",
           "nipple", "text", "non-mammary_tissue", "pectoral_muscle", "mammary_gland"]
CBIS = ["patient_id", "breast_density", "left or right breast", "image view", "abnormality id",
        "abnormality type", "mass shape", "mass margins", "assessment", "pathology", "subtlety",
        "image file path", "cropped image file path", "ROI mask file path"]


def arguments(dataset, folder, *flags, workers=0):
    """Parsed arguments of the stages for a dataset in a folder."""
    parser, _ = common.make_parser("test")
    args = parser.parse_args(["--dataset", dataset, "--data-dir", str(folder), *flags,
                              "--cache-dir", str(folder.parent / "cache")])
    vars(args).update({"image_size": 32, "resize": 36, "workers": workers})
    return args


def command(monkeypatch, script, *args):
    """A script's main with these arguments, in this process: a start of Python saved."""
    monkeypatch.setattr(sys, "argv", ["script", *args])
    script.main()


def draw(path, label=0, mode="RGB", size=(40, 44)):
    """An image file of noise around a level that tells its label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.normal(60 + 25 * label, 12, (*size, 4 if mode == "RGBA" else 3)).clip(1, 250)
    if mode == "I;16":
        Image.fromarray((pixels[..., 0] * 200).astype(np.uint16)).save(path)
    elif mode == "L":
        Image.fromarray(pixels[..., 0].astype(np.uint8)).save(path)
    else:
        Image.fromarray(pixels.astype(np.uint8), mode).save(path)


def write(path, head, rows, bom=False, end="\n"):
    """A CSV file, with a byte-order mark or CRLF on request."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8-sig" if bom else "utf-8") as out:
        csv.writer(out, lineterminator=end).writerows([head, *rows])


def aptos2019(root, count=40):
    """train.csv from a spreadsheet (BOM, CRLF), one RGBA and one grey image among the PNGs."""
    ids = [f"{i:012x}" for i in range(count)]
    write(root / "train.csv", ["id_code", "diagnosis"], [(name, i % 5) for i, name in enumerate(ids)], True,
          "\r\n")
    for i, name in enumerate(ids):
        draw(root / "train_images" / f"{name}.png", i % 5, ("RGBA", "L", "RGB")[min(i, 2)])


def ddsm(root):
    """Lists of flat names; scans as 16-bit PNG under the names of the lists; two blank lines and CRLF."""
    for part, cases in (("train", range(8)), ("val", range(8, 12)), ("test", range(12, 16))):
        names = [f"{kind}_0{case % 9 + 1}-{'ABCD'[case % 4]}_{3000 + case + 100 * k}_1.{view}.LJPEG.1.png"
                 for case in cases for k, kind in enumerate(("normal", "benign", "cancer"))
                 for view in ("LEFT_CC", "RIGHT_MLO")]
        for name in names:
            draw(root / "ddsm_raw" / name, 2 * (name[0] != "n"), "I;16", (60, 40))
        (root / "ddsm_raw_image_lists").mkdir(exist_ok=True)
        (root / "ddsm_raw_image_lists" / f"{part}.txt").write_bytes("\r\n".join([*names, "", ""]).encode())


def isic2019(root, count=60):
    """One-hot rows with the UNK column, 2 images a lesion, some without lesion_id, a name with
    _downsampled."""
    classes = common.SPECS["isic2019"][-1].split(", ")
    names = [f"ISIC_{i:07d}" + "_downsampled" * (i == 3) for i in range(count)]
    hot = [[name, *(float(c == i % 8) for c in range(8)), 0.0] for i, name in enumerate(names)]
    write(root / "ISIC_2019_Training_GroundTruth.csv", ["image", *classes, "UNK"], hot)
    write(root / "ISIC_2019_Training_Metadata.csv", ["image", "age_approx", "anatom_site_general",
                                                     "lesion_id", "sex"],
          [(name, "55.0", "anterior torso", "" if i % 10 == 0 else f"MSK4_{i // 2:07d}", "female")
           for i, name in enumerate(names)])
    for i, name in enumerate(names):
        draw(root / "ISIC_2019_Training_Input" / f"{name}.jpg", i % 8)


def chexpert(root, patients=20, prefix="CheXpert-v1.0-small"):
    """Blanks, -1, all-zero rows; 1 to 3 images a patient, frontal and lateral; rows not in the order of
    Path."""
    rows = []
    for p in range(patients):
        for view in range(1 + p % 3):
            kind = "Frontal" if view != 1 else "Lateral"
            path = f"train/patient{p:05d}/study{1 + view // 2}/view{1 + view % 2}_{kind.lower()}.jpg"
            labels = ([("1.0", "0.0", "-1.0", "")[(p + i) % 4] for i in range(14)] if p % 5
                      else [""] * 13 + ["-1.0"])
            draw(root / path, p % 4, "L", (44, 40))
            rows.append([f"{prefix}/{path}", "Female", 68, kind, "AP" if kind == "Frontal" else "", *labels])
    write(root / "train.csv", ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT], rows[::-1])


def camelyon(root, chunks=None):
    """Three pairs of HDF5 files: x (N, 96, 96, 3) uint8 and y (N, 1, 1, 1), one test patch also in train."""
    root.mkdir(parents=True)
    first = None
    for part, count in (("train", 24), ("valid", 8), ("test", 9)):
        x = RNG.integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)
        first = x[0] if first is None else first
        x[-1] = first if part == "test" else x[-1]
        with h5py.File(root / f"camelyonpatch_level_2_split_{part}_x.h5", "w") as file:
            file.create_dataset("x", data=x, chunks=chunks and (min(chunks, count), 96, 96, 3),
                                compression="gzip" if chunks else None)
        with h5py.File(root / f"camelyonpatch_level_2_split_{part}_y.h5", "w") as file:
            file.create_dataset("y", data=(np.arange(count) % 2).astype(np.uint8).reshape(-1, 1, 1, 1))


def isic2018(root, parts=(("Training", 30),)):
    """JPEGs and {id}_segmentation.png, with the LICENSE.txt and ATTRIBUTION.txt that come along."""
    for part, count in parts:
        images, masks = root / f"ISIC2018_Task1-2_{part}_Input", root / f"ISIC2018_Task1_{part}_GroundTruth"
        for i in range(count):
            name = f"ISIC_{i + (100 if part == 'Test' else 0):07d}"
            draw(images / f"{name}.jpg", i % 3)
            disk(masks / f"{name}_segmentation.png", 12)
        for folder in (images, masks):
            (folder / "LICENSE.txt").write_text("CC-0")
            (folder / "ATTRIBUTION.txt").write_text("ISIC")


def disk(path, radius, size=(40, 44)):
    """A binary map, 0 and 255, of a disk in the middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:size[0], :size[1]]
    Image.fromarray((255 * (np.hypot(y - size[0] / 2, x - size[1] / 2) < radius)).astype(np.uint8)).save(path)


def csaws(root):
    """Patients with 1 or 2 scans; nested disks as maps; an RGB original with its 8-bit duplicate; no cancer
    once."""
    for folder, patients in ((root, ["000", "002", "003", "018", "400"]),
                             (root / "test_data", ["500", "501"])):
        for patient in patients:
            for n in range(1 + int(patient) % 2):
                place, stem = folder / "anonymized_dataset" / patient, f"{patient}_{n}"
                draw(place / f"{stem}.png", 1, "RGB" if patient == "003" else "L")
                if patient == "003":
                    draw(place / f"{stem}_8bit.png", 1, "L")
                experts = [place] if folder == root else [
                    folder / f"annotator_{k}" / patient for k in (1, 2, 3)]
                for k, target in enumerate(experts):
                    for i, name in enumerate(TISSUES):
                        if (stem, name) != ("002_0", "cancer") and name != "text":
                            disk(target / f"{stem}_{name}.png", 3 + i + k)


BUILD = {f.__name__: f for f in (aptos2019, ddsm, isic2019, chexpert, camelyon, isic2018, csaws)}


def slow_split(count, share):
    """The recipe of the design, written out: (train, val, test) indices."""
    indices = list(range(count))
    random.Random(42).shuffle(indices)
    held = indices[:int(count * share)]
    return indices[int(count * share):], held[:len(held) // 2], held[len(held) // 2:]


@pytest.mark.parametrize("count, share, sizes", [(3662, 0.3, (2564, 549, 549)),
                                                 (25331, 0.2, (20265, 2533, 2533)),
                                                 (40, 0.3, (28, 6, 6)), (7, 0.2, (6, 0, 1))])
def test_random_split_is_the_authors(count, share, sizes):
    splits = common.random_split(common.Split(list(range(count))), share, 42)
    expected = dict(zip(("train", "val", "test"), slow_split(count, share)))
    assert {name: split.paths for name, split in splits.items()} == expected
    assert tuple(len(splits[name]) for name in ("train", "val", "test")) == sizes


def test_the_first_indices_of_the_two_published_splits():
    """By value, as Python's Mersenne Twister has given them since 3.2: a new Python must not change them."""
    for count, share, head in ((3662, 0.3, [2791, 2171, 1708]), (25331, 0.2, [19993, 22352, 7])):
        splits = common.random_split(common.Split(list(range(count))), share, 42)
        assert splits["val"].paths[:3] == head


@pytest.mark.parametrize("name", [name for name, spec in common.SPECS.items() if spec[0] != "masks"])
def test_each_goes_through_finetune_and_knn(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    BUILD[name](tmp_path / "data")
    args = ["--dataset", name, "--data-dir", "data", *TINY, "--arch", "test_vit"]
    done = stage("finetune.py", *args, "--epochs", "1", "--batch-size", "8", "--output", "run", cwd=tmp_path)
    result, spec = metrics(tmp_path / "run"), common.SPECS[name]
    assert result["metric"] == spec[1] and result["dataset"] == name
    model = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert model["classes"] == spec[-1].split(", ")
    assert model["mean"] == pytest.approx(list(spec[3]) * (3 // len(spec[3]))) and len(model["std"]) == 3
    command(monkeypatch, knn_eval, *args, "--init", "run/model.pt", "--k", "1,5", "--output", "knn")
    assert metrics(tmp_path / "knn")["counts"] == result["counts"]
    if name == "chexpert":
        areas = result["test"]["roc_auc_by_label"]
        five = [areas[c] for c in ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema",
                                   "Pleural Effusion")]
        assert result["test"]["roc_auc_competition"] == common.mean_defined(five) and list(areas) == CHEXPERT
        assert result["test"]["roc_auc"] == pytest.approx(common.mean_defined(areas.values()))
        assert "roc_auc of Atelectasis" in done.stdout


@pytest.mark.parametrize("name", ["isic2018", "csaws"])
def test_masks_are_indexed_and_refused_by_the_classifiers(name, tmp_path, monkeypatch, capsys):
    BUILD[name](tmp_path / "data")
    dataset = common.load_dataset(arguments(name, tmp_path / "data", workers=2))
    assert dataset.task == "masks" and dataset.metric == "iou" and len(dataset.mean) == 3
    assert all(len(split.masks) == len(split) for split in dataset.splits.values())
    assert dataset.store.image(0).shape[2] == (3 if name == "isic2018" else 1)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for script in (finetune, knn_eval):
        args = ["--dataset", name, "--data-dir", "data", *TINY]
        fails(capsys, lambda args: command(monkeypatch, script, *args), args, name, "segment.py")


def test_aptos2019(tmp_path):
    root = tmp_path / "data"
    aptos2019(root)
    dataset = common.index_aptos2019(arguments("aptos2019", root))
    train, val, test = slow_split(40, 0.3)
    for part, expected in (("train", train), ("val", val), ("test", test)):
        split = dataset.splits[part]
        assert [int(path[-16:-4], 16) for path in split.paths] == expected
        assert split.labels.tolist() == [i % 5 for i in expected]
    assert dataset.classes == ["No DR", "Mild", "Moderate", "Severe", "Proliferative DR"]
    loaded = common.load_dataset(arguments("aptos2019", root))
    channels = {int(p[-16:-4], 16): loaded.store.shapes[r, 2] for s in loaded.splits.values()
                for p, r in zip(s.paths, s.rows)}
    assert channels[1] == 1 and channels[0] == channels[2] == 3  # grey, RGBA, RGB


def test_listed_but_missing_and_present_but_not_listed(tmp_path, capsys):
    root = tmp_path / "data"
    aptos2019(root)
    for i in (4, 7):
        (root / "train_images" / f"{i:012x}.png").unlink()
    draw(root / "train_images" / "not_listed.png")
    command = ["finetune.py", "--dataset", "aptos2019", "--data-dir", "data", "--arch", "test_vit", *TINY]
    refused(stage(*command, cwd=tmp_path, check=False), "2 of 40 listed images", f"{4:012x}.png",
            f"{7:012x}.png", "train.csv", "--skip-broken")
    dataset = common.load_dataset(arguments("aptos2019", root, "--skip-broken"))
    text = capsys.readouterr().out
    assert sum(dataset.counts.values()) == 38 and "left out: 2 of 40" in text
    assert "1 images are not listed" in text and "not_listed.png" in text
    kept = [int(path[-16:-4], 16) for path in dataset.splits["train"].paths]
    assert kept == [i for i in slow_split(40, 0.3)[0] if i not in (4, 7)]  # the others keep their split


@pytest.mark.parametrize("name, word", [("aptos2019", "train.csv"), ("ddsm", "ddsm_raw_image_lists"),
                                        ("isic2019", "ISIC_2019_Training_GroundTruth.csv"),
                                        ("chexpert", "train.csv"),
                                        ("camelyon", "train_labels.csv"), ("csaws", "anonymized_dataset"),
                                        ("isic2018", "ISIC2018_Task1-2_Training_Input")])
def test_a_wrong_folder_says_what_it_looked_for_and_found(name, word, tmp_path, capsys):
    (tmp_path / "data" / "holiday").mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        common.INDEX[name](arguments(name, tmp_path / "data"))
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert word in message and "holiday" in message and "--data-dir" in message and message.count("\n") == 1


def fails(capsys, function, args, *words):
    """The index function refuses, and its one line holds the words."""
    with pytest.raises(SystemExit) as stopped:
        function(args)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1
    for word in words:
        assert word in message, message


def test_unknown_labels_are_all_named(tmp_path, capsys):
    aptos2019(tmp_path / "a")
    rows = [(row["id_code"], "7" if i in (3, 5) else row["diagnosis"])
            for i, row in enumerate(common.read_csv(tmp_path / "a" / "train.csv", []))]
    write(tmp_path / "a" / "train.csv", ["id_code", "diagnosis"], rows)
    fails(capsys, common.index_aptos2019, arguments("aptos2019", tmp_path / "a"), "2 labels", "'7'",
          f"{5:012x}")
    isic2019(tmp_path / "b")
    file = tmp_path / "b" / "ISIC_2019_Training_GroundTruth.csv"
    file.write_text(file.read_text().replace("ISIC_0000001,0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0",
                                             "ISIC_0000001,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,1.0"))
    fails(capsys, common.index_isic2019, arguments("isic2019", tmp_path / "b"), "1 labels", "UNK",
          "ISIC_0000001")
    ddsm(tmp_path / "c")
    draw(tmp_path / "c" / "ddsm_raw" / "implant_01-A_0001_1.LEFT_CC.LJPEG.1.png")
    with open(tmp_path / "c" / "ddsm_raw_image_lists" / "val.txt", "a") as out:
        out.write("implant_01-A_0001_1.LEFT_CC.LJPEG.1.png\n")
    fails(capsys, common.index_ddsm, arguments("ddsm", tmp_path / "c"), "val.txt", "'implant'")
    chexpert(tmp_path / "d")
    file = tmp_path / "d" / "train.csv"
    file.write_text(file.read_text().replace(",-1.0", ",2.0", 1))
    fails(capsys, common.index_chexpert, arguments("chexpert", tmp_path / "d"), "1 labels",
          "of train/patient")


def test_ddsm_lists_labels_and_torn_patients(tmp_path, capsys):
    root = tmp_path / "data"
    ddsm(root)
    dataset = common.index_ddsm(arguments("ddsm", root))
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 48, "val": 24, "test": 24}
    for split in dataset.splits.values():
        assert [int("normal_" not in path) for path in split.paths] == split.labels.tolist()
    assert dataset.splits["train"].groups[:3] == ["A_3000", "A_3000", "A_3100"]
    assert "WARNING" not in capsys.readouterr().out
    twin = "cancer_02-A_3212_1.LEFT_MLO.LJPEG.1.png"  # A_3212 is in test
    draw(root / "ddsm_raw" / twin, 2, "I;16")
    with open(root / "ddsm_raw_image_lists" / "train.txt", "a") as out:
        out.write(twin + "\n")
    kept = common.load_dataset(arguments("ddsm", root))
    assert "1 patients of train also stand in a later split: A_3212" in capsys.readouterr().out
    assert kept.counts["train"] == 49
    # 16 bits, not clipped
    assert kept.store.shapes[0].tolist() == [54, 36, 1] and np.ptp(kept.store.image(0)) > 120
    assert common.load_dataset(arguments("ddsm", root, "--leakage", "drop")).counts["train"] == 48
    capsys.readouterr()
    fails(capsys, common.index_ddsm, arguments("ddsm", root, "--leakage", "error"), "A_3212",
          "--leakage drop")


@pytest.mark.parametrize("layout", ["tcia", "kaggle", "flat"])
def test_cbis_ddsm(layout, tmp_path, capsys):
    root, rows = tmp_path / "data", {}
    for kind, part, patients in (("mass", "train", range(10)), ("calc", "train", range(10, 16)),
                                 ("mass", "test", range(20, 24)), ("calc", "test", [24, 3])):
        for patient in patients:
            case = f"{kind.title()}-{'Training' if part == 'train' else 'Test'}_P_{patient:05d}_LEFT_CC"
            series = f"1.3.6.1.4.1.9590.100.1.2.{patient:02d}{len(kind + part)}{kind[0]}"
            pathology = ("BENIGN", "MALIGNANT", "BENIGN_WITHOUT_CALLBACK")[patient % 3]
            path = f"{case}/1.3.6.1.4.1.9590.100.1.1.{patient}/{series}/000000.dcm"
            # a second lesion repeats the image, always malignant here
            for lesion in range(1, 2 + patient % 2):
                rows.setdefault((kind, part), []).append(
                    [f"P_{patient:05d}", 3, "LEFT", "CC", lesion, kind, "OVAL", "ILL_DEFINED", 4,
                     "MALIGNANT" if lesion == 2 else pathology, 4, path, f"{case}_1/a/b/000000.dcm",
                     f"{case}_1/a/b/000001.dcm\n"])
            place = {"tcia": root / path.replace(".dcm", ".png"),
                     "kaggle": root / "jpeg" / series / "1-263.jpg",
                     "flat": root / "png" / f"{case}.png"}[layout]
            draw(place, patient % 3, "I;16" if layout == "tcia" else "L")
    for (kind, part), lines in rows.items():
        head = [c.replace("breast_density", "breast density") if kind == "calc" else c for c in CBIS]
        write(root / ("csv" if layout == "kaggle" else ".") / f"{kind}_case_description_{part}_set.csv", head,
              lines)
    dataset = common.load_dataset(arguments("ddsm", root))
    assert "1 patients of train also stand in a later split: P_00003" in capsys.readouterr().out
    assert (dataset.name == "cbis-ddsm" and dataset.classes == ["benign", "malignant"]
            and dataset.metric == "roc_auc")
    assert dataset.counts["test"] == 6 and dataset.counts["train"] + dataset.counts["val"] == 16
    for split in dataset.splits.values():
        for label, group in zip(split.labels, split.groups):
            patient = int(group[2:7])
            assert label == (patient % 3 == 1 or patient % 2 == 1)
    assert common.load_dataset(arguments("ddsm", root, "--leakage", "drop")).counts["test"] == 6
    capsys.readouterr()
    for file in root.rglob("*_train_set.csv"):
        file.unlink()
    fails(capsys, common.index_ddsm, arguments("ddsm", root), "train_set.csv", "found")


def test_isic2019_by_image_and_by_lesion(tmp_path):
    root = tmp_path / "data"
    isic2019(root)
    by_image = common.index_isic2019(arguments("isic2019", root))
    number = lambda path: int(path.split("ISIC_")[-1][:7])  # noqa: E731
    for part, expected in zip(("train", "val", "test"), slow_split(60, 0.2)):
        assert [number(path) for path in by_image.splits[part].paths] == expected
        assert by_image.splits[part].labels.tolist() == [i % 8 for i in expected]
    by_lesion = common.index_isic2019(arguments("isic2019", root, "--group-split"))
    owners = {}
    for part, split in by_lesion.splits.items():
        for group in split.groups:
            assert owners.setdefault(group, part) == part
    assert sum(map(len, by_lesion.splits.values())) == 60 and 12 <= 60 - len(by_lesion.splits["train"]) <= 14
    (root / "ISIC_2019_Training_Input").rename(root / "train")  # the authors' folder
    assert common.index_isic2019(arguments("isic2019", root)).splits["train"].paths[0].startswith(
        str(root / "train"))


@pytest.mark.parametrize("prefix", ["CheXpert-v1.0", "CheXpert-v1.0-small"])
def test_chexpert_rules(prefix, tmp_path):
    root = tmp_path / prefix
    chexpert(root, prefix=prefix)
    dataset = common.index_chexpert(arguments("chexpert", root))
    rows = sorted(table(root / "train.csv"), key=lambda row: row["Path"])
    splits = dataset.splits
    order = [*splits["val"].paths, *splits["test"].paths, *splits["train"].paths]
    assert order == [str(root / row["Path"].split("/", 1)[1]) for row in rows]
    labels = np.concatenate([splits[name].labels for name in ("val", "test", "train")])
    for row, found in zip(rows, labels):
        expected = [float(row[name] == "1.0") for name in CHEXPERT]
        expected[0] = 1.0 if not any(expected) else expected[0]
        assert found.tolist() == expected
    owners = {}
    for part, split in splits.items():
        assert all(owners.setdefault(group, part) == part for group in split.groups)
    held = len(splits["val"]) + len(splits["test"])
    assert int(0.2 * len(rows)) <= held < int(0.2 * len(rows)) + 3  # up to the end of a patient
    # the folder above works too
    frontal = common.index_chexpert(arguments("chexpert", tmp_path, "--view", "frontal"))
    for part, split in frontal.splits.items():
        front = [path for path in splits[part].paths if path.endswith("frontal.jpg")]
        assert [path for path in split.paths if path] == front
    for path in [path for split in splits.values() for path in split.paths if "lateral" in path]:
        os.unlink(path)
    loaded = common.load_dataset(arguments("chexpert", root, "--view", "frontal"))
    assert sum(loaded.counts.values()) == sum(row["Frontal/Lateral"] == "Frontal" for row in rows)


@pytest.mark.parametrize("chunks", [None, 4])
def test_camelyon_is_read_in_place(chunks, tmp_path, capsys):
    root = tmp_path / "data"
    camelyon(root, chunks)
    args = arguments("camelyon", root)
    dataset = common.load_dataset(args)
    assert dataset.counts == {"train": 24, "val": 8, "test": 9} and dataset.leakage["test_in_train"] == 1
    for part, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        with h5py.File(root / f"camelyonpatch_level_2_split_{name}_x.h5") as file:
            pixels, split = file["x"][:], dataset.splits[part]
        assert split.labels.tolist() == [i % 2 for i in range(len(split))]
        batch, sizes = common.read_batch(dataset.store, split.rows[::-1])
        assert (batch.numpy() == pixels[::-1]).all() and (sizes == 96).all()
    # mapped where it lies in one piece
    assert isinstance(dataset.store.arrays[0], np.ndarray) == (chunks is None)
    (cached,) = (tmp_path / "cache").iterdir()
    assert cached.stat().st_size < 2000
    before = cached.stat().st_mtime_ns
    assert (common.load_dataset(args).store.hashes == dataset.store.hashes).all()
    assert cached.stat().st_mtime_ns == before
    loaded = [b.numpy() for b, _ in common.load_batches(dataset.store, [np.arange(24)] * 3,
                                                        torch.device("cpu"))]
    assert all((one == loaded[0]).all() for one in loaded)
    dropped = common.load_dataset(arguments("camelyon", root, "--leakage", "drop"))
    assert dropped.counts == {"train": 23, "val": 8, "test": 9}


def test_camelyon_without_h5py_or_with_a_file_missing(tmp_path, capsys):
    camelyon(tmp_path / "data")
    (tmp_path / "without" / "h5py").mkdir(parents=True)
    (tmp_path / "without" / "h5py" / "__init__.py").write_text("raise ImportError('none here')")
    args = ["--dataset", "camelyon", "--data-dir", "data", *TINY]
    refused(stage("knn_eval.py", *args, cwd=tmp_path, check=False,
                  env={"PYTHONPATH": str(tmp_path / "without")}),
            "h5py", "pip install h5py")
    file = tmp_path / "data" / "camelyonpatch_level_2_split_test_y.h5"
    file.write_bytes(b"not HDF5")
    fails(capsys, common.index_camelyon, arguments("camelyon", tmp_path / "data"), "test_y.h5",
          "no HDF5 file")
    file.rename(file.with_suffix(".h5.gz"))
    fails(capsys, common.index_camelyon, arguments("camelyon", tmp_path / "data"), "looks for",
          "test_y.h5.gz")


@pytest.mark.parametrize("suffix, parts", [(".tif", ["train"]), (".png", ["train", "valid", "test"])])
def test_camelyon_as_files(suffix, parts, tmp_path):
    root = tmp_path / "data"
    for part in parts:
        rows = [(f"{part}{i:036x}", i % 2) for i in range(20)]
        write(root / f"{part}_labels.csv", ["id", "label"], rows)
        for name, label in rows:
            draw(root / part / f"{name}{suffix}", label, size=(96, 96))
    dataset = common.load_dataset(arguments("camelyon", root))
    assert dataset.counts == ({"train": 12, "val": 4, "test": 4} if len(parts) == 1 else
                              {"train": 20, "val": 20, "test": 20})
    for split in dataset.splits.values():
        assert split.labels.tolist() == [int(path[-5], 16) % 2 for path in split.paths]


def test_isic2018_pairs_and_official_test(tmp_path, capsys):
    root = tmp_path / "data"
    isic2018(root)
    dataset = common.index_isic2018(arguments("isic2018", root))
    number = lambda path: int(path.split("ISIC_")[-1][:7])  # noqa: E731
    for part, expected in zip(("train", "val", "test"), slow_split(30, 0.2)):
        split = dataset.splits[part]
        assert [number(path) for path in split.paths] == [number(path) for path in split.masks] == expected
    isic2018(root, [("Test", 5)])
    official = common.index_isic2018(arguments("isic2018", root))
    assert official.splits["val"].paths == dataset.splits["val"].paths and len(official.splits["train"]) == 27
    assert [number(path) for path in official.splits["test"].masks] == [100, 101, 102, 103, 104]
    (root / "ISIC2018_Task1_Training_GroundTruth" / "ISIC_0000004_segmentation.png").unlink()
    fails(capsys, common.index_isic2018, arguments("isic2018", root), "1 of 30",
          "ISIC_0000004_segmentation.png")


def merged(item, size=(40, 44)):
    """A mask put together as the owners do: later maps of the list cover earlier ones."""
    mask = np.zeros(size, int)
    for index, path in item:
        mask[np.asarray(Image.open(path)) > 0] = index
    return mask


def test_csaws_masks_patients_and_annotators(tmp_path, capsys):
    root = tmp_path / "CsawS"
    csaws(root)
    dataset = common.index_csaws(arguments("csaws", tmp_path))  # the folder above works too
    splits, stems = dataset.splits, lambda split: [path.split("/")[-1] for path in split.paths]  # noqa: E731
    assert stems(splits["val"]) == ["000_0.png", "018_0.png"]
    assert stems(splits["train"]) == ["002_0.png", "003_0_8bit.png", "003_1_8bit.png", "400_0.png"]
    assert stems(splits["test"]) == ["500_0.png", "501_0.png", "501_1.png"]
    assert (splits["train"].groups == ["002", "003", "003", "400"]
            and dataset.classes == ["background", "tumour"])
    assert merged(splits["train"].masks[0]).sum() == 0  # 002_0 has no cancer map
    assert (merged(splits["train"].masks[1]) == (np.asarray(Image.open(
        root / "anonymized_dataset" / "003" / "003_0_cancer.png")) > 0)).all()
    tissue = common.index_csaws(arguments("csaws", root, "--tissue"))
    assert tissue.classes == ["background", "tumour", *TISSUES[1:]]
    centre = merged(tissue.splits["val"].masks[0])[20]
    expected = [TISSUES.index(name) + 1 for name in TISSUES if name != "text"]
    # small ones over large ones
    assert [int(v) for v in dict.fromkeys(centre[22:].tolist())] == [*expected, 0]
    test = splits["test"].paths[0]
    areas = [(merged(dataset.annotators[f"annotator_{k}"][test]) > 0).sum() for k in (1, 2, 3)]
    assert (areas[0] < areas[1] < areas[2]
            and splits["test"].masks[0] == dataset.annotators["annotator_1"][test])
    for path in (root / "test_data" / "annotator_2" / "501").glob("501_1_*"):
        path.unlink()
    fails(capsys, common.index_csaws, arguments("csaws", root), "annotator_2", "1 of 3", "501_1")
    (root / "anonymized_dataset").rename(tmp_path / "gone")
    (root / "anonymized_dataset").mkdir()
    fails(capsys, common.index_csaws, arguments("csaws", root), "anonymized_dataset", "no scan")


def test_split_file_is_written_and_read(tmp_path, capsys):
    root = tmp_path / "data"
    aptos2019(root)
    file = tmp_path / "split.json"
    first = common.load_dataset(arguments("aptos2019", root, "--split-file", str(file)))
    content = json.loads(file.read_text())
    assert content["val"][0].startswith("train_images/") and len(content["train"]) == 28
    content["train"], content["val"] = content["train"][1:] + content["val"][:1], content["val"][1:]
    file.write_text(json.dumps(content))
    root.rename(tmp_path / "elsewhere")  # another group's folder
    second = common.load_dataset(arguments("aptos2019", tmp_path / "elsewhere", "--split-file", str(file)))
    assert second.counts == {"train": 28, "val": 5, "test": 6}
    assert "1 images are not in it" in capsys.readouterr().out
    assert second.splits["train"].paths[-1].split("/")[-1] == first.splits["val"].paths[0].split("/")[-1]
    assert second.splits["train"].labels[-1] == first.splits["val"].labels[0]
    content["test"].append("train_images/nobody.png")
    file.write_text(json.dumps(content))
    args = arguments("aptos2019", tmp_path / "elsewhere", "--split-file", str(file))
    fails(capsys, common.load_dataset, args, "split.json", "nobody.png")
    file.write_text("{")
    fails(capsys, common.load_dataset, args, "split.json", "not a JSON")


def test_split_file_of_a_carved_split_and_patches(folder_data, tmp_path):
    file = tmp_path / "split.json"
    args = arguments("folder", folder_data, "--split-file", str(file))
    first, again = common.load_dataset(args), common.load_dataset(args)
    assert {n: s.paths for n, s in first.splits.items()} == {n: s.paths for n, s in again.splits.items()}
    camelyon(tmp_path / "patches")
    args = arguments("camelyon", tmp_path / "patches", "--split-file", str(tmp_path / "c.json"))
    first = common.load_dataset(args)
    content = json.loads((tmp_path / "c.json").read_text())
    content["train"] = content["train"][::-1]
    (tmp_path / "c.json").write_text(json.dumps(content))
    again = common.load_dataset(args)
    assert (again.store.image(again.splits["train"].rows[0])
            == first.store.image(first.splits["train"].rows[-1])).all()


@pytest.mark.parametrize("name", list(BUILD))
def test_common_describes_a_dataset(name, tmp_path, monkeypatch, capsys):
    BUILD[name](tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    if name == "csaws":
        text = stage("common.py", "--dataset", name, "--data-dir", "data", cwd=tmp_path).stdout
    else:
        command(monkeypatch, common, "--dataset", name, "--data-dir", "data", "--workers", "0")
        text = capsys.readouterr().out
    for word in ("images", "train", "sizes: ", "bits a channel: ", "channels: ", "duplicates: "):
        assert word in text, text
    assert ("bits a channel: 16" in text) == (name == "ddsm")
    assert ("patients" in text) == (name in ("ddsm", "chexpert", "csaws"))
    if name == "camelyon":
        assert "1 test in train" in text and "often 96x96" in text
    with Image.open(tmp_path / f"{name}.png") as sheet:
        assert min(sheet.size) > 150
    names = [image.name for image in tmp_path.iterdir()]
    assert sorted(names) == sorted(["data", "cache", f"{name}.png"])
