//! `ocifs snapshotter check`: what a host's configuration lacks for containerd to use the snapshotter.
//!
//! The check reads containerd's configuration as containerd reports it (`containerd config dump`), because defaults and
//! imported files count too.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::bail;
use clap::Args;
use serde::Serialize;
use toml::{Table, Value};

use super::{ADDRESS, say};
use crate::cli::json::versioned;

/// Names of CRI's plugin with the settings of images: up to containerd 1.7, and since 2.0.
const CRI_1: [&str; 3] = ["plugins", "io.containerd.grpc.v1.cri", "containerd"];
const CRI_2: [&str; 2] = ["plugins", "io.containerd.cri.v1.images"];
/// What the plugin that pulls images unpacks, since containerd 2.1.
const TRANSFER: [&str; 3] = ["plugins", "io.containerd.transfer.v1.local", "unpack_config"];

/// Arguments of `snapshotter check`.
#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// Unix socket of the snapshotter
    #[arg(long, value_name = "SOCKET", default_value = ADDRESS)]
    address: PathBuf,
    /// File with containerd's configuration [default: the one that containerd uses]
    #[arg(long, value_name = "FILE")]
    containerd_config: Option<PathBuf>,
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

/// One thing that has to be right.
#[derive(Debug, Serialize)]
struct Check {
    what: &'static str,
    ok: bool,
    /// What was found, and what to do about it.
    detail: String,
}

impl Check {
    fn good(what: &'static str, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        Self { what, ok: true, detail }
    }

    fn missing(what: &'static str, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        Self {
            what,
            ok: false,
            detail,
        }
    }
}

pub(super) fn run(args: CheckArgs) -> anyhow::Result<()> {
    let mut checks = vec![host_fuse(), host_overlay(), socket(&args.address)];
    match dump(args.containerd_config.as_deref()) {
        Ok(config) => checks.extend(configuration(&config, &args.address)),
        Err(error) => checks.push(Check::missing("containerd", format!("{error:#}"))),
    }
    if args.json {
        say!("{:#}", versioned(&checks)?);
    } else {
        for check in &checks {
            let mark = if check.ok { "ok     " } else { "missing" };
            say!("{mark}  {}: {}", check.what, check.detail);
        }
    }
    match checks.iter().filter(|check| !check.ok).count() {
        0 => Ok(()),
        1 => bail!("one thing is missing"),
        count => bail!("{count} things are missing"),
    }
}

fn host_fuse() -> Check {
    match Path::new("/dev/fuse").exists() {
        true => Check::good("FUSE", "/dev/fuse is there"),
        false => Check::missing("FUSE", "there is no /dev/fuse: modprobe fuse"),
    }
}

fn host_overlay() -> Check {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    match known.lines().any(|line| line.ends_with("\toverlay")) {
        true => Check::good("overlayfs", "the kernel has it"),
        false => Check::missing("overlayfs", "the kernel does not have it: modprobe overlay"),
    }
}

fn socket(address: &Path) -> Check {
    let (what, shown) = ("snapshotter", address.display());
    match std::os::unix::net::UnixStream::connect(address) {
        Ok(_) => Check::good(what, format!("a process listens at {shown}")),
        Err(error) => Check::missing(
            what,
            format!("nothing answers at {shown} ({error}): start `ocifs snapshotter`"),
        ),
    }
}

/// Returns the configuration that containerd would use.
fn dump(file: Option<&Path>) -> anyhow::Result<Table> {
    let mut command = Command::new("containerd");
    if let Some(file) = file {
        command.arg("--config").arg(file);
    }
    let output = command.args(["config", "dump"]).stdin(Stdio::null()).output();
    let output = match output {
        Ok(output) if output.status.success() => output,
        Ok(output) => bail!(
            "`containerd config dump` fails: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ),
        Err(error) => bail!("cannot run containerd: {error}"),
    };
    Ok(String::from_utf8(output.stdout)?.parse()?)
}

/// Returns the value at a path of a configuration.
fn at<'a>(config: &'a Table, path: &[&str]) -> Option<&'a Value> {
    let (first, rest) = path.split_first()?;
    rest.iter()
        .try_fold(config.get(*first)?, |value, key| value.as_table()?.get(*key))
}

