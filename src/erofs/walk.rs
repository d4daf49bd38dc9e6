//! Resolves paths in a tree as the kernel does for a process with this root (path_resolution(7)).

use super::{ErofsError, FileType, Nid, Reader};

/// Most symbolic links followed in one path, as in the kernel.
pub const MOST_LINKS: u32 = 40;

/// Why a path cannot be resolved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WalkError {
    /// A name that does not exist.
    #[error("no such file or directory in the image")]
    NotFound,
    /// A parent in the path that is no directory.
    #[error("not a directory")]
    NotADirectory,
    /// Symbolic links that lead in a circle, or more than [`MOST_LINKS`] of them.
    #[error("too many levels of symbolic links")]
    TooManyLinks,
    /// The walker has looked up as many names as it may.
    #[error("too many names looked up")]
    Exhausted,
    /// The tree is damaged.
    #[error(transparent)]
    Tree(#[from] ErofsError),
}

/// Resolves paths in a tree.
#[derive(Debug)]
pub struct Walker<'a, B> {
    tree: &'a Reader<B>,
    /// Number of names that the walker may still look up.
    left: usize,
}

impl<'a, B: AsRef<[u8]>> Walker<'a, B> {
    /// Makes a walker that may look up any number of names.
    pub fn new(tree: &'a Reader<B>) -> Self {
        Self::limited(tree, usize::MAX)
    }

    /// Makes a walker that may look up `names` names in all.
    pub fn limited(tree: &'a Reader<B>, names: usize) -> Self {
        Self { tree, left: names }
    }

    /// Returns the tree.
    pub fn tree(&self) -> &'a Reader<B> {
        self.tree
    }

    /// Returns the inode at `path`. Follows symbolic links, also in the last component. A path that does not begin
    /// with `/` begins at the directory `from`.
    pub fn resolve(&mut self, from: Nid, path: &[u8]) -> Result<Nid, WalkError> {
        let mut links = 0;
        let mut at = if path.starts_with(b"/") { self.tree.root() } else { from };
        let mut is_directory = true;
        let mut rest = names(path);
        while let Some(name) = rest.pop() {
            if !is_directory {
                return Err(WalkError::NotADirectory);
            }
            self.left = self.left.checked_sub(1).ok_or(WalkError::Exhausted)?;
            let (next, file_type) = self.tree.lookup(at, &name)?.ok_or(WalkError::NotFound)?;
            if file_type != FileType::Symlink {
                (at, is_directory) = (next, file_type == FileType::Directory);
                continue;
            }
            links += 1;
            if links > MOST_LINKS {
                return Err(WalkError::TooManyLinks);
            }
            let target = self.tree.symlink(next)?;
            if target.starts_with(b"/") {
                at = self.tree.root();
            }
            rest.extend(names(target));
        }
        Ok(at)
    }
}

/// Returns the names of a path, the first one last.
fn names(path: &[u8]) -> Vec<Vec<u8>> {
    let names = path
        .split(|&byte| byte == b'/')
        .filter(|name| !matches!(*name, b"" | b"."));
    names.rev().map(<[u8]>::to_vec).collect()
}
