//! Names of entries: their canonical form, and the meaning of names with the whiteout prefix.
//!
//! Names are bytes, never text. An absolute name begins at the root, and `..` cannot leave the root. Every engine
//! that unpacks layers puts `a/../../b` at `/b`.

use super::error::NameProblem;

/// Longest component in bytes (`NAME_MAX` of Linux).
const COMPONENT_MAX: usize = 255;
/// Longest path in bytes (`PATH_MAX` of Linux). No system call can name a longer path.
const PATH_MAX: usize = 4096;

/// Prefix of whiteout and opaque markers (OCI image specification, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";

/// Converts a name from a tar to the form of [`TocEntry::path`](super::TocEntry::path). The root becomes the empty
/// path.
pub(super) fn canonical(raw: &[u8]) -> Result<Box<[u8]>, NameProblem> {
    if raw.contains(&0) {
        return Err(NameProblem::Nul);
    }
    let mut path = Vec::with_capacity(raw.len().min(PATH_MAX));
    for component in raw.split(|&b| b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => path.truncate(path.iter().rposition(|&b| b == b'/').unwrap_or(0)),
            _ => {
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(component);
            }
        }
    }
    // Check lengths only after `..` has removed components. A marker's length counts without its prefix, because it
    // stands for the name behind the prefix.
    if path
        .split(|&b| b == b'/')
        .any(|component| unmarked(component).len() > COMPONENT_MAX)
    {
        return Err(NameProblem::ComponentTooLong);
    }
    if length(&path) > PATH_MAX {
        return Err(NameProblem::PathTooLong);
    }
    Ok(path.into())
}

/// Returns a name without the whiteout prefix.
fn unmarked(component: &[u8]) -> &[u8] {
    component.strip_prefix(WHITEOUT).unwrap_or(component)
}

/// Returns the length of a path in bytes, without the whiteout prefix of its last component.
fn length(path: &[u8]) -> usize {
    let base = path.rsplit(|&b| b == b'/').next().unwrap_or_default();
    path.len() - (base.len() - unmarked(base).len())
}

/// Whether [`canonical`] leaves `path` as it is.
pub(super) fn is_canonical(path: &[u8]) -> bool {
    path.is_empty()
        || length(path) <= PATH_MAX
            && path
                .split(|&b| b == b'/')
                .all(|c| !matches!(c, b"" | b"." | b"..") && unmarked(c).len() <= COMPONENT_MAX && !c.contains(&0))
}

/// Whether `path` is canonical and the tree can show it.
pub(super) fn is_visible(path: &[u8]) -> bool {
    is_canonical(path) && path.len() <= PATH_MAX && path.split(|&b| b == b'/').all(|c| c.len() <= COMPONENT_MAX)
}

/// What an entry's name says about the entry.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum EntryName<'a> {
    /// An ordinary name.
    Visible,
    /// A whiteout: hides this path of the lower layers.
    Whiteout(Box<[u8]>),
    /// An opaque marker: makes this directory opaque.
    Opaque(&'a [u8]),
    /// AUFS bookkeeping (`.wh..wh.plnk/`, `.wh..wh.aufs`, `.wh..wh.orph/`).
    Bookkeeping,
    /// A reserved or meaningless name: `.wh.`, `.wh..`, `.wh...`, or a name below a whiteout.
    Meaningless,
}

