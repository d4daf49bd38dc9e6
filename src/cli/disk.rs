//! `ocifs disk`: serves an image as a disk for virtual machines.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::bail;
use clap::Args;

use super::ImageArgs;
use super::background::{ServeArgs, ServeCommand, Wait};
use super::config::Config;
use super::mount::resolve;
use super::mounts::locate;
use ocifs::mount::{DiskDoors, DoorAddress, Shape};

/// Arguments of `disk`.
#[derive(Debug, Args)]
pub(super) struct DiskArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Show the disk as the file rootfs.erofs in this directory, and the image's config as config.json
    #[arg(long, value_name = "DIR")]
    file: Option<PathBuf>,
    /// Serve the disk by NBD at this Unix socket or loopback port
    #[arg(long, value_name = "SOCKET|HOST:PORT")]
    nbd: Option<PathBuf>,
    /// Serve the disk as a virtio block device at this Unix socket
    #[arg(long, value_name = "SOCKET")]
    vhost_user_blk: Option<PathBuf>,
    #[command(flatten)]
    serve: ServeArgs,
}

/// Returns the address of an NBD socket: HOST:PORT, or the path of a Unix socket.
fn nbd_address(given: &Path) -> anyhow::Result<DoorAddress> {
    match given.to_str().and_then(DoorAddress::parse_tcp) {
        Some(address) => Ok(DoorAddress::Tcp(address?)),
        None => Ok(DoorAddress::Unix(locate(given)?)),
    }
}

pub(super) fn run(config: &Config, args: DiskArgs, started: Instant) -> anyhow::Result<()> {
    let doors = DiskDoors {
        file: args.file.as_deref().map(resolve).transpose()?,
        nbd: args.nbd.as_deref().map(nbd_address).transpose()?,
        vhost_user_blk: args.vhost_user_blk.as_deref().map(locate).transpose()?,
    };
    let Some(place) = doors.places().into_iter().next() else {
        bail!("nothing says where to serve the disk: give --file, --nbd or --vhost-user-blk");
    };
    let command = ServeCommand {
        config,
        image: &args.image,
        args: &args.serve,
        // The size of the disk is known when the tree is there.
        wait: args.serve.wait.max(Some(Wait::Ready)),
        place: &place,
        after_signal: "nothing is served",
        started,
        describe: &|object| object["disk"] = serde_json::to_value(&doors).unwrap_or_default(),
    };
    command.run(async |_| Ok(Shape::Disk(doors.clone()))).map(drop)
}
