//! Volumes made of layers that a store has.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use speedy::chunk::merged::Merged;
use speedy::chunk::remote::Remote as RemoteChunks;
use speedy::chunk::verified::Verified;
use speedy::content::publish::PublishRequest;
use speedy::content::trust::{PublisherKey, Trust};
use speedy::content::{ContentStore, Options, Parts};
use speedy::image::{Compression, Limits, Source, build};
use speedy::object::{Objects, StoreOptions};
use speedy::oci::ChainId;
use speedy::proto::containerd::services::snapshots::v1 as wire;
use speedy::snapshot::remote::LABEL_REF;
use tokio_util::sync::CancellationToken;

use super::{Mounted, Served, mount_of, started};
use crate::extract::{Seen, tree};
use crate::maker::tars::{Item, Tar};
use crate::process::{Client, list, prepare, runtime};
use crate::unpack::{Directory, apply, lower_layer, upper_layer};

/// A directory as the store, where another node has put an image.
struct Stored {
    served: Served,
    chains: Vec<ChainId>,
    /// What the image's layers make, applied in the ordinary way.
    expected: BTreeMap<PathBuf, Seen>,
}

impl Stored {
    async fn new(layers: &[Vec<Item>]) -> Stored {
        let served = Served::new();
        let (dir, store) = (served.place.path("applied"), served.place.path("store"));
        std::fs::create_dir(&dir).unwrap();
        std::fs::create_dir(&store).unwrap();
        let objects =
            Objects::open(&format!("file://{}", store.display()), &StoreOptions::default()).unwrap();
        let chunks = Arc::new(Merged::new(Verified::new(RemoteChunks::new(objects.clone()))));
        let (key, trust) = (PublisherKey::from_seed([1; 32]), Trust::Keys(Vec::new()));
        let content = ContentStore::new(Parts { objects, chunks, key, trust }, Options::default());
        let mut chains: Vec<ChainId> = Vec::new();
        for layer in layers {
            let tar = Tar::of(layer);
            let image = tempfile::tempfile().unwrap();
            let source = Source { blob: &tar[..], compression: Compression::Plain };
            let below = Directory(dir.clone());
            let facts = build(source, &image, &below, &Limits::default(), &|| false).unwrap();
            let chain = ChainId::of(chains.last(), &facts.diff_id);
            let request =
                PublishRequest { image: &image, facts: &facts, chains: std::slice::from_ref(&chain) };
            content.publish(request, &|_| {}, &CancellationToken::new()).await.unwrap();
            apply(&tar, &dir).unwrap();
            chains.push(chain);
        }
        let expected = comparable(&dir);
        Stored { served, chains, expected }
    }

    fn command(&self, crash: Option<&str>) -> std::process::Command {
        let mut command = self.served.command(crash);
        let store = format!("file://{}", self.served.place.path("store").display());
        command.env("SPEEDY_STORE", store).env("SPEEDY_TRUST_MODE", "any");
        command
    }
}

/// All but the times of directories: an ordinary apply leaves those that a layer only implies as they are.
fn comparable(dir: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut seen = tree(dir);
    for seen in seen.values_mut().filter(|seen| seen.mode & 0o170_000 == 0o040_000) {
        seen.mtime = (0, 0);
    }
    seen
}

/// The committed snapshot that a Prepare with a ref tells of; `None` if the layer is to be pulled.
async fn hit(client: &mut Client, chain: &ChainId, parent: &str) -> Result<Option<String>, tonic::Status> {
    let label = [(LABEL_REF, chain.to_string())];
    let labels: Vec<(&str, &str)> = label.iter().map(|(name, value)| (*name, value.as_str())).collect();
    match client.prepare(prepare(&format!("extract-1 {chain}"), parent, &labels)).await {
        Ok(_) => return Ok(None),
        Err(status) if status.code() != tonic::Code::AlreadyExists => return Err(status),
        Err(_) => {}
    }
    let all = list(client).await;
    let found = all.into_iter().find(|info| info.labels.get(LABEL_REF) == Some(&chain.to_string()));
    let found = found.unwrap();
    assert_eq!((found.parent.as_str(), found.kind()), (parent, wire::Kind::Committed));
    Ok(Some(found.name))
}

