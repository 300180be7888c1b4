"""What each stage takes on this machine, beside what a user would write or install instead.

    python tests/bench.py
    python tests/bench.py --quick --stage knn open

The plain sides are as a user would first write them: fp32, torchvision's ImageFolder and transforms in worker processes; or
they are scikit-learn. The data path is included. Each side lives in a process of its own, which gives its peak memory: with
all imports, without a DataLoader's workers; on CUDA what PyTorch held there. After a pass to warm up the sides take turns in
short passes. Speeds are medians over the rounds; "times" is the median of the ratios within a round, [its quartiles], as a
machine that slows down for a while slows both; a row whose quartiles lie more than a quarter of it apart is unsettled. "Of
products": the arithmetic of our pass, by PyTorch's counter, as a share of what products of 2048 x 2048 x 2048 then reach.
"""
import argparse
import copy
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # before PyTorch, whose threads it tells how to wait
import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2 as T
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import attn_distance
import finetune
import knn_eval
import prepare
import pretrain_dino
import segment

SIDE = 224
WORKERS = min(16, os.cpu_count() or 1)
AUGMENT = [T.RandomHorizontalFlip(), T.RandomVerticalFlip(), T.RandomApply([T.ColorJitter(0.2, 0.2, 0.1, 0.1)], 0.8)]
NORMALIZE = [T.ToImage(), T.ToDtype(torch.float32, scale=True), T.Normalize([0.5] * 3, [0.25] * 3)]  # of images alone
CENTRE = T.Compose([T.Resize(256), T.CenterCrop(SIDE), *NORMALIZE])


def write_photographs(folder, count):
    """photographs/train/CLASS/*.jpg of 360x360, masks as *_mask.png; them prepared; large/*.jpg, *.png of 2048x1536."""
    for i in range(count):
        path = folder / "photographs" / "train" / "abcd"[i % 4] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels, mask = prepare.draw_lesion(i, 360)
        Image.fromarray(pixels).save(path, quality=90)
        Image.fromarray(255 * mask.astype(np.uint8)).save(path.with_name(f"{i}_mask.png"))
    prepare.main([str(folder / "photographs"), "--output", str(folder / "prepared")])
    (folder / "large").mkdir()
    for i in range(8):
        smooth = Image.fromarray(prepare.draw_lesion(i, 512)[0]).resize((2048, 1536))
        noise = np.random.default_rng(i).normal(0, 4, (1536, 2048, 3))  # of a sensor: smooth pictures decode too fast
        pixels = (smooth + noise).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "large" / f"{i}.jpg", quality=92)
        Image.fromarray((pixels.mean(2) * 257).astype(np.uint16)).save(folder / "large" / f"{i}.png")


def start_stage(stage, folder, device, count, *flags):
    """(arguments, run, dataset with `count` training images) of a stage, as its command line would give them."""
    sys.argv = [stage.__name__, "--data", str(folder / "prepared"), "--device", device, *map(str, flags)]
    args = stage.arguments()
    run = common.start(args)
    dataset = common.open_dataset(args.data)
    dataset.rows["train"] = np.arange(count) % len(dataset.paths)
    return args, run, dataset


