"""Pretrain a backbone on a dataset's images without their labels, by self-distillation (DINO).

    python pretrain_dino.py --arch deit_tiny --image-size 96 --epochs 60
    torchrun --nproc_per_node 4 pretrain_dino.py --data data/mine --init imagenet

Caron et al. 2021 (arXiv:2104.14294), as in Matsoukas et al. 2023, section 3. A student sees 2 large and
several small crops of an image, its teacher the 2 large ones; the student learns to give the output that the
teacher gives for another crop; the teacher is the moving average of the student. model.pt is the teacher's
backbone, for --init of the other stages. Each epoch prints a line of health; a collapsed run is told so.
"""
import copy
import math
import time
from pathlib import Path

import common  # before PyTorch, whose threads it tells how to wait
from common import Draws, fail, say

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

# What the recipes differ in; a flag on the command line goes before any. "paper" has the values of the study's code, for
# a start from ImageNet weights. (That code steps its optimizer twice a batch, so that its runs cannot be matched exactly.)
# "caron" has those of Caron et al., for many images. "small" is for random weights and few images, where the others stay
# at ln outputs, the loss of knowing nothing, and their features get worse; BENCHMARKS.md has the ablation that led to it.
PAPER = {"optimizer": "adam", "batch_size": 64, "lr": 1e-4, "lr_batch": 0, "warmup_steps": 500, "warmup_epochs": 0,
         "weight_decay": 1e-5, "weight_decay_end": 0.4, "clip_grad": 1.0, "clip": "all", "out_dim": 4096,
         "head_norm": "none", "centering": "mean", "teacher_temp": 0.07, "warmup_teacher_temp": 0.04,
         "warmup_teacher_epochs": 30, "momentum_teacher": 0.99, "koleo": 0.0, "local_crops": 6,
         "global_scale": [0.4, 1.0], "local_scale": [0.05, 0.4], "jitter": [0.4, 0.4, 0.2, 0.1], "grey": 0.2,
         "blur": [1.0, 0.1, 0.5], "solarize": 0.2, "freeze_last_layer": 1, "drop_path": 0.1}
CARON = {**PAPER, "optimizer": "adamw", "batch_size": 1024, "lr": 5e-4, "lr_batch": 256, "warmup_steps": 0,
         "warmup_epochs": 10, "weight_decay": 0.04, "clip_grad": 3.0, "clip": "each", "out_dim": 65536,
         "momentum_teacher": 0.996, "local_crops": 8}
SMALL = {**CARON, "batch_size": 32, "lr": 1e-3, "warmup_epochs": 1, "weight_decay_end": 0.04, "clip": "all",
         "out_dim": 1024, "head_norm": "batch", "centering": "sinkhorn", "teacher_temp": 0.025,
         "warmup_teacher_temp": 0.025, "warmup_teacher_epochs": 0, "momentum_teacher": 0.99, "koleo": 0.5,
         "local_crops": 2, "global_scale": [0.5, 1.0], "local_scale": [0.2, 0.5], "jitter": [0.2, 0.2, 0.1, 0.05],
         "blur": [0.1, 0.1, 0.1], "solarize": 0.0, "freeze_last_layer": -1, "drop_path": 0.0}
RECIPES = {"paper": PAPER, "caron": CARON, "small": SMALL}
SMALL_CNN = {"lr": 4e-3, "koleo": 0.2}  # CNNs stand a higher rate, at which a ViT's features get worse
FEW = 20000  # images below which a start from random weights takes the small recipe


