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
import re
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
BEFORE_DINO = {"dino": "random", "imagenet+dino": "imagenet", "imagenet-dino+dino": "imagenet-dino"}
STAGES = {"finetune": "fine-tuning", "probe": "linear probe", "knn_eval": "k-NN", "segment": "segmentation"}
NEEDED = {**dict.fromkeys(("stage", "dataset", "arch", "init", "metric"), str), "seed": int, "val": dict,
          "test": dict}
VITS = ("vit", "deit", "beit", "eva", "cait", "xcit", "swin")  # all other architectures count as CNNs
# arguments in which runs of one table may differ
NO_RECIPE = common.NOT_COMPARED | {"arch", "init", "init_label", "init_key", "seed"}
QUESTIONS = [  # the paper's, each with the comparison, the kind of run and the starts that answer it
    ("Does the ViT lose from scratch?", "vit", "finetune", ["random"]),
    ("Is the ViT on par from ImageNet weights?", "vit", "finetune", ["imagenet"]),
    ("And after DINO on the dataset's own images?", "vit", "finetune", BEFORE_DINO),
    ("Does DINO help fine-tuning?", "dino", "finetune", BEFORE_DINO),
    ("Does DINO help k-NN?", "dino", "knn_eval", BEFORE_DINO),
    ("Does the ViT lose from scratch in segmentation?", "vit", "segment", ["random"]),
    ("Is the ViT on par from ImageNet weights in segmentation?", "vit", "segment", ["imagenet"]),
    ("And after DINO on the dataset's own images in segmentation?", "vit", "segment", BEFORE_DINO),
    ("Does DINO help segmentation?", "dino", "segment", BEFORE_DINO)]


# ---------------------------------------------------------------- reading -----------------------------------

def read_run(folder):
    """The metrics.json of a folder, with its "folder", "kind", "args" (all of args.json, {} without one) and
    "arguments"; ValueError says what is wrong with it."""
    run, args = json.loads((folder / "metrics.json").read_text()), folder / "args.json"
    wrong = [name for name, kind in NEEDED.items() if not isinstance(run.get(name), kind)]
    if wrong:
        raise ValueError(f"no usable {', '.join(wrong)}")
    run["folder"], run["kind"] = folder, "probe" if run.get("freeze") else run["stage"]
    run["args"] = json.loads(args.read_text()) if args.exists() else {}
    run["arguments"] = run["args"].get("arguments", {})
    if run["kind"] in STAGES and not isinstance(run["test"].get(run["metric"]), (int, float, type(None))):
        raise ValueError(f"test {run['metric']} is no number")
    return run


def read_steps(place):
    """{folder: what is wrong} of the steps of run_all.sh that failed, were left out or did not end."""
    troubles = {}
    for ledger in sorted(place.rglob("logs/steps.tsv")):
        states, runs = {}, ledger.parent.parent
        for line in ledger.read_text(errors="replace").splitlines():
            if line.count("\t") == 4:  # the last line may be torn
                name, _, code, _, words = line.split("\t")
                states[name] = None if code == "0" else (
                    f"left out: {words}" if code == "left out" else f"failed: exit code {code}, {words}")
        for log in sorted(ledger.parent.glob("*.log")):
            done = runs / log.stem / "metrics.json"
            if done.exists() and done.stat().st_mtime > log.stat().st_mtime:
                states[log.stem] = None  # it has been finished by hand
            elif log.stem not in states and not done.parent.exists() and "-node" not in log.stem:
                states[log.stem] = f"incomplete: started, see {log}"  # and nothing else of it is there
        troubles |= {runs / name: state for name, state in states.items() if state}
    return troubles


def read_runs(places):
    """(runs, troubles): every complete run under the places; [(folder, what is wrong)] of all else."""
    runs, folders, steps, troubles = [], {}, {}, {}
    for place in map(Path, places):
        if not place.is_dir():
            fail(f"{place}: there is no such folder of runs")
        for file in sorted(place.rglob("*.json")):
            if file.name in ("args.json", "metrics.json"):
                folders.setdefault(file.parent.resolve(), file.parent)
        steps |= read_steps(place)
    for folder in folders.values():
        try:
            runs.append(read_run(folder))
        except FileNotFoundError:
            troubles[folder] = "incomplete: no metrics.json"
        except (ValueError, OSError, AttributeError) as error:
            troubles[folder] = f"damaged: metrics.json or args.json cannot be used: {error}"
    troubles |= steps
    if not runs and not troubles:
        fail(f"{', '.join(map(str, places))}: no run folders (with metrics.json or args.json) in there")
    return runs, sorted(troubles.items())


