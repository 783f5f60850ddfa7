//! How fast chunks are cut, stored and fetched, beside the limits that bound it:
//!
//! `cargo bench --bench chunk -- [--store URL] [--at-once N] FILE`
//!
//! FILE is cut as one region (a layer's tar does). The store is a directory below the system's temporary one unless it is given
//! (`s3://BUCKET/PREFIX` with the usual `AWS_*` variables). "Lag" is by how much a task that wakes every millisecond is late
//! meanwhile: what the work does to everything else in the process.

#![allow(clippy::print_stdout, reason = "a table is what it is for")]
#![allow(clippy::single_range_in_vec_init, reason = "lists of regions, some of a single one")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use clap::Parser;
use speedy::chunk::chunker::{Piece, cut_regions};
use speedy::chunk::merged::Merged;
use speedy::chunk::remote::Remote;
use speedy::chunk::store::{ChunkSink, ChunkStore};
use speedy::chunk::verified::Verified;
use speedy::chunk::{ChunkId, codec};
use speedy::object::{Objects, Settings, StoreOptions, layout};

#[derive(Debug, Parser)]
struct Args {
    /// Where to store; a temporary directory by default
    #[arg(long)]
    store: Option<String>,
    /// Chunks under way at once
    #[arg(long, default_value_t = 32)]
    at_once: usize,
    /// Worker threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// How often each measurement is made; the best counts
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// zstd levels to compare
    #[arg(long, value_delimiter = ',', default_values_t = [1, 3, codec::LEVEL])]
    levels: Vec<i32>,
    /// Passed by cargo
    #[arg(long, hide = true)]
    bench: bool,
    /// What is cut
    file: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(args.threads).enable_all().build()?;
    runtime.block_on(run(&args))
}

async fn run(args: &Args) -> Result<()> {
    let temporary = std::env::temp_dir().join(format!("speedy-bench-{}", std::process::id()));
    let url = args.store.clone().unwrap_or_else(|| format!("file://{}", temporary.display()));
    let options = StoreOptions { settings: Settings::from_env(), ..StoreOptions::default() };
    let objects = Objects::open(&url, &options)?;
    let image = std::fs::read(&args.file).with_context(|| args.file.display().to_string())?;
    let image = &image[..image.len() / 4096 * 4096];
    println!(
        "{} MB, {} workers, {} chunks at once, {}\n",
        image.len() / 1_000_000,
        args.threads,
        args.at_once,
        url
    );
    println!("| | MB/s of plain bytes | |");
    println!("|---|---|---|");
    let pieces = on_one_core(args, image)?;
    through_the_store(args, &objects, image, &pieces).await?;
    if args.store.is_none() {
        speedy::sys::tree::remove(&temporary, &|| false)?;
    }
    Ok(())
}

fn line(what: &str, bytes: usize, took: Duration, note: &str) {
    #[expect(clippy::cast_precision_loss, reason = "a speed")]
    let speed = bytes as f64 / 1e6 / took.as_secs_f64();
    println!("| {what} | {speed:.0} | {note} |");
}

fn best<T>(rounds: usize, mut work: impl FnMut() -> Result<T>) -> Result<(Duration, T)> {
    let mut best: Option<(Duration, T)> = None;
    for _ in 0..rounds.max(1) {
        let began = Instant::now();
        let done = work()?;
        let took = began.elapsed();
        if best.as_ref().is_none_or(|(least, _)| took < *least) {
            best = Some((took, done));
        }
    }
    best.context("there is at least one round")
}

fn on_one_core(args: &Args, image: &[u8]) -> Result<Vec<Piece>> {
    let file = std::fs::File::open(&args.file)?;
    let region = [0..image.len() as u64];
    let (took, pieces) =
        best(args.rounds, || Ok(cut_regions(&file, &region).collect::<Result<Vec<_>, _>>()?))?;
    line(
        "cut from the page cache, BLAKE3 included, one core",
        image.len(),
        took,
        &format!("{} chunks", pieces.len()),
    );
    let bytes_of = |piece: &Piece| -> Result<&[u8]> {
        let at = usize::try_from(piece.offset)?;
        Ok(&image[at..at + piece.chunk.length as usize])
    };
    let covered: usize = pieces.iter().map(|piece| piece.chunk.length as usize).sum();
    let (took, ()) = best(args.rounds, || {
        for piece in &pieces {
            anyhow::ensure!(ChunkId::of(bytes_of(piece)?) == piece.chunk.id);
        }
        Ok(())
    })?;
    line("BLAKE3 of chunks, one core", covered, took, "");
    for level in &args.levels {
        let mut compressor = zstd::bulk::Compressor::new(*level)?;
        let (took, stored) = best(1, || {
            let sizes = pieces.iter().map(|piece| Ok(compressor.compress(bytes_of(piece)?)?.len()));
            sizes.sum::<Result<usize>>()
        })?;
        let packed: Vec<Vec<u8>> =
            pieces.iter().map(|piece| Ok(compressor.compress(bytes_of(piece)?)?)).collect::<Result<_>>()?;
        let mut decompressor = zstd::bulk::Decompressor::new()?;
        let (back, ()) = best(args.rounds, || {
            for (packed, piece) in packed.iter().zip(&pieces) {
                decompressor.decompress(packed, piece.chunk.length as usize)?;
            }
            Ok(())
        })?;
        #[expect(clippy::cast_precision_loss, reason = "a ratio")]
        let ratio = covered as f64 / stored as f64;
        line(&format!("zstd -{level}, one core"), covered, took, &format!("ratio {ratio:.2}"));
        line(&format!("zstd -{level} decompress, one core"), covered, back, "");
    }
    Ok(pieces)
}

