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
from collections import defaultdict
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
    made = {name: value for name, value in run["arguments"].items() if name not in NO_RECIPE}
    training = {name: value for name, value in (run.get("training") or {}).items() if name not in NO_RECIPE}
    return {**made, **{f"{name} of the training": value for name, value in training.items()}}


def differences(one, other):
    """The arguments in which two recipes differ, as text."""
    return [f"{name} {one.get(name)}, not {other.get(name)}" for name in sorted({*one, *other})
            if one.get(name) != other.get(name)]


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


def cells(runs):
    """({(kind, arch, init): {seed: run}} of the scored runs, [(run, why it is left out)]); cells in the order of STAGES,
    of INITS, then CNNs before ViTs, by size. Runs of one cell must have been made alike: the most numerous that were
    are taken, and those that do not say how they were made."""
    groups, table, spare = defaultdict(list), {}, []
    for run in runs:
        groups[run["kind"], run["arch"], run["init"]].append(run)
    for cell, group in groups.items():
        recipes = [made for made in map(recipe, group) if made] or [{}]
        usual = max(recipes, key=recipes.count)
        table[cell] = {}
        for run in group:
            differ = differences(recipe(run) or usual, usual)
            twin = table[cell].get(run["seed"])
            if differ:
                spare.append((run, f"made otherwise than the runs of its kind: {', '.join(differ)}"))
            elif twin:
                spare.append((run, f"another run of seed {run['seed']}, as {twin['folder'].name}"))
            else:
                table[cell][run["seed"]] = run

    def order(cell):
        kind, arch, init = cell
        return ([*STAGES].index(kind), [*INITS, init].index(init), init, is_vit(arch), size_of(table[cell]), arch)
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
    """Predictions of a run, of joined folds of all its "parts"; None where a file is not there or cannot be read."""
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
            labels = np.array([classes.index(label) for label in table[:, head.index("label")]])
            values = table[:, -len(classes):]
        else:
            count = (len(head) - 2) // 2
            labels, values = table[:, 2:2 + count].astype(float), table[:, 2 + count:]
        return Predictions(run["metric"], paths, groups, labels, values.astype(float))
    except (OSError, ValueError, IndexError):
        return None


def own_predictions(run):
    """Predictions of a run; None where they do not give the run's own score."""
    own = headline(run)
    predictions = read_predictions(run)
    if own is None or predictions is None:
        return None
    again = predictions.score(np.arange(len(predictions.paths)))
    return predictions if again is not None and abs(again - own) < 1e-3 else None


def paired_difference(first, second, resamples=500):
    """Mean over common seeds of headline(first) - headline(second): (difference, [low, high] or None, seeds, test
    images), None without a common seed. The 95 % percentile interval resamples seeds and test images, the same for
    both; without predictions of the same images (0 images), the seeds alone."""
    pairs = []  # of each seed, the two runs
    for seed in sorted(first.keys() & second.keys(), key=str):
        if None not in (headline(first[seed]), headline(second[seed])):
            pairs.append((first[seed], second[seed]))
    if not pairs:
        return None
    predictions = [(own_predictions(a), own_predictions(b)) for a, b in pairs]
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

    rng = np.random.default_rng(0)
    seeds = len(pairs)
    values = []
    for _ in range(resamples if images or seeds > 1 else 0):
        chosen = rng.integers(seeds, size=seeds).tolist()
        rows = rng.integers(images, size=images)
        drawn = {seed: difference(seed, rows) for seed in set(chosen)}
        values.append(np.mean([drawn[seed] for seed in chosen]))
    defined = [value for value in values if not math.isnan(value)]
    interval = np.percentile(defined, [2.5, 97.5]).tolist() if len(defined) * 2 > resamples else None
    whole = [difference(seed, np.arange(images)) for seed in range(seeds)]
    return float(np.mean(whole)), interval, seeds, images


