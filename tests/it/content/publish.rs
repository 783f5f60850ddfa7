//! Publishing and fetching again, with everything that can happen on the way.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use speedy::chunk::ChunkError;
use speedy::chunk::merged::Merged;
use speedy::chunk::remote::Remote;
use speedy::chunk::verified::Verified;
use speedy::content::publish::{Progress, PublishRequest};
use speedy::content::trust::Trust;
use speedy::content::{ContentError, ContentStore, Lookup, Options, Parts};
use speedy::image::Facts;
use speedy::object::{Objects, StoreOptions, layout};
use tokio_util::sync::CancellationToken;

use super::support::{Counted, Image, chain, fetch, found, key, lookup, node};
use crate::maker::{Maker, Node};
use crate::support::runtime;

fn own() -> Trust {
    Trust::Keys(Vec::new())
}

#[test]
fn what_is_published_is_found_and_the_same() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (store, chunks) = node(&objects, key(1), own());
        for (seed, size) in [(1, 0), (10, 4096), (20, 300_000), (30, 9 << 20)] {
            let image = Image::make(dir.path(), seed, size);
            let name = chain(&format!("chain {seed}"));
            let published = image.publish(&store, std::slice::from_ref(&name)).await.unwrap();
            let seen = found(&store, &name).await;
            assert_eq!(seen.digest, published.index);
            assert_eq!(seen.index.facts(), &image.facts);
            assert_eq!(seen.index.plain_bytes(), published.bytes);
            assert_eq!(store.missing(seen.index.chunks().map(|(_, chunk)| chunk)).await.unwrap(), []);
            assert!(fetch(&store, &seen).await == image.bytes, "seed {seed}");
        }
        // 1 MiB of the largest is a hole.
        let index = found(&store, &chain("chain 30")).await.index;
        let layout = &index.facts().layout;
        assert_eq!(index.plain_bytes(), 4096 + (8 << 20) + layout.metadata.end - layout.metadata.start);
        assert!(chunks.most_in_flight.load(Ordering::SeqCst) > 1 << 20, "uploads do not overlap");
    });
}

/// An image that a node has from before its upgrade: who knows only that form can still use it, and published again it has the same index.
#[test]
fn an_image_of_the_older_form_has_an_index_of_the_older_version() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (store, _) = node(&objects, key(1), own());
        let maker = Maker::new().with("etc", Node::dir()).with("etc/data", Node::file(&[7; 100_000]));
        for (format, made) in [(2, maker.make()), (1, maker.plain().make())] {
            let path = dir.path().join(format!("form-{format}.erofs"));
            made.write(&path);
            let template = Image::make(dir.path(), 1, 0).facts;
            let image = Image { path, facts: Facts { layout: made.layout, ..template }, bytes: made.bytes };
            let name = chain(&format!("form {format}"));
            image.publish(&store, std::slice::from_ref(&name)).await.unwrap();
            let seen = found(&store, &name).await;
            assert_eq!(seen.index.encode()[..2], [0x08, format]);
            assert!(fetch(&store, &seen).await == image.bytes);
        }
    });
}

#[test]
fn a_directory_is_a_store() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file://{}/store", dir.path().display());
        let open = |seed| {
            let objects = Objects::open(&url, &StoreOptions::default()).unwrap();
            let chunks = Arc::new(Merged::new(Verified::new(Remote::new(objects.clone()))));
            let trust = Trust::Keys(vec![*key(1).public()]);
            ContentStore::new(Parts { objects, chunks, key: key(seed), trust }, Options::default())
        };
        let image = Image::make(dir.path(), 1, 9 << 20);
        let published = image.publish(&open(1), &[chain("a")]).await.unwrap();
        assert_eq!(published.new_chunks, published.chunks);
        // Another node, with nothing but the URL and the publisher's key.
        let other = open(2);
        let seen = found(&other, &chain("a")).await;
        assert!(fetch(&other, &seen).await == image.bytes);
        assert_eq!(image.publish(&other, &[chain("a")]).await.unwrap().new_chunks, 0);
    });
}

#[test]
fn a_publisher_can_correct_itself() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (store, _) = node(&objects, key(1), own());
        let (first, second) = (Image::make(dir.path(), 1, 1 << 20), Image::make(dir.path(), 2, 1 << 20));
        first.publish(&store, &[chain("a")]).await.unwrap();
        let second = second.publish(&store, &[chain("a")]).await.unwrap();
        assert_eq!(found(&store, &chain("a")).await.digest, second.index);
    });
}

#[test]
fn publishing_again_uploads_nothing() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (store, chunks) = node(&objects, key(1), own());
        let image = Image::make(dir.path(), 1, 6 << 20);
        let first = image.publish(&store, &[chain("a")]).await.unwrap();
        assert_eq!((first.new_chunks, first.new_bytes), (chunks.puts() as u64, first.bytes));
        assert_eq!(first.stored_bytes, first.bytes, "this store does not compress");
        let puts = chunks.puts();
        let second = image.publish(&store, &[chain("a"), chain("b")]).await.unwrap();
        assert_eq!((second.new_chunks, second.stored_bytes), (0, 0));
        assert_eq!((second.chunks, second.index), (first.chunks, first.index));
        assert_eq!((chunks.puts(), chunks.renewals.load(Ordering::SeqCst)), (puts, 0));
        assert_eq!(found(&store, &chain("b")).await.digest, first.index);
    });
}

