//! `ocifs export`: writes the merged file system of an image as one tar, or as one EROFS disk image.

use std::collections::HashMap;
use std::fs::{File, Permissions};
use std::io::{self, Read, Seek as _, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use tar::{EntryType, Header};
use tempfile::NamedTempFile;

use super::config::Config;
use super::open::open_image;
use super::{Fetching, ImageArgs, text};
use ocifs::erofs::{FileType, Inode, Nid};
use ocifs::fs::{Attr, ImageFs};
use ocifs::toc::DeviceNumber;

/// Bytes of one read. A larger value takes more memory.
const READ: usize = 1 << 20;

/// Arguments of `export`.
#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// What to write
    #[arg(long, value_enum, default_value = "tar")]
    format: Format,
    /// Write to this file instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// One tar of the merged tree.
    Tar,
    /// A disk image for `mount -t erofs` or a virtual machine.
    Erofs,
}

pub(super) fn run(config: &Config, fetching: &Fetching, args: ExportArgs) -> anyhow::Result<()> {
    if args.output.is_none() && text::on_terminal() {
        bail!("an image is nothing for a terminal: write it to a file with --output FILE, or into a pipe");
    }
    let fs = open_image(fetching, config, &args.image)?;
    match (&args.output, args.format) {
        (None, Format::Tar) => tar(&fs, fetching, io::stdout().lock()),
        (None, Format::Erofs) => disk(&fs, fetching, &mut io::stdout().lock()),
        (Some(path), format) => {
            let named = || format!("{}", path.display());
            let mut output = OutputFile::create(path).with_context(named)?;
            let file = output.file();
            match format {
                Format::Tar => tar(&fs, fetching, &*file)?,
                Format::Erofs => {
                    disk(&fs, fetching, &mut Sparse { file: &mut *file })?;
                    let length = file.stream_position().with_context(named)?;
                    file.set_len(length).with_context(named)?;
                }
            }
            output.publish().with_context(named)
        }
    }
}

/// The output file. A new file gets its name only when it is complete. If the path names something else than a
/// regular file, such as a pipe, the output is written into it directly.
enum OutputFile<'a> {
    Whole(NamedTempFile, &'a Path),
    Special(File),
}

impl<'a> OutputFile<'a> {
    fn create(path: &'a Path) -> io::Result<Self> {
        if std::fs::metadata(path).is_ok_and(|m| !m.is_file()) {
            return Ok(Self::Special(File::options().write(true).open(path)?));
        }
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let mut prefix = path.file_name().unwrap_or_default().to_owned();
        prefix.push(".");
        let part = tempfile::Builder::new()
            .prefix(&prefix)
            .suffix(".part")
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(directory.unwrap_or(Path::new(".")))?;
        Ok(Self::Whole(part, path))
    }

    fn file(&mut self) -> &mut File {
        match self {
            Self::Whole(part, _) => part.as_file_mut(),
            Self::Special(file) => file,
        }
    }

    fn publish(self) -> io::Result<()> {
        if let Self::Whole(part, path) = self {
            // The rename is the last step, so the old file stays if any other step fails.
            part.as_file().sync_all()?;
            part.persist(path)?;
        }
        Ok(())
    }
}

/// Writes the EROFS disk that the tree describes: its metadata, then the data device of every layer.
fn disk(fs: &ImageFs, fetching: &Fetching, out: &mut impl Write) -> anyhow::Result<()> {
    let image = fs.image();
    out.write_all(image.tree().image())?;
    for layer in image.layers() {
        let mut buffer = vec![0; READ];
        let mut offset = 0;
        while offset < layer.spans().device_size() {
            let part = &mut buffer[..READ.min((layer.spans().device_size() - offset) as usize)];
            part.fill(0);
            fetching.run(layer.read(offset, part))?;
            out.write_all(part)?;
            offset += part.len() as u64;
        }
    }
    Ok(out.flush()?)
}

/// A writer that leaves holes for blocks of zeros.
struct Sparse<'a> {
    file: &'a mut File,
}

impl Write for Sparse<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let part = &bytes[..bytes.len().min(64 << 10)];
        if part.iter().all(|&b| b == 0) {
            self.file.seek(SeekFrom::Current(part.len() as i64))?;
            return Ok(part.len());
        }
        self.file.write(part)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A file of the image as a stream.