def image_and_mask(path):
    """What a segmentation's dataset reads."""
    mask = Image.open(path.replace(".jpg", "_mask.png"))
    return Image.open(path).convert("RGB"), torchvision.tv_tensors.Mask(np.array(mask) // 255)


def plain_loader(folder, transform, batch, count, **options):
    """`count` photographs in batches, decoded and transformed by worker processes."""
    files = torchvision.datasets.ImageFolder(
        folder / "photographs" / "train", transform, is_valid_file=lambda path: path.endswith(".jpg"), **options)
    sampler = torch.utils.data.RandomSampler(files, num_samples=count)
    return torch.utils.data.DataLoader(files, batch, sampler=sampler, num_workers=WORKERS)


def plain_pass(function, loader, device):
    """A loop over images, which keeps nothing."""
    for images, _ in loader:
        function(images.to(device))


def plain_epoch(model, optimizer, loader, loss_of):
    """A training loop."""
    for images, labels in loader:
        loss = loss_of(images, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


# A side sets up and returns a function that does one pass: over `count` of the options of a case, which both sides take.

def finetune_ours(folder, device, arch, count, batch):
    args, run, dataset = start_stage(finetune, folder, device, count, "--batch-size", batch)
    model = common.to_device(common.create(arch, 4, SIDE), run)
    optimizer, scaler, _, _ = common.start_training(model, args, run, folder)
    rates = np.full(count // batch, args.lr)
    return partial(finetune.train_epoch, model, optimizer, scaler, dataset, args, run, 0, rates)


def finetune_plain(folder, device, arch, count, batch):
    model = timm.create_model(common.ARCHS[arch], num_classes=4).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, weight_decay=1e-5)
    view = T.Compose([T.RandomResizedCrop(SIDE, (0.8, 1)), *AUGMENT, *NORMALIZE])

    def loss_of(images, labels):
        return F.cross_entropy(model(images.to(device)), labels.to(device))
    return partial(plain_epoch, model, optimizer, plain_loader(folder, view, batch, count), loss_of)


def features_ours(folder, device, arch, count, batch):
    _, run, dataset = start_stage(knn_eval, folder, device, count)
    model = common.to_device(common.create(arch, 0, SIDE), run).eval()
    return partial(knn_eval.extract, model, dataset, dataset.rows["train"], SIDE, run, batch_size=batch)


def features_plain(folder, device, arch, count, batch):
    model = timm.create_model(common.ARCHS[arch], num_classes=0).to(device).eval().requires_grad_(False)
    return partial(plain_pass, model, plain_loader(folder, CENTRE, batch, count), device)


def knn_ours(folder, device, train, count):
    start_stage(knn_eval, folder, device, 1)
    torch.backends.cuda.matmul.allow_tf32 = False  # as knn_eval.py has it
    features = F.normalize(torch.randn(train + count, 384), dim=1).to(device)
    labels = torch.eye(2, device=device)[torch.arange(train) % 2]
    return partial(common.vote, features[:train], labels, features[train:], [200], 0.07)


def knn_plain(folder, device, train, count):  # scikit-learn has it on the CPU alone
    features = F.normalize(torch.randn(train + count, 384), dim=1).numpy()
    labels = np.eye(2)[np.arange(train) % 2]
    search = NearestNeighbors(n_neighbors=200, metric="cosine", algorithm="brute").fit(features[:train])

    def one_pass():
        distance, index = search.kneighbors(features[train:])
        weights = np.exp((1 - distance) / 0.07)[:, :, None]
        return (weights * labels[index]).sum(1) / weights.sum(1)
    return one_pass


def dino_ours(folder, device, arch, count, batch, crops, outputs):
    flags = ["--arch", arch, "--batch-size", batch, "--local-crops", crops, "--out-dim", outputs, "--recipe", "paper"]
    args, run, dataset = start_stage(pretrain_dino, folder, device, count, *flags)
    pretrain_dino.apply_recipe(args, count, run)
    student, teacher, _ = pretrain_dino.build(args, run)
    optimizer = torch.optim.Adam(common.parameter_groups(student), fused=True)
    scaler = torch.amp.GradScaler(device, enabled=run.amp == "fp16")
    plan = pretrain_dino.schedules(args, count // batch)
    # epoch 1, as in epoch 0 the last layer is frozen
    return partial(pretrain_dino.train_epoch, student, student, teacher, optimizer, scaler, dataset, args, run, 1, plan)


def dino_views(crops, image):
    """DINO's views of an image, two large, the others small; blur, solarize: probabilities."""
    views = [(SIDE, (0.4, 1), 1.0, 0.0), (SIDE, (0.4, 1), 0.1, 0.2), *[(96, (0.05, 0.4), 0.5, 0.0)] * crops]
    return [T.Compose([
        T.RandomResizedCrop(side, scale, interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), T.RandomGrayscale(0.2),
        T.RandomApply([T.GaussianBlur(23, (0.1, 2.0))], blur), T.RandomSolarize(128, solarize),
        *NORMALIZE])(image) for side, scale, blur, solarize in views]


def dino_plain(folder, device, arch, count, batch, crops, outputs):
    backbone = timm.create_model(common.ARCHS[arch], num_classes=0, dynamic_img_size=True)
    last = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(256, outputs, bias=False))
    student = torch.nn.Sequential(  # a LayerNorm does the work of the head's L2 norm
        backbone, torch.nn.Linear(backbone.num_features, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 2048),
        torch.nn.GELU(), torch.nn.Linear(2048, 256), torch.nn.LayerNorm(256), last).to(device)
    teacher = copy.deepcopy(student)
    centre = torch.zeros(outputs, device=device)
    optimizer = torch.optim.Adam(student.parameters(), 1e-4, weight_decay=1e-5)

    def loss_of(images, labels):
        large = torch.cat(images[:2]).to(device)
        small = torch.cat(images[2:]).to(device)
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), student.parameters()):
                old.lerp_(new, 0.004)
            logits = teacher(large)
            targets = ((logits - centre) / 0.04).softmax(-1).chunk(2)
            centre.lerp_(logits.mean(0), 0.1)
        answers = [*(student(large) / 0.1).chunk(2), *(student(small) / 0.1).chunk(crops)]
        pairs = [(answer, target) for i, target in enumerate(targets) for j, answer in enumerate(answers) if i != j]
        return sum(F.cross_entropy(answer, target) for answer, target in pairs) / len(pairs)
    loader = plain_loader(folder, partial(dino_views, crops), batch, count)
    return partial(plain_epoch, student, optimizer, loader, loss_of)


