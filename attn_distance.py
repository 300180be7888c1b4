"""How far attention reaches: the mean attention distance of every head and block, in pixels.

    python attn_distance.py --runs random runs/RUN
    python attn_distance.py --runs random imagenet imagenet-dino --arch deit_small --dataset folder --data-dir DIR

Matsoukas et al. 2023, figure 5, after Dosovitskiy et al. 2021, appendix D.7, and Raghu et al. 2021: over 512 test
images, for each query patch the sum over key patches of attention times the Euclidean distance between the two,
averaged over queries. CLS is left out and the rows are renormalised over the patches; both are flags.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
from tqdm import tqdm

import common
from common import fail, say

NAMED = ("random", "imagenet", "imagenet-dino")


def arguments():
    """The command line."""
    parser, _ = common.make_parser(__doc__)
    distance = parser.add_argument_group("attention distance")
    distance.add_argument("--runs", nargs="+", default=[], metavar="RUN",
                          help="run folders or checkpoints, or random, imagenet, imagenet-dino (of --arch); a panel "
                               "each (default: --init)")
    distance.add_argument("--images", type=int, default=512, help="test images (default, paper: 512)")
    distance.add_argument("--include-cls", action="store_true",
                          help="count CLS and register tokens too, as if they stood at the image's centre")
    distance.add_argument("--no-renormalize", action="store_true",
                          help="weigh by attention as it is: what goes to CLS then counts as distance 0")
    distance.add_argument("--batch-size", type=int, default=16, help="images at a time and process (default 16)")
    args = common.parse(parser)
    if args.images < 2:
        fail(f"--images {args.images}: at least 2, for a standard error")
    if args.compile:
        fail("--compile: a compiled model does not give its attention; leave it out")
    args.runs = args.runs or [args.init]
    if len(set(args.runs)) < len(args.runs):
        fail(f"--runs {' '.join(args.runs)}: the same run twice")
    return args


def token_distances(grid, patch, prefix=0):
    """Distances (T, T) float32 in pixels between the centres of grid[0] x grid[1] patches of patch[0] x patch[1]
    pixels; `prefix` tokens come first and stand at the image's centre."""
    y, x = torch.meshgrid(torch.arange(grid[0]) * patch[0], torch.arange(grid[1]) * patch[1], indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], 1).double()
    places = torch.cat([places.mean(0).expand(prefix, 2), places])
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist").float()


def mean_attention_distance(attention, distances, renormalize=True):
    """Mean over queries of sum over keys of attention times distance: (B, H, T, T) of any precision and (T, T) in
    pixels -> (B, H) float32 in pixels (Dosovitskiy et al. 2021, D.7). With renormalize, rows are made to sum to 1."""
    attention = attention.float()
    reach = (attention * distances).sum(3)
    if renormalize:
        reach = reach / attention.sum(3)
    return reach.mean(2)


def measure(model, read, dataset, split, view, args, run):
    """Distances of all heads over a split: {"uniform": pixels, "mean" and "error" (blocks, heads) float64}; error is
    the standard error over images. Memory holds one batch's attention, whatever the number of images."""
    grid, patch = model.patch_embed.grid_size, model.patch_embed.patch_size
    mine = np.arange(run.rank, len(split), run.world)
    batches = [split.rows[mine[i:i + args.batch_size]] for i in range(0, len(mine), args.batch_size)]
    totals, cut = None, {}
    for images, sizes in tqdm(common.load_batches(dataset.store, batches, run.device), "attention", len(batches),
                              leave=False, disable=run.rank > 0):
        with run.autocast():
            maps = read(common.eval_view(images, sizes, view, view.mean, view.std))
        reach = []
        for attention in maps:
            prefix = attention.shape[3] - grid[0] * grid[1]
            keep = prefix if args.include_cls else 0
            if keep not in cut:
                cut[keep] = token_distances(grid, patch, keep).to(run.device)
            patches = attention[:, :, prefix - keep:, prefix - keep:]
            reach.append(mean_attention_distance(patches, cut[keep], not args.no_renormalize))
        reach = torch.stack(reach).double().cpu()  # (blocks, B, heads)
        batch = torch.stack([reach.sum(1), (reach ** 2).sum(1)])
        totals = batch if totals is None else totals + batch
    if run.world > 1:
        if totals is None:
            fail(f"{len(split)} images are fewer than the {run.world} processes; use fewer processes")
        dist.all_reduce(totals)
    mean = totals[0] / len(split)
    variance = (totals[1] / len(split) - mean ** 2).clamp(min=0) * len(split) / (len(split) - 1)
    return {"uniform": cut[max(cut)].double().mean().item(), "mean": mean.numpy(),
            "error": (variance / len(split)).sqrt().numpy()}


