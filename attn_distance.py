"""How far attention reaches: the mean attention distance of every head and block, in pixels.

    python attn_distance.py --runs random runs/RUN
    python attn_distance.py --runs random imagenet RUN --arch deit_small --data data/mine

Matsoukas et al. 2023, figure 5, after Dosovitskiy et al. 2021, appendix D.7: over 512 test images, for each
query patch the sum over key patches of attention times the Euclidean distance to them, averaged over queries.
CLS is left out and the rows are renormalised over the patches; both are flags.
"""
import time
from dataclasses import replace
from pathlib import Path

import common  # before PyTorch, whose threads it tells how to wait
from common import fail, say

import numpy as np
import timm
import torch
import torch.distributed as dist
from tqdm import tqdm


def arguments():
    """The command line."""
    parser, _ = common.make_parser(__doc__)
    group = parser.add_argument_group("attention distance")
    group.add_argument("--runs", nargs="+", metavar="RUN",
                       help="run folders or checkpoints; or, of --arch, random, imagenet, imagenet-dino")
    group.add_argument("--images", type=int, default=512, help="test images (default, paper: 512)")
    group.add_argument("--include-cls", action="store_true",
                       help="count CLS and register tokens too, as if they stood at the image's centre")
    group.add_argument("--no-renormalize", action="store_true",
                       help="take attention as it is: what goes to CLS then counts as distance 0")
    group.add_argument("--batch-size", type=int, default=16, help="images at a time and process (default 16)")
    args = common.parse(parser, "attn_distance")
    if args.images < 2:
        fail(f"--images {args.images}: at least 2, for a standard error")
    if args.compile:
        fail("--compile: a compiled model does not give its attention; leave it out")
    args.runs = args.runs or [args.init]
    return args


def token_distances(grid, patch, prefix=0):
    """Distances (T, T) float32 in pixels between the centres of grid[0] x grid[1] patches, each patch[0] x
    patch[1] pixels; `prefix` tokens come first and stand at the image's centre."""
    y, x = torch.meshgrid(torch.arange(grid[0]) * patch[0], torch.arange(grid[1]) * patch[1], indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], 1).double()
    places = torch.cat([places.mean(0).expand(prefix, 2), places])
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist").float()


def mean_attention_distance(attention, distances, renormalize=True):
    """Mean over queries of the sum over keys of attention x distance (Dosovitskiy et al. 2021, D.7): (B, H,
    T, T) of any precision and (T, T) pixels -> (B, H) float32 pixels. renormalize: rows made to sum to 1."""
    attention = attention.float()
    reach = (attention * distances).sum(3)
    if renormalize:
        reach = reach / attention.sum(3)
    return reach.mean(2)


def measure(model, read, dataset, rows, image_size, args, run):
    """Distances of all heads over rows of a dataset: {"uniform": pixels, "mean" and "error": (blocks, heads)}; error is
    the standard error over images. Memory holds one batch's attention, however many images there are."""
    grid, patch = model.patch_embed.grid_size, model.patch_embed.patch_size
    patches = grid[0] * grid[1]
    batches = common.shards(rows, run, args.batch_size)
    loader = common.load_batches(dataset.images, batches, run.device)
    totals = 0
    tables = {}  # of distances, by the number of prefix tokens, which differs between the blocks of some models
    for images in tqdm(loader, "attention", len(batches), leave=False, disable=run.rank > 0):
        view = common.eval_view(images, image_size, dataset.mean, dataset.std)
        with run.autocast():
            blocks = read(view)
        reach = []
        for attention in blocks:
            prefix = attention.shape[3] - patches
            kept = prefix if args.include_cls else 0
            if kept not in tables:
                tables[kept] = token_distances(grid, patch, kept).to(run.device)
            attention = attention[:, :, prefix - kept:, prefix - kept:]
            reach.append(mean_attention_distance(attention, tables[kept], not args.no_renormalize))
        reach = torch.stack(reach).cpu().double()  # (blocks, B, heads)
        totals = totals + torch.stack([reach.sum(1), (reach ** 2).sum(1)])
    if run.world > 1:
        dist.all_reduce(totals)
    mean, square = totals / len(rows)
    error = ((square - mean ** 2).clamp(min=0) / (len(rows) - 1)).sqrt()
    uniform = tables[max(tables)].cpu().double().mean().item()
    return {"uniform": uniform, "mean": mean.numpy(), "error": error.numpy()}


def open_model(name, dataset, args):
    """(model, attention reader, facts, mean and std or {}) of one of --runs, which has an arch and a size of its own
    where it is a checkpoint."""
    model, facts, seen_as = common.open_backbone(name, dataset, args)
    read = common.attention_reader(model)
    if read is None:
        fail(f"--runs {name}: {facts['arch']} has no attention between patches; give a ViT, such as deit_small")
    read(torch.zeros(1, 3, facts["image_size"], facts["image_size"]))  # other attention is refused now, not half-way
    return model, read, {**facts, "patch_size": common.patch_size(model)}, seen_as