def segment_ours(folder, device, arch, count, batch):
    args, run, dataset = start_stage(segment, folder, device, count, "--batch-size", batch)
    model = common.to_device(segment.build_segmenter(arch, "random", SIDE, args.output_stride, 2)[0], run)
    optimizer, scaler, _, _ = common.start_training(model, args, run, folder)
    rates = np.full(count // batch, args.lr)
    return partial(segment.train_epoch, model, model.dropout, optimizer, scaler, dataset, args, run, 0, rates)


def segment_plain(folder, device, arch, count, batch):  # torchvision has it on ResNets alone
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights_backbone=None, num_classes=2).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    view = T.Compose([T.RandomResizedCrop(SIDE, (0.5, 1)), *AUGMENT, *NORMALIZE])

    def loss_of(pair, labels):
        return F.cross_entropy(model(pair[0].to(device))["out"], pair[1].long().to(device))
    loader = plain_loader(folder, view, batch, count, loader=image_and_mask)
    return partial(plain_epoch, model, optimizer, loader, loss_of)


def attention_ours(folder, device, arch, count, batch):
    args, run, dataset = start_stage(attn_distance, folder, device, count, "--batch-size", batch)
    timm.layers.set_fused_attn(False)
    model = common.to_device(common.create(arch, 0, SIDE), run).eval()
    read = common.attention_reader(model)
    return partial(attn_distance.measure, model, read, dataset, dataset.rows["train"], SIDE, args, run)


def attention_plain(folder, device, arch, count, batch):  # an image at a time, a loop over blocks and heads
    timm.layers.set_fused_attn(False)
    model = timm.create_model(common.ARCHS[arch], num_classes=0).to(device).eval().requires_grad_(False)
    read = timm.utils.AttentionExtract(model, method="hook")
    places = 16.0 * torch.cartesian_prod(torch.arange(14), torch.arange(14))
    distances = torch.cdist(places, places).to(device)

    def measure_heads(image):
        for block in read(image).values():
            for attention in block[0, :, 1:, 1:]:
                shares = attention / attention.sum(1, keepdim=True)
                (shares * distances).sum(1).mean().item()
    return partial(plain_pass, measure_heads, plain_loader(folder, CENTRE, 1, count), device)


