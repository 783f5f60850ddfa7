//! Traces on a store that anybody can write to.

use bytes::Bytes;
use speedy::content::ContentStore;
use speedy::content::index::IndexDigest;
use speedy::content::trace::{MOST_STEPS, Step, Trace, Traces, merge};
use speedy::content::trust::Trust;
use speedy::object::{Objects, layout};
use speedy::oci::ChainId;

use super::support::{chain, key, node};
use crate::fuzz;
use crate::support::runtime;

fn trace(layer: u8, chunks: &[u32]) -> Trace {
    let steps = chunks.iter().map(|chunk| Step { layer: 0, chunk: *chunk }).collect();
    Trace::new(vec![IndexDigest::of(&[layer])], steps).unwrap()
}

fn of(objects: &Objects, seed: u8) -> ContentStore {
    node(objects, key(seed), Trust::Keys(Vec::new())).0
}

async fn traces(store: &ContentStore, of: &ChainId) -> Traces {
    store.traces(of).await.unwrap()
}

#[test]
fn a_node_uses_what_others_saw_and_keeps_its_own() {
    runtime().block_on(async {
        let (objects, image) = (Objects::memory(), chain("image"));
        let (one, other) = (of(&objects, 1), of(&objects, 2));
        assert_eq!(traces(&one, &image).await, Traces::default());
        one.publish_trace(&image, &trace(1, &[5, 3])).await.unwrap();
        // Nobody trusts the other; what a trace can do needs no trust.
        other.publish_trace(&image, &trace(1, &[3, 4])).await.unwrap();
        let found = traces(&one, &image).await;
        assert_eq!(found.own, Some(trace(1, &[5, 3])));
        assert_eq!((found.traces.len(), found.passed_over), (2, 0));
        assert_eq!(merge(&found.traces), trace(1, &[5, 3, 4]));
        one.publish_trace(&image, &trace(1, &[9])).await.unwrap();
        let found = traces(&other, &image).await;
        assert_eq!((found.own, found.traces.len()), (Some(trace(1, &[3, 4])), 2));
        assert!(found.traces.contains(&trace(1, &[9])));
        assert_eq!(traces(&one, &chain("another image")).await, Traces::default());
    });
}

#[test]
fn damaged_and_foreign_traces_are_passed_over() {
    runtime().block_on(async {
        let (objects, image) = (Objects::memory(), chain("image"));
        let store = of(&objects, 1);
        store.publish_trace(&image, &trace(1, &[5])).await.unwrap();
        let good = trace(2, &[7, 8]).encode(&image);
        let bad = [
            ("cut", Bytes::from(good[..good.len() - 1].to_vec())),
            ("rubbish", Bytes::from_static(b"rubbish")),
            ("empty", Bytes::new()),
            ("long", Bytes::from(vec![0; 1 << 20])),
            ("replayed", Bytes::from(trace(3, &[7]).encode(&chain("another image")))),
        ];
        for (name, bytes) in bad {
            objects.put(&format!("{}/{name}", layout::traces(&image)), bytes).await.unwrap();
        }
        let found = traces(&store, &image).await;
        assert_eq!((found.traces, found.passed_over), (vec![trace(1, &[5])], 5));
    });
}

/// Somebody who can write to the store can write a million traces.
#[test]
fn few_of_many_traces_are_read() {
    runtime().block_on(async {
        let (objects, image) = (Objects::memory(), chain("image"));
        for n in 0..100_u32 {
            let name = format!("{}/{n:016x}", layout::traces(&image));
            objects.put(&name, trace(1, &[n]).encode(&image).into()).await.unwrap();
        }
        assert_eq!(traces(&of(&objects, 1), &image).await.traces.len(), 8);
    });
}

#[test]
fn fuzz_trace() {
    let image = chain("image");
    let two = [IndexDigest::of(&[1]), IndexDigest::of(&[2])].to_vec();
    let steps = (0..300).map(|n| Step { layer: n % 2, chunk: u32::from(n) * 7 }).collect();
    let corpus = [
        trace(1, &[5, 3, 300, 70_000]).encode(&image),
        trace(1, &[]).encode(&image),
        Trace::new(two, steps).unwrap().encode(&image),
    ];
    fuzz::run("trace", &corpus, |bytes| {
        let Ok(trace) = Trace::decode(bytes, &image) else { return };
        assert_eq!(trace.encode(&image), bytes, "what is read is what would be written");
        assert!(trace.steps().len() <= MOST_STEPS);
        assert!(trace.steps().iter().all(|step| usize::from(step.layer) < trace.layers().len()));
        let merged = merge(&[trace.clone(), trace.clone()]);
        assert_eq!(merged.steps().len(), trace.steps().len());
        assert_eq!(merged.layers(), trace.layers());
    });
}
