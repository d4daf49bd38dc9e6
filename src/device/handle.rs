//! File descriptors of device files.
//!
//! An image can have more layers than a process may have files open. A device therefore keeps its file descriptor
//! only while not too many devices do. It opens the file again for the next use.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock, Weak};

use nix::sys::resource::{Resource, getrlimit};

use crate::os::open_regular;

/// File descriptors that devices may keep even if the limit of the process is low. With more, connections and layers
/// that are being indexed could run out of file descriptors. With fewer, devices would open their files more often.
const LEAST: usize = 16;

/// A file that is open or can be opened again.
#[derive(Debug)]
pub(super) struct Handle(Arc<HandleSlot>);

#[derive(Debug)]
struct HandleSlot {
    path: PathBuf,
    writable: bool,
    /// Device and inode number. They tell this file from a file that replaced it.
    identity: (u64, u64),
    file: RwLock<Option<Arc<File>>>,
    /// Whether the file was used since the pool last looked.
    used: AtomicBool,
}

impl Handle {
    /// Takes a file that was opened at `path`.
    pub fn new(file: File, path: &Path, writable: bool) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let slot = Arc::new(HandleSlot {
            path: path.to_owned(),
            writable,
            identity: (metadata.dev(), metadata.ino()),
            file: RwLock::new(Some(Arc::new(file))),
            used: AtomicBool::new(true),
        });
        Pool::of_process().keep(&slot);
        Ok(Self(slot))
    }

    /// Returns the open file. It stays open for as long as the caller has it.
    pub fn file(&self) -> io::Result<Arc<File>> {
        self.0.used.store(true, Ordering::Relaxed);
        if let Some(file) = &*self.0.file.read().expect("no panic while locked") {
            return Ok(file.clone());
        }
        let file = self.0.reopen()?;
        Pool::of_process().keep(&self.0);
        Ok(file)
    }

    /// Returns whether the file can be written.
    pub fn is_writable(&self) -> bool {
        self.0.writable
    }
}

impl HandleSlot {
    fn reopen(&self) -> io::Result<Arc<File>> {
        let mut slot = self.file.write().expect("no panic while locked");
        if let Some(file) = &*slot {
            return Ok(file.clone());
        }
        let file = open_regular(File::options().read(true).write(self.writable), &self.path)?;
        let metadata = file.metadata()?;
        if (metadata.dev(), metadata.ino()) != self.identity {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "another file has taken its place",
            ));
        }
        let file = Arc::new(file);
        *slot = Some(file.clone());
        Ok(file)
    }

    fn close(&self) {
        *self.file.write().expect("no panic while locked") = None;
    }
}

/// The devices that keep their file descriptors.
#[derive(Debug)]
struct Pool {
    most: usize,
    /// The devices, roughly the least recently used first. A device that was used since the last look gets a second
    /// chance.
    slots: Mutex<VecDeque<Weak<HandleSlot>>>,
}

impl Pool {
    fn of_process() -> &'static Self {
        static POOL: OnceLock<Pool> = OnceLock::new();
        POOL.get_or_init(|| {
            let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
            // The other half is for connections, for layers that are being indexed, and for everything else.
            Self::new(usize::try_from(limit / 2).unwrap_or(usize::MAX).max(LEAST))
        })
    }

    fn new(most: usize) -> Self {
        Self {
            most,
            slots: Mutex::default(),
        }
    }

    /// Adds a device that was opened, and closes others if there are too many.
    fn keep(&self, slot: &Arc<HandleSlot>) {
        let mut slots = self.slots.lock().expect("no panic while locked");
        slots.push_back(Arc::downgrade(slot));
        // Each device is looked at twice at most: at the second look it was not used since the first.
        for _ in 0..2 * slots.len() {
            if slots.len() <= self.most {
                return;
            }
            let Some(first) = slots.pop_front() else { return };
            match first.upgrade() {
                Some(slot) if slot.used.swap(false, Ordering::Relaxed) => slots.push_back(first),
                Some(slot) => slot.close(),
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn only_so_many_stay_open_and_all_can_be_used() {
        let dir = tempfile::tempdir().unwrap();
        let pool = Pool::new(3);
        let slots: Vec<Arc<HandleSlot>> = (0..10)
            .map(|number| {
                let path = dir.path().join(number.to_string());
                let mut file = File::create(&path).unwrap();
                file.write_all(&[number]).unwrap();
                let metadata = file.metadata().unwrap();
                let slot = Arc::new(HandleSlot {
                    path,
                    writable: false,
                    identity: (metadata.dev(), metadata.ino()),
                    file: RwLock::new(Some(Arc::new(file))),
                    used: AtomicBool::new(true),
                });
                pool.keep(&slot);
                slot
            })
            .collect();
        let open = || slots.iter().filter(|slot| slot.file.read().unwrap().is_some()).count();
        assert_eq!(open(), 3);
        for (number, slot) in slots.iter().enumerate() {
            let held = slot.reopen().unwrap();
            pool.keep(slot);
            assert_eq!(held.metadata().unwrap().len(), 1, "{number}");
            assert!(open() <= 4, "{}", open());
        }
        // A file that replaced the device is not read.
        slots[0].close();
        std::fs::write(dir.path().join("new"), b"other").unwrap();
        std::fs::rename(dir.path().join("new"), &slots[0].path).unwrap();
        assert!(slots[0].reopen().is_err());
        std::fs::remove_file(&slots[0].path).unwrap();
        assert_eq!(slots[0].reopen().unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