def arguments():
    """The command line."""
    parser, groups = common.make_parser(__doc__)
    dino, train = (parser.add_argument_group(name) for name in ("DINO (defaults: --recipe)", "training"))
    dino.add_argument("--recipe", default="auto", choices=["auto", *RECIPES],
                      help=f"defaults of the flags below (auto: small below {FEW} images from random, else paper)")
    dino.add_argument("--out-dim", type=int, help="outputs of the head (paper: 4096)")
    dino.add_argument("--head-norm", choices=["none", "batch"], help="batch norm in the head (paper: none)")
    dino.add_argument("--centering", choices=["mean", "sinkhorn"], help="of teacher outputs (paper: mean)")
    dino.add_argument("--local-crops", type=int, help="small crops an image (paper: 6)")
    dino.add_argument("--global-scale", type=float, nargs=2, metavar=("LOW", "HIGH"), help="(paper: 0.4 1)")
    dino.add_argument("--local-scale", type=float, nargs=2, metavar=("LOW", "HIGH"), help="(paper: 0.05 0.4)")
    dino.add_argument("--local-size", type=int, help="of small crops (default 3/7 image size; paper: 96)")
    dino.add_argument("--jitter", type=float, nargs=4, metavar=tuple("BCSH"), help="(paper: .4 .4 .2 .1)")
    dino.add_argument("--grey", type=float, metavar="P", help="probability (paper: 0.2)")
    dino.add_argument("--blur", type=float, nargs=3, metavar="P",
                      help="probability on first large, second large, small crops (paper: 1 .1 .5)")
    dino.add_argument("--solarize", type=float, metavar="P", help="on the second large crop (paper: 0.2)")
    dino.add_argument("--momentum-teacher", type=float, help="rises to 1 along a cosine (paper: 0.99)")
    dino.add_argument("--student-temp", type=float, default=0.1, help="(default, paper: 0.1)")
    dino.add_argument("--teacher-temp", type=float, help="after its warm-up (paper: 0.07)")
    dino.add_argument("--warmup-teacher-temp", type=float, help="at the start (paper: 0.04)")
    dino.add_argument("--warmup-teacher-epochs", type=int, help="(paper: 30)")
    dino.add_argument("--center-momentum", type=float, default=0.9, help="(default, paper: 0.9; 1: none)")
    dino.add_argument("--freeze-last-layer", type=int, help="epochs; -1: all (paper: 1, small: -1)")
    dino.add_argument("--drop-path", type=float, help="of the student (paper: 0.1)")
    dino.add_argument("--koleo", type=float, help="weight of the term that spreads features (paper: 0)")
    common.add_views(dino, "horizontal")
    train.add_argument("--epochs", type=int, default=100)
    train.add_argument("--batch-size", type=int, help="over all processes (paper: 64, caron: 1024, small: 32)")
    train.add_argument("--accumulate", type=int, default=1, help="parts that a step's batch is split into")
    train.add_argument("--optimizer", choices=["adam", "adamw"], help="(paper: adam)")
    train.add_argument("--lr", type=float, help="peak (paper: 1e-4; of 256 images caron: 5e-4, small: 1e-3, CNNs 4e-3)")
    train.add_argument("--lr-batch", type=int, help="batch that --lr is of, scaled to --batch-size (paper: 0, not scaled)")
    train.add_argument("--min-lr", type=float, default=1e-6, help="(default, paper: 1e-6)")
    train.add_argument("--warmup-steps", type=int, help="of the rate (paper: 500), and")
    train.add_argument("--warmup-epochs", type=int, help="both up to half of all steps (caron: 10)")
    train.add_argument("--weight-decay", type=float, help="at the start, not on biases and norms (paper: 1e-5)")
    train.add_argument("--weight-decay-end", type=float, help="at the end of its cosine (paper: 0.4)")
    train.add_argument("--clip-grad", type=float, help="gradient norm (paper: 1; 0: off)")
    train.add_argument("--clip", choices=["all", "each"], help="norm of all gradients (paper), or of each tensor's")
    train.add_argument("--probe-every", type=int, default=5, help="epochs between k-NN probes (0: none)")
    train.add_argument("--keep", default="best", choices=["best", "last"],
                       help="teacher in model.pt: of the best k-NN probe (default, paper), or of the last epoch")
    train.add_argument("--on-collapse", default="warn", choices=["warn", "stop"], help="say so, or stop")
    groups["run"].add_argument("--preview", action="store_true", help="write crops.png and stop")
    groups["run"].add_argument("--export", metavar="FILE.safetensors", help="the backbone for timm as well")
    args = common.parse(parser, "pretrain_dino")
    if args.export and not args.export.endswith(".safetensors"):
        fail(f"--export {args.export}: the name must end in .safetensors")
    if args.export and not Path(args.export).resolve().parent.is_dir():
        fail(f"--export {args.export}: there is no such folder")
    return args


