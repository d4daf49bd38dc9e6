//! The run directory: which mounts there are, for `list`, `status` and `umount`, also after their process died.
//!
//! ```text
//! RUN/ID/mount.json    what is mounted where, by which process
//!        control       the process's socket
//!        log           its log, if it runs in the background
//!        log.PID       the log of a process that is not registered (yet); PID is that of the one that waits for it
//!        lower/        where the image is mounted until the overlay of a writable mount is put together
//! RUN/ID-PID/            the same for a process that still serves others after its mount point was used again
//! RUN/locks/mountpoints  a byte of it is locked for each mount point that a process is about to use
//! RUN/changes/ID         private upper directories, if there is no store to hold them
//! ```
//! RUN is /run/ocifs for root, `$XDG_RUNTIME_DIR/ocifs` for others (or /tmp/ocifs-UID, if it is their own and private).
//! ID is made from the mount point's path, so there is at most one registration for each mount point. It stays until the
//! process ends: after an unmount, others may still use the mount. If it is in the way of another mount, it moves to ID-PID.
//! All of this is readable for its owner alone.

mod record;

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use record::{MountRecord, Standing};

use super::privilege::{is_system_root, outer_uid};
use crate::os::{gone, is_at, lock_bytes, private, until, until_blocking};

/// A new log is given up when this often another process was in the way.
const LOG_ATTEMPTS: u32 = 100;
/// How often and how long a turn is waited for. Whoever has one only looks, registers and mounts.
const LOOK: Duration = Duration::from_millis(5);
const PATIENCE: Duration = Duration::from_secs(20);

/// Why registrations cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistrationError {
    /// A file could not be read or written.
    #[error("run directory: {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The fallback directory belongs to somebody else.
    #[error("{} is not a private directory of this user: set XDG_RUNTIME_DIR", path.display())]
    NotPrivate {
        /// Which.
        path: PathBuf,
    },
    /// Another process does not get done with the same mount point.
    #[error("another ocifs process is busy with this mount point and does not get on (its lock: {})", lock.display())]
    Busy {
        /// The directory with the lock.
        lock: PathBuf,
    },
    /// There is a live mount already.
    #[error("{} is an ocifs mount of {image} already (process {pid})", mountpoint.display())]
    Taken {
        /// Where.
        mountpoint: PathBuf,
        /// What is mounted there.
        image: String,
        /// Who serves it.
        pid: u32,
    },
}

/// The run directory of this user.
#[derive(Debug, Clone)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// Finds (and creates) it.
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
            // What others could write into is not made good by closing it now.
            Ok(found) if !found.is_dir() || found.uid() != uid.as_raw() || found.mode() & 0o022 != 0 => {
                return Err(RegistrationError::NotPrivate { path });
            }
            Ok(_) => {}
        }
        private::directory(&path).map_err(io)?;
        Ok(Self { path })
    }

    /// The directory of the mount at `mountpoint` (an absolute path without symlinks).
    pub fn entry(&self, mountpoint: &Path) -> RunEntry {
        RunEntry {
            path: self.path.join(id_of(mountpoint)),
        }
    }

    /// A private upper directory for want of a store.
    pub fn upper_dir(&self, id: &str) -> PathBuf {
        self.path.join("changes").join(id)
    }

    /// All registrations, of dead processes too.
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

/// Name of the directory of the mount at `mountpoint`.
fn id_of(mountpoint: &Path) -> String {
    let hash = blake3::hash(mountpoint.as_os_str().as_encoded_bytes()).to_hex();
    hash[..16].to_owned()
}

/// The directory of one mount.
#[derive(Debug, Clone)]
pub struct RunEntry {
    path: PathBuf,
}

impl RunEntry {
    /// The directory that it is in.
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

    /// Socket of the serving process.
    pub fn socket(&self) -> PathBuf {
        self.path.join("control")
    }

    /// Log of a background process.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Where the image is mounted until an overlay is put together.
    pub fn lower(&self) -> PathBuf {
        self.path.join("lower")
    }

    /// Creates the directory.
    pub fn create(&self) -> Result<(), RegistrationError> {
        private::directory(&self.path).map_err(self.io(&self.path))
    }

    /// The directory of another mount.
    pub(super) fn beside(&self, mountpoint: &Path) -> Self {
        Self {
            path: self.path.with_file_name(id_of(mountpoint)),
        }
    }

    /// Where the registration of a process goes when another one takes its place.
    fn aside(&self, pid: u32) -> Self {
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(format!("-{pid}"));
        Self {
            path: self.path.with_file_name(name),
        }
    }

    /// A log file for a mount that is to be registered here, and its path; [`RunEntry::register`] gives it its name. The
    /// process of an earlier mount may be about to remove the directory.
    pub fn create_log(&self) -> Result<(File, PathBuf), RegistrationError> {
        let path = self.path.join(format!("log.{}", std::process::id()));
        for _ in 0..LOG_ATTEMPTS {
            self.create()?;
            // One of an earlier process with the same id is of no use any more.
            gone(fs::remove_file(&path)).map_err(self.io(&path))?;
            match private::open(File::options().create_new(true).append(true).read(true), &path) {
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => {}
                result => return result.map(|file| (file, path.clone())).map_err(self.io(&path)),
            }
        }
        Err(self.io(&path)(io::ErrorKind::ResourceBusy.into()))
    }

