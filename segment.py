"""Segment with DeepLabv3 on a ResNet or a ViT: train, choose the epoch on validation, test it once; predict
new images; or draw two runs beside the truth.

    python segment.py --arch resnet50 --image-size 128 --epochs 10
    torchrun --nproc_per_node 4 segment.py --dataset folder --data-dir DIR --arch deit_small --init imagenet
    python segment.py --predict NEW_IMAGES --init runs/RUN/model.pt --output masks/
    python segment.py --compare runs/RESNET runs/DEIT --output comparison.png

Matsoukas et al. 2023 (arXiv:2303.07034), segmentation and figure 2; the head of Chen et al. 2017
(arXiv:1706.05587).
--dataset folder expects images/ and masks/ with the same file names (0/255, class indices, or a palette PNG),
in train/, val/ and test/, or at once, to be split by --csv (--split-column, --group-column) or at random.
"""
import argparse
import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from tqdm import tqdm

import common
from common import SPLIT_NAMES, Dataset, Draws, Split, fail, say, some

CHECK_EVERY = 20  # steps between looks at the loss: a look waits for the device
SCORES = ["iou", "dice", "iou_set", "dice_set", "hd95"]
YELLOW, BLUE, RED = (255, 221, 0), (40, 120, 255), (240, 40, 40)


def arguments():
    """The command line."""
    parser, groups = common.make_parser(__doc__)
    data, model, train = groups["data"], groups["model"], parser.add_argument_group("training")
    data.conflict_handler = "resolve"  # --metric is classification's elsewhere
    data.add_argument("--metric", choices=["iou", "dice"], help="headline, per image averaged (default iou)")
    data.add_argument("--classes", default="background,lesion",
                      help="folder: names of the mask values 0, 1, ... (default background,lesion)")
    model.add_argument("--output-stride", type=int, default=8, choices=[8, 16, 32],
                       help="of a CNN, which is dilated for it (default, paper: 8); a ViT has its patches")
    train.add_argument("--loss", default="ce+dice", choices=["ce+dice", "ce", "dice"],
                       help="(default ce+dice)")
    train.add_argument("--epochs", type=int, default=50)
    train.add_argument("--batch-size", type=int, default=16, help="over all processes (default 16)")
    train.add_argument("--lr", type=float, default=1e-4,
                       help="peak learning rate of Adam (default, paper: 1e-4)")
    train.add_argument("--min-lr", type=float, default=1e-6,
                       help="where the cosine ends (default, paper: 1e-6)")
    train.add_argument("--weight-decay", type=float, default=1e-5, help="(default, paper: 1e-5)")
    train.add_argument("--warmup-steps", type=int, default=500,
                       help="(default 500), at most a quarter of all steps")
    train.add_argument("--clip-grad", type=float, default=1.0,
                       help="gradient norm (default, paper: 1; 0: off)")
    train.add_argument("--scale", type=float, nargs=2, default=[0.5, 1.0], metavar=("LOW", "HIGH"),
                       help="area of the random crop (default 0.5 1)")
    train.add_argument("--jitter", type=float, nargs=4, default=[0.2, 0.2, 0.1, 0.1],
                       metavar=("B", "C", "S", "H"),
                       help="brightness, contrast, saturation, hue (default, paper: 0.2 0.2 0.1 0.1)")
    groups["run"].add_argument("--predict", metavar="FOLDER",
                               help="no training: masks of these images, at their own size, by the model of "
                                    "--init")
    groups["run"].add_argument("--compare", nargs=2, metavar=("RUN_A", "RUN_B"),
                               help="no training: draw two runs' masks on their test split into --output "
                                    "FILE.png")
    args = common.parse(parser)
    args.classes = [name.strip() for name in args.classes.split(",")]
    if len(args.classes) < 2 or not all(args.classes):
        fail(f"--classes {','.join(args.classes)}: expected at least two names, the background's first")
    if not 0 < args.scale[0] <= args.scale[1] <= 1:
        fail(f"--scale {args.scale[0]} {args.scale[1]}: expected 0 < LOW <= HIGH <= 1")
    if args.batch_size < 2:
        fail("--batch-size 1: the head's batch norm needs at least 2 images")
    return args


# ---------------------------------------------------------------- images with masks -------------------------

def pair_files(folder):
    """{stem: (image, mask)} of folder/images and folder/masks; stems are paths below these, without
    suffix."""
    if not all((folder / part).is_dir() for part in ("images", "masks")):
        fail(f"{folder}: expected images/ and masks/ in it; found "
             f"{some(sorted(p.name for p in folder.iterdir()))}")
    found = {}
    for part in ("images", "masks"):
        files = common.images_under(folder / part)
        found[part] = {str(Path(file).relative_to(folder / part).with_suffix("")): file for file in files}
        if len(found[part]) < len(files) or not files:
            fail(f"{folder / part}: " + ("two files of one name, whose masks could not be told apart" if files
                                         else "there are no images in it"))
    lacking = [file for stem, file in found["images"].items() if stem not in found["masks"]]
    if lacking:
        fail(f"{folder}: {len(lacking)} of {len(found['images'])} images have no mask of the same name in "
             f"masks/: {some(lacking, 20)}")
    return {stem: (file, found["masks"][stem]) for stem, file in found["images"].items()}


