//! Random trees with the content of their data devices, and the edge cases that file systems get wrong.

use std::collections::BTreeSet;

use ocifs::toc::{DataLayout, DeviceNumber, FileData, Metadata, Xattrs};
use ocifs::tree::{LayerIdx, Node, NodeId, NodeKind, Tree};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

pub const BLOCK: usize = 4096;

/// A tree and the bytes of its layers' data devices.
#[derive(Debug)]
pub struct Sample {
    pub tree: Tree,
    pub devices: Vec<Vec<u8>>,
}

impl Sample {
    pub fn device_sizes(&self) -> Vec<u64> {
        self.devices.iter().map(|device| device.len() as u64).collect()
    }

    /// Returns the content of a file.
    pub fn content(&self, layer: LayerIdx, data: &FileData) -> Vec<u8> {
        let device = &self.devices[layer.0 as usize];
        let size = data.size as usize;
        match &data.layout {
            DataLayout::Flat { .. } if size == 0 => Vec::new(),
            DataLayout::Flat { device: at } => device[*at as usize..][..size].to_vec(),
            DataLayout::Chunked { chunk_bits, chunks } => {
                let chunk = BLOCK << chunk_bits;
                let mut content = vec![0; size];
                for (number, at) in chunks {
                    let start = *number as usize * chunk;
                    let len = chunk.min(size - start);
                    content[start..start + len].copy_from_slice(&device[*at as usize..][..len]);
                }
                content
            }
        }
    }
}

/// Collects nodes. Directories get their children when the sample is finished.
#[derive(Debug)]
pub struct Builder {
    nodes: Vec<Node>,
    devices: Vec<Vec<u8>>,
    directories: Vec<NodeId>,
    leaves: Vec<NodeId>,
    taken: BTreeSet<(NodeId, Box<[u8]>)>,
}

impl Builder {
    pub fn new(layers: usize) -> Self {
        let mut builder = Self {
            nodes: Vec::new(),
            devices: vec![Vec::new(); layers],
            directories: Vec::new(),
            leaves: Vec::new(),
            taken: BTreeSet::new(),
        };
        builder.push(meta(0o755, 0, 0), Xattrs::new(), NodeKind::Directory(Vec::new()));
        builder
    }

    fn push(&mut self, meta: Metadata, xattrs: Xattrs, kind: NodeKind) -> NodeId {
        let id = NodeId(self.nodes.len() as u32);
        match kind {
            NodeKind::Directory(_) => self.directories.push(id),
            _ => self.leaves.push(id),
        }
        self.nodes.push(Node {
            meta,
            xattrs,
            nlink: 0,
            kind,
        });
        id
    }

    /// Adds a node `kind` at `name`. Returns none if the name is taken.
    pub fn add(&mut self, dir: NodeId, name: &[u8], meta: Metadata, xattrs: Xattrs, kind: NodeKind) -> Option<NodeId> {
        if !self.taken.insert((dir, name.into())) {
            return None;
        }
        let id = self.push(meta, xattrs, kind);
        self.link(dir, name, id);
        Some(id)
    }

    fn link(&mut self, dir: NodeId, name: &[u8], id: NodeId) {
        match &mut self.nodes[dir.0 as usize].kind {
            NodeKind::Directory(children) => children.push((name.into(), id)),
            _ => unreachable!(),
        }
    }

    /// Stores `len` bytes in a layer's device at the next block boundary. None is zero, and they differ from those at
    /// other places. Returns their address.
    fn store(&mut self, layer: usize, len: usize) -> u64 {
        let device = &mut self.devices[layer];
        let start = device.len();
        let byte = |at: usize| ((start / BLOCK + layer * 7 + at * 31 + at / 251) % 255 + 1) as u8;
        device.extend((0..len).map(byte));
        device.resize(device.len().next_multiple_of(BLOCK), 0);
        start as u64
    }

