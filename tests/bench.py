"""What each stage takes on this machine, beside what a user would write or install instead, in one run.

    python tests/bench.py                        # the tables of BENCHMARKS.md
    python tests/bench.py --quick                # smaller batches, two rounds
    python tests/bench.py --stage knn --json bench.json
    python tests/bench.py --plan 20 50 100 200   # several GPUs, by assumed step times in ms; measures nothing

Each side of a case lives in a process of its own, which gives its peak memory (the process as a whole,
without the plain side's DataLoader workers; on CUDA what PyTorch held there). The sides take turns; speeds
are medians and the ratio is theirs. The data path is included. The plain sides are written here as a user
would first write them: fp32, PyTorch's defaults, PIL and torchvision transforms in worker processes; or they
are scikit-learn, and, where importable, grad-cam and lightly (which this project does not need). "share of
peak" is that of a large matrix product measured here; products in a CPU's fused attention are not counted.
"""
import argparse
import csv
import importlib.util
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
from contextlib import nullcontext, redirect_stderr, redirect_stdout
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

MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
WORKERS = min(16, os.cpu_count() or 1)
NORMALIZE = [T.ToImage(), T.ToDtype(torch.float32, scale=True), T.Normalize(MEAN, STD)]


# ---------------------------------------------------------------- files, and what the sides share -----------

def photographs(folder, count, size=(300, 400)):
    """`count` JPEG files of smooth noise, as a photograph compresses, in folder/images, with masks of a disc as PNG in
    folder/masks; prepared into folder/prepared, all of them for training."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:size[0], :size[1]]
    for part in ("images", "masks"):
        (Path(folder) / part).mkdir()
    for i in range(count):
        small = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC)
        picture.save(Path(folder) / "images" / f"{i}.jpg", quality=90)
        disc = np.hypot(y - rng.integers(size[0]), x - rng.integers(size[1])) < rng.integers(20, 120)
        Image.fromarray(disc.astype(np.uint8) * 255).save(Path(folder) / "masks" / f"{i}.png")
    rows = "".join(f"{i}.jpg,{'abcd'[i % 4]},train\n" for i in range(count))
    (Path(folder) / "labels.csv").write_text("image,label,split\n" + rows)
    prepare_into(folder, "prepared", WORKERS)


def prepare_into(folder, name, workers, *flags):
    """prepare.py, as its command line would run it, on the table in a folder."""
    sys.argv = ["bench", str(folder), "--output", f"{folder}/{name}", "--workers", str(workers), "--overwrite", "--split",
                "1", "0", "0", "--split-column", "split", *flags]
    with redirect_stdout(open(os.devnull, "w")), redirect_stderr(open(os.devnull, "w")):
        prepare.main()


def files(case):
    """The case's images: `count` paths, the files of its folder over and over."""
    found = sorted(map(str, Path(case.folder, "images").glob("*.jpg")))
    return [found[i % len(found)] for i in range(case.count)]


def start(stage, case, *flags):
    """(arguments of a stage, run, dataset of the case's files), as its command line would give them."""
    sys.argv = ["bench", "--arch", case.arch, "--device", case.device, "--image-size", str(case.side),
                "--data", f"{case.folder}/prepared", *map(str, flags)]
    args = stage.arguments()
    run = common.start(args)
    dataset = common.open_dataset(args.data)
    dataset.mean, dataset.std, dataset.metric = MEAN, STD, "iou" if stage is segment else "accuracy"
    dataset.rows["train"] = np.arange(case.count) % len(dataset.paths)
    return args, run, dataset