def recipe(run):
    """The arguments of a run that decide its result, but for its model, its start and its seed."""
    return {name: value for name, value in run["arguments"].items() if name not in NO_RECIPE}


def cells(runs):
    """({(kind, arch, init): {seed: run}} of the scored runs, [(run, why it is left out)]); cells in the order
    of STAGES, of INITS, then CNNs before ViTs, by size. Runs of one cell must have been made alike: the most
    numerous that were are taken, and those that do not say how they were made."""
    groups, table, spare = defaultdict(list), {}, []
    for run in runs:
        groups[run["kind"], run["arch"], run["init"]].append(run)
    for cell, group in groups.items():
        recipes = [made for made in map(recipe, group) if made] or [{}]
        usual, table[cell] = max(recipes, key=recipes.count), {}
        for run in group:
            made = recipe(run) or usual
            differ = [f"{name} {made.get(name)}, not {usual.get(name)}" for name in sorted({*made, *usual})
                      if made.get(name) != usual.get(name)]
            twin = table[cell].get(run["seed"])
            if differ:
                spare.append((run, f"made otherwise than the runs of its kind: {', '.join(differ)}"))
            elif twin:
                spare.append((run, f"another run of seed {run['seed']}, as {twin['folder'].name}"))
            else:
                table[cell][run["seed"]] = run
    order = lambda cell: ([*STAGES].index(cell[0]), [*INITS, cell[2]].index(cell[2]), cell[2],  # noqa: E731
                          is_vit(cell[1]), size_of(table[cell]), cell[1])
    return {cell: table[cell] for cell in sorted(table, key=order)}, spare


def is_vit(arch):
    """Whether an architecture is a transformer."""
    return any(name in arch for name in VITS)


def size_of(by_seed):
    """Millions of parameters of a cell's model, 0 where they are not known."""
    return (next(iter(by_seed.values())).get("parameters") or 0) / 1e6


def archs_and_inits(table, *kinds):
    """The architectures (CNNs, then ViTs, by size) and the inits of some kinds of run."""
    sizes = {arch: size_of(by_seed) for (kind, arch, _), by_seed in table.items() if kind in kinds}
    return (sorted(sizes, key=lambda arch: (is_vit(arch), sizes[arch], arch)),
            list(dict.fromkeys(init for kind, _, init in table if kind in kinds)))


# ---------------------------------------------------------------- statistics --------------------------------

def headline(run, name=None):
    """A test score of a run, that of its headline metric without a name; None where it is not defined."""
    value = run["test"].get(name or run["metric"])
    return None if value is None or math.isnan(value) else value


def summary(by_seed, name=None):
    """(median, (down, up) or None, n) of the test scores that are defined: of several seeds their standard
    deviation, of one its 95 % interval over test images."""
    defined = [run for run in by_seed.values() if headline(run, name) is not None]
    values = [headline(run, name) for run in defined]
    median, error = float(np.median(values)) if values else None, None
    if len(values) > 1:
        error = (float(np.std(values, ddof=1)),) * 2
    elif values and not name and defined[0]["test"].get("interval"):
        low, high = defined[0]["test"]["interval"]
        error = median - low, high - median
    return median, error, len(values)


def split_names(text, classes):
    """The names of classes that joined by blanks are this text, None if there are none such. Names may hold
    blanks, and start alike."""
    longest_first = sorted(classes, key=len, reverse=True)
    names = re.findall("|".join(map(re.escape, longest_first)), text)
    return names if " ".join(names) == text else None


