"""Patches of any size, and weights of any origin: what --patch-size and --init do with the files that people have."""
import math

import pytest
import timm
import torch

import common
from conftest import TINY, metrics, refused, stage

SMALL = ["--data", "demo", "--arch", "test_vit", *TINY]
ONCE = ["--epochs", "1", "--limit", "8"]


@pytest.fixture
def here(demo, tmp_path):
    """A folder with demo/ in it."""
    (tmp_path / "demo").symlink_to(demo)
    return tmp_path


def seeded(name, **options):
    """A timm model in eval mode whose weights are random to the last bias, without a classifier."""
    torch.manual_seed(7)
    model = timm.create_model(name, num_classes=0, **options).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return model


def random_images(side, channels=3):
    """Two images (2, channels, side, side) in [0, 1]."""
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(0))


def built(folder, content, arch, image_size, **options):
    """build_model of --arch with --init on a file of this content."""
    torch.save(content, folder / "file.pth")
    return common.build_model(arch, str(folder / "file.pth"), image_size, 0, **options)[0].eval()


@torch.no_grad()
def assert_same(model, reference, side=32):
    """Both give the same features of the same images."""
    images = random_images(side)
    assert (model(images) - reference(images)).abs().max() < 1e-5


# ---------------------------------------------------------------- patches -----------------------------------

def test_the_patch_size_of_a_run_is_that_of_all_that_follows(here):
    """32 pixels in patches of 8 are 4 x 4 tokens, in the model and in every stage that takes its model.pt."""
    small = [*SMALL, "--patch-size", "8"]
    stage("pretrain_dino.py", *small, *ONCE, "--batch-size", "4", "--output", "dino", cwd=here)
    own = ["--data", "demo", "--init", "dino/model.pt", "--device", "cpu", "--amp", "off"]
    stage("finetune.py", *own, *ONCE, "--batch-size", "4", "--output", "tuned", cwd=here)
    stage("segment.py", *own, *ONCE, "--batch-size", "4", "--output", "masks", cwd=here)
    stage("knn_eval.py", *own, "--limit", "8", "--output", "knn", cwd=here)
    stage("attn_distance.py", *small, "--runs", "tuned", "random", "--images", "4", "--output", "reach", cwd=here)
    stage("saliency.py", "--data", "demo", "--runs", "tuned", "--images", "2", "--score-images", "2", "--output", "maps",
          "--device", "cpu", cwd=here)
    for name in ("dino", "tuned", "masks"):
        weights, meta = common.read_checkpoint(here / name / "model.pt")
        assert meta["patch_size"] == 8
        assert weights["patch_embed.proj.weight"].shape[2:] == (8, 8)
        assert weights["pos_embed"].shape[1] == 1 + 4 * 4
    assert metrics(here / "dino")["settings"]["local_size"] == 16  # 3/7 of 32 pixels in patches of 8
    assert [run["patch_size"] for run in metrics(here / "reach")["runs"]] == [8, 8]


def test_patch_embeddings_are_resampled(tmp_path, capsys):
    """Patches of 8 pixels, each enlarged to 16, are to the resampled model what they were to the model of the file."""
    model = seeded("test_vit", img_size=32, patch_size=8)
    large = built(tmp_path, model.state_dict(), "test_vit", 64)
    assert "patches of 8 pixels are resampled to 16" in capsys.readouterr().out
    images = random_images(32)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(-1, 1, 8, 8)
    patches = torch.nn.functional.interpolate(patches, (16, 16), mode="bicubic", antialias=True)
    enlarged = patches.view(2, 3, 4, 4, 16, 16).transpose(3, 4).reshape(2, 3, 64, 64)
    with torch.no_grad():
        assert (large(enlarged) - model(images)).abs().max() < 1e-4


