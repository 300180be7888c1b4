"""What each stage takes on this machine, beside what a user would write or install instead.

    python tests/bench.py                        # the tables of BENCHMARKS.md
    python tests/bench.py --quick                # a quarter of the images and of the batch, two rounds
    python tests/bench.py --stage knn --json bench.json

Each side of a case lives in a process of its own, which gives its peak memory (without a DataLoader's workers; on CUDA
what PyTorch held there). The sides take turns; a figure is the median of its rounds, and the ratio is that of the
medians. The data path is included. The plain sides are as a user would first write them: fp32, PyTorch's defaults, PIL
and torchvision's transforms in worker processes; or they are scikit-learn. "share of peak" is that of a large matrix
product measured here, in the same precision; the products in a CPU's fused attention are not counted.
"""
import argparse
import csv
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import count as numbers
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import sklearn.neighbors
import timm
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2 as T
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attn_distance  # noqa: E402
import common  # noqa: E402
import finetune  # noqa: E402
import knn_eval  # noqa: E402
import prepare  # noqa: E402
import pretrain_dino  # noqa: E402
import saliency  # noqa: E402
import segment  # noqa: E402

SIDE = 224
WORKERS = min(16, os.cpu_count() or 1)
JITTER = T.RandomApply([T.ColorJitter(0.2, 0.2, 0.1, 0.1)], 0.8)
NORMALIZE = [T.ToImage(), T.ToDtype(torch.float32, scale=True), T.Normalize([0.5] * 3, [0.25] * 3)]
CENTRE = T.Compose([T.Resize(256), T.CenterCrop(SIDE), *NORMALIZE])


# ---------------------------------------------------------------- files -------------------------------------

