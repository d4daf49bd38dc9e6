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

use super::config::{Config, PrefetchMode};
use super::fetching::{Interrupted, signals};
use super::mounts::locate;
use super::say;
use super::{Fetching, ImageArgs, explain, open, progress, text};
use ocifs::mount::{self, Event, FuseOptions, MountConfig, Prefetch, RunDir, SERVE, Upper};
use ocifs::os::{gone, until};
use ocifs::profile::Label;

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

/// Time that a process may take to end after a signal. A shorter time could cut a takedown short. A longer one would
/// keep the user waiting for a process that hangs.
const GRACE: Duration = Duration::from_secs(30);
/// Time between two checks whether the process has ended.
const LOOK: Duration = Duration::from_millis(10);

impl MountArgs {
    /// Returns the state to wait for. A writable mount waits at least for the tree, because the overlay is mounted on
    /// the tree.
    fn wait(&self) -> Option<Wait> {
        let overlay = self.writable || self.upper.is_some();
        overlay.then_some(Wait::Ready).max(self.wait)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Wait {
    /// The tree is there; reads fetch what they need.
    Ready,
    /// Nothing needs to be fetched any more.
    Complete,
}

/// What the process behind the mount tells the process that waits.
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
    /// A problem that the user should know. The mount works in spite of it.
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

/// Returns the mount point as an absolute path without symbolic links. It does not touch the file system that is
/// mounted there, which a slash at the end of the path would do. That mount may be dead, or its process may not
/// answer.
fn resolve(mountpoint: &Path) -> anyhow::Result<PathBuf> {
    std::fs::canonicalize(locate(mountpoint)?).map_err(|error| {
        let advice = match error.kind() {
            std::io::ErrorKind::NotFound => "it does not exist (create the directory first)".to_owned(),
            _ => error.to_string(),
        };
        anyhow::anyhow!("cannot mount on {}: {advice}", mountpoint.display())
    })
}

/// Starts the process behind the mount and waits for its reports. A signal to this process also ends that process,
/// until the awaited state is reached.
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
        // The process takes down what it has mounted. Its exit status adds nothing to its report.
        end(&mut child).await?;
        // A process that ended before it registered the mount leaves its log. The log only repeats the error.
        gone(std::fs::remove_file(&log_path)).with_context(|| format!("{}", log_path.display()))?;
        let _turn = entry.turn().await?;
        if entry.record()?.is_none() {
            entry.remove(Some(log.as_fd()))?;
        }
    }
    result
}

/// Ends the process behind a mount that failed to start. The process gets [`GRACE`] to take its mount down; then it
/// is killed.
async fn end(child: &mut Child) -> anyhow::Result<()> {
    if child.try_wait()?.is_none() {
        let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    }
    let mut ended = || Ok::<_, std::io::Error>(child.try_wait()?.map(drop));
    if until(LOOK, GRACE, &mut ended).await?.is_some() {
        return Ok(());
    }
    child.kill()?;
    let id = child.id();
    match until(LOOK, GRACE, || child.try_wait()).await? {
        Some(_) => Ok(()),
        None => bail!("process {id} behind the mount does not end, although it was killed"),
    }
}

/// Reads reports until the state that the user waits for is reached.
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

/// Runs the process behind the mount until the mount ends.
fn serve(
    config: &Config,
    args: MountArgs,
    mountpoint: PathBuf,
    started: Instant,
    log: Option<PathBuf>,
) -> anyhow::Result<()> {
    if log.is_some() {
        // Leaves the terminal's session: Ctrl-C there is meant for the process that waits.
        nix::unistd::setsid().context("cannot start a session")?;
    }
    let reports = Arc::new(Reports { on: log.is_some() });
    let fetching = Fetching::new()?;
    let serving = serve_async(config, args, mountpoint, started, log, reports.clone());
    let result = fetching.runtime().block_on(serving);
    // The mount is gone, so the kernel answers reads that still wait.
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
        // The store is missing, which is reported already, or it is read-only on purpose.
        Err(error) if error.is_by_design() => {}
        Err(error) => context.health.store_failed(&error),
        Ok(()) => {}
    }
    if args.wait().is_none() {
        // The mount goes on trying; a reader that waits gets an error when its time is up.
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
    let named = open::named(config, &args.image, &context.store).await?;
    let replayed = (prefetch != Prefetch::None).then(|| args.profile.clone());
    let opened = named.open(&context, replayed).await;
    let opening = opened.map_err(|error| open::advised(error.into(), &args.image.image))?;
    let unconfirmed = opening.unconfirmed.as_ref();
    if let Some(message) = unconfirmed.and_then(|u| open::warning(&args.image.image, u)) {
        reports.send(&Report::Warning { message });
    }
    let preparation = opening.preparation.clone();
    let mount = MountConfig {
        image: args.image.image.to_string(),
        mountpoint,
        options,
        require_ready: args.wait().is_some(),
        upper,
        prefetch,
        label: args.profile.clone(),
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
                    let reports = reports.clone();
                    tokio::spawn(async move {
                        let report = match image.complete().await {
                            Ok(()) => Report::Complete,
                            Err(error) => Report::Failed {
                                message: error.to_string(),
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
    Ok(mount::serve(mount, context, opening, events).await?)
}

/// Reports the progress of the layers to the process that waits, until that process closes the pipe.
async fn tick(preparation: Arc<ocifs::image::Preparation>, reports: Arc<Reports>) {
    let mut interval = tokio::time::interval(progress::INTERVAL);
    loop {
        interval.tick().await;
        let (done, total) = ocifs::layer::progress(&preparation.status());
        if !reports.send(&Report::Progress { done, total }) {
            return;
        }
    }
}

fn upper(args: &MountArgs, context: &ocifs::layer::LayerContext, mountpoint: &Path) -> anyhow::Result<Option<Upper>> {
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

/// Returns whether a line can be written to standard output without waiting. By poll(2) a pipe is writable if it has
/// room for `PIPE_BUF` bytes, which is more than any progress line.
fn has_room() -> bool {
    let stdout = std::io::stdout();
    let mut polled = [PollFd::new(stdout.as_fd(), PollFlags::POLLOUT)];
    // If poll fails, the write shows whether there is room.
    poll(&mut polled, PollTimeout::ZERO).map_or(true, |ready| ready > 0)
}

/// Writes report lines to standard output for the process that waits. Failures that this process does not read go to
/// the log, and so do all warnings.
struct Reports {
    on: bool,
}

impl Reports {
    /// Sends a report and returns whether a process reads reports. If the pipe has no room for a progress report,
    /// leaves the report out. The process that waits may be stopped, and this process must not wait for it.
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
