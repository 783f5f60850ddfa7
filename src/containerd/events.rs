//! containerd's events, as far as they say that its collector is about to run.
//!
//! An image's removal is published before the collection it causes. The collector waits for every Prepare that is under way, and
//! everybody else waits for the collector, so whoever waits for the store in a Prepare is told to come to an end.

use std::path::PathBuf;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::proto::containerd::services::events::v1::SubscribeRequest;
use crate::proto::containerd::services::events::v1::events_client::EventsClient;

/// How long to wait before asking again after containerd went away.
const PAUSE: Duration = Duration::from_secs(2);
/// What is removed before a collection.
const REMOVALS: [&str; 3] =
    ["topic==\"/images/delete\"", "topic==\"/snapshot/remove\"", "topic==\"/containers/delete\""];

/// Calls `removed` whenever something was removed that containerd's collector will look at, until `stop`.
pub async fn watch_removals(socket: PathBuf, removed: impl Fn() + Send, stop: CancellationToken) {
    loop {
        let watched = async {
            let channel = super::connect(&socket).await.ok()?;
            let filters = REMOVALS.map(str::to_owned).to_vec();
            let events = EventsClient::new(channel).subscribe(SubscribeRequest { filters }).await.ok()?;
            let mut events = events.into_inner();
            while let Ok(Some(_)) = events.message().await {
                removed();
            }
            Some(())
        };
        tokio::select! {
            () = stop.cancelled() => return,
            _ = watched => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
}