def smooth_noise(rng, height, width):
    """A picture that compresses as a photograph does."""
    small = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def write_photographs(folder, count):
    """JPEG files of 400x300 in images/, a disc each in masks/, four classes in labels.csv; and all that prepared."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:300, :400]
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    for i in range(count):
        smooth_noise(rng, 300, 400).save(folder / "images" / f"{i}.jpg", quality=90)
        disc = np.hypot(y - rng.integers(300), x - rng.integers(400)) < rng.integers(20, 120)
        Image.fromarray(255 * disc.astype(np.uint8)).save(folder / "masks" / f"{i}.png")
    common.write_table(folder / "labels.csv", ["image", "label"], [[f"{i}.jpg", "abcd"[i % 4]] for i in range(count)])
    run_prepare(folder, folder / "prepared", WORKERS)


def run_prepare(source, output, workers):
    """prepare.py, all images for training."""
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        prepare.main([str(source), "--output", str(output), "--workers", str(workers), "--split", "1", "0", "0",
                      "--overwrite"])


def write_many_rows(folder, count):
    """A prepared folder as of CheXpert: grey images of 256x256, 14 labels, patients. Its images.npy is sparse."""
    rng = np.random.default_rng(0)
    names = [f"label {i}" for i in range(14)]
    folder.mkdir()
    with open(folder / "images.npy", "wb") as out:
        out.write(prepare.npy_header(count, 256, 256, 1))
        out.truncate(out.tell() + count * 256 * 256)
    rows = []
    for i, labels in enumerate((rng.random((count, 14)) < 0.2).astype(int).tolist()):
        patient = f"patient{i // 3:05d}"
        split = ("train", "val", "test")[max(0, i % 10 - 7)]
        rows.append([f"{patient}/view{i % 3}.jpg", split, patient, 320, 390, *labels])
    common.write_table(folder / "labels.csv", ["image", "split", "group", "height", "width", *names], rows)
    common.write_json(folder / "dataset.json", {"classes": names, "mean": [0.5] * 3, "std": [0.25] * 3})


def repeat_photographs(folder, into, count):
    """images/ and masks/ of `count` photographs: links to the few that there are."""
    for name in ("images", "masks"):
        files = sorted((folder / name).iterdir())
        (into / name).mkdir(parents=True)
        for i in range(count):
            file = files[i % len(files)]
            os.link(file, into / name / f"{i}{file.suffix}")


def photographs(folder, count):
    """`count` paths, the files of images/ over and over."""
    files = sorted((folder / "images").iterdir())
    return [files[i % len(files)] for i in range(count)]


# ---------------------------------------------------------------- what the sides share ----------------------
# A side is a generator: what comes before its loop is not timed, then each `next` is a pass, which yields how much
# it did. A stage's two sides take the same: the folder with the files, the device, and the options of a case.

def start_stage(stage, folder, device, count, *flags):
    """(arguments, run, dataset with `count` training images) of a stage, as its command line would give them."""
    sys.argv = [stage.__name__, "--data", str(folder / "prepared"), "--device", device, *map(str, flags)]
    args = stage.arguments()
    run = common.start(args)
    dataset = common.open_dataset(args.data)
    dataset.rows["train"] = np.arange(count) % len(dataset.paths)
    return args, run, dataset


def our_model(arch, num_classes, run):
    """A classifier, or a backbone where num_classes is 0, as the stages build it."""
    model, _ = common.build_model(arch, "random", SIDE, num_classes)
    return common.to_device(model, run)


class Files(torch.utils.data.Dataset):
    """A user's own dataset: image files, each with its class or, transformed together, its mask."""

    def __init__(self, paths, transform, masks):
        self.paths, self.transform, self.masks = paths, transform, masks

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        path = self.paths[i]
        image = Image.open(path).convert("RGB")
        if not self.masks:
            return self.transform(image), i % 4
        mask = Image.open(path.parent.parent / "masks" / f"{path.stem}.png")
        return self.transform(image, torchvision.tv_tensors.Mask(np.array(mask) // 255))


def plain_loader(paths, transform, batch, masks=False, workers=WORKERS):
    """A DataLoader that decodes and transforms files in worker processes."""
    files = Files(paths, transform, masks)
    return torch.utils.data.DataLoader(files, batch, shuffle=True, num_workers=workers,
                                       pin_memory=torch.cuda.is_available())


def plain_step(loss, model, optimizer):
    """One step of a plain training loop."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


# ---------------------------------------------------------------- the stages, ours and plain ----------------

def finetune_ours(folder, device, arch, count, batch):
    """Epochs of finetune.py."""
    args, run, dataset = start_stage(finetune, folder, device, count, "--batch-size", batch)
    model = our_model(arch, 4, run)
    optimizer, scaler, _, _ = common.start_training(model, args, run, folder)
    rates = np.full(count // batch, args.lr)
    for epoch in numbers():
        finetune.train_epoch(model, optimizer, scaler, dataset, args, run, epoch, rates)
        yield count


def finetune_plain(folder, device, arch, count, batch):
    """A training loop."""
    model = timm.create_model(common.ARCHS[arch], num_classes=4).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, weight_decay=1e-5)
    view = T.Compose([T.RandomResizedCrop(SIDE, (0.8, 1)), T.RandomHorizontalFlip(), T.RandomVerticalFlip(), JITTER,
                      *NORMALIZE])
    while True:
        for images, labels in plain_loader(photographs(folder, count), view, batch):
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            plain_step(loss, model, optimizer)
        yield count


def features_ours(folder, device, arch, count, batch):
    """Frozen features, as knn_eval.py extracts them."""
    args, run, dataset = start_stage(knn_eval, folder, device, count)
    model = our_model(arch, 0, run).eval()
    while True:
        common.extract(model, dataset, dataset.rows["train"], SIDE, run, args.pool, batch)
        yield count


def features_plain(folder, device, arch, count, batch):
    """A loop without gradients."""
    torch.set_grad_enabled(False)
    model = timm.create_model(common.ARCHS[arch], num_classes=0).to(device).eval()
    while True:
        loader = plain_loader(photographs(folder, count), CENTRE, batch)
        torch.cat([model(images.to(device)).cpu() for images, _ in loader])
        yield count


def unit_features(count, seed):
    """(count, 384) float32 of length 1."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 384, generator=generator), dim=1)


def knn_ours(folder, device, train, queries):
    """The vote of 200 neighbours by knn_eval.py, kept for the other side to compare."""
    _, run, _ = start_stage(knn_eval, folder, device, 1)
    torch.backends.cuda.matmul.allow_tf32 = False  # as knn_eval.py has it
    keys = unit_features(train, 0).to(run.device)
    labels = F.one_hot(torch.arange(train) % 2).float().to(run.device)
    while True:
        shares = knn_eval.vote(keys, labels, unit_features(queries, 1).to(run.device), [200], 0.07)[200]
        np.save(folder / "shares.npy", shares.numpy())
        yield queries


def knn_plain(folder, device, train, queries):
    """scikit-learn, by brute force; on the CPU, as it is always."""
    search = sklearn.neighbors.NearestNeighbors(n_neighbors=200, metric="cosine", algorithm="brute")
    search.fit(unit_features(train, 0).numpy())
    labels = np.eye(2, dtype=np.float32)[np.arange(train) % 2]
    while True:
        distance, index = search.kneighbors(unit_features(queries, 1).numpy())
        weights = np.exp((1 - distance) / 0.07)[:, :, None]
        shares = (weights * labels[index]).sum(1) / weights.sum(1)
        # neighbours 200 and 201 may be equal to the last digit of fp32 and change places: one vote of 200
        differ = np.abs(shares - np.load(folder / "shares.npy")).max(1)
        assert differ.max() < 0.01 and (differ > 1e-4).mean() < 0.005, f"the votes differ by {differ.max():.2g}"
        yield queries


def dino_ours(folder, device, arch, count, batch, crops, outputs):
    """Epochs of pretrain_dino.py."""
    args, run, dataset = start_stage(pretrain_dino, folder, device, count, "--arch", arch, "--recipe", "paper",
                                     "--batch-size", batch, "--local-crops", crops, "--out-dim", outputs)
    pretrain_dino.apply_recipe(args, count, run)
    student, teacher, _ = pretrain_dino.build(args, run)
    optimizer = torch.optim.AdamW(pretrain_dino.parameter_groups(student), fused=True)
    scaler = torch.amp.GradScaler(device, enabled=run.amp == "fp16")
    plan = pretrain_dino.schedules(args, count // batch)
    for epoch in numbers(args.freeze_last_layer):  # before, the last layer stands still
        pretrain_dino.train_epoch(student, student, teacher, optimizer, scaler, dataset, args, run, epoch, plan)
        yield count


class PlainViews:
    """DINO's views of an image, one after the other."""

    def __init__(self, crops):
        small = self.view(96, (0.05, 0.4), 0.5, 0.0)
        self.views = [self.view(SIDE, (0.4, 1), 1.0, 0.0), self.view(SIDE, (0.4, 1), 0.1, 0.2), *[small] * crops]

    def view(self, side, scale, blur, solarize):
        """The transform of one view; blur, solarize: probabilities."""
        return T.Compose([
            T.RandomResizedCrop(side, scale, interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), T.RandomGrayscale(0.2),
            T.RandomApply([T.GaussianBlur(23, (0.1, 2.0))], blur), T.RandomSolarize(128, solarize), *NORMALIZE])

    def __call__(self, image):
        return [view(image) for view in self.views]


class PlainDino(torch.nn.Module):
    """A backbone with DINO's head."""

    def __init__(self, arch, outputs):
        super().__init__()
        self.backbone = timm.create_model(common.ARCHS[arch], num_classes=0, dynamic_img_size=True)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(self.backbone.num_features, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 2048),
            torch.nn.GELU(), torch.nn.Linear(2048, 256))
        self.last = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(256, outputs, bias=False))

    def forward(self, images):
        return self.last(F.normalize(self.mlp(self.backbone(images)), dim=-1))


def plain_dino_loss(student, teacher, centre):
    """Mean cross-entropy of all pairs of different views; lists of logits (B, outputs)."""
    losses = []
    for i, large in enumerate(teacher):
        target = F.softmax((large - centre) / 0.04, dim=-1)
        for j, view in enumerate(student):
            if i != j:
                losses.append(-(target * F.log_softmax(view / 0.1, dim=-1)).sum(-1).mean())
    return sum(losses) / len(losses)


def dino_plain(folder, device, arch, count, batch, crops, outputs):
    """A training loop with a teacher."""
    student = PlainDino(arch, outputs).to(device)
    teacher = PlainDino(arch, outputs).to(device).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), 1e-5, weight_decay=0.04)
    centre = torch.zeros(outputs, device=device)
    while True:
        for views, _ in plain_loader(photographs(folder, count), PlainViews(crops), batch):
            large = torch.cat(views[:2]).to(device)
            small = torch.cat(views[2:]).to(device)
            target = teacher(large)
            output = [*student(large).chunk(2), *student(small).chunk(crops)]
            loss = plain_dino_loss(output, target.chunk(2), centre)
            centre = 0.9 * centre + 0.1 * target.mean(0)
            plain_step(loss, student, optimizer)
            with torch.no_grad():
                for old, new in zip(teacher.parameters(), student.parameters()):
                    old.mul_(0.996).add_(new, alpha=0.004)
        yield count


