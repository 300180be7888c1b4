"""What every stage needs, in four parts: data (index, cache, loader), augmentation, models, run helpers.

A stage imports this file and nothing else of the project; to use one elsewhere, copy both files.
"""
import argparse
import csv
import ctypes
import fcntl
import gc
import hashlib
import json
import math
import os
import pickle
import platform
import random
import re
import shlex
import shutil
import sys
import textwrap
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

Image.MAX_IMAGE_PIXELS = None  # mammograms and slides pass Pillow's limit; it guards web servers, not studies
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"}
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
               "dev": "val", "test": "test", "testing": "test"}


def fail(message):
    """A user's mistake: one line on stderr, said once however many processes there are, exit code 2."""
    if int(os.environ.get("RANK", 0)) == 0:
        print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


def say(message):
    """Print a line on rank 0, above any progress bar."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(str(message), file=sys.stdout)
        sys.stdout.flush()


def some(names, most=5):
    """The first few of many names, as text for a message."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---------------------------------------------------------------- data: index -------------------------------

@dataclass
class Split:
    """The images of one split: paths (N), labels (N,) int64 or (N, L) float32 or None, groups (N) such as
    patients or None, masks (N) paths or None, rows (N,) int64: where each image stands in the store."""
    paths: list
    labels: np.ndarray = None
    groups: list = None
    masks: list = None
    rows: np.ndarray = None

    def __len__(self):
        return len(self.paths)

    def take(self, keep):
        """The images at the positions `keep`, in that order."""
        pick = lambda values: None if values is None else [values[i] for i in keep]  # noqa: E731
        index = np.asarray(keep, dtype=np.int64)
        return Split(pick(self.paths), None if self.labels is None else self.labels[index], pick(self.groups),
                     pick(self.masks), None if self.rows is None else self.rows[index])


@dataclass
class Dataset:
    """task: "classes", "multilabel" or "masks"; splits: {"train", "val", "test": Split}; metric: the name of
    the headline; mean, std: three numbers in [0, 1]; store: the cached pixels of all splits; mask_store:
    their masks, in the same rows."""
    name: str
    task: str
    classes: list
    splits: dict
    metric: str = "accuracy"
    mean: list = None
    std: list = None
    store: object = None
    mask_store: object = None
    leakage: dict = field(default_factory=dict)
    annotators: dict = None  # of test: {name: {image path: an item of masks}}; Split.masks has the first's

    @property
    def counts(self):
        """Images per split."""
        return {name: len(split) for name, split in self.splits.items()}

    @property
    def split_id(self):
        """A fingerprint of what is validated and tested on: runs with another one cannot be compared."""
        hashes = [np.sort(self.store.hashes[self.splits[name].rows]).tobytes() for name in ("val", "test")]
        return hashlib.blake2b(b"|".join(hashes), digest_size=6).hexdigest()


def data_folder(args):
    """--data-dir as a Path that exists, or an error."""
    if args.data_dir is None:
        fail(f"--dataset {args.dataset} needs --data-dir, the folder with the images")
    root = Path(args.data_dir)
    if not root.is_dir():
        fail(f"--data-dir {root}: there is no such folder (looked in {Path.cwd()})")
    return root


def images_under(folder):
    """Every image file under a folder, sorted, hidden files left out."""
    return sorted(str(path) for path in Path(folder).rglob("*")
                  if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))


def index_demo(args):
    """800 drawn lesions (see `demo_image`) in four classes of texture, 600 / 100 / 200, nothing to
    download."""
    parts = {"train": range(0, 600), "val": range(600, 700), "test": range(700, 900)}
    return Dataset("demo", "classes", list(DEMO_CLASSES), {
        name: Split([f"demo/{i:04d}" for i in part], np.array([i % 4 for i in part]),
                    masks=[f"demo-mask/{i:04d}" for i in part]) for name, part in parts.items()})


def index_folder(args):
    """train/, optional val/ and test/, in each a folder per class (the layout of torchvision's
    ImageFolder)."""
    root, found = data_folder(args), {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if folder.name.lower() in SPLIT_NAMES:
            found[SPLIT_NAMES[folder.name.lower()]] = folder
    if "train" not in found:
        fail(f"{root}: --dataset folder expects train/ with a folder per class; found "
             f"{some(os.listdir(root))}")
    classes = sorted(path.name for path in found["train"].iterdir() if path.is_dir())
    if len(classes) < 2:
        fail(f"{found['train']}: expected a folder per class, at least two; found {len(classes)}")
    splits = {}
    for name, folder in found.items():
        paths, labels = [], []
        for class_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
            if class_folder.name not in classes:
                fail(f"{class_folder}: class {class_folder.name!r} is not in train, which has "
                     f"{some(classes)}")
            files = images_under(class_folder)
            if not files:
                fail(f"{class_folder}: the class has no images; add some or remove the folder")
            paths += files
            labels += [classes.index(class_folder.name)] * len(files)
        splits[name] = Split(paths, np.array(labels))
    return Dataset(root.resolve().name, "classes", classes, splits)


def read_csv(file, columns, parse=dict):
    """Rows of a CSV as dicts (BOM and CRLF are fine); every name in `columns` must stand in its head.
    Of a long table parse(row) keeps less than all."""
    if not Path(file).is_file():
        fail(f"{file}: there is no such CSV file")
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines)
        head = next(reader, [])
        for column in columns:
            if column and column not in head:
                fail(f"{file}: no column {column!r}; it has {some(head, 30)}")
        rows = [parse(zip(head, row + [""] * (len(head) - len(row)))) for row in reader if row]
    if not rows:
        fail(f"{file}: no rows")
    return rows


def resolve_paths(file, names, folders, skip=None):
    """Where the images that `file` lists really are: each name under the first of `folders` that has it.
    All that are nowhere are named in one error; with skip=True (--skip-broken) they are None."""
    paths, missing, folders, having = [], [], list(map(str, folders)), {}
    for name in names:
        top = name[:name.find("/", 1) + 1]  # whether a folder has this part of a name is looked up once
        if top not in having:
            having[top] = [os.path.join(folder, "") for folder in folders
                           if not top or os.path.isdir(os.path.join(folder, top))]
        found = next((path for folder in having[top]
                      if os.path.isfile(path := name if name.startswith("/") else folder + name)), None)
        paths.append(found)
        if found is None:
            missing.append(name)
    if missing:
        message = (f"{len(missing)} of {len(names)} listed images are not under {some(folders)}: "
                   f"{some(missing, 100)}")
        if not skip:
            fail(f"{file}: {message}" + ("" if skip is None else ". --skip-broken leaves them out"))
        say(f"left out: {message}")
    return paths


def index_csv(args):
    """A row an image: --image-column, --label-column (several, comma separated, 0/1: multilabel), optional
    --split-column and --group-column. Paths are relative to the CSV's folder or to its images/."""
    file = Path(args.csv) if args.csv else data_folder(args) / "labels.csv"
    columns = args.label_column.split(",")
    rows = read_csv(file, [args.image_column, *columns, args.split_column, args.group_column])
    folders = [file.parent, file.parent / "images"] + ([Path(args.data_dir)] if args.data_dir else [])
    paths = resolve_paths(file, [row[args.image_column] for row in rows], folders)
    text = [[(row[column] or "").strip() for column in columns] for row in rows]
    if len(columns) > 1:
        wrong = [f"{Path(paths[i]).name} {' '.join(t)}" for i, t in enumerate(text)
                 if not set(t) <= {"0", "1", "0.0", "1.0"}]
        if wrong:
            fail(f"{file}: multilabel columns hold 0 or 1; {len(wrong)} rows do not: {some(wrong)}")
        classes, labels = columns, np.array([[float(value) for value in t] for t in text], np.float32)
    else:
        if any(not t[0] for t in text):
            fail(f"{file}: no label for {some(p for p, t in zip(paths, text) if not t[0])}")
        names = {t[0] for t in text}
        numeric = all(name.lstrip("-").isdigit() for name in names)  # 10 comes after 2
        classes = sorted(names, key=int if numeric else str)
        labels = np.array([classes.index(t[0]) for t in text])
    groups = [row[args.group_column] for row in rows] if args.group_column else None
    every = Split(paths, labels, groups)
    if not args.split_column:
        return Dataset(file.parent.resolve().name, "multilabel" if len(columns) > 1 else "classes", classes,
                       {"train": every})
    parts = defaultdict(list)
    for i, row in enumerate(rows):
        value = (row[args.split_column] or "").strip().lower()
        if value not in SPLIT_NAMES:
            fail(f"{file}: split {value!r} of {row[args.image_column]} is none of train, val, test")
        parts[SPLIT_NAMES[value]].append(i)
    if "train" not in parts:
        fail(f"{file}: column {args.split_column!r} names no train rows")
    return Dataset(file.parent.resolve().name, "multilabel" if len(columns) > 1 else "classes", classes,
                   {name: every.take(parts[name]) for name in ("train", "val", "test") if name in parts})


# ---------------------------------------------------------------- data: the paper's datasets ----------------

# task, headline metric, channels, mean, std (None: measured on train), classes
SPECS = {
    "aptos2019": ("classes", "quadratic_kappa", 3, (0.415, 0.221, 0.073), (0.275, 0.150, 0.081),
                  "No DR, Mild, Moderate, Severe, Proliferative DR"),
    "ddsm": ("classes", "roc_auc", 1, (0.286,), (0.267,), "normal, abnormal"),
    "isic2019": ("classes", "recall", 3, (0.66776717, 0.52960888, 0.52434725),
                 (0.22381877, 0.20363036, 0.21538623), "MEL, NV, BCC, AK, BKL, DF, VASC, SCC"),
    "chexpert": ("multilabel", "roc_auc", 1, (0.503,), (0.292,),
                 "No Finding, Enlarged Cardiomediastinum, Cardiomegaly, Lung Opacity, Lung Lesion, Edema, "
                 "Consolidation, Pneumonia, Atelectasis, Pneumothorax, Pleural Effusion, Pleural Other, "
                 "Fracture, Support Devices"),
    "camelyon": ("classes", "roc_auc", 3, (0.69991202, 0.53839318, 0.69108667),
                 (0.2308955, 0.27435492, 0.20865005), "normal, tumor"),
    "isic2018": ("masks", "iou", 3, None, None, "background, lesion"),
    "csaws": ("masks", "iou", 1, None, None, "background, tumour")}
CHEXPERT_FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")  # competition
CSAWS_VAL = "000 001 012 018 025 030 034 038 053 062 068 075 083 127 131 139 156 181 245 249".split()
CSAWS_MAPS = ("cancer calcifications axillary_lymph_nodes thick_vessels foreign_object skin nipple text "
              "non-mammary_tissue pectoral_muscle mammary_gland").split()  # the owners' order: first on top


