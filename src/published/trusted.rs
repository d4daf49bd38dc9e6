//! A directory in which nobody can put files whom the user does not trust.
//!
//! The whole way to the directory counts: whoever can replace a directory or a symbolic link on the way chooses the files.
//! So each step is opened by itself, from the root on, and checked before the next one is opened from there. Symbolic
//! links are followed here, one step after the other. What was checked stays open, and files are read through it. So
//! nobody can replace it between the check and the read.
//!
//! Invariants:
//! - Everything on the way belongs to root or to this user, symbolic links included.
//! - Others may write to a directory on the way only if it has the sticky bit. There they cannot replace what is not theirs.
//! - Nobody else can write to the directory itself or to a file that is read. A file is no symbolic link.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, Stat, fstat, openat, readlinkat};
use rustix::io::Errno;

use super::PublishedError;
use crate::os::read_open;

/// Most symbolic links on the way. The kernel follows as many.
const MOST_LINKS: usize = 40;

/// A directory that was checked, and is open.
#[derive(Debug)]
pub(super) struct TrustedDirectory {
    open: OwnedFd,
    path: PathBuf,
}

/// A step of the way.
enum WayStep {
    Root,
    Up,
    Down(OsString),
}

impl TrustedDirectory {
    /// Opens a directory by an absolute path. Fails if another user can change what is there. Blocks.
    pub(super) fn open(path: &Path) -> Result<Self, PublishedError> {
        let none = || PublishedError::NoDirectory { path: path.to_owned() };
        let mut way = Vec::new();
        let mut at = PathBuf::from("/");
        // The steps that are still to go, the next one last.
        let mut rest = steps(path);
        let mut links = 0;
        while let Some(step) = rest.pop() {
            let name = match step {
                WayStep::Root => {
                    way.clear();
                    at = PathBuf::from("/");
                    OsString::from("/")
                }
                WayStep::Up => {
                    if way.len() > 1 {
                        way.pop();
                        at.pop();
                    }
                    continue;
                }
                WayStep::Down(name) => name,
            };
            let path = at.join(&name);
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let opened = match way.last() {
                None => openat(CWD, "/", flags, Mode::empty()),
                Some(parent) => openat(parent, &name, flags, Mode::empty()),
            };
            let opened = match opened {
                Err(Errno::NOENT) => return Err(none()),
                opened => opened.map_err(|error| PublishedError::file(&path, &error))?,
            };
            let stat = fstat(&opened).map_err(|error| PublishedError::file(&path, &error))?;
            check_owner(&path, &stat)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Symlink => {
                    links += 1;
                    if links > MOST_LINKS {
                        return Err(PublishedError::file(&path, &"too many symbolic links"));
                    }
                    let target =
                        readlinkat(&opened, "", Vec::new()).map_err(|error| PublishedError::file(&path, &error))?;
                    rest.extend(steps(Path::new(&OsString::from_vec(target.into_bytes()))));
                }
                FileType::Directory => {
                    let is_sticky = stat.st_mode & 0o1000 != 0;
                    if !is_sticky || rest.is_empty() {
                        check_mode(&path, &stat)?;
                    }
                    way.push(opened);
                    at = path;
                }
                _ => return Err(PublishedError::file(&path, &"it is no directory")),
            }
        }
        let open = way.pop().ok_or_else(none)?;
        // The last step may have led up to a directory with the sticky bit.
        let stat = fstat(&open).map_err(|error| PublishedError::file(&at, &error))?;
        check_mode(&at, &stat)?;
        Ok(Self { open, path: at })
    }

    /// Reads the file `name`, of at most `cap` bytes. None if there is no such file. Blocks.
    pub(super) fn read(&self, name: &str, cap: usize) -> Result<Option<Vec<u8>>, PublishedError> {
        let path = self.path.join(name);
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match openat(&self.open, name, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => {
                return Err(PublishedError::file(
                    &path,
                    &"it is a symbolic link, which a trusted location cannot have",
                ));
            }
            file => file.map_err(|error| PublishedError::file(&path, &error))?,
        };
        let stat = fstat(&file).map_err(|error| PublishedError::file(&path, &error))?;
        check_owner(&path, &stat)?;
        check_mode(&path, &stat)?;
        let bytes = read_open(File::from(file), cap as u64);
        bytes.map(Some).map_err(|error| PublishedError::file(&path, &error))
    }
}

/// Returns the steps of a path, the first one last.
fn steps(path: &Path) -> Vec<WayStep> {
    let steps = path.components().rev().filter_map(|component| match component {
        Component::RootDir => Some(WayStep::Root),
        Component::ParentDir => Some(WayStep::Up),
        Component::Normal(name) => Some(WayStep::Down(name.to_owned())),
        Component::CurDir | Component::Prefix(_) => None,
    });
    steps.collect()
}

/// Checks that something belongs to root or to this user.
fn check_owner(path: &Path, stat: &Stat) -> Result<(), PublishedError> {
    let own = nix::unistd::geteuid().as_raw();
    if ![0, own].contains(&stat.st_uid) {
        let reason = format!("it belongs to user {}, so the location is not trusted", stat.st_uid);
        return Err(PublishedError::file(path, &reason));
    }
    Ok(())
}

