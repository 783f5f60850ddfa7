//! A mutation loop for code that reads what others wrote, on stable Rust and in every test run.
//!
//! [`run`] changes the inputs of a corpus in the ways that break readers (bits, lengths, cuts, pieces moved and repeated) and
//! hands them to the target for `FUZZ_SECONDS` (2 by default, 60 in CI). The seed is fixed, so two runs try the same
//! inputs in the same order. A target fails by panicking; the input is then written to the temporary directory and named.
//! The crate `fuzz/` drives the same targets by coverage where there is a nightly compiler.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "what was tried, and what failed, is worth a line"
)]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

/// Inputs do not grow beyond this.
const LONGEST: usize = 64 * 1024;

/// How long each target is tried.
fn time() -> Duration {
    let seconds = std::env::var("FUZZ_SECONDS").ok().map(|text| text.parse().expect("FUZZ_SECONDS"));
    Duration::from_secs(seconds.unwrap_or(2))
}

/// Tries `target` on the inputs of `corpus` as they are, then on mutations of them until the time is over.
pub(crate) fn run(name: &str, corpus: &[Vec<u8>], target: impl Fn(&[u8])) {
    let tried = run_for(name, time(), corpus, target);
    println!("fuzz {name}: {tried} inputs");
}

fn run_for(name: &str, time: Duration, corpus: &[Vec<u8>], target: impl Fn(&[u8])) -> u64 {
    assert!(!corpus.is_empty(), "a mutation needs something to change");
    let attempt = |input: &[u8]| {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
            let path = std::env::temp_dir().join(format!("speedy-fuzz-{name}"));
            std::fs::write(&path, input).unwrap();
            eprintln!("fuzz {name}: failed on the {} bytes in {}", input.len(), path.display());
            resume_unwind(panic);
        }
    };
    corpus.iter().for_each(|input| attempt(input));
    let mut tried = corpus.len() as u64;
    let mut random = Random(0x5eed_5eed_5eed_5eed);
    let end = Instant::now() + time;
    while Instant::now() < end {
        let mut input = corpus[random.below(corpus.len())].clone();
        for _ in 0..1 + random.below(4) {
            mutate(&mut input, corpus, &mut random);
        }
        input.truncate(LONGEST);
        attempt(&input);
        tried += 1;
    }
    tried
}

/// xorshift64*: the same numbers on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `limit`; 0 if that is 0.
    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % (limit.max(1) as u64)).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    /// A range inside `length` bytes, short ones more often.
    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.below(length);
        let longest = if self.next().is_multiple_of(4) { length } else { 16 };
        start..(start + 1 + self.below(longest)).min(length)
    }
}

/// Numbers that readers get wrong.
const EDGES: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0xfff,
    0x1000,
    0x7fff_ffff,
    0x8000_0000,
    u32::MAX as u64,
    i64::MAX as u64,
    u64::MAX,
];

fn mutate(input: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut Random) {
    if input.is_empty() {
        input.push(random.byte());
        return;
    }
    let length = input.len();
    let range = random.range(length);
    match random.below(9) {
        0 => input[range.start] ^= 1 << random.below(8),
        1 => input[range.start] = random.byte(),
        2 => {
            let number = EDGES[random.below(EDGES.len())].wrapping_add(random.next() % 3).to_le_bytes();
            let width = [1, 2, 4, 8][random.below(4)].min(length - range.start);
            input[range.start..range.start + width].copy_from_slice(&number[..width]);
        }
        // A digit, for numbers that are text.
        3 => input[range.start] = b"0123456789 -+.,=\n\0/"[random.below(19)],
        4 => input.truncate(range.start),
        5 => drop(input.drain(range)),
        6 => {
            let piece = input[range].to_vec();
            let at = random.below(length + 1);
            drop(input.splice(at..at, piece));
        }
        7 => {
            let other = &corpus[random.below(corpus.len())];
            let piece = other[random.range(other.len().max(1)).start.min(other.len())..].to_vec();
            drop(input.splice(range.start.., piece));
        }
        _ => {
            // Whole records of 512 bytes, the unit of tar, change places.
            let block = random.below(length.div_ceil(512)) * 512;
            let piece = input[block..(block + 512).min(length)].to_vec();
            let at = random.below(length.div_ceil(512)) * 512;
            drop(input.splice(at..at, piece));
        }
    }
}

#[test]
fn the_loop_finds_what_is_there_and_is_the_same_each_time() {
    let corpus = [b"a reader that trusts byte 7".to_vec()];
    let target = |input: &[u8]| assert!(input.get(7) != Some(&0xff), "found");
    let found = catch_unwind(|| run_for("itself", Duration::from_secs(60), &corpus, target));
    assert!(found.is_err());

    let sequence = || {
        let (mut input, mut random) = (corpus[0].clone(), Random(1));
        (0..1000).for_each(|_| mutate(&mut input, &corpus, &mut random));
        input
    };
    assert_eq!(sequence(), sequence());
}