def join_folds(runs):
    """(runs, [(run, why it is left out)]): the runs of all folds of a model and a seed have become one, whose test is over
    all images, each as predicted by the run that has not seen it."""
    joined, folded, spare = [], [], []
    for run in runs:
        if run.get("fold") is None or run["kind"] not in STAGES or run.get("trained_on"):
            joined.append(run)
        else:
            folded.append(run)

    def model(run):
        names = ("kind", "dataset", "split", "image_size", "metric", "arch", "init", "seed")
        return *map(run.get, names), json.dumps(recipe(run), sort_keys=True)
    for group in grouped(folded, model).values():
        by_fold = one_each(group, "fold", spare)
        parts = [by_fold[fold] for fold in sorted(by_fold)]
        count = parts[0].get("folds")
        predictions = read_predictions({**parts[0], "parts": parts})
        if len(parts) != count:
            there = ", ".join(map(str, sorted(by_fold)))
            spare += [(part, f"of {count} folds only {there} can be joined") for part in parts]
        elif predictions is None:
            spare += [(part, "a predictions.csv of its folds cannot be read") for part in parts]
        else:
            joined.append(join(parts, predictions))
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
    test["beats_guess"] = None
    if test["interval"] and test.get("guess") is not None:
        test["beats_guess"] = test["interval"][0] > test["guess"]
    classes = {each.get("one_class") for each in tests}
    test["one_class"] = classes.pop() if len(classes) == 1 else None

    return {**parts[0], "parts": parts, "test": test, "counts": {"cross-validated": count}, "fold": None,
            "dataset": f"{parts[0]['dataset']}, {len(parts)} folds",  # never averaged with runs on the split
            "folder": Path(f"{parts[0]['folder']} to f{parts[-1]['fold']}"),
            "val": {metric: common.mean_defined([part["val"].get(metric) for part in parts])},
            "seconds": sum(part.get("seconds") or 0 for part in parts)}


def comparisons(table):
    """[(what, first, second, paired_difference)]: "vit": each ViT less the CNN nearest in size, by kind and init; "dino":
    each model after DINO less before; "statistics": each start from statistics less random weights, and each pretrained
    one less its statistics. first and second are keys of the table."""
    pairs = []
    for kind, arch, init in table:
        if not is_vit(arch):
            continue
        size = size_of(table[kind, arch, init])
        rivals = {cell: abs(size_of(table[cell]) - size) for cell in table
                  if cell[0] == kind and cell[2] == init and not is_vit(cell[1])}
        if rivals:
            pairs.append(("vit", (kind, arch, init), min(rivals, key=rivals.get)))
    for kind, arch, init in table:
        before = (kind, arch, BEFORE_DINO.get(init))
        if before in table:
            pairs.append(("dino", (kind, arch, init), before))
    for kind, arch, init in table:
        pretrained, drawn, random = ((kind, arch, start) for start in (init, f"{init}-stats", "random"))
        if drawn in table:
            pairs += [("statistics", *step) for step in ((drawn, random), (pretrained, drawn)) if {*step} <= table.keys()]
    results = [(what, first, second, paired_difference(table[first], table[second])) for what, first, second in pairs]
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


def says_one_thing(cell, by_seed):
    """Why a cell's scores tell nothing: [sentence] where a run of it predicts one class for every image. (A ranking, as
    of a ROC curve, may tell more.)"""
    for seed, run in by_seed.items():
        if run["test"].get("one_class") is not None and run["metric"] not in ("roc_auc", "average_precision"):
            return [f"{cell[1]} from {cell[2]}, seed {seed}, predicts {run['test']['one_class']} for every image"]
    return []


def k_of(by_seed):
    """The k of k-NN runs, as text behind a name; "" of other runs."""
    ks = sorted({run["k"] for run in by_seed.values() if run.get("k")})
    return f" (k = {', '.join(map(str, ks))})" if ks else ""


