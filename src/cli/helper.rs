//! `mount.ocifs`: the program that mount(8) runs for `-t ocifs`, and so for lines of fstab(5).
//!
//! It is this program under another name: a link `/sbin/mount.ocifs`. mount(8) calls it as
//! `mount.ocifs IMAGE DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`. The call is translated into the arguments of
//! `ocifs mount`, and the options into its options:
//!
//! - Options that `ocifs mount -o` knows, such as `nosuid`.
//! - Long options of `ocifs mount` without their dashes, such as `prefetch=all` or `writable`.
//! - Options for mount(8), fstab(5) and systemd.mount(5), such as `nofail` or `x-systemd.automount`. They change nothing here.
//!
//! An unknown option is an error, unless `-s` is given. mount(8) adds `rw` unless `ro` is given. `rw` changes nothing.
//! `writable`, or `upper=` and `work=`, make the root writable.
//!
//! For `-t fuse.ocifs`, mount(8) runs `mount.fuse.ocifs` if there is one. Otherwise mount.fuse3(8) runs
//! `ocifs IMAGE DIR -o OPTIONS`.
//!
//! The exit status is that of mount(8): 1 for a wrong call, 8 for an interrupt, 32 if the image was not mounted.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::{CommandFactory as _, Parser};
use nix::sched::{CloneFlags, setns};

use super::background::is_serving;
use super::fetching::Interrupted;
use super::mount::resolve;
use super::mounts::block_on;
use super::{Cli, explain, run};
use ocifs::mount::{FuseOptions, MountState, RunDir, status_of};

/// Names by which mount(8) runs this program.
const NAMES: [&str; 2] = ["mount.ocifs", "mount.fuse.ocifs"];
/// Exit statuses of mount(8).
const WRONG_CALL: u8 = 1;
const INTERRUPTED: u8 = 8;
const NOT_MOUNTED: u8 = 32;

/// Long options of `ocifs mount` that are no mount options: mount(8) waits for the end of the helper and shows nothing of
/// its standard output.
const NOT_HERE: [&str; 5] = ["option", "foreground", "json", "help", "version"];
/// Options that mount(8), fstab(5) and systemd.mount(5) handle or ask helpers to tolerate. The times of access and the
/// like change nothing in a mount that has none.
const TOLERATED: &[&str] = &[
    "defaults",
    "rw",
    "auto",
    "noauto",
    "nofail",
    "fail",
    "_netdev",
    "user",
    "nouser",
    "users",
    "nousers",
    "owner",
    "noowner",
    "group",
    "nogroup",
    "async",
    "atime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "lazytime",
    "nolazytime",
    "diratime",
    "nomand",
    "noiversion",
    "silent",
    "loud",
];
/// Beginnings of further options of that kind.
const TOLERATED_PREFIXES: [&str; 4] = ["x-", "X-", "user=", "comment="];

/// Mount an OCI image; called by mount(8).
#[derive(Debug, Parser)]
#[command(name = "mount.ocifs", version, max_term_width = 110)]
struct HelperArgs {
    /// Image reference, as `ocifs mount` takes it
    source: OsString,
    /// Directory to mount on
    directory: PathBuf,
    /// Mount options, comma separated: those of `ocifs mount -o`, and its long options such as prefetch=all
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Ignore unknown mount options
    #[arg(short)]
    sloppy: bool,
    /// Only check the arguments
    #[arg(short)]
    fake: bool,
    /// Without effect
    #[arg(short = 'n')]
    _no_mtab: bool,
    /// Log more
    #[arg(short, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Mount in the mount namespace of this file or process
    #[arg(short = 'N', value_name = "NAMESPACE")]
    namespace: Option<PathBuf>,
    /// Without effect
    #[arg(short = 't', value_name = "TYPE")]
    _type: Option<String>,
}

/// Whether mount(8) or mount.fuse3(8) called the program with these arguments.
pub(super) fn is_called(arguments: &[OsString]) -> bool {
    let name = arguments.first().and_then(|name| Path::new(name).file_name());
    if name.and_then(OsStr::to_str).is_some_and(|name| NAMES.contains(&name)) {
        return true;
    }
    match arguments {
        [_, source, _, option, _] => option == "-o" && Cli::command().find_subcommand(source).is_none(),
        _ => false,
    }
}

