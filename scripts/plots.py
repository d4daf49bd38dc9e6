"""What the plots of the benchmarks have in common."""

import json
import sys

import matplotlib

matplotlib.use("Agg")

INK, GREY, FAINT, LIMIT = "#1f2328", "#59636e", "#8c959f", "#bc4c00"
# Shades for ocifs, from light to dark: on its own, with what others have made, and through containerd. Shades for other
# systems.
BLUES = ["#9fc9f3", "#54a0e8", "#1f6fc4", "#0b3d78"]
TEALS = ["#74cbbd", "#138a7b"]
VIOLET = "#a99bd8"
GREENS = ["#a8d5a2", "#4f9d55"]
GREYS = ["#b9bec4", "#9aa1a9", "#7d848c", "#c9cdd2", "#8b929a", "#6a7077"]
# With a constant salt and paths for text, equal results give equal files.
matplotlib.rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": "ocifs", "svg.fonttype": "path"})


def ordered(rows, field):
    """Returns the values of a field in the order of their first row."""
    return list(dict.fromkeys(field(row) for row in rows))


def words(link):
    """Returns the name of a link in words."""
    if link == "loopback":
        return link
    rtt, rate = link.split("ms-")
    return f"{rtt} ms, {rate.removesuffix('mbit')} Mbit/s"


def bare(axes):
    """Removes the frame and the marks of the axes."""
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, colors=INK)


def headings(figure, title, handles, columns, height, **legend):
    """Writes the title and, below it, the legend. The height is that of the figure, in inches."""
    figure.suptitle(title, x=0.03, y=1 - 0.14 / height, ha="left", va="top", fontsize=14, fontweight="bold", color=INK)
    figure.legend(handles=handles, loc="upper left", ncol=columns, frameon=False, fontsize=9, columnspacing=1.6,
                  bbox_to_anchor=(0.02, 1 - 0.46 / height), labelcolor=INK, **legend)


def save(figure, out):
    """Writes an .svg or .png, without a date."""
    metadata = {"Date": None} if out.endswith(".svg") else {"Software": None}
    figure.savefig(out, dpi=160, facecolor="white", metadata=metadata)


def main(usage, draw):
    """Draws the rows of standard input, one JSON object a line, into the file that the command line names."""
    if len(sys.argv) != 2:
        sys.exit(usage)
    save(draw([json.loads(line) for line in sys.stdin]), sys.argv[1])
