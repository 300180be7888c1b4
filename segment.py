"""Segment with DeepLabv3 on a ResNet or a ViT: train, choose the epoch on validation, test it once; predict new images;
or draw two runs beside the truth.

    python segment.py --arch resnet50 --image-size 128 --epochs 10
    torchrun --nproc_per_node 4 segment.py --data data/mine --arch deit_small --init imagenet
    python segment.py --predict NEW_IMAGES --init runs/RUN/model.pt --output masks/
    python segment.py --compare runs/RESNET runs/DEIT --output comparison.png

Matsoukas et al. 2023 (arXiv:2303.07034), segmentation and figure 2; the head of Chen et al. 2017 (arXiv:1706.05587).
Overlaps are counted at the size of the prepared arrays. predictions.csv has for each test image and each class but the
background its iou_, dice_, hd95_ (95th percentile Hausdorff distance), pixels_ (the area of the truth) and predicted_
(of the prediction); the last three, and hd95 in metrics.json, are in pixels of the source image.
"""
import argparse
import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from tqdm import tqdm

import common
from common import Draws, fail, say

CHECK_EVERY = 20  # steps between looks at the loss: a look waits for the device
SCORES = ["iou", "dice", "iou_set", "dice_set", "hd95"]
YELLOW, BLUE, RED = (255, 221, 0), (40, 120, 255), (240, 40, 40)


def arguments():
    """The command line."""
    parser, groups = common.make_parser(__doc__)
    data, model, train = groups["data"], groups["model"], parser.add_argument_group("training")
    data.conflict_handler = "resolve"  # --metric is classification's elsewhere
    data.add_argument("--metric", choices=["iou", "dice"], help="headline, averaged over images (default iou)")
    model.add_argument("--output-stride", type=int, default=8, choices=[8, 16, 32],
                       help="of a CNN, which is dilated for it (default, paper: 8); a ViT has its patches")
    train.add_argument("--loss", default="ce+dice", choices=["ce+dice", "ce", "dice"], help="(default ce+dice)")
    train.add_argument("--epochs", type=int, default=50)
    train.add_argument("--batch-size", type=int, default=16, help="over all processes (default 16)")
    train.add_argument("--lr", type=float, default=1e-4, help="peak learning rate of Adam (default, paper: 1e-4)")
    train.add_argument("--min-lr", type=float, default=1e-6, help="where the cosine ends (default, paper: 1e-6)")
    train.add_argument("--weight-decay", type=float, default=1e-5, help="(default, paper: 1e-5)")
    train.add_argument("--warmup-steps", type=int, default=500, help="(default 500), at most a quarter of all steps")
    train.add_argument("--clip-grad", type=float, default=1.0, help="gradient norm (default, paper: 1; 0: off)")
    train.add_argument("--scale", type=float, nargs=2, default=[0.5, 1.0], metavar=("LOW", "HIGH"),
                       help="area of the random crop (default 0.5 1)")
    train.add_argument("--jitter", type=float, nargs=4, default=[0.2, 0.2, 0.1, 0.1], metavar=tuple("BCSH"),
                       help="brightness, contrast, saturation, hue (default, paper: 0.2 0.2 0.1 0.1)")
    groups["run"].add_argument("--predict", metavar="FOLDER_OR_CSV",
                               help="no training: masks of these images, at their own size, by the model of --init")
    groups["run"].add_argument("--skip-broken", action="store_true",
                               help="--predict: leave out files that cannot be decoded")
    groups["run"].add_argument("--compare", nargs=2, metavar=("RUN_A", "RUN_B"),
                               help="no training: draw two runs' masks on their test split into --output FILE.png")
    args = common.parse(parser, "segment")
    if not 0 < args.scale[0] <= args.scale[1] <= 1:
        fail(f"--scale {args.scale[0]} {args.scale[1]}: expected 0 < LOW <= HIGH <= 1")
    if args.batch_size < 2:
        fail("--batch-size 1: the head's batch norm needs at least 2 images")
    return args


# ---------------------------------------------------------------- images with masks -------------------------

def check_masks(dataset):
    """Refuse a prepared folder, maybe of somebody's own making, whose masks hold a number that is no class."""
    count = len(dataset.mask_classes)
    if count < 2:
        fail(f"{dataset.folder}/dataset.json: mask_classes needs at least two names, the background's first")
    seen = np.zeros(256, bool)
    for row in np.concatenate([*dataset.rows.values()]):
        seen[dataset.masks[row]] = True
    wrong = [value for value in np.flatnonzero(seen) if value >= count and value != dataset.ignore]
    if wrong:
        fail(f"{dataset.folder}/masks.npy holds {common.some(wrong)}, none of the classes 0 to {count - 1}; name them "
             "all in dataset.json under mask_classes, or under ignore the one that counts nowhere")


def known_pixels(masks, ignore):
    """Where masks hold a class and not the value `ignore` (or None), which counts nowhere: bool, shaped as masks."""
    return torch.ones_like(masks, dtype=torch.bool) if ignore is None else masks != ignore


def crop_masks(masks, boxes, side, flips):
    """Cut and scale masks as crop_resize does images, but to the nearest pixel: (B, S, S) uint8, boxes (B, 4), flips
    (B, 2) bool -> (B, side, side) int64."""
    places = []
    for axis in (0, 1):
        steps = torch.arange(side, device=masks.device).expand(len(masks), side)
        steps = torch.where(flips[:, axis, None], side - 1 - steps, steps)
        start, length = boxes[:, axis, None], boxes[:, axis + 2, None]
        place = (start + (steps + 0.5) * length / side).floor().long()
        places.append(place.clamp(0, masks.shape[1 + axis] - 1))
    sample = torch.arange(len(masks), device=masks.device)[:, None, None]
    return masks[sample, places[0][:, :, None], places[1][:, None, :]].long()


