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
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import filelock
import numpy as np

# OpenMP reads how long a thread that waits keeps its core when PyTorch loads it. By default that is so long that any other
# job on the machine, and what runs beside it, crawls; these are some microseconds (BENCHMARKS.md, "Threads that wait")
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"  # GNU's library, of PyTorch on Linux; turns of a loop
    os.environ["KMP_BLOCKTIME"] = "1"  # LLVM's and Intel's, of PyTorch elsewhere; milliseconds

import timm
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from tqdm import tqdm

try:
    from timm.optim import param_groups_layer_decay
except ImportError:  # before timm 1.0.12
    from timm.optim.optim_factory import param_groups_layer_decay

Image.MAX_IMAGE_PIXELS = None  # mammograms and slides pass Pillow's limit; it guards web servers, not studies
DEMO = "data/demo"  # the default of --data, which prepares itself
SPLITS = ("train", "val", "test")
CHECK_EVERY = 20  # steps of training between looks at the loss: a look waits for the device


def fail(message):
    """A user's mistake: one line on stderr, exit code 2. Of several processes that see it, one says it."""
    # rank 0 speaks at once, and torchrun then ends the others before they repeat it; one that sees it alone speaks late
    rank = int(os.environ.get("LOCAL_RANK", 0))
    time.sleep(3 + 3 * rank if rank else 0)
    plain = re.sub(r"\x1b(\[[0-9;]*m?)?", "", str(message))  # torch has some of its errors in bold
    print("error: " + " ".join(plain.split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


def say(message):
    """Print a line on rank 0, above any progress bar."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(str(message), file=sys.stdout)
        sys.stdout.flush()


def some(names, most=5):
    """The first few of many names, as text for a message."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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
    folds: np.ndarray
    folding: str  # fingerprint of images, splits and folds, whatever the labels; None without folds
    mask_classes: list
    metric: str
    metric_reason: str
    ordinal: bool
    mean: list
    std: list
    fit: str
    ignore: int
    leakage: dict
    fingerprint: str  # of images, labels, splits, classes and geometry: runs on other data are other runs
    drawn: bool = False  # the built-in demo, whose scores say nothing about medical images

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


def prepare_module():
    """prepare.py, which stands beside the stages: where a stage alone was copied, it is said to be missing."""
    if not Path(__file__).with_name("prepare.py").exists():
        fail("image files are read by prepare.py, which is not beside this script: copy it here too")
    import prepare
    return prepare


def run_prepare(folder, *command):
    """Prepare a folder, if it is not there: by one process of a machine, the others wait."""
    barrier()
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not (Path(folder) / "images.npy").exists():
        prepare_module().main([*map(str, command), "--output", str(folder)])
    barrier()


def read_columns(file):
    """{head: the cells of its column} of labels.csv; and the fingerprint of its text."""
    text = file.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    try:
        rows = list(csv.reader(io.StringIO(text.decode())))
    except (UnicodeDecodeError, csv.Error) as error:
        fail(f"{file} cannot be read as a UTF-8 CSV ({error})")
    head = rows[0] if rows else []
    rows = [row for row in rows[1:] if row]
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
        present = set(columns["label"])
        whole = all(name.lstrip("-").isdigit() for name in present)  # 10 comes after 2
        classes = classes or sorted(present, key=int if whole else str)
        unknown = sorted(present.difference(classes))
        if unknown:
            image = columns["image"][columns["label"].index(unknown[0])]
            fail(f"{file}: label {unknown[0]!r} of {image} is none of {some(classes, 30)}; mend it, or name it in "
                 "dataset.json")
        index = {name: i for i, name in enumerate(classes)}
        return "classes", classes, np.array([index[name] for name in columns["label"]], np.int64), whole
    if not names:
        return None, [], None, False
    if classes and sorted(classes) != sorted(names):
        fail(f"{file}: the columns {some(names, 30)} are not the classes of dataset.json, {some(classes, 30)}")
    classes = classes or names
    cells = np.array([columns[name] for name in classes], "U2")
    wrong = np.argwhere((cells != "0") & (cells != "1"))
    if len(wrong):
        k, i = wrong[0]
        fail(f"{file}: {columns[classes[k]][i]!r} in the column {classes[k]!r} of {columns['image'][i]} is neither 0 nor 1")
    labels = np.ascontiguousarray((cells == "1").T, np.float32)
    return "multilabel", classes, labels, False


def read_arrays(folder):
    """(images, masks or None, dataset.json or {}) of a prepared folder, the arrays mapped."""
    for name in ("images.npy", "labels.csv"):
        if not (folder / name).is_file():
            source = f"demo --output {DEMO}" if folder == Path(DEMO) else "SOURCE --output data/NAME"
            fail(f"--data {folder}: no prepared folder, it has no {name}; make one: python prepare.py {source}")
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
    return images, masks, meta


def open_dataset(folder):
    """The Dataset of a prepared folder. images.npy and labels.csv suffice; what dataset.json would say is then derived:
    classes in sorted order, mean and std measured on train."""
    folder = Path(folder)
    file = folder / "labels.csv"
    images, masks, meta = read_arrays(folder)
    gc.disable()  # it would walk the rows of a large table over and over, and find no cycle in them
    columns, digest = read_columns(file)
    count = len(columns["image"])
    if count != len(images):
        fail(f"{file} has {count} rows, images.npy {len(images)} images; row i must describe image i")
    task, classes, labels, ordinal = read_targets(file, columns, meta.get("classes"))
    gc.enable()
    split = np.array(columns["split"])
    unknown = [str(name) for name in np.unique(split) if name not in ("", *SPLITS)]
    if unknown:
        image = columns["image"][columns["split"].index(unknown[0])]
        fail(f"{file}: split {unknown[0]!r} of {image} is none of train, val, test, or blank for an image that no stage "
             "shall see")
    rows = {name: np.flatnonzero(split == name) for name in SPLITS}
    sizes = np.full((count, 2), images.shape[1], np.int64)
    if "height" in columns and "width" in columns:
        try:
            sizes = np.array([columns["height"], columns["width"]]).astype(np.int64).T
        except ValueError as error:
            fail(f"{file}: height and width must be whole numbers ({error})")
    groups = None
    if "group" in columns:  # a blank one is a group of its own
        groups = [group or path for group, path in zip(columns["group"], columns["image"])]
    folds, folding = None, None
    if "fold" in columns:
        assigned = repr([columns[name] for name in ("image", "split", "fold")])
        folding = hashlib.blake2b(assigned.encode(), digest_size=8).hexdigest()
        try:
            folds = np.array([int(cell or -1) for cell in columns["fold"]])
        except ValueError as error:
            fail(f"{file}: folds must be whole numbers, or blank for an image in none ({error})")
    mask_classes = meta.get("mask_classes") or (["background", "lesion"] if masks is not None else [])
    geometry = [images.shape, meta.get("fit"), classes, mask_classes, meta.get("ignore"), meta.get("masks")]
    digest.update(json.dumps(geometry).encode())
    known = rows["train"] if len(rows["train"]) else np.arange(count)  # an external test set has no others
    metric, reason = meta.get("metric"), "the dataset's"
    ordinal = meta.get("ordinal", ordinal)
    if not metric:
        metric, reason = fitting_metric(task, classes, None if task is None else labels[known], ordinal)
    mean, std = meta.get("mean"), meta.get("std")
    if not mean:
        mean, std = measure(images, known)
    return Dataset(
        folder=folder, name=meta.get("name") or folder.resolve().name, images=images, masks=masks,
        paths=list(columns["image"]), sizes=sizes, rows=rows, task=task, classes=classes, labels=labels,
        groups=groups, folds=folds, folding=folding, mask_classes=mask_classes,
        metric=metric, metric_reason=reason, ordinal=ordinal, mean=mean, std=std, fit=meta.get("fit", "squash"),
        ignore=meta.get("ignore"), leakage=meta.get("leakage", {}), fingerprint=digest.hexdigest(),
        drawn=meta.get("layout") == "demo")


def fitting_metric(task, classes, labels, ordinal):
    """(the headline metric that fits a dataset, why), by the labels of its training images."""
    if task is None:
        return "iou", "of masks"
    if task == "multilabel":
        return "roc_auc", "of several labels"
    if len(classes) == 2:
        return "roc_auc", "of two classes"
    if ordinal:
        return "quadratic_kappa", "of ordered classes"
    counts = np.bincount(labels, minlength=len(classes))
    if counts.max(initial=0) > 1.5 * counts.mean():
        return "recall", "as the largest class has more than 1.5 times its even share"
    return "accuracy", "of classes of like size"


def choose_fold(dataset, fold):
    """Test on a fold, in place: validate on what the split has for val in the others, train on all else in them. An image
    whose split is blank stays unseen."""
    there = [] if dataset.folds is None else np.unique(dataset.folds[dataset.folds >= 0]).tolist()
    if fold not in there:
        fail(f"--fold {fold}: {dataset.folder} has {f'the folds {some(there, 30)}' if there else 'no folds'}; prepare.py "
             "--folds 5 makes them")
    seen = np.sort(np.concatenate(list(dataset.rows.values())))
    seen = seen[dataset.folds[seen] >= 0]
    test = dataset.folds[seen] == fold
    val = np.isin(seen, dataset.rows["val"]) & ~test
    dataset.rows = {"train": seen[~test & ~val], "val": seen[val], "test": seen[test]}


def check_fold(path, seen, dataset, fold):
    """Refuse a model that, or whose start, was trained on another fold of the same data: it has seen what is to be tested.
    seen: [[folding, fold], ...] as its model.pt says."""
    for folding, trained in seen:
        if folding == dataset.folding and folding and trained != fold:
            how = "without --fold" if trained is None else f"with --fold {trained}"
            fail(f"{path} was trained on this data {how}, so that it has seen images of this test; train one for each fold")


def load_dataset(args, splits=SPLITS, labels=False, masks=False):
    """open_dataset of --data with --fold, --metric and --limit; refused where `splits`, labels or masks are missing."""
    if Path(args.data) == Path(DEMO) and Path(__file__).with_name("prepare.py").exists():
        run_prepare(args.data, "demo", "--layout", "demo")
    flag = "--test" if getattr(args, "test", None) else "--data"
    dataset = open_dataset(args.data)
    if args.fold is not None:
        choose_fold(dataset, args.fold)
    check_fold(f"--init {args.init}", args.seen, dataset, args.fold)
    if labels and dataset.task is None:
        instead = "; for its masks take segment.py" if dataset.masks is not None else ""
        fail(f"{flag} {args.data} has no labels, which {args.stage}.py needs{instead}")
    if labels and dataset.task == "classes" and len(dataset.classes) < 2 and "train" in splits:
        fail(f"{flag} {args.data} has one class, {dataset.classes[0]}: there is nothing to tell apart")
    if masks and dataset.masks is None:
        fail(f"{flag} {args.data} has no masks, which {args.stage}.py needs: prepare a folder with images/ and masks/")
    counts = ", ".join(f"{count} {name}" for name, count in dataset.counts.items())
    for name in splits:
        if not len(dataset.rows[name]):
            fail(f"{flag} {args.data} has no {name} images, which {args.stage}.py needs; it has {counts}")
    dataset.metric = args.metric or ("iou" if masks else dataset.metric)
    if "train" in splits:
        check_metric(dataset, args.data)
    if args.limit:
        dataset.rows["train"] = limit_images(dataset, "train", args.limit)
    if labels and dataset.task == "classes" and "train" in splits:
        seen = np.bincount(dataset.labels[dataset.rows["train"]], minlength=len(dataset.classes))
        unseen = [name for name, count in zip(dataset.classes, seen) if not count]
        if unseen:
            advice = "raise --limit" if args.limit else "leave the class out, or give it training images"
            fail(f"{flag} {args.data}: no training image has the label {some(unseen)}; {advice}")
    counts = ", ".join(f"{count} {name}" for name, count in dataset.counts.items())
    named = f", {len(dataset.classes)} classes ({some(dataset.classes, 14)})" if dataset.classes and not masks else ""
    say(f"{dataset.name}: {counts} images{named}")
    if labels and not args.metric and "train" in splits:
        say(f"headline metric: {dataset.metric}, {dataset.metric_reason} (--metric names another)")
    return dataset


def load_external(args, meta, labels=False, masks=False):
    """load_dataset of --test, seen as the model has seen its own data whose model.pt says `meta`; all is its test split.
    The run counts as one of that model: its start, seed and headline metric, unless --metric names another."""
    if args.image_size != meta["image_size"]:
        fail(f"--image-size {args.image_size}: --test shows a model its images at the {meta['image_size']} pixels of its "
             "training")
    args.data = args.test
    dataset = load_dataset(args, ["test"] if args.split == "test" else [], labels, masks)
    if args.split == "all":
        dataset.rows["test"] = np.sort(np.concatenate(list(dataset.rows.values())))
        if meta.get("split") == dataset.fingerprint:
            say(f"WARNING: {args.test} is what this model was trained on; scores of its training images tell nothing")
    dataset.rows |= {"train": np.zeros(0, np.int64), "val": np.zeros(0, np.int64)}
    if dataset.fit != meta["fit"]:
        say(f"WARNING: {args.test} is prepared by --fit {dataset.fit}, what the model has seen by --fit {meta['fit']}: shapes "
            "differ; prepare it again")
    dataset.mean, dataset.std = meta["mean"], meta["std"]
    dataset.ordinal = meta.get("ordinal", dataset.ordinal)
    dataset.metric = args.metric or meta.get("metric", dataset.metric)
    check_metric(dataset, args.test)
    args.init_label, args.seed = meta["init"], meta.get("seed", args.seed)
    fold = "" if meta.get("fold") is None else f"-f{meta['fold']}"
    args.output = args.output or (f"runs/{args.stage}-{meta['dataset']}-on-{dataset.name}-{args.split}-{args.arch}-"
                                  f"{args.init_label}-s{args.seed}{fold}")
    return dataset


def training_of(meta):
    """What metrics.json of a test elsewhere says of the model's training, as its model.pt has it."""
    return {"trained_on": meta["dataset"], "pretrained_on": meta.get("pretrained_on"), "model_fold": meta.get("fold"),
            "training": {**meta.get("arguments", {}), "split_of_training": meta.get("split")}}


def check_metric(dataset, folder):
    """Refuse quadratic kappa for classes without an order."""
    if dataset.metric == "quadratic_kappa" and not dataset.ordinal:
        fail(f"--metric quadratic_kappa is for ordered classes, and those of {folder} are not; where they are, prepare "
             "it with --classes in their order and --ordinal")


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
    labels = dataset.labels[rows]
    key = np.zeros(len(rows))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        key[members] = (np.arange(len(members)) + 0.5) / len(members)
    return rows[np.sort(np.argsort(key, kind="stable")[:count])]


def outline_of(mask, size, fit, colour):
    """A mask (S, S) bool as draw_grid outlines it over its image, in_proportion at 320: (mask (h, w) bool, colour)."""
    return in_proportion(255 * mask.astype(np.uint8), size, fit, 320) > 127, colour


def measure(images, rows):
    """Mean and standard deviation per channel, [3] each in [0, 1], over up to 1024 rows of images (N, S, S, C)."""
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), 1024)).astype(int)]
    total = np.zeros(3)
    squares = np.zeros(3)
    for row in rows:
        pixels = images[row].reshape(-1, images.shape[3]).astype(np.float64) / 255
        total += pixels.mean(0)
        squares += (pixels ** 2).mean(0)
    mean = total / len(rows)
    std = np.sqrt((squares / len(rows) - mean ** 2).clip(0)).clip(1e-3)
    return mean.round(4).tolist(), std.round(4).tolist()