    pub fn flat(&mut self, layer: usize, size: usize) -> NodeKind {
        let device = self.store(layer, size);
        let data = FileData {
            size: size as u64,
            layout: DataLayout::Flat { device },
        };
        NodeKind::Regular {
            layer: LayerIdx(layer as u32),
            data,
        }
    }

    /// Returns a sparse file of `size` bytes. Bit n of `stored` says whether chunk n (mod 16) is stored.
    pub fn sparse(&mut self, layer: usize, size: usize, chunk_bits: u8, stored: u16) -> NodeKind {
        let chunk = BLOCK << chunk_bits;
        let numbers = 0..size.div_ceil(chunk) as u32;
        let mut chunks = Vec::new();
        for number in numbers.filter(|number| stored >> (number % 16) & 1 == 1) {
            let len = chunk.min(size - number as usize * chunk);
            chunks.push((number, self.store(layer, len)));
        }
        let data = FileData {
            size: size as u64,
            layout: DataLayout::Chunked { chunk_bits, chunks },
        };
        NodeKind::Regular {
            layer: LayerIdx(layer as u32),
            data,
        }
    }

    pub fn finish(mut self) -> Sample {
        let mut names = vec![0; self.nodes.len()];
        let is_dir: Vec<_> = self
            .nodes
            .iter()
            .map(|node| matches!(node.kind, NodeKind::Directory(_)))
            .collect();
        for node in &mut self.nodes {
            if let NodeKind::Directory(children) = &mut node.kind {
                children.sort();
                node.nlink = 2 + children.iter().filter(|(_, id)| is_dir[id.0 as usize]).count() as u32;
                children.iter().for_each(|(_, id)| names[id.0 as usize] += 1);
            }
        }
        for (node, names) in self.nodes.iter_mut().zip(names) {
            match node.kind {
                NodeKind::Directory(_) => continue,
                NodeKind::Symlink(_) => node.meta.mode = 0o777,
                _ => {}
            }
            node.nlink = names;
        }
        Sample {
            tree: Tree::from_nodes(self.nodes),
            devices: self.devices,
        }
    }
}

pub fn meta(mode: u16, uid: u32, mtime: i64) -> Metadata {
    Metadata {
        mode,
        uid,
        gid: uid / 2,
        mtime,
        mtime_nsec: (mtime.unsigned_abs() % 1_000_000_000) as u32,
    }
}

pub fn xattr(name: &str, value: &[u8]) -> (Box<[u8]>, Box<[u8]>) {
    (name.as_bytes().into(), value.into())
}

/// Returns an access control list as getxattr(2) gives it: version 2, then tag, permissions and id of each entry.
pub fn acl(uid: u32) -> Vec<u8> {
    let entries: [(u16, u16, u32); 5] = [
        (1, 7, u32::MAX),
        (2, 5, uid),
        (4, 5, u32::MAX),
        (0x10, 5, u32::MAX),
        (0x20, 4, u32::MAX),
    ];
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend_from_slice(&tag.to_le_bytes());
        value.extend_from_slice(&permissions.to_le_bytes());
        value.extend_from_slice(&id.to_le_bytes());
    }
    value
}

/// Returns file capabilities, version 2, with effective cap_net_raw.
pub fn capability() -> Vec<u8> {
    let mut value = 0x0200_0001u32.to_le_bytes().to_vec();
    value.extend_from_slice(&(1u32 << 13).to_le_bytes());
    value.resize(20, 0);
    value
}

pub fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = (1..=255u8).prop_filter("no slash", |byte| *byte != b'/');
    prop_oneof![
        4 => "[a-c]{1,2}".prop_map(String::into_bytes),
        2 => select(vec!["!x", ".a", "..a", "...", " ", "-", ".!"]).prop_map(|name| name.as_bytes().to_vec()),
        2 => vec(byte.clone(), 1..20),
        2 => vec(byte, 252..=255),
    ]
    .prop_filter("dots", |name| name != b"." && name != b"..")
}

