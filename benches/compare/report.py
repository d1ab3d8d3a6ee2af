"""Tables, JSON and plots from the results."""
import json
import os
import platform
import re
import statistics
import subprocess
import time

UNITS = {"us": "µs", "us/load": "µs/load"}
SPEEDS = ("ns", "us", "ms", "us/load", "1/s", "MB", "bytes")      # units of which less or more is plainly better
NOISE_MB = 8                                                      # a growth below this is the allocator's and chance


def number(value):
    if value is None:
        return "–"
    if value == 0:
        return "0"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}".replace(",", "\u202f")


def cell(values):
    """Median and spread (half the distance between the outermost rounds, in percent of the median)."""
    if not values:
        return "–"
    middle = statistics.median(values)
    spread = (max(values) - min(values)) / 2 / middle * 100 if middle and len(values) > 1 else None
    return number(middle) + (f" ±{spread:.0f}%" if spread is not None else "")


def median(result, key):
    values = result["values"].get(key)
    return statistics.median(values) if values else None


def ratio(result, key="rs/rs", base="zeo/zeo"):
    """How many times better than the peer: above 1 is better whatever the unit."""
    ours, theirs = median(result, key), median(result, base)
    if not ours or not theirs or result["unit"] not in SPEEDS:
        return None
    # Of next to nothing anything is many times as much.
    if result["unit"] == "MB" and (max(ours, theirs) < NOISE_MB or min(ours, theirs) < 1):
        return None
    return ours / theirs if result["better"] == "higher" else theirs / ours


def distance(result, key="rs/rs"):
    """How many times worse than the machine's limit."""
    ours, limit = median(result, key), result.get("limit")
    if not ours or not limit:
        return None
    return limit / ours if result["better"] == "higher" else ours / limit


def line(result):
    parts = [f"{key} {cell(values)}" for key, values in result["values"].items()]
    if (r := ratio(result, *_columns(result))) is not None:
        parts.append(f"ratio {r:.1f}")
    if result.get("limit"):
        parts.append(f"limit {number(result['limit'])}")
    return f"{result['name']} [{UNITS.get(result['unit'], result['unit'])}]: " + ", ".join(parts)


def _columns(result):
    """Our column and the peer's."""
    if any("/" in key for key in result["values"]):
        return "rs/rs", "zeo/zeo"
    return "rs", ("zodb" if "zodb" in result["values"] else "zeo")


