"""Where models look: Grad-CAM for CNNs, CLS attention for ViTs, and whether the maps find the lesion.

    python saliency.py --runs runs/RUN_RESNET runs/RUN_DEIT
    python saliency.py --runs RUN --data data/mine
    python saliency.py --runs RUN --files a.png b.png

Matsoukas et al. 2023, figure 4. CNNs: Grad-CAM (Selvaraju et al. 2017) on the last feature map. ViTs: the
CLS attention of the last block, patches with the top 50 % of its mass (Caron et al. 2021); rollout (Abnar and
Zuidema 2020); or Grad-CAM. Maps are scored against the lesion where there are masks, else by deletion and
insertion (Petsiuk et al. 2018), beside a random map and a Gaussian: one that beats neither explains nothing.
"""
import time
from dataclasses import replace
from pathlib import Path

import common  # before PyTorch, whose threads it tells how to wait
from common import fail, say

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

GAUSSIAN = 0.25  # standard deviation of the centred Gaussian, as a share of the side
STEPS = 20  # of the deletion and insertion curves
KINDS = ("map", "gaussian", "random")
GAINS = ("gain_over_gaussian", "gain_over_random")


def arguments():
    """The command line."""
    parser, _ = common.make_parser(__doc__)
    group = parser.add_argument_group("saliency")
    group.add_argument("--runs", nargs="+", required=True, metavar="RUN", help="of finetune.py, a row each")
    group.add_argument("--files", nargs="+", metavar="IMAGE", help="explain these, not a dataset's")
    group.add_argument("--images", type=int, help="test images to draw and save (default 8)")
    group.add_argument("--score-images", type=int, help="to score (default 200; 32 without masks)")
    group.add_argument("--method", default="attention", choices=["attention", "rollout", "gradcam"],
                       help="for ViTs (default, paper: attention); CNNs get Grad-CAM")
    group.add_argument("--mass", type=float, default=0.5, help="of attention to keep (default, paper: 0.5)")
    group.add_argument("--head", type=int, help="one attention head, from 0 (default, paper: mean of all)")
    group.add_argument("--target", help="class to explain (default: the predicted one)")
    group.add_argument("--batch-size", type=int, default=16, help="images at a time (default 16)")
    args = common.parse(parser, "saliency")
    if min(args.images or 1, args.score_images or 1) < 1 or not 0 < args.mass <= 1:
        fail("expected --images and --score-images of at least 1, and 0 < --mass <= 1")
    if args.init != "random" or args.compile:
        fail("--init and --compile have no place here: give the trained models as --runs")
    return args


# ---------------------------------------------------------------- maps --------------------------------------

def probabilities(logits, task):
    """(B, C) float32: softmax over classes, or a sigmoid a label."""
    return logits.float().softmax(1) if task == "classes" else logits.float().sigmoid()


