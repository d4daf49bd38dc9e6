# shellcheck shell=bash
# Functions that the scripts for microVMs share, on top of lib.sh: QEMU, kernels, the initramfs, and the doors of an
# image. What they download and build stays in target/vm.

VM=$ROOT/target/vm
DOORS=(file nbd vhost-user-blk virtiofs)
# The suite of Debian that has a version of the kernel.
declare -A KERNEL_SUITES=([5.10]=bullseye [6.1]=bookworm [6.12]=bookworm-backports)
# Seconds that another script may take to download and unpack QEMU and a kernel.
LOCK_SECONDS=1200
# Seconds that a kernel may take under KVM to find out that it has no root.
PROBE_SECONDS=10

# need_vm [KERNEL_VERSION]: makes ready what a guest needs. Sets GUEST to a command that boots one, to which options of
# boot.py have to be added, and KERNEL and ACCELERATOR to what it boots with.
need_vm() {
    [ "$(dpkg --print-architecture)" = amd64 ] || die "the microVMs are only for amd64"
    KERNEL=${1:-$(release_kernel)}
    [ -n "${KERNEL_SUITES[$KERNEL]:-}" ] || die "no kernel $KERNEL; there are: $(printf '%s\n' "${!KERNEL_SUITES[@]}" | sort -V | paste -sd' ')"
    install_packages python3 jq kmod gcc libc6-dev debian-archive-keyring || return
    local busybox cpu=max version kernel_dir=$VM/kernel-$KERNEL initramfs=$VM/initramfs-$KERNEL lock
    mkdir -p "$VM"
    exec {lock}>"$VM/lock"
    flock -w "$LOCK_SECONDS" "$lock" || die "another script has been preparing $VM for $LOCK_SECONDS s"
    need_qemu
    [ -d "$kernel_dir" ] || unpack_kernel "$kernel_dir"
    command -v busybox >/dev/null || install_packages busybox-static
    busybox=$(command -v busybox)
    ! ldd "$busybox" >/dev/null 2>&1 || die "$busybox is not static, so it does not run in a guest: install busybox-static, which takes the place of busybox"
    gcc -Os -static -s -o "$VM/as-user" "$ROOT/scripts/vm/as-user.c"
    "$ROOT/scripts/vm/initramfs.py" "$kernel_dir" "$busybox" "$VM/as-user" "$initramfs"
    choose_accelerator "$kernel_dir"/boot/vmlinuz-*
    exec {lock}>&-
    # The emulation of cmpxchg16b in QEMU 7.2 damages the flags, and a kernel 6.12 crashes soon. QEMU 10.0 is right. No
    # version between them was tried.
    version=$("$QEMU" --version | sed -nE '1s/.* version ([0-9]+)\..*/\1/p')
    if [ "$ACCELERATOR" = tcg ] && ((version < 10)); then cpu=max,-cx16; fi
    # shellcheck disable=SC2034 # for the scripts
    GUEST=("$ROOT/scripts/vm/boot.py" --qemu "$QEMU" --accelerator "$ACCELERATOR" --cpu "$cpu"
        --kernel "$(echo "$kernel_dir"/boot/vmlinuz-*)" --initramfs "$initramfs")
}

# release_kernel: prints the version of the kernel that Debian has for the machine's release.
release_kernel() {
    case $(. /etc/os-release && echo "${VERSION_CODENAME:-}") in
    bullseye) echo 5.10 ;;
    trixie) echo 6.12 ;;
    *) echo 6.1 ;;
    esac
}

# debian_mirror: prints the address of the machine's mirror of Debian, or of the usual one.
debian_mirror() {
    # shellcheck disable=SC2016 # apt-get expands this
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' 'Component: main' |
        sed -n 1p | grep . || echo http://deb.debian.org/debian
}

# with_suite SUITE PROGRAM ARGUMENT...: runs a program of apt with the packages of one suite of Debian. It has its own
# lists, and does not know which packages are installed.
with_suite() {
    local dir=$VM/apt/$1
    mkdir -p "$dir/lists/partial" "$dir/archives/partial"
    echo "deb [target=Packages signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(debian_mirror) $1 main" >"$dir/sources.list"
    "$2" -qq -o "Dir::Etc::SourceList=$dir/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$dir/lists" \
        -o "Dir::Cache=$dir" -o Dir::State::status=/dev/null -o APT::Sandbox::User=root -o Acquire::Languages=none "${@:3}"
}

