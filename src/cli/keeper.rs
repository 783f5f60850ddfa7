//! `speedy keeper`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::{Settings, log_format, warn};
use crate::config::Effective;
use crate::keeper::process::{self, Options, ProcessError, Stay};
use crate::keeper::protocol::LONGEST_DEAD_MAN;
use crate::sys::limits;
use crate::sys::terminal::HastyStderr;
use crate::telemetry;

/// The exit code for what another try would not change (`EX_CONFIG` of sysexits.h); the unit does not restart after it.
const HOPELESS: u8 = 78;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    settings: Settings,
    /// The unix socket to listen on [key: keeper; default: speedy-keeper.sock beside --address]
    #[arg(long, value_name = "SOCKET")]
    socket: Option<PathBuf>,
    /// How long to wait for a daemon before what is kept is given up; a daemon may say otherwise
    #[arg(long, value_name = "SECONDS", default_value_t = 100,
          value_parser = clap::value_parser!(u64).range(1..=LONGEST_DEAD_MAN))]
    dead_man: u64,
    /// End when nothing is kept and no daemon is connected
    #[arg(long)]
    while_needed: bool,
    /// Take over from the keeper that this process was before: the number of a descriptor
    #[arg(long, value_name = "FD", hide = true)]
    adopt: Option<i32>,
    /// Say by the exit code whether this program could take over from a keeper that leaves this version
    #[arg(long, value_name = "VERSION", hide = true)]
    understands: Option<u32>,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    if let Some(version) = arguments.understands {
        return Ok(if process::understands(version) { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let mut flags = arguments.settings.flags();
    flags.keeper = arguments.socket;
    let config = match super::load(&flags) {
        Ok(effective) => effective.config,
        // What is already held must not be lost over a mistake in a file.
        Err(error) if arguments.adopt.is_some() => {
            warn(&error);
            Effective::defaults().config
        }
        Err(error) => return Err(error),
    };
    // Nobody who reads the log may keep a daemon from its descriptors.
    let format = log_format(config.log.format);
    telemetry::init_logs_through(config.log.level.as_str(), format, || HastyStderr)?;
    limits::private_files();
    let ended = process::run(Options {
        socket: config.keeper,
        dead_man: Duration::from_secs(arguments.dead_man),
        stay: if arguments.while_needed { Stay::WhileNeeded } else { Stay::Always },
        adopt: arguments.adopt,
        arguments: std::env::args_os().skip(1).collect::<Vec<OsString>>(),
    });
    match ended {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error @ ProcessError::Circular(_)) => {
            tracing::error!(%error, "no keeper was started");
            Ok(ExitCode::from(HOPELESS))
        }
        Err(error) => Err(error.into()),
    }
}
