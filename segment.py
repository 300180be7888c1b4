"""Segment with DeepLabv3 on a ResNet or a ViT: train, choose the epoch on validation, test it once; predict new images;
or draw two runs beside the truth.

    python segment.py --arch resnet50 --image-size 128 --epochs 10
    torchrun --nproc_per_node 4 segment.py --data data/mine --arch deit_small --init imagenet
    python segment.py --test data/other_hospital --init runs/RUN/model.pt
    python segment.py --predict NEW_IMAGES --init runs/RUN/model.pt --output masks/
    python segment.py --compare runs/RESNET runs/DEIT --output comparison.png

Matsoukas et al. 2023 (arXiv:2303.07034), segmentation and figure 2; the head of Chen et al. 2017 (arXiv:1706.05587).
Overlaps are counted at the size of the prepared arrays. predictions.csv has for each test image and each class but the
background its iou_, dice_, hd95_ (95th percentile Hausdorff distance), pixels_ (the area of the truth) and predicted_
(of the prediction); the last three, and hd95 in metrics.json, are in pixels of the source image. test_masks/ has the
predicted mask of each, named by its row in labels.csv.
"""
import json
import math
import shutil
import time
from pathlib import Path

import common  # before PyTorch, whose threads it tells how to wait
from common import Draws, fail, say

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from tqdm import tqdm

SCORES = ["iou", "dice", "iou_set", "dice_set", "hd95"]
COUNTS = ["n", "hd95_n", "lesions", "found"]  # images, of each class, behind the scores
YELLOW, BLUE, RED = "#ffdd00", "#2878ff", "#f02828"


def arguments():
    """The command line."""
    parser, groups = common.make_parser(__doc__)
    data, model = groups["data"], groups["model"]
    train = common.add_training(parser, groups, 16, [0.5, 1.0])
    data.conflict_handler = "resolve"  # --metric is classification's elsewhere
    data.add_argument("--metric", choices=["iou", "dice"], help="headline, averaged over images (default iou)")
    model.add_argument("--output-stride", type=int, default=8, choices=[8, 16, 32],
                       help="of a CNN, which is dilated for it (default, paper: 8); a ViT has its patches")
    train.add_argument("--loss", default="ce+dice", choices=["ce+dice", "ce", "dice"], help="(default ce+dice)")
    groups["run"].add_argument("--overlay", action="store_true", help="--predict: also overlays/, the outlines on each image")
    groups["run"].add_argument("--compare", nargs=2, metavar=("RUN_A", "RUN_B"),
                               help="no training: draw two runs' masks on their test split into --output FILE.png")
    args = common.parse(parser, "segment")
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
    flips = common.random_flips(draws, args.flips)
    angles = common.random_angles(draws, args.rotate)
    images = common.rotate(common.crop_resize(images, boxes, args.image_size, flips), angles)
    targets = crop_masks(masks, boxes, args.image_size, flips)
    if angles is not None:
        targets = common.rotate(targets[:, None].float(), angles, "nearest")[:, 0].long()
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


class ReachConv(torch.nn.Module):
    """A dilated 3x3 convolution, computed tap by tap and without what lies in the padding. Where the dilation is nearly
    as wide as the map that is most of it: a third of the time or less."""

    def __init__(self, conv):
        super().__init__()
        self.weight = conv.weight  # (C_out, C_in, 3, 3)
        self.rate = conv.dilation[0]

    def forward(self, x):
        """x (B, C_in, h, w) -> (B, C_out, h, w)."""
        height, width = x.shape[2:]
        x = x.permute(0, 2, 3, 1)
        taps = self.weight.permute(2, 3, 0, 1)
        total = 0
        for i, down in enumerate((-self.rate, 0, self.rate)):
            for j, right in enumerate((-self.rate, 0, self.rate)):
                if abs(down) >= height or abs(right) >= width:
                    continue
                seen = x[:, max(down, 0):height + min(down, 0), max(right, 0):width + min(right, 0)]
                part = F.linear(seen.contiguous(), taps[i, j].contiguous())
                total = total + F.pad(part, (0, 0, max(-right, 0), max(right, 0), max(-down, 0), max(down, 0)))
        return total.permute(0, 3, 1, 2)


class DeepLab(torch.nn.Module):
    """torchvision's DeepLabv3 head on a timm backbone: images (B, 3, S, S) to coarse logits (B, classes, h, w)."""

    def __init__(self, backbone, num_classes, side):
        super().__init__()
        with torch.no_grad():
            features = backbone.eval().forward_features(torch.zeros(1, 3, side, side))
            shape = common.as_map(backbone, features).shape
        # Chen et al. 2017, section 4.2: rates 6, 12, 18 at output stride 16, twice that at 8
        rates = (12, 24, 36) if shape[2] * 8 >= side else (6, 12, 18)
        self.backbone = backbone
        self.classifier = DeepLabHead(shape[1], num_classes, rates)
        self.dropout = self.classifier[0].project[3] = SampleDropout(0.5)
        for branch in self.classifier[0].convs[1:4]:
            if branch[0].dilation[0] >= 0.75 * max(shape[2:]):
                branch[0] = ReachConv(branch[0])
        for name, parameter in backbone.named_parameters():  # what only a classifier uses
            parameter.requires_grad = not name.startswith((*common.HEADS, "fc_norm.", "attn_pool."))

    def forward(self, images):
        """images (B, 3, S, S) -> (B, classes, h, w)."""
        return self.classifier(common.as_map(self.backbone, self.backbone.forward_features(images)))


