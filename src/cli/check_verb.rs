//! `speedy check`.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use super::check;
use crate::config::Effective;

pub(super) fn run(
    effective: &Effective,
    containerd_config: Option<&Path>,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let mut store = check::store::report(&effective.config.root);
    if !effective.config.thin.root.as_os_str().is_empty() {
        let thin = check::store::report(&effective.config.thin.root);
        store.findings.extend(thin.findings);
        store.detail["thin"] = thin.detail;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(check::run(&effective.config, containerd_config, store));
    let text = match json {
        true => serde_json::to_string_pretty(&report.to_json())?,
        false => report.to_human(),
    };
    writeln!(std::io::stdout(), "{}", text.trim_end())?;
    Ok(if report.has_failures() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
