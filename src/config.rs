//! What the user wants: defaults, a TOML file, the environment and flags, laid over one another.
//!
//! Where: the only reader of configuration files and of the environment. `cli` calls [`load`] once; `daemon` takes
//! the values apart and hands each module the few it needs; `speedy config` prints the result with
//! [`Effective::to_human`] or [`Effective::to_json`].
//!
//! Words: a *key* is a dotted name such as `log.level`; it is the path in the TOML file, the variable
//! `SPEEDY_LOG_LEVEL` in the environment and, for the most used ones, a flag. A *source* says where the value in
//! force came from. A *place* says where a mistake is, down to the line of a file.
//!
//! Invariants:
//! 1. Flags win over the environment, the environment over the file, the file over the defaults; per key.
//! 2. Every key and value given is known and valid, or nothing is loaded: an ignored setting is a trap. Only a variable of
//!    the environment that stands for nothing is ignored, and reported ([`UnknownVariable`]).
//! 3. Every key has exactly one entry in [`Effective::sources`].
//! 4. Credentials inside a store URL leave this module only through [`StoreUrl::as_str`]; printing redacts them.
//!
//! When it fails: [`ConfigError`] names the key, where it was given and what is accepted. Loading changes nothing,
//! so there is nothing to clean up.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Serialize;

mod check;
mod file;
mod key;
mod show;
mod value;

#[cfg(test)]
mod tests;

pub use file::toml_to_json;
pub use value::{
    ByteSize, DriverKind, FileSystem, LayerSharing, LazyMode, LogFormat, LogLevel, Percent, PoolMode,
    PublishPolicy, StoreUrl, Timespan, TraceMode, TrustMode,
};

use key::{Given, KEYS, Key, Problem};

/// The file that is read when none is named.
pub const DEFAULT_FILE: &str = "/etc/speedy/speedy.toml";

/// The first part of every variable of ours.
const PREFIX: &str = "SPEEDY_";
/// The variable that stands for `--config`.
const FILE_VARIABLE: &str = "SPEEDY_CONFIG";

/// Every value Speedy can be told, as used: parsed and checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Config {
    /// Where snapshots and their metadata live.
    pub root: PathBuf,
    /// The unix socket that containerd talks to.
    pub address: PathBuf,
    /// The socket of the process that keeps descriptors for the daemon. Never empty after [`load`].
    pub keeper: PathBuf,
    /// containerd's own socket, for version detection and checks.
    pub containerd: PathBuf,
    /// What snapshots are made of.
    pub driver: DriverKind,
    /// Where remote layers come from; empty for nowhere.
    pub store: StoreUrl,
    /// Patterns of the names of images that are to be here whole before they start, and to stay.
    pub pin: Vec<String>,
    /// The loopback address of the status page and of the metrics.
    #[serde(serialize_with = "show::address")]
    pub metrics: Option<SocketAddr>,
    /// The loopback address that answers as a registry while the real one is away.
    #[serde(serialize_with = "show::address")]
    pub registry: Option<SocketAddr>,
    /// What is logged and how.
    pub log: LogConfig,
    /// The overlayfs driver.
    pub overlayfs: OverlayfsConfig,
    /// The driver of thin devices.
    pub thin: ThinConfig,
    /// The pool of thin devices.
    pub pool: PoolConfig,
    /// The removal of what snapshots leave behind.
    pub cleanup: CleanupConfig,
    /// The use of layers that are already on this node.
    pub layers: LayersConfig,
    /// What a layer may have at most.
    pub limits: LimitsConfig,
    /// Taking layers from the store.
    pub fetch: FetchConfig,
    /// Checking what is here.
    pub scrub: ScrubConfig,
    /// Putting layers on the store.
    pub publish: PublishConfig,
    /// Which images the store keeps.
    pub gc: GcConfig,
    /// Whose layers are taken.
    pub trust: TrustConfig,
}

/// What is logged and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LogConfig {
    /// The least important message that is still written.
    pub level: LogLevel,
    /// How a message is written.
    pub format: LogFormat,
}

/// The overlayfs driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OverlayfsConfig {
    /// Options added to every overlay mount.
    pub mount_options: Vec<String>,
    /// Whether `Stat` and `List` show the upper directory of a snapshot as a label.
    pub upperdir_label: bool,
}

