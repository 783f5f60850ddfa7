//! Layer images that are not wholly here: any mix of reads gives the layer's bytes, whatever store, disk and process do.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::join_all;
use proptest::prelude::*;
use speedy::layer::cold::Cold as Layer;
use speedy::layer::lazy::session::Source as _;

use crate::cold::{Cold, noise};
use crate::support::runtime;

fn joined(pieces: &[Bytes]) -> Vec<u8> {
    pieces.concat()
}

fn at<'a>(bytes: &'a [u8], range: &Range<u64>) -> &'a [u8] {
    &bytes[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]
}

/// Some chunks, holes between them, and files that are shorter than a chunk.
async fn some_layer(root: &std::path::Path) -> Cold {
    let mut large = noise(3, 5 << 20);
    large[2 << 20..3 << 20].fill(0);
    let small: Vec<Vec<u8>> =
        (0..40).map(|seed| noise(seed + 10, 5000 + 700 * usize::try_from(seed).unwrap())).collect();
    let names: Vec<String> = (0..small.len()).map(|n| format!("small/{n}")).collect();
    let mut files = vec![("large", &large[..])];
    files.extend(names.iter().zip(&small).map(|(name, content)| (&name[..], &content[..])));
    Cold::new(root, &files).await
}

/// Where some bytes of files are.
fn data(node: &Cold) -> Range<u64> {
    let (start, _) = node.index.chunk(2);
    start..start + 4096
}

async fn read(layer: &Arc<Layer>, range: Range<u64>) -> Vec<u8> {
    match layer.read_now(range.clone()) {
        Some(pieces) => joined(&pieces),
        None => joined(&layer.read(range).await.unwrap()),
    }
}

#[test]
fn reads_of_every_kind_give_the_layers_bytes() {
    let ranges = proptest::collection::vec((0_u64..1800, 1_u64..300), 1..24);
    proptest!(ProptestConfig::with_cases(24), |(ranges in ranges, at_once in any::<bool>(), again in any::<bool>())| {
        let dir = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let node = some_layer(dir.path()).await;
            node.store.delay.store(1, Ordering::SeqCst);
            let mut layer = node.begin(7).await;
            let size = node.bytes.len() as u64;
            let ranges: Vec<Range<u64>> = ranges.iter().map(|(start, length)| {
                let start = (start * 4096).min(size - 4096);
                start..(start + length * 4096).min(size)
            }).collect();
            let (first, second) = ranges.split_at(ranges.len() / 2);
            for part in [first, second] {
                match at_once {
                    true => for (range, bytes) in part.iter().zip(join_all(part.iter().map(|range| read(&layer, range.clone()))).await) {
                        prop_assert!(bytes == at(&node.bytes, range), "{range:?}");
                    },
                    false => for range in part {
                        let bytes = read(&layer, range.clone()).await;
                        prop_assert!(bytes == at(&node.bytes, range), "{range:?}");
                    },
                }
                if again {
                    // Another process, by what is on the disk.
                    let index = Arc::clone(&node.index);
                    layer = node.again().open(7, || Some(index)).unwrap();
                }
            }
            Ok(())
        })?;
    });
}

#[test]
fn eight_readers_have_eight_fetches_under_way() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layer = node.begin(7).await;
        node.store.most_under_way.store(0, Ordering::SeqCst);
        node.store.delay.store(50, Ordering::SeqCst);
        let chunks = node.index.chunks().len();
        let starts: Vec<u64> = (0..8).map(|n| node.index.chunk(1 + n * (chunks - 4) / 8).0).collect();
        join_all(starts.iter().map(|start| read(&layer, *start..start + 4096))).await;
        assert!(node.store.most_under_way.load(Ordering::SeqCst) >= 6);
    });
}

