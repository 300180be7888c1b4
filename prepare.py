"""Prepare a dataset once: images, labels and masks of any shape in, one folder of arrays out, which every stage reads.

    python prepare.py SOURCE --output data/NAME           # SOURCE: a folder, a CSV, a MedMNIST .npz, or demo
    python prepare.py DIR --label-column diagnosis --group-column patient --output data/mine
    python finetune.py --data data/NAME

Everything about files, tables, formats, patients, splits and broken images happens here; after it, an image is a row of
images.npy. Layouts are recognised (--layout names one): labels.csv or --csv; a folder per class, below train/, val/ and
test/ or at once; images/ and masks/; a flat folder without labels; and the seven datasets of Matsoukas et al. 2023
(arXiv:2303.07034) as their owners publish them, with the authors' splits. See README.md, "Your own data".
"""
import argparse
import csv
import ctypes
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import zipfile
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import common  # before PyTorch, whose threads it tells how to wait
from common import SPLITS, fail, say, some

import filelock
import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torchvision.transforms.v2.functional import resized_crop
from tqdm import tqdm

VERSION = 1
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
               "dev": "val", "test": "test", "testing": "test"}
IMAGE_FOLDERS = ("images", "image", "imgs", "img")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "gt")  # in any case
MASK_ENDING = re.compile(r"(_(mask|segmentation|seg|gt|lesion))?(_\d+)?$", re.IGNORECASE)
MASK_BESIDE = re.compile(r"_(mask|segmentation|seg|gt)(_\d+)?$", re.IGNORECASE)
NO_LABEL = {"", "nan", "na", "n/a", "#n/a", "<na>"}


def arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (--help lists all arguments)")
    parser.add_argument("source", metavar="SOURCE", help="a folder, a CSV, an .npz, or demo")
    parser.add_argument("--output", required=True, metavar="DIR", help="the prepared folder, such as data/NAME")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --output")
    layout, images, split = (parser.add_argument_group(name) for name in ("layout", "images", "splits and checks"))
    layout.add_argument("--layout", default="auto", choices=["auto", *LAYOUTS], help="(default auto: recognised)")
    layout.add_argument("--csv", help="the table (default labels.csv in SOURCE)")
    layout.add_argument("--image-column", default="image", help="of the paths (default image)")
    layout.add_argument("--label-column", help="one column of classes, several of 0/1, or none (default label)")
    layout.add_argument("--split-column", help="column with train, val, test (default: carve --split)")
    layout.add_argument("--fold-column", help="column with folds 0, 1, ... (default: --folds deals them)")
    layout.add_argument("--group-column", help="column with the patient, who stays in one split")
    layout.add_argument("--mask-column", help="column with the mask's path (default: masks/ beside the images)")
    layout.add_argument("--classes", help="names in their order, comma separated (default: sorted)")
    layout.add_argument("--ordinal", action="store_true", help="--classes are grades: quadratic kappa makes sense")
    layout.add_argument("--mask-classes", help="names of the mask values 0, 1, ... (default background,lesion)")
    layout.add_argument("--ignore", type=int, metavar="VALUE", help="mask value that counts nowhere, such as 255")
    layout.add_argument("--view", default="all", choices=["frontal", "all"], help="chexpert (default all)")
    layout.add_argument("--tissue", action="store_true", help="csaws: all 11 tissues, not the tumour alone")
    images.add_argument("--side", type=int, default=256, help="pixels of a side (default, paper: 256), at most the images'")
    images.add_argument("--enlarge", action="store_true", help="keep --side where the images are smaller")
    images.add_argument("--fit", default="squash", choices=["squash", "pad", "crop"],
                        help="how an image becomes a square (default, paper: squash; pad: black; crop: its centre)")
    images.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes that decode")
    images.add_argument("--skip-broken", action="store_true",
                        help="leave out what is missing, cannot be decoded or has no label")
    split.add_argument("--split", type=float, nargs=3, default=[0.7, 0.15, 0.15], metavar=("TRAIN", "VAL", "TEST"),
                       help="shares where splits are not given (default 0.7 0.15 0.15; 0 0 1: an external test set)")
    split.add_argument("--split-seed", type=int, default=42, help="(default, paper: 42)")
    split.add_argument("--folds", type=int, metavar="K", help="also a column fold, for --fold of the stages: cross-validation")
    split.add_argument("--leakage", choices=["warn", "drop", "error"],
                       help="identical images, or a patient, in two splits: say so (default), take them out of train, stop")
    args = parser.parse_args(argv)
    if args.side < 8 or args.workers < 0:
        fail("expected --side of at least 8 pixels and --workers of at least 0")
    if not (min(args.split) >= 0 and abs(sum(args.split) - 1) <= 1e-6):
        fail(f"--split {' '.join(map(str, args.split))}: three shares that sum to 1, such as 0.7 0.15 0.15")
    for name in ("classes", "mask_classes", "label_column"):
        if getattr(args, name):
            setattr(args, name, [part.strip() for part in getattr(args, name).split(",")])
    if args.folds is not None and args.folds < 2 or args.folds and args.fold_column:
        fail(f"--folds {args.folds}: at least 2, and not beside --fold-column")
    if args.ordinal and not args.classes:
        fail("--ordinal needs the grades in their order: --classes \"No DR,Mild,Moderate\"")
    if args.mask_classes and (len(args.mask_classes) < 2 or not all(args.mask_classes)):
        fail("--mask-classes: expected at least two names, the background's first")
    return args


@dataclass
class Row:
    """An image of the source."""
    item: object  # its file; (file, key, number) of an array; the number of a drawn one; None where it is missing
    name: str  # its path below the root, with forward slashes
    label: object = None  # the name of its class, or 0/1 of each class
    split: str = None  # train, val, test, "" for none; None where the source has no splits
    group: str = None
    fold: int = None
    masks: list = None  # [(class or None, file), ...]; None where the source has no masks
    experts: dict = field(default_factory=dict)  # {annotator: like masks}


@dataclass
class Source:
    """What a source holds. classes: in their order, None for the sorted one; labels are 0/1 where it is multilabel."""
    rows: list
    classes: list = None
    multilabel: bool = False
    ordinal: bool = False
    mask_classes: list = None
    metric: str = None
    mean: list = None
    std: list = None
    table: Path = None  # that lists the images
    left_out: dict = field(default_factory=dict)  # {why: names}


def refuse(wrong, message):
    """Fail with the message, and the first 20 of the names `wrong`, if there are any."""
    if wrong:
        fail(f"{message}: {some(wrong, 20)}")


def fill(rows, **columns):
    """The rows with a field set from each column."""
    for name, values in columns.items():
        for row, value in zip(rows, values):
            setattr(row, name, value)
    return rows


def say_left_out(source, why, names):
    """Note in dataset.json which images are left out, and say how many."""
    source.left_out[why] = names
    say(f"left out, {why}: {len(names)} images ({some(names)})")


def leave_out(source, why, unusable, message, args):
    """Take rows that cannot be used out of a source, and note why; an error without --skip-broken, or if none are left."""
    if not unusable:
        return
    if not args.skip_broken:
        fail(f"{message}. Mend or remove them, or leave them out with --skip-broken")
    if len(unusable) == len(source.rows):
        fail(f"{message}. Nothing would be left; mend them")
    say(f"left out: {message}")
    gone = set(map(id, unusable))
    source.rows = [row for row in source.rows if id(row) not in gone]
    source.left_out[why] = [row.name for row in unusable]


# ---------------------------------------------------------------- image files -------------------------------

Image.init()
NOT_IMAGES = {".h5", ".hdf", ".bufr", ".grib", ".mpg", ".mpeg", ".eps", ".ps", ".wmf", ".emf"}  # stubs of Pillow's
DICOM = {".dcm", ".dicom"}
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
SUFFIXES = SUFFIXES - NOT_IMAGES | DICOM
NAMED = ".named.csv"  # the table of saliency.py's --files, which lists those few on purpose


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
    for place, folders, names in os.walk(folder, followlinks=True):
        below = Path(place).relative_to(folder)
        if any(os.path.samefile(place, Path(folder, parent)) for parent in below.parents):  # a link to a folder above it
            folders.clear()
            continue
        folders[:] = [name for name in folders if name[0] != "." and name != "__MACOSX"]
        for name in names:
            if name[0] == "." or name in ("Thumbs.db", "desktop.ini", "DICOMDIR"):
                continue
            known = os.path.splitext(name)[1].lower() in SUFFIXES or is_dicom(os.path.join(place, name))
            (images if known else others).append((below / name).as_posix())
    return sorted(images), sorted(others)


def to_8_bit(values):
    """Numbers of any range as uint8, over their own range; what is not finite becomes black or white."""
    values = np.asarray(values)
    if values.dtype == np.uint16:  # once for each level, not for each pixel
        low = values.min()
        return to_8_bit(np.arange(low, values.max() + 1.0))[values - low]
    values = values.astype(np.float64)
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
    if values.shape[2] in (2, 4):
        values = values[..., :-1] * (values[..., -1:] / 65535)
    return to_8_bit(values)


def bits_of(image):
    """Bits a channel of an image that has just been opened: the arguments of its decoder tell, where modes do not.
    They are gone once a PNG's EXIF is read."""
    how = image.tile[0][3] if image.tile else ""
    if ";16" in str(how) or image.format == "PPM" and isinstance(how, tuple) and how[-1] > 255:
        return 16
    return {"1": 1, "I": 16, "F": 32}.get(image.mode.split(";")[0], 8)


