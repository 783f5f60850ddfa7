//! Golden vectors, and properties that any cutting must have.

#![allow(clippy::single_range_in_vec_init, reason = "lists of regions, some of a single one")]

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

/// xorshift64*: a few lines that anybody can write again.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes()
    };
    (0..bytes / 8).flat_map(|_| next()).collect()
}

fn whole(image: &[u8]) -> [Range<u64>; 1] {
    [0..image.len() as u64]
}

fn cut(image: &[u8]) -> Vec<Piece> {
    cut_regions(image, &whole(image)).map(|piece| piece.unwrap()).collect()
}

fn bytes_of<'a>(image: &'a [u8], piece: &Piece) -> &'a [u8] {
    let at = usize::try_from(piece.offset).unwrap();
    &image[at..at + piece.chunk.length as usize]
}

const MIN: u32 = layout::CUTTING.min;
const MAX: u32 = layout::CUTTING.max;
const HOLE: usize = layout::CUTTING.hole as usize;

/// Where a fixed input is cut is part of the format: another result here makes every store forget what it has.
#[test]
fn golden_vectors() {
    let mut image = noise(0x5EED, 6 << 20);
    // A hole of 17 blocks, and 15 blocks of zeros that are none.
    image[2 << 20..(2 << 20) + 17 * BLOCK_SIZE].fill(0);
    image[4 << 20..(4 << 20) + 15 * BLOCK_SIZE].fill(0);
    let regions = [0..4096, 4096..5 << 20, 5 << 20..6 << 20];
    let found: Vec<(u64, u32, String)> = cut_regions(&image[..], &regions)
        .map(|piece| piece.unwrap())
        .map(|piece| (piece.offset, piece.chunk.length, piece.chunk.id.to_string()[..16].to_owned()))
        .collect();
    let golden: Vec<(u64, u32, String)> =
        GOLDEN.iter().map(|(offset, length, id)| (*offset, *length, (*id).to_owned())).collect();
    assert_eq!(found, golden);
}

const GOLDEN: [(u64, u32, &str); 12] = [
    (0, 4_096, "b9d7c8aab72a5440"),
    (4_096, 958_464, "a252caa16f3b15a1"),
    (962_560, 983_040, "1c844461bff22a47"),
    (1_945_600, 151_552, "7591fc8d48fba6b6"),
    (2_166_784, 1_019_904, "58eb533e156c4621"),
    (3_186_688, 196_608, "cae9143da736a784"),
    (3_383_296, 663_552, "f22c405457b40b8d"),
    (4_046_848, 307_200, "7921b228cb27bd38"),
    (4_354_048, 540_672, "f2ff3b08f2f05c05"),
    (4_894_720, 348_160, "c23c60ef8f6ab94b"),
    (5_242_880, 688_128, "61084f8388e30c8d"),
    (5_931_008, 360_448, "e982aa3251893e9d"),
];

#[test]
fn a_sparse_source_is_cut_like_a_full_one() {
    /// Knows its zeros without reading them.
    struct Sparse<'a>(&'a [u8], u64);
    impl Source for Sparse<'_> {
        fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
            self.1 += bytes.len() as u64;
            self.0.read_at(offset, bytes)
        }
        fn data_after(&mut self, offset: u64) -> io::Result<u64> {
            let zeros = self.0[usize::try_from(offset).unwrap()..].iter().take_while(|b| **b == 0).count();
            Ok(offset + zeros as u64)
        }
    }
    let mut image = vec![0; 16 << 20];
    for (at, length) in
        [(0, 4096), (1 << 20, 300_000), (8 << 20, 5), ((8 << 20) + 70_000, 1 << 20), ((16 << 20) - 9, 9)]
    {
        image[at..at + length].copy_from_slice(&noise(at as u64 + 1, length.next_multiple_of(8))[..length]);
    }
    let mut cutter = cut_regions(Sparse(&image, 0), &whole(&image));
    let pieces: Vec<Piece> = cutter.by_ref().map(|piece| piece.unwrap()).collect();
    assert_eq!(pieces, cut(&image));
    assert!(cutter.source.1 < 4 << 20, "read {} bytes", cutter.source.1);
}

#[test]
fn zeros_are_a_hole_from_their_length_on() {
    let mut image = noise(1, 200 * BLOCK_SIZE);
    let at = 50 * BLOCK_SIZE;
    image[at..at + HOLE - BLOCK_SIZE].fill(0);
    let short: u64 = cut(&image).iter().map(|piece| u64::from(piece.chunk.length)).sum();
    assert_eq!(short, image.len() as u64);
    image[at..at + HOLE].fill(0);
    let pieces = cut(&image);
    let covered: u64 = pieces.iter().map(|piece| u64::from(piece.chunk.length)).sum();
    assert_eq!(covered, (image.len() - HOLE) as u64);
    assert!(pieces.iter().any(|piece| piece.offset + u64::from(piece.chunk.length) == at as u64));
    assert!(pieces.iter().any(|piece| piece.offset == (at + HOLE) as u64));
    assert_eq!(cut(&vec![0; 10 << 20]), []);
    assert_eq!(cut(&[]), []);
    // Too few zeros at both ends: data.
    assert_eq!(cut(&vec![0; HOLE - BLOCK_SIZE]).len(), 1);
}