def open_model(name, args):
    """(model, its attention reader, view, facts) of one of --runs: view has the image_size and resize, and the mean
    and std (None: the dataset's)."""
    view, meta = argparse.Namespace(**vars(args)), {}
    view.init = name
    if name not in NAMED:
        path = Path(name) / "model.pt" if Path(name).is_dir() else Path(name)
        if not path.is_file():
            fail(f"--runs {name}: no model.pt there; give a run folder, a checkpoint, or one of {', '.join(NAMED)}")
        view.init = str(path)
        meta = common.read_checkpoint(path, args.init_key)[1]
        view.arch = meta.get("arch", args.arch)
        view.image_size = meta.get("image_size", args.image_size)
        view.resize = meta.get("resize") or (round(view.image_size * 8 / 7) if meta else args.resize)
    view.mean, view.std = meta.get("mean"), meta.get("std")
    model, pretrained_on = common.build_model(view, 0)
    read = common.attention_reader(model)
    if read is None:
        fail(f"--runs {name}: {view.arch} has no attention between patches to measure; give a ViT, such as deit_small")
    read(torch.zeros(1, 3, view.image_size, view.image_size))  # refuses other kinds of attention now, not half-way
    label = common.init_name(view.init)
    return model, read, view, {"run": name, "name": label, "arch": view.arch, "init": meta.get("init", label),
                         "pretrained_on": pretrained_on, "image_size": view.image_size,
                         "patch_size": model.patch_embed.patch_size[0]}


def draw(path, results):
    """Figure 5: a panel per run, x block, y distance, a point per head, the uniform attention as a dashed line."""
    top = max(max(result["uniform"], result["mean"].max()) for _, result in results) * 1.05
    panels = []
    for facts, result in results:
        blocks, heads = result["mean"].shape
        panels.append({
            "title": f"{facts['arch']}, {facts['name']}", "xlabel": "block", "ylim": (0, top),
            "ylabel": "mean attention distance (pixels)", "series": [
                {"label": "head", "kind": "points", "x": np.repeat(np.arange(1, blocks + 1), heads).tolist(),
                 "y": result["mean"].flatten().tolist(), "error": result["error"].flatten().tolist()},
                {"label": "uniform attention", "kind": "dashed", "x": [1, blocks], "y": [result["uniform"]] * 2,
                 "colour": 6}]})
    common.draw_plot(path, panels, (480, 440))


def finish(folder, dataset, split, results, args, run, seconds):
    """Write attn_distance.csv, attn_distance.png and, last, metrics.json."""
    rows, runs = [], []
    for facts, result in results:
        points = [{"block": b + 1, "head": h + 1, "distance": float(mean), "standard_error": float(result["error"][b, h])}
                  for b, line in enumerate(result["mean"]) for h, mean in enumerate(line)]
        rows += [[facts["run"], facts["arch"], point["block"], point["head"], f"{point['distance']:.4f}",
                  f"{point['standard_error']:.5f}", f"{result['uniform']:.4f}"] for point in points]
        runs.append({**facts, "uniform": result["uniform"], "first_block": float(result["mean"][0].mean()),
                     "last_block": float(result["mean"][-1].mean()), "mean": float(result["mean"].mean()),
                     "points": points})
    common.write_table(folder / "attn_distance.csv", ["run", "arch", "block", "head", "distance", "standard_error",
                                                      "uniform"], rows)
    draw(folder / "attn_distance.png", results)
    summary = "; ".join(f"{one['name']}: {one['first_block']:.1f} in the first block, {one['last_block']:.1f} in the "
                        f"last, {one['uniform']:.1f} uniform" for one in runs)
    common.write_json(folder / "metrics.json", {
        "stage": "attn_distance", "dataset": dataset.name, "arch": ", ".join(dict.fromkeys(r["arch"] for r in runs)),
        "init": ", ".join(one["name"] for one in runs), "pretrained_on": [one["pretrained_on"] for one in runs],
        "seed": args.seed, "metric": "attention_distance", "unit": "pixels", "runs": runs, "val": {},
        "test": {one["run"]: one["mean"] for one in runs}, "counts": {**dataset.counts, "measured": len(split)},
        "include_cls": args.include_cls, "renormalize": not args.no_renormalize, "epochs": 0, "seconds": seconds,
        "images_per_second": len(split) * len(runs) / seconds, "device": common.device_name(run.device),
        "amp": run.amp, "world_size": run.world, "summary": summary})
    common.print_table(["pixels", "first block", "last block", "all heads", "uniform"], [
        [one["name"], *(f"{one[k]:.1f}" for k in ("first_block", "last_block", "mean", "uniform"))] for one in runs])
    say(f"{len(split)} test images, {len(split) * len(runs) / seconds:.1f} images/s\nwritten: {folder}")


def main():
    """Measure every run over the same test images."""
    args = arguments()
    run = common.start(args)
    timm.layers.set_fused_attn(False)  # before any model is built: fused attention never forms the map
    args.output = args.output or "-".join(["runs/attn_distance", args.dataset, *map(common.init_name, args.runs),
                                           f"s{args.seed}"])
    folder = common.open_run(args, run, "attn_distance")
    models = [open_model(name, args) for name in args.runs]
    datasets = {}
    for _, _, view, _ in models:
        if view.resize not in datasets:
            datasets[view.resize] = common.load_dataset(view, check=False)
    common.write_args(folder, args, run, ["attn_distance.csv", "attn_distance.png"])
    results, begin = [], time.time()
    for model, read, view, facts in models:
        dataset = datasets[view.resize]
        view.mean, view.std = view.mean or dataset.mean, view.std or dataset.std
        split = common.limit_images(dataset.splits["test"], args.images, args.split_seed)
        common.to_device(model, run)
        results.append((facts, measure(model, read, dataset, split, view, args, run)))
    if args.images > len(split):
        say(f"note: there are {len(split)} test images, not {args.images}; all are used")
    if run.rank == 0:
        finish(folder, dataset, split, results, args, run, time.time() - begin)


if __name__ == "__main__":
    common.launch(main)
