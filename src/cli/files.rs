//! `ocifs ls` and `ocifs cat`: read an image without mounting it.

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;

use anyhow::Context as _;
use clap::Args;

use super::config::Config;
use super::json::versioned;
use super::open::open_image;
use super::{Fetching, ImageArgs, text};
use ocifs::erofs::{FileType, Walker};
use ocifs::fs::{Attr, ImageFs, mtime};

/// Bytes of one read. A larger value takes more memory.
const READ: usize = 1 << 20;

/// Arguments of `ls`.
#[derive(Debug, Args)]
pub(super) struct LsArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Path in the image
    #[arg(default_value = "/")]
    path: OsString,
    /// Print one JSON object a line; a name that is not UTF-8 is whole in `name_base64`
    #[arg(long)]
    json: bool,
}

/// Arguments of `cat`.
#[derive(Debug, Args)]
pub(super) struct CatArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Paths of files in the image
    #[arg(required = true)]
    paths: Vec<OsString>,
}

/// Returns the attributes of the file at `path`. Symbolic links are followed as in a chroot.
fn walk(fs: &ImageFs, path: &OsStr) -> anyhow::Result<Attr> {
    let mut walker = Walker::new(fs.image().tree());
    let found = walker.resolve(fs.root(), path.as_bytes());
    let ino = found.map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
    Ok(fs.attr(ino)?)
}

fn letter(file_type: FileType) -> char {
    match file_type {
        FileType::Regular => '-',
        FileType::Directory => 'd',
        FileType::Symlink => 'l',
        FileType::CharDevice => 'c',
        FileType::BlockDevice => 'b',
        FileType::Fifo => 'p',
    }
}

/// Formats permissions as ls(1) does, like `rwxr-sr-t`.
fn permissions(mode: u16) -> String {
    let mut text = String::with_capacity(9);
    for (shift, special, set, unset) in [(6, 0o4000, 's', 'S'), (3, 0o2000, 's', 'S'), (0, 0o1000, 't', 'T')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, mode & special != 0) {
            (true, true) => set,
            (false, true) => unset,
            (true, false) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// Output format of directory entries.
#[derive(Debug, Clone, Copy)]
struct Style {
    json: bool,
    on_terminal: bool,
}

fn show(fs: &ImageFs, out: &mut impl std::io::Write, name: &[u8], attr: &Attr, style: Style) -> anyhow::Result<()> {
    let inode = &attr.inode;
    let target = match inode.file_type {
        FileType::Symlink => Some(fs.read_link(attr.ino)?),
        _ => None,
    };
    if style.json {
        let mut object = serde_json::json!({
            "type": letter(inode.file_type).to_string(), "mode": format!("{:04o}", inode.mode & 0o7777),
            "uid": inode.uid, "gid": inode.gid, "size": inode.size, "mtime": inode.mtime, "nlink": inode.nlink,
            "target": null,
        });
        text::put(&mut object, "name", name);
        if let Some(target) = target {
            text::put(&mut object, "target", &target);
        }
        writeln!(out, "{}", versioned(object)?)?;
        return Ok(());
    }
    let time = humantime::format_rfc3339_seconds(mtime(inode));
    write!(
        out,
        "{}{} {:>3} {:>5} {:>5} {:>11} {time} ",
        letter(inode.file_type),
        permissions(inode.mode),
        inode.nlink,
        inode.uid,
        inode.gid,
        inode.size,
    )?;
    out.write_all(&text::name(name, style.on_terminal))?;
    if let Some(target) = target {
        out.write_all(b" -> ")?;
        out.write_all(&text::name(&target, style.on_terminal))?;
    }
    Ok(writeln!(out)?)
}

pub(super) fn ls(config: &Config, fetching: &Fetching, args: LsArgs) -> anyhow::Result<()> {
    let fs = open_image(fetching, config, &args.image)?;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let attr = walk(&fs, &args.path)?;
    let style = Style {
        json: args.json,
        on_terminal: text::on_terminal(),
    };
    if attr.inode.file_type != FileType::Directory {
        show(&fs, &mut out, args.path.as_bytes(), &attr, style)?;
        return Ok(out.flush()?);
    }
    let mut entries = Vec::new();
    fs.read_dir(attr.ino, 0, |entry| {
        if entry.name != b"." && entry.name != b".." {
            entries.push((entry.name.to_vec(), entry.ino));
        }
        true
    })?;
    for (name, ino) in entries {
        show(&fs, &mut out, &name, &fs.attr(ino)?, style)?;
    }
    Ok(out.flush()?)
}

pub(super) fn cat(config: &Config, fetching: &Fetching, args: CatArgs) -> anyhow::Result<()> {
    let fs = open_image(fetching, config, &args.image)?;
    let mut out = std::io::stdout().lock();
    for path in &args.paths {
        let attr = walk(&fs, path)?;
        let mut offset = 0;
        loop {
            let bytes = fetching
                .run(fs.read(attr.ino, offset, READ))
                .with_context(|| path.display().to_string())?;
            if bytes.is_empty() {
                break;
            }
            out.write_all(&bytes)?;
            offset += bytes.len() as u64;
        }
    }
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_look_like_those_of_ls() {
        assert_eq!(permissions(0o4755), "rwsr-xr-x");
        assert_eq!(permissions(0o2644), "rw-r-Sr--");
        assert_eq!(permissions(0o1777), "rwxrwxrwt");
        assert_eq!(permissions(0), "---------");
    }
}
