"""What every stage needs, in four parts: data (files, the prepared folder, the loader), augmentation, models, the run.

A stage imports this file and nothing else of the project; to use one elsewhere, copy both files.
"""
import argparse
import csv
import ctypes
import gc
import hashlib
import io
import json
import math
import os
import pickle
import platform
import shlex
import subprocess
import sys
import textwrap
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path

import filelock
import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageOps
from tqdm import tqdm

Image.MAX_IMAGE_PIXELS = None  # mammograms and slides pass Pillow's limit; it guards web servers, not studies
DEMO = "data/demo"  # the default of --data, which prepares itself
SPLITS = ("train", "val", "test")


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


# ---------------------------------------------------------------- data: image files -------------------------

Image.init()
NOT_IMAGES = {".h5", ".hdf", ".bufr", ".grib", ".mpg", ".mpeg", ".eps", ".ps", ".wmf", ".emf"}  # stubs of Pillow's
DICOM = {".dcm", ".dicom"}
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
SUFFIXES = SUFFIXES - NOT_IMAGES | DICOM


def is_dicom(path):
    """Whether a file is DICOM: by its suffix or, as scanners leave it out, by the mark in its head."""
    suffix = Path(path).suffix.lower()
    if suffix in SUFFIXES:
        return suffix in DICOM
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def files_under(folder):
    """(image files, other files) under a folder, each sorted: paths below it with forward slashes. Links to folders
    are followed; hidden files and the folders that notebooks and archives leave behind are passed over."""
    images, others = [], []
    above = {str(folder): ()}  # the real folders that each folder lies in
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        chain = above.pop(place)
        if real in chain:  # a link to a folder above it
            folders.clear()
            continue
        folders[:] = [name for name in folders if name[0] != "." and name != "__MACOSX"]
        above |= {os.path.join(place, name): (*chain, real) for name in folders}
        below = os.path.relpath(place, folder).replace(os.sep, "/") + "/"
        below = below.removeprefix("./")
        for name in names:
            if name[0] == "." or name in ("Thumbs.db", "desktop.ini", "DICOMDIR"):
                continue
            suffix = os.path.splitext(name)[1].lower()
            known = suffix in SUFFIXES or (not suffix or suffix[1:].isdigit()) and is_dicom(os.path.join(place, name))
            (images if known else others).append(below + name)
    return sorted(images), sorted(others)


