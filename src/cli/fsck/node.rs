//! This node's layer images, read only: each complete one against its own index. The daemon may run; what it repairs or gives up
//! meanwhile is no finding.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::show::Meter;
use crate::chunk::{ChunkId, MAX_CHUNK};
use crate::config::Config;
use crate::content::index::{LayerIndex, Limits};
use crate::layer::{self, LayerStore};
use crate::sys::blocking;

/// What was found on this node.
#[derive(Debug, Default)]
pub(super) struct NodeReport {
    /// Layer images that were compared with their index.
    pub(super) checked: u64,
    /// Those that have none, or are not wholly here.
    pub(super) passed_over: u64,
    /// Bytes that were read.
    pub(super) bytes: u64,
    pub(super) damaged: Vec<Damaged>,
}

/// A layer image that is not what its index says.
#[derive(Debug)]
pub(super) struct Damaged {
    pub(super) serial: u64,
    pub(super) problem: String,
    pub(super) to_do: String,
}

pub(super) async fn check(
    config: &Config,
    quick: bool,
    rate: u64,
    repair: bool,
    meter: &Meter,
) -> anyhow::Result<NodeReport> {
    let root = config.root.clone();
    let serials = blocking(move || serials(root)).await?;
    let mut report = NodeReport::default();
    let total = serials.len();
    for (done, serial) in serials.into_iter().enumerate() {
        meter.say(done, total, format!("layer images of this node: {done}"));
        let store = LayerStore::at(&config.root);
        match blocking(move || Ok::<_, anyhow::Error>(look(&store, serial, quick, rate))).await? {
            None => report.passed_over += 1,
            Some((bytes, problem)) => {
                report.checked += 1;
                report.bytes += bytes;
                let Some(problem) = problem else { continue };
                let to_do = match repair {
                    true => {
                        "the daemon's scrub repairs it when it comes by; sooner: remove the images that use it and pull them again"
                    }
                    false => "the daemon's scrub repairs it from the store (scrub.rate, scrub.every)",
                };
                report.damaged.push(Damaged { serial, problem, to_do: to_do.to_owned() });
            }
        }
    }
    Ok(report)
}

fn serials(root: PathBuf) -> anyhow::Result<Vec<u64>> {
    if !root.join("layer").is_dir() {
        return Ok(Vec::new());
    }
    Ok(layer::images_below(&root)?)
}

/// What was read of a layer image, and what is wrong with it; nothing for one that has no index or is not complete.
fn look(store: &LayerStore, serial: u64, quick: bool, rate: u64) -> Option<(u64, Option<String>)> {
    if !store.is_complete(serial) {
        return None;
    }
    let index = LayerIndex::decode(&store.read_index(serial)?, Limits::default()).ok()?;
    let file = store.read(serial).ok()?;
    let size = file.metadata().map(|meta| meta.len()).unwrap_or(0);
    let should = index.facts().layout.size;
    if size != should {
        return Some((0, Some(format!("{size} bytes instead of {should}"))));
    }
    if quick {
        return Some((0, None));
    }
    let (began, mut bytes, mut wrong) = (Instant::now(), 0, 0_u64);
    let mut buffer = vec![0; MAX_CHUNK as usize];
    for (offset, chunk) in index.chunks() {
        let plain = &mut buffer[..chunk.length as usize];
        let right = file.read_exact_at(plain, offset).is_ok() && ChunkId::of(plain) == chunk.id;
        wrong += u64::from(!right);
        bytes += u64::from(chunk.length);
        if rate > 0 {
            #[expect(clippy::cast_precision_loss, reason = "a pause need not be exact")]
            let due = Duration::from_secs_f64(bytes as f64 / rate as f64);
            std::thread::sleep(due.saturating_sub(began.elapsed()));
        }
    }
    // Given up or repaired while it was read: what was read is no longer its file.
    if wrong > 0 && !store.is_complete(serial) {
        return None;
    }
    Some((bytes, (wrong > 0).then(|| format!("{wrong} chunks have other bytes than its index says"))))
}