/// The hole is there however the chunk before it is cut: also when that reaches its greatest length inside the zeros.
#[test]
fn a_hole_is_found_behind_a_chunk_of_any_length() {
    let (no_cut, block) = (7_u8, BLOCK_SIZE);
    let block_of = vec![no_cut; block];
    assert!(xxh3_64(&block_of) >= u64::MAX / 16, "this block must not end a chunk");
    for blocks in 225..260 {
        let mut image = block_of.repeat(blocks);
        image.resize(image.len() + HOLE, 0);
        image.extend_from_slice(&block_of);
        let pieces = cut(&image);
        let covered: usize = pieces.iter().map(|piece| piece.chunk.length as usize).sum();
        assert_eq!(covered, (blocks + 1) * block, "{blocks} blocks before the hole");
        assert_eq!(pieces.last().unwrap().offset, (blocks * block + HOLE) as u64);
    }
}

#[test]
fn regions_are_cut_each_by_itself() {
    let image = noise(9, 4 << 20);
    let regions = [0..4096, 4096..8192, 1 << 20..3 << 20, 3 << 20..4 << 20];
    let pieces: Vec<Piece> = cut_regions(&image[..], &regions).map(|piece| piece.unwrap()).collect();
    let alone: Vec<Piece> = regions
        .iter()
        .flat_map(|region| cut_regions(&image[..], std::slice::from_ref(region)).map(|piece| piece.unwrap()))
        .collect();
    assert_eq!(pieces, alone);
    for wrong in [&[0..4095][..], &[1..4096], &[4096..8192, 0..4096], &[0..8192, 4096..12288]] {
        let mut cutter = cut_regions(&image[..], wrong);
        let error = cutter.by_ref().find_map(Result::err).unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{wrong:?}");
        assert!(cutter.next().is_none());
    }
}

#[test]
fn an_error_of_the_source_ends_the_walk() {
    let image = noise(3, 1 << 20);
    let mut cutter = cut_regions(&image[..], &[0..2 << 20]);
    let error = cutter.by_ref().find_map(Result::err).unwrap();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert!(cutter.next().is_none());
}

/// New blocks in the middle: what is far enough behind them is cut as before.
#[test]
fn an_insertion_changes_few_chunks() {
    let image = noise(11, 16 << 20);
    let before: HashSet<ChunkId> = cut(&image).iter().map(|piece| piece.chunk.id).collect();
    for (at, blocks) in [(0, 1), (1000, 1), (3000, 7)] {
        let mut changed = image.clone();
        let at = at * BLOCK_SIZE;
        changed.splice(at..at, noise(at as u64 + 5, blocks * BLOCK_SIZE));
        let new = cut(&changed).iter().filter(|piece| !before.contains(&piece.chunk.id)).count();
        assert!(new <= 6, "{new} of {} chunks are new", before.len());
    }
}

#[test]
fn the_average_is_about_what_it_is_called() {
    let image = noise(13, 24 << 20);
    let pieces = cut(&image);
    let average = image.len() / pieces.len();
    assert!((430 << 10..600 << 10).contains(&average), "{average}");
    let longest = pieces.iter().filter(|piece| piece.chunk.length == MAX).count();
    assert!(longest * 50 < pieces.len(), "{longest} of {}", pieces.len());
}

/// An image as a few runs: of noise, of zeros, of a block again and again.
fn images() -> impl Strategy<Value = Vec<u8>> {
    let run = (0_u8..3, 1_usize..200, 1_u64..50);
    proptest::collection::vec(run, 0..6).prop_map(|runs| {
        let of = |(kind, blocks, seed): (u8, usize, u64)| match kind {
            0 => noise(seed, blocks * BLOCK_SIZE),
            1 => vec![0; (blocks % 40) * BLOCK_SIZE],
            _ => noise(seed, BLOCK_SIZE).repeat(blocks),
        };
        runs.into_iter().flat_map(of).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn chunks_and_holes_tile_the_image(image in images()) {
        let mut cutter = cut_regions(&image[..], &whole(&image));
        let (mut at, mut last) = (0_usize, None::<Piece>);
        while let Some(piece) = cutter.next() {
            let piece = piece.unwrap();
            let offset = usize::try_from(piece.offset).unwrap();
            let hole = &image[at..offset];
            prop_assert!(hole.is_empty() || hole.len() >= HOLE && hole.iter().all(|b| *b == 0));
            prop_assert_eq!(cutter.bytes(), bytes_of(&image, &piece));
            prop_assert_eq!(piece.chunk.id, ChunkId::of(cutter.bytes()));
            prop_assert!(piece.chunk.length <= MAX && piece.chunk.length.is_multiple_of(BLOCK));
            // Shorter than the least only before a hole or the end.
            if let Some(last) = last {
                prop_assert!(last.chunk.length >= MIN || !hole.is_empty());
            }
            at = offset + piece.chunk.length as usize;
            last = Some(piece);
        }
        let rest = &image[at..];
        prop_assert!(rest.is_empty() || rest.len() >= HOLE && rest.iter().all(|b| *b == 0));
    }

    /// Every maximal run of zeros long enough is a hole, wherever chunks end.
    #[test]
    fn holes_depend_on_zeros_alone(image in images()) {
        let mut covered = vec![false; image.len() / BLOCK_SIZE];
        for piece in cut(&image) {
            let first = usize::try_from(piece.offset).unwrap() / BLOCK_SIZE;
            covered[first..first + (piece.chunk.length / BLOCK) as usize].fill(true);
        }
        let zero: Vec<bool> = image.chunks(BLOCK_SIZE).map(|block| block == ZEROS).collect();
        let mut at = 0;
        while at < zero.len() {
            let run = zero[at..].iter().take_while(|z| **z == zero[at]).count();
            let hole = zero[at] && run >= HOLE / BLOCK_SIZE;
            prop_assert!(covered[at..at + run].iter().all(|c| *c != hole));
            at += run;
        }
    }
}
