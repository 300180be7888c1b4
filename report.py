"""Tables, figures and plain answers out of finished runs.

    python report.py runs/demo                      # every run below a folder, into runs/demo/report
    python report.py runs/a runs/b --output report

Reads the metrics.json of any run folder, whoever wrote it; writes report.md, results.csv, figure1.png to
figure5.png (those of Matsoukas et al. 2023) and report.html, one page that needs no server. Runs on another
dataset, split or image size are kept apart; a missing cell is shown as missing; damaged runs are listed.
"""
import argparse
import base64
import csv
import html
import itertools
import json
import math
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

import common
from common import fail, say

OWN = "DINO on this dataset's training images, from"
INITS = {"random": "untrained", "imagenet": "ImageNet, supervised", "imagenet-dino": "ImageNet, DINO",
         "dino": f"{OWN} random weights", "imagenet+dino": f"{OWN} imagenet",
         "imagenet-dino+dino": f"{OWN} imagenet-dino"}
AFTER_DINO = ("dino", "imagenet+dino", "imagenet-dino+dino")
STAGES = {"finetune": "fine-tuning", "probe": "linear probe", "knn_eval": "k-NN", "segment": "segmentation"}
NEEDED = {**dict.fromkeys(("stage", "dataset", "arch", "init", "metric"), str), "seed": int, "val": dict,
          "test": dict}
VITS = ("vit", "deit", "beit", "eva", "cait", "xcit", "swin")


# ---------------------------------------------------------------- reading -----------------------------------

def read_run(folder):
    """The metrics.json of a folder, with "folder" and "args"; ValueError says what is wrong with it."""
    run = json.loads((folder / "metrics.json").read_text())
    wrong = [name for name, kind in NEEDED.items()
             if not isinstance(run, dict) or not isinstance(run.get(name), kind)]
    if wrong:
        raise ValueError(f"no usable {', '.join(wrong)}")
    run["folder"], run["args"] = folder, {}
    run["kind"] = "probe" if run.get("freeze") and run["stage"] == "finetune" else run["stage"]
    if run["kind"] in STAGES and not isinstance(run["test"].get(run["metric"]), (int, float, type(None))):
        raise ValueError(f"test {run['metric']} is no number")
    if (folder / "args.json").exists():
        run["args"] = json.loads((folder / "args.json").read_text())
        run["args"].get("arguments", {}).keys()
    return run


def read_steps(place):
    """{folder: what is wrong} of the steps of run_all.sh that failed, were left out or did not end."""
    states = {}
    for file in sorted(place.rglob("logs/steps.tsv")):
        runs, seen = file.parent.parent, set()
        for line in file.read_text(errors="replace").splitlines():
            if line.count("\t") == 4:  # the last line may be torn
                name, _, code, _, words = line.split("\t")
                seen.add(name)
                states[runs / name] = None if code == "0" else (
                    f"left out: {words}" if code == "left out" else f"failed: exit code {code}, {words}")
        for log in sorted(file.parent.glob("*.log")):
            if log.stem not in seen and not (runs / log.stem).exists():
                states[runs / log.stem] = f"incomplete: started, see {log}"
    for folder in states:
        done, log = folder / "metrics.json", folder.parent / "logs" / f"{folder.name}.log"
        if done.exists() and log.exists() and done.stat().st_mtime > log.stat().st_mtime:
            states[folder] = None  # it has been finished by hand
    return {folder: state for folder, state in states.items() if state}


def read_runs(places):
    """(runs, troubles): every complete run under the places; [(folder, what is wrong)] of all else."""
    runs, troubles, seen = [], {}, set()
    for place in map(Path, places):
        if not place.is_dir():
            fail(f"{place}: there is no such folder of runs")
        for folder in sorted({file.parent for name in ("args.json", "metrics.json")
                              for file in place.rglob(name)}):
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            try:
                if (folder / "metrics.json").exists():
                    runs.append(read_run(folder))
                else:
                    troubles[folder] = "incomplete: no metrics.json"
            except (ValueError, OSError, AttributeError) as error:
                troubles[folder] = f"damaged: metrics.json or args.json cannot be used: {error}"
        troubles |= read_steps(place)
    if not runs and not troubles:
        fail(f"{', '.join(map(str, places))}: no run folders (with metrics.json or args.json) in there")
    return runs, sorted(troubles.items())


def setting(run):
    """What runs must share to be put into one table."""
    return run["dataset"], run.get("split"), run.get("image_size"), run["metric"]


