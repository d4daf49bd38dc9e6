//! The resolved configuration. Arguments come first, then the environment, then the configuration file, then
//! defaults.

#[cfg(feature = "snapshotter")]
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use serde::Deserialize;

use super::units::{Deadline, Size};
use super::{GLOBAL, StoreArgs};
use ocifs::mount::Prefetch;
use ocifs::published::{IndexKey, IndexLocation, IndexPlace, Trust};
use ocifs::registry::{HostFiles, HostsFrom, PlainHttp, RegistryClient};

const DEFAULT_CACHE: u64 = 10 << 30;
const DEFAULT_MEMORY: u64 = 64 << 20;
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
const SYSTEM_CONFIG: &str = "/etc/ocifs.toml";

/// Options of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = GLOBAL)]
pub(super) struct Globals {
    #[command(flatten)]
    store: StoreArgs,
    /// Memory for decoded data on its way to readers; the tables of an image's files take at most that plus 192 MiB
    /// [default: 64MiB]
    #[arg(long, global = true, value_name = "SIZE")]
    memory: Option<Size>,
    /// Longest that a read, or a wait for the registry, may take: 30s, 2m, never [default: 30s]
    #[arg(long, global = true, value_name = "TIME")]
    timeout: Option<Deadline>,
    /// Speak HTTP without TLS to the registry (on loopback this is tried anyway if there is no TLS)
    #[arg(long, global = true)]
    plain_http: bool,
    /// Speak only HTTPS, also on loopback and to the hosts that the configuration file lists under plain-http
    #[arg(long, global = true, conflicts_with = "plain_http")]
    no_plain_http: bool,
    /// Follow redirects of public registries to private and other addresses that are not public
    #[arg(long, global = true)]
    allow_private_redirects: bool,
    /// PEM file with further certificate authorities to trust
    #[arg(long, global = true, value_name = "FILE")]
    ca: Vec<PathBuf>,
    /// Whose files on this machine say how to reach registries (mirrors, certificates, blocked registries): all,
    /// containerd (certs.d), containers (registries.conf of podman), or none [default: all]
    #[arg(long, global = true, value_enum, value_name = "WHOSE")]
    hosts_from: Option<HostsFromWhom>,
    /// Host from which foreign layers may be fetched that the registry does not have
    #[arg(long, global = true, value_name = "HOST")]
    foreign_layers_from: Vec<String>,
    /// Place with indexes that somebody else has made: a directory, https://HOST/PATH or oci://HOST/REPOSITORY; several are
    /// asked in this order, before those of the configuration file
    #[arg(long, global = true, value_name = "LOCATION")]
    index: Vec<String>,
    /// Believe what is at --index if this key of minisign(1) has signed it: the file with the public key, or the key itself
    #[arg(long, global = true, value_name = "KEY", conflicts_with = "index_trust_location")]
    index_key: Option<String>,
    /// Believe what is at --index without a signature: whoever can put files there decides what images contain
    #[arg(long, global = true)]
    index_trust_location: bool,
    /// Configuration file in TOML. Like the options: store, cache-size, memory, timeout, prefetch, log-format, ca,
    /// allow-private-redirects, hosts-from. Lists of hosts: plain-http, foreign-layers-from. For each index location a table
    /// [[index]] with location, and with key or trust = "location". Where files about registries are: containerd-certs-dir,
    /// registries-conf, and the list certs-dirs. [default: /etc/ocifs.toml]
    #[arg(
        long,
        global = true,
        env = "OCIFS_CONFIG",
        hide_env_values = true,
        value_name = "FILE"
    )]
    config: Option<PathBuf>,
    /// Format of log lines
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
    /// Log more; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// No progress, no summaries, no warnings: only errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
}

#[cfg(feature = "snapshotter")]
impl Globals {
    /// Returns arguments that mean these options in any working directory.
    fn arguments(&self) -> anyhow::Result<Vec<OsString>> {
        // Each field is named, so that no option is forgotten.
        let Self {
            store: StoreArgs { store, cache_size },
            memory,
            timeout,
            plain_http,
            no_plain_http,
            allow_private_redirects,
            ca,
            hosts_from,
            foreign_layers_from,
            index,
            index_key,
            index_trust_location,
            config,
            log_format,
            verbose,
            quiet,
        } = self;
        let mut arguments: Vec<OsString> = Vec::new();
        let files = [
            ("--store", store.as_slice()),
            ("--config", config.as_slice()),
            ("--ca", ca),
        ];
        for (name, files) in files {
            for file in files {
                arguments.extend([name.into(), std::path::absolute(file)?.into()]);
            }
        }
        let texts = [
            (
                "--cache-size",
                cache_size.iter().map(|size| size.0.to_string()).collect(),
            ),
            ("--memory", memory.iter().map(|size| size.0.to_string()).collect()),
            ("--timeout", timeout.iter().map(ToString::to_string).collect()),
            (
                "--hosts-from",
                hosts_from.iter().map(|whose| whose.name().to_owned()).collect(),
            ),
            ("--foreign-layers-from", foreign_layers_from.clone()),
            ("--index", index.clone()),
            ("--index-key", index_key.iter().cloned().collect::<Vec<_>>()),
            (
                "--log-format",
                log_format.iter().map(|format| format.name().to_owned()).collect(),
            ),
        ];
        for (name, texts) in texts {
            arguments.extend(texts.into_iter().flat_map(|text| [name.into(), text.into()]));
        }
        let flags = [
            ("--plain-http", *plain_http),
            ("--no-plain-http", *no_plain_http),
            ("--allow-private-redirects", *allow_private_redirects),
            ("--index-trust-location", *index_trust_location),
            ("--quiet", *quiet),
        ];
        let given = flags.into_iter().filter(|(_, given)| *given);
        arguments.extend(given.map(|(name, _)| name.into()));
        arguments.extend((0..*verbose).map(|_| "--verbose".into()));
        Ok(arguments)
    }
}

