//! `ocifs mount`.
//!
//! Without `--foreground` the command starts itself again as the process behind the mount, in a session of its own, and
//! waits for that one to say (a JSON line each on its standard output) that it is mounted, or ready, or why not.

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::ChildStdout;
use tokio::signal::unix::{SignalKind, signal};

use super::config::Config;
use super::{ImageArgs, explain, open, progress, runtime};
use crate::mount::{self, Event, FuseOptions, MountConfig, RunDir, Upper};
use crate::store::StoreError;

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
    /// Return only when the file tree can be read, or all of the image is in the store
    #[arg(long, value_enum, value_name = "STATE")]
    wait: Option<Wait>,
    /// Stay in the foreground until unmounted
    #[arg(short, long)]
    foreground: bool,
    /// Print one JSON object when mounted
    #[arg(long)]
    json: bool,
    /// Internal: be the process behind the mount
    #[arg(long, hide = true)]
    serve: bool,
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
    Mounted { digest: String, seconds: f64 },
    Progress { done: u64, total: u64 },
    Ready { seconds: f64 },
    Complete { seconds: f64 },
    Failed { message: String },
}

pub(super) fn run(config: &Config, args: MountArgs, started: Instant) -> anyhow::Result<()> {
    let mountpoint = std::fs::canonicalize(&args.mountpoint)
        .with_context(|| format!("mount point {}", args.mountpoint.display()))?;
    if args.foreground || args.serve {
        return serve(config, args, mountpoint, started);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(start(&args, &mountpoint))
}

/// Starts the process behind the mount and waits for it. Signals to this process end that one too, until it is on its own.
async fn start(args: &MountArgs, mountpoint: &Path) -> anyhow::Result<()> {
    let entry = RunDir::open()?.entry(mountpoint);
    entry.check_free()?;
    let log = entry.create_log()?;
    let mut signals = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()]
        .into_iter()
        .map(signal)
        .collect::<Result<Vec<_>, _>>()
        .context("cannot handle signals")?;
    let signalled = futures::future::select_all(signals.iter_mut().map(|s| Box::pin(s.recv())));
    let mut child = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .arg("--serve")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.try_clone().context("cannot share the log file")?)
        .spawn()
        .context("cannot start the process behind the mount")?;
    let result = tokio::select! {
        result = follow(&mut child, args, mountpoint) => result,
        _ = signalled => Err(anyhow::anyhow!("interrupted, nothing is mounted")),
    };
    if result.is_err() {
        // What was attached comes down again; the exit status says nothing that the report did not.
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(child.id().cast_signed()),
            nix::sys::signal::Signal::SIGTERM,
        );
        let _ = child.wait();
        // Whoever ended before registering leaves its log, which says what was just said; anybody else's stays.
        let _turn = entry.turn()?;
        if entry.record()?.is_none() {
            entry.remove(Some(log.as_fd()))?;
        }
    }
    result
}

/// Reads reports until the state the user waits for is reached.
async fn follow(child: &mut Child, args: &MountArgs, mountpoint: &Path) -> anyhow::Result<()> {
    let wait = if args.writable || args.upper.is_some() {
        Some(Wait::Ready)
    } else {
        None
    }
    .max(args.wait);
    let bar = progress::Bar::new(&args.image.image);
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
            Report::Complete { .. } => Some(Wait::Complete),
            Report::Failed { message } => bail!(message),
        };
        if let Some((digest, seconds)) = &mounted
            && reached >= wait
        {
            bar.finish();
            if args.json {
                let object = serde_json::json!({
                    "image": args.image.image, "digest": digest, "mountpoint": mountpoint.to_string_lossy(),
                    "pid": child.id(), "mount_seconds": seconds, "ready_seconds": ready_seconds,
                });
                println!("{object}");
            }
            return Ok(());
        }
    }
    let status = child.wait()?;
    let log = std::fs::read_to_string(RunDir::open()?.entry(mountpoint).log()).unwrap_or_default();
    let last = log.lines().last().unwrap_or_default();
    bail!("the process behind the mount ended early ({status}): {last}")
}

/// The process behind the mount.
fn serve(config: &Config, args: MountArgs, mountpoint: PathBuf, started: Instant) -> anyhow::Result<()> {
    if args.serve {
        // Not a child of the terminal any more: its Ctrl-C is meant for the process that waits.
        nix::unistd::setsid().context("cannot start a session")?;
    }
    let reports = Arc::new(Reports { on: args.serve });
    let runtime = runtime()?;
    let result = runtime.block_on(serve_async(config, args, mountpoint, started, reports.clone()));
    // Reads that still wait are answered by the kernel, now that the mount is gone.
    runtime.abandon();
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
    reports: Arc<Reports>,
) -> anyhow::Result<()> {
    let context = open::context(config)?;
    let mut options = FuseOptions::defaults(nix::unistd::geteuid().is_root());
    for list in &args.options {
        options.apply(list)?;
    }
    let upper = upper(&args, &context, &mountpoint)?;
    let preparation = Arc::new(open::prepare(config, &args.image, &context).await?);
    let mount = MountConfig {
        image: args.image.image.clone(),
        mountpoint,
        options,
        require_ready: upper.is_some() || args.wait.is_some(),
        upper,
        timeout: config.timeout,
        started,
    };
    let digest = preparation.resolved().manifest_document.digest.to_string();
    let ticker = args
        .wait
        .map(|_| tokio::spawn(tick(preparation.clone(), reports.clone())));
    let complete = args.wait == Some(Wait::Complete);
    let events = |event: Event| {
        let seconds = started.elapsed().as_secs_f64();
        match event {
            Event::Mounted => reports.send(&Report::Mounted {
                digest: digest.clone(),
                seconds,
            }),
            Event::Ready(image) => {
                reports.send(&Report::Ready { seconds });
                if complete {
                    let reports = reports.clone();
                    tokio::spawn(async move {
                        let report = match image.complete().await {
                            Ok(missing) if missing > 0 => Report::Failed {
                                message: format!(
                                    "not all of the image fits in the cache, {missing} spans are gone again: raise --cache-size"
                                ),
                            },
                            Ok(_) => Report::Complete {
                                seconds: started.elapsed().as_secs_f64(),
                            },
                            Err(error) => Report::Failed {
                                message: error.to_string(),
                            },
                        };
                        reports.send(&report);
                    });
                }
            }
            Event::Failed(message) => reports.send(&Report::Failed { message }),
        }
    };
    let served = mount::serve(mount, context, preparation, events).await;
    if let Some(ticker) = ticker {
        ticker.abort();
    }
    Ok(served?)
}

/// Reports how far the layers are, for the progress bar of the process that waits.
async fn tick(preparation: Arc<crate::image::Preparation>, reports: Arc<Reports>) {
    let mut interval = tokio::time::interval(progress::INTERVAL);
    loop {
        interval.tick().await;
        let layers = preparation.status();
        reports.send(&Report::Progress {
            done: layers.iter().map(|l| l.fetched).sum(),
            total: layers.iter().map(|l| l.size).sum(),
        });
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
        Err(StoreError::Unavailable) => RunDir::open()?.upper_dir(&id),
        Err(error) => return Err(error.into()),
    };
    Ok(Some(Upper::Private(scratch)))
}

/// Report lines on standard output, if somebody listens.
struct Reports {
    on: bool,
}

impl Reports {
    fn send(&self, report: &Report) {
        if self.on {
            let line = serde_json::to_string(report).expect("a report has only strings and numbers");
            // The one that waited may have all it wanted and be gone.
            let _ = writeln!(std::io::stdout(), "{line}");
        }
    }
}
