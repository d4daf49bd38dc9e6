# shellcheck shell=bash
# shellcheck disable=SC2154 # work is the benchmark's directory
# What systems share that are snapshotters of containerd.

# snapshot_mount DIR SNAPSHOTTER CTR...: a writable root over the topmost snapshot. `ctr images mount` would want to unpack the
# layers, which are not there.
snapshot_mount() {
    local target=$1 snapshots=("${@:3}" snapshots --snapshotter "$2") top
    # KEY, PARENT (the base has none), KIND: the one that is nobody's parent.
    top=$("${snapshots[@]}" list | awk 'NR > 1 && $NF == "Committed" { keys[$1]; if (NF == 3) parents[$2] }
        END { for (key in keys) if (!(key in parents)) print key }')
    [ -n "$top" ] || die "there is no snapshot"
    "${snapshots[@]}" prepare root "$top" >/dev/null
    eval "$("${snapshots[@]}" mounts "$target" root)"
}
