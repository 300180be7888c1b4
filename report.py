"""Tables, figures and plain answers out of finished runs.

    python report.py runs/demo                      # every run below a folder, into runs/demo/report
    python report.py runs/a runs/b --output report --format pdf

Reads the metrics.json of any run folder, whoever wrote it; writes report.html, one page that needs no server, results.csv
and figure1 to figure6 (the first five are those of Matsoukas et al. 2023). Runs on another dataset, split or image size are
kept apart; a missing cell is shown as missing; damaged runs are listed.
"""
import argparse
import base64
import csv
import html
import itertools
import json
import math
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import common
from common import fail, say

DRAWN = ("These images are drawn by prepare.py: the scores show that every stage works and what its tables and figures look "
         "like. They say nothing about medical images, nor about ViTs and CNNs in general.")
OWN = "DINO on this dataset's training images, from"
INITS = {"random": "untrained", "imagenet": "ImageNet, supervised", "imagenet-dino": "ImageNet, DINO",
         "dino": f"{OWN} random weights", "imagenet+dino": f"{OWN} imagenet",
         "imagenet-dino+dino": f"{OWN} imagenet-dino"}
INITS |= {f"{init}-stats": f"weights drawn with the mean and standard deviation of those of {init}, matrix by matrix"
          for init in INITS if init != "random"}
BEFORE_DINO = {"dino": "random", "imagenet+dino": "imagenet", "imagenet-dino+dino": "imagenet-dino"}
STAGES = {"finetune": "fine-tuning", "probe": "linear probe", "knn_eval": "k-NN", "segment": "segmentation"}
NEEDED = {**dict.fromkeys(("stage", "dataset", "arch", "init", "metric"), str), "seed": int, "val": dict,
          "test": dict}
VITS = ("vit", "deit", "beit", "eva", "cait", "xcit", "swin")  # all other architectures count as CNNs
# arguments in which runs of one table may differ
NO_RECIPE = common.NOT_COMPARED | {"fold", "init_digest", "arch", "init", "init_label", "init_key", "init_stats", "seed"}
QUESTIONS = [  # the paper's, each with the comparison, the kind of run and the starts that answer it (None: any)
    ("Does the ViT lose from scratch?", "vit", "finetune", ["random"]),
    ("Is the ViT on par from ImageNet weights, supervised?", "vit", "finetune", ["imagenet"]),
    ("Is the ViT on par from ImageNet weights, self-supervised?", "vit", "finetune", ["imagenet-dino"]),
    ("And after DINO on the dataset's own images?", "vit", "finetune", BEFORE_DINO),
    ("Does DINO help fine-tuning?", "dino", "finetune", BEFORE_DINO),
    ("Does DINO help k-NN?", "dino", "knn_eval", BEFORE_DINO),
    ("Does the ViT lose from scratch in segmentation?", "vit", "segment", ["random"]),
    ("Is the ViT on par from ImageNet weights in segmentation?", "vit", "segment", ["imagenet", "imagenet-dino"]),
    ("And after DINO on the dataset's own images in segmentation?", "vit", "segment", BEFORE_DINO),
    ("Does DINO help segmentation?", "dino", "segment", BEFORE_DINO),
    # of the follow-up, Matsoukas et al. 2022, section 4.1
    ("How much of the gain is features, how much statistics?", "statistics", "finetune", None),
    ("How much of the gain in k-NN is features, how much statistics?", "statistics", "knn_eval", None),
    ("How much of the gain in segmentation is features, how much statistics?", "statistics", "segment", None)]


# ---------------------------------------------------------------- reading -----------------------------------

def read_run(folder):
    """The metrics.json of a folder, with its "folder", "kind", "args" (all of args.json, {} without one) and
    "arguments"; a test elsewhere counts as on a dataset of its own. ValueError says what is wrong with it."""
    run = json.loads((folder / "metrics.json").read_text())
    wrong = [name for name, kind in NEEDED.items() if not isinstance(run.get(name), kind)]
    if wrong:
        raise ValueError(f"no usable {', '.join(wrong)}")
    args = folder / "args.json"
    run["folder"] = folder
    if run.get("trained_on"):
        run["dataset"] = f"{run['trained_on']}, tested on {run['dataset']}"
    if run.get("model_fold") is not None:
        run["seed"] = f"{run['seed']}, model of fold {run['model_fold']}"
    run["kind"] = "probe" if run.get("freeze") else run["stage"]
    run["args"] = json.loads(args.read_text()) if args.exists() else {}
    run["arguments"] = run["args"].get("arguments", {})
    if run["kind"] in STAGES and not isinstance(run["test"].get(run["metric"]), (int, float, type(None))):
        raise ValueError(f"test {run['metric']} is no number")
    return run


def read_runs(places):
    """(runs, [(folder, what is wrong)]): every complete run under the places, and all else, among it the steps of
    run_all.sh that failed."""
    runs, folders, troubles = [], {}, {}
    for place in map(Path, places):
        if not place.is_dir():
            fail(f"{place}: there is no such folder of runs")
        for file in sorted(place.rglob("*.json")):
            if file.name in ("args.json", "metrics.json"):
                folders.setdefault(file.parent.resolve(), file.parent)
        for file in sorted(place.rglob("logs/*.failed")):
            troubles[file.parent.parent / file.stem] = f"failed: {file.read_text(errors='replace').strip()}"
    for folder in folders.values():
        try:
            runs.append(read_run(folder))
        except FileNotFoundError:
            troubles.setdefault(folder, "incomplete: no metrics.json")
        except (ValueError, OSError, AttributeError) as error:
            troubles[folder] = f"damaged: metrics.json or args.json cannot be used: {error}"
    if not runs and not troubles:
        fail(f"{', '.join(map(str, places))}: no run folders (with metrics.json or args.json) in there")
    defaults = defaultdict(dict)
    for run in runs:
        defaults[run["stage"]].update(run["arguments"].get("defaults", {}))
    for run in runs:
        if run["arguments"]:  # one that is newer than the run counts as its default
            run["arguments"] = {**defaults[run["stage"]], **run["arguments"]}
    return runs, sorted(troubles.items())