def on_black(image):
    """A Pillow image; what is transparent in it is black."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA"))


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
        deep_colour = bits_of(image) == 16 and image.mode[0] not in "IF"
        pages = getattr(image, "n_frames", 1)
        note = f"{pages} pages, the first is used" if pages > 1 else ""
        upright = image.getexif().get(274, 1) < 5  # orientations 5 to 8 lie on their side
        size = image.size[::-1] if upright else image.size
        if deep_colour:
            return one_channel(read_deep_colour(path, image)), size, note
        if side:
            image.draft(None, (2 * side, 2 * side))  # JPEG only
        white_is_0 = image.format == "TIFF" and image.tag_v2.get(262) == 0
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            values = np.asarray(image)
            if white_is_0:  # 8-bit ones are turned by Pillow
                values = -values.astype(np.float64)
            pixels = to_8_bit(values)[..., None]
        elif image.mode in ("1", "L"):
            pixels = np.asarray(image.convert("L"))[..., None]
        else:
            pixels = np.asarray(on_black(image).convert("RGB"))
    return one_channel(pixels), size, note


def one_channel(pixels):
    """(H, W, 3) whose channels are equal as (H, W, 1), all else as it is."""
    if pixels.shape[2] != 3:
        return pixels
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]  # comparing two at once is 20 times slower
    return pixels[..., :1] if (red == green).all() and (green == blue).all() else pixels


@functools.cache  # a file a process: h5py's must not be shared by forks
def open_hdf5(path, process):
    """An open HDF5 file."""
    try:
        import h5py
    except ImportError:
        fail(f"{path} is an HDF5 file, for which h5py is missing: pip install h5py")
    return h5py.File(path, "r")


def open_array(path, key):
    """An array of an HDF5 file, or an .npy (key None), read as it is indexed."""
    try:
        return np.load(path, mmap_mode="r") if key is None else open_hdf5(str(path), os.getpid())[key]
    except (OSError, KeyError) as error:
        fail(f"{path}: no HDF5 file with {key!r} in it ({error})")


# ---------------------------------------------------------------- tables ------------------------------------

def read_table(file, needed=()):
    """The columns of a table, {head: [text, ...]}: UTF-8, UTF-16 or, said, cp1252; separated by commas, semicolons or
    tabs; blanks around cells and empty rows taken off. Every name in `needed` must stand in its head."""
    if not Path(file).is_file():
        fail(f"{file}: there is no such table")
    raw = Path(file).read_bytes()
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        text = raw.decode("cp1252", errors="replace")
        say(f"note: {file} is not UTF-8; read as cp1252, the code page of Western Windows")
    first = re.sub('"[^"]*"', "", text.split("\n", 1)[0])
    separator = max(",;\t", key=first.count)
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator)]
    rows = [row for row in rows if any(row)]
    if len(rows) < 2:
        fail(f"{file}: no rows below its head")
    head = rows[0]
    twice = [name for name, count in Counter(head).items() if name and count > 1]
    if twice:
        fail(f"{file}: the column {twice[0]!r} stands twice; rename one")
    long = [i for i, row in enumerate(rows) if any(row[len(head):])]
    if long:
        fail(f"{file}: row {long[0]} ({', '.join(rows[long[0]])}) has more cells than the head, {some(head, 30)}")
    for name in needed:
        if name not in head:
            fail(f"{file}: no column {name!r}; separated by {separator!r} it has {some(map(repr, head), 30)}")
    padded = ([*row, *[""] * (len(head) - len(row))] for row in rows[1:])
    return dict(zip(head, map(list, zip(*padded))))


def locate(listed, folders):
    """The file of each listed image under the first of `folders` that has it, None where none does. Paths of Windows
    and ids without a suffix are understood."""
    stems = None
    paths = []
    for name in listed:
        name = name if "\\" not in name or os.path.isfile(name) else name.replace("\\", "/")
        places = [os.path.join(folder, name) for folder in folders]
        path = next(filter(os.path.isfile, places), None) if name else None
        if path is None and name:
            stems = by_stem(folders) if stems is None else stems
            files = stems[name.removeprefix("./")]
            if len(files) > 1:
                fail(f"{name!r} may be {some(files)}; list images with their suffix")
            path = files[0] if files else None
        paths.append(path)
    return paths


def by_stem(folders):
    """{path below a folder without its suffix: files} of all images under some folders."""
    stems = defaultdict(list)
    for folder in dict.fromkeys(map(str, folders)):
        for name in files_under(folder)[0]:
            stems[os.path.splitext(name)[0]].append(os.path.join(folder, name))
    return stems


def listed_rows(listed, folders, root):
    """A Row for each listed image; its item is None where it is under none of the folders."""
    rows = []
    for name, path in zip(listed, locate(listed, folders)):
        rows.append(Row(path, name if path is None else os.path.relpath(path, root).replace(os.sep, "/")))
    return rows


def translate(file, table, columns, names, known, expected):
    """The cells of some columns by the dict known {lower-case text: value}: [value of each row] of each column. All cells
    that are not in it are named."""
    wrong = []
    for column in columns:
        for name, cell in zip(names, table[column]):
            if cell.lower() not in known:
                wrong.append(f"{column} {cell!r} of {name}")
    refuse(wrong, f"{file}: {len(wrong)} cells hold none of {expected}")
    return [[known[cell.lower()] for cell in table[column]] for column in columns]


# ---------------------------------------------------------------- layouts: one's own ------------------------

def index_demo(root, args):
    """900 drawn lesions (see draw_lesion) in four classes, 600 / 100 / 200, with their outlines as masks."""
    splits = ["train"] * 600 + ["val"] * 100 + ["test"] * 200
    return Source([Row(i, f"{i:04d}", DEMO_CLASSES[i % 4], split, masks=[(1, i)]) for i, split in enumerate(splits)])


def index_csv(root, args):
    """A row an image: --image-column, --label-column (several of 0/1: multilabel), optional --split-column,
    --group-column, --mask-column. Paths are below the table's folder, SOURCE, or their images/."""
    file = Path(args.csv) if args.csv else root / "labels.csv"
    labels = args.label_column or []
    labels = [] if labels == ["none"] else labels
    table = read_table(file, [args.image_column, *labels,
                              *filter(None, (args.split_column, args.group_column, args.mask_column, args.fold_column))])
    folders = [folder / part for folder in dict.fromkeys((file.parent, root)) for part in ("", *IMAGE_FOLDERS)]
    listed = table[args.image_column]
    source = Source(listed_rows(listed, folders, root), table=file)
    for name, column in (("split", args.split_column), ("fold", args.fold_column)):
        if name in table and not column:
            say(f"note: the column \"{name}\" of {file} is not used; --{name}-column {name} takes it")
    if args.fold_column:
        known = {text: int(text) for text in table[args.fold_column] if text.isdigit()}
        known[""] = None
        fill(source.rows, fold=translate(file, table, [args.fold_column], listed, known, "the whole numbers of folds")[0])
    if args.mask_column:
        add_mask_column(source, table[args.mask_column], root, args)
    elif args.label_column != ["none"]:
        listed_too = {row.name for row in source.rows}  # an image may stand in a folder called label
        pair_masks(source, root, [name for name in split_masks(files_under(root)[0])[1] if name not in listed_too])
    if not args.label_column and "label" in table:
        labels = ["label"]
    if len(labels) > 1:
        known = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
        flags = translate(file, table, labels, listed, known, "0 or 1, or what means that")
        fill(source.rows, label=np.array(flags, np.uint8).T)
        source.classes, source.multilabel = labels, True
    elif labels:
        fill(source.rows, label=table[labels[0]])
    elif args.label_column != ["none"] and all(row.masks is None for row in source.rows):
        fail(f"{file}: no column 'label'; it has {some(map(repr, table), 30)}: name one with --label-column, or none")
    if args.group_column:
        fill(source.rows, group=table[args.group_column])
    if args.split_column:
        known = {**SPLIT_NAMES, "": ""}
        fill(source.rows, split=translate(file, table, [args.split_column], listed, known, "train, val, test")[0])
        blank = table[args.split_column].count("")
        if blank:
            say(f"note: {blank} images have a blank split: no stage sees them")
    return source


def merge_repeated(source):
    """Keep every image once: rows that say the same of one image are one, others are refused by name."""
    places = defaultdict(list)
    for row in source.rows:
        places[os.path.abspath(row.item) if isinstance(row.item, str) else row.item].append(row)
    repeated = [rows for rows in places.values() if len(rows) > 1]
    torn = []
    for rows in repeated:
        facts = {" ".join(str(fact) for fact in (row.label, row.split, row.group) if fact is not None) for row in rows}
        if len(facts) > 1:
            torn.append(f"{rows[0].name} ({' and '.join(sorted(facts))})")
        if rows[0].masks:  # a row a lesion: their masks are united
            rows[0].masks = list(dict.fromkeys(mask for row in rows for mask in row.masks or []))
    refuse(torn, f"{source.table}: {len(torn)} images are listed twice with other labels, splits or groups")
    if repeated:
        say(f"note: {len(repeated)} images are listed more than once in {source.table}, with the same label; each counts "
            f"once: {some(rows[0].name for rows in repeated)}")
    source.rows = [rows[0] for rows in places.values()]


def index_files(root, args):
    """Images in folders: one per class, or images/ and masks/, or one folder of unlabelled ones, each below train/, val/
    and test/ or at once (then splits are carved). --layout flat takes all images, no folder for a class, no masks."""
    files, others = files_under(root)
    if others:
        say(f"note: {len(others)} files of {root} are no images and are not used: {some(others)}")
    images, masks = split_masks(files)
    source = Source([Row(str(root / name), name) for name in images])
    if args.layout == "flat":
        return source
    splits = [split_of(name) for name in images]
    if any(splits):
        fill(source.rows, split=splits)
        if not all(splits) or "train" not in splits:
            tops = sorted({name.split("/")[0] for name in images})
            fail(f"{root}: expected every image below train/, val/ or test/, train at least; found {some(tops)}")
    label_by_folder(source, root, others)
    pair_masks(source, root, masks)
    return source


def split_of(name):
    """The split of a path below train/ or images/train/ and their like, "" of another one."""
    folders = name.lower().split("/")[:-1]
    folders = folders[1:] if folders and folders[0] in IMAGE_FOLDERS else folders
    return SPLIT_NAMES.get(folders[0], "") if folders else ""


def label_by_folder(source, root, others):
    """Label the rows of folders by the folder that their split has, or the root; images/ is no class."""
    for row in source.rows:
        folders = row.name.split("/")[:-1]
        if row.split and folders[0].lower() in SPLIT_NAMES:
            folders = folders[1:]
        if folders and folders[0].lower() not in IMAGE_FOLDERS:
            row.label = folders[0]
    homeless = [row.name for row in source.rows if row.label is None]
    if len(homeless) == len(source.rows):
        return
    if homeless:
        fail(f"{root}: {len(homeless)} images stand in no class folder, such as {some(homeless, 3)}; move them into folders of "
             "their class, or out of here (unlabelled images are for finetune.py --predict, and for DINO by --layout flat)")
    classes = {name.rsplit("/", 1)[0] for name in others if "/" in name and mask_place(name) is None}
    for folder in sorted(classes - {row.name.rsplit("/", 1)[0] for row in source.rows}):
        inside = [name for name in others if name.startswith(folder + "/")]
        fail(f"{root / folder}: the class has no images; found {some(inside)}; add some or remove the folder")


def mask_place(name):
    """Where in the path of a file a folder of masks stands, at the root, below train/ or in a class; None where none
    does."""
    folders = name.lower().split("/")[:-1]
    return next((i for i, folder in enumerate(folders) if folder in MASK_FOLDERS), None)


def split_masks(files):
    """(images, masks) of files: a mask stands in a folder of masks, or as a_mask.png or a_mask_1.png beside a.png."""
    stems = {os.path.splitext(file)[0] for file in files}
    images, masks = [], []
    for file in files:
        stem = os.path.splitext(file)[0]
        beside = MASK_BESIDE.search(stem) and MASK_ENDING.sub("", stem) in stems
        (images if mask_place(file) is None and not beside else masks).append(file)
    return images, masks


