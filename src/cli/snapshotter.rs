//! `ocifs snapshotter`: containerd's proxy plugin, and the check of a host's configuration.

mod check;

use std::convert::Infallible;
use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use tokio::net::UnixListener;

use super::config::Config;
use super::fetching::signals;
use super::manager::ServiceManager;
use super::units::Deadline;
use super::{open, say};
use ocifs::mount::SocketFile;
use ocifs::snapshotter::{Snapshotter, SnapshotterConfig, serve};
use ocifs::store::Store;

/// Where containerd finds the snapshotter.
const ADDRESS: &str = "/run/ocifs-snapshotter/snapshotter.sock";
/// Where snapshots are kept.
const ROOT: &str = "/var/lib/ocifs-snapshotter";
/// How long a mount that no container uses is kept.
const IDLE: Duration = Duration::from_secs(60);
/// Time between two looks for mounts that no container uses. With a longer time they stay longer than was said.
const LOOK: Duration = Duration::from_secs(10);

/// Arguments of `snapshotter`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct SnapshotterArgs {
    #[command(subcommand)]
    command: Option<SnapshotterCommand>,
    #[command(flatten)]
    serve: SnapshotterServeArgs,
}

#[derive(Debug, Args)]
struct SnapshotterServeArgs {
    /// Unix socket for containerd
    #[arg(long, value_name = "SOCKET", default_value = ADDRESS)]
    address: PathBuf,
    /// Directory for the snapshots; containers' changes are written there
    #[arg(long, value_name = "DIR", default_value = ROOT)]
    root: PathBuf,
    /// How long a mount is kept that no container uses [default: 1m]
    #[arg(long, value_name = "TIME")]
    idle: Option<Deadline>,
}

#[derive(Debug, Subcommand)]
enum SnapshotterCommand {
    /// Say what this host's configuration lacks for containerd to use the snapshotter
    Check(check::CheckArgs),
}

pub(super) fn run(config: &Config, args: SnapshotterArgs) -> anyhow::Result<()> {
    match args.command {
        Some(SnapshotterCommand::Check(args)) => check::run(args),
        None => {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()?;
            let served = runtime.block_on(serve_until_signal(config, args.serve));
            // A request that still waits for an image must not keep the process.
            runtime.shutdown_background();
            served
        }
    }
}

/// Serves until a signal asks this process to end. The mounts stay.
async fn serve_until_signal(config: &Config, args: SnapshotterServeArgs) -> anyhow::Result<()> {
    let mut signals = signals().context("cannot handle signals")?;
    let manager = ServiceManager::of_environment();
    let idle = args.idle.map_or(Some(IDLE), |deadline| deadline.0);
    let snapshotter = Snapshotter::open(SnapshotterConfig {
        root: std::path::absolute(&args.root)?,
        program: std::env::current_exe()?,
        arguments: config.arguments.clone(),
        registry: open::registry_config(config),
        store: Store::open(&config.store)?,
    })?;
    let (listener, _file) = listen(&args.address).with_context(|| format!("{}", args.address.display()))?;
    let restoring = snapshotter.clone();
    tokio::spawn(async move { restoring.restore().await });
    let serving = format!("serving snapshots at {}", args.address.display());
    manager.status(true, &serving);
    if !config.quiet {
        eprintln!("ocifs: {serving}");
    }
    let ending = async {
        let Some(idle) = idle else {
            return std::future::pending::<Infallible>().await;
        };
        loop {
            tokio::time::sleep(LOOK.min(idle)).await;
            snapshotter.end_unused(idle).await;
        }
    };
    tokio::select! {
        never = serve(listener, snapshotter.clone()) => match never {},
        never = ending => match never {},
        _ = signals.next() => {}
    }
    manager.stopping("ending; the mounts stay");
    Ok(())
}

/// Listens at a socket that only this user can use. The socket goes away with the file.
fn listen(address: &Path) -> anyhow::Result<(UnixListener, SocketFile)> {
    if let Some(directory) = address.parent().filter(|directory| !directory.is_dir()) {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    let (listener, file) = SocketFile::bind(address)?;
    std::fs::set_permissions(address, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok((UnixListener::from_std(listener)?, file))
}