def recipe(run):
    """The arguments of a run that decide its result, but for its model, its start and its seed."""
    own = common.NOT_COMPARED | {"arch", "init", "init_label", "init_key", "seed", "data_dir", "csv",
                                 "split_file"}
    return {k: v for k, v in run["args"].get("arguments", {}).items() if k not in own}


def cells(runs):
    """({(kind, arch, init): {seed: run}} of the scored runs, [(run, why it is left out)]). Runs of one cell
    must have been made alike: the most numerous that were, else the first, are taken."""
    table, spare = {}, []
    key_of = lambda run: (run["kind"], run["arch"], run["init"])  # noqa: E731
    for key, group in itertools.groupby(sorted(runs, key=key_of), key_of):
        alike = defaultdict(dict)
        for run in sorted(group, key=lambda run: not recipe(run)):  # one that does not say fits any
            made = json.dumps(recipe(run), sort_keys=True, default=str) if recipe(run) or not alike else \
                max(alike, key=lambda key: len(alike[key]))
            seeds = alike[made]
            if run["seed"] in seeds:
                same = seeds[run["seed"]]["folder"].name
                spare.append((run, f"another run of seed {run['seed']}, as {same}"))
            seeds.setdefault(run["seed"], run)
        table[key] = max(alike.values(), key=len)
        taken = recipe(next(iter(table[key].values())))
        for run in (run for seeds in alike.values() if seeds is not table[key] for run in seeds.values()):
            mine = recipe(run)
            differ = [f"{k} {mine.get(k)}, not {taken.get(k)}" for k in sorted({*mine, *taken})
                      if mine.get(k) != taken.get(k)]
            spare.append((run, f"made otherwise than the runs of its kind: {', '.join(differ)}"))
    return table, spare


def start_of(run):
    """The --init of a run, a name or a file; None where it is not known."""
    return run["args"].get("arguments", {}).get("init")


def headline(run):
    """The test score of a run's headline metric, or None."""
    value = run["test"].get(run["metric"])
    return None if value is None or math.isnan(value) else value


# ---------------------------------------------------------------- statistics --------------------------------

def summary(by_seed):
    """(median, standard deviation or None for one value, n) of the headlines that are defined."""
    defined = [value for value in map(headline, by_seed.values()) if value is not None]
    if not defined:
        return None, None, 0
    spread = float(np.std(defined, ddof=1)) if len(defined) > 1 else None
    return float(np.median(defined)), spread, len(defined)


def split_names(text, classes):
    """The names of classes, in their order, that joined by blanks are this text, None if there are none such.
    Names may hold blanks, and start alike."""
    if not text:
        return []
    for i, name in enumerate(classes):
        if f"{text} ".startswith(f"{name} "):
            rest = split_names(text[len(name) + 1:], classes[i + 1:])
            if rest is not None:
                return [name, *rest]
    return None


def image_scores(run):
    """(paths, score) of a run's predictions.csv: score(rows (n,) int) is its headline metric over these
    images. None where the file is not there or does not give the run's own score."""
    try:
        with open(run["folder"] / "predictions.csv", newline="") as lines:
            head, *rows = list(csv.reader(lines))
        rows.sort()
        paths, name = [row[0] for row in rows], run["metric"]
        if run["kind"] == "segment":
            values = np.array([[float(row[i] or "nan") for i, what in enumerate(head)
                                if what.startswith(f"{name}_")] for row in rows])
            score = lambda at: common.mean_defined([  # noqa: E731
                v[~np.isnan(v)].mean() for v in values[at].T if not np.isnan(v).all()])
        else:
            task = "multilabel" if "roc_auc_by_label" in run["test"] else "classes"
            classes, values = head[3:], np.array([row[3:] for row in rows], float)
            labels = np.array([classes.index(row[1]) if task == "classes" else
                               [float(c in split_names(row[1], classes)) for c in classes] for row in rows])
            score = lambda at: common.metric(name, task, labels[at], values[at])  # noqa: E731
        whole = score(np.arange(len(rows)))
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return None
    return (paths, score) if whole is not None and abs(whole - headline(run)) < 1e-3 else None


