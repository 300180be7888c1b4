"""pretrain_dino.py: equations against slow versions, schedules by value, runs as a user starts them."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

import common
import prepare
import pretrain_dino as dino
from conftest import ROOT, TINY, WITHOUT_MATPLOTLIB, killed, metrics, picture, refused, stage
from conftest import prepare as prepare_source

DATA = ["--data", "data"]
FAST = ["--epochs", "3", "--batch-size", "4", "--out-dim", "64", "--local-crops", "2", "--local-size", "16"]


def slow_loss(student, teacher, views, temp):
    """Caron et al. 2021, eq. 3 and algorithm 1, pair by pair."""
    students, teachers = student.chunk(views), teacher.chunk(2)
    terms = [-(teachers[t] * torch.log_softmax(students[v] / temp, -1)).sum(-1).mean()
             for t in range(2) for v in range(views) if v != t]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("views", [2, 5, 8])
def test_loss_and_gradient_equal_the_pairwise_version(views):
    generator = torch.Generator().manual_seed(views)
    student = torch.randn(views * 6, 40, generator=generator, requires_grad=True)
    teacher = (torch.randn(12, 40, generator=generator) / 0.2).softmax(-1)
    ours = dino.dino_loss(student, teacher, views, 0.1)
    slow = slow_loss(student, teacher, views, 0.1)
    assert abs(ours - slow) < 1e-5 * slow.abs().clamp(min=1)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (ours, slow)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5


def test_schedules_by_value():
    args = SimpleNamespace(epochs=100, lr=5e-4, lr_batch=256, batch_size=512, min_lr=1e-6, warmup_epochs=10, warmup_steps=0,
                           weight_decay=0.04, weight_decay_end=0.4, momentum_teacher=0.99,
                           warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_epochs=30)
    lr, decay, momentum, temp = dino.schedules(args, 7)
    assert len(lr) == len(decay) == len(momentum) == 700 and len(temp) == 100
    assert lr[0] == 0 and lr[35] == pytest.approx(5e-4) and lr[70] == pytest.approx(1e-3)  # 5e-4 * 512 / 256
    assert lr[385] == pytest.approx((1e-3 + 1e-6) / 2) and lr[-1] == pytest.approx(1e-6, rel=0.1)
    assert decay[0] == pytest.approx(0.04) and decay[350] == pytest.approx(0.22)
    assert decay[-1] == pytest.approx(0.4, abs=1e-4)
    assert momentum[0] == pytest.approx(0.99) and momentum[350] == pytest.approx(0.995) and momentum[-1] < 1
    assert momentum[175] == pytest.approx(1 - 0.01 * (1 + math.cos(math.pi / 4)) / 2)
    assert temp[0] == 0.04 and temp[29] == pytest.approx(0.07) and temp[99] == 0.07
    assert temp[15] == pytest.approx(0.04 + 0.03 * 15 / 29)


def test_sinkhorn_gives_rows_of_one_and_equal_columns():
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    q = dino.sinkhorn(logits, 0.5, SimpleNamespace(world=1), iterations=50)
    assert torch.allclose(q.sum(1), torch.ones(64), atol=1e-5)
    assert torch.allclose(q.mean(0), torch.full((8,), 1 / 8), atol=1e-3)


def test_koleo_and_gradient_equal_a_loop_over_images():
    features = torch.randn(9, 5, generator=torch.Generator().manual_seed(3), requires_grad=True)
    terms = []
    for i in range(9):
        unit = [row / row.norm() for row in features]
        terms.append(-torch.stack([(unit[i] - unit[j]).norm() for j in range(9) if j != i]).min().log())
    slow, ours = sum(terms) / 9, dino.koleo(features, SimpleNamespace(rank=0, world=1))
    assert abs(ours - slow) < 1e-5
    gradients = [torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in (ours, slow)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5
    alike = torch.ones(4, 5, requires_grad=True)  # identical images must not make it infinite
    dino.koleo(alike, SimpleNamespace(rank=0, world=1)).backward()
    assert torch.isfinite(alike.grad).all()


def test_head_is_normalised():
    torch.manual_seed(0)
    head = dino.Head(12, 30)
    logits = head(torch.randn(50, 12))
    assert logits.shape == (50, 30) and logits.abs().max() <= 1
    with torch.no_grad():
        head.last *= 7  # the norm of its rows must not matter
    torch.manual_seed(0)
    again = dino.Head(12, 30)
    images = torch.randn(5, 12)
    assert torch.allclose(head(images), again(images), atol=1e-6)


def test_colours_equal_torchvision():
    images = torch.rand(6, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    always = common.Draws(0, 6, torch.arange(6), "cpu")
    assert torch.allclose(dino.grey(images, always, 1.0), TF.rgb_to_grayscale(images, 3), atol=1e-3)
    assert torch.allclose(dino.solarize(images, always, 1.0), TF.solarize(images, 0.5))
    assert torch.equal(dino.solarize(images, always, 0.0), images)
    draws, same = (common.Draws(1, 6, torch.arange(6), "cpu") for _ in range(2))
    blurred = dino.blur(images, draws, 1.0)
    same.uniform()
    for image, ours, sigma in zip(images, blurred, same.uniform(low=0.1, high=2.0).tolist()):
        theirs = TF.gaussian_blur(image, 25, sigma)
        assert (theirs - ours)[:, 12:-12, 12:-12].abs().max() < 1e-4
    assert torch.allclose(dino.blur(images, draws, 0.0), images, atol=1e-6)


def tiny_state(out_dim=16, **changes):
    """A student, a teacher and settings for train_epoch on eight demo images."""
    args = SimpleNamespace(**{
        "arch": "test_vit", "init": "random", "init_key": None, "init_stats": None, "seed": 0, "image_size": 32,
        "patch_size": None, "local_size": 16, "flips": "horizontal", "rotate": 0,
        "local_crops": 2, "out_dim": out_dim, "head_norm": "none", "drop_path": 0.0, "batch_size": 8,
        "accumulate": 1, "epochs": 1, "student_temp": 0.1, "global_scale": [0.4, 1], "centering": "mean",
        "local_scale": [0.1, 0.4], "jitter": [0.4, 0.4, 0.2, 0.1], "center_momentum": 0.9,
        "grey": 0.2, "blur": [1.0, 0.1, 0.5], "solarize": 0.2, "koleo": 0.0, "freeze_last_layer": 0,
        "clip_grad": 3.0, "clip": "all", "output": "", **changes})
    run = common.Run(0, 1, torch.device("cpu"), "off")
    student, teacher, _ = dino.build(args, run)
    images = np.stack([prepare.draw_lesion(i)[0] for i in range(8)])
    dataset = SimpleNamespace(images=images, rows={"train": np.arange(8)}, mean=[0.5] * 3, std=[0.2] * 3)
    state = SimpleNamespace(student=student, teacher=teacher, optimizer=torch.optim.AdamW(common.parameter_groups(student)))
    return state, dataset, args, run


def train(state, dataset, args, run, epoch, plan):
    """train_epoch of a tiny_state."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return dino.train_epoch(state.student, state.student, state.teacher, state.optimizer, scaler, dataset, args, run,
                            epoch, plan)


