//! The types of single values: small enumerations, a time span, a store URL.
//!
//! Where: fields of `Config`; parsed by the table of keys, printed by `show`. Pure.
//!
//! Invariants: each type prints what it parses, except that a store URL prints without credentials.
//!
//! When it fails: a reason in words; the table of keys adds what is accepted.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// An enumeration whose values are words, with parsing, printing and the list of words for messages.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal),+ $(,)? } $accepted:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            /// The accepted words, for messages.
            pub(super) const ACCEPTED: &'static str = $accepted;

            /// The value a word stands for.
            pub(super) fn parse(word: &str) -> Result<$name, String> {
                match word {
                    $($word => Ok($name::$variant),)+
                    _ => Err(format!("{word:?} is none of them")),
                }
            }

            /// The word.
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $word),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
    };
}

words! {
    /// The least important message that is still written.
    LogLevel {
        /// Only what needs somebody's attention.
        Error = "error",
        /// Also what works now and may not work later.
        Warn = "warn",
        /// Also starts, stops and rare events.
        Info = "info",
        /// Also each call.
        Debug = "debug",
        /// Everything.
        Trace = "trace",
    }
    "\"error\", \"warn\", \"info\", \"debug\" or \"trace\""
}

words! {
    /// How log messages are written.
    LogFormat {
        /// For people on a terminal, JSON otherwise.
        Auto = "auto",
        /// One line of text for people.
        Human = "human",
        /// One JSON object a line.
        Json = "json",
    }
    "\"auto\", \"human\" or \"json\""
}

words! {
    /// Who may be answered from a layer that is already on this node.
    LayerSharing {
        /// Nobody but the namespace that pulled it.
        Isolated = "isolated",
        /// Every namespace of this node.
        Node = "node",
    }
    "\"isolated\" or \"node\""
}

words! {
    /// Whose layers this node takes from the store.
    TrustMode {
        /// Those that this node published itself, and those of the listed keys.
        Keys = "keys",
        /// Anybody's who can write to the store.
        Any = "any",
    }
    "\"keys\" or \"any\""
}

words! {
    /// Whether containers start on layers that are still being fetched.
    LazyMode {
        /// Where the kernel can.
        Auto = "auto",
        /// Layers are fetched whole first.
        Off = "off",
    }
    "\"auto\" or \"off\""
}

words! {
    /// Whether starts of images are recorded, and what they read is fetched first.
    TraceMode {
        /// Where layers are read lazily.
        Auto = "auto",
        /// Neither.
        Off = "off",
    }
    "\"auto\" or \"off\""
}

words! {
    /// Which layers are put on the store.
    PublishPolicy {
        /// Those that this node pulls.
        Auto = "auto",
        /// Only those that are published by hand.
        Off = "off",
    }
    "\"auto\" or \"off\""
}

/// A size in bytes, written as `0`, `512MiB`, `20GiB` or `1TiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(u64);