def paired_difference(first, second, resamples=500):
    """Mean over common seeds of headline(first) - headline(second): (difference, [low, high] or None, seeds,
    test images), None without a common seed. The 95 % percentile interval resamples seeds and test images,
    the same for both; without predictions of the same images (0 images), the seeds alone."""
    seeds = sorted(s for s in first.keys() & second.keys()
                   if headline(first[s]) is not None and headline(second[s]) is not None)
    if not seeds:
        return None
    differences = np.array([headline(first[s]) - headline(second[s]) for s in seeds])
    scores = [image_scores(side[s]) for s in seeds for side in (first, second)]
    images = len(scores[0][0]) if None not in scores and all(s[0] == scores[0][0] for s in scores) else 0
    if not images and len(seeds) == 1:
        return float(differences.mean()), None, 1, 0
    rng, values = np.random.default_rng(0), []
    for _ in range(resamples):
        chosen = rng.integers(len(seeds), size=len(seeds))
        if images:
            rows, found = rng.integers(images, size=images), {}
            for i in set(chosen.tolist()):
                a, b = scores[2 * i][1](rows), scores[2 * i + 1][1](rows)
                found[i] = None if None in (a, b) else a - b
            values += [np.mean([found[i] for i in chosen])] if None not in found.values() else []
        else:
            values.append(differences[chosen].mean())
    interval = np.percentile(values, [2.5, 97.5]).tolist() if len(values) * 2 > resamples else None
    return float(differences.mean()), interval, len(seeds), images


def is_vit(arch):
    """Whether an architecture is a transformer; others count as CNNs."""
    return any(name in arch for name in VITS)


def size_of(by_seed):
    """Millions of parameters of a cell's model."""
    return (next(iter(by_seed.values())).get("parameters") or 0) / 1e6


def comparisons(table):
    """[(what, first, second, paired_difference)]: "vit": each ViT less the CNN nearest in size, by kind and
    init; "dino": each model after DINO less before. first and second are keys of the table."""
    pairs = []
    for kind, arch, init in table:
        rivals = [key for key in table if key[::2] == (kind, init) and not is_vit(key[1])]
        if is_vit(arch) and rivals:
            mine = math.log(size_of(table[kind, arch, init]) or 1)
            near = min(rivals, key=lambda key: abs(math.log(size_of(table[key]) or 1) - mine))
            pairs.append(("vit", (kind, arch, init), near))
        before = (kind, arch, init.removesuffix("dino").rstrip("+-") or "random")
        if init in AFTER_DINO and before in table:
            pairs.append(("dino", (kind, arch, init), before))
    order = lambda pair: (pair[0] == "dino", [*STAGES].index(pair[1][0]),  # noqa: E731
                          [*INITS, pair[1][2]].index(pair[1][2]), size_of(table[pair[1]]))
    found = [(*pair, paired_difference(table[pair[1]], table[pair[2]])) for pair in sorted(pairs, key=order)]
    return [pair for pair in found if pair[3]]


def in_words(result, better, worse):
    """A difference as a sentence, only as strong as its interval allows."""
    difference, interval, seeds, images = result
    over = f"{seeds} seed{'s' * (seeds > 1)}" + (f", {images} test images" if images else "")
    if interval is None:
        return f"cannot be told (difference {difference:+.3f}, {over}, no interval)"
    evidence = f"difference {difference:+.3f}, 95 % interval {interval[0]:+.3f} to {interval[1]:+.3f}, {over}"
    if interval[0] <= 0 <= interval[1]:
        return f"no difference shown ({evidence}; the interval includes 0)"
    return f"{better if interval[0] > 0 else worse} ({evidence})"


def answers(table, pairs):
    """The paper's questions, each with what these runs say: [(question, answer)]."""
    result = []

    def compare(question, what, kind, inits, better, worse):
        said = [f"{a[1]} against {b[1]}: {in_words(found, better, worse)}" if what == "vit" else
                f"{a[1]}, {b[2]} to {a[2]}: {in_words(found, better, worse)}"
                for kind_of, a, b, found in pairs if kind_of == what and a[0] == kind and a[2] in inits]
        result.extend((question, line) for line in said or ["no runs to tell"] * (kind != "segment"))

    for kind in [kind for kind in ("finetune", "segment") if any(key[0] == kind for key in table)]:
        where = " in segmentation" if kind == "segment" else ""
        ends = "the ViT is better", "the ViT is worse"
        compare(f"Does the ViT lose from scratch{where}?", "vit", kind, ["random"], *ends)
        compare(f"Is the ViT on par from ImageNet weights{where}?", "vit", kind, ["imagenet"], *ends)
        compare(f"And after DINO on the dataset's own images{where}?", "vit", kind, AFTER_DINO, *ends)
        compare(f"Does DINO help {STAGES[kind]}?", "dino", kind, AFTER_DINO, "it helps", "it hurts")
    if any(key[0] != "segment" for key in table):
        compare("Does DINO help k-NN?", "dino", "knn_eval", AFTER_DINO, "it helps", "it hurts")
        both = [[summary(table[(kind, *model)])[0] for kind in ("finetune", "knn_eval")]
                for stage, *model in table if stage == "finetune" and ("knn_eval", *model) in table]
        ranks = [(a, b) for a, b in itertools.combinations(both, 2) if None not in (*a, *b)]
        same = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in ranks)
        result.append(("Do k-NN and fine-tuning agree?", f"they rank {same} of {len(ranks)} pairs of models "
                       "(an architecture and its start) alike" if ranks else "no runs to tell"))
    return result