def fit_box(height, width, fit):
    """What a square shows of an image, as (top, left, height, width) in its pixels: the whole of it ("squash"), the
    whole with black beside it ("pad"), or the centre square ("crop")."""
    if fit == "squash":
        return 0, 0, height, width
    side = max(height, width) if fit == "pad" else min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def from_square(square, height, width, fit, resample=Image.Resampling.BILINEAR):
    """The inverse of prepare.to_square: (S, S), (S, S, 1) or (S, S, 3), uint8 or float32, at the size and shape of the image:
    (height, width) or (height, width, 3). 0 where the square shows nothing of it."""
    top, left, box_height, box_width = fit_box(height, width, fit)
    image = Image.fromarray(square[..., 0] if square.shape[2:] == (1,) else square)
    image = image.resize((box_width, box_height), resample).crop((-left, -top, width - left, height - top))
    return np.asarray(image)


def in_proportion(square, size, fit, long_side, resample=Image.Resampling.BILINEAR):
    """A square (S, S), (S, S, 1) or (S, S, 3) in the proportions of its source, of size (height, width), for a picture:
    (h, w) or (h, w, 3), the longer of them `long_side`."""
    height, width = (max(1, round(int(n) * long_side / max(size))) for n in size)
    return from_square(square, height, width, fit, resample)


# ---------------------------------------------------------------- data: the loader --------------------------

def upload(values, device):
    """Numbers or a CPU tensor on the device. On CUDA from pinned memory: any other copy waits for all of the GPU's work."""
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
    def fetch(rows):
        if device.type != "cuda":
            return read_batch(array, rows), None
        torch.cuda.set_device(device)  # a thread starts on GPU 0, and would leave memory of this process there
        with torch.cuda.stream(copy_stream(device)):
            batch = upload(read_batch(array, rows, pin_memory=True), device)
            return batch, torch.cuda.current_stream().record_event()

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(fetch, rows) for rows in batches[:2]]
        for i in range(len(batches)):
            if i + 2 < len(batches):
                waiting.append(pool.submit(fetch, batches[i + 2]))
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
    """Random numbers of one training step, drawn on the CPU for all `total` images of the global batch. Each process keeps
    its own `rows`, so that any number of processes sees the very crops that one would."""

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
    w = torch.sqrt(area * aspect).round()
    h = torch.sqrt(area / aspect).round()
    fits = (w > 0) & (w <= side) & (h > 0) & (h <= side)
    first = fits.int().argmax(1, keepdim=True)
    any_fits = fits.any(1, keepdim=True)
    size = torch.where(any_fits, torch.cat([h.gather(1, first), w.gather(1, first)], 1), float(side))
    free = side - size
    corner = (draws.uniform(2) * (free + 1)).floor().minimum(free)
    return torch.cat([corner, size], 1)


def centre_box(side):
    """The centre 7/8 of a square, on which a classifier is evaluated: (top and left, height and width) in pixels."""
    length = side * 7 // 8
    return (side - length) // 2, length


def resize_weights(start, length, flip, out, size):
    """(B, out, size): row i of sample b mixes output pixel i from the pixels start .. start + length of that sample, by
    the antialiased triangle filter of Pillow and torchvision; in reverse where `flip` (B,) bool."""
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
    batch, height, width, channels = images.shape
    if flips is None:
        flips = torch.zeros(batch, 2, dtype=torch.bool, device=images.device)
    rows = resize_weights(boxes[:, 0], boxes[:, 2], flips[:, 0], side, height)
    columns = resize_weights(boxes[:, 1], boxes[:, 3], flips[:, 1], side, width)
    pixels = images.reshape(batch, height, width * channels).float() / 255
    pixels = torch.bmm(rows, pixels).view(batch, side, width, channels).permute(0, 3, 1, 2)
    return torch.matmul(pixels, columns.transpose(1, 2)[:, None])


FLIPS = {"none": (False, False), "horizontal": (False, True), "vertical": (True, False), "both": (True, True)}