def test_teacher_and_center_are_moving_averages():
    state, dataset, args, run = tiny_state()
    before = [p.detach().clone() for p in state.teacher.parameters()]
    outputs = []
    state.teacher.head.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    plan = [np.array([1e-3]), np.array([0.04]), np.array([0.9]), np.array([0.05])]
    train(state, dataset, args, run, 0, plan)
    for old, teacher, student in zip(before, state.teacher.parameters(), state.student.parameters()):
        assert torch.allclose(teacher, 0.9 * old + 0.1 * student, atol=1e-6)
    assert any(not torch.equal(old, p) for old, p in zip(before, state.student.parameters()))
    assert torch.allclose(state.teacher.center, 0.1 * outputs[0].mean(0), atol=1e-6)


def test_accumulation_changes_nothing_but_memory():
    """A step of SGD over 8 images in one part and in four: without batch norm, one and the same gradient."""
    plan = [np.array([0.1]), np.array([0.0]), np.array([0.9]), np.array([0.05])]
    results = []
    for accumulate in (1, 4):
        state, dataset, args, run = tiny_state(accumulate=accumulate, clip_grad=0)
        before = torch.cat([p.detach().flatten() for p in state.student.parameters()])
        state.optimizer = torch.optim.SGD(common.parameter_groups(state.student), 0.1)
        entry = train(state, dataset, args, run, 0, plan)
        after = torch.cat([p.detach().flatten() for p in state.student.parameters()])
        results.append((entry["loss"], after - before))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert (results[1][1] - results[0][1]).abs().max() < 1e-4 * results[0][1].abs().max()