class Files(torch.utils.data.Dataset):
    """A user's own dataset: (transformed image or images, label), or (image, mask), transformed as one."""

    def __init__(self, paths, transform, masks=False):
        self.paths, self.transform, self.masks = paths, transform, masks

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image = Image.open(self.paths[i]).convert("RGB")
        if self.masks:
            mask = Image.open(self.paths[i].replace("images", "masks").replace(".jpg", ".png"))
            return self.transform(image, torchvision.tv_tensors.Mask(np.array(mask) // 255))
        return self.transform(image), i % 4


def loader(case, steps, train=True, masks=False):
    """A DataLoader over the case's files with torchvision's transforms in worker processes."""
    transform = steps if callable(steps) else T.Compose([*steps, *NORMALIZE])
    return torch.utils.data.DataLoader(Files(files(case), transform, masks), case.batch, shuffle=train,
                                       num_workers=WORKERS, pin_memory=case.device == "cuda")


def one_by_one(case):
    """The case's images for evaluation, a batch each."""
    return loader(SimpleNamespace(**{**vars(case), "batch": 1}),
                  [T.Resize(256), T.CenterCrop(case.side)], train=False)


# ---------------------------------------------------------------- the stages, ours and plain ----------------
# Each function takes a case and returns (a function that does one pass and returns how much it did, modules
# to compile). Passes are numbered; -1 is the warm-up.

def finetune_ours(case):
    """Train over the files once."""
    args, run, dataset = start(finetune, case, "--batch-size", case.batch, "--epochs", 100)
    model = common.to_device(common.build_model(args, 4)[0], run)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=False)

    def one_pass(number):
        finetune.train_epoch(model, optimizer, scaler, dataset, args, run, number + 1, 0)
        return case.count
    return one_pass, [model]


def finetune_plain(case):
    """The same, the plain way."""
    model = timm.create_model(common.ARCHS[case.arch], num_classes=4).to(case.device).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, weight_decay=1e-5)
    steps = [T.RandomResizedCrop(case.side, scale=(0.8, 1)), T.RandomHorizontalFlip(),
             T.RandomVerticalFlip(), T.RandomApply([T.ColorJitter(0.2, 0.2, 0.1, 0.1)], 0.8)]

    def one_pass(number):
        for images, labels in loader(case, steps):
            loss = F.cross_entropy(model(images.to(case.device)), labels.to(case.device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        loss.item()
        return case.count
    return one_pass, []


def features_ours(case):
    """Frozen features of the files."""
    args, run, dataset = start(knn_eval, case, "--batch-size", case.batch)
    model = common.to_device(common.build_model(args, 0)[0], run).eval()

    def one_pass(number):
        return len(common.extract(model, dataset, dataset.rows["train"], args, run, "auto", case.batch))

    def compile_features():  # as knn_eval.py does: features() does not call the model as a whole
        model.forward_features = torch.compile(model.forward_features)
    return one_pass, [SimpleNamespace(compile=compile_features)]


def features_plain(case):
    """The same, the plain way."""
    model = timm.create_model(common.ARCHS[case.arch], num_classes=0).to(case.device).eval()

    @torch.no_grad()
    def one_pass(number):
        batches = loader(case, [T.Resize(256), T.CenterCrop(case.side)], train=False)
        return len(torch.cat([model(images.to(case.device)).cpu() for images, _ in batches]))
    return one_pass, []


def knn_data(case):
    """Unit features of the training images (N, 384), labels (N, 2) and the queries, a pass's by number."""
    generator = torch.Generator().manual_seed(0)
    train, queries = (torch.randn(count, 384, generator=generator) for count in (case.train, case.count))
    for x in (train, queries):
        x /= x.norm(dim=1, keepdim=True)
    labels = F.one_hot(torch.randint(0, 2, (case.train,), generator=generator), 2).float()
    parts = queries.split(case.batch)
    return train, labels, lambda number: queries[:256] if number < 0 else parts[number % len(parts)]


def knn_ours(case):
    """The weighted vote of k = 200 neighbours, of a part of the queries a pass."""
    train, labels, part = knn_data(case)
    train, labels = train.to(case.device), labels.to(case.device)

    def one_pass(number):
        queries = part(number).to(case.device)
        arrays = {"shares": knn_eval.vote(train, labels, queries, [200], 0.07)[200].numpy()}
        if number < 0:
            cosine, index = next(knn_eval.nearest(train, queries, 200))
            arrays |= {"cosine": cosine.cpu().numpy(), "neighbours": index.cpu().numpy()}
        np.savez(Path(case.folder) / f"knn_ours{number}.npz", **arrays)
        return len(queries) * (2 if number < 0 else 1)  # it searches twice: FLOP are divided by this
    return one_pass, []


def knn_plain(case):
    """The same by scikit-learn's brute force."""
    train, labels, part = knn_data(case)
    near = sklearn.neighbors.NearestNeighbors(n_neighbors=200, metric="cosine", algorithm="brute")
    near, labels = near.fit(train.numpy()), labels.numpy()

    def one_pass(number):
        distance, index = near.kneighbors(part(number).numpy())
        weights = np.exp((1 - distance) / 0.07)[:, :, None]
        shares = (weights * labels[index]).sum(1) / weights.sum(1)
        np.savez(Path(case.folder) / f"knn_plain{number}.npz", shares=shares, cosine=1 - distance,
                 neighbours=index)
        return len(index)
    return one_pass, []


def check_neighbours(case):
    """Stop unless both sides found the same neighbours (in the warm-up) and votes (in every pass)."""
    for file in sorted(Path(case.folder).glob("knn_ours*.npz")):
        ours, plain = np.load(file), np.load(str(file).replace("ours", "plain"))
        # the 200th and 201st may be equal to the last digit of fp32, and change places: 1 vote of 200
        differ = np.abs(ours["shares"] - plain["shares"]).max(1)
        assert differ.max() < 0.01 and (differ > 1e-4).mean() < 0.005, f"votes differ by {differ.max():.2g}"
        if "neighbours" in ours:
            assert np.abs(ours["cosine"] - plain["cosine"]).max() < 1e-5, "the similarities differ"
            same = [len(set(a) & set(b)) for a, b in zip(ours["neighbours"], plain["neighbours"])]
            assert min(same) >= 199 and np.mean(same) > 199.9, f"neighbours in common: {min(same)} of 200"
            print(f"  the same neighbours: {np.mean(same):.3f} of 200 in common, mean of {len(same)} queries")


def dino_ours(case):
    """A pass of DINO over the files, everything included."""
    args, run, dataset = start(pretrain_dino, case, "--recipe", "paper", "--batch-size", case.batch,
                               "--out-dim", case.out_dim, "--local-crops", case.crops)
    settings = pretrain_dino.with_recipe(args, case.count, run)
    student, teacher, _ = pretrain_dino.build(settings, run)
    optimizer = torch.optim.AdamW(pretrain_dino.parameter_groups(student), fused=True)
    state = SimpleNamespace(student=student, teacher=teacher, wrapped=student, optimizer=optimizer,
                            center=torch.zeros(case.out_dim, device=run.device),
                            scaler=torch.amp.GradScaler(run.device.type, enabled=False))
    plan = pretrain_dino.schedules(settings, case.count // case.batch)

    def one_pass(number):
        pretrain_dino.train_epoch(state, dataset, settings, run, number + 2, plan)  # last layer not frozen
        return case.count
    return one_pass, [student, teacher]


class Crops:
    """The views of an image as tensors, one after the other, by torchvision's transforms."""

    def __init__(self, case):
        def view(side, scale, blur, solarize=0.0):
            return T.Compose([
                T.RandomResizedCrop(side, scale, interpolation=T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(), T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                T.RandomGrayscale(0.2), T.RandomApply([T.GaussianBlur(23, (0.1, 2.0))], blur),
                T.RandomSolarize(128, solarize), *NORMALIZE])
        small = max(16, round(case.side * 3 / 7 / 16) * 16)
        self.views = [view(case.side, (0.4, 1), 1.0), view(case.side, (0.4, 1), 0.1, 0.2),
                      *[view(small, (0.05, 0.4), 0.5)] * case.crops]

    def __call__(self, image):
        return [view(image) for view in self.views]


class PlainHead(torch.nn.Module):
    """DINO's projection head."""

    def __init__(self, dim, out_dim):
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(dim, 2048), torch.nn.GELU(),
                                       torch.nn.Linear(2048, 2048), torch.nn.GELU(),
                                       torch.nn.Linear(2048, 256))
        self.last = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(256, out_dim, bias=False))

    def forward(self, x):
        return self.last(F.normalize(self.mlp(x), dim=-1))


def plain_dino_loss(student, teacher, center):
    """Cross-entropy of every pair of views; student and teacher are lists of (B, K) logits."""
    total, pairs = 0, 0
    for i, t in enumerate(teacher):
        target = F.softmax((t - center) / 0.04, dim=-1)
        for j, s in enumerate(student):
            if i != j:
                total = total - (target * F.log_softmax(s / 0.1, dim=-1)).sum(-1).mean()
                pairs += 1
    return total / pairs


def dino_plain(case):
    """The same, the plain way; with case.lightly by lightly's head and loss."""
    head = PlainHead
    if case.lightly:
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        lightly_loss = DINOLoss(case.out_dim).to(case.device)

        def head(dim, out_dim):
            return DINOProjectionHead(dim, 2048, 256, out_dim)
    def build():
        backbone = timm.create_model(common.ARCHS[case.arch], num_classes=0, dynamic_img_size=True)
        return torch.nn.ModuleList([backbone, head(backbone.num_features, case.out_dim)]).to(case.device)
    student, teacher = build(), build().requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), 1e-5, weight_decay=0.04)
    center = torch.zeros(case.out_dim, device=case.device)

    def one_pass(number):
        for views, _ in loader(case, Crops(case)):
            views = [view.to(case.device) for view in views]
            with torch.no_grad():
                target = teacher[1](teacher[0](torch.cat(views[:2]))).chunk(2)
            features = [student[0](torch.cat(views[:2])), student[0](torch.cat(views[2:]))]
            output = student[1](torch.cat(features)).chunk(len(views))
            if case.lightly:
                loss = lightly_loss(list(target), list(output), epoch=40)
            else:
                loss = plain_dino_loss(output, target, center)
                center.mul_(0.9).add_(torch.cat(target).mean(0), alpha=0.1)
            optimizer.zero_grad()
            loss.backward()
            for parameter in student.parameters():  # the authors clip each on its own
                if parameter.grad is not None:
                    parameter.grad.mul_((3 / (parameter.grad.norm() + 1e-6)).clamp(max=1))
            optimizer.step()
            with torch.no_grad():
                for old, new in zip(teacher.parameters(), student.parameters()):
                    old.mul_(0.996).add_(new, alpha=0.004)
        loss.item()
        return case.count
    return one_pass, []