def build_segmenter(arch, init, image_size, output_stride, num_classes, **options):
    """(DeepLab on --arch with the weights of --init, or their statistics; the dataset that they come from or None). options:
    of common.build_model."""
    try:
        backbone, pretrained_on = common.build_model(arch, init, image_size, 0, output_stride=output_stride, **options)
    except (TypeError, AssertionError, NotImplementedError):  # ViTs and the like cannot be dilated
        backbone, pretrained_on = common.build_model(arch, init, image_size, 0, **options)
    return DeepLab(backbone, num_classes, image_size), pretrained_on


def load_segmenter(path):
    """A model.pt of this stage: (model in eval mode, meta)."""
    weights, meta = common.read_checkpoint(path)
    if meta.get("task") != "masks" and meta.get("classes"):
        fail(f"{path} is a classifier, of finetune.py, and knows no masks; for new images take finetune.py --predict")
    if not meta.get("classes"):
        fail(f"{path}: not the model.pt of a segment.py run, which knows its classes")
    model, _ = build_segmenter(meta["arch"], "random", meta["image_size"], meta["output_stride"], meta["num_classes"],
                               patch_size=meta.get("patch_size"))
    own = {}
    for name, tensor in weights.items():
        own[name if name.startswith("classifier.") else f"backbone.{name}"] = tensor
    try:
        model.load_state_dict(own)
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
    if kind != "dice":
        entropy = F.cross_entropy(logits, targets.masked_fill(~known, -100), reduction="none")  # -100 is left out
        total = total + entropy.sum((1, 2)) / known.sum((1, 2)).clamp(min=1)
    if kind != "ce":
        share = logits.softmax(1) * known[:, None]
        dices = []
        for c in range(1, logits.shape[1]):
            truth = ((targets == c) & known).float()
            both = (share[:, c] * truth).sum((1, 2))
            sizes = share[:, c].sum((1, 2)) + truth.sum((1, 2))
            dices.append((2 * both + 1) / (sizes + 1))
        total = total + 1 - torch.stack(dices).mean(0)
    return total


# ---------------------------------------------------------------- metrics -----------------------------------

def outline(mask, unit):
    """The pixels of a mask (H, W) bool that touch, by a side, another value or the image's edge: their places (N, 2) float32
    as (y, x) times the unit (y, x)."""
    wide = F.pad(mask, (1, 1, 1, 1))
    inner = wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return (mask & ~inner).nonzero() * torch.tensor(unit, dtype=torch.float32, device=mask.device)


def nearest(points, others):
    """Distance of each of points (N, 2) to the nearest of others (M, 2), (N,) float."""
    exact = "donot_use_mm_for_euclid_dist"  # |x|^2 + |y|^2 - 2xy would cancel, the more so in TF32
    return torch.cat([torch.cdist(part, others, compute_mode=exact).amin(1) for part in points.split(4096)])


def hausdorff95(a, b, scale=(1.0, 1.0)):
    """The larger of the two directed 95th percentiles of the distances between the outlines of two masks (H, W) bool,
    in pixels times scale (y, x); NaN where a mask is empty."""
    a = outline(a, scale)
    b = outline(b, scale)
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
    both, truth, predicted = table[..., 0], table[..., 1], table[..., 2]
    total = np.where(truth + predicted > 0, truth + predicted, np.nan)
    return both / (total - both), 2 * both / total


