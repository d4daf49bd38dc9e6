//! `ocifs run`: runs a program of an image in a container, with an OCI runtime or bubblewrap.
//!
//! The image is mounted, and a runtime runs its program in the foreground. Signals go on to the program, and its exit status
//! becomes that of this command. In the end the mount is removed.
//!
//! An OCI runtime gets a bundle around the mount, and passes on the signals that it gets. Bubblewrap gets a command line. It
//! passes on no signal, but says which process the program is.
//!
//! Without root, the command first makes a user namespace of its own, as the container needs one anyway. All of it happens
//! there, so the root can be changed, and no helper mounts it.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use futures::future::select_all;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe::Receiver;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use super::background::is_serving;
use super::config::Config;
use super::container::{Bundle, ContainerArgs, installed, remove};
use super::mounts::take_down;
use super::{ImageArgs, explain, namespace};
use ocifs::mount::{RunDir, is_ignored, is_system_root};
use ocifs::oci::ImageConfig;

/// Runtimes that are looked for if root starts the container, the preferred one first.
const RUNTIMES: [&str; 5] = ["crun", "runc", "youki", GVISOR, BUBBLEWRAP];
/// The same for others. Under an OCI runtime without root, a program cannot be another user than root.
const ROOTLESS_RUNTIMES: [&str; 4] = [BUBBLEWRAP, "crun", "runc", "youki"];
/// The program of bubblewrap.
const BUBBLEWRAP: &str = "bwrap";
/// The runtime of gVisor.
const GVISOR: &str = "runsc";
/// Directory that a machine has on which both versions of cgroups are mounted.
const HYBRID_CGROUPS: &str = "/sys/fs/cgroup/unified";
/// Most bytes that bubblewrap says of the process it has started.
const MOST_INFO: u64 = 4096;
/// Time that bubblewrap may take to start the process. It says which one it is before it prepares anything else.
const START: Duration = Duration::from_secs(30);
/// Signals that go on to the program.
const FORWARDED: [Signal; 6] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// Arguments of `run`.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Arguments in place of the image's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
    #[command(flatten)]
    container: ContainerArgs,
    /// What runs the container: an OCI runtime, or bubblewrap (bwrap), which needs no root [default: the first of crun, runc,
    /// youki, runsc and bwrap that is installed; without root, bwrap comes first, and runsc is not looked for]
    #[arg(long, value_name = "PROGRAM")]
    runtime: Option<PathBuf>,
}

/// Makes the user namespace of a container that is not started by root. This comes before the process has threads.
pub(super) fn settle() -> anyhow::Result<()> {
    if !geteuid().is_root() {
        namespace::enter()?;
    }
    Ok(())
}

pub(super) fn run(config: &Config, args: RunArgs, started: Instant) -> anyhow::Result<ExitCode> {
    let runtime = find_runtime(args.runtime.as_deref())?;
    // The process that serves finds the bundle of the process that started it.
    let id = match is_serving() {
        true => std::os::unix::process::parent_id(),
        false => std::process::id(),
    };
    let directory = RunDir::open()?.bundle_dir(id);
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut forwarding = match is_serving() {
        true => Vec::new(),
        false => tokio.block_on(async { forwarded() })?,
    };
    let served = Bundle::serve(
        config,
        &args.image,
        args.container,
        args.command,
        directory.clone(),
        started,
    );
    let (mut bundle, image) = match served {
        Ok(Some(served)) => served,
        Ok(None) => return Ok(ExitCode::SUCCESS),
        Err(error) => {
            if !is_serving() {
                remove(&directory)?;
            }
            return Err(error);
        }
    };
    let ran = command(&runtime, &mut bundle, &image, &format!("ocifs-{id}"))
        .and_then(|running| tokio.block_on(running.execute(&runtime, &mut forwarding)));
    let ended = take_down(&bundle.rootfs(), false).and_then(|_| remove(bundle.directory()));
    match (ran, ended) {
        (Ok(status), Ok(())) => Ok(exit_code(status)),
        (Ok(status), Err(error)) => {
            eprintln!("ocifs: {}", explain(&error));
            Ok(exit_code(status))
        }
        (Err(error), _) => Err(error),
    }
}

