//! What people ask a running daemon: its state, its layers, and where the layers of an image or a container came from.
//!
//! The values are what `--json` prints; field names are kept once they are out.

use serde::{Deserialize, Serialize};

/// The state of a daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// Its version.
    pub version: String,
    /// What its machine calls itself.
    #[serde(default)]
    pub node: String,
    /// Where its snapshots are.
    pub root: String,
    /// The version of containerd, while it is there.
    pub containerd: Option<String>,
    /// How layer images are mounted here, or why they are not.
    pub layer_images: String,
    /// Whether containers start before their layers are here: `on`, `off`, or why they do not.
    #[serde(default)]
    pub lazy: String,
    /// Numbers of snapshots.
    pub snapshots: SnapshotNumbers,
    /// Roots of volumes, the main one included if it is one.
    #[serde(default)]
    pub pools: Vec<PoolState>,
    /// Numbers of layer images.
    pub layers: LayerNumbers,
    /// The store, if there is one.
    pub store: Option<StoreState>,
    /// What is known of starts of images.
    #[serde(default)]
    pub traces: TraceState,
    /// What is put on the store.
    pub publish: PublishState,
    /// Who answers for registries that are away, if somebody does.
    #[serde(default)]
    pub mirror: Option<MirrorState>,
    /// Bytes free on the root's file system.
    pub free_bytes: u64,
}

/// A root of volumes and its pool.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolState {
    /// Under which name its snapshots are served; none for the main one.
    pub snapshotter: Option<String>,
    /// Where its records are.
    pub root: String,
    /// Numbers of its snapshots.
    pub snapshots: SnapshotNumbers,
    /// What is free for data, in percent.
    pub data_free: u64,
    /// What is free for the pool's metadata, in percent.
    pub metadata_free: u64,
    /// What is wrong with the pool, and the way out.
    pub trouble: Option<String>,
}

/// The port that answers for registries, since the daemon started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorState {
    /// Where it is.
    pub address: String,
    /// What was given, because the registry could not be reached.
    pub served: u64,
    /// What the store does not have.
    pub absent: u64,
    /// What was not given, because the registry answered when it was probed.
    pub reachable: u64,
    /// What could not be given: the store could not be asked, or has it damaged.
    pub failed: u64,
    /// What was no request.
    pub malformed: u64,
}

/// Numbers of snapshots.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotNumbers {
    /// Views.
    pub views: usize,
    /// Active ones.
    pub active: usize,
    /// Committed ones.
    pub committed: usize,
    /// Removed ones whose storage is not freed yet.
    pub removing: usize,
}

/// Numbers of layer images.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerNumbers {
    /// All.
    pub count: usize,
    /// Those whose data is still being fetched.
    pub filling: usize,
    /// Those that no snapshot uses.
    pub unclaimed: usize,
    /// Those that are mounted.
    pub attached: usize,
    /// Those of them that are read through this daemon, because not all of them is here.
    #[serde(default)]
    pub lazy: usize,
    /// What their files take on disk.
    pub bytes: u64,
    /// What was given up, checked and repaired.
    #[serde(default)]
    pub disk: DiskCounts,
}

/// What was given up of layer images, checked and repaired since the daemon started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCounts {
    /// What they may take, if that is limited.
    pub limit: Option<u64>,
    /// Bytes that were punched out of layers that are not wholly here.
    pub given_up: u64,
    /// Complete layers that were made incomplete, for want of room or because they were damaged.
    pub demotions: u64,
    /// Bytes that were read again and checked.
    pub scrubbed: u64,
    /// Chunks that were found damaged.
    pub damaged: u64,
    /// Those that are right again.
    pub repaired: u64,
}

/// The store as this daemon sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreState {
    /// Its URL, without secrets.
    pub url: String,
    /// Whether requests are sent to it, and since when not.
    pub state: String,
    /// Whose layers are taken: `keys` or `any`.
    pub trust: String,
    /// The public keys that are trusted, this node's own first.
    pub keys: Vec<String>,
    /// What has happened on it since the daemon started.
    #[serde(default)]
    pub numbers: StoreNumbers,
    /// What this daemon's own check of the whole store found, if it makes one.
    #[serde(default)]
    pub scrub: Option<StoreScrub>,
}

/// What a daemon's check of the whole store found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreScrub {
    /// The most bytes that it reads each second.
    pub rate: u64,
    /// How far it is, while it runs.
    pub running: Option<String>,
    /// How often it came to its end since the daemon started.
    pub rounds: u64,
    /// When it last did, seconds since 1970 UTC.
    pub ended: Option<i64>,
    /// Objects that it looked at then.
    pub objects: u64,
    /// Those that another one names and that were not there.
    pub missing: u64,
    /// Those that are not what they should be.
    pub damaged: u64,
    /// Bytes that were read since the daemon started.
    pub bytes: u64,
    /// Why the last attempt did not come to its end.
    pub problem: Option<String>,
}