struct FileReader<'a> {
    fs: &'a ImageFs,
    fetching: &'a Fetching,
    ino: Nid,
    offset: u64,
    buffer: Vec<u8>,
    used: usize,
}

impl Read for FileReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.used == self.buffer.len() {
            let reading = self.fs.read(self.ino, self.offset, READ);
            self.buffer = self.fetching.run(reading).map_err(io::Error::other)?;
            self.offset += self.buffer.len() as u64;
            self.used = 0;
        }
        let length = out.len().min(self.buffer.len() - self.used);
        out[..length].copy_from_slice(&self.buffer[self.used..self.used + length]);
        self.used += length;
        Ok(length)
    }
}

fn tar(fs: &ImageFs, fetching: &Fetching, out: impl Write) -> anyhow::Result<()> {
    let mut archive = TarExport {
        fs,
        fetching,
        builder: tar::Builder::new(io::BufWriter::with_capacity(READ, out)),
        links: HashMap::new(),
    };
    // Writes parents before children. It uses no recursion, because an image may nest thousands of directories.
    let mut todo = vec![(Vec::new(), fs.attr(fs.root())?)];
    while let Some((path, attr)) = todo.pop() {
        archive.append(&path, &attr)?;
        if attr.inode.file_type == FileType::Directory {
            todo.extend(archive.children(&path, attr.ino)?);
        }
    }
    Ok(archive.builder.into_inner()?.flush()?)
}

struct TarExport<'a, W: Write> {
    fs: &'a ImageFs,
    fetching: &'a Fetching,
    builder: tar::Builder<W>,
    /// The first path of each inode that has several names.
    links: HashMap<Nid, Vec<u8>>,
}