def apply_recipe(args, images, run):
    """Fill the flags that were not given from the recipe, in place, and check what hangs together."""
    if args.recipe == "auto":
        args.recipe = "small" if args.init == "random" and images < FEW else "paper"
    patch = common.patch_size(common.create(args.arch, 0, args.image_size, patch_size=args.patch_size))  # None: a CNN
    unit = patch or 16
    defaults = {**RECIPES[args.recipe], "local_size": max(1, round(args.image_size * 3 / 7 / unit)) * unit}  # 96 at 224
    if args.recipe == "small" and not patch:
        defaults |= SMALL_CNN
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if patch and args.local_size % patch:
        fail(f"--local-size {args.local_size} is no multiple of the {patch}-pixel patches of {args.arch}")
    if args.batch_size % args.accumulate:
        fail(f"--accumulate {args.accumulate} does not divide --batch-size {args.batch_size}")
    if args.batch_size == args.accumulate and args.local_crops == 1 and not patch:
        fail(f"--batch-size {args.batch_size}: the batch norm of {args.arch} needs at least 2 images in a part, or "
             "--local-crops 2")
    if images < args.batch_size:
        fail(f"--batch-size {args.batch_size} is more than the {images} training images")
    common.own_share(args.batch_size // args.accumulate, run, "--batch-size / --accumulate")


# ---------------------------------------------------------------- the method --------------------------------

class Head(torch.nn.Module):
    """Projection head (Caron et al. 2021, section 3.1 and appendix C): three layers of 2048, a bottleneck of
    256, L2 norm, a last layer whose rows have norm 1. Features (N, D) -> logits (N, out_dim) in [-1, 1]."""

    def __init__(self, dim, out_dim, norm="none", hidden=2048, bottleneck=256):
        super().__init__()
        layers = []
        for inputs in (dim, hidden):
            layers.append(torch.nn.Linear(inputs, hidden, bias=norm == "none"))
            if norm == "batch":
                layers.append(torch.nn.BatchNorm1d(hidden))
            layers.append(torch.nn.GELU())
        self.mlp = torch.nn.Sequential(*layers, torch.nn.Linear(hidden, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    torch.nn.init.zeros_(layer.bias)
        # the rows' length does not show in the output, but sets how fast the optimizer turns them
        self.last = torch.nn.Parameter(torch.empty(out_dim, bottleneck).uniform_(-1, 1) / bottleneck ** 0.5)

    def forward(self, x):
        """x (N, D) -> (N, out_dim)."""
        return F.normalize(self.mlp(x).float(), dim=-1) @ F.normalize(self.last, dim=-1).T


class Model(torch.nn.Module):
    """Backbone and head; crops of one resolution are one forward of the backbone, all are one of the head."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *crops):
        """Each of crops (N_i, 3, H_i, W_i) -> logits (sum N_i, out_dim), features of the first (N_0, D)."""
        features = [self.backbone(images) for images in crops]
        return self.head(torch.cat(features)), features[0]


def dino_loss(student, teacher, views, temp):
    """Mean cross-entropy between the teacher's output for one view and the student's for another.

    student (V * B, K) logits, view by view; teacher (2 * B, K) probabilities. Caron et al. 2021, eq. 3, with
    -sum p log softmax(s / temp) = logsumexp(s / temp) - <p, s> / temp, so that no pair needs its own softmax:
    the inner products of a teacher view with all other views are one product with their sum."""
    s = (student.float() / temp).unflatten(0, (views, -1))
    p = teacher.unflatten(0, (2, -1))
    counts = torch.full((views, 1), 2.0, device=s.device)  # a view is compared with both teacher views ...
    counts[:2] = 1  # ... but for the large ones, never with themselves
    normalisers = (s.logsumexp(-1) * counts).sum(0)
    others = s.sum(0) - s[:2]
    return ((normalisers - (p * others).sum((0, 2))) / counts.sum()).mean()


def koleo(features, run):
    """Mean of -log(distance to the nearest other image), features (N, D) L2-normalised first: low when they
    spread over the whole sphere (Sablayrolles et al. 2019; as used by Oquab et al. 2023, section 4). Without
    it a network from scratch maps few, alike images close together, and no teacher tells them apart.
    Neighbours are sought among the images of all processes."""
    x = F.normalize(features.float(), dim=1)
    others = [torch.empty_like(x) for _ in range(run.world)]
    if run.world > 1:
        torch.distributed.all_gather(others, x.detach().contiguous())
    others[run.rank] = x  # so the gradient is that of one's own rows
    x = torch.cat(others)
    with torch.no_grad():
        # exact, unlike a product in TF32, which cannot tell alike images' neighbours apart
        nearest = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(3).argmin(1)
    return -((x - x[nearest]).norm(dim=1) + 1e-8).log().mean()


def entropy(p):
    """Of distributions p (..., K), in nats: (...)."""
    return -(p * p.clamp(min=1e-30).log()).sum(-1)


def sinkhorn(logits, temp, run, iterations=3):
    """Teacher probabilities (N, K), equal columns over the global batch (Caron et al. 2020, eq. 3)."""
    q = ((logits - logits.amax(1, keepdim=True)) / temp).exp()
    for _ in range(iterations):
        q = q / common.all_reduce_mean(q.mean(0), run).clamp(min=1e-12)  # equal columns ...
        q = q / q.sum(1, keepdim=True)                            # ... then rows that sum to 1
    return q


def schedules(args, steps):
    """Per-step learning rate, weight decay and teacher momentum, per-epoch teacher temperature (Caron et al. 2021,
    section 3.2); `steps` an epoch."""
    total = args.epochs * steps
    warmup = min(args.warmup_steps + args.warmup_epochs * steps, total // 2)
    peak = args.lr * args.batch_size / args.lr_batch if args.lr_batch else args.lr
    lr = common.warmup_cosine(peak, args.min_lr, total, warmup, first=0)
    decay = common.cosine(args.weight_decay, args.weight_decay_end, total)
    momentum = common.cosine(args.momentum_teacher, 1, total)
    ramp = min(args.warmup_teacher_epochs, args.epochs)
    temp = np.full(args.epochs, args.teacher_temp, float)
    temp[:ramp] = np.linspace(args.warmup_teacher_temp, args.teacher_temp, ramp)
    return lr, decay, momentum, temp


def blur(images, draws, probability):
    """Gaussian blur, sigma uniform in [0.1, 2] pixels, with a probability a sample. images (B, C, S, S). A
    product with a band matrix from either side; at the border the weights are renormalised."""
    sigma = torch.where(draws.uniform() < probability, draws.uniform(low=0.1, high=2.0), 1e-3)
    place = torch.arange(images.shape[-1], device=images.device, dtype=torch.float32)
    weights = torch.exp(-(place[:, None] - place) ** 2 / (2 * sigma[:, None, None] ** 2))
    weights = (weights / weights.sum(2, keepdim=True))[:, None]
    return weights @ images @ weights.transpose(2, 3)


def grey(images, draws, probability):
    """Colour taken out, with a probability a sample. images (B, C, H, W)."""
    if images.shape[1] == 1:
        return images
    luma = common.upload(common.LUMA, images.device).view(1, 3, 1, 1)
    chosen = (draws.uniform() < probability).view(-1, 1, 1, 1)
    return torch.where(chosen, (images * luma).sum(1, keepdim=True), images)


def solarize(images, draws, probability):
    """Values from 1/2 up inverted, with a probability a sample. images (B, C, H, W) in [0, 1]."""
    chosen = (draws.uniform() < probability).view(-1, 1, 1, 1) & (images >= 0.5)
    return torch.where(chosen, 1 - images, images)


def make_crops(images, draws, args, mean, std):
    """The views of a batch, view by view: [large (2 * B, 3, S, S), small (local_crops * B, 3, s, s)]."""
    large, small = [], []
    for view in range(2 + args.local_crops):
        scale, side = (args.global_scale, args.image_size) if view < 2 else (args.local_scale, args.local_size)
        flips = common.random_flips(draws, args.flips)
        crop = common.crop_resize(images, common.random_boxes(draws, images.shape[1], scale), side, flips)
        crop = common.rotate(crop, common.random_angles(draws, args.rotate))
        crop = common.color_jitter(crop, draws, args.jitter)
        crop = grey(crop, draws, args.grey)
        crop = blur(crop, draws, args.blur[min(view, 2)])
        if view == 1:
            crop = solarize(crop, draws, args.solarize)
        (large if view < 2 else small).append(common.normalize(crop, mean, std))
    return [torch.cat(views) for views in (large, small) if views]


def losses(student, teacher, crops, temp, args, run):
    """(DINO loss, KoLeo term of the large crops, teacher's logits and probabilities (2 * B, K)) of crops as of
    make_crops, the teacher at temperature `temp`."""
    with torch.no_grad(), run.autocast():
        logits = teacher(crops[0])[0].float()
    if args.centering == "sinkhorn":
        target = sinkhorn(logits, temp, run)
    else:
        target = ((logits - teacher.center) / temp).softmax(-1)
    with run.autocast():
        output, large = student(*crops)
    loss = dino_loss(output, target, 2 + args.local_crops, args.student_temp)
    spread = sum(koleo(view, run) for view in large.chunk(2)) / 2 if args.koleo else 0
    return loss, spread, logits, target


# ---------------------------------------------------------------- training ----------------------------------

def build(args, run):
    """(student, teacher, pretrained_on): equal at the start, drop path in the student alone, a center in the teacher."""
    options = {"dynamic_img_size": True, "patch_size": args.patch_size}  # crops come in two resolutions
    drop_path = {"drop_path_rate": args.drop_path} if args.drop_path else {}
    try:
        backbone, pretrained_on = common.build_model(args.arch, args.init, args.image_size, 0, args.seed, args.init_key,
                                                     args.init_stats, **drop_path, **options)
    except TypeError:
        fail(f"--arch {args.arch} has no drop path; add --drop-path 0")
    student = Model(backbone, Head(backbone.num_features, args.out_dim, args.head_norm))
    teacher = Model(common.create(args.arch, 0, args.image_size, **options), copy.deepcopy(student.head))
    teacher.requires_grad_(False).load_state_dict(student.state_dict())
    teacher.register_buffer("center", torch.zeros(args.out_dim))
    student = common.to_device(student, run)
    teacher = common.sync_batch_norm(common.to_device(teacher, run), run)
    return student, teacher, pretrained_on


def train_epoch(student, wrapped, teacher, optimizer, scaler, dataset, args, run, epoch, plan):
    """One pass over the images. Returns {"loss", "entropy", "marginal_entropy", "images_per_second"}: the entropies, in
    nats, of the teacher's outputs and of their mean over a batch, means over the epoch. wrapped: the student for
    several processes; plan: as of schedules."""
    lr, decay, momentum, temps = plan
    rows = dataset.rows["train"]
    order = common.epoch_order(len(rows), args.batch_size, args.seed, epoch)
    part = args.batch_size // args.accumulate
    mine = common.own_share(part, run)
    torch.manual_seed(hash((args.seed, epoch, run.rank)) % 2 ** 31)  # of drop path
    student.train()
    teacher.train()  # its batch norm follows its own batches, as in the authors' code
    sums = torch.zeros(3, device=run.device)
    begin = time.time()
    batches = [rows[batch[i * part + mine]] for batch in order for i in range(args.accumulate)]
    loader = common.load_batches(dataset.images, batches, run.device)
    bar = tqdm(range(len(order)), f"epoch {epoch + 1}/{args.epochs}", leave=False, disable=run.rank > 0)
    for i in bar:
        step = epoch * len(order) + i
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])
        optimizer.param_groups[0]["weight_decay"] = float(decay[step])
        optimizer.zero_grad(set_to_none=True)
        means = []
        for j in range(args.accumulate):
            if run.world > 1:  # the processes' gradients are summed once a step, with the last part
                wrapped.require_backward_grad_sync = j == args.accumulate - 1
            draws = Draws((args.seed, epoch, i), args.batch_size, j * part + mine, run.device)
            crops = make_crops(next(loader), draws, args, dataset.mean, dataset.std)
            loss, spread, logits, target = losses(wrapped, teacher, crops, float(temps[epoch]), args, run)
            # DDP takes the mean of the processes' gradients, and of each one's own rows koleo needs the sum
            total = loss / args.accumulate + args.koleo * run.world * spread / args.accumulate
            scaler.scale(total).backward()
            sums[:2] += torch.stack([loss.detach(), entropy(target).mean()]) / args.accumulate
            means.append(torch.stack([logits.mean(0), target.mean(0)]))
        if epoch < args.freeze_last_layer or args.freeze_last_layer < 0:
            student.head.last.grad = None
        scaler.unscale_(optimizer)
        if args.clip_grad:
            tensors = [p for p in student.parameters() if p.grad is not None]
            for together in [tensors] if args.clip == "all" else [[p] for p in tensors]:
                torch.nn.utils.clip_grad_norm_(together, args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            center, marginal = common.all_reduce_mean(torch.stack(means).mean(0), run)
            teacher.center.lerp_(center, 1 - args.center_momentum)
            sums[2] += entropy(marginal)
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - float(momentum[step]))
        if (i + 1) % common.CHECK_EVERY == 0 or i + 1 == len(order):
            values = common.checked_mean(sums, i + 1, step, epoch, args.output, run)
            bar.set_postfix(loss=f"{values[0].item():.3f}")
    loss, mean_entropy, marginal_entropy = values.tolist()
    return {"loss": loss, "entropy": mean_entropy, "marginal_entropy": marginal_entropy,
            "images_per_second": len(order) * args.batch_size / (time.time() - begin)}


# ---------------------------------------------------------------- health ------------------------------------

def examine(backbone, dataset, args, run, probe):
    """The features of a backbone on up to 512 validation images: {"feature_std"}, the mean over dimensions of their
    standard deviation once L2-normalised, times sqrt(dim), so that 1 is as spread as can be and 0 is one point; with
    probe also {"knn"}, the accuracy of 20 neighbours out of up to 2048 training images."""
    def sample(name, most):
        rows = dataset.rows[name]
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int))]
        return rows, F.normalize(common.outputs(backbone, dataset, rows, args.image_size, run), dim=1)

    backbone.eval()
    asked, queries = sample("val", 512)
    result = {"feature_std": (queries.std(0).mean() * math.sqrt(queries.shape[1])).item()}
    if probe and dataset.task == "classes":
        rows, keys = sample("train", 2048)
        similarity, index = (queries @ keys.T).topk(min(20, len(keys)), dim=1)
        known = F.one_hot(torch.from_numpy(dataset.labels[rows]), len(dataset.classes))
        votes = known[index] * (similarity / 0.1).exp()[..., None]
        right = votes.sum(1).argmax(1) == torch.from_numpy(dataset.labels[asked])
        result["knn"] = right.float().mean().item()
        result["guess"] = float(np.bincount(dataset.labels[asked]).max() / len(asked))
    return result


def verdict(log, args):
    """One plain sentence if by the last epoch of log the teacher's output says nothing about the image, None if all is
    well. What it says is its mutual information with the image: the entropy of a batch's mean output less the mean
    entropy. That is small at the start of a healthy run too, but there it grows. log[0]: before training."""
    before, last = log[0], log[-1]
    told = [entry["marginal_entropy"] - entry["entropy"] for entry in log[1:]]
    most = math.log(args.out_dim)
    bound = math.log(min(args.out_dim, 2 * args.batch_size))
    silent = len(told) > 1 and told[-1] < 0.05 * bound and told[-1] < max(1.2 * told[-2], 0.005 * bound)
    if silent and last["entropy"] > most / 2:
        return (f"collapsed: every output is nearly uniform (the loss of knowing nothing is ln "
                f"{args.out_dim} = {most:.2f}); lower --teacher-temp, raise --koleo, or take --recipe small")
    if silent or last["feature_std"] < 0.1 * before["feature_std"]:
        return ("collapsed: every image gets the same output; raise --teacher-temp, lower --lr, or take "
                "--centering sinkhorn")
    return None


def draw_crops(path, dataset, args):
    """A row per image: the image, its two large crops, its small ones, as the student sees them."""
    rows = np.random.default_rng(args.seed).permutation(dataset.rows["train"])[:6]
    images = common.read_batch(dataset.images, rows)
    draws = Draws((args.seed, "preview"), len(rows), torch.arange(len(rows)), "cpu")
    pictures = [[common.in_proportion(dataset.images[row], dataset.sizes[row], dataset.fit, 256)] for row in rows]
    for crops in make_crops(images, draws, args, [0.0] * 3, [1.0] * 3):
        for view in (255 * crops).round().byte().permute(0, 2, 3, 1).split(len(rows)):
            for row, crop in zip(pictures, view.numpy()):
                row.append(crop)
    names = ["image", "large 1", "large 2", *(f"small {i + 1}" for i in range(args.local_crops))]
    common.draw_grid(path, pictures, [names] * len(rows), title=dataset.name)


def draw_curves(path, log, images, args):
    """Loss, entropies and k-NN by epoch (of `images`); the k-NN starts with that before training, at 0."""
    def line(key):
        seen = [entry for entry in log if key in entry]
        return [entry["epoch"] for entry in seen], [entry[key] for entry in seen]

    wall = ([1, len(log) - 1], [math.log(args.out_dim)] * 2)
    panels = [("loss", "nats", {"loss": line("loss"), "ln outputs": wall}),
              ("teacher entropy", "nats", {"per image": line("entropy"), "of the mean": line("marginal_entropy"),
                                           "ln outputs": wall})]
    if any("knn" in entry for entry in log):
        panels.append(("k-NN (20 neighbours)", "validation accuracy", {"teacher": line("knn")}))
    common.draw_curves(path, f"epoch of {images} images", panels)


# ---------------------------------------------------------------- the run -----------------------------------

def describe(entry, args):
    """The line that an epoch prints."""
    most = math.log(args.out_dim)
    knn = f"  k-NN {entry['knn']:.4f}" if "knn" in entry else ""
    return (f"epoch {entry['epoch']}/{args.epochs}  loss {entry['loss']:.3f}  entropy {entry['entropy']:.2f} "
            f"({entry['entropy'] / most:.0%} of ln {args.out_dim})  KL to uniform {most - entry['entropy']:.2f}  "
            f"feature std {entry['feature_std']:.3f}{knn}  {entry['images_per_second']:.1f} images/s")


def best_epoch(log, keep):
    """The epoch whose teacher is kept: that of the best k-NN, the first of equals, or the last one where there is none."""
    probed = [entry for entry in log[1:] if "knn" in entry]
    if keep == "last" or not probed:
        return log[-1]["epoch"]
    return max(probed, key=lambda entry: entry["knn"])["epoch"]


def stop_if_collapsed(log, args):
    """End the run where --on-collapse says so."""
    if log[-1].get("collapse") and args.on_collapse == "stop":
        fail(f"stopped after epoch {log[-1]['epoch']}, {log[-1]['collapse']}; the checkpoint is in {args.output}, "
             "--on-collapse warn goes on")


def export(path, weights):
    """The backbone as a .safetensors file for timm."""
    from safetensors.torch import save_file  # comes with timm
    common.write_atomic(path, lambda part: save_file({name: w.cpu().contiguous() for name, w in weights.items()}, part))


def fit(student, teacher, dataset, args, run, folder, pretrained_on):
    """Train from the last checkpoint to the last epoch, saving the teacher's backbone at each. Returns the log, whose
    first entry is from before training."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    optimizer = kind(common.parameter_groups(student), fused=run.device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp == "fp16")
    parts = {"student": student, "teacher": teacher, "optimizer": optimizer, "scaler": scaler}
    log = common.resume(folder, run, parts)
    wrapped = common.distribute(student, run, args.compile)
    if args.compile:
        teacher.forward = torch.compile(teacher.forward)
    images = len(dataset.rows["train"])
    plan = schedules(args, images // args.batch_size)
    if not log:
        log.append({"epoch": 0, **examine(teacher.backbone, dataset, args, run, args.probe_every)})
        say(f"before: feature std {log[0]['feature_std']:.3f}"
            + (f", k-NN {log[0]['knn']:.4f}" if "knn" in log[0] else ""))
    stop_if_collapsed(log, args)
    for epoch in range(len(log) - 1, args.epochs):
        begin = time.time()
        entry = {"epoch": epoch + 1}
        entry |= train_epoch(student, wrapped, teacher, optimizer, scaler, dataset, args, run, epoch, plan)
        due = epoch + 1 == args.epochs or (epoch + 1) % (args.probe_every or 5) == 0
        entry |= examine(teacher.backbone, dataset, args, run, args.probe_every and due)
        if not math.isfinite(entry["feature_std"]):  # of the last step, whose loss came before its update
            last = f"the last good checkpoint is {folder}/checkpoint.pt" if epoch else "lower --lr"
            fail(f"the weights are not finite after epoch {epoch + 1}; {last}")
        log.append(entry)
        entry |= {"collapse": verdict(log, args), "seconds": time.time() - begin}
        if run.rank == 0:
            if best_epoch(log, args.keep) == epoch + 1:
                weights = teacher.backbone.state_dict()
                common.save_model(folder / "model.pt", weights, dataset, args, task=dataset.task, classes=[],
                                  num_classes=0, pretrained_on=pretrained_on)
                if args.export:
                    export(args.export, weights)
            common.save_checkpoint(folder, parts, log)
            if due or entry["collapse"]:  # a picture takes as long as an epoch of few images
                draw_curves(folder / "curves.png", log, images, args)
        say(describe(entry, args))
        if entry["collapse"]:
            say(f"WARNING: {entry['collapse']}")
        stop_if_collapsed(log, args)
    return log


def main():
    """Load or build, train, watch, save."""
    args = arguments()
    run = common.start(args)
    dataset = common.load_dataset(args, ("train", "val"))
    apply_recipe(args, len(dataset.rows["train"]), run)
    if args.preview:  # touches no run
        folder = Path(args.output or ".")
        if run.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            draw_crops(folder / "crops.png", dataset, args)
            say(f"written: {folder / 'crops.png'}")
        return
    student, teacher, pretrained_on = build(args, run)
    sizes = [args.image_size, *[args.local_size] * bool(args.local_crops)]
    common.avoid_small_maps(student.backbone, sizes, run, args)
    folder = common.open_run(args, run, dataset, ["crops.png", "curves.png"])
    recipe = {name: getattr(args, name) for name in ["recipe", *PAPER, "local_size"]}
    say(", ".join(f"{name} {value}" for name, value in recipe.items()))
    if run.rank == 0:
        draw_crops(folder / "crops.png", dataset, args)
    log = fit(student, teacher, dataset, args, run, folder, pretrained_on)
    if run.rank > 0:
        return
    before, last = log[0], log[-1]
    kept = log[best_epoch(log, args.keep)]
    knn = f"; its k-NN {kept['knn']:.4f}, always guessing {kept['guess']:.4f}" if "knn" in kept else ""
    say(f"model.pt is the teacher of epoch {kept['epoch']} of {args.epochs}{knn}")
    if kept.get("knn", 1) <= kept.get("guess", 0):
        say("WARNING: the k-NN of its features does not beat always guessing the most frequent class")
    common.write_metrics(
        folder, dataset, run, args, pretrained_on=pretrained_on, settings=recipe, metric="knn", test={},
        val={"knn": kept.get("knn"), "guess": kept.get("guess"), "knn_before": before.get("knn"), "loss": last["loss"],
             "entropy": last["entropy"], "feature_std": last["feature_std"]},
        best_epoch=kept["epoch"],
        collapse=last["collapse"], epochs=args.epochs, **common.training_facts(student.backbone, log[1:]),
        summary=f"loss {last['loss']:.3f}, val k-NN {common.show(kept.get('knn'))}")


if __name__ == "__main__":
    common.launch(main)
