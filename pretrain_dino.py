"""Pretrain a backbone on a dataset's images without their labels, by self-distillation (DINO).

    python pretrain_dino.py --arch deit_tiny --image-size 96 --epochs 60
    torchrun --nproc_per_node 4 pretrain_dino.py --dataset folder --data-dir DIR --arch deit_small --init imagenet

Caron et al. 2021 (arXiv:2104.14294), as in Matsoukas et al. 2023, section 3. A student sees 2 large and several small
crops of an image, its teacher the 2 large ones; the student learns to give the output that the teacher gives for
another crop; the teacher is the moving average of the student. model.pt is the teacher's backbone, for --init of the
other stages. Each epoch prints a line of health, and a run that has collapsed is told so.
"""
import copy
import json
import math
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import Draws, fail, say

# What the two recipes differ in; a flag on the command line goes before either. "paper" is meant for a start from
# ImageNet weights; "small" for random weights and few images (BENCHMARKS.md has the ablation).
RECIPES = {
    "paper": {"out_dim": 4096, "head_norm": "none", "teacher_temp": 0.07, "warmup_teacher_temp": 0.04,
              "warmup_teacher_epochs": 30, "momentum_teacher": 0.99, "global_scale": [0.4, 1.0],
              "local_scale": [0.05, 0.4], "jitter": [0.4, 0.4, 0.2, 0.1], "lr": 5e-4, "warmup_epochs": 10,
              "weight_decay": 0.04, "weight_decay_end": 0.4, "drop_path": 0.1, "centering": "mean"},
    "small": {"out_dim": 1024, "head_norm": "batch", "teacher_temp": 0.04, "warmup_teacher_temp": 0.04,
              "warmup_teacher_epochs": 0, "momentum_teacher": 0.99, "global_scale": [0.4, 1.0],
              "local_scale": [0.15, 0.4], "jitter": [0.4, 0.4, 0.2, 0.1], "lr": 2e-3, "warmup_epochs": 3,
              "weight_decay": 0.04, "weight_decay_end": 0.04, "drop_path": 0.0, "centering": "sinkhorn"},
}
SMALL = 20000  # images below which a start from random weights takes the small recipe