def index_folder(args):
    """images/ and masks/ with the same stems, below train/, val/, test/, or at once with or without --csv."""
    root, groups = common.data_folder(args), None
    parts = {SPLIT_NAMES[p.name.lower()]: p for p in sorted(root.iterdir())
             if p.is_dir() and p.name.lower() in SPLIT_NAMES}
    if not args.csv:
        if parts and "train" not in parts:
            fail(f"{root}: expected train/ beside {some(path.name for path in parts.values())}")
        pairs = {name: list(pair_files(folder).values())
                 for name, folder in (parts or {"train": root}).items()}
        splits = {name: Split([a for a, _ in part], masks=[b for _, b in part])
                  for name, part in pairs.items()}
        return Dataset(root.resolve().name, "masks", args.classes, splits, "iou")
    pairs, rows = pair_files(root), common.read_csv(
        args.csv, [args.image_column, args.split_column, args.group_column])
    names = [row[args.image_column].removeprefix("images/") for row in rows]
    stems = [str(Path(n).with_suffix("")) if Path(n).suffix.lower() in common.SUFFIXES else n for n in names]
    missing = [name for name, stem in zip(names, stems) if stem not in pairs]
    if missing:
        fail(f"{args.csv}: {len(missing)} of {len(rows)} listed images are not in {root / 'images'}: "
             f"{some(missing)}")
    groups = [row[args.group_column] for row in rows] if args.group_column else None
    every = Split([pairs[stem][0] for stem in stems], groups=groups, masks=[pairs[stem][1] for stem in stems])
    where = [(row[args.split_column] or "").strip().lower() if args.split_column else "train" for row in rows]
    wrong = [f"{value!r} of {name}" for value, name in zip(where, names) if value not in SPLIT_NAMES]
    if wrong or "train" not in {SPLIT_NAMES[value] for value in where}:
        fail(f"{args.csv}: column {args.split_column!r} must hold train, val and test, train at least: "
             f"{some(wrong)}")
    parts = {name: [i for i, value in enumerate(where) if SPLIT_NAMES[value] == name]
             for name in ("train", "val", "test")}
    return Dataset(root.resolve().name, "masks", args.classes,
                   {name: every.take(keep) for name, keep in parts.items() if keep}, "iou")


def index_demo(args):
    """The drawn lesions with their outlines as masks."""
    dataset = common.index_demo(args)
    return Dataset("demo", "masks", ["background", "lesion"], {
        name: Split(split.paths, masks=split.masks) for name, split in dataset.splits.items()}, "iou")


def open_mask(item, classes):
    """An item of Split.masks as (H, W, 1) uint8 class indices. A file of two classes may hold 0/255 or 0/1;
    others hold class indices (of a palette PNG, the palette's). A list of (class, file) is merged, later ones
    on top."""
    if isinstance(item, list) and item[0][0] == "vote":
        votes = np.stack([open_mask(part, classes) for _, part in item])
        agreed = [(votes == c).sum(0) * 2 > len(votes) for c in range(classes)]
        return np.select(agreed, range(classes), 0).astype(np.uint8)
    if isinstance(item, list):
        maps = [(index, open_mask(file, 2)) for index, file in item]
        if len({part.shape for _, part in maps}) != 1:
            raise ValueError(f"maps of different sizes: {some(file for _, file in item)}")
        mask = np.zeros_like(maps[0][1])
        for index, part in maps:
            mask[part > 0] = index
        return mask
    if item.startswith("demo-mask/"):
        return common.demo_image(int(item[10:]))[1].astype(np.uint8)[..., None]
    with Image.open(item) as image:
        values = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
    if values.ndim == 3:
        if (values[..., :3] != values[..., :1]).any() and image.mode != "LA":
            raise ValueError(f"{item}: a colour picture; a mask holds one number a pixel")
        values = values[..., 0]
    if classes == 2 and not ((values != 0) & (values != 255)).any():
        values = values // 255
    if values.min() < 0 or values.max() >= classes:
        wrong = np.unique(values[(values < 0) | (values >= classes)])
        raise ValueError(f"{item}: value {some(wrong)} in the mask, none of the classes 0 to {classes - 1}"
                         + (" nor 255" if classes == 2 else "; name them all with --classes"))
    return values.astype(np.uint8)[..., None]


def image_size(path):
    """(height, width) of a file as its header says, after EXIF rotation."""
    with Image.open(path) as image:
        turned = image.getexif().get(274, 1) >= 5  # orientations 5 to 8 lie on their side
        return image.size if turned else image.size[::-1]