def mean_without_nan(values):
    """Mean of values (n,) that are not NaN, None if all are."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None


def class_scores(table):
    """SCORES of one class from its (N, 4) pixels of both, truth and prediction, and HD95. The rule for empty masks: an
    image whose truth and prediction both lack the class is left out of the averages over images; one where a single one
    of the two lacks it counts 0, and is left out of HD95's. None: not defined. With the images that each average is over,
    "n" and "hd95_n", and how many have the class, "lesions", and a prediction that meets it, "found"."""
    iou, dice = overlap(table)
    iou_set, dice_set = overlap(table.sum(0, keepdims=True))
    hd95 = table[:, 3]
    return {"iou": mean_without_nan(iou), "dice": mean_without_nan(dice), "iou_set": mean_without_nan(iou_set),
            "dice_set": mean_without_nan(dice_set), "hd95": mean_without_nan(hd95),
            "n": int(np.isfinite(iou).sum()), "hd95_n": int(np.isfinite(hd95).sum()),
            "lesions": int((table[:, 1] > 0).sum()), "found": int((table[:, 0] > 0).sum())}


def score_masks(table, classes):
    """Every score per class and its mean over the foreground. table (N, C, 4) as for class_scores."""
    each = {name: class_scores(table[:, c]) for c, name in enumerate(classes)}
    mean = {score: common.mean_defined([each[name][score] for name in classes[1:]]) for score in SCORES}
    mean |= {count: sum(each[name][count] for name in classes[1:]) for count in COUNTS}
    return {**mean, "classes": each, "undefined": [name for name in classes[1:] if each[name]["iou"] is None]}


def headline_interval(table, headline, groups):
    """The 95 % interval of the headline, a mean over the foreground and over images, over images (or groups)."""
    scores = overlap(table[:, 1:])[SCORES.index(headline)]

    def average(rows):
        return common.mean_defined([mean_without_nan(column) for column in scores[rows].T])
    return common.bootstrap_interval(average, len(table), groups)


def count_pixels(truth, predicted, classes, ignore):
    """(C, 3) int64: pixels of both, of the truth and of the prediction, of each class; truth, predicted (S, S) int64. A
    pixel of the value `ignore` belongs to no mask, true or predicted."""
    pairs = (truth * classes + predicted)[known_pixels(truth, ignore)]
    table = torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)
    return torch.stack([table.diagonal(), table.sum(1), table.sum(0)], 1)


@torch.inference_mode()
def evaluate(model, dataset, rows, args, run, keep_in=None):
    """(table (n, C, 4) float64 as for class_scores, losses (n,)), numpy, of rows of a dataset, in their order, on every
    process. Whole images, counted at the arrays' size. Only with the folder `keep_in` has it HD95, in pixels of the
    source; the predicted masks are written there."""
    model.eval()
    classes = len(dataset.mask_classes)
    batches = common.shards(rows, run, 32)
    loader = zip(batches, common.load_batches(dataset.images, batches, run.device),
                 common.load_batches(dataset.masks, batches, run.device))
    parts = [torch.zeros(0, classes, 5, dtype=torch.float64)]
    for batch, images, masks in tqdm(loader, "evaluating", len(batches), leave=False, disable=run.rank > 0):
        logits = coarse_logits(model, images, args.image_size, dataset.mean, dataset.std, run)
        table = torch.full((len(batch), classes, 5), math.nan, dtype=torch.float64)
        for i, row in enumerate(batch):
            full = upsample(logits[i:i + 1], masks.shape[1:])
            truth = masks[i].long()
            predicted = full[0].argmax(0)
            table[i, :, :3] = count_pixels(truth, predicted, classes, dataset.ignore)
            table[i, :, 4] = loss_function(full, truth[None], args.loss, dataset.ignore)
            if keep_in:
                write_mask(keep_in / f"{row:06d}.png", predicted.byte().cpu().numpy(), classes)
                known = known_pixels(truth, dataset.ignore)
                unit = pixel_size(dataset.sizes[row], dataset.fit, dataset.side)
                for c in range(1, classes):
                    table[i, c, 3] = hausdorff95((truth == c) & known, (predicted == c) & known, unit)
        parts.append(table)
    table = common.gather_rows(torch.cat(parts), len(rows), run).numpy()
    return table[:, :, :4], table[:, 0, 4]


def write_mask(path, mask, classes):
    """A mask (H, W) uint8 of class indices as PNG: 0 and 255 for two classes, else the indices under a palette."""
    picture = Image.fromarray(mask * 255 if classes == 2 else mask)
    if classes > 2:
        colours = ["#000000", *common.COLOURS * 37][:256]
        picture.putpalette(b"".join(bytes.fromhex(colour[1:]) for colour in colours))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def read_masks(folder, rows, classes):
    """The masks (n, S, S) uint8 of class indices that evaluate has written of some rows."""
    masks = []
    for row in rows:
        with Image.open(folder / f"{row:06d}.png") as picture:
            masks.append(np.asarray(picture) > 0 if classes == 2 else np.asarray(picture))
    return np.stack(masks).astype(np.uint8)


def majority(masks, values):
    """Of masks (n, ...) uint8 by n annotators the value that more than half of them give each pixel, else 0."""
    return np.select([(masks == value).sum(0) * 2 > len(masks) for value in values], values, 0).astype(np.uint8)


def score_annotators(dataset, predicted):
    """{annotator: scores of the test split against masks-ANNOTATOR.npy}, and against their "majority", of the predicted
    masks (n, S, S)."""
    rows = dataset.rows["test"]
    experts = {}
    for file in sorted(dataset.folder.glob("masks-*.npy")):
        experts[file.stem.removeprefix("masks-")] = np.load(file, mmap_mode="r")[rows]
    if not experts:
        return {}
    classes = len(dataset.mask_classes)
    values = [*range(classes), *([] if dataset.ignore is None else [dataset.ignore])]
    experts["majority"] = np.stack([majority(np.stack(masks), values) for masks in zip(*experts.values())])
    scores = {}
    for name, truths in experts.items():
        table = np.full((len(rows), classes, 4), math.nan)
        for i in range(len(rows)):
            truth = torch.from_numpy(truths[i]).long()
            mask = torch.from_numpy(predicted[i]).long()
            table[i, :, :3] = count_pixels(truth, mask, classes, dataset.ignore)
        scores[name] = score_masks(table, dataset.mask_classes)
    return scores


def constant_score(dataset, device):
    """IoU over images on test of the best mask that is the same for every image: where the class is more frequent in
    train than the threshold that does best on train (up to 1024 images, 128 pixels a side). Mean over the
    foreground; None without train."""
    if not len(dataset.rows["train"]):
        return None
    places = ((np.arange(128) + 0.5) * dataset.side / 128).astype(int)
    grids = {}
    for name in ("train", "test"):
        rows = dataset.rows[name]
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), 1024)).astype(int)]
        grid = np.stack([dataset.masks[row][np.ix_(places, places)] for row in rows])
        grids[name] = torch.from_numpy(grid).to(device)

    def iou(grid, c, mask):
        known = known_pixels(grid, dataset.ignore)
        truth = (grid == c) & known
        either = ((truth | mask) & known).sum((1, 2))
        both = (truth & mask).sum((1, 2))
        return (both[either > 0] / either[either > 0]).mean().item() if (either > 0).any() else None

    train = grids["train"]
    known = known_pixels(train, dataset.ignore)
    scores = []
    for c in range(1, len(dataset.mask_classes)):
        share = ((train == c) & known).sum(0) / known.sum(0).clamp(min=1)
        best = max(np.arange(0, 1, 0.05), key=lambda level: iou(train, c, share > level) or 0)
        scores.append(iou(grids["test"], c, share > best))
    return common.mean_defined(scores)


# ---------------------------------------------------------------- training ----------------------------------

def train_epoch(model, dropout, optimizer, scaler, dataset, args, run, epoch, rates):
    """One pass over train, at the rates (steps,) of its steps. Returns the mean loss and the images a second."""
    rows = dataset.rows["train"]
    order = common.epoch_order(len(rows), args.batch_size, args.seed, epoch)
    mine = common.own_share(args.batch_size, run)
    torch.manual_seed(hash((args.seed, epoch)) % 2 ** 31)  # of drop path and the like, where there are any
    model.train()
    total = torch.zeros((), device=run.device)
    begin = time.time()
    batches = [rows[batch[mine]] for batch in order]
    loader = zip(common.load_batches(dataset.images, batches, run.device),
                 common.load_batches(dataset.masks, batches, run.device))
    bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", len(order), leave=False, disable=run.rank > 0)
    for step, (images, masks) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = float(rates[step])
        draws = Draws((args.seed, epoch, step), args.batch_size, mine, run.device)
        dropout.seeds = torch.randint(2 ** 62, (args.batch_size,), generator=draws.generator)[mine].tolist()
        views, targets = train_view(images, masks, draws, args, dataset.mean, dataset.std)
        with run.autocast():
            logits = model(views)
        loss = loss_function(upsample(logits, targets.shape[1:]), targets, args.loss, dataset.ignore).mean()
        common.optimizer_step(loss, optimizer, scaler, args.clip_grad)
        total += loss.detach()
        if (step + 1) % common.CHECK_EVERY == 0 or step + 1 == len(order):
            mean = common.checked_mean(total, step + 1, epoch * len(order) + step, epoch, args.output, run)
            bar.set_postfix(loss=f"{mean.item():.3f}")
    return mean.item(), len(order) * args.batch_size / (time.time() - begin)


def fit(model, dataset, args, run, folder, pretrained_on):
    """Train from the last checkpoint to the last epoch; model.pt is the best on validation. Returns the log."""
    optimizer, scaler, parts, log = common.start_training(model, args, run, folder)
    wrapped = common.distribute(model, run, args.compile)
    per_epoch = len(dataset.rows["train"]) // args.batch_size
    steps = args.epochs * per_epoch
    rates = common.warmup_cosine(args.lr, args.min_lr, steps, min(args.warmup_steps, steps // 4))
    for epoch in common.epochs_left(log, args):
        begin = time.time()
        loss, speed = train_epoch(wrapped, model.dropout, optimizer, scaler, dataset, args, run, epoch,
                                  rates[epoch * per_epoch:])
        table, losses = evaluate(model, dataset, dataset.rows["val"], args, run)
        values = {"loss": float(losses.mean()), **score_masks(table, dataset.mask_classes)}
        entry = {"epoch": epoch + 1, "loss": loss, "val": values, "lr": optimizer.param_groups[0]["lr"],
                 "images_per_second": speed, "seconds": time.time() - begin}
        # the backbone in timm's names, the head as classifier.*
        weights = {name.removeprefix("backbone."): tensor for name, tensor in model.state_dict().items()}
        common.end_epoch(entry, log, parts, weights, dataset, args, run, task="masks", classes=dataset.mask_classes,
                         num_classes=len(dataset.mask_classes), ignore=dataset.ignore,
                         output_stride=args.output_stride, pretrained_on=pretrained_on)
    common.barrier()  # the others must not load model.pt before it is written
    return log


# ---------------------------------------------------------------- the test ----------------------------------

def write_predictions(path, dataset, table):
    """predictions.csv of the test split, a row an image, with the columns that are named at the top of this file. table
    (n, C, 4) as for class_scores."""
    head = ["image", "group"]
    for name in dataset.mask_classes[1:]:
        head += [f"{what}_{name}" for what in ("iou", "dice", "hd95", "pixels", "predicted")]
    iou, dice = overlap(table)
    lines = []
    for i, row in enumerate(dataset.rows["test"]):
        area = math.prod(pixel_size(dataset.sizes[row], dataset.fit, dataset.side))
        line = [dataset.paths[row], dataset.groups[row] if dataset.groups else ""]
        for c in range(1, len(dataset.mask_classes)):
            _, truth, predicted, hd95 = table[i, c]
            values = [iou[i, c], dice[i, c], hd95, truth * area, predicted * area]
            line += ["" if math.isnan(value) else f"{value:.8g}" for value in values]
        lines.append(line)
    common.write_table(path, head, lines)


def draw_examples(path, dataset, rows, predicted, iou):
    """The test images of the best, the median and the worst IoU (n,): truth yellow, prediction red."""
    order = np.argsort(-iou)[:np.isfinite(iou).sum()]  # NaN comes last
    if not len(order):
        return
    pictures, outlines, captions = [], [], []
    for name, i in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        row = rows[i]
        size = dataset.sizes[row]
        mask = torch.tensor(dataset.masks[row])
        truth = ((mask > 0) & known_pixels(mask, dataset.ignore)).numpy()
        pictures.append(common.in_proportion(dataset.images[row], size, dataset.fit, 320))
        outlines.append([common.outline_of(truth, size, dataset.fit, YELLOW),
                         common.outline_of(predicted[i] > 0, size, dataset.fit, RED)])
        captions.append(f"{name}: {Path(dataset.paths[row]).name[-24:]}\nIoU {iou[i]:.3f}")
    title = f"{dataset.name}, test: truth yellow, prediction red"
    common.draw_grid(path, [pictures], [captions], title=title, outlines=[outlines], inches=2)


def test(model, dataset, args, run, folder, columns=slice(None)):
    """Test a model once, on some `columns` of its classes; write test_masks/, predictions.csv and examples.png. Returns
    the scores on rank 0."""
    rows = dataset.rows["test"]
    table, losses = evaluate(model, dataset, rows, args, run, folder / "test_masks")
    common.barrier()  # all masks are written
    if run.rank > 0:
        return None
    predicted = read_masks(folder / "test_masks", rows, len(dataset.mask_classes))
    annotators = score_annotators(dataset, predicted) if columns == slice(None) else {}  # whose classes have other numbers
    table = table[:, columns]
    dataset.mask_classes = np.array(dataset.mask_classes)[columns].tolist()
    write_predictions(folder / "predictions.csv", dataset, table)
    iou = np.ma.masked_invalid(overlap(table[:, 1:])[0]).mean(1).filled(math.nan)
    draw_examples(folder / "examples.png", dataset, rows, predicted, iou)
    return {"loss": float(losses.mean()), **score_masks(table, dataset.mask_classes),
            "interval": headline_interval(table, dataset.metric, dataset.groups_of(rows)),
            "constant_iou": constant_score(dataset, run.device), "annotators": annotators}


def tell(dataset, result, chosen):
    """Print the scores of the test. Returns the headline as text."""
    show = common.show
    lines = []
    for name, line in {**result["classes"], "mean of foreground": result}.items():
        scores = [show(line[score]) for score in SCORES]
        lines.append([name, *scores, *(line[count] for count in COUNTS)])
    common.print_table(["test", *SCORES, *COUNTS], lines)
    if result["annotators"]:
        lines = [[name, show(line["iou"]), show(line["dice"])] for name, line in result["annotators"].items()]
        common.print_table(["against", "iou", "dice"], lines)
    headline = f"{dataset.metric} {show(result[dataset.metric])}"
    say(f"{chosen}, {len(dataset.rows['test'])} test images, {headline} ({common.interval_text(result)}); the best constant "
        f"mask has IoU {show(result['constant_iou'])}")
    if result["undefined"]:
        say(f"neither in the test split nor predicted, left out of the averages: {', '.join(result['undefined'])}")
    return headline


def finish(dataset, args, run, folder, log, pretrained_on):
    """Test the best epoch once; write the pictures and, last, metrics.json."""
    model = common.to_device(load_segmenter(folder / "model.pt")[0], run)
    result = test(model, dataset, args, run, folder)
    if result is None:
        return
    common.draw_training(folder / "curves.png", log, args.loss, dataset.metric)
    best = max(log, key=lambda entry: entry["score"])
    headline = tell(dataset, result, f"best epoch {best['epoch']} of {len(log)}")
    common.write_metrics(
        folder, dataset, run, args, pretrained_on=pretrained_on, val=best["val"], test=result, best_epoch=best["epoch"],
        loss=args.loss, output_stride=args.output_stride, epochs=len(log), summary=f"test {headline}",
        **common.training_facts(model, log))


# ---------------------------------------------------------------- another dataset ---------------------------

def match_masks(dataset, meta):
    """Give a dataset, in place, the mask classes of a trained model, by name. Pixels of a class that the model does not
    know count nowhere. Returns the columns of the model's classes that the dataset has, which are scored."""
    names = meta["classes"]
    if dataset.mask_classes == names:
        return slice(None)
    shared = [name for name in names[1:] if name in dataset.mask_classes[1:]]
    absent = [name for name in names[1:] if name not in shared]
    unknown = [name for name in dataset.mask_classes[1:] if name not in shared]
    if not shared:
        fail(f"--test {dataset.folder}: its masks' classes, {common.some(dataset.mask_classes[1:], 14)}, are none of the "
             f"model's, {common.some(names[1:], 14)}; name them alike, under mask_classes in its dataset.json")
    if absent:
        say(f"note: {dataset.name} has no masks of the model's {common.some(absent, 14)}: not scored")
    if unknown:
        say(f"WARNING: the model does not know {common.some(unknown, 14)} of {dataset.name}: its pixels count nowhere")
    number = np.full(256, 255, np.uint8)
    number[0] = 0
    for name in shared:
        number[dataset.mask_classes.index(name)] = names.index(name)
    if dataset.ignore is not None:
        number[dataset.ignore] = 255
    dataset.masks = number[dataset.masks]
    dataset.mask_classes, dataset.ignore = names, 255
    return [0, *(names.index(name) for name in shared)]


