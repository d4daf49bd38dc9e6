# shellcheck shell=bash
# Root file systems of the machine's own distribution release, from the machine's own apt sources, for the recipes.
# WORK is a directory for what the recipes share: the base tar, apt lists and packages, container storage.

export SOURCE_DATE_EPOCH=1700000000
# An architecture that is not this machine's. On Ubuntu those other than amd64's i386 come from other mirrors.
case $(. /etc/os-release && echo "$ID")-$(dpkg --print-architecture) in
ubuntu-amd64) FOREIGN_ARCH=i386 ;;
*-arm64) FOREIGN_ARCH=amd64 ;;
*) FOREIGN_ARCH=arm64 ;;
esac
export FOREIGN_ARCH

layout() { "$ROOT/tests/images/layout.py" "$@"; }

# apt_sources: the distribution's own lines of the machine's apt sources, whatever style they are written in.
apt_sources() {
    local origin uri release component
    for origin in Debian Ubuntu; do
        # shellcheck disable=SC2016 # apt expands these
        apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' "Origin: $origin"
    done | sort -u | while read -r uri release component; do
        [[ $release == "$(. /etc/os-release && echo "$VERSION_CODENAME")"* && $release != *-backports ]] || continue
        [[ $uri != mirror+file:* ]] || read -r uri _ <"${uri#mirror+file:}"
        echo "deb $uri $release $component"
    done | sort -u
}

# apt_settings: what the machine's apt is told about reaching its sources (proxies, certificates, clock).
apt_settings() { apt-config dump Acquire | grep -E '^Acquire::(http|https|Check|Retries)' || true; }

# mmdebstrap_here OPTION... TAR: a minimal root file system of this machine's release.
mmdebstrap_here() {
    local tar=${!#}
    [ -n "$(apt_sources)" ] || { apt-get -qq update && [ -n "$(apt_sources)" ]; } || die "no apt sources of a Debian or Ubuntu release found"
    apt_settings >"$WORK/apt.conf"
    apt_sources | mmdebstrap --quiet --aptopt="$WORK/apt.conf" "${@:1:$#-1}" "$(. /etc/os-release && echo "$VERSION_CODENAME")" "$tar.part" -
    mv "$tar.part" "$tar"
}

# base_tar: minbase of this release in $WORK/base.tar, made once. Docker, too, leaves resolv.conf and hosts empty in images.
base_tar() {
    [ -s "$WORK/base.tar" ] && return
    # shellcheck disable=SC2016 # mmdebstrap's shell expands these
    mmdebstrap_here --variant=minbase --include=ca-certificates --format=tar \
        --customize-hook='rm -f "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/hostname' \
        --customize-hook='for f in resolv.conf hosts; do rm -f "$1/etc/$f"; : >"$1/etc/$f"; done' "$WORK/base.tar"
}

# in_root ROOT COMMAND...: chroot with proc, dev, the machine's name resolution and certificates, and a tmp, an apt cache
# and lists that stay out of the image. Nothing is synced to disk: dpkg would spend most of the time on that.
in_root() {
    local root=$1
    shift
    mkdir -p "$WORK/apt/archives/partial" "$WORK/apt/lists/partial"
    # shellcheck disable=SC2016 # the inner shell expands these
    unshare --mount --propagation private bash -euc '
        root=$1 work=$2
        shift 2
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        mount -t tmpfs tmpfs "$root/tmp"
        mount --bind "$work/apt/archives" "$root/var/cache/apt/archives"
        mount --bind "$work/apt/lists" "$root/var/lib/apt/lists"
        for file in resolv.conf hosts; do mount --bind "$(readlink -f "/etc/$file")" "$root/etc/$file"; done
        cp -L /etc/ssl/certs/ca-certificates.crt /usr/lib/*-linux-gnu/libeatmydata.so "$work/apt.conf" "$root/tmp"
        exec chroot "$root" env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LC_ALL=C.UTF-8 \
            DEBIAN_FRONTEND=noninteractive APT_CONFIG=/tmp/apt.conf LD_PRELOAD=/tmp/libeatmydata.so SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" "$@"
    ' in_root "$root" "$WORK" "$@"
}

# apt_in ROOT PACKAGE...: installs, and removes what would differ from one build to the next.
apt_in() {
    local root=$1
    shift
    in_root "$root" apt-get -qq update
    in_root "$root" apt-get -qq install -y --no-install-recommends "$@" >"$WORK/apt.log" 2>&1 || {
        tail -20 "$WORK/apt.log" >&2
        die "apt-get install $* failed in the image"
    }
    rm -rf "$root"/var/log/{apt,dpkg.log,alternatives.log,bootstrap.log,fontconfig.log} "$root"/var/cache/{ldconfig/aux-cache,debconf/*-old}
    rm -f "$root"/var/lib/dpkg/*-old "$root"/var/cache/apt/*.bin
    settle "$root"
}

# settle ROOT: no time stamp is later than the epoch of the images.
settle() { find "$1" -xdev -newermt "@$SOURCE_DATE_EPOCH" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +; }

# Buildah with a storage of its own, away from the machine's containers.
storage() {
    local tool=$1
    shift
    "$tool" --log-level error --root "$WORK/storage" --runroot "$WORK/storage-run" "$@"
}

# release_storage: buildah leaves the storage mounted on itself, and so impossible to remove.
release_storage() { ! mountpoint -q "$WORK/storage/overlay" || umount "$WORK/storage/overlay"; }

# Histories are left out: buildah would write into them where the base came from.
#
# next_layer CONTAINER: commits what was changed as a layer and prints the name of a container over it.
next_layer() {
    local image
    image=$(storage buildah commit --quiet --rm --omit-history --timestamp "$SOURCE_DATE_EPOCH" "$1")
    storage buildah from --quiet "$image"
}

# finish CONTAINER LAYOUT: commits the last layer and writes the image.
finish() {
    storage buildah commit --quiet --rm --omit-history --disable-compression=false --timestamp "$SOURCE_DATE_EPOCH" "$1" "oci:$2:latest" >/dev/null
    layout bare "$2" latest
    storage buildah rmi --all --force >/dev/null
}