def load_masks(args):
    """The dataset of the arguments with its masks, each as large as its image."""
    common.INDEX.update(demo=index_demo, folder=index_folder)
    dataset = common.load_dataset(args, decode_mask=open_mask)
    wrong = []
    for split in dataset.splits.values():
        for i in np.flatnonzero((dataset.store.sizes[split.rows]
                                 != dataset.mask_store.sizes[split.rows]).any(1)):
            # large JPEGs are decoded smaller than they are
            mask = tuple(dataset.mask_store.sizes[split.rows[i]])
            if split.paths[i].startswith("demo/") or image_size(split.paths[i]) != mask:
                wrong.append(f"{split.paths[i]} (mask {mask[1]}x{mask[0]})")
    if wrong:
        fail(f"{len(wrong)} images are not as large as their masks: {some(wrong, 20)}")
    return dataset


def crop_masks(masks, boxes, side, flips):
    """Cut and scale masks as crop_resize does images, but to the nearest pixel: (B, H, W) uint8, boxes (B,
    4), flips (B, 2) bool -> (B, side, side) int64."""
    places = []
    for axis in (0, 1):
        steps = torch.arange(side, device=masks.device).expand(len(masks), side)
        steps = torch.where(flips[:, axis, None], side - 1 - steps, steps)
        start, length = boxes[:, axis, None], boxes[:, axis + 2, None]
        places.append((start + (steps + 0.5) * length / side).floor().long().clamp(
            0, masks.shape[1 + axis] - 1))
    sample = torch.arange(len(masks), device=masks.device)[:, None, None]
    return masks[sample, places[0][:, :, None], places[1][:, None, :]].long()


def train_view(images, masks, sizes, mask_sizes, draws, args, mean, std):
    """A random box of each image, in proportion to the image's own shape (evaluation sees it whole, squeezed
    into a square), flips for both, colours for the image: (B, 3, S, S) float, (B, S, S) int64."""
    unit = torch.full_like(sizes, 4096)
    boxes = common.random_boxes(draws, unit, args.scale) / 4096
    flips = draws.uniform(2) < 0.5
    images = common.crop_resize(images, (boxes * sizes.repeat(1, 2)).round(), args.image_size, flips)
    targets = crop_masks(masks[..., 0], (boxes * mask_sizes.repeat(1, 2)).round(), args.image_size, flips)
    return common.normalize(common.color_jitter(images, draws, args.jitter), mean, std), targets


def whole_view(images, sizes, args, mean, std):
    """Whole images squeezed into squares: (B, 3, S, S) float."""
    boxes = torch.cat([torch.zeros_like(sizes), sizes], 1).float()
    return common.normalize(common.crop_resize(images, boxes, args.image_size), mean, std)


# ---------------------------------------------------------------- model and loss ----------------------------

class SampleDropout(torch.nn.Dropout):
    """Dropout whose mask is drawn from a seed per sample, so that it does not depend on how many processes
    share the batch."""
    seeds = ()

    @torch.compiler.disable
    def forward(self, x):
        """x (B, C, H, W)."""
        if not self.training:
            return x
        noise = [torch.rand(x.shape[1:], generator=torch.Generator(x.device).manual_seed(seed),
                            device=x.device)
                 for seed in self.seeds]
        return x * (torch.stack(noise) >= self.p) / (1 - self.p)


class ReachConv(torch.nn.Conv2d):
    """A 3x3 convolution with padding = dilation nearly as wide as the map or wider: its outer taps see little
    but padding. The same sums from what each tap does see, as matrix products; a third of the time or
    less."""

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
        tokens = tokens[:, getattr(backbone, "num_prefix_tokens", 0):].unflatten(
            1, backbone.patch_embed.grid_size)
    nhwc = tokens.shape[-1] == backbone.num_features and tokens.shape[1] != backbone.num_features
    return tokens.permute(0, 3, 1, 2) if nhwc else tokens


class DeepLab(torch.nn.Module):
    """torchvision's DeepLabv3 head on a timm backbone: images (B, 3, S, S) to coarse logits (B, classes, h,
    w)."""

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
    if meta.get("task") != "masks":
        fail(f"{path}: not the model.pt of a segment.py run")
    model, _ = build_segmenter(argparse.Namespace(**meta | {"init": "random", "seed": 0}),
                               meta["num_classes"])
    try:
        model.load_state_dict({k if k.startswith("classifier.") else f"backbone.{k}": v
                               for k, v in weights.items()})
    except RuntimeError as error:
        fail(f"{path} does not fit {meta['arch']}: {error}")
    return model.eval(), meta


def upsample(logits, size):
    """(B, C, h, w) -> (B, C, *size) float32, bilinear."""
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