def answers(table, pairs):
    """The paper's questions, each with what these runs say: {question: [answer]}."""
    result = {}
    kinds = {kind for kind, _, _ in table}
    for question, what, kind, inits in QUESTIONS:
        lines = []
        for compared, a, b, found in pairs:
            if compared != what or a[0] != kind or inits and a[2] not in inits:
                continue
            subject = f"{a[1]} against {b[1]}, {a[2]}" if what == "vit" else f"{a[1]}, {b[2]} to {a[2]}"
            verdicts = ("the ViT is better", "the ViT is worse") if what == "vit" else ("it helps", "it hurts")
            silent = [reason for cell in (a, b) for reason in says_one_thing(cell, table[cell])]
            answer = f"cannot be compared: {'; '.join(silent)}" if silent else in_words(found, *verdicts)
            weak = [cell[1] for cell in (a, b) if any(run["test"].get("beats_guess") is False for run in table[cell].values())]
            if weak and not silent:
                answer += f"; {' and '.join(weak)} did not beat always guessing the most frequent class"
            lines.append(f"{subject}{k_of(table[a])}: {answer}")
        if lines or kind in kinds and kind != "segment" and inits:
            result[question] = lines or ["no runs to tell"]
    if {"finetune", "knn_eval"} <= kinds:
        result["Do k-NN and fine-tuning agree?"] = [rank_agreement(table)]
    return result


def rank_agreement(table):
    """How many pairs of models fine-tuning and k-NN rank alike, as a sentence."""
    scores = []
    for kind, arch, init in table:
        if kind == "finetune" and ("knn_eval", arch, init) in table:
            scores.append([summary(table[kind, arch, init])[0] for kind in ("finetune", "knn_eval")])
    pairs = [(a, b) for a, b in itertools.combinations(scores, 2) if None not in (*a, *b)]
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
    items = [tag("li", line) for line in lines]
    return "<ul>" + "".join(items) + "</ul>"


def table_of(head, rows, caption=""):
    """A table; cells that tell of trouble are marked."""
    lines = ["".join(f"<th>{html.escape(str(cell))}" for cell in head)]
    for row in rows:
        cells = []
        for cell in map(str, row):
            style = "warn " * cell.startswith(WARN) + "long" * (len(cell) > 50)
            cells.append(f'<td class="{style}">{html.escape(cell)}')
        lines.append("".join(cells))
    return tag("p", caption) + "<div><table><tr>" + "<tr>".join(lines) + "</table></div>"


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
    page = f'<!doctype html><html lang="en">{head}{tag("h1", title)}' + "\n".join(parts) + "</html>\n"
    common.write_atomic(path, lambda part: part.write_text(page, "utf-8"))


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
    guesses = {number(run["test"].get("guess")) for cell, by_seed in table.items() if cell[0] == kind
               for run in by_seed.values()} - {"-"}
    if guesses:
        rows.append(["always the most frequent class", *[", ".join(sorted(guesses))] * len(inits)])
    return ["", *inits], rows


def table_of_datasets(groups, kind):
    """(head, rows): Table 1 of the paper, a row an init and an architecture, a column a dataset and its metric."""
    groups = [(key, table) for key, table in groups if any(cell[0] == kind for cell in table)]
    rows = {}
    for column, (_, table) in enumerate(groups):
        for (of_kind, arch, init), by_seed in table.items():
            if of_kind == kind:
                row = rows.setdefault((init, arch), [init, arch, *["missing"] * len(groups)])
                row[2 + column] = score_text(by_seed)
    order = [*INITS]
    keys = sorted(rows, key=lambda key: (order.index(key[0]) if key[0] in order else len(order), key[0], is_vit(key[1])))
    return ["", "", *(f"{key[0]} ({key[3]})" for key, _ in groups)], [rows[key] for key in keys]


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
    rows = []
    for (kind, arch, init), by_seed in table.items():
        if kind == "segment":
            texts = [score_text(by_seed, name, "missing") for name in names]
            tests = [run["test"] for run in by_seed.values()]
            for column, count in ((0, "n"), (1, "n"), (2, "hd95_n")):
                images = sorted({test[count] for test in tests if count in test})
                texts[column] += f" over {', '.join(map(str, images))}" if images else ""
            found = ["{found} of {lesions}".format(**test) for test in tests if "found" in test]
            rows.append([arch, init, *texts, ", ".join(found) or "-", len(by_seed)])
    return ["", "init", *names.values(), "lesions found", "n"], rows


