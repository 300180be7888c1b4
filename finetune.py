"""Fine-tune a classifier, choose the epoch on validation, test it once; or predict new images.

    python finetune.py --arch resnet18 --image-size 96 --epochs 20
    torchrun --nproc_per_node 4 finetune.py --data data/mine --arch deit_small --init imagenet
    python finetune.py --predict NEW_IMAGES --init runs/RUN/model.pt --output predictions/

Matsoukas et al. 2023 (arXiv:2303.07034), section 3: Adam, learning rate 1e-4 after a linear warm-up, weight
decay 1e-5, batch 64, cosine or plateau schedule, gradient norm clipped at 1. --freeze: the classifier alone.
"""
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import Draws, fail, say

CHECK_EVERY = 20  # steps between looks at the loss: a look waits for the device


def arguments():
    """The command line."""
    parser, groups = common.make_parser(__doc__)
    model, train = groups["model"], parser.add_argument_group("training")
    model.add_argument("--freeze", action="store_true", help="linear probe: train the classifier alone")
    train.add_argument("--epochs", type=int, default=50)
    train.add_argument("--batch-size", type=int, default=64, help="over all processes (default, paper: 64)")
    train.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (default, paper: 1e-4)")
    train.add_argument("--min-lr", type=float, default=1e-6, help="the cosine's end (default, paper: 1e-6)")
    train.add_argument("--weight-decay", type=float, default=1e-5, help="(default, paper: 1e-5)")
    train.add_argument("--warmup-steps", type=int, default=500,
                       help="linear (default 500, paper 500 to 1000), at most a quarter of all steps")
    train.add_argument("--schedule", default="cosine", choices=["cosine", "plateau"],
                       help="after warm-up; plateau: lr / 10 when validation has not improved for 3 epochs")
    train.add_argument("--clip-grad", type=float, default=1.0, help="of gradient (default, paper: 1; 0: off)")
    train.add_argument("--scale", type=float, nargs=2, default=[0.8, 1.0], metavar=("LOW", "HIGH"),
                       help="area of the random crop (default, paper: 0.8 1)")
    train.add_argument("--jitter", type=float, nargs=4, default=[0.2, 0.2, 0.1, 0.1], metavar=tuple("BCSH"),
                       help="brightness, contrast, saturation, hue (default, paper: 0.2 0.2 0.1 0.1)")
    groups["run"].add_argument("--predict", metavar="FOLDER_OR_CSV",
                               help="no training: predictions.csv of these images by the model of --init")
    groups["run"].add_argument("--skip-broken", action="store_true",
                               help="--predict: leave out files that cannot be decoded")
    args = common.parse(parser, "finetune")
    if not 0 < args.scale[0] <= args.scale[1] <= 1:
        fail(f"--scale {args.scale[0]} {args.scale[1]}: expected 0 < LOW <= HIGH <= 1")
    return args


