"""Fine-tune a classifier, choose the epoch on validation, test it once; or test it elsewhere; or predict new images.

    python finetune.py --arch resnet18 --image-size 96 --epochs 20
    torchrun --nproc_per_node 4 finetune.py --data data/mine --arch deit_small --init imagenet
    python finetune.py --test data/other_hospital --init runs/RUN/model.pt
    python finetune.py --predict NEW_IMAGES --init runs/RUN/model.pt --output predictions/

Matsoukas et al. 2023 (arXiv:2303.07034), section 3: Adam, learning rate 1e-4 after a linear warm-up, weight
decay 1e-5, batch 64, cosine or plateau schedule, gradient norm clipped at 1. --freeze is a linear probe: logistic
regression on the features of the frozen backbone, solved to convergence, its penalty chosen on validation.
"""
import math
import time

import common  # before PyTorch, whose threads it tells how to wait
from common import Draws, fail, say

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm


def arguments():
    """The command line."""
    parser, groups = common.make_parser(__doc__)
    train = common.add_training(parser, groups, 64, [0.8, 1.0])  # the paper's
    train.add_argument("--schedule", default="cosine", choices=["cosine", "plateau"],
                       help="after warm-up; plateau: lr / 10 when validation has not improved for 3 epochs")
    train.add_argument("--class-weights", default="none", choices=["none", "balanced"],
                       help="balanced: every class (or 0 and 1 of every label) weighs alike in the loss (paper: none)")
    train.add_argument("--layer-decay", type=float, default=1.0, metavar="F",
                       help="each layer learns at F times the rate of the next (default, paper: 1; often 0.65 to 0.75)")
    groups["model"].add_argument("--freeze", action="store_true",
                                 help="linear probe: the classifier alone, to convergence; no epochs, rates, augmentation")
    args = common.parse(parser, "finetune")
    if not 0 < args.layer_decay <= 1:
        fail(f"--layer-decay {args.layer_decay}: expected above 0, up to 1")
    for action in train._group_actions if args.freeze else []:
        if action.dest not in ("class_weights", "layer_decay"):  # all others play no part in a probe
            setattr(args, action.dest, None)
    return args


# ---------------------------------------------------------------- the method --------------------------------

def learning_rates(args, steps, log):
    """The rate of each of all `steps`: linear warm-up, then a cosine to min_lr or, on a plateau, lr / 10 for each time
    that 3 epochs in a row of the log brought no new best."""
    warmup = min(args.warmup_steps, steps // 4)
    rates = common.warmup_cosine(args.lr, args.min_lr, steps, warmup)
    if args.schedule == "plateau":
        rates[warmup:] = max(args.lr * 0.1 ** plateaus(log), args.min_lr)
    return rates


def plateaus(log, patience=3):
    """How often `patience` epochs in a row have brought no new best."""
    best, waited, count = -math.inf, 0, 0
    for entry in log:
        waited = 0 if entry["score"] > best else waited + 1
        best = max(best, entry["score"])
        if waited == patience:
            count += 1
            waited = 0
    return count


def train_view(images, draws, args, mean, std):
    """The fine-tuning augmentation of the paper: random resized crop, both flips, colour jitter (and --rotate). images
    (B, S, S, C) uint8 -> (B, 3, image_size, image_size) float."""
    boxes = common.random_boxes(draws, images.shape[1], args.scale)
    images = common.crop_resize(images, boxes, args.image_size, common.random_flips(draws, args.flips))
    images = common.rotate(images, common.random_angles(draws, args.rotate))
    return common.normalize(common.color_jitter(images, draws, args.jitter), mean, std)


def class_weights(dataset, kind, device):
    """The weights (C,) float32 of --class-weights balanced, None of none: of each class N / (C x its images), so that
    their mean over images is 1; or of each of several labels its images with 0 over those with 1."""
    if kind == "none":
        return None
    labels, names = dataset.labels[dataset.rows["train"]], dataset.classes
    if dataset.task == "classes":
        weights = len(labels) / (len(names) * np.bincount(labels, minlength=len(names)))
    else:
        ones = labels.sum(0)
        weights = np.where(ones > 0, (len(labels) - ones) / ones.clip(1), 1)
    say("class weights: " + ", ".join(f"{name} {weight:.3g}" for name, weight in zip(names, weights)))
    return torch.tensor(weights, dtype=torch.float32, device=device)


def loss_function(logits, labels, weights=None):
    """Cross-entropy for classes (labels (B,) int64), each image with the weight of its class (C,); or binary
    cross-entropy for multilabel ((B, L) float), the 1 of each label with its weight (L,)."""
    if labels.ndim > 1:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), pos_weight=weights)
    if weights is None:
        return F.cross_entropy(logits, labels)
    # PyTorch's own weighting divides by the weights of a batch, so that the loss would depend on how it is shared
    return (weights[labels] * F.cross_entropy(logits, labels, reduction="none")).mean()