impl ByteSize {
    const UNITS: [(&'static str, u64); 4] =
        [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

    /// So many GiB.
    pub const fn from_gib(gib: u64) -> ByteSize {
        ByteSize(gib << 30)
    }

    /// So many MiB.
    pub const fn from_mib(mib: u64) -> ByteSize {
        ByteSize(mib << 20)
    }

    /// So many KiB.
    pub const fn from_kib(kib: u64) -> ByteSize {
        ByteSize(kib << 10)
    }

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Reads a whole number with a unit, or `0`.
    pub fn parse(text: &str) -> Result<ByteSize, String> {
        if text == "0" {
            return Ok(ByteSize(0));
        }
        let found = Self::UNITS.iter().find_map(|(unit, size)| Some((text.strip_suffix(unit)?, size)));
        let Some((number, size)) = found else {
            return Err(format!("{text:?} is not a size; units are KiB, MiB, GiB and TiB"));
        };
        let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        let bytes = if digits { number.parse::<u64>().ok() } else { None };
        bytes
            .and_then(|number| number.checked_mul(*size))
            .filter(|bytes| *bytes <= 1 << 60)
            .map(ByteSize)
            .ok_or_else(|| format!("{text:?} is not a size"))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |(_, size): &&(&str, u64)| self.0 > 0 && self.0.is_multiple_of(*size);
        match Self::UNITS.iter().find(fits) {
            Some((unit, size)) => write!(f, "{}{unit}", self.0 / size),
            None => write!(f, "{}", self.0),
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A share, written as `0%` to `90%`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Percent(u8);

impl Percent {
    /// So many percent.
    pub const fn new(percent: u8) -> Percent {
        Percent(percent)
    }

    /// The number.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// Reads a whole number and a percent sign.
    pub(super) fn parse(text: &str) -> Result<Percent, String> {
        let number = text.strip_suffix('%').filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
        let number = number.and_then(|number| number.parse::<u8>().ok()).filter(|number| *number <= 90);
        number.map(Percent).ok_or_else(|| format!("{text:?} is not a share from 0% to 90%"))
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

impl Serialize for Percent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

words! {
    /// What thin devices are formatted with.
    FileSystem {
        /// ext4.
        Ext4 = "ext4",
        /// xfs.
        Xfs = "xfs",
    }
    "\"ext4\" or \"xfs\""
}

words! {
    /// Where a pool's blocks are.
    PoolMode {
        /// In sparse files below the root, to try it out.
        Loop = "loop",
        /// On devices of its own.
        Direct = "direct",
    }
    "\"loop\" or \"direct\""
}

/// What snapshots are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DriverKind {
    /// Directories, stacked by overlayfs.
    Overlayfs,
    /// Thin devices of a device-mapper pool.
    Thin,
}

impl DriverKind {
    /// The driver a word stands for.
    pub(super) fn parse(word: &str) -> Result<DriverKind, String> {
        match word {
            "overlayfs" => Ok(DriverKind::Overlayfs),
            "thin" if cfg!(feature = "devicemapper") => Ok(DriverKind::Thin),
            "thin" => Err("this build has no devicemapper driver (cargo feature devicemapper)".into()),
            "overlay" => Err("the driver is called \"overlayfs\"".into()),
            "devicemapper" | "devmapper" => Err("the driver is called \"thin\"".into()),
            _ => Err(format!("{word:?} is not a driver of this build")),
        }
    }

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            DriverKind::Overlayfs => "overlayfs",
            DriverKind::Thin => "thin",
        }
    }
}

impl fmt::Display for DriverKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A span of time, written as `500ms`, `30s`, `2m`, `1h` or a sum such as `1m30s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timespan(Duration);

impl Timespan {
    /// So many seconds.
    pub const fn from_secs(seconds: u64) -> Timespan {
        Timespan(Duration::from_secs(seconds))
    }

    /// So many milliseconds.
    pub const fn from_millis(milliseconds: u64) -> Timespan {
        Timespan(Duration::from_millis(milliseconds))
    }

    /// The standard library's type.
    pub const fn duration(self) -> Duration {
        self.0
    }

    /// Reads whole numbers with units, the largest unit first.
    pub(super) fn parse(text: &str) -> Result<Timespan, String> {
        let mut rest = text;
        let mut total = Duration::ZERO;
        let mut last_unit = Duration::MAX;
        while !rest.is_empty() {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let (number, after) = rest.split_at(digits);
            let letters = after.bytes().take_while(u8::is_ascii_alphabetic).count();
            let (unit, after) = after.split_at(letters);
            if digits == 0 {
                return Err(format!("{text:?} is not a time"));
            }
            let unit = match unit {
                "ms" => Duration::from_millis(1),
                "s" => Duration::from_secs(1),
                "m" => Duration::from_secs(60),
                "h" => Duration::from_secs(3600),
                "" => return Err(format!("{text:?} has no unit; units are ms, s, m and h")),
                _ => return Err(format!("{text:?} has an unknown unit; units are ms, s, m and h")),
            };
            if unit >= last_unit {
                return Err(format!("{text:?} has its units out of order"));
            }
            let amount = number.parse().ok().and_then(|number: u32| unit.checked_mul(number));
            total = amount
                .and_then(|amount| total.checked_add(amount))
                .ok_or_else(|| format!("{text:?} is too long a time"))?;
            (last_unit, rest) = (unit, after);
        }
        if last_unit == Duration::MAX {
            return Err("the time is empty".into());
        }
        Ok(Timespan(total))
    }
}

impl fmt::Display for Timespan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = self.0.as_millis();
        if left == 0 {
            return f.write_str("0s");
        }
        for (unit, size) in [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)] {
            if left >= size {
                write!(f, "{}{unit}", left / size)?;
                left %= size;
            }
        }
        Ok(())
    }
}

impl Serialize for Timespan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Where remote layers come from: empty, or a URL that may hold credentials.
///
/// Printing and serialising leave them out; only [`StoreUrl::as_str`] gives the whole text.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct StoreUrl(String);

impl StoreUrl {
    /// Checks what this build can use.
    pub fn parse(text: &str) -> Result<StoreUrl, String> {
        if text.is_empty() {
            return Ok(StoreUrl::default());
        }
        let shown = redact(text);
        if text.chars().any(char::is_control) {
            return Err(format!("{shown:?} holds control characters"));
        }
        if text.contains('@') {
            return Err(format!(
                "{shown:?} holds credentials; give them in the environment (AWS_* variables)"
            ));
        }
        let Some((scheme, rest)) = text.split_once(':') else {
            return Err(format!("{shown:?} is not a URL"));
        };
        let path = match scheme {
            "memory" => Some(rest),
            "file" => Some(rest.strip_prefix("//").unwrap_or(rest)),
            "s3" | "gs" | "az" | "azure" => None,
            _ => return Err(format!("this build has no store for {shown:?}")),
        };
        if path.is_some_and(|path| !Path::new(path).is_absolute()) {
            return Err(format!("the path in {shown:?} is not absolute"));
        }
        if path.is_none() && rest.strip_prefix("//").is_none_or(|bucket| bucket.starts_with(['/', '?'])) {
            return Err(format!("{shown:?} names no bucket"));
        }
        Ok(StoreUrl(text.to_owned()))
    }

    /// Whether there is no store.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The whole URL, with its credentials: not for logs.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redact(&self.0))
    }
}

impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", redact(&self.0))
    }
}

impl Serialize for StoreUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A URL without what may be secret in it: the part before `@`, the query and the fragment.
fn redact(url: &str) -> String {
    let (plain, tail) = match url.find(['?', '#']) {
        Some(at) => (&url[..at], format!("{}***", &url[at..=at])),
        None => (url, String::new()),
    };
    // The last `@` before the path: passwords are not always encoded, and hiding too much does no harm.
    let (scheme, rest) = match plain.split_once("//") {
        Some((scheme, rest)) => (format!("{scheme}//"), rest),
        None => match plain.split_once(':') {
            Some((scheme, rest)) => (format!("{scheme}:"), rest),
            None => (String::new(), plain),
        },
    };
    match rest.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}***@{host}{tail}"),
        None => format!("{scheme}{rest}{tail}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_printed() {
        for (text, milliseconds) in [
            ("500ms", 500),
            ("30s", 30_000),
            ("2m", 120_000),
            ("1h", 3_600_000),
            ("1m30s", 90_000),
            ("1h1ms", 3_600_001),
            ("0s", 0),
        ] {
            let span = Timespan::parse(text).unwrap();
            assert_eq!(span.duration(), Duration::from_millis(milliseconds));
            assert_eq!(span.to_string(), text);
        }
        assert_eq!(Timespan::parse("90s").unwrap().to_string(), "1m30s");
    }

    #[test]
    fn sizes_and_shares_are_read_and_printed() {
        for (text, bytes) in [("0", 0), ("1KiB", 1024), ("512MiB", 512 << 20), ("20GiB", 20 << 30)] {
            let size = ByteSize::parse(text).unwrap();
            assert_eq!((size.bytes(), size.to_string().as_str()), (bytes, text));
        }
        for text in ["", "1", "1GB", "GiB", "-1GiB", "1.5GiB", "99999999999999TiB", "+1GiB"] {
            assert!(ByteSize::parse(text).is_err(), "{text:?}");
        }
        assert_eq!(Percent::parse("20%").unwrap().to_string(), "20%");
        for text in ["", "%", "20", "91%", "-1%", "+2%", "1.5%"] {
            assert!(Percent::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn nonsense_times_are_refused() {
        for text in
            ["", "s", "30", "30 s", "-1s", "1.5s", "1d", "1s1m", "1s1s", "30s ", "99999999999s", "1\u{e9}"]
        {
            assert!(Timespan::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn credentials_are_not_shown() {
        for (url, shown) in [
            ("", ""),
            ("memory:/srv/layers.json", "memory:/srv/layers.json"),
            ("s3://bucket/prefix", "s3://bucket/prefix"),
            ("s3://KEY:secret@host/bucket", "s3://***@host/bucket"),
            ("https://u:p@ss@host/b", "https://***@host/b"),
            ("https://host/b?sig=secret", "https://host/b?***"),
            ("https://u:p@host/b?sig=s#t", "https://***@host/b?***"),
            ("https://host/b#token", "https://host/b#***"),
            ("s3:KEY:secret@host", "s3:***@host"),
            ("KEY-secret@host", "***@host"),
        ] {
            let url = StoreUrl(url.to_owned());
            assert_eq!(url.to_string(), shown);
            assert_eq!(format!("{url:?}"), format!("{shown:?}"));
            assert_eq!(serde_json::to_value(&url).unwrap(), shown);
        }
        let error = StoreUrl::parse("s3://KEY:secret@host/bucket").unwrap_err();
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn only_stores_of_this_build_are_accepted() {
        assert!(StoreUrl::parse("").unwrap().is_empty());
        for text in
            ["memory:/a", "file:///srv/store", "s3://bucket", "s3://bucket/prefix", "gs://b", "az://c/p"]
        {
            assert_eq!(StoreUrl::parse(text).unwrap().as_str(), text);
        }
        for text in [
            "memory",
            "memory:",
            "memory:a",
            "s3:bucket",
            "s3:///x",
            "file://a",
            "ftp://a",
            "/a",
            "memory:/a\u{7f}",
        ] {
            assert!(StoreUrl::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_driver_of_a_later_build_is_named() {
        assert_eq!(DriverKind::parse("overlayfs"), Ok(DriverKind::Overlayfs));
        assert!(DriverKind::parse("devicemapper").unwrap_err().contains("thin"));
        assert!(DriverKind::parse("overlay").unwrap_err().contains("overlayfs"));
        assert!(DriverKind::parse("zfs").is_err());
    }
}
