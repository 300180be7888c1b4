"""Judge a backbone without training: a weighted k-NN vote on its frozen features.

    python knn_eval.py --init runs/RUN/model.pt
    torchrun --nproc_per_node 4 knn_eval.py --data data/mine --init imagenet-dino

Matsoukas et al. 2023, section 3, after Caron et al. 2021, section 4.1: the k = 200 training images nearest by cosine
similarity vote with the weight exp(similarity / T), T = 0.1 in the authors' code, 0.07 in Caron et al. The largest k of
--k gives the headline; the others are in metrics.json, under by_k. features.npz keeps the features of all splits.
"""
import time
from functools import partial

import common  # before PyTorch, whose threads it tells how to wait
from common import fail, say

import numpy as np
import torch


def arguments():
    """The command line."""
    parser, groups = common.make_parser(__doc__)
    knn = parser.add_argument_group("k-NN")
    knn.add_argument("--k", default="1,5,20,200",
                     help="neighbours; the largest gives the headline (default 1,5,20,200; paper: 200)")
    knn.add_argument("--temperature", type=float, default=0.1,
                     help="of the votes (default, authors' code: 0.1; Caron et al.: 0.07)")
    knn.add_argument("--pool", default="auto", choices=["auto", "cls", "mean"],
                     help="ViT feature: CLS token or mean of patches (auto: the model's own, CLS for DeiT)")
    knn.add_argument("--batch-size", type=int, default=128, help="images at a time and process (default 128)")
    args = common.parse(parser, "knn_eval")
    if not all(k.strip().isdigit() and int(k) > 0 for k in args.k.split(",")):
        fail(f"--k {args.k}: expected whole numbers, comma separated, such as 1,5,20,200")
    if args.temperature <= 0:
        fail(f"--temperature {args.temperature}: must be more than 0")
    return args


def features(model, images, pool="auto"):
    """(B, D): the CLS token of a ViT ("cls"), the mean of its patch tokens ("mean") or, for "auto", what the model
    itself feeds its classifier: CLS for DeiT, the pooled map for a CNN."""
    tokens = model.forward_features(images)
    if pool == "auto" or tokens.ndim != 3:
        return model.forward_head(tokens, pre_logits=True)
    prefix = getattr(model, "num_prefix_tokens", 0)
    if pool == "cls" and not prefix:
        fail(f"--pool cls: {type(model).__name__} has no CLS token")
    return tokens[:, 0] if pool == "cls" else tokens[:, prefix:].mean(1)


def extract(model, dataset, rows, image_size, run, pool="auto", batch_size=128):
    """Frozen features (n, D) float32 of rows of a dataset, in their order, on the CPU of every process."""
    return common.outputs(partial(features, model, pool=pool), dataset, rows, image_size, run, batch_size)


def save_features(path, extracted, dataset):
    """features.npz: {split}_features (n, D) float32, {split}_labels and {split}_images of each split, and classes."""
    arrays = {"classes": np.array(dataset.classes)}
    for name, rows in dataset.rows.items():
        arrays[f"{name}_features"] = extracted[name].numpy()
        arrays[f"{name}_labels"] = dataset.labels[rows]
        arrays[f"{name}_images"] = np.array([dataset.paths[row] for row in rows])
    common.write_atomic(path, lambda part: np.savez(part, **arrays))


def neighbours(text, most):
    """The numbers in --k, in order; those above `most` are cut to it, said."""
    ks = [int(k) for k in text.split(",")]
    if max(ks) > most:
        say(f"note: there are {most} training images; k above that is cut to it")
    return sorted({min(k, most) for k in ks})


def main():
    """Extract features, vote, score."""
    args = arguments()
    run = common.start(args)
    begin = time.time()
    torch.backends.cuda.matmul.allow_tf32 = False  # 10 bits of a cosine would change who is near
    dataset = common.load_dataset(args, labels=True)
    common.note_enlarged(dataset, args.image_size, common.centre_box(dataset.side)[1])
    if args.init not in common.NAMED_INITS:  # the model sees images as in its training
        _, meta = common.read_checkpoint(args.init, args.init_key)
        dataset.mean, dataset.std = meta.get("mean", dataset.mean), meta.get("std", dataset.std)
    model, pretrained_on = common.build_model(args.arch, args.init, args.image_size, 0, args.seed, args.init_key,
                                              args.init_stats, patch_size=args.patch_size)
    model = common.to_device(model, run).eval()
    folder = common.open_run(args, run, dataset, ["features.npz"])
    if args.compile:
        model.forward_features = torch.compile(model.forward_features)

    started = time.time()
    extracted = {}
    for name, rows in dataset.rows.items():
        extracted[name] = extract(model, dataset, rows, args.image_size, run, args.pool, args.batch_size)
    speed = sum(dataset.counts.values()) / (time.time() - started)
    if run.rank > 0:
        return
    save_features(folder / "features.npz", extracted, dataset)
    ks = neighbours(args.k, dataset.counts["train"])
    scores = common.vote_on(extracted, dataset, ks, args.temperature, run.device)

    by_k = {}
    for k in ks:
        by_k[k] = {name: common.metric(dataset.metric, dataset.task, dataset.labels[dataset.rows[name]], shares[k])
                   for name, shares in scores.items()}
    k = ks[-1]
    val = common.all_metrics(dataset, dataset.labels[dataset.rows["val"]], scores["val"][k])
    test = common.score_test(dataset, scores["test"][k])
    common.write_predictions(folder / "predictions.csv", dataset, scores["test"][k])
    common.print_table(["k", f"val {dataset.metric}", f"test {dataset.metric}"],
                       [[k, common.show(value["val"]), common.show(value["test"])] for k, value in by_k.items()])
    headline = f"{dataset.metric} {common.show(test[dataset.metric])}"
    say(f"k = {k}: {headline} on {dataset.counts['test']} test images "
        f"({common.interval_text(test)}), features at {speed:.1f} images/s")
    common.write_metrics(
        folder, dataset, run, args, pretrained_on=pretrained_on, k=k, by_k=by_k, pool=args.pool, val=val, test=test,
        epochs=0, parameters=sum(p.numel() for p in model.parameters()), seconds=time.time() - begin,
        images_per_second=speed, summary=f"test {headline} at k = {k}")


if __name__ == "__main__":
    common.launch(main)