def recipe(run):
    """The arguments of a run that decide its result, but for its model, its start and its seed; of a test elsewhere, those
    of the training too."""
    made = {}
    for of, arguments in (("", run["arguments"]), (" of the training", run.get("training") or {})):
        for name, value in arguments.items():
            if name not in NO_RECIPE:
                made[name + of] = value
    return made


def grouped(items, key):
    """{key(item): [items that share it]}, in the order in which they come."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def one_each(runs, name, spare):
    """{value of `name`: run}; of two runs with the same value the second goes to `spare`, with the reason."""
    chosen = {}
    for run in runs:
        twin = chosen.setdefault(run[name], run)
        if twin is not run:
            spare.append((run, f"another run of {name} {run[name]}, as {twin['folder'].name}"))
    return chosen


@dataclass
class Cell:
    """The runs that differ in nothing but their seed: what all tables, figures and comparisons are made of."""
    dataset: str
    split: str
    image_size: int
    metric: str
    kind: str
    arch: str
    init: str
    runs: list  # one of each seed

    @property
    def setting(self):
        """What cells must share to stand in one table."""
        return self.dataset, self.split, self.image_size, self.metric

    @property
    def vit(self):
        """Whether the model is a transformer."""
        return any(name in self.arch for name in VITS)

    @property
    def size(self):
        """Millions of parameters, 0 where they are not known."""
        return (self.runs[0].get("parameters") or 0) / 1e6

    @property
    def rank(self):
        """Sorts the cells of a setting: by kind, by start, CNNs before ViTs, by size."""
        return ([*STAGES].index(self.kind), [*INITS, self.init].index(self.init), self.init, self.vit, self.size, self.arch)


def shared(run):
    """What the runs of a cell share: all fields of a Cell but its runs."""
    return tuple(map(run.get, ("dataset", "split", "image_size", "metric", "kind", "arch", "init")))


def cells(runs):
    """([Cell], [(run, why it is left out)]) of the scored runs, setting by setting: segmentation last, else those with most
    runs first. Of runs that should make a cell but were made otherwise, the most numerous do."""
    result, spare, sizes = [], [], Counter()
    scored = [run for run in runs if run["kind"] in STAGES]
    for names, group in grouped(scored, shared).items():
        recipes = list(map(recipe, group))
        usual = max(filter(None, recipes), key=recipes.count, default={})
        alike = []
        for run, made in zip(group, recipes):
            differ = []
            for name in sorted({*made, *usual}) if made else []:  # one that does not say how it was made is taken
                if made.get(name) != usual.get(name):
                    differ.append(f"{name} {made.get(name)}, not {usual.get(name)}")
            if differ:
                spare.append((run, f"made otherwise than the runs of its kind: {', '.join(differ)}"))
            else:
                alike.append(run)
        cell = Cell(*names, list(one_each(alike, "seed", spare).values()))
        sizes[cell.setting] += len(group)
        result.append(cell)
    settings = sorted(sizes, key=sizes.get, reverse=True)
    result.sort(key=lambda cell: (cell.kind == "segment", settings.index(cell.setting), *cell.rank))
    return result, spare


def archs_of(cells):
    """Their architectures: CNNs, then ViTs, by size."""
    ranks = {cell.arch: (cell.vit, cell.size, cell.arch) for cell in cells}
    return sorted(ranks, key=ranks.get)


# ---------------------------------------------------------------- statistics --------------------------------

def headline(run, name=None):
    """A test score of a run, that of its headline metric without a name; None where it is not defined."""
    value = run["test"].get(name or run["metric"])
    return None if value is None or math.isnan(value) else value


def summary(runs, name=None):
    """(median, (down, up) or None, n) of the test scores that are defined: of several seeds their standard
    deviation, of one its 95 % interval over test images."""
    defined = [run for run in runs if headline(run, name) is not None]
    values = [headline(run, name) for run in defined]
    if not values:
        return None, None, 0
    median = float(np.median(values))
    if len(values) > 1:
        deviation = float(np.std(values, ddof=1))
        return median, (deviation, deviation), len(values)
    interval = defined[0]["test"].get("interval")
    if name or not interval:
        return median, None, 1
    return median, (median - interval[0], interval[1] - median), 1


@dataclass
class Predictions:
    """predictions.csv of a run, sorted by path; of joined folds, of all of them."""
    metric: str
    paths: np.ndarray  # (n,) str
    groups: np.ndarray  # (n,) str: the patient, or else the path
    labels: np.ndarray | None  # (n,) classes or (n, L) 0/1; None of a segmentation
    values: np.ndarray  # (n, C) probabilities or, of a segmentation, scores of each class, NaN where they are not defined

    def score(self, rows, other=None):
        """The metric over images `rows` (n,) int, None where it is not defined; of a segmentation over those images that
        are defined in `other` Predictions too."""
        values = self.values[rows]
        if self.labels is not None:
            task = "classes" if self.labels.ndim == 1 else "multilabel"
            return common.metric(self.metric, task, self.labels[rows], values)
        if other is not None:
            values = np.where(np.isnan(other.values[rows]), math.nan, values)
        mean = np.ma.masked_invalid(values).mean(0).mean()
        return None if mean is np.ma.masked else float(mean)


def read_predictions(run):
    """Predictions of a run, of joined folds of all its "parts"; None where a file is not there, cannot be read or gives
    another score than the run's own."""
    rows = []
    try:
        for part in run.get("parts", [run]):
            with open(part["folder"] / "predictions.csv", newline="") as lines:
                head, *own = csv.reader(lines)
            rows += own
        table = np.array(sorted(rows), object)
        paths = table[:, 0]
        groups = np.where(table[:, 1] == "", paths, table[:, 1])
        if run["kind"] == "segment":
            columns = [name.startswith(f"{run['metric']}_") for name in head]
            labels, values = None, np.where(table == "", "nan", table)[:, columns]
        elif "label" in head:
            classes = head[head.index("predicted") + 1:]
            labels = np.array(list(map(classes.index, table[:, head.index("label")])))
            values = table[:, -len(classes):]
        else:
            count = (len(head) - 2) // 2
            labels, values = table[:, 2:2 + count].astype(float), table[:, 2 + count:]
        predictions = Predictions(run["metric"], paths, groups, labels, values.astype(float))
    except (OSError, ValueError, IndexError):
        return None
    own, again = headline(run), predictions.score(np.arange(len(paths)))
    fits = own is None or again is not None and abs(again - own) < 1e-3
    return predictions if fits else None