#[test]
fn c3_an_old_chunk_is_made_young() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let chunks = Counted::new(&objects);
        let parts = Parts { objects: objects.clone(), chunks: chunks.clone(), key: key(1), trust: own() };
        // Every chunk is older than no time at all.
        let store = ContentStore::new(parts, Options { renew_after: Duration::ZERO, ..Options::default() });
        let image = Image::make(dir.path(), 1, 2 << 20);
        let first = image.publish(&store, &[chain("a")]).await.unwrap();
        let second = image.publish(&store, &[chain("a")]).await.unwrap();
        assert_eq!(second.new_chunks, 0);
        assert_eq!(chunks.renewals.load(Ordering::SeqCst) as u64, first.chunks);
    });
}

#[test]
fn what_an_image_holds_twice_is_uploaded_once() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (store, chunks) = node(&objects, key(1), own());
        let mut image = Image::make(dir.path(), 1, 4 << 20);
        let data = usize::try_from(image.facts.layout.data.start).unwrap();
        image.bytes.copy_within(data..data + (2 << 20), data + (2 << 20));
        std::fs::write(&image.path, &image.bytes).unwrap();
        let published = image.publish(&store, &[chain("a")]).await.unwrap();
        assert!(published.new_chunks < published.chunks, "{published:?}");
        assert_eq!(chunks.puts() as u64, published.new_chunks);
        assert!(fetch(&store, &found(&store, &chain("a")).await).await == image.bytes);
    });
}

#[test]
fn the_progress_grows_to_the_whole() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (store, _) = node(&objects, key(1), own());
        let image = Image::make(dir.path(), 1, 9 << 20);
        let seen = Mutex::new(Vec::<Progress>::new());
        let file = std::fs::File::open(&image.path).unwrap();
        let request = PublishRequest { image: &file, facts: &image.facts, chains: &[chain("a")] };
        let progress = |progress| seen.lock().unwrap().push(progress);
        let published = store.publish(request, &progress, &CancellationToken::new()).await.unwrap();
        let seen = seen.into_inner().unwrap();
        assert!(
            seen.windows(2).all(|pair| pair[0].done <= pair[1].done && pair[0].uploaded <= pair[1].uploaded)
        );
        let last = seen.last().unwrap();
        assert_eq!((last.done, last.uploaded), (last.total, published.stored_bytes));
        let layout = &image.facts.layout;
        assert_eq!(last.total, 4096 + layout.metadata.end - layout.data.start);
        assert_eq!(seen.len() as u64, published.chunks + 1);
    });
}

#[test]
fn memory_is_bounded_by_the_option() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let chunks = Counted::new(&objects);
        let parts = Parts { objects: objects.clone(), chunks: chunks.clone(), key: key(1), trust: own() };
        let in_flight = 2 << 20;
        let store = ContentStore::new(parts, Options { in_flight, ..Options::default() });
        Image::make(dir.path(), 1, 16 << 20).publish(&store, &[chain("a")]).await.unwrap();
        let most = chunks.most_in_flight.load(Ordering::SeqCst);
        assert!(most <= u64::from(in_flight), "{most}");
        // Less than a chunk: one at a time.
        let parts = Parts { objects: objects.clone(), chunks: chunks.clone(), key: key(1), trust: own() };
        let store = ContentStore::new(parts, Options { in_flight: 1, uploads: 0, ..Options::default() });
        Image::make(dir.path(), 3, 4 << 20).publish(&store, &[chain("b")]).await.unwrap();
    });
}

#[test]
fn an_image_that_is_not_what_it_is_said_to_be_is_refused() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (store, chunks) = node(&objects, key(1), own());
        let image = Image::make(dir.path(), 1, 1 << 20);
        let with = |change: fn(&mut Vec<u8>)| {
            let mut bytes = image.bytes.clone();
            change(&mut bytes);
            std::fs::write(&image.path, bytes).unwrap();
        };
        let changes: [fn(&mut Vec<u8>); 5] = [
            |bytes| bytes.truncate(4096),
            |bytes| bytes.push(0),
            |bytes| bytes[1024] ^= 1,
            |bytes| bytes[1036] = 9,
            |bytes| bytes[1064] ^= 1,
        ];
        for change in changes {
            with(change);
            let error = image.publish(&store, &[chain("a")]).await.unwrap_err();
            assert!(matches!(error, ContentError::OtherImage { .. }), "{error}");
        }
        // Cannot be read at all.
        let file = std::fs::File::options().write(true).open(&image.path).unwrap();
        let request = PublishRequest { image: &file, facts: &image.facts, chains: &[chain("a")] };
        let error = store.publish(request, &|_| {}, &CancellationToken::new()).await.unwrap_err();
        assert!(matches!(error, ContentError::Image(_)), "{error}");
        assert_eq!(chunks.puts(), 0);
        assert!(matches!(lookup(&store, &chain("a")).await.unwrap(), Lookup::Missing));
    });
}

