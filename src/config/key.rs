//! The table of keys: one row says how a key is called, what it accepts and how it is read and shown.
//!
//! Where: `config` walks the table for every layer; `show` walks it to print. A new key is one more row here, one
//! field of [`Config`] and a paragraph in `config/speedy.toml`; a test fails until all three are there.
//!
//! Words: *given* is a value before anybody looked at it: typed when it comes from TOML, a bare *word* when it comes
//! from the environment or a flag.
//!
//! Invariants: a setter either stores a valid value or leaves the configuration as it was.
//!
//! When it fails: a [`Problem`], which the caller joins with the key, the place and what is accepted. It never
//! repeats a value that may hold a secret.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::check::{
    device_path, keep_rules, loopback, mount_options, patterns, plugin_name, rate, root_path, size_from,
    size_or_none, socket_path, time_limit, trusted_keys,
};
use super::value::{
    ByteSize, DriverKind, FileSystem, LayerSharing, LazyMode, LogFormat, LogLevel, Percent, PoolMode,
    PublishPolicy, StoreUrl, Timespan, TraceMode, TrustMode,
};
use super::{Config, FILE_VARIABLE, PREFIX, show};

/// One row of the table.
pub(super) struct Key {
    /// The dotted name.
    pub(super) name: &'static str,
    /// What is accepted, for the user.
    pub(super) accepted: &'static str,
    /// Checks a value and stores it.
    pub(super) set: fn(&mut Config, Given) -> Result<(), Problem>,
    /// The value in force, without secrets.
    pub(super) show: fn(&Config) -> Value,
}

/// A value before anybody looked at it.
pub(super) enum Given {
    /// A TOML string.
    Text(String),
    /// A TOML boolean.
    Flag(bool),
    /// A TOML integer, as it is written.
    Number(String),
    /// A TOML array of strings.
    List(Vec<String>),
    /// Any other TOML value: its type, with the article.
    Other(&'static str),
    /// Untyped text from the environment or a flag.
    Word(String),
}

/// Why a value is refused.
pub(super) enum Problem {
    /// It has the wrong type: the type found, with the article.
    Type(&'static str),
    /// It has the right type and is still no good.
    Value(String),
}

/// A [`Problem`] with the value itself.
pub(super) fn value(reason: impl Into<String>) -> Problem {
    Problem::Value(reason.into())
}

impl Given {
    /// A path from a flag. What is not UTF-8 becomes the replacement character, which no path key accepts.
    pub(super) fn from_path(path: &Path) -> Given {
        Given::Word(path.to_string_lossy().into_owned())
    }

    fn text(self) -> Result<String, Problem> {
        match self {
            Given::Text(text) | Given::Word(text) => Ok(text),
            Given::Flag(_) => Err(Problem::Type("a boolean")),
            Given::Number(_) => Err(Problem::Type("an integer")),
            Given::List(_) => Err(Problem::Type("an array")),
            Given::Other(found) => Err(Problem::Type(found)),
        }
    }

    fn number(self) -> Result<u64, Problem> {
        match self {
            Given::Number(text) | Given::Word(text) => {
                text.parse().map_err(|_| value(format!("{text:?} is not a whole number")))
            }
            Given::Text(_) => Err(Problem::Type("a string")),
            Given::Flag(_) => Err(Problem::Type("a boolean")),
            Given::List(_) => Err(Problem::Type("an array")),
            Given::Other(found) => Err(Problem::Type(found)),
        }
    }

    fn flag(self) -> Result<bool, Problem> {
        match self {
            Given::Flag(flag) => Ok(flag),
            Given::Word(word) => match word.as_str() {
                "true" | "1" => Ok(true),
                "false" | "0" => Ok(false),
                _ => Err(value(format!("{word:?} is neither true nor false"))),
            },
            Given::Text(_) => Err(Problem::Type("a string")),
            Given::Number(_) => Err(Problem::Type("an integer")),
            Given::List(_) => Err(Problem::Type("an array")),
            Given::Other(found) => Err(Problem::Type(found)),
        }
    }