/// The driver of thin devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ThinConfig {
    /// Where it keeps its records beside another driver; empty where it has the main root, or is not used.
    pub root: PathBuf,
    /// The snapshotter's name in containerd, where it is beside another driver.
    pub name: String,
    /// What each device is formatted with.
    pub fs: FileSystem,
    /// How large each is.
    pub size: ByteSize,
    /// Options added to every mount that is written to.
    pub mount_options: Vec<String>,
    /// Whether the blocks of a removed snapshot are discarded below the pool.
    pub discard: bool,
}

/// The pool of thin devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PoolConfig {
    /// Where its blocks are.
    pub mode: PoolMode,
    /// Of a pool in files: how large.
    pub size: ByteSize,
    /// Of a pool on devices: where the data are.
    pub data: PathBuf,
    /// Of a pool on devices: where the metadata are.
    pub metadata: PathBuf,
    /// The share of it that is kept free.
    pub reserve: Percent,
}

/// The removal of what snapshots leave behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CleanupConfig {
    /// How long one `Cleanup` call works before it answers.
    pub time_limit: Timespan,
}

/// The use of layers that are already on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LayersConfig {
    /// Who may be answered from a layer that somebody else pulled.
    pub share: LayerSharing,
    /// What layer images that no snapshot uses may take.
    pub budget: ByteSize,
    /// The share of the root's file system below which unused layer images are removed.
    pub keep_free: Percent,
    /// What all layer images may take, those in use included; 0 for no limit.
    pub limit: ByteSize,
}

/// What a layer may have at most, so that a hostile one does not fill a node's disk or memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LimitsConfig {
    /// Bytes of it, uncompressed.
    pub size: ByteSize,
    /// Files and directories of its image.
    pub entries: u64,
    /// Metadata of its image.
    pub metadata: ByteSize,
}

/// Taking layers from the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FetchConfig {
    /// How long a Prepare may look for its layer before it is pulled as usual.
    pub deadline: Timespan,
    /// Whether containers start before their layers are here.
    pub lazy: LazyMode,
    /// Whether starts are recorded, and what they read is fetched first.
    pub traces: TraceMode,
    /// How much is fetched each second that nobody waits for; 0 for no limit.
    pub rate: ByteSize,
}

/// Checking what is here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ScrubConfig {
    /// How much of the layer images is read again each second; 0 for nothing.
    pub rate: ByteSize,
    /// How long one that was checked is left alone.
    pub every: Timespan,
    /// How much of the store is read again each second; 0 for nothing.
    pub store: ByteSize,
}

/// Putting layers on the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PublishConfig {
    /// Which.
    pub policy: PublishPolicy,
}

/// What `speedy gc` goes by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GcConfig {
    /// Rules for the names of images.
    pub keep: Vec<String>,
}

/// Whose layers are taken from the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TrustConfig {
    /// Whether only known publishers are trusted.
    pub mode: TrustMode,
    /// The publishers that are trusted beside this node itself.
    pub keys: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            root: "/var/lib/speedy".into(),
            address: "/run/speedy/speedy.sock".into(),
            keeper: "/run/speedy/speedy-keeper.sock".into(),
            containerd: "/run/containerd/containerd.sock".into(),
            driver: DriverKind::Overlayfs,
            store: StoreUrl::default(),
            pin: Vec::new(),
            metrics: None,
            registry: None,
            log: LogConfig { level: LogLevel::Info, format: LogFormat::Auto },
            overlayfs: OverlayfsConfig { mount_options: Vec::new(), upperdir_label: false },
            thin: ThinConfig {
                root: PathBuf::new(),
                name: "speedy-thin".into(),
                fs: FileSystem::Ext4,
                size: ByteSize::from_gib(10),
                mount_options: vec!["discard".into()],
                discard: true,
            },
            pool: PoolConfig {
                mode: PoolMode::Loop,
                size: ByteSize::from_gib(100),
                data: PathBuf::new(),
                metadata: PathBuf::new(),
                reserve: Percent::new(10),
            },
            cleanup: CleanupConfig { time_limit: Timespan::from_secs(30) },
            layers: LayersConfig {
                share: LayerSharing::Isolated,
                budget: ByteSize::from_gib(20),
                keep_free: Percent::new(20),
                limit: ByteSize::from_mib(0),
            },
            limits: LimitsConfig {
                size: ByteSize::from_gib(256),
                entries: 2_000_000,
                metadata: ByteSize::from_mib(512),
            },
            fetch: FetchConfig {
                deadline: Timespan::from_secs(5),
                lazy: LazyMode::Auto,
                traces: TraceMode::Auto,
                rate: ByteSize::from_kib(0),
            },
            scrub: ScrubConfig {
                rate: ByteSize::from_mib(8),
                every: Timespan::from_secs(7 * 24 * 3600),
                store: ByteSize::from_kib(0),
            },
            publish: PublishConfig { policy: PublishPolicy::Auto },
            gc: GcConfig { keep: Vec::new() },
            trust: TrustConfig { mode: TrustMode::Keys, keys: Vec::new() },
        }
    }
}

