#!/usr/bin/python3
"""scripts/coldstart/plot.py ready|links MAIN_LINK FILE: draws what `bench-coldstart --json` prints, from stdin, as .svg or .png.

ready: the time to ready of every workload, system and mode on the main link, with the limit.
links: the time to ready as a multiple of the limit, on every link.
"""

import collections
import json
import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from plots import BLUES, FAINT, GREENS, GREY, GREYS, INK, LIMIT, TEALS, VIOLET, bare, headings, ordered, save, words

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

# Colour and name of each system and mode that is ocifs.
OCIFS = {
    ("ocifs", "first-contact"): (BLUES[0], "ocifs, image never seen"),
    ("ocifs", "indexed"): (BLUES[1], "ocifs, image known"),
    ("ocifs", "profile"): (BLUES[2], "ocifs, start known"),
    ("ocifs", "all"): (BLUES[3], "ocifs, prefetching all"),
    ("ocifs", "index"): (TEALS[0], "ocifs, index published"),
    ("ocifs", "index-profile"): (TEALS[1], "ocifs, start published"),
    ("ocifs", "estargz"): (VIOLET, "ocifs, eStargz image"),
    ("ocifs-containerd", "first-contact"): (GREENS[0], "containerd with ocifs, never seen"),
    ("ocifs-containerd", "profile"): (GREENS[1], "containerd with ocifs, start known"),
}


def key(row):
    return row["system"], row["mode"]


def name(key):
    system, mode = key
    if key in OCIFS:
        return OCIFS[key][1]
    return system if mode == "lazy" else f"{system}, {mode}"


def colours(keys):
    rivals = [key for key in keys if key not in OCIFS]
    return {key: OCIFS[key][0] if key in OCIFS else GREYS[rivals.index(key) % len(GREYS)] for key in keys}


def seconds(value):
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def draw_ready(rows, link):
    rows = [row for row in rows if row["link"] == link]
    if not rows:
        sys.exit(f"plot.py: no results on {link}")
    keys, workloads = ordered(rows, key), ordered(rows, lambda row: row["workload"])
    colour = colours(keys)
    by_workload = collections.defaultdict(dict)
    for row in rows:
        by_workload[row["workload"]][key(row)] = row
    # Each workload has a scale of its own. On a common scale, slow systems would hide the fast ones.
    columns = 2 if len(workloads) > 1 else 1
    lines = math.ceil(len(workloads) / columns)
    ours = [k for k in keys if k in OCIFS]
    legend_columns = 4 if columns > 1 else 2
    legend = math.ceil((len(ours) + 1) / legend_columns)
    height = lines * (0.62 + 0.235 * len(keys)) + 0.9 + 0.3 * legend
    figure, grid = plt.subplots(lines, columns, figsize=(5.2 * columns, height), squeeze=False)
    for axes, workload in zip(grid.flat, workloads):
        present = [k for k in keys if k in by_workload[workload]]
        times = [by_workload[workload][k]["ready_s"] for k in present]
        limit = next((row["limit_s"] for row in by_workload[workload].values() if row["limit_s"] is not None), None)
        places = list(range(len(present)))
        axes.barh(places, times, height=0.8, color=[colour[k] for k in present])
        longest = max(times + [limit or 0])
        for place, time, k in zip(places, times, present):
            axes.text(
                max(time, limit or 0) + longest * 0.015 if limit and time < limit * 1.15 else time + longest * 0.015,
                place,
                seconds(time) if k in OCIFS else f"{seconds(time)}  {name(k)}",
                va="center",
                fontsize=8,
                color=INK if k in OCIFS else GREY,
            )
        axes.set_ylim(len(present) - 0.4, -0.6)
        axes.set_xlim(0, longest * 1.36)
        if limit is not None:
            axes.plot([limit, limit], [-0.55, len(present) - 0.45], color=LIMIT, linewidth=1.6, solid_capstyle="butt")
        axes.set_title(workload, loc="left", fontsize=11, fontweight="bold", color=INK, pad=5)
        if limit is not None:
            axes.set_title(f"limit {seconds(limit)} s", loc="right", fontsize=8, color=LIMIT, pad=5)
        axes.set_xticks([])
        axes.set_yticks([])
        bare(axes)
        axes.axvline(0, color=FAINT, linewidth=0.8)
    for axes in list(grid.flat)[len(workloads) :]:
        axes.set_visible(False)
    handles = [Patch(color=colour[k], label=name(k)) for k in ours] + [Line2D([], [], color=LIMIT, linewidth=1.6, label="limit")]
    headings(figure, f"Seconds from a cold host to ready, over {words(link)}", handles, legend_columns, height, handlelength=1.1)
    figure.subplots_adjust(left=0.03, right=0.985, top=1 - (1.05 + 0.22 * legend) / height, bottom=0.15 / height, wspace=0.06,
                           hspace=0.42 / (0.2 + 0.235 * len(keys)))
    return figure