def random_flips(draws, which):
    """(B, 2) bool for crop_resize, upside down and left to right: each with probability 1/2 if `which` of FLIPS has it."""
    return (draws.uniform(2) < 0.5) & upload(FLIPS[which], draws.device)


def random_angles(draws, degrees):
    """(B,) float in radians, uniform within `degrees` to either side; None for 0."""
    return math.pi / 180 * draws.uniform(low=-degrees, high=degrees) if degrees else None


def rotate(images, angles, mode="bilinear"):
    """Turn images (B, C, H, W) float about their centre by angles (B,) in radians, or None; the corners are mirrored."""
    if angles is None:
        return images
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    matrix = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(matrix, images.shape, align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, mode, padding_mode="reflection", align_corners=False)


LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow and torchvision
YIQ = (LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))


def color_jitter(images, draws, strengths, probability=0.8):
    """Brightness, contrast, saturation and hue, changed per sample. images (B, 1 or 3, H, W) in [0, 1].

    Each of the four is linear in RGB (hue: a rotation in YIQ), so a sample needs one 3x3 matrix and one
    offset. Unlike torchvision, the order is fixed and values are clipped once, at the end."""
    chosen = (draws.uniform() < probability).float()
    changes = [chosen * draws.uniform(low=-most, high=most) for most in strengths]
    bright, contrasted, saturated = (1 + change for change in changes[:3])
    turn = changes[3] * 2 * math.pi
    channels = images.shape[1]
    luma = upload(LUMA if channels == 3 else (1.0,), images.device)
    offset = (1 - contrasted) * bright * (images.mean((2, 3)) @ luma)
    matrix = (bright * contrasted)[:, None, None] * torch.eye(channels, device=images.device)
    if channels == 3:
        grey = luma.expand(3, 3)
        matrix = matrix @ (grey + saturated[:, None, None] * (torch.eye(3, device=images.device) - grey))
        cos, sin = turn.cos(), turn.sin()
        zero, one = torch.zeros_like(turn), torch.ones_like(turn)
        rotation = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
        to_yiq = upload(YIQ, images.device)
        to_rgb = upload(torch.linalg.inv(torch.tensor(YIQ)), images.device)
        matrix = to_rgb @ rotation @ to_yiq @ matrix
    flat = torch.baddbmm(offset[:, None, None], matrix, images.flatten(2))
    return flat.clamp_(0, 1).view_as(images)


def normalize(images, mean, std):
    """(B, 1 or 3, H, W) in [0, 1] -> (B, 3, H, W): grey spread over three channels, mean and std removed."""
    mean, std = (upload(values, images.device).view(1, 3, 1, 1) for values in (mean, std))
    return (images - mean) / std


def eval_view(images, image_size, mean, std, whole=False):
    """The centre (or the whole) of images (B, S, S, C) uint8 at image_size: (B, 3, image_size, image_size) float."""
    side = images.shape[1]
    corner, length = (0, side) if whole else centre_box(side)
    boxes = torch.tensor([[corner, corner, length, length]], device=images.device).expand(len(images), 4)
    return normalize(crop_resize(images, boxes.float(), image_size), mean, std)


# ---------------------------------------------------------------- models ------------------------------------

ARCHS = {"deit_tiny": "deit_tiny_patch16_224", "deit_small": "deit_small_patch16_224",
         "deit_base": "deit_base_patch16_224", "resnet18": "resnet18.tv_in1k", "resnet50": "resnet50.tv_in1k",
         "resnet152": "resnet152.tv_in1k"}
DINO_IMAGENET = {"deit_small": "vit_small_patch16_224.dino", "deit_base": "vit_base_patch16_224.dino",
                 "resnet50": "https://dl.fbaipublicfiles.com/dino/dino_resnet50_pretrain/"
                             "dino_resnet50_pretrain.pth"}
NAMED_INITS = ("random", "imagenet", "imagenet-dino", "imagenet-stats")  # --init takes these or a file
HEADS = ("head.", "head_dist.", "fc.", "classifier.")
# what a backbone does not need of a checkpoint: heads, the token of masked patches and their decoder, a text tower
LEFT_OUT = (*HEADS, "cls_classifier.", "distillation_classifier.", "pooler.", "visual.head.", "mask_token", "decoder_",
            "decoder.", "text.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.",
            "text_projection", "logit_scale", "logit_bias")
RENAMES = {  # patterns of others' names, and what timm has for them, in the order of replacement
    r"^(_orig_mod\.)?(module\.)?(model\.)?(backbone\.)?(visual\.trunk\.)?": "",
    # Hugging Face's transformers
    r"^(vit|deit|dinov2|dinov2_with_registers)\.": "",
    r"^embeddings\.patch_embeddings\.projection": "patch_embed.proj", r"^embeddings\.position_embeddings": "pos_embed",
    r"^embeddings\.distillation_token": "dist_token", r"^embeddings\.": "", r"^encoder\.layer\.": "blocks.",
    r"attention\.output\.dense": "attn.proj", r"intermediate\.dense": "mlp.fc1", r"output\.dense": "mlp.fc2",
    "layernorm_before": "norm1", "layernorm_after": "norm2", "^layernorm": "norm",
    r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
    # RadImageNet's ResNet, whose children have numbers
    r"^0\.": "conv1.", r"^1\.": "bn1.", r"^4\.": "layer1.", r"^5\.": "layer2.", r"^6\.": "layer3.", r"^7\.": "layer4."}


def create(arch, num_classes, image_size, **options):
    """A timm model without weights; ViTs get position embeddings for image_size. options: of timm.create_model, such as
    patch_size, pixels of a side of a ViT's patches (None: the architecture's own)."""
    name = ARCHS.get(arch, arch)
    if not timm.is_model(name):
        near = timm.list_models(f"*{arch.split('.')[0].split('_')[0]}*")
        fail(f"--arch {arch}: not one of {some(ARCHS, 9)} and timm has no model of that name"
             + (f"; it has {some(near)}" if near else ""))
    try:
        model = timm.create_model(name, num_classes=num_classes, img_size=image_size, **options)
    except TypeError:  # a CNN takes any size
        options.pop("dynamic_img_size", None)
        chosen = options.pop("patch_size", None)
        model = timm.create_model(name, num_classes=num_classes, **options)
        if chosen:
            fail(f"--patch-size {chosen}: {arch} has no patches of a size to choose, as ViTs have; leave it out")
        return model
    except (AssertionError, ValueError, RuntimeError) as error:
        patches = f" and --patch-size {options['patch_size']}" if options.get("patch_size") else ""
        fail(f"--arch {arch} cannot be built for --image-size {image_size}{patches}: {error}")
    patch = patch_size(model) or 1
    if image_size % patch:
        fail(f"--image-size {image_size} is no multiple of the {patch}-pixel patches of {arch}; "
             f"try {max(1, round(image_size / patch)) * patch}")
    return model


def patch_size(model):
    """Pixels of a side of a ViT's patches, None for a CNN."""
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return max(size) if isinstance(size, tuple) else size  # a tuple in ViTs, a number in XCiTs


def read_checkpoint(path, key=None):
    """(weights, meta) of a model.pt of this project, a state dict of others (.pt, .pth, .bin, .safetensors) or a checkpoint
    that holds one, such as facebookresearch/dino's (`key` "teacher", the default, or "student"). Data only: code in a file
    is refused. meta is what a model.pt says about itself, {} elsewhere."""
    if not Path(path).is_file():
        fail(f"--init {path}: no such file ({', '.join(NAMED_INITS)} are the names that are no files)")
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
    content = content if isinstance(content, dict) else {}
    names = [key] if key else ["teacher", "state_dict", "model", "backbone"]
    parts = [content[name] for name in names if isinstance(content.get(name), dict)]
    if key and not parts:
        fail(f"--init-key {key}: {path} has no such part")
    weights = parts[0] if parts else content
    if not weights or not all(torch.is_tensor(tensor) for tensor in weights.values()):
        fail(f"--init {path}: no weights in it (expected tensors by name, or a dict with state_dict, model or teacher)")
    if not {"stage", "state_dict"} <= content.keys():  # of somebody else, who has other names for arch
        return weights, {}
    return weights, {name: value for name, value in content.items() if name != "state_dict"}


def published_weights(arch, init):
    """Weights {name: tensor} of --init imagenet, imagenet-stats (timm's, supervised) or imagenet-dino (DINO's authors')."""
    name = DINO_IMAGENET.get(arch) if init == "imagenet-dino" else ARCHS.get(arch, arch)
    if name is None:
        fail(f"--init imagenet-dino has weights for {some(DINO_IMAGENET)}, not for {arch}")
    try:
        if name.startswith("https:"):
            return torch.hub.load_state_dict_from_url(name, map_location="cpu", weights_only=True)
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the hub client raises its own, httpx's, urllib's and OS errors
        reason = (str(error).splitlines() or [""])[0][:160]
        fail(f"--init {init}: the weights {name} are not on this machine and cannot be downloaded "
             f"({type(error).__name__}: {reason}); fetch the file where there is a network and pass it as --init FILE")


