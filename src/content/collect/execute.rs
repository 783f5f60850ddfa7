//! Executing a plan: a second reading, then deletions, each after a last look.

use std::collections::HashSet;
use std::pin::pin;
use std::time::Duration;

use futures::{TryStreamExt, stream};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

use super::mark::Sweep;
use super::plan::of_hint;
use super::roots::Roots;
use super::{CollectError, Collector, DELETIONS, Freed, LONGEST, Plan, Step, Tally, Verdict, Watch};
use crate::content::guard::Guard;
use crate::content::index::{IndexDigest, Limits};
use crate::content::inventory::Entry;
use crate::content::notice::{LAST_LOOK, Notice};
use crate::content::{CLOCKS_DIFFER, ContentError};
use crate::object::layout::{self, Kind};
use crate::object::{Deletion, Objects, Touched};

/// One execution: what deletes, and keeps count.
struct Execution<'a> {
    objects: Objects,
    /// For a last look and a deletion, which must not take longer.
    hurried: Objects,
    notice: tokio::sync::Mutex<Notice>,
    began: Instant,
    gap: Duration,
    next: Mutex<Instant>,
    freed: Mutex<Freed>,
    planned: Tally,
    watch: Watch<'a>,
}

impl Execution<'_> {
    fn is_over(&self) -> bool {
        self.freed.lock().unfinished
    }

    /// Waits for its turn, deletes the object if it is still old, and counts it.
    async fn delete(&self, entry: &Entry, young_from: i64) -> Result<(), ContentError> {
        if self.began.elapsed() > LONGEST {
            self.freed.lock().unfinished = true;
        }
        if self.is_over() {
            return Ok(());
        }
        let turn = {
            let mut next = self.next.lock();
            let turn = (*next).max(Instant::now());
            *next = turn + self.gap;
            turn
        };
        sleep_until(turn).await;
        self.notice.lock().await.renew().await?;
        let came = self.hurried.delete_unless_young(&entry.name(), young_from).await?;
        let mut freed = self.freed.lock();
        match came {
            Deletion::Deleted => {
                if freed.kinds.last().is_none_or(|(kind, _)| *kind != entry.kind) {
                    freed.kinds.push((entry.kind, Tally::default()));
                }
                if let Some((_, tally)) = freed.kinds.last_mut() {
                    tally.add(entry.size);
                }
            }
            Deletion::Young => freed.spared += 1,
            Deletion::Absent => {}
        }
        let done = freed.total().objects;
        drop(freed);
        (self.watch)(Step { doing: "deleting", done, total: self.planned.objects.max(done) });
        Ok(())
    }

    async fn delete_all(&self, entries: Vec<Entry>, young_from: i64) -> Result<(), ContentError> {
        let deletions = stream::iter(entries.into_iter().map(Ok));
        deletions
            .try_for_each_concurrent(DELETIONS, |entry| async move { self.delete(&entry, young_from).await })
            .await
    }

    /// What was written since, by a publisher that has the image, is another name.
    async fn delete_names(&self, roots: &Roots) -> Result<(), ContentError> {
        for entry in &roots.dead_names {
            self.delete(entry, entry.modified + 1).await?;
        }
        Ok(())
    }

    /// Makes an index young, so that its chunks stay for another grace period. One that is damaged keeps nothing.
    async fn renew_index(&self, digest: &[u8; 32]) -> Result<(), ContentError> {
        let name = layout::index(digest);
        match self.objects.touch(&name).await? {
            Touched::Done | Touched::Missing => return Ok(()),
            Touched::Unsupported => {}
        }
        match self.objects.get(&name, Limits::default().encoded()).await? {
            Some(bytes) if IndexDigest::of(&bytes).as_bytes() == digest => {
                Ok(self.objects.put(&name, bytes).await?)
            }
            _ => Ok(()),
        }
    }
}

/// Deletes the chunks that are dead.
struct Chunks<'a, 'b> {
    execution: &'a Execution<'b>,
    young_from: i64,
}

impl Sweep for Chunks<'_, '_> {
    async fn part(&mut self, part: Vec<(Entry, Verdict)>, _: u64) -> Result<(), ContentError> {
        let dead = part.into_iter().filter(|(_, verdict)| *verdict == Verdict::Dead);
        self.execution.delete_all(dead.map(|(entry, _)| entry).collect(), self.young_from).await
    }

