#!/usr/bin/env python3
"""special.py LAYOUT: files of every kind, with every attribute, under every sort of name."""
import os
import random
import struct
import subprocess
import sys
import tarfile
import tempfile

from layout import Layout
from tarlayer import EPOCH, TarLayer

# struct vfs_ns_cap_data of linux/capability.h: revision and effective bit, then permitted and inheritable, low and high
# words; revision 3 adds the user namespace's root.
CAP_NET_BIND_SERVICE = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
CAP_IN_NAMESPACE = struct.pack("<IIIIII", 0x03000001, 1 << 10, 0, 0, 0, 100000)


def attributes(layer):
    layer.dir("modes", mode=0o1777)
    for mode in 0o4755, 0o2755, 0o6711, 0o0, 0o7777, 0o1644:
        layer.file(f"modes/{mode:04o}", b"x", mode=mode)
    layer.dir("modes/setgid", mode=0o2775, gid=50)
    layer.file("modes/format-bits", b"x", mode=0o100640)
    layer.dir("owners")
    for i, (uid, gid) in enumerate([(1, 2), (65534, 65534), (100000, 200000), (2**31, 2**31 + 1), (2**32 - 2, 2**32 - 2)]):
        layer.file(f"owners/{i}", b"", uid=uid, gid=gid)
    layer.dir("times")
    for i, time in enumerate([0, 1, EPOCH + 0.25, 315532800, 2**31 - 1, 2**31, 2**32 + 5, -1, -86400.5]):
        layer.file(f"times/{i}", b"", mtime=time)
    layer.dir("xattrs", xattrs={"user.on.directory": b"yes"})
    layer.file("xattrs/values", b"", xattrs={
        "user.empty": b"", "user.binary": bytes(range(256)), "user.text": b"a=b\nc", "user.long": b"v" * 2000})
    layer.file("xattrs/capability", b"", mode=0o755, xattrs={"security.capability": CAP_NET_BIND_SERVICE})
    layer.file("xattrs/capability3", b"", mode=0o755, xattrs={"security.capability": CAP_IN_NAMESPACE})
    layer.file("xattrs/not-for-layers", b"", xattrs={"trusted.overlay.opaque": b"y"})


def kinds(layer):
    layer.dir("dev")
    for name, kind, major, minor in [
        ("null", tarfile.CHRTYPE, 1, 3), ("loop", tarfile.BLKTYPE, 7, 0), ("large-minor", tarfile.CHRTYPE, 200, 70000),
        ("large-major", tarfile.BLKTYPE, 4000, 1),
    ]:
        layer.add("dev/" + name, kind, devmajor=major, devminor=minor, mode=0o660, gid=6)
    layer.add("dev/fifo", tarfile.FIFOTYPE, mode=0o600)
    layer.hardlink("dev/fifo-link", "dev/fifo", mode=0o600)
    layer.hardlink("dev/null-link", "dev/null", mode=0o660, gid=6)
    layer.dirs("links/a/deep/er")
    layer.file("links/a/deep/er/file", b"shared\n", mode=0o640)
    for name in "links/b", "links/a/again", "top", "links/z":
        layer.hardlink(name, "links/a/deep/er/file", mode=0o640)
    layer.symlink("links/absolute", "/links/b")
    layer.symlink("links/dangling", "../../no/such")
    layer.symlink("links/loop", "loop")
    layer.symlink("links/bytes", b"\xff\xfe/caf\xe9")
    layer.symlink("links/long", "t/" * 2000 + "end")
    layer.hardlink("links/to-symlink", "links/absolute", mode=0o777)


def names(layer):
    layer.dir("names")
    for byte in range(1, 256):
        if byte not in b"/":
            layer.file(b"names/x" + bytes([byte]), bytes([byte]))
    for name in (b" ", b"-", b"--help", b"...", b"trailing ", b"new\nline", b"back\\slash", b"wh.not", b"%41", b"A", b"a",
                 "κόσμε".encode(), b"\xc0\x80", b"e\xcc\x81", b"\xc3\xa9", b"n" * 255, b"\xff" * 255):
        layer.file(b"names/" + name, b"named\n")
    deep = "/".join(["deep"] * 100)
    layer.dirs("names/" + deep)
    layer.file("names/" + deep + "/file", b"far down\n")
    wide = "/".join([c * 250 for c in "abcdefghijkl"])
    layer.dirs("names/" + wide)
    layer.file("names/" + wide + "/file", b"a long way\n")
    layer.dir("crowded")
    for i in range(3000):
        layer.file(f"crowded/entry-{i:05}", b"%d" % i)
    layer.dir("empty")


def sizes(layer):
    rng = random.Random(1)
    layer.dir("sizes")
    for size in (0, 1, 511, 512, 513, 4095, 4096, 4097, 65535, 65536, 131073, 2**20 - 1, 2**20, 2**20 + 1, 9 * 2**20 + 7):
        layer.file(f"sizes/{size}", rng.randbytes(size))
    layer.file("sizes/zeros", bytes(5 * 2**20))
    layer.file("sizes/text", b"".join(b"line %d of a compressible file\n" % i for i in range(100000)))


def sparse_tar(directory, path, style):
    """A tar of sparse files in a style of GNU tar. (The oldest, type S, is left out: no engine unpacks it.)"""
    tree = os.path.join(directory, "sparse-" + os.path.basename(path))
    os.makedirs(os.path.join(tree, "sparse"))
    name = os.path.join(tree, "sparse", os.path.basename(path))
    with open(name, "wb") as file:
        # Data at neither end.
        for i in range(40):
            file.seek((3 * i + 1) * 65536)
            file.write(b"%4096d" % i)
        file.truncate(40 * 3 * 65536 + 12345)
    with open(name + "-hole", "wb") as file:
        file.truncate(3 * 2**20)
    for entry in name, name + "-hole", os.path.dirname(name), tree:
        os.utime(entry, (EPOCH, EPOCH))
    # The names of two styles hold tar's process id: it is 1 in a namespace of its own.
    command = ["unshare", "--pid", "--fork", "tar", "--sparse", "--numeric-owner", "--owner=0", "--group=0", "--sort=name",
               # Nor are the process id of the header and the times of access recorded.
               "--format=posix", "--sparse-version=" + style, "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime"]
    subprocess.run(command + ["-cf", path, "-C", tree, "sparse"], check=True)
    return path


def main():
    layout, layers = Layout(sys.argv[1]), []
    with tempfile.TemporaryDirectory() as scratch:
        for write, form, how in [(attributes, tarfile.PAX_FORMAT, "gzip"), (kinds, tarfile.GNU_FORMAT, "none"),
                                 (names, tarfile.PAX_FORMAT, "zstd"), (sizes, tarfile.USTAR_FORMAT, "members")]:
            layer = TarLayer(f"{scratch}/{write.__name__}.tar", form)
            write(layer)
            layers.append(layout.add_layer(layer.close(), how))
        for style in "0.0", "0.1", "1.0":
            layers.append(layout.add_layer(sparse_tar(scratch, f"{scratch}/{style}", style), "pigz"))
    layout.tag(layout.add_image(layers), "latest")


if __name__ == "__main__":
    main()
