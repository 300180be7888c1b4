"""Where models look: Grad-CAM for CNNs, CLS attention for ViTs, and whether the maps find the lesion.

    python saliency.py --runs runs/RUN_RESNET runs/RUN_DEIT
    python saliency.py --runs RUN --dataset csv --data-dir DIR --label-column diagnosis --masks DIR/masks
    python saliency.py --runs RUN --files a.png b.png

Matsoukas et al. 2023, figure 4. CNNs: Grad-CAM (Selvaraju et al. 2017) on the last feature map. ViTs: CLS attention
of the last block, the patches that hold the top 50 % of its mass (Caron et al. 2021); rollout (Abnar and Zuidema
2020); or Grad-CAM. With masks each map is scored against the lesion, without by deletion and insertion (Petsiuk et
al. 2018), beside a random map and a centred Gaussian: a map that does not beat them explains nothing.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import common
from common import Dataset, Split, fail, say

GAUSSIAN = 0.25  # standard deviation of the centred Gaussian, as a share of the side
KINDS = ("map", "gaussian", "random")
LOWER_IS_BETTER = {"deletion"}


def arguments():
    """The command line."""
    parser, _ = common.make_parser(__doc__)
    group = parser.add_argument_group("saliency")
    group.add_argument("--runs", nargs="+", required=True, metavar="RUN", help="folders of finetune.py, a row each")
    group.add_argument("--files", nargs="+", metavar="IMAGE", help="explain these images instead of a dataset")
    group.add_argument("--masks", metavar="DIR", help="lesion masks, named as the images, for a dataset without")
    group.add_argument("--images", type=int, help="test images to draw and save (default 8)")
    group.add_argument("--score-images", type=int, help="test images to score (default 200; 32 without masks)")
    group.add_argument("--method", default="attention", choices=["attention", "rollout", "gradcam"],
                       help="for ViTs (default, paper: attention); CNNs get Grad-CAM")
    group.add_argument("--mass", type=float, default=0.5, help="share of CLS attention to keep (default, paper: 0.5)")
    group.add_argument("--head", type=int, help="one attention head, from 0 (default, paper: mean of all)")
    group.add_argument("--target", help="class that Grad-CAM and curves explain (default: the predicted one)")
    group.add_argument("--steps", type=int, default=20, help="of the deletion and insertion curves (default 20)")
    group.add_argument("--batch-size", type=int, default=16, help="images at a time (default 16)")
    args = common.parse(parser)
    for name in ("images", "score_images", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if not 0 < args.mass <= 1:
        fail(f"--mass {args.mass}: must be more than 0, at most 1")
    if args.init != "random" or args.compile:
        fail("--init and --compile have no place here: give the trained models as --runs")
    return args


# ---------------------------------------------------------------- the maps -------------------------------------

def class_logits(logits, task):
    """(B, C) float32 logits; a single logit l of two classes becomes [-l/2, l/2], whose softmax is [1 - p, p]."""
    logits = logits.float()
    return torch.cat([-logits / 2, logits / 2], 1) if logits.shape[1] == 1 and task == "classes" else logits


def probabilities(logits, task):
    """(B, C): softmax over classes, or a sigmoid a label."""
    logits = class_logits(logits, task)
    return logits.softmax(1) if task == "classes" else logits.sigmoid()


def as_map(model, x):
    """Features as (B, C, h, w): tokens without CLS put back in their places, channels-last maps turned."""
    if x.ndim == 3:
        grid = model.patch_embed.grid_size
        return x[:, x.shape[1] - grid[0] * grid[1]:].transpose(1, 2).unflatten(2, grid)
    return x.permute(0, 3, 1, 2) if x.shape[3] == model.num_features != x.shape[1] else x


def grad_cam(model, images, targets, task):
    """Grad-CAM (B, h, w) float32 and the logits (B, C). Selvaraju et al. 2017, eq. 1 and 2: relu(sum_k a_k A_k),
    a_k the mean over places of d score / d A_k; A is the last feature map. In ViTs A is the patch tokens that enter
    the last block's attention, since after that block the classifier reads CLS alone. targets: (B,) int64, or None
    for the predicted class."""
    last, kept = getattr(model, "blocks", [None])[-1], []
    if hasattr(last, "norm1"):
        hook = last.norm1.register_forward_hook(lambda module, inputs, output: kept.append(output))
        logits = model(images)
        hook.remove()
    else:
        kept.append(model.forward_features(images))
        logits = model.forward_head(kept[0])
    targets = probabilities(logits, task).argmax(1) if targets is None else targets
    score = class_logits(logits, task).gather(1, targets[:, None]).sum()
    features, gradient = (as_map(model, x) for x in (*kept, *torch.autograd.grad(score, kept)))
    return (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu().detach().float(), logits.detach()


def cls_attention(attention, grid, head=None):
    """(B, h, w): what CLS, the first token, pays to each patch, as the mean over heads or of one head. attention
    (B, H, T, T), its last h x w tokens the patches."""
    row = attention[:, :, 0, attention.shape[3] - grid[0] * grid[1]:].float()
    return (row.mean(1) if head is None else row[:, head]).unflatten(1, grid)


def rollout(maps, grid):
    """(B, h, w): attention traced from CLS back through all blocks, of each the mean over heads, half and half with
    the identity for the residual (Abnar and Zuidema 2020, eq. 1). maps: (B, H, T, T) a block, in order."""
    joint = torch.eye(maps[0].shape[3], device=maps[0].device)
    for attention in maps:
        joint = (attention.float().mean(1) + torch.eye(attention.shape[3], device=joint.device)) / 2 @ joint
    return cls_attention(joint[:, None], grid)


def keep_mass(maps, mass):
    """(B, h, w): each map's largest values that together hold a share `mass` of its sum, all else 0."""
    values, order = maps.flatten(1).sort(1, descending=True)
    kept = values * (values.cumsum(1) - values < mass * values.sum(1, keepdim=True))
    return torch.zeros_like(kept).scatter_(1, order, kept).view_as(maps)


