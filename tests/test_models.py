"""The model builder: every source of --init, strict loading, frozen features."""
import argparse
import re

import pytest
import timm
import torch

import common
import knn_eval
from conftest import TINY, metrics, refused, stage


def build(tmp_path, content, arch="test_vit", name="file.pth", **changes):
    """build_model with --init on a file with this content."""
    torch.save(content, tmp_path / name)
    return common.build_model(arch, str(tmp_path / name), changes.pop("image_size", 32), 5, **changes)[0]


def backbone(arch="test_vit", size=32, seed=7):
    """A random model and its state dict."""
    torch.manual_seed(seed)
    model = common.create(arch, 3, size)
    return model, model.state_dict()


def same(model, weights):
    """Whether all but the classifier equals the weights."""
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items()
               if not name.startswith(common.HEADS))


def test_layouts_of_checkpoints(tmp_path, capsys):
    _, weights = backbone()
    dino = {f"module.backbone.{k}": v for k, v in weights.items() if not k.startswith("head.")}
    dino |= {"module.head.mlp.0.weight": torch.ones(3), "module.head.last_layer.weight_g": torch.ones(2)}
    student = {k: torch.zeros_like(v) for k, v in dino.items()}
    full = {"teacher": dino, "student": student, "epoch": 3, "args": argparse.Namespace(arch="vit")}
    assert same(build(tmp_path, weights), weights)
    assert same(build(tmp_path, {"state_dict": weights, "epoch": 1}), weights)
    assert same(build(tmp_path, {"model": {f"_orig_mod.{k}": v for k, v in weights.items()}}), weights)
    assert same(build(tmp_path, full), weights)
    assert not same(build(tmp_path, full, init_key="student"), weights)
    count = sum(not name.startswith("head.") for name in weights)
    assert f"{count} of {count} backbone tensors loaded" in capsys.readouterr().out


def test_safetensors(tmp_path):
    from safetensors.torch import save_file
    _, weights = backbone("test_resnet")
    save_file(weights, tmp_path / "model.safetensors")
    assert same(common.build_model("test_resnet", str(tmp_path / "model.safetensors"), 32, 0)[0], weights)


def test_torchvision_resnet_loads_and_agrees(tmp_path):
    import torchvision
    torch.manual_seed(0)
    reference = torchvision.models.resnet18(num_classes=5).eval()
    model = build(tmp_path, reference.state_dict(), arch="resnet18").eval()
    reference.fc = torch.nn.Identity()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (knn_eval.features(model, images) - reference(images)).abs().max() < 1e-4


def test_position_embeddings_are_resampled(tmp_path):
    _, weights = backbone(size=64)
    model = build(tmp_path, weights, image_size=32)
    expected = timm.layers.resample_abs_pos_embed(weights["pos_embed"], (2, 2), num_prefix_tokens=1)
    assert torch.equal(model.state_dict()["pos_embed"], expected)


@pytest.mark.parametrize("change, word", [("missing", "missing: blocks.0.attn.qkv.weight"),
                                          ("shape", "other shape: blocks.0.attn.qkv.weight"),
                                          ("extra", "left over: blocks.99.attn.qkv.weight")])
def test_loading_is_strict(tmp_path, capsys, change, word):
    _, weights = backbone()
    name = "blocks.0.attn.qkv.weight"
    if change == "missing":
        del weights[name]
    elif change == "shape":
        weights[name] = weights[name][:-1]
    else:
        weights["blocks.99.attn.qkv.weight"] = weights[name]
    with pytest.raises(SystemExit):
        build(tmp_path, weights)
    assert word in capsys.readouterr().err