async fn through_the_store(args: &Args, objects: &Objects, image: &[u8], pieces: &[Piece]) -> Result<()> {
    let whole = Bytes::copy_from_slice(image);
    let plain = |piece: &Piece| {
        let at = usize::try_from(piece.offset).expect("it is in memory");
        whole.slice(at..at + piece.chunk.length as usize)
    };
    let covered: usize = pieces.iter().map(|piece| piece.chunk.length as usize).sum();
    let stack = Arc::new(Merged::new(Verified::new(Remote::new(objects.clone()))));
    let (took, lag) = watched(async {
        let puts = spawned(pieces, args.at_once, |piece| {
            let (stack, id, plain) = (Arc::clone(&stack), piece.chunk.id, plain(piece));
            async move { stack.put(id, plain).await }
        });
        puts.await.into_iter().collect::<Result<Vec<_>, _>>()
    })
    .await?;
    line("publish: put of every chunk", covered, took, &lag);

    let stored = |piece: &Piece| {
        let (objects, name) = (objects.clone(), layout::chunk(piece.chunk.id.as_bytes()));
        async move { objects.get(&name, codec::LONGEST).await }
    };
    for _ in 0..args.rounds {
        let (took, lag) = watched(async {
            spawned(pieces, args.at_once, |piece| stored(piece))
                .await
                .into_iter()
                .collect::<Result<Vec<_>, _>>()
        })
        .await?;
        line("stored bytes alone", covered, took, &lag);
        let (took, lag) = watched(async {
            let bare = Arc::new(Remote::new(objects.clone()));
            let gets = spawned(pieces, args.at_once, |piece| {
                let (bare, chunk) = (Arc::clone(&bare), piece.chunk);
                async move { bare.get(chunk).await.map(|_| ()) }
            });
            gets.await.into_iter().collect::<Result<Vec<_>, _>>()
        })
        .await?;
        line("Remote", covered, took, &lag);
        let (took, lag) = watched(async {
            let gets = spawned(pieces, args.at_once, |piece| {
                let (stack, chunk) = (Arc::clone(&stack), piece.chunk);
                async move { stack.get(chunk).await.map(|_| ()) }
            });
            gets.await.into_iter().collect::<Result<Vec<_>, _>>()
        })
        .await?;
        line("Merged<Verified<Remote>>", covered, took, &lag);
        let (took, lag) = watched(async {
            let gets = spawned(pieces, args.at_once, |piece| {
                let (stored, chunk) = (stored(piece), piece.chunk);
                async move {
                    let stored = stored.await?.context("it was put")?;
                    let work = move || {
                        codec::decode(&stored, chunk.length).map(|plain| ChunkId::of(&plain) == chunk.id)
                    };
                    anyhow::ensure!(tokio::task::spawn_blocking(work).await??);
                    Ok(())
                }
            });
            gets.await.into_iter().collect::<Result<Vec<_>>>()
        })
        .await?;
        line("the same, zstd and BLAKE3 on the blocking pool", covered, took, &lag);
    }
    Ok(())
}

/// As a fetch of a layer does it: tasks of their own, so many at once.
async fn spawned<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
    pieces: &[Piece],
    at_once: usize,
    work: impl Fn(&Piece) -> F,
) -> Vec<T> {
    let mut tasks = tokio::task::JoinSet::new();
    let mut done = Vec::with_capacity(pieces.len());
    for piece in pieces {
        if tasks.len() >= at_once {
            done.extend(tasks.join_next().await.and_then(Result::ok));
        }
        tasks.spawn(work(piece));
    }
    done.extend(tasks.join_all().await);
    done
}

/// How long something took, and how late a ticker was meanwhile.
async fn watched<T, E: Into<anyhow::Error>>(
    work: impl Future<Output = Result<T, E>>,
) -> Result<(Duration, String)> {
    let over = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&over);
    let mut ticker = tokio::task::JoinSet::new();
    ticker.spawn(async move {
        let mut late = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let began = Instant::now();
            tokio::time::sleep(Duration::from_millis(1)).await;
            late.push(began.elapsed().saturating_sub(Duration::from_millis(1)));
        }
        late.sort_unstable();
        late
    });
    let began = Instant::now();
    work.await.map_err(Into::into)?;
    let took = began.elapsed();
    over.store(true, Ordering::Relaxed);
    let late = ticker.join_next().await.context("one task")??;
    let at = |percent: usize| {
        late.get(late.len() * percent / 100).copied().unwrap_or_default().as_secs_f64() * 1e3
    };
    Ok((took, format!("lag {:.1} ms half the time, {:.1} ms p99", at(50), at(99))))
}
