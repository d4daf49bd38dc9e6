#!/usr/bin/python3
"""scripts/vm/plot.py FILE: draws the medians of bench-microvm, one JSON object a line from stdin, as .svg or .png.

For each program it draws what every door and state adds to the time with a local file.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from plots import BLUES, FAINT, GREYS, INK, bare, headings, main, ordered, words

import matplotlib.pyplot as plt
from matplotlib.patches import Patch

COLOURS = {"cold": BLUES[1], "start-known": BLUES[2], "local": BLUES[3], "pull+export": GREYS[1]}
NAMES = {"cold": "image known", "start-known": "start known", "local": "all of it local", "pull+export": "pull and export first"}


def draw(rows):
    # The local file is what the others are compared with.
    rows = [row for row in rows if (row["door"], row["state"]) != ("exported", "local")]
    workloads = ordered(rows, lambda row: row["workload"])
    bars = max(sum(row["workload"] == workload for row in rows) for workload in workloads)
    height = len(workloads) * (0.5 + 0.2 * bars) + 1.0
    figure, grid = plt.subplots(len(workloads), 1, figsize=(7.6, height), squeeze=False)
    for axes, workload in zip(grid.flat, workloads):
        found = [row for row in rows if row["workload"] == workload]
        longest = max(row["added_seconds"] for row in found)
        for place, row in enumerate(found):
            axes.barh(place, row["added_seconds"], height=0.8, color=COLOURS[row["state"]])
            door = "" if row["door"] == "exported" else f"  {row['door']}"
            axes.text(max(row["added_seconds"], 0) + longest * 0.01, place, f"{row['added_seconds']:.2f}{door}", va="center", fontsize=8, color=INK)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xlim(min(0, *(row["added_seconds"] for row in found)), longest * 1.2)
        axes.set_title(workload, loc="left", fontsize=11, fontweight="bold", color=INK, pad=5)
        axes.set_xticks([])
        axes.set_yticks([])
        bare(axes)
        axes.axvline(0, color=FAINT, linewidth=0.8)
    present = [state for state in NAMES if any(row["state"] == state for row in rows)]
    handles = [Patch(color=COLOURS[state], label=NAMES[state]) for state in present]
    headings(figure, f"Seconds added to a local disk file, over {words(rows[0]['link'])}", handles, 4, height, handlelength=1.1)
    figure.subplots_adjust(left=0.03, right=0.985, top=1 - 1.0 / height, bottom=0.1 / height, hspace=0.5 / (0.2 * bars))
    return figure


if __name__ == "__main__":
    main(__doc__, draw)
