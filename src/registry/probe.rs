//! Whether a registry answers.
//!
//! Whoever asks at the same time waits for one probe, and what it found is believed for a few seconds: a pull asks four times, a
//! hundred pods a hundred times.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::request::Upstream;

/// How long a registry may take for an answer, from the look-up of its name on. As long as containerd's `dial_timeout` in what
/// `speedy config hosts` prints.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long it is believed that one answers. Short: a pull that begins when it fails is to be helped.
const BELIEVED_THERE: Duration = Duration::from_secs(3);
/// How long it is believed that one does not: longer than containerd takes from one request of a pull to the next.
const BELIEVED_AWAY: Duration = Duration::from_secs(10);
/// The most probes at once.
const PROBES: usize = 8;
/// The most registries that are remembered.
const MOST_REGISTRIES: usize = 256;

/// What became of a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// It answers, whatever it says.
    There,
    /// It cannot be reached, or answers that it has failed.
    Away,
}

/// Asks a registry whether it is there.
#[async_trait]
pub trait Probe: fmt::Debug + Send + Sync {
    /// Comes back within seconds, whatever the registry does.
    async fn probe(&self, upstream: &Upstream) -> Reach;
}

/// Asks it over the network: `GET /v2/`, as every client of registries begins.
#[derive(Debug)]
pub struct UpstreamProbe {
    client: reqwest::Client,
}

impl UpstreamProbe {
    /// With the proxies of the environment, as containerd has them; an error if TLS cannot be used here.
    pub fn new() -> io::Result<UpstreamProbe> {
        let client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(PATIENCE)
            // A connection from before says nothing about now.
            .pool_max_idle_per_host(0)
            .user_agent(concat!("speedy/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(UpstreamProbe { client: client.map_err(io::Error::other)? })
    }
}

#[async_trait]
impl Probe for UpstreamProbe {
    async fn probe(&self, upstream: &Upstream) -> Reach {
        let answer = self.client.get(upstream.url().clone()).send().await;
        let reach = match &answer {
            Ok(answer) if answer.status().is_server_error() => Reach::Away,
            Err(error) if no_answer(error) => Reach::Away,
            _ => Reach::There,
        };
        let answer = answer.map(|answer| answer.status()).map_err(|error| chain(&error));
        tracing::debug!(registry = upstream.registry(), ?answer, ?reach, "a registry was probed");
        reach
    }
}

/// Whether nobody answered: no name, no connection, no byte in time. Bytes that make no sense are an answer, also those that TLS
/// refuses: a certificate that is not believed comes from somebody who is there.
fn no_answer(error: &reqwest::Error) -> bool {
    let mut source: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            // What TLS refuses.
            if error.kind() == io::ErrorKind::InvalidData {
                return false;
            }
            // The cause hides in it, and is no source of it.
            source = error.get_ref().map(|inner| inner as &(dyn Error + 'static));
            continue;
        }
        if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_parse) {
            return false;
        }
        source = error.source();
    }
    true
}

/// An error with its causes: reqwest's own text leaves them out.
fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

/// What is known of a registry, and since when; locked while somebody asks.
type Known = Arc<tokio::sync::Mutex<Option<(Instant, Reach)>>>;

/// What is known of all registries.
#[derive(Debug)]
pub(super) struct Probes {
    probe: Box<dyn Probe>,
    at_once: Semaphore,
    known: Mutex<HashMap<Upstream, Known>>,
}

impl Probes {
    pub(super) fn new(probe: Box<dyn Probe>) -> Probes {
        Probes { probe, at_once: Semaphore::new(PROBES), known: Mutex::default() }
    }

    /// Whether it answers, now or a few seconds ago.
    pub(super) async fn reach(&self, upstream: &Upstream) -> Reach {
        let known = self.known(upstream);
        let mut known = known.lock().await;
        if let Some((since, reach)) = *known
            && since.elapsed() < believed(reach)
        {
            return reach;
        }
        let Ok(_place) = self.at_once.acquire().await else { return Reach::There };
        let reach = self.probe.probe(upstream).await;
        *known = Some((Instant::now(), reach));
        reach
    }

    fn known(&self, upstream: &Upstream) -> Known {
        let mut all = self.known.lock();
        if all.len() >= MOST_REGISTRIES && !all.contains_key(upstream) {
            // Those that somebody asks about right now are held by him.
            all.retain(|_, known| Arc::strong_count(known) > 1);
        }
        Arc::clone(all.entry(upstream.clone()).or_default())
    }
}

fn believed(reach: Reach) -> Duration {
    match reach {
        Reach::There => BELIEVED_THERE,
        Reach::Away => BELIEVED_AWAY,
    }
}

#[cfg(test)]
mod tests;
