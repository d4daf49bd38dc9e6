//! The run directory: the registrations of all mounts, for `list`, `status` and `umount`.
//!
//! ```text
//! RUN/ID/mount.json    which image is mounted where, by which process
//!        control       the socket of the process
//!        log           the log of the process, if it runs in the background
//!        log.PID       the log of a process that is not registered (yet); PID is the process that waits for it
//!        lower/        where the image is mounted until the overlay of a writable mount is put together
//!        disk/         where the disk of the image is mounted until the kernel's EROFS holds it
//! RUN/ID-PID/            the same files, for a process that still serves users after its mount point was used again
//! RUN/locks/mountpoints  a process locks one byte of it for each mount point that it is about to use
//! RUN/changes/ID         private upper directories, if there is no store to hold them
//! ```
//! RUN is /run/ocifs for root of the machine. For other users it is `$XDG_RUNTIME_DIR/ocifs`, or /tmp/ocifs-UID if
//! that variable has no absolute path. If RUN exists, it must belong to the user, and no other user may be able to
//! write to it.
//!
//! ID is a hash of the mount point's path, so a mount point has at most one ID directory. The registration stays
//! until the process ends, because a mount may have users after its unmount. If another mount needs the ID
//! directory, the registration moves to ID-PID. The registration of a process that was killed stays until another
//! command clears it.
//!
//! Only the owner can read the run directory.

mod record;

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use record::{AttachPhase, Carrier, MountRecord};

use super::mountinfo::MountEntry;
use super::privilege::{is_system_root, outer_uid};
use crate::os::{gone, is_at, lock_bytes, private, until, until_blocking};

/// Attempts to create a log file. An attempt fails if another process removes the directory at the same time. A
/// larger value only delays the error if every attempt fails; a smaller one makes mounts fail in a busy directory.
const LOG_ATTEMPTS: u32 = 100;
/// Pause between two attempts to get the turn. A smaller value uses more processor time; a larger one delays mounts
/// of the same mount point.
const LOOK: Duration = Duration::from_millis(5);
/// How long a process waits for the turn. The process that has it only checks, registers and mounts. A larger value
/// delays the error if that process hangs; a smaller one makes mounts fail on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why registrations cannot be read or written, or a mount cannot be registered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistrationError {
    /// A file could not be read or written.
    #[error("run directory: {}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The run directory is no directory, belongs to another user, or other users can write to it.
    #[error("{} is not a private directory of this user: set XDG_RUNTIME_DIR", path.display())]
    NotPrivate {
        /// The run directory.
        path: PathBuf,
    },
    /// Another process holds the turn for the same mount point for too long.
    #[error("another ocifs process is busy with this mount point and does not get on (its lock: {})", lock.display())]
    Busy {
        /// The directory that contains the lock file.
        lock: PathBuf,
    },
    /// A live process already has a mount there.
    #[error("ocifs serves {image} at {} already (process {pid})", place.display())]
    Taken {
        /// The mount point, or the door of a disk.
        place: PathBuf,
        /// The image that is served there.
        image: String,
        /// The process that serves it.
        pid: u32,
    },
}

