//! Traces: which chunks the starts of an image read, and in which order.
//!
//! **What.** A [`Trace`] is what one node saw of one start. Each node writes its own, under the image's chain and the id of its key;
//! whoever is about to start the image reads some of them, merges them ([`merge`]), and fetches these chunks first.
//!
//! **Format.** The message `Trace` of `proto/speedy/v1/layer.proto`, version 1, canonical, in the object
//! `traces/<2 hex>/<chain>/<key id>`. A layer is named by the digest of its index, so that a trace says nothing of a layer that was
//! cut or built otherwise.
//!
//! **Invariants.** A trace is a hint. It is not signed, and every byte of it may come from an enemy who can write to the store: it
//! has bounds in size, layers and steps, and no step but names a layer of its list and a number that a chunk can have. What it
//! can do at worst is to change the order in which the chunks of the image's own layers are fetched.
//!
//! **When it fails.** A trace that cannot be read is passed over; an image without traces is started without.

use std::collections::{HashMap, HashSet};

use futures::{FutureExt, StreamExt, stream};
use prost::Message;

use super::index::{IndexDigest, Limits};
use super::{ContentError, ContentStore, raw};
use crate::object::{ObjectError, ObjectInfo, layout};
use crate::oci::ChainId;
use crate::proto::speedy::v1 as wire;

const FORMAT: u32 = 1;
/// The most layers of which a trace can tell. overlayfs takes some 500.
pub const MOST_LAYERS: usize = 1024;
/// The most chunks in a trace: some 16 GiB of data.
pub const MOST_STEPS: usize = 65_536;
/// More than any trace has, in bytes: a step takes five at most, two for the layer and three for the chunk.
const LONGEST: u64 = 512 * 1024;
/// How many traces of an image are looked at, and how many of these are read: this node's own and the newest.
const MOST_LISTED: usize = 64;
const MOST_READ: usize = 8;

/// Why bytes are no trace of an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TraceError {
    /// Written by a newer Speedy.
    #[error("trace has format version {found}, this speedy knows {FORMAT}")]
    UnknownFormat {
        /// Its version.
        found: u32,
    },
    /// It has a part that no trace has.
    #[error("trace is malformed: {0}")]
    Malformed(&'static str),
    /// It was made for another image.
    #[error("trace belongs to another image")]
    Misplaced,
}

/// One chunk of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Step {
    /// The layer, by its place in the trace's list.
    pub layer: u16,
    /// The chunk, by its place in the layer's index.
    pub chunk: u32,
}

/// What a start read, each chunk once, in the order of the first reads. Checked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Trace {
    layers: Vec<IndexDigest>,
    steps: Vec<Step>,
}

/// The traces of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Traces {
    /// Those that can be read, this node's among them.
    pub traces: Vec<Trace>,
    /// How many cannot.
    pub passed_over: usize,
    /// What this node has written before.
    pub own: Option<Trace>,
}

impl Trace {
    /// A trace of these layers; refused if it is none that could be read again.
    pub fn new(layers: Vec<IndexDigest>, steps: Vec<Step>) -> Result<Trace, TraceError> {
        let malformed = |problem| Err(TraceError::Malformed(problem));
        if layers.len() > MOST_LAYERS || steps.len() > MOST_STEPS {
            return malformed("more layers or chunks than a trace has");
        }
        if layers.iter().collect::<HashSet<_>>().len() != layers.len() {
            return malformed("a layer twice");
        }
        let chunks = Limits::default().chunks;
        let fits = |step: &Step| {
            usize::from(step.layer) < layers.len()
                && usize::try_from(step.chunk).is_ok_and(|chunk| chunk < chunks)
        };
        if !steps.iter().all(fits) {
            return malformed("a chunk of no layer, or beyond any");
        }
        if steps.iter().collect::<HashSet<_>>().len() != steps.len() {
            return malformed("a chunk twice");
        }
        Ok(Trace { layers, steps })
    }

    /// The layers of which it tells, whether they were read or not.
    pub fn layers(&self) -> &[IndexDigest] {
        &self.layers
    }

    /// What was read, in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Its bytes; always the same ones.
    pub fn encode(&self, chain: &ChainId) -> Vec<u8> {
        let message = wire::Trace {
            format: FORMAT,
            chain_id: raw(&chain.0).to_vec(),
            indexes: self.layers.iter().flat_map(|layer| *layer.as_bytes()).collect(),
            layers: self.steps.iter().map(|step| step.layer.into()).collect(),
            chunks: self.steps.iter().map(|step| step.chunk).collect(),
        };
        message.encode_to_vec()
    }

