//! The command line: arguments become a resolved configuration, then calls. The only module that prints.
//!
//! Data goes to standard output, everything else to standard error. Exit status: 0 done, 1 failed, 2 wrong arguments.

mod cache;
mod config;
mod export;
mod files;
mod image_name;
mod inspect;
mod log;
mod mount;
mod mounts;
mod open;
mod profile;
mod progress;
mod pull;
mod text;
mod units;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, Parser, Subcommand, ValueEnum};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use config::Globals;
use image_name::ImageName;
use units::Size;

use crate::image::Confirm;

/// Mount an OCI image as a root file system and fetch only the bytes that are read.
#[derive(Debug, Parser)]
#[command(name = "ocifs", version, max_term_width = 110, after_long_help = IMAGE_HELP)]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

const IMAGE_HELP: &str = "\
IMAGE is one of
  alpine:latest, ghcr.io/org/app:1.2, localhost:5000/app@sha256:...   in a registry
  oci:DIR[:REF]                                                        in an OCI layout directory
  docker-archive:FILE[:REF]                                            in a `docker save` archive

Registry logins come from docker's config.json (with credential helpers) and containers' auth.json.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Mount an image on a directory
    Mount(mount::MountArgs),
    /// Take a mount down
    #[command(visible_alias = "unmount")]
    Umount(mounts::UmountArgs),
    /// List the mounts of this user
    List(mounts::ListArgs),
    /// Show how a mount is doing: state, and per layer what was fetched
    Status(mounts::StatusArgs),
    /// Show manifest, config and layers of an image without fetching any layer
    Inspect(inspect::InspectArgs),
    /// List a directory of an image without mounting it
    Ls(files::LsArgs),
    /// Write a file of an image to standard output
    Cat(files::CatArgs),
    /// Write the merged file system of an image as one archive
    Export(export::ExportArgs),
    /// Fetch all of an image into the store
    Pull(pull::PullArgs),
    /// See and exchange what is known of the starts of an image's programs
    #[command(subcommand)]
    Profile(profile::ProfileCommand),
    /// Look after the store
    #[command(subcommand)]
    Cache(cache::CacheCommand),
}

/// The image a command is about.
#[derive(Debug, Clone, Args)]
struct ImageArgs {
    /// Image reference: NAME[:TAG][@DIGEST], oci:DIR[:REF] or docker-archive:FILE[:REF] (see `ocifs --help`)
    image: ImageName,
    /// Platform to choose from an image index, as OS/ARCH[/VARIANT] [default: this machine's]
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// When to ask the registry what a tag means: always, if the store does not know it, or never [default: always, and what
    /// it meant the last time if the registry cannot be reached]
    #[arg(long, value_enum, value_name = "WHEN")]
    pull: Option<PullWhen>,
}

/// [`Confirm`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PullWhen {
    /// Each time; fail without an answer
    Always,
    /// Only for a tag that the store does not know
    Missing,
    /// Never; fail for what the store does not know
    Never,
}

impl From<PullWhen> for Confirm {
    fn from(when: PullWhen) -> Self {
        match when {
            PullWhen::Always => Self::Always,
            PullWhen::Missing => Self::IfUnknown,
            PullWhen::Never => Self::Never,
        }
    }
}

/// The store and its limit, as given.
#[derive(Debug, Clone, Args)]
struct StoreArgs {
    /// Directory where indexes, trees and cached data are kept
    #[arg(long, global = true, env = "OCIFS_STORE", value_name = "DIR")]
    store: Option<PathBuf>,
    /// Limit of cached data on disk; least recently used data goes first [default: 10GiB]
    #[arg(long, global = true, value_name = "SIZE")]
    cache_size: Option<Size>,
}

/// Runs the command line; the whole program.
pub fn main() -> ExitCode {
    let started = Instant::now();
    let cli = Cli::parse();
    match run(cli, started) {
        Ok(()) => ExitCode::SUCCESS,
        // Somebody closed our standard output, as `head` does: no reason to complain.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ocifs: {}", explain(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes in one line; many messages quote their cause already, which is enough once.
fn explain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Writes a line to standard output, without what would control a terminal; ends the function with an error if that is closed.
macro_rules! say {
    ($($arguments:tt)*) => {
        $crate::cli::write_line(format_args!($($arguments)*))?
    };
}
use say;

fn write_line(line: std::fmt::Arguments<'_>) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    if text::on_terminal() {
        return writeln!(out, "{}", text::harmless(&line.to_string()));
    }
    writeln!(out, "{line}")
}

/// Whether our standard output was closed. The socket of a mount can break as well, which is another matter.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    if error.is::<crate::mount::TakedownError>() {
        return false;
    }
    let mut causes = error.chain().filter_map(|c| c.downcast_ref::<std::io::Error>());
    causes.any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

fn run(cli: Cli, started: Instant) -> anyhow::Result<()> {
    // These ask other processes and need nothing of what can be configured, so a bad file does not stand in their way.
    let command = match cli.command {
        Command::Umount(args) => return mounts::umount(args),
        Command::List(args) => return mounts::list(args),
        Command::Status(args) => return mounts::status(args),
        command => command,
    };
    let config = config::Config::resolve(cli.globals)?;
    let _folded = log::init(&config);
    raise_file_limit();
    match command {
        Command::Umount(_) | Command::List(_) | Command::Status(_) => unreachable!("dealt with above"),
        Command::Mount(args) => mount::run(&config, args, started),
        Command::Inspect(args) => inspect::run(&config, args),
        Command::Ls(args) => files::ls(&config, args),
        Command::Cat(args) => files::cat(&config, args),
        Command::Export(args) => export::run(&config, args),
        Command::Pull(args) => pull::run(&config, args),
        Command::Profile(command) => profile::run(&config, command),
        Command::Cache(command) => cache::run(&config, command),
    }
}

/// Allows as many open files as this user may have. With fewer, devices of layers are closed and opened again.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| match soft < hard {
        true => setrlimit(Resource::RLIMIT_NOFILE, hard, hard),
        false => Ok(()),
    });
    if let Err(error) = raised {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// The runtime that fetches. Decoding is the only real work done on it, so it has as many workers as there are cores, at
/// least two: one waits for a decode while the other keeps the network busy.
fn runtime() -> anyhow::Result<Fetching> {
    let workers = std::thread::available_parallelism().map_or(2, |n| n.get().max(2));
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder
        .worker_threads(workers)
        .thread_name("ocifs")
        .enable_all()
        .build()?;
    Ok(Fetching(Some(runtime)))
}

/// A runtime whose end is waited for, so that what is being written gets to the disk, but not for long: a read from a dead
/// disk or a lock that a stopped process holds must not keep a failed command from ending.
struct Fetching(Option<tokio::runtime::Runtime>);

impl Fetching {
    const GRACE: std::time::Duration = std::time::Duration::from_secs(2);

    /// Ends without waiting for anything.
    fn abandon(mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl std::ops::Deref for Fetching {
    type Target = tokio::runtime::Runtime;

    fn deref(&self) -> &Self::Target {
        self.0.as_ref().expect("there until it is dropped")
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_timeout(Self::GRACE);
        }
    }
}
