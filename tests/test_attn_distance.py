"""attn_distance.py: exact on hand-made attention, equal to a slow version on real models, and refusing the
rest."""
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import attn_distance
import common
from conftest import TINY, metrics, refused, stage, table

DATA = ["--data", "data"]
VIT = ["--arch", "test_vit", *TINY[:1], "64", *TINY[2:]]


@pytest.fixture
def unfused():
    """Attention maps exist only where the model is built without the fused kernel."""
    timm.layers.set_fused_attn(False)
    yield
    timm.layers.set_fused_attn(True)


def attention_by_hand(model, images):
    """softmax(q k / sqrt d) of every block, [(B, H, T, T)], from the weights alone; timm's model is walked by
    hand."""
    x, maps = model.norm_pre(model._pos_embed(model.patch_embed(images))), []
    for block in model.blocks:
        attn, z = block.attn, block.norm1(x)
        q, k, _ = (z @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, dim=2)
        width = q.shape[2] // attn.num_heads
        heads = []
        for h in range(attn.num_heads):
            mine = slice(h * width, (h + 1) * width)
            scores = torch.stack([a @ b.T for a, b in zip(q[..., mine], k[..., mine])]) / width ** 0.5
            heads.append(scores.exp() / scores.exp().sum(2, keepdim=True))
        maps.append(torch.stack(heads, 1))
        x = block(x)
    return maps