def test_schedules_reach_the_optimizer():
    state, dataset, args, run = tiny_state(epochs=3)
    plan = [np.array([1e-3, 2e-3, 3e-3]), np.array([0.1, 0.2, 0.3]), np.array([0.9] * 3), np.full(3, 0.05)]
    for epoch in range(3):  # a step each
        train(state, dataset, args, run, epoch, plan)
        matrices, vectors = state.optimizer.param_groups
        assert matrices["lr"] == vectors["lr"] == plan[0][epoch]
        assert matrices["weight_decay"] == plan[1][epoch] and vectors["weight_decay"] == 0
    assert all(p.ndim > 1 for p in matrices["params"]) and all(p.ndim < 2 for p in vectors["params"])


@pytest.mark.parametrize("given, images, expected", [
    ({"arch": "test_vit"}, 500, {"recipe": "small", "lr": 1e-3, "koleo": 0.5, "batch_size": 32}),
    ({"arch": "test_resnet"}, 500, {"recipe": "small", "lr": 4e-3, "koleo": 0.2}),
    ({"arch": "test_resnet", "lr": 7e-4, "koleo": 0.0}, 500, {"recipe": "small", "lr": 7e-4, "koleo": 0.0}),
    ({"arch": "test_vit"}, 20000, {"recipe": "paper", "lr": 1e-4, "lr_batch": 0, "koleo": 0.0, "out_dim": 4096}),
    ({"arch": "test_vit", "recipe": "caron"}, 20000, {"lr": 5e-4, "lr_batch": 256, "batch_size": 1024, "out_dim": 65536,
                                                      "momentum_teacher": 0.996, "local_crops": 8}),
    ({"arch": "test_vit", "init": "imagenet"}, 500, {"recipe": "paper", "local_crops": 6, "batch_size": 64}),
    ({"arch": "test_vit", "recipe": "paper", "out_dim": 8}, 500, {"recipe": "paper", "out_dim": 8})])
def test_recipes_yield_to_flags(given, images, expected):
    names = {**dino.PAPER, "local_size": None}
    args = SimpleNamespace(**{**dict.fromkeys(names), "init": "random", "recipe": "auto", "image_size": 32,
                              "patch_size": None, "accumulate": 1, **given})
    dino.apply_recipe(args, images, common.Run(0, 1, torch.device("cpu"), "off"))
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.local_size == 16 and args.teacher_temp > 0


def settings_of(recipe):
    """The settings of a recipe for 64 epochs of test_vit on 6,400 images."""
    args = SimpleNamespace(**{**dict.fromkeys(dino.PAPER), "local_size": None, "arch": "test_vit", "init": "random",
                              "recipe": recipe, "image_size": 32, "patch_size": None, "accumulate": 1, "epochs": 64,
                              "min_lr": 1e-6})
    dino.apply_recipe(args, 6400, common.Run(0, 1, torch.device("cpu"), "off"))
    return args


