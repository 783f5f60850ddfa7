//! What is noticed of containerd while it runs: which version it is, that its collector is about to run, and that there is an
//! image to be named.
//!
//! An image's removal is published before the collection it causes. The collector waits for every Prepare that is under way, and
//! everybody else waits for the collector, so whoever waits for the store in a Prepare is told to come to an end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::ContainerdError;
use crate::proto::containerd::services::events::v1::SubscribeRequest;
use crate::proto::containerd::services::events::v1::events_client::EventsClient;

/// How long to wait before asking again after containerd went away, first and at most.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(2);
/// What is published right before a collection. What the collector itself removes is published too: that tells nothing new, and
/// costs only a lookup that is slow anyway.
const REMOVED: [&str; 3] = ["/images/delete", "/snapshot/remove", "/containers/delete"];

/// What makes an image, or gives its name to another one.
const CHANGED: [&str; 2] = ["/images/create", "/images/update"];

/// What is noticed of containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Noticed<'a> {
    /// It is there, of this version, such as `v2.4.2`.
    There(&'a str),
    /// It went away; what comes back may be another version.
    Gone,
    /// Something was removed: its collector is about to run.
    Removal,
    /// An image was made, or a name given to another one.
    Image,
}

/// Tells what is noticed, as it happens, until `stop`; and in the log when containerd comes and goes.
pub async fn watch(socket: PathBuf, tell: impl Fn(Noticed<'_>) + Send, stop: CancellationToken) {
    let mut known: Option<String> = None;
    let mut wait = FIRST_RETRY;
    loop {
        let watched = tokio::select! {
            () = stop.cancelled() => return,
            watched = watch_one(&socket, &tell, &mut known) => watched,
        };
        tell(Noticed::Gone);
        match watched {
            Ok(()) => wait = FIRST_RETRY,
            Err(error) => {
                if known.take().is_some() {
                    tracing::warn!(%error, "containerd went away; snapshots are served as before");
                }
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(LAST_RETRY);
    }
}

/// One connection, until it ends: without an error if containerd answered on it.
async fn watch_one(
    socket: &Path,
    tell: &(impl Fn(Noticed<'_>) + Send),
    known: &mut Option<String>,
) -> Result<(), ContainerdError> {
    let channel = super::connect(socket).await?;
    let version = super::version_of(channel.clone()).await?;
    tell(Noticed::There(&version));
    if known.as_ref() != Some(&version) {
        tracing::info!(%version, socket = %socket.display(), "containerd is there");
        *known = Some(version);
    }
    // containerd's answer begins with the first event, so this waits for it.
    let filters = REMOVED.iter().chain(&CHANGED).map(|topic| format!("topic==\"{topic}\"")).collect();
    let mut events = EventsClient::new(channel).subscribe(SubscribeRequest { filters }).await?.into_inner();
    while let Ok(Some(event)) = events.message().await {
        tracing::debug!(topic = event.topic, namespace = event.namespace, "an event of containerd");
        let changed = CHANGED.contains(&event.topic.as_str());
        tell(if changed { Noticed::Image } else { Noticed::Removal });
    }
    Ok(())
}