/// The settings that can be given on the command line; `None` where the flag is absent.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// `--config`: the file to read instead of [`DEFAULT_FILE`].
    pub config: Option<PathBuf>,
    /// `--root`
    pub root: Option<PathBuf>,
    /// `--address`
    pub address: Option<PathBuf>,
    /// `--socket` of `speedy keeper`
    pub keeper: Option<PathBuf>,
    /// `--containerd`
    pub containerd: Option<PathBuf>,
    /// `--log-level`
    pub log_level: Option<String>,
    /// `--store`
    pub store: Option<String>,
    /// `--metrics`
    pub metrics: Option<String>,
    /// `--registry`
    pub registry: Option<String>,
    /// `--trust`
    pub trust: Option<String>,
}

impl Flags {
    /// The flags that were given, by key, with the name of the flag.
    fn given(&self) -> impl Iterator<Item = (&'static str, &'static str, Given)> {
        let path = |value: &Option<PathBuf>| value.as_ref().map(|path| Given::from_path(path));
        let word = |value: &Option<String>| value.clone().map(Given::Word);
        [
            ("root", "--root", path(&self.root)),
            ("address", "--address", path(&self.address)),
            ("keeper", "--socket", path(&self.keeper)),
            ("containerd", "--containerd", path(&self.containerd)),
            ("log.level", "--log-level", word(&self.log_level)),
            ("store", "--store", word(&self.store)),
            ("metrics", "--metrics", word(&self.metrics)),
            ("registry", "--registry", word(&self.registry)),
            ("trust.mode", "--trust", word(&self.trust)),
        ]
        .into_iter()
        .filter_map(|(key, flag, given)| Some((key, flag, given?)))
    }
}

/// Where the value in force came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "from", content = "name", rename_all = "lowercase")]
pub enum Source {
    /// Nobody said anything.
    Default,
    /// A configuration file.
    File(PathBuf),
    /// A variable of the environment.
    Env(String),
    /// A flag of the command line.
    Flag(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Default => write!(f, "default"),
            Source::File(path) => write!(f, "{}", path.display()),
            Source::Env(name) | Source::Flag(name) => write!(f, "{name}"),
        }
    }
}

/// Where a mistake is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A line of a file.
    File {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
    },
    /// A variable of the environment.
    Env(String),
    /// A flag of the command line.
    Flag(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File { path, line } => write!(f, "{}:{line}", path.display()),
            Place::Env(name) => write!(f, "environment variable {name}"),
            Place::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// Why no configuration could be made.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file that was named, or that exists, cannot be read.
    #[error("cannot read the configuration file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("{place}: not valid TOML: {reason}")]
    Syntax {
        /// Where.
        place: Place,
        /// What the parser said.
        reason: String,
    },
    /// A key that Speedy does not have.
    #[error("{place}: unknown key {key:?}; did you mean {nearest:?}?")]
    UnknownKey {
        /// Where.
        place: Place,
        /// The key as given.
        key: String,
        /// The known key that is most like it.
        nearest: &'static str,
    },
    /// A value of another type than the key has.
    #[error("{place}: {key} is {found}; accepted: {accepted}")]
    WrongType {
        /// Where.
        place: Place,
        /// The key.
        key: &'static str,
        /// The type that was found, with its article.
        found: &'static str,
        /// What would be right.
        accepted: &'static str,
    },
    /// A value that cannot be used.
    #[error("{place}: {key}: {reason}; accepted: {accepted}")]
    BadValue {
        /// Where.
        place: Place,
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        reason: String,
        /// What would be right.
        accepted: &'static str,
    },
}

