//! `ocifs mount`: mounts an image on a directory.

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};

use super::background::{ServeArgs, ServeCommand, Wait};
use super::config::Config;
use super::mounts::locate;
use super::{ImageArgs, text};
use ocifs::mount::{DirectoryConfig, FuseOptions, RunDir, Shape, Upper, Via};

/// Arguments of `mount`.
#[derive(Debug, Args)]
pub(super) struct MountArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Directory to mount on
    mountpoint: PathBuf,
    /// Mount options, comma separated: allow_other, nosuid, nodev, noexec, nonempty, ...
    #[arg(short, long = "option", value_name = "OPTIONS")]
    options: Vec<String>,
    /// Allow changes; they are thrown away at unmount
    #[arg(long, conflicts_with = "upper")]
    writable: bool,
    /// Allow changes and keep them in this directory
    #[arg(long, value_name = "DIR", requires = "work")]
    upper: Option<PathBuf>,
    /// Scratch directory for --upper, on the same file system
    #[arg(long, value_name = "DIR", requires = "upper")]
    work: Option<PathBuf>,
    /// What serves the directory tree: the kernel's EROFS, which is faster and needs root, or FUSE [default: auto]
    #[arg(long, value_enum, value_name = "DRIVER")]
    via: Option<ViaArg>,
    #[command(flatten)]
    serve: ServeArgs,
}

/// [`Via`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ViaArg {
    /// EROFS if the kernel can do that and the store knows the image or the mount waits for it, otherwise FUSE
    Auto,
    /// FUSE
    Fuse,
    /// EROFS, or an error; the mount waits until the tree can be read
    Erofs,
}

impl From<ViaArg> for Via {
    fn from(via: ViaArg) -> Self {
        match via {
            ViaArg::Auto => Self::Auto,
            ViaArg::Fuse => Self::Fuse,
            ViaArg::Erofs => Self::Erofs,
        }
    }
}

impl MountArgs {
    /// Returns the state to wait for. A writable mount waits at least for the tree, because the overlay is mounted on
    /// the tree. So does a mount by EROFS.
    fn wait(&self) -> Option<Wait> {
        let late = self.writable || self.upper.is_some() || self.via == Some(ViaArg::Erofs);
        late.then_some(Wait::Ready).max(self.serve.wait)
    }
}

pub(super) fn run(config: &Config, args: MountArgs, started: Instant) -> anyhow::Result<()> {
    let mountpoint = resolve(&args.mountpoint)?;
    let command = ServeCommand {
        config,
        image: &args.image,
        args: &args.serve,
        wait: args.wait(),
        place: &mountpoint,
        after_signal: "nothing is mounted",
        started,
        describe: &|object| text::put(object, "mountpoint", mountpoint.as_os_str().as_bytes()),
    };
    let served = command.run(async |context| {
        let mut options = FuseOptions::defaults(nix::unistd::geteuid().is_root());
        for list in &args.options {
            options.apply(list)?;
        }
        let upper = upper(&args, context, &mountpoint)?;
        if upper.is_some() && options.read_only {
            bail!("a mount cannot be both writable and -o ro");
        }
        let directory = DirectoryConfig {
            mountpoint: mountpoint.clone(),
            options,
            upper,
            via: args.via.map_or(Via::Auto, Via::from),
        };
        directory.check()?;
        Ok(Shape::Directory(directory))
    });
    served.map(drop)
}

/// Returns the mount point as an absolute path without symbolic links. It does not touch the file system that is
/// mounted there, which a slash at the end of the path would do. That mount may be dead, or its process may not
/// answer.
pub(super) fn resolve(mountpoint: &Path) -> anyhow::Result<PathBuf> {
    std::fs::canonicalize(locate(mountpoint)?).map_err(|error| {
        let advice = match error.kind() {
            std::io::ErrorKind::NotFound => "it does not exist (create the directory first)".to_owned(),
            _ => error.to_string(),
        };
        anyhow::anyhow!("cannot mount on {}: {advice}", mountpoint.display())
    })
}

fn upper(args: &MountArgs, context: &ocifs::layer::LayerContext, mountpoint: &Path) -> anyhow::Result<Option<Upper>> {
    if let (Some(upper), Some(work)) = (&args.upper, &args.work) {
        let absolute = |path: &Path| std::path::absolute(path).with_context(|| format!("{}", path.display()));
        return Ok(Some(Upper::Kept {
            upper: absolute(upper)?,
            work: absolute(work)?,
        }));
    }
    match args.writable {
        true => Ok(Some(private_upper(context, mountpoint)?)),
        false => Ok(None),
    }
}

/// Returns a place for changes that are thrown away at unmount.
pub(super) fn private_upper(context: &ocifs::layer::LayerContext, mountpoint: &Path) -> anyhow::Result<Upper> {
    let hash = blake3::hash(mountpoint.as_os_str().as_encoded_bytes()).to_hex();
    let id = format!("{}-{}", &hash[..16], std::process::id());
    let scratch = match context.store.upper_dir(&id) {
        Ok(scratch) => scratch,
        Err(error) if error.is_by_design() => RunDir::open()?.upper_dir(&id),
        Err(error) => return Err(error.into()),
    };
    Ok(Upper::Private(scratch))
}