def to_8_bit(values):
    """Numbers of any range as uint8, over their own range; what is not finite becomes black or white."""
    values = np.asarray(values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
    scaled = (values - low) / max(high - low, 1e-12)
    return np.round(255 * np.nan_to_num(scaled, nan=0, posinf=1, neginf=0)).astype(np.uint8)


def import_pydicom():
    """The package that reads DICOM files, or an error."""
    try:
        import pydicom.pixels
    except ImportError:
        fail("DICOM files are read by pydicom 3, which is missing: pip install pydicom")
    return pydicom


def read_dicom(path):
    """(pixels (H, W, C) uint8, note) of a DICOM file: rescaled, seen through its first VOI window or table, upright
    grey (MONOCHROME1 inverted). Without a window its values are scaled over their own range."""
    pydicom = import_pydicom()
    data = pydicom.dcmread(path)
    values, note = data.pixel_array, ""
    if int(data.get("NumberOfFrames", 1) or 1) > 1:
        note = f"{data.NumberOfFrames} frames, the first is used"
        values = values[0]
    if data.PhotometricInterpretation == "PALETTE COLOR":
        values = pydicom.pixels.apply_color_lut(values, data)
        return (values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values, note
    if data.get("SamplesPerPixel", 1) > 1:
        return (values if values.dtype == np.uint8 else to_8_bit(values)), note
    values = pydicom.pixels.apply_modality_lut(values, data).astype(np.float64)
    windowed = data.get("WindowCenter") not in (None, "") and data.get("WindowWidth") not in (None, "")
    if windowed and data.get("VOILUTFunction", "LINEAR") != "SIGMOID" and "VOILUTSequence" not in data:
        center, width = (np.atleast_1d(data[name].value)[0] for name in ("WindowCenter", "WindowWidth"))
        if data.get("VOILUTFunction", "LINEAR") == "LINEAR":  # PS3.3, C.11.2.1.2.1
            center, width = center - 0.5, max(width - 1, 1e-6)
        pixels = np.round(255 * np.clip((values - center) / width + 0.5, 0, 1)).astype(np.uint8)
    else:
        pixels = to_8_bit(pydicom.pixels.apply_voi_lut(values, data) if windowed or "VOILUTSequence" in data else values)
    return (255 - pixels if data.PhotometricInterpretation == "MONOCHROME1" else pixels)[..., None], note


def read_deep_colour(path, image):
    """(H, W, C) uint8 of an image whose colours have 16 bits a channel, over their own range; transparent is black."""
    if image.format != "PNG":
        raise ValueError(f"colours of 16 bits a channel can be read from PNG alone, not from {image.format}: save it so")
    values = torchvision.io.decode_image(path, "UNCHANGED", apply_exif_orientation=True).permute(1, 2, 0).numpy()
    values = values.astype(np.float64)
    if values.shape[2] in (2, 4):
        values = values[..., :-1] * (values[..., -1:] / 65535)
    return to_8_bit(values)


def is_deep(image):
    """Whether an image that has just been opened has more than 8 bits a channel: the arguments of its decoder tell,
    where modes do not. They are gone once a PNG's EXIF is read."""
    how = image.tile[0][3] if image.tile else ""
    return ";16" in str(how) or image.format == "PPM" and isinstance(how, tuple) and how[-1] > 255


def read_image(path, side=None):
    """A file as (pixels (H, W, C) uint8 with C = 1 for grey and 3 for colour, (height, width) of the file, a note on
    what was left out of it or "").

    Greys of more than 8 bits and colours of 16 bits a channel are scaled over their own range; EXIF rotation is
    applied; transparent pixels become black; three equal channels become one. A JPEG may be decoded smaller than it
    is, never below twice `side`."""
    path = str(path)
    if is_dicom(path):
        pixels, note = read_dicom(path)
        return one_channel(pixels), pixels.shape[:2], note
    with Image.open(path) as image:
        deep = is_deep(image)
        pages = getattr(image, "n_frames", 1)
        note = f"{pages} pages, the first is used" if pages > 1 else ""
        upright = image.getexif().get(274, 1) < 5  # orientations 5 to 8 lie on their side
        size = image.size[::-1] if upright else image.size
        if deep and image.mode[0] not in "IF":
            return one_channel(read_deep_colour(path, image)), size, note
        if side:
            image.draft(None, (2 * side, 2 * side))  # JPEG only
        white_is_0 = image.format == "TIFF" and image.tag_v2.get(262) == 0
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            values = np.asarray(image, dtype=np.float64)
            pixels = to_8_bit(-values if white_is_0 else values)[..., None]  # 8-bit ones are turned by Pillow
        elif image.mode in ("1", "L"):
            pixels = np.asarray(image.convert("L"))[..., None]
        else:
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
            pixels = np.asarray(image.convert("RGB"))
    return one_channel(pixels), size, note


def one_channel(pixels):
    """(H, W, 3) whose channels are equal as (H, W, 1), all else as it is."""
    same = pixels.shape[2] == 3 and (pixels[..., :1] == pixels[..., 1:]).all()
    return pixels[..., :1] if same else pixels


def fit_box(height, width, fit):
    """What a square shows of an image, as (top, left, height, width) in its pixels: the whole of it ("squash"), the
    whole with black beside it ("pad"), or the centre square ("crop")."""
    if fit == "squash":
        return 0, 0, height, width
    side = max(height, width) if fit == "pad" else min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def to_square(pixels, side, fit, resample=Image.Resampling.BILINEAR):
    """(H, W, C) uint8 -> (side, side, C), as fit_box says."""
    top, left, height, width = fit_box(*pixels.shape[:2], fit)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image = image.crop((left, top, left + width, top + height)).resize((side, side), resample)
    return np.asarray(image).reshape(side, side, -1)


def from_square(square, height, width, fit, resample=Image.Resampling.BILINEAR):
    """The inverse of to_square: (S, S), (S, S, 1) or (S, S, 3), uint8 or float32, at the size and shape of the image:
    (height, width) or (height, width, 3). 0 where the square shows nothing of it."""
    top, left, box_height, box_width = fit_box(height, width, fit)
    image = Image.fromarray(square[..., 0] if square.shape[2:] == (1,) else square)
    image = image.resize((box_width, box_height), resample).crop((-left, -top, width - left, height - top))
    return np.asarray(image)


def in_proportion(square, size, fit, long_side):
    """A square image (S, S, 1 or 3) uint8 in the proportions of its source, of size (height, width), for a picture:
    (h, w, 3) uint8, the longer of them `long_side`."""
    height, width = (max(1, round(int(n) * long_side / max(size))) for n in size)
    pixels = from_square(square, height, width, fit)
    return np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels


def load_files(paths, side, fit, broken, batch_size=32):
    """Yield (images (B, side, side, 3) uint8, [(height, width) of each file]) of image files, decoded by threads, in
    their order. A file that cannot be decoded is black, and its reason stands in the dict `broken`."""
    def square(path):
        try:
            pixels, size, _ = read_image(path, side)
        # Pillow's plugins raise nearly anything on a damaged file; all are named later
        except Exception as error:
            broken[str(path)] = f"{type(error).__name__}: {error}"
            pixels, size = np.zeros((1, 1, 1), np.uint8), (1, 1)
        return np.broadcast_to(to_square(pixels, side, fit), (side, side, 3)), size

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for i in range(0, len(paths), batch_size):
            squares, sizes = zip(*pool.map(square, paths[i:i + batch_size]))
            yield torch.from_numpy(np.stack(squares)), list(sizes)


def new_images(source):
    """The image files of --predict: those under a folder, or those that the column "image" of a CSV lists, relative
    to its folder. Returns (root, paths below it)."""
    source = Path(source)
    if source.is_dir():
        names, others = files_under(source)
        if not names:
            fail(f"--predict {source}: no images in this folder; found {some(others) or 'nothing'}")
        if others:
            say(f"note: {len(others)} files of {source} are no images and are not used: {some(others)}")
        return source, names
    if source.suffix.lower() != ".csv" or not source.is_file():
        fail(f"--predict {source}: neither a folder nor a CSV file")
    with open(source, encoding="utf-8-sig", newline="") as lines:
        rows = [*csv.DictReader(lines)]
    if not rows or "image" not in rows[0]:
        fail(f"--predict {source}: no column \"image\"; it has {some(rows[0] if rows else [], 30) or 'no rows'}")
    names = [row["image"] for row in rows]
    missing = [name for name in names if not (source.parent / name).is_file()]
    if missing:
        fail(f"--predict {source}: {len(missing)} of {len(names)} images are not below {source.parent}: "
             f"{some(missing, 20)}")
    return source.parent, names


def report_broken(broken, run, skip):
    """Name the files that could not be decoded, of all processes: an error unless `skip`. Returns them, {path: why}."""
    if run.world > 1:
        parts = [None] * run.world
        dist.all_gather_object(parts, broken)
        broken = {path: why for part in parts for path, why in part.items()}
    if broken:
        message = f"--predict: {len(broken)} files cannot be decoded: " + "; ".join(
            f"{path} ({why})" for path, why in sorted(broken.items()))
        if not skip:
            fail(message + ". Mend or remove them, or leave them out with --skip-broken")
        say(f"left out: {message}")
    return broken


# ---------------------------------------------------------------- data: the prepared folder -----------------

FIXED = ("image", "split", "fold", "group", "height", "width", "label")  # columns of labels.csv that are no classes


@dataclass
class Dataset:
    """A prepared folder. Row i of images (N, S, S, 1 or 3) uint8 and masks (N, S, S) uint8 or None is the image
    paths[i] of size sizes[i] = (height, width). rows: {"train", "val", "test": its rows, int64}. task: "classes" with
    labels (N,) int64, "multilabel" with (N, L) float32, or None with None. groups (N): patients, or None."""
    folder: Path
    name: str
    images: np.ndarray
    masks: np.ndarray
    paths: list
    sizes: np.ndarray
    rows: dict
    task: str
    classes: list
    labels: np.ndarray
    groups: list
    mask_classes: list
    metric: str
    ordinal: bool
    mean: list
    std: list
    fit: str
    ignore: int
    leakage: dict
    fingerprint: str  # of images, labels, splits, classes and geometry: runs on other data are other runs

    @property
    def side(self):
        """Pixels of a side of the arrays."""
        return self.images.shape[1]

    @property
    def counts(self):
        """Images per split."""
        return {name: len(rows) for name, rows in self.rows.items()}

    def groups_of(self, rows):
        """The groups of some rows, None where there are none."""
        return None if self.groups is None else [self.groups[row] for row in rows]


def prepare_demo(folder):
    """Make the demo where --data is its default and nothing is there: by one process of a machine, the others wait."""
    script = Path(__file__).with_name("prepare.py")
    missing = Path(folder) == Path(DEMO) and not Path(folder, "images.npy").exists() and script.exists()
    barrier()  # every process has looked before one of them makes it
    if missing and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        made = subprocess.run([sys.executable, str(script), "demo", "--layout", "demo", "--output", str(folder)])
        if made.returncode:
            raise SystemExit(made.returncode)
    if missing:
        barrier()


def read_labels(file):
    """(head, columns) of labels.csv, each column a tuple of strings; and the fingerprint of its text."""
    text = file.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    try:
        rows = [*csv.reader(io.StringIO(text.decode()))]
    except (UnicodeDecodeError, csv.Error) as error:
        fail(f"{file} cannot be read as a UTF-8 CSV ({error})")
    head, rows = (rows or [[]])[0], [row for row in rows[1:] if row]
    wrong = [i for i, row in enumerate(rows) if len(row) != len(head)]
    if wrong:
        fail(f"{file}: row {wrong[0] + 1} has {len(rows[wrong[0]])} cells, the head has {len(head)}")
    for name in ("image", "split"):
        if name not in head:
            fail(f"{file}: no column {name!r}; it has {some(head, 30)}")
    repeated = [name for name, count in Counter(head).items() if count > 1]
    if repeated:
        fail(f"{file}: the column {repeated[0]!r} stands twice")
    columns = dict(zip(head, zip(*rows))) if rows else dict.fromkeys(head, ())
    return columns, hashlib.blake2b(text, digest_size=8)


def read_targets(file, columns, classes):
    """(task, classes, labels, ordinal) of the columns of labels.csv: of `label` the class index of each row, of several
    0/1 columns a float32 matrix. classes: their order, or None for the sorted one."""
    names = [name for name in columns if name not in FIXED]
    if "label" in columns:
        found = set(columns["label"])
        whole = all(name.lstrip("-").isdigit() for name in found)  # 10 comes after 2
        classes = classes or sorted(found, key=int if whole else str)
        unknown = sorted(found.difference(classes))
        if unknown:
            at = columns["label"].index(unknown[0])
            fail(f"{file}: label {unknown[0]!r} of {columns['image'][at]} is none of {some(classes, 30)}; mend it, or "
                 "name it in dataset.json")
        place = {name: i for i, name in enumerate(classes)}
        return "classes", classes, np.array([place[name] for name in columns["label"]], np.int64), whole
    if not names:
        return None, [], None, False
    if classes and sorted(classes) != sorted(names):
        fail(f"{file}: the columns {some(names, 30)} are not the classes of dataset.json, {some(classes, 30)}")
    classes = classes or names
    count = len(columns["image"])
    labels = np.zeros((count, len(classes)), np.float32)
    for i, name in enumerate(classes):
        text = "".join(columns[name])
        flags = np.frombuffer(text.encode(), np.uint8) - ord("0")
        if len(flags) != count or flags.max(initial=0) > 1:
            at = next(i for i, cell in enumerate(columns[name]) if cell not in ("0", "1"))
            fail(f"{file}: {columns[name][at]!r} in the column {name!r} of {columns['image'][at]} is neither 0 nor 1")
        labels[:, i] = flags
    return "multilabel", classes, labels, False


def open_dataset(folder):
    """The Dataset of a prepared folder. images.npy and labels.csv suffice; what dataset.json would say is then derived:
    classes in sorted order, mean and std measured on train."""
    folder = Path(folder)
    for name in ("images.npy", "labels.csv"):
        if not (folder / name).is_file():
            demo = folder == Path(DEMO)
            fail(f"--data {folder}: no prepared folder, it has no {name}; make one: python prepare.py "
                 + (f"demo --output {DEMO}" if demo else "SOURCE --output data/NAME"))
    try:
        images = np.load(folder / "images.npy", mmap_mode="r")
        masks = np.load(folder / "masks.npy", mmap_mode="r") if (folder / "masks.npy").exists() else None
        meta = json.loads((folder / "dataset.json").read_text()) if (folder / "dataset.json").exists() else {}
    except (ValueError, OSError, EOFError) as error:
        fail(f"--data {folder}: damaged, prepare it again ({error})")
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] != images.shape[2] or images.shape[3] not in (1, 3):
        fail(f"{folder}/images.npy is {images.shape} {images.dtype}; expected (N, side, side, 1 or 3) uint8")
    if masks is not None and (masks.shape != images.shape[:3] or masks.dtype != np.uint8):
        fail(f"{folder}/masks.npy is {masks.shape} {masks.dtype}; expected {images.shape[:3]} uint8")
    gc.disable()  # it would walk the rows of a large table over and over, and find no cycle in them
    file = folder / "labels.csv"
    columns, digest = read_labels(file)
    count = len(columns["image"])
    if count != len(images):
        fail(f"{file} has {count} rows, images.npy {len(images)} images; row i must describe image i")
    task, classes, labels, ordinal = read_targets(file, columns, meta.get("classes"))
    gc.enable()
    split = np.array(columns["split"])
    unknown = [str(name) for name in np.unique(split) if name not in ("", *SPLITS)]
    if unknown:
        fail(f"{file}: split {unknown[0]!r} of {columns['image'][list(split).index(unknown[0])]} is none of train, val, "
             "test, or blank for an image that no stage shall see")
    rows = {name: np.flatnonzero(split == name) for name in SPLITS}
    sizes = np.full((count, 2), images.shape[1], np.int64)
    if "height" in columns and "width" in columns:
        sizes = np.array([columns["height"], columns["width"]]).astype(np.int64).T
    mask_classes = meta.get("mask_classes") or (["background", "lesion"] if masks is not None else [])
    geometry = [images.shape, meta.get("fit"), classes, mask_classes, meta.get("ignore"), meta.get("masks")]
    digest.update(json.dumps(geometry).encode())
    mean, std = meta.get("mean"), meta.get("std")
    if not mean:
        mean, std = measure(images, rows["train"] if len(rows["train"]) else np.arange(count))
    metric = meta.get("metric") or {"classes": "accuracy", "multilabel": "roc_auc"}.get(task, "iou")
    return Dataset(folder, meta.get("name") or folder.resolve().name, images, masks, list(columns["image"]), sizes, rows,
                   task, classes, labels, list(columns["group"]) if "group" in columns else None, mask_classes, metric,
                   meta.get("ordinal", ordinal), mean, std, meta.get("fit", "squash"), meta.get("ignore"),
                   meta.get("leakage", {}), digest.hexdigest())


def load_dataset(args, splits=SPLITS, labels=False, masks=False):
    """open_dataset of --data, with --metric and --limit applied, and checked for what a stage needs of it: images in
    `splits`, labels, masks."""
    prepare_demo(args.data)
    dataset = open_dataset(args.data)
    if labels and dataset.task is None:
        fail(f"--data {args.data} has no labels, which {args.stage}.py needs"
             + ("; for its masks take segment.py" if dataset.masks is not None else ""))
    if labels and dataset.task == "classes" and len(dataset.classes) < 2:
        fail(f"--data {args.data} has one class, {dataset.classes[0]}: there is nothing to tell apart")
    if masks and dataset.masks is None:
        fail(f"--data {args.data} has no masks, which {args.stage}.py needs: prepare a folder with images/ and masks/")
    for name in splits:
        if not len(dataset.rows[name]):
            fail(f"--data {args.data} has no {name} images, which {args.stage}.py needs; it has "
                 + ", ".join(f"{count} {name}" for name, count in dataset.counts.items()))
    dataset.metric = args.metric or ("iou" if masks else dataset.metric)
    if dataset.metric == "quadratic_kappa" and not dataset.ordinal:
        fail(f"--metric quadratic_kappa is for ordered classes, and those of {args.data} are not; where they are, prepare "
             "it with --classes in their order and --ordinal")
    if args.limit:
        dataset.rows["train"] = limit_images(dataset, "train", args.limit)
    if labels and dataset.task == "classes":
        seen = np.bincount(dataset.labels[dataset.rows["train"]], minlength=len(dataset.classes))
        unseen = [name for name, count in zip(dataset.classes, seen) if not count]
        if unseen:
            fail(f"--data {args.data}: no training image has the label {some(unseen)}"
                 + ("; raise --limit" if args.limit else "; leave the class out, or give it training images"))
    say(f"{dataset.name}: " + ", ".join(f"{n} {name}" for name, n in dataset.counts.items()) + " images"
        + (f", {len(dataset.classes)} classes ({some(dataset.classes, 14)})" if dataset.classes and not masks else ""))
    return dataset


def note_enlarged(dataset, image_size, side):
    """Say so where models see images larger than the arrays hold them."""
    if image_size > side:
        say(f"note: {side} pixels of {dataset.name} are enlarged to --image-size {image_size}")


def limit_images(dataset, name, count):
    """`count` rows of a split, its classes in proportion (to within one image)."""
    rows = dataset.rows[name]
    if count >= len(rows):
        return rows
    order = np.random.default_rng([42, 1]).permutation(len(rows))
    if dataset.task != "classes":
        return rows[np.sort(order[:count])]
    # the j-th image of a class of n sorts at (j + 1/2) / n: every prefix then holds the classes in proportion
    labels = dataset.labels[rows].tolist()
    seen, sizes, key = Counter(), Counter(labels), np.zeros(len(rows))
    for i in order:
        key[i] = (seen[labels[i]] + 0.5) / sizes[labels[i]]
        seen[labels[i]] += 1
    return rows[np.sort(np.argsort(key, kind="stable")[:count])]


def measure(images, rows):
    """Mean and standard deviation per channel, [3] each in [0, 1], over up to 1024 rows of images (N, S, S, C)."""
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), 1024)).astype(int)]
    total, squares = np.zeros(3), np.zeros(3)
    for row in rows:
        pixels = images[row].reshape(-1, images.shape[3]).astype(np.float64) / 255
        total += pixels.mean(0)
        squares += (pixels ** 2).mean(0)
    mean = total / len(rows)
    std = np.sqrt((squares / len(rows) - mean ** 2).clip(0)).clip(1e-3)
    return mean.round(4).tolist(), std.round(4).tolist()


