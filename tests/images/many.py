#!/usr/bin/env python3
"""many.py LAYOUT: an image of 120 small layers, the same every time.

A layer adds files and hard links, hides files or a directory, changes the type of a path, or makes a directory opaque.
The model of the merged tree keeps every layer to what all engines agree on: no path twice in a layer, parents before
their children, whiteouts only of what lies in lower layers and is not written again.
"""
import random
import sys
import tempfile

from layout import Layout
from tarlayer import EPOCH, TarLayer

LAYERS = 120
COMPRESSIONS = ["gzip", "zstd", "none", "members"]


class Builder:
    """Writes layer after layer; dirs and files are the paths of the merged tree so far."""

    def __init__(self):
        self.rng, self.dirs, self.files = random.Random(LAYERS), {"srv"}, set()

    def layer(self, path, number):
        self.tar, self.written, self.fields = TarLayer(path), set(), {"mtime": EPOCH + number}
        if number % 3 == 1:
            self.rng.choice([self.hide_files, self.hide_directory])()
        elif number % 7 == 3:
            self.make_opaque()
        elif number % 5 == 4:
            self.rng.choice([self.file_to_directory, self.file_to_symlink, self.directory_to_file])()
        else:
            self.add_files(number)
        return self.tar.close()

    def pick(self, paths, count=1):
        return self.rng.sample(sorted(paths), min(count, len(paths)))

    def deeper(self, depth):
        return {d for d in self.dirs if d.count("/") >= depth}

    def forget(self, path):
        for known in self.dirs, self.files:
            known -= {p for p in known if p == path or p.startswith(path + "/")}

    def parents(self, path):
        parts = path.split("/")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            if parent not in self.written:
                self.tar.dir(parent, mode=0o755 if depth % 2 else 0o775, **self.fields)
            self.written.add(parent)
            self.dirs.add(parent)

    def file(self, path, data, **fields):
        self.parents(path)
        self.tar.file(path, data, **self.fields, **fields)
        self.written.add(path)
        self.files.add(path)

    def add_files(self, number):
        rng = self.rng
        for i in range(12):
            parent = rng.choice(sorted(self.dirs))
            if rng.random() < 0.4 and parent.count("/") < 5:
                parent += f"/d{rng.randrange(6)}"
            path = f"{parent}/f{rng.randrange(20)}"
            if parent in self.files or path in self.dirs | self.written:
                continue
            mode, uid = rng.choice([0o644, 0o600, 0o755]), rng.randrange(3)
            self.file(path, rng.randbytes(rng.randrange(6000)), mode=mode, uid=uid)
            if rng.random() < 0.3:
                link = f"{parent}/l{number}-{i}"
                self.tar.hardlink(link, path, mode=mode, uid=uid, **self.fields)
                self.files.add(link)

    def hide(self, path):
        self.parents(path)
        self.tar.whiteout(path)
        self.forget(path)

    def hide_files(self):
        for path in self.pick(self.files, 4):
            self.hide(path)

    def hide_directory(self):
        for path in self.pick(self.deeper(2)):
            self.hide(path)

    def make_opaque(self):
        for path in self.pick(self.deeper(1)):
            self.forget(path)
            self.parents(path + "/new")
            self.tar.opaque(path)
            self.file(path + "/new", b"alone\n")

    def file_to_directory(self):
        for path in self.pick(self.files):
            self.forget(path)
            self.file(path + "/inside", b"in a directory that was a file\n")

    def file_to_symlink(self):
        for path in self.pick(self.files):
            self.parents(path)
            self.tar.symlink(path, "../elsewhere", **self.fields)

    def directory_to_file(self):
        for path in self.pick(self.deeper(3)):
            self.forget(path)
            self.file(path, b"a file that was a directory\n")


def main():
    layout, builder, layers = Layout(sys.argv[1]), Builder(), []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(LAYERS):
            tar = builder.layer(f"{scratch}/layer.tar", number)
            layers.append(layout.add_layer(tar, COMPRESSIONS[number % len(COMPRESSIONS)]))
    layout.tag(layout.add_image(layers), "latest")


if __name__ == "__main__":
    main()