/// [`Prefetch`] on the command line and in the configuration file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum PrefetchMode {
    /// Only what lies ahead of readers
    None,
    /// What earlier starts read
    Profile,
    /// All of the image
    All,
}

impl From<PrefetchMode> for Prefetch {
    fn from(mode: PrefetchMode) -> Self {
        match mode {
            PrefetchMode::None => Self::None,
            PrefetchMode::Profile => Self::Profile,
            PrefetchMode::All => Self::All,
        }
    }
}

/// [`HostsFrom`] on the command line and in the configuration file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum HostsFromWhom {
    /// Those of containerd for the registries that they name, those of containers for the others
    All,
    /// Only the files certs.d/HOST/hosts.toml
    Containerd,
    /// Only the files registries.conf
    Containers,
    /// No file is read, not even for certificates
    None,
}

#[cfg(feature = "snapshotter")]
impl HostsFromWhom {
    /// Returns the name on the command line.
    fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Containerd => "containerd",
            Self::Containers => "containers",
            Self::None => "none",
        }
    }
}

impl From<HostsFromWhom> for HostsFrom {
    fn from(whom: HostsFromWhom) -> Self {
        match whom {
            HostsFromWhom::All => Self::All,
            HostsFromWhom::Containerd => Self::Containerd,
            HostsFromWhom::Containers => Self::Containers,
            HostsFromWhom::None => Self::Nobody,
        }
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

#[cfg(feature = "snapshotter")]
impl LogFormat {
    fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

/// Settings in the configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct FileConfig {
    store: Option<PathBuf>,
    cache_size: Option<Size>,
    memory: Option<Size>,
    timeout: Option<Deadline>,
    #[serde(default)]
    plain_http: Vec<String>,
    #[serde(default)]
    ca: Vec<PathBuf>,
    #[serde(default)]
    allow_private_redirects: bool,
    #[serde(default)]
    foreign_layers_from: Vec<String>,
    prefetch: Option<PrefetchMode>,
    log_format: Option<LogFormat>,
    #[serde(default)]
    index: Vec<FileIndex>,
    hosts_from: Option<HostsFromWhom>,
    containerd_certs_dir: Option<PathBuf>,
    registries_conf: Option<PathBuf>,
    certs_dirs: Option<Vec<PathBuf>>,
    #[cfg(feature = "snapshotter")]
    kubelet_credentials: Option<FileKubelet>,
}

/// The table `[kubelet-credentials]` of the configuration file: where a kubelet's credential providers are.
#[cfg(feature = "snapshotter")]
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct FileKubelet {
    /// What the kubelet has as --image-credential-provider-config.
    pub(super) config: PathBuf,
    /// What the kubelet has as --image-credential-provider-bin-dir.
    pub(super) bin_dir: PathBuf,
}

/// A table `[[index]]` of the configuration file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct FileIndex {
    location: String,
    key: Option<String>,
    trust: Option<TrustedPart>,
}

/// What is trusted of a place without a key.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum TrustedPart {
    Location,
}

/// The resolved settings of a command.
#[derive(Debug, Clone)]
pub(super) struct Config {
    pub(super) store: PathBuf,
    pub(super) cache_size: u64,
    pub(super) memory: usize,
    pub(super) timeout: Option<Duration>,
    /// What mounts fetch in the background, if the configuration file says it.
    pub(super) prefetch: Option<PrefetchMode>,
    /// Registries that ocifs may speak to without TLS.
    pub(super) plain_http: PlainHttp,
    pub(super) ca: Vec<PathBuf>,
    /// Whether a public registry may redirect to addresses that are not public.
    pub(super) allow_private_redirects: bool,
    /// Hosts from which foreign layers are fetched if the registry does not have them.
    pub(super) foreign_layers_from: Vec<String>,
    pub(super) log_format: LogFormat,
    pub(super) verbose: u8,
    /// Whether standard error gets only errors.
    pub(super) quiet: bool,
    /// Places with indexes that somebody else has made.
    pub(super) index: Vec<IndexLocation>,
    /// Files that say how to reach registries.
    pub(super) hosts: HostFiles,
    /// The client for registries, once it is needed.
    pub(super) client: OnceLock<RegistryClient>,
    /// Where a kubelet's credential providers are.
    #[cfg(feature = "snapshotter")]
    pub(super) kubelet: Option<FileKubelet>,
    /// The global options that were given, for another ocifs that this one starts.
    #[cfg(feature = "snapshotter")]
    pub(super) arguments: Vec<OsString>,
}