/// Runs the program as a mount helper.
pub(super) fn main(arguments: &[OsString], started: Instant) -> ExitCode {
    let called = match HelperArgs::try_parse_from(arguments) {
        Ok(called) => called,
        Err(error) => return complain(&error),
    };
    let cli = match translate(&called).map(Cli::try_parse_from) {
        Ok(Ok(cli)) => cli,
        Ok(Err(error)) => return complain(&error),
        Err(error) => {
            eprintln!("mount.ocifs: {}", explain(&error));
            return WRONG_CALL.into();
        }
    };
    if called.fake {
        return ExitCode::SUCCESS;
    }
    let mount = || {
        enter(called.namespace.as_deref())?;
        if !is_serving() && is_mounted(&called) {
            eprintln!(
                "mount.ocifs: it is mounted on {} already, and nothing was changed",
                called.directory.display()
            );
            return Ok(ExitCode::SUCCESS);
        }
        run(cli, started)
    };
    match mount() {
        Ok(status) => status,
        Err(error) => {
            eprintln!("mount.ocifs: {}", explain(&error));
            match error.is::<Interrupted>() {
                true => INTERRUPTED.into(),
                false => NOT_MOUNTED.into(),
            }
        }
    }
}

/// Prints what is wrong with the arguments, or the help that was asked for.
fn complain(error: &clap::Error) -> ExitCode {
    // If standard error is closed, the exit status has to do.
    let _ = error.print();
    match error.use_stderr() {
        true => WRONG_CALL.into(),
        false => ExitCode::SUCCESS,
    }
}

/// Returns the arguments of the `ocifs` command that does what the helper was called for.
fn translate(called: &HelperArgs) -> anyhow::Result<Vec<OsString>> {
    let mut arguments: Vec<OsString> = vec!["ocifs".into(), "mount".into()];
    for option in called.options.iter().flat_map(|list| split(list)) {
        match argument(&option)? {
            Some(argument) => arguments.extend(argument.into_iter().map(OsString::from)),
            None if called.sloppy || is_tolerated(&option) => {}
            None => bail!(
                "unknown mount option `{option}`: `ocifs mount --help` shows the options; write them without dashes, as prefetch=all"
            ),
        }
    }
    arguments.extend((0..called.verbose).map(|_| "--verbose".into()));
    arguments.extend([
        "--".into(),
        called.source.clone(),
        called.directory.clone().into_os_string(),
    ]);
    Ok(arguments)
}

/// Splits a list at commas. A comma within double quotes or after a backslash belongs to the option, as in mount(8) and in
/// libfuse. Quotes and those backslashes are removed.
fn split(list: &str) -> Vec<String> {
    let mut options = vec![String::new()];
    let mut quoted = false;
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        let option = options.last_mut().expect("there is always a last one");
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => options.push(String::new()),
            '\\' if matches!(chars.peek(), Some(',' | '\\')) => option.extend(chars.next()),
            c => option.push(c),
        }
    }
    options.retain(|option| !option.is_empty());
    options
}

/// Returns the arguments of `ocifs mount` for a mount option. Returns none for an option that is not one of ocifs.
fn argument(option: &str) -> anyhow::Result<Option<Vec<String>>> {
    if ["remount", "bind", "rbind", "move"].contains(&option) {
        bail!("`{option}` is no option of an image: unmount it and mount it again to change its options");
    }
    // What the option means is decided where it is applied.
    if FuseOptions::defaults(false).apply(option).is_ok() {
        return Ok(Some(vec!["--option".to_owned(), option.to_owned()]));
    }
    let (name, value) = match option.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (option, None),
    };
    if NOT_HERE.contains(&name) {
        return Ok(None);
    }
    let cli = Cli::command();
    let mount = cli.find_subcommand("mount").expect("there is a command mount");
    let mut known = cli.get_arguments().chain(mount.get_arguments());
    let Some(argument) = known.find(|argument| argument.get_long() == Some(name)) else {
        return Ok(None);
    };
    match (argument.get_action().takes_values(), value) {
        (true, Some(value)) => Ok(Some(vec![format!("--{name}={value}")])),
        (false, None) => Ok(Some(vec![format!("--{name}")])),
        (true, None) => bail!("mount option `{name}` needs a value: {name}=..."),
        (false, Some(_)) => bail!("mount option `{name}` takes no value"),
    }
}