# ---------------------------------------------------------------- data: the loader --------------------------

def upload(values, device):
    """Numbers or a CPU tensor on the device. On CUDA from pinned memory, as any other copy waits until the
    GPU has done all that it was given."""
    values = torch.as_tensor(values)
    cuda = torch.device(device).type == "cuda"
    return values.pin_memory().to(device, non_blocking=True) if cuda else values.to(device)


def read_batch(array, rows, pin_memory=False):
    """Rows of an array (N, ...) uint8 as a tensor (B, ...)."""
    batch = torch.empty(len(rows), *array.shape[1:], dtype=torch.uint8, pin_memory=pin_memory)
    np.take(array, rows, axis=0, out=batch.numpy(), mode="clip")  # "raise" would copy once more
    return batch


@cache  # one for all loaders: memory belongs to the stream that it was first used on
def copy_stream(device):
    """The CUDA stream of a device on which images are copied to it."""
    return torch.cuda.Stream(device)


def load_batches(array, batches, device):
    """Yield read_batch for each array of rows, on the device. The next two are read ahead by two threads,
    and on CUDA copied on a stream of their own, beside the step that is at work."""
    cuda = device.type == "cuda"

    def enter():  # a thread starts on GPU 0, and would leave memory of this process there
        if cuda:
            torch.cuda.set_device(device)

    def fetch(rows):
        batch = read_batch(array, rows, cuda)
        if not cuda:
            return batch, None
        with torch.cuda.stream(copy_stream(device)):
            return upload(batch, device), torch.cuda.current_stream().record_event()

    with ThreadPoolExecutor(2, initializer=enter) as pool:
        waiting = []
        for rows in [*batches, None, None]:
            if rows is not None:
                waiting.append(pool.submit(fetch, rows))
            if waiting and (len(waiting) > 2 or rows is None):
                batch, copied = waiting.pop(0).result()
                if copied is not None:
                    copied.wait()  # the stream of the step does
                    # whose memory the next copy must not take before the step is done
                    batch.record_stream(torch.cuda.current_stream())
                yield batch.to(device)