def specified(name, splits):
    """The Dataset of a line of SPECS."""
    task, metric, channels, mean, std, classes = SPECS[name]
    mean, std = (values and [*values] * (3 // channels) for values in (mean, std))
    return Dataset(name, task, classes.split(", "), splits, metric, mean, std)


def expect(args, *names, inside=()):
    """--data-dir, or the first of its folders `inside` that is there; it must hold `names`."""
    root = data_folder(args)
    if not (root / names[0]).exists():
        root = next((root / folder for folder in inside if (root / folder).is_dir()), root)
    if not all((root / name).exists() for name in names):
        fail(f"--data-dir {root}: --dataset {args.dataset} looks for {', '.join(names)} in it; found "
             f"{some(sorted(os.listdir(root)), 12) or 'an empty folder'}")
    return root


def known_labels(file, names, values, known):
    """Class indices (N,) int64 of the labels that stand beside `names`; known: {label: index}."""
    wrong = [f"{value!r} of {name}" for name, value in zip(names, values) if value.strip() not in known]
    if wrong:
        fail(f"{file}: {len(wrong)} labels are none of {some(known, 14)}: {some(wrong, 20)}")
    return np.array([known[value.strip()] for value in values], np.int64)


def listed_images(args, file, names, folders):
    """resolve_paths, and a word about images that lie beside the listed ones and are not listed."""
    paths = resolve_paths(file, names, folders, args.skip_broken)
    beside = {entry.path for folder in {os.path.dirname(path) for path in paths if path}
              for entry in os.scandir(folder) if os.path.splitext(entry.name)[1].lower() in SUFFIXES}
    unlisted = sorted(beside.difference(paths))
    if unlisted:
        say(f"note: {len(unlisted)} images are not listed in {file} and left out: {some(unlisted)}")
    return paths


def random_split(every, share, seed, groups=None):
    """The authors' split: shuffled by Python's random.Random(seed), the first int(N * share) held out, half
    of them val, half test. seed=None keeps the order; groups (N) stay whole: a cut moves to one's end."""
    members = defaultdict(list)
    for i in range(len(every)):
        members[groups[i] if groups else i].append(i)
    members = list(members.values())
    if seed is not None:
        random.Random(seed).shuffle(members)
    order, ends = [i for group in members for i in group], np.cumsum([0, *map(len, members)])
    held = int(len(every) * share)
    half, held = (int(ends[np.searchsorted(ends, count)]) for count in (held // 2, held))
    return {name: every.take(order[part]) for name, part in (
        ("train", slice(held, None)), ("val", slice(half)), ("test", slice(half, held)))}


def join(splits):
    """Several Splits as one."""
    chain = lambda name: (None if getattr(splits[0], name) is None else  # noqa: E731
                          [value for split in splits for value in getattr(split, name)])
    labels = None if splits[0].labels is None else np.concatenate([split.labels for split in splits])
    return Split(chain("paths"), labels, chain("groups"), chain("masks"))


def settle_patients(splits, mode):
    """Splits as published may tear patients apart: as --leakage says, warn (and keep them as they are), stop,
    or drop their images from train (from val, where test has them)."""
    for outer in [name for name in ("train", "val") if name in splits]:
        others = {g for name, split in splits.items() if (outer, name) in
                  (("train", "val"), ("train", "test"), ("val", "test")) for g in split.groups}
        torn = [g in others for g in splits[outer].groups]
        if any(torn):
            names = sorted(others.intersection(splits[outer].groups))
            message = f"{len(names)} patients of {outer} also stand in a later split: {some(names)}"
            if mode == "error":
                fail(f"{message}; --leakage drop takes them out of {outer}")
            say(f"WARNING: {message}; {'scores will flatter' if mode == 'warn' else 'taken out of ' + outer}")
            splits[outer] = splits[outer].take(np.flatnonzero(~np.array(torn) | (mode == "warn")))
            splits[outer].groups = [f"{g} ({outer})" if g in others else g for g in splits[outer].groups]
    return splits


def index_aptos2019(args):
    """train.csv (id_code, diagnosis 0 to 4) and train_images/{id_code}.png: the authors' 70/15/15."""
    file = expect(args, "train.csv", "train_images") / "train.csv"
    rows = read_csv(file, ["id_code", "diagnosis"])
    names = [f"{row['id_code']}.png" for row in rows]
    labels = known_labels(file, names, [row["diagnosis"] for row in rows], {str(i): i for i in range(5)})
    paths = listed_images(args, file, names, [file.parent / "train_images"])
    return specified("aptos2019", random_split(Split(paths, labels), 0.3, args.split_seed))


def index_ddsm(args):
    """ddsm_raw_image_lists/{train,val,test}.txt, a path under ddsm_raw/ a line, such as
    cancer_15-B_3504_1.RIGHT_CC.LJPEG.1.jpg of patient B_3504; or else CBIS-DDSM."""
    if any(data_folder(args).rglob("*_case_description_t*_set.csv")):
        return index_cbis_ddsm(args)
    lists = {part: f"ddsm_raw_image_lists/{part}.txt" for part in ("train", "val", "test")}
    known, splits = {"normal": 0, "benign": 1, "cancer": 1}, {}
    root = expect(args, "ddsm_raw", *lists.values())
    for part, file in lists.items():
        names = [line.strip() for line in (root / file).read_text("utf-8-sig").splitlines() if line.strip()]
        bases = [os.path.basename(name) for name in names]
        patients = [(re.search(r"[A-D]_\d{4}(?=_\d)", base) or [base])[0] for base in bases]
        labels = known_labels(root / file, names, [base.split("_")[0] for base in bases], known)
        paths = resolve_paths(root / file, names, [root / "ddsm_raw"], args.skip_broken)
        splits[part] = Split(paths, labels, patients)
    return specified("ddsm", settle_patients(splits, args.leakage))


def index_cbis_ddsm(args):
    """CBIS-DDSM: {mass,calc}_case_description_{train,test}_set.csv of TCIA and the full mammograms as PNG or
    JPEG, named (or their folder) by series or case of "image file path". One MALIGNANT lesion decides."""
    root, images = data_folder(args), defaultdict(dict)
    files = {name: path for path in images_under(root) for name in (Path(path).stem, Path(path).parent.name)}
    for file in sorted(root.rglob("*_case_description_t*_set.csv")):
        rows = read_csv(file, ["patient_id", "pathology", "image file path"])
        cases = [row["image file path"].strip().split("/") for row in rows]
        found = [files.get(case[-2 % len(case)]) or files.get(case[0], case[0]) for case in cases]
        paths = resolve_paths(file, found, [""], args.skip_broken)
        labels = known_labels(file, [case[0] for case in cases], [row["pathology"] for row in rows],
                              {"BENIGN": 0, "BENIGN_WITHOUT_CALLBACK": 0, "MALIGNANT": 1})
        part = images["test" if "_test_" in file.name else "train"]
        for path, label, row in zip(paths, labels, rows):
            part[path] = (max(label, part.get(path, (0,))[0]), row["patient_id"])
    if "train" not in images:
        fail(f"{root}: no mass or calc_case_description_train_set.csv in it; found "
             f"{some(os.listdir(root), 12)}")
    splits = {}
    for name, part in images.items():
        labels, patients = zip(*part.values())
        splits[name] = Split([*part], np.array(labels), [*patients])
    splits = settle_patients(splits, args.leakage)
    return Dataset("cbis-ddsm", "classes", ["benign", "malignant"], splits, "roc_auc")


def index_isic2019(args):
    """ISIC_2019_Training_GroundTruth.csv (image, one-hot classes) and the JPEGs: the authors' 80/10/10 of
    images, or with --group-split of lesions, by lesion_id of ISIC_2019_Training_Metadata.csv."""
    root = expect(args, "ISIC_2019_Training_GroundTruth.csv")
    file, classes = root / "ISIC_2019_Training_GroundTruth.csv", SPECS["isic2019"][-1].split(", ")
    rows, groups = read_csv(file, ["image", *classes]), None
    names = [row["image"] for row in rows]
    hot = [" ".join(c for c in [*classes, "UNK"] if row.get(c, "0") not in ("0", "0.0")) for row in rows]
    labels = known_labels(file, names, hot, {name: i for i, name in enumerate(classes)})
    paths = listed_images(args, file, [f"{name}.jpg" for name in names],
                          [root / "ISIC_2019_Training_Input", root / "train"])
    if args.group_split:
        meta = read_csv(root / "ISIC_2019_Training_Metadata.csv", ["image", "lesion_id"])
        lesions = {row["image"]: row["lesion_id"] for row in meta}
        groups = [lesions.get(name) or name for name in names]  # some 2,000 images name no lesion
    return specified("isic2019", random_split(Split(paths, labels, groups), 0.2, args.split_seed, groups))


def index_chexpert(args):
    """train.csv (Path, ..., 14 labels) sorted by Path, its first 20 % held out, whole patients. Blank and -1
    are 0 (U-zeros), a row without a positive is No Finding. --view frontal leaves lateral images out."""
    file = expect(args, "train.csv", inside=("CheXpert-v1.0-small", "CheXpert-v1.0")) / "train.csv"
    known = {"": 0, "0": 0, "0.0": 0, "-1": 0, "-1.0": 0, "1": 1, "1.0": 1}
    classes = SPECS["chexpert"][-1].split(", ")

    def parse(row):  # a table of 224,316 dicts would take half a gigabyte
        row = dict(row)
        name = re.sub(r"^CheXpert-v1\.0[^/]*/", "", row["Path"])
        return name, row["Frontal/Lateral"] == "Frontal", bytes(known.get(row[label], 9) for label in classes)
    names, frontal, labels = zip(*sorted(read_csv(file, ["Path", "Frontal/Lateral", *classes], parse)))
    labels = np.frombuffer(b"".join(labels), np.uint8).reshape(-1, len(classes)).astype(np.float32)
    wrong = [f"{classes[k]} of {names[i]}" for i, k in np.argwhere(labels == 9)]
    if wrong:
        fail(f"{file}: {len(wrong)} labels are none of blank, 0, 1, -1: {some(wrong, 20)}")
    labels[labels.sum(1) == 0, 0] = 1
    patients = [sys.intern((re.search(r"patient\d+", name) or [name])[0]) for name in names]
    wanted = [front or args.view == "all" for front in frontal]  # the rest goes after the split
    found = [name for name, is_wanted in zip(names, wanted) if is_wanted]
    found = iter(resolve_paths(file, found, [file.parent], args.skip_broken))
    paths = [next(found) if is_wanted else None for is_wanted in wanted]
    return specified("chexpert", random_split(Split(paths, labels, patients), 0.2, None, patients))


def index_camelyon(args):
    """PatchCamelyon's camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5, its official split; or
    {train,valid,test}_labels.csv (id, label) with {train,valid,test}/{id}.tif or .png, train at least."""
    root, splits, parts = data_folder(args), {}, {"train": "train", "valid": "val", "test": "test"}
    stem = "camelyonpatch_level_2_split"
    if any(root.glob("camelyonpatch_*")):
        expect(args, *(f"{stem}_{part}_{what}.h5" for part in parts for what in "xy"))
        for name, part in parts.items():
            x, y = (read_hdf5(root / f"{stem}_{name}_{what}.h5", what) for what in "xy")
            if len(x) != len(y) or x.shape[3:] != (3,) or x.dtype != np.uint8:
                fail(f"{root}/{stem}_{name}_x.h5: {x.shape} {x.dtype} for {len(y)} labels; "
                     "expected (N, 96, 96, 3) uint8")
            splits[part] = Split([f"{root}/{stem}_{name}_x.h5:{i}" for i in range(len(y))],
                                 y[:].reshape(-1).astype(np.int64))
        return specified("camelyon", splits)
    expect(args, "train_labels.csv", "train")
    for name, part in parts.items():
        if (file := root / f"{name}_labels.csv").exists():
            rows = read_csv(file, ["id", "label"])
            suffix = ".png" if (root / name / f"{rows[0]['id']}.png").is_file() else ".tif"
            names = [row["id"] + suffix for row in rows]
            labels = known_labels(file, names, [row["label"] for row in rows], {"0": 0, "1": 1})
            splits[part] = Split(listed_images(args, file, names, [root / name]), labels)
    return specified("camelyon", splits)


def index_isic2018(args):
    """ISIC2018_Task1-2_Training_Input/{id}.jpg, ISIC2018_Task1_Training_GroundTruth/{id}_segmentation.png:
    80/10/10 of the sorted ids; official Test folders, if there, are test, and train gets that tenth."""
    def pairs(part):
        images, masks = f"ISIC2018_Task1-2_{part}_Input", f"ISIC2018_Task1_{part}_GroundTruth"
        root = expect(args, images, masks)
        paths = [path for path in images_under(root / images) if path.endswith(".jpg")]
        names = [f"{Path(path).stem}_segmentation.png" for path in paths]
        return Split(paths, masks=resolve_paths(root / images, names, [root / masks]))
    splits = random_split(pairs("Training"), 0.2, args.split_seed)
    if (data_folder(args) / "ISIC2018_Task1-2_Test_Input").is_dir():
        splits.update(train=join([splits["train"], splits["test"]]), test=pairs("Test"))
    return specified("isic2018", splits)


def index_csaws(args):
    """CSAW-S: anonymized_dataset/{patient}/{patient}_{n}.png with binary maps {patient}_{n}_{class}.png, the
    owners' 20 validation patients, test_data/ with annotators 1 to 3. --tissue takes all 11 classes."""
    root = expect(args, "anonymized_dataset", "test_data", inside=("CsawS",))
    wanted = CSAWS_MAPS if args.tissue else CSAWS_MAPS[:1]

    def scans(folder):  # {stem: path}; an 8-bit duplicate sorts behind its original and takes its place
        matches = [re.fullmatch(r".*/(\w+_\d+?)(_8bit)?\.png", path) for path in images_under(folder)]
        return {match[1]: match[0] for match in matches if match} or fail(
            f"{folder}: no scan such as 000/000_0.png")

    def masks(stems, folder):  # a missing map is a class that is not there; none at all is a mistake
        items = []
        for stem in stems:
            place = {name: folder / stem.rsplit("_", 1)[0] / f"{stem}_{name}" for name in CSAWS_MAPS}
            maps = {name: f"{path}{end}.png" for name, path in place.items() for end in ("_8bit", "")
                    if os.path.isfile(f"{path}{end}.png")}
            items.append([(i, maps[name]) for i, name in [*enumerate(wanted, 1)][::-1] if name in maps]
                         or [(0, path) for path in maps.values()][:1])
        missing = [stem for stem, item in zip(stems, items) if not item]
        if missing:
            fail(f"{folder}: {len(missing)} of {len(items)} scans have no map (such as "
                 f"{missing[0]}_cancer.png): {some(missing, 100)}")
        return items
    train, test = scans(root / "anonymized_dataset"), scans(root / "test_data" / "anonymized_dataset")
    every, tests = (Split([*found.values()], groups=[stem.rsplit("_", 1)[0] for stem in found])
                    for found in (train, test))
    every.masks = masks(train, root / "anonymized_dataset")
    experts = {f"annotator_{k}": masks(test, root / "test_data" / f"annotator_{k}") for k in (1, 2, 3)}
    tests.masks, is_val = experts["annotator_1"], np.isin(every.groups, CSAWS_VAL)
    dataset = specified("csaws", {"train": every.take(np.flatnonzero(~is_val)), "test": tests})
    if is_val.any():
        dataset.splits["val"] = every.take(np.flatnonzero(is_val))
    dataset.classes = ["background", "tumour", *wanted[1:]]
    dataset.annotators = {name: dict(zip(tests.paths, items)) for name, items in experts.items()}
    return dataset


INDEX = {"demo": index_demo, "folder": index_folder, "csv": index_csv, "aptos2019": index_aptos2019,
         "ddsm": index_ddsm, "isic2019": index_isic2019, "chexpert": index_chexpert,
         "camelyon": index_camelyon, "isic2018": index_isic2018, "csaws": index_csaws}


def read_split_file(dataset, args):
    """Put the images into the splits that --split-file names by their paths below --data-dir."""
    every, root = join(list(dataset.splits.values())), f"{Path(args.data_dir or '.')}/"
    where = {path.removeprefix(root): i for i, path in enumerate(every.paths)}
    try:
        content = json.loads(Path(args.split_file).read_text())
        parts = {part: content[part] for part in ("train", "val", "test")}
        unknown = [name for names in parts.values() for name in names if name not in where]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--split-file {args.split_file}: not a JSON of train, val and test ({error!r})")
    if unknown:
        fail(f"--split-file {args.split_file}: {len(unknown)} images are not there: {some(unknown, 20)}")
    dataset.splits = {part: every.take([where[name] for name in names]) for part, names in parts.items()}
    unused = len(where) - sum(map(len, parts.values()))
    say(f"split read from {args.split_file}; {unused} images are not in it")


def write_split_file(dataset, args):
    """Write --split-file: {"train": [paths below --data-dir], "val": ..., "test": ...}."""
    root = f"{Path(args.data_dir or '.')}/"
    try:
        write_json(args.split_file, {part: [path.removeprefix(root) for path in split.paths]
                                     for part, split in dataset.splits.items()})
    except OSError as error:
        fail(f"--split-file {args.split_file} cannot be written ({error})")
    say(f"split written to {args.split_file}")


def carve(split, share, rng):
    """Cut `share` of a split off, stratified by class, whole groups only: (rest, cut)."""
    members = defaultdict(list)
    for i in range(len(split)):
        members[split.groups[i] if split.groups else i].append(i)
    strata = defaultdict(list)
    labels = split.labels.tolist() if split.labels is not None else [0] * len(split)  # str of NumPy's is slow
    for group, indices in members.items():
        strata[str(labels[indices[0]])].append(indices)
    cut = []
    for label in sorted(strata):
        groups = strata[label]
        wanted, taken = share * sum(map(len, groups)), 0
        for position in rng.permutation(len(groups)):
            if taken + len(groups[position]) / 2 > wanted:
                break
            cut += groups[position]
            taken += len(groups[position])
    cut_set = set(cut)
    return split.take([i for i in range(len(split)) if i not in cut_set]), split.take(sorted(cut))


def complete_splits(dataset, seed):
    """Give a dataset without test or val one of each: 15 % of its images apiece, carved from train."""
    missing = [name for name in ("test", "val") if name not in dataset.splits]
    train, rng = dataset.splits["train"], np.random.default_rng(seed)
    total = len(train)
    for name in missing:
        train, dataset.splits[name] = carve(train, 0.15 * total / len(train), rng)
    dataset.splits = {"train": train, "val": dataset.splits["val"], "test": dataset.splits["test"]}
    for name, split in dataset.splits.items():
        if len(split) == 0:
            fail(f"{dataset.name}: {total} images are too few to carve a {name} split from; give one")
    if dataset.task == "classes":
        counts = {name: np.bincount(split.labels, minlength=len(dataset.classes))
                  for name, split in dataset.splits.items()}
        unseen = [name for i, name in enumerate(dataset.classes) if counts["train"][i] == 0]
        if unseen:
            fail(f"{dataset.name}: no train image has the label {some(unseen)}, but val or test do; "
                 "give it train images or leave it out")
    owners = defaultdict(set)
    for name, split in dataset.splits.items():
        for group in split.groups or []:
            owners[group].add(name)
    torn = [f"{group} ({', '.join(sorted(names))})" for group, names in owners.items() if len(names) > 1]
    if torn:
        fail(f"{dataset.name}: {len(torn)} groups stand in more than one split: {some(torn)}")


def limit_images(split, count, seed):
    """`count` images of a split, its classes in proportion (to within one image)."""
    if count >= len(split):
        return split
    order = np.random.default_rng([seed, 1]).permutation(len(split))
    if split.labels is None or split.labels.ndim > 1:
        return split.take(sorted(order[:count]))
    # the j-th image of a class of n sorts at (j + 1/2) / n: every prefix then holds the classes in proportion
    seen, sizes, key = Counter(), Counter(split.labels.tolist()), np.zeros(len(split))
    for i in order:
        label = int(split.labels[i])
        key[i] = (seen[label] + 0.5) / sizes[label]
        seen[label] += 1
    return split.take(sorted(np.argsort(key, kind="stable")[:count]))


# ---------------------------------------------------------------- data: images and the demo -----------------

DEMO_CLASSES = ("globular", "homogeneous", "reticular", "streaked")


def demo_image(index, size=128):
    """Drawn lesion `index` of class index % 4: image (size, size, 3) uint8 and mask (size, size) bool. The
    class is in the texture and the border; colour, light, place, size and hairs are drawn regardless of
    it."""
    rng = np.random.default_rng([2303, 7034, index])
    y, x = np.mgrid[:size, :size] / size

    def noise(cells):  # smooth, zero mean, unit deviation
        grid = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
        field = np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
        return (field - field.mean()) / field.std()

    kind = DEMO_CLASSES[index % 4]
    cx, cy, radius = rng.uniform(0.36, 0.64), rng.uniform(0.36, 0.64), rng.uniform(0.2, 0.33)
    angle = np.arctan2(y - cy, x - cx)
    distance = np.hypot((x - cx) * rng.uniform(0.8, 1.25), y - cy) / radius
    outline = 1 + sum(rng.normal(0, 0.25 / k) * np.cos(k * angle + rng.uniform(0, 7)) for k in (2, 3, 4))
    spokes = np.cos(rng.integers(16, 26) * angle + 1.2 * noise(6))
    if kind == "streaked":  # a border of fine rays, as in a spreading naevus
        outline = outline + 0.14 * np.clip(spokes, 0, 1) * rng.uniform(0.6, 1)
    inside = distance / outline
    turn, pitch = rng.uniform(0, np.pi), rng.uniform(0.055, 0.08)
    u = (x * np.cos(turn) + y * np.sin(turn) + 0.012 * noise(7)) / pitch
    v = (y * np.cos(turn) - x * np.sin(turn) + 0.012 * noise(7)) / pitch
    if kind == "globular":  # round spots on a jittered grid
        grain = np.exp(-((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2) / 0.06)
    elif kind == "reticular":  # a net of thin lines
        grain = np.exp(-np.minimum(np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)) ** 2 / 0.02)
    elif kind == "streaked":  # rays that fade towards the middle
        grain = spokes * np.clip(inside - 0.25, 0, 1)
    else:
        grain = noise(5)
    soft = 1 / (1 + np.exp((inside - 1) / rng.uniform(0.02, 0.07)))
    grain = (grain - np.average(grain, weights=soft)) * rng.choice([-1, 1])
    grain = grain / np.sqrt(np.average(grain ** 2, weights=soft)) + 0.7 * noise(20)

    skin = np.array([0.80, 0.62, 0.52]) * rng.uniform(0.75, 1.1) + rng.normal(0, 0.03, 3)
    lesion = skin * rng.uniform(0.45, 0.8) + rng.normal(0, 0.03, 3)
    image = skin + 0.03 * noise(8)[..., None] + 0.015 * rng.normal(size=(size, size, 3))
    body = lesion + (rng.uniform(0.07, 0.12) * grain + 0.05 * noise(4))[..., None] * rng.uniform(0.7, 1.2, 3)
    image = image * (1 - soft[..., None]) + body * soft[..., None]
    tilt = rng.uniform(0, 2 * np.pi)
    image = image * (1 + rng.uniform(0, 0.35) * ((x - 0.5) * np.cos(tilt)
                                                 + (y - 0.5) * np.sin(tilt)))[..., None]
    picture = Image.fromarray((255 * np.clip(image, 0, 1)).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.poisson(3)):
        ends = rng.uniform(-0.1, 1.1, (2, 2)) * size
        bend = ends.mean(0) + rng.normal(0, 0.12, 2) * size
        curve = [tuple((1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * bend + t ** 2 * ends[1])
                 for t in np.linspace(0, 1, 20)]
        pen.line(curve, fill=tuple(int(c) for c in rng.uniform(20, 90, 3)), width=int(rng.integers(1, 3)))
    return np.asarray(picture), inside < 1


def open_image(path):
    """A file, or a name of the demo set, as 8-bit (H, W, C) with C = 1 for grey and 3 for colour.

    16- and 32-bit greys are scaled over their own range (Pillow's convert would clip them to white); EXIF
    rotation is applied; transparent pixels become black; three equal channels become one."""
    if path.startswith("demo/"):
        return demo_image(int(path[5:]))[0]
    with Image.open(path) as image:
        image.draft(None, (1024, 1024))  # JPEG only: decode no larger than some 1024 pixels need
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            values = np.asarray(image, dtype=np.float64)
            finite = values[np.isfinite(values)]
            low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
            values = np.nan_to_num((values - low) / max(high - low, 1e-12), nan=0, posinf=1, neginf=0)
            return np.round(255 * values).astype(np.uint8)[..., None]
        if image.mode in ("1", "L"):
            return np.asarray(image.convert("L"))[..., None]
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        pixels = np.asarray(image.convert("RGB"))
    same = (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all()
    return pixels[..., :1] if same else pixels


def resize_short_side(pixels, side, resample=Image.Resampling.BILINEAR):
    """(H, W, C) uint8 so scaled that its short side is `side` pixels."""
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    if size == (width, height):
        return pixels
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    resized = np.asarray(image.resize(size, resample))
    return resized[..., None] if resized.ndim == 2 else resized


# ---------------------------------------------------------------- data: cache and loader --------------------

def read_hdf5(file, key):
    """An array of an HDF5 file, read where it lies: mapped if it is in one piece, else by h5py, whose lock
    lets threads share it."""
    try:
        import h5py
    except ImportError:
        fail("--dataset camelyon reads HDF5 files, for which h5py is missing: pip install h5py")
    try:
        array = h5py.File(file, "r")[key]
    except (OSError, KeyError) as error:
        fail(f"{file}: no HDF5 file with {key!r} in it ({error})")
    offset = array.id.get_offset()
    return array if offset is None else np.asarray(np.memmap(file, array.dtype, "r", offset, array.shape))


@dataclass
class PatchStore:
    """A Store whose images stay in HDF5 files; where (N, 2): the array of each image and its place in it."""
    arrays: list
    where: np.ndarray
    shapes: np.ndarray
    sizes: np.ndarray
    hashes: np.ndarray
    broken: dict

    def image(self, row):
        """Image `row`, (H, W, 3) uint8."""
        array, place = self.where[row]
        return self.arrays[array][place]


def open_patches(paths, args):
    """The PatchStore of images named FILE.h5:PLACE. Its hashes are computed once, into --cache-dir."""
    names, places = zip(*(path.rsplit(":", 1) for path in paths))
    files = {file: i for i, file in enumerate(sorted(set(names)))}
    arrays, which = [read_hdf5(file, "x") for file in files], np.array([files[name] for name in names])
    where = np.stack([which, np.array(places, np.int64)], 1)
    cached = Path(args.cache_dir) / f"{args.dataset}-hashes-{fingerprint(files, 0)}.u64"
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not cached.exists():
        digests = [hashlib.blake2b(array[i].tobytes(), digest_size=8).digest() for array in arrays
                   for i in tqdm(range(len(array)), "hashing", unit="image")]
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(cached, lambda part: part.write_bytes(b"".join(digests)))
        except OSError as error:
            fail(f"--cache-dir {args.cache_dir} cannot be written ({error}); give another")
    barrier()
    starts = np.cumsum([0, *map(len, arrays)])
    shapes = np.array([array.shape[1:] for array in arrays], np.int32)[which]
    hashes = np.fromfile(cached, np.uint64)[starts[which] + where[:, 1]]
    return PatchStore(arrays, where, shapes, shapes[:, :2], hashes, {})


@dataclass
class Store:
    """Decoded images, one after the other in one memory-mapped file: pixels (bytes,) uint8, offsets (N,) into
    it, shapes (N, 3) as (height, width, channels), sizes (N, 2) of the originals, hashes (N,) of the pixels,
    broken {row: reason}."""
    folder: Path
    pixels: np.ndarray
    offsets: np.ndarray
    shapes: np.ndarray
    sizes: np.ndarray
    hashes: np.ndarray
    broken: dict

    def image(self, row):
        """Image `row`, (H, W, C) uint8, a view of the file."""
        height, width, channels = self.shapes[row]
        start = self.offsets[row]
        return self.pixels[start:start + height * width * channels].reshape(height, width, channels)


class Decoder(torch.utils.data.Dataset):
    """Decodes and shrinks one image (or mask) an item, for the processes that build the cache."""

    def __init__(self, paths, side, decode, resample):
        self.paths, self.side, self.decode, self.resample = paths, side, decode, resample

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            pixels = self.decode(self.paths[i])
        # Pillow's plugins raise nearly anything on a damaged file; all are named later
        except Exception as error:
            return None, (0, 0), 0, f"{type(error).__name__}: {error}"
        size = pixels.shape[:2]
        pixels = np.ascontiguousarray(resize_short_side(pixels, self.side, self.resample))
        digest = hashlib.blake2b(pixels.tobytes() + repr(pixels.shape).encode(), digest_size=8).digest()
        return pixels, size, int.from_bytes(digest, "little"), None


def fingerprint(paths, side):
    """What a cache is made of: every path with its size and time of change, and the resize."""
    digest, here = hashlib.blake2b(f"4 {side}".encode(), digest_size=6), os.path.join(os.getcwd(), "")
    for path in paths:
        if not isinstance(path, str):  # the binary maps that make one mask
            digest.update(repr(path).encode() + fingerprint([part for _, part in path], side).encode())
        elif path.startswith("demo"):
            digest.update(path.encode())
        else:
            try:
                stat = os.stat(path)
                state = f"{stat.st_size} {stat.st_mtime_ns}"
            except OSError:  # a link to nothing: decoding will name it
                state = "missing"
            path = os.path.normpath(path if path.startswith("/") else here + path)
            digest.update(f"{path} {state}\n".encode())
    return digest.hexdigest()


def build_store(folder, paths, side, workers, decode, resample):
    """Decode every image into folder/pixels.bin and folder/index.npz, in several processes."""
    free, needed = shutil.disk_usage(folder.parent).free, 4 * side * side * len(paths)
    if needed > free:
        fail(f"--cache-dir {folder.parent}: caching {len(paths)} images at --resize {side} takes up to "
             f"{needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; lower --resize or give "
             "another --cache-dir")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # an interrupted build; the lock says nobody else is at it
    partial.mkdir()
    loader = torch.utils.data.DataLoader(Decoder(paths, side, decode, resample), batch_size=8,
                                         num_workers=workers, collate_fn=list,
                                         prefetch_factor=4 if workers else None)
    count, offset, broken = len(paths), 0, {}
    offsets, hashes = np.zeros(count, np.int64), np.zeros(count, np.uint64)
    shapes, sizes = np.zeros((count, 3), np.int32), np.zeros((count, 2), np.int32)
    with open(partial / "pixels.bin", "wb") as out, tqdm(total=count, desc="caching", unit="image") as bar:
        for row, (pixels, size, digest, reason) in enumerate(item for batch in loader for item in batch):
            bar.update()
            if reason:
                broken[str(row)] = reason
                continue
            out.write(pixels.data)
            offsets[row], shapes[row], sizes[row], hashes[row] = offset, pixels.shape, size, digest
            offset += pixels.nbytes
    np.savez(partial / "index.npz", offsets=offsets, shapes=shapes, sizes=sizes, hashes=hashes,
             broken=json.dumps(broken))
    partial.rename(folder)


def open_store(name, paths, args, decode=open_image, resample=Image.Resampling.BILINEAR):
    """The cached pixels of `paths`, built first where they are not: by one process of a machine, the others
    wait. Files that cannot be decoded are all named, and an error unless --skip-broken."""
    if paths and isinstance(paths[0], str) and re.search(r"\.h5:\d+$", paths[0]):
        return open_patches(paths, args)
    folder = Path(args.cache_dir) / f"{name}-{args.resize}-{fingerprint(paths, args.resize)}"
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with open(folder.parent / f".{folder.name}.lock", "w") as lock:
                # a second run started meanwhile waits here, then finds it built
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not folder.exists():
                    build_store(folder, paths, args.resize, args.workers, decode, resample)
        except OSError as error:
            shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)
            fail(f"--cache-dir {args.cache_dir}: the cache cannot be written ({error}); free space there "
                 "or give another --cache-dir")
    barrier()
    index = np.load(folder / "index.npz")
    size = (folder / "pixels.bin").stat().st_size
    pixels = np.memmap(folder / "pixels.bin", np.uint8, "r") if size else np.zeros(0, np.uint8)
    broken = {int(row): reason for row, reason in json.loads(str(index["broken"])).items()}
    if broken:
        names = "; ".join(f"{paths[row]} ({reason})" for row, reason in sorted(broken.items()))
        message = f"{len(broken)} of {len(paths)} images cannot be decoded: {names}"
        if not args.skip_broken:
            fail(message + ". Mend or remove them, or leave them out with --skip-broken")
        say(f"left out: {message}")
    return Store(folder, pixels, index["offsets"], index["shapes"], index["sizes"], index["hashes"], broken)


def check_leakage(dataset, mode):
    """Count identical images (by the hash of their pixels) that stand in two splits: {"test_in_train": n,
    ...}. mode "warn" says so, "error" stops, "drop" takes them out of train (and out of val, where test has
    them)."""
    hashes = {name: dataset.store.hashes[split.rows] for name, split in dataset.splits.items()}
    for inner, outer in (("test", "train"), ("val", "train"), ("test", "val")):
        count = int(np.isin(hashes[inner], hashes[outer]).sum())
        dataset.leakage[f"{inner}_in_{outer}"] = count
        if count:
            message = (f"leakage: {count} of {len(hashes[inner])} {inner} images also stand in {outer}, "
                       "pixel for pixel")
            if mode == "error":
                fail(message + "; --leakage drop takes them out of train")
            say(f"WARNING: {message}; "
                + (f"taken out of {outer}" if mode == "drop" else "scores will flatter"))
    if mode == "drop":
        for outer, others in (("train", ("val", "test")), ("val", ("test",))):
            clean = ~np.isin(hashes[outer], np.concatenate([hashes[name] for name in others]))
            dataset.splits[outer] = dataset.splits[outer].take(np.flatnonzero(clean))
            if not clean.any():
                fail(f"{dataset.name}: nothing is left of {outer} once the images of other splits are "
                     "dropped")


def measure(store, rows):
    """Mean and standard deviation per channel, [3] each in [0, 1], over up to 1024 images."""
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), 1024)).astype(int)]
    total, squares, count = np.zeros(3), np.zeros(3), 0
    for row in rows:
        pixels = store.image(row).reshape(-1, store.shapes[row, 2]).astype(np.float64) / 255
        total, squares, count = total + pixels.sum(0), squares + (pixels ** 2).sum(0), count + len(pixels)
    mean = total / count
    return mean.round(4).tolist(), np.sqrt(squares / count - mean ** 2).clip(1e-3).round(4).tolist()


def load_dataset(args, check=True, decode_mask=None):
    """Index, complete, cache and check the dataset that the arguments name; nothing is trained on yet.
    decode_mask(item of Split.masks, number of classes) -> (H, W, 1) uint8 asks for the masks too."""
    gc.disable()  # it would walk the rows of a large table over and over, and find no cycle in them
    dataset = INDEX[args.dataset](args)
    for name, split in dataset.splits.items():  # None: left out by --skip-broken or --view
        dataset.splits[name] = split.take([i for i, path in enumerate(split.paths) if path])
    has_split = args.split_file and Path(args.split_file).exists()
    if has_split:
        read_split_file(dataset, args)
    complete_splits(dataset, args.split_seed)
    gc.enable()
    if args.split_file and not has_split and int(os.environ.get("RANK", 0)) == 0:
        write_split_file(dataset, args)
    if args.metric:
        dataset.metric = args.metric
    elif dataset.task == "multilabel" and dataset.metric == "accuracy":
        dataset.metric = "roc_auc"
    attach_store(dataset, args, decode_mask)
    if check:
        check_leakage(dataset, args.leakage)
    if args.limit:
        dataset.splits["train"] = limit_images(dataset.splits["train"], args.limit, args.split_seed)
    if dataset.mean is None:
        dataset.mean, dataset.std = measure(dataset.store, dataset.splits["train"].rows)
    say(f"{dataset.name}: " + ", ".join(f"{n} {name}" for name, n in dataset.counts.items())
        + f" images, {len(dataset.classes)} classes ({some(dataset.classes, 14)})")
    return dataset


def attach_store(dataset, args, decode_mask=None):
    """Open the store of all splits (and of their masks), tell each where its rows are, leave broken images
    out."""
    paths = [path for split in dataset.splits.values() for path in split.paths]
    dataset.store, start = open_store(dataset.name, paths, args), 0
    broken = set(dataset.store.broken)
    if decode_mask:
        masks = [mask for split in dataset.splits.values() for mask in split.masks or []]
        if len(masks) != len(paths) or dataset.task != "masks":
            fail(f"--dataset {args.dataset} has no masks to segment; one with masks is --dataset folder")
        dataset.mask_store = open_store(f"{dataset.name}-masks{len(dataset.classes)}", masks, args, partial(
            decode_mask, classes=len(dataset.classes)), Image.Resampling.NEAREST)
        broken |= set(dataset.mask_store.broken)
    for name, split in dataset.splits.items():
        split.rows = np.arange(start, start + len(split))
        start += len(split)
        dataset.splits[name] = split.take([i for i, row in enumerate(split.rows) if row not in broken])
        if not len(dataset.splits[name]):
            fail(f"{dataset.name}: not one image of {name} can be decoded")


def upload(values, device):
    """Numbers or a CPU tensor on the device. On CUDA from pinned memory, as any other copy waits until the
    GPU has done all that it was given."""
    values = torch.as_tensor(values)
    cuda = torch.device(device).type == "cuda"
    return values.pin_memory().to(device, non_blocking=True) if cuda else values.to(device)


def read_batch(store, rows, pin_memory=False):
    """Images of a store as one padded batch: pixels (B, H, W, C) uint8, sizes (B, 2) int64 as (height,
    width)."""
    shapes = store.shapes[rows]
    height, width, channels = shapes.max(0) if len(rows) else (1, 1, 1)
    make = torch.zeros if (shapes[:, :2] < (height, width)).any() else torch.empty  # pad only if need be
    batch = make(len(rows), height, width, int(store.shapes[:, 2].max()), dtype=torch.uint8,
                 pin_memory=pin_memory)
    pixels = batch.numpy()
    for i, row in enumerate(rows):
        pixels[i, :shapes[i, 0], :shapes[i, 1]] = store.image(row)  # grey spreads over three channels
    return batch, torch.from_numpy(shapes[:, :2].astype(np.int64))


@cache  # one for all loaders: memory belongs to the stream that it was first used on
def copy_stream(device):
    """The CUDA stream of a device on which images are copied to it."""
    return torch.cuda.Stream(device)


def load_batches(store, batches, device):
    """Yield read_batch for each array of rows, on the device. The next two are read ahead by two threads,
    and on CUDA copied on a stream of their own, beside the step that is at work."""
    cuda = device.type == "cuda"

    def enter():  # a thread starts on GPU 0, and would leave memory of this process there
        if cuda:
            torch.cuda.set_device(device)

    def fetch(rows):
        batch = read_batch(store, rows, cuda)
        if not cuda:
            return batch, None
        with torch.cuda.stream(copy_stream(device)):
            return [upload(part, device) for part in batch], torch.cuda.current_stream().record_event()

    with ThreadPoolExecutor(2, initializer=enter) as pool:
        waiting = []
        for rows in [*batches, None, None]:
            if rows is not None:
                waiting.append(pool.submit(fetch, rows))
            if waiting and (len(waiting) > 2 or rows is None):
                batch, copied = waiting.pop(0).result()
                if copied is not None:
                    copied.wait()  # the stream of the step does
                    for part in batch:  # whose memory the next copy must not take before the step is done
                        part.record_stream(torch.cuda.current_stream())
                yield [part.to(device) for part in batch]


def epoch_order(count, batch_size, seed, epoch):
    """One epoch's global batches (steps, batch_size) int64, shuffled; the last incomplete one is dropped."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[:count - count % batch_size].reshape(-1, batch_size)


# ---------------------------------------------------------------- augmentation ------------------------------

class Draws:
    """Random numbers of one training step. They are drawn on the CPU for all `total` images of the global
    batch and each process keeps its own `rows`: any number of processes sees the very crops that one
    would."""

    def __init__(self, key, total, rows, device):
        digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        self.total, self.rows, self.device = total, rows, device

    def uniform(self, *shape, low=0.0, high=1.0):
        """(len(rows), *shape) float32, uniform in [low, high)."""
        values = torch.rand(self.total, *shape, generator=self.generator)[self.rows]
        return upload(low + (high - low) * values, self.device)


def random_boxes(draws, sizes, scale, ratio=(3 / 4, 4 / 3)):
    """Boxes of torchvision's RandomResizedCrop: (B, 4) float as (top, left, height, width) in whole pixels.
    Ten tries at an area share in `scale` and a width-to-height `ratio`; else the largest centred box within
    it."""
    height, width = sizes[:, :1].float(), sizes[:, 1:].float()
    area = height * width * draws.uniform(10, low=scale[0], high=scale[1])
    aspect = torch.exp(draws.uniform(10, low=math.log(ratio[0]), high=math.log(ratio[1])))
    w, h = torch.sqrt(area * aspect).round(), torch.sqrt(area / aspect).round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    w_fall = torch.minimum(width, (height * ratio[1]).round())
    h_fall = torch.minimum(height, (width / ratio[0]).round())
    any_fits = fits.any(1, keepdim=True)
    w = torch.where(any_fits, w.gather(1, first), w_fall)
    h = torch.where(any_fits, h.gather(1, first), h_fall)
    place, free = draws.uniform(2), torch.cat([height - h, width - w], 1)
    corner = torch.where(any_fits, (place * (free + 1)).floor().minimum(free), (free / 2).floor())
    return torch.cat([corner, h, w], 1)


def centre_boxes(sizes, side):
    """The centred square of `side` pixels in each image, (B, 4); smaller images give their whole short
    side."""
    side = torch.full_like(sizes[:, 0], side).minimum(sizes.amin(1)).float()
    top, left = ((sizes[:, 0] - side) / 2).floor(), ((sizes[:, 1] - side) / 2).floor()
    return torch.stack([top, left, side, side], 1)


def resize_weights(start, length, flip, out, size):
    """(B, out, size): row i of sample b says how output pixel i is mixed from the pixels start .. start +
    length of that sample: the antialiased triangle filter of Pillow and torchvision. `flip` (B,) bool
    reverses them."""
    scale = (length / out)[:, None, None]
    target = torch.arange(out, device=start.device)[None, :, None]
    target = torch.where(flip[:, None, None], out - 1 - target, target)
    centre = start[:, None, None] + (target + 0.5) * scale
    pixel = torch.arange(size, device=start.device)[None, None, :]
    weights = (1 - (pixel + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    within = (pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None])
    weights = weights * within
    return weights / weights.sum(2, keepdim=True)


def crop_resize(images, boxes, side, flips=None):
    """Cut a box out of each image and scale it to side x side: (B, H, W, C) uint8 -> (B, C, side, side) float
    in [0, 1]. flips (B, 2) bool: upside down, left to right. Two matrix products, whatever the sizes."""
    flips = torch.zeros(len(images), 2, dtype=torch.bool, device=images.device) if flips is None else flips
    batch, height, width, channels = images.shape
    rows = resize_weights(boxes[:, 0], boxes[:, 2], flips[:, 0], side, height)
    columns = resize_weights(boxes[:, 1], boxes[:, 3], flips[:, 1], side, width)
    pixels = images.reshape(batch, height, width * channels).float() / 255
    pixels = torch.bmm(rows, pixels).view(batch, side, width, channels).permute(0, 3, 1, 2)
    return torch.matmul(pixels, columns.transpose(1, 2)[:, None])


LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow and torchvision
YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))


def color_jitter(images, draws, strengths, probability=0.8):
    """Brightness, contrast, saturation and hue, changed per sample. images (B, 1 or 3, H, W) in [0, 1].

    Each of the four is linear in RGB (hue: a rotation in YIQ), so a sample needs one 3x3 matrix and one
    offset. Unlike torchvision, the order is fixed and values are clipped once, at the end."""
    brightness, contrast, saturation, hue = strengths
    apply = (draws.uniform() < probability).float()
    amount = lambda strength: 1 + apply * draws.uniform(low=-strength, high=strength)  # noqa: E731
    bright, contrasted, saturated = amount(brightness), amount(contrast), amount(saturation)
    turn = apply * draws.uniform(low=-hue, high=hue) * 2 * math.pi
    channels = images.shape[1]
    luma = upload(LUMA if channels == 3 else (1.0,), images.device)
    offset = (1 - contrasted) * bright * (images.mean((2, 3)) @ luma)
    matrix = (bright * contrasted)[:, None, None] * torch.eye(channels, device=images.device)
    if channels == 3:
        grey = luma.expand(3, 3)
        matrix = matrix @ (grey + saturated[:, None, None] * (torch.eye(3, device=images.device) - grey))
        yiq, cos, sin = torch.tensor(YIQ), turn.cos(), turn.sin()
        yiq, back = upload(yiq, images.device), upload(torch.linalg.inv(yiq), images.device)
        zero, one = torch.zeros_like(turn), torch.ones_like(turn)
        rotation = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
        matrix = back @ rotation @ yiq @ matrix
    flat = torch.baddbmm(offset[:, None, None], matrix, images.flatten(2))
    return flat.clamp_(0, 1).view_as(images)


def normalize(images, mean, std):
    """(B, 1 or 3, H, W) in [0, 1] -> (B, 3, H, W): grey spread over three channels, mean and std removed."""
    mean, std = (upload(values, images.device).view(1, 3, 1, 1) for values in (mean, std))
    return (images - mean) / std


def train_view(images, sizes, draws, args, mean, std):
    """The fine-tuning augmentation of the paper: random resized crop, both flips, colour jitter."""
    boxes = random_boxes(draws, sizes, args.scale)
    images = crop_resize(images, boxes, args.image_size, draws.uniform(2) < 0.5)
    return normalize(color_jitter(images, draws, args.jitter), mean, std)


def eval_view(images, sizes, args, mean, std):
    """The centre image_size of resize pixels (224 of 256 in the paper), never less than 7/8 of the short
    side."""
    boxes = centre_boxes(sizes, max(args.image_size, args.resize * 7 // 8))
    return normalize(crop_resize(images, boxes, args.image_size), mean, std)


# ---------------------------------------------------------------- models ------------------------------------

ARCHS = {"deit_tiny": "deit_tiny_patch16_224", "deit_small": "deit_small_patch16_224",
         "deit_base": "deit_base_patch16_224", "resnet18": "resnet18.tv_in1k", "resnet50": "resnet50.tv_in1k",
         "resnet152": "resnet152.tv_in1k"}
DINO_IMAGENET = {"deit_small": "vit_small_patch16_224.dino", "deit_base": "vit_base_patch16_224.dino",
                 "resnet50": "https://dl.fbaipublicfiles.com/dino/dino_resnet50_pretrain/"
                             "dino_resnet50_pretrain.pth"}
HEADS = ("head.", "head_dist.", "fc.", "classifier.")  # what a backbone does not need of a checkpoint


def create(arch, num_classes, image_size, **options):
    """A timm model without weights; ViTs get position embeddings for image_size."""
    name = ARCHS.get(arch, arch)
    if not timm.is_model(name):
        near = timm.list_models(f"*{arch.split('.')[0].split('_')[0]}*")
        fail(f"--arch {arch}: not one of {some(ARCHS, 9)} and timm has no model of that name"
             + (f"; it has {some(near)}" if near else ""))
    try:
        model = timm.create_model(name, num_classes=num_classes, img_size=image_size, **options)
    except TypeError:  # a CNN takes any size
        options.pop("dynamic_img_size", None)
        return timm.create_model(name, num_classes=num_classes, **options)
    except (AssertionError, ValueError, RuntimeError) as error:
        fail(f"--arch {arch} cannot be built for --image-size {image_size}: {error}")
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    patch = max(patch) if isinstance(patch, tuple) else patch  # a tuple in ViTs, a number in XCiTs
    if image_size % patch:
        fail(f"--image-size {image_size} is no multiple of the {patch}-pixel patches of {arch}; "
             f"try {max(1, round(image_size / patch)) * patch}")
    return model


def read_checkpoint(path, key=None):
    """(weights, meta) of a model.pt of this project, a timm or torchvision state dict (.pt, .pth,
    .safetensors) or a checkpoint of facebookresearch/dino (`key` "teacher", the default, or "student"). Data
    only: code in a file is refused. meta is what a model.pt says about itself, {} elsewhere."""
    if not Path(path).is_file():
        fail(f"--init {path}: no such file (random, imagenet and imagenet-dino are the names that are no "
             "files)")
    try:
        if str(path).endswith(".safetensors"):
            content = dict(timm.models.load_state_dict(str(path)))
        else:
            with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
                # a refusal is said below; DINO's full checkpoints hold a Namespace
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        fail(f"--init {path}: refused, since it holds more than tensors and could run code; "
             f"save its state_dict alone ({str(error).splitlines()[0][:120]})")
    except Exception as error:  # torch and safetensors raise half a dozen kinds on a damaged file
        fail(f"--init {path}: not a readable checkpoint ({type(error).__name__}: {str(error)[:120]})")
    meta = content if isinstance(content, dict) and "arch" in content and "state_dict" in content else {}
    for name in [key] if key else ["teacher", "state_dict", "model", "backbone"]:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
        if key:
            fail(f"--init-key {key}: {path} has no such part")
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(v) for v in content.values()):
        fail(f"--init {path}: no weights in it (expected tensors by name, or a dict with state_dict, model "
             "or teacher)")
    weights = {}
    for name, tensor in content.items():
        for prefix in ("_orig_mod.", "module.", "model.", "backbone."):
            name = name.removeprefix(prefix)
        weights[name] = tensor
    return weights, {k: v for k, v in meta.items() if k != "state_dict"}


def published_weights(arch, init):
    """The weights of --init imagenet (timm, supervised) or imagenet-dino (the DINO authors'), downloaded
    once."""
    name = ARCHS.get(arch, arch) if init == "imagenet" else DINO_IMAGENET.get(arch)
    if name is None:
        fail(f"--init imagenet-dino has weights for {some(DINO_IMAGENET)}, not for {arch}")
    try:
        if name.startswith("https:"):
            return torch.hub.load_state_dict_from_url(name, map_location="cpu", weights_only=True)
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the hub client raises its own, httpx's, urllib's and OS errors
        reason = (str(error).splitlines() or [""])[0][:160]
        fail(f"--init {init}: the weights {name} are not on this machine and cannot be downloaded "
             f"({type(error).__name__}: {reason}); fetch the file where there is a network and pass it as "
             "--init FILE")


def load_backbone(model, weights, source):
    """Copy weights into a model, strictly but for the classifier: a backbone tensor that is missing, left
    over or of another shape is an error that lists them. Position embeddings are resampled. Returns the match
    count."""
    weights = {k: v for k, v in weights.items() if not k.startswith(HEADS)}
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(HEADS)}
    if "pos_embed" in own and "pos_embed" in weights and own["pos_embed"].shape != weights["pos_embed"].shape:
        weights["pos_embed"] = timm.layers.resample_abs_pos_embed(
            weights["pos_embed"], model.patch_embed.grid_size, num_prefix_tokens=model.num_prefix_tokens)
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    extra = [k for k in weights if k not in own]
    shapes = [f"{k} {tuple(weights[k].shape)} for {tuple(own[k].shape)}"
              for k in own if k in weights and own[k].shape != weights[k].shape]
    matched = len(own) - len(missing) - len(shapes)
    if missing or extra or shapes:
        fail(f"--init {source} does not fit {type(model).__name__}: {matched} of {len(own)} tensors match; "
             + "; ".join(f"{what}: {some(names)}" for what, names in
                         (("missing", missing), ("left over", extra), ("other shape", shapes)) if names))
    model.load_state_dict(weights, strict=False)
    say(f"init {source}: {matched} of {len(own)} backbone tensors loaded")
    return matched


def build_model(args, num_classes, **options):
    """The model of --arch with the weights of --init; num_classes=0 gives one whose output is its features.
    Returns (model, pretrained_on)."""
    torch.manual_seed(args.seed)
    model = create(args.arch, num_classes, args.image_size, **options)
    if args.init == "random":
        return model, None
    if args.init in ("imagenet", "imagenet-dino"):
        load_backbone(model, published_weights(args.arch, args.init), args.init)
        return model, "imagenet"
    weights, meta = read_checkpoint(args.init, args.init_key)
    load_backbone(model, weights, args.init)
    return model, meta.get("dataset", Path(args.init).stem)


def load_trained(path):
    """A model of this project with its classifier: (model in eval mode, meta)."""
    weights, meta = read_checkpoint(path)
    if not meta.get("classes"):
        fail(f"--init {path}: not the model.pt of a finetune.py run, which knows its classes")
    model = create(meta["arch"], meta["num_classes"], meta["image_size"])
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        fail(f"--init {path} does not fit {meta['arch']}: {error}")
    return model.eval(), meta


def to_device(model, run):
    """Move a model; CNNs go channels-last, which the convolutions of CPUs and GPUs both want."""
    cnn = not hasattr(model, "patch_embed")
    return model.to(run.device, memory_format=torch.channels_last if cnn else torch.preserve_format)


def attention_reader(model):
    """A function images (B, 3, H, W) -> [(B, heads, T, T) softmax attention of each block in order], read
    with timm's AttentionExtract; rows are queries, the last patch_embed.grid_size tokens the patches. None
    for a model without such blocks. Build models after timm.layers.set_fused_attn(False): fused attention
    forms no map."""
    names = [name for name, _ in model.named_modules() if fnmatch(name, "blocks.*.attn.attn_drop")]
    if not names or not hasattr(getattr(model, "patch_embed", None), "grid_size"):
        return None
    extract = timm.utils.AttentionExtract(model, names=names, method="hook")
    patches = math.prod(model.patch_embed.grid_size)

    @torch.inference_mode()
    def read(images):
        maps = list(extract(images).values())
        if len(maps) < len(names) or any(  # attention within windows or across channels has other shapes
                m.shape[0] != len(images) or m.shape[2] != m.shape[3] or not 0 <= m.shape[3] - patches < 16
                or (m[:1].float().sum(3) - 1).abs().max() > 0.05 for m in maps):
            fail(f"{type(model).__name__} has no softmax attention of every patch over all patches; "
                 "take a plain ViT, such as deit_small")
        return maps
    return read


def features(model, images, pool="auto"):
    """(B, D): the CLS token of a ViT ("cls"), the mean of its patch tokens ("mean") or, for "auto",
    what the model itself feeds its classifier: CLS for DeiT, the pooled map for a CNN."""
    tokens = model.forward_features(images)
    if pool == "auto" or tokens.ndim != 3:
        return model.forward_head(tokens, pre_logits=True)
    prefix = getattr(model, "num_prefix_tokens", 0)
    if pool == "cls" and not prefix:
        fail(f"--pool cls: {type(model).__name__} has no CLS token")
    return tokens[:, 0] if pool == "cls" else tokens[:, prefix:].mean(1)


@torch.inference_mode()
def outputs(function, width, dataset, split, args, run, what, batch_size=128):
    """function(images as evaluation sees them) -> (B, width) of a whole split: (N, width) float32, in its
    order, on the CPU of every process. what: a word for the progress bar."""
    mine = np.arange(run.rank, len(split), run.world)
    batches = [split.rows[mine[i:i + batch_size]] for i in range(0, len(mine), batch_size)]
    loader = load_batches(dataset.store, batches, run.device)
    parts = [torch.zeros(0, width, device=run.device)]
    for images, sizes in tqdm(loader, what, len(batches), leave=False, disable=run.rank > 0):
        view = eval_view(images, sizes, args, dataset.mean, dataset.std)
        with run.autocast():
            parts.append(function(view).float())
    return gather_rows(torch.cat(parts), len(split), run)


def extract(model, dataset, split, args, run, pool="auto", batch_size=128):
    """Frozen features (N, D) float32 of a split, in its order, on the CPU of every process."""
    return outputs(partial(features, model, pool=pool), model.num_features, dataset, split, args, run,
                   "features", batch_size)


class SyncBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """Batch norm over the global batch, for processes on CPUs, where PyTorch has none. x (B, C, ...), with
    the same B on every process."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        """x normalised by the statistics of all processes' batches."""
        if not self.training:
            return super().forward(x)
        x32, axes = x.float(), [axis for axis in range(x.ndim) if axis != 1]
        moments = torch.stack([x32.mean(axes), (x32 * x32).mean(axes)])
        mean, square = torch.distributed.nn.functional.all_reduce(moments) / dist.get_world_size()
        variance, count = square - mean * mean, x.numel() / x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x32 * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(x.dtype)


def sync_batch_norm(model, run):
    """Batch statistics over the global batch, so that results do not depend on how many processes share
    it."""
    if run.world == 1:
        return model
    if run.device.type == "cuda":
        return timm.layers.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm  # same parameters and buffers, another forward
        elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            fail(f"{type(module).__name__} has no version for several CPU processes; use one process, or "
                 "GPUs")
    return model


# ---------------------------------------------------------------- run helpers: start, arguments, folder -----

@dataclass
class Run:
    """Where a run runs: rank of world processes, a device, and the precision of its matrix products."""
    rank: int
    world: int
    device: torch.device
    amp: str  # "bf16", "fp16" or "off"

    def autocast(self):
        """The mixed-precision context of --amp."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.amp)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()


def has_fast_bf16(device):
    """Whether bf16 is quick on a device: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX. (Others emulate
    it, tens of times slower than fp32.)"""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)


def start(args):
    """Set up device, precision and, under torchrun, the process group: a Run."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, neighbours = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    mps = torch.backends.mps.is_available()
    kind = (args.device if args.device != "auto" else
            "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not mps):
        fail(f"--device {kind}: PyTorch {torch.__version__} sees no such device here; use --device auto or "
             "cpu")
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            fail(f"--nproc_per_node {neighbours}: this machine has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    elif kind == "cpu":
        if world > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // neighbours))
        if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # of glibc
            # else a large tensor goes back to the system when freed, and the next faults in page by page
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink
            libc.mallopt(-4, 0)   # M_MMAP_MAX: no mapping of its own for a large tensor, undone with it
    # 12 hours: rank 0 may build a large cache while the rest wait
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
                                timeout=timedelta(hours=12))
    amp = args.amp if args.amp != "auto" else "bf16" if has_fast_bf16(device) else "off"
    if amp == "fp16" and kind != "cuda":
        fail("--amp fp16 needs a CUDA device; use bf16 or off")
    # in bf16 on CPUs two products and a softmax beat the fused kernel 3 to 6 times; in fp32 it is the faster
    timm.layers.set_fused_attn(kind != "cpu" or amp != "bf16")
    return Run(rank, world, device, amp)


def barrier():
    """Wait for all processes, if there are several."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # on the CPU's group, which takes no GPU memory


def launch(main):
    """Run a stage's main; Ctrl-C ends it with a line instead of a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            print("\ninterrupted; the same command goes on from the last finished epoch", file=sys.stderr)
        raise SystemExit(130)
    finally:
        if dist.is_initialized():
            # before 2.8 PyTorch ends the group holding the lock that gloo's thread may want, to let go of the
            # last message, and both wait for ever (github.com/pytorch/pytorch/pull/154976)
            time.sleep(0.1)
            dist.destroy_process_group()


def all_reduce_mean(value, run):
    """The mean over processes, in place."""
    if run.world > 1:
        dist.all_reduce(value)
        value /= run.world
    return value


def checked_mean(total, count, step, epoch, args, run):
    """total / count, the mean over processes of what was summed up to `step` (0, 1, ...); a mean that is not
    finite ends the run."""
    mean = all_reduce_mean(total / count, run)
    if not torch.isfinite(mean).all():
        fail(f"the loss is not finite by step {step + 1} (epoch {epoch + 1}); the last good checkpoint is "
             f"{args.output}/checkpoint.pt; lower --lr, or try --amp off")
    return mean


def own_share(total, run, what="--batch-size"):
    """The rows of a global batch of `total` that belong to this process, (total / world,)."""
    if total % run.world:
        fail(f"{what} {total} is global and does not divide among {run.world} processes; "
             f"take {total - total % run.world or run.world}")
    return np.arange(run.rank, total, run.world)  # no tensor: NumPy takes one of one element for a number


def gather_rows(part, total, run):
    """Put rows rank, rank + world, ... of every process back in order: (total, ...) on the CPU, each row
    once."""
    part = part.cpu()
    if run.world == 1:
        return part
    most = math.ceil(total / run.world)
    padded = torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(run.world)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:total]


def make_parser(description, image_size=224):
    """The arguments that every stage has, in the groups data, model and run: (parser, groups by name)."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (--help lists all arguments)")
    data, model, run = (parser.add_argument_group(name) for name in ("data", "model", "run"))
    data.add_argument("--dataset", default="demo", choices=list(INDEX))
    data.add_argument("--data-dir", help="folder of the dataset")
    data.add_argument("--csv", help="csv: the table (default labels.csv in --data-dir)")
    data.add_argument("--image-column", default="image", help="csv: column of the paths (default image)")
    data.add_argument("--label-column", default="label", help="csv: one column of classes, or several of 0/1")
    data.add_argument("--split-column", help="csv: column with train, val, test (default: carve 70/15/15)")
    data.add_argument("--group-column", help="csv: column with the patient, who stays in one split")
    data.add_argument("--view", default="all", choices=["frontal", "all"], help="chexpert (default all)")
    data.add_argument("--tissue", action="store_true", help="csaws: all 11 tissues, not the tumour alone")
    data.add_argument("--group-split", action="store_true", help="isic2019: a lesion stays in one split")
    data.add_argument("--split-file", help="JSON of the split: read if it is there, else written")
    data.add_argument("--metric", choices=METRICS, help="headline metric (default: the dataset's)")
    data.add_argument("--cache-dir", default="cache", help="where decoded images are kept (default ./cache)")
    data.add_argument("--image-size", type=int, default=image_size,
                      help=f"pixels (default, paper: {image_size})")
    data.add_argument("--resize", type=int,
                      help="short side in the cache, pixels (default 8/7 image size; paper 256)")
    data.add_argument("--limit", type=int, help="use N training images, classes in proportion")
    data.add_argument("--split-seed", type=int, default=42, help="of splits that are carved (default 42)")
    data.add_argument("--leakage", default="warn", choices=["warn", "drop", "error"],
                      help="identical images in two splits: say so, take them out of train, or stop")
    data.add_argument("--skip-broken", action="store_true", help="leave out files that cannot be decoded")
    data.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1),
                      help="processes that build the cache")
    model.add_argument("--arch",
                       help=f"{', '.join(ARCHS)} or any timm name (default that of --init, or deit_small)")
    model.add_argument("--init", default="random",
                       help="random, imagenet, imagenet-dino, or a checkpoint file")
    model.add_argument("--init-key",
                       help="part of a checkpoint to take, e.g. student (default teacher or model)")
    run.add_argument("--output", help="run folder (default runs/STAGE-DATASET-ARCH-INIT-sSEED)")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    run.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"],
                     help="mixed precision (auto: bf16 where the hardware has it)")
    run.add_argument("--compile", action="store_true", help="torch.compile the model")
    run.add_argument("--overwrite", action="store_true", help="replace another run in --output")
    return parser, {"data": data, "model": model, "run": run}


def parse(parser):
    """Read the command line, check what can be checked without data, and fill the defaults that hang
    together."""
    args = parser.parse_args()
    for name, value in vars(args).items():
        if name in ("image_size", "resize", "limit", "epochs", "batch_size") \
                and value is not None and value < 1:
            fail(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if name in ("lr", "weight_decay", "warmup_steps", "workers", "clip_grad") \
                and value is not None and value < 0:
            fail(f"--{name.replace('_', '-')} {value}: must not be negative")
    meta = {}
    if args.init not in ("random", "imagenet", "imagenet-dino"):
        _, meta = read_checkpoint(args.init, args.init_key)
        if meta and args.arch and ARCHS.get(args.arch, args.arch) != ARCHS.get(meta["arch"], meta["arch"]):
            fail(f"--init {args.init} holds a {meta['arch']}, not the {args.arch} of --arch")
        args.arch = args.arch or meta.get("arch")
    args.arch, args.init_label = args.arch or "deit_small", init_label(args.init, meta)
    args.resize = args.resize or round(args.image_size * 8 / 7)
    return args


def init_label(init, meta):
    """A short name of --init for folders and tables: "dino" for a model.pt of pretrain_dino.py
    ("imagenet+dino" if it started there), "finetuned" for one of finetune.py, the file's name for a
    checkpoint of somebody else's."""
    if init in ("random", "imagenet", "imagenet-dino"):
        return init
    start = "" if meta.get("init") in (None, "random") else meta["init"] + "+"
    return start + {"pretrain_dino": "dino", "finetune": "finetuned", "segment": "segmenter"}[meta["stage"]] \
        if "stage" in meta else Path(init).stem


def versions():
    """Versions of Python and of the packages that decide results."""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "timm": timm.__version__, "numpy": np.__version__,
            "pillow": Image.__version__}


def device_name(device):
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)"


