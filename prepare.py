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
import hashlib
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path

import filelock
import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageOps
from tqdm import tqdm

import common
from common import SPLITS, fail, files_under, say, some

VERSION = 1
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
               "dev": "val", "test": "test", "testing": "test"}
IMAGE_FOLDERS = ("images", "image", "imgs", "img")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "gt")  # in any case
MASK_ENDING = re.compile(r"(_(mask|segmentation|seg|gt|lesion))?(_\d+)?$", re.IGNORECASE)
NO_LABEL = {"", "nan", "na", "n/a", "#n/a", "<na>"}


def arguments():
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
    layout.add_argument("--label-column", help="one column of classes, or several of 0/1 (default label)")
    layout.add_argument("--split-column", help="column with train, val, test (default: carve --split)")
    layout.add_argument("--group-column", help="column with the patient, who stays in one split")
    layout.add_argument("--mask-column", help="column with the mask's path (default: masks/ beside the images)")
    layout.add_argument("--classes", help="names in their order, comma separated (default: sorted)")
    layout.add_argument("--ordinal", action="store_true", help="--classes are grades: quadratic kappa makes sense")
    layout.add_argument("--mask-classes", help="names of the mask values 0, 1, ... (default background,lesion)")
    layout.add_argument("--ignore", type=int, metavar="VALUE", help="mask value that counts nowhere, such as 255")
    layout.add_argument("--view", default="all", choices=["frontal", "all"], help="chexpert (default all)")
    layout.add_argument("--tissue", action="store_true", help="csaws: all 11 tissues, not the tumour alone")
    images.add_argument("--side", type=int, default=256, help="pixels of a side (default, paper: 256), at most the images'")
    images.add_argument("--fit", default="squash", choices=["squash", "pad", "crop"],
                        help="how an image becomes a square (default, paper: squash; pad: black; crop: its centre)")
    images.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes that decode")
    images.add_argument("--skip-broken", action="store_true",
                        help="leave out what is missing, cannot be decoded or has no label")
    split.add_argument("--split", type=float, nargs=3, default=[0.7, 0.15, 0.15], metavar=("TRAIN", "VAL", "TEST"),
                       help="shares where splits are not given (default 0.7 0.15 0.15; 0 0 1: an external test set)")
    split.add_argument("--split-seed", type=int, default=42, help="(default, paper: 42)")
    split.add_argument("--leakage", choices=["warn", "drop", "error"],
                       help="identical images, or a patient, in two splits: say so (default), take them out of train, stop")
    args = parser.parse_args()
    if args.side < 8 or args.workers < 0:
        fail("expected --side of at least 8 pixels and --workers of at least 0")
    if not (min(args.split) >= 0 and abs(sum(args.split) - 1) <= 1e-6):
        fail(f"--split {' '.join(map(str, args.split))}: three shares that sum to 1, such as 0.7 0.15 0.15")
    for name in ("classes", "mask_classes", "label_column"):
        if getattr(args, name):
            setattr(args, name, [part.strip() for part in getattr(args, name).split(",")])
    if args.ordinal and not args.classes:
        fail("--ordinal needs the grades in their order: --classes \"No DR,Mild,Moderate\"")
    if args.mask_classes and (len(args.mask_classes) < 2 or not all(args.mask_classes)):
        fail("--mask-classes: expected at least two names, the background's first")
    return args


@dataclass
class Index:
    """What a source holds, a list entry an image. items: what Rows reads; names: paths below the root; labels:
    class names (N), or 0/1 (N, L), or None; splits: train, val, test, or "" for no split; groups (N) or None; masks: of
    each image [(class or None, file), ...], or None; annotators: {name: like masks, [] outside test}; stream: an .npz
    to be read in its order."""
    items: list
    names: list
    labels: object = None
    splits: list = None
    groups: list = None
    masks: list = None
    annotators: dict = field(default_factory=dict)
    classes: list = None
    mask_classes: list = None
    ordinal: bool = False
    metric: str = None
    mean: list = None
    std: list = None
    stream: Path = None
    left_out: dict = field(default_factory=dict)  # {why: names}

    def take(self, keep):
        """The images at the positions `keep`."""
        def pick(values):
            return None if values is None else [values[i] for i in keep]
        matrix = isinstance(self.labels, np.ndarray)
        chosen = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen |= {name: pick(chosen[name]) for name in ("items", "names", "splits", "groups", "masks")}
        chosen["labels"] = self.labels[keep] if matrix else pick(self.labels)
        chosen["annotators"] = {name: pick(masks) for name, masks in self.annotators.items()}
        return Index(**chosen)


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
    found = []
    for name in listed:
        name = name if "\\" not in name or os.path.isfile(name) else name.replace("\\", "/")
        places = [os.path.join(folder, name) for folder in folders]
        path = next(filter(os.path.isfile, places), None) if name else None
        if path is None and name:
            stems = by_stem(folders) if stems is None else stems
            files = stems.get(name.removeprefix("./"), [])
            if len(files) > 1:
                fail(f"{name!r} may be {some(files)}; list images with their suffix")
            path = files[0] if files else None
        found.append(path)
    return found


def by_stem(folders):
    """{path below a folder without its suffix: files} of all images under some folders."""
    stems = defaultdict(list)
    for folder in dict.fromkeys(map(str, folders)):
        if os.path.isdir(folder):
            for name in files_under(folder)[0]:
                stems[os.path.splitext(name)[0]].append(os.path.join(folder, name))
    return stems


def listed_images(file, listed, folders, root, args):
    """(paths, names below root) of the images that a table lists: all that are missing are named in one error, or are
    None with --skip-broken. Images that lie beside them and are not listed are counted."""
    paths = locate(listed, folders)
    missing = [name for name, path in zip(listed, paths) if path is None]
    if missing:
        message = f"{len(missing)} of {len(listed)} listed images are not under {some(folders)}: {some(missing, 100)}"
        if not args.skip_broken:
            fail(f"{file}: {message}. --skip-broken leaves them out")
        say(f"left out: {message}")
    known = set(map(os.path.abspath, filter(None, paths)))
    beside = [entry.path for folder in sorted({os.path.dirname(path) for path in known}) for entry in os.scandir(folder)
              if os.path.splitext(entry.name)[1].lower() in common.SUFFIXES and entry.name[0] != "."]
    unlisted = [path for path in beside if path not in known]
    if unlisted:
        say(f"note: {len(unlisted)} images are not listed in {file} and not used: {some(sorted(unlisted))}")
    return paths, [name if path is None else below(path, root) for name, path in zip(listed, paths)]


def below(path, root):
    """A path below the root with forward slashes."""
    return os.path.relpath(path, root).replace(os.sep, "/")


def drop_missing(index):
    """The index without images that are missing (None), for --skip-broken."""
    keep = [i for i, item in enumerate(index.items) if item is not None]
    lost = [name for name, item in zip(index.names, index.items) if item is None]
    if lost:
        index.left_out["missing"] = lost
    return index.take(keep) if lost else index


def known_labels(file, names, values, known):
    """The class of each value that stands beside `names`; known: {text: class}."""
    wrong = [f"{value!r} of {name}" for name, value in zip(names, values) if value not in known]
    if wrong:
        fail(f"{file}: {len(wrong)} labels are none of {some(known, 14)}: {some(wrong, 20)}")
    return [known[value] for value in values]


def flags_of(file, names, columns):
    """0/1 columns {class: [text]} as (N, L) uint8."""
    known = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
    cells = [[known.get(cell.lower(), 9) for cell in column] for column in columns.values()]
    flags = np.array(cells, np.uint8).T
    wrong = [f"{names[i]} {[*columns.values()][k][i]!r}" for i, k in np.argwhere(flags == 9)]
    if wrong:
        fail(f"{file}: columns of several labels hold 0 or 1; {len(wrong)} cells do not: {some(wrong)}")
    return flags


# ---------------------------------------------------------------- layouts: one's own ------------------------

def index_demo(root, args):
    """900 drawn lesions (see draw_lesion) in four classes of texture, 600 / 100 / 200, with their outlines as masks."""
    splits = ["train"] * 600 + ["val"] * 100 + ["test"] * 200
    labels = [DEMO_CLASSES[i % 4] for i in range(900)]
    return Index(list(range(900)), [f"{i:04d}" for i in range(900)], labels, splits, masks=[[(1, str(i))] for i in range(900)])


