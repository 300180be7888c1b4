"""Tables, figures and plain answers out of finished runs.

    python report.py runs/demo                      # every run below a folder, into runs/demo/report
    python report.py runs/a runs/b --output report

Reads the metrics.json of any run folder, whoever wrote it; writes report.md, results.csv, figure1.png to figure5.png
(those of Matsoukas et al. 2023) and report.html, one page that needs no server. Runs on another dataset, split or
image size are kept apart; a missing cell is shown as missing; a damaged or incomplete run is listed.
"""
import argparse
import base64
import csv
import html
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


# ---------------------------------------------------------------- reading -------------------------------------

def read_runs(places):
    """(runs, troubles): every complete run under the places, each with "folder", and (folder, what is wrong)."""
    runs, troubles, seen = [], [], set()
    for place in places:
        if not Path(place).is_dir():
            fail(f"{place}: there is no such folder of runs")
        for args_file in sorted(Path(place).rglob("args.json")):
            folder = args_file.parent
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            if not (folder / "metrics.json").exists():
                troubles.append((folder, "incomplete: no metrics.json"))
                continue
            try:
                content = json.loads((folder / "metrics.json").read_text())
                args = json.loads(args_file.read_text())
                needed = {"stage", "dataset", "arch", "init", "seed", "metric", "val", "test"}
                if not isinstance(content, dict) or needed - content.keys():
                    raise ValueError(f"lacks {', '.join(sorted(needed - content.keys()))}")
            except (ValueError, OSError, AttributeError) as error:
                troubles.append((folder, f"metrics.json cannot be used: {error}"))
                continue
            runs.append({**content, "folder": folder, "args": args})
    if not runs and not troubles:
        fail(f"{', '.join(map(str, places))}: no run folders (with args.json) in there")
    return runs, troubles


def setting(run):
    """What two runs must share to be put into one table."""
    return (run["dataset"], run.get("split"), run.get("image_size"), run["metric"])


def health(run):
    """What a reader should know before trusting a run, [] if nothing."""
    notes = []
    if run.get("collapse"):
        notes.append(run["collapse"].split(";")[0])
    for key, count in (run.get("leakage") or {}).items():
        if count:
            notes.append(f"leakage: {count} images {key.replace('_', ' ')}")
    if run["test"].get("undefined"):
        notes.append(f"not in the test split: {', '.join(run['test']['undefined'])}")
    return notes


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


# ---------------------------------------------------------------- statistics ----------------------------------

def summary(values):
    """(median, standard deviation or None for one value, n) of the values that are defined."""
    defined = [value for value in values if value is not None]
    if not defined:
        return None, None, 0
    return float(np.median(defined)), float(np.std(defined, ddof=1)) if len(defined) > 1 else None, len(defined)


def read_predictions(run):
    """{path: (label, scores (C,))} of a run's predictions.csv, and its classes; ({}, []) if it has none."""
    file = run["folder"] / "predictions.csv"
    if not file.exists():
        return {}, []
    with open(file, newline="") as lines:
        head, *rows = list(csv.reader(lines))
    return ({row[0]: (row[1], np.array(row[3:], float)) for row in rows}, head[3:]) if head[1:2] == ["label"] else ({}, [])


def paired_difference(first, second, resamples=500):
    """Mean over common seeds of headline(first) - headline(second): (difference, [low, high], seeds), None without a
    common seed. The 95 % interval resamples seeds and test images together; without predictions, seeds alone."""
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
    evidence = f"difference {difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, {seeds} seed" + "s" * (seeds > 1)
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
            result.append((question, f"{what}: " + (in_words(pair, better, worse) if pair else "no runs to tell")))

    for question, init in (("Does the ViT lose from scratch?", "random"),
                           ("Is the ViT on par from ImageNet weights?", "imagenet"),
                           ("And after DINO on the dataset's own images?", "dino")):
        compare(question, "finetune", "the ViT is better", "the ViT is worse",
                [((vit, init), (cnn, init), f"{vit} against {cnn}") for vit, cnn in pairs])
    dino = [((arch, "dino"), (arch, "random"), arch) for arch in sorted(archs) if ("finetune", arch, "dino") in table]
    dino += [((arch, "imagenet+dino"), (arch, "imagenet"), arch) for arch in sorted(archs)
             if ("finetune", arch, "imagenet+dino") in table]
    compare("Does DINO help fine-tuning?", "finetune", "it helps", "it hurts", dino)
    compare("Does DINO help k-NN?", "knn_eval", "it helps", "it hurts", dino)
    both = [(arch, init) for stage, arch, init in table if stage == "finetune" and ("knn_eval", arch, init) in table]
    scores = [[summary([headline(run) for run in table[stage, arch, init].values()])[0] for arch, init in both]
              for stage in ("finetune", "knn_eval")]
    pairs = [(i, j) for i in range(len(both)) for j in range(i) if None not in
             (scores[0][i], scores[0][j], scores[1][i], scores[1][j])]
    same = sum((scores[0][i] - scores[0][j]) * (scores[1][i] - scores[1][j]) > 0 for i, j in pairs)
    result.append(("Do k-NN and fine-tuning agree?", f"they rank {same} of {len(pairs)} pairs of models alike"
                   if pairs else "no runs to tell"))
    return result


