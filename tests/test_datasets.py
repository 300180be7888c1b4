"""The paper's seven datasets in their owners' layouts, built small: index, split, odd cases, and a run of
each."""
import csv
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import common
import prepare as script
from conftest import TINY, metrics, prepare, refused, stage, table

RNG = np.random.default_rng(0)
CHEXPERT = ["No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
            "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
            "Pleural Other", "Fracture", "Support Devices"]
TISSUES = ["cancer", "calcifications", "axillary_lymph_nodes", "thick_vessels", "foreign_object", "skin",
           "nipple", "text", "non-mammary_tissue", "pectoral_muscle", "mammary_gland"]
CBIS = ["patient_id", "breast_density", "left or right breast", "image view", "abnormality id",
        "abnormality type", "mass shape", "mass margins", "assessment", "pathology", "subtlety",
        "image file path", "cropped image file path", "ROI mask file path"]


def index_of(name, root, *flags):
    """What prepare.py understands of a folder of a layout, as columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare.py", str(root), "--output", "x", "--layout", name, *flags])
        args = script.arguments()
        source = script.read_source(*script.recognise(str(root), args), args)
        script.settle_labels(source, args)
    rows = source.rows
    return SimpleNamespace(
        items=[row.item for row in rows], labels=[row.label for row in rows], splits=[row.split for row in rows],
        groups=[row.group for row in rows], masks=[row.masks for row in rows], classes=source.classes,
        ordinal=source.ordinal, mask_classes=source.mask_classes,
        annotators={f"annotator_{k}": [row.experts.get(f"annotator_{k}") for row in rows] for k in (1, 2, 3)})


def prepared(source, folder, *flags):
    """The dataset that prepare.py makes of a folder, in this process: a start saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare.py", str(source), "--output", str(folder), "--workers", "0", *flags])
        script.main()
    return common.open_dataset(folder)


def without_split(folder):
    """The names of the images of a prepared folder that no stage sees."""
    return {Path(row["image"]).name for row in table(folder / "labels.csv") if row["split"] == ""}


def of_split(index, split):
    """The positions of an index's images in a split."""
    return [i for i, name in enumerate(index.splits) if name == split]


def draw(path, label=0, mode="RGB", size=(40, 44)):
    """An image file of noise around a level that tells its label; in blocks, which are quick to write as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size
    channels = 4 if mode == "RGBA" else 3
    blocks = RNG.normal(60 + 25 * label, 12, (height // 10 + 1, width // 10 + 1, channels)).clip(1, 250)
    pixels = blocks.repeat(10, 0).repeat(10, 1)[:height, :width]
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
    classes = script.SPECS["isic2019"][-1].split(", ")
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
    splits = script.random_split(count, share, 42)
    for name, expected, size in zip(("train", "val", "test"), slow_split(count, share), sizes):
        assert [i for i, split in enumerate(splits) if split == name] == sorted(expected) and len(expected) == size


def test_the_first_indices_of_the_two_published_splits():
    """By value, as Python's Mersenne Twister has given them since 3.2: a new Python must not change them."""
    for count, share, head in ((3662, 0.3, [2791, 2171, 1708]), (25331, 0.2, [19993, 22352, 7])):
        assert slow_split(count, share)[1][:3] == head
        splits = script.random_split(count, share, 42)
        assert [splits[i] for i in head] == ["val"] * 3


