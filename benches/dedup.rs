//! What each way of cutting makes of an image family's size in the store; `contrib/bench dedup` calls this:
//!
//! `dedup [--levels 3,6] [--only PART] [--extras] DIR`
//!
//! DIR holds each layer as `NAME.tar` and its size as a gzip blob in `NAME.gzip-size`. Each becomes a layer image as Apply makes
//! it. The table has the distinct chunks of all images as zstd, as a share of the distinct blobs. `--extras` adds what
//! deltas against similar chunks would give, and what they cost.

#![allow(clippy::print_stdout, reason = "a table is what it is for")]

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use speedy::chunk::chunker::cut_regions_as;
use speedy::image::{self, Compression, NothingBelow};
use speedy::object::layout::{CUTTING, Cutting};
use xxhash_rust::xxh3::xxh3_64;
use zstd::bulk::Compressor;

#[derive(Debug, Parser)]
struct Args {
    /// zstd levels
    #[arg(long, value_delimiter = ',', default_values_t = [3, 6])]
    levels: Vec<i32>,
    /// Only the rows whose names hold this
    #[arg(long, default_value = "")]
    only: String,
    /// Also deltas against similar chunks
    #[arg(long)]
    extras: bool,
    /// Passed by cargo
    #[arg(long, hide = true)]
    bench: bool,
    /// With the layers
    dir: PathBuf,
}

/// A layer as a plain image.
struct Image {
    bytes: Vec<u8>,
    metadata: usize,
}

const BLOCK: usize = 4096;
/// Of a chunk's stored form.
const HEADER: usize = speedy::chunk::codec::HEADER;

fn image(tar: &Path) -> Result<Image> {
    let made = tempfile::tempfile()?;
    let source = image::Source { blob: File::open(tar)?, compression: Compression::Plain };
    let facts = image::build(source, &made, &NothingBelow, &image::Limits::default(), &|| false)?;
    let read = |range: &Range<u64>| -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(range.end - range.start)?];
        made.read_exact_at(&mut bytes, range.start)?;
        Ok(bytes)
    };
    let mut bytes = read(&facts.layout.data)?;
    let metadata = bytes.len();
    bytes.append(&mut read(&facts.layout.metadata)?);
    Ok(Image { bytes, metadata })
}

/// A way of cutting: the pieces of an image that are not holes.
type Cut<'a> = Box<dyn Fn(&Image) -> Vec<Range<usize>> + 'a>;

fn ours(cutting: Cutting) -> Cut<'static> {
    Box::new(move |image| {
        let (data, all) = (image.metadata as u64, image.bytes.len() as u64);
        cut_regions_as(cutting, &image.bytes[..], &[0..data, data..all])
            .map(|piece| {
                let piece = piece.expect("the image is in memory");
                let start = usize::try_from(piece.offset).expect("it is in memory");
                start..start + piece.chunk.length as usize
            })
            .collect()
    })
}

fn sized(min: u32, average: u32, max: u32) -> Cutting {
    Cutting { min: min << 10, average: average << 10, max: max << 10, ..CUTTING }
}

fn fixed(size: usize) -> Cut<'static> {
    Box::new(move |image| {
        (0..image.bytes.len()).step_by(size).map(|at| at..(at + size).min(image.bytes.len())).collect()
    })
}

/// Whole blocks, with another rule for where a chunk may end: of its blocks so far, its last block and that block's hash.
fn by_rule(sizes: Cutting, rule: fn(usize, &[u8], u64) -> bool) -> Cut<'static> {
    let (min, max) = (sizes.min as usize / BLOCK, sizes.max as usize / BLOCK);
    Box::new(move |image| {
        let (mut pieces, mut start) = (Vec::new(), 0);
        for (at, block) in image.bytes.chunks(BLOCK).enumerate().map(|(n, block)| ((n + 1) * BLOCK, block)) {
            let blocks = (at - start) / BLOCK;
            if blocks >= max || blocks >= min && rule(blocks, block, xxh3_64(block)) || at == image.metadata {
                pieces.push(start..at);
                start = at;
            }
        }
        pieces.push(start..image.bytes.len());
        pieces.retain(|piece| !piece.is_empty());
        pieces
    })
}

fn one_in(hash: u64, n: u64) -> bool {
    hash < u64::MAX / n
}

/// Byte-level FastCDC (Xia et al., 2016) with normalisation level 2, over the image.
fn fast_cdc(min: usize, average: usize, max: usize) -> Cut<'static> {
    let mut gear = [0_u64; 256];
    for (byte, value) in gear.iter_mut().enumerate() {
        *value = xxh3_64(&[u8::try_from(byte).unwrap_or(0)]);
    }
    let bits = average.ilog2();
    let mask = |bits: u32| !0_u64 << (64 - bits);
    let (hard, easy) = (mask(bits + 2), mask(bits - 2));
    let end_of = move |bytes: &[u8]| {
        let limit = bytes.len().min(max);
        let mut hash = 0_u64;
        for (at, byte) in bytes[..limit].iter().enumerate().skip(min) {
            hash = (hash << 1).wrapping_add(gear[usize::from(*byte)]);
            if hash & (if at < average { hard } else { easy }) == 0 {
                return at + 1;
            }
        }
        limit
    };
    Box::new(move |image| {
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < image.bytes.len() {
            let end = at + end_of(&image.bytes[at..]);
            pieces.push(at..end);
            at = end;
        }
        pieces
    })
}

