//! What a publish shows while it runs and when it is done.
//!
//! On a terminal one line that is drawn over and goes away at the end, else a line for each layer, both on standard error; the
//! result on standard output.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration};
use serde_json::{Value, json};

use super::source::Image;
use crate::cli::long::Display;
use crate::containerd::manifest::Layer;
use crate::content::publish::{Progress, Published};

/// What became of a layer.
#[derive(Debug)]
pub(super) enum Outcome {
    Published(Published),
    /// Somebody who is believed has published it before.
    Present {
        publisher: String,
    },
}

/// The progress of one publish.
#[derive(Debug)]
pub(super) struct Meter {
    line: Display,
    /// Whether there is a line for each layer instead.
    lines: bool,
    /// Bytes of each layer's blob, and how far it is built and published. A blob's bytes count half for each of the two.
    layers: Vec<(u64, [AtomicU64; 2])>,
    uploaded: AtomicU64,
    start: Instant,
}

impl Meter {
    pub(super) fn new(image: &Image, json: bool) -> Meter {
        let layers =
            image.layers.iter().map(|layer| (layer.blob.size, Default::default())).collect::<Vec<_>>();
        let total = layers.iter().map(|(size, _)| size / 2 * 2).sum();
        let lines = !json && !std::io::stderr().is_terminal();
        let (line, uploaded) = (Display::bar(json, total), AtomicU64::new(0));
        let meter = Meter { line, lines, layers, uploaded, start: Instant::now() };
        meter.draw();
        meter
    }

    /// So many bytes of a layer's blob have been made into its image.
    pub(super) fn built(&self, position: usize, bytes: u64) {
        self.set(position, 0, bytes / 2);
    }

    /// So much of its image is in the store; `before` is what had been uploaded of it when it was last told.
    pub(super) fn published(&self, position: usize, progress: Progress, before: &AtomicU64) {
        let uploaded = progress.uploaded.saturating_sub(before.swap(progress.uploaded, Ordering::Relaxed));
        self.uploaded.fetch_add(uploaded, Ordering::Relaxed);
        let half = u128::from(self.layers[position].0 / 2);
        let part = half * u128::from(progress.done) / u128::from(progress.total.max(1));
        self.set(position, 1, u64::try_from(part).unwrap_or(0));
    }

    /// A layer is done.
    pub(super) fn done(&self, position: usize, layer: &Layer, outcome: &Outcome) -> anyhow::Result<()> {
        let half = self.layers[position].0 / 2;
        self.set(position, 0, half);
        self.set(position, 1, half);
        if self.lines {
            let of = self.layers.len();
            writeln!(
                std::io::stderr(),
                "layer {}/{of} {}: {}",
                position + 1,
                layer.chain,
                sentence(outcome)
            )?;
        }
        Ok(())
    }

    /// The bar goes away.
    fn end(&self) {
        self.line.finish_and_clear();
    }

    fn set(&self, position: usize, phase: usize, bytes: u64) {
        self.layers[position].1[phase].store(bytes, Ordering::Relaxed);
        self.draw();
    }

    fn draw(&self) {
        if self.line.is_hidden() {
            return;
        }
        self.line.set_position(
            self.layers.iter().flat_map(|(_, parts)| parts).map(|p| p.load(Ordering::Relaxed)).sum(),
        );
        let uploaded = self.uploaded.load(Ordering::Relaxed);
        let milliseconds = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
        let rate = uploaded.saturating_mul(1000) / milliseconds;
        let complete = |(size, parts): &&(u64, [AtomicU64; 2])| parts[1].load(Ordering::Relaxed) >= size / 2;
        let layers = format!("{}/{} layers", self.layers.iter().filter(complete).count(), self.layers.len());
        // Zero is: not known.
        let eta = match self.line.eta() {
            Duration::ZERO => String::new(),
            eta => format!(", ETA {:#}", HumanDuration(eta.max(Duration::from_secs(1)))),
        };
        self.line.set_message(match self.line.wide {
            true => format!("{layers}, {} uploaded, {}/s{eta}", HumanBytes(uploaded), HumanBytes(rate)),
            false => format!("{layers}{eta}"),
        });
    }
}

/// Ends a meter when it is dropped, so that whatever is printed next begins a line.
pub(super) struct Shown(pub(super) Arc<Meter>);

impl Drop for Shown {
    fn drop(&mut self) {
        self.0.end();
    }
}

fn sentence(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Present { publisher } => format!("there already, published by {publisher}"),
        Outcome::Published(published) => format!(
            "published, {} of {} chunks new, {} uploaded",
            published.new_chunks,
            published.chunks,
            HumanBytes(published.stored_bytes)
        ),
    }
}

/// The result for people.
pub(super) fn human(image: &Image, outcomes: &[Outcome], start: Instant) -> String {
    let published = outcomes.iter().filter_map(|outcome| match outcome {
        Outcome::Published(published) => Some(published),
        Outcome::Present { .. } => None,
    });
    let (count, chunks, bytes) = published.fold((0, 0, 0), |(count, chunks, bytes), published| {
        (count + 1, chunks + published.new_chunks, bytes + published.stored_bytes)
    });
    let there = match outcomes.len() - count {
        0 => String::new(),
        there => format!(", {there} there already"),
    };
    format!(
        "published {} ({}): {} layers{there}, {chunks} new chunks, {} uploaded in {:.1} s",
        image.reference,
        image.platform,
        outcomes.len(),
        HumanBytes(bytes),
        start.elapsed().as_secs_f64()
    )
}

/// The result for programs.
pub(super) fn to_json(image: &Image, outcomes: &[Outcome], start: Instant) -> Value {
    let layers: Vec<Value> =
        image.layers.iter().zip(outcomes).map(|(layer, outcome)| layer_json(layer, outcome)).collect();
    json!({
        "image": image.reference,
        "platform": image.platform.to_string(),
        "manifest": image.manifest.digest.to_string(),
        "seconds": start.elapsed().as_secs_f64(),
        "layers": layers,
    })
}

fn layer_json(layer: &Layer, outcome: &Outcome) -> Value {
    let mut value = json!({ "chain_id": layer.chain.to_string(), "diff_id": layer.diff_id.to_string() });
    let more = match outcome {
        Outcome::Present { publisher } => json!({ "outcome": "present", "publisher": publisher }),
        Outcome::Published(published) => json!({
            "outcome": "published",
            "index": published.index.to_string(),
            "chunks": published.chunks,
            "new_chunks": published.new_chunks,
            "bytes": published.bytes,
            "new_bytes": published.new_bytes,
            "uploaded_bytes": published.stored_bytes,
        }),
    };
    if let (Value::Object(value), Value::Object(more)) = (&mut value, more) {
        value.extend(more);
    }
    value
}
