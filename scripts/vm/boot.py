#!/usr/bin/python3
"""scripts/vm/boot.py OPTION... [COMMAND...]: boots a guest from a disk of an image, runs a command in it, and ends it.

--qemu PROGRAM --accelerator kvm|tcg --cpu MODEL --kernel FILE --initramfs FILE: what to boot with
--door file|nbd|vhost-user-blk|virtiofs --at PATH: the image's root, as a file or as the socket of a server
--config FILE: the image's OCI config; a COMMAND takes the place of its Cmd
--upper tmpfs|FILE: what takes the changes: memory of the guest, or a file with ext4
--port HOST:GUEST: forwards a TCP port of the host's loopback, may be repeated
--log FILE: gets the guest's console and QEMU's messages
--json: prints one object instead of the command's output

Output, errors and exit status of the command become those of this program. If there is no such status, this program's
is 125. The object has the status as exit, stdout, stderr, and as at the seconds from the start of QEMU to these moments:
modules (the guest's kernel modules are loaded), mounted (the image's root is), started (the command is), output (the
first byte of its output came), exit.
"""

import argparse
import json
import os
import pathlib
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time

from initramfs import archive

MEMORY = "1G"
# Seconds until the command must have started. A slow disk has its own, shorter limit for each read.
START_SECONDS = 300
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# QEMU's user network gives the guest this address. The guest reaches nothing but the forwarded connections.
ADDRESS = "10.0.2.15/24"
NO_STATUS = 125
PORTS = ("events", "stdout", "stderr")


def fail(text):
    print(f"error: {text}", file=sys.stderr)
    sys.exit(NO_STATUS)