/// One line of the table, over all images so far.
struct Row<'a> {
    name: String,
    cut: Cut<'a>,
    seen: HashSet<[u8; 32]>,
    plain: usize,
    stored: Vec<usize>,
}

impl Row<'_> {
    fn add(&mut self, image: &Image, compressors: &mut [Compressor<'_>]) -> Result<()> {
        for piece in (self.cut)(image) {
            let bytes = &image.bytes[piece];
            if !self.seen.insert(*blake3::hash(bytes).as_bytes()) {
                continue;
            }
            self.plain += bytes.len();
            self.stored.resize(compressors.len(), 0);
            for (total, compressor) in self.stored.iter_mut().zip(&mut *compressors) {
                let packed = compressor.compress(bytes)?.len();
                *total +=
                    if packed <= bytes.len() - bytes.len() / 20 { packed } else { bytes.len() } + HEADER;
            }
        }
        Ok(())
    }

    fn print(&self, blobs: usize) {
        let shares: String =
            self.stored.iter().map(|stored| format!(" {:.3} |", share(*stored, blobs))).collect();
        println!("| {} | {} | {} |{shares}", self.name, self.seen.len(), self.plain / 1_000_000);
    }
}

#[expect(clippy::cast_precision_loss, reason = "shares of megabytes")]
fn share(part: usize, whole: usize) -> f64 {
    part as f64 / whole as f64
}

fn ways() -> Vec<(&'static str, Cut<'static>)> {
    vec![
        ("fixed 4 KiB", fixed(BLOCK)),
        ("fixed 256 KiB", fixed(256 << 10)),
        ("ours, 128 K / 512 K / 1 M", ours(CUTTING)),
        ("ours, 128 K / 512 K / 2 M", ours(sized(128, 512, 2048))),
        ("ours, 64 K / 256 K / 1 M", ours(sized(64, 256, 1024))),
        ("ours, 256 K / 1 M / 4 M", ours(sized(256, 1024, 4096))),
        ("ours, 32 K / 128 K / 512 K", ours(sized(32, 128, 512))),
        ("ours, 16 K / 64 K / 256 K", ours(sized(16, 64, 256))),
        ("FastCDC by bytes, 64 K / 256 K / 1 M", fast_cdc(64 << 10, 256 << 10, 1 << 20)),
        ("FastCDC by bytes, 32 K / 128 K / 512 K", fast_cdc(32 << 10, 128 << 10, 512 << 10)),
        ("FastCDC by bytes, 16 K / 64 K / 256 K", fast_cdc(16 << 10, 64 << 10, 256 << 10)),
        ("blocks alike, 64 K / 256 K / 1 M", by_rule(sized(64, 256, 1024), |_, _, hash| one_in(hash, 48))),
        (
            "blocks alike, two thresholds, 64 K / 256 K / 1 M",
            by_rule(sized(64, 256, 1024), |blocks, _, hash| one_in(hash, if blocks < 64 { 256 } else { 16 })),
        ),
    ]
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut rows: Vec<Row<'_>> = ways()
        .into_iter()
        .filter(|(name, _)| name.contains(&args.only))
        .map(|(name, cut)| Row { name: name.into(), cut, seen: HashSet::new(), plain: 0, stored: Vec::new() })
        .collect();
    let mut deltas =
        if args.extras { vec![Deltas::new(CUTTING)?, Deltas::new(sized(16, 64, 256))?] } else { Vec::new() };
    let mut compressors = args.levels.iter().map(|l| Compressor::new(*l)).collect::<Result<Vec<_>, _>>()?;
    let (mut layers, mut plain, mut blobs) = (0, 0, 0);
    for (image, blob) in read(&args.dir)? {
        let image = image()?;
        layers += 1;
        plain += image.bytes.len();
        blobs += blob;
        rows.iter_mut().try_for_each(|row| row.add(&image, &mut compressors))?;
        deltas.iter_mut().try_for_each(|delta| delta.add(&image))?;
    }
    println!(
        "{layers} layers, {} MB as images, {} MB as distinct gzip blobs\n",
        plain / 1_000_000,
        blobs / 1_000_000
    );
    let heads: String = args.levels.iter().map(|level| format!(" zstd -{level} |")).collect();
    println!("| cutting | chunks | MB plain |{heads}");
    println!("|---|---|---|{}", "---|".repeat(args.levels.len()));
    rows.iter().for_each(|row| row.print(blobs));
    if args.extras {
        println!(
            "\n| deltas against a similar chunk, zstd -{DELTA_LEVEL} | chunks | deltas | share | encode MB/s | decode MB/s |"
        );
        println!("|---|---|---|---|---|---|");
        deltas.iter().for_each(|delta| delta.print(blobs));
    }
    Ok(())
}

