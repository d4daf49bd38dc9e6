//! The corner cases on which image engines differ, one test each. A test lays a second layer over a base layer and
//! checks the tree.

mod links;

use std::collections::BTreeMap;

use crate::toc::{DataLayout, DeviceNumber, EntryKind, FileData, Metadata, Toc, TocEntry};
use crate::tree::{LayerIdx, Merger, NodeId, NodeKind, Tree, TreeError};

const OWNED: Metadata = Metadata {
    mode: 0o644,
    uid: 1,
    gid: 2,
    mtime: 77,
    mtime_nsec: 5,
};

fn entry(path: &str, kind: EntryKind) -> TocEntry {
    TocEntry {
        path: path.as_bytes().into(),
        kind,
        meta: OWNED,
        xattrs: Vec::new(),
    }
}

fn data(tag: u64) -> FileData {
    FileData {
        size: tag,
        layout: DataLayout::Flat { device: 0 },
    }
}

/// A regular file. `tag` distinguishes contents; it is the size.
fn file(path: &str, tag: u64) -> TocEntry {
    entry(path, EntryKind::Regular(data(tag)))
}

fn link(path: &str, target: &str) -> TocEntry {
    entry(path, EntryKind::Hardlink(target.as_bytes().into()))
}

fn symlink(path: &str, target: &str) -> TocEntry {
    entry(path, EntryKind::Symlink(target.as_bytes().into()))
}

fn dir(path: &str) -> TocEntry {
    owned(entry(path, EntryKind::Directory), 0o711, 7)
}

fn whiteout(path: &str) -> TocEntry {
    entry(path, EntryKind::Whiteout)
}

fn white_device(path: &str) -> TocEntry {
    entry(path, EntryKind::CharDevice(DeviceNumber::WHITEOUT))
}

fn opaque(path: &str) -> TocEntry {
    entry(path, EntryKind::Opaque)
}

fn owned(mut entry: TocEntry, mode: u16, uid: u32) -> TocEntry {
    entry.meta.mode = mode;
    entry.meta.uid = uid;
    entry
}

fn xattr(mut entry: TocEntry, name: &str, value: &str) -> TocEntry {
    entry.xattrs.push((name.as_bytes().into(), value.as_bytes().into()));
    entry.xattrs.sort();
    entry
}

fn base() -> Vec<TocEntry> {
    vec![
        owned(dir(""), 0o750, 3),
        xattr(owned(dir("d"), 0o700, 5), "user.low", "1"),
        file("d/a", 1),
        file("d/b", 2),
        file("f", 3),
        file("g", 4),
        dir("dd"),
        file("dd/old", 5),
        dir("opq"),
        file("opq/o1", 6),
        file("opq/o2", 7),
        symlink("sl", "d"),
        file("hl1", 8),
        link("hl2", "hl1"),
    ]
}

fn merge(layers: Vec<Vec<TocEntry>>) -> Result<Tree, TreeError> {
    let mut merger = Merger::new();
    for (number, entries) in layers.into_iter().enumerate() {
        let toc = Toc {
            entries,
            device_size: 1 << 20,
            ..Toc::default()
        };
        merger.add(LayerIdx(number as u32), &toc.pack().unwrap())?;
    }
    Ok(merger.finish())
}

/// Maps each path to `what MODE UID nLINKS`, where `what` is `dir`, `fLAYER:TAG`, `-> TARGET` and so on.
#[derive(Debug)]
struct MatrixView(BTreeMap<String, (NodeId, String)>, Tree);

impl MatrixView {
    fn of(tree: Tree) -> Self {
        let mut rows = BTreeMap::new();
        let mut todo = vec![(String::new(), Tree::ROOT)];
        while let Some((path, id)) = todo.pop() {
            let node = tree.node(id);
            let what = match &node.kind {
                NodeKind::Directory(children) => {
                    for (name, child) in children {
                        let name = std::str::from_utf8(name).unwrap();
                        todo.push((format!("{path}/{name}").trim_start_matches('/').to_owned(), *child));
                    }
                    "dir".to_owned()
                }
                NodeKind::Regular { layer, data } => format!("f{}:{}", layer.0, data.size),
                NodeKind::Symlink(target) => format!("-> {}", target.escape_ascii()),
                other => format!("{other:?}"),
            };
            let row = format!("{what} {:o} {} n{}", node.meta.mode, node.meta.uid, node.nlink);
            rows.insert(path, (id, row));
        }
        Self(rows, tree)
    }