def classifier_prefixes(model):
    """How the names of a timm model's classifier begin, as a tuple: a distilled DeiT has two."""
    names = model.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def timm_names(weights):
    """Weights {name: tensor} in timm's names, by RENAMES; query, key and value of Hugging Face's transformers are joined."""
    renamed = {}
    for name, tensor in weights.items():
        for theirs, ours in RENAMES.items():
            name = re.sub(theirs, ours, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".attention.attention.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in renamed for part in parts):
            joined = torch.cat([renamed.pop(part) for part in parts])
            renamed[name.replace("attention.attention.query", "attn.qkv")] = joined
    return renamed


def fit_weights(model, weights, source):
    """Weights {name: tensor} as a model wants them: converted by the filter that timm has for its architecture, patch and
    position embeddings resampled, a stem of one channel spread over three, which gives grey images what it gave them."""
    own = model.state_dict()
    kernel = "patch_embed.proj.weight"
    if kernel in weights and kernel in own:
        there = weights[kernel].shape[2:]
        here = own[kernel].shape[2:]
        if there and here and there != here:
            say(f"init {source}: its patches of {there[0]} pixels are resampled to {here[0]} (--patch-size)")
            weights[kernel] = timm.layers.resample_patch_embed(weights[kernel], list(here))
    module = sys.modules[timm.models.model_entrypoint(model.pretrained_cfg["architecture"]).__module__]
    if hasattr(module, "checkpoint_filter_fn"):
        with redirect_stdout(io.StringIO()):  # one prints what it tries
            converted = module.checkpoint_filter_fn(dict(weights), model)
        if "storage_tokens" in weights and "blocks.0.attn.q_bias" not in own:
            # DINOv3's drops the biases for which a model has no place, be they zero or not
            converted |= {name: tensor for name, tensor in weights.items() if name.endswith("qkv.bias") and tensor.any()}
        weights = converted
    places = weights.get("pos_embed")
    if "pos_embed" in own and places is not None and own["pos_embed"].ndim == places.ndim == 3:
        tokens = own["pos_embed"].shape[1]
        side = math.isqrt(tokens)  # images are square
        weights["pos_embed"] = timm.layers.resample_abs_pos_embed(places, [side, side], num_prefix_tokens=tokens - side ** 2)
    for name, tensor in weights.items():
        if name in own and tensor.ndim == own[name].ndim == 4 and (tensor.shape[1], own[name].shape[1]) == (1, 3):
            say(f"init {source}: its stem of one channel is spread over three")
            weights[name] = tensor.expand(-1, 3, -1, -1) / 3
    return weights


def load_backbone(model, weights, source):
    """Copy weights into a model, strictly but for what LEFT_OUT names: a backbone tensor that is missing, left over or of
    another shape is an error that lists them."""
    classifier = classifier_prefixes(model)
    known = tuple(dict.fromkeys((*LEFT_OUT, *classifier)))
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(classifier)}
    weights = timm_names(weights)
    left_out = [f"{part}*" for part in known if any(name.startswith(part) and name not in own for name in weights)]
    trouble = ""
    try:
        weights = fit_weights(model, weights, source)
    except Exception as error:  # mostly as they are of another architecture, as the lists below show
        trouble = f"; timm cannot convert them ({type(error).__name__}: {str(error)[:80]})"
    weights = {name: tensor for name, tensor in weights.items() if name in own or not name.startswith(known)}
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    extra = [name for name in weights if name not in own]
    shapes = [f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
              for name in own if name in weights and own[name].shape != weights[name].shape]
    matched = len(own) - len(missing) - len(shapes)
    wrong = {"missing": missing, "left over": extra, "other shape": shapes}
    if any(wrong.values()):
        fail(f"--init {source} does not fit {type(model).__name__}: {matched} of {len(own)} tensors match; "
             + "; ".join(f"{what}: {some(names)}" for what, names in wrong.items() if names) + trouble)
    model.load_state_dict(weights, strict=False)
    aside = f", left out: {some(left_out, 20)}" if left_out else ""
    say(f"init {source}: {matched} of {len(own)} backbone tensors loaded{aside}")


def build_model(arch, init, image_size, num_classes, seed=0, init_key=None, init_stats=False, **options):
    """A timm model of --arch with the weights of --init, or (init_stats) no more than their statistics; num_classes=0
    gives one whose output is its features. Returns (model, the dataset that its weights come from or None)."""
    torch.manual_seed(seed)
    model = create(arch, num_classes, image_size, **options)
    if init == "random":
        start_as_torchvision(model)
        return model, None
    if init in NAMED_INITS:
        weights, dataset = published_weights(arch, init), "imagenet"
    else:
        weights, meta = read_checkpoint(init, init_key)
        dataset = meta.get("dataset", Path(init).stem)
    load_backbone(model, weights, init)
    if init_stats or init == "imagenet-stats":
        keep_statistics(model)
    return model, dataset


@torch.no_grad()
def keep_statistics(model):
    """Draw each weight matrix anew from a normal distribution of its own mean and standard deviation; norms become 1 and 0,
    biases 0. Statistics are left of pretraining (ST of Matsoukas et al. 2022, section 3; mean-var of Raghu et al. 2019)."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        else:
            std, mean = torch.std_mean(parameter, correction=0)
            parameter.normal_(mean.item(), std.item())
    for module in model.modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.modules.batchnorm._BatchNorm)):
            module.reset_parameters()  # the running statistics of batch norm too


def keep_classifier(model, prefixes, init, classes, task):
    """Take over the tensors that begin with `prefixes` from a model.pt of the same classes; of others, they stay new."""
    weights, meta = ({}, {}) if init in NAMED_INITS else read_checkpoint(init)
    if meta.get("classes") == classes and meta.get("task") == task:
        own = {name: weights[name] for name in model.state_dict() if name.startswith(prefixes)}
        model.load_state_dict(own, strict=False)
        say(f"init {init}: the same classes, so its classifier is trained on")
    elif meta.get("classes"):
        say(f"init {init}: its classes are others ({some(meta['classes'], 14)}), so the classifier begins anew")


def open_backbone(name, dataset, args, like=None):
    """(model, facts, mean and std or {}) of one of --runs: a run folder, a checkpoint, or a name of NAMED_INITS. What it does
    not say itself, such as its arch, is as in the facts `like` of another model, else as args say; random weights
    are then those that the other may have started from."""
    init, label, meta = name, name, {}
    if name not in NAMED_INITS:
        path = Path(name) / "model.pt" if Path(name).is_dir() else Path(name)
        if not path.is_file():
            fail(f"--runs {name}: no model.pt there; give a run folder, a checkpoint, or {', '.join(NAMED_INITS)}")
        init = str(path)
        label = path.resolve().parent.name if path.name == "model.pt" else path.stem
        meta = {"num_classes": 0, **read_checkpoint(path, args.init_key)[1]}
        check_fold(f"--runs {name}", meta.get("seen", []), dataset, args.fold)
    if meta.get("task") == "masks":
        meta["num_classes"] = 0  # segment.py's backbones are built so, and random weights depend on it
    known = {"arch": args.arch, "image_size": args.image_size, "patch_size": args.patch_size, "num_classes": 0,
             "seed": args.seed, **(like or {}), **meta}
    model, pretrained_on = build_model(known["arch"], init, known["image_size"], known["num_classes"], known["seed"],
                                       args.init_key, patch_size=known["patch_size"])
    model.reset_classifier(0)  # built with it, as one of another size would draw other random weights
    facts = {"run": name, "name": label, "arch": known["arch"], "init": init_label(init, meta),
             "pretrained_on": pretrained_on, "image_size": known["image_size"], "patch_size": known["patch_size"],
             "num_classes": known["num_classes"], "seed": known["seed"]}
    return model.eval(), facts, {key: known[key] for key in ("mean", "std") if key in known}


def start_as_torchvision(model):
    """Set the last norm of each block of a ResNet to 1. timm's start of 0 hides nearly all convolutions of an untrained
    network from its features."""
    for block in model.modules():
        if isinstance(block, (timm.models.resnet.BasicBlock, timm.models.resnet.Bottleneck)):
            last = block.bn3 if hasattr(block, "bn3") else block.bn2
            torch.nn.init.ones_(last.weight)


def load_trained(path):
    """A classifier of finetune.py: (model in eval mode, meta)."""
    weights, meta = read_checkpoint(path)
    if meta.get("task") == "masks":
        fail(f"{path} is a segmenter, of segment.py, and no classifier; for masks of new images take segment.py --predict")
    if not meta.get("classes"):
        fail(f"--init {path}: not the model.pt of a finetune.py run, which knows its classes")
    model = create(meta["arch"], meta["num_classes"], meta["image_size"], patch_size=meta.get("patch_size"))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        fail(f"--init {path} does not fit {meta['arch']}: {error}")
    return model.eval(), meta


def to_device(model, run):
    """Move a model; CNNs go channels-last, which the convolutions of CPUs and GPUs both want."""
    cnn = not hasattr(model, "patch_embed")
    return model.to(run.device, memory_format=torch.channels_last if cnn else torch.preserve_format)


@torch.no_grad()
def avoid_small_maps(model, sizes, run, args):
    """Turn bf16 off, said, where training a model on images of some sizes would go wrong on a CPU: in bf16, oneDNN's
    convolutions leave the gradient of weights that meet nothing but padding uninitialised (seen with torch 2.14)."""
    if run.amp != "bf16" or run.device.type != "cpu":
        return
    small = set()

    def look(conv, inputs):
        kernel, side = conv.kernel_size[0], min(inputs[0].shape[2:])
        if kernel > 1 and side < max(kernel // 2, conv.stride[0]):
            small.add(f"{kernel}x{kernel} on {side}x{side}")

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    training = model.training
    model.eval()
    for size in sizes:
        model(torch.zeros(1, 3, size, size))
    model.train(training)
    for hook in hooks:
        hook.remove()
    if small:
        run.amp = args.amp = "off"
        say(f"note: --amp off: PyTorch's bf16 convolutions on CPUs go wrong on maps this small ({some(sorted(small))})")


def attention_reader(model):
    """A function images (B, 3, H, W) -> [(B, heads, T, T) softmax attention of each block in order], read with timm's
    AttentionExtract; rows are queries, the last patch_embed.grid_size tokens the patches. None for a model without
    such blocks. Build models after timm.layers.set_fused_attn(False): fused attention forms no map."""
    names = [name for name, _ in model.named_modules() if fnmatch(name, "blocks.*.attn.attn_drop")]
    if not names or not hasattr(getattr(model, "patch_embed", None), "grid_size"):
        return None
    extractor = timm.utils.AttentionExtract(model, names=names, method="hook")
    patches = math.prod(model.patch_embed.grid_size)

    def is_attention(maps, count):  # within windows or across channels it has other shapes
        square = maps.shape[0] == count and maps.shape[2] == maps.shape[3]
        over_patches = 0 <= maps.shape[3] - patches < 16
        return square and over_patches and (maps[:1].float().sum(3) - 1).abs().max() < 0.05

    @torch.inference_mode()
    def read(images):
        blocks = list(extractor(images).values())
        if len(blocks) < len(names) or not all(is_attention(maps, len(images)) for maps in blocks):
            fail(f"{type(model).__name__} has no softmax attention of every patch over all patches; "
                 "take a plain ViT, such as deit_small")
        return blocks
    return read


def as_map(model, x):
    """Features of a timm model as a map (B, C, h, w): a ViT's patch tokens, the last of (B, T, C), put back in their places,
    channels-last maps turned."""
    if x.ndim == 4:
        return x.permute(0, 3, 1, 2) if x.shape[3] == model.num_features != x.shape[1] else x
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", 0)
    side = math.isqrt(patches)  # images are square
    if not 0 < side ** 2 == patches <= x.shape[1]:
        fail(f"{type(model).__name__} gives no map of its patches; take a CNN or a plain ViT, such as deit_small")
    return x[:, -patches:].transpose(1, 2).unflatten(2, (side, side))


@torch.inference_mode()
def outputs(function, dataset, rows, image_size, run, batch_size=128):
    """function(images as evaluation sees them) -> (B, D), of rows of a dataset: (n, D) float32, in their order, on the CPU
    of every process."""
    batches = shards(rows, run, batch_size)
    parts = []
    loader = load_batches(dataset.images, batches, run.device)
    for images in tqdm(loader, "evaluating", len(batches), leave=False, disable=run.rank > 0):
        view = eval_view(images, image_size, dataset.mean, dataset.std)
        with run.autocast():
            parts.append(function(view).float())
    if not parts:  # there are more processes than rows: as wide as those of the others
        parts.append(function(torch.zeros(1, 3, image_size, image_size, device=run.device)).float()[:0])
    return gather_rows(torch.cat(parts), len(rows), run)


def nearest(train, queries, k, tile=2 ** 26):
    """Yield (products, rows) of the k rows of train (N, D) with the largest products with each query (M, D).

    Both are (m, k), largest first, float32 and int64, block after block of m queries; a block has at most
    256, and about `tile` products (default 2^26, 0.25 GB). A block meets the training images in slabs, and
    group g is the g-th image of every slab. The k largest stand in the k groups with the largest maxima, so
    only these are sorted: about 2 sqrt(N k) numbers a query in place of N."""
    slabs = math.isqrt(len(train) // k)
    groups = math.ceil(len(train) / slabs)
    block = max(1, min(256, tile // len(train), len(queries)))
    memory = queries.new_empty(slabs * groups * block)  # one for all blocks: fresh memory costs page faults
    for query in queries.split(block):
        products = memory[:slabs * groups * len(query)].view(slabs, groups, len(query))
        products[-1] = -math.inf  # the last slab may be short
        maxima = products[-1].clone()
        for slab, part in zip(products, train.split(groups)):
            torch.mm(part, query.T, out=slab[:len(part)])
            torch.maximum(maxima, slab, out=maxima)  # while it is in the CPU's cache
        chosen = maxima.T.topk(k, sorted=False).indices
        candidates = products.gather(1, chosen.T.expand(slabs, -1, -1)).permute(2, 0, 1).flatten(1)
        values, place = candidates.topk(k)
        yield values, chosen.gather(1, place % k) + place.div(k, rounding_mode="floor") * groups


@torch.inference_mode()
def vote(train, labels, queries, ks, temperature, tile=2 ** 26):
    """Class shares of the k nearest training images for every k.

    train (N, D) and queries (M, D) float32, L2-normalised; labels (N, C) float32, one-hot or multilabel.
    For each query the k largest cosines s vote for their labels with weight exp(s / temperature); the shares
    are divided by the weights' sum. Returns {k: (M, C) float32 on the CPU}. `tile` as in nearest()."""
    shares = {k: [] for k in ks}
    for best, where in nearest(train, queries, max(ks), tile):
        weights = ((best - best[:, :1]) / temperature).exp()  # the largest is 1, whatever the temperature
        for k in ks:
            weight = weights[:, None, :k]
            shares[k].append((weight @ labels[where[:, :k]])[:, 0] / weight.sum(2))
    return {k: torch.cat(parts).cpu() for k, parts in shares.items()}


