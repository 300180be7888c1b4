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
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import Draws, fail, say

# What the two recipes differ in; a flag on the command line goes before either. "paper" is meant for a start
# from ImageNet weights. "small" is for random weights and few images, where "paper" stays at ln outputs, the
# loss of knowing nothing, and its features get worse; BENCHMARKS.md has the ablation that led to it.
PAPER = {"batch_size": 64, "out_dim": 4096, "head_norm": "none", "centering": "mean", "teacher_temp": 0.07,
         "warmup_teacher_temp": 0.04, "warmup_teacher_epochs": 30, "momentum_teacher": 0.99, "koleo": 0.0,
         "local_crops": 6, "global_scale": [0.4, 1.0], "local_scale": [0.05, 0.4],
         "jitter": [0.4, 0.4, 0.2, 0.1], "grey": 0.2, "blur": [1.0, 0.1, 0.5], "solarize": 0.2, "lr": 5e-4,
         "warmup_epochs": 10, "weight_decay": 0.04, "weight_decay_end": 0.4, "freeze_last_layer": 1,
         "drop_path": 0.1}
RECIPES = {"paper": PAPER, "small": {
    **PAPER, "batch_size": 32, "out_dim": 1024, "head_norm": "batch", "centering": "sinkhorn",
    "teacher_temp": 0.025, "warmup_teacher_temp": 0.025, "warmup_teacher_epochs": 0, "koleo": 0.5,
    "local_crops": 2, "global_scale": [0.5, 1.0], "local_scale": [0.2, 0.5], "jitter": [0.2, 0.2, 0.1, 0.05],
    "blur": [0.1, 0.1, 0.1], "solarize": 0.0, "lr": 1e-3, "warmup_epochs": 1, "weight_decay_end": 0.04,
    "freeze_last_layer": -1, "drop_path": 0.0}}
SMALL_CNN = {"lr": 4e-3, "koleo": 0.2}  # CNNs stand a higher rate, at which a ViT's features get worse
SMALL = 20000  # images below which a start from random weights takes the small recipe


def arguments():
    """The command line."""
    parser, groups = common.make_parser(__doc__)
    dino, train = (parser.add_argument_group(name) for name in ("DINO (defaults: --recipe)", "training"))
    dino.add_argument("--recipe", default="auto", choices=["auto", *RECIPES],
                      help=f"defaults of the flags below; auto: small below {SMALL} images from random")
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
    train.add_argument("--epochs", type=int, default=100)
    train.add_argument("--batch-size", type=int, help="over all processes (recipe paper: 64, small: 32)")
    train.add_argument("--accumulate", type=int, default=1, help="parts that a step's batch is split into")
    train.add_argument("--lr", type=float,
                       help="of 256 images, scaled with --batch-size (paper: 5e-4; small: 1e-3, CNNs 4e-3)")
    train.add_argument("--min-lr", type=float, default=1e-6, help="(default, paper: 1e-6)")
    train.add_argument("--warmup-epochs", type=int, help="of the rate, up to half of all (paper: 10)")
    train.add_argument("--weight-decay", type=float, help="at the start (paper: 0.04)")
    train.add_argument("--weight-decay-end", type=float, help="at the end of its cosine (paper: 0.4)")
    train.add_argument("--clip-grad", type=float, default=3.0, help="gradient norm (default 3; 0: off)")
    train.add_argument("--probe-every", type=int, default=5, help="epochs between k-NN probes (0: none)")
    train.add_argument("--on-collapse", default="warn", choices=["warn", "stop"], help="say so, or stop")
    groups["run"].add_argument("--preview", action="store_true", help="write crops.png and stop")
    groups["run"].add_argument("--export", metavar="FILE.safetensors", help="the backbone for timm as well")
    args = common.parse(parser, "pretrain_dino")
    for name in ("global_scale", "local_scale"):
        low, high = getattr(args, name) or (0.5, 1)
        if not 0 < low <= high <= 1:
            fail(f"--{name.replace('_', '-')} {low} {high}: expected 0 < LOW <= HIGH <= 1")
    for name in ("local_crops", "koleo", "probe_every", "accumulate", "teacher_temp", "student_temp"):
        value, low = getattr(args, name), {"accumulate": 1}.get(name, 0)
        if value is not None and (value < low or value == 0 and name.endswith("temp")):
            fail(f"--{name.replace('_', '-')} {value}: too small")
    if args.export and not args.export.endswith(".safetensors"):
        fail(f"--export {args.export}: the name must end in .safetensors")
    if args.export and not Path(args.export).resolve().parent.is_dir():
        fail(f"--export {args.export}: there is no such folder")
    return args