def attention_ours(case):
    """Mean attention distances over the files."""
    args, run, dataset = start(attn_distance, case)
    timm.layers.set_fused_attn(False)
    args.mean, args.std = MEAN, STD
    model = common.to_device(common.build_model(args, 0)[0].eval(), run)
    read = common.attention_reader(model)

    def one_pass(number):
        attn_distance.measure(model, read, dataset, dataset.rows["train"], args, args, run)
        return case.count
    return one_pass, []


def attention_plain(case):
    """The same, the plain way: an image at a time, hooks, a loop over blocks and heads."""
    model = timm.create_model(common.ARCHS[case.arch], num_classes=0).to(case.device).eval()
    kept, side, patch = [], case.side // 16, 16
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda module, inputs, output: kept.append(output))
    places = torch.tensor([(y * patch, x * patch) for y in range(side) for x in range(side)]).float()
    distances = torch.cdist(places, places).to(case.device)

    @torch.no_grad()
    def one_pass(number):
        results = []
        for images, _ in one_by_one(case):
            kept.clear()
            model(images.to(case.device))
            for qkv in kept:
                heads = model.blocks[0].attn.num_heads
                q, k, _ = qkv.reshape(qkv.shape[1], 3, heads, -1).permute(1, 2, 0, 3)
                for head in range(heads):
                    attention = (q[head] @ k[head].T / math.sqrt(q.shape[-1])).softmax(-1)[1:, 1:]
                    attention = attention / attention.sum(1, keepdim=True)
                    results.append((attention * distances).sum(1).mean().item())
        return case.count
    return one_pass, []


