#!/usr/bin/env python3
"""corners.py LAYOUT: two layers that need the specification read closely.

All of it is settled by the OCI image specification, and umoci unpacks it so. Engines on overlayfs refuse some of these
layers or merge them otherwise; cases on which umoci itself is in doubt (the time of a directory
without an entry, say) are left to unit tests.
"""
import sys
import tempfile

from layout import Layout
from tarlayer import EPOCH, TarLayer


def lower(layer):
    layer.dir("d", mode=0o700, uid=5)
    layer.file("d/a", b"lower a\n")
    layer.file("d/b", b"lower b\n")
    for name in "f", "g", "tofile/x", "tofile/y", "hl1":
        if name == "tofile/x":
            layer.dir("tofile")
        layer.file(name, b"lower " + name.encode() + b"\n", mode=0o640)
    layer.hardlink("hl2", "hl1", mode=0o640)
    for name in "dd", "opq", "opq2", "opq3", "opq4":
        layer.dir(name, mode=0o700, gid=7)
        layer.file(name + "/old", b"lower\n")
        layer.dir(name + "/sub")
        layer.file(name + "/sub/deep", b"lower\n")
    layer.symlink("link", "d")
    layer.file("todir", b"lower\n")


def upper(layer):
    # Whiteout and replacement in either order: a whiteout speaks of lower layers only.
    layer.whiteout("f")
    layer.file("f", b"upper f\n")
    layer.file("g", b"upper g\n")
    layer.whiteout("g")
    layer.whiteout("dd")
    layer.dir("dd")
    layer.file("dd/new", b"upper\n")
    # Opaque markers first, last, alone, and beside a whiteout of what the layer adds.
    layer.dir("opq")
    layer.opaque("opq")
    layer.file("opq/new", b"upper\n")
    layer.dir("opq2")
    layer.file("opq2/new", b"upper\n")
    layer.opaque("opq2")
    layer.opaque("opq3")
    layer.dir("opq4")
    layer.file("opq4/old", b"upper\n")
    layer.whiteout("opq4/old")
    layer.opaque("opq4")
    # Changes of type.
    layer.file("tofile", b"upper\n")
    layer.dir("todir")
    layer.file("todir/x", b"upper\n")
    layer.file("link", b"was a symlink\n")
    # No entry for a directory: the lower one keeps its attributes.
    layer.whiteout("d/a")
    # Hard links to a lower layer, to a symlink, and to a name that the same layer writes again.
    layer.hardlink("hl3", "hl1", mode=0o640)
    layer.symlink("s1", "nowhere")
    layer.hardlink("s2", "s1", mode=0o777)
    layer.file("t1", b"A\n")
    layer.hardlink("t1h", "t1")
    layer.file("t1", b"B\n")
    # The same path twice: the last one counts, and directories merge.
    layer.file("twice", b"first\n", mode=0o600)
    layer.file("twice", b"second\n", mode=0o604, mtime=EPOCH + 1)
    layer.dir("twicedir", mode=0o700)
    layer.file("twicedir/x", b"kept\n")
    layer.dir("twicedir", mode=0o711, mtime=EPOCH + 2)
    # Every spelling of a path.
    layer.dir("./spelt")
    layer.file("/spelt//absolute", b"upper\n")
    layer.file("./spelt/./dotted", b"upper\n")
    layer.file("spelt/../spelt/parent", b"upper\n")


def main():
    layout, layers = Layout(sys.argv[1]), []
    with tempfile.TemporaryDirectory() as scratch:
        for write in lower, upper:
            layer = TarLayer(f"{scratch}/{write.__name__}.tar")
            write(layer)
            layers.append(layout.add_layer(layer.close(), "gzip"))
    layout.tag(layout.add_image(layers), "latest")


if __name__ == "__main__":
    main()