def paired_difference(first, second, resamples=500):
    """Mean over common seeds of headline(first) - headline(second), of two lists of runs: (difference, [low, high] or None,
    seeds, test images), None without a common seed. The 95 % percentile interval resamples seeds and test images, the same
    for both; without predictions of the same images (0 images), the seeds alone."""
    pairs = []  # two runs of each seed
    for a, b in itertools.product(sorted(first, key=lambda run: str(run["seed"])), second):
        if a["seed"] == b["seed"] and None not in (headline(a), headline(b)):
            pairs.append((a, b))
    if not pairs:
        return None
    predictions = [(read_predictions(a), read_predictions(b)) for a, b in pairs]
    known = list(itertools.chain(*predictions))
    same = all(known) and all(np.array_equal(known[0].paths, each.paths) for each in known)
    images = len(known[0].paths) if same else 0

    def difference(seed, rows):
        """Of one of the pairs, over some images; of a segmentation over those on which both are defined."""
        if not images:
            return headline(pairs[seed][0]) - headline(pairs[seed][1])
        a, b = predictions[seed]
        scores = a.score(rows, b), b.score(rows, a)
        return math.nan if None in scores else scores[0] - scores[1]

    seeds = len(pairs)
    whole = [difference(seed, np.arange(images)) for seed in range(seeds)]
    rng = np.random.default_rng(0)
    means = np.full(resamples, math.nan)
    for i in range(resamples if images or seeds > 1 else 0):
        chosen = rng.integers(seeds, size=seeds)
        rows = rng.integers(images, size=images)
        drawn = np.zeros(seeds)
        for seed in set(chosen.tolist()):
            drawn[seed] = difference(seed, rows)
        means[i] = drawn[chosen].mean()
    means = means[~np.isnan(means)]
    interval = np.percentile(means, [2.5, 97.5]).tolist() if len(means) * 2 > resamples else None
    return float(np.mean(whole)), interval, seeds, images


def join_folds(runs):
    """(runs, [(run, why it is left out)]): the runs of all folds of a model and a seed have become one, whose test is over
    all images, each as predicted by the run that has not seen it."""
    def model(run):
        """What the folds of a model share, None of a run without folds."""
        if run.get("fold") is None or run["kind"] not in STAGES or run.get("trained_on"):
            return None
        return *shared(run), run["seed"], json.dumps(recipe(run), sort_keys=True)
    groups = grouped(runs, model)
    joined = groups.pop(None, [])
    spare = []
    for group in groups.values():
        by_fold = one_each(group, "fold", spare)
        folds = sorted(by_fold)
        parts = [by_fold[fold] for fold in folds]
        if len(folds) != parts[0].get("folds"):
            why = f"of {parts[0].get('folds')} folds only {', '.join(map(str, folds))} can be joined"
            spare += [(part, why) for part in parts]
            continue
        predictions = read_predictions({**parts[0], "parts": parts, "test": {}})
        if predictions:
            joined.append(join(parts, predictions))
        else:
            spare += [(part, "a predictions.csv of its folds cannot be read") for part in parts]
    return joined, spare


def join(parts, predictions):
    """One run out of those of all folds, with the Predictions of all of them. Scores other than the headline are means over
    folds, counts are sums."""
    metric = parts[0]["metric"]
    tests = [part["test"] for part in parts]
    test = {}
    for name in tests[0]:
        values = [each.get(name) for each in tests]
        if all(isinstance(value, (int, float)) for value in values):
            test[name] = sum(values) if name in ("n", "hd95_n", "lesions", "found") else float(np.mean(values))

    count = len(predictions.paths)
    grouped_by = None if np.array_equal(predictions.groups, predictions.paths) else predictions.groups
    test[metric] = predictions.score(np.arange(count))
    test["interval"] = common.bootstrap_interval(predictions.score, count, grouped_by)
    undefined = [set(each.get("undefined", [])) for each in tests]
    test["undefined"] = sorted(set.intersection(*undefined))  # in every fold
    bounded = None not in (test["interval"], test.get("guess"))
    test["beats_guess"] = test["interval"][0] > test["guess"] if bounded else None
    classes = {each.get("one_class") for each in tests}
    test["one_class"] = classes.pop() if len(classes) == 1 else None

    return {**parts[0], "parts": parts, "test": test, "counts": {"cross-validated": count}, "fold": None,
            "dataset": f"{parts[0]['dataset']}, {len(parts)} folds",  # never averaged with runs on the split
            "folder": Path(f"{parts[0]['folder']} to f{parts[-1]['fold']}"),
            "val": {metric: common.mean_defined([part["val"].get(metric) for part in parts])},
            "seconds": sum(part.get("seconds") or 0 for part in parts)}


def comparisons(cells):
    """[(what, first, second, paired_difference)] of cells of one setting: "vit": each ViT less the CNN nearest in size, by
    kind and init; "dino": each model after DINO less before; "statistics": each start from statistics less random weights,
    and each pretrained one less its statistics."""
    places = {(cell.kind, cell.arch, cell.init): cell for cell in cells}
    pairs = []
    for cell in cells:
        rivals = [other for other in cells if (other.kind, other.init, other.vit) == (cell.kind, cell.init, False)]
        if cell.vit and rivals:
            nearest = min(rivals, key=lambda rival: abs(rival.size - cell.size))
            pairs.append(("vit", cell, nearest))
    for cell in cells:
        pairs.append(("dino", cell, places.get((cell.kind, cell.arch, BEFORE_DINO.get(cell.init)))))
    for cell in cells:
        statistics = places.get((cell.kind, cell.arch, f"{cell.init}-stats"))
        random = places.get((cell.kind, cell.arch, "random"))
        pairs += [("statistics", statistics, random), ("statistics", cell, statistics)]
    results = []
    for what, first, second in pairs:
        if first and second:
            results.append((what, first, second, paired_difference(first.runs, second.runs)))
    return [result for result in results if result[3]]


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