#[test]
fn a_chunk_is_fetched_once_however_many_want_it() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layer = node.begin(7).await;
        node.store.delay.store(20, Ordering::SeqCst);
        let before = node.store.gets.load(Ordering::SeqCst);
        let (start, chunk) = node.index.chunk(node.index.chunks().len() - 3);
        let range = start..start + u64::from(chunk.length).min(4096);
        let all = join_all((0..50).map(|_| read(&layer, range.clone()))).await;
        assert!(all.iter().all(|bytes| bytes == at(&node.bytes, &range)));
        // What comes after it is fetched ahead, if anything is.
        let ahead = node.index.chunks().len() - (node.index.chunks().len() - 3);
        assert!(node.store.gets.load(Ordering::SeqCst) - before <= ahead);
    });
}

#[test]
fn a_store_that_lies_or_fails_is_asked_again() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layer = node.begin(7).await;
        node.store.lies.store(2, Ordering::SeqCst);
        node.store.failures.store(2, Ordering::SeqCst);
        let range = data(&node);
        assert!(read(&layer, range.clone()).await == at(&node.bytes, &range));
    });
}

#[test]
fn a_filled_layer_is_complete_and_asks_nobody() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layer = node.begin(7).await;
        assert!(!layer.is_complete());
        layer.fill().await.unwrap();
        assert!(layer.is_complete());
        layer.verify().await.unwrap();
        node.files.complete(7, layer.file()).unwrap();
        node.files.remove_map(7).unwrap();
        assert!(std::fs::read(node.files.image(7)).unwrap() == node.bytes);
        let gets = node.store.gets.load(Ordering::SeqCst);
        let index = Arc::clone(&node.index);
        let later = node.again().open(7, || Some(index)).unwrap();
        assert!(later.is_complete());
        assert!(read(&later, 0..node.bytes.len() as u64).await == node.bytes);
        assert_eq!(node.store.gets.load(Ordering::SeqCst), gets);
    });
}

#[test]
fn what_the_disk_changed_is_found_before_it_is_used_and_fetched_again() {
    use std::os::unix::fs::FileExt;
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layer = node.begin(7).await;
        layer.fill().await.unwrap();
        drop(layer);
        // What was read back when it was written is not looked at again by the same process, unless its fill took long.
        let index = Arc::clone(&node.index);
        let layer = node.again().open(7, || Some(index)).unwrap();
        layer.file().write_all_at(&[0xff; 8], node.index.chunk(2).0 + 4096).unwrap();
        layer.file().sync_all().unwrap();
        layer.verify().await.unwrap_err();
        assert!(!layer.is_complete());
        layer.fill().await.unwrap();
        layer.verify().await.unwrap();
    });
}

#[test]
fn a_fill_that_took_long_is_looked_at_as_a_whole() {
    use std::os::unix::fs::FileExt;
    for (delay, finds) in [(5, false), (40_000, true)] {
        let paused = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        paused.unwrap().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let node = some_layer(dir.path()).await;
            let layer = node.begin(7).await;
            node.store.delay.store(delay, Ordering::SeqCst);
            layer.fill().await.unwrap();
            layer.file().write_all_at(&[0xff; 8], node.index.chunk(2).0 + 4096).unwrap();
            assert_eq!(layer.verify().await.is_err(), finds, "{delay} ms for a chunk");
        });
    }
}

/// A file whose map is lost, as after a reboot: what is in it is hashed, not believed, and not fetched again.
#[test]
fn without_a_map_the_file_is_hashed() {
    use std::os::unix::fs::FileExt;
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layer = node.begin(7).await;
        layer.fill().await.unwrap();
        layer.file().write_all_at(&[0xff; 8], node.index.chunk(2).0 + 4096).unwrap();
        node.files.remove_map(7).unwrap();
        let gets = node.store.gets.load(Ordering::SeqCst);
        let index = Arc::clone(&node.index);
        let later = node.again().open(7, || Some(index)).unwrap();
        assert!(!later.is_complete());
        assert!(read(&later, 0..node.bytes.len() as u64).await == node.bytes);
        assert_eq!(node.store.gets.load(Ordering::SeqCst), gets + 1, "only the damaged chunk is fetched");
    });
}