def segment_ours(folder, device, arch, count, batch):
    """Epochs of segment.py."""
    args, run, dataset = start_stage(segment, folder, device, count, "--batch-size", batch)
    model, _ = segment.build_segmenter(arch, "random", SIDE, args.output_stride, 2)
    model = common.to_device(model, run)
    optimizer, scaler, _, _ = common.start_training(model, args, run, folder)
    rates = np.full(count // batch, args.lr)
    for epoch in numbers():
        segment.train_epoch(model, model.dropout, optimizer, scaler, dataset, args, run, epoch, rates)
        yield count


def segment_plain(folder, device, arch, count, batch):
    """A training loop on torchvision's DeepLabv3-ResNet50, whatever the architecture of ours."""
    build = torchvision.models.segmentation.deeplabv3_resnet50
    model = build(weights=None, weights_backbone=None, num_classes=2).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    # NORMALIZE would scale the masks, too
    image_alone = T.ToDtype({torchvision.tv_tensors.Image: torch.float32, "others": None}, scale=True)
    view = T.Compose([T.RandomResizedCrop(SIDE, (0.5, 1)), T.RandomHorizontalFlip(), T.RandomVerticalFlip(), JITTER,
                      T.ToImage(), image_alone, NORMALIZE[2]])
    while True:
        for images, masks in plain_loader(photographs(folder, count), view, batch, masks=True):
            logits = model(images.to(device))["out"]
            truth = masks.long().to(device)
            lesion = logits.softmax(1)[:, 1]
            dice = (2 * (lesion * truth).sum((1, 2)) + 1) / ((lesion + truth).sum((1, 2)) + 1)
            loss = F.cross_entropy(logits, truth) + (1 - dice).mean()
            plain_step(loss, model, optimizer)
        yield count
