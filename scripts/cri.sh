# shellcheck shell=bash
# Functions for a containerd whose images are pulled by CRI, as a kubelet pulls them, with ocifs as the snapshotter.

# cri_start_snapshotter DIR: starts the snapshotter with its state in DIR. Sets CRI_SNAPSHOTTER to its process.
cri_start_snapshotter() {
    mkdir -p "$1"
    "$OCIFS" snapshotter --plain-http --address "$1/snapshotter" --root "$1/snapshots" >>"$1/snapshotter.log" 2>&1 &
    CRI_SNAPSHOTTER=$!
}

# cri_snapshotter DIR: starts the snapshotter as cri_start_snapshotter does, and waits until it answers.
cri_snapshotter() {
    cri_start_snapshotter "$1"
    wait_until "the snapshotter (its log: $1/snapshotter.log)" cri_answers "$1"
}

# cri_answers DIR: succeeds if the snapshotter answers.
cri_answers() {
    local said
    said=$("$OCIFS" snapshotter check --json --address "$1/snapshotter" 2>/dev/null || true)
    jq -e 'any(.[]; .what == "snapshotter" and .ok)' <<<"$said" >/dev/null
}

# cri_containerd DIR REGISTRY: starts containerd with its state in DIR. It speaks HTTP to the registry. Sets
# CRI_CONTAINERD to its process and CRI_CTR to a command for it.
cri_containerd() {
    local dir=$1
    mkdir -p "$dir/certs.d/$2"
    printf 'server = "http://%s"\n[host."http://%s"]\ncapabilities = ["pull", "resolve"]\n' "$2" "$2" >"$dir/certs.d/$2/hosts.toml"
    cat >"$dir/config.toml" <<TOML
version = 2
root = "$dir/root"
state = "$dir/state"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
address = "$dir/socket"
[ttrpc]
address = "$dir/socket.ttrpc"
[proxy_plugins.ocifs]
type = "snapshot"
address = "$dir/snapshotter"
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "$dir/certs.d"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "ocifs"
disable_snapshot_annotations = false
TOML
    containerd --config "$dir/config.toml" --log-level warn >>"$dir/log" 2>&1 &
    CRI_CONTAINERD=$!
    # shellcheck disable=SC2034 # for the caller
    CRI_CTR=(ctr --address "$dir/socket" --namespace k8s.io)
    wait_until "containerd (its log: $dir/log)" "${CRI_CTR[@]}" version
}

# cri_pull DIR IMAGE: asks containerd to pull an image, with the gRPC message runtime.v1.PullImageRequest.
cri_pull() {
    local length=${#2} said
    ((length < 120)) || die "the name of the image is too long: $2"
    said=$({
        printf '\0\0\0\0%b' "\\x$(printf %02x $((length + 4)))"
        printf '\x0a%b\x0a%b%s' "\\x$(printf %02x $((length + 2)))" "\\x$(printf %02x "$length")" "$2"
    } | curl --silent --show-error --http2-prior-knowledge --unix-socket "$1/socket" --header 'content-type: application/grpc' \
        --header 'te: trailers' --data-binary @- --output /dev/null --dump-header - \
        http://localhost/runtime.v1.ImageService/PullImage)
    grep -qi '^grpc-status: 0' <<<"$said" || die "containerd cannot pull $2: $said"
}

# cri_stop DIR: ends both, and the mounts of the images, and removes DIR.
cri_stop() {
    local mount
    stop_process "${CRI_CONTAINERD:-0}"
    stop_process "${CRI_SNAPSHOTTER:-0}"
    for mount in "$1"/snapshots/images/*; do
        ! is_mounted "$mount" || unmount "$mount"
    done
    awk -v dir="$1/" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo | sort -r | xargs -r umount --lazy
    rm -rf --one-file-system "$1"
}