def test_elsewhere(args, run):
    """--test: the model of --init on another prepared folder, as a run of its own."""
    model, meta = load_segmenter(args.init)
    dataset = common.load_external(args, meta, masks=True)
    check_masks(dataset)
    columns = match_masks(dataset, meta)
    folder = common.open_run(args, run, dataset, ["curves.png", "examples.png", "test_masks"])
    begin = time.time()
    result = test(common.to_device(model, run), dataset, args, run, folder, columns)
    if result is None:
        return
    headline = tell(dataset, result, f"trained on {meta['dataset']}, tested on {dataset.name}")
    common.write_metrics(
        folder, dataset, run, args, **common.training_of(meta), val={}, test=result,
        output_stride=meta["output_stride"], epochs=0, parameters=sum(p.numel() for p in model.parameters()),
        seconds=time.time() - begin, summary=f"test {headline}")


# ---------------------------------------------------------------- new images --------------------------------

def mask_files(source, names):
    """Where the masks of images go: their paths below the source, with .png for their suffix; no two the same."""
    files, names_of = [], {}
    for name in names:
        path = Path(name)
        named = path.suffix[1:].isdigit()  # as DICOM files are: 1.2.840.1 has no suffix
        file = f"{name}.png" if named else path.with_suffix(".png").as_posix()
        if path.is_absolute() or ".." in path.parts:
            fail(f"--predict {source}: {name} is not below its folder, so that its mask has no place below masks/")
        twin = names_of.setdefault(file.casefold(), name)  # some file systems take a.png and A.png for one
        if twin != name:
            fail(f"--predict {source}: {twin} and {name} would share the mask {file}; rename one")
        files.append(file)
    return files