def explain(model, read, images, meta, args):
    """Maps (B, h, w), probabilities (B, C) and targets (B,) for normalised images, by the model's method."""
    targets = None
    if args.target is not None:
        targets = torch.full((len(images),), meta["classes"].index(args.target), device=images.device)
    if meta["method"] == "gradcam":
        maps, logits = grad_cam(model, images, targets, meta["task"])
    else:
        blocks, grid = [attention for _, attention in sorted(read(images).items())], model.patch_embed.grid_size
        maps = rollout(blocks, grid) if meta["method"] == "rollout" else cls_attention(blocks[-1], grid, args.head)
        with torch.inference_mode():
            logits = model(images)
    chances = probabilities(logits, meta["task"])
    return maps, chances.cpu().numpy(), chances.argmax(1) if targets is None else targets


def enlarge(maps, size, smooth):
    """(B, h, w) -> (B, *size): bilinear for feature maps; attention stays in its patches."""
    options = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest-exact"}
    return F.interpolate(maps[:, None], size, **options)[:, 0]


# ---------------------------------------------------------------- the scores -----------------------------------

def localisation(full, kept, mask):
    """How well a map finds a lesion, all (H, W): energy (share of `kept` inside; Wang et al. 2020), pointing (is the
    peak of `full` inside? Zhang et al. 2018) and iou (of the mask and as many top pixels of `full`). Ties share
    alike, so that a flat map scores as chance does. A mask without a lesion gives NaN."""
    area, total = mask.sum(), kept.sum(dtype=np.float64)
    if not area:
        return {"energy": np.nan, "pointing": np.nan, "iou": np.nan}
    level = np.partition(full, -area, axis=None)[-area]
    above, tied = full > level, full == level
    inside = (above & mask).sum() + (area - above.sum()) / tied.sum() * (tied & mask).sum()
    return {"energy": float(kept[mask].sum(dtype=np.float64) / total if total > 0 else mask.mean()),
            "pointing": float(mask[full == full.max()].mean()), "iou": float(inside / (2 * area - inside))}


