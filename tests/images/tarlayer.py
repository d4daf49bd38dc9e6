"""Layers written entry by entry, for the hand-made images."""
import io
import os
import tarfile

EPOCH = 1700000000


class TarLayer:
    """A layer being written to a file. Names are str or bytes; keyword arguments set fields of the tar header."""

    def __init__(self, path, format=tarfile.PAX_FORMAT):
        self.path, self.tar = path, tarfile.open(path, "w", format=format)

    def add(self, name, kind, data=b"", xattrs=None, **fields):
        info = tarfile.TarInfo(os.fsdecode(name))
        info.type, info.size, info.mtime = kind, len(data), EPOCH
        info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
        for field, value in fields.items():
            setattr(info, field, value)
        for key, value in (xattrs or {}).items():
            # tarfile writes what surrogateescape made of bytes as those bytes.
            info.pax_headers["SCHILY.xattr." + key] = value.decode("utf-8", "surrogateescape")
        self.tar.addfile(info, io.BytesIO(data))

    def file(self, name, data=b"", **fields):
        self.add(name, tarfile.REGTYPE, data, **fields)

    def dir(self, name, **fields):
        self.add(name, tarfile.DIRTYPE, **fields)

    def dirs(self, name):
        """A directory and all above it, top down."""
        parts = name.split("/")
        for depth in range(len(parts)):
            self.dir("/".join(parts[: depth + 1]))

    def symlink(self, name, target, **fields):
        self.add(name, tarfile.SYMTYPE, linkname=os.fsdecode(target), mode=0o777, **fields)

    def hardlink(self, name, target, **fields):
        self.add(name, tarfile.LNKTYPE, linkname=os.fsdecode(target), **fields)

    def whiteout(self, name):
        directory, base = os.path.split(name)
        self.file(os.path.join(directory, ".wh." + base))

    def opaque(self, directory):
        self.file(os.path.join(directory, ".wh..wh..opq"))

    def close(self):
        self.tar.close()
        return self.path