def saliency_ours(case):
    """Grad-CAM maps of the predicted class."""
    args, run, dataset = start(knn_eval, case)
    model = common.to_device(common.build_model(args, 4)[0].eval(), run)
    batches = common.shards(dataset.rows["train"], run, case.batch)

    def one_pass(number):
        for images in common.load_batches(dataset.images, batches, run.device):
            view = common.eval_view(images, args.image_size, MEAN, STD)
            saliency.grad_cam(model, view, None, "classes")[0].cpu()
        return case.count
    return one_pass, []


def saliency_plain(case):
    """The same by the grad-cam package, where it is importable, else by hooks; an image at a time."""
    model, kept = timm.create_model(common.ARCHS[case.arch], num_classes=4).to(case.device).eval(), {}
    if importlib.util.find_spec("pytorch_grad_cam"):
        from pytorch_grad_cam import GradCAM
        package = GradCAM(model, [model.layer4[-1]])

        def explain(images):
            return package(images, targets=None)
    else:
        model.layer4[-1].register_forward_hook(lambda module, i, output: kept.update(a=output))
        model.layer4[-1].register_full_backward_hook(lambda module, i, output: kept.update(g=output[0]))

        def explain(images):
            model(images).amax(1).sum().backward()
            return (kept["g"].mean((2, 3), keepdim=True) * kept["a"]).sum(1).relu().detach().cpu()

    def one_pass(number):
        for images, _ in one_by_one(case):
            explain(images.to(case.device))
        return case.count
    return one_pass, []


