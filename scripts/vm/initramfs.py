#!/usr/bin/python3
"""scripts/vm/initramfs.py KERNEL_DIR BUSYBOX AS_USER OUT: makes the initramfs of the guest.

KERNEL_DIR is an unpacked Debian kernel package, with the module lists that depmod makes. BUSYBOX and AS_USER are static
programs. The archive is not compressed: an emulated processor would take longer to unpack it.
"""

import lzma
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
# What the guest needs always, for a root by virtiofs, and for a network.
MODULES = {
    "base": ["virtio_pci", "virtio_blk", "virtio_console", "erofs", "overlay"],
    "virtiofs": ["virtiofs"],
    "network": ["virtio_net"],
}
DIRECTORIES = ["bin", "dev", "lower", "modules", "proc", "root", "sys", "upper", "vm"]
APPLETS = "sh cat chown cp env insmod ip kill ln mkdir mkfifo mount reboot sleep switch_root".split()


def archive(entries):
    """Returns entries of the form (path, mode with file type, content) as a cpio archive, padded for another to follow."""
    out = bytearray()
    for path, mode, content in [*entries, ("TRAILER!!!", 0, b"")]:
        name = path.encode() + b"\0"
        fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + name
        out += bytes(-len(out) % 4) + content
        out += bytes(-len(out) % 4)
    return bytes(out)


def modules(kernel, name):
    """Yields the files of a module and of those that it needs, in the order of loading. Built-in ones have no file."""
    release = next((kernel / "lib/modules").iterdir()).name
    command = ["modprobe", "--dirname", kernel, "--set-version", release, "--show-depends", name]
    for line in subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines():
        action, _, path = line.strip().partition(" ")
        if action == "insmod":
            yield pathlib.Path(path)


def plain(path):
    """Returns the name and the content of a module without its compression."""
    if path.suffix == ".xz":
        return path.stem, lzma.decompress(path.read_bytes())
    return path.name, path.read_bytes()


def main(kernel, busybox, as_user, out):
    kernel = pathlib.Path(kernel)
    entries = [(name, 0o040755, b"") for name in DIRECTORIES]
    entries += [("bin/busybox", 0o100755, pathlib.Path(busybox).read_bytes())]
    entries += [("bin/as-user", 0o100755, pathlib.Path(as_user).read_bytes())]
    entries += [(f"bin/{name}", 0o120777, b"busybox") for name in APPLETS]
    entries += [("init", 0o100755, (HERE / "init").read_bytes()), ("vm/run", 0o100644, (HERE / "run").read_bytes())]
    done = set()
    for kind, names in MODULES.items():
        files = dict(plain(path) for name in names for path in modules(kernel, name))
        fresh = [name for name in files if name not in done]
        done.update(fresh)
        entries += [(f"modules/{name}", 0o100644, files[name]) for name in fresh]
        entries += [(f"modules/{kind}", 0o100644, "".join(f"{name}\n" for name in fresh).encode())]
    part = f"{out}.{os.getpid()}"
    pathlib.Path(part).write_bytes(archive(entries))
    os.replace(part, out)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