def index_csv(root, args):
    """A row an image: --image-column, --label-column (several of 0/1: multilabel), optional --split-column,
    --group-column, --mask-column. Paths are below the table's folder, SOURCE, or their images/."""
    file = Path(args.csv) if args.csv else root / "labels.csv"
    table = read_table(file, [args.image_column, *(args.label_column or []),
                              *filter(None, (args.split_column, args.group_column, args.mask_column))])
    folders = [folder / part for folder in dict.fromkeys((file.parent, root)) for part in ("", *IMAGE_FOLDERS)]
    folders = [folder for folder in folders if folder.is_dir()]
    listed = table[args.image_column]
    paths, names = listed_images(file, listed, folders, root, args)
    if "split" in table and not args.split_column:
        say(f"note: the column \"split\" of {file} is not used; --split-column split takes it")
    index = Index(paths, names, masks=csv_masks(file, root, table, names, args))
    columns = args.label_column or (["label"] if "label" in table else [])
    if len(columns) > 1:
        index.classes = columns
        index.labels = flags_of(file, listed, {name: table[name] for name in columns})
    elif columns:
        index.labels = table[columns[0]]
    elif index.masks is None:
        fail(f"{file}: no column 'label'; it has {some(map(repr, table), 30)}: name one with --label-column")
    if args.group_column:
        index.groups = table[args.group_column]
    if args.split_column:
        wrong = [f"{value!r} of {name}" for name, value in zip(listed, table[args.split_column])
                 if value and value.lower() not in SPLIT_NAMES]
        if wrong:
            fail(f"{file}: {len(wrong)} splits are none of train, val, test: {some(wrong)}")
        index.splits = [SPLIT_NAMES.get(value.lower(), "") for value in table[args.split_column]]
        if "" in index.splits:
            say(f"note: {index.splits.count('')} images have a blank split: no stage sees them")
    return merge_repeated(file, drop_missing(index))


def csv_masks(file, root, table, names, args):
    """The masks of a table's images: of --mask-column, or of a folder of masks beside the images, or None."""
    if args.mask_column:
        folders = [file.parent, root, *(root / name for name in MASK_FOLDERS)]
        found = locate(table[args.mask_column], [folder for folder in folders if folder.is_dir()])
        missing = [text or name for text, name, path in zip(table[args.mask_column], names, found) if path is None]
        if missing and not args.skip_broken:
            fail(f"{file}: {len(missing)} masks are not there: {some(missing, 20)}. --skip-broken leaves them out")
        return [[(None, path)] if path else None for path in found]
    return pair_masks(root, names, files_under(root)[0], args)


def merge_repeated(file, index):
    """The index with every image once: rows that say the same of one image are one, others are refused by name."""
    places = defaultdict(list)
    for i, item in enumerate(index.items):
        places[os.path.abspath(item)].append(i)
    repeated = [at for at in places.values() if len(at) > 1]
    if not repeated:
        return index

    def facts(i):
        label = "" if index.labels is None else str(index.labels[i])
        return " ".join([label] + [column[i] for column in (index.splits, index.groups) if column]).strip()
    torn = [f"{index.names[at[0]]} ({' and '.join(sorted({facts(i) for i in at}))})" for at in repeated
            if len({facts(i) for i in at}) > 1]
    if torn:
        fail(f"{file}: {len(torn)} images are listed twice with other labels, splits or groups: {some(torn, 20)}")
    if index.masks:  # a row a lesion: their masks are united
        for at in repeated:
            found = [mask for i in at for mask in index.masks[i] or []]
            index.masks[at[0]] = list(dict.fromkeys(found)) or None
    say(f"note: {len(repeated)} images are listed more than once in {file}, with the same label; each counts once: "
        f"{some(index.names[at[0]] for at in repeated)}")
    return index.take([at[0] for at in places.values()])


def mask_place(name):
    """Where in the path of a file a folder of masks stands, at the root, below train/ or in a class; None where none
    does."""
    folders = name.split("/")[:-1]
    return next((at for at, folder in enumerate(folders) if folder.lower() in MASK_FOLDERS), None)


def pair_masks(root, names, files, args):
    """[(None, file), ...] for each image of names, of the masks among `files`: those with the same path, but for a folder
    images/ or masks/ in it, and by name or with _mask, _segmentation, _seg, _gt, _1 behind it. None where the files hold
    no masks; images without one are named."""
    keys, found, orphans, taken = {}, defaultdict(list), [], set(names)
    for name in names:
        key = os.path.splitext("/".join(part for part in name.split("/") if part.lower() not in IMAGE_FOLDERS))[0]
        if key in keys:
            keys[key] = None  # two suffixes
        keys.setdefault(key, name)
    for file in files:
        at = mask_place(file)
        if at is None or file in taken:
            continue
        parts = file.split("/")
        key = os.path.splitext("/".join(parts[:at] + parts[at + 1:]))[0]
        key = key if key in keys else MASK_ENDING.sub("", key)
        if key not in keys:
            orphans.append(file)
        elif keys[key] is None:
            fail(f"{root}: two images called {key} differ by their suffix alone, so that {file} may be the mask of either")
        else:
            found[keys[key]].append((None, os.path.join(root, file)))
    if orphans:
        say(f"note: {len(orphans)} masks belong to no image and are not used: {some(orphans)}")
    return require_masks(names, [found[name] for name in names], args) if found or orphans else None


def require_masks(names, found, args):
    """found, with None for images without a mask, which are an error unless --skip-broken."""
    lacking = [name for name, masks in zip(names, found) if not masks]
    if lacking and not args.skip_broken:
        fail(f"{len(lacking)} of {len(names)} images have no mask of their name: {some(lacking, 20)}. --skip-broken leaves "
             "them out")
    return [masks or None for masks in found]


def index_files(root, args):
    """Images in folders: one per class, or images/ and masks/, or one folder of unlabelled ones (for DINO), each below
    train/, val/ and test/ or at once (then splits are carved). --layout flat takes no folder for a class."""
    files, others = files_under(root)
    tell_unused(root, others)
    images, beside = masks_beside([name for name in files if mask_place(name) is None])
    has_splits = any(split_of(name) for name in images)
    splits, labels = [], []
    for name in images:
        folders = name.split("/")[:-1]
        splits.append(split_of(name))
        folders = folders[1:] if splits[-1] and folders[0].lower() in SPLIT_NAMES else folders
        labels.append(folders[0] if folders and folders[0].lower() not in IMAGE_FOLDERS and args.layout != "flat" else None)
    if has_splits:
        stray = [name for name, split in zip(images, splits) if not split]
        if stray or "train" not in splits:
            found = sorted({name.split("/")[0] for name in images})
            fail(f"{root}: expected every image below train/, val/ or test/, train at least; found {some(found)}")
    if any(labels):
        homeless = [name for name, label in zip(images, labels) if label is None]
        if homeless:
            fail(f"{root}: {len(homeless)} images stand in no class folder, such as {some(homeless, 3)}; move them into folders of "
                 "their class, or out of here (unlabelled images are for finetune.py --predict, and for DINO by --layout flat)")
        refuse_empty_classes(root, images, others, has_splits)
        known = {label for label, split in zip(labels, splits) if split in ("train", "")}
        strange = sorted(set(labels) - known)
        if strange:
            fail(f"{root}: class {some(map(repr, strange))} is not in train, which has {some(sorted(known))}")
    index = Index([str(root / name) for name in images], images, labels if any(labels) else None,
                  splits if has_splits else None, masks=pair_masks(root, images, files, args))
    if beside and index.masks is None:
        found = [[(None, str(root / mask)) for mask in beside.get(name, [])] for name in images]
        index.masks = require_masks(images, found, args)
    return index


def split_of(name):
    """The split of a path below train/ or images/train/ and their like, "" of another one."""
    folders = name.lower().split("/")[:-1]
    folders = folders[1:] if folders and folders[0] in IMAGE_FOLDERS else folders
    return SPLIT_NAMES.get(folders[0], "") if folders else ""


def masks_beside(images):
    """(images without masks, {image: masks}): files such as a_mask.png and a_mask_1.png beside a.png are its masks."""
    stems = {os.path.splitext(name)[0]: name for name in images}
    masks = defaultdict(list)
    for stem, name in stems.items():
        base = MASK_ENDING.sub("", stem)
        if base in stems and re.search(r"_(mask|segmentation|seg|gt)(_\d+)?$", stem, re.IGNORECASE):
            masks[stems[base]].append(name)
    taken = {name for found in masks.values() for name in found}
    return [name for name in images if name not in taken], masks