def test_the_papers_recipe_by_value():
    """Adam, 1e-4 whatever the batch, 500 steps of warm-up, decay 1e-5 to 0.4, all gradients clipped at norm 1."""
    args = settings_of("paper")
    lr, decay, momentum, temp = dino.schedules(args, 100)
    assert args.optimizer == "adam" and (args.clip, args.clip_grad) == ("all", 1.0)
    assert lr[0] == 0 and lr[250] == pytest.approx(5e-5) and lr[500] == pytest.approx(1e-4) and len(lr) == 6400
    assert lr[3450] == pytest.approx((1e-4 + 1e-6) / 2) and lr.max() == pytest.approx(1e-4)
    assert decay[0] == pytest.approx(1e-5) and decay[3200] == pytest.approx(0.200005)
    assert decay[-1] == pytest.approx(0.4, abs=1e-5) and momentum[0] == pytest.approx(0.99)
    assert (temp[0], temp[30]) == (0.04, 0.07) and (args.out_dim, args.local_crops, args.batch_size) == (4096, 6, 64)


def test_carons_recipe_by_value():
    args = settings_of("caron")
    lr, decay, momentum, _ = dino.schedules(args, 6)
    assert args.optimizer == "adamw" and (args.clip, args.clip_grad) == ("each", 3.0)
    assert lr[60] == pytest.approx(5e-4 * 1024 / 256) and lr[30] == pytest.approx(lr[60] / 2)
    assert decay[0] == pytest.approx(0.04) and momentum[0] == pytest.approx(0.996)


@pytest.mark.parametrize("clip, norms", [("all", [0.6, 0.8]), ("each", [1, 1])])
def test_gradients_are_clipped_together_or_each(clip, norms):
    """Two tensors with gradients of norm 3 and 4, at most 1: what SGD at a rate of 1 then takes off."""
    state, dataset, args, run = tiny_state(clip=clip, clip_grad=1.0)
    plan = [np.array([1.0]), np.array([0.0]), np.array([0.9]), np.array([0.05])]
    first, second = [torch.nn.Parameter(torch.zeros(1, 1)) for _ in range(2)]
    for name, parameter, value in (("first", first, 3.0), ("second", second, 4.0)):
        state.student.register_parameter(name, parameter)
    for other in state.student.backbone.parameters():
        other.requires_grad_(False)
    for other in state.student.head.parameters():
        other.requires_grad_(False)
    state.teacher.register_parameter("first", torch.nn.Parameter(torch.zeros(1, 1), False))
    state.teacher.register_parameter("second", torch.nn.Parameter(torch.zeros(1, 1), False))
    forward = state.student.forward
    state.student.forward = lambda *crops: [part + 0 * (first + second).sum() for part in forward(*crops)]
    first.register_hook(lambda grad: grad + 3)
    second.register_hook(lambda grad: grad + 4)
    state.optimizer = torch.optim.SGD([{"params": [first, second]}, {"params": []}], 1.0)
    train(state, dataset, args, run, 0, plan)
    assert [-first.item(), -second.item()] == pytest.approx(norms, rel=1e-3)


def test_the_best_probe_is_kept():
    log = [{"epoch": 0, "knn": 0.9}, {"epoch": 1, "knn": 0.5}, {"epoch": 2}, {"epoch": 3, "knn": 0.7},
           {"epoch": 4, "knn": 0.7}, {"epoch": 5, "knn": 0.6}]
    assert dino.best_epoch(log, "best") == 3 and dino.best_epoch(log, "last") == 5
    assert dino.best_epoch(log[:2], "best") == 1 and dino.best_epoch([log[0], log[2]], "best") == 2


def test_model_is_the_teacher_of_the_best_probe(folder_data, tmp_path):
    """Three epochs at a rate that spoils the features: model.pt is that of the epoch that the log says."""
    args = [*DATA, *FAST, "--arch", "test_vit", "--probe-every", "1", "--lr", "0.5", *TINY]
    done = stage("pretrain_dino.py", *args, "--output", "best", cwd=tmp_path)
    stage("pretrain_dino.py", *args, "--keep", "last", "--output", "last", cwd=tmp_path, first=WITHOUT_MATPLOTLIB)
    log = [json.loads(line) for line in (tmp_path / "best" / "log.jsonl").read_text().splitlines()]
    best = max(log[1:], key=lambda entry: entry["knn"])
    result = metrics(tmp_path / "best")
    assert result["best_epoch"] == best["epoch"] and result["val"]["knn"] == best["knn"]
    assert f"model.pt is the teacher of epoch {best['epoch']} of 3" in done.stdout
    assert result["val"]["guess"] == pytest.approx(0.5) and metrics(tmp_path / "last")["best_epoch"] == 3
    kept, last = (torch.load(tmp_path / name / "model.pt", weights_only=True)["state_dict"] for name in ("best", "last"))
    equal = all(torch.equal(value, last[name]) for name, value in kept.items())
    assert equal == (best["epoch"] == 3)


