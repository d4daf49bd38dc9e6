//! `ocifs umount`, `list`, `status`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;

use super::explain;
use super::files::MAX_LINKS;
use super::say;
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
    /// Print a JSON object for each mount point
    #[arg(long)]
    json: bool,
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
    let mut path = std::path::absolute(path)?;
    for _ in 0..=MAX_LINKS {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            // The root, or a path that ends in `..`.
            return std::fs::canonicalize(&path).with_context(|| format!("{}", path.display()));
        };
        let parent = std::fs::canonicalize(parent).with_context(|| format!("{}", path.display()))?;
        let located = parent.join(name);
        match std::fs::read_link(&located) {
            Ok(target) => path = parent.join(target),
            Err(_) => return Ok(located),
        }
    }
    bail!("{}: too many levels of symbolic links", path.display())
}

fn block_on<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(future))
}

pub(super) fn umount(args: UmountArgs) -> anyhow::Result<()> {
    let run = RunDir::open()?;
    let take_down = |path: &Path| Ok(block_on(mount::take_down(&run, &locate(path)?, args.lazy))??);
    let mut failures: Vec<anyhow::Error> = Vec::new();
    for path in &args.mountpoints {
        let result = take_down(path);
        if args.json {
            let problem = result.as_ref().err().map(explain);
            let object = serde_json::json!({
                "mountpoint": path.to_string_lossy(), "unmounted": problem.is_none(), "problem": problem,
            });
            say!("{object}");
        }
        failures.extend(result.err());
    }
    let count = failures.len();
    match failures.pop() {
        None => Ok(()),
        Some(only) if args.mountpoints.len() == 1 => Err(only),
        Some(last) => {
            for error in failures.iter().chain([&last]) {
                eprintln!("ocifs: {}", explain(error));
            }
            bail!("{count} of {} not unmounted", args.mountpoints.len())
        }
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
        say!("{}", serde_json::to_string_pretty(&mounts)?);
        return Ok(());
    }
    say!(
        "{:<10} {:>8} {:>20}  {:<40} IMAGE",
        "STATE",
        "PID",
        "FETCHED",
        "MOUNTPOINT"
    );
    for m in mounts {
        let fetched = format!("{} of {}", human(m.fetched), human(m.size));
        say!(
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
        say!("{}", serde_json::to_string_pretty(&status)?);
    } else {
        show(&status)?;
    }
    Ok(())
}

fn show(status: &MountStatus) -> anyhow::Result<()> {
    say!("image       {}", status.image);
    say!("digest      {}", status.digest);
    say!(
        "mounted on  {}{}",
        status.mountpoint,
        if status.writable { " (writable)" } else { "" }
    );
    say!("process     {}, up {:.0} s", status.pid, status.uptime);
    say!("state       {}", state(status.state));
    if let Some(problem) = &status.problem {
        say!("problem     {problem}");
    }
    let ready = status
        .ready_seconds
        .map(|s| format!(", ready after {s:.3} s"))
        .unwrap_or_default();
    say!("started     mounted after {:.3} s{ready}", status.mount_seconds);
    let percent = 100.0 * status.fetched as f64 / status.size.max(1) as f64;
    say!(
        "fetched     {} of {} ({percent:.1} %)",
        human(status.fetched),
        human(status.size)
    );
    if let (Some(rate), Some(left)) = (status.rate, status.remaining_seconds) {
        say!("rate        {}/s, about {left:.0} s left", human(rate as u64));
    }
    say!("memory      {}", human(status.memory));
    say!("");
    say!(
        "{:<19} {:>10} {:>10} {:>10} {:>7} {:>8} {:>13}  INDEX",
        "LAYER",
        "SIZE",
        "FETCHED",
        "SERVED",
        "HITS",
        "MISSES",
        "LOCAL SPANS"
    );
    for layer in &status.layers {
        let local = format!("{}/{}", layer.local_spans, layer.spans);
        let source = serde_json::to_value(layer.index_source).unwrap_or_default();
        say!(
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
    Ok(())
}