/// Classifies a canonical path by the whiteout rules of the OCI image specification ("Whiteouts").
pub(super) fn classify(path: &[u8]) -> EntryName<'_> {
    const AUFS: &[u8] = b".wh..wh.";
    const OPAQUE: &[u8] = b".wh..wh..opq";
    let (dir, base) = match path.iter().rposition(|&b| b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&path[..0], path),
    };
    let marked = |c: &&[u8]| c.starts_with(WHITEOUT);
    match dir.split(|&b| b == b'/').find(marked) {
        Some(c) if c.starts_with(AUFS) && c != OPAQUE => return EntryName::Bookkeeping,
        Some(_) => return EntryName::Meaningless,
        None => {}
    }
    match base.strip_prefix(WHITEOUT) {
        None => EntryName::Visible,
        Some(_) if base == OPAQUE => EntryName::Opaque(dir),
        Some(_) if base.starts_with(AUFS) => EntryName::Bookkeeping,
        Some(b"" | b"." | b"..") => EntryName::Meaningless,
        Some(hidden) if dir.is_empty() => EntryName::Whiteout(hidden.into()),
        Some(hidden) => EntryName::Whiteout([dir, b"/", hidden].concat().into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_canonical() {
        for (raw, expected) in [
            ("", ""),
            (".", ""),
            ("./", ""),
            ("/", ""),
            ("..", ""),
            ("/..//.", ""),
            ("a", "a"),
            ("./a/", "a"),
            ("/a//b/./c/.", "a/b/c"),
            ("a/../b", "b"),
            ("a/b/../../c", "c"),
            ("a/../../esc", "esc"),
            ("a/b/..", "a"),
            ("a/...", "a/..."),
            ("..a/b..", "..a/b.."),
            ("a\\b", "a\\b"),
        ] {
            let path = canonical(raw.as_bytes()).unwrap();
            assert_eq!(&*path, expected.as_bytes(), "{raw}");
            assert!(is_canonical(&path));
        }
        assert_eq!(&*canonical(b"\xff/\x80").unwrap(), b"\xff/\x80");
    }

    #[test]
    fn impossible_names_are_refused() {
        assert_eq!(canonical(b"a\0b"), Err(NameProblem::Nul));
        assert!(canonical(&[b'a'; 255]).is_ok());
        assert_eq!(canonical(&[b'a'; 256]), Err(NameProblem::ComponentTooLong));
        let long = [b"abc/".repeat(1024), b"a".to_vec()].concat();
        assert_eq!(canonical(&long), Err(NameProblem::PathTooLong));
        assert!(canonical(&long[1..]).is_ok());
        // A component that `..` removes names nothing, so its length does not matter.
        assert_eq!(
            canonical(&[&[b'x'; 300][..], b"/../ok"].concat()).unwrap(),
            b"ok"[..].into()
        );
        // A marker is as long as the name it hides plus the prefix.
        let hidden = [b'a'; 255];
        let marker = canonical(&[b"d/.wh.", &hidden[..]].concat()).unwrap();
        assert_eq!(
            classify(&marker),
            EntryName::Whiteout([b"d/", &hidden[..]].concat().into())
        );
        assert!(is_canonical(&marker) && !is_visible(&marker));
        assert_eq!(
            canonical(&[b"d/.wh.a", &hidden[..]].concat()),
            Err(NameProblem::ComponentTooLong)
        );
        let deepest = [b"abc/".repeat(1023), b".wh.abcd".to_vec()].concat();
        assert!(canonical(&deepest).is_ok());
        assert_eq!(canonical(&[&deepest[..], b"e"].concat()), Err(NameProblem::PathTooLong));
        for bad in ["/", "/a", "a/", "a//b", "a/./b", "..", "a/..", "a\0"] {
            assert!(!is_canonical(bad.as_bytes()), "{bad}");
        }
    }

    #[test]
    fn whiteout_names() {
        let whiteout = |p: &str| EntryName::Whiteout(p.as_bytes().into());
        for (path, place) in [
            ("", EntryName::Visible),
            ("a/b.wh.c", EntryName::Visible),
            (".wh.a", whiteout("a")),
            ("d/.wh.a", whiteout("d/a")),
            ("d/.wh.a.wh.", whiteout("d/a.wh.")),
            (".wh.....", whiteout("....")),
            (".wh..wh..opq", EntryName::Opaque(b"")),
            ("a/b/.wh..wh..opq", EntryName::Opaque(b"a/b")),
            (".wh.", EntryName::Meaningless),
            ("a/.wh..", EntryName::Meaningless),
            (".wh...", EntryName::Meaningless),
            (".wh.a/b", EntryName::Meaningless),
            (".wh..wh..opq/b", EntryName::Meaningless),
            (".wh..wh.aufs", EntryName::Bookkeeping),
            (".wh..wh.plnk/12.34", EntryName::Bookkeeping),
            (".wh..wh.orph/.wh.x", EntryName::Bookkeeping),
        ] {
            assert_eq!(classify(path.as_bytes()), place, "{path}");
        }
    }
}