def koleo_of_share():
    """As one of two processes: the gradient of the KoLeo term as DDP would average it, into a file."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    features, weight = torch.load("both.pt", weights_only=True)
    weight.requires_grad_()
    value = dino.koleo(features[rank::2] @ weight, SimpleNamespace(rank=rank, world=2))
    (2 * value).backward()
    torch.distributed.all_reduce(weight.grad)
    torch.save((value.detach(), weight.grad / 2), f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_koleo_of_two_processes_is_that_of_one(tmp_path):
    generator = torch.Generator().manual_seed(5)
    features, weight = torch.randn(12, 6, generator=generator), torch.randn(6, 4, generator=generator)
    torch.save((features, weight), tmp_path / "both.pt")
    stage("test_pretrain.py", cwd=tmp_path, processes=2, root=ROOT / "tests", first=f"import sys; sys.path += [{str(ROOT)!r}]")
    weight.requires_grad_()
    value = dino.koleo(features @ weight, SimpleNamespace(rank=0, world=1))
    value.backward()
    for rank in range(2):
        theirs, gradient = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.allclose(theirs, value, atol=1e-6) and torch.allclose(gradient, weight.grad, atol=1e-6)


def test_last_layer_is_frozen_at_first():
    state, dataset, args, run = tiny_state(freeze_last_layer=1)
    before = state.student.head.last.detach().clone()
    train(state, dataset, args, run, 0, [np.array([1e-3])] * 3 + [np.array([0.05])])
    assert torch.equal(state.student.head.last, before)


@pytest.mark.parametrize("arch", ["test_vit", "test_resnet"])
def test_run_and_what_follows_from_it(folder_data, tmp_path, arch):
    args = [*DATA, *FAST, "--arch", arch, "--export", "dino.safetensors", "--probe-every", "1", *TINY]
    done = stage("pretrain_dino.py", *args, "--output", "run", cwd=tmp_path)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [0, 1, 2, 3] and all(0 <= entry["knn"] <= 1 for entry in log)
    assert all(np.isfinite(entry["loss"]) for entry in log[1:]) and "loss" not in log[0]  # log[0]: before training
    words = ("entropy", "of ln 64", "KL to uniform", "feature std", "k-NN")
    assert all(word in done.stdout for word in words)
    for name in ("crops.png", "curves.png"):
        with Image.open(tmp_path / "run" / name) as image:
            assert min(image.size) > 200
    model = timm.create_model(arch, num_classes=0, **({"img_size": 32} if arch == "test_vit" else {}))
    model.load_state_dict(timm.models.load_state_dict(str(tmp_path / "dino.safetensors")))
    trained = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert all(torch.equal(value, trained["state_dict"][name]) for name, value in model.state_dict().items())
    done = stage("finetune.py", *DATA, "--init", "run/model.pt", "--epochs", "1", "--batch-size", "4",
                 "--output", "tuned", *TINY, cwd=tmp_path)
    count = len(trained["state_dict"])
    assert f"{count} of {count} backbone tensors loaded" in done.stdout
    tuned = metrics(tmp_path / "tuned")
    assert tuned["pretrained_on"] == "data" and tuned["init"] == "dino"
    assert "is complete" in stage("pretrain_dino.py", *args, "--output", "run", cwd=tmp_path).stdout


def test_collapse_is_named_and_a_healthy_run_is_not_accused(demo, tmp_path):
    args = ["--data", demo, "--arch", "test_resnet", "--limit", "256", "--epochs", "2", "--batch-size", "32",
            "--out-dim", "256", "--local-crops", "2", "--probe-every", "0", *TINY]
    flat = stage("pretrain_dino.py", *args, "--recipe", "paper", "--teacher-temp", "50",
                 "--warmup-teacher-temp", "50", "--output", "flat", cwd=tmp_path)
    assert "WARNING: collapsed: every output is nearly uniform" in flat.stdout
    assert "ln 256 = 5.55" in flat.stdout
    constant = ["--recipe", "paper", "--center-momentum", "1", "--teacher-temp", "0.01",
                "--warmup-teacher-temp", "0.01", "--lr", "1e-2", "--warmup-epochs", "0",
                "--momentum-teacher", "0.5", "--epochs", "4"]
    stopped = stage("pretrain_dino.py", *args, *constant, "--on-collapse", "stop", "--output", "constant",
                    cwd=tmp_path, check=False)
    assert stopped.returncode == 2 and "every image gets the same output" in stopped.stderr
    healthy = stage("pretrain_dino.py", *args, "--output", "healthy", cwd=tmp_path)
    assert "collapsed" not in healthy.stdout


@pytest.mark.parametrize("arch,flags", [("test_vit", []), ("test_vit", ["--accumulate", "2"]),
                                        ("test_resnet", ["--batch-size", "12"])])
def test_two_processes_equal_one(folder_data, tmp_path, arch, flags):
    """At a low rate, and the CNN with more than 4 images a batch: its own rate, 4e-3, and batch norm over a few values make
    large what differs in the last digit, up to 0.4 % of the gradients."""
    args = [*DATA, *FAST, "--epochs", "2", "--arch", arch, "--drop-path", "0", "--lr", "1e-3", *flags, *TINY]
    stage("pretrain_dino.py", *args, "--output", "one", cwd=tmp_path, first=WITHOUT_MATPLOTLIB)
    stage("pretrain_dino.py", *args, "--output", "two", cwd=tmp_path, processes=2)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("one", "two")]
    for one, two in zip(*(log[1:] for log in logs)):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["entropy"] == pytest.approx(two["entropy"], rel=1e-3)
    one, two = (torch.cat([entry["exp_avg"].flatten() for entry in torch.load(
        tmp_path / name / "checkpoint.pt", weights_only=True)["optimizer"]["state"].values()])
        for name in ("one", "two"))  # the mean of the gradients
    assert (one - two).norm() < 1e-3 * one.norm()


def test_resumed_after_sigkill_bit_for_bit(folder_data, tmp_path):
    args = [*DATA, *FAST, "--epochs", "4", "--arch", "test_vit", "--drop-path", "0.1", *TINY]
    stage("pretrain_dino.py", *args, "--output", "whole", cwd=tmp_path, first=WITHOUT_MATPLOTLIB)
    killed("pretrain_dino.py", *args, "--output", "killed", cwd=tmp_path,
           log=tmp_path / "killed" / "log.jsonl", lines=3, text="epoch 3/4")
    assert not (tmp_path / "killed" / "metrics.json").exists()
    assert "resuming" in stage("pretrain_dino.py", *args, "--output", "killed", cwd=tmp_path).stdout
    whole, resumed = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
                      for name in ("whole", "killed"))
    for part in ("student", "teacher"):
        assert all(torch.equal(value, resumed[part][name]) for name, value in whole[part].items())
    assert whole["teacher"]["center"].any() and whole["log"][0] == resumed["log"][0]


def test_mistakes(folder_data, tmp_path):
    def run(*args):
        known = [*DATA, *FAST, "--arch", "test_vit", "--output", "run", *TINY]
        return stage("pretrain_dino.py", *known, *args, cwd=tmp_path, check=False)
    refused(run("--accumulate", "3"), "--accumulate 3", "--batch-size 4")
    refused(run("--global-scale", "0.9", "0.2"), "--global-scale")
    refused(run("--batch-size", "400"), "--batch-size 400", "training images")
    refused(run("--arch", "densenet121", "--recipe", "paper"), "densenet121 has no drop path")
    refused(run("--export", "x.pt"), ".safetensors")
    assert not (tmp_path / "run").exists()
    done = run("--lr", "1e30", "--warmup-epochs", "0", "--clip-grad", "0")
    assert done.returncode == 2 and "not finite by step" in done.stderr and "Traceback" not in done.stderr
    refused(run("--teacher-temp", "0", "--overwrite"), "--teacher-temp 0")
    refused(run("--local-size", "20", "--overwrite"), "--local-size 20", "patches")
    refused(run("--export", "nowhere/x.safetensors", "--overwrite"), "nowhere", "no such folder")


def test_preview_touches_no_run(folder_data, tmp_path):
    args = [*DATA, *FAST, "--arch", "test_vit", "--epochs", "1", *TINY]
    stage("pretrain_dino.py", *args, "--output", "run", cwd=tmp_path)
    (tmp_path / "run" / "crops.png").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    stage("pretrain_dino.py", *args, "--preview", "--output", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "crops.png").exists()
    assert all(path.read_bytes() == content for path, content in before.items())


def test_weights_that_are_not_finite_are_not_saved(folder_data, tmp_path):
    """A loss is taken before its step's update: with one step an epoch, the first at a rate of 0 and the
    second at an endless one, the loss of epoch 2 is finite and its weights are not."""
    args = [*DATA, *FAST, "--arch", "test_vit", "--batch-size", "20", "--warmup-epochs", "1",
            "--lr", "1e38", "--output", "run", *TINY]
    done = stage("pretrain_dino.py", *args, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "not finite after epoch 2" in done.stderr, done.stderr
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert [entry["epoch"] for entry in kept["log"]] == [0, 1]
    assert all(torch.isfinite(value).all() for value in kept["student"].values())


@pytest.mark.parametrize("entropies, marginals, word", [
    ([6.8, 6.8], [6.81, 6.81], "nearly uniform"), ([6.6, 6.6], [6.65, 6.65], "nearly uniform"),
    ([0.1, 0.1], [0.11, 0.1], "same output"), ([6.9, 6.8], [6.91, 6.85], None),
    ([5.4, 5.3], [6.9, 6.9], None), ([6.8], [6.8], None)])
def test_verdict_by_value(entropies, marginals, word):
    log = [{"feature_std": 0.2}]  # before training
    log += [{"entropy": e, "marginal_entropy": m, "feature_std": 0.3} for e, m in zip(entropies, marginals)]
    said = dino.verdict(log, SimpleNamespace(out_dim=1024, batch_size=32))
    assert said is None if word is None else word in said


@pytest.mark.parametrize("layout", ["flat", "one class"])
def test_images_without_labels(tmp_path, layout):
    """A folder of images, or all of them in the one class folder that torchvision's ImageFolder asks for."""
    folder = tmp_path / "source" / ("" if layout == "flat" else "train/all")
    folder.mkdir(parents=True)
    for i in range(30):
        Image.fromarray(picture(np.random.default_rng(i), i % 2)).save(folder / f"{i}.png")
    done = prepare_source("source", "data", cwd=tmp_path)
    assert ("there is one class, 'all'" in done.stdout) == (layout == "one class")
    args = [*DATA, "--arch", "test_vit", "--batch-size", "8", "--epochs", "1", *TINY]
    stage("pretrain_dino.py", *args, "--output", "run", cwd=tmp_path)
    result = metrics(tmp_path / "run")
    assert result["counts"] == {"train": 21, "val": 5, "test": 4}
    assert ("knn" in result["val"]) and (result["val"]["knn"] is None) == (layout == "flat")
    refused(stage("finetune.py", *args, "--output", "no", cwd=tmp_path, check=False),
            "no labels" if layout == "flat" else "one class, all")


if __name__ == "__main__":  # for test_koleo_of_two_processes_is_that_of_one
    koleo_of_share()