# ---------------------------------------------------------------- tables ------------------------------------

def number(value, digits=3):
    """A number for a table; a dash where it is missing."""
    return "-" if value is None else f"{value:.{digits}f}"


def archs_and_inits(table, kind):
    """The architectures (CNNs, then ViTs, by size) and the inits of a kind of run."""
    archs = {arch: size_of(by_seed) for (k, arch, _), by_seed in table.items() if k == kind}
    inits = {init for k, _, init in table if k == kind}
    return (sorted(archs, key=lambda arch: (is_vit(arch), archs[arch], arch)),
            [init for init in INITS if init in inits] + sorted(inits - INITS.keys()))


def spread_of(by_seed):
    """(median or None, (down, up) or None): of several seeds the standard deviation, of one its interval over
    test images."""
    median, spread, n = summary(by_seed)
    interval = next(iter(by_seed.values()))["test"].get("interval") if n == 1 and len(by_seed) == 1 else None
    if spread is None and interval:
        return median, (max(median - interval[0], 0), max(interval[1] - median, 0))
    return median, spread and (spread, spread)


def score_table(table, kind):
    """(head, rows): a row an architecture, a column an init: median ± standard deviation over n seeds, or of
    one seed its interval over test images."""
    archs, inits = archs_and_inits(table, kind)

    def cell(by_seed):
        median, spread, n = summary(by_seed)
        _, reach = spread_of(by_seed) if n else (None, None)
        between = f" ± {spread:.3f}" if n > 1 else \
            f" [{median - reach[0]:.3f}, {median + reach[1]:.3f}]" if reach else ""
        return f"{median:.3f}{between} (n = {n})" if n else "undefined"
    return ["", *inits], [[arch, *(cell(table[kind, arch, init]) if (kind, arch, init) in table else "missing"
                                   for init in inits)] for arch in archs]


def capacity_table(table):
    """(head, rows): the fine-tuned score by number of parameters."""
    rows = []
    for (kind, arch, init), by_seed in table.items():
        if kind == "finetune":
            median, spread, n = summary(by_seed)
            rows.append([arch, init, f"{size_of(by_seed):.1f}", number(median), number(spread), n])
    return ["", "init", "parameters (millions)", "median", "standard deviation", "n"], sorted(
        rows, key=lambda row: (row[1], is_vit(row[0]), float(row[2])))


def segment_table(table):
    """(head, rows): IoU and Dice, means over test images, median ± standard deviation over seeds."""
    rows = []
    archs, inits = archs_and_inits(table, "segment")
    for init, arch in itertools.product(inits, archs):
        by_seed = table.get(("segment", arch, init), {})
        cell = lambda name: " ± ".join(number(v) for v in summary({  # noqa: E731
            i: {"test": run["test"], "metric": name} for i, run in by_seed.items()})[:2] if v is not None)
        values = [cell(name) or "missing" for name in ("iou", "dice", "hd95", "constant_iou")]
        rows += [[arch, init, *values, len(by_seed)]] if by_seed else []
    return ["", "init", "IoU", "Dice", "HD95 (pixels)", "IoU of the best constant mask", "n"], rows


def pair_table(pairs):
    """(head, rows) of comparisons."""
    rows = [[STAGES[a[0]], ", ".join(a[1:]), ", ".join(b[1:]), f"{found[0]:+.3f}",
             "{:+.3f} to {:+.3f}".format(*found[1]) if found[1] else "none", *found[2:]]
            for _, a, b, found in pairs]
    return ["", "first", "second", "first - second", "95 % interval", "seeds", "images"], rows


MAP_SCORES = ("energy: share of the map inside the mask; pointing: share of images whose peak is inside; "
              "iou: of the mask and as many top pixels; deletion, insertion: area under the probability as "
              "pixels go, come")