def refuse_empty_classes(root, images, others, has_splits):
    """Name a class folder without an image, and what is in it."""
    places = [root / name for name in os.listdir(root) if name.lower() in SPLIT_NAMES] if has_splits else [root]
    for folder in sorted(folder for place in places for folder in place.iterdir()):
        path = below(folder, root) + "/"
        hidden = folder.name[0] == "." or folder.name == "__MACOSX" or mask_place(path) is not None
        if folder.is_dir() and not hidden and not any(name.startswith(path) for name in images):
            inside = [name for name in others if name.startswith(path)]
            fail(f"{folder}: the class has no images; found {some(inside) or 'nothing'}; add some or remove the folder")


def tell_unused(root, others):
    """Count files that are no images."""
    if others:
        say(f"note: {len(others)} files of {root} are no images and are not used: {some(others)}")


def index_npz(file, args):
    """MedMNIST: {train,val,test}_{images,labels}, images (N, S, S) or (N, S, S, 3) uint8, labels (N, 1), or (N, L) 0/1."""
    try:
        with zipfile.ZipFile(file) as archive:
            keys = {name.removesuffix(".npy") for name in archive.namelist()}
        parts = [part for part in SPLITS if f"{part}_images" in keys]
        if not parts or any(f"{part}_labels" not in keys for part in parts):
            fail(f"{file}: expected train_images, train_labels, val_images, ... as in MedMNIST; found {some(sorted(keys), 12)}")
        with np.load(file) as arrays:
            labels = np.concatenate([arrays[f"{part}_labels"].reshape(len(arrays[f"{part}_labels"]), -1) for part in parts])
        shapes = {part: npy_shape(file, f"{part}_images") for part in parts}
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        fail(f"{file}: not a readable .npz ({error})")
    for part, (shape, dtype) in shapes.items():
        square = len(shape) in (3, 4) and shape[1] == shape[2] and shape[3:] in ((), (1,), (3,))
        if not square or dtype != np.uint8:
            fail(f"{file}: {part}_images is {shape} {dtype}; expected (N, S, S) or (N, S, S, 3) uint8"
                 + ("; volumes are no images" if len(shape) == 4 and shape[3] not in (1, 3) else ""))
    names = [f"{part}/{i}" for part in parts for i in range(shapes[part][0][0])]
    if len(names) != len(labels):
        fail(f"{file}: {len(names)} images for {len(labels)} labels")
    index = Index(names, names, splits=[name.split("/")[0] for name in names], stream=Path(file))
    if labels.shape[1] == 1:
        if (labels != labels.astype(np.int64)).any():
            fail(f"{file}: labels must be whole numbers, one a class")
        index.labels = [str(int(value)) for value in labels[:, 0]]
    else:
        if not np.isin(labels, (0, 1)).all():
            fail(f"{file}: labels of several columns must be 0 or 1")
        index.labels = labels.astype(np.uint8)
        index.classes = args.classes or [f"label_{i}" for i in range(labels.shape[1])]
    return index


def npy_shape(file, key):
    """(shape, dtype) of an array in an .npz, from its head."""
    with zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as member:
        np.lib.format.read_magic(member)
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(member)
        if columns_first and len(shape) > 1:
            fail(f"{file}: {key} is stored in Fortran order; save it as np.ascontiguousarray({key})")
        return shape, dtype


def stream_npz(file, names):
    """Yield the images "PART/NUMBER" of an .npz one at a time, in the order in which they are stored."""
    wanted = set(names)
    for part in dict.fromkeys(name.split("/")[0] for name in names):
        shape, _ = npy_shape(file, f"{part}_images")
        with zipfile.ZipFile(file) as archive, archive.open(f"{part}_images.npy") as member:
            np.lib.format.read_magic(member)
            np.lib.format.read_array_header_1_0(member)
            for i in range(shape[0]):
                pixels = np.frombuffer(member.read(math.prod(shape[1:])), np.uint8).reshape(*shape[1:3], -1)
                if f"{part}/{i}" in wanted:
                    yield pixels


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