def pair_masks(source, root, masks):
    """Give each row its masks: those with the same path, but for a folder images/ or masks/ in it, and by name or with
    _mask, _segmentation, _seg, _gt, _1 behind it. Images without one are named."""
    keys = defaultdict(list)
    for row in source.rows:
        parts = [part for part in row.name.split("/") if part.lower() not in IMAGE_FOLDERS]
        keys[os.path.splitext("/".join(parts))[0]].append(row)
    orphans = []
    for file in masks:
        place = mask_place(file)
        parts = [part for i, part in enumerate(file.split("/")) if i != place and part.lower() not in IMAGE_FOLDERS]
        key = os.path.splitext("/".join(parts))[0]
        owners = keys.get(key) or keys.get(MASK_ENDING.sub("", key)) or []
        if len(owners) > 1:
            fail(f"{root}: two images called {key} differ by their suffix alone, so that {file} may be the mask of either")
        if owners:
            owners[0].masks = [*(owners[0].masks or []), (None, os.path.join(root, file))]
        else:
            orphans.append(file)
    if orphans:
        say(f"note: {len(orphans)} masks belong to no image and are not used: {some(orphans)}")
    if masks:
        fill(source.rows, masks=[row.masks or [] for row in source.rows])


def add_mask_column(source, listed, root, args):
    """Give each row the mask that its table names."""
    paths = locate(listed, [source.table.parent, root, *(root / name for name in MASK_FOLDERS)])
    missing = [text or row.name for text, row, path in zip(listed, source.rows, paths) if path is None]
    if not args.skip_broken:
        refuse(missing, f"{source.table}: {len(missing)} masks are not there; --skip-broken leaves them out")
    fill(source.rows, masks=[[(None, path)] if path else [] for path in paths])


def index_npz(file, args):
    """MedMNIST: {train,val,test}_{images,labels}, images (N, S, S) or (N, S, S, 3) uint8, labels (N, 1), or (N, L) 0/1.
    Its arrays are unpacked beside what is being built, where images are read one at a time."""
    scratch = Path(f"{args.output}.partial", "unpacked")
    try:
        with zipfile.ZipFile(file) as archive:
            keys = {name.removesuffix(".npy") for name in archive.namelist()}
            parts = [part for part in SPLITS if f"{part}_images" in keys]
            wanted = [f"{part}_{what}" for part in parts for what in ("images", "labels")]
            if not parts or not keys.issuperset(wanted):
                fail(f"{file}: expected train_images, train_labels, val_images, ... as in MedMNIST; found "
                     f"{some(sorted(keys), 12)}")
            archive.extractall(scratch, [f"{name}.npy" for name in wanted])
        arrays = [np.load(scratch / f"{name}.npy", mmap_mode="r") for name in wanted]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        fail(f"{file}: not a readable .npz ({error})")
    source = Source([])
    for part, images, labels in zip(parts, arrays[::2], arrays[1::2]):
        square = images.ndim in (3, 4) and images.shape[1] == images.shape[2] and images.shape[3:] in ((), (1,), (3,))
        if not square or images.dtype != np.uint8:
            volumes = "; volumes are no images" if images.ndim == 4 and images.shape[3] not in (1, 3) else ""
            fail(f"{file}: {part}_images is {images.shape} {images.dtype}; expected (N, S, S) or (N, S, S, 3) uint8{volumes}")
        if len(images) != len(labels):
            fail(f"{file}: {len(images)} {part} images for {len(labels)} labels")
        labels = np.array(labels).reshape(len(labels), -1)
        if (labels != labels.astype(np.int64)).any():
            fail(f"{file}: labels must be whole numbers, one a class")
        if labels.shape[1] > 1:
            source.multilabel = True
            source.classes = args.classes or [f"label_{k}" for k in range(labels.shape[1])]
            if not np.isin(labels, (0, 1)).all():
                fail(f"{file}: labels of several columns must be 0 or 1")
        for i, label in enumerate(labels):
            label = label.astype(np.uint8) if source.multilabel else str(int(label[0]))
            source.rows.append(Row((str(scratch / f"{part}_images.npy"), None, i), f"{part}/{i}", label, part))
    return source


# ---------------------------------------------------------------- layouts: the paper's datasets -------------

# headline metric, mean, std (None: measured on train; one number: grey), classes
SPECS = {
    "aptos2019": ("quadratic_kappa", (0.415, 0.221, 0.073), (0.275, 0.150, 0.081),
                  "No DR, Mild, Moderate, Severe, Proliferative DR"),
    "ddsm": ("roc_auc", (0.286,), (0.267,), "normal, abnormal"),
    "isic2019": ("recall", (0.66776717, 0.52960888, 0.52434725), (0.22381877, 0.20363036, 0.21538623),
                 "MEL, NV, BCC, AK, BKL, DF, VASC, SCC"),
    "chexpert": ("roc_auc", (0.503,), (0.292,),
                 "No Finding, Enlarged Cardiomediastinum, Cardiomegaly, Lung Opacity, Lung Lesion, Edema, "
                 "Consolidation, Pneumonia, Atelectasis, Pneumothorax, Pleural Effusion, Pleural Other, "
                 "Fracture, Support Devices"),
    "camelyon": ("roc_auc", (0.69991202, 0.53839318, 0.69108667), (0.2308955, 0.27435492, 0.20865005),
                 "normal, tumor")}
CSAWS_VAL = "000 001 012 018 025 030 034 038 053 062 068 075 083 127 131 139 156 181 245 249".split()
CSAWS_MAPS = ("cancer calcifications axillary_lymph_nodes thick_vessels foreign_object skin nipple text "
              "non-mammary_tissue pectoral_muscle mammary_gland").split()  # the owners' order: first on top


