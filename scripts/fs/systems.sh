# shellcheck shell=bash
# shellcheck disable=SC2154 # work, ext4, tree, disk and image are of scripts/bench-fs
# The systems that scripts/bench-fs compares. For each there are two functions. In their names, _ stands for -.
#
#   NAME_missing       prints why the system cannot run here, or nothing; may install Debian packages
#   NAME_start DIR     shows the image's tree at DIR, with all data on this machine, until the script ends
#
# $tree is a copy of the tree on ext4. $ext4 is a directory of the same file system for other files. $disk is the tree
# as an EROFS file. $image is the image as ocifs names it.

# release DIR: unmounts what is mounted on a directory.
release() { ! is_mounted "$1" || umount "$1" 2>/dev/null || umount --lazy "$1"; }

# logged COMMAND...: runs a command that leaves a server behind. The server must not inherit the script's output: who
# reads that from a pipe would wait for the server. Prints the output if the command fails.
logged() { "$@" </dev/null >"$work/log" 2>&1 || { cat "$work/log" >&2 && return 1; }; }

# mount_loop FILE DIR [OPTION...]: mounts the file system in a file through a loop device. The device reads and writes
# the file past the page cache, so that data is cached once, as from a disk.
mount_loop() {
    local device
    device=$(losetup --find --show --direct-io=on "$1")
    # A device that is in use is detached at its unmount.
    mount "${@:3}" "$device" "$2" || { losetup --detach "$device" && return 1; }
    losetup --detach "$device"
}

ext4_missing() { :; }
ext4_start() {
    on_exit release "$1"
    mount --bind "$tree" "$1"
}

overlayfs_missing() { grep -qw overlay /proc/filesystems || modprobe overlay 2>/dev/null || echo "the kernel has no overlayfs"; }
overlayfs_start() {
    mkdir -p "$ext4"/overlayfs/{upper,work}
    on_exit release "$1"
    mount -t overlay -o "lowerdir=$tree,upperdir=$ext4/overlayfs/upper,workdir=$ext4/overlayfs/work" overlay "$1"
}

# ocifs_start DIR OPTION...
ocifs_start() {
    on_exit unmount "$1"
    logged "$OCIFS" mount "${@:2}" --prefetch all --wait complete "$image" "$1"
}
has_via() { [[ $("$OCIFS" mount --help) == *--via* ]]; }

ocifs_fuse_missing() { :; }
ocifs_fuse_start() { if has_via; then ocifs_start "$1" --via fuse; else ocifs_start "$1"; fi; }

ocifs_erofs_missing() { if has_via; then erofs_missing; else echo "this ocifs has no --via"; fi; }
ocifs_erofs_start() { ocifs_start "$1" --via erofs; }

erofs_missing() { grep -qw erofs /proc/filesystems || modprobe erofs 2>/dev/null || echo "the kernel has no EROFS"; }
# From 6.12 on, the kernel mounts a file without a loop device, but mount(8) makes one all the same.
erofs_start() {
    on_exit release "$1"
    python3 -c '
import ctypes, os, sys
MS_RDONLY = 1
libc = ctypes.CDLL(None)
sys.exit(libc.mount(*map(os.fsencode, sys.argv[1:]), b"erofs", MS_RDONLY, None) != 0)' "$disk" "$1" ||
        mount_loop "$disk" "$1" -t erofs -o ro
}

fuse_overlayfs_missing() { (install_packages fuse-overlayfs) >/dev/null || echo "there is no fuse-overlayfs"; }
fuse_overlayfs_start() {
    mkdir -p "$ext4"/fuse-overlayfs/{upper,work}
    on_exit release "$1"
    logged fuse-overlayfs -o "lowerdir=$tree,upperdir=$ext4/fuse-overlayfs/upper,workdir=$ext4/fuse-overlayfs/work" "$1"
}

nydus_missing() { type -P nydusd nydus-image >/dev/null || echo "nydusd and nydus-image are not installed"; }
# nydus on an image that was converted to nydus's own format. Its first pass over the files fills its cache.
nydus_start() {
    local dir=$ext4/nydus
    mkdir -p "$dir/blobs"
    nydus-image create -t dir-rafs -v 6 --log-level error --blob-dir "$dir/blobs" -B "$dir/bootstrap" "$tree" >/dev/null
    on_exit nydus_end "$1"
    nydus_serve "$dir" "$dir/bootstrap" "{\"type\": \"localfs\", \"config\": {\"dir\": \"$dir/blobs\"}}" "$1"
}
nydus_end() {
    release "$1"
    stop_process "${NYDUSD:-0}"
}
