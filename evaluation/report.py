"""The report of an evaluation: figures with their standard errors out of scores/, totals or why there are none."""

import math
from collections import defaultdict

from evaluation import vbench
from evaluation.folder import files_of
from evaluation.ledger import Ledger
from training.files import read_json


def collect(out, record, videos):
    """results.json as a dict, from an evaluation's scores/. videos: those that it is to be of, see folder.py."""
    items, found = videos.items, videos.files
    folder, dimensions, values = out / "scores", {}, {}
    rows, own = Ledger(folder, "proxies", "prompt", None).rows(), {}
    for item in items:
        row = rows.get(item["prompt"])
        if row and row["files"] == {file: found[file] for file in item["files"] if file in found}:
            own[item["prompt"]] = row
    flicker = {file: value for row in own.values() for file, value in zip(row["files"], row["flicker"])}
    for name in vbench.DIMENSIONS:
        path, files = folder / f"{name}.json", files_of(name, items, found)
        wanted = len(files_of(name, record["items"], None))
        scored = read_json(path) if path.is_file() else {"reason": "score has not been run on it"}
        if "raw" in scored and scored["videos"] != vbench.short_hash([record["hash"], sorted(files.items())]):
            scored = {"reason": "it was scored on other videos: run score again"}
        if "raw" not in scored and name == "temporal_flickering" and files and files.keys() <= flicker.keys():
            each = {file: flicker[file] for file in files}
            scored = {"raw": sum(each.values()) / len(each), "values": each, "by": "eval_vbench.py"}
        if "raw" not in scored:
            dimensions[name] = {"reason": scored["reason"], "expected": wanted}
            continue
        of_prompt = defaultdict(list)
        for file, value in scored["values"].items():
            of_prompt[file.rpartition("-")[0]].append(value)
        values[name] = of_prompt
        dimensions[name] = {
            "raw": scored["raw"], "normalised": vbench.normalise(name, scored["raw"]), "n": len(scored["values"]),
            "expected": wanted, "by": scored.get("by", "VBench"), "versions": scored.get("versions"),
        }  # fmt: skip
    errors, errors_of_totals = vbench.bootstrap(values) if values else ({}, None)
    for name, error in errors.items():
        dimensions[name]["standard_error"] = error
    of_vbench = {name: row["raw"] for name, row in dimensions.items() if row.get("by") == "VBench"}
    totals = vbench.aggregate(of_vbench)  # nothing of ours is in them
    withheld = next((why for why, so in {
        "the prompts are not VBench's list": not record["vbench_list"],
        "the set is PARTIAL": videos.partial,
        "the list is not that of vbench 0.1.5": record["vbench_list"] != vbench.OFFICIAL,
        "VBench wants 5 samples of each prompt": record["config"]["samples"] < 5,
        f"VBench has not scored {len(dimensions) - len(of_vbench)} of 16 dimensions": totals is None,
    }.items() if so), None)  # fmt: skip
    names = ("Quality", "Semantic", "Total")
    proxies = defaultdict(dict)
    for prompt, row in own.items():
        for name, value in row["values"].items():
            proxies[f"proxy/{name}"][prompt] = [value]
    spread, _ = vbench.bootstrap(proxies) if proxies else ({}, None)
    return {
        "partial": videos.partial, "videos": len(found), "expected": videos.expected, "dimensions": dimensions,
        "totals": {"withheld": withheld} if withheld else {
            name: {"value": value, "standard_error": error}
            for name, value, error in zip(names, totals, errors_of_totals or [math.nan] * 3)
        },
        "proxies": {
            name: {
                "value": sum(v[0] for v in each.values()) / len(each), "standard_error": spread[name],
                "n": len(each), "expected": videos.prompts,
            } for name, each in proxies.items()
        },
        **{key: value for key, value in record.items() if key != "items"},
        "bootstrap": "standard deviation of 1000 resamplings of the prompts, each with all of its samples",
    }  # fmt: skip


def figure(row, key="raw", digits=4):
    """A cell: the figure, its standard error where there is one; or why there is none."""
    if row is None or key not in row:
        return "" if row is None else f"not run: {row['reason']}"
    error = row.get("standard_error", math.nan)
    return f"{row[key]:.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def noise_verdict(difference, error):
    """Words for a difference of Totals, in points: a standard error and what re-encoding can move are no difference."""
    error = error if math.isfinite(error) else 0.0
    inside = abs(difference) <= error + vbench.NOISE
    return f"{difference:+.2f}, {'inside' if inside else 'beyond'} the standard error ({error:.2f}) plus {vbench.NOISE}"


