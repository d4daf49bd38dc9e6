//! What `ocifs bundle` and `ocifs run` have in common: a directory with the root of an image and the configuration of a
//! container (runtime-spec bundle.md).

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Component, Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use nix::unistd::{getegid, geteuid};
use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, openat2};
use rustix::io::Errno;

use super::ImageArgs;
use super::background::{ReplayArgs, ServeArgs, ServeCommand};
use super::config::Config;
use super::mount::private_upper;
use ocifs::bundle::{ContainerConfig, Network};
use ocifs::mount::{DirectoryConfig, FuseOptions, Shape, Via, is_system_root};
use ocifs::oci::ImageConfig;
use ocifs::os::gone;

/// Name of the root's directory in a bundle.
const ROOTFS: &str = "rootfs";
/// Name of the configuration in a bundle.
const CONFIG: &str = "config.json";
/// Most bytes of the image's files that name users and groups.
const MOST_NAMES: u64 = 4 << 20;
/// Files of the host without which programs find nobody on the host's network.
const NETWORK_FILES: [&str; 2] = ["/etc/resolv.conf", "/etc/hosts"];

/// What to run, and how it differs from what the image says.
#[derive(Debug, Args)]
pub(super) struct ContainerArgs {
    /// Program in place of the image's entry point
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Set a variable in the program's environment: NAME=VALUE, or NAME for the value it has here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// User and group of the program, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Directory in which the program runs
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Give the program a terminal
    #[arg(short, long)]
    tty: bool,
    /// Let nobody change the root; otherwise, changes are thrown away at the end
    #[arg(long)]
    read_only: bool,
    /// Network that the program sees
    #[arg(long, value_enum, value_name = "NETWORK", default_value = "host")]
    network: NetworkArg,
    /// Name of the host that the program sees
    #[arg(long, value_name = "NAME", default_value = "ocifs")]
    hostname: String,
    #[command(flatten)]
    replay: ReplayArgs,
}

/// [`Network`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum NetworkArg {
    /// That of the host
    Host,
    /// None but a loopback device of its own
    None,
}

/// A bundle that is being made.
pub(super) struct Bundle {
    directory: PathBuf,
    container: ContainerConfig,
}

impl Bundle {
    /// Makes the directories of a bundle, and serves the image's root there. Returns the bundle and the image's config once
    /// another process serves it. Returns none after this process has served it.
    pub(super) fn serve(
        config: &Config,
        image: &ImageArgs,
        args: ContainerArgs,
        command: Vec<String>,
        directory: PathBuf,
        started: Instant,
    ) -> anyhow::Result<Option<(Self, ImageConfig)>> {
        let rootfs = directory.join(ROOTFS);
        let shown = || rootfs.display().to_string();
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&rootfs)
            .with_context(shown)?;
        let rootless = !is_system_root();
        let read_only = args.read_only || !can_write();
        let container = ContainerConfig {
            command,
            entrypoint: args.entrypoint,
            env: args.env.into_iter().filter_map(with_value).collect(),
            user: args.user,
            workdir: args.workdir,
            terminal: args.tty,
            read_only,
            network: match args.network {
                NetworkArg::Host => Network::Host,
                NetworkArg::None => Network::None,
            },
            hostname: args.hostname,
            rootless: rootless.then(|| (geteuid().as_raw(), getegid().as_raw())),
            volumes: Vec::new(),
            shared: Vec::new(),
        };
        let serve = ServeArgs::behind(args.replay);
        let served = ServeCommand {
            config,
            image,
            args: &serve,
            wait: serve.wait,
            place: &rootfs,
            after_signal: "nothing is mounted",
            started,
            describe: &|_| (),
        }
        .run(async |context| {
            let upper = match read_only {
                true => None,
                false => Some(private_upper(context, &rootfs)?),
            };
            Ok(Shape::Directory(DirectoryConfig {
                mountpoint: rootfs.clone(),
                options: FuseOptions::defaults(geteuid().is_root()),
                upper,
                via: Via::Auto,
            }))
        })?;
        Ok(served.map(|image| {
            let bundle = Self { directory, container };
            (bundle, image)
        }))
    }

    /// Returns whether the program sees the network of the host.
    pub(super) fn is_on_host_network(&self) -> bool {
        self.container.network == Network::Host
    }

    /// Directory of the root.
    pub(super) fn rootfs(&self) -> PathBuf {
        self.directory.join(ROOTFS)
    }

    /// Directory of the bundle.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes the configuration, and makes the directory in which the program runs.
    pub(super) fn write(&mut self, image: &ImageConfig) -> anyhow::Result<()> {
        let names = self.prepare(image)?;
        let spec = self.container.spec(image, &names.passwd, &names.group)?;
        let path = self.directory.join(CONFIG);
        let write = || {
            let mut file = File::create(&path)?;
            serde_json::to_writer_pretty(&mut file, &spec)?;
            file.write_all(b"\n")
        };
        write().with_context(|| path.display().to_string())
    }

    /// Makes the directory in which the program runs. Returns the arguments with which bubblewrap runs it.
    pub(super) fn bubblewrap(&mut self, image: &ImageConfig) -> anyhow::Result<Vec<OsString>> {
        let names = self.prepare(image)?;
        let container = &self.container;
        Ok(container.bubblewrap(image, &names.passwd, &names.group, &self.rootfs())?)
    }

    /// Looks into the root for what the container depends on, and makes the directory in which the program runs.
    fn prepare(&mut self, image: &ImageConfig) -> anyhow::Result<Names> {
        let rootfs = File::open(self.rootfs()).with_context(|| self.rootfs().display().to_string())?;
        let names = |path: &str| read(rootfs.as_fd(), path).with_context(|| format!("{path} of the image"));
        let (passwd, group) = (names("/etc/passwd")?, names("/etc/group")?);
        let container = &mut self.container;
        for volume in image.config.volumes.keys() {
            // What the image has in a volume stays visible.
            if is_empty(rootfs.as_fd(), volume).with_context(|| format!("{volume} of the image"))? {
                container.volumes.push(volume.clone());
            }
        }
        if container.network == Network::Host {
            let shared = NETWORK_FILES.into_iter().map(PathBuf::from);
            // In a root that is only read, a file that is missing cannot be made to mount on.
            let has_place = |path: &Path| !container.read_only || open(rootfs.as_fd(), path, OFlags::PATH).is_ok();
            let shared: Vec<_> = shared.filter(|path| path.exists() && has_place(path)).collect();
            container.shared.extend(shared);
        }
        if !container.read_only {
            let workdir = container.workdir(image);
            make_directories(rootfs.as_fd(), &workdir)
                .with_context(|| format!("cannot make {} in the image's root", workdir.display()))?;
        }
        Ok(Names { passwd, group })
    }
}