def loader_ours(folder, device, count, batch):
    _, run, dataset = start_stage(knn_eval, folder, device, count)
    batches = common.shards(dataset.rows["train"], run, batch)
    return lambda: sum(map(len, common.load_batches(dataset.images, batches, run.device)))


def loader_plain(folder, device, count, batch):
    view = T.Compose([T.Resize((256, 256)), T.ToImage()])
    return partial(plain_pass, torch.nn.Identity(), plain_loader(folder, view, batch, count), device)


def prepare_ours(folder, device, count, batch, workers, kind):
    args = prepare.arguments([str(folder), "--output", str(folder), "--workers", str(workers)])
    rows = [prepare.Row(str(folder / "large" / f"{i % 8}.{kind}"), str(i)) for i in range(count)]
    return partial(prepare.write_arrays, folder, prepare.Source(rows), 256, args)


def prepare_plain(folder, device, count, batch, workers, kind):
    def decode(files):
        images = map(torchvision.io.decode_image, files)
        images = [image.float() / 257 if kind == "png" else image for image in images]  # resize takes no 16 bits
        return torch.stack([T.functional.resize(image, [256, 256]) for image in images])
    files = [str(folder / "large" / f"{i % 8}.{kind}") for i in range(count)]
    loader = torch.utils.data.DataLoader(files, batch, num_workers=workers, collate_fn=decode)
    return lambda: sum(map(len, loader))


def open_ours(folder, device, count, rows):
    table = folder / "table"  # like CheXpert's: grey images, 14 labels, patients, sizes; images.npy is sparse
    table.mkdir()
    np.lib.format.open_memmap(table / "images.npy", "w+", np.uint8, (rows, 256, 256, 1))
    names = [f"label {i}" for i in range(14)]
    labels = (np.random.default_rng(0).random((rows, 14)) < 0.2).astype(int).tolist()
    lines = [[f"{i // 3:05d}/view{i % 3}.jpg", "train", f"{i // 3:05d}", 320, 390, *labels[i]] for i in range(rows)]
    common.write_table(table / "labels.csv", ["image", "split", "group", "height", "width", *names], lines)
    common.write_json(table / "dataset.json", {"classes": names, "mean": [0.5] * 3, "std": [0.25] * 3})
    return partial(common.open_dataset, table)


def open_plain(folder, device, count, rows):
    return partial(np.loadtxt, folder / "table" / "labels.csv", delimiter=",", skiprows=1, usecols=range(5, 19))


