//! The process behind a mount or a disk, and the process that waits for it.
//!
//! Without `--foreground` a command starts itself again as the process that serves, in a session of its own. Then it
//! waits for reports from that process: one JSON line each on that process's standard output. A report says that the
//! image is attached, or ready, or why that failed.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
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
use super::json::versioned;
use super::manager::ServiceManager;
use super::say;
use super::{Fetching, ImageArgs, explain, idle, open, progress};
use ocifs::mount::{self, Event, MetricsPlace, MountConfig, Prefetch, RunDir, SERVE, Shape};
use ocifs::oci::ImageConfig;
use ocifs::os::{gone, program, until};
use ocifs::profile::Label;

/// What is fetched ahead for the image's programs.
#[derive(Debug, Args)]
pub(super) struct ReplayArgs {
    /// What to fetch that nobody has asked for: only what lies ahead of readers, what earlier starts of the program read, or
    /// that and then the rest of the image [default: profile]
    #[arg(long, value_enum, value_name = "WHAT")]
    prefetch: Option<PrefetchMode>,
    /// Which of the image's programs will run: starts are learned and replayed by label
    #[arg(long, value_name = "LABEL", default_value = "default")]
    profile: Label,
}

/// Arguments of the commands that serve an image until it is unmounted.
#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    replay: ReplayArgs,
    /// Return only when the image can be read, or all of it is in the store (a disk always waits until it can be read)
    #[arg(long, value_enum, value_name = "STATE")]
    pub(super) wait: Option<Wait>,
    /// Give figures in the format of Prometheus: at HOST:PORT or unix:SOCKET to GET /metrics, or in a file, whose path has a
    /// slash
    #[arg(long, value_name = "ADDRESS|FILE", value_parser = MetricsPlace::parse)]
    metrics: Option<MetricsPlace>,
    /// Stay in the foreground until unmounted
    #[arg(short, long)]
    foreground: bool,
    /// Print one JSON object when the image is served
    #[arg(long)]
    json: bool,
}