def probabilities(logits, task):
    """(N, C) float64 numpy: softmax over classes, or a sigmoid a label."""
    return (logits.double().softmax(1) if task == "classes" else logits.double().sigmoid()).numpy()


# ---------------------------------------------------------------- training ----------------------------------

def train_epoch(model, optimizer, scaler, dataset, args, run, epoch, rates, weights=None):
    """One pass over train, at the rates (steps,) of its steps. Returns the mean loss and the images a second."""
    rows = dataset.rows["train"]
    mine = common.own_share(args.batch_size, run)
    order = common.epoch_order(len(rows), args.batch_size, args.seed, epoch)[:, mine]  # (steps, share) positions in rows
    labels = torch.from_numpy(dataset.labels[rows]).to(run.device)
    torch.manual_seed(hash((args.seed, epoch)) % 2 ** 31)  # of dropout and drop path, where there are any
    model.train()
    total = torch.zeros((), device=run.device)
    begin = time.time()
    loader = common.load_batches(dataset.images, rows[order], run.device)
    bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", len(order), leave=False, disable=run.rank > 0)
    for step, images in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = float(rates[step]) * group.get("lr_scale", 1)
        draws = Draws((args.seed, epoch, step), args.batch_size, mine, run.device)
        view = train_view(images, draws, args, dataset.mean, dataset.std)
        with run.autocast():
            logits = model(view)
        loss = loss_function(logits.float(), labels[common.upload(order[step], run.device)], weights)
        common.optimizer_step(loss, optimizer, scaler, args.clip_grad)
        total += loss.detach()
        if (step + 1) % common.CHECK_EVERY == 0 or step + 1 == len(order):
            mean = common.checked_mean(total, step + 1, epoch * len(order) + step, epoch, args.output, run)
            bar.set_postfix(loss=f"{mean.item():.3f}")
    return mean.item(), len(order) * args.batch_size / (time.time() - begin)


def validate(model, dataset, args, run, weights):
    """The loss, with class weights (C,) or None, and every metric on validation."""
    rows = dataset.rows["val"]
    labels = dataset.labels[rows]
    logits = common.outputs(model.eval(), dataset, rows, args.image_size, run)
    weights = None if weights is None else weights.cpu()
    loss = loss_function(logits, torch.from_numpy(labels), weights).item()
    return {"loss": loss, **common.all_metrics(dataset, labels, probabilities(logits, dataset.task))}


def classifier_facts(dataset):
    """What model.pt says of the classifier."""
    return {"task": dataset.task, "classes": dataset.classes, "num_classes": len(dataset.classes)}


def fit(model, dataset, args, run, folder, pretrained_on):
    """Train from the last checkpoint to the last epoch; model.pt is the best epoch. Returns the log."""
    optimizer, scaler, parts, log = common.start_training(model, args, run, folder, args.layer_decay)
    wrapped = common.distribute(model, run, args.compile)
    weights = class_weights(dataset, args.class_weights, run.device)
    per_epoch = len(dataset.rows["train"]) // args.batch_size
    for epoch in common.epochs_left(log, args):
        begin = time.time()
        rates = learning_rates(args, args.epochs * per_epoch, log)[epoch * per_epoch:]
        loss, speed = train_epoch(wrapped, optimizer, scaler, dataset, args, run, epoch, rates, weights)
        values = validate(model, dataset, args, run, weights)
        entry = {"epoch": epoch + 1, "loss": loss, "val": values, "lr": float(rates[per_epoch - 1]),
                 "images_per_second": speed, "seconds": time.time() - begin}
        common.end_epoch(entry, log, parts, model.state_dict(), dataset, args, run, pretrained_on=pretrained_on,
                         **classifier_facts(dataset))
    common.barrier()  # the others must not read model.pt before it is written
    return log