def specified(name, index):
    """The index with what SPECS says of a dataset."""
    index.metric, mean, std, classes = SPECS[name]
    index.mean, index.std = [*mean] * (3 // len(mean)), [*std] * (3 // len(std))
    index.classes = classes.split(", ")
    index.ordinal = name == "aptos2019"
    return index


def expect(root, *names, inside=()):
    """root, or the first of its folders `inside` that is there; it must hold `names`."""
    if not (root / names[0]).exists():
        root = next((root / folder for folder in inside if (root / folder).is_dir()), root)
    if not all((root / name).exists() for name in names):
        fail(f"{root}: this layout has {', '.join(names)} in it; found "
             f"{some(sorted(os.listdir(root)), 12) or 'an empty folder'}")
    return root


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
    ends = np.cumsum([0, *map(len, members)])
    held = int(count * share)
    half = int(ends[np.searchsorted(ends, held // 2)])
    held = int(ends[np.searchsorted(ends, held)])
    splits = [""] * count
    for place, i in enumerate(i for group in members for i in group):
        splits[i] = "val" if place < half else "test" if place < held else "train"
    return splits


def index_aptos2019(root, args):
    """train.csv (id_code, diagnosis 0 to 4) and train_images/{id_code}.png: the authors' 70/15/15."""
    file = expect(root, "train.csv", "train_images") / "train.csv"
    table = read_table(file, ["id_code", "diagnosis"])
    listed = [f"{name}.png" for name in table["id_code"]]
    grades = dict(zip("01234", SPECS["aptos2019"][-1].split(", ")))
    labels = known_labels(file, listed, table["diagnosis"], grades)
    paths, names = listed_images(file, listed, [root / "train_images"], root, args)
    splits = random_split(len(names), 0.3, args.split_seed)
    return specified("aptos2019", drop_missing(Index(paths, names, labels, splits)))


def index_ddsm(root, args):
    """ddsm_raw_image_lists/{train,val,test}.txt, a path under ddsm_raw/ a line, such as
    cancer_15-B_3504_1.RIGHT_CC.LJPEG.1.jpg of patient B_3504; or else CBIS-DDSM."""
    if any(root.rglob("*_case_description_t*_set.csv")):
        return index_cbis_ddsm(root, args)
    lists = {part: f"ddsm_raw_image_lists/{part}.txt" for part in SPLITS}
    expect(root, "ddsm_raw", *lists.values())
    known = {"normal": "normal", "benign": "abnormal", "cancer": "abnormal"}
    index = Index([], [], [], [], [])
    for part, file in lists.items():
        listed = [line.strip() for line in (root / file).read_text("utf-8-sig").splitlines() if line.strip()]
        bases = [os.path.basename(name) for name in listed]
        paths, names = listed_images(root / file, listed, [root / "ddsm_raw"], root, args)
        index.items += paths
        index.names += names
        index.labels += known_labels(root / file, listed, [base.split("_")[0] for base in bases], known)
        index.splits += [part] * len(listed)
        index.groups += [(re.search(r"[A-D]_\d{4}(?=_\d)", base) or [base])[0] for base in bases]
    return specified("ddsm", drop_missing(index))


def index_cbis_ddsm(root, args):
    """CBIS-DDSM: {mass,calc}_case_description_{train,test}_set.csv of TCIA and the full mammograms, named (or their
    folder) by series or case of "image file path". One MALIGNANT lesion decides."""
    files, found = {}, {}
    for name in files_under(root)[0]:
        files[Path(name).stem] = files[Path(name).parent.name] = str(root / name)
    known = {"BENIGN": "benign", "BENIGN_WITHOUT_CALLBACK": "benign", "MALIGNANT": "malignant"}
    for file in sorted(root.rglob("*_case_description_t*_set.csv")):
        table = read_table(file, ["patient_id", "pathology", "image file path"])
        cases = [path.split("/") for path in table["image file path"]]
        listed = [files.get(case[-2 % len(case)]) or files.get(case[0], case[0]) for case in cases]
        paths, names = listed_images(file, listed, [""], root, args)
        labels = known_labels(file, [case[0] for case in cases], table["pathology"], known)
        split = "test" if "_test_" in file.name else "train"
        for path, name, label, patient in zip(paths, names, labels, table["patient_id"]):
            before = found.get((split, path), ("", "benign"))[1]
            found[split, path] = name, max(label, before), patient
    if "train" not in {split for split, _ in found}:
        fail(f"{root}: no mass or calc_case_description_train_set.csv in it; found {some(os.listdir(root), 12)}")
    names, labels, groups = map(list, zip(*found.values()))
    index = Index([path for _, path in found], names, labels, [split for split, _ in found], groups,
                  classes=["benign", "malignant"], metric="roc_auc")
    return drop_missing(index)


def index_isic2019(root, args):
    """ISIC_2019_Training_GroundTruth.csv (image, one-hot classes) and the JPEGs: the authors' 80/10/10 of images, or
    with --group-column lesion_id of lesions, by ISIC_2019_Training_Metadata.csv."""
    file = expect(root, "ISIC_2019_Training_GroundTruth.csv") / "ISIC_2019_Training_GroundTruth.csv"
    classes = SPECS["isic2019"][-1].split(", ")
    table = read_table(file, ["image", *classes])
    listed, groups = table["image"], None
    hot = [""] * len(listed)
    for name in [*classes, "UNK"]:
        for i, cell in enumerate(table.get(name, [])):
            if cell not in ("0", "0.0"):
                hot[i] = f"{hot[i]} {name}".strip()
    labels = known_labels(file, listed, hot, {name: name for name in classes})
    paths, names = listed_images(file, [f"{name}.jpg" for name in listed],
                                 [root / "ISIC_2019_Training_Input", root / "train"], root, args)
    if args.group_column:
        meta = read_table(root / "ISIC_2019_Training_Metadata.csv", ["image", args.group_column])
        lesions = dict(zip(meta["image"], meta[args.group_column]))
        groups = [lesions.get(name) or name for name in listed]  # some 2,000 images name no lesion
    splits = random_split(len(names), 0.2, args.split_seed, groups)
    return specified("isic2019", drop_missing(Index(paths, names, labels, splits, groups)))


def index_chexpert(root, args):
    """train.csv (Path, ..., 14 labels) sorted by Path, its first 20 % held out, whole patients. Blank and -1 are 0
    (U-zeros), a row without a positive is No Finding. --view frontal leaves lateral images out, after the split."""
    file = expect(root, "train.csv", inside=("CheXpert-v1.0-small", "CheXpert-v1.0")) / "train.csv"
    classes = SPECS["chexpert"][-1].split(", ")
    table = read_table(file, ["Path", "Frontal/Lateral", *classes])
    names = [re.sub(r"^CheXpert-v1\.0[^/]*/", "", name) for name in table["Path"]]
    order = sorted(range(len(names)), key=names.__getitem__)
    names = [names[i] for i in order]
    known = {"": 0, "0": 0, "0.0": 0, "-1": 0, "-1.0": 0, "1": 1, "1.0": 1}
    flags = np.array([[known.get(table[name][i], 9) for i in order] for name in classes], np.uint8).T
    wrong = [f"{classes[k]} of {names[i]}" for i, k in np.argwhere(flags == 9)]
    if wrong:
        fail(f"{file}: {len(wrong)} labels are none of blank, 0, 1, -1: {some(wrong, 20)}")
    flags[flags.sum(1) == 0, 0] = 1
    patients = [(re.search(r"patient\d+", name) or [name])[0] for name in names]
    index = Index([None] * len(names), names, flags, random_split(len(names), 0.2, None, patients), patients)
    if args.view == "frontal":
        lateral = [i for i, k in enumerate(order) if table["Frontal/Lateral"][k] != "Frontal"]
        index.left_out["lateral"] = [names[i] for i in lateral]
        index = index.take(np.setdiff1d(np.arange(len(names)), lateral).tolist())
    index.items, _ = listed_images(file, index.names, [file.parent], file.parent, args)
    return specified("chexpert", drop_missing(index))


def index_camelyon(root, args):
    """PatchCamelyon's camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5, its official split; or
    {train,valid,test}_labels.csv (id, label) with {train,valid,test}/{id}.tif or .png, train at least."""
    parts = {"train": "train", "valid": "val", "test": "test"}
    stem = "camelyonpatch_level_2_split"
    index = Index([], [], [], [])
    known = dict(zip("01", SPECS["camelyon"][-1].split(", ")))
    if any(root.glob("camelyonpatch_*")):
        expect(root, *(f"{stem}_{part}_{what}.h5" for part in parts for what in "xy"))
        for part, split in parts.items():
            file = f"{stem}_{part}_x.h5"
            x = open_hdf5(str(root / file), "x")
            y = open_hdf5(str(root / f"{stem}_{part}_y.h5"), "y")
            if len(x) != len(y) or x.shape[3:] != (3,) or x.dtype != np.uint8:
                fail(f"{root}/{file}: {x.shape} {x.dtype} for {len(y)} labels; expected (N, 96, 96, 3) uint8")
            names = [f"{file}:{i}" for i in range(len(y))]
            index.items += [(str(root / file), "x", i) for i in range(len(y))]
            index.names += names
            index.labels += known_labels(file, names, [str(int(value)) for value in y[:].reshape(-1)], known)
            index.splits += [split] * len(y)
        return specified("camelyon", index)
    expect(root, "train_labels.csv", "train")
    for part, split in parts.items():
        file = root / f"{part}_labels.csv"
        if file.exists():
            table = read_table(file, ["id", "label"])
            paths, names = listed_images(file, table["id"], [root / part], root, args)
            index.items += paths
            index.names += names
            index.labels += known_labels(file, names, table["label"], known)
            index.splits += [split] * len(names)
    if set(index.splits) == {"train"}:
        index.splits = None
    return specified("camelyon", drop_missing(index))


@cache  # a file a process: h5py's must not be shared by forks
def hdf5_file(path, process):
    """An open HDF5 file."""
    try:
        import h5py
    except ImportError:
        fail(f"{path} is an HDF5 file, for which h5py is missing: pip install h5py")
    return h5py.File(path, "r")


def open_hdf5(path, key):
    """An array of an HDF5 file, read as it is indexed."""
    try:
        return hdf5_file(path, os.getpid())[key]
    except (OSError, KeyError) as error:
        fail(f"{path}: no HDF5 file with {key!r} in it ({error})")


def index_isic2018(root, args):
    """ISIC2018_Task1-2_Training_Input/{id}.jpg, ISIC2018_Task1_Training_GroundTruth/{id}_segmentation.png: 80/10/10 of
    the sorted ids; official Test folders, if there, are test, and train gets that tenth."""
    index = Index([], [], splits=[], masks=[], metric="iou")
    for part in ("Training", "Test"):
        images, masks = f"ISIC2018_Task1-2_{part}_Input", f"ISIC2018_Task1_{part}_GroundTruth"
        if part == "Test" and not (root / images).is_dir():
            continue
        expect(root, images, masks)
        names = [name for name in files_under(root / images)[0] if name.endswith(".jpg")]
        found = [[(None, str(root / masks / f"{Path(name).stem}_segmentation.png"))] for name in names]
        found = [[(None, path)] if os.path.isfile(path) else [] for [(_, path)] in found]
        index.masks += require_masks([f"{masks}/{Path(name).stem}_segmentation.png" for name in names], found, args)
        index.items += [str(root / images / name) for name in names]
        index.names += [f"{images}/{name}" for name in names]
        if part == "Training":
            index.splits = random_split(len(names), 0.2, args.split_seed)
        else:
            index.splits = ["train" if split == "test" else split for split in index.splits] + ["test"] * len(names)
    return index


def index_csaws(root, args):
    """CSAW-S: anonymized_dataset/{patient}/{patient}_{n}.png with binary maps {patient}_{n}_{class}.png, the owners' 20
    validation patients, test_data/ with annotators 1 to 3. --tissue takes all 11 classes."""
    root = expect(root, "anonymized_dataset", "test_data", inside=("CsawS",))
    wanted = CSAWS_MAPS if args.tissue else CSAWS_MAPS[:1]
    index = Index([], [], splits=[], groups=[], masks=[], metric="iou", mask_classes=["background", "tumour", *wanted[1:]])
    experts = {f"annotator_{k}": root / "test_data" / f"annotator_{k}" for k in (1, 2, 3)}
    for folder in (root / "anonymized_dataset", root / "test_data" / "anonymized_dataset"):
        scans = {}  # an 8-bit duplicate sorts behind its original and takes its place
        for name in files_under(folder)[0]:
            match = re.fullmatch(r".*/(\w+_\d+?)(_8bit)?\.png", f"/{name}")
            if match:
                scans[match[1]] = str(folder / name)
        if not scans:
            fail(f"{folder}: no scan such as 000/000_0.png")
        test = folder.parent != root
        patients = [stem.rsplit("_", 1)[0] for stem in scans]
        index.items += scans.values()
        index.names += [below(path, root) for path in scans.values()]
        index.groups += patients
        index.splits += ["test" if test else "val" if patient in CSAWS_VAL else "train" for patient in patients]
        for name, place in experts.items():
            masks = csaws_masks(scans, place, wanted) if test else [[] for _ in scans]
            index.annotators[name] = index.annotators.get(name, []) + masks
        index.masks += index.annotators["annotator_1"][-len(scans):] if test else csaws_masks(scans, folder, wanted)
    return index


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
    if missing:
        fail(f"{folder}: {len(missing)} of {len(scans)} scans have no map (such as {missing[0]}_cancer.png): "
             f"{some(missing, 100)}")
    return masks


LAYOUTS = {"demo": index_demo, "csv": index_csv, "folder": index_files, "flat": index_files, "medmnist": index_npz,
           "aptos2019": index_aptos2019, "ddsm": index_ddsm, "isic2019": index_isic2019, "chexpert": index_chexpert,
           "camelyon": index_camelyon, "isic2018": index_isic2018, "csaws": index_csaws}
MARKS = {"aptos2019": ["train_images"], "ddsm": ["ddsm_raw_image_lists"], "isic2018": ["ISIC2018_Task1-2_Training_Input"],
         "isic2019": ["ISIC_2019_Training_GroundTruth.csv"], "csaws": ["anonymized_dataset", "CsawS"],
         "chexpert": ["CheXpert-v1.0-small", "CheXpert-v1.0"],
         "camelyon": ["camelyonpatch_level_2_split_train_x.h5", "train_labels.csv"]}  # by which each is recognised


def recognise(source, args):
    """(layout, root) of SOURCE."""
    path = Path(source)
    if args.layout == "demo" or args.layout == "auto" and source == "demo" and not path.exists():
        return "demo", path
    if path.is_file():
        kinds = {".npz": "medmnist", ".csv": "csv", ".tsv": "csv", ".txt": "csv"}
        kind = kinds.get(path.suffix.lower())
        if kind is None or args.layout not in ("auto", kind):
            fail(f"SOURCE {source} is a file; expected a folder, a .csv or an .npz" + (
                f", for --layout {args.layout} a folder" if args.layout != "auto" else ""))
        if kind == "csv":
            args.csv = args.csv or str(path)
        return kind, path if kind == "medmnist" else path.parent
    if not path.is_dir():
        fail(f"SOURCE {source}: there is no such folder or file (looked in {Path.cwd()})")
    if args.layout == "medmnist":
        fail(f"SOURCE {source}: --layout medmnist takes the .npz file itself")
    if args.layout != "auto":
        return args.layout, path
    if args.csv or (path / "labels.csv").is_file():
        return "csv", path
    for name, marks in MARKS.items():
        if any((path / mark).exists() for mark in marks):
            return name, path
    if any(path.rglob("*_case_description_t*_set.csv")):
        return "ddsm", path
    if (path / "train.csv").is_file():
        with open(path / "train.csv", errors="replace") as lines:
            if "Frontal/Lateral" in lines.readline():
                return "chexpert", path
    return "folder", path


# ---------------------------------------------------------------- labels and splits -------------------------

def settle_labels(index, args):
    """The index with its classes in order; labels that are missing, or that may mean the same, are refused by name."""
    if index.labels is None:
        if args.classes:
            fail("--classes names the labels, and this source has none; masks have --mask-classes")
        return index
    if isinstance(index.labels, np.ndarray):
        return settle_flags(index, args)
    missing = [i for i, label in enumerate(index.labels) if label.lower() in NO_LABEL]
    if missing:
        names = [index.names[i] for i in missing]
        if not args.skip_broken:
            fail(f"{len(missing)} images have no label (blank, nan or NA): {some(names, 50)}. --skip-broken leaves them out")
        index.left_out["without a label"] = names
        index = index.take(np.setdiff1d(np.arange(len(index.labels)), missing).tolist())
    found = sorted(set(index.labels))
    alike = defaultdict(list)
    for name in found:
        alike[canonical(name)].append(name)
    for names in alike.values():
        if len(names) > 1:
            fail(f"the labels {' and '.join(map(repr, names))} may be one class: they differ by case, blanks or as numbers "
                 "are written; make them equal")
    whole = all(re.fullmatch(r"-?\d+(\.0+)?", name) for name in found)  # 10 comes after 2
    if args.classes and not index.classes:
        index = name_classes(index, args.classes, sorted(found, key=float) if whole else found)
        index.ordinal = args.ordinal or whole
    elif not index.classes:
        index.classes = sorted(found, key=float) if whole else found
        index.ordinal = whole
    if len(index.classes) < 2:
        say(f"WARNING: there is one class, {index.classes[0]!r}: images for DINO, not for finetune.py or knn_eval.py")
    return index


def canonical(name):
    """What two spellings of one class have in common: letters without case and blanks, numbers by value."""
    try:
        return f"{float(name):g}"
    except ValueError:
        return re.sub(r"\s+", "", name).casefold()


def name_classes(index, classes, found):
    """The index with --classes: the labels in their order or, of the labels 0, 1, ..., their names."""
    numbers = [str(i) for i in range(len(classes))]
    if sorted(classes) == sorted(found):
        index.classes = classes
    elif set(map(canonical, found)) <= set(numbers):
        index.classes = classes
        index.labels = [classes[int(float(label))] for label in index.labels]
    else:
        fail(f"--classes {','.join(classes)}: the labels are {some(found, 30)}; name each of them once")
    return index


def settle_flags(index, args):
    """Several 0/1 columns: labels, or classes where every row has exactly one 1."""
    if args.classes and sorted(args.classes) != sorted(index.classes):
        fail(f"--classes {','.join(args.classes)}: the columns are {some(index.classes, 30)}")
    clash = [name for name in index.classes if name in common.FIXED]
    if clash:
        fail(f"a class cannot be called {clash[0]!r}, which is a column of labels.csv; rename it")
    if args.classes:
        index.labels = index.labels[:, [index.classes.index(name) for name in args.classes]]
        index.classes = args.classes
    if (index.labels.sum(1) == 1).all():
        say("note: every image has exactly one of the labels: they are taken as classes, not as a multilabel task")
        index.labels = [index.classes[k] for k in index.labels.argmax(1)]
    return index


def settle_groups(index, args):
    """The index with a group of its own for each image whose group is blank."""
    blank = [i for i, group in enumerate(index.groups or []) if group.lower() in NO_LABEL]
    if blank:
        say(f"note: {len(blank)} images have no group; each counts as one of its own")
        for i in blank:
            index.groups[i] = index.names[i]
    return index


def share_out(flags, units, shares, rng, least):
    """Split images into parts of the given shares: [0, 1 or 2] an image. Iterative stratification (Sechidis et al. 2011,
    algorithm 1): the label with the fewest images left goes first, each of its units to the part that lacks it most;
    what rounding gave a part too much counts against it at the next label. flags (N, L) bool; units: lists of images
    that stay together; least: a label with so many images stands in every part."""
    flags = np.concatenate([flags, ~flags.any(1, keepdims=True)], 1)  # no label at all is a label too
    counts = np.array([flags[unit].sum(0) for unit in units])
    totals = flags.sum(0)
    parts = [p for p in range(3) if shares[p] > 0]
    one_label = (flags.sum(1) == 1).all()
    room = fill(len(flags), shares)
    if one_label:  # a class of three has one image in each part, even if that makes small parts larger
        common_labels = int((totals >= least).sum())
        for p in parts[1:]:
            room[p] = max(room[p], common_labels)
        room[parts[0]] = len(flags) - sum(room[p] for p in parts[1:])
    lacking = np.outer(totals, shares)  # (L, 3) images of each label that each part still lacks
    held = np.zeros((len(totals), 3))
    left = counts.copy()
    placed, given = 0, np.zeros(3)
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


def fill(count, shares):
    """Whole numbers that sum to count, in proportion to shares; no part is empty where that can be avoided."""
    exact = np.array(shares) * count
    whole = np.floor(exact + 1e-9).astype(int)
    for p in np.argsort(whole - exact, kind="stable")[:count - whole.sum()]:
        whole[p] += 1
    for p in range(3):
        if shares[p] > 0 and not whole[p] and whole.max() > 1:
            whole[whole.argmax()] -= 1
            whole[p] += 1
    return whole.tolist()


def carve(index, args):
    """index.splits with what is missing carved from train: all of it by --split, or val or test alone."""
    given = index.splits or ["train"] * len(index.names)
    present = set(given)
    shares = list(args.split)
    if index.splits:
        shares = [1 - sum(args.split[p] for p in (1, 2) if SPLITS[p] not in present),
                  *(0 if SPLITS[p] in present else args.split[p] for p in (1, 2))]
    if index.splits and shares[0] == 1 or not len(given):
        return given
    pool = [i for i, name in enumerate(given) if name == "train"]
    if isinstance(index.labels, np.ndarray):
        flags = index.labels[pool] > 0
        least = 7
    elif index.labels is not None:
        place = {name: k for k, name in enumerate(index.classes)}
        flags = np.eye(len(place), dtype=bool)[[place[index.labels[i]] for i in pool]]
        least = 3
    else:
        flags = np.ones((len(pool), 1), bool)
        least = 3
    members = defaultdict(list)
    for k, i in enumerate(pool):
        members[index.groups[i] if index.groups else k].append(k)
    units = list(members.values())
    parts = share_out(flags, units, shares, np.random.default_rng(args.split_seed), least)
    mend_empty(parts, units, flags, shares)
    splits = list(given)
    for i, part in zip(pool, parts):
        splits[i] = SPLITS[part]
    for p, share in enumerate(shares):
        if share > 0 and SPLITS[p] not in splits:
            fail(f"{len(pool)} images{f' of {len(units)} groups' if index.groups else ''} are too few to carve a {SPLITS[p]} "
                 "split from; give one, or another --split")
    return splits


def warn_of_rare(index, splits):
    """Say which classes are too small to have been shared out."""
    if index.labels is None or isinstance(index.labels, np.ndarray) or index.splits == splits:
        return
    rare = [name for name, count in Counter(index.labels).items() if count < 3]
    if rare:
        say(f"WARNING: {len(rare)} classes have fewer than 3 images, which stay in train: {some(rare)}")


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


def check_groups(index, mode):
    """Patients that stand in two splits: mode "warn" says so, "drop" takes them out of train (of val, where test has
    them), "error" stops. Returns how many."""
    owners = defaultdict(set)
    for group, split in zip(index.groups or [], index.splits):
        if split:
            owners[group].add(split)
    torn = {group for group, splits in owners.items() if len(splits) > 1}
    if not torn:
        return 0
    names = some(f"{group} ({', '.join(sorted(owners[group]))})" for group in sorted(torn))
    message = f"{len(torn)} groups (patients) stand in more than one split: {names}"
    if mode == "error":
        fail(f"{message}; --leakage drop takes them out of train, --leakage warn lets them be")
    say(f"WARNING: {message}; {'scores will flatter' if mode == 'warn' else 'taken out of train, or val'}")
    if mode == "drop":
        for i, group in enumerate(index.groups):
            later = owners[group] & {"train": {"val", "test"}, "val": {"test"}}.get(index.splits[i], set())
            if later:
                index.left_out.setdefault("patient in a later split", []).append(index.names[i])
                index.splits[i] = ""
    return len(torn)


def check_duplicates(index, digests, mode):
    """Identical images in two splits: ({"test_in_train": n, ...}, pairs of them, those with other labels first). mode
    "warn" says so, "error" stops, "drop" takes them out of train (out of val, where test has them)."""
    twins = defaultdict(list)
    for i, digest in enumerate(digests):
        if index.splits[i]:
            twins[digest].append(i)
    leakage, pairs, gone = {}, [], set()
    for inner, outer in (("test", "train"), ("val", "train"), ("test", "val")):
        count = 0
        for at in twins.values():
            inside = [i for i in at if index.splits[i] == inner]
            outside = [i for i in at if index.splits[i] == outer]
            count += len(inside) if outside else 0
            gone.update(outside if inside else [])
            for i in inside:  # of a picture that is there a thousand times, ten pairs tell enough
                outside.sort(key=lambda k, i=i: label_text(index, k) == label_text(index, i))
                pairs += [(i, k) for k in outside[:10]]
        leakage[f"{inner}_in_{outer}"] = count
        if count:
            total = sum(split == inner for split in index.splits)
            say(f"WARNING: leakage: {count} of {total} {inner} images also stand in {outer}, pixel for pixel"
                + ("; scores will flatter" if mode == "warn" else f"; taken out of {outer}" if mode == "drop" else ""))
    pairs.sort(key=lambda pair: label_text(index, pair[0]) == label_text(index, pair[1]))
    other = [pair for pair in pairs if label_text(index, pair[0]) != label_text(index, pair[1])]
    if other:
        say(f"WARNING: {len(other)} of these pairs have different labels, such as " + some(
            (f"{index.names[i]} ({label_text(index, i)}) and {index.names[k]} ({label_text(index, k)})" for i, k in other), 3))
    if pairs and mode == "error":
        fail(f"{len(pairs)} pairs of identical images stand in two splits, such as {index.names[pairs[0][0]]} and "
             f"{index.names[pairs[0][1]]}; --leakage drop takes them out of train")
    rows = [[index.names[i], index.splits[i], label_text(index, i), index.names[k], index.splits[k], label_text(index, k)]
            for i, k in pairs]
    if mode == "drop":
        for k in gone:
            index.splits[k] = ""
        index.left_out["identical to an image of another split"] = [index.names[k] for k in sorted(gone)]
    return leakage, rows


def label_text(index, i):
    """The label of an image as text; of several, their names joined by commas."""
    if isinstance(index.labels, np.ndarray):
        return ", ".join(name for name, flag in zip(index.classes, index.labels[i]) if flag)
    return "" if index.labels is None else index.labels[i]


def check_classes(index):
    """Refuse classes without a training image, where there is training."""
    if index.labels is None or isinstance(index.labels, np.ndarray) or "train" not in index.splits:
        return
    trained = {label for label, split in zip(index.labels, index.splits) if split == "train"}
    unseen = [name for name in index.classes if name not in trained]
    if unseen:
        fail(f"no training image has the label {some(map(repr, unseen))}: give it some, or leave the class out")


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
        elif "A" in image.getbands() or "transparency" in image.info:
            colour = np.asarray(image.convert("RGBA"))
            drawn = (colour[..., 3] != colour[0, 0, 3]).any() and (colour[..., :3] == colour[:1, :1, :3]).all()
            on_black = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA"))
            values = colour[..., 3] if drawn else np.asarray(on_black.convert("L"))
        else:
            values = np.asarray(image.convert("RGB").convert("L"))
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

class Rows(torch.utils.data.Dataset):
    """Decodes one image, with its masks, an item: a dict of arrays, or with "error" alone."""

    def __init__(self, index, side, fit, classes, ignore):
        self.index, self.side, self.fit, self.classes, self.ignore = index, side, fit, classes, ignore

    def __len__(self):
        return len(self.index.items)

    def __getitem__(self, i):
        try:
            return self.read(i)
        # Pillow's plugins raise nearly anything on a damaged file; all are named later
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}" if type(error) is not ValueError else str(error)}

    def read(self, i):
        """Row i: pixels (side, side, C), size (height, width), note, digest of the pixels, masks {name: (side, side)}."""
        item, masks = self.index.items[i], {}
        if isinstance(item, int):
            pixels, mask = draw_lesion(item)
            size, note = pixels.shape[:2], ""
            masks["masks"] = reduce_mask(mask.astype(np.uint8), self.side, self.fit, 2, None)
        elif isinstance(item, tuple):
            path, key, place = item
            pixels = open_hdf5(path, key)[place]
            size, note = pixels.shape[:2], ""
        else:
            pixels, size, note = common.read_image(item, self.side)
        wanted = {"masks": self.index.masks} if self.index.masks and not masks else {}
        for name, items in (wanted | self.index.annotators).items():
            if not items[i]:  # an annotator of test alone
                masks[name] = np.zeros((self.side, self.side), np.uint8)
                continue
            mask, remark = read_mask(items[i], self.classes, self.ignore)
            if mask.shape != tuple(size):
                raise ValueError(f"its mask is {mask.shape[1]}x{mask.shape[0]} pixels, it is {size[1]}x{size[0]}")
            note = "; ".join(filter(None, (note, remark)))
            masks[name] = reduce_mask(mask, self.side, self.fit, self.classes, self.ignore)
        return squared(pixels, size, note, self.side, self.fit, masks)


def squared(pixels, size, note, side, fit, masks):
    """A decoded image as a row to be written."""
    square = common.to_square(pixels, side, fit)
    digest = hashlib.blake2b(square.tobytes() + repr(tuple(size)).encode(), digest_size=8).hexdigest()
    return {"pixels": square, "size": tuple(map(int, size)), "note": note, "digest": digest, "masks": masks}


def decoded_rows(index, side, args):
    """Yield every row of the index in its order, decoded by --workers processes."""
    if index.stream:
        for pixels in stream_npz(index.stream, index.items):
            yield squared(pixels, pixels.shape[:2], "", side, args.fit, {})
        return
    rows = Rows(index, side, args.fit, len(index.mask_classes or [0, 0]), args.ignore)
    loader = torch.utils.data.DataLoader(rows, batch_size=8, num_workers=args.workers, collate_fn=list,
                                         prefetch_factor=4 if args.workers else None)
    for batch in loader:
        yield from batch


def npy_header(*shape):
    """The head of an .npy file of uint8, of the same length whatever the number of images."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return head.getvalue()


def write_arrays(folder, index, side, colour, args):
    """Decode everything into images.npy and masks*.npy of a folder, one image at a time. Returns (the kept positions,
    facts {"size", "digest", "note"} of each, {name: why it is broken})."""
    room = shutil.disk_usage(folder).free
    needed = len(index.items) * side * side * ((3 if colour else 1) + bool(index.masks) + len(index.annotators))
    if needed > room:
        fail(f"--output {args.output}: {len(index.items)} images of {side} x {side} take up to {needed / 1e9:.1f} GB and "
             f"{room / 1e9:.1f} GB are free; lower --side, or give a folder on another disk")
    kept, facts, broken, empty = [], [], {}, Counter()
    channels, files = 1, {"images": open(folder / "images.npy", "wb")}
    files["images"].write(npy_header(1, side, side, channels))
    for i, row in enumerate(tqdm(decoded_rows(index, side, args), "preparing", len(index.items), unit="image")):
        if "error" in row:
            broken[index.names[i]] = row["error"]
            continue
        if row["pixels"].shape[2] > channels:  # the first colour: what is written so far was grey
            files["images"] = spread_channels(files["images"], len(kept), side)
            channels = 3
        files["images"].write(np.broadcast_to(row["pixels"], (side, side, channels)).tobytes())
        for name, mask in row.pop("masks").items():
            if name not in files:
                files[name] = open(folder / f"{name if name == 'masks' else f'masks-{name}'}.npy", "wb")
                files[name].write(npy_header(1, side, side))
            files[name].write(mask.tobytes())
            empty["empty"] += name == "masks" and not mask.any()
            empty["full"] += name == "masks" and bool(mask.all())
        del row["pixels"]
        kept.append(i)
        facts.append(row)
    for name, file in files.items():
        file.seek(0)
        file.write(npy_header(len(kept), side, side, *([channels] if name == "images" else [])))
        file.close()
    for what, count in empty.items():
        if count:
            say(f"{'WARNING: all' if count == len(kept) else 'note:'} {count} of {len(kept)} masks are {what}"
                + ("; is the foreground what is bright in them?" if count == len(kept) else ""))
    return kept, facts, broken


def spread_channels(file, count, side):
    """Rewrite an open file of `count` grey images with three equal channels; returns it, open at its end."""
    file.close()
    path = Path(file.name)
    grey = path.rename(path.with_suffix(".grey"))
    wide = open(path, "wb")
    wide.write(npy_header(1, side, side, 3))
    with open(grey, "rb") as pixels:
        pixels.seek(len(npy_header(1, side, side, 1)))
        for _ in range(count):
            wide.write(np.frombuffer(pixels.read(side * side), np.uint8).repeat(3).tobytes())
    grey.unlink()
    return wide


def look_at_heads(index):
    """({(width, height): images}, {bits a channel: images}, whether any is in colour) of up to 1,000 images, from the
    heads of their files."""
    sizes, bits, colour = Counter(), Counter(), False
    for i in np.unique(np.linspace(0, len(index.items) - 1, min(len(index.items), 1000)).astype(int)):
        item = index.items[i]
        try:
            if index.stream:
                shape = npy_shape(index.stream, f"{item.split('/')[0]}_images")[0]
                sizes[shape[2], shape[1]] += 1
                bits[8] += 1
                colour = colour or shape[3:] == (3,)
            elif isinstance(item, (int, tuple)):
                shape = (128, 128) if isinstance(item, int) else open_hdf5(item[0], item[1]).shape[1:]
                sizes[shape[1], shape[0]] += 1
                bits[8] += 1
                colour = True
            elif common.is_dicom(item):
                head = common.import_pydicom().dcmread(item, stop_before_pixels=True)
                sizes[int(head.Columns), int(head.Rows)] += 1
                bits[int(head.BitsStored)] += 1
                colour = colour or head.SamplesPerPixel > 1
            else:
                with Image.open(item) as image:
                    sizes[image.size] += 1
                    colour = colour or image.mode[0] not in "1LIF"
                    bits[16 if common.is_deep(image) else {"1": 1, "I": 16, "F": 32}.get(image.mode.split(";")[0], 8)] += 1
        except Exception:  # a damaged file, a package that is missing: decoding says so
            continue
    return sizes, bits, colour


# ---------------------------------------------------------------- the prepared folder -----------------------

def write_labels(folder, index, facts):
    """labels.csv: a row an image."""
    head = ["image", "split"] + ["group"] * bool(index.groups) + ["height", "width"]
    many = isinstance(index.labels, np.ndarray)
    head += index.classes if many else ["label"] if index.labels is not None else []
    rows = []
    for i, name in enumerate(index.names):
        row = [name, index.splits[i]] + ([index.groups[i]] if index.groups else []) + [*facts[i]["size"]]
        row += index.labels[i].tolist() if many else [index.labels[i]] if index.labels is not None else []
        rows.append(row)
    common.write_table(folder / "labels.csv", head, rows)


def outlined(picture, mask):
    """A picture (h, w, 3) uint8 with the outline of each class of a mask (h, w), in its colour."""
    picture = picture.copy()
    for value in np.unique(mask[mask > 0]):
        inside = Image.fromarray((mask == value).astype(np.uint8))
        edge = (np.asarray(inside) > 0) & (np.asarray(inside.filter(ImageFilter.MinFilter(5))) == 0)
        picture[edge] = ImageColor.getrgb(common.COLOURS[value % len(common.COLOURS)])
    return picture


def contact_sheet(folder, count=6):
    """Draw training images, `count` of each class a row, or 4 rows, with the outlines of their masks."""
    dataset = common.open_dataset(folder)
    rows = next((found for found in dataset.rows.values() if len(found)), np.arange(len(dataset.paths)))

    def spread(at, most):
        return at[np.linspace(0, len(at) - 1, min(most, len(at))).astype(int)]
    names, picks = None, []
    if dataset.task is None:
        picks = spread(rows, 4 * count)
        picks = np.array_split(picks, math.ceil(len(picks) / count))
    else:
        names = []
        for k, name in enumerate(dataset.classes[:30]):
            labels = dataset.labels[rows]
            of_it = rows[labels == k] if dataset.task == "classes" else rows[labels[:, k] > 0]
            if len(of_it):
                names.append(name)
                picks.append(spread(of_it, count))
    pictures = [[] for _ in picks]
    for line, chosen in zip(pictures, picks):
        for row in chosen:
            size = dataset.sizes[row]
            picture = common.in_proportion(dataset.images[row], size, dataset.fit, 256)
            if dataset.masks is not None:
                mask = common.from_square(dataset.masks[row], *picture.shape[:2], dataset.fit, Image.Resampling.NEAREST)
                picture = outlined(picture, mask)
            line.append(picture)
    common.draw_grid(folder / "contact_sheet.png", pictures, row_labels=names, title=dataset.name)


def summarise(folder, sizes, bits, facts):
    """Print what was understood: images per split and class, sizes, channels, bit depth, groups."""
    dataset = common.open_dataset(folder)
    table = [["images", *dataset.counts.values()]]
    for k, name in enumerate(dataset.classes):
        cells = [dataset.labels[rows] for rows in dataset.rows.values()]
        table.append([f"  {name}", *(int(np.sum(c == k if dataset.task == "classes" else c[:, k])) for c in cells)])
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
    say(f"arrays: {len(dataset.paths)} images of {dataset.side} x {dataset.side}, {dataset.images.shape[3]} "
        f"channel{'s' * (dataset.images.shape[3] > 1)}, fit {dataset.fit}")
    repeats = len(facts) - len({fact["digest"] for fact in facts})
    leaks = [f"; {n} {name.replace('_', ' ')}" for name, n in dataset.leakage.items() if n]
    say(f"duplicates: {repeats} images equal another one" + "".join(leaks))
    say(f"mean {dataset.mean}, standard deviation {dataset.std}, headline metric {dataset.metric}")


def digest_of(file):
    """A fingerprint of a file: corrected masks are other data."""
    digest = hashlib.blake2b(digest_size=8)
    with open(file, "rb") as content:
        while part := content.read(2 ** 20):
            digest.update(part)
    return digest.hexdigest()


def build(folder, args, root):
    """Prepare everything into a folder: (sizes, bits, facts of each row) for the summary."""
    index = LAYOUTS[args.layout](root, args)
    if not index.items:
        fail(f"{root}: no images in it; found {some(sorted(os.listdir(root)), 12) if root.is_dir() else 'nothing'}")
    odd = [name for name in index.names if name.encode("utf-8", "replace").decode() != name]
    if odd:
        fail(f"{len(odd)} names of files are not UTF-8, such as {ascii(odd[0])}; rename them")
    index = settle_groups(settle_labels(index, args), args)
    if index.masks:
        index.mask_classes = index.mask_classes or args.mask_classes or ["background", "lesion"]
        bare = [i for i, item in enumerate(index.masks) if not item]
        if bare:
            index.left_out["without a mask"] = [index.names[i] for i in bare]
            index = index.take(np.setdiff1d(np.arange(len(index.items)), bare).tolist())
    elif args.mask_classes or args.ignore is not None:
        fail("--mask-classes, --ignore: this source has no masks")
    carve(index, args)  # what cannot be split is said before hours of decoding
    if index.splits:
        check_classes(index)
    sizes, bits, colour = look_at_heads(index)
    short = sorted(min(size) for size in sizes.elements())
    side = min(args.side, short[len(short) // 2]) if short else args.side
    if side < args.side:
        say(f"side {side}: the images are no larger (half of them have a short side of {side} or less)")
    kept, facts, broken = write_arrays(folder, index, side, colour, args)
    if broken:
        message = f"{len(broken)} of {len(index.items)} images cannot be used: " + "; ".join(
            f"{name} ({why})" for name, why in broken.items())
        if not args.skip_broken:
            fail(message + ". Mend or remove them, or leave them out with --skip-broken")
        if not kept:
            fail(message)
        say(f"left out: {message}")
        index.left_out["broken"] = [f"{name}: {why}" for name, why in broken.items()]
        index = index.take(kept)
    small = sum(min(fact["size"]) < side for fact in facts)
    if small:
        say(f"note: {small} of {len(kept)} images have a side below {side} pixels and are enlarged")
    notes = [f"{name}: {fact['note']}" for name, fact in zip(index.names, facts) if fact["note"]]
    if notes:
        say(f"note: {len(notes)} images were not taken as they are: {some(notes)}")
    splits = carve(index, args)
    warn_of_rare(index, splits)
    index.splits = splits
    torn = check_groups(index, args.leakage or ("error" if args.layout == "csv" else "warn"))
    leakage, pairs = check_duplicates(index, [fact["digest"] for fact in facts], args.leakage or "warn")
    for name in SPLITS:
        if args.leakage == "drop" and name not in index.splits and any(name in pair for pair in pairs):
            fail(f"nothing is left of {name} once the images of other splits are dropped")
    check_classes(index)
    if pairs:
        head = ["image", "split", "label", "other_image", "other_split", "other_label"]
        common.write_table(folder / "duplicates.csv", head, pairs)
    write_labels(folder, index, facts)
    images = np.load(folder / "images.npy", mmap_mode="r")
    if index.mean is None:
        train = np.flatnonzero([split == "train" for split in index.splits])
        index.mean, index.std = common.measure(images, train if len(train) else np.arange(len(images)))
    common.write_json(folder / "dataset.json", {
        "version": VERSION, "name": Path(args.output).resolve().name, "side": side, "fit": args.fit,
        "channels": images.shape[3], "classes": index.classes if index.labels is not None else [],
        "ordinal": index.ordinal, "mask_classes": index.mask_classes or [], "ignore": args.ignore,
        "metric": index.metric or ("roc_auc" if isinstance(index.labels, np.ndarray) else
                                   "accuracy" if index.labels is not None else "iou"),
        "masks": digest_of(folder / "masks.npy") if index.masks else None, "mean": index.mean, "std": index.std,
        "layout": args.layout, "source": args.source,
        "command": shlex.join(sys.argv), "arguments": compared(args), "leakage": leakage, "groups_in_two_splits": torn,
        "left_out": index.left_out, "notes": notes})
    contact_sheet(folder)
    for why, names in index.left_out.items():
        if why not in ("missing", "broken"):  # said when they were met
            say(f"left out, {why}: {len(names)} images ({some(names)})")
    if pairs:
        say(f"the {len(pairs)} pairs of identical images are in {args.output}/duplicates.csv")
    return sizes, bits, facts


def compared(args):
    """The arguments that decide what is in the folder."""
    return {name: value for name, value in vars(args).items() if name not in ("output", "overwrite", "workers")}


def check_output(folder, args):
    """Refuse an --output whose replacement would take SOURCE with it, or whose pictures would be taken for images."""
    place, source = folder.resolve(), Path(args.source)
    if folder.name in ("", ".."):
        fail(f"--output {folder}: expected a folder of its own, such as data/NAME")
    if args.layout != "demo" and (place == source or place in source.parents):
        fail(f"--output {folder} is SOURCE, or the folder around it; give another, such as data/NAME")
    if args.layout in ("folder", "flat") and source in place.parents:
        fail(f"--output {folder} lies in SOURCE, where its pictures would be taken for images; give a folder beside it")


def already_there(folder, args):
    """Whether the folder holds what this command makes; another one's is an error unless --overwrite."""
    if not folder.exists():
        return False
    if args.overwrite and (folder / "dataset.json").is_file():
        return False
    try:
        old = json.loads((folder / "dataset.json").read_text())
        arguments = old["arguments"]
    except (OSError, ValueError, KeyError):
        fail(f"--output {folder} is there already and no folder that prepare.py made, which --overwrite does not replace either; "
             "give another")
    here = compared(args)
    differ = [f"{k} {arguments.get(k)!r} there, {here[k]!r} here" for k in here if arguments.get(k) != here[k]]
    if differ:
        fail(f"--output {folder} was prepared otherwise: {some(differ)}; give another, or --overwrite")
    say(f"{folder} is prepared already (--overwrite does it again)")
    return True


def main():
    """Build into NAME.partial, rename it when it is whole."""
    args = arguments()
    folder = Path(args.output)
    args.layout, root = recognise(args.source, args)
    args.source = "demo" if args.layout == "demo" else str(Path(args.source).resolve())
    check_output(folder, args)
    partial = folder.with_name(folder.name + ".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):  # a second one waits, then finds it built
            if already_there(folder, args):
                return
            say(f"{args.source} is understood as: {args.layout}")
            shutil.rmtree(partial, ignore_errors=True)  # of an interrupted build
            partial.mkdir()
            try:
                sizes, bits, facts = build(partial, args, root)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            if folder.exists():
                old = folder.with_name(folder.name + ".old")
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
                partial.rename(folder)
                shutil.rmtree(old)
            else:
                partial.rename(folder)
    except OSError as error:
        fail(f"--output {folder} cannot be written ({error})")
    summarise(folder, sizes, bits, facts)
    say(f"written: {folder} (look at contact_sheet.png)")


# ---------------------------------------------------------------- the demo ----------------------------------

DEMO_CLASSES = ("globular", "homogeneous", "reticular", "streaked")


def draw_lesion(index, size=128):
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


if __name__ == "__main__":
    common.launch(main, "the same command begins again")