#[test]
#[ignore = "needs device-mapper"]
fn a_layer_of_the_store_becomes_a_volume() {
    runtime().block_on(async {
        let mut large = upper_layer();
        large.push(Item::file("large", &crate::cold::noise(3, 9 << 20)));
        let stored = Stored::new(&[lower_layer(), large]).await;
        let mut daemon = stored.served.place.start_command(stored.command(None));
        let mut client = daemon.client(&stored.served.place.socket()).await;
        let mut name = String::new();
        for chain in &stored.chains {
            name =
                hit(&mut client, chain, &name).await.unwrap().unwrap_or_else(|| panic!("{}", daemon.log()));
        }
        let view = wire::ViewSnapshotRequest { key: "look".into(), parent: name, ..Default::default() };
        let mounted = Mounted::new(&mount_of(client.view(view).await.unwrap().into_inner().mounts));
        let seen = comparable(mounted.0.path());
        for path in stored.expected.keys().chain(seen.keys()) {
            assert_eq!(stored.expected.get(path), seen.get(path), "{}", path.display());
        }
        drop(mounted);
        // Its image is not kept, and what the store has not is pulled.
        let left: Vec<_> = std::fs::read_dir(stored.served.place.root().join("layer")).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        let other = ChainId::of(stored.chains.first(), &speedy::oci::DiffId(stored.chains[1].0.clone()));
        assert_eq!(hit(&mut client, &other, "").await.unwrap(), None);
        for info in list(&mut client).await.iter().filter(|info| info.kind() != wire::Kind::Committed) {
            let remove = wire::RemoveSnapshotRequest { key: info.name.clone(), ..Default::default() };
            client.remove(remove).await.unwrap();
        }
        client.cleanup(wire::CleanupRequest::default()).await.unwrap();
        daemon.signal("TERM");
        assert!(daemon.wait().success(), "{}", daemon.log());
        stored.served.require_equal("materialised");
        stored.served.thin_check("materialised");
    });
}

/// The volume is there, and nobody has committed it.
#[test]
#[ignore = "needs device-mapper"]
fn a_kill_before_the_commit_leaves_no_volume() {
    runtime().block_on(async {
        let stored = Stored::new(&[lower_layer()]).await;
        let mut daemon = stored.served.place.start_command(stored.command(Some("volume filled")));
        let mut client = daemon.client(&stored.served.place.socket()).await;
        hit(&mut client, &stored.chains[0], "").await.unwrap_err();
        assert!(!daemon.wait().success());
        let (mut daemon, mut client) = started(&stored.served, None).await;
        assert_eq!(list(&mut client).await, Vec::new());
        client.cleanup(wire::CleanupRequest::default()).await.unwrap();
        daemon.signal("TERM");
        assert!(daemon.wait().success(), "{}", daemon.log());
        stored.served.require_equal("killed before the commit");
        let left: Vec<_> = std::fs::read_dir(stored.served.place.root().join("layer")).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        // A store that has lost the data: an ordinary pull, and nothing stays of the attempt.
        speedy::sys::tree::remove(&stored.served.place.path("store/chunks"), &|| false).unwrap();
        let mut daemon = stored.served.place.start_command(stored.command(None));
        let mut client = daemon.client(&stored.served.place.socket()).await;
        assert_eq!(hit(&mut client, &stored.chains[0], "").await.unwrap(), None, "{}", daemon.log());
        assert_eq!(list(&mut client).await.len(), 1, "the extraction's own");
        daemon.signal("TERM");
        assert!(daemon.wait().success());
    });
}