def environment(options):
    def output(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except OSError:
            return ""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None
    with open("/proc/cpuinfo") as f:
        cpus = [row.split(":", 1)[1].strip() for row in f if row.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": output("git", "-C", os.path.dirname(__file__), "rev-parse", "--short", "HEAD"),
        "cpu": f"{len(cpus)} x {cpus[0] if cpus else '?'}", "kernel": platform.release(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "packages": {name: installed(name) for name in ("zeo-rs", "ZODB", "ZEO", "msgpack", "uvloop", "zodbpickle", "RelStorage", "psycopg2-binary")},
        "options": {k: v for k, v in vars(options).items() if k not in ("data", "out")},
    }


def markdown(env, results):
    packages = ", ".join(f"{k} {v}" for k, v in env["packages"].items() if v)
    out = ["# Measured beside the peers", "",
           f"Made by `scripts/bench` on {env['date']}, commit {env['commit']}: {env['cpu']}, {env['memory_gb']} GB,"
           f" Linux {env['kernel']}, Python {env['python']}, {packages}. Load average before the run:"
           f" {env['load_before']:.1f}. {env.get('options', {}).get('note', '')}".rstrip(), "",
           "`a/b` is client a with server b. Medians of the rounds with half the distance between the outermost rounds."
           " The ratio says how many times better zeo-rs is than its peer; the limit is the machine's own for the same"
           " bytes, measured in the same run, and the last column says how many times the limit zeo-rs needs."
           " [How it is measured](../benchmarking.md).", ""]
    for family in dict.fromkeys(r["family"] for r in results):
        rows = [r for r in results if r["family"] == family]
        keys = list(dict.fromkeys(k for r in rows for k in r["values"])) or ["zeo/zeo", "rs/rs"]
        order = ["zodb", "zeo", "zeo/zeo", "rs/rs", "rs", "zeo/rs", "rs/zeo", "relstorage/postgresql", "zodb/in-process"]
        keys.sort(key=lambda k: order.index(k) if k in order else len(order))
        out += [f"## {family}", "", "| what | unit | " + " | ".join(keys) + " | ratio | target | limit | of limit |",
                "| --- | --- |" + " ---: |" * len(keys) + " ---: | --- | ---: | ---: |"]
        for r in rows:
            cells = [cell(r["values"].get(k)) if k in r["values"] else "failed" if k in r["errors"] else "" for k in keys]
            rate, far = ratio(r, *_columns(r)), distance(r, _columns(r)[0])
            out.append("| " + " | ".join([
                r["name"], UNITS.get(r["unit"], r["unit"]), *cells, f"{rate:.1f}×" if rate else "", r["target"],
                number(r["limit"]) if r["limit"] else "", f"{far:.1f}×" if far else ""]) + " |")
        notes = dict.fromkeys(f"{r['name']}: {r['note']}." for r in rows if r["note"])
        failures = dict.fromkeys(f"{r['name']}, {k}: {e}." for r in rows for k, e in r["errors"].items())
        out += [""] + [f"- {text}" for text in (*notes, *failures)] + ([""] if notes or failures else [])
    return "\n".join(out).rstrip() + "\n"


def plots(directory, results):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"svg.hashsalt": "zeo-rs", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    _ratios(plt, directory, results)
    for name, title, unit in ((r"cold loads, (\d+) process(es)?", "Cold loads by client processes", "loads a second"),
                              (r"(\d+) committers?, disjoint", "One-object commits by committers", "commits a second")):
        _scaling(plt, directory, results, name, title, unit)
    _tails(plt, directory, results)


def _save(plt, figure, directory, name):
    figure.tight_layout()
    for kind in ("png", "svg"):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(os.path.join(directory, f"{name}.{kind}"), dpi=130, metadata=metadata)
    plt.close(figure)


def _ratios(plt, directory, results):
    import matplotlib.ticker
    rows = [(f"{r['name']}", ratio(r, *_columns(r))) for r in results]
    rows = [(name, value) for name, value in rows if value]
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(10, 0.8 + 0.22 * len(rows)))
    names, values = zip(*reversed(rows))
    axes.set_yticks(range(len(rows)), names)                  # by place: two families may use one name
    axes.barh(range(len(rows)), [v - 1 for v in values], left=1, height=0.7, color=["#2a7f62" if v >= 0.95 else "#b5482f" for v in values])
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    for place, value in enumerate(values):
        axes.annotate(f"{value:.1f}", (value, place), xytext=(4 if value >= 1 else -4, 0), textcoords="offset points",
                      va="center", ha="left" if value >= 1 else "right", fontsize=8)
    axes.set_xlim(min(0.7, min(values) / 1.5), max(values) * 1.7)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_title("How many times better than its peer zeo-rs is", fontsize=10)
    _save(plt, figure, directory, "ratios")


def _scaling(plt, directory, results, pattern, title, unit):
    series = {}
    for r in results:
        if match := re.fullmatch(pattern, r["name"]):
            for key in ("zeo/zeo", "rs/rs"):
                if r["values"].get(key):
                    series.setdefault(key, []).append((int(match[1]), r["values"][key]))
    if not any(len(points) > 1 for points in series.values()):
        return
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for (key, points), colour in zip(series.items(), ("#777777", "#2a7f62")):
        middle = [statistics.median(v) for _, v in points]
        spread = [[m - min(v) for m, (_, v) in zip(middle, points)], [max(v) - m for m, (_, v) in zip(middle, points)]]
        axes.errorbar([c for c, _ in points], middle, spread, label={"zeo/zeo": "ZEO 6.2", "rs/rs": "zeo-rs"}[key],
                      color=colour, marker="o", capsize=3)
    axes.set_ylim(0)
    axes.set_xlabel("client processes")
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.legend(frameon=False)
    _save(plt, figure, directory, title.lower().replace(" ", "-"))


def _tails(plt, directory, results):
    rows = [r for r in results if r["family"] == "tails" and r["name"].endswith(" p99")]
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(8.5, 3.6))
    names = [r["name"].removeprefix("load ").removesuffix(" p99") for r in rows]
    for offset, key, colour in ((-0.2, "zeo/zeo", "#777777"), (0.2, "rs/rs", "#2a7f62")):
        axes.bar([i + offset for i in range(len(rows))], [median(r, key) or 0 for r in rows], 0.38,
                 label={"zeo/zeo": "ZEO 6.2", "rs/rs": "zeo-rs"}[key], color=colour)
    axes.set_xticks(range(len(rows)), names)
    axes.set_yscale("log")
    axes.set_ylabel("p99 of a cold load, µs")
    axes.legend(frameon=False)
    _save(plt, figure, directory, "tails")


def merged(old, new):
    """New results in the places of the old ones of the same name, others behind their family."""
    replaced = {(r["family"], r["name"]): r for r in new}
    both = [replaced.pop((r["family"], r["name"]), r) for r in old] + list(replaced.values())
    order = list(dict.fromkeys(r["family"] for r in both))
    return sorted(both, key=lambda r: order.index(r["family"]))


def write(directory, env, results, update=False, name="results"):
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, f"{name}.json")
    if update and os.path.exists(path):
        with open(path) as f:
            results = merged(json.load(f)["results"], results)
    with open(path, "w") as f:
        json.dump({"environment": env, "results": results}, f, indent=1)
        f.write("\n")
    text = markdown(env, results)
    with open(os.path.join(directory, f"{name}.md"), "w") as f:
        f.write(text)
    plots(directory, results)
    return text