def list_cases(cuda, less):
    """(stage, name, our side, plain side, options) of each case; larger on CUDA; all sizes divided by `less`."""
    def sizes(count, batch):
        times = (64, 8) if cuda else (1, 1)
        return {"count": max(2, count * times[0] // less), "batch": max(2, batch * times[1] // less)}

    for arch in ("deit_tiny", "deit_small", "resnet50"):
        yield "finetune", f"{arch} training", finetune_ours, finetune_plain, {"arch": arch, **sizes(16, 16)}
    for arch in ("deit_small", "resnet50"):
        yield "features", f"{arch} features", features_ours, features_plain, {"arch": arch, **sizes(64, 32)}
    options = {"train": 262144 // less, "count": 1024 // less}
    yield "knn", f"k-NN vote, {options['train']} x 384", knn_ours, knn_plain, options
    dino = [("deit_tiny", 8, 65536), ("deit_small", 8, 65536), *[("deit_small", 6, 4096)] * cuda]
    for arch, crops, outputs in dino:
        options = {"arch": arch, "crops": crops, "outputs": outputs, **sizes(8, 8)}
        yield "dino", f"DINO {arch}, 2x224 + {crops}x96, {outputs} outputs", dino_ours, dino_plain, options
    for arch in ("resnet50", "deit_small"):
        yield "segment", f"DeepLabv3-{arch} training", segment_ours, segment_plain, {"arch": arch, **sizes(4, 4)}
    yield ("attention", "attention distance, deit_small", attention_ours, attention_plain,
           {"arch": "deit_small", **sizes(32, 16)})
    yield "loader", "reading 360x360 at 256x256", loader_ours, loader_plain, {"count": 2048 // less, "batch": 64}
    for kind, workers in (("jpg", 1), ("jpg", 2), ("png", 1), ("png", 2)):  # ours also hashes, and writes images.npy
        options = {"count": 64 // less, "batch": 8, "workers": workers, "kind": kind}
        yield "prepare", f"prepare.py, 2048x1536 {kind}, workers: {workers}", prepare_ours, prepare_plain, options
    yield "open", "opening 224316 rows, 14 labels", open_ours, open_plain, {"count": 1, "rows": 224316}


def enter(side, folder, device, options):
    """Set up a side in this process, which is its own, and warm it up."""
    global one_pass, arithmetic
    sys.stdout = sys.stderr  # what a stage prints
    multiprocessing.set_start_method(None, force=True)  # a DataLoader's workers start as Python's default is
    one_pass = side(folder, device, **options)
    with FlopCounterMode(display=False) as counter:
        one_pass()
    arithmetic = counter.get_total_flops()


def timed_pass(device, dtype):
    """(seconds, peak memory so far in GB, FLOP/s over those of a product in dtype) of one pass of this process's side."""
    begin = time.perf_counter()
    one_pass()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    matrix = torch.ones(2048, 2048, dtype=dtype, device=device)
    product = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=torch.get_num_threads()).blocked_autorange()
    rate = 2 * 2048 ** 3 / product.median
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 1e9
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    return seconds, memory, arithmetic / seconds / rate


def measure(sides, options, folder, device, dtype, rounds):
    """(2, rounds, 3): timed_pass of our side and of the plain one, which take turns; either begins every other round."""
    context = multiprocessing.get_context("forkserver")  # which imports this file, and so PyTorch, once
    pools = [ProcessPoolExecutor(1, context, enter, (side, folder, device, options)) for side in sides]
    passes = np.zeros((2, rounds, 3))
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            passes[side, number] = pools[side].submit(timed_pass, device, dtype).result()
    for pool in pools:
        pool.shutdown()
    return passes


def cells_of(stage, name, passes, count):
    """The cells of a case's row."""
    cells = [name, {"open": "s", "knn": "queries/s"}.get(stage, "images/s")]
    for side in passes:
        seconds = np.median(side[:, 0])
        figure = seconds if stage == "open" else count / seconds
        cells += [f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}", f"{side[:, 1].max():.1f}"]
    low, times, high = np.percentile(passes[1, :, 0] / passes[0, :, 0], [25, 50, 75])
    unsettled = " unsettled" if high - low > times / 4 else ""
    share = np.median(passes[0, :, 2])
    return [*cells, f"{times:.1f} [{low:.1f}, {high:.1f}]{unsettled}", f"{100 * share:.0f} %" if share > 0.01 else ""]


def main():
    """Measure and print the table, a row a case."""
    stages = list(dict.fromkeys(case[0] for case in list_cases(False, 1)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=stages, default=stages, help="these alone")
    parser.add_argument("--quick", dest="less", action="store_const", const=8, default=1, help="an eighth of the sizes")
    parser.add_argument("--rounds", type=int, default=7, help="passes a side (default 7)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    run = common.start(argparse.Namespace(device=options.device, amp="auto"))
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(sys.stderr):
            write_photographs(Path(folder), 128)
        print(f"{common.device_name(run.device)}, precision {run.amp}, {common.versions()}\n\n"
              f"| | unit | ours | GB | plain | GB | times | of products |\n{'|---' * 8}|", flush=True)
        for stage, name, ours, plain, sizes in list_cases(options.device == "cuda", options.less):
            if stage not in options.stage:
                continue
            dtype = torch.bfloat16 if run.amp == "bf16" and stage != "knn" else torch.float32
            passes = measure((ours, plain), sizes, Path(folder), options.device, dtype, options.rounds)
            print("| " + " | ".join(cells_of(stage, name, passes, sizes["count"])) + " |", flush=True)


if __name__ == "__main__":
    main()
