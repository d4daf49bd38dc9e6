//! `ocifs umount`, `list` and `status`: take mounts down and show them.

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;

use super::explain;
use super::json::versioned;
use super::say;
use super::text::{self, shown};
use super::units::human;
use ocifs::content::ReadStatus;
use ocifs::erofs::MOST_LINKS;
use ocifs::mount::{
    self, Carrier, DISK_FILE, DiskDoors, DoorAddress, MountState, MountStatus, Prefetch, PrefetchState, PrefetchStatus,
    RunDir, TakenDown,
};

/// Arguments of `umount`.
#[derive(Debug, Args)]
pub(super) struct UmountArgs {
    /// Directories that are mounted on, or the directory, socket or HOST:PORT of a disk
    #[arg(required = true, value_name = "PLACE")]
    mountpoints: Vec<PathBuf>,
    /// Detach at once, even if in use; users keep what they have open until the process is gone
    #[arg(short, long)]
    lazy: bool,
    /// Print a JSON object for each mount point, with what its process has fetched and done
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
///
/// Fails if the mount is dead, does not answer, or is unmounted and only somebody else still uses it.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// Directory that is mounted on, or the directory, socket or HOST:PORT of a disk
    #[arg(value_name = "PLACE")]
    mountpoint: PathBuf,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// Returns the absolute path of a mount point that may be dead. It resolves the parent directory and does not touch
/// the mount point itself.
pub(super) fn locate(path: &Path) -> anyhow::Result<PathBuf> {
    let mut path = std::path::absolute(path)?;
    for _ in 0..=MOST_LINKS {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            // The path is the root or ends in `..`.
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

/// Returns the path by which a running mount is known, as [`locate`] does. If the path leads nowhere, it is only made
/// absolute: the mount may still be registered under that path.
///
/// HOST:PORT is the name of a disk with an NBD port, so it is returned as it is.
fn known(path: &Path) -> anyhow::Result<PathBuf> {
    if let Some(Ok(address)) = path.to_str().and_then(DoorAddress::parse_tcp) {
        return Ok(address.to_string().into());
    }
    let is_gone = |error: &anyhow::Error| {
        let cause = error.downcast_ref::<std::io::Error>();
        cause.is_some_and(|e| e.kind() == std::io::ErrorKind::NotFound)
    };
    match locate(path) {
        Err(error) if is_gone(&error) => Ok(std::path::absolute(path)?),
        located => located,
    }
}

pub(super) fn block_on<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(future))
}

/// Takes the mount or disk at `path` down. Returns what is left of it.
pub(super) fn take_down(path: &Path, lazy: bool) -> anyhow::Result<TakenDown> {
    Ok(block_on(mount::take_down(&RunDir::open()?, &known(path)?, lazy))??)
}

pub(super) fn umount(args: UmountArgs) -> anyhow::Result<()> {
    let mut failures: Vec<anyhow::Error> = Vec::new();
    for path in &args.mountpoints {
        let result = take_down(path, args.lazy);
        let taken_down = result.as_ref().ok().cloned().unwrap_or_default();
        if args.json {
            let problem = result.as_ref().err().map(explain);
            let mut object = serde_json::json!({
                "unmounted": problem.is_none(), "problem": problem, "remainder": taken_down.remainder,
                "summary": taken_down.summary,
            });
            text::put(&mut object, "mountpoint", path.as_os_str().as_bytes());
            say!("{}", versioned(object)?);
        } else if let Some(remainder) = taken_down.remainder {
            eprintln!("ocifs: {}: {remainder}", path.display());
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
        MountState::Stalled => "stalled",
        MountState::Ready => "ready",
        MountState::Failed => "failed",
        MountState::Dead => "dead",
        MountState::Unresponsive => "no answer",
        MountState::Detached => "detached",
    }
}

pub(super) fn list(args: ListArgs) -> anyhow::Result<()> {
    let mounts = block_on(mount::list(&RunDir::open()?))??;
    if args.json {
        say!("{:#}", versioned(&mounts)?);
        return Ok(());
    }
    say!("{:<10} {:>8} {:>20}  {:<40} IMAGE", "STATE", "PID", "FETCHED", "PLACE");
    for m in mounts {
        let fetched = format!("{} of {}", human(m.fetched), human(m.size));
        say!(
            "{:<10} {:>8} {:>20}  {:<40} {}",
            state(m.state),
            m.pid,
            fetched,
            shown(&m.mountpoint),
            shown(&m.image)
        );
        for door in m.disk.iter().flat_map(DiskDoors::places).skip(1) {
            say!(
                "{:<10} {:>8} {:>20}  {}",
                "",
                "",
                "",
                shown(&door.display().to_string())
            );
        }
        if let Some(problem) = &m.problem {
            say!("{:<10} {}", "", shown(problem));
        }
    }
    Ok(())
}

pub(super) fn status(args: StatusArgs) -> anyhow::Result<()> {
    let status = block_on(mount::status_of(&RunDir::open()?, &known(&args.mountpoint)?))??;
    if args.json {
        say!("{:#}", versioned(&status)?);
    } else {
        show(&status)?;
    }
    match status.state {
        MountState::Preparing | MountState::Stalled | MountState::Ready | MountState::Failed => Ok(()),
        MountState::Dead => bail!("the process that served it is dead"),
        MountState::Unresponsive => bail!("the process that serves it does not answer"),
        MountState::Detached => bail!("it was taken down, but programs still use it"),
    }
}

fn show(status: &MountStatus) -> anyhow::Result<()> {
    say!("image       {}", shown(&status.image));
    say!("digest      {}", status.digest);
    if let Some(unconfirmed) = &status.unconfirmed {
        let since = unconfirmed.since.as_deref().unwrap_or("an unknown time");
        let reason = unconfirmed
            .reason
            .as_deref()
            .unwrap_or("the registry was not to be asked");
        say!("tag         last confirmed at {since}: {reason}");
    }
    match &status.disk {
        Some(doors) => show_doors(doors)?,
        None => {
            let writable = if status.writable { ", writable" } else { "" };
            let carrier = match status.via {
                Carrier::Fuse => "FUSE",
                Carrier::Erofs => "EROFS",
            };
            say!("mounted on  {} (by {carrier}{writable})", shown(&status.mountpoint));
        }
    }
    say!("process     {}, up {:.0} s", status.pid, status.uptime);
    match (status.stalled_seconds, status.rate) {
        (Some(seconds), Some(rate)) => say!(
            "state       stalled, reads fail: nothing useful for {seconds:.0} s, {}/s now",
            human(rate as u64)
        ),
        _ => say!("state       {}", state(status.state)),
    }
    if let Some(problem) = &status.problem {
        say!("problem     {}", shown(problem));
    }
    if let Some(log) = &status.log {
        say!("log         {}", shown(log));
    }
    if let Some(metrics) = &status.metrics {
        say!("metrics     {}", shown(metrics));
    }
    let ready = status
        .ready_seconds
        .map(|s| format!(", ready after {s:.3} s"))
        .unwrap_or_default();
    say!("started     mounted after {:.3} s{ready}", status.mount_seconds);
    say!(
        "fetched     {} in {} requests, {} of it used",
        share(status.fetched, status.size),
        status.requests,
        human(status.used)
    );
    say!("local       {}", share(status.local, status.size));
    let healed: u64 = status.layers.iter().map(|layer| layer.healed).sum();
    if healed > 0 {
        say!("healed      {healed} spans were damaged on disk and fetched again");
    }
    if let (Some(rate), Some(left)) = (status.rate, status.remaining_seconds) {
        say!("rate        {}/s, about {left:.0} s left", human(rate as u64));
    }
    if let Some(prefetch) = &status.prefetch {
        show_prefetch(prefetch)?;
    }
    let load = &status.in_flight;
    say!(
        "requests    {} for readers and {} ahead of them under way, {} waiting",
        load.demand,
        load.others,
        load.waiting
    );
    if let Some(link) = &status.link {
        let rtt = link.rtt.map_or("not measured".to_owned(), milliseconds);
        let bandwidth = link
            .bandwidth
            .map_or("not measured".to_owned(), |b| format!("{}/s", human(b as u64)));
        say!("link        round trip {rtt}, bandwidth {bandwidth}");
    }
    show_reads(&status.reads)?;
    say!("memory      {}", human(status.memory));
    say!("");
    show_layers(status)
}

fn show_doors(doors: &DiskDoors) -> anyhow::Result<()> {
    if let Some(directory) = &doors.file {
        say!(
            "file        {}",
            shown(&directory.join(DISK_FILE).display().to_string())
        );
    }
    if let Some(address) = &doors.nbd {
        say!("nbd         {}", shown(&address.to_string()));
    }
    if let Some(path) = &doors.vhost_user_blk {
        say!("vhost-user  {}", shown(&path.display().to_string()));
    }
    Ok(())
}

fn show_prefetch(prefetch: &PrefetchStatus) -> anyhow::Result<()> {
    let what = |mode| match mode {
        Prefetch::None => "none",
        Prefetch::Profile => "profile",
        Prefetch::All => "all",
    };
    let state = match prefetch.state {
        PrefetchState::Pending => "not begun",
        PrefetchState::Profile => "replaying the profile",
        PrefetchState::Rest => "fetching the rest",
        PrefetchState::Waiting => "will try again",
        PrefetchState::Done => "done",
    };
    let problem = prefetch.problem.as_ref().map(|p| format!(": {p}")).unwrap_or_default();
    say!("prefetch    {}, {state}{problem}", what(prefetch.mode));
    let known = match (prefetch.profile_bytes, prefetch.runs) {
        (0, _) => "nothing known".to_owned(),
        (bytes, 0) => format!("{} known from a related image", human(bytes)),
        (bytes, 1) => format!("{} known from 1 run", human(bytes)),
        (bytes, runs) => format!("{} known from {runs} runs", human(bytes)),
    };
    say!("profile     {}, {known}", prefetch.label);
    Ok(())
}

fn show_reads(reads: &ReadStatus) -> anyhow::Result<()> {
    let quantiles = |p50: Option<f64>, p99: Option<f64>| match (p50, p99) {
        (Some(p50), Some(p99)) => format!(" (p50 {}, p99 {})", milliseconds(p50), milliseconds(p99)),
        _ => String::new(),
    };
    let all = reads.at_once + reads.waited;
    let hits = 100.0 * reads.at_once as f64 / all.max(1) as f64;
    say!(
        "reads       {all}{}, {hits:.1} % at once",
        quantiles(reads.p50, reads.p99)
    );
    say!(
        "waits       {}{}, {} waiting now",
        reads.waited,
        quantiles(reads.waited_p50, reads.waited_p99),
        reads.waiting
    );
    Ok(())
}

fn show_layers(status: &MountStatus) -> anyhow::Result<()> {
    say!(
        "{:<19} {:>10} {:>10} {:>10} {:>10} {:>8} {:>6} {:>8}  INDEX",
        "LAYER",
        "SIZE",
        "LOCAL",
        "FETCHED",
        "USED",
        "REQUESTS",
        "HITS",
        "MISSES"
    );
    for layer in &status.layers {
        let source = serde_json::to_value(layer.index_source).unwrap_or_default();
        let source = source.as_str().unwrap_or_default();
        let index = match &layer.authority {
            Some(authority) => format!("{source} ({})", shown(authority)),
            None => source.to_owned(),
        };
        let hits = 100.0 * layer.hits as f64 / (layer.hits + layer.misses).max(1) as f64;
        say!(
            "{:<19} {:>10} {:>10} {:>10} {:>10} {:>8} {:>4.0} % {:>8}  {}",
            layer.digest.get(..19).unwrap_or(&layer.digest),
            human(layer.size),
            human(layer.local),
            human(layer.fetched),
            human(layer.used),
            layer.requests,
            hits,
            layer.misses,
            index,
        );
    }
    Ok(())
}

/// Formats a part of a whole, with its percentage.
fn share(part: u64, whole: u64) -> String {
    let percent = 100.0 * part as f64 / whole.max(1) as f64;
    format!("{} of {} ({percent:.1} %)", human(part), human(whole))
}

/// Formats seconds as milliseconds, with about three digits.
fn milliseconds(seconds: f64) -> String {
    let ms = seconds * 1e3;
    match ms {
        0.0..1.0 => format!("{ms:.3} ms"),
        1.0..100.0 => format!("{ms:.1} ms"),
        _ => format!("{ms:.0} ms"),
    }
}