def pair_table(pairs):
    """(head, rows) of comparisons."""
    rows = [[STAGES[a[0]], ", ".join(a[1:]), ", ".join(b[1:]), f"{found[0]:+.3f}",
             "{:+.3f} to {:+.3f}".format(*found[1]) if found[1] else "none", *found[2:]]
            for _, a, b, found in pairs]
    return ["", "first", "second", "first - second", "95 % interval", "seeds", "images"], rows


def fold_table(table):
    """(head, rows) of what was cross-validated: a row a run, its score over folds and over all images."""
    rows = []
    for (kind, arch, init), by_seed in table.items():
        for seed, run in by_seed.items():
            values = [headline(part) for part in run.get("parts", [])]
            values = [value for value in values if value is not None]
            if values:
                spread = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else number(values[0])
                rows.append([STAGES[kind], arch, init, seed, spread, score_text({seed: run}),
                             run["counts"]["cross-validated"]])
    return ["", "", "init", "seed", "mean ± standard deviation over folds", "over all images", "images"], rows


MAP_SCORES = ("energy: share of the map inside the mask; pointing: share of images whose peak is inside; "
              "iou: of the mask and as many top pixels; deletion, insertion: area under the probability as "
              "pixels go, come")


def pretraining_table(runs):
    """(head, rows) of the DINO runs."""
    rows = []
    for run in runs:
        if run["kind"] == "pretrain_dino":
            collapsed = (run.get("collapse") or "no").split(":")[0]
            rows.append([run["folder"].name, run["init"], run.get("epochs"), number(run["val"].get("knn_before")),
                         number(run["val"].get("knn")), collapsed])
    return ["", "weights", "epochs", "before", "after", "collapsed"], rows


def saliency_table(run):
    """(head, rows) of a run of saliency.py."""
    models = run["runs"]
    names = list(models[0]["map"])
    rows = []
    for one in models:
        values = [one["map"][name] for name in names]
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(value["mean"], *value["interval"]) if value["interval"] else "undefined"
                 for value in values]
        beats = "yes" if one["gain_over_gaussian"][names[0]]["beats"] else "no"
        rows.append([one["name"], one["method"], *cells, beats])
    return ["", "method", *names, "beats a centred blob"], rows


def attention_table(run):
    """(head, rows) of a run of attn_distance.py."""
    columns = {"first_block": "first block", "last_block": "last block", "mean": "all blocks", "uniform": "uniform attention"}
    return ["", *columns.values()], [[one["name"], *(number(one[name], 1) for name in columns)] for one in run["runs"]]


def layer_table(run):
    """(head, rows) of the k-NN scores of a run of layers.py."""
    rows = []
    for one in run["runs"]:
        interval = " [{:+.3f}, {:+.3f}]".format(*one["interval"]) if one["interval"] else ""
        gain = f"{one['gain']:+.3f}{interval}" if one["gain"] is not None else "undefined"
        rows.append([one["name"], "{layer}, {feature}".format(**one["best"]), number(one["best"]["test"]),
                     number(one["last"]["test"]), gain])
    return ["", "best layer, by validation", "its test score", "that of the last layer", "best - last [95 % interval]"], rows


def reuse_table(run):
    """(head, rows) of the pairs of one architecture of a run of layers.py."""
    thirds = ("first third", "middle", "last third")
    rows = []
    for pair in run["pairs"]:
        if pair["moved"]:
            means = [np.mean(part) for key in ("same_layer", "moved") for part in np.array_split(np.array(pair[key], float), 3)]
            rows.append([pair["name"], *(number(mean, 2) for mean in means)])
    return ["", *(f"CKA, {name}" for name in thirds), *(f"weights, {name}" for name in thirds)], rows


