//! A second merge, written to be obvious instead of fast: flat maps from path to inode. Tests compare the real merge
//! with it.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use crate::toc::{DataLayout, DeviceNumber, EntryKind, FileData, Metadata, Toc, TocEntry, Xattrs};
use crate::tree::{LayerIdx, Merger, NodeId, NodeKind, Tree};

type Path = Vec<Vec<u8>>;

#[derive(Debug, Clone, PartialEq)]
enum ModelContent {
    Directory {
        described: bool,
    },
    File(u32, u64),
    Symlink(Vec<u8>),
    Fifo,
    /// A character device 0:0, or a hard link to a path that the layer deletes.
    Whiteout,
    /// A hard link to this path that waits for the end of the layer.
    Waiting(Path),
}

#[derive(Debug, Clone)]
struct Object {
    content: ModelContent,
    meta: Metadata,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    layer: u32,
    entry: usize,
}

#[derive(Debug, Default)]
struct Model {
    objects: Vec<Object>,
    merged: BTreeMap<Path, usize>,
}

#[derive(Debug)]
struct Refused;

fn path_of(bytes: &[u8]) -> Path {
    let names = bytes.split(|byte| *byte == b'/').filter(|name| !name.is_empty());
    names.map(<[u8]>::to_vec).collect()
}

fn below(path: &Path, dir: &Path) -> bool {
    path.len() > dir.len() && path.starts_with(dir)
}

impl Model {
    fn is_directory(&self, id: usize) -> bool {
        matches!(self.objects[id].content, ModelContent::Directory { .. })
    }