RUN_FILES = ["args.json", "log.jsonl", "checkpoint.pt", "model.pt", "predictions.csv", "metrics.json"]
NOT_COMPARED = {"output", "overwrite", "workers", "cache_dir", "device", "predict", "on_collapse",
                "export"}  # these change no result


def open_run(args, run, stage):
    """The run folder, fresh or to be resumed; nothing is written yet. Ends the script if the same run is
    complete. A folder that holds a run with other arguments is an error naming them, unless --overwrite."""
    folder = Path(args.output or "-".join(["runs/" + stage, args.dataset, args.arch, args.init_label,
                                           f"s{args.seed}"]))
    if folder.exists() and not folder.is_dir():
        fail(f"--output {folder} is a file, not a folder")
    if stage in ("finetune", "knn_eval") and SPECS.get(args.dataset, [""])[0] == "masks":
        fail(f"--dataset {args.dataset} has masks, not the classes that {stage}.py needs; take segment.py")
    args.stage, args.output = stage, str(folder)
    args.data_dir = args.data_dir and str(Path(args.data_dir).resolve())
    if not args.overwrite and any((folder / name).exists() for name in RUN_FILES[1:]):
        try:
            old = json.loads((folder / "args.json").read_text())["arguments"]
        except (ValueError, KeyError, OSError) as error:
            fail(f"{folder} holds a run whose args.json cannot be read ({error}); give another --output, or "
                 "--overwrite")
        here = vars(args)
        if old.get("stage") != stage:
            fail(f"{folder} holds another run, of {old.get('stage')}; give another --output")
        differ = [f"{k} {old.get(k)!r} there, {here.get(k)!r} here"
                  for k in sorted({*old, *here} - NOT_COMPARED) if old.get(k) != here.get(k)]
        if differ:
            fail(f"{folder} holds another run: {some(differ)}; give another --output, or --overwrite")
        if (folder / "metrics.json").exists():
            summary = json.loads((folder / "metrics.json").read_text()).get("summary", "")
            say(f"{folder} is complete: {summary} (--overwrite runs it again)")
            barrier()
            raise SystemExit(0)
    barrier()  # every process has looked before one of them writes
    return folder


