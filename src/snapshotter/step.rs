//! What has to be mounted for a snapshot.

use std::path::{Path, PathBuf};

use super::error::SnapshotError;

/// Characters that separate the options of an overlay. The kernel would misread directories that have them.
const SEPARATORS: [char; 3] = [',', ':', '\\'];
/// Is there if the kernel's overlayfs knows the option `index`.
const INDEX_PARAMETER: &str = "/sys/module/overlay/parameters/index";

/// A mount that containerd or a container's runtime makes (containerd's `mount.Mount`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountStep {
    /// Type of the file system.
    pub fs_type: String,
    /// Device or directory.
    pub source: String,
    /// Options of mount(8).
    pub options: Vec<String>,
}

impl MountStep {
    /// Fails if overlays cannot use directories below this one.
    pub(super) fn check(root: &Path) -> Result<(), SnapshotError> {
        match root.to_str() {
            Some(text) if !text.contains(SEPARATORS) => Ok(()),
            _ => Err(SnapshotError::Argument(format!(
                "{}: overlays can only use a directory whose name is UTF-8 without a comma, colon or backslash",
                root.display()
            ))),
        }
    }

    /// Shows a directory as it is.
    pub(super) fn bind(directory: &Path, is_writable: bool) -> Result<Self, SnapshotError> {
        let mode = if is_writable { "rw" } else { "ro" };
        Ok(Self {
            fs_type: "bind".to_owned(),
            source: text(directory)?,
            options: vec![mode.to_owned(), "rbind".to_owned()],
        })
    }

    /// Shows directories as one, the topmost first. With `above`, a directory for changes and overlayfs's scratch space,
    /// it can be changed.
    pub(super) fn overlay(lowers: &[PathBuf], above: Option<(&Path, &Path)>) -> Result<Self, SnapshotError> {
        let mut options = Vec::new();
        if Path::new(INDEX_PARAMETER).exists() {
            options.push("index=off".to_owned());
        }
        if let Some((changes, work)) = above {
            options.push(format!("workdir={}", text(work)?));
            options.push(format!("upperdir={}", text(changes)?));
        }
        let lowers = lowers.iter().map(|lower| text(lower)).collect::<Result<Vec<_>, _>>()?;
        options.push(format!("lowerdir={}", lowers.join(":")));
        Ok(Self {
            fs_type: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options,
        })
    }
}

fn text(path: &Path) -> Result<String, SnapshotError> {
    match path.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(SnapshotError::Argument(format!("{} is not UTF-8", path.display()))),
    }
}