def says_one_thing(cell):
    """Why a cell's scores tell nothing: [sentence] where a run of it predicts one class for every image. (A ranking, as
    of a ROC curve, may tell more.)"""
    for run in cell.runs:
        one_class = run["test"].get("one_class")
        if one_class is not None and cell.metric not in ("roc_auc", "average_precision"):
            return [f"{cell.arch} from {cell.init}, seed {run['seed']}, predicts {one_class} for every image"]
    return []


def k_of(cells):
    """The k of k-NN, as text behind a name; "" of other kinds."""
    ks = set()
    for cell in cells:
        ks.update(run["k"] for run in cell.runs if run.get("k"))
    return f" (k = {', '.join(map(str, sorted(ks)))})" if ks else ""


def answer(what, first, second, difference):
    """What one comparison says, as a line."""
    subject, verdicts = f"{first.arch}, {second.init} to {first.init}", ("it helps", "it hurts")
    if what == "vit":
        subject, verdicts = f"{first.arch} against {second.arch}, {first.init}", ("the ViT is better", "the ViT is worse")
    subject += k_of([first])
    silent = says_one_thing(first) + says_one_thing(second)
    if silent:
        return f"{subject}: cannot be compared: {'; '.join(silent)}"
    weak = []
    for cell in (first, second):
        if any(run["test"].get("beats_guess") is False for run in cell.runs):
            weak.append(cell.arch)
    guess = f"; {' and '.join(weak)} did not beat always guessing the most frequent class" if weak else ""
    return f"{subject}: {in_words(difference, *verdicts)}{guess}"


def answers(cells, pairs):
    """The paper's questions, each with what these runs say: {question: [answer]}."""
    result = {}
    kinds = grouped(cells, lambda cell: cell.kind)
    for question, what, kind, inits in QUESTIONS:
        lines = []
        for pair in pairs:
            compared, first, *_ = pair
            if compared == what and first.kind == kind and (not inits or first.init in inits):
                lines.append(answer(*pair))
        if lines or kind in kinds and kind != "segment" and inits:
            result[question] = lines or ["no runs to tell"]
    if {"finetune", "knn_eval"} <= kinds.keys():
        result["Do k-NN and fine-tuning agree?"] = [rank_agreement(cells)]
    return result


def rank_agreement(cells):
    """How many pairs of models fine-tuning and k-NN rank alike, as a sentence."""
    medians = {}
    for cell in cells:
        medians[cell.kind, cell.arch, cell.init] = summary(cell.runs)[0]
    scores = []
    for kind, arch, init in medians:
        both = medians[kind, arch, init], medians.get(("knn_eval", arch, init))
        if kind == "finetune" and None not in both:
            scores.append(both)
    pairs = list(itertools.combinations(scores, 2))
    same = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs)
    if not pairs:
        return "no runs to tell"
    return f"they rank {same} of {len(pairs)} pairs of models (an architecture and its start) alike"


# ---------------------------------------------------------------- the page ----------------------------------

