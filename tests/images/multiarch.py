#!/usr/bin/env python3
"""multiarch.py LAYOUT ARCH=TAR...: an image index with an image for each architecture and an attestation for each image."""
import sys

from layout import CONFIG, Layout, canonical

# What BuildKit names the platform of entries that are no images, and how it ties them to the image they speak of.
UNKNOWN = {"os": "unknown", "architecture": "unknown"}


def attestation(layout, image):
    """An image manifest in form, whose only layer is an in-toto statement."""
    statement = {"_type": "https://in-toto.io/Statement/v0.1", "predicateType": "https://slsa.dev/provenance/v0.2",
                 "subject": [{"name": "_", "digest": dict([image["digest"].split(":")])}], "predicate": {}}
    layer = layout.add_bytes("application/vnd.in-toto+json", canonical(statement))
    config = layout.add_bytes(CONFIG, canonical(UNKNOWN | {"config": {}, "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}}))
    return layout.add_manifest(config, [layer]) | {"platform": UNKNOWN, "annotations": {
        "vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": image["digest"]}}


def main():
    layout, images, attestations = Layout(sys.argv[1]), [], []
    for arch, tar in (spec.split("=", 1) for spec in sys.argv[2:]):
        image = layout.add_image([layout.add_layer(tar, "pigz")], {"Cmd": ["bash"]}, arch)
        images.append(image | {"platform": {"os": "linux", "architecture": arch}})
        attestations.append(attestation(layout, image))
    layout.tag(layout.add_index(images + attestations), "latest")


if __name__ == "__main__":
    main()