def other_tables(runs):
    """Parts for the stages that are not scored by cell: pretraining, saliency, attention distance."""
    rows = [[run["folder"].name, run["init"], run.get("epochs"), number(run["val"].get("knn_before")),
             number(run["val"].get("knn")), (run.get("collapse") or "no").split(":")[0]]
            for run in runs if run["kind"] == "pretrain_dino"]
    parts = ["DINO pretraining: k-NN accuracy on validation before and after", (
        ["", "weights", "epochs", "before", "after", "collapsed"], rows)] if rows else []
    for run in runs:
        try:
            if run["kind"] == "saliency":
                names = list(run["runs"][0]["map"])
                count = run["runs"][0]["images"]
                parts += [f"Saliency of {count} test images, mean [95 % interval]. {MAP_SCORES}", (
                    ["", "method", *names, "beats a centred blob"],
                    [[one["name"], one["method"], *(
                        "{:.3f} [{:.3f}, {:.3f}]".format(value["mean"], *value["interval"])
                        if value["interval"] else "undefined" for value in map(one["map"].get, names)),
                      "yes" if one["gain_over_gaussian"][names[0]]["beats"] else "no"]
                     for one in run["runs"]])]
            if run["kind"] == "attn_distance":
                parts += [f"Mean attention distance in pixels over {run['runs'][0]['images']} test images", (
                    ["", "first block", "last block", "all blocks", "uniform attention"],
                    [[one["name"], *(number(one[what], 1) for what in (
                        "first_block", "last_block", "mean", "uniform"))] for one in run["runs"]])]
        except (KeyError, TypeError, IndexError) as error:
            parts.append(f"{run['folder'].name}: its metrics.json lacks what a table needs ({error!r}).")
    return parts


# ---------------------------------------------------------------- figures -----------------------------------

def bar_panels(key, table):
    """Figure 1: a panel for fine-tuning and one for k-NN, a group of bars per init."""
    panels, colours = [], list(dict.fromkeys(sum((archs_and_inits(table, kind)[0] for kind in STAGES), [])))
    ends = [spread_of(by_seed) for by_seed in table.values()]
    top = max((median + (error[1] if error else 0) for median, error in ends if median), default=1)
    for kind in ("finetune", "knn_eval"):
        archs, inits = archs_and_inits(table, kind)
        series = []
        for arch in archs:
            heights, errors = zip(*(spread_of(table.get((kind, arch, init), {})) for init in inits))
            series.append({"label": arch, "kind": "bars", "colour": colours.index(arch),
                           "x": range(len(inits)), "y": heights, "error": errors})
        if inits:
            panels.append({"title": f"{key[0]}: {STAGES[kind]}", "xlabel": "starting weights",
                           "ylabel": f"test {key[3]}", "xnames": inits, "ylim": (0, top), "series": series})
    return panels


def capacity_panels(key, table):
    """Figure 3: a line per family and init over the number of parameters."""
    lines, inits = defaultdict(list), archs_and_inits(table, "finetune")[1]
    for (kind, arch, init), by_seed in table.items():
        median, error = spread_of(by_seed)
        if kind == "finetune" and median is not None:
            lines[inits.index(init), is_vit(arch)].append((size_of(by_seed), median, error))
    series = [{"label": f"{'ViT' if vit else 'CNN'}, {inits[i]}", "marker": 2 * vit, "colour": 2 * i + vit,
               **dict(zip(("x", "y", "error"), zip(*sorted(lines[i, vit], key=lambda point: point[0]))))}
              for i, vit in sorted(lines)]
    return [{"title": f"{key[0]}: capacity, fine-tuned", "xlabel": "parameters (millions)",
             "ylabel": f"test {key[3]}", "series": series}] if series else []


def picture_of(runs, kind):
    """(file or None, caption) of figure 2, 4 or 5, the newest of its kind, as its stage has drawn it."""
    if kind == "segment":
        found = {path.with_suffix(".png") for run in runs
                 for path in run["folder"].parent.glob("comparison*.json")}
    else:
        found = {run["folder"] / f"{kind}.png" for run in runs if run["kind"] == kind}
    found = sorted((file for file in found if file.exists()), key=lambda file: (file.stat().st_mtime, file))
    caption = CAPTIONS[kind]
    try:
        if kind == "segment" and found:
            record = json.loads(found[-1].with_suffix(".json").read_text())
            caption += " " + ", ".join(f"{name} has a mean IoU of {iou:.3f}"
                                       for name, iou in zip(record["names"], record["iou"])) + "."
    except (ValueError, KeyError, TypeError, OSError):
        pass  # the picture speaks for itself
    more = f" {found[-1]} is shown; there are {len(found) - 1} more." if len(found) > 1 else ""
    return found[-1] if found else None, caption + more


