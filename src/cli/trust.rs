//! `speedy trust`: who this node is to others.

use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use serde_json::json;

use crate::config::Effective;
use crate::content::trust::{KEY_FILE, PublisherKey};

pub(super) fn run(effective: &Effective, json: bool) -> anyhow::Result<ExitCode> {
    let key = own_key(&effective.config.root)?;
    let key = key.public();
    let line = format!("trust.keys = [\"{key}\"]");
    let text = match json {
        true => {
            serde_json::to_string_pretty(&json!({ "key": key.to_string(), "id": key.id(), "line": line }))?
        }
        false => format!(
            "{key}\n\nThis is the public key with which this node signs what it publishes. A node that is to start images from it \
             needs this line in its configuration, with the keys that are there already:\n\n{line}"
        ),
    };
    writeln!(std::io::stdout(), "{text}")?;
    Ok(ExitCode::SUCCESS)
}

/// The key of the node with this root; made if there is none.
pub(super) fn own_key(root: &Path) -> anyhow::Result<PublisherKey> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(root);
    made.with_context(|| format!("cannot use the root {}", root.display()))?;
    Ok(PublisherKey::open_or_create(&root.join(KEY_FILE))?)
}
