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
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

import common
from common import fail, say

PAIRS = [("deit_tiny", "resnet18"), ("deit_small", "resnet50"), ("deit_base", "resnet152")]  # of like size
INITS = ["random", "dino", "imagenet", "imagenet-dino", "imagenet+dino", "finetuned"]
STAGES = {"finetune": "fine-tuning", "knn_eval": "k-NN", "segment": "segmentation"}


# ---------------------------------------------------------------- reading -----------------------------------

def read_runs(places):
    """(runs, troubles): each complete run under the places, with its "folder"; (folder, what is wrong)."""
    runs, troubles, seen = [], [], set()
    for place in places:
        if not Path(place).is_dir():
            fail(f"{place}: there is no such folder of runs")
        for folder in sorted(file.parent for file in Path(place).rglob("args.json")):
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            if not (folder / "metrics.json").exists():
                troubles.append((folder, "incomplete: no metrics.json"))
                continue
            try:
                content, args = (json.loads((folder / f"{n}.json").read_text()) for n in ("metrics", "args"))
                needed = {"stage", "dataset", "arch", "init", "seed", "metric", "val", "test"}
                if not isinstance(content, dict) or needed - content.keys():
                    raise ValueError(f"lacks {', '.join(sorted(needed - content.keys()))}")
                runs.append({**content, "folder": folder, "args": args})
            except (ValueError, OSError, AttributeError) as error:
                troubles.append((folder, f"metrics.json cannot be used: {error}"))
    if not runs and not troubles:
        fail(f"{', '.join(map(str, places))}: no run folders (with args.json) in there")
    return runs, troubles


def setting(run):
    """What two runs must share to be put into one table."""
    return (run["dataset"], run.get("split"), run.get("image_size"), run["metric"])


def health(run):
    """What a reader should know before trusting a run, [] if nothing."""
    notes = [run["collapse"].split(";")[0]] if run.get("collapse") else []
    notes += [f"leakage: {count} images {key.replace('_', ' ')}"
              for key, count in (run.get("leakage") or {}).items() if count]
    absent = run["test"].get("undefined")
    return [*notes, f"not in the test split: {', '.join(absent)}"] if absent else notes


def cells(runs):
    """{(stage, arch, init): {seed: run}} of the scored stages."""
    table = defaultdict(dict)
    for run in runs:
        if run["stage"] in STAGES and not run.get("freeze"):
            table[run["stage"], run["arch"], run["init"]][run["seed"]] = run
    return table


def headline(run):
    """The test score of a run's headline metric, or None."""
    return run["test"].get(run["metric"])


# ---------------------------------------------------------------- statistics --------------------------------

def summary(values):
    """(median, standard deviation or None for one value, n) of the values that are defined."""
    defined = [value for value in values if value is not None]
    if not defined:
        return None, None, 0
    spread = float(np.std(defined, ddof=1)) if len(defined) > 1 else None
    return float(np.median(defined)), spread, len(defined)


def read_predictions(run):
    """{path: (label, scores (C,))} of a run's predictions.csv, and its classes; ({}, []) if it has none."""
    file = run["folder"] / "predictions.csv"
    if not file.exists():
        return {}, []
    with open(file, newline="") as lines:
        head, *rows = list(csv.reader(lines))
    if head[1:2] != ["label"]:
        return {}, []
    return {row[0]: (row[1], np.array(row[3:], float)) for row in rows}, head[3:]


def paired_difference(first, second, resamples=500):
    """Mean over common seeds of headline(first) - headline(second): (difference, [low, high], seeds), None
    without a common seed. The 95 % interval resamples seeds and test images; without predictions, seeds."""
    seeds = sorted(s for s in first.keys() & second.keys()
                   if headline(first[s]) is not None and headline(second[s]) is not None)
    if not seeds:
        return None
    name = first[seeds[0]]["metric"]
    difference = float(np.mean([headline(first[s]) - headline(second[s]) for s in seeds]))
    tables, paths = [], None
    for seed in seeds:
        (a, classes), (b, _) = read_predictions(first[seed]), read_predictions(second[seed])
        paths = sorted(a.keys() & b.keys()) if paths is None else paths
        if not paths or len(paths) != len(a) or any(path not in a or path not in b for path in paths):
            tables = []
            break
        many = any(len(set(a[p][0].split()) & {*classes}) > 1 or not a[p][0] for p in paths)
        if many:
            labels = np.array([[float(c in a[p][0].split()) for c in classes] for p in paths])
        else:
            labels = np.array([classes.index(a[p][0]) for p in paths])
        tables.append((labels, np.array([a[p][1] for p in paths]), np.array([b[p][1] for p in paths]), many))
    rng, values = np.random.default_rng(0), []
    for _ in range(resamples):
        chosen, rows = rng.integers(len(seeds), size=len(seeds)), None
        if tables and name in common.METRICS:
            rows = rng.integers(len(paths), size=len(paths))
            pairs = [[common.metric(name, "multilabel" if many else "classes", labels[rows], scores[rows])
                      for scores in (a, b)] for labels, a, b, many in (tables[i] for i in chosen)]
            pairs = [pair for pair in pairs if None not in pair]
            values += [np.mean([a - b for a, b in pairs])] if pairs else []
        else:
            values.append(np.mean([headline(first[seeds[i]]) - headline(second[seeds[i]]) for i in chosen]))
    return difference, np.percentile(values, [2.5, 97.5]).tolist(), len(seeds)