def arguments():
    """The command line."""
    parser, groups = common.make_parser(__doc__)
    dino, train = parser.add_argument_group("DINO (defaults: --recipe)"), parser.add_argument_group("training")
    dino.add_argument("--recipe", default="auto", choices=["auto", "paper", "small"],
                      help=f"defaults of the flags below; auto: small below {SMALL} images from --init random")
    dino.add_argument("--out-dim", type=int, help="outputs of the head (paper: 4096)")
    dino.add_argument("--head-norm", choices=["none", "batch"], help="batch norm in the head (paper: none)")
    dino.add_argument("--centering", choices=["mean", "sinkhorn"], help="of the teacher's outputs (paper: mean)")
    dino.add_argument("--local-crops", type=int, default=6, help="small crops an image (default, paper: 6)")
    dino.add_argument("--global-scale", type=float, nargs=2, metavar=("LOW", "HIGH"), help="area (paper: 0.4 1)")
    dino.add_argument("--local-scale", type=float, nargs=2, metavar=("LOW", "HIGH"), help="(paper: 0.05 0.4)")
    dino.add_argument("--local-size", type=int, help="pixels of small crops (default 3/7 of image size; paper: 96)")
    dino.add_argument("--jitter", type=float, nargs=4, metavar=("B", "C", "S", "H"), help="(paper: .4 .4 .2 .1)")
    dino.add_argument("--momentum-teacher", type=float, help="rises to 1 along a cosine (paper: 0.99)")
    dino.add_argument("--student-temp", type=float, default=0.1, help="(default, paper: 0.1)")
    dino.add_argument("--teacher-temp", type=float, help="after its warm-up (paper: 0.07)")
    dino.add_argument("--warmup-teacher-temp", type=float, help="at the start (paper: 0.04)")
    dino.add_argument("--warmup-teacher-epochs", type=int, help="(paper: 30)")
    dino.add_argument("--center-momentum", type=float, default=0.9, help="(default, paper: 0.9; 1: no centring)")
    dino.add_argument("--freeze-last-layer", type=int, default=1, help="epochs (default, paper: 1)")
    dino.add_argument("--drop-path", type=float, help="of the student (paper: 0.1)")
    train.add_argument("--epochs", type=int, default=100)
    train.add_argument("--batch-size", type=int, default=64, help="images a step over all processes (default 64)")
    train.add_argument("--accumulate", type=int, default=1, help="split each step's batch into this many parts")
    train.add_argument("--lr", type=float, help="for 256 images a step, scaled with --batch-size (paper: 5e-4)")
    train.add_argument("--min-lr", type=float, default=1e-6, help="(default, paper: 1e-6)")
    train.add_argument("--warmup-epochs", type=int, help="of the learning rate (paper: 10)")
    train.add_argument("--weight-decay", type=float, help="at the start (paper: 0.04)")
    train.add_argument("--weight-decay-end", type=float, help="at the end of its cosine (paper: 0.4)")
    train.add_argument("--clip-grad", type=float, default=3.0, help="gradient norm (default 3; 0: off)")
    train.add_argument("--probe-every", type=int, default=5, help="epochs between k-NN probes (0: none)")
    train.add_argument("--on-collapse", default="warn", choices=["warn", "stop"], help="say so, or end the run")
    groups["run"].add_argument("--preview", action="store_true", help="write crops.png of a few images and stop")
    groups["run"].add_argument("--export", metavar="FILE.safetensors", help="write the backbone for timm as well")
    args = common.parse(parser)
    for name in ("global_scale", "local_scale"):
        low, high = getattr(args, name) or (0.5, 1)
        if not 0 < low <= high <= 1:
            fail(f"--{name.replace('_', '-')} {low} {high}: expected 0 < LOW <= HIGH <= 1")
    if args.accumulate < 1 or args.batch_size % args.accumulate:
        fail(f"--accumulate {args.accumulate} does not divide --batch-size {args.batch_size}")
    if args.export and not args.export.endswith(".safetensors"):
        fail(f"--export {args.export}: the name must end in .safetensors")
    return args


def with_recipe(args, images):
    """The settings of this run: the flags that were given, the rest from the recipe."""
    name = args.recipe
    if name == "auto":
        name = "small" if args.init == "random" and images < SMALL else "paper"
    given = {k: v for k, v in vars(args).items() if v is not None}
    settings = SimpleNamespace(**{**vars(args), **RECIPES[name], **given, "recipe": name})
    if settings.local_size is None:  # a multiple of the 16-pixel patches, 96 at 224
        settings.local_size = max(16, round(args.image_size * 3 / 7 / 16) * 16)
    return settings


# ---------------------------------------------------------------- the method ----------------------------------

