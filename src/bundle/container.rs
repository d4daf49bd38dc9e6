//! Makes the configuration of a container from an image config.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Capability, LinuxCapabilitiesBuilder, LinuxNamespaceType, Mount, MountBuilder, Process, ProcessBuilder,
    RootBuilder, Spec, UserBuilder,
};

use super::{Account, AccountError};
use crate::oci::ImageConfig;

/// Search path of a program whose image says none, as other engines have it.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What root in a container may do, as with docker and podman.
pub(super) const CAPABILITIES: [Capability; 14] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// Neither the image nor the user names a program.
    #[error("the image names no program to run: give a command")]
    NoProgram,
    /// The program is to run as somebody whom the container cannot have.
    #[error("{what} cannot run a program as user {uid} and group {gid}: {instead}, or add --user 0:0")]
    OtherUser {
        /// What runs the container, and who starts it.
        what: &'static str,
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
        /// What helps.
        instead: &'static str,
    },
    /// The user or the group is unknown.
    #[error(transparent)]
    Account(#[from] AccountError),
    /// The configuration is not valid.
    #[error("cannot make the configuration of the container: {0}")]
    Spec(#[from] OciSpecError),
}

/// Which network a container sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Network {
    /// That of the host.
    #[default]
    Host,
    /// None but a loopback device of its own.
    None,
}

/// What a container is to be, beyond what its image says.
#[derive(Debug, Clone, Default)]
pub struct ContainerConfig {
    /// Arguments in place of the image's. With an entry point, they follow it.
    pub command: Vec<String>,
    /// A program in place of the image's entry point. The image's own arguments do not count then.
    pub entrypoint: Option<String>,
    /// Variables in addition to the image's, as `NAME=value`. They replace variables of the same name.
    pub env: Vec<String>,
    /// User and group in place of the image's.
    pub user: Option<String>,
    /// Directory in place of the image's.
    pub workdir: Option<String>,
    /// Whether the program has a terminal.
    pub terminal: bool,
    /// Whether the root file system can only be read.
    pub read_only: bool,
    /// The network.
    pub network: Network,
    /// Name of the host, as the container sees it.
    pub hostname: String,
    /// The user and the group outside who are root inside. `None` if the container is started by root.
    pub rootless: Option<(u32, u32)>,
    /// Paths in the image that get an empty file system in memory.
    pub volumes: Vec<String>,
    /// Files of the host that the container sees at the same path, read-only.
    pub shared: Vec<PathBuf>,
}

impl ContainerConfig {
    /// Returns the program that runs, and its arguments.
    pub fn program(&self, image: &ImageConfig) -> Result<Vec<String>, BundleError> {
        let config = &image.config;
        let (entrypoint, cmd) = match &self.entrypoint {
            Some(program) => (vec![program.clone()], &[][..]),
            None => (config.entrypoint.clone(), &config.cmd[..]),
        };
        let arguments = if self.command.is_empty() { cmd } else { &self.command };
        let program = [&entrypoint[..], arguments].concat();
        match program.is_empty() {
            true => Err(BundleError::NoProgram),
            false => Ok(program),
        }
    }

    /// Returns the directory in which the program runs.
    pub fn workdir(&self, image: &ImageConfig) -> PathBuf {
        let named = self.workdir.as_deref().unwrap_or(&image.config.working_dir);
        PathBuf::from("/").join(named)
    }

    /// Returns the environment. The first variable is the search path, if the image does not say one.
    pub fn env(&self, image: &ImageConfig, account: &Account) -> Vec<String> {
        let home = format!("HOME={}", account.home.as_deref().unwrap_or("/"));
        let terminal = self.terminal.then(|| "TERM=xterm".to_owned());
        let all = [PATH.to_owned(), home]
            .into_iter()
            .chain(terminal)
            .chain(image.config.env.iter().cloned())
            .chain(self.env.iter().cloned());
        let mut env: Vec<String> = Vec::new();
        for variable in all {
            let name = |variable: &str| variable.split('=').next().map(str::to_owned);
            match env.iter_mut().find(|earlier| name(earlier) == name(&variable)) {
                Some(earlier) => *earlier = variable,
                None => env.push(variable),
            }
        }
        env
    }