def vote_on(features, dataset, ks, temperature, device):
    """{"val" and "test": {k: class shares (n, C) float64}} of the features {split: (n, D)} by votes of train."""
    unit = {name: torch.nn.functional.normalize(values, dim=1).to(device) for name, values in features.items()}
    labels = torch.from_numpy(dataset.labels[dataset.rows["train"]])
    if dataset.task == "classes":
        labels = torch.nn.functional.one_hot(labels, len(dataset.classes))
    labels = labels.float().to(device)
    scores = {}
    for name in ("val", "test"):
        shares = vote(unit["train"], labels, unit[name], ks, temperature)
        scores[name] = {k: values.double().numpy() for k, values in shares.items()}
    return scores


class SyncBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """Batch norm over the global batch for processes on CPUs, where PyTorch has none. x (B, C, ...), B the same on all."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        """x normalised by the statistics of all processes' batches."""
        if not self.training:
            return super().forward(x)
        world = dist.get_world_size()
        x32 = x.float()
        axes = [0, *range(2, x.ndim)]  # all but the channels
        moments = torch.stack([x32.mean(axes), (x32 * x32).mean(axes)])
        mean, square = torch.distributed.nn.functional.all_reduce(moments) / world
        variance = square - mean * mean
        count = x.numel() / x.shape[1] * world
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x32 * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(x.dtype)


def sync_batch_norm(model, run):
    """Batch statistics over the global batch, so that results do not depend on how many processes share it."""
    if run.world == 1:
        return model
    if run.device.type == "cuda":
        return timm.layers.convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm) in (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d):
                synced = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum)
                synced.__dict__.update(norm.__dict__)  # the very parameters, which an optimizer may hold already
                setattr(parent, name, synced)
            elif isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
                fail(f"{type(norm).__name__} has no version for several CPU processes; use one process, or GPUs")
    return model


def distribute(model, run, compiled=False):
    """A model for training on all processes: batch norm over the global batch, gradients averaged, maybe compiled."""
    model = sync_batch_norm(model, run)
    if run.world > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    return torch.compile(model) if compiled else model


# ---------------------------------------------------------------- the run: start and end --------------------

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
    """Whether bf16 is quick on a device: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX. Others emulate it, very slowly."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)


def keep_freed_memory():
    """Tell glibc to keep what is freed: large tensors go back to the system otherwise, and the next fault in page by page."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink
        libc.mallopt(-4, 0)   # M_MMAP_MAX: no mapping of its own for a large tensor, undone with it


def start(args):
    """Set up device, precision and, under torchrun, the process group: a Run."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, neighbours = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    mps = torch.backends.mps.is_available() and world == 1  # gloo has none
    usable = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    kind = args.device if args.device != "auto" else next(name for name, there in usable.items() if there)
    if not usable[kind]:
        fail(f"--device {kind}: PyTorch {torch.__version__} sees no such device here; use --device auto or cpu")
    device = torch.device(kind)
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            fail(f"--nproc_per_node {neighbours}: this machine has {torch.cuda.device_count()} GPUs")
        device = torch.device(kind, local)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    elif kind == "cpu":
        if world > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // neighbours))
        keep_freed_memory()
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))  # one may prepare a dataset while the rest wait
    amp = args.amp if args.amp != "auto" else "bf16" if has_fast_bf16(device) else "off"
    if amp == "fp16" and kind != "cuda":
        fail("--amp fp16 needs a CUDA device; use bf16 or off")
    args.amp = amp  # a run is resumed at the precision that it had
    # in bf16 on CPUs two products and a softmax beat the fused kernel 3 to 6 times; in fp32 it is the faster
    timm.layers.set_fused_attn(kind != "cpu" or amp != "bf16")
    return Run(rank, world, device, amp)


def barrier():
    """Wait for all processes, if there are several."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # on the CPU's group, which takes no GPU memory


def launch(main, again="the same command goes on, a training from its last finished epoch"):
    """Run a stage's main; Ctrl-C, or a plain kill, ends it with a line instead of a traceback."""
    if "RANK" not in os.environ:  # torchrun ends its own
        signal.signal(signal.SIGTERM, signal.default_int_handler)
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


def checked_mean(total, count, step, epoch, output, run):
    """total / count, the mean over processes of what was summed up to `step` (0, 1, ...); ends the run if it is not finite."""
    mean = all_reduce_mean(total / count, run)
    if not torch.isfinite(mean).all():
        fail(f"the loss is not finite by step {step + 1} (epoch {epoch + 1}); the last good checkpoint is "
             f"{output}/checkpoint.pt; lower --lr, or try --amp off")
    return mean


def own_share(total, run, what="--batch-size"):
    """The rows of a global batch of `total` that belong to this process, (total / world,)."""
    if total % run.world:
        fail(f"{what} {total} is global and does not divide among {run.world} processes; "
             f"take {total - total % run.world or run.world}")
    return np.arange(run.rank, total, run.world)  # no tensor: NumPy takes one of one element for a number


def gather_rows(part, total, run):
    """Put rows rank, rank + world, ... of every process back in order: (total, ...) on the CPU, each row once."""
    part = part.cpu()
    if run.world == 1:
        return part
    most = math.ceil(total / run.world)
    padded = torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(run.world)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:total]


def optimizer_step(loss, optimizer, scaler, clip_grad):
    """One step down the gradient of a loss, whose norm is clipped (0: not)."""
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    if clip_grad:
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_grad)
    scaler.step(optimizer)
    scaler.update()