def random_split(count, share, seed, groups=None):
    """The authors' split of images 0 .. count - 1, [name]: shuffled by Python's random.Random(seed), the first
    int(count * share) held out, half of them val, half test. seed=None keeps the order; groups (N) stay whole: a cut
    moves to the end of one."""
    members = defaultdict(list)
    for i in range(count):
        members[groups[i] if groups else i].append(i)
    members = list(members.values())
    if seed is not None:
        random.Random(seed).shuffle(members)
    order = [i for group in members for i in group]
    ends = np.cumsum([0, *map(len, members)])
    held = int(count * share)
    half = ends[np.searchsorted(ends, held // 2)]
    held = ends[np.searchsorted(ends, held)]
    splits = np.full(count, "train", object)
    splits[order[:half]] = "val"
    splits[order[half:held]] = "test"
    return splits.tolist()


def index_aptos2019(root, args):
    """train.csv (id_code, diagnosis 0 to 4) and train_images/{id_code}.png: the authors' 70/15/15."""
    table = read_table(root / "train.csv", ["id_code", "diagnosis"])
    rows = listed_rows([f"{name}.png" for name in table["id_code"]], [root / "train_images"], root)
    grades = dict(zip("01234", SPECS["aptos2019"][-1].split(", ")))
    fill(rows, label=[grades.get(grade, grade) for grade in table["diagnosis"]],
         split=random_split(len(rows), 0.3, args.split_seed))
    return Source(rows, table=root / "train.csv")


def index_ddsm(root, args):
    """ddsm_raw_image_lists/{train,val,test}.txt, a path under ddsm_raw/ a line, such as
    cancer_15-B_3504_1.RIGHT_CC.LJPEG.1.jpg of patient B_3504; or else CBIS-DDSM."""
    if any(root.rglob("*_case_description_t*_set.csv")):
        return index_cbis_ddsm(root)
    known = {"normal": "normal", "benign": "abnormal", "cancer": "abnormal"}
    source = Source([], table=root / "ddsm_raw_image_lists")
    for split in SPLITS:
        lines = (root / f"ddsm_raw_image_lists/{split}.txt").read_text("utf-8-sig").splitlines()
        listed = [line.strip() for line in lines if line.strip()]
        for row in listed_rows(listed, [root / "ddsm_raw"], root):
            base = os.path.basename(row.name)
            row.label = known.get(base.split("_")[0], base.split("_")[0])
            row.group = (re.search(r"[A-D]_\d{4}(?=_\d)", base) or [base])[0]
            row.split = split
            source.rows.append(row)
    return source


def index_cbis_ddsm(root):
    """CBIS-DDSM: {mass,calc}_case_description_{train,test}_set.csv of TCIA and the full mammograms, named (or their
    folder) by series or case of "image file path". One MALIGNANT lesion decides."""
    files = {}
    for name in files_under(root)[0]:
        files[Path(name).stem] = files[Path(name).parent.name] = str(root / name)
    known = {"BENIGN": "benign", "BENIGN_WITHOUT_CALLBACK": "benign", "MALIGNANT": "malignant"}
    mammograms = {}
    for file in sorted(root.rglob("*_case_description_t*_set.csv")):
        table = read_table(file, ["patient_id", "pathology", "image file path"])
        cases = [path.split("/") for path in table["image file path"]]
        listed = [files.get(case[-2 % len(case)]) or files.get(case[0], case[0]) for case in cases]
        split = "test" if "_test_" in file.name else "train"
        for row, label, patient in zip(listed_rows(listed, [""], root), table["pathology"], table["patient_id"]):
            label = known.get(label, label)
            row = mammograms.setdefault((split, row.item or row.name), row)
            row.split, row.group, row.label = split, patient, max(label, row.label or "benign")
    if "train" not in {split for split, _ in mammograms}:
        fail(f"{root}: no mass or calc_case_description_train_set.csv in it; found {some(os.listdir(root), 12)}")
    return Source(list(mammograms.values()), ["benign", "malignant"], metric="roc_auc", table=root)


def index_isic2019(root, args):
    """ISIC_2019_Training_GroundTruth.csv (image, one-hot classes) and the JPEGs: the authors' 80/10/10 of images, or
    with --group-column lesion_id of lesions, by ISIC_2019_Training_Metadata.csv."""
    classes = SPECS["isic2019"][-1].split(", ")
    file = root / "ISIC_2019_Training_GroundTruth.csv"
    table = read_table(file, ["image", *classes])
    ids = table["image"]
    rows = listed_rows([f"{name}.jpg" for name in ids], [root / "ISIC_2019_Training_Input", root / "train"], root)
    columns = [name for name in (*classes, "UNK") if name in table]
    for i, row in enumerate(rows):
        row.label = " ".join(name for name in columns if table[name][i] not in ("0", "0.0"))
    groups = None
    if args.group_column:
        meta = read_table(root / "ISIC_2019_Training_Metadata.csv", ["image", args.group_column])
        lesions = dict(zip(meta["image"], meta[args.group_column]))
        groups = [lesions.get(name) or name for name in ids]  # some 2,000 images name no lesion
        fill(rows, group=groups)
    return Source(fill(rows, split=random_split(len(rows), 0.2, args.split_seed, groups)), table=file)


def index_chexpert(root, args):
    """train.csv (Path, ..., 14 labels) sorted by Path, its first 20 % held out, whole patients. Blank and -1 are 0
    (U-zeros), a row without a positive is No Finding. --view frontal leaves lateral images out, after the split."""
    classes = SPECS["chexpert"][-1].split(", ")
    file = root / "train.csv"
    table = read_table(file, ["Path", "Frontal/Lateral", *classes])
    names = [re.sub(r"^CheXpert-v1\.0[^/]*/", "", name) for name in table["Path"]]
    known = {"": 0, "0": 0, "0.0": 0, "-1": 0, "-1.0": 0, "1": 1, "1.0": 1}
    flags = np.array(translate(file, table, classes, names, known, "0 or 1, -1 or blank"), np.uint8).T
    flags[flags.sum(1) == 0, 0] = 1
    patients = [(re.search(r"patient\d+", name) or [name])[0] for name in names]
    rows = fill(listed_rows(names, [root], root), label=flags, group=patients)
    rows.sort(key=lambda row: row.name)
    fill(rows, split=random_split(len(rows), 0.2, None, [row.group for row in rows]))
    source = Source(rows, multilabel=True, table=file)
    lateral = {name for name, view in zip(names, table["Frontal/Lateral"]) if view != "Frontal"}
    if args.view == "frontal" and lateral:
        source.rows = [row for row in rows if row.name not in lateral]
        say_left_out(source, "lateral", sorted(lateral))
    return source


def index_camelyon(root, args):
    """PatchCamelyon's camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5, its official split."""
    source = Source([])
    known = dict(zip("01", SPECS["camelyon"][-1].split(", ")))
    for part, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        file = root / f"camelyonpatch_level_2_split_{part}_x.h5"
        x, y = open_array(file, "x"), open_array(str(file).replace("_x.h5", "_y.h5"), "y")
        if len(x) != len(y) or x.shape[3:] != (3,) or x.dtype != np.uint8:
            fail(f"{file}: {x.shape} {x.dtype} for {len(y)} labels; expected (N, 96, 96, 3) uint8")
        for i, label in enumerate(y[:].reshape(-1)):
            source.rows.append(Row((str(file), "x", i), f"{file.name}:{i}", known.get(str(label), str(label)), split))
    return source


def index_isic2018(root, args):
    """ISIC2018_Task1-2_Training_Input/{id}.jpg, ISIC2018_Task1_Training_GroundTruth/{id}_segmentation.png: 80/10/10 of
    the sorted ids; official Test folders, if there, are test, and train gets that tenth."""
    source = Source([], metric="iou")
    for part in ("Training", "Test"):
        images, masks = root / f"ISIC2018_Task1-2_{part}_Input", root / f"ISIC2018_Task1_{part}_GroundTruth"
        names = [name for name in files_under(images)[0] if name.endswith(".jpg")]
        rows = [Row(str(images / name), f"{images.name}/{name}") for name in names]
        for row in rows:
            mask = masks / f"{Path(row.name).stem}_segmentation.png"
            row.masks = [(None, str(mask))] if mask.is_file() else []
        if part == "Training":
            fill(rows, split=random_split(len(rows), 0.2, args.split_seed))
        elif rows:
            fill(source.rows, split=["train" if row.split == "test" else row.split for row in source.rows])
            fill(rows, split=["test"] * len(rows))
        source.rows += rows
    return source


def index_csaws(root, args):
    """CSAW-S: anonymized_dataset/{patient}/{patient}_{n}.png with binary maps {patient}_{n}_{class}.png, the owners' 20
    validation patients, test_data/ with annotators 1 to 3. --tissue takes all 11 classes."""
    wanted = CSAWS_MAPS if args.tissue else CSAWS_MAPS[:1]
    source = Source([], metric="iou", mask_classes=["background", "tumour", *wanted[1:]])
    for folder in (root / "anonymized_dataset", root / "test_data" / "anonymized_dataset"):
        scans = {}  # an 8-bit duplicate sorts behind its original and takes its place
        for name in files_under(folder)[0]:
            match = re.fullmatch(r"(?:.*/)?((\w+)_\d+?)(?:_8bit)?\.png", name)
            if match:
                path = folder / name
                split = "val" if match[2] in CSAWS_VAL else "train"
                scans[match[1]] = Row(str(path), path.relative_to(root).as_posix(), split=split, group=match[2])
        if not scans:
            fail(f"{folder}: no scan such as 000/000_0.png")
        rows = list(scans.values())
        if folder.parent == root:
            fill(rows, masks=csaws_masks(scans, folder, wanted))
        else:
            experts = [csaws_masks(scans, folder.parent / f"annotator_{k}", wanted) for k in (1, 2, 3)]
            fill(rows, split=["test"] * len(rows), masks=experts[0])
            for row, of_each in zip(rows, zip(*experts)):
                row.experts = {f"annotator_{k}": masks for k, masks in enumerate(of_each, 1)}
        source.rows += rows
    return source


def csaws_masks(scans, folder, wanted):
    """[(class, map), ...] of each scan, later ones on top. A map that is missing is a class that is not there; none at
    all is a mistake."""
    masks, missing = [], []
    for stem in scans:
        maps = {}
        for name in CSAWS_MAPS:
            for end in ("_8bit", ""):
                path = folder / stem.rsplit("_", 1)[0] / f"{stem}_{name}{end}.png"
                if path.is_file():
                    maps[name] = str(path)
        found = [(i, maps[name]) for i, name in enumerate(wanted, 1) if name in maps][::-1]
        masks.append(found or [(0, path) for path in maps.values()][:1])
        if not maps:
            missing.append(stem)
    refuse(missing, f"{folder}: {len(missing)} of {len(scans)} scans have no map, such as 000_0_cancer.png")
    return masks


LAYOUTS = {"demo": index_demo, "csv": index_csv, "folder": index_files, "flat": index_files, "medmnist": index_npz,
           "aptos2019": index_aptos2019, "ddsm": index_ddsm, "isic2019": index_isic2019, "chexpert": index_chexpert,
           "camelyon": index_camelyon, "isic2018": index_isic2018, "csaws": index_csaws}
INSIDE = {"aptos2019": ["train.csv", "train_images"], "isic2019": ["ISIC_2019_Training_GroundTruth.csv"],
          "ddsm": ["ddsm_raw", *(f"ddsm_raw_image_lists/{part}.txt" for part in SPLITS)],
          "isic2018": ["ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"],
          "csaws": ["anonymized_dataset", "test_data"], "chexpert": ["train.csv"],
          "camelyon": [f"camelyonpatch_level_2_split_{part}_{what}.h5" for part in ("train", "valid", "test") for what in "xy"]}
MARKS = {"aptos2019": ["train_images"], "ddsm": ["ddsm_raw_image_lists"], "isic2018": ["ISIC2018_Task1-2_Training_Input"],
         "isic2019": ["ISIC_2019_Training_GroundTruth.csv"], "csaws": ["anonymized_dataset", "CsawS"],
         "chexpert": ["CheXpert-v1.0-small", "CheXpert-v1.0"],
         "camelyon": ["camelyonpatch_level_2_split_train_x.h5"]}  # by which each is recognised


def recognise(source, args):
    """(layout, root) of SOURCE."""
    path = Path(source)
    if args.layout == "demo" or args.layout == "auto" and source == "demo" and not path.exists():
        return "demo", path
    if path.is_file():
        kind = {".npz": "medmnist", ".csv": "csv", ".tsv": "csv", ".txt": "csv"}.get(path.suffix.lower())
        if kind is None or args.layout not in ("auto", kind):
            needed = f", for --layout {args.layout} a folder" if args.layout != "auto" else ""
            fail(f"SOURCE {source} is a file; expected a folder, a .csv or an .npz{needed}")
        if kind == "csv":
            args.csv = args.csv or str(path)
        return kind, path if kind == "medmnist" else path.parent
    if not path.is_dir():
        fail(f"SOURCE {source}: there is no such folder or file (looked in {Path.cwd()})")
    layout = args.layout if args.layout != "auto" else recognise_folder(path, args)
    if layout == "medmnist":
        fail(f"SOURCE {source}: --layout medmnist takes the .npz file itself")
    for inside in ("CheXpert-v1.0-small", "CheXpert-v1.0", "CsawS"):
        if layout in ("chexpert", "csaws") and (path / inside).is_dir():
            path = path / inside
    lacking = [name for name in INSIDE.get(layout, []) if not (path / name).exists()]
    if lacking and not (layout == "ddsm" and any(path.rglob("*_case_description_t*_set.csv"))):
        fail(f"{path}: this layout has {', '.join(INSIDE[layout])} in it; found "
             f"{some(sorted(os.listdir(path)), 12) or 'an empty folder'}")
    return layout, path


def recognise_folder(path, args):
    """The layout of a folder."""
    if args.csv or (path / "labels.csv").is_file():
        return "csv"
    for name, marks in MARKS.items():
        if any((path / mark).exists() for mark in marks):
            return name
    if any(path.rglob("*_case_description_t*_set.csv")):
        return "ddsm"
    if (path / "train.csv").is_file() and "Frontal/Lateral" in (path / "train.csv").open(errors="replace").readline():
        return "chexpert"
    return "folder"


def read_source(layout, root, args):
    """The Source of a layout, every image of it once and there."""
    source = LAYOUTS[layout](root, args)
    if layout in SPECS and not source.classes:
        source.metric, mean, std, classes = SPECS[layout]
        source.mean, source.std = [*mean] * (3 // len(mean)), [*std] * (3 // len(std))
        source.classes, source.ordinal = classes.split(", "), layout == "aptos2019"
    missing = [row for row in source.rows if row.item is None]
    leave_out(source, "missing", missing, f"{len(missing)} of {len(source.rows)} listed images are not below {root} "
              f"({source.table}): {some((row.name for row in missing), 100)}", args)
    if source.table:
        merge_repeated(source)
        tell_unlisted(source)
    if not source.rows:
        fail(f"{root}: no images in it; found {some(sorted(os.listdir(root)), 12) if root.is_dir() else 'nothing'}")
    odd = [row.name for row in source.rows if row.name.encode("utf-8", "replace").decode() != row.name]
    if odd:
        fail(f"{len(odd)} names of files are not UTF-8, such as {ascii(odd[0])}; rename them")
    settle_masks(source, args)
    return source


def tell_unlisted(source):
    """Count the images that lie beside those of a table and are not in it."""
    known = {os.path.abspath(row.item) for row in source.rows}
    beside = set()
    for folder in {os.path.dirname(path) for path in known}:
        beside |= {os.path.join(folder, name) for name in os.listdir(folder) if name[0] != "."}
    unlisted = [path for path in sorted(beside - known) if os.path.splitext(path)[1].lower() in SUFFIXES]
    if unlisted and source.table.name != NAMED:
        say(f"note: {len(unlisted)} images are not listed in {source.table} and not used: {some(unlisted)}")


def settle_masks(source, args):
    """Name the classes of the masks, if there are any: then every image must have one."""
    if all(row.masks is None for row in source.rows):
        if args.mask_classes or args.ignore is not None:
            fail("--mask-classes, --ignore: this source has no masks")
        return
    if args.skip_broken and not any(row.masks for row in source.rows):
        say("note: no image has a mask, so that masks are left out")
        fill(source.rows, masks=[None] * len(source.rows))
        return
    source.mask_classes = source.mask_classes or args.mask_classes or ["background", "lesion"]
    lacking = [row for row in source.rows if not row.masks]
    leave_out(source, "without a mask", lacking, f"{len(lacking)} of {len(source.rows)} images have no mask of their name: "
              f"{some((row.name for row in lacking), 20)}", args)


# ---------------------------------------------------------------- labels ------------------------------------

def settle_labels(source, args):
    """Put the classes in order; labels that are missing, or that may mean the same, are refused by name."""
    if source.rows[0].label is None:
        if args.classes:
            fail("--classes names the labels, and this source has none; masks have --mask-classes")
        return
    if source.multilabel:
        return settle_flags(source, args)
    missing = [row for row in source.rows if row.label.lower() in NO_LABEL]
    leave_out(source, "without a label", missing,
              f"{len(missing)} images have no label (blank, nan or NA): {some((row.name for row in missing), 20)}", args)
    if source.classes:
        unknown = [f"{row.label!r} of {row.name}" for row in source.rows if row.label not in source.classes]
        refuse(unknown, f"{source.table}: {len(unknown)} labels are none of {some(source.classes, 14)}")
        return
    present = sorted({row.label for row in source.rows})
    alike = defaultdict(list)
    for name in present:
        alike[canonical(name)].append(name)
    for names in alike.values():
        if len(names) > 1:
            fail(f"the labels {' and '.join(map(repr, names))} may be one class: they differ by case, blanks or as numbers "
                 "are written; make them equal")
    whole = all(re.fullmatch(r"-?\d+(\.0+)?", name) for name in present)
    source.classes = sorted(present, key=float) if whole else present  # 10 comes after 2
    source.ordinal = args.ordinal or whole and args.layout != "medmnist"  # whose numbers are names
    if args.classes:
        name_classes(source, args.classes)
    if len(source.classes) < 2:
        say(f"WARNING: there is one class, {source.classes[0]!r}: images for DINO, not for finetune.py or knn_eval.py")


def canonical(name):
    """What two spellings of one class have in common: letters without case and blanks, numbers by value."""
    try:
        return f"{float(name):g}"
    except ValueError:
        return re.sub(r"\s+", "", name).casefold()


def name_classes(source, classes):
    """Take --classes: the labels in their order or, of the labels 0, 1, ..., their names."""
    if sorted(classes) != sorted(source.classes):
        if not set(map(canonical, source.classes)) <= set(map(str, range(len(classes)))):
            fail(f"--classes {','.join(classes)}: the labels are {some(source.classes, 30)}; name each of them once")
        fill(source.rows, label=[classes[int(float(row.label))] for row in source.rows])
    source.classes = classes


def settle_flags(source, args):
    """Several 0/1 columns: labels, or classes where every row has exactly one 1."""
    if args.classes:
        if sorted(args.classes) != sorted(source.classes):
            fail(f"--classes {','.join(args.classes)}: the columns are {some(source.classes, 30)}")
        order = [source.classes.index(name) for name in args.classes]
        fill(source.rows, label=[row.label[order] for row in source.rows])
        source.classes = args.classes
    refuse(sorted({*source.classes} & {*common.FIXED}), "a class cannot be called as a column of labels.csv is")
    if all(row.label.sum() == 1 for row in source.rows):
        say("note: every image has exactly one of the labels: they are taken as classes, not as a multilabel task")
        fill(source.rows, label=[source.classes[row.label.argmax()] for row in source.rows])
        source.multilabel = False


def settle_groups(source):
    """Give each image whose group is blank a group of its own."""
    blank = [row for row in source.rows if row.group is not None and row.group.lower() in NO_LABEL]
    if blank:
        say(f"note: {len(blank)} images have no group; each counts as one of its own")
        fill(blank, group=[row.name for row in blank])


def label_text(source, row):
    """The label of an image as text; of several, their names joined by commas."""
    if source.multilabel:
        return ", ".join(name for name, flag in zip(source.classes, row.label) if flag)
    return row.label or ""


# ---------------------------------------------------------------- splits ------------------------------------

def share_out(flags, units, shares, rng, least):
    """Split images into parts of the given shares: [0, 1, ...] an image. Iterative stratification (Sechidis et al. 2011,
    algorithm 1): the label with the fewest images left goes first, each of its units to the part that lacks it most;
    what rounding gave a part too much counts against it at the next label. flags (N, L) bool; units: lists of images
    that stay together; least: a label with so many images stands in every part, one with fewer in the first alone (math.inf:
    no such rule)."""
    flags = np.concatenate([flags, ~flags.any(1, keepdims=True)], 1)  # no label at all is a label too
    counts = np.array([flags[unit].sum(0) for unit in units])
    totals = flags.sum(0)
    parts = [p for p, share in enumerate(shares) if share > 0]
    one_label = least < math.inf and (flags.sum(1) == 1).all()
    room = apportion(len(flags), shares)
    if one_label:  # a class of three has one image in each part, even if that makes small parts larger
        common_labels = int((totals >= least).sum())
        for p in parts[1:]:
            room[p] = max(room[p], common_labels)
        room[parts[0]] = len(flags) - sum(room[p] for p in parts[1:])
    lacking = np.outer(totals, shares)  # (L, parts) images of each label that each part still lacks
    held = np.zeros(lacking.shape)
    left = counts.copy()
    placed, given = 0, np.zeros(len(shares))
    result = np.full(len(flags), parts[0])
    while left.any():
        remaining = left.sum(0)
        label = int(np.where(remaining > 0, remaining, len(flags) + 1).argmin())
        mine = rng.permutation(np.flatnonzero(left[:, label])).tolist()
        mine.sort(key=lambda u: -len(units[u]))
        want = lacking[label] + np.clip(np.array(shares) * placed - given, -0.5, 0.5)
        for p in parts[1:]:
            if totals[label] >= least and not held[label, p]:
                want[parts[0]] -= max(0, 1 - want[p])
                want[p] = max(want[p], 1)
        too_few = one_label and totals[label] < least
        for u in mine:
            size = len(units[u])
            fits = [p for p in parts if room[p] >= size / 2] or parts
            if too_few:
                fits = parts[:1]
            part = max(fits, key=lambda p: (round(want[p], 9), room[p]))
            result[units[u]] = part
            want[part] -= counts[u, label]
            lacking[:, part] -= counts[u]
            held[:, part] += counts[u]
            room[part] -= size
            given[part] += size
            placed += size
            left[u] = 0
    return result


def apportion(count, shares):
    """Whole numbers that sum to count, in proportion to shares; no part is empty where that can be avoided."""
    exact = np.array(shares) * count
    whole = np.floor(exact + 1e-9).astype(int)
    for p in np.argsort(whole - exact, kind="stable")[:count - whole.sum()]:
        whole[p] += 1
    for p, share in enumerate(shares):
        if share > 0 and not whole[p] and whole.max() > 1:
            whole[whole.argmax()] -= 1
            whole[p] += 1
    return whole.tolist()


def carve(source, args):
    """The split of each row, with what is missing carved from train: all of it by --split, or val or test alone."""
    splits = [row.split for row in source.rows]
    given = [name for name in splits if name is not None]
    pool = [i for i, name in enumerate(splits) if name in (None, "train")]
    shares = [0 if name in given else share for name, share in zip(SPLITS, args.split)]
    if given:
        shares[0] = 1 - sum(shares[1:])
    if given and shares[0] == 1 or not pool:
        return splits
    flags = label_flags(source, [source.rows[i] for i in pool])
    members = defaultdict(list)
    for k, i in enumerate(pool):
        members[k if source.rows[i].group is None else source.rows[i].group].append(k)
    units = list(members.values())
    parts = share_out(flags, units, shares, np.random.default_rng(args.split_seed), 7 if source.multilabel else 3)
    mend_empty(parts, units, flags, shares)
    for i, part in zip(pool, parts):
        splits[i] = SPLITS[part]
    for name, share in zip(SPLITS, shares):
        if share > 0 and name not in splits:
            of_groups = f" of {len(units)} groups" if len(units) < len(pool) else ""
            fail(f"{len(pool)} images{of_groups} are too few to carve a {name} split from; give one, or another --split")
    if source.classes and not source.multilabel:
        rare = [name for name, count in Counter(row.label for row in source.rows).items() if count < 3]
        if rare:
            say(f"WARNING: {len(rare)} classes have fewer than 3 images, which stay in train: {some(rare)}")
    return splits


def label_flags(source, rows):
    """(N, L) bool: which labels some rows have; one column of True without labels."""
    if source.multilabel:
        return np.array([row.label for row in rows]) > 0
    if source.classes:
        return np.array([[row.label == name for name in source.classes] for row in rows])
    return np.ones((len(rows), 1), bool)


def deal_folds(source, digests, args):
    """Set the fold, 0 to --folds - 1, of each row that a stage sees: labels in proportion, within val and outside of it, as
    --fold validates on val's rows of the other folds. A group, and images that are equal pixel for pixel, stay together."""
    rows = [(row, digest) for row, digest in zip(source.rows, digests) if row.split]
    if not any(row.split == "val" for row, _ in rows):
        fail("--folds: --fold validates on images of val, and there are none; give val a share, as in --split 0.85 0.15 0")
    leader = {}  # of each group or digest, one that stands for all that belong together

    def leader_of(name):
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name
    for row, digest in rows:
        leader[leader_of(digest)] = leader_of(digest if row.group is None else f"group {row.group}")
    units = defaultdict(list)
    for i, (_, digest) in enumerate(rows):
        units[leader_of(digest)].append(i)
    labels = label_flags(source, [row for row, _ in rows])
    val = np.array([[row.split == "val"] for row, _ in rows])
    flags = np.concatenate([labels, labels & val], 1)
    shares = [1 / args.folds] * args.folds
    folds = share_out(flags, list(units.values()), shares, np.random.default_rng([args.split_seed, 1]), math.inf)
    fill([row for row, _ in rows], fold=folds.tolist())
    sizes = np.bincount(folds, minlength=args.folds)
    if not sizes.all():
        fail(f"--folds {args.folds}: {len(units)} images or groups are too few")
    say(f"folds: {', '.join(map(str, sizes))} images in {args.folds} folds (--fold K of the stages tests on one)")
    trains = labels & ~val
    for fold in range(args.folds) if source.classes and not source.multilabel else []:
        unseen = [name for name, there in zip(source.classes, trains[folds != fold].any(0)) if not there]
        if unseen:
            fail(f"--folds {args.folds}: outside of fold {fold} no image is left to train {some(unseen)} on; take fewer "
                 "folds, or leave the class out")


def mend_empty(parts, units, flags, shares):
    """Move the smallest unit that may go (its labels stay in the part it leaves) into a part that is empty."""
    for p in range(3):
        if shares[p] > 0 and not (parts == p).any():
            for unit in sorted(units, key=len):
                home = parts == parts[unit[0]]
                rest = home.copy()
                rest[unit] = False
                if rest.any() and (flags[rest].any(0) | ~flags[unit].any(0)).all():
                    parts[unit] = p
                    break


def check_groups(source, mode):
    """Patients that stand in two splits: mode "warn" says so, "drop" takes them out of train (of val, where test has
    them), "error" stops. Returns how many."""
    owners = defaultdict(set)
    for row in source.rows:
        if row.group is not None and row.split:
            owners[row.group].add(row.split)
    torn = sorted(group for group, splits in owners.items() if len(splits) > 1)
    if not torn:
        return 0
    names = some(f"{group} ({', '.join(sorted(owners[group]))})" for group in torn)
    message = f"{len(torn)} groups (patients) stand in more than one split: {names}"
    if mode == "error":
        fail(f"{message}; --leakage drop takes them out of train, --leakage warn lets them be")
    say(f"WARNING: {message}; {'scores will flatter' if mode == 'warn' else 'taken out of train, or val'}")
    if mode == "drop":
        later = {"train": {"val", "test"}, "val": {"test"}}
        gone = [row for row in source.rows if owners[row.group] & later.get(row.split, set())]
        say_left_out(source, "patient in a later split", [row.name for row in gone])
        fill(gone, split=[""] * len(gone))
    return len(torn)


def check_duplicates(source, digests, mode):
    """Identical images in two splits: ({"test_in_train": n, ...}, rows of duplicates.csv, those with other labels
    first). mode "warn" says so, "error" stops, "drop" takes them out of train (out of val, where test has them)."""
    twins = defaultdict(lambda: defaultdict(list))
    for row, digest in zip(source.rows, digests):
        twins[digest][row.split].append(row)
    leakage, lines, gone = {}, [], {}
    for inner, outer in (("test", "train"), ("val", "train"), ("test", "val")):
        shared = [splits for splits in twins.values() if splits[inner] and splits[outer]]
        count = leakage[f"{inner}_in_{outer}"] = sum(len(splits[inner]) for splits in shared)
        for splits in shared:
            gone.update((row.name, row) for row in splits[outer])
            for row in splits[inner]:
                label = label_text(source, row)
                others = sorted(splits[outer], key=lambda other: label_text(source, other) == label)
                for other in others[:10]:  # of a picture that is there a thousand times, ten pairs tell enough
                    lines.append([row.name, row.split, label, other.name, other.split, label_text(source, other)])
        if count:
            total = sum(row.split == inner for row in source.rows)
            end = {"warn": "; scores will flatter", "drop": f"; taken out of {outer}", "error": ""}[mode]
            say(f"WARNING: leakage: {count} of {total} {inner} images also stand in {outer}, pixel for pixel{end}")
    lines.sort(key=lambda line: line[2] == line[5])
    different = [f"{line[0]} ({line[2]}) and {line[3]} ({line[5]})" for line in lines if line[2] != line[5]]
    if different:
        say(f"WARNING: {len(different)} of these pairs have different labels, such as {some(different, 3)}")
    if lines and mode == "error":
        fail(f"{len(lines)} pairs of identical images stand in two splits, such as {lines[0][0]} and {lines[0][3]}; "
             "--leakage drop takes them out of train")
    if mode == "drop":
        say_left_out(source, "identical to an image of another split", sorted(gone))
        fill(gone.values(), split=[""] * len(gone))
        for split in SPLITS:
            if any(split in line for line in lines) and all(row.split != split for row in source.rows):
                fail(f"nothing is left of {split} once the images of other splits are dropped")
    return leakage, lines


def check_classes(source):
    """Refuse classes without a training image, where there is training."""
    if source.multilabel:
        return
    trained = {row.label for row in source.rows if row.split == "train"}
    unseen = [name for name in source.classes or [] if name not in trained]
    if trained and unseen:
        fail(f"class {some(map(repr, unseen))} is not in train, which has {some(sorted(trained))}: no training image has that "
             "label; give it some, or leave the class out")


# ---------------------------------------------------------------- masks -------------------------------------

def read_mask(item, classes, ignore):
    """(mask (H, W) uint8 of class indices, a note) of [(class or None, file), ...]. Two classes go by brightness; more,
    or an `ignore` value, are the indices in the file. Several files of one image are united; those with a class are
    laid on each other, later ones on top."""
    mask, note = None, ""
    for value, file in item:
        by_index = value is None and (classes > 2 or ignore is not None)
        part, remark = read_indices(file, classes, ignore) if by_index else read_bright(file)
        note = remark or note
        if mask is None:
            mask = np.zeros_like(part)
        if mask.shape != part.shape:
            raise ValueError(f"masks of different sizes: {some(file for _, file in item)}")
        mask = np.maximum(mask, part) if value is None else np.where(part > 0, np.uint8(value), mask)
    return mask, note


def read_bright(file):
    """A mask of two classes, 0 and 1, whatever the mode of its file: what is brighter than half its brightest; by alpha
    where the colour says nothing. Returns (mask (H, W) uint8, note)."""
    with Image.open(file) as image:
        noisy = image.format == "JPEG"
        pages = getattr(image, "n_frames", 1)
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            values = np.asarray(image, dtype=np.float64)
        else:
            colour = np.asarray(image.convert("RGBA"))
            by_alpha = (colour[..., 3] != colour[0, 0, 3]).any() and (colour[..., :3] == colour[:1, :1, :3]).all()
            values = colour[..., 3] if by_alpha else np.asarray(on_black(image).convert("RGB").convert("L"))
    top = values.max()
    levels = 2 if noisy else len(np.unique(values))
    if levels > 2 and top < 32:
        raise ValueError(f"values {some(np.unique(values))} in the mask {file}: more than two classes; name them all with "
                         "--mask-classes")
    mask = values > (127 if noisy else top / 2)
    notes = ["mask of more than two values, cut at half its brightness"] * (levels > 2)
    notes += [f"mask of {pages} pages, the first is used"] * (pages > 1)
    return mask.astype(np.uint8), "; ".join(notes)


def read_indices(file, classes, ignore):
    """A mask of class indices (of a palette picture, the palette's), as (mask (H, W) uint8, "")."""
    with Image.open(file) as image:
        if image.format == "JPEG":
            raise ValueError(f"{file}: JPEG changes the numbers of a mask of several classes; save it as PNG")
        values = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
        grey = image.mode == "LA"
    if values.ndim == 3:
        if not grey and (values[..., :3] != values[..., :1]).any():
            raise ValueError(f"{file}: a colour picture; a mask of several classes holds one number a pixel")
        values = values[..., 0]
    wrong = np.unique(values[((values < 0) | (values >= classes)) & (values != (-1 if ignore is None else ignore))])
    if len(wrong):
        raise ValueError(f"value {some(wrong)} in the mask {file}, none of the classes 0 to {classes - 1}; name them all with "
                         "--mask-classes, or leave one out with --ignore")
    return values.astype(np.uint8), ""


def reduce_mask(mask, side, fit, classes, ignore):
    """(H, W) class indices -> (side, side): of each pixel the class with the largest share. Foreground too thin for that
    (no pixel of it is ever full) is kept wherever it goes, so that a vessel stays one piece."""
    top, left, height, width = common.fit_box(*mask.shape, fit)
    picture = Image.fromarray(mask).crop((left, top, left + width, top + height))
    if height <= side and width <= side:
        return np.asarray(picture.resize((side, side), Image.Resampling.NEAREST))
    values = [*range(1, classes), 0] + ([ignore] if ignore is not None else [])  # in a tie the foreground wins
    whole = np.asarray(picture)
    shares = {}
    for value in values:
        if value == 0 or (whole == value).any():
            plane = Image.fromarray((whole == value).astype(np.float32))
            shares[value] = np.asarray(plane.resize((side, side), Image.Resampling.BOX))
    small = np.array([*shares], np.uint8)[np.stack([*shares.values()]).argmax(0)]
    for value in set(shares) - {0, ignore}:
        some_of_it = shares[value] > 1e-4
        thick = widen_by_one(shares[value] > 1 - 1e-4)
        thin = some_of_it & ~thick
        small[(thin | some_of_it & widen_by_one(thin)) & (small == 0)] = value
    return small


def widen_by_one(mask):
    """(H, W) bool, with the pixels around it."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(3))) > 0


# ---------------------------------------------------------------- decoding and writing ----------------------

def to_square(pixels, side, fit):
    """(H, W, C) uint8 -> (side, side, C), as fit_box says; bilinear with antialiasing, as Pillow's to within one level, but
    3 to 8 times faster."""
    image = torch.tensor(pixels).permute(2, 0, 1)
    square = resized_crop(image, *common.fit_box(*pixels.shape[:2], fit), [side, side], antialias=True)  # black outside
    return square.permute(1, 2, 0).numpy()


def decode(row, side, fit, classes, ignore):
    """A row with its masks: a dict of "pixels" (side, side, C), "size" (height, width), "note", "digest" of the pixels,
    "masks" {name: (side, side)}."""
    drawn, note = None, ""
    if isinstance(row.item, str):
        pixels, size, note = read_image(row.item, side)
    elif isinstance(row.item, int):
        pixels, drawn = draw_lesion(row.item)
        drawn = drawn.astype(np.uint8)
        size = drawn.shape
    else:
        path, key, number = row.item
        pixels = open_array(path, key)[number]
        size = pixels.shape[:2]
        pixels = pixels.reshape(*size, -1)
    masks = {}
    for name, files in {"masks": row.masks, **row.experts}.items():
        if not files:
            continue
        mask, remark = read_mask(files, classes, ignore) if drawn is None else (drawn, "")
        if mask.shape != tuple(size):
            raise ValueError(f"its mask is {mask.shape[1]}x{mask.shape[0]} pixels, it is {size[1]}x{size[0]}")
        note = "; ".join(filter(None, (note, remark)))
        masks[name] = reduce_mask(mask, side, fit, classes, ignore)
    square = to_square(pixels, side, fit)
    digest = hashlib.blake2b(square.tobytes() + repr(tuple(size)).encode(), digest_size=8).hexdigest()
    return {"pixels": square, "size": tuple(map(int, size)), "note": note, "digest": digest, "masks": masks}


def decode_batch(rows, **how):
    """What decode makes of some rows, or {"error": why}."""
    decoded = []
    for row in rows:
        try:
            decoded.append(decode(row, **how))
        # Pillow's plugins raise nearly anything on a damaged file; all are named later
        except Exception as error:
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            decoded.append({"error": f"{kind}{error}"})
    return decoded


def end_with_parent(worker):
    """Let a worker end when its parent is killed: it holds its own pipe open, and would wait for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def write_head(file, *shape):
    """Write the head of an .npy file of uint8 at its start; it is of one length, whatever the number of images."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def write_arrays(folder, source, side, args):
    """Decode everything into images.npy and masks*.npy of a folder, one image at a time. Returns facts {"size", "digest",
    "note"} of each row; those that are broken leave the source, or are refused by name."""
    names = ["images"] + ["masks"] * bool(source.mask_classes)
    names += sorted({f"masks-{expert}" for row in source.rows for expert in row.experts})
    needed = len(source.rows) * side * side * (2 + len(names))  # images may have 3 channels
    room = shutil.disk_usage(folder).free
    if needed > room:
        fail(f"--output {args.output}: {len(source.rows)} images of {side} x {side} take up to {needed / 1e9:.1f} GB and "
             f"{room / 1e9:.1f} GB are free; lower --side, or give a folder on another disk")
    files = {name: open(folder / f"{name}.npy", "wb") for name in names}
    channels = 1
    for name, file in files.items():
        write_head(file, 1, side, side, *[channels] * (name == "images"))
    blank = np.zeros((side, side), np.uint8)
    facts, broken, count = [], [], Counter()
    classes = len(source.mask_classes or [])
    decoder = functools.partial(decode_batch, side=side, fit=args.fit, classes=classes, ignore=args.ignore)
    loader = torch.utils.data.DataLoader(source.rows, batch_size=8, num_workers=args.workers, collate_fn=decoder,
                                         worker_init_fn=end_with_parent, prefetch_factor=4 if args.workers else None)
    decoded = (fact for batch in loader for fact in batch)
    for row, fact in zip(source.rows, tqdm(decoded, "preparing", len(source.rows), unit="image")):
        if "error" in fact:
            broken.append((row, fact["error"]))
            continue
        pixels, masks = fact.pop("pixels"), fact.pop("masks")
        if pixels.shape[2] > channels:  # the first colour: what is written so far was grey
            files["images"] = widen(files["images"], len(facts), side)
            channels = 3
        files["images"].write(np.broadcast_to(pixels, (side, side, channels)).tobytes())
        for name in names[1:]:
            files[name].write(masks.get(name.removeprefix("masks-"), blank).tobytes())
        count["empty"] += "masks" in masks and not masks["masks"].any()
        count["full"] += "masks" in masks and bool(masks["masks"].all())
        facts.append(fact)
    for name, file in files.items():
        write_head(file, len(facts), side, side, *[channels] * (name == "images"))
        file.close()
    reasons = "; ".join(f"{row.name} ({why})" for row, why in broken)
    leave_out(source, "broken", [row for row, _ in broken],
              f"{len(broken)} of {len(source.rows)} images cannot be used: {reasons}", args)
    for what in ("empty", "full"):
        if count[what] == len(facts):
            say(f"WARNING: all {count[what]} of {len(facts)} masks are {what}; is the foreground what is bright in them?")
        elif count[what]:
            say(f"note: {count[what]} of {len(facts)} masks are {what}")
    return facts


def widen(file, count, side):
    """Rewrite an open images.npy of `count` grey images with three equal channels. Returns it, open at its end."""
    file.close()
    path = Path(file.name)
    grey = path.rename(path.with_suffix(".grey"))
    wide = open(path, "wb")
    write_head(wide, 1, side, side, 3)
    with open(grey, "rb") as pixels:
        pixels.seek(wide.tell())  # behind the head, as long as this one
        for _ in range(count):
            wide.write(np.frombuffer(pixels.read(side * side), np.uint8).repeat(3).tobytes())
    grey.unlink()
    return wide


def look_at_heads(rows):
    """({(width, height): images}, {bits a channel: images}) of up to 1,000 images, from the heads of their files."""
    sizes, bits = Counter(), Counter()
    for i in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 1000)).astype(int)):
        item = rows[i].item
        depth = 8
        try:
            if isinstance(item, int):
                width, height = 128, 128
            elif isinstance(item, tuple):
                height, width = open_array(*item[:2]).shape[1:3]
            elif is_dicom(item):
                head = import_pydicom().dcmread(item, stop_before_pixels=True)
                width, height, depth = int(head.Columns), int(head.Rows), int(head.BitsStored)
            else:
                with Image.open(item) as image:
                    (width, height), depth = image.size, bits_of(image)
        except Exception:  # a damaged file: decoding says so
            continue
        sizes[width, height] += 1
        bits[depth] += 1
    return sizes, bits


# ---------------------------------------------------------------- the prepared folder -----------------------

def write_labels(folder, source, facts):
    """labels.csv: a row an image."""
    rows = source.rows
    columns = {"image": [row.name for row in rows], "split": [row.split for row in rows]}
    for name in ("fold", "group"):
        values = [getattr(row, name) for row in rows]
        if any(value is not None for value in values):
            columns[name] = values
    columns["height"], columns["width"] = zip(*(fact["size"] for fact in facts))
    labels = [row.label for row in rows]
    if source.multilabel:
        columns |= zip(source.classes, np.array(labels).T.tolist())
    elif source.classes:
        columns["label"] = labels
    common.write_table(folder / "labels.csv", columns, zip(*columns.values()))


def write_meta(folder, source, args, side, **own):
    """dataset.json."""
    images = np.load(folder / "images.npy", mmap_mode="r")
    if source.mean is None:
        train = np.flatnonzero([row.split == "train" for row in source.rows])
        source.mean, source.std = common.measure(images, train if len(train) else np.arange(len(images)))
    common.write_json(folder / "dataset.json", {
        "version": VERSION, "name": Path(args.output).resolve().name, "side": side, "fit": args.fit,
        "channels": images.shape[3], "classes": source.classes or [], "ordinal": source.ordinal,
        "mask_classes": source.mask_classes or [], "ignore": args.ignore, "metric": source.metric,
        "masks": common.digest_of(folder / "masks.npy") if source.mask_classes else None, "mean": source.mean,
        "std": source.std, "layout": args.layout, "source": args.source, "command": args.command,
        "arguments": compared(args), "left_out": source.left_out, **own})


def flags_by_class(dataset):
    """(N, L) bool: which classes or labels the images of a Dataset have."""
    if dataset.task == "classes":
        return dataset.labels[:, None] == np.arange(len(dataset.classes))
    return dataset.labels > 0


def contact_sheet(folder, count=6):
    """Draw training images, `count` of each class a row, or 3 rows without classes, with the outlines of their masks."""
    dataset = common.open_dataset(folder)
    rows = next((rows for rows in dataset.rows.values() if len(rows)), np.arange(len(dataset.paths)))
    members = [("", rows[start:start + count]) for start in (0, count, 2 * count)]
    if dataset.classes:
        flags = flags_by_class(dataset)[rows]
        members = [(name, rows[flags[:, k]]) for k, name in enumerate(dataset.classes[:30])]
    names, pictures, outlines = [], [], []
    for name, rows in members:
        if not len(rows):
            continue
        names.append(name)
        pictures.append([])
        outlines.append([])
        for row in rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]:
            shape = dataset.sizes[row], dataset.fit, 256
            pictures[-1].append(common.in_proportion(dataset.images[row], *shape))
            outlines[-1].append([])
            if dataset.masks is not None:
                mask = common.in_proportion(dataset.masks[row], *shape, Image.Resampling.NEAREST)
                outlines[-1][-1] = [(mask == value, common.COLOURS[value % 7]) for value in np.unique(mask[mask > 0])]
    common.draw_grid(folder / "contact_sheet.png", pictures, row_labels=names, title=dataset.name, outlines=outlines)


def summarise(folder, sizes, bits, facts):
    """Print what was understood: images per split and class, sizes, channels, bit depth, groups."""
    dataset = common.open_dataset(folder)
    table = [["images", *dataset.counts.values()]]
    if dataset.classes:
        flags = flags_by_class(dataset)
        counts = [flags[rows].sum(0).tolist() for rows in dataset.rows.values()]
        table += [[f"  {name}", *row] for name, *row in zip(dataset.classes, *counts)]
    if dataset.groups:
        table.append(["groups", *(len(set(dataset.groups_of(rows))) for rows in dataset.rows.values())])
    if dataset.masks is not None:
        table.append(["masks", *dataset.counts.values()])
    common.print_table(["", *dataset.rows], table)
    if sizes:
        (width, height), count = sizes.most_common(1)[0]
        say(f"sizes: most often {width}x{height} ({count} of {sizes.total()} looked at), short side from "
            f"{min(map(min, sizes))}, long side to {max(map(max, sizes))}")
    say("bits a channel: " + ", ".join(f"{value} ({n} images)" for value, n in sorted(bits.items())))
    channels = dataset.images.shape[3]
    say(f"arrays: {len(dataset.paths)} images of {dataset.side} x {dataset.side}, {channels} channel{'s' * (channels > 1)}, "
        f"fit {dataset.fit}")
    repeats = len(facts) - len({fact["digest"] for fact in facts})
    leaks = [f"; {n} {name.replace('_', ' ')}" for name, n in dataset.leakage.items() if n]
    say(f"duplicates: {repeats} images equal another one" + "".join(leaks))
    say(f"mean {dataset.mean}, standard deviation {dataset.std}")
    if dataset.task or dataset.masks is not None:
        say(f"headline metric: {dataset.metric}, {dataset.metric_reason}")


def choose_side(sizes, args):
    """--side, or the median short side of the images where that is smaller."""
    short = sorted(min(size) for size in sizes.elements())
    if args.enlarge or not short or short[len(short) // 2] >= args.side:
        return args.side
    side = short[len(short) // 2]
    say(f"side {side}: the images are no larger (half of them have a short side of {side} or less)")
    return side


def build(folder, args, root):
    """Prepare everything into a folder: (sizes, bits, facts of each row) for the summary."""
    source = read_source(args.layout, root, args)
    settle_labels(source, args)
    settle_groups(source)
    splits = carve(source, args)  # what cannot be split is said before hours of decoding
    check_classes(source)
    sizes, bits = look_at_heads(source.rows)
    side = choose_side(sizes, args)
    facts = write_arrays(folder, source, side, args)
    shutil.rmtree(folder / "unpacked", ignore_errors=True)
    small = sum(min(fact["size"]) < side for fact in facts)
    if small:
        say(f"note: {small} of {len(facts)} images have a side below {side} pixels and are enlarged")
    notes = [f"{row.name}: {fact['note']}" for row, fact in zip(source.rows, facts) if fact["note"]]
    if notes:
        say(f"note: {len(notes)} images were not taken as they are: {some(notes)}")

    fill(source.rows, split=splits if len(splits) == len(source.rows) else carve(source, args))
    torn = check_groups(source, args.leakage or ("error" if args.layout == "csv" else "warn"))
    leakage, pairs = check_duplicates(source, [fact["digest"] for fact in facts], args.leakage or "warn")
    check_classes(source)
    if args.folds:
        deal_folds(source, [fact["digest"] for fact in facts], args)
    if pairs:
        head = ["image", "split", "label", "other_image", "other_split", "other_label"]
        common.write_table(folder / "duplicates.csv", head, pairs)
        say(f"the {len(pairs)} pairs of identical images are in {args.output}/duplicates.csv")
    write_labels(folder, source, facts)
    write_meta(folder, source, args, side, leakage=leakage, groups_in_two_splits=torn, notes=notes)
    contact_sheet(folder)
    return sizes, bits, facts


def compared(args):
    """The arguments that decide what is in the folder."""
    return {name: value for name, value in vars(args).items() if name not in ("output", "overwrite", "workers", "command")}


def check_output(folder, args):
    """Refuse an --output whose replacement would take SOURCE with it, or whose pictures would be taken for images."""
    place, source = folder.resolve(), Path(args.source)
    if folder.name in ("", ".."):
        fail(f"--output {folder}: expected a folder of its own, such as data/NAME")
    if args.layout != "demo" and (place == source or place in source.parents):
        fail(f"--output {folder} is SOURCE, or the folder around it; give another, such as data/NAME")
    hidden = any(part.startswith(".") for part in place.parts[len(source.parts):])
    if args.layout in ("folder", "flat") and source in place.parents and not hidden:
        fail(f"--output {folder} lies in SOURCE, where its pictures would be taken for images; give a folder beside it")


def already_there(folder, args):
    """Whether the folder holds what this command makes; another one's is an error unless --overwrite."""
    if not folder.exists() or args.overwrite and (folder / "dataset.json").is_file():
        return False
    try:
        there = json.loads((folder / "dataset.json").read_text())["arguments"]
    except (OSError, ValueError, KeyError):
        fail(f"--output {folder} is there already and no folder that prepare.py made, which --overwrite does not replace either; "
             "give another")
    here = compared(args)
    differ = [f"{name} {there.get(name)!r} there, {here[name]!r} here" for name in here if there.get(name) != here[name]]
    if differ:
        fail(f"--output {folder} was prepared otherwise: {some(differ)}; give another, or --overwrite")
    say(f"{folder} is prepared already (--overwrite does it again)")
    return True


def main(argv=None):
    """Build into NAME.partial, rename it when it is whole. argv: the command line, where a stage calls."""
    args = arguments(argv)
    args.command = shlex.join(["prepare.py", *(argv or sys.argv[1:])])
    folder = Path(args.output)
    args.layout, root = recognise(args.source, args)
    args.source = "demo" if args.layout == "demo" else str(Path(args.source).resolve())
    check_output(folder, args)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):  # a second one waits, then finds it built
            if already_there(folder, args):
                return
            say(f"{args.source} is understood as: {args.layout}")
            partial = Path(f"{folder}.partial")
            old = folder.with_name(f".{folder.name}.old")
            for rest in (partial, old):  # of an interrupted build
                shutil.rmtree(rest, ignore_errors=True)
            partial.mkdir()
            try:
                sizes, bits, facts = build(partial, args, root)
                if folder.exists():
                    folder.rename(old)
                partial.rename(folder)
            except OSError:
                if old.exists() and not folder.exists():
                    old.rename(folder)
                raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        fail(f"--output {folder} cannot be written ({error})")
    summarise(folder, sizes, bits, facts)
    if not folder.parent.name.startswith("."):  # of --predict, to be removed again
        say(f"written: {folder} (look at contact_sheet.png)")


# ---------------------------------------------------------------- new images --------------------------------

@contextmanager
def new_images(source, output, meta, skip_broken=False):
    """The image files of --predict as a Dataset, prepared as the data of a model whose model.pt says `meta`: of a
    folder, of the column "image" of a CSV, or of a list. All are its test split. They lie beside `output` and go again."""
    output = Path(output).resolve()
    folder = output.with_name(f".{output.name}.images")
    if not isinstance(source, list) and not Path(source).exists():
        fail(f"--predict {source}: neither a folder nor a CSV file")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    if isinstance(source, list):
        refuse([file for file in source if not Path(file).is_file()], "--files: there is no such file")
        rows = [[os.path.abspath(file)] for file in source]
        source = folder / NAMED
        source.parent.mkdir(parents=True, exist_ok=True)
        common.write_table(source, ["image"], rows)
    layout = ["--label-column", "none"] if Path(source).is_file() else ["--layout", "flat"]
    flags = ["--side", meta["side"], "--enlarge", "--fit", meta["fit"], "--split", 0, 0, 1, *layout]
    try:
        common.run_prepare(folder / "data", source, *flags, *["--skip-broken"] * skip_broken)
        dataset = common.open_dataset(folder / "data")
        dataset.mean, dataset.std = meta["mean"], meta["std"]
        yield dataset
    finally:
        if local == 0:
            shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- the demo ----------------------------------

DEMO_CLASSES = ("globular", "homogeneous", "reticular", "streaked")
COARSE_CUES = {  # of each class, in this order, and the standard deviation within a class
    "radius": ((0.25, 0.23, 0.29, 0.27), 0.03),  # share of the image's side
    "dark": ((0.30, 0.28, 0.17, 0.45), 0.08),  # how much darker than the skin
    "blue": ((-0.06, 0.07, 0.00, 0.00), 0.05),  # its tint, against red
    "core": ((0.00, 0.03, -0.10, 0.13), 0.06),  # how much darker the middle is than the rim
    "ragged": ((0.12, 0.06, 0.14, 0.25), 0.06),  # depth of the bays of its border
    "long": ((1.15, 1.05, 1.40, 1.20), 0.12),  # length over width
    "motley": ((0.05, 0.02, 0.06, 0.12), 0.03),  # contrast between its areas of colour
    "clods": ((7.0, 0.5, 1.0, 2.0), 1.5)}  # number of dark clods
OWN_TEXTURE = 0.85  # share of the lesions with the texture, the fine cue, of their class; the others have any


def smooth_noise(rng, size, cells):
    """(size, size) float of zero mean and unit deviation that changes over size / cells pixels."""
    grid = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
    field = np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
    return (field - field.mean()) / field.std()


def lesion_places(rng, radius):
    """[(x, y, radius)], shares of the side, of a lesion and, in a fifth of the images, of a small one beside it."""
    if rng.uniform() < 0.8:
        return [(*rng.uniform(0.38, 0.62, 2), radius)]
    radius = 0.75 * radius
    small = 0.45 * radius
    turn = rng.uniform(0, 2 * np.pi)
    step = np.array([np.cos(turn), np.sin(turn)])
    first = 0.5 - 0.15 * step + rng.normal(0, 0.02, 2)
    second = first + (1.3 * radius + small + rng.uniform(0.02, 0.1)) * step
    return [(*first, radius), (*second, small)]


def lesion_shape(rng, x, y, cues, rayed):
    """How far each place is from the middle of a lesion, as a share of the way to its border, and its rays; both as x, y
    (size, size), which are in units of its radius. A rayed border is frayed."""
    turn = rng.uniform(0, np.pi)
    across = x * np.cos(turn) + y * np.sin(turn)
    along = y * np.cos(turn) - x * np.sin(turn)
    angle = np.arctan2(along, across)
    border = 1.0
    for k in (2, 3, 4, 5):
        border = border + rng.normal(0, 1.4 / k) * cues["ragged"] * np.cos(k * angle + rng.uniform(0, 7))
    border = np.clip(border, 0.5, 1.5)
    rays = np.cos(rng.integers(16, 26) * angle + 1.2 * smooth_noise(rng, len(x), 6))
    if rayed:
        border = border + rng.uniform(0.08, 0.14) * np.clip(rays, 0, 1)
    stretch = np.sqrt(cues["long"])
    return np.hypot(across * stretch, along / stretch) / border, rays


def lesion_texture(rng, kind, x, y, inside, rays):
    """(size, size) float: the fine pattern of a class, in light or dark; x, y (size, size) are shares of the side."""
    size = len(x)
    turn = rng.uniform(0, np.pi)
    pitch = rng.uniform(0.055, 0.08)
    u = (x * np.cos(turn) + y * np.sin(turn) + 0.012 * smooth_noise(rng, size, 7)) / pitch
    v = (y * np.cos(turn) - x * np.sin(turn) + 0.012 * smooth_noise(rng, size, 7)) / pitch
    if kind == "globular":  # round spots on a bent grid
        grain = np.exp(-((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2) / 0.06)
    elif kind == "reticular":  # a net of thin lines
        grain = np.exp(-np.minimum(np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)) ** 2 / 0.02)
    elif kind == "streaked":  # rays that fade towards the middle
        grain = rays * np.clip(inside - 0.25, 0, 1)
    else:
        grain = smooth_noise(rng, size, 5)
    covered = inside < 1
    grain = (grain - grain[covered].mean()) / grain[covered].std()
    return rng.choice([-1, 1]) * grain


def paint_lesion(rng, image, skin, place, cues, texture):
    """(the image (size, size, 3) float with a lesion painted over it, where that is (size, size) bool)."""
    size = len(image)
    y, x = np.mgrid[:size, :size] / size
    center_x, center_y, radius = place
    across = (x - center_x) / radius
    down = (y - center_y) / radius
    inside, rays = lesion_shape(rng, across, down, cues, texture == "streaked")

    tone = rng.uniform(0.06, 0.11) * (lesion_texture(rng, texture, x, y, inside, rays) + 0.7 * smooth_noise(rng, size, 20))
    tone = tone + cues["core"] * (2 * np.clip(inside, 0, 1) - 1)
    for _ in range(rng.poisson(max(cues["clods"], 0))):
        clod_x, clod_y = rng.uniform(-0.7, 0.7, 2)
        distance = np.hypot(across - clod_x, down - clod_y) / rng.uniform(0.14, 0.24)
        tone = tone - 0.18 * np.exp(-distance ** 4)
    motley = cues["motley"] * smooth_noise(rng, size, 4)

    colour = skin * (1 - cues["dark"]) + cues["blue"] * np.array([-1, 0, 1]) + rng.normal(0, 0.015, 3)
    body = colour + tone[..., None] * rng.uniform(0.85, 1.1, 3) + motley[..., None] * np.array([1.1, 0.5, 0.1])
    opaque = 1 / (1 + np.exp((inside - 1) / rng.uniform(0.02, 0.07)))[..., None]
    return image * (1 - opaque) + body * opaque, inside < 1


def draw_hairs(rng, picture):
    """Some dark hairs across a picture, in place."""
    size = picture.width
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.poisson(3)):
        ends = rng.uniform(-0.1, 1.1, (2, 2)) * size
        bend = ends.mean(0) + rng.normal(0, 0.12, 2) * size
        curve = [tuple((1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * bend + t ** 2 * ends[1]) for t in np.linspace(0, 1, 20)]
        pen.line(curve, fill=tuple(int(c) for c in rng.uniform(20, 90, 3)), width=int(rng.integers(1, 3)))


def draw_lesion(index, size=128):
    """Drawn lesion `index` of class index % 4: image (size, size, 3) uint8 and mask (size, size) bool. As in dermoscopy the
    class is in several cues at once, coarse ones and the texture, and none is sure: the classes overlap in each. Skin,
    light, camera, place and hairs are drawn regardless of it."""
    rng = np.random.default_rng([2303, 7034, index])
    kind = index % len(DEMO_CLASSES)
    cues = {name: rng.normal(of_class[kind], spread) for name, (of_class, spread) in COARSE_CUES.items()}
    texture = DEMO_CLASSES[kind] if rng.uniform() < OWN_TEXTURE else rng.choice(DEMO_CLASSES)

    skin = np.array([0.80, 0.62, 0.52]) * rng.uniform(0.65, 1.15) + rng.normal(0, 0.03, 3)
    image = skin + 0.03 * smooth_noise(rng, size, 8)[..., None] + 0.015 * rng.normal(size=(size, size, 3))
    mask = np.zeros((size, size), bool)
    for place in lesion_places(rng, cues["radius"]):
        image, covered = paint_lesion(rng, image, skin, place, cues, texture)
        mask |= covered

    y, x = np.mgrid[:size, :size] / size
    tilt = rng.uniform(0, 2 * np.pi)
    slope = (x - 0.5) * np.cos(tilt) + (y - 0.5) * np.sin(tilt)
    white_balance = rng.normal(1, 0.10, 3)
    image = image * (1 + rng.uniform(0, 0.35) * slope)[..., None] * white_balance
    picture = Image.fromarray((255 * np.clip(image, 0, 1)).astype(np.uint8))
    draw_hairs(rng, picture)
    return np.asarray(picture), mask


if __name__ == "__main__":
    common.launch(main, "the same command begins again")