def with_recipe(args, images, run):
    """The settings of this run: the flags that were given, the rest from the recipe."""
    small = args.init == "random" and images < SMALL
    name = args.recipe if args.recipe != "auto" else "small" if small else "paper"
    patches = getattr(common.create(args.arch, 0, args.image_size), "patch_embed", None)  # None: a CNN
    patch = getattr(patches, "patch_size", 16)
    patch = max(patch) if isinstance(patch, tuple) else patch
    defaults = {**RECIPES[name], **(SMALL_CNN if name == "small" and patches is None else {}),
                "local_size": max(1, round(args.image_size * 3 / 7 / patch)) * patch}  # 96 at 224
    given = {k: v for k, v in vars(args).items() if v is not None}
    settings = SimpleNamespace(**{**vars(args), **defaults, **given, "recipe": name})
    if patches is not None and settings.local_size % patch:
        fail(f"--local-size {settings.local_size} is no multiple of the {patch}-pixel patches of {args.arch}")
    if settings.batch_size % settings.accumulate:
        fail(f"--accumulate {settings.accumulate} does not divide --batch-size {settings.batch_size}")
    if images < settings.batch_size:
        fail(f"--batch-size {settings.batch_size} is more than the {images} training images")
    common.own_share(settings.batch_size // settings.accumulate, run, "--batch-size / --accumulate")
    return settings


# ---------------------------------------------------------------- the method --------------------------------

class Head(torch.nn.Module):
    """Projection head (Caron et al. 2021, section 3.1 and appendix C): three layers of 2048, a bottleneck of
    256, L2 norm, a last layer whose rows have norm 1. Features (N, D) -> logits (N, out_dim) in [-1, 1]."""

    def __init__(self, dim, out_dim, norm="none", hidden=2048, bottleneck=256):
        super().__init__()
        layers = []
        for inputs in (dim, hidden):
            layers += [torch.nn.Linear(inputs, hidden, bias=norm == "none"),
                       *([torch.nn.BatchNorm1d(hidden)] if norm == "batch" else []), torch.nn.GELU()]
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
    s, p = (student.float() / temp).unflatten(0, (views, -1)), teacher.unflatten(0, (2, -1))
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
    """Per-step learning rate, weight decay and teacher momentum, per-epoch teacher temperature (Caron et al.
    2021, section 3.2); `steps` an epoch."""
    def cosine(start, end, count):
        return end + (start - end) * (1 + np.cos(np.pi * np.arange(count) / max(1, count))) / 2
    total, peak = args.epochs * steps, args.lr * args.batch_size / 256
    warmup = min(args.warmup_epochs * steps, total // 2)
    lr = np.r_[np.linspace(0, peak, warmup, endpoint=False), cosine(peak, args.min_lr, total - warmup)]
    ramp = min(args.warmup_teacher_epochs, args.epochs)
    temp = np.full(args.epochs, args.teacher_temp, float)
    temp[:ramp] = np.linspace(args.warmup_teacher_temp, args.teacher_temp, ramp)
    decay = cosine(args.weight_decay, args.weight_decay_end, total)
    return lr, decay, cosine(args.momentum_teacher, 1, total), temp


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
    views, large, small = [], (args.global_scale, args.image_size), (args.local_scale, args.local_size)
    for view in range(2 + args.local_crops):
        scale, side = large if view < 2 else small
        flips = (draws.uniform(2) < 0.5) & common.upload([False, True], draws.device)
        crop = common.crop_resize(images, common.random_boxes(draws, images.shape[1], scale), side, flips)
        crop = grey(common.color_jitter(crop, draws, args.jitter), draws, args.grey)
        crop = blur(crop, draws, args.blur[min(view, 2)])
        crop = solarize(crop, draws, args.solarize) if view == 1 else crop
        views.append(common.normalize(crop, mean, std))
    return [torch.cat(part) for part in (views[:2], views[2:]) if part]


# ---------------------------------------------------------------- training ----------------------------------

def build(args, run):
    """(student, teacher, pretrained_on): equal at the start, drop path in the student alone."""
    options = {"dynamic_img_size": True}  # crops come in two resolutions
    try:
        drop_path = {"drop_path_rate": args.drop_path} if args.drop_path else {}
        backbone, pretrained_on = common.build_model(args, 0, **drop_path, **options)
    except TypeError:
        fail(f"--arch {args.arch} has no drop path; add --drop-path 0")
    student = Model(backbone, Head(backbone.num_features, args.out_dim, args.head_norm))
    teacher = Model(common.create(args.arch, 0, args.image_size, **options), copy.deepcopy(student.head))
    teacher.requires_grad_(False).load_state_dict(student.state_dict())
    return *(common.sync_batch_norm(common.to_device(m, run), run) for m in (student, teacher)), pretrained_on


def parameter_groups(model):
    """Weights with decay, biases and norms without."""
    return [{"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]


def train_epoch(state, dataset, args, run, epoch, plan):
    """One pass over the images. Returns {"loss", "entropy", "marginal_entropy", "images_per_second"}: the
    entropies, in nats, of the teacher's outputs and of their mean over a batch, means over the epoch."""
    lr, decay, momentum, temps = plan
    rows = dataset.rows["train"]
    order = common.epoch_order(len(rows), args.batch_size, args.seed, epoch)
    part = args.batch_size // args.accumulate
    mine = common.own_share(part, run, "--batch-size / --accumulate")
    views, temp = 2 + args.local_crops, float(temps[epoch])
    torch.manual_seed(hash((args.seed, epoch, run.rank)) % 2 ** 31)  # of drop path
    state.student.train()
    state.teacher.train()  # its batch norm follows its own batches, as in the authors' code
    sums, begin = torch.zeros(3, device=run.device), time.time()
    batches = [rows[batch[i * part + mine]] for batch in order for i in range(args.accumulate)]
    loader = common.load_batches(dataset.images, batches, run.device)
    bar = tqdm(range(len(order)), f"epoch {epoch + 1}/{args.epochs}", leave=False, disable=run.rank > 0)
    for i in bar:
        step = epoch * len(order) + i
        for group in state.optimizer.param_groups:
            group["lr"] = float(lr[step])
        state.optimizer.param_groups[0]["weight_decay"] = float(decay[step])
        state.optimizer.zero_grad(set_to_none=True)
        means = []
        for j in range(args.accumulate):
            if run.world > 1:  # the processes' gradients are summed once a step, with the last part
                state.wrapped.require_backward_grad_sync = j == args.accumulate - 1
            images = next(loader)
            draws = Draws((args.seed, epoch, i), args.batch_size, j * part + mine, run.device)
            crops = make_crops(images, draws, args, dataset.mean, dataset.std)
            with torch.no_grad(), run.autocast():
                logits = state.teacher(crops[0])[0].float()
            target = (sinkhorn(logits, temp, run) if args.centering == "sinkhorn" else
                      ((logits - state.center) / temp).softmax(-1))
            means.append(torch.stack([logits.mean(0), target.mean(0)]))
            with run.autocast():
                output, large = state.wrapped(*crops)
            loss = dino_loss(output, target, views, args.student_temp) / args.accumulate
            spread = sum(koleo(view, run) for view in large.chunk(2)) / 2 if args.koleo else 0
            # DDP takes the mean of the processes' gradients, and of each one's own rows koleo needs the sum
            total = loss + args.koleo * run.world * spread / args.accumulate
            state.scaler.scale(total).backward()
            sums[:2] += torch.stack([loss.detach(), entropy(target).mean() / args.accumulate])
        if epoch < args.freeze_last_layer or args.freeze_last_layer < 0:
            state.student.head.last.grad = None
        state.scaler.unscale_(state.optimizer)
        if args.clip_grad:
            torch.nn.utils.clip_grad_norm_(state.student.parameters(), args.clip_grad)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        with torch.no_grad():
            center, marginal = common.all_reduce_mean(torch.stack(means).mean(0), run)
            state.center.lerp_(center, 1 - args.center_momentum)
            sums[2] += entropy(marginal)
            torch._foreach_lerp_(list(state.teacher.parameters()), list(state.student.parameters()),
                                 1 - float(momentum[step]))
        if (i + 1) % 20 == 0 or i + 1 == len(order):
            values = common.checked_mean(sums, i + 1, step, epoch, args, run)
            bar.set_postfix(loss=f"{values[0].item():.3f}")
    loss, mean_entropy, marginal_entropy = values.tolist()
    return {"loss": loss, "entropy": mean_entropy, "marginal_entropy": marginal_entropy,
            "images_per_second": len(order) * args.batch_size / (time.time() - begin)}


def examine(state, dataset, args, run, probe):
    """The teacher's features on up to 512 validation images: {"feature_std"}, the mean over dimensions of
    their standard deviation once L2-normalised, times sqrt(dim), so that 1 is as spread as can be and 0 is
    one point; with probe also {"knn"}, the accuracy of 20 neighbours out of up to 2048 training images."""
    def sample(name, most):
        rows = dataset.rows[name]
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int))]
        return rows, F.normalize(common.extract(backbone, dataset, rows, args, run), dim=1)
    backbone = state.teacher.eval().backbone
    asked, queries = sample("val", 512)
    result = {"feature_std": (queries.std(0).mean() * math.sqrt(queries.shape[1])).item()}
    if probe and dataset.task == "classes":
        labels = dataset.labels[asked]
        rows, keys = sample("train", 2048)
        known = dataset.labels[rows]
        near, index = (queries @ keys.T).topk(min(20, len(keys)), dim=1)
        known = F.one_hot(torch.from_numpy(known), len(dataset.classes))
        votes = known[index] * (near / 0.07).exp()[..., None]
        result["knn"] = (votes.sum(1).argmax(1) == torch.from_numpy(labels)).float().mean().item()
    return result


def verdict(log, start, args):
    """One plain sentence if by the last epoch of log the teacher's output says nothing about the image, None
    if all is well. What it says is its mutual information with the image: the entropy of a batch's mean
    output less the mean entropy. That is small at the start of a healthy run too, but there it grows."""
    told, most = [e["marginal_entropy"] - e["entropy"] for e in log], math.log(args.out_dim)
    entry, bound = log[-1], math.log(min(args.out_dim, 2 * args.batch_size))
    silent = len(log) > 1 and told[-1] < 0.05 * bound and told[-1] < max(1.2 * told[-2], 0.005 * bound)
    if silent and entry["entropy"] > most / 2:
        return (f"collapsed: every output is nearly uniform (the loss of knowing nothing is ln "
                f"{args.out_dim} = {most:.2f}); lower --teacher-temp, raise --koleo, or take --recipe small")
    if silent or entry["feature_std"] < 0.1 * start["feature_std"]:
        return ("collapsed: every image gets the same output; raise --teacher-temp, lower --lr, or take "
                "--centering sinkhorn")
    return None


def save_model(path, state, dataset, args, pretrained_on):
    """model.pt: the teacher's backbone in timm's names, and what a later stage needs to use it."""
    weights = {k: v.cpu().contiguous() for k, v in state.teacher.backbone.state_dict().items()}
    content = {"stage": "pretrain_dino", "arch": args.arch, "init": args.init_label, "num_classes": 0,
               "image_size": args.image_size, "side": dataset.side, "fit": dataset.fit, "mean": dataset.mean, "std": dataset.std,
               "classes": [], "task": dataset.task, "dataset": dataset.name, "pretrained_on": pretrained_on,
               "state_dict": weights}
    common.write_atomic(path, lambda part: torch.save(content, part))
    if args.export:
        from safetensors.torch import save_file  # comes with timm
        common.write_atomic(args.export, lambda part: save_file(weights, part))


def draw_crops(path, dataset, args):
    """A row per image: the image, its two large crops, its small ones, as the student sees them."""
    rows = np.random.default_rng(args.seed).permutation(dataset.rows["train"])[:6]
    images = common.read_batch(dataset.images, rows)
    draws = Draws((args.seed, "preview"), len(rows), torch.arange(len(rows)), "cpu")
    views = [(255 * view.permute(0, 2, 3, 1)).round().byte().numpy() for crops in
             make_crops(images, draws, args, [0.0] * 3, [1.0] * 3) for view in crops.split(len(rows))]
    names = ["image", "large 1", "large 2", *(f"small {i + 1}" for i in range(args.local_crops))]
    pictures = []
    for i, row in enumerate(rows):
        whole = common.in_proportion(dataset.images[row], dataset.sizes[row], dataset.fit, 256)
        pictures.append([whole, *(view[i] for view in views)])
    common.draw_grid(path, pictures, [names] * len(rows), side=128, title=dataset.name)


def draw_curves(path, start, log, images, args):
    """Loss, entropies and k-NN by epoch (of `images`); the k-NN starts with that before training, at 0."""
    def line(label, key):
        seen = [e for e in ({**start, "epoch": 0}, *log) if key in e]
        return {"label": label, "x": [e["epoch"] for e in seen], "y": [e[key] for e in seen]}
    most = math.log(args.out_dim)
    wall = {"label": "ln outputs", "x": [1, len(log)], "y": [most, most], "kind": "dashed", "colour": 6}
    panels = [("loss", "nats", [line("loss", "loss"), wall]), ("teacher entropy", "nats", [
        line("per image", "entropy"), line("of the mean", "marginal_entropy"), wall])]
    if any("knn" in e for e in log):
        panels.append(("k-NN (20 neighbours)", "validation accuracy", [line("teacher", "knn")]))
    common.draw_plot(path, [{"title": title, "xlabel": f"epoch of {images} images", "ylabel": unit,
                             "series": series} for title, unit, series in panels], size=(480, 400))


def main():
    """Load or build, train, watch, save."""
    args = arguments()
    run = common.start(args)
    dataset = common.load_dataset(args, ("train", "val"))
    folder = Path(args.output or ".") if args.preview else common.open_run(args, run, dataset)
    images = len(dataset.rows["train"])
    settings = with_recipe(args, images, run)
    if args.preview:  # touches no run
        if run.rank > 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        draw_crops(folder / "crops.png", dataset, settings)
        return say(f"written: {folder / 'crops.png'}")
    student, teacher, pretrained_on = build(settings, run)
    common.write_args(folder, args, run, dataset, ["crops.png", "curves.png"])
    if run.rank == 0:
        draw_crops(folder / "crops.png", dataset, settings)
    recipe = {name: getattr(settings, name) for name in ["recipe", *PAPER, "local_size"]}
    say(", ".join(f"{name} {value}" for name, value in recipe.items()))

    optimizer = torch.optim.AdamW(parameter_groups(student), fused=run.device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp == "fp16")
    kept = {"student": student, "teacher": teacher, "optimizer": optimizer, "scaler": scaler}
    state = SimpleNamespace(**kept, wrapped=student, center=torch.zeros(settings.out_dim, device=run.device))
    log, checkpoint = [], common.load_checkpoint(folder, run)
    if checkpoint:
        if checkpoint["recipe"] != recipe:
            fail(f"{folder} was begun with other settings: {checkpoint['recipe']}; --overwrite begins again")
        for name, part in kept.items():
            part.load_state_dict(checkpoint[name])
        state.center, log = checkpoint["center"], checkpoint["log"]
        say(f"resuming {folder} after epoch {len(log)} of {args.epochs}")
    if run.world > 1:
        state.wrapped = torch.nn.parallel.DistributedDataParallel(student, broadcast_buffers=False)
    if args.compile:
        state.wrapped, teacher.forward = torch.compile(state.wrapped), torch.compile(teacher.forward)
    plan = schedules(settings, images // settings.batch_size)
    start = checkpoint["start"] if checkpoint else examine(state, dataset, settings, run, args.probe_every)
    say(f"before: feature std {start['feature_std']:.3f}"
        + (f", k-NN {start['knn']:.4f}" if "knn" in start else ""))

    def stop_if_collapsed():
        if log and log[-1]["collapse"] and args.on_collapse == "stop":
            fail(f"stopped after epoch {len(log)}, {log[-1]['collapse']}; the checkpoint is in {folder}, "
                 "--on-collapse warn goes on")

    stop_if_collapsed()
    for epoch in range(len(log), args.epochs):
        begin = time.time()
        entry = {"epoch": epoch + 1, **train_epoch(state, dataset, settings, run, epoch, plan)}
        probe = args.probe_every and (epoch + 1 == args.epochs or (epoch + 1) % args.probe_every == 0)
        entry |= examine(state, dataset, settings, run, probe)
        if not math.isfinite(entry["feature_std"]):  # of the last step, whose loss came before its update
            fail(f"the weights are not finite after epoch {epoch + 1}; the last good checkpoint is "
                 f"{folder}/checkpoint.pt" if log else "the weights are not finite after epoch 1; lower --lr")
        log.append(entry)
        entry |= {"collapse": verdict(log, start, settings), "seconds": time.time() - begin}
        if run.rank == 0:
            save_model(folder / "model.pt", state, dataset, args, pretrained_on)
            common.save_checkpoint(folder, {**{k: v.state_dict() for k, v in kept.items()}, "recipe": recipe,
                                            "center": state.center, "start": start, "log": log})
            draw_curves(folder / "curves.png", start, log, images, settings)
        most = math.log(settings.out_dim)
        knn = f"  k-NN {entry['knn']:.4f}" if "knn" in entry else ""
        say(f"epoch {epoch + 1}/{args.epochs}  loss {entry['loss']:.3f}  entropy {entry['entropy']:.2f} "
            f"({entry['entropy'] / most:.0%} of ln {settings.out_dim})  KL to uniform "
            f"{most - entry['entropy']:.2f}  feature std {entry['feature_std']:.3f}{knn}  "
            f"{entry['images_per_second']:.1f} images/s")
        if entry["collapse"]:
            say(f"WARNING: {entry['collapse']}")
        stop_if_collapsed()
    if run.rank > 0:
        return
    last = log[-1]
    common.write_json(folder / "metrics.json", {
        "stage": "pretrain_dino", "dataset": dataset.name, "arch": args.arch, "init": args.init_label,
        "pretrained_on": pretrained_on, "seed": args.seed, "settings": recipe, "metric": "knn",
        "val": {"knn": last.get("knn"), "knn_before": start.get("knn"), "loss": last["loss"],
                "entropy": last["entropy"], "feature_std": last["feature_std"]}, "test": {},
        "collapse": last["collapse"], "counts": dataset.counts, "split": dataset.fingerprint,
        "image_size": args.image_size, "epochs": args.epochs,
        "parameters": sum(p.numel() for p in student.backbone.parameters()),
        "seconds": sum(e["seconds"] for e in log), "device": common.device_name(run.device), "amp": run.amp,
        "images_per_second": float(np.median([e["images_per_second"] for e in log])), "world_size": run.world,
        "summary": f"loss {last['loss']:.3f}, val k-NN {common.show(last.get('knn'))}"})
    say(f"written: {folder}")


if __name__ == "__main__":
    common.launch(main)
