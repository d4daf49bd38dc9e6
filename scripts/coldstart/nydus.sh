# shellcheck shell=bash
# shellcheck disable=SC2154 # work is the benchmark's directory
# Functions for nydusd as a FUSE mount. The two nydus systems of scripts/bench-coldstart put a writable overlay on it.
# Their blobs are in the registry. The bootstrap (all metadata) is on the host at time zero already, which favours nydus.
nydus_tools() { type -P nydusd nydus-image >/dev/null && install_packages curl; }

# nydus_push_blob FILE REGISTRY NAME: uploads a blob into the image's repository. The name of the file is its SHA-256.
nydus_push_blob() {
    local digest location
    digest=sha256:$(basename "$1")
    location=$("${AT_REGISTRY[@]}" curl --fail --silent --show-error --request POST --output /dev/null --write-out '%header{location}' "http://$2/v2/$3/blobs/uploads/")
    "${AT_REGISTRY[@]}" curl --fail --silent --show-error --upload-file "$1" --output /dev/null "$location&digest=$digest"
}

# nydus_serve DIR BOOTSTRAP BACKEND MOUNTPOINT: starts nydusd, with its state in DIR. BACKEND says in JSON where the
# blobs are. Sets NYDUSD to its process.
nydus_serve() {
    mkdir -p "$1/cache"
    # The shell writes the file: starting another program would count as nydus's time.
    cat >"$1/config.json" <<JSON
{"device": {
    "backend": $3,
    "cache": {"type": "blobcache", "config": {"work_dir": "$1/cache"}}},
 "mode": "direct", "digest_validate": false, "enable_xattr": true, "fs_prefetch": {"enable": true, "threads_count": 4}}
JSON
    nydusd fuse --rlimit-nofile 0 --thread-num 4 --log-level error --apisock "$1/api" --bootstrap "$2" \
        --config "$1/config.json" --mountpoint "$4" >"$1/log" 2>&1 &
    NYDUSD=$!
    wait_until "nydusd (its log: $1/log)" is_mounted "$4"
}

nydus_mount() {
    local bootstrap=$1 registry=$2 repository=$3 target=$4 dir=$work/nydus
    mkdir -p "$dir"/{lower,upper,work}
    nydus_serve "$dir" "$bootstrap" \
        "{\"type\": \"registry\", \"config\": {\"scheme\": \"http\", \"host\": \"$registry\", \"repo\": \"$repository\"}}" "$dir/lower"
    mount -t overlay -o "lowerdir=$dir/lower,upperdir=$dir/upper,workdir=$dir/work" overlay "$target"
}

nydus_used() {
    charge_process "$NYDUSD"
    charges
}

nydus_unmount() {
    local dir=$work/nydus
    ! is_mounted "$1" || umount "$1"
    ! is_mounted "$dir/lower" || umount --lazy "$dir/lower"
    stop_process "${NYDUSD:-0}"
    rm -rf --one-file-system "$dir"
}