def train_view(images, masks, draws, args, mean, std):
    """A random box of each image and its mask, flips for both, colours for the image: (B, S, S, C) and (B, S, S) uint8
    -> (B, 3, image_size, image_size) float, (B, image_size, image_size) int64."""
    boxes = common.random_boxes(draws, images.shape[1], args.scale)
    flips = draws.uniform(2) < 0.5
    images = common.crop_resize(images, boxes, args.image_size, flips)
    targets = crop_masks(masks, boxes, args.image_size, flips)
    return common.normalize(common.color_jitter(images, draws, args.jitter), mean, std), targets


# ---------------------------------------------------------------- model and loss ----------------------------

class SampleDropout(torch.nn.Dropout):
    """Dropout whose mask is drawn from a seed per sample: it does not depend on how many processes share the batch."""
    seeds = ()

    @torch.compiler.disable
    def forward(self, x):
        """x (B, C, H, W)."""
        if not self.training:
            return x
        noise = []
        for seed in self.seeds:
            generator = torch.Generator(x.device).manual_seed(seed)
            noise.append(torch.rand(x.shape[1:], generator=generator, device=x.device))
        return x * (torch.stack(noise) >= self.p) / (1 - self.p)


class ReachConv(torch.nn.Conv2d):
    """A 3x3 convolution with padding = dilation nearly as wide as the map or wider: its outer taps see little but
    padding. The same sums from what each tap does see, as matrix products; a third of the time or less."""

    def forward(self, x):
        """x (B, C, h, w)."""
        height, width, rate, total = *x.shape[2:], self.dilation[0], 0
        x, taps = x.permute(0, 2, 3, 1), self.weight.permute(2, 3, 0, 1)
        for i, down in enumerate((-rate, 0, rate)):
            for j, right in enumerate((-rate, 0, rate)):
                if abs(down) < height and abs(right) < width:
                    seen = x[:, max(down, 0):height + min(down, 0), max(right, 0):width + min(right, 0)]
                    total = total + F.pad(F.linear(seen.contiguous(), taps[i, j].contiguous()), (
                        0, 0, max(-right, 0), max(right, 0), max(-down, 0), max(down, 0)))
        return total.permute(0, 3, 1, 2)


def feature_map(backbone, images):
    """The last feature map of any timm model (B, C, h, w): a ViT's patch tokens in their places."""
    tokens = backbone.forward_features(images)
    if tokens.ndim == 3:
        tokens = tokens[:, getattr(backbone, "num_prefix_tokens", 0):].unflatten(1, backbone.patch_embed.grid_size)
    nhwc = tokens.shape[-1] == backbone.num_features and tokens.shape[1] != backbone.num_features
    return tokens.permute(0, 3, 1, 2) if nhwc else tokens


class DeepLab(torch.nn.Module):
    """torchvision's DeepLabv3 head on a timm backbone: images (B, 3, S, S) to coarse logits (B, classes, h, w)."""

    def __init__(self, backbone, num_classes, side):
        super().__init__()
        with torch.no_grad():
            shape = feature_map(backbone.eval(), torch.zeros(1, 3, side, side)).shape
        # Chen et al. 2017, section 4.2: rates 6, 12, 18 at output stride 16, twice that at 8
        rates = (12, 24, 36) if shape[2] * 8 >= side else (6, 12, 18)
        self.backbone, self.classifier = backbone, DeepLabHead(shape[1], num_classes, rates)
        self.dropout = self.classifier[0].project[3] = SampleDropout(0.5)
        for branch in self.classifier[0].convs[1:4]:
            if branch[0].dilation[0] >= 0.75 * max(shape[2:]):
                branch[0].__class__ = ReachConv
        for name, parameter in backbone.named_parameters():  # what only a classifier uses
            parameter.requires_grad = not name.startswith((*common.HEADS, "fc_norm.", "attn_pool."))

    def forward(self, images):
        """images (B, 3, S, S) -> (B, classes, h, w)."""
        return self.classifier(feature_map(self.backbone, images))


def build_segmenter(args, num_classes):
    """(DeepLab on --arch with the weights of --init, pretrained_on)."""
    try:
        backbone, pretrained_on = common.build_model(args, 0, output_stride=args.output_stride)
    except (TypeError, AssertionError, NotImplementedError):  # ViTs and the like cannot be dilated
        backbone, pretrained_on = common.build_model(args, 0)
    return DeepLab(backbone, num_classes, args.image_size), pretrained_on


def load_segmenter(path):
    """A model.pt of this stage: (model in eval mode, meta)."""
    weights, meta = common.read_checkpoint(path)
    if meta.get("task") != "masks" and meta.get("classes"):
        fail(f"{path} is a classifier, of finetune.py, and knows no masks; for new images take finetune.py --predict")
    if not meta.get("classes"):
        fail(f"{path}: not the model.pt of a segment.py run, which knows its classes")
    args = argparse.Namespace(**meta | {"init": "random", "seed": 0})
    model, _ = build_segmenter(args, meta["num_classes"])
    try:
        model.load_state_dict({name if name.startswith("classifier.") else f"backbone.{name}": tensor
                               for name, tensor in weights.items()})
    except RuntimeError as error:
        fail(f"{path} does not fit {meta['arch']}: {error}")
    return model.eval(), meta