def other_tables(runs):
    """Parts of the page for the stages that are not scored by cell: pretraining, saliency, attention distance, layers."""
    parts = []
    head, rows = pretraining_table(runs)
    if rows:
        parts.append(table_of(head, rows, "DINO pretraining: k-NN accuracy on validation before and after"))
    for run in runs:
        try:
            if run["kind"] == "saliency":
                count = run["runs"][0]["images"]
                counted = {cell.get("n", count) for cell in run["runs"][0]["map"].values()}
                caption = (f"Saliency of {count} test images, mean [95 % interval] over the {max(counted)} of them that can be "
                           f"scored (with masks: that have a lesion). {MAP_SCORES}")
                parts.append(table_of(*saliency_table(run), caption))
            elif run["kind"] == "attn_distance":
                caption = f"Mean attention distance in pixels over {run['runs'][0]['images']} test images"
                parts.append(table_of(*attention_table(run), caption))
            elif run["kind"] == "layers":
                parts.append(table_of(*layer_table(run), f"What each layer holds: k-NN (k = {run['k']}), test {run['metric']}"))
                caption = ("How much of a layer is kept from start to end: CKA of its outputs on test images (1: the same but "
                           "for rotation and scale) and the distance that its weights moved, over their norm; means of layers")
                parts += [table_of(*reuse_table(run), caption)] if run["pairs"] else []
        except (KeyError, TypeError, IndexError) as error:
            parts.append(tag("p", f"{run['folder'].name}: its metrics.json lacks what a table needs ({error!r})."))
    return parts


# ---------------------------------------------------------------- figures -----------------------------------

EMPTY_MASKS = ("An image without the class, in which none is predicted, counts nowhere; where one of the two has it, IoU and "
               "Dice are 0 and the image is left out of HD95. A lesion is found where the prediction meets it.")
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
    6: "What each layer holds: the k-NN score of its features over relative depth; and of each model and its start, CKA of each "
       "layer with itself, how far its weights moved, and CKA of all layers of the one with all of the other."}


def error_bars(found):
    """(2, n) half lengths of error bars, down and up, of summaries (median, (down, up) or None, n); 0 where none."""
    return np.array([error or (0, 0) for _, error, _ in found]).T


def finish_panel(axis, title, unit, xlabel):
    """Label a panel of scores, with its legend above it; a score's axis ends at 1."""
    axis.set(ylabel=unit, xlabel=xlabel)
    axis.set_ylim(top=min(1, axis.get_ylim()[1]))
    axis.grid(axis="y", color="#dddddd")
    axis.set_axisbelow(True)
    axis.legend(title=title, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=7, title_fontsize=8)


def draw_bars(path, groups):
    """Figure 1: of each dataset a panel for fine-tuning and one for k-NN, a group of bars per init."""
    panels = []
    for key, table in groups:
        panels += [(key, table, kind) for kind in ("finetune", "knn_eval") if any(cell[0] == kind for cell in table)]
    if not panels:
        return
    figure, axes = common.new_panels(path, len(panels), 3.4, 2.8)
    for axis, (key, table, kind) in zip(axes, panels):
        colours = dict(zip(archs_and_inits(table, *STAGES)[0], common.COLOURS * 9))
        archs, inits = archs_and_inits(table, kind)
        width = 0.8 / len(archs)
        for k, arch in enumerate(archs):
            places = [i for i, init in enumerate(inits) if (kind, arch, init) in table]
            found = [summary(table[kind, arch, inits[i]]) for i in places]
            axis.bar([i + (k + 0.5) * width - 0.4 for i in places], [median or 0 for median, _, _ in found], 0.92 * width,
                     yerr=error_bars(found), capsize=2, color=colours[arch], ecolor="#444444", label=arch)
        axis.set_xticks(range(len(inits)), inits, rotation=20 * (max(map(len, inits)) * len(inits) > 36))
        axis.set_xlim(-0.5, len(inits) - 0.5)
        finish_panel(axis, f"{key[0]}: {STAGES[kind]}", f"test {key[3]}", "starting weights")
    if figure:
        common.save_figure(figure, path)