/// The run directory of this user.
#[derive(Debug, Clone)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// Finds the run directory, and creates it if there is none.
    pub fn open() -> Result<Self, RegistrationError> {
        let uid = nix::unistd::geteuid();
        let runtime = std::env::var_os("XDG_RUNTIME_DIR")
            .map(PathBuf::from)
            .filter(|p| p.is_absolute());
        let path = match runtime {
            _ if is_system_root() => PathBuf::from("/run/ocifs"),
            Some(runtime) => runtime.join("ocifs"),
            None => PathBuf::from(format!("/tmp/ocifs-{}", outer_uid())),
        };
        let io = |source| RegistrationError::Io {
            path: path.clone(),
            source,
        };
        match fs::symlink_metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io(e)),
            // If other users could write to the directory, they may have put files there. Closing it afterwards
            // does not make it safe.
            Ok(found) if !found.is_dir() || found.uid() != uid.as_raw() || found.mode() & 0o022 != 0 => {
                return Err(RegistrationError::NotPrivate { path });
            }
            Ok(_) => {}
        }
        private::directory(&path).map_err(io)?;
        Ok(Self { path })
    }

    /// Returns the registration directory for the mount at `mountpoint`, which is an absolute path without
    /// symlinks.
    pub fn entry(&self, mountpoint: &Path) -> RunEntry {
        RunEntry {
            path: self.path.join(id_of(mountpoint)),
        }
    }

    /// Whether ocifs made this mount, as far as that is visible without its registration: a FUSE mount, or an EROFS file
    /// system from a file in the run directory.
    pub(super) fn made(&self, mount: &MountEntry) -> bool {
        match mount.fs_type.as_str() {
            "fuse.ocifs" => true,
            "erofs" => Path::new(&mount.source).starts_with(&self.path),
            _ => false,
        }
    }

    /// Returns the control socket of the process behind an EROFS file system that lies in the run directory.
    pub(super) fn control_of(&self, mount: &MountEntry) -> Option<PathBuf> {
        let disk = Path::new(&mount.source).strip_prefix(&self.path).ok()?;
        let id = disk.components().next().filter(|_| mount.fs_type == "erofs")?;
        Some(self.path.join(id).join("control"))
    }

    /// Returns the path of a private upper directory, for use if there is no store to hold it.
    pub fn upper_dir(&self, id: &str) -> PathBuf {
        self.path.join("changes").join(id)
    }

    /// Returns the path of the bundle of a process that runs a container.
    pub fn bundle_dir(&self, pid: u32) -> PathBuf {
        self.path.join("bundles").join(pid.to_string())
    }

    /// Returns all registrations, also those of dead processes, in the order of their mount points.
    pub fn records(&self) -> Result<Vec<(RunEntry, MountRecord)>, RegistrationError> {
        let entries = fs::read_dir(&self.path).map_err(|source| RegistrationError::Io {
            path: self.path.clone(),
            source,
        })?;
        let mut records = Vec::new();
        for entry in entries.flatten() {
            let entry = RunEntry { path: entry.path() };
            if let Some(record) = entry.record()? {
                records.push((entry, record));
            }
        }
        records.sort_by(|a, b| a.1.mountpoint.cmp(&b.1.mountpoint));
        Ok(records)
    }
}

/// Returns the name of the registration directory for `mountpoint`.
fn id_of(mountpoint: &Path) -> String {
    let hash = blake3::hash(mountpoint.as_os_str().as_encoded_bytes()).to_hex();
    hash[..16].to_owned()
}

/// The registration directory of one mount.
#[derive(Debug, Clone)]
pub struct RunEntry {
    path: PathBuf,
}

impl RunEntry {
    /// Returns the run directory that contains this directory.
    pub(super) fn run(&self) -> RunDir {
        RunDir {
            path: self.path.parent().unwrap_or(&self.path).to_owned(),
        }
    }

    fn io(&self, path: &Path) -> impl Fn(io::Error) -> RegistrationError + use<> {
        let path = path.to_owned();
        move |source| RegistrationError::Io {
            path: path.clone(),
            source,
        }
    }

    /// Returns the path of the control socket of the process behind the mount.
    pub fn socket(&self) -> PathBuf {
        self.path.join("control")
    }

    /// Returns the path of the log of a background process.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Returns the path where the image is mounted until the overlay is put together.
    pub fn lower(&self) -> PathBuf {
        self.path.join("lower")
    }

    /// Returns the path where the disk is mounted until the kernel's EROFS holds it.
    pub fn disk(&self) -> PathBuf {
        self.path.join("disk")
    }

    /// Creates the directory.
    pub fn create(&self) -> Result<(), RegistrationError> {
        private::directory(&self.path).map_err(self.io(&self.path))
    }

    /// Returns the registration directory for another mount point.
    pub(super) fn beside(&self, mountpoint: &Path) -> Self {
        Self {
            path: self.path.with_file_name(id_of(mountpoint)),
        }
    }

    /// Returns where the registration of the process `pid` goes when another process takes its place.
    fn aside(&self, pid: u32) -> Self {
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(format!("-{pid}"));
        Self {
            path: self.path.with_file_name(name),
        }
    }

