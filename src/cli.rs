//! The command line. It turns arguments into a resolved configuration and calls the library with it. It is the only
//! module that prints.
//!
//! Data goes to standard output, everything else to standard error. The exit status is 0 for success, 1 for failure
//! and 2 for wrong arguments. If a signal ended the command, the exit status is 128 plus the number of the signal.

mod allocator;
mod background;
mod bundle;
mod cache;
mod config;
mod container;
mod disk;
mod export;
mod fetching;
mod files;
mod generated;
mod helper;
mod idle;
mod image_name;
mod images;
mod index;
mod inspect;
mod json;
mod log;
mod manager;
mod mount;
mod mounts;
mod namespace;
mod open;
mod profile;
mod progress;
mod pull;
mod run;
#[cfg(feature = "snapshotter")]
mod snapshotter;
mod suggest;
mod text;
mod units;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use config::Globals;
use fetching::{Fetching, Interrupted};
use image_name::ImageName;
use units::Size;

use ocifs::image::Confirm;

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
  oci-archive:FILE[:REF]                                               in a tar of an OCI layout
  docker-archive:FILE[:REF]                                            in a `docker save` archive

Registry logins come from DOCKER_AUTH_CONFIG, docker's config.json (with credential helpers) and containers' auth.json.
Mirrors and certificates of registries come from containerd's hosts.toml, containers' registries.conf and docker's
certs.d; see --hosts-from.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Mount an image on a directory
    Mount(mount::MountArgs),
    /// Serve an image as a disk for virtual machines
    ///
    /// The disk is read-only and has one EROFS file system. At least one of --file, --nbd and --vhost-user-blk is needed. The
    /// command returns when the disk can be read. `ocifs umount` with the directory or a socket ends it.
    Disk(disk::DiskArgs),
    /// Run a program of an image in a container
    ///
    /// The image is mounted, and an installed OCI runtime or bubblewrap runs its program or the given one. The program's exit
    /// status is that of the command. In the end everything is removed. No root is needed.
    Run(run::RunArgs),
    /// Make a bundle for an OCI runtime, whose root is a mount of the image
    ///
    /// To run it: `runc run --bundle DIR NAME`; crun, youki and runsc can do so too. `ocifs umount DIR/rootfs` ends the
    /// mount.
    Bundle(bundle::BundleArgs),
    /// Serve snapshots to containerd, so that its containers start before their images are fetched
    ///
    /// containerd uses it as a proxy plugin. Images are served by processes of their own, so this one may end at any time.
    #[cfg(feature = "snapshotter")]
    Snapshotter(snapshotter::SnapshotterArgs),
    /// Take a mount or a disk down
    #[command(visible_alias = "unmount")]
    Umount(mounts::UmountArgs),
    /// List the mounts and disks of this user
    List(mounts::ListArgs),
    /// Show how a mount or a disk is doing: state, and per layer what was fetched
    Status(mounts::StatusArgs),
    /// Show manifest, config and layers of an image without fetching any layer
    Inspect(inspect::InspectArgs),
    /// List a directory of an image without mounting it
    Ls(files::LsArgs),
    /// Write a file of an image to standard output
    Cat(files::CatArgs),
    /// Write the merged file system of an image as one archive
    Export(export::ExportArgs),
    /// List the images in the store, and how much of each is there
    ///
    /// SIZE is the size of the compressed layers. LOCAL is the part of it that needs no fetch. ON DISK is what the store has of the
    /// image: indexes, the tree, and data. Data is kept unpacked, as files have it, so it takes more than it took to fetch. ALONE
    /// is the part of it that no other image uses, which `ocifs cache rm` frees.
    Images(images::ImagesArgs),
    /// Fetch all of an image into the store
    Pull(pull::PullArgs),
    /// See and exchange what is known of the starts of an image's programs
    #[command(subcommand)]
    Profile(profile::ProfileCommand),
    /// Make, publish and check indexes, so that other hosts need not stream an image's layers
    #[command(subcommand)]
    Index(index::IndexCommand),
    /// Look after the store
    #[command(subcommand)]
    Cache(cache::CacheCommand),
    /// Write a script with which a shell completes this command's words
    ///
    /// For bash: `source <(ocifs completions bash)`. The packages install the scripts where the shells look for them.
    Completions(generated::CompletionsArgs),
    /// Write the manual pages into a directory
    #[command(hide = true)]
    Man(generated::ManArgs),
}

