#!/usr/bin/env python3
"""Mounts, reads, breaks things and judges for scripts/soak. That script starts this one and describes it."""

import argparse
import collections
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time

from proxy import FAULTS

TIMEOUT = 5
# Longest time of a read in seconds. A read may take the timeout, and longer when 20 mounts share few cores.
LONGEST_READ = 3 * TIMEOUT
CACHE = 96 << 20
# Bytes by which the cache may exceed its limit at any time.
CACHE_SLACK = 32 << 20
READERS = 6
# Number of mounts that stay from the beginning to the end, for measuring.
LASTING = 4
CHAOS, CALM = 8, TIMEOUT + 3
READ_ALL = 60


class Mount:
    """A mount point and the image that is mounted on it."""

    def __init__(self, number, path):
        self.number = number
        self.path = path
        self.image = None
        self.pid = None
        # Grows with every change. So a reader that gets an error can tell whether the mount was taken down meanwhile.
        self.changes = 0


class Problems:
    """Failures that were found, counted by kind."""

    def __init__(self):
        self.lock = threading.Lock()
        self.counts = collections.Counter()

    def add(self, kind, text):
        with self.lock:
            self.counts[kind] += 1
            count = self.counts[kind]
        if count <= 20:
            print(f"{time.strftime('%T')} {kind}: {text}", flush=True)