    fn over_base(second: Vec<TocEntry>) -> Self {
        Self::of(merge(vec![base(), second]).unwrap())
    }

    #[track_caller]
    fn is(&self, path: &str, row: &str) -> &Self {
        assert_eq!(
            self.0.get(path).map(|(_, row)| row.as_str()),
            Some(row),
            "{path} in {self:#?}"
        );
        self
    }

    #[track_caller]
    fn children(&self, dir: &str, names: &str) -> &Self {
        let prefix = if dir.is_empty() {
            String::new()
        } else {
            format!("{dir}/")
        };
        let have = self.0.keys().filter_map(|path| path.strip_prefix(&prefix));
        let have: Vec<_> = have.filter(|name| !name.is_empty() && !name.contains('/')).collect();
        assert_eq!(have.join(" "), names, "children of {dir}");
        self
    }

    #[track_caller]
    fn same(&self, left: &str, right: &str) -> &Self {
        assert_eq!(self.0[left].0, self.0[right].0, "{left} and {right} are one inode");
        self
    }

    fn xattrs(&self, path: &str) -> String {
        let node = self.1.node(self.0[path].0);
        let show = |(name, value): &(Box<[u8]>, Box<[u8]>)| format!("{}={}", name.escape_ascii(), value.escape_ascii());
        node.xattrs.iter().map(show).collect::<Vec<_>>().join(" ")
    }
}

#[test]
fn base_alone() {
    let view = MatrixView::over_base(vec![]);
    view.children("", "d dd f g hl1 hl2 opq sl")
        .is("d", "dir 700 5 n2")
        .is("sl", "-> d 777 1 n1")
        .is("hl1", "f0:8 644 1 n2")
        .same("hl1", "hl2")
        .is("", "dir 755 0 n5");
}

#[test]
fn row_1_whiteout_then_file() {
    MatrixView::over_base(vec![whiteout("f"), file("f", 50)]).is("f", "f1:50 644 1 n1");
}

#[test]
fn row_2_file_then_whiteout() {
    MatrixView::over_base(vec![file("g", 50), whiteout("g")]).is("g", "f1:50 644 1 n1");
}

#[test]
fn row_3_whiteout_then_directory() {
    MatrixView::over_base(vec![whiteout("dd"), dir("dd"), file("dd/new", 50)]).children("dd", "new");
}

#[test]
fn row_4_directory_then_whiteout() {
    MatrixView::over_base(vec![dir("dd"), file("dd/new", 50), whiteout("dd")]).children("dd", "new");
}

#[test]
fn row_5_opaque_marker_last() {
    MatrixView::over_base(vec![dir("opq"), file("opq/new", 50), opaque("opq")]).children("opq", "new");
}

#[test]
fn row_6_opaque_marker_first() {
    MatrixView::over_base(vec![opaque("opq"), dir("opq"), file("opq/new", 50)]).children("opq", "new");
}

#[test]
fn row_7_opaque_marker_alone() {
    MatrixView::over_base(vec![opaque("d")])
        .children("d", "")
        .is("d", "dir 700 5 n2");
}

#[test]
fn row_8_directory_to_file() {
    MatrixView::over_base(vec![file("d", 50)])
        .is("d", "f1:50 644 1 n1")
        .children("d", "");
}

#[test]
fn row_9_file_to_directory() {
    MatrixView::over_base(vec![dir("f"), file("f/x", 50)])
        .is("f", "dir 711 7 n2")
        .children("f", "x");
}

#[test]
fn row_10_lower_symlink_as_parent_is_replaced() {
    MatrixView::over_base(vec![file("sl/new", 50)])
        .is("sl", "dir 755 0 n2")
        .children("sl", "new")
        .children("d", "a b");
}

#[test]
fn row_13_implied_parents() {
    MatrixView::over_base(vec![file("d/ns/file", 50)])
        .is("d", "dir 700 5 n3")
        .is("d/ns", "dir 755 0 n2")
        .children("d", "a b ns");
}