def markdown(results, other):
    """results.md. other: results of --compare, or None."""
    return "\n".join([
        *heading(results), *weight_free(results, other), *dimensions(results, other, list(results["dimensions"])),
        "temporal_flickering is over all samples, without VBench's optional filter for static videos.", "",
        *totals(results, other),
    ])  # fmt: skip


def summary(results, other):
    """What of results.md was measured, and in one line what was not."""
    measured = [name for name, row in results["dimensions"].items() if "raw" in row]
    lines, withheld = heading(results) + weight_free(results, other), results["totals"].get("withheld")
    lines += dimensions(results, other, measured) if measured else []
    lines += [] if withheld else totals(results, other)
    missing = len(results["dimensions"]) - len(measured)
    lines += [f"{missing} of VBench's 16 dimensions were not run; results.md has the reasons."] if missing else []
    return "\n".join(lines + ([f"No totals: {withheld}."] if withheld and not missing else []))


def heading(results):
    config, partial = results["config"], " (PARTIAL)" if results["partial"] else ""
    named = "VBench's prompts" if results["vbench_list"] else "not VBench's prompts"
    return [
        f"# VBench of a {config['role']}{partial}", "",
        f"{results['videos']} of {results['expected']} videos, {named}, {config['samples']} samples a prompt, base "
        f"seed {config['seed']}. {config['script']}, checkpoint {config['checkpoint']}, teacher {config['teacher']}, "
        f"text encoder {config['text_encoder']}, {config['nfe']} network evaluations, {config['frames']} x "
        f"{config['height']} x {config['width']} at {config['fps']} fps, libx264 crf {config['video']['crf']}. "
        f"Configuration {results['hash']}, revision {results['revision']}.", "",
    ]  # fmt: skip


def weight_free(results, other):
    """Our metrics, a table."""
    partial, against = " (PARTIAL)" if results["partial"] else "", f" {other['config']['role']} |" if other else ""
    lines = [f"| weight-free{partial} | mean over prompts | n of expected |{against}"]
    lines += ["|---|---:|---:|" + ("---:|" if other else "")]
    for name, row in results["proxies"].items():
        cells = [name, figure(row, "value"), f"{row['n']} of {row['expected']}"]
        lines.append(f"| {' | '.join(cells + ([figure(other['proxies'].get(name), 'value')] if other else []))} |")
    return [*lines, "", "The proxies are ours; no Total contains them. ± is one standard error, by prompt.", ""]


def dimensions(results, other, names):
    """VBench's dimensions of these names, a table."""
    partial, against = " (PARTIAL)" if results["partial"] else "", f" {other['config']['role']} |" if other else ""
    lines = [f"| dimension | raw{partial} | normalised | n of expected | by |{against}"]
    lines += ["|---|---|---:|---:|---|" + ("---|" if other else "")]
    for name in names:
        row = results["dimensions"][name]
        normalised = f"{row['normalised']:.4f}" if "raw" in row else ""
        cells = [name, figure(row), normalised, f"{row.get('n', 0)} of {row['expected']}", row.get("by", "")]
        lines.append(f"| {' | '.join(cells + ([figure(other['dimensions'][name])] if other else []))} |")
    return [*lines, ""]


def totals(results, other):
    """Totals of this evaluation, of --compare and of papers, a table."""
    lines = [
        "| Totals, % | Quality | Semantic | Total | source | this Total minus it |",
        "|---|---:|---:|---:|---|---|",
    ]
    own, rows = results["totals"], [("this evaluation", results["totals"], f"configuration {results['hash']}")]
    if other:
        rows.append((f"--compare, {other['config']['role']}", other["totals"], f"configuration {other['hash']}"))
    for label, quality, semantic, total, source in vbench.PUBLISHED:
        given = {"Quality": quality, "Semantic": semantic, "Total": total}
        rows.append((label, {k: {"value": v} for k, v in given.items() if v is not None}, source))
    for label, points, source in rows:
        cells = [
            figure(points[k], "value", 2) if k in points else "not in our notes"
            for k in ("Quality", "Semantic", "Total")
        ]
        if "withheld" in points:
            cells = [f"withheld: {points['withheld']}", "", ""]
        verdict = ""
        if points is not own and "Total" in own and "Total" in points:
            errors = [t["Total"].get("standard_error", 0.0) for t in (own, points)]
            verdict = noise_verdict(own["Total"]["value"] - points["Total"]["value"], math.hypot(*errors))
        lines.append(f"| {' | '.join([label, *cells, source, verdict])} |")
    return [*lines, "", vbench.PUBLISHED_NOTE, ""]
