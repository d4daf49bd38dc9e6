# shellcheck shell=bash
# shellcheck disable=SC2154 # work and COMMAND are the benchmark's
# Converts images to eStargz, for the systems that read it.

# estargz_tools: succeeds if images can be converted here.
estargz_tools() { type -P ctr-remote containerd runc >/dev/null; }

# estargz_containerd DIR [PREFIX...]: starts containerd with its state in DIR. It expects a stargz-snapshotter there,
# which only lazy pulls need. Sets CONTAINERD to its process and CTR_REMOTE to a command for it.
estargz_containerd() {
    local dir=$1
    shift
    mkdir -p "$dir"
    cat >"$dir/config.toml" <<TOML
version = 2
root = "$dir/root"
state = "$dir/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "$dir/socket"
[ttrpc]
address = "$dir/socket.ttrpc"
[proxy_plugins.stargz]
type = "snapshot"
address = "$dir/snapshotter"
TOML
    CTR_REMOTE=(ctr-remote --address "$dir/socket")
    "$@" containerd --config "$dir/config.toml" --log-level warn >"$dir/log" 2>&1 &
    CONTAINERD=$!
    wait_until "containerd (its log: $dir/log)" "${CTR_REMOTE[@]}" version
}

# estargz_convert REGISTRY NAME: makes NAME:estargz of NAME:latest, once. A recorded run of the workload orders the
# files and chooses those to prefetch, where the converter can do that.
estargz_convert() {
    local dir=$work/estargz-convert converted=$work/estargz-converted/$2 entrypoint arguments
    [ ! -e "$converted" ] || return 0
    entrypoint=$(printf '%s\n' "${COMMAND[0]}" | jq -Rnc '[inputs]')
    arguments=$(printf '%s\n' "${COMMAND[@]:1}" | jq -Rnc '[inputs]')
    on_exit rm -rf --one-file-system "$dir"
    estargz_containerd "$dir" "${AT_REGISTRY[@]}"
    on_exit stop_process "$CONTAINERD"
    "${CTR_REMOTE[@]}" images pull --plain-http "$1/$2:latest" >/dev/null
    "${CTR_REMOTE[@]}" images optimize --oci --period 10 --entrypoint "$entrypoint" --args "$arguments" "$1/$2:latest" "$1/$2:estargz" >/dev/null || {
        # The converter cannot sort the files of a layer that has a file without an entry for its directory.
        say "$2 cannot be optimized, and is converted to eStargz as it is"
        "${CTR_REMOTE[@]}" images optimize --oci --no-optimize "$1/$2:latest" "$1/$2:estargz" >/dev/null
    }
    "${CTR_REMOTE[@]}" images push --plain-http "$1/$2:estargz" >/dev/null
    mkdir -p "${converted%/*}"
    : >"$converted"
}