def test_random_resnets_start_as_torchvisions():
    """The last norm of each block is 1, so that an untrained network's convolutions reach its features."""
    import torchvision
    model, _ = common.build_model("resnet50", "random", 64, 0, seed=3)
    ours, theirs = model.state_dict(), torchvision.models.resnet50().state_dict()
    norms = [name for name in ours if name.endswith("bn3.weight")]
    assert len(norms) == 16 and all((ours[name] == 1).all() for name in norms)
    convolutions = [name for name in ours if "conv" in name]
    assert len(convolutions) == 49
    for name in convolutions:
        assert ours[name].std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name
    hybrid, _ = common.build_model("vit_small_resnet26d_224", "random", 224, 0)  # a ViT on a ResNet's blocks
    norms = [weight for name, weight in hybrid.state_dict().items() if name.endswith("bn3.weight")]
    assert norms and all((weight == 1).all() for weight in norms)


def test_biases_and_norms_do_not_decay(tmp_path):
    args = argparse.Namespace(lr=1e-3, weight_decay=0.1)
    model = common.create("test_resnet", 3, 32)
    optimizer, _, _, log = common.start_training(model, args, common.Run(0, 1, torch.device("cpu"), "off"), tmp_path)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.1 for p in group["params"]}
    assert log == [] and sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1), name


def test_rates_fall_from_the_classifier_to_the_stem():
    """--layer-decay: the classifier at the rate itself, each block (the last with the norm) at 0.5 times that of the next."""
    model = common.create("test_vit", 3, 32)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = common.parameter_groups(model, 0.1, 0.5)
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scales.keys() == set(names.values())
    depth = len(model.blocks)
    for name, scale in scales.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        above = {"head": 0, "norm": 1}.get(name.split(".")[0], depth + 1)
        if block:
            above = depth - int(block[1])
        assert scale == 0.5 ** above, name
    for group in groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.1}


def test_features_are_cls_mean_or_pooled():
    model, _ = backbone()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model.eval()
    with torch.no_grad():
        tokens = model.forward_features(images)
        assert torch.equal(knn_eval.features(model, images, "mean"), tokens[:, 1:].mean(1))
        assert torch.equal(knn_eval.features(model, images, "cls"), tokens[:, 0])
        deit = common.create("deit_tiny", 0, 32).eval()
        assert torch.allclose(knn_eval.features(deit, images), deit(images))
        assert torch.allclose(knn_eval.features(deit, images, "cls"), deit(images))
        cnn = common.create("test_resnet", 0, 32).eval()
        assert torch.allclose(knn_eval.features(cnn, images), cnn(images))


def hub_cache(folder, repository, weights):
    """Lay weights out as the Hugging Face hub's cache keeps a downloaded repository."""
    from safetensors.torch import save_file
    snapshot = folder / f"models--{repository.replace('/', '--')}" / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    save_file(weights, snapshot / "model.safetensors")
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123456789abcdef")


@pytest.mark.parametrize("init, name", [("imagenet", "deit_tiny_patch16_224"),
                                        ("imagenet-dino", "vit_small_patch16_224.dino")])
def test_published_weights_load_from_the_hub_cache(tmp_path, demo, init, name):
    """The code that loads real weights, on random weights put where a download would have put them."""
    torch.manual_seed(1)
    source = timm.create_model(name)
    repository = source.pretrained_cfg["hf_hub_id"]
    hub_cache(tmp_path / "hub", repository, source.state_dict())
    arch = {"imagenet": "deit_tiny", "imagenet-dino": "deit_small"}[init]
    cache = f"from huggingface_hub import constants; constants.HF_HUB_CACHE = {str(tmp_path / 'hub')!r}"
    done = stage("knn_eval.py", "--data", demo, "--arch", arch, "--init", init, "--limit", "16", "--output", "run",
                 *TINY, cwd=tmp_path, first=cache)
    assert f"init {init}: 150 of 150 backbone tensors loaded" in done.stdout
    assert metrics(tmp_path / "run")["pretrained_on"] == "imagenet"


@pytest.mark.parametrize("arch, init", [("deit_small", "imagenet"), ("resnet50", "imagenet"),
                                        ("resnet50", "imagenet-dino"), ("deit_base", "imagenet-dino"),
                                        ("deit_tiny", "imagenet-stats")])