/// The image's files that name users and groups.
struct Names {
    passwd: Vec<u8>,
    group: Vec<u8>,
}

/// Whether this process can mount what takes changes: as root, also of a user namespace, or with fuse-overlayfs.
fn can_write() -> bool {
    geteuid().is_root() || installed(["fuse-overlayfs"]).is_some()
}

/// Returns the first of these programs that is installed.
pub(super) fn installed<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories: Vec<PathBuf> = std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .collect();
    let mut programs = names
        .into_iter()
        .flat_map(|name| directories.iter().map(move |directory| directory.join(name)));
    programs.find(|program| program.is_file())
}

/// Removes the files and directories of a bundle whose root is not mounted any more. It removes nothing else, so a root that
/// is still there is left alone.
pub(super) fn remove(directory: &Path) -> anyhow::Result<()> {
    let remove = || {
        gone(std::fs::remove_file(directory.join(CONFIG)))?;
        gone(std::fs::remove_dir(directory.join(ROOTFS)))?;
        gone(std::fs::remove_dir(directory))
    };
    remove().with_context(|| format!("cannot remove {}", directory.display()))
}

/// Returns `NAME=VALUE`. A variable that is not set here is left out.
fn with_value(variable: String) -> Option<String> {
    match variable.contains('=') {
        true => Some(variable),
        false => std::env::var(&variable).ok().map(|value| format!("{variable}={value}")),
    }
}

/// Opens a path within a root. Links lead nowhere else, as in a chroot.
fn open(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<File, Errno> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let opened = openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve);
    opened.map(File::from)
}

/// Reads a file that names users or groups. A file that does not exist is empty.
fn read(root: BorrowedFd<'_>, path: &str) -> io::Result<Vec<u8>> {
    let mut names = Vec::new();
    // Without waiting: it may be a FIFO.
    match open(root, path.as_ref(), OFlags::RDONLY | OFlags::NONBLOCK) {
        Ok(file) if file.metadata()?.is_file() => {
            file.take(MOST_NAMES + 1).read_to_end(&mut names)?;
            if names.len() as u64 > MOST_NAMES {
                return Err(io::Error::other(format!("it is longer than {MOST_NAMES} bytes")));
            }
        }
        Ok(_) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(names)
}

/// Whether the image has nothing at `path`, or an empty directory.
fn is_empty(root: BorrowedFd<'_>, path: &str) -> io::Result<bool> {
    match open(root, path.as_ref(), OFlags::RDONLY | OFlags::DIRECTORY) {
        Ok(directory) => {
            let entries = rustix::fs::Dir::read_from(&directory)?;
            for entry in entries {
                let entry = entry?;
                if ![&b"."[..], b".."].contains(&entry.file_name().to_bytes()) {
                    return Ok(false);
                }
            }
            Ok(true)
        }
        Err(Errno::NOENT) => Ok(true),
        Err(Errno::NOTDIR | Errno::LOOP) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Makes a directory in a root, and those above it.
fn make_directories(root: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let mut made = PathBuf::from("/");
    for component in path.components() {
        let Component::Normal(name) = component else { continue };
        let parent = open(root, &made, OFlags::PATH | OFlags::DIRECTORY)?;
        made.push(name);
        match open(root, &made, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(_) => {}
            Err(Errno::NOENT) => mkdirat(&parent, name, Mode::from_raw_mode(0o755))?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