def image_scores(run):
    """(paths, score) of a run's predictions.csv: score(rows (n,) int) is its headline metric over these
    images, nan where that is not defined. None where the file is not there or does not give the run's own
    score."""
    try:
        with open(run["folder"] / "predictions.csv", newline="") as lines:
            head, *rows = csv.reader(lines)
        rows.sort()
        if run["kind"] == "segment":
            columns = [i for i, name in enumerate(head) if name.startswith(f"{run['metric']}_")]
            values = np.ma.masked_invalid([[float(row[i] or "nan") for i in columns] for row in rows])
            score = lambda at: float(values[at].mean(0).mean())  # noqa: E731
        else:
            task = "multilabel" if "roc_auc_by_label" in run["test"] else "classes"
            label, first = head.index("label"), head.index("predicted") + 1
            classes, values = head[first:], np.array([row[first:] for row in rows], float)
            labels = np.array([classes.index(row[label]) if task == "classes" else
                               [float(name in split_names(row[label], classes)) for name in classes]
                               for row in rows])
            score = lambda at: float(np.array(  # noqa: E731
                common.metric(run["metric"], task, labels[at], values[at]), float))  # None becomes nan
        right = abs(score(np.arange(len(rows))) - headline(run)) < 1e-3
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return None
    return ([row[0] for row in rows], score) if right else None


def paired_difference(first, second, resamples=500):
    """Mean over common seeds of headline(first) - headline(second): (difference, [low, high] or None, seeds,
    test images), None without a common seed. The 95 % percentile interval resamples seeds and test images,
    the same for both; without predictions of the same images (0 images), the seeds alone."""
    seeds = sorted(s for s in first.keys() & second.keys()
                   if None not in (headline(first[s]), headline(second[s])))
    if not seeds:
        return None
    differences = [headline(first[s]) - headline(second[s]) for s in seeds]
    scores = [image_scores(side[s]) for s in seeds for side in (first, second)]
    images = len(scores[0][0]) if None not in scores and all(s[0] == scores[0][0] for s in scores) else 0
    rng, values = np.random.default_rng(0), []
    for _ in range(resamples if images or len(seeds) > 1 else 0):
        chosen, drawn = rng.integers(len(seeds), size=len(seeds)).tolist(), differences
        if images:
            rows = rng.integers(images, size=images)
            drawn = {i: scores[2 * i][1](rows) - scores[2 * i + 1][1](rows) for i in set(chosen)}
        values.append(np.mean([drawn[i] for i in chosen]))
    defined = [value for value in values if not math.isnan(value)]
    interval = np.percentile(defined, [2.5, 97.5]).tolist() if len(defined) * 2 > resamples else None
    return float(np.mean(differences)), interval, len(seeds), images


def comparisons(table):
    """[(what, first, second, paired_difference)]: "vit": each ViT less the CNN nearest in size, by kind and
    init; "dino": each model after DINO less before. first and second are keys of the table."""
    pairs = []
    for vit in (cell for cell in table if is_vit(cell[1])):
        rivals = [cell for cell in table if cell[::2] == vit[::2] and not is_vit(cell[1])]
        gap = lambda cell, vit=vit: abs(size_of(table[cell]) - size_of(table[vit]))  # noqa: E731
        pairs += [("vit", vit, min(rivals, key=gap))] if rivals else []
    pairs += [("dino", (kind, arch, init), (kind, arch, BEFORE_DINO[init])) for kind, arch, init in table
              if (kind, arch, BEFORE_DINO.get(init)) in table]
    return [(what, first, second, found) for what, first, second in pairs
            if (found := paired_difference(table[first], table[second]))]


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
    result, kinds = [], {cell[0] for cell in table}
    for question, what, kind, inits in QUESTIONS:
        said = [f"{a[1]} against {b[1]}, {a[2]}: {in_words(found, 'the ViT is better', 'the ViT is worse')}"
                if what == "vit" else f"{a[1]}, {b[2]} to {a[2]}: {in_words(found, 'it helps', 'it hurts')}"
                for compared, a, b, found in pairs if compared == what and a[0] == kind and a[2] in inits]
        if kind in kinds and kind != "segment":
            said = said or ["no runs to tell"]
        result += [(question, line) for line in said]
    both = [[summary(table[kind, arch, init])[0] for kind in ("finetune", "knn_eval")]
            for stage, arch, init in table if stage == "finetune" and ("knn_eval", arch, init) in table]
    ranks = [(a, b) for a, b in itertools.combinations(both, 2) if None not in (*a, *b)]
    same = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in ranks)
    if {"finetune", "knn_eval"} <= kinds:
        result.append(("Do k-NN and fine-tuning agree?", f"they rank {same} of {len(ranks)} pairs of models "
                       "(an architecture and its start) alike" if ranks else "no runs to tell"))
    return result