    /// Replaces the first symlink among the components until none is left.
    fn follow(&self, names: &BTreeMap<Path, usize>, dir: &[Vec<u8>]) -> Result<Path, Refused> {
        let mut dir = dir.to_vec();
        'again: for _ in 0..=40 {
            let mut clean = Path::new();
            for (at, name) in dir.iter().enumerate() {
                match name.as_slice() {
                    b"." => continue,
                    b".." => {
                        clean.pop();
                        continue;
                    }
                    _ => clean.push(name.clone()),
                }
                if let Some(ModelContent::Symlink(target)) = names.get(&clean).map(|id| &self.objects[*id].content) {
                    clean.pop();
                    let start = if target.starts_with(b"/") { Path::new() } else { clean };
                    dir = [start, path_of(target), dir[at + 1..].to_vec()].concat();
                    continue 'again;
                }
            }
            return Ok(clean);
        }
        Err(Refused)
    }

    fn resolve(&self, names: &BTreeMap<Path, usize>, path: &Path) -> Result<Path, Refused> {
        let (last, dir) = path.split_last().ok_or(Refused)?;
        let mut path = self.follow(names, dir)?;
        path.push(last.clone());
        Ok(path)
    }

    fn put(&mut self, own: &mut BTreeMap<Path, usize>, path: &Path, id: usize) {
        for depth in 1..path.len() {
            let dir = path[..depth].to_vec();
            if !own.get(&dir).is_some_and(|id| self.is_directory(*id)) {
                let implied = Object {
                    content: ModelContent::Directory { described: false },
                    meta: Metadata {
                        mode: 0o755,
                        uid: 0,
                        gid: 0,
                        mtime: 0,
                        mtime_nsec: 0,
                    },
                    xattrs: BTreeMap::new(),
                    layer: 0,
                    entry: 0,
                };
                self.objects.push(implied);
                own.retain(|path, _| !below(path, &dir));
                own.insert(dir, self.objects.len() - 1);
            }
        }
        if !self.is_directory(id) {
            own.retain(|other, _| !below(other, path));
        }
        own.insert(path.clone(), id);
    }

    fn apply(&mut self, layer: u32, entries: &[TocEntry]) -> Result<(), Refused> {
        let mut own: BTreeMap<Path, usize> = BTreeMap::new();
        let mut hidden: BTreeMap<Path, usize> = BTreeMap::new();
        let mut whiteouts = BTreeSet::new();
        let mut opaques = BTreeSet::new();
        let mut metas: Vec<(usize, usize)> = Vec::new();
        for (number, entry) in entries.iter().enumerate() {
            let raw = path_of(&entry.path);
            if let EntryKind::Opaque = entry.kind {
                opaques.insert(self.follow(&own, &raw)?);
                continue;
            }
            if raw.is_empty() {
                continue;
            }
            let content = match &entry.kind {
                EntryKind::Directory => ModelContent::Directory { described: true },
                EntryKind::Regular(data) | EntryKind::Hidden(data) => ModelContent::File(layer, data.size),
                EntryKind::Symlink(target) => ModelContent::Symlink(target.to_vec()),
                EntryKind::Hardlink(target) => ModelContent::Waiting(path_of(target)),
                EntryKind::Whiteout => {
                    whiteouts.insert(self.resolve(&own, &raw)?);
                    continue;
                }
                EntryKind::CharDevice(_) => ModelContent::Whiteout,
                _ => ModelContent::Fifo,
            };
            let xattrs = entry.xattrs.iter().map(|(k, v)| (k.to_vec(), v.to_vec())).collect();
            let object = Object {
                content,
                meta: entry.meta,
                xattrs,
                layer,
                entry: number,
            };
            if let EntryKind::Hidden(_) = entry.kind {
                self.objects.push(object);
                hidden.insert(raw, self.objects.len() - 1);
                continue;
            }
            let path = self.resolve(&own, &raw)?;
            if let ModelContent::Waiting(target) = &object.content {
                let now = own.get(&self.resolve(&own, target)?).or(hidden.get(target)).copied();
                if now.is_some_and(|id| self.is_directory(id)) {
                    return Err(Refused);
                }
                let id = now.unwrap_or_else(|| {
                    self.objects.push(object);
                    self.objects.len() - 1
                });
                metas.push((number, id));
                self.put(&mut own, &path, id);
            } else if let (ModelContent::Directory { .. }, Some(&id)) = (&object.content, own.get(&path))
                && self.is_directory(id)
            {
                self.objects[id] = object;
            } else {
                self.objects.push(object);
                self.put(&mut own, &path, self.objects.len() - 1);
            }
        }
        self.end_layer(entries, layer, own, hidden, &whiteouts, &opaques, metas)
    }

    #[allow(clippy::too_many_arguments)]
    fn end_layer(
        &mut self,
        entries: &[TocEntry],
        layer: u32,
        mut own: BTreeMap<Path, usize>,
        hidden: BTreeMap<Path, usize>,
        whiteouts: &BTreeSet<Path>,
        opaques: &BTreeSet<Path>,
        metas: Vec<(usize, usize)>,
    ) -> Result<(), Refused> {
        for id in 0..self.objects.len() {
            // A link of an earlier layer that lost its name still waits, and means nothing any more.
            if self.objects[id].layer == layer
                && let ModelContent::Waiting(target) = &self.objects[id].content
                && own.get(&self.resolve(&own, target)?).or(hidden.get(target)).is_none()
                && whiteouts.contains(&self.resolve(&own, target)?)
            {
                self.objects[id].content = ModelContent::Whiteout;
            }
        }
        let at_end = own.clone();
        let bound = |id: usize| -> Result<usize, Refused> {
            let mut id = id;
            for _ in 0..=entries.len() {
                let ModelContent::Waiting(target) = &self.objects[id].content else {
                    return if self.is_directory(id) { Err(Refused) } else { Ok(id) };
                };
                let here = self.resolve(&at_end, target)?;
                let found = match at_end.get(&here).or(hidden.get(target)) {
                    Some(found) => Some(found),
                    None => self.merged.get(&self.resolve(&self.merged, &here)?),
                };
                id = *found.ok_or(Refused)?;
            }
            Err(Refused)
        };
        let metas: Vec<_> = metas
            .iter()
            .map(|(n, id)| Ok((*n, bound(*id)?)))
            .collect::<Result<_, Refused>>()?;
        for (path, &id) in &at_end {
            if let ModelContent::Waiting(_) = self.objects[id].content {
                own.insert(path.clone(), bound(id)?);
            }
        }
        for (number, id) in metas {
            let object = &mut self.objects[id];
            if object.content != ModelContent::Whiteout && (object.layer < layer || object.entry < number) {
                object.meta = entries[number].meta;
                object
                    .xattrs
                    .extend(entries[number].xattrs.iter().map(|(k, v)| (k.to_vec(), v.to_vec())));
            }
        }
        self.merged.retain(|path, _| {
            !opaques.iter().any(|dir| below(path, dir)) && !whiteouts.iter().any(|hide| path.starts_with(hide))
        });
        let parents = whiteouts.iter().map(|path| &path[..path.len() - 1]);
        for dir in parents.chain(opaques.iter().map(|path| &path[..])) {
            let first_other = |names: &BTreeMap<Path, usize>| {
                let ids = (1..=dir.len()).map_while(|depth| names.get(&dir[..depth]).copied());
                ids.map(|id| &self.objects[id].content)
                    .find(|content| !matches!(content, ModelContent::Directory { .. }))
            };
            if matches!(first_other(&self.merged), Some(ModelContent::Symlink(_))) && first_other(&own).is_none() {
                let inside = [dir, &[b"inside".to_vec()]].concat();
                self.put(&mut own, &inside, 0);
                own.remove(&inside);
            }
        }
        for (path, id) in own {
            if self.objects[id].content == ModelContent::Whiteout {
                self.merged.retain(|other, _| !other.starts_with(&path));
                continue;
            }
            match self.merged.get(&path) {
                Some(&lower) if self.is_directory(lower) && self.is_directory(id) => {
                    if self.objects[id].content == (ModelContent::Directory { described: true }) {
                        self.merged.insert(path, id);
                    }
                }
                _ => {
                    self.merged.retain(|other, _| !below(other, &path));
                    self.merged.insert(path, id);
                }
            }
        }
        Ok(())
    }

    /// Returns one line for each path: type, metadata, link count, attributes and the first name of the inode.
    fn rows(&self) -> Vec<String> {
        let show = |path: &Path| path.join(&b'/').escape_ascii().to_string();
        let row = |(path, id): (&Path, &usize)| {
            let object = &self.objects[*id];
            let mut meta = object.meta;
            let (what, nlink) = match &object.content {
                ModelContent::Directory { .. } => {
                    let dirs = self
                        .merged
                        .iter()
                        .filter(|(p, id)| p.len() == path.len() + 1 && below(p, path) && self.is_directory(**id));
                    ("dir".to_owned(), 2 + dirs.count())
                }
                other => {
                    if let ModelContent::Symlink(_) = other {
                        meta.mode = 0o777;
                    }
                    let what = match other {
                        ModelContent::File(layer, tag) => format!("file {layer}:{tag}"),
                        ModelContent::Symlink(target) => format!("-> {}", target.escape_ascii()),
                        ModelContent::Fifo => "fifo".to_owned(),
                        other => unreachable!("{other:?} is not shown"),
                    };
                    (what, self.merged.values().filter(|other| *other == id).count())
                }
            };
            let first = self
                .merged
                .iter()
                .find(|(_, other)| *other == id)
                .map(|(path, _)| show(path));
            format!("{} {what} {meta:?} {nlink} {:?} {first:?}", show(path), object.xattrs)
        };
        self.merged.iter().map(row).collect()
    }
}