@torch.inference_mode()
def write_masks(model, meta, dataset, files, run):
    """Write this process's share of masks of new images into `files`, each at its image's own size and shape. Returns
    the pixels of each class of every image, (n, C) int64."""
    classes = len(meta["classes"])
    mine = range(run.rank, len(files), run.world)
    areas = torch.zeros(len(mine), classes, dtype=torch.int64)
    for k, row in enumerate(tqdm(mine, "predicting", leave=False, disable=run.rank > 0)):
        # one at a time: a mask does not depend on what else is predicted
        image = common.read_batch(dataset.images, [row])
        logits = coarse_logits(model, image, meta["image_size"], meta["mean"], meta["std"], run)
        height, width = map(int, dataset.sizes[row])
        _, _, box_height, box_width = common.fit_box(height, width, meta["fit"])
        square = full_size(logits[0], (box_height, box_width)).cpu().numpy()
        mask = common.from_square(square, height, width, meta["fit"], Image.Resampling.NEAREST)
        write_mask(files[row], mask, classes)
        areas[k] = torch.from_numpy(np.bincount(mask.ravel(), minlength=classes))
    return common.gather_rows(areas, len(files), run).numpy()


def write_areas(path, classes, dataset, files, areas):
    """masks.csv: of each image its mask and size, and of each class its area in pixels and as a share of the image."""
    head = ["image", "mask", "height", "width"]
    for name in classes[1:]:
        head += [f"area_{name}", f"fraction_{name}"]
    lines = []
    for row, file in enumerate(files):
        height, width = dataset.sizes[row]
        line = [dataset.paths[row], f"masks/{file}", height, width]
        for area in areas[row, 1:]:
            line += [area, f"{area / (height * width):.6f}"]
        lines.append(line)
    common.write_table(path, head, lines)