fn any_meta() -> impl Strategy<Value = Metadata> {
    let id = || select(vec![0u32, 1, 1000, 65_535, 65_536, 4_000_000_000]);
    let mtime = prop_oneof![Just(0i64), -(1i64 << 40)..1 << 40, Just(-1)];
    (0..=0o7777u16, id(), id(), mtime, 0..1_000_000_000u32).prop_map(|(mode, uid, gid, mtime, mtime_nsec)| Metadata {
        mode,
        uid,
        gid,
        mtime,
        mtime_nsec,
    })
}

/// Generates attributes. `user.` attributes and access control lists occur only where Linux shows them: on files and
/// directories.
fn any_xattrs(plain: bool) -> impl Strategy<Value = Xattrs> {
    let value = || prop_oneof![3 => vec(any::<u8>(), 0..40), 1 => vec(any::<u8>(), 2000..5000)];
    let prefix = select(if plain {
        vec!["user.", "trusted.", "security."]
    } else {
        vec!["trusted.", "security."]
    });
    let free = (prefix, "[a-z]{1,9}|[a-z]{240,246}", value())
        .prop_map(|(prefix, rest, value)| (format!("{prefix}{rest}"), value));
    let acl = (0..9u32).prop_map(|uid| ("system.posix_acl_access".to_owned(), acl(uid)));
    let one = if plain {
        prop_oneof![5 => free, 1 => acl].boxed()
    } else {
        free.boxed()
    };
    prop_oneof![3 => vec(one.clone(), 0..=0), 2 => vec(one, 1..4)].prop_map(|mut xattrs| {
        xattrs.sort();
        xattrs.dedup_by(|a, b| a.0 == b.0);
        xattrs.into_iter().map(|(name, value)| xattr(&name, &value)).collect()
    })
}