def draw_capacity(path, groups):
    """Figure 3: a panel per dataset; a line per family and init over the number of parameters."""
    groups = [(key, table) for key, table in groups if any(cell[0] == "finetune" for cell in table)]
    if not groups:
        return
    figure, axes = common.new_panels(path, len(groups), 4.2, 3)
    for axis, (key, table) in zip(axes, groups):
        lines = defaultdict(dict)
        for (kind, arch, init), by_seed in table.items():  # by size
            if kind == "finetune" and summary(by_seed)[2]:
                lines[is_vit(arch), init][size_of(by_seed)] = summary(by_seed)
        for k, ((vit, init), points) in enumerate(lines.items()):
            axis.errorbar(list(points), [median for median, _, _ in points.values()], error_bars(points.values()),
                          marker="s" if vit else "o", linestyle="--" if vit else "-", capsize=2, markersize=4,
                          color=common.COLOURS[k % 7], label=f"{'ViT' if vit else 'CNN'}, {init}")
        sizes = sorted({size for points in lines.values() for size in points})
        axis.set_xscale("log")
        axis.set_xticks(sizes, [f"{size:.0f}" if size >= 2 else f"{size:.1g}" for size in sizes], fontsize=7)
        axis.minorticks_off()
        finish_panel(axis, f"{key[0]}: capacity, fine-tuned", f"test {key[3]}", "parameters (millions)")
    if figure:
        common.save_figure(figure, path)


def newest(found):
    """Of found [(dataset, file)]: (the newest file of each dataset, a note on the others)."""
    files = defaultdict(set)
    for dataset, file in found:
        if file.exists():
            files[dataset].add(file)
    latest = [max(files[dataset], key=lambda file: (file.stat().st_mtime, file)) for dataset in sorted(files)]
    others = sum(map(len, files.values())) - len(latest)
    return latest, f" {', '.join(map(str, latest))} is shown; there are {others} more." if others else ""


def join_pictures(files, path, side_by_side):
    """Join pictures, beside or below each other, into one."""
    pictures = [Image.open(file).convert("RGB") for file in files]
    widths, heights = zip(*(picture.size for picture in pictures))
    size = (sum(widths), max(heights)) if side_by_side else (max(widths), sum(heights))
    canvas = Image.new("RGB", size, "white")
    x = y = 0
    for picture in pictures:
        canvas.paste(picture, (x, y))
        x, y = (x + picture.width, 0) if side_by_side else (0, y + picture.height)
    common.write_atomic(path, lambda part: canvas.save(part, "PNG"))


def figures(runs, groups, output, kind):
    """Draw figures 1 and 3 as PNG and as `kind`, copy the others from their stages; parts of the page."""
    for file in output.glob("figure[1-6].*"):
        file.unlink()  # an earlier report may have had it
    for suffix in {"png", kind}:
        draw_bars(output / f"figure1.{suffix}", groups)
        draw_capacity(output / f"figure3.{suffix}", groups)

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

def introduction(key, members, table):
    """What was compared, on how many images, and what to mind, as paragraphs."""
    archs, inits = archs_and_inits(table, *STAGES)
    cnns, vits = (", ".join(arch for arch in archs if is_vit(arch) == vit) or "none" for vit in (False, True))
    images = ", ".join(f"{count} {name}" for name, count in (members[0].get("counts") or {}).items())
    seeds = ", ".join(sorted({str(seed) for by_seed in table.values() for seed in by_seed}))
    starts = "; ".join(f"{init}: {words}" for init, words in INITS.items() if init in inits)
    parts = [DRAWN] if members[0].get("drawn") else []
    parts += [f"CNN: {cnns}; ViT: {vits}; on {key[0]}: {images} images, at {key[2]} pixels; split {key[1]}; "
             f"seeds {seeds}. The score is {key[3]} on the test images. Starting weights: {starts}."]
    shared = sorted({f"{arch} from {init}" for (_, arch, init), by_seed in table.items()
                     if len(by_seed) > 1 and init in BEFORE_DINO
                     and len({run["arguments"].get("init") for run in by_seed.values()}) == 1})
    if shared:
        parts.append(f"Note: all seeds of {', '.join(shared)} share one pretraining; their spread is that of "
                     "what followed. (DINO_PER_SEED=1 bash run_all.sh gives each its own.)")
    for kind in STAGES:
        values = defaultdict(set)
        for (of_kind, arch, _), by_seed in table.items():
            for name, value in recipe(next(iter(by_seed.values()))).items():
                if of_kind == kind and (name != "patch_size" or is_vit(arch)):  # a CNN has no patches
                    values[name].add(str(value))
        unlike = [f"{name} ({', '.join(sorted(found))})" for name, found in values.items() if len(found) > 1]
        parts += [f"Note: not all models had the same {STAGES[kind]}: {', '.join(unlike)}."] if unlike else []
    return parts