def draw_overlay(path, mask_file, dataset, row):
    """An image with the outline of each class of its mask, in the colours of the mask's palette."""
    picture = common.in_proportion(dataset.images[row], dataset.sizes[row], dataset.fit, 640)
    with Image.open(mask_file) as mask:
        classes = np.asarray(mask.resize((picture.shape[1], picture.shape[0]), Image.Resampling.NEAREST))
    outlines = []
    for value in np.unique(classes[classes > 0]):
        colour = RED if value == 255 else common.COLOURS[(value - 1) % 7]
        outlines.append((classes == value, colour))
    path.parent.mkdir(parents=True, exist_ok=True)
    common.draw_grid(path, [[picture]], outlines=[[outlines]], inches=3)


def predict(args, run):
    """--predict: OUTPUT/masks/, a PNG an image, by the model of --init, and masks.csv. Nothing is left behind where a
    file is broken."""
    folder = common.predictions_folder(args)
    masks, partial = folder / "masks", folder / "masks.partial"
    model, meta = load_segmenter(args.init)
    with common.prepare_module().new_images(args.predict, folder, meta, args.skip_broken) as dataset:
        files = mask_files(args.predict, dataset.paths)
        if run.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
        common.barrier()
        areas = write_masks(common.to_device(model, run), meta, dataset, [partial / file for file in files], run)
        if run.rank > 0:
            return
        shutil.rmtree(masks, ignore_errors=True)
        partial.rename(masks)
        for row, file in enumerate(files if args.overlay else []):
            draw_overlay(folder / "overlays" / file, masks / file, dataset, row)
        write_areas(folder / "masks.csv", meta["classes"], dataset, files, areas)
    if meta["fit"] == "crop":
        say("note: the model sees the centre square of an image; what lies outside of it is background in its mask")
    say(f"written: {folder}/masks.csv and {len(files)} masks")


