#!/usr/bin/python3
"""scripts/fs/plot.py FILE: draws what `bench-fs --json` prints, from stdin, as .svg or .png.

Each operation has a panel for each state. A bar is a system's time as a ratio to ext4, with the first number of threads. A
mark is the same with another number of threads.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from plots import BLUES, FAINT, GREY, GREYS, INK, LIMIT, bare, headings, main, ordered

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

OCIFS = {"ocifs-fuse": BLUES[1], "ocifs-erofs": BLUES[3]}
TITLES = {
    "walk": "walk the tree",
    "stat": "stat all paths",
    "small-reads": "read the small files",
    "all-reads": "read all files",
    "random-4k": "read 4 KiB at random places",
    "mmap": "map and touch the larger files",
}
STATES = {"warm": "warm", "cold-local": "caches dropped"}
# Longer bars are cut here, with a gap that shows it. The ratio is written beside each bar.
LONGEST = 2.5


def draw(rows):
    rows = [row for row in rows if "ratio_to_ext4" in row and row["system"] != "ext4"]
    if not rows:
        sys.exit("plot.py: no ratios of other systems to ext4")
    ops, systems = ordered(rows, lambda row: row["op"]), ordered(rows, lambda row: row["system"])
    threads, *more_threads = sorted({row["threads"] for row in rows})
    rivals = [system for system in systems if system not in OCIFS]
    colour = OCIFS | {system: GREYS[place % len(GREYS)] for place, system in enumerate(rivals)}
    ratios = {(row["op"], row["state"], row["system"], row["threads"]): row["ratio_to_ext4"] for row in rows}
    height = len(ops) * (0.62 + 0.235 * len(systems)) + 1.2
    figure, grid = plt.subplots(len(ops), len(STATES), figsize=(10.4, height), squeeze=False)
    for line, op in zip(grid, ops):
        for axes, state in zip(line, STATES):
            for place, system in enumerate(systems):
                ratio = ratios[op, state, system, threads]
                axes.barh(place, min(ratio, LONGEST), height=0.8, color=colour[system])
                if ratio > LONGEST:
                    axes.plot([LONGEST - 0.14, LONGEST - 0.06], [place + 0.45, place - 0.45], color="white", linewidth=2)
                marks = [ratios[op, state, system, more] for more in more_threads]
                axes.plot([min(mark, LONGEST) for mark in marks], [place] * len(marks), linestyle="", marker="D", markersize=4,
                          color="white", markeredgecolor=INK, markeredgewidth=0.8, clip_on=False)
                text = " / ".join(f"{value:.2f}" for value in [ratio, *marks])
                axes.text(min(max([ratio, 1, *marks]), LONGEST) + 0.06, place,
                          text if system in OCIFS else f"{text}  {system}",
                          va="center", fontsize=8, color=INK if system in OCIFS else GREY)
            axes.set_ylim(len(systems) - 0.4, -0.6)
            axes.set_xlim(0, LONGEST * 1.5)
            axes.plot([1, 1], [-0.55, len(systems) - 0.45], color=LIMIT, linewidth=1.6, solid_capstyle="butt")
            axes.set_title(f"{TITLES[op]}, {STATES[state]}", loc="left", fontsize=11, fontweight="bold", color=INK, pad=5)
            axes.set_xticks([])
            axes.set_yticks([])
            bare(axes)
            axes.axvline(0, color=FAINT, linewidth=0.8)
    handles = [Patch(color=colour[system], label=system) for system in systems if system in OCIFS]
    handles.append(Line2D([], [], color=LIMIT, linewidth=1.6, label="ext4"))
    if more_threads:
        handles.append(Line2D([], [], linestyle="", marker="D", markersize=4, color="white", markeredgecolor=INK, markeredgewidth=0.8,
                              label=f"{', '.join(map(str, more_threads))} threads"))
    headings(figure, "Time of file system operations on local data, as a ratio to ext4", handles, 5, height, handlelength=1.1)
    figure.subplots_adjust(left=0.03, right=0.985, top=1 - 1.2 / height, bottom=0.15 / height, wspace=0.06,
                           hspace=0.42 / (0.2 + 0.235 * len(systems)))
    return figure


if __name__ == "__main__":
    main(__doc__, draw)
