//! Bringing back from the registry what neither this node nor containerd has: the blobs of an image are fetched as `speedy fetch` does,
//! and the image is published again.
//!
//! Which image it is says its name on the store, by digest, wherever the tag points by now. Meanwhile containerd has it under the digest, a
//! name that nobody publishes; afterwards the name goes, and with it the blobs, should nothing else need them. A process that is killed
//! leaves it for a day, in a containerd whose images can expire (2.2 can); in an older one until somebody removes it.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;

use super::repair::Repair;
use super::show::Meter;
use crate::cli::publish::source::connect;
use crate::cli::{fetch, publish};
use crate::containerd::image::Image;
use crate::containerd::lease::expires_in;
use crate::containerd::manifest::{Descriptor, Platform};
use crate::content::fsck::TouchedImage;

/// Where containerd keeps them meanwhile.
const NAMESPACE: &str = "default";
/// For how long, if nobody is there to remove them.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

impl Repair<'_> {
    /// For each image that is touched by what is still wrong.
    pub(super) async fn use_registry(&mut self, hosts: Option<&Path>, meter: &Meter) -> anyhow::Result<()> {
        let mut touched: BTreeSet<TouchedImage> = BTreeSet::new();
        self.wrong().await?.into_iter().for_each(|finding| touched.extend(finding.images.iter().cloned()));
        let total = touched.len();
        for (done, image) in touched.into_iter().enumerate() {
            meter.say(done, total, format!("fetching {} from its registry", image.reference));
            if let Err(error) = self.fetch(&image, hosts).await {
                self.fail(
                    image,
                    format!("fetching its image from the registry and publishing it failed: {error:#}"),
                );
            }
        }
        Ok(())
    }

    async fn fetch(&self, image: &TouchedImage, hosts: Option<&Path>) -> anyhow::Result<()> {
        let TouchedImage { reference, platform } = image;
        let named = self.content().find_name(reference, platform).await?;
        let named = named.context("nobody whose word this node takes says what it is")?.image;
        let (platform, digest) = (Platform::parse(platform)?, named.target);
        let client = connect(&self.config().containerd, NAMESPACE).await?;
        let record = Image {
            name: digest.to_string(),
            target: Descriptor { media_type: named.target_media_type, digest, size: 0 },
            updated: (0, 0),
            labels: HashMap::from([expires_in(LONGEST)]),
        };
        let done = async {
            let wanted = fetch::to_fetch(reference, &record.target.digest, &platform, hosts, None)?;
            client.fetch(&record, &wanted).await.with_context(|| wanted.reference.clone())?;
            publish::Again { record: &record.name, ..self.again(NAMESPACE, image) }.run().await
        };
        let done = done.await;
        client
            .remove_image(&record.name)
            .await
            .with_context(|| format!("{}: it stays for a day", record.name))?;
        done
    }
}