#[test]
fn what_is_not_there_any_more_is_an_error_in_the_end() {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap().block_on(
        async {
            let dir = tempfile::tempdir().unwrap();
            let node = some_layer(dir.path()).await;
            let layer = node.begin(7).await;
            node.store.failures.store(usize::MAX, Ordering::SeqCst);
            let error = layer.read(data(&node)).await.unwrap_err().to_string();
            assert!(error.contains("it was told to fail"), "{error}");
        },
    );
}

/// What one node saw of a start, another one has fetched before anybody reads, and nothing else of the layer until that is over.
#[test]
fn what_was_read_first_elsewhere_is_fetched_first() {
    runtime().block_on(async {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let node = some_layer(one.path()).await;
        node.begin(7).await;
        let last = node.index.chunks().len() - node.index.metadata_chunks().count();
        let wanted = [last, 6, 3, 5];
        let watch = node.layers.touches().watch(vec![7], 100);
        for at in [0, last, last, 6, 3, 5, 6] {
            let (start, chunk) = node.index.chunk(at);
            let length = chunk.length;
            if node.layers.read_now(7, start, length).is_none() {
                node.layers.read(7, start, length).await.unwrap();
            }
        }
        let order = watch.order();
        assert_eq!(order, wanted.map(|at| (7, at)), "the superblock is here before anybody reads");
        drop(watch);

        let node = some_layer(other.path()).await;
        let layer = node.begin(5).await;
        let held = node.layers.hold(vec![5]);
        node.store.asked.lock().unwrap().clear();
        let prefetching = async {
            for (_, at) in &order {
                assert!(layer.prefetch(*at).await.unwrap() > 0);
            }
            let asked = node.store.asked.lock().unwrap().clone();
            let ids: Vec<_> = wanted.iter().map(|at| node.index.chunk(*at).1.id).collect();
            assert_eq!(asked, ids, "a fill that is held takes no place on the link");
            for at in wanted {
                let (start, chunk) = node.index.chunk(at);
                let range = start..start + u64::from(chunk.length);
                assert!(
                    joined(&layer.read_now(range.clone()).unwrap()) == crate::reads::at(&node.bytes, &range)
                );
                assert_eq!(layer.prefetch(at).await.unwrap(), 0);
            }
            drop(held);
        };
        let (filled, ()) = futures::join!(layer.fill(), prefetching);
        filled.unwrap();
        assert!(layer.is_complete());
    });
}

/// A start that is faster than the link reads what its trace has not brought yet. Found at 100 Mbit/s: what was fetched ahead of such
/// reads was half as much again as the start needed, and in its way.
#[test]
fn whoever_reads_what_is_foretold_has_nothing_else_fetched() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layer = node.begin(5).await;
        let held = node.layers.hold(vec![5]);
        layer.foretell(3);
        layer.foretell(6);
        node.store.asked.lock().unwrap().clear();
        let ids = |chunks: &[usize]| chunks.iter().map(|at| node.index.chunk(*at).1.id).collect::<Vec<_>>();
        let one = |at: usize| node.index.chunk(at).0..node.index.chunk(at).0 + 4096;
        let reading = async {
            for at in [3, 6] {
                read(&layer, one(at)).await;
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
            assert_eq!(*node.store.asked.lock().unwrap(), ids(&[3, 6]));
            // Somebody who leaves the trace's way is looked ahead for, and so is everybody when it is at its end.
            read(&layer, one(1)).await;
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            assert!(node.store.asked.lock().unwrap().len() > 3);
            layer.nothing_is_foretold();
            drop(held);
        };
        let (filled, ()) = futures::join!(layer.fill(), reading);
        filled.unwrap();
    });
}

