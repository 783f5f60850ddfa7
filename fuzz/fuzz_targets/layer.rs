//! A layer's blob, uncompressed or not, becomes an image or an error.

#![no_main]

use libfuzzer_sys::fuzz_target;
use speedy::image::{Compression, Limits, NothingBelow, Source, build};

fuzz_target!(|blob: &[u8]| {
    // Checksums are mended: no mutation would come farther than the first header otherwise.
    let mut blob = blob.to_vec();
    for block in blob.chunks_exact_mut(512) {
        let sum = |block: &[u8]| block.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        let sum = sum(&block[..148]) + 8 * u32::from(b' ') + sum(&block[156..]);
        if block[148..154].iter().all(u8::is_ascii_digit) {
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    let limits =
        Limits { plain: 1 << 20, data: 1 << 20, metadata: 1 << 20, entries: 1000, ..Limits::default() };
    let out = tempfile::tempfile().expect("a temporary file");
    let source = Source { blob: &blob[..], compression: Compression::ByMagic };
    drop(build(source, &out, &NothingBelow, &limits, &|| false));
});