# ---------------------------------------------------------------- tables ------------------------------------

def number(value, digits=3):
    """A number for a table; a dash where it is missing."""
    return "-" if value is None else f"{value:.{digits}f}"


def score_text(by_seed, name=None, empty="undefined"):
    """Median ± standard deviation of several seeds, of one its value and [95 % interval] over images."""
    median, error, n = summary(by_seed, name)
    if not error:
        return f"{median:.3f}" if n else empty
    return f"{median:.3f} ± {error[0]:.3f}" if n > 1 else \
        f"{median:.3f} [{median - error[0]:.3f}, {median + error[1]:.3f}]"


def score_table(table, kind):
    """(head, rows): the headline, a row an architecture, a column an init."""
    archs, inits = archs_and_inits(table, kind)
    rows = [[arch, *("missing" for _ in inits)] for arch in archs]
    for (of_kind, arch, init), by_seed in table.items():
        if of_kind == kind:
            n = summary(by_seed)[2]
            rows[archs.index(arch)][1 + inits.index(init)] = score_text(by_seed) + f" (n = {n})" * (n > 0)
    return ["", *inits], rows


def capacity_table(table):
    """(head, rows): the fine-tuned score by number of parameters."""
    fits = [(arch, init, size_of(by_seed), *summary(by_seed))
            for (kind, arch, init), by_seed in table.items() if kind == "finetune"]
    return ["", "init", "parameters (millions)", "median", "standard deviation", "n"], [
        [arch, init, f"{size:.1f}", number(median), number(error[0] if n > 1 else None), n]
        for arch, init, size, median, error, n in fits]


def segment_table(table):
    """(head, rows): IoU and Dice, means over test images."""
    names = {"iou": "IoU", "dice": "Dice", "hd95": "HD95 (pixels)",
             "constant_iou": "IoU of the best constant mask"}
    return ["", "init", *names.values(), "n"], [
        [arch, init, *(score_text(by_seed, name, "missing") for name in names), len(by_seed)]
        for (kind, arch, init), by_seed in table.items() if kind == "segment"]


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
    with_interval = lambda value: "{:.3f} [{:.3f}, {:.3f}]".format(  # noqa: E731
        value["mean"], *value["interval"]) if value["interval"] else "undefined"
    for run in (run for run in runs if run["kind"] in ("saliency", "attn_distance")):
        try:
            models = run["runs"]
            if run["kind"] == "saliency":
                names = list(models[0]["map"])
                caption = f"Saliency of {models[0]['images']} test images, mean [95 % interval]. {MAP_SCORES}"
                parts += [caption, (
                    ["", "method", *names, "beats a centred blob"],
                    [[one["name"], one["method"], *(with_interval(one["map"][name]) for name in names),
                      "yes" if one["gain_over_gaussian"][names[0]]["beats"] else "no"] for one in models])]
            else:
                columns = {"first_block": "first block", "last_block": "last block", "mean": "all blocks",
                           "uniform": "uniform attention"}
                parts += [f"Mean attention distance in pixels over {models[0]['images']} test images", (
                    ["", *columns.values()],
                    [[one["name"], *(number(one[name], 1) for name in columns)] for one in models])]
        except (KeyError, TypeError, IndexError) as error:
            parts.append(f"{run['folder'].name}: its metrics.json lacks what a table needs ({error!r}).")
    return parts


# ---------------------------------------------------------------- figures -----------------------------------

BARS = ("Error bars: one standard deviation over seeds or, of a single seed, the 95 % interval over test "
        "images.")
