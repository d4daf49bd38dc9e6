//! `ocifs umount`, `list`, `status`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;

use super::explain;
use super::units::human;
use crate::mount::{self, MountState, MountStatus, RunDir};

/// Arguments of `umount`.
#[derive(Debug, Args)]
pub(super) struct UmountArgs {
    /// Directories that are mounted on
    #[arg(required = true)]
    mountpoints: Vec<PathBuf>,
    /// Detach at once, even if in use; users keep what they have open until the process is gone
    #[arg(short, long)]
    lazy: bool,
}

/// Arguments of `list`.
#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// Directory that is mounted on
    mountpoint: PathBuf,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// The absolute path of a mount point that may be dead: its parent is resolved, itself it is not touched.
fn locate(path: &Path) -> anyhow::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
        return Ok(absolute);
    };
    let parent = std::fs::canonicalize(parent).with_context(|| format!("{}", path.display()))?;
    let located = parent.join(name);
    match std::fs::read_link(&located) {
        Ok(target) => locate(&parent.join(target)),
        Err(_) => Ok(located),
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(future))
}

pub(super) fn umount(args: UmountArgs) -> anyhow::Result<()> {
    let run = RunDir::open()?;
    let take_down = |path: &Path| Ok(block_on(mount::take_down(&run, &locate(path)?, args.lazy))??);
    if let [only] = args.mountpoints.as_slice() {
        return take_down(only);
    }
    let mut failed = 0;
    for path in &args.mountpoints {
        if let Err(error) = take_down(path) {
            eprintln!("ocifs: {}", explain(&error));
            failed += 1;
        }
    }
    match failed {
        0 => Ok(()),
        n => bail!("{n} of {} not unmounted", args.mountpoints.len()),
    }
}

fn state(state: MountState) -> &'static str {
    match state {
        MountState::Preparing => "preparing",
        MountState::Ready => "ready",
        MountState::Failed => "failed",
        MountState::Dead => "dead",
    }
}

pub(super) fn list(args: ListArgs) -> anyhow::Result<()> {
    let mounts = block_on(mount::list(&RunDir::open()?))??;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&mounts)?);
        return Ok(());
    }
    println!(
        "{:<10} {:>8} {:>20}  {:<40} IMAGE",
        "STATE", "PID", "FETCHED", "MOUNTPOINT"
    );
    for m in mounts {
        let fetched = format!("{} of {}", human(m.fetched), human(m.size));
        println!(
            "{:<10} {:>8} {:>20}  {:<40} {}",
            state(m.state),
            m.pid,
            fetched,
            m.mountpoint,
            m.image
        );
    }
    Ok(())
}

pub(super) fn status(args: StatusArgs) -> anyhow::Result<()> {
    let status = block_on(mount::status_of(&RunDir::open()?, &locate(&args.mountpoint)?))??;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&status)?);
    } else {
        show(&status);
    }
    Ok(())
}

fn show(status: &MountStatus) {
    println!("image       {}", status.image);
    println!("digest      {}", status.digest);
    println!(
        "mounted on  {}{}",
        status.mountpoint,
        if status.writable { " (writable)" } else { "" }
    );
    println!("process     {}, up {:.0} s", status.pid, status.uptime);
    println!("state       {}", state(status.state));
    if let Some(problem) = &status.problem {
        println!("problem     {problem}");
    }
    let ready = status
        .ready_seconds
        .map(|s| format!(", ready after {s:.3} s"))
        .unwrap_or_default();
    println!("started     mounted after {:.3} s{ready}", status.mount_seconds);
    let percent = 100.0 * status.fetched as f64 / status.size.max(1) as f64;
    println!(
        "fetched     {} of {} ({percent:.1} %)",
        human(status.fetched),
        human(status.size)
    );
    if let (Some(rate), Some(left)) = (status.rate, status.remaining_seconds) {
        println!("rate        {}/s, about {left:.0} s left", human(rate as u64));
    }
    println!("memory      {}", human(status.memory));
    println!();
    println!(
        "{:<19} {:>10} {:>10} {:>10} {:>7} {:>8} {:>13}  INDEX",
        "LAYER", "SIZE", "FETCHED", "SERVED", "HITS", "MISSES", "LOCAL SPANS"
    );
    for layer in &status.layers {
        let local = format!("{}/{}", layer.local_spans, layer.spans);
        let source = serde_json::to_value(layer.index_source).unwrap_or_default();
        println!(
            "{:<19} {:>10} {:>10} {:>10} {:>7} {:>8} {:>13}  {}",
            layer.digest.get(..19).unwrap_or(&layer.digest),
            human(layer.size),
            human(layer.fetched),
            human(layer.served),
            layer.hits,
            layer.misses,
            local,
            source.as_str().unwrap_or_default(),
        );
    }
}
