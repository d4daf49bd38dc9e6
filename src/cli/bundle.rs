//! `ocifs bundle`: a bundle for an OCI runtime, whose root is an ocifs mount.

use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context as _;
use clap::Args;

use super::config::Config;
use super::container::{Bundle, ContainerArgs};
use super::json::versioned;
use super::mounts::take_down;
use super::{ImageArgs, say, text};

/// Arguments of `bundle`.
#[derive(Debug, Args)]
pub(super) struct BundleArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Directory of the bundle; it is created if there is none
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Arguments in place of the image's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
    #[command(flatten)]
    container: ContainerArgs,
    /// Print a JSON object when the bundle is there
    #[arg(long)]
    json: bool,
}

pub(super) fn run(config: &Config, args: BundleArgs, started: Instant) -> anyhow::Result<()> {
    let BundleArgs {
        image,
        directory,
        command,
        container,
        json,
    } = args;
    std::fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let directory = std::fs::canonicalize(&directory).with_context(|| directory.display().to_string())?;
    let Some((mut bundle, image)) = Bundle::serve(config, &image, container, command, directory, started)? else {
        return Ok(());
    };
    if let Err(error) = bundle.write(&image) {
        take_down(&bundle.rootfs(), false)?;
        return Err(error);
    }
    if json {
        let mut object = serde_json::json!({});
        text::put(&mut object, "bundle", bundle.directory().as_os_str().as_bytes());
        text::put(&mut object, "mountpoint", bundle.rootfs().as_os_str().as_bytes());
        say!("{}", versioned(object)?);
    }
    Ok(())
}