/// `fetch.rate` is for what nobody waits for: who waits has it as quickly as ever.
#[test]
fn a_limit_slows_the_fill_and_no_reader() {
    const RATE: u64 = 2 << 20;
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layers = node.with_rate(RATE);
        let alone = node.begin_in(&layers, 5).await;
        let missing: Vec<u64> = (0..node.index.chunks().len())
            .filter(|at| !node.index.metadata_places().any(|place| place == *at))
            .map(|at| node.index.chunk(at).1.length.into())
            .collect();
        // The last one is not waited for.
        let least = (missing.iter().sum::<u64>() - missing.iter().max().unwrap()) as f64 / RATE as f64;
        let began = std::time::Instant::now();
        alone.fill().await.unwrap();
        let took = began.elapsed().as_secs_f64();
        assert!(took >= least, "{took} s; {least} at least");

        // Two more; somebody waits for all of one of them.
        let (waited_for, other) = (node.begin_in(&layers, 6).await, node.begin_in(&layers, 7).await);
        let began = std::time::Instant::now();
        let (filled, rest) = (waited_for.fill().boxed(), other.fill().boxed());
        let waiting = async {
            waited_for.fetch(0..node.index.chunks().len()).await.unwrap();
            (began.elapsed().as_secs_f64(), filled.await.unwrap(), began.elapsed().as_secs_f64())
        };
        let (rest, (fetched, (), ended)) = futures::join!(rest, waiting);
        rest.unwrap();
        assert!(fetched < least / 2.0, "{fetched} s for who waits, {least} for who does not");
        assert!(
            ended < least / 2.0,
            "the fill came to its end after {ended} s, with nothing to fetch after {fetched}"
        );
        let took = began.elapsed().as_secs_f64();
        assert!(took >= least, "{took} s; {least} at least");
    });
}

/// What the file of a layer takes.
fn taken(node: &Cold, serial: u64) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(node.files.part(serial)).unwrap().blocks() * 512
}

#[derive(Debug, Clone)]
enum Step {
    Read(u64, u64),
    Together(Vec<(u64, u64)>),
    Evict(u64),
    Fill,
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0_u64..1800, 1_u64..300);
    let step = prop_oneof![
        6 => range().prop_map(|(start, length)| Step::Read(start, length)),
        3 => proptest::collection::vec(range(), 2..9).prop_map(Step::Together),
        3 => (1_u64..4 << 20).prop_map(Step::Evict),
        1 => Just(Step::Fill),
        1 => Just(Step::Restart),
    ];
    proptest::collection::vec(step, 1..20)
}

/// Reads while chunks are given up, while all is filled, with less room than the layer has, in one process after the other: always
/// the layer's bytes, and never more on the disk than there is room for, but for metadata and fills.
#[test]
fn what_is_given_up_meanwhile_is_fetched_again() {
    proptest!(ProptestConfig::with_cases(24), |(steps in steps(), limit in 1_u64..6)| {
        let dir = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let node = some_layer(dir.path()).await;
            let mut layers = node.with_room(limit << 20);
            let mut layer = node.begin_in(&layers, 7).await;
            let size = node.bytes.len() as u64;
            let at_blocks = |(start, length): (u64, u64)| {
                let start = (start * 4096).min(size - 4096);
                start..(start + length * 4096).min(size)
            };
            let mut is_filled = false;
            for step in steps {
                match step {
                    Step::Read(start, length) => {
                        let range = at_blocks((start, length));
                        prop_assert!(read(&layer, range.clone()).await == at(&node.bytes, &range));
                    }
                    Step::Together(ranges) => {
                        let allowance = Arc::clone(layers.allowance());
                        let evict = tokio::task::spawn_blocking(move || (0..8).map(|_| allowance.make_room(300_000)).sum::<u64>());
                        let ranges: Vec<_> = ranges.into_iter().map(at_blocks).collect();
                        let all = join_all(ranges.iter().map(|range| read(&layer, range.clone()))).await;
                        evict.await.unwrap();
                        for (range, bytes) in ranges.iter().zip(all) {
                            prop_assert!(bytes == at(&node.bytes, range), "{range:?}");
                        }
                    }
                    Step::Evict(bytes) => drop(layers.allowance().make_room(bytes)),
                    Step::Fill => {
                        layer.fill().await.unwrap();
                        is_filled = true;
                    }
                    Step::Restart => {
                        layers = node.with_room(limit << 20);
                        let before = layers.allowance().estimate();
                        layers.allowance().correct(before, taken(&node, 7));
                        let index = Arc::clone(&node.index);
                        layer = layers.open(7, || Some(index)).unwrap();
                    }
                }
            }
            prop_assert!(read(&layer, 0..size).await == node.bytes);
            let metadata: u64 = node.index.metadata_chunks().map(|(_, chunk)| u64::from(chunk.length)).sum();
            prop_assert!(is_filled || taken(&node, 7) <= (limit << 20) + metadata);
            Ok(())
        })?;
    });
}