def coarse_logits(model, images, image_size, mean, std, run):
    """Whole images (B, S, S, C) uint8 -> coarse logits (B, classes, h, w)."""
    view = common.eval_view(images.to(run.device), image_size, mean, std, whole=True)
    with run.autocast():
        return model(view)


def upsample(logits, size):
    """(B, C, h, w) -> (B, C, *size) float32, bilinear."""
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


def full_size(logits, size):
    """Class indices (*size) uint8 of coarse logits (C, h, w), a class at a time: large images have large masks."""
    best = upsample(logits[None, :1], size)[0, 0]
    mask = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    for c in range(1, len(logits)):
        value = upsample(logits[None, c:c + 1], size)[0, 0]
        mask[value > best] = c
        best = torch.maximum(best, value)
    return mask


def loss_function(logits, targets, kind, ignore=None):
    """Loss of each image, (B,): cross-entropy over all pixels and classes, plus one minus the soft Dice, averaged over
    the classes but the background (Milletari et al. 2016, with a sum instead of squares; one pixel is added to both
    sides of the fraction, so that a class that is rightly absent costs nothing). Dice goes by the image, not the batch:
    the mean then does not depend on how a batch is shared. logits (B, C, H, W), targets (B, H, W) int64."""
    known = known_pixels(targets, ignore)
    total = 0.0
    if "ce" in kind.split("+"):
        entropy = F.cross_entropy(logits, targets.masked_fill(~known, -100), reduction="none", ignore_index=-100)
        total = total + entropy.sum((1, 2)) / known.sum((1, 2)).clamp(min=1)
    if "dice" in kind.split("+"):
        share, dices = logits.softmax(1) * known[:, None], []
        for c in range(1, logits.shape[1]):
            truth = ((targets == c) & known).float()
            both = (share[:, c] * truth).sum((1, 2))
            sizes = share[:, c].sum((1, 2)) + truth.sum((1, 2))
            dices.append((2 * both + 1) / (sizes + 1))
        total = total + 1 - torch.stack(dices).mean(0)
    return total


# ---------------------------------------------------------------- metrics -----------------------------------

def outline(mask):
    """The pixels of a mask (H, W) bool that touch, by a side, another value or the image's edge."""
    wide = F.pad(mask, (1, 1, 1, 1))
    return mask & ~(wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:])


def nearest(points, others):
    """Distance of each of points (N, 2) to the nearest of others (M, 2), (N,) float."""
    exact = "donot_use_mm_for_euclid_dist"  # |x|^2 + |y|^2 - 2xy would cancel, the more so in TF32
    return torch.cat([torch.cdist(part, others, compute_mode=exact).amin(1) for part in points.split(4096)])


def hausdorff95(a, b, scale=(1.0, 1.0)):
    """The larger of the two directed 95th percentiles of the distances between the outlines of two masks (H, W) bool,
    in pixels times scale (y, x); NaN where a mask is empty."""
    scale = torch.tensor(scale, dtype=torch.float32, device=a.device)
    a = outline(a).nonzero() * scale
    b = outline(b).nonzero() * scale
    if not len(a) or not len(b):
        return math.nan
    return max(torch.quantile(nearest(a, b), 0.95).item(), torch.quantile(nearest(b, a), 0.95).item())


def pixel_size(size, fit, side):
    """(height, width) of a pixel of the arrays in pixels of its source, an image of size (height, width)."""
    _, _, height, width = common.fit_box(*map(int, size), fit)
    return height / side, width / side


def overlap(table):
    """(iou, dice), each (..., ) float, NaN where neither truth nor prediction has the class. table (..., 3 or more):
    pixels of both, of the truth, of the prediction."""
    both, truth, said = table[..., 0], table[..., 1], table[..., 2]
    total = np.where(truth + said > 0, truth + said, np.nan)
    return both / (total - both), 2 * both / total


def class_scores(table):
    """SCORES of one class from its (N, 4) pixels of both, truth and prediction, and HD95. The rule for empty masks: an
    image whose truth and prediction both lack the class is left out of the averages over images; one where a single one
    of the two lacks it counts 0, and is left out of HD95's. None: not defined."""
    values = [*overlap(table), *overlap(table[:, :3].sum(0, keepdims=True)), table[:, 3]]
    return {name: common.mean_defined([v for v in value if not math.isnan(v)]) for name, value in zip(SCORES, values)}


def score_masks(table, classes, headline, groups=None):
    """Every score per class and its mean over the foreground, and the headline's 95 % interval over images (or groups).
    table (N, C, 4) as for class_scores."""
    each = {name: class_scores(table[:, c]) for c, name in enumerate(classes)}
    mean = {score: common.mean_defined([each[name][score] for name in classes[1:]]) for score in SCORES}
    column = overlap(table[:, 1:])[SCORES.index(headline)]

    def average(rows):
        values = column[rows]
        return common.mean_defined([v[~np.isnan(v)].mean() for v in values.T if not np.isnan(v).all()])
    return {**mean, "classes": each, "undefined": [name for name in classes[1:] if each[name]["iou"] is None],
            "interval": common.bootstrap_interval(average, len(table), groups)}