fn configuration(config: &Table, address: &Path) -> Vec<Check> {
    let is_ours = |plugin: &Value| {
        let is = |key: &str, wanted: &str| plugin.get(key).and_then(Value::as_str) == Some(wanted);
        is("type", "snapshot") && address.to_str().is_some_and(|address| is("address", address))
    };
    let plugins = config.get("proxy_plugins").and_then(Value::as_table);
    let mut plugins = plugins.into_iter().flatten();
    let Some((name, plugin)) = plugins.find(|(_, plugin)| is_ours(plugin)) else {
        let shown = address.display();
        let advice = format!("add [proxy_plugins.ocifs] with type = \"snapshot\" and address = \"{shown}\"");
        return vec![Check::missing("proxy plugin", advice)];
    };
    let mut checks = vec![Check::good("proxy plugin", format!("containerd knows it as {name}"))];
    let (section, cri) = match (at(config, &CRI_2), at(config, &CRI_1)) {
        (Some(cri), _) => ("plugins.\"io.containerd.cri.v1.images\"", cri),
        (None, Some(cri)) => ("plugins.\"io.containerd.grpc.v1.cri\".containerd", cri),
        (None, None) => return checks,
    };
    let snapshotter = cri.get("snapshotter").and_then(Value::as_str).unwrap_or_default();
    checks.push(match snapshotter == name {
        true => Check::good("snapshotter of CRI", format!("it is {name}")),
        false => Check::missing(
            "snapshotter of CRI",
            format!("it is {snapshotter:?}: set snapshotter = \"{name}\" in [{section}]"),
        ),
    });
    // Since containerd 2.1 pulls go through the transfer service, which asks the plugin what it wants.
    let export = plugin
        .get("exports")
        .and_then(|exports| exports.get("enable_remote_snapshot_annotations"));
    let is_asked_for = at(config, &TRANSFER).is_some() && export.and_then(Value::as_str) == Some("true");
    let silent = cri.get("disable_snapshot_annotations").and_then(Value::as_bool);
    let advice = match at(config, &TRANSFER) {
        Some(_) => format!(
            "add [proxy_plugins.{name}.exports] with enable_remote_snapshot_annotations = \"true\" (containerd 2.1 and later)"
        ),
        None => format!("set disable_snapshot_annotations = false in [{section}]"),
    };
    checks.push(match silent == Some(false) || is_asked_for {
        true => Check::good("names of images", "pulls tell the snapshotter"),
        false => Check::missing(
            "names of images",
            format!("pulls do not tell the snapshotter: {advice}"),
        ),
    });
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(config: &str) -> Vec<&'static str> {
        let config: Table = config.parse().unwrap();
        let checks = configuration(&config, Path::new("/run/s.sock"));
        checks
            .iter()
            .filter(|check| !check.ok)
            .map(|check| check.what)
            .collect()
    }

    #[test]
    fn each_missing_setting_is_named() {
        let plugin = "[proxy_plugins.lazy]\ntype = \"snapshot\"\naddress = \"/run/s.sock\"\n";
        assert_eq!(missing(""), ["proxy plugin"]);
        let other = plugin.replace("/run/s.sock", "/run/other.sock");
        assert_eq!(missing(&other), ["proxy plugin"]);
        assert!(missing(plugin).is_empty(), "without CRI there is nothing else to set");
        let cri = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n";
        let wrong = format!("{plugin}{cri}snapshotter = \"overlayfs\"\ndisable_snapshot_annotations = true\n");
        assert_eq!(missing(&wrong), ["snapshotter of CRI", "names of images"]);
        let right = format!("{plugin}{cri}snapshotter = \"lazy\"\ndisable_snapshot_annotations = false\n");
        assert!(missing(&right).is_empty());
        let second = "[plugins.\"io.containerd.cri.v1.images\"]\nsnapshotter = \"lazy\"\n\
                      [plugins.\"io.containerd.transfer.v1.local\"]\nunpack_config = []\n";
        assert_eq!(missing(&format!("{plugin}{second}")), ["names of images"]);
        let exports = "[proxy_plugins.lazy.exports]\nenable_remote_snapshot_annotations = \"true\"\n";
        assert!(missing(&format!("{plugin}{exports}{second}")).is_empty());
    }
}
