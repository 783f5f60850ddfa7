//! A TOML file, taken apart into dotted keys and the lines they stand on.
//!
//! Where: called by `config` for its own file, and by `speedy check` for containerd's; the only user of the TOML
//! parser. Words: an *entry* is a dotted key of ours with its value.
//!
//! Invariants: a table is only descended into when a known key lies below it; everything else is an unknown key.
//!
//! When it fails: the error names file and line.

use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::key::{self, Given, KEYS, Key};
use super::{ConfigError, Place};

/// What a TOML text says about our keys.
pub(super) fn entries(path: &Path, text: &str) -> Result<Vec<(&'static Key, usize, Given)>, ConfigError> {
    let table = DeTable::parse(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        let reason = error.message().trim().replace('\n', ", ");
        ConfigError::Syntax { place: place(path, text, at), reason }
    })?;
    let mut entries = Vec::new();
    collect(&Document { path, text }, "", table.get_ref(), &mut entries)?;
    // Keys are set in the order of the file, so that the first mistake in it is the one reported.
    entries.sort_by_key(|(_, line, _)| *line);
    Ok(entries)
}

struct Document<'a> {
    path: &'a Path,
    text: &'a str,
}

fn collect(
    document: &Document<'_>,
    prefix: &str,
    table: &DeTable<'_>,
    entries: &mut Vec<(&'static Key, usize, Given)>,
) -> Result<(), ConfigError> {
    for (name, value) in table {
        let dotted = format!("{prefix}{}", name.get_ref());
        let below = format!("{dotted}.");
        let at = name.span().start;
        if let Some(key) = key::by_name(&dotted) {
            entries.push((key, line(document.text, at), given(value)));
            continue;
        }
        match value.get_ref() {
            DeValue::Table(inner) if KEYS.iter().any(|key| key.name.starts_with(&below)) => {
                collect(document, &below, inner, entries)?;
            }
            _ => {
                // Inside an unknown table the first key tells more than the table's name does.
                let key = deepest(dotted, value.get_ref());
                return Err(ConfigError::UnknownKey {
                    place: place(document.path, document.text, at),
                    nearest: key::nearest(&key),
                    key,
                });
            }
        }
    }
    Ok(())
}

fn deepest(mut dotted: String, mut value: &DeValue<'_>) -> String {
    while let DeValue::Table(table) = value {
        let Some((name, inner)) = table.iter().next() else { break };
        dotted = format!("{dotted}.{}", name.get_ref());
        value = inner.get_ref();
    }
    dotted
}

fn given(value: &Spanned<DeValue<'_>>) -> Given {
    match value.get_ref() {
        DeValue::String(text) => Given::Text(text.to_string()),
        DeValue::Boolean(flag) => Given::Flag(*flag),
        DeValue::Integer(number) => Given::Number(number.to_string()),
        DeValue::Float(_) => Given::Other("a float"),
        DeValue::Datetime(_) => Given::Other("a date"),
        DeValue::Table(_) => Given::Other("a table"),
        DeValue::Array(items) => items
            .iter()
            .map(|item| item.get_ref().as_str().map(str::to_owned))
            .collect::<Option<Vec<String>>>()
            .map_or(Given::Other("an array of other things than strings"), Given::List),
    }
}

fn place(path: &Path, text: &str, at: usize) -> Place {
    Place::File { path: path.to_owned(), line: line(text, at) }
}

/// The line, from 1, on which a byte of the text stands.
fn line(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count()
}

/// Any TOML document as JSON, for reading the files of others; an error says where it is not TOML.
pub fn toml_to_json(text: &str) -> Result<serde_json::Value, String> {
    toml::from_str(text).map_err(|error: toml::de::Error| {
        let line = line(text, error.span().map_or(0, |span| span.start));
        format!("line {line}: {}", error.message().trim().replace('\n', ", "))
    })
}
