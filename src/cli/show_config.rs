//! `speedy config`.

use std::io::Write;
use std::process::ExitCode;

use crate::config::Effective;

pub(super) fn run(effective: &Effective, json: bool) -> anyhow::Result<ExitCode> {
    let text = match json {
        true => serde_json::to_string_pretty(&effective.to_json())?,
        false => effective.to_human(),
    };
    writeln!(std::io::stdout(), "{}", text.trim_end())?;
    Ok(ExitCode::SUCCESS)
}