def learning_rate(step, steps, args, drops):
    """Linear warm-up, then cosine to min_lr (or lr / 10 for each of `drops` plateaus) at step of steps."""
    warmup = min(args.warmup_steps, steps // 4)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.schedule == "plateau":
        return max(args.lr * 0.1 ** drops, args.min_lr)
    progress = (step - warmup) / max(1, steps - warmup)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def plateau_drops(log, patience=3):
    """How often the learning rate has been cut: at every `patience` epochs in a row without a new best."""
    best, waited, drops = -math.inf, 0, 0
    for entry in log:
        waited = 0 if entry["score"] > best else waited + 1
        best = max(best, entry["score"])
        if waited == patience:
            drops, waited = drops + 1, 0
    return drops


def train_view(images, draws, args, mean, std):
    """The fine-tuning augmentation of the paper: random resized crop, both flips, colour jitter. images (B, S, S, C)
    uint8 -> (B, 3, image_size, image_size) float."""
    boxes = common.random_boxes(draws, images.shape[1], args.scale)
    images = common.crop_resize(images, boxes, args.image_size, draws.uniform(2) < 0.5)
    return common.normalize(common.color_jitter(images, draws, args.jitter), mean, std)


def loss_function(logits, labels):
    """Cross-entropy for classes (labels (B,) int64), binary cross-entropy for multilabel ((B, L) float)."""
    if labels.ndim == 1:
        return F.cross_entropy(logits.float(), labels)
    return F.binary_cross_entropy_with_logits(logits.float(), labels)


def freeze_backbone(model):
    """Leave gradients to the classifier alone, and batch norm and drop path as at test time."""
    classifier = model.get_classifier()
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad = False
    for parameter in classifier.parameters():
        parameter.requires_grad = True


def predict(model, dataset, rows, args, run):
    """Logits (n, classes) float32 of rows of a dataset on the CPU, in their order, on every process."""
    loader = common.load_batches(dataset.images, common.shards(rows, run, 128), run.device)
    return common.outputs(model.eval(), len(dataset.classes), loader, len(rows), args.image_size, dataset.mean,
                          dataset.std, run, "evaluating")


def probabilities(logits, task):
    """(N, C) float64 numpy: softmax over classes, or a sigmoid a label."""
    return (logits.double().softmax(1) if task == "classes" else logits.double().sigmoid()).numpy()


def train_epoch(model, optimizer, scaler, dataset, args, run, epoch, drops):
    """One pass over train. Returns the mean loss and the images a second."""
    rows = dataset.rows["train"]
    order = common.epoch_order(len(rows), args.batch_size, args.seed, epoch)
    mine = common.own_share(args.batch_size, run)
    labels = torch.from_numpy(dataset.labels[rows]).to(run.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(hash((args.seed, epoch)) % 2 ** 31)  # of dropout and drop path, where there are any
    model.train(not args.freeze)
    total, seen, begin = torch.zeros((), device=run.device), 0, time.time()
    loader = common.load_batches(dataset.images, [rows[batch[mine]] for batch in order], run.device)
    bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", len(order), leave=False, disable=run.rank > 0)
    for i, images in enumerate(bar):
        step = epoch * len(order) + i
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.epochs * len(order), args, drops)
        draws = Draws((args.seed, epoch, i), args.batch_size, mine, run.device)
        view = train_view(images, draws, args, dataset.mean, dataset.std)
        with run.autocast():
            logits = model(view)
        loss = loss_function(logits, labels[common.upload(order[i][mine], run.device)])
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if args.clip_grad:
            torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        total += loss.detach()
        seen += 1
        if seen % CHECK_EVERY == 0 or i + 1 == len(order):
            mean = common.checked_mean(total, seen, step, epoch, args, run)
            bar.set_postfix(loss=f"{mean.item():.3f}")
    return mean.item(), len(order) * args.batch_size / (time.time() - begin)


def validation_score(dataset, labels, logits):
    """(what to maximise, metrics): the headline, or minus the loss where it is not defined on validation."""
    truth = labels if labels.ndim > 1 else labels.astype(np.int64)
    scores = probabilities(logits, dataset.task)
    values = common.all_metrics(dataset.task, dataset.classes, truth, scores, dataset.ordinal)
    loss = loss_function(logits, torch.from_numpy(truth)).item()
    headline = values[dataset.metric]
    return (-loss if headline is None else headline), {"loss": loss, **values}


def save_model(path, model, dataset, args, pretrained_on):
    """model.pt: the weights in timm's names, and all that a later stage needs to use them."""
    content = {"stage": "finetune", "arch": args.arch, "init": args.init_label,
               "num_classes": len(dataset.classes), "dataset": dataset.name, "image_size": args.image_size,
               "side": dataset.side, "fit": dataset.fit, "mean": dataset.mean, "std": dataset.std, "classes": dataset.classes,
               "task": dataset.task, "pretrained_on": pretrained_on,
               "state_dict": {k: v.cpu().contiguous() for k, v in model.state_dict().items()}}
    common.write_atomic(path, lambda part: torch.save(content, part))


def fit(model, dataset, args, run, folder, pretrained_on):
    """Train from the last checkpoint to the last epoch; model.pt is the best epoch. Returns the log."""
    if args.freeze:
        freeze_backbone(model)
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
    val = dataset.rows["val"]
    for epoch in range(len(log), args.epochs):
        begin = time.time()
        loss, speed = train_epoch(wrapped, optimizer, scaler, dataset, args, run, epoch, plateau_drops(log))
        score, values = validation_score(dataset, dataset.labels[val], predict(model, dataset, val, args, run))
        improved = score > max((entry["score"] for entry in log), default=-math.inf)
        log.append({"epoch": epoch + 1, "loss": loss, "val": values, "score": score,
                    "lr": optimizer.param_groups[0]["lr"], "images_per_second": speed,
                    "seconds": time.time() - begin})
        if run.rank == 0:  # model.pt first: were we killed between the two, the epoch would run again
            if improved:
                save_model(folder / "model.pt", model, dataset, args, pretrained_on)
            common.save_checkpoint(folder, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                            "scaler": scaler.state_dict(), "log": log})
        say(f"epoch {epoch + 1}/{args.epochs}  loss {loss:.4f}  val loss {values['loss']:.4f}  val "
            f"{dataset.metric} {common.show(values[dataset.metric])}{' *' if improved else ''}  "
            f"{speed:.1f} images/s")
    common.barrier()  # the others must not read model.pt before it is written
    return log