def write_args(folder, args, run, extra_files=()):
    """Make the run folder and write args.json; with --overwrite the files of the run that was there go
    first."""
    if run.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in [*RUN_FILES, *extra_files] if args.overwrite else []:
                (folder / name).unlink(missing_ok=True)
            write_json(folder / "args.json", {
                "stage": args.stage, "arguments": vars(args), "command": shlex.join(sys.argv),
                "versions": versions(), "device": device_name(run.device), "world_size": run.world})
        except OSError as error:
            fail(f"--output {folder} cannot be written ({error})")
    barrier()


def write_atomic(path, write):
    """Call write(temporary path), then rename it: a reader sees the old file or the new one, never half."""
    partial = Path(f"{path}.partial")
    write(partial)
    os.replace(partial, path)


def load_checkpoint(folder, run):
    """What a run's checkpoint.pt holds, on the device, or None if it has not come that far."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=run.device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        fail(f"{path} cannot be read ({str(error).splitlines()[0][:120]}); --overwrite starts the run again")


def save_checkpoint(folder, content):
    """Replace checkpoint.pt by content, and log.jsonl by a line for each entry of content["log"]."""
    write_atomic(folder / "checkpoint.pt", lambda part: torch.save(content, part))
    lines = "".join(json.dumps(entry) + "\n" for entry in content["log"])
    write_atomic(folder / "log.jsonl", lambda part: part.write_text(lines))


def write_json(path, content):
    """Write a JSON file atomically; numbers that are not finite become null."""
    clean = json.loads(json.dumps(content, default=float), parse_constant=lambda _: None)
    write_atomic(path, lambda part: part.write_text(json.dumps(clean, indent=1) + "\n"))


def write_table(path, head, rows):
    """Write a CSV file atomically."""
    def write(part):
        with open(part, "w", newline="") as out:
            csv.writer(out).writerows([head, *rows])
    write_atomic(path, write)


def show(value):
    """A metric for people: four digits, or "undefined"."""
    return "undefined" if value is None else f"{value:.4f}"


def print_table(head, rows):
    """Print rows with aligned columns."""
    rows = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for i, row in enumerate(rows):
        say("  ".join(cell.ljust(width) if j == 0 else cell.rjust(width)
                      for j, (cell, width) in enumerate(zip(row, widths))))
        if i == 0:
            say("  ".join("-" * width for width in widths))


# ---------------------------------------------------------------- run helpers: metrics ----------------------

METRICS = ["accuracy", "recall", "precision", "f1", "quadratic_kappa", "roc_auc", "average_precision"]


def roc_auc(truth, score):
    """Area under the ROC curve, ties counted half; None unless both classes are there. truth, score (N,)."""
    truth = truth.astype(bool)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(truth, score):
    """Sum over thresholds of (recall step) x precision, as in scikit-learn; None without a positive."""
    truth = truth.astype(bool)
    if not truth.any() or truth.all():
        return None
    values, inverse = np.unique(-score, return_inverse=True)
    hits = np.bincount(inverse, truth, len(values)).cumsum()
    precision = hits / np.bincount(inverse, minlength=len(values)).cumsum()
    return float((np.diff(hits, prepend=0) * precision).sum() / truth.sum())


def mean_defined(values):
    """Mean of the values that are not None, None if all are."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def metric(name, task, labels, scores):
    """One of METRICS. labels (N,) int or (N, L) 0/1; scores (N, C) probabilities. Averages run over the
    classes that the labels hold; None where the metric is not defined on these labels."""
    multilabel = task == "multilabel"
    classes = scores.shape[1]
    if name in ("roc_auc", "average_precision"):
        function = roc_auc if name == "roc_auc" else average_precision
        columns = [1] if classes == 2 and not multilabel else range(classes)
        return mean_defined([function(labels[:, c] if multilabel else labels == c, scores[:, c])
                             for c in columns])
    if multilabel:
        truth, guess = labels > 0.5, scores > 0.5
        if name == "accuracy":
            return float((truth == guess).mean())
        hit, true, said = (truth & guess).sum(0), truth.sum(0), guess.sum(0)
    else:
        guess = scores.argmax(1)
        if name == "accuracy":
            return float((guess == labels).mean())
        table = np.bincount(labels * classes + guess, minlength=classes ** 2).reshape(classes, classes)
        hit, true, said = table.diagonal(), table.sum(1), table.sum(0)
    present = true > 0
    if name == "quadratic_kappa":
        if multilabel:
            return None
        weight = np.subtract.outer(np.arange(classes), np.arange(classes)) ** 2
        expected = (weight * np.outer(true, said)).sum() / len(labels)
        return float(1 - (weight * table).sum() / expected) if expected else None
    if not present.any():
        return None
    hit, true, said = hit[present], true[present], said[present]
    value = {"recall": hit / true, "precision": hit / np.maximum(said, 1),
             "f1": 2 * hit / (true + said)}[name]
    return float(value.mean())