    /// Creates a log file for a mount that is about to be registered here. Returns the file and its path.
    /// `RunEntry::register` gives it its final name. If the process of an earlier mount removes the directory
    /// meanwhile, tries again.
    pub fn create_log(&self) -> Result<(File, PathBuf), RegistrationError> {
        let path = self.path.join(format!("log.{}", std::process::id()));
        for _ in 0..LOG_ATTEMPTS {
            self.create()?;
            // A log of an earlier process with the same id is useless.
            gone(fs::remove_file(&path)).map_err(self.io(&path))?;
            match private::open(File::options().create_new(true).append(true).read(true), &path) {
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => {}
                result => return result.map(|file| (file, path.clone())).map_err(self.io(&path)),
            }
        }
        Err(self.io(&path)(io::ErrorKind::ResourceBusy.into()))
    }

    /// Returns the registration, if there is one.
    pub fn record(&self) -> Result<Option<MountRecord>, RegistrationError> {
        let path = self.path.join("mount.json");
        match fs::read(&path) {
            // A record that does not parse is incomplete: a process is writing it, or was when the machine went
            // down.
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            // A stray file in the run directory is no registration.
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(e) => Err(self.io(&path)(e)),
        }
    }

    /// Fails if another live process has a mount there.
    pub fn check_free(&self) -> Result<(), RegistrationError> {
        match self.record()? {
            Some(record) => self.check_place(&record, &record.mountpoint),
            None => Ok(()),
        }
    }

    /// Fails if another live process serves an image at one of these places.
    pub(super) fn check_places(&self, places: &[PathBuf]) -> Result<(), RegistrationError> {
        for (_, record) in self.run().records()? {
            if let Some(place) = places.iter().find(|place| record.is_at(place)) {
                self.check_place(&record, place)?;
            }
        }
        Ok(())
    }

    fn check_place(&self, other: &MountRecord, place: &Path) -> Result<(), RegistrationError> {
        if !other.is_alive() || other.pid == std::process::id() {
            return Ok(());
        }
        // A process whose mount is gone is about to end, or serves the remaining users.
        match other.is_in_use().map_err(self.io(Path::new("/proc/self/mountinfo")))? {
            true => Err(RegistrationError::Taken {
                place: place.to_owned(),
                image: other.image.clone(),
                pid: other.pid,
            }),
            false => Ok(()),
        }
    }

    /// Waits for the turn at this mount point. A process has the turn from its first look at the mount point until
    /// the mount stands or has failed. The turn ends when the file is dropped. Fails with
    /// [`RegistrationError::Busy`] after 20 seconds.
    pub async fn turn(&self) -> Result<File, RegistrationError> {
        let turn = until(LOOK, PATIENCE, || self.try_turn()).await?;
        turn.ok_or_else(|| RegistrationError::Busy {
            lock: self.path.with_file_name("locks"),
        })
    }

    /// Waits for the turn like [`RunEntry::turn`], but blocks the thread. Returns `None` if the turn did not come
    /// in time.
    pub(crate) fn turn_at_last(&self) -> Result<Option<File>, RegistrationError> {
        until_blocking(LOOK, PATIENCE, || self.try_turn())
    }

    /// Takes the turn if no other process has it. The turn ends when the file is dropped.
    fn try_turn(&self) -> Result<Option<File>, RegistrationError> {
        let directory = self.path.with_file_name("locks");
        private::directory(&directory).map_err(self.io(&directory))?;
        let path = directory.join("mountpoints");
        let file = private::open(File::options().create(true).truncate(false).write(true), &path);
        let file = file.map_err(self.io(&path))?;
        let name = self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let name = name.split('-').next().unwrap_or_default();
        // The byte for this mount point. The file is empty, but locks may lie beyond its end.
        let byte = u64::from_str_radix(name, 16).unwrap_or_default() >> 1;
        let locked = lock_bytes(&file, byte..byte + 1).map_err(self.io(&path))?;
        Ok(locked.then_some(file))
    }