# ---------------------------------------------------------------- two runs side by side ---------------------

# a region's distance from the image's largest, as a share of the image's diagonal
BINS = {"main region": 0, "within 10 %": 0.1, "10 to 25 %": 0.25, "beyond 25 %": math.inf}


def components(mask):
    """The regions of a mask (H, W) bool: (H, W) int64, 0 outside, 1 the largest. Pixels within 2 of each other (by rows
    and by columns) belong together, so that a thin structure that resampling has broken is one region."""
    labels = torch.arange(1, mask.numel() + 1, dtype=torch.float64, device=mask.device).view(mask.shape) * mask
    while True:  # every pixel takes the largest number around it, along its row and then its column
        along = F.max_pool2d(labels[None, None], (1, 5), 1, (0, 2))
        spread = F.max_pool2d(along, (5, 1), 1, (2, 0))[0, 0] * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    _, inverse, sizes = torch.unique(labels[mask], return_inverse=True, return_counts=True)
    result = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    result[mask] = sizes.argsort(descending=True, stable=True).argsort()[inverse] + 1
    return result


def region_scores(truth, predictions, unit=(1.0, 1.0)):
    """For each region of the truth, largest first: (distance of its nearest pixel from the largest region, [IoU of each of
    predictions]). A predicted pixel outside the truth is held against the region nearest to it, so that an image of one
    region has its ordinary IoU. truth and predictions (H, W) bool; unit: height and width of a pixel, in which distances
    are measured."""
    regions = components(truth)
    edges = [outline(regions == k, unit) for k in range(1, int(regions.max()) + 1)]
    scores = [(nearest(edge, edges[0]).min().item(), []) for edge in edges]
    for predicted in predictions:
        false = predicted & ~truth
        places = false.nonzero() * torch.tensor(unit)
        unions = regions.clone()
        unions[false] = torch.stack([nearest(places, edge) for edge in edges]).argmin(0) + 1
        for k, (_, iou) in enumerate(scores, 1):
            iou.append(((predicted & (regions == k)).sum() / (unions == k).sum()).item())
    return scores


def open_compared(folders):
    """(dataset, names of the two models) of two finished runs of this stage, on the same data, which must be as it was."""
    runs = []
    for folder in folders:
        for name in ("args.json", "test_masks", "metrics.json"):
            if not (folder / name).exists():
                fail(f"--compare {folder}: not a finished run of segment.py, it has no {name}")
        runs.append(json.loads((folder / "args.json").read_text()))
        if runs[-1]["stage"] != "segment":
            fail(f"--compare {folder}: a run of {runs[-1]['stage']}.py, not of segment.py")
    first, second = (run["data"] for run in runs)
    if first["fingerprint"] != second["fingerprint"]:
        fail(f"--compare: the runs are on different data, {first['folder']} and {second['folder']}: their images, labels, "
             "splits or classes differ")
    folds = [run["arguments"].get("fold") for run in runs]
    if folds[0] != folds[1]:
        fail(f"--compare: the runs are tested on different folds, {folds[0]} and {folds[1]}")
    dataset = common.open_dataset(first["folder"])
    if folds[0] is not None:
        common.choose_fold(dataset, folds[0])
    if dataset.fingerprint != first["fingerprint"]:
        fail(f"--compare: {dataset.folder} is not as it was for these runs: its images, labels, splits or classes have "
             "changed")
    names = [run["arguments"]["arch"] for run in runs]
    return dataset, names if names[0] != names[1] else [folder.name for folder in folders]


def regions_by_distance(dataset, rows, truths, predictions):
    """{bin of BINS: {"count": regions of the truth, "iou": [mean of A, mean of B], or None}}."""
    pairs = {name: [] for name in BINS}
    for i, row in enumerate(rows):
        if not truths[i].any():
            continue
        unit = pixel_size(dataset.sizes[row], dataset.fit, dataset.side)
        for distance, iou in region_scores(truths[i], [masks[i] for masks in predictions], unit):
            share = distance / math.hypot(*dataset.sizes[row])
            name = next(name for name, end in BINS.items() if share <= end)
            pairs[name].append(iou)
    regions = {}
    for name, found in pairs.items():
        regions[name] = {"count": len(found), "iou": np.mean(found, 0).tolist() if found else [None, None]}
    return regions