def parse():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("qemu", "accelerator", "cpu", "kernel", "initramfs", "door", "at", "config", "upper", "log"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--port", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser.parse_args()


def command_file(config, command):
    """Returns what run in the guest needs of an image's config, as shell."""
    config = config.get("config") or {}
    argv = (config.get("Entrypoint") or []) + (command or config.get("Cmd") or [])
    if not argv:
        fail("the image has neither an entrypoint nor a command, so give a COMMAND")
    environment = [f"PATH={DEFAULT_PATH}"] + [word for word in config.get("Env") or [] if "=" in word]
    return "".join(
        f"{line}\n"
        for line in (
            f"user={shlex.quote(config.get('User') or '')}",
            f"workdir={shlex.quote(config.get('WorkingDir') or '/')}",
            f"set -- {shlex.join(environment + argv)}",
        )
    ).encode()


def devices(options):
    """Returns QEMU's options for the guest's disks and network, and the words of the kernel's command line for them."""
    shared = ["-object", f"memory-backend-memfd,id=memory,share=on,size={MEMORY}", "-machine", "memory-backend=memory"]
    disk, lower, next_disk = [], "/dev/vda", "/dev/vdb"
    if options.door == "file":
        disk = ["-blockdev", f"driver=file,node-name=root,read-only=on,filename={options.at}", "-device", "virtio-blk-pci,drive=root"]
    elif options.door == "nbd":
        disk = ["-blockdev", f"driver=nbd,node-name=root,read-only=on,server.type=unix,server.path={options.at}",
                "-device", "virtio-blk-pci,drive=root"]
    elif options.door == "vhost-user-blk":
        disk = [*shared, "-chardev", f"socket,id=root,path={options.at}", "-device", "vhost-user-blk-pci,chardev=root"]
    elif options.door == "virtiofs":
        disk = [*shared, "-chardev", f"socket,id=root,path={options.at}", "-device", "vhost-user-fs-pci,chardev=root,tag=root"]
        lower, next_disk = "virtiofs:root", "/dev/vda"
    else:
        fail(f"no door called {options.door}")
    upper = "tmpfs"
    if options.upper != "tmpfs":
        disk += ["-blockdev", f"driver=file,node-name=upper,filename={options.upper}", "-device", "virtio-blk-pci,drive=upper"]
        upper = next_disk
    words = [f"lower={lower}", f"upper={upper}"]
    if options.port:
        forwards = ""
        for port in options.port:
            host, _, guest = port.partition(":")
            forwards += f",hostfwd=tcp:127.0.0.1:{host}-:{guest}"
        disk += ["-netdev", f"user,id=network,restrict=on{forwards}", "-device", "virtio-net-pci,netdev=network,romfile="]
        words.append(f"address={ADDRESS}")
    return disk, words


class Guest:
    """A running QEMU, and what it has said so far."""

    def __init__(self, options, directory):
        initrd = pathlib.Path(directory, "initramfs")
        config = json.loads(pathlib.Path(options.config).read_text(encoding="utf-8"))
        command = archive([("vm/command", 0o100644, command_file(config, options.command))])
        initrd.write_bytes(pathlib.Path(options.initramfs).read_bytes() + command)
        disk, words = devices(options)
        append = " ".join(["console=ttyS0 quiet panic=-1 reboot=t tsc=reliable no_timer_check", *words])
        arguments = [options.qemu, "-machine", "q35", "-accel", options.accelerator, "-cpu", options.cpu, "-smp", "1", "-m", MEMORY, "-nodefaults",
                     "-no-user-config", "-display", "none", "-no-reboot", "-kernel", options.kernel, "-initrd", str(initrd), "-append", append,
                     "-chardev", f"file,id=console,path={options.log},append=on", "-serial", "chardev:console", "-device", "virtio-serial-pci"]
        self.selector = selectors.DefaultSelector()
        passed = []
        for number, port in enumerate(PORTS, 1):
            ours, theirs = socket.socketpair()
            self.selector.register(ours, selectors.EVENT_READ, port)
            passed.append(theirs)
            arguments += ["-chardev", f"socket,id={port},fd={theirs.fileno()}", "-device", f"virtserialport,chardev={port},nr={number}"]
        self.json = options.json
        self.at, self.status, self.failure, self.events = {}, None, None, b""
        self.text = {"stdout": bytearray(), "stderr": bytearray()}
        with open(options.log, "ab") as log:
            self.begin = time.monotonic()
            self.process = subprocess.Popen([*arguments, *disk], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            pass_fds=[end.fileno() for end in passed])
        for end in passed:
            end.close()

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def event(self, line):
        what, _, text = line.decode(errors="replace").partition(" ")
        self.at[what] = round(time.monotonic() - self.begin, 4)
        if what == "exit":
            self.status = int(text)
        elif what == "failed":
            self.failure = text

    def take(self, port, data):
        if port == "events":
            *lines, self.events = (self.events + data).split(b"\n")
            for line in lines:
                self.event(line)
            return
        self.at.setdefault("output", round(time.monotonic() - self.begin, 4))
        if self.json:
            self.text[port] += data
        else:
            stream = getattr(sys, port).buffer
            stream.write(data)
            stream.flush()

    def run(self):
        """Passes on what the guest says until the command has ended. Returns the command's status."""
        while self.selector.get_map():
            limit = None if "started" in self.at else max(0, self.begin + START_SECONDS - time.monotonic())
            ready = self.selector.select(limit)
            if not ready:
                self.failure = f"the command did not start in {START_SECONDS} s"
                break
            for key, _ in ready:
                try:
                    data = key.fileobj.recv(65536)
                except ConnectionResetError:
                    data = b""
                if data:
                    self.take(key.data, data)
                else:
                    self.selector.unregister(key.fileobj)
            # All output was in the sockets before this was said. Without QEMU, their end is reached.
            if self.status is not None or self.failure:
                self.end()
        return self.status


def main():
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="ocifs-") as directory:
        guest = Guest(options, directory)
        try:
            status = guest.run()
        finally:
            guest.end()
    if status is None:
        fail(f"{guest.failure or 'the guest ended before its command'}; its console: {options.log}")
    if options.json:
        text = {port: content.decode(errors="replace") for port, content in guest.text.items()}
        print(json.dumps({"exit": status, **text, "at": guest.at}))
    sys.exit(status)


if __name__ == "__main__":
    main()
