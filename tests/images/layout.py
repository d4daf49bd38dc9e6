#!/usr/bin/env python3
"""Writes and rewrites OCI image layouts, byte for byte the same from the same input.

  layout.py image LAYOUT REF [--config JSON] [--arch ARCH] TAR:COMPRESSION...
  layout.py recompress LAYOUT REF NEW_LAYOUT NEW_REF [--platform OS/ARCH] COMPRESSION...
  layout.py bare LAYOUT REF
  layout.py docker-save LAYOUT REF FILE NAME:TAG

COMPRESSION is none, gzip (one member), members (many gzip members), pigz or zstd; recompress takes one for each layer,
the last one given standing for all that follow, and checks every layer against its diffID on the way. bare drops the
annotations of the manifest, in which builders record paths of the machine. docker-save writes the archive that
`docker save` wrote until Docker 25. Only the Python standard library, gzip, pigz and zstd are needed.
"""
import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zlib

EPOCH = int(os.environ.get("SOURCE_DATE_EPOCH", "1700000000"))
CREATED = "2023-11-14T22:13:20Z"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
REF_NAME = "org.opencontainers.image.ref.name"
# The architecture of this machine as images name it.
ARCH = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
CHUNK = 1 << 20
# Uncompressed bytes of one gzip member of the `members` compression.
MEMBER = 4 << 20
# pigz output depends on whether it runs parallel, not on how many threads there are: two, everywhere.
COMPRESSORS = {
    "gzip": ["gzip", "-6", "-n", "-c"],
    "pigz": ["pigz", "-6", "-n", "-p", "2", "-c"],
    "zstd": ["zstd", "-q", "-6", "-T1", "-c"],
}
SUFFIX = {"none": "", "gzip": "+gzip", "pigz": "+gzip", "members": "+gzip", "zstd": "+zstd"}
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def chunks(file):
    return iter(lambda: file.read(CHUNK), b"")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in chunks(file):
            digest.update(piece)
    return "sha256:" + digest.hexdigest()


def gzip_members(source, target):
    """Compresses source as a run of independent gzip members, which together are one stream."""
    while piece := source.read(MEMBER):
        # 31 = 15 window bits with a gzip header, whose time and name zlib leaves empty.
        packer = zlib.compressobj(6, zlib.DEFLATED, 31)
        target.write(packer.compress(piece) + packer.flush())


def compress(path, how, target):
    with open(path, "rb") as source:
        if how == "none":
            for piece in chunks(source):
                target.write(piece)
        elif how == "members":
            gzip_members(source, target)
        else:
            target.flush()
            subprocess.run(COMPRESSORS[how], stdin=source, stdout=target, check=True)


def decompress(path, target):
    """The plain tar of a layer blob, whatever it is compressed with. Returns its digest, the diffID."""
    with open(path, "rb") as file:
        magic = file.read(4)
    command = ["cat"]
    if magic.startswith(GZIP_MAGIC):
        command = ["gzip", "-dc"]
    elif magic == ZSTD_MAGIC:
        command = ["zstd", "-dqc"]
    digest = hashlib.sha256()
    with open(path, "rb") as source, subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE) as process:
        for piece in chunks(process.stdout):
            digest.update(piece)
            target.write(piece)
    if process.returncode:
        sys.exit(f"{path}: {command[0]} failed")
    return "sha256:" + digest.hexdigest()