def segment_ours(case):
    """Train a DeepLabv3 over the files and their masks once."""
    args, run, dataset = start(segment, case, "--batch-size", case.batch, "--epochs", 100)
    model = common.to_device(segment.build_segmenter(args, 2)[0], run)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=False)

    def one_pass(number):
        segment.train_epoch(model, model.dropout, optimizer, scaler, dataset, args, run, number + 1)
        return case.count
    return one_pass, [model]


def segment_plain(case):
    """torchvision's DeepLabv3-ResNet50, the plain way, whatever the architecture of ours."""
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None,
                                                               num_classes=2).to(case.device).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    transform = T.Compose([
        T.RandomResizedCrop(case.side, scale=(0.5, 1)), T.RandomHorizontalFlip(), T.RandomVerticalFlip(),
        T.RandomApply([T.ColorJitter(0.2, 0.2, 0.1, 0.1)], 0.8), T.ToImage(),
        T.ToDtype({torchvision.tv_tensors.Image: torch.float32, "others": None}, scale=True),
        T.Normalize(MEAN, STD)])

    def one_pass(number):
        for images, masks in loader(case, transform, masks=True):
            logits, masks = model(images.to(case.device))["out"], masks.long().to(case.device)
            lesion, truth = logits.softmax(1)[:, 1], (masks == 1).float()
            dice = (2 * (lesion * truth).sum((1, 2)) + 1) / ((lesion + truth).sum((1, 2)) + 1)
            loss = F.cross_entropy(logits, masks) + (1 - dice).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        loss.item()
        return case.count
    return one_pass, []


def large_pngs(folder, count):
    """`count` PNG files of 3000x2000 in folder/large, and their paths; made once."""
    rng, paths = np.random.default_rng(0), [Path(folder) / "large" / f"{i}.png" for i in range(count)]
    if not paths[0].parent.exists():
        paths[0].parent.mkdir()
        for path in paths:
            small = Image.fromarray(rng.integers(0, 256, (125, 188, 3), dtype=np.uint8))
            small.resize((3000, 2000), Image.Resampling.BICUBIC).save(path, compress_level=1)
        rows = "".join(f"{path.name},{'abcd'[i % 4]},train\n" for i, path in enumerate(paths))
        (paths[0].parent / "labels.csv").write_text("image,label,split\n" + rows)
    return list(map(str, paths))


def loader_ours(case):
    """Read the large images from the prepared array, as every epoch does."""
    large_pngs(case.folder, case.count)
    prepare_into(Path(case.folder) / "large", "prepared", WORKERS)
    dataset = common.open_dataset(Path(case.folder) / "large" / "prepared")

    def one_pass(number):
        order = [batch for epoch in range(50) for batch in common.epoch_order(case.count, 8, 0, epoch)]
        return sum(len(images) for images in common.load_batches(dataset.images, order, torch.device(case.device)))
    return one_pass, []


def repeated(case):
    """A folder of case.count photographs and masks, which are links to the case's few."""
    root = Path(case.folder) / "repeated"
    if not root.exists():
        for part, suffix in (("images", "jpg"), ("masks", "png")):
            (root / part).mkdir(parents=True)
            for i in range(case.count):
                os.link(Path(case.folder) / part / f"{i % 64}.{suffix}", root / part / f"{i}.{suffix}")
        (root / "labels.csv").write_text("image,split\n" + "".join(f"{i}.jpg,train\n" for i in range(case.count)))
    return root


def prepare_ours(case):
    """Prepare photographs with their masks, checks and contact sheet, by `workers` processes."""
    root = repeated(case)

    def one_pass(number):
        prepare_into(root, f"prepared{case.workers}", case.workers)
        return case.count
    return one_pass, []