def in_words(result, better, worse):
    """A difference as a sentence, only as strong as its interval allows."""
    difference, (low, high), seeds = result
    evidence = (f"difference {difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, "
                f"{seeds} seed{'s' * (seeds > 1)}")
    if low <= 0 <= high:
        return f"no difference shown ({evidence}; the interval includes 0)"
    return f"{better if low > 0 else worse} ({evidence})"


def answers(table):
    """The paper's questions, each with what these runs say: [(question, answer)]."""
    archs = {arch for _, arch, _ in table}
    pairs = [(vit, cnn) for vit, cnn in PAIRS if vit in archs and cnn in archs]
    result = []

    def compare(question, stage, better, worse, pick):
        for first, second, what in pick:
            pair = paired_difference(table.get((stage, *first), {}), table.get((stage, *second), {}))
            answer = in_words(pair, better, worse) if pair else "no runs to tell"
            result.append((question, f"{what}: {answer}"))

    for question, init in (("Does the ViT lose from scratch?", "random"),
                           ("Is the ViT on par from ImageNet weights?", "imagenet"),
                           ("And after DINO on the dataset's own images?", "dino")):
        compare(question, "finetune", "the ViT is better", "the ViT is worse",
                [((vit, init), (cnn, init), f"{vit} against {cnn}") for vit, cnn in pairs])
    dino = [((arch, after), (arch, before), arch)
            for before, after in (("random", "dino"), ("imagenet", "imagenet+dino"))
            for arch in sorted(archs) if ("finetune", arch, after) in table]
    compare("Does DINO help fine-tuning?", "finetune", "it helps", "it hurts", dino)
    compare("Does DINO help k-NN?", "knn_eval", "it helps", "it hurts", dino)
    both = [[summary(map(headline, table[(stage, *model)].values()))[0] for stage in ("finetune", "knn_eval")]
            for stage, *model in table if stage == "finetune" and ("knn_eval", *model) in table]
    pairs = [(a, b) for a, b in itertools.combinations(both, 2) if None not in (*a, *b)]
    same = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs)
    result.append(("Do k-NN and fine-tuning agree?", f"they rank {same} of {len(pairs)} pairs of models alike"
                   if pairs else "no runs to tell"))
    return result


# ---------------------------------------------------------------- tables ------------------------------------

def number(value, digits=3):
    """A number for a table; a dash where it is missing."""
    return "-" if value is None else f"{value:.{digits}f}"


def vits_last(arch):
    """Order of architectures: the CNNs, then the ViTs, each by name."""
    return "vit" in arch or "deit" in arch, arch


def score_table(table, stage):
    """(head, rows): a row an architecture, a column an init: median ± standard deviation (n)."""
    archs = sorted({arch for s, arch, _ in table if s == stage}, key=vits_last)
    inits = sorted({init for s, _, init in table if s == stage},
                   key=lambda i: (INITS.index(i) if i in INITS else len(INITS), i))
    def cell(arch, init):
        median, spread, n = summary(map(headline, table.get((stage, arch, init), {}).values()))
        spread = "" if spread is None else f" ± {spread:.3f}"
        return f"{number(median)}{spread} (n = {n})" if n else "missing"
    return ["", *inits], [[arch, *(cell(arch, init) for init in inits)] for arch in archs]