CAPTIONS = {
    "figure1.png": f"Test score by starting weights, median over seeds. {BARS}",
    "figure2.png": "Segmentation of test images: the truth in yellow, one model in blue, the other in red, "
                   "where they differ most and where they differ little.",
    "figure3.png": f"Test score against the number of parameters, median over seeds. {BARS}",
    "figure4.png": "Where the models look, on the same test images: Grad-CAM of a CNN, attention of a ViT's "
                   "class token, each with the class that the model predicts and its probability.",
    "figure5.png": "How far attention reaches in each block, in pixels of the image: a point per head; the "
                   "dashed line is what uniform attention would have."}


def bar_panels(key, table):
    """Figure 1: a panel for fine-tuning and one for k-NN, a group of bars per init."""
    panels, colours = [], archs_and_inits(table, *STAGES)[0]
    found = {cell: summary(by_seed) for cell, by_seed in table.items()}
    top = max((median + (error or (0, 0))[1] for median, error, n in found.values() if n), default=1)
    for kind in ("finetune", "knn_eval"):
        archs, inits = archs_and_inits(table, kind)
        series = []
        for arch in archs:
            heights, errors, _ = zip(*(found.get((kind, arch, init), (None, None, 0)) for init in inits))
            series.append({"label": arch, "kind": "bars", "colour": colours.index(arch),
                           "x": range(len(inits)), "y": heights, "error": errors})
        if series:
            panels.append({"title": f"{key[0]}: {STAGES[kind]}", "xlabel": "starting weights",
                           "ylabel": f"test {key[3]}", "xnames": inits, "ylim": (0, top), "series": series})
    return panels


def capacity_panels(key, table):
    """Figure 3: a line per family and init over the number of parameters."""
    lines, inits = defaultdict(list), archs_and_inits(table, "finetune")[1]
    for (kind, arch, init), by_seed in table.items():  # by size
        median, error, n = summary(by_seed)
        if kind == "finetune" and n:
            lines[init, is_vit(arch)].append((size_of(by_seed), median, error))
    series = [{"label": f"{'ViT' if vit else 'CNN'}, {init}", "marker": 2 * vit,
               "colour": 2 * inits.index(init) + vit, **dict(zip(("x", "y", "error"), zip(*points)))}
              for (init, vit), points in lines.items()]
    return [{"title": f"{key[0]}: capacity, fine-tuned", "xlabel": "parameters (millions)",
             "ylabel": f"test {key[3]}", "series": series}] if series else []


def figures(runs, groups, output):
    """Draw or copy the paper's five figures; [(file name or None, caption)], None where no run has it."""
    captions = dict(CAPTIONS)
    for name in captions:
        (output / name).unlink(missing_ok=True)  # an earlier report may have had it
    for name, draw, size in (("figure1.png", bar_panels, (640, 420)),
                             ("figure3.png", capacity_panels, (640, 480))):
        panels = [panel for key, table in groups for panel in draw(key, table)]
        if panels:
            common.draw_plot(output / name, panels, size, 1 if len(groups) == 1 else 2, 22)
    drawn = {"figure2.png": {record.with_suffix(".png") for run in runs
                             for record in run["folder"].parent.glob("comparison*.json")},
             "figure4.png": {run["folder"] / "saliency.png" for run in runs},
             "figure5.png": {run["folder"] / "attn_distance.png" for run in runs}}  # by the stages
    for name, files in drawn.items():
        files = sorted(filter(Path.exists, files), key=lambda file: (file.stat().st_mtime, file))
        if files:  # the newest
            shutil.copyfile(files[-1], output / name)
        if files and name == "figure2.png":
            try:
                record = json.loads(files[-1].with_suffix(".json").read_text())
                scores = [f"{model} has a mean IoU of {number(iou)}" for model, iou in
                          zip(record["names"], record["iou"])]
            except (OSError, ValueError, KeyError, TypeError) as error:
                scores = [f"{files[-1].with_suffix('.json')} cannot be read ({error!r})"]
            captions[name] += f" {', '.join(scores)}."
        if len(files) > 1:
            captions[name] += f" {files[-1]} is shown; there are {len(files) - 1} more."
    return [(name if (output / name).exists() else None, f"Figure {name[6]}. {caption}")
            for name, caption in captions.items()]


# ---------------------------------------------------------------- what to say -------------------------------