    /// What these bytes say of the image with this chain.
    pub fn decode(bytes: &[u8], chain: &ChainId) -> Result<Trace, TraceError> {
        if u64::try_from(bytes.len()).is_ok_and(|length| length > LONGEST) {
            return Err(TraceError::Malformed("too long"));
        }
        let message = wire::Trace::decode(bytes).map_err(|_| TraceError::Malformed("not a message"))?;
        match message.format {
            FORMAT => {}
            // An empty object is a message, too: one of no version.
            0 => return Err(TraceError::Malformed("no format version")),
            found => return Err(TraceError::UnknownFormat { found }),
        }
        if message.chain_id != raw(&chain.0) {
            return Err(TraceError::Misplaced);
        }
        let (indexes, rest) = message.indexes.as_chunks::<32>();
        if !rest.is_empty() || message.layers.len() != message.chunks.len() {
            return Err(TraceError::Malformed("its columns differ in length"));
        }
        let layers = indexes.iter().map(|digest| IndexDigest::from_bytes(*digest)).collect();
        let step = |(layer, chunk): (&u32, &u32)| {
            let layer = u16::try_from(*layer).map_err(|_| TraceError::Malformed("a chunk of no layer"))?;
            Ok(Step { layer, chunk: *chunk })
        };
        let steps: Result<Vec<Step>, TraceError> =
            message.layers.iter().zip(&message.chunks).map(step).collect();
        let trace = Trace::new(layers, steps?)?;
        if message.encode_to_vec() != bytes {
            return Err(TraceError::Malformed("not in canonical form"));
        }
        Ok(trace)
    }
}

/// One trace of all: every chunk that is in any, in the order of their mean places.
pub fn merge(traces: &[Trace]) -> Trace {
    let mut layers: Vec<IndexDigest> = Vec::new();
    let mut numbers: HashMap<IndexDigest, u16> = HashMap::new();
    // Of each chunk the sum of its places, and in how many traces it is.
    let mut places: HashMap<Step, (u64, u64)> = HashMap::new();
    for trace in traces {
        for digest in &trace.layers {
            let (known, next) = (numbers.contains_key(digest), u16::try_from(layers.len()));
            if let (false, Ok(next), true) = (known, next, layers.len() < MOST_LAYERS) {
                numbers.insert(*digest, next);
                layers.push(*digest);
            }
        }
        for (place, step) in (0..).zip(&trace.steps) {
            if let Some(layer) = numbers.get(&trace.layers[usize::from(step.layer)]) {
                let sum = places.entry(Step { layer: *layer, chunk: step.chunk }).or_default();
                *sum = (sum.0 + place, sum.1 + 1);
            }
        }
    }
    let mut steps: Vec<Step> = places.keys().copied().collect();
    // Fractions that are alike come in the order of the image.
    steps.sort_by_cached_key(|step| {
        let (sum, count) = places[step];
        ((sum << 16) / count, *step)
    });
    steps.truncate(MOST_STEPS);
    Trace { layers, steps }
}

impl ContentStore {
    /// The traces of an image, the newest of them. Damaged ones are passed over.
    pub async fn traces(&self, chain: &ChainId) -> Result<Traces, ContentError> {
        let mut listed = self.parts.objects.list(&layout::traces(chain), MOST_LISTED).await?;
        let own = self.own_trace(chain);
        let key = |object: &ObjectInfo| (object.name != own, -object.modified, object.name.clone());
        listed.sort_by_cached_key(key);
        listed.truncate(MOST_READ);
        let read = listed.into_iter().map(|object| {
            // Boxed: the compiler cannot tell otherwise that the whole may move between threads.
            async move {
                let bytes = match self.parts.objects.get(&object.name, LONGEST).await {
                    Err(ObjectError::TooLarge { .. }) => Some(Err(TraceError::Malformed("too long"))),
                    got => got?.map(|bytes| Trace::decode(&bytes, chain)),
                };
                if let Some(Err(error)) = &bytes {
                    tracing::debug!(name = object.name, %error, "a trace is passed over");
                }
                Ok::<_, ContentError>((bytes, object.name))
            }
            .boxed()
        });
        let mut read = stream::iter(read).buffered(MOST_READ);
        let mut found = Traces::default();
        while let Some(answer) = read.next().await {
            let (trace, name) = answer?;
            match trace {
                Some(Ok(trace)) => {
                    found.own = found.own.or_else(|| (name == own).then(|| trace.clone()));
                    found.traces.push(trace);
                }
                Some(Err(_)) => found.passed_over += 1,
                None => {}
            }
        }
        Ok(found)
    }

    /// Writes what this node saw of a start of the image with this chain, in place of what it wrote before.
    pub async fn publish_trace(&self, chain: &ChainId, trace: &Trace) -> Result<(), ContentError> {
        Ok(self.parts.objects.put(&self.own_trace(chain), trace.encode(chain).into()).await?)
    }

