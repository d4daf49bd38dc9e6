//! `ocifs mount`: mounts an image on a directory.
//!
//! Without `--foreground` the command starts itself again as the process behind the mount, in a session of its own.
//! Then it waits for reports from that process: one JSON line each on that process's standard output. A report says
//! that the image is mounted, or ready, or why the mount failed.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::ChildStdout;

use super::config::Config;
use super::fetching::{Interrupted, signals};
use super::mounts::locate;
use super::say;
use super::{Fetching, ImageArgs, explain, open, progress, text};
use crate::image::Early;
use crate::mount::{self, Event, FuseOptions, MountConfig, Prefetch, RunDir, SERVE, Upper};
use crate::profile::Label;
use crate::store::gone;

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
    /// What to fetch that nobody has asked for: only what lies ahead of readers, what earlier starts of the program read, or
    /// that and then the rest of the image [default: profile]
    #[arg(long, value_enum, value_name = "WHAT")]
    prefetch: Option<PrefetchMode>,
    /// Which of the image's programs will run: starts are learned and replayed by label
    #[arg(long, value_name = "LABEL", default_value = "default")]
    profile: Label,
    /// Return only when the file tree can be read, or all of the image is in the store
    #[arg(long, value_enum, value_name = "STATE")]
    wait: Option<Wait>,
    /// Stay in the foreground until unmounted
    #[arg(short, long)]
    foreground: bool,
    /// Print one JSON object when mounted
    #[arg(long)]
    json: bool,
}

/// How long a process that was asked to end may take, and how often that is looked at.
const GRACE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(10);

impl MountArgs {
    /// What to wait for. An overlay is put together when the tree is there.
    fn wait(&self) -> Option<Wait> {
        let overlay = self.writable || self.upper.is_some();
        overlay.then_some(Wait::Ready).max(self.wait)
    }
}

/// [`Prefetch`] on the command line and in the configuration file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum PrefetchMode {
    /// Only what lies ahead of readers
    None,
    /// What earlier starts read
    Profile,
    /// All of the image
    All,
}