class Soak:
    def __init__(self, options):
        self.options = options
        self.random = random.Random(options.seed)
        self.problems = Problems()
        self.work = options.work
        self.store = f"{self.work}/store"
        self.images = {name: tree(f"{self.work}/oracle-{name}") for name in options.images.split()}
        self.large = {name: largest(f"{self.work}/oracle-{name}", paths) for name, paths in self.images.items()}
        self.counts = collections.Counter()
        self.count_lock = threading.Lock()
        self.end = threading.Event()
        # Monotonic time at which the registry was last broken; infinity while it is broken.
        self.ill = 0.0
        self.reading = {}
        self.longest = 0.0
        self.samples = collections.defaultdict(list)
        self.usage = 0
        self.proxy = None
        self.port = 0

    # --- commands

    def run(self, *arguments, wait=120):
        environment = {"PATH": os.environ["PATH"], "HOME": self.work, "OCIFS_CONFIG": "/dev/null"}
        options = [f"--store={self.store}", f"--timeout={TIMEOUT}s", f"--cache-size={CACHE}", "--memory=16MiB"]
        command = [self.options.ocifs, *arguments[:1], *options, *arguments[1:]]
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            out, err = process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            self.problems.add("command hangs", " ".join(arguments))
            return None, "", ""
        return process.returncode, out, err

    def reference(self, image):
        return f"127.0.0.1:{self.port}/{image}:latest"

    def mount(self, mount):
        """Mounts a random image and returns whether that worked. A failure while the registry works is a problem."""
        image = self.random.choice(sorted(self.images))
        options = [f"--prefetch={self.random.choice(['none', 'profile', 'profile', 'all'])}"]
        if self.random.random() < 0.2:
            options.append("--writable")
        began = time.monotonic()
        code, _, err = self.run("mount", *options, self.reference(image), mount.path)
        if code != 0:
            if not self.excused(began):
                self.problems.add("mount fails", f"{image}: {err.strip()}")
            return False
        code, out, err = self.run("status", "--json", mount.path)
        if code != 0:
            self.problems.add("no status", f"{mount.path}: {err.strip()}")
            return False
        mount.pid = json.loads(out)["pid"]
        mount.image = image
        mount.changes += 1
        return True

    def unmount(self, mount, lazy=False):
        mount.image = None
        mount.changes += 1
        code, _, err = self.run("umount", *(["--lazy"] if lazy else []), mount.path)
        if code != 0 and "busy" in err and not lazy:
            return self.unmount(mount, lazy=True)
        if code != 0:
            self.problems.add("unmount fails", f"{mount.path}: {err.strip()}")
        return code == 0

    # --- the registry

    def start_proxy(self):
        upstream = self.options.registry.rsplit(":", 1)[1]
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "proxy.py")
        self.proxy = subprocess.Popen(
            [sys.executable, script, str(self.port), upstream], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.port = int(self.proxy.stdout.readline())

    def set_fault(self, name):
        self.proxy.stdin.write(f"{name}\n")
        self.proxy.stdin.flush()

    def excused(self, began):
        """Returns whether something that began then may fail. It may if the registry was broken since, or shortly before:
        a request from that time may still fail."""
        return self.ill > began - TIMEOUT - 1

    # --- reading

    def read(self, number):
        choose = random.Random(self.options.seed * 1000 + number)
        while not self.end.is_set():
            mount = choose.choice(self.mounts)
            image, changes = mount.image, mount.changes
            if image is None:
                time.sleep(0.01)
                continue
            path, kind = choose.choice(self.images[image] if choose.random() < 0.5 else self.large[image])
            began = time.monotonic()
            self.reading[number] = (began, mount, path)
            try:
                same = self.compare(choose, mount, image, path, kind)
            except OSError as error:
                same = None
                self.reading[number] = None
                if mount.changes == changes and not self.excused(began):
                    self.problems.add("error", f"{mount.image} {path}: {error}")
                self.count("errors while something was broken")
            self.reading[number] = None
            took = time.monotonic() - began
            self.longest = max(self.longest, took)
            if same is False and mount.changes == changes:
                self.problems.add("wrong", f"{image} {path}")
            self.count("reads")

    def compare(self, choose, mount, image, path, kind):
        """Returns whether the mount and the reference are equal at a path."""
        here, there = os.path.join(mount.path, path), os.path.join(f"{self.work}/oracle-{image}", path)
        if kind == stat.S_IFDIR:
            return sorted(os.listdir(here)) == sorted(os.listdir(there))
        if kind == stat.S_IFLNK:
            return os.readlink(here) == os.readlink(there)
        if kind != stat.S_IFREG or choose.random() < 0.05:
            facts = lambda s: (s.st_mode, s.st_uid, s.st_gid, s.st_size if kind == stat.S_IFREG else 0, int(s.st_mtime))
            return facts(os.lstat(here)) == facts(os.lstat(there))
        size = os.stat(there).st_size
        offset, length = choose.randrange(size + 1), choose.randrange(1, 256 << 10)
        if choose.random() < 0.05:
            offset, length = 0, size
        descriptor = os.open(here, os.O_RDONLY)
        try:
            if choose.random() < 0.5:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            got = read_all(descriptor, length, offset)
        finally:
            os.close(descriptor)
        with open(there, "rb") as file:
            wanted = os.pread(file.fileno(), length, offset)
        self.count("bytes", len(got))
        return got == wanted

    def count(self, what, number=1):
        with self.count_lock:
            self.counts[what] += number

    # --- breaking

    def break_something(self):
        choice = self.random.random()
        if choice < 0.40:
            fault = self.random.choice(FAULTS)
            self.count(f"fault {fault}")
            self.during_illness(lambda: self.set_fault(fault), lambda: self.set_fault(""))
        elif choice < 0.48:
            self.count("server stopped")
            send = self.proxy.send_signal
            self.during_illness(lambda: send(signal.SIGSTOP), lambda: send(signal.SIGCONT))
        elif choice < 0.56:
            self.count("network gone")
            self.during_illness(self.stop_proxy, self.start_proxy)
        elif choice < 0.66:
            self.kill_a_mount()
        elif choice < 0.80:
            mount = self.random.choice(self.mounts[LASTING:])
            self.count("remounts")
            self.unmount(mount)
            self.mount(mount)
        elif choice < 0.92:
            arguments = self.random.choice([["drop"], ["prune", f"--to={8 << 20}"], ["prune", f"--to={48 << 20}"], ["list"]])
            self.count("evictions")
            code, _, err = self.run("cache", *arguments)
            if code != 0:
                self.problems.add("cache command fails", f"{arguments}: {err.strip()}")
        else:
            self.kill_a_pull()

    def stop_proxy(self):
        self.proxy.kill()
        self.proxy.wait()

    def during_illness(self, begin, end):
        self.ill = float("inf")
        begin()
        self.end.wait(self.random.uniform(0.5, 3))
        end()
        self.ill = time.monotonic()

    def kill_a_mount(self):
        mount = self.random.choice(self.mounts[LASTING:])
        if mount.image is None:
            return
        self.count("mounts killed")
        mount.image = None
        mount.changes += 1
        os.kill(mount.pid, signal.SIGKILL)
        while measure(mount.pid) is not None:
            time.sleep(0.01)
        if self.unmount(mount):
            self.mount(mount)

    def kill_a_pull(self):
        self.count("pulls killed")
        self.run("cache", "drop", "--all")
        command = [self.options.ocifs, "pull", "-q", f"--store={self.store}", f"--cache-size={CACHE}"]
        pull = subprocess.Popen([*command, self.reference(self.random.choice(sorted(self.images)))], stdout=subprocess.DEVNULL)
        time.sleep(self.random.uniform(0.05, 1.5))
        pull.kill()
        pull.wait()

    # --- measuring

    def watch(self):
        """Checks every second for reads that hang, and measures the lasting mounts and the store."""
        reported = set()
        while not self.end.wait(1):
            for number, reading in list(self.reading.items()):
                if reading and time.monotonic() - reading[0] > LONGEST_READ and reading not in reported:
                    reported.add(reading)
                    self.problems.add("hangs", f"{reading[1].image} {reading[2]} for {LONGEST_READ} s")
            for mount in self.mounts[:LASTING]:
                self.samples[mount.number].append(measure(mount.pid))
            usage = cache_usage(self.store)
            self.usage = max(self.usage, usage)
            if usage > CACHE + CACHE_SLACK:
                self.problems.add("cache too large", f"{usage >> 20} MiB of {CACHE >> 20} MiB")

    def judge_growth(self):
        """Compares what the lasting mounts took near the end with what they took once warm."""
        grown = []
        for number, samples in self.samples.items():
            if None in samples or len(samples) < 8:
                self.problems.add("mount gone", f"mount {number} did not last")
                continue
            quarter = len(samples) // 4
            warm, late = samples[quarter : 2 * quarter], samples[-quarter:]
            for what, at, slack in [("MiB of memory", 0, 24), ("descriptors", 1, 16), ("threads", 2, 16)]:
                before, after = (max(sample[at] for sample in part) for part in (warm, late))
                grown.append((what, before, after))
                if after > before * 1.25 + slack:
                    self.problems.add("grows", f"mount {number}: {before} -> {after} {what}")
        return grown

    # --- the whole run

    def go(self):
        self.start_proxy()
        self.mounts = []
        for number in range(self.options.mounts):
            path = f"{self.work}/mnt/{number}"
            os.makedirs(path)
            self.mounts.append(Mount(number, path))
        began = time.monotonic()
        for mount in self.mounts:
            self.mount(mount)
        readers = [threading.Thread(target=self.read, args=(number,), daemon=True) for number in range(READERS)]
        watcher = threading.Thread(target=self.watch, daemon=True)
        for thread in [*readers, watcher]:
            thread.start()
        while time.monotonic() - began < self.options.minutes * 60:
            chaos = time.monotonic() + CHAOS
            while time.monotonic() < chaos:
                self.break_something()
                time.sleep(self.random.uniform(0, 0.5))
            for mount in self.mounts:
                if mount.image is None and not self.mount(mount):
                    self.unmount(mount, lazy=True)
            time.sleep(CALM)
        # The registry works again, so everything must be readable, whatever was broken before.
        self.end.set()
        for thread in [*readers, watcher]:
            thread.join(LONGEST_READ)
        self.read_in_the_end()
        grown = self.judge_growth()
        for mount in self.mounts:
            if mount.image is not None and self.unmount(mount):
                self.ends(mount)
        self.stop_proxy()
        self.run("cache", "list")
        if drafts := os.listdir(f"{self.store}/tmp"):
            self.problems.add("drafts stay", str(drafts))
        self.summary(grown, time.monotonic() - began)
        return 1 if self.problems.counts else 0

    def read_in_the_end(self):
        choose = random.Random(self.options.seed)
        for mount in self.mounts:
            if mount.image is None:
                self.problems.add("not mounted", mount.path)
                continue
            for path, kind in choose.sample(self.images[mount.image], READ_ALL):
                try:
                    if not self.compare(choose, mount, mount.image, path, kind):
                        self.problems.add("wrong", f"{mount.image} {path}")
                except OSError as error:
                    self.problems.add("error", f"in the end, {mount.image} {path}: {error}")

    def ends(self, mount):
        deadline = time.monotonic() + 10
        while measure(mount.pid) is not None:
            if time.monotonic() > deadline:
                return self.problems.add("process stays", str(mount.pid))
            time.sleep(0.05)

    def summary(self, grown, seconds):
        counts = self.counts
        print(f"{seconds / 60:.1f} minutes, {len(self.mounts)} mounts, seed {self.options.seed}")
        print(f"{counts.pop('reads'):,} reads, {counts.pop('bytes', 0) >> 20:,} MiB compared, longest {self.longest:.1f} s")
        print(", ".join(f"{what}: {count}" for what, count in sorted(counts.items())))
        for what in ["MiB of memory", "descriptors", "threads"]:
            pairs = ", ".join(f"{before} -> {after}" for name, before, after in grown if name == what)
            print(f"{what}, once warm -> in the end: {pairs}")
        print(f"cache: at most {self.usage >> 20} MiB, limit {CACHE >> 20} MiB")
        found = ", ".join(f"{kind}: {count}" for kind, count in self.problems.counts.items())
        print(f"FAILED: {found}" if found else "everything held")


def read_all(descriptor, length, offset):
    """Reads up to `length` bytes. A read that fails half-way returns the bytes before; the next read raises the error."""
    got = b""
    while len(got) < length and (part := os.pread(descriptor, length - len(got), offset + len(got))):
        got += part
    return got


def tree(root):
    """Returns the paths below a directory and their file types."""
    found = []
    for directory, names, files in os.walk(root):
        for name in names + files:
            path = os.path.join(directory, name)
            kind = stat.S_IFMT(os.lstat(path).st_mode)
            # Devices and pipes are not opened, only their metadata is compared. No layer has sockets.
            found.append((os.path.relpath(path, root), kind))
    return sorted(found)


def largest(root, paths):
    """Returns the largest tenth of the regular files. They are read as often as all files together."""
    files = [(os.lstat(os.path.join(root, path)).st_size, path, kind) for path, kind in paths if kind == stat.S_IFREG]
    files.sort(reverse=True)
    return [(path, kind) for _, path, kind in files[: len(files) // 10 + 1]]


def measure(pid):
    """Returns memory in MiB, descriptors and threads of a process; None if it is gone."""
    try:
        with open(f"/proc/{pid}/status") as file:
            status = dict(line.split(":", 1) for line in file)
        if status["State"].split()[0] in "ZX":
            return None
        return int(status["VmRSS"].split()[0]) >> 10, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])
    except (OSError, KeyError):
        return None


def cache_usage(store):
    """Returns the bytes on disk that count against the limit of the cache."""
    total = 0
    for directory, _, files in os.walk(store):
        for name in files:
            if "/uppers/" in directory + "/" or (os.path.basename(os.path.dirname(directory)) == "layers" and name not in ("data", "partial")):
                continue
            if "/documents" in directory or "/profiles" in directory:
                continue
            try:
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
            except FileNotFoundError:
                pass
    return total


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--mounts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    for name in ["--ocifs", "--registry", "--work", "--images"]:
        parser.add_argument(name, required=True)
    return Soak(parser.parse_args()).go()


if __name__ == "__main__":
    sys.exit(main())