BARS = ("Error bars: one standard deviation over seeds or, of a single seed, the 95 % interval over test "
        "images.")
CAPTIONS = {
    "segment": "Segmentation of test images: the truth in yellow, one model in blue, the other in red, where "
               "they differ most and where they differ little.",
    "saliency": "Where the models look, on the same test images: Grad-CAM of a CNN, attention of a ViT's "
                "class token, each with the class that the model predicts and its probability.",
    "attn_distance": "How far attention reaches in each block, in pixels of the image: a point per head; the "
                     "dashed line is what uniform attention would have."}


def figures(runs, groups, output):
    """Draw or copy the paper's five figures; [(file name or None, caption)], None where no run has it."""
    made = []
    for name, draw, size, caption in (
            ("figure1.png", bar_panels, (640, 420), "by starting weights"),
            ("figure3.png", capacity_panels, (640, 480), "against the number of parameters")):
        panels = [panel for key, table in groups for panel in draw(key, table)]
        if panels:
            common.draw_plot(output / name, panels, size, 1 if len(groups) == 1 else 2, 22)
        made.append((name, bool(panels), f"Test score {caption}, median over seeds. {BARS}"))
    for kind, number_of in zip(CAPTIONS, (2, 4, 5)):
        file, caption = picture_of(runs, kind)
        if file:
            common.write_atomic(output / f"figure{number_of}.png", lambda part: shutil.copyfile(file, part))
        made.append((f"figure{number_of}.png", file is not None, caption))
    for name, there, _ in made:
        if not there:  # an earlier report may have had it
            (output / name).unlink(missing_ok=True)
    return [(name if there else None, f"Figure {name[6]}. {caption}")
            for name, there, caption in sorted(made)]


# ---------------------------------------------------------------- what to say -------------------------------

def introduction(key, members, table):
    """What was compared, on how many images, and what to mind, as paragraphs."""
    counts = members[0].get("counts") or {}
    sizes = {cell[1]: size_of(by_seed) for cell, by_seed in table.items()}
    cnns, vits = ([arch for arch in sorted(sizes, key=sizes.get) if is_vit(arch) == vit]
                  for vit in (False, True))
    inits = [init for init in INITS if any(cell[2] == init for cell in table)]
    seeds = sorted({seed for by_seed in table.values() for seed in by_seed})
    images = ", ".join(f"{count} {name}" for name, count in counts.items())
    parts = [f"CNN: {', '.join(cnns) or 'none'}; ViT: {', '.join(vits) or 'none'}; on {key[0]}: {images} "
             f"images, at {key[2]} pixels; split {key[1]}; seeds {', '.join(map(str, seeds))}. The score is "
             f"{key[3]} on the test images. Starting weights: "
             f"{'; '.join(f'{init}: {INITS[init]}' for init in inits)}."]
    shared = sorted({f"{arch} from {init}" for (_, arch, init), by_seed in table.items()
                     if len(by_seed) > 1 and init in AFTER_DINO
                     and len({str(start_of(run)) for run in by_seed.values()}) == 1})
    parts += [f"Note: all seeds of {', '.join(shared)} share one pretraining; their spread is that of what "
              "followed. (DINO_PER_SEED=1 bash run_all.sh gives each its own.)"] if shared else []
    for kind in STAGES:
        recipes = [recipe(next(iter(by_seed.values()))) for cell, by_seed in table.items() if cell[0] == kind]
        values = {name: {str(one.get(name)) for one in recipes} for one in recipes for name in one}
        unlike = [f"{name} ({', '.join(sorted(found))})" for name, found in values.items() if len(found) > 1]
        parts += [f"Note: not all models had the same {STAGES[kind]}: {', '.join(unlike)}."] if unlike else []
    return parts