@pytest.mark.parametrize("arch, patch, words", [
    ("resnet18", 8, ["--patch-size 8", "resnet18"]), ("test_vit", 5, ["--image-size 32", "5-pixel"]),
    ("test_vit", 0, ["--patch-size 0"]), ("test_vit", 64, ["--image-size 32", "64-pixel"])])
def test_patch_sizes_that_cannot_be(here, arch, patch, words):
    for script in ("finetune.py", "segment.py", "pretrain_dino.py"):
        done = stage(script, *SMALL, *ONCE, "--batch-size", "4", "--arch", arch, "--patch-size", patch, "--output", "run",
                     cwd=here, check=False)
        refused(done, *words)
        assert not (here / "run").exists()


# ---------------------------------------------------------------- image sizes -------------------------------

@pytest.mark.parametrize("arch, there, size, prefix", [
    ("test_vit", 64, 32, 1), ("deit_tiny_distilled_patch16_224", 64, 32, 2),
    ("deit3_small_patch16_224", 64, 32, 0), ("vit_small_patch14_reg4_dinov2", 70, 28, 0), ("flexivit_small", 32, 64, 0),
    ("vit_wee_patch16_reg1_gap_256", 64, 32, 0), ("cait_xxs24_224", 64, 32, 0), ("hiera_tiny_224", 64, 32, 0)])
def test_position_embeddings_of_any_vit_are_resampled(tmp_path, arch, there, size, prefix):
    """`prefix` of its position embeddings belong to no patch and stay; all other tensors are those of the file."""
    weights = seeded(arch, img_size=there).state_dict()
    model = built(tmp_path, weights, arch, size)
    loaded = model.state_dict()
    for name in weights.keys() - {"pos_embed"}:
        assert torch.equal(loaded[name], weights[name]), name
    places = weights["pos_embed"]
    side, side_now = (math.isqrt(p.shape[1] - prefix) for p in (places, loaded["pos_embed"]))
    assert side != side_now
    grid = places[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (side_now, side_now), mode="bicubic", antialias=True)
    expected = torch.cat([places[:, :prefix], grid.flatten(2).transpose(1, 2)], 1)
    assert (loaded["pos_embed"] - expected).abs().max() < 1e-6
    assert model(random_images(size)).isfinite().all()


# ---------------------------------------------------------------- files of others ---------------------------

