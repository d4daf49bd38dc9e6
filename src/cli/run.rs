//! `ocifs run`: runs a program of an image in a container, with an OCI runtime that is installed.
//!
//! The image is mounted, a bundle is made around the mount, and the runtime runs it in the foreground. Signals go on to the
//! runtime, and its exit status becomes that of this command. In the end the mount and the bundle are removed.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus};
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::Args;
use futures::future::select_all;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

use super::background::is_serving;
use super::config::Config;
use super::container::{Bundle, ContainerArgs, remove};
use super::mounts::take_down;
use super::{ImageArgs, explain};
use ocifs::mount::{RunDir, is_ignored};

/// Runtimes that are looked for, the preferred one first.
const RUNTIMES: [&str; 3] = ["crun", "runc", "youki"];
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
    /// OCI runtime that runs the container [default: the first of crun, runc and youki that is installed]
    #[arg(long, value_name = "PROGRAM")]
    runtime: Option<PathBuf>,
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
    let ran = bundle
        .write(&image)
        .and_then(|()| tokio.block_on(execute(&runtime, &bundle, &format!("ocifs-{id}"), &mut forwarding)));
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
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories: Vec<PathBuf> = std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .collect();
    let mut programs = RUNTIMES
        .iter()
        .flat_map(|name| directories.iter().map(move |directory| directory.join(name)));
    let Some(found) = programs.find(|program| program.is_file()) else {
        bail!("no OCI runtime is installed: install crun or runc, or name one with --runtime")
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

/// Runs a bundle in the foreground. Returns how the runtime ended.
async fn execute(
    runtime: &Path,
    bundle: &Bundle,
    id: &str,
    forwarding: &mut [(Signal, tokio::signal::unix::Signal)],
) -> anyhow::Result<ExitStatus> {
    let mut child = Command::new(runtime)
        .arg("run")
        .arg("--bundle")
        .args([bundle.directory(), Path::new(id)])
        .spawn()
        .with_context(|| format!("cannot run {}", runtime.display()))?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
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
                // The runtime may have ended just now.
                if let Some(pid) = pid {
                    let _ = kill(pid, number);
                }
            }
        }
    }
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