def draw_links(rows, main):
    rows = [row for row in rows if row["limit_s"]]
    if not rows:
        sys.exit("plot.py: no results with a limit")
    links = sorted(ordered(rows, lambda row: row["link"]), key=rtt_and_rate)
    keys, workloads = ordered(rows, key), ordered(rows, lambda row: row["workload"])
    colour = colours(keys)
    columns = min(4, len(workloads))
    lines = math.ceil(len(workloads) / columns)
    legend = math.ceil(len(keys) / 4)
    height = lines * 2.5 + 1.15 + 0.3 * legend
    figure, grid = plt.subplots(lines, columns, figsize=(3.1 * columns, height), squeeze=False, sharex=True, sharey=True)
    for place, (axes, workload) in enumerate(zip(grid.flat, workloads)):
        for k in reversed(keys):
            found = {row["link"]: row["ready_s"] / row["limit_s"] for row in rows if key(row) == k and row["workload"] == workload}
            here = [link for link in links if link in found]
            axes.plot([links.index(link) for link in here], [found[link] for link in here], color=colour[k], marker="o",
                      markersize=4, linewidth=1.8 if k in OCIFS else 1.2)
        axes.axhline(1, color=LIMIT, linewidth=1.2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.set_xticks(range(len(links)), [words(link).replace(", ", "\n").replace(" Mbit/s", "\nMbit/s") for link in links],
                        fontsize=6.5)
        axes.set_xlim(-0.4, len(links) - 0.6)
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(axis="y", color="#d8dee4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_title(workload, loc="left", fontsize=11, fontweight="bold", color=INK, pad=5)
        bare(axes)
        axes.tick_params(which="minor", length=0)
        if place + columns >= len(workloads):
            axes.tick_params(labelbottom=True)
    for axes in list(grid.flat)[len(workloads) :]:
        axes.set_visible(False)
    handles = [Line2D([], [], color=colour[k], marker="o", markersize=4, label=name(k)) for k in keys]
    handles.append(Line2D([], [], color=LIMIT, linewidth=1.2, label="limit"))
    headings(figure, "Time to ready as a multiple of the limit, by link", handles, min(4, columns + 1), height)
    figure.subplots_adjust(left=0.55 / (3.1 * columns), right=0.99, top=1 - (1.05 + 0.22 * legend) / height, bottom=0.55 / height,
                           wspace=0.1, hspace=0.3)
    return figure


def rtt_and_rate(link):
    """Sort key of links: loopback first, then by round trip, then by rate."""
    if link == "loopback":
        return (0, 0)
    rtt, rate = link.removesuffix("mbit").split("ms-")
    return (float(rtt), float(rate))


def main():
    if len(sys.argv) != 4 or sys.argv[1] not in ("ready", "links"):
        sys.exit(__doc__)
    _, what, link, out = sys.argv
    rows = [json.loads(line) for line in sys.stdin]
    figure = (draw_ready if what == "ready" else draw_links)(rows, link)
    save(figure, out)


if __name__ == "__main__":
    main()