    /// Returns the configuration of a container whose root is the directory `rootfs` beside it. `passwd` and `group` are the
    /// image's files, or empty.
    pub fn spec(&self, image: &ImageConfig, passwd: &[u8], group: &[u8]) -> Result<Spec, BundleError> {
        let user = self.user.as_deref().unwrap_or(&image.config.user);
        let account = Account::find(user, passwd, group)?;
        if self.rootless.is_some() && (account.uid, account.gid) != (0, 0) {
            return Err(BundleError::OtherUser {
                what: "an OCI runtime without root",
                uid: account.uid,
                gid: account.gid,
                instead: "use bubblewrap",
            });
        }
        let mut spec = match self.rootless {
            Some((uid, gid)) => Spec::rootless(uid, gid),
            None => Spec::default(),
        };
        spec.set_process(Some(self.process(image, &account)?));
        let root = RootBuilder::default().path("rootfs").readonly(self.read_only).build()?;
        spec.set_root(Some(root));
        spec.set_hostname(Some(self.hostname.clone()));
        if self.network == Network::Host
            && let Some(linux) = spec.linux_mut()
            && let Some(namespaces) = linux.namespaces_mut()
        {
            namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
        }
        let more = self.mounts()?;
        if let Some(mounts) = spec.mounts_mut() {
            mounts.extend(more);
        }
        spec.set_annotations(Some(annotations(image)).filter(|annotations| !annotations.is_empty()));
        Ok(spec)
    }

    fn process(&self, image: &ImageConfig, account: &Account) -> Result<Process, BundleError> {
        let user = UserBuilder::default().uid(account.uid).gid(account.gid);
        // Without root, there is one user and one group inside.
        let user = match self.rootless.is_none() && !account.groups.is_empty() {
            true => user.additional_gids(account.groups.clone()),
            false => user,
        };
        let all: HashSet<Capability> = CAPABILITIES.into();
        // The program of another user has none, but it may run programs that get some.
        let own = if account.uid == 0 { all.clone() } else { HashSet::new() };
        let capabilities = LinuxCapabilitiesBuilder::default()
            .bounding(all)
            .effective(own.clone())
            .permitted(own)
            .inheritable(HashSet::new())
            .ambient(HashSet::new())
            .build()?;
        Ok(ProcessBuilder::default()
            .terminal(self.terminal)
            .user(user.build()?)
            .args(self.program(image)?)
            .env(self.env(image, account))
            .cwd(self.workdir(image))
            .capabilities(capabilities)
            .rlimits(Vec::new())
            .no_new_privileges(false)
            .build()?)
    }

    fn mounts(&self) -> Result<Vec<Mount>, OciSpecError> {
        let volumes = self.volumes.iter().map(|path| {
            let options = ["nosuid", "nodev", "mode=755"].map(str::to_owned);
            MountBuilder::default()
                .destination(PathBuf::from("/").join(path))
                .typ("tmpfs")
                .source("tmpfs")
                .options(options)
                .build()
        });
        let shared = self.shared.iter().map(|path| {
            let options = ["bind", "ro", "nosuid", "nodev", "noexec"].map(str::to_owned);
            MountBuilder::default()
                .destination(path)
                .typ("bind")
                .source(path)
                .options(options)
                .build()
        });
        volumes.chain(shared).collect()
    }
}