def all_metrics(task, classes, labels, scores):
    """Every metric of METRICS that the task has, and "undefined": the classes that these labels do not
    hold."""
    values = {name: metric(name, task, labels, scores) for name in METRICS}
    if task == "multilabel":
        del values["quadratic_kappa"]
        lacking = [name for i, name in enumerate(classes) if labels[:, i].min() == labels[:, i].max()]
    else:
        lacking = [name for i, name in enumerate(classes) if not (labels == i).any()]
    return {**values, "undefined": lacking}


def bootstrap_interval(score, count, groups=None, seed=0, resamples=1000):
    """95 % percentile interval of score(indices) over resampled images (or groups, such as patients): [low,
    high], None where fewer than half of the resamples define it."""
    rng, values = np.random.default_rng(seed), []
    members = None
    if groups is not None:
        members = [np.flatnonzero(np.asarray(groups) == group) for group in sorted(set(groups))]
    for _ in range(resamples):
        if members:
            indices = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        else:
            indices = rng.integers(count, size=count)
        value = score(indices)
        if value is not None:
            values.append(value)
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) * 2 > resamples else None


def score_split(dataset, split_name, labels, scores):
    """all_metrics of a split, with "interval" for the headline."""
    split = dataset.splits[split_name]
    values = all_metrics(dataset.task, dataset.classes, labels, scores)
    score = lambda rows: metric(dataset.metric, dataset.task, labels[rows], scores[rows])  # noqa: E731
    if dataset.task == "multilabel":
        areas = {name: roc_auc(labels[:, i], scores[:, i]) for i, name in enumerate(dataset.classes)}
        values["roc_auc_by_label"] = areas
        if set(CHEXPERT_FIVE) < set(areas):
            values["roc_auc_competition"] = mean_defined([areas[name] for name in CHEXPERT_FIVE])
            say(f"{split_name} roc_auc of {', '.join(CHEXPERT_FIVE)}: {show(values['roc_auc_competition'])}")
    return {**values, "interval": bootstrap_interval(score, len(labels), split.groups)}