def draw_training(folder, dataset, log, labels, scores):
    """curves.png and, for classes, confusion.png (the share of each true class that went where)."""
    epochs = [entry["epoch"] for entry in log]
    val = [entry["val"][dataset.metric] for entry in log]
    common.draw_plot(folder / "curves.png", [
        {"title": "loss", "xlabel": "epoch", "ylabel": "cross-entropy", "series": [
            {"label": "train", "x": epochs, "y": [entry["loss"] for entry in log]},
            {"label": "validation", "x": epochs, "y": [entry["val"]["loss"] for entry in log]}]},
        {"title": f"validation {dataset.metric}", "xlabel": "epoch", "ylabel": dataset.metric,
         "series": [{"label": "validation", "x": epochs, "y": val, "colour": 1}]}])
    if dataset.task == "classes":
        count = len(dataset.classes)
        table = np.bincount(labels * count + scores.argmax(1), minlength=count ** 2).reshape(count, count)
        draw_confusion(folder / "confusion.png", table, dataset.classes)


def draw_confusion(path, table, classes):
    """Draw a confusion matrix, table (C, C) counts with true classes as rows: the shade is the share of the row."""
    side = min(max(3, 0.9 * len(classes)), 11)  # inches
    points = min(14, 0.4 * 72 * side / len(classes))  # two lines in a cell
    figure = common.new_figure(path, side + 4, side + 4)
    if figure is None:
        return
    axis = figure.add_axes((0.2, 0.2, side / (side + 4), side / (side + 4)))
    shares = table / table.sum(1, keepdims=True).clip(1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("predicted class", fontsize=14)
    axis.set_ylabel("true class", fontsize=14)
    if len(classes) <= 40:  # of more, nothing could be read
        names = [common.wrap(name, 0.17 * points, points, max_lines=2, placeholder="...") for name in classes]
        too_wide = max(map(len, names)) * common.LETTER * points / 72 > side / len(classes)
        axis.set_xticks(range(len(classes)), names, rotation=90 if too_wide else 0, fontsize=points)
        axis.set_yticks(range(len(classes)), names, fontsize=points)
        for (i, j), share in np.ndenumerate(shares):
            axis.text(j, i, table[i, j], fontsize=points, ha="center", va="center",
                      color="white" if share > 0.5 else "black")
    common.save_figure(figure, path, bbox_inches="tight")


def finish(model, dataset, args, run, folder, log, pretrained_on):
    """Test the best epoch once; write predictions.csv, the pictures and, last, metrics.json."""
    weights, _ = common.read_checkpoint(folder / "model.pt")
    model.load_state_dict(weights)
    rows = dataset.rows["test"]
    logits = predict(model, dataset, rows, args, run)
    if run.rank > 0:
        return
    scores = probabilities(logits, dataset.task)
    labels, images = dataset.labels[rows], [dataset.paths[row] for row in rows]
    test = common.score_test(dataset, scores)
    best = max(log, key=lambda entry: entry["score"])
    common.write_predictions(folder / "predictions.csv", dataset.task, dataset.classes, images, labels,
                             dataset.groups_of(rows), scores)
    draw_training(folder, dataset, log, labels, scores)
    headline = f"{dataset.metric} {common.show(test[dataset.metric])}"
    common.write_json(folder / "metrics.json", {
        "stage": "finetune", "dataset": dataset.name, "arch": args.arch, "init": args.init_label,
        "pretrained_on": pretrained_on, "seed": args.seed, "freeze": args.freeze, "metric": dataset.metric,
        "val": best["val"], "test": test, "best_epoch": best["epoch"], "counts": dataset.counts,
        "split": dataset.fingerprint, "leakage": dataset.leakage, "image_size": args.image_size,
        "epochs": args.epochs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": sum(entry["seconds"] for entry in log),
        "images_per_second": float(np.median([entry["images_per_second"] for entry in log])),
        "device": common.device_name(run.device), "amp": run.amp, "world_size": run.world,
        "summary": f"test {headline}"})
    common.print_table(["", "val", "test"], [[name, common.show(best["val"][name]), common.show(test[name])]
                                             for name in common.METRICS if name in test])
    low, high = test["interval"] or (None, None)
    say(f"best epoch {best['epoch']} of {args.epochs}, {len(rows)} test images, {headline} "
        f"(95 % interval {common.show(low)} to {common.show(high)})")
    if test["undefined"]:
        say(f"not in the test split, left out of the averages: {', '.join(test['undefined'])}")
    say(f"written: {folder}")


def predict_new(args, run):
    """--predict: the model of --init on image files, by the fit, means, sizes and classes in its model.pt."""
    if args.init in ("random", "imagenet", "imagenet-dino"):
        fail("--predict needs --init RUN/model.pt, a model that finetune.py has trained")
    model, meta = common.load_trained(args.init)
    root, names = common.new_images(args.predict)
    folder = Path(args.output or "predictions")
    if (folder / "args.json").exists() or (folder.exists() and not folder.is_dir()):
        fail(f"--output {folder} holds a training run or is a file; give a new folder for the predictions")
    paths = [str(root / name) for name in names]
    broken = {}
    files = common.load_files(paths[run.rank::run.world], meta["side"], meta["fit"], broken)
    loader = (images for images, _ in files)
    model = common.to_device(model, run)
    logits = common.outputs(model, len(meta["classes"]), loader, len(paths), meta["image_size"], meta["mean"],
                            meta["std"], run, "predicting")
    broken = common.report_broken(broken, run, args.skip_broken)
    if run.rank == 0:
        kept = [i for i, path in enumerate(paths) if path not in broken]
        scores = probabilities(logits[kept], meta["task"])
        folder.mkdir(parents=True, exist_ok=True)
        common.write_predictions(folder / "predictions.csv", meta["task"], meta["classes"],
                                 [names[i] for i in kept], None, None, scores)
        say(f"written: {folder}/predictions.csv, {len(kept)} images")


def main():
    """Train, validate, test; or predict."""
    args = arguments()
    run = common.start(args)
    if args.predict:
        return predict_new(args, run)
    common.own_share(args.batch_size, run)
    dataset = common.load_dataset(args, labels=True)
    folder = common.open_run(args, run, dataset)
    common.note_enlarged(dataset, args.image_size, common.centre_box(dataset.side)[1])
    if len(dataset.rows["train"]) < args.batch_size:
        fail(f"--batch-size {args.batch_size} is more than the {len(dataset.rows['train'])} training images")
    model, pretrained_on = common.build_model(args, len(dataset.classes))
    model = common.to_device(model, run)
    common.write_args(folder, args, run, dataset, ["curves.png", "confusion.png"])
    log = fit(model, dataset, args, run, folder, pretrained_on)
    finish(model, dataset, args, run, folder, log, pretrained_on)


if __name__ == "__main__":
    common.launch(main)
