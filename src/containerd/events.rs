//! What is noticed of containerd while it runs: which version it is, that its collector is about to run, that there is an
//! image to be named, and the configuration of one that is being pulled.
//!
//! An image's removal is published before the collection it causes. The collector waits for every Prepare that is under way, and
//! everybody else waits for the collector, so whoever waits for the store in a Prepare is told to come to an end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use prost::Message;
use tokio_util::sync::CancellationToken;

use super::ContainerdError;
use super::manifest::LONGEST_DOCUMENT;
use crate::oci::Digest;
use crate::proto::containerd::events::ContentCreate;
use crate::proto::containerd::services::events::v1::SubscribeRequest;
use crate::proto::containerd::services::events::v1::events_client::EventsClient;
use crate::proto::containerd::types::Envelope;

/// How long to wait before asking again after containerd went away, first and at most.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(2);
/// What is published right before a collection. What the collector itself removes is published too: that tells nothing new, and
/// costs only a lookup that is slow anyway.
const REMOVED: [&str; 3] = ["/images/delete", "/snapshot/remove", "/containers/delete"];

/// What makes an image, or gives its name to another one.
const CHANGED: [&str; 2] = ["/images/create", "/images/update"];

/// What says that a blob is in the content store, and which blobs are of interest. containerd 2.3 and older say no media type: there only what
/// is short is looked at, and most of it is something else.
const STORED: &str = "/content/create";
const CONFIGURATIONS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
const SHORT: u64 = 64 << 10;

/// What is noticed of containerd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Noticed<'a> {
    /// It is there, of this version, such as `v2.4.2`.
    There(&'a str),
    /// It went away; what comes back may be another version.
    Gone,
    /// Something was removed: its collector is about to run.
    Removal,
    /// An image was made, or a name given to another one.
    Image,
    /// A blob was stored in a namespace that may be an image's configuration.
    Configuration {
        /// The namespace.
        namespace: &'a str,
        /// The blob.
        digest: Digest,
    },
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
    let topics = REMOVED.iter().chain(&CHANGED).chain([&STORED]);
    let filters = topics.map(|topic| format!("topic==\"{topic}\"")).collect();
    let mut events = EventsClient::new(channel).subscribe(SubscribeRequest { filters }).await?.into_inner();
    while let Ok(Some(event)) = events.message().await {
        tracing::debug!(topic = event.topic, namespace = event.namespace, "an event of containerd");
        if let Some(noticed) = noticed(&event) {
            tell(noticed);
        }
    }
    Ok(())
}

fn noticed(event: &Envelope) -> Option<Noticed<'_>> {
    if event.topic != STORED {
        let changed = CHANGED.contains(&event.topic.as_str());
        return Some(if changed { Noticed::Image } else { Noticed::Removal });
    }
    let stored = ContentCreate::decode(event.event.as_ref()?.value.as_slice()).ok()?;
    let most = match stored.media_type.as_str() {
        "" => SHORT,
        named if CONFIGURATIONS.contains(&named) => LONGEST_DOCUMENT,
        _ => return None,
    };
    let is_one = u64::try_from(stored.size).is_ok_and(|size| size <= most);
    let digest = Digest::parse(&stored.digest).ok().filter(|_| is_one)?;
    Some(Noticed::Configuration { namespace: &event.namespace, digest })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(digest: &str, size: i64, media_type: &str) -> Envelope {
        let (digest, media_type) = (digest.to_owned(), media_type.to_owned());
        let value = ContentCreate { digest, size, media_type }.encode_to_vec();
        let event = Some(prost_types::Any { type_url: "containerd.events.ContentCreate".into(), value });
        Envelope { topic: STORED.into(), namespace: "k8s.io".into(), event, ..Envelope::default() }
    }

    #[test]
    fn a_stored_configuration_is_noticed_and_a_layer_is_not() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for media_type in CONFIGURATIONS.into_iter().chain([""]) {
            let event = stored(&digest, 1000, media_type);
            let wanted =
                Noticed::Configuration { namespace: "k8s.io", digest: Digest::parse(&digest).unwrap() };
            assert_eq!(noticed(&event), Some(wanted), "{media_type}");
        }
        for (digest, size, media_type) in [
            (digest.as_str(), 1000, "application/vnd.oci.image.layer.v1.tar+gzip"),
            (digest.as_str(), 1 << 40, CONFIGURATIONS[0]),
            (digest.as_str(), -1, CONFIGURATIONS[0]),
            (digest.as_str(), 100_000, ""),
            ("sha256:../..", 1000, CONFIGURATIONS[0]),
        ] {
            assert_eq!(noticed(&stored(digest, size, media_type)), None, "{digest} {size} {media_type}");
        }
        let mut event = stored(&digest, 1000, "");
        event.event = Some(prost_types::Any { value: vec![0xff; 9], ..prost_types::Any::default() });
        assert_eq!(noticed(&event), None);
    }

    #[test]
    fn other_events_are_what_they_were() {
        let event = |topic: &str| Envelope { topic: topic.into(), ..Envelope::default() };
        assert_eq!(noticed(&event("/images/update")), Some(Noticed::Image));
        assert_eq!(noticed(&event("/snapshot/remove")), Some(Noticed::Removal));
    }
}