fn rows(tree: &Tree) -> Vec<String> {
    let mut paths: BTreeMap<Path, NodeId> = BTreeMap::new();
    let mut todo = vec![(Path::new(), Tree::ROOT)];
    while let Some((path, id)) = todo.pop() {
        if let NodeKind::Directory(children) = tree.node(id).kind {
            for (name, child) in children {
                todo.push(([path.as_slice(), &[name.to_vec()]].concat(), child));
            }
        }
        if !path.is_empty() {
            paths.insert(path, id);
        }
    }
    let show = |path: &Path| path.join(&b'/').escape_ascii().to_string();
    let row = |(path, id): (&Path, &NodeId)| {
        let node = tree.node(*id);
        let what = match &node.kind {
            NodeKind::Directory(_) => "dir".to_owned(),
            NodeKind::Regular { layer, data } => format!("file {}:{}", layer.0, data.size),
            NodeKind::Symlink(target) => format!("-> {}", target.escape_ascii()),
            NodeKind::Fifo => "fifo".to_owned(),
            other => unreachable!("{other:?} is not generated"),
        };
        let xattrs: BTreeMap<Vec<u8>, Vec<u8>> = node.xattrs.iter().map(|(k, v)| (k.to_vec(), v.to_vec())).collect();
        let first = paths.iter().find(|(_, other)| *other == id).map(|(path, _)| show(path));
        format!(
            "{} {what} {:?} {} {xattrs:?} {first:?}",
            show(path),
            node.meta,
            node.nlink
        )
    };
    paths.iter().map(row).collect()
}