#[derive(Debug, Clone)]
enum Kind {
    Directory,
    Flat(usize, usize),
    Sparse(usize, usize, u8, u16),
    Symlink(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
    Link(Index),
}

fn kind() -> impl Strategy<Value = Kind> {
    let size = || prop_oneof![Just(0usize), 1..200usize, 4000..4200usize, 0..40_000usize];
    let number = || (0..4096u32, 0..1_048_576u32);
    prop_oneof![
        4 => Just(Kind::Directory),
        4 => (0..3usize, size()).prop_map(|(layer, size)| Kind::Flat(layer, size)),
        2 => (0..3usize, size(), 0..3u8, any::<u16>()).prop_map(|(layer, size, bits, stored)| Kind::Sparse(layer, size, bits, stored)),
        1 => vec(1..=255u8, 1..100).prop_map(Kind::Symlink),
        1 => vec(1..=255u8, 1900..4096).prop_map(Kind::Symlink),
        1 => number().prop_map(|(major, minor)| Kind::Char(major, minor)),
        1 => number().prop_map(|(major, minor)| Kind::Block(major, minor)),
        1 => Just(Kind::Fifo),
        2 => any::<Index>().prop_map(Kind::Link),
    ]
}

/// Generates trees of up to `most` inodes over three layers.
pub fn sample(most: usize) -> impl Strategy<Value = Sample> {
    let item = (
        any::<Index>(),
        name(),
        any_meta(),
        any_xattrs(true),
        any_xattrs(false),
        kind(),
    );
    vec(item, 0..most).prop_map(|items| {
        let mut builder = Builder::new(3);
        for (place, name, meta, plain, special, kind) in items {
            let dir = *place.get(&builder.directories);
            let taken = builder.taken.contains(&(dir, name.clone().into()));
            let (xattrs, kind) = match kind {
                _ if taken => continue,
                Kind::Link(_) if builder.leaves.is_empty() => continue,
                Kind::Link(target) => {
                    let target = *target.get(&builder.leaves);
                    builder.taken.insert((dir, name.clone().into()));
                    builder.link(dir, &name, target);
                    continue;
                }
                Kind::Directory => (plain, NodeKind::Directory(Vec::new())),
                Kind::Flat(layer, size) => (plain, builder.flat(layer, size)),
                Kind::Sparse(layer, size, bits, stored) => (plain, builder.sparse(layer, size, bits, stored)),
                Kind::Symlink(target) => (special, NodeKind::Symlink(target.into())),
                Kind::Char(major, minor) => (special, NodeKind::CharDevice(DeviceNumber { major, minor })),
                Kind::Block(major, minor) => (special, NodeKind::BlockDevice(DeviceNumber { major, minor })),
                Kind::Fifo => (special, NodeKind::Fifo),
            };
            builder.add(dir, &name, meta, xattrs, kind);
        }
        builder.finish()
    })
}

/// Returns a tree with what random trees hit too rarely: directories with thousands of entries, names and attributes
/// of every length, and full blocks.
pub fn corners() -> Sample {
    let mut builder = Builder::new(3);
    let root = Tree::ROOT;
    let dir = |builder: &mut Builder, name: &[u8]| {
        builder
            .add(
                root,
                name,
                meta(0o755, 70_000, -5),
                Xattrs::new(),
                NodeKind::Directory(Vec::new()),
            )
            .unwrap()
    };
    let many = dir(&mut builder, b"many");
    for number in 0..3000 {
        let name = format!("{number:04}-{}", "n".repeat(number % 249));
        let kind = builder.flat(number % 2, number % 9);
        builder.add(many, name.as_bytes(), meta(0o644, 0, 1), Xattrs::new(), kind);
    }
    // Directories that nearly fill or overflow a block of 4096 bytes. An entry takes 12 bytes and its name: with 16
    // of these names, 5 bytes are left.
    for names in [14, 15, 16, 17] {
        let full = dir(&mut builder, format!("full{names}").as_bytes());
        for number in 0..names {
            let name = format!("{number:02}{}", "x".repeat(240));
            builder.add(full, name.as_bytes(), meta(0o600, 0, 2), Xattrs::new(), NodeKind::Fifo);
        }
        let rest = format!("z{}", "y".repeat(names));
        builder.add(full, rest.as_bytes(), meta(0o600, 0, 2), Xattrs::new(), NodeKind::Fifo);
    }
    dir(&mut builder, b"empty");
    for (number, len) in [1, 2, 63, 64, 1900, 1984, 1985, 4000, 4095].into_iter().enumerate() {
        let kind = NodeKind::Symlink(vec![b'l'; len].into());
        builder.add(
            root,
            format!("link{number}").as_bytes(),
            meta(0o777, 0, 3),
            Xattrs::new(),
            kind,
        );
    }
    for (number, len) in [0, 1, 3000, 4000, 4016, 4100, 9000, 65_000].into_iter().enumerate() {
        let xattrs = vec![
            xattr("security.capability", &capability()),
            xattr("system.posix_acl_access", &acl(number as u32)),
            xattr("trusted.t", &vec![number as u8; len / 2]),
            xattr("user.v", &vec![number as u8; len]),
        ];
        let kind = builder.flat(2, number * 1000);
        builder.add(
            root,
            format!("xattr{number}").as_bytes(),
            meta(0o4755, 0, 4),
            xattrs,
            kind,
        );
    }
    let default_acl = vec![xattr("system.posix_acl_default", &acl(77))];
    builder.add(
        root,
        b"acl-dir",
        meta(0o775, 0, 5),
        default_acl,
        NodeKind::Directory(Vec::new()),
    );
    for bits in 0..4u8 {
        let kind = builder.sparse(usize::from(bits % 3), 300_001, bits, 0b1010_0110_0001_0100);
        builder.add(
            root,
            format!("sparse{bits}").as_bytes(),
            meta(0o640, 0, 6),
            Xattrs::new(),
            kind,
        );
    }
    let hole = builder.sparse(0, 1 << 26, 0, 0);
    builder.add(root, b"hole", meta(0o640, 0, 6), Xattrs::new(), hole);
    builder.finish()
}