def test_offline_weights_are_one_clear_error(tmp_path, demo, arch, init):
    refused(stage("finetune.py", "--data", demo, "--arch", arch, "--init", init, "--epochs", "1", "--output", "run", *TINY,
                  cwd=tmp_path, check=False), f"--init {init}", "cannot be downloaded", "--init FILE")
    assert not (tmp_path / "run").exists()


def test_a_model_without_published_dino_weights(tmp_path, demo):
    refused(stage("finetune.py", "--data", demo, "--arch", "resnet18", "--init", "imagenet-dino", *TINY, cwd=tmp_path,
                  check=False),
            "deit_small", "resnet50", "not for resnet18")


@pytest.mark.parametrize("size, amp", [(16, "off"), (64, "bf16")])
def test_bf16_is_left_where_a_cpus_convolutions_go_wrong_in_it(tmp_path, demo, size, amp):
    """A stride of 2 on a map of one place; the gradients of what stays in bf16 are near those of fp32."""
    known = ["--data", demo, "--arch", "resnet18", "--image-size", size, "--limit", "8", "--batch-size", "8", "--epochs", "1",
             "--device", "cpu"]
    done = stage("finetune.py", *known, "--amp", "bf16", "--output", "run", cwd=tmp_path)
    assert metrics(tmp_path / "run")["amp"] == amp
    assert ("3x3 on 1x1" in done.stdout) == (amp == "off")
    model = common.build_model("resnet18", "random", size, 4)[0].to(memory_format=torch.channels_last).eval()
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    gradients = []
    for dtype in (torch.float32, torch.float32 if amp == "off" else torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = model(images).float().square().mean()
        model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[1] - gradients[0]).norm() < 0.2 * gradients[0].norm()


@pytest.mark.parametrize("arch", ["test_vit", "test_resnet"])
def test_statistics_without_features(tmp_path, arch):
    """Of each matrix mean and standard deviation stay, to sampling error, and no weight; norms and biases start anew."""
    model, weights = backbone(arch)
    generator = torch.Generator().manual_seed(3)
    for name, value in weights.items():  # as of a trained model: every layer with statistics of its own
        if value.is_floating_point():
            value.copy_(torch.rand(2, generator=generator)[0] + torch.rand(value.shape, generator=generator))
    drawn, again, other = (build(tmp_path, weights, arch, seed=seed, init_stats=True) for seed in (1, 1, 2))
    matrices = 0
    for name, parameter in drawn.named_parameters():
        trained = weights[name] if parameter.shape == weights[name].shape else None  # None: the classifier
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        elif trained is not None:
            matrices += 1
            error = trained.std() / trained.numel() ** 0.5
            assert (parameter.mean() - trained.mean()).abs() < 5 * error, name
            assert (parameter.std() - trained.std()).abs() < 5 * error, name
            assert not (parameter == trained).any(), name
    assert matrices > 5
    for name, buffer in drawn.named_buffers():
        expected = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}[name.rpartition(".")[2]]
        assert (buffer == expected).all(), name
    same_seed, other_seed = again.state_dict(), other.state_dict()
    first = next(name for name, value in drawn.named_parameters() if value.ndim > 1)
    assert all(torch.equal(value, same_seed[name]) for name, value in drawn.state_dict().items())
    assert not torch.equal(drawn.state_dict()[first], other_seed[first])


def test_a_start_from_statistics_says_so(tmp_path, demo):
    model, weights = backbone()
    torch.save({"stage": "pretrain_dino", "arch": "test_vit", "init": "random", "image_size": 32, "state_dict": weights},
               tmp_path / "model.pt")
    stage("knn_eval.py", "--data", demo, "--init", "model.pt", "--init-stats", "--limit", "16", "--output", "run", *TINY,
          cwd=tmp_path)
    assert metrics(tmp_path / "run")["init"] == "dino-stats"
    for args, words in ((["--init", "random"], "--init random"), (["--init", "imagenet-stats"], "--init imagenet-stats"),
                        (["--init", "model.pt", "--predict", "data"], "--predict needs")):
        done = stage("finetune.py", "--init-stats", *args, *TINY[2:], cwd=tmp_path, check=False)
        refused(done, words)