def prepare_plain(case):
    """The same images and masks decoded and resized in a DataLoader of as many workers, kept as one array each."""
    paths = sorted(map(str, (repeated(case) / "images").iterdir()))

    def one_pass(number):
        steps = T.Compose([T.Resize((256, 256)), T.ToImage()])
        batches = torch.utils.data.DataLoader(Files(paths, steps, True), 8, num_workers=case.workers)
        images, masks = zip(*batches)
        np.save(Path(case.folder) / "images.npy", torch.cat(images).numpy())
        np.save(Path(case.folder) / "masks.npy", torch.stack([mask for part in masks for mask in part]).numpy())
        return case.count
    return one_pass, []


def loader_plain(case):
    """Decode and shrink them in worker processes."""
    def one_pass(number):
        steps = T.Compose([T.Resize(256), T.ToImage()])
        batches = torch.utils.data.DataLoader(Files(large_pngs(case.folder, case.count), steps), 8,
                                              num_workers=WORKERS)
        return sum(len(images.to(case.device)) for images, _ in batches)
    return one_pass, []


def many_rows(case):
    """A prepared folder of case.count grey images of 256x256 with 14 labels, as CheXpert has; images.npy is sparse."""
    root = Path(case.folder) / "many"
    if not root.exists():
        root.mkdir()
        with open(root / "images.npy", "wb") as out:
            head = prepare.npy_header(case.count, 256, 256, 1)
            out.write(head)
            out.truncate(len(head) + case.count * 256 * 256)
        rng, names = np.random.default_rng(0), [f"label {i}" for i in range(14)]
        with open(root / "labels.csv", "w") as out:
            out.write(f"image,split,group,height,width,{','.join(names)}\n")
            for i, flags in enumerate((rng.random((case.count, 14)) < 0.2).astype(int).tolist()):
                split = ("train", "val", "test")[max(0, i % 10 - 7)]
                out.write(f"patient{i // 3:05d}/view{i % 3}.jpg,{split},patient{i // 3:05d},320,390,"
                          f"{','.join(map(str, flags))}\n")
        (root / "dataset.json").write_text(json.dumps({"classes": names, "mean": MEAN, "std": STD}))
    return root


def first_batch_ours(case):
    """Open the prepared folder, labels.csv read and all, and give the first batch."""
    root = many_rows(case)

    def one_pass(number):
        dataset = common.open_dataset(root)
        rows = dataset.rows["train"][common.epoch_order(len(dataset.rows["train"]), 64, 0, 0)]
        next(common.load_batches(dataset.images, rows, torch.device(case.device)))
        return case.count
    return one_pass, []


def first_batch_plain(case):
    """The table by csv.DictReader, each image its file: what a Dataset class of one's own does before it reads one."""
    root = many_rows(case)

    def one_pass(number):
        with open(root / "labels.csv") as lines:
            rows = [row for row in csv.DictReader(lines) if row["split"] == "train"]
        labels = torch.tensor([[float(row[f"label {i}"]) for i in range(14)] for row in rows])
        return len(labels) and case.count
    return one_pass, []


# ---------------------------------------------------------------- measuring ---------------------------------