fn path() -> impl Strategy<Value = Box<[u8]>> {
    proptest::collection::vec(proptest::sample::select(vec!["a", "b", "c"]), 1..4)
        .prop_map(|names| names.join("/").into_bytes().into())
}

fn target() -> impl Strategy<Value = Box<[u8]>> {
    let name = proptest::sample::select(vec!["a", "b", "c", "..", "/a", "."]);
    proptest::collection::vec(name, 1..3).prop_map(|names| names.join("/").into_bytes().into())
}

fn kind() -> impl Strategy<Value = EntryKind> {
    let data = |tag| FileData {
        size: tag,
        layout: DataLayout::Flat { device: 0 },
    };
    prop_oneof![
        4 => (1..1000u64).prop_map(move |tag| EntryKind::Regular(data(tag))),
        4 => Just(EntryKind::Directory),
        3 => path().prop_map(EntryKind::Hardlink),
        1 => Just(EntryKind::Hardlink((*b"h").into())),
        1 => target().prop_map(EntryKind::Symlink),
        2 => Just(EntryKind::Whiteout),
        2 => Just(EntryKind::CharDevice(DeviceNumber::WHITEOUT)),
        1 => Just(EntryKind::Opaque),
        1 => Just(EntryKind::Fifo),
    ]
}

fn layer(links: bool) -> impl Strategy<Value = Vec<TocEntry>> {
    let xattrs = prop_oneof![
        3 => Just(Xattrs::new()),
        1 => Just(vec![((*b"user.a").into(), (*b"1").into())]),
        1 => Just(vec![((*b"user.b").into(), (*b"2").into())]),
    ];
    let entry = (path(), kind(), 0..0o7777u16, 0..9u32, xattrs).prop_map(|(path, kind, mode, uid, xattrs)| {
        let meta = Metadata {
            mode,
            uid,
            gid: 1,
            mtime: i64::from(uid) - 4,
            mtime_nsec: 0,
        };
        TocEntry {
            path,
            kind,
            meta,
            xattrs,
        }
    });
    let wanted = move |entry: &TocEntry| links || !matches!(entry.kind, EntryKind::Hardlink(_));
    let hidden = TocEntry {
        path: (*b"h").into(),
        kind: EntryKind::Hidden(FileData {
            size: 1,
            layout: DataLayout::Flat { device: 0 },
        }),
        meta: Metadata {
            mode: 1,
            uid: 1,
            gid: 1,
            mtime: 1,
            mtime_nsec: 1,
        },
        xattrs: Xattrs::new(),
    };
    (proptest::collection::vec(entry, 0..10), any::<bool>()).prop_map(move |(mut entries, hide)| {
        entries.retain(wanted);
        if hide {
            entries.insert(entries.len() / 2, hidden.clone());
        }
        entries
    })
}

fn compare(layers: Vec<Vec<TocEntry>>) -> Result<bool, TestCaseError> {
    let mut merger = Merger::new();
    let mut model = Model::default();
    for (number, entries) in layers.into_iter().enumerate() {
        let wanted = model.apply(number as u32, &entries);
        let toc = Toc {
            entries,
            device_size: 1 << 20,
            ..Toc::default()
        };
        let got = merger.add(LayerIdx(number as u32), &toc.pack().unwrap());
        prop_assert_eq!(got.is_err(), wanted.is_err(), "{:?} {:?}", got, wanted);
        if got.is_err() {
            return Ok(false);
        }
        // Compaction must not change the result.
        if number % 2 == 0 {
            merger.compact();
        }
    }
    prop_assert_eq!(rows(&merger.finish()), model.rows());
    Ok(true)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn merge_agrees_with_the_model(layers in proptest::collection::vec(layer(true), 1..5)) {
        compare(layers)?;
    }

    #[test]
    fn merge_without_links_agrees_with_the_model(layers in proptest::collection::vec(layer(false), 1..5)) {
        compare(layers)?;
    }
}