impl From<PrefetchMode> for Prefetch {
    fn from(mode: PrefetchMode) -> Self {
        match mode {
            PrefetchMode::None => Self::None,
            PrefetchMode::Profile => Self::Profile,
            PrefetchMode::All => Self::All,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Wait {
    /// The tree is there; reads fetch what they need.
    Ready,
    /// Nothing needs to be fetched any more.
    Complete,
}

/// What the serving process tells the one that waits.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Report {
    Mounted {
        digest: String,
        seconds: f64,
    },
    Progress {
        done: u64,
        total: u64,
    },
    Ready {
        seconds: f64,
    },
    Complete,
    /// Something that the user should know and that does not keep the mount from being used.
    Warning {
        message: String,
    },
    Failed {
        message: String,
    },
}

pub(super) fn run(config: &Config, args: MountArgs, started: Instant) -> anyhow::Result<()> {
    let mountpoint = resolve(&args.mountpoint)?;
    let log = std::env::var_os(SERVE).map(PathBuf::from);
    if args.foreground || log.is_some() {
        return serve(config, args, mountpoint, started, log);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(start(config, &args, &mountpoint))
}

/// The mount point as an absolute path without symlinks. What is mounted there is not touched, as a slash at the end of the
/// path would do: it may be dead, or its process may not answer.
fn resolve(mountpoint: &Path) -> anyhow::Result<PathBuf> {
    std::fs::canonicalize(locate(mountpoint)?).map_err(|error| {
        let advice = match error.kind() {
            std::io::ErrorKind::NotFound => "it does not exist (create the directory first)".to_owned(),
            _ => error.to_string(),
        };
        anyhow::anyhow!("cannot mount on {}: {advice}", mountpoint.display())
    })
}

/// Starts the process behind the mount and waits for it. Signals to this process end that one too, until it is on its own.
async fn start(config: &Config, args: &MountArgs, mountpoint: &Path) -> anyhow::Result<()> {
    let entry = RunDir::open()?.entry(mountpoint);
    entry.check_free()?;
    let (mut log, log_path) = entry.create_log()?;
    let mut signals = signals().context("cannot handle signals")?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(SERVE, &log_path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.try_clone().context("cannot share the log file")?)
        .spawn()
        .context("cannot start the process behind the mount")?;
    let result = tokio::select! {
        result = follow(&mut child, config, args, mountpoint, &mut log) => result,
        signal = signals.next() => Err(Interrupted::new(signal, Some("nothing is mounted".to_owned())).into()),
    };
    if result.is_err() {
        // What was attached comes down again; the exit status says nothing that the report did not.
        end(&mut child).await?;
        // One that ended before registering leaves its log, which says what was just said.
        gone(std::fs::remove_file(&log_path)).with_context(|| format!("{}", log_path.display()))?;
        let _turn = entry.turn().await?;
        if entry.record()?.is_none() {
            entry.remove(Some(log.as_fd()))?;
        }
    }
    result
}

/// Ends the process behind a mount that did not come about: it may take down what stands, but not for ever.
async fn end(child: &mut Child) -> anyhow::Result<()> {
    if child.try_wait()?.is_none() {
        let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    }
    let asked = Instant::now();
    let mut killed = false;
    while child.try_wait()?.is_none() {
        if asked.elapsed() > 2 * GRACE {
            bail!(
                "process {} behind the mount does not end, although it was killed",
                child.id()
            );
        }
        if asked.elapsed() > GRACE && !killed {
            child.kill()?;
            killed = true;
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// Reads reports until the state the user waits for is reached.
async fn follow(
    child: &mut Child,
    config: &Config,
    args: &MountArgs,
    mountpoint: &Path,
    log: &mut File,
) -> anyhow::Result<()> {
    let wait = args.wait();
    let bar = progress::Bar::new(&args.image.image, config.quiet);
    let pipe = child
        .stdout
        .take()
        .context("no pipe from the process behind the mount")?;
    let mut reports = BufReader::new(ChildStdout::from_std(pipe)?).lines();
    let mut mounted = None;
    let mut ready_seconds = None;
    while let Some(line) = reports.next_line().await? {
        let reached = match serde_json::from_str(&line)? {
            Report::Mounted { digest, seconds } => {
                mounted = Some((digest, seconds));
                None
            }
            Report::Progress { done, total } => {
                bar.set(done, total);
                continue;
            }
            Report::Ready { seconds } => {
                ready_seconds = Some(seconds);
                Some(Wait::Ready)
            }
            Report::Complete => Some(Wait::Complete),
            Report::Warning { message } => {
                bar.suspend(|| eprintln!("ocifs: {message}"));
                continue;
            }
            Report::Failed { message } => bail!(message),
        };
        if let Some((digest, seconds)) = &mounted
            && reached >= wait
        {
            bar.finish();
            if args.json {
                let mut object = serde_json::json!({
                    "image": &*args.image.image, "digest": digest,
                    "pid": child.id(), "mount_seconds": seconds, "ready_seconds": ready_seconds,
                });
                text::put(&mut object, "mountpoint", mountpoint.as_os_str().as_bytes());
                say!("{object}");
            }
            return Ok(());
        }
    }
    let status = child.wait()?;
    let mut said = Vec::new();
    log.rewind()?;
    log.read_to_end(&mut said)?;
    let said = String::from_utf8_lossy(&said);
    let last = said.lines().last().unwrap_or_default();
    bail!("the process behind the mount ended early ({status}): {last}")
}

/// The process behind the mount.
fn serve(
    config: &Config,
    args: MountArgs,
    mountpoint: PathBuf,
    started: Instant,
    log: Option<PathBuf>,
) -> anyhow::Result<()> {
    if log.is_some() {
        // Not a child of the terminal any more: its Ctrl-C is meant for the process that waits.
        nix::unistd::setsid().context("cannot start a session")?;
    }
    let reports = Arc::new(Reports { on: log.is_some() });
    let fetching = Fetching::new()?;
    let serving = serve_async(config, args, mountpoint, started, log, reports.clone());
    let result = fetching.runtime().block_on(serving);
    // Reads that still wait are answered by the kernel, now that the mount is gone.
    fetching.abandon();
    if let Err(error) = &result {
        reports.send(&Report::Failed {
            message: explain(error),
        });
    }
    result
}

async fn serve_async(
    config: &Config,
    args: MountArgs,
    mountpoint: PathBuf,
    started: Instant,
    log: Option<PathBuf>,
    reports: Arc<Reports>,
) -> anyhow::Result<()> {
    let mut context = open::context(config)?;
    match context.store.probe(0) {
        // That is said already, or it is meant to be so.
        Err(error) if error.is_by_design() => {}
        Err(error) => context.health.store_failed(&error),
        Ok(()) => {}
    }
    if args.wait().is_none() {
        // The mount tells who waits how it goes, and goes on.
        context = context.patient();
    }
    let mut options = FuseOptions::defaults(nix::unistd::geteuid().is_root());
    for list in &args.options {
        options.apply(list)?;
    }
    let upper = upper(&args, &context, &mountpoint)?;
    if upper.is_some() && options.read_only {
        bail!("a mount cannot be both writable and -o ro");
    }
    let prefetch = args
        .prefetch
        .or(config.prefetch)
        .map(Prefetch::from)
        .unwrap_or_default();
    let named = open::Named::open(config, &args.image, &context).await?;
    let replayed = (prefetch != Prefetch::None).then(|| args.profile.clone());
    let recalled = named.recall().await;
    let early = recalled.and_then(|recalled| Early::begin(recalled, &context, replayed));
    let (preparation, unconfirmed) = named.prepare().await?;
    if let Some(message) = unconfirmed.as_ref().and_then(|u| open::warning(&args.image.image, u)) {
        reports.send(&Report::Warning { message });
    }
    let (preparation, replay) = match early.and_then(|early| early.confirm(preparation.resolved())) {
        Some((preparation, replay)) => (preparation, Some(replay)),
        None => (Arc::new(preparation), None),
    };
    let mount = MountConfig {
        image: args.image.image.to_string(),
        mountpoint,
        options,
        require_ready: args.wait().is_some(),
        upper,
        prefetch,
        label: args.profile.clone(),
        unconfirmed,
        timeout: config.timeout,
        started,
        parent: std::os::unix::process::parent_id(),
        log,
    };
    let digest = preparation.resolved().manifest_document.digest.to_string();
    if args.wait().is_some() {
        tokio::spawn(tick(preparation.clone(), reports.clone()));
    }
    let complete = args.wait() == Some(Wait::Complete);
    let health = context.health.clone();
    let warned = std::cell::Cell::new(false);
    let events = |event: Event| {
        let seconds = started.elapsed().as_secs_f64();
        if let Some(problem) = health.store_problem().filter(|_| !warned.replace(true)) {
            reports.send(&Report::Warning { message: problem });
        }
        match event {
            Event::Mounted => {
                reports.send(&Report::Mounted {
                    digest: digest.clone(),
                    seconds,
                });
            }
            Event::Ready(image) => {
                reports.send(&Report::Ready { seconds });
                if complete {
                    let (reports, health) = (reports.clone(), health.clone());
                    tokio::spawn(async move {
                        let report = match open::complete(&image, &health).await {
                            Ok(()) => Report::Complete,
                            Err(error) => Report::Failed {
                                message: explain(&error),
                            },
                        };
                        reports.send(&report);
                    });
                }
            }
            Event::Failed(message) => {
                reports.send(&Report::Failed { message });
            }
        }
    };
    Ok(mount::serve(mount, context, preparation, replay, events).await?)
}

/// Reports how far the layers are, for the progress bar of the process that waits, as long as it does.
async fn tick(preparation: Arc<crate::image::Preparation>, reports: Arc<Reports>) {
    let mut interval = tokio::time::interval(progress::INTERVAL);
    loop {
        interval.tick().await;
        let (done, total) = crate::layer::progress(&preparation.status());
        if !reports.send(&Report::Progress { done, total }) {
            return;
        }
    }
}

fn upper(args: &MountArgs, context: &crate::layer::LayerContext, mountpoint: &Path) -> anyhow::Result<Option<Upper>> {
    if let (Some(upper), Some(work)) = (&args.upper, &args.work) {
        let absolute = |path: &Path| std::path::absolute(path).with_context(|| format!("{}", path.display()));
        return Ok(Some(Upper::Kept {
            upper: absolute(upper)?,
            work: absolute(work)?,
        }));
    }
    if !args.writable {
        return Ok(None);
    }
    let hash = blake3::hash(mountpoint.as_os_str().as_encoded_bytes()).to_hex();
    let id = format!("{}-{}", &hash[..16], std::process::id());
    let scratch = match context.store.upper_dir(&id) {
        Ok(scratch) => scratch,
        Err(error) if error.is_by_design() => RunDir::open()?.upper_dir(&id),
        Err(error) => return Err(error.into()),
    };
    Ok(Some(Upper::Private(scratch)))
}

/// Whether a line can be written to standard output without waiting (poll(2): a pipe is writable if there is room for
/// `PIPE_BUF` bytes, which is more than any line of progress).
fn has_room() -> bool {
    let stdout = std::io::stdout();
    let mut polled = [PollFd::new(stdout.as_fd(), PollFlags::POLLOUT)];
    // Where it cannot be told, the write tells.
    poll(&mut polled, PollTimeout::ZERO).map_or(true, |ready| ready > 0)
}

/// Report lines on standard output, if somebody listens; the log has what nobody hears.
struct Reports {
    on: bool,
}

impl Reports {
    /// Says whether somebody listens. Progress that the pipe has no room for is left out: a process that waits may be stopped,
    /// and this one has to go on.
    fn send(&self, report: &Report) -> bool {
        if self.on && matches!(report, Report::Progress { .. }) && !has_room() {
            return true;
        }
        let line = serde_json::to_string(report).expect("a report has only strings and numbers");
        let heard = self.on && writeln!(std::io::stdout(), "{line}").is_ok();
        match report {
            Report::Failed { message } if !heard => tracing::error!("{message}"),
            Report::Warning { message } => tracing::warn!("{message}"),
            _ => {}
        }
        heard
    }
}