def slow_distance(attention, grid, patch, prefix, renormalize=True):
    """(H,) mean distance of one image's attention (H, T, T), pair by pair."""
    places = [(r * patch[0], c * patch[1]) for r in range(grid[0]) for c in range(grid[1])]
    result = []
    for head in attention[:, prefix:, prefix:].double():
        rows = []
        for weights, a in zip(head, places):
            total = float(weights.sum()) if renormalize else 1.0
            rows.append(sum(float(w) / total * ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) ** 0.5
                            for w, b in zip(weights, places)))
        result.append(np.mean(rows))
    return np.array(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_on_hand_made_attention(dtype):
    grid, patch = (3, 5), (16, 8)
    distances = attn_distance.token_distances(grid, patch)
    places = [(r * 16, c * 8) for r in range(3) for c in range(5)]
    pairs = [np.hypot(a[0] - b[0], a[1] - b[1]) for a in places for b in places]
    assert np.allclose(distances.numpy().flatten(), pairs, atol=1e-5)
    identity, uniform = torch.eye(15), torch.full((15, 15), 1 / 15)
    neighbour = torch.zeros(15, 15)
    for i in range(15):  # the patch to the right, or at the right edge to the left: 8 pixels away
        neighbour[i, i + 1 if i % 5 < 4 else i - 1] = 1
    attention = torch.stack([identity, uniform, neighbour]).to(dtype).expand(2, 3, 15, 15)
    reach = attn_distance.mean_attention_distance(attention, distances)
    assert reach.dtype == torch.float32 and reach.shape == (2, 3) and (reach[:, 0] == 0).all()
    rel = 1e-6 if dtype == torch.float32 else 0.01
    assert reach[0, 1].item() == pytest.approx(np.mean(pairs), rel=rel)
    assert reach[1, 2].item() == pytest.approx(8, rel=rel)


def test_square_neighbours_and_the_two_flags():
    distances = attn_distance.token_distances((2, 2), (16, 16), prefix=1)
    # CLS at the centre
    assert torch.allclose(distances[0], torch.tensor([0, 8 * 2 ** 0.5, *[8 * 2 ** 0.5] * 3]))
    half = torch.zeros(1, 1, 4, 4)
    half[0, 0, range(4), [1, 0, 3, 2]] = 0.5  # half goes to the neighbour, the rest went to CLS
    patches = distances[1:, 1:]
    assert attn_distance.mean_attention_distance(half, patches).item() == pytest.approx(16)
    assert attn_distance.mean_attention_distance(half, patches, renormalize=False).item() == pytest.approx(8)


@pytest.mark.parametrize("arch,prefix", [("test_vit", 1), ("deit_tiny_distilled_patch16_224", 2)])
def test_attention_equals_the_softmax_by_hand(unfused, arch, prefix):
    torch.manual_seed(0)
    model = common.create(arch, 3, 48).eval()
    for parameter in model.parameters():  # larger weights, so that attention is far from uniform
        parameter.data *= 1 + 2 * (parameter.ndim > 1)
    images = torch.randn(2, 3, 48, 48)
    maps, slow = common.attention_reader(model)(images), attention_by_hand(model, images)
    assert len(maps) == len(slow) == len(model.blocks)
    for ours, theirs in zip(maps, slow):
        assert ours.shape[3] == 9 + prefix
        assert (ours - theirs).abs().max() < 1e-5
        assert (ours.sum(3) - 1).abs().max() < 1e-5
    assert max(m.std() for m in maps) > 0.02
    with torch.autocast("cpu", torch.bfloat16):
        low = common.attention_reader(model)(images)
    distances = attn_distance.token_distances((3, 3), (16, 16))
    for ours, bf16 in zip(maps, low):
        a, b = (attn_distance.mean_attention_distance(m[:, :, prefix:, prefix:], distances)
                for m in (ours, bf16))
        assert (a / b - 1).abs().max() < 0.01


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """data/, the striped images (13 test images), and run/, a run of finetune.py on them."""
    place = tmp_path_factory.mktemp("trained")
    shutil.copytree(folders / "data", place / "data")
    stage("finetune.py", *DATA, *VIT, "--epochs", "4", "--batch-size", "4", "--lr", "3e-3", "--output", "run", cwd=place)
    return place


def test_points_equal_the_slow_version(trained, unfused):
    done = stage("attn_distance.py", *DATA, *VIT, "--runs", "run", "random", "--batch-size", "4",
                 "--output", "both", cwd=trained)
    assert "there are 13 test images, not 512" in done.stdout
    result, rows = metrics(trained / "both"), table(trained / "both" / "attn_distance.csv")
    assert [run["name"] for run in result["runs"]] == ["run", "random"] and result["counts"]["measured"] == 13
    model, meta = common.load_trained(trained / "run" / "model.pt")
    reach = []
    dataset = common.open_dataset(trained / "data")
    for row in dataset.rows["test"]:
        pixels = torch.from_numpy(dataset.images[row].copy())
        images = common.eval_view(pixels[None], 64, meta["mean"], meta["std"])
        with torch.inference_mode():
            maps = attention_by_hand(model, images)
        reach.append([slow_distance(m[0], (4, 4), (16, 16), 1) for m in maps])
    reach = np.array(reach)
    mine = [row for row in rows if row["run"] == "run"]
    assert len(mine) == reach[0].size and len(rows) == 2 * len(mine)
    for row in mine:
        values = reach[:, int(row["block"]) - 1, int(row["head"]) - 1]
        assert float(row["distance"]) == pytest.approx(values.mean(), rel=1e-3)
        assert float(row["standard_error"]) == pytest.approx(values.std(ddof=1) / 13 ** 0.5, rel=0.02,
                                                             abs=1e-4)
    point = result["runs"][0]["points"][0]
    assert point["distance"] == pytest.approx(reach[:, 0, 0].mean(), rel=1e-3)
    uniform = attn_distance.token_distances((4, 4), (16, 16)).mean().item()
    assert result["runs"][0]["uniform"] == pytest.approx(uniform)
    # untrained attention is nearly uniform
    assert result["runs"][1]["mean"] == pytest.approx(uniform, rel=0.05)
    with Image.open(trained / "both" / "attn_distance.png") as image:
        assert image.width > image.height  # two panels


def test_processes_flags_and_precision(trained):
    args = ["attn_distance.py", *DATA, *VIT, "--images", "11", "--runs", "run"]
    for name, extra, processes in (("one", [], 1), ("two", [], 2), ("cls", ["--include-cls"], 1),
                                   ("raw", ["--no-renormalize"], 1), ("bf16", ["--amp", "bf16"], 1)):
        stage(*args, *extra, "--output", name, cwd=trained, processes=processes)
    runs = {name: metrics(trained / name)["runs"][0] for name in ("one", "two", "cls", "raw", "bf16")}
    assert runs["one"]["images"] == 11
    for a, b, c in zip(*(runs[name]["points"] for name in ("one", "two", "bf16"))):
        assert a["distance"] == pytest.approx(b["distance"], rel=1e-5)
        assert a["standard_error"] == pytest.approx(b["standard_error"], rel=1e-3, abs=1e-6)
        assert a["distance"] == pytest.approx(c["distance"], rel=0.01)
    assert runs["raw"]["mean"] < runs["one"]["mean"] and runs["cls"]["uniform"] < runs["one"]["uniform"]
    assert "is complete" in stage(*args, "--output", "one", cwd=trained).stdout


@pytest.mark.parametrize("args,words", [
    (["--runs", "random", "--arch", "resnet18"], ["--runs random", "resnet18 has no attention"]),
    (["--runs", "random", "--arch", "swin_tiny_patch4_window7_224", "--image-size", "224"],
     ["swin_tiny", "attention"]),
    (["--runs", "random", "--arch", "cait_xxs24_224"], ["no softmax attention of every patch"]),
    (["--runs", "nowhere", "--arch", "test_vit"], ["--runs nowhere", "no model.pt"]),
    (["--runs", "data", "--arch", "test_vit"], ["--runs data", "no model.pt"]),
    (["--arch", "test_vit", "--images", "1"], ["--images 1"]),
    (["--arch", "test_vit", "--compile"], ["--compile"])])
def test_mistakes(trained, args, words):
    done = stage("attn_distance.py", *DATA, *TINY, *args, "--output", "out", cwd=trained, check=False)
    refused(done, *words)
    assert not (trained / "out").exists()