def introduction(key, members, table):
    """What was compared, on how many images, and what to mind, as paragraphs."""
    archs, inits = archs_and_inits(table, *STAGES)
    cnns, vits = (", ".join(arch for arch in archs if is_vit(arch) == vit) or "none" for vit in (False, True))
    images = ", ".join(f"{count} {name}" for name, count in (members[0].get("counts") or {}).items())
    seeds = ", ".join(map(str, sorted({seed for by_seed in table.values() for seed in by_seed})))
    starts = "; ".join(f"{init}: {words}" for init, words in INITS.items() if init in inits)
    parts = [f"CNN: {cnns}; ViT: {vits}; on {key[0]}: {images} images, at {key[2]} pixels; split {key[1]}; "
             f"seeds {seeds}. The score is {key[3]} on the test images. Starting weights: {starts}."]
    shared = sorted({f"{arch} from {init}" for (_, arch, init), by_seed in table.items()
                     if len(by_seed) > 1 and init in BEFORE_DINO
                     and len({run["arguments"].get("init") for run in by_seed.values()}) == 1})
    if shared:
        parts.append(f"Note: all seeds of {', '.join(shared)} share one pretraining; their spread is that of "
                     "what followed. (DINO_PER_SEED=1 bash run_all.sh gives each its own.)")
    for kind in STAGES:
        recipes = [recipe(next(iter(by_seed.values()))) for cell, by_seed in table.items() if cell[0] == kind]
        values = {name: {str(one.get(name)) for one in recipes} for one in recipes for name in one}
        unlike = [f"{name} ({', '.join(sorted(found))})" for name, found in values.items() if len(found) > 1]
        parts += [f"Note: not all models had the same {STAGES[kind]}: {', '.join(unlike)}."] if unlike else []
    return parts


def section_of(key, members, table):
    """The section of one setting: (heading, parts)."""
    parts, pairs = introduction(key, members, table), comparisons(table)
    kinds = list(dict.fromkeys(cell[0] for cell in table))
    for question, said in itertools.groupby(answers(table, pairs), lambda pair: pair[0]):
        parts += [question, [answer for _, answer in said]]
    for kind in kinds:
        parts += [f"Table: {STAGES[kind]}, test {key[3]}: median ± standard deviation over n seeds; of one "
                  "seed, the [95 % interval] over test images", score_table(table, kind)]
    if "finetune" in kinds:
        parts += ["Table: capacity, fine-tuned", capacity_table(table)]
    if "segment" in kinds:
        parts += ["Table: segmentation, means over test images, median ± standard deviation over n seeds",
                  segment_table(table)]
    if pairs:
        parts += ["Table: paired differences over the same seeds and the same resampled test images (singly, "
                  "so the intervals are too narrow where a patient has several)", pair_table(pairs)]
    return f"{key[0]}: {'segmentation' if 'segment' in kinds else 'classification'}, by {key[3]}", parts


def health(run, collapsed):
    """What a reader should know before trusting a run, [] if nothing. collapsed: names of such runs."""
    notes = [run["collapse"].split(";")[0]] if run.get("collapse") else []
    start = Path(str(run["arguments"].get("init"))).parent.name
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
    machines, commands = set(), []
    for run in runs:
        args, count = run["args"], run["args"].get("world_size", 1)
        commands.append(("$ python " if count == 1 else f"$ torchrun --nproc_per_node {count} ")
                        + args.get("command", f"(unknown, of {run['folder']})"))
        if args:
            versions = args.get("versions", {}).items()
            machines.add(", ".join([str(args.get("device")), *map(" ".join, versions)]))
    count = f"{len(runs)} complete, {len(troubles)} failed, incomplete, damaged or left out."
    return [("Health of each run", [count, (["run", "state", "seconds"], states)]),
            ("Commands and versions", ["$ " + file.read_text(errors="replace").strip() for file in settings]
             + sorted(machines) + ["\n".join(commands)])]


# ---------------------------------------------------------------- writing -----------------------------------

