//! The answers: from the store, and only while the registry has none.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use hyper::StatusCode;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Answer;
use super::probe::{Probe, Probes, Reach};
use super::repositories::Repositories;
use super::request::{self, Asked, Name, Object};
use crate::containerd::manifest::Platform;
use crate::content::ContentStore;
use crate::oci::Digest;

/// How long the store may take. Longer than for a layer: there is nothing to fall back to.
const PATIENCE: Duration = Duration::from_secs(20);

/// The media types that a manifest or an index may say it has.
const MEDIA_TYPES: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
/// What a configuration is given as: its manifest says what it is.
const BLOB: &str = "application/octet-stream";

/// A registry made of what the store knows of others. See the module's page.
#[derive(Debug)]
pub struct Mirror {
    content: Arc<ContentStore>,
    probes: Probes,
    repositories: Repositories,
    /// Of whose images the tags are given, the best first.
    platforms: Vec<String>,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    served: AtomicU64,
    absent: AtomicU64,
    reachable: AtomicU64,
    failed: AtomicU64,
    malformed: AtomicU64,
}

/// How often something was asked for, by what came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MirrorCounts {
    /// It was given.
    pub served: u64,
    /// The store does not have it.
    pub absent: u64,
    /// The registry answers itself.
    pub reachable: u64,
    /// The store could not be asked, or has it damaged.
    pub failed: u64,
    /// It was no request.
    pub malformed: u64,
}

/// A document as it is given.
struct Found {
    media_type: String,
    digest: Digest,
    bytes: Bytes,
}

impl Mirror {
    /// Of this store, for this machine's platform.
    pub fn new(content: Arc<ContentStore>, probe: Box<dyn Probe>) -> Mirror {
        let platforms = Platform::host().and_older().iter().map(ToString::to_string).collect();
        let (probes, repositories) = (Probes::new(probe), Repositories::default());
        Mirror { content, probes, repositories, platforms, counts: Counts::default() }
    }

    /// How often something was asked for.
    pub fn counts(&self) -> MirrorCounts {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let Counts { served, absent, reachable, failed, malformed } = &self.counts;
        MirrorCounts {
            served: read(served),
            absent: read(absent),
            reachable: read(reachable),
            failed: read(failed),
            malformed: read(malformed),
        }
    }

    /// What a request with this path and query gets.
    pub(super) async fn answer(&self, path: &str, query: &str) -> Answer {
        let count = |count: &AtomicU64| count.fetch_add(1, Ordering::Relaxed);
        let object = match request::read(path, query) {
            Ok(Asked::Version) => return Answer::Version,
            Ok(Asked::Object(object)) => object,
            Err(error) => {
                count(&self.counts.malformed);
                return refused("UNSUPPORTED", error.to_string());
            }
        };
        let found = match tokio::time::timeout(PATIENCE, self.find(&object)).await {
            Ok(Ok(Some(found))) => found,
            Ok(Ok(None)) => {
                count(&self.counts.absent);
                return refused(unknown(&object), format!("the store has no {object}"));
            }
            Ok(Err(error)) => return self.failed(&object, &error),
            Err(_) => return self.failed(&object, &"the store did not answer in time"),
        };
        let registry = object.upstream.registry();
        // Last: a host that no publisher has named is none of our business (R3).
        if self.probes.reach(&object.upstream).await == Reach::There {
            count(&self.counts.reachable);
            return refused(unknown(&object), format!("{registry} answers itself: its word counts"));
        }
        count(&self.counts.served);
        tracing::info!(%object, registry, "the registry cannot be reached: given from the store");
        Answer::Document { media_type: found.media_type, digest: found.digest, bytes: found.bytes }
    }

    fn failed(&self, object: &Object, error: &dyn std::fmt::Display) -> Answer {
        self.counts.failed.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(%object, %error, "asked for an image that the store does not give");
        refused(unknown(object), format!("{object}: {error}"))
    }

    /// What the store has of it, if an accepted publisher has named it.
    async fn find(&self, object: &Object) -> Result<Option<Found>, crate::content::ContentError> {
        match &object.name {
            Name::Tag(_) => {
                for platform in &self.platforms {
                    if let Some(found) = self.content.find_name(&object.to_string(), platform).await? {
                        self.repositories.remember(&found.image);
                        let (target, media_type) = (found.image.target, found.image.target_media_type);
                        // The archive of an image has no manifest.
                        if found.image.documents.is_empty() {
                            continue;
                        }
                        let bytes = self.content.document(&target).await?;
                        return Ok(bytes.and_then(|bytes| manifest(target, bytes, Some(media_type))));
                    }
                }
                Ok(None)
            }
            Name::Manifest(digest) => {
                let bytes = self.document(object, digest).await?;
                Ok(bytes.and_then(|bytes| manifest(digest.clone(), bytes, None)))
            }
            Name::Blob(digest) => {
                let found = |bytes| Found { media_type: BLOB.to_owned(), digest: digest.clone(), bytes };
                Ok(self.document(object, digest).await?.map(found))
            }
        }
    }

    /// The document with this digest, if an image of the repository has it.
    async fn document(
        &self,
        object: &Object,
        digest: &Digest,
    ) -> Result<Option<Bytes>, crate::content::ContentError> {
        // What is not there is told with one request, before names are listed for it.
        let Some(bytes) = self.content.document(digest).await? else { return Ok(None) };
        let has = self.repositories.has(&self.content, &object.full_repository(), digest).await?;
        Ok(has.then_some(bytes))
    }
}

fn refused(code: &'static str, message: String) -> Answer {
    Answer::Refused { status: StatusCode::NOT_FOUND, code, message }
}

fn unknown(object: &Object) -> &'static str {
    match object.name {
        Name::Tag(_) | Name::Manifest(_) => "MANIFEST_UNKNOWN",
        Name::Blob(_) => "BLOB_UNKNOWN",
    }
}

/// A manifest or an index with its media type: the one that the registry gave, else the one that it says it has, else what its
/// shape says. `None` if it is neither.
fn manifest(digest: Digest, bytes: Bytes, given: Option<String>) -> Option<Found> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Shape {
        media_type: Option<String>,
        manifests: Option<IgnoredAny>,
        config: Option<IgnoredAny>,
    }
    let is_known = |media_type: &String| MEDIA_TYPES.contains(&media_type.as_str());
    let shape: Shape = serde_json::from_slice(&bytes).ok()?;
    let by_shape = match (shape.manifests, shape.config) {
        (Some(_), None) => MEDIA_TYPES[0],
        (None, Some(_)) => MEDIA_TYPES[1],
        _ => return None,
    };
    let said = given.filter(is_known).or(shape.media_type.filter(is_known));
    Some(Found { media_type: said.unwrap_or_else(|| by_shape.to_owned()), digest, bytes })
}