def section_of(key, members, table):
    """The section of one setting: (heading, parts)."""
    parts, pairs = introduction(key, members, table), comparisons(table)
    said = answers(table, pairs)
    for question in dict.fromkeys(question for question, _ in said):
        parts += [question, [answer for asked, answer in said if asked == question]]
    for kind, name in STAGES.items():
        if any(cell[0] == kind for cell in table):
            parts += [f"Table: {name}, test {key[3]}: median ± standard deviation over n seeds; of one "
                      "seed, the [95 % interval] over test images", score_table(table, kind)]
    if any(cell[0] == "finetune" for cell in table):
        parts += ["Table: capacity, fine-tuned", capacity_table(table)]
    if any(cell[0] == "segment" for cell in table):
        parts += ["Table: segmentation, means over test images, median ± standard deviation over n seeds",
                  segment_table(table)]
    if pairs:
        parts += ["Table: paired differences over the same seeds and the same resampled test images (singly, "
                  "so the intervals are too narrow where a patient has several)", pair_table(pairs)]
    task = "segmentation" if members[0]["kind"] == "segment" else "classification"
    return f"{key[0]}: {task}, by {key[3]}", parts


def health(run, collapsed):
    """What a reader should know before trusting a run, [] if nothing. collapsed: names of such runs."""
    notes = [run["collapse"].split(";")[0]] if run.get("collapse") else []
    start = Path(str(start_of(run))).parent.name
    notes += [f"collapsed start: {start}"] if start in collapsed else []
    notes += [f"leaking: {count} images {key.replace('_', ' ')}"
              for key, count in (run.get("leakage") or {}).items() if count]
    if run["test"].get("undefined"):
        notes.append(f"missing in the test split: {', '.join(run['test']['undefined'])}")
    if run.get("best_epoch") and run["best_epoch"] == run.get("epochs"):
        notes.append("best at its last epoch: longer training may help")
    return notes


def closing_sections(places, runs, troubles):
    """The health of each run, troubles first; the exact commands, devices and versions."""
    collapsed = {run["folder"].name for run in runs if run.get("collapse")}
    states = [[run["folder"].name, "; ".join(health(run, collapsed)) or "complete",
               number(run.get("seconds"), 0)] for run in runs]
    states = [[folder.name, trouble, "-"] for folder, trouble in troubles] + sorted(
        states, key=lambda row: row[1] == "complete")
    settings = sorted(file for place in places for file in Path(place).rglob("logs/settings"))
    made_by = sorted({", ".join([f"{run['args'].get('device')}", *(
        " ".join(pair) for pair in run["args"].get("versions", {}).items())]) for run in runs if run["args"]})
    lines = []
    for run in runs:
        count = run["args"].get("world_size", 1)
        lines.append(("python " if count == 1 else f"torchrun --nproc_per_node {count} ")
                     + run["args"].get("command", f"(unknown, of {run['folder']})"))
    count = f"{len(runs)} complete, {len(troubles)} failed, incomplete, damaged or left out."
    return [("Health of each run", [count, (["run", "state", "seconds"], states)]),
            ("Commands and versions", ["$ " + file.read_text(errors="replace").strip() for file in settings]
             + made_by + ["$ " + "\n$ ".join(lines)])]


# ---------------------------------------------------------------- writing -----------------------------------

def as_markdown(part):
    """A part of a section: text (a question ends with ?), code ("$ ..."), a list of lines, a table (head,
    rows), or a figure (file name or None, caption)."""
    if isinstance(part, list):
        return "\n".join(f"- {line}" for line in part)
    if isinstance(part, str):
        return f"```\n{part}\n```" if part.startswith("$ ") else f"**{part}**" if part.endswith("?") else part
    if isinstance(part[0], list):
        return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"
                         for row in (part[0], ["---"] * len(part[0]), *part[1]))
    return f"![{part[1]}]({part[0]})\n\n{part[1]}" if part[0] else f"{part[1]} *Missing: no run has it.*"