/// Distinct layers, one at a time: what makes the image, and the size of the blob.
type Layers = Vec<(Box<dyn FnOnce() -> Result<Image>>, usize)>;

fn read(dir: &Path) -> Result<Layers> {
    let mut tars: Vec<PathBuf> =
        std::fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    tars.retain(|path| path.extension().is_some_and(|e| e == "tar"));
    tars.sort();
    ensure!(!tars.is_empty(), "no layers in {}", dir.display());
    let (mut layers, mut seen): (Layers, _) = (Vec::new(), HashSet::new());
    for path in tars {
        let tar = std::fs::read(&path).with_context(|| path.display().to_string())?;
        if !seen.insert(*blake3::hash(&tar).as_bytes()) {
            continue;
        }
        let blob = std::fs::read_to_string(path.with_extension("gzip-size"))?.trim().parse()?;
        layers.push((Box::new(move || image(&path)), blob));
    }
    Ok(layers)
}

const DELTA_LEVEL: i32 = 3;

/// A chunk that is new is compressed with a similar one, which the store has whole, as its dictionary.
struct Deltas {
    cutting: Cutting,
    alone: Compressor<'static>,
    seen: HashSet<[u8; 32]>,
    /// By feature: a chunk that is stored whole, packed.
    bases: HashMap<u64, (Rc<Vec<u8>>, usize)>,
    deltas: usize,
    stored: usize,
    plain: usize,
    encoding: Duration,
    decoding: Duration,
}

impl Deltas {
    fn new(cutting: Cutting) -> Result<Deltas> {
        Ok(Deltas {
            cutting,
            alone: Compressor::new(DELTA_LEVEL)?,
            seen: HashSet::new(),
            bases: HashMap::new(),
            deltas: 0,
            stored: 0,
            plain: 0,
            encoding: Duration::ZERO,
            decoding: Duration::ZERO,
        })
    }

    fn add(&mut self, image: &Image) -> Result<()> {
        for piece in ours(self.cutting)(image) {
            let bytes = &image.bytes[piece];
            if !self.seen.insert(*blake3::hash(bytes).as_bytes()) {
                continue;
            }
            let whole = Rc::new(self.alone.compress(bytes)?);
            let features = features(bytes);
            let delta = match features.iter().find_map(|feature| self.bases.get(feature).cloned()) {
                Some((base, length)) => self.delta(&zstd::bulk::decompress(&base, length)?, bytes)?,
                None => usize::MAX,
            };
            // The base has to be fetched too: only for a real gain.
            if delta < whole.len() * 3 / 4 {
                self.deltas += 1;
                self.stored += delta + HEADER;
            } else {
                self.stored += whole.len().min(bytes.len()) + HEADER;
                self.bases
                    .extend(features.iter().map(|feature| (*feature, (Rc::clone(&whole), bytes.len()))));
            }
        }
        Ok(())
    }

    fn delta(&mut self, base: &[u8], bytes: &[u8]) -> Result<usize> {
        let began = Instant::now();
        let delta = Compressor::with_dictionary(DELTA_LEVEL, base)?.compress(bytes)?;
        self.encoding += began.elapsed();
        let began = Instant::now();
        let back = zstd::bulk::Decompressor::with_dictionary(base)?.decompress(&delta, bytes.len())?;
        self.decoding += began.elapsed();
        ensure!(back == bytes, "a delta does not give its chunk back");
        self.plain += bytes.len();
        Ok(delta.len())
    }

    fn print(&self, blobs: usize) {
        let speed = |took: Duration| (share(self.plain, 1_000_000) / took.as_secs_f64()).round();
        println!(
            "| average {} K | {} | {} | {:.3} | {} | {} |",
            self.cutting.average >> 10,
            self.seen.len(),
            self.deltas,
            share(self.stored, blobs),
            speed(self.encoding),
            speed(self.decoding)
        );
    }
}

/// Super-features of a chunk: equal ones mean that much of the content is equal. Each is the smallest of many hashes of
/// 64-byte windows, under another order.
fn features(bytes: &[u8]) -> [u64; 4] {
    let mut smallest = [u64::MAX; 12];
    let mut hash = 0_u64;
    for (at, byte) in bytes.iter().enumerate() {
        hash = (hash << 1).wrapping_add(u64::from(*byte).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        if at >= 64 && hash >> 58 == 0 {
            for (n, slot) in smallest.iter_mut().enumerate() {
                let order = (n as u64 * 2 + 1).wrapping_mul(0xD6E8_FEB8_6659_FD93);
                *slot = (*slot).min(hash.wrapping_mul(order).rotate_left(31).wrapping_mul(order));
            }
        }
    }
    let mut features = [0; 4];
    for (n, (feature, of)) in features.iter_mut().zip(smallest.chunks(3)).enumerate() {
        let bytes: Vec<u8> =
            of.iter().flat_map(|value| value.to_le_bytes()).chain([u8::try_from(n).unwrap_or(0)]).collect();
        *feature = xxh3_64(&bytes);
    }
    features
}
