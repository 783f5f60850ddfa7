//! The effective configuration, for people and for programs.
//!
//! Where: `speedy config` prints the result. The text is TOML with dotted keys and a comment that names the source,
//! so it can be saved and used as a file.
//!
//! Invariants: every key of the table appears once; no credentials appear.
//!
//! When it fails: it does not.

use std::fmt::Write as _;
use std::net::SocketAddr;

use serde::Serializer;
use serde_json::{Map, Value, json};

use super::Effective;
use super::key::KEYS;

impl Effective {
    /// One line a key: `key = value  # source`, aligned.
    pub fn to_human(&self) -> String {
        let rows: Vec<(&str, String, String)> = KEYS
            .iter()
            .map(|key| (key.name, toml_value(&(key.show)(&self.config)), self.source_of(key.name)))
            .collect();
        let names = rows.iter().map(|row| row.0.len()).max().unwrap_or(0);
        let values = rows.iter().map(|row| row.1.chars().count()).max().unwrap_or(0);
        let mut out = String::new();
        for (name, value, source) in rows {
            writeln!(out, "{name:names$} = {value:values$}  # {source}")
                .expect("writing to a string does not fail");
        }
        out
    }

    /// `{"config": {...nested as in the file...}, "sources": {"root": {"from": "flag", "name": "--root"}, ...}}`.
    pub fn to_json(&self) -> Value {
        let mut config = Map::new();
        for key in KEYS {
            let value = (key.show)(&self.config);
            match key.name.split_once('.') {
                None => {
                    config.insert(key.name.to_owned(), value);
                }
                Some((table, name)) => {
                    let table = config.entry(table).or_insert_with(|| json!({}));
                    table[name] = value;
                }
            }
        }
        json!({ "config": config, "sources": self.sources })
    }

    fn source_of(&self, key: &str) -> String {
        self.sources.get(key).map(ToString::to_string).unwrap_or_default()
    }
}

/// A JSON value as TOML writes it. The two agree on strings without control characters, on booleans, integers and lists;
/// no key has another type, and no accepted value holds a control character.
fn toml_value(value: &Value) -> String {
    match value {
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(toml_value).collect();
            format!("[{}]", items.join(", "))
        }
        other => other.to_string(),
    }
}

/// The address as the file has it.
pub(super) fn address_text(address: Option<SocketAddr>) -> String {
    address.map(|address| address.to_string()).unwrap_or_default()
}

/// The same, for the derived implementation.
pub(super) fn address<S: Serializer>(address: &Option<SocketAddr>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&address_text(*address))
}