@torch.inference_mode()
def curves(model, images, maps, targets, task, steps, run):
    """Areas under the deletion and insertion curves, {name: (B,)} (Petsiuk et al. 2018): the target's probability as
    the pixels that a map (B, H, W) ranks highest turn to the mean colour (0), or appear on the blurred image."""
    side = images.shape[-1]
    blurred = F.interpolate(F.adaptive_avg_pool2d(images, max(1, side // 16)), side, mode="bilinear")
    rank = maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1).view_as(maps)[:, None]
    points = {"deletion": [], "insertion": []}
    for step in range(steps + 1):
        chosen = rank < round(step / steps * side * side)
        for name, before, after in (("deletion", images, torch.zeros_like(images)), ("insertion", blurred, images)):
            with run.autocast():
                logits = model(torch.where(chosen, after, before))
            points[name].append(probabilities(logits, task).gather(1, targets[:, None])[:, 0].cpu())
    return {name: torch.trapezoid(torch.stack(values), dim=0).numpy() / steps for name, values in points.items()}


def summarise(scores, groups, seed):
    """scores {kind: {score: (N,) or NaN}} -> means with 95 % bootstrap intervals over images (or patients), and of
    the paired difference to each baseline; beats_...: that interval lies on the good side of 0."""
    def mean(values):
        value = lambda rows: None if np.isnan(values[rows]).all() else float(np.nanmean(values[rows]))  # noqa: E731
        return {"mean": value(slice(None)), "interval": common.bootstrap_interval(value, len(values), groups, seed)}

    result = {kind: {name: mean(values) for name, values in scores[kind].items()} for kind in KINDS}
    for kind in KINDS[1:]:
        gain = {name: mean(values - scores[kind][name]) for name, values in scores["map"].items()}
        result[f"map_minus_{kind}"] = gain
        result[f"beats_{kind}"] = {name: one["interval"] and (
            one["interval"][1] < 0 if name in LOWER_IS_BETTER else one["interval"][0] > 0) for name, one in gain.items()}
    return result


# ---------------------------------------------------------------- masks and models -----------------------------

def attach_masks(split, folder):
    """Fill split.masks from --masks: the file of each image's name, whatever its ending."""
    files = {Path(path).stem: path for path in common.images_under(folder)}
    missing = [path for path in split.paths if Path(path).stem not in files]
    if missing:
        fail(f"--masks {folder}: no mask for {len(missing)} of {len(split)} images: {common.some(missing)}")
    split.masks = [files[Path(path).stem] for path in split.paths]


def read_mask(item):
    """(H, W) bool of one of Split.masks: a demo name, a PNG (0/255, or class numbers), or (class, PNG) to unite."""
    if not isinstance(item, str):
        return np.logical_or.reduce([read_mask(path) for _, path in item])
    if item.startswith("demo-mask/"):
        return common.demo_image(int(item[10:]))[1]
    with Image.open(item) as image:
        pixels = np.asarray(image if image.mode in ("L", "P", "1") else image.convert("L")).astype(np.uint8)
    return pixels > (127 if pixels.max() > 127 else 0)


def sample_mask(mask, box, cached, size):
    """The mask (H, W) of a whole image as the model's view of it, (size, size), nearest pixel. box: (top, left,
    height, width) of the view in the cached image, which is cached[0] x cached[1]."""
    rows, columns = (((start + (np.arange(size) + 0.5) * length / size) * want / have).astype(int).clip(max=want - 1)
                     for start, length, have, want in zip(box[:2], box[2:], cached, mask.shape))
    return mask[rows][:, columns]


def open_model(name, number, args):
    """(model, attention reader or None, meta) of one of --runs; meta also gets run, label and method."""
    path = Path(name) / "model.pt" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        fail(f"--runs {name}: no model.pt there; give the folder of a run that finetune.py has trained")
    model, meta = common.load_trained(path)
    read = common.attention_reader(model)
    meta |= {"run": name, "label": common.init_name(path), "method": args.method if read else "gradcam"}
    if meta["label"] in map(common.init_name, (Path(other) / "model.pt" for other in args.runs[:number])):
        meta["label"] += f"-{number}"
    if args.target is not None and args.target not in meta["classes"]:
        fail(f"--target {args.target}: {name} knows {common.some(meta['classes'], 30)}")
    if meta["method"] != "gradcam":
        attention = read(torch.zeros(1, 3, meta["image_size"], meta["image_size"]))  # refuses other attention now
        last, grid = attention[max(attention)], model.patch_embed.grid_size
        if last.shape[3] == grid[0] * grid[1]:
            fail(f"--runs {name}: {meta['arch']} has no CLS token to ask; use --method gradcam")
        if args.head is not None and not 0 <= args.head < last.shape[1]:
            fail(f"--head {args.head}: {meta['arch']} has heads 0 to {last.shape[1] - 1}")
    return model, read, meta


def open_images(args, meta):
    """(dataset, its test images or those of --files), cached at the resize of a model."""
    view = argparse.Namespace(**{**vars(args), "resize": meta["resize"], "image_size": meta["image_size"]})
    if args.masks and not Path(args.masks).is_dir():
        fail(f"--masks {args.masks}: there is no such folder")
    if args.files:
        missing = [path for path in args.files if not Path(path).is_file()]
        if missing:
            fail(f"--files: there is no {common.some(missing)}")
        dataset = Dataset("files", meta["task"], meta["classes"], {"test": Split(args.files)})
        common.attach_store(dataset, view)
    else:
        dataset = common.load_dataset(view, check=False)
    split = dataset.splits["test"]
    if args.masks:
        attach_masks(split, args.masks)
    if args.images and args.images > len(split):
        fail(f"--images {args.images}: there are only {len(split)} test images")
    return dataset, split


def look(model, read, meta, source, drawn, args, run):
    """Explain and score the images of source = (dataset, split): scores {kind: {name: (N,)}}; pictures {row: (map
    (S, S), box of the view, target)} for the rows in `drawn`; probabilities (N, C); blank (N,): no map at all."""
    (dataset, split), size, smooth = source, meta["image_size"], meta["method"] == "gradcam"
    mass = args.mass if meta["method"] == "attention" else 1.0
    line = torch.linspace(-0.5, 0.5, size) ** 2 / (2 * GAUSSIAN ** 2)
    gaussian, generator = torch.exp(-line[:, None] - line), torch.Generator().manual_seed(args.seed)
    scores, pictures, every, blank = {kind: {} for kind in KINDS}, {}, [], []
    batches = np.split(np.arange(len(split)), range(args.batch_size, len(split), args.batch_size))
    loader = common.load_batches(dataset.store, [split.rows[batch] for batch in batches], run.device)
    for batch, (images, sizes) in tqdm(zip(batches, loader), meta["label"], len(batches), leave=False):
        rows, boxes = split.rows[batch], common.centre_boxes(sizes, max(size, meta["resize"] * 7 // 8)).cpu().numpy()
        images = common.eval_view(images, sizes, argparse.Namespace(**meta), meta["mean"], meta["std"])
        maps, chances, targets = explain(model, read, images, meta, args)
        every, blank = every + [chances], blank + (maps.amax((1, 2)) <= 0).tolist()
        coarse = {"map": maps.cpu(), "random": torch.rand(maps.shape, generator=generator)}
        full = {kind: enlarge(values, (size, size), smooth) for kind, values in coarse.items()}
        kept = {kind: enlarge(keep_mass(values, mass), (size, size), smooth) for kind, values in coarse.items()}
        full["gaussian"] = gaussian.expand(len(batch), -1, -1)
        kept["gaussian"] = keep_mass(full["gaussian"], mass)
        pictures.update({row: (kept["map"][i], boxes[i], int(targets[i])) for i, row in enumerate(rows) if row in drawn})
        masks = [sample_mask(read_mask(split.masks[n]), boxes[i], dataset.store.shapes[rows[i]], size)
                 for i, n in enumerate(batch)] if split.masks else None
        for kind in KINDS:
            if masks:
                found = [localisation(a.numpy(), b.numpy(), mask) for a, b, mask in zip(full[kind], kept[kind], masks)]
                found = {name: [one[name] for one in found] for name in found[0]}
            else:
                found = curves(model, images, full[kind].to(run.device), targets, meta["task"], args.steps, run)
            for name, values in found.items():
                scores[kind].setdefault(name, []).extend(values)
    scores = {kind: {name: np.array(values) for name, values in found.items()} for kind, found in scores.items()}
    return scores, pictures, np.concatenate(every), np.array(blank)


# ---------------------------------------------------------------- the pictures and files -----------------------

def place_map(view_map, box, cached, size):
    """A map (S, S) of the model's view put back into the whole image, which is size (height, width): float32, 0
    where the model did not look; and the view's slices."""
    (top, left, height, width), (y, x) = box, np.array(size) / cached[:2]
    view = slice(round(top * y), round((top + height) * y)), slice(round(left * x), round((left + width) * x))
    whole = np.zeros(size, np.float32)
    whole[view] = enlarge(view_map[None], whole[view].shape, True)[0]
    return whole, view


def original_size(path):
    """(height, width) of an image as it is shown; large JPEGs are decoded smaller, so the cache does not know."""
    if path.startswith("demo/"):
        return common.open_image(path).shape[:2]
    with Image.open(path) as image:
        return image.size if image.getexif().get(0x0112, 1) > 4 else image.size[::-1]  # EXIF: turned by 90 degrees


def overlay(pixels, heat, view):
    """Paint a map (H, W) over an image (H, W, 1 or 3) uint8, red to yellow, the stronger the more opaque; what the
    model did not see, outside `view`, is dimmed."""
    heat = heat[..., None] / max(heat.max(), 1e-12)
    colour = np.concatenate([255 + 0 * heat, 255 * np.clip(2 * heat - 0.8, 0, 1), 30 * heat], 2)
    light, alpha = np.full_like(heat, 0.45), 0.75 * heat ** 0.7
    light[view] = 1
    return (pixels * light * (1 - alpha) + colour * alpha).astype(np.uint8)


def draw_originals(split, classes):
    """The images with the lesion's border, and their class (or file) as captions."""
    images, captions = [], []
    for n, path in enumerate(split.paths):
        pixels = common.resize_short_side(common.open_image(path), 320)
        if split.masks:
            mask = Image.fromarray(read_mask(split.masks[n])).resize(pixels.shape[1::-1], Image.Resampling.NEAREST)
            edge = np.any([mask ^ np.roll(mask, 3, axis) for axis in (0, 1)], 0)
            pixels = np.where(edge[..., None], (0, 255, 255), pixels).astype(np.uint8)
        images.append(pixels)
        label = None if split.labels is None or not classes else split.labels[n]
        captions.append((Path(path).name if label is None else classes[label] if np.ndim(label) == 0 else
                         ", ".join(name for name, flag in zip(classes, label) if flag > 0.5))[-26:])
    return images, captions, "image"


def is_right(label, chances):
    """Whether the top class is the label (int); for several labels (L,), whether the top one is called right."""
    top = int(chances.argmax())
    return top == label if np.ndim(label) == 0 else (label[top] > 0.5) == (chances[top] > 0.5)


def draw_run(folder, meta, source, positions, pictures, chances, labels):
    """A run's overlays and captions for the images at `positions` of the split. Also writes maps-RUN.npz: map_0,
    map_1, ... float32 at the resolution of the files; their paths, probabilities and the classes explained."""
    (dataset, split), images, captions, arrays = source, [], [], {}
    for number, n in enumerate(positions):
        (view_map, box, _), cached = pictures[split.rows[n]], dataset.store.shapes[split.rows[n]]
        pixels = common.resize_short_side(common.open_image(split.paths[n]), 320)
        images.append(overlay(pixels, *place_map(view_map, box, cached, pixels.shape[:2])))
        arrays[f"map_{number}"] = place_map(view_map, box, cached, original_size(split.paths[n]))[0]
        text = f"{meta['classes'][chances[n].argmax()][:16]} {chances[n].max():.0%}"
        right = None if labels is None else bool(is_right(labels[n], chances[n]))
        captions.append({None: text, True: (text + " right", "#00702e"), False: (text + " WRONG", "#c00000")}[right])
    arrays |= {"paths": np.array([split.paths[n] for n in positions]), "probabilities": chances[positions],
               "explained": np.array([meta["classes"][pictures[split.rows[n]][2]] for n in positions])}

    def save(part):
        with open(part, "wb") as out:
            np.savez_compressed(out, **arrays)
    common.write_atomic(folder / f"maps-{meta['label']}.npz", save)
    return images, captions, f"{meta['label'][:15]}\n{meta['method']}"


def finish(folder, source, runs, args, run, seconds):
    """Print the scores and write metrics.json, last."""
    (dataset, split), names = source, list(runs[0]["map"])
    value = lambda one: "undefined" if one["mean"] is None else "{:.3f} ({:.3f} to {:.3f})".format(  # noqa: E731
        one["mean"], *(one["interval"] or [np.nan] * 2))
    common.print_table(["", *names], [[f"{one['name']} {one['method'] if kind == 'map' else kind}",
                                       *(value(one[kind][name]) for name in names)] for one in runs for kind in KINDS])
    for one in runs:
        verdict = {True: "beats", False: "does not beat", None: "cannot be compared with"}[one["beats_gaussian"][names[0]]]
        say(f"{one['name']} {verdict} the centred Gaussian in {names[0]}: difference "
            f"{value(one['map_minus_gaussian'][names[0]])}; {one['blank_maps']} of {len(split)} maps are blank")
    common.write_json(folder / "metrics.json", {
        "stage": "saliency", "dataset": dataset.name, "arch": ", ".join(one["arch"] for one in runs),
        "init": ", ".join(one["name"] for one in runs), "pretrained_on": [one["pretrained_on"] for one in runs],
        "seed": args.seed, "metric": names[0], "lower_is_better": sorted(LOWER_IS_BETTER & {*names}), "runs": runs,
        "val": {}, "test": {one["name"]: one["map"][names[0]] for one in runs},
        "counts": {**dataset.counts, "scored": len(split)}, "epochs": 0, "seconds": seconds,
        "images_per_second": len(split) * len(runs) / seconds, "device": common.device_name(run.device),
        "amp": run.amp, "world_size": 1,
        "summary": "; ".join(f"{one['name']} {names[0]} {value(one['map'][names[0]])}" for one in runs)})
    say(f"{len(split)} images scored by {', '.join(names)}\nwritten: {folder}")


def main():
    """Explain the same images with every run; draw, save and score the maps."""
    args, begin = arguments(), time.time()
    run = common.start(args)
    if run.world > 1:
        fail("saliency.py works in one process; start it with python, not torchrun")
    timm.layers.set_fused_attn(False)  # before any model is built: fused attention never forms the map
    args.dataset = "files" if args.files else args.dataset
    args.output = args.output or "-".join(["runs/saliency", args.dataset, *(Path(name).name for name in args.runs)])
    folder = common.open_run(args, run, "saliency")
    models, sources = [open_model(name, number, args) for number, name in enumerate(args.runs)], {}
    for _, _, meta in models:
        if meta["resize"] not in sources:
            sources[meta["resize"]] = open_images(args, meta)
    common.write_args(folder, args, run, ["saliency.png", *(path.name for path in folder.glob("maps-*.npz"))])
    grid, runs = [], []
    for model, read, meta in models:
        dataset, whole = sources[meta["resize"]]
        drawn = common.limit_images(whole, args.images or 8, args.split_seed)
        wanted = args.score_images or (200 if whole.masks else 32)
        split = common.limit_images(whole, max(wanted, len(drawn)), args.split_seed)  # holds all of drawn
        labels = split.labels if dataset.classes == meta["classes"] else None  # else right and wrong have no meaning
        grid = grid or [draw_originals(drawn, dataset.classes)]
        common.to_device(model, run)
        scores, pictures, chances, blank = look(model, read, meta, (dataset, split), {*drawn.rows}, args, run)
        grid.append(draw_run(folder, meta, (dataset, split), np.flatnonzero(np.isin(split.rows, drawn.rows)),
                             pictures, chances, labels))
        runs.append({"run": meta["run"], "name": meta["label"], "arch": meta["arch"], "init": meta["init"],
                     "pretrained_on": meta.get("pretrained_on"), "method": meta["method"], "images": len(split),
                     "image_size": meta["image_size"], "blank_maps": int(blank.sum()),
                     "right": None if labels is None else float(np.mean([*map(is_right, labels, chances)])),
                     **summarise(scores, split.groups, args.seed)})
    images, captions, names = zip(*grid)
    common.draw_grid(folder / "saliency.png", images, captions, names, 190,
                     f"{dataset.name}: where the models look" + (f" for {args.target}" if args.target else ""))
    finish(folder, (dataset, split), runs, args, run, time.time() - begin)


if __name__ == "__main__":
    common.launch(main)