    /// The registration, if there is one.
    pub fn record(&self) -> Result<Option<MountRecord>, RegistrationError> {
        let path = self.path.join("mount.json");
        match fs::read(&path) {
            // A record that does not parse is one that is being written, or was when the machine went down.
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            // A stray file in the run directory is no registration.
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(e) => Err(self.io(&path)(e)),
        }
    }

    /// Fails if a live process has a mount there.
    pub fn check_free(&self) -> Result<(), RegistrationError> {
        let own = std::process::id();
        let Some(other) = self.record()?.filter(|r| r.is_alive() && r.pid != own) else {
            return Ok(());
        };
        // One whose mount is gone is about to end.
        match other.is_mounted().map_err(self.io(Path::new("/proc/self/mountinfo")))? {
            true => Err(RegistrationError::Taken {
                mountpoint: other.mountpoint,
                image: other.image,
                pid: other.pid,
            }),
            false => Ok(()),
        }
    }

    /// Waits until no other process is between looking at this mount point and having it mounted, or given up. The turn
    /// ends when the file is dropped.
    pub async fn turn(&self) -> Result<File, RegistrationError> {
        let turn = until(LOOK, PATIENCE, || self.try_turn()).await?;
        turn.ok_or_else(|| RegistrationError::Busy {
            lock: self.path.with_file_name("locks"),
        })
    }

    /// Like [`RunEntry::turn`] for callers that are not asynchronous. None if it did not come in time.
    pub fn turn_at_last(&self) -> Result<Option<File>, RegistrationError> {
        until_blocking(LOOK, PATIENCE, || self.try_turn())
    }

    fn try_turn(&self) -> Result<Option<File>, RegistrationError> {
        let directory = self.path.with_file_name("locks");
        private::directory(&directory).map_err(self.io(&directory))?;
        let path = directory.join("mountpoints");
        let file = private::open(File::options().create(true).truncate(false).write(true), &path);
        let file = file.map_err(self.io(&path))?;
        let name = self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let name = name.split('-').next().unwrap_or_default();
        // The byte of this mount point; the file has none, and locks do not mind.
        let byte = u64::from_str_radix(name, 16).unwrap_or_default() >> 1;
        let locked = lock_bytes(&file, byte..byte + 1).map_err(self.io(&path))?;
        Ok(locked.then_some(file))
    }

    /// Registers a mount, whose process writes its log to the file `log` if it has one; fails if a live one is registered.
    pub fn register(&self, record: &MountRecord, log: Option<&Path>) -> Result<(), RegistrationError> {
        self.create()?;
        self.check_free()?;
        self.make_room(record.pid)?;
        if let Some(log) = log {
            fs::rename(log, self.log()).map_err(self.io(log))?;
        }
        self.write(record)
    }

    /// Writes the registration anew.
    pub(super) fn write(&self, record: &MountRecord) -> Result<(), RegistrationError> {
        let path = self.path.join("mount.json");
        let part = self.path.join("mount.json.part");
        let bytes = serde_json::to_vec_pretty(record).expect("a record has only strings and numbers");
        let open = private::open(File::options().create(true).truncate(true).write(true), &part);
        open.and_then(|mut file| file.write_all(&bytes))
            .map_err(self.io(&part))?;
        fs::rename(&part, &path).map_err(self.io(&path))
    }

    /// Moves the registration of another living process aside, whose mount is gone from here but still used elsewhere.
    fn make_room(&self, own: u32) -> Result<(), RegistrationError> {
        let Some(other) = self.record()?.filter(|r| r.is_alive() && r.pid != own) else {
            return Ok(());
        };
        let aside = self.aside(other.pid);
        aside.create()?;
        // The record goes last: what is not complete does not count as registered.
        for name in ["log", "control", "mount.json"] {
            let path = self.path.join(name);
            gone(fs::rename(&path, aside.path.join(name))).map_err(self.io(&path))?;
        }
        Ok(())
    }

    /// Where the registration of the process `pid` is by now, if there is one.
    pub(super) fn of(&self, pid: u32) -> Result<Option<Self>, RegistrationError> {
        for entry in [self.clone(), self.aside(pid)] {
            if entry.record()?.is_some_and(|record| record.pid == pid) {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    /// Removes the registration, and the log unless it is another one than `log`. Only what ocifs put there goes, one by one:
    /// were something still mounted on `lower`, a recursive removal would reach into it.
    pub fn remove(&self, log: Option<BorrowedFd<'_>>) -> Result<(), RegistrationError> {
        for name in ["control", "mount.json.part", "mount.json"] {
            let path = self.path.join(name);
            gone(fs::remove_file(&path)).map_err(self.io(&path))?;
        }
        let (log_path, lower) = (self.log(), self.lower());
        if log.is_none_or(|log| is_at(log, &log_path)) {
            gone(fs::remove_file(&log_path)).map_err(self.io(&log_path))?;
        }
        gone(fs::remove_dir(&lower)).map_err(self.io(&lower))?;
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
