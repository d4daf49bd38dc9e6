# shellcheck shell=bash
# Functions that the scripts share. A script sources this file. It only defines functions and variables, and sets the
# exit trap that runs the `on_exit` actions.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# rustup's directory, also for a user who runs the script through sudo.
PATH=$PATH:${CARGO_HOME:-$(getent passwd "${SUDO_USER:-$(id -un)}" | cut -d: -f6)/.cargo}/bin
# Numbers and sorting do not depend on the machine's language.
export LC_ALL=C.UTF-8
APT_LOCK_SECONDS=300
WAIT_SECONDS=30

# say TEXT: prints a heading, in bold on a terminal unless NO_COLOR is set.
say() {
    if [ -t 2 ] && [ -z "${NO_COLOR:-}" ]; then
        printf '\033[1m== %s\033[0m\n' "$*" >&2
    else
        printf '== %s\n' "$*" >&2
    fi
}

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Actions that run at the end of the script, however it ends. The action that was added last runs first.
EXIT_ACTIONS=()
on_exit() { EXIT_ACTIONS+=("$(printf '%q ' "$@")"); }
run_exit_actions() {
    local i
    for ((i = ${#EXIT_ACTIONS[@]} - 1; i >= 0; i--)); do eval "${EXIT_ACTIONS[i]}" || true; done
}
trap run_exit_actions EXIT

need_root() { [ "$(id -u)" = 0 ] || die "$0 needs root: it installs packages, mounts, and keeps file owners"; }

# temp_dir: makes a directory, which the script removes at its end. Sets TEMP_DIR to its path. (It does not print the
# path, because a subshell could not register the removal.)
temp_dir() {
    TEMP_DIR=$(mktemp -d "${TMPDIR:-/tmp}/ocifs-XXXXXX")
    on_exit rm -rf --one-file-system "$TEMP_DIR"
}

# wait_until DESCRIPTION COMMAND...: repeats a command until it succeeds. Fails after WAIT_SECONDS.
wait_until() {
    local what=$1 deadline=$((SECONDS + WAIT_SECONDS))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || die "waited $WAIT_SECONDS s in vain for $what"
        sleep 0.01
    done
}

# install_packages PACKAGE...: installs Debian packages that are missing.
install_packages() {
    local missing=() package
    for package; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    command -v apt-get >/dev/null || die "please install: ${missing[*]} (only apt-get is known here)"
    need_root
    say "installing ${missing[*]}"
    local apt=(apt-get -qq -o "DPkg::Lock::Timeout=$APT_LOCK_SECONDS")
    # apt-get does not remove packages that conflict. (`|| return` is needed because in a condition the shell would go
    # on after an error.)
    "${apt[@]}" update || return
    DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-remove --no-install-recommends "${missing[@]}" >/dev/null
}

# build_ocifs: builds the release binary and sets OCIFS to its path. If OCIFS is already set, nothing is built.
build_ocifs() {
    install_packages fuse3 jq gcc libc6-dev || return
    [ -c /dev/fuse ] || modprobe fuse 2>/dev/null || die "/dev/fuse is missing: load the fuse module, or give the container the device"
    [ -z "${OCIFS:-}" ] || return 0
    command -v cargo >/dev/null || die "a Rust toolchain is needed: https://rustup.rs"
    say "building ocifs"
    cargo build --release --locked --quiet --manifest-path "$ROOT/Cargo.toml" || die "ocifs does not build"
    local target
    target=$(cargo metadata --format-version 1 --no-deps --manifest-path "$ROOT/Cargo.toml" | jq -r .target_directory)
    export OCIFS=$target/release/ocifs
}

# listening_port PID: prints the TCP port that a process listens on, in the network namespace of that process.
listening_port() {
    local inode
    for inode in $(find "/proc/$1/fd" -lname 'socket:*' -printf '%l\n' | tr -dc '0-9\n'); do
        awk -v inode="$inode" '$4 == "0A" && $10 == inode { n = split($2, part, ":"); print part[n]; found = 1; exit }
            END { exit !found }' "/proc/$1/net/tcp" "/proc/$1/net/tcp6" 2>/dev/null | { read -r hex && echo $((16#$hex)); } && return
    done
    return 1
}

# start_registry DIR [ADDRESS [COMMAND_PREFIX...]]: starts a docker-registry over DIR. It listens at ADDRESS, on an
# ephemeral port unless ADDRESS names one; the default is loopback. A prefix such as `ip netns exec NS` starts it
# elsewhere. Sets REGISTRY to its host:port and REGISTRY_PID to its process, which ends with the script.
# DIR/registry.log has the requests and the sizes of the responses.
start_registry() {
    local dir=$1 address=${2:-127.0.0.1} pid
    [[ $address == *:* ]] || address+=:0
    shift $(($# > 1 ? 2 : 1))
    install_packages docker-registry curl
    mkdir -p "$dir"
    cat >"$dir/registry.yml" <<YAML
version: 0.1
log: { level: info, accesslog: { disabled: false } }
storage: { filesystem: { rootdirectory: $dir/data }, cache: { blobdescriptor: inmemory }, delete: { enabled: true } }
http: { addr: "$address" }
YAML
    "$@" docker-registry serve "$dir/registry.yml" >"$dir/registry.log" 2>&1 &
    pid=$!
    # shellcheck disable=SC2034 # for scripts that end it before their end
    REGISTRY_PID=$pid
    on_exit stop_process "$pid"
    wait_until "the registry (its log: $dir/registry.log)" listening_port "$pid"
    REGISTRY=${address%:*}:$(listening_port "$pid")
    wait_until "an answer of $REGISTRY" curl --fail --silent --max-time 5 "http://$REGISTRY/v2/"
}

# stop_process PID: ends a background process of this shell. Checks first that the process is still a job of this
# shell: after a wait, another process may have its id.
stop_process() {
    jobs -p | grep -qx "$1" || return 0
    kill "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
}

# is_mounted DIR: looks in the mount table. A call to the file system would fail if its process is dead, and hang if
# its process hangs.
is_mounted() { awk -v dir="$1" '$5 == dir { found = 1 } END { exit !found }' /proc/self/mountinfo; }

# unmount MOUNTPOINT: takes an ocifs mount down. Does nothing if there is none.
unmount() { ! is_mounted "$1" || timeout 60 "$OCIFS" umount "$1" || umount --lazy "$1"; }

# push LAYOUT:REF NAME: copies an image, or all images of an image index, into the registry as they are. The prefix
# AT_REGISTRY, if set, reaches the registry without the link.
push() {
    "${AT_REGISTRY[@]}" skopeo --insecure-policy copy --quiet --all --preserve-digests --dest-tls-verify=false "oci:$1" "docker://$REGISTRY/$2"
}