# unpack_kernel DIR: unpacks Debian's kernel for virtual machines, of the version KERNEL.
unpack_kernel() {
    local suite=${KERNEL_SUITES[$KERNEL]} new=$1.new package
    say "unpacking the kernel $KERNEL of Debian $suite"
    rm -rf --one-file-system "$new"
    mkdir -p "$new/package"
    with_suite "$suite" apt-get update
    package=$(with_suite "$suite" apt-cache show linux-image-cloud-amd64 | sed -n 's/^Depends: \(linux-image-[^ ]*\) .*/\1/p' | head -n 1)
    (cd "$new/package" && with_suite "$suite" apt-get download "$package")
    dpkg-deb -x "$new"/package/*.deb "$new"
    rm -rf "$new/package"
    depmod --basedir "$new" "$(ls "$new/lib/modules")"
    mv "$new" "$1"
}

# need_qemu: sets QEMU to the path of QEMU. If it cannot be installed, because it conflicts with an installed package,
# it is only unpacked.
need_qemu() {
    QEMU=$(command -v qemu-system-x86_64) && return
    QEMU=$VM/qemu/qemu-system-x86_64
    [ ! -x "$QEMU" ] || return 0
    if install_packages qemu-system-x86; then
        QEMU=$(command -v qemu-system-x86_64)
        return
    fi
    say "QEMU cannot be installed here, so it is unpacked into $VM/qemu"
    local new=$VM/qemu.new package
    rm -rf --one-file-system "$new"
    mkdir -p "$new/archives/partial"
    apt-get -qq install -y --download-only --no-install-recommends -o "Dir::Cache::archives=$new/archives" qemu-system-x86 >/dev/null
    for package in "$new"/archives/*.deb; do dpkg-deb -x "$package" "$new"; done
    rm -rf "$new/archives"
    # The checkout may be moved.
    cat >"$new/qemu-system-x86_64" <<'QEMU'
#!/bin/sh
usr=$(dirname "$0")/usr
export LD_LIBRARY_PATH=$usr/lib/x86_64-linux-gnu
exec "$usr/bin/qemu-system-x86_64" -L "$usr/share/qemu" -L "$usr/share/seabios" "$@"
QEMU
    chmod +x "$new/qemu-system-x86_64"
    mv "$new" "$VM/qemu"
}

# choose_accelerator KERNEL: sets ACCELERATOR to kvm if a kernel gets as far under KVM as to look for its root. On some
# machines /dev/kvm can be opened, but no guest runs. The answer is kept until the machine boots again.
choose_accelerator() {
    local answer boot log=$VM/kvm.log
    ACCELERATOR=tcg
    [ -w /dev/kvm ] || return 0
    boot=$(</proc/sys/kernel/random/boot_id)
    answer=$VM/accelerator
    if ! grep -qs "^$boot " "$answer"; then
        say "trying whether guests run under KVM"
        timeout -k 1 "$PROBE_SECONDS" "$QEMU" -machine q35 -accel kvm -cpu max -m 512M -nodefaults -no-user-config -display none -no-reboot \
            -kernel "$1" -append 'console=ttyS0 panic=-1 reboot=t' -serial stdio >"$log" 2>&1 </dev/null || true
        if grep -q 'Unable to mount root' "$log"; then ACCELERATOR=kvm; fi
        echo "$boot $ACCELERATOR" >"$answer"
    fi
    ACCELERATOR=$(cut -d' ' -f2 "$answer")
}

# find_virtiofsd: sets VIRTIOFSD to the path of virtiofsd. Fails if there is none. QEMU's package had one until 7.2.
find_virtiofsd() {
    local at
    for at in "$(command -v virtiofsd)" /usr/libexec/virtiofsd /usr/lib/qemu/virtiofsd "$VM/qemu/usr/lib/qemu/virtiofsd"; do
        [ ! -x "$at" ] || { VIRTIOFSD=$at && return; }
    done
    return 1
}

# known_door DOOR: ends the script if there is no such door.
known_door() { [[ " ${DOORS[*]} " == *" $1 "* ]] || die "no door called $1; there are: ${DOORS[*]}"; }

# choose_doors [DOOR...]: sets DOORS to the named ones, if there are any. Ends the script if one does not exist.
choose_doors() {
    local door
    for door in "$@"; do known_door "$door"; done
    (($# == 0)) || DOORS=("$@")
    CHOSEN=$#
}

# need_doors: makes sure that the chosen doors can be opened, after need_vm. Without virtiofsd, leaves virtiofs out of DOORS, or
# ends the script if it was named.
need_doors() {
    [[ " ${DOORS[*]} " == *' virtiofs '* ]] || return 0
    ! find_virtiofsd || return 0
    ((CHOSEN == 0)) || die "virtiofsd is missing: install the package virtiofsd"
    say "virtiofs is left out: there is no virtiofsd"
    mapfile -t DOORS < <(printf '%s\n' "${DOORS[@]}" | grep -vx virtiofs)
}

# open_door DOOR IMAGE DIR [OPTION...]: serves an image through a door, from the existing directory DIR, with options of
# ocifs. Sets AT to the file or socket for boot.py, and SERVED to the name of the disk or mount for `ocifs status`.
# close_door ends it.
open_door() {
    local served=$3/$1
    AT=$3/$1
    case $1 in
    file)
        mkdir -p "$served" && "$OCIFS" disk "${@:4}" --file "$served" "$2"
        AT=$served/rootfs.erofs
        ;;
    nbd | vhost-user-blk) "$OCIFS" disk "${@:4}" "--$1" "$AT" "$2" ;;
    virtiofs)
        mkdir -p "$served" && "$OCIFS" mount "${@:4}" --wait ready "$2" "$served"
        AT=$3/virtiofsd
        # It would fail to raise the limit of open files above the hard one.
        "$VIRTIOFSD" --socket-path="$AT" -o source="$served" -o cache=always --rlimit-nofile="$(ulimit -Hn)" >"$3/virtiofsd.log" 2>&1 </dev/null &
        VIRTIOFSD_PID=$!
        ;;
    esac
    SERVED=$served
    wait_until "$AT" test -e "$AT"
}

close_door() {
    local deadline=$((SECONDS + WAIT_SECONDS))
    [ -n "${SERVED:-}" ] || return 0
    [ -z "${VIRTIOFSD_PID:-}" ] || stop_process "$VIRTIOFSD_PID"
    # The server notices only after a moment that the machine has gone.
    until timeout "$WAIT_SECONDS" "$OCIFS" umount "$SERVED" 2>/dev/null; do
        if ((SECONDS > deadline)); then
            timeout "$WAIT_SECONDS" "$OCIFS" umount --lazy "$SERVED"
            break
        fi
        sleep 0.05
    done
    SERVED='' VIRTIOFSD_PID=''
}

# make_upper FILE: makes a disk for the changes of a guest.
make_upper() {
    install_packages e2fsprogs
    truncate -s 4G "$1"
    mkfs.ext4 -q "$1"
}