/// The image a command is about.
#[derive(Debug, Clone, Args)]
struct ImageArgs {
    /// Image reference: NAME[:TAG][@DIGEST], oci:DIR[:REF], oci-archive:FILE[:REF] or docker-archive:FILE[:REF] (see
    /// `ocifs --help`)
    image: ImageName,
    /// Platform of the image, as OS/ARCH[/VARIANT]; one that the image does not have is an error [default: this machine's]
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// When to ask the registry what a tag means: always, if the store does not know it, or never [default: always, and what
    /// it meant the last time if the registry cannot be reached]
    #[arg(long, value_enum, value_name = "WHEN")]
    pull: Option<PullWhen>,
    /// Only the lowest layers of the image, this many
    #[arg(long, value_name = "COUNT")]
    layers: Option<usize>,
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

/// Help heading of the options that every command has.
const GLOBAL: &str = "Global options";

/// The store and its limit, as given.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = GLOBAL)]
struct StoreArgs {
    /// Directory where indexes, trees and cached data are kept
    #[arg(long, global = true, env = "OCIFS_STORE", hide_env_values = true, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Limit of cached data on disk; least recently used data goes first [default: 10GiB]
    #[arg(long, global = true, value_name = "SIZE")]
    cache_size: Option<Size>,
}

/// Runs the whole program and returns its exit status.
pub fn main() -> ExitCode {
    let started = Instant::now();
    allocator::settle();
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if helper::is_called(&arguments) {
        return helper::main(&arguments, started);
    }
    match run(Cli::parse_from(arguments), started) {
        Ok(status) => status,
        // The reader of standard output closed it, as `head` does. The user needs no message.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ocifs: {}", explain(&error));
            let interrupted = error.downcast_ref::<Interrupted>();
            interrupted.map_or(ExitCode::FAILURE, |interrupted| interrupted.exit_status().into())
        }
    }
}

/// Returns the error and its causes as one line. A cause whose text the line already contains is left out: many
/// messages quote their cause.
fn explain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Writes a line to standard output, escaped for a terminal. Returns from the calling function with an error if
/// standard output is closed.
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

/// Returns whether the error means that standard output was closed. The socket of a mount can break too; that error
/// is not counted.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    if error.is::<ocifs::mount::TakedownError>() {
        return false;
    }
    let mut causes = error.chain().filter_map(|c| c.downcast_ref::<std::io::Error>());
    causes.any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

fn run(cli: Cli, started: Instant) -> anyhow::Result<ExitCode> {
    // These commands need no configuration. A bad configuration file must not stop them.
    let command = match cli.command {
        Command::Umount(args) => return succeeded(mounts::umount(args)),
        Command::List(args) => return succeeded(mounts::list(args)),
        Command::Status(args) => return succeeded(mounts::status(args)),
        Command::Completions(args) => return succeeded(generated::completions(Cli::command(), &args)),
        Command::Man(args) => return succeeded(generated::man(Cli::command(), &args)),
        command => command,
    };
    if let Command::Run(_) = &command {
        run::settle()?;
    }
    let config = config::Config::resolve(cli.globals)?;
    let _folded = log::init(&config);
    raise_file_limit();
    let command = match command {
        Command::Mount(args) => return succeeded(mount::run(&config, args, started)),
        Command::Run(args) => return run::run(&config, args, started),
        Command::Bundle(args) => return succeeded(bundle::run(&config, args, started)),
        #[cfg(feature = "snapshotter")]
        Command::Snapshotter(args) => return succeeded(snapshotter::run(&config, args)),
        Command::Disk(args) => return succeeded(disk::run(&config, args, started)),
        Command::Cache(command) => return succeeded(cache::run(&config, command)),
        Command::Images(args) => return succeeded(images::images(&config, &args)),
        command => command,
    };
    let fetching = Fetching::new()?;
    let result = match command {
        Command::Inspect(args) => inspect::run(&config, &fetching, args),
        Command::Ls(args) => files::ls(&config, &fetching, args),
        Command::Cat(args) => files::cat(&config, &fetching, args),
        Command::Export(args) => export::run(&config, &fetching, args),
        Command::Pull(args) => pull::run(&config, &fetching, args),
        Command::Profile(command) => profile::run(&config, &fetching, command),
        Command::Index(command) => index::run(&config, &fetching, command),
        _ => unreachable!("dealt with above"),
    };
    succeeded(fetching.end(result))
}

fn succeeded(result: anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    result.map(|()| ExitCode::SUCCESS)
}

/// Raises the limit of open files to the most that this user may have. With a lower limit, the devices of layers are
/// closed and opened again more often.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| match soft < hard {
        true => setrlimit(Resource::RLIMIT_NOFILE, hard, hard),
        false => Ok(()),
    });
    if let Err(error) = raised {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}