WARN = ("missing", "failed", "incomplete", "damaged", "left out", "collapsed", "leaking")
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:#222}
div{overflow-x:auto}table{border-collapse:collapse;margin:0 0 1.5rem;font-size:.9em}th,td{padding:.2rem .6rem;
text-align:right;white-space:nowrap;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}
td.long{white-space:normal;text-align:left;min-width:20rem}h3{font-size:1em;margin:1rem 0 0}ul{margin:.2rem 0}
img{max-width:100%;height:auto}figure{margin:1.5rem 0}figcaption{color:#555;max-width:45rem}.warn{color:#a33}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:.5rem;font-size:.8em}"""


def tag(name, text):
    """An element of the page with text in it."""
    return f"<{name}>{html.escape(text)}</{name}>"


def bullets(lines):
    """A list of lines."""
    return "<ul>" + "".join(tag("li", line) for line in lines) + "</ul>"


def table_of(rows, caption):
    """A table of rows {column: cell}, nothing without rows; cells that tell of trouble are marked."""
    rows = list(rows)
    if not rows:
        return ""
    text = "<tr>" + "".join(f"<th>{html.escape(column)}" for column in rows[0])
    for row in rows:
        text += "<tr>"
        for cell in map(str, row.values()):
            style = "warn " * cell.startswith(WARN) + "long" * (len(cell) > 50)
            text += f'<td class="{style}">{html.escape(cell)}'
    return tag("p", caption) + f"<div><table>{text}</table></div>"


def figure_of(file, caption):
    """A PNG with its caption, in the page itself; one that is not there is missing."""
    text = html.escape(caption)
    if not file.exists():
        return f'<p class="warn">{text} Missing: no run has it.</p>'
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def write_page(path, title, parts):
    """report.html from the parts of its body."""
    head = ('<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style>")
    page = f'<!doctype html><html lang="en">{head}{tag("h1", title)}' + "\n".join(filter(None, parts)) + "</html>\n"
    common.write_atomic(path, lambda part: part.write_text(page, "utf-8"))


# ---------------------------------------------------------------- tables ------------------------------------

def number(value, digits=3):
    """A number for a table; a dash where it is missing."""
    return "-" if value is None else f"{value:.{digits}f}"


def score_text(runs, name=None, empty="undefined"):
    """Median ± standard deviation of several seeds, of one its value and [95 % interval] over images."""
    median, error, n = summary(runs, name)
    if not error:
        return f"{median:.3f}" if n else empty
    if n > 1:
        return f"{median:.3f} ± {error[0]:.3f}"
    return f"{median:.3f} [{median - error[0]:.3f}, {median + error[1]:.3f}]"


def score_table(cells):
    """The headline of cells of one kind: a row an architecture, a column an init."""
    inits = [cell.init for cell in cells]
    rows = {arch: {"": arch, **dict.fromkeys(inits, "missing")} for arch in archs_of(cells)}
    guesses = set()
    for cell in cells:
        n = summary(cell.runs)[2]
        rows[cell.arch][cell.init] = score_text(cell.runs) + f" (n = {n})" * (n > 0)
        guesses |= {number(run["test"].get("guess")) for run in cell.runs}
    guesses.discard("-")
    if guesses:
        name = "always the most frequent class"
        rows[name] = {"": name, **dict.fromkeys(inits, ", ".join(sorted(guesses)))}
    return list(rows.values())


def table_of_datasets(cells):
    """Table 1 of the paper, of cells of one kind: a row an init and an architecture, a column a dataset."""
    settings = dict.fromkeys(cell.setting for cell in cells)
    sharing = Counter((dataset, metric) for dataset, _, _, metric in settings)
    columns = {}
    for dataset, split, image_size, metric in settings:
        apart = f", {image_size} pixels, split {split}" if sharing[dataset, metric] > 1 else ""
        columns[dataset, split, image_size, metric] = f"{dataset} ({metric}{apart})"
    rows = {}
    for cell in sorted(cells, key=lambda cell: cell.rank):
        empty = {"init": cell.init, "": cell.arch, **dict.fromkeys(columns.values(), "missing")}
        row = rows.setdefault((cell.init, cell.arch), empty)
        row[columns[cell.setting]] = score_text(cell.runs)
    return list(rows.values())


def capacity_table(cells):
    """The score by number of parameters."""
    for cell in cells:
        median, error, n = summary(cell.runs)
        yield {"": cell.arch, "init": cell.init, "parameters (millions)": f"{cell.size:.1f}", "median": number(median),
               "standard deviation": number(error[0] if n > 1 else None), "n": n}


def segment_table(cells):
    """IoU and Dice, means over test images."""
    columns = {"IoU": ("iou", "n"), "Dice": ("dice", "n"), "HD95 (pixels)": ("hd95", "hd95_n"),
               "IoU of the best constant mask": ("constant_iou", None)}
    for cell in cells:
        row = {"": cell.arch, "init": cell.init}
        tests = [run["test"] for run in cell.runs]
        for column, (name, count) in columns.items():
            images = sorted({test[count] for test in tests if count in test})
            over = f" over {', '.join(map(str, images))}" if images else ""
            row[column] = score_text(cell.runs, name, "missing") + over
        found = ["{found} of {lesions}".format(**test) for test in tests if "found" in test]
        yield {**row, "lesions found": ", ".join(found) or "-", "n": len(tests)}


def pair_table(pairs):
    """The comparisons."""
    for _, first, second, (difference, interval, seeds, images) in pairs:
        yield {"": STAGES[first.kind], "first": f"{first.arch}, {first.init}", "second": f"{second.arch}, {second.init}",
               "first - second": f"{difference:+.3f}",
               "95 % interval": "{:+.3f} to {:+.3f}".format(*interval) if interval else "none",
               "seeds": seeds, "images": images}


def fold_table(cells):
    """What was cross-validated: a row a run, its score over folds and over all images."""
    for cell in cells:
        for run in cell.runs:
            scores = [headline(part) for part in run.get("parts", []) if headline(part) is not None]
            spread = f" ± {np.std(scores, ddof=1):.3f}" if len(scores) > 1 else ""
            if scores:
                yield {"": STAGES[cell.kind], "model": cell.arch, "init": cell.init, "seed": run["seed"],
                       "mean ± standard deviation over folds": f"{np.mean(scores):.3f}{spread}",
                       "over all images": score_text([run]), "images": run["counts"]["cross-validated"]}


def pretraining_table(runs):
    """The runs of pretrain_dino.py."""
    for run in runs:
        if run["kind"] == "pretrain_dino":
            yield {"": run["folder"].name, "weights": run["init"], "epochs": run.get("epochs"),
                   "before": number(run["val"].get("knn_before")), "after": number(run["val"].get("knn")),
                   "collapsed": (run.get("collapse") or "no").split(":")[0]}


def saliency_table(models):
    """The models of a run of saliency.py."""
    for model in models:
        row = {"": model["name"], "method": model["method"]}
        for name, score in model["map"].items():
            row[name] = "undefined"
            if score["interval"]:
                row[name] = "{:.3f} [{:.3f}, {:.3f}]".format(score["mean"], *score["interval"])
        gain, *_ = model["gain_over_gaussian"].values()
        yield {**row, "beats a centred blob": "yes" if gain["beats"] else "no"}


def attention_table(models):
    """The models of a run of attn_distance.py."""
    for model in models:
        yield {"": model["name"], "first block": number(model["first_block"], 1), "last block": number(model["last_block"], 1),
               "all blocks": number(model["mean"], 1), "uniform attention": number(model["uniform"], 1)}


def layer_table(models):
    """The k-NN scores of a run of layers.py."""
    for model in models:
        interval = " [{:+.3f}, {:+.3f}]".format(*model["interval"]) if model["interval"] else ""
        gain = "undefined" if model["gain"] is None else f"{model['gain']:+.3f}{interval}"
        yield {"": model["name"], "best layer, by validation": "{layer}, {feature}".format(**model["best"]),
               "its test score": number(model["best"]["test"]), "that of the last layer": number(model["last"]["test"]),
               "best - last [95 % interval]": gain}


def reuse_table(pairs):
    """The pairs of a model and its start, of one architecture, of a run of layers.py."""
    for pair in pairs:
        if pair["moved"]:
            row = {"": pair["name"]}
            for what, name in (("CKA", "same_layer"), ("weights", "moved")):
                first, middle, last = np.array_split(np.array(pair[name], float), 3)
                row[f"{what}, first third"] = number(np.mean(first), 2)
                row[f"{what}, middle"] = number(np.mean(middle), 2)
                row[f"{what}, last third"] = number(np.mean(last), 2)
            yield row


def tables_of_run(run):
    """Tables of a stage that is not scored by cell: saliency, attention distance, layers."""
    if run["kind"] == "saliency":
        images = run["runs"][0]["images"]
        scored = max(score.get("n", images) for score in run["runs"][0]["map"].values())
        yield table_of(saliency_table(run["runs"]), (
            f"Saliency of {images} test images, mean [95 % interval] over the {scored} of them that can be scored (with "
            "masks: that have a lesion). energy: share of the map inside the mask; pointing: share of images whose peak is "
            "inside; iou: of the mask and as many top pixels; deletion, insertion: area under the probability as pixels go, "
            "come"))
    elif run["kind"] == "attn_distance":
        images = run["runs"][0]["images"]
        yield table_of(attention_table(run["runs"]), f"Mean attention distance in pixels over {images} test images")
    elif run["kind"] == "layers":
        yield table_of(layer_table(run["runs"]), f"What each layer holds: k-NN (k = {run['k']}), test {run['metric']}")
        yield table_of(reuse_table(run["pairs"]), (
            "How much of a layer is kept from start to end: CKA of its outputs on test images (1: the same but for rotation "
            "and scale) and the distance that its weights moved, over their norm; means of layers"))


def other_tables(runs):
    """Parts of the page for the stages that are not scored by cell."""
    parts = [table_of(pretraining_table(runs), "DINO pretraining: k-NN accuracy on validation before and after")]
    for run in runs:
        try:
            parts += tables_of_run(run)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            parts.append(tag("p", f"{run['folder'].name}: its metrics.json lacks what a table needs ({error!r})."))
    return [tag("h2", "Pretraining, saliency, attention, layers"), *parts] if any(parts) else []


# ---------------------------------------------------------------- figures -----------------------------------

BARS = ("Error bars: one standard deviation over seeds or, of a single seed, the 95 % interval over test "
        "images.")
CAPTIONS = {
    1: f"Test score by starting weights, median over seeds. {BARS}",
    2: "Segmentation of test images: the truth in yellow, one model in blue, the other in red, where they differ most and "
       "where they differ little.",
    3: f"Test score against the number of parameters, median over seeds. {BARS}",
    4: "Where the models look, on the same test images: Grad-CAM of a CNN, attention of a ViT's class token, each with the "
       "class that the model predicts and its probability.",
    5: "How far attention reaches in each block, in pixels of the image: a point per head; the dashed line is what uniform "
       "attention would have.",
    6: "What each layer holds: the k-NN score of its features over relative depth; and of each model and its start, CKA of "
       "each layer with itself, how far its weights moved, and CKA of all layers of the one with all of the other."}


def heights(cells):
    """Of n cells the medians (n,), 0 where not defined, and half lengths of error bars (2, n), down and up, 0 where none."""
    medians, errors = [], []
    for cell in cells:
        median, error, _ = summary(cell.runs)
        medians.append(median or 0)
        errors.append(error or (0, 0))
    return medians, np.array(errors).T


def finish_panel(axis, cell, title, xlabel):
    """Label a panel of scores like that of a cell, with its legend above it; a score's axis ends at 1."""
    axis.set(ylabel=f"test {cell.metric}", xlabel=xlabel)
    axis.set_ylim(top=min(1, axis.get_ylim()[1]))
    axis.grid(axis="y", color="#dddddd")
    axis.set_axisbelow(True)
    axis.legend(title=f"{cell.dataset}: {title}", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=7,
                title_fontsize=8)


def draw_bars(path, cells):
    """Figure 1: of each dataset a panel for fine-tuning and one for k-NN, a group of bars per init."""
    colours = dict(zip(archs_of(cells), common.COLOURS * 9))
    shown = [cell for cell in cells if cell.kind in ("finetune", "knn_eval")]
    panels = grouped(shown, lambda cell: (cell.setting, cell.kind)).values()
    figure, axes = common.new_panels(path, len(panels), 3.4, 2.8) if panels else (None, [])
    for axis, panel in zip(axes, panels):
        inits = list(grouped(panel, lambda cell: cell.init))
        bars = grouped(panel, lambda cell: cell.arch)
        width = 0.8 / len(bars)
        for k, arch in enumerate(archs_of(panel)):
            x = [inits.index(cell.init) + (k + 0.5) * width - 0.4 for cell in bars[arch]]
            medians, errors = heights(bars[arch])
            axis.bar(x, medians, 0.92 * width, yerr=errors, capsize=2, color=colours[arch], ecolor="#444444", label=arch)
        axis.set_xticks(range(len(inits)), inits, rotation=20 * (max(map(len, inits)) * len(inits) > 36))
        axis.set_xlim(-0.5, len(inits) - 0.5)
        finish_panel(axis, panel[0], STAGES[panel[0].kind], "starting weights")
    if figure:
        common.save_figure(figure, path)


def draw_capacity(path, cells):
    """Figure 3: a panel per dataset; a line per family and init over the number of parameters."""
    tuned = [cell for cell in cells if cell.kind == "finetune" and summary(cell.runs)[2]]
    panels = grouped(tuned, lambda cell: cell.setting).values()
    figure, axes = common.new_panels(path, len(panels), 4.2, 3) if panels else (None, [])
    for axis, panel in zip(axes, panels):
        lines = grouped(panel, lambda cell: (cell.vit, cell.init))
        for k, ((vit, init), line) in enumerate(lines.items()):
            medians, errors = heights(line)
            axis.errorbar([cell.size for cell in line], medians, errors, marker="s" if vit else "o",
                          linestyle="--" if vit else "-", capsize=2, markersize=4, color=common.COLOURS[k % 7],
                          label=f"{'ViT' if vit else 'CNN'}, {init}")
        sizes = sorted({cell.size for cell in panel})
        axis.set_xscale("log")
        axis.set_xticks(sizes, [f"{size:.0f}" if size >= 2 else f"{size:.1g}" for size in sizes], fontsize=7)
        axis.minorticks_off()
        finish_panel(axis, panel[0], "capacity, fine-tuned", "parameters (millions)")
    if figure:
        common.save_figure(figure, path)


def newest(found):
    """Of found [(dataset, file)]: (the newest file of each dataset, a note on the others)."""
    files = defaultdict(set)
    for dataset, file in found:
        if file.exists():
            files[dataset].add(file)
    latest, others = [], 0
    for dataset in sorted(files):
        *older, file = sorted(files[dataset], key=lambda file: (file.stat().st_mtime, file))
        latest.append(file)
        others += len(older)
    return latest, f" {', '.join(map(str, latest))} is shown; there are {others} more." if others else ""


def join_pictures(files, path, side_by_side):
    """Join pictures, beside or below each other, into one."""
    pictures = [Image.open(file).convert("RGB") for file in files]
    sizes = np.array([picture.size for picture in pictures])  # width, height
    axis = 0 if side_by_side else 1
    whole = sizes.max(0)
    whole[axis] = sizes[:, axis].sum()
    canvas = Image.new("RGB", tuple(whole.tolist()), "white")
    corner = [0, 0]
    for picture in pictures:
        canvas.paste(picture, tuple(corner))
        corner[axis] += picture.size[axis]
    common.write_atomic(path, lambda part: canvas.save(part, "PNG"))


def figures(runs, cells, output, kind):
    """Draw figures 1 and 3 as PNG and as `kind`, copy the others from their stages; parts of the page."""
    for file in output.glob("figure[1-6].*"):
        file.unlink()  # an earlier report may have had it
    for suffix in {"png", kind}:
        draw_bars(output / f"figure1.{suffix}", cells)
        draw_capacity(output / f"figure3.{suffix}", cells)

    pictures = defaultdict(list)  # of each figure, [(dataset, file)]
    for run in runs:
        for record in run["folder"].parent.glob("comparison*.json"):
            pictures[2].append((run["dataset"], record.with_suffix(".png")))
        for k, name in ((4, "saliency.png"), (5, "attn_distance.png"), (6, "layers.png")):
            pictures[k].append((run["dataset"], run["folder"] / name))
    notes = dict.fromkeys(CAPTIONS, "")
    for k, found in pictures.items():
        files, notes[k] = newest(found)
        if files:
            join_pictures(files, output / f"figure{k}.png", side_by_side=k == 4)
        if k == 2:
            notes[k] += "".join(map(compared_in, files))
    return [figure_of(output / f"figure{k}.png", f"Figure {k}. {caption}{notes[k]}") for k, caption in CAPTIONS.items()]


def compared_in(file):
    """The scores of the two models in a picture of segment.py --compare, as a sentence."""
    record = file.with_suffix(".json")
    try:
        content = json.loads(record.read_text())
        scores = []
        for name, iou in zip(content["names"], content["iou"]):
            scores.append(f"{name} has a mean IoU of {number(iou)}")
        return f" {', '.join(scores)}."
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f" {record} cannot be read ({error!r})."


# ---------------------------------------------------------------- sections ----------------------------------

def introduction(cells):
    """What was compared, on how many images, and what to mind, as texts."""
    first = cells[0].runs[0]
    families = grouped(cells, lambda cell: cell.vit)
    cnns, vits = (", ".join(archs_of(families[vit])) or "none" for vit in (False, True))
    inits = grouped(cells, lambda cell: cell.init)
    seeds = sorted({str(run["seed"]) for cell in cells for run in cell.runs})
    images = ", ".join(f"{count} {name}" for name, count in (first.get("counts") or {}).items())
    starts = "; ".join(f"{init}: {words}" for init, words in INITS.items() if init in inits)
    if first.get("drawn"):
        yield DRAWN
    yield (f"CNN: {cnns}; ViT: {vits}; on {cells[0].dataset}: {images} images, at {cells[0].image_size} pixels; split "
           f"{cells[0].split}; seeds {', '.join(seeds)}. The score is {cells[0].metric} on the test images. Starting "
           f"weights: {starts}.")
    once = set()
    for cell in cells:
        files = {run["arguments"].get("init") for run in cell.runs}
        if len(cell.runs) > 1 and cell.init in BEFORE_DINO and len(files) == 1:
            once.add(f"{cell.arch} from {cell.init}")
    if once:
        yield (f"Note: all seeds of {', '.join(sorted(once))} share one pretraining; their spread is that of what followed. "
               "(DINO_PER_SEED=1 bash run_all.sh gives each its own.)")
    for kind, alike in grouped(cells, lambda cell: cell.kind).items():
        values = defaultdict(set)
        for cell in alike:
            for name, value in recipe(cell.runs[0]).items():
                if name != "patch_size" or cell.vit:  # a CNN has no patches
                    values[name].add(str(value))
        unlike = [f"{name} ({', '.join(sorted(given))})" for name, given in values.items() if len(given) > 1]
        if unlike:
            yield f"Note: not all models had the same {STAGES[kind]}: {', '.join(unlike)}."


def section_of(cells):
    """The section of one setting, part by part of the page."""
    pairs = comparisons(cells)
    kinds = grouped(cells, lambda cell: cell.kind)
    what = "segmentation" if "segment" in kinds else "classification"
    yield tag("h2", f"{cells[0].dataset}: {what}, by {cells[0].metric}")
    for text in introduction(cells):
        yield tag("p", text)
    for question, lines in answers(cells, pairs).items():
        yield tag("h3", question)
        yield bullets(lines)
    for kind, alike in kinds.items():
        yield table_of(score_table(alike), f"Table: {STAGES[kind]}{k_of(alike)}, test {cells[0].metric}: median ± standard "
                       "deviation over n seeds; of one seed, the [95 % interval] over test images")
    yield table_of(fold_table(cells), "Table: cross-validation. Over all images, each counts once, as predicted by the model "
                   "that has not seen it; [95 % interval] over images, or groups")
    yield table_of(capacity_table(kinds["finetune"]), "Table: capacity, fine-tuned")
    yield table_of(segment_table(kinds["segment"]), (
        "Table: segmentation, means over test images, median ± standard deviation over n seeds. An image without the class, "
        "in which none is predicted, counts nowhere; where one of the two has it, IoU and Dice are 0 and the image is left "
        "out of HD95. A lesion is found where the prediction meets it."))
    yield table_of(pair_table(pairs), "Table: paired differences over the same seeds and the same resampled test images "
                   "(singly, so the intervals are too narrow where a patient has several)")


def overview(cells):
    """Table 1 over several datasets, and what is kept apart, part by part of the page."""
    kinds = grouped(cells, lambda cell: cell.kind)
    for kind in ("finetune", "knn_eval"):
        if len(grouped(kinds[kind], lambda cell: cell.dataset)) > 1:
            yield table_of(table_of_datasets(kinds[kind]),
                           f"Table 1: {STAGES[kind]}, test score by start and model on every dataset")
    settings = grouped(cells, lambda cell: cell.setting)
    segmented = len(grouped(kinds["segment"], lambda cell: cell.setting))
    if max(segmented, len(settings) - segmented) > 1:
        yield tag("h2", "Runs that do not belong together")
        yield tag("p", "These differ in dataset, split, image size or headline metric. They are tabulated and drawn apart and "
                       "never averaged:")
        yield bullets("{}, split {}, {} pixels, {}".format(*setting) for setting in settings)


def health(run, collapsed):
    """What a reader should know before trusting a run, note by note. collapsed: names of such runs."""
    test = run["test"]
    start = Path(str(run["arguments"].get("init"))).parent.name
    if run.get("collapse"):
        yield run["collapse"].split(";")[0]
    if start in collapsed:
        yield f"collapsed start: {start}"
    for name, count in (run.get("leakage") or {}).items():
        if count:
            yield f"leaking: {count} images {name.replace('_', ' ')}"
    if test.get("one_class") is not None:
        yield f"predicts {test['one_class']} for every test image"
    elif test.get("beats_guess") is False:
        yield "does not beat always guessing the most frequent class"
    if test.get("undefined"):
        yield f"missing in the test split: {', '.join(test['undefined'])}"
    if run.get("best_epoch") and run["best_epoch"] == run.get("epochs"):
        yield "best at its last epoch: longer training may help"


def closing(runs, troubles):
    """The health of each run, troubles first; the exact commands, devices and versions; part by part of the page."""
    collapsed = {run["folder"].name for run in runs if run.get("collapse")}
    states, healthy, machines, commands = [], [], set(), []
    for folder, trouble in troubles:
        states.append({"run": folder.name, "state": trouble, "seconds": "-"})
    for run in runs:
        notes = list(health(run, collapsed))
        state = {"run": run["folder"].name, "state": "; ".join(notes) or "complete", "seconds": number(run.get("seconds"), 0)}
        if notes:
            states.append(state)
        else:
            healthy.append(state)
        args = run["args"]
        count = args.get("world_size", 1)
        launcher = "python" if count == 1 else f"torchrun --nproc_per_node {count}"
        commands.append(f"{launcher} {args.get('command', '(unknown, of {})'.format(run['folder']))}")
        if args:
            machines.add(", ".join([str(args.get("device")), *map(" ".join, args.get("versions", {}).items())]))
    count = f"{len(runs)} complete, {len(troubles)} failed, incomplete, damaged or left out."
    yield tag("h2", "Health of each run")
    yield table_of(states + healthy, count)
    yield tag("h2", "Commands and versions")
    for machine in sorted(machines):
        yield tag("p", machine)
    yield tag("pre", "\n".join(commands))


def write_results(output, runs):
    """results.csv: a row a run."""
    names = ["stage", "dataset", "arch", "init", "seed", "metric"]
    extra = ["fold", "image_size", "split", "parameters", "epochs", "seconds", "images_per_second"]
    rows = []
    for run in runs:
        test = headline(run) if run["kind"] in STAGES else None
        low, high = run["test"].get("interval") or ("", "")
        rows.append([run["folder"], *map(run.get, names), run["val"].get(run["metric"]), test, low, high,
                     run["test"].get("dice"), *map(run.get, extra)])
    common.write_table(output / "results.csv", ["run", *names, "val", "test", "low", "high", "dice", *extra], rows)


def main():
    """Read, tabulate, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (--help lists all arguments)")
    parser.add_argument("runs", nargs="+", help="run folders, or folders of them")
    parser.add_argument("--output", help="default: report/ in the first folder")
    parser.add_argument("--format", default="png", choices=["png", "pdf", "svg"],
                        help="of figures 1 and 3, beside the PNG of the page (the others are their stages' PNG)")
    args = parser.parse_args()
    runs, troubles = read_runs(args.runs)
    output = Path(args.output or Path(args.runs[0]) / "report")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output {output} cannot be written ({error})")
    joined, unjoined = join_folds(runs)
    scored, unlike = cells(joined)
    for run, why in unjoined + unlike:
        troubles.append((run["folder"], f"left out of the tables: {why}"))
    write_results(output, [*runs, *(run for run in joined if "parts" in run)])

    parts = list(overview(scored))
    for section in grouped(scored, lambda cell: cell.setting).values():
        parts += section_of(section)
    classified = [cell for cell in scored if cell.kind != "segment"]
    parts += other_tables(runs)
    parts += [tag("h2", "Figures"), *figures(runs, classified, output, args.format)]
    parts += closing(runs, troubles)
    datasets = grouped(scored, lambda cell: cell.dataset)
    write_page(output / "report.html", f"{', '.join(datasets) or 'Runs'}: a pretrained ViT, or a CNN?", parts)

    for alike in grouped(scored, lambda cell: (cell.setting, cell.kind)).values():
        rows = score_table(alike)
        _, *inits = rows[0]
        common.print_table([f"{alike[0].dataset} {STAGES[alike[0].kind]} ({alike[0].metric})", *inits],
                           [row.values() for row in rows])
        say("")
    for folder, trouble in troubles:
        print(f"note: {folder}: {trouble}", file=sys.stderr)
    drawn = len(list(output.glob("figure[1-6].png")))
    say(f"written: {output}/report.html, results.csv and {drawn} of {len(CAPTIONS)} figures")


if __name__ == "__main__":
    common.launch(main)
