"""What each layer holds: a k-NN vote from every layer, how alike the layers of two models are, how far weights moved.

    python layers.py --runs runs/RUN_DEIT runs/RUN_RESNET
    python layers.py --pair runs/dino/model.pt runs/RUN --pair random runs/OTHER --data data/mine

Matsoukas et al. 2022 (arXiv:2203.01825) ask which layers of a pretrained model are reused. Of every model: the vote
of knn_eval.py on each block of a ViT (CLS, mean of patches, both joined), each block of a ResNet, each stage of a ConvNeXt
(mean over places). Of each --pair: linear CKA (Kornblith et al. 2019, eq. 5) of all layers of the one with all of the
other, on tokens or maps unpooled; and the L2 distance that a layer's weights moved, over their norm at the start.

The model's final norm is applied to the tokens of every block, as in DINO's get_intermediate_layers: the last block then
has the score of knn_eval.py (of a distilled DeiT that of --pool cls, since its own feature is the mean of two tokens).
k-NN keeps the pooled features of all layers, 60 KB an image of a ResNet-50: --limit takes fewer training images.
"""
import math
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import common  # before PyTorch, whose threads it tells how to wait
from common import NAMED_INITS, fail

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

K, TEMPERATURE = 200, 0.1  # of the k-NN vote, as knn_eval.py has them
LAYERS = r"blocks\.\d+|layer\d\.\d+|stages\.\d+"  # in timm's ViTs, ResNets and ConvNeXts


def arguments():
    """The command line."""
    parser, _ = common.make_parser(__doc__)
    group = parser.add_argument_group("layers")
    group.add_argument("--runs", nargs="+", metavar="RUN", default=[],
                       help="run folders or checkpoints; or, of --arch, " + ", ".join(NAMED_INITS))
    group.add_argument("--pair", nargs=2, metavar=("START", "END"), action="append", default=[],
                       help="two models to compare, as in --runs, e.g. before and after fine-tuning; again for more. What "
                            "one does not say itself is as in the other, the seed of random weights too")
    group.add_argument("--images", type=int, default=1024, help="test images for CKA (default 1024)")
    group.add_argument("--batch-size", type=int, default=128,
                       help="images at a time and process, and in a minibatch of CKA (default 128)")
    args = common.parse(parser, "layers")
    if args.compile or args.init_stats:
        fail("--compile and --init-stats have no place here: models are looked at as they are")
    args.runs = args.runs or ([] if args.pair else [args.init])
    return args


@torch.inference_mode()
def read_layers(model, layers, images, read):
    """[read(output)] of each of layers {name: module}, in order, for images (B, 3, H, W). An output is tokens
    (B, T, D), after the final norm, or a map (B, C, h, w). Only what `read` returns is kept."""
    results = []

    def keep(module, inputs, output):
        results.append(read(model.norm(output) if output.ndim == 3 else output))
    hooks = [layer.register_forward_hook(keep) for layer in layers.values()]
    model.forward_features(images)
    for hook in hooks:
        hook.remove()
    return results


def layers_of(model, name, facts):
    """{name: module} of a model's layers, from the image on. An error where the features of the whole are not those of the
    last layer, as where other layers follow, or where they are neither tokens nor a map."""
    layers = {name: module for name, module in model.named_modules() if re.fullmatch(LAYERS, name)}
    image = torch.rand(1, 3, facts["image_size"], facts["image_size"])
    try:
        last = read_layers(model, layers, image, torch.Tensor.clone)[-1]
        with torch.inference_mode():
            whole = torch.allclose(last, model.forward_features(image), rtol=1e-3, atol=1e-5)
    except (AttributeError, IndexError, RuntimeError, TypeError):  # no layers, no norm, or no tensors between them
        whole = False
    if not whole:
        fail(f"--runs {name}: {facts['arch']} cannot be taken apart, its features are not those of the last of its blocks; "
             "give a ViT, a ResNet or a ConvNeXt")
    return layers


