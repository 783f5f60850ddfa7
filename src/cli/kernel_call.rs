//! `speedy kernel-call`: see [`crate::layer::lazy::helper`].

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::layer::lazy::helper::{self, Call};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    call: Which,
}

#[derive(Debug, Subcommand)]
enum Which {
    /// Attach the FUSE file of a layer image
    Attach { serial: u64, point: PathBuf },
    /// Put a complete file below a loop device
    ToNative { serial: u64, device: PathBuf, image: PathBuf },
    /// Put the FUSE file of a layer image below a loop device
    ToLazy { serial: u64, device: PathBuf, image: PathBuf },
    /// Put the FUSE file of a layer image below a loop device whose file is of a connection that ended
    Revive { serial: u64, device: PathBuf },
    /// Take away what is attached
    Detach { point: PathBuf },
}

pub(super) fn run(arguments: &Arguments) -> ExitCode {
    let call = match arguments.call {
        Which::Attach { serial, ref point } => Call::Attach { serial, point: point.clone() },
        Which::ToNative { serial, ref device, ref image } => {
            Call::ToNative { serial, device: device.clone(), image: image.clone() }
        }
        Which::ToLazy { serial, ref device, ref image } => {
            Call::ToLazy { serial, device: device.clone(), image: image.clone() }
        }
        Which::Revive { serial, ref device } => Call::Revive { serial, device: device.clone() },
        Which::Detach { ref point } => Call::Detach { point: point.clone() },
    };
    if helper::run(&call) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
