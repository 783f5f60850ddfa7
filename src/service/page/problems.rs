//! What an operator should look at, and what to do about it. `src/design/operations.md` says more under the same names, which
//! are those of the alerts in `contrib/prometheus`.

use crate::snapshot::report::{LayerReport, StatusReport};

/// Less room than this stops pulls before long.
const LITTLE: u64 = 1 << 30;
/// Less of a pool than this is little.
const LITTLE_PERCENT: u64 = 10;
/// How many layers are named one by one.
const NAMED: usize = 5;

/// Something that does not mend itself, or not soon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trouble {
    /// The alert about it.
    pub(super) alarm: &'static str,
    /// Whether containers may notice.
    pub(super) is_urgent: bool,
    pub(super) what: String,
    pub(super) to_do: &'static str,
}

/// What there is to look at, the urgent first.
pub(super) fn of(status: &StatusReport, layers: &[LayerReport]) -> Vec<Trouble> {
    let mut found: Vec<Trouble> = [
        of_disk(status),
        of_pools(status),
        of_layers(layers),
        of_store(status),
        of_publishing(status),
        of_host(status),
    ]
    .into_iter()
    .flatten()
    .collect();
    found.sort_by_key(|trouble| !trouble.is_urgent);
    found
}

fn of_disk(status: &StatusReport) -> Vec<Trouble> {
    let (mut found, disk) = (Vec::new(), &status.layers.disk);
    if status.free_bytes < LITTLE {
        found.push(Trouble {
            alarm: "SpeedyDiskFull",
            is_urgent: true,
            what: format!("Only {} are free on the disk.", size(status.free_bytes)),
            to_do: "Remove images that are not used, set layers.limit, or give the root a larger disk.",
        });
    }
    if let Some(limit) = disk.limit.filter(|limit| status.layers.bytes > *limit) {
        found.push(Trouble {
            alarm: "SpeedyLayersOverLimit",
            is_urgent: false,
            what: format!(
                "Layers take {}, more than layers.limit ({}).",
                size(status.layers.bytes),
                size(limit)
            ),
            to_do: "What is mounted natively or not on the store cannot be given up: see `speedy layers`.",
        });
    }
    if disk.damaged > disk.repaired {
        found.push(Trouble {
            alarm: "SpeedyLayerDamaged",
            is_urgent: true,
            what: format!(
                "The disk has changed {} chunks that are not repaired yet.",
                disk.damaged - disk.repaired
            ),
            to_do: "They are fetched again from the store; replace the disk if it happens again.",
        });
    }
    found
}

fn of_pools(status: &StatusReport) -> Vec<Trouble> {
    let mut found = Vec::new();
    for pool in &status.pools {
        let what = match &pool.trouble {
            Some(trouble) => trouble.clone(),
            None if pool.data_free.min(pool.metadata_free) < LITTLE_PERCENT => format!(
                "{} % of data and {} % of metadata are free in the pool.",
                pool.data_free, pool.metadata_free
            ),
            None => continue,
        };
        found.push(Trouble {
            alarm: "SpeedyPoolInTrouble",
            is_urgent: true,
            what: format!("{}: {what}", pool.root),
            to_do: "`speedy check` says it, too; what is left takes no more snapshots below pool.reserve.",
        });
    }
    found
}

fn of_layers(layers: &[LayerReport]) -> Vec<Trouble> {
    let failed = layers.iter().filter(|layer| layer.state == "failed").take(NAMED);
    let trouble = |layer: &LayerReport| Trouble {
        alarm: "SpeedyLayersFailed",
        is_urgent: true,
        what: format!(
            "Layer {} cannot be fetched: {}",
            layer.serial,
            layer.problem.as_deref().unwrap_or("the log says why")
        ),
        to_do: "It is tried again. If the store lacks chunks: `speedy fsck --repair`; else remove the image and pull it again.",
    };
    failed.map(trouble).collect()
}

fn of_store(status: &StatusReport) -> Vec<Trouble> {
    let Some(store) = &status.store else { return Vec::new() };
    let mut found = Vec::new();
    let wrong = store.scrub.as_ref().map_or(0, |scrub| scrub.missing + scrub.damaged);
    if wrong > 0 {
        found.push(Trouble {
            alarm: "SpeedyStoreDamaged",
            is_urgent: true,
            what: format!("{wrong} objects of the store are missing or damaged."),
            to_do: "`speedy fsck --repair` on nodes that pulled or published the images brings them back.",
        });
    }
    if !store.numbers.resting {
        return found;
    }
    let reads_wait = status.layers.lazy > 0;
    found.push(Trouble {
        alarm: "SpeedyStoreUnreachable",
        is_urgent: reads_wait,
        what: format!("The store {} does not answer.", store.url),
        to_do: match reads_wait {
            true => "Layers that are not all here wait for it: look at its endpoint and the network now.",
            false => "Pulls go to the registry meanwhile: look at its endpoint and the network.",
        },
    });
    found
}

fn of_publishing(status: &StatusReport) -> Vec<Trouble> {
    let publish = &status.publish;
    let mut found = Vec::new();
    if publish.dropped > 0 {
        found.push(Trouble {
            alarm: "SpeedyPublishGivenUp",
            is_urgent: false,
            what: format!("{} layers were given up and are not published.", publish.dropped),
            to_do: "The table says why; `speedy publish IMAGE` tries it again while the image is in containerd.",
        });
    }
    let again = publish.problems.iter().filter(|problem| problem.retried).count();
    if again > 0 {
        found.push(Trouble {
            alarm: "SpeedyPublishStuck",
            is_urgent: false,
            what: format!("{again} layers or image names could not be published yet."),
            to_do: "They are tried again by themselves; the table says what stood in the way.",
        });
    }
    found
}

fn of_host(status: &StatusReport) -> Vec<Trouble> {
    let mut found = Vec::new();
    if status.containerd.is_none() {
        found.push(Trouble {
            alarm: "SpeedyContainerdAway",
            is_urgent: false,
            what: "containerd does not answer on its socket.".to_owned(),
            to_do: "Snapshots are served all the same; publishing and removals wait for its events: see the key `containerd`.",
        });
    }
    let cannot = |text: &str| text.starts_with("none") || text.starts_with("off: this kernel");
    if cannot(&status.layer_images) || cannot(&status.lazy) {
        found.push(Trouble {
            alarm: "SpeedyKernelCannot",
            is_urgent: false,
            what: format!("Layer images: {}; lazy reads: {}.", status.layer_images, status.lazy),
            to_do: "`speedy check` says what this kernel lacks.",
        });
    }
    found
}

fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