#[test]
fn c2_a_failed_upload_leaves_nothing_visible_and_is_resumed() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (store, chunks) = node(&objects, key(1), own());
        let image = Image::make(dir.path(), 1, 9 << 20);
        chunks.fails_at.store(12, Ordering::SeqCst);
        let error = image.publish(&store, &[chain("a")]).await.unwrap_err();
        assert!(matches!(error, ContentError::Chunk(ChunkError::Store { .. })), "{error}");
        assert!(matches!(lookup(&store, &chain("a")).await.unwrap(), Lookup::Missing));
        assert_eq!(objects.list("indexes", 10).await.unwrap(), []);
        let published = image.publish(&store, &[chain("a")]).await.unwrap();
        assert!(published.new_chunks < published.chunks, "{published:?}");
        assert!(fetch(&store, &found(&store, &chain("a")).await).await == image.bytes);
    });
}

#[test]
fn c2_a_publish_that_is_dropped_anywhere_can_be_repeated() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let image = Image::make(dir.path(), 1, 2 << 20);
        let mut completed = 0;
        for polls in 0..60 {
            let objects = Objects::memory();
            let (store, _) = node(&objects, key(1), own());
            {
                let chains = [chain("a")];
                let mut publish = std::pin::pin!(image.publish(&store, &chains));
                let mut left = polls;
                let stopped = std::future::poll_fn(|context| {
                    if left == 0 {
                        return std::task::Poll::Ready(None);
                    }
                    left -= 1;
                    publish.as_mut().poll(context).map(Some)
                });
                completed += usize::from(stopped.await.is_some());
            }
            // Invisible, or whole.
            match lookup(&store, &chain("a")).await.unwrap() {
                Lookup::Missing => {}
                Lookup::Found(seen) => assert!(fetch(&store, &seen).await == image.bytes, "after {polls}"),
                refused => panic!("{refused:?}"),
            }
            image.publish(&store, &[chain("a")]).await.unwrap();
            assert!(fetch(&store, &found(&store, &chain("a")).await).await == image.bytes, "after {polls}");
        }
        assert!(completed > 0 && completed < 60, "{completed} of 60 came to their end");
    });
}

#[test]
fn a_publish_stops_when_it_is_told_to() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (store, _) = node(&objects, key(1), own());
        let image = Image::make(dir.path(), 1, 9 << 20);
        let cancel = CancellationToken::new();
        let file = std::fs::File::open(&image.path).unwrap();
        let request = PublishRequest { image: &file, facts: &image.facts, chains: &[chain("a")] };
        let error = store.publish(request, &|_| cancel.cancel(), &cancel).await.unwrap_err();
        assert!(matches!(error, ContentError::Cancelled), "{error}");
        assert!(matches!(lookup(&store, &chain("a")).await.unwrap(), Lookup::Missing));
    });
}

#[test]
fn two_publishers_at_once_do_not_harm_each_other() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (one, _) = node(&objects, key(1), own());
        let (other, _) = node(&objects, key(2), own());
        let image = Image::make(dir.path(), 1, 9 << 20);
        let chains = [chain("a")];
        let (a, b) = tokio::join!(image.publish(&one, &chains), image.publish(&other, &chains));
        assert_eq!(a.unwrap().index, b.unwrap().index);
        for store in [&one, &other] {
            assert!(fetch(store, &found(store, &chain("a")).await).await == image.bytes);
        }
        assert_eq!(objects.list(&layout::refs(&chain("a")), 10).await.unwrap().len(), 2);
    });
}

#[test]
fn what_the_store_lacks_is_named() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (store, _) = node(&objects, key(1), own());
        let image = Image::make(dir.path(), 1, 3 << 20);
        image.publish(&store, &[chain("a")]).await.unwrap();
        let seen = found(&store, &chain("a")).await;
        let chunks: Vec<_> = seen.index.chunks().map(|(_, chunk)| chunk).collect();
        let (gone, damaged) = (chunks[3], chunks[4]);
        objects.delete(&layout::chunk(gone.id.as_bytes())).await.unwrap();
        let twice = chunks.iter().chain(&chunks).copied();
        assert_eq!(store.missing(twice).await.unwrap(), [gone]);
        let error = store.chunk(gone).await.unwrap_err();
        assert!(matches!(error, ContentError::Chunk(ChunkError::Missing { id }) if id == gone.id), "{error}");
        objects.put(&layout::chunk(damaged.id.as_bytes()), Bytes::from_static(b"damaged")).await.unwrap();
        let error = store.chunk(damaged).await.unwrap_err();
        assert!(matches!(error, ContentError::Chunk(ChunkError::Corrupt { .. })), "{error}");
        // Publishing again brings back what is gone.
        assert_eq!(image.publish(&store, &[chain("a")]).await.unwrap().new_chunks, 1);
        assert_eq!(store.missing(chunks).await.unwrap(), []);
    });
}