fn is_tolerated(option: &str) -> bool {
    TOLERATED.contains(&option) || TOLERATED_PREFIXES.iter().any(|prefix| option.starts_with(prefix))
}

/// Whether the image is mounted on the directory already. `mount -a` compares names of file systems, and some of the kernel's
/// EROFS are not called like their images.
fn is_mounted(called: &HelperArgs) -> bool {
    let status = || {
        let place = resolve(&called.directory)?;
        block_on(status_of(&RunDir::open()?, &place))?.map_err(anyhow::Error::from)
    };
    let is_served = |state| !matches!(state, MountState::Dead | MountState::Detached);
    // What is no mount of ocifs gives no status. The mount itself finds out why nothing can be mounted there.
    status().is_ok_and(|status| is_served(status.state) && *status.image == *called.source.to_string_lossy())
}

/// Enters a mount namespace, which is given as a file or as the id of a process. mount(8) leaves this to its helpers.
fn enter(namespace: Option<&Path>) -> anyhow::Result<()> {
    // The process that serves is started in the namespace.
    let Some(namespace) = namespace.filter(|_| !is_serving()) else {
        return Ok(());
    };
    let path = match namespace.to_str().and_then(|text| text.parse::<u32>().ok()) {
        Some(pid) => PathBuf::from(format!("/proc/{pid}/ns/mnt")),
        None => namespace.to_owned(),
    };
    let enter = || {
        let file = File::open(&path)?;
        setns(file, CloneFlags::CLONE_NEWNS).map_err(std::io::Error::from)
    };
    enter().with_context(|| format!("cannot enter the mount namespace {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(arguments: &[&str]) -> anyhow::Result<Vec<String>> {
        let all = ["mount.ocifs", "alpine", "/mnt"].iter().chain(arguments);
        let called = HelperArgs::try_parse_from(all.map(OsString::from))?;
        let arguments = translate(&called)?;
        Cli::try_parse_from(&arguments)?;
        Ok(arguments.into_iter().map(|a| a.into_string().unwrap()).collect())
    }

    #[test]
    fn options_become_arguments() {
        for (options, arguments) in [
            ("rw", &[][..]),
            ("ro,nosuid", &["--option", "ro", "--option", "nosuid"][..]),
            (
                "defaults,_netdev,nofail,user=me,x-systemd.automount,comment=x,X-y",
                &[][..],
            ),
            (
                "prefetch=all,,memory=1MiB,plain-http",
                &["--prefetch=all", "--memory=1MiB", "--plain-http"],
            ),
            ("upper=/a\\,b,work=\"/c,d\"", &["--upper=/a,b", "--work=/c,d"][..]),
        ] {
            let expected = [&["ocifs", "mount"][..], arguments, &["--", "alpine", "/mnt"]].concat();
            assert_eq!(translated(&["-o", options]).unwrap(), expected, "{options}");
        }
        assert_eq!(
            translated(&["-svn", "-t", "ocifs", "-o", "odd,writable", "-o", "dev"]).unwrap(),
            [
                "ocifs",
                "mount",
                "--writable",
                "--option",
                "dev",
                "--verbose",
                "--",
                "alpine",
                "/mnt"
            ]
        );
    }

    #[test]
    fn wrong_options_are_named() {
        for (options, wrong) in [
            ("odd", "unknown mount option `odd`"),
            ("ro,sync", "unknown mount option `sync`"),
            ("prefetch", "`prefetch` needs a value"),
            ("writable=1", "`writable` takes no value"),
            ("foreground", "unknown mount option `foreground`"),
            ("remount,ro", "`remount` is no option"),
            ("prefetch=some", "invalid value 'some'"),
        ] {
            let error = translated(&["-o", options]).unwrap_err().to_string();
            assert!(error.contains(wrong), "{options}: {error}");
        }
    }

    #[test]
    fn the_ways_to_call_the_helper_are_recognised() {
        let is_called = |line: &str| is_called(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        assert!(is_called("/sbin/mount.ocifs alpine /mnt") && is_called("mount.fuse.ocifs --help"));
        assert!(is_called("ocifs alpine /mnt -o dev,suid"));
        for line in [
            "ocifs mount /mnt -o ro",
            "ocifs alpine /mnt",
            "ocifs unmount a -o b",
            "ocifs a b -p c",
        ] {
            assert!(!is_called(line), "{line}");
        }
    }
}