impl<W: Write> TarExport<'_, W> {
    /// Returns the entries of a directory, last name first. A stack then returns them in order.
    fn children(&self, path: &[u8], ino: Nid) -> anyhow::Result<Vec<(Vec<u8>, Attr)>> {
        let mut names = Vec::new();
        self.fs.read_dir(ino, 0, |entry| {
            if entry.name != b"." && entry.name != b".." {
                names.push((entry.name.to_vec(), entry.ino));
            }
            true
        })?;
        names.reverse();
        let child = |(name, ino): (Vec<u8>, Nid)| {
            let path = if path.is_empty() {
                name
            } else {
                [path, b"/", &name].concat()
            };
            Ok((path, self.fs.attr(ino)?))
        };
        names.into_iter().map(child).collect()
    }

    fn append(&mut self, path: &[u8], attr: &Attr) -> anyhow::Result<()> {
        let inode = &attr.inode;
        let mut name = if path.is_empty() { b"./".to_vec() } else { path.to_vec() };
        if inode.file_type == FileType::Directory && !path.is_empty() {
            name.push(b'/');
        }
        if inode.nlink > 1 && inode.file_type != FileType::Directory {
            if let Some(first) = self.links.get(&attr.ino).cloned() {
                return self.entry(EntryType::Link, &name, inode, 0, Some(&first), &[], io::empty());
            }
            self.links.insert(attr.ino, path.to_vec());
        }
        let xattrs = self.xattrs(path, attr.ino)?;
        let target = match inode.file_type {
            FileType::Symlink => Some(self.fs.read_link(attr.ino)?),
            _ => None,
        };
        let (kind, size) = match inode.file_type {
            FileType::Regular => (EntryType::Regular, inode.size),
            FileType::Directory => (EntryType::Directory, 0),
            FileType::Symlink => (EntryType::Symlink, 0),
            FileType::CharDevice => (EntryType::Char, 0),
            FileType::BlockDevice => (EntryType::Block, 0),
            FileType::Fifo => (EntryType::Fifo, 0),
        };
        let content = FileReader {
            fs: self.fs,
            fetching: self.fetching,
            ino: attr.ino,
            offset: 0,
            buffer: Vec::new(),
            used: 0,
        };
        self.entry(kind, &name, inode, size, target.as_deref(), &xattrs, content.take(size))
    }

    fn xattrs(&self, path: &[u8], ino: Nid) -> anyhow::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut xattrs = Vec::new();
        for name in self.fs.xattr_names(ino)? {
            // In a pax record the first equals sign ends the keyword. The format has no escape for an equals sign
            // within it.
            if name.contains(&b'=') {
                let (path, name) = (path.escape_ascii(), name.escape_ascii());
                eprintln!("ocifs: /{path}: a tar cannot hold the extended attribute {name}, it is left out");
                continue;
            }
            let value = self.fs.xattr(ino, &name)?.unwrap_or_default();
            xattrs.push(([b"SCHILY.xattr.", name.as_slice()].concat(), value));
        }
        Ok(xattrs)
    }

    /// Writes one entry. Values that do not fit the ustar fields go into pax records before it.
    #[allow(clippy::too_many_arguments)]
    fn entry(
        &mut self,
        kind: EntryType,
        name: &[u8],
        inode: &Inode,
        size: u64,
        link: Option<&[u8]>,
        records: &[(Vec<u8>, Vec<u8>)],
        content: impl Read,
    ) -> anyhow::Result<()> {
        let mut records = records.to_vec();
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(u32::from(inode.mode & 0o7777));
        header.set_size(size);
        for (value, limit, key) in [
            (u64::from(inode.uid), 0o7_777_777, "uid"),
            (u64::from(inode.gid), 0o7_777_777, "gid"),
            (size, 0o77_777_777_777, "size"),
        ] {
            if value > limit {
                records.push((key.into(), value.to_string().into()));
            }
        }
        header.set_uid(u64::from(inode.uid).min(0o7_777_777));
        header.set_gid(u64::from(inode.gid).min(0o7_777_777));
        header.set_size(size.min(0o77_777_777_777));
        let whole = u64::try_from(inode.mtime).ok().filter(|&t| t <= 0o77_777_777_777);
        header.set_mtime(whole.unwrap_or(0));
        if whole.is_none() || inode.mtime_nsec != 0 {
            records.push((b"mtime".to_vec(), pax_time(inode.mtime, inode.mtime_nsec).into()));
        }
        if matches!(kind, EntryType::Char | EntryType::Block) {
            let device = DeviceNumber::decode(inode.rdev);
            header.set_device_major(device.major)?;
            header.set_device_minor(device.minor)?;
        }
        put_text(&mut header.as_old_mut().name, name, "path", &mut records);
        if let Some(link) = link {
            put_text(&mut header.as_old_mut().linkname, link, "linkpath", &mut records);
        }
        header.set_cksum();
        if !records.is_empty() {
            self.pax(&records)?;
        }
        self.builder.append(&header, content)?;
        Ok(())
    }

    /// Writes a pax header with `records`. The tar crate's own function takes keys as text. Here, keys contain the
    /// names of extended attributes, which need not be UTF-8.
    fn pax(&mut self, records: &[(Vec<u8>, Vec<u8>)]) -> anyhow::Result<()> {
        let mut payload = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            // The length includes its own digits.
            while rest + length.to_string().len() != length {
                length = rest + length.to_string().len();
            }
            payload.extend_from_slice(length.to_string().as_bytes());
            payload.push(b' ');
            payload.extend_from_slice(key);
            payload.push(b'=');
            payload.extend_from_slice(value);
            payload.push(b'\n');
        }
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::XHeader);
        header.set_mode(0o644);
        header.set_size(payload.len() as u64);
        header.as_old_mut().name[..9].copy_from_slice(b"PaxHeader");
        header.set_cksum();
        self.builder.append(&header, payload.as_slice())?;
        Ok(())
    }
}

/// Puts text into a header field. Text that is too long for the field also goes into a pax record.
fn put_text(field: &mut [u8], text: &[u8], key: &str, records: &mut Vec<(Vec<u8>, Vec<u8>)>) {
    let length = text.len().min(field.len());
    field[..length].copy_from_slice(&text[..length]);
    if text.len() > field.len() {
        records.push((key.into(), text.to_vec()));
    }
}

/// Formats a time as decimal seconds. `nanoseconds` count forward, so a time before the epoch gets a fraction nearer
/// to zero: -2 s and 250,000,000 ns are `-1.75`.
fn pax_time(seconds: i64, nanoseconds: u32) -> String {
    if seconds >= 0 || nanoseconds == 0 {
        return match nanoseconds {
            0 => seconds.to_string(),
            n => format!("{seconds}.{n:09}"),
        };
    }
    format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_are_written_towards_zero() {
        assert_eq!(pax_time(5, 0), "5");
        assert_eq!(pax_time(5, 250_000_000), "5.250000000");
        assert_eq!(pax_time(-2, 250_000_000), "-1.750000000");
        assert_eq!(pax_time(-1, 500_000_000), "-0.500000000");
    }
}
