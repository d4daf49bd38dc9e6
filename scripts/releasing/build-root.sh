# shellcheck shell=bash
# The root file system in which static programs are compiled: Debian 12 with its newest Rust, the source of Rust's standard
# library, and zig as the C compiler and linker for musl.

STATIC=$ROOT/target/static
BUILD_ROOT=$STATIC/root
ZIG=$STATIC/zig
BUILD_PACKAGES=rustc-web,cargo-web,rust-web-src,gcc,libc6-dev
# From PyPI, whose wheels have the programs themselves.
WHEELS=(ziglang==0.15.2 cargo-zigbuild==0.24.1)

# make_build_root: makes it, unless it is there. Fetches the crates, because nothing is fetched inside.
make_build_root() {
    local library
    if [ ! -e "$BUILD_ROOT.made" ]; then
        say "making a root file system with Rust of Debian 12"
        rm -rf --one-file-system "$BUILD_ROOT"
        mmdebstrap --quiet --variant=minbase --include="$BUILD_PACKAGES" \
            --keyring=/usr/share/keyrings/debian-archive-keyring.gpg bookworm "$BUILD_ROOT" \
            'deb http://deb.debian.org/debian bookworm main' 'deb http://deb.debian.org/debian-security bookworm-security main' ||
            die "no root file system to compile in: mmdebstrap failed"
        mkdir -p "$BUILD_ROOT"/{src,cargo,target,zig}
        touch "$BUILD_ROOT.made"
    fi
    if [ ! -e "$ZIG/made" ]; then
        say "installing zig"
        rm -rf "$ZIG"
        python3 -m pip install --quiet --no-deps --target "$ZIG" "${WHEELS[@]}" || die "zig cannot be installed"
        touch "$ZIG/made"
    fi
    cargo fetch --quiet --locked
    # The manifest of the standard library uses features that only its own cargo may.
    library=$(echo "$BUILD_ROOT"/usr/src/rustc-*/library)
    RUSTC_BOOTSTRAP=1 cargo fetch --quiet --locked --manifest-path "$library/Cargo.toml"
}

# in_build_root COMMAND...: runs a command there, in the source of ocifs, without a network. Paths are the same on every
# machine, so programs that contain some are the same as well. RUSTC_BOOTSTRAP lets a released
# compiler build the standard library.
in_build_root() {
    # shellcheck disable=SC2016 # the inner shell expands these
    unshare --mount --net --propagation private bash -euc '
        root=$1 source=$2 target=$3 zig=$4 cargo=$5
        shift 5
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        mount --bind "$source" "$root/src"
        mount --bind "$target" "$root/target"
        mount --bind "$zig" "$root/zig"
        mount --bind "$cargo" "$root/cargo"
        exec chroot "$root" env -i -C /src "$@"
    ' in_build_root "$BUILD_ROOT" "$ROOT" "$STATIC" "$ZIG" "${CARGO_HOME:-$HOME/.cargo}" \
        HOME=/root PATH=/zig/bin:/zig/ziglang:/usr/bin:/bin LC_ALL=C.UTF-8 \
        CARGO_HOME=/cargo CARGO_NET_OFFLINE=true CARGO_TARGET_DIR=/target \
        RUSTC_BOOTSTRAP=1 SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-0}" "$@" </dev/null
}