#[test]
fn row_14_root_entry_is_ignored() {
    MatrixView::over_base(vec![xattr(dir(""), "user.x", "1")]).is("", "dir 755 0 n5");
}

#[test]
fn row_16_char_device_0_0_is_a_whiteout_and_other_devices_are_not() {
    let device = entry("g", EntryKind::CharDevice(DeviceNumber { major: 1, minor: 3 }));
    MatrixView::over_base(vec![white_device("f"), device])
        .children("", "d dd g hl1 hl2 opq sl")
        .is("g", "CharDevice(DeviceNumber { major: 1, minor: 3 }) 644 1 n1");
}

#[test]
fn whiteout_devices_hide_directories_too_and_are_never_seen() {
    MatrixView::over_base(vec![
        white_device("d"),
        dir("n"),
        white_device("n/x"),
        white_device("none/x"),
    ])
    .children("", "dd f g hl1 hl2 n none opq sl")
    .children("n", "")
    .children("none", "");
    let alone = MatrixView::of(merge(vec![vec![white_device("x"), file("y", 1), white_device("dir/x")]]).unwrap());
    alone.children("", "dir y").children("dir", "");
}

#[test]
fn the_last_of_a_whiteout_device_and_another_entry_counts() {
    MatrixView::over_base(vec![white_device("f"), file("f", 50), file("g", 51), white_device("g")])
        .children("", "d dd f hl1 hl2 opq sl")
        .is("f", "f1:50 644 1 n1");
    MatrixView::over_base(vec![white_device("d"), file("d/x", 50)]).children("d", "a b x");
}

#[test]
fn row_17_whiteout_without_parent_entry() {
    MatrixView::over_base(vec![whiteout("d/a")])
        .is("d", "dir 700 5 n2")
        .children("d", "b");
}

#[test]
fn row_19_symlink_of_the_same_layer_as_parent() {
    MatrixView::over_base(vec![symlink("ds", "d"), file("ds/q", 50)])
        .is("ds", "-> d 777 1 n1")
        .is("d", "dir 700 5 n2")
        .children("d", "a b q");
}

#[test]
fn row_19_also_for_whiteouts_and_dotdot() {
    MatrixView::over_base(vec![symlink("dd/up", "../d"), whiteout("dd/up/a"), file("dd/up/x", 50)])
        .children("d", "b x")
        .children("dd", "old up");
}

#[test]
fn row_23_file_twice() {
    MatrixView::over_base(vec![file("x", 50), file("x", 51)]).is("x", "f1:51 644 1 n1");
}

#[test]
fn row_24_directory_twice_merges() {
    MatrixView::over_base(vec![
        dir("x"),
        file("x/1", 50),
        owned(dir("x"), 0o700, 8),
        file("x/2", 51),
    ])
    .is("x", "dir 700 8 n2")
    .children("x", "1 2");
}

#[test]
fn row_25_file_then_directory_in_one_layer() {
    MatrixView::over_base(vec![file("x", 50), dir("x"), file("x/1", 51)]).children("x", "1");
}

#[test]
fn row_26_directory_then_file_in_one_layer() {
    MatrixView::over_base(vec![dir("x"), file("x/1", 50), file("x", 51)])
        .is("x", "f1:51 644 1 n1")
        .children("x", "");
}

#[test]
fn row_32_whiteout_and_opaque_after_a_new_file() {
    MatrixView::over_base(vec![file("opq/o1", 50), whiteout("opq/o1"), opaque("opq")])
        .children("opq", "o1")
        .is("opq/o1", "f1:50 644 1 n1");
}

#[test]
fn row_33_opaque_root_hides_everything() {
    MatrixView::over_base(vec![opaque(""), file("only", 50)]).children("", "only");
}

#[test]
fn row_36_directory_over_directory_replaces_attributes() {
    let view = MatrixView::over_base(vec![xattr(dir("d"), "user.up", "2")]);
    view.is("d", "dir 711 7 n2").children("d", "a b");
    assert_eq!(view.xattrs("d"), "user.up=2");
}

#[test]
fn row_38_directory_without_attributes_clears_them() {
    assert_eq!(MatrixView::over_base(vec![]).xattrs("d"), "user.low=1");
    assert_eq!(MatrixView::over_base(vec![dir("d")]).xattrs("d"), "");
}