def shards(rows, run, batch_size):
    """This process's share of rows, row rank, rank + world, ..., in batches."""
    mine = rows[run.rank::run.world]
    return [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]


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


def random_boxes(draws, side, scale, ratio=(3 / 4, 4 / 3)):
    """Boxes of torchvision's RandomResizedCrop in squares of `side` pixels: (B, 4) float as (top, left, height,
    width) in whole pixels. Ten tries at an area share in `scale` and a width-to-height `ratio`; else the whole."""
    area = side * side * draws.uniform(10, low=scale[0], high=scale[1])
    aspect = torch.exp(draws.uniform(10, low=math.log(ratio[0]), high=math.log(ratio[1])))
    w, h = torch.sqrt(area * aspect).round(), torch.sqrt(area / aspect).round()
    fits = (w > 0) & (w <= side) & (h > 0) & (h <= side)
    first = fits.int().argmax(1, keepdim=True)
    any_fits = fits.any(1, keepdim=True)
    size = torch.where(any_fits, torch.cat([h.gather(1, first), w.gather(1, first)], 1), float(side))
    free = side - size
    corner = (draws.uniform(2) * (free + 1)).floor().minimum(free)
    return torch.cat([corner, size], 1)


def centre_box(side):
    """What a classifier is evaluated on, the centre 7/8 of a square (224 of 256 pixels in the paper): (top and left,
    height and width) in pixels."""
    length = side * 7 // 8
    return (side - length) // 2, length


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