/// Returns the runtime to use: the one that is named, or the first that is installed.
fn find_runtime(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(named) = named {
        return Ok(named.to_owned());
    }
    let mut runtimes = match is_system_root() {
        true => RUNTIMES.to_vec(),
        false => ROOTLESS_RUNTIMES.to_vec(),
    };
    // crun refuses to run where both versions of cgroups are mounted.
    if Path::new(HYBRID_CGROUPS).is_dir() {
        runtimes.sort_by_key(|name| *name == "crun");
    }
    let Some(found) = installed(runtimes) else {
        bail!(
            "no OCI runtime is installed: install crun or runc, or bubblewrap if you are not root, or name one with --runtime"
        )
    };
    Ok(found)
}

/// Begins to catch the signals that go on to the program. Those that come before the program runs are kept for it. SIGHUP stays
/// ignored if this process was started to ignore it, as nohup(1) asks for; the runtime ignores it then too.
fn forwarded() -> io::Result<Vec<(Signal, tokio::signal::unix::Signal)>> {
    let wanted = FORWARDED
        .into_iter()
        .filter(|&number| number != Signal::SIGHUP || !is_ignored(number as i32));
    let caught = wanted.map(|number| Ok((number, signal(SignalKind::from_raw(number as i32))?)));
    caught.collect()
}

/// A container that is about to run.
struct Starting {
    command: Command,
    /// Where bubblewrap says which process the program is, and the end that it gets.
    info: Option<(OwnedFd, OwnedFd)>,
}

/// Returns what runs the container.
fn command(runtime: &Path, bundle: &mut Bundle, image: &ImageConfig, id: &str) -> anyhow::Result<Starting> {
    let mut command = Command::new(runtime);
    if runtime.file_name() != Some(BUBBLEWRAP.as_ref()) {
        bundle.write(image)?;
        // Other runtimes use the network namespace that the bundle names. gVisor makes a network of its own in it, unless
        // it is told to use the host's.
        if runtime.file_name() == Some(GVISOR.as_ref()) && bundle.is_on_host_network() {
            command.arg("--network=host");
        }
        command
            .args(["run", "--bundle"])
            .args([bundle.directory(), Path::new(id)]);
        return Ok(Starting { command, info: None });
    }
    // Only this process is there to start others, and it starts no other before it closes the end that others get.
    let (from, to) = nix::unistd::pipe().context("cannot make a pipe")?;
    fcntl(&from, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    command.args(["--info-fd", &to.as_raw_fd().to_string()]);
    command.args(bundle.bubblewrap(image)?);
    // If bubblewrap ends, so does the program.
    command.kill_on_drop(true);
    let info = Some((from, to));
    Ok(Starting { command, info })
}

impl Starting {
    /// Runs the container in the foreground. Returns how the runtime ended.
    async fn execute(
        mut self,
        runtime: &Path,
        forwarding: &mut [(Signal, tokio::signal::unix::Signal)],
    ) -> anyhow::Result<ExitStatus> {
        let started = self.command.spawn();
        let mut child = started.with_context(|| format!("cannot run {}", runtime.display()))?;
        let mut pid = child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
        if let Some((from, to)) = self.info {
            drop(to);
            let said = Receiver::from_owned_fd(from)?;
            // There is nothing to read if bubblewrap could not start the program. It says why, and ends.
            let said = timeout(START, program(said)).await;
            pid = said.context("bubblewrap does not say what it has started")??.or(pid);
        }
        loop {
            let all = forwarding.iter_mut().map(|(number, signal)| {
                Box::pin(async move {
                    signal.recv().await;
                    *number
                })
            });
            tokio::select! {
                status = child.wait() => return Ok(status?),
                (number, ..) = select_all(all) => {
                    // The program may have ended just now.
                    if let Some(pid) = pid {
                        let _ = kill(pid, number);
                    }
                }
            }
        }
    }
}

/// Reads from bubblewrap which process the program is.
async fn program(from: Receiver) -> anyhow::Result<Option<Pid>> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Info {
        child_pid: i32,
    }
    let mut said = Vec::new();
    from.take(MOST_INFO).read_to_end(&mut said).await?;
    if said.is_empty() {
        return Ok(None);
    }
    let info: Info = serde_json::from_slice(&said).context("bubblewrap says unintelligibly what it has started")?;
    Ok(Some(Pid::from_raw(info.child_pid)))
}

/// Returns the exit status that shells show for a program that ended like this.
fn exit_code(status: ExitStatus) -> ExitCode {
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 1,
    };
    u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)
}
