//! The store is read again and checked in the background, where `scrub.store` says how fast.
//!
//! It tells and repairs nothing: what is wrong is logged, counted in the metrics and shown on the status page, and `speedy fsck --repair`
//! brings it back. Each node that is told to does it for itself: N of them read the store N times.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::config::ScrubConfig;
use crate::content::fsck::{Checker, Finding, Options, Problem, Report};
use crate::object::Objects;
use crate::snapshot::Timestamp;
use crate::snapshot::report::StoreScrub;

/// Not at once: a start has other things to do.
const FIRST: Duration = Duration::from_secs(600);
/// After a check that did not come to its end.
const AGAIN: Duration = Duration::from_secs(600);
/// How long a store may be away during a check.
const PATIENCE: Duration = Duration::from_secs(300);
/// How many findings of a check are logged one by one.
const LOGGED: usize = 20;

/// See the module's page.
#[derive(Debug)]
pub(super) struct StoreScrubber {
    checker: Checker,
    every: Duration,
    state: Mutex<StoreScrub>,
}

impl StoreScrubber {
    /// Of this store; nothing if it is not to be.
    pub(super) fn new(objects: &Objects, config: &ScrubConfig) -> Option<Arc<StoreScrubber>> {
        let rate = config.store.bytes();
        let options = Options { quick: false, rate };
        let checker = Checker::new(objects.patient(PATIENCE), options);
        let state = Mutex::new(StoreScrub { rate, ..StoreScrub::default() });
        (rate > 0).then(|| Arc::new(StoreScrubber { checker, every: config.every.duration(), state }))
    }

    /// What it has found so far.
    pub(super) fn state(&self) -> StoreScrub {
        self.state.lock().clone()
    }

    /// For ever.
    pub(super) async fn run(self: Arc<Self>, stop: CancellationToken) {
        stop.run_until_cancelled(async {
            sleep(FIRST.min(self.every)).await;
            loop {
                let pause = match self.round().await {
                    Ok(()) => self.every,
                    Err(error) => {
                        tracing::warn!(%error, "the store cannot be checked now");
                        self.state.lock().problem = Some(error.to_string());
                        AGAIN.min(self.every)
                    }
                };
                sleep(pause).await;
            }
        })
        .await;
    }

    async fn round(&self) -> Result<(), crate::content::ContentError> {
        let show = |progress: crate::content::fsck::Progress| {
            let percent = progress.done * 100 / progress.total.max(1);
            self.state.lock().running = Some(format!("{}, {percent} %", progress.phase));
        };
        let checked = self.checker.check(&show).await;
        let mut state = self.state.lock();
        state.running = None;
        let report = checked?;
        add(&mut state, &report);
        drop(state);
        report.findings.iter().take(LOGGED).for_each(log);
        if !report.is_clean() {
            let wrong = report.findings.len() as u64 + report.unlisted;
            tracing::error!(
                wrong,
                "objects of the store are missing or damaged; `speedy fsck --repair` brings back what a node has"
            );
        }
        Ok(())
    }
}

/// Adds a check that came to its end.
fn add(scrub: &mut StoreScrub, report: &Report) {
    let missing = report.findings.iter().filter(|finding| finding.problem == Problem::Missing).count() as u64;
    scrub.missing = missing;
    scrub.damaged = report.findings.len() as u64 - missing + report.unlisted;
    scrub.objects = report.checked.values().sum();
    scrub.bytes += report.bytes;
    scrub.rounds += 1;
    scrub.problem = None;
    scrub.ended = Some(Timestamp::now().0 / 1_000_000_000);
}

fn log(finding: &Finding) {
    let image = finding.images.first().map(|image| image.reference.as_str()).unwrap_or("none");
    let problem = match &finding.problem {
        Problem::Missing => "missing",
        Problem::Damaged(how) => how,
    };
    tracing::error!(
        object = finding.object.name(),
        problem,
        images = finding.image_count,
        first_image = image,
        "the store has lost an object"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ByteSize, Config, Timespan};

    #[tokio::test(start_paused = true)]
    async fn a_damaged_store_is_told_until_it_is_whole_again() {
        let objects = Objects::memory();
        let name = format!("refs/ab/{}/0123456789abcdef", "ab".repeat(32));
        objects.put(&name, bytes::Bytes::from_static(b"no ref")).await.unwrap();
        let config = Config::default().scrub;
        assert!(StoreScrubber::new(&objects, &config).is_none(), "off unless somebody wants it");
        let config = ScrubConfig { store: ByteSize::from_mib(1), every: Timespan::from_secs(5), ..config };
        let scrubber = StoreScrubber::new(&objects, &config).unwrap();
        let rounds = async |least: u64| {
            while scrubber.state().rounds < least {
                sleep(Duration::from_secs(1)).await;
            }
        };
        let watched = async {
            rounds(1).await;
            let state = scrubber.state();
            assert_eq!((state.missing, state.damaged, state.running), (0, 1, None));
            assert!(state.ended.is_some_and(|at| at > 1_700_000_000));
            objects.delete(&name).await.unwrap();
            rounds(3).await;
            assert_eq!(scrubber.state().damaged, 0);
        };
        let stop = CancellationToken::new();
        tokio::select! {
            () = Arc::clone(&scrubber).run(stop.clone()) => panic!("it goes on for ever"),
            () = watched => {}
        }
        stop.cancel();
        scrubber.run(stop).await;
    }
}