    fn own_trace(&self, chain: &ChainId) -> String {
        format!("{}/{}", layout::traces(chain), self.publisher().id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::digest_of;

    fn chain(byte: u8) -> ChainId {
        ChainId(digest_of(&[byte; 32]))
    }

    fn layer(byte: u8) -> IndexDigest {
        IndexDigest::from_bytes([byte; 32])
    }

    fn trace(layers: &[u8], steps: &[(u16, u32)]) -> Trace {
        let steps = steps.iter().map(|(layer, chunk)| Step { layer: *layer, chunk: *chunk }).collect();
        Trace::new(layers.iter().map(|byte| layer(*byte)).collect(), steps).unwrap()
    }

    #[test]
    fn a_trace_is_read_as_it_was_written() {
        let written = trace(&[1, 2], &[(1, 7), (0, 3), (1, 8)]);
        assert_eq!(Trace::decode(&written.encode(&chain(9)), &chain(9)), Ok(written.clone()));
        assert_eq!(Trace::decode(&written.encode(&chain(9)), &chain(8)), Err(TraceError::Misplaced));
    }

    #[test]
    fn the_largest_trace_fits() {
        let layers = (0..MOST_LAYERS).map(|n| IndexDigest::of(n.to_string().as_bytes())).collect();
        let (last, most) = (u16::try_from(MOST_LAYERS - 1).unwrap(), u32::try_from(MOST_STEPS).unwrap());
        let top = u32::try_from(Limits::default().chunks).unwrap();
        let steps = (0..most).map(|n| Step { layer: last, chunk: top - 1 - n }).collect();
        let bytes = Trace::new(layers, steps).unwrap().encode(&chain(1));
        assert!(u64::try_from(bytes.len()).unwrap() <= LONGEST, "{} bytes", bytes.len());
        Trace::decode(&bytes, &chain(1)).unwrap();
    }

    #[test]
    fn what_no_node_writes_is_refused() {
        let good = wire::Trace::decode(&trace(&[1], &[(0, 3)]).encode(&chain(1))[..]).unwrap();
        let decode = |message: wire::Trace| Trace::decode(&message.encode_to_vec(), &chain(1));
        assert!(decode(good.clone()).is_ok());
        let newer = wire::Trace { format: 2, ..good.clone() };
        assert_eq!(decode(newer), Err(TraceError::UnknownFormat { found: 2 }));
        for bad in [
            wire::Trace::default(),
            wire::Trace { indexes: vec![1; 33], ..good.clone() },
            wire::Trace { indexes: vec![1; 64], ..good.clone() },
            wire::Trace { layers: vec![1], ..good.clone() },
            wire::Trace { layers: vec![1 << 16], ..good.clone() },
            wire::Trace { chunks: vec![u32::MAX], ..good.clone() },
            wire::Trace { chunks: vec![1 << 20], ..good.clone() },
            wire::Trace { layers: vec![0, 0], ..good.clone() },
            wire::Trace { layers: vec![0, 0], chunks: vec![3, 3], ..good.clone() },
            wire::Trace {
                layers: vec![0; MOST_STEPS + 1],
                chunks: (0..=u32::try_from(MOST_STEPS).unwrap()).collect(),
                ..good.clone()
            },
            wire::Trace {
                indexes: (0..=MOST_LAYERS)
                    .flat_map(|n| *IndexDigest::of(n.to_string().as_bytes()).as_bytes())
                    .collect(),
                ..good.clone()
            },
        ] {
            assert!(matches!(decode(bad), Err(TraceError::Malformed(_))));
        }
        let long = vec![0; usize::try_from(LONGEST).unwrap() + 1];
        assert_eq!(Trace::decode(&long, &chain(1)), Err(TraceError::Malformed("too long")));
        // A field that this version does not know.
        let more = [&good.encode_to_vec()[..], &[0x30, 1]].concat();
        assert_eq!(Trace::decode(&more, &chain(1)), Err(TraceError::Malformed("not in canonical form")));
    }

    #[test]
    fn traces_are_merged_by_mean_places() {
        let one = trace(&[1, 2], &[(0, 5), (1, 6), (0, 7)]);
        assert_eq!(merge(std::slice::from_ref(&one)), one);
        // The other node had the first layer already, and its start began with something else.
        let other = trace(&[2], &[(0, 9), (0, 6)]);
        let merged = merge(&[one, other]);
        assert_eq!(merged, trace(&[1, 2], &[(0, 5), (1, 9), (1, 6), (0, 7)]));
        assert_eq!(merge(&[]), Trace::default());
    }

    #[test]
    fn merged_traces_are_not_longer_than_one() {
        let most = u32::try_from(MOST_STEPS).unwrap();
        let of = |from: u32| {
            let steps = (from..from + most).map(|chunk| Step { layer: 0, chunk }).collect();
            Trace::new(vec![layer(1)], steps).unwrap()
        };
        let merged = merge(&[of(0), of(most), of(2 * most)]);
        assert_eq!(merged.steps().len(), MOST_STEPS);
        Trace::decode(&merged.encode(&chain(1)), &chain(1)).unwrap();
        let many = |from: usize| {
            let layers =
                (from..from + MOST_LAYERS).map(|n| IndexDigest::of(n.to_string().as_bytes())).collect();
            Trace::new(layers, vec![Step { layer: 5, chunk: 1 }]).unwrap()
        };
        let merged = merge(&[many(0), many(MOST_LAYERS)]);
        assert_eq!((merged.layers().len(), merged.steps().len()), (MOST_LAYERS, 1));
    }
}