    fn goes_on(&self) -> bool {
        !self.execution.is_over()
    }
}

impl Collector {
    /// Reads names and refs again and deletes what nothing has needed both times. What the second reading did not have time for is
    /// left ([`Freed::unfinished`]).
    pub async fn execute(&self, plan: &Plan, watch: Watch<'_>) -> Result<Freed, CollectError> {
        self.check(plan)?;
        let objects = self.inventory.objects().clone();
        watch(Step { doing: "telling publishers, a minute", done: 0, total: 0 });
        let notice = Notice::put_up(&objects, !self.rules.alone).await?;
        let seconds = notice.put_at.abs_diff(notice.store_time);
        if seconds > CLOCKS_DIFFER {
            return Err(ContentError::Clock { seconds }.into());
        }
        let now = objects.now().min(notice.store_time);
        let execution = Execution {
            hurried: objects.within(LAST_LOOK),
            objects,
            notice: tokio::sync::Mutex::new(notice),
            began: Instant::now(),
            gap: Duration::from_secs(1) / self.rules.rate.max(1),
            next: Mutex::new(Instant::now()),
            freed: Mutex::default(),
            planned: plan.report.dead(),
            watch,
        };
        let done = self.delete(&execution, plan, now).await;
        let notice = execution.notice.into_inner();
        // It grows old by itself.
        if let Err(error) = notice.take_down().await {
            tracing::debug!(%error, "the notice of this collection stays");
        }
        done?;
        Ok(execution.freed.into_inner())
    }

    async fn delete(&self, execution: &Execution<'_>, plan: &Plan, now: i64) -> Result<(), CollectError> {
        let (first, known) = (&plan.roots, Some(&plan.report));
        let again = match self.rules.guards.hold(Guard::SecondReading) {
            true => self.read_roots(now, Some(first), execution.watch).await?,
            false => first.clone(),
        };
        let readings = [first, &again];
        self.refuse(&again.damage, known)?;
        let young_from = self.young_from(now);
        let names_first = self.rules.guards.hold(Guard::Order);
        if names_first {
            execution.delete_names(&again).await?;
        }
        self.delete_refs(execution, first, &again, now).await?;
        if !names_first {
            execution.delete_names(&again).await?;
        }
        for kind in [Kind::Trace, Kind::Use, Kind::Document] {
            let mut parts = pin!(self.inventory.parts(kind));
            while let Some(part) = parts.try_next().await? {
                let dead = |entry: &Entry| of_hint(entry, &readings, young_from) == Verdict::Dead;
                execution.delete_all(part.entries.into_iter().filter(dead).collect(), young_from).await?;
            }
        }
        let indexes = self.indexes(&readings, young_from, execution.watch).await?;
        execution.delete_all(indexes.dead, young_from).await?;
        let mut chunks = Chunks { execution, young_from };
        let (needing, watch) = (&indexes.needing, execution.watch);
        let (damage, _) = self.sweep(&readings, needing, young_from, &mut chunks, known, watch).await?;
        self.refuse(&damage, known)
    }

    /// Of refs that go the indexes are made young first.
    async fn delete_refs(
        &self,
        execution: &Execution<'_>,
        first: &Roots,
        again: &Roots,
        now: i64,
    ) -> Result<(), ContentError> {
        let unnamed = now.saturating_sub(self.rules.unnamed.as_secs().cast_signed());
        let young_from = self.young_from(now);
        let mut renewed: HashSet<[u8; 32]> = HashSet::new();
        for (entry, index) in &again.dead_refs {
            if !first.dead_refs.contains_key(entry) || execution.is_over() {
                continue;
            }
            let needed =
                |digest: &[u8; 32]| [first, again].iter().any(|roots| roots.indexes.contains_key(digest));
            if let Some(digest) = index
                && !needed(digest)
                && renewed.insert(*digest)
                && self.rules.guards.hold(Guard::RenewIndex)
            {
                execution.renew_index(digest).await?;
            }
            // One that cannot be read has no name to wait for.
            execution.delete(entry, if index.is_some() { unnamed } else { young_from }).await?;
        }
        Ok(())
    }
}
