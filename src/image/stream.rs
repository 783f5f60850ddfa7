//! Reading a layer's blob: decompression, the diff ID and whoever wants the tar's entries, side by side.
//!
//! ```text
//! blob ─▶ decompress ─▶ pieces ─┬─▶ SHA-256 of every byte
//!         (a thread)            │   (a thread)
//!                               └─▶ the caller's thread: tar reader, and what consumes its entries
//! ```
//! A piece is shared, not copied, and its buffer is used again when both are done with it; that also bounds how far one can be
//! ahead of the other. Memory: 4 MiB and the decompressor's own.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, ScopedJoinHandle};

use super::compression::{self, Compression};
use super::limits::{Limit, Limits};
use super::{ImageError, tar};
use crate::oci::{DiffId, Sha256};

/// Bytes of a piece, and how many there are.
const PIECE: usize = 256 * 1024;
const PIECES: usize = 16;

/// What is known of a layer when all of its bytes have been read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plain {
    /// The digest of the uncompressed bytes, padding and whatever follows the tar included.
    pub diff_id: DiffId,
    /// How many they are.
    pub size: u64,
}

/// Reads all of `blob`, hands its tar to `consume`, and says what the uncompressed bytes were.
///
/// What stands behind the end of the tar is read and hashed, and otherwise ignored, as by containerd. `cancelled` is asked for
/// every piece. An error ends everything; this returns when the read of the blob that is under way has returned.
pub fn read<T>(
    blob: impl Read + Send,
    compression: Compression,
    limits: &Limits,
    cancelled: &(dyn Fn() -> bool + Sync),
    consume: impl FnOnce(&mut tar::Reader<'_>) -> Result<T, ImageError>,
) -> Result<(T, Plain), ImageError> {
    let (home, free) = sync_channel(PIECES);
    for _ in 0..PIECES {
        home.send(vec![0; PIECE]).expect("the channel has room for all pieces");
    }
    let (to_hasher, hasher) = sync_channel::<Arc<Piece>>(PIECES);
    let (to_reader, pieces) = sync_channel(PIECES);
    thread::scope(|scope| {
        let hasher = scope.spawn(move || hash(&hasher));
        let decompressor = scope.spawn(move || {
            let outlet = Outlet { free, home, to_hasher, to_reader };
            let end = outlet.fill(blob, compression, limits);
            if let Err(error) = end {
                // Whoever reads is gone: then it has an error of its own.
                drop(outlet.to_reader.send(Err(error)));
            }
        });
        let mut pieces = Pieces { pieces, current: None, at: 0, cancelled };
        let consumed = consume(&mut tar::Reader::new(&mut pieces, limits)).and_then(|value| {
            pieces.drain()?;
            Ok(value)
        });
        drop(pieces);
        join(decompressor);
        let plain = join(hasher);
        consumed.map(|value| (value, plain))
    })
}

/// Panics go on where they are waited for.
fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn hash(pieces: &Receiver<Arc<Piece>>) -> Plain {
    let (mut sha256, mut size) = (Sha256::default(), 0);
    for piece in pieces {
        sha256.update(piece.bytes());
        size += piece.bytes().len() as u64;
    }
    Plain { diff_id: DiffId(sha256.digest()), size }
}

/// Uncompressed bytes; the buffer goes home when nobody needs them any more.
struct Piece {
    buffer: Vec<u8>,
    filled: usize,
    home: SyncSender<Vec<u8>>,
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        &self.buffer[..self.filled]
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // Nobody at home: the stream has ended.
        drop(self.home.try_send(std::mem::take(&mut self.buffer)));
    }
}

struct Outlet {
    free: Receiver<Vec<u8>>,
    home: SyncSender<Vec<u8>>,
    to_hasher: SyncSender<Arc<Piece>>,
    to_reader: SyncSender<Result<Arc<Piece>, ImageError>>,
}

impl Outlet {
    /// Sends all of the uncompressed blob; `Ok` at its end, or as soon as nobody reads any more.
    fn fill(&self, blob: impl Read, compression: Compression, limits: &Limits) -> Result<(), ImageError> {
        let compressed = AtomicU64::new(0);
        let blob = Counted { inner: blob, count: &compressed };
        let mut plain = compression::decompress(compression, blob).map_err(of_decompressor)?;
        let mut total: u64 = 0;
        loop {
            let Ok(mut buffer) = self.free.recv() else { return Ok(()) };
            let filled = fill(&mut plain, &mut buffer)?;
            total += filled as u64;
            check(total, compressed.load(Ordering::Relaxed), limits)?;
            let last = filled < buffer.len();
            let piece = Arc::new(Piece { buffer, filled, home: self.home.clone() });
            let sent = self.to_hasher.send(piece.clone()).is_ok() && self.to_reader.send(Ok(piece)).is_ok();
            if last || !sent {
                return Ok(());
            }
        }
    }
}

fn fill(plain: &mut dyn Read, buffer: &mut [u8]) -> Result<usize, ImageError> {
    let mut filled = 0;
    while filled < buffer.len() {
        match plain.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(of_decompressor(error)),
        }
    }
    Ok(filled)
}

fn check(plain: u64, compressed: u64, limits: &Limits) -> Result<(), ImageError> {
    if plain > limits.plain {
        return Err(ImageError::limit(Limit::Plain, limits.plain));
    }
    if plain > limits.ratio_from && plain / limits.ratio.max(1) > compressed {
        return Err(ImageError::limit(Limit::Ratio, limits.ratio));
    }
    Ok(())
}

/// The blob's own errors come wrapped; all others are the decompressor's.
fn of_decompressor(error: io::Error) -> ImageError {
    match error.downcast::<ImageError>() {
        Ok(ours) => ours,
        Err(error) => ImageError::Compressed(error),
    }
}

/// Counts what is read, and marks the blob's errors as such. (Read and asked by one thread; the count is shared with the
/// decompressor that owns the reader.)
struct Counted<'a, R> {
    inner: R,
    count: &'a AtomicU64,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.inner.read(buffer) {
                Ok(read) => {
                    self.count.fetch_add(read as u64, Ordering::Relaxed);
                    return Ok(read);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(io::Error::other(ImageError::Read(error))),
            }
        }
    }
}

/// The reading end.
struct Pieces<'a> {
    pieces: Receiver<Result<Arc<Piece>, ImageError>>,
    current: Option<Arc<Piece>>,
    at: usize,
    cancelled: &'a (dyn Fn() -> bool + Sync),
}

impl Pieces<'_> {
    fn drain(&mut self) -> Result<(), ImageError> {
        loop {
            let left = self.fill_buf().map_err(ImageError::of_stream)?.len();
            if left == 0 {
                return Ok(());
            }
            self.consume(left);
        }
    }
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(buffer.len());
        buffer[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}

impl BufRead for Pieces<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.current.as_ref().is_none_or(|piece| self.at >= piece.filled) {
            self.current = None;
            if (self.cancelled)() {
                return Err(io::Error::other(ImageError::Cancelled));
            }
            self.at = 0;
            // A sender that is gone has sent everything: an error would have come before.
            self.current = self.pieces.recv().ok().transpose().map_err(io::Error::other)?;
        }
        Ok(self.current.as_ref().map_or(&[], |piece| &piece.bytes()[self.at..]))
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount;
    }
}