    fn list(self) -> Result<Vec<String>, Problem> {
        match self {
            Given::List(list) => Ok(list),
            Given::Word(word) if word.is_empty() => Ok(Vec::new()),
            Given::Word(word) => Ok(word.split(',').map(|item| item.trim().to_owned()).collect()),
            Given::Text(_) => Err(Problem::Type("a string")),
            Given::Flag(_) => Err(Problem::Type("a boolean")),
            Given::Number(_) => Err(Problem::Type("an integer")),
            Given::Other(found) => Err(Problem::Type(found)),
        }
    }
}

/// Every key, in the order in which it is printed and documented.
pub(super) const KEYS: &[Key] = &[
    Key {
        name: "root",
        accepted: "an absolute path other than /, without the characters : , \\ and \"",
        set: |config, given| root_path(&given.text()?).map(|path| config.root = path),
        show: |config| json!(config.root),
    },
    Key {
        name: "address",
        accepted: "an absolute path of a unix socket, at most 107 bytes long",
        set: |config, given| socket_path(&given.text()?).map(|path| config.address = path),
        show: |config| json!(config.address),
    },
    Key {
        name: "keeper",
        accepted: "\"\" for one beside `address`, or an absolute path of a unix socket, at most 107 bytes long",
        set: |config, given| match given.text()? {
            text if text.is_empty() => {
                config.keeper = PathBuf::new();
                Ok(())
            }
            text => socket_path(&text).map(|path| config.keeper = path),
        },
        show: |config| json!(config.keeper),
    },
    Key {
        name: "containerd",
        accepted: "an absolute path of a unix socket, at most 107 bytes long",
        set: |config, given| socket_path(&given.text()?).map(|path| config.containerd = path),
        show: |config| json!(config.containerd),
    },
    Key {
        name: "driver",
        accepted: "\"overlayfs\" or \"thin\"",
        set: |config, given| {
            DriverKind::parse(&given.text()?).map(|kind| config.driver = kind).map_err(value)
        },
        show: |config| json!(config.driver),
    },
    Key {
        name: "store",
        accepted: "\"\" for no store, \"file:///DIRECTORY\", \"s3://BUCKET/PREFIX\", \"gs://BUCKET/PREFIX\", \
                   \"az://CONTAINER/PREFIX\", or \"memory:/absolute/path/layers.json\"",
        set: |config, given| StoreUrl::parse(&given.text()?).map(|url| config.store = url).map_err(value),
        show: |config| json!(config.store),
    },
    Key {
        name: "pin",
        accepted: "a list of patterns of image names such as [\"registry.k8s.io/pause:*\"]",
        set: |config, given| patterns(given.list()?).map(|pin| config.pin = pin),
        show: |config| json!(config.pin),
    },
    Key {
        name: "metrics",
        accepted: "\"\" for none, or a loopback address and port such as \"127.0.0.1:9890\" or \"[::1]:9890\"",
        set: |config, given| loopback(&given.text()?).map(|address| config.metrics = address),
        show: |config| json!(show::address_text(config.metrics)),
    },
    Key {
        name: "registry",
        accepted: "\"\" for none, or a loopback address and port such as \"127.0.0.1:5051\" or \"[::1]:5051\"",
        set: |config, given| loopback(&given.text()?).map(|address| config.registry = address),
        show: |config| json!(show::address_text(config.registry)),
    },
    Key {
        name: "log.level",
        accepted: LogLevel::ACCEPTED,
        set: |config, given| {
            LogLevel::parse(&given.text()?).map(|level| config.log.level = level).map_err(value)
        },
        show: |config| json!(config.log.level),
    },
    Key {
        name: "log.format",
        accepted: LogFormat::ACCEPTED,
        set: |config, given| {
            LogFormat::parse(&given.text()?).map(|format| config.log.format = format).map_err(value)
        },
        show: |config| json!(config.log.format),
    },
    Key {
        name: "overlayfs.mount_options",
        accepted: "a list of overlayfs options such as [\"volatile\"], without those that Speedy sets itself",
        set: |config, given| mount_options(given.list()?).map(|list| config.overlayfs.mount_options = list),
        show: |config| json!(config.overlayfs.mount_options),
    },
    Key {
        name: "overlayfs.upperdir_label",
        accepted: "true or false",
        set: |config, given| given.flag().map(|flag| config.overlayfs.upperdir_label = flag),
        show: |config| json!(config.overlayfs.upperdir_label),
    },
    Key {
        name: "thin.root",
        accepted: "\"\" for none, or an absolute path other than /, without the characters : , \\ and \"",
        set: |config, given| match given.text()? {
            text if text.is_empty() => {
                config.thin.root = PathBuf::new();
                Ok(())
            }
            text => root_path(&text).map(|path| config.thin.root = path),
        },
        show: |config| json!(config.thin.root),
    },
    Key {
        name: "thin.name",
        accepted: "a name of letters, digits, \"-\", \"_\" and \".\", such as \"speedy-thin\"",
        set: |config, given| plugin_name(&given.text()?).map(|name| config.thin.name = name),
        show: |config| json!(config.thin.name),
    },
    Key {
        name: "thin.fs",
        accepted: FileSystem::ACCEPTED,
        set: |config, given| FileSystem::parse(&given.text()?).map(|fs| config.thin.fs = fs).map_err(value),
        show: |config| json!(config.thin.fs),
    },
    Key {
        name: "thin.size",
        accepted: "a size from \"16MiB\" (ext4) or \"300MiB\" (xfs) to \"16TiB\"",
        set: |config, given| {
            let size = size_from(ByteSize::from_mib(16), ByteSize::from_gib(16 << 10), &given.text()?);
            size.map(|size| config.thin.size = size)
        },
        show: |config| json!(config.thin.size),
    },
    Key {
        name: "thin.mount_options",
        accepted: "a list of options of the file system such as [\"discard\"], without those that Speedy sets itself",
        set: |config, given| mount_options(given.list()?).map(|list| config.thin.mount_options = list),
        show: |config| json!(config.thin.mount_options),
    },
    Key {
        name: "thin.discard",
        accepted: "true or false",
        set: |config, given| given.flag().map(|flag| config.thin.discard = flag),
        show: |config| json!(config.thin.discard),
    },
    Key {
        name: "pool.mode",
        accepted: PoolMode::ACCEPTED,
        set: |config, given| {
            PoolMode::parse(&given.text()?).map(|mode| config.pool.mode = mode).map_err(value)
        },
        show: |config| json!(config.pool.mode),
    },
    Key {
        name: "pool.size",
        accepted: "a size from \"64MiB\" to \"64TiB\"",
        set: |config, given| {
            let size = size_from(ByteSize::from_mib(64), ByteSize::from_gib(64 << 10), &given.text()?);
            size.map(|size| config.pool.size = size)
        },
        show: |config| json!(config.pool.size),
    },
    Key {
        name: "pool.data",
        accepted: "\"\" for none, or the absolute path of a block device",
        set: |config, given| device_path(&given.text()?).map(|path| config.pool.data = path),
        show: |config| json!(config.pool.data),
    },
    Key {
        name: "pool.metadata",
        accepted: "\"\" for none, or the absolute path of a block device",
        set: |config, given| device_path(&given.text()?).map(|path| config.pool.metadata = path),
        show: |config| json!(config.pool.metadata),
    },
    Key {
        name: "pool.reserve",
        accepted: "a share of the pool, from \"0%\" to \"90%\"",
        set: |config, given| {
            Percent::parse(&given.text()?).map(|share| config.pool.reserve = share).map_err(value)
        },
        show: |config| json!(config.pool.reserve),
    },
    Key {
        name: "cleanup.time_limit",
        accepted: "a time from \"1ms\" to \"1h\", such as \"500ms\", \"30s\" or \"2m\"",
        set: |config, given| time_limit(&given.text()?).map(|limit| config.cleanup.time_limit = limit),
        show: |config| json!(config.cleanup.time_limit),
    },
    Key {
        name: "layers.share",
        accepted: LayerSharing::ACCEPTED,
        set: |config, given| {
            LayerSharing::parse(&given.text()?).map(|share| config.layers.share = share).map_err(value)
        },
        show: |config| json!(config.layers.share),
    },
    Key {
        name: "layers.budget",
        accepted: "a size such as \"0\", \"512MiB\" or \"20GiB\"",
        set: |config, given| {
            ByteSize::parse(&given.text()?).map(|size| config.layers.budget = size).map_err(value)
        },
        show: |config| json!(config.layers.budget),
    },
    Key {
        name: "layers.keep_free",
        accepted: "a share of the file system, from \"0%\" to \"90%\"",
        set: |config, given| {
            Percent::parse(&given.text()?).map(|share| config.layers.keep_free = share).map_err(value)
        },
        show: |config| json!(config.layers.keep_free),
    },
    Key {
        name: "layers.limit",
        accepted: "\"0\" for none, or a size from \"16MiB\" to \"4096TiB\"",
        set: |config, given| {
            let limit = size_or_none(ByteSize::from_mib(16), ByteSize::from_gib(4096 << 10), &given.text()?);
            limit.map(|limit| config.layers.limit = limit)
        },
        show: |config| json!(config.layers.limit),
    },
    Key {
        name: "limits.size",
        accepted: "a size from \"1MiB\" to \"4TiB\"",
        set: |config, given| {
            let size = size_from(ByteSize::from_mib(1), ByteSize::from_gib(4096), &given.text()?);
            size.map(|size| config.limits.size = size)
        },
        show: |config| json!(config.limits.size),
    },
    Key {
        name: "limits.entries",
        accepted: "a whole number from 1000 to 100000000",
        set: |config, given| match given.number()? {
            entries @ 1000..=100_000_000 => {
                config.limits.entries = entries;
                Ok(())
            }
            other => Err(value(format!("{other} is out of range"))),
        },
        show: |config| json!(config.limits.entries),
    },
    Key {
        name: "limits.metadata",
        accepted: "a size from \"1MiB\" to \"1GiB\"",
        set: |config, given| {
            let size = size_from(ByteSize::from_mib(1), ByteSize::from_gib(1), &given.text()?);
            size.map(|size| config.limits.metadata = size)
        },
        show: |config| json!(config.limits.metadata),
    },
    Key {
        name: "fetch.deadline",
        accepted: "a time from \"1ms\" to \"1h\", such as \"500ms\" or \"5s\"",
        set: |config, given| time_limit(&given.text()?).map(|limit| config.fetch.deadline = limit),
        show: |config| json!(config.fetch.deadline),
    },
    Key {
        name: "fetch.lazy",
        accepted: LazyMode::ACCEPTED,
        set: |config, given| {
            LazyMode::parse(&given.text()?).map(|lazy| config.fetch.lazy = lazy).map_err(value)
        },
        show: |config| json!(config.fetch.lazy),
    },
    Key {
        name: "fetch.traces",
        accepted: TraceMode::ACCEPTED,
        set: |config, given| {
            TraceMode::parse(&given.text()?).map(|traces| config.fetch.traces = traces).map_err(value)
        },
        show: |config| json!(config.fetch.traces),
    },
    Key {
        name: "fetch.rate",
        accepted: "\"0\" for no limit, or a size from \"64KiB\" to \"16GiB\", each second",
        set: |config, given| rate(&given.text()?).map(|rate| config.fetch.rate = rate),
        show: |config| json!(config.fetch.rate),
    },
    Key {
        name: "scrub.rate",
        accepted: "\"0\" for off, or a size from \"64KiB\" to \"16GiB\", each second",
        set: |config, given| rate(&given.text()?).map(|rate| config.scrub.rate = rate),
        show: |config| json!(config.scrub.rate),
    },
    Key {
        name: "scrub.every",
        accepted: "a time from \"1s\" to \"8760h\", such as \"24h\"",
        set: |config, given| match Timespan::parse(&given.text()?).map_err(value)? {
            every if every < Timespan::from_secs(1) || every > Timespan::from_secs(8760 * 3600) => {
                Err(value(format!("{every} is out of range")))
            }
            every => {
                config.scrub.every = every;
                Ok(())
            }
        },
        show: |config| json!(config.scrub.every),
    },
    Key {
        name: "scrub.store",
        accepted: "\"0\" for off, or a size from \"64KiB\" to \"16GiB\", each second",
        set: |config, given| rate(&given.text()?).map(|rate| config.scrub.store = rate),
        show: |config| json!(config.scrub.store),
    },
    Key {
        name: "publish.policy",
        accepted: PublishPolicy::ACCEPTED,
        set: |config, given| {
            PublishPolicy::parse(&given.text()?).map(|policy| config.publish.policy = policy).map_err(value)
        },
        show: |config| json!(config.publish.policy),
    },
    Key {
        name: "gc.keep",
        accepted: "a list of rules such as [\"registry.example/ci/* age<14d used<7d newest=5\"]",
        set: |config, given| keep_rules(given.list()?).map(|rules| config.gc.keep = rules),
        show: |config| json!(config.gc.keep),
    },
    Key {
        name: "trust.mode",
        accepted: TrustMode::ACCEPTED,
        set: |config, given| {
            TrustMode::parse(&given.text()?).map(|mode| config.trust.mode = mode).map_err(value)
        },
        show: |config| json!(config.trust.mode),
    },
    Key {
        name: "trust.keys",
        accepted: "a list of public keys such as [\"ed25519:...\"], as `speedy trust` prints them",
        set: |config, given| trusted_keys(given.list()?).map(|keys| config.trust.keys = keys),
        show: |config| json!(config.trust.keys),
    },
];

/// The key with this dotted name.
pub(super) fn by_name(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// The key that this variable stands for.
pub(super) fn by_variable(variable: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| variable_of(key) == variable)
}

/// The variable that stands for a key.
fn variable_of(key: &Key) -> String {
    format!("{PREFIX}{}", key.name.replace('.', "_").to_uppercase())
}

/// The known key most like `name`.
pub(super) fn nearest(name: &str) -> &'static str {
    most_like(name, KEYS.iter().map(|key| key.name)).unwrap_or(KEYS[0].name)
}

/// The known variable most like `name`.
pub(super) fn nearest_variable(name: &str) -> String {
    let known = KEYS.iter().map(variable_of).chain([FILE_VARIABLE.to_owned()]);
    most_like(name, known).unwrap_or_else(|| FILE_VARIABLE.to_owned())
}

/// The candidate that shares most with `name`, read whole or by its last part: people forget the table more often
/// than they misspell a word.
fn most_like<S: AsRef<str>>(name: &str, candidates: impl Iterator<Item = S>) -> Option<S> {
    let tidy = |text: &str| text.to_lowercase().replace(['-', '_'], "");
    let last = |text: &str| text.rsplit('.').next().unwrap_or_default().to_owned();
    let wanted = tidy(name);
    let score = |candidate: &S| {
        let known = tidy(candidate.as_ref());
        let whole = strsim::normalized_damerau_levenshtein(&wanted, &known);
        let tail = strsim::normalized_damerau_levenshtein(&last(&wanted), &last(&known));
        // Where the last parts are equal the tables decide.
        (whole.max(tail * 0.95), whole)
    };
    candidates.max_by(|a, b| {
        let (a, b) = (score(a), score(b));
        a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))
    })
}
