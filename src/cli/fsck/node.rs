//! This node's layer images, read only, each against its own index: a complete one whole, of another one what its map says is here. The
//! daemon may run; what it repairs, fills or gives up meanwhile is no finding.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::show::Meter;
use crate::chunk::{ChunkId, MAX_CHUNK};
use crate::config::Config;
use crate::content::index::{IndexDigest, LayerIndex, Limits};
use crate::layer::{self, LayerStore};
use crate::sys::blocking;

/// What was found on this node.
#[derive(Debug, Default)]
pub(super) struct NodeReport {
    /// Layer images that were compared with their index.
    pub(super) checked: u64,
    /// Those of them that are not wholly here.
    pub(super) incomplete: u64,
    /// Those that have no index: nobody can say what they should be.
    pub(super) without_index: u64,
    /// Those that are not wholly here and have no map of this boot: the daemon hashes what is there before it uses it.
    pub(super) unvouched: u64,
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

/// What came of looking at a layer image.
enum Looked {
    Checked {
        whole: bool,
        bytes: u64,
        problem: Option<String>,
    },
    WithoutIndex,
    Unvouched,
    /// Given up, or about to be made.
    Gone,
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
            Looked::Gone => {}
            Looked::WithoutIndex => report.without_index += 1,
            Looked::Unvouched => report.unvouched += 1,
            Looked::Checked { whole, bytes, problem } => {
                report.checked += 1;
                report.incomplete += u64::from(!whole);
                report.bytes += bytes;
                let Some(problem) = problem else { continue };
                report.damaged.push(Damaged { serial, problem, to_do: to_do(whole, repair).to_owned() });
            }
        }
    }
    Ok(report)
}

fn to_do(whole: bool, repair: bool) -> &'static str {
    match (whole, repair) {
        (false, _) => {
            "the daemon fetches it again when the layer is wholly here and is compared; sooner: remove the images that use it and pull them again"
        }
        (true, true) => {
            "the daemon's scrub repairs it when it comes by; sooner: remove the images that use it and pull them again"
        }
        (true, false) => "the daemon's scrub repairs it from the store (scrub.rate, scrub.every)",
    }
}

fn serials(root: PathBuf) -> anyhow::Result<Vec<u64>> {
    if !root.join("layer").is_dir() {
        return Ok(Vec::new());
    }
    Ok(layer::images_below(&root)?)
}

fn look(store: &LayerStore, serial: u64, quick: bool, rate: u64) -> Looked {
    let whole = store.is_complete(serial);
    let opened = if whole { store.read(serial) } else { store.read_any(serial) };
    let Ok(file) = opened else { return Looked::Gone };
    let Some(bytes) = store.read_index(serial) else { return Looked::WithoutIndex };
    let Ok(index) = LayerIndex::decode(&bytes, Limits::default()) else { return Looked::WithoutIndex };
    let map = || store.vouched_for(serial, IndexDigest::of(&bytes), index.chunks().len());
    let checked = |bytes, problem| Looked::Checked { whole, bytes, problem };
    let here = match whole {
        true => vec![true; index.chunks().len()],
        false => match map() {
            Some(here) => here,
            None => return Looked::Unvouched,
        },
    };
    let size = file.metadata().map(|meta| meta.len()).unwrap_or(0);
    let should = index.facts().layout.size;
    if whole && size != should {
        return checked(0, Some(format!("{size} bytes instead of {should}")));
    }
    if quick {
        return checked(0, None);
    }
    let (bytes, mut wrong) = compare(&file, &index, &here, rate);
    if !wrong.is_empty() && whole && !store.is_complete(serial) {
        // Given up or repaired while it was read: what was read is no longer its file.
        return Looked::Gone;
    }
    if !wrong.is_empty() && !whole {
        // What was given up or doubted meanwhile says so in the map, before its bytes go.
        let here = map().unwrap_or_default();
        wrong.retain(|at| here.get(*at) == Some(&true));
    }
    let count = wrong.len();
    checked(bytes, (count > 0).then(|| format!("{count} chunks have other bytes than its index says")))
}

/// How many bytes were read of the chunks that are here, and which of these are others than the index says.
fn compare(file: &File, index: &LayerIndex, here: &[bool], rate: u64) -> (u64, Vec<usize>) {
    let (began, mut bytes, mut wrong) = (Instant::now(), 0, Vec::new());
    let mut buffer = vec![0; MAX_CHUNK as usize];
    for (at, (offset, chunk)) in index.chunks().enumerate().filter(|(at, _)| here[*at]) {
        let plain = &mut buffer[..chunk.length as usize];
        let right = file.read_exact_at(plain, offset).is_ok() && ChunkId::of(plain) == chunk.id;
        wrong.extend((!right).then_some(at));
        bytes += u64::from(chunk.length);
        if rate > 0 {
            #[expect(clippy::cast_precision_loss, reason = "a pause need not be exact")]
            let due = Duration::from_secs_f64(bytes as f64 / rate as f64);
            std::thread::sleep(due.saturating_sub(began.elapsed()));
        }
    }
    (bytes, wrong)
}