    /// Registers a mount. Fails if another live process has a mount there. If `log` is given, it is the log file of
    /// the process, and gets its final name.
    pub(crate) fn register(&self, record: &MountRecord, log: Option<&Path>) -> Result<(), RegistrationError> {
        self.create()?;
        self.check_free()?;
        self.make_room(record.pid)?;
        if let Some(log) = log {
            fs::rename(log, self.log()).map_err(self.io(log))?;
        }
        self.write(record)
    }

    /// Writes the registration, and replaces an earlier one in one step.
    pub(super) fn write(&self, record: &MountRecord) -> Result<(), RegistrationError> {
        let path = self.path.join("mount.json");
        let part = self.path.join("mount.json.part");
        let bytes = serde_json::to_vec_pretty(record).expect("a record has only strings and numbers");
        let open = private::open(File::options().create(true).truncate(true).write(true), &part);
        open.and_then(|mut file| file.write_all(&bytes))
            .map_err(self.io(&part))?;
        fs::rename(&part, &path).map_err(self.io(&path))
    }

    /// Moves the registration of another live process aside. The mount of that process is gone from here, but still
    /// has users elsewhere.
    fn make_room(&self, own: u32) -> Result<(), RegistrationError> {
        let Some(other) = self.record()?.filter(|r| r.is_alive() && r.pid != own) else {
            return Ok(());
        };
        let aside = self.aside(other.pid);
        aside.create()?;
        // The record moves last: a directory without a record does not count as registered.
        for name in ["log", "control", "mount.json"] {
            let path = self.path.join(name);
            gone(fs::rename(&path, aside.path.join(name))).map_err(self.io(&path))?;
        }
        Ok(())
    }

    /// Returns where the registration of the process `pid` is at present, if there is one.
    pub(super) fn of(&self, pid: u32) -> Result<Option<Self>, RegistrationError> {
        for entry in [self.clone(), self.aside(pid)] {
            if entry.record()?.is_some_and(|record| record.pid == pid) {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    /// Removes the registration and its log. If `log` is given and is another file than the log here, the log
    /// stays. Deletes only files of ocifs, one by one. If a file system were still mounted on `lower`, a recursive
    /// removal would delete its files.
    pub fn remove(&self, log: Option<BorrowedFd<'_>>) -> Result<(), RegistrationError> {
        for name in ["control", "mount.json.part", "mount.json"] {
            let path = self.path.join(name);
            gone(fs::remove_file(&path)).map_err(self.io(&path))?;
        }
        let (log_path, lower) = (self.log(), self.lower());
        if log.is_none_or(|log| is_at(log, &log_path)) {
            gone(fs::remove_file(&log_path)).map_err(self.io(&log_path))?;
        }
        for directory in [lower, self.disk()] {
            gone(fs::remove_dir(&directory)).map_err(self.io(&directory))?;
        }
        match fs::remove_dir(&self.path) {
            // Another process is about to mount here.
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            result => gone(result).map_err(self.io(&self.path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn a_log_is_removed_by_its_own_process_only() {
        let dir = tempfile::tempdir().unwrap();
        let entry = RunEntry {
            path: dir.path().join("entry"),
        };
        let record = MountRecord {
            pid: std::process::id(),
            started: 0,
            image: String::new(),
            digest: String::new(),
            mountpoint: dir.path().to_owned(),
            lower: dir.path().to_owned(),
            writable: false,
            scratch: None,
            standing: None,
            carrier: Carrier::Fuse,
            disk_mount: None,
            disk: None,
            phase: AttachPhase::Attached,
        };
        let (old, path) = entry.create_log().unwrap();
        entry.register(&record, Some(&path)).unwrap();
        let (new, path) = entry.create_log().unwrap();
        entry.register(&record, Some(&path)).unwrap();
        entry.remove(Some(old.as_fd())).unwrap();
        assert!(entry.log().exists());
        entry.remove(Some(new.as_fd())).unwrap();
        assert!(!entry.path.exists());
        let (_, path) = entry.create_log().unwrap();
        entry.register(&record, Some(&path)).unwrap();
        entry.remove(None).unwrap();
        assert!(!entry.path.exists());
    }
}
