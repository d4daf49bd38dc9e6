# shellcheck shell=bash
# shellcheck disable=SC2154 # work is the benchmark's directory
# Functions that the systems with a containerd snapshotter share.

# snapshot_mount DIR SNAPSHOTTER CTR...: mounts a writable root over the topmost snapshot. `ctr images mount` would
# try to unpack the layers, which are missing.
snapshot_mount() {
    local target=$1 snapshots=("${@:3}" snapshots --snapshotter "$2") top
    # The columns are KEY, PARENT (the base has none) and KIND. The topmost snapshot is the parent of no other.
    top=$("${snapshots[@]}" list | awk 'NR > 1 && $NF == "Committed" { keys[$1]; if (NF == 3) parents[$2] }
        END { for (key in keys) if (!(key in parents)) print key }')
    [ -n "$top" ] || die "there is no snapshot"
    "${snapshots[@]}" prepare root "$top" >/dev/null
    eval "$("${snapshots[@]}" mounts "$target" root)"
}