class Layout:
    """An OCI image layout directory. Everything is added by content, so writing twice changes nothing."""

    def __init__(self, directory):
        self.directory = directory
        os.makedirs(self.path("blobs/sha256"), exist_ok=True)
        with open(self.path("oci-layout"), "w", encoding="ascii") as file:
            file.write('{"imageLayoutVersion":"1.0.0"}')

    def path(self, name):
        return os.path.join(self.directory, name)

    def blob_path(self, digest):
        return self.path("blobs/" + digest.replace(":", "/"))

    def read_json(self, digest):
        with open(self.blob_path(digest), "rb") as file:
            return json.load(file)

    @contextlib.contextmanager
    def new_blob(self, descriptor):
        """A file to write a blob to; `descriptor` gets its digest and size when the file is complete."""
        with tempfile.NamedTemporaryFile(dir=self.path("blobs"), delete=False) as file:
            yield file
        descriptor.update(digest=sha256(file.name), size=os.path.getsize(file.name))
        os.chmod(file.name, 0o644)
        os.rename(file.name, self.blob_path(descriptor["digest"]))

    def add_bytes(self, media_type, data):
        descriptor = {"mediaType": media_type}
        with self.new_blob(descriptor) as file:
            file.write(data)
        return descriptor

    def add_layer(self, tar_path, how):
        """Returns the descriptor and the diffID of the layer."""
        descriptor = {"mediaType": LAYER + SUFFIX[how]}
        with self.new_blob(descriptor) as file:
            compress(tar_path, how, file)
        return descriptor, sha256(tar_path)

    def add_image(self, layers, config=None, arch=ARCH):
        """Adds config and manifest for layers made by add_layer; returns the manifest's descriptor."""
        image = {
            "created": CREATED, "architecture": arch, "os": "linux", "config": config or {},
            "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
            "history": [{"created": CREATED, "created_by": "tests/images"} for _ in layers],
        }
        return self.add_manifest(self.add_bytes(CONFIG, canonical(image)), [d for d, _ in layers])

    def add_manifest(self, config, layers):
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}
        return self.add_bytes(MANIFEST, canonical(manifest))

    def add_index(self, manifests):
        return self.add_bytes(INDEX, canonical({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}))

    def tag(self, descriptor, ref):
        descriptor = descriptor | {"annotations": {REF_NAME: ref}}
        with open(self.path("index.json"), "wb") as file:
            file.write(canonical({"schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor]}))

    def manifest(self, ref, wanted):
        """The manifest of ref, for a platform (os/arch) when ref is an image index."""
        with open(self.path("index.json"), "rb") as file:
            found = [d for d in json.load(file)["manifests"] if d.get("annotations", {}).get(REF_NAME) == ref]
        if not found:
            sys.exit(f"{self.directory}: no image named {ref}")
        value = self.read_json(found[-1]["digest"])
        if "manifests" not in value:
            return value
        os_name, arch = wanted.split("/")[:2]
        for entry in value["manifests"]:
            have = entry.get("platform", {})
            if (have.get("os"), have.get("architecture")) == (os_name, arch):
                return self.read_json(entry["digest"])
        sys.exit(f"{self.directory}:{ref}: no image for {wanted}")


def recompress(source, manifest, target, compressions):
    """Adds the image to target with its layers compressed otherwise; returns the new manifest's descriptor."""
    diff_ids = source.read_json(manifest["config"]["digest"])["rootfs"]["diff_ids"]
    layers = []
    for i, (layer, diff_id) in enumerate(zip(manifest["layers"], diff_ids, strict=True)):
        with tempfile.NamedTemporaryFile(dir=target.directory) as plain:
            if decompress(source.blob_path(layer["digest"]), plain) != diff_id:
                sys.exit(f"layer {layer['digest']} does not match its diffID {diff_id}")
            plain.flush()
            layers.append(target.add_layer(plain.name, compressions[min(i, len(compressions) - 1)])[0])
    with open(source.blob_path(manifest["config"]["digest"]), "rb") as file:
        config = target.add_bytes(CONFIG, file.read())
    return target.add_manifest(config, layers)


class DockerSave:
    """The archive of `docker save`, up to Docker 24: a directory for each layer, named by a v1 image identifier."""

    def __init__(self, path):
        self.tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)

    def add(self, name, size, file, kind=tarfile.REGTYPE, linkname=""):
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.type, info.linkname = size, EPOCH, kind, linkname
        info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
        self.tar.addfile(info, file)

    def add_bytes(self, name, data):
        self.add(name, len(data), io.BytesIO(data))

    def add_layer(self, identity, parent, file, same_as):
        """same_as is the identity of an earlier layer with the same content: Docker stores it once, and links to it."""
        v1 = {"id": identity, "created": CREATED, "os": "linux"} | ({"parent": parent} if parent else {})
        self.add(identity, 0, None, tarfile.DIRTYPE)
        self.add_bytes(identity + "/VERSION", b"1.0")
        self.add_bytes(identity + "/json", canonical(v1))
        if same_as:
            self.add(identity + "/layer.tar", 0, None, tarfile.SYMTYPE, f"../{same_as}/layer.tar")
        else:
            self.add(identity + "/layer.tar", os.path.getsize(file.name), file)


def docker_save(layout, manifest, path, name):
    archive, paths, identities, parent = DockerSave(path), [], {}, ""
    for layer in manifest["layers"]:
        with tempfile.NamedTemporaryFile(dir=layout.directory) as plain:
            diff_id = decompress(layout.blob_path(layer["digest"]), plain)
            plain.seek(0)
            identity = hashlib.sha256(f"{parent} {diff_id}".encode()).hexdigest()
            archive.add_layer(identity, parent, plain, identities.setdefault(diff_id, identity) != identity
                              and identities[diff_id])
        paths.append(identity + "/layer.tar")
        parent = identity
    with open(layout.blob_path(manifest["config"]["digest"]), "rb") as file:
        config = file.read()
    config_name = hashlib.sha256(config).hexdigest() + ".json"
    archive.add_bytes(config_name, config)
    archive.add_bytes("manifest.json", canonical([{"Config": config_name, "RepoTags": [name], "Layers": paths}]))
    repository, tag = name.rsplit(":", 1)
    archive.add_bytes("repositories", canonical({repository: {tag: parent}}))
    archive.tar.close()


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    image = commands.add_parser("image")
    image.add_argument("--config", type=json.loads, default={})
    image.add_argument("--arch", default=ARCH)
    again = commands.add_parser("recompress")
    bare = commands.add_parser("bare")
    save = commands.add_parser("docker-save")
    for command in image, again, bare, save:
        command.add_argument("layout")
        command.add_argument("ref")
    image.add_argument("layers", nargs="+", metavar="TAR:COMPRESSION")
    again.add_argument("--platform", default="linux/" + ARCH)
    again.add_argument("new_layout")
    again.add_argument("new_ref")
    again.add_argument("compressions", nargs="+", choices=sorted(SUFFIX))
    save.add_argument("file")
    save.add_argument("name")
    return parser.parse_args()


def main():
    args = parse()
    layout = Layout(args.layout)
    if args.command == "image":
        layers = [layout.add_layer(*spec.rsplit(":", 1)) for spec in args.layers]
        layout.tag(layout.add_image(layers, args.config, args.arch), args.ref)
    elif args.command == "recompress":
        target = Layout(args.new_layout)
        manifest = layout.manifest(args.ref, args.platform)
        target.tag(recompress(layout, manifest, target, args.compressions), args.new_ref)
    elif args.command == "bare":
        manifest = layout.manifest(args.ref, "linux/" + ARCH)
        layout.tag(layout.add_manifest(manifest["config"], manifest["layers"]), args.ref)
    else:
        docker_save(layout, layout.manifest(args.ref, "linux/" + ARCH), args.file, args.name)


if __name__ == "__main__":
    main()