def write_predictions(path, dataset, paths, labels, scores):
    """predictions.csv: path, label, predicted, then a probability per class, a row an image."""
    name = lambda flags: " ".join(c for c, flag in zip(dataset.classes, flags) if flag > 0.5)  # noqa: E731
    many = dataset.task == "multilabel"
    rows = []
    for i, image in enumerate(paths):
        label = "" if labels is None else name(labels[i]) if many else dataset.classes[labels[i]]
        guess = name(scores[i]) if many else dataset.classes[int(scores[i].argmax())]
        rows.append([image, label, guess, *(f"{p:.6f}" for p in scores[i])])
    write_table(path, ["path", "label", "predicted", *dataset.classes], rows)


# ---------------------------------------------------------------- run helpers: drawing ----------------------

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito 2008
DENSITY = 2  # pixels of a plot per unit of its size, so that text stays sharp in print


def write_text(pen, place, text, size, anchor="la", fill="black", width=None):
    """Draw text at a size in pixels, smaller if it would be wider than `width`; anchor as in Pillow ("la"
    left top, "mm" middle, "rm" right middle)."""
    widest = max(map(ImageFont.load_default(size).getlength, str(text).split("\n")))
    if width and widest > width:
        size = max(size * width / widest, size / 2)
    pen.text(place, str(text), font=ImageFont.load_default(size), anchor=anchor, fill=fill, align="center"
             if anchor[0] == "m" else "left")