impl ServeArgs {
    /// The arguments of a command that goes on with something else once the image is served.
    pub(super) fn behind(replay: ReplayArgs) -> Self {
        Self {
            replay,
            wait: Some(Wait::Ready),
            metrics: None,
            foreground: false,
            json: false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum Wait {
    /// The tree is there; reads fetch what they need.
    Ready,
    /// Nothing needs to be fetched any more.
    Complete,
}

/// What the process that serves tells the process that waits.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Report {
    Attached {
        digest: String,
        config: Box<ImageConfig>,
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
    /// A problem that the user should know. The image is served in spite of it.
    Warning {
        message: String,
    },
    Failed {
        message: String,
    },
}

/// Time that a process may take to end after a signal. A shorter time could cut a takedown short. A longer one would
/// keep the user waiting for a process that hangs.
const GRACE: Duration = Duration::from_secs(30);
/// Time between two checks whether the process has ended.
const LOOK: Duration = Duration::from_millis(10);

/// What to serve, and what to tell the user.
pub(super) struct ServeCommand<'a> {
    pub(super) config: &'a Config,
    pub(super) image: &'a ImageArgs,
    pub(super) args: &'a ServeArgs,
    /// The state to wait for.
    pub(super) wait: Option<Wait>,
    /// The place that names the registration.
    pub(super) place: &'a Path,
    /// What the message says if a signal ends the command: that nothing is mounted, or served.
    pub(super) after_signal: &'static str,
    /// When this process started.
    pub(super) started: Instant,
    /// What the JSON object says about the place.
    pub(super) describe: &'a dyn Fn(&mut serde_json::Value),
}

/// Whether this process was started to serve an image.
pub(super) fn is_serving() -> bool {
    std::env::var_os(SERVE).is_some()
}

impl ServeCommand<'_> {
    /// Serves the image in this process, or starts the process that serves it and waits for its reports. `shape`
    /// decides how the image is served. Returns the config of the image that another process serves now. Returns none
    /// after this process has served it.
    pub(super) fn run(
        &self,
        shape: impl AsyncFnOnce(&ocifs::layer::LayerContext) -> anyhow::Result<Shape>,
    ) -> anyhow::Result<Option<ImageConfig>> {
        let log = std::env::var_os(SERVE).map(PathBuf::from);
        if self.args.foreground || log.is_some() {
            return self.serve(log, shape).map(|()| None);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(self.start()).map(Some)
    }

    /// Starts the process that serves and waits for its reports. A signal to this process also ends that process, until
    /// the awaited state is reached.
    async fn start(&self) -> anyhow::Result<ImageConfig> {
        let entry = RunDir::open()?.entry(self.place);
        entry.check_free()?;
        let (mut log, log_path) = entry.create_log()?;
        let mut signals = signals().context("cannot handle signals")?;
        // The name decides what the arguments mean (`mount.ocifs`).
        let mut arguments = std::env::args_os();
        let mut child = program(std::env::current_exe()?)
            .arg0(arguments.next().unwrap_or_else(|| "ocifs".into()))
            .args(arguments)
            .env(SERVE, &log_path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.try_clone().context("cannot share the log file")?)
            .spawn()
            .context("cannot start the process that serves the image")?;
        let result = tokio::select! {
            result = self.follow(&mut child, &mut log) => result,
            signal = signals.next() => Err(Interrupted::new(signal, Some(self.after_signal.to_owned())).into()),
        };
        if result.is_err() {
            // The process takes down what it has attached. Its exit status adds nothing to its report.
            end(&mut child).await?;
            // A process that ended before it registered leaves its log. The log only repeats the error.
            gone(std::fs::remove_file(&log_path)).with_context(|| format!("{}", log_path.display()))?;
            let _turn = entry.turn().await?;
            if entry.record()?.is_none() {
                entry.remove(Some(log.as_fd()))?;
            }
        }
        result
    }

    /// Reads reports until the state that the user waits for is reached.
    async fn follow(&self, child: &mut Child, log: &mut File) -> anyhow::Result<ImageConfig> {
        let image = &self.image.image;
        let bar = progress::Bar::new(image, self.config.quiet);
        let pipe = child
            .stdout
            .take()
            .context("no pipe from the process that serves the image")?;
        let mut reports = BufReader::new(ChildStdout::from_std(pipe)?).lines();
        let mut attached = None;
        let mut ready_seconds = None;
        while let Some(line) = reports.next_line().await? {
            let reached = match serde_json::from_str(&line)? {
                Report::Attached {
                    digest,
                    config,
                    seconds,
                } => {
                    attached = Some((digest, config, seconds));
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
            if reached >= self.wait
                && let Some((digest, config, seconds)) = attached.take()
            {
                bar.finish();
                if self.args.json {
                    let mut object = serde_json::json!({
                        "image": &**image, "digest": digest,
                        "pid": child.id(), "mount_seconds": seconds, "ready_seconds": ready_seconds,
                    });
                    (self.describe)(&mut object);
                    say!("{}", versioned(object)?);
                }
                return Ok(*config);
            }
        }
        let status = child.wait()?;
        let mut said = Vec::new();
        log.rewind()?;
        log.read_to_end(&mut said)?;
        let said = String::from_utf8_lossy(&said);
        let last = said.lines().last().unwrap_or_default();
        bail!("the process that serves the image ended early ({status}): {last}")
    }

    /// Runs the process that serves until the attachment ends.
    fn serve(
        &self,
        log: Option<PathBuf>,
        shape: impl AsyncFnOnce(&ocifs::layer::LayerContext) -> anyhow::Result<Shape>,
    ) -> anyhow::Result<()> {
        if log.is_some() {
            // Leaves the terminal's session: Ctrl-C there is meant for the process that waits.
            nix::unistd::setsid().context("cannot start a session")?;
        }
        let reports = Arc::new(Reports {
            on: log.is_some(),
            manager: match log {
                Some(_) => ServiceManager::none(),
                None => ServiceManager::of_environment(),
            },
            wait: self.wait,
        });
        let fetching = Fetching::new()?;
        let serving = self.serve_async(log, shape, reports.clone());
        let result = fetching.runtime().block_on(serving);
        // Nothing is attached any more, so the kernel answers reads that still wait.
        fetching.abandon();
        if let Err(error) = &result {
            reports.send(&Report::Failed {
                message: explain(error),
            });
        }
        result
    }

    async fn serve_async(
        &self,
        log: Option<PathBuf>,
        shape: impl AsyncFnOnce(&ocifs::layer::LayerContext) -> anyhow::Result<Shape>,
        reports: Arc<Reports>,
    ) -> anyhow::Result<()> {
        let (config, args, image) = (self.config, self.args, &self.image.image);
        let mut context = open::context(config)?;
        match context.store.probe(0) {
            // The store is missing, which is reported already, or it is read-only on purpose.
            Err(error) if error.is_by_design() => {}
            Err(error) => context.health.store_failed(&error),
            Ok(()) => {}
        }
        if self.wait.is_none() {
            // The process goes on trying; a reader that waits gets an error when its time is up.
            context = context.patient();
        }
        let shape = shape(&context).await?;
        let prefetch = args
            .replay
            .prefetch
            .or(config.prefetch)
            .map(Prefetch::from)
            .unwrap_or_default();
        let named = open::named(config, self.image, &context.store).await?;
        let replayed = (prefetch != Prefetch::None).then(|| args.replay.profile.clone());
        let opened = named.open(&context, replayed).await;
        let opening = opened.map_err(|error| open::advised(error.into(), image))?;
        let unconfirmed = opening.unconfirmed.as_ref();
        if let Some(message) = unconfirmed.and_then(|u| open::warning(image, u)) {
            reports.send(&Report::Warning { message });
        }
        let preparation = opening.preparation.clone();
        let digest = preparation.resolved().manifest_document.digest.to_string();
        let image_config = Box::new(preparation.resolved().config.clone());
        if self.wait.is_some() {
            tokio::spawn(tick(preparation, reports.clone()));
        }
        let mount = MountConfig {
            image: image.to_string(),
            shape,
            require_ready: self.wait.is_some(),
            prefetch,
            metrics: args.metrics.clone(),
            label: args.replay.profile.clone(),
            timeout: config.timeout,
            started: self.started,
            parent: std::os::unix::process::parent_id(),
            log,
        };
        let complete = self.wait == Some(Wait::Complete);
        let health = context.health.clone();
        let warned = std::cell::Cell::new(false);
        let events = |event: Event| {
            let seconds = self.started.elapsed().as_secs_f64();
            if let Some(problem) = health.store_problem().filter(|_| !warned.replace(true)) {
                reports.send(&Report::Warning { message: problem });
            }
            match event {
                Event::Attached => {
                    reports.send(&Report::Attached {
                        digest: digest.clone(),
                        config: image_config.clone(),
                        seconds,
                    });
                }
                Event::Ready(image) => {
                    reports.send(&Report::Ready { seconds });
                    let served = Arc::downgrade(&image);
                    tokio::spawn(idle::give_back_when_idle(move || {
                        let status = served.upgrade()?.status();
                        Some(status.iter().map(|layer| layer.fetched + layer.served).sum())
                    }));
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
                Event::Ending => reports.manager.stopping("taking it down"),
            }
        };
        Ok(mount::serve(mount, context, opening, events).await?)
    }
}

/// Ends a process that failed to start serving. The process gets [`GRACE`] to take down what it has attached; then it
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
        None => bail!("process {id} that serves the image does not end, although it was killed"),
    }
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

/// Returns whether a line can be written to standard output without waiting. By poll(2) a pipe is writable if it has
/// room for `PIPE_BUF` bytes, which is more than any progress line.
fn has_room() -> bool {
    let stdout = std::io::stdout();
    let mut polled = [PollFd::new(stdout.as_fd(), PollFlags::POLLOUT)];
    // If poll fails, the write shows whether there is room.
    poll(&mut polled, PollTimeout::ZERO).map_or(true, |ready| ready > 0)
}

/// Writes report lines to standard output for the process that waits. Failures that this process does not read go to
/// the log, and so do all warnings. In the foreground, the service manager hears of them.
struct Reports {
    on: bool,
    manager: ServiceManager,
    /// The state in which a service counts as ready.
    wait: Option<Wait>,
}

impl Reports {
    /// Sends a report and returns whether a process reads reports. If the pipe has no room for a progress report,
    /// leaves the report out. The process that waits may be stopped, and this process must not wait for it.
    fn send(&self, report: &Report) -> bool {
        if self.on && matches!(report, Report::Progress { .. }) && !has_room() {
            return true;
        }
        self.tell_manager(report);
        let line = serde_json::to_string(report).expect("a report has only strings and numbers");
        let heard = self.on && writeln!(std::io::stdout(), "{line}").is_ok();
        match report {
            Report::Failed { message } if !heard => tracing::error!("{message}"),
            Report::Warning { message } => tracing::warn!("{message}"),
            _ => {}
        }
        heard
    }

    fn tell_manager(&self, report: &Report) {
        let (reached, status) = match report {
            Report::Attached { .. } => (None, "the image is being prepared"),
            Report::Ready { .. } => (Some(Wait::Ready), "the image can be read"),
            Report::Complete => (Some(Wait::Complete), "all of the image is in the store"),
            Report::Failed { message } => return self.manager.status(false, message),
            Report::Progress { .. } | Report::Warning { .. } => return,
        };
        self.manager.status(reached >= self.wait, status);
    }
}