def draw(path, name, results):
    """Figure 5 of the dataset `name`: a panel per run; x block, y distance, a point per head with its 95 % interval over
    images, uniform attention as dashes. All panels have one y axis, which begins below the points and not at 0: heads
    of a ViT that has trained little differ by a few percent."""
    figure, axes = common.new_panels(path, len(results), 3.2, 2.6)
    if figure is None:
        return
    ends = []
    for _, result in results:
        interval = 1.96 * result["error"]
        ends += [result["uniform"], *(result["mean"] - interval).flat, *(result["mean"] + interval).flat]
    middle = (min(ends) + max(ends)) / 2
    reach = max(max(ends) - min(ends), 0.1 * middle)
    limits = (middle - 0.6 * reach, middle + 0.8 * reach)  # above: room for the legend
    for axis, (facts, result) in zip(axes, results):
        blocks, heads = result["mean"].shape
        place = np.repeat(np.arange(1, blocks + 1), heads) + np.tile(np.linspace(-0.15, 0.15, heads), blocks)
        axis.errorbar(place, result["mean"].flatten(), 1.96 * result["error"].flatten(), fmt="o", markersize=3,
                      elinewidth=1, alpha=0.8, label="head")
        axis.axhline(result["uniform"], color="black", linestyle="--", linewidth=1, label="uniform attention")
        axis.set(title=f"{name}: {facts['arch']}, {facts['init']}", xlabel="block", ylabel="attention distance (pixels)",
                 xlim=(0.5, blocks + 0.5), ylim=limits)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="upper left", ncols=2, fontsize=7, handlelength=1.2)
    common.save_figure(figure, path)


def finish(folder, dataset, measured, results, args, run, seconds):
    """Write attn_distance.csv, attn_distance.png and, last, metrics.json."""
    lines, runs = [], []
    for facts, result in results:
        mean, error = result["mean"], result["error"]
        points = [{"block": b + 1, "head": h + 1, "distance": float(mean[b, h]), "standard_error": float(error[b, h])}
                  for b, h in np.ndindex(mean.shape)]
        lines += [[facts["run"], facts["arch"], *point.values(), result["uniform"]] for point in points]
        runs.append({**facts, "images": measured, "uniform": result["uniform"], "mean": float(mean.mean()),
                     "first_block": float(mean[0].mean()), "last_block": float(mean[-1].mean()), "points": points})
    head = ["run", "arch", "block", "head", "distance", "standard_error", "uniform"]
    common.write_table(folder / "attn_distance.csv", head, lines)
    draw(folder / "attn_distance.png", dataset.name, results)
    names = ["first_block", "last_block", "mean", "uniform"]
    common.print_table(["pixels", *names], [[row["name"], *(f"{row[name]:.1f}" for name in names)] for row in runs])
    speed = measured * len(runs) / seconds
    say(f"{measured} test images, {speed:.1f} images/s")
    common.write_metrics(
        folder, dataset, run, args, arch=", ".join(row["arch"] for row in runs),
        init=", ".join(row["init"] for row in runs), pretrained_on=[row["pretrained_on"] for row in runs],
        metric="attention_distance", unit="pixels", image_size=[row["image_size"] for row in runs], runs=runs,
        val={}, test={row["run"]: row["mean"] for row in runs},
        include_cls=args.include_cls, renormalize=not args.no_renormalize,
        counts={**dataset.counts, "measured": measured}, epochs=0, seconds=seconds, images_per_second=speed,
        summary="; ".join(f"{row['name']} {row['first_block']:.1f} pixels in the first block, "
                          f"{row['last_block']:.1f} in the last" for row in runs))


def main():
    """Measure every run over the same test images."""
    args = arguments()
    run = common.start(args)
    timm.layers.set_fused_attn(False)  # before any model is built: fused attention never forms the map
    dataset = common.load_dataset(args, ("test",))
    models = [open_model(name, dataset, args) for name in args.runs]
    rows = common.limit_images(dataset, "test", args.images)
    if len(rows) < max(2, run.world):
        fail(f"{len(rows)} test images are too few, for a standard error or for {run.world} processes")
    if len(rows) < args.images:
        say(f"note: there are {len(rows)} test images, not {args.images}; all are used")
    names = "-".join(Path(name).name for name in args.runs)
    args.output = args.output or f"runs/attn_distance-{dataset.name}-{names}"
    folder = common.open_run(args, run, dataset, ["attn_distance.csv", "attn_distance.png"])
    results = []
    begin = time.time()
    for model, read, facts, seen_as in models:
        common.to_device(model, run)
        own = replace(dataset, **seen_as)
        results.append((facts, measure(model, read, own, rows, facts["image_size"], args, run)))
    if run.rank == 0:
        finish(folder, dataset, len(rows), results, args, run, time.time() - begin)


if __name__ == "__main__":
    common.launch(main)