# ---------------------------------------------------------------- the linear probe --------------------------

STRENGTHS = [10.0 ** power for power in range(-5, 4)]  # C of scikit-learn: the weaker the penalty, the larger


def logistic_regression(features, labels, count, strength, weights=None, start=None):
    """The (weight (C, D), bias (C,)) float64 that minimise the sum of loss_function over features (N, D) float64 plus
    |weight|^2 / (2 strength), of two classes twice that, by L-BFGS to convergence; `count` classes or labels, from `start` or
    zeros."""
    weight, bias = start or (features.new_zeros(count, features.shape[1]), features.new_zeros(count))
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=5000, max_eval=10000, tolerance_grad=1e-6, tolerance_change=1e-12,
                                  history_size=20, line_search_fn="strong_wolfe")
    terms = count if labels.ndim > 1 else 1  # the loss of several labels is a mean over them
    # for two classes scikit-learn has one row of weights, their difference, and so penalises half as much as two would
    rows = 2 if labels.ndim == 1 and count == 2 else 1

    def objective():
        optimizer.zero_grad()
        loss = terms * loss_function(features @ weight.T + bias, labels, weights)
        loss = loss + rows * (weight ** 2).sum() / (2 * strength * len(features))
        loss.backward()
        return loss
    optimizer.step(objective)
    return weight.detach(), bias.detach()


def set_classifier(model, weight, bias):
    """Give a model the linear classifier (weight (C, D), bias (C,)); a distilled DeiT, which averages two, twice."""
    classifier = model.get_classifier()
    for part in classifier if isinstance(classifier, tuple) else [classifier]:
        if getattr(part, "weight", None) is None or part.weight.shape != weight.shape:
            fail(f"--freeze: the classifier of {type(model).__name__} is no linear layer on its features")
        part.weight.data.copy_(weight)
        part.bias.data.copy_(bias)


def probe(model, dataset, args, run, folder, pretrained_on):
    """Fit the classifier on frozen features, for each of STRENGTHS; model.pt has the one that is best on validation.
    Returns the log, an entry a strength."""
    say("linear probe: features without augmentation, logistic regression; --epochs, --lr and the like play no part")
    device = torch.device("cpu") if run.device.type == "mps" else run.device  # which has no float64

    def frozen(images):
        return model.forward_head(model.forward_features(images), pre_logits=True)

    begin = time.time()
    model.eval()
    features, labels = {}, {}
    for name in ("train", "val"):
        rows = dataset.rows[name]
        features[name] = common.outputs(frozen, dataset, rows, args.image_size, run).double().to(device)
        labels[name] = torch.from_numpy(dataset.labels[rows]).to(device)
    speed = sum(map(len, features.values())) / (time.time() - begin)

    mean, std = features["train"].mean(0), features["train"].std(0, unbiased=False)
    std[std == 0] = 1  # a feature that is the same for every image
    x = {name: (values - mean) / std for name, values in features.items()}
    weights = class_weights(dataset, args.class_weights, device)
    log, solutions, solution = [], [], None
    for strength in STRENGTHS:
        begin = time.time()
        solution = logistic_regression(x["train"], labels["train"], len(dataset.classes), strength, weights, solution)
        solutions.append(solution)
        losses = {}
        for name in ("train", "val"):
            logits = x[name] @ solution[0].T + solution[1]
            losses[name] = loss_function(logits, labels[name], weights).item()
        values = common.all_metrics(dataset, dataset.labels[dataset.rows["val"]], probabilities(logits.cpu(), dataset.task))
        log.append({"C": strength, "log10 C": math.log10(strength), "loss": losses["train"],
                    "val": {"loss": losses["val"], **values}, "images_per_second": speed, "seconds": time.time() - begin})
        say(f"C {strength:g}  loss {losses['train']:.4f}  val loss {losses['val']:.4f}  val {dataset.metric} "
            f"{common.show(values[dataset.metric])}")

    common.score_log(log, dataset.metric)
    best = max(range(len(log)), key=lambda i: log[i]["score"])
    weight, bias = solutions[best]
    set_classifier(model, weight / std, bias - weight @ (mean / std))
    if run.rank == 0:
        common.save_model(folder / "model.pt", model.state_dict(), dataset, args, pretrained_on=pretrained_on,
                          **classifier_facts(dataset))
        common.write_log(folder, log)
    common.barrier()  # the others must not read model.pt before it is written
    return log