def section_of(key, members, table):
    """The section of one setting, as parts of the page."""
    pairs = comparisons(table)
    kinds = list(dict.fromkeys(cell[0] for cell in table))
    what = "segmentation" if "segment" in kinds else "classification"
    parts = [tag("h2", f"{key[0]}: {what}, by {key[3]}"), *(tag("p", text) for text in introduction(key, members, table))]
    for question, lines in answers(table, pairs).items():
        parts += [tag("h3", question), bullets(lines)]
    for kind in kinds:
        k = k_of({i: run for cell, by_seed in table.items() if cell[0] == kind for i, run in enumerate(by_seed.values())})
        parts.append(table_of(*score_table(table, kind), f"Table: {STAGES[kind]}{k}, test {key[3]}: median ± standard "
                              "deviation over n seeds; of one seed, the [95 % interval] over test images"))
    head, rows = fold_table(table)
    if rows:
        parts.append(table_of(head, rows, "Table: cross-validation. Over all images, each counts once, as predicted by the model "
                              "that has not seen it; [95 % interval] over images, or groups"))
    if "finetune" in kinds:
        parts.append(table_of(*capacity_table(table), "Table: capacity, fine-tuned"))
    if "segment" in kinds:
        parts.append(table_of(*segment_table(table), "Table: segmentation, means over test images, median ± standard "
                              f"deviation over n seeds. {EMPTY_MASKS}"))
    if pairs:
        parts.append(table_of(*pair_table(pairs), "Table: paired differences over the same seeds and the same resampled test "
                              "images (singly, so the intervals are too narrow where a patient has several)"))
    return parts


def health(run, collapsed):
    """What a reader should know before trusting a run, [] if nothing. collapsed: names of such runs."""
    notes = [run["collapse"].split(";")[0]] if run.get("collapse") else []
    start = Path(str(run["arguments"].get("init"))).parent.name
    notes += [f"collapsed start: {start}"] if start in collapsed else []
    notes += [f"leaking: {count} images {key.replace('_', ' ')}"
              for key, count in (run.get("leakage") or {}).items() if count]
    if run["test"].get("one_class") is not None:
        notes.append(f"predicts {run['test']['one_class']} for every test image")
    elif run["test"].get("beats_guess") is False:
        notes.append("does not beat always guessing the most frequent class")
    if run["test"].get("undefined"):
        notes.append(f"missing in the test split: {', '.join(run['test']['undefined'])}")
    if run.get("best_epoch") and run["best_epoch"] == run.get("epochs"):
        notes.append("best at its last epoch: longer training may help")
    return notes