def parameter_groups(model, weight_decay=0.0, layer_decay=1.0):
    """What asks for gradients: weights with decay, then biases and norms without; with a layer_decay below 1 such groups
    for each layer, whose "lr_scale" is that to the power of the layers above it (Clark et al. 2020; Bao et al. 2022)."""
    if layer_decay < 1:
        return param_groups_layer_decay(model, weight_decay, layer_decay=layer_decay)
    wanted = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in wanted if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in wanted if p.ndim <= 1], "weight_decay": 0.0}]


def start_training(model, args, run, folder, layer_decay=1.0):
    """(optimizer, scaler, parts of a checkpoint, log) of fine-tuning: Adam, no decay of biases and norms, resumed if begun."""
    optimizer = torch.optim.Adam(parameter_groups(model, args.weight_decay, layer_decay), lr=args.lr,
                                 fused=run.device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp == "fp16")
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    return optimizer, scaler, parts, resume(folder, run, parts)


def score_log(log, metric):
    """Set "score", which chooses the best entry: validation's metric or, if one lacks it, minus the loss for all."""
    undefined = any(entry["val"][metric] is None for entry in log)
    for entry in log:
        entry["score"] = -entry["val"]["loss"] if undefined else entry["val"][metric]


def waited(log):
    """Epochs since the best of a log."""
    scores = [entry["score"] for entry in log]
    return len(log) - 1 - scores.index(max(scores)) if log else 0


def epochs_left(log, args):
    """Yield the epochs that a log, which grows meanwhile, still lacks; --patience ends them early."""
    for epoch in range(len(log), args.epochs):
        if args.patience and waited(log) >= args.patience:
            say(f"validation has not improved for {args.patience} epochs, so training ends here")
            return
        yield epoch


def end_epoch(entry, log, parts, weights, dataset, args, run, **own):
    """Add an epoch to the log, {"epoch", "loss", "val" (metrics), "images_per_second", "seconds"}, and save: model.pt if
    validation, by the headline or minus its loss where that is undefined, is the best so far; then the checkpoint."""
    values = entry["val"]
    if not math.isfinite(values["loss"]):
        fail(f"the loss on validation is not finite after epoch {entry['epoch']}; lower --lr, or try --amp off")
    headline = values[dataset.metric]
    log.append(entry)
    score_log(log, dataset.metric)
    best = waited(log) == 0
    folder = Path(args.output)
    if run.rank == 0:  # model.pt first: were we killed between the two, the epoch would run again
        if best:
            save_model(folder / "model.pt", weights, dataset, args, **own)
        save_checkpoint(folder, parts, log)
    say(f"epoch {entry['epoch']}/{args.epochs}  loss {entry['loss']:.4f}  val loss {values['loss']:.4f}  val "
        f"{dataset.metric} {show(headline)}{' *' if best else ''}  {entry['images_per_second']:.1f} images/s")


def cosine(start, end, count):
    """(count,) float64: from start down, or up, towards end along half a cosine."""
    return end + (start - end) * (1 + np.cos(np.pi * (np.arange(count) / max(1, count)))) / 2


def warmup_cosine(peak, end, steps, warmup, first=1):
    """The learning rate of each of `steps`: linear from peak * first / warmup, then a cosine from peak to end."""
    return np.concatenate([peak * np.arange(first, warmup + first) / max(1, warmup), cosine(peak, end, steps - warmup)])


# ---------------------------------------------------------------- the run: arguments and files --------------

def make_parser(description):
    """The arguments that every stage has, in the groups data, model and run: (parser, groups by name)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (--help lists all arguments)")
    data, model, run = (parser.add_argument_group(name) for name in ("data", "model", "run"))
    data.add_argument("--data", default=DEMO, metavar="DIR",
                      help=f"a folder that prepare.py has made (default {DEMO}, which makes itself)")
    data.add_argument("--fold", type=int, metavar="K",
                      help="test on fold K of prepare.py --folds, validate on val of the others, train on their rest")
    data.add_argument("--limit", type=int, help="use N training images, classes in proportion")
    data.add_argument("--metric", choices=METRICS, help="headline metric (default: the dataset's)")
    model.add_argument("--image-size", type=int,
                       help="pixels of a side, as models see images (default that of --init, or 224 as in the paper)")
    model.add_argument("--patch-size", type=int,
                       help="pixels of a side of a ViT's patches (default that of --init, or the architecture's own); small "
                       "images want small ones, e.g. 4 for 28 pixels")
    model.add_argument("--arch", help=f"{', '.join(ARCHS)} or any timm name (default that of --init, or deit_small)")
    model.add_argument("--init", default="random", help=f"{', '.join(NAMED_INITS)}, or a checkpoint file")
    model.add_argument("--init-stats", action="store_true", default=None,
                       help="of --init take only the mean and standard deviation of each weight matrix, and draw it anew")
    model.add_argument("--init-key", help="part of a checkpoint to take, e.g. student (default teacher or model)")
    run.add_argument("--output", help="run folder (default runs/STAGE-DATASET-ARCH-INIT-sSEED, -fK of a fold)")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    run.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"],
                     help="mixed precision (auto: bf16 where the hardware has it)")
    run.add_argument("--compile", action="store_true", help="torch.compile the model")
    run.add_argument("--overwrite", action="store_true", help="replace another run in --output")
    return parser, {"data": data, "model": model, "run": run}


def add_views(train, flips):
    """The arguments of augmentation that all training shares."""
    train.add_argument("--flips", default=flips, choices=list(FLIPS),
                       help=f"with probability 1/2 each (default, paper: {flips}); an upside-down chest is no chest")
    train.add_argument("--rotate", type=float, default=0, metavar="DEGREES",
                       help="turn by up to so much to either side, corners mirrored (default, paper: 0)")


def add_training(parser, groups, batch_size, scale):
    """The arguments of training that finetune.py and segment.py share."""
    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=int, default=50)
    train.add_argument("--patience", type=int, default=0, metavar="N",
                       help="end when validation has not improved for N epochs (default 0: never)")
    train.add_argument("--batch-size", type=int, default=batch_size, help=f"over all processes (default {batch_size})")
    train.add_argument("--lr", type=float, default=1e-4, help="peak learning rate of Adam (default, paper: 1e-4)")
    train.add_argument("--min-lr", type=float, default=1e-6, help="where the cosine ends (default, paper: 1e-6)")
    train.add_argument("--weight-decay", type=float, default=1e-5,
                       help="not on biases and norms (default, paper: 1e-5)")
    train.add_argument("--warmup-steps", type=int, default=500,
                       help="linear (default 500, paper 500 to 1000), at most a quarter of all steps")
    train.add_argument("--clip-grad", type=float, default=1.0, help="gradient norm (default, paper: 1; 0: off)")
    train.add_argument("--scale", type=float, nargs=2, default=scale, metavar=("LOW", "HIGH"),
                       help=f"area of the random crop (default {scale[0]} {scale[1]})")
    train.add_argument("--jitter", type=float, nargs=4, default=[0.2, 0.2, 0.1, 0.1], metavar=tuple("BCSH"),
                       help="brightness, contrast, saturation, hue (default, paper: 0.2 0.2 0.1 0.1)")
    add_views(train, "both")
    groups["run"].add_argument("--predict", metavar="FOLDER_OR_CSV",
                               help="no training: what the model of --init says of these images")
    groups["run"].add_argument("--test", metavar="DIR", help="no training: the model of --init on another prepared folder")
    groups["run"].add_argument("--split", default="test", choices=["test", "all"], help="--test: of its images (default test)")
    groups["run"].add_argument("--skip-broken", action="store_true", help="--predict: leave out what cannot be decoded")
    return train


def parse(parser, stage):
    """Read the command line of a stage, check what can be checked without data, fill the defaults that hang together."""
    args = parser.parse_args()
    args.stage = stage
    args.defaults = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    at_least = {"image_size": 1, "patch_size": 1, "limit": 1, "epochs": 1, "batch_size": 1, "lr": 0, "weight_decay": 0,
                "warmup_steps": 0, "clip_grad": 0, "min_lr": 0, "seed": 0, "rotate": 0, "patience": 0, "accumulate": 1,
                "local_crops": 0, "koleo": 0, "probe_every": 0, "teacher_temp": 1e-6, "student_temp": 1e-6}
    for name, low in at_least.items():
        value = getattr(args, name, None)
        if value is not None and not value >= low:  # which a NaN is not either
            fail(f"--{name.replace('_', '-')} {value}: must {f'be at least {low}' if low else 'not be negative'}")
    for name in ("scale", "global_scale", "local_scale"):
        low, high = getattr(args, name, None) or (1, 1)
        if not 0 < low <= high <= 1:
            fail(f"--{name.replace('_', '-')} {low} {high}: expected 0 < LOW <= HIGH <= 1")
    if args.init_stats and args.init in ("random", "imagenet-stats"):
        fail(f"--init-stats goes with weights, not with --init {args.init}: take imagenet, imagenet-dino or a file")
    given = [f"--{name}" for name in ("predict", "test") if getattr(args, name, None)]
    if len(given) > 1:
        fail("take either --predict or --test")
    if getattr(args, "split", "test") != "test" and "--test" not in given:
        fail(f"--split {args.split} is for --test")
    if given and (args.init in NAMED_INITS or args.init_stats):
        fail(f"{given[0]} needs --init RUN/model.pt, a model that {stage}.py has trained")
    meta = {}
    args.init_digest = None
    if args.init not in NAMED_INITS:
        if Path(args.init).is_dir():  # a run folder
            args.init = str(Path(args.init) / "model.pt")
        _, meta = read_checkpoint(args.init, args.init_key)
        if meta and args.arch and ARCHS.get(args.arch, args.arch) != ARCHS.get(meta["arch"], meta["arch"]):
            fail(f"--init {args.init} holds a {meta['arch']}, not the {args.arch} of --arch")
        args.init_digest = digest_of(args.init)
    args.arch = args.arch or meta.get("arch") or "deit_small"
    args.image_size = args.image_size or meta.get("image_size") or 224
    args.patch_size = args.patch_size or meta.get("patch_size")
    args.init_label = init_label(args.init, meta) + ("-stats" if args.init_stats else "")
    args.seen = meta.get("seen", [])
    return args


def digest_of(file):
    """A fingerprint of what is in a file."""
    return hashlib.blake2b(np.memmap(file, mode="r"), digest_size=8).hexdigest()


def init_label(init, meta):
    """A short name of --init for folders and tables: "dino" for a model.pt of pretrain_dino.py ("imagenet+dino" if it
    started there), "finetuned" for one of finetune.py, the file's name for a checkpoint of somebody else's."""
    if init in NAMED_INITS:
        return init
    if "stage" not in meta:
        return Path(init).stem
    before = "" if meta.get("init") in (None, "random") else meta["init"] + "+"
    made = {"pretrain_dino": "dino", "finetune": "finetuned", "segment": "segmenter"}
    return before + made.get(meta["stage"], Path(init).stem)


def versions():
    """Versions of Python and of the packages that decide results."""
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "timm": timm.__version__, "numpy": np.__version__, "pillow": Image.__version__}


def device_name(device):
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)"


RUN_FILES = ["args.json", "log.jsonl", "checkpoint.pt", "model.pt", "predictions.csv", "metrics.json"]
# these change no result (of a device what matters is its precision, --amp); the data are compared by their fingerprint
NOT_COMPARED = {"output", "overwrite", "device", "predict", "skip_broken", "on_collapse", "export", "data", "seen", "defaults"}


def open_run(args, run, dataset, own_files=()):
    """Make the run folder, fresh or to be resumed, lock it for as long as this process lives and write args.json. Ends
    the script if the same run is complete. A folder that holds a run with other arguments or on other data is an error
    naming them, unless --overwrite, which removes the files of that run, among them the stage's `own_files`."""
    fold = "" if args.fold is None else f"-f{args.fold}"
    folder = Path(args.output or f"runs/{args.stage}-{dataset.name}-{args.arch}-{args.init_label}-s{args.seed}{fold}")
    args.output = str(folder)
    if folder.exists() and not folder.is_dir():
        fail(f"--output {folder} is a file, not a folder")
    there = any((folder / name).exists() for name in RUN_FILES[1:])
    if there and args.overwrite and not (folder / "args.json").exists():
        fail(f"{folder} holds no run of this project, and --overwrite replaces nothing else; give another --output")
    if there and not args.overwrite:
        compare_runs(folder, args, dataset)
        if (folder / "metrics.json").exists():
            summary = json.loads((folder / "metrics.json").read_text()).get("summary", "")
            say(f"{folder} is complete: {summary} (--overwrite runs it again)")
            barrier()
            raise SystemExit(0)
    barrier()  # every process has looked before one of them writes
    if run.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run.lock = filelock.FileLock(folder / ".lock")
            run.lock.acquire(timeout=0)
            for name in [*reversed(RUN_FILES), *own_files] if args.overwrite else []:
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name)
                (folder / name).unlink(missing_ok=True)
        except filelock.Timeout:
            fail(f"{folder} is being written by another process; wait for it, or give another --output")
        except OSError as error:
            fail(f"--output {folder} cannot be written ({error})")
        write_json(folder / "args.json", {
            "stage": args.stage, "arguments": vars(args), "command": shlex.join(sys.argv),
            "data": {"name": dataset.name, "folder": str(dataset.folder), "fingerprint": dataset.fingerprint},
            "versions": versions(), "device": device_name(run.device), "world_size": run.world})
    barrier()
    return folder