# ---------------------------------------------------------------- the test ----------------------------------

def draw_confusion(path, table, classes):
    """confusion.png: table (C, C) of counts, true classes as rows; the shade is the share of its row."""
    side = min(max(2.5, 0.5 * len(classes)), 12)
    figure, axes = common.new_figure(path, side + 1.5, side + 1)
    if figure is None:
        return
    axis = axes[0, 0]
    shares = table / table.sum(1, keepdims=True).clip(1)
    shade = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shade, ax=axis, shrink=0.6, label="share of the true class")
    axis.set(xlabel="predicted class", ylabel="true class", xticks=[], yticks=[])
    if len(classes) <= 40:  # of more, nothing could be read
        points = min(9, 30 * side / len(classes))
        names = [name if len(name) < 25 else name[:22] + "..." for name in classes]
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=points)
        axis.set_yticks(range(len(names)), names, fontsize=points)
        for (i, j), share in np.ndenumerate(shares):
            axis.text(j, i, table[i, j], fontsize=points, ha="center", va="center",
                      color="white" if share > 0.5 else "black")
    common.save_figure(figure, path)


def test(model, dataset, args, run, folder, columns=slice(None)):
    """Test a model once, of several labels on some `columns` of its outputs; write predictions.csv and confusion.png.
    Returns the scores on rank 0."""
    rows = dataset.rows["test"]
    logits = common.outputs(model.eval(), dataset, rows, args.image_size, run)[:, columns]
    if run.rank > 0:
        return None
    scores = probabilities(logits, dataset.task)
    result = common.score_test(dataset, scores)
    common.write_predictions(folder / "predictions.csv", dataset, scores)
    if dataset.task == "classes":
        table = common.confusion(dataset.labels[rows], scores.argmax(1), len(dataset.classes))
        draw_confusion(folder / "confusion.png", table, dataset.classes)
    return result


def tell(dataset, val, result, chosen):
    """Print the scores of validation, {} without, and test. Returns the headline as text."""
    shown = [[name, common.show(val[name])] if val else [name] for name in common.METRICS if name in result]
    head = ["", "val", "test"] if val else ["", "test"]
    common.print_table(head, [[*cells, common.show(result[cells[0]])] for cells in shown])
    headline = f"{dataset.metric} {common.show(result[dataset.metric])}"
    say(f"{chosen}, {len(dataset.rows['test'])} test images, {headline} ({common.interval_text(result)})")
    if result["undefined"]:
        say(f"not in the test split (or, of several labels, on all of it), left out of averages that need them: "
            f"{', '.join(result['undefined'])}")
    return headline


def finish(model, dataset, args, run, folder, log, pretrained_on):
    """Test the best epoch, or the best penalty of the probe, once; write the pictures and, last, metrics.json."""
    weights, _ = common.read_checkpoint(folder / "model.pt")
    model.load_state_dict(weights)
    result = test(model, dataset, args, run, folder)
    if result is None:
        return
    best = max(log, key=lambda entry: entry["score"])
    if args.freeze:
        x, chosen, own = "log10 C", f"best C {best['C']:g}", {"C": best["C"], "epochs": 0}
    else:
        x, chosen = "epoch", f"best epoch {best['epoch']} of {len(log)}"
        own = {"best_epoch": best["epoch"], "epochs": len(log)}
    common.draw_training(folder / "curves.png", log, "cross-entropy", dataset.metric, x)
    headline = tell(dataset, best["val"], result, chosen)
    common.write_metrics(folder, dataset, run, args, pretrained_on=pretrained_on, freeze=args.freeze, val=best["val"],
                         test=result, summary=f"test {headline}", **own, **common.training_facts(model, log))


# ---------------------------------------------------------------- other images ------------------------------