def loss_function(logits, targets, kind):
    """Loss of each image, (B,): cross-entropy over all pixels and classes, plus one minus the soft Dice,
    averaged over the classes but the background (Milletari et al. 2016, with a sum instead of squares; one
    pixel is added to both sides of the fraction, so that a class that is rightly absent costs nothing). Dice
    goes by the image, not the batch: the mean then does not depend on how a batch is shared. logits (B, C, H,
    W), targets (B, H, W)."""
    total = 0.0
    if "ce" in kind.split("+"):
        total = total + F.cross_entropy(logits, targets, reduction="none").mean((1, 2))
    if "dice" in kind.split("+"):
        share, dices = logits.softmax(1), []
        for c in range(1, logits.shape[1]):
            truth = (targets == c).float()
            both, sizes = (share[:, c] * truth).sum((1, 2)), share[:, c].sum((1, 2)) + truth.sum((1, 2))
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
    """The larger of the two directed 95th percentiles of the distances between the outlines of two masks (H,
    W) bool, in pixels times scale (y, x); NaN where a mask is empty."""
    scale = torch.tensor(scale, dtype=torch.float32, device=a.device)
    a, b = outline(a).nonzero() * scale, outline(b).nonzero() * scale
    if not len(a) or not len(b):
        return math.nan
    return max(torch.quantile(nearest(x, y), 0.95).item() for x, y in ((a, b), (b, a)))


def full_size(logits, size):
    """Class indices (*size) uint8 of coarse logits (C, h, w), a class at a time: large images have large
    masks."""
    best = upsample(logits[None, :1], size)[0, 0]
    mask = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    for c in range(1, len(logits)):
        value = upsample(logits[None, c:c + 1], size)[0, 0]
        mask[value > best] = c
        best = torch.maximum(best, value)
    return mask


def overlap(table):
    """(iou, dice), each (..., ) float, NaN where neither truth nor prediction has the class. table (..., 3 or
    more): pixels of both, of the truth, of the prediction."""
    both, truth, said = table[..., 0], table[..., 1], table[..., 2]
    total = np.where(truth + said > 0, truth + said, np.nan)
    return both / (total - both), 2 * both / total


def class_scores(table):
    """SCORES of one class from its (N, 4) pixels of both, truth and prediction, and HD95. The rule for empty
    masks: an image whose truth and prediction both lack the class is left out of the averages over images;
    one where a single one of the two lacks it counts 0, and is left out of HD95's. None: not defined."""
    values = [*overlap(table), *overlap(table[:, :3].sum(0, keepdims=True)), table[:, 3]]
    return {name: common.mean_defined([v for v in value if not math.isnan(v)])
            for name, value in zip(SCORES, values)}


def score_masks(table, classes, headline, groups=None):
    """Every score per class and its mean over the foreground, and the headline's 95 % interval over images
    (or groups). table (N, C, 4) as for class_scores."""
    each = {name: class_scores(table[:, c]) for c, name in enumerate(classes)}
    mean = {score: common.mean_defined([each[name][score] for name in classes[1:]]) for score in SCORES}
    column = overlap(table[:, 1:])[SCORES.index(headline)]

    def average(rows):
        values = column[rows]
        return common.mean_defined([v[~np.isnan(v)].mean() for v in values.T if not np.isnan(v).all()])
    return {**mean, "classes": each, "undefined": [name for name in classes[1:] if each[name]["iou"] is None],
            "interval": common.bootstrap_interval(average, len(table), groups)}


@torch.inference_mode()
def evaluate(model, dataset, split, args, run, distances=False, batch_size=32):
    """(table (N, C, 4) float64 as for class_scores, losses (N,)), numpy, in the split's order, on every
    process. Whole images; counts at the masks' size in the cache; HD95, in pixels of the original, only if
    `distances`."""
    model.eval()
    mine, count = np.arange(run.rank, len(split), run.world), len(dataset.classes)
    batches = [split.rows[mine[i:i + batch_size]] for i in range(0, len(mine), batch_size)]
    parts = [torch.zeros(0, count, 5, dtype=torch.float64)]
    pairs = zip(batches, common.load_batches(dataset.store, batches, run.device),
                common.load_batches(dataset.mask_store, batches, run.device))
    for rows, (images, sizes), (masks, mask_sizes) in tqdm(pairs, "evaluating", len(batches), leave=False,
                                                           disable=run.rank > 0):
        view = whole_view(images, sizes, args, dataset.mean, dataset.std)
        with run.autocast():
            logits = model(view)
        boxes, flips = (torch.cat([torch.zeros_like(mask_sizes), mask_sizes], 1),
                        torch.zeros_like(mask_sizes) > 0)
        targets = crop_masks(masks[..., 0], boxes, args.image_size, flips)
        table = torch.full((len(rows), count, 5), math.nan, dtype=torch.float64)
        table[:, :, 4] = loss_function(upsample(logits, targets.shape[1:]), targets, args.loss).cpu()[:, None]
        for i, (height, width) in enumerate(mask_sizes.tolist()):
            truth, said = masks[i, :height, :width, 0], full_size(logits[i], (height, width))
            pairs_of = torch.bincount((truth.long() * count + said).flatten(), minlength=count ** 2)
            pairs_of = pairs_of.view(count, count)
            table[i, :, :3] = torch.stack([pairs_of.diagonal(), pairs_of.sum(1), pairs_of.sum(0)], 1).cpu()
            scale = dataset.mask_store.sizes[rows[i]] / dataset.mask_store.shapes[rows[i], :2]
            for c in range(1, count if distances else 0):
                table[i, c, 3] = hausdorff95(truth == c, said == c, scale)
        parts.append(table)
    table = common.gather_rows(torch.cat(parts), len(split), run).numpy()
    return table[:, :, :4], table[:, 0, 4]