def as_html(part, output):
    """The same in HTML; figures are inlined."""
    def line(cells, tag):
        marks = ["warn" * (tag == "td" and str(cell).startswith(WARN)) + " long" * (len(str(cell)) > 50)
                 for cell in cells]
        return "<tr>" + "".join(f'<{tag} class="{mark}">{html.escape(str(cell))}</{tag}>'
                                for mark, cell in zip(marks, cells)) + "</tr>"
    if isinstance(part, list):
        return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in part) + "</ul>"
    if isinstance(part, str):
        tag = "pre" if part.startswith("$ ") else "h3" if part.endswith("?") else "p"
        return f"<{tag}>{html.escape(part)}</{tag}>"
    if isinstance(part[0], list):
        rows = line(part[0], "th") + "".join(line(row, "td") for row in part[1])
        return f"<div><table>{rows}</table></div>"
    name, caption = part[0], html.escape(part[1])
    if not name:
        return f'<p class="warn">{caption} Missing: no run has it.</p>'
    with Image.open(output / name) as image:
        width = min(image.width // 2, 960)
    data = base64.b64encode((output / name).read_bytes()).decode()
    return (f'<figure><img width="{width}" alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>")


WARN = ("missing", "failed", "incomplete", "damaged", "left out", "collapsed", "leaking")
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:#222}
div{overflow-x:auto}table{border-collapse:collapse;margin:0 0 1.5rem;font-size:.9em}th,td{padding:.2rem .6rem;
text-align:right;white-space:nowrap;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}
td.long{white-space:normal;text-align:left;min-width:20rem}h3{font-size:1em;margin:1rem 0 0}ul{margin:.2rem 0}
img{max-width:100%;height:auto}figure{margin:1.5rem 0}figcaption{color:#555;max-width:45rem}.warn{color:#a33}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:.5rem;font-size:.8em}"""


def write_report(output, title, sections):
    """report.md and report.html from [(heading, parts)]."""
    text, page = [f"# {title}"], [f"<h1>{html.escape(title)}</h1>"]
    for heading, parts in sections:
        text += [f"## {heading}", *map(as_markdown, parts)]
        page += [f"<h2>{html.escape(heading)}</h2>", *(as_html(part, output) for part in parts)]
    head = ('<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style>")
    common.write_atomic(output / "report.md", lambda part: part.write_text("\n\n".join(text) + "\n", "utf-8"))
    common.write_atomic(output / "report.html", lambda part: part.write_text(
        f'<!doctype html><html lang="en">{head}' + "\n".join(page) + "</html>\n", "utf-8"))


def write_results(output, runs):
    """results.csv: a row a run."""
    names = ["stage", "dataset", "arch", "init", "seed", "metric"]
    extra = ["image_size", "split", "parameters", "epochs", "seconds", "images_per_second"]
    head = ["run", *names, "val", "test", "low", "high", "dice", *extra]
    common.write_table(output / "results.csv", head, [
        [str(run["folder"]), *(run[name] for name in names), run["val"].get(run["metric"]),
         headline(run) if run["kind"] in STAGES else None, *(run["test"].get("interval") or ["", ""]),
         run["test"].get("dice"), *(run.get(name) for name in extra)] for run in runs])


def main():
    """Read, tabulate, draw, write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.error = lambda message: fail(f"{message} (--help lists all arguments)")
    parser.add_argument("runs", nargs="+", help="run folders, or folders of them")
    parser.add_argument("--output", help="default: report/ in the first folder")
    args = parser.parse_args()
    runs, troubles = read_runs(args.runs)
    output = Path(args.output or Path(args.runs[0]) / "report")
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_results(output, runs)
    except OSError as error:
        fail(f"--output {output} cannot be written ({error})")

    members = defaultdict(list)
    for run in runs:
        if run["kind"] in STAGES:
            members[setting(run)].append(run)
    tables, sections = [], []
    order = lambda item: (item[1][0]["kind"] == "segment", -len(item[1]))  # noqa: E731
    for key, group in sorted(members.items(), key=order):
        table, spare = cells(group)
        troubles += [(run["folder"], f"left out of the tables: {why}") for run, why in spare]
        tables.append((key, table))
        sections.append(section_of(key, group, table))
    classified = [(key, table) for key, table in tables if any(cell[0] != "segment" for cell in table)]
    if max(len(classified), len(tables) - len(classified)) > 1:
        apart = ["{}, split {}, {} pixels, {}".format(*key) for key, _ in tables]
        sections.insert(0, ("Runs that do not belong together", [
            "These differ in dataset, split, image size or headline metric. They are tabulated and drawn "
            "apart and never averaged:", apart]))
    made = figures(runs, classified, output)
    others = other_tables(runs)
    sections += [("Pretraining, saliency, attention", others)] if others else []
    sections += [("Figures", made)]
    write_report(output, f"{tables[0][0][0] if tables else 'Runs'}: a pretrained ViT, or a CNN?",
                 sections + closing_sections(args.runs, runs, troubles))
    for (dataset, _, _, metric), table in tables:
        for kind in [kind for kind in STAGES if any(cell[0] == kind for cell in table)]:
            head, body = score_table(table, kind)
            common.print_table([f"{dataset} {STAGES[kind]} ({metric})", *head[1:]], body)
            say("")
    for folder, trouble in troubles:
        print(f"note: {folder}: {trouble}", file=sys.stderr)
    drawn = sum(name is not None for name, _ in made)
    say(f"written: {output}/report.html, report.md, results.csv and {drawn} of 5 figures")


if __name__ == "__main__":
    common.launch(main)