#[test]
fn parent_entry_after_its_children() {
    MatrixView::over_base(vec![file("n/x", 50), dir("n")])
        .is("n", "dir 711 7 n2")
        .children("n", "x");
}

#[test]
fn markers_make_no_directories() {
    MatrixView::over_base(vec![
        whiteout("new/x"),
        opaque("other"),
        opaque("f"),
        whiteout("g/x"),
        symlink("u", "d"),
        whiteout("u/a"),
    ])
    .children("", "d dd f g hl1 hl2 opq sl u")
    .children("d", "b");
}

/// A layer with symlinks of all kinds, and directories behind them.
fn symlinked() -> Vec<TocEntry> {
    vec![
        dir("usr/lib"),
        file("usr/lib/foo", 1),
        file("usr/lib/sub/x", 2),
        symlink("usr/lib/up", "../../other"),
        file("other/foo", 3),
        symlink("lib", "usr/lib"),
        symlink("abs", "/usr/lib"),
        symlink("chain", "lib"),
        symlink("out", "../../usr/lib"),
        symlink("gone", "nowhere"),
        symlink("loop", "loop"),
    ]
}

#[test]
fn a_marker_below_a_lower_symlink_puts_a_directory_in_its_place() {
    // podman 4.3 and containerd 1.6 show such images in this way. umoci follows the symlink instead.
    for name in ["lib", "abs", "chain", "out", "gone", "loop"] {
        for marker in [whiteout(&format!("{name}/foo")), opaque(name)] {
            MatrixView::of(merge(vec![symlinked(), vec![marker]]).unwrap())
                .is(name, "dir 755 0 n2")
                .children(name, "")
                .children("usr/lib", "foo sub up");
        }
    }
    MatrixView::of(merge(vec![symlinked(), vec![whiteout("lib/up/foo")]]).unwrap())
        .children("lib", "up")
        .children("lib/up", "")
        .children("other", "foo");
    MatrixView::of(merge(vec![symlinked(), vec![opaque("lib/sub"), file("lib/new", 50)]]).unwrap())
        .children("lib", "new sub")
        .children("usr/lib/sub", "x");
}

#[test]
fn a_marker_below_a_symlink_that_goes_away_makes_no_directory() {
    let over = |second| MatrixView::of(merge(vec![symlinked(), second]).unwrap());
    over(vec![whiteout("lib"), whiteout("lib/foo")]).children("", "abs chain gone loop other out usr");
    over(vec![whiteout("lib/foo"), whiteout("lib")]).children("", "abs chain gone loop other out usr");
    over(vec![whiteout("lib/foo"), symlink("lib", "other")])
        .is("lib", "-> other 777 1 n1")
        .children("usr/lib", "foo sub up");
    over(vec![whiteout("lib/foo"), file("lib", 50)]).is("lib", "f1:50 644 1 n1");
    // A symlink of the same layer is followed.
    over(vec![symlink("lib", "other"), whiteout("lib/foo")])
        .is("lib", "-> other 777 1 n1")
        .children("other", "");
    over(vec![dir("lib"), whiteout("lib/foo")]).children("lib", "");
}

#[test]
fn symlink_parents_that_lead_nowhere_are_refused() {
    let fails = |second| merge(vec![second]).unwrap_err().to_string();
    let looped = fails(vec![symlink("a", "b"), symlink("b", "a"), file("a/x", 1)]);
    assert!(looped.contains("too many symlinks"), "{looped}");
    let long = fails(vec![symlink("a", &"n".repeat(256)), file("a/x", 1)]);
    assert!(long.contains("longer than 255"), "{long}");
    let deep = "n/".repeat(2000);
    let long = fails(vec![
        symlink(&format!("{deep}a"), &deep),
        file(&format!("{deep}a/x"), 1),
    ]);
    assert!(long.contains("longer than 4096"), "{long}");
}

#[test]
fn deep_trees_need_no_stack() {
    let deep = format!("{}x", "n/".repeat(2047));
    let tree = merge(vec![vec![file(&deep, 1)], vec![whiteout(&deep)], vec![file(&deep, 2)]]).unwrap();
    assert_eq!(tree.len(), 2049);
}