def ticks(low, high, most=5, whole=False):
    """Round numbers that cover low to high; `whole`: no fractions."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-12) / most))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= most)
    step = max(step, 1) if whole else step
    return [round(step * i, 10) for i in range(math.floor(low / step + 1e-9),
                                               math.ceil(high / step - 1e-9) + 1)]


def draw_marker(pen, x, y, radius, colour, shape):
    """A filled circle, square, triangle or diamond (shape 0 to 3) around (x, y)."""
    r = radius
    if shape % 4 == 0:
        pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)
    else:
        corners = [[(-r, -r), (r, -r), (r, r), (-r, r)], [(0, -1.3 * r), (1.2 * r, r), (-1.2 * r, r)],
                   [(0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)]][shape % 4 - 1]
        pen.polygon([(x + a, y + b) for a, b in corners], fill=colour)


def draw_line(pen, places, colour, width, dash=None):
    """A line through places [(x, y)], with dashes of `dash` pixels if given."""
    if not dash:
        return pen.line(places, fill=colour, width=width, joint="curve")
    for (a, b), (c, d) in zip(places, places[1:]):
        pieces = max(1, int(math.hypot(c - a, d - b) / dash))
        for s, t in ((i / pieces, (i + 0.6) / pieces) for i in range(pieces)):
            pen.line([a + (c - a) * s, b + (d - b) * s, a + (c - a) * t, b + (d - b) * t], colour, width)


def draw_series(pen, one, places, errors, colour, unit, base, bar):
    """A series at places [(x, y)] in pixels, errors [(upper y, lower y)]; bars stand on the height `base`,
    `bar` = (width, offset) pixels."""
    kind = one.get("kind", "line")
    if kind in ("line", "dashed") and len(places) > 1:
        draw_line(pen, places, colour, 3 * unit, 12 * unit if kind == "dashed" else None)
    for (x, y), (upper, lower) in zip(places, errors):
        ink = "black" if kind == "bars" else colour
        if kind == "bars":
            x += bar[1]
            pen.rectangle([x - bar[0] / 2, min(y, base), x + bar[0] / 2, max(y, base)], fill=colour)
        elif kind == "points" or kind == "line" and len(places) <= 8:
            draw_marker(pen, x, y, 5 * unit if kind == "line" else 4 * unit, colour, one.get("marker", 0))
        if upper < lower:
            pen.line([x, upper, x, lower], fill=ink, width=2 * unit)
            for end in (upper, lower):
                pen.line([x - 6 * unit, end, x + 6 * unit, end], fill=ink, width=2 * unit)


def draw_legend(pen, series, left, right, top, text, unit):
    """A sample and a label for each of series [(dict, colour)], in as many rows as they need; returns the
    height below them."""
    x, y, sample = left, top, 26 * unit
    for one, colour in series:
        wide = sample + 6 * unit + pen.textlength(one["label"], font=ImageFont.load_default(text))
        if x > left and x + wide > right:
            x, y = left, y + text * 1.4
        kind, middle = one.get("kind", "line"), y + text / 2
        if kind == "bars":
            pen.rectangle([x + 4 * unit, y + text * 0.1, x + sample, y + text * 0.9], fill=colour)
        if kind in ("line", "dashed"):
            draw_line(pen, [(x, middle), (x + sample, middle)], colour, 3 * unit,
                      8 * unit if kind == "dashed" else None)
        if kind in ("line", "points"):
            draw_marker(pen, x + sample / 2, middle, 5 * unit, colour, one.get("marker", 0))
        write_text(pen, (x + sample + 6 * unit, middle), one["label"], text, "lm")
        x += wide + 18 * unit
    return y + text * 1.7 if series else top


def draw_panel(picture, panel, text):
    """One panel of draw_plot over a whole picture, with text of so many pixels."""
    pen, (width, height), unit, small = ImageDraw.Draw(picture), picture.size, DENSITY, round(text * 0.9)
    series = []
    for i, one in enumerate(panel["series"]):
        errors = [e if isinstance(e, (tuple, list)) else (e or 0, e or 0)
                  for e in one.get("error") or [0] * len(one["x"])]
        points = [(x, y, *e) for x, y, e in zip(one["x"], one["y"], errors) if y is not None and y == y]
        series.append((one, points, COLOURS[one.get("colour", i) % len(COLOURS)]))
    every = [p for _, points, _ in series for p in points] or [(0, 0, 0, 0), (1, 1, 0, 0)]
    bars, names = [one for one, _, _ in series if one.get("kind") == "bars"], panel.get("xnames")
    low, high = panel.get("ylim") or (min(p[1] - p[2] for p in every), max(p[1] + p[3] for p in every))
    ys = ticks(min(low, 0) if bars else low, high if high > low else low + 1)
    xs = [p[0] for p in every] + ([-0.5, len(names) - 0.5] if names else [])
    x0, x1 = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    marks = list(enumerate(names)) if names else [
        (x, f"{x:g}") for x in ticks(x0, x1, whole=all(x == int(x) for x in xs)) if x0 <= x <= x1]
    if not names:  # room for the points at the ends
        x0, x1 = x0 - 0.04 * (x1 - x0), x1 + 0.04 * (x1 - x0)

    labels = [f"{y:g}" for y in ys]
    left = 2 * text + max(map(ImageFont.load_default(small).getlength, labels)) + 10 * unit
    right, bottom = width - text, height - 3.1 * text
    write_text(pen, ((left + right) / 2, text * 0.4), panel.get("title", ""), round(text * 1.1), "ma",
               width=width - text)
    top = draw_legend(pen, [(one, colour) for one, _, colour in series] if len(series) > 1 else [],
                      left, width, text * 2, small, unit) + text * 0.4
    across = lambda x: left + (x - x0) / (x1 - x0) * (right - left)  # noqa: E731
    up = lambda y: bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (bottom - top)  # noqa: E731
    for y, label in zip(ys, labels):
        pen.line([left, up(y), right, up(y)], fill="#dddddd", width=unit)
        write_text(pen, (left - 8 * unit, up(y)), label, small, "rm")
    space = (right - left) / max(len(marks), 1) * 0.94
    for x, label in marks:
        pen.line([across(x), bottom, across(x), bottom + 5 * unit], fill="black", width=unit)
        write_text(pen, (across(x), bottom + 8 * unit), label, small, "ma", width=space)
    slot = (right - left) / (x1 - x0) * 0.8 / max(len(bars), 1)
    for i, (one, points, colour) in enumerate(series):
        draw_series(pen, one, [(across(p[0]), up(p[1])) for p in points],
                    [(up(p[1] + p[3]), up(p[1] - p[2])) for p in points], colour, unit, up(max(ys[0], 0)),
                    (slot * 0.92, (i - (len(bars) - 1) / 2) * slot))
    pen.line([left, top, left, bottom, right, bottom], fill="black", width=2 * unit)
    write_text(pen, ((left + right) / 2, height - text * 0.3), panel.get("xlabel", ""), text, "md",
               width=width - text)
    label = Image.new("RGB", (height, round(text * 1.4)), "white")
    middle = height - (top + bottom) / 2, text * 0.1
    write_text(ImageDraw.Draw(label), middle, panel.get("ylabel", ""), text, "ma", width=height - text)
    picture.paste(label.rotate(90, expand=True), (round(text * 0.3), 0))


def draw_plot(path, panels, size=(640, 480), columns=3, text=17):
    """Draw panels, `columns` a row, into a PNG. A panel is a dict: title, xlabel, ylabel, series, optional
    xnames (text under x = 0, 1, ...) and ylim. A series: label, x, y, optional error (half length, or (down,
    up)), kind "line", "points", "bars" or "dashed", colour (an index into COLOURS), marker (0 to 3). Points
    whose y is None or NaN are left out. size of a panel and text height in units of DENSITY pixels."""
    (width, height), columns = (n * DENSITY for n in size), min(columns, len(panels))
    picture = Image.new("RGB", (width * columns, height * math.ceil(len(panels) / columns)), "white")
    for number, panel in enumerate(panels):
        part = Image.new("RGB", (width, height), "white")
        draw_panel(part, panel, text * DENSITY)
        picture.paste(part, (number % columns * width, number // columns * height))
    write_atomic(path, lambda part: picture.save(part, "PNG"))


def draw_grid(path, rows, captions=None, row_labels=None, side=160, title=""):
    """Draw a grid of images (H, W, 1 or 3) uint8, one list a row, each fitted into side x side (twice that
    below 256), into a PNG, with a caption (text, or (text, colour)) under each and a label in front of each
    row."""
    side = side if side >= 256 else 2 * side
    text, gap = round(side * 0.09), round(side * 0.03)
    longest = max((ImageFont.load_default(text).getlength(line) for label in row_labels or []
                   for line in label.split("\n")), default=0)
    margin = round(longest) + 3 * gap if row_labels else gap
    below, head = (round(text * 1.6) if captions else gap), (round(text * 1.9) if title else gap)
    width = margin + max(map(len, rows)) * (side + gap)
    picture = Image.new("RGB", (width, head + len(rows) * (side + below)), "white")
    pen = ImageDraw.Draw(picture)
    write_text(pen, (gap, text * 0.3), title, round(text * 1.1), width=width - 2 * gap)
    for i, row in enumerate(rows):
        y = head + i * (side + below)
        if row_labels:
            write_text(pen, (gap, y + side / 2), row_labels[i], text, "lm")
        for j, pixels in enumerate(row):
            x = margin + j * (side + gap)
            image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
            picture.paste(ImageOps.pad(image, (side, side), color="white"), (x, y))
            caption = captions[i][j] if captions else ""
            caption, colour = caption if isinstance(caption, tuple) else (caption, "black")
            write_text(pen, (x + side / 2, y + side + text * 0.2), caption, text, "ma", colour, side)
    write_atomic(path, lambda part: picture.save(part, "PNG"))


def draw_confusion(path, table, classes):
    """Draw a confusion matrix, table (C, C) counts with true classes as rows, into a PNG: shade is the share
    of the row, text the count."""
    cell, margin = max(46, 420 // len(classes)), 30 + int(max(
        ImageFont.load_default(15).getlength(name) for name in classes))
    side = cell * len(classes)
    picture = Image.new("RGB", (margin + side + 30, side + margin + 70), "white")
    pen = ImageDraw.Draw(picture)
    write_text(pen, (margin, 8), "rows: true class, columns: predicted", 15)
    for i, name in enumerate(classes):
        y = 36 + i * cell
        write_text(pen, (margin - 8, y + cell / 2), name, 15, "rm")
        for j in range(len(classes)):
            share, x = table[i, j] / max(table[i].sum(), 1), margin + j * cell
            shade = tuple(int(255 - share * (255 - c)) for c in (0, 114, 178))
            pen.rectangle([x, y, x + cell - 2, y + cell - 2], fill=shade)
            write_text(pen, (x + cell / 2, y + cell / 2), table[i, j], 15, "mm",
                       "white" if share > 0.5 else "black")
        label = Image.new("RGB", (margin, 20), "white")
        write_text(ImageDraw.Draw(label), (margin - 2, 2), name, 15, "ra")
        picture.paste(label.rotate(90, expand=True), (margin + i * cell + cell // 2 - 10, 40 + side))
    write_atomic(path, lambda part: picture.save(part, "PNG"))


# ---------------------------------------------------------------- python common.py: look at a dataset -------

def outlined(pixels, item):
    """An image (H, W, C) uint8 with the outline of each map of an item of Split.masks, a colour a class."""
    image = np.repeat(pixels, 3 // pixels.shape[2], 2)
    for index, path in item if isinstance(item, list) else [(1, item)]:
        is_demo = path.startswith("demo-mask/")
        mask = Image.fromarray(demo_image(int(path[10:]))[1]) if is_demo else Image.open(path)
        mask = mask.convert("L").resize(image.shape[1::-1], Image.Resampling.NEAREST)
        inside = np.pad(np.asarray(mask) > 0, 2)
        core = inside[4:, 2:-2] & inside[:-4, 2:-2] & inside[2:-2, 4:] & inside[2:-2, :-4]
        image[inside[2:-2, 2:-2] & ~core] = ImageColor.getrgb(COLOURS[index % len(COLOURS)])
    return image


def contact_sheet(path, dataset, count=6):
    """Draw training images, `count` of each class a row, or 4 rows with the outlines of their masks."""
    split, rows, names = dataset.splits["train"], [], []
    spread = lambda at, most: at[np.linspace(0, len(at) - 1, min(most, len(at))).astype(int)]  # noqa: E731
    if split.labels is None:
        picks = spread(np.arange(len(split)), 4 * count)
        picks = np.array_split(picks, math.ceil(len(picks) / count))
    else:
        hot = split.labels if split.labels.ndim > 1 else np.eye(len(dataset.classes))[split.labels]
        picks = [spread(np.flatnonzero(column), count) for column in hot.T]
        names = [textwrap.fill(name, 13) for name in dataset.classes]
    for at in picks:
        pictures = [dataset.store.image(row) for row in split.rows[at]]
        rows.append([outlined(p, split.masks[k]) for p, k in zip(pictures, at)] if split.masks else pictures)
    draw_grid(path, rows, row_labels=names, title=f"{dataset.name}: train")


def main():
    """python common.py --dataset NAME --data-dir DIR: what was understood of it, and a contact sheet."""
    args = parse(make_parser(main.__doc__)[0])
    dataset = load_dataset(args)
    splits, store, sizes, bits = list(dataset.splits.values()), dataset.store, Counter(), Counter()
    table = [["images", *map(len, splits)]]
    for i, name in enumerate(dataset.classes if dataset.task != "masks" else []):
        flags = [split.labels == i if split.labels.ndim == 1 else split.labels[:, i] > 0 for split in splits]
        table.append([f"  {name}", *(int(flag.sum()) for flag in flags)])
    if splits[0].groups:
        table.append(["patients or lesions", *(len(set(split.groups)) for split in splits)])
    print_table(["", *dataset.splits], table)
    every, rows = join(splits), np.concatenate([split.rows for split in splits])
    for i in np.linspace(0, len(rows) - 1, min(len(rows), 1000)).astype(int):  # headers alone
        if os.path.isfile(every.paths[i]):
            with Image.open(every.paths[i]) as image:
                sizes[image.size] += 1
                bits[{"1": 1, "I": 16, "F": 32}.get(image.mode.split(";")[0], 8)] += 1
        else:
            sizes[tuple(store.sizes[rows[i]][::-1].tolist())] += 1
            bits[8] += 1
    (width, height), count = sizes.most_common(1)[0]
    say(f"sizes: most often {width}x{height} ({count} of {sizes.total()} looked at), short side from "
        f"{min(map(min, sizes))}, long side to {max(map(max, sizes))}")
    for what, found in (("bits a channel", bits), ("channels", Counter(store.shapes[rows][:, 2].tolist()))):
        say(f"{what}: " + ", ".join(f"{value} ({n} images)" for value, n in sorted(found.items())))
    leaks = [f"; {n} {name.replace('_', ' ')}" for name, n in dataset.leakage.items() if n]
    twins = len(rows) - len(np.unique(store.hashes[rows]))
    say(f"duplicates: {twins} images equal another one" + "".join(leaks))
    say(f"mean {dataset.mean}, standard deviation {dataset.std}, headline metric {dataset.metric}")
    sheet = args.output or f"{dataset.name}.png"
    contact_sheet(sheet, dataset)
    say(f"written: {sheet}")


if __name__ == "__main__":
    launch(main)