# ---------------------------------------------------------------- tables --------------------------------------

def number(value, digits=3):
    """A number for a table; a dash where it is missing."""
    return "-" if value is None else f"{value:.{digits}f}"


def score_table(table, stage):
    """(head, rows): a row an architecture, a column an init: median ± standard deviation (n)."""
    archs = sorted({arch for s, arch, _ in table if s == stage}, key=lambda a: ("vit" in a or "deit" in a, a))
    inits = sorted({init for s, _, init in table if s == stage},
                   key=lambda i: (INITS.index(i) if i in INITS else len(INITS), i))
    rows = []
    for arch in archs:
        row = [arch]
        for init in inits:
            median, spread, n = summary([headline(run) for run in table.get((stage, arch, init), {}).values()])
            row.append("missing" if not n else number(median) + (f" ± {spread:.3f}" if spread is not None else "")
                       + f" (n = {n})")
        rows.append(row)
    return ["", *inits], rows


def capacity_table(table):
    """(head, rows): fine-tuned score by number of parameters, random init and ImageNet's where there is one."""
    rows = []
    for (stage, arch, init), by_seed in table.items():
        if stage == "finetune":
            median, spread, n = summary([headline(run) for run in by_seed.values()])
            millions = next(iter(by_seed.values())).get("parameters", 0) / 1e6
            rows.append([arch, init, f"{millions:.1f}", number(median), number(spread), n])
    return ["", "init", "million parameters", "median", "standard deviation", "n"], sorted(
        rows, key=lambda row: (row[1], float(row[2])))


def pair_table(table):
    """(head, rows): ViT minus CNN by stage and init."""
    rows = []
    for stage, name in STAGES.items():
        for vit, cnn in PAIRS:
            for init in INITS:
                result = paired_difference(table.get((stage, vit, init), {}), table.get((stage, cnn, init), {}))
                if result:
                    rows.append([name, f"{vit} - {cnn}", init, f"{result[0]:+.3f}",
                                 f"{result[1][0]:+.3f} to {result[1][1]:+.3f}", result[2]])
    return ["", "pair", "init", "difference", "95 % interval", "seeds"], rows


# ---------------------------------------------------------------- figures -------------------------------------

def figures(runs, table, metric, output):
    """Draw or copy the paper's five figures; returns [(file or None, caption)], None where no run has it."""
    made = []

    def series(stage, inits, archs):
        lines = []
        for i, arch in enumerate(archs):
            stats = [summary([headline(run) for run in table.get((stage, arch, init), {}).values()]) for init in inits]
            lines.append({"label": arch, "kind": "bars", "colour": i, "x": list(range(len(inits))),
                          "y": [s[0] for s in stats], "error": [s[1] for s in stats]})
        return lines

    panels = []
    for stage in ("finetune", "knn_eval"):
        inits = [init for init in INITS if any(key[0] == stage and key[2] == init for key in table)]
        archs = sorted({key[1] for key in table if key[0] == stage}, key=lambda a: ("deit" in a or "vit" in a, a))
        if inits:
            panels.append({"title": STAGES[stage], "xlabel": "init", "ylabel": f"test {metric}", "xnames": inits,
                           "series": series(stage, inits, archs)})
    if panels:
        common.draw_plot(output / "figure1.png", panels, size=(560, 480))
    made.append(("figure1.png" if panels else None, f"Figure 1. Test {metric} by init, median over seeds; error bars "
                                                    "are one standard deviation, where there are several seeds."))

    def copied(stage, name, target, caption):
        source = next((run["folder"] / name for run in runs if run["stage"] == stage and (run["folder"] / name).exists()),
                      None)
        if source is None and stage == "segment":
            source = next(iter(sorted({path for run in runs for path in run["folder"].parent.glob(name)})), None)
        if source:
            shutil.copy(source, output / target)
        made.append((target if source else None, caption))

    copied("segment", "comparison*.png", "figure2.png",
           "Figure 2. Segmentation on test images: the truth in yellow, one model in blue, the other in red.")
    points = defaultdict(list)
    for (stage, arch, init), by_seed in table.items():
        median, spread, n = summary([headline(run) for run in by_seed.values()])
        if stage == "finetune" and n and init in ("random", "dino", "imagenet"):
            kind = "ViT" if "vit" in arch or "deit" in arch else "CNN"
            points[f"{kind}, {init}"].append((next(iter(by_seed.values())).get("parameters", 0) / 1e6, median, spread))
    lines = [{"label": label, "x": [p[0] for p in sorted(where)], "y": [p[1] for p in sorted(where)],
              "error": [p[2] for p in sorted(where)]} for label, where in sorted(points.items())]
    if lines:
        common.draw_plot(output / "figure3.png", [{
            "title": "capacity", "xlabel": "million parameters", "ylabel": f"test {metric}", "series": lines}], (720, 480))
    made.append(("figure3.png" if lines else None, f"Figure 3. Test {metric} of fine-tuned models against capacity."))
    copied("saliency", "saliency.png", "figure4.png",
           "Figure 4. Where the models look: Grad-CAM of the CNN, attention of the ViT, on the same test images.")
    copied("attn_distance", "attn_distance.png", "figure5.png",
           "Figure 5. Mean attention distance by block, a point per head; the dashed line is uniform attention.")
    return made