#[test]
fn what_is_read_is_kept_and_what_is_not_is_given_up() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layers = node.with_room(u64::MAX);
        let layer = node.begin_in(&layers, 7).await;
        layer.fill().await.unwrap();
        let (start, chunk) = node.index.chunk(2);
        let read_often = start..start + u64::from(chunk.length);
        // The hand comes by once and finds that everything was read.
        layers.allowance().make_room(1);
        read(&layer, read_often.clone()).await;
        let before = taken(&node, 7);
        let freed = layers.allowance().make_room(2 << 20);
        assert!((2 << 20..4 << 20).contains(&freed));
        assert!(taken(&node, 7) <= before - freed);
        let gets = node.store.gets.load(Ordering::SeqCst);
        assert!(read(&layer, read_often.clone()).await == at(&node.bytes, &read_often));
        assert_eq!(node.store.gets.load(Ordering::SeqCst), gets, "what was read of late is still here");
        assert!(read(&layer, 0..node.bytes.len() as u64).await == node.bytes);
        assert!(node.store.gets.load(Ordering::SeqCst) > gets);
        assert_eq!(layers.allowance().punched(), layer.progress.evicted.load(Ordering::SeqCst));
    });
}

#[test]
fn what_is_held_is_not_given_up() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layers = node.with_room(u64::MAX);
        let layer = node.begin_in(&layers, 7).await;
        layer.fill().await.unwrap();
        let held = layer.hold();
        assert_eq!(layers.allowance().make_room(u64::MAX), 0);
        drop(held);
        assert!(layers.allowance().make_room(u64::MAX) > 0);
        // Metadata stays.
        let (start, chunk) = node.index.metadata_chunks().last().unwrap();
        assert!(layer.read_now(start..start + u64::from(chunk.length)).is_some());
    });
}

/// After a failed fsync the kernel takes pages for clean that the disk does not have: they may be other bytes at the next read.
#[test]
fn nothing_is_read_from_a_file_that_cannot_be_synced() {
    use std::os::unix::fs::FileExt;
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let node = some_layer(dir.path()).await;
        let layer = node.begin(7).await;
        layer.fill().await.unwrap();
        layer.distrust();
        for (offset, chunk) in node.index.chunks() {
            layer.file().write_all_at(&vec![0xff; chunk.length as usize], offset).unwrap();
        }
        assert!(!layer.is_complete());
        assert!(read(&layer, 0..node.bytes.len() as u64).await == node.bytes);
        assert!(read(&layer, 0..node.bytes.len() as u64).await == node.bytes);
        layer.fill().await.unwrap_err();
        // Nor by the next process.
        let index = Arc::clone(&node.index);
        let later = node.again().open(7, || Some(index)).unwrap();
        assert!(read(&later, 0..node.bytes.len() as u64).await == node.bytes);
    });
}