def eval_view(images, image_size, mean, std, whole=False):
    """The centre (or the whole) of images (B, S, S, C) uint8 at image_size: (B, 3, image_size, image_size) float."""
    corner, length = (0, images.shape[1]) if whole else centre_box(images.shape[1])
    boxes = torch.tensor([[corner, corner, length, length]], device=images.device).expand(len(images), 4)
    return normalize(crop_resize(images, boxes.float(), image_size), mean, std)


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
    if meta.get("task") == "masks":
        fail(f"{path} is a segmenter, of segment.py, and no classifier; for masks of new images take segment.py --predict")
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
def outputs(function, width, loader, count, image_size, mean, std, run, what):
    """function(images as evaluation sees them) -> (B, width) of `count` images: (count, width) float32, in their order,
    on the CPU of every process. loader: this process's share of them, uint8 batches as of load_batches; what: a word
    for the progress bar."""
    parts = [torch.zeros(0, width, device=run.device)]
    bar = tqdm(desc=what, total=math.ceil(count / run.world), unit="image", leave=False, disable=run.rank > 0)
    for images in loader:
        view = eval_view(images.to(run.device), image_size, mean, std)
        with run.autocast():
            parts.append(function(view).float())
        bar.update(len(images))
    bar.close()
    return gather_rows(torch.cat(parts), count, run)


