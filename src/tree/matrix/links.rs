//! Hard links to lower layers, to later entries, to deleted paths, and to nothing.

use super::*;

#[test]
fn row_11_hardlink_to_a_lower_file() {
    MatrixView::over_base(vec![link("hl3", "hl1")])
        .is("hl3", "f0:8 644 1 n3")
        .same("hl3", "hl2");
}

#[test]
fn row_12_name_rebound_after_a_hardlink() {
    MatrixView::over_base(vec![file("t1", 50), link("t1h", "t1"), file("t1", 51)])
        .is("t1", "f1:51 644 1 n1")
        .is("t1h", "f1:50 644 1 n1");
}

#[test]
fn hard_links_to_a_whiteout_device_are_whiteouts() {
    // busybox tar writes an overlay's upper directory in this way: all its whiteouts are one inode.
    MatrixView::over_base(vec![
        white_device("f"),
        link("g", "f"),
        link("d/a", "g"),
        link("new", "f"),
    ])
    .children("", "d dd hl1 hl2 opq sl")
    .children("d", "b");
    MatrixView::over_base(vec![link("g", "late"), link("f", "g"), white_device("late")])
        .children("", "d dd hl1 hl2 opq sl");
}

#[test]
fn row_21_hardlink_before_its_target() {
    MatrixView::over_base(vec![link("early", "late"), owned(file("late", 50), 0o600, 9)])
        .is("early", "f1:50 600 9 n2")
        .same("early", "late");
}

#[test]
fn row_22_later_hardlink_metadata_wins() {
    MatrixView::over_base(vec![
        xattr(file("one", 50), "user.kept", "1"),
        xattr(owned(link("two", "one"), 0o600, 9), "user.new", "2"),
    ])
    .is("one", "f1:50 600 9 n2");
    let view = MatrixView::over_base(vec![owned(link("hl3", "hl1"), 0o600, 9)]);
    view.is("hl1", "f0:8 600 9 n3");
}

#[test]
fn row_22_hardlink_attributes_are_added() {
    let view = MatrixView::over_base(vec![
        xattr(xattr(file("one", 50), "user.kept", "1"), "user.set", "1"),
        xattr(link("two", "one"), "user.set", "2"),
    ]);
    assert_eq!(view.xattrs("one"), "user.kept=1 user.set=2");
}

#[test]
fn row_31_hardlink_to_a_symlink_shares_it() {
    MatrixView::over_base(vec![symlink("s1", "f"), link("s2", "s1"), link("s3", "sl")])
        .is("s2", "-> f 777 1 n2")
        .same("s1", "s2")
        .is("sl", "-> d 777 1 n2");
}

#[test]
fn row_34_hardlink_into_an_opaque_directory() {
    MatrixView::over_base(vec![opaque("opq"), link("opq/again", "opq/o1")])
        .children("opq", "again")
        .is("opq/again", "f0:6 644 1 n1");
}

#[test]
fn row_35_hardlink_to_a_whited_out_file_is_a_whiteout() {
    MatrixView::over_base(vec![whiteout("hl1"), link("f", "hl1"), link("hz", "hl1")])
        .children("", "d dd g hl2 opq sl")
        .is("hl2", "f0:8 644 1 n1");
    MatrixView::over_base(vec![link("f", "g"), whiteout("g")]).children("", "d dd hl1 hl2 opq sl");
    MatrixView::over_base(vec![whiteout("g"), file("g", 50), link("f", "g")]).same("f", "g");
}

#[test]
fn hidden_entries_serve_as_link_targets_only() {
    let hidden = entry(".wh..wh.plnk/1.2", EntryKind::Hidden(data(50)));
    MatrixView::over_base(vec![
        hidden,
        link("x", ".wh..wh.plnk/1.2"),
        link("y", ".wh..wh.plnk/1.2"),
    ])
    .children("", "d dd f g hl1 hl2 opq sl x y")
    .is("x", "f1:50 644 1 n2");
}

#[test]
fn hardlink_target_through_a_lower_symlink() {
    MatrixView::over_base(vec![link("x", "sl/a")]).same("x", "d/a");
}

#[test]
fn unusable_hardlinks_are_named() {
    let fails = |second| merge(vec![base(), second]).unwrap_err().to_string();
    assert_eq!(
        fails(vec![link("x", "no")]),
        "layer 1: hard link /x points at /no, which does not exist"
    );
    assert_eq!(
        fails(vec![link("x", "d")]),
        "layer 1: hard link /x points at /d, which is a directory"
    );
    assert_eq!(
        fails(vec![link("x", "y"), dir("y")]),
        "layer 1: hard link /x points at /y, which is a directory"
    );
    assert_eq!(
        fails(vec![link("x", "x")]),
        "layer 1: hard link /x to /x leads back to itself"
    );
    let cycle = fails(vec![link("x", "y"), link("z", "y"), link("y", "x")]);
    assert!(cycle.ends_with("leads back to itself"), "{cycle}");
}

#[test]
fn long_chains_of_forward_links_settle() {
    let mut second: Vec<_> = (0..20_000)
        .map(|i| link(&format!("l{i}"), &format!("l{}", i + 1)))
        .collect();
    second.push(file("l20000", 50));
    MatrixView::over_base(second).is("l0", "f1:50 644 1 n20001");
}