def open_models(args, dataset):
    """[(model, layers, facts, {"mean", "std"})] of --runs and --pair, each once; and the [start, end] of each pair."""
    models, pairs = {}, []
    for names in [[name] for name in args.runs] + args.pair:
        opened, known = {}, {"mean": dataset.mean, "std": dataset.std}
        for name in sorted(reversed(names), key=NAMED_INITS.__contains__):  # first what knows its architecture: files, the end
            model, facts, seen_as = common.open_backbone(name, dataset, args, known)
            known = {**facts, **seen_as}
            if name in NAMED_INITS:
                facts["name"] = f"{name} {facts['arch']}"
            found = (model, layers_of(model, name, facts), facts, seen_as)
            opened[name] = models.setdefault(repr((facts, seen_as)), found)
        if len(names) == 2:
            pairs.append([opened[name] for name in names])
    return [*models.values()], pairs


def pooled(output, model):
    """{feature: (B, D)} of a layer's output: "pooled" of a map, "mean" of patch tokens and, where there is one, "cls" and
    "both": the two joined, each of length 1."""
    if output.ndim == 4:
        return {"pooled": output.mean((2, 3))}
    mean = output[:, getattr(model, "num_prefix_tokens", 0):].mean(1)
    if getattr(model, "cls_token", None) is None:
        return {"mean": mean}
    cls = output[:, 0]
    return {"cls": cls, "mean": mean, "both": torch.cat([F.normalize(cls), F.normalize(mean)], 1)}


def score_layers(model, layers, dataset, image_size, args, run):
    """The k-NN score of every layer and feature, from one pass over the images: ([{"layer", "depth" in (0, 1], "feature",
    "val", "test"}], [class shares (n, C) of the test images for each])."""
    read = partial(read_layers, model, layers, read=partial(pooled, model=model))

    def wide(images):
        features = []
        for kinds in read(images):
            features += kinds.values()
        return torch.cat(features, 1)

    parts = {}
    for split, rows in dataset.rows.items():
        parts[split] = common.outputs(wide, dataset, rows, image_size, run, args.batch_size)
    scores, shares = [], []
    if run.rank > 0:
        return scores, shares
    k = min(K, dataset.counts["train"])
    begin = 0  # of a feature among the columns of parts
    example = read(torch.zeros(1, 3, image_size, image_size, device=run.device))
    for i, (layer, kinds) in enumerate(zip(layers, example)):
        for kind, feature in kinds.items():
            end = begin + feature.shape[1]
            features = {split: values[:, begin:end] for split, values in parts.items()}
            voted = common.vote_on(features, dataset, [k], TEMPERATURE, run.device)
            score = {"layer": layer, "depth": (i + 1) / len(layers), "feature": kind}
            for split in ("val", "test"):
                labels = dataset.labels[dataset.rows[split]]
                score[split] = common.metric(dataset.metric, dataset.task, labels, voted[split][k])
            scores.append(score)
            shares.append(voted["test"][k])
            begin = end
    return scores, shares


def best_layer(scores, shares, dataset):
    """{"best": the layer and feature that are best on validation, "last": the last layer, "gain": the best less the last on
    test, "interval": of the gain, 95 % over test images}."""
    rows = dataset.rows["test"]
    labels = dataset.labels[rows]
    best = max(range(len(scores)), key=lambda i: -math.inf if scores[i]["val"] is None else scores[i]["val"])
    last = next(i for i, score in enumerate(scores) if score["depth"] == 1)  # its first feature: CLS, where there is one

    def gain(at):
        first = common.metric(dataset.metric, dataset.task, labels[at], shares[best][at])
        second = common.metric(dataset.metric, dataset.task, labels[at], shares[last][at])
        return None if None in (first, second) else first - second
    interval = common.bootstrap_interval(gain, len(rows), dataset.groups_of(rows))
    return {"best": scores[best], "last": scores[last], "gain": gain(np.arange(len(rows))), "interval": interval}


def centred_gram(output):
    """The U-centred Gram matrix (B, B) float64, on the CPU, of outputs (B, ...): for two of them, sum(a * b) / (B (B - 3)) is
    the unbiased HSIC of linear kernels (Song et al. 2012, eq. 5; in this form Szekely and Rizzo 2014, section 3)."""
    features = output.flatten(1).float()
    features = features - features.mean(0)  # changes nothing but the rounding
    with torch.autocast(features.device.type, enabled=False):
        gram = (features @ features.T).cpu().double()
    gram.fill_diagonal_(0)
    means = gram.sum(1) / (len(gram) - 2)
    gram = gram - means[:, None] - means + means.sum() / (len(gram) - 1)
    return gram.fill_diagonal_(0)


