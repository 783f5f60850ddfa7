//! The notice of a collection: publishers look twice while it is up.
//!
//! **What.** Whoever deletes puts up [`layout::COLLECTION`] first, and renews it while it deletes. Whoever publishes asks for it when
//! everything is written that a ref or a name is going to need, and once more behind that. While it is up, the publisher waits for [`SETTLED`]
//! and looks at everything again.
//!
//! **Why.** Object stores cannot delete under a condition. A collector looks at an object, finds it old, and deletes it; a publisher may make it
//! young in between, and be told that it is. With the notice there are two cases:
//!
//! * The publisher sees none. Then the collector put it up after the publisher made everything young, so it looks at everything later than
//!   that, and finds it young.
//! * The publisher sees it. What was looked at before it was made young is deleted within [`SETTLED`] ([`LAST_LOOK`] says what the collector
//!   does for that); what is missing afterwards is written again, and whoever looks at it from then on finds it young.
//!
//! **Assumptions.** Reading one object shows the last write to it that was answered; listings may be late. A store that was asked for something
//! and whose answer was not awaited does it within [`SETTLED`] less [`LAST_LOOK`], or never.
//!
//! **When it fails.** A collector that dies leaves it up; it is heeded for three hours after its last renewal, which makes publishing slower
//! and nothing else.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::ContentError;
use crate::object::{ObjectError, Objects, layout};

/// How long after its last renewal a notice is heeded, in seconds: more than the hour by which clocks may differ.
const HEEDED: i64 = 3 * 3600;
/// How often it is renewed.
const RENEWAL: Duration = Duration::from_secs(300);
/// Within this time of a collector's last look at an object its deletion is done with.
pub const SETTLED: Duration = Duration::from_secs(60);
/// What a collector gives itself for looking at an object and deleting it.
pub const LAST_LOOK: Duration = Duration::from_secs(20);
/// How often it is tried to put it up against others who do the same.
const TRIES: u32 = 8;
/// The most collectors that it names; more add nothing.
const MOST: usize = 8;
/// More than any notice has, in bytes.
const LONGEST: u64 = 4096;

/// What the object says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Said {
    /// For whoever finds it.
    #[serde(default)]
    about: String,
    /// Who deletes, or did when it was last renewed.
    collectors: Vec<String>,
    /// That all of them have ended.
    over: bool,
}

impl Said {
    fn by(collectors: Vec<String>, over: bool) -> Said {
        let about =
            "a collection of Speedy deletes what no image needs; publishers look twice while this is young";
        Said { about: about.to_owned(), collectors, over }
    }
}

/// What the store says, if it is young enough to be heeded. What cannot be read is a notice of somebody's.
async fn heeded(objects: &Objects) -> Result<Option<Said>, ContentError> {
    let Some(found) = objects.stat(layout::COLLECTION).await? else { return Ok(None) };
    if found.modified < objects.now().saturating_sub(HEEDED) {
        return Ok(None);
    }
    let bytes = match objects.get(layout::COLLECTION, LONGEST).await {
        Err(ObjectError::TooLarge { .. }) => return Ok(Some(Said::default())),
        got => got?,
    };
    Ok(bytes.map(|bytes| serde_json::from_slice(&bytes).unwrap_or_default()))
}

/// Whether somebody may be deleting.
pub(super) async fn is_up(objects: &Objects) -> Result<bool, ContentError> {
    Ok(heeded(objects).await?.is_some_and(|said| !said.over))
}

/// A notice that this process has put up.
#[derive(Debug)]
pub(super) struct Notice {
    objects: Objects,
    own: String,
    renewed: Instant,
    /// What this machine's clock said when it was put up, and what the store's did.
    pub(super) put_at: i64,
    pub(super) store_time: i64,
}

impl Notice {
    /// Puts it up; `settle` is false only if nobody publishes.
    pub(super) async fn put_up(objects: &Objects, settle: bool) -> Result<Notice, ContentError> {
        let own = format!("{:016x}", RandomState::new().build_hasher().finish());
        let (put_at, renewed) = (objects.now(), Instant::now());
        let mut notice = Notice { objects: objects.clone(), own, renewed, put_at, store_time: put_at };
        for _ in 0..TRIES {
            notice.write().await?;
            notice.put_at = objects.now();
            if let Some(found) = objects.stat(layout::COLLECTION).await? {
                notice.store_time = found.modified;
            }
            if !settle {
                return Ok(notice);
            }
            // Who was about to take it down has done so by then.
            sleep(SETTLED).await;
            if heeded(objects).await?.is_some_and(|said| !said.over && said.collectors.contains(&notice.own))
            {
                return Ok(notice);
            }
        }
        Err(ContentError::Contended)
    }

    /// To be called every now and then while something is deleted.
    pub(super) async fn renew(&mut self) -> Result<(), ContentError> {
        if self.renewed.elapsed() < RENEWAL {
            return Ok(());
        }
        self.renewed = Instant::now();
        self.write().await
    }

    async fn write(&self) -> Result<(), ContentError> {
        let others = heeded(&self.objects).await?.filter(|said| !said.over).unwrap_or_default().collectors;
        let mut collectors: Vec<String> =
            others.into_iter().filter(|other| *other != self.own).take(MOST - 1).collect();
        collectors.push(self.own.clone());
        put(&self.objects, &Said::by(collectors, false)).await
    }

    /// Takes it down, unless somebody else has put one up: then it is left to grow old.
    pub(super) async fn take_down(self) -> Result<(), ContentError> {
        let objects = self.objects.within(LAST_LOOK / 2);
        match heeded(&objects).await? {
            Some(said) if said.collectors == [self.own.as_str()] => {
                put(&objects, &Said::by(vec![self.own], true)).await
            }
            _ => Ok(()),
        }
    }
}

async fn put(objects: &Objects, said: &Said) -> Result<(), ContentError> {
    let json = serde_json::to_vec(said).expect("strings have a JSON form");
    Ok(objects.put(layout::COLLECTION, json.into()).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_is_up_until_it_is_taken_down() {
        let objects = Objects::memory();
        assert!(!is_up(&objects).await.unwrap());
        let notice = Notice::put_up(&objects, true).await.unwrap();
        assert!(is_up(&objects).await.unwrap());
        notice.take_down().await.unwrap();
        assert!(!is_up(&objects).await.unwrap());
    }

    /// One who ended took the notice down that another still needed.
    #[tokio::test(start_paused = true)]
    async fn who_is_not_alone_leaves_it_up() {
        let objects = Objects::memory();
        let (one, other) = tokio::join!(Notice::put_up(&objects, true), Notice::put_up(&objects, true));
        one.unwrap().take_down().await.unwrap();
        assert!(is_up(&objects).await.unwrap());
        let mut other = other.unwrap();
        // Somebody has written over it all the same.
        put(&objects, &Said::by(vec!["x".into()], true)).await.unwrap();
        other.renew().await.unwrap();
        assert!(!is_up(&objects).await.unwrap());
        sleep(RENEWAL).await;
        other.renew().await.unwrap();
        assert!(is_up(&objects).await.unwrap());
        other.take_down().await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn rubbish_is_a_notice() {
        let objects = Objects::memory();
        for rubbish in [&b""[..], b"{", &[b'x'; 5000]] {
            objects.put(layout::COLLECTION, rubbish.to_vec().into()).await.unwrap();
            assert!(is_up(&objects).await.unwrap());
        }
    }
}