@pytest.mark.parametrize("name", list(BUILD))
def test_each_is_recognised_described_and_goes_through(name, tmp_path):
    """prepare.py without --layout, then every stage that fits."""
    BUILD[name](tmp_path / "source")
    text = prepare("source", f"data/{name}", cwd=tmp_path).stdout
    assert f"is understood as: {name}" in text
    for word in ("images", "train", "sizes: ", "bits a channel: ", "channel", "duplicates: "):
        assert word in text, text
    assert ("bits a channel: 16" in text) == (name == "ddsm")
    assert ("groups" in text) == (name in ("ddsm", "chexpert", "csaws"))
    assert name != "camelyon" or ("1 test in train" in text and "often 96x96" in text)
    with Image.open(tmp_path / "data" / name / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 150
    args = ["--data", f"data/{name}", *TINY]
    if name in ("isic2018", "csaws"):
        for other in ("finetune.py", "knn_eval.py"):
            done = stage(other, *args, "--arch", "test_vit", "--output", "no", cwd=tmp_path, check=False)
            refused(done, "no labels", "segment.py")
            assert not (tmp_path / "no").exists()
        stage("segment.py", *args, "--arch", "test_vit", "--epochs", "1", "--batch-size", "2", "--output", "run",
              cwd=tmp_path)
        assert metrics(tmp_path / "run")["metric"] == "iou" and metrics(tmp_path / "run")["dataset"] == name
        return
    done = stage("finetune.py", *args, "--arch", "test_vit", "--epochs", "1", "--batch-size", "8", "--output", "run",
                 cwd=tmp_path)
    result, spec = metrics(tmp_path / "run"), script.SPECS[name]
    assert result["metric"] == spec[0] and result["dataset"] == name
    model = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert model["classes"] == spec[-1].split(", ")
    assert model["mean"] == pytest.approx(list(spec[1]) * (3 // len(spec[1]))) and len(model["std"]) == 3
    stage("knn_eval.py", *args, "--init", "run/model.pt", "--k", "1,5", "--output", "knn", cwd=tmp_path)
    assert metrics(tmp_path / "knn")["counts"] == result["counts"]
    if name == "chexpert":
        areas = result["test"]["roc_auc_by_label"]
        five = [areas[c] for c in ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema",
                                   "Pleural Effusion")]
        assert result["test"]["roc_auc_competition"] == common.mean_defined(five) and list(areas) == CHEXPERT
        assert result["test"]["roc_auc"] == pytest.approx(common.mean_defined(areas.values()))
        assert "roc_auc of Atelectasis" in done.stdout


def test_aptos2019(tmp_path):
    root = tmp_path / "data"
    aptos2019(root)
    index = index_of("aptos2019", root)
    grades = ["No DR", "Mild", "Moderate", "Severe", "Proliferative DR"]
    for part, expected in zip(("train", "val", "test"), slow_split(40, 0.3)):
        at = of_split(index, part)
        assert [int(index.items[i][-16:-4], 16) for i in at] == sorted(expected)
        assert [index.labels[i] for i in at] == [grades[i % 5] for i in sorted(expected)]
    assert index.classes == grades and index.ordinal
    channels = [script.read_image(path)[0].shape[2] for path in index.items[:3]]
    assert channels == [3, 1, 3]  # RGBA, grey, RGB


def test_listed_but_missing_and_present_but_not_listed(tmp_path, capsys):
    root = tmp_path / "source"
    aptos2019(root)
    for i in (4, 7):
        (root / "train_images" / f"{i:012x}.png").unlink()
    draw(root / "train_images" / "not_listed.png")
    refused(prepare("source", "data", cwd=tmp_path, check=False), "2 of 40 listed images", f"{4:012x}.png",
            f"{7:012x}.png", "train.csv", "--skip-broken")
    prepared(root, tmp_path / "data", "--skip-broken")
    text = capsys.readouterr().out
    rows = table(tmp_path / "data" / "labels.csv")
    assert len(rows) == 38 and "left out: 2 of 40" in text
    assert "1 images are not listed" in text and "not_listed.png" in text
    kept = [int(row["image"][-16:-4], 16) for row in rows if row["split"] == "train"]
    assert kept == [i for i in sorted(slow_split(40, 0.3)[0]) if i not in (4, 7)]  # the others keep their split


@pytest.mark.parametrize("name, word", [("aptos2019", "train.csv"), ("ddsm", "ddsm_raw_image_lists"),
                                        ("isic2019", "ISIC_2019_Training_GroundTruth.csv"),
                                        ("chexpert", "train.csv"),
                                        ("camelyon", "camelyonpatch_level_2_split_train_x.h5"), ("csaws", "anonymized_dataset"),
                                        ("isic2018", "ISIC2018_Task1-2_Training_Input")])
def test_a_wrong_folder_says_what_it_looked_for_and_found(name, word, tmp_path, capsys):
    (tmp_path / "data" / "holiday").mkdir(parents=True)
    fails(capsys, name, tmp_path / "data", word, "holiday", str(tmp_path / "data"))


def fails(capsys, name, root, *words):
    """The layout refuses the folder, and its one line holds the words."""
    capsys.readouterr()  # what was said before
    with pytest.raises(SystemExit) as stopped:
        index_of(name, root)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1
    for word in words:
        assert word in message, message


def test_unknown_labels_are_all_named(tmp_path, capsys):
    aptos2019(tmp_path / "a")
    rows = [(name, "7" if i in (3, 5) else grade) for i, (name, grade) in enumerate(
        zip(*script.read_table(tmp_path / "a" / "train.csv").values()))]
    write(tmp_path / "a" / "train.csv", ["id_code", "diagnosis"], rows)
    fails(capsys, "aptos2019", tmp_path / "a", "2 labels", "'7'", f"{5:012x}")
    isic2019(tmp_path / "b")
    file = tmp_path / "b" / "ISIC_2019_Training_GroundTruth.csv"
    file.write_text(file.read_text().replace("ISIC_0000001,0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0",
                                             "ISIC_0000001,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,1.0"))
    fails(capsys, "isic2019", tmp_path / "b", "1 labels", "UNK", "ISIC_0000001")
    ddsm(tmp_path / "c")
    draw(tmp_path / "c" / "ddsm_raw" / "implant_01-A_0001_1.LEFT_CC.LJPEG.1.png")
    with open(tmp_path / "c" / "ddsm_raw_image_lists" / "val.txt", "a") as out:
        out.write("implant_01-A_0001_1.LEFT_CC.LJPEG.1.png\n")
    fails(capsys, "ddsm", tmp_path / "c", "ddsm_raw_image_lists", "1 labels", "'implant'", "implant_01-A_0001")
    chexpert(tmp_path / "d")
    file = tmp_path / "d" / "train.csv"
    file.write_text(file.read_text().replace(",-1.0", ",2.0", 1))
    fails(capsys, "chexpert", tmp_path / "d", "1 cells", "of train/patient")


def test_ddsm_lists_labels_and_torn_patients(tmp_path, capsys):
    root = tmp_path / "source"
    ddsm(root)
    index = index_of("ddsm", root)
    assert [len(of_split(index, name)) for name in ("train", "val", "test")] == [48, 24, 24]
    assert index.labels == ["normal" if "normal_" in path else "abnormal" for path in index.items]
    assert index.groups[:3] == ["A_3000", "A_3000", "A_3100"]
    prepared(root, tmp_path / "clean")
    assert "WARNING" not in capsys.readouterr().out

    torn = [("train", "cancer_02-A_3212_1.LEFT_MLO.LJPEG.1.png"),  # a patient of test
            ("val", "normal_05-B_3013_1.LEFT_MLO.LJPEG.1.png"),  # of test
            ("train", "normal_01-C_3010_1.LEFT_MLO.LJPEG.1.png")]  # of val
    for part, name in torn:
        draw(root / "ddsm_raw" / name, 2, "I;16")
        with open(root / "ddsm_raw_image_lists" / f"{part}.txt", "a") as out:
            out.write(name + "\n")
    kept = prepared(root, tmp_path / "warn")
    text = capsys.readouterr().out
    assert "WARNING: 3 groups (patients) stand in more than one split: " in text
    for patient in ("A_3212 (test, train)", "B_3013 (test, val)", "C_3010 (train, val)"):
        assert patient in text
    assert kept.counts == {"train": 50, "val": 25, "test": 24} and not without_split(tmp_path / "warn")
    assert kept.images.shape[1:] == (40, 40, 1) and np.ptp(kept.images[0]) > 120  # 16 bits, not clipped

    dropped = prepared(root, tmp_path / "drop", "--leakage", "drop")
    assert dropped.counts == {"train": 48, "val": 24, "test": 24}
    assert without_split(tmp_path / "drop") == {name for _, name in torn}
    refused(prepare("source", "error", "--leakage", "error", cwd=tmp_path, check=False), "A_3212", "--leakage drop")
    assert not list(tmp_path.glob("error*"))


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
            # odd patients have a second lesion, which repeats the image; the first or the last of them is malignant
            for lesion in range(1, 2 + patient % 2):
                malignant = patient % 2 and lesion == (1 if patient % 4 == 1 else 2)
                rows.setdefault((kind, part), []).append(
                    [f"P_{patient:05d}", 3, "LEFT", "CC", lesion, kind, "OVAL", "ILL_DEFINED", 4,
                     "MALIGNANT" if malignant else pathology, 4, path, f"{case}_1/a/b/000000.dcm",
                     f"{case}_1/a/b/000001.dcm\n"])
            place = {"tcia": root / path.replace(".dcm", ".png"),
                     "kaggle": root / "jpeg" / series / "1-263.jpg",
                     "flat": root / "png" / f"{case}.png"}[layout]
            draw(place, patient % 3, "I;16" if layout == "tcia" else "L")
    for (kind, part), lines in rows.items():
        head = [c.replace("breast_density", "breast density") if kind == "calc" else c for c in CBIS]
        write(root / ("csv" if layout == "kaggle" else ".") / f"{kind}_case_description_{part}_set.csv", head,
              lines)
    dataset = prepared(root, tmp_path / "warn")
    assert "1 groups (patients) stand in more than one split: P_00003" in capsys.readouterr().out
    assert dataset.classes == ["benign", "malignant"] and dataset.metric == "roc_auc"
    assert dataset.counts["test"] == 6 and dataset.counts["train"] + dataset.counts["val"] == 16
    for label, group in zip(dataset.labels, dataset.groups):
        patient = int(group[2:7])
        assert label == (patient % 3 == 1 or patient % 2 == 1)
    if layout != "flat":  # what follows is of the tables alone
        return
    assert prepared(root, tmp_path / "drop", "--leakage", "drop").counts["test"] == 6
    for before, after in zip(table(tmp_path / "warn" / "labels.csv"), table(tmp_path / "drop" / "labels.csv")):
        gone = before["group"] == "P_00003" and before["split"] != "test"
        assert after["split"] == ("" if gone else before["split"])
    assert len(without_split(tmp_path / "drop")) == 1
    refused(prepare("data", "error", "--leakage", "error", cwd=tmp_path, check=False), "P_00003", "--leakage drop")
    for file in root.rglob("*_train_set.csv"):
        file.unlink()
    fails(capsys, "ddsm", root, "train_set.csv", "found")


def number(path):
    """The number in the name of an ISIC image."""
    return int(path.split("ISIC_")[-1][:7])


def test_isic2019_by_image_and_by_lesion(tmp_path):
    root = tmp_path / "data"
    isic2019(root)
    index = index_of("isic2019", root)
    for part, expected in zip(("train", "val", "test"), slow_split(60, 0.2)):
        at = of_split(index, part)
        assert [number(index.items[i]) for i in at] == sorted(expected)
        assert [index.labels[i] for i in at] == [index.classes[i % 8] for i in sorted(expected)]
    by_lesion = index_of("isic2019", root, "--group-column", "lesion_id")
    owners = {}
    for group, part in zip(by_lesion.groups, by_lesion.splits):
        assert owners.setdefault(group, part) == part
    assert len(by_lesion.items) == 60 and 12 <= 60 - len(of_split(by_lesion, "train")) <= 14
    prepare("data", "lesions", "--layout", "isic2019", "--group-column", "lesion_id", cwd=tmp_path)
    rows = table(tmp_path / "lesions" / "labels.csv")
    assert [number(row["image"]) for row in rows] == [number(path) for path in by_lesion.items]
    assert [row["split"] for row in rows] == by_lesion.splits and [row["group"] for row in rows] == by_lesion.groups
    (root / "ISIC_2019_Training_Input").rename(root / "train")  # the authors' folder
    assert index_of("isic2019", root).items[0].startswith(str(root / "train"))


@pytest.mark.parametrize("prefix", ["CheXpert-v1.0", "CheXpert-v1.0-small"])
def test_chexpert_rules(prefix, tmp_path):
    root = tmp_path / prefix
    chexpert(root, prefix=prefix)
    index = index_of("chexpert", root)
    rows = sorted(table(root / "train.csv"), key=lambda row: row["Path"])
    assert index.items == [str(root / row["Path"].split("/", 1)[1]) for row in rows]
    for row, found in zip(rows, index.labels):
        expected = [float(row[name] == "1.0") for name in CHEXPERT]
        expected[0] = 1.0 if not any(expected) else expected[0]
        assert found.tolist() == expected
    counts = [len(of_split(index, name)) for name in ("val", "test", "train")]
    assert index.splits == ["val"] * counts[0] + ["test"] * counts[1] + ["train"] * counts[2]  # in the order of Path
    owners = {}
    for group, part in zip(index.groups, index.splits):
        assert owners.setdefault(group, part) == part
    held = int(0.2 * len(rows))
    assert held <= counts[0] + counts[1] < held + 3  # up to the end of a patient
    assert held // 2 <= counts[0] < held // 2 + 3
    frontal = index_of("chexpert", tmp_path, "--view", "frontal")  # the folder above works too
    wanted = [(path, split) for path, split in zip(index.items, index.splits) if path.endswith("frontal.jpg")]
    assert list(zip(frontal.items, frontal.splits)) == wanted


def test_chexpert_frontal_without_the_lateral_files(tmp_path, capsys):
    root = tmp_path / "source" / "CheXpert-v1.0"
    chexpert(root, patients=8)
    for path in root.rglob("*lateral.jpg"):
        path.unlink()
    loaded = prepared(tmp_path / "source", tmp_path / "out", "--view", "frontal")
    text = capsys.readouterr().out
    assert "is understood as: chexpert" in text and "left out, lateral" in text
    frontal = {row["Path"].split("/", 1)[1] for row in table(root / "train.csv") if row["Frontal/Lateral"] == "Frontal"}
    assert set(loaded.paths) == frontal and sum(loaded.counts.values()) == len(frontal)


@pytest.mark.parametrize("chunks", [None, 4])
def test_camelyon_holds_the_very_pixels(chunks, tmp_path):
    root = tmp_path / "source"
    camelyon(root, chunks)
    dataset = prepared(root, tmp_path / "data0")
    prepare("source", "data2", "--layout", "camelyon", "--workers", "2", cwd=tmp_path)
    assert dataset.counts == {"train": 24, "val": 8, "test": 9} and dataset.leakage["test_in_train"] == 1
    assert dataset.side == 96 and dataset.images.shape == (41, 96, 96, 3)
    for part, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        with h5py.File(root / f"camelyonpatch_level_2_split_{name}_x.h5") as file:
            pixels, rows = file["x"][:], dataset.rows[part]
        assert dataset.labels[rows].tolist() == [i % 2 for i in range(len(rows))]
        batch = common.read_batch(dataset.images, rows[::-1])
        assert (batch.numpy() == pixels[::-1]).all()
    same = [(tmp_path / f"data{w}" / "images.npy").read_bytes() for w in (0, 2)]
    assert same[0] == same[1]
    loaded = [batch.numpy() for batch in common.load_batches(dataset.images, [np.arange(24)] * 3, torch.device("cpu"))]
    assert all((one == loaded[0]).all() for one in loaded)


def test_camelyon_without_the_patch_that_is_in_test_too(tmp_path):
    camelyon(tmp_path / "source")
    dropped = prepared(tmp_path / "source", tmp_path / "data", "--leakage", "drop")
    assert dropped.counts == {"train": 23, "val": 8, "test": 9}
    assert without_split(tmp_path / "data") == {"camelyonpatch_level_2_split_train_x.h5:0"}


def test_camelyon_without_h5py_or_with_a_file_damaged_or_missing(tmp_path, capsys):
    camelyon(tmp_path / "data", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "h5py", None)  # its import fails from here on
        fails(capsys, "camelyon", tmp_path / "data", "h5py", "pip install h5py")
    pixels = tmp_path / "data" / "camelyonpatch_level_2_split_valid_x.h5"
    whole = pixels.read_bytes()
    with h5py.File(pixels) as content:
        chunk = content["x"].id.get_chunk_info(1)
    start = chunk.byte_offset + 50
    pixels.write_bytes(whole[:start] + bytes(1000) + whole[start + 1000:])
    refused(prepare("data", "x", cwd=tmp_path, check=False), "4 of 41 images", f"{pixels.name}:4", f"{pixels.name}:7",
            "--skip-broken")
    pixels.write_bytes(whole[:len(whole) // 2])  # a download that ended early
    refused(prepare("data", "x", cwd=tmp_path, check=False), pixels.name, "truncated")
    assert not list(tmp_path.glob("x*"))
    pixels.write_bytes(whole)
    file = tmp_path / "data" / "camelyonpatch_level_2_split_test_y.h5"
    file.write_bytes(b"not HDF5")
    fails(capsys, "camelyon", tmp_path / "data", "test_y.h5", "no HDF5 file")
    file.rename(file.with_suffix(".h5.gz"))
    fails(capsys, "camelyon", tmp_path / "data", "this layout has", "test_y.h5.gz")


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_camelyon_as_files(suffix, tmp_path):
    """Kaggle's version: a table of ids beside a folder of patches."""
    rows = [(f"train{i:036x}", i % 2) for i in range(20)]
    write(tmp_path / "source" / "train_labels.csv", ["id", "label"], rows)
    for name, label in rows:
        draw(tmp_path / "source" / "train" / f"{name}{suffix}", label, size=(96, 96))
    dataset = prepared(tmp_path / "source" / "train", tmp_path / "data", "--csv",
                       str(tmp_path / "source" / "train_labels.csv"), "--image-column", "id")
    assert dataset.counts == {"train": 14, "val": 3, "test": 3}
    assert dataset.labels.tolist() == [int(path[-5], 16) % 2 for path in dataset.paths]


def test_isic2018_pairs_and_official_test(tmp_path, capsys):
    root = tmp_path / "data"
    isic2018(root)
    index = index_of("isic2018", root)
    for part, expected in zip(("train", "val", "test"), slow_split(30, 0.2)):
        at = of_split(index, part)
        assert [number(index.items[i]) for i in at] == [number(index.masks[i][0][1]) for i in at] == sorted(expected)
    isic2018(root, [("Test", 5)])
    official = index_of("isic2018", root)
    assert of_split(official, "val") == of_split(index, "val") and len(of_split(official, "train")) == 27
    assert [number(official.masks[i][0][1]) for i in of_split(official, "test")] == [100, 101, 102, 103, 104]
    dataset = prepared(root, tmp_path / "out", "--fit", "crop")  # 40 x 40 of 40 x 44 pixels, none of them resampled
    assert dataset.counts == {"train": 27, "val": 3, "test": 5} and dataset.mask_classes == ["background", "lesion"]
    for row, path in enumerate(dataset.paths):
        images, name = path.split("/")
        folder = images.replace("1-2", "1").replace("Input", "GroundTruth")
        drawn = np.asarray(Image.open(root / folder / name.replace(".jpg", "_segmentation.png")))
        assert (dataset.masks[row] == (drawn[:, 2:42] > 0)).all()
    (root / "ISIC2018_Task1_Training_GroundTruth" / "ISIC_0000004_segmentation.png").unlink()
    fails(capsys, "isic2018", root, "1 of 35", "ISIC_0000004.jpg")


def merged(item, size=(40, 44)):
    """A mask put together as the owners do: later maps of the list cover earlier ones."""
    mask = np.zeros(size, int)
    for index, path in item:
        mask[np.asarray(Image.open(path)) > 0] = index
    return mask


def of_the_owners(folder, stem, tissues, size=(40, 44)):
    """The mask of a scan from the maps in a folder: of each pixel the first of the tissues that has it."""
    mask = np.zeros(size, int)
    for value, name in enumerate(tissues, 1):
        file = folder / stem.split("_")[0] / f"{stem}_{name}.png"
        if file.is_file():
            mask[(np.asarray(Image.open(file)) > 0) & (mask == 0)] = value
    return mask


def test_csaws_masks_patients_and_annotators(tmp_path, capsys):
    root = tmp_path / "CsawS"
    csaws(root)
    index = index_of("csaws", tmp_path)  # the folder above works too

    def stems(part):
        return [index.items[i].split("/")[-1] for i in of_split(index, part)]
    assert stems("val") == ["000_0.png", "018_0.png"]
    assert stems("train") == ["002_0.png", "003_0_8bit.png", "003_1_8bit.png", "400_0.png"]
    assert stems("test") == ["500_0.png", "501_0.png", "501_1.png"]
    train = of_split(index, "train")
    assert [index.groups[i] for i in train] == ["002", "003", "003", "400"]
    assert index.mask_classes == ["background", "tumour"]
    assert merged(index.masks[train[0]]).sum() == 0  # 002_0 has no cancer map
    assert (merged(index.masks[train[1]]) == (np.asarray(Image.open(
        root / "anonymized_dataset" / "003" / "003_0_cancer.png")) > 0)).all()
    tissue = index_of("csaws", root, "--tissue")
    assert tissue.mask_classes == ["background", "tumour", *TISSUES[1:]]
    centre = merged(tissue.masks[of_split(tissue, "val")[0]])[20]
    expected = [TISSUES.index(name) + 1 for name in TISSUES if name != "text"]
    # small ones over large ones
    assert [int(v) for v in dict.fromkeys(centre[22:].tolist())] == [*expected, 0]
    test = of_split(index, "test")
    areas = [(merged(index.annotators[f"annotator_{k}"][test[0]]) > 0).sum() for k in (1, 2, 3)]
    assert areas[0] < areas[1] < areas[2] and index.masks[test[0]] == index.annotators["annotator_1"][test[0]]
    refused(prepare("CsawS", "no", "--layout", "camelyon", cwd=tmp_path, check=False), "split_train_x.h5",
            "anonymized_dataset")
    for path in (root / "test_data" / "annotator_2" / "501").glob("501_1_*"):
        path.unlink()
    fails(capsys, "csaws", root, "annotator_2", "1 of 3", "501_1")
    (root / "anonymized_dataset").rename(tmp_path / "gone")
    (root / "anonymized_dataset").mkdir()
    fails(capsys, "csaws", root, "anonymized_dataset", "no scan")


@pytest.mark.parametrize("flags, tissues", [([], ["cancer"]), (["--tissue"], TISSUES)])
def test_csaws_masks_hold_the_owners_pixels(flags, tissues, tmp_path):
    """masks.npy and masks-annotator_k.npy by value; without resampling, so that they must be equal."""
    root = tmp_path / "CsawS"
    csaws(root)
    dataset = prepared(root, tmp_path / "data", "--fit", "crop", *flags)
    assert dataset.counts == {"train": 4, "val": 2, "test": 3}
    experts = {k: np.load(tmp_path / "data" / f"masks-annotator_{k}.npy") for k in (1, 2, 3)}
    for row, path in enumerate(dataset.paths):
        stem = Path(path).stem.removesuffix("_8bit")
        test = path.startswith("test_data/")
        assert (row in dataset.rows["test"]) == test
        for k, masks in experts.items():
            folder = root / "test_data" / f"annotator_{k}"
            expected = of_the_owners(folder, stem, tissues)[:, 2:42] if test else np.zeros((40, 40))
            assert masks.shape == dataset.masks.shape and (masks[row] == expected).all()
        folder = root / ("test_data/annotator_1" if test else "anonymized_dataset")
        expected = of_the_owners(folder, stem, tissues)[:, 2:42]
        assert (dataset.masks[row] == expected).all()
        assert set(np.unique(expected)) >= {0, 1} or stem == "002_0"  # which has no cancer


def test_the_split_of_a_published_dataset_can_be_sent(tmp_path):
    """labels.csv of the prepared folder gives the same split, elsewhere, by the layout of a table."""
    aptos2019(tmp_path / "source")
    refused(prepare("source", "data", "--layout", "isic2019", cwd=tmp_path, check=False), "source", "GroundTruth.csv")
    assert not list(tmp_path.glob("data*"))
    prepare("source", "data", "--layout", "aptos2019", cwd=tmp_path)
    first = table(tmp_path / "data" / "labels.csv")
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "train.csv").unlink()
    prepare("elsewhere", "again", "--csv", "data/labels.csv", "--split-column", "split", cwd=tmp_path)
    again = table(tmp_path / "again" / "labels.csv")
    assert [(row["image"], row["split"], row["label"]) for row in first] == [
        (row["image"], row["split"], row["label"]) for row in again]
    facts = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert facts["layout"] == "aptos2019" and facts["metric"] == "quadratic_kappa"
