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

/// What snapshots are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DriverKind {
    /// Directories, stacked by overlayfs.
    Overlayfs,
}

impl DriverKind {
    /// The driver a word stands for.
    pub(super) fn parse(word: &str) -> Result<DriverKind, String> {
        match word {
            "overlayfs" => Ok(DriverKind::Overlayfs),
            "overlay" => Err("the driver is called \"overlayfs\"".into()),
            "devicemapper" | "devmapper" => Err("this build has no devicemapper driver".into()),
            _ => Err(format!("{word:?} is not a driver of this build")),
        }
    }

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            DriverKind::Overlayfs => "overlayfs",
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
    pub(super) fn parse(text: &str) -> Result<StoreUrl, String> {
        if text.is_empty() {
            return Ok(StoreUrl::default());
        }
        let shown = redact(text);
        let Some((scheme, path)) = text.split_once(':') else {
            return Err(format!("{shown:?} is not a URL"));
        };
        if scheme != "memory" {
            return Err(format!("this build has no store for {shown:?}"));
        }
        if text.chars().any(char::is_control) {
            return Err(format!("{shown:?} holds control characters"));
        }
        if !Path::new(path).is_absolute() {
            return Err(format!("the path in {shown:?} is not absolute"));
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
        assert_eq!(StoreUrl::parse("memory:/a").unwrap().as_str(), "memory:/a");
        for text in ["memory", "memory:", "memory:a", "s3://bucket", "/a", "memory:/a\u{7f}"] {
            assert!(StoreUrl::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_driver_of_a_later_build_is_named() {
        assert_eq!(DriverKind::parse("overlayfs"), Ok(DriverKind::Overlayfs));
        assert!(DriverKind::parse("devicemapper").unwrap_err().contains("no devicemapper driver"));
        assert!(DriverKind::parse("overlay").unwrap_err().contains("overlayfs"));
        assert!(DriverKind::parse("zfs").is_err());
    }
}