def extract(model, dataset, rows, args, run, pool="auto", batch_size=128):
    """Frozen features (n, D) float32 of rows of a dataset, in their order, on the CPU of every process."""
    loader = load_batches(dataset.images, shards(rows, run, batch_size), run.device)
    return outputs(partial(features, model, pool=pool), model.num_features, loader, len(rows), args.image_size,
                   dataset.mean, dataset.std, run, "features")


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
    lock: object = None  # of the run folder, held while this lives

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
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        if hasattr(libc, "mallopt"):  # of glibc
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


def launch(main, again="the same command goes on from the last finished epoch"):
    """Run a stage's main; Ctrl-C ends it with a line instead of a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"\ninterrupted; {again}", file=sys.stderr)
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


def make_parser(description):
    """The arguments that every stage has, in the groups data, model and run: (parser, groups by name)."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (--help lists all arguments)")
    data, model, run = (parser.add_argument_group(name) for name in ("data", "model", "run"))
    data.add_argument("--data", default=DEMO, metavar="DIR",
                      help=f"a folder that prepare.py has made (default {DEMO}, which makes itself)")
    data.add_argument("--limit", type=int, help="use N training images, classes in proportion")
    data.add_argument("--metric", choices=METRICS, help="headline metric (default: the dataset's)")
    model.add_argument("--image-size", type=int,
                       help="pixels of a side, as models see images (default that of --init, or 224 as in the paper)")
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