def capacity_table(table):
    """(head, rows): fine-tuned score by number of parameters, random init and ImageNet's where there is."""
    rows = []
    for (stage, arch, init), by_seed in table.items():
        if stage == "finetune":
            median, spread, n = summary(map(headline, by_seed.values()))
            millions = next(iter(by_seed.values())).get("parameters", 0) / 1e6
            rows.append([arch, init, f"{millions:.1f}", number(median), number(spread), n])
    return ["", "init", "million parameters", "median", "standard deviation", "n"], sorted(
        rows, key=lambda row: (row[1], float(row[2])))


def pair_table(table):
    """(head, rows): ViT minus CNN by stage and init."""
    rows = []
    for stage, (vit, cnn), init in itertools.product(STAGES, PAIRS, INITS):
        result = paired_difference(table.get((stage, vit, init), {}), table.get((stage, cnn, init), {}))
        if result:
            rows.append([STAGES[stage], f"{vit} - {cnn}", init, f"{result[0]:+.3f}",
                         f"{result[1][0]:+.3f} to {result[1][1]:+.3f}", result[2]])
    return ["", "pair", "init", "difference", "95 % interval", "seeds"], rows


# ---------------------------------------------------------------- figures -----------------------------------

def figures(runs, table, metric, output):
    """Draw or copy the paper's five figures; returns [(file or None, caption)], None where no run has it."""
    made, panels = [], []
    for stage in ("finetune", "knn_eval"):
        inits = [init for init in INITS if any(key[0] == stage and key[2] == init for key in table)]
        archs = sorted({arch for s, arch, _ in table if s == stage}, key=vits_last)
        series = []
        for i, arch in enumerate(archs):
            stats = [summary(map(headline, table.get((stage, arch, init), {}).values())) for init in inits]
            series.append({"label": arch, "kind": "bars", "colour": i, "x": range(len(inits)),
                           "y": [s[0] for s in stats], "error": [s[1] for s in stats]})
        if inits:
            panels.append({"title": STAGES[stage], "xlabel": "init", "ylabel": f"test {metric}",
                           "xnames": inits, "series": series})
    if panels:
        common.draw_plot(output / "figure1.png", panels, size=(560, 480))
    made.append(("figure1.png" if panels else None, (
        f"Figure 1. Test {metric} by init, median over seeds; error bars are one standard deviation, where "
        "there are several seeds.")))

    def copied(stage, name, number, caption):
        sources = [run["folder"] / name for run in runs if run["stage"] == stage]
        source = next((path for path in sources if path.exists()), None)
        if source is None and stage == "segment":
            source = min((path for run in runs for path in run["folder"].parent.glob(name)), default=None)
        if source:
            shutil.copy(source, output / f"figure{number}.png")
        made.append((f"figure{number}.png" if source else None, f"Figure {number}. {caption}"))

    copied("segment", "comparison*.png", 2,
           "Segmentation on test images: the truth in yellow, one model in blue, the other in red.")
    points = defaultdict(list)
    for (stage, arch, init), by_seed in table.items():
        median, spread, n = summary(map(headline, by_seed.values()))
        if stage == "finetune" and n and init in ("random", "dino", "imagenet"):
            kind = "ViT" if vits_last(arch)[0] else "CNN"
            millions = next(iter(by_seed.values())).get("parameters", 0) / 1e6
            points[f"{kind}, {init}"].append((millions, median, spread))
    lines = [{"label": label, **dict(zip(("x", "y", "error"), zip(*sorted(where))))}
             for label, where in sorted(points.items())]
    if lines:
        common.draw_plot(output / "figure3.png", [{"title": "capacity", "xlabel": "million parameters",
                                                   "ylabel": f"test {metric}", "series": lines}], (720, 480))
    made.append(("figure3.png" if lines else None,
                 f"Figure 3. Test {metric} of fine-tuned models against capacity."))
    copied("saliency", "saliency.png", 4,
           "Where the models look: Grad-CAM of the CNN, attention of the ViT, on the same test images.")
    copied("attn_distance", "attn_distance.png", 5,
           "Mean attention distance by block, a point per head; the dashed line is uniform attention.")
    return made


# ---------------------------------------------------------------- writing -----------------------------------