def score_annotators(model, dataset, args, run):
    """{annotator: scores of the test split against that annotator's masks}, and against their "majority"."""
    test, scores = dataset.splits["test"], {}
    experts = {name: [masks[path] for path in test.paths] for name, masks in dataset.annotators.items()}
    experts["majority"] = [[("vote", item) for item in items] for items in zip(*experts.values())]
    for name, masks in experts.items():
        store = common.open_store(f"{dataset.name}-{name}", masks, args, partial(
            open_mask, classes=len(dataset.classes)), Image.Resampling.NEAREST)
        # test alone, its images and masks in the rows 0, 1, ... of both stores
        alone = replace(dataset, mask_store=store, store=replace(dataset.store, **{
            part: getattr(dataset.store, part)[test.rows] for part in ("offsets", "shapes", "sizes")}))
        table, _ = evaluate(model, alone, replace(test, rows=np.arange(len(test))), args, run)
        scores[name] = score_masks(table, dataset.classes, dataset.metric, test.groups)
    return scores


def constant_score(dataset, args, device):
    """IoU over images on test of the best mask that is the same for every image: where the class is more
    frequent in train than the threshold that does best on train (up to 1024 images). Mean over the
    foreground."""
    grids = {}
    for name in ("train", "test"):
        rows = dataset.splits[name].rows
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), 1024)).astype(int)]
        batches, parts = np.array_split(rows, len(rows) // 32 + 1), []
        for masks, sizes in common.load_batches(dataset.mask_store, batches, device):
            boxes, flips = torch.cat([torch.zeros_like(sizes), sizes], 1), torch.zeros_like(sizes) > 0
            parts.append(crop_masks(masks[..., 0], boxes, 128, flips).to(torch.uint8))
        grids[name] = torch.cat(parts)
    scores = []
    for c in range(1, len(dataset.classes)):
        truth = {name: grid == c for name, grid in grids.items()}
        share = truth["train"].float().mean(0)

        def iou(name, level):
            both, either = ((join(truth[name], share > level)).sum((1, 2))
                            for join in (torch.logical_and, torch.logical_or))
            return (both[either > 0] / either[either > 0]).mean().item() if (either > 0).any() else None
        scores.append(iou("test", max(np.arange(0, 1, 0.05), key=lambda level: iou("train", level) or 0)))
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
    split, order = dataset.splits["train"], common.epoch_order(
        len(dataset.splits["train"]), args.batch_size, args.seed, epoch)
    mine = common.own_share(args.batch_size, run)
    # drop path and the like, where an architecture has them
    torch.manual_seed(hash((args.seed, epoch)) % 2 ** 31)
    model.train()
    total, begin = torch.zeros((), device=run.device), time.time()
    batches = [split.rows[batch[mine]] for batch in order]
    pairs = zip(common.load_batches(dataset.store, batches, run.device),
                common.load_batches(dataset.mask_store, batches, run.device))
    bar = tqdm(pairs, f"epoch {epoch + 1}/{args.epochs}", len(order), leave=False, disable=run.rank > 0)
    for i, ((images, sizes), (masks, mask_sizes)) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch * len(order) + i, args.epochs * len(order), args)
        draws = Draws((args.seed, epoch, i), args.batch_size, mine, run.device)
        dropout.seeds = torch.randint(2 ** 62, (args.batch_size,), generator=draws.generator)[mine].tolist()
        views, targets = train_view(images, masks, sizes, mask_sizes, draws, args, dataset.mean, dataset.std)
        with run.autocast():
            logits = model(views)
        loss = loss_function(upsample(logits, targets.shape[1:]), targets, args.loss).mean()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if args.clip_grad:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        total += loss.detach()
        if (i + 1) % CHECK_EVERY == 0 or i + 1 == len(order):
            mean = common.checked_mean(total, i + 1, epoch * len(order) + i, epoch, args, run)
            bar.set_postfix(loss=f"{mean.item():.3f}")
    return mean.item(), len(order) * args.batch_size / (time.time() - begin)