/// What runtimes and their hooks may want to know of the image (image-spec conversion.md): its labels, and its stop signal
/// unless a label says another.
fn annotations(image: &ImageConfig) -> HashMap<String, String> {
    let config = &image.config;
    let stop_signal = config.stop_signal.iter();
    let stop_signal = stop_signal.map(|signal| ("org.opencontainers.image.stopSignal".to_owned(), signal.clone()));
    // runtime-spec config.md: a key must not be empty.
    let labels = config.labels.clone().into_iter().filter(|(key, _)| !key.is_empty());
    stop_signal.chain(labels).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0::/root:/bin/sh\nnode:x:1000:1000::/home/node:/bin/sh\n";
    const GROUP: &[u8] = b"video:x:44:node\n";

    fn image(config: &str) -> ImageConfig {
        ImageConfig::parse(format!(r#"{{"config":{config}}}"#).as_bytes()).unwrap()
    }

    fn program(image_config: &str, entrypoint: Option<&str>, command: &[&str]) -> Option<Vec<String>> {
        let container = ContainerConfig {
            entrypoint: entrypoint.map(str::to_owned),
            command: command.iter().map(|&argument| argument.to_owned()).collect(),
            ..ContainerConfig::default()
        };
        container.program(&image(image_config)).ok()
    }

    #[test]
    fn programs_are_chosen_as_by_other_engines() {
        let both = r#"{"Entrypoint":["/entry","-a"],"Cmd":["b"]}"#;
        let words = |words: &[&str]| Some(words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>());
        assert_eq!(program(both, None, &[]), words(&["/entry", "-a", "b"]));
        assert_eq!(program(both, None, &["c", "d"]), words(&["/entry", "-a", "c", "d"]));
        assert_eq!(program(both, Some("sh"), &[]), words(&["sh"]));
        assert_eq!(program(both, Some("sh"), &["-c"]), words(&["sh", "-c"]));
        assert_eq!(program(r#"{"Cmd":["sh"]}"#, None, &[]), words(&["sh"]));
        assert_eq!(program("{}", None, &[]), None);
        assert_eq!(program("{}", None, &["true"]), words(&["true"]));
    }

    #[test]
    fn later_variables_replace_earlier_ones() {
        let image = image(r#"{"Env":["PATH=/bin","A=1","B=x=y"]}"#);
        let container = ContainerConfig {
            env: vec!["A=2".to_owned(), "C".to_owned()],
            terminal: true,
            ..ContainerConfig::default()
        };
        let env = container.env(&image, &Account::default());
        assert_eq!(env, ["PATH=/bin", "HOME=/", "TERM=xterm", "A=2", "B=x=y", "C"]);
    }

    #[test]
    fn the_configuration_has_what_the_image_says() {
        let image = image(
            r#"{"User":"node","Cmd":["node"],"WorkingDir":"app","StopSignal":"SIGINT","Env":["NODE_ENV=production"],
                "Labels":{"org.example.team":"web","":"no key"}}"#,
        );
        let container = ContainerConfig {
            hostname: "web".to_owned(),
            volumes: vec!["/data".to_owned()],
            shared: vec!["/etc/resolv.conf".into()],
            ..ContainerConfig::default()
        };
        let spec = serde_json::to_value(container.spec(&image, PASSWD, GROUP).unwrap()).unwrap();
        let process = &spec["process"];
        assert_eq!(process["args"], serde_json::json!(["node"]));
        assert_eq!(
            process["user"],
            serde_json::json!({"uid": 1000, "gid": 1000, "additionalGids": [44]})
        );
        assert_eq!(process["cwd"], "/app");
        assert_eq!(process["capabilities"]["effective"], serde_json::json!([]));
        assert_eq!(process["capabilities"]["bounding"].as_array().unwrap().len(), 14);
        assert!(process["env"].as_array().unwrap().contains(&"HOME=/home/node".into()));
        assert_eq!(spec["root"], serde_json::json!({"path": "rootfs", "readonly": false}));
        assert_eq!(spec["hostname"], "web");
        assert_eq!(
            spec["annotations"],
            serde_json::json!({"org.opencontainers.image.stopSignal": "SIGINT", "org.example.team": "web"})
        );
        let kinds: Vec<&str> = spec["linux"]["namespaces"]
            .as_array()
            .unwrap()
            .iter()
            .map(|namespace| namespace["type"].as_str().unwrap())
            .collect();
        assert!(!kinds.contains(&"network") && kinds.contains(&"pid") && !kinds.contains(&"user"));
        let mounted = |path: &str| {
            let mounts = spec["mounts"].as_array().unwrap();
            mounts
                .iter()
                .find(|mount| mount["destination"] == path)
                .unwrap()
                .clone()
        };
        assert_eq!(mounted("/data")["type"], "tmpfs");
        assert_eq!(mounted("/etc/resolv.conf")["source"], "/etc/resolv.conf");
    }

    #[test]
    fn without_root_there_is_one_user() {
        let container = ContainerConfig {
            rootless: Some((1000, 1001)),
            network: Network::None,
            ..ContainerConfig::default()
        };
        let spec = container.spec(&image(r#"{"Cmd":["sh"]}"#), PASSWD, GROUP).unwrap();
        let spec = serde_json::to_value(spec).unwrap();
        assert_eq!(spec["linux"]["uidMappings"][0]["hostID"], 1000);
        assert_eq!(spec["linux"]["gidMappings"][0]["hostID"], 1001);
        assert!(spec["process"]["user"].get("additionalGids").is_none());
        let error = container.spec(&image(r#"{"Cmd":["sh"],"User":"node"}"#), PASSWD, GROUP);
        let error = error.unwrap_err().to_string();
        assert!(
            error.starts_with("an OCI runtime without root cannot run a program as user 1000"),
            "{error}"
        );
    }
}