def match_classes(dataset, meta):
    """Give a dataset, in place, the classes of a trained model, by name: labels are numbered as the model does. Images of
    a class that the model does not know leave the test; of several labels those count that both have. Returns the columns
    of the model's outputs that are scored."""
    if dataset.task != meta["task"]:
        fail(f"--test {dataset.folder} has {'several labels' if dataset.task == 'multilabel' else 'one class'} an image, "
             "the model of --init the other")
    shared = [name for name in meta["classes"] if name in dataset.classes]
    absent = [name for name in meta["classes"] if name not in shared]
    unknown = [name for name in dataset.classes if name not in shared]
    if not shared:
        fail(f"--test {dataset.folder}: its classes, {common.some(dataset.classes, 14)}, are none of the model's, "
             f"{common.some(meta['classes'], 14)}; name them alike")
    if absent:
        say(f"note: the model's {common.some(absent, 14)} is not in {dataset.name}")
    if dataset.task == "multilabel":
        if unknown:
            say(f"note: the model does not know {common.some(unknown, 14)} of {dataset.name}: not scored")
        dataset.labels = dataset.labels[:, [dataset.classes.index(name) for name in shared]]
        dataset.classes = shared
        return [meta["classes"].index(name) for name in shared]
    number = np.array([meta["classes"].index(name) if name in shared else -1 for name in dataset.classes])
    dataset.labels = number[dataset.labels]
    rows = dataset.rows["test"]
    dataset.rows["test"] = rows[dataset.labels[rows] >= 0]
    left_out = len(rows) - len(dataset.rows["test"])
    if unknown:
        say(f"WARNING: the model does not know {common.some(unknown, 14)} of {dataset.name}: {left_out} images of it are left "
            "out")
    dataset.classes = meta["classes"]
    return slice(None)


def test_elsewhere(args, run):
    """--test: the model of --init on another prepared folder, as a run of its own."""
    model, meta = common.load_trained(args.init)
    dataset = common.load_external(args, meta, labels=True)
    columns = match_classes(dataset, meta)
    if not len(dataset.rows["test"]):
        fail(f"--test {args.test}: no image is left to test")
    folder = common.open_run(args, run, dataset, ["curves.png", "confusion.png"])
    begin = time.time()
    result = test(common.to_device(model, run), dataset, args, run, folder, columns)
    if result is None:
        return
    headline = tell(dataset, {}, result, f"trained on {meta['dataset']}, tested on {dataset.name}")
    training = common.training_of(meta)
    common.write_metrics(
        folder, dataset, run, args, **training, freeze=training["training"].get("freeze"), val={}, test=result, epochs=0,
        parameters=sum(p.numel() for p in model.parameters()), seconds=time.time() - begin,
        summary=f"test {headline}")


def predict(args, run):
    """--predict: the model of --init on image files, by the fit, means, sizes and classes in its model.pt."""
    folder = common.predictions_folder(args)
    model, meta = common.load_trained(args.init)
    with common.prepare_module().new_images(args.predict, folder, meta, args.skip_broken) as dataset:
        dataset.task, dataset.classes = meta["task"], meta["classes"]
        model = common.to_device(model, run)
        logits = common.outputs(model, dataset, dataset.rows["test"], meta["image_size"], run)
        if run.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            common.write_predictions(folder / "predictions.csv", dataset, probabilities(logits, dataset.task))
            say(f"written: {folder}/predictions.csv, {len(logits)} images")


def main():
    """Train, validate, test; or test elsewhere; or predict."""
    args = arguments()
    run = common.start(args)
    if args.predict:
        return predict(args, run)
    if args.test:
        return test_elsewhere(args, run)
    if not args.freeze:
        common.own_share(args.batch_size, run)
    dataset = common.load_dataset(args, labels=True)
    common.note_enlarged(dataset, args.image_size, common.centre_box(dataset.side)[1])
    if not args.freeze and len(dataset.rows["train"]) < args.batch_size:
        fail(f"--batch-size {args.batch_size} is more than the {len(dataset.rows['train'])} training images")
    model, pretrained_on = common.build_model(args.arch, args.init, args.image_size, len(dataset.classes), args.seed,
                                              args.init_key, args.init_stats, patch_size=args.patch_size)
    if not args.freeze and not args.init_stats:
        common.keep_classifier(model, common.classifier_prefixes(model), args.init, dataset.classes, dataset.task)
    normalised = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if args.batch_size == 1 and normalised:
        fail(f"--batch-size 1: the batch norm of {args.arch} needs at least 2 images")
    model = common.to_device(model, run)
    common.avoid_small_maps(model, [args.image_size], run, args)
    folder = common.open_run(args, run, dataset, ["curves.png", "confusion.png"])
    train = probe if args.freeze else fit
    log = train(model, dataset, args, run, folder, pretrained_on)
    finish(model, dataset, args, run, folder, log, pretrained_on)


if __name__ == "__main__":
    common.launch(main)