def hsic(grams):
    """Unbiased HSIC (L, L) of every layer with every other on one minibatch, of L centred_gram (B, B)."""
    flat = torch.stack(grams).flatten(1)
    return flat @ flat.T / (len(grams[0]) * (len(grams[0]) - 3))


def cka_of(total):
    """Linear CKA (L, L) of the sum of hsic over minibatches (Nguyen et al. 2021, eq. 3); NaN for a constant layer."""
    own = total.diagonal()
    return total / (own[:, None] * own).sqrt()


def cka_map(start, end, dataset, args, run):
    """Linear CKA (L, M) float64 of the layers of two models on test images. Shuffled, in minibatches of --batch-size or a
    little more, the same on any number of processes; only one sum is kept, however many images there are."""
    rows = common.limit_images(dataset, "test", args.images)
    order = np.random.default_rng(args.seed).permutation(rows)  # a minibatch of one class would miss what tells classes apart
    batches = np.array_split(order, max(1, len(rows) // args.batch_size))[run.rank::run.world]
    count = len(start[1]) + len(end[1])
    total = torch.zeros(count, count, dtype=torch.float64)
    loader = common.load_batches(dataset.images, batches, run.device)
    for images in tqdm(loader, "CKA", len(batches), leave=False, disable=run.rank > 0):
        grams = []
        for model, layers, facts, seen_as in (start, end):
            view = common.eval_view(images, facts["image_size"], **seen_as)
            with run.autocast():
                grams += read_layers(model, layers, view, centred_gram)
        total += hsic(grams)
    if run.world > 1:
        dist.all_reduce(total)
    return cka_of(total)[:len(start[1]), len(start[1]):]


@torch.no_grad()
def distances(start, end):
    """[L2 distance of the weight matrices of each layer of two models {name: module}, over their norm in the first], None
    where they are not of one shape. Norms and biases, of another scale, are left out."""
    if [*start] != [*end]:
        return None
    moved = []
    for layer in start:
        before = [p for p in start[layer].parameters() if p.ndim > 1]
        after = [p for p in end[layer].parameters() if p.ndim > 1]
        if [p.shape for p in before] != [p.shape for p in after]:
            return None
        change, norm = 0, 0
        for a, b in zip(before, after):
            change += (b - a).square().sum()
            norm += a.square().sum()
        moved.append((change / norm).sqrt().item())
    return moved


def draw(path, dataset, runs, pairs):
    """layers.png: over relative depth, the k-NN scores of all layers and, of pairs with the same layers, how alike their
    outputs are and how far their weights moved; then the CKA of all layers of each pair."""
    titles = {"cls": "CLS of ViTs, pooled maps", "mean": "mean of patches, pooled maps", "pooled": "pooled maps"}
    kinds = {score["feature"] for one in runs for score in one["layers"]}
    panels = []  # (title, unit, [(label, depths, values)])
    for feature in sorted(kinds & {"cls", "mean"}) or ["pooled"]:
        lines = []
        for one in runs:
            points = [[score["depth"], score["test"]] for score in one["layers"] if score["feature"] in (feature, "pooled")]
            depths, values = np.array(points, float).reshape(-1, 2).T  # undefined scores, NaN, are left out
            lines.append((one["name"], depths, values))
        panels.append((titles[feature], f"k-NN, test {dataset.metric}", lines))
    alike = [pair for pair in pairs if pair["moved"]]
    changes = (("same_layer", "outputs", "CKA with the start"), ("moved", "weights", "distance / norm at start"))
    for key, title, unit in changes:
        lines = []
        for pair in alike:
            depths = np.arange(1, len(pair[key]) + 1) / len(pair[key])
            lines.append((pair["name"], depths, pair[key]))
        if lines:
            panels.append((title, unit, lines))
    figure, axes = common.new_panels(path, len(panels) + len(pairs), 4, 3.2)
    for axis, (title, unit, lines) in zip(axes, panels):
        for i, (label, x, y) in enumerate(lines):
            axis.plot(x, y, ("o-", "s--", "^:")[i // 7 % 3], markersize=3, label=label)  # the colours repeat after 7
        axis.set(xlabel="relative depth", ylabel=unit)
        axis.grid(axis="y", color="#dddddd")
        axis.legend(title=f"{dataset.name}: {title}", loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=6)
    for axis, pair in zip(axes[len(panels):], pairs):
        ends = (0.5, len(pair["cka"][0]) + 0.5, 0.5, len(pair["cka"]) + 0.5)
        shade = axis.imshow(pair["cka"], origin="lower", cmap="magma", vmin=0, vmax=1, aspect="auto", extent=ends)
        axis.set(xlabel=f"layer of {pair['end']}", ylabel=f"layer of {pair['start']}")
        figure.colorbar(shade, ax=axis, label="CKA")
    if figure:
        common.save_figure(figure, path)


def finish(folder, dataset, runs, pairs, args, run, seconds):
    """Write layers.csv, layers.png and, last, metrics.json."""
    rows, lines, summary = [], [], []
    val, test = {}, {}
    for one in runs:
        for score in one["layers"]:
            rows.append([one["name"], one["arch"], *score.values()])
        best, last = one["best"], one["last"]
        lines.append([one["name"], f"{best['layer']} {best['feature']}", common.show(best["test"]), common.show(last["test"])])
        summary.append(f"{one['name']} is best at {best['layer']}")
        val[one["name"]] = best["val"]
        test[one["name"]] = best["test"]
    common.write_table(folder / "layers.csv", ["run", "arch", "layer", "depth", "feature", "val", "test"], rows)
    draw(folder / "layers.png", dataset, runs, pairs)
    common.print_table(["", "best layer (by val)", f"test {dataset.metric}", "last layer"], lines)
    facts = {key: [one[key] for one in runs] for key in ("arch", "init", "pretrained_on", "image_size")}
    common.write_metrics(
        folder, dataset, run, args, arch=", ".join(facts["arch"]), init=", ".join(facts["init"]),
        pretrained_on=facts["pretrained_on"], image_size=facts["image_size"], k=min(K, dataset.counts["train"]), runs=runs,
        pairs=pairs, epochs=0, seconds=seconds, val=val, test=test, summary="; ".join(summary))


def main():
    """Score the layers of every model, then compare those of each pair."""
    args = arguments()
    run = common.start(args)
    begin = time.time()
    torch.backends.cuda.matmul.allow_tf32 = False  # 10 bits of a cosine would change who is near
    dataset = common.load_dataset(args, labels=True)
    if args.pair and min(args.images, args.batch_size, dataset.counts["test"]) < 4:
        fail(f"--pair: unbiased CKA takes at least 4 of --images, --batch-size and {dataset.counts['test']} test images")
    models, pairs = open_models(args, dataset)
    names = "-".join(Path(facts["run"]).name for _, _, facts, _ in models)
    args.output = args.output or f"runs/layers-{dataset.name}-{names}"
    folder = common.open_run(args, run, dataset, ["layers.csv", "layers.png"])
    runs = []
    for model, layers, facts, seen_as in models:
        common.to_device(model, run)
        scores, shares = score_layers(model, layers, replace(dataset, **seen_as), facts["image_size"], args, run)
        if run.rank == 0:
            runs.append({**facts, "layers": scores, **best_layer(scores, shares, dataset)})
    compared = []
    for start, end in pairs:
        cka = cka_map(start, end, dataset, args, run)
        names = {"start": start[2]["name"], "end": end[2]["name"], "name": f"{start[2]['name']} to {end[2]['name']}"}
        moved = distances(start[1], end[1])
        compared.append({**names, "cka": cka.tolist(), "same_layer": moved and cka.diagonal().tolist(), "moved": moved})
    if run.rank == 0:
        finish(folder, dataset, runs, compared, args, run, time.time() - begin)


if __name__ == "__main__":
    common.launch(main)