def parse(parser, stage):
    """Read the command line of a stage, check what can be checked without data, and fill the defaults that hang
    together."""
    args = parser.parse_args()
    args.stage = stage
    for name, value in vars(args).items():
        if name in ("image_size", "limit", "epochs", "batch_size") \
                and value is not None and value < 1:
            fail(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if name in ("lr", "weight_decay", "warmup_steps", "clip_grad") \
                and value is not None and value < 0:
            fail(f"--{name.replace('_', '-')} {value}: must not be negative")
    meta = {}
    if args.init not in ("random", "imagenet", "imagenet-dino"):
        _, meta = read_checkpoint(args.init, args.init_key)
        if meta and args.arch and ARCHS.get(args.arch, args.arch) != ARCHS.get(meta["arch"], meta["arch"]):
            fail(f"--init {args.init} holds a {meta['arch']}, not the {args.arch} of --arch")
        args.arch = args.arch or meta.get("arch")
    args.arch, args.init_label = args.arch or "deit_small", init_label(args.init, meta)
    args.image_size = args.image_size or meta.get("image_size") or 224
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
# these change no result; the data are compared by their fingerprint
NOT_COMPARED = {"output", "overwrite", "device", "predict", "on_collapse", "export", "data"}


def open_run(args, run, dataset):
    """The run folder, fresh or to be resumed; nothing is written yet. Ends the script if the same run is complete. A
    folder that holds a run with other arguments or on other data is an error naming them, unless --overwrite."""
    folder = Path(args.output or "-".join(["runs/" + args.stage, dataset.name, args.arch, args.init_label,
                                           f"s{args.seed}"]))
    if folder.exists() and not folder.is_dir():
        fail(f"--output {folder} is a file, not a folder")
    args.output = str(folder)
    if not args.overwrite and any((folder / name).exists() for name in RUN_FILES[1:]):
        try:
            stored = json.loads((folder / "args.json").read_text())
            old, data = stored["arguments"], stored.get("data", {})
        except (ValueError, KeyError, OSError) as error:
            fail(f"{folder} holds a run whose args.json cannot be read ({error}); give another --output, or "
                 "--overwrite")
        here = vars(args)
        if old.get("stage") != args.stage:
            fail(f"{folder} holds another run, of {old.get('stage')}; give another --output")
        differ = [f"{k} {old.get(k)!r} there, {here.get(k)!r} here"
                  for k in sorted({*old, *here} - NOT_COMPARED) if old.get(k) != here.get(k)]
        if differ:
            fail(f"{folder} holds another run: {some(differ)}; give another --output, or --overwrite")
        if data.get("fingerprint") != dataset.fingerprint:
            fail(f"{folder} holds a run on other data: images, labels, splits or classes of {data.get('name')} there are "
                 f"not those of {dataset.folder} now; give another --output, or --overwrite")
        if (folder / "metrics.json").exists():
            summary = json.loads((folder / "metrics.json").read_text()).get("summary", "")
            say(f"{folder} is complete: {summary} (--overwrite runs it again)")
            barrier()
            raise SystemExit(0)
    barrier()  # every process has looked before one of them writes
    return folder


def write_args(folder, args, run, dataset, extra_files=()):
    """Make the run folder, lock it for as long as this process lives, and write args.json; with --overwrite the files
    of the run that was there go first."""
    if run.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run.lock = filelock.FileLock(folder / ".lock")
            run.lock.acquire(timeout=0)
            for name in [*RUN_FILES, *extra_files] if args.overwrite else []:
                (folder / name).unlink(missing_ok=True)
            write_json(folder / "args.json", {
                "stage": args.stage, "arguments": vars(args), "command": shlex.join(sys.argv),
                "data": {"name": dataset.name, "folder": str(dataset.folder), "fingerprint": dataset.fingerprint},
                "versions": versions(), "device": device_name(run.device), "world_size": run.world})
        except filelock.Timeout:
            fail(f"{folder} is being written by another process; wait for it, or give another --output")
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

CHEXPERT_FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")  # competition
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


def all_metrics(task, classes, labels, scores, ordinal=False):
    """Every metric of METRICS that the task has (quadratic kappa: where the classes are ordered), and "undefined": the
    classes that these labels do not hold."""
    values = {name: metric(name, task, labels, scores) for name in METRICS}
    if not ordinal:
        del values["quadratic_kappa"]
    if task == "multilabel":
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


def score_test(dataset, scores):
    """all_metrics of the test split, with "interval" for the headline. scores (n, C), row by row of dataset.rows."""
    rows = dataset.rows["test"]
    labels = dataset.labels[rows]
    values = all_metrics(dataset.task, dataset.classes, labels, scores, dataset.ordinal)
    if dataset.task == "multilabel":
        areas = {name: roc_auc(labels[:, i], scores[:, i]) for i, name in enumerate(dataset.classes)}
        values["roc_auc_by_label"] = areas
        if set(CHEXPERT_FIVE) < set(areas):
            values["roc_auc_competition"] = mean_defined([areas[name] for name in CHEXPERT_FIVE])
            say(f"test roc_auc of {', '.join(CHEXPERT_FIVE)}: {show(values['roc_auc_competition'])}")

    def headline(at):
        return metric(dataset.metric, dataset.task, labels[at], scores[at])
    return {**values, "interval": bootstrap_interval(headline, len(labels), dataset.groups_of(rows))}


def write_predictions(path, task, classes, images, labels, groups, scores):
    """predictions.csv: image, group, label, predicted, then a probability per class, a row an image. labels, groups:
    None where they are not known."""
    def name(flags):
        return " ".join(c for c, flag in zip(classes, flags) if flag > 0.5)
    rows = []
    for i, image in enumerate(images):
        if task == "multilabel":
            label, guess = "" if labels is None else name(labels[i]), name(scores[i])
        else:
            label, guess = "" if labels is None else classes[labels[i]], classes[int(scores[i].argmax())]
        rows.append([image, groups[i] if groups else "", label, guess, *(f"{p:.6f}" for p in scores[i])])
    write_table(path, ["image", "group", "label", "predicted", *classes], rows)


# ---------------------------------------------------------------- the run: pictures -------------------------

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito 2008
MARKERS = "os^D"
DPI = 200  # of pictures; they are laid out at twice the size of print: 6.7 inches for a column of 85 mm
LETTER = 0.62  # how wide a letter is, of the size of its font; most are narrower


def new_figure(path, width, height, **options):
    """An empty matplotlib Figure of so many inches for the picture `path`; without matplotlib None, said."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say(f"note: {path} is left out; pictures are drawn by matplotlib, which is missing: pip install matplotlib")
        return None
    return Figure((width, height), dpi=DPI, **options)


def save_figure(figure, path, **options):
    """Write a figure as PNG, atomically."""
    from matplotlib.text import Text
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # the $ of a class name begins no formula
    write_atomic(path, lambda part: figure.savefig(part, format="png", dpi=DPI, **options))


def wrap(text, inches, points, **options):
    """Text of so many points in lines of at most so many inches, broken at blanks, - and _; its own line ends stay."""
    letters = max(1, int(inches * 72 / (LETTER * points)))
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if len(line) > letters:
            lines[i] = textwrap.fill(line.replace("_", "_ "), letters, **options).replace("_ ", "_")
    return "\n".join(lines)


def draw_series(axis, series, colour, offset, width):
    """One series of a panel of draw_plot; bars are `width` wide, `offset` beside x. Returns what the legend shows."""
    kind = series.get("kind", "line")
    marker = MARKERS[series.get("marker", 0)]
    defined = [k for k, y in enumerate(series["y"]) if y is not None and y == y]
    x = np.array([series["x"][k] for k in defined], float)
    y = np.array([series["y"][k] for k in defined], float)
    error = np.full((2, len(x)), np.nan)  # down and up; NaN is not drawn
    for column, k in enumerate(defined):
        if series.get("error") and series["error"][k] is not None:
            error[:, column] = series["error"][k]
    style = {"color": colour, "label": series["label"]}
    if kind == "bars":
        return axis.bar(x + offset, y, 0.92 * width, yerr=error, ecolor="#444444", capsize=4, **style)
    if kind == "points":
        return axis.plot(x, y, marker, markersize=5, alpha=0.8, **style)[0]
    if kind == "dashed":
        return axis.plot(x, y, "--", linewidth=2, **style)[0]
    if len(x) > 8:
        marker = None
    return axis.errorbar(x, y, error if series.get("error") else None, marker=marker, linewidth=2, capsize=4, **style)


def legend_columns(panel, width, points):
    """In how many columns the legend of a panel of draw_plot fits into a width in inches."""
    labels = [series["label"] for series in panel["series"]]
    for columns in range(len(labels), 1, -1):
        longest = [max(map(len, column)) for column in np.array_split(np.array(labels, object), columns)]
        if (sum(longest) * 0.56 + columns * 3.6) * points / 72 <= width:  # 3.6: a key and the space around it
            return columns
    return 1


def draw_panel(axis, panel, width, height, points):
    """One panel of draw_plot, of width x height inches, with text of so many points."""
    from matplotlib.ticker import MaxNLocator
    small = 0.85 * points
    count = sum(series.get("kind") == "bars" for series in panel["series"])
    slot = 0.8 / max(1, count)  # of a bar; bars of one x stand side by side around it
    keys = []
    for i, series in enumerate(panel["series"]):
        colour = COLOURS[series.get("colour", i) % len(COLOURS)]
        keys.append(draw_series(axis, series, colour, (i + 0.5) * slot - 0.4, slot))
    axis.set_xlabel(wrap(panel.get("xlabel", ""), 0.95 * width, points), fontsize=points)
    axis.set_ylabel(wrap(panel.get("ylabel", ""), 0.75 * height, points), fontsize=points)
    names = panel.get("xnames")
    if names:
        space = 0.8 * width / max(1, sum(map(bool, names)))
        folded = [wrap(name, space, small, break_long_words=False) for name in names]
        lines = [line for name in folded for line in name.split("\n")]
        if max(map(len, lines)) * LETTER * small / 72 > space:  # too long even so
            axis.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
        else:
            axis.set_xticks(range(len(names)), folded)
        axis.set_xlim(-0.5, len(names) - 0.5)
    elif all(x == int(x) for series in panel["series"] for x in series["x"]):
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if panel.get("ylim"):
        low, high = min(panel["ylim"][0], axis.dataLim.y0), max(panel["ylim"][1], axis.dataLim.y1)
        axis.set_ylim(low, high + 0.04 * (high - low or 1))
    axis.tick_params(labelsize=small)
    axis.grid(axis="y", color="#dddddd")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    legend = axis.legend(handles=keys, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize=small,
                         ncols=legend_columns(panel, width, small), handlelength=1.6, columnspacing=1.2,
                         title=wrap(panel.get("title", ""), 0.95 * width, points), title_fontsize=points)
    legend.get_title().set_multialignment("center")  # above the axes, where it hides nothing


def draw_plot(path, panels, size=(640, 480), columns=3, text=20):
    """Draw panels, `columns` a row, into a PNG. A panel is a dict: title, xlabel, ylabel, series, optional xnames (text
    under x = 0, 1, ...) and ylim (what is shown at least). A series: label, x, y, optional error (of each point its
    half length, (down, up) or None), kind "line", "points", "bars" or "dashed", colour (an index into COLOURS), marker
    (0 to 3). Points whose y is None or NaN are left out. size: of a panel, and text: its height, in hundredths of an
    inch; a panel grows by the lines of its legend after the first."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = size[0] / 100, size[1] / 100
    points = 0.72 * text
    lines = max(math.ceil(len(panel["series"]) / legend_columns(panel, width, 0.85 * points)) for panel in panels)
    grown = height + (lines - 1) * 1.3 * points / 72
    figure = new_figure(path, columns * width, rows * grown, layout="constrained")
    if figure is None:
        return
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels):
        draw_panel(axis, panel, width, height, points)
    for axis in axes[len(panels):]:
        axis.set_axis_off()
    save_figure(figure, path)