/// What has happened on the store since the daemon started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreNumbers {
    /// Whether it is left alone at the moment, for not answering.
    pub resting: bool,
    /// How often that began.
    pub rests: u64,
    /// Requests sent.
    pub requests: u64,
    /// Those that got no answer, time-outs included.
    pub failures: u64,
    /// Those that it refused for want of credentials or permissions.
    pub denied: u64,
    /// Requests made again after a failure.
    pub retries: u64,
    /// Bytes of objects that arrived whole.
    pub read: u64,
    /// Bytes of objects that were written.
    pub written: u64,
}

/// What is known of starts of images.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceState {
    /// `auto`, or why nothing is recorded and nothing fetched by it.
    pub policy: String,
    /// Traces that were read from the store.
    pub read: u64,
    /// Those that were damaged or of another version.
    pub passed_over: u64,
    /// Starts that were recorded here, for all nodes.
    pub written: u64,
    /// Those that could not be written.
    pub failed: u64,
    /// Starts that are being recorded.
    pub recording: usize,
    /// Chunks that were fetched because of a trace, before anybody asked.
    pub chunks: u64,
    /// Their plain bytes.
    pub bytes: u64,
    /// Chunks of traces whose images were started, as far as their reads could be seen.
    pub expected: u64,
    /// Those of them that were read.
    pub used: u64,
}

/// What is put on the store.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishState {
    /// `auto`, `off`, or `none` without a store.
    pub policy: String,
    /// Layers in the queue, and names of images that are to be written.
    pub pending: usize,
    /// Layers that were given up.
    pub dropped: usize,
    /// Layers published since the daemon started.
    pub layers: u64,
    /// Plain bytes of these.
    pub bytes: u64,
    /// Bytes that were uploaded for them.
    pub uploaded: u64,
    /// Names of images written since the daemon started.
    #[serde(default)]
    pub names: u64,
    /// Attempts that failed.
    pub failures: u64,
    /// Uses of images that were noted on the store.
    #[serde(default)]
    pub uses: u64,
    /// Those that could not be.
    #[serde(default)]
    pub unnoted_uses: u64,
    /// What went wrong last with each layer that is still in the queue or was given up, and with names that are tried again.
    pub problems: Vec<Problem>,
}

/// A layer, or the name of an image, that is not published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Its chain ID; that of the uppermost layer for an image, as far as it is known.
    pub chain: String,
    /// The image, if it is about its name.
    #[serde(default)]
    pub image: Option<String>,
    /// Whether it is tried again.
    pub retried: bool,
    /// What went wrong.
    pub message: String,
}

/// A layer image of this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Its number; its file is `layer/<serial>.erofs` below the root.
    pub serial: u64,
    /// Digest of the tar it was made from.
    pub diff_id: String,
    /// `applied` here from a blob, or `fetched` from the store.
    pub origin: String,
    /// `complete`, `filling`, `cold` (fetched as it is read: there is no room for all of it) or `failed`.
    pub state: String,
    /// How much of it is here, in percent.
    pub percent: u8,
    /// What went wrong, if it failed.
    pub problem: Option<String>,
    /// What its files take on disk.
    pub bytes: u64,
    /// Bytes that came from the store.
    pub fetched: u64,
    /// Bytes that other layers of this node had.
    pub shared: u64,
    /// Bytes that were here and were given up for want of room.
    #[serde(default)]
    pub evicted: u64,
    /// Its inodes.
    pub inodes: u64,
    /// How many snapshots use it.
    pub snapshots: usize,
    /// Whether it is mounted.
    pub attached: bool,
    /// Whether it is mounted and read through this daemon; else nothing of it passes through a process of ours (*native*).
    #[serde(default)]
    pub lazy: bool,
    /// Whether it belongs to a pinned image.
    #[serde(default)]
    pub pinned: bool,
    /// Whether it is known to be durable in the store.
    pub published: bool,
    /// When a snapshot last began to use it, seconds since 1970 UTC.
    pub used: i64,
}

impl LayerReport {
    /// How it is mounted, for people, and whether it stays here.
    pub fn mounted(&self) -> &'static str {
        match (self.attached, self.lazy, self.pinned) {
            (false, _, false) => "no",
            (false, _, true) => "no, pinned",
            (true, true, false) => "lazy",
            (true, true, true) => "lazy, pinned",
            (true, false, false) => "native",
            (true, false, true) => "native, pinned",
        }
    }
}

/// Where one layer of an image or a container came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerExplained {
    /// Its chain ID, if it is an image's.
    pub chain: Option<String>,
    /// `image` (a layer image), `files` (a directory), both, or `absent`.
    pub kind: String,
    /// The layer image.
    pub image: Option<LayerReport>,
    /// What the store said when it was asked for this layer.
    pub remote: Option<String>,
    /// What is known of starts of the image of which this is the uppermost layer.
    #[serde(default)]
    pub trace: Option<String>,
    /// Why it is not published, if it is not and was to be.
    pub publish: Option<String>,
    /// What came of the names of the images of which this is the uppermost layer, where the daemon writes them.
    #[serde(default)]
    pub names: Vec<String>,
}