def compare_runs(folder, args, dataset):
    """Refuse a folder that holds another run than this one."""
    try:
        stored = json.loads((folder / "args.json").read_text())
        old, data = stored["arguments"], stored.get("data", {})
    except (ValueError, KeyError, OSError) as error:
        fail(f"{folder} holds a run whose args.json cannot be read ({error}); give another --output, or --overwrite")
    here = vars(args)
    old = {**args.defaults, "init_digest": here["init_digest"], **old}  # an argument that is newer than that run
    if old.get("stage") != args.stage:
        fail(f"{folder} holds another run, of {old.get('stage')}; give another --output")
    differ = []
    for name in sorted({*old, *here} - NOT_COMPARED):
        if old.get(name) != here.get(name):
            differ.append(f"{name} {old.get(name)!r} there, {here.get(name)!r} here")
    if differ:
        fail(f"{folder} holds another run: {some(differ)}; give another --output, or --overwrite")
    if data.get("fingerprint") != dataset.fingerprint:
        fail(f"{folder} holds a run on other data: images, labels, splits or classes of {data.get('name')} there are "
             f"not those of {dataset.folder} now; give another --output, or --overwrite")


def write_atomic(path, write):
    """Call write(temporary path of the same suffix), then rename it: a reader sees the old file or the new one, never half."""
    temporary = Path(path).with_suffix(f".partial{Path(path).suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the second on a full disk
        temporary.unlink(missing_ok=True)
        fail(f"{path} cannot be written ({str(error).splitlines()[0]})")


def write_json(path, content):
    """Write a JSON file atomically; numbers that are not finite become null."""
    clean = json.loads(json.dumps(content, default=float), parse_constant=lambda _: None)
    write_atomic(path, lambda part: part.write_text(json.dumps(clean, indent=1) + "\n"))


def write_table(path, head, rows):
    """Write a CSV file atomically."""
    def write(part):
        with open(part, "w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([head, *rows])
    write_atomic(path, write)


def resume(folder, run, parts):
    """Load checkpoint.pt, if there is one, into parts {name: object with load_state_dict}. Returns the log so far."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return []
    try:
        checkpoint = torch.load(path, map_location=run.device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        fail(f"{path} cannot be read ({str(error).splitlines()[0][:120]}); --overwrite starts the run again")
    say(f"resuming {folder} after epoch {checkpoint['log'][-1]['epoch']}")
    return checkpoint["log"]


def save_checkpoint(folder, parts, log):
    """Replace checkpoint.pt by the state of parts {name: object with state_dict}, and log.jsonl by a line an epoch."""
    content = {name: part.state_dict() for name, part in parts.items()}
    write_atomic(folder / "checkpoint.pt", lambda part: torch.save({**content, "log": log}, part))
    write_log(folder, log)


def write_log(folder, log):
    """log.jsonl: a line an entry."""
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    write_atomic(folder / "log.jsonl", lambda part: part.write_text(lines))


def training_facts(model, log):
    """What metrics.json says of a training: {"parameters", "seconds", "images_per_second" (median over epochs)}."""
    return {"parameters": sum(p.numel() for p in model.parameters()), "seconds": sum(entry["seconds"] for entry in log),
            "images_per_second": float(np.median([entry["images_per_second"] for entry in log]))}


def save_model(path, weights, dataset, args, **own):
    """model.pt: weights in timm's names, and what a later stage needs to use them."""
    content = {"stage": args.stage, "arch": args.arch, "init": args.init_label, "dataset": dataset.name,
               "image_size": args.image_size, "patch_size": args.patch_size, "side": dataset.side, "fit": dataset.fit,
               "mean": dataset.mean, "std": dataset.std, "metric": dataset.metric, "ordinal": dataset.ordinal,
               "seed": args.seed, "split": dataset.fingerprint, "fold": args.fold,
               "seen": [*args.seen, [dataset.folding, args.fold]], "arguments": vars(args), **own,
               "state_dict": {name: w.cpu().contiguous() for name, w in weights.items()}}
    write_atomic(path, lambda part: torch.save(content, part))


def write_metrics(folder, dataset, run, args, **own):
    """metrics.json, the last file of a run: what every stage has, and the stage's own."""
    folds = None if args.fold is None else len(np.unique(dataset.folds[dataset.folds >= 0]))
    write_json(folder / "metrics.json", {
        "stage": args.stage, "dataset": dataset.name, "arch": args.arch, "init": args.init_label, "seed": args.seed,
        "image_size": args.image_size, "metric": dataset.metric, "counts": dataset.counts, "split": dataset.fingerprint,
        "fold": args.fold, "folds": folds, "leakage": dataset.leakage, "drawn": dataset.drawn,
        "device": device_name(run.device), "amp": run.amp, "world_size": run.world, **own})
    say(f"written: {folder}")


def predictions_folder(args):
    """Where --predict writes, and that it may."""
    folder = Path(args.output or "predictions")
    if (folder / "args.json").exists() or (folder.exists() and not folder.is_dir()):
        fail(f"--output {folder} holds a training run or is a file; give a new folder for the predictions")
    for name in ("predictions.csv", "masks"):
        if (folder / name).exists() and not args.overwrite:
            fail(f"{folder / name} is there already; give another --output, or --overwrite to replace it")
    return folder


def show(value):
    """A metric for people: four digits, or "undefined"."""
    return "undefined" if value is None else f"{value:.4f}"


def print_table(head, rows):
    """Print rows with aligned columns."""
    rows = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        say("  ".join([first.ljust(widths[0]), *cells]))


# ---------------------------------------------------------------- the run: metrics --------------------------

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
    """Sum over thresholds of (recall step) x precision, as in scikit-learn; None unless both classes are there."""
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


def confusion(labels, predicted, classes):
    """(C, C) counts of class indices (N,): row the true class, column the predicted one."""
    return np.bincount(labels * classes + predicted, minlength=classes ** 2).reshape(classes, classes)


def quadratic_kappa(labels, predicted, classes):
    """Cohen's kappa of class indices (N,), weighted by the squared distance of the classes; None where it is 0 / 0."""
    table = confusion(labels, predicted, classes)
    weight = np.subtract.outer(np.arange(classes), np.arange(classes)) ** 2
    expected = (weight * np.outer(table.sum(1), table.sum(0))).sum() / len(labels)
    return float(1 - (weight * table).sum() / expected) if expected else None


def metric(name, task, labels, scores):
    """One of METRICS. labels (N,) int or (N, L) 0/1; scores (N, C) probabilities. Averages run over the classes that
    the labels hold; None where the metric is not defined on these labels."""
    multilabel = task == "multilabel"
    classes = scores.shape[1]
    predicted = scores > 0.5 if multilabel else scores.argmax(1)
    if name == "accuracy":
        return float((predicted == labels).mean())
    if name == "quadratic_kappa":
        return None if multilabel else quadratic_kappa(labels, predicted, classes)
    truth = labels > 0.5 if multilabel else labels[:, None] == np.arange(classes)
    if name in ("roc_auc", "average_precision"):
        function = roc_auc if name == "roc_auc" else average_precision
        columns = [1] if classes == 2 and not multilabel else range(classes)
        return mean_defined([function(truth[:, c], scores[:, c]) for c in columns])
    chosen = predicted if multilabel else predicted[:, None] == np.arange(classes)
    hits, positives, guesses = (truth & chosen).sum(0), truth.sum(0), chosen.sum(0)
    value = {"recall": hits / positives.clip(1), "precision": hits / guesses.clip(1),
             "f1": 2 * hits / (positives + guesses).clip(1)}[name]
    return float(value[positives > 0].mean()) if positives.any() else None


def all_metrics(dataset, labels, scores):
    """Every metric of METRICS that the dataset's task has (quadratic kappa: where the classes are ordered), and
    "undefined": the classes that these labels do not hold."""
    names = [name for name in METRICS if name != "quadratic_kappa" or dataset.ordinal]
    values = {name: metric(name, dataset.task, labels, scores) for name in names}
    if dataset.task == "multilabel":
        lacking = labels.min(0) == labels.max(0)
    else:
        lacking = np.bincount(labels, minlength=len(dataset.classes)) == 0
    return {**values, "undefined": [name for name, lacks in zip(dataset.classes, lacking) if lacks]}


def bootstrap_interval(score, count, groups=None, seed=0, resamples=1000):
    """95 % percentile interval of score(indices) over resampled images (or groups, such as patients): [low, high],
    None where no more than half of the resamples define it."""
    rng = np.random.default_rng(seed)
    values = []
    if groups is not None:
        _, group_of = np.unique(groups, return_inverse=True)
        ends = np.bincount(group_of).cumsum()
        members = np.split(np.argsort(group_of, kind="stable"), ends[:-1])
        count = len(members)
    for _ in range(resamples):
        indices = rng.integers(count, size=count)
        if groups is not None:
            indices = np.concatenate([members[i] for i in indices])
        value = score(indices)
        if value is not None:
            values.append(value)
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) * 2 > resamples else None


def guess(dataset, count):
    """What always guessing says, (count, C) float64: the share of each class or label in train (without one, in test)."""
    labels = dataset.labels[dataset.rows["train"] if len(dataset.rows["train"]) else dataset.rows["test"]]
    if dataset.task == "classes":
        labels = np.eye(len(dataset.classes))[labels]
    return np.tile(labels.mean(0, dtype=np.float64), (count, 1))


def score_test(dataset, scores):
    """all_metrics of the test split, with "interval" for the headline, and what tells a model that says nothing: "guess",
    the headline of always guessing the most frequent class; "beats_guess", whether the interval lies above it;
    "one_class", the class that is predicted for every image or None. scores (n, C), row by row of dataset.rows."""
    rows = dataset.rows["test"]
    labels = dataset.labels[rows]
    values = all_metrics(dataset, labels, scores)
    if dataset.task == "multilabel":
        areas = {name: roc_auc(labels[:, i], scores[:, i]) for i, name in enumerate(dataset.classes)}
        values["roc_auc_by_label"] = areas
        if set(CHEXPERT_FIVE) < set(areas):
            values["roc_auc_competition"] = mean_defined([areas[name] for name in CHEXPERT_FIVE])
            say(f"test roc_auc of {', '.join(CHEXPERT_FIVE)}: {show(values['roc_auc_competition'])}")

    def headline(at):
        return metric(dataset.metric, dataset.task, labels[at], scores[at])
    interval = bootstrap_interval(headline, len(labels), dataset.groups_of(rows))
    guessed = metric(dataset.metric, dataset.task, labels, guess(dataset, len(labels)))
    beats = None if None in (interval, guessed) else interval[0] > guessed
    one_class = None
    if dataset.task == "classes" and len(labels) > 1 and len(set(scores.argmax(1))) == 1:
        one_class = dataset.classes[scores[0].argmax()]
        say(f"WARNING: the model predicts {one_class!r} for every test image")
    elif beats is False:
        say("WARNING: by its interval the model does not beat always guessing the most frequent class")
    return {**values, "interval": interval, "guess": guessed, "beats_guess": beats, "one_class": one_class}


def interval_text(test):
    """The 95 % interval of scores, and what always guessing has, for people."""
    low, high = test["interval"] or (None, None)
    guessed = f"; always guessing: {show(test['guess'])}" if "guess" in test else ""
    return f"95 % interval {show(low)} to {show(high)}{guessed}"


def write_predictions(path, dataset, scores):
    """predictions.csv, a row a test image: image, group, then label, predicted and a probability a class or, multilabel, a
    0/1 column label_NAME and a probability NAME for each. Labels are blank where they are not known. scores (n, C)."""
    multilabel = dataset.task == "multilabel"
    classes = dataset.classes
    lines = []
    for row, score in zip(dataset.rows["test"], scores):
        if multilabel:
            labels = [""] * len(classes) if dataset.labels is None else dataset.labels[row].astype(int).tolist()
        else:
            labels = ["" if dataset.labels is None else classes[dataset.labels[row]], classes[int(score.argmax())]]
        group = dataset.groups[row] if dataset.groups else ""
        lines.append([dataset.paths[row], group, *labels, *(f"{p:.6f}" for p in score)])
    truth = [f"label_{name}" for name in classes] if multilabel else ["label", "predicted"]
    write_table(path, ["image", "group", *truth, *classes], lines)


# ---------------------------------------------------------------- the run: pictures -------------------------

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito 2008


def new_figure(path, width, height, rows=1, columns=1, **spaces):
    """(figure, axes (rows, columns)) of matplotlib for the picture `path`, of width x height inches; without matplotlib
    (None, None), said. spaces: of the axes, as of subplots_adjust, in place of a layout that finds them, which is slow."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        say(f"note: {path} is left out; pictures are drawn by matplotlib, which is missing: pip install matplotlib")
        return None, None
    matplotlib.rcParams.update({  # the $ of a class name begins no formula
        "font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS), "legend.frameon": False, "text.parse_math": False})
    figure = Figure((width, height), dpi=200, layout=None if spaces else "constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw=spaces)


def new_panels(path, count, width, height):
    """(figure, [axis of each panel]) for `count` panels of width x height inches, two a row; (None, []) as new_figure."""
    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure, axes = new_figure(path, width * columns, height * rows, rows, columns)
    if figure is None:
        return None, []
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def save_figure(figure, path):
    """Write a figure atomically, in the format of its suffix."""
    write_atomic(path, lambda part: figure.savefig(part, bbox_inches="tight"))


def draw_curves(path, xlabel, panels):
    """Draw panels [(title, unit, {label: (x, y)})] side by side: a line for each label, of few points with markers."""
    figure, axes = new_figure(path, 3.4 * len(panels), 2.8, 1, len(panels))
    if figure is None:
        return
    for axis, (title, unit, lines) in zip(axes[0], panels):
        for label, (x, y) in lines.items():
            axis.plot(x, y, marker="o" if len(x) < 9 else None, markersize=4, label=label)
        axis.set(title=title, xlabel=xlabel, ylabel=unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(axis="y", color="#dddddd")
        axis.legend()
    save_figure(figure, path)


def draw_training(path, log, loss, metric, x="epoch"):
    """curves.png of fine-tuning: the losses and the validation score by epoch, or what else the entries count by."""
    epochs = [entry[x] for entry in log]
    losses = {"train": (epochs, [entry["loss"] for entry in log]),
              "validation": (epochs, [entry["val"]["loss"] for entry in log])}
    scores = {"validation": (epochs, [math.nan if entry["val"][metric] is None else entry["val"][metric] for entry in log])}
    draw_curves(path, x, [("loss", loss, losses), (f"validation {metric}", metric, scores)])


def draw_grid(path, rows, captions=None, row_labels=None, title="", outlines=None, inches=1.2):
    """Draw images (H, W), (H, W, 1) or (H, W, 3) uint8, one list a row, each in its own proportions; under each a caption,
    text or (text, colour), before each row a label, over each the outlines [(mask (H, W) bool, colour), ...]."""
    columns = max(map(len, rows))
    width, height = inches * columns + 1, (inches + 0.3) * len(rows)
    figure, axes = new_figure(path, width, height + 0.3, len(rows), columns, wspace=0.06, hspace=0.3 / inches, left=1 / width,
                              right=1, bottom=0.3 / (height + 0.3), top=height / (height + 0.3))
    if figure is None:
        return
    for i, row in enumerate(rows):
        for axis in axes[i]:
            axis.axis("off")
        for j, (axis, image) in enumerate(zip(axes[i], row)):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
            for mask, colour in outlines[i][j] if outlines else []:
                if mask.any() and not mask.all():
                    axis.contour(mask, [0.5], colors=[colour], linewidths=1)
            caption = captions[i][j] if captions else ""
            text, colour = caption if isinstance(caption, tuple) else (caption, "black")
            axis.set_title(text, color=colour, fontsize=7, y=0, pad=-2, va="top")
        if row_labels:
            axes[i, 0].text(-0.08, 0.5, row_labels[i], fontsize=7, ha="right", va="center", transform=axes[i, 0].transAxes)
    figure.suptitle(title, fontsize=9, y=1 - 0.08 / (height + 0.3), va="top")
    save_figure(figure, path)