def save_model(path, model, dataset, args, pretrained_on):
    """model.pt: the backbone in timm's names, the head as classifier.*, and all that is needed to use
    them."""
    content = {"stage": "segment", "arch": args.arch, "init": args.init_label,
               "num_classes": len(dataset.classes), "dataset": dataset.name,
               "image_size": args.image_size, "resize": args.resize, "mean": dataset.mean, "std": dataset.std,
               "classes": dataset.classes, "task": "masks", "output_stride": args.output_stride,
               "pretrained_on": pretrained_on, "state_dict": {
                   k.removeprefix("backbone."): v.cpu().contiguous() for k, v in model.state_dict().items()}}
    common.write_atomic(path, lambda part: torch.save(content, part))


def fit(model, dataset, args, run, folder, pretrained_on):
    """Train from the last checkpoint to the last epoch; model.pt is the best on validation. Returns the
    log."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.lr,
                                 weight_decay=args.weight_decay, fused=run.device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp == "fp16")
    log, checkpoint = [], common.load_checkpoint(folder, run)
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
        table, losses = evaluate(model, dataset, dataset.splits["val"], args, run)
        values = {"loss": float(losses.mean()), **score_masks(table, dataset.classes, dataset.metric)}
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
        say(f"epoch {epoch + 1}/{args.epochs}  loss {loss:.4f}  val loss {values['loss']:.4f}  "
            f"val {dataset.metric} {common.show(values[dataset.metric])}{' *' if improved else ''}  "
            f"{speed:.1f} images/s")
    common.barrier()  # the others must not load model.pt before it is written
    return log


def finish(dataset, args, run, folder, log, pretrained_on):
    """Test the best epoch once; write predictions.csv, curves.png and, last, metrics.json."""
    model = common.to_device(load_segmenter(folder / "model.pt")[0], run)
    split, classes = dataset.splits["test"], dataset.classes
    table, losses = evaluate(model, dataset, split, args, run, distances=True)
    annotators = score_annotators(model, dataset, args, run) if dataset.annotators else {}
    if run.rank > 0:
        return
    test = {"loss": float(losses.mean()), **score_masks(table, classes, dataset.metric, split.groups),
            "constant_iou": constant_score(dataset, args, run.device), "annotators": annotators}
    best, show = max(log, key=lambda entry: entry["score"]), common.show
    columns = np.concatenate([*(np.stack(overlap(table[:, 1:]), 2), table[:, 1:, [3, 1, 2]])], 2)
    head = [f"{what}_{name}" for name in classes[1:]
            for what in ("iou", "dice", "hd95", "pixels", "predicted")]
    common.write_table(folder / "predictions.csv", ["path", *head], [
        [path, *("" if math.isnan(v) else f"{v:.6g}" for v in row)]
        for path, row in zip(split.paths, columns.reshape(len(split), -1))])
    epochs = [entry["epoch"] for entry in log]
    common.draw_plot(folder / "curves.png", [
        {"title": "loss", "xlabel": "epoch", "ylabel": args.loss, "series": [
            {"label": "train", "x": epochs, "y": [entry["loss"] for entry in log]},
            {"label": "validation", "x": epochs, "y": [entry["val"]["loss"] for entry in log]}]},
        {"title": f"validation {dataset.metric}", "xlabel": "epoch", "ylabel": dataset.metric, "series": [
            {"label": "validation", "x": epochs, "y": [e["val"][dataset.metric] for e in log],
             "colour": 1}]}])
    headline = f"{dataset.metric} {show(test[dataset.metric])}"
    common.write_json(folder / "metrics.json", {
        "stage": "segment", "dataset": dataset.name, "arch": args.arch, "init": args.init_label,
        "pretrained_on": pretrained_on, "seed": args.seed, "metric": dataset.metric, "val": best["val"],
        "test": test, "best_epoch": best["epoch"], "counts": dataset.counts, "split": dataset.split_id,
        "leakage": dataset.leakage, "loss": args.loss,
        "image_size": args.image_size, "output_stride": args.output_stride, "epochs": args.epochs,
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
    say(f"best epoch {best['epoch']} of {args.epochs}, {len(split)} test images, {headline} (95 % interval "
        f"{show(low)} to {show(high)}); the best constant mask has IoU {show(test['constant_iou'])}")
    if test["undefined"]:
        say("neither in the test split nor predicted, left out of the averages: "
            f"{', '.join(test['undefined'])}")
    say(f"written: {folder}")


# ---------------------------------------------------------------- new images, and two runs side by side -----

@torch.inference_mode()
def predict_masks(model, store, rows, args, meta, run, sizes_of):
    """Yield, for each of rows, its mask (H, W) uint8 numpy at the size sizes_of(position in rows)."""
    batches = [rows[i:i + 32] for i in range(0, len(rows), 32)]
    loader, done = common.load_batches(store, batches, run.device), 0
    for images, sizes in tqdm(loader, "predicting", len(batches), leave=False, disable=run.rank > 0):
        view = whole_view(images, sizes, args, meta["mean"], meta["std"])
        with run.autocast():
            logits = model(view)
        for coarse in logits:
            yield full_size(coarse, sizes_of(done)).cpu().numpy()
            done += 1


def predict_new(args, run):
    """--predict: a PNG mask at each image's own size (0/255 for two classes, else class indices under a
    palette) and masks.csv with the area of each class in pixels and as a fraction of the image."""
    if args.init in ("random", "imagenet", "imagenet-dino"):
        fail("--predict needs --init RUN/model.pt, a model that segment.py has trained")
    model, meta = load_segmenter(args.init)
    args.image_size, args.resize, classes = meta["image_size"], meta["resize"], meta["classes"]
    source, folder = Path(args.predict), Path(args.output or "predictions")
    paths = common.images_under(source) if source.is_dir() else fail(
        f"--predict {source}: there is no such folder")
    if not paths:
        fail(f"--predict {source}: no images in this folder")
    if (folder / "args.json").exists() or (folder.exists() and not folder.is_dir()):
        fail(f"--output {folder} holds a training run or is a file; give a new folder for the predictions")
    dataset = Dataset("predict", "masks", classes, {"test": Split(paths)})
    common.attach_store(dataset, args)
    split, rows = dataset.splits["test"], []
    files = [folder / "masks" / Path(path).relative_to(source).with_suffix(".png") for path in split.paths]
    if len(set(files)) < len(files):
        fail(f"--predict {source}: two images differ only by suffix and would share a mask; rename one")
    mine = np.arange(run.rank, len(split), run.world)
    masks = predict_masks(common.to_device(model, run), dataset.store, split.rows[mine], args, meta, run,
                          lambda i: image_size(split.paths[mine[i]]))
    palette = [int(colour[i:i + 2], 16) for colour in ["#000000", *common.COLOURS * 36]
               for i in (1, 3, 5)][:768]
    areas = [torch.zeros(0, len(classes) + 2, dtype=torch.int64)]
    for i, mask in zip(mine, masks):
        picture = Image.fromarray(mask * 255 if len(classes) == 2 else mask)
        if len(classes) > 2:
            picture.putpalette(palette)
        files[i].parent.mkdir(parents=True, exist_ok=True)
        common.write_atomic(files[i], lambda part: picture.save(part, "PNG"))
        areas.append(torch.tensor([[*mask.shape, *np.bincount(mask.ravel(), minlength=len(classes))]]))
    areas = common.gather_rows(torch.cat(areas), len(split), run).numpy()
    if run.rank == 0:
        for path, file, (height, width, _, *area) in zip(split.paths, files, areas):
            rows.append([path, file, height, width, *(value for n in area for value in (
                n, f"{n / (height * width):.6f}"))])
        common.write_table(folder / "masks.csv", ["path", "mask", "height", "width", *(
            f"{what}_{name}" for name in classes[1:] for what in ("area", "fraction"))], rows)
        say(f"written: {folder}/masks.csv and {len(files)} masks")


def components(mask):
    """The regions of a mask (H, W) bool, joined by sides or corners: (H, W) int64, 0 outside, 1 the
    largest."""
    labels = torch.arange(1, mask.numel() + 1, dtype=torch.float64,
                          device=mask.device).view(mask.shape) * mask
    while True:  # every pixel takes the largest number around it
        spread = F.max_pool2d(labels[None, None], 3, 1, 1)[0, 0] * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    _, inverse, sizes = torch.unique(labels[mask], return_inverse=True, return_counts=True)
    result = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    result[mask] = sizes.argsort(descending=True, stable=True).argsort()[inverse] + 1
    return result


def region_scores(truth, said):
    """For each region of the truth, largest first: (distance of its nearest pixel from the largest region, as
    a share of the image's diagonal, IoU). A predicted pixel outside the truth is held against the region
    nearest to it, so that an image of one region has its ordinary IoU. truth, said (H, W) bool."""
    regions = components(truth)
    parts = [(regions == k + 1) for k in range(int(regions.max()))]
    edges, false = [outline(part).nonzero().float() for part in parts], (said & ~truth).nonzero().float()
    owner = torch.stack([nearest(false, edge) for edge in edges]).argmin(0) if len(false) else torch.zeros(0)
    return [(nearest(edge, edges[0]).min().item() / math.hypot(*truth.shape),
             ((said & part).sum() / (part.sum() + (owner == k).sum())).item())
            for k, (part, edge) in enumerate(zip(parts, edges))]


def draw_outlines(pixels, masks, side):
    """An image (H, W, 1 or 3) uint8, its long side scaled to `side`, with the outlines of masks [((H, W)
    bool, colour)], the first drawn thickest so that it shows beneath the others."""
    image = Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy())
    size = tuple(round(n * side / max(image.size)) for n in image.size)
    canvas = np.asarray(image.resize(size, Image.Resampling.BICUBIC)).copy()
    for i, (mask, colour) in enumerate(masks):
        wide = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
        edge = outline(torch.from_numpy(np.asarray(wide) > 127))
        canvas[F.max_pool2d(edge[None].float(), 3 if i else 5, 1, 1 if i else 2)[0].numpy() > 0] = colour
    return canvas


# of the image's diagonal
BINS = {"main region": 0, "within 10 %": 0.1, "10 to 25 %": 0.25, "beyond 25 %": math.inf}


def compare(args, run):
    """--compare: a picture of the test images on which B beats A most, A beats B most, and those in the
    middle, with the truth in yellow, A in blue, B in red; below it, and in FILE.json, the mean IoU of the
    truth's regions by their distance from the image's largest. Classes other than the background count as
    one."""
    output = Path(args.output or "comparison.png")
    if output.suffix.lower() != ".png" or run.world > 1:
        fail(f"--compare writes one picture, by one process: --output {output} must end in .png")
    stored = []
    for folder in map(Path, args.compare):
        if not (folder / "metrics.json").is_file() or not (folder / "model.pt").is_file():
            fail(f"--compare {folder}: not a finished run of segment.py")
        stored.append(json.loads((folder / "args.json").read_text())["arguments"])
    for name in ("dataset", "data_dir", "csv", "split_column", "group_column", "split_seed", "classes"):
        if stored[0].get(name) != stored[1].get(name):
            fail(f"--compare: other test images: {name} is {stored[0].get(name)!r} in the first run, "
                 f"{stored[1].get(name)!r} in the second")
    names = [old["arch"] if stored[0]["arch"] != stored[1]["arch"] else Path(folder).name
             for old, folder in zip(stored, args.compare)]
    shared = {k: getattr(args, k) for k in ("cache_dir", "workers", "skip_broken")}
    dataset = load_masks(argparse.Namespace(**stored[0] | shared | {"limit": None}))
    split, store = dataset.splits["test"], dataset.mask_store
    size = lambda i: tuple(store.shapes[split.rows[i], :2].tolist())  # noqa: E731
    truths = [store.image(row)[..., 0] > 0 for row in split.rows]
    said = []
    for folder in args.compare:
        model, meta = load_segmenter(Path(folder) / "model.pt")
        view = argparse.Namespace(image_size=meta["image_size"])
        masks = predict_masks(common.to_device(model, run), dataset.store, split.rows, view, meta, run, size)
        said.append([mask > 0 for mask in masks])
    count = lambda *masks: [np.logical_and(*masks).sum(), masks[0].sum(), masks[1].sum()]  # noqa: E731
    iou = np.array([[overlap(np.array(count(truth, mask)))[0] for truth, mask in zip(truths, masks)]
                    for masks in said])
    found = {name: [] for name in BINS}
    for i, truth in enumerate(truths):
        if truth.any():
            pair = [region_scores(torch.from_numpy(truth), torch.from_numpy(masks[i])) for masks in said]
            for k, ((far, a), (_, b)) in enumerate(zip(*pair)):
                found[next(name for name, end in BINS.items() if k == 0 or 0 < far <= end)].append((a, b))
    order = [i for i in np.argsort(iou[0] - iou[1], kind="stable") if np.isfinite(iou[:, i]).all()]
    if not order:
        fail("--compare: no test image has a mask")
    middle = len(order) // 2
    picks = dict.fromkeys([*order[:2], *order[max(0, middle - 1):middle + 1], *order[-2:]])
    rows, captions = [], []
    for i in picks:
        truth, masks = (truths[i], YELLOW), [(said[0][i], BLUE), (said[1][i], RED)]
        rows.append([draw_outlines(dataset.store.image(split.rows[i]), drawn, 320) for drawn in (
            [], [truth, masks[0]], [truth, masks[1]], [truth, *masks])])
        captions.append([Path(split.paths[i]).name, (f"{names[0]}  IoU {iou[0, i]:.3f}", BLUE),
                         (f"{names[1]}  IoU {iou[1, i]:.3f}", RED),
                         f"difference {iou[0, i] - iou[1, i]:+.3f}"])
    output.parent.mkdir(parents=True, exist_ok=True)
    title = f"{dataset.name}, test: truth yellow, {names[0]} blue, {names[1]} red; sorted by the difference"
    common.draw_grid(output, rows, captions, None, 320, title)
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
    folder = common.open_run(args, run, "segment")
    dataset = load_masks(args)
    if len(dataset.splits["train"]) < args.batch_size:
        fail(f"--batch-size {args.batch_size} is more than the {len(dataset.splits['train'])} training "
             "images")
    model, pretrained_on = build_segmenter(args, len(dataset.classes))
    model = common.to_device(model, run)
    common.write_args(folder, args, run, ["curves.png"])
    log = fit(model, dataset, args, run, folder, pretrained_on)
    finish(dataset, args, run, folder, log, pretrained_on)


if __name__ == "__main__":
    common.launch(main)