def fitted(image, side):
    """An image (H, W, 1 or 3) uint8 as (h, w, 3), the longer of them `side`."""
    height, width = (max(1, round(n * side / max(image.shape[:2]))) for n in image.shape[:2])
    image = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return np.asarray(image.convert("RGB").resize((width, height)))


def draw_grid(path, rows, captions=None, row_labels=None, side=160, title=""):
    """Draw a grid of images (H, W, 1 or 3) uint8, one list a row, into a PNG: each in its own proportions, the longer
    side `side` hundredths of an inch, a caption (text, or (text, colour)) under each, a label in front of each row."""
    def lines(words):
        return len(words.split("\n")) if words else 0

    columns = max(map(len, rows))
    cell = side * DPI // 100  # pixels, as all lengths below
    gap = 12
    points = 7 * max(1, columns * cell / DPI / 5.9)  # 7 where the picture is shown 170 mm wide
    line = math.ceil(1.25 * points * DPI / 72)
    images = [[fitted(image, cell) for image in row] for row in rows]
    labels = [wrap(label, 14 * LETTER * points / 72, points) for label in row_labels or [""] * len(rows)]
    texts = []
    for row in captions or [[""] * len(row) for row in rows]:
        pairs = [caption if isinstance(caption, tuple) else (caption, "black") for caption in row]
        texts.append([(wrap(words, cell / DPI, points), colour) for words, colour in pairs])

    left = gap + bool(row_labels) * round(14 * LETTER * points * DPI / 72)
    width = left + columns * (cell + gap)
    title = wrap(title, width / DPI, 1.2 * points)
    top = gap + round(1.2 * line * lines(title))
    heights = [max([line * lines(label), *(image.shape[0] for image in row)]) for label, row in zip(labels, images)]
    below = [gap + line * max((lines(words) for words, _ in row), default=0) for row in texts]
    height = top + sum(heights) + sum(below)

    figure = new_figure(path, width / DPI, height / DPI)
    if figure is None:
        return
    figure.text(gap / width, 1 - gap / 2 / height, title, fontsize=1.2 * points, va="top")
    y = height - top  # from below
    for i, row in enumerate(images):
        figure.text(gap / width, (y - heights[i] / 2) / height, labels[i], fontsize=points, va="center")
        for j, image in enumerate(row):
            x = left + j * (cell + gap)
            figure.figimage(image, x + (cell - image.shape[1]) // 2, y - (heights[i] + image.shape[0]) // 2)
            words, colour = texts[i][j]
            colour = colour if isinstance(colour, str) else np.array(colour) / 255
            figure.text((x + cell / 2) / width, (y - heights[i] - gap / 4) / height, words, fontsize=points,
                        color=colour, ha="center", va="top")
        y -= heights[i] + below[i]
    save_figure(figure, path)