def test_imagenet_example(tmp_path):
    model = seeded("resnet18")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    content = {"epoch": 90, "arch": "resnet18", "best_acc1": torch.tensor(69.8), "optimizer": optimizer.state_dict(),
               "state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()}}
    assert_same(built(tmp_path, content, "resnet18", 64), model, 64)


def test_the_arch_in_a_file_of_others_is_their_name(here):
    """It neither decides --arch, whose default stays deit_small, nor contradicts it."""
    torch.save({"arch": "vit_small", "state_dict": seeded("test_vit", img_size=32).state_dict()}, here / "moco.pth")
    run = ["--data", "demo", "--limit", "8", "--init", "moco.pth", *TINY]
    stage("knn_eval.py", *run, "--arch", "test_vit", "--output", "run", cwd=here)
    assert metrics(here / "run")["arch"] == "test_vit" and metrics(here / "run")["init"] == "moco"
    done = stage("knn_eval.py", *run, "--output", "other", cwd=here, check=False)
    refused(done, "moco.pth does not fit VisionTransformer", "missing: blocks.6", "cls_token (1, 1, 64) for (1, 1, 384)")


def test_mae(tmp_path, capsys):
    model = seeded("test_vit", img_size=32)
    decoder = {"mask_token": torch.rand(1, 1, 32), "decoder_pos_embed": torch.rand(1, 5, 32),
               "decoder_embed.weight": torch.rand(32, 64), "decoder_blocks.0.attn.qkv.weight": torch.rand(96, 32)}
    assert_same(built(tmp_path, {"model": {**model.state_dict(), **decoder}}, "test_vit", 32), model)
    assert "78 of 78 backbone tensors loaded, left out: mask_token*, decoder_*" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        built(tmp_path, {"model": {**model.state_dict(), **decoder, "encoder_norm.weight": torch.rand(64)}}, "test_vit", 32)
    assert "left over: encoder_norm.weight" in capsys.readouterr().err


@pytest.mark.parametrize("size", [64, 32])
def test_dinov2(tmp_path, size, capsys):
    """The authors' layout without and with registers, which there have position embeddings for CLS and in timm have not."""
    model = seeded("test_vit", img_size=64, init_values=0.1)
    theirs = {**model.state_dict(), "mask_token": torch.zeros(1, 64)}
    reference = built(tmp_path, model.state_dict(), "test_vit", size, init_values=0.1)
    assert_same(built(tmp_path, theirs, "test_vit", size, init_values=0.1), reference, size)
    registers = {"init_values": 0.1, "reg_tokens": 4, "no_embed_class": True}
    model = seeded("test_vit", img_size=64, **registers)
    reference = built(tmp_path, model.state_dict(), "test_vit", size, **registers)
    theirs = {**model.state_dict(), "mask_token": torch.zeros(1, 64)}
    first = torch.full((1, 1, 64), 0.3)
    theirs["register_tokens"] = theirs.pop("reg_token")
    theirs["cls_token"] = theirs["cls_token"] - first
    theirs["pos_embed"] = torch.cat([first, theirs["pos_embed"]], 1)
    capsys.readouterr()
    assert_same(built(tmp_path, theirs, "test_vit", size, **registers), reference, size)
    assert "left out: mask_token*" in capsys.readouterr().out


@pytest.mark.skipif(not timm.is_model("vit_small_patch16_dinov3"), reason="this timm has no DINOv3")
def test_dinov3(tmp_path, capsys):
    """The authors' layout; biases that a model has no place for are left out where they are 0, and else refused."""
    model = seeded("vit_small_patch16_dinov3_qkvb", img_size=32)
    weights = model.state_dict()
    theirs = {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.rand(16)}
    for name, tensor in weights.items():
        block, _, last = name.rpartition(".")
        if last == "q_bias":
            bias = torch.cat([tensor, torch.zeros(384), weights[f"{block}.v_bias"]])
            theirs |= {f"{block}.qkv.bias": bias, f"{block}.qkv.bias_mask": torch.ones(3 * 384)}
        elif last not in ("v_bias", "k_bias"):
            name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
            theirs[name.replace("reg_token", "storage_tokens")] = tensor
    assert_same(built(tmp_path, theirs, "vit_small_patch16_dinov3_qkvb", 32), model)
    assert "left out: mask_token*" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        built(tmp_path, theirs, "vit_small_patch16_dinov3", 32)
    assert "left over: blocks.0.attn.qkv.bias" in capsys.readouterr().err
    for name in theirs:
        if name.endswith("qkv.bias"):
            theirs[name].zero_()
    built(tmp_path, theirs, "vit_small_patch16_dinov3", 32)


@pytest.mark.parametrize("text", [
    ["text.transformer.resblocks.0.ln_1.weight", "text.positional_embedding", "text.text_projection"],
    ["transformer.resblocks.0.ln_1.weight", "token_embedding.weight", "positional_embedding", "ln_final.weight",
     "text_projection", "logit_bias"]])
def test_vision_towers_of_open_clip(tmp_path, capsys, text):
    for arch, options in (("test_vit", {"img_size": 32}), ("resnet18", {})):
        model = seeded(arch, **options)
        theirs = {f"visual.trunk.{name}": tensor for name, tensor in model.state_dict().items()}
        theirs |= {name: torch.rand(8) for name in ["logit_scale", "visual.head.proj.weight", *text]}
        assert_same(built(tmp_path, theirs, arch, 32), model)
        out = capsys.readouterr().out
        assert "left out: visual.head.*" in out and "logit_scale*" in out and f"{text[0].split('.')[0]}.*" in out


def test_radimagenet(tmp_path):
    """A ResNet-50 as torch.nn.Sequential of its children: convolution, norm, ReLU, pooling, four layers."""
    model = seeded("resnet50")
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    theirs = {}
    for name, tensor in model.state_dict().items():
        child, _, rest = name.partition(".")
        theirs[f"backbone.{numbers[child]}.{rest}"] = tensor
    assert_same(built(tmp_path, theirs, "resnet50", 64), model, 64)


def as_transformers(weights, dinov2=False):
    """A timm ViT's weights in the names of Hugging Face's transformers: of its ViT, or its Dinov2."""
    top = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "pos_embed": "embeddings.position_embeddings",
           "cls_token": "embeddings.cls_token", "dist_token": "embeddings.distillation_token",
           "reg_token": "embeddings.register_tokens", "norm": "layernorm"}
    inner = {"attn.proj": "attention.output.dense", "norm1": "layernorm_before", "norm2": "layernorm_after",
             "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    if dinov2:
        inner = {"attn.proj": "attention.output.dense", "ls1": "layer_scale1", "ls2": "layer_scale2"}
    theirs = {}
    for name, tensor in weights.items():
        part, _, last = name.rpartition(".")
        if not part.startswith("blocks."):
            name = top[name] if name in top else f"{top[part]}.{last}"
            theirs[name] = tensor
            continue
        _, number, module = part.split(".", 2)
        layer = f"encoder.layer.{number}"
        if module == "attn.qkv":
            for kind, third in zip(("query", "key", "value"), tensor.chunk(3)):
                theirs[f"{layer}.attention.attention.{kind}.{last}"] = third
        else:
            theirs[f"{layer}.{inner.get(module, module)}.{last.replace('gamma', 'lambda1')}"] = tensor
    return theirs


@pytest.mark.parametrize("arch, prefix, options, more", [
    ("test_vit", "vit.", {}, {"classifier.weight": torch.ones(2, 64)}),
    ("test_vit", "", {}, {"pooler.dense.weight": torch.ones(64, 64)}),
    ("deit_tiny_distilled_patch16_224", "deit.", {}, {"cls_classifier.bias": torch.ones(2),
                                                      "distillation_classifier.bias": torch.ones(2)}),
    ("test_vit", "dinov2.", {"init_values": 0.1}, {"dinov2.embeddings.mask_token": torch.ones(1, 64)})])
def test_hugging_face_transformers(tmp_path, arch, prefix, options, more, capsys):
    model = seeded(arch, img_size=32, **options)
    theirs = as_transformers(model.state_dict(), "init_values" in options)
    theirs = {f"{prefix}{name}": tensor for name, tensor in theirs.items()}
    assert_same(built(tmp_path, {**theirs, **more}, arch, 32, **options), model)
    name, = (name for name in theirs if "layer.0.attention.attention.key.weight" in name)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        built(tmp_path, {k: v for k, v in theirs.items() if k != name}, arch, 32, **options)
    assert "missing: blocks.0.attn.qkv.weight" in capsys.readouterr().err


def test_hugging_face_dinov2_with_registers(tmp_path):
    registers = {"init_values": 0.1, "reg_tokens": 4, "no_embed_class": True}
    model = seeded("test_vit", img_size=32, **registers)
    theirs = as_transformers(model.state_dict(), True)
    theirs["embeddings.mask_token"] = torch.ones(1, 64)
    theirs["embeddings.position_embeddings"] = torch.cat([torch.zeros(1, 1, 64), theirs["embeddings.position_embeddings"]], 1)
    theirs = {f"dinov2_with_registers.{name}": tensor for name, tensor in theirs.items()}
    assert_same(built(tmp_path, theirs, "test_vit", 32, **registers), model)


@pytest.mark.parametrize("arch, options", [("test_vit", {"img_size": 32}), ("resnet18", {}), ("xcit_nano_12_p16_224", {})])
def test_stems_of_one_channel(tmp_path, arch, options, capsys):
    """On a grey image, three times the same channel, the model gives what the file's gave on one: weights are a third."""
    model = seeded(arch, in_chans=1, **options)
    ours = built(tmp_path, model.state_dict(), arch, 32)
    assert "stem of one channel is spread over three" in capsys.readouterr().out
    grey = random_images(32, 1)
    with torch.no_grad():
        assert (ours(grey.expand(-1, 3, -1, -1)) - model(grey)).abs().max() < 1e-5


# ---------------------------------------------------------------- as commands -------------------------------

def test_files_of_others_by_command(here):
    """At another size, in others' names, of one channel and in other patches, all at once."""
    model = seeded("test_vit", img_size=32, patch_size=8, in_chans=1)
    theirs = {f"vit.{name}": tensor for name, tensor in as_transformers(model.state_dict()).items()}
    torch.save(theirs, here / "pytorch_model.bin")
    done = stage("finetune.py", *SMALL, *ONCE, "--batch-size", "4", "--init", "pytorch_model.bin", "--image-size", "48",
                 "--output", "run", cwd=here)
    assert "78 of 78 backbone tensors loaded" in done.stdout and "resampled to 16" in done.stdout
    assert metrics(here / "run")["pretrained_on"] == "pytorch_model"
    torch.save(seeded("resnet18").state_dict(), here / "other.pth")
    refused(stage("finetune.py", *SMALL, "--init", "other.pth", "--output", "none", cwd=here, check=False), "0 of 78",
            "missing: cls_token", "left over: conv1")


def test_xcit_in_every_stage(here):
    """Its attention is over channels, so that it gets Grad-CAM; its patches have their places."""
    run = ["--data", "demo", "--arch", "xcit_nano_12_p16_224", *ONCE, "--batch-size", "4", *TINY]
    stage("finetune.py", *run, "--output", "tuned", cwd=here)
    stage("segment.py", *run, "--init", "tuned/model.pt", "--output", "masks", cwd=here)
    stage("saliency.py", "--data", "demo", "--runs", "tuned", "--images", "2", "--score-images", "2", "--output", "maps",
          "--device", "cpu", cwd=here)
    assert metrics(here / "maps")["runs"][0]["method"] == "gradcam"


def test_models_without_a_map_are_refused(here):
    run = ["--data", "demo", "--arch", "levit_128s", *ONCE, "--batch-size", "4", *TINY]
    refused(stage("segment.py", *run, "--output", "masks", cwd=here, check=False), "no map of its patches")
    stage("finetune.py", *run, "--output", "tuned", cwd=here)
    explain = ["--data", "demo", "--runs", "tuned", "--output", "maps", "--device", "cpu"]
    done = stage("saliency.py", *explain, cwd=here, check=False)
    refused(done, "no map of its patches")
    assert not (here / "masks").exists() and not (here / "maps").exists()


def test_batch_norm_of_one_image(here):
    run = ["--data", "demo", "--arch", "resnet18", *ONCE, "--batch-size", "1", *TINY]
    refused(stage("finetune.py", *run, "--output", "run", cwd=here, check=False), "--batch-size 1", "resnet18", "at least 2")
    done = stage("pretrain_dino.py", *run, "--local-crops", "1", "--output", "run", cwd=here, check=False)
    refused(done, "--batch-size 1", "resnet18", "--local-crops 2")
    assert not (here / "run").exists()
    stage("finetune.py", *run, "--freeze", "--output", "frozen", cwd=here)


def test_a_whole_model_is_refused_in_plain_letters(here):
    """What torch says of it has a part in bold."""
    torch.save(seeded("test_vit"), here / "whole.pth")
    done = stage("finetune.py", *SMALL, "--init", "whole.pth", "--output", "run", cwd=here, check=False)
    refused(done, "--init whole.pth: refused", "save its state_dict alone")
    assert "\x1b" not in done.stderr