@torch.inference_mode()
def evaluate(model, dataset, rows, args, run, distances=False):
    """(table (n, C, 4) float64 as for class_scores, losses (n,)), numpy, of rows of a dataset, in their order, on every
    process. Whole images, counted at the arrays' size; HD95, in pixels of the source, only if `distances`. A pixel of
    the value `ignore` belongs to no mask, true or predicted."""
    model.eval()
    count = len(dataset.mask_classes)
    batches = common.shards(rows, run, 32)
    pairs = zip(batches, common.load_batches(dataset.images, batches, run.device),
                common.load_batches(dataset.masks, batches, run.device))
    parts = [torch.zeros(0, count, 5, dtype=torch.float64)]
    for batch, images, masks in tqdm(pairs, "evaluating", len(batches), leave=False, disable=run.rank > 0):
        logits = coarse_logits(model, images, args.image_size, dataset.mean, dataset.std, run)
        table = torch.full((len(batch), count, 5), math.nan, dtype=torch.float64)
        for i, row in enumerate(batch):
            wide = upsample(logits[i:i + 1], masks.shape[1:])
            truth, said = masks[i].long(), wide[0].argmax(0)
            known = known_pixels(truth, dataset.ignore)
            pairs_of = torch.bincount((truth * count + said)[known], minlength=count ** 2).view(count, count)
            table[i, :, :3] = torch.stack([pairs_of.diagonal(), pairs_of.sum(1), pairs_of.sum(0)], 1).cpu()
            table[i, :, 4] = loss_function(wide, truth[None], args.loss, dataset.ignore).cpu()
            unit = pixel_size(dataset.sizes[row], dataset.fit, dataset.side)
            for c in range(1, count if distances else 0):
                table[i, c, 3] = hausdorff95((truth == c) & known, (said == c) & known, unit)
        parts.append(table)
    table = common.gather_rows(torch.cat(parts), len(rows), run).numpy()
    return table[:, :, :4], table[:, 0, 4]


def majority(masks, values):
    """Of masks (n, ...) uint8 by n annotators the value that more than half of them give each pixel, else 0."""
    return np.select([(masks == value).sum(0) * 2 > len(masks) for value in values], values, 0).astype(np.uint8)


def score_annotators(model, dataset, args, run):
    """{annotator: scores of the test split against masks-ANNOTATOR.npy}, and against their "majority"."""
    experts = {}
    for file in sorted(dataset.folder.glob("masks-*.npy")):
        experts[file.stem.removeprefix("masks-")] = np.load(file, mmap_mode="r")
    if not experts:
        return {}
    rows = dataset.rows["test"]
    values = [*range(len(dataset.mask_classes)), *([] if dataset.ignore is None else [dataset.ignore])]
    agreed = np.zeros(dataset.masks.shape, np.uint8)  # takes memory where it is written, in the rows of test
    for row in rows:
        agreed[row] = majority(np.stack([masks[row] for masks in experts.values()]), values)
    scores = {}
    for name, masks in {**experts, "majority": agreed}.items():
        table, _ = evaluate(model, replace(dataset, masks=masks), rows, args, run)
        scores[name] = score_masks(table, dataset.mask_classes, dataset.metric, dataset.groups_of(rows))
    return scores


def constant_score(dataset, device):
    """IoU over images on test of the best mask that is the same for every image: where the class is more frequent in
    train than the threshold that does best on train (up to 1024 images, 128 pixels a side). Mean over the
    foreground."""
    places = ((np.arange(128) + 0.5) * dataset.side / 128).astype(int)
    grids = {}
    for name in ("train", "test"):
        rows = dataset.rows[name]
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), 1024)).astype(int)]
        grid = np.stack([dataset.masks[row][np.ix_(places, places)] for row in rows])
        grids[name] = torch.from_numpy(grid).to(device)

    def iou(grid, c, mask):
        truth = (grid == c) & known_pixels(grid, dataset.ignore)
        either = ((truth | mask) & known_pixels(grid, dataset.ignore)).sum((1, 2))
        both = (truth & mask).sum((1, 2))
        return (both[either > 0] / either[either > 0]).mean().item() if (either > 0).any() else None

    train, scores = grids["train"], []
    known = known_pixels(train, dataset.ignore)
    for c in range(1, len(dataset.mask_classes)):
        share = ((train == c) & known).sum(0) / known.sum(0).clamp(min=1)
        level = max(np.arange(0, 1, 0.05), key=lambda level: iou(train, c, share > level) or 0)
        scores.append(iou(grids["test"], c, share > level))
    return common.mean_defined(scores)


# ---------------------------------------------------------------- training ----------------------------------

def learning_rate(step, steps, args):
    """Linear warm-up, then cosine to min_lr, at step of steps."""
    warmup = min(args.warmup_steps, steps // 4)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def train_epoch(model, dropout, optimizer, scaler, dataset, args, run, epoch):
    """One pass over train. Returns the mean loss and the images a second."""
    rows = dataset.rows["train"]
    order = common.epoch_order(len(rows), args.batch_size, args.seed, epoch)
    mine = common.own_share(args.batch_size, run)
    torch.manual_seed(hash((args.seed, epoch)) % 2 ** 31)  # of drop path and the like, where there are any
    model.train()
    total, begin = torch.zeros((), device=run.device), time.time()
    batches = [rows[batch[mine]] for batch in order]
    pairs = zip(common.load_batches(dataset.images, batches, run.device),
                common.load_batches(dataset.masks, batches, run.device))
    bar = tqdm(pairs, f"epoch {epoch + 1}/{args.epochs}", len(order), leave=False, disable=run.rank > 0)
    for i, (images, masks) in enumerate(bar):
        step = epoch * len(order) + i
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.epochs * len(order), args)
        draws = Draws((args.seed, epoch, i), args.batch_size, mine, run.device)
        dropout.seeds = torch.randint(2 ** 62, (args.batch_size,), generator=draws.generator)[mine].tolist()
        views, targets = train_view(images, masks, draws, args, dataset.mean, dataset.std)
        with run.autocast():
            logits = model(views)
        loss = loss_function(upsample(logits, targets.shape[1:]), targets, args.loss, dataset.ignore).mean()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if args.clip_grad:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        total += loss.detach()
        if (i + 1) % CHECK_EVERY == 0 or i + 1 == len(order):
            mean = common.checked_mean(total, i + 1, step, epoch, args, run)
            bar.set_postfix(loss=f"{mean.item():.3f}")
    return mean.item(), len(order) * args.batch_size / (time.time() - begin)


