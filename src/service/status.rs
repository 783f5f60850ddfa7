//! Errors → gRPC codes: the only file that knows codes.
//!
//! The match has no wildcard, so that a new variant forces the question "which code?". Three of them decide what containerd
//! does: *not found* makes CRI unpack the image again, *failed precondition* is the only code its collector continues after,
//! and *already exists* on a Prepare with a ref means a remote hit.

use std::error::Error;
use std::io;

use tonic::{Code, Status};

use crate::driver::DriverError;
use crate::image::ImageError;
use crate::layer::LayerError;
use crate::snapshot::SnapshotError;
use crate::snapshot::apply::ApplyError;
use crate::snapshot::metastore::MetaError;

/// What containerd is told.
pub(super) fn status(error: &SnapshotError) -> Status {
    Status::new(code(error), message(error))
}

/// The name of a code as metrics and logs show it.
pub(super) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Cancelled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}

fn code(error: &SnapshotError) -> Code {
    if is_want_of_room(error) {
        return Code::ResourceExhausted;
    }
    match error {
        SnapshotError::NotFound { .. } | SnapshotError::ParentNotFound { .. } => Code::NotFound,
        SnapshotError::AlreadyExists { .. } => Code::AlreadyExists,
        SnapshotError::ParentNotCommitted { .. }
        | SnapshotError::ParentMismatch { .. }
        | SnapshotError::InvalidKey { .. }
        | SnapshotError::InvalidLabels { .. }
        | SnapshotError::ImmutableField { .. }
        | SnapshotError::Filter(_)
        | SnapshotError::Mapping(_) => Code::InvalidArgument,
        SnapshotError::RebaseOntoUncommitted { .. }
        | SnapshotError::CannotRebase { .. }
        | SnapshotError::NotActive { .. }
        | SnapshotError::NotMountable { .. }
        | SnapshotError::HasChildren { .. } => Code::FailedPrecondition,
        SnapshotError::LayerUnavailable { .. } | SnapshotError::LayerGone { .. } => Code::Unavailable,
        SnapshotError::Layer(error) => layer_code(error),
        SnapshotError::Apply(error) => apply_code(error),
        SnapshotError::Driver(error) => driver_code(error),
        SnapshotError::Meta(error) => meta_code(error),
        SnapshotError::ShuttingDown => Code::Unavailable,
    }
}

/// Whether a full disk or an exhausted quota is the cause, however deep: the layer or the storage that it is said of is not to
/// blame then.
fn is_want_of_room(error: &SnapshotError) -> bool {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
        if matches!(kind, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)) {
            return true;
        }
        cause = error.source();
    }
    false
}

fn driver_code(error: &DriverError) -> Code {
    match error {
        DriverError::Full { .. } => Code::ResourceExhausted,
        DriverError::Missing(_) => Code::DataLoss,
        DriverError::Busy(_) => Code::FailedPrecondition,
        DriverError::Invalid(_) => Code::InvalidArgument,
        DriverError::Cancelled => Code::Cancelled,
        DriverError::Taken(_) | DriverError::Unsupported(_) | DriverError::Io { .. } => Code::Internal,
    }
}

fn layer_code(error: &LayerError) -> Code {
    match error {
        LayerError::Full { .. } => Code::ResourceExhausted,
        LayerError::Missing(_) | LayerError::Damaged { .. } => Code::DataLoss,
        LayerError::Chunk { .. } | LayerError::Helper(_) => Code::Unavailable,
        LayerError::Attach(_) | LayerError::Io { .. } => Code::Internal,
    }
}

fn apply_code(error: &ApplyError) -> Code {
    match error {
        // The one code after which containerd's diff service asks the next differ.
        ApplyError::NotOurs => Code::Unimplemented,
        ApplyError::Layer {
            source: ImageError::UnknownMediaType { .. } | ImageError::Encrypted { .. },
            ..
        } => Code::Unimplemented,
        ApplyError::NotADigest | ApplyError::Layer { .. } => Code::InvalidArgument,
        ApplyError::Blob { .. } => Code::Unavailable,
    }
}

fn meta_code(error: &MetaError) -> Code {
    match error {
        MetaError::Full(_) => Code::ResourceExhausted,
        MetaError::Closed | MetaError::Poisoned => Code::Unavailable,
        MetaError::Foreign { .. }
        | MetaError::Version { .. }
        | MetaError::OtherDriver { .. }
        | MetaError::Sqlite(_)
        | MetaError::Io { .. }
        | MetaError::NotPending { .. } => Code::Internal,
    }
}

/// The message with its causes, in one line, short enough for a header of any client.
fn message(error: &SnapshotError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    match text.char_indices().nth(2000) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Digest;
    use crate::snapshot::Key;

    #[test]
    fn a_full_disk_is_resource_exhausted_with_its_cause() {
        let source = io::Error::from(io::ErrorKind::StorageFull);
        let status = status(&DriverError::at(std::path::Path::new("/l/1"), source).into());
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().contains("/l/1"), "{}", status.message());
    }

    /// A disk that filled up while a layer's files were written was answered as *invalid argument*: containerd then blamed the
    /// image, and nobody looked at the disk. Every error of Apply that carries the system's answer is asked for it.
    #[test]
    fn a_disk_that_fills_up_during_apply_is_not_the_layers_fault() {
        let blob = Digest::parse(&format!("sha256:{}", "a".repeat(64))).unwrap();
        let layer = |source: ImageError| ApplyError::Layer { blob: blob.clone(), source };
        let path = || "/d".to_owned();
        let wrapped =
            |source: io::Error| io::Error::other(LayerError::at(std::path::Path::new("/l"), source));
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
            let io = || io::Error::from(kind);
            for error in [
                layer(ImageError::Extract { path: path(), source: io() }),
                layer(ImageError::Below { path: path(), source: io() }),
                layer(ImageError::Below { path: path(), source: wrapped(io()) }),
                layer(ImageError::Write(io())),
                layer(ImageError::Read(io())),
                ApplyError::Blob { blob: blob.clone(), source: io() },
            ] {
                let status = status(&error.into());
                assert_eq!(status.code(), Code::ResourceExhausted, "{}", status.message());
            }
        }
        let refused = io::Error::from(io::ErrorKind::PermissionDenied);
        let refused = status(&layer(ImageError::Extract { path: path(), source: refused }).into());
        assert_eq!(refused.code(), Code::InvalidArgument);
    }

    /// containerd's conformance suite looks for the word.
    #[test]
    fn children_are_a_failed_precondition_that_says_remove() {
        let status = status(&SnapshotError::HasChildren { key: Key::new("a").unwrap() });
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains("remove"));
    }

    #[test]
    fn a_hostile_key_neither_forges_lines_nor_floods_messages() {
        let key = Key::new(&format!("evil\n{}", "x".repeat(30_000))).unwrap();
        let status = status(&SnapshotError::NotFound { key });
        assert!(!status.message().contains('\n'));
        assert!(status.message().len() < 3000);
    }
}
