//! `speedy serve`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::log_format;
use crate::config::Effective;
use crate::sys::{limits, memory};
use crate::{daemon, telemetry};

/// How long what still runs on other threads may take at the end.
const END: Duration = Duration::from_secs(1);

pub(super) fn run(effective: &Effective) -> anyhow::Result<ExitCode> {
    let config = &effective.config;
    telemetry::init_logs(config.log.level.as_str(), log_format(config.log.format))?;
    // Before any thread exists: it changes the environment.
    let inherited =
        listenfd::ListenFd::from_env().take_unix_listener(0).context("the socket that systemd passed")?;
    limits::raise_open_files();
    limits::private_files();
    // Before the runtime makes memory that comes and goes.
    memory::lock_program();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(async {
        let stop = CancellationToken::new();
        let signals = stop_on_signals(stop.clone())?;
        let served = tokio::select! {
            served = daemon::run(config, inherited, stop) => served,
            () = signals => return Ok(ExitCode::from(130)),
        };
        served?;
        Ok(ExitCode::SUCCESS)
    });
    // A walk or a filter that nobody waits for any more must not hold up the end.
    runtime.shutdown_timeout(END);
    ended
}

/// The first SIGTERM or SIGINT asks the daemon to stop; the future ends at the second.
fn stop_on_signals(stop: CancellationToken) -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        for _ in 0..2 {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stop.cancel();
        }
    })
}
