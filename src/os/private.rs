//! Private files and directories: only their owner has access, whatever the umask and the directory above them are.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

const DIRECTORY: u32 = 0o700;
const FILE: u32 = 0o600;

/// Makes a private directory, and those above it that are missing. If the directory is there already, makes it
/// private.
pub fn directory(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(DIRECTORY).create(path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound && path.parent().is_some() => {
            path.parent().map_or(Ok(()), directory_above)?;
            match DirBuilder::new().mode(DIRECTORY).create(path) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(e),
    }
    let found = fs::symlink_metadata(path)?;
    if !found.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    // The umask can take rights away. An earlier version or another program may have given more.
    narrow(found.mode(), DIRECTORY, |mode| fs::set_permissions(path, mode))
}

/// Makes a directory if it is missing. An existing directory may be any user's, and stays as it is.
fn directory_above(path: &Path) -> io::Result<()> {
    match path.is_dir() {
        true => Ok(()),
        false => directory(path),
    }
}

/// Opens a file, and makes it private whether or not it was there before.
pub fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let file = options.mode(FILE).open(path)?;
    narrow(file.metadata()?.mode(), FILE, |mode| file.set_permissions(mode))?;
    Ok(file)
}

/// Makes a file private that other code created.
pub(crate) fn restrict(path: &Path) -> io::Result<()> {
    fs::set_permissions(path, Permissions::from_mode(FILE))
}

fn narrow(mode: u32, wanted: u32, set: impl FnOnce(Permissions) -> io::Result<()>) -> io::Result<()> {
    match mode & 0o7777 == wanted {
        true => Ok(()),
        false => set(Permissions::from_mode(wanted)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn what_is_made_or_found_is_private() {
        let top = tempfile::tempdir().unwrap();
        let open_wide = top.path().join("wide");
        fs::create_dir(&open_wide).unwrap();
        fs::set_permissions(&open_wide, Permissions::from_mode(0o777)).unwrap();
        let deep = open_wide.join("a/b");
        directory(&deep).unwrap();
        assert_eq!(
            (mode(&open_wide), mode(&open_wide.join("a")), mode(&deep)),
            (0o777, 0o700, 0o700)
        );
        fs::set_permissions(&deep, Permissions::from_mode(0o755)).unwrap();
        directory(&deep).unwrap();
        assert_eq!(mode(&deep), 0o700);

        let file = deep.join("file");
        open(File::options().create(true).append(true), &file).unwrap();
        assert_eq!(mode(&file), 0o600);
        fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
        open(File::options().create(true).append(true), &file).unwrap();
        assert_eq!(mode(&file), 0o600);
        assert!(directory(&file).is_err());
    }
}