def draw_regions(path, regions, names):
    """Mean IoU of both models by the distance of a region from its image's largest."""
    figure, axes = common.new_figure(path, 4.5, 2.8)
    if figure is None:
        return
    axis = axes[0, 0]
    for k, name in enumerate(names):
        heights = [part["iou"][k] or 0 for part in regions.values()]
        axis.bar(np.arange(len(regions)) + 0.4 * k - 0.2, heights, 0.37, label=name)
    axis.set_xticks(range(len(regions)), [f"{name}\n({part['count']})" for name, part in regions.items()])
    axis.set(ylim=(0, 1), ylabel="mean IoU",
             xlabel="distance from the image's largest region, share of its diagonal\n(number of regions)")
    axis.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    common.save_figure(figure, path)


def compare(args, run):
    """--compare: a picture of the test images on which B beats A most, A beats B most, and those in the middle, with
    the truth in yellow, A in blue, B in red; below it, and in FILE.json, the mean IoU of the truth's regions by their
    distance from the image's largest. Classes other than the background count as one."""
    output = Path(args.output or "comparison.png")
    if output.suffix.lower() != ".png" or run.world > 1:
        fail(f"--compare writes one picture, by one process: --output {output} must end in .png")
    folders = [Path(name) for name in args.compare]
    dataset, names = open_compared(folders)
    rows = dataset.rows["test"]
    truths = torch.from_numpy(dataset.masks[rows])
    known = known_pixels(truths, dataset.ignore)
    truths = (truths > 0) & known
    predictions, iou = [], []
    for folder in folders:
        masks = torch.from_numpy(read_masks(folder / "test_masks", rows, len(dataset.mask_classes)) > 0) & known
        both = (truths & masks).sum((1, 2)).double()
        predictions.append(masks)
        iou.append((both / (truths | masks).sum((1, 2))).numpy())
    iou = np.array(iou)  # (2, n), NaN where there is neither a truth nor a prediction
    difference = iou[0] - iou[1]
    order = np.argsort(difference, kind="stable")[:np.isfinite(difference).sum()]  # NaN comes last
    if not len(order):
        fail("--compare: no test image has a mask")

    middle = len(order) // 2
    pictures, outlines, captions = [], [], []
    for i in dict.fromkeys([*order[:2], *order[max(0, middle - 1):middle + 1], *order[-2:]]):
        size = dataset.sizes[rows[i]]
        picture = common.in_proportion(dataset.images[rows[i]], size, dataset.fit, 320)
        truth = common.outline_of(truths[i].numpy(), size, dataset.fit, YELLOW)
        a = common.outline_of(predictions[0][i].numpy(), size, dataset.fit, BLUE)
        b = common.outline_of(predictions[1][i].numpy(), size, dataset.fit, RED)
        pictures.append([picture] * 4)
        outlines.append([[], [truth, a], [truth, b], [truth, a, b]])
        captions.append([Path(dataset.paths[rows[i]]).name, (f"{names[0]}  IoU {iou[0, i]:.3f}", BLUE),
                         (f"{names[1]}  IoU {iou[1, i]:.3f}", RED), f"difference {difference[i]:+.3f}"])
    output.parent.mkdir(parents=True, exist_ok=True)
    title = f"{dataset.name}, test: truth yellow, {names[0]} blue, {names[1]} red; sorted by the difference"
    common.draw_grid(output, pictures, captions, outlines=outlines, inches=1.6, title=title)

    regions = regions_by_distance(dataset, rows, truths, predictions)
    draw_regions(output.with_suffix(".regions.png"), regions, names)
    mean_iou = iou[:, order].mean(1).tolist()  # over the images on which both are defined
    content = {"runs": args.compare, "names": names, "iou": mean_iou, "regions": regions}
    common.write_json(output.with_suffix(".json"), content)
    lines = [["images", len(order), *map(common.show, mean_iou)]]
    for name, part in regions.items():
        lines.append([name, part["count"], *map(common.show, part["iou"])])
    common.print_table(["mean IoU", "regions", *names], lines)
    say(f"written: {output}, {output.with_suffix('.regions.png')}, {output.with_suffix('.json')}")


def main():
    """Train, validate, test; or test elsewhere; or predict; or compare."""
    args = arguments()
    run = common.start(args)
    if args.test:
        return test_elsewhere(args, run)
    if args.predict:
        return predict(args, run)
    if args.compare:
        return compare(args, run)
    common.own_share(args.batch_size, run)
    dataset = common.load_dataset(args, masks=True)
    check_masks(dataset)
    common.note_enlarged(dataset, args.image_size, dataset.side)
    if len(dataset.rows["train"]) < args.batch_size:
        fail(f"--batch-size {args.batch_size} is more than the {len(dataset.rows['train'])} training images")
    model, pretrained_on = build_segmenter(
        args.arch, args.init, args.image_size, args.output_stride, len(dataset.mask_classes), seed=args.seed,
        init_key=args.init_key, init_stats=args.init_stats, patch_size=args.patch_size)
    if not args.init_stats:
        common.keep_classifier(model, "classifier.", args.init, dataset.mask_classes, "masks")
    model = common.to_device(model, run)
    common.avoid_small_maps(model, [args.image_size], run, args)
    folder = common.open_run(args, run, dataset, ["curves.png", "examples.png", "test_masks"])
    log = fit(model, dataset, args, run, folder, pretrained_on)
    finish(dataset, args, run, folder, log, pretrained_on)


if __name__ == "__main__":
    common.launch(main)