/// Checks that only the owner can write to a file or directory.
fn check_mode(path: &Path, stat: &Stat) -> Result<(), PublishedError> {
    if stat.st_mode & 0o022 != 0 {
        return Err(PublishedError::file(
            path,
            &"others can write to it, so the location is not trusted",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, chown, lchown, symlink};

    use super::*;

    const NOBODY: u32 = 65534;

    /// A directory `indexes` with the file `x`, below one of the test's own.
    fn scene() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let indexes = dir.path().join("indexes");
        fs::create_dir(&indexes).unwrap();
        fs::set_permissions(&indexes, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(indexes.join("x"), "content").unwrap();
        (dir, indexes)
    }

    fn read(path: &Path) -> Result<Option<Vec<u8>>, String> {
        let open = TrustedDirectory::open(path).map_err(|error| error.to_string())?;
        open.read("x", 100).map_err(|error| error.to_string())
    }

    #[test]
    fn a_directory_is_reached_over_every_kind_of_way() {
        let (dir, indexes) = scene();
        symlink("indexes", dir.path().join("relative")).unwrap();
        symlink(&indexes, dir.path().join("absolute")).unwrap();
        symlink("indexes/../relative/./", dir.path().join("around")).unwrap();
        for name in ["indexes", "relative", "absolute", "around", "relative/../indexes"] {
            assert_eq!(read(&dir.path().join(name)), Ok(Some(b"content".to_vec())), "{name}");
        }
        symlink("loop", dir.path().join("loop")).unwrap();
        assert!(read(&dir.path().join("loop")).unwrap_err().contains("too many"));
        assert!(
            read(&dir.path().join("none"))
                .unwrap_err()
                .contains("no such directory")
        );
        assert!(read(&indexes.join("x")).unwrap_err().contains("no directory"));
    }

    #[test]
    fn a_file_is_no_link_and_nobody_else_can_write_to_it() {
        let (dir, indexes) = scene();
        fs::set_permissions(indexes.join("x"), fs::Permissions::from_mode(0o664)).unwrap();
        assert!(read(&indexes).unwrap_err().contains("others can write"));
        fs::rename(indexes.join("x"), dir.path().join("y")).unwrap();
        assert_eq!(read(&indexes), Ok(None));
        symlink("../y", indexes.join("x")).unwrap();
        assert!(read(&indexes).unwrap_err().contains("symbolic link"));
        fs::remove_file(indexes.join("x")).unwrap();
        nix::unistd::mkfifo(&indexes.join("x"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(read(&indexes).unwrap_err().contains("no regular file"));
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_not_trusted_even_if_it_is_sticky() {
        let (dir, indexes) = scene();
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        for wrong in [0o777, 0o775, 0o1777] {
            mode(&indexes, wrong);
            assert!(read(&indexes).unwrap_err().contains("others can write"), "{wrong:o}");
        }
        mode(&indexes, 0o755);
        mode(dir.path(), 0o777);
        assert!(read(&indexes).unwrap_err().contains("others can write"));
        mode(dir.path(), 0o1777);
        assert!(read(&indexes).is_ok());
        assert!(read(&indexes.join("..")).unwrap_err().contains("others can write"));
    }

    #[test]
    fn nothing_on_the_way_belongs_to_another_user() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: only root can give files away");
            return;
        }
        let (dir, indexes) = scene();
        let sticky = dir.path().join("sticky");
        fs::create_dir(&sticky).unwrap();
        fs::set_permissions(&sticky, fs::Permissions::from_mode(0o1755)).unwrap();
        fs::create_dir(sticky.join("indexes")).unwrap();
        fs::write(sticky.join("indexes/x"), "content").unwrap();
        assert!(read(&sticky.join("indexes")).is_ok());
        chown(&sticky, Some(NOBODY), None).unwrap();
        assert!(read(&sticky.join("indexes")).unwrap_err().contains("belongs to user"));
        let link = dir.path().join("link");
        symlink(&indexes, &link).unwrap();
        lchown(&link, Some(NOBODY), None).unwrap();
        assert!(read(&link).unwrap_err().contains("belongs to user"));
        chown(indexes.join("x"), Some(NOBODY), None).unwrap();
        assert!(read(&indexes).unwrap_err().contains("belongs to user"));
    }

    /// Another process may replace a directory on the way at any moment, between a check and what follows it.
    #[test]
    fn a_directory_that_is_exchanged_all_the_time_is_never_read_unchecked() {
        use std::sync::atomic::{AtomicBool, Ordering};

        use rustix::fs::{RenameFlags, renameat_with};

        let dir = tempfile::tempdir().unwrap();
        let (good, bad) = (dir.path().join("good"), dir.path().join("bad"));
        for (parent, mode, content) in [(&good, 0o755, "content"), (&bad, 0o777, "forged")] {
            fs::create_dir_all(parent.join("indexes")).unwrap();
            fs::write(parent.join("indexes/x"), content).unwrap();
            fs::set_permissions(parent, fs::Permissions::from_mode(mode)).unwrap();
        }
        symlink("good/indexes", dir.path().join("link")).unwrap();
        let ended = AtomicBool::new(false);
        let (mut read_well, mut refused) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    renameat_with(CWD, &good, CWD, &bad, RenameFlags::EXCHANGE).unwrap();
                }
            });
            for round in 0.. {
                let way = ["good/indexes", "link"][round % 2];
                match read(&dir.path().join(way)) {
                    Ok(content) => {
                        read_well += 1;
                        if content.as_deref() != Some(b"content") {
                            ended.store(true, Ordering::Relaxed);
                            panic!("read {content:?} after {round} rounds");
                        }
                    }
                    Err(_) => refused += 1,
                }
                if round >= 5000 && read_well > 0 && refused > 0 {
                    break;
                }
            }
            ended.store(true, Ordering::Relaxed);
        });
    }
}