/// The configuration in force and where each value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    /// The values.
    pub config: Config,
    /// The source of each key.
    pub sources: BTreeMap<String, Source>,
    /// What was ignored.
    pub unknown_variables: Vec<UnknownVariable>,
}

/// A variable with our prefix that stands for no key. Ignored, but said: it may be a mistake, or somebody else's (Kubernetes
/// puts `SPEEDY_SERVICE_HOST` and more into every pod beside a service called `speedy`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownVariable {
    /// The variable.
    pub name: String,
    /// The known variable that is most like it.
    pub nearest: String,
}

impl fmt::Display for UnknownVariable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "environment variable {} is ignored: there is no such setting; did you mean {}?",
            self.name, self.nearest
        )
    }
}

/// The variables of this process that concern us; bytes that are no text become the replacement character and are
/// refused where they matter.
pub fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
        .filter(|(name, _)| name.starts_with(PREFIX))
}

/// Lays defaults, file, environment and flags over one another.
///
/// Variables that do not begin with `SPEEDY_` are ignored, so `std::env::vars()` can be passed as it is. The file is
/// `--config`, else `SPEEDY_CONFIG`, else [`DEFAULT_FILE`] if it is there.
pub fn load(
    flags: &Flags,
    environment: impl Iterator<Item = (String, String)>,
) -> Result<Effective, ConfigError> {
    load_with_default(flags, environment, Path::new(DEFAULT_FILE))
}

/// [`load`] with another default file, for tests that must not see the machine's.
pub fn load_with_default(
    flags: &Flags,
    environment: impl Iterator<Item = (String, String)>,
    default_file: &Path,
) -> Result<Effective, ConfigError> {
    let mut variables: BTreeMap<String, String> =
        environment.filter(|(name, _)| name.starts_with(PREFIX)).collect();
    let named = variables.remove(FILE_VARIABLE).filter(|name| !name.is_empty()).map(PathBuf::from);

    let mut effective = Effective::defaults();
    let path = flags.config.clone().or(named);
    let optional = path.is_none();
    let path = path.unwrap_or_else(|| default_file.to_owned());
    if let Some(text) = read(&path, optional)? {
        for (key, line, given) in file::entries(&path, &text)? {
            let place = Place::File { path: path.clone(), line };
            effective.set(key, given, Source::File(path.clone()), place)?;
        }
    }
    for (name, value) in variables {
        let Some(key) = key::by_variable(&name) else {
            effective.unknown_variables.push(UnknownVariable { nearest: key::nearest_variable(&name), name });
            continue;
        };
        effective.set(key, Given::Word(value), Source::Env(name.clone()), Place::Env(name))?;
    }
    for (name, flag, given) in flags.given() {
        let key = key::by_name(name).expect("each flag stands for a key of the table");
        effective.set(key, given, Source::Flag(flag.into()), Place::Flag(flag.into()))?;
    }
    effective.complete();
    Ok(effective)
}

impl Effective {
    /// What holds when nobody says anything.
    pub fn defaults() -> Effective {
        let sources = KEYS.iter().map(|key| (key.name.to_owned(), Source::Default)).collect();
        Effective { config: Config::default(), sources, unknown_variables: Vec::new() }
    }

    /// Fills in what follows from other keys.
    fn complete(&mut self) {
        let unsaid = self.sources.get("keeper") == Some(&Source::Default);
        if unsaid || self.config.keeper.as_os_str().is_empty() {
            self.config.keeper = keeper_beside(&self.config.address);
        }
    }

    fn set(&mut self, key: &Key, given: Given, source: Source, place: Place) -> Result<(), ConfigError> {
        let (name, accepted) = (key.name, key.accepted);
        (key.set)(&mut self.config, given).map_err(|problem| match problem {
            Problem::Type(found) => ConfigError::WrongType { place, key: name, found, accepted },
            Problem::Value(reason) => ConfigError::BadValue { place, key: name, reason, accepted },
        })?;
        self.sources.insert(name.to_owned(), source);
        Ok(())
    }
}

/// Where the keeper is when nobody says: beside the daemon's socket, so that two daemons have two keepers.
fn keeper_beside(address: &Path) -> PathBuf {
    let mut name = address.file_stem().unwrap_or_default().to_owned();
    name.push("-keeper.sock");
    address.with_file_name(name)
}

/// The text of a file; `None` when it may be absent and is.
fn read(path: &Path, optional: bool) -> Result<Option<String>, ConfigError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if optional && error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
    }
}