impl Config {
    pub(super) fn resolve(globals: Globals) -> anyhow::Result<Self> {
        #[cfg(feature = "snapshotter")]
        let arguments = globals.arguments()?;
        let file = match &globals.config {
            Some(path) => read(path)?,
            None if Path::new(SYSTEM_CONFIG).exists() => read(Path::new(SYSTEM_CONFIG))?,
            None => FileConfig::default(),
        };
        let hosts = host_files(globals.hosts_from, &file);
        let index = index_locations(&globals, file.index)?;
        let store = match globals.store.store.or(file.store) {
            Some(store) => std::path::absolute(store)?,
            None => default_store()?,
        };
        let size = |given: Option<Size>, file: Option<Size>, default| given.or(file).map_or(default, |s| s.0);
        let timeout = globals.timeout.or(file.timeout);
        Ok(Self {
            store,
            cache_size: size(globals.store.cache_size, file.cache_size, DEFAULT_CACHE),
            memory: usize::try_from(size(globals.memory, file.memory, DEFAULT_MEMORY))?,
            timeout: timeout.map_or(Some(DEFAULT_TIMEOUT), |d| d.0),
            prefetch: file.prefetch,
            plain_http: match (globals.plain_http, globals.no_plain_http) {
                (true, _) => PlainHttp::Everywhere,
                (false, true) => PlainHttp::Nowhere,
                (false, false) => PlainHttp::Hosts(file.plain_http.into_iter().collect()),
            },
            ca: [globals.ca, file.ca].concat(),
            foreign_layers_from: [globals.foreign_layers_from, file.foreign_layers_from].concat(),
            allow_private_redirects: globals.allow_private_redirects || file.allow_private_redirects,
            log_format: globals.log_format.or(file.log_format).unwrap_or(LogFormat::Text),
            verbose: globals.verbose,
            quiet: globals.quiet,
            index,
            hosts,
            client: OnceLock::new(),
            #[cfg(feature = "snapshotter")]
            kubelet: file.kubelet_credentials,
            #[cfg(feature = "snapshotter")]
            arguments,
        })
    }
}

/// Returns the files that say how to reach registries.
fn host_files(given: Option<HostsFromWhom>, file: &FileConfig) -> HostFiles {
    let mut files = HostFiles::from_environment();
    files.from = given.or(file.hosts_from).map_or(HostsFrom::All, HostsFrom::from);
    if let Some(directory) = &file.containerd_certs_dir {
        files.containerd = vec![directory.clone()];
    }
    if let Some(path) = &file.registries_conf {
        let mut more = path.clone().into_os_string();
        more.push(".d");
        (files.containers, files.containers_more) = (vec![path.clone()], vec![more.into()]);
    }
    if let Some(directories) = &file.certs_dirs {
        files.certificates = directories.clone();
    }
    files
}

/// Returns the places with indexes, first those of the command line.
fn index_locations(globals: &Globals, file: Vec<FileIndex>) -> anyhow::Result<Vec<IndexLocation>> {
    let given = globals.index.iter().map(|location| FileIndex {
        location: location.clone(),
        key: globals.index_key.clone(),
        trust: globals.index_trust_location.then_some(TrustedPart::Location),
    });
    let locations = given.chain(file).map(|index| {
        let place = IndexPlace::parse(&index.location)?;
        let trust = match (&index.key, index.trust) {
            (Some(key), None) => Trust::Key(IndexKey::read(key)?),
            (None, Some(TrustedPart::Location)) => Trust::Location,
            (Some(_), Some(_)) => bail!("index location {place}: give a key or trust = \"location\", not both"),
            (None, None) => bail!(
                "index location {place}: an index decides what files contain, so say who is believed: the key that signs it \
                 (--index-key KEY, or key = in the configuration file), or the location itself (--index-trust-location, or \
                 trust = \"location\")"
            ),
        };
        Ok(IndexLocation::new(place, trust)?)
    });
    locations.collect()
}

fn read(path: &Path) -> anyhow::Result<FileConfig> {
    let text = std::fs::read_to_string(path).with_context(|| format!("configuration file {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("configuration file {}", path.display()))
}

fn default_store() -> anyhow::Result<PathBuf> {
    if ocifs::mount::is_system_root() {
        return Ok(PathBuf::from("/var/lib/ocifs"));
    }
    let data = std::env::var_os("XDG_DATA_HOME")
        .map(PathBuf::from)
        .filter(|p| p.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/share"));
    let data = data
        .or_else(home)
        .context("no HOME and no XDG_DATA_HOME: say --store DIR")?;
    Ok(data.join("ocifs"))
}