def save_model(path, model, dataset, args, pretrained_on):
    """model.pt: the backbone in timm's names, the head as classifier.*, and all that is needed to use them."""
    weights = {k.removeprefix("backbone."): v.cpu().contiguous() for k, v in model.state_dict().items()}
    content = {"stage": "segment", "task": "masks", "arch": args.arch, "init": args.init_label,
               "num_classes": len(dataset.mask_classes), "classes": dataset.mask_classes, "ignore": dataset.ignore,
               "dataset": dataset.name, "image_size": args.image_size, "side": dataset.side, "fit": dataset.fit,
               "mean": dataset.mean, "std": dataset.std, "output_stride": args.output_stride,
               "pretrained_on": pretrained_on, "state_dict": weights}
    common.write_atomic(path, lambda part: torch.save(content, part))


def fit(model, dataset, args, run, folder, pretrained_on):
    """Train from the last checkpoint to the last epoch; model.pt is the best on validation. Returns the log."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.lr,
                                 weight_decay=args.weight_decay, fused=run.device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp == "fp16")
    log = []
    checkpoint = common.load_checkpoint(folder, run)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        log = checkpoint["log"]
        say(f"resuming {folder} after epoch {len(log)} of {args.epochs}")
    wrapped = common.sync_batch_norm(model, run)
    if run.world > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(wrapped, broadcast_buffers=False)
    if args.compile:
        wrapped = torch.compile(wrapped)
    for epoch in range(len(log), args.epochs):
        begin = time.time()
        loss, speed = train_epoch(wrapped, model.dropout, optimizer, scaler, dataset, args, run, epoch)
        table, losses = evaluate(model, dataset, dataset.rows["val"], args, run)
        values = {"loss": float(losses.mean()), **score_masks(table, dataset.mask_classes, dataset.metric)}
        score = -values["loss"] if values[dataset.metric] is None else values[dataset.metric]
        improved = score > max((entry["score"] for entry in log), default=-math.inf)
        log.append({"epoch": epoch + 1, "loss": loss, "val": values, "score": score,
                    "lr": optimizer.param_groups[0]["lr"], "images_per_second": speed,
                    "seconds": time.time() - begin})
        if run.rank == 0:  # model.pt first: were we killed between the two, the epoch would run again
            if improved:
                save_model(folder / "model.pt", model, dataset, args, pretrained_on)
            common.save_checkpoint(folder, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                            "scaler": scaler.state_dict(), "log": log})
        say(f"epoch {epoch + 1}/{args.epochs}  loss {loss:.4f}  val loss {values['loss']:.4f}  val {dataset.metric} "
            f"{common.show(values[dataset.metric])}{' *' if improved else ''}  {speed:.1f} images/s")
    common.barrier()  # the others must not load model.pt before it is written
    return log


def write_predictions(path, dataset, table):
    """predictions.csv of the test split, a row an image, with the columns that are named at the top of this file. table
    (n, C, 4) as for class_scores."""
    rows = dataset.rows["test"]
    head, units, lines = ["image", "group"], [], []
    for name in dataset.mask_classes[1:]:
        head += [f"{what}_{name}" for what in ("iou", "dice", "hd95", "pixels", "predicted")]
    for row in rows:
        units.append(math.prod(pixel_size(dataset.sizes[row], dataset.fit, dataset.side)))
    areas = table[:, 1:, 1:3] * np.array(units)[:, None, None]
    iou, dice = overlap(table[:, 1:])
    columns = np.stack([iou, dice, table[:, 1:, 3], areas[..., 0], areas[..., 1]], 2).reshape(len(rows), -1)
    for row, values in zip(rows, columns):
        group = dataset.groups[row] if dataset.groups else ""
        lines.append([dataset.paths[row], group, *("" if math.isnan(v) else f"{v:.8g}" for v in values)])
    common.write_table(path, head, lines)


def finish(dataset, args, run, folder, log, pretrained_on):
    """Test the best epoch once; write predictions.csv, curves.png and, last, metrics.json."""
    model = common.to_device(load_segmenter(folder / "model.pt")[0], run)
    rows = dataset.rows["test"]
    table, losses = evaluate(model, dataset, rows, args, run, distances=True)
    annotators = score_annotators(model, dataset, args, run)
    if run.rank > 0:
        return
    scores = score_masks(table, dataset.mask_classes, dataset.metric, dataset.groups_of(rows))
    test = {"loss": float(losses.mean()), **scores, "constant_iou": constant_score(dataset, run.device),
            "annotators": annotators}
    write_predictions(folder / "predictions.csv", dataset, table)
    best, show = max(log, key=lambda entry: entry["score"]), common.show
    epochs = [entry["epoch"] for entry in log]
    common.draw_plot(folder / "curves.png", [
        {"title": "loss", "xlabel": "epoch", "ylabel": args.loss, "series": [
            {"label": "train", "x": epochs, "y": [entry["loss"] for entry in log]},
            {"label": "validation", "x": epochs, "y": [entry["val"]["loss"] for entry in log]}]},
        {"title": f"validation {dataset.metric}", "xlabel": "epoch", "ylabel": dataset.metric, "series": [
            {"label": "validation", "x": epochs, "y": [e["val"][dataset.metric] for e in log], "colour": 1}]}])
    headline = f"{dataset.metric} {show(test[dataset.metric])}"
    common.write_json(folder / "metrics.json", {
        "stage": "segment", "dataset": dataset.name, "arch": args.arch, "init": args.init_label,
        "pretrained_on": pretrained_on, "seed": args.seed, "metric": dataset.metric, "val": best["val"],
        "test": test, "best_epoch": best["epoch"], "counts": dataset.counts, "split": dataset.fingerprint,
        "leakage": dataset.leakage, "loss": args.loss, "image_size": args.image_size,
        "output_stride": args.output_stride, "epochs": args.epochs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": sum(entry["seconds"] for entry in log),
        "images_per_second": float(np.median([entry["images_per_second"] for entry in log])),
        "device": common.device_name(run.device), "amp": run.amp, "world_size": run.world,
        "summary": f"test {headline}"})
    common.print_table(["test", *SCORES], [[name, *(show(row[score]) for score in SCORES)] for name, row in (
        *test["classes"].items(), ("mean of foreground", test))])
    if annotators:
        common.print_table(["against", "iou", "dice"], [
            [name, show(row["iou"]), show(row["dice"])] for name, row in annotators.items()])
    low, high = test["interval"] or (None, None)
    say(f"best epoch {best['epoch']} of {args.epochs}, {len(rows)} test images, {headline} (95 % interval {show(low)} "
        f"to {show(high)}); the best constant mask has IoU {show(test['constant_iou'])}")
    if test["undefined"]:
        say(f"neither in the test split nor predicted, left out of the averages: {', '.join(test['undefined'])}")
    say(f"written: {folder}")


# ---------------------------------------------------------------- new images --------------------------------

def mask_files(source, names):
    """Where the masks of images go: their paths below the source, with .png for their suffix; no two the same."""
    files = {}
    for name in names:
        path = Path(name)
        stem = path.with_suffix("") if path.suffix.lower() in common.SUFFIXES else path
        file = f"{stem.as_posix()}.png"
        if path.is_absolute() or ".." in path.parts:
            fail(f"--predict {source}: {name} is not below its folder, so that its mask has no place below masks/")
        if file in files:
            fail(f"--predict {source}: {files[file]} and {name} would share the mask {file}; rename one")
        files[file] = name
    return [*files]


@torch.inference_mode()
def write_masks(model, meta, paths, files, run, broken):
    """Write this process's share of masks, of the images `paths` into `files`, each at its image's own size and shape:
    0 and 255 for two classes, else class indices under a palette. Returns (height, width, pixels of each class) of
    every image, (n, 2 + C) int64, zeros for those that go into `broken`."""
    classes = len(meta["classes"])
    palette = b"".join(bytes.fromhex(colour[1:]) for colour in ["#000000", *common.COLOURS * 37][:256])
    mine = range(run.rank, len(paths), run.world)
    areas = torch.zeros(len(mine), 2 + classes, dtype=torch.int64)
    loader = common.load_files([paths[i] for i in mine], meta["side"], meta["fit"], broken)
    squares = (pair for images, sizes in loader for pair in zip(images, sizes))
    bar = tqdm(squares, "predicting", len(mine), leave=False, disable=run.rank > 0)
    for k, (image, (height, width)) in enumerate(bar):
        if paths[mine[k]] in broken:
            continue
        # one at a time: a mask does not depend on what else is predicted
        logits = coarse_logits(model, image[None], meta["image_size"], meta["mean"], meta["std"], run)
        _, _, box_height, box_width = common.fit_box(height, width, meta["fit"])
        square = full_size(logits[0], (box_height, box_width)).cpu().numpy()
        mask = common.from_square(square, height, width, meta["fit"], Image.Resampling.NEAREST)
        picture = Image.fromarray(mask * 255 if classes == 2 else mask)
        if classes > 2:
            picture.putpalette(palette)
        file = files[mine[k]]
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
        areas[k] = torch.tensor([height, width, *np.bincount(mask.ravel(), minlength=classes)])
    return common.gather_rows(areas, len(paths), run).numpy()


def predict_new(args, run):
    """--predict: OUTPUT/masks/, a PNG an image, by the model of --init, and masks.csv with the area of each class in
    pixels and as a fraction of the image. Nothing is left behind where a file is broken."""
    if args.init in ("random", "imagenet", "imagenet-dino"):
        fail("--predict needs --init RUN/model.pt, a model that segment.py has trained")
    model, meta = load_segmenter(args.init)
    root, names = common.new_images(args.predict)
    files = mask_files(args.predict, names)
    folder = Path(args.output or "predictions")
    masks, partial = folder / "masks", folder / "masks.partial"
    if (folder / "args.json").exists() or (folder.exists() and not folder.is_dir()):
        fail(f"--output {folder} holds a training run or is a file; give a new folder for the predictions")
    if masks.exists() and not args.overwrite:
        fail(f"{masks} is there already; give another --output, or --overwrite to replace it")
    common.barrier()  # every process has looked before one of them writes
    if run.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
    common.barrier()
    paths, broken = [str(root / name) for name in names], {}
    try:
        areas = write_masks(common.to_device(model, run), meta, paths, [partial / file for file in files], run, broken)
        broken = common.report_broken(broken, run, args.skip_broken)
        if run.rank > 0:
            return
        head, rows = ["image", "mask", "height", "width"], []
        for name in meta["classes"][1:]:
            head += [f"area_{name}", f"fraction_{name}"]
        for path, name, file, (height, width, _, *pixels) in zip(paths, names, files, areas):
            if path not in broken:
                rows.append([name, f"masks/{file}", height, width])
                for count in pixels:
                    rows[-1] += [count, f"{count / (height * width):.6f}"]
        partial.mkdir(parents=True, exist_ok=True)
        if masks.exists():
            shutil.rmtree(masks)
        partial.rename(masks)
        common.write_table(folder / "masks.csv", head, rows)
    finally:
        if run.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
    if meta["fit"] == "crop":
        say("note: the model sees the centre square of an image; what lies outside of it is background in its mask")
    say(f"written: {folder}/masks.csv and {len(rows)} masks")


# ---------------------------------------------------------------- two runs side by side ---------------------

# a region's distance from the image's largest, as a share of the image's diagonal
BINS = {"main region": 0, "within 10 %": 0.1, "10 to 25 %": 0.25, "beyond 25 %": math.inf}


def components(mask):
    """The regions of a mask (H, W) bool: (H, W) int64, 0 outside, 1 the largest. Pixels within 2 of each other (by rows
    and by columns) belong together, so that a thin structure that resampling has broken is one region."""
    labels = torch.arange(1, mask.numel() + 1, dtype=torch.float64, device=mask.device).view(mask.shape) * mask
    while True:  # every pixel takes the largest number around it
        spread = F.max_pool2d(labels[None, None], 5, 1, 2)[0, 0] * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    _, inverse, sizes = torch.unique(labels[mask], return_inverse=True, return_counts=True)
    result = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    result[mask] = sizes.argsort(descending=True, stable=True).argsort()[inverse] + 1
    return result


def region_scores(truth, said, unit=(1.0, 1.0)):
    """For each region of the truth, largest first: (distance of its nearest pixel from the largest region, IoU). A
    predicted pixel outside the truth is held against the region nearest to it, so that an image of one region has its
    ordinary IoU. truth, said (H, W) bool; unit: height and width of a pixel, in which distances are measured."""
    regions = components(truth)
    unit = torch.tensor(unit)
    parts, edges = [], []
    for k in range(int(regions.max())):
        parts.append(regions == k + 1)
        edges.append(outline(parts[k]).nonzero() * unit)
    false = (said & ~truth).nonzero() * unit
    owner = torch.stack([nearest(false, edge) for edge in edges]).argmin(0) if len(false) else torch.zeros(0)
    scores = []
    for k, (part, edge) in enumerate(zip(parts, edges)):
        union = part.sum() + (owner == k).sum()
        scores.append((nearest(edge, edges[0]).min().item(), ((said & part).sum() / union).item()))
    return scores


def read_run(folder):
    """The args.json of a finished run of this stage."""
    for name in ("args.json", "model.pt", "metrics.json"):
        if not (folder / name).is_file():
            fail(f"--compare {folder}: not a finished run of segment.py, it has no {name}")
    stored = json.loads((folder / "args.json").read_text())
    if stored["stage"] != "segment" or "data" not in stored:
        fail(f"--compare {folder}: a run of {stored['stage']}.py, or of an earlier version, not of this segment.py")
    return stored


@torch.inference_mode()
def foreground(path, dataset, rows, run):
    """Where the model.pt at `path` sees any class but the background: (n, S, S) bool, on the CPU."""
    model, meta = load_segmenter(path)
    model, parts = common.to_device(model, run), []
    for images in common.load_batches(dataset.images, common.shards(rows, run, 32), run.device):
        logits = coarse_logits(model, images, meta["image_size"], meta["mean"], meta["std"], run)
        parts += [full_size(coarse, images.shape[1:3]).cpu() > 0 for coarse in logits]
    return torch.stack(parts)


def draw_outlines(square, masks, size, fit, side):
    """An image (S, S, 1 or 3) uint8 in the proportions of its source, its long side `side`, with the outlines of masks
    [((S, S) bool, colour)], the first drawn thickest so that it shows beneath the others."""
    canvas = common.in_proportion(square, size, fit, side).copy()
    for i, (mask, colour) in enumerate(masks):
        wide = common.in_proportion(mask.numpy().astype(np.uint8) * 255, size, fit, side)[..., 0] > 127
        reach = 1 if i else 2
        edge = outline(torch.from_numpy(wide))[None].float()
        canvas[F.max_pool2d(edge, 2 * reach + 1, 1, reach)[0].numpy() > 0] = colour
    return canvas


def compare(args, run):
    """--compare: a picture of the test images on which B beats A most, A beats B most, and those in the middle, with
    the truth in yellow, A in blue, B in red; below it, and in FILE.json, the mean IoU of the truth's regions by their
    distance from the image's largest. Classes other than the background count as one."""
    output = Path(args.output or "comparison.png")
    if output.suffix.lower() != ".png" or run.world > 1:
        fail(f"--compare writes one picture, by one process: --output {output} must end in .png")
    folders = [Path(name) for name in args.compare]
    stored = [read_run(folder) for folder in folders]
    data, other = (run_of["data"] for run_of in stored)
    if data["fingerprint"] != other["fingerprint"]:
        fail(f"--compare: the runs are on different data, {data['folder']} and {other['folder']}: their images, "
             "labels, splits or classes differ")
    dataset = common.open_dataset(data["folder"])
    if dataset.fingerprint != data["fingerprint"] or dataset.masks is None:
        fail(f"--compare: {data['folder']} is not as it was for these runs: its images, labels, splits or classes have "
             "changed")
    names = [folder.name for folder in folders]
    if stored[0]["arguments"]["arch"] != stored[1]["arguments"]["arch"]:
        names = [run_of["arguments"]["arch"] for run_of in stored]

    rows = dataset.rows["test"]
    truths = torch.from_numpy(dataset.masks[rows])
    known = known_pixels(truths, dataset.ignore)
    truths = (truths > 0) & known
    said = [foreground(folder / "model.pt", dataset, rows, run) & known for folder in folders]
    iou = []
    for masks in said:
        counts = torch.stack([(truths & masks).sum((1, 2)), truths.sum((1, 2)), masks.sum((1, 2))], 1)
        iou.append(overlap(counts.double().numpy())[0])
    iou = np.array(iou)

    found = {name: [] for name in BINS}
    for i in np.flatnonzero(truths.any(2).any(1)):
        size = dataset.sizes[rows[i]]
        unit = pixel_size(size, dataset.fit, dataset.side)
        pair = [region_scores(truths[i], masks[i], unit) for masks in said]
        for k, ((far, a), (_, b)) in enumerate(zip(*pair)):
            share = far / math.hypot(*size)
            found[next(name for name, end in BINS.items() if k == 0 or 0 < share <= end)].append((a, b))

    order = [i for i in np.argsort(iou[0] - iou[1], kind="stable") if np.isfinite(iou[:, i]).all()]
    if not order:
        fail("--compare: no test image has a mask")
    middle = len(order) // 2
    pictures, captions = [], []
    for i in dict.fromkeys([*order[:2], *order[max(0, middle - 1):middle + 1], *order[-2:]]):
        truth, a, b = (truths[i], YELLOW), (said[0][i], BLUE), (said[1][i], RED)
        image, size = dataset.images[rows[i]], dataset.sizes[rows[i]]
        pictures.append([draw_outlines(image, masks, size, dataset.fit, 320)
                         for masks in ([], [truth, a], [truth, b], [truth, a, b])])
        captions.append([Path(dataset.paths[rows[i]]).name, (f"{names[0]}  IoU {iou[0, i]:.3f}", BLUE),
                         (f"{names[1]}  IoU {iou[1, i]:.3f}", RED), f"difference {iou[0, i] - iou[1, i]:+.3f}"])
    output.parent.mkdir(parents=True, exist_ok=True)
    title = f"{dataset.name}, test: truth yellow, {names[0]} blue, {names[1]} red; sorted by the difference"
    common.draw_grid(output, pictures, captions, None, 320, title)

    means = {bin: np.mean(pairs, 0).tolist() if pairs else [None, None] for bin, pairs in found.items()}
    common.draw_plot(output.with_suffix(".regions.png"), [{
        "title": "IoU by distance from the image's largest region", "ylabel": "mean IoU", "ylim": (0, 1),
        "xlabel": "distance, share of the image's diagonal (number of regions)",
        "xnames": [f"{bin} ({len(pairs)})" for bin, pairs in found.items()],
        "series": [{"label": name, "x": list(range(len(BINS))), "y": [mean[k] for mean in means.values()],
                    "kind": "bars"} for k, name in enumerate(names)]}], (800, 420))
    mean_iou = np.nanmean(iou, 1).tolist()
    regions = {bin: {"count": len(found[bin]), "iou": means[bin]} for bin in BINS}
    common.write_json(output.with_suffix(".json"), {
        "runs": args.compare, "names": names, "iou": mean_iou, "regions": regions})
    common.print_table(["mean IoU", "regions", *names], [
        ["images", len(order), *map(common.show, mean_iou)], *(
            [bin, len(found[bin]), *map(common.show, means[bin])] for bin in BINS)])
    say(f"written: {output}, {output.with_suffix('.regions.png')}, {output.with_suffix('.json')}")


def main():
    """Train, validate, test; or predict; or compare."""
    args = arguments()
    run = common.start(args)
    if args.predict or args.compare:
        return predict_new(args, run) if args.predict else compare(args, run)
    common.own_share(args.batch_size, run)
    dataset = common.load_dataset(args, masks=True)
    check_masks(dataset)
    folder = common.open_run(args, run, dataset)
    common.note_enlarged(dataset, args.image_size, dataset.side)
    if len(dataset.rows["train"]) < args.batch_size:
        fail(f"--batch-size {args.batch_size} is more than the {len(dataset.rows['train'])} training images")
    model, pretrained_on = build_segmenter(args, len(dataset.mask_classes))
    model = common.to_device(model, run)
    common.write_args(folder, args, run, dataset, ["curves.png"])
    log = fit(model, dataset, args, run, folder, pretrained_on)
    finish(dataset, args, run, folder, log, pretrained_on)


if __name__ == "__main__":
    common.launch(main)