def all_cases(cuda, quick):
    """Every case: its stage, name and sizes. count: images or queries a pass."""
    def case(stage, name, cpu, gpu=None, quick_too=False, **more):
        count, batch = gpu if cuda and gpu else cpu
        if quick and not quick_too:
            count, batch = count // 2, batch // 2
        return SimpleNamespace(**{"stage": stage, "name": name, "count": count, "batch": batch, "side": 224,
                                  "arch": "none", "unit": "images/s", "compiled": False, "lightly": False,
                                  **more})
    for compiled in (False, True) if cuda else (False,):
        end, more = ", compiled" if compiled else "", {"compiled": compiled}
        for stage, name, passes in (("finetune", "training", 8192), ("features", "features", 16384)):
            for arch in ("deit_small", "resnet50"):
                yield case(stage, f"{arch} {name}{end}", (64, 32), (passes, 256), arch=arch, **more)
        if cuda:
            yield case("dino", f"DINO deit_small, 2x224 + 6x96, 4096 outputs{end}", (2048, 128),
                       arch="deit_small", crops=6, out_dim=4096, **more)
    for arch in ("deit_small", "deit_tiny"):
        yield case("dino", f"DINO {arch}, 2x224 + 8x96, 65536 outputs", (16, 16), (512, 64), arch=arch,
                   crops=8, out_dim=65536)
    if importlib.util.find_spec("lightly"):
        yield case("dino", "the same beside lightly's head and loss", (16, 16), (512, 64), arch="deit_tiny",
                   crops=8, out_dim=65536, lightly=True)
    train, queries = (65536, 8192) if quick else (262144, 32768)
    yield case("knn", f"k-NN vote, {train} x 384, {queries} queries in 4 passes", (queries, queries // 4),
               quick_too=True, train=train, unit="queries/s")
    yield case("attention", "attention distance, deit_small", (32, 16), (512, 16), arch="deit_small")
    yield case("saliency", "Grad-CAM, resnet50", (32, 16), (512, 16), arch="resnet50")
    for arch in ("resnet50", "deit_small"):
        yield case("segment", f"DeepLabv3-{arch} training", (8, 8), (512, 32), arch=arch)
    yield case("loader", "loader, 3000x2000 PNG, from epoch 2", (16, 8), quick_too=True)
    for workers in (1, 2):
        yield case("prepare", f"prepare, 300x400 JPEG and masks, {workers} process{'es' * (workers > 1)}",
                   (2048, 8), quick_too=True, workers=workers)
    count = 20000 if quick else 224316
    yield case("first_batch", f"first batch of {count} images", (count, 64), quick_too=True, unit="s")


def peak_memory(device):
    """GB: what PyTorch has held on a GPU, or the peak of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage, not that of the process which this one was forked from
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def serve(pipe, side, case, start_method):
    """One side of a case, in a process of its own: warm up, send (FLOP of a unit, seconds to compile), then
    do a pass and send (amount, seconds) for each number that comes, and the peak memory last."""
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):  # of progress bars
        multiprocessing.set_start_method(start_method, force=True)  # of DataLoader workers: Python's default
        torch.manual_seed(0)
        one_pass, modules = globals()[f"{case.stage}_{side}"](case)
        with FlopCounterMode(display=False) if side == "ours" else nullcontext() as counter:
            amount = one_pass(-1)
        flop, seconds = counter.get_total_flops() / amount if counter else 0, []
        if case.compiled and side == "ours":
            for module in modules:
                module.compile()
            for _ in range(2):  # what the first takes longer is the compiler's
                begin = time.perf_counter()
                one_pass(-1)
                seconds.append(time.perf_counter() - begin)
        if case.device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # counting FLOP and compiling take their own
        pipe.send((flop, seconds[0] - seconds[1] if seconds else 0))
        for number in iter(pipe.recv, None):
            begin = time.perf_counter()
            amount = one_pass(number)
            if case.device == "cuda":
                torch.cuda.synchronize()
            pipe.send((amount, time.perf_counter() - begin))
        pipe.send(peak_memory(case.device))


def matmul_peak(run, bf16):
    """FLOP a second of a large matrix product in bf16 or fp32, the best of ten."""
    torch.backends.cuda.matmul.allow_tf32 = False
    size = 8192 if run.device.type == "cuda" else 2048
    a = torch.randn(size, size, device=run.device, dtype=torch.bfloat16 if bf16 else None)
    best = 0
    for _ in range(10):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * size ** 3 / (time.perf_counter() - begin))
    return best


def measure(context, case, rounds, peak):
    """A row of the table: both sides of a case in turns, `rounds` passes each. `peak` FLOP/s of a product."""
    sides = {}
    for side in ("ours", "plain"):  # one after the other, so that files and caches are made once
        pipe, end = context.Pipe()
        process = context.Process(target=serve, args=(end, side, case, multiprocessing.get_start_method()))
        process.start()
        end.close()
        sides[side] = SimpleNamespace(pipe=pipe, process=process, warm=pipe.recv(), speeds=[])
    for number in range(rounds):
        for side in sides.values():
            side.pipe.send(number)
            amount, seconds = side.pipe.recv()
            side.speeds.append(amount / seconds)
    for side in sides.values():
        side.pipe.send(None)
        side.memory = side.pipe.recv()
        side.process.join()
        side.speed = statistics.median(side.speeds)
    if case.stage == "knn":
        check_neighbours(case)
    ours, plain = sides.values()
    row = {"case": case.name, "unit": case.unit, "ours": ours.speed, "plain": plain.speed,
           "ratio": ours.speed / plain.speed, "ours_gb": ours.memory, "plain_gb": plain.memory,
           "gflop": ours.warm[0] / 1e9, "share_of_peak": ours.warm[0] * ours.speed / peak,
           "ours_speeds": ours.speeds, "plain_speeds": plain.speeds}
    if case.unit == "s":
        row |= {"ours": case.count / ours.speed, "plain": case.count / plain.speed}
    return row | ({"compile_seconds": ours.warm[1]} if case.compiled else {})


# ---------------------------------------------------------------- several GPUs ------------------------------

def plan(steps):
    """Print what data-parallel training would give for assumed step times (ms) of one GPU."""
    models = {arch: [common.create(arch, 2, 224)] for arch in ("deit_small", "resnet50")}
    for out_dim in (4096, 65536):
        models[f"DINO deit_small, {out_dim} outputs"] = [common.create("deit_small", 0, 224),
                                                         pretrain_dino.Head(384, out_dim)]
    rows = []
    for name, parts in models.items():
        count = sum(p.numel() for part in parts for p in part.parameters())
        for gpus in (8, 32):
            for link in (100, 400):
                sent = 2 * (gpus - 1) / gpus * 4 * count  # bytes: fp32 gradients around a ring
                ms = sent / (link * 1e9 / 8) * 1e3
                shares = [step / max(step, step / 3 + ms) for step in steps]
                rows.append([name, f"{count / 1e6:.2f}", gpus, link, f"{sent / 1e6:.0f}", f"{ms:.1f}",
                             f"{ms * 1.5:.0f}", *(f"{gpus * share:.1f}" for share in shares)])
    head = ["gradients of", "million", "GPUs", "Gbit/s", "MB sent", "ms", "hides from ms",
            *(f"speed-up at {step:g} ms" for step in steps)]
    print_markdown(head, rows)


def print_markdown(head, rows):
    """A table to paste."""
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def figure(value):
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main():
    """Measure, print the table, keep it as JSON where asked."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    stages = list(dict.fromkeys(case.stage for case in all_cases(True, False)))
    parser.add_argument("--stage", nargs="+", choices=stages, default=stages, help="these alone")
    parser.add_argument("--quick", action="store_true", help="smaller batches, two rounds")
    parser.add_argument("--rounds", type=int, help="passes a side (default 4, with --quick 2)")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--plan", type=float, nargs="+", metavar="MS", help="step times of one GPU; no run")
    options = parser.parse_args()
    if options.plan:
        return plan(options.plan)
    run = common.start(SimpleNamespace(device=options.device, amp="auto"))
    kind, rows = run.device.type, []
    peak, peak_fp32 = matmul_peak(run, run.amp == "bf16"), matmul_peak(run, False)
    machine = (f"{common.device_name(run.device)}, precision {run.amp}, Python {platform.python_version()}, "
               f"torch {torch.__version__}, timm {timm.__version__}; a matrix product runs at "
               f"{peak / 1e9:.0f} GFLOP/s")
    print(machine, flush=True)
    context = multiprocessing.get_context("forkserver")  # which imports this file, and so torch, once
    with tempfile.TemporaryDirectory() as folder:
        photographs(folder, 512 if kind == "cuda" else 64)
        for case in all_cases(kind == "cuda", options.quick):
            case.folder, case.device = folder, kind
            if case.stage in options.stage:
                begin = time.time()
                rounds = options.rounds or (2 if options.quick else 4)
                # the k-NN vote is in fp32 everywhere
                row = measure(context, case, rounds, peak_fp32 if case.stage == "knn" else peak)
                rows.append(row)
                print(f"{case.name}: {figure(row['ours'])} against {figure(row['plain'])} {case.unit}, ratio "
                      f"{row['ratio']:.2f} ({time.time() - begin:.0f} s)", flush=True)
                if options.json:
                    Path(options.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    print_markdown(["", "unit", "ours", "GB", "plain", "GB", "times", "share of peak"], [
        [row["case"], row["unit"], figure(row["ours"]), f"{row['ours_gb']:.1f}", figure(row["plain"]),
         f"{row['plain_gb']:.1f}", f"{row['ratio']:.1f}", f"{row['share_of_peak']:.0%}"
         if row["gflop"] else ""] for row in rows])


if __name__ == "__main__":
    main()
