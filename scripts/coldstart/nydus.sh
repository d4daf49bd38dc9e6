# shellcheck shell=bash
# shellcheck disable=SC2154 # work is the benchmark's directory
# Functions that the two nydus systems share: nydusd as a FUSE mount with a writable overlay. Its blobs are in the
# registry. The bootstrap (all metadata) is on the host at time zero already, which favours nydus.
nydus_tools() { type -P nydusd nydus-image >/dev/null && install_packages curl; }

# nydus_push_blob FILE REGISTRY NAME: uploads a blob into the image's repository. The name of the file is its SHA-256.
nydus_push_blob() {
    local digest location
    digest=sha256:$(basename "$1")
    location=$("${AT_REGISTRY[@]}" curl --fail --silent --show-error --request POST --output /dev/null --write-out '%header{location}' "http://$2/v2/$3/blobs/uploads/")
    "${AT_REGISTRY[@]}" curl --fail --silent --show-error --upload-file "$1" --output /dev/null "$location&digest=$digest"
}

nydus_mount() {
    local bootstrap=$1 registry=$2 repository=$3 target=$4 dir=$work/nydus
    mkdir -p "$dir"/{cache,lower,upper,work}
    # The shell writes the file: starting another program would count as nydus's time.
    cat >"$dir/config.json" <<JSON
{"device": {
    "backend": {"type": "registry", "config": {"scheme": "http", "host": "$registry", "repo": "$repository"}},
    "cache": {"type": "blobcache", "config": {"work_dir": "$dir/cache"}}},
 "mode": "direct", "digest_validate": false, "enable_xattr": true, "fs_prefetch": {"enable": true, "threads_count": 4}}
JSON
    nydusd fuse --rlimit-nofile 0 --thread-num 4 --log-level error --apisock "$dir/api" --bootstrap "$bootstrap" \
        --config "$dir/config.json" --mountpoint "$dir/lower" >"$dir/log" 2>&1 &
    NYDUSD=$!
    wait_until "nydusd (its log: $dir/log)" is_mounted "$dir/lower"
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