def rendered(part, output):
    """(Markdown, HTML) of a part of a section: text (a question ends with ?), code ("$ ..."), a list of
    lines, a table (head, rows), or a figure (file name or None, caption)."""
    if isinstance(part, str):
        mark, tag = ("```\n{}\n```", "pre") if part.startswith("$ ") else \
            ("**{}**", "h3") if part.endswith("?") else ("{}", "p")
        return mark.format(part), f"<{tag}>{html.escape(part)}</{tag}>"
    if isinstance(part, list):
        return ("\n".join(f"- {line}" for line in part),
                "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in part) + "</ul>")
    if isinstance(part[0], list):
        head, *rows = [[str(cell) for cell in row] for row in (part[0], *part[1])]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
                 for row in (head, ["---"] * len(head), *rows)]
        tags = [[f"<th>{html.escape(cell)}" for cell in head], *(
            [f'<td class="{"warn " * cell.startswith(WARN)}{"long" * (len(cell) > 50)}">{html.escape(cell)}'
             for cell in row] for row in rows)]
        return "\n".join(lines), f"<div><table>{''.join('<tr>' + ''.join(row) for row in tags)}</table></div>"
    (name, caption), text = part, html.escape(part[1])
    if not name:
        return f"{caption} *Missing: no run has it.*", f'<p class="warn">{text} Missing: no run has it.</p>'
    data = base64.b64encode((output / name).read_bytes()).decode()
    with Image.open(output / name) as image:
        width = min(image.width * 96 // 200, 960)  # pictures have 200 dots an inch
    return f"![{caption}]({name})\n\n{caption}", (
        f'<figure><img width="{width}" alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>")


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
    blocks = [(f"# {title}", f"<h1>{html.escape(title)}</h1>")]
    for heading, parts in sections:
        blocks += [(f"## {heading}", f"<h2>{html.escape(heading)}</h2>"),
                   *(rendered(part, output) for part in parts)]
    text, page = zip(*blocks)
    head = ('<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style>")
    (output / "report.md").write_text("\n\n".join(text) + "\n", "utf-8")
    (output / "report.html").write_text(f'<!doctype html><html lang="en">{head}' + "\n".join(page)
                                        + "</html>\n", "utf-8")


def write_results(output, runs):
    """results.csv: a row a run."""
    names = ["stage", "dataset", "arch", "init", "seed", "metric"]
    extra = ["image_size", "split", "parameters", "epochs", "seconds", "images_per_second"]
    head = ["run", *names, "val", "test", "low", "high", "dice", *extra]
    common.write_table(output / "results.csv", head, [
        [run["folder"], *(run[name] for name in names), run["val"].get(run["metric"]),
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

    settings, tables, sections = defaultdict(list), [], []
    for run in runs:
        if run["kind"] in STAGES:  # what runs must share to be put into one table
            settings[run["dataset"], run.get("split"), run.get("image_size"), run["metric"]].append(run)
    for key, group in sorted(settings.items(), key=lambda item: (item[1][0]["kind"] == "segment",
                                                                 -len(item[1]))):
        table, spare = cells(group)
        troubles += [(run["folder"], f"left out of the tables: {why}") for run, why in spare]
        tables.append((key, table))
        sections.append(section_of(key, group, table))
    classified = [(key, table) for key, table in tables if any(cell[0] != "segment" for cell in table)]
    if max(len(classified), len(tables) - len(classified)) > 1:
        sections.insert(0, ("Runs that do not belong together", [
            "These differ in dataset, split, image size or headline metric. They are tabulated and drawn "
            "apart and never averaged:", ["{}, split {}, {} pixels, {}".format(*key) for key, _ in tables]]))
    made, others = figures(runs, classified, output), other_tables(runs)
    sections += [("Pretraining, saliency, attention", others)] if others else []
    sections += [("Figures", made), *closing_sections(args.runs, runs, troubles)]
    write_report(output, f"{tables[0][0][0] if tables else 'Runs'}: a pretrained ViT, or a CNN?", sections)
    for (dataset, _, _, metric), table in tables:
        for kind in dict.fromkeys(cell[0] for cell in table):
            head, body = score_table(table, kind)
            common.print_table([f"{dataset} {STAGES[kind]} ({metric})", *head[1:]], body)
            say("")
    for folder, trouble in troubles:
        print(f"note: {folder}: {trouble}", file=sys.stderr)
    drawn = sum(name is not None for name, _ in made)
    say(f"written: {output}/report.html, report.md, results.csv and {drawn} of 5 figures")


if __name__ == "__main__":
    common.launch(main)