# ---------------------------------------------------------------- writing -------------------------------------

def as_markdown(head, rows):
    """A table in Markdown."""
    return "\n".join(["| " + " | ".join(map(str, head)) + " |", "|" + "---|" * len(head),
                      *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def as_html(head, rows):
    """A table in HTML."""
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"  # noqa
    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}th,td{padding:.25rem .7rem;text-align:right;
border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}img{max-width:100%}figure{margin:1.5rem 0}
figcaption{color:#555}.warn{color:#a33}code{font-size:.85em}"""


def write_report(output, title, sections, made):
    """report.md and report.html from [(heading, paragraphs and tables)]; a table is (head, rows)."""
    text, page = [f"# {title}"], [f"<h1>{html.escape(title)}</h1>"]
    for heading, parts in sections:
        text.append(f"## {heading}")
        page.append(f"<h2>{html.escape(heading)}</h2>")
        for part in parts:
            text.append(as_markdown(*part) if isinstance(part, tuple) else part)
            page.append(as_html(*part) if isinstance(part, tuple) else f"<p>{html.escape(part)}</p>")
    text.append("## Figures")
    page.append("<h2>Figures</h2>")
    for name, caption in made:
        text.append(f"![{caption}]({name})\n\n{caption}" if name else f"{caption} *Missing: no run has it.*")
        image = ""
        if name:
            data = base64.b64encode((output / name).read_bytes()).decode()
            image = f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        page.append(f"<figure>{image}<figcaption>{html.escape(caption)}{'' if name else ' Missing: no run has it.'}"
                    "</figcaption></figure>")
    common.write_atomic(output / "report.md", lambda part: part.write_text("\n\n".join(text) + "\n"))
    common.write_atomic(output / "report.html", lambda part: part.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        + "\n".join(page) + "</html>\n"))


def main():
    """Read, tabulate, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    main_setting = (classification or by_size or [((None,) * 4, [])])[0][0]
    sections = []
    for (dataset, split, size, metric), members in by_size:
        table = cells(members)
        parts = [f"{members[0]['counts']['test']} test images, image size {size}, split {split}; headline: {metric}."]
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
            "These runs differ in dataset, split, image size or headline metric. They are tabulated apart and never "
            f"averaged; the figures show {main_setting[0]}, image size {main_setting[2]}, {main_setting[3]}."]))
    made = figures(runs, cells(groups.get(main_setting, [])), main_setting[3], output)

    rows = [[str(run["folder"]), run["stage"], run["dataset"], run["arch"], run["init"], run["seed"], run["metric"],
             run["val"].get(run["metric"]), headline(run) if run["stage"] in STAGES else None,
             *((run["test"].get("interval") or ["", ""])), run.get("image_size"), run.get("split"), run.get("parameters"),
             run.get("epochs"), run.get("seconds"), run.get("images_per_second")] for run in runs]
    common.write_table(output / "results.csv", ["run", "stage", "dataset", "arch", "init", "seed", "metric", "val", "test",
                                                "low", "high", "image_size", "split", "parameters", "epochs", "seconds",
                                                "images_per_second"], rows)
    states = [[run["folder"].name, run["stage"], "; ".join(health(run)) or "complete",
               number(run.get("seconds"), 0)] for run in runs]
    states += [[folder.name, "", trouble, "-"] for folder, trouble in troubles]
    sections.append(("Health of each run", [(["run", "stage", "state", "seconds"], states)]))
    packages = runs[0]["args"].get("versions", {}) if runs else {}
    sections.append(("Commands and versions", [
        ", ".join(f"{name} {version}" for name, version in packages.items()),
        (["run", "command"], [[run["folder"].name, run["args"].get("command", "")] for run in runs])]))
    write_report(output, f"{main_setting[0] or 'Runs'}: a pretrained ViT, or a CNN?", sections, made)
    for name, members in by_size:
        for stage in STAGES:
            head, body = score_table(cells(members), stage)
            if body:
                common.print_table([f"{name[0]} {STAGES[stage]} ({name[3]})", *head[1:]], body)
                say("")
    for folder, trouble in troubles:
        print(f"note: {folder}: {trouble}", file=sys.stderr)
    say(f"written: {output}/report.html, report.md, results.csv and {sum(bool(n) for n, _ in made)} of 5 figures")


if __name__ == "__main__":
    common.launch(main)