class Head(torch.nn.Module):
    """Projection head (Caron et al. 2021, section 3.1 and appendix C): three layers of 2048, a bottleneck of 256,
    L2 norm, and a last layer whose rows have norm 1. Features (N, D) -> logits (N, out_dim) in [-1, 1]."""

    def __init__(self, dim, out_dim, norm="none", hidden=2048, bottleneck=256):
        super().__init__()
        layers = []
        for inputs in (dim, hidden):
            layers += [torch.nn.Linear(inputs, hidden, bias=norm == "none")]
            layers += [torch.nn.BatchNorm1d(hidden)] if norm == "batch" else []
            layers += [torch.nn.GELU()]
        self.mlp = torch.nn.Sequential(*layers, torch.nn.Linear(hidden, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.trunc_normal_(layer.weight, std=0.02)
        self.last = torch.nn.Parameter(torch.randn(out_dim, bottleneck))

    def forward(self, x):
        """x (N, D) -> (N, out_dim)."""
        return F.normalize(self.mlp(x).float(), dim=-1) @ F.normalize(self.last, dim=-1).T


class Model(torch.nn.Module):
    """Backbone and head; crops of one resolution are one forward of the backbone."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *crops):
        """Each of crops (N_i, 3, H_i, W_i) -> logits (sum N_i, out_dim)."""
        return self.head(torch.cat([self.backbone(images) for images in crops]))


def dino_loss(student, teacher, views, temp):
    """Mean cross-entropy between the teacher's output for one view and the student's for another.

    student (V * B, K) logits, view by view; teacher (2 * B, K) probabilities. Caron et al. 2021, eq. 3, with
    -sum p log softmax(s / temp) = logsumexp(s / temp) - <p, s> / temp, so that no pair needs its own softmax: the
    inner products of a teacher view with all other views are one product with their sum."""
    s, p = (student.float() / temp).unflatten(0, (views, -1)), teacher.unflatten(0, (2, -1))
    counts = torch.full((views, 1), 2.0, device=s.device)  # a view is compared with both teacher views ...
    counts[:2] = 1  # ... but for the large ones, never with themselves
    normalisers = (s.logsumexp(-1) * counts).sum(0)
    others = s.sum(0) - s[:2]
    return ((normalisers - (p * others).sum((0, 2))) / counts.sum()).mean()


def all_reduce_mean(value, run):
    """The mean over processes, in place."""
    if run.world > 1:
        dist.all_reduce(value)
        value /= run.world
    return value


def sinkhorn(logits, temp, run, iterations=3):
    """Teacher probabilities (N, K) whose columns get equal shares of the global batch (Caron et al. 2020, eq. 3)."""
    q = ((logits - logits.amax(1, keepdim=True)) / temp).exp()
    for _ in range(iterations):
        q = q / all_reduce_mean(q.mean(0), run).clamp(min=1e-12)  # equal columns ...
        q = q / q.sum(1, keepdim=True)                            # ... then rows that sum to 1
    return q


def schedules(args, steps):
    """Per-step learning rate, weight decay and teacher momentum, per-epoch teacher temperature (Caron et al. 2021,
    section 3.2); `steps` an epoch."""
    def cosine(start, end, count):
        return end + (start - end) * (1 + np.cos(np.pi * np.arange(count) / max(1, count))) / 2
    total, peak = args.epochs * steps, args.lr * args.batch_size / 256
    warmup = min(args.warmup_epochs * steps, total // 2)
    lr = np.concatenate([np.linspace(0, peak, warmup, endpoint=False), cosine(peak, args.min_lr, total - warmup)])
    ramp = min(args.warmup_teacher_epochs, args.epochs)
    temp = np.concatenate([np.linspace(args.warmup_teacher_temp, args.teacher_temp, ramp),
                           np.full(args.epochs - ramp, args.teacher_temp)])
    return (lr, cosine(args.weight_decay, args.weight_decay_end, total), cosine(args.momentum_teacher, 1, total), temp)


def blur(images, draws, probability):
    """Gaussian blur, sigma uniform in [0.1, 2] pixels, with a probability a sample. images (B, C, S, S). A product
    with a band matrix from either side; at the border the weights are renormalised."""
    sigma = torch.where(draws.uniform() < probability, draws.uniform(low=0.1, high=2.0), 1e-3)
    place = torch.arange(images.shape[-1], device=images.device, dtype=torch.float32)
    weights = torch.exp(-(place[:, None] - place) ** 2 / (2 * sigma[:, None, None] ** 2))
    weights = (weights / weights.sum(2, keepdim=True))[:, None]
    return weights @ images @ weights.transpose(2, 3)


def grey(images, draws, probability=0.2):
    """Colour taken out, with a probability a sample. images (B, C, H, W)."""
    if images.shape[1] == 1:
        return images
    luma = torch.tensor(common.LUMA, device=images.device).view(1, 3, 1, 1)
    chosen = (draws.uniform() < probability).view(-1, 1, 1, 1)
    return torch.where(chosen, (images * luma).sum(1, keepdim=True), images)


def solarize(images, draws, probability):
    """Values from 1/2 up inverted, with a probability a sample. images (B, C, H, W) in [0, 1]."""
    chosen = (draws.uniform() < probability).view(-1, 1, 1, 1)
    return torch.where(chosen & (images >= 0.5), 1 - images, images)


def make_crops(images, sizes, draws, args, mean, std):
    """The views of a batch: large (2 * B, 3, S, S) and small (local_crops * B, 3, s, s), view by view."""
    large, small = [], []
    for view in range(2 + args.local_crops):
        is_large = view < 2
        scale, side = (args.global_scale, args.image_size) if is_large else (args.local_scale, args.local_size)
        flips = (draws.uniform(2) < 0.5) & torch.tensor([False, True], device=draws.device)
        crop = common.crop_resize(images, common.random_boxes(draws, sizes, scale), side, flips)
        crop = grey(common.color_jitter(crop, draws, args.jitter), draws)
        crop = blur(crop, draws, (1.0, 0.1)[view] if is_large else 0.5)
        crop = solarize(crop, draws, 0.2) if view == 1 else crop
        (large if is_large else small).append(common.normalize(crop, mean, std))
    return torch.cat(large), torch.cat(small) if small else None


# ---------------------------------------------------------------- training ------------------------------------

def build(args, run):
    """(student, teacher, pretrained_on): equal at the start, drop path in the student alone."""
    backbone, pretrained_on = common.build_model(args, 0, drop_path_rate=args.drop_path, dynamic_img_size=True)
    student = Model(backbone, Head(backbone.num_features, args.out_dim, args.head_norm))
    plain = common.create(args.arch, 0, args.image_size, dynamic_img_size=True)
    teacher = Model(plain, copy.deepcopy(student.head))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    student, teacher = (common.sync_batch_norm(common.to_device(model, run), run) for model in (student, teacher))
    return student, teacher, pretrained_on


def parameter_groups(model):
    """Weights with decay, biases and norms without."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def train_epoch(state, dataset, args, run, epoch, plan):
    """One pass over the images. Returns {"loss", "entropy", "marginal_entropy", "images_per_second"}: entropies of the
    teacher's outputs, mean over images and of the mean output, in nats."""
    lr, decay, momentum, temps = plan
    split = dataset.splits["train"]
    order = common.epoch_order(len(split), args.batch_size, args.seed, epoch)
    part = args.batch_size // args.accumulate
    mine = common.own_share(part, run, "--batch-size / --accumulate")
    views, temp = 2 + args.local_crops, float(temps[epoch])
    torch.manual_seed(hash((args.seed, epoch)) % 2 ** 31)
    state.student.train()
    state.teacher.train()  # its batch norm follows its own batches, as in the authors' code
    sums, mean_output, begin = torch.zeros(2, device=run.device), 0, time.time()
    batches = [split.rows[batch[i * part + mine]] for batch in order for i in range(args.accumulate)]
    loader = common.load_batches(dataset.store, batches, run.device)
    bar = tqdm(range(len(order)), f"epoch {epoch + 1}/{args.epochs}", leave=False, disable=run.rank > 0)
    for i in bar:
        step = epoch * len(order) + i
        for group in state.optimizer.param_groups:
            group["lr"] = float(lr[step])
        state.optimizer.param_groups[0]["weight_decay"] = float(decay[step])
        state.optimizer.zero_grad(set_to_none=True)
        centers = []
        for j in range(args.accumulate):
            images, sizes = next(loader)
            draws = Draws((args.seed, epoch, i, j), part, mine, run.device)
            large, small = make_crops(images, sizes, draws, args, dataset.mean, dataset.std)
            with torch.no_grad(), run.autocast():
                logits = state.teacher(large).float()
            if args.centering == "sinkhorn":
                target = sinkhorn(logits, temp, run)
            else:
                target = ((logits - state.center) / temp).softmax(-1)
            centers.append(logits.mean(0))
            with run.autocast():
                output = state.wrapped(large, *([small] if small is not None else []))
            loss = dino_loss(output, target, views, args.student_temp) / args.accumulate
            state.scaler.scale(loss).backward()
            entropy = -(target * target.clamp(min=1e-30).log()).sum(1).mean()
            sums += torch.stack([loss.detach(), entropy / args.accumulate])
            mean_output = mean_output + target.mean(0) / args.accumulate
        if epoch < args.freeze_last_layer:
            state.student.head.last.grad = None
        state.scaler.unscale_(state.optimizer)
        if args.clip_grad:
            torch.nn.utils.clip_grad_norm_(state.student.parameters(), args.clip_grad)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        with torch.no_grad():
            center = all_reduce_mean(torch.stack(centers).mean(0), run)
            state.center.lerp_(center, 1 - args.center_momentum)
            torch._foreach_lerp_(list(state.teacher.parameters()), list(state.student.parameters()),
                                 1 - float(momentum[step]))
        if (i + 1) % 20 == 0 or i + 1 == len(order):
            values = all_reduce_mean(sums / (i + 1), run)
            if not torch.isfinite(values[0]):
                fail(f"the loss is not finite by step {step + 1} (epoch {epoch + 1}); the last good checkpoint is "
                     f"{args.output}/checkpoint.pt; lower --lr, or try --amp off")
            bar.set_postfix(loss=f"{values[0].item():.3f}")
    p = all_reduce_mean(mean_output / len(order), run)
    return {"loss": values[0].item(), "entropy": values[1].item(),
            "marginal_entropy": -(p * p.clamp(min=1e-30).log()).sum().item(),
            "images_per_second": len(order) * args.batch_size / (time.time() - begin)}


def examine(state, dataset, args, run, probe):
    """The teacher's features on up to 512 validation images: {"feature_std"}, the mean over dimensions of their
    standard deviation once L2-normalised, times sqrt(dim), so that 1 is as spread as can be and 0 is one point; with
    probe also {"knn"}, the accuracy of 20 neighbours out of up to 2048 training images."""
    state.teacher.eval()
    spread = lambda split, most: split.take(  # noqa: E731
        np.unique(np.linspace(0, len(split) - 1, min(len(split), most)).astype(int)))
    val = spread(dataset.splits["val"], 512)
    queries = F.normalize(common.extract(state.teacher.backbone, dataset, val, args, run), dim=1)
    result = {"feature_std": (queries.std(0).mean() * math.sqrt(queries.shape[1])).item()}
    if probe and val.labels is not None and val.labels.ndim == 1:
        train = spread(dataset.splits["train"], 2048)
        keys = F.normalize(common.extract(state.teacher.backbone, dataset, train, args, run), dim=1)
        near, index = (queries @ keys.T).topk(min(20, len(keys)), dim=1)
        votes = F.one_hot(torch.from_numpy(train.labels), len(dataset.classes))[index] * (near / 0.07).exp()[..., None]
        result["knn"] = (votes.sum(1).argmax(1) == torch.from_numpy(val.labels)).float().mean().item()
    return result


def verdict(entry, args):
    """One plain sentence if the teacher's output says nothing about the image, None if all is well. What an output
    tells about its image is its mutual information: the entropy of the mean output less the mean entropy."""
    most = math.log(args.out_dim)
    if entry["marginal_entropy"] < 0.1 * most or entry["feature_std"] < 0.02:
        return ("collapsed: every image gets the same output; raise --teacher-temp, lower --center-momentum to 0.9 "
                "or take --centering sinkhorn")
    if entry["entropy"] > 0.97 * most:
        return (f"collapsed: every output is nearly uniform (the loss of knowing nothing is ln {args.out_dim} = "
                f"{most:.2f}); lower --teacher-temp, raise --lr, or take --recipe small")
    return None


def save_model(path, state, dataset, args, pretrained_on):
    """model.pt: the teacher's backbone in timm's names, and what a later stage needs to use it."""
    weights = {k: v.cpu().contiguous() for k, v in state.teacher.backbone.state_dict().items()}
    content = {"stage": "pretrain_dino", "arch": args.arch, "init": args.init_label, "num_classes": 0, "image_size": args.image_size,
               "resize": args.resize, "mean": dataset.mean, "std": dataset.std, "classes": [], "task": dataset.task,
               "dataset": dataset.name, "pretrained_on": pretrained_on, "state_dict": weights}
    common.write_atomic(path, lambda part: torch.save(content, part))
    if args.export:
        from safetensors.torch import save_file  # comes with timm
        common.write_atomic(args.export, lambda part: save_file(weights, part))


def draw_crops(path, dataset, args):
    """A row per image: the image, its two large crops, its small ones, as the student sees them."""
    rows = dataset.splits["train"].rows[np.linspace(0, len(dataset.splits["train"]) - 1, 6).astype(int)]
    images, sizes = common.read_batch(dataset.store, rows)
    draws = Draws((args.seed, "preview"), len(rows), torch.arange(len(rows)), "cpu")
    large, small = make_crops(images, sizes, draws, args, [0.0] * 3, [1.0] * 3)
    shown = lambda crop: (255 * crop.permute(1, 2, 0)).round().byte().numpy()  # noqa: E731
    views = [*large.chunk(2), *(small.chunk(args.local_crops) if small is not None else [])]
    names = ["image", "large 1", "large 2", *(f"small {i + 1}" for i in range(args.local_crops))]
    common.draw_grid(path, [[dataset.store.image(row), *(shown(view[i]) for view in views)]
                            for i, row in enumerate(rows)], [names] * len(rows), side=128, title=dataset.name)


def draw_curves(path, log, args):
    """Loss, entropies and k-NN by epoch."""
    epochs, most = [e["epoch"] for e in log], math.log(args.out_dim)
    probed = [e for e in log if "knn" in e]
    line = lambda label, key: {"label": label, "x": epochs, "y": [e[key] for e in log]}  # noqa: E731
    wall = {"label": "ln outputs", "x": [epochs[0], epochs[-1]], "y": [most, most], "kind": "dashed", "colour": 6}
    panels = [{"title": "loss", "xlabel": "epoch", "ylabel": "nats", "series": [line("loss", "loss"), wall]},
              {"title": "teacher entropy", "xlabel": "epoch", "ylabel": "nats", "series": [
                  line("per image", "entropy"), line("of the mean", "marginal_entropy"), wall]}]
    if probed:
        panels.append({"title": "k-NN (20 neighbours)", "xlabel": "epoch", "ylabel": "validation accuracy", "series": [
            {"label": "teacher", "x": [e["epoch"] for e in probed], "y": [e["knn"] for e in probed]}]})
    common.draw_plot(path, panels, size=(480, 400))


def main():
    """Load or build, train, watch, save."""
    args = arguments()
    run = common.start(args)
    common.own_share(args.batch_size // args.accumulate, run, "--batch-size / --accumulate")
    folder = common.open_run(args, run, "pretrain_dino")
    dataset = common.load_dataset(args)
    settings = with_recipe(args, len(dataset.splits["train"]))
    steps = len(dataset.splits["train"]) // args.batch_size
    if not steps:
        fail(f"--batch-size {args.batch_size} is more than the {len(dataset.splits['train'])} training images")
    student, teacher, pretrained_on = build(settings, run)
    common.write_args(folder, args, run, ["crops.png", "curves.png"])
    if run.rank == 0:
        draw_crops(folder / "crops.png", dataset, settings)
    if args.preview:
        return say(f"written: {folder}/crops.png")
    say(f"recipe {settings.recipe}: " + ", ".join(f"{k} {getattr(settings, k)}" for k in RECIPES["paper"]))

    optimizer = torch.optim.AdamW(parameter_groups(student), fused=run.device.type in ("cpu", "cuda"))
    state = SimpleNamespace(student=student, teacher=teacher, optimizer=optimizer, wrapped=student,
                            scaler=torch.amp.GradScaler(run.device.type, enabled=run.amp == "fp16"),
                            center=torch.zeros(settings.out_dim, device=run.device))
    log, checkpoint = [], common.load_checkpoint(folder, run)
    if checkpoint:
        for name in ("student", "teacher", "optimizer", "scaler"):
            getattr(state, name).load_state_dict(checkpoint[name])
        state.center, log = checkpoint["center"], checkpoint["log"]
        say(f"resuming {folder} after epoch {len(log)} of {args.epochs}")
    if run.world > 1:
        state.wrapped = torch.nn.parallel.DistributedDataParallel(student, broadcast_buffers=False)
    if args.compile:
        state.wrapped, state.teacher.forward = torch.compile(state.wrapped), torch.compile(state.teacher.forward)
    plan, start = schedules(settings, steps), examine(state, dataset, settings, run, args.probe_every)
    say(f"before: feature std {start['feature_std']:.3f}, k-NN {common.show(start.get('knn'))}")

    for epoch in range(len(log), args.epochs):
        begin = time.time()
        entry = {"epoch": epoch + 1, **train_epoch(state, dataset, settings, run, epoch, plan)}
        last = epoch + 1 == args.epochs
        probe = args.probe_every and (last or (epoch + 1) % args.probe_every == 0)
        entry |= examine(state, dataset, settings, run, probe)
        entry |= {"collapse": verdict(entry, settings), "seconds": time.time() - begin}
        log.append(entry)
        if run.rank == 0:
            save_model(folder / "model.pt", state, dataset, args, pretrained_on)
            common.write_atomic(folder / "checkpoint.pt", lambda part: torch.save(
                {"student": student.state_dict(), "teacher": teacher.state_dict(), "center": state.center, "log": log,
                 "optimizer": optimizer.state_dict(), "scaler": state.scaler.state_dict()}, part))
            common.write_atomic(folder / "log.jsonl", lambda part: part.write_text(
                "".join(json.dumps(e) + "\n" for e in log)))
            draw_curves(folder / "curves.png", log, settings)
        most = math.log(settings.out_dim)
        say(f"epoch {epoch + 1}/{args.epochs}  loss {entry['loss']:.3f}  entropy {entry['entropy']:.2f} "
            f"({entry['entropy'] / most:.0%} of ln {settings.out_dim})  KL to uniform {most - entry['entropy']:.2f}  "
            f"feature std {entry['feature_std']:.3f}" + (f"  k-NN {entry['knn']:.4f}" if "knn" in entry else "")
            + f"  {entry['images_per_second']:.1f} images/s")
        if entry["collapse"] and epoch > 0:
            say(f"WARNING: {entry['collapse']}")
            if args.on_collapse == "stop":
                fail(f"stopped in epoch {epoch + 1}, {entry['collapse']}; the checkpoint is in {folder}")
    if run.rank > 0:
        return
    common.write_json(folder / "metrics.json", {
        "stage": "pretrain_dino", "dataset": dataset.name, "arch": args.arch, "init": args.init_label,
        "pretrained_on": pretrained_on, "seed": args.seed, "recipe": settings.recipe, "metric": "knn",
        "val": {"knn": log[-1].get("knn"), "knn_before": start.get("knn"), "loss": log[-1]["loss"],
                "entropy": log[-1]["entropy"], "feature_std": log[-1]["feature_std"]}, "test": {},
        "collapse": log[-1]["collapse"], "counts": dataset.counts, "split": dataset.split_id, "image_size": args.image_size,
        "epochs": args.epochs, "parameters": sum(p.numel() for p in student.backbone.parameters()),
        "seconds": sum(e["seconds"] for e in log), "device": common.device_name(run.device), "amp": run.amp,
        "images_per_second": float(np.median([e["images_per_second"] for e in log])), "world_size": run.world,
        "summary": f"loss {log[-1]['loss']:.3f}, val k-NN {common.show(log[-1].get('knn'))}"})
    say(f"written: {folder}")


if __name__ == "__main__":
    common.launch(main)