def closing_parts(runs, troubles):
    """The health of each run, troubles first; the exact commands, devices and versions."""
    collapsed = {run["folder"].name for run in runs if run.get("collapse")}
    states = [[folder.name, trouble, "-"] for folder, trouble in troubles]
    healthy = []
    machines, commands = set(), []
    for run in runs:
        notes = health(run, collapsed)
        (states if notes else healthy).append([run["folder"].name, "; ".join(notes) or "complete",
                                               number(run.get("seconds"), 0)])
        args, count = run["args"], run["args"].get("world_size", 1)
        launcher = "python" if count == 1 else f"torchrun --nproc_per_node {count}"
        commands.append(f"{launcher} {args.get('command', '(unknown, of {})'.format(run['folder']))}")
        if args:
            machines.add(", ".join([str(args.get("device")), *map(" ".join, args.get("versions", {}).items())]))
    count = f"{len(runs)} complete, {len(troubles)} failed, incomplete, damaged or left out."
    return [tag("h2", "Health of each run"), table_of(["run", "state", "seconds"], states + healthy, count),
            tag("h2", "Commands and versions"), *(tag("p", machine) for machine in sorted(machines)),
            tag("pre", "\n".join(commands))]


def write_results(output, runs):
    """results.csv: a row a run."""
    names = ["stage", "dataset", "arch", "init", "seed", "metric"]
    extra = ["fold", "image_size", "split", "parameters", "epochs", "seconds", "images_per_second"]
    head = ["run", *names, "val", "test", "low", "high", "dice", *extra]
    common.write_table(output / "results.csv", head, [
        [run["folder"], *(run[name] for name in names), run["val"].get(run["metric"]),
         headline(run) if run["kind"] in STAGES else None, *(run["test"].get("interval") or ["", ""]),
         run["test"].get("dice"), *(run.get(name) for name in extra)] for run in runs])


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
    joined, spare = join_folds(runs)
    troubles += [(run["folder"], f"left out of the tables: {why}") for run, why in spare]
    write_results(output, [*runs, *(run for run in joined if "parts" in run)])

    settings = defaultdict(list)  # what runs must share to be put into one table
    for run in joined:
        if run["kind"] in STAGES:
            settings[run["dataset"], run.get("split"), run.get("image_size"), run["metric"]].append(run)
    tables, parts = [], []
    for key, group in sorted(settings.items(), key=lambda item: (item[1][0]["kind"] == "segment", -len(item[1]))):
        table, spare = cells(group)
        troubles += [(run["folder"], f"left out of the tables: {why}") for run, why in spare]
        tables.append((key, table))
        parts += section_of(key, group, table)
    classified = [(key, table) for key, table in tables if any(cell[0] != "segment" for cell in table)]
    datasets = list(dict.fromkeys(key[0] for key, _ in tables))
    if max(len(classified), len(tables) - len(classified)) > 1:
        parts = [tag("h2", "Runs that do not belong together"), tag("p",
            "These differ in dataset, split, image size or headline metric. They are tabulated and drawn apart and never "
            "averaged:"), bullets(["{}, split {}, {} pixels, {}".format(*key) for key, _ in tables]), *parts]
    for kind in ("knn_eval", "finetune"):
        if len({key[0] for key, table in classified if any(cell[0] == kind for cell in table)}) > 1:
            caption = f"Table 1: {STAGES[kind]}, test score by start and model on every dataset"
            parts = [table_of(*table_of_datasets(classified, kind), caption), *parts]
    made = figures(runs, classified, output, args.format)
    others = other_tables(runs)
    if others:
        parts += [tag("h2", "Pretraining, saliency, attention, layers"), *others]
    parts += [tag("h2", "Figures"), *made, *closing_parts(runs, troubles)]
    title = f"{', '.join(datasets) or 'Runs'}: a pretrained ViT, or a CNN?"
    write_page(output / "report.html", title, parts)

    for (dataset, _, _, metric), table in tables:
        for kind in dict.fromkeys(cell[0] for cell in table):
            head, body = score_table(table, kind)
            common.print_table([f"{dataset} {STAGES[kind]} ({metric})", *head[1:]], body)
            say("")
    for folder, trouble in troubles:
        print(f"note: {folder}: {trouble}", file=sys.stderr)
    drawn = len(list(output.glob("figure[1-6].png")))
    say(f"written: {output}/report.html, results.csv and {drawn} of {len(CAPTIONS)} figures")


if __name__ == "__main__":
    common.launch(main)