def grad_cam(model, images, targets):
    """Grad-CAM (B, h, w) float32 and the logits (B, C) for targets (B,), or None for the predicted classes:
    relu(sum_k a_k A_k), a_k the mean over places of d score / d A_k (Selvaraju et al. 2017, eq. 1, 2). A: the
    last feature map; in ViTs the patch tokens entering the last attention, after which only CLS is read."""
    last = getattr(model, "blocks", [None])[-1]
    kept = []
    if hasattr(last, "norm1"):
        hook = last.norm1.register_forward_hook(lambda module, inputs, output: kept.append(output))
        logits = model(images)
        hook.remove()
    else:
        kept.append(model.forward_features(images))
        logits = model.forward_head(kept[0])
    targets = logits.argmax(1) if targets is None else targets
    score = logits.float().gather(1, targets[:, None]).sum()
    features, gradient = (common.as_map(model, x) for x in (*kept, *torch.autograd.grad(score, kept)))
    return (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu().detach().float(), logits.detach()


def cls_attention(attention, grid, head=None):
    """(B, h, w): what CLS, the first token, pays to each patch; mean of the heads or one. attention: (B, H,
    T, T), where the h x w patches come last."""
    row = attention[:, :, 0, attention.shape[3] - grid[0] * grid[1]:].float()
    return (row.mean(1) if head is None else row[:, head]).unflatten(1, grid)


def rollout(blocks, grid):
    """(B, h, w): attention traced from CLS back through blocks, (B, H, T, T) each: the product of their means
    over heads, half and half with the identity for the residual (Abnar and Zuidema 2020, eq. 1)."""
    eye = joint = torch.eye(blocks[0].shape[3], device=blocks[0].device)
    for attention in blocks:
        joint = (attention.float().mean(1) + eye) / 2 @ joint
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
        maps, logits = grad_cam(model, images, targets)
    else:
        blocks, grid = read(images), model.patch_embed.grid_size
        maps = cls_attention(blocks[-1], grid, args.head) if meta["method"] == "attention" else rollout(blocks, grid)
        with torch.inference_mode():
            logits = model(images)
    chances = probabilities(logits, meta["task"])
    return maps, chances.cpu().numpy(), chances.argmax(1) if targets is None else targets


def enlarge(maps, size, smooth):
    """(B, h, w) -> (B, *size): bilinear for feature maps; attention stays in its patches."""
    return F.interpolate(maps[:, None], size, mode="bilinear" if smooth else "nearest-exact")[:, 0]


# ---------------------------------------------------------------- scores ------------------------------------

def localisation(full, kept, mask):
    """How well a map finds a lesion, all (H, W): energy (share of `kept` inside; Wang et al. 2020), pointing
    (is the peak of `full` inside? Zhang et al. 2018), iou (of the mask and as many top pixels of `full`).
    Ties count in proportion, so that a flat map scores as chance does. NaN where the mask has no lesion."""
    area, total = mask.sum(), kept.sum(dtype=np.float64)
    if not area:
        return dict.fromkeys(("energy", "pointing", "iou"), np.nan)
    level = np.partition(full, -area, axis=None)[-area]
    above, tied = full > level, full == level
    inside = (above & mask).sum() + (area - above.sum()) / tied.sum() * (tied & mask).sum()
    return {"energy": float(kept[mask].sum(dtype=np.float64) / total if total > 0 else mask.mean()),
            "pointing": float(mask[full == full.max()].mean()), "iou": float(inside / (2 * area - inside))}


@torch.inference_mode()
def curves(model, images, maps, targets, task, run):
    """Areas under each image's deletion and insertion curves (Petsiuk et al. 2018): the target's probability
    as the pixels that a map (B, H, W) ranks highest turn to 0, the mean, or appear on a blurred image."""
    side = images.shape[-1]
    blurred = F.interpolate(F.adaptive_avg_pool2d(images, max(1, side // 16)), side, mode="bilinear")
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(1).view(-1, 1, side, side)
    points = {"deletion": [], "insertion": []}
    for step in range(STEPS + 1):
        chosen = rank < round(step / STEPS * side * side)
        for name, first, then in (("deletion", images, 0 * images), ("insertion", blurred, images)):
            with run.autocast():
                logits = model(torch.where(chosen, then, first))
            points[name].append(probabilities(logits, task).gather(1, targets[:, None])[:, 0])
    deletion = torch.trapezoid(torch.stack(points["deletion"]), dim=0) / STEPS
    insertion = torch.trapezoid(torch.stack(points["insertion"]), dim=0) / STEPS
    return [{"deletion": a, "insertion": b} for a, b in zip(deletion.tolist(), insertion.tolist())]


def summarise(scores, groups, seed):
    """scores {kind: [{name: number or NaN} an image]} -> {kind: {name: mean and 95 % interval}}, with gain_over_KIND
    for the paired differences (of deletion, the drop), which "beats" if it lies above 0."""
    result = {kind: {} for kind in (*KINDS, *GAINS)}
    for name in scores["map"][0]:
        values = {kind: np.array([image[name] for image in scores[kind]]) for kind in KINDS}
        for kind in KINDS:
            result[kind][name] = mean_with_interval(values[kind], groups, seed)
        for kind in KINDS[1:]:
            gain = values["map"] - values[kind]
            cell = mean_with_interval(-gain if name == "deletion" else gain, groups, seed)
            cell["beats"] = bool(cell["interval"] and cell["interval"][0] > 0)
            result[f"gain_over_{kind}"][name] = cell
    return result


def mean_with_interval(values, groups, seed):
    """{"mean", "n", "interval"}: of values (n,), NaN (of images without a lesion) left out and n without them, with the
    95 % interval over images or groups."""
    def mean(rows):
        return None if np.isnan(values[rows]).all() else float(np.nanmean(values[rows]))
    return {"mean": mean(slice(None)), "n": int((~np.isnan(values)).sum()),
            "interval": common.bootstrap_interval(mean, len(values), groups, seed)}


def lesion(mask, ignore):
    """Where a mask holds neither background nor the value `ignore` (or None): bool, shaped as it."""
    return (mask > 0) & (mask != (0 if ignore is None else ignore))


def view_mask(mask, size, ignore=None):
    """A lesion as a model sees it: the centre of a mask (S, S) uint8 at size x size, nearest pixel, bool. What is
    not background, nor `ignore`, is lesion."""
    corner, length = common.centre_box(len(mask))
    at = (corner + (np.arange(size) + 0.5) * length / size).astype(int).clip(max=len(mask) - 1)
    return lesion(mask[np.ix_(at, at)], ignore)


# ---------------------------------------------------------------- models and images -------------------------

def open_model(name, taken, args):
    """(model, attention reader or None, meta) of one of --runs; meta also gets run, method and a name that is not taken."""
    path = Path(name) / "model.pt" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        fail(f"--runs {name}: no model.pt there; give the folder of a run that finetune.py has trained")
    model, meta = common.load_trained(path)
    read = common.attention_reader(model)
    label = own = path.resolve().parent.name
    number = 0
    while label in taken:
        number += 1
        label = f"{own}-{number}"
    method = args.method if read else "gradcam"
    meta |= {"run": name, "name": label, "method": method, "mass": args.mass if method == "attention" else 1}
    if args.target is not None and args.target not in meta["classes"]:
        fail(f"--target {args.target}: {name} knows {common.some(meta['classes'], 30)}")
    blank = torch.zeros(1, 3, meta["image_size"], meta["image_size"])
    if method == "gradcam":  # models without a map, or with other kinds of attention, are refused now, not half-way
        height, width = grad_cam(model, blank, None)[0].shape[1:]
        if min(height, width) < 4 and not hasattr(model, "patch_embed"):  # strides pad above and left alone
            say(f"note: Grad-CAM of {label} has only {height} x {width} places at {meta['image_size']} pixels, and padding "
                "alone makes one corner stand out; train at 224 pixels for 7 x 7")
    else:
        last = read(blank)[-1]
        if getattr(model, "cls_token", None) is None:
            fail(f"--runs {name}: {meta['arch']} has no CLS token to ask; use --method gradcam")
        if args.head is not None and not 0 <= args.head < last.shape[1]:
            fail(f"--head {args.head}: {meta['arch']} has heads 0 to {last.shape[1] - 1}")
    return model, read, meta


def look(model, read, meta, dataset, rows, drawn, args, run):
    """Explain and score rows of a dataset with one model: scores {kind: [{name: number} an image]}; pictures {row: (map
    (S, S) of the view, target, probabilities (C,))} for the rows in `drawn`; probabilities (N, C); number of blank maps."""
    generator = torch.Generator().manual_seed(args.seed)
    size, smooth = meta["image_size"], meta["method"] == "gradcam"
    line = torch.exp(-(torch.linspace(-0.5, 0.5, size) / GAUSSIAN) ** 2 / 2)
    scores = {kind: [] for kind in KINDS}
    pictures, probabilities_of, blank = {}, [], 0
    batches = common.shards(rows, run, args.batch_size)
    loader = common.load_batches(dataset.images, batches, run.device)
    for batch, pixels in tqdm(zip(batches, loader), meta["name"], len(batches), leave=False):
        images = common.eval_view(pixels, size, meta["mean"], meta["std"])
        maps, chances, targets = explain(model, read, images, meta, args)
        probabilities_of.append(chances)
        blank += int((maps.amax((1, 2)) <= 0).sum())
        coarse = {"map": maps.cpu(), "random": torch.rand(maps.shape, generator=generator)}
        full = {kind: enlarge(values, (size, size), smooth) for kind, values in coarse.items()}
        full["gaussian"] = coarse["gaussian"] = torch.outer(line, line).expand(len(batch), -1, -1)
        kept = {kind: enlarge(keep_mass(values, meta["mass"]), (size, size), smooth) for kind, values in coarse.items()}
        for i, row in enumerate(batch):
            if row in drawn:
                pictures[row] = kept["map"][i], int(targets[i]), chances[i]
        for kind in KINDS:
            if dataset.masks is None:
                scores[kind] += curves(model, images, full[kind].to(run.device), targets, meta["task"], run)
                continue
            for i, row in enumerate(batch):
                mask = view_mask(dataset.masks[row], size, dataset.ignore)
                scores[kind].append(localisation(full[kind][i].numpy(), kept[kind][i].numpy(), mask))
    return scores, pictures, np.concatenate(probabilities_of), blank


# ---------------------------------------------------------------- pictures ----------------------------------

def place_map(view_map, side, height, width, fit):
    """A map (S, S) of the model's view put into the whole image, (height, width) float32, 0 where the model did not
    look; and where it looked, (height, width) bool. side, fit: of the prepared square whose centre is the view."""
    corner, length = common.centre_box(side)
    square = torch.zeros(side, side)
    seen = torch.zeros(side, side)
    view = slice(corner, corner + length)
    square[view, view] = enlarge(view_map[None], (length, length), True)[0]
    seen[view, view] = 1
    whole = common.from_square(square.numpy(), height, width, fit)
    return whole, common.from_square(seen.numpy(), height, width, fit, Image.Resampling.NEAREST) > 0


def overlay(pixels, heat, view):
    """Paint a map (H, W) over an image (H, W, 3) uint8, red to yellow; dim what lies outside `view` (H, W) bool."""
    heat = heat[..., None] / max(heat.max(), 1e-12)
    colour = np.concatenate([255 + 0 * heat, 255 * np.clip(2 * heat - 0.8, 0, 1), 30 * heat], 2)
    light, alpha = np.full_like(heat, 0.45), 0.75 * heat
    light[view] = 1
    return (pixels * light * (1 - alpha) + colour * alpha).astype(np.uint8)


def draw_originals(dataset, rows):
    """First row of the grid: (images, captions, outlines): the images with their classes (or files) as captions, and
    the outlines of their lesions."""
    images, captions, outlines = [], [], []
    for row in rows:
        images.append(common.in_proportion(dataset.images[row], dataset.sizes[row], dataset.fit, 320))
        outlines.append([])
        if dataset.masks is not None:
            mask = lesion(dataset.masks[row], dataset.ignore)
            outlines[-1].append(common.outline_of(mask, dataset.sizes[row], dataset.fit, "#00ffff"))
        if dataset.labels is None:
            captions.append(Path(dataset.paths[row]).name[-26:])
        else:
            label = dataset.labels[row]
            names = [label] if dataset.task == "classes" else np.flatnonzero(label > 0.5)
            captions.append(", ".join(dataset.classes[c] for c in names)[:26])
    return images, captions, outlines


def draw_run(meta, dataset, pictures):
    """A run's row: (overlays, captions, no outlines) of pictures {row: (map, target, probabilities)}."""
    images, captions = [], []
    for row, (view_map, _, chances) in pictures.items():
        pixels = common.in_proportion(dataset.images[row], dataset.sizes[row], dataset.fit, 320)
        if pixels.ndim == 2:
            pixels = pixels[..., None].repeat(3, 2)
        images.append(overlay(pixels, *place_map(view_map, dataset.side, *pixels.shape[:2], dataset.fit)))
        text = f"{meta['classes'][chances.argmax()][:26]}\n{chances.max():.0%}"
        right = correct(dataset, [row], chances[None], meta["classes"])
        if right is not None:
            text = (f"{text} right", "#00702e") if right[0] else (f"{text} WRONG", "#c00000")
        captions.append(text)
    return images, captions, [[]] * len(images)


def save_maps(path, meta, dataset, pictures):
    """maps-RUN.npz: map_0, map_1, ... float32 at the resolution of the files; paths, probabilities and the classes
    explained."""
    _, targets, chances = zip(*pictures.values())
    arrays = {"paths": np.array([dataset.paths[row] for row in pictures]), "probabilities": np.stack(chances),
              "explained": np.array([meta["classes"][target] for target in targets])}
    for number, (row, (view_map, _, _)) in enumerate(pictures.items()):
        height, width = map(int, dataset.sizes[row])
        arrays[f"map_{number}"], _ = place_map(view_map, dataset.side, height, width, dataset.fit)
    common.write_atomic(path, lambda part: np.savez_compressed(part, **arrays))


# ---------------------------------------------------------------- the run -----------------------------------

def correct(dataset, rows, chances, classes):
    """Whether the top class of chances (n, C) is the image's, or one of its labels: (n,) bool, None where the dataset's
    classes are not the model's."""
    if dataset.labels is None or dataset.classes != classes:
        return None
    labels = dataset.labels[rows]
    truth = labels if labels.ndim > 1 else np.eye(len(classes))[labels]
    return truth[np.arange(len(truth)), chances.argmax(1)] > 0.5


def finish(folder, dataset, count, runs, args, run, seconds):
    """Print the scores and write metrics.json, last."""
    names = list(runs[0]["map"])
    lines, parts = [], []
    for one in runs:
        for kind in (*KINDS, *GAINS):
            line = [f"{one['name']} {one['method'] if kind == 'map' else kind.replace('_', ' ')}"]
            for cell in one[kind].values():
                low, high = cell["interval"] or (None, None)
                line.append("undefined" if low is None else f"{cell['mean']:.3f} ({low:.3f} to {high:.3f})")
            lines.append(line)
        beats = "beats" if one["gain_over_gaussian"][names[0]]["beats"] else "does not beat"
        parts.append(f"{one['name']} {names[0]} {common.show(one['map'][names[0]]['mean'])}, {beats} a centred Gaussian")
    common.print_table(["", *names], lines)
    say(f"{count} images scored")
    common.write_metrics(
        folder, dataset, run, args, arch=", ".join(one["arch"] for one in runs),
        init=", ".join(one["init"] for one in runs), pretrained_on=[one["pretrained_on"] for one in runs],
        metric=names[0], image_size=[one["image_size"] for one in runs], runs=runs, val={},
        test={one["name"]: one["map"][names[0]] for one in runs},
        counts={**dataset.counts, "scored": count}, epochs=0, seconds=seconds,
        images_per_second=count * len(runs) / seconds, summary="; ".join(parts))


def explain_runs(models, dataset, args, run):
    """Explain the same images with every run; draw, save and score the maps."""
    begin = time.time()
    for _, _, meta in models:
        common.check_fold(f"--runs {meta['run']}", meta.get("seen", []), dataset, args.fold)
    tests = dataset.rows["test"]
    if args.images and args.images > len(tests):
        fail(f"--images {args.images}: there are only {len(tests)} test images")
    drawn = common.limit_images(dataset, "test", args.images or 8)
    count = max(args.score_images or (32 if dataset.masks is None else 200), len(drawn))
    rows = common.limit_images(dataset, "test", count)  # has all of drawn
    names = "-".join(Path(name).name for name in args.runs)
    args.output = args.output or f"runs/saliency-{dataset.name}-{names}"
    old_maps = [path.name for path in Path(args.output).glob("maps-*.npz")]
    folder = common.open_run(args, run, dataset, ["saliency.png", *old_maps])
    grid = [draw_originals(dataset, drawn)]
    runs = []
    for model, read, meta in models:
        common.to_device(model, run)
        scores, pictures, chances, blank = look(model, read, meta, dataset, rows, {*drawn}, args, run)
        save_maps(folder / f"maps-{meta['name']}.npz", meta, dataset, pictures)
        grid.append(draw_run(meta, dataset, pictures))
        right = correct(dataset, rows, chances, meta["classes"])
        facts = {key: meta.get(key) for key in ("run", "name", "arch", "init", "pretrained_on", "method", "image_size")}
        share = None if right is None else float(right.mean())
        runs.append({**facts, "images": len(rows), "blank_maps": blank, "right": share,
                     **summarise(scores, dataset.groups_of(rows), args.seed)})
    images, captions, outlines = zip(*grid)
    labels = ["image", *(f"{one['arch']}\n{one['init']}\n{one['method']}" for one in runs)]
    looked_for = f" for {args.target}" if args.target else ""
    title = f"{dataset.name}: where the models look{looked_for}, from red (some) to yellow (most)"
    common.draw_grid(folder / "saliency.png", images, captions, labels, title, outlines)
    finish(folder, dataset, len(rows), runs, args, run, time.time() - begin)


def main():
    """Explain a dataset's test images, or --files."""
    args = arguments()
    run = common.start(args)
    if run.world > 1:
        fail("saliency.py works in one process; start it with python, not torchrun")
    timm.layers.set_fused_attn(False)  # before any model is built: fused attention never forms the map
    models = []
    for name in args.runs:
        models.append(open_model(name, [meta["name"] for _, _, meta in models], args))
    if not args.files:
        return explain_runs(models, common.load_dataset(args, ("test",)), args, run)
    first = models[0][2]
    if any((meta["side"], meta["fit"]) != (first["side"], first["fit"]) for _, _, meta in models):
        say(f"note: all runs see --files as the data of {first['name']} were prepared: side {first['side']}, {first['fit']}")
    args.output = args.output or "runs/saliency-files"
    with common.prepare_module().new_images(args.files, Path(args.output), first) as dataset:
        explain_runs(models, replace(dataset, paths=args.files, name="files"), args, run)


if __name__ == "__main__":
    common.launch(main)