def as_markdown(head, rows):
    """A table in Markdown."""
    return "\n".join(["| " + " | ".join(map(str, head)) + " |", "|" + "---|" * len(head),
                      *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def as_html(head, rows):
    """A table in HTML."""
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}th,td{padding:.25rem .7rem;
text-align:right;border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}
img{max-width:100%}figure{margin:1.5rem 0}figcaption{color:#555}.warn{color:#a33}code{font-size:.85em}"""


def write_report(output, title, sections, made):
    """report.md and report.html from [(heading, paragraphs and tables)]; a table is (head, rows)."""
    text, page = [f"# {title}"], [f"<h1>{html.escape(title)}</h1>"]
    for heading, parts in [*sections, ("Figures", [])]:
        text.append(f"## {heading}")
        page.append(f"<h2>{html.escape(heading)}</h2>")
        for part in parts:
            text.append(as_markdown(*part) if isinstance(part, tuple) else part)
            page.append(as_html(*part) if isinstance(part, tuple) else f"<p>{html.escape(part)}</p>")
    for name, caption in made:
        text.append(f"![{caption}]({name})\n\n{caption}" if name else f"{caption} *Missing: no run has it.*")
        image, caption = "", html.escape(caption)
        if name:
            data = base64.b64encode((output / name).read_bytes()).decode()
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        missing = "" if name else " Missing: no run has it."
        page.append(f"<figure>{image}<figcaption>{caption}{missing}</figcaption></figure>")
    common.write_atomic(output / "report.md", lambda part: part.write_text("\n\n".join(text) + "\n"))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    common.write_atomic(output / "report.html", lambda part: part.write_text(
        '<!doctype html><html lang="en">' + head + "\n".join(page) + "</html>\n"))


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
    output.mkdir(parents=True, exist_ok=True)

    groups = defaultdict(list)
    for run in runs:
        if run["stage"] in STAGES:
            groups[setting(run)].append(run)
    by_size = sorted(groups.items(), key=lambda item: -len(item[1]))
    classification = [item for item in by_size if any(run["stage"] != "segment" for run in item[1])]
    shown = (classification or by_size or [((None,) * 4, [])])[0][0]
    sections = []
    for (dataset, split, size, metric), members in by_size:
        table = cells(members)
        count = members[0]["counts"]["test"]
        parts = [f"{count} test images, image size {size}, split {split}; headline: {metric}."]
        for stage, name in STAGES.items():
            if any(key[0] == stage for key in table):
                parts += [f"{name}: median ± standard deviation over seeds", score_table(table, stage)]
        if any(key[0] == "finetune" for key in table):
            parts += ["Capacity", capacity_table(table)]
        pairs = pair_table(table)
        parts += ["ViT minus CNN, paired by seed", pairs] if pairs[1] else []
        if any(key[0] != "segment" for key in table):
            parts.append((["question", "what these runs say"], answers(table)))
        sections.append((f"{dataset}, {metric}", parts))
    if len(classification) > 1:
        sections.insert(0, ("Runs that do not belong together", [
            "These runs differ in dataset, split, image size or headline metric. They are tabulated apart "
            f"and never averaged; the figures show {shown[0]}, image size {shown[2]}, {shown[3]}."]))
    made = figures(runs, cells(groups.get(shown, [])), shown[3], output)

    names = ["stage", "dataset", "arch", "init", "seed", "metric"]
    extra = ["image_size", "split", "parameters", "epochs", "seconds", "images_per_second"]
    rows = [[str(run["folder"]), *(run[name] for name in names), run["val"].get(run["metric"]),
             headline(run) if run["stage"] in STAGES else None, *(run["test"].get("interval") or ["", ""]),
             *(run.get(name) for name in extra)] for run in runs]
    common.write_table(output / "results.csv", ["run", *names, "val", "test", "low", "high", *extra], rows)
    states = [[run["folder"].name, run["stage"], "; ".join(health(run)) or "complete",
               number(run.get("seconds"), 0)] for run in runs]
    states += [[folder.name, "", trouble, "-"] for folder, trouble in troubles]
    sections.append(("Health of each run", [(["run", "stage", "state", "seconds"], states)]))
    packages = runs[0]["args"].get("versions", {}) if runs else {}
    sections.append(("Commands and versions", [
        ", ".join(f"{name} {version}" for name, version in packages.items()),
        (["run", "command"], [[run["folder"].name, run["args"].get("command", "")] for run in runs])]))
    write_report(output, f"{shown[0] or 'Runs'}: a pretrained ViT, or a CNN?", sections, made)
    for (dataset, _, _, metric), members in by_size:
        for stage, name in STAGES.items():
            head, body = score_table(cells(members), stage)
            if body:
                common.print_table([f"{dataset} {name} ({metric})", *head[1:]], body)
                say("")
    for folder, trouble in troubles:
        print(f"note: {folder}: {trouble}", file=sys.stderr)
    drawn = sum(name is not None for name, _ in made)
    say(f"written: {output}/report.html, report.md, results.csv and {drawn} of 5 figures")


if __name__ == "__main__":
    common.launch(main)
